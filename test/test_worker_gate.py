"""Gates: under --poll-jobs, a worker connects only when its app says that there is room for a job."""

from __future__ import annotations

import contextlib
import os
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_worker import Environ, Lines, hello, lines, no_more_threads, running_pool

import gating
import pothead_worker
import wire
from wire import ask, request

__all__ = ["lines"]  # a fixture


class Reservation:
    """What the gate returns for one job."""

    def __init__(self, gate: CountingGate) -> None:
        self.gate = gate
        self.environs: list[Environ] = []
        self.done_count = 0

    def request_received(self, environ: Environ) -> None:
        environ["RESET_CPU_RESERVATION"] = self.gate
        with self.gate.changed:
            self.environs.append(environ)
            self.gate.changed.notify_all()

    def done(self) -> None:
        with self.gate.changed:
            self.done_count += 1
            self.gate.free += 1
            self.gate.changed.notify_all()


class CountingGate:
    """A gate that knows what it has let through, and lets a test wait for it."""

    def __init__(self, jobs: int = 1) -> None:
        self.free = jobs
        self.asked = 0
        self.changed = threading.Condition()
        self.reservations: list[Reservation] = []

    def __call__(self, halt: Callable[[], bool]) -> object:
        with self.changed:
            self.asked += 1
            self.changed.notify_all()
            while not self.changed.wait_for(lambda: self.free, 0.02):
                if halt():
                    return None
            self.free -= 1
            self.reservations.append(Reservation(self))
            return self.reservations[-1]

    def wait_for(self, predicate: Callable[[CountingGate], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: predicate(self), wire.DEADLINE_S)

    def wait_for_done(self, jobs: int) -> None:
        self.wait_for(lambda gate: sum(each.done_count for each in gate.reservations) >= jobs)

    @property
    def done_counts(self) -> set[int]:
        return {each.done_count for each in self.reservations}


class App:
    """An app that is an object, with its gate as a method."""

    def __init__(self, gate: Callable[[Callable[[], bool]], object], run: Any = hello) -> None:
        self.gate = gate
        self.run = run

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        result: Iterable[bytes] = self.run(environ, start_response)
        return result

    def wait_for_slot(self, halt: Callable[[], bool]) -> object:
        return self.gate(halt)


@contextlib.contextmanager
def gated(
    gate: Callable[[Callable[[], bool]], object], listener: wire.Listener, run: Any = hello, **options: Any
) -> Iterator[pothead_worker.WorkerPool]:
    with running_pool(App(gate, run), listener, poll_jobs=True, **options) as pool:
        yield pool


# ---- One connection for one request ------------------------------------------------------------------


def test_each_connection_serves_one_request_and_the_gate_is_told(listener: wire.Listener) -> None:
    seen = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        seen.append((environ["RESET_CPU_RESERVATION"], gate.reservations[-1].done_count))
        return hello(environ, start_response)

    gate = CountingGate()
    with gated(gate, listener, app):
        for number in range(1, 4):
            with listener.accept() as peer:
                response = ask(peer, f"GET /{number}")
                assert (response.body, response.value(b"connection")) == (b"hello", b"close")
                peer.expect_eof()
            gate.wait_for_done(number)
            assert gate.reservations[number - 1].environs[0]["PATH_INFO"] == f"/{number}"
        with listener.accept():
            pass
    assert gate.done_counts == {1}
    assert seen == [(gate, 0)] * 3


def test_gate_that_counts_may_let_several_jobs_through_at_once(listener: wire.Listener) -> None:
    gate = CountingGate(jobs=3)
    with gated(gate, listener), contextlib.ExitStack() as stack:
        peers = [stack.enter_context(listener.accept()) for _ in range(3)]
        gate.wait_for(lambda gate: gate.asked == 4)
        listener.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert [ask(peer).status for peer in reversed(peers)] == [200] * 3
    assert gate.done_counts == {1}


def test_gate_that_returns_nothing_is_asked_again_when_its_connection_is_taken(
    listener: wire.Listener,
) -> None:
    asked_at_request = []
    asked = 0

    def gate(halt: Callable[[], bool]) -> None:
        nonlocal asked
        asked += 1

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        asked_at_request.append(asked)
        return hello(environ, start_response)

    with gated(gate, listener, app):
        for _ in range(5):
            with listener.accept() as peer:
                assert ask(peer).status == 200
    assert [count - number for number, count in enumerate(asked_at_request)] <= [2] * 5


@pytest.mark.parametrize("beside", [(), (CountingGate(jobs=40),)], ids=["alone", "beside one that counts"])
def test_gate_that_returns_nothing_is_asked_no_more_often_as_one_of_several(
    beside: tuple[CountingGate, ...], listener: wire.Listener
) -> None:
    asked: list[int] = []
    has_begun = threading.Event()

    def gate(halt: Callable[[], bool]) -> None:
        asked.append(len(asked))

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        has_begun.set()
        return hello(environ, start_response)

    with gated(gating.all_of(*beside, gate), listener, app):
        with listener.accept() as first:
            listener.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                listener.accept()
            assert (len(asked), has_begun.is_set()) == (1, False)
            listener.sock.settimeout(wire.DEADLINE_S)
            first.send(request())
            with listener.accept() as second:
                assert has_begun.wait(wire.DEADLINE_S)
                assert [ask(second).status, first.read_response().status] == [200, 200]


def test_jobs_never_outnumber_what_the_gate_permits(hub: wire.HubProcess) -> None:
    running = [0, 0]  # now, at most
    lock = threading.Lock()
    both_run = threading.Barrier(2)

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        with lock:
            running[0] += 1
            running[1] = max(running)
        both_run.wait(wire.DEADLINE_S)
        with lock:
            running[0] -= 1
        return hello(environ, start_response)

    gate = CountingGate(jobs=2)
    pool = pothead_worker.WorkerPool(App(gate, app), hub.worker, poll_jobs=True)
    pool.start()
    with contextlib.ExitStack() as stack:
        consumers = [stack.enter_context(wire.Peer.connect(hub.main)) for _ in range(10)]
        for consumer in consumers:
            consumer.send(request())
        assert [consumer.read_response().body for consumer in consumers] == [b"hello"] * 10
    pool.stop()
    assert pool.join() is True
    assert running[1] == 2
    assert gate.done_counts == {1}


# ---- done() exactly once, whatever happens -----------------------------------------------------------


def send_garbage(peer: wire.Peer) -> None:
    peer.send(b"garbage\r\n\r\n")
    assert peer.read_response().status == 400


def leave_early(peer: wire.Peer) -> None:
    peer.send(request("GET /wait"))
    assert peer.read_until(b"3\r\nrun\r\n")


def ask_in_vain(peer: wire.Peer) -> None:
    assert ask(peer, "GET /raise").status == 500


def ask_for_exit(peer: wire.Peer) -> None:
    assert ask(peer, "GET /exit").status == 500


def drop(peer: wire.Peer) -> None:
    """The hub goes while the connection waits."""


def drop_rudely(peer: wire.Peer) -> None:
    peer.reset()


def cut_the_head(peer: wire.Peer) -> None:
    peer.send(b"GET / HTT")


def cut_the_body(peer: wire.Peer) -> None:
    peer.send(request("PUT /read", "Content-Length: 9") + b"short")


def misbehave(environ: Environ, start_response: Any) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/raise":
        raise RuntimeError("no luck")
    if path == "/exit":
        raise SystemExit(3)
    if path == "/read":
        environ["wsgi.input"].read()
    start_response("200 OK", [])
    return wait_until_cancelled(environ) if path == "/wait" else [b"hello"]


def wait_until_cancelled(environ: Environ) -> Iterator[bytes]:
    yield b"run"
    assert environ["pothead.cancelled"].wait(wire.DEADLINE_S)
    yield b"gone"


@pytest.mark.parametrize(
    "behave",
    [send_garbage, leave_early, ask_in_vain, ask_for_exit, drop, drop_rudely, cut_the_head, cut_the_body],
)
def test_done_is_called_once_and_the_slot_is_offered_again(
    behave: Callable[[wire.Peer], None], listener: wire.Listener
) -> None:
    gate = CountingGate()
    with gated(gate, listener, misbehave):
        with listener.accept() as peer:
            behave(peer)
        gate.wait_for_done(1)
        with listener.accept() as peer:
            assert ask(peer).body == b"hello"
        gate.wait_for_done(2)
    assert gate.done_counts == {1}


def test_done_is_called_once_when_the_hub_cannot_be_reached(lines: Lines) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
    gate = CountingGate(jobs=2)
    pool = pothead_worker.WorkerPool(App(gate), address, poll_jobs=True)
    pool.start()
    gate.wait_for_done(4)
    pool.stop()
    assert pool.join() is True
    assert gate.done_counts == {1}
    assert len(lines.having("unreachable")) == 1, "a line an episode"


def test_hub_that_refuses_is_tried_again_with_pauses(listener: wire.Listener) -> None:
    gate = CountingGate()
    begun_at = time.monotonic()
    with gated(gate, listener):
        for _ in range(4):
            listener.accept().close()
        listener.accept().close()
    assert time.monotonic() - begun_at > 0.05 + 0.1 + 0.2 + 0.4


def test_done_is_called_once_for_each_connection_that_waits_when_the_worker_stops(
    listener: wire.Listener,
) -> None:
    gate = CountingGate(jobs=3)
    with gated(gate, listener) as pool, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(listener.accept()) for _ in range(3)]
        pool.stop()
        for peer in peers:
            peer.expect_eof()
        assert pool.join() is True
        assert len(gate.reservations) >= 3 and gate.done_counts == {1}


def test_what_the_gate_lets_through_when_the_worker_stops_is_done_at_once(listener: wire.Listener) -> None:
    gate = CountingGate()

    def slow_gate(halt: Callable[[], bool]) -> object:
        is_asked.set()
        assert may_return.wait(wire.DEADLINE_S)
        assert halt()
        return gate(halt)

    is_asked, may_return = threading.Event(), threading.Event()
    with gated(slow_gate, listener) as pool:
        assert is_asked.wait(wire.DEADLINE_S)
        pool.stop()
        may_return.set()
        assert pool.join() is True
        assert [each.done_count for each in gate.reservations] == [1]
        listener.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_running_job_finishes_and_is_done_once_when_the_worker_stops(listener: wire.Listener) -> None:
    gate = CountingGate()
    with gated(gate, listener, misbehave) as pool, listener.accept() as peer:
        peer.send(request("PUT /read", "Content-Length: 5") + b"12")
        gate.wait_for(lambda gate: gate.reservations[0].environs)
        pool.stop()
        assert [each.done_count for each in gate.reservations] == [0]
        peer.send(b"345")
        assert peer.read_response().body == b"hello"
        assert pool.join() is True
        assert gate.done_counts == {1}


# ---- Gates that fail ---------------------------------------------------------------------------------


STUBBORN = """
    import time

    class Job:
        def done(self):
            print("done", flush=True)

    def app(environ, start_response):
        print("running", flush=True)
        time.sleep(60)

    jobs = [Job()]

    def wait_for_slot(halt):
        while not jobs and not halt():
            time.sleep(0.02)
        return jobs.pop() if jobs else None

    app.wait_for_slot = wait_for_slot
"""


def test_job_that_is_cut_off_and_goes_on_is_done_when_the_worker_ends(
    listener: wire.Listener, tmp_path: Path
) -> None:
    (tmp_path / "stubborn.py").write_text(textwrap.dedent(STUBBORN))
    options = ("--poll-jobs", "--graceful-timeout", "0s", "stubborn:app")
    with wire.worker_process(listener, *options, cwd=tmp_path) as worker, listener.accept() as peer:
        peer.send(request())
        worker.wait_for_line(lambda line: line == "running")
        worker.terminate()
        worker.wait_for_line(lambda line: line == "done")
        assert worker.wait() == 1


def test_gate_that_raises_is_logged_and_asked_again(listener: wire.Listener, lines: Lines) -> None:
    gate = CountingGate()
    failures: list[BaseException] = [RuntimeError("no sensor"), SystemExit(3)]

    def raising_gate(halt: Callable[[], bool]) -> object:
        if failures:
            raise failures.pop(0)
        return gate(halt)

    with gated(raising_gate, listener), listener.accept() as peer:
        assert ask(peer).body == b"hello"
    logged = lines.wait_for("the gate raised an exception", count=2)
    assert "Traceback" in logged and "RuntimeError: no sensor" in logged


def test_back_off_of_a_gate_begins_anew_after_a_request(
    listener: wire.Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: dict[pothead_worker.Backoff, list[float]] = {}  # also of pools that other tests left to end
    next_wait_s = pothead_worker.Backoff.next_wait_s

    def without_waiting(backoff: pothead_worker.Backoff) -> float:
        waits.setdefault(backoff, []).append(next_wait_s(backoff))
        return 0.0

    def failing_gate(halt: Callable[[], bool]) -> object:
        gate.wait_for_done(len(gate.reservations))
        if next(turns) != "ok":
            raise ValueError("no measurement")
        return gate(halt)

    monkeypatch.setattr(pothead_worker.Backoff, "next_wait_s", without_waiting)
    gate = CountingGate()
    turns = iter(["fail"] * 4 + ["ok", "fail"] + ["ok"] * 9)
    with gated(failing_gate, listener) as pool:
        for number in (1, 2):
            with listener.accept() as peer:
                assert ask(peer).body == b"hello"
            gate.wait_for_done(number)
        assert pool._gate_loop is not None
        *growing, first = waits[pool._gate_loop._backoff]
    assert len(growing) == 4 and growing == sorted(growing) and growing[-1] >= 0.2
    assert first <= pothead_worker.BACKOFF_FIRST_S


def test_gate_is_asked_again_when_there_was_no_thread_to_be_had(
    listener: wire.Listener, lines: Lines
) -> None:
    gate = CountingGate(jobs=0)
    with gated(gate, listener):
        with no_more_threads():
            with gate.changed:
                gate.free = 1
            gate.wait_for_done(2)
            lines.wait_for("unreachable, trying again: can't start new thread")
        with listener.accept() as peer:
            assert ask(peer).body == b"hello"
    assert gate.done_counts == {1}
    assert len(lines.having("unreachable")) == 1 and not lines.having("the gate")


def test_object_of_a_gate_that_raises_is_logged_and_the_request_is_served(
    listener: wire.Listener, lines: Lines
) -> None:
    class Broken:
        def request_received(self, environ: Environ) -> None:
            raise RuntimeError("not received")

        def done(self) -> None:
            may_go_on.release()
            raise RuntimeError("not done")

    def gate(halt: Callable[[], bool]) -> object:
        while not may_go_on.acquire(timeout=0.02):
            if halt():
                return None
        return Broken()

    may_go_on = threading.Semaphore(1)
    with gated(gate, listener):
        for _ in range(2):
            with listener.accept() as peer:
                assert ask(peer).body == b"hello"
        assert "RuntimeError: not received" in lines.wait_for("request_received raised an exception", 2)
        assert "RuntimeError: not done" in lines.wait_for("done raised an exception", 2)


def test_worker_leaves_without_a_gate_that_does_not_listen(
    listener: wire.Listener, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "GATE_GRACE_S", 0.02)
    may_return = threading.Event()

    def deaf_gate(halt: Callable[[], bool]) -> object:
        may_return.wait(wire.DEADLINE_S)
        return reservation

    gate = CountingGate()
    reservation = Reservation(gate)
    gate.reservations.append(reservation)
    with gated(deaf_gate, listener) as pool:
        pool.stop()
        assert pool.join() is True
        lines.wait_for("does not listen to halt()")
        may_return.set()
        gate.wait_for_done(1)


# ---- The program -------------------------------------------------------------------------------------


def test_demo_serves_under_poll_jobs_as_it_is(hub: wire.HubProcess) -> None:
    with wire.worker_process(hub, "--poll-jobs") as worker:
        for _ in range(3):
            with wire.Peer.connect(hub.main) as consumer:
                assert ask(consumer).body.startswith(b"Hello from a POTHEAD worker.\n")
        worker.wait_for_error(lambda line: "connected gated hub=" in line)
        worker.terminate()
        assert worker.wait() == 0


def test_demo_without_gating_lets_a_job_through_for_each_cpu() -> None:
    gate = pothead_worker.CountingGate(os.cpu_count() or 1)
    jobs: list[Any] = [gate(lambda: False) for _ in range(os.cpu_count() or 1)]
    asked = iter([False, True])
    assert gate(lambda: next(asked)) is None, "there is no room for one more"
    jobs[0].done()
    assert gate(lambda: False) is gate


@pytest.mark.parametrize(
    "source",
    [
        "def app(environ, start_response): ...\n",
        "def app(environ, start_response): ...\napp.wait_for_slot = 7\n",
    ],
)
def test_app_without_a_gate_is_one_line_that_says_what_to_add(
    source: str, tmp_path: Path, listener: wire.Listener
) -> None:
    (tmp_path / "ungated.py").write_text(source)
    with wire.worker_process(listener, "--poll-jobs", "ungated:app", cwd=tmp_path) as worker:
        assert worker.wait() == 3
        assert len(worker.errors) == 1
        assert "'ungated:app'" in worker.errors[0] and "app.wait_for_slot =" in worker.errors[0]


def test_pool_whose_app_has_no_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="wait_for_slot"):
        pothead_worker.WorkerPool(hello, poll_jobs=True)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--poll-jobs", "--workers", "2"], {}),
        (["--poll-jobs"], {"POTHEAD_WORKERS": "2"}),
        (["--poll-jobs"], {"POTHEAD_WORKER_WORKERS": "1"}),
        (["--workers=1"], {"POTHEAD_WORKER_POLL_JOBS": "yes"}),
    ],
)
def test_poll_jobs_and_workers_exclude_each_other(
    words: list[str],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pothead_worker.main(words) == 2
    assert capsys.readouterr().err == "pothead-worker: --poll-jobs and --workers exclude each other\n"


def test_poll_jobs_is_a_switch_in_the_environment_too(capsys: pytest.CaptureFixture[str]) -> None:
    variable = "POTHEAD_WORKER_POLL_JOBS"
    assert pothead_worker.parse_args(["--poll-jobs"], {}).poll_jobs is True
    assert pothead_worker.parse_args([], {variable: "yes"}).poll_jobs is True
    assert pothead_worker.parse_args(["--workers", "2"], {variable: "no"}).poll_jobs is False
    with pytest.raises(pothead_worker.UsageError, match=variable):
        pothead_worker.parse_args([], {variable: "perhaps"})
