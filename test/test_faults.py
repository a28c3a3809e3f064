"""Faults and load, end to end: whatever happens, each request is answered once or refused by name."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig import Rig
from test_claim import AWAY, CLAIM, bell, shake

import pothead
import wire
from wire import (
    OK,
    ROOT,
    HubProcess,
    Peer,
    compiled,
    cpu_ticks,
    get,
    hub_process,
    post,
    python,
    resident_kib,
    running,
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


def echoes(environ, start_response):
    note("start", environ)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode()]


def reads_a_part(environ, start_response):
    """Take a MiB of the body, say so, and run until the file `go` is there."""
    environ["wsgi.input"].read(1 << 20)
    return waits_for_a_file(environ, start_response)


def answers_by_halves(environ, start_response):
    fields = [("Content-Type", "text/plain")]
    if environ["PATH_INFO"] == "/length":
        fields.append(("Content-Length", "8"))
    start_response("200 OK", fields)
    yield b"half"
    yield from waits_for_a_file(environ, lambda *_: None)


def dies(environ, start_response):
    if environ["PATH_INFO"] == "/exit":
        os._exit(3)
    import ctypes

    ctypes.string_at(0)


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


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A hub inside this process, under a clock by hand."""
    made = Rig()
    yield made
    made.close()


def journal(folder: Path) -> list[tuple[str, str, int]]:
    lines = (line.split() for line in (folder / "journal").read_text().splitlines())
    return [(event, path, int(pid)) for event, path, pid in lines]


def until(hub: HubProcess, **wanted: object) -> wire.Stats:
    """Ask for `/stats` until they have the wanted values."""
    return hub.until(
        lambda stats: all(stats[name] == value for name, value in wanted.items()), 2 * wire.DEADLINE_S
    )


def until_started(folder: Path, count: int) -> list[tuple[str, str, int]]:
    return wire.until(lambda: journal(folder), lambda events: len(events) >= count)


# ---- Workers that are killed -------------------------------------------------------------------------


def test_get_of_a_killed_worker_is_answered_by_another(hub: HubProcess, folder: Path) -> None:
    app = "fault_apps:waits_for_a_file"
    with worker_process(hub, app, cwd=folder) as one, worker_process(hub, app, cwd=folder) as two:
        until(hub, slots={"idle": 2, "busy": 0})
        with Peer.connect(hub.main) as consumer:
            consumer.send(get(b"/job"))
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
            consumer.send(post(b"/job", b"body"))
            ((_, _, pid),) = until_started(folder, 1)
            (one if pid == one.pid else two).kill()
            assert consumer.read_response().status == 502
            (folder / "go").touch()
            consumer.send(get(b"/next"))  # the other one, and the consumer's connection, live on
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
                consumer.send(post(b"/%d" % number, b"body"))
                response = consumer.read_response()
            # The signal is under way while the request is sent: the kernel may not have closed the
            # connection yet, and then the request has been sent to a dead worker.
            assert response.status in (200, 502)
            until(hub, slots={"idle": 1, "busy": 0})
    started = [path for event, path, _ in journal(folder) if event == "start"]
    assert len(started) == len(set(started))


def speak_unasked(slot: Peer) -> None:
    slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\na lie")


@pytest.mark.parametrize("misbehave", [Peer.close, Peer.reset, speak_unasked], ids=["fin", "rst", "speaks"])
def test_slot_that_left_or_spoke_before_it_was_known_costs_not_even_a_post(
    rig: Rig, misbehave: Callable[[Peer], None]
) -> None:
    """W2, W11: the newest slots are taken first, and these are bad before the hub has seen them."""
    good = rig.slot()
    for _ in range(20):
        consumer = rig.consumer()
        rig.until(lambda: len(rig.hub.loop.watched) == len(rig.hub.ports.listeners) + 2)
        for _ in range(3):
            misbehave(rig.connect(rig.hub.addresses["workers"]))
        consumer.send(post(b"/post", b"body"))
        rig.turn()
        rig.until(lambda consumer=consumer: good.has_bytes() or consumer.has_bytes())
        assert good.read_request().body == b"body"
        good.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        assert rig.response(consumer).body == b"ok"
        consumer.close()
        rig.until(lambda: len(rig.hub.loop.watched) == len(rig.hub.ports.listeners) + 1)
    assert rig.hub.counters.requeues == 0


def test_worker_killed_within_the_request_is_told_at_once(hub: HubProcess, folder: Path) -> None:
    """W3: a body of 8 MiB, of which the application has read one."""
    with worker_process(hub, "fault_apps:reads_a_part", cwd=folder) as victim:
        until(hub, slots={"idle": 1, "busy": 0})
        with Peer.connect(hub.main) as consumer:
            consumer.send(post(b"/part", bytes(8 << 20)))
            until_started(folder, 1)
            victim.kill()
            killed_at = time.monotonic()
            assert consumer.read_response().status == 502
            assert time.monotonic() - killed_at < 1
            with worker_process(hub, "fault_apps:echoes", cwd=folder):
                consumer.send(get(b"/next"))  # the whole body was read: the connection is kept
                assert consumer.read_response().body == b"/next"
    assert until(hub, demand=0)["spool_memory_bytes"] == 0


@pytest.mark.parametrize("path", ["/length", "/chunks"])
@pytest.mark.parametrize("minor_version", [0, 1])
def test_response_of_a_killed_worker_visibly_breaks_off(
    hub: HubProcess, folder: Path, path: str, minor_version: int
) -> None:
    """W5: with HTTP/1.0 the end of the connection ends a response, so it has to be a reset."""
    with worker_process(hub, "fault_apps:answers_by_halves", cwd=folder) as victim:
        with Peer.connect(hub.main) as consumer:
            consumer.send(f"GET {path} HTTP/1.{minor_version}\r\nHost: a\r\n\r\n".encode())
            consumer.read_until(b"half")
            until_started(folder, 1)
            victim.kill()
            with pytest.raises(ConnectionResetError):
                while data := consumer.sock.recv(65536):
                    consumer.received += data
            assert b"0\r\n" not in consumer.received
    assert [event for event, _, _ in journal(folder)] == ["start"]
    hub.wait_for_line(lambda line: f" path={path} " in line and " code=WC" in line)


@pytest.mark.parametrize("path", ["/exit", "/segfault"])
def test_application_that_takes_its_worker_with_it_costs_its_own_request(
    hub: HubProcess, folder: Path, path: str
) -> None:
    """A12: once, since it might well do it again."""
    with worker_process(hub, "fault_apps:dies", cwd=folder) as victim, Peer.connect(hub.main) as consumer:
        consumer.send(post(path.encode(), b""))
        assert consumer.read_response().status == 502
        assert victim.wait() != 0
        with worker_process(hub, "fault_apps:echoes", cwd=folder):
            consumer.send(get(b"/next"))
            assert consumer.read_response().body == b"/next"


def test_stopped_worker_gets_one_request_and_its_late_answer_reaches_nobody(folder: Path) -> None:
    """W6, W7: as long as its kernel lives it looks like a waiting slot."""
    app = "fault_apps:echoes"
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(hub_process("--response-timeout", "500ms"))
        stopped = stack.enter_context(worker_process(hub, app, cwd=folder))
        until(hub, slots={"idle": 1, "busy": 0})
        stopped.suspend()
        late = stack.enter_context(Peer.connect(hub.main))
        late.send(post(b"/late", b""))
        asked_at = time.monotonic()
        until(hub, requests_in_flight=1)
        stack.enter_context(worker_process(hub, app, cwd=folder))
        consumer = stack.enter_context(Peer.connect(hub.main))
        for number in range(10):  # served by the other one
            consumer.send(get(b"/%d" % number))
            assert consumer.read_response().body == f"/{number}".encode()
        assert late.read_response().status == 504
        assert 0.5 <= time.monotonic() - asked_at < 3
        stopped.send_signal(signal.SIGCONT)
        until(hub, slots={"idle": 2, "busy": 0})
        for number in range(10, 30):  # by both
            for each in (late, consumer):
                each.send(get(b"/%d" % number))
            for each in (late, consumer):
                assert each.read_response().body == f"/{number}".encode()
        assert late.received == consumer.received == b""
    assert [path for _, path, _ in journal(folder)].count("/late") <= 1


# ---- A network that is cut ---------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000
# The limits that find a dead peer, a tenth of what they are: with half a minute there is nothing to learn.
IMPATIENT_HUB = {"keepalive_idle_s": 1, "keepalive_interval_s": 1, "unacknowledged_s": 2.0}
IMPATIENT_WORKER = {"KEEP_ALIVE_IDLE_S": 1, "KEEP_ALIVE_INTERVAL_S": 1, "CONNECT_TIMEOUT_S": 1.0}


class Namespace:
    """A network of its own, for the calling thread and the processes it starts."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        outside = self._current()
        self._outside = [outside]  # where the thread came from, once for each time that it entered
        if self._libc.unshare(CLONE_NEWNET):
            os.close(outside)
            pytest.skip("this needs the right to make a network namespace")
        self._own = self._current()
        self.ip("link set lo up")
        self.__exit__()

    def __enter__(self) -> Namespace:
        self._outside.append(self._current())
        self._enter(self._own)
        return self

    def __exit__(self, *_exc_info: object) -> None:
        outside = self._outside.pop()
        self._enter(outside)
        os.close(outside)

    def ip(self, command: str) -> None:
        """Run `ip` in the namespace that the thread is in."""
        subprocess.run(["ip", *command.split()], check=True, timeout=wire.DEADLINE_S)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._own}"

    def close(self) -> None:
        os.close(self._own)

    def _current(self) -> int:
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def _enter(self, namespace: int) -> None:
        assert self._libc.setns(namespace, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


class Cable:
    """Two networks and what joins them, until it is cut: then packets vanish, and nobody is told."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.ends = (Namespace(), Namespace())
        for end in self.ends:
            stack.callback(end.close)
        with self.ends[0] as first:
            first.ip(f"link add far type veth peer name near netns {self.ends[1].path}")
            first.ip("link set far name near")
        for number, end in enumerate(self.ends, 1):
            with end:
                end.ip("link set near up")
                end.ip(f"addr add 192.0.2.{number}/24 dev near")

    def cut(self) -> None:
        for number, end in enumerate(self.ends, 1):
            with end:  # an address that is no one's
                end.ip(f"neigh replace 192.0.2.{3 - number} lladdr 02:00:00:00:00:99 dev near")

    def mend(self) -> None:
        for number, end in enumerate(self.ends, 1):
            with end:
                end.ip(f"neigh del 192.0.2.{3 - number} dev near")


def serve(consumer: Peer, path: bytes, slot: Peer) -> None:
    """Have one request claimed and answered."""
    consumer.send(get(path))
    assert slot.read_request().target == path
    slot.send(CLAIM + OK)
    assert consumer.read_response().status == 200


@pytest.mark.skipif(not shutil.which("ip"), reason="needs ip, of iproute2")
@linux_only
@pytest.mark.parametrize("what", ["was dead", "claims it", "turns it away", "leaves", "is gone"])
def test_post_that_a_cut_may_have_hidden_the_claim_of_is_not_sent_twice(what: str) -> None:
    """It was delivered, but neither that nor the claim is heard of. Nor would it be if it had been lost."""
    way_back = "pref 0 from 127.0.0.2 to 127.0.0.1 blackhole"
    limits = {"unclaimed_s": 0.3, "heard_s": 0.0 if what == "was dead" else 60.0}
    with contextlib.ExitStack() as stack:
        here = Namespace()
        stack.callback(here.close)
        stack.enter_context(here)
        here.ip("rule add pref 1 lookup local")
        here.ip("rule del pref 0")
        hub = stack.enter_context(hub_process("--ptth-port", "0", limits=limits))
        sock = socket.create_connection(hub.ptth, wire.DEADLINE_S, source_address=("127.0.0.2", 0))
        slot = stack.enter_context(Peer(sock))
        shake(slot)
        here.ip(f"rule add {way_back}")
        consumer = stack.enter_context(Peer.connect(hub.main))
        consumer.send(post(b"/once", b"body"))
        assert slot.read_request().target == b"/once"
        other = stack.enter_context(bell(hub, b"two"))
        if what != "was dead":
            with Peer.connect(hub.main) as another:
                time.sleep(0.5)  # there is nothing to wait for: that is what is tested
                serve(another, b"/behind", other)
            here.ip(f"rule del {way_back}")
        if what == "claims it":
            slot.send(CLAIM + OK)
        elif what == "is gone":
            slot.reset()
        else:
            if what == "turns it away":
                slot.send(AWAY)
            elif what == "leaves":
                slot.close()
            assert other.read_request().target == b"/once"
            other.send(CLAIM + OK)
        assert consumer.read_response().status == (502 if what == "is gone" else 200)


@pytest.mark.skipif(not shutil.which("ip"), reason="needs ip, of iproute2")
@linux_only
def test_cut_network_is_noticed_at_both_ends_and_costs_a_post_at_most(folder: Path) -> None:
    """W8, W9, W10: no FIN comes, and nothing is acknowledged any more."""
    options = ("--worker-host", "192.0.2.1", "--allow-anonymous-workers")
    with contextlib.ExitStack() as stack:
        cable = Cable(stack)
        here, there = cable.ends
        stack.enter_context(here)
        hub = stack.enter_context(hub_process(*options, limits=IMPATIENT_HUB))
        connect = ("--connect", f"192.0.2.1:{hub.worker[1]}", "--workers", "3")
        with there:
            command = [*wire.program("pothead_worker", IMPATIENT_WORKER), *connect, "fault_apps:echoes"]
            worker = wire.WorkerProcess(command, folder)
        stack.enter_context(running(worker))
        until(hub, slots={"idle": 3, "busy": 0})
        # 1. Two slots are sent a request that never comes, and one waits.
        cable.cut()
        cut_at = time.monotonic()
        again, once = (stack.enter_context(Peer.connect(hub.main)) for _ in range(2))
        again.send(get(b"/get"))
        once.send(post(b"/post", b"once"))
        until(hub, requests_in_flight=2)
        # 2. All three are found to be dead, and so is the hub by its worker.
        assert once.read_response().status == 502
        until(hub, slots={"idle": 0, "busy": 0}, queue_length=1)
        assert time.monotonic() - cut_at < 10
        worker.wait_for_error(lambda line: "unreachable" in line)
        assert journal(folder) == []
        # 3. They meet again.
        cable.mend()
        assert again.read_response().body == b"/get"
        until(hub, slots={"idle": 3, "busy": 0})
        assert [path for _, path, _ in journal(folder)] == ["/get"]


# ---- The hub itself ----------------------------------------------------------------------------------


def test_hub_killed_under_load_is_replaced_on_the_same_ports(hub: HubProcess, folder: Path) -> None:
    """H1: what it had is broken visibly; workers come back by themselves, and nothing is crossed or lost."""
    stops = threading.Event()
    outcomes: list[str] = []

    def consume(number: int) -> None:
        for count in itertools.count():
            path = f"/{number}-{count}"
            if stops.is_set():
                return
            try:
                with Peer.connect(hub.main) as consumer:
                    consumer.send(get(path.encode()))
                    response = consumer.read_response()
            except (ConnectionError, AssertionError) as exc:
                assert "nothing came" not in str(exc), "lost"
                outcomes.append("unknown")
                stops.wait(0.01)
                continue
            outcomes.append("answered" if response.body == path.encode() else f"crossed {response}")

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(worker_process(hub, "--workers", "2", "fault_apps:echoes", cwd=folder))
        until(hub, slots={"idle": 4, "busy": 0})
        threads = [threading.Thread(target=consume, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        current = hub
        ports = ("--main-port", str(hub.main[1]), "--worker-port", str(hub.worker[1]))
        for _ in range(3):
            answered = outcomes.count("answered")
            while outcomes.count("answered") < answered + 50:
                assert all(thread.is_alive() for thread in threads)
                stops.wait(0.01)
            current.kill()
            current.wait()
            current = stack.enter_context(hub_process(*ports))
        answered = outcomes.count("answered")
        while outcomes.count("answered") < answered + 50:
            assert all(thread.is_alive() for thread in threads)
            stops.wait(0.01)
        stops.set()
        for thread in threads:
            thread.join()
        until(current, slots={"idle": 4, "busy": 0})
    assert set(outcomes) == {"answered", "unknown"}
    started = [path for event, path, _ in journal(folder) if event == "start"]
    assert len(started) == len(set(started))


def test_hub_that_was_stopped_reads_before_it_looks_at_the_clock() -> None:
    """H5: a worker that answered in time meanwhile has answered in time."""
    with hub_process("--response-timeout", "300ms", "--queue-timeout", "300ms") as hub:
        with Peer.connect(hub.main) as consumer, Peer.connect(hub.worker) as slot:
            consumer.send(get(b"/"))
            slot.read_request()
            hub.suspend()
            slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            waiting = Peer.connect(hub.main)
            waiting.send(get(b"/next"))
            consumer.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                consumer.sock.recv(1)
            consumer.sock.settimeout(wire.DEADLINE_S)
            hub.process.send_signal(signal.SIGCONT)
            assert consumer.read_response().body == b"ok"
            assert slot.read_request().target == b"/next"
            slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            assert waiting.read_response().status == 200
            waiting.close()


@pytest.mark.parametrize("days", [-1, 1])
def test_wall_clock_that_jumps_changes_dates_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """H9"""
    now = time.time()
    queued = rig.consumer(get(b"/queued"))
    monkeypatch.setattr(time, "time", lambda: now + days * 86400)
    rig.pass_time(1.0)
    slot = rig.slot()
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    monkeypatch.setattr(time, "time", lambda: now - days * 86400)
    rig.pass_time(1.0)
    slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    response = rig.response(queued)
    assert response.status == 200
    assert response.value(b"Date") == pothead.http_date(int(now - days * 86400))
    assert re.search(r" queued_ms=1000\.0 worker_ms=1000\.0 total_ms=2000\.0 ", rig.lines[0])


def test_hub_serves_on_when_the_disk_of_its_log_is_full(tmp_path: Path) -> None:
    """H8: lines are lost and requests are not."""
    log = tmp_path / "log"
    command = python(compiled("pothead"), "--main-port", "0", "--worker-port", "0", "--admin-port", "0")
    script = 'log=$1; shift; ulimit -f 8; exec "$@" >"$log" 2>&1'
    hub = HubProcess(["sh", "-c", script, "sh", str(log), *command], ROOT)
    with running(hub):
        wire.until(lambda: log.exists() and log.read_text(), lambda text: str(text).count("listening ") >= 3)
        hub.lines += log.read_text().splitlines()
        hub.wait_until_ready()
        with echoing_slots(hub, 1), Peer.connect(hub.main) as consumer:
            for number in range(200):
                consumer.send(get(b"/%d" % number))
                digest = hashlib.sha256(f"/{number}".encode()).hexdigest()
                assert consumer.read_response().body == digest.encode()
        assert hub.stats()["outcomes"]["OK"] == 200
    assert log.stat().st_size <= 8192
    assert log.read_text().count(" code=OK") < 100


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
        crowd = Crowd(hub, [get(path.encode()) for path in paths])
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
        crowd = Crowd(hub, [post(b"/%d" % number, body) for number, body in enumerate(bodies)])
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
            consumers[-1].send(get(b"/%d" % number))
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
            consumer.send(get(b"/"))
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


# ---- Every call fails once ---------------------------------------------------------------------------
#
# SQLite's method: one fixed scenario, in which the n-th call fails, for n = 1, 2, 3 and so on until a run
# meets no fault any more.  The hub turns in this process, under a clock by hand, on real sockets.


class Plan:
    """Counts calls of one kind and lets the one at `fails_at` fail; `piece` makes reads and writes short."""

    def __init__(
        self, fails_at: int = 0, error: int = 0, kind: str = "socket", piece: Callable[[], int] | None = None
    ) -> None:
        self.calls = 0
        self.is_over = False
        self._fails_at = fails_at
        self._error = error
        self._kind = kind
        self._piece = piece

    def call(self, kind: str) -> None:
        if self.is_over or kind != self._kind:
            return
        self.calls += 1
        if self.calls == self._fails_at:
            raise OSError(self._error, f"call {self.calls} fails as planned")

    @property
    def has_failed(self) -> bool:
        return 0 < self._fails_at <= self.calls

    def size(self, wanted: int) -> int:
        return min(wanted, self._piece()) if self._piece is not None and wanted else wanted


class FaultySocket:
    """A socket whose calls fail or fall short by a plan."""

    def __init__(self, sock: socket.socket, plan: Plan) -> None:
        self._sock = sock
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def accept(self) -> tuple[socket.socket, Any]:
        self._plan.call("accept")
        return self._sock.accept()

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._plan.call("socket")
        return self._sock.recv(size, flags)

    def recv_into(self, buffer: memoryview) -> int:
        self._plan.call("socket")
        return self._sock.recv_into(buffer[: self._plan.size(len(buffer))])

    def send(self, data: bytes) -> int:
        self._plan.call("socket")
        return self._sock.send(memoryview(data)[: self._plan.size(len(data))])

    def setsockopt(self, *arguments: Any) -> None:
        self._plan.call("socket")
        self._sock.setsockopt(*arguments)

    def shutdown(self, how: int) -> None:
        self._plan.call("socket")
        self._sock.shutdown(how)


@contextlib.contextmanager
def faulty_system(plan: Plan) -> Iterator[None]:
    """Let the functions of `os` that the hub moves bytes with go by the plan too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pread", "pwrite", "pipe"):
            patch.setattr(os, name, planned(plan, name))
        if pothead.CAN_SPLICE:
            splice = planned(plan, "splice")
            patch.setattr(os, "splice", lambda a, b, size, flags: splice(a, b, plan.size(size), flags=flags))
        yield


def planned(plan: Plan, name: str) -> Callable[..., Any]:
    function = getattr(os, name)

    def call(*arguments: Any, **named: Any) -> Any:
        plan.call(name)
        return function(*arguments, **named)

    return call


class Recorded(Peer):
    """The strict reader over bytes that are all there."""

    def __init__(self, data: bytes) -> None:
        self.received = bytearray(data)

    def _receive(self) -> bool:
        return False


LARGE = random.Random(1).randbytes(600_000)
UPLOAD = random.Random(2).randbytes(100_000)
CHUNKED_UPLOAD = b"".join(b"%x\r\n%b\r\n" % (1000, UPLOAD[i : i + 1000]) for i in range(0, 5000, 1000))


# Path: the request, its method, and what its body must be when it reaches a worker.
SCENARIO = {
    "/bare": (get(b"/bare"), b"GET", b""),
    "/length": (get(b"/length", b"Content-Length: 100000", method=b"POST") + UPLOAD, b"POST", UPLOAD),
    "/chunks": (
        get(b"/chunks", b"Transfer-Encoding: chunked", method=b"POST") + CHUNKED_UPLOAD + b"0\r\n\r\n",
        b"POST",
        UPLOAD[:5000],
    ),
    "/head": (get(b"/head", method=b"HEAD"), b"HEAD", b""),
    "/large": (get(b"/large", b"Content-Length: 4", method=b"PUT") + b"body", b"PUT", b"body"),
}
# Path: the response, and the body that its consumer must get.
ANSWERS = {
    "/bare": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n/bare", b"/bare"),
    "/length": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n/length\r\n0\r\n\r\n",
        b"/length",
    ),
    "/chunks": (b"HTTP/1.0 200 OK\r\n\r\n/chunks", b"/chunks"),
    "/head": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b""),
    "/large": (b"HTTP/1.1 200 OK\r\nContent-Length: 600000\r\n\r\n" + LARGE, LARGE),
}


class Script:
    """One end of a connection that never blocks: it sends what it has and keeps what comes."""

    def __init__(self, rig: Rig, address: str | None) -> None:
        self.peer = rig.connect(address)
        self.peer.sock.setblocking(False)
        self.unsent = memoryview(b"")
        self.received = bytearray()
        self.has_ended = False

    def pump(self) -> bool:
        """Send and receive what can be; tells whether anything moved."""
        if self.has_ended:
            return False
        moved = False
        with contextlib.suppress(BlockingIOError):
            if self.unsent:
                self.unsent = self.unsent[self.peer.sock.send(self.unsent) :]
                moved = True
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.peer.sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            self.received += data
            self.has_ended = not data
            moved = True
        return moved


class OneConsumer(Script):
    """Sends one request and waits for its answer."""

    def __init__(self, rig: Rig, path: str) -> None:
        super().__init__(rig, rig.hub.addresses["consumers"])
        self.path = path
        self.request, self.method, _ = SCENARIO[path]
        self.unsent = memoryview(self.request)
        self.response: wire.Response | None = None

    def pump(self) -> bool:
        with contextlib.suppress(OSError):
            moved = super().pump()
            if self.response is None and moved:
                with contextlib.suppress(AssertionError):
                    self.response = Recorded(bytes(self.received)).read_response(self.method)
            return moved
        self.has_ended = True  # it could not send: the hub has broken the connection
        return True

    def outcome(self) -> str:
        if self.response is None:
            return "broken" if self.has_ended else "waiting"
        return "answered" if self.response.status == 200 else f"refused {self.response.status}"


class OneSlot(Script):
    """Answers what it is asked, and dials again when its connection has ended."""

    def __init__(self, rig: Rig, started: list[str]) -> None:
        super().__init__(rig, rig.hub.addresses["workers"])
        self._rig = rig
        self._started = started
        self._closes = False

    def pump(self) -> bool:
        try:
            moved = super().pump()
        except OSError:
            moved = self.has_ended = True
        if self.has_ended or (self._closes and not self.unsent):
            self.peer.close()
            Script.__init__(self, self._rig, self._rig.hub.addresses["workers"])
            self._closes = False
            return True
        reader = Recorded(bytes(self.received))
        try:
            request = reader.read_request()
        except AssertionError as exc:
            assert not self.received or "the other end closed" in str(exc), exc
            return moved
        assert not reader.received and not self.unsent, "two requests at once"
        path = request.target.decode()
        assert request.body == SCENARIO[path][2]
        self._started.append(path)
        self.received.clear()
        self.unsent = memoryview(ANSWERS[path][0])
        self._closes = path == "/chunks"
        return True


class Ledger:
    """One run of the scenario, and what must hold after it whatever has failed."""

    def __init__(self, plan: Plan, **options: Any) -> None:
        self.plan = plan
        self.rig = Rig(spool_memory=4096, **options)
        self.started: list[str] = []
        hub = self.rig.hub
        for listener in hub.ports.listeners.values():
            listener._socket = FaultySocket(listener._socket, plan)  # type: ignore
            listener._accept = self._faulty(listener._accept)
        self.slots = [OneSlot(self.rig, self.started) for _ in range(2)]
        self.consumers = [OneConsumer(self.rig, path) for path in SCENARIO]

    def _faulty(self, accept: Callable[[socket.socket, str], None]) -> Callable[[socket.socket, str], None]:
        return lambda sock, address: accept(FaultySocket(sock, self.plan), address)  # type: ignore

    def play(self) -> None:
        """Turn until every consumer has an answer or a break; one that has neither in the end is lost."""
        quiet = 0
        while any(consumer.outcome() == "waiting" for consumer in self.consumers):
            self.rig.turn()
            moved = [each.pump() for each in (*self.slots, *self.consumers)]
            quiet = 0 if any(moved) else quiet + 1
            if quiet > 3:  # nothing moves any more: let time pass
                self.rig.pass_time(0.5)
            assert quiet < 600, f"lost: {[(each.path, each.outcome()) for each in self.consumers]}"

    def check(self, may_fail: int) -> None:
        outcomes = [consumer.outcome() for consumer in self.consumers]
        for consumer in self.consumers:
            if consumer.outcome() == "answered":
                assert consumer.response and consumer.response.body == ANSWERS[consumer.path][1], "crossed"
            if consumer.response is not None:
                reader = Recorded(bytes(consumer.received))
                reader.read_response(consumer.method)
                assert not reader.received, "answered twice"
        assert len(outcomes) - outcomes.count("answered") <= may_fail, outcomes
        assert set(outcomes) <= {"answered", "broken", "refused 502", "refused 503", "refused 500"}, outcomes
        for path, count in collections.Counter(self.started).items():
            assert count == 1 or (count == 2 and SCENARIO[path][1] != b"POST"), f"{path} ran {count} times"

    def check_rest(self) -> None:
        """Nothing is left of the consumers once they are gone, and the next one is served."""
        hub = self.rig.hub
        for consumer in self.consumers:
            consumer.peer.close()
        late = OneConsumer(self.rig, "/bare")
        self.consumers = [late]
        self.play()
        assert late.outcome() == "answered"
        late.peer.close()
        left = len(hub.ports.listeners) + 2  # two slots

        def is_clean() -> bool:
            for slot in self.slots:
                slot.pump()
            self.rig.pass_time(0.1)  # a listener may be resting
            return len(hub.loop.watched) == left and hub.policy.idle == 2

        self.rig.until(is_clean)
        assert (hub.budget.memory_used, hub.budget.files) == (0, 0)
        assert not hub.exchanges and not hub.policy.waiting and not hub.needy and len(hub.slots) == 2
        assert sum(hub.counters.outcomes.values()) == len(self.rig.lines)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()


def run_with(plan: Plan, may_fail: int = 1, **options: Any) -> None:
    """Play the scenario once and check everything."""
    before = open_files()
    with faulty_system(plan):
        ledger = Ledger(plan, **options)
        try:
            ledger.play()
            ledger.check(may_fail)
            plan.is_over = True
            ledger.check_rest()
        finally:
            ledger.rig.close()
    assert open_files() == before


def fail_every_call(kind: str, error: str, may_fail: int = 1, **options: Any) -> int:
    """Let the first call fail, then the second, until a run meets no fault; return how many there are."""
    for number in itertools.count(1):
        plan = Plan(number, getattr(errno, error), kind)
        try:
            run_with(plan, may_fail, **options)
        except BaseException:
            print(f"{kind} call {number} failed with {error}", file=sys.stderr)
            raise
        if not plan.has_failed:
            return number - 1
    raise AssertionError


def test_scenario_of_the_fault_loop_succeeds_without_a_fault() -> None:
    run_with(Plan(), may_fail=0)


@pytest.mark.parametrize("error", ["ECONNRESET", "EPIPE", "ETIMEDOUT", "ENOBUFS"])
@pytest.mark.parametrize("stream_requests", [False, True], ids=["spooled", "streamed"])
def test_socket_call_that_fails_costs_one_exchange_at_most(error: str, stream_requests: bool) -> None:
    """H7: whichever call it is, at either end."""
    assert fail_every_call("socket", error, stream_requests=stream_requests) > 40


@pytest.mark.parametrize("error", ["EAGAIN", "EINTR"])
def test_socket_call_that_has_to_be_repeated_costs_nothing(error: str) -> None:
    """H7, the rest of it."""
    assert fail_every_call("socket", error, may_fail=0) > 40


@pytest.mark.parametrize("error", ["ECONNABORTED", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EINTR"])
def test_accept_that_fails_costs_no_exchange(error: str) -> None:
    """H6, H7: five consumers and two slots, and some more looks for others."""
    assert fail_every_call("accept", error, may_fail=0) > 7


@pytest.mark.skipif(not pothead.CAN_SPLICE, reason="no splice here")
@pytest.mark.parametrize("error", ["ECONNRESET", "EPIPE", "EINVAL", "ENOMEM", "EAGAIN"])
def test_splice_that_fails_costs_one_exchange_at_most(error: str) -> None:
    assert fail_every_call("splice", error, may_fail=error != "EAGAIN") >= 2


@pytest.mark.skipif(not pothead.CAN_SPLICE, reason="no splice here")
def test_pipe_that_is_not_to_be_had_costs_nothing() -> None:
    assert fail_every_call("pipe", "EMFILE", may_fail=0) >= 1


@pytest.mark.parametrize(("function", "error"), [("pwrite", "ENOSPC"), ("pwrite", "EIO"), ("pread", "EIO")])
def test_disk_that_fails_costs_one_exchange_at_most(function: str, error: str) -> None:
    assert fail_every_call(function, error) >= 1


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000, 0])
def test_short_reads_and_writes_change_nothing(piece: int) -> None:
    """Of the first thousands of calls, that is: of all of them it would take minutes.  0 is random."""
    rng = random.Random(piece)
    calls = itertools.count()

    def size() -> int:
        return (piece or rng.choice((1, 2, 100, 5000))) if next(calls) < 10_000 else 100_000

    run_with(Plan(piece=size), may_fail=0)


# ---- Peers that stop after every byte ----------------------------------------------------------------


LEAVE = pytest.mark.parametrize("leave", [Peer.close, Peer.reset], ids=["fin", "rst"])


@LEAVE
@pytest.mark.parametrize("path", ["/bare", "/short", "/pieces"])
def test_consumer_that_stops_after_any_byte_of_its_request_is_forgotten(
    rig: Rig, leave: Callable[[Peer], None], path: str
) -> None:
    """C1: no worker ever sees it, whole or not."""
    message = {
        "/bare": get(b"/bare"),
        "/short": get(b"/short", b"Content-Length: 4", method=b"POST") + b"body",
        "/pieces": get(b"/pieces", b"Transfer-Encoding: chunked", method=b"PUT") + b"4\r\nbody\r\n0\r\n\r\n",
    }[path]
    hub = rig.hub
    for count in range(len(message) + 1):
        consumer = rig.connect(hub.addresses["consumers"])
        consumer.send(message[:count])
        rig.turn()
        leave(consumer)
        rig.until(lambda: len(hub.loop.watched) == len(hub.ports.listeners) and not hub.exchanges)
        assert hub.policy.waiting == hub.budget.memory_used == 0
    assert {line.partition(" code=")[2][:2] for line in rig.lines} == {"CQ"}


RESPONSES = {
    "length": b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 12\r\n\r\nhello, world",
    "chunks": b"HTTP/1.1 200 OK\r\nDate: now\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    b"7\r\n, world\r\n0\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nDate: now\r\n"
    b"Content-Length: 12\r\n\r\nhello, world",
}


@LEAVE
@pytest.mark.parametrize("framing", RESPONSES)
def test_worker_that_stops_after_any_byte_of_its_response_is_told_by_its_consumer(
    rig: Rig, leave: Callable[[Peer], None], framing: str
) -> None:
    """W4, W5: an error while nothing was sent, a visible break after that, and whole only when it was."""
    message, hub = RESPONSES[framing], rig.hub
    for count in range(len(message)):
        consumer = rig.consumer(get(b"/", b"Content-Length: 4", method=b"POST") + b"body")
        slot = rig.slot()
        rig.until(lambda slot=slot: slot.has_bytes())
        slot.read_request()
        slot.send(message[:count])
        rig.turn()
        leave(slot)
        rig.until(lambda: not hub.exchanges)
        rig.turn()
        consumer.close() if expect_failure(consumer) else consumer.expect_eof()
        rig.until(lambda: len(hub.loop.watched) == len(hub.ports.listeners))
        assert hub.policy.running == hub.policy.idle == 0
        rig.pass_time(pothead.LIMITS.rest_again_s)
    assert {line.partition(" code=")[2][:2] for line in rig.lines} <= {"WL", "WC"}


def expect_failure(consumer: Peer) -> bool:
    """Read an error of the hub, and return true, or the beginning of a response that breaks off."""
    try:
        while (response := consumer.read_response()).status == 103:
            pass
    except AssertionError as exc:
        assert "the other end closed" in str(exc)
        consumer.received.clear()
        return False
    assert response.status == 502, response
    return True


@LEAVE
@pytest.mark.parametrize("framing", RESPONSES)
def test_consumer_that_leaves_after_any_byte_of_its_response_frees_the_slot(
    rig: Rig, leave: Callable[[Peer], None], framing: str
) -> None:
    """C2, C3: the worker is told by the end of its connection."""
    message, hub = RESPONSES[framing], rig.hub
    for count in range(len(message)):
        consumer = rig.consumer(get(b"/"))
        slot = rig.slot()
        rig.until(lambda slot=slot: slot.has_bytes())
        slot.read_request()
        slot.send(message[:count])
        rig.turn()
        leave(consumer)
        rig.until(lambda: len(hub.loop.watched) == len(hub.ports.listeners))
        assert not hub.exchanges and not hub.slots
        slot.expect_eof()
        slot.close()
    assert {line.partition(" code=")[2][:2] for line in rig.lines} == {"CR"}
