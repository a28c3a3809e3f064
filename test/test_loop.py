"""The event loop, what it watches, and streams: with socket pairs and a clock that stands still."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

import pothead
from pothead import LIMITS, EventLoop, Listener, Spool, SpoolBudget, Stream, Timer, Transport, Watched

DEADLINE_S = 10.0
MIB = 1 << 20


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Events(list[object]):
    """What happened, in order; `note` makes callbacks that write it down."""

    def note(self, what: object) -> Callable[[], None]:
        return lambda: self.append(what)


class Recorder:
    """A role that writes down what it is told, and closes its stream at a hang-up as every role does."""

    stream: Stream

    def __init__(self) -> None:
        self.events: list[object] = []
        self.wants_bytes = True
        self.on_first_byte: Callable[[], None] | None = None
        self.on_all_gone: Callable[[], None] | None = None

    def settle(self) -> int:
        return pothead.LIMITS.receive_bytes if self.wants_bytes else 0

    def on_bytes(self, data: memoryview) -> None:
        self.events.append(bytes(data))
        if self.on_first_byte is not None:
            self.on_first_byte()

    def on_hangup(self, *, reset: bool) -> None:
        self.events.append("reset" if reset else "hangup")
        self.stream.close()

    def on_taken(self) -> None: ...

    def on_drained(self) -> None:
        self.events.append("drained")
        if self.on_all_gone is not None:
            self.on_all_gone()

    def on_deadline(self) -> None:
        self.events.append("deadline")

    def on_fault(self) -> None:
        self.events.append("fault")


def has_unsent(stream: Stream) -> bool:
    return stream.outbuf is not None and stream.outbuf.size > 0


def take_now(peer: socket.socket, limit: int) -> bytes:
    """Return what has come, without waiting for more."""
    peer.setblocking(False)
    try:
        return peer.recv(limit)
    except BlockingIOError:
        return b""
    finally:
        peer.settimeout(DEADLINE_S)


class Rig:
    """A loop with streams, their roles, and the sockets at their other ends."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.loop = EventLoop(self.clock)
        self.budget = SpoolBudget(100 * MIB)
        self.spool_memory = 64 * 1024
        self.directory = str(directory)
        self._cleanup = contextlib.ExitStack()

    def pair(self, role: Recorder | None = None) -> tuple[Stream, Recorder, socket.socket]:
        """Return a stream of a socket pair, its role, and the peer."""
        ours, peer = socket.socketpair()
        return self._watch(ours, peer, role)

    def tcp_pair(self) -> tuple[Stream, Recorder, socket.socket]:
        """Return the same over TCP."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            peer = socket.create_connection(server.getsockname())
            ours, _ = server.accept()
        return self._watch(ours, peer, None)

    def _watch(
        self, ours: socket.socket, peer: socket.socket, role: Recorder | None
    ) -> tuple[Stream, Recorder, socket.socket]:
        ours.setblocking(False)
        peer.settimeout(DEADLINE_S)
        self._cleanup.callback(peer.close)
        stream = Stream(self.loop, Transport(ours), "peer:1", self._new_spool)
        stream.role = role = role or Recorder()
        role.stream = stream
        self.loop.add(stream)
        return stream, role, peer

    def _new_spool(self) -> Spool:
        return Spool(self.budget, self.spool_memory, self.directory)

    def timer(self, deadline: float, callback: Callable[[], None]) -> Timer:
        """Return a timer that is set to so many seconds after the clock's beginning."""
        timer = Timer(callback)
        self.set(timer, deadline)
        return timer

    def set(self, watched: Watched, deadline: float) -> None:
        watched.deadline = 1000.0 + deadline
        self.loop.touch(watched)

    def turn(self, at: float = 0.0) -> None:
        """Turn once, so many seconds after the clock's beginning, without sleeping."""
        self.clock.now = max(self.clock.now, 1000.0 + at)
        self.loop.call_from_thread(lambda: None)
        self.loop.turn()

    def turn_until(self, is_true: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + DEADLINE_S
        while not is_true():
            assert time.monotonic() < ends_at, "it never came true"
            self.turn()

    def count_turns_for(self, real_s: float) -> int:
        """Return how often the loop turns in so many seconds of real time."""
        self.loop.clock = time.monotonic
        alarm = Timer(self.loop.stop)
        alarm.deadline = time.monotonic() + real_s
        self.loop.touch(alarm)
        turns: list[None] = []
        self.loop.before_sleep.append(lambda: turns.append(None))
        self.loop.run()
        return len(turns)

    def close(self) -> None:
        self.loop.close()
        self._cleanup.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


# ---- Timers ------------------------------------------------------------------------------------------


def test_timers_fire_once_and_in_the_order_of_their_deadlines(rig: Rig) -> None:
    events = Events()
    timers = [rig.timer(deadline, events.note(deadline)) for deadline in (3, 1, 2, 5, 4)]
    rig.turn(at=0.5)
    assert events == []
    rig.turn(at=4.5)
    assert events == [1, 2, 3, 4]
    rig.turn(at=4.6)
    assert events == [1, 2, 3, 4]
    rig.turn(at=100)
    assert events == [1, 2, 3, 4, 5]
    assert all(timer.deadline == math.inf for timer in timers)


def test_timer_fires_at_its_deadline_and_not_before(rig: Rig) -> None:
    events = Events()
    rig.timer(1, events.note("fired"))
    rig.turn(at=0.999)
    assert events == []
    rig.turn(at=1)
    assert events == ["fired"]


def test_deadline_that_moved_later_does_not_fire_early(rig: Rig) -> None:
    events = Events()
    timer = rig.timer(1, events.note("fired"))
    rig.turn()
    timer.deadline = 1005.0  # no touch: an attribute store is enough
    for at in (1, 2, 4.9):
        rig.turn(at)
        assert events == []
    rig.turn(at=5)
    assert events == ["fired"]
    rig.turn(at=6)
    assert events == ["fired"]


def test_deadline_that_moved_earlier_fires_at_its_time_and_once(rig: Rig) -> None:
    events = Events()
    timer = rig.timer(5, events.note("fired"))
    rig.turn()
    rig.set(timer, 1)
    rig.turn(at=1)
    assert events == ["fired"]
    rig.turn(at=5)
    rig.turn(at=6)
    assert events == ["fired"]


def test_deadline_that_moved_to_and_fro_fires_where_it_came_to_rest(rig: Rig) -> None:
    generator = random.Random(7)
    for _ in range(50):
        events = Events()
        timer = rig.timer(1e6, events.note("fired"))
        start = rig.clock.now - 1000
        for _ in range(10):
            rig.set(timer, start + generator.randint(1, 20))
            rig.turn()
        rest = timer.deadline - 1000
        rig.turn(at=rest - 0.5)
        assert events == []
        rig.turn(at=rest)
        rig.turn(at=rest + 30)
        assert events == ["fired"]


def test_turn_that_keeps_everyone_waiting_is_told_once_a_minute(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    def burn() -> None:
        rig.clock.now += 0.7

    for at, wanted in ((1, 1), (2, 1), (100, 2)):
        rig.timer(at, burn)
        rig.turn()
        rig.turn(at=at)
        assert caplog.text.count("everyone has waited for 0.7 s") == wanted


def test_deadline_that_was_switched_off_does_not_fire(rig: Rig) -> None:
    events = Events()
    timer = rig.timer(1, events.note("fired"))
    rig.turn()
    timer.deadline = math.inf
    rig.turn(at=2)
    assert events == []


def test_timer_may_set_itself_again(rig: Rig) -> None:
    events = Events()

    def again() -> None:
        events.append(rig.clock.now)
        timer.deadline = rig.clock.now + 1

    timer = rig.timer(1, again)
    for at in (1, 1.5, 2, 2.5, 3):
        rig.turn(at)
    assert events == [1001, 1002, 1003]


def test_timer_of_what_was_closed_does_not_fire(rig: Rig) -> None:
    stream, role, _ = rig.pair()
    rig.set(stream, 1)
    rig.turn()
    stream.close()
    rig.turn(at=2)
    rig.turn(at=3)
    assert role.events == []


def test_sockets_come_before_timers(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    rig.set(stream, 1)
    peer.send(b"just in time")
    rig.turn(at=1)
    assert role.events == [b"just in time", "deadline"]


def test_bytes_that_come_with_the_deadline_can_move_it(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    rig.set(stream, 1)
    rig.turn()
    role.on_first_byte = lambda: rig.set(stream, 10)
    peer.send(b"just in time")
    rig.turn(at=1)
    assert role.events == [b"just in time"]
    rig.turn(at=10)
    assert role.events == [b"just in time", "deadline"]


def test_loop_without_a_deadline_sleeps_until_it_is_called(rig: Rig) -> None:
    rig.pair()
    turns = Events()
    rig.loop.before_sleep.append(turns.note("turn"))
    caller = threading.Timer(0.05, rig.loop.call_from_thread, [rig.loop.stop])
    caller.start()
    rig.loop.run()
    caller.join()
    assert len(turns) <= 3


def test_loop_sleeps_until_the_next_deadline(rig: Rig) -> None:
    rig.pair()
    assert rig.count_turns_for(0.05) <= 3


# ---- Calls -------------------------------------------------------------------------------------------


def test_loop_that_was_stopped_in_its_sleep_looks_before_it_tells_the_time(rig: Rig) -> None:
    """A process that goes on after a stop comes back from its sleep with nothing: it has not looked since."""
    stream, role, peer = rig.pair()
    rig.set(stream, 0.01)
    times = iter([1000.0])

    def stopped_clock() -> float:
        for now in times:  # before the sleep
            return now
        if rig.clock.now < 1100:  # after it, and after the standstill
            rig.clock.now = 1100
            peer.send(b"in time")
        return rig.clock.now

    rig.loop.clock = stopped_clock
    rig.loop.turn()
    assert role.events == [b"in time", "deadline"]


class Refused(Watched):
    """Something that the selector does not take."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.was_told = False

    def fileno(self) -> int:
        return self._file.fileno()

    def settle(self) -> int:
        return pothead.READ

    def on_fault(self) -> None:
        self.was_told = self.closed = True


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="other selectors take files")
def test_descriptor_that_the_selector_refuses_ends_what_it_belongs_to(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """epoll takes no regular file, as it takes no socket beyond the system's limit of watches."""
    with open(tmp_path / "file", "w+b") as file:
        refused = Refused(file)
        rig.loop.add(refused)
        _, role, peer = rig.pair()
        peer.send(b"others are served")
        rig.turn()
        assert refused.was_told and refused not in rig.loop.watched
    assert "cannot be watched" in caplog.text
    assert role.events == [b"others are served"]


def test_calls_happen_before_the_loop_sleeps_and_those_that_they_make_a_turn_later(rig: Rig) -> None:
    events = Events()

    def call_again() -> None:
        events.append("call 1")
        rig.loop.call_soon(events.note("call 3"))

    rig.loop.before_sleep += [events.note("step 1"), events.note("step 2")]
    rig.loop.call_soon(call_again)
    rig.loop.call_soon(events.note("call 2"))
    rig.turn()
    assert events == ["call 1", "call 2", "step 1", "step 2"]
    rig.turn()
    assert events[4:] == ["call 3", "step 1", "step 2"]


def test_call_that_is_made_in_a_step_is_not_slept_over(rig: Rig) -> None:
    events = Events()
    once = [lambda: rig.loop.call_soon(events.note("called"))]
    rig.loop.before_sleep.append(lambda: once.pop()() if once else None)
    rig.loop.turn()  # would sleep for ever
    rig.turn()
    assert events == ["called"]


def test_call_from_another_thread_wakes_a_sleeping_loop(rig: Rig) -> None:
    about_to_sleep = threading.Event()
    rig.loop.before_sleep.append(about_to_sleep.set)
    thread = threading.Thread(target=rig.loop.run, daemon=True)
    thread.start()
    callers: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
    for _ in range(3):
        assert about_to_sleep.wait(DEADLINE_S)
        about_to_sleep.clear()
        rig.loop.call_from_thread(lambda: callers.put(threading.current_thread()))
        assert callers.get(timeout=DEADLINE_S) is thread
    rig.loop.call_from_thread(rig.loop.stop)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_more_calls_than_the_wake_up_socket_holds_are_all_made(rig: Rig) -> None:
    events = Events()
    for number in range(10_000):
        rig.loop.call_from_thread(events.note(number))
    rig.loop.turn()
    assert events == list(range(10_000))


def test_loop_sleeps_again_after_many_calls(rig: Rig) -> None:
    for _ in range(10_000):
        rig.loop.call_from_thread(lambda: None)
    assert rig.count_turns_for(0.05) < 10


def test_call_to_a_loop_that_has_ended_does_no_harm(rig: Rig) -> None:
    rig.loop.close()
    rig.loop.call_from_thread(lambda: None)


def test_stop_ends_the_run_after_the_turn(rig: Rig) -> None:
    _, role, peer = rig.pair()
    role.on_first_byte = rig.loop.stop
    peer.send(b"stop")
    rig.loop.run()
    assert role.events == [b"stop"]


# ---- Closing -----------------------------------------------------------------------------------------


def test_close_only_marks_and_the_descriptor_is_closed_at_the_end_of_the_turn(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    open_after_close: list[bool] = []

    def close() -> None:
        stream.close()
        open_after_close.append(stream.fileno() >= 0)

    role.on_first_byte = close
    peer.send(b"now")
    rig.turn()
    assert open_after_close == [True]
    assert stream.closed
    rig.turn()
    assert stream.fileno() == -1
    assert stream not in rig.loop.watched
    assert peer.recv(1) == b""


def test_what_was_closed_in_this_turn_gets_no_event_any_more(rig: Rig) -> None:
    first, one, first_peer = rig.pair()
    second, other, second_peer = rig.pair()
    one.on_first_byte, other.on_first_byte = second.close, first.close
    first_peer.send(b"x")
    second_peer.send(b"x")
    rig.turn()
    rig.turn()
    assert one.events + other.events == [b"x"]


class Rival(Watched):
    """Closes the other one when something comes."""

    def __init__(self, sock: socket.socket, events: Events) -> None:
        super().__init__()
        self.other = self
        self._sock = sock
        self._events = events

    def fileno(self) -> int:
        return self._sock.fileno()

    def settle(self) -> int:
        return pothead.READ

    def on_events(self, events: int) -> None:
        self._events.append(events)
        self.other.closed = True


def test_event_that_came_with_the_one_that_closed_it_is_of_no_account(rig: Rig) -> None:
    events = Events()
    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(sock) for sock in socket.socketpair()] for _ in range(2)]
        first, second = (Rival(mine, events) for mine, _ in pairs)
        first.other, second.other = second, first
        for rival in (first, second):
            rig.loop.add(rival)
        for _, peer in pairs:
            peer.send(b"x")
        rig.turn()
        assert events == [pothead.READ]
        first.closed = second.closed = True
        for rival in (first, second):
            rig.loop.touch(rival)
        rig.turn()


def test_what_is_still_to_be_sent_is_not_sent_by_a_stream_that_was_closed_in_this_turn(rig: Rig) -> None:
    first, one, first_peer = rig.pair()
    second, other, second_peer = rig.pair()
    for stream in (first, second):
        stream.write(b"x" * MIB)
    one.on_first_byte, other.on_first_byte = second.close, first.close
    rig.turn()
    sent_before = (first.written, second.written)
    for peer in (first_peer, second_peer):
        peer.send(b"x")
        take_now(peer, MIB)
    rig.turn()
    assert [first.closed, second.closed].count(True) == 1
    assert [first.written > sent_before[0], second.written > sent_before[1]].count(True) == 1


def test_stream_that_is_closed_when_it_has_drained_reads_no_more(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    role.on_all_gone = stream.close
    while not has_unsent(stream):
        stream.write(b"x" * 1000)
    while take_now(peer, MIB):
        pass
    peer.send(b"more")
    rig.turn()
    assert role.events == ["drained"]


def test_stream_can_be_closed_twice(rig: Rig) -> None:
    stream, _, peer = rig.pair()
    role_of_another = rig.pair()[1]
    stream.write(b"x" * MIB)
    assert has_unsent(stream)
    for _ in range(2):
        stream.close()
        rig.turn()
    assert rig.budget.memory_used == 0
    assert role_of_another.events == []
    peer.close()


def test_end_of_the_loop_closes_everything(rig: Rig) -> None:
    streams = [rig.pair()[0] for _ in range(5)]
    rig.turn()
    streams.append(rig.pair()[0])  # which the loop has not looked at yet
    rig.loop.close()
    assert [stream.fileno() for stream in streams] == [-1] * 6
    assert rig.loop.watched == set()


def test_close_without_more_is_a_fin_and_with_abort_a_reset(rig: Rig) -> None:
    gentle, _, gentle_peer = rig.tcp_pair()
    rude, _, rude_peer = rig.tcp_pair()
    gentle.close()
    rude.close(abort=True)
    rig.turn()
    assert gentle_peer.recv(1) == b""
    with pytest.raises(ConnectionResetError):
        rude_peer.recv(1)


# ---- Interest ----------------------------------------------------------------------------------------


def test_stream_that_wants_nothing_gets_nothing_until_it_wants_again(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    role.wants_bytes = False
    rig.turn()
    assert stream.registered == 0
    peer.send(b"early")
    rig.turn()
    assert role.events == []
    role.wants_bytes = True
    rig.loop.touch(stream)
    rig.turn()
    assert role.events == [b"early"]


def test_stream_that_ceases_to_want_is_unregistered(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    rig.turn()
    assert stream.registered == pothead.READ
    role.wants_bytes = False
    rig.loop.touch(stream)
    peer.send(b"early")
    rig.turn()
    assert stream.registered == 0
    assert role.events == []


def test_hung_up_peer_of_a_stream_that_wants_nothing_keeps_the_loop_asleep(rig: Rig) -> None:
    stream, role, peer = rig.tcp_pair()
    rig.turn()
    role.wants_bytes = False
    rig.loop.touch(stream)
    stream.transport.end_output()
    peer.close()
    assert rig.count_turns_for(0.05) <= 3
    assert role.events == []


def test_writing_is_wanted_only_while_something_is_to_be_written(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    rig.turn()
    stream.write(b"x" * MIB)
    rig.turn()
    assert stream.registered == pothead.READ | pothead.WRITE
    received = 0
    while received < MIB:
        received += len(peer.recv(MIB))
        rig.turn()
    rig.turn()
    assert stream.registered == pothead.READ
    assert role.events == ["drained"]


# ---- Faults ------------------------------------------------------------------------------------------


def fail() -> None:
    raise ZeroDivisionError("on purpose")


def test_fault_in_one_role_ends_its_stream_and_the_others_are_served(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [rig.pair() for _ in range(5)]
    bad_stream, bad_role, bad_peer = pairs[2]
    bad_role.on_first_byte = fail
    for _, _, peer in pairs:
        peer.send(b"x")
    rig.turn()
    assert [role.events for _, role, _ in pairs] == [[b"x"]] * 2 + [[b"x", "fault"]] + [[b"x"]] * 2
    rig.turn()
    assert bad_peer.recv(1) == b""
    assert bad_stream.fileno() == -1
    assert len(rig.loop.watched) == 4
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "ZeroDivisionError: on purpose" in caplog.text


class FaultyTimer(Timer):
    """A timer that cannot do what it should, and gives up."""

    gave_up = 0

    def __init__(self) -> None:
        super().__init__(fail)

    def on_fault(self) -> None:
        self.gave_up += 1


def test_fault_in_one_timer_is_told_and_the_others_fire(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    events = Events()
    faulty = FaultyTimer()
    rig.set(faulty, 1)
    rig.timer(2, events.note("fired"))
    rig.turn(at=3)
    rig.turn(at=4)
    assert (faulty.gave_up, events) == (1, ["fired"])
    assert caplog.text.count("ZeroDivisionError: on purpose") == 1


# ---- Reading -----------------------------------------------------------------------------------------


def test_bytes_then_the_end_are_told_in_order(rig: Rig) -> None:
    _, role, peer = rig.pair()
    peer.send(b"one")
    rig.turn()
    peer.send(b"two")
    peer.close()
    rig.turn()
    rig.turn_until(lambda: "hangup" in role.events)
    assert role.events == [b"one", b"two", "hangup"]


def test_reset_is_told_from_a_fin(rig: Rig) -> None:
    _, role, peer = rig.tcp_pair()
    rig.turn()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    rig.turn_until(lambda: bool(role.events))
    assert role.events == ["reset"]


def test_each_turn_reads_one_piece_of_each_stream(rig: Rig) -> None:
    _, greedy, greedy_peer = rig.tcp_pair()
    _, modest, modest_peer = rig.pair()
    greedy_peer.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += greedy_peer.send(bytes(MIB))
    modest_peer.send(b"me, too")
    rig.turn_until(lambda: bool(greedy.events))
    rig.turn()
    assert modest.events == [b"me, too"]
    assert all(isinstance(data, bytes) and len(data) <= LIMITS.receive_bytes for data in greedy.events)


def test_role_can_be_exchanged_between_two_reads(rig: Rig) -> None:
    stream, first, peer = rig.pair()
    second = Recorder()

    def exchange() -> None:
        stream.role = second

    first.on_first_byte = exchange
    for data in (b"one", b"two"):
        peer.send(data)
        rig.turn()
    assert (first.events, second.events) == ([b"one"], [b"two"])


def test_hang_up_of_a_quiet_peer_is_seen_without_reading(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    assert not stream.transport.has_news()
    assert not stream.transport.has_hung_up()
    peer.send(b"speaks out of turn")
    assert stream.transport.has_news()
    assert not stream.transport.has_hung_up()
    peer.shutdown(socket.SHUT_WR)
    assert stream.transport.has_hung_up()
    rig.turn()
    assert role.events == [b"speaks out of turn"], "nothing was taken away"


# ---- Writing -----------------------------------------------------------------------------------------


def test_what_fits_is_written_at_once(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    stream.write(b"hello")
    assert peer.recv(100) == b"hello"
    assert stream.written == 5
    assert not has_unsent(stream)
    rig.turn()
    assert role.events == []


@pytest.mark.parametrize("spool_memory", [0, 100_000, 100 * MIB])
def test_what_does_not_fit_arrives_in_order_by_way_of_memory_and_file(rig: Rig, spool_memory: int) -> None:
    rig.spool_memory = spool_memory
    generator = random.Random(spool_memory)
    data = generator.randbytes(3 * MIB)
    stream, role, peer = rig.pair()
    written = 0
    received = bytearray()
    while written < len(data):
        size = generator.choice((1, 10, 1000, 100_000, 300_000))
        stream.write(data[written : written + size])
        written += size
        if generator.random() < 0.2:
            rig.turn()
        if generator.random() < 0.1:
            received += take_now(peer, 50_000)
    assert has_unsent(stream)
    assert rig.budget.files == (1 if spool_memory < MIB else 0)
    assert rig.budget.memory_used <= spool_memory
    while len(received) < len(data):
        received += take_now(peer, MIB)
        rig.turn()
    assert received == data
    assert stream.written == len(data)
    assert role.events.count("drained") >= 1 and set(role.events) == {"drained"}
    assert (rig.budget.files, rig.budget.memory_used) == (0, 0)


def test_drained_is_told_once_when_everything_has_gone(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    stream.write(b"x" * MIB)
    received = 0
    while not role.events:
        assert has_unsent(stream)
        received += len(take_now(peer, 100_000))
        rig.turn()
    assert stream.written == MIB > received
    rig.turn()
    rig.turn()
    assert role.events == ["drained"]


def test_write_that_fails_is_told_later_and_not_in_the_middle(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    rig.turn()
    role.wants_bytes = False
    peer.close()
    stream.write(b"too late")
    assert role.events == [], "on_hangup must not come while write is running"
    stream.write(b"and more")
    assert not has_unsent(stream)
    assert stream.written == 0
    rig.turn()
    assert role.events == ["reset"]
    rig.turn()
    assert role.events == ["reset"]


def test_last_words_are_read_before_a_failed_write_is_told(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    peer.send(b"404, and goodbye")
    peer.close()
    stream.write(b"too late")
    assert role.events == []
    rig.turn()
    assert role.events == [b"404, and goodbye", "reset"]


def test_no_hang_up_is_told_of_a_stream_that_was_closed_after_its_write_failed(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    rig.turn()
    peer.close()
    stream.write(b"too late")
    stream.close()
    rig.turn()
    rig.turn()
    assert role.events == []


def test_peer_that_leaves_while_bytes_wait_for_it_is_a_hang_up_and_frees_them(rig: Rig) -> None:
    rig.spool_memory = 0
    stream, role, peer = rig.pair()
    role.wants_bytes = False
    stream.write(b"x" * MIB)
    rig.turn()
    assert rig.budget.files == 1
    peer.close()
    rig.turn_until(lambda: bool(role.events))
    assert role.events == ["reset"]
    assert rig.budget.files == 0


def test_write_to_a_closed_stream_is_dropped(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    stream.close()
    stream.write(b"too late")
    rig.turn()
    assert peer.recv(10) == b""
    assert role.events == []


def test_end_of_the_output_leaves_the_input_open(rig: Rig) -> None:
    stream, role, peer = rig.pair()
    stream.write(b"last")
    stream.transport.end_output()
    assert peer.recv(10) == b"last"
    assert peer.recv(10) == b""
    peer.send(b"thanks")
    rig.turn()
    assert role.events == [b"thanks"]


# ---- Listening ---------------------------------------------------------------------------------------


class Accepting:
    """A listener whose connections are counted and closed."""

    def __init__(self, rig: Rig) -> None:
        self.addresses: list[str] = []
        self.may_accept = True
        sock = socket.create_server(("127.0.0.1", 0), backlog=200)
        sock.setblocking(False)
        self.target = sock.getsockname()
        self.listener = Listener(rig.loop, sock, self._accept, lambda: self.may_accept)
        rig.loop.add(self.listener)

    def _accept(self, sock: socket.socket, address: str) -> None:
        self.addresses.append(address)
        sock.close()

    def dial(self, count: int) -> list[str]:
        """Open and close so many connections; return the addresses that they came from."""
        addresses = []
        for _ in range(count):
            with socket.create_connection(self.target) as sock:
                addresses.append(f"127.0.0.1:{sock.getsockname()[1]}")
        return addresses


def test_listener_accepts_in_order_and_so_many_a_turn(rig: Rig) -> None:
    accepting = Accepting(rig)
    addresses = accepting.dial(LIMITS.accepts_a_turn + 6)
    rig.turn()
    assert accepting.addresses == addresses[: LIMITS.accepts_a_turn]
    rig.turn()
    assert accepting.addresses == addresses


def test_listener_without_descriptors_rests_and_begins_again(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    accepting = Accepting(rig)
    accepting.may_accept = False
    addresses = accepting.dial(2)
    rig.turn()
    accepting.may_accept = True
    rig.turn()
    assert accepting.addresses == [], "it rests"
    assert len(caplog.records) == 1
    rig.turn(at=LIMITS.accept_pause_s)
    rig.turn()
    assert accepting.addresses == addresses


def test_resting_listener_keeps_the_loop_asleep(rig: Rig) -> None:
    accepting = Accepting(rig)
    accepting.may_accept = False
    accepting.dial(2)
    rig.turn()
    assert rig.count_turns_for(0.05) <= 3
