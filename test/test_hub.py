"""The hub as a process, with scripted consumers and slots: what goes in and out, in bytes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pothead
import wire
from wire import OK, HubProcess, Peer, chunked, dial, get, hub_process, post, serve

DATE = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
MIB = 1 << 20

several_loopback_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux answers at all of 127.0.0.0/8"
)


# ---- Helpers -----------------------------------------------------------------------------------------


def noise(size: int) -> bytes:
    """Return bytes that compress, repeat and collide with nothing; the same in every run."""
    return random.Random(size).randbytes(size)


def until_queued(hub: HubProcess, count: int) -> None:
    hub.until(lambda stats: stats["queue_length"] == count)


def until_running(hub: HubProcess, count: int) -> None:
    hub.until(lambda stats: stats["requests_in_flight"] == count)


def text(address: wire.Address) -> str:
    return f"{address[0]}:{address[1]}"


@contextlib.contextmanager
def ask(hub: HubProcess, request: bytes, host: str = "127.0.0.1") -> Iterator[Peer]:
    """Connect a consumer from the loopback address `host`, with its first request."""
    with Peer.connect(hub.main, host=host) as consumer:
        consumer.send(request)
        yield consumer


@contextlib.contextmanager
def paused(hub: HubProcess) -> Iterator[None]:
    """Stop the hub's process, so that all that happens meanwhile comes to it at once."""
    hub.suspend()
    try:
        yield
    finally:
        hub.process.send_signal(signal.SIGCONT)


LOG_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) id=(?P<id>\S+) consumer=(?P<consumer>\S+)"
    r" method=(?P<method>\S+) path=(?P<path>\S+) status=(?P<status>\d+) bytes_in=(?P<bytes_in>\d+)"
    r" bytes_out=(?P<bytes_out>\d+) queued_ms=(?P<queued_ms>\d+\.\d) worker_ms=(?P<worker_ms>\d+\.\d)"
    r" total_ms=(?P<total_ms>\d+\.\d) worker=(?P<worker>\S+) attempts=(?P<attempts>\d+)"
    r" code=(?P<code>[A-Z]{2})(?: detail=(?P<detail>\".*\"))?"
)


def logged(hub: HubProcess, **wanted: object) -> dict[str, str]:
    """Return the line of the access log with the wanted values, once it is there."""

    def is_wanted(line: str) -> bool:
        match = LOG_LINE.fullmatch(line)
        return match is not None and all(match[name] == str(value) for name, value in wanted.items())

    match = LOG_LINE.fullmatch(hub.wait_for_line(is_wanted))
    assert match
    return match.groupdict()


def count_logged(hub: HubProcess, path: str) -> int:
    return sum(f" path={path} " in line for line in hub.lines)


def read_refusal(consumer: Peer, status: int, method: bytes = b"GET") -> wire.Response:
    """Read a refusal of the hub's own and what it owes: an id, a text, and the end of the connection."""
    response = consumer.read_response(method)
    assert response.status == status, response
    assert response.value(b"Connection") == b"close"
    assert response.value(b"X-Request-Id")
    assert response.value(b"Content-Type") == b"text/plain; charset=utf-8"
    assert b"%d" % status in response.body
    consumer.expect_eof()
    return response


@pytest.fixture
def hub(resting_hub: HubProcess) -> HubProcess:
    """Shared by the tests here, which leave nothing behind."""
    return resting_hub


@pytest.fixture
def slot(hub: HubProcess) -> Iterator[Peer]:
    with dial(hub) as peer:
        yield peer


# ---- Who is served when, and where -------------------------------------------------------------------


def test_requests_are_served_in_the_order_they_came(hub: HubProcess) -> None:
    with contextlib.ExitStack() as stack:
        consumers = []
        for number in range(5):
            consumers.append(stack.enter_context(ask(hub, get(b"/order/%d" % number))))
            until_queued(hub, number + 1)
        slot = stack.enter_context(dial(hub))
        for number, consumer in enumerate(consumers):
            answer = b"%d" % number
            request = serve(slot, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + answer)
            assert request.target == b"/order/%d" % number
            assert consumer.read_response().body == answer


@wire.in_clear_only
def test_requests_that_come_at_once_are_served_in_the_order_they_came(hub: HubProcess) -> None:
    """On connections that the hub has not seen before, too."""
    paths = [b"/at-once/%d" % number for number in range(50)]
    with contextlib.ExitStack() as stack:
        with paused(hub):
            for path in paths:
                stack.enter_context(ask(hub, get(path)))
        until_queued(hub, len(paths))
        assert [each["path"].encode() for each in hub.stats()["waiting"]] == paths


def test_a_busy_slot_is_sent_nothing(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, get(b"/first")) as first:
        assert slot.read_request().target == b"/first"
        with ask(hub, get(b"/second")) as second:
            until_queued(hub, 1)
            assert not slot.received
            slot.sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                slot.sock.recv(1)
            slot.sock.settimeout(wire.DEADLINE_S)
            slot.send(OK)
            assert first.read_response().body == b"ok"
            assert serve(slot).target == b"/second"
            assert second.read_response().body == b"ok"


def test_most_recently_parked_slot_of_a_machine_is_taken_first(hub: HubProcess) -> None:
    with dial(hub) as oldest, dial(hub) as middle, dial(hub) as newest:
        with ask(hub, get(b"/a")), ask(hub, get(b"/b")), ask(hub, get(b"/c")):
            for slot in (newest, middle, oldest):
                slot.read_request()
            until_running(hub, 3)


@several_loopback_addresses
def test_slot_of_the_machine_with_the_fewest_running_requests_is_taken(hub: HubProcess) -> None:
    with contextlib.ExitStack() as stack:
        b1, c1, a1, a2 = (stack.enter_context(dial(hub, f"127.0.0.{n}")) for n in (2, 3, 1, 1))
        for path, slot in ((b"/1", a2), (b"/2", c1), (b"/3", b1), (b"/4", a1)):
            stack.enter_context(ask(hub, get(path)))
            assert slot.read_request().target == path
        c1.send(OK)
        a1.send(OK)
        until_running(hub, 2)
        # a still runs one and c none: c is taken, though a's slot was parked at about the same time.
        stack.enter_context(ask(hub, get(b"/5")))
        assert c1.read_request().target == b"/5"
        stack.enter_context(ask(hub, get(b"/6")))
        assert a1.read_request().target == b"/6"


@wire.in_clear_only
def test_slot_that_leaves_as_the_request_comes_costs_not_even_a_post() -> None:
    with hub_process() as hub, dial(hub) as staying, dial(hub) as leaving:
        with paused(hub):
            leaving.reset()
            consumer = Peer.connect(hub.main)
            consumer.send(post(b"/job", b"once"))
        with consumer:
            assert serve(staying).value(b"Pothead-Attempt") == b"1"
            assert consumer.read_response().body == b"ok"


@pytest.mark.parametrize("leave", [Peer.close, Peer.reset], ids=["FIN", "RST"])
def test_slot_that_leaves_after_its_response_costs_not_even_a_post(leave: Callable[[Peer], None]) -> None:
    with hub_process() as hub, dial(hub) as leaving, ask(hub, get(b"/first")) as first:
        leaving.read_request()
        with ask(hub, post(b"/job", b"once")) as second:
            until_queued(hub, 1)
            with paused(hub):
                leaving.send(OK)
                leave(leaving)
            assert leave is Peer.reset or first.read_response().body == b"ok"
            with dial(hub) as staying:
                assert serve(staying).value(b"Pothead-Attempt") == b"1"
                assert second.read_response().body == b"ok"


@wire.in_clear_only
def test_requests_that_come_at_once_find_the_waiting_slots_before_the_queue_is_full() -> None:
    with hub_process("--max-queue", "1") as hub, dial(hub) as one, dial(hub) as two, dial(hub) as three:
        with contextlib.ExitStack() as stack:
            with paused(hub):
                consumers = [stack.enter_context(ask(hub, get(b"/%d" % n))) for n in range(3)]
            for consumer in consumers:
                consumer.sock.settimeout(wire.DEADLINE_S)
            hub.until(lambda stats: stats["requests_in_flight"] + sum(stats["outcomes"].values()) == 3)
            assert hub.stats()["outcomes"]["QF"] == 0
            for slot in (one, two, three):
                serve(slot)
            for consumer in consumers:
                assert consumer.read_response().status == 200


# ---- What a worker is sent ---------------------------------------------------------------------------


def forwarded(hub: HubProcess, slot: Peer, request: bytes, host: str = "127.0.0.1") -> wire.Request:
    """Send the request from `host` and return what the worker got."""
    with ask(hub, request, host) as consumer:
        received = serve(slot)
        assert consumer.read_response(received.method).status == 200
        return received


def test_forwarded_head_is_the_request_with_the_hubs_own_fields(hub: HubProcess, slot: Peer) -> None:
    request = get(
        b"/path;a=b/%2e?q=%20&q", b"Accept: */*", b"x-ODD:  spaced \t", b"Cookie: a=1", b"Cookie: b=2"
    )
    with ask(hub, request) as consumer:
        head = slot.read_head()
        slot.send(OK)
        consumer.read_response()
    wanted = (
        rb"GET /path;a=b/%2e\?q=%20&q HTTP/1\.1\r\n"
        rb"Host: pothead\.test\r\n"
        rb"Accept: \*/\*\r\nx-ODD: spaced\r\nCookie: a=1\r\nCookie: b=2\r\n"
        rb"Via: 1\.1 pothead\r\n"
        rb"X-Forwarded-For: 127\.0\.0\.1\r\nX-Forwarded-Proto: "
        + wire.SCHEME
        + rb"\r\nX-Forwarded-Host: pothead\.test\r\n"
        rb"X-Request-Id: [0-9a-f]{12}-[0-9a-f]+\r\n"
        rb"X-Request-Start: t=[0-9]{10}\.[0-9]{3}\r\n"
        rb"Pothead-Attempt: 1\r\nPothead-Queue-Seconds: 0\.[0-9]{3}\r\n\r\n"
    )
    assert re.fullmatch(wanted, head), head


def test_fields_that_concern_one_connection_are_not_forwarded(hub: HubProcess, slot: Peer) -> None:
    request = forwarded(
        hub,
        slot,
        get(
            b"/hops",
            b"Connection: keep-alive, X-Private",
            b"connection: x-Second",
            b"X-Private: 1",
            b"X-SECOND: 2",
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: keep-alive",
            b"TE: trailers",
            b"Trailer: X-Sum",
            b"Upgrade: websocket",
            b"Authorization: kept",
        ),
    )
    names = [name.lower() for name, _ in request.fields]
    made = b"via x-forwarded-for x-forwarded-proto x-forwarded-host x-request-id x-request-start"
    assert names == [b"host", b"authorization", *made.split(), b"pothead-attempt", b"pothead-queue-seconds"]


def test_fields_that_the_hub_makes_cannot_be_forged(hub: HubProcess, slot: Peer) -> None:
    request = forwarded(
        hub,
        slot,
        get(
            b"/forged",
            b"X-Request-Start: t=1",
            b"Pothead-Attempt: 7",
            b"Pothead_Attempt: 8",
            b"pothead-queue-seconds: 9",
            b"X_Forwarded_For: 192.0.2.66",
        ),
    )
    assert request.value(b"Pothead-Attempt") == b"1"
    assert request.value(b"X-Request-Start") != b"t=1"
    assert request.value(b"Pothead-Queue-Seconds") != b"9"
    assert not [name for name, _ in request.fields if b"_" in name]


@pytest.mark.parametrize(
    "target, path, host",
    [
        (b"http://other.test/p?q", b"/p?q", b"other.test"),
        (b"HTTP://other.test:81?q", b"/?q", b"other.test:81"),
        (b"https://other.test", b"/", b"other.test"),
    ],
)
def test_absolute_target_becomes_a_path_and_its_host_overrules(
    hub: HubProcess, slot: Peer, target: bytes, path: bytes, host: bytes
) -> None:
    request = forwarded(hub, slot, get(target))
    assert (request.target, request.value(b"Host")) == (path, host)
    assert request.value(b"X-Forwarded-Host") == host


def test_options_for_the_whole_service_is_forwarded_as_it_is(hub: HubProcess, slot: Peer) -> None:
    request = forwarded(hub, slot, get(b"*", method=b"OPTIONS"))
    assert (request.method, request.target) == (b"OPTIONS", b"*")


def test_http_1_0_request_without_host_is_forwarded_as_http_1_1(hub: HubProcess, slot: Peer) -> None:
    request = forwarded(hub, slot, b"GET /old HTTP/1.0\r\n\r\n")
    assert (request.minor_version, request.value(b"Host"), request.value(b"Via")) == (1, b"", b"1.0 pothead")


def test_via_of_earlier_hops_stays_in_front(hub: HubProcess, slot: Peer) -> None:
    assert forwarded(hub, slot, get(b"/via", b"Via: 1.1 edge")).values(b"Via") == [
        b"1.1 edge",
        b"1.1 pothead",
    ]


def test_chunked_request_is_forwarded_with_its_length(hub: HubProcess, slot: Peer) -> None:
    body = b"5;extension=1\r\nhello\r\n" + b"1\r\n!\r\n" + b"0\r\nX-Trailer: dropped\r\n\r\n"
    request = forwarded(hub, slot, get(b"/up", b"Transfer-Encoding: chunked", method=b"PUT") + body)
    assert request.body == b"hello!"
    assert request.value(b"Content-Length") == b"6"
    assert request.values(b"X-Trailer") == request.values(b"Transfer-Encoding") == []


def test_empty_bodies_are_forwarded_as_empty_bodies(hub: HubProcess, slot: Peer) -> None:
    assert forwarded(hub, slot, post(b"/empty", b"")).value(b"Content-Length") == b"0"
    chunks = get(b"/empty", b"Transfer-Encoding: chunked", method=b"POST") + chunked()
    assert forwarded(hub, slot, chunks).value(b"Content-Length") == b"0"


@pytest.mark.parametrize("size", [1, 65_536, 65_537, 3_000_000])
def test_body_arrives_whole_whatever_its_size(hub: HubProcess, slot: Peer, size: int) -> None:
    assert forwarded(hub, slot, post(b"/size", noise(size))).body == noise(size)


def test_body_that_comes_byte_by_byte_is_the_same_body(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, b"") as consumer:
        for byte in get(b"/drip", b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"abc", b"de"):
            consumer.send(bytes((byte,)))
        assert serve(slot).body == b"abcde"
        assert consumer.read_response().body == b"ok"


@pytest.mark.parametrize("given", [b"a", b"...", b".a", b"Root=1-5e8+x/y~z:@.=_-", b"x" * 128])
def test_well_formed_request_id_is_kept(hub: HubProcess, slot: Peer, given: bytes) -> None:
    assert forwarded(hub, slot, get(b"/id", b"X-Request-Id: " + given)).value(b"X-Request-Id") == given


@pytest.mark.parametrize("given", [b"", b"two words", b"x" * 129, b'quo"ted', b"\xe4", b".", b".."])
def test_malformed_request_id_is_replaced(hub: HubProcess, slot: Peer, given: bytes) -> None:
    made = forwarded(hub, slot, get(b"/id", b"X-Request-Id: " + given)).value(b"X-Request-Id")
    assert made and re.fullmatch(rb"[0-9a-f]{12}-[0-9a-f]+", made)


def test_trusted_consumer_speaks_for_those_behind_it(hub: HubProcess, slot: Peer) -> None:
    lines = (
        b"X-Forwarded-For: 192.0.2.1",
        b"X-Forwarded-For: 192.0.2.2, 192.0.2.3",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: outside.test",
    )
    request = forwarded(hub, slot, get(b"/trusted", *lines))
    assert request.value(b"X-Forwarded-For") == b"192.0.2.1, 192.0.2.2, 192.0.2.3, 127.0.0.1"
    assert request.value(b"X-Forwarded-Proto") == b"https"
    assert request.value(b"X-Forwarded-Host") == b"outside.test"


@several_loopback_addresses
def test_untrusted_consumer_speaks_for_itself_alone(hub: HubProcess, slot: Peer) -> None:
    lines = (b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: ftp", b"X-Forwarded-Host: outside.test")
    request = forwarded(hub, slot, get(b"/untrusted", *lines), host="127.0.0.2")
    assert request.value(b"X-Forwarded-For") == b"127.0.0.2"
    assert request.value(b"X-Forwarded-Proto") == wire.SCHEME
    assert request.value(b"X-Forwarded-Host") == b"pothead.test"


@several_loopback_addresses
@pytest.mark.parametrize(
    "option, host, is_trusted",
    [
        ("*", "127.0.0.9", True),
        ("192.0.2.1, 127.0.0.0/29", "127.0.0.7", True),
        ("192.0.2.1, 127.0.0.0/29", "127.0.0.8", False),
        ("", "127.0.0.1", False),
    ],
)
def test_forwarded_allow_ips_names_who_is_trusted(option: str, host: str, is_trusted: bool) -> None:
    with hub_process("--forwarded-allow-ips", option) as hub, dial(hub) as slot:
        request = forwarded(hub, slot, get(b"/", b"X-Forwarded-For: 192.0.2.1"), host)
    wanted = f"192.0.2.1, {host}" if is_trusted else host
    assert request.value(b"X-Forwarded-For") == wanted.encode()


@wire.in_clear_only
def test_consumer_over_ipv4_is_known_by_its_ipv4_address_on_every_port() -> None:
    with hub_process("--main-host", "::") as hub, dial(hub) as slot:
        with Peer.connect(("127.0.0.1", hub.main[1])) as consumer:
            consumer.send(get(b"/", b"X-Forwarded-Proto: https"))
            request = serve(slot)
            assert request.value(b"X-Forwarded-For") == b"127.0.0.1"
            assert request.value(b"X-Forwarded-Proto") == b"https"  # it is trusted
            assert consumer.read_response().body == b"ok"


# ---- What a consumer is sent -------------------------------------------------------------------------


def relayed(hub: HubProcess, slot: Peer, request: bytes, response: bytes) -> Peer:
    """Return a consumer to whom the worker's response to its request is on the way."""
    consumer = Peer.connect(hub.main)
    consumer.send(request)
    serve(slot, response)
    return consumer


def test_response_arrives_with_every_field_in_order(hub: HubProcess, slot: Peer) -> None:
    response = (
        b"HTTP/1.1 404 Nowhere to be seen\r\nSet-Cookie: a=1\r\nX-Odd:\xe9\r\nset-cookie: b=2\r\n" + DATE
        + b"Content-Length: 5\r\nConnection: X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=9\r\n"
        + b"Set-Cookie: a=1\r\n\r\nempty"
    )  # fmt: skip
    with relayed(hub, slot, get(b"/404", b"X-Request-Id: r1"), response) as consumer:
        consumer.expect(
            b"HTTP/1.1 404 Nowhere to be seen\r\nSet-Cookie: a=1\r\nX-Odd: \xe9\r\nset-cookie: b=2\r\n" + DATE
            + b"Set-Cookie: a=1\r\nContent-Length: 5\r\nX-Request-Id: r1\r\n\r\nempty"
        )  # fmt: skip
    assert logged(hub, path="/404")["status"] == "404"


def test_response_without_a_date_gets_one(hub: HubProcess, slot: Peer) -> None:
    with relayed(hub, slot, get(b"/date"), OK) as consumer:
        date = consumer.read_response().value(b"Date")
    assert date and re.fullmatch(rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", date)


def test_response_without_a_reason_is_relayed(hub: HubProcess, slot: Peer) -> None:
    response = b"HTTP/1.1 299\r\n%bContent-Length: 0\r\n\r\n" % DATE
    with relayed(hub, slot, get(b"/bare", b"X-Request-Id: r1"), response) as consumer:
        consumer.expect(b"HTTP/1.1 299 \r\n%bContent-Length: 0\r\nX-Request-Id: r1\r\n\r\n" % DATE)


@pytest.mark.parametrize("given", [b"", b"X-Request-Id: chosen-1"])
def test_response_tells_the_id_of_its_request(hub: HubProcess, slot: Peer, given: bytes) -> None:
    with ask(hub, get(b"/told", *filter(None, [given]))) as consumer:
        id_ = serve(slot).value(b"X-Request-Id")
        assert id_ and consumer.read_response().value(b"X-Request-Id") == id_
    assert logged(hub, id=id_.decode())["path"] == "/told"


@pytest.mark.parametrize("fields", [b"x-request-id: own\r\n", b"X-Request-Id: own\r\nX-Request-ID: two\r\n"])
def test_response_keeps_the_id_that_its_worker_gave_it(hub: HubProcess, slot: Peer, fields: bytes) -> None:
    response = b"HTTP/1.1 200 OK\r\n%bContent-Length: 0\r\n\r\n" % fields
    with relayed(hub, slot, get(b"/own", b"X-Request-Id: r1"), response) as consumer:
        assert consumer.read_response().values(b"X-Request-Id") == [b"own"]


@pytest.mark.parametrize(
    "method, response, wanted",
    [
        (b"HEAD", b"200 OK\r\nContent-Length: 7", b"200 OK\r\n%bContent-Length: 7"),
        (b"HEAD", b"200 OK\r\nTransfer-Encoding: chunked", b"200 OK\r\n%b"),
        (b"HEAD", b"200 OK", b"200 OK\r\n%b"),
        (b"GET", b"204 No Content", b"204 No Content\r\n%b"),
        (b"GET", b"204 No Content\r\nContent-Length: 0", b"204 No Content\r\n%b"),
        (b"GET", b"304 Not Modified\r\nContent-Length: 7", b"304 Not Modified\r\n%bContent-Length: 7"),
    ],
)
def test_response_without_a_body_ends_at_its_head(
    hub: HubProcess, slot: Peer, method: bytes, response: bytes, wanted: bytes
) -> None:
    with ask(hub, get(b"/bodiless", b"X-Request-Id: r1", method=method)) as consumer:
        serve(slot, b"HTTP/1.1 %b\r\n%b\r\n" % (response, DATE))
        head = (wanted % DATE).removesuffix(b"\r\n")
        consumer.expect(b"HTTP/1.1 %b\r\nX-Request-Id: r1\r\n\r\n" % head)
        consumer.send(get(b"/next"))  # both connections are in step
        serve(slot)
        assert consumer.read_response().body == b"ok"


def test_body_that_should_not_be_there_reaches_nobody(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, get(b"/head", b"X-Request-Id: r1", method=b"HEAD") + get(b"/next")) as consumer:
        serve(slot, b"HTTP/1.1 200 OK\r\n%bContent-Length: 5\r\n\r\nextra" % DATE)
        slot.expect_eof()
        consumer.expect(b"HTTP/1.1 200 OK\r\n%bContent-Length: 5\r\nX-Request-Id: r1\r\n\r\n" % DATE)
        with dial(hub) as another:
            serve(another)
        assert consumer.read_response().body == b"ok"


def test_early_hints_are_passed_on_and_other_interim_responses_are_not(hub: HubProcess, slot: Peer) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX-Part: 1\r\n\r\n" * 10
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </s>; rel=preload\r\n\r\n"
    with relayed(hub, slot, get(b"/hints"), interim + hint + interim + hint + OK) as consumer:
        consumer.expect(hint + hint)
        assert consumer.read_response().status == 200


def test_early_hints_come_early(hub: HubProcess, slot: Peer) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </s>; rel=preload\r\n\r\n"
    with relayed(hub, slot, get(b"/hints"), hint) as consumer:
        consumer.expect(hint)
        slot.send(OK)
        assert consumer.read_response().status == 200


def test_http_1_0_consumer_gets_no_interim_response(hub: HubProcess, slot: Peer) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </s>; rel=preload\r\n\r\n"
    with relayed(hub, slot, b"GET /old-hints HTTP/1.0\r\n\r\n", hint + OK) as consumer:
        assert consumer.read_response().status == 200
        consumer.expect_eof()


def test_switching_protocols_is_a_bad_answer(hub: HubProcess, slot: Peer) -> None:
    response = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    with relayed(hub, slot, get(b"/101", b"Connection: upgrade", b"Upgrade: x"), response) as consumer:
        assert consumer.read_response().status == 502
        slot.expect_eof()
    assert logged(hub, path="/101")["code"] == "WG"


CHUNKED_RESPONSE = b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % DATE


def test_chunked_response_is_chunked_for_http_1_1(hub: HubProcess, slot: Peer) -> None:
    chunks = b"5;x\r\nhello\r\n1\r\n!\r\n0\r\nX-Trailer: 1\r\n\r\n"
    with relayed(hub, slot, get(b"/chunks"), CHUNKED_RESPONSE + chunks) as consumer:
        response = consumer.read_response()
        assert response.body == b"hello!"
        assert response.value(b"Transfer-Encoding") == b"chunked"
        consumer.send(get(b"/after-chunks"))
        serve(slot)
        assert consumer.read_response().body == b"ok"


def test_chunked_response_ends_with_the_connection_for_http_1_0(hub: HubProcess, slot: Peer) -> None:
    request = b"GET /old-chunks HTTP/1.0\r\nConnection: keep-alive\r\nX-Request-Id: r1\r\n\r\n"
    with relayed(hub, slot, request, CHUNKED_RESPONSE + chunked(b"hello", b"!")) as consumer:
        consumer.expect(b"HTTP/1.1 200 OK\r\n%bX-Request-Id: r1\r\nConnection: close\r\n\r\nhello!" % DATE)
        consumer.expect_eof()
        with ask(hub, get(b"/the-slot-stays")) as another:
            serve(slot)
            assert another.read_response().body == b"ok"


@pytest.mark.parametrize("minor_version", [0, 1])
def test_response_that_ends_with_its_connection_is_whole(
    hub: HubProcess, slot: Peer, minor_version: int
) -> None:
    with ask(hub, b"GET /to-the-end HTTP/1.%d\r\nHost: h\r\n\r\n" % minor_version) as consumer:
        serve(slot, b"HTTP/1.0 200 OK\r\n%b\r\nhello" % DATE)
        slot.close()
        response = consumer.read_response()
        assert response.body == b"hello"
        if minor_version:
            assert response.value(b"Transfer-Encoding") == b"chunked"
        else:
            assert response.value(b"Connection") == b"close"


def test_event_stream_is_not_held_back(hub: HubProcess, slot: Peer) -> None:
    with relayed(hub, slot, get(b"/events"), CHUNKED_RESPONSE) as consumer:
        consumer.read_head()
        for event in (b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"):
            slot.send(b"%x\r\n%b\r\n" % (len(event), event))
            consumer.expect(b"%x\r\n%b\r\n" % (len(event), event))
        slot.send(b"0\r\n\r\n")
        consumer.expect(b"0\r\n\r\n")


def test_http_1_0_consumer_that_asks_for_it_is_kept(hub: HubProcess, slot: Peer) -> None:
    request = b"GET /old HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    with relayed(hub, slot, request, OK) as consumer:
        assert consumer.read_response().value(b"Connection") == b"keep-alive"
        consumer.send(request)
        serve(slot)
        assert consumer.read_response().body == b"ok"


@pytest.mark.parametrize("request_head", [b"GET /bye HTTP/1.0\r\n\r\n", get(b"/bye", b"Connection: close")])
def test_consumer_that_says_close_is_closed_and_the_slot_is_kept(
    hub: HubProcess, slot: Peer, request_head: bytes
) -> None:
    for _ in range(2):
        with relayed(hub, slot, request_head, OK) as consumer:
            assert consumer.read_response().value(b"Connection") == b"close"
            consumer.expect_eof()


# ---- Responses that are cut, or no responses ---------------------------------------------------------


@pytest.mark.parametrize(
    "response, last_words",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"zz\r\n"),
    ],
    ids=["length", "between chunks", "within a chunk", "bad chunk"],
)
@pytest.mark.parametrize("minor_version", [0, 1])
def test_cut_response_is_never_ended_as_if_it_were_whole(
    hub: HubProcess, slot: Peer, response: bytes, last_words: bytes, minor_version: int
) -> None:
    id_ = b"cut-%d" % next(counter)
    request = b"GET /cut HTTP/1.%d\r\nHost: h\r\nX-Request-Id: %b\r\n\r\n" % (minor_version, id_)
    with relayed(hub, slot, request, response) as consumer:
        consumer.read_until(b"half")
        slot.send(last_words)
        slot.close()
        with pytest.raises(ConnectionResetError):
            while data := consumer.sock.recv(65536):
                consumer.received += data
        assert not consumer.received.endswith(b"0\r\n\r\n")
    entry = logged(hub, id=id_.decode())
    assert (entry["status"], entry["code"]) == ("200", "WC")


counter = itertools.count()


def test_response_to_the_end_of_a_broken_connection_is_cut(hub: HubProcess, slot: Peer) -> None:
    with relayed(hub, slot, get(b"/broken"), b"HTTP/1.1 200 OK\r\n\r\nhalf") as consumer:
        consumer.read_until(b"half\r\n")
        slot.reset()
        assert consumer.read_to_end() == b""
    assert logged(hub, path="/broken")["code"] == "WC"


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000,
    ],
)
def test_garbage_from_a_worker_is_502_and_the_end_of_the_slot(
    hub: HubProcess, slot: Peer, garbage: bytes
) -> None:
    path = b"/garbage/%d" % next(counter)
    with relayed(hub, slot, get(path), garbage) as consumer:
        response = consumer.read_response()
        assert response.status == 502
        assert response.value(b"X-Request-Id")
        slot.expect_eof()
        with dial(hub) as another:
            consumer.send(get(b"/next"))  # the fault was not the consumer's: its connection stays
            serve(another)
            assert consumer.read_response().body == b"ok"
    assert logged(hub, path=path.decode())["code"] == "WG"


def test_response_timeout_is_504_and_the_end_of_the_slot() -> None:
    with hub_process("--response-timeout", "150ms") as hub, dial(hub) as slot:
        with ask(hub, get(b"/slow")) as consumer:
            slot.read_request()
            slot.send(b"HTTP/1.1 102 Processing\r\n\r\n")
            response = consumer.read_response()
            assert response.status == 504
            slot.expect_eof()
            entry = logged(hub, path="/slow")
            assert entry["code"] == "WT"
            assert 150 <= float(entry["worker_ms"]) < 5000


def test_response_timeout_is_over_when_the_response_has_begun() -> None:
    with hub_process("--response-timeout", "150ms") as hub, dial(hub) as slot, dial(hub) as another:
        with ask(hub, get(b"/begun")) as begun:
            another.read_request()
            another.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
            begun.read_until(b"\r\n\r\no")
            with ask(hub, get(b"/late")) as late:  # its timeout passes after that of the other
                slot.read_request()
                assert late.read_response().status == 504
            another.send(b"k")
            begun.expect(b"k")


# ---- Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (get(b"/", b"Host: twice"), 400),
        (get(b"/", b"Space : 1"), 400),
        (get(b"/", b"Folded: 1\r\n 2"), 400),
        (get(b"/", b"Nul: \0"), 400),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (get(b"/", b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
        (get(b"/", b"Content-Length: 5", b"Content-Length: 6"), 400),
        (get(b"/", b"Content-Length: 1_0"), 400),
        (get(b"/", b"Transfer-Encoding: chunked, chunked"), 400),
        (get(b"/", b"Transfer-Encoding: chunked") + b"0x5\r\nhello\r\n", 400),
        (get(b"/", b"Transfer-Encoding: chunked") + b"5\r\nhello!\r\n", 400),
        (get(b"ftp://h/"), 400),
        (get(b"/" + b"x" * 9000), 414),
        (get(b"/", b"Long: " + b"x" * 40_000), 431),
        (get(b"/", *(b"F%d: 1" % n for n in range(101))), 431),
        (get(b"/", b"Transfer-Encoding: gzip, chunked"), 501),
        (get(b"h:443", method=b"CONNECT"), 501),
        (get(b"/", method=b"TRACE"), 405),
        (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
        (get(b"/", b"Expect: 200-maybe", b"Content-Length: 1"), 417),
        (get(b"/", b"Content-Length: 99999999999"), 413),
    ],
)
def test_refused_request_gets_its_status_and_no_worker_sees_anything(
    hub: HubProcess, slot: Peer, request_bytes: bytes, status: int
) -> None:
    lines = len(hub.lines)
    with ask(hub, request_bytes + get(b"/smuggled")) as consumer:
        response = read_refusal(consumer, status)
        if status == 405:
            assert b"GET" in (response.value(b"Allow") or b"")
    id_ = (response.value(b"X-Request-Id") or b"").decode()
    assert logged(hub, id=id_, status=status, code="RQ")["worker"] == "-"
    forwarded(hub, slot, get(b"/honest"))
    logged(hub, path="/honest")
    new = [line for line in hub.lines[lines:] if f"id={id_} " in line or "smuggled" in line]
    assert len(new) == 1


@pytest.mark.parametrize(
    "request_bytes, method, path",
    [
        (b"PUT /a?secret HTTP/1.1\r\n\r\n", "PUT", "/a"),
        (get(b"/a?secret", b"Space : 1"), "GET", "/a"),
        (b"POST /a HTTP/1.1\r\nX: \0", "POST", "/a"),  # the head has not even ended
        (get(b"/a", b"Long: " + b"x" * 40_000), "GET", "/a"),
        (b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n", "GET", "/a"),
        (b"\r\n\r\nGET http://h/a?secret HTTP/1.1\r\nHost: 1\r\nHost: 2\r\n\r\n", "GET", "/a"),
        (get(b"http://name:secret@h/a"), "GET", "/a"),
        (get(b"name:secret@h:443", method=b"CONNECT"), "CONNECT", "-"),
        (get(b"/" + b"x" * 9000), "-", "-"),
        (b"GET /a\r\n\r\n", "-", "-"),
        (b"GET /a\r\n\r\n" + get(b"/next"), "-", "-"),
    ],
)
def test_refused_request_is_logged_with_what_could_be_read_of_it(
    hub: HubProcess, request_bytes: bytes, method: str, path: str
) -> None:
    with ask(hub, request_bytes) as consumer:
        response = consumer.read_response()
    entry = logged(hub, id=(response.value(b"X-Request-Id") or b"").decode(), code="RQ")
    assert (entry["method"], entry["path"]) == (method, path)
    assert not any("secret" in line for line in hub.lines)


def test_request_whose_head_never_ends_is_logged_with_its_first_line() -> None:
    with hub_process("--head-timeout", "150ms") as hub, ask(hub, b"GET /slow HTTP/1.1\r\nX") as consumer:
        read_refusal(consumer, 408)
        assert logged(hub, path="/slow", status=408)["method"] == "GET"


def test_refused_head_request_gets_no_body(hub: HubProcess) -> None:
    with ask(hub, get(b"/a", b"Space : 1", method=b"HEAD")) as consumer:
        assert consumer.read_response(b"HEAD").status == 400
        consumer.expect_eof()


def test_refusal_reaches_a_consumer_that_goes_on_sending(hub: HubProcess) -> None:
    request = get(b"/endless", b"Content-Length: 99999999999", method=b"POST")
    with ask(hub, request + noise(4 * MIB)) as consumer:
        read_refusal(consumer, 413)


def test_slow_head_is_408() -> None:
    with hub_process("--head-timeout", "150ms") as hub, ask(hub, b"GET / HTTP/1.1\r\n") as consumer:
        read_refusal(consumer, 408)
        assert logged(hub, status=408)["code"] == "RQ"


@wire.in_clear_only
def test_head_timeout_is_for_the_whole_head() -> None:
    with hub_process("--head-timeout", "200ms") as hub, ask(hub, b"GET / HTTP/1.1\r\nX: ") as consumer:
        started_at = time.monotonic()
        consumer.sock.settimeout(0.02)
        while True:  # a byte now and then does not help
            try:
                assert consumer.sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 408"
                break
            except TimeoutError:
                consumer.send(b"x")
                assert time.monotonic() - started_at < wire.DEADLINE_S
        consumer.sock.settimeout(wire.DEADLINE_S)
        read_refusal(consumer, 408)


def test_body_that_stops_coming_is_408_and_never_had_a_slot() -> None:
    with hub_process("--stall-timeout", "150ms") as hub, dial(hub) as slot:
        with ask(hub, post(b"/stalled", b"whole")[:-1]) as consumer:
            read_refusal(consumer, 408)
        assert logged(hub, path="/stalled")["code"] == "RQ"
        forwarded(hub, slot, get(b"/first-for-the-slot"))


def test_silent_consumer_is_closed_without_a_word() -> None:
    with hub_process("--keep-alive", "100ms") as hub, Peer.connect(hub.main) as silent, dial(hub) as slot:
        silent.expect_eof()
        with relayed(hub, slot, get(b"/"), OK) as consumer:
            consumer.read_response()
            consumer.expect_eof()


def test_body_over_the_limit_is_413_however_it_comes() -> None:
    with hub_process("--max-request-body", "10") as hub, dial(hub) as slot:
        assert forwarded(hub, slot, post(b"/ten", b"0123456789")).body == b"0123456789"
        with ask(hub, post(b"/eleven", b"0123456789a")) as consumer:
            read_refusal(consumer, 413)
        chunks = get(b"/chunks", b"Transfer-Encoding: chunked", method=b"POST")
        with ask(hub, chunks + chunked(b"012345", b"6789a")) as consumer:
            read_refusal(consumer, 413)
        assert logged(hub, path="/chunks")["code"] == "RQ"
        assert forwarded(hub, slot, chunks + chunked(b"01234", b"56789")).body == b"0123456789"


def test_refusal_of_a_head_request_has_no_body() -> None:
    with hub_process("--max-queue", "1") as hub, ask(hub, get(b"/waits")):
        until_queued(hub, 1)
        with ask(hub, get(b"/", b"Connection: close", method=b"HEAD")) as consumer:
            head = consumer.read_head()
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert re.search(rb"\r\nContent-Length: [1-9]", head)
            consumer.expect_eof()


# ---- Expect: 100-continue ----------------------------------------------------------------------------


def test_hub_itself_asks_for_the_body(hub: HubProcess) -> None:
    head = get(b"/expect", b"Content-Length: 4", b"Expect: 100-Continue", method=b"PUT")
    with ask(hub, head) as consumer:
        consumer.expect(b"HTTP/1.1 100 Continue\r\n\r\n")
        consumer.send(b"body")
        with dial(hub) as slot:
            request = serve(slot)
            assert (request.body, request.values(b"Expect")) == (b"body", [])
            assert consumer.read_response().status == 200


@pytest.mark.parametrize(
    "head",
    [
        get(b"/nothing-to-ask-for", b"Expect: 100-continue"),
        b"PUT /old HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
    ],
)
def test_nothing_is_asked_for_without_need(hub: HubProcess, slot: Peer, head: bytes) -> None:
    with relayed(hub, slot, head, OK) as consumer:
        assert consumer.read_response().status == 200


def test_final_refusal_comes_instead_of_the_invitation() -> None:
    with hub_process("--max-queue", "1", "--max-request-body", "9") as hub:
        expect = b"Expect: 100-continue"
        with ask(hub, get(b"/large", b"Content-Length: 10", expect, method=b"PUT")) as consumer:
            read_refusal(consumer, 413)
        with ask(hub, get(b"/waits")):
            until_queued(hub, 1)
            with ask(hub, get(b"/full", b"Content-Length: 5", expect, method=b"PUT")) as consumer:
                read_refusal(consumer, 503)
        assert logged(hub, path="/full")["code"] == "QF"


# ---- Kept and pipelined connections of consumers -----------------------------------------------------


def test_pipelined_requests_are_answered_one_after_the_other(hub: HubProcess) -> None:
    requests = get(b"/p/1") + post(b"/p/2", b"body") + b"\r\n" + get(b"/p/3", b"Connection: close")
    with ask(hub, requests + get(b"/p/4")) as consumer, dial(hub) as slot, dial(hub) as unused:
        for number, body in ((1, b""), (2, b"body"), (3, b"")):
            running = hub.until(lambda stats: stats["running"])["running"]
            assert [each["path"] for each in running] == [f"/p/{number}"]  # one at a time
            peer = slot if running[0]["worker"] == text(slot.address) else unused
            request = serve(peer, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)
            assert (request.target, request.body) == (b"/p/%d" % number, body)
            response = consumer.read_response()
            assert response.body == b"%d" % number
        assert response.value(b"Connection") == b"close"
        consumer.expect_eof()
    assert count_logged(hub, "/p/4") == 0


def test_request_pipelined_after_a_bad_one_is_not_served(hub: HubProcess, slot: Peer) -> None:
    bad = get(b"/bad", b"Transfer-Encoding: chunked") + b"x\r\n"
    with ask(hub, get(b"/good") + bad + get(b"/after-bad")) as consumer:
        serve(slot)
        assert consumer.read_response().body == b"ok"
        read_refusal(consumer, 400)
    assert forwarded(hub, slot, get(b"/then")).target == b"/then"
    assert count_logged(hub, "/after-bad") == 0


def test_thousand_pipelined_requests_are_served(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, b"") as consumer:
        sender = threading.Thread(target=consumer.send, args=(get(b"/many", b"Pad: " + b"x" * 200) * 1000,))
        sender.start()
        for _ in range(1000):
            serve(slot)
            assert consumer.read_response().body == b"ok"
        sender.join()


def test_empty_lines_before_a_request_are_skipped(hub: HubProcess, slot: Peer) -> None:
    assert forwarded(hub, slot, b"\r\n\r\n" + get(b"/blank")).target == b"/blank"


# ---- Kept connections of workers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: Close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfake",
    ],
)
def test_slot_that_says_close_or_too_much_is_not_used_again(
    hub: HubProcess, slot: Peer, response: bytes
) -> None:
    with relayed(hub, slot, get(b"/once"), response) as consumer:
        assert consumer.read_response().body == b"ok"
        slot.expect_eof()
        consumer.send(get(b"/twice"))
        with dial(hub) as another:
            serve(another, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue")
            assert consumer.read_response().body == b"true"


def test_http_1_0_worker_that_keeps_alive_is_kept(hub: HubProcess, slot: Peer) -> None:
    response = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"
    for _ in range(2):
        with relayed(hub, slot, get(b"/"), response) as consumer:
            assert consumer.read_response().body == b"ok"


def test_waiting_slot_that_speaks_is_closed_and_counted() -> None:
    with hub_process() as hub, dial(hub) as slot, dial(hub) as liar:
        liar.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfake")
        liar.expect_eof()
        assert hub.stats()["breaches"] == 1
        hub.wait_for_error(lambda line: "sent bytes while it waited" in line and text(liar.address) in line)
        forwarded(hub, slot, get(b"/"))


def test_waiting_slot_that_hangs_up_just_disappears(hub: HubProcess) -> None:
    with dial(hub) as one, dial(hub) as two:
        one.close()
        two.reset()
        hub.until(lambda stats: stats["slots"] == {"idle": 0, "busy": 0} and not stats["workers"])
    assert hub.stderr == "" or "WARNING" not in hub.stderr.splitlines()[-1]


def test_response_before_the_body_was_taken_is_relayed_and_ends_the_slot(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, post(b"/early", noise(16 * MIB))) as consumer:
        slot.read_head()
        slot.send(b"HTTP/1.1 413 Too much\r\nContent-Length: 2\r\n\r\nno")
        assert consumer.read_response().body == b"no"
        slot.read_to_end()
        consumer.send(get(b"/after-early"))  # the hub has the whole body: the consumer is kept
        with dial(hub) as another:
            serve(another)
        assert consumer.read_response().status == 200
    assert logged(hub, path="/early")["code"] == "OK"


# ---- Requests that go no further ---------------------------------------------------------------------


def test_options_that_may_not_be_passed_on_is_answered_by_the_hub(hub: HubProcess, slot: Peer) -> None:
    nearest = get(b"/nearest", b"Max-Forwards: 0", method=b"OPTIONS")
    with ask(hub, nearest) as consumer:
        response = consumer.read_response()
        assert (response.status, response.value(b"Content-Length"), response.body) == (200, b"0", b"")
        assert b"OPTIONS" in (response.value(b"Allow") or b"").split(b", ")
        entry = logged(hub, path="/nearest")
        assert (entry["status"], entry["code"], entry["attempts"], entry["worker"]) == ("200", "OK", "0", "-")
        consumer.send(get(b"/next", b"Max-Forwards: 1", method=b"OPTIONS"))  # on the same connection
        request = serve(slot)
        assert (request.target, request.value(b"Max-Forwards")) == (b"/next", b"0")
        assert consumer.read_response().body == b"ok"


def test_options_with_a_body_that_may_not_be_passed_on_is_answered_at_its_head(hub: HubProcess) -> None:
    fields = (b"Max-Forwards: 0", b"Expect: 100-continue")
    with ask(hub, post(b"/body", b"12345", *fields, method=b"OPTIONS")[:-5]) as consumer:
        response = consumer.read_response()
        assert (response.status, response.value(b"Connection")) == (200, b"close")
        consumer.expect_eof()


# ---- The queue's limits ------------------------------------------------------------------------------


def test_full_queue_refuses_at_once_and_the_connection_is_kept() -> None:
    with hub_process("--max-queue", "2") as hub:
        with ask(hub, get(b"/1")) as first, ask(hub, get(b"/2")) as second:
            until_queued(hub, 2)
            with ask(hub, get(b"/3")) as third:
                response = third.read_response()
                assert response.status == 503
                assert response.value(b"Retry-After") == b"30"
                entry = logged(hub, path="/3")
                assert (entry["status"], entry["code"], entry["attempts"]) == ("503", "QF", "0")
                second.close()
                until_queued(hub, 1)
                third.send(get(b"/3-again"))
                until_queued(hub, 2)
                with dial(hub) as slot:
                    assert serve(slot).target == b"/1"
                    assert serve(slot).target == b"/3-again"
                assert first.read_response().status == third.read_response().status == 200


def test_queue_that_fills_during_an_upload_refuses_it() -> None:
    with hub_process("--max-queue", "1") as hub, ask(hub, post(b"/upload", b"body")[:-1]) as uploader:
        with ask(hub, get(b"/waits")):
            until_queued(hub, 1)
            uploader.send(b"y")
            response = uploader.read_response()
            assert (response.status, response.value(b"Retry-After")) == (503, b"30")
    assert logged(hub, path="/upload")["code"] == "QF"


def test_queue_timeout_is_503_with_retry_after() -> None:
    options = ("--queue-timeout", "150ms", "--retry-after", "1.5m")
    with hub_process(*options) as hub, ask(hub, get(b"/waits")) as consumer:
        response = consumer.read_response()
        assert (response.status, response.value(b"Retry-After")) == (503, b"90")
        entry = logged(hub, path="/waits")
        assert entry["code"] == "QT"
        assert 150 <= float(entry["queued_ms"]) < 5000
        with dial(hub) as slot:  # nothing of it is left for a slot that comes too late
            consumer.send(get(b"/next"))
            assert serve(slot).target == b"/next"
            consumer.read_response()


def test_running_request_has_no_queue_timeout() -> None:
    with hub_process("--queue-timeout", "150ms") as hub, dial(hub) as slot:
        with ask(hub, get(b"/runs")) as runs:
            slot.read_request()
            with ask(hub, get(b"/waits")) as waits:  # came later, and its time is over
                assert waits.read_response().status == 503
            slot.send(OK)
            assert runs.read_response().status == 200


def test_retry_after_is_the_expected_wait() -> None:
    with hub_process("--max-queue", "3") as hub, dial(hub) as slot, contextlib.ExitStack() as stack:
        with ask(hub, get(b"/measured")) as consumer:
            slot.read_request()
            hub.until(lambda stats: stats["running"][0]["worker_seconds"] > 0.7)
            slot.send(OK)
            consumer.read_response()
        stack.enter_context(ask(hub, get(b"/runs")))
        slot.read_request()
        for number in range(3):
            stack.enter_context(ask(hub, get(b"/%d" % number)))
            until_queued(hub, number + 1)
        mean_s = hub.stats()["mean_service_seconds"]
        assert isinstance(mean_s, float) and mean_s > 0.7
        with ask(hub, get(b"/refused")) as consumer:
            assert consumer.read_response().value(b"Retry-After") == b"%d" % math.ceil(3 / 1 * mean_s)


# ---- A worker that dies ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"DELETE"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_idempotent_request_runs_again_when_its_worker_dies(
    hub: HubProcess, slot: Peer, method: bytes, how: str
) -> None:
    with dial(hub) as first, ask(hub, get(b"/again", method=method)) as consumer:
        assert first.read_request().value(b"Pothead-Attempt") == b"1"
        first.reset() if how == "reset" else first.close()
        request = slot.read_request()
        assert (request.method, request.value(b"Pothead-Attempt")) == (method, b"2")
        slot.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        response = consumer.read_response()
        assert response.status == 204
        entry = logged(hub, id=(request.value(b"X-Request-Id") or b"").decode())
        assert (entry["attempts"], entry["worker"], entry["code"]) == ("2", text(slot.address), "OK")


@pytest.mark.parametrize("method", [b"POST", b"PATCH", b"FROB"])
def test_other_requests_get_502_when_their_worker_dies(hub: HubProcess, slot: Peer, method: bytes) -> None:
    path = b"/once/" + method
    with ask(hub, post(path, b"body", method=method)) as consumer:
        slot.read_request()
        slot.close()
        response = consumer.read_response()
        assert (response.status, response.values(b"Retry-After")) == (502, [])
        with dial(hub) as another:
            consumer.send(get(b"/next"))
            assert serve(another).target == b"/next"
            assert consumer.read_response().status == 200
    assert logged(hub, path=path.decode())["code"] == "WL"


@pytest.mark.parametrize("size", [4, 300_000])
def test_request_with_idempotency_key_runs_again_with_its_whole_body(
    hub: HubProcess, slot: Peer, size: int
) -> None:
    with dial(hub) as first, ask(hub, post(b"/key", noise(size), b"Idempotency-Key: k")) as consumer:
        first.read_head()
        first.close()
        request = serve(slot)
        assert (request.body, request.value(b"Idempotency-Key")) == (noise(size), b"k")
        assert consumer.read_response().status == 200


def test_request_is_started_so_many_times_and_no_more(hub: HubProcess) -> None:
    with ask(hub, get(b"/deadly")) as consumer:
        for attempt in (1, 2):
            with dial(hub) as slot:
                assert slot.read_request().value(b"Pothead-Attempt") == b"%d" % attempt
        assert consumer.read_response().status == 502
    entry = logged(hub, path="/deadly")
    assert (entry["attempts"], entry["code"]) == ("2", "WL")


@pytest.mark.parametrize("attempts", [1, 3])
def test_max_attempts_can_be_set(attempts: int) -> None:
    with hub_process("--max-attempts", str(attempts)) as hub, ask(hub, get(b"/deadly")) as consumer:
        for _ in range(attempts):
            with dial(hub) as slot:
                slot.read_request()
        assert consumer.read_response().status == 502
        assert logged(hub, path="/deadly")["attempts"] == str(attempts)
        assert hub.stats()["requeues"] == attempts - 1


@pytest.mark.parametrize("heard", [b"H", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"])
def test_request_whose_response_has_begun_does_not_run_again(
    hub: HubProcess, slot: Peer, heard: bytes
) -> None:
    path = b"/heard/%d" % next(counter)
    with dial(hub) as first, ask(hub, get(path)) as consumer:
        first.read_request()
        first.send(heard)
        first.close()
        assert consumer.read_response().status == 502
        assert forwarded(hub, slot, get(b"/then")).target == b"/then"
    entry = logged(hub, path=path.decode())
    assert (entry["attempts"], entry["code"]) == ("1", "WL")


def test_request_that_lost_its_worker_is_first_in_the_queue(hub: HubProcess) -> None:
    with dial(hub) as first, ask(hub, get(b"/older")) as older:
        first.read_request()
        with ask(hub, get(b"/younger")) as younger:
            until_queued(hub, 1)
            first.close()
            until_queued(hub, 2)
            with dial(hub) as second:
                assert serve(second).target == b"/older"
                assert serve(second).target == b"/younger"
            assert older.read_response().status == younger.read_response().status == 200


def test_requeue_is_told_on_stderr_with_the_request_id(hub: HubProcess) -> None:
    with ask(hub, get(b"/", b"X-Request-Id: told-1")) as consumer:
        with dial(hub) as first:
            first.read_request()
        with dial(hub) as second:
            serve(second)
            consumer.read_response()
    assert " told-1: " in hub.wait_for_error(lambda line: "told-1" in line)


# ---- A consumer that leaves --------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [b"", get(b"/behind"), b"x" * 100_000], ids=["", "pipelined", "unread"])
def test_consumers_that_leave_the_queue_are_seen_by_no_worker(hub: HubProcess, behind: bytes) -> None:
    ways = {b"/left/%d" % next(counter): leave for leave in (Peer.close, Peer.reset, Peer.finish_sending)}
    with contextlib.ExitStack() as stack:
        consumers = [stack.enter_context(ask(hub, get(path))) for path in ways]
        until_queued(hub, len(ways))
        for leaving, leave in zip(consumers, ways.values(), strict=True):
            if behind:
                leaving.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    leaving.sock.send(behind)
                leaving.sock.settimeout(wire.DEADLINE_S)
            leave(leaving)
        until_queued(hub, 0)
        consumers[-1].expect_eof()
    with dial(hub) as slot:
        assert forwarded(hub, slot, get(b"/stays")).target == b"/stays"
    for path in ways:
        entry = logged(hub, path=path.decode())
        assert (entry["status"], entry["code"], entry["attempts"]) == ("499", "CQ", "0")


def test_consumer_that_leaves_during_its_upload_is_forgotten(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, post(b"/half", b"body")[:-1]):
        pass
    assert logged(hub, path="/half")["code"] == "CQ"
    assert forwarded(hub, slot, get(b"/stays")).target == b"/stays"


@pytest.mark.parametrize("how", ["close", "reset"])
def test_slot_is_closed_when_the_consumer_of_its_request_leaves(
    hub: HubProcess, slot: Peer, how: str
) -> None:
    path = b"/left-running/%d" % next(counter)
    with ask(hub, get(path)) as leaving:
        slot.read_request()
        getattr(leaving, how)()
        slot.expect_eof()
    entry = logged(hub, path=path.decode())
    assert (entry["status"], entry["code"], entry["attempts"]) == ("499", "CR", "1")


def test_slot_is_closed_when_the_consumer_leaves_during_the_response(hub: HubProcess, slot: Peer) -> None:
    with relayed(hub, slot, get(b"/left-midway"), CHUNKED_RESPONSE + b"1\r\nx\r\n") as leaving:
        leaving.read_until(b"1\r\nx\r\n")
    slot.expect_eof()
    assert logged(hub, path="/left-midway")["code"] == "CR"


# ---- Spooling and back pressure ----------------------------------------------------------------------


def test_slow_upload_holds_no_slot(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, post(b"/slow-upload", noise(100_000))[:-1]) as slow:
        assert forwarded(hub, slot, get(b"/quick")).target == b"/quick"
        slow.send(noise(100_000)[-1:])
        assert serve(slot).body == noise(100_000)
        assert slow.read_response().status == 200


def test_slow_reader_holds_no_slot(hub: HubProcess, slot: Peer) -> None:
    body = noise(24 * MIB)
    with ask(hub, get(b"/slow-reader")) as slow:
        slot.read_request()
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        slot.send(body)
        assert forwarded(hub, slot, get(b"/quick")).target == b"/quick"
        assert count_logged(hub, "/slow-reader") == 0
        assert hub.stats()["spool_memory_bytes"] <= 64 * 1024
        assert slow.read_response().body == body
    entry = logged(hub, path="/slow-reader")
    assert (entry["bytes_out"], entry["code"]) == (str(len(body)), "OK")


def test_slow_reader_that_leaves_is_logged_as_such(hub: HubProcess, slot: Peer) -> None:
    body = noise(24 * MIB)
    with ask(hub, get(b"/leaving-reader")) as slow:
        serve(slot, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        hub.until(lambda stats: stats["slots"]["idle"] == 1)
        slow.reset()
    assert logged(hub, path="/leaving-reader")["code"] == "CR"
    hub.until(lambda stats: stats["spool_memory_bytes"] == 0)


def test_reader_that_stops_is_given_up() -> None:
    options = ("--stall-timeout", "200ms")
    with hub_process(*options) as hub, dial(hub) as slot, ask(hub, get(b"/stops")) as reader:
        slot.read_request()
        with contextlib.suppress(ConnectionError):  # the hub gives up the consumer, and so the slot
            slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (24 * MIB) + noise(24 * MIB))
        assert logged(hub, path="/stops")["code"] == "CR"
        assert len(reader.read_to_end()) < 24 * MIB


def send_while_taken(peer: Peer, data: memoryview) -> int:
    """Send until nothing has been taken for a second; return how much was."""
    peer.sock.settimeout(1.0)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += peer.sock.send(data[sent : sent + MIB])
    peer.sock.settimeout(wire.DEADLINE_S)
    return sent


def test_response_beyond_the_spool_goes_on_as_the_reader_reads() -> None:
    """It does not wait until the whole spool has been read: that would hold the slot for long."""
    body = memoryview(noise(128 * MIB))
    with hub_process("--response-spool", "32m") as hub, dial(hub) as slot, ask(hub, get(b"/huge")) as reader:
        serve(slot, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        reader.read_head()
        sent = send_while_taken(slot, body)
        assert 32 * MIB <= sent < 64 * MIB
        assert reader.read_exactly(16 * MIB) == body[: 16 * MIB]
        assert send_while_taken(slot, body[sent:]) > 12 * MIB


def test_response_beyond_the_spool_holds_the_worker_back() -> None:
    size = 64 * MIB
    with hub_process("--response-spool", "1m") as hub, dial(hub) as slot, ask(hub, get(b"/huge")) as reader:
        slot.read_request()
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        body = memoryview(noise(size))
        sent = send_while_taken(slot, body)
        assert sent < 40 * MIB
        sender = threading.Thread(target=slot.send, args=(body[sent:],))
        sender.start()
        digest = hashlib.sha256(reader.read_response().body).digest()
        sender.join()
        assert digest == hashlib.sha256(body).digest()
        assert logged(hub, path="/huge")["code"] == "OK"


def test_memory_budget_bounds_all_spools_together() -> None:
    options = ("--spool-memory", "1m", "--memory-budget", "150k")
    with hub_process(*options) as hub, contextlib.ExitStack() as stack:
        consumers = []
        for number in range(4):
            consumers.append(stack.enter_context(ask(hub, post(b"/%d" % number, noise(100_000 + number)))))
            until_queued(hub, number + 1)
        assert 0 < hub.stats()["spool_memory_bytes"] <= 150 * 1024
        slot = stack.enter_context(dial(hub))
        for number, consumer in enumerate(consumers):
            assert serve(slot).body == noise(100_000 + number)
            assert consumer.read_response().status == 200
        assert hub.until(lambda stats: stats["demand"] == 0)["spool_memory_bytes"] == 0


@contextlib.contextmanager
def hub_with_small_files(*options: str) -> Iterator[HubProcess]:
    """Run a hub whose files may not grow beyond some 50 kB, as on a disk that is almost full."""
    ports = ("--main-port", "0", "--worker-port", "0", "--admin-port", "0")
    program = wire.python(wire.compiled("pothead"), *ports)
    limited = ["sh", "-c", 'ulimit -S -f 50 && exec "$0" "$@"', *program, *options]
    with wire.running(HubProcess(limited, wire.ROOT)) as hub:
        hub.wait_until_ready()
        yield hub
        lifted = resource.getrlimit(resource.RLIMIT_FSIZE)  # what measures coverage writes at the end
        resource.prlimit(hub.pid, resource.RLIMIT_FSIZE, lifted)


def test_full_disk_refuses_the_body_that_needs_it_and_no_other() -> None:
    with hub_with_small_files() as hub, dial(hub) as slot:
        with ask(hub, post(b"/no-room", noise(400_000))) as consumer:
            response = read_refusal(consumer, 503)
            assert response.value(b"Retry-After")
        assert logged(hub, path="/no-room")["code"] == "RQ"
        hub.wait_for_error(lambda line: "cannot spool" in line)
        assert forwarded(hub, slot, post(b"/fits", noise(60_000))).body == noise(60_000)
        assert hub.stats()["spool_memory_bytes"] == 0


def test_full_disk_does_not_spoil_a_response() -> None:
    body = noise(24 * MIB)
    with hub_with_small_files() as hub, dial(hub) as slot, ask(hub, get(b"/download")) as consumer:
        slot.read_request()
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        sender = threading.Thread(target=slot.send, args=(head + body,))
        sender.start()
        hub.until(lambda stats: stats["spool_memory_bytes"] > 64 * 1024)
        assert consumer.read_response().body == body
        sender.join()
        assert logged(hub, path="/download")["code"] == "OK"


def test_disk_budget_refuses_the_body_beyond_it_until_others_have_gone() -> None:
    with hub_process("--disk-budget", "500k") as hub, contextlib.ExitStack() as stack:
        first = stack.enter_context(ask(hub, post(b"/first", noise(400_000))))
        until_queued(hub, 1)
        with ask(hub, post(b"/no-room", noise(400_001))) as consumer:
            response = read_refusal(consumer, 503)
            assert b"no room for the body: the disk budget is used up" in response.body
            assert response.value(b"Retry-After")
        assert logged(hub, path="/no-room")["code"] == "RQ"
        hub.wait_for_error(lambda line: "cannot spool to a file: [Errno 28] the disk budget is" in line)
        stack.enter_context(ask(hub, post(b"/fits-into-memory", noise(60_000))))
        until_queued(hub, 2)
        first.close()
        until_queued(hub, 1)
        stack.enter_context(ask(hub, post(b"/there-is-room-again", noise(400_001))))
        until_queued(hub, 2)
        slot = stack.enter_context(dial(hub))
        assert serve(slot).body == noise(60_000)
        assert serve(slot).body == noise(400_001)


def test_response_beyond_the_disk_budget_holds_the_worker_back() -> None:
    body = noise(24 * MIB)
    with hub_process("--disk-budget", "1m") as hub, dial(hub) as slot, ask(hub, get(b"/huge")) as reader:
        slot.read_request()
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        sent = send_while_taken(slot, memoryview(body))
        assert sent < len(body)
        assert hub.stats()["spool_memory_bytes"] < 2 * MIB
        sender = threading.Thread(target=slot.send, args=(memoryview(body)[sent:],))
        sender.start()
        assert reader.read_response().body == body
        sender.join()
        assert logged(hub, path="/huge")["code"] == "OK"


def test_spool_directory_is_used_and_left_empty(tmp_path: Path) -> None:
    with hub_process("--spool-dir", str(tmp_path)) as hub:
        with ask(hub, post(b"/", noise(400_000))) as consumer:
            until_queued(hub, 1)
            if sys.platform == "linux":
                files = [str(each.readlink()) for each in Path(f"/proc/{hub.pid}/fd").iterdir()]
                assert [each for each in files if each.startswith(str(tmp_path))]
            with dial(hub) as slot:
                assert serve(slot).body == noise(400_000)
                consumer.read_response()
        hub.until(lambda stats: stats["demand"] == 0)
        assert not list(tmp_path.iterdir())


# ---- --stream-requests -------------------------------------------------------------------------------


@pytest.fixture
def streaming_hub() -> Iterator[HubProcess]:
    with hub_process("--stream-requests") as process:
        yield process


def test_streamed_body_reaches_the_worker_as_it_comes(streaming_hub: HubProcess) -> None:
    with dial(streaming_hub) as slot, ask(streaming_hub, post(b"/stream", b"12345678")[:-8]) as consumer:
        assert b"\r\nContent-Length: 8\r\n" in slot.read_head()
        for piece in (b"123", b"45", b"678"):
            consumer.send(piece)
            slot.expect(piece)
        slot.send(OK)
        assert consumer.read_response().body == b"ok"
        consumer.send(get(b"/kept"))
        serve(slot)
        assert consumer.read_response().body == b"ok"


def test_streamed_chunks_are_framed_anew(streaming_hub: HubProcess) -> None:
    head = get(b"/stream", b"Transfer-Encoding: chunked", method=b"POST")
    with dial(streaming_hub) as slot, ask(streaming_hub, head) as consumer:
        assert b"\r\nTransfer-Encoding: chunked\r\n" in slot.read_head()
        consumer.send(b"4;x\r\nab")
        slot.expect(b"2\r\nab\r\n")
        consumer.send(b"cd\r\n1\r\n!\r\n")
        slot.expect(b"3\r\ncd!\r\n")
        consumer.send(b"0\r\nX-Trailer: 1\r\n\r\n")
        slot.expect(b"0\r\n\r\n")
        slot.send(OK)
        assert consumer.read_response().body == b"ok"


def test_streamed_body_waits_for_its_worker_in_a_bounded_spool(streaming_hub: HubProcess) -> None:
    body = noise(32 * MIB)
    with ask(streaming_hub, b"") as consumer:
        sender = threading.Thread(target=consumer.send, args=(post(b"/stream", body),))
        sender.start()
        until_queued(streaming_hub, 1)
        with dial(streaming_hub) as slot:
            assert serve(slot).body == body
        sender.join()
        assert consumer.read_response().body == b"ok"


def test_early_response_to_a_streamed_request_ends_both_connections(streaming_hub: HubProcess) -> None:
    with dial(streaming_hub) as slot, ask(streaming_hub, post(b"/early", b"12345678")[:-4]) as consumer:
        slot.read_until(b"1234")
        slot.send(b"HTTP/1.1 413 Too much\r\nContent-Length: 2\r\n\r\nno")
        response = consumer.read_response()
        assert (response.body, response.value(b"Connection")) == (b"no", b"close")
        slot.expect_eof()
        consumer.expect_eof()


def test_streamed_request_does_not_run_again_once_its_body_has_gone(streaming_hub: HubProcess) -> None:
    with dial(streaming_hub) as slot, dial(streaming_hub) as first:
        with ask(streaming_hub, post(b"/stream", b"12345678", method=b"PUT")[:-4]) as consumer:
            first.read_until(b"1234")
            first.close()
            assert read_refusal(consumer, 502)
        assert forwarded(streaming_hub, slot, get(b"/then")).target == b"/then"


def test_streamed_request_runs_again_while_its_body_has_not_come(streaming_hub: HubProcess) -> None:
    with dial(streaming_hub) as slot, dial(streaming_hub) as first:
        with ask(streaming_hub, post(b"/stream", b"12345678", method=b"PUT")[:-8]) as consumer:
            first.read_head()
            first.close()
            slot.read_head()
            consumer.send(b"12345678")
            slot.expect(b"12345678")
            slot.send(OK)
            assert consumer.read_response().body == b"ok"


def test_consumer_that_breaks_its_streamed_body_ends_the_slot(streaming_hub: HubProcess) -> None:
    head = get(b"/broken", b"Transfer-Encoding: chunked", method=b"POST")
    with dial(streaming_hub) as slot, ask(streaming_hub, head) as consumer:
        slot.read_head()
        consumer.send(b"bad\n")
        read_refusal(consumer, 400)
        slot.expect_eof()
        assert logged(streaming_hub, path="/broken")["code"] == "RQ"


def test_streamed_body_over_the_limit_is_413_and_ends_the_slot() -> None:
    with hub_process("--stream-requests", "--max-request-body", "5") as hub, dial(hub) as slot:
        with ask(hub, get(b"/large", b"Transfer-Encoding: chunked", method=b"POST")) as consumer:
            slot.read_head()
            consumer.send(chunked(b"123", b"456"))
            read_refusal(consumer, 413)
            assert not slot.read_to_end().endswith(b"0\r\n\r\n")


# ---- The end of the hub ------------------------------------------------------------------------------


def test_idle_hub_ends_at_once_when_told_to_drain() -> None:
    with hub_process() as hub, dial(hub) as slot, Peer.connect(hub.main) as consumer:
        hub.terminate()
        assert hub.wait() == 0
        slot.expect_eof()
        consumer.expect_eof()


def test_draining_hub_finishes_what_it_has_and_takes_no_more() -> None:
    with hub_process() as hub, dial(hub) as slot, dial(hub) as idle_slot:
        with contextlib.ExitStack() as stack:
            idle = stack.enter_context(Peer.connect(hub.main))
            runs, waits, late = (stack.enter_context(ask(hub, b"")) for _ in range(3))
            runs.send(get(b"/runs"))
            idle_slot.read_request()
            idle_slot.send(b"HTTP/1.1 200 OK\r\n")
            late.send(get(b"/late")[:-1])
            hub.until(lambda stats: stats["requests_in_flight"] == 1)
            other = stack.enter_context(ask(hub, get(b"/other")))
            slot.read_request()
            waits.send(get(b"/waits"))
            until_queued(hub, 1)
            hub.terminate()
            idle.expect_eof()
            with Peer.connect(hub.admin) as admin:
                admin.send(get(b"/readyz", host=b"localhost") + get(b"/livez", host=b"localhost"))
                assert admin.read_response().status == 503
                assert admin.read_response().status == 200
            with pytest.raises(ConnectionRefusedError):
                Peer.connect(hub.main)
            late.send(b"\n")
            assert read_refusal(late, 503).value(b"Retry-After")
            assert logged(hub, path="/late")["code"] == "DR"
            slot.send(OK)
            assert serve(slot).target == b"/waits"
            idle_slot.send(b"Content-Length: 2\r\n\r\nok")
            for consumer in (runs, waits, other):
                response = consumer.read_response()
                assert (response.body, response.value(b"Connection")) == (b"ok", b"close")
                consumer.expect_eof()
            assert hub.wait() == 0
    assert [logged(hub, path=path)["code"] for path in ("/runs", "/waits", "/other")] == ["OK"] * 3


def test_draining_hub_waits_until_the_consumer_has_read() -> None:
    body = noise(24 * MIB)
    with hub_process() as hub, dial(hub) as slot, ask(hub, get(b"/slow-reader")) as consumer:
        serve(slot, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        hub.until(lambda stats: stats["slots"]["idle"] == 1)
        hub.terminate()
        hub.wait_for_error(lambda line: "draining" in line)
        assert consumer.read_response().body == body
        assert hub.wait() == 0


@pytest.mark.parametrize(
    "signals", [[], [signal.SIGTERM], [signal.SIGINT]], ids=["timeout", "second TERM", "INT"]
)
def test_drain_that_is_cut_short_answers_what_is_left_and_says_so(signals: list[signal.Signals]) -> None:
    with hub_process("--graceful-timeout", "150ms" if not signals else "1h") as hub, dial(hub) as slot:
        with ask(hub, get(b"/runs")) as runs, ask(hub, get(b"/waits")) as waits:
            slot.read_request()
            until_queued(hub, 1)
            hub.terminate()
            hub.wait_for_error(lambda line: "draining" in line)
            for number in signals:
                hub.send_signal(number)
            assert hub.wait() == 1
            for consumer in (runs, waits):
                refusal = read_refusal(consumer, 503)
                assert refusal.value(b"Retry-After")
                assert refusal.value(b"Connection") == b"close"
            slot.expect_eof()
    assert [logged(hub, path=path)["code"] for path in ("/runs", "/waits")] == ["DR", "DR"]


def test_response_that_is_cut_by_the_end_of_the_hub_does_not_look_whole() -> None:
    with hub_process() as hub, dial(hub) as slot:
        with relayed(hub, slot, get(b"/runs"), CHUNKED_RESPONSE + b"1\r\nx\r\n") as consumer:
            consumer.read_until(b"\r\nx\r\n")
            hub.send_signal(signal.SIGINT)
            assert hub.wait() == 1
            with pytest.raises(ConnectionResetError):
                consumer.sock.recv(1)


def test_interrupted_hub_ends_quietly() -> None:
    with hub_process() as hub, dial(hub):
        hub.send_signal(signal.SIGINT)
        assert hub.wait() == 0
        assert "Traceback" not in hub.stderr and "KeyboardInterrupt" not in hub.stderr


def test_hang_up_signal_changes_nothing() -> None:
    with hub_process() as hub, dial(hub) as slot:
        hub.process.send_signal(signal.SIGHUP)
        forwarded(hub, slot, get(b"/"))


# ---- The access log ----------------------------------------------------------------------------------


def test_access_log_tells_everything_but_the_query(hub: HubProcess, slot: Peer) -> None:
    request = post(b"/logged?secret=1", b"12345", b"X-Request-Id: logged-1")
    with ask(hub, request) as consumer:
        serve(slot, CHUNKED_RESPONSE + chunked(b"abc"))
        consumer.read_response()
        address = text(consumer.address)
    entry = logged(hub, id="logged-1")
    times = [float(entry.pop(name)) for name in ("queued_ms", "worker_ms", "total_ms")]
    assert times[0] + times[1] <= times[2] + 0.2
    assert entry.pop("time").startswith("20")
    assert entry == {
        "id": "logged-1", "consumer": address, "method": "POST", "path": "/logged", "status": "200",
        "bytes_in": "5", "bytes_out": "3", "worker": text(slot.address), "attempts": "1", "code": "OK",
        "detail": None,
    }  # fmt: skip
    assert not [line for line in hub.lines if "secret" in line]


def test_access_log_in_json_has_the_same_fields() -> None:
    with hub_process("--log-format", "json", "--max-request-body", "9") as hub, dial(hub) as slot:
        with ask(hub, post(b"/logged?secret=1", b"12345", b"X-Request-Id: logged-1")) as consumer:
            serve(slot)
            consumer.read_response()
            address = text(consumer.address)
        entry = json.loads(hub.wait_for_line(lambda line: '"logged-1"' in line))
        assert list(entry) == list(LOG_LINE.groupindex)[:-1]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
        assert all(isinstance(entry[name], float) for name in ("queued_ms", "worker_ms", "total_ms"))
        for name in ("time", "queued_ms", "worker_ms", "total_ms"):
            del entry[name]
        assert entry == {
            "id": "logged-1", "consumer": address, "method": "POST", "path": "/logged", "status": 200,
            "bytes_in": 5, "bytes_out": 2, "worker": text(slot.address), "attempts": 1, "code": "OK",
        }  # fmt: skip
        with ask(hub, b'GET /"\\ \n') as consumer:
            read_refusal(consumer, 400)
        refused = json.loads(hub.wait_for_line(lambda line: '"RQ"' in line))
        assert (refused["method"], refused["path"], refused["status"]) == ("-", "-", 400)
        assert refused["detail"]


def test_each_request_is_logged_once(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, get(b"/logged-once") * 3) as consumer:
        for _ in range(3):
            serve(slot)
            consumer.read_response()
    with relayed(hub, slot, get(b"/last"), OK) as consumer:
        consumer.read_response()
    logged(hub, path="/last")
    assert count_logged(hub, "/logged-once") == 3


# ---- The admin port ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes, status, body",
    [
        (get(b"/livez", host=b"localhost"), 200, b"ok\n"),
        (get(b"/readyz?verbose", host=b"localhost"), 200, b"ok\n"),
        (get(b"/readyz", method=b"HEAD", host=b"localhost"), 200, b""),
        (get(b"/nowhere", host=b"localhost"), 404, None),
        (get(b"/livez", method=b"POST", host=b"localhost"), 405, None),
    ],
)
def test_admin_port_answers_and_keeps_the_connection(
    hub: HubProcess, request_bytes: bytes, status: int, body: bytes | None
) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(request_bytes * 2)
        for _ in range(2):
            response = admin.read_response(request_bytes.partition(b" ")[0])
            assert response.status == status
            assert body is None or response.body == body
            if status == 405:
                assert response.value(b"Allow") == b"GET, HEAD"


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"garbage\r\n\r\n", 400),
        (b"\x16\x03\x01", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"x" * 70_000, 414),
        (post(b"/stats", b"x" * 100_000), 413),
        (get(b"/stats", b"Content-Length: 9999999999999999999999"), 413),
        (get(b"/", method=b"TRACE"), 405),
    ],
)
def test_admin_port_refuses_nonsense_and_closes(hub: HubProcess, request_bytes: bytes, status: int) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(request_bytes)
        response = admin.read_response()
        assert (response.status, response.value(b"Connection")) == (status, b"close")
        admin.expect_eof()
    assert hub.stats()["draining"] is False


def test_admin_connections_that_break_off_hurt_nobody(hub: HubProcess, slot: Peer) -> None:
    with Peer.connect(hub.admin), Peer.connect(hub.admin) as half, Peer.connect(hub.admin) as broken:
        half.send(b"GET /sta")
        broken.send(get(b"/stats", host=b"localhost") * 200)
        broken.reset()
        forwarded(hub, slot, get(b"/"))
        half.send(b"ts HTTP/1.0\r\n\r\n")
        assert half.read_response().status == 200
        half.expect_eof()


def test_stats_tell_who_waits_and_who_runs(hub: HubProcess, slot: Peer) -> None:
    with ask(hub, get(b"/runs?secret", b"X-Request-Id: r1")) as runs:
        slot.read_request()
        with ask(hub, post(b"/waits", b"", b"X-Request-Id: w1")) as waits:
            until_queued(hub, 1)
            stats = hub.stats()
            assert (stats["queue_length"], stats["requests_in_flight"], stats["demand"]) == (1, 1, 2)
            assert stats["slots"] == {"idle": 0, "busy": 1}
            assert (stats["draining"], stats["version"]) == (False, pothead.__version__)
            assert 0 <= stats["queue_oldest_seconds"] <= stats["uptime_seconds"]
            (running,), (waiting,), (worker,) = stats["running"], stats["waiting"], stats["workers"]
            assert (running["id"], running["path"], running["worker"]) == ("r1", "/runs", text(slot.address))
            assert (waiting["id"], waiting["method"], waiting["consumer"]) == (
                "w1",
                "POST",
                text(waits.address),
            )
            assert (worker["address"], worker["state"]) == (text(slot.address), "busy")
            slot.send(OK)
            runs.read_response()
            serve(slot)
            waits.read_response()
    stats = hub.until(lambda stats: stats["slots"]["idle"] == 1)
    assert stats["workers"][0]["served"] == 2
    assert stats["running"] == stats["waiting"] == []


def test_stats_count_every_exchange_by_its_outcome() -> None:
    with hub_process("--max-queue", "1") as hub:
        with ask(hub, post(b"/", b"12")) as consumer, dial(hub) as slot:
            serve(slot)
            consumer.read_response()
            consumer.send(post(b"/", b""))
            slot.read_request()
            slot.close()
            consumer.read_response()
        with ask(hub, get(b"/waits")):
            until_queued(hub, 1)
            with ask(hub, get(b"/")) as consumer:
                consumer.read_response()
            with ask(hub, b"garbage\r\n") as consumer:
                read_refusal(consumer, 400)
        stats = hub.until(lambda stats: stats["demand"] == 0)
    assert {code: count for code, count in stats["outcomes"].items() if count} == {
        "OK": 1, "WL": 1, "QF": 1, "RQ": 1, "CQ": 1,
    }  # fmt: skip
    assert stats["bytes"] == {"in": 2, "out": 2}


def test_admin_port_can_be_switched_off() -> None:
    with hub_process("--admin-port", "off") as hub, ask(hub, get(b"/")) as consumer:
        with Peer.connect(hub.worker) as slot:
            serve(slot)
            assert consumer.read_response().status == 200
        assert not [line for line in hub.lines if "admin" in line]
