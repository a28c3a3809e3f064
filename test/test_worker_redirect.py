"""Responses that do not pass the hub: keys, who may have them, and what becomes of those nobody fetches."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_worker import running_pool

import pothead_worker
import wire
from pothead_worker import PickupPort, WorkerPool
from wire import ask, is_line, request

APP = """
    import os, time

    class Body:
        def __init__(self, environ, pieces):
            self.environ, self.pieces = environ, pieces

        def __iter__(self):
            return iter(self.pieces)

        def close(self):
            print("closed", self.environ["pothead.cancelled"].is_set(), flush=True)

    def endless(environ):
        while True:
            yield b"x" * (64 << 20)  # more than the kernel takes ahead of a consumer that does not read

    def stubborn(environ):
        try:
            yield b"part"
            yield b"never"
        finally:
            time.sleep(60)

    def breaking(environ):
        yield b"part"
        raise RuntimeError("oops")

    def crashing(environ):
        yield b"part"
        os._exit(3)

    def echo(environ):
        yield b"begin "
        while data := environ["wsgi.input"].read(50_000):
            yield data

    def large(environ):
        for _ in range(200):
            yield b"y" * (1 << 20)

    PAGES = {"/" + page.__name__: page for page in (endless, stubborn, breaking, crashing, echo, large)}

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        print("process", os.getpid(), flush=True)
        status = "404 Not Found" if path == "/missing" else "201 Created" if path == "/made" else "200 OK"
        headers = [("Content-Type", "text/x"), ("X-Own", "yes"), ("Date", "today")]
        if path == "/sized":
            headers.append(("Content-Length", "6"))
        start_response(status, headers)
        return Body(environ, PAGES[path](environ) if path in PAGES else [b"whole", b"!"])
"""

TIMING_APP = """
    import os, socket

    socket.setdefaulttimeout(float(os.environ["TIMEOUT_S"]))
    from jobs import app
"""

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/x\r\nX-Own: yes\r\nDate: today\r\n%b\r\nConnection: close\r\n\r\n"
)
CHUNKED_HEAD = HEAD % b"Transfer-Encoding: chunked"
WHOLE = CHUNKED_HEAD + b"5\r\nwhole\r\n1\r\n!\r\n0\r\n\r\n"
PROCESSES = pytest.param(
    ["--use-request-subprocess"],
    id="processes",
    marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="request processes need Linux"),
)

in_both_modes = pytest.mark.parametrize("mode", [pytest.param([], id="threads"), PROCESSES])


@pytest.fixture
def start(tmp_path: Path, listener: wire.Listener) -> Iterator[Callable[..., wire.WorkerProcess]]:
    """Run a worker that redirects responses to a free port."""
    (tmp_path / "jobs.py").write_text(textwrap.dedent(APP))
    (tmp_path / "timing.py").write_text(textwrap.dedent(TIMING_APP))
    with contextlib.ExitStack() as stack:

        def start(
            *options: str,
            hub: Any = listener,
            environment: dict[str, str] | None = None,
            app: str = "jobs:app",
        ) -> wire.WorkerProcess:
            arguments = ["--redirect-response", "0", *options, app]
            return stack.enter_context(
                wire.worker_process(hub, *arguments, cwd=tmp_path, environment=environment)
            )

        yield start


class Key:
    """What a Location says."""

    def __init__(self, response: wire.Response) -> None:
        assert response.status == 303, response
        match = re.fullmatch(
            rb"http://(127\.0\.0\.1):([0-9]+)(/[A-Za-z0-9_-]{43})", response.value(b"location") or b""
        )
        assert match, response
        self.address = match[1].decode(), int(match[2])
        self.target = match[3].decode()

    def open(self, method: str = "GET") -> wire.Peer:
        consumer = wire.Peer.connect(self.address)
        consumer.send(request(f"{method} {self.target}"))
        return consumer

    def fetch(self, method: str = "GET") -> bytes:
        with self.open(method) as consumer:
            return consumer.read_to_end()


def is_slot_taken(listener: wire.Listener) -> bool:
    """Return whether the worker refrains from opening another connection, for a moment."""
    return not select.select([listener.sock], [], [], 0.2)[0]


# ---- Redirecting -------------------------------------------------------------------------------------


@in_both_modes
def test_200_is_fetched_from_the_worker_with_its_own_head(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        peer.send(request())
        head = peer.read_head()
        assert re.fullmatch(
            rb"HTTP/1\.1 303 See Other\r\n"
            rb"Location: http://127\.0\.0\.1:[0-9]+/[A-Za-z0-9_-]{43}\r\n"
            rb"Cache-Control: no-store\r\n"
            rb"Content-Length: 0\r\n"
            rb"Date: [^\r\n]+ GMT\r\n"
            rb"Connection: close\r\n\r\n",
            head,
        )
        peer.expect_eof()
    peer.received += head
    key = Key(peer.read_response())
    assert is_slot_taken(listener)
    assert key.fetch() == WHOLE
    worker.wait_for_line(is_line("closed False"))
    with listener.accept() as peer:
        assert Key(ask(peer, "GET /sized")).fetch() == HEAD % b"Content-Length: 6" + b"whole!"
    with listener.accept() as peer:
        assert Key(ask(peer)).target != key.target


@in_both_modes
def test_key_is_good_for_one_get_and_any_number_of_heads(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        key = Key(ask(peer))
    assert [key.fetch("HEAD") for _ in range(2)] == [CHUNKED_HEAD] * 2
    assert key.fetch() == WHOLE
    for method in ("GET", "HEAD"):
        answer = key.fetch(method)
        assert answer.startswith(b"HTTP/1.1 410 Gone\r\n")
        assert answer.endswith(b"410 Gone\n" if method == "GET" else b"\r\n\r\n")
    worker.wait_for_error(
        is_line("WARNING pothead.worker: redirects: unknown, used or expired key from 127.0.0.1")
    )
    assert key.target[1:] not in worker.stderr


@in_both_modes
@pytest.mark.parametrize(
    ("start_line", "status"), [("GET /missing", 404), ("GET /made", 201), ("HEAD /", 200)]
)
def test_everything_else_goes_through_the_hub(
    start: Any, listener: wire.Listener, mode: list[str], start_line: str, status: int
) -> None:
    start(*mode)
    with listener.accept() as peer:
        for _ in range(2):
            response = ask(peer, start_line)
            assert (response.status, response.value(b"x-own")) == (status, b"yes")
            assert response.value(b"connection") is None


@in_both_modes
@pytest.mark.parametrize("size", [5, 3_000_000])
def test_request_body_is_there_after_the_redirection(
    start: Any, listener: wire.Listener, mode: list[str], size: int
) -> None:
    start(*mode)
    body = os.urandom(size)
    with listener.accept() as peer:
        key = Key(ask(peer, "POST /echo", body=body))
    with key.open() as consumer:
        assert consumer.read_response().body == b"begin " + body


@in_both_modes
@pytest.mark.parametrize("timeout_s", [0.1, 3600], ids=["short", "long"])
def test_default_timeout_of_the_app_is_for_its_own_sockets(
    start: Any, listener: wire.Listener, mode: list[str], timeout_s: float
) -> None:
    start(*mode, app="timing:app", environment={"TIMEOUT_S": str(timeout_s)})
    with listener.accept() as peer:
        assert ask(peer, "GET /made").status == 201
        peer.send(request("POST /echo", "Content-Length: 4") + b"wh")
        assert not select.select([peer.sock], [], [], 0.2)[0], "an upload may pause"
        peer.send(b"at")
        key = Key(peer.read_response())
    assert is_slot_taken(listener)
    with key.open() as consumer:
        assert consumer.read_response().body == b"begin what"


def test_malformed_request_body_gives_400_instead(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        peer.send(request("POST /echo", "Transfer-Encoding: chunked") + b"garbage\r\n")
        assert peer.read_response().status == 400
    worker.wait_for_error(is_line("INFO pothead.worker: request r1: request malformed chunked body"))


def test_thread_of_the_app_may_read_while_the_rest_is_fetched() -> None:
    data = os.urandom(1_000_000)
    one, two = socket.socketpair()
    with one, two:
        sender = threading.Thread(target=lambda: two.sendall(data))
        sender.start()
        intake = pothead_worker.Intake(one)
        body = pothead_worker.SeparableBody(pothead_worker.FixedBody(intake, len(data)))
        got = bytearray(body.read(1000) or b"")
        fetcher = threading.Thread(target=body.fetch)
        fetcher.start()
        while piece := body.read(10_000):
            got += piece
        for thread in (sender, fetcher):
            thread.join(wire.DEADLINE_S)
        assert bytes(got) == data
        assert body.left_bytes() == 0
        body.close()


@in_both_modes
def test_200_mb_pass_the_hub_as_a_303_only(start: Any, hub: wire.HubProcess, mode: list[str]) -> None:
    start(*mode, hub=hub)
    with wire.Peer.connect(hub.main) as consumer:
        key = Key(ask(consumer, "GET /large"))
    line = hub.wait_for_line(is_line("path=/large"))
    bytes_out = re.search("status=303 .*bytes_out=([0-9]+) ", line)
    assert bytes_out and int(bytes_out[1]) < 1000
    with key.open() as consumer:
        assert consumer.read_head() == CHUNKED_HEAD
        for _ in range(200):
            consumer.expect(b"100000\r\n")
            assert not consumer.read_exactly(1 << 20).strip(b"y")
            consumer.expect(b"\r\n")
        consumer.expect(b"0\r\n\r\n")
        consumer.expect_eof()
    assert key.fetch().startswith(b"HTTP/1.1 410 ")


# ---- Nobody comes, or leaves -------------------------------------------------------------------------

SHORT = {"OOB_ITEM_EXPIRY_SECONDS": "0.3", "OOB_CLEANUP_INTERVAL_SECONDS": "0.05"}


@in_both_modes
def test_response_that_nobody_fetches_is_closed_and_frees_its_slot(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode, environment=SHORT)
    with listener.accept() as peer:
        key = Key(ask(peer, "GET /endless"))
    worker.wait_for_line(is_line("closed True"))
    worker.wait_for_error(
        is_line("INFO pothead.worker: request r1: nobody came for the response within 0.3 s")
    )
    with listener.accept() as peer:  # the slot is free
        for method in ("HEAD", "GET"):
            assert key.fetch(method).startswith(b"HTTP/1.1 410 ")
        assert ask(peer, "GET /missing").status == 404


def test_key_that_has_expired_is_no_good_although_nobody_has_looked_yet(listener: wire.Listener) -> None:
    pickups = PickupPort(0, expiry_s=0, interval_s=wire.DEADLINE_S)
    with running_pool(hello, listener, pickups=pickups), listener.accept() as peer:
        key = Key(ask(peer))
        for method in ("HEAD", "GET"):
            assert key.fetch(method).startswith(b"HTTP/1.1 410 ")


@in_both_modes
@pytest.mark.parametrize("leave", [wire.Peer.finish_sending, wire.Peer.reset])
def test_consumer_that_leaves_in_the_middle_cancels(
    start: Any, listener: wire.Listener, mode: list[str], leave: Callable[[wire.Peer], None]
) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        key = Key(ask(peer, "GET /endless"))
    with key.open() as consumer:
        consumer.read_until(b"\r\n\r\n")
        leave(consumer)
        worker.wait_for_line(is_line("closed"))
        worker.wait_for_error(is_line("INFO pothead.worker: request r1: the consumer has gone"))
        with listener.accept() as peer:
            assert ask(peer, "GET /missing").status == 404


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="request processes need Linux")
def test_expired_response_has_its_process_killed(start: Any, listener: wire.Listener) -> None:
    worker = start("--use-request-subprocess", environment=SHORT)
    with listener.accept() as peer:
        Key(ask(peer, "GET /stubborn"))
        pid = int(worker.wait_for_line(is_line("process")).split()[1])
        fd = os.pidfd_open(pid)
    with contextlib.closing(os.fdopen(fd, "rb", closefd=True)):
        assert select.select([fd], [], [], wire.DEADLINE_S)[0]


@pytest.mark.parametrize(
    ("mode", "path"),
    [
        ([], "/breaking"),
        pytest.param(*PROCESSES.values, "/breaking", marks=PROCESSES.marks),
        pytest.param(*PROCESSES.values, "/crashing", marks=PROCESSES.marks),
    ],
)
def test_failure_in_the_middle_cuts_the_consumers_own_connection(
    start: Any, listener: wire.Listener, mode: list[str], path: str
) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        key = Key(ask(peer, f"GET {path}"))
    assert key.fetch() == CHUNKED_HEAD + b"4\r\npart\r\n"
    worker.wait_for_error(is_line("oops" if path == "/breaking" else "ended with status 3"))
    with listener.accept() as peer:
        assert ask(peer, "GET /missing").status == 404
    worker.errors.clear()  # the traceback


@in_both_modes
def test_consumer_of_http_1_0_gets_a_body_that_ends_with_its_connection(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        key = Key(ask(peer))
    head = CHUNKED_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
    for method, body in (("HEAD", b""), ("GET", b"whole!")):
        with wire.Peer.connect(key.address) as consumer:
            consumer.send(f"{method} {key.target} HTTP/1.0\r\n\r\n".encode())
            assert consumer.read_to_end() == head + body
    with listener.accept() as peer:
        key = Key(ask(peer, "GET /breaking"))
    with wire.Peer.connect(key.address) as consumer:
        consumer.send(f"GET {key.target} HTTP/1.0\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):  # an end would look as if it were whole
            while consumer.sock.recv(1000):
                pass
    worker.wait_for_error(is_line("oops"))
    worker.errors.clear()  # the traceback


@in_both_modes
def test_drain_waits_for_redirected_bodies(start: Any, listener: wire.Listener, mode: list[str]) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        key = Key(ask(peer))
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
    assert key.fetch() == WHOLE
    assert worker.wait() == 0


@in_both_modes
def test_interrupt_does_not_wait_for_them(start: Any, listener: wire.Listener, mode: list[str]) -> None:
    worker = start(*mode)
    with listener.accept() as peer:
        key = Key(ask(peer))
        peer.close()
        worker.send_signal(signal.SIGINT)
        assert worker.wait() == 1
    with pytest.raises(ConnectionRefusedError):
        key.open()


# ---- The port ----------------------------------------------------------------------------------------


def hello(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


@pytest.fixture(scope="module")
def port() -> Iterator[wire.Address]:
    """A pickup port that is served in this process, for all tests here."""
    with wire.Listener() as listener:
        pool = WorkerPool(hello, listener.worker, pickups=(pickups := PickupPort(0)))
        pool.start()
        with listener.accept():
            yield "127.0.0.1", pickups.port
            pool.stop()
            assert pool.join()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\nA : b\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"\x00", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 410),
        (b"GET / HTTP/1.0\r\n\r\n", 410),
        (b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"A" * 43), 410),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 17_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 17_000 + b"\r\n\r\n", 431),
    ],
)
@pytest.mark.parametrize("is_slow", [False, True], ids=["at once", "byte by byte"])
def test_port_refuses_what_is_not_a_key(port: wire.Address, sent: bytes, status: int, is_slow: bool) -> None:
    with wire.Peer.connect(port) as consumer:
        if is_slow and len(sent) < 1000:
            for byte in sent:
                with contextlib.suppress(ConnectionError):  # the answer may have come already
                    consumer.send(bytes([byte]))
        else:
            consumer.send(sent)
        response = consumer.read_response()
        assert (response.status, response.value(b"connection")) == (status, b"close")
        assert response.value(b"allow") == (b"GET, HEAD" if status == 405 else None)
        consumer.expect_eof()


@pytest.mark.parametrize(("sent", "answer"), [(b"", b""), (b"GET / HT", b"HTTP/1.1 408 Request Timeout\r\n")])
def test_slow_head_times_out(
    monkeypatch: pytest.MonkeyPatch, listener: wire.Listener, sent: bytes, answer: bytes
) -> None:
    monkeypatch.setattr(pothead_worker, "SIDE_HEAD_TIMEOUT_S", 0.1)
    pickups = PickupPort(0, interval_s=0.02)
    pickups.start()
    with contextlib.closing(pickups), wire.Peer.connect(("127.0.0.1", pickups.port)) as consumer:
        consumer.send(sent)
        got = consumer.read_to_end()
        assert got.startswith(answer) and bool(got) == bool(answer)


def test_callers_that_say_nothing_do_not_keep_others_out(
    monkeypatch: pytest.MonkeyPatch, port: wire.Address
) -> None:
    monkeypatch.setattr(pothead_worker, "SIDE_VISITORS", 3)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(wire.Peer.connect(port)) for _ in range(4)]
        silent[0].expect_eof()
        with wire.Peer.connect(port) as consumer:
            consumer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert consumer.read_response().status == 410


def test_port_is_refused_when_it_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert pothead_worker.main(["--redirect-response", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"pothead-worker: --redirect-response: cannot listen on port {port}: Address already in use\n"
    )


@pytest.mark.parametrize(
    ("host", "wanted"), [("w1.example", b"w1.example"), ("[2001:db8::1]", b"[2001:db8::1]")]
)
def test_location_has_the_host_that_was_given(
    start: Any, listener: wire.Listener, host: str, wanted: bytes
) -> None:
    worker = start("--redirect-host", host)
    port = worker.wait_for_error(is_line("listening redirects=*:")).rpartition(":")[2]
    with listener.accept() as peer:
        location = ask(peer).value(b"location")
    assert location and location.startswith(b"http://%b:%b/" % (wanted, port.encode()))


def test_port_is_closed_when_the_app_cannot_be_loaded(tmp_path: Path) -> None:
    command = wire.python(wire.compiled("pothead_worker"), "--redirect-response", "0", "missing:app")
    program = wire.Program(command, tmp_path)
    assert program.wait() == 3
    program.stop()
    (error,) = program.errors
    assert error.startswith("pothead-worker: cannot load 'missing:app': there is no module 'missing'; ")


def test_options_have_the_names_of_the_predecessor() -> None:
    environment = {"OOB_ITEM_EXPIRY_SECONDS": "7", "POTHEAD_WORKER_REDIRECT_RESPONSE": "0"}
    options = pothead_worker.parse_args([], environment)
    assert (options.pickup_expiry_s, options.pickup_interval_s, options.redirect_response) == (7, 1, 0)
    defaults = pothead_worker.parse_args([], {})
    assert (defaults.pickup_expiry_s, defaults.redirect_response, defaults.redirect_host) == (20, None, None)
