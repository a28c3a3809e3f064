"""Workers of several hubs, as processes: hubs that are killed, stopped, drained, restarted and far away.

Each app keeps a ledger of what it has begun: no POST may stand there twice, and no slot serve two at once.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pothead_worker
import wire
from wire import HubProcess, Peer, WorkerProcess, get, is_line, post, running

APP = """
import os, threading, time

slots = threading.local()

def note(*words):
    fd = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, " ".join(words).encode() + b"\\n")
    os.close(fd)

def app(environ, start_response):
    path, body = environ["PATH_INFO"], environ["wsgi.input"].read()
    slot = f"{os.getpid()}-{threading.get_ident()}"
    note("begin", path, slot)
    time.sleep(float(environ["QUERY_STRING"] or 0.01))
    note("end", path, slot)
    start_response("200 OK", [("X-Process", str(os.getpid()))])
    return [body]

class Room:
    def __init__(self, slots):
        self.free, self.most = threading.Semaphore(slots), slots

    def __call__(self, halt):
        while not self.free.acquire(timeout=0.02):
            if halt():
                return None
        return self

    def done(self):
        self.free.release()

app.wait_for_slot = Room(2)
"""

pytestmark = pytest.mark.skipif(wire.OVER_TLS, reason="these hubs have PTTH ports of their own")


class Ledger:
    """What the apps have begun and ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, word: str) -> list[str]:
        text = self.path.read_text() if self.path.exists() else ""
        return [line.split()[1] for line in text.splitlines() if line.startswith(word)]

    def check(self) -> None:
        """No request has been run twice, and no slot has run two at the same time."""
        again = [path for path, times in Counter(self.lines("begin")).items() if times > 1]
        assert not again, again
        busy: dict[str, str] = {}
        for line in self.path.read_text().splitlines():
            word, path, slot = line.split()
            if word == "begin":
                assert slot not in busy, (slot, busy[slot], path)
                busy[slot] = path
            else:
                assert busy.pop(slot) == path


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    (tmp_path / "noting.py").write_text(textwrap.dedent(APP))
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger"))
    return Ledger(tmp_path / "ledger")


NO_PORTS = ("--main-port", "0", "--worker-port", "0", "--admin-port", "0")


@contextlib.contextmanager
def hub_processes(count: int, *options: str) -> Iterator[list[HubProcess]]:
    with contextlib.ExitStack() as stack:
        hubs = [stack.enter_context(wire.hub_process("--ptth-port", "0", *options)) for _ in range(count)]
        yield hubs


def url(address: wire.Address) -> str:
    return f"http://{address[0]}:{address[1]}"


@contextlib.contextmanager
def worker(ledger: Ledger, addresses: Sequence[wire.Address], *options: str) -> Iterator[WorkerProcess]:
    """Run a worker of these hubs, and wait until it is connected to all."""
    connect = ",".join(map(url, addresses))
    command = [*wire.program("pothead_worker"), "--connect", connect, *options, "noting:app"]
    with running(WorkerProcess(command, ledger.path.parent)) as process:
        for address in addresses:
            process.wait_for_error(is_line(f"hub={url(address)}"))
        yield process


def until_joined(hubs: Sequence[HubProcess], processes: int = 1) -> None:
    for hub in hubs:
        hub.until(lambda stats: len(stats["processes"]) == processes)


class Consumers:
    """Threads that send POSTs to hubs, and note how each ended."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[int, int]] = Counter()  # by port and status; 0 for none
        self.seconds: dict[int, list[float]] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, hub: HubProcess, name: str, count: int, gap_s: float = 0.0, query: str = "") -> None:
        def send() -> None:
            for number in range(count):
                self._send(hub, f"/{name}-{number}{query}")
                time.sleep(gap_s)

        self._threads.append(threading.Thread(target=send, daemon=True))
        self._threads[-1].start()

    def _send(self, hub: HubProcess, path: str) -> None:
        began_at, status = time.monotonic(), 0
        with contextlib.suppress(OSError, AssertionError), Peer.connect(hub.main) as peer:
            peer.send(post(path.encode(), b"body"))
            response = peer.read_response()
            status = response.status
            assert status != 200 or response.body == b"body"
        with self._lock:
            self.statuses[hub.main[1], status] += 1
            self.seconds.setdefault(hub.main[1], []).append(time.monotonic() - began_at)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(2 * wire.DEADLINE_S)
            assert not thread.is_alive()


# ---- Sharing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hubs", "options"),
    [
        (2, ("--workers", "1")),
        (2, ("--workers", "4")),
        (4, ("--workers", "3")),
        (2, ("--poll-jobs",)),
        (2, ("--workers", "2", "--use-request-subprocess")),
    ],
)
def test_requests_at_all_hubs_are_served_once(ledger: Ledger, hubs: int, options: tuple[str, ...]) -> None:
    with hub_processes(hubs) as several, worker(ledger, [hub.ptth for hub in several], *options) as process:
        consumers = Consumers()
        for number, hub in enumerate(several * (8 // hubs)):
            consumers.start(hub, f"c{number}", 6)
        consumers.join()
        assert consumers.statuses == {(hub.main[1], 200): 48 // hubs for hub in several}
        for hub in several:
            stats = hub.until(lambda stats: stats["slots"]["busy"] == 0)
            assert (stats["breaches"], stats["requeues"]) == (0, 0)
        process.terminate()
        assert process.wait() == 0
    ledger.check()


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "2", "--use-request-subprocess", "noting:app"),
        ("--workers", "2", "--redirect-response", "0", "noting:app"),
        ("--workers", "2", "--use-request-subprocess", "--redirect-response", "0", "noting:app"),
    ],
)
def test_modes_over_tls(ledger: Ledger, options: tuple[str, ...]) -> None:
    directory = wire.authority()
    files = ("--certfile", str(directory / "hub.pem"), "--keyfile", str(directory / "hub.key"))
    with hub_processes(2, *files, "--tls", "ptth") as hubs:
        connect = ",".join(f"https://localhost:{hub.ptth[1]}" for hub in hubs)
        command = [*wire.program("pothead_worker"), "--connect", connect]
        command += ["--cafile", str(directory / "ca.pem"), *options]
        with running(WorkerProcess(command, ledger.path.parent)) as process:
            until_joined(hubs)
            body = bytes(range(256)) * 1024  # of which the rest comes after the claim
            for number in range(6):
                response = wire.fetch(hubs[number % 2].main, post(b"/%d" % number, body))
                if response.status == 303:
                    response = follow(response)
                assert response.body == body
            process.terminate()
            assert process.wait() == 0
    ledger.check()


def follow(response: wire.Response) -> wire.Response:
    location = response.value(b"location") or b""
    host, _, key = location.removeprefix(b"http://").partition(b"/")
    port = int(host.rpartition(b":")[2])
    with Peer.connect(("127.0.0.1", port)) as peer:
        peer.send(get(b"/" + key))
        return peer.read_response()


def test_local_program_serves_several_hubs(ledger: Ledger, listener: wire.Listener) -> None:
    with hub_processes(2) as hubs:
        command = [*wire.program("pothead_worker"), "--connect", ",".join(url(hub.ptth) for hub in hubs)]
        with running(WorkerProcess([*command, "--forward", url(listener.worker)], wire.ROOT)):
            until_joined(hubs)
            for hub in hubs:
                with Peer.connect(hub.main) as consumer:
                    consumer.send(post(b"/", b"body"))
                    with listener.accept() as peer:
                        assert peer.read_request().body == b"body"
                        peer.send(wire.OK)
                    assert consumer.read_response().body == b"ok"


def test_one_slot_serves_the_oldest_request_first_wherever_it_waits(ledger: Ledger) -> None:
    with hub_processes(2) as (first, second), worker(ledger, [first.ptth, second.ptth]):
        with contextlib.ExitStack() as stack:
            order = [("/long?0.5", first), ("/a", first), ("/b", second), ("/c", first), ("/d", second)]
            peers = []
            for path, hub in order:
                peers.append(stack.enter_context(Peer.connect(hub.main)))
                peers[-1].send(post(path.encode(), b""))
                wire.until(lambda hub=hub: hub.stats()["demand"] >= 1)  # type: ignore[misc]
                time.sleep(0.03)
            for peer in peers:
                assert peer.read_response().status == 200
    assert ledger.lines("begin") == ["/long", "/a", "/b", "/c", "/d"]


def test_same_hub_under_two_addresses_is_used_once(ledger: Ledger) -> None:
    with hub_processes(1, "--ptth-host", "0.0.0.0", "--allow-anonymous-workers") as (hub,):
        port = hub.ptth[1]
        command = [*wire.program("pothead_worker"), "--connect", f"http://127.0.0.1:{port}"]
        command += ["--connect", f"http://127.0.0.2:{port}", "noting:app"]
        with running(WorkerProcess(command, ledger.path.parent)) as process:
            process.wait_for_error(is_line("is the same as"))
            hub.until(lambda stats: len(stats["workers"]) == 1)
            assert wire.fetch(hub.main, post(b"/once", b"x")).body == b"x"


def test_worker_of_one_hub_says_nothing_of_claims(listener: wire.Listener) -> None:
    command = [*wire.program("pothead_worker"), "--connect", url(listener.worker)]
    with running(WorkerProcess(command, wire.ROOT)) as process:
        process.stand_in = listener
        with listener.accept() as peer:
            assert b"Pothead-" not in peer.read_head()


@pytest.mark.parametrize("connect", ["a:4040,b:4040", "http://a:4043,b:4040", "a:4040,http://b:4043"])
def test_several_silent_ports_are_refused(connect: str) -> None:
    ended = wire.run_to_end([*wire.program("pothead_worker"), "--connect", connect])
    assert ended.status == 2


def test_several_silent_ports_are_refused_with_the_reason() -> None:
    ended = wire.run_to_end([*wire.program("pothead_worker"), "--connect", "a:1", "--connect", "b:1"])
    assert ended.status == 2
    assert "no request can be claimed" in ended.stderr and "http://HOST:PORT" in ended.stderr


# ---- Names -------------------------------------------------------------------------------------------


class Names:
    """What the name service says of the only name that it knows; a test may have it say something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[wire.Address] = []
        self.has_been_asked = threading.Event()
        monkeypatch.setattr(pothead_worker, "look_up", self.look_up)
        monkeypatch.setattr(pothead_worker, "LOOK_UP_INTERVAL_S", 0.05)

    def look_up(self, _address: object) -> Any:
        self.has_been_asked.set()
        tcp = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*tcp, address) for address in self.addresses] or OSError("no such name")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


@contextlib.contextmanager
def pool_of_name(**options: Any) -> Iterator[pothead_worker.WorkerPool]:
    pool = pothead_worker.WorkerPool(hello, "http://hubs.test:4043", **options)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()
        assert pool.wait_for_end(wire.DEADLINE_S)
        pool.join()


def test_hubs_that_come_to_a_name_are_joined_and_used_until_they_refuse(
    names: Names,
) -> None:
    with hub_processes(2) as (first, second), pool_of_name(workers=2) as pool:
        names.addresses = [first.ptth]
        assert wire.fetch(first.main, post(b"/alone", b"x")).body == b"hello"
        assert not first.stats()["processes"]  # as with one hub
        names.addresses = [first.ptth, second.ptth]
        until_joined([first, second])
        for hub in (first, second, first):
            assert wire.fetch(hub.main, post(b"/both", b"x")).body == b"hello"
        names.addresses = [second.ptth]
        names.has_been_asked.clear()
        assert names.has_been_asked.wait(wire.DEADLINE_S)
        assert wire.fetch(first.main, post(b"/still", b"x")).body == b"hello"
        first.kill()
        board = pool.switchboard
        assert board is not None
        wire.until(lambda: len(board._hubs), lambda count: count == 1)
        assert wire.fetch(second.main, post(b"/second", b"x")).body == b"hello"


def test_name_of_several_hubs_is_so_from_the_beginning(names: Names) -> None:
    with hub_processes(2) as hubs:
        names.addresses = [hub.ptth for hub in hubs]
        with pool_of_name(workers=2) as pool:
            until_joined(hubs)
            assert wire.fetch(hubs[1].main, post(b"/", b"x")).body == b"hello"
            wire.until(pool.count, lambda count: count == (2, 0))  # a moment after the response
            assert pool.is_connected


def test_hub_that_does_not_know_claims_is_used_alone(names: Names, listener: wire.Listener) -> None:
    names.addresses = [listener.worker, ("127.0.0.1", 1)]
    with pool_of_name() as pool:
        for _ in range(2):  # the second time it is not asked any more
            peer = listener.accept()
            head = peer.read_head()
            peer.send(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ptth\r\n"
                b"ALPN: http%2F1.1\r\n\r\n"
            )
            if b"Pothead-Claim" in head:
                peer.expect_eof()
                peer.close()
        assert b"Pothead-Claim" not in head
        assert wire.ask(peer).body == b"hello"
        assert pool.switchboard is None
        peer.close()
        listener.turn_away()


# ---- Hubs that fail ----------------------------------------------------------------------------------


def test_hub_that_is_killed_costs_its_own_requests_only(ledger: Ledger) -> None:
    with (
        hub_processes(2) as (dies, lives),
        worker(ledger, [dies.ptth, lives.ptth], "--workers", "2") as process,
    ):
        consumers = Consumers()
        for number in range(4):
            consumers.start(lives, f"lives{number}", 20)
            consumers.start(dies, f"dies{number}", 20)
        process_line = is_line("unreachable")
        wire.until(lambda: len(ledger.lines("begin")), lambda count: count > 20)
        dies.kill()
        consumers.join()
        process.wait_for_error(process_line)
        assert consumers.statuses[lives.main[1], 200] == 80
        assert len([line for line in process.errors if "unreachable" in line]) == 1
    ledger.check()


def test_hub_that_is_stopped_costs_its_own_requests_only(ledger: Ledger) -> None:
    with hub_processes(2) as (stops, lives), worker(ledger, [stops.ptth, lives.ptth], "--workers", "2"):
        consumers = Consumers()
        for number in range(4):
            consumers.start(stops, f"stops{number}", 15)
            consumers.start(lives, f"lives{number}", 25)
        wire.until(lambda: len(ledger.lines("begin")), lambda count: count > 20)
        stops.suspend()
        wire.until(lambda: consumers.statuses[lives.main[1], 200], lambda count: count == 100)
        stops.send_signal(signal.SIGCONT)
        consumers.join()
        assert consumers.statuses == {(lives.main[1], 200): 100, (stops.main[1], 200): 60}
    ledger.check()


def test_hub_that_drains_finishes_and_the_next_one_at_its_address_is_joined(ledger: Ledger) -> None:
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(hub_processes(2))
        stack.enter_context(worker(ledger, [first.ptth, second.ptth], "--workers", "2"))
        consumers = Consumers()
        consumers.start(second, "second", 30)
        assert wire.fetch(first.main, post(b"/before", b"x")).status == 200
        first.terminate()
        assert first.wait() == 0
        again = HubProcess(
            [*wire.program("pothead"), *NO_PORTS, "--ptth-port", str(first.ptth[1])],
            wire.ROOT,
        )
        stack.enter_context(running(again)).wait_until_ready()
        until_joined([again])
        assert wire.fetch(again.main, post(b"/after", b"x")).status == 200
        consumers.join()
        assert consumers.statuses == {(second.main[1], 200): 30}
    ledger.check()


def test_worker_that_is_killed_costs_what_it_runs(ledger: Ledger) -> None:
    with hub_processes(2) as hubs, contextlib.ExitStack() as stack:
        addresses = [hub.ptth for hub in hubs]
        dies = stack.enter_context(worker(ledger, addresses, "--workers", "2"))
        stack.enter_context(worker(ledger, addresses, "--workers", "2"))
        until_joined(hubs, processes=2)
        consumers = Consumers()
        for number in range(6):
            consumers.start(hubs[number % 2], f"c{number}", 15)
        wire.until(lambda: len(ledger.lines("begin")), lambda count: count > 20)
        dies.kill()
        consumers.join()
        failed = sum(consumers.statuses.values()) - sum(
            [consumers.statuses[hub.main[1], 200] for hub in hubs]
        )
        assert failed <= 2
        begun = Counter(ledger.lines("begin"))
        assert max(begun.values()) == 1


def test_what_a_hub_says_out_of_turn_costs_that_hub_only(ledger: Ledger, listener: wire.Listener) -> None:
    """It answers the handshake with something else, closes at once, or sends what is no request."""
    with hub_processes(1) as (good,):
        command = [*wire.program("pothead_worker"), "--connect", url(listener.worker)]
        command += ["--connect", url(good.ptth), "noting:app"]
        with running(WorkerProcess(command, ledger.path.parent)) as process:
            process.stand_in = listener
            until_joined([good])
            with listener.accept() as peer:
                peer.read_head()
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                peer.expect_eof()
            with listener.accept() as peer:
                peer.read_head()
                peer.close()
            with listener.accept() as peer:
                assert b"Pothead-Claim: 102\r\nPothead-Worker: " in peer.read_head()
                peer.send(
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ptth\r\n"
                    b"ALPN: http%2F1.1\r\nPothead-Claim: 102\r\nPothead-Hub: 0123456789abcdef\r\n\r\n"
                )
                peer.send(b"x" * 70_000 + b"\r\n\r\n")
                peer.expect_eof()
            assert wire.fetch(good.main, post(b"/good", b"x")).body == b"x"


# ---- Distance ----------------------------------------------------------------------------------------


class Relay:
    """A port from which bytes reach another one later, each way."""

    def __init__(self, target: wire.Address, delay_s: float) -> None:
        self._target, self._delay_s = target, delay_s
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: wire.Address = self._listening.getsockname()
        self._socks: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._target)
                self._socks += [near, far]
                for source, target in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._move, args=(source, target), daemon=True).start()

    def _move(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self._delay_s)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for sock in (self._listening, *self._socks):
            sock.close()


def test_far_hub_waits_no_longer_than_a_near_one(ledger: Ledger) -> None:
    with hub_processes(2) as (near, far), contextlib.closing(Relay(far.ptth, 0.001)) as relay:
        with worker(ledger, [near.ptth, relay.address], "--workers", "2"):
            consumers = Consumers()
            for number in range(3):
                consumers.start(near, f"near{number}", 20, query="?0.01")
                consumers.start(far, f"far{number}", 20, query="?0.01")
            consumers.join()
            means = [
                sum(each) / len(each) for each in (consumers.seconds[hub.main[1]] for hub in (near, far))
            ]
            assert means[1] < 1.3 * means[0] + 0.01, means
    ledger.check()
