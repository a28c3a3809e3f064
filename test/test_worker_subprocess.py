"""The worker with a process for each request: what it serves, what it kills, and what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pothead_worker
import wire
from pothead_worker import ForkServer, WorkerPool

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="processes are watched through /proc and pidfd, as Linux has them",
)

APP = """
    import ctypes, os, subprocess, sys, threading, time, zlib

    ESCAPE = '''
    import os, time
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print("started", os.getpid(), flush=True)
            os.write(writer, b"x")
            time.sleep(60)
    else:
        os.read(reader, 1)
    os._exit(0)
    '''

    LEFT = []

    def start_descendants():
        print("started", os.getpid(), flush=True)
        one = subprocess.Popen(["sleep", "60"])
        two = subprocess.Popen(["sleep", "60"], start_new_session=True)
        print("started", one.pid, flush=True)
        print("started", two.pid, flush=True)
        subprocess.run([sys.executable, "-c", ESCAPE])
        LEFT.extend([one, two])

    def endless(environ):
        yield b"part"
        start_descendants()
        time.sleep(60)

    def crash(environ):
        yield b"part"
        os._exit(3)

    def polite(environ):
        yield b"part"
        assert environ["pothead.cancelled"].wait(60) and environ["pothead.cancelled"].is_set()
        print("cancelled", flush=True)
        yield b""
        print("went on", flush=True)

    def slowly(environ):
        yield b"first"
        yield environ["wsgi.input"].read(4)
        yield environ["wsgi.input"].read()

    def checksum(environ):
        crc, size = 0, 0
        while data := environ["wsgi.input"].read(1 << 18):
            crc, size = zlib.crc32(data, crc), size + len(data)
        with open("/proc/self/status") as file:
            peak = next(line.split()[1] for line in file if line.startswith("VmHWM"))
        return [f"{size} {crc} {peak}".encode()]

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/raise":
            raise RuntimeError("oops")
        if path == "/exit":
            os._exit(3)
        if path == "/quit":
            os._exit(0)
        if path == "/segfault":
            ctypes.string_at(0)
        if path == "/sys.exit":
            sys.exit(3)
        if path == "/hang":
            start_descendants()
            time.sleep(60)
        start_response("200 OK", [])
        if path == "/leave":
            start_descendants()
        if path == "/reserve":
            environ["RESET_CPU_RESERVATION"](1.5)
            environ["RESET_CPU_RESERVATION"](cpus=2)
        if path in PAGES:
            return PAGES[path](environ)
        flags = [environ["wsgi.multithread"], environ["wsgi.multiprocess"], environ["wsgi.run_once"]]
        given = f"my.gpu={environ.get('my.gpu')} my.object={environ.get('my.object')}"
        numbers = f"{os.getpid()} {os.getppid()} {os.getsid(0)} {threading.active_count()}"
        return [f"{numbers} {flags} {given}".encode()]

    PAGES = {"/" + page.__name__: page for page in (endless, crash, polite, slowly, checksum)}
"""


@pytest.fixture
def app_dir(tmp_path: Path) -> Path:
    (tmp_path / "jobs.py").write_text(textwrap.dedent(APP))
    return tmp_path


@pytest.fixture
def start(app_dir: Path, listener: wire.Listener) -> Iterator[Callable[..., wire.WorkerProcess]]:
    """Run a worker whose requests have processes of their own, with further options."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, app: str = "jobs:app") -> wire.WorkerProcess:
            arguments = ["--use-request-subprocess", *options, app]
            return stack.enter_context(wire.worker_process(listener, *arguments, cwd=app_dir))

        yield start


def request(start: str = "GET /", *fields: str, body: bytes = b"") -> bytes:
    if body:
        fields = (*fields, f"Content-Length: {len(body)}")
    return "\r\n".join([f"{start} HTTP/1.1", "Host: a", "X-Request-Id: r1", *fields, "", ""]).encode() + body


def ask(peer: wire.Peer, start: str = "GET /", *fields: str, body: bytes = b"") -> wire.Response:
    peer.send(request(start, *fields, body=body))
    return peer.read_response(start.split()[0].encode())


def is_line(text: str) -> Callable[[str], bool]:
    return lambda line: text in line


def identity(response: wire.Response) -> tuple[int, int]:
    """Return the ids of the process that answered and of its parent, the fork server."""
    pid, parent = response.body.split()[:2]
    return int(pid), int(parent)


def started(worker: wire.WorkerProcess, count: int = 4) -> list[int]:
    """Return the ids of a request's process and its descendants, once they have told them."""
    found: list[int] = []

    def is_last(line: str) -> bool:
        if match := re.fullmatch("started ([0-9]+)", line):
            found.append(int(match[1]))
        return len(found) == count

    worker.wait_for_line(is_last)
    return found


def expect_dead(pids: list[int], within_s: float = wire.DEADLINE_S) -> None:
    ends_at = time.monotonic() + within_s
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                poller = select.poll()
                poller.register(fd, select.POLLIN)
                assert poller.poll(max(0, ends_at - time.monotonic()) * 1000), f"{pid} is alive"
            finally:
                os.close(fd)


# ---- Serving -----------------------------------------------------------------------------------------


def test_each_request_has_a_process_and_the_connection_is_kept(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        answers = [ask(peer) for _ in range(3)]
    pids, parents = zip(*map(identity, answers), strict=True)
    assert len(set(pids)) == 3 and len(set(parents)) == 1
    assert not {worker.pid, parents[0]} & set(pids) and parents[0] != worker.pid
    expected = rb"([0-9]+) [0-9]+ \1 1 \[False, True, True\] .*"  # leads a session, one thread
    assert all(re.fullmatch(expected, answer.body) for answer in answers)
    assert all(answer.value(b"connection") is None for answer in answers)


def test_requests_of_several_slots_run_at_the_same_time(start: Any, listener: wire.Listener) -> None:
    start("--workers", "2")
    with listener.accept() as one, listener.accept() as two:
        for peer in (one, two):
            peer.send(request("POST /slowly", "Content-Length: 5") + b"x")
        for peer in (one, two):
            peer.read_until(b"5\r\nfirst\r\n")
        for peer in (two, one):
            peer.send(b"yyyz")
            peer.expect(b"4\r\nxyyy\r\n1\r\nz\r\n0\r\n\r\n")


def test_bodies_are_read_and_written_as_they_come(start: Any, listener: wire.Listener) -> None:
    start()
    for _ in range(2):
        with listener.accept() as peer:
            peer.send(request("POST /slowly", "Transfer-Encoding: chunked"))
            peer.read_until(b"\r\n\r\n5\r\nfirst\r\n")
            peer.send(b"4\r\nsome\r\n")
            peer.expect(b"4\r\nsome\r\n")
            peer.send(b"5\r\n more\r\n0\r\n\r\n")
            peer.expect(b"5\r\n more\r\n0\r\n\r\n")
            peer.expect_eof()  # since its end was unread when the response began


def test_1_gib_is_uploaded_with_flat_memory(start: Any, listener: wire.Listener) -> None:
    worker = start()
    piece, count, crc = bytes(range(256)) * 4096, 1024, 0
    with listener.accept() as peer:
        fork_server = identity(ask(peer))[1]
        before = {pid: peak_kib(pid) for pid in (worker.pid, fork_server)}
        peer.send(request("PUT /checksum", f"Content-Length: {len(piece) * count}"))
        for _ in range(count):
            peer.send(piece)
            crc = zlib.crc32(piece, crc)
        size, got, peak = peer.read_response().body.split()
    assert (int(size), int(got)) == (len(piece) * count, crc)
    assert int(peak) < max(before.values()) + 8192
    for pid, kib in before.items():
        assert peak_kib(pid) < kib + 2048


def peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def test_connection_with_something_unread_is_not_kept(start: Any, listener: wire.Listener) -> None:
    start()
    with listener.accept() as peer:
        peer.send(request() + request())
        assert peer.read_response().status == 200
        peer.expect_eof()
    with listener.accept() as peer:
        assert ask(peer, "GET /", "Connection: close").value(b"connection") == b"close"
        peer.expect_eof()
    with listener.accept() as peer:
        assert ask(peer, "POST /", body=b"unread" * 1000).value(b"connection") is None
        assert ask(peer).status == 200


def test_garbage_from_the_hub_gives_400(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        peer.send(b"garbage\r\n\r\n")
        assert peer.read_response().status == 400
        worker.wait_for_error(is_line("not a request from the hub"))


def test_thousand_requests_leave_nothing_behind(start: Any, listener: wire.Listener, app_dir: Path) -> None:
    worker = start()

    def left_by(fork_server: int) -> tuple[int, int, set[str], list[str]]:
        for pid in (worker.pid, fork_server):
            wire.until_asleep(pid)  # it may have told of something that it is not quite done with
        fds = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (worker.pid, fork_server)]
        children = Path(f"/proc/{fork_server}/task/{fork_server}/children").read_text().split()
        names = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("tmp", "pothead"))}
        return fds[0], fds[1], {*os.listdir(app_dir), *names}, children

    with listener.accept() as peer:
        fork_server = identity(ask(peer))[1]
        ask(peer)  # the worker is done with the first one when it takes the second
        peer.send(b"garbage\r\n\r\n")
        peer.read_response()
        peer.finish_sending()
        peer.expect_eof()
    with listener.accept() as peer:
        before = left_by(fork_server)
        for _ in range(1000):
            assert ask(peer).status == 200
        peer.send(b"garbage\r\n\r\n")
        peer.read_response()
        peer.finish_sending()
        peer.expect_eof()
    with listener.accept():
        after = left_by(fork_server)
    assert after[:2] == before[:2]
    assert after[2] <= before[2]
    assert after[3] == before[3] == []


def test_nothing_of_a_request_is_left_to_the_collector_of_garbage(
    listener: wire.Listener, app_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: list[weakref.ref[pothead_worker.Exchange]] = []
    answer = pothead_worker.ProcessServer.answer

    def remember(server: pothead_worker.ProcessServer, exchange: pothead_worker.Exchange) -> object:
        exchanges.append(weakref.ref(exchange))
        return answer(server, exchange)

    monkeypatch.setattr(pothead_worker.ProcessServer, "answer", remember)
    monkeypatch.syspath_prepend(app_dir)
    fork_server = ForkServer("jobs:app")
    fork_server.start()
    gc.disable()
    try:
        pool = WorkerPool(None, listener.worker, fork_server=fork_server)
        pool.start()
        with listener.accept() as peer:
            ask(peer)
            ask(peer)  # the worker is done with the first one when it takes the second
        pool.stop()
        assert pool.join()
    finally:
        gc.enable()
    assert [exchange() for exchange in exchanges] == [None, None]


# ---- Processes that fail -----------------------------------------------------------------------------


def test_exception_is_logged_by_the_worker_with_its_traceback(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        assert ask(peer, "GET /raise").body == b"500 Internal Server Error\nrequest id: r1\n"
        assert ask(peer).status == 200  # the connection is kept
    worker.wait_for_error(is_line("ERROR pothead.worker: request r1: the application raised an exception"))
    worker.wait_for_error(is_line("jobs.py"))
    worker.wait_for_error(is_line("RuntimeError: oops"))
    worker.errors.clear()  # which would be a fault otherwise


def test_sys_exit_gives_500(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        assert ask(peer, "GET /sys.exit").status == 500
        assert ask(peer).status == 200
    worker.wait_for_error(is_line("SystemExit: 3"))
    worker.errors.clear()


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("/exit", "ended with status 3"),
        ("/quit", "ended with status 0 in the midst of its request"),
        ("/segfault", "was killed by SIGSEGV"),
        ("/crash", "ended with status 3"),
    ],
)
def test_crash_costs_its_own_response_only(
    start: Any, listener: wire.Listener, path: str, ending: str
) -> None:
    worker = start()
    with listener.accept() as peer:
        peer.send(request(f"GET {path}"))
        if path == "/crash":
            peer.read_until(b"\r\n\r\n4\r\npart\r\n")
        peer.expect_eof()
        worker.wait_for_error(is_line(f"ERROR pothead.worker: request r1: its process {ending}"))
    with listener.accept() as peer:
        assert ask(peer).status == 200


def test_what_a_finished_request_leaves_running_is_killed(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        assert ask(peer, "GET /leave").status == 200
        expect_dead(started(worker))
        assert ask(peer).status == 200


@pytest.mark.parametrize("is_fork_server", [False, True])
def test_process_that_cannot_be_made_for_want_of_descriptors_is_told(
    start: Any, listener: wire.Listener, is_fork_server: bool
) -> None:
    worker = start()
    with listener.accept() as peer:
        fork_server = identity(ask(peer))[1]
        starved = fork_server if is_fork_server else worker.pid
        limits = resource.prlimit(starved, resource.RLIMIT_NOFILE)
        resource.prlimit(starved, resource.RLIMIT_NOFILE, (5, limits[1]))
        peer.send(request())
        peer.expect_eof()
        reason = "the fork server has died, or can open no more files"
        told = f"could not be started: {reason if is_fork_server else 'Too many open files'}"
        worker.wait_for_error(is_line(f"ERROR pothead.worker: request r1: its process {told}"))
        resource.prlimit(starved, resource.RLIMIT_NOFILE, limits)
    with listener.accept() as peer:
        assert ask(peer).status == 200


# ---- Killing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/hang", "/endless"])
@pytest.mark.parametrize("leave", [wire.Peer.finish_sending, wire.Peer.reset])
def test_consumer_that_leaves_has_everything_killed_within_a_second(
    start: Any, listener: wire.Listener, path: str, leave: Callable[[wire.Peer], None]
) -> None:
    worker = start()
    peer = listener.accept()
    with peer:
        peer.send(request(f"GET {path}"))
        pids = started(worker)
        left_at = time.monotonic()
        leave(peer)
        expect_dead(pids, within_s=1 - (time.monotonic() - left_at))
        worker.wait_for_error(is_line("INFO pothead.worker: request r1: the consumer has gone"))
    with listener.accept() as peer:
        assert ask(peer).status == 200


def test_consumer_that_leaves_the_hub_has_everything_killed_too(
    hub: wire.HubProcess, consumer: wire.Peer, app_dir: Path
) -> None:
    with wire.worker_process(hub, "--use-request-subprocess", "jobs:app", cwd=app_dir) as worker:
        consumer.send(request("GET /hang"))
        pids = started(worker)
        left_at = time.monotonic()
        consumer.close()
        expect_dead(pids, within_s=1 - (time.monotonic() - left_at))
        hub.wait_for_line(is_line("code=CR"))


def test_app_is_told_before_it_is_killed(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        peer.send(request("GET /polite"))
        peer.read_until(b"part\r\n")
        peer.finish_sending()
        worker.wait_for_line(is_line("cancelled"))
        worker.wait_for_error(is_line("the consumer has gone"))
    with listener.accept() as peer:
        assert ask(peer).status == 200
    assert "went on" not in worker.lines
    assert worker.stderr.count("the consumer has gone") == 1


def test_timeout_before_the_response_gives_504(start: Any, listener: wire.Listener) -> None:
    worker = start("--request-timeout", "300ms")
    with listener.accept() as peer:
        response = ask(peer, "POST /hang", body=b"unread" * 50_000)
        assert (response.status, response.value(b"connection")) == (504, b"close")
        told = b"stopped after the request timeout of 0.3 s"
        assert response.body == b"504 Gateway Timeout: %b.\nrequest id: r1\n" % told
        expect_dead(started(worker))
        worker.wait_for_error(
            is_line("WARNING pothead.worker: request r1: stopped after the request timeout of 0.3 s")
        )
        peer.finish_sending()
        peer.expect_eof()


def test_timeout_may_be_longer_than_the_kernel_polls(start: Any, listener: wire.Listener) -> None:
    start("--request-timeout", "600h")
    with listener.accept() as peer:
        assert ask(peer).status == 200


def test_timeout_after_the_head_cuts_the_response(start: Any, listener: wire.Listener) -> None:
    worker = start("--request-timeout", "300ms")
    with listener.accept() as peer:
        peer.send(request("GET /endless"))
        peer.read_until(b"part\r\n")
        peer.expect_eof()
        expect_dead(started(worker))
    with listener.accept() as peer:
        assert ask(peer).status == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_end_of_the_worker_is_the_end_of_its_processes(
    start: Any, listener: wire.Listener, number: signal.Signals
) -> None:
    worker = start()
    with listener.accept() as peer:
        fork_server = identity(ask(peer))[1]
        peer.send(request("GET /hang"))
        pids = started(worker)
        worker.send_signal(number)
        assert worker.wait() == (1 if number == signal.SIGINT else -signal.SIGKILL)
        expect_dead([fork_server, *pids], within_s=wire.DEADLINE_S if number == signal.SIGKILL else 0)
        peer.expect_eof()
    assert not [line for line in worker.errors if "the consumer has gone" in line]


def test_drain_finishes_what_runs(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        fork_server = identity(ask(peer))[1]
        peer.send(request("POST /checksum", "Content-Length: 4"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a terminal or a supervisor may do
            os.kill(fork_server, number)
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
        peer.send(b"done")
        response = peer.read_response()
        assert response.body.startswith(b"4 ")
        peer.expect_eof()
        assert worker.wait() == 0
        expect_dead([fork_server], within_s=0)


def test_drain_is_told_to_a_response_that_has_not_begun(start: Any, listener: wire.Listener) -> None:
    worker = start()
    with listener.accept() as peer:
        peer.send(request("POST /checksum", "Content-Length: 4"))
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
        peer.send(b"done")
        peer.read_response()
        peer.expect_eof()
        assert worker.wait() == 0


def test_fork_server_that_dies_is_started_again(start: Any, listener: wire.Listener) -> None:
    worker = start("--workers", "2")
    with listener.accept() as peer, listener.accept() as other:
        fork_server = identity(ask(other))[1]
        peer.send(request("GET /endless"))
        peer.read_until(b"part\r\n")
        pids = started(worker)
        os.kill(fork_server, signal.SIGKILL)
        peer.expect_eof()
        expect_dead(pids[:2])  # those that have left the group have nobody now who knows them
        worker.wait_for_error(
            is_line("ERROR pothead.worker: the fork server was killed by SIGKILL; its requests are cut off")
        )
        worker.wait_for_error(
            is_line("ERROR pothead.worker: request r1: its process was cut off with the fork server")
        )
        assert identity(ask(other))[1] != fork_server
        worker.wait_for_error(is_line("INFO pothead.worker: another fork server is ready"))
        for pid in pids[2:]:
            os.kill(pid, signal.SIGKILL)


def test_group_is_killed_even_if_its_channel_ends_before_the_fork_server_is_known_to_be_lost() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as descendant:
        process = pothead_worker.RequestProcess(None, 60)  # type: ignore[arg-type]  # has no request
        process.pid = descendant.pid
        process._on_silence()
        assert descendant.wait() == -signal.SIGKILL
        process._control.close()
        process._other_end.close()


def test_fork_server_that_cannot_start_again_is_tried_again(
    start: Any, listener: wire.Listener, app_dir: Path
) -> None:
    worker = start()
    with listener.accept() as peer:
        fork_server = identity(ask(peer, "GET /", "Connection: close"))[1]
        peer.expect_eof()
    with listener.accept() as peer:
        source = (app_dir / "jobs.py").read_text()
        (app_dir / "jobs.py").write_text("import missing")
        os.kill(fork_server, signal.SIGKILL)
        worker.wait_for_error(
            is_line("ERROR pothead.worker: cannot start another fork server: cannot load 'jobs:app'")
        )
        peer.send(request())
        peer.expect_eof()
        worker.wait_for_error(is_line("its process could not be started: there is no fork server"))
        (app_dir / "jobs.py").write_text(source)
        worker.wait_for_error(is_line("another fork server is ready"))
    with listener.accept() as peer:
        assert ask(peer).status == 200
    worker.errors.clear()


# ---- Importing the app -------------------------------------------------------------------------------


def run_worker(cwd: Path, *arguments: str) -> tuple[int, list[str]]:
    command = wire.python(str(wire.ROOT / "pothead_worker.py"), "--use-request-subprocess", *arguments)
    program = wire.Program(command, cwd)
    status = program.wait()
    with contextlib.suppress(AssertionError):
        program.stop()
    return status, program.errors


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("1 / 0", "importing module 'mod' failed"),
        ("import os; os._exit(7)", "importing it ended the process: it ended with status 7"),
        ("import os; os.kill(os.getpid(), 9)", "importing it ended the process: it was killed by SIGKILL"),
        ("other = 5", "module 'mod' has no attribute 'app'"),
    ],
)
def test_import_that_fails_ends_the_worker_with_3(tmp_path: Path, source: str, wanted: str) -> None:
    (tmp_path / "mod.py").write_text(source)
    status, errors = run_worker(tmp_path, "mod:app")
    assert (status, errors[-1]) == (3, f"pothead-worker: cannot load 'mod:app': {wanted}")
    if source == "1 / 0":
        assert errors[0] == "Traceback (most recent call last):"
        assert errors[-2] == "ZeroDivisionError: division by zero"
        assert not any("pothead_worker.py" in line for line in errors)
    else:
        assert len(errors) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_app_is_imported_ends_the_worker_quietly(
    start: Any, app_dir: Path, number: signal.Signals
) -> None:
    (app_dir / "big.py").write_text(
        "import os, time\nprint('importing', os.getpid(), flush=True)\ntime.sleep(60)"
    )
    worker = start(app="big:app")
    fork_server = int(worker.wait_for_line(is_line("importing")).split()[1])
    worker.send_signal(number)
    assert (worker.wait(), worker.stderr) == (0, "")
    expect_dead([fork_server], within_s=0)


def test_output_threads_and_signals_of_the_import(start: Any, listener: wire.Listener, app_dir: Path) -> None:
    (app_dir / "chatty.py").write_text(
        textwrap.dedent(
            """
            import signal, sys, threading
            print("imported with", sys.argv[-1])  # not flushed
            threading.Thread(target=threading.Event().wait, name="left-behind", daemon=True).start()
            signal.signal(signal.SIGTERM, lambda *_: None)
            default = signal.getsignal(signal.SIGTERM)

            def app(environ, start_response):
                start_response("200 OK", [])
                kept = signal.getsignal(signal.SIGTERM) is default
                interrupted = signal.getsignal(signal.SIGINT) is signal.default_int_handler
                return [f"{kept} {interrupted} {threading.active_count()}".encode()]
            """
        )
    )
    worker = start(app="chatty:app")
    with listener.accept() as peer:
        for _ in range(3):
            assert ask(peer).body == b"True True 1"
    worker.wait_for_error(is_line("WARNING pothead.worker: importing the app started threads"))
    worker.terminate()
    assert worker.wait() == 0
    assert worker.lines == ["imported with chatty:app"]
    assert worker.stderr.count("left-behind") == 1 and "Deprecat" not in worker.stderr


def test_command_that_a_thread_of_the_import_starts_is_no_stray(
    start: Any, listener: wire.Listener, app_dir: Path
) -> None:
    (app_dir / "threaded.py").write_text(
        textwrap.dedent(
            """
            import os, subprocess, threading
            reader, writer = os.pipe()

            def run():
                os.read(reader, 1)  # a request has come
                with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
                    print("started", command.pid, flush=True)
                    os.read(reader, 1)  # another one has come, after the first one's process had ended
                    print("answer", *command.communicate(b"alive")[0].splitlines(), flush=True)

            threading.Thread(target=run, daemon=True).start()

            def app(environ, start_response):
                start_response("200 OK", [])
                if environ["PATH_INFO"] == "/tell":
                    os.write(writer, b"x")
                return []
            """
        )
    )
    worker = start(app="threaded:app")
    with listener.accept() as peer:
        ask(peer, "GET /tell")
        started(worker, 1)
        for path in ("/", "/", "/tell"):
            assert ask(peer, f"GET {path}").status == 200
        assert worker.wait_for_line(is_line("answer")) == "answer b'alive'"


def test_demo_is_served_by_processes_too(listener: wire.Listener) -> None:
    with wire.worker_process(listener, "--use-request-subprocess") as worker, listener.accept() as peer:
        assert f"process: {worker.pid}\n".encode() not in ask(peer).body


# ---- In a program, and the command line --------------------------------------------------------------


class Gate:
    """Lets everything through, and gives its jobs what they can hand back."""

    def __init__(self) -> None:
        self.called: list[tuple[float, int]] = []
        self.paths: list[str] = []

    def __call__(self, environ: Any, start_response: Any) -> Any:
        raise AssertionError("the app runs in a process of its own")

    def wait_for_slot(self, halt: Any) -> Gate:
        return self

    def request_received(self, environ: Any) -> None:
        self.paths.append(environ["PATH_INFO"])
        environ["RESET_CPU_RESERVATION"] = lambda cpus: self.called.append((cpus, os.getpid()))
        environ["my.gpu"] = 3
        environ["my.object"] = object()


def test_what_a_gate_gives_to_the_environ_is_called_in_the_worker(
    listener: wire.Listener, app_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    has_ended = threading.Event()

    def on_end(pid: int) -> None:
        ended.append(pid)
        has_ended.set()

    monkeypatch.syspath_prepend(app_dir)
    fork_server = ForkServer("jobs:app", on_end)
    fork_server.start()
    gate = Gate()
    pool = WorkerPool(gate, listener.worker, poll_jobs=True, fork_server=fork_server)
    pool.start()
    with listener.accept() as peer:
        response = ask(peer, "GET /reserve")
        pid, _ = identity(response)
        assert response.value(b"connection") == b"close"
        assert response.body.endswith(b"my.gpu=3 my.object=None")
        assert has_ended.wait(wire.DEADLINE_S)
        pool.stop()
        assert pool.join()
    assert gate.called == [(1.5, os.getpid()), (2, os.getpid())] and gate.paths == ["/reserve"]
    assert ended == [pid]


def test_pool_without_an_app_or_a_fork_server_is_refused() -> None:
    with pytest.raises(ValueError, match="no application"):
        WorkerPool(None)


def test_system_that_cannot_hand_a_connection_on_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "send_fds")
    assert pothead_worker.main(["--use-request-subprocess"]) == 2
    assert capsys.readouterr().err == (
        "pothead-worker: --use-request-subprocess: this system cannot hand a connection to another process\n"
    )


def test_options_come_from_the_environment_too() -> None:
    environment = {"POTHEAD_WORKER_USE_REQUEST_SUBPROCESS": "Yes", "POTHEAD_WORKER_REQUEST_TIMEOUT": "2m"}
    options = pothead_worker.parse_args([], environment)
    assert (options.use_request_subprocess, options.request_timeout) == (True, 120)
