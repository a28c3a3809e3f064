"""Exchanges inside one process: the hub turns by hand, under a clock that the test moves."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import Rig

import pothead
import wire
from pothead import Hub, Options, Outcome, State
from wire import OK, Peer, get


def address(rig: Rig) -> wire.Address:
    host, _, port = rig.hub.addresses["consumers"].rpartition(":")
    return host, int(port)


def take(peer: Peer) -> int:
    """Receive what has come; returns how much the peer holds."""
    peer.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        peer.received += peer.sock.recv(1 << 20)
    peer.sock.settimeout(wire.DEADLINE_S)
    return len(peer.received)


def codes(rig: Rig) -> list[str]:
    return [line.partition(" code=")[2][:2] for line in rig.lines]


# ---- States ------------------------------------------------------------------------------------------


def test_every_state_can_end_and_the_end_is_final() -> None:
    for state, following in pothead.TRANSITIONS.items():
        assert (State.FINISHED in following) == (state is not State.FINISHED)
    assert set(pothead.TRANSITIONS) == set(State)
    assert pothead.TRANSITIONS[State.FINISHED] == ()


def test_exchange_goes_through_its_states_in_order(rig: Rig) -> None:
    consumer = rig.consumer(get(b"/", b"Content-Length: 2", method=b"PUT") + b"x")
    exchange = rig.exchange(b"/")
    assert exchange.state is State.RECEIVING
    consumer.send(b"y")
    rig.until(lambda: exchange.state is State.QUEUED)
    slot = rig.slot()
    rig.until(lambda: exchange.state is State.SENT)
    slot.send(OK[:-1])
    rig.until(lambda: exchange.state is State.RESPONDING)
    slot.send(OK[-1:])
    rig.until(lambda: exchange.state is State.FINISHED)
    assert exchange.outcome is Outcome.COMPLETED
    assert not rig.hub.exchanges


def test_what_has_ended_is_freed_without_the_garbage_collector(rig: Rig) -> None:
    slot, consumer = rig.slot(), rig.consumer()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            consumer.send(get(b"/"))
            rig.until(lambda: slot.has_bytes())
            slot.read_request()
            slot.send(OK)
            rig.response(consumer)
        assert not [each for each in gc.get_objects() if isinstance(each, pothead.Exchange)]
    finally:
        gc.enable()


def test_illegal_steps_are_faults_of_the_hub(rig: Rig) -> None:
    rig.consumer(get(b"/"))
    exchange = rig.exchange(b"/")
    head = pothead.take_response_head(pothead.Inbuf(OK))
    assert head
    with pytest.raises(AssertionError):  # a response to what was sent to nobody
        exchange.on_response(head, pothead.FixedBody(0))
    assert exchange.state is State.QUEUED
    rig.slot()
    rig.until(lambda: exchange.state is State.SENT)
    (worker,) = rig.hub.slots
    with pytest.raises(AssertionError):  # a second worker for one request
        exchange.start(worker)
    exchange.finish(Outcome.WORKER_LOST)
    for step in (lambda: exchange.start(worker), lambda: exchange.on_response(head, pothead.FixedBody(0))):
        with pytest.raises(AssertionError):
            step()


WITH_A_STATUS = [each for each in Outcome if each.status not in (0, 499)]


@pytest.mark.parametrize("outcome", WITH_A_STATUS)
def test_exchange_is_finished_once_and_by_the_first_reason(rig: Rig, outcome: Outcome) -> None:
    consumer = rig.consumer(get(b"/"))
    exchange = rig.exchange(b"/")
    exchange.finish(outcome)
    exchange.finish(Outcome.HUB_FAULT if outcome is not Outcome.HUB_FAULT else Outcome.QUEUE_FULL)
    exchange.refuse(400, "too late")
    exchange.on_consumer_gone()
    response = rig.response(consumer)
    may_come_again = outcome.status == 503 and outcome is not Outcome.CANCELLED
    assert (response.status, response.values(b"Retry-After") != []) == (outcome.status, may_come_again)
    assert codes(rig) == [outcome.code]
    assert sum(rig.hub.counters.outcomes.values()) == rig.hub.counters.outcomes[outcome] == 1
    assert rig.hub.policy.waiting == len(rig.hub.exchanges) == 0
    consumer.send(get(b"/next"))  # and nothing else was written
    slot = rig.slot()
    rig.until(lambda: slot.has_bytes())
    slot.send(OK)
    assert rig.response(consumer).body == b"ok"


@pytest.mark.parametrize("outcome", [each for each in WITH_A_STATUS if each is not Outcome.QUEUE_FULL])
def test_what_has_begun_is_cut_and_not_followed_by_an_error_page(rig: Rig, outcome: Outcome) -> None:
    consumer, slot = rig.consumer(get(b"/")), rig.slot()
    rig.until(lambda: slot.has_bytes())
    slot.send(OK[:-1])
    rig.until(lambda: consumer.has_bytes())
    consumer.read_until(b"\r\n\r\n")
    rig.exchange(b"/").finish(outcome)
    rig.turn()
    assert consumer.read_to_end() in (b"", b"o")
    assert codes(rig) == [outcome.code]
    assert "status=200" in rig.lines[0]
    rig.until(lambda: rig.is_closed(slot) if not slot.has_bytes() else not slot.read_request())


# ---- Faults of the hub's own -------------------------------------------------------------------------


def break_for(owner: object, name: str, path: bytes) -> None:
    """Let the method `name`, whose first argument is an exchange, fail for the request for `path`."""
    method = getattr(owner, name)

    def broken(exchange: pothead.Exchange, *rest: object) -> object:
        if exchange.head.path == path:
            raise ZeroDivisionError(f"the fault that {name} was given")
        return method(exchange, *rest)

    setattr(owner, name, broken)


def test_fault_costs_its_own_exchange_and_no_other(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    before, faulty, after = (rig.consumer(get(path)) for path in (b"/before", b"/fault", b"/after"))
    break_for(rig.hub.forwarding, "fields", b"/fault")
    slots = [rig.connect(rig.hub.addresses["workers"]) for _ in range(3)]
    assert rig.response(faulty).status == 500
    assert codes(rig) == ["HB"]
    rig.until(lambda: rig.hub.policy.running == 2)
    for slot in slots:
        if slot.has_bytes():
            slot.read_request()
            slot.send(OK)
    assert rig.response(before).body == rig.response(after).body == b"ok"
    assert codes(rig) == ["HB", "OK", "OK"]
    assert [record.exc_info is not None for record in caplog.records if record.levelno >= logging.ERROR] == [
        True
    ]
    assert "ZeroDivisionError" in caplog.text
    assert rig.hub.policy.idle == len(rig.hub.slots) == 2  # the slot in the midst of the fault is let go


@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
def test_access_log_that_fails_does_not_end_the_hub(
    rig: Rig, caplog: pytest.LogCaptureFixture, connection: bytes
) -> None:
    break_for(rig.hub, "on_finished", b"/fault")
    consumer, slot = rig.consumer(get(b"/fault")), rig.slot()
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    slot.send(OK.replace(b"\r\n\r\n", b"\r\nConnection: %b\r\n\r\n" % connection))
    assert rig.response(consumer).body == b"ok"
    rig.turn()
    slots = [slot, rig.connect(rig.hub.addresses["workers"])]
    another = rig.consumer(get(b"/next"))
    rig.until(lambda: any(each.has_bytes() for each in slots))
    (chosen,) = filter(Peer.has_bytes, slots)
    chosen.send(OK)
    assert rig.response(another).body == b"ok"
    assert "ZeroDivisionError" in caplog.text


def test_fault_with_one_expired_request_does_not_lose_the_others(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(queue_timeout=60.0)
    break_for(rig.hub, "on_finished", b"/0")
    consumers = [rig.consumer(get(b"/%d" % number)) for number in range(3)]
    rig.pass_time(61)
    for consumer in consumers:
        assert rig.response(consumer).status == 503
    assert codes(rig) == ["QT", "QT"]


# ---- Time --------------------------------------------------------------------------------------------


def test_log_tells_waiting_and_working_apart(rig: Rig) -> None:
    consumer = rig.consumer(get(b"/"))
    rig.pass_time(1.5)
    slot = rig.slot()
    rig.until(lambda: slot.has_bytes())
    assert slot.read_request().value(b"Pothead-Queue-Seconds") == b"1.500"
    rig.pass_time(2.25)
    slot.send(OK)
    rig.response(consumer)
    rig.until(lambda: rig.lines)
    assert " queued_ms=1500.0 worker_ms=2250.0 total_ms=3750.0 " in rig.lines[0]


def test_log_adds_up_the_waits_of_a_request_that_ran_twice(rig: Rig) -> None:
    consumer = rig.consumer(get(b"/"))
    rig.pass_time(1)
    first = rig.slot()
    rig.until(lambda: first.has_bytes())
    rig.pass_time(2)
    first.reset()
    rig.until(lambda: rig.hub.policy.waiting == 1)
    rig.pass_time(4)
    second = rig.slot()
    rig.until(lambda: second.has_bytes())
    assert second.read_request().value(b"Pothead-Queue-Seconds") == b"5.000"
    rig.pass_time(8)
    second.send(OK)
    rig.response(consumer)
    rig.until(lambda: rig.lines)
    assert " queued_ms=5000.0 " in rig.lines[0]
    assert " total_ms=15000.0 " in rig.lines[0]


def test_request_expires_when_its_time_is_over_and_not_before(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(queue_timeout=60.0)
    first = rig.consumer(get(b"/1"))
    rig.pass_time(30)
    second = rig.consumer(get(b"/2"))
    rig.pass_time(29.9)
    assert rig.hub.policy.waiting == 2
    rig.pass_time(0.1)
    assert rig.response(first).status == 503
    assert not second.has_bytes()
    rig.pass_time(30)
    assert rig.response(second).status == 503
    assert codes(rig) == ["QT", "QT"]


def test_after_a_standstill_slots_that_became_free_come_before_timeouts(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(queue_timeout=60.0, response_timeout=60.0)
    slot = rig.slot()
    first = rig.consumer(get(b"/1"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    second = rig.consumer(get(b"/2"))
    slot.send(OK)
    rig.clock.now += 3600  # the hub's process was stopped meanwhile
    rig.turn()
    assert rig.response(first).body == b"ok"
    rig.until(lambda: slot.has_bytes())
    assert slot.read_request().target == b"/2"
    slot.send(OK)
    assert rig.response(second).body == b"ok"
    assert codes(rig) == ["OK", "OK"]


def test_retry_after_is_queued_by_slots_times_mean_service_time(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(max_queue=3)
    slot, consumer = rig.slot(), rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    rig.pass_time(7)
    slot.send(OK)
    rig.response(consumer)
    for number in range(4):
        rig.consumer(get(b"/%d" % number))
    rig.until(lambda: rig.hub.policy.waiting == 3)
    with Peer.connect(address(rig)) as refused:
        refused.send(get(b"/refused"))
        assert rig.response(refused).value(b"Retry-After") == b"21"


def test_retry_after_is_fixed_while_nothing_tells_how_long_it_takes(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(max_queue=1, retry_after=44.3)
    rig.consumer(get(b"/waits"))
    rig.until(lambda: rig.hub.policy.waiting == 1)
    with Peer.connect(address(rig)) as refused:
        refused.send(get(b"/no-slot"))
        assert rig.response(refused).value(b"Retry-After") == b"45"
        rig.slot()  # it takes the one that waits, and nobody knows for how long
        rig.consumer(get(b"/waits-too"))
        rig.until(lambda: rig.hub.policy.waiting == 1)
        refused.send(get(b"/nothing-served-yet"))
        assert rig.response(refused).value(b"Retry-After") == b"45"


@pytest.mark.parametrize(("service_s", "seconds"), [(7, b"30"), (70, b"70")])
def test_retry_after_is_not_short_for_who_has_waited_in_vain(
    new_rig: Callable[..., Rig], service_s: int, seconds: bytes
) -> None:
    rig = new_rig(queue_timeout=60.0)
    slot, consumer = rig.slot(), rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    rig.pass_time(service_s)
    slot.send(OK)
    rig.response(consumer)
    rig.consumer(get(b"/runs"))
    waits = rig.consumer(get(b"/waits"))
    rig.pass_time(30)
    rig.consumer(get(b"/waits-too"))
    rig.until(lambda: rig.hub.policy.waiting == 2)
    rig.pass_time(30)
    assert rig.response(waits).value(b"Retry-After") == seconds


def test_response_timeout_ends_the_attempt(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(response_timeout=600.0)
    consumer, slot = rig.consumer(get(b"/")), rig.slot()
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    rig.pass_time(599)
    slot.send(b"HTTP/1.1 102 Processing\r\n\r\n")
    rig.turn()
    assert not rig.lines
    rig.pass_time(1)
    assert rig.response(consumer).status == 504
    assert rig.is_closed(slot)
    assert codes(rig) == ["WT"]


@pytest.mark.parametrize("is_used", [False, True])
def test_idle_consumer_is_closed_when_its_time_is_over(new_rig: Callable[..., Rig], is_used: bool) -> None:
    rig = new_rig(keep_alive=75.0)
    slot, consumer = rig.slot(), rig.consumer()
    rig.turn()
    if is_used:
        consumer.send(get(b"/"))
        rig.until(lambda: slot.has_bytes())
        rig.pass_time(1000)  # while it waits for its response, it is not idle
        slot.send(OK)
        rig.response(consumer)
    rig.pass_time(74.9)
    assert not rig.is_closed(consumer)
    rig.pass_time(0.2)
    assert rig.is_closed(consumer)


def test_request_that_crosses_the_end_of_the_idle_time_is_served(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(keep_alive=75.0)
    slot, consumer = rig.slot(), rig.consumer()
    rig.turn()
    streams = [each for each in rig.hub.loop.watched if isinstance(each, pothead.Stream)]
    (role,) = [each.role for each in streams if isinstance(each.role, pothead.Consumer)]
    consumer.send(get(b"/"))
    role.on_deadline()  # the timer fires before the bytes are looked at
    rig.until(lambda: slot.has_bytes())
    slot.send(OK)
    assert rig.response(consumer).status == 200


def test_a_byte_now_and_then_does_not_prolong_a_head(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(head_timeout=10.0)
    consumer = rig.consumer()
    for _ in range(9):
        consumer.send(b"G")
        rig.turn()
        rig.pass_time(1)
    assert not consumer.has_bytes()
    rig.pass_time(2)
    assert rig.response(consumer).status == 408


def test_refused_consumer_that_stays_is_cut_off(rig: Rig) -> None:
    consumer = rig.consumer()
    consumer.send(b"garbage\r\n\r\n")
    assert rig.response(consumer).status == 400
    streams = len(rig.hub.loop.watched)
    rig.pass_time(4.9)
    assert len(rig.hub.loop.watched) == streams
    rig.pass_time(0.2)
    assert len(rig.hub.loop.watched) == streams - 1


def test_consumer_that_leaves_behind_unread_bytes_is_noticed(rig: Rig) -> None:
    consumer = rig.consumer(get(b"/"))
    consumer.send(b"x" * 100_000)
    rig.turn()
    rig.turn()
    consumer.close()
    rig.turn()
    rig.pass_time(1.1)
    assert codes(rig) == ["CQ"]
    assert rig.hub.policy.waiting == 0


def send_slowly(rig: Rig, peer: Peer, data: bytes) -> None:
    """Send what the hub takes only bit by bit, while time passes."""
    sender = threading.Thread(target=peer.send, args=(data,))
    sender.start()
    while sender.is_alive():
        rig.pass_time(0.01)
        sender.join(0.001)


def test_slow_reader_is_kept_and_a_stalled_one_is_not(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(stall_timeout=60.0)
    slot, consumer = rig.slot(), rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    send_slowly(rig, slot, b"HTTP/1.1 200 OK\r\n\r\n" + bytes(24 << 20))
    slot.close()
    rig.until(lambda: not rig.hub.slots)
    for _ in range(3):
        rig.until(lambda: take(consumer) >= 4 << 20)
        consumer.received.clear()
        rig.pass_time(40)
        assert not rig.lines
    stream, written = rig.exchange(b"/").consumer.stream, -1
    while stream.written != written:  # the network's own buffers fill up
        written = stream.written
        rig.turn()
    rig.pass_time(61)
    rig.pass_time(61)
    assert codes(rig) == ["CR"]
    assert rig.hub.budget.memory_used == rig.hub.budget.files == 0


# ---- Drains ------------------------------------------------------------------------------------------


def test_drain_ends_with_the_turn_in_which_its_last_consumer_is_given_up(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(stall_timeout=60.0, graceful_timeout=3600.0)
    slot = rig.slot()
    rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    send_slowly(rig, slot, b"HTTP/1.1 200 OK\r\n\r\n" + bytes(24 << 20))
    rig.hub._drain()
    while not rig.lines:
        assert rig.hub.loop._running
        rig.pass_time(61)
    assert codes(rig) == ["CR"]
    assert not rig.hub.loop._running


def test_turn_of_a_drain_does_not_look_at_every_connection(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(reuse_port=True)
    for number in range(200):
        rig.slot()
        rig.consumer(get(b"/%d" % number))
    rig.until(lambda: rig.hub.policy.running == 200)
    costs_s = [cpu_of_turns(rig)]
    rig.hub._drain()
    costs_s.append(cpu_of_turns(rig))
    assert costs_s[1] < 4 * costs_s[0]


def cpu_of_turns(rig: Rig) -> float:
    rig.turn()
    began = time.process_time()
    for _ in range(2000):
        rig.turn()
    return time.process_time() - began


def test_requests_that_wait_for_a_first_worker_are_told_of(
    new_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    """Once an episode, in the log and in the answer: it is the first thing that a newcomer meets."""
    rig = new_rig(queue_timeout=60.0)
    first = rig.consumer(get(b"/first"))
    rig.pass_time(pothead.LIMITS.lonely_s - 1)
    assert "no worker" not in caplog.text
    rig.pass_time(1)
    assert "requests wait, and no worker is connected: 1" in caplog.text
    rig.pass_time(60)
    assert b"no worker is connected" in rig.response(first).body
    rig.consumer(get(b"/second"))
    rig.pass_time(30)
    assert caplog.text.count("no worker is connected") == 1


# ---- What one peer may cost the others ------------------------------------------------------------------


def send_in_background(peer: Peer, data: bytes) -> threading.Thread:
    """Send what may not fit; the thread ends when all is sent, or when the connection is over."""

    def send() -> None:
        with contextlib.suppress(OSError):
            peer.sock.sendall(data)

    sender = threading.Thread(target=send)
    sender.start()
    return sender


def has_sent_body(exchange: pothead.Exchange) -> bool:
    return exchange.attempt is not None and exchange.attempt.body_sent


def turns_until(rig: Rig, holds: Callable[[], object]) -> int:
    """Turn until it holds, without a new look at anything else in between; returns how often."""
    for turns in range(100_000):
        if holds():
            return turns
        rig.turn()
    raise AssertionError(rig.hub.stats())


def test_pipelined_requests_are_answered_one_a_turn(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(max_queue=1)
    rig.consumer(get(b"/waits"))
    eager = rig.consumer()
    eager.send(get(b"/refused") * 200)
    rig.until(lambda: rig.lines)
    for count in range(1, 200):
        assert len(rig.lines) == count
        rig.turn()
    assert [eager.read_response().status for _ in range(200)] == [503] * 200


def test_consumer_that_reads_no_answer_gets_no_other(new_rig: Callable[..., Rig]) -> None:
    """Neither spool nor memory grows with what it asks for."""
    rig = new_rig(max_queue=1)
    rig.consumer(get(b"/waits"))
    eager = rig.consumer(b"")
    rig.until(lambda: len(rig.consumers()) == 2)
    (stream,) = [each.stream for each in rig.consumers() if each.exchange is None]
    stream.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sender = send_in_background(eager, get(b"/refused") * 100_000)
    turns_until(rig, lambda: stream.outbuf is not None)
    answered = len(rig.lines)
    turns_until(rig, lambda: stream.role.settle() <= 0)  # it is not even heard any more
    assert len(rig.lines) == answered
    assert rig.hub.budget.memory_used < 1 << 20 and rig.hub.budget.files == 0
    assert len(stream.role._reader.inbuf) <= pothead.LIMITS.pipelined_bytes
    while len(rig.lines) < answered + 100:  # when it reads, it goes on
        take(eager)
        rig.turn()
    eager.sock.shutdown(socket.SHUT_RDWR)
    sender.join()


def test_consumer_may_send_ahead_so_much_and_no_more(rig: Rig) -> None:
    consumer = rig.consumer(get(b"/waits"))
    sender = send_in_background(consumer, get(b"/next") * 40_000)
    (stream,) = [each.stream for each in rig.consumers()]
    turns_until(rig, lambda: stream.role.settle() == 0)
    assert len(stream.role._reader.inbuf) <= pothead.LIMITS.pipelined_bytes
    consumer.sock.shutdown(socket.SHUT_RDWR)
    sender.join()


def test_ends_of_several_responses_in_one_turn_are_not_mixed_up(rig: Rig) -> None:
    slots = [rig.slot() for _ in range(3)]
    consumers = [rig.consumer(get(b"/%d" % number)) for number in range(3)]
    rig.until(lambda: all(slot.has_bytes() for slot in slots))
    for slot in slots:
        path = slot.read_request().target
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + path[:1])
    rig.until(lambda: all(consumer.has_bytes() for consumer in consumers))
    for number, slot in enumerate(slots):
        slot.send(b"%d%d" % (number, number))
    rig.until(lambda: not rig.hub.exchanges)
    rig.turn()
    bodies = {consumer.read_response().body for consumer in consumers}
    assert bodies == {b"/00", b"/11", b"/22"}


@pytest.mark.parametrize("side", ["consumer", "worker"])
def test_small_chunks_are_taken_a_few_a_turn(rig: Rig, side: str) -> None:
    body = b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n"
    slot, consumer = rig.slot(), rig.consumer()
    coded = b"Transfer-Encoding: chunked\r\n\r\n" + body
    if side == "consumer":
        consumer.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + coded)
        rig.until(lambda: rig.hub.exchanges)
        turns = turns_until(rig, lambda: slot.has_bytes())
        assert slot.read_request().body == b"x" * 5000
    else:
        consumer.send(get(b"/"))
        rig.until(lambda: slot.has_bytes())
        slot.read_request()
        slot.send(b"HTTP/1.1 200 OK\r\n" + coded)
        rig.until(lambda: consumer.has_bytes())
        turns = turns_until(rig, lambda: rig.lines)
        assert consumer.read_response().body == b"x" * 5000
    assert turns >= 5000 // pothead.LIMITS.chunks_a_turn - 2


def test_admin_is_answered_once_a_turn(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(admin_port=0)
    admin = rig.connect(rig.hub.addresses["admin"])
    admin.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
    rig.until(lambda: admin.has_bytes())
    for count in range(1, 50):
        take(admin)
        assert admin.received.count(b"HTTP/1.1 200 OK") == count
        rig.turn()


def test_body_for_a_worker_that_takes_all_is_sent_a_piece_a_turn(rig: Rig) -> None:
    slot, consumer = rig.slot(), rig.consumer()
    size = 8 << 20
    head = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size
    sender = send_in_background(consumer, head + bytes(size))
    (worker,) = rig.hub.slots
    turns_until(rig, lambda: worker.exchange is not None)
    while not slot.has_bytes() or take(slot) < size:
        before = worker.stream.written
        rig.turn()
        assert worker.stream.written - before <= 2 * pothead.LIMITS.receive_bytes
    sender.join()


def test_bodies_on_their_way_are_bounded_in_what_their_heads_take(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dataclasses.replace(pothead.LIMITS, uploads_bytes=100 << 10)
    monkeypatch.setattr(pothead, "LIMITS", limits)
    head = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nX: %b\r\n\r\n" % (b"x" * (20 << 10))
    coming = [rig.consumer(head) for _ in range(4)]
    refused = rig.connect(rig.hub.addresses["consumers"])
    refused.send(head)
    assert rig.response(refused).status == 503
    assert "too many bodies" in rig.lines[-1] and "code=QF" in rig.lines[-1]
    rig.consumer(get(b"/"))  # without a body it takes its place as ever
    coming[0].send(b"123456789")  # now it waits in the queue
    turns_until(rig, lambda: rig.hub.policy.waiting == 2)
    coming[1].close()
    turns_until(rig, lambda: len(rig.lines) == 2)
    for _ in range(2):
        rig.consumer(head)
    assert rig.hub.upload_bytes <= 100 << 10


# ---- Who is handed what ---------------------------------------------------------------------------------


def test_request_of_a_consumer_that_left_behind_unread_bytes_is_not_handed_out(rig: Rig) -> None:
    consumer = rig.consumer(get(b"/"))
    consumer.send(b"x" * 100_000)
    (stream,) = [each.stream for each in rig.consumers()]
    turns_until(rig, lambda: stream.role.settle() == 0)
    rig.pass_time(0.1)
    consumer.close()
    slot = rig.slot()
    rig.turn()
    assert codes(rig) == ["CQ"]
    assert not slot.has_bytes()
    rig.consumer(get(b"/next"))
    rig.until(lambda: slot.has_bytes())
    assert slot.read_request().target == b"/next"


def test_request_whose_consumer_left_with_its_last_byte_is_not_handed_out(rig: Rig) -> None:
    """Both have come before the hub looks: the request is read first, and the end in the next turn."""
    slot, consumer = rig.slot(), rig.consumer()
    rig.turn()
    consumer.send(get(b"/", b"Content-Length: 4", method=b"POST") + b"body")
    consumer.close()
    for _ in range(3):
        rig.turn()
    assert codes(rig) == ["CQ"] and not slot.has_bytes()


def test_machine_that_has_lost_a_slot_gets_nothing_for_a_moment(rig: Rig) -> None:
    """A process that is killed takes all its slots along, and the kernel closes them one by one."""
    slots = [rig.slot() for _ in range(3)]
    consumer = rig.consumer(get(b"/"))
    rig.until(lambda: any(map(Peer.has_bytes, slots)))
    (busy,) = [slot for slot in slots if slot.has_bytes()]
    busy.close()
    rig.until(lambda: rig.hub.policy.waiting == 1)
    rig.turn()
    idle = [slot for slot in slots if slot is not busy]
    assert not any(map(Peer.has_bytes, idle))
    idle[0].close()  # as it would have been
    rig.pass_time(pothead.LIMITS.rest_s)
    rig.until(lambda: idle[1].has_bytes())
    request = idle[1].read_request()
    assert request.value(b"Pothead-Attempt") == b"2"
    idle[1].close()  # it may not rest again so soon: others on the machine are well
    rig.until(lambda: not rig.hub.slots)
    last = rig.slot()
    rig.consumer(get(b"/next"))
    rig.until(lambda: last.has_bytes())
    assert last.read_request().target == b"/next"
    assert rig.response(consumer).status == 502


class DeadTransport(pothead.Transport):
    """One whose peer has gone, as the first byte tells."""

    def send(self, data: bytes) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_attempt_of_which_nothing_was_taken_is_none(new_rig: Callable[..., Rig], method: bytes) -> None:
    """Nobody has seen the request: any method may be repeated, and it is the first attempt that follows."""
    rig = new_rig(max_attempts=1)
    rig.slot()
    (dead,) = rig.hub.slots
    dead.stream.transport = DeadTransport(dead.stream.transport._sock)
    rig.consumer(get(b"/", method=method))
    rig.until(lambda: not rig.hub.slots)
    rig.pass_time(pothead.LIMITS.rest_s)
    slot = rig.slot()
    rig.until(lambda: slot.has_bytes())
    assert slot.read_request().value(b"Pothead-Attempt") == b"1"


def test_slot_waits_for_its_consumer_for_so_long_in_sum(rig: Rig) -> None:
    """And not so long again after each piece that the consumer takes."""
    slot, consumer = rig.slot(), rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    exchange = rig.exchange(b"/")
    (worker,), stream = rig.hub.slots, exchange.consumer.stream
    stream.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    size = 64 << 20
    sender = send_in_background(slot, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
    for left_s in (0.25, 0.15, 0.05):
        rig.until(lambda: stream.outbuf is not None and worker.stream.deadline < math.inf)
        assert worker.stream.deadline - rig.clock.now == pytest.approx(left_s)
        rig.pass_time(0.1 if left_s > 0.1 else 0.04)
        rig.until(lambda: take(consumer) and stream.outbuf is None)
        consumer.received.clear()
    rig.until(lambda: stream.outbuf is not None and worker.stream.deadline < math.inf)
    rig.pass_time(0.02)
    assert worker.stream.deadline == math.inf and exchange.may_relay(), "now the response is absorbed"
    slot.sock.shutdown(socket.SHUT_RDWR)
    sender.join()


def test_slot_that_is_sent_a_body_that_has_not_come_may_take_its_time(new_rig: Callable[..., Rig]) -> None:
    """It may compute before it reads, and its closed window is not taken for a dead machine."""
    rig = new_rig(stream_requests=True)
    rig.slot()
    rig.consumer(get(b"/", b"Content-Length: 4", method=b"PUT"))
    (slot,) = rig.hub.slots
    rig.until(lambda: slot.exchange is not None)
    option = slot.stream.transport._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert option == pothead.LIMITS.worker_full_s * 1000


def test_what_has_come_in_time_is_read_before_a_deadline_fires(new_rig: Callable[..., Rig]) -> None:
    """Also if it is more than a turn's share."""
    rig = new_rig(response_timeout=1.0)
    slot, consumer = rig.slot(), rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    slot.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 40 + OK)
    rig.clock.now += 60  # the hub stood still
    assert rig.response(consumer).status == 200


def with_unsent_body(rig: Rig, body: bytes) -> tuple[Peer, Peer]:
    """Return a slot that is sent all of a request and takes little of it, and the consumer."""
    slot, consumer = rig.slot(), rig.consumer()
    (worker,) = rig.hub.slots
    worker.stream.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    slot.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
    consumer.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    rig.until(lambda: rig.hub.exchanges)
    exchange = rig.exchange(b"/")
    rig.until(lambda: has_sent_body(exchange) or (slot.has_bytes() and take(slot) < 0))
    return slot, consumer


def test_slot_that_answered_early_is_free_when_the_old_body_has_been_sent(rig: Rig) -> None:
    body = bytes(300_000)
    slot, consumer = with_unsent_body(rig, body)
    (worker,) = rig.hub.slots
    assert worker.stream.outbuf is not None, "the end of the body must still be unsent"
    slot.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
    assert rig.response(consumer).status == 413
    rig.consumer(get(b"/next"))
    rig.turn()
    assert rig.hub.policy.waiting == 1, "the slot is not free yet"
    second = rig.slot()
    rig.until(lambda: second.has_bytes())
    assert second.read_request().target == b"/next"
    rig.until(lambda: take(slot) >= len(body) and worker.stream.outbuf is None)
    assert slot.read_request().body == body
    rig.consumer(get(b"/third"))
    rig.until(lambda: slot.has_bytes())
    assert slot.read_request().target == b"/third"


@pytest.mark.parametrize("ending", ["leaves", "takes nothing"])
def test_slot_that_never_takes_the_old_body_is_given_up(rig: Rig, ending: str) -> None:
    slot, consumer = with_unsent_body(rig, bytes(300_000))
    slot.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
    assert rig.response(consumer).status == 413
    if ending == "leaves":
        slot.close()
    else:
        rig.pass_time(pothead.LIMITS.unacknowledged_s + 1)
    rig.until(lambda: not rig.hub.slots)
    assert (rig.hub.policy.idle, rig.hub.policy.running) == (0, 0)


@pytest.mark.parametrize("event", ["is locked out", "is dropped", "withdraws"])
def test_slot_that_is_sent_an_old_body_is_not_taken_for_an_idle_one(
    new_rig: Callable[..., Rig], tmp_path: Path, event: str
) -> None:
    (tmp_path / "workers").write_text("somebody-else token:x")
    rig = new_rig(ptth_port=0, workers_file=str(tmp_path / "workers"))
    slot, consumer = with_unsent_body(rig, bytes(300_000))
    slot.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
    assert rig.response(consumer).status == 413
    (worker,) = rig.hub.slots
    if event == "is locked out":
        permit = pothead.Permit("alpha", "sha256:0")
        worker.registration = pothead.Registration(permit)
        rig.hub.reload()
    else:
        rig.hub.count_connection(worker.registration, -1)
        worker.registration = pothead.Registration(process="one", slots=1)
        rig.hub.count_connection(worker.registration, 1)
        if event == "withdraws":
            slot.send(b"HTTP/1.1 503 Full\r\nConnection: hold\r\nContent-Length: 0\r\n\r\n")
        else:
            rig.hub.drop_process("one")
    if event != "withdraws":
        rig.turn()
        assert rig.hub.slots == {worker}
        slot.close()
    rig.until(lambda: not rig.hub.slots)
    assert (rig.hub.policy.idle, rig.hub.policy.running, rig.hub.total_slots) == (0, 0, 0)


def test_response_to_the_end_that_a_reset_has_cut_is_not_whole(rig: Rig) -> None:
    """Not even if sending was told of the reset, and receiving sees a mere end after that."""
    host, _, port = rig.hub.addresses["workers"].rpartition(":")
    with Peer(socket.socket()) as slot:
        slot.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slot.sock.connect((host, int(port)))
        rig.until(lambda: rig.hub.slots)
        (worker,) = rig.hub.slots
        worker.stream.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        consumer = rig.consumer()
        sender = send_in_background(consumer, wire.post(b"/", bytes(600_000)))
        rig.until(lambda: worker.stream.outbuf)
        slot.send(b"HTTP/1.1 200 OK\r\n\r\na part of it")
        rig.until(lambda: [each.state for each in rig.hub.exchanges] == [State.RESPONDING])
        rig.turn()
        sender.join()
        assert worker.stream.outbuf
        slot.reset()
        rig.until(lambda: rig.lines)
    assert codes(rig) == ["WC"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the hub may be woken by it")
@pytest.mark.parametrize("event", ["is late", "answers", "leaves", "turns away"])
def test_hub_is_not_woken_by_a_claim(new_rig: Callable[..., Rig], event: str) -> None:
    """Not by itself, that is: whatever comes next, it has come before."""
    rig = new_rig(ptth_port=0)
    slot = rig.connect(rig.hub.addresses["ptth"])
    slot.send(
        b"GET /ptth HTTP/1.1\r\nHost: hub\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%2F1.1\r\n"
        b"Pothead-Claim: 102\r\nPothead-Worker: one; slots=1\r\n\r\n"
    )
    rig.until(lambda: rig.hub.slots)
    slot.read_head()
    consumer = rig.consumer(wire.post(b"/work", b"body"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    if event == "turns away":
        slot.send(b"HTTP/1.1 503 Full\r\nConnection: hold\r\nContent-Length: 0\r\n\r\n")
        rig.until(lambda: not rig.hub.policy.running)
        assert rig.exchange(b"/work").state is State.QUEUED
        return
    slot.send(b"HTTP/1.1 102 Processing\r\n\r\n")
    rig.turn()
    rig.turn()
    attempt = rig.exchange(b"/work").attempt
    assert attempt is not None and attempt.progress is pothead.Progress.OFFERED
    if event == "is late":
        rig.pass_time(pothead.LIMITS.unclaimed_s + 0.1)
        rig.until(lambda: attempt.progress is not pothead.Progress.OFFERED)
        rig.pass_time(pothead.LIMITS.unclaimed_s + 0.1)
    if event == "leaves":
        slot.close()
        assert rig.response(consumer).status == 502  # and not once more: it may have begun
    else:
        slot.send(OK)
        assert rig.response(consumer).status == 200


def test_hints_that_nobody_reads_hold_no_slot(rig: Rig) -> None:
    """What came before the response's head is absorbed, and so is the response."""
    slot, consumer = rig.slot(), rig.consumer(get(b"/"))
    rig.until(lambda: slot.has_bytes())
    slot.read_request()
    (stream,) = [each.stream for each in rig.consumers()]
    stream.transport._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: <%b>\r\n\r\n" % (b"x" * 30_000)
    count = 0
    while stream.outbuf is None:
        count += 1
        slot.send(hint)
        rig.turn()
    body = bytes(300_000)
    sender = send_in_background(slot, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    rig.until(lambda: rig.pass_time(0.01) or rig.hub.policy.idle == 1)
    sender.join()
    rig.until(lambda: take(consumer) > count * len(hint) + len(body))
    assert [consumer.read_response().status for _ in range(count)] == [103] * count
    assert consumer.read_response().body == body


# ---- From other threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["drain", "stop"])
def test_hub_in_a_thread_is_ended_from_another(way: str) -> None:
    hub = Hub(Options(main_port=0, worker_port=0, admin_port=None))
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(hub.run()))
    thread.start()
    host, _, port = hub.addresses["consumers"].rpartition(":")
    with Peer.connect((host, int(port))) as consumer:
        getattr(hub, way)()
        thread.join(wire.DEADLINE_S)
        assert statuses == [0]
        consumer.expect_eof()


def test_hub_stopped_in_the_midst_of_work_answers_it_and_says_so() -> None:
    lines: list[str] = []
    hub = Hub(Options(main_port=0, worker_port=0, admin_port=None), lines.append)
    statuses: list[int] = []
    host, _, port = hub.addresses["consumers"].rpartition(":")
    with Peer.connect((host, int(port))) as consumer:
        consumer.send(get(b"/"))
        while not hub.exchanges:
            hub.loop.turn()
        thread = threading.Thread(target=lambda: statuses.append(hub.run()))
        thread.start()
        hub.stop()
        response = consumer.read_response()
        assert (response.status, response.value(b"Connection")) == (503, b"close")
        thread.join(wire.DEADLINE_S)
    assert statuses == [1]
    assert " code=DR" in lines[0]
