"""POTHEAD's worker: runs a WSGI application for requests that a hub hands out one at a time.

An ordinary HTTP server waits for connections. This one opens them itself: each of its *slots* dials the
*hub*, and the open connection says "I am free". The hub sends the oldest waiting request down a free
connection, the worker answers on it, and the connection is free again. So nothing is ever sent to a busy
worker, and a worker needs no address of its own.

    consumer ──HTTP──▶ hub ◀──TCP connect── slot (a thread) ── WSGI app
                           ──HTTP request─▶
                           ◀─HTTP response─

Run it with `python3 pothead_worker.py --connect hub.example:4040 --workers 2 mymodule:app`, or from a
program:

    pool = WorkerPool(app, connect="hub.example:4040", workers=2)
    pool.run()  # until another thread calls pool.stop()

How it is built, from the bottom to the top: `parse_head` and the bodies understand what the hub sends;
`Response` calls the app as PEP 3333 says and sends what it answers; `RequestHandler` serves the requests of
one connection, one after the other; a `Slot` is a thread that keeps one connection open; a watcher notices
a hub that closes a connection while the app computes; `WorkerPool` owns the slots and ends them. Threads
share next to nothing: a slot's connection belongs to its thread, and `Halt` is how the others tell it to
stop.

Vocabulary: the *consumer* sent the request to the hub; an *exchange* is one request with its response; a
message has a *head* and a *body*.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` has handlers of its own, Ctrl-C ends the process without a traceback from some import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import email.utils
import errno
import functools
import importlib
import io
import logging
import os
import random
import re
import select
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar
from wsgiref.handlers import BaseHandler
from wsgiref.util import is_hop_by_hop

if TYPE_CHECKING:
    from _typeshed import OptExcInfo, WriteableBuffer
    from _typeshed.wsgi import ErrorStream, StartResponse, WSGIApplication, WSGIEnvironment

__version__ = "0.1.0"

log = logging.getLogger("pothead.worker")

T = TypeVar("T")


# ---- Limits ------------------------------------------------------------------------------------------

MAX_HEAD_BYTES = 64 << 10  # twice what the hub lets through, which adds fields of its own
MAX_CHUNK_LINE_BYTES = 1 << 10
MAX_TRAILER_BYTES = 8 << 10
RECEIVE_BYTES = 64 << 10
COPY_BELOW_BYTES = 16 << 10  # smaller pieces are joined: a copy costs less than a longer list of buffers

DISCARD_LIMIT_BYTES = 1 << 20  # as much of an unread body is read away; beyond, the connection is closed
DISCARD_TIMEOUT_S = 1.0
LINGER_S = 2.0  # after closing our direction, how long to wait until the hub has read the response

CONNECT_TIMEOUT_S = 10.0
BACKOFF_FIRST_S = 0.1  # the wait is drawn between half of this and this,
BACKOFF_LAST_S = 5.0  # doubling until here
STOP_NOW_GRACE_S = 0.2  # how long applications get to notice that they were cut off
EXIT_GRACE_S = 2.0  # how long threads that the app left behind may keep an ended worker alive

KEEP_ALIVE_IDLE_S = 15
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_PROBES = 3
# There is no TCP_USER_TIMEOUT: it would count a hub that has no room for more of a response, and does not
# read until its consumer has taken some, as dead. Keep-alive is for waiting slots; a hub that vanishes in
# the midst of a response is given up when the kernel has retransmitted often enough, as every HTTP server
# does.

CROSSING_S = 0.2  # how long after a response the hub's next request may be on its way

PEEK_INTERVAL_S = 0.05


class ProtocolError(Exception):
    """The hub sent what is not a request."""


class BodyError(ConnectionError):
    """The request's body was cut short or is malformed; raised from the application's read."""


class ConsumerGone(ConnectionError):
    """The hub closed the connection: nobody waits for this response any more."""


class WSGIViolation(Exception):
    """The application broke a rule of PEP 3333."""


# ---- Stopping ----------------------------------------------------------------------------------------


class Halt:
    """An event that can be waited for together with a socket: once set, its descriptor stays readable."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_set = False
        self._reader, self._writer = socket.socketpair()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        with self._changed:
            if not self._is_set:
                self._is_set = True
                self._writer.close()
                self._changed.notify_all()

    def wait(self, timeout_s: float | None = None, unless: Callable[[], object] = lambda: False) -> bool:
        """Wait until set, the time is over or, after `notify`, `unless()` is true; return `is_set()`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_set or unless(), timeout_s)
            return self._is_set

    def notify(self) -> None:
        """Have waiters look at their `unless` again."""
        with self._changed:
            self._changed.notify_all()

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        self.set()
        self._reader.close()


def wait_ready(sock: socket.socket, event: int, halt: Halt | None, timeout_s: float | None = None) -> bool:
    """Return whether `sock` became ready for `event` before timeout or halt. Ready wins over halted."""
    poller = select.poll()
    poller.register(sock, event)
    if halt is not None:
        poller.register(halt, select.POLLIN)
    ready = poller.poll(None if timeout_s is None else timeout_s * 1000)
    sock_fd = sock.fileno()
    return any(fd == sock_fd for fd, _ in ready)


# ---- Request heads -----------------------------------------------------------------------------------

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
HEAD = re.compile(
    rf"({TOKEN}) (/[\x21-\x7e\x80-\xff]*|\*) HTTP/1\.1\r\n((?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n)*)"
)
LENGTH = re.compile(r"[0-9]{1,18}")
SECONDS = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?")
ATTEMPT = re.compile(r"[0-9]{1,4}")
HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::([0-9]{0,5}))?")


class RequestHead(NamedTuple):
    method: str
    target: str
    fields: dict[str, str]  # by CGI name ("USER_AGENT"), repeated fields joined
    length: int | None  # of the body; None without a body, and when it is chunked
    is_chunked: bool


def parse_head(data: bytes) -> RequestHead:
    """Understand a head without the empty line that ends it. Raises ProtocolError."""
    match = HEAD.fullmatch(data.decode("latin-1"))
    if match is None:
        raise ProtocolError("malformed head")
    method, target, lines = match.groups()
    if target == "*" and method != "OPTIONS":
        raise ProtocolError("malformed target")
    fields = parse_fields(lines)
    if "HOST" not in fields:
        raise ProtocolError("no Host")
    return RequestHead(method, target, fields, *parse_framing(fields))


def parse_fields(lines: str) -> dict[str, str]:
    """Return the fields that an application may see.

    A name with an underscore would look like another name in the environ, and `Proxy` would look like the
    setting HTTP_PROXY ("httpoxy"); both are dropped.
    """
    fields: dict[str, str] = {}
    for line in lines.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        key = name.upper().replace("-", "_")
        if "_" in name or key == "PROXY":
            continue
        value = value.strip(" \t")
        if key in fields:
            value = fields[key] + ("; " if key == "COOKIE" else ", ") + value
        fields[key] = value
    return fields


def parse_framing(fields: dict[str, str]) -> tuple[int | None, bool]:
    """Return the body's length and whether it is chunked (RFC 9112 §6.3). Raises ProtocolError."""
    coding, length = fields.get("TRANSFER_ENCODING"), fields.get("CONTENT_LENGTH")
    if coding is not None:
        if length is not None or coding.lower() != "chunked":
            raise ProtocolError("ambiguous framing")
        return None, True
    if length is None:
        return None, False
    if not LENGTH.fullmatch(length):
        raise ProtocolError("malformed Content-Length")
    return int(length), False


# ---- Receiving ---------------------------------------------------------------------------------------


class Intake:
    """What the hub sends on one connection, and what of it has arrived but is not yet understood."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._failure = ""

    @property
    def is_empty(self) -> bool:
        return not self._buffer

    def take_head(self) -> bytes | None:
        """Return the next head without its empty line, or None when the hub closes. Raises ProtocolError."""
        head = self._take_until(b"\r\n\r\n", MAX_HEAD_BYTES)
        return None if head is None else head + b"\r\n"

    def take_line(self, limit_bytes: int) -> bytes:
        """Return the next line without its end. Raises BodyError."""
        self._check()
        try:
            line = self._take_until(b"\r\n", limit_bytes)
        except ProtocolError:
            self.fail("malformed chunked body")
        if line is None:
            self.fail("body cut short")
        return line

    def take_into(self, target: memoryview) -> int:
        """Fill the front of `target` with what has come; wait only if there is nothing. Raises BodyError."""
        self._check()
        count = min(len(self._buffer), len(target))
        if count:
            target[:count] = self._buffer[:count]
            self._buffer = self._buffer[count:]
        else:
            count = self._sock.recv_into(target)
        if count == 0:
            self.fail("body cut short")
        return count

    def fail(self, reason: str) -> NoReturn:
        """Raise BodyError, now and whenever more is to be taken: what comes after cannot be understood."""
        self._failure = reason
        self._check()
        raise AssertionError

    def _check(self) -> None:
        if self._failure:
            raise BodyError(self._failure)

    def _take_until(self, end: bytes, limit_bytes: int) -> bytes | None:
        """Return what comes before `end`, and drop `end`; None when the hub closes first."""
        data = self._buffer or self._sock.recv(RECEIVE_BYTES)
        searched = 0
        while (found := data.find(end, searched)) < 0 and len(data) < limit_bytes + len(end):
            searched = max(0, len(data) - len(end) + 1)
            piece = self._sock.recv(RECEIVE_BYTES) if data else b""
            if not piece:
                return None
            data += piece
        if not 0 <= found <= limit_bytes:
            raise ProtocolError("too long")
        self._buffer = data[found + len(end) :]
        return data[:found]


class RequestBody(io.RawIOBase):
    """A request's body as a raw stream with an end. Below an `io.BufferedReader` it is `wsgi.input`."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def readable(self) -> bool:
        return True

    def left_bytes(self) -> float:
        """Return how many bytes are still to be read; infinity when nobody knows."""
        raise NotImplementedError


class FixedBody(RequestBody):
    """A body of known length."""

    def __init__(self, intake: Intake, length: int) -> None:
        super().__init__(intake)
        self._left = length

    def left_bytes(self) -> float:
        return self._left

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")[: self._left]
        if not target:
            return 0
        count = self._intake.take_into(target)
        self._left -= count
        return count


class ChunkedBody(RequestBody):
    """A body in chunks (RFC 9112 §7.1); extensions and trailers are dropped."""

    SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
    TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")

    def __init__(self, intake: Intake) -> None:
        super().__init__(intake)
        self._left_in_chunk = 0
        self._has_begun = False
        self._has_ended = False

    def left_bytes(self) -> float:
        return 0 if self._has_ended else float("inf")

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        if not self._left_in_chunk and not self._has_ended:
            self._begin_chunk()
        if self._has_ended or not target:
            return 0
        count = self._intake.take_into(target[: self._left_in_chunk])
        self._left_in_chunk -= count
        return count

    def _begin_chunk(self) -> None:
        if self._has_begun:
            self._intake.take_line(limit_bytes=0)  # what ends the chunk before
        self._has_begun = True
        match = self.SIZE_LINE.fullmatch(self._intake.take_line(MAX_CHUNK_LINE_BYTES))
        if match is None:
            self._intake.fail("malformed chunked body")
        self._left_in_chunk = int(match[1], 16)
        if self._left_in_chunk == 0:
            self._take_trailers()
            self._has_ended = True

    def _take_trailers(self) -> None:
        left = MAX_TRAILER_BYTES
        while line := self._intake.take_line(max(0, left)):
            left -= len(line) + 2
            if not self.TRAILER_LINE.fullmatch(line):
                self._intake.fail("malformed trailers")


# ---- Sending -----------------------------------------------------------------------------------------


def send_pieces(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    """Send all pieces in order, in one call where that is possible, without copying large ones."""
    if sum(map(len, pieces)) < COPY_BELOW_BYTES:
        sock.sendall(b"".join(pieces))
        return
    sent = sock.sendmsg(pieces)
    for piece in pieces:
        if sent < len(piece):
            sock.sendall(memoryview(piece)[sent:])
        sent = max(0, sent - len(piece))


@functools.lru_cache(maxsize=2)
def http_date(unix_second: int) -> str:
    return email.utils.formatdate(unix_second, usegmt=True)


def close_gently(sock: socket.socket) -> None:
    """Close our direction and read the hub's away until it closes, too.

    Closing with unread bytes would send a reset, which destroys a response that the hub has not read yet.
    """
    ends_at = time.monotonic() + LINGER_S
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER_S)
        while time.monotonic() < ends_at and sock.recv(RECEIVE_BYTES):
            pass


# ---- The environ -------------------------------------------------------------------------------------

CONSUMED_FIELDS = (
    "CONNECTION",
    "CONTENT_LENGTH",
    "CONTENT_TYPE",
    "POTHEAD_ATTEMPT",
    "POTHEAD_QUEUE_SECONDS",
    "TRANSFER_ENCODING",  # the body is decoded; an app that saw "chunked" would decode it again
)


def build_environ(head: RequestHead, hub_host: str) -> WSGIEnvironment:
    """Return what the request says of the environ; `wsgi.input` and the like come from the Response."""
    fields = head.fields
    path, _, query = head.target.partition("?")
    scheme = forwarded_scheme(fields)
    name, port = split_host(fields["HOST"], scheme)
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": head.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": decode_path(path),
        "QUERY_STRING": query,
        "REQUEST_URI": head.target,
        "SERVER_NAME": name,
        "SERVER_PORT": port,
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": forwarded_address(fields) or hub_host,
        "REQUEST_ID": fields.get("X_REQUEST_ID", "-"),
        "pothead.queue_seconds": matched(SECONDS, fields.get("POTHEAD_QUEUE_SECONDS"), float, 0.0),
        "pothead.attempt": matched(ATTEMPT, fields.get("POTHEAD_ATTEMPT"), int, 1),
    }
    if "CONTENT_TYPE" in fields:
        environ["CONTENT_TYPE"] = fields["CONTENT_TYPE"]
    if head.length is not None:
        environ["CONTENT_LENGTH"] = str(head.length)
    environ.update([("HTTP_" + key, fields[key]) for key in fields if key not in CONSUMED_FIELDS])
    return environ


def decode_path(path: str) -> str:
    """Return the path as PEP 3333 wants it: bytes, unquoted, each as one character. `OPTIONS *` has none."""
    if path == "*":
        return ""
    return urllib.parse.unquote(path, "latin-1") if "%" in path else path


def matched(pattern: re.Pattern[str], text: str | None, convert: Callable[[str], T], default: T) -> T:
    return convert(text) if text is not None and pattern.fullmatch(text) else default


def forwarded_scheme(fields: dict[str, str]) -> str:
    """Return the scheme that the nearest proxy saw."""
    scheme = fields.get("X_FORWARDED_PROTO", "").rpartition(",")[2].strip().lower()
    return scheme if scheme in ("http", "https") else "http"


def forwarded_address(fields: dict[str, str]) -> str:
    """Return the consumer's address, or "" if it is not told.

    It is the right-most one that is not on loopback: what stands further left was written by somebody
    further away, who may have made it up, and a loopback address is a proxy beside the hub.
    """
    addresses = [address.strip() for address in fields.get("X_FORWARDED_FOR", "").split(",")]
    for address in reversed(addresses):
        if not address.startswith("127.") and address not in ("::1", "", "unknown"):
            return address
    return addresses[-1]


def split_host(host: str, scheme: str) -> tuple[str, str]:
    """Return name and port for SERVER_NAME and SERVER_PORT, neither of which may be empty."""
    match = HOST_PORT.fullmatch(host)
    name, port = match.groups() if match else ("", "")
    return name or "localhost", port or ("443" if scheme == "https" else "80")


# ---- The response ------------------------------------------------------------------------------------

STATUS = re.compile(r"[2-5][0-9]{2} [\t\x20-\x7e\x80-\xff]*")
FIELD_NAME = re.compile(TOKEN)
FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class ResponseHead(NamedTuple):
    status: str
    fields: list[tuple[str, str]]
    length: int | None  # of the body, if the app told it
    has_date: bool


def check_head(status: str, fields: list[tuple[str, str]]) -> ResponseHead:
    """Check what an app gave to `start_response`. Raises WSGIViolation."""
    if type(status) is not str or not STATUS.fullmatch(status):
        raise WSGIViolation(f"the status must be a str like '200 OK', not {status!r}")
    if type(fields) is not list:
        raise WSGIViolation(f"the headers must be a list, not {type(fields).__name__}")
    length, has_date = None, False
    for field in fields:
        name = check_field(field)
        if name == "content-length":
            length = check_length(field[1], length)
        elif name == "date":
            has_date = True
    return ResponseHead(status, fields.copy(), length, has_date)


def check_field(field: tuple[str, str]) -> str:
    """Return the field's name in lower case. Raises WSGIViolation."""
    if type(field) is not tuple or len(field) != 2:
        raise WSGIViolation(f"a header must be a tuple of two str, not {field!r}")
    name, value = field
    if type(name) is not str or not FIELD_NAME.fullmatch(name):
        raise WSGIViolation(f"bad header name {name!r}")
    if type(value) is not str or not FIELD_VALUE.fullmatch(value):
        raise WSGIViolation(f"bad value {value!r} of header {name}")
    if is_hop_by_hop(name):
        raise WSGIViolation(f"hop-by-hop header {name} is not the application's to set")
    return name.lower()


def check_length(value: str, earlier: int | None) -> int:
    if not LENGTH.fullmatch(value):
        raise WSGIViolation(f"bad Content-Length {value!r}")
    if earlier is not None:
        raise WSGIViolation("more than one Content-Length")
    return int(value)


class Response(BaseHandler):
    """Calls the app for one request and sends what it answers (PEP 3333).

    The framing is decided with the first byte of the body: the app's Content-Length; else a length of our
    own, if the app returned a list of one item; else chunks. Every ending goes through `run`.

    Of its base class it keeps the making of the environ; the sending there neither checks nor frames enough.
    """

    wsgi_multithread = True
    wsgi_multiprocess = True
    server_software = None

    def __init__(self, handler: RequestHandler, head: RequestHead, body: io.BufferedIOBase) -> None:
        self.os_environ = {}  # the base class would copy the process's own into each environ
        self.environ: WSGIEnvironment = {}
        self.handler = handler
        self.request = head
        self.body = body
        self.head: ResponseHead | None = None
        self.body_bytes = 0  # that the app has given
        # What completes a body of the app's Content-Length is kept until it is sure that no more follows: a
        # body that is too long must not be taken for a whole one.
        self.last_piece = b""
        self.is_complete = False
        self.is_chunked = False
        self.says_close = False
        self.request_id = head.fields.get("X_REQUEST_ID", "-")

    @property
    def has_body(self) -> bool:
        assert self.head is not None
        return self.request.method != "HEAD" and self.head.status[:3] not in ("204", "304")

    # -- calling the app

    def run(self, application: WSGIApplication) -> None:
        """Call the app and send its response, or an error in its place. Does not raise.

        Even `sys.exit()` in an app must end nothing but its own request, hence BaseException.
        """
        try:
            self.setup_environ()
            try:
                self.result = application(self.environ, self.start_response)
                self.finish_response()
            finally:
                self.close()
        except BaseException as exc:
            self._on_failure(exc)

    def add_cgi_vars(self) -> None:
        self.environ.update(build_environ(self.request, self.handler.hub_host))
        self.environ["wsgi.input_terminated"] = True
        self.environ["pothead.cancelled"] = self.handler.cancelled

    def get_stdin(self) -> io.BufferedIOBase:
        return self.body

    def get_stderr(self) -> ErrorStream:
        return sys.stderr

    def get_scheme(self) -> str:
        return forwarded_scheme(self.request.fields)

    def finish_response(self) -> None:
        if isinstance(self.result, (str, bytes)) or not hasattr(self.result, "__iter__"):
            raise WSGIViolation(f"the app returned {type(self.result).__name__}, not an iterable of bytes")
        for data in self.result:
            self.write(data)
            if self.headers_sent and not self.has_body:
                break
        self.finish_content()

    def close(self) -> None:
        """Close the app's iterable. Only `run` calls this, once."""
        close = getattr(self.result, "close", None)
        if close is not None:
            close()

    # -- what the app calls

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None
    ) -> Callable[[bytes], None]:
        if self.headers_sent and exc_info and exc_info[1]:
            raise exc_info[1].with_traceback(exc_info[2])
        if self.head is not None and not exc_info:
            raise WSGIViolation("start_response was called twice without exc_info")
        self.head = check_head(status, headers)
        return self.write

    def write(self, data: bytes) -> None:
        """Send a piece of the body at once. An empty one only notices whether the consumer has gone."""
        if not isinstance(data, bytes):
            raise WSGIViolation(f"the body has a piece of type {type(data).__name__} instead of bytes")
        if self.handler.cancelled.is_set():
            raise ConsumerGone
        if data:
            self._send_piece(data)

    # -- framing

    def _send_piece(self, data: bytes) -> None:
        if self.head is None:
            raise WSGIViolation("the body came before start_response was called")
        length = self.head.length
        self.body_bytes += len(data)
        if length is None or not self.has_body:
            self._send(data)
        elif self.body_bytes > length:
            raise WSGIViolation(f"the body is longer than its Content-Length of {length}")
        elif self.body_bytes == length:
            self.last_piece = data
        else:
            self._send(data)

    def _send(self, data: bytes) -> None:
        start = b"" if self.headers_sent else self._begin(len(data))
        if not self.has_body:
            self._write(start)
        elif self.is_chunked:
            self._write(start + b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._write(start, data)

    def finish_content(self) -> None:
        """Send what ends the response, if it is whole."""
        if self.head is None:
            raise WSGIViolation("start_response was not called")
        if self.handler.cancelled.is_set():
            raise ConsumerGone
        if self.has_body and self.body_bytes < (self.head.length or 0):
            raise WSGIViolation(f"the body is shorter than its Content-Length of {self.head.length}")
        if self.last_piece:
            self._send(self.last_piece)
        elif not self.headers_sent:
            self._write(self._begin(0))
        elif self.is_chunked:
            self._write(b"0\r\n\r\n")
        self.is_complete = True

    def _begin(self, first_bytes: int) -> bytes:
        """Decide the framing and return the head. Nothing can be taken back afterwards."""
        assert self.head is not None
        fields = self.head.fields
        if self.head.status.startswith("204"):
            fields = [field for field in fields if field[0].lower() != "content-length"]
        elif self.head.length is None and not self.head.status.startswith("304"):
            fields = [*fields, *self._choose_framing(first_bytes)]
        if not self.head.has_date:
            fields = [*fields, ("Date", http_date(int(time.time())))]
        self.says_close = self.says_close or self.handler.must_close()
        if self.says_close:
            fields = [*fields, ("Connection", "close")]
        self.headers_sent = True
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
        return f"HTTP/1.1 {self.head.status}\r\n{lines}\r\n".encode("latin-1")

    def _choose_framing(self, first_bytes: int) -> list[tuple[str, str]]:
        if first_bytes == 0 and self.request.method == "HEAD":
            return []  # the app did not say how long the body would be
        if first_bytes == 0 or (isinstance(self.result, (list, tuple)) and len(self.result) == 1):
            return [("Content-Length", str(first_bytes))]
        self.is_chunked = self.has_body
        return [("Transfer-Encoding", "chunked")]

    def _write(self, *pieces: bytes) -> None:
        try:
            send_pieces(self.handler.connection, pieces)
        except OSError as exc:
            raise ConsumerGone from exc

    def _flush(self) -> None:
        """Nothing is ever held back."""

    # -- when it fails

    def _on_failure(self, exc: BaseException) -> None:
        if isinstance(exc, ConsumerGone):
            log.info("request %s: the consumer has gone", self.request_id)
        elif isinstance(exc, BodyError):
            log.info("request %s: request %s", self.request_id, exc)
            self._send_error("400 Bad Request")
        elif isinstance(exc, WSGIViolation):
            log.error("request %s: WSGI violation: %s", self.request_id, exc)
            self._send_error("500 Internal Server Error")
        else:
            log.error("request %s: the application raised an exception", self.request_id, exc_info=exc)
            self._send_error("500 Internal Server Error")

    def _send_error(self, status: str) -> None:
        """Answer in the app's place, if no byte of its own response has been sent."""
        if self.headers_sent:
            return
        text = f"{status}\nrequest id: {self.request_id}\n".encode("latin-1")
        fields = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))]
        self.head = ResponseHead(status, fields, len(text), has_date=False)
        start = self._begin(len(text))
        with contextlib.suppress(ConsumerGone):
            self._write(start, text if self.has_body else b"")
            self.is_complete = True


# ---- One connection ----------------------------------------------------------------------------------


class RequestHandler(BaseHTTPRequestHandler):
    """Serves the requests that come on one connection, one after the other; constructing it does the work.

    Of its base class it keeps the way of life (setup, handle, finish; handle_one_request) and replaces the
    parser, which is slow and lenient.
    """

    def __init__(self, sock: socket.socket, slot: Slot) -> None:
        self.slot = slot
        self.hub_host = str(sock.getpeername()[0])
        self.intake = Intake(sock)
        self.body: RequestBody | None = None
        self.is_busy = False
        self.has_served = False
        self.free_since = time.monotonic()
        self.is_hung_up = False
        self.wants_close = False
        self.cancelled = threading.Event()
        super().__init__(sock, sock.getpeername(), slot)  # type: ignore[arg-type]  # the base only keeps it

    def setup(self) -> None:
        self.connection = self.request
        self.slot.on_open(self)

    def handle(self) -> None:
        self.close_connection = False
        while not self.close_connection and self._wait_for_request():
            self.handle_one_request()

    def finish(self) -> None:
        self.slot.on_close(self)

    def on_hang_up(self) -> None:
        """The hub has closed the connection. Called by other threads."""
        self.is_hung_up = True
        self.cancelled.set()

    def must_close(self) -> bool:
        """Return whether the connection cannot take another request after this one."""
        unread = self.body.left_bytes() if self.body else 0
        return self.wants_close or self.slot.halt.is_set() or unread > DISCARD_LIMIT_BYTES

    def _wait_for_request(self) -> bool:
        if not self.intake.is_empty or wait_ready(self.connection, select.POLLIN, self.slot.halt):
            return True
        # The hub, which did not know of the halt, may have sent the next request on the heels of the last
        # response. It is served; after that the hub knows.
        left_s = self.free_since + CROSSING_S - time.monotonic()
        return left_s > 0 and wait_ready(self.connection, select.POLLIN, None, left_s)

    def handle_one_request(self) -> None:
        """Serve one request; sets close_connection when it was the last."""
        try:
            self._serve()
        except ProtocolError as exc:
            self._refuse(exc)
        except OSError as exc:
            log.debug("connection to the hub lost: %s", exc)
            self.close_connection = True
        finally:
            self.is_busy = False
            self.free_since = time.monotonic()

    def _serve(self) -> None:
        self.cancelled = threading.Event()
        data = self.intake.take_head()
        if data is None:
            self.close_connection = True
            return
        head = parse_head(data)
        self.is_busy = self.has_served = True
        self.wants_close = "close" in re.split(r"[ \t]*,[ \t]*", head.fields.get("CONNECTION", "").lower())
        self.body = self._open_body(head)
        response = Response(self, head, io.BufferedReader(self.body) if self.body else io.BytesIO())
        log.debug("request %s: %s %s", response.request_id, head.method, head.target.partition("?")[0])
        if self.is_hung_up:  # perhaps before `cancelled` was there to be set
            self.cancelled.set()
            log.info("request %s: the consumer had gone before it began", response.request_id)
        else:
            response.run(self.slot.application)
        self._settle(response)

    def _open_body(self, head: RequestHead) -> RequestBody | None:
        if head.is_chunked:
            return ChunkedBody(self.intake)
        return FixedBody(self.intake, head.length) if head.length else None

    def _settle(self, response: Response) -> None:
        """Make the connection ready for the next request, or see to its end."""
        if not response.is_complete:
            self.close_connection = True
        elif not self._discard_body():
            self.close_connection = True
            close_gently(self.connection)
        else:
            self.close_connection = response.says_close

    def _discard_body(self) -> bool:
        """Read away what the app left of the body; False if that is too much or takes too long."""
        body, self.body = self.body, None
        if body is None or not body.left_bytes():
            return True
        ends_at = time.monotonic() + DISCARD_TIMEOUT_S
        left = DISCARD_LIMIT_BYTES
        self.connection.settimeout(DISCARD_TIMEOUT_S)
        try:
            while left > 0 and time.monotonic() < ends_at:
                count = len(body.read(RECEIVE_BYTES) or b"")
                if count == 0:
                    return True
                left -= count
        except OSError:
            return False
        finally:
            self.connection.settimeout(None)
        return False

    def _refuse(self, reason: ProtocolError) -> None:
        log.warning("not a request from the hub at %s: %s", self.hub_host, reason)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.sendall(
                b"HTTP/1.1 400 Bad Request\r\nContent-Length: 12\r\nConnection: close\r\n\r\nBad Request\n"
            )
        close_gently(self.connection)


# ---- Noticing that the consumer has gone -------------------------------------------------------------


class HangUpWatcher:
    """Tells handlers that the hub closed their connection, even while the app computes: one thread for all.

    A FIN hides behind unread bytes from `recv`, but not from EPOLLRDHUP. Being edge-triggered, a
    registration lasts as long as its connection and costs a request nothing; epoll allows it while the
    thread waits, unlike poll.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._over = Halt()
        self._epoll.register(self._over, select.EPOLLIN)
        self._lock = threading.Lock()
        self._handlers: dict[int, RequestHandler] = {}
        threading.Thread(target=self._run, name="pothead-watcher", daemon=True).start()

    def add(self, handler: RequestHandler) -> None:
        fd = handler.connection.fileno()
        with self._lock:
            self._handlers[fd] = handler
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)

    def discard(self, handler: RequestHandler) -> None:
        fd = handler.connection.fileno()
        with self._lock:
            del self._handlers[fd]
            self._epoll.unregister(fd)

    def close(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.is_set():
            for fd, _ in self._epoll.poll():
                with self._lock:
                    handler = self._handlers.get(fd)
                    # The event may be of an earlier connection that had the same descriptor.
                    if handler and is_hung_up(fd):
                        handler.on_hang_up()
        self._epoll.close()
        self._over.close()


def is_hung_up(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP)
    return bool(poller.poll(0))


class PeekingWatcher:
    """The same where there is no epoll, by looking often. It cannot see the end behind an unread body."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._handlers: set[RequestHandler] = set()
        threading.Thread(target=self._run, name="pothead-watcher", daemon=True).start()

    def add(self, handler: RequestHandler) -> None:
        self._handlers.add(handler)

    def discard(self, handler: RequestHandler) -> None:
        self._handlers.discard(handler)

    def close(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(PEEK_INTERVAL_S):
            for handler in tuple(self._handlers):
                if handler.is_busy and is_at_end(handler.connection):
                    handler.on_hang_up()


def is_at_end(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def make_watcher() -> HangUpWatcher | PeekingWatcher:
    return HangUpWatcher() if hasattr(select, "epoll") else PeekingWatcher()


# ---- Reaching the hub --------------------------------------------------------------------------------


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]\s]+)):([0-9]{1,5})")


def parse_address(text: str) -> Address:
    """Understand `host:port` or `[IPv6]:port`. Raises ValueError."""
    match = ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT, like localhost:4040 or [::1]:4040")
    return Address(match[1] or match[2], int(match[3]))


# What socket.getaddrinfo returns for each address: family, type, protocol, canonical name, address.
SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, SocketAddress]


class Connector:
    """Opens connections to the hub, whose name is looked up each time."""

    def __init__(self, address: Address, halt: Halt) -> None:
        self._address = address
        self._halt = halt
        self._last_found: Sequence[AddressInfo] = ()

    def connect(self) -> socket.socket | None:
        """Return a new connection, or None when halted. Raises OSError."""
        failure: OSError | None = None
        for info in self._look_up():
            try:
                return self._dial(*info)
            except OSError as exc:
                failure = exc
        if failure and not self._halt.is_set():
            raise failure
        return None

    def _look_up(self) -> Sequence[AddressInfo]:
        """Return the hub's addresses; the last ones when the name service fails; none when halted."""
        found: list[Sequence[AddressInfo] | OSError] = []

        def ask() -> None:
            found.append(look_up(self._address))
            self._halt.notify()

        # The resolver cannot be interrupted, so a thread of its own waits for it, and perhaps is left to it.
        threading.Thread(target=ask, name="pothead-resolver", daemon=True).start()
        if self._halt.wait(unless=lambda: found):
            return ()
        if not isinstance(found[0], OSError):
            self._last_found = found[0]
        elif not self._last_found:
            raise found[0]
        return self._last_found

    def _dial(
        self,
        family: socket.AddressFamily,
        kind: socket.SocketKind,
        protocol: int,
        _name: str,
        address: SocketAddress,
    ) -> socket.socket:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            error = sock.connect_ex(address)
            if error == errno.EINPROGRESS:
                is_ready = wait_ready(sock, select.POLLOUT, self._halt, CONNECT_TIMEOUT_S)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if is_ready else errno.ETIMEDOUT
            if error == 0 and sock.getsockname() == sock.getpeername():
                error = errno.ECONNREFUSED  # nobody listens there, and TCP met itself on that very port
            if error:
                raise OSError(error, os.strerror(error))
            sock.setblocking(True)
            set_options(sock)
        except OSError:
            sock.close()
            raise
        return sock


def look_up(address: Address) -> Sequence[AddressInfo] | OSError:
    try:
        return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as exc:
        return exc
    except UnicodeError as exc:  # a host name that cannot be one
        return OSError(str(exc))


def set_options(sock: socket.socket) -> None:
    """Send at once, and let a waiting slot find out within a minute when the hub's machine has vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEP_ALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEP_ALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEP_ALIVE_PROBES),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Backoff:
    """How long to wait before the next try: doubling, at random, so that slots come apart."""

    def __init__(self) -> None:
        self.failures = 0

    def reset(self) -> None:
        self.failures = 0

    def next_wait_s(self) -> float:
        wait_s = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * (1 << min(self.failures, 16)))
        self.failures += 1
        return wait_s * random.uniform(0.5, 1.0)


class Reachability:
    """Logs when the hub cannot be reached and when it can again: a line an episode, not a slot and try."""

    def __init__(self, address: Address, slots: int) -> None:
        self._address = address
        self._slots = slots
        self._lock = threading.Lock()
        self._connected: set[Slot] = set()
        self._is_reported_complete = False
        self._is_unreachable = False

    def on_connected(self, slot: Slot) -> None:
        with self._lock:
            was_unreachable, self._is_unreachable = self._is_unreachable, False
            self._connected.add(slot)
            if not self._is_reported_complete and len(self._connected) == self._slots:
                self._is_reported_complete = True
                log.info("connected slots=%d hub=%s", self._slots, self._address)
            elif was_unreachable:
                log.info("connected again hub=%s", self._address)

    def on_failed(self, reason: OSError) -> None:
        with self._lock:
            if not self._is_unreachable:
                self._is_unreachable = True
                log.warning("hub %s unreachable, trying again: %s", self._address, reason.strerror or reason)


# ---- Slots -------------------------------------------------------------------------------------------


class Slot:
    """A thread with one connection to the hub at a time. Whatever the app does, it lives until the halt."""

    def __init__(
        self, pool: WorkerPool, halt: Halt, connector: Connector, reachability: Reachability
    ) -> None:
        self.halt = halt
        self.application = pool.application
        self._pool = pool
        self._connector = connector
        self._reachability = reachability
        self._backoff = Backoff()
        self._handler: RequestHandler | None = None

    def run(self) -> None:
        try:
            while not self.halt.is_set():
                if self._serve_connection():
                    self._backoff.reset()
                else:
                    self.halt.wait(self._backoff.next_wait_s())
        finally:
            self._pool.on_slot_end()

    def _serve_connection(self) -> bool:
        """Serve one connection to its end; False if it was good for nothing."""
        try:
            sock = self._connector.connect()
        except OSError as exc:
            self._reachability.on_failed(exc)
            return False
        if sock is None:
            return False
        opened_at = time.monotonic()
        with sock:
            self._reachability.on_connected(self)
            handler = self._handle(sock)
        return bool(handler and handler.has_served) or time.monotonic() - opened_at > BACKOFF_LAST_S

    def _handle(self, sock: socket.socket) -> RequestHandler | None:
        try:
            return RequestHandler(sock, self)
        except OSError as exc:
            log.debug("connection to the hub lost: %s", exc)
        except Exception:
            log.exception("a fault of the worker itself")
        return None

    def on_open(self, handler: RequestHandler) -> None:
        self._handler = handler
        self._pool.watcher.add(handler)

    def on_close(self, handler: RequestHandler) -> None:
        self._pool.watcher.discard(handler)
        self._handler = None

    def abort(self) -> bool:
        """Cut the connection off, from another thread; return whether a request was being served."""
        handler = self._handler
        if handler is None:
            return False
        was_busy = handler.is_busy  # asked first: an app that listens to `cancelled` ends at once
        handler.on_hang_up()
        with contextlib.suppress(OSError):
            handler.connection.shutdown(socket.SHUT_RDWR)
        return was_busy


# ---- The pool ----------------------------------------------------------------------------------------


class WorkerPool:
    """The slots of one application. It installs no signal handlers and may be run in any thread.

    `run()` serves until another thread calls `stop()`, which lets running requests finish, or `stop_now()`.
    A pool runs once.
    """

    def __init__(
        self,
        application: WSGIApplication,
        connect: str | tuple[str, int] = "localhost:4040",
        workers: int = 1,
        graceful_timeout_s: float = 30.0,
    ) -> None:
        """Raises ValueError for an address that is not `host:port`, and for less than one worker."""
        if workers < 1:
            raise ValueError("workers must be at least 1")
        self.application = application
        self.address = parse_address(connect) if isinstance(connect, str) else Address(*connect)
        self.workers = workers
        self.graceful_timeout_s = graceful_timeout_s
        self._lock = threading.RLock()
        self._halt: Halt | None = None
        self._slots: list[Slot] = []
        self._running = 0
        self._is_stopping = False
        self._was_cut_off = False
        self._timer: threading.Timer | None = None
        self._ended = threading.Event()

    def run(self) -> bool:
        """Serve until stopped. Return True if every request could be finished."""
        self.start()
        return self.join()

    def start(self) -> None:
        """Start the slots and return."""
        with self._lock:
            if self._halt is not None:
                raise RuntimeError("a WorkerPool runs once")
            self._halt = halt = Halt()
            self.watcher = make_watcher()
            connector = Connector(self.address, halt)
            reachability = Reachability(self.address, self.workers)
            self._slots = [Slot(self, halt, connector, reachability) for _ in range(self.workers)]
            self._running = self.workers
            if self._is_stopping:
                halt.set()
            for number, slot in enumerate(self._slots, 1):
                threading.Thread(target=slot.run, name=f"pothead-slot-{number}", daemon=True).start()

    def join(self) -> bool:
        """Wait until the pool has ended. Return True if every request could be finished."""
        self._ended.wait()
        return not self._was_cut_off

    def stop(self) -> None:
        """Take no more requests, let running ones finish in the graceful time, and end. Returns at once."""
        with self._lock:
            if self._is_stopping:
                return
            self._is_stopping = True
            if self._halt and not self._ended.is_set():
                self._halt.set()
                self._schedule(self.graceful_timeout_s, self.stop_now)

    def stop_now(self) -> None:
        """Cut running requests off and end. Returns at once."""
        with self._lock:
            self._is_stopping = True
            if self._halt is None or self._ended.is_set():
                return
            self._halt.set()
            busy = sum([slot.abort() for slot in self._slots])
            if busy:
                self._was_cut_off = True
                log.warning("stopping at once: running requests cut off: %d", busy)
            self._schedule(STOP_NOW_GRACE_S, self._ended.set)

    def _schedule(self, wait_s: float, action: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = threading.Timer(wait_s, action)
        self._timer.daemon = True
        self._timer.start()

    def on_slot_end(self) -> None:
        """Called by each slot's thread as its last act. The last one puts out the light."""
        with self._lock:
            self._running -= 1
            if self._running:
                return
            assert self._halt is not None
            if self._timer:
                self._timer.cancel()
            self.watcher.close()
            self._halt.close()
            self._ended.set()


# ---- The demo application ----------------------------------------------------------------------------


def demo_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """`GET /` tells who answers; `PUT /xz` compresses the request's body, a stand-in for expensive work."""
    resources = {"/": (("GET", "HEAD"), greet), "/xz": (("POST", "PUT"), compress)}
    if environ["PATH_INFO"] not in resources:
        return answer_plainly(start_response, "404 Not Found", "There is only / and /xz here.\n")
    methods, resource = resources[environ["PATH_INFO"]]
    if environ["REQUEST_METHOD"] not in methods:
        allowed = ", ".join(methods)
        text = f"Use {allowed} here.\n"
        return answer_plainly(start_response, "405 Method Not Allowed", text, ("Allow", allowed))
    return resource(environ, start_response)


def answer_plainly(
    start_response: StartResponse, status: str, text: str, *fields: tuple[str, str]
) -> list[bytes]:
    body = text.encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *fields]
    start_response(status, headers)
    return [body]


def greet(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    text = (
        "Hello from a POTHEAD worker.\n"
        f"process: {os.getpid()}\n"
        f"thread: {threading.current_thread().name}\n"
        f"request id: {environ['REQUEST_ID']}\n"
        f"queued: {environ['pothead.queue_seconds']:.3f} s\n"
    )
    return answer_plainly(start_response, "200 OK", text)


def compress(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "application/x-xz")])
    return compressed(environ)


def compressed(environ: WSGIEnvironment) -> Iterator[bytes]:
    """Yield after each piece that was read: even an empty one lets the worker stop a job nobody waits for."""
    import lzma  # here, because a Python may have been built without it

    compressor = lzma.LZMACompressor(preset=0)
    cancelled = environ["pothead.cancelled"]
    while not cancelled.is_set() and (data := environ["wsgi.input"].read(RECEIVE_BYTES)):
        yield compressor.compress(data)
    if not cancelled.is_set():
        yield compressor.flush()


# ---- Loading an application --------------------------------------------------------------------------

APP_NAME = re.compile(r"(\w+(?:\.\w+)*)(?::(\w+(?:\.\w+)*))?")
DEFAULT_ATTRIBUTES = ("app", "application")


class LoadError(Exception):
    """The application could not be loaded; the text is for the user."""


def parse_app_name(text: str) -> str:
    """Check `module` or `module:attribute`, either of which may be dotted. Raises ValueError."""
    if not APP_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not MODULE:APP, like mypackage.mymodule:app")
    return text


def load_app(name: str) -> WSGIApplication:
    """Import the app called `module:attribute`; `module` alone means its `app`, or else its `application`.

    Raises LoadError. When the module's own code failed, its traceback has been written to stderr.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = import_module(module_name, name)
    found: object = None
    for path in [attribute] if attribute else DEFAULT_ATTRIBUTES:
        found = functools.reduce(lambda value, step: getattr(value, step, None), path.split("."), module)
        if found is not None:
            break
    if found is None:
        wanted = attribute or " or ".join(DEFAULT_ATTRIBUTES)
        raise LoadError(f"cannot load {name!r}: module {module_name!r} has no attribute {wanted!r}")
    if not callable(found):
        raise LoadError(f"cannot load {name!r}: {path!r} of module {module_name!r} is not callable")
    return found


def import_module(module_name: str, name: str) -> object:
    try:
        return importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a module may even call sys.exit()
        if isinstance(exc, ModuleNotFoundError) and f"{module_name}.".startswith(f"{exc.name}."):
            raise LoadError(f"cannot load {name!r}: there is no module {exc.name!r}") from None
        print_import_error(exc)
        raise LoadError(f"cannot load {name!r}: importing module {module_name!r} failed") from None


def print_import_error(exc: BaseException) -> None:
    """Write the traceback without the frames of the import machinery above the app's own."""
    trace = exc.__traceback__
    while trace and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in (__name__, "importlib"):
        trace = trace.tb_next
    traceback.print_exception(type(exc), exc, trace)


# ---- Command line ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line and the environment say, validated."""

    connect: Address
    workers: int
    graceful_timeout_s: float
    log_level: str
    app: str | None


class UsageError(Exception):
    """The command line or the environment makes no sense; the text is for the user."""


class OptionParser(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)")
DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Return seconds for `500ms`, `30s`, `5m` or `1h`. Raises ValueError."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration like 500ms, 30s, 5m or 1h")
    return float(match[1]) * DURATION_UNITS_S[match[2]]


def parse_workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is not a number from 1 to 9999")
    return int(text)


def parse_log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"{text!r} is not one of {', '.join(LOG_LEVELS)}")
    return text.lower()


LOG_LEVELS = ("debug", "info", "warning", "error")


def build_parser() -> OptionParser:
    parser = OptionParser(
        prog="pothead-worker",
        description="Serve a WSGI application to a POTHEAD hub.",
        epilog="Every option is also an environment variable, like POTHEAD_WORKER_GRACEFUL_TIMEOUT.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "app",
        nargs="?",
        metavar="MODULE:APP",
        help="the WSGI application; without :APP, the module's app or application (default: a built-in demo)",
    )
    parser.add_argument(
        "--connect",
        metavar="HOST:PORT",
        help="the hub's worker port (default: $POTHEAD_CONNECT, then localhost:4040)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        help="number of slots: requests that are served at the same time, each in a thread (default: 1)",
    )
    parser.add_argument(
        "--graceful-timeout",
        metavar="DURATION",
        help="how long running requests may take to finish after SIGTERM, in ms, s, m or h (default: 30s)",
    )
    levels = ", ".join(LOG_LEVELS)
    parser.add_argument("--log-level", metavar="LEVEL", help=f"one of {levels} (default: info)")
    parser.add_argument("--version", action="version", version=f"pothead-worker {__version__}")
    return parser


def join_negatives(words: Sequence[str]) -> list[str]:
    """Join `--option -1` into one word: argparse would take -1 for an option and not say what is wrong."""
    joined: list[str] = []
    for word in words:
        if re.match(r"-[0-9.]", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def parse_args(argv: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Return the options. Raises UsageError; `--help` and `--version` raise SystemExit."""
    given = build_parser().parse_args(join_negatives(argv))

    def choose(name: str, parse: Callable[[str], T], default: str, *older_variables: str) -> T:
        """Return the option's value from the command line, else the environment, else its default."""
        flag = "--" + name.replace("_", "-")
        sources = [(flag, getattr(given, name))]
        for variable in (f"POTHEAD_WORKER_{name.upper()}", *older_variables):
            sources.append((variable, environment.get(variable) or None))
        source, text = next((pair for pair in sources if pair[1] is not None), (flag, default))
        try:
            return parse(text)
        except ValueError as exc:
            raise UsageError(f"{source}: {exc}") from None

    try:
        app = None if given.app is None else parse_app_name(given.app)
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    return Options(
        connect=choose("connect", parse_address, "localhost:4040", "POTHEAD_CONNECT"),
        workers=choose("workers", parse_workers, "1", "POTHEAD_WORKERS"),
        graceful_timeout_s=choose("graceful_timeout", parse_duration, "30s"),
        log_level=choose("log_level", parse_log_level, "info"),
        app=app,
    )


class LogHandler(logging.Handler):
    """Writes to a descriptor without ever waiting for who reads it.

    What does not fit is dropped and counted: a log that nobody reads must not stop the service.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lost_lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
        notice = (
            b"(%d log lines were lost: nobody read them)\n" % self._lost_lines if self._lost_lines else b""
        )
        left = whole_lines(notice + text, select.PIPE_BUF)
        while left and self._write(left[0]):
            self._lost_lines = 0
            del left[0]
        is_notice_left = self._lost_lines > 0
        self._lost_lines += sum(piece.count(b"\n") for piece in left) - is_notice_left

    def _write(self, piece: bytes) -> bool:
        """Write what is not longer than PIPE_BUF, which a writable pipe takes at once and undivided."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        try:
            return bool(poller.poll(0)) and os.write(self._fd, piece) == len(piece)
        except OSError:  # closed, or a full disk
            return False


def whole_lines(text: bytes, limit_bytes: int) -> list[bytes]:
    """Return the text in one piece, or in lines, which are broken where they are longer than the limit."""
    if len(text) <= limit_bytes:
        return [text]
    room = limit_bytes - 1
    return [
        line[start : start + room].rstrip(b"\n") + b"\n"
        for line in text.splitlines(keepends=True)
        for start in range(0, len(line.rstrip(b"\n")) or 1, room)
    ]


def configure_logging(level: str) -> None:
    """Log to stderr with a handler of our own: how the app sets up its own logging changes nothing here."""
    # Without a stderr, descriptor 2 is somebody else's: perhaps the connection to the hub.
    handler = LogHandler(2) if sys.__stderr__ else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers = [handler]
    log.setLevel(level.upper())
    log.propagate = False


class Signals:
    """SIGTERM and SIGINT: while the app is being imported they interrupt it, later `wait` returns them.

    They come through a descriptor, since a main thread that waits for a lock or a queue would miss one that
    arrives just before it waits. SIGHUP is ignored: there is nothing to read again, and a closed terminal is
    no reason to drop requests.
    """

    END = 0

    def __init__(self) -> None:
        self._is_loading = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_loading:
            raise KeyboardInterrupt

    def listen(self) -> None:
        """Stop raising; called after the import, in which an app may use the wake-up descriptor itself."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._is_loading = False

    def wait(self) -> int:
        """Return the number of the next signal of any kind, or END."""
        return self._reader.recv(1)[0]

    def end(self) -> None:
        """Have `wait` return END. Called by another thread."""
        self._writer.send(bytes([self.END]))

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()


def serve(pool: WorkerPool, signals: Signals) -> bool:
    """Run the pool and obey the signals until it has ended. Return True if no request was cut off."""

    def wait_for_end() -> None:
        pool.join()
        signals.end()

    pool.start()
    threading.Thread(target=wait_for_end, name="pothead-end", daemon=True).start()
    is_draining = False
    while (number := signals.wait()) != Signals.END:
        if number == signal.SIGINT or (number == signal.SIGTERM and is_draining):
            pool.stop_now()
        elif number == signal.SIGTERM:
            log.info("draining")
            pool.stop()
            is_draining = True
    return pool.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker as a process; it keeps the signal handlers it installs. Returns the exit status."""
    try:
        options = parse_args(sys.argv[1:] if argv is None else argv, os.environ)
    except UsageError as exc:
        print(f"pothead-worker: {exc}", file=sys.stderr)
        return 2
    with contextlib.closing(Signals()) as signals:
        try:
            configure_logging(options.log_level)
            app = load_app(options.app) if options.app else demo_app
            pool = WorkerPool(app, options.connect, options.workers, options.graceful_timeout_s)
            signals.listen()
        except LoadError as exc:
            print(f"pothead-worker: {exc}", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            signals.listen()  # an impatient second one must not show a traceback
            return 0
        status = 0 if serve(pool, signals) else 1
    threading.Thread(target=insist_on_exit, args=(status,), name="pothead-exit", daemon=True).start()
    return status


def insist_on_exit(status: int) -> None:
    """End the process even if threads of the app, for which the interpreter waits, keep it alive."""
    ends_at = time.monotonic() + EXIT_GRACE_S
    others = [thread for thread in threading.enumerate() if not thread.daemon]
    for thread in others:
        thread.join(max(0, ends_at - time.monotonic()))
    left = [thread.name for thread in others if thread.is_alive()]
    if left and not threading.main_thread().is_alive():
        log.warning("leaving without threads of the application: %s", ", ".join(left))
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
