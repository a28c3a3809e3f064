"""Random damage to the golden messages: no reading may depend on the pieces, or mean two things.

    python3 bench/fuzz.py [--seconds 30] [--cases N] [--seed 1] [--only pure|hub]

The **pure** part gives damaged messages to the functions that read heads and bodies.  The outcome is a
head, a ``ProtocolError`` or "more", nothing else, and the same however the message is split; and what would
be forwarded is read again by the strict reader of ``test/wire.py``, which must find the same request or
response in it.  The **hub** part sends them to a running hub, requests from a consumer and responses from a
slot: each must come out at the other end as that strict reader's same message, or be refused, or break off.

Each case has a number, and its damage depends on nothing but the seed and that number:
``--first N --cases 1`` repeats it.  Loopback only, bounded by its options; exits with 1 at the first wrong
outcome, and prints it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import pathlib
import random
import select
import sys
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from test_messages import (  # noqa: E402
    Case,
    Reading,
    load_cases,
    read_case,
    split_at_random,
    split_into_bytes,
    without_status,
)

import pothead  # noqa: E402 (found by the line above)
import wire  # noqa: E402

NASTY = (
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"-", b"_", b"+",
    b"\xff", b'"', b"x", b"/", b"%", b"chunked", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Host: a\r\n", b"Connection: close\r\n", b"HTTP/1.1", b"HTTP/1.0", b" 200 OK", b"0\r\n\r\n", b"hello",
)  # fmt: skip


class WrongError(Exception):
    """An outcome that must not be."""


class Recorded(wire.Peer):
    """The strict reader over bytes that are all there."""

    def __init__(self, data: bytes) -> None:
        self.received = bytearray(data)

    def _receive(self) -> bool:
        return False


# ---- Damage ------------------------------------------------------------------------------------------


def damage(message: bytes, others: list[Case], rng: random.Random) -> bytes:
    """Return `message` with some small edits of the kind that attackers make, and now and then a splice."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind < 4:  # replace or insert
            data[at : at + rng.randint(0, 2)] = rng.choice(NASTY)
        elif kind == 4:  # one bit
            if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 5:  # a piece twice, or gone
            end = at + rng.randint(1, 20)
            data[at:end] = data[at:end] * rng.choice((0, 2))
        elif kind == 6:  # the rest of another message
            other = rng.choice(others).message
            data[at:] = other[rng.randrange(len(other) + 1) :]
        else:  # a line in another place
            lines = bytes(data).split(b"\r\n")
            lines.insert(rng.randrange(len(lines) + 1), lines.pop(rng.randrange(len(lines))))
            data = bytearray(b"\r\n".join(lines))
    return bytes(data[:20_000])


class Source:
    """Damaged messages by number."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._cases = {kind: load_cases(kind) for kind in ("requests", "responses")}
        self._valid = {
            kind: [case for case in cases if case.wanted["expect"] == "forward"]
            for kind, cases in self._cases.items()
        }

    def case(self, number: int) -> tuple[Case, random.Random]:
        rng = random.Random(f"{self._seed}/{number}")
        kind = "requests" if number % 2 else "responses"
        case = rng.choice(rng.choice((self._cases, self._valid))[kind])
        message = damage(case.message, self._cases[kind], rng)
        return Case(kind, f"{case.name}+{number}", {}, case.request_method, message), rng


# ---- The pure functions ------------------------------------------------------------------------------


def check_pure(case: Case, rng: random.Random) -> str:
    """Return the kind of the outcome; raises `WrongError`, or what the functions must not raise."""
    reading = read_case(case, [case.message])
    for pieces in (split_into_bytes(case.message), split_at_random(case.message, rng)):
        again = read_case(case, pieces)
        if without_status(again) != without_status(reading):
            raise WrongError(f"{reading} when whole, {again} when split into {pieces!r}")
    if reading["expect"] == "forward":
        (check_request if case.kind == "requests" else check_response)(case, reading)
    return str(reading["expect"]).split(" ")[0]


def check_request(case: Case, reading: Reading) -> None:
    """What would be sent to a worker is the same request to a strict reader, and nothing more."""
    head = pothead.take_request_head(pothead.Inbuf(case.message))
    assert head is not None
    body = reading["body"]
    assert isinstance(body, bytes)
    length = len(body) if head.is_chunked or head.content_length is not None else None
    same_request(Recorded(pothead.forwarded_request(head, length, b"") + body), reading)


def same_request(worker: wire.Peer, reading: Reading) -> None:
    request = worker.read_request()
    got = (request.method, request.target, request.body)
    wanted = (reading["method"], reading["target"], reading["body"])
    if got != wanted or worker.received:
        raise WrongError(f"forwarded as {request}, {bytes(worker.received)!r} behind it; read as {reading}")
    framings = request.values(b"Content-Length") + request.values(b"Transfer-Encoding")
    if len(framings) > 1 or (request.body and not framings) or len(request.values(b"Host")) != 1:
        raise WrongError(f"forwarded as {request}")


def check_response(case: Case, reading: Reading) -> None:
    """The same for what would be sent to a consumer."""
    head = pothead.take_response_head(pothead.Inbuf(case.message))
    assert head is not None
    reader = pothead.response_body(head, case.request_method)
    body = reading["body"]
    assert isinstance(body, bytes)
    in_chunks = isinstance(reader, pothead.ChunkedBody | pothead.UntilCloseBody)
    if in_chunks:
        body = (pothead.chunk(body) if body else b"") + pothead.LAST_CHUNK
    consumer = Recorded(pothead.forwarded_response(head, b"", 0, in_chunks=in_chunks) + body)
    response = consumer.read_response(case.request_method)
    wanted = (int(str(reading["status"])), reading["body"])
    if (response.status, response.body) != wanted or consumer.received:
        raise WrongError(f"forwarded as {response}, {bytes(consumer.received)!r} behind it")


# ---- A running hub -----------------------------------------------------------------------------------


class AgainstHub:
    """One hub, with a slot that is kept for the requests and a consumer that is kept for the probes."""

    def __init__(self, hub: wire.HubProcess) -> None:
        self._hub = hub
        self._tokens = 0
        self._prober = wire.Peer.connect(hub.main)
        self._slot: wire.Peer | None = None

    def check(self, case: Case, rng: random.Random) -> str:
        pieces = [case.message] if rng.random() < 0.5 else split_at_random(case.message, rng)
        consumer = wire.Peer.connect(self._hub.main)
        try:
            if case.kind == "requests":
                return self._check_requests(case, pieces, consumer)
            return self._check_response(case, pieces, consumer)
        finally:
            consumer.reset()  # and not close: TIME_WAIT would eat up the ports

    def close(self) -> None:
        self._drop_slot()
        self._prober.close()

    # -- requests

    def _check_requests(self, case: Case, pieces: list[bytes], consumer: wire.Peer) -> str:
        """Of the requests in the message each gets what it deserves, and the slot no byte beyond them."""
        self._slot = slot = self._slot or wire.Peer.connect(self._hub.worker)
        for piece in pieces:
            consumer.send(piece)
        reading = first = read_case(case, [case.message])
        while reading["expect"] == "forward":
            self._expect_request(consumer, slot, reading)
            if reading["keep-alive"] == "no":
                consumer.expect_eof()
                break
            rest = reading["rest"]
            assert isinstance(rest, bytes)
            reading = read_case(case, [rest])
        if str(reading["expect"]).startswith("refuse"):
            self._expect_refusal(consumer, slot)
        self._probe(slot)
        return str(first["expect"]).split(" ")[0]

    def _expect_refusal(self, consumer: wire.Peer, slot: wire.Peer) -> None:
        wait_for(consumer, slot)
        while (response := consumer.read_response(b"HEAD")).status == 100:
            pass
        body, length = consumer.read_to_end(), int(response.value(b"Content-Length") or b"0")
        if not 400 <= response.status < 600 or len(body) not in (0, length):  # none if it was a HEAD
            raise WrongError(f"not refused: {response}, {body!r}")

    def _expect_request(self, consumer: wire.Peer, slot: wire.Peer, reading: Reading) -> None:
        is_asked = reading["expects-continue"] == "yes" and reading["framing"] != "none"
        if is_asked and consumer.read_response().status != 100:
            raise WrongError("the body was not asked for")
        wait_for(slot, consumer)
        same_request(slot, reading)
        method, token = reading["method"], self._token()
        assert isinstance(method, bytes)
        answer(slot, token if method != b"HEAD" else b"")
        response = consumer.read_response(method)
        if (response.status, response.body) != (200, token if method != b"HEAD" else b""):
            raise WrongError(f"answered with {response}")

    # -- responses

    def _check_response(self, case: Case, pieces: list[bytes], consumer: wire.Peer) -> str:
        """The consumer gets what the whole message means, or an error, or a break: never something else."""
        if not case.message:
            return "nothing"  # the request would go to the next slot
        self._drop_slot()
        consumer.send(b"%b /case HTTP/1.1\r\nHost: fuzz\r\n\r\n" % case.request_method)
        with wire.Peer.connect(self._hub.worker) as slot:
            request = slot.read_request()
            if request.target != b"/case":
                raise WrongError(f"a worker got {request}, which nobody asked for")
            with contextlib.suppress(OSError):  # the hub has seen enough
                for piece in pieces:
                    slot.send(piece)
                slot.finish_sending()
            outcome = read_outcome(consumer, case)
        self._slot = wire.Peer.connect(self._hub.worker)
        self._probe(self._slot)
        return outcome

    # -- both

    def _probe(self, slot: wire.Peer) -> None:
        """A request of its own is the next thing that the slot gets, and its answer is the right one."""
        path = b"/" + self._token()
        self._prober.send(b"GET %b HTTP/1.1\r\nHost: fuzz\r\n\r\n" % path)
        request = slot.read_request()
        if request.target != path or slot.received:
            raise WrongError(f"a worker got {request}, which nobody asked for")
        answer(slot, path)
        response = self._prober.read_response()
        if response.body != path or self._prober.received:
            raise WrongError(f"the consumer of {path!r} got {response}")

    def _token(self) -> bytes:
        self._tokens += 1
        return b"token-%d" % self._tokens

    def _drop_slot(self) -> None:
        if self._slot is not None:
            self._slot.close()
            self._slot = None


def answer(slot: wire.Peer, body: bytes) -> None:
    slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def wait_for(awaited: wire.Peer, silent: wire.Peer) -> None:
    """Wait until something comes, and see that it comes to the right end."""
    if awaited.received:
        return
    ready = select.select([awaited.sock, silent.sock], [], [], wire.DEADLINE_S)[0]
    if awaited.sock not in ready:
        got = silent.sock.recv(1000) if ready else b"nothing"
        raise WrongError(f"the wrong end got {got!r}")


def read_outcome(consumer: wire.Peer, case: Case) -> str:
    """Return what has become of a response; raises `WrongError` if that must not be."""
    wanted = final_reading(case)
    response = None
    try:
        while response is None or response.status == 103:
            response = consumer.read_response(case.request_method)
    except AssertionError as exc:
        if "the other end closed" not in str(exc):
            raise
        outcome = "broken"
    else:
        outcome = "forward"
    if wanted["expect"] == "forward":
        if response is None or outcome == "broken":
            raise WrongError(f"broken off, though it is a good response: {wanted}")
        if (response.status, response.body) != (int(str(wanted["status"])), wanted["body"]):
            raise WrongError(f"changed to {response}; read as {wanted}")
        return outcome
    if outcome == "forward":
        if response is None or response.status != 502:
            raise WrongError(f"passed off as whole: {response}; read as {wanted}")
        return "502"
    return outcome


def final_reading(case: Case) -> Reading:
    """Return the reading of the final response, behind any interim ones."""
    message = case.message
    while True:
        reading = read_case(Case(case.kind, case.name, {}, case.request_method, message), [message])
        rest = reading.get("rest")
        status = int(str(reading.get("status", 0)))
        if reading["expect"] != "forward" or status >= 200:
            return reading
        if status == 101:
            return {"expect": "refuse 502"}
        assert isinstance(rest, bytes)
        message = rest


# ---- The command line --------------------------------------------------------------------------------


def run(parts: list[str], args: argparse.Namespace) -> Iterator[str]:
    """Run the parts one after the other, each for its share of the time and the cases."""
    for part in parts:
        ends_at = time.monotonic() + args.seconds / len(parts)
        outcomes: collections.Counter[str] = collections.Counter()
        source, number = Source(args.seed), args.first
        if part == "pure":
            while time.monotonic() < ends_at and number < args.first + args.cases:
                outcomes[guarded(check_pure, source, number)] += 1
                number += 1
        else:
            with wire.hub_process("--log-level", "error") as hub:
                against = AgainstHub(hub)
                while time.monotonic() < ends_at and number < args.first + args.cases:
                    outcomes[guarded(against.check, source, number)] += 1
                    number += 1
                against.close()
        found = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
        yield f"{part}: {number - args.first} cases: {found}"


def guarded(check: Callable[[Case, random.Random], str], source: Source, number: int) -> str:
    """Return the kind of the outcome; an exception names the case that led to it."""
    case, rng = source.case(number)
    try:
        return check(case, rng)
    except Exception as exc:
        raise WrongError(f"case {number}, {case.name}, {case.message!r}: {exc!r}") from exc


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="of each part")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", choices=("pure", "hub"))
    args = parser.parse_args()
    try:
        for line in run([args.only] if args.only else ["pure", "hub"], args):
            print(line, flush=True)
    except WrongError as wrong:
        print(f"WRONG: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
