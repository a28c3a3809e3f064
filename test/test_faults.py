"""Faults and load, end to end: whatever happens, each request is answered once or refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wire
from wire import (
    HubProcess,
    Peer,
    cpu_ticks,
    hub_process,
    resident_kib,
    until_asleep,
    wake_ups,
    worker_process,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

APPS = '''
import hashlib
import os

JOURNAL = os.path.join(os.path.dirname(__file__), "journal")


def note(event, environ):
    """Append a line to the journal, whole even when several processes write it."""
    line = f"{event} {environ['PATH_INFO']} {os.getpid()}\\n".encode()
    journal = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, line)
    os.close(journal)


def waits_for_a_file(environ, start_response):
    """Run until the file `go` is there, or a file named after the process."""
    import time

    note("start", environ)
    folder = os.path.dirname(__file__)
    while not any(os.path.exists(os.path.join(folder, name)) for name in ("go", f"go-{os.getpid()}")):
        time.sleep(0.005)
    note("end", environ)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


def takes_20_ms(environ, start_response):
    import time

    note("start", environ)
    time.sleep(0.02)
    note("end", environ)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


def hashes(environ, start_response):
    digest = hashlib.sha256(environ["wsgi.input"].read()).hexdigest().encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(digest)))])
    return [digest]
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the applications of this module, and their journal."""
    (tmp_path / "fault_apps.py").write_text(APPS)
    (tmp_path / "journal").touch()
    return tmp_path


def journal(folder: Path) -> list[tuple[str, str, int]]:
    lines = (line.split() for line in (folder / "journal").read_text().splitlines())
    return [(event, path, int(pid)) for event, path, pid in lines]


def until(hub: HubProcess, **wanted: object) -> dict[str, Any]:
    """Ask for `/stats` until they have the wanted values."""
    ends_at = time.monotonic() + 2 * wire.DEADLINE_S
    while True:
        stats: dict[str, Any] = hub.stats()
        if all(stats[name] == value for name, value in wanted.items()):
            return stats
        assert time.monotonic() < ends_at, stats


def until_started(folder: Path, count: int) -> list[tuple[str, str, int]]:
    ends_at = time.monotonic() + wire.DEADLINE_S
    while len(events := journal(folder)) < count:
        assert time.monotonic() < ends_at, events
    return events


def request(path: str, body: bytes | None = None) -> bytes:
    method = "GET" if body is None else "POST"
    length = "" if body is None else f"Content-Length: {len(body)}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: pothead.test\r\n{length}\r\n".encode() + (body or b"")


# ---- Workers that are killed -------------------------------------------------------------------------


def test_get_of_a_killed_worker_is_answered_by_another(hub: HubProcess, folder: Path) -> None:
    app = "fault_apps:waits_for_a_file"
    with worker_process(hub, app, cwd=folder) as one, worker_process(hub, app, cwd=folder) as two:
        until(hub, slots={"idle": 2, "busy": 0})
        with Peer.connect(hub.main) as consumer:
            consumer.send(request("/job"))
            ((_, _, pid),) = until_started(folder, 1)
            victim, heir = (one, two) if pid == one.pid else (two, one)
            victim.kill()
            until_started(folder, 2)
            (folder / "go").touch()
            response = consumer.read_response()
            assert (response.status, response.body) == (200, str(heir.pid).encode())
    assert [event for event, _, _ in journal(folder)] == ["start", "start", "end"]
    line = hub.wait_for_line(lambda line: " path=/job " in line)
    assert " attempts=2 " in line and line.endswith(" code=OK")


def test_post_of_a_killed_worker_is_502_and_never_runs_again(hub: HubProcess, folder: Path) -> None:
    app = "fault_apps:waits_for_a_file"
    with worker_process(hub, app, cwd=folder) as one, worker_process(hub, app, cwd=folder) as two:
        until(hub, slots={"idle": 2, "busy": 0})
        with Peer.connect(hub.main) as consumer:
            consumer.send(request("/job", b"body"))
            ((_, _, pid),) = until_started(folder, 1)
            (one if pid == one.pid else two).kill()
            assert consumer.read_response().status == 502
            (folder / "go").touch()
            consumer.send(request("/next"))  # the other one, and the consumer's connection, live on
            assert consumer.read_response().status == 200
    assert [path for event, path, _ in journal(folder) if event == "start"] == ["/job", "/next"]
    hub.wait_for_line(lambda line: " path=/job " in line and " code=WL" in line)


def test_workers_that_die_while_they_wait_make_nothing_run_twice(hub: HubProcess, folder: Path) -> None:
    app = "fault_apps:takes_20_ms"
    with worker_process(hub, app, cwd=folder), Peer.connect(hub.main) as consumer:
        for number in range(5):
            with worker_process(hub, app, cwd=folder) as victim:
                until(hub, slots={"idle": 2, "busy": 0})
                victim.kill()
                consumer.send(request(f"/{number}", b"body"))
                response = consumer.read_response()
            # The signal is under way while the request is sent: the kernel may not have closed the
            # connection yet, and then the request has been sent to a dead worker.
            assert response.status in (200, 502)
            until(hub, slots={"idle": 1, "busy": 0})
    started = [path for event, path, _ in journal(folder) if event == "start"]
    assert len(started) == len(set(started))


# ---- Crowds ------------------------------------------------------------------------------------------


class Crowd:
    """Many consumers with one request each, served by one selector: a thread each would be too many."""

    def __init__(self, hub: HubProcess, requests: list[bytes]) -> None:
        self.responses: list[bytes] = [b""] * len(requests)
        self.sockets: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._requests = [memoryview(data) for data in requests]
        for number in range(len(requests)):
            sock = socket.create_connection(hub.main, wire.DEADLINE_S)
            sock.setblocking(False)
            self.sockets.append(sock)
            self._selector.register(sock, selectors.EVENT_WRITE, number)
        self._unsent = len(requests)

    def send(self) -> None:
        """Send every request whole."""
        while self._unsent:
            self._turn()

    def receive(self, length: int) -> None:
        """Receive until every consumer has a head and a body of `length` bytes."""
        while any(len(data.partition(b"\r\n\r\n")[2]) < length for data in self.responses):
            self._turn()

    def rest(self) -> list[bytes]:
        """Return what has come beyond the responses, without waiting for more."""
        rest = []
        for sock in self.sockets:
            with contextlib.suppress(BlockingIOError):
                rest.append(sock.recv(65536))
        return rest

    def close(self) -> None:
        self._selector.close()
        for sock in self.sockets:
            sock.close()

    def _turn(self) -> None:
        ready = self._selector.select(2 * wire.DEADLINE_S)
        assert ready, f"nothing came: {self.responses!r:.1000}"
        for key, events in ready:
            sock, number = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            if events & selectors.EVENT_WRITE:
                data = self._requests[number]
                self._requests[number] = data = data[sock.send(data) :]
                if not data:
                    self._unsent -= 1
                    self._selector.modify(sock, selectors.EVENT_READ, number)
            else:
                data = sock.recv(65536)
                assert data, f"consumer {number} was left after {self.responses[number]!r}"
                self.responses[number] += data


@pytest.fixture
def crowd_limit() -> Iterator[None]:
    """Let this process have enough descriptors for a crowd."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("4096 open files are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096) if soft != -1 else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def echoing_slots(hub: HubProcess, count: int) -> Iterator[list[bytes]]:
    """Run slots that answer with the hash of what they got, or its path; yields the targets in order."""
    targets: list[bytes] = []
    slots = [Peer.connect(hub.worker) for _ in range(count)]

    def serve(slot: Peer) -> None:
        with contextlib.suppress(AssertionError, OSError):  # the end of the connection
            while True:
                request = slot.read_request()
                targets.append(request.target)
                answer = hashlib.sha256(request.body or request.target).hexdigest().encode()
                slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + answer)

    threads = [threading.Thread(target=serve, args=(slot,)) for slot in slots]
    for thread in threads:
        thread.start()
    try:
        yield targets
    finally:
        for slot in slots:
            slot.sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(wire.DEADLINE_S)
        for slot in slots:
            slot.close()


def test_two_thousand_queued_consumers_are_answered_once_each(crowd_limit: None) -> None:
    paths = [f"/{number}" for number in range(2000)]
    with hub_process("--max-queue", "2000") as hub:
        crowd = Crowd(hub, [request(path) for path in paths])
        with contextlib.closing(crowd):
            crowd.send()
            until(hub, queue_length=2000)
            with echoing_slots(hub, 4) as targets:
                crowd.receive(64)
            assert crowd.rest() == []
        for path, response in zip(paths, crowd.responses, strict=True):
            assert response.startswith(b"HTTP/1.1 200 OK\r\n")
            assert response.endswith(b"\r\n\r\n" + hashlib.sha256(path.encode()).hexdigest().encode())
        assert sorted(targets) == sorted(path.encode() for path in paths)
        outcomes = until(hub, demand=0)["outcomes"]
        assert {code: count for code, count in outcomes.items() if count} == {"OK": 2000}


@linux_only
def test_queued_bodies_do_not_show_in_memory(crowd_limit: None) -> None:
    count, size = 300, 1 << 20
    bodies = (number.to_bytes(4, "big") * (size // 4) for number in range(count))
    digests = [hashlib.sha256(number.to_bytes(4, "big") * (size // 4)).hexdigest() for number in range(count)]
    with hub_process() as hub:
        before_kib = resident_kib(hub.pid)
        crowd = Crowd(hub, [request(f"/{number}", body) for number, body in enumerate(bodies)])
        with contextlib.closing(crowd):
            crowd.send()
            stats = until(hub, queue_length=count)
            assert stats["spool_memory_bytes"] <= 64 << 20
            assert resident_kib(hub.pid) - before_kib < 110 * 1024
            with echoing_slots(hub, 2):
                crowd.receive(64)
        for digest, response in zip(digests, crowd.responses, strict=True):
            assert response.endswith(b"\r\n\r\n" + digest.encode())
        assert until(hub, demand=0)["spool_memory_bytes"] == 0


def test_never_more_run_than_there_are_slots_and_all_in_order(hub: HubProcess, folder: Path) -> None:
    app = "fault_apps:takes_20_ms"
    with contextlib.ExitStack() as stack:
        consumers = []
        for number in range(20):
            consumers.append(stack.enter_context(Peer.connect(hub.main)))
            consumers[-1].send(request(f"/{number}"))
            until(hub, queue_length=number + 1)
        stack.enter_context(worker_process(hub, "--workers", "2", app, cwd=folder))
        for consumer in consumers:
            assert consumer.read_response().body == b"ok"
    running, most, started = 0, 0, []
    for event, path, _ in journal(folder):
        running += 1 if event == "start" else -1
        most = max(most, running)
        if event == "start":
            started.append(int(path[1:]))
    assert most == 2
    # Two threads may note their starts in the wrong order, but no request overtakes more than one other.
    assert all(abs(number - place) <= 1 for place, number in enumerate(started))
    assert sorted(started) == list(range(20))


# ---- Idleness ----------------------------------------------------------------------------------------


@linux_only
def test_idle_hub_does_not_even_wake_up(crowd_limit: None) -> None:
    with hub_process() as hub, contextlib.ExitStack() as stack:
        consumers = [stack.enter_context(Peer.connect(hub.main)) for _ in range(200)]
        slots = [stack.enter_context(Peer.connect(hub.worker)) for _ in range(8)]
        until(hub, slots={"idle": 8, "busy": 0})
        for consumer in consumers[:100]:  # half of them have been served, half never said a word
            consumer.send(request("/"))
            slots[-1].read_request()
            slots[-1].send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            consumer.read_response()
        until(hub, slots={"idle": 8, "busy": 0}, demand=0)
        until_asleep(hub.pid)
        woken, ticks = wake_ups(hub.pid), cpu_ticks(hub.pid)
        consumers[0].sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            consumers[0].sock.recv(1)
        assert cpu_ticks(hub.pid) - ticks <= 1
        assert wake_ups(hub.pid) - woken <= 3
