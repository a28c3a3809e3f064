"""The hub is replaced by another one, and nobody notices. The tests play the service manager."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pothead
import wire
from wire import OK, HubProcess, Peer, get

ROLES = ("consumers", "workers", "admin")

# Becomes the program named after the descriptors, with those as 3, 4, 5 ... and as the process they are for.
EXEC_WITH_SOCKETS = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number, inheritable=True)
os.closerange(3 + len(fds), 100)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


# ---- The service manager -----------------------------------------------------------------------------


class Manager:
    """Holds the listening sockets over the lives of hubs, and hears what they report."""

    def __init__(self, directory: Path) -> None:
        self.sockets = {role: socket.create_server(("127.0.0.1", 0)) for role in ROLES}
        self._path = str(directory / "notify")
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(self._path)
        self._inbox.settimeout(wire.DEADLINE_S)

    def environment(self, names: str = "consumers:workers:admin") -> dict[str, str]:
        """Return the variables that systemd sets, except for the process they are for."""
        return {"LISTEN_FDS": "3", "LISTEN_FDNAMES": names, "NOTIFY_SOCKET": self._path}

    def hear(self) -> bytes:
        """Return the next datagram."""
        return self._inbox.recv(4096)

    def has_heard_everything(self) -> bool:
        self._inbox.setblocking(False)
        try:
            return not self._inbox.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self._inbox.settimeout(wire.DEADLINE_S)

    @contextlib.contextmanager
    def hub(self, *options: str, **variables: str) -> Iterator[HubProcess]:
        """Run a hub on the sockets."""
        command = command_with_sockets(list(self.sockets.values()), *options)
        fds = [sock.fileno() for sock in self.sockets.values()]
        with wire.running(HubProcess(command, wire.ROOT, self.environment() | variables, fds)) as hub:
            hub.wait_until_ready()
            yield hub

    def close(self) -> None:
        for sock in (self._inbox, *self.sockets.values()):
            sock.close()


def command_with_sockets(sockets: list[socket.socket], *options: str) -> list[str]:
    fds = ",".join(str(sock.fileno()) for sock in sockets)
    return wire.python("-c", EXEC_WITH_SOCKETS, fds, *wire.python(wire.compiled("pothead"), *options))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as manager:
        yield manager


# ---- Passed sockets ----------------------------------------------------------------------------------


def test_hub_listens_on_the_sockets_it_is_passed(manager: Manager) -> None:
    with manager.hub("--main-port", "1", "--worker-port", "1", "--admin-port", "off") as hub:
        addresses = [sock.getsockname() for sock in manager.sockets.values()]
        assert [hub.main, hub.worker, hub.admin] == addresses
        with Peer.connect(hub.worker) as slot, Peer.connect(hub.main) as consumer:
            consumer.send(get(b"/"))
            slot.read_request()
            slot.send(OK)
            assert consumer.read_response().body == b"ok"
        assert hub.stats()["draining"] is False


def test_sockets_may_come_in_any_order_and_what_is_not_passed_is_bound(manager: Manager) -> None:
    sockets = [manager.sockets["workers"], manager.sockets["consumers"]]
    variables = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "workers:consumers"}
    command = command_with_sockets(sockets, "--admin-port", "0")
    with wire.running(HubProcess(command, wire.ROOT, variables, [sock.fileno() for sock in sockets])) as hub:
        hub.wait_until_ready()
        assert [hub.worker, hub.main] == [sock.getsockname() for sock in sockets]
        assert hub.admin not in [sock.getsockname() for sock in manager.sockets.values()]


def test_sockets_that_are_meant_for_another_process_are_not_touched() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nonsense"}
    with wire.hub_process(environment=environment) as hub:
        assert hub.stats()["draining"] is False


def test_command_does_not_inherit_what_the_service_manager_told_the_hub(manager: Manager) -> None:
    show = "env | grep -E 'LISTEN_|NOTIFY_'; test -e /dev/fd/3 && echo 3; echo shown; exec sleep 60"
    with manager.hub("--", "sh", "-c", show) as hub:
        hub.wait_for_line(lambda line: line == "shown")
    assert [line for line in hub.lines if not line.startswith("listening ")] == ["shown"]


def refused(manager: Manager, sockets: list[socket.socket], count: str, names: str, *options: str) -> str:
    """Return the line about sockets that a hub does not take."""
    variables = {"LISTEN_FDS": count, "LISTEN_FDNAMES": names}
    program = wire.Program(
        command_with_sockets(sockets, *options), wire.ROOT, variables, [sock.fileno() for sock in sockets]
    )
    program.may_have_ended = True
    with wire.running(program):
        assert program.wait() == 2
    assert program.lines == []
    assert len(program.errors) == 1 and program.errors[0].startswith("pothead: "), program.errors
    return program.errors[0]


@pytest.mark.parametrize(
    ("count", "names", "complaint"),
    [
        ("3", "consumers:workers:admins", "passed as 'admins'; FileDescriptorName= is one of consumers,"),
        ("3", "consumers:workers:", "passed as ''"),
        ("3", "consumers:workers:workers", "two sockets are passed as 'workers'"),
        ("3", "consumers:workers", "not one name a socket"),
        ("1", "", "passed as ''"),
        ("three", "consumers:workers:admin", "LISTEN_FDS is 'three'"),
        ("-3", "consumers:workers:admin", "LISTEN_FDS is '-3'"),
        ("99999999999", "consumers", "LISTEN_FDS is '99999999999'"),
    ],
)
def test_unclear_names_of_sockets_are_refused(
    manager: Manager, count: str, names: str, complaint: str
) -> None:
    assert complaint in refused(manager, list(manager.sockets.values()), count, names)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_STREAM),
    ],
)
def test_socket_that_does_not_listen_for_tcp_is_refused(
    manager: Manager, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    with socket.socket(family, kind) as sock:
        line = refused(manager, [sock, manager.sockets["workers"]], "2", "consumers:workers")
    assert line == "pothead: what is passed as 'consumers' is no listening TCP socket"


def test_descriptor_that_is_no_socket_or_not_there_is_refused(manager: Manager, tmp_path: Path) -> None:
    listening = [manager.sockets["consumers"]]
    assert "'admin' is no socket: Bad file descriptor" in refused(manager, listening, "2", "consumers:admin")


def test_passed_worker_socket_that_others_can_reach_is_refused_like_a_port(manager: Manager) -> None:
    with socket.create_server(("0.0.0.0", 0)) as sock:
        assert "--allow-anonymous-workers" in refused(manager, [sock], "1", "workers", "--main-port", "0")


def test_failed_start_takes_no_connection_from_a_passed_socket(manager: Manager) -> None:
    sockets = list(manager.sockets.values())
    with Peer.connect(manager.sockets["consumers"].getsockname()) as consumer:
        consumer.send(get(b"/waits"))
        refused(manager, sockets[:1], "1", "consumers", "--worker-host", "192.0.2.1")
        with manager.hub() as hub, Peer.connect(hub.worker) as slot:
            assert slot.read_request().target == b"/waits"
            slot.send(OK)
            assert consumer.read_response().body == b"ok"


# ---- Reports to the service manager ------------------------------------------------------------------


def test_service_manager_is_told_of_the_start_and_of_the_end(manager: Manager) -> None:
    with manager.hub() as hub, Peer.connect(hub.worker) as slot, Peer.connect(hub.main) as consumer:
        consumers, workers, _ = (sock.getsockname()[1] for sock in manager.sockets.values())
        assert manager.hear() == (
            b"READY=1\nSTATUS=serving consumers on 127.0.0.1:%d, workers on 127.0.0.1:%d"
            % (consumers, workers)
        )
        consumer.send(get(b"/"))
        slot.read_request()
        hub.terminate()
        assert manager.hear() == b"STOPPING=1\nSTATUS=draining: 1 requests to finish"
        slot.send(OK)
        assert consumer.read_response().status == 200
        assert hub.wait() == 0
    assert manager.has_heard_everything()


def test_service_manager_is_told_of_a_stop_at_once(manager: Manager) -> None:
    with manager.hub() as hub:
        assert manager.hear().startswith(b"READY=1\n")
    assert hub.wait() == 0
    assert manager.hear() == b"STOPPING=1\nSTATUS=stopping at once"
    assert manager.has_heard_everything()


def test_watchdog_is_fed_twice_in_its_time_while_the_loop_turns(manager: Manager) -> None:
    with manager.hub(WATCHDOG_USEC="200000") as hub, Peer.connect(hub.worker) as slot:
        with Peer.connect(hub.main) as consumer:
            before = time.monotonic()
            reports = [manager.hear() for _ in range(7)]
            assert sum(each.startswith(b"READY=1\n") for each in reports) == 1
            assert reports.count(b"WATCHDOG=1") == 6
            assert time.monotonic() - before > 0.3, "not oftener than it asks"
            consumer.send(get(b"/"))
            slot.read_request()
            hub.terminate()
            while not manager.hear().startswith(b"STOPPING=1\n"):
                pass
            assert manager.hear() == b"WATCHDOG=1", "a hub that drains has not stopped turning"
            slot.send(OK)
            assert consumer.read_response().status == 200


@pytest.mark.parametrize("period", ["", "0", "-1", "soon"])
def test_watchdog_that_does_not_ask_is_not_fed_and_wakes_nobody(period: str) -> None:
    assert fed_by_an_idle_loop({"WATCHDOG_USEC": period}) == ([], None)


def test_watchdog_of_another_process_is_not_fed() -> None:
    variables = {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getppid())}
    assert fed_by_an_idle_loop(dict(variables)) == ([], None)
    heard, sleep_s = fed_by_an_idle_loop({**variables, "WATCHDOG_PID": str(os.getpid())})
    assert heard == ["WATCHDOG=1"] and sleep_s == pytest.approx(0.1)


def fed_by_an_idle_loop(environ: dict[str, str]) -> tuple[list[str], float | None]:
    """Return what a watchdog is fed at the start, and how long the loop sleeps then."""
    heard: list[str] = []
    loop = pothead.EventLoop(clock=lambda: 1000.0)
    with contextlib.closing(loop):
        pothead.feed_watchdog(loop, heard.append, environ)
        assert not environ, "the variables are for no other program"
        loop._settle()
        return heard, loop._sleep_s(loop.clock())


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_service_manager_is_told_at_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(f"\0pothead-test-{os.getpid()}")
        inbox.settimeout(wire.DEADLINE_S)
        with wire.hub_process(environment={"NOTIFY_SOCKET": f"@pothead-test-{os.getpid()}"}):
            assert inbox.recv(4096).startswith(b"READY=1\n")
        assert inbox.recv(4096).startswith(b"STOPPING=1\n")


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@", "vsock:2:1", "/" + "x" * 200])
def test_hub_lives_without_a_service_manager_that_listens(address: str) -> None:
    with wire.hub_process("--log-level", "debug", environment={"NOTIFY_SOCKET": address}) as hub:
        assert hub.stats()["draining"] is False
        hub.wait_for_error(lambda line: f" DEBUG pothead: NOTIFY_SOCKET {address}: " in line)


# ---- Handing over ------------------------------------------------------------------------------------

REUSE = "--reuse-port"


def ports_of(hub: HubProcess) -> list[str]:
    """Return the options for a hub on the same ports."""
    ports = {"--main-port": hub.main, "--worker-port": hub.worker, "--admin-port": hub.admin}
    if wire.OVER_TLS:
        ports["--ptth-port"] = ports.pop("--worker-port")
    return [REUSE, *itertools.chain.from_iterable((flag, str(port)) for flag, (_, port) in ports.items())]


def test_port_cannot_be_shared_with_a_hub_that_does_not_want_to(hub: HubProcess) -> None:
    program = wire.Program(wire.python(wire.compiled("pothead"), *ports_of(hub)), wire.ROOT)
    program.may_have_ended = True
    with wire.running(program):
        assert program.wait() == 2
    assert "the hub there needs --reuse-port too" in program.stderr


def test_platform_without_shared_ports_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ValueError, match="--reuse-port is not possible: this platform has no SO_REUSEPORT"):
        pothead.Options(reuse_port=True)


@wire.in_clear_only
def test_connection_that_waits_when_a_drain_begins_is_refused_in_words() -> None:
    with wire.hub_process("--graceful-timeout", "100ms") as hub:
        hub.suspend()
        with Peer.connect(hub.main) as consumer:
            consumer.send(get(b"/"))
            hub.terminate()
            hub.process.send_signal(signal.SIGCONT)
            assert consumer.read_response().status == 503
        hub.wait()


@contextlib.contextmanager
def hub_with_successor(way: str, manager: Manager) -> Iterator[HubProcess]:
    with manager.hub() if way == "sockets" else wire.hub_process(REUSE) as hub:
        yield hub


both_ways = pytest.mark.parametrize("way", ["sockets", "port"])


@both_ways
def test_kept_connection_is_served_once_more_and_told_to_close(way: str, manager: Manager) -> None:
    with hub_with_successor(way, manager) as hub:
        with Peer.connect(hub.worker) as slot, Peer.connect(hub.main) as consumer:
            for expected in (None, b"close"):
                consumer.send(get(b"/"))
                slot.read_request()
                slot.send(OK)
                assert consumer.read_response().value(b"Connection") == expected
                if expected is None:
                    hub.terminate()
                    hub.wait_for_error(lambda line: "draining" in line)
            consumer.expect_eof()
            slot.expect_eof()
        assert hub.wait() == 0


@both_ways
def test_kept_connection_that_stays_idle_is_closed_in_the_end(way: str, manager: Manager) -> None:
    with hub_with_successor(way, manager) as hub, Peer.connect(hub.main) as consumer:
        hub.terminate()
        consumer.expect_eof()
        assert hub.wait() == 0


@both_ways
def test_connection_that_was_promised_to_be_kept_serves_one_more_request(way: str, manager: Manager) -> None:
    with hub_with_successor(way, manager) as hub:
        with Peer.connect(hub.worker) as slot, Peer.connect(hub.main) as consumer:
            consumer.send(get(b"/long"))
            slot.read_request()
            slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            assert b"Connection" not in consumer.read_head()
            hub.terminate()
            hub.wait_for_error(lambda line: "draining" in line)
            slot.send(b"ok")
            consumer.expect(b"ok")
            consumer.send(get(b"/next"))
            assert slot.read_request().target == b"/next"
            slot.send(OK)
            assert consumer.read_response().value(b"Connection") == b"close"
        assert hub.wait() == 0


@both_ways
def test_slot_is_kept_for_a_request_that_is_still_coming(way: str, manager: Manager) -> None:
    with hub_with_successor(way, manager) as hub, contextlib.ExitStack() as stack:
        slots = [stack.enter_context(Peer.connect(hub.worker)) for _ in range(3)]
        slow = stack.enter_context(Peer.connect(hub.main))
        slow.send(b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n12")
        wire.until(lambda: len(slots_of(hub)) == 3)
        hub.terminate()
        left = wait_for_close(slots, count=2)
        slow.send(b"34")
        (kept,) = [slot for slot in slots if slot not in left]
        assert kept.read_request().body == b"1234"
        kept.send(OK)
        assert slow.read_response().status == 200
        assert hub.wait() == 0


def slots_of(hub: HubProcess) -> list[object]:
    slots = hub.stats()["workers"]
    assert isinstance(slots, list)
    return slots


def wait_for_close(peers: list[Peer], count: int) -> list[Peer]:
    """Return the peers whose connections are closed, once there are so many."""
    closed: list[Peer] = []
    while len(closed) < count:
        ready, _, _ = select.select(
            [peer.sock for peer in peers if peer not in closed], [], [], wire.DEADLINE_S
        )
        assert ready, f"{len(closed)} were closed"
        for peer in peers:
            if peer.sock in ready:
                peer.expect_eof()
                closed.append(peer)
    assert len(closed) == count
    return closed


def test_new_connections_wait_in_a_passed_socket_while_no_hub_accepts_them(manager: Manager) -> None:
    with manager.hub() as hub, Peer.connect(hub.worker) as slot, Peer.connect(hub.main) as runs:
        runs.send(get(b"/runs"))
        slot.read_request()
        hub.terminate()
        hub.wait_for_error(lambda line: "draining" in line)
        waits = Peer.connect(hub.main)
        waits.send(get(b"/waits"))
        slot.send(OK)
        assert runs.read_response().status == 200
        assert hub.wait() == 0
    with waits, manager.hub() as successor, Peer.connect(successor.worker) as slot:
        assert slot.read_request().target == b"/waits"
        slot.send(OK)
        assert waits.read_response().body == b"ok"


def test_drain_can_be_watched_to_its_end_if_nobody_takes_over_the_port() -> None:
    with (
        wire.hub_process(REUSE, limits=IMPATIENT) as hub,
        Peer.connect(hub.worker) as slot,
        Peer.connect(hub.main) as consumer,
    ):
        consumer.send(get(b"/"))
        slot.read_request()
        hub.terminate()
        wire.until(lambda: refuses(hub.main))  # what follows is after the handover
        stats = hub.stats()
        assert (stats["draining"], stats["demand"]) == (True, 1)
        slot.send(OK)
        assert consumer.read_response().status == 200
        assert hub.wait() == 0


def refuses(address: wire.Address) -> bool:
    try:
        Peer.connect(address).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels deal out connections in their own way")
def test_draining_hub_on_a_shared_port_leaves_new_connections_to_its_successor() -> None:
    with wire.hub_process(REUSE) as old, contextlib.ExitStack() as stack:
        slot, runs = (stack.enter_context(Peer.connect(address)) for address in (old.worker, old.main))
        runs.send(get(b"/runs"))
        slot.read_request()
        successor = stack.enter_context(wire.hub_process(*ports_of(old)))
        old.terminate()
        old.wait_for_error(lambda line: "draining" in line)
        consumers = [stack.enter_context(Peer.connect(old.main)) for _ in range(40)]
        for consumer in consumers:
            consumer.send(get(b"/new"))
        new_slot = stack.enter_context(Peer.connect(old.worker))
        for _ in consumers:
            assert new_slot.read_request().target == b"/new"
            new_slot.send(OK)
        assert [consumer.read_response().status for consumer in consumers] == [200] * 40
        assert [successor.stats()["draining"] for _ in range(20)] == [False] * 20
        slot.send(OK)
        assert runs.read_response().status == 200
        assert old.wait() == 0
        assert len([line for line in old.lines if "code=" in line]) == 1


def test_drain_on_a_shared_port_without_a_successor_accepts_what_comes_for_a_moment() -> None:
    with wire.hub_process(REUSE) as hub, Peer.connect(hub.worker) as waiting:
        wire.until(lambda: len(slots_of(hub)) == 1)
        hub.terminate()
        waiting.expect_eof()
        with Peer.connect(hub.main) as consumer, Peer.connect(hub.worker) as slot:
            consumer.send(get(b"/"))
            slot.read_request()
            slot.send(OK)
            assert consumer.read_response().value(b"Connection") == b"close"
        assert hub.wait() == 0


# The minute for which two hubs may share a port, and the second that a handover takes, cut short.
IMPATIENT = {"neighbour_check_s": 0.05, "handover_s": 0.2}


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_two_hubs_that_share_a_port_for_good_warn_of_each_other(host: str) -> None:
    with wire.hub_process(REUSE, "--main-host", host, "--main-port", "0", limits=IMPATIENT) as one:
        assert one.stats()["has_rival"] is False
        port = str(one.main[1])
        with wire.hub_process(REUSE, "--main-host", host, "--main-port", port, limits=IMPATIENT) as other:
            for hub in (one, other):
                hub.until(lambda stats: stats["has_rival"])
                hub.wait_for_error(lambda line: "another hub listens on" in line and f":{port}, too" in line)
            other.terminate()
            assert other.wait() == 0
        one.until(lambda stats: not stats["has_rival"])
        assert one.stderr.count("another hub") == other.stderr.count("another hub") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell")
def test_handover_is_not_taken_for_two_hubs_that_share_a_port() -> None:
    with wire.hub_process(REUSE, limits=IMPATIENT) as old, Peer.connect(old.worker) as slot:
        with Peer.connect(old.main) as consumer, contextlib.ExitStack() as stack:
            consumer.send(get(b"/runs"))
            slot.read_request()
            old.terminate()
            wire.until(lambda: refuses(old.main))  # it has left the port, and still has work
            new = stack.enter_context(
                wire.hub_process(REUSE, "--main-port", str(old.main[1]), limits=IMPATIENT)
            )
            with pytest.raises(AssertionError, match="nothing in"):
                new.wait_for_error(lambda line: "another hub" in line, 1.0)
            assert [hub.stats()["has_rival"] for hub in (old, new)] == [False, False]
            slot.send(OK)
            assert consumer.read_response().status == 200
            assert old.wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell")
def test_hub_on_the_same_port_of_another_address_is_no_rival() -> None:
    with wire.hub_process(REUSE, limits=IMPATIENT) as one:
        with wire.hub_process(
            REUSE, "--main-host", "127.0.0.2", "--main-port", str(one.main[1]), limits=IMPATIENT
        ) as other:
            with pytest.raises(AssertionError, match="nothing in"):
                other.wait_for_error(lambda line: "another hub" in line, 1.0)
            assert [hub.stats()["has_rival"] for hub in (one, other)] == [False, False]


# ---- A hub that is not ready before it leaves --------------------------------------------------------


def test_hub_serves_on_while_its_balancer_learns_that_it_is_not_ready(manager: Manager) -> None:
    hub_options = ("--drain-delay", "1s")
    environment = {"NOTIFY_SOCKET": manager.environment()["NOTIFY_SOCKET"]}
    with wire.hub_process(*hub_options, environment=environment) as hub, contextlib.ExitStack() as stack:
        kept, idle = (stack.enter_context(Peer.connect(hub.main)) for _ in range(2))
        with Peer.connect(hub.worker) as slot:
            kept.send(get(b"/before"))
            wire.serve(slot)
            assert kept.read_response().value(b"Connection") is None
            assert hub.ask_admin(b"/readyz").status == 200
            began = time.monotonic()
            hub.terminate()
            hub.wait_for_error(wire.is_line("not ready any more: serving on for 1 s, then draining"))
            assert hub.ask_admin(b"/readyz").status == 503
            new = stack.enter_context(Peer.connect(hub.main))
            for consumer in (kept, new):
                consumer.send(get(b"/meanwhile"))
                wire.serve(slot)
                response = consumer.read_response()
                assert (response.status, response.value(b"Connection")) == (200, b"close")
                consumer.expect_eof()
            with Peer.connect(hub.worker) as late:
                wire.until(lambda: len(slots_of(hub)) == 2)
                late.expect_eof()
            assert hub.wait() == 0
        assert time.monotonic() - began >= 1
        idle.expect_eof()
        assert "draining: 0 requests to finish" in hub.stderr
    manager.hear()
    assert manager.hear() == b"STOPPING=1\nSTATUS=not ready any more: serving on for 1 s"
    assert manager.hear() == b"STOPPING=1\nSTATUS=draining: 0 requests to finish"


def test_hub_that_serves_on_can_be_told_again_to_stop_at_once() -> None:
    with wire.hub_process("--drain-delay", "1h") as hub:
        hub.terminate()
        hub.wait_for_error(wire.is_line("not ready any more"))
        hub.terminate()
        assert hub.wait() == 0


# ---- Under load --------------------------------------------------------------------------------------

RESTARTS = 3
SERVED_BETWEEN = 150  # requests, at least

# Notes each request in a file when it starts, and returns its path and body.
LEDGER_APP = """
import os

ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def app(environ, start_response):
    path = environ["PATH_INFO"].encode()
    os.write(ledger, path + b"\\n")
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return [path, environ["wsgi.input"].read()]
"""


class Crowd:
    """Consumers that ask without end and never ask twice; each failure is noted."""

    def __init__(self, address: wire.Address) -> None:
        self._address = address
        self._ends = threading.Event()
        self._numbers = itertools.count()
        self.answered: list[bytes] = []
        self.failures: list[str] = []
        kinds = [(method, is_kept) for method in (b"GET", b"POST") for is_kept in (False, True)]
        self._threads = [threading.Thread(target=self._ask_on, args=kind) for kind in kinds * 3]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait until each has got its last answer."""
        self._ends.set()
        for thread in self._threads:
            thread.join(wire.DEADLINE_S)
            assert not thread.is_alive()

    def _ask_on(self, method: bytes, is_kept: bool) -> None:
        with contextlib.ExitStack() as stack:
            peer = None
            while not self._ends.is_set():
                path = b"/%d" % next(self._numbers)
                try:
                    peer = peer or stack.enter_context(Peer.connect(self._address))
                    is_open = self._ask(peer, method, path, is_kept)
                except (OSError, AssertionError) as exc:
                    self.failures.append(f"{method.decode()} {path.decode()} kept={is_kept}: {exc!r}")
                    return
                if not is_open:
                    peer.close()
                    peer = None

    def _ask(self, peer: Peer, method: bytes, path: bytes, is_kept: bool) -> bool:
        """Ask and check the answer; return whether the connection is kept."""
        body = os.urandom(20_000) if method == b"POST" else b""
        fields = b"" if is_kept else b"Connection: close\r\n"
        fields += b"Content-Length: %d\r\n" % len(body) if body else b""
        peer.send(b"%b %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (method, path, fields) + body)
        response = peer.read_response()
        assert response.status == 200, response
        assert response.body == path + body, "somebody else's answer"
        self.answered.append(path)
        return response.value(b"Connection") != b"close"


@contextlib.contextmanager
def crowd_and_workers(hub: HubProcess, directory: Path) -> Iterator[Crowd]:
    """Ask and serve under load; in the end each request has been run and answered, once."""
    (directory / "ledger_app.py").write_text(LEDGER_APP)
    ledger = directory / "ledger"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            arguments = ("--workers", "2", "ledger_app:app")
            environment = {"LEDGER": str(ledger)}
            stack.enter_context(wire.worker_process(hub, *arguments, cwd=directory, environment=environment))
        crowd = Crowd(hub.main)
        try:
            yield crowd
        finally:
            crowd.end()
    assert crowd.failures == []
    started = collections.Counter(ledger.read_bytes().split())
    assert started == dict.fromkeys(crowd.answered, 1)


def wait_until_it_serves(hub: HubProcess) -> None:
    """Wait until the hub has answered some requests."""
    count = itertools.count(1)
    hub.wait_for_line(lambda line: line.endswith("code=OK") and next(count) == SERVED_BETWEEN, 60)


def test_restart_with_passed_sockets_under_load_loses_nothing(manager: Manager, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(manager.hub())
        with crowd_and_workers(hub, tmp_path):
            for _ in range(RESTARTS):
                wait_until_it_serves(hub)
                hub.terminate()
                assert hub.wait() == 0
                hub = stack.enter_context(manager.hub())
            wait_until_it_serves(hub)


def test_handover_with_passed_sockets_under_load_loses_nothing(manager: Manager, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(manager.hub())
        with crowd_and_workers(hub, tmp_path):
            for _ in range(RESTARTS):
                wait_until_it_serves(hub)
                hub, old = stack.enter_context(manager.hub()), hub
                old.terminate()
                assert old.wait() == 0
            wait_until_it_serves(hub)


def test_handover_on_a_shared_port_under_load_loses_nothing(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(wire.hub_process(REUSE))
        options = ports_of(hub)
        with crowd_and_workers(hub, tmp_path):
            for _ in range(RESTARTS):
                wait_until_it_serves(hub)
                hub, old = stack.enter_context(wire.hub_process(*options)), hub
                old.terminate()
                assert old.wait() == 0
            wait_until_it_serves(hub)
