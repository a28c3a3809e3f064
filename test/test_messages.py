"""Heads and bodies: the golden messages, whole and in every kind of pieces, and the readers one by one.

Adding a case is adding a file to test/golden. Its header says what must come of the message, the lines after
the empty line are the message: Python escapes, joined without the file's own line ends.
"""

from __future__ import annotations

import http.client
import random
import re
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

import pothead
from pothead import (
    LIMITS,
    ChunkedBody,
    FixedBody,
    Inbuf,
    MessageReader,
    ProtocolError,
    UntilCloseBody,
    chunk,
    forwarded_request,
    forwarded_response,
    http_date,
    own_response,
    request_body,
    response_body,
    take_request_head,
    take_response_head,
)

GOLDEN = Path(__file__).parent / "golden"
ESCAPED = ("method", "target", "host", "body", "rest", "max-forwards")
Reading = dict[str, object]


# ---- The golden messages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A message and the reading that must come of it, as far as its file says."""

    kind: str
    name: str
    wanted: Reading
    request_method: bytes
    message: bytes


def load_cases(kind: str) -> list[Case]:
    return [load_case(kind, path) for path in sorted((GOLDEN / kind).glob("*.txt"))]


def load_case(kind: str, path: Path) -> Case:
    header, _, lines = path.read_text("utf-8").partition("\n\n")
    wanted: Reading = {}
    for line in header.splitlines():
        name, _, value = line.partition(":")
        wanted[name] = unescape(value.strip()) if name in ESCAPED else value.strip()
    assert wanted.pop("about"), f"{path} does not say what it is about"
    if wanted["expect"] == "forward":
        wanted = {"body": b"", "rest": b""} | wanted
    request_method = str(wanted.pop("request", "GET")).encode()
    return Case(kind, path.stem, wanted, request_method, unescape(lines.replace("\n", "")))


def unescape(text: str) -> bytes:
    return text.encode("ascii").decode("unicode_escape").encode("latin-1")


def read_case(case: Case, pieces: Iterable[bytes]) -> Reading:
    if case.kind == "requests":
        return read_request(pieces)
    return read_response(pieces, case.request_method)


def read_request(pieces: Iterable[bytes]) -> Reading:
    """Return what the hub makes of a request that arrives in `pieces`."""
    return read_message(pieces, take_request_head, request_body, "incomplete")


def read_response(pieces: Iterable[bytes], request_method: bytes) -> Reading:
    """Return what the hub makes of a worker's answer that arrives in `pieces` and ends with EOF."""

    def make_body(head: pothead.ResponseHead) -> pothead.BodyReader | None:
        return response_body(head, request_method)

    return read_message(pieces, take_response_head, make_body, "cut off")


def read_message(
    pieces: Iterable[bytes], take_head: Callable, make_body: Callable, cut_short: str
) -> Reading:
    reader = MessageReader(take_head, make_body)
    head, body, content, is_over = None, None, bytearray(), False
    try:
        for piece in pieces:
            reader.feed(memoryview(piece))
            while not is_over and (event := next_event(reader)) is not None:
                is_over = event is pothead.END
                if head is None:
                    head, body = event, make_body(event) and reader.body
                elif not is_over:
                    content += event
    except ProtocolError as exc:
        assert exc.detail, "a refusal says why"
        return {"expect": f"refuse {exc.status}"}
    if head is None:
        return {"expect": "incomplete"}
    try:
        reader.end()
    except ProtocolError:
        return {"expect": cut_short}
    framing = name_framing(head, body)
    reading = {"expect": "forward", "framing": framing, "body": bytes(content), "rest": bytes(reader.inbuf)}
    return reading | describe_head(head)


def next_event(reader: MessageReader) -> object:
    """Return what comes next, in whichever turn of the loop."""
    while (event := reader.next()) is None and reader.stopped:
        reader.feed(pothead.NO_BYTES)
    return event


def name_framing(head: object, body: object) -> str:
    if isinstance(body, ChunkedBody):
        return "chunked"
    if isinstance(body, UntilCloseBody):
        return "until-close"
    return f"fixed {head.content_length}" if isinstance(body, FixedBody) and head.content_length else "none"


def describe_head(head: object) -> Reading:
    reading: Reading = {"keep-alive": "yes" if head.keep_alive else "no"}
    if isinstance(head, pothead.ResponseHead):
        return reading | {"status": str(head.status)}
    reading |= {"method": head.method, "target": head.target, "host": head.host}
    sent = re.search(rb"\r\nMax-Forwards: (.*)\r\n", forwarded_request(head, None, b""))
    if sent is not None:
        reading["max-forwards"] = sent[1]
    return reading | {"expects-continue": "yes" if head.expects_continue else "no"}


def split_into_lines(message: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", message)


def split_into_bytes(message: bytes) -> list[bytes]:
    return [message[i : i + 1] for i in range(len(message))]


def split_at_random(message: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.sample(range(len(message) + 1), min(len(message), rng.randint(1, 8))))
    return [message[start:end] for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True)]


def every_split(case: Case) -> list[list[bytes]]:
    rng = random.Random(zlib.crc32(case.name.encode()))
    fixed = [[case.message], split_into_lines(case.message), split_into_bytes(case.message)]
    return fixed + [split_at_random(case.message, rng) for _ in range(8)]


CASES = load_cases("requests") + load_cases("responses")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}/{case.name}")
def test_golden_message_is_read_as_its_file_says_however_it_is_split(case: Case) -> None:
    for pieces in every_split(case):
        reading = read_case(case, pieces)
        known = {name: reading.get(name) for name in case.wanted}
        assert known == case.wanted, f"split into {pieces!r}"


@pytest.mark.parametrize("kind", ["requests", "responses"])
def test_damaged_message_is_read_the_same_way_however_it_is_split(kind: str) -> None:
    """Damage may give any reading, but never one that depends on the pieces, nor another exception.

    Only the status of a refusal may: of two faults, the first may be seen before the second comes.
    """
    rng = random.Random(kind)
    cases = [case for case in CASES if case.kind == kind]
    for _ in range(2000):
        case = rng.choice(cases)
        damaged = damage(case.message, rng)
        whole = without_status(read_case(case, [damaged]))
        for pieces in (split_into_bytes(damaged), split_at_random(damaged, rng)):
            assert without_status(read_case(case, pieces)) == whole, f"{damaged!r} split into {pieces!r}"


def without_status(reading: Reading) -> Reading:
    return {"expect": "refuse"} if str(reading["expect"]).startswith("refuse") else reading


NASTY = (b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"\xff", b'"', b"x")


def damage(message: bytes, rng: random.Random) -> bytes:
    """Return `message` with one to three small edits of the kind that attackers make."""
    data = bytearray(message)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randint(0, 2)] = rng.choice(NASTY)
    return bytes(data)


# ---- Heads -------------------------------------------------------------------------------------------


def request(*field_lines: bytes, line: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"".join(part + b"\r\n" for part in (line, b"Host: a", *field_lines, b""))


def test_fields_keep_their_order_their_case_and_their_repetitions() -> None:
    head = take_request_head(Inbuf(request(b"X-b:  1\t", b"x-A: 2, 3", b"X-B:", b"Cookie: a=b; c=\xe9")))
    assert head.forwarded.split(b"\r\n") == [
        b"GET / HTTP/1.1",
        b"Host: a",
        b"X-b: 1",
        b"x-A: 2, 3",
        b"X-B: ",
        b"Cookie: a=b; c=\xe9",
        b"",
    ]


def test_response_head_keeps_status_reason_and_every_cookie() -> None:
    buffer = Inbuf(b"HTTP/1.0 404 Not here\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\nbody")
    head = take_response_head(buffer)
    assert head.status == 404
    assert head.forwarded == b"HTTP/1.1 404 Not here\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
    assert buffer == b"body"


def test_framing_of_a_request_is_told_by_its_head() -> None:
    assert take_request_head(Inbuf(request(b"Content-Length: 7"))).content_length == 7
    assert take_request_head(Inbuf(request(b"Transfer-Encoding: chunked"))).is_chunked
    head = take_request_head(Inbuf(request()))
    assert head.content_length is None and not head.is_chunked and request_body(head) is None


@pytest.mark.parametrize(("version", "minor"), [(b"1.0", 0), (b"1.1", 1)])
def test_minor_version_of_a_request_is_kept(version: bytes, minor: int) -> None:
    assert take_request_head(Inbuf(request(line=b"GET / HTTP/" + version))).minor_version == minor


def test_incomplete_head_stays_in_the_buffer() -> None:
    buffer = Inbuf(request()[:-1])
    assert take_request_head(buffer) is None
    assert buffer == request()[:-1]
    buffer += b"\n"
    assert take_request_head(buffer).target == b"/"
    assert buffer == b""


def test_pipelined_requests_are_taken_one_by_one() -> None:
    buffer = Inbuf(b"".join(request(line=b"GET /%d HTTP/1.1" % i) for i in range(100)))
    assert [take_request_head(buffer).target for _ in range(100)] == [b"/%d" % i for i in range(100)]
    assert take_request_head(buffer) is None


def test_refusal_is_an_http_exception_with_its_status_and_reason() -> None:
    with pytest.raises(http.client.HTTPException) as caught:
        take_request_head(Inbuf(b"\0"))
    assert isinstance(caught.value, ProtocolError)
    assert caught.value.status == 400
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param(b"\x16\x03\x01", id="tls"),
        pytest.param(b"GET /\0", id="nul"),
        pytest.param(b"GET / HTTP/1.1\n", id="bare-lf"),
        pytest.param(b"GET / HTTP/1.1\rX", id="bare-cr"),
        pytest.param(b"GET /\r\n", id="http-0-9"),
        pytest.param(b"GET / HTTP/1.1\r\nX: a\x01", id="control-character"),
    ],
)
def test_head_that_cannot_become_valid_is_refused_before_its_end(beginning: bytes) -> None:
    assert read_request([beginning]) == {"expect": "refuse 400"}


# ---- Limits ------------------------------------------------------------------------------------------

LONG = b"a" * 70000


@pytest.mark.parametrize("target_bytes", [1000, 8000])
def test_request_line_within_the_limit_is_read(target_bytes: int) -> None:
    target = b"/" + LONG[:target_bytes]
    assert read_request([request(line=b"GET %b HTTP/1.1" % target)])["target"] == target


def test_request_line_beyond_the_limit_gives_414_even_if_it_never_ends() -> None:
    line = b"GET /" + LONG[: 9 * 1024]
    assert read_request([line + b" HTTP/1.1\r\nHost: a\r\n\r\n"]) == {"expect": "refuse 414"}
    assert read_request([line]) == {"expect": "refuse 414"}


def test_head_within_the_limit_is_read() -> None:
    assert read_request([request(b"X: " + LONG[: 31 * 1024])])["expect"] == "forward"


def test_head_beyond_the_limit_gives_431_even_if_it_never_ends() -> None:
    message = request(b"X: " + LONG[: 33 * 1024])
    assert read_request([message]) == {"expect": "refuse 431"}
    assert read_request([message[:-4]]) == {"expect": "refuse 431"}


def test_many_fields_are_read_up_to_a_limit_and_then_give_431() -> None:
    fields = [b"X-%d: y" % i for i in range(100)]
    assert read_request([request(*fields[:99])])["expect"] == "forward"
    assert read_request([request(*fields)]) == {"expect": "refuse 431"}


def test_head_of_a_response_beyond_the_limit_gives_502() -> None:
    message = b"HTTP/1.1 200 OK\r\nX: " + LONG
    assert read_response([message], b"GET") == {"expect": "refuse 502"}


def test_empty_lines_before_a_request_do_not_pile_up() -> None:
    buffer = Inbuf(b"\r\n" * 70000)
    assert take_request_head(buffer) is None
    assert buffer == b""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"5;" + LONG[:1100] + b"\r\nhello\r\n0\r\n\r\n", 400, id="extension"),
        pytest.param(b"5;" + LONG[:1100], 400, id="extension-without-end"),
        pytest.param(b"0" * 1100, 400, id="zeros-without-end"),
        pytest.param(b"0\r\nX: " + LONG[:9000] + b"\r\n\r\n", 431, id="trailer"),
        pytest.param(b"0\r\nX: " + LONG[:9000], 431, id="trailer-without-end"),
        pytest.param(b"0\r\n" + b"X: y\r\n" * 2000, 431, id="trailers"),
    ],
)
def test_chunk_lines_and_trailers_beyond_their_limits_are_refused(body: bytes, status: int) -> None:
    message = request(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.1") + body
    for pieces in ([message], split_into_bytes(message)):
        assert read_request(pieces) == {"expect": f"refuse {status}"}


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(request(b"Content-Length: " + b"," * 30000), id="commas"),
        pytest.param(request(b"Content-Length: 5" + b", 5" * 10000), id="lengths"),
        pytest.param(request(b"Content-Length: 5" + b" \t" * 15000 + b"x"), id="white-space"),
        pytest.param(request(b"Transfer-Encoding: " + b"chunked ," * 3000), id="codings"),
        pytest.param(request(b"Connection: " + b", ," * 10000), id="options"),
        pytest.param(request(b"Expect: " + b" \t," * 10000), id="expectations"),
        pytest.param(request(b"X:" + b" \t" * 15000 + b"\x01"), id="value"),
        pytest.param(request(b"a" * 30000 + b" : y"), id="name"),
        pytest.param(request(line=b"GET http://" + b"[:" * 4000 + b" HTTP/1.1"), id="authority"),
        pytest.param(request(line=b"GET " + b" " * 8000 + b"HTTP/1.1"), id="line"),
    ],
)
def test_hostile_repetition_costs_no_more_than_other_bytes(message: bytes) -> None:
    """A regular expression with nested repeats would take years here (waitress GHSA-73m2-3pwg-5fgc)."""
    began = time.process_time()
    read_request([message])
    assert time.process_time() - began < 1.0


def test_head_that_drips_costs_linear_time() -> None:
    """Looking through the whole buffer again for every byte would be 32 KiB squared."""
    began = time.process_time()
    assert read_request(split_into_bytes(request(b"X: " + LONG[: 31 * 1024])))["expect"] == "forward"
    assert time.process_time() - began < 1.0


# ---- Bodies ------------------------------------------------------------------------------------------

CHUNKED_HELLO = b"5\r\nhello\r\n0\r\n\r\n"


def test_fixed_body_takes_its_length_and_leaves_the_rest() -> None:
    body, buffer = FixedBody(5), Inbuf(b"hel")
    assert (body.take(buffer), body.done) == (b"hel", False)
    buffer += b"lo, world"
    assert (body.take(buffer), body.done) == (b"lo", True)
    assert buffer == b", world"


def test_fixed_body_of_no_bytes_is_done_at_once() -> None:
    assert FixedBody(0).done


def test_fixed_body_may_end_only_when_it_is_whole() -> None:
    body, buffer = FixedBody(5), Inbuf(b"hell")
    body.take(buffer)
    with pytest.raises(ProtocolError):
        body.on_eof()
    buffer += b"o"
    body.take(buffer)
    body.on_eof()
    assert body.done


def test_body_until_close_takes_everything_and_may_end_anywhere() -> None:
    body, buffer = UntilCloseBody(), Inbuf(b"hello\r\n\r\n")
    assert (body.take(buffer), body.done, buffer) == (b"hello\r\n\r\n", False, b"")
    body.on_eof()


def test_chunk_is_passed_on_before_it_is_whole() -> None:
    """An event stream must not wait for the rest of a chunk, nor a large chunk pile up in the buffer."""
    body, buffer = ChunkedBody(), Inbuf(b"ffffff\r\nhello")
    assert body.take(buffer) == b"hello"
    assert buffer == b""


@pytest.mark.parametrize("length", range(len(CHUNKED_HELLO) + 1))
def test_chunked_body_may_end_only_after_its_last_byte(length: int) -> None:
    body = ChunkedBody()
    body.take(Inbuf(CHUNKED_HELLO[:length]))
    if length == len(CHUNKED_HELLO):
        body.on_eof()
    else:
        with pytest.raises(ProtocolError):
            body.on_eof()
    assert body.done == (length == len(CHUNKED_HELLO))


def test_refusal_of_a_chunk_carries_the_status_of_the_side_it_came_from() -> None:
    for body, status in ((ChunkedBody(), 400), (ChunkedBody(status=502), 502)):
        with pytest.raises(ProtocolError) as caught:
            body.take(Inbuf(b"x\r\n"))
        assert caught.value.status == status


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 64, 5000])
def test_chunked_body_of_random_chunks_is_decoded_whatever_the_pieces(piece_bytes: int) -> None:
    rng = random.Random(piece_bytes)
    chunks = [rng.randbytes(rng.randint(1, 300)) for _ in range(40)]
    coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\nrest"
    body, buffer, content = ChunkedBody(), Inbuf(), b""
    for start in range(0, len(coded), piece_bytes):
        buffer += coded[start : start + piece_bytes]
        content += b"" if body.done else body.take(buffer)
    assert content == b"".join(chunks)
    assert body.done and buffer == b"rest"


def take_all(body: ChunkedBody, buffer: Inbuf) -> bytes:
    """Take what is there as the loop does, turn by turn."""
    content = body.take(buffer)
    while body.stopped:
        content += body.take(buffer)
    return content


def test_tiny_chunks_are_taken_a_bounded_number_at_a_time() -> None:
    body, buffer = ChunkedBody(), Inbuf(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    takes = []
    while not body.done:
        takes.append(len(body.take(buffer)))
        assert body.stopped is not body.done
    assert sum(takes) == 1000
    assert max(takes) <= LIMITS.chunks_a_turn + 1


def test_body_that_waits_for_more_has_not_stopped_by_itself() -> None:
    body, buffer = ChunkedBody(), Inbuf(b"1\r\nx\r\n2\r\nx")
    assert body.take(buffer) == b"xx"
    assert not body.stopped and buffer == b""
    buffer += b"x\r\n5"
    assert (body.take(buffer), body.stopped, buffer) == (b"x", False, b"5")


def test_many_tiny_chunks_in_one_piece_cost_linear_time() -> None:
    """Removing each chunk from the front of the buffer by itself would move the whole buffer each time."""
    body, buffer = ChunkedBody(), Inbuf(b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n")
    began = time.process_time()
    assert take_all(body, buffer) == b"x" * 200_000
    assert body.done
    assert time.process_time() - began < 2.0


def test_tiny_chunk_costs_less_than_a_step_for_each_of_its_parts() -> None:
    """Chunks with an extension are read part by part; those without, which everybody sends, by a pattern."""

    def cost_s(chunk: bytes) -> float:
        buffer = Inbuf(chunk * 20_000)
        began = time.process_time()
        take_all(ChunkedBody(), buffer)
        return time.process_time() - began

    ratios = [cost_s(b"1;x\r\nx\r\n") / cost_s(b"1\r\nx\r\n") for _ in range(5)]
    assert sorted(ratios)[2] > 2.5, ratios


LONG_EXTENSION = b"1;a=%b\r\nx\r\n" % (b"b" * 1000)


@pytest.mark.parametrize(
    ("chunk", "status"),
    [(b"1\r\nx\r\n", 400), (b"01\r\nx\r\n", 400), (LONG_EXTENSION, 400), (LONG_EXTENSION, 502)],
    ids=["a byte each", "with zeros", "long extensions", "long extensions of a response"],
)
def test_chunks_whose_framing_outweighs_their_bytes_are_refused(chunk: bytes, status: int) -> None:
    body, buffer = ChunkedBody(status), Inbuf(chunk * 2 * (LIMITS.framing_bytes // (len(chunk) - 5)))
    taken = 0
    with pytest.raises(pothead.ProtocolError, match="more framing than bytes") as caught:
        while True:
            taken += len(body.take(buffer))
    assert caught.value.status == status
    last_take = (LIMITS.chunks_a_turn + 1) * len(chunk)
    assert LIMITS.framing_bytes - last_take <= taken * (len(chunk) - 5) <= LIMITS.framing_bytes


@pytest.mark.parametrize(
    ("status", "data"), [(400, b"12345678"), (502, b"x")], ids=["a request", "a response, byte by byte"]
)
def test_chunks_of_a_reasonable_size_may_go_on_for_ever(status: int, data: bytes) -> None:
    body, chunk = ChunkedBody(status), b"%x\r\n%b\r\n" % (len(data), data)
    for _ in range(200):
        assert take_all(body, Inbuf(chunk * 1000)) == data * 1000


@pytest.mark.parametrize("name", [b"Connection", b"Content-Length", b"Transfer-Encoding"])
def test_list_with_endless_members_is_refused(name: bytes) -> None:
    with pytest.raises(ProtocolError, match="of more than 100 members"):
        take_request_head(Inbuf(request(name + b": 1" + b",1" * 101)))


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"GET http://%b/ HTTP/1.1" % (b"a" * 2000)])
def test_host_that_is_no_name_any_more_is_refused(line: bytes) -> None:
    """It goes to the worker twice, whose heads have a limit, too."""
    with pytest.raises(ProtocolError) as caught:
        take_request_head(Inbuf(line + b"\r\nHost: %b\r\n\r\n" % (b"a" * 2000)))
    assert caught.value.status == 400


def test_empty_lines_before_a_request_cost_linear_time() -> None:
    buffer = Inbuf(b"\r\n" * 500_000)
    began = time.process_time()
    assert take_request_head(buffer) is None and buffer == b""
    assert time.process_time() - began < 0.2


def test_large_heads_use_up_the_share_of_a_turn_sooner() -> None:
    def taken(head: bytes) -> int:
        reader = MessageReader(take_response_head, lambda head: None)
        reader.feed(memoryview(head * 10))
        return sum(event is not pothead.END for event in iter(reader.next, None))

    assert taken(b"HTTP/1.1 103 Hint\r\n\r\n") == LIMITS.heads_a_turn
    assert taken(b"HTTP/1.1 103 Hint\r\nX: %b\r\n\r\n" % (b"x" * 31_000)) == 2


@pytest.mark.parametrize(
    "extension", [b";a", b";a=b", b' ; a = "b"', b";" + b"a" * 300, b' ; a = "' + b"\\a" * 100, b"  \t" * 99]
)
def test_malformed_extensions_cost_linear_time(extension: bytes) -> None:
    line = (b"1" + extension * (1000 // len(extension)))[:1000] + b"@\r\n"
    began = time.process_time()
    for _ in range(300):
        with pytest.raises(ProtocolError):
            ChunkedBody().take(Inbuf(line))
    assert time.process_time() - began < 2.0


# ---- What is forwarded -------------------------------------------------------------------------------


def forward_request(message: bytes, length: int | None = None, hub_fields: bytes = b"") -> list[bytes]:
    """Return the lines that a worker gets for a head."""
    return forwarded_request(take_request_head(Inbuf(message)), length, hub_fields).split(b"\r\n")


def forward_response(
    message: bytes, connection: bytes = b"", request_id: bytes = b"", *, in_chunks: bool = False
) -> list[bytes]:
    """Return the lines that a consumer gets for a head."""
    head = take_response_head(Inbuf(message))
    now = 784111777.9
    return forwarded_response(head, connection, now, request_id, in_chunks=in_chunks).split(b"\r\n")


def test_end_to_end_fields_are_forwarded_as_they_came() -> None:
    fields = [b"Cookie: a=b", b"x-A: 1", b"X-a: 2", b"Authorization: Basic eHg="]
    assert forward_request(request(*fields)) == [b"GET / HTTP/1.1", b"Host: a", *fields, b"", b""]


@pytest.mark.parametrize(
    "field",
    [
        b"Connection: keep-alive",
        b"Keep-Alive: timeout=5",
        b"Proxy-Connection: keep-alive",
        b"TE: trailers",
        b"Trailer: X-Digest",
        b"Upgrade: h2c",
        b"Expect: 100-continue",
        b"Proxy-Authorization: Basic eHg=",
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        b"X-Forwarded-For: 192.0.2.1",
        b"X-FORWARDED-PROTO: https",
        b"X-Forwarded-Host: b",
        b"X-Request-Id: 1",
        b"X-Request-Start: t=1",
        b"Pothead-Attempt: 9",
        b"pothead-queue-seconds: 9",
    ],
)
def test_field_of_one_hop_or_of_the_hub_is_not_forwarded(field: bytes) -> None:
    assert forward_request(request(field)) == [b"GET / HTTP/1.1", b"Host: a", b"", b""]


def test_fields_named_by_connection_are_not_forwarded() -> None:
    named = [b"Connection: X-a, close", b"x-A: 1", b"connection: x-c", b"X-C: 3"]
    lines = forward_request(request(*named, b"X-ab: 2"))
    assert lines == [b"GET / HTTP/1.1", b"Host: a", b"X-ab: 2", b"", b""]


@pytest.mark.parametrize("name", [b"Host", b"Content-Length", b"X-Forwarded-For"])
def test_connection_cannot_take_away_what_the_hub_says(name: bytes) -> None:
    message = request(b"Connection: " + name, b"Content-Length: 5")
    lines = forward_request(message, 5, b"X-Forwarded-For: 192.0.2.1\r\n")
    assert lines[1:4] == [b"Host: a", b"Content-Length: 5", b"X-Forwarded-For: 192.0.2.1"]


def test_authority_of_the_target_replaces_the_host_field() -> None:
    lines = forward_request(request(line=b"GET http://b:80/c HTTP/1.0"))
    assert lines == [b"GET /c HTTP/1.1", b"Host: b:80", b"", b""]


def test_request_without_host_gets_an_empty_one() -> None:
    assert forward_request(b"GET / HTTP/1.0\r\n\r\n") == [b"GET / HTTP/1.1", b"Host: ", b"", b""]


def test_repeated_lengths_are_forwarded_as_one() -> None:
    lines = forward_request(request(b"Content-Length: 5, 5", b"content-length: 5"), 5)
    assert lines == [b"GET / HTTP/1.1", b"Host: a", b"Content-Length: 5", b"", b""]


def test_chunked_request_is_forwarded_with_the_length_it_turned_out_to_have() -> None:
    message = request(b"Transfer-Encoding: chunked")
    assert forward_request(message, 7)[2:] == [b"Content-Length: 7", b"", b""]
    assert forward_request(message)[2:] == [b"Transfer-Encoding: chunked", b"", b""]


def test_response_keeps_its_fields_and_every_cookie() -> None:
    fields = [b"Set-Cookie: a", b"Date: now", b"set-cookie: b", b"Content-Length: 5", b"", b""]
    lines = forward_response(b"\r\n".join([b"HTTP/1.0 404 Not here", *fields]))
    assert lines == [b"HTTP/1.1 404 Not here", *fields]


def test_response_without_date_gets_one() -> None:
    lines = forward_response(b"HTTP/1.1 200 OK\r\n\r\n")
    assert lines == [b"HTTP/1.1 200 OK", b"Date: Sun, 06 Nov 1994 08:49:37 GMT", b"", b""]


@pytest.mark.parametrize("own", [[], [b""], [b"own"], [b"own", b"own too"]])
def test_response_has_one_request_id(own: list[bytes]) -> None:
    fields = b"".join(b"X-REQUEST-ID: %b\r\n" % each for each in own)
    lines = forward_response(b"HTTP/1.1 200 OK\r\nDate: now\r\n%b\r\n" % fields, request_id=b"r1")
    wanted = b"own" if any(own) else b"r1"
    assert lines == [b"HTTP/1.1 200 OK", b"Date: now", b"X-Request-Id: " + wanted, b"", b""]


def test_fields_of_one_hop_are_not_forwarded_to_the_consumer() -> None:
    message = (
        b"HTTP/1.1 200 OK\r\nDate: now\r\nConnection: close, X-a\r\nX-A: 1\r\nKeep-Alive: timeout=5\r\n"
        b"Transfer-Encoding: chunked\r\nTrailer: X\r\nUpgrade: h2c\r\n\r\n"
    )
    assert forward_response(message, b"keep-alive", in_chunks=True) == [
        b"HTTP/1.1 200 OK", b"Date: now", b"Transfer-Encoding: chunked", b"Connection: keep-alive", b"", b"",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status_line", "lengths"),
    [
        pytest.param(b"204 No Content", 0, id="204 must not have one"),
        pytest.param(b"304 Not Modified", 1, id="304 tells that of the representation"),
        pytest.param(b"200 OK", 1, id="a response to HEAD too"),
    ],
)
def test_length_of_a_response_without_body(status_line: bytes, lengths: int) -> None:
    message = b"HTTP/1.1 %b\r\nContent-Length: 5\r\n\r\n" % status_line
    assert forward_response(message).count(b"Content-Length: 5") == lengths


def test_early_hints_are_forwarded_without_date_and_length() -> None:
    message = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    assert forward_response(message) == [b"HTTP/1.1 103 Early Hints", b"Link: </a>", b"", b""]


@pytest.mark.parametrize(
    ("method", "field", "is_idempotent"),
    [
        (b"GET", b"X: y", True),
        (b"HEAD", b"X: y", True),
        (b"PUT", b"X: y", True),
        (b"DELETE", b"X: y", True),
        (b"OPTIONS", b"X: y", True),
        (b"POST", b"X: y", False),
        (b"PATCH", b"X: y", False),
        (b"get", b"X: y", False),
        (b"POST", b"idempotency-key: 1", True),
    ],
)
def test_request_may_be_repeated_if_its_method_or_its_sender_says_so(
    method: bytes, field: bytes, is_idempotent: bool
) -> None:
    head = take_request_head(Inbuf(request(field, line=method + b" / HTTP/1.1")))
    assert head.is_idempotent == is_idempotent


def test_path_of_a_request_is_its_target_without_the_query() -> None:
    assert take_request_head(Inbuf(request(line=b"GET /a/b?token=c?d HTTP/1.1"))).path == b"/a/b"


# ---- What the hub writes itself ----------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"x", bytes(255), memoryview(bytearray(b"hello"))])
def test_chunk_is_read_back_by_the_reader_of_chunks(data: bytes) -> None:
    body = ChunkedBody()
    assert body.take(Inbuf(chunk(data) + pothead.LAST_CHUNK)) == bytes(data)
    assert body.done


@pytest.mark.parametrize(
    ("epoch_s", "text"),
    [
        (784111777, b"Sun, 06 Nov 1994 08:49:37 GMT"),
        (0, b"Thu, 01 Jan 1970 00:00:00 GMT"),
        (1709164800, b"Thu, 29 Feb 2024 00:00:00 GMT"),
    ],
)
def test_date_is_written_as_http_has_it(epoch_s: int, text: bytes) -> None:
    assert http_date(epoch_s) == text


@pytest.mark.parametrize("keep_alive", [True, False])
def test_response_of_the_hub_is_a_valid_response(keep_alive: bool) -> None:
    buffer = Inbuf(own_response(503, b"later\n", fields=((b"Retry-After", b"7"),), keep_alive=keep_alive))
    head = take_response_head(buffer)
    assert (head.status, head.forwarded[:34]) == (503, b"HTTP/1.1 503 Service Unavailable\r\n")
    assert (head.content_length, head.keep_alive) == (6, keep_alive)
    assert b"\r\nRetry-After: 7\r\n" in head.forwarded
    assert buffer == b"later\n"


def test_response_of_the_hub_to_head_tells_the_length_without_the_body() -> None:
    assert own_response(404, b"nothing\n", keep_alive=True, with_body=False).endswith(b"\r\n\r\n")
