"""The inspection port: what the worker is doing, and how its drain goes on."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_worker import no_more_threads

import pothead_worker
import wire

APP = """
    def app(environ, start_response):
        environ["wsgi.input"].read()
        start_response("200 OK", [])
        return [b"hello"]

    app.wait_for_slot = lambda halt: None
"""

in_all_modes = pytest.mark.parametrize(
    "mode",
    [
        pytest.param((), id="threads"),
        pytest.param(("--poll-jobs",), id="gated"),
        pytest.param(
            ("--use-request-subprocess",),
            id="processes",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes need Linux"),
        ),
    ],
)


class Inspected:
    """A worker with an inspection port, and the hub's end of its slot's connection."""

    def __init__(self, worker: wire.WorkerProcess, listener: wire.Listener) -> None:
        self.worker = worker
        line = worker.wait_for_error(lambda text: "listening inspection=127.0.0.1:" in text)
        self.address = ("127.0.0.1", int(line.rpartition(":")[2]))
        self.peer = listener.accept()
        worker.wait_for_error(lambda text: " connected " in text)

    def ask(self, start: str = "GET /inspect") -> wire.Response:
        with wire.Peer.connect(self.address) as visitor:
            response = wire.ask(visitor, start)
            visitor.expect_eof()
            return response

    def begin_request(self) -> None:
        """Have the worker run a request, which `end_request` lets finish."""
        self.peer.send(b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
        self.wait_for("requests_pending", 1)

    def wait_for(self, name: str, number: int) -> None:
        """Look until it is so."""
        wire.until(self.inspect, lambda found: found[name] == number)

    def end_request(self) -> None:
        self.peer.send(b"x")
        assert self.peer.read_response().status == 200

    def inspect(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.ask().body)
        return found


@pytest.fixture
def start(tmp_path: Path, listener: wire.Listener) -> Iterator[Callable[..., Inspected]]:
    (tmp_path / "jobs.py").write_text(textwrap.dedent(APP))
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Inspected:
            arguments = ["--inspection-port", "0", *options, "jobs:app"]
            worker = stack.enter_context(wire.worker_process(listener, *arguments, cwd=tmp_path))
            inspected = Inspected(worker, listener)
            stack.callback(inspected.peer.close)
            return inspected

        yield start


@in_all_modes
def test_inspect_counts_waiting_slots_and_pending_requests(
    start: Callable[..., Inspected], mode: tuple[str, ...]
) -> None:
    inspected = start(*mode)
    inspected.wait_for("slots_waiting", 1)
    assert set(inspected.inspect()) == {"requests_pending", "slots_waiting"}
    assert inspected.inspect()["requests_pending"] == 0
    inspected.begin_request()
    inspected.wait_for("slots_waiting", 1 if mode == ("--poll-jobs",) else 0)
    assert inspected.ask().value(b"content-type") == b"application/json"
    inspected.end_request()


def test_worker_that_reaches_its_hub_is_ready(start: Callable[..., Inspected]) -> None:
    inspected = start()
    assert (inspected.ask("GET /livez").status, inspected.ask("GET /readyz").status) == (200, 200)


def test_worker_that_has_never_reached_its_hub_lives_but_is_not_ready() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        arguments = ["--connect", f"127.0.0.1:{nobody.getsockname()[1]}", "--inspection-port", "0"]
        worker = wire.WorkerProcess(
            wire.python(wire.compiled("pothead_worker"), *arguments), wire.ROOT / "test"
        )
        with wire.running(worker):
            line = worker.wait_for_error(lambda text: "listening inspection=" in text)
            worker.wait_for_error(lambda text: "unreachable" in text)
            for page, status in (("livez", 200), ("readyz", 503)):
                with wire.Peer.connect(("127.0.0.1", int(line.rpartition(":")[2]))) as visitor:
                    assert wire.ask(visitor, f"GET /{page}").status == status


@in_all_modes
def test_apocalypse_streams_from_before_a_drain_to_its_end(
    start: Callable[..., Inspected], mode: tuple[str, ...]
) -> None:
    inspected = start(*mode)
    inspected.begin_request()
    with wire.Peer.connect(inspected.address) as visitor:
        visitor.send(wire.get(b"/apocalypse"))
        assert visitor.read_head().startswith(b"HTTP/1.1 200 OK\r\n")
        visitor.expect(b"1d\r\nwaiting for a drain to begin\n\r\n")
        inspected.worker.terminate()
        visitor.expect(b"14\r\ndraining: 1 running\n\r\n")
        assert inspected.ask("GET /readyz").body == b"draining\n"
        inspected.end_request()
        assert visitor.read_to_end().endswith(b"8\r\ndrained\n\r\n0\r\n\r\n")
    assert inspected.worker.wait() == 0


def test_apocalypse_tells_when_work_was_cut_off(start: Callable[..., Inspected]) -> None:
    inspected = start()
    inspected.begin_request()
    with wire.Peer.connect(inspected.address) as visitor:
        visitor.send(wire.get(b"/apocalypse"))
        visitor.read_until(b"waiting for a drain to begin\n\r\n")
        inspected.worker.send_signal(signal.SIGINT)
        assert visitor.read_to_end().endswith(b"8\r\ncut off\n\r\n0\r\n\r\n")
    assert inspected.worker.wait() == 1


def test_visitor_who_leaves_the_apocalypse_does_not_hold_the_worker_up(
    start: Callable[..., Inspected],
) -> None:
    inspected = start()
    with wire.Peer.connect(inspected.address) as visitor:
        visitor.send(wire.get(b"/apocalypse"))
        visitor.read_head()
    inspected.worker.terminate()
    assert inspected.worker.wait() == 0


def test_other_pages_and_methods_are_told_what_there_is(start: Callable[..., Inspected]) -> None:
    inspected = start()
    missing = inspected.ask("GET /")
    assert (missing.status, missing.body) == (
        404,
        b"There is only /inspect, /apocalypse, /livez, /readyz here.\n",
    )
    assert (inspected.ask("HEAD /nothing").status, inspected.ask("HEAD /apocalypse").status) == (404, 200)
    assert (inspected.ask("HEAD /livez?verbose").status, inspected.ask("POST /inspect").status) == (200, 405)


def test_taken_port_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert pothead_worker.main(["--inspection-port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"pothead-worker: --inspection-port: cannot listen on port {port}: Address already in use\n"
    )


def test_visitors_of_a_page_are_bounded_and_those_of_others_are_served(
    start: Callable[..., Inspected],
) -> None:
    worker = start()
    with contextlib.ExitStack() as stack:
        for _ in range(pothead_worker.PAGE_VISITS):
            visitor = stack.enter_context(wire.Peer.connect(worker.address))
            visitor.send(wire.get(b"/apocalypse"))
            visitor.read_head()
        for _ in range(2):
            assert worker.ask("GET /apocalypse").status == 503
        assert worker.ask("GET /livez").status == 200
        crowded = "inspection: too many visitors at a time of /apocalypse"
        worker.worker.wait_for_error(lambda line: crowded in line)
        assert worker.worker.stderr.count(crowded) == 1


def test_page_that_there_is_no_thread_for_is_refused() -> None:
    port = pothead_worker.PagePort("inspection", 0, "127.0.0.1")
    port.pages = {"/": lambda sock: pothead_worker.Page(b"hello")}
    port.start()
    with contextlib.closing(port):
        for status in (503, 200):
            with no_more_threads() if status == 503 else contextlib.nullcontext():
                with wire.Peer.connect(("127.0.0.1", port.port)) as visitor:
                    visitor.send(wire.get(b"/"))
                    assert visitor.read_response().status == status
                    visitor.expect_eof()
