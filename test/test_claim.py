"""Workers that offer a slot to several hubs at once, and so claim a request before it is theirs. In bytes."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import Rig

import pothead
import wire
from pothead import State
from wire import OK, HubProcess, Peer, get, hub_process, post

CLAIM = b"HTTP/1.1 102 Processing\r\n\r\n"
AWAY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: hold\r\nContent-Length: 0\r\n\r\n"
HELD_OK = b"HTTP/1.1 200 OK\r\nConnection: hold\r\nContent-Length: 2\r\n\r\nok"


def offer(process: bytes = b"one", slots: int = 1) -> bytes:
    return (
        b"GET /ptth HTTP/1.1\r\nHost: hub\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%%2F1.1\r\n"
        b"Pothead-Claim: 102\r\nPothead-Worker: %b; slots=%d\r\n\r\n" % (process, slots)
    )


@pytest.fixture
def hub() -> Iterator[HubProcess]:
    with hub_process("--ptth-port", "0") as process:
        yield process


def shake(peer: Peer, process: bytes = b"one", slots: int = 1) -> bytes:
    """Send the handshake; return the fields of the 101."""
    peer.send(offer(process, slots))
    head = peer.read_head()
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"\r\nPothead-Claim: 102\r\n" in head
    return head


def bell(hub: HubProcess, process: bytes = b"one", slots: int = 1) -> Peer:
    peer = Peer.connect(hub.ptth)
    shake(peer, process, slots)
    return peer


def ask(hub: HubProcess, data: bytes) -> Peer:
    peer = Peer.connect(hub.main)
    peer.send(data)
    return peer


def test_hub_agrees_and_says_who_it_is(hub: HubProcess) -> None:
    with Peer.connect(hub.ptth) as first, Peer.connect(hub.ptth) as second:
        ids = [re.findall(rb"\r\nPothead-Hub: ([0-9a-f]{16})\r\n", shake(each)) for each in (first, second)]
        assert ids[0] == ids[1] and len(ids[0]) == 1
        assert hub.stats()["hub"] == ids[0][0].decode()


def test_claimed_request_is_answered(hub: HubProcess) -> None:
    with bell(hub) as slot, ask(hub, post(b"/work", b"body")) as consumer:
        assert slot.read_request().body == b"body"
        slot.send(CLAIM)
        slot.send(OK)
        assert consumer.read_response().status == 200
        with ask(hub, get(b"/next")) as other:
            assert slot.read_request().target == b"/next"
            slot.send(CLAIM + OK)
            assert other.read_response().status == 200


@pytest.mark.parametrize("how", ["away", "close"])
def test_post_that_is_turned_away_goes_to_the_next_and_counts_once(hub: HubProcess, how: str) -> None:
    with bell(hub) as full:
        with ask(hub, post(b"/once", b"body")) as consumer:
            full.read_request()
            if how == "away":
                full.send(AWAY)
            else:
                full.close()
            with bell(hub, b"two") as free:
                request = free.read_request()
                assert (request.target, request.body) == (b"/once", b"body")
                assert request.value(b"Pothead-Attempt") == b"1"
                free.send(CLAIM + OK)
                assert consumer.read_response().status == 200
    line = hub.wait_for_line(lambda line: "path=/once " in line)
    assert " attempts=1 " in line
    stats = hub.stats()
    assert (stats["turned_away"], stats["requeues"]) == (1, 0)


def test_held_connection_is_sent_nothing_before_its_next_handshake(hub: HubProcess) -> None:
    with bell(hub) as slot, ask(hub, get(b"/waits")) as consumer:
        slot.read_request()
        slot.send(AWAY)
        hub.until(lambda stats: stats["queue_length"] == 1)
        assert not slot.has_bytes()
        head = shake(slot)
        assert re.search(rb"\r\nPothead-Waiting: 1; oldest=[0-9]+\.[0-9]{3}\r\n", head)
        assert slot.read_request().target == b"/waits"
        slot.send(CLAIM + HELD_OK)
        assert consumer.read_response().body == b"ok"
        with ask(hub, get(b"/later")) as late:
            hub.until(lambda stats: stats["queue_length"] == 1)
            assert not slot.has_bytes()
            shake(slot)
            assert slot.read_request().target == b"/later"
            slot.send(CLAIM + OK)
            assert late.read_response().status == 200


def test_next_handshake_on_a_held_connection_may_say_something_else(hub: HubProcess) -> None:
    with bell(hub, slots=2) as slot:
        for slots in (2, 3, 3):
            slot.send(AWAY)
            shake(slot, slots=slots)
            assert hub.stats()["slots"] == {"idle": slots, "busy": 0}
        slot.send(AWAY + offer(slots=3).replace(b"Upgrade: ptth", b"Upgrade: smtp"))
        assert slot.read_response().status == 426


def test_handshake_may_come_right_behind_what_holds_the_connection(hub: HubProcess) -> None:
    with bell(hub) as slot, ask(hub, get(b"/turned")) as consumer:
        slot.read_request()
        slot.send(AWAY + offer())
        assert b"\r\nPothead-Waiting: 1; oldest=" in slot.read_head()
        assert slot.read_request().target == b"/turned"
        slot.send(CLAIM + OK)
        assert consumer.read_response().status == 200


def test_offer_is_withdrawn_unasked(hub: HubProcess) -> None:
    with bell(hub) as slot:
        hub.until(lambda stats: len(stats["workers"]) == 1)
        slot.send(AWAY)
        hub.until(lambda stats: not stats["workers"])
        assert hub.stats()["breaches"] == 0
        with ask(hub, get(b"/waits")):
            hub.until(lambda stats: stats["queue_length"] == 1)
            assert not slot.has_bytes()


def test_rest_of_a_large_body_is_for_who_claims_it(hub: HubProcess) -> None:
    body = bytes(range(256)) * 1024
    with bell(hub) as slot, ask(hub, post(b"/large", body)) as consumer:
        slot.read_head()
        wire.until_asleep(hub.pid)
        slot.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while slot._receive():
                pass
        slot.sock.settimeout(wire.DEADLINE_S)
        first = slot.read_exactly(len(slot.received))
        assert body.startswith(first) and 0 < len(first) <= 64 * 1024
        slot.send(CLAIM)
        assert first + slot.read_exactly(len(body) - len(first)) == body
        slot.send(OK)
        assert consumer.read_response().status == 200


@pytest.mark.parametrize("answer", [OK, b"HTTP/1.1 103 Early Hints\r\n\r\n", b"garbage\r\n\r\n"])
def test_response_without_a_claim_is_garbage(hub: HubProcess, answer: bytes) -> None:
    with bell(hub) as slot, ask(hub, get(b"/work")) as consumer:
        slot.read_request()
        slot.send(answer)
        assert consumer.read_response().status == 502
        slot.expect_eof()


@pytest.mark.parametrize("unasked", [CLAIM, OK, AWAY.replace(b"hold", b"close")])
def test_claim_of_nothing_is_a_breach(hub: HubProcess, unasked: bytes) -> None:
    with bell(hub) as slot:
        hub.until(lambda stats: len(stats["workers"]) == 1)
        slot.send(unasked)
        slot.expect_eof()
        assert hub.stats()["breaches"] == 1


def test_worker_that_dies_after_its_claim_is_a_lost_worker(hub: HubProcess) -> None:
    with bell(hub) as slot, ask(hub, post(b"/work", b"body")) as consumer:
        slot.read_request()
        slot.send(CLAIM)
        hub.until(lambda stats: stats["requests_in_flight"] == 1)
        slot.close()
        assert consumer.read_response().status == 502


def test_get_whose_worker_dies_after_its_claim_goes_to_another(hub: HubProcess) -> None:
    with bell(hub) as slot, ask(hub, get(b"/again")) as consumer:
        slot.read_request()
        slot.send(CLAIM)
        hub.until(lambda stats: stats["requests_in_flight"] == 1)
        slot.close()
        with bell(hub, b"two") as free:
            assert free.read_request().value(b"Pothead-Attempt") == b"2"
            free.send(CLAIM + OK)
            assert consumer.read_response().status == 200


def test_worker_that_dies_within_its_claim_may_have_begun(hub: HubProcess) -> None:
    with bell(hub) as slot, ask(hub, post(b"/work", b"body")) as consumer:
        slot.read_request()
        slot.send(CLAIM[:-5])
        slot.close()
        assert consumer.read_response().status == 502


def test_unclaimed_get_is_taken_back_and_unclaimed_post_waits() -> None:
    with hub_process("--ptth-port", "0", limits={"unclaimed_s": 0.2}) as hub:
        with bell(hub) as hung, ask(hub, get(b"/get")) as consumer:
            hung.read_request()
            hung.expect_eof()
            with bell(hub, b"two") as free:
                assert free.read_request().target == b"/get"
                free.send(CLAIM + OK)
                assert consumer.read_response().status == 200
        with bell(hub) as hung, ask(hub, post(b"/post", b"x")) as consumer:
            hung.read_request()
            with bell(hub, b"two") as free, ask(hub, get(b"/behind")) as other:
                assert free.read_request().target == b"/behind"
                free.send(CLAIM + OK)
                assert other.read_response().status == 200
            hung.send(CLAIM + OK)
            assert consumer.read_response().status == 200


def test_claimed_request_has_all_the_time_that_it_needs() -> None:
    with hub_process("--ptth-port", "0", limits={"unclaimed_s": 0.1}) as hub:
        with bell(hub) as slot, ask(hub, post(b"/long", b"x")) as consumer:
            slot.read_request()
            slot.send(CLAIM)
            time.sleep(0.4)  # there is nothing to wait for: that is what is tested
            slot.send(OK)
            assert consumer.read_response().status == 200


def test_claimed_request_has_to_be_answered_within_the_response_timeout() -> None:
    with hub_process("--ptth-port", "0", "--response-timeout", "300ms") as hub:
        with bell(hub) as slot, ask(hub, post(b"/long", b"x")) as consumer:
            slot.read_request()
            slot.send(CLAIM)
            assert consumer.read_response().status == 504


def test_slots_count_as_announced_however_many_connections_there_are(hub: HubProcess) -> None:
    with bell(hub, b"one", 4) as first, bell(hub, b"one", 4) as second, bell(hub, b"two", 3):
        stats = hub.until(lambda stats: len(stats["workers"]) == 3)
        assert stats["slots"] == {"idle": 7, "busy": 0}
        assert stats["processes"] == {
            "one": {"slots": 4, "busy_here": 0, "connections": 2},
            "two": {"slots": 3, "busy_here": 0, "connections": 1},
        }
        first.send(AWAY)
        stats = hub.until(lambda stats: len(stats["workers"]) == 2)
        assert stats["slots"] == {"idle": 7, "busy": 0}
        first.close()
        second.close()
        stats = hub.until(lambda stats: len(stats["workers"]) == 1)
        assert stats["slots"] == {"idle": 3, "busy": 0}
        assert list(hub.until(lambda stats: len(stats["processes"]) == 1)["processes"]) == ["two"]


@pytest.mark.parametrize(
    "field",
    [b"", b"Pothead-Worker: x\r\n", b"Pothead-Worker: x; slots=0\r\n", b"Pothead-Worker: x y; slots=1\r\n"],
)
def test_claim_without_a_worker_is_refused(hub: HubProcess, field: bytes) -> None:
    with Peer.connect(hub.ptth) as peer:
        peer.send(offer().replace(b"Pothead-Worker: one; slots=1\r\n", field))
        assert peer.read_response().status == 400


def test_request_that_crosses_a_withdrawal_is_turned_away_by_it(hub: HubProcess) -> None:
    with bell(hub) as slot:
        hub.until(lambda stats: len(stats["workers"]) == 1)
        hub.suspend()
        consumer = ask(hub, post(b"/crosses", b"x"))
        slot.send(AWAY)
        hub.send_signal(signal.SIGCONT)
        hub.until(lambda stats: stats["queue_length"] == 1 and not stats["workers"])
        slot.send(offer())
        assert slot.read_until(b"\r\n\r\n").split(b"HTTP/1.1 101 ")[-1]
        with consumer:
            while slot.read_request().target != b"/crosses":
                pass
            slot.send(CLAIM + OK)
            assert consumer.read_response().status == 200


def test_worker_is_told_to_come_again_soon_when_the_hub_ends(hub: HubProcess) -> None:
    """The next hub at this address may be there in a moment."""
    with bell(hub) as slot, ask(hub, post(b"/work", b"x")) as consumer, Peer.connect(hub.ptth) as late:
        slot.read_request()
        slot.send(CLAIM)
        hub.until(lambda stats: stats["requests_in_flight"] == 1)
        hub.terminate()
        hub.until(lambda stats: stats["draining"])
        late.send(offer())
        response = late.read_response()
        assert (response.status, response.value(b"retry-after")) == (503, b"1")
        slot.send(OK)
        assert consumer.read_response().status == 200


# ---- In one process, where the hub turns when it is told to -------------------------------------------


def claimant(rig: Rig, hello: bytes = b"", slots: int = 1) -> Peer:
    """Connect a slot of a worker that claims what it takes."""
    count = len(rig.hub.slots)
    peer = rig.connect(rig.hub.addresses["ptth"])
    peer.send(hello or offer(slots=slots))
    rig.until(lambda: len(rig.hub.slots) == count + 1)
    peer.read_head()
    return peer


def test_body_in_pieces_is_offered_whole(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0)
    slot, request = claimant(rig), post(b"/pieces", bytes(40_000))
    consumer = rig.consumer(request[:-20_000])
    rig.turn()
    consumer.send(request[-20_000:])
    rig.until(lambda: rig.exchange(b"/pieces").attempt)
    assert slot.read_request().body == bytes(40_000)


def test_what_waits_is_told_by_the_hub_and_not_by_consumers(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0)
    slot = claimant(rig)
    rig.consumer(get(b"/forged", b"Pothead-Waiting: 999; oldest=86400.000"))
    rig.until(lambda: slot.has_bytes())
    assert slot.read_request().values(b"Pothead-Waiting") == []


def test_connection_that_leaves_does_not_tell_how_many_slots_there_are(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0)
    before, _now = claimant(rig, slots=4), claimant(rig, slots=2)
    before.close()
    rig.until(lambda: len(rig.hub.slots) == 1)
    assert rig.hub.total_slots == 2


def test_worker_that_is_busy_elsewhere_is_there(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0, no_worker_timeout=2.0)
    slot, consumer = claimant(rig), rig.consumer(post(b"/patient", b"x"))
    rig.until(lambda: rig.exchange(b"/patient").attempt)
    slot.send(AWAY)
    rig.until(lambda: rig.exchange(b"/patient").state is State.QUEUED)
    rig.pass_time(30)
    assert rig.exchange(b"/patient").state is State.QUEUED
    assert [(each["slots"], each["busy"]) for each in rig.hub.stats()["machines"]] == [(1, 0)]  # type: ignore[attr-defined]
    slot.close()
    rig.until(lambda: not rig.hub.slots)
    rig.pass_time(2.1)
    assert b"no worker is connected" in rig.response(consumer).body


def test_held_connection_is_taken_up_again_with_the_number_of_slots_that_it_tells(
    new_rig: Callable[..., Rig],
) -> None:
    rig = new_rig(ptth_port=0)
    first = claimant(rig, slots=4)
    (slot,) = rig.hub.slots
    first.send(AWAY)
    rig.until(lambda: not rig.hub.policy.idle)
    claimant(rig, slots=2)
    assert rig.hub.total_slots == 2
    first.send(offer(slots=4))
    rig.until(lambda: rig.hub.policy.idle == 2)
    assert rig.hub.total_slots == 4
    assert slot in rig.hub.slots and not slot.is_held


def serve_enough_to_estimate(rig: Rig, slot: Peer, host: bytes = b"a") -> None:
    """Have so many requests served that the hub knows how long one takes: 1.9 s."""
    for _ in range(pothead.LIMITS.served_to_estimate):
        consumer = rig.consumer(get(b"/", host=host))
        rig.until(lambda: slot.has_bytes())
        slot.read_request()
        slot.send(CLAIM)
        rig.pass_time(1.9)
        slot.send(OK)
        assert rig.response(consumer).status == 200


def test_wait_is_estimated_by_the_slots_that_are_announced(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0, forwarded_allow_ips=("*",))
    slot = claimant(rig, slots=4)
    serve_enough_to_estimate(rig, slot)
    rig.consumer(get(b"/runs"))
    rig.until(lambda: rig.exchange(b"/runs").attempt)
    rig.consumer(get(b"/waits", b"Prefer: wait=1"))
    assert rig.exchange(b"/waits").state is State.QUEUED
    impatient = rig.consumer()
    impatient.send(get(b"/impatient", b"Prefer: wait=0"))
    assert rig.response(impatient).status == 503


def test_wait_is_not_estimated_by_slots_that_serve_another_pool(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0, forwarded_allow_ips=("*",), route=("/unserved=http://unserved",))
    path = b"/.well-known/ptth/http%3A%2F%2Fserved/"
    serve_enough_to_estimate(rig, claimant(rig, offer().replace(b"/ptth", path, 1)), b"served")
    rig.consumer(get(b"/unserved", b"Prefer: wait=1"))
    assert rig.exchange(b"/unserved").state is State.QUEUED


def test_request_that_crosses_a_part_of_a_withdrawal(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(ptth_port=0)
    slot = claimant(rig)
    slot.send(AWAY[:60])
    rig.turn()
    rig.turn()
    rig.consumer(post(b"/crossing", b"x"))
    rig.until(lambda: rig.exchange(b"/crossing").attempt)
    slot.send(AWAY[60:])
    rig.until(lambda: rig.exchange(b"/crossing").state is State.QUEUED)  # no time passes


TOKEN_FIELD = b"\r\nAuthorization: Bearer s3cr3t\r\n\r\n"


def test_held_connection_leaves_once(new_rig: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("alpha token:s3cr3t\n")
    rig = new_rig(ptth_port=0, workers_file=str(tmp_path / "workers"))
    slot = claimant(rig, offer().replace(b"\r\n\r\n", TOKEN_FIELD))
    slot.send(AWAY)
    rig.until(lambda: not rig.hub.policy.idle)
    (tmp_path / "workers").write_text("beta token:another\n")
    rig.hub.reload()
    rig.hub.reload()
    rig.turn()
    assert (rig.hub.processes, rig.hub.total_slots) == ({}, 0)


def test_permit_that_has_become_wider_counts_at_the_next_handshake(
    new_rig: Callable[..., Rig], tmp_path: Path
) -> None:
    hello = offer().replace(b"\r\n\r\n", TOKEN_FIELD)
    (tmp_path / "workers").write_text("alpha token:s3cr3t http://a.example\n")
    rig = new_rig(ptth_port=0, workers_file=str(tmp_path / "workers"))
    slot = claimant(rig, hello)
    slot.send(AWAY)
    rig.until(lambda: not rig.hub.policy.idle)
    (tmp_path / "workers").write_text("alpha token:s3cr3t http://a.example http://b.example\n")
    rig.hub.reload()
    rig.turn()
    slot.send(hello)
    rig.until(lambda: rig.hub.policy.idle)
    assert [each.registration.origins for each in rig.hub.slots] == [{"http://a.example", "http://b.example"}]


def test_machine_is_heard_on_a_connection_that_it_holds(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network can be cut here, so what TCP would tell is told by the test."""
    rig = new_rig(ptth_port=0)
    claimant(rig)
    (silent,) = rig.hub.slots
    heard = claimant(rig)
    heard.send(AWAY)
    rig.until(lambda: rig.hub.policy.idle == 1)
    monkeypatch.setattr(pothead.Transport, "has_delivered", lambda _self, _size: False)
    monkeypatch.setattr(
        pothead.Transport, "silent_s", lambda self: 99.0 if self is silent.stream.transport else 2.0
    )
    rig.consumer(post(b"/doubtful", b"x"))
    rig.until(lambda: silent.exchange)
    rig.pass_time(pothead.LIMITS.unclaimed_s)
    assert rig.exchange(b"/doubtful").state is State.SENT
