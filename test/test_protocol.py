"""docs/protocol.md: its transcripts are what the hub really says, and its workers really work."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import wire
from wire import chunked, get, post

DOCUMENT = (wire.ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
# The language of a code block, which of those in that language, and what runs it.
WORKERS = {"ten lines": ("perl", 0, "perl"), "perl": ("perl", 1, "perl"), "node": ("js", 0, "node")}


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


# ---- Transcripts -------------------------------------------------------------------------------------

# What differs from run to run, in the document as on the wire.
VARYING = re.compile(
    rb"(?m)^(Pothead-Hub: [0-9a-f]{16}|Pothead-Waiting: 1; oldest=[0-9]+\.[0-9]{3}"
    rb"|X-Request-Id: [0-9a-f]{12}-[0-9a-f]+|X-Request-Start: t=[0-9]+\.[0-9]{3}"
    rb"|Pothead-Queue-Seconds: [0-9]+\.[0-9]{3}|Date: \w{3}, [0-9]{2} \w{3} [0-9]{4} [0-9:]{8} GMT)"
)


def masked(line: bytes) -> bytes:
    return VARYING.sub(lambda match: match[1].partition(b":")[0] + b": varies", line)


class Replay:
    """Plays the consumer and the worker of a transcript to a real hub, and expects what the hub says."""

    def __init__(self, hub: wire.HubProcess) -> None:
        self._hub = hub
        self._peers: dict[str, wire.Peer] = {}

    def play(self, line: str) -> None:
        direction, text = line[:3], line[5:]
        assert re.fullmatch(r"[CHW]>[CHW](  .*)?", line), line
        who = direction.replace("H", "").replace(">", "")
        if text == "(connects)" or (who == "C" and who not in self._peers):
            self._connect(who)
        peer = self._peers[who]
        if text.startswith("("):
            self._play_event(direction, peer, text)
        elif direction[0] == "H":
            self._expect(peer, text)
        else:
            peer.send(self._bytes(text))

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _connect(self, who: str) -> None:
        if who in self._peers:
            self._peers[who].close()
        self._peers[who] = wire.Peer.connect(self._hub.main if who == "C" else self._hub.slots)

    def _play_event(self, direction: str, peer: wire.Peer, text: str) -> None:
        if direction[0] != "H":
            assert text in ("(connects)", "(closes)"), text
            if text == "(closes)":
                peer.close()
        elif text == "(closes)":
            peer.expect_eof()
        else:
            assert text == "(resets)", text
            with pytest.raises(ConnectionResetError):
                peer.sock.recv(1)

    def _expect(self, peer: wire.Peer, text: str) -> None:
        wanted = self._bytes(text)
        if text.startswith('"'):
            peer.expect(wanted)
        else:
            got = peer.read_until(b"\r\n")
            assert masked(got) == masked(wanted)

    @staticmethod
    def _bytes(text: str) -> bytes:
        if text.startswith('"'):
            return text[1:-1].replace("\\n", "\n").encode()
        return text.encode() + b"\r\n"


@pytest.mark.parametrize("number", range(len(blocks("text"))))
def test_transcript_is_what_the_hub_says(number: int) -> None:
    command, *lines = blocks("text")[number].splitlines()
    program, *options = command.removeprefix("$ python3 ").split()
    assert program == "pothead.py"
    if "--ptth-port" in options:
        options[options.index("--ptth-port") + 1] = "0"
    with wire.hub_process(*options) as hub:
        replay = Replay(hub)
        try:
            for line in lines:
                replay.play(line)
        finally:
            replay.close()


def test_there_are_transcripts_of_all_that_matters() -> None:
    assert len(blocks("text")) >= 7


# ---- The table of failures ---------------------------------------------------------------------------

GONE = b"(closes)"
LATER = b"(when the consumer has the head)"
CL_10 = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf "
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

# For each row but the first and the last: what a worker does, what the consumer gets (0: a reset).
FAILURES: dict[str, list[tuple[bytes, int]]] = {
    "It is gone before the first byte of its response.": [(GONE, 502)],
    "It is gone after the first byte, but before the end of the head.": [(b"H" + GONE, 502)],
    "It is gone after the head, before the end of the body.": [
        (CL_10 + LATER + GONE, 0),
        (CHUNKED + LATER + GONE, 0),
    ],
    "Its head is not HTTP, or is ambiguous.": [
        (b"hello\n", 502),
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 502),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 502),
    ],
    "Its chunks are malformed.": [(CHUNKED + LATER + b"x\r\n", 0)],
    "It answers `101`.": [(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 502)],
    "It sends no head within `--response-timeout`.": [(b"", 504), (b"HTTP/1.1 102 Processing\r\n\r\n", 504)],
    "It sends more than its response.": [(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1", 200)],
}


def rows_of_failures() -> list[tuple[str, str, str]]:
    section = DOCUMENT.partition("\n## When the worker fails\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [(row[0], row[1], row[2].strip("`| ")) for row in [line[2:].split(" | ") for line in lines]]


def act(slot: wire.Peer, what: bytes) -> None:
    """Send what is told, and leave if that is told, too."""
    slot.send(what.removesuffix(GONE))
    if what.endswith(GONE):
        slot.finish_sending()


def test_table_of_failures_has_the_rows_that_are_tested() -> None:
    what = [row[0] for row in rows_of_failures()]
    assert what[1:-1] == list(FAILURES), "the first and the last row are tested elsewhere, or cannot be"


@pytest.mark.parametrize("what", FAILURES)
def test_worker_that_fails_costs_what_the_table_says(what: str) -> None:
    _, promised, code = next(row for row in rows_of_failures() if row[0] == what)
    options = ["--response-timeout", "300ms"] if code == "WT" else []
    with wire.hub_process(*options) as hub:
        for sent, status in FAILURES[what]:
            with wire.Peer.connect(hub.main) as consumer, wire.Peer.connect(hub.worker) as slot:
                consumer.send(post(b"/", b"hi"))
                assert slot.read_request().body == b"hi"
                at_first, _, later = sent.partition(LATER)
                act(slot, at_first)
                if status:
                    assert consumer.read_response().status == status
                else:
                    consumer.read_head()
                    act(slot, later)
                    with pytest.raises(ConnectionResetError):
                        while consumer.sock.recv(100):
                            pass
                slot.expect_eof()
        assert str(status) in promised or "reset" in promised or status == 200
        lines = [hub.wait_for_line(lambda line: "code=" in line), *hub.lines[4:]]
        assert all(line.partition("code=")[2].split()[0] == code for line in lines), lines


@pytest.mark.parametrize("first", [b"HTTP/1.1 100 Continue\r\n\r\n", b"H"])
def test_request_is_not_repeated_after_a_byte_of_a_response(first: bytes, hub: wire.HubProcess) -> None:
    with wire.Peer.connect(hub.main) as consumer, wire.Peer.connect(hub.worker) as slot:
        consumer.send(get(b"/"))
        slot.read_request()
        slot.send(first)
        slot.finish_sending()
        assert consumer.read_response().status == 502


# Responses after which the hub closes the connection, and one after which it does not.
NOT_KEPT = [
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok\r\n",
]


@pytest.mark.parametrize("response", NOT_KEPT)
def test_connection_is_closed_after_a_response_that_does_not_allow_another(
    response: bytes, hub: wire.HubProcess, consumer: wire.Peer, slot: wire.Peer
) -> None:
    consumer.send(get(b"/"))
    slot.read_request()
    slot.send(response)
    assert consumer.read_response().body == b"ok"
    slot.expect_eof()


def test_old_worker_that_asks_for_it_keeps_its_connection(consumer: wire.Peer, slot: wire.Peer) -> None:
    for _ in range(2):
        consumer.send(get(b"/"))
        slot.read_request()
        slot.send(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok")
        assert consumer.read_response().body == b"ok"


def test_slot_is_free_before_its_consumer_has_taken_the_response(
    hub: wire.HubProcess, consumer: wire.Peer, slot: wire.Peer
) -> None:
    body = bytes(20_000_000)
    consumer.send(get(b"/"))
    slot.read_request()
    slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
    slot.send(body)
    with wire.Peer.connect(hub.main) as other:
        other.send(get(b"/", method=b"DELETE"))
        assert slot.read_request().method == b"DELETE"
    assert len(consumer.read_response().body) == len(body)


# ---- The workers -------------------------------------------------------------------------------------


@pytest.fixture(params=WORKERS)
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The command of a worker that stands in the document, without the hub's address."""
    language, place, interpreter = WORKERS[request.param]
    if shutil.which(interpreter) is None:
        pytest.skip(f"{interpreter} is not installed")
    source = blocks(language)[place]
    path = tmp_path / f"worker.{language}"
    path.write_text(source, encoding="utf-8")
    return [interpreter, str(path)]


# The shortest leaves chunks out.
understands_chunks = pytest.mark.parametrize("command", ["perl", "node"], indirect=True)


class ForeignWorker(wire.Program):
    """A worker of the document, as a process."""

    def __init__(self, command: list[str], hub: wire.Address, directory: Path) -> None:
        super().__init__([*command, "{}:{}".format(*hub)], directory)


@pytest.fixture
def foreign(command: list[str], hub: wire.HubProcess, tmp_path: Path) -> Iterator[ForeignWorker]:
    """A worker of the document that serves `hub`."""
    with wire.running(ForeignWorker(command, hub.worker, tmp_path)) as worker:
        yield worker


def in_chunks(body: bytes, size: int) -> bytes:
    return chunked(*[body[start : start + size] for start in range(0, len(body), size)])


def turn_round(consumer: wire.Peer, body: bytes) -> None:
    """Have a worker of the document turn `body` round."""
    sender = threading.Thread(target=consumer.send, args=(post(b"/", body),))
    sender.start()
    response = consumer.read_response()
    sender.join()
    assert (response.status, response.body == body[::-1]) == (200, True)


def wait_until_busy(hub: wire.HubProcess) -> None:
    """That a request has been handed over shows nowhere else."""
    hub.until(lambda stats: stats["requests_in_flight"])


def test_worker_of_ten_lines_has_ten_lines() -> None:
    assert len(blocks("perl")[0].splitlines()) == 10


def test_worker_of_the_document_serves_one_request_after_the_other_on_one_connection(
    foreign: ForeignWorker, hub: wire.HubProcess, consumer: wire.Peer
) -> None:
    for number in range(20):
        turn_round(consumer, b"request %d" % number)
    (worker,) = hub.stats()["workers"]
    assert (worker["served"], worker["state"]) == (20, "idle")


def test_worker_of_the_document_serves_bodies_of_all_kinds(
    foreign: ForeignWorker, hub: wire.HubProcess, consumer: wire.Peer
) -> None:
    large = random.Random(1).randbytes(3_000_000)
    turn_round(consumer, bytes(range(256)))
    turn_round(consumer, large)
    consumer.send(get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + in_chunks(b"in chunks", 2))
    assert consumer.read_response().body == b"sknuhc ni"
    for method in (b"GET", b"HEAD", b"DELETE"):
        consumer.send(get(b"/", method=method))
        response = consumer.read_response(method)
        assert (response.status, response.body) == (200, b"")
    consumer.send(get(b"/", b"X-Long: %b" % (b"x" * 30_000)))
    assert consumer.read_response().status == 200
    turn_round(consumer, b"still in step")
    (worker,) = hub.stats()["workers"]
    assert worker["served"] == 8, "all on one connection"


@understands_chunks
def test_worker_of_the_document_understands_streamed_chunks(command: list[str], tmp_path: Path) -> None:
    body = random.Random(2).randbytes(100_000)
    with wire.hub_process("--stream-requests") as hub:
        with (
            wire.running(ForeignWorker(command, hub.worker, tmp_path)),
            wire.Peer.connect(hub.main) as consumer,
        ):
            for size in (7777, 100_000, 50_000):
                consumer.send(get(b"/", b"Transfer-Encoding: chunked", method=b"POST"))
                consumer.send(in_chunks(body, size))
                assert consumer.read_response().body == body[::-1]


@understands_chunks
def test_worker_of_the_document_survives_a_request_that_breaks_off(
    command: list[str], tmp_path: Path
) -> None:
    with wire.hub_process("--stream-requests") as hub:
        with (
            wire.running(ForeignWorker(command, hub.worker, tmp_path)),
            wire.Peer.connect(hub.main) as consumer,
        ):
            for field in (b"Transfer-Encoding: chunked", b"Content-Length: 10"):
                turn_round(consumer, b"before")
                with wire.Peer.connect(hub.main) as leaving:
                    leaving.send(get(b"/", field, method=b"POST") + b"5\r\nhel")
                    wait_until_busy(hub)
                hub.wait_for_line(lambda line: line.endswith("code=CR"))
                turn_round(consumer, b"after")


def test_worker_of_the_document_comes_back_when_the_hub_is_restarted(
    command: list[str], tmp_path: Path
) -> None:
    with (
        wire.reserved_port() as port,
        wire.running(ForeignWorker(command, ("127.0.0.1", int(port)), tmp_path)),
    ):
        for _ in range(2):
            with wire.hub_process("--reuse-port", "--worker-port", port) as hub:
                with wire.Peer.connect(hub.main) as consumer:
                    turn_round(consumer, b"is there anybody?")
                hub.kill()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_worker_of_the_document_works_over_tls(tmp_path: Path) -> None:
    (tmp_path / "worker.js").write_text(blocks("js")[1])
    (tmp_path / "workers").write_text("node token:hYkT5bNw0qzJ8mR3\n")
    ca, key = (wire.authority() / name for name in ("hub.pem", "hub.key"))
    options = ("--certfile", str(ca), "--keyfile", str(key), "--workers-file", str(tmp_path / "workers"))
    with wire.hub_process("--ptth-port", "0", *options) as hub:
        command = ["node", "worker.js", f"https://localhost:{hub.ptth[1]}", str(wire.authority() / "ca.pem")]
        with wire.running(wire.Program(command, tmp_path, {"TOKEN": "hYkT5bNw0qzJ8mR3"})):
            with wire.Peer.connect(hub.main) as consumer:
                for body in (b"first", b"second", random.Random(3).randbytes(300_000)):
                    turn_round(consumer, body)
            (worker,) = hub.stats()["workers"]
            assert (worker["served"], worker["name"]) == (3, "node")
        with wire.running(wire.Program(command, tmp_path, {"TOKEN": "another"})) as refused:
            refused.wait_for_error(lambda line: "refused: 401" in line)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_worker_of_the_document_serves_several_hubs_and_no_request_twice(tmp_path: Path) -> None:
    (tmp_path / "worker.js").write_text(blocks("js")[2])
    with wire.hub_process("--ptth-port", "0") as one, wire.hub_process("--ptth-port", "0") as two:
        hubs = [f"{host}:{port}" for host, port in (one.ptth, two.ptth)]
        command = ["node", "worker.js", *hubs]
        with (
            wire.running(wire.Program(command, tmp_path)),
            wire.running(wire.Program(command, tmp_path)),
            contextlib.ExitStack() as stack,
        ):
            consumers = [stack.enter_context(wire.Peer.connect(hub.main)) for hub in (one, one, one, two)]
            for turn in range(30):
                bodies = [random.Random(turn + number).randbytes(1000 * turn + 1) for number in range(4)]
                for consumer, body in zip(consumers, bodies, strict=True):
                    consumer.send(post(b"/", body))
                for consumer, body in zip(consumers, bodies, strict=True):
                    response = consumer.read_response()
                    assert (response.status, response.body == body[::-1]) == (200, True)
            for hub in (one, two):
                stats = hub.stats()
                assert (stats["breaches"], stats["requeues"]) == (0, 0)
            assert sum(hub.stats()["outcomes"]["OK"] for hub in (one, two)) == 120
