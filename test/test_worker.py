"""The worker: what it sends on the connections it opened, and how its process begins and ends."""

from __future__ import annotations

import contextlib
import logging
import lzma
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest

import pothead_worker
import wire
from pothead_worker import WorkerPool
from wire import ask, is_line, request

Environ = dict[str, Any]
App = Callable[[Environ, Any], Iterable[bytes]]

DATE = ("Date", "Thu, 01 Jan 1970 00:00:00 GMT")
DATE_LINE = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"


# ---- The stand-in hub and its helpers ----------------------------------------------------------------


class Lines(logging.Handler):
    """Collects log lines and lets a test wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self.changed:
            self.lines.append(f"{record.levelname} {self.format(record)}")
            self.changed.notify_all()

    def wait_for(self, text: str, count: int = 1) -> str:
        """Return the first line with `text`, once `count` of them have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.having(text)) >= count, wire.DEADLINE_S), self.lines
            return self.having(text)[0]

    def having(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("pothead.worker")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)


@contextlib.contextmanager
def running_pool(
    app: App | pothead_worker.Forwarder, listener: wire.Listener, **options: Any
) -> Iterator[WorkerPool]:
    """Run a pool in this process, and see to it that nothing of it is left afterwards."""
    pool = WorkerPool(app, connect=listener.worker, **options)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop_now()
        stand_in = getattr(listener, "listener", listener)  # of a scripted hub
        if isinstance(stand_in, wire.Listener):
            stand_in.turn_away()
        pool.join()
        for thread in threading.enumerate():
            if thread.name.startswith(("pothead-slot", "pothead-lobby", "Thread-")):
                thread.join(wire.DEADLINE_S)
                assert not thread.is_alive(), thread


class Serving:
    """A pool with one slot that serves `app`, and this test's end of its connection."""

    def __init__(self, listener: wire.Listener, pool: WorkerPool) -> None:
        self.listener = listener
        self.pool = pool
        self.peer = listener.accept()

    def accept_again(self) -> wire.Peer:
        """Wait for the slot's next connection."""
        self.peer.close()
        self.peer = self.listener.accept()
        return self.peer


@contextlib.contextmanager
def no_more_threads() -> Iterator[None]:
    """Have the system refuse every new thread: its stack would fill the whole address space."""
    threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(0)


@pytest.fixture
def serving(listener: wire.Listener) -> Iterator[Callable[..., Serving]]:
    with contextlib.ExitStack() as stack:

        def serve(app: App, **options: Any) -> Serving:
            pool = stack.enter_context(running_pool(app, listener, **options))
            served = Serving(listener, pool)
            stack.callback(lambda: served.peer.close())
            return served

        yield serve


def app_returning(
    result: Any, status: Any = "200 OK", headers: Any = (DATE,), then: Any = None
) -> Callable[[Environ, Any], Any]:
    """Return an app that starts one response and returns `result`."""

    def app(environ: Environ, start_response: Any) -> Any:
        start_response(status, list(headers) if isinstance(headers, tuple) else headers)
        return result() if isinstance(result, types.FunctionType) else result

    return app


def hello(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [DATE])
    return [b"hello"]


class HeldApp:
    """Says that it has begun, and goes on when it may."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        self.began.set()
        assert self.go_on.wait(wire.DEADLINE_S)
        return hello(environ, start_response)


class Body:
    """An iterable that knows how often it was closed."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = pieces
        self.closed = 0
        self.was_closed = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece() if callable(piece) else piece

    def close(self) -> None:
        self.closed += 1
        self.was_closed.set()


# ---- Responses, byte by byte -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "wanted"),
    [
        (app_returning([b"hello"]), b"%bContent-Length: 5\r\n\r\nhello"),
        (app_returning((b"hello",)), b"%bContent-Length: 5\r\n\r\nhello"),
        (app_returning([]), b"%bContent-Length: 0\r\n\r\n"),
        (app_returning([b"", b""]), b"%bContent-Length: 0\r\n\r\n"),
        (app_returning([b"a", b"bc"]), b"%bTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"),
        (app_returning(iter([b"x" * 17])), b"%bTransfer-Encoding: chunked\r\n\r\n11\r\n" + b"x" * 17),
        (
            app_returning(iter([b"a", b"", b"bc"]), headers=[DATE, ("content-length", "3")]),
            b"%bcontent-length: 3\r\n\r\nabc",
        ),
    ],
    ids=["list", "tuple", "empty", "only-empty", "chunks", "one-chunk", "own-length"],
)
def test_framing_follows_what_the_app_returns(serving: Any, app: App, wanted: bytes) -> None:
    peer = serving(app).peer
    peer.send(request())
    peer.expect(b"HTTP/1.1 200 OK\r\n" + wanted % DATE_LINE)


def test_every_field_arrives_in_order_and_a_date_is_added(serving: Any) -> None:
    fields = [("Set-Cookie", "a=1"), ("X-Latin", "\xe9"), ("Set-Cookie", "b=2")]
    peer = serving(app_returning([b"x"], "299 So \xe9", fields)).peer
    response = ask(peer)
    assert (response.status, response.reason) == (299, b"So \xe9")
    assert response.values(b"set-cookie") == [b"a=1", b"b=2"]
    assert response.value(b"x-latin") == b"\xe9"
    assert re.fullmatch(rb"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", response.value(b"date") or b"")


def test_each_piece_is_sent_before_the_next_is_made(serving: Any) -> None:
    go_on = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"first"
        assert go_on.wait(wire.DEADLINE_S)
        yield b"second"

    peer = serving(app_returning(pieces)).peer
    peer.send(request())
    peer.read_head()
    peer.expect(b"5\r\nfirst\r\n")
    go_on.set()
    peer.expect(b"6\r\nsecond\r\n0\r\n\r\n")


def test_piece_that_completes_the_body_is_sent_before_the_app_goes_on(serving: Any) -> None:
    go_on = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"wh"
        yield b"ole"
        assert go_on.wait(wire.DEADLINE_S)

    peer = serving(app_returning(pieces, headers=[("Content-Length", "5")])).peer
    for _ in range(2):
        assert ask(peer).body == b"whole"
        go_on.set()


def test_large_pieces_arrive_whole(serving: Any) -> None:
    pieces = [bytes([number]) * (3 << 20) for number in range(3)]
    peer = serving(app_returning(lambda: iter(pieces))).peer
    assert ask(peer).body == b"".join(pieces)


@pytest.mark.parametrize("sent_at_first", [1, 20_000, 20_001, 40_000, 40_002])
def test_send_that_was_interrupted_is_completed(sent_at_first: int) -> None:
    class Interrupted(socket.socket):
        def sendmsg(self, buffers: Any, *arguments: Any) -> int:
            return self.send(b"".join(buffers)[:sent_at_first])

    pieces = [b"a" * 20_000, b"", b"b" * 20_000, b"\r\n"]
    one, two = socket.socketpair()
    with Interrupted(fileno=one.detach()) as sender, two:
        pothead_worker.PlainTransport(sender).send(*pieces)
        assert two.recv(40_002, socket.MSG_WAITALL) == b"".join(pieces)


def test_written_pieces_come_before_returned_ones(serving: Any) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        write(b"one ")
        write(b"two ")
        return [b"three"]

    assert ask(serving(app).peer).body == b"one two three"


def test_generator_may_call_start_response_late(serving: Any) -> None:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"late"

    assert ask(serving(app).peer).body == b"late"


def test_file_wrapper_sends_a_file_and_closes_it(serving: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    opened = path.open("rb")

    def app(environ: Environ, start_response: Any) -> Any:
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](opened)

    peer = serving(app).peer
    assert ask(peer, "GET /", "Connection: close").body == b"contents"
    peer.expect_eof()
    assert opened.closed


@pytest.mark.parametrize(
    ("start", "app", "wanted"),
    [
        ("HEAD /", app_returning([b"hello"]), b"200 OK\r\n%bContent-Length: 5\r\n\r\n"),
        (
            "HEAD /",
            app_returning([], headers=[DATE, ("Content-Length", "9")]),
            b"200 OK\r\n%bContent-Length: 9\r\n\r\n",
        ),
        ("HEAD /", app_returning([]), b"200 OK\r\n%b\r\n"),
        ("HEAD /", app_returning([b"a", b"b"]), b"200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n"),
        (
            "GET /",
            app_returning([b"x"], "204 No Content", (DATE, ("Content-Length", "1"))),
            b"204 No Content\r\n%b\r\n",
        ),
        ("GET /", app_returning([b"x", b"y"], "304 Not Modified"), b"304 Not Modified\r\n%b\r\n"),
        (
            "GET /",
            app_returning([], "304 Not Modified", (DATE, ("Content-Length", "7"))),
            b"304 Not Modified\r\n%bContent-Length: 7\r\n\r\n",
        ),
    ],
)
def test_head_204_and_304_have_no_body(serving: Any, start: str, app: App, wanted: bytes) -> None:
    peer = serving(app).peer
    for _ in range(2):  # a byte too many would show in front of the second response
        peer.send(request(start))
        peer.expect(b"HTTP/1.1 " + wanted % DATE_LINE)


def test_endless_body_of_a_head_request_is_not_computed(serving: Any, lines: Lines) -> None:
    body = Body(*[b"x"] * 1000, AssertionError("computed to the end"))
    peer = serving(app_returning(body)).peer
    for _ in range(2):
        assert ask(peer, "HEAD /").status == 200
    assert not lines.having("computed to the end")


# ---- Applications that fail --------------------------------------------------------------------------


def raising(exc: BaseException) -> App:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        raise exc

    return app


def never_starting(environ: Environ, start_response: Any) -> Iterable[bytes]:
    return [b"x"]


def never_starting_nor_answering(environ: Environ, start_response: Any) -> Iterable[bytes]:
    return []


def starting_twice(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    start_response("200 OK", [])
    return [b"x"]


def writing_text(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])("text")
    return []


@pytest.mark.parametrize(
    ("app", "named"),
    [
        (never_starting, "the body came before start_response"),
        (never_starting_nor_answering, "start_response was not called"),
        (starting_twice, "twice without exc_info"),
        (writing_text, "type str instead of bytes"),
        (app_returning(None), "returned NoneType"),
        (app_returning("text"), "returned str"),
        (app_returning(b"bytes"), "returned bytes"),
        (app_returning(5), "returned int"),
        (app_returning(print), "not an iterable of bytes (does it make the app?)"),
        (app_returning(["text"]), "type str instead of bytes"),
        (app_returning([None]), "type NoneType instead of bytes"),
        (app_returning([], "200"), "'200'"),
        (app_returning([], 200), "200"),
        (app_returning([], b"200 OK"), "b'200 OK'"),
        (app_returning([], "100 Continue"), "100 Continue"),
        (app_returning([], "200 OK\r\nX: y"), "status"),
        (app_returning([], headers=None), "must be a list, not NoneType"),
        (app_returning([], headers={"A": "b"}), "must be a list, not dict"),
        (app_returning([], headers=[["A", "b"]]), "must be a tuple"),
        (app_returning([], headers=[("A",)]), "must be a tuple"),
        (app_returning([], headers=[(b"A", "b")]), "bad header name b'A'"),
        (app_returning([], headers=[("A b", "c")]), "bad header name 'A b'"),
        (app_returning([], headers=[("", "c")]), "bad header name ''"),
        (app_returning([], headers=[("A\r\nB", "c")]), "bad header name"),
        (app_returning([], headers=[("A", "b\r\nC: d")]), "header A"),
        (app_returning([], headers=[("A", "b\n")]), "header A"),
        (app_returning([], headers=[("A", "b\0")]), "header A"),
        (app_returning([], headers=[("A", "\u20ac")]), "header A"),
        (app_returning([], headers=[("A", 1)]), "bad value 1 of header A: it must be a str, not int"),
        (app_returning([], headers=[("Connection", "close")]), "hop-by-hop header Connection"),
        (app_returning([], headers=[("transfer-encoding", "chunked")]), "hop-by-hop"),
        (app_returning([], headers=[("Content-Length", "+5")]), "bad Content-Length '+5'"),
        (app_returning([], headers=[("Content-Length", "0")] * 2), "more than one Content-Length"),
        (app_returning([], headers=[("Content-Length", "5")]), "shorter than its Content-Length of 5"),
    ],
)
def test_violation_before_the_head_is_named_and_gives_500(
    serving: Any, lines: Lines, app: App, named: str
) -> None:
    peer = serving(app).peer
    for _ in range(2):  # on the same connection: the slot lives on
        response = ask(peer)
        assert response.status == 500
        assert response.body == b"500 Internal Server Error\nrequest id: r1\n"
        assert [name for name, _ in response.fields] == [b"Content-Type", b"Content-Length", b"Date"]
    line = lines.wait_for("WSGI violation", 2)
    assert line.startswith("ERROR request r1: WSGI violation: ") and named in line
    assert "Traceback" not in line


def test_largest_head_that_the_hub_takes_is_sent_and_no_larger_one(
    hub: wire.HubProcess, tmp_path: Path
) -> None:
    (tmp_path / "large.py").write_text(
        "def app(environ, start_response):\n"
        "    count, size = map(int, environ['QUERY_STRING'].split('-'))\n"
        "    fields = [(f'X-{number:02}', '') for number in range(count)]\n"
        "    left = size - len('200 OK') - sum(len(name) + 4 for name, _ in fields)\n"
        "    fields[1] = ('X-01', 'x' * left)\n"
        "    start_response('200 OK', fields)\n"
        "    return [b'a', b'b']\n"
    )
    most, largest = pothead_worker.MAX_RESPONSE_FIELDS, pothead_worker.MAX_RESPONSE_HEAD_BYTES
    with wire.worker_process(hub, "large:app", cwd=tmp_path) as worker, wire.Peer.connect(hub.main) as peer:
        assert ask(peer, f"GET /?{most}-{largest}").body == b"ab"
        assert ask(peer, f"GET /?{most + 1}-5000").status == 500
        assert ask(peer, f"GET /?{most}-{largest + 1}").status == 500
        worker.wait_for_error(is_line(f"WSGI violation: the app's head has {most + 1} fields, and may have"))
        worker.wait_for_error(is_line(f"the app's head has {largest + 1} bytes, and may have {largest}; "))
        worker.wait_for_error(is_line("most are in X-01"))


def raising_after_starting(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("X", "y")])
    raise RuntimeError("oops")


def raising_in_the_iterator(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    raise RuntimeError("oops")
    yield b""


@pytest.mark.parametrize(
    "app",
    [
        raising(RuntimeError("oops")),
        raising_after_starting,
        raising_in_the_iterator,
        raising(SystemExit("oops")),
        raising(KeyboardInterrupt("oops")),
        raising(GeneratorExit("oops")),
        raising(BrokenPipeError("oops")),
    ],
)
def test_exception_before_the_head_gives_500_and_a_traceback(serving: Any, lines: Lines, app: App) -> None:
    peer = serving(app).peer
    for _ in range(2):
        response = ask(peer)
        assert response.status == 500
        assert b"r1" in response.body
    line = lines.wait_for("the application raised", 2)
    assert line.startswith("ERROR request r1: ") and "Traceback" in line and "oops" in line


def test_500_for_a_head_request_has_no_body(serving: Any) -> None:
    peer = serving(raising(RuntimeError())).peer
    assert ask(peer, "HEAD /").status == 500
    assert ask(peer, "HEAD /").status == 500


def test_exception_after_the_head_cuts_the_response(serving: Any, lines: Lines) -> None:
    body = Body(b"part", RuntimeError("oops"))
    served = serving(app_returning(body))
    served.peer.send(request())
    served.peer.read_head()
    served.peer.expect(b"4\r\npart\r\n")
    served.peer.expect_eof()
    assert body.closed == 1
    assert "oops" in lines.wait_for("the application raised")
    body.pieces = (b"whole",)
    assert ask(served.accept_again()).body == b"whole"


def test_text_after_the_head_cuts_the_response(serving: Any, lines: Lines) -> None:
    served = serving(app_returning(Body(b"part", "text")))
    served.peer.send(request())
    served.peer.read_until(b"4\r\npart\r\n")
    served.peer.expect_eof()
    lines.wait_for("WSGI violation: the body has a piece of type str")


def test_short_body_is_not_passed_off_as_whole(serving: Any, lines: Lines) -> None:
    served = serving(app_returning(iter([b"part"]), headers=[("Content-Length", "5")]))
    served.peer.send(request())
    served.peer.read_until(b"\r\n\r\npart")
    served.peer.expect_eof()
    lines.wait_for("shorter than its Content-Length of 5")


def test_piece_that_is_too_long_gives_500_as_long_as_nothing_was_sent(serving: Any, lines: Lines) -> None:
    body = Body(b"whole and more")
    peer = serving(app_returning(body, headers=[("Content-Length", "5")])).peer
    for _ in range(2):
        assert ask(peer).status == 500
    assert body.closed == 2
    lines.wait_for("longer than its Content-Length of 5", 2)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"whole", b" and more"],
        [b"whole", b"", b"!"],
        [b"wh", b"ole and more"],
        [b"wh", b"ole", b"!", AssertionError("went on")],
    ],
)
def test_long_body_is_cut_at_its_length(serving: Any, lines: Lines, pieces: list[Any]) -> None:
    """The slot is kept: to close it without a word could destroy the request that the hub sends next."""
    body = Body(*pieces)
    peer = serving(app_returning(body, headers=[("Content-Length", "5"), DATE])).peer
    for _ in range(2):
        peer.send(request())
        peer.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n%b\r\nwhole" % DATE_LINE)
    lines.wait_for("ERROR request r1: WSGI violation: the body is longer than its Content-Length of 5", 2)
    assert body.closed == 2
    assert not lines.having("went on")


def test_written_body_is_cut_at_its_length(serving: Any, lines: Lines) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [("Content-Length", "5")])
        write(b"whole")
        return [b"!"]

    peer = serving(app).peer
    for _ in range(2):
        assert ask(peer).body == b"whole"
    lines.wait_for("longer than its Content-Length of 5", 2)


def test_list_of_one_item_that_grows_is_cut_at_the_length_of_the_first(serving: Any, lines: Lines) -> None:
    class Growing(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            yield from [b"whole", b" and more"]

    peer = serving(app_returning(lambda: Growing([b"one item"]))).peer
    for _ in range(2):
        assert ask(peer).body == b"whole"
    lines.wait_for("longer than its Content-Length of 5", 2)


def replacing_the_head(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("X", "first")])
    try:
        raise RuntimeError
    except RuntimeError:
        start_response("503 Replaced", [DATE], sys.exc_info())
    return [b"sorry"]


def replacing_too_late(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    yield b"part"
    try:
        raise RuntimeError("the original")
    except RuntimeError:
        start_response("503 Too Late", [], sys.exc_info())
    yield b"never"


def test_exc_info_before_the_head_replaces_it(serving: Any) -> None:
    peer = serving(replacing_the_head).peer
    peer.send(request())
    peer.expect(b"HTTP/1.1 503 Replaced\r\n%bContent-Length: 5\r\n\r\nsorry" % DATE_LINE)


def test_exc_info_after_the_head_raises_it_again(serving: Any, lines: Lines) -> None:
    peer = serving(replacing_too_late).peer
    peer.send(request())
    peer.read_until(b"4\r\npart\r\n")
    peer.expect_eof()
    assert "RuntimeError: the original" in lines.wait_for("the application raised")


def test_exc_info_of_no_exception_after_the_whole_body_spoils_nothing(serving: Any, lines: Lines) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [("Content-Length", "5")])
        write(b"whole")
        start_response("200 OK", [("Content-Length", "6")], sys.exc_info())  # outside of an `except`
        return [b"secret"]

    peer = serving(app).peer
    for _ in range(2):  # on the same connection, where another byte would be seen
        assert ask(peer).body == b"whole"
    lines.wait_for("start_response was called after the response had begun", 2)


def test_write_that_is_called_after_the_end_reaches_nobody(serving: Any) -> None:
    """A thread of the app's has kept it, and calls it in the midst of the next response."""
    writes: list[Any] = []
    failures: list[Exception] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        writes.append(start_response("200 OK", []))
        yield b"one"
        if len(writes) == 2:
            try:
                writes[0](b"secret")
            except Exception as exc:
                failures.append(exc)
        yield b"two"

    peer = serving(app).peer
    for _ in range(2):
        assert ask(peer).body == b"onetwo"
    assert [str(exc) for exc in failures] == ["write was called after the response had ended"]


@pytest.mark.parametrize("length", [[], [("Content-Length", "5")]], ids=["ours", "the app's"])
def test_exc_info_after_the_whole_body_raises_it_again_and_spoils_nothing(
    serving: Any, lines: Lines, length: list[tuple[str, str]]
) -> None:
    class Failing(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            yield b"whole"
            try:
                raise RuntimeError("the original")
            except RuntimeError:
                starts.pop()("503 Too Late", [("Content-Length", "5")], sys.exc_info())
            yield b"never"

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", length)
        starts.append(start_response)
        return Failing([b"one item"])

    starts: list[Any] = []
    peer = serving(app).peer
    for _ in range(2):  # on the same connection, where another byte would be seen
        assert ask(peer).body == b"whole"
    assert "RuntimeError: the original" in lines.wait_for("the application raised", 2)


@pytest.mark.parametrize(
    ("start", "pieces"),
    [
        ("GET /", [b"a", b"b"]),
        ("GET /", []),
        ("GET /", [RuntimeError("before the first piece")]),
        ("GET /", [b"a", RuntimeError("after it")]),
        ("GET /", ["text"]),
        ("HEAD /", [b"a"]),
    ],
)
def test_the_iterable_is_closed_exactly_once(serving: Any, start: str, pieces: list[Any]) -> None:
    body = Body(*pieces)
    peer = serving(app_returning(body)).peer
    peer.send(request(start))
    peer.read_head()
    assert body.was_closed.wait(wire.DEADLINE_S)
    assert body.closed == 1


def test_exception_in_close_is_logged_and_spoils_nothing(serving: Any, lines: Lines) -> None:
    class BadBody(Body):
        def close(self) -> None:
            raise RuntimeError("in close")

    peer = serving(app_returning(BadBody(b"a"))).peer
    assert ask(peer).body == b"a"
    assert ask(peer).body == b"a"
    assert "in close" in lines.wait_for("the application raised")


# ---- Request bodies ----------------------------------------------------------------------------------

READS: dict[str, Callable[[Any], bytes]] = {
    "read": lambda stream: stream.read(),
    "read(-1)": lambda stream: stream.read(-1),
    "read(3)": lambda stream: b"".join(iter(lambda: stream.read(3), b"")),
    "readline": lambda stream: b"".join(iter(stream.readline, b"")),
    "readline(2)": lambda stream: b"".join(iter(lambda: stream.readline(2), b"")),
    "readlines": lambda stream: b"".join(stream.readlines()),
    "iteration": lambda stream: b"".join(stream),
}

TEXT = b"one\ntwo\n\nthree"
CHUNKED = b"4\r\none\n\r\n00a;x=y\r\ntwo\n\nthree\r\n0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("framing", ["none", "length", "chunked", "chunked, byte by byte"])
def test_body_ends_where_it_ends(serving: Any, framing: str, read: Callable[[Any], bytes]) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        body = read(environ["wsgi.input"])
        assert read(environ["wsgi.input"]) == b""
        return [body]

    peer = serving(app).peer
    for _ in range(2):
        if framing == "none":
            assert ask(peer).body == b""
        elif framing == "length":
            assert ask(peer, "POST /", body=TEXT).body == TEXT
        else:
            data = request("POST /", "Transfer-Encoding: chunked") + CHUNKED
            for piece in [bytes([byte]) for byte in data] if "byte" in framing else [data]:
                peer.send(piece)
            assert peer.read_response().body == TEXT


def test_what_has_come_of_a_body_can_be_read_at_once(serving: Any) -> None:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield environ["wsgi.input"].read(4)
        yield environ["wsgi.input"].readline()

    peer = serving(app).peer
    peer.send(request("POST /", "Content-Length: 9") + b"some")
    peer.read_until(b"4\r\nsome\r\n")
    peer.send(b"more\n")
    peer.expect(b"5\r\nmore\n\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("Content-Length: 10", b"short"),
        ("Transfer-Encoding: chunked", b""),
        ("Transfer-Encoding: chunked", b"5\r\nsho"),
        ("Transfer-Encoding: chunked", b"5\r\nshort\r\n"),
        ("Transfer-Encoding: chunked", b"5\r\nshort\r\n0\r\n"),
    ],
)
def test_body_cut_short_raises_in_the_app(serving: Any, lines: Lines, head: str, body: bytes) -> None:
    began = threading.Event()
    raised: list[BaseException] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        began.set()
        start_response("200 OK", [])
        for _ in range(2):  # not an end of the body the second time either
            try:
                while environ["wsgi.input"].read(1000):
                    pass
            except ConnectionError as exc:
                raised.append(exc)
        raise raised[0]

    peer = serving(app).peer
    peer.send(request("POST /", head) + body)
    assert began.wait(wire.DEADLINE_S)
    peer.finish_sending()
    peer.read_to_end()
    lines.wait_for("INFO request r1: request body cut short")
    assert [type(exc) for exc in raised] == [pothead_worker.BodyError] * 2
    assert not lines.having("ERROR")


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"-1\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"5;\r\nhello\r\n0\r\n\r\n",
        b"5;a/b\r\nhello\r\n0\r\n\r\n",
        b"5;a=\r\nhello\r\n0\r\n\r\n",
        b'5;a="b\r\nhello\r\n0\r\n\r\n',
        b"5\r\nhello!\r\n0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"1" * 2000,
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    ],
)
def test_malformed_chunks_give_400_and_the_end_of_the_connection(
    serving: Any, lines: Lines, body: bytes
) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return [environ["wsgi.input"].read()]

    peer = serving(app).peer
    peer.send(request("POST /", "Transfer-Encoding: chunked") + body)
    response = peer.read_response()
    assert response.status == 400
    assert response.value(b"connection") == b"close"
    peer.finish_sending()
    peer.expect_eof()
    assert not lines.having("ERROR")


def test_malformed_body_stays_malformed(serving: Any, lines: Lines) -> None:
    raised: list[BaseException] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        for _ in range(2):  # what follows the bad line looks well-formed
            try:
                environ["wsgi.input"].read()
            except ConnectionError as exc:
                raised.append(exc)
        return hello(environ, start_response)

    peer = serving(app).peer
    peer.send(request("POST /", "Transfer-Encoding: chunked") + b"x\r\n5\r\nhello\r\n0\r\n\r\n")
    assert peer.read_response().value(b"connection") == b"close"
    assert [str(exc) for exc in raised] == ["malformed chunked body"] * 2


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 900000\r\n\r\n" + b"x" * 900_000,
        b"Content-Length: 5\r\n\r\nhello",
    ],
)
def test_unread_body_is_read_away(serving: Any, rest: bytes) -> None:
    peer = serving(hello).peer
    for _ in range(2):
        peer.send(request("POST /")[:-2] + rest)
        assert peer.read_response().value(b"connection") is None


def test_chunked_body_left_unread_ends_the_connection(serving: Any) -> None:
    peer = serving(hello).peer
    peer.send(request("POST /", "Transfer-Encoding: chunked") + CHUNKED)
    assert peer.read_response().value(b"connection") == b"close"
    peer.expect_eof()


def test_chunked_body_read_but_for_its_end_keeps_the_connection(serving: Any) -> None:
    def app(environ: Environ, start_response: Any) -> Iterator[bytes]:
        yield b""
        body = environ["wsgi.input"].read(1000) + environ["wsgi.input"].read()
        start_response("200 OK", [])
        yield body

    peer = serving(app).peer
    for _ in range(2):
        peer.send(request("POST /", "Transfer-Encoding: chunked") + CHUNKED)
        assert peer.read_response().body == TEXT


def test_8_mib_in_both_directions_do_not_deadlock(serving: Any) -> None:
    answer = b"y" * (8 << 20)
    peer = serving(app_returning(lambda: [answer])).peer
    data = request("POST /", body=b"x" * (8 << 20))

    def send() -> None:
        with contextlib.suppress(OSError):
            peer.send(data)

    sender = threading.Thread(target=send)
    sender.start()
    response = peer.read_response()
    assert response.body == answer
    assert response.value(b"connection") == b"close"
    peer.sock.shutdown(socket.SHUT_RDWR)
    sender.join()


def test_unread_body_that_does_not_come_ends_the_connection(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "DISCARD_TIMEOUT_S", 0.05)
    monkeypatch.setattr(pothead_worker, "LINGER_S", 0.05)
    peer = serving(hello).peer
    peer.send(request("POST /", "Content-Length: 10") + b"part")
    assert peer.read_response().body == b"hello"
    peer.expect_eof()


def test_unread_body_that_trickles_in_ends_the_connection(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "DISCARD_TIMEOUT_S", 0.0)
    served = serving(hello)
    served.peer.send(request("POST /", "Content-Length: 10") + b"part")
    assert served.peer.read_response().body == b"hello"
    served.peer.finish_sending()
    served.peer.expect_eof()


# ---- Request heads -----------------------------------------------------------------------------------


def whole_environ(serving: Any, start: str, *fields: str) -> Environ:
    seen: list[Environ] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        seen.append(environ)
        return hello(environ, start_response)

    ask(serving(app).peer, start, *fields)
    return seen[0]


def test_environ_says_what_the_request_said(serving: Any) -> None:
    environ = whole_environ(
        serving,
        "PUT /a%20b/%C3%A9?c=%20d",
        "X-Forwarded-For: 192.0.2.7",
        "X-Forwarded-Proto: https",
        "X-Request-Start: t=1.5",
        "Pothead-Queue-Seconds: 0.250",
        "Pothead-Attempt: 2",
        "Content-Type: text/plain",
        "Content-Length: 0",
        "Connection: keep-alive",
        "Accept: a",
        "ACCEPT:  b\t",
        "Cookie: c=1",
        "Cookie: d=2",
        "Proxy: evil",
        "X_Request_Id: evil",
        "Empty:",
    )
    assert isinstance(environ.pop("pothead.cancelled"), threading.Event)
    assert environ.pop("wsgi.input").read() == b""
    assert environ.pop("wsgi.errors") is sys.stderr
    assert callable(environ.pop("wsgi.file_wrapper"))
    assert environ == {
        "REQUEST_METHOD": "PUT",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a b/\xc3\xa9",
        "QUERY_STRING": "c=%20d",
        "REQUEST_URI": "/a%20b/%C3%A9?c=%20d",
        "SERVER_NAME": "example.org",
        "SERVER_PORT": "443",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.7",
        "REMOTE_PORT": "0",
        "REQUEST_ID": "r1",
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": "0",
        "HTTP_HOST": "example.org",
        "HTTP_X_REQUEST_ID": "r1",
        "HTTP_X_FORWARDED_FOR": "192.0.2.7",
        "HTTP_X_FORWARDED_PROTO": "https",
        "HTTP_X_REQUEST_START": "t=1.5",
        "HTTP_ACCEPT": "a, b",
        "HTTP_COOKIE": "c=1; d=2",
        "HTTP_EMPTY": "",
        "pothead.queue_seconds": 0.25,
        "pothead.attempt": 2,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "https",
        "wsgi.input_terminated": True,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }


def test_environ_has_defaults_for_what_the_hub_did_not_say(serving: Any) -> None:
    environ = whole_environ(serving, "OPTIONS *", "Pothead-Attempt: x", "Pothead-Queue-Seconds: -1")
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert (environ["wsgi.url_scheme"], environ["SERVER_PORT"]) == ("http", "80")
    assert (environ["pothead.queue_seconds"], environ["pothead.attempt"]) == (0.0, 1)
    assert (environ["PATH_INFO"], environ["REQUEST_URI"]) == ("", "*")


def test_repeated_body_of_the_environ_tells_a_chunked_one(serving: Any) -> None:
    environ = whole_environ(serving, "POST /", "Transfer-Encoding: Chunked\r\n\r\n0")
    assert "CONTENT_LENGTH" not in environ
    assert "HTTP_TRANSFER_ENCODING" not in environ  # or an app would decode the body a second time


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("", ""),
        ("192.0.2.1", "192.0.2.1"),
        ("made-up, 192.0.2.1", "192.0.2.1"),
        ("made-up, 192.0.2.1, 127.0.0.1", "192.0.2.1"),
        ("192.0.2.1, ::1", "192.0.2.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_remote_address_is_the_nearest_one_beyond_loopback(field: str, wanted: str) -> None:
    assert pothead_worker.forwarded_address({"X_FORWARDED_FOR": field}) == wanted


@pytest.mark.parametrize(
    ("host", "scheme", "wanted"),
    [
        ("example.org", "http", ("example.org", "80")),
        ("example.org:8080", "https", ("example.org", "8080")),
        ("[::1]:81", "http", ("[::1]", "81")),
        ("[::1]", "https", ("[::1]", "443")),
        ("", "http", ("localhost", "80")),
        ("a:b:c", "http", ("localhost", "80")),
    ],
)
def test_server_name_and_port_come_from_the_host(host: str, scheme: str, wanted: tuple[str, str]) -> None:
    assert pothead_worker.split_host(host, scheme) == wanted


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: x\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 66_000 + b"\r\n\r\n",
    ],
)
def test_garbage_gives_400_and_the_end_of_the_connection(serving: Any, lines: Lines, garbage: bytes) -> None:
    served = serving(hello)
    served.peer.send(garbage)
    served.peer.expect(b"HTTP/1.1 400 Bad Request\r\n")
    served.peer.read_until(b"\r\n\r\nBad Request\n")
    served.peer.finish_sending()
    served.peer.expect_eof()
    assert lines.wait_for("not a request from the hub").startswith("WARNING ")
    assert ask(served.accept_again()).body == b"hello"


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"], ["--poll-jobs"]])
def test_web_server_that_answers_instead_of_a_hub_is_told_once_an_episode(
    listener: wire.Listener, mode: list[str]
) -> None:
    refusal = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with wire.worker_process(listener, *mode) as worker:
        for _ in range(2):
            for _ in range(3):
                with listener.accept() as peer:
                    peer.send(refusal)
                    peer.expect_eof()
            with listener.accept() as peer:
                assert ask(peer).status == 200
        host, port = listener.worker
        told = [line for line in worker.errors if "web server" in line]
    assert len(told) == 2, worker.stderr
    assert f"{host}:{port}" in told[0] and "HTTP/1.1 408 Request Timeout" in told[0]
    assert " WARNING " in told[0] and "--connect" in told[0]


@pytest.mark.parametrize(("port", "told"), [(8080, "consumers"), (4041, "admins"), (4040, None)])
def test_worker_that_shall_connect_to_a_port_that_is_usually_another_warns_at_once(
    tmp_path: Path, port: int, told: str | None
) -> None:
    status, stderr = run_worker(["--check", "--connect", f"localhost:{port}"], tmp_path)
    assert (status, stderr.count("\n")) == (0, 1 if told else 0)
    if told:
        line = (
            f" WARNING pothead.worker: localhost:{port} is usually the hub's port for {told}; --connect is "
        )
        assert line in stderr


def test_worker_at_another_port_of_the_hub_is_told_so() -> None:
    with wire.hub_process("--keep-alive", "1200ms") as hub, contextlib.ExitStack() as stack:
        workers = []
        for port in (hub.main, hub.admin):
            hub.worker = port
            workers.append(stack.enter_context(wire.worker_process(hub, "--workers", "2")))
        for worker in workers:
            line = worker.wait_for_error(is_line("WARNING"))
            assert "closes what has waited for 1 s" in line and "--connect" in line
    for worker in workers:
        assert len([line for line in worker.errors if "WARNING" in line]) == 1


@pytest.mark.parametrize(
    ("closings", "is_told"),
    [
        ([(0, 75), (75.1, 150.2)], True),
        ([(0, 75), (0.1, 75.2), (75.3, 150.2)], True),
        ([(0, 75), (0.1, 75.1), (0.2, 75.1)], False),  # two slots of a hub that is stopped
        ([(0, 75), (75.1, 100)], False),
        ([(0, 0.5), (0.6, 1.1), (1.2, 1.7)], False),  # a hub that crashes and is started again and again
        ([(0, 75), "request", (75.1, 150.2)], False),
        ([(0, 75), "unreachable", (75.1, 150.2)], False),
    ],
)
def test_connections_that_end_after_the_same_time_each_are_told(
    lines: Lines, closings: list[tuple[float, float] | str], is_told: bool
) -> None:
    reachability = pothead_worker.Reachability(pothead_worker.Address("a", 1), 2, "slots=2")
    for event in closings:
        if event == "request":
            reachability.on_request()
        elif event == "unreachable":
            reachability.on_failed(ConnectionRefusedError())
        else:
            reachability.on_unused(*event)  # type: ignore[misc]
    assert bool(lines.having("closes what has waited for 75 s")) is is_told


def test_connection_that_ends_within_a_head_is_no_fault(serving: Any, lines: Lines) -> None:
    served = serving(hello)
    served.peer.send(b"GET / HT")
    served.peer.finish_sending()
    served.peer.expect_eof()
    assert ask(served.accept_again()).body == b"hello"
    assert not lines.having("WARNING")


def test_connection_reset_while_waiting_is_no_fault(serving: Any, lines: Lines) -> None:
    served = serving(hello)
    lines.wait_for("connected")
    served.peer.reset()
    assert ask(served.accept_again()).body == b"hello"
    assert not lines.having("WARNING")


def test_requests_sent_together_are_answered_in_order(serving: Any) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode() + environ["wsgi.input"].read()]

    peer = serving(app).peer
    peer.send(request("POST /1", body=b"x") + request("GET /2") + request("GET /3"))
    assert [peer.read_response().body for _ in range(3)] == [b"/1x", b"/2", b"/3"]


def test_connection_close_of_the_hub_is_obeyed(serving: Any) -> None:
    served = serving(hello)
    assert ask(served.peer, "GET /", "Connection: x, Close").value(b"connection") == b"close"
    served.peer.expect_eof()
    assert ask(served.accept_again()).body == b"hello"


# ---- Cancellation ------------------------------------------------------------------------------------


class Computing:
    """An app that computes until it is cancelled, and then yields once more."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.noticed_at: float | None = None
        self.went_on = False
        self.body = Body(self._compute, self._go_on)

    def _compute(self) -> bytes:
        self.began.set()
        if self.cancelled.wait(wire.DEADLINE_S):
            self.noticed_at = time.monotonic()
        return b""

    def _go_on(self) -> bytes:
        self.went_on = True
        return b"for nobody"

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        self.cancelled: threading.Event = environ["pothead.cancelled"]
        start_response("200 OK", [])
        return self.body


def leave_by_fin(peer: wire.Peer) -> None:
    peer.finish_sending()


def leave_by_reset(peer: wire.Peer) -> None:
    peer.reset()


@pytest.mark.parametrize("leave", [leave_by_fin, leave_by_reset])
@pytest.mark.parametrize("body", [b"", b"unread" * 10_000], ids=["no body", "unread body"])
def test_app_is_told_within_100_ms_that_the_consumer_has_gone(
    serving: Any, lines: Lines, body: bytes, leave: Callable[[wire.Peer], None]
) -> None:
    app = Computing()
    served = serving(app)
    served.peer.send(request("POST /", body=body))
    assert app.began.wait(wire.DEADLINE_S)
    left_at = time.monotonic()
    leave(served.peer)
    assert app.body.was_closed.wait(wire.DEADLINE_S)
    assert app.noticed_at and app.noticed_at - left_at < 0.1
    assert app.body.closed == 1
    assert not app.went_on
    lines.wait_for("INFO request r1: the consumer has gone")
    assert not lines.having("ERROR")
    served.accept_again()


def test_where_there_is_no_event_for_it_peeking_notices_too(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("select.POLLRDHUP")
    for leave in (leave_by_fin, leave_by_reset):
        app = Computing()
        served = serving(app)
        served.peer.send(request())
        assert app.began.wait(wire.DEADLINE_S)
        leave(served.peer)
        assert app.body.was_closed.wait(wire.DEADLINE_S)
        assert app.noticed_at
        served.accept_again()  # or the next pool's would be taken for it
        served.pool.stop_now()


def test_response_that_is_complete_too_late_is_dropped(serving: Any, lines: Lines) -> None:
    began = threading.Event()

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        began.set()
        assert environ["pothead.cancelled"].wait(wire.DEADLINE_S)
        return []

    peer = serving(app).peer
    peer.send(request())
    assert began.wait(wire.DEADLINE_S)
    peer.finish_sending()
    peer.expect_eof()
    lines.wait_for("the consumer has gone")


@pytest.mark.parametrize("length", [[], [("Content-Length", "5")]], ids=["ours", "the app's"])
@pytest.mark.parametrize("last", [[], [b""]])
def test_consumer_that_has_got_everything_may_go(
    serving: Any, lines: Lines, last: list[bytes], length: list[tuple[str, str]]
) -> None:
    """The hub knows a response's end by its length, and may close before the app's iterable has ended."""
    has_ended = threading.Event()

    class Body(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            yield b"hello"
            assert environs[0]["pothead.cancelled"].wait(wire.DEADLINE_S)
            yield from last

        def close(self) -> None:
            has_ended.set()

    environs: list[Environ] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        environs.append(environ)
        start_response("200 OK", length)
        return Body([b"one item"])  # so that its length is known

    served = serving(app)
    assert ask(served.peer).body == b"hello"
    served.accept_again()
    assert has_ended.is_set()
    assert not lines.having("the consumer has gone")


def test_failing_send_means_that_the_consumer_has_gone(serving: Any, lines: Lines) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 100_000

    peer = serving(app_returning(endless)).peer
    peer.send(request())
    peer.read_head()
    peer.reset()
    lines.wait_for("INFO request r1: the consumer has gone")


def test_request_that_was_answered_is_not_cancelled_by_the_end_of_its_connection(
    serving: Any, lines: Lines
) -> None:
    events: list[threading.Event] = []
    computing = Computing()

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        events.append(environ["pothead.cancelled"])
        return (computing if len(events) == 2 else hello)(environ, start_response)

    served = serving(app)
    ask(served.peer)
    served.peer.send(request())
    assert computing.began.wait(wire.DEADLINE_S)
    served.peer.finish_sending()
    lines.wait_for("gone")
    assert ask(served.accept_again()).body == b"hello"
    assert not events[0].is_set() and not events[-1].is_set()


class Held:
    """Holds lobbies up, once a seat of theirs has come to a stage, until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: pothead_worker.Stage) -> None:
        self.is_there, self.go_on = threading.Event(), threading.Event()
        wait_s = pothead_worker.Lobby._wait_s

        def hold(lobby: pothead_worker.Lobby) -> float | None:
            if any(seat.stage is stage for seat in lobby.seats):
                self.is_there.set()
                assert self.go_on.wait(wire.DEADLINE_S)
            return wait_s(lobby)

        monkeypatch.setattr(pothead_worker.Lobby, "_wait_s", hold)


def test_request_whose_consumer_left_before_it_began_is_not_run(
    serving: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    lobby = Held(monkeypatch, pothead_worker.Stage.WAITING)
    served = serving(raising(AssertionError("was run")))
    assert lobby.is_there.wait(wire.DEADLINE_S)
    served.peer.send(request())
    served.peer.finish_sending()
    lobby.go_on.set()
    lines.wait_for("the consumer had gone before it began")
    served.peer.expect_eof()
    assert not lines.having("was run")


def test_event_of_a_link_that_was_closed_in_this_turn_reaches_no_other() -> None:
    """A number is free again only after the turn, so no event of this one is taken for another link's."""
    has_ended = threading.Event()
    told: list[str] = []
    with contextlib.ExitStack() as stack:
        halt = stack.enter_context(contextlib.closing(pothead_worker.Halt()))
        lobby = pothead_worker.Lobby(("127.0.0.1", 1), halt, has_ended.set)
        pairs = [[stack.enter_context(sock) for sock in socket.socketpair()] for _ in range(21)]
        (old_sock, old_peer), *others = pairs
        old = pothead_worker.Link(pothead_worker.PlainTransport(old_sock))
        old.when_gone(lambda: told.append("old"))

        def watch_another(sock: socket.socket, name: str) -> None:
            """With the lowest number that is free: of so many, one has the old number, if that is free."""
            link = pothead_worker.Link(pothead_worker.PlainTransport(stack.enter_context(sock.dup())))
            link.when_gone(lambda: told.append(name))
            lobby.watch(link)

        def replace() -> None:
            lobby.dismiss(old)
            for number, (sock, _) in enumerate(others):
                watch_another(sock, f"number {number}")
            others[-1][1].shutdown(socket.SHUT_WR)
            lobby.order(lobby.end)  # in the next turn, where the end of the last link is found, too

        def begin() -> None:
            lobby.watch(old)
            old_peer.close()
            lobby.order(replace)  # in the next turn, where the end of the old link is found, too

        lobby.order(begin)
        lobby.start()
        assert has_ended.wait(wire.DEADLINE_S)
    assert told == ["number 19"]


# ---- Slots and their connections ---------------------------------------------------------------------


def test_each_slot_serves_one_request_at_a_time(listener: wire.Listener) -> None:
    both = threading.Barrier(2)

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        both.wait(wire.DEADLINE_S)
        return hello(environ, start_response)

    with running_pool(app, listener, workers=2), listener.accept() as one, listener.accept() as two:
        one.send(request())
        two.send(request())
        assert one.read_response().body == two.read_response().body == b"hello"


@pytest.fixture(params=[True, False], ids=["epoll", "poll"])
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with epoll, and one without; slots give a connection back after each request."""
    monkeypatch.setattr(pothead_worker, "HAND_BACK_S", 0.0)
    if not request.param:
        monkeypatch.delattr("select.epoll", raising=False)


@pytest.mark.usefixtures("kernel")
def test_connection_that_a_slot_has_given_back_is_waited_with_and_used_again(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    returns = Tries()
    give_back = pothead_worker.Seat.give_back

    def counting(seat: pothead_worker.Seat, ending: pothead_worker.Ending) -> None:
        give_back(seat, ending)
        returns.release()

    monkeypatch.setattr(pothead_worker.Seat, "give_back", counting)
    served = serving(hello)
    for _ in range(5):
        assert ask(served.peer).body == b"hello"
        assert returns.acquire_many(1)
    served.peer.finish_sending()
    served.peer.expect_eof()
    assert ask(served.accept_again()).body == b"hello"


@pytest.mark.usefixtures("kernel")
def test_connection_that_is_given_back_after_its_end_was_seen_is_replaced(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_back = pothead_worker.Seat.give_back
    is_read = threading.Event()

    def end_before(seat: pothead_worker.Seat, ending: pothead_worker.Ending) -> None:
        assert seat.link is not None and ending is pothead_worker.Ending.KEEP
        is_gone = threading.Event()
        seat.link.when_gone(is_gone.set)
        assert is_read.wait(wire.DEADLINE_S)
        served.peer.close()
        assert is_gone.wait(wire.DEADLINE_S)
        give_back(seat, ending)

    served = serving(hello)
    with monkeypatch.context() as patch:
        patch.setattr(pothead_worker.Seat, "give_back", end_before)
        assert ask(served.peer).body == b"hello"
        is_read.set()
        served.accept_again()
    assert ask(served.peer).body == b"hello"


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="without it, the lobby does all of this itself")
@pytest.mark.parametrize("moment", ["wait_again", "is_closing"])
def test_connection_that_is_given_back_during_the_halt_is_closed(
    serving: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    act, on_halt = getattr(pothead_worker.Lobby, moment), pothead_worker.Lobby._on_halt
    is_halted = threading.Event()

    def note(lobby: pothead_worker.Lobby, events: int) -> None:
        on_halt(lobby, events)
        is_halted.set()

    def halt_before(lobby: pothead_worker.Lobby, *arguments: Any) -> object:
        served.pool.stop()
        assert is_halted.wait(wire.DEADLINE_S)
        return act(lobby, *arguments)

    monkeypatch.setattr(pothead_worker.Lobby, "_on_halt", note)
    monkeypatch.setattr(pothead_worker.Lobby, moment, halt_before)
    served = serving(hello)
    monkeypatch.setattr(pothead_worker, "HAND_BACK_S", 0.0)
    monkeypatch.setattr(pothead_worker, "CROSSING_S", 0.0)
    assert ask(served.peer).body == b"hello"
    served.peer.expect_eof()
    assert served.pool.join() is True
    assert not lines.having("ERROR")


def test_connections_are_logged_once_they_all_are_there(listener: wire.Listener, lines: Lines) -> None:
    with running_pool(hello, listener, workers=2), listener.accept(), listener.accept():
        host, port = listener.worker
        assert lines.wait_for("connected") == f"INFO connected slots=2 hub={host}:{port}"


def test_connection_sends_at_once_and_notices_a_dead_hub(listener: wire.Listener) -> None:
    with socket.create_connection(listener.worker) as sock, listener.accept():
        pothead_worker.set_options(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        # It would end a response whose slow consumer makes the hub wait.
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_hub_that_comes_back_is_found_and_logged_once_an_episode(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "BACKOFF_LAST_S", 0.01)
    monkeypatch.setattr(pothead_worker, "BACKOFF_FIRST_S", 0.01)
    tries = count_tries(monkeypatch)
    with contextlib.ExitStack() as stack:
        listener = wire.Listener()
        address = listener.worker
        stack.enter_context(running_pool(hello, listener, workers=2))
        for wanted in ("connected slots=2", "connected again"):
            with listener, listener.accept(), listener.accept():
                lines.wait_for(wanted)
            assert tries.acquire_many(10)
            listener = reopen(address)
        listener.close()
    assert len(lines.having("unreachable")) == 2
    assert lines.having("unreachable")[0].startswith(
        f"WARNING hub {address[0]}:{address[1]} unreachable, trying again: Connection refused"
    )
    assert len(lines.having("connected again")) == 1


class Tries:
    def __init__(self) -> None:
        self._semaphore = threading.Semaphore(0)

    def release(self) -> None:
        self._semaphore.release()

    def acquire_many(self, count: int) -> bool:
        return all(self._semaphore.acquire(timeout=wire.DEADLINE_S) for _ in range(count))


def count_tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    """Count failed tries to reach the hub, with the real thing still being done."""
    tries = Tries()
    on_failed = pothead_worker.Reachability.on_failed

    def counting(self: pothead_worker.Reachability, reason: OSError) -> None:
        on_failed(self, reason)
        tries.release()

    monkeypatch.setattr(pothead_worker.Reachability, "on_failed", counting)
    return tries


def reopen(address: wire.Address) -> wire.Listener:
    """Listen at the address of a listener that was closed."""
    listener = wire.Listener()
    listener.sock.close()
    listener.sock = socket.create_server(address)
    listener.sock.settimeout(wire.DEADLINE_S)
    return listener


def test_back_off_doubles_from_50_ms_to_5_s_and_spreads() -> None:
    backoff = pothead_worker.Backoff()
    for limit_s in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
        assert limit_s / 2 <= backoff.next_wait_s() <= limit_s
    backoff.reset()
    assert 0.05 <= backoff.next_wait_s() <= 0.1


def test_connection_that_brought_no_request_is_followed_by_a_wait(serving: Any) -> None:
    served = serving(hello)
    times = []
    for _ in range(4):
        served.accept_again()
        times.append(time.monotonic())
    assert times[-1] - times[0] > 0.1 + 0.2 / 2
    assert ask(served.peer, "GET /", "Connection: close").status == 200
    served.accept_again()  # at once, and the next failure counts as the first
    [seat] = served.pool.lobby.seats
    assert seat.backoff.failures == 0


def test_fault_of_the_worker_itself_is_logged_and_the_slot_lives_on(
    serving: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving(hello)
    monkeypatch.setattr(pothead_worker, "parse_head", None)
    served.peer.send(request())
    served.peer.expect_eof()
    assert "Traceback" in lines.wait_for("a fault of the worker itself")
    monkeypatch.undo()
    assert ask(served.accept_again()).body == b"hello"


def test_slot_lives_on_when_there_is_no_thread_to_be_had(serving: Any, lines: Lines) -> None:
    served = serving(hello)
    with no_more_threads():
        served.peer.close()
        lines.wait_for("unreachable, trying again: can't start new thread")
    assert ask(served.accept_again()).status == 200
    lines.wait_for("INFO connected again")
    assert len(lines.having("unreachable")) == 1


def test_pool_drains_and_stops_when_there_is_no_thread_to_be_had(serving: Any, lines: Lines) -> None:
    app = Computing()
    served = serving(app)
    served.peer.send(request())
    assert app.began.wait(wire.DEADLINE_S)
    with no_more_threads():
        served.pool.stop()
        lines.wait_for("WARNING a time limit will not be kept: can't start new thread")
        served.pool.stop_now()
        assert not served.pool.join()


def answers_from(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """Have the resolver give these answers, one after the other; the last one for ever."""
    left = list(answers)

    def getaddrinfo(*_args: object, **_kwargs: object) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def address_info(address: wire.Address) -> tuple[Any, ...]:
    return socket.AF_INET, socket.SOCK_STREAM, 0, "", address


def test_last_good_addresses_are_used_while_the_name_service_fails(
    serving: Any, listener: wire.Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_from(monkeypatch, [address_info(listener.worker)], socket.gaierror("no such name"))
    served = serving(hello)
    assert ask(served.peer, "GET /", "Connection: close").status == 200
    assert ask(served.accept_again()).status == 200


def test_every_address_of_the_hub_is_tried(
    serving: Any, listener: wire.Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()
    answers_from(monkeypatch, [address_info(dead), address_info(listener.worker)])
    assert ask(serving(hello).peer).status == 200


@pytest.mark.parametrize(
    "failure", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label empty or too long")]
)
def test_hub_without_an_address_is_unreachable(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    answers_from(monkeypatch, failure)
    pool = WorkerPool(hello, "nowhere.invalid:1")
    pool.start()
    lines.wait_for(f"WARNING hub nowhere.invalid:1 unreachable, trying again: {failure.args[-1]}")
    pool.stop()
    assert pool.join()


def test_name_service_that_hangs_is_told_once_and_costs_one_thread(
    listener: wire.Listener, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back = threading.Event()

    def answer() -> list[Any]:
        assert is_back.wait(wire.DEADLINE_S)
        return [address_info(listener.worker)]

    answers_from(monkeypatch, answer)
    monkeypatch.setattr(pothead_worker, "CONNECT_TIMEOUT_S", 0.1)
    with running_pool(hello, listener, workers=3):
        lines.wait_for("unreachable, trying again: the name service does not answer")
        assert sum(thread.name == "pothead-resolver" for thread in threading.enumerate()) == 1
        is_back.set()
        lines.wait_for("connected slots=3")
        assert len(lines.having("unreachable")) == 1


# ---- Ending a pool -----------------------------------------------------------------------------------


def ended_within(seconds: float, pool: WorkerPool) -> bool:
    """Return whether the pool drained; fail if that takes longer."""
    began_at = time.monotonic()
    drained = pool.join()
    assert time.monotonic() - began_at < seconds
    return drained


def test_waiting_slots_are_closed_at_once(serving: Any) -> None:
    served = serving(hello)
    served.pool.stop()
    assert ended_within(1, served.pool)
    served.peer.expect_eof()


def test_running_request_is_finished_and_its_connection_closed(serving: Any) -> None:
    app = HeldApp()
    served = serving(app)
    served.peer.send(request())
    assert app.began.wait(wire.DEADLINE_S)
    served.pool.stop()
    served.pool.stop()  # a second one changes nothing
    app.go_on.set()
    response = served.peer.read_response()
    assert (response.body, response.value(b"connection")) == (b"hello", b"close")
    assert served.pool.join() is True


@pytest.mark.parametrize("stage", [pothead_worker.Stage.DIALLING, pothead_worker.Stage.WAITING])
def test_request_that_came_before_the_halt_is_answered(
    serving: Any, monkeypatch: pytest.MonkeyPatch, stage: pothead_worker.Stage
) -> None:
    """Also if the halt is noticed first, or even the connection is not known yet to be there."""
    lobby = Held(monkeypatch, stage)
    served = serving(hello)
    assert lobby.is_there.wait(wire.DEADLINE_S)
    served.peer.send(request())
    served.pool.stop()
    lobby.go_on.set()
    assert served.peer.read_response().value(b"connection") == b"close"
    assert served.pool.join() is True


def test_request_that_crosses_the_halt_is_answered(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub may send it on the heels of a response, before it can know."""
    monkeypatch.setattr(pothead_worker, "CROSSING_S", wire.DEADLINE_S)
    is_halted = threading.Event()
    wait_no_longer = pothead_worker.Seat._wait_no_longer

    def note(seat: pothead_worker.Seat) -> None:
        wait_no_longer(seat)
        is_halted.set()

    monkeypatch.setattr(pothead_worker.Seat, "_wait_no_longer", note)
    served = serving(hello)
    assert ask(served.peer).body == b"hello"
    served.pool.stop()
    assert is_halted.wait(wire.DEADLINE_S)
    response = ask(served.peer)
    assert (response.body, response.value(b"connection")) == (b"hello", b"close")
    assert served.pool.join() is True


def test_graceful_timeout_cuts_off_what_still_runs(serving: Any, lines: Lines) -> None:
    app = Computing()
    served = serving(app, graceful_timeout_s=0.05)
    served.peer.send(request())
    assert app.began.wait(wire.DEADLINE_S)
    served.pool.stop()
    assert ended_within(2, served.pool) is False
    assert app.noticed_at
    served.peer.expect_eof()
    lines.wait_for("WARNING stopping at once: running requests cut off: 1")
    lines.wait_for("INFO request r1: cut off: the worker stops at once")
    assert not lines.having("the consumer has gone")


def test_stop_now_does_not_wait_for_an_app_that_does_not_listen(serving: Any) -> None:
    app = HeldApp()
    served = serving(app)
    served.peer.send(request())
    assert app.began.wait(wire.DEADLINE_S)
    served.pool.stop_now()
    assert ended_within(2, served.pool) is False
    app.go_on.set()


def test_stop_interrupts_a_wait_for_the_next_try(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pothead_worker, "BACKOFF_FIRST_S", 60.0)
    monkeypatch.setattr(pothead_worker, "BACKOFF_LAST_S", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    pool = WorkerPool(hello, address)
    pool.start()
    lines.wait_for("unreachable")
    pool.stop()
    assert ended_within(1, pool)


def test_stop_interrupts_a_connection_attempt(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()
    dial = pothead_worker.Seat._dial

    def telling(seat: pothead_worker.Seat, *found: Any) -> None:
        dial(seat, *found)
        assert seat.stage is pothead_worker.Stage.DIALLING
        waiting.set()

    monkeypatch.setattr(pothead_worker.Seat, "_dial", telling)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stack.enter_context(socket.create_connection(listening.getsockname()))  # the one place in its queue
        pool = WorkerPool(hello, listening.getsockname())
        pool.start()
        assert waiting.wait(wire.DEADLINE_S)
        pool.stop()
        assert ended_within(1, pool)
    assert not lines.having("WARNING")


def test_connection_attempt_has_a_time_limit(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pothead_worker, "CONNECT_TIMEOUT_S", 0.05)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stack.enter_context(socket.create_connection(listening.getsockname()))
        pool = WorkerPool(hello, listening.getsockname())
        pool.start()
        lines.wait_for("unreachable, trying again: Connection timed out")
        pool.stop()
        pool.join()


def test_stop_does_not_wait_for_the_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def answer() -> list[Any]:
        asked.set()
        go_on.wait(wire.DEADLINE_S)
        return []

    answers_from(monkeypatch, answer)
    pool = WorkerPool(hello, "slow.invalid:1")
    pool.start()
    assert asked.wait(wire.DEADLINE_S)
    pool.stop()
    assert ended_within(1, pool)
    go_on.set()


def test_pool_runs_in_a_thread_and_is_stopped_from_another(listener: wire.Listener) -> None:
    results: list[bool] = []
    pool = WorkerPool(hello, connect="{}:{}".format(*listener.worker))
    thread = threading.Thread(target=lambda: results.append(pool.run()))
    thread.start()
    with listener.accept() as peer:
        assert ask(peer).body == b"hello"
        pool.stop()
        thread.join(wire.DEADLINE_S)
    assert results == [True]
    pool.stop()
    pool.stop_now()
    with pytest.raises(RuntimeError, match="runs once"):
        pool.start()


@pytest.mark.parametrize("stop", [WorkerPool.stop, WorkerPool.stop_now])
def test_pool_that_was_stopped_before_it_began_ends_at_once(stop: Callable[[WorkerPool], None]) -> None:
    pool = WorkerPool(hello, ("127.0.0.1", 1), graceful_timeout_s=60)
    stop(pool)
    assert pool.run() is True


@pytest.mark.parametrize("options", [{"workers": 0}, {"connect": "nowhere"}, {"connect": "[::1]:0"}])
def test_pool_refuses_senseless_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WorkerPool(hello, **options)


# ---- The demo application ----------------------------------------------------------------------------

demo = validator(pothead_worker.demo_app)


def test_demo_greets(serving: Any) -> None:
    peer = serving(demo).peer
    text = ask(peer, "GET /", "Pothead-Queue-Seconds: 1.25").body.decode()
    assert "request id: r1\n" in text and "queued: 1.250 s\n" in text and "thread: pothead-slot-1\n" in text
    assert re.search(r"^process: [0-9]+$", text, re.MULTILINE)
    assert ask(peer, "HEAD /").value(b"content-length") == str(len(text.replace("1.250", "0.000"))).encode()


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_demo_compresses(serving: Any, method: str) -> None:
    data = bytes(range(256)) * 4000
    peer = serving(demo).peer
    response = ask(peer, f"{method} /xz", body=data)
    assert response.value(b"content-type") == b"application/x-xz"
    assert lzma.decompress(response.body) == data


@pytest.mark.parametrize(
    ("start", "status", "allow"),
    [
        ("GET /nowhere", 404, None),
        ("PUT /", 405, b"GET, HEAD"),
        ("GET /xz", 405, b"POST, PUT"),
        ("OPTIONS *", 404, None),
    ],
)
def test_demo_refuses_the_rest(serving: Any, start: str, status: int, allow: bytes | None) -> None:
    response = ask(serving(demo).peer, start)
    assert (response.status, response.value(b"allow")) == (status, allow)


def test_demo_stops_compressing_for_nobody() -> None:
    cancelled = threading.Event()
    cancelled.set()
    environ = {"pothead.cancelled": cancelled}
    assert list(pothead_worker.compress(environ, lambda *_: bytearray().extend)) == []


# ---- The command line --------------------------------------------------------------------------------


def run_worker(arguments: list[str], cwd: Path, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a worker that is to end by itself; return its exit status and what it wrote to stderr."""
    ended = wire.run_to_end(
        [*wire.program("pothead_worker"), *arguments], cwd, environment, may_complain=True
    )
    return ended.status, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--connect", "localhost"], {}, "--connect: 'localhost' is not HOST:PORT"),
        (["--connect", ":4040"], {}, "--connect: ':4040'"),
        (["--connect", "::1:4040"], {}, "--connect: '::1:4040'"),
        (["--connect", "localhost:70000"], {}, "--connect: 'localhost:70000'"),
        (["--workers", "0"], {}, "--workers: '0'"),
        (["--workers", "x"], {}, "--workers: 'x'"),
        (["--graceful-timeout", "soon"], {}, "--graceful-timeout: 'soon' is not a duration"),
        (["--log-level", "loud"], {}, "--log-level: 'loud'"),
        (["--no-such-option"], {}, "--no-such-option"),
        (["--work", "2"], {}, "--work"),
        ([":app"], {}, "':app' is not MODULE:APP"),
        (["a.py:app:x"], {}, "'a.py:app:x' is not MODULE:APP"),
        *[
            ([f"a:{app}"], {}, f"'a:{app}' is not MODULE:APP")
            for app in ("", "1", "b+c", "b(", "b()()", "b().c")
        ],
        *[
            ([f"a:b({given})"], {}, f"'a:b({given})': the arguments must be literals")
            for given in ("x", "*[1]", "**{}", "{[]: 1}", "len(y)")
        ],
        ([], {"POTHEAD_CONNECT": "x"}, "POTHEAD_CONNECT: 'x'"),
        ([], {"POTHEAD_WORKER_CONNECT": "x", "POTHEAD_CONNECT": "a:1"}, "POTHEAD_WORKER_CONNECT: 'x'"),
        ([], {"POTHEAD_WORKERS": "-1"}, "POTHEAD_WORKERS: '-1'"),
        ([], {"POTHEAD_WORKER_WORKERS": "1_0"}, "POTHEAD_WORKER_WORKERS: '1_0'"),
        ([], {"POTHEAD_WORKER_GRACEFUL_TIMEOUT": "1d"}, "POTHEAD_WORKER_GRACEFUL_TIMEOUT: '1d'"),
        (["--request-timeout", "5s"], {}, "--request-timeout: only a process can be stopped"),
        (["--use-request-subprocess", "--request-timeout", "0"], {}, "--request-timeout: '0' is no time"),
        (
            ["--use-request-subprocess", "--request-timeout", "x"],
            {},
            "--request-timeout: 'x' is not a duration",
        ),
        ([], {"POTHEAD_WORKER_USE_REQUEST_SUBPROCESS": "2"}, "SUBPROCESS: '2' is neither yes nor no"),
        ([], {"POTHEAD_WORKER_REQUEST_TIMEOUT": "1s"}, "only a process can be stopped"),
        (["--redirect-response", "70000"], {}, "--redirect-response: '70000' is not a port"),
        (["--redirect-response", "x"], {}, "--redirect-response: 'x' is not a port"),
        (["--redirect-host", "a"], {}, "--redirect-host: there is no --redirect-response"),
        (["--redirect-response", "0", "--redirect-host", "a b"], {}, "'a b' is not a host name"),
        (["--redirect-response", "0", "--redirect-host", "a/b"], {}, "'a/b' is not a host name"),
        ([], {"OOB_ITEM_EXPIRY_SECONDS": "x"}, "OOB_ITEM_EXPIRY_SECONDS: 'x'"),
        ([], {"OOB_CLEANUP_INTERVAL_SECONDS": "0"}, "OOB_CLEANUP_INTERVAL_SECONDS: '0'"),
        ([], {"OOB_CLEANUP_INTERVAL_SECONDS": "off"}, "OOB_CLEANUP_INTERVAL_SECONDS: 'off'"),
        ([], {"OOB_CLEANUP_INTERVAL_SECONDS": "600h"}, "OOB_CLEANUP_INTERVAL_SECONDS: '600h'"),
        (["--graceful-timeout", "999999999h"], {}, "--graceful-timeout: '999999999h' is too long"),
        (["--inspection-port", "65536"], {}, "--inspection-port: '65536' is not a port from 0 to 65535"),
        (
            ["--inspection-port", "0", "--inspection-host", "a b"],
            {},
            "--inspection-host: 'a b' is not a host",
        ),
    ],
)
def test_senseless_option_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    named: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pothead_worker.main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("pothead-worker: ") and named in written.err
    assert written.err.count("\n") == 1


def test_process_ends_with_2_after_a_usage_error(tmp_path: Path) -> None:
    status, stderr = run_worker(["--connect", "localhost"], tmp_path)
    assert status == 2
    assert stderr.count("\n") == 1


def test_options_come_from_the_command_line_then_the_environment_then_the_defaults() -> None:
    environment = {"POTHEAD_WORKER_WORKERS": "3", "POTHEAD_WORKERS": "4", "POTHEAD_CONNECT": "[::1]:5"}
    options = pothead_worker.parse_args(["--graceful-timeout", "1.5m", "m:a"], environment)
    assert options == pothead_worker.Options(
        connect=(pothead_worker.Address("::1", 5),),
        workers=3,
        graceful_timeout=90.0,
        log_level="info",
        app="m:a",
    )
    assert str(options.connect[0]) == "[::1]:5"
    assert pothead_worker.parse_args(["--workers", "2"], environment).workers == 2
    defaults = pothead_worker.parse_args([], {"POTHEAD_WORKER_CONNECT": "", "POTHEAD_WORKERS": "4"})
    assert str(defaults.connect[0]) == "localhost:4040"
    assert (defaults.workers, defaults.graceful_timeout, defaults.app) == (4, 30.0, None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("30s", 30), ("2m", 120), ("1h", 3600), ("7", 7), ("0", 0)]
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert pothead_worker.parse_duration(text) == seconds


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        pothead_worker.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("--connect", "--workers", "--graceful-timeout", "--log-level", "MODULE:APP"):
        assert option in text


# ---- Loading an application --------------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to be the working directory, which is left as it was found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def app(e, s): return 'it'", "mod:app"),
        ("def app(e, s): return 'it'\ndef application(e, s): return 'not it'", "mod"),
        ("def application(e, s): return 'it'", "mod"),
        ("class Site:\n    def app(self, e, s): return 'it'\nsite = Site()", "mod:site.app"),
    ],
)
def test_app_is_found_in_the_working_directory(modules: Path, source: str, name: str) -> None:
    (modules / "mod.py").write_text(source)
    assert pothead_worker.load_app(name)({}, None) == "it"  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("name", "made_with"),
    [
        ("mod:make()", (1, "no")),
        ("mod:make(2)", (2, "no")),
        ("mod:make(-2, debug='yes')", (-2, "yes")),
        ("mod:make(debug={'a': [None, b'x']})", (1, {"a": [None, b"x"]})),
        ("mod:Site.make('it')", ("it", "no")),
    ],
)
def test_app_is_made_by_a_function_with_literal_arguments(
    modules: Path, name: str, made_with: tuple[object, object]
) -> None:
    (modules / "mod.py").write_text(
        "def make(number=1, *, debug='no'): return lambda environ, start_response: (number, debug)\n"
        "class Site: make = staticmethod(make)\n"
    )
    assert pothead_worker.load_app(name)({}, None) == made_with  # type: ignore[arg-type, comparison-overlap]


FACTORIES = """
    def make(name): return lambda environ, start_response: [name]
    def make_by_default(*, name="x"): return make(name)
    async def asgi(scope, receive, send): pass
    class Asgi:
        async def __call__(self, scope, receive, send): pass
    also_asgi = Asgi()
    def make_nothing(): pass
    def make_asgi(): return also_asgi
    def fail(): return 1 / 0
"""
NOT_CALLED_LIKE_THAT = "it does not take (environ, start_response)"
NEEDS_SERVER = f"{NOT_CALLED_LIKE_THAT}; an ASGI app needs a server of its own, and --forward"


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mod:make", f"{NOT_CALLED_LIKE_THAT}; if it makes the app, say 'mod:make()'"),
        ("mod:make_by_default", f"{NOT_CALLED_LIKE_THAT}; if it makes the app, say 'mod:make_by_default()'"),
        ("mod:asgi", NEEDS_SERVER),
        ("mod:also_asgi", NEEDS_SERVER),
        ("mod:make_asgi()", NEEDS_SERVER),
        ("mod:make()", "make() missing 1 required positional argument: 'name'"),
        ("mod:make('a', b=1)", "make() got an unexpected keyword argument 'b'"),
        ("mod:make_nothing()", "it made NoneType, which is not callable"),
        ("mod:none()", "module 'mod' has no attribute 'none'"),
        ("mod:fail()", "making the app failed"),
    ],
)
def test_function_that_is_or_makes_no_app_is_told(
    modules: Path, name: str, wanted: str, mode: list[str]
) -> None:
    (modules / "mod.py").write_text(textwrap.dedent(FACTORIES))
    status, stderr = run_worker([*mode, name], modules)
    *trace, last = stderr.splitlines()
    assert (status, last) == (3, f"pothead-worker: cannot load {name!r}: {wanted}")
    assert trace[-1:] == (["ZeroDivisionError: division by zero"] if "fail" in name else [])
    assert "pothead_worker.py" not in stderr


def test_decorated_app_is_taken_for_what_it_is(modules: Path) -> None:
    (modules / "mod.py").write_text(
        "import functools\n"
        "def inner(environ, start_response, database): return database\n"
        "@functools.wraps(inner)\n"
        "def app(*arguments): return inner(*arguments, 'it')\n"
    )
    assert pothead_worker.load_app("mod:app")({}, None) == "it"  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nomod:app", "cannot load 'nomod:app': there is no module 'nomod'; looked in CWD first"),
        ("nopack.mod:app", "cannot load 'nopack.mod:app': there is no module 'nopack'; looked in CWD first"),
        (
            "pack.nomod:app",
            "cannot load 'pack.nomod:app': there is no module 'pack.nomod'; looked in CWD first",
        ),
        ("mod.py", "cannot load 'mod.py': there is no module 'mod.py'; did you mean mod:app?"),
        ("mod.py:it", "cannot load 'mod.py:it': there is no module 'mod.py'; did you mean mod:it?"),
        ("nomod.py", "cannot load 'nomod.py': there is no module 'nomod'; did you mean nomod:app?"),
        ("mod:nothing", "cannot load 'mod:nothing': module 'mod' has no attribute 'nothing'"),
        ("mod:a.b", "cannot load 'mod:a.b': module 'mod' has no attribute 'a.b'"),
        ("mod", "cannot load 'mod': module 'mod' has no attribute 'app' or 'application'"),
        ("mod:number", "cannot load 'mod:number': 'number' of module 'mod' is not callable"),
    ],
)
def test_app_that_is_not_there_is_named_in_one_line(modules: Path, name: str, wanted: str) -> None:
    (modules / "mod.py").write_text("number = 5")
    (modules / "pack").mkdir()
    (modules / "pack" / "__init__.py").touch()
    status, stderr = run_worker([name], modules)
    assert (status, stderr) == (3, f"pothead-worker: {wanted}\n".replace("CWD", str(modules)))


@pytest.mark.parametrize("patched", ["threading", "socket", "select"])
@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])
def test_app_that_patches_threads_or_sockets_is_refused(
    tmp_path: Path, patched: str, mode: list[str]
) -> None:
    """With a stand-in for gevent, which is no dependency of the tests: it tells what has been patched."""
    (tmp_path / "gevent").mkdir()
    (tmp_path / "gevent" / "__init__.py").touch()
    (tmp_path / "gevent" / "monkey.py").write_text(f"is_module_patched = lambda name: name == {patched!r}")
    (tmp_path / "green.py").write_text("import gevent.monkey\nfrom pothead_worker import demo_app as app")
    status, stderr = run_worker([*mode, "green:app"], tmp_path, {"PYTHONPATH": str(wire.ROOT)})
    assert status == 3
    assert stderr.startswith("pothead-worker: cannot load 'green:app': it calls gevent.monkey.patch_all(), ")
    assert "behind --forward" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("def app(", "SyntaxError: '(' was never closed"),
    ],
)
def test_import_that_fails_shows_its_own_traceback_first(modules: Path, source: str, wanted: str) -> None:
    (modules / "mod.py").write_text(source)
    status, stderr = run_worker(["mod:app"], modules)
    *trace, last = stderr.splitlines()
    assert (status, last) == (3, "pothead-worker: cannot load 'mod:app': importing module 'mod' failed")
    assert trace[-1] == wanted
    assert "pothead_worker.py" not in stderr and "importlib" not in stderr and "mod.py" in stderr


# ---- The process -------------------------------------------------------------------------------------

SLOW_APP = """
    import threading

    def app(environ, start_response):
        print("running", flush=True)
        if environ["PATH_INFO"] == "/compute":
            threading.Event().wait(60)
        write = start_response("200 OK", [])
        if environ["PATH_INFO"] == "/early":
            write(b"early ")
        return [environ["wsgi.input"].read()]
"""


@pytest.fixture
def slow_app(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW_APP))
    return tmp_path


def test_process_serves_the_demo_and_drains_when_idle(listener: wire.Listener) -> None:
    with wire.worker_process(listener, "--workers", "2") as worker:
        with listener.accept() as one, listener.accept() as two:
            worker.wait_for_error(is_line("INFO pothead.worker: connected slots=2 hub=127.0.0.1:"))
            assert f"process: {worker.pid}".encode() in ask(one).body
            worker.send_signal(signal.SIGHUP)
            assert ask(two).status == 200
            worker.terminate()
            one.expect_eof()
            two.expect_eof()
            assert worker.wait() == 0


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])
@pytest.mark.parametrize("is_ignored", [False, True])
def test_programs_that_the_app_starts_ignore_sighup_only_if_the_worker_was_told_to(
    is_ignored: bool, mode: list[str], listener: wire.Listener, tmp_path: Path
) -> None:
    (tmp_path / "starting.py").write_text(
        "import subprocess\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [subprocess.check_output(['grep', 'SigIgn', '/proc/self/status'])]\n"
    )
    command = wire.python(wire.compiled("pothead_worker"), "--connect", "{}:{}".format(*listener.worker))
    nohup = ["nohup"] if is_ignored else []
    with wire.running(wire.WorkerProcess([*nohup, *command, *mode, "starting:app"], tmp_path)) as worker:
        with listener.accept() as peer:
            worker.send_signal(signal.SIGHUP)
            mask = int(ask(peer).body.split()[1], 16)
            assert bool(mask & 1 << signal.SIGHUP - 1) == is_ignored


def test_process_can_be_run_as_a_module_with_its_options_in_the_environment(
    listener: wire.Listener, slow_app: Path
) -> None:
    environment = {
        "POTHEAD_CONNECT": "{}:{}".format(*listener.worker),
        "POTHEAD_WORKERS": "2",
        "POTHEAD_WORKER_LOG_LEVEL": "Debug",
        "PYTHONPATH": str(wire.ROOT),
    }
    program = wire.Program(wire.python("-m", "pothead_worker", "slow:app"), slow_app, environment)
    with wire.running(program) as worker, listener.accept() as one, listener.accept():
        assert ask(one, "GET /?secret").body == b""
        assert "secret" not in worker.wait_for_error(is_line("DEBUG pothead.worker: request r1: GET /"))


def test_process_finishes_what_runs_before_it_ends(listener: wire.Listener, slow_app: Path) -> None:
    with wire.worker_process(listener, "slow:app", cwd=slow_app) as worker, listener.accept() as peer:
        peer.send(request("POST /", "Content-Length: 4"))
        worker.wait_for_line(is_line("running"))
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
        peer.send(b"done")
        assert peer.read_response().body == b"done"
        peer.expect_eof()
        assert worker.wait() == 0


def test_request_that_was_sent_before_the_hub_could_know_of_the_drain_is_served(
    listener: wire.Listener, slow_app: Path
) -> None:
    with wire.worker_process(listener, "slow:app", cwd=slow_app) as worker, listener.accept() as peer:
        peer.send(request("POST /early", "Content-Length: 4"))
        assert b"Connection" not in peer.read_head()
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
        peer.send(b"late")
        peer.expect(b"6\r\nearly \r\n4\r\nlate\r\n0\r\n\r\n")
        peer.send(request("POST /", "Content-Length: 4") + b"next")
        response = peer.read_response()
        assert (response.body, response.value(b"Connection")) == (b"next", b"close")
        peer.expect_eof()
        assert worker.wait() == 0


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT], [signal.SIGINT]]
)
def test_process_cuts_off_what_runs_when_told_twice_or_interrupted(
    listener: wire.Listener, slow_app: Path, signals: list[signal.Signals]
) -> None:
    with wire.worker_process(listener, "slow:app", cwd=slow_app) as worker, listener.accept() as peer:
        peer.send(request("GET /compute"))
        worker.wait_for_line(is_line("running"))
        for number in signals:
            worker.send_signal(number)
            if number == signal.SIGTERM:
                worker.wait_for_error(is_line("draining"))
        peer.expect_eof()
        assert worker.wait() == 1
        assert "Traceback" not in worker.stderr


def test_process_drains_within_the_graceful_timeout(listener: wire.Listener, slow_app: Path) -> None:
    arguments = ["--graceful-timeout", "50ms", "slow:app"]
    with wire.worker_process(listener, *arguments, cwd=slow_app) as worker, listener.accept() as peer:
        peer.send(request("GET /compute"))
        worker.wait_for_line(is_line("running"))
        worker.terminate()
        assert worker.wait() == 1
        peer.expect_eof()


def test_interrupt_ends_an_idle_process_quietly(listener: wire.Listener) -> None:
    with wire.worker_process(listener) as worker, listener.accept():
        worker.wait_for_error(is_line("connected"))
        worker.send_signal(signal.SIGINT)
        assert worker.wait() == 0
        assert worker.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_app_is_imported_ends_the_process_quietly(
    listener: wire.Listener, tmp_path: Path, number: signal.Signals
) -> None:
    # In naps: a signal just before a long call into C waits for the end of that call.
    (tmp_path / "big.py").write_text(
        "import time\nprint('importing', flush=True)\nwhile True: time.sleep(0.01)"
    )
    with wire.worker_process(listener, "big:app", cwd=tmp_path) as worker:
        worker.wait_for_line(is_line("importing"))
        worker.send_signal(number)
        assert worker.wait() == 0
        assert worker.stderr == ""


def test_process_does_not_wait_for_threads_that_the_app_left_behind(
    listener: wire.Listener, tmp_path: Path
) -> None:
    (tmp_path / "leaky.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, args=(60,), name='left-behind').start()\n"
        "def app(environ, start_response): pass\n"
    )
    with wire.worker_process(listener, "leaky:app", cwd=tmp_path, limits=IMPATIENT) as worker:
        listener.accept().close()
        worker.terminate()
        worker.wait_for_error(is_line("leaving without threads of the application: left-behind"))
        assert worker.wait() == 0


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])
@pytest.mark.parametrize("where", ["import", "request"])
def test_app_that_configures_logging_does_not_silence_the_worker(
    where: str, mode: list[str], listener: wire.Listener, tmp_path: Path
) -> None:
    configure = "logging.config.dictConfig({'version': 1})"  # disables what it does not name
    (tmp_path / "loud.py").write_text(
        "import logging.config\n"
        f"{configure if where == 'import' else ''}\n"
        "def app(environ, start_response):\n"
        f"    {configure}\n"
        "    raise RuntimeError('oops')\n"
    )
    with wire.worker_process(listener, *mode, "loud:app", cwd=tmp_path) as worker, listener.accept() as peer:
        for _ in range(2):
            assert ask(peer).status == 500
        for text in ("connected slots=1", "application raised an exception", "RuntimeError: oops"):
            worker.wait_for_error(is_line(text))
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
        assert worker.wait() == 0
        assert worker.stderr.count("RuntimeError: oops") == 2
        worker.errors.clear()  # its tracebacks would be faults otherwise


STAYING_APP = """
    import atexit, threading
    from concurrent.futures import ThreadPoolExecutor

    EXECUTOR = ThreadPoolExecutor(1, "hung")

    def stay():
        print("last words", end="")
        print("staying", flush=True, file=sys.stderr)
        threading.Event().wait(60)

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/job":
            EXECUTOR.submit(stay)
        else:
            atexit.register(stay)
        start_response("200 OK", [])
        return []
"""

# What an ended worker grants to the app that still does something, cut short.
IMPATIENT = {"EXIT_GRACE_S": 0.2}


@pytest.fixture
def staying_app(tmp_path: Path) -> Path:
    (tmp_path / "staying.py").write_text("import sys\n" + textwrap.dedent(STAYING_APP))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/job", "leaving without threads of the application: hung_0"),
        ("/at-exit", "leaving although the application has not finished its exit"),
    ],
)
def test_drained_process_ends_whatever_the_app_still_does(
    listener: wire.Listener, staying_app: Path, path: str, told: str
) -> None:
    with wire.worker_process(listener, "staying:app", cwd=staying_app, limits=IMPATIENT) as worker:
        with listener.accept() as peer:
            assert ask(peer, f"GET {path}").status == 200
            worker.terminate()
            peer.expect_eof()
            worker.wait_for_error(is_line(told))
            assert worker.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("path", ["/job", "/at-exit"])
def test_process_that_is_told_once_more_waits_for_nothing_of_the_app(
    listener: wire.Listener, staying_app: Path, path: str, number: signal.Signals
) -> None:
    command = wire.program("pothead_worker", {"EXIT_GRACE_S": 3600.0})
    command.remove("-u")  # its output is buffered, as it is for users
    command += ["--connect", "{}:{}".format(*listener.worker), "staying:app"]
    with wire.running(wire.Program(command, staying_app)) as worker, listener.accept() as peer:
        assert ask(peer, f"GET {path}").status == 200
        worker.terminate()
        peer.expect_eof()
        worker.wait_for_error(is_line("staying"))
        ends_at = time.monotonic() + wire.DEADLINE_S
        while worker.process.poll() is None:  # the first one may still find requests to cut off
            assert time.monotonic() < ends_at
            worker.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(0.1)
        assert worker.wait() == 0
        assert worker.lines == ["last words"]


def test_process_whose_app_cannot_be_loaded_does_not_wait_for_its_threads(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, args=(60,), name='left-behind').start()\n"
    )
    status, stderr = run_worker(["broken:app"], tmp_path)
    assert status == 3
    assert "leaving without threads of the application: left-behind" in stderr


# ---- Signal handlers of the app ----------------------------------------------------------------------

HANDLING_APP = """
    import signal, sys, threading

    def exit_by(status):
        print("handled in", threading.current_thread().name, flush=True)
        sys.exit(status)

    def fail(status):
        raise RuntimeError("in the handler")

    def hang(status):
        print("hanging", flush=True)
        threading.Event().wait(60)

    def app(environ, start_response):
        start_response("200 OK", [])
        print("running", flush=True)
        return [environ["wsgi.input"].read()]
"""


@pytest.fixture
def handling_app(tmp_path: Path) -> Callable[[str], str]:
    """Make an app that handles SIGTERM in the way named; return its name."""

    def make(handler: str) -> str:
        text = textwrap.dedent(HANDLING_APP) + f"\nsignal.signal(signal.SIGTERM, lambda *_: {handler}(9))\n"
        (tmp_path / "handling.py").write_text(text)
        return "handling:app"

    return make


@pytest.mark.parametrize(
    ("handler", "told"),
    [("exit_by", "handled in MainThread"), ("fail", "RuntimeError: in the handler"), ("hang", "hanging")],
)
def test_handler_of_the_app_is_called_once_and_does_not_end_the_drain(
    listener: wire.Listener, tmp_path: Path, handling_app: Any, handler: str, told: str
) -> None:
    app = handling_app(handler)
    process = wire.worker_process(listener, app, cwd=tmp_path, limits=IMPATIENT)
    with process as worker, listener.accept() as peer:
        peer.send(request("POST /", "Content-Length: 4"))
        worker.wait_for_line(is_line("running"))
        worker.terminate()
        worker.wait_for_error(is_line("draining"))
        (worker.wait_for_error if handler == "fail" else worker.wait_for_line)(is_line(told))
        peer.send(b"done")
        assert peer.read_response().body == b"done"
        peer.expect_eof()
        assert worker.wait() == 0
        assert [*worker.lines, *worker.errors].count(told) == 1
        worker.errors.clear()  # the traceback


@pytest.mark.parametrize("handler", ["exit_by", "hang"])
def test_process_whose_app_handles_signals_can_be_ended_at_once(
    listener: wire.Listener, tmp_path: Path, handling_app: Any, handler: str
) -> None:
    app = handling_app(handler)
    process = wire.worker_process(listener, app, cwd=tmp_path, limits=IMPATIENT)
    with process as worker, listener.accept() as peer:
        peer.send(request("POST /", "Content-Length: 4"))
        worker.wait_for_line(is_line("running"))
        for _ in range(2):
            worker.terminate()
            worker.wait_for_error(is_line("draining"))
        peer.expect_eof()
        assert worker.wait() == 1
        assert len(worker.lines) == 2, "the app was told once"
