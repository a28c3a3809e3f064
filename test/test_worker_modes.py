"""The worker's modes together: what can be combined, and what is refused."""

from __future__ import annotations

import contextlib
import re
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_worker import Environ, hello, running_pool
from test_worker_gate import App, CountingGate

import pothead_worker
import wire
from pothead_worker import ForkServer, Forwarder, PickupPort
from wire import ask, request

APP = """
    import gating

    def app(environ, start_response):
        environ["RESET_CPU_RESERVATION"](0.5)
        start_response("200 OK", [])
        return [b"hello ", environ["wsgi.input"].read()]

    app.wait_for_slot = gating.wait_for_idle_cpus(1)
"""
LOCATION = re.compile(rb"http://127\.0\.0\.1:([0-9]+)(/\S+)")
in_both_modes = pytest.mark.parametrize(
    "mode",
    [
        pytest.param((), id="threads"),
        pytest.param(
            ("--use-request-subprocess",),
            id="processes",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes need Linux"),
        ),
    ],
)


@pytest.fixture
def app_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gated.py").write_text(textwrap.dedent(APP))
    monkeypatch.setenv("PYTHONPATH", str(wire.ROOT))
    return tmp_path


def fetch(response: wire.Response) -> wire.Response:
    """Do what a consumer does with a 303."""
    assert response.status == 303, response
    match = LOCATION.fullmatch(response.value(b"location") or b"")
    assert match, response
    with wire.Peer.connect(("127.0.0.1", int(match[1]))) as consumer:
        consumer.send(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % match[2])
        return consumer.read_response()


# ---- Gates -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def redirecting(
    gate: CountingGate, listener: wire.Listener, with_processes: bool, expiry_s: float, app: Any = hello
) -> Iterator[pothead_worker.WorkerPool]:
    """Run a gated pool that redirects; with processes, these run the demo."""
    fork_server = None
    if with_processes:
        fork_server = ForkServer(None)
        fork_server.start()
    with running_pool(
        App(gate, app),
        listener,
        poll_jobs=True,
        pickups=PickupPort(0, expiry_s=expiry_s, interval_s=0.02),
        fork_server=fork_server,
    ) as pool:
        yield pool


@in_both_modes
def test_gated_job_is_over_when_its_redirected_response_is_delivered(
    listener: wire.Listener, mode: tuple[str, ...]
) -> None:
    gate = CountingGate()
    with redirecting(gate, listener, bool(mode), expiry_s=20), listener.accept() as peer:
        response = ask(peer)
        peer.expect_eof()
        assert gate.reservations[0].done_count == 0
        assert b"ello" in fetch(response).body
        gate.wait_for_done(1)
        assert gate.reservations[0].done_count == 1


@in_both_modes
def test_gated_job_is_over_when_nobody_comes_for_its_response(
    listener: wire.Listener, mode: tuple[str, ...]
) -> None:
    gate = CountingGate()
    with redirecting(gate, listener, bool(mode), expiry_s=0.05), listener.accept() as peer:
        response = ask(peer)
        gate.wait_for_done(1)
        assert fetch(response).status == 410
        with listener.accept() as again:  # the gate has let the next one through
            ask(again)
        gate.wait_for_done(2)
    assert gate.done_counts == {1}


def test_gated_job_whose_consumer_leaves_instead_of_coming_is_over_once(listener: wire.Listener) -> None:
    gate = CountingGate()
    begun = threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        begun.set()
        environ["pothead.cancelled"].wait(wire.DEADLINE_S)
        return hello(environ, start_response)

    with redirecting(gate, listener, False, expiry_s=20, app=app):
        with listener.accept() as peer:
            peer.send(request())
            assert begun.wait(wire.DEADLINE_S)
        gate.wait_for_done(1)
    assert gate.done_counts == {1}


@in_both_modes
def test_all_modes_of_an_app_work_together(
    app_dir: Path, listener: wire.Listener, mode: tuple[str, ...]
) -> None:
    arguments = ["--poll-jobs", "--redirect-response", "0", "--inspection-port", "0", *mode, "gated:app"]
    with wire.worker_process(listener, *arguments, cwd=app_dir) as worker:
        for _ in range(3):
            with listener.accept() as peer:
                assert fetch(ask(peer, "POST /", body=b"you")).body == b"hello you"
                peer.expect_eof()
        worker.terminate()
        assert worker.wait() == 0
        assert not [line for line in worker.errors if "WARNING" in line or "ERROR" in line]


# ---- Forwarding --------------------------------------------------------------------------------------


@contextlib.contextmanager
def forwarding(listener: wire.Listener, local: wire.Listener) -> Iterator[wire.Peer]:
    """Run a pool that forwards to `local` and redirects; yields its slot's connection to the hub."""
    forwarder = Forwarder(f"http://127.0.0.1:{local.worker[1]}")
    with running_pool(forwarder, listener, pickups=PickupPort(0)), listener.accept() as peer:
        yield peer


def test_forwarded_response_can_be_redirected(listener: wire.Listener) -> None:
    with wire.Listener() as local, forwarding(listener, local) as peer:
        peer.send(request("POST /film", body=b"abc"))
        with local.accept() as program:
            assert program.read_request().body == b"abc"
            program.send(b"HTTP/1.1 200 OK\r\nX-Own: 1\r\nContent-Length: 4\r\n\r\nfilm")
            response = fetch(peer.read_response())
    assert (response.status, response.value(b"x-own"), response.body) == (200, b"1", b"film")


def test_program_gets_the_rest_of_the_request_after_the_redirection(listener: wire.Listener) -> None:
    body = b"0123456789" * 500_000
    with wire.Listener() as local, forwarding(listener, local) as peer:
        sender = threading.Thread(target=lambda: peer.send(request("POST /", body=body)))
        sender.start()
        with local.accept() as program:
            head = program.read_head()
            program.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
            answers: list[wire.Response] = []
            consumer = threading.Thread(target=lambda: answers.append(fetch(peer.read_response())))
            consumer.start()
            assert b"content-length: 5000000\r\n" in head.lower()
            assert program.read_exactly(len(body)) == body
            program.send(b"0\r\n\r\n")
            consumer.join(wire.DEADLINE_S)
        sender.join(wire.DEADLINE_S)
    assert [answer.body for answer in answers] == [b"ok"]


def test_program_loses_its_connection_when_nobody_comes(listener: wire.Listener) -> None:
    with wire.Listener() as local:
        forwarder = Forwarder(f"http://127.0.0.1:{local.worker[1]}")
        pickups = PickupPort(0, expiry_s=0.05, interval_s=0.02)
        with running_pool(forwarder, listener, pickups=pickups), listener.accept() as peer:
            peer.send(request())
            with local.accept() as program:
                program.read_head()
                program.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfi")
                assert peer.read_response().status == 303
                program.expect_eof()


# ---- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "--forward http://localhost:1 jobs:app",
            "--forward takes the place of an app, but there is 'jobs:app'",
        ),
        ("--forward http://localhost:1 --poll-jobs", "--poll-jobs needs an app"),
        ("--forward http://localhost:1 --use-request-subprocess", "--use-request-subprocess needs an app"),
        ("--poll-jobs --workers 2", "--poll-jobs and --workers exclude each other"),
        ("--request-timeout 5s", "--request-timeout: only a process can be stopped"),
        ("--redirect-host a.example", "--redirect-host: there is no --redirect-response"),
    ],
)
def test_modes_that_make_no_sense_together_are_refused_in_one_line(
    arguments: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pothead_worker.main(arguments.split()) == 2
    written = capsys.readouterr().err
    assert written.startswith(f"pothead-worker: {reason}") and written.count("\n") == 1


def test_app_without_a_gate_is_refused_before_its_fork_server_starts(
    tmp_path: Path, listener: wire.Listener
) -> None:
    (tmp_path / "ungated.py").write_text("print('imported')\ndef app(environ, start_response): ...\n")
    options = ["--poll-jobs", "--use-request-subprocess", "ungated:app"]
    with wire.worker_process(listener, *options, cwd=tmp_path) as worker:
        assert worker.wait() == 3
        assert worker.lines == ["imported"] and len(worker.errors) == 1
