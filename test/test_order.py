"""Who goes first, in a whole hub: what is believed of a request, and what people see of it."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from rig import Rig
from test_exchange import codes

import pothead
import wire
from pothead import Options, read_origin, read_urgency, read_wait
from wire import OK, Peer, get


def slot_of(rig: Rig, *origins: str) -> Peer:
    """Connect a slot that serves these origins, as a handshake would have told."""
    if not origins:
        return rig.slot()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = rig.connect(f"127.0.0.1:{listener.getsockname()[1]}")
        sock, address = listener.accept()
    sock.setblocking(False)
    stream = rig.hub.new_stream(pothead.address_text(address), pothead.Transport(sock))
    rig.hub.enlist(stream, pothead.Registration(None, frozenset(origins)))
    rig.turn()
    return peer


def ask(rig: Rig, path: bytes, *lines: bytes) -> Peer:
    count = rig.hub.policy.waiting
    consumer = rig.consumer(get(path, *lines))
    rig.until(lambda: rig.hub.policy.waiting == count + 1)
    return consumer


def served_by(rig: Rig, slot: Peer) -> str:
    """Return the path of the request that a slot gets, and answer it."""
    rig.until(lambda: bool(slot.received) or has_come(slot))
    path = slot.read_request().target.decode()
    exchange = rig.exchange(path.encode())
    slot.send(OK)
    rig.until(lambda: exchange.state is pothead.State.FINISHED)
    return path


def has_come(peer: Peer) -> bool:
    peer.sock.setblocking(False)
    try:
        return bool(peer.sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        peer.sock.settimeout(wire.DEADLINE_S)


def line(rig: Rig) -> list[str]:
    return [each.head.path.decode() for each in rig.hub.policy]


# ---- What a request says -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "urgency"),
    [
        ([b"u=0"], 0),
        ([b"u=7, i"], 7),
        ([b"i, u=5;x=1"], 5),
        ([b"i", b"u=2"], 2),
        ([b"u=2, u=6"], 6),
        ([b'x="a, u=1", u=4'], 4),
        ([b"a=(1 2;q);r, u=1"], 1),
        ([b"u=8"], 3),
        ([b"u=-1"], 3),
        ([b"u=1.0"], 3),
        ([b"u"], 3),
        ([b'u="1"'], 3),
        ([b"u=1,"], 3),
        ([b"U=1"], 3),
        ([b"u=1 i"], 3),
        ([b"u = 1"], 3),
        ([b"\xff"], 3),
        ([b""], 3),
        ([b"u=1, x=" + b"y" * 2000], 3),
    ],
)
def test_urgency_is_that_of_a_dictionary_that_makes_sense(values: list[bytes], urgency: int) -> None:
    assert read_urgency(values) == urgency


@pytest.mark.parametrize(
    ("values", "wait_s"),
    [
        ([b"wait=10"], 10.0),
        ([b"respond-async, Wait = 0"], 0.0),
        ([b"respond-async", b'handling=lenient; a="b, c"; d, wait="7"'], 7.0),
        ([b"wait=3, wait=9"], 3.0),
        ([b", ,wait=3;x,,"], 3.0),
        ([b"respond-async"], None),
        ([b"wait"], None),
        ([b"wait=1.5"], None),
        ([b"wait=-1"], None),
        ([b"wait=soon"], None),
        ([b"wait=3 4"], None),
        ([b"=3"], None),
        ([b"wait=" + b"9" * 10], None),
        ([b"wait=3, x=" + b"y" * 2000], None),
    ],
)
def test_patience_is_that_of_preferences_that_make_sense(values: list[bytes], wait_s: float | None) -> None:
    assert read_wait(values) == wait_s


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        (b"http://A.example", "http://a.example"),
        (b"HTTP://a:80", "http://a"),
        (b"https://a:443", "https://a"),
        (b"https://a:80", "https://a:80"),
        (b"http://a:08080", "http://a:8080"),
        (b"http://[::1]:81", "http://[::1]:81"),
        (b"http://a/", None),
        (b"http://u@a", None),
        (b"ftp://a", None),
        (b"http://", None),
    ],
)
def test_origin_is_written_in_one_way(text: bytes, origin: str | None) -> None:
    assert read_origin(text) == origin


@pytest.mark.parametrize(
    "options",
    [
        {"route": ("render=http://a",)},
        {"route": ("/render",)},
        {"route": ("/render=a",)},
        {"route": ("/r?x=http://a",)},
        {"route": ("/a=http://a", "/a=http://b")},
        {"priority_step": -1.0},
        {"priority_step": float("inf")},
        {"fair_by": "a b"},
        {"fair_by": ""},
        {"no_worker_timeout": 0.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(options)).replace('_', '-')} "):
        Options(**options)


# ---- Pools -------------------------------------------------------------------------------------------


def test_longest_route_that_fits_counts_and_whole_segments_do(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(route=("/t=http://gpu", "/t/audio=http://cpu", "/x/=http://x"))
    for path in (b"/t", b"/t/film?a=/b", b"/t/audio/1", b"/tea", b"/x", b"/x/y"):
        ask(rig, path)
    pools = {each.head.path: each.claim.origin for each in rig.hub.policy if each.claim}
    assert pools == {
        b"/t": "http://gpu", b"/t/film": "http://gpu", b"/t/audio/1": "http://cpu",
        b"/tea": "http://pothead.test", b"/x": "http://pothead.test", b"/x/y": "http://x",
    }  # fmt: skip


def test_pools_begin_with_the_first_slot_that_names_one(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    ask(rig, b"/first")
    ask(rig, b"/second", b"X-Forwarded-Host: B.example:80", b"X-Forwarded-Proto: http")
    assert "pools" not in rig.hub.stats()
    slot = slot_of(rig, "http://b.example")
    assert served_by(rig, slot) == "/second"
    assert line(rig) == ["/first"]
    assert "pool=http://b.example" in rig.lines[-1]
    pools = rig.hub.stats()["pools"]
    assert pools == [
        {"pool": "by address", "waiting": 0, "slots": 1, "idle": 1},
        {"pool": "http://b.example", "waiting": 0, "slots": 1, "idle": 1},
        {"pool": "other", "waiting": 1, "slots": 0, "idle": 0},
    ]
    assert served_by(rig, rig.slot()) == "/first"
    assert "pool=http://pothead.test" in rig.lines[-1]


def test_scheme_is_that_of_the_proxy_that_is_believed(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(route=("/r=http://r",))
    ask(rig, b"/", b"X-Forwarded-Host: a.example, b", b"X-Forwarded-Proto: https, http")
    (exchange,) = rig.hub.policy
    assert exchange.claim is not None and exchange.claim.origin == "https://a.example"


def test_retry_after_is_that_of_the_pool(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(route=("/r=http://r",), retry_after=1.0)
    rig.hub.counters.on_served(7.0)
    slot_of(rig, "http://r")
    busy = rig.consumer(get(b"/r"))
    rig.until(lambda: rig.hub.policy.running == 1)
    for _ in range(4):
        ask(rig, b"/elsewhere")
    ask(rig, b"/r")
    hurried = ask(rig, b"/r", b"Prefer: wait=2")
    rig.pass_time(2.1)
    assert rig.response(hurried).value(b"Retry-After") == b"7"  # one waits for one slot
    assert not has_come(busy)


def test_drain_takes_new_slots_for_what_the_idle_ones_do_not_serve(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(route=("/g=http://g",), reuse_port=True)
    slot_of(rig, "http://c")
    ask(rig, b"/g")
    rig.hub.drain()
    rig.turn()
    assert rig.hub.draining
    assert not rig.hub.ports.listeners["workers"]._left
    assert served_by(rig, rig.slot()) == "/g"


def test_origin_is_not_believed_from_everybody(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(route=("/r=http://r",), forwarded_allow_ips=())
    ask(rig, b"/", b"X-Forwarded-Host: b.example")
    (exchange,) = rig.hub.policy
    assert exchange.claim is not None and exchange.claim.origin == "http://pothead.test"


def test_request_that_nobody_serves_gets_503_after_its_own_time(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(no_worker_timeout=5.0, route=("/r=http://r",))
    rig.slot().close()
    rig.until(lambda: not rig.hub.slots)
    slot_of(rig, "http://pothead.test").send(b"")
    rig.until(lambda: rig.hub.policy.idle == 1)
    unserved = ask(rig, b"/r")
    rig.pass_time(4.9)
    assert codes(rig) == []
    rig.pass_time(0.2)
    response = rig.response(unserved)
    assert (response.status, response.value(b"Retry-After")) == (503, b"30")
    assert b"no worker serves http://r." in response.body
    assert codes(rig) == ["QT"]


# ---- Urgency -----------------------------------------------------------------------------------------


def test_urgent_request_goes_ahead_and_the_worker_is_told(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(queue_timeout=600.0)
    for path, lines in ((b"/a", ()), (b"/u7", (b"Priority: u=7",)), (b"/u0", (b"Priority: u=0, i",))):
        ask(rig, path, *lines)
    rig.clock.now += 89.0
    assert line(rig) == ["/u0", "/a", "/u7"]
    slot = rig.slot()
    rig.until(lambda: has_come(slot))
    request = slot.read_request()
    assert (request.target, request.value(b"Priority")) == (b"/u0", b"u=0, i")
    slot.send(OK)
    rig.until(lambda: bool(rig.lines))
    assert " urgency=0 code=OK" in rig.lines[0]
    assert [served_by(rig, slot) for _ in range(2)] == ["/a", "/u7"]
    assert "urgency" not in rig.lines[1]


@pytest.mark.parametrize("options", [{"forwarded_allow_ips": ()}, {"priority_step": 0.0}])
def test_urgency_of_a_stranger_or_without_steps_is_nothing(
    new_rig: Callable[..., Rig], options: dict[str, Any]
) -> None:
    rig = new_rig(**options)
    ask(rig, b"/a")
    ask(rig, b"/b", b"Priority: u=0")
    assert line(rig) == ["/a", "/b"]
    assert all("urgency" not in row for row in rig.hub.stats()["waiting"])


# ---- Fair shares -------------------------------------------------------------------------------------


def test_slots_go_to_the_tenant_with_the_least_worker_time(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(fair_by="x-key")
    for path, key in ((b"/a1", b"anna"), (b"/a2", b"anna"), (b"/b1", b"bert the second")):
        ask(rig, path, b"X-Key: forged", b"x-key: " + key)
    slot = rig.slot()
    assert [served_by(rig, slot) for _ in range(3)] == ["/a1", "/b1", "/a2"]
    rig.hub.counters.on_served(8.0)
    rig.turn()
    assert rig.hub.policy.typical_s == rig.hub.counters.mean_service_s == 2.0  # of 0, 0, 0 and 8
    assert " tenant=anna code=OK" in rig.lines[0]
    assert ' tenant="bert the second" code=OK' in rig.lines[1]
    assert {row["tenant"] for row in rig.hub.stats()["tenants"]} == {"anna", "bert the second"}


@pytest.mark.parametrize(
    ("options", "lines", "tenant"),
    [
        ({"fair_by": "x-key"}, (b"X-Key: k",), "k"),
        ({"fair_by": "x-key"}, (), "127.0.0.1"),
        ({"fair_by": "x-key"}, (b"X-Forwarded-For: 1.2.3.4, 5.6.7.8",), "5.6.7.8"),
        ({"fair_by": "x-key", "forwarded_allow_ips": ()}, (b"X-Key: k",), "127.0.0.1"),
        ({"fair_by": "address"}, (b"X-Key: k", b"X-Forwarded-For: 5.6.7.8"), "5.6.7.8"),
        ({"fair_by": "address", "forwarded_allow_ips": ()}, (b"X-Forwarded-For: 5.6.7.8",), "127.0.0.1"),
    ],
)
def test_tenant_is_told_by_those_who_are_believed(
    new_rig: Callable[..., Rig], options: dict[str, Any], lines: tuple[bytes, ...], tenant: str
) -> None:
    rig = new_rig(**options)
    ask(rig, b"/", *lines)
    assert list(rig.hub.policy.tenants) == [tenant]


def test_long_names_stay_apart_and_are_short(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(fair_by="x-key")
    for number in range(3):
        ask(rig, b"/%d" % number, b"X-Key: %b%d" % (b"x" * 8000, number))
    assert len(rig.hub.policy.tenants) == 3
    assert all(len(name) <= 64 for name in rig.hub.policy.tenants)


def test_full_queue_makes_room_for_a_tenant_with_fewer(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(fair_by="x-key", max_queue=2)
    ask(rig, b"/a1", b"X-Key: anna")
    newest = ask(rig, b"/a2", b"X-Key: anna")
    rig.consumer().send(get(b"/b1", b"X-Key: bert"))
    rig.until(lambda: "/b1" in line(rig))
    response = rig.response(newest)
    assert (response.status, response.value(b"Retry-After")) == (503, b"30")
    assert line(rig) == ["/a1", "/b1"]
    refused = rig.consumer()
    refused.send(get(b"/b2", b"X-Key: bert"))
    assert rig.response(refused).status == 503
    with_body = rig.consumer(get(b"/c1", b"X-Key: cleo", b"Content-Length: 1", method=b"PUT"))
    with_body.send(b"x")
    rig.until(lambda: "/c1" in line(rig))
    assert len(line(rig)) == 2
    assert codes(rig) == ["QF", "QF", "QF"]


def test_request_whose_worker_died_is_next_again_and_charged_once(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(fair_by="x-key")
    for path, key in ((b"/a1", b"anna"), (b"/b1", b"bert"), (b"/a2", b"anna")):
        ask(rig, path, b"X-Key: " + key)
    slot = rig.slot()
    rig.until(lambda: has_come(slot))
    rig.pass_time(50.0)
    slot.close()
    rig.until(lambda: rig.hub.policy.waiting == 3)
    assert line(rig) == ["/a1", "/b1", "/a2"]
    rig.pass_time(1.0)
    again = rig.slot()
    rig.until(lambda: has_come(again))
    rig.pass_time(2.0)
    assert served_by(rig, again) == "/a1"
    assert rig.hub.policy.tenants["anna"].worked_s == 2.0


# ---- A consumer's patience ---------------------------------------------------------------------------


def test_consumer_that_would_wait_for_two_seconds_gets_503_then(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    hurried = ask(rig, b"/a", b"Prefer: wait=2")
    ask(rig, b"/b")
    rig.pass_time(1.9)
    assert codes(rig) == []
    rig.pass_time(0.2)
    response = rig.response(hurried)
    assert (response.status, response.value(b"Preference-Applied")) == (503, b"wait")
    assert response.value(b"Retry-After") is not None
    assert line(rig) == ["/b"]


def test_consumer_that_says_nothing_of_its_patience_is_told_nothing(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(fair_by="address", queue_timeout=5.0)
    consumer = ask(rig, b"/", b"Prefer: respond-async")
    rig.pass_time(5.1)
    response = rig.response(consumer)
    assert (response.status, response.value(b"Preference-Applied")) == (503, None)


def test_nobody_waits_longer_than_the_queue_timeout(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(queue_timeout=5.0)
    ask(rig, b"/a", b"Prefer: wait=1000")
    rig.pass_time(5.1)
    assert codes(rig) == ["QT"]


def test_wait_that_the_queue_exceeds_is_refused_at_once_when_that_is_known(
    new_rig: Callable[..., Rig],
) -> None:
    rig = new_rig()
    slot = rig.slot()
    for number in range(pothead.LIMITS.served_to_estimate):
        if number == pothead.LIMITS.served_to_estimate - 1:  # too early to tell
            rig.consumer(get(b"/early"))
            rig.until(functools.partial(has_come, slot))
            ask(rig, b"/hopeless", b"Prefer: wait=1")
            rig.pass_time(1.0)
            assert codes(rig)[-1] == "QT"
            slot.read_request()
            rig.exchange(b"/early").finish(pothead.Outcome.CANCELLED)
            slot = rig.slot()
        consumer = rig.consumer(get(b"/%d" % number, b"Prefer: wait=0"))
        rig.until(functools.partial(has_come, slot))
        rig.pass_time(10.0)
        served_by(rig, slot)
        assert rig.response(consumer).value(b"Preference-Applied") == b"wait"
    rig.consumer(get(b"/runs"))
    rig.until(lambda: has_come(slot))
    ask(rig, b"/waits")
    refused = rig.consumer()
    refused.send(get(b"/hurried", b"Prefer: wait=19"))
    response = rig.response(refused)
    assert (response.status, response.value(b"Preference-Applied")) == (503, b"wait")
    assert b"the queue is longer than the consumer would wait: about 20 s, and not 19." in response.body
    assert codes(rig)[-1] == "QW"
    ask(rig, b"/patient", b"Prefer: wait=20")
    ask(rig, b"/urgent", b"Prefer: wait=10", b"Priority: u=0")
    assert line(rig) == ["/urgent", "/waits", "/patient"]


# ---- What people see ---------------------------------------------------------------------------------


def test_whoever_uses_none_of_it_sees_nothing_of_it(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(log_format="json")
    consumer = rig.consumer(get(b"/"))
    assert rig.exchange(b"/").claim is None
    assert served_by(rig, rig.slot()) == "/"
    response = rig.response(consumer)
    assert response.value(b"Preference-Applied") is None
    assert not {"pool", "urgency", "tenant"} & set(json.loads(rig.lines[0]))
    assert not {"pools", "tenants"} & set(rig.hub.stats())


def test_line_is_shown_as_it_will_be_served(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(route=("/g=http://g",), fair_by="x-key")
    rig.hub.counters.on_served(4.0)
    for path, key, urgency in (
        (b"/1", b"anna", b"3"), (b"/2", b"anna", b"3"), (b"/3", b"anna", b"2"), (b"/g", b"bert", b"3"),
    ):  # fmt: skip
        ask(rig, path, b"X-Key: " + key, b"Priority: u=" + urgency)
    slot_of(rig, "http://nobody.example", "http://pothead.test:81")
    rows = rig.hub.stats()["waiting"]
    assert [(row["path"], row["pool"], row["tenant"]) for row in rows] == [
        ("/3", "http://pothead.test", "anna"),
        ("/g", "http://g", "bert"),
        ("/1", "http://pothead.test", "anna"),
        ("/2", "http://pothead.test", "anna"),
    ]
    assert [row["position"] for row in rows] == [1, 2, 3, 4]
    assert [row["starts_in_seconds"] for row in rows] == [None] * 4  # nobody serves these pools
    assert rows[0]["urgency"] == 2


def test_metrics_by_pool_have_the_labels_of_operators_and_workers(new_rig: Callable[..., Rig]) -> None:
    pytest.importorskip("prometheus_client")
    rig = new_rig(route=("/r=http://r",))
    for number in range(3):
        ask(rig, b"/%d" % number, b"X-Forwarded-Host: made-up-%d" % number)
    slot_of(rig, "http://w")
    body = pothead._metrics(rig.hub).body.decode()
    found = {each for each in body.splitlines() if each.startswith("pothead_hub_pool_")}
    assert found == {
        'pothead_hub_pool_queue_length{pool="by address"} 0.0',
        'pothead_hub_pool_slots{pool="by address",state="idle"} 1.0',
        'pothead_hub_pool_slots{pool="by address",state="busy"} 0.0',
        'pothead_hub_pool_queue_length{pool="http://r"} 0.0',
        'pothead_hub_pool_queue_length{pool="http://w"} 0.0',
        'pothead_hub_pool_queue_length{pool="other"} 3.0',
        'pothead_hub_pool_slots{pool="http://r",state="idle"} 0.0',
        'pothead_hub_pool_slots{pool="http://r",state="busy"} 0.0',
        'pothead_hub_pool_slots{pool="http://w",state="idle"} 1.0',
        'pothead_hub_pool_slots{pool="http://w",state="busy"} 0.0',
        'pothead_hub_pool_slots{pool="other",state="idle"} 0.0',
        'pothead_hub_pool_slots{pool="other",state="busy"} 0.0',
    }


@pytest.mark.parametrize("host", [b"127.0.0.1:8080", b"localhost", b"[::1]:80"])
def test_request_by_address_takes_whoever_is_free(new_rig: Callable[..., Rig], host: bytes) -> None:
    """Nobody can be meant by it but the hub; unless a worker has named just that."""
    rig = new_rig()
    one = slot_of(rig, "http://a.example")
    ask(rig, b"/by-name")
    consumer = rig.consumer(b"GET /by-address HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
    assert served_by(rig, one) == "/by-address"
    assert consumer.read_response().status == 200
    own = slot_of(rig, pothead.read_origin(b"http://" + host) or "")
    rig.consumer(b"GET /named HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
    assert served_by(rig, own) == "/named"
    assert line(rig) == ["/by-name"]


def test_preference_of_somebody_who_is_not_believed_is_ignored(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(forwarded_allow_ips=())
    ask(rig, b"/", b"Prefer: wait=1", b"Priority: u=0")
    assert rig.exchange(b"/").wait_s is None
    rig.pass_time(2)
    assert line(rig) == ["/"]
