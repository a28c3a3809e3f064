# SPDX-License-Identifier: Apache-2.0
# The worker of POTHEAD, which queues expensive HTTP requests. It needs no other file and may be copied as
# it is; the project has its manual, its tests and the text of the licence. `__version__` tells which this is.
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

How it is built, from the bottom to the top: a `Link` is a connection, and `parse_head` and the bodies
understand what the hub sends there; an `Exchange` is one request on it; a `Server` answers it, as a rule by
a `Response`, which calls the app as PEP 3333 says, and tells how the link may go on: an `Ending`. The
`Lobby` is a thread that dials the hub, waits with the links for requests and notices who leaves; a `Slot` is
a thread that is given a link with a request on it. `WorkerPool` owns them and ends them. Threads share next
to nothing: what others want of the lobby they order, and `Halt` is how all are told to stop.

The modes are built on that. A `Forwarder` is a server that passes requests to a local HTTP program, and a
`ProcessServer` one that gives each a process, which a `ForkServer` makes. A `SidePort` is a port of the
worker's own: a `PickupPort`, where consumers come for responses that take a `Detour` past the hub, or a
`PagePort` with metrics or with what the worker is doing. A `GateLoop` opens a slot for one request each time
the app's gate returns.

Vocabulary: the *consumer* sent the request to the hub; an *exchange* is one request with its response; a
message has a *head* and a *body*.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `main` has handlers of its own, Ctrl-C ends the process without a traceback from some import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import array
import ast
import contextlib
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import glob
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pwd
import queue
import random
import re
import secrets
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, Protocol, TypedDict, TypeVar
from wsgiref.handlers import BaseHandler
from wsgiref.util import is_hop_by_hop

if TYPE_CHECKING:
    import ssl
    from signal import _HANDLER

    from _typeshed import OptExcInfo, WriteableBuffer
    from _typeshed.wsgi import ErrorStream, StartResponse, WSGIApplication, WSGIEnvironment

__version__ = "1.0.0"


class SteadyLogger(logging.Logger):
    """Is never disabled: `logging.config` does that by default to each logger that an app does not name."""

    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, _value: bool) -> None:
        """Levels and handlers are what there is to silence it."""


log = logging.getLogger("pothead.worker")
log.__class__ = SteadyLogger  # and not another object: somebody may have configured this one already

T = TypeVar("T")


# ---- Limits ------------------------------------------------------------------------------------------

MAX_HEAD_BYTES = 64 << 10  # twice what the hub lets through, which adds fields of its own
MAX_RESPONSE_HEAD_BYTES = (32 << 10) - 256  # the hub takes 32 KiB
MAX_RESPONSE_FIELDS = 97  # the hub takes 100; the worker adds a date, a framing and a Connection
MAX_CHUNK_LINE_BYTES = 1 << 10
MAX_TRAILER_BYTES = 8 << 10
RECEIVE_BYTES = 64 << 10
FIRST_BYTES = 200  # of what answers instead of a hub, for the log
COPY_BELOW_BYTES = 16 << 10  # smaller pieces are joined: a copy costs less than a longer list of buffers

DISCARD_LIMIT_BYTES = 1 << 20  # as much of an unread body is read away; beyond, the connection is closed
DISCARD_TIMEOUT_S = 1.0
LINGER_S = 2.0  # after closing our direction, how long to wait until the hub has read the response

CONNECT_TIMEOUT_S = 10.0
BACKOFF_FIRST_S = 0.1  # the wait is drawn between half of this and this,
BACKOFF_LAST_S = 5.0  # doubling until here
BACKOFF_REFUSED_S = 5.0  # is added to that when the hub does not know, or want, this worker
MAX_RETRY_AFTER_S = 300.0  # a hub that wants to be left alone for longer is asked again all the same
MAX_TOKEN_BYTES = 4 << 10
MAX_REQUEST_BYTES = 8 << 10  # to be a worker; the hub takes no longer line
MAX_ANSWER_BYTES = 16 << 10
MAX_INTERIM_HEADS = 20
MAX_REASON_BYTES = 300
REASON_TIMEOUT_S = 1.0  # for what a hub tells after the head of a refusal
STOP_NOW_GRACE_S = 0.2  # how long applications get to notice that they were cut off
EXIT_GRACE_S = 2.0  # how long what the app has left running may keep an ended worker alive

MAX_BELLS = 32  # connections that wait at one of several hubs, however many slots are free
LOOK_UP_INTERVAL_S = 5.0  # between two looks which hubs there are
PATIENCE_S = 0.25  # how long a slot that is free is kept for a hub that was asked whether it has something,
LEAST_PATIENCE_S = 0.02  # but not more than four times as long as it took to answer before

KEEP_ALIVE_IDLE_S = 15
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_PROBES = 3
# There is no TCP_USER_TIMEOUT: it would count a hub that has no room for more of a response, and does not
# read until its consumer has taken some, as dead. Keep-alive is for waiting slots; a hub that vanishes in
# the midst of a response is given up when the kernel has retransmitted often enough, as every HTTP server
# does.

HAND_BACK_S = 1.0  # after a response, a slot waits so long for the next request before the lobby does
CROSSING_S = 0.2  # how long after a response the hub's next request may be on its way

PEEK_INTERVAL_S = 0.05
LONGEST_POLL_S = 3600.0  # the kernel's longest is 24 days

SIDE_HEAD_BYTES = 16 << 10  # of a request to a port of the worker's own
SIDE_HEAD_TIMEOUT_S = 10.0
SIDE_VISITORS = 256  # connections that have not said yet what they want; beyond, the oldest is closed
SIDE_INTERVAL_S = 1.0  # how often a port looks for what is overdue
SIDE_SEND_TIMEOUT_S = 10.0  # a reader of metrics or inspection pages who stalls for so long is given up
SIDE_GRACE_S = 1.0  # how long a page may take when the worker ends
PAGE_VISITS = 100  # of one page at the same time, each with a thread; beyond, 503
ACCEPT_PAUSE_S = 0.1  # when there are no descriptors left

PICKUP_EXPIRY_S = 20.0  # how long a redirected response waits for its consumer
STALL_S = 60  # a consumer that has come and reads nothing for so long is given up: it holds a slot

CANCEL_GRACE_S = 0.5  # how long a request's process may clean up before it is killed
FORK_SERVER_EXIT_S = 3.0  # how long the fork server may take to kill what it started

MAX_WAITING_OFFERS = 256  # connections that wait for a request at the same time, however many a gate permits
GATE_GRACE_S = 2.0  # how long a gate may take to notice that the worker is stopping

PROGRESS_INTERVAL_S = 0.1

LOG_BACKLOG_BYTES = 1 << 20  # log lines kept while the log's reader does not read


class ProtocolError(Exception):
    """The hub sent what is not a request."""


class HeadTooLong(ProtocolError):
    """It has not ended by then."""


class BodyError(ConnectionError):
    """The request's body was cut short or is malformed; raised from the application's read."""


class ConsumerGone(ConnectionError):
    """The hub closed the connection: nobody waits for this response any more."""


class WSGIViolation(Exception):
    """The application broke a rule of PEP 3333."""


class LocalError(Exception):
    """The program that requests are forwarded to gave no response, or a broken one."""


class LocalUnreachable(LocalError):
    """It cannot be connected to. Has been logged, once an episode."""


# ---- Processes that the app forks --------------------------------------------------------------------
#
# They are copies of the worker, with its connections and with its way of taking signals. They get neither: a
# copy of a connection would keep a dead worker's slot open, and a signal for a copy would drain the worker.


class TakenSignal(NamedTuple):
    """A signal that this process handles itself."""

    ours: _HANDLER
    theirs: _HANDLER  # what the app, or else the interpreter, does about it


OWN_SOCKETS: weakref.WeakSet[socket.socket] = weakref.WeakSet()
TAKEN_SIGNALS: dict[int, TakenSignal] = {}
masks_before_fork = threading.local()


def own(sock: socket.socket) -> socket.socket:
    """Return a socket that the app does not touch, neither by its forks nor by its default time limit."""
    sock.settimeout(None)
    OWN_SOCKETS.add(sock)
    return sock


def own_pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    return own(one), own(other)


def take_signal(number: int, handler: _HANDLER) -> None:
    """Handle a signal from now on, and remember what the app wants to be done about it."""
    found = signal.signal(number, handler)
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    ours, theirs = TAKEN_SIGNALS.get(number, (found, default))
    if found not in (ours, None):  # None was not installed by Python, and cannot be installed by it
        theirs = found
    TAKEN_SIGNALS[number] = TakenSignal(handler, theirs)


def before_fork() -> None:
    """Hold signals back: one for the child must not come while it still takes them as the worker does."""
    masks_before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN_SIGNALS)


def after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, masks_before_fork.mask)


def after_fork_in_child() -> None:
    # No locks: those that other threads held at the fork are never released here.
    if TAKEN_SIGNALS:
        signal.set_wakeup_fd(-1)
    for number, (ours, theirs) in TAKEN_SIGNALS.items():
        if signal.getsignal(number) == ours:
            signal.signal(number, theirs)
    TAKEN_SIGNALS.clear()
    for sock in list(OWN_SOCKETS):
        sock.close()
    after_fork()


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)


@contextlib.contextmanager
def app_code() -> Iterator[None]:
    """Run code of the app. A process that it forks, and that comes back from it, ends here instead."""
    pid = os.getpid()
    try:
        yield
    except BaseException as exc:
        if os.getpid() != pid:
            end_process(exc)
        raise
    if os.getpid() != pid:
        end_process()


def end_process(exc: BaseException | None = None) -> NoReturn:
    """End the process as the interpreter would, but wait for no threads and call no exit functions."""
    status = 1
    try:
        if exc is None or isinstance(exc, SystemExit):
            status = exit_status(exc)
        else:
            log.error("process %d ended with an exception", os.getpid(), exc_info=exc)
        flush_output()
    finally:
        os._exit(status)


def exit_status(exc: SystemExit | None) -> int:
    code = exc.code if exc else None
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # perhaps there is none, or the app has put one of its own there
            stream.flush()


# ---- Threads, and how they are told to stop ----------------------------------------------------------


def start_thread(target: Callable[[], object], name: str) -> threading.Thread:
    """Start a thread that does not keep the process. Raises OSError if the system has none left."""
    thread = threading.Thread(target=target, name=f"pothead-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:
        raise OSError(errno.EAGAIN, str(exc)) from None
    return thread


def try_to_start(timer: threading.Timer) -> bool:
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as exc:
        log.warning("a time limit will not be kept: %s", exc)
        return False
    return True


class Halt:
    """An event that can be waited for together with a socket: once set, its descriptor stays readable."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_set = False
        self._reader, self._writer = own_pair()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        with self._changed:
            if not self._is_set:
                self._is_set = True
                self._writer.send(b"H")  # nobody sees it closed while another process has it, too
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
        self._writer.close()


def wait_ready(fd: int, event: int, timeout_s: float | None = None, halt: Halt | None = None) -> bool:
    """Return whether `fd` became ready for `event` before timeout or halt. Ready wins over halted."""
    poller = select.poll()
    poller.register(fd, event)
    if halt is not None:
        poller.register(halt, select.POLLIN)
    ready = poller.poll(None if timeout_s is None else timeout_s * 1000)
    return any(each == fd for each, _ in ready)


# ---- Request heads -----------------------------------------------------------------------------------

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
HEAD = re.compile(
    rf"({TOKEN}) (/[\x21-\x7e\x80-\xff]*|\*) HTTP/1\.([01])\r\n((?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n)*)"
)
NEVER_IN_A_HEAD = re.compile(rb"[^\t\r\n\x20-\x7e\x80-\xff]|(?<!\r)\n")
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
    is_old: bool  # HTTP/1.0


def parse_head(data: bytes, may_be_old: bool = False) -> RequestHead:
    """Understand a head without the empty line that ends it. Raises ProtocolError."""
    match = HEAD.fullmatch(data.decode("latin-1"))
    if match is None or (match[3] == "0" and not may_be_old):
        raise ProtocolError("malformed head")
    method, target, minor_version, lines = match.groups()
    is_old = minor_version == "0"
    if target == "*" and method != "OPTIONS":
        raise ProtocolError("malformed target")
    fields = parse_fields(lines)
    if "HOST" not in fields and not is_old:
        raise ProtocolError("no Host")
    return RequestHead(method, target, fields, *parse_framing(fields), is_old)


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


class Source(Protocol):
    """Where bytes come from: a socket, or what behaves like one."""

    def recv(self, size: int, /) -> bytes: ...

    def recv_into(self, target: memoryview, /) -> int: ...


class Intake:
    """What the other end sends on one connection, and what of it has arrived but is not yet understood."""

    def __init__(
        self, sock: Source, received: bytes = b"", failure_type: type[Exception] = BodyError
    ) -> None:
        self._sock = sock
        self._buffer = received
        self._failure_type = failure_type
        self._failure = ""

    @property
    def is_empty(self) -> bool:
        return not self._buffer

    def take_head(self, limit_bytes: int = MAX_HEAD_BYTES) -> bytes | None:
        """Return the next head without its empty line, or None at the end. Raises ProtocolError."""
        head = self._take_until(b"\r\n\r\n", limit_bytes)
        return None if head is None else head + b"\r\n"

    def peek_head(self, limit_bytes: int) -> bytes | None:
        """Return the next head with its empty line if it is there, and leave it. Raises ProtocolError."""
        end = self._buffer.find(b"\r\n\r\n", 0, limit_bytes + 4)
        if end < 0 and len(self._buffer) >= limit_bytes + 4:
            raise HeadTooLong("head too long")
        return None if end < 0 else self._buffer[: end + 4]

    def skip_to(self, start: bytes, mark: bytes) -> bool:
        """Drop what comes before the head that begins with `start` and has `mark` in it; False at the end."""
        while True:
            at = self._buffer.find(mark)
            begin = self._buffer.rfind(start, 0, at) if at >= 0 else -1
            if begin >= 0 and b"\r\n\r\n" not in self._buffer[begin:at]:
                self._buffer = self._buffer[begin:]
                return True
            if at >= 0:
                self._buffer = self._buffer[at + len(mark) :]
                continue
            self._buffer = self._buffer[-MAX_ANSWER_BYTES:]
            if not self._receive():
                return False

    def take_wary_head(self, limit_bytes: int, start: bytes = b"") -> bytes | None:
        """Raise ProtocolError, too, as soon as no head can come of it: no empty line may ever follow."""
        searched = 0
        while b"\r\n\r\n" not in self._buffer and len(self._buffer) <= limit_bytes:
            is_begun = self._buffer.startswith(start[: len(self._buffer)])
            if not is_begun or NEVER_IN_A_HEAD.search(self._buffer, searched):
                raise ProtocolError("malformed head")
            searched = len(self._buffer)
            if not self._receive():
                return None
        return self.take_head(limit_bytes)

    def add(self, data: bytes) -> bool:
        """Have this understood after what has come before it; False if it is the end of the connection."""
        self._buffer += data
        return bool(data)

    def take_received(self) -> bytes:
        """Return what has come already, for somebody else to understand."""
        received, self._buffer = self._buffer, b""
        return received

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
        raise self._failure_type(reason)

    def _check(self) -> None:
        if self._failure:
            raise self._failure_type(self._failure)

    def _take_until(self, end: bytes, limit_bytes: int) -> bytes | None:
        """Return what comes before `end`, and drop `end`; None when the hub closes first.

        Nothing is lost when receiving raises; another call goes on.
        """
        searched = 0
        while (found := self._buffer.find(end, searched)) < 0 and len(self._buffer) < limit_bytes + len(end):
            searched = max(0, len(self._buffer) - len(end) + 1)
            if not self._receive():
                return None
        if not 0 <= found <= limit_bytes:
            raise HeadTooLong("head too long")
        data, self._buffer = self._buffer[:found], self._buffer[found + len(end) :]
        return data

    def _receive(self) -> bool:
        """Receive once; False at the end of the connection."""
        return self.add(self._sock.recv(RECEIVE_BYTES))


class RequestBody(io.RawIOBase):
    """A request's body as a raw stream with an end. Below an `io.BufferedReader` it is `wsgi.input`.

    While the connection does not block, a read raises BlockingIOError where it would wait; another goes on.
    """

    def readable(self) -> bool:
        return True

    def left_bytes(self) -> float:
        """Return how many bytes are still to come on the connection; infinity when nobody knows."""
        raise NotImplementedError

    def has_rest(self) -> bool:
        """Return whether there is, or may be, more to read."""
        return self.left_bytes() > 0


class FixedBody(RequestBody):
    """A body of known length."""

    def __init__(self, intake: Intake, length: int) -> None:
        self._intake = intake
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

    NAME = TOKEN.encode()
    QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
    # Each byte decides how it goes on, so that a line that fails at its end costs linear time.
    SIZE_LINE = re.compile(
        rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*" % (NAME, NAME, QUOTED)
    )
    TRAILER_LINE = re.compile(rb"%b:[\t\x20-\x7e\x80-\xff]*" % NAME)

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._left_in_chunk = 0
        self._is_in_chunk = False  # until what ends it has come, too
        self._is_in_trailers = False
        self._left_of_trailers = MAX_TRAILER_BYTES
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
        """Take all up to the first byte of the next chunk; each line only once, since any may block."""
        if self._is_in_chunk:
            self._intake.take_line(limit_bytes=0)
            self._is_in_chunk = False
        if not self._is_in_trailers:
            match = self.SIZE_LINE.fullmatch(self._intake.take_line(MAX_CHUNK_LINE_BYTES))
            if match is None:
                self._intake.fail("malformed chunked body")
            self._left_in_chunk = int(match[1], 16)
            self._is_in_chunk = self._left_in_chunk > 0
            self._is_in_trailers = not self._is_in_chunk
        if self._is_in_trailers:
            self._take_trailers()
            self._has_ended = True

    def _take_trailers(self) -> None:
        while line := self._intake.take_line(max(0, self._left_of_trailers)):
            self._left_of_trailers -= len(line) + 2
            if not self.TRAILER_LINE.fullmatch(line):
                self._intake.fail("malformed trailers")


# ---- Transports --------------------------------------------------------------------------------------
#
# What a connection's bytes go over: the socket itself, or TLS on it. Both can do the same. `sock` is an
# ordinary socket in any case, for whoever polls it, cuts it or asks for its addresses.


class PlainTransport:
    """A socket. What it receives, it receives without another call between."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recv: Callable[[int], bytes] = sock.recv
        self.recv_into: Callable[[memoryview], int] = sock.recv_into
        # Has a call raise TimeoutError when it would wait for longer; BlockingIOError with 0.
        self.limit_time: Callable[[float | None], None] = sock.settimeout

    def take(self, size: int) -> bytes | None:
        """Receive what has come, without waiting; None if nothing has, b"" at the end. Raises OSError."""
        try:
            return self.sock.recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def send(self, *pieces: bytes) -> None:
        """Send all pieces in order, in one call where that is possible, without copying large ones."""
        if sum(map(len, pieces)) < COPY_BELOW_BYTES:
            self.sock.sendall(b"".join(pieces))
            return
        sent = self.sock.sendmsg(pieces)
        for piece in pieces:
            if sent < len(piece):
                self.sock.sendall(memoryview(piece)[sent:])
            sent = max(0, sent - len(piece))

    def try_to_send(self, data: bytes) -> bool:
        """Send what is small without waiting; return whether it was taken. Raises OSError."""
        return self.sock.send(data, socket.MSG_DONTWAIT) == len(data)

    def peek(self) -> bytes | None:
        """Return the next byte if it has come, or b"" if there will be no more."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def has_news(self, is_readable: bool) -> bool:
        """Return whether there is something to receive, or the end; the socket says that it is readable."""
        return is_readable

    def say_goodbye(self) -> None:
        """Tell the other end, if that needs no waiting, that its connection ends as it should.

        Here a FIN says all that there is to say.
        """


def load_ssl() -> None:
    """Import `ssl` for this module: it costs 5 to 16 ms and 4 to 6 MB, and most workers need none."""
    global ssl
    import ssl


class TlsTransport:
    """TLS on a socket (RFC 8446), through two buffers in memory: whoever polls the socket sees ciphertext.

    So nothing here is ever half sent, and the socket stays what it was. What it cannot say is whether there
    is something to receive: records may have been taken from it already, and those that come may be only
    TLS's own. `has_news` and `peek` decrypt to find out.

    Any thread may call any of this. Neither lock is held while something is waited for but room to send.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None) -> None:
        """`host` is who has to be at the other end; none makes this the end that has the certificate."""
        self.sock = sock
        self.first = b""  # that the other end has said, if it does not speak TLS
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=host is None, server_hostname=host
        )
        self._lock = threading.Lock()  # of what decrypts and encrypts
        self._sending = threading.Lock()  # before the other one
        self._unsent = memoryview(b"")  # ciphertext, before what is in the outgoing buffer
        self._ahead = b""  # that was decrypted to see whether there is something
        self._is_awaited = False  # by a thread that will decrypt what comes
        self._timeout_s: float | None = None

    def shake_hands(self) -> int:
        """Go on with the handshake without waiting. Return the event to wait for; 0 when it is complete.

        Raises OSError; an `ssl.SSLError` if the two ends do not agree.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._try_to_flush():
                    return select.POLLOUT
                if not self._fetch():
                    return select.POLLIN
            except OSError:
                self._try_to_flush()  # the alert, which says why
                raise
            else:
                return 0 if self._try_to_flush() else select.POLLOUT

    def wait_for_hands(self, seconds: float) -> None:
        """Go through the handshake. Raises OSError; TimeoutError if it takes longer."""
        ends_at = time.monotonic() + seconds
        while events := self.shake_hands():
            if not wait_ready(self.sock.fileno(), events, max(0.0, ends_at - time.monotonic())):
                raise TimeoutError("timed out")

    # -- receiving

    def recv(self, size: int, /) -> bytes:
        while (data := self.take(size, will_wait=self._timeout_s != 0)) is None:
            try:
                self._wait(select.POLLIN)
            except TimeoutError:
                self._is_awaited = False
                raise
        return data

    def _wait(self, event: int) -> None:
        if self._timeout_s == 0:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not wait_ready(self.sock.fileno(), event, self._timeout_s):
            raise TimeoutError("timed out")

    def recv_into(self, target: memoryview, /) -> int:
        data = self.recv(len(target))
        target[: len(data)] = data
        return len(data)

    def limit_time(self, seconds: float | None) -> None:
        self._timeout_s = seconds

    def peek(self) -> bytes | None:
        with self._lock:
            if not self._ahead and not self._is_awaited:
                try:
                    ahead = self._decrypt(RECEIVE_BYTES)
                except OSError:
                    return b""
                if not ahead:
                    return ahead
                self._ahead = ahead
            first = self._ahead[:1] or None
        self._answer()
        return first

    def has_news(self, is_readable: bool) -> bool:
        return self.peek() is not None

    def take(self, size: int, will_wait: bool = False) -> bytes | None:
        with self._lock:
            if self._ahead:
                data, self._ahead = self._ahead[:size], self._ahead[size:]
                return data
            received = self._decrypt(size)
            self._is_awaited = received is None and will_wait
        self._answer()
        return received

    def _decrypt(self, size: int) -> bytes | None:
        """Return the same of what has not been decrypted yet.

        An end without close_notify is none either, but who cuts a connection off cannot fake the end of a
        body: those that are received here have a length or chunks (RFC 9112 §9.8).
        """
        while True:
            try:
                return self._tls.read(size)
            except ssl.SSLWantReadError:
                if not self._fetch():
                    return None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    def _fetch(self) -> bool:
        """Take ciphertext from the socket; False if nothing has come."""
        try:
            data = self.sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        self.first = self.first or data[:FIRST_BYTES]
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return True

    # -- sending

    def send(self, *pieces: bytes) -> None:
        data = b"".join(pieces) if sum(map(len, pieces)) < COPY_BELOW_BYTES else b""
        with self._sending:
            for piece in [data] if data else pieces:
                rest = memoryview(piece)
                while rest:
                    self._encrypt(rest[:RECEIVE_BYTES])
                    rest = rest[RECEIVE_BYTES:]
                    while not self._flush():
                        self._wait(select.POLLOUT)

    def try_to_send(self, data: bytes) -> bool:
        """Send as much as is taken, and keep the rest; return whether there is none. Does not wait."""
        with self._sending:
            self._encrypt(memoryview(data))
            return self._flush()

    def send_rest(self) -> bool:
        """Go on with what was kept."""
        with self._sending:
            return self._flush()

    def say_goodbye(self) -> None:
        """Send close_notify (RFC 8446 §6.1): what was sent has been whole."""
        if not self._sending.acquire(blocking=False):
            return  # somebody is stuck there
        try:
            with self._lock:
                with contextlib.suppress(OSError):
                    self._fetch()  # what lay there unread would make a reset of the end
                with contextlib.suppress(OSError):  # the other end has not sent its own yet
                    self._tls.unwrap()
            with contextlib.suppress(OSError):
                self._flush()
        finally:
            self._sending.release()

    def _answer(self) -> None:
        """Send what TLS itself has to say to what was received: to a KeyUpdate, for instance."""
        if self._outgoing.pending:
            self._try_to_flush()

    def _try_to_flush(self) -> bool:
        if not self._sending.acquire(blocking=False):
            return False  # whoever sends will send that, too
        try:
            return self._flush()
        except OSError:  # receiving tells
            return True
        finally:
            self._sending.release()

    def _encrypt(self, data: memoryview) -> None:
        with self._lock:
            self._tls.write(data)

    def _flush(self) -> bool:
        """Send what is taken without waiting; return whether that is all."""
        while True:
            if not self._unsent:
                with self._lock:
                    self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return True
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                return False


Transport = PlainTransport | TlsTransport


# ---- Links -------------------------------------------------------------------------------------------


class Ending(enum.Enum):
    """How a connection may go on after a response."""

    KEEP = enum.auto()  # with the next request
    CLOSE = enum.auto()  # the response is whole, and the last one
    CUT = enum.auto()  # the response is not whole, and must not look as if it were


def nothing() -> None:
    """Nobody wants to know."""


class Link:
    """One connection: to a hub, or to a consumer that has come for its response itself.

    One thread receives and sends; others may `cut` it, or say that its other end has gone.
    """

    def __init__(self, transport: Transport, received: bytes = b"", is_old: bool = False) -> None:
        """`received` is what somebody else has taken from it already. An old end speaks HTTP/1.0."""
        self.transport = transport
        self._sock = sock = transport.sock
        self.send = transport.send
        self.host = ""  # of the other end
        with contextlib.suppress(OSError, IndexError):  # it may have been reset; a socket pair has no address
            self.host = str(sock.getpeername()[0])
        self.intake = Intake(transport, received)
        self.may_chunk = not is_old
        self.opened_at = self.free_since = time.monotonic()
        self.has_served = False
        self.is_gone = False
        self._on_gone: Callable[[], object] = nothing

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def own_host(self) -> str:
        """The address of this end."""
        return plain_address(self._sock.getsockname()[0])

    # -- the other end

    def when_gone(self, action: Callable[[], object]) -> None:
        """Have this done, by another thread or at once, when the other end has closed; in place of others."""
        self._on_gone = action
        if self.is_gone:
            action()

    def disregard(self) -> None:
        """From now on it does not matter whether the other end closes."""
        self._on_gone = nothing

    def on_gone(self) -> None:
        """The other end has closed. Called by other threads, perhaps more than once."""
        self.is_gone = True
        self._on_gone()

    def has_news(self, is_readable: bool = False) -> bool:
        """Return whether there is something to take, or the end, the socket being readable or not.

        To be asked before the socket is waited for, which may have given it away already, and after that: it
        may have become readable for nothing.
        """
        return not self.intake.is_empty or self.transport.has_news(is_readable)

    def peek(self) -> bytes | None:
        """Return the next byte if it has come, or b"" if there will be no more."""
        return self.transport.peek()

    # -- its thread

    def take_in(self) -> bool | None:
        """Receive what has come, for the intake; None if nothing has, False if there will be no more."""
        return True if not self.intake.is_empty else self.take_more()

    def take_more(self) -> bool | None:
        """The same, although something may have come before."""
        try:
            data = self.transport.take(RECEIVE_BYTES)
        except OSError:
            return False
        return None if data is None else self.intake.add(data)

    def try_to_send(self, data: bytes) -> bool:
        """Send what is small without waiting; return whether it was taken."""
        try:
            return self.transport.try_to_send(data)
        except OSError:
            return False

    @contextlib.contextmanager
    def time_limit(self, seconds: float | None) -> Iterator[None]:
        """Have receiving raise when it would take longer; with 0, when it would wait at all."""
        self.transport.limit_time(seconds)
        try:
            yield
        finally:
            self.transport.limit_time(None)

    # -- ending it

    def cut(self) -> None:
        """End the connection for whoever sends or receives there. Called by any thread."""
        if self.may_chunk:  # else the other end would take that for the body's end: it is reset when closed
            cut_off(self._sock)

    def finish_sending(self) -> None:
        self.transport.say_goodbye()
        with contextlib.suppress(OSError):  # who has all that was sent may have left, with our goodbye unread
            self._sock.shutdown(socket.SHUT_WR)

    def linger(self) -> None:
        """Close our direction and read the other's away until it closes, too.

        Closing with unread bytes would send a reset, which destroys a response that has not been read yet.
        """
        self.transport.say_goodbye()
        close_gently(self._sock)

    def leave(self, ending: Ending) -> None:
        """End it at once, for whoever else has it, too, so that its other end can tell what this means."""
        if ending is not Ending.CUT:
            self.transport.say_goodbye()
        self.cut()

    def end(self, ending: Ending) -> None:
        """End it, before it is closed, so that its other end can tell whether the response is whole."""
        if ending is not Ending.CUT:
            if not self.may_chunk:
                set_reset_on_close(self._sock, False)
            self.linger()
        self.cut()

    def close(self) -> None:
        """Let go of it. Only who watches it may do so: its number is used again at once."""
        self._sock.close()


@functools.lru_cache(maxsize=2)
def http_date(unix_second: int) -> str:
    return email.utils.formatdate(unix_second, usegmt=True)


def set_reset_on_close(sock: socket.socket, is_on: bool) -> None:
    """Have the connection end with a reset when it is closed, or not."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_on, 0))


def cut_off(sock: socket.socket) -> None:
    """End a connection for whoever sends or receives there."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def close_gently(sock: socket.socket) -> None:
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
        "REMOTE_PORT": "0",  # of which only the first proxy knows; some apps need a number there
        "REQUEST_ID": fields.get("X_REQUEST_ID", "-"),
        "pothead.queue_seconds": matched(SECONDS, fields.get("POTHEAD_QUEUE_SECONDS"), float, 0.0),
        "wsgi.url_scheme": scheme,
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


CHUNKED = b"\r\nTransfer-Encoding: chunked\r\n"


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
    if excess := describe_excess(status, fields):
        raise WSGIViolation(f"the app's {excess}")
    return ResponseHead(status, fields.copy(), length, has_date)


def describe_excess(status: str, fields: list[tuple[str, str]]) -> str:
    """Return in what way a response's head is more than the hub takes, or ""."""
    if len(fields) > MAX_RESPONSE_FIELDS:
        return f"head has {len(fields)} fields, and may have {MAX_RESPONSE_FIELDS}"
    size = len(status) + sum([len(name) + len(value) + 4 for name, value in fields])
    if size > MAX_RESPONSE_HEAD_BYTES:
        longest = max(fields, key=lambda field: len(field[1]), default=("the status", ""))[0]
        return f"head has {size} bytes, and may have {MAX_RESPONSE_HEAD_BYTES}; most are in {longest}"
    return ""


def check_field(field: tuple[str, str]) -> str:
    """Return the field's name in lower case. Raises WSGIViolation."""
    if type(field) is not tuple or len(field) != 2:
        raise WSGIViolation(f"a header must be a tuple of two str, not {field!r}")
    name, value = field
    if type(name) is not str or not FIELD_NAME.fullmatch(name):
        raise WSGIViolation(f"bad header name {name!r}")
    if type(value) is not str or not FIELD_VALUE.fullmatch(value):
        hint = "" if type(value) is str else f": it must be a str, not {type(value).__name__}"
        raise WSGIViolation(f"bad value {value!r} of header {name}{hint}")
    if is_hop_by_hop(name):
        raise WSGIViolation(f"hop-by-hop header {name} is not the application's to set")
    return name.lower()


def check_length(value: str, earlier: int | None) -> int:
    if not LENGTH.fullmatch(value):
        raise WSGIViolation(f"bad Content-Length {value!r}")
    if earlier is not None:
        raise WSGIViolation("more than one Content-Length")
    return int(value)


def error_text(status: str, request_id: str, detail: str) -> str:
    """Return what the consumer reads when there is no answer of the app's."""
    return f"{status}{f': {detail}.' if detail else ''}\nrequest id: {request_id}\n"


class Response(BaseHandler):
    """Calls the app for one request and sends what it answers (PEP 3333).

    The framing is decided with the first byte of the body: the app's Content-Length; else a length of our
    own, if the app returned a list of one item; else chunks. Every ending goes through `run`.

    Of its base class it keeps the making of the environ; the sending there neither checks nor frames enough.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.os_environ = {}  # the base class would copy the process's own into each environ
        self.environ: WSGIEnvironment = {}
        self.exchange = exchange
        self.link = exchange.link
        self.request = exchange.head
        self.head: ResponseHead | None = None
        self.body_bytes = 0  # that have been sent
        self.is_complete = False
        self.is_chunked = False
        self.says_close = False
        self._pid = os.getpid()

    @property
    def has_body(self) -> bool:
        assert self.head is not None
        return self.request.method != "HEAD" and self.head.status[:3] not in ("204", "304")

    @property
    def is_all_sent(self) -> bool:
        """Whether the consumer has all of the response, as its length tells: from now on it may be gone."""
        if self.head is None or not self.headers_sent:
            return False
        return not self.has_body or self.body_bytes == self.head.length

    # -- calling the app

    def run(self, application: WSGIApplication) -> None:
        """Call the app and send its response, or an error in its place. Does not raise.

        Even `sys.exit()` in an app must end nothing but its own request, hence BaseException.
        """
        try:
            with app_code():
                self._call(application)
        except BaseException as exc:
            self._on_failure(exc)

    def settle(self) -> Ending:
        """Make the connection ready for the next request, if there may be one."""
        if not self.is_complete:
            return Ending.CUT
        if not self.exchange.discard_body():
            self.exchange.link.linger()
            return Ending.CLOSE
        return Ending.CLOSE if self.says_close else Ending.KEEP

    def _call(self, application: WSGIApplication) -> None:
        self.setup_environ()
        self.exchange.keeper.on_environ(self.environ)
        try:
            self.result = application(self.environ, self.start_response)
            self.finish_response()
        finally:
            self.close()

    def add_cgi_vars(self) -> None:
        self.environ.update(build_environ(self.request, self.exchange.link.host))
        self.environ["wsgi.input_terminated"] = True
        self.environ["pothead.cancelled"] = self.exchange.cancelled

    def get_stdin(self) -> io.BufferedIOBase:
        return io.BufferedReader(self.exchange.body) if self.exchange.body else io.BytesIO()

    def get_stderr(self) -> ErrorStream:
        return sys.stderr

    def get_scheme(self) -> str:
        return str(self.environ["wsgi.url_scheme"])

    def finish_response(self) -> None:
        if isinstance(self.result, (str, bytes)) or not hasattr(self.result, "__iter__"):
            hint = " (does it make the app?)" if callable(self.result) else ""
            kind = type(self.result).__name__
            raise WSGIViolation(f"the app returned {kind}, not an iterable of bytes{hint}")
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
        if self.headers_sent and exc_info:
            error = exc_info[1] or WSGIViolation("start_response was called after the response had begun")
            raise error.with_traceback(exc_info[2])
        if self.head is not None and not exc_info:
            raise WSGIViolation("start_response was called twice without exc_info")
        self.head = check_head(status, headers)
        return self.write

    def send_head(self) -> None:
        """Send the head before there is any of the body, which is in chunks if its length is not known."""
        self._write(self._begin(1))

    def write(self, data: bytes) -> None:
        """Send a piece of the body at once. An empty one only notices whether the consumer has gone."""
        if not isinstance(data, bytes):
            raise WSGIViolation(f"the body has a piece of type {type(data).__name__} instead of bytes")
        self._check_process()
        if self.is_complete:  # the connection may be another request's by now
            raise WSGIViolation("write was called after the response had ended")
        if data:
            self._check_consumer()
            self._send_piece(data)
        elif not self.is_all_sent:
            self._check_consumer()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a process that the application has forked cannot answer in its place")

    def _check_consumer(self) -> None:
        if self.exchange.cancelled.is_set():
            raise ConsumerGone

    # -- framing

    def _send_piece(self, data: bytes) -> None:
        if self.head is None:
            raise WSGIViolation("the body came before start_response was called")
        length = self.head.length
        if length is None or not self.has_body:
            self._send(data)
            return
        left = length - self.body_bytes
        if len(data) <= left or (self.headers_sent and left):
            self._send(data[:left])
        if len(data) > left:
            raise WSGIViolation(f"the body is longer than its Content-Length of {length}")

    def _send(self, data: bytes) -> None:
        start = b"" if self.headers_sent else self._begin(len(data))
        if not self.has_body:
            self._write(start)
        elif self.is_chunked:
            self._write(start + b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._write(start, data)
        self.body_bytes += len(data)

    def finish_content(self) -> None:
        """Send what ends the response, if it is whole."""
        self._check_process()
        if self.head is None:
            raise WSGIViolation("start_response was not called")
        if not self.is_all_sent:
            self._check_consumer()
        if self.has_body and self.body_bytes < (self.head.length or 0):
            raise WSGIViolation(f"the body is shorter than its Content-Length of {self.head.length}")
        if not self.headers_sent:
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
        is_detoured = self.has_body and self.head.status.startswith("200")
        detour = self.exchange.detour if is_detoured else None
        self.says_close = self.says_close or detour is not None or self.exchange.must_close()
        if self.says_close:
            fields = [*fields, ("Connection", "close")]
        elif self.exchange.keeper.must_hold():
            fields = [*fields, ("Connection", "hold")]
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields])
        start = f"HTTP/1.1 {self.head.status}\r\n{lines}\r\n".encode("latin-1")
        if detour:
            self.exchange.fetch_body()
        self.headers_sent = True
        self.exchange.keeper.on_status(self.head.status)
        if detour:
            self.link = detour(start)
        if self.is_chunked and not self.link.may_chunk:
            self.is_chunked = False
            return without_chunks(start)
        return start

    def _choose_framing(self, first_bytes: int) -> list[tuple[str, str]]:
        assert self.head is not None
        if first_bytes == 0 and self.request.method == "HEAD":
            return []  # the app did not say how long the body would be
        if first_bytes == 0 or (isinstance(self.result, (list, tuple)) and len(self.result) == 1):
            self.head = self.head._replace(length=first_bytes)
            return [("Content-Length", str(first_bytes))]
        self.is_chunked = self.has_body
        return [("Transfer-Encoding", "chunked")]

    def _write(self, *pieces: bytes) -> None:
        try:
            self.link.send(*pieces)
        except OSError as exc:
            raise ConsumerGone from exc

    def _flush(self) -> None:
        """Nothing is ever held back."""

    # -- when it fails

    def _on_failure(self, exc: BaseException) -> None:
        request_id = self.exchange.request_id
        if isinstance(exc, ConsumerGone):
            self.exchange.keeper.on_consumer_gone(self.exchange)
        elif isinstance(exc, BodyError):
            log.info("request %s: request %s", request_id, exc)
            self._send_error("400 Bad Request")
        elif isinstance(exc, LocalError):
            is_down = isinstance(exc, LocalUnreachable)
            level = logging.DEBUG if is_down else logging.ERROR
            log.log(level, "request %s: the local program failed: %s", request_id, exc)
            detail = "the service behind the worker cannot be reached" if is_down else ""
            self._send_error("502 Bad Gateway", detail)
        elif isinstance(exc, WSGIViolation):
            log.error("request %s: WSGI violation: %s", request_id, exc)
            self._send_error("500 Internal Server Error")
        else:
            log.error("request %s: the application raised an exception", request_id, exc_info=exc)
            self._send_error("500 Internal Server Error")

    def _send_error(self, status: str, detail: str = "") -> None:
        """Answer in the app's place, if no byte of its own response has been sent."""
        if self.headers_sent:
            self.is_complete = self.is_complete or self.is_all_sent
            return
        text = error_text(status, self.exchange.request_id, detail).encode("latin-1")
        fields = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))]
        self.head = ResponseHead(status, fields, len(text), has_date=False)
        start = self._begin(len(text))
        with contextlib.suppress(ConsumerGone):
            self._write(start, text if self.has_body else b"")
            self.is_complete = True


# ---- Exchanges ---------------------------------------------------------------------------------------

GONE_STATUS = "499"  # the consumer left before the response, in the hub's words
LOST_STATUS = "502"  # what the hub makes of a connection that is closed without one


# The way of a response past the hub: sends the consumer to where the response is that begins with this, and
# returns the consumer's own connection. Raises ConsumerGone.
Detour = Callable[[bytes], Link]

CONSUMER_HAS_GONE = "the consumer has gone"


class Exchange:
    """One request, and how it is to be answered."""

    def __init__(self, link: Link, data: bytes, keeper: Keeper) -> None:
        """`data` is the head. Raises ProtocolError."""
        self.link = link
        self.data = data
        self.head = parse_head(data)
        self.keeper = keeper
        self.request_id = self.head.fields.get("X_REQUEST_ID", "-")
        self.cancelled = threading.Event()
        self.why_cancelled = CONSUMER_HAS_GONE
        self.detour: Detour | None = None
        self.body: RequestBody | None = None
        if self.head.is_chunked:
            self.body = ChunkedBody(link.intake)
        elif self.head.length:
            self.body = FixedBody(link.intake, self.head.length)
        self.consumer: Link | None = None  # if it has come to the pickup port
        self._on_cancel: list[Callable[[], object]] = []

    def redirect(self, detour: Detour) -> None:
        """Have the response taken past the hub, if it is one for that."""
        self.detour = detour
        if self.body:
            self.body = SeparableBody(self.body)

    def must_close(self) -> bool:
        """Return whether the connection cannot take another request after this one."""
        unread = self.body.left_bytes() if self.body else 0
        is_asked_to = "close" in connection_options(self.head.fields)
        return is_asked_to or self.keeper.is_last() or unread > DISCARD_LIMIT_BYTES

    def fetch_body(self) -> None:
        """Have the app read the rest of the body from somewhere else. Raises BodyError."""
        if isinstance(self.body, SeparableBody):
            self.body.fetch()

    def discard_body(self) -> bool:
        """Read away what the app left of the body; False if that is too much or takes too long."""
        if self.body is None or not self.body.left_bytes():
            return True
        ends_at = time.monotonic() + DISCARD_TIMEOUT_S
        left = DISCARD_LIMIT_BYTES
        with self.link.time_limit(DISCARD_TIMEOUT_S), contextlib.suppress(OSError):
            while left > 0 and time.monotonic() < ends_at:
                count = len(self.body.read(RECEIVE_BYTES) or b"")
                if count == 0:
                    return True
                left -= count
        return False

    def when_cancelled(self, action: Callable[[], object]) -> None:
        """Have this done, too, when nobody waits for the response any more; at once if that is so."""
        self._on_cancel.append(action)
        if self.cancelled.is_set():
            action()

    def cancel(self, reason: str = CONSUMER_HAS_GONE) -> None:
        """Nobody waits for the response any more. Called by other threads, perhaps more than once."""
        if not self.cancelled.is_set():
            self.why_cancelled = reason
            self.cancelled.set()
        for action in self._on_cancel:
            action()

    def disregard(self) -> None:
        """From now on it does not matter whether anybody waits.

        What was to be done then mostly refers to this exchange: kept, it would be a cycle, which only the
        collector of garbage can free.
        """
        self._on_cancel.clear()


class Keeper(Protocol):
    """Who has requests answered: a slot, or a request's own process."""

    def has_next(self, link: Link) -> bool:
        """Wait for another request to be taken from the link; False if it is not to be waited for."""

    def answer(self, exchange: Exchange) -> Ending: ...

    def is_last(self) -> bool:
        """Return whether the request at hand is the last one that is taken from this connection."""

    def must_hold(self, is_early: bool = False) -> bool:
        """Return whether the response at hand has to say that its connection is held.

        Early is before anybody knows when it ends, and which other hubs have something then.
        """

    def on_environ(self, environ: WSGIEnvironment) -> None:
        """The app is about to be called with this."""

    def on_status(self, status: str) -> None:
        """The consumer gets a response with this status now."""

    def on_consumer_gone(self, exchange: Exchange) -> None:
        """The response could not be sent."""

    def on_response(self, status_line: str) -> None:
        """A response has come where there should be a request."""


class RequestHandler(BaseHTTPRequestHandler):
    """Takes requests from a link, one after the other, and has them answered; constructing it does the work.

    Of its base class it keeps the way of life (setup, handle, finish; handle_one_request) and replaces the
    parser, which is slow and lenient.
    """

    def __init__(self, link: Link, keeper: Keeper) -> None:
        self.link = link
        self.keeper = keeper
        self.ending = Ending.KEEP  # how the link may go on
        super().__init__(link, (link.host, 0), None)  # type: ignore[arg-type]  # the base only keeps them

    def setup(self) -> None:
        """The link is ready."""

    def handle(self) -> None:
        while self.ending is Ending.KEEP and self.keeper.has_next(self.link):
            self.handle_one_request()

    def finish(self) -> None:
        """Whoever has opened the link closes it."""

    def handle_one_request(self) -> None:
        try:
            self.ending = self._serve()
        except ProtocolError as exc:
            self._refuse(exc)
        except OSError as exc:
            log.debug("connection to the hub lost: %s", exc)
            self.ending = Ending.CUT

    def _serve(self) -> Ending:
        data = self.link.intake.take_head()
        if data is None:
            return Ending.CUT
        if data.startswith(b"HTTP/"):
            self.keeper.on_response(data.partition(b"\r\n")[0].decode("latin-1"))
            return Ending.CUT
        exchange = Exchange(self.link, data, self.keeper)
        log.debug(
            "request %s: %s %s",
            exchange.request_id,
            exchange.head.method,
            exchange.head.target.partition("?")[0],
        )
        return self.keeper.answer(exchange)

    def _refuse(self, reason: ProtocolError) -> None:
        log.warning("not a request from the hub at %s: %s", self.link.host, reason)
        self.ending = Ending.CUT
        with contextlib.suppress(OSError):
            self.link.send(
                b"HTTP/1.1 400 Bad Request\r\nContent-Length: 12\r\nConnection: close\r\n\r\nBad Request\n"
            )
        self.link.linger()


# ---- Servers: who answers a request ------------------------------------------------------------------


class Server(Protocol):
    """Answers one request on a link."""

    def answer(self, exchange: Exchange) -> Ending:
        """Return how the link may go on. The exchange knows the rest."""


class AppServer:
    """Has a WSGI app answer, in the same thread."""

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application

    def answer(self, exchange: Exchange) -> Ending:
        response = Response(exchange)
        response.run(self._application)
        return response.settle()


# ---- Forwarding to a local program -------------------------------------------------------------------

RESPONSE_HEAD = re.compile(
    r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n"
    rf"((?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n)*)"
)
FORWARD_URL = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[^:\[\]/?#@\s]+)(?::([0-9]{1,5}))?/?")
NOT_FORWARDED = ("proxy-connection", "trailer")  # beside the hop-by-hop ones of PEP 3333
LOCAL_HEAD_START = b"HTTP/1."


def parse_forward(text: str) -> Address:
    """Understand `http://host:port`. Raises ValueError."""
    match = FORWARD_URL.fullmatch(text)
    port = int(match[2] or 80) if match else 0
    if match is None or not 0 < port < 65536:
        raise ValueError(f"{text!r} is not http://HOST:PORT, like http://localhost:3000")
    return Address(match[1].strip("[]"), port)


def connection_options(fields: Mapping[str, str]) -> list[str]:
    """Return what the Connection field says, in lower case; `fields` is by CGI name."""
    return [option.strip(" \t") for option in fields.get("CONNECTION", "").lower().split(",")]


def is_forwarded(name: str, options: Sequence[str]) -> bool:
    """Return whether a field is for the other end, too, and not for one connection."""
    return not (name.lower() in NOT_FORWARDED or name.lower() in options or is_hop_by_hop(name))


class LocalHead(NamedTuple):
    """What a local program answers, with the fields that are for the consumer."""

    status: str
    fields: list[tuple[str, str]]
    length: int | None
    is_chunked: bool


def parse_local_head(data: bytes) -> LocalHead:
    """Understand a response's head without the empty line that ends it. Raises LocalError."""
    match = RESPONSE_HEAD.fullmatch(data.decode("latin-1"))
    if match is None:
        raise LocalError("malformed head")
    _, code, reason, lines = match.groups()
    pairs = [line.partition(":") for line in lines.split("\r\n")[:-1]]
    fields = [(name, value.strip(" \t")) for name, _, value in pairs]
    known: dict[str, str] = {}
    for name, value in fields:
        key = name.upper().replace("-", "_")
        if "_" in name or (key == "CONTENT_LENGTH" and known.get(key) == value):
            continue  # another field than it looks like there; or it is said twice
        known[key] = f"{known[key]}, {value}" if key in known else value
    try:
        length, is_chunked = parse_framing(known)
    except ProtocolError as exc:
        raise LocalError(str(exc)) from None
    options = connection_options(known)
    kept = [(name, value) for name, value in fields if is_forwarded(name, options)]
    if length is not None:
        kept = [field for field in kept if field[0].lower() != "content-length"]
        kept.append(("Content-Length", str(length)))
    if excess := describe_excess(code, kept):
        raise LocalError(f"its {excess}")
    return LocalHead(f"{code} {reason or ''}", kept, length, is_chunked)


def take_local_head(intake: Intake) -> LocalHead:
    """Take a response's head, and those of interim responses before it. Raises LocalError."""
    while True:
        try:
            data = intake.take_wary_head(MAX_HEAD_BYTES, LOCAL_HEAD_START)
        except HeadTooLong as exc:
            raise LocalError(str(exc)) from None
        except ProtocolError:
            raise LocalError("this is not HTTP/1.x") from None
        if data is None:
            raise LocalError("it closed the connection before its response")
        head = parse_local_head(data)
        if head.status.startswith("101"):
            raise LocalError("it switched protocols")
        if not head.status.startswith("1"):
            return head


def make_local_head(request: RequestHead) -> bytes:
    """Return the head of a request as the local program gets it."""
    options = connection_options(request.fields)
    fields = [(key.replace("_", "-").title(), value) for key, value in request.fields.items()]
    lines = [
        f"{name}: {value}\r\n" for name, value in fields if is_forwarded(name, options) and name != "Expect"
    ]
    lines.append("Connection: close\r\n")
    if request.is_chunked:
        lines.append("Transfer-Encoding: chunked\r\n")
    return f"{request.method} {request.target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1")


class Forwarder:
    """Has a local HTTP program answer, which is written in any language.

    Each request has a connection of its own. One that is kept may be closed by the program just when the
    next request comes, and nobody could tell whether that one was run: sending it again may run it twice.
    """

    def __init__(self, url: str) -> None:
        """Raises ValueError if `url` is not like `http://localhost:3000`."""
        self.address = parse_forward(url)
        self._lock = threading.Lock()
        self._is_unreachable = False

    def answer(self, exchange: Exchange) -> Ending:
        response = Response(exchange)
        response.run(functools.partial(self._serve, response))
        return response.settle()

    def _serve(
        self, response: Response, _environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterator[bytes]:
        """Serve one request as an app would: pass it on, and yield the body of what the program answers."""
        with self._open() as sock:
            connection = LocalConnection(sock, response.exchange, make_local_head(response.request))
            intake = Intake(connection, failure_type=LocalError)
            head = take_local_head(intake)
            start_response(head.status, head.fields)
            if not response.has_body:
                return
            if intake.is_empty:
                response.send_head()
            if head.is_chunked or head.length is not None:
                body = ChunkedBody(intake) if head.is_chunked else FixedBody(intake, head.length or 0)
                while data := body.read(RECEIVE_BYTES):
                    yield data
            else:
                while data := intake.take_received() or connection.recv(RECEIVE_BYTES):
                    yield data

    def _open(self) -> socket.socket:
        """Return a new connection. Raises LocalUnreachable."""
        try:
            sock = socket.create_connection(self.address, CONNECT_TIMEOUT_S)
            if sock.getsockname() == sock.getpeername():  # nobody listens, and TCP met itself
                sock.close()
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        except OSError as exc:
            self._report(exc)
            raise LocalUnreachable(str(exc)) from None
        self._report(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return own(sock)

    def _report(self, failure: OSError | None) -> None:
        with self._lock:
            was_unreachable, self._is_unreachable = self._is_unreachable, failure is not None
        if failure and not was_unreachable:
            log.warning("http://%s unreachable, answering 502: %s", self.address, failure.strerror or failure)
        elif was_unreachable and not failure:
            log.info("http://%s reached again", self.address)


class Upload:
    """A request's body on its way from the hub to somebody here, framed as it was; it never waits.

    It holds one piece, and takes the next one when that has been sent.
    """

    def __init__(self, exchange: Exchange | None, sock: socket.socket, head: bytes = b"") -> None:
        self._exchange = exchange
        self._sock = sock
        self.is_taken = exchange is None or exchange.body is None  # all of it, from the hub
        self.unsent = memoryview(head)

    @property
    def wants_more(self) -> bool:
        return not (self.unsent or self.is_taken)

    def take(self) -> None:
        """Take what has come, be it only a part of a chunk's framing. Raises BodyError."""
        assert self._exchange is not None and self._exchange.body is not None
        body = self._exchange.body
        try:
            with self._exchange.link.time_limit(0):
                data = body.read(RECEIVE_BYTES) or b""
        except BlockingIOError:
            return
        self.is_taken = not body.has_rest()
        if self._exchange.head.is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data += b"0\r\n\r\n" if self.is_taken else b""
        self.unsent = memoryview(data)

    def send(self) -> None:
        """Send as much as is taken."""
        try:
            self.unsent = self.unsent[self._sock.send(self.unsent, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return
        except OSError:  # it has closed; perhaps its response is there all the same
            self.drop()

    def drop(self) -> None:
        """Nobody wants the rest."""
        self.is_taken = True
        self.unsent = memoryview(b"")


class LocalConnection:
    """A connection to the local program, as a source of bytes.

    While it waits for them, it sends the request. So both bodies flow at the same time without a second
    thread, and neither end has to take one before it gets the other. It is cut when the consumer leaves.
    """

    HANG_UP = getattr(select, "POLLRDHUP", 0)

    def __init__(self, sock: socket.socket, exchange: Exchange, head: bytes) -> None:
        self.sock = sock
        self._exchange = exchange
        exchange.when_cancelled(functools.partial(cut_off, sock))
        self._upload = Upload(exchange, sock, head)

    def recv(self, size: int, /) -> bytes:
        data = bytearray(size)
        return bytes(memoryview(data)[: self.recv_into(memoryview(data))])

    def recv_into(self, target: memoryview, /) -> int:
        self._wait()
        try:
            return self.sock.recv_into(target)
        except OSError as exc:
            raise LocalError(exc.strerror or str(exc)) from None

    def _wait(self) -> None:
        """Send what can be sent until there is something to receive. Raises ConsumerGone, BodyError."""
        hub, local, upload = self._exchange.link.fileno(), self.sock.fileno(), self._upload
        while True:
            if upload.wants_more:
                upload.take()  # first, since the hub's socket need not tell of all that is there
            poller = select.poll()
            poller.register(local, select.POLLIN | (select.POLLOUT if upload.unsent else 0))
            if upload.wants_more:
                poller.register(hub, select.POLLIN | self.HANG_UP)
            events = dict(poller.poll())
            if self._exchange.cancelled.is_set() or events.get(hub, 0) & ~select.POLLIN:
                raise ConsumerGone
            if upload.unsent and events.get(local, 0) & select.POLLOUT:
                upload.send()
            if events.get(local, 0) & ~select.POLLOUT:
                return


# ---- Side ports: where others than the hub come ------------------------------------------------------


def last_head(status: str, *fields: str) -> bytes:
    """Return the head of a response that ends its connection."""
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "Connection: close", "", ""]).encode("latin-1")


def plain_answer(status: str, *fields: str, text: str = "", is_head: bool = False) -> bytes:
    """Return a whole response that ends its connection."""
    body = (text or f"{status}\n").encode("latin-1")
    head = last_head(status, *fields, "Content-Type: text/plain", f"Content-Length: {len(body)}")
    return head if is_head else head + body


def plain_address(host: object) -> str:
    """Return an IPv4 address that a socket of both kinds shows as one of IPv6 in its usual form."""
    return str(host).removeprefix("::ffff:")


class Page(NamedTuple):
    body: bytes | Iterable[bytes]  # several pieces are sent as they come
    status: str = "200 OK"
    content_type: str = "text/plain; charset=utf-8"


PageMaker = Callable[[socket.socket], Page]


class Visitor(BaseHTTPRequestHandler):
    """Who comes to a side port with one request, which is understood strictly, and for the port to answer."""

    server: SidePort
    command = ""  # until its head is known

    def setup(self) -> None:
        super().setup()
        self.address = plain_address(self.client_address[0])
        self._deadline = time.monotonic() + SIDE_HEAD_TIMEOUT_S
        self.transport: Transport = PlainTransport(self.connection)
        if self.server.tls:
            self.transport = TlsTransport(self.connection, self.server.tls.context(), None)

    def recv(self, size: int, /) -> bytes:
        """Receive some of the head. Raises TimeoutError, at last when all of it took too long."""
        self.transport.limit_time(max(0.001, self._deadline - time.monotonic()))
        return self.transport.recv(size)

    def recv_into(self, target: memoryview, /) -> int:
        raise NotImplementedError  # there are no bodies

    def handle(self) -> None:
        intake = Intake(self)
        try:
            if isinstance(self.transport, TlsTransport):
                self.transport.wait_for_hands(SIDE_HEAD_TIMEOUT_S)
            data = intake.take_wary_head(SIDE_HEAD_BYTES)
            head = None if data is None else parse_head(data, may_be_old=True)
        except TimeoutError:
            if not intake.is_empty:
                self.answer("408 Request Timeout")
        except HeadTooLong:
            self.answer("431 Request Header Fields Too Large")
        except ProtocolError as exc:
            log.warning("%s: not a request from %s: %s", self.server.name, self.address, exc)
            self.answer("400 Bad Request")
        else:
            if head:
                self._on_head(head)

    def _on_head(self, head: RequestHead) -> None:
        self.command = head.method
        self.transport.limit_time(SIDE_SEND_TIMEOUT_S)
        if head.method in ("GET", "HEAD"):
            self.server.show(self, head)
        else:
            self.answer("405 Method Not Allowed", "Allow: GET, HEAD")

    def answer(self, status: str, *fields: str, text: str = "") -> None:
        self.transport.send(plain_answer(status, *fields, text=text, is_head=self.command == "HEAD"))

    def show(self, page: Page, is_old: bool) -> None:
        """Send a page, in chunks if it comes in pieces and the visitor knows these."""
        pieces = [page.body] if isinstance(page.body, bytes) else page.body
        is_chunked = pieces is page.body and not is_old
        fields = [f"Content-Type: {page.content_type}", "Cache-Control: no-store"]
        if is_chunked:
            fields.append("Transfer-Encoding: chunked")
        elif isinstance(page.body, bytes):
            fields.append(f"Content-Length: {len(page.body)}")
        self.transport.send(last_head(page.status, *fields))
        if self.command == "HEAD":
            return
        for piece in pieces:
            self.transport.send(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        self.transport.send(b"0\r\n\r\n" if is_chunked else b"")

    def take_over(self) -> Transport:
        """Return the connection, which is not the port's any longer."""
        sock = own(socket.socket(fileno=self.connection.detach()))
        if not isinstance(self.transport, TlsTransport):
            return PlainTransport(sock)
        self.transport.sock = sock
        self.transport.limit_time(None)
        return self.transport

    def finish(self) -> None:
        super().finish()
        if self.connection.fileno() >= 0:
            self.transport.say_goodbye()
            close_gently(self.connection)


class SidePort(ThreadingHTTPServer):
    """A port at which others than the hub come, each with one request and for a thread of its own.

    Those that have not said yet what they want, or are being closed, are bounded in number: for another one
    the oldest is cut off. What is answered is for subclasses to say.
    """

    def __init__(
        self, name: str, port: int, host: str | None = None, interval_s: float = SIDE_INTERVAL_S
    ) -> None:
        """Listen at `host`, or else at all addresses. `start` begins to answer. Raises OSError."""
        super().__init__((host or "", port), Visitor, bind_and_activate=False)
        self.socket.close()  # it is for one kind of address only, and binding it would look up its name
        self.socket = own(socket.create_server((host, port)) if host else listen_everywhere(port))
        self.socket.setblocking(False)
        self.name = name
        self.tls: TlsFiles | None = None
        self.port = int(self.socket.getsockname()[1])
        self._host = host or "*"
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._waiting: dict[socket.socket, None] = {}  # the oldest first
        self._has_started = False

    def start(self) -> None:
        log.info("listening %s=%s:%d", self.name, self._host, self.port)
        start_thread(functools.partial(self.serve_forever, self._interval_s), self.name)
        self._has_started = True

    def close(self) -> None:
        """Accept nobody any longer, and cut off who waits. May be called again."""
        if self._has_started:
            cut_off(self.socket)  # nobody else wakes the port's thread
            self.shutdown()
        self.server_close()
        with self._lock:
            for sock in self._waiting:
                cut_off(sock)

    # -- for subclasses

    def show(self, visitor: Visitor, head: RequestHead) -> None:
        """Answer a GET or HEAD, in the visitor's thread."""
        raise NotImplementedError

    # -- the port's thread

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            sock, address = self.socket.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._cannot_accept(exc)
                time.sleep(ACCEPT_PAUSE_S)
            raise
        return own(sock), address

    def _cannot_accept(self, reason: OSError) -> None:
        log.warning("%s: cannot accept a connection: %s", self.name, reason.strerror)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._waiting) >= SIDE_VISITORS:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                cut_off(oldest)
            self._waiting[request] = None
        try:
            visit = functools.partial(self.process_request_thread, request, client_address)
            start_thread(visit, f"{self.name}-visitor")
        except OSError as exc:
            self._cannot_accept(exc)
            with contextlib.suppress(OSError):
                request.send(plain_answer("503 Service Unavailable"))
            close_gently(request)
            self.shutdown_request(request)

    # -- the visitors' threads

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            log.debug("%s: visitor lost: %s", self.name, sys.exc_info()[1])
        else:
            log.exception("a fault of the worker itself")

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._waiting.pop(request, None)
        super().shutdown_request(request)


class PagePort(SidePort):
    """Shows pages about the worker, a bounded number of each at the same time."""

    def __init__(self, name: str, port: int, host: str | None = None) -> None:
        """Set `pages`, by path, before `start`. Raises OSError."""
        super().__init__(name, port, host)
        self.pages: Mapping[str, PageMaker] = {}
        self._visits: dict[threading.Thread, str] = {}  # and the path of each
        self._crowded: set[str] = set()  # paths whose limit has been told

    def show(self, visitor: Visitor, head: RequestHead) -> None:
        path = head.target.partition("?")[0]
        if path not in self.pages:
            visitor.answer("404 Not Found", text=f"There is only {', '.join(self.pages)} here.\n")
        elif not self._let_in(visitor, path):
            visitor.answer("503 Service Unavailable")
        else:
            try:
                visitor.show(self.pages[path](visitor.connection), head.is_old)
            finally:
                with self._lock:
                    del self._visits[threading.current_thread()]

    def _let_in(self, visitor: Visitor, path: str) -> bool:
        """Return whether there is room for this one, who is not cut off for others from now on."""
        with self._lock:
            is_crowded = list(self._visits.values()).count(path) >= PAGE_VISITS
            if is_crowded and path not in self._crowded:
                log.warning("%s: too many visitors at a time of %s", self.name, path)
            if is_crowded:
                self._crowded.add(path)
            else:
                self._crowded.discard(path)
                self._waiting.pop(visitor.connection, None)
                self._visits[threading.current_thread()] = path
            return not is_crowded

    def close(self) -> None:
        """End, after a moment for the pages that are under way."""
        super().close()
        ends_at = time.monotonic() + SIDE_GRACE_S
        for visit in list(self._visits):
            visit.join(max(0.0, ends_at - time.monotonic()))


def listen_everywhere(port: int) -> socket.socket:
    """Listen at every address of the machine, of both kinds where there are both. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # perhaps it is switched off
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


# ---- Responses that do not pass the hub --------------------------------------------------------------


def without_chunks(head: bytes) -> bytes:
    """Return the head of a response as HTTP/1.0 has it: without chunks, the body ends with its connection."""
    return head.replace(CHUNKED, b"\r\n")


class PickupPort(SidePort):
    """Where consumers come for redirected responses.

    A key is good for one GET. Whoever comes with it is handed, as a connection, to the slot that makes the
    response.
    """

    def __init__(
        self,
        port: int,
        host: str | None = None,
        expiry_s: float = PICKUP_EXPIRY_S,
        interval_s: float = SIDE_INTERVAL_S,
        url: str | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """Listen at all addresses; `host` is what consumers are told instead of ours, or all of `url`.

        With `tls` the port speaks HTTPS. Raises OSError.
        """
        super().__init__("redirects", port, interval_s=interval_s)
        self.tls = tls
        self.expiry_s = expiry_s
        self._url = url
        self._public_host = host
        self._pickups: dict[str, Pickup] = {}  # by key

    # -- for the slots

    def offer(self, pickup: Pickup) -> str:
        """Keep a response for its consumer; return the key. The port's thread tells it what comes of it."""
        key = secrets.token_urlsafe(32)
        with self._lock:
            self._pickups[key] = pickup
        return key

    def withdraw(self, key: str) -> None:
        """Forget a key; nothing is told of it once this has returned."""
        with self._lock:
            self._pickups.pop(key, None)

    def location(self, key: str, hub: Link) -> str:
        """Return the address for the consumer: this end of the hub's connection, unless told otherwise."""
        if self._url:
            return self._url + key
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{Address(self._public_host or hub.own_host, self.port)}/{key}"

    # -- for consumers

    def show(self, visitor: Visitor, head: RequestHead) -> None:
        key = head.target.rpartition("/")[2] if self._url else head.target[1:]
        with self._lock:
            pickup = self._pickups.get(key)
            if pickup and pickup.expires_at <= time.monotonic():
                pickup = None
            if pickup and head.method == "GET":
                del self._pickups[key]
                pickup.on_claim(visitor.take_over(), head.is_old)
        if pickup is None:
            log.warning("redirects: unknown, used or expired key from %s", visitor.address)
            visitor.answer("410 Gone", "Cache-Control: no-store")
        elif head.method == "HEAD":
            visitor.transport.send(without_chunks(pickup.head) if head.is_old else pickup.head)

    def service_actions(self) -> None:
        """See to what is overdue. Called after each visitor and after each interval."""
        now = time.monotonic()
        with self._lock:
            overdue = [key for key, pickup in self._pickups.items() if pickup.expires_at <= now]
            for key in overdue:
                self._pickups.pop(key).on_expiry()


class SeparableBody(RequestBody):
    """A body whose rest can be fetched into a file, so that the app reads on without the connection.

    A thread of the app may read at the same time, hence the lock.
    """

    def __init__(self, body: RequestBody) -> None:
        self._body = body
        self._fetched: io.BufferedRandom | None = None
        self._lock = threading.Lock()

    def left_bytes(self) -> float:
        return self._body.left_bytes()

    def has_rest(self) -> bool:
        return bool(self._fetched.peek(1)) if self._fetched else super().has_rest()

    def readinto(self, buffer: WriteableBuffer) -> int:
        with self._lock:
            return self._fetched.readinto(buffer) if self._fetched else self._body.readinto(buffer) or 0

    def fetch(self) -> None:
        """Take all that is still to come. Raises BodyError."""
        with self._lock:
            if self._fetched or not self._body.left_bytes():
                return
            fetched = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the body
            self._fetched = fetched
            while data := self._body.read(RECEIVE_BYTES):
                fetched.write(data)
            fetched.seek(0)

    def close(self) -> None:
        if self._fetched:
            self._fetched.close()
        super().close()


class Pickup:
    """A response that its consumer comes for: the hub is told where, and gets nothing of it.

    The connection to the hub ends with the 303, since an open one would offer a slot that is still taken.
    """

    def __init__(
        self,
        port: PickupPort,
        exchange: Exchange,
        lobby: Lobby,
        on_arrival: Callable[[Link], object],
    ) -> None:
        """The port's thread calls `on_arrival`, which may not wait, or cancels the exchange."""
        self._port = port
        self._lobby = lobby
        self._exchange = exchange
        self._on_arrival = on_arrival
        self._key = ""
        self.head = b""
        self.expires_at = math.inf

    def offer(self, head: bytes) -> None:
        """Offer the response that begins with `head`, and tell the consumer; if it has gone, cancel."""
        hub = self._exchange.link
        hub.disregard()
        if hub.is_gone:
            self._exchange.cancel()
            return
        self.head, self.expires_at = head, time.monotonic() + self._port.expiry_s
        self._key = self._port.offer(self)
        fields = [
            f"Location: {self._port.location(self._key, hub)}",
            "Cache-Control: no-store",
            "Content-Length: 0",
            f"Date: {http_date(int(time.time()))}",
        ]
        try:
            hub.send(last_head("303 See Other", *fields))
            hub.finish_sending()  # there is nothing unread, so nothing can destroy the 303
        except OSError:
            self._exchange.cancel()

    def on_claim(self, transport: Transport, is_old: bool) -> None:
        """The consumer has come. Called by the port's thread."""
        sock = transport.sock
        with contextlib.suppress(OSError):
            set_options(sock)
            if is_old:  # only a reset tells it that the body was cut off
                set_reset_on_close(sock, True)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_S * 1000)
        self._exchange.consumer = consumer = Link(transport, is_old=is_old)
        consumer.when_gone(self._exchange.cancel)
        # It may only have closed its sending direction; a send that waits for it to read ends so.
        self._exchange.when_cancelled(consumer.cut)
        self._lobby.order(self._lobby.watch, consumer)
        self._on_arrival(consumer)

    def on_expiry(self) -> None:
        """Nobody has come. Called by the port's thread."""
        self._exchange.cancel(f"nobody came for the response within {self._port.expiry_s:g} s")

    def close(self, ending: Ending) -> Ending:
        """See to the consumer's connection after the response; return how that to the hub may go on."""
        if not self._key:
            return ending
        self._port.withdraw(self._key)
        consumer = self._exchange.consumer
        if consumer:
            consumer.end(ending)
            self._lobby.order(self._lobby.dismiss, consumer)
        return Ending.CUT if ending is Ending.CUT else Ending.CLOSE


class DetouringServer:
    """Has another server answer, and the consumers of its `200` responses come to the pickup port."""

    def __init__(self, server: Server, port: PickupPort, lobby: Lobby) -> None:
        self._server = server
        self._port = port
        self._lobby = lobby

    def answer(self, exchange: Exchange) -> Ending:
        is_settled = threading.Event()  # the consumer has come, or will not
        pickup = Pickup(self._port, exchange, self._lobby, lambda _consumer: is_settled.set())
        exchange.when_cancelled(is_settled.set)

        def detour(head: bytes) -> Link:
            pickup.offer(head)
            is_settled.wait()
            if exchange.consumer is None:
                raise ConsumerGone
            return exchange.consumer

        exchange.redirect(detour)
        ending = self._server.answer(exchange)
        if exchange.body:
            exchange.body.close()
        return pickup.close(ending)


# ---- A process for each request: the worker's side ---------------------------------------------------

FORK_SERVER = "fork-server"  # as the first argument of this module: be one

DRAINING = b"D"  # what a request's process is told on its channel after the request
PICKED_UP = b"P"  # comes together with the consumer's connection,
PICKED_UP_BY_OLD = b"O"  # as does this, if it speaks HTTP/1.0


class Order(TypedDict):
    """What a request's process is told before the request."""

    hub: str  # its address
    environ: dict[str, object]  # what else the app shall find there
    callbacks: list[str]  # names of functions that it shall find there, too
    is_last: bool  # on this connection
    holds: bool  # its response does, the connection
    may_redirect: bool


class Channel:
    """What a process tells the worker, and is told: the request first, then a byte now and then.

    Each message to the worker is a line of JSON, and any thread may send one. Writing stops with the worker's
    interest: who is about to be killed need not be told.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()  # of what is told
        self._is_draining = False
        self.consumer: Link | None = None  # if it has come itself

    def tell(self, **message: object) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self.sock.sendall(line)

    def take_request(self) -> tuple[Order, bytes]:
        """Return what is to be done, and all that has come of the request. Raises EOFError."""
        lengths = self._take_exactly(16)
        order: Order = json.loads(self._take_exactly(int(lengths[:8], 16)))
        return order, self._take_exactly(int(lengths[8:], 16))

    def _take_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def is_draining(self) -> bool:
        while not self._is_draining and self._take(is_patient=False):
            pass
        return self._is_draining

    def wait_for_consumer(self) -> Link:
        """Return the consumer's own connection. Raises ConsumerGone when the worker gives up."""
        while self.consumer is None and self._take(is_patient=True):
            pass
        if self.consumer is None:
            raise ConsumerGone
        return self.consumer

    def _take(self, is_patient: bool) -> bool:
        """Take one byte; False if there is none, for now or for ever."""
        try:
            told, fds = receive_with_fds(self.sock, 0 if is_patient else socket.MSG_DONTWAIT)
        except OSError:
            return False
        if told in (PICKED_UP, PICKED_UP_BY_OLD) and fds:
            sock = own(socket.socket(fileno=fds[0]))
            self.consumer = Link(PlainTransport(sock), is_old=told == PICKED_UP_BY_OLD)
        self._is_draining = self._is_draining or told == DRAINING
        return bool(told)


class ForkServer:
    """Starts the process that has imported the app and forks one for each request; starts another if it dies.

    It is started as a program, since a fork of a process with threads may inherit a lock that nobody will
    ever release, and the worker has threads by the time that it must be started again.
    """

    def __init__(
        self,
        app: str | None,
        on_process_end: Callable[[int], object] = lambda pid: None,
        log_format: str = "text",
    ) -> None:
        """`app` is MODULE:APP, or None for the demo. `on_process_end` is called with each ended one's pid."""
        self.on_process_end = on_process_end
        self._log_format = log_format
        self._app = app
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None  # None while there is no fork server that is ready
        self._processes: set[RequestProcess] = set()
        self._failed_starts = 0
        self._is_closing = False
        self._keeper: threading.Thread | None = None

    @staticmethod
    def is_supported() -> bool:
        return hasattr(socket, "send_fds") and hasattr(select, "POLLRDHUP") and hasattr(os, "waitid")

    def start(self) -> None:
        """Return when the app is imported. Raises LoadError."""
        self._launch()
        self._keeper = start_thread(self._keep, "fork-server")

    def fork(self, process: RequestProcess, control: socket.socket, connection: Link | socket.socket) -> None:
        """Have a process made that owns a copy of the connection and the other end of the control channel.

        Waits while another fork server is started. Raises ConnectionError if there is none.
        """
        with self._changed:
            failed_starts = self._failed_starts
            while self._orders is None:
                if self._is_closing or self._failed_starts != failed_starts or process.is_unwanted():
                    raise ConnectionError("there is no fork server")
                self._changed.wait(PEEK_INTERVAL_S)
            try:
                socket.send_fds(self._orders, [b"F"], [connection.fileno(), control.fileno()])
            except OSError as exc:
                raise ConnectionError("the fork server has just died") from exc
            self._processes.add(process)

    def on_end(self, process: RequestProcess) -> None:
        with self._changed:
            self._processes.discard(process)
        if process.pid is not None:
            self.on_process_end(process.pid)

    def close(self) -> None:
        """End the fork server and every process that it made."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            if self._orders is not None:
                with contextlib.suppress(OSError):
                    self._orders.shutdown(socket.SHUT_RDWR)
            elif self._process is not None:
                self._process.kill()
        if self._keeper:
            self._keeper.join()

    def _launch(self) -> None:
        """Start a fork server. Raises LoadError."""
        orders, theirs = own_pair()
        try:
            with theirs:
                self._process = process = self._spawn(theirs)
            self._have_it_import(orders, process)
        except BaseException:
            orders.close()
            raise
        with self._changed:
            self._orders = orders
            if self._is_closing:
                orders.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
        if getattr(sys.stdout, "write_through", False):
            flags.append("-u")
        fd = theirs.fileno()
        try:
            return subprocess.Popen(
                [sys.executable, *flags, os.path.abspath(__file__), FORK_SERVER, str(fd)], pass_fds=[fd]
            )
        except OSError as exc:
            raise LoadError(f"cannot start the fork server: {exc}") from None

    def _have_it_import(self, orders: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Return when the app is imported. Raises LoadError; the process has ended then."""
        order = {
            "app": self._app,
            "path": sys.path,
            "arguments": sys.argv,
            "level": log.getEffectiveLevel(),
            "log_format": self._log_format,
        }
        try:
            answer = ask_fork_server(orders, order)
            if answer is None:
                ending = describe_ending(process.wait())
                raise LoadError(f"cannot load {self._app!r}: importing it ended the process: it {ending}")
            if "failure" in answer:
                process.wait()
                raise LoadError(str(answer["failure"]), str(answer["trace"]))
        except BaseException:
            process.kill()
            process.wait()
            raise
        if answer.get("threads"):
            log.warning(
                "importing the app started threads, which the requests' processes will not have: %s",
                answer["threads"],
            )

    def _keep(self) -> None:
        """Wait for the fork server to die, and start another, until it is closed."""
        while self._orders is not None:
            ending = self._wait_for_end(self._orders)
            if not self._is_closing:
                log.error("the fork server %s; its requests are cut off, and another one is started", ending)
            backoff = Backoff()
            while self._orders is None and not self._is_closing:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closing, backoff.next_wait_s())
                if not self._is_closing:
                    self._try_to_launch()

    def _try_to_launch(self) -> None:
        try:
            self._launch()
        except LoadError as exc:
            if not self._is_closing:
                log.error("cannot start another fork server: %s", "\n".join([str(exc), exc.trace]).rstrip())
            with self._changed:
                self._failed_starts += 1
                self._changed.notify_all()
        else:
            log.info("another fork server is ready")

    def _wait_for_end(self, orders: socket.socket) -> str:
        """Return how the fork server ended, once it has, and every request that it held was cut off."""
        assert self._process is not None
        with contextlib.suppress(OSError):
            orders.recv(1)  # it never says anything
        try:
            status = self._process.wait(FORK_SERVER_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        with self._changed:
            orders.close()
            self._orders = None
            processes = list(self._processes)
        for process in processes:
            process.on_fork_server_lost()
        return describe_ending(status)


def ask_fork_server(orders: socket.socket, order: Mapping[str, object]) -> dict[str, object] | None:
    """Return its answer, or None if it ended without one."""
    try:
        orders.sendall(json.dumps(order).encode() + b"\n")
        with orders.makefile("rb") as file:
            line = file.readline()
    except ConnectionError:
        return None
    answer: dict[str, object] | None = json.loads(line) if line.endswith(b"\n") else None
    return answer


def describe_ending(status: int) -> str:
    """Return words for an exit status, or for a signal, which is a negative one."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


class Relay:
    """Moves bytes between a link over TLS, whose keys stay here, and the process of its request.

    It holds one piece each way, so whoever reads slowly slows the other down. Of what the hub sends it takes
    the request's body only: the next request may follow while the process ends.
    """

    def __init__(self, link: Link, transport: TlsTransport, exchange: Exchange | None) -> None:
        """Without an exchange, nothing is moved to the process. Raises OSError."""
        self._link = link
        self._transport = transport
        self._ours, self.theirs = own_pair()
        self._upload = Upload(exchange, self._ours)
        self._has_rest = False  # of a piece, for the other end of the link
        self._is_drained = False  # the process sends nothing more
        self.is_broken = False  # that end takes nothing more

    @property
    def has_all_of_body(self) -> bool:
        return self._upload.is_taken

    @property
    def is_complete(self) -> bool:
        """Whether the other end has all that the process has sent."""
        return self._is_drained and not self._has_rest and not self.is_broken

    @property
    def is_done(self) -> bool:
        return self.is_broken or self.is_complete

    def register(self, poller: select.poll) -> None:
        """Have the poller return when something can go on."""
        upload, may_receive = self._upload, not (self._has_rest or self._is_drained or self.is_broken)
        of_process = (select.POLLIN if may_receive else 0) | (select.POLLOUT if upload.unsent else 0)
        of_hub = (select.POLLIN if upload.wants_more else 0) | (select.POLLOUT if self._has_rest else 0)
        for fd, events in ((self._ours.fileno(), of_process), (self._link.fileno(), of_hub)):
            if events:
                poller.register(fd, events)
            else:  # else a hang-up would wake it without end
                with contextlib.suppress(KeyError):
                    poller.unregister(fd)

    def has_news(self) -> bool:
        """Return whether the hub has sent more that can be moved, of which its socket need not tell."""
        return self._upload.wants_more and self._link.has_news()

    def turn(self, has_ended: bool = False) -> None:
        """Move a piece each way, if it can be moved. With its process ended, what there is is the rest."""
        self._move_up()
        if self.is_done:
            return
        try:
            if self._has_rest:
                self._has_rest = not self._transport.send_rest()
            else:
                self._move_down(has_ended)
        except OSError:
            self._break()

    def _move_up(self) -> None:
        if self._upload.wants_more:
            try:
                self._upload.take()
            except OSError:  # it is cut short, or broken: the process will find out the same way
                self._upload.drop()
                with contextlib.suppress(OSError):
                    self._ours.shutdown(socket.SHUT_WR)
        if self._upload.unsent:
            self._upload.send()

    def _move_down(self, has_ended: bool) -> None:
        try:
            data = self._ours.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._is_drained = has_ended
            return
        except ConnectionResetError:  # it has not read all of the body
            data = b""
        self._is_drained = not data
        self._has_rest = bool(data) and not self._transport.try_to_send(data)

    def _break(self) -> None:
        self.is_broken, self._has_rest = True, False
        self._upload.drop()
        cut_off(self._ours)  # so that the process notices, too

    def close(self) -> None:
        self._ours.close()


class RequestProcess:
    """A request's process, as the worker sees it.

    Everything is said over one socket pair. The process tells what it does, and the fork server has the last
    word when it has ended. The worker tells both of them at once that it is to end, by closing its sending
    direction: the app is told so by `pothead.cancelled`, and what is left a moment later is killed.
    """

    def __init__(self, exchange: Exchange, timeout_s: float) -> None:
        self.pid: int | None = None
        self.has_responded = False  # is set before the first byte of the response is sent
        self.report: dict[str, object] | None = None  # how the response ended, as the process tells it
        self.reason = ""  # why it was told to end, if it was
        self.is_overdue = False
        self.failure = ""  # how it ended, if not as it should
        self._exchange = exchange
        self._callbacks: dict[str, Callable[..., object]] = {}
        self.pickup: Pickup | None = None  # if the response may be redirected
        self._control, self._other_end = own_pair()
        self._lock = threading.Lock()
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._has_ended = False
        self._relays: list[Relay] = []  # the hub's first, and perhaps the consumer's

    def is_unwanted(self) -> bool:
        """Return whether it was told to end, for instance just now."""
        self._check_deadline()
        return bool(self.reason)

    def _check_deadline(self) -> None:
        if time.monotonic() >= self._deadline:
            self._deadline = math.inf
            self.is_overdue = True
            self.cancel(f"stopped after the request timeout of {self._timeout_s:g} s")

    def run(self, fork_server: ForkServer, halt: Halt) -> Ending:
        """Have the request served; return when its process has ended."""
        exchange = self._exchange
        environ = self._ask_gate()
        order: Order = {
            "hub": exchange.link.host,
            "environ": environ,
            "callbacks": list(self._callbacks),
            "is_last": exchange.keeper.is_last(),
            "holds": exchange.keeper.must_hold(is_early=True),
            "may_redirect": self.pickup is not None,
        }
        with self._control, contextlib.closing(self):
            try:
                with self._other_end, self._lend(exchange.link, exchange) as connection:
                    fork_server.fork(self, self._other_end, connection)
            except OSError as exc:
                self.failure = f"could not be started: {exc.strerror or exc}"
                return self._end()
            received = exchange.data + b"\r\n"
            if not self._relays:
                received += exchange.link.intake.take_received()
            try:
                with contextlib.suppress(OSError):
                    text = json.dumps(order).encode()
                    self._control.sendall(b"%08x%08x" % (len(text), len(received)) + text + received)
                self._follow(halt)
            finally:
                fork_server.on_end(self)
            return self._end()

    @contextlib.contextmanager
    def _lend(self, link: Link, exchange: Exchange | None = None) -> Iterator[Link | socket.socket]:
        """Yield what another process can have of a link: itself, or the end of a relay that is kept moving.

        Raises OSError.
        """
        if not isinstance(link.transport, TlsTransport):
            yield link
            return
        relay = Relay(link, link.transport, exchange)
        self._relays.append(relay)
        with relay.theirs:
            yield relay.theirs

    def close(self) -> None:
        for relay in self._relays:
            relay.close()

    def _ask_gate(self) -> dict[str, object]:
        """Return what the gate puts into the environ, as far as it can be told to another process.

        For a function, the app finds a stand-in, which returns nothing and whose arguments are JSON.
        """
        environ = build_environ(self._exchange.head, self._exchange.link.host)
        known = set(environ)
        self._exchange.keeper.on_environ(environ)
        added = {name: value for name, value in environ.items() if name not in known}
        self._callbacks = {name: value for name, value in added.items() if callable(value)}
        return {name: value for name, value in added.items() if isinstance(value, (str, int, float))}

    def _end(self) -> Ending:
        """See to the connection once the process has ended."""
        keeper, link = self._exchange.keeper, self._exchange.link
        ending = Ending[str(self.report["ending"])] if self.report else Ending.CUT
        if ending is Ending.CUT or self.failure:
            self._log_ending()
        if self.failure and not self.has_responded and not self.reason:
            keeper.on_status(LOST_STATUS)
        if self.is_overdue and not self.has_responded:
            keeper.on_status("504")
            text = error_text("504 Gateway Timeout", self._exchange.request_id, self.reason)
            with contextlib.suppress(OSError):
                link.send(plain_answer("504 Gateway Timeout", text=text))
            link.linger()
        if not all([relay.is_complete for relay in self._relays]):
            ending = Ending.CUT
        if self.pickup:
            ending = self.pickup.close(ending)
        if ending is not Ending.CUT and not all([relay.has_all_of_body for relay in self._relays]):
            link.linger()
            ending = Ending.CLOSE
        return Ending.CUT if self.failure else ending

    def _log_ending(self) -> None:
        request_id = self._exchange.request_id
        if self.reason:
            level = logging.WARNING if self.is_overdue else logging.INFO
            log.log(level, "request %s: %s", request_id, self.reason)
        elif self.failure:
            log.error("request %s: its process %s", request_id, self.failure)
        elif self.report and self.report.get("reason"):
            log.info("request %s: %s", request_id, self.report["reason"])

    # -- called by any thread

    def cancel(self, reason: str) -> None:
        with self._lock, contextlib.suppress(OSError):
            self.reason = self.reason or reason
            self._control.shutdown(socket.SHUT_WR)

    def deliver(self, consumer: Link) -> None:
        """Give the process the consumer's own connection."""
        order = PICKED_UP if consumer.may_chunk else PICKED_UP_BY_OLD
        with self._lock, contextlib.suppress(OSError), self._lend(consumer) as connection:
            socket.send_fds(self._control, [order], [connection.fileno()])

    def on_fork_server_lost(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    # -- following what it does

    def _follow(self, halt: Halt) -> None:
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(halt, select.POLLIN)
        received = b""
        while not self._has_ended:
            wait_ms = self._left_ms()
            for relay in list(self._relays):
                relay.turn()
                relay.register(poller)
                wait_ms = 0 if relay.has_news() else wait_ms
            for fd, _ in poller.poll(wait_ms):
                if fd == halt.fileno():
                    poller.unregister(halt)
                    self._tell_draining()
                elif fd == self._control.fileno():
                    data = self._receive()
                    *lines, received = (received + data).split(b"\n")
                    for line in lines:
                        self._on_line(line)
                    if not data:
                        self._on_silence()
            self._check_deadline()
        for relay in self._relays:
            self._move_rest(relay)

    def _move_rest(self, relay: Relay) -> None:
        """Move what the process has sent before it ended, as far as somebody wants it."""
        poller = select.poll()
        while not (relay.is_done or self.is_unwanted()):
            relay.turn(has_ended=True)
            relay.register(poller)
            if not relay.is_done:
                poller.poll(PEEK_INTERVAL_S * 1000)  # nothing else tells of a cancellation

    def _receive(self) -> bytes:
        try:
            return self._control.recv(RECEIVE_BYTES)
        except ConnectionResetError:  # it ended before it had read everything
            return b""

    def _left_ms(self) -> float:
        left_s = max(0.0, self._deadline - time.monotonic())
        return min(left_s, LONGEST_POLL_S) * 1000 + 1

    def _tell_draining(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._control.sendall(DRAINING)

    def _on_line(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:  # it died in the middle of a word
            return
        match message:
            case {"pid": pid}:
                self.pid = pid
            case {"status": status}:
                self.has_responded = True
                self._exchange.keeper.on_status(status)
            case {"log": record}:
                log.handle(logging.makeLogRecord(record))
            case {"call": name, "arguments": arguments, "keywords": keywords}:
                self._call_back(name, arguments, keywords)
            case {"offer": head}:
                assert self.pickup is not None
                self.pickup.offer(head.encode("latin-1"))
            case {"report": report}:
                self.report = report
            case {"ending": ending}:
                self._has_ended = True
                if ending != "ended with status 0":
                    self.failure = ending
                elif self.report is None:  # which is the last thing that it tells
                    self.failure = f"{ending} in the midst of its request"

    def _on_silence(self) -> None:
        """The channel is closed, and the fork server has not said how the process ended."""
        self._has_ended = True
        self.failure = "was cut off with the fork server"
        if self.pid is None:
            self.failure = "could not be started: the fork server has died, or can open no more files"
        else:
            # Its parent is dead, so it is dying, too; the group still holds its descendants. This may come
            # before `on_fork_server_lost`.
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)

    def _call_back(self, name: str, arguments: Sequence[object], keywords: Mapping[str, object]) -> None:
        """The app has called something that the worker had put into its environ."""
        try:
            with app_code():
                self._callbacks[name](*arguments, **keywords)
        except Exception:
            log.exception("%s failed", name)


class ProcessServer:
    """Has a process of its own answer each request, to which it gives the connection itself."""

    def __init__(
        self,
        fork_server: ForkServer,
        halt: Halt,
        timeout_s: float,
        port: PickupPort | None,
        lobby: Lobby,
    ) -> None:
        self._fork_server = fork_server
        self._halt = halt
        self._timeout_s = timeout_s
        self._port = port
        self._lobby = lobby

    def answer(self, exchange: Exchange) -> Ending:
        try:
            process = RequestProcess(exchange, self._timeout_s)
        except OSError as exc:  # too many open files
            reason = f"could not be started: {exc.strerror}"
            log.error("request %s: its process %s", exchange.request_id, reason)
            exchange.keeper.on_status(LOST_STATUS)
            return Ending.CUT
        if self._port:
            process.pickup = Pickup(self._port, exchange, self._lobby, process.deliver)
        exchange.when_cancelled(lambda: process.cancel(exchange.why_cancelled))
        return process.run(self._fork_server, self._halt)


# ---- A process for each request: the fork server -----------------------------------------------------

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
PR_SET_CHILD_SUBREAPER = 36


def load_prctl() -> Callable[[int, int], object]:
    """Return Linux's prctl, or a function that does nothing where it is missing."""
    try:
        import ctypes  # here, because a Python may have been built without it

        return ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return lambda option, value: None


def run_fork_server(fd: int) -> int:
    """Be the fork server at the other end of `fd`. Returns the exit status."""
    for number in Forker.SIGNALS:  # Ctrl-C reaches the whole group, but the worker decides
        take_signal(number, ignore_signal)
    ignore_hang_up()
    with own(socket.socket(fileno=fd)) as orders:
        orders.set_inheritable(False)
        with orders.makefile("rb") as file:
            order = json.loads(file.readline())
        sys.path[:], sys.argv[:] = order["path"], order["arguments"]
        configure_logging(order["level"], order["log_format"])
        try:
            app = load_app(order["app"]) if order["app"] else demo_app
        except LoadError as exc:
            Channel(orders).tell(failure=str(exc), trace=exc.trace)
            return 3
        flush_output()  # or each process would write it once more
        gc.collect()
        gc.freeze()  # or each process's first collection would copy the app's pages
        threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        forker = Forker(orders, app)
        Channel(orders).tell(threads=", ".join(threads))
        forker.run()
    leave_soon(0, lambda: time.sleep(EXIT_GRACE_S))
    return 0


def ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Unlike SIG_IGN, this is not inherited by the programs that an app starts."""


def ignore_hang_up() -> None:
    """Ignore SIGHUP in this process; in those it starts only if it has been told to (by `nohup`)."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        take_signal(signal.SIGHUP, ignore_signal)


class Forked(NamedTuple):
    """A process that serves a request, as the fork server sees it."""

    pid: int
    control: socket.socket


class Forker:
    """Forks, kills and reaps. One thread; the worker's orders come one at a time.

    It is a "subreaper", and so is each process that it makes: whatever a request leaves behind, even in
    another process group, is handed up to here in the end, and is killed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)

    def __init__(self, orders: socket.socket, app: WSGIApplication) -> None:
        self._orders = orders
        self._app = app
        self._prctl = load_prctl()
        self._prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._helpers = children_of_this_process()  # of the app, which began when it was imported
        self._forked: dict[int, Forked] = {}  # by the descriptor of `control`
        self._kill_at: dict[int, float] = {}  # by the same
        self._reader, self._writer = own_pair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        for number in self.SIGNALS:  # the app may have taken them
            take_signal(number, ignore_signal)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._poller = select.poll()
        self._poller.register(orders, select.POLLIN)
        self._poller.register(self._reader, select.POLLIN)

    def run(self) -> None:
        """Serve the worker until it closes its end or is gone; then kill whatever still runs."""
        is_over = False
        while not is_over:
            for fd, _ in self._poller.poll(self._wait_ms()):
                if fd == self._orders.fileno():
                    is_over = not self._obey()
                elif fd == self._reader.fileno():
                    self._reap()
                elif fd in self._forked and wait_ready(fd, select.POLLRDHUP, 0):  # not an earlier one
                    self._poller.unregister(fd)
                    self._kill_at[fd] = time.monotonic() + CANCEL_GRACE_S
            self._kill_overdue()
        self._kill_all()

    def _wait_ms(self) -> float | None:
        if not self._kill_at:
            return None
        return max(0.0, (min(self._kill_at.values()) - time.monotonic()) * 1000 + 1)

    # -- forking

    def _obey(self) -> bool:
        """Fork for the next request; False when the worker has gone."""
        order, fds = receive_with_fds(self._orders)
        if not order:
            return False
        if len(fds) == 2:
            connection, control = [socket.socket(fileno=fd) for fd in fds]
            control.settimeout(None)
            self._fork(connection, control)
        else:  # no descriptors left: the worker sees its channel close
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, connection: socket.socket, control: socket.socket) -> None:
        with connection:
            parent = os.getpid()
            try:
                with warnings.catch_warnings():
                    # Python warns of threads that the app has started. The worker has told so already.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
            except OSError as exc:
                Channel(control).tell(ending=f"could not be forked: {exc.strerror}")
                control.close()
                return
            if pid == 0:
                self._become_process(parent, connection, control)
        self._forked[control.fileno()] = Forked(pid, own(control))
        self._poller.register(control, select.POLLRDHUP)

    def _become_process(self, parent: int, connection: socket.socket, control: socket.socket) -> NoReturn:
        """Serve the request and end. Nothing of the fork server may run in this process."""
        try:
            os.setsid()
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            self._prctl(PR_SET_CHILD_SUBREAPER, 1)
            if os.getppid() != parent:
                os._exit(1)  # it died before it could take us with it
            serve_one_request(self._app, own(connection), Channel(control))
        except BaseException as exc:
            end_process(exc)
        end_process()

    # -- killing and reaping

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for fd in [fd for fd, kill_at in self._kill_at.items() if kill_at <= now]:
            del self._kill_at[fd]
            kill_group(self._forked[fd].pid)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        ended = []
        for fd, forked in list(self._forked.items()):
            if os.waitid(os.P_PID, forked.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                kill_group(forked.pid)  # before it is reaped, since until then its number is its own
                status = os.waitstatus_to_exitcode(os.waitpid(forked.pid, 0)[1])
                ended.append((fd, status))
        self._kill_strays()
        for fd, status in ended:
            self._kill_at.pop(fd, None)
            with contextlib.suppress(KeyError):  # it has been told to end
                self._poller.unregister(fd)
            with self._forked.pop(fd).control as control:
                control.setblocking(False)
                Channel(control).tell(ending=describe_ending(status))

    def _kill_strays(self) -> bool:
        """Kill what the ended processes have left behind; return whether there was anything.

        Each stray's death hands its children up to here and raises SIGCHLD, so that none escapes. What is of
        our own session was started here, by a thread of the app's import: each request's process began a
        session, and nothing comes back from there.
        """
        known = self._helpers | {forked.pid for forked in self._forked.values()}
        strays = {pid for pid in children_of_this_process() - known if not is_of_our_session(pid)}
        for pid in strays:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        return bool(strays)

    def _kill_all(self) -> None:
        ends_at = time.monotonic() + FORK_SERVER_EXIT_S / 3
        for forked in self._forked.values():
            kill_group(forked.pid)
        while (self._forked or self._kill_strays()) and time.monotonic() < ends_at:
            wait_ready(self._reader.fileno(), select.POLLIN, PEEK_INTERVAL_S)
            self._reap()
        for sock in (self._reader, self._writer):
            sock.close()


def receive_with_fds(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive one byte and the descriptors that came with it.

    `socket.recv_fds` does the same, but has a flaw in Python 3.10: it drops the flags.
    """
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(2 * 4), flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def is_of_our_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:
        return False


def kill_group(pid: int) -> None:
    """Kill a process and its group, if it has come to have one."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def children_of_this_process() -> set[int]:
    """Return the ids of all child processes, ended ones included; none where the system does not tell."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children", encoding="ascii") as file:
                found.update(int(pid) for pid in file.read().split())
    return found


# ---- A process for each request: the process ---------------------------------------------------------


class CancelledEvent(threading.Event):
    """Is set when the worker closes its end of the channel.

    It asks the kernel, since a thread that waits for that would make the process one that must not fork.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock

    def is_set(self) -> bool:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        if not super().is_set() and wait_ready(self._sock.fileno(), select.POLLRDHUP, timeout):
            self.set()
        return super().is_set()


class ForwardingLogHandler(logging.Handler):
    """Gives log records to the worker, which logs them as its own."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._channel.tell(
            log={
                "name": log.name,
                "msg": record.getMessage(),
                "levelno": record.levelno,
                "levelname": record.levelname,
                "created": record.created,
                "exc_text": trace,
            }
        )


class ProcessKeeper:
    """Has the one request of this process answered, and reports to the worker."""

    def __init__(self, server: Server, channel: Channel, order: Order) -> None:
        self.report: dict[str, object] = {}
        self._server = server
        self._channel = channel
        self._order = order
        self._has_answered = False

    def has_next(self, link: Link) -> bool:
        return not self._has_answered

    def answer(self, exchange: Exchange) -> Ending:
        self._has_answered = True
        exchange.cancelled = CancelledEvent(self._channel.sock)
        if self._order["may_redirect"]:
            exchange.redirect(self._detour)
        return self._server.answer(exchange)

    def is_last(self) -> bool:
        return self._order["is_last"] or self._channel.is_draining()

    def must_hold(self, is_early: bool = False) -> bool:
        return self._order["holds"]

    def on_environ(self, environ: WSGIEnvironment) -> None:
        environ.update(self._order["environ"])
        environ.update({name: functools.partial(self._call, name) for name in self._order["callbacks"]})

    def on_status(self, status: str) -> None:
        self._channel.tell(status=status)

    def on_consumer_gone(self, exchange: Exchange) -> None:
        self.report["reason"] = exchange.why_cancelled  # the worker may have noticed, too, and logs it once

    def on_response(self, status_line: str) -> None:
        """The worker has seen that it is a request."""

    def _detour(self, head: bytes) -> Link:
        self._channel.tell(offer=head.decode("latin-1"))
        consumer = self._channel.wait_for_consumer()
        self._channel.tell(picked_up=True)  # so that the worker wakes up: there may be a relay to keep moving
        return consumer

    def _call(self, name: str, /, *arguments: object, **keywords: object) -> None:
        """Have the worker call what it has put into the environ. Does not wait for it."""
        self._channel.tell(call=name, arguments=arguments, keywords=keywords)


def serve_one_request(app: WSGIApplication, connection: socket.socket, channel: Channel) -> None:
    """Serve the request that the worker sends; what goes wrong with it is reported, not raised."""
    channel.tell(pid=os.getpid())
    log.handlers = [ForwardingLogHandler(channel)]
    log.propagate = False
    Response.wsgi_multithread = False
    Response.wsgi_run_once = True
    with contextlib.suppress(EOFError, OSError):
        order, received = channel.take_request()
        link = Link(PlainTransport(connection), received)
        link.host = order["hub"]
        keeper = ProcessKeeper(AppServer(app), channel, order)
        ending = RequestHandler(link, keeper).ending
        if ending is Ending.KEEP and not link.intake.is_empty:
            ending = Ending.CLOSE  # somebody else cannot go on from here
        channel.tell(report={"ending": ending.name, **keeper.report})


# ---- Metrics -----------------------------------------------------------------------------------------


class Metrics:
    """Is told what happens; this one forgets it at once."""

    def on_slot(self, change: int) -> None:
        """A slot's connection was opened (1) or closed (-1)."""

    def on_request(self) -> None:
        """A request is handed to the app."""

    def on_response(self, status: str, seconds: float) -> None:
        """It was answered with this status after this time."""

    def on_gate(self, seconds: float) -> None:
        """The gate has let a job through after this time."""

    def merge_ended(self, pid: int) -> None:
        """Keep what a process of the app has counted, which has just ended."""


SECONDS_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)


class PrometheusMetrics(Metrics):
    """The metrics of the worker and of all processes of its app, which keep them in files.

    The files of processes that have ended are added up in files of their own, under the process id 0, which
    no process has: else there would be more and more of them, and each scrape would read them all.
    """

    MERGED_PID = 0

    def __init__(self, directory: str) -> None:
        """Empties the directory, so make it before anything makes a metric."""
        for path in glob.glob(os.path.join(glob.escape(directory), "*.db")):
            os.unlink(path)
        # Not before the directory is empty; by name, since a type checker may not have it.
        self._client = client = importlib.import_module("prometheus_client")
        self._collector = importlib.import_module("prometheus_client.multiprocess").MultiProcessCollector
        self._directory = directory
        self._lock = threading.Lock()
        self._merged: dict[str, MergedFile] = {}
        self._slots = client.Gauge(
            "pothead_worker_slots",
            "Slots that are connected to the hub.",
            registry=None,
            multiprocess_mode="livesum",
        )
        self._busy = client.Gauge(
            "pothead_worker_slots_busy",
            "Slots that serve a request.",
            registry=None,
            multiprocess_mode="livesum",
        )
        self._requests = client.Counter(
            "pothead_worker_requests_total",
            "Requests served, by status; 499: the consumer left before the response.",
            ["status"],
            registry=None,
        )
        self._request_seconds = client.Histogram(
            "pothead_worker_request_seconds",
            "Time from a request's arrival to the end of its response.",
            registry=None,
            buckets=SECONDS_BUCKETS,
        )
        self._gate_seconds = client.Histogram(
            "pothead_worker_gate_seconds",
            "Time until the gate let a job through.",
            registry=None,
            buckets=SECONDS_BUCKETS,
        )

    def on_slot(self, change: int) -> None:
        self._slots.inc(change)

    def on_request(self) -> None:
        self._busy.inc()

    def on_response(self, status: str, seconds: float) -> None:
        self._requests.labels(status).inc()
        self._request_seconds.observe(seconds)
        self._busy.dec()  # at last: a page without busy slots has all that was served

    def on_gate(self, seconds: float) -> None:
        self._gate_seconds.observe(seconds)

    # -- the processes of the app

    def merge_ended(self, pid: int) -> None:
        with self._lock:
            for path in glob.glob(os.path.join(glob.escape(self._directory), f"*_{pid}.db")):
                kind = os.path.basename(path).rpartition("_")[0]
                if kind in MergedFile.RULES:
                    self._merge(kind, path)
                os.unlink(path)

    def _merge_others(self) -> None:
        """Merge the files of processes that ended without our notice, like those that the app started."""
        names = [name.removesuffix(".db") for name in os.listdir(self._directory) if name.endswith(".db")]
        pids = {name.rpartition("_")[2] for name in names} - {str(self.MERGED_PID)}
        for pid in pids:
            if pid.isdecimal() and not does_process_exist(int(pid)):
                self.merge_ended(int(pid))

    def _merge(self, kind: str, path: str) -> None:
        if kind not in self._merged:
            target = os.path.join(self._directory, f"{kind}_{self.MERGED_PID}.db")
            self._merged[kind] = MergedFile(kind, target)
        try:
            self._merged[kind].add(path)
        except (struct.error, RuntimeError, OSError, ValueError) as exc:  # the process was killed writing it
            log.warning("metrics of an ended process are lost: %s: %s", path, exc)

    # -- the page

    def page(self, _visitor: socket.socket) -> Page:
        """Return what a scrape gets."""
        self._merge_others()
        with self._lock:
            text: bytes = self._client.generate_latest(self)
        return Page(text, content_type=str(self._client.CONTENT_TYPE_LATEST))

    def collect(self) -> Iterable[object]:
        """Return all metrics, as prometheus_client wants them of a registry."""
        paths = glob.glob(os.path.join(glob.escape(self._directory), "*.db"))
        # A process that has just made a file, and has been stopped before it wrote, must not spoil the page.
        metrics: Iterable[object] = self._collector.merge(list(filter(os.path.getsize, paths)))
        return metrics

    def close(self) -> None:
        for merged in self._merged.values():
            merged.close()


def does_process_exist(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


class MergedFile:
    """What ended processes have counted, for metrics of one kind.

    The kinds that have no rule here say something of a process that lives; they end with it.
    """

    RULES: Mapping[str, Callable[[tuple[float, float], tuple[float, float]], tuple[float, float]]] = {
        "counter": lambda old, new: (old[0] + new[0], 0.0),
        "histogram": lambda old, new: (old[0] + new[0], 0.0),
        "summary": lambda old, new: (old[0] + new[0], 0.0),
        "gauge_sum": lambda old, new: (old[0] + new[0], 0.0),
        "gauge_max": max,
        "gauge_min": min,
        "gauge_mostrecent": lambda old, new: new if new[1] > old[1] else old,
    }

    def __init__(self, kind: str, path: str) -> None:
        self._combine = self.RULES[kind]
        self._file = importlib.import_module("prometheus_client.mmap_dict").MmapedDict(path)
        self._values: dict[str, tuple[float, float]] = {}  # value and time stamp

    def add(self, path: str) -> None:
        values = self._file.read_all_values_from_file(path)
        for key, value, timestamp, _ in list(values):
            old = self._values.get(key)
            new = (value, timestamp)
            self._values[key] = combined = self._combine(old, new) if old else new
            self._file.write_value(key, *combined)

    def close(self) -> None:
        self._file.close()


# ---- Reaching the hub --------------------------------------------------------------------------------


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class HubURL(NamedTuple):
    """Where a hub speaks PTTH, with TLS (https) or without it (http)."""

    scheme: str
    address: Address
    path: str  # with its query; "/" for the usual one

    @property
    def is_tls(self) -> bool:
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """What the Host field says (RFC 9110 §7.2)."""
        is_usual = self.address.port == USUAL_PORTS[self.scheme]
        return str(self.address).rpartition(":")[0] if is_usual else str(self.address)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path.rstrip('/') and self.path}"


USUAL_PORTS = {"http": 80, "https": 443}
ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]\s]+)):([0-9]{1,5})")
HUB_URL = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z_](?:[0-9A-Za-z._-]*[0-9A-Za-z_])?\.?)(?::([0-9]{1,5}))?"
    r"(/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*)?",
    re.IGNORECASE,
)
ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::([1-9][0-9]{0,4}))?/?")


def parse_address(text: str) -> Address:
    """Understand `host:port` or `[IPv6]:port`. Raises ValueError."""
    match = ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT, like localhost:4040 or [::1]:4040")
    return Address(match[1] or match[2], int(match[3]))


def parse_hub(text: str) -> Address | HubURL:
    """Understand `host:port`, `https://host[:port][/path]` or the same with http. Raises ValueError."""
    if "://" not in text:
        return parse_address(text)
    if "@" in text:  # which may be a secret
        raise ValueError("a hub's URL has neither user nor password; see --token-file")
    match = HUB_URL.fullmatch(text)
    scheme = match[1].lower() if match else ""
    port = int(match[3] or USUAL_PORTS[scheme]) if match else 0
    if match is None or not 0 < port < 65536:
        raise ValueError(f"{text!r} is not like https://hub.example:4443, http://localhost:4043 or HOST:PORT")
    return HubURL(scheme, Address(match[2].strip("[]"), port), match[4] or "/")


def parse_hubs(text: str) -> tuple[Address | HubURL, ...]:
    """Understand hubs with commas between them. Raises ValueError."""
    has_path = "://" in text  # which may have commas
    texts = re.split(r",\s*(?=https?://)" if has_path else ",", text, flags=re.IGNORECASE)
    return check_hubs([parse_hub(each.strip()) for each in texts if each.strip()] or [parse_hub(text)])


def check_hubs(hubs: Sequence[Address | HubURL]) -> tuple[Address | HubURL, ...]:
    """Return them, each once. Raises ValueError for several that cannot be used together."""
    several = tuple(dict.fromkeys(hubs))
    silent = [each for each in several if isinstance(each, Address)]
    if len(several) > 1 and silent:
        raise ValueError(
            f"{silent[0]} is a port where nothing is said, and so no request can be claimed; "
            "with several hubs, say http://HOST:PORT or https://HOST:PORT of each"
        )
    return several


def is_address(host: str) -> bool:
    """Return whether it is a number, and not a name."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True


def parse_origins(text: str) -> tuple[str, ...]:
    """Return origins as RFC 6454 §6.2 writes them, of a list with commas. Raises ValueError."""
    return tuple([parse_origin(each.strip()) for each in text.split(",") if each.strip()])


def parse_origin(text: str) -> str:
    match = ORIGIN.fullmatch(text.lower())
    if match is None or int(match[3] or 1) > 65535:
        raise ValueError(f"{text!r} is not an origin like https://api.example or http://localhost:8080")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and int(port) != USUAL_PORTS[scheme] else "")


# What socket.getaddrinfo returns for each address: family, type, protocol, canonical name, address.
SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, SocketAddress]


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


OTHER_PORTS = {8080: "consumers", 4041: "admins"}  # of a hub, by default
HINT = "--connect is for the hub's worker port (4040), not for that of consumers, the admin port or a proxy"

PTTH_HINT = "is there a proxy or a firewall before the hub that ends what is idle?"


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
    """Logs when the hub cannot be reached and when it can again: a line an episode, not a slot and try.

    What can be connected to need not be a hub. Nothing may be sent to find out, since a slot is silent while
    it waits; but a web server gives itself away, by an error or by how it ends what says nothing.
    """

    def __init__(self, address: Address | HubURL, slots: int, description: str, name: str = "") -> None:
        self._address = name or address
        self._slots = slots
        self._description = description
        self._hint = PTTH_HINT if isinstance(address, HubURL) else HINT
        self._lock = threading.Lock()
        self._connected: set[object] = set()  # the first seats, or whatever else can be, as many as slots
        self._is_unreachable = False
        self._refused: set[object | None] = set()  # None for all that come and go with each request
        self._told: set[str] = set()  # what refusals have been, while there are some
        self._is_doubted = False  # and this has been said
        self._unused_until = -math.inf  # when the last connection that no request came on was closed,
        self._unused_s = -math.inf  # and how long it had been open

    @property
    def is_reached(self) -> bool:
        is_refused = len(self._refused) >= self._slots
        return bool(self._connected) and not self._is_unreachable and not is_refused

    def on_connected(self, seat: object) -> None:
        with self._lock:
            was_unreachable, self._is_unreachable = self._is_unreachable, False
            was_unreachable = self._end_refusals(seat) or was_unreachable
            was_complete = len(self._connected) == self._slots
            if not was_complete:
                self._connected.add(seat)
            if not was_complete and len(self._connected) == self._slots:
                log.info("connected %s hub=%s", self._description, self._address)
            elif was_unreachable:
                log.info("connected again hub=%s", self._address)

    def _end_refusals(self, seat: object) -> bool:
        """Return whether these were the last ones of an episode."""
        was_refused = bool(self._told)
        self._refused -= {seat, None}
        if not self._refused:
            self._told.clear()
        return was_refused and not self._told

    def on_refused(self, seat: object | None, refusal: Refusal) -> None:
        """The hub does not take the worker, or something else has answered. Each kind is told once."""
        with self._lock:
            self._refused.add(seat)
            if refusal.kind not in self._told:
                self._told.add(refusal.kind)
                log.warning("hub %s %s; trying again", self._address, refusal)

    def on_failed(self, reason: OSError) -> None:
        with self._lock:
            self._unused_s = -math.inf
            if not self._is_unreachable:
                self._is_unreachable = True
                log.warning("hub %s unreachable, trying again: %s", self._address, reason.strerror or reason)

    def on_request(self) -> None:
        """A request has come, so it is a hub."""
        self._is_doubted = False
        self._unused_s = -math.inf

    def on_response(self, status_line: str) -> None:
        """A response has come."""
        with self._lock:
            if not self._is_doubted:
                self._is_doubted = True
                log.warning("a web server answers at %s: %r; %s", self._address, status_line, self._hint)

    def on_nonsense(self, what: str) -> None:
        """Something has come that is no request."""
        with self._lock:
            if not self._is_doubted:
                self._is_doubted = True
                log.warning("not a request from the hub at %s: %s", self._address, what)

    def on_unused(self, opened_at: float, closed_at: float) -> None:
        """A connection was closed without a request: by chance, or each time after the same time?"""
        with self._lock:
            if opened_at < self._unused_until:  # another slot's, at the same time
                return
            waited_s, before_s = closed_at - opened_at, self._unused_s
            self._unused_until, self._unused_s = closed_at, waited_s
            if waited_s > 1 and abs(waited_s - before_s) < waited_s / 10 and not self._is_doubted:
                self._is_doubted = True
                log.warning("%s closes what has waited for %.0f s; %s", self._address, waited_s, self._hint)


# ---- The handshake -----------------------------------------------------------------------------------
#
# draft-kazuho-ptth-ptth-01 over HTTP/1.1: the worker asks with an `Upgrade: ptth`, the hub answers 101, and
# from there on the hub sends the requests.

REQUEST_START = re.compile(rb"%b [/*][\x21-\x7e]* HTTP/1" % TOKEN.encode())
BEARER_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750 §2.1
SECRET = "(not shown)"


class Refusal(Exception):
    """This is no link: a hub said no, or something else answered. The text is for the log."""

    def __init__(self, text: str, kind: str, least_wait_s: float = 0.0) -> None:
        """Refusals of the same kind are logged once an episode."""
        super().__init__(text)
        self.kind = kind
        self.least_wait_s = least_wait_s


class Secret:
    """A token that is never shown by mistake."""

    def __init__(self, text: str) -> None:
        """Raises ValueError if it cannot be a bearer token."""
        if not BEARER_TOKEN.fullmatch(text):
            raise ValueError("this is not a token, which has letters, digits and -._~+/ (RFC 6750)")
        self.text = text

    def __repr__(self) -> str:
        return SECRET


def read_token(path: str) -> Secret:
    """Raises ValueError, whose text has nothing of what is in the file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as exc:
        raise ValueError(f"{path!r} cannot be read: {exc.strerror}") from None
    try:
        if len(data) > MAX_TOKEN_BYTES:
            raise ValueError(f"it is longer than {MAX_TOKEN_BYTES} bytes")
        return Secret(data.decode("ascii", "replace").strip())
    except ValueError as exc:
        raise ValueError(f"{path!r}: {exc}") from None


@dataclass(frozen=True)
class Credentials:
    """What a hub is told of this worker, and how the worker knows the hub. Files are PEM."""

    origins: tuple[str, ...] = ()  # that it serves (RFC 6454); none: whatever the hub lets it serve
    token: Secret | None = None
    token_file: str | None = None  # read again for each connection
    cafile: str | None = None  # whom to trust; None: whom the system trusts
    certfile: str | None = None
    keyfile: str | None = None  # None: the key is in certfile


class Introduction:
    """What is said on each new connection to a hub."""

    def __init__(
        self, url: HubURL, credentials: Credentials, more: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """`more` returns further lines of the request.

        Raises ValueError for credentials that cannot be used, or must not be at this hub.
        """
        self.url = url
        self._more = more
        self._credentials = credentials
        self._token = credentials.token
        self.tls: TlsFiles | None = None
        if credentials.token_file:
            self._token = read_token(credentials.token_file)
        if url.is_tls:
            files = credentials.cafile, credentials.certfile, credentials.keyfile
            self.tls = TlsFiles(lambda: make_hub_context(credentials), files)
            check_name(self.tls.context(), self.tls_name)
        elif self._token and not is_loopback(url.address.host):
            raise ValueError(f"a token would go to {url} in the clear; say https://")
        if len(self.request()) > MAX_REQUEST_BYTES:
            raise ValueError("there are too many origins for one request")

    @property
    def tls_name(self) -> str:
        """Whom the hub's certificate has to be for."""
        return self.url.address.host.rstrip(".")

    def request(self) -> bytes:
        """Return the request to be a worker, with the token that the file has now."""
        lines = [
            f"GET {self._target()} HTTP/1.1",
            f"Host: {self.url.authority}",
            "Connection: upgrade",
            "Upgrade: ptth",
            "ALPN: http%2F1.1",
            *self._more(),
        ]
        if token := self._read_token():
            lines.append(f"Authorization: Bearer {token.text}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def _target(self) -> str:
        if self.url.path != "/":
            return self.url.path
        origins = ",".join([urllib.parse.quote(each, safe="") for each in self._credentials.origins])
        return f"/.well-known/ptth/{origins}/" if origins else "/ptth"

    def _read_token(self) -> Secret | None:
        if self._credentials.token_file:
            try:
                self._token = read_token(self._credentials.token_file)
            except ValueError as exc:
                log.debug("the last token is used: %s", exc)
        return self._token

    def redact(self, text: str) -> str:
        """Return a text for the log without what must not stand there, should the hub say it back."""
        return text.replace(self._token.text, SECRET) if self._token else text


def is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return name == "::1" or re.fullmatch(r"127(\.[0-9]{1,3}){3}", name) is not None


class TlsFiles:
    """What speaks TLS by files, which are read again for the next connection when they have changed."""

    def __init__(self, make: Callable[[], ssl.SSLContext], files: Iterable[str | None]) -> None:
        """Raises ValueError, as `make` does."""
        self._make = make
        self._files = [file for file in files if file]
        self._versions = self._refused = self._look()
        self._context = make()

    def _look(self) -> list[tuple[int, int, int] | None]:
        """Return what is another one for each file that has been replaced or written."""
        return [file_version(file) for file in self._files]

    def context(self) -> ssl.SSLContext:
        """Return it for the next connection: the last one that could be made.

        What cannot be read now, for want of descriptors perhaps, may be so for the connection after that.
        """
        if (versions := self._look()) != self._versions:
            try:
                self._context = self._make()
            except (OSError, ValueError) as exc:  # a file may go while it is read
                if versions != self._refused:
                    log.warning("%s; what was there before is used", exc)
                self._refused = versions
            else:
                self._versions = versions
                log.info("read again: %s", ", ".join(self._files))
        return self._context


def file_version(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def make_hub_context(credentials: Credentials) -> ssl.SSLContext:
    """Return what checks the hub's certificate and name, and shows ours. Raises ValueError.

    `ssl.create_default_context` would be stricter from Python 3.13 on than before: private authorities often
    lack what it wants (a keyUsage).
    """
    load_ssl()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    set_up_tls(context)
    if credentials.cafile:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it may have the hub's own certificate only
        load_authorities(context, credentials.cafile)
    else:
        context.load_default_certs()
    if credentials.certfile:
        load_certificate(context, credentials.certfile, credentials.keyfile)
    return context


def check_name(context: ssl.SSLContext, name: str) -> None:
    """Raises ValueError if no certificate can be for that name."""
    try:
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=name)
    except ValueError:
        raise ValueError(f"{name!r} is not the name of a host") from None


def set_up_tls(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])


def load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"--cafile: there is no certificate in {path!r}") from None
    except OSError as exc:
        raise ValueError(f"--cafile: {path!r} cannot be read: {exc.strerror}") from None


def load_certificate(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """Have the context show a certificate. Raises ValueError."""

    def refuse() -> str:
        raise ValueError(f"--keyfile: the key in {key!r} is encrypted, and there is nobody to ask")

    key = keyfile or certfile
    for option, path in (("--certfile", certfile), ("--keyfile", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as exc:
            raise ValueError(f"{option}: {path!r} cannot be read: {exc.strerror}") from None
    try:
        context.load_cert_chain(certfile, keyfile, refuse)
        decode = getattr(ssl._ssl, "_test_decode_cert")  # type: ignore[attr-defined]  # noqa: B009  # as its tests do
        ends_at = ssl.cert_time_to_seconds(decode(certfile)["notAfter"])
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"--keyfile: the key in {key!r} does not belong to {certfile!r}") from None
        raise ValueError(f"--certfile: no certificate with its key in {certfile!r} and {key!r}") from None
    if ends_at < time.time():
        raise ValueError(f"--certfile: {certfile!r} has expired on {timestamp(ends_at)[:10]}")


class Handshake:
    """What is said on a connection before it is a link: TLS, the worker's request, the hub's answer.

    It never waits, and ends with the link or a Refusal.
    """

    def __init__(
        self, sock: socket.socket, introduction: Introduction, link: Link | None = None, hub_id: str = ""
    ) -> None:
        """With a link, which is held, it is another one on the same connection to the hub with that id."""
        self.sock = sock
        self._link = link
        self._hub_id = hub_id.encode("latin-1")
        self.has_asked = False
        self.said: Mapping[str, str] = {}  # the fields of its 101
        self.deadline = math.inf  # beside that of the whole
        self.transport: Transport = PlainTransport(sock)
        self._introduction = introduction
        self._go_on = self._ask
        if link:
            self.transport = link.transport
        elif introduction.tls:
            self.transport = TlsTransport(sock, introduction.tls.context(), introduction.tls_name)
            self._go_on = self._begin_tls
        self.transport.limit_time(0)
        self._intake = link.intake if link else Intake(self.transport)
        self._interim_heads = 0
        self._reason = b""  # for a refusal
        self._refusal: Callable[[], Refusal] | None = None

    def proceed(self) -> int:
        """Go on as far as possible. Return the event to wait for; 0 when the hub has agreed.

        Raises Refusal.
        """
        try:
            return self._go_on()
        except BlockingIOError:
            return select.POLLIN
        except OSError as exc:
            raise self._refusal() if self._refusal else self._explain(exc) from None

    def make_link(self) -> Link:
        """Return the link, which has received perhaps the first request already."""
        self.transport.limit_time(None)
        return self._link or Link(self.transport, self._intake.take_received())

    def on_deadline(self) -> Refusal:
        if self._refusal:
            return self._refusal()
        return Refusal(f"does not answer within {CONNECT_TIMEOUT_S:g} s; {HINTS['silent']}", "silent")

    # -- step by step

    def _begin_tls(self) -> int:
        assert isinstance(self.transport, TlsTransport)
        events = self.transport.shake_hands()
        if events:
            return events
        self._go_on = self._ask
        return self._go_on()

    def _ask(self) -> int:
        with contextlib.suppress(OSError):  # if it has been refused unasked, receiving tells why
            self.transport.send(self._introduction.request())
        self.has_asked = True
        self._go_on = self._skip_stale if self._link else self._take_answer
        return self._go_on()

    def _skip_stale(self) -> int:
        """Skip what crossed our last word: perhaps a request, and any part of its body.

        A consumer, who may say in a body whatever it likes, does not know the hub's id.
        """
        if not self._intake.skip_to(b"HTTP/1.1 101 ", b"\r\nPothead-Hub: %b\r\n" % self._hub_id):
            raise Refusal(f"closes the connection without an answer; {HINTS['closed']}", "closed")
        self._go_on = self._take_answer
        return self._go_on()

    def _take_answer(self) -> int:
        try:
            data = self._intake.take_wary_head(MAX_ANSWER_BYTES, LOCAL_HEAD_START)
        except HeadTooLong:
            raise Refusal("answers with a head that is too long", "long") from None
        except ProtocolError:
            raise self._guess(self._intake.take_received()) from None
        if data is None:
            raise Refusal(f"closes the connection without an answer; {HINTS['closed']}", "closed")
        match = RESPONSE_HEAD.fullmatch(data.decode("latin-1"))
        if match is None:
            raise self._guess(data)
        minor_version, status, phrase, lines = match.groups()
        fields = parse_fields(lines)
        if status == "101":
            self._check_switch(minor_version, fields)
            self.said = fields
            return 0
        if status.startswith("1"):
            return self._skip_interim()
        return self._on_refusal(int(status), clean(f"{status} {phrase or ''}"), fields)

    def _skip_interim(self) -> int:
        self._interim_heads += 1
        if self._interim_heads > MAX_INTERIM_HEADS:
            raise Refusal("answers with interim responses only", "interim")
        return self._go_on()

    def _check_switch(self, minor_version: str, fields: Mapping[str, str]) -> None:
        """Raises Refusal if the hub has not agreed to what it was asked (RFC 9110 §7.8, RFC 7639)."""
        said = f"Upgrade: {fields.get('UPGRADE', '-')}, ALPN: {fields.get('ALPN', '-')}"
        is_upgrade = "upgrade" in connection_options(fields) and fields.get("UPGRADE", "").lower() == "ptth"
        if minor_version == "0" or not is_upgrade or fields.get("ALPN") != "http%2F1.1":
            raise Refusal(f"switches to something else than PTTH: {self._clean(said)}", "switch")

    # -- what else there is

    def _on_refusal(self, status: int, line: str, fields: Mapping[str, str]) -> int:
        """Take what the hub tells of its reason, for a moment."""
        wait_s = retry_after_s(fields.get("RETRY_AFTER", "")) if status in (429, 503) else 0.0
        does = "does not switch to PTTH, but answers"
        if status in (401, 403):
            wait_s = BACKOFF_REFUSED_S
        if status in (401, 403, 429, 503):
            does = "refuses this worker:"
        hint = hint_for_status(status, fields, self._introduction.url.is_tls)

        def make() -> Refusal:
            reason = self._told()
            if not reason.startswith(line):
                reason = f"{line}: {reason}" if reason else line
            return Refusal(self._clean(f"{does} {reason}") + hint, str(status), wait_s)

        self._refusal = make
        try:
            length, is_chunked = parse_framing(dict(fields))
        except ProtocolError:
            raise make() from None
        limit = MAX_REASON_BYTES if length is None else min(length, MAX_REASON_BYTES)
        self._body = ChunkedBody(self._intake) if is_chunked else FixedBody(self._intake, limit)
        self.deadline = time.monotonic() + REASON_TIMEOUT_S
        self._go_on = self._take_reason
        return self._go_on()

    def _take_reason(self) -> int:
        assert self._refusal is not None
        with contextlib.suppress(BodyError):
            while len(self._reason) < MAX_REASON_BYTES and (data := self._body.read(MAX_REASON_BYTES)):
                self._reason += data
        raise self._refusal()

    def _told(self) -> str:
        """Return what the hub has said of its reason, if that is for people."""
        text = self._reason.decode("utf-8", "replace").strip()
        return "" if text.startswith("<") else text

    def _clean(self, text: str) -> str:
        return clean(self._introduction.redact(text))

    def _explain(self, exc: OSError) -> Refusal:
        """Return what a failure means."""
        if isinstance(self.transport, TlsTransport) and isinstance(exc, ssl.SSLError):
            return self._explain_tls(exc, self.transport.first)
        return Refusal(f"breaks the connection off: {exc.strerror or exc}; {HINTS['closed']}", "closed")

    def _explain_tls(self, exc: ssl.SSLError, first: bytes) -> Refusal:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return Refusal(
                f"has a certificate that is not trusted: {clean(exc.verify_message)}", "certificate"
            )
        reason = exc.reason or ""
        if isinstance(exc, ssl.SSLEOFError):
            return Refusal("closes the connection before TLS is there; is this a port with TLS?", "closed")
        if first[:1] not in (b"\x15", b"\x16"):
            return self._guess(first)
        if "ALERT_CERTIFICATE_REQUIRED" in reason or (self.has_asked and "HANDSHAKE_FAILURE" in reason):
            text = "wants a certificate of this worker; see --certfile"
            return Refusal(text, "certificate", BACKOFF_REFUSED_S)
        if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
            text = f"does not take this worker's certificate: {words_of(reason)}"
            return Refusal(text, "certificate", BACKOFF_REFUSED_S)
        if "NO_APPLICATION_PROTOCOL" in reason:
            return Refusal("does not speak HTTP/1.1 there, perhaps HTTP/2 only", "tls")
        return Refusal(f"does not come to terms about TLS: {words_of(reason) or 'no reason given'}", "tls")

    def _guess(self, first: bytes) -> Refusal:
        """Return what it may be that begins like this."""
        for looks_like_it, text in GUESSES:
            if looks_like_it(first):
                return Refusal(text, "stranger")
        said = self._clean(ascii(first[:40].partition(b"\n")[0].rstrip())[1:])
        return Refusal(f"does not answer as a hub would, but with {said}", "stranger")


GUESSES: Sequence[tuple[Callable[[bytes], object], str]] = (
    (lambda data: data.startswith(b"SSH-"), "is an SSH server"),
    (lambda data: data[:1] in (b"\x15", b"\x16") and data[1:2] == b"\x03", "speaks TLS; say https://"),
    (lambda data: data[:2] == b"\0\0" and data[3:4] in (b"\x04", b"\x07"), "speaks HTTP/2 only"),
    (lambda data: data.startswith(b"HTTP/1."), "answers in HTTP without TLS; say http:// if that is meant"),
    (REQUEST_START.match, "sends requests unasked: this is its port for silent workers; say HOST:PORT"),
)
HINTS = {
    "silent": "is this the port where it speaks PTTH, and not that of consumers or of silent workers?",
    "closed": "is this the port where it speaks PTTH?",
}


def hint_for_status(status: int, fields: Mapping[str, str], is_tls: bool) -> str:
    """Return what may help, after a semicolon."""
    if status == 401:
        return "; see --token-file and --certfile"
    if status == 403:
        return "; see --origin, and what the hub's workers file lets this one serve"
    if status in (429, 503):
        return ""
    if status == 400 and not is_tls:
        return "; perhaps it speaks TLS: say https://"
    if "X_REQUEST_ID" in fields:
        return "; this looks like the port that a hub has for consumers"
    server = clean(fields.get("SERVER", ""), 40)
    return f"; this looks like a web server ({server})" if server else f"; {HINTS['closed']}"


def retry_after_s(text: str) -> float:
    """Return what a Retry-After tells (RFC 9110 §10.2.3) in seconds, at most 300; 0 for nonsense."""
    if re.fullmatch(r"[0-9]{1,20}", text):
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def clean(text: str, limit: int = 200) -> str:
    """Return a peer's text in one line of the log, without what does not print, and not too long."""
    line = " ".join("".join([each if each.isprintable() else " " for each in text]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def words_of(reason: str) -> str:
    """Return OpenSSL's name for a failure as words: `TLSV1_ALERT_UNKNOWN_CA`."""
    return re.sub(r"^(?:SSLV3|TLSV1|TLSV13)_ALERT_", "", reason).replace("_", " ").lower()


# ---- Several hubs: who is next -----------------------------------------------------------------------
#
# Hubs do not know of each other; what makes several of them one service is that each slot is offered at all
# of them. A request *rings* where a connection waits, which so is a *bell*. If a slot is free, the request is
# claimed; else it is turned away, and its hub stands in *line*, for the next slot that is free.

HubT = TypeVar("HubT", bound=Hashable)


class BellState(enum.Enum):
    """What a connection to one of several hubs is to the slots of this process."""

    COMING = enum.auto()  # a handshake is on its way; what came before it means nothing
    WAITING = enum.auto()  # the hub may send a request
    SERVING = enum.auto()  # the response to a request that was claimed
    HELD = enum.auto()  # the hub sends nothing before the next handshake
    GONE = enum.auto()


class Bell(Generic[HubT]):
    """One connection to one of several hubs, as the line sees it, which alone changes it."""

    __slots__ = ("hub", "is_invited", "state")

    def __init__(self, hub: HubT) -> None:
        self.hub = hub
        self.state = BellState.COMING
        self.is_invited = False  # it is the hub's turn: a free slot is meant for what it sends here


class Waiting(NamedTuple):
    """What waits at a hub, as far as it is known. Ages are times of birth: the lowest is the oldest."""

    number: int
    oldest: float
    newest: float

    def rest(self) -> Waiting:
        """Return what is left without the oldest; the others are taken to have come evenly."""
        return self._replace(
            number=self.number - 1, oldest=self.oldest + (self.newest - self.oldest) / self.number
        )


class Line(Generic[HubT]):
    """Decides which hub a free slot is for. Pure: it is told what happens, and says what is to be done.

    There is a bell at every hub, even while all slots are busy, and as many as there are free slots. A hub
    whose request was turned away stands in line, at the place of that request's age. A slot that becomes free
    invites the first in line by a handshake. If the answer is that nothing waits there, or none comes in
    time, the next in line is invited. A hub that has said that more waits stands there for each of these, or
    one that is far away would have one slot for each of its round trips only.

    After each call `take_orders` has the bells that need a handshake now: a new connection for a new one.
    """

    def __init__(self, most_bells: int) -> None:
        """`most_bells` is how many there may be at one hub, however many slots are free."""
        self.free = 0  # slots
        self.first: HubT | None = None  # in line. May be read by any thread
        self._most_bells = most_bells
        self._most_free = 0  # slots that have ever been free at once: all of them, mostly
        self._invited = 0  # free slots that are meant for somebody
        self._waiting: dict[HubT, Waiting] = {}  # at each hub that stands in line
        self._bells: dict[HubT, dict[Bell[HubT], None]] = {}  # all of each hub
        self._good: set[HubT] = set()  # hubs that have agreed since something failed there
        self._orders: list[Bell[HubT]] = []

    def take_orders(self) -> list[Bell[HubT]]:
        orders, self._orders = self._orders, []
        return orders

    def bells_of(self, hub: HubT) -> list[Bell[HubT]]:
        return list(self._bells.get(hub, ()))

    # -- what happens to hubs and slots

    def join(self, hub: HubT) -> None:
        """There is another hub."""
        self._bells[hub] = {}
        self._go_on()

    def leave(self, hub: HubT) -> None:
        """The hub is to be used no longer. Responses that are under way there end with `on_gone`."""
        self._waiting.pop(hub, None)
        for bell in self.bells_of(hub):
            if bell.state is not BellState.SERVING:
                self._forget(bell)
        self._bells.pop(hub)
        self._go_on()

    def on_free(self) -> None:
        """There is another free slot."""
        self.free += 1
        self._most_free = max(self._most_free, self.free)
        self._go_on()

    # -- what happens to bells

    def on_agreed(self, bell: Bell[HubT], is_waiting: bool) -> None:
        """The hub has agreed to the handshake, and said whether requests wait there."""
        bell.state = BellState.WAITING
        self._good.add(bell.hub)
        if not is_waiting:
            self._settle(bell)
            if bell.hub in self._waiting:  # others were faster; but one may have been turned away since
                self._waiting[bell.hub] = self._waiting[bell.hub]._replace(number=1)
        self._go_on()

    def on_ring(self, bell: Bell[HubT], age: float, behind: Waiting | None) -> bool:
        """A request has come, and others wait behind it, if any. Return whether to claim it.

        If not, it is to be turned away, which holds the connection.
        """
        self._settle(bell)
        if self.free:
            self.free -= 1
            bell.state = BellState.SERVING
            self._waiting.pop(bell.hub, None)
            if behind:
                self._waiting[bell.hub] = behind
        else:
            bell.state = BellState.HELD
            before = self._waiting.get(bell.hub)
            oldest = min(age, before.oldest) if before else age
            number = max(before.number if before else 0, behind.number if behind else 0) + 1
            newest = max(each.newest for each in (before, behind) if each) if before or behind else age
            self._waiting[bell.hub] = Waiting(number, oldest, newest)
        is_claimed = bell.state is BellState.SERVING
        self._go_on()
        return is_claimed

    def on_response(self, bell: Bell[HubT], is_held: bool, is_slot_free: bool = True) -> None:
        """A response has ended, with or without holding the connection; its slot is free, or has left.

        The connection may be of no more use then, and GONE.
        """
        self.free += is_slot_free
        if len(self._bells.get(bell.hub, ())) not in range(1, self._most_free + 2):
            self._forget(bell)  # the hub is used no longer, or has more connections than we need
        else:
            bell.state = BellState.HELD if is_held else BellState.WAITING
            if not is_held and self.first == bell.hub and self.free > self._invited:
                self._take(bell.hub)  # what waits there comes by itself
                self._invite(bell)
        self._go_on()

    def on_late(self, bell: Bell[HubT]) -> None:
        """The hub does not answer its invitation, and loses its place: it can ring when it is back."""
        self._settle(bell)
        self._waiting.pop(bell.hub, None)
        self._go_on()

    def on_gone(self, bell: Bell[HubT]) -> None:
        """The connection has ended, or there could be none. A slot that served is busy until `on_free`."""
        if bell.state is BellState.COMING:
            self._waiting.pop(bell.hub, None)
        if bell.state is not BellState.SERVING:
            self._good.discard(bell.hub)
        self._forget(bell)
        self._go_on()

    # -- what is to be done about it

    def must_hold(self, hub: HubT) -> bool:
        """Return whether a response there has to hold its connection: others come first. For any thread."""
        first = self.first
        return first is not None and first != hub

    def _forget(self, bell: Bell[HubT]) -> None:
        self._settle(bell)
        bell.state = BellState.GONE
        self._bells.get(bell.hub, {}).pop(bell, None)

    def _invite(self, bell: Bell[HubT]) -> None:
        bell.is_invited = True
        self._invited += 1

    def _settle(self, bell: Bell[HubT]) -> None:
        """The slot that was meant for this bell is for whoever comes next."""
        if bell.is_invited:
            bell.is_invited = False
            self._invited -= 1

    def _go_on(self) -> None:
        while self._waiting and self.free > self._invited:
            hub = self._first_in_line()
            self._take(hub)
            self._invite(self._order(hub))
        if not self.free or not self._invited:
            self._hang_bells()
        self.first = self._first_in_line() if self._waiting else None

    def _first_in_line(self) -> HubT:
        return min(self._waiting, key=lambda hub: self._waiting[hub].oldest)

    def _take(self, hub: HubT) -> None:
        """It is its turn, for one of its requests."""
        if self._waiting[hub].number > 1:
            self._waiting[hub] = self._waiting[hub].rest()
        else:
            del self._waiting[hub]

    def _hang_bells(self) -> None:
        """Whoever is not in line gets bells."""
        for hub, bells in self._bells.items():
            wanted = max(1, min(self.free, self._most_bells)) if hub in self._good else 1
            if hub not in self._waiting:
                there = sum([bell.state in (BellState.COMING, BellState.WAITING) for bell in bells])
                for _ in range(wanted - there):
                    self._order(hub)

    def _order(self, hub: HubT) -> Bell[HubT]:
        """Have a handshake made: on a connection that is held, if there is one."""
        held = [bell for bell in self._bells[hub] if bell.state is BellState.HELD]
        bell = held[0] if held else Bell(hub)
        bell.state = BellState.COMING
        self._bells[hub][bell] = None
        self._orders.append(bell)
        return bell


# ---- The lobby ---------------------------------------------------------------------------------------


class Guest(Protocol):
    """Who has the lobby look at the time."""

    @property
    def deadline(self) -> float:
        """When it wants to be called."""

    def on_deadline(self) -> None: ...

    def on_halt(self) -> None:
        """The worker is to take no more requests."""


class Lobby:
    """One thread that dials the hub, waits with the links for requests, and watches all links for their end.

    What it does for each slot is a Seat. What other threads want they order; nothing else of it is theirs. It
    is only here that links are opened, and closed, at the end of a turn: what somebody else closed might be
    another connection by the time that it is looked at. A link that goes on is given back without an order,
    where there is epoll: see `Seat.give_back`.

    A FIN hides behind unread bytes from `recv`, but not from POLLRDHUP. Where there is none, what is not
    waited with is looked at often, and an end behind an unread body is not seen.
    """

    def __init__(
        self,
        address: Address,
        halt: Halt,
        on_end: Callable[[], None],
        introduction: Introduction | None = None,
    ) -> None:
        """With an introduction, the hub is told who comes."""
        self.hang_up = getattr(select, "POLLRDHUP", 0)
        self.is_halted = False
        self.is_closed = False  # for seats: they leave
        self.seats: set[Seat] = set()
        self.guests: list[Guest] = []
        self.when_found: Callable[[Sequence[AddressInfo]], object] = lambda _found: None
        self.introduction = introduction
        self.rests_until = -math.inf  # for seats that come and go with each request
        self._address = address
        self._halt = halt
        self._on_end = on_end
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poller: select.epoll | select.poll = self._epoll or select.poll()
        self._actions: dict[int, Callable[[int], None]] = {}  # by descriptor; they are given its events
        self._deadline = math.inf  # the earliest of the seats', or one that has moved since
        self._watched: set[Link] = set()
        self._closing: list[Link | socket.socket] = []
        self._is_resolving = False
        self._last_found: Sequence[AddressInfo] = ()
        self._fixed: Sequence[AddressInfo] = ()  # is not looked up
        self._is_over = False
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reader, self._writer = own_pair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def start(self) -> None:
        self.listen(self._reader.fileno(), select.POLLIN, self._obey)
        self.listen(self._halt.fileno(), select.POLLIN, self._on_halt)
        start_thread(self._run, "lobby")

    def order(self, action: Callable[..., None], *arguments: object) -> None:
        """Have this done by the lobby's thread."""
        self._orders.put(functools.partial(action, *arguments))
        with contextlib.suppress(OSError):  # it is awake, or has ended
            self._writer.send(b"O")

    # -- what may be ordered

    def watch(self, link: Link) -> None:
        """Tell the link when its other end closes."""
        self.watch_for(link, functools.partial(self.on_watched, link))

    def dismiss(self, link: Link) -> None:
        """Watch it no longer, and close it."""
        self.forget(link)
        self.close(link)

    def end(self) -> None:
        """End the thread, when there are no slots any more."""
        self._is_over = True

    # -- for a slot's thread

    def wait_again(self, link: Link) -> bool:
        """Have the action of a link that is watched be done when something comes; return whether it will be.

        The thread need not be woken for it, which would cost a third of a request. Only epoll can do that.
        """
        if self._epoll:
            self._epoll.modify(link.fileno(), select.POLLIN | self.hang_up)
        return self._epoll is not None

    def is_closing(self) -> bool:
        return self.is_closed or self._halt.is_set()

    # -- its thread

    def _run(self) -> None:
        while not self._is_over:
            for fd, events in self._poll():
                if action := self._actions.get(fd):  # it may be gone since this turn began
                    self._do(action, events)
            self._do(self._on_time)
            for each in self._closing:
                each.close()
            self._closing.clear()
        self._reader.close()
        self._writer.close()
        if self._epoll:
            self._epoll.close()
        self._on_end()

    def _poll(self) -> list[tuple[int, int]]:
        wait_s = self._wait_s()
        return self._epoll.poll(wait_s) if self._epoll else self._poller.poll(wait_s * 1000)

    def _do(self, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception:
            log.exception("a fault of the worker itself")

    def _obey(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(RECEIVE_BYTES)
        for _ in range(self._orders.qsize()):  # those that come meanwhile have a turn of their own
            self._do(self._orders.get())

    def _wait_s(self) -> float:
        wait_s = LONGEST_POLL_S
        if self._watched and not self.hang_up:
            wait_s = PEEK_INTERVAL_S
        if self._deadline < math.inf:
            wait_s = min(wait_s, max(0.0, self._deadline - time.monotonic()))
        return wait_s + 0.001

    def _on_time(self) -> None:
        now = time.monotonic()
        if now >= self._deadline:
            for guest in [guest for guest in (*self.seats, *self.guests) if guest.deadline <= now]:
                guest.on_deadline()
            self._deadline = min([guest.deadline for guest in (*self.seats, *self.guests)], default=math.inf)
        if not self.hang_up:
            for link in [link for link in self._watched if link.peek() == b""]:
                self.on_watched(link, select.POLLHUP)

    def _on_halt(self, _events: int) -> None:
        self.ignore(self._halt.fileno())
        self.is_halted = True
        self.close_seats()
        for guest in self.guests:
            guest.on_halt()

    def close_seats(self) -> None:
        """Have slots leave their seats, as soon as they have done with what has come."""
        self.is_closed = True
        for seat in list(self.seats):
            seat.on_halt()

    def open_seats(self, introduction: Introduction, found: Sequence[AddressInfo]) -> None:
        """Have seats again, for the hub at these addresses, which are looked up no more."""
        if not self.is_halted:
            self.is_closed, self.introduction, self._fixed = False, introduction, found

    def forget(self, link: Link) -> None:
        """Watch it no longer."""
        self._watched.discard(link)
        self.ignore(link.fileno())

    # -- for its seats

    def wake_by(self, deadline: float) -> None:
        """Have seats told of deadlines then."""
        self._deadline = min(self._deadline, deadline)

    def watch_for(self, link: Link, action: Callable[[int], None]) -> None:
        """Have this done when the link's other end closes: once, or again after `wait_again`."""
        self._watched.add(link)
        self.listen(link.fileno(), self.hang_up | (select.EPOLLET if self._epoll else 0), action)

    def wait_with(self, link: Link, action: Callable[[int], None]) -> None:
        """Have this done when something comes, or the end."""
        self._watched.discard(link)
        self.listen(link.fileno(), select.POLLIN | self.hang_up, action)

    def on_watched(self, link: Link, events: int) -> None:
        if events & ~(select.POLLIN | select.POLLOUT):  # these are of a moment ago, for what it was then
            self._watched.discard(link)
            if not self._epoll:  # poll would say so again and again
                self.ignore(link.fileno())
            link.on_gone()

    def listen(self, fd: int, events: int, action: Callable[[int], None]) -> None:
        """Have this done about the descriptor's events, in place of what was."""
        if fd in self._actions:
            self._poller.modify(fd, events)
        else:
            self._poller.register(fd, events)
        self._actions[fd] = action

    def ignore(self, fd: int) -> None:
        if self._actions.pop(fd, None):
            self._poller.unregister(fd)

    def close(self, each: Link | socket.socket) -> None:
        self.ignore(each.fileno())
        self._closing.append(each)

    def look_up(self) -> None:
        """Have all seats that look it up told the hub's addresses. Raises OSError.

        The resolver cannot be interrupted, so a thread of its own waits for it, and perhaps is left to it.
        All seats share that one, or a resolver that hangs would cost a thread for each slot and try.
        """
        if self._fixed:
            self.order(self._on_answer, self._fixed)
        elif not self._is_resolving:
            start_thread(lambda: self.order(self._on_answer, look_up(self._address)), "resolver")
            self._is_resolving = True

    def _on_answer(self, found: Sequence[AddressInfo] | OSError) -> None:
        """The name service has answered; when it fails, the last addresses are used."""
        self._is_resolving = False
        failure = found if isinstance(found, OSError) else OSError("it has no address")
        if not isinstance(found, OSError):
            self._last_found = found
            self.when_found(found)
        for seat in list(self.seats):
            if seat.stage is Stage.LOOKING_UP:
                seat.on_addresses(self._last_found, failure)


class Lookout:
    """Has the name of the only hub looked up again and again: there may be another one some day."""

    def __init__(self, lobby: Lobby) -> None:
        self.deadline = math.inf
        self._lobby = lobby

    def begin(self) -> None:
        self._lobby.guests.append(self)
        self._look_later()

    def _look_later(self) -> None:
        self.deadline = time.monotonic() + LOOK_UP_INTERVAL_S
        self._lobby.wake_by(self.deadline)

    def on_deadline(self) -> None:
        if self._lobby.is_closed:
            self.on_halt()
            return
        with contextlib.suppress(OSError):  # there is no thread to be had: the next time, perhaps
            self._lobby.look_up()
        self._look_later()

    def on_halt(self) -> None:
        self.deadline = math.inf


class Stage(enum.Enum):
    """What a seat waits for."""

    LOOKING_UP = enum.auto()  # the hub's addresses
    DIALLING = enum.auto()  # the connection to one of them, and the hub's consent
    RESTING = enum.auto()  # the next try
    WAITING = enum.auto()  # a request
    SERVING = enum.auto()  # the slot, which has the link
    LEFT = enum.auto()  # nothing more


class Visit(Protocol):
    """Who approaches a hub: its approach ends with one of these."""

    deadline: float

    def set_deadline(self, deadline: float) -> None: ...

    def on_link(self, link: Link, said: Mapping[str, str]) -> None:
        """The hub has agreed; `said` are the fields of its 101, if it was one."""

    def on_refused(self, refusal: Refusal) -> None: ...

    def on_failed(self, reason: OSError) -> None: ...


class Approach:
    """The way to a link: it dials one address after the other, then says who comes. It never waits."""

    def __init__(self, lobby: Lobby, visit: Visit, introduction: Introduction | None) -> None:
        self._lobby = lobby
        self._visit = visit
        self._introduction = introduction
        self._addresses: list[AddressInfo] = []  # that have not been tried
        self._failure = OSError()
        self._dialled: socket.socket | None = None
        self._handshake: Handshake | None = None

    def dial(self, found: Sequence[AddressInfo], failure: OSError) -> None:
        """Begin; if none of the addresses answers, `failure` or what came last is the reason."""
        self._addresses, self._failure = list(found), failure
        self._dial_next()

    def renew(self, link: Link, hub_id: str) -> None:
        """Begin on a link that is held."""
        self._visit.set_deadline(time.monotonic() + CONNECT_TIMEOUT_S)
        assert self._introduction is not None
        self._handshake = Handshake(link.transport.sock, self._introduction, link, hub_id)
        self._greet()

    def may_be_there(self) -> bool:
        """Return whether the hub may have the connection already, and a request on it."""
        if self._handshake:
            return self._handshake.has_asked
        if self._dialled is None or self._introduction:
            return False
        return wait_ready(self._dialled.fileno(), select.POLLOUT, 0)

    def hurry(self) -> None:
        """End soon: there is no time to wait for what is not there yet."""
        if self._handshake:
            self._visit.set_deadline(min(self._visit.deadline, time.monotonic() + CROSSING_S))
        else:
            self._on_dial_event(0)

    def on_deadline(self) -> None:
        if self._handshake:
            self._on_refused(self._handshake.on_deadline())
        else:
            self._on_dialled(errno.ETIMEDOUT)

    def drop(self) -> None:
        """Leave it, and close what there is."""
        if self._dialled:
            self._lobby.close(self._dialled)
        handshake, self._handshake = self._handshake, None
        if handshake:
            handshake.transport.say_goodbye()
            self._lobby.close(handshake.sock)

    def _dial_next(self) -> None:
        if self._lobby.is_halted or not self._addresses:
            self._visit.on_failed(self._failure)
            return
        family, kind, protocol, _, address = self._addresses.pop(0)
        self._visit.set_deadline(time.monotonic() + CONNECT_TIMEOUT_S)
        try:
            self._dialled = own(socket.socket(family, kind, protocol))
            self._dialled.setblocking(False)
            error = self._dialled.connect_ex(address)
        except OSError as exc:
            error = exc.errno or errno.EINVAL
        if self._dialled and error == errno.EINPROGRESS:
            self._lobby.listen(self._dialled.fileno(), select.POLLOUT, self._on_dial_event)
        else:
            self._on_dialled(error)

    def _on_dial_event(self, _events: int) -> None:
        assert self._dialled is not None
        self._on_dialled(self._dialled.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _on_dialled(self, error: int) -> None:
        """The connection is there, or has failed."""
        sock, self._dialled = self._dialled, None
        try:
            if error or sock is None:
                raise OSError(error, os.strerror(error))
            if sock.getsockname() == sock.getpeername():  # nobody listens there, and TCP met itself
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            sock.setblocking(True)
            set_options(sock)
        except OSError as exc:
            if sock:
                self._lobby.close(sock)
            self._failure = exc
            self._dial_next()
        else:
            self._lobby.ignore(sock.fileno())
            if self._introduction:  # until when it may take has been said
                self._handshake = Handshake(sock, self._introduction)
                self._greet()
            else:
                self._visit.on_link(Link(PlainTransport(sock)), {})

    def _greet(self, _events: int = 0) -> None:
        """Go on with the handshake."""
        handshake = self._handshake
        assert handshake is not None
        try:
            events = handshake.proceed()
        except Refusal as exc:
            self._on_refused(exc)
            return
        self._visit.set_deadline(min(self._visit.deadline, handshake.deadline))
        if events:
            self._lobby.listen(handshake.sock.fileno(), events, self._greet)
        else:
            self._handshake = None
            self._visit.on_link(handshake.make_link(), handshake.said)

    def _on_refused(self, refusal: Refusal) -> None:
        self.drop()
        self._visit.on_refused(refusal)


class Seat:
    """A slot's place in the lobby: one link at a time waits there for a request, and is given to the slot."""

    claims = False  # what comes is for us

    def __init__(
        self, lobby: Lobby, reachability: Reachability, metrics: Metrics, is_for_one_request: bool
    ) -> None:
        self._inbox: queue.SimpleQueue[Link | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # held while a link is given back
        self.link: Link | None = None
        self.is_good = False  # or the last link was good for nothing
        self.must_move = False  # it has been left, but there are others
        self.stage = Stage.RESTING
        self.deadline = math.inf
        self.backoff = Backoff()
        self._lobby = lobby
        self.reachability = reachability
        self._metrics = metrics
        self._is_for_one_request = is_for_one_request
        self._approach: Approach | None = None

    # -- for its slot

    @property
    def is_last(self) -> bool:
        """Whether no request may follow on the same link."""
        return self._is_for_one_request or self._lobby.is_closed

    @property
    def is_offered(self) -> bool:
        """Whether a hub may send it a request, or has done so."""
        return self.link is not None

    def take(self) -> Link | None:
        """Return a link with a request on it, or None when there will be no more of them."""
        return self._inbox.get()

    def must_hold(self, is_early: bool) -> bool:
        return False

    def give_back(self, ending: Ending) -> None:
        """End SERVING, during which the seat was the slot's."""
        assert self.link is not None
        if ending is not Ending.KEEP:
            self._lobby.order(self._end_link, ending)
            return
        with self._lock:
            is_waiting = self._lobby.wait_again(self.link)
            if is_waiting:
                self.stage = Stage.WAITING
        if not is_waiting:
            self._lobby.order(self._wait)
        elif self._lobby.is_closing():  # the seat was told of it while it was SERVING, or will be twice
            self._lobby.order(self.on_halt)

    # -- for the lobby

    def begin(self) -> None:
        self._lobby.seats.add(self)
        if self._lobby.is_closed:
            self._leave()
        elif self._is_for_one_request and self._lobby.rests_until > time.monotonic():
            self.set_deadline(self._lobby.rests_until)
        else:
            self._look_up()

    def on_halt(self) -> None:
        if self.stage is Stage.WAITING:
            self._wait_no_longer()
        elif self._approach and self._approach.may_be_there():
            self._approach.hurry()
        elif self.stage not in (Stage.SERVING, Stage.LEFT):
            self._leave()

    def on_deadline(self) -> None:
        if self.stage is Stage.RESTING:
            self._look_up()
        elif self.stage is Stage.LOOKING_UP:
            self.on_failed(OSError(errno.ETIMEDOUT, "the name service does not answer"))
        elif self._approach:
            self._approach.on_deadline()
        else:
            self._end_link(Ending.CLOSE)

    def on_addresses(self, found: Sequence[AddressInfo], failure: OSError) -> None:
        self._dial(found, failure)

    # -- reaching the hub, whose name is looked up each time

    def _wait_for(self, stage: Stage, seconds: float = math.inf) -> None:
        self.stage, self.deadline = stage, math.inf
        if seconds < math.inf:
            self.set_deadline(time.monotonic() + seconds)

    def set_deadline(self, deadline: float) -> None:
        self.deadline = deadline
        self._lobby.wake_by(deadline)

    def _look_up(self) -> None:
        self._wait_for(Stage.LOOKING_UP, CONNECT_TIMEOUT_S)
        try:
            self._lobby.look_up()
        except OSError as exc:
            self.on_failed(exc)

    def _dial(self, found: Sequence[AddressInfo], failure: OSError) -> None:
        if self._lobby.is_closed:
            self._leave()
            return
        self.stage = Stage.DIALLING
        self._approach = Approach(self._lobby, self, self._lobby.introduction)
        self._approach.dial(found, failure)

    def on_refused(self, refusal: Refusal) -> None:
        self._approach = None
        if not self._lobby.is_closed:
            self.reachability.on_refused(None if self._is_for_one_request else self, refusal)
        self._rest(refusal.least_wait_s)

    def on_link(self, link: Link, _said: Mapping[str, str]) -> None:
        """The link is ready for requests."""
        self._approach = None
        self.link = link
        self.reachability.on_connected(self)
        self._metrics.on_slot(1)
        self._wait()

    def on_failed(self, reason: OSError) -> None:
        """The hub cannot be reached."""
        self._approach = None
        if not self._lobby.is_closed:
            self.reachability.on_failed(reason)
        self._rest()

    def _rest(self, least_wait_s: float = 0.0) -> None:
        """Wait for the next try; or leave that to the next slot."""
        wait_s = least_wait_s + self.backoff.next_wait_s()
        if self._is_for_one_request and least_wait_s:
            self._lobby.rests_until = time.monotonic() + wait_s
        if self._is_for_one_request or self._lobby.is_closed:
            self._leave()
        else:
            self._wait_for(Stage.RESTING, wait_s)

    def _leave(self) -> None:
        """There is nothing more to be done for this slot."""
        self._wait_for(Stage.LEFT)
        self.must_move = not self._lobby.is_halted and self._lobby.is_closed
        approach, self._approach = self._approach, None
        if approach:
            approach.drop()
        self._lobby.seats.discard(self)
        self._inbox.put(None)

    # -- waiting with a link

    def _wait(self) -> None:
        assert self.link is not None
        self._wait_for(Stage.WAITING)
        self._lobby.wait_with(self.link, self._on_event)
        if self._lobby.is_closed:
            self._wait_no_longer()
        elif self.link.has_news():  # which has been received together with something else
            self._on_arrival(0)

    def _wait_no_longer(self) -> None:
        """A request that has come is served; and so is one that is on its way.

        The hub, which did not know of the halt, may have sent it on the heels of the last response.
        """
        assert self.link is not None
        self.set_deadline(self.link.free_since + CROSSING_S)
        self._on_arrival(0)

    def _on_event(self, events: int) -> None:
        assert self.link is not None
        with self._lock:  # the link may just be given back, and the event be the one that is waited for
            is_waiting = self.stage is Stage.WAITING
        if is_waiting:
            self._on_arrival(events)
        else:
            self._lobby.on_watched(self.link, events)

    def _on_arrival(self, events: int) -> None:
        """A request has come, or the end."""
        link = self.link
        assert link is not None
        has_come = link.take_in()
        if has_come is False:
            self._end_link(Ending.CLOSE)
        elif has_come:  # else the event was of a moment ago
            self._wait_for(Stage.SERVING)
            link.is_gone = bool(self._lobby.hang_up & events)
            self._lobby.watch_for(link, self._on_event)
            self._inbox.put(link)

    def _end_link(self, ending: Ending) -> None:
        link, now = self.link, time.monotonic()
        assert link is not None
        link.leave(ending)  # closing is not enough while another process holds it, too
        self._lobby.dismiss(link)
        self.link = None
        self._metrics.on_slot(-1)
        if not link.has_served and not self._lobby.is_closed:
            self.reachability.on_unused(link.opened_at, now)
        self.is_good = link.has_served or now - link.opened_at > BACKOFF_LAST_S
        if self.is_good:
            self.backoff.reset()
        if self._lobby.is_closed or self._is_for_one_request:
            self._leave()
        elif self.is_good:
            self._look_up()
        else:
            self._wait_for(Stage.RESTING, self.backoff.next_wait_s())


# ---- Several hubs: their bells -----------------------------------------------------------------------

CLAIM = b"HTTP/1.1 102 Processing\r\n\r\n"
TURN_AWAY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: hold\r\nContent-Length: 0\r\n\r\n"
QUEUE_SECONDS = re.compile(rb"\r\nPothead-Queue-Seconds: ([0-9]{1,12}(?:\.[0-9]{1,9})?)\r\n", re.IGNORECASE)
WAITING = re.compile(
    rb"\r\nPothead-Waiting: ([0-9]{1,9}); oldest=([0-9]{1,12}(?:\.[0-9]{1,9})?)\r\n", re.IGNORECASE
)


class KnownHub:
    """One of several hubs: one address, of which nobody knows yet whether it is another one's, too."""

    def __init__(self, introduction: Introduction, found: Sequence[AddressInfo], slots: str) -> None:
        """`found` has more than one address only if they are surely one machine's. `slots` is for the log."""
        url = introduction.url
        self.introduction = introduction
        self.found = found
        host = str(found[0][4][0])
        is_plain = is_loopback(url.address.host) or host == url.address.host
        self.name = str(url) if is_plain else f"{url} at {host}"
        self.reachability = Reachability(url, 1, slots, self.name)
        self.id = ""  # that it gives itself; another one after each start
        self.is_listed = True  # or its name has other addresses now
        self.twin: KnownHub | None = None  # is used in its place: the same hub at another address
        self.rests_until = -math.inf
        self._backoff = Backoff()
        self._round_trip_s = PATIENCE_S

    @property
    def patience_s(self) -> float:
        """How long an invited hub may take, before the slot is for the next in line."""
        return min(PATIENCE_S, max(LEAST_PATIENCE_S, 4 * self._round_trip_s))

    def on_agreed(self, after_s: float) -> None:
        self._round_trip_s += (after_s - self._round_trip_s) / 4
        self.reachability.on_connected(self)

    def rest(self, least_wait_s: float = 0.0) -> None:
        """It cannot be reached, or does not want us: leave it alone for a while."""
        now = time.monotonic()
        if now >= self.rests_until:
            self.rests_until = now + least_wait_s + self._backoff.next_wait_s()

    def rest_after(self, link: Link) -> None:
        """A connection has ended: was it good for nothing?"""
        if link.has_served or time.monotonic() - link.opened_at > BACKOFF_LAST_S:
            self._backoff.reset()
        else:
            self.rest()


class Wire:
    """The connection of a bell: says there what the line has decided, and tells the line what happens."""

    def __init__(self, board: Switchboard, bell: Bell[KnownHub]) -> None:
        self.bell = bell
        self.hub = bell.hub
        self.link: Link | None = None
        self.deadline = math.inf
        self._board = board
        self._lobby = board.lobby
        self._approach: Approach | None = None
        self._asked_at = 0.0
        self._next_step_at = self._late_at = math.inf

    def shake_hands(self) -> None:
        """Offer a slot there: on the connection that is held, or on a new one as soon as may be."""
        self._expect_answer()
        self._asked_at = time.monotonic()
        if self.link is None and self.hub.rests_until > self._asked_at:
            self.set_deadline(self.hub.rests_until)
            return
        self._approach = Approach(self._lobby, self, self.hub.introduction)
        if self.link:
            self._lobby.forget(self.link)
            self._approach.renew(self.link, self.hub.id)
        else:
            self._approach.dial(self.hub.found, OSError())

    def close(self) -> None:
        """Let go of the connection. What was not claimed there, the hub gives to somebody else."""
        approach, self._approach = self._approach, None
        link, self.link = self.link, None
        if approach:
            approach.drop()
        if link:
            link.leave(Ending.CLOSE)
            self._lobby.dismiss(link)

    # -- deadlines

    def set_deadline(self, deadline: float) -> None:
        self._next_step_at = deadline
        self._update_deadline()

    def _expect_answer(self) -> None:
        """If a slot is meant for this hub, it is so for a short time only."""
        self._late_at = time.monotonic() + self.hub.patience_s if self.bell.is_invited else math.inf
        self._update_deadline()

    def _update_deadline(self) -> None:
        self.deadline = min(self._next_step_at, self._late_at)
        self._lobby.wake_by(self.deadline)

    def on_deadline(self, now: float) -> None:
        if now >= self._late_at:
            self._late_at = math.inf
            self._update_deadline()
            if self.bell.is_invited:
                self._board.line.on_late(self.bell)
        if now >= self._next_step_at:
            self._next_step_at = math.inf
            if self._approach:
                self._approach.on_deadline()
            elif self.link is None:
                self.shake_hands()

    # -- how its approach ends

    def on_link(self, link: Link, said: Mapping[str, str]) -> None:
        now = time.monotonic()
        self._approach, self.link = None, link
        self.set_deadline(math.inf)
        if not self._board.may_use(self, said):
            return
        self.hub.on_agreed(now - self._asked_at)
        self._lobby.wait_with(link, self._on_event)
        self._board.line.on_agreed(self.bell, "POTHEAD_WAITING" in said)
        self._board.obey()
        self._look_for_news(link)

    def _look_for_news(self, link: Link) -> None:
        """Take what was received together with something else, if the link still waits."""
        if self.link is link and self.bell.state is BellState.WAITING and link.has_news():
            self._on_arrival(0)

    def on_failed(self, reason: OSError) -> None:
        self._approach = None
        if not self._lobby.is_halted:
            self.hub.reachability.on_failed(reason)
        self.hub.rest()
        self._board.on_unwanted(self)

    def on_refused(self, refusal: Refusal) -> None:
        """Why a held connection ends is told when the next one is refused, if that is."""
        self._approach = None
        is_held = self.link is not None
        if not (self._lobby.is_halted or (is_held and refusal.kind == "closed")):
            self.hub.reachability.on_refused(self.hub, refusal)
        if not is_held or refusal.least_wait_s:
            self.hub.rest(refusal.least_wait_s)
        self._board.on_unwanted(self)

    # -- what comes on the link

    def _on_event(self, events: int) -> None:
        assert self.link is not None
        if self.bell.state is BellState.WAITING:
            self._on_arrival(events)
        elif self.bell.state is BellState.SERVING:
            self._lobby.on_watched(self.link, events)
        elif events & ~(select.POLLIN | select.POLLOUT):
            self._on_gone()

    def _on_gone(self) -> None:
        assert self.link is not None
        self.hub.rest_after(self.link)
        self._board.on_gone(self)

    def _on_arrival(self, events: int) -> None:
        """The bell rings, or the hub has gone: then nobody wants an answer."""
        link = self.link
        assert link is not None
        has_come: bool | None = True
        try:
            while (head := link.intake.peek_head(MAX_HEAD_BYTES)) is None and has_come:
                has_come = link.take_more()
        except ProtocolError as exc:
            self.hub.reachability.on_nonsense(str(exc))
            has_come = False
        if has_come is False or (head and (events & self._lobby.hang_up or link.peek() == b"")):
            self._on_gone()
        elif head:
            self._on_ring(head)

    def _on_ring(self, head: bytes) -> None:
        line, now = self._board.line, time.monotonic()
        queued = QUEUE_SECONDS.search(head)
        waiting = WAITING.search(head)
        behind = Waiting(int(waiting[1]), now - float(waiting[2]), now) if waiting else None
        age = now - float(queued[1]) if queued else now
        self.hub.reachability.on_request()
        if line.on_ring(self.bell, age, behind):
            self._claim()
        else:
            self._turn_away()
        self._board.obey()

    def _claim(self) -> None:
        assert self.link is not None
        if self.link.try_to_send(CLAIM):
            self._lobby.watch_for(self.link, self._on_event)
            self._board.serve(self)
        else:
            self._on_gone()
            self._board.line.on_free()

    def _turn_away(self) -> None:
        """What has come of the request, and will, is skipped by the next handshake."""
        assert self.link is not None
        self.link.intake.take_received()
        if self.link.try_to_send(TURN_AWAY):
            self._lobby.watch_for(self.link, self._on_event)
        else:
            self._on_gone()

    def on_response(self) -> None:
        """The response has ended, and the line knows what the connection is now."""
        link = self.link
        assert link is not None
        if self.bell.state is BellState.WAITING:
            self._expect_answer()
            self._lobby.wait_with(link, self._on_event)
            self._look_for_news(link)
        else:
            self._lobby.watch_for(link, self._on_event)


class Berth:
    """A slot's place at the switchboard: it is given links with requests that have been claimed."""

    is_good = True  # whatever the last connection was: there are others
    is_last = False  # no request is the last one of its connection
    claims = True  # requests, one by one

    def __init__(self, board: Switchboard, metrics: Metrics, is_for_one_request: bool) -> None:
        self.link: Link | None = None
        self.wire: Wire | None = None
        self.is_held = False  # as the response at hand has told the hub
        self.must_move = False  # it has been left, but there are other places
        self.is_for_one_request = is_for_one_request
        self._board = board
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[Link | None] = queue.SimpleQueue()

    # -- for its slot

    @property
    def is_offered(self) -> bool:
        return self.link is not None or self._board.is_reached

    @property
    def reachability(self) -> Reachability:
        assert self.wire is not None
        return self.wire.hub.reachability

    def take(self) -> Link | None:
        """Return a link with a request on it, or None when there will be no more of them."""
        return self._inbox.get()

    def must_hold(self, is_early: bool) -> bool:
        """Return whether the response has to hold its connection; early is long before its end."""
        assert self.wire is not None
        self.is_held = is_early or self._board.line.must_hold(self.wire.hub)
        return self.is_held

    def give_back(self, ending: Ending) -> None:
        self._board.lobby.order(self._board.on_response, self, ending)

    # -- for the lobby

    def begin(self) -> None:
        self._metrics.on_slot(1)
        self._board.take_in(self)

    def serve(self, wire: Wire) -> None:
        assert wire.link is not None
        self.wire, self.link, self.is_held = wire, wire.link, False
        self._inbox.put(wire.link)

    def leave(self) -> None:
        self._metrics.on_slot(-1)
        self.must_move = self._board.is_over and not self._board.lobby.is_halted
        self._inbox.put(None)


class Switchboard:
    """Offers the slots of this process at several hubs at once. It lives in the lobby's thread.

    Names of hubs are looked up again every few seconds. A hub that comes is joined; one that has gone from
    its name is used until it refuses.
    """

    def __init__(
        self,
        lobby: Lobby,
        urls: Sequence[HubURL],
        credentials: Credentials,
        count_slots: Callable[[], int],
        description: str,
        on_lonely: Callable[[KnownHub], object],
    ) -> None:
        """`count_slots` tells how many to announce; the description is for the log. Raises ValueError.

        `on_lonely` is told of a hub that does not know claims, if no other one does, either: it is to be used
        alone, without the switchboard, which ends.
        """
        self.lobby = lobby
        self._on_lonely = on_lonely
        self.is_over = False
        self.line: Line[KnownHub] = Line(MAX_BELLS)
        self._id = secrets.token_hex(8)
        self._count_slots = count_slots
        self._description = description
        self._introductions = [Introduction(url, credentials, self._claim_lines) for url in urls]
        self._hubs: dict[tuple[HubURL, object], KnownHub] = {}
        self._wires: dict[Bell[KnownHub], Wire] = {}
        self._idle: list[Berth] = []
        self._looks_at = -math.inf
        self._being_looked_up: set[HubURL] = set()
        self._unknown: set[HubURL] = set()  # whose name has no address, as has been said

    def _claim_lines(self) -> list[str]:
        return ["Pothead-Claim: 102", f"Pothead-Worker: {self._id}; slots={self._count_slots()}"]

    @property
    def is_reached(self) -> bool:
        """Whether one of the hubs could be reached the last time. For any thread."""
        return any([hub.reachability.is_reached for hub in list(self._hubs.values())])

    # -- as a guest of the lobby

    @property
    def deadline(self) -> float:
        if self.is_closed:
            return math.inf
        return min([self._looks_at, *[wire.deadline for wire in self._wires.values()]])

    def begin(self) -> None:
        self.lobby.guests.append(self)
        if self.is_closed:
            self.on_halt()
        else:
            self._look_around()

    def on_deadline(self) -> None:
        now = time.monotonic()
        for wire in [wire for wire in self._wires.values() if wire.deadline <= now]:
            wire.on_deadline(now)
        if now >= self._looks_at:
            self._look_around()
        self.obey()

    @property
    def is_closed(self) -> bool:
        return self.is_over or self.lobby.is_halted

    def on_halt(self) -> None:
        """What has not been claimed, the hubs give to others as soon as the connections end."""
        self._looks_at = math.inf
        for wire in list(self._wires.values()):
            if wire.bell.state is not BellState.SERVING:
                self._drop(wire)
        for berth in self._idle:
            berth.leave()
        self._idle.clear()

    # -- for berths

    def take_in(self, berth: Berth) -> None:
        """A slot is free from now on."""
        if self.is_closed:
            berth.leave()
            return
        self._idle.append(berth)
        self.line.on_free()
        self.obey()

    def serve(self, wire: Wire) -> None:
        """Have a request served that has been claimed."""
        self._idle.pop().serve(wire)

    def on_response(self, berth: Berth, ending: Ending) -> None:
        """A slot has done with a request."""
        wire = berth.wire
        assert wire is not None and wire.link is not None
        berth.wire = berth.link = None
        stays = not (berth.is_for_one_request or self.is_closed)
        if stays:
            self._idle.append(berth)
        if ending is Ending.KEEP and not (wire.link.is_gone or self.is_closed):
            self.line.on_response(wire.bell, berth.is_held, stays)
            if wire.bell.state is BellState.GONE:
                self._drop(wire)
            else:
                wire.on_response()
        else:
            wire.link.leave(ending)
            wire.hub.rest_after(wire.link)
            self.on_gone(wire)
            if stays:
                self.line.on_free()
        self.obey()
        if not stays:
            berth.leave()

    # -- for wires

    def on_gone(self, wire: Wire) -> None:
        """Its connection has ended."""
        self._drop(wire)
        self.line.on_gone(wire.bell)
        self.obey()

    def on_unwanted(self, wire: Wire) -> None:
        """The hub could not be reached, or has refused."""
        if not wire.hub.is_listed:
            self._stop(wire.hub)
            self._hubs = {key: hub for key, hub in self._hubs.items() if hub is not wire.hub}
        self.on_gone(wire)

    def may_use(self, wire: Wire, said: Mapping[str, str]) -> bool:
        """Look at what the hub has said of itself; if it is not to be used, see to that."""
        hub = wire.hub
        if said.get("POTHEAD_CLAIM") != "102" and not any([each.id for each in self._hubs.values()]):
            log.warning("hub %s does not let a worker have other hubs beside it; it is used alone", hub.name)
            self.is_over = True
            self._drop(wire)
            self._on_lonely(hub)
            self.on_halt()  # at last: slots go where there is something now
            return False
        if said.get("POTHEAD_CLAIM") != "102":
            text = "does not let a worker have other hubs beside it; it is not used"
            wire.on_refused(Refusal(text, "claim", BACKOFF_REFUSED_S))
            return False
        hub.id = said.get("POTHEAD_HUB", "")
        same = [each for each in self._hubs.values() if each.id == hub.id and each is not hub]
        hub.twin = next((each for each in same if each.twin is None and each.reachability.is_reached), None)
        if hub.twin is None:
            return True
        log.info("hub %s is the same as %s, and used once", hub.name, hub.twin.name)
        self._stop(hub)
        self.obey()
        return False

    def _drop(self, wire: Wire) -> None:
        wire.close()
        self._wires.pop(wire.bell, None)

    def _stop(self, hub: KnownHub) -> None:
        """Use a hub no longer; what runs there goes on."""
        for bell in self.line.bells_of(hub):
            if bell.state is not BellState.SERVING and bell in self._wires:
                self._drop(self._wires[bell])
        self.line.leave(hub)

    def obey(self) -> None:
        """Do what the line has decided. To be called after whatever it was told."""
        while (orders := self.line.take_orders()) and not self.is_closed:
            for bell in orders:
                if bell.state is BellState.COMING:  # and has not gone meanwhile
                    self._wires.setdefault(bell, Wire(self, bell)).shake_hands()

    # -- which hubs there are

    def _look_around(self) -> None:
        """Join the hubs that there are; again and again, if there are names or addresses of the same hub."""
        self._looks_at = math.inf
        for introduction in self._introductions:
            url = introduction.url
            if is_address(url.address.host):
                self._on_found(introduction, look_up(url.address))
                continue
            self._looks_at = time.monotonic() + LOOK_UP_INTERVAL_S
            if url not in self._being_looked_up:
                self._look_up(introduction)
        for hub in [hub for hub in self._hubs.values() if hub.twin]:
            self._looks_at = time.monotonic() + LOOK_UP_INTERVAL_S
            if hub.twin and (hub.twin not in self._hubs.values() or not hub.twin.reachability.is_reached):
                hub.twin = None
                self.line.join(hub)
        self.lobby.wake_by(self._looks_at)
        self.obey()

    def _look_up(self, introduction: Introduction) -> None:
        """Have a thread ask, which may take its time."""

        def ask() -> None:
            self.lobby.order(self._on_answer, introduction, look_up(introduction.url.address))

        try:
            start_thread(ask, "resolver")
        except OSError as exc:
            log.warning("names are not looked up for now: %s", exc)
        else:
            self._being_looked_up.add(introduction.url)

    def _on_answer(self, introduction: Introduction, found: Sequence[AddressInfo] | OSError) -> None:
        self._being_looked_up.discard(introduction.url)
        if not self.is_closed:
            self._on_found(introduction, found)

    def _on_found(self, introduction: Introduction, found: Sequence[AddressInfo] | OSError) -> None:
        """These are the addresses of a name; if it could not be looked up, the last ones are good."""
        url = introduction.url
        if isinstance(found, OSError):
            if url not in self._unknown:
                self._unknown.add(url)
                log.warning("hub %s unreachable, trying again: %s", url, found.strerror or found)
            return
        self._unknown.discard(url)
        is_one = is_loopback(url.address.host)
        there = {(url, None): found} if is_one else {(url, each[4]): [each] for each in found}
        for key, hub in self._hubs.items():
            hub.is_listed = key in there or key[0] != url
        for key, infos in there.items():
            if key not in self._hubs:
                self._hubs[key] = KnownHub(introduction, infos, self._description)
                self.line.join(self._hubs[key])
        self.obey()


# ---- Slots -------------------------------------------------------------------------------------------


class Slot:
    """A thread that serves one request at a time. Whatever the app does, it lives until the halt.

    With an offer of a gate, it serves a single request.
    """

    def __init__(self, pool: WorkerPool, halt: Halt, seat: Seat | Berth, offer: Offer | None) -> None:
        self.seat = seat
        self.offer = offer
        self.is_done = False  # it has had its one request
        self._pool = pool
        self._halt = halt
        self._status = GONE_STATUS
        self._exchange: Exchange | None = None
        self._poller: select.poll | None = None  # of a link with which it waits itself
        self._may_take = True  # a request from the link that it has

    def run(self) -> None:
        try:
            while True:
                if (link := self.seat.take()) is not None:
                    self.seat.give_back(self._serve(link))
                elif not self._pool.move(self):
                    break
        finally:
            if self.offer:
                self.offer.close(self.seat.is_good)
            self._pool.on_slot_end(self)

    def _serve(self, link: Link) -> Ending:
        """Serve one request, and those that follow soon: to be given a link by the lobby takes longer.

        When none was soon after the one before, none is expected to be, and the link is given back at once.
        """
        self._poller, self._may_take = None, True
        if time.monotonic() - link.free_since < HAND_BACK_S and not self.seat.claims:
            self._poller = select.poll()
            self._poller.register(self._halt, select.POLLIN)
            self._poller.register(link, select.POLLIN)
        try:
            ending = RequestHandler(link, self).ending
        except Exception:
            log.exception("a fault of the worker itself")
            ending = Ending.CUT
        if ending is not Ending.KEEP:
            link.leave(ending)
        return ending

    # -- as the keeper of its requests

    def has_next(self, link: Link) -> bool:
        if not self._may_take:
            return False
        if link.has_news():
            return True
        if self._poller is None:
            return False
        fd = link.fileno()
        is_readable = any([ready == fd for ready, _ in self._poller.poll(HAND_BACK_S * 1000)])
        return is_readable and link.has_news(is_readable)

    def answer(self, exchange: Exchange) -> Ending:
        link = exchange.link
        link.has_served = True
        self._may_take = not self.seat.claims
        self.is_done = self.offer is not None
        self._exchange = exchange
        link.when_gone(exchange.cancel)
        try:
            if not exchange.cancelled.is_set():
                return self._answer_and_count(exchange)
            log.info("request %s: the consumer had gone before it began", exchange.request_id)
            return Ending.CUT
        finally:
            link.disregard()
            exchange.disregard()
            self._exchange = None
            link.free_since = time.monotonic()

    def _answer_and_count(self, exchange: Exchange) -> Ending:
        self._status = GONE_STATUS
        began_at = time.monotonic()
        self.seat.reachability.on_request()
        self._pool.metrics.on_request()
        self._pool.tenure.on_request()
        try:
            return self._pool.server.answer(exchange)
        finally:
            self._pool.metrics.on_response(self._status, time.monotonic() - began_at)
            self._pool.tenure.on_response()

    def is_last(self) -> bool:
        return self.seat.is_last or self._halt.is_set()

    def must_hold(self, is_early: bool = False) -> bool:
        return self.seat.must_hold(is_early)

    def on_environ(self, environ: WSGIEnvironment) -> None:
        if self.offer:
            self.offer.on_request(environ)

    def on_status(self, status: str) -> None:
        self._status = status[:3]

    def on_consumer_gone(self, exchange: Exchange) -> None:
        log.info("request %s: %s", exchange.request_id, exchange.why_cancelled)

    def on_response(self, status_line: str) -> None:
        self.seat.reachability.on_response(status_line)

    # -- for other threads

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served."""
        return self._exchange is not None

    def abort(self) -> bool:
        """Cut the connection off; return whether a request was being served."""
        link, exchange = self.seat.link, self._exchange
        if exchange:
            exchange.cancel("cut off: the worker stops at once")
        for each in (link, exchange and exchange.consumer):
            if each:
                each.cut()
        return exchange is not None


# ---- Gates: a connection only when there is room for a job -------------------------------------------

Gate = Callable[[Callable[[], bool]], object]


class Offer:
    """What a gate let through: one connection for one request. Tells the gate's object how it goes."""

    def __init__(self, gate_loop: GateLoop, reservation: object) -> None:
        self._gate_loop = gate_loop
        self._has_request = False
        self._request_received = getattr(reservation, "request_received", None)
        self._done = getattr(reservation, "done", None)
        # Whether the gate gets to know when the job is over; one that is made of several may say otherwise.
        self.is_counted = bool(getattr(reservation, "is_counted", self._done is not None))
        self._lock = threading.Lock()

    def on_request(self, environ: WSGIEnvironment) -> None:
        self._has_request = True
        self._tell(self._request_received, environ)
        self._gate_loop.on_request()

    def close(self, is_good: bool) -> None:
        """The connection has ended, which was good for something or not."""
        if not self._has_request:
            self._gate_loop.on_unused(is_good)  # before the gate opens again
        self.end()

    def end(self) -> None:
        """The job is over, or never came; only the first call counts."""
        with self._lock:
            done, self._done = self._done, None
        self._tell(done)

    @staticmethod
    def _tell(method: Callable[..., object] | None, *arguments: object) -> None:
        if method is None:
            return
        try:
            with app_code():
                method(*arguments)
        except BaseException:
            log.exception("the gate's %s raised an exception", getattr(method, "__name__", method))


class GateLoop:
    """Asks the gate again and again, and has a slot opened each time it returns.

    It does not wait until the slot has got its request: a gate that counts its jobs may let several through
    at once. One that returns nothing to count with would let through any number of them, so it is asked
    again only when no connection is waiting.
    """

    def __init__(self, gate: Gate, halt: Halt, open_slot: Callable[[Offer], None], metrics: Metrics) -> None:
        self._gate = gate
        self._halt = halt
        self._open_slot = open_slot
        self._metrics = metrics
        self._backoff = Backoff()
        self._lock = threading.Lock()
        self._waiting = 0
        self._max_waiting = 1
        self._has_failed = False

    def run(self) -> None:
        while not self._halt.wait(unless=lambda: self._waiting < self._max_waiting):
            try:
                self._let_one_through()
            except BaseException:
                log.exception("the gate raised an exception")
                self._pause()

    def _pause(self) -> None:
        self._has_failed = False
        self._halt.wait(self._backoff.next_wait_s())

    def _let_one_through(self) -> None:
        asked_at = time.monotonic()
        with app_code():
            offer = Offer(self, self._gate(self._halt.is_set))
        self._metrics.on_gate(time.monotonic() - asked_at)
        self._max_waiting = MAX_WAITING_OFFERS if offer.is_counted else 1
        if self._has_failed:  # here and not before: the gate may have been waiting all the time
            self._pause()
        if self._halt.is_set():
            offer.end()
            return
        with self._lock:
            self._waiting += 1
        self._open_slot(offer)

    def on_request(self) -> None:
        """An offer has been taken. Called by the slots' threads, as is `on_unused`."""
        self._backoff.reset()
        self._on_taken()

    def on_unused(self, is_good: bool) -> None:
        self._has_failed = self._has_failed or not is_good
        self._on_taken()

    def _on_taken(self) -> None:
        with self._lock:
            self._waiting -= 1
        self._halt.notify()


# ---- The pool ----------------------------------------------------------------------------------------


class Tenure:
    """How long the worker stays: until it has had nothing to do for some time, or enough to do."""

    def __init__(
        self, leave: Callable[[str], None], halt: Halt, idle_timeout_s: float, max_requests: float
    ) -> None:
        """`leave` is called with the reason, before the halt, and returns soon."""
        self._leave = leave
        self._halt = halt
        self._idle_timeout_s = idle_timeout_s
        self._left = max_requests
        self._is_limited = min(idle_timeout_s, max_requests) < math.inf
        self._busy = 0
        self._idle_since = time.monotonic()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Raises OSError."""
        if self._idle_timeout_s < math.inf:
            start_thread(self._watch, "idle")

    def on_request(self) -> None:
        if not self._is_limited:
            return
        with self._lock:
            self._busy += 1
            self._left -= 1
            has_enough = not self._left
        if has_enough:
            self._leave("it has had its number of requests")

    def on_response(self) -> None:
        if not self._is_limited:
            return
        with self._lock:
            self._busy -= 1
            self._idle_since = time.monotonic()

    def _watch(self) -> None:
        while (left_s := self._left_s()) > 0:
            if self._halt.wait(min(left_s, LONGEST_POLL_S)):
                return
        self._leave(f"it has had nothing to do for {self._idle_timeout_s:g} s")

    def _left_s(self) -> float:
        """Return how long the worker stays at least, whatever comes or does not."""
        with self._lock:
            if self._busy:
                return self._idle_timeout_s
            return self._idle_since + self._idle_timeout_s - time.monotonic()


Hub = str | tuple[str, int] | HubURL  # as a program may name it


def resolve_hubs(connect: Hub | Sequence[Hub]) -> Sequence[Address | HubURL]:
    """Raises ValueError."""
    match connect:
        case str():
            return parse_hubs(connect)
        case HubURL():
            return [connect]
        case (str(host), int(port)):
            return [Address(host, port)]
    return check_hubs([hub for each in connect for hub in resolve_hubs(each)])


def introduce(hub: Address | HubURL, credentials: Credentials) -> Introduction | None:
    """Return what is said to a hub, if anything. Raises ValueError."""
    if isinstance(hub, HubURL):
        return Introduction(hub, credentials)
    if credentials != Credentials():
        raise ValueError(f"{hub} is a port where nothing is said; origins and credentials need https://")
    return None


class WorkerPool:
    """The slots of one application. It installs no signal handlers and may be run in any thread.

    `run()` serves until another thread calls `stop()`, which lets running requests finish, or `stop_now()`.
    A pool runs once.
    """

    def __init__(
        self,
        application: WSGIApplication | Forwarder | None,
        connect: Hub | Sequence[Hub] = "localhost:4040",
        workers: int = 1,
        graceful_timeout_s: float = 30.0,
        *,
        poll_jobs: bool = False,
        fork_server: ForkServer | None = None,
        request_timeout_s: float = math.inf,
        pickups: PickupPort | None = None,
        metrics: Metrics | None = None,
        credentials: Credentials | None = None,
        idle_timeout_s: float = math.inf,
        max_requests: float = math.inf,
    ) -> None:
        """`application` is an app, or a Forwarder to a program that serves in its place.

        With `poll_jobs`, `application.wait_for_slot` says when there is room for a job, and `workers` has no
        meaning. With a fork server, its own app is what serves, and a request may have a time limit;
        `application` is needed for its gate only. The pool ends the fork server and the pickup port.

        `connect` is `host:port` of the hub's silent port, or a URL of the port where it speaks PTTH, which
        `credentials` are for. Of several hubs there are URLs only: in a list, or with commas between them.

        After `idle_timeout_s` without a request, or when `max_requests` have come, the pool ends as if it
        had been stopped, but gives running requests all the time they need.

        Raises ValueError for another address, for credentials that cannot be used, for less than one worker,
        and if there is no app or no gate.
        """
        if workers < 1:
            raise ValueError("workers must be at least 1")
        if application is None and fork_server is None:
            raise ValueError("there is no application")
        self.gate = find_gate(application) if poll_jobs else None
        self.metrics = metrics or Metrics()
        self.fork_server = fork_server
        self._application = application
        self._request_timeout_s = request_timeout_s
        self.pickups = pickups
        self.hubs = resolve_hubs(connect)
        self._credentials = credentials or Credentials()
        self.introduction, *_ = [introduce(hub, self._credentials) for hub in self.hubs]
        self.workers = workers
        self.graceful_timeout_s = graceful_timeout_s
        self._lock = threading.RLock()
        self._halt: Halt | None = None
        self.switchboard: Switchboard | None = None  # with several hubs
        self._has_moved = False  # once is enough
        self._slots: list[Slot] = []
        self._numbers = itertools.count(1)
        self._is_gate_open = poll_jobs  # or there is none
        self._is_stopping = False
        self.was_cut_off = False
        self._timer: threading.Timer | None = None
        self._ended = threading.Event()
        self._idle_timeout_s = idle_timeout_s
        self._max_requests = max_requests

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
            hub = self.hubs[0]
            self.reachability = self._make_reachability(hub)
            address = hub.address if isinstance(hub, HubURL) else hub
            self.lobby = Lobby(address, halt, self._on_end, self.introduction)
            if len(self.hubs) > 1:
                self._open_switchboard()
            elif isinstance(hub, HubURL) and not (is_address(address.host) or is_loopback(address.host)):
                self.lobby.when_found = self._on_found
                self.lobby.order(Lookout(self.lobby).begin)
            self.server = self._make_server(halt)
            if self.pickups:
                self.pickups.start()
            if self._is_stopping:
                halt.set()
            self.lobby.start()
            self.tenure = Tenure(self._retire, halt, self._idle_timeout_s, self._max_requests)
            self.tenure.start()
            if self.gate:
                self._gate_loop = GateLoop(self.gate, halt, self._open_gated_slot, self.metrics)
                gate_thread = start_thread(self._gate_loop.run, "gate")
                start_thread(functools.partial(self._wait_for_gate, gate_thread), "gate-end")
                return
            for _ in range(self.workers):
                self._open_slot()

    def _make_server(self, halt: Halt) -> Server:
        if self.fork_server:
            return ProcessServer(self.fork_server, halt, self._request_timeout_s, self.pickups, self.lobby)
        assert self._application is not None
        server: Server
        if isinstance(self._application, Forwarder):
            server = self._application
        else:
            server = AppServer(self._application)
        return DetouringServer(server, self.pickups, self.lobby) if self.pickups else server

    def _open_slot(self, offer: Offer | None = None) -> None:
        """Raises OSError."""
        assert self._halt is not None
        seat = self._make_seat(offer)
        slot = Slot(self, self._halt, seat, offer)
        with self._lock:
            start_thread(slot.run, f"slot-{next(self._numbers)}")
            self._slots.append(slot)
        self.lobby.order(seat.begin)

    def _make_reachability(self, hub: Address | HubURL) -> Reachability:
        return Reachability(hub, 1 if self.gate else self.workers, self._description)

    @property
    def _description(self) -> str:
        return "gated" if self.gate else f"slots={self.workers}"

    # -- with several hubs

    def _open_switchboard(self) -> None:
        urls = [each for each in self.hubs if isinstance(each, HubURL)]
        self.switchboard = Switchboard(
            self.lobby, urls, self._credentials, self._count_slots, self._description, self._on_lonely
        )
        self.lobby.order(self.switchboard.begin)

    def _on_found(self, found: Sequence[AddressInfo]) -> None:
        """The name of the hub has been looked up: is there more than one? Called by the lobby's thread."""
        if len({each[4] for each in found}) > 1 and not self._has_moved:
            self._has_moved = True
            self._open_switchboard()
            self.lobby.close_seats()

    def _on_lonely(self, hub: KnownHub) -> None:
        """A hub is to be used alone. Called by the lobby's thread."""
        url = hub.introduction.url
        self.reachability = self._make_reachability(url)
        self.lobby.open_seats(Introduction(url, self._credentials), hub.found)
        self.switchboard = None

    def move(self, slot: Slot) -> bool:
        """Give a slot that has left its place another one, if there are others; return whether that is so."""
        assert self._halt is not None
        if self._halt.is_set() or slot.is_done or not slot.seat.must_move:
            return False
        slot.seat = self._make_seat(slot.offer)
        self.lobby.order(slot.seat.begin)
        return True

    def _make_seat(self, offer: Offer | None) -> Seat | Berth:
        is_for_one_request = offer is not None
        if self.switchboard:
            return Berth(self.switchboard, self.metrics, is_for_one_request)
        return Seat(self.lobby, self.reachability, self.metrics, is_for_one_request)

    def _count_slots(self) -> int:
        """Return how many a hub is told of."""
        return max(1, len(self._slots)) if self.gate else self.workers

    def _open_gated_slot(self, offer: Offer) -> None:
        try:
            self._open_slot(offer)
        except OSError as exc:
            self.reachability.on_failed(exc)
            offer.close(is_good=False)

    def join(self) -> bool:
        """Wait until the pool has ended. Return True if every request could be finished."""
        self._ended.wait()
        if self.pickups:
            self.pickups.close()
        if self.fork_server:
            self.fork_server.close()
        return not self.was_cut_off

    def stop(self) -> None:
        """Take no more requests, let running ones finish in the graceful time, and end. Returns at once."""
        with self._lock:
            if self._is_stopping:
                return
            self._is_stopping = True
            if self._halt and not self._ended.is_set():
                self._schedule(self.graceful_timeout_s, self.stop_now)
                self._halt.set()

    def _retire(self, reason: str) -> None:
        """Drain for however long that takes, unless the pool is stopped meanwhile."""
        assert self._halt is not None
        with self._lock:
            if not (self._is_stopping or self._ended.is_set()):
                log.info("draining: %s", reason)
                self._halt.set()

    def stop_now(self) -> None:
        """Cut running requests off and end. Returns at once."""
        with self._lock:
            self._is_stopping = True
            if self._halt is None or self._ended.is_set():
                return
            self._halt.set()
            busy = sum([slot.abort() for slot in self._slots])
            if busy:
                self.was_cut_off = True
                log.warning("stopping at once: running requests cut off: %d", busy)
            if not self._schedule(STOP_NOW_GRACE_S, self._ended.set):
                self._ended.set()

    def leave(self) -> None:
        """Tell the gate of the jobs that were cut off and still run, since the process ends now."""

        def tell() -> None:
            for offer in offers:
                offer.end()

        with self._lock:
            offers = [slot.offer for slot in self._slots if slot.offer]
        with contextlib.suppress(OSError):
            start_thread(tell, "leave").join(STOP_NOW_GRACE_S)  # a gate must not keep the process, either

    def _schedule(self, wait_s: float, action: Callable[[], None]) -> bool:
        if self._timer:
            self._timer.cancel()
        self._timer = threading.Timer(wait_s, action)
        return try_to_start(self._timer)

    # -- what it does right now

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping or (self._halt is not None and self._halt.is_set())

    @property
    def is_connected(self) -> bool:
        """Whether the hub could be reached the last time."""
        return self._halt is not None and (self.switchboard or self.reachability).is_reached

    def count(self) -> tuple[int, int]:
        """Return how many slots wait for a request and how many serve one."""
        with self._lock:
            busy = sum(slot.is_busy for slot in self._slots)
            return sum(slot.seat.is_offered for slot in self._slots) - busy, busy

    def wait_for_drain(self, sock: socket.socket) -> bool:
        """Return whether the pool began to stop before the other end of `sock` left or sent something."""
        try:
            assert self._halt is not None
            return self.is_stopping or not wait_ready(sock.fileno(), select.POLLIN, halt=self._halt)
        except ValueError:  # it has ended meanwhile, and with it the halt
            return True

    def wait_for_end(self, timeout_s: float) -> bool:
        return self._ended.wait(timeout_s)

    # -- its end

    def on_slot_end(self, slot: Slot) -> None:
        """Called by each slot's thread as its last act."""
        with self._lock:
            self._slots.remove(slot)
            self._end_if_last()

    def _wait_for_gate(self, gate_thread: threading.Thread) -> None:
        """Wait until the gate's thread has ended, or does not listen to `halt()`."""
        assert self._halt is not None
        wait_ready(self._halt.fileno(), select.POLLIN)  # its `wait` would wake up with each request, too
        gate_thread.join(GATE_GRACE_S)
        with self._lock:
            if gate_thread.is_alive() and not self._ended.is_set():
                log.warning("leaving without the gate, which does not listen to halt()")
            self._is_gate_open = False
            self._end_if_last()

    def _end_if_last(self) -> None:
        """The last one puts out the light."""
        if not (self._slots or self._is_gate_open):
            self.lobby.order(self.lobby.end)

    def _on_end(self) -> None:
        """Called by the lobby's thread as its last act."""
        assert self._halt is not None
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._halt.close()
            self._ended.set()


# ---- Inspection --------------------------------------------------------------------------------------


class Inspection:
    """The pages of --inspection-port."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.pages: Mapping[str, PageMaker] = {
            "/inspect": self._inspect,
            "/apocalypse": self._apocalypse,
            "/livez": self._livez,
            "/readyz": self._readyz,
        }

    def _inspect(self, _visitor: socket.socket) -> Page:
        waiting, busy = self._pool.count()
        numbers = {"requests_pending": busy, "slots_waiting": waiting}
        return Page(json.dumps(numbers).encode() + b"\n", content_type="application/json")

    def _livez(self, _visitor: socket.socket) -> Page:
        return Page(b"ok\n")

    def _readyz(self, _visitor: socket.socket) -> Page:
        if self._pool.is_stopping:
            return Page(b"draining\n", "503 Service Unavailable")
        if not self._pool.is_connected:
            return Page(b"not connected to the hub\n", "503 Service Unavailable")
        return Page(b"ok\n")

    def _apocalypse(self, visitor: socket.socket) -> Page:
        return Page(self._tell_of_drain(visitor))

    def _tell_of_drain(self, visitor: socket.socket) -> Iterator[bytes]:
        """Tell how a drain goes on, from before its beginning to its end."""
        if not self._pool.is_stopping:
            yield b"waiting for a drain to begin\n"
        if not self._pool.wait_for_drain(visitor):
            return
        told, has_ended = -1, False
        while not has_ended:
            _, busy = self._pool.count()
            if busy != told:
                yield b"draining: %d running\n" % busy
                told = busy
            has_ended = self._pool.wait_for_end(PROGRESS_INTERVAL_S)
        yield b"cut off\n" if self._pool.was_cut_off else b"drained\n"


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


def compress(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """Yield after each piece that was read: even an empty one lets the worker stop a job nobody waits for."""
    import lzma  # here, because a Python may have been built without it

    start_response("200 OK", [("Content-Type", "application/x-xz")])
    compressor = lzma.LZMACompressor(preset=0)
    cancelled = environ["pothead.cancelled"]
    while not cancelled.is_set() and (data := environ["wsgi.input"].read(RECEIVE_BYTES)):
        yield compressor.compress(data)
    if not cancelled.is_set():
        yield compressor.flush()


class CountingGate:
    """Lets so many jobs run at the same time."""

    def __init__(self, jobs: int) -> None:
        self._free = threading.Semaphore(jobs)

    def __call__(self, halt: Callable[[], bool]) -> object:
        while not halt():
            if self._free.acquire(timeout=0.1):
                return self
        return None

    def done(self) -> None:
        self._free.release()


@functools.cache
def make_demo_gate() -> Gate:
    """Return a gate on idle CPUs; if gating.py is not at hand, one that lets a job run for each CPU."""
    try:
        gate: Gate = importlib.import_module("gating").wait_for_idle_cpus(1)
    except ImportError:
        gate = CountingGate(os.cpu_count() or 1)
    return gate


def demo_gate(halt: Callable[[], bool]) -> object:
    """Say when there is room for another job, under --poll-jobs."""
    return make_demo_gate()(halt)


demo_app.wait_for_slot = demo_gate  # type: ignore[attr-defined]  # as any app may do it


# ---- Loading an application --------------------------------------------------------------------------

DOTTED_NAME = re.compile(r"\w+(?:\.\w+)*")
DEFAULT_ATTRIBUTES = ("app", "application")


class LoadError(Exception):
    """The application could not be loaded; the text is for the user, as is the trace of its own failure."""

    def __init__(self, text: str, trace: str = "") -> None:
        super().__init__(text)
        self.trace = trace


Arguments = tuple[list[object], dict[str, object]]


def split_app_name(text: str) -> tuple[str, str, Arguments | None]:
    """Understand `module`, `module:attribute` or `module:factory('x', y=1)`. Raises ValueError.

    Return the module, the attribute, and the arguments of the factory, if it is one.
    """
    module, colon, wanted = text.partition(":")
    expression: ast.expr | None = None
    with contextlib.suppress(SyntaxError):
        expression = ast.parse(wanted, mode="eval").body
    call = expression if isinstance(expression, ast.Call) else None
    named = call.func if call else expression
    attribute = ast.unparse(named) if isinstance(named, (ast.Name, ast.Attribute)) else ""
    if not DOTTED_NAME.fullmatch(module) or (colon and not DOTTED_NAME.fullmatch(attribute)):
        raise ValueError(f"{text!r} is not MODULE:APP, like mypackage.mymodule:app or mymodule:create_app()")
    return module, attribute, literal_arguments(text, call) if call else None


def literal_arguments(text: str, call: ast.Call) -> Arguments:
    """Return the arguments of a factory's call. Raises ValueError."""
    try:
        keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
        if "**" in keywords:
            raise ValueError
        return [ast.literal_eval(argument) for argument in call.args], keywords
    except (ValueError, TypeError):
        raise ValueError(f"{text!r}: the arguments must be literals, like 'x', 1 or debug=True") from None


def load_app(name: str) -> WSGIApplication:
    """Import the app of that name; `module` alone means its `app`, or else its `application`.

    Raises LoadError.
    """
    module_name, attribute, arguments = split_app_name(name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = import_module(module_name, name)
    if is_patched_by_gevent():
        raise LoadError(
            f"cannot load {name!r}: it calls gevent.monkey.patch_all(), and slots need real threads and "
            "sockets; leave that out, or serve it by gevent's own server behind --forward"
        )
    found: object = None
    for path in [attribute] if attribute else DEFAULT_ATTRIBUTES:
        found = functools.reduce(lambda value, step: getattr(value, step, None), path.split("."), module)
        if found is not None:
            break
    if found is None:
        wanted = " or ".join(map(repr, [attribute] if attribute else DEFAULT_ATTRIBUTES))
        raise LoadError(f"cannot load {name!r}: module {module_name!r} has no attribute {wanted}")
    if not callable(found):
        raise LoadError(f"cannot load {name!r}: {path!r} of module {module_name!r} is not callable")
    app = found if arguments is None else make_app(name, found, *arguments)
    if not takes_two(app):
        hint = f"if it makes the app, say {f'{module_name}:{path}()'!r}"
        if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(type(app).__call__):
            hint = "an ASGI app needs a server of its own, and --forward"
        raise LoadError(f"cannot load {name!r}: it does not take (environ, start_response); {hint}")
    return app


def make_app(
    name: str, factory: Callable[..., object], arguments: list[object], keywords: dict[str, object]
) -> WSGIApplication:
    """Return what the factory makes. Raises LoadError."""
    try:
        app = factory(*arguments, **keywords)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        if isinstance(exc, TypeError) and exc.__traceback__ and not exc.__traceback__.tb_next:
            raise LoadError(f"cannot load {name!r}: {exc}") from None  # the arguments are not the right ones
        text = f"cannot load {name!r}: making the app failed"
        raise LoadError(text, format_import_error(exc)) from None
    if not callable(app):
        raise LoadError(f"cannot load {name!r}: it made {type(app).__name__}, which is not callable")
    return app


def takes_two(app: Callable[..., object]) -> bool:
    """Return whether an app can be called with two arguments, or does not tell what it takes."""
    with contextlib.suppress(ValueError):
        signature = inspect.signature(app, follow_wrapped=False)
        try:
            signature.bind(None, None)
        except TypeError:
            return False
    return True


def is_patched_by_gevent() -> bool:
    """Return whether threads or sockets are not Python's own any more."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and any(map(monkey.is_module_patched, ("threading", "socket", "select")))


def find_gate(app: object) -> Gate:
    """Return the app's gate. Raises ValueError."""
    gate: Gate | None = getattr(app, "wait_for_slot", None)
    if not callable(gate):
        hint = "add one, like app.wait_for_slot = gating.wait_for_idle_cpus(1)"
        raise ValueError(f"the app has no wait_for_slot(halt); {hint}")
    return gate


def import_module(module_name: str, name: str) -> object:
    try:
        return importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a module may even call sys.exit()
        if isinstance(exc, ModuleNotFoundError) and f"{module_name}.".startswith(f"{exc.name}."):
            hint = hint_for_missing(module_name, name)
            raise LoadError(f"cannot load {name!r}: there is no module {exc.name!r}; {hint}") from None
        text = f"cannot load {name!r}: importing module {module_name!r} failed"
        raise LoadError(text, format_import_error(exc)) from None


def hint_for_missing(module_name: str, name: str) -> str:
    if module_name.endswith(".py"):
        return f"did you mean {module_name.removesuffix('.py')}:{name.partition(':')[2] or 'app'}?"
    return f"looked in {os.getcwd()} first"


def format_import_error(exc: BaseException) -> str:
    """Return the traceback without the frames of the import machinery above the app's own."""
    trace = exc.__traceback__
    while trace and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in (__name__, "importlib"):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(exc), exc, trace))


# ---- Command line ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line and the environment say, validated. Durations are seconds, `math.inf` for off."""

    connect: tuple[Address | HubURL, ...] = (Address("localhost", 4040),)
    origin: tuple[str, ...] = ()
    token_file: str | None = None
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    workers: int = 1
    poll_jobs: bool = False
    forward: str | None = None
    inspection_port: int | None = None
    inspection_host: str | None = "127.0.0.1"
    graceful_timeout: float = 30.0
    idle_timeout: float = math.inf
    max_requests: float = math.inf
    use_request_subprocess: bool = False
    request_timeout: float = math.inf
    redirect_response: int | None = None
    redirect_host: str | None = None
    redirect_url: str | None = None
    redirect_tls: bool = False
    log_format: str = "text"
    log_level: str = "info"
    app: str | None = None
    pickup_expiry_s: float = PICKUP_EXPIRY_S
    pickup_interval_s: float = SIDE_INTERVAL_S
    metrics_directory: str | None = None
    metrics_port: int = 9090
    token: Secret | None = None

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.origin, self.token, self.token_file, self.cafile, self.certfile, self.keyfile)


class UsageError(Exception):
    """The command line or the environment makes no sense; the text is for the user."""


class OptionParser(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)")
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


def parse_duration(text: str) -> float:
    """Returns seconds: ``250ms``, ``10s``, ``5m``, ``1h``; ``off`` is forever.  Raises ``ValueError``."""
    if text.lower() == "off":
        return math.inf
    match = DURATION.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration like 250ms, 10s, 5m, 1h or off")
    seconds = float(match[1]) * UNITS_S[match[2]]
    if seconds > 1e9:  # 31 years; no lock waits for ten times as long
        raise ValueError(f"{text!r} is too long; off is forever")
    return seconds


def parse_limit(text: str) -> float:
    """Returns a duration that is longer than nothing.  Raises ``ValueError``."""
    limit_s = parse_duration(text)
    if limit_s <= 0:
        raise ValueError(f"{text!r} is no time at all")
    return limit_s


def parse_interval(text: str) -> float:
    """Return seconds, up to an hour. Raises ValueError."""
    interval_s = parse_duration(text)
    if not 0 < interval_s <= LONGEST_POLL_S:
        raise ValueError(f"{text!r} is not more than 0 and at most 1h")
    return interval_s


def parse_host(text: str) -> str | None:
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if host and not re.fullmatch(r"[0-9A-Za-z._-]+|[0-9A-Fa-f:.]+", host):
        raise ValueError(f"{text!r} is not a host name or an address")
    return host or None


def parse_workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is not a number from 1 to 9999")
    return int(text)


def parse_count(text: str) -> float:
    """Return a number of at least 1; `off` is any. Raises ValueError."""
    if text.lower() == "off":
        return math.inf
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is neither a number from 1 on nor off")
    return int(text)


def parse_port(text: str) -> int:
    """Returns a port; 0 is any free one.  Raises ``ValueError``."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def parse_port_or_off(text: str) -> int | None:
    """Returns a port, ``None`` for off.  Raises ``ValueError``."""
    return None if text.lower() == "off" else parse_port(text)


def parse_switch(text: str) -> bool:
    """Returns what is said in the environment for an option without a value.  Raises ``ValueError``."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither yes nor no")


def parse_one_of(words: Sequence[str]) -> Callable[[str], str]:
    """Returns a reader of one of these words, in any case.  It raises ``ValueError``."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text.lower()

    return parse


def parse_url(text: str) -> str | None:
    if text:
        parse_forward(text)
    return text or None


def parse_redirect_url(text: str) -> str | None:
    """Return a URL, perhaps with a path, with the slash that keys come after. Raises ValueError."""
    if text:
        hub = parse_hub(text)
        if not isinstance(hub, HubURL) or "?" in text:
            raise ValueError(f"{text!r} is not like https://worker1.example/films/")
    return text.rstrip("/") + "/" if text else None


def parse_path(text: str) -> str | None:
    return text or None


def parse_metrics_directory(text: str) -> str | None:
    """Check that the directory is one that may be emptied. Raises ValueError."""
    if not text:
        return None
    if importlib.util.find_spec("prometheus_client") is None:
        raise ValueError("prometheus_client is not installed: python3 -m pip install prometheus-client")
    if not os.path.isdir(text):
        raise ValueError(f"{text!r} is not a directory")
    path = os.path.realpath(text)
    homes = [os.path.expanduser("~"), *[user.pw_dir for user in pwd.getpwall()]]
    if path == "/" or path in [os.path.realpath(home) for home in homes]:
        raise ValueError(f"{text!r} will not be emptied: it is / or somebody's home directory")
    try:
        tempfile.TemporaryFile(dir=path).close()
        with os.scandir(path) as entries:
            odd = [entry.name for entry in entries if entry.name.endswith(".db") and not entry.is_file()]
    except OSError as exc:
        raise ValueError(f"{text!r} is not writable: {exc.strerror}") from None
    if odd:
        raise ValueError(f"{text!r} will not be emptied: {odd[0]!r} in it is not a file")
    return text


ENVIRONMENT_PREFIX = "POTHEAD_WORKER_"
TOKEN_VARIABLE = "POTHEAD_WORKER_TOKEN"

# option of Options: (group, reader, placeholder (none: it is a switch), what it is)
OPTION_HELP: Mapping[str, tuple[str, Callable[[str], object], str, str]] = {
    "connect": (
        "the hub", parse_hubs, "HUB",
        "https://HOST:PORT or http://HOST:PORT where the hub speaks PTTH, or HOST:PORT of its silent worker "
        "port; of several hubs the former, repeated, or with commas (default: $POTHEAD_CONNECT, then "
        "localhost:4040)",
    ),
    "origin": (
        "the hub", parse_origins, "URL",
        "an origin that this worker serves, like https://api.example; may be repeated, or have commas "
        "(default: whatever the hub lets it serve)",
    ),
    "token_file": (
        "the hub", parse_path, "FILE", "has the token that the hub knows this worker by; read each time",
    ),
    "cafile": (
        "the hub", parse_path, "FILE",
        "certificates (PEM) of whom to trust with the hub's name (default: those of the system)",
    ),
    "certfile": (
        "the hub", parse_path, "FILE", "the certificate (PEM) that the hub knows this worker by",
    ),
    "keyfile": (
        "the hub", parse_path, "FILE", "its key, without a password (default: in the same file)",
    ),
    "workers": (
        "the hub", parse_workers, "N",
        "number of slots: requests that are served at the same time, each in a thread",
    ),
    "poll_jobs": (
        "the hub", parse_switch, "",
        "take a request only when the app's wait_for_slot says that there is room for it",
    ),
    "forward": (
        "requests", parse_url, "URL",
        "pass the requests to the HTTP program at http://HOST:PORT instead of an app",
    ),
    "inspection_port": (
        "ports", parse_port_or_off, "PORT", "serve /inspect, /apocalypse, /livez and /readyz on this port",
    ),
    "inspection_host": (
        "ports", parse_host, "HOST", "the worker's own address that --inspection-port is of",
    ),
    "graceful_timeout": (
        "the process", parse_duration, "TIME", "how long requests may take to finish after SIGTERM",
    ),
    "idle_timeout": (
        "the process", parse_limit, "TIME",
        "drain and end, with status 0, after so long without a request; nothing that runs is cut off",
    ),
    "max_requests": (
        "the process", parse_count, "N", "the same after N requests",
    ),
    "use_request_subprocess": (
        "requests", parse_switch, "",
        "serve each request in a process of its own, which is killed when nobody waits for it any more",
    ),
    "request_timeout": (
        "requests", parse_limit, "TIME",
        "kill a request's process after this time; needs --use-request-subprocess",
    ),
    "redirect_response": (
        "ports", parse_port_or_off, "PORT",
        "have consumers come to this port of the worker for their responses",
    ),
    "redirect_host": (
        "ports", parse_host, "HOST",
        "the worker's address as consumers know it (default: the one it connects to the hub from)",
    ),
    "redirect_url": (
        "ports", parse_redirect_url, "URL",
        "what consumers are told instead, which leads to that port; each response's key is appended",
    ),
    "redirect_tls": (
        "ports", parse_switch, "", "speak HTTPS on the port of --redirect-response, with --certfile",
    ),
    "log_format": ("the process", parse_one_of(LOG_FORMATS), "FORMAT", "of all that is logged: text or json"),
    "log_level": (
        "the process", parse_one_of(LOG_LEVELS), "LEVEL", f"of the messages: {', '.join(LOG_LEVELS)}"
    ),
}  # fmt: skip

# What is said in the environment only, and older names of what is an option now.
VARIABLES: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "pickup_expiry_s": ("OOB_ITEM_EXPIRY_SECONDS", parse_limit),
    "pickup_interval_s": ("OOB_CLEANUP_INTERVAL_SECONDS", parse_interval),
    "metrics_directory": ("PROMETHEUS_MULTIPROC_DIR", parse_metrics_directory),
    "metrics_port": ("PROMETHEUS_PORT", parse_port),
    "token": (TOKEN_VARIABLE, Secret),
}
REPEATABLE = ("origin", "connect")
OLDER_VARIABLES = {"connect": ["POTHEAD_CONNECT"], "workers": ["POTHEAD_WORKERS"]}


def write_value(value: object, parse: Callable[[str], object]) -> str:
    """Returns a value as a user would write it; nothing for none."""
    if value is None:
        return "off" if parse is parse_port_or_off else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "off" if value == math.inf else f"{value:g}s"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> OptionParser:
    parser = OptionParser(
        prog="pothead-worker",
        usage="%(prog)s [options] [MODULE:APP]",
        description="The worker: serves a WSGI application to a hub.",
        epilog="Times take ms, s, m, h. Each option can be set in the environment too: "
        f"{ENVIRONMENT_PREFIX}GRACEFUL_TIMEOUT=5m.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "app",
        nargs="?",
        metavar="MODULE:APP",
        help="the WSGI application, or a call that makes it, like MODULE:create_app(); without :APP, the "
        "module's app or application (default: a built-in demo)",
    )
    add_options(parser)
    parser.add_argument("--version", action="version", version=f"pothead-worker {__version__}")
    return parser


def add_options(parser: OptionParser) -> None:
    """Adds the options of the table, group by group."""
    parser.add_argument("--check", action="store_true", help="tell what would run, and exit")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, (title, parse, placeholder, text) in OPTION_HELP.items():
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        default = write_value(getattr(Options(), name), parse)
        if not placeholder:
            group.add_argument(flag_of(name), action="store_const", const="yes", help=text)
        else:
            suffix = f" (default: {default})" if default and "(default: " not in text else ""
            group.add_argument(flag_of(name), metavar=placeholder, help=text + suffix)


def join_negatives(words: Sequence[str]) -> list[str]:
    """Joins ``--option -1`` into one word: argparse would take -1 for an option and not say what is wrong."""
    joined: list[str] = []
    for word in words:
        if re.match(r"-[0-9.]", word) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def join_repeated(words: Sequence[str]) -> list[str]:
    """Return words in which an option that may be repeated is there once, with all values and commas."""
    joined: list[str] = []
    values: dict[str, list[str]] = {flag_of(name): [] for name in REPEATABLE}
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in values and (equals or (value := next(rest, ""))):
            values[flag].append(value)
        else:
            joined.append(word)
    return [f"{flag}={','.join(given)}" for flag, given in values.items() if given] + joined


def describe_unknown(words: Sequence[str]) -> str:
    """Returns a sentence about words that are no options."""
    word = next((each for each in words if each.startswith("-")), words[0]).partition("=")[0]
    if not word.startswith("-"):
        return f"{word!r} is no option; see --help"
    known = [*map(flag_of, OPTION_HELP), "--check", "--help", "--version"]
    return f"there is no option {word}" + suggest(word.lower().replace("_", "-"), known)


def suggest(word: str, known: Sequence[str]) -> str:
    """Returns a question after the one of the known words that may have been meant."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else "; see --help"


# What Kubernetes and Docker tell of a service that happens to be called pothead-hub or pothead-worker.
SERVICE_LINK = re.compile(
    r"\w+_(?:SERVICE_HOST|SERVICE_PORT\w*|PORT_[0-9]+_\w+)=.*|\w+_PORT=(?:tcp|udp|sctp)://.*"
)


def warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    """Warns of variables that look like options of this program."""
    known = [ENVIRONMENT_PREFIX + name.upper() for name in OPTION_HELP]
    for name, value in environ.items():
        if not value or not name.startswith(ENVIRONMENT_PREFIX) or SERVICE_LINK.fullmatch(f"{name}={value}"):
            continue
        if name not in known:
            log.warning("%s is the variable of no option%s", name, suggest(name, known))


def parse_or_refuse(parse: Callable[[str], object], text: str, prefix: str) -> object:
    try:
        return parse(text)
    except ValueError as exc:
        raise UsageError(f"{prefix}{exc}") from None


def find_log_format(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """Returns the log's format before the options are understood, for what may be wrong with them."""
    given = re.findall(r"(?<!\S)--log-format[= ](\S+)", " ".join(words).partition(" -- ")[0])
    text = given[-1] if given else environ.get(f"{ENVIRONMENT_PREFIX}LOG_FORMAT", "")
    return text.lower() if text.lower() in LOG_FORMATS else "text"


class Given:
    """What the user has said, on the command line and in the environment.  Raises ``UsageError``."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        self._arguments, unknown = build_parser().parse_known_args(join_repeated(join_negatives(argv)))
        if unknown:
            raise UsageError(describe_unknown(unknown))
        self._environ = environ
        self.is_check: bool = self._arguments.check
        self.sources: dict[str, str] = {}  # of the options that are given: the flag or the variable
        self.options = self._make_options()

    def _make_options(self) -> Options:
        values: dict[str, Any] = {}
        if self._arguments.app is not None:
            parse_or_refuse(split_app_name, self._arguments.app, "")
            values["app"] = self._arguments.app
        for name, parse in self._readers():
            for source, text in itertools.islice(self._said(name), 1):
                self.sources[name] = source
                values[name] = parse_or_refuse(parse, text, f"{source}: ")
        options = Options(**values)
        if options.poll_jobs and "workers" in self.sources:
            raise UsageError("--poll-jobs and --workers exclude each other")
        check_options(options)
        return options

    def _readers(self) -> Iterator[tuple[str, Callable[[str], object]]]:
        for name, (_, parse, _, _) in OPTION_HELP.items():
            yield name, parse
        for name, (_, parse) in VARIABLES.items():
            yield name, parse

    def _said(self, name: str) -> Iterator[tuple[str, str]]:
        """Yields where the option is given, and what is said there; the first one counts."""
        if (text := getattr(self._arguments, name, None)) is not None:
            yield flag_of(name), text
        for variable in variables_of(name):
            if text := self._environ.get(variable):
                yield variable, text

    def describe(self) -> Iterator[str]:
        """Yields a line for each option in force."""
        for name, parse in self._readers():
            option = flag_of(name) if name in OPTION_HELP else variables_of(name)[0]
            text = write_value(getattr(self.options, name), parse)
            source = self.sources.get(name, "default")
            if self.options.log_format == "json":
                yield json.dumps({"option": option, "value": text, "from": source})
            else:
                yield f"{option} {text or '-'} ({source})"


def variables_of(name: str) -> Sequence[str]:
    if name in VARIABLES:
        return [VARIABLES[name][0]]
    return [ENVIRONMENT_PREFIX + name.upper(), *OLDER_VARIABLES.get(name, ())]


def parse_args(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Returns the options.  Raises ``UsageError``; ``--help`` and ``--version`` raise ``SystemExit``."""
    return Given(argv, environ).options


def check_options(options: Options) -> None:
    """Raises UsageError for options that make no sense together, or on this platform."""
    if options.forward and options.app:
        raise UsageError(f"--forward takes the place of an app, but there is {options.app!r}, too")
    if options.forward and options.poll_jobs:
        raise UsageError("--poll-jobs needs an app that says when there is room; --forward has none")
    if options.forward and options.use_request_subprocess:
        raise UsageError("--use-request-subprocess needs an app; --forward has none")
    if options.request_timeout < math.inf and not options.use_request_subprocess:
        raise UsageError("--request-timeout: only a process can be stopped; add --use-request-subprocess")
    if options.token and options.token_file:
        raise UsageError(f"--token-file and {TOKEN_VARIABLE} exclude each other")
    if options.keyfile and not options.certfile:
        raise UsageError("--keyfile: there is no --certfile")
    if options.origin and any([isinstance(hub, HubURL) and hub.path != "/" for hub in options.connect]):
        raise UsageError("--origin: the origins stand in the path, but --connect names another")
    for name in ("redirect_host", "redirect_url", "redirect_tls"):
        if getattr(options, name) and options.redirect_response is None:
            raise UsageError(f"{flag_of(name)}: there is no --redirect-response")
    if options.redirect_host and options.redirect_url:
        raise UsageError("--redirect-url has a host, so --redirect-host has no meaning")
    if options.redirect_tls and not options.certfile:
        raise UsageError("--redirect-tls: there is no --certfile")
    if options.use_request_subprocess and not ForkServer.is_supported():
        raise UsageError("--use-request-subprocess: this system cannot hand a connection to another process")


# -- lines of the log: the same in `pothead.py`, as a test holds

LOG_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def timestamp(epoch_s: float) -> str:
    """Returns the time in UTC, with milliseconds (RFC 3339)."""
    whole = int(epoch_s)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((epoch_s - whole) * 1000):03d}Z"


def json_message(epoch_s: float, level: str, name: str, message: str, trace: str = "") -> str:
    """Returns a message as an object of JSON."""
    fields = {"time": timestamp(epoch_s), "level": level, "logger": name, "message": message}
    return json.dumps({**fields, "traceback": trace} if trace else fields)


class LogFormatter(logging.Formatter):
    """Makes text or JSON of log records; their times are in UTC, whatever becomes of the zone."""

    def __init__(self, log_format: str) -> None:
        super().__init__(LOG_TEXT)
        self._is_json = log_format == "json"

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return timestamp(record.created)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._is_json:
            return text
        return json_message(
            record.created, record.levelname, record.name, record.message, record.exc_text or ""
        )


class Output:
    """Lines for a descriptor, written without ever waiting for who reads them.

    What does not fit is kept, up to a limit; beyond it lines are dropped and counted: a log that nobody
    reads must not stop the service.
    """

    def __init__(self, fd: int, log_format: str, backlog_bytes: int) -> None:
        self.pending = bytearray()
        self._lost = 0
        self._is_json = log_format == "json"
        self._backlog_bytes = backlog_bytes
        self._fd = fd
        self._piece_bytes = select.PIPE_BUF  # what a pipe takes undivided: lines of two programs do not mix
        self._own = contextlib.ExitStack()
        self._take = self._open()

    def _open(self) -> Callable[[bytearray], int]:
        """Returns what writes as much as is taken at once, even if others write to the same descriptor.

        A look whether there is room says nothing about the next moment, in which the companion may fill it;
        and O_NONBLOCK would be the companion's as well.  So a pipe or a terminal is opened once more.  Where
        that is forbidden (a pipe that another user has made), the look must do.
        """
        try:
            mode = os.fstat(self._fd).st_mode
            if stat.S_ISREG(mode):
                self._piece_bytes = sys.maxsize
                return functools.partial(os.write, self._fd)
            if stat.S_ISSOCK(mode):
                sock = self._own.enter_context(socket.socket(fileno=os.dup(self._fd)))
                return lambda piece: sock.send(piece, socket.MSG_DONTWAIT)
            own_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return functools.partial(write_if_there_is_room, self._fd)
        self._own.callback(os.close, own_fd)
        return functools.partial(os.write, own_fd)

    def __del__(self) -> None:
        self._own.close()

    def write(self, line: str) -> None:
        """Takes a line, with its line end."""
        if len(self.pending) > self._backlog_bytes:
            self._lost += line.count("\n")
            return
        if self._lost:
            self.pending += self._lost_lines().encode()
            self._lost = 0
        self.pending += line.encode("utf-8", "backslashreplace")

    def _lost_lines(self) -> str:
        text = f"{self._lost} log lines were lost: nobody read them"
        if self._is_json:
            return json_message(time.time(), "WARNING", log.name, text) + "\n"
        return f"({text})\n"

    def flush(self) -> None:
        """Writes what can be written now; the rest is ``pending``."""
        while self.pending and (taken := self._write_piece()):
            del self.pending[:taken]

    def _write_piece(self) -> int:
        """Returns how many bytes were taken: whole lines, as long as these are not too long for a pipe."""
        end = self.pending.rfind(b"\n", 0, self._piece_bytes) + 1
        piece = self.pending[: end or self._piece_bytes]
        try:
            return self._take(piece)
        except BlockingIOError:
            return 0
        except OSError:  # closed, or a full disk
            self._lost += self.pending.count(b"\n")
            return len(self.pending)


def write_if_there_is_room(fd: int, piece: bytearray) -> int:
    """Returns how many bytes were taken."""
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return os.write(fd, piece) if poller.poll(0) else 0


class OutputHandler(logging.Handler):
    """Passes log records to an ``Output``."""

    def __init__(self, output: Output, log_format: str) -> None:
        super().__init__()
        self._output = output
        self.setFormatter(LogFormatter(log_format))

    def emit(self, record: logging.LogRecord) -> None:
        self._output.write(self.format(record) + "\n")
        self.flush()

    def flush(self) -> None:
        self._output.flush()


def log_uncaught(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    """Logs what ends the program, in the place of ``sys.excepthook``."""
    log.error("this is a fault of the program, which ends", exc_info=(kind, exc, trace))


def configure_logging(level: int | str, log_format: str) -> None:
    """Log to stderr with a handler of our own: how the app sets up its own logging changes nothing here."""
    handler: logging.Handler = logging.NullHandler()
    if sys.__stderr__:  # otherwise descriptor 2 is somebody else's: perhaps the connection to the hub
        handler = OutputHandler(Output(2, log_format, LOG_BACKLOG_BYTES), log_format)
    for logger in (log, logging.getLogger("pothead.gating")):
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def complain(message: str, log_format: str, trace: str = "") -> None:
    """Say on stderr why the worker does not start."""
    line = f"{trace}pothead-worker: {message}"
    if log_format == "json":
        line = json_message(time.time(), "ERROR", log.name, message, trace)
    print(line, file=sys.stderr)


class Signals:
    """SIGTERM and SIGINT: while the app is being imported they interrupt it, later `wait` returns them.

    They come through a descriptor, since a main thread that waits for a lock or a queue would miss one that
    arrives just before it waits. SIGHUP is ignored: there is nothing to read again, and a closed terminal is
    no reason to drop requests.

    An app may have installed handlers of its own when it was imported. The main thread calls them, and has
    nothing else to do: one that never returns, or that wants to exit, stops nobody.
    """

    END = 0
    TAKEN = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._is_loading = True
        self._reader, self._writer = own_pair()
        self._writer.setblocking(False)
        self._for_app: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in self.TAKEN:
            take_signal(number, self._on_signal)
        ignore_hang_up()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_loading:
            raise KeyboardInterrupt

    def listen(self) -> None:
        """Stop raising, and take the signals from the app, which has been imported."""
        for number in self.TAKEN:
            take_signal(number, self._on_signal)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._is_loading = False

    def wait(self, timeout_s: float | None = None) -> int:
        """Return the number of the next signal of any kind, or END, also when the time is over."""
        has_come = wait_ready(self._reader.fileno(), select.POLLIN, timeout_s)
        return self._reader.recv(1)[0] if has_come else self.END

    def wait_for_impatience(self) -> None:
        """Return when told once more to end, or after a short grace."""
        ends_at = time.monotonic() + EXIT_GRACE_S
        while (left_s := ends_at - time.monotonic()) > 0 and self.wait(left_s) not in self.TAKEN:
            pass

    def end(self) -> None:
        """Have `wait` return END. Called by another thread."""
        self._writer.send(bytes([self.END]))

    def pass_on(self, number: int) -> None:
        """Have the main thread call the app's own handler, or return from `call_handlers` after END."""
        self._for_app.put(number)

    def call_handlers(self) -> None:
        """Call the app's handlers for what is passed on, each once, until END is."""
        handlers: dict[int, _HANDLER] = {number: TAKEN_SIGNALS[number].theirs for number in self.TAKEN}
        is_over = False
        while not is_over:
            try:
                number = self._for_app.get()  # where handlers of other signals may raise, too
                is_over = number == self.END
                handler = handlers.pop(number, None)
                if callable(handler) and handler is not signal.default_int_handler:
                    handler(number, None)
            except SystemExit:  # the worker exits, too, in its own time
                pass
            except BaseException:
                log.exception("a signal handler of the application raised an exception")

    def close(self) -> None:
        """Close the descriptors, unless signals are listened to: that lasts to the end of the process."""
        if self._is_loading:
            self._reader.close()
            self._writer.close()


Door = TypeVar("Door", bound=SidePort)


def bind(
    stack: contextlib.ExitStack, option: str, port: int | None, listen: Callable[[int], Door]
) -> Door | None:
    """Return what listens on the port, until the stack is closed; None without a port. Raises UsageError."""
    if port is None:
        return None
    try:
        door = listen(port)
    except OSError as exc:
        reason = os.strerror(exc.errno or 0)
        raise UsageError(f"{option}: cannot listen on port {port}: {reason}") from None
    stack.callback(door.close)
    return door


def load(options: Options, metrics: Metrics) -> tuple[WSGIApplication | Forwarder | None, ForkServer | None]:
    """Return what serves; and with a fork server the app for its gate only. Raises LoadError."""
    if options.forward:
        return Forwarder(options.forward), None
    app = None
    if options.poll_jobs or not options.use_request_subprocess:
        app = load_app(options.app) if options.app else demo_app
    if options.poll_jobs:
        try:
            find_gate(app)
        except ValueError as exc:
            raise LoadError(f"cannot poll jobs for {options.app!r}: {exc}") from None
    if not options.use_request_subprocess:
        return app, None
    fork_server = ForkServer(options.app, metrics.merge_ended, options.log_format)
    fork_server.start()
    return app, fork_server


def lock_directory(directory: str, stack: contextlib.ExitStack) -> None:
    """Keep the directory of the metrics from other workers until the stack is closed. Raises UsageError."""
    try:
        fd = os.open(os.path.join(directory, "worker.lock"), os.O_WRONLY | os.O_CREAT)
        stack.callback(os.close, fd)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike a flock, no fork inherits it
    except BlockingIOError:
        text = f"another worker counts in {directory!r}; each needs a directory of its own"
        raise UsageError(f"PROMETHEUS_MULTIPROC_DIR: {text}") from None
    except OSError as exc:
        raise UsageError(f"PROMETHEUS_MULTIPROC_DIR: cannot be locked: {exc}") from None


def open_metrics(options: Options, stack: contextlib.ExitStack) -> tuple[Metrics, PagePort | None]:
    """Return what counts and where that is shown, if it is. Raises UsageError."""
    directory = options.metrics_directory
    port = options.metrics_port if directory else None
    scrapes = bind(stack, "PROMETHEUS_PORT", port, lambda port: PagePort("metrics", port))
    if scrapes is None or directory is None:
        return Metrics(), None
    lock_directory(directory, stack)
    try:
        metrics = PrometheusMetrics(directory)
    except OSError as exc:
        raise UsageError(f"PROMETHEUS_MULTIPROC_DIR: cannot be emptied: {exc}") from None
    scrapes.pages = {"/metrics": metrics.page, "/": metrics.page}
    stack.callback(metrics.close)
    stack.callback(scrapes.close)  # before what its pages show
    return metrics, scrapes


def make_pickup_context(options: Options) -> ssl.SSLContext:
    """Return what the pick-up port shows to consumers. Raises ValueError."""
    assert options.certfile is not None
    load_ssl()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    set_up_tls(context)
    context.num_tickets = 0  # nobody comes twice
    load_certificate(context, options.certfile, options.keyfile)
    return context


def prepare(options: Options, stack: contextlib.ExitStack) -> tuple[WorkerPool, list[PagePort]]:
    """Bind the ports, empty the directory of the metrics, import the app. Raises UsageError, LoadError."""
    try:
        for hub in options.connect:
            introduce(hub, options.credentials)  # before the app takes its time
        files = options.certfile, options.keyfile
        tls = TlsFiles(lambda: make_pickup_context(options), files) if options.redirect_tls else None
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    host, url = options.redirect_host, options.redirect_url
    expiry_s, interval_s = options.pickup_expiry_s, options.pickup_interval_s
    pickups = bind(
        stack,
        "--redirect-response",
        options.redirect_response,
        lambda port: PickupPort(port, host, expiry_s, interval_s, url, tls),
    )
    inspection = bind(
        stack,
        "--inspection-port",
        options.inspection_port,
        lambda port: PagePort("inspection", port, options.inspection_host),
    )
    metrics, scrapes = open_metrics(options, stack)
    app, fork_server = load(options, metrics)
    pool = WorkerPool(
        app,
        options.connect,
        options.workers,
        min(options.graceful_timeout, threading.TIMEOUT_MAX),
        poll_jobs=options.poll_jobs,
        fork_server=fork_server,
        request_timeout_s=options.request_timeout,
        pickups=pickups,
        metrics=metrics,
        credentials=options.credentials,
        idle_timeout_s=options.idle_timeout,
        max_requests=options.max_requests,
    )
    if inspection:
        inspection.pages = Inspection(pool).pages
    return pool, [port for port in (inspection, scrapes) if port]


def serve(pool: WorkerPool, ports: Sequence[PagePort], signals: Signals) -> int:
    """Run the pool and obey the signals until it has ended. Returns the exit status."""

    def wait_for_end() -> None:
        pool.join()
        signals.end()

    def obey_signals() -> None:
        status = 1
        try:
            status = 0 if obey(pool, signals) else 1
        finally:
            leave_soon(status, signals.wait_for_impatience)  # before the main thread begins to end
            signals.pass_on(Signals.END)

    pool.start()
    for port in ports:
        port.start()
    start_thread(wait_for_end, "end")
    start_thread(obey_signals, "signals")
    signals.call_handlers()
    return 0 if pool.join() else 1


def obey(pool: WorkerPool, signals: Signals) -> bool:
    """Obey the signals until the pool has ended. Return True if no request was cut off."""
    is_draining = False
    while (number := signals.wait()) != Signals.END:
        if number == signal.SIGINT or (number == signal.SIGTERM and is_draining):
            pool.stop_now()
        elif number == signal.SIGTERM:
            pool.stop()
            log.info("draining")  # after it, so that whoever reads this can rely on it
            is_draining = True
        signals.pass_on(number)
    is_clean = pool.join()
    pool.leave()
    return is_clean


def warn_of_other_port(hub: Address | HubURL) -> None:
    """Warn if the port is one that a hub usually has for somebody else."""
    if isinstance(hub, Address) and hub.port in OTHER_PORTS:
        log.warning("%s is usually the hub's port for %s; %s", hub, OTHER_PORTS[hub.port], HINT)


def check_line(text: str, log_format: str) -> str:
    """Returns a line of what ``--check`` tells."""
    return json.dumps({"check": text}) if log_format == "json" else text


def check(given: Given, stack: contextlib.ExitStack) -> None:
    """Tells what would run, having loaded the app.  Raises what a start would raise."""
    options = given.options
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # what is in it may be a running worker's
    metrics_port = options.metrics_port if options.metrics_directory else None
    bind(stack, "PROMETHEUS_PORT", metrics_port, lambda port: PagePort("metrics", port))
    pool, _ = prepare(replace(options, metrics_directory=None), stack)
    if pool.fork_server:
        pool.fork_server.close()
    what = options.app or options.forward or "the demo"
    text = f"would connect to {' and '.join(map(str, options.connect))} and serve {what}"
    print("\n".join([*given.describe(), check_line(text, options.log_format)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the worker as a process, which ends soon after this has returned its exit status.

    The signal handlers that it installs stay.
    """
    words = sys.argv[1:] if argv is None else argv
    with contextlib.ExitStack() as stack:
        try:
            given = Given(words, os.environ)
            options = given.options
            os.environ.pop(TOKEN_VARIABLE, None)  # no business of the app's, nor of what it starts
            signals = stack.enter_context(contextlib.closing(Signals()))
            configure_logging(options.log_level.upper(), options.log_format)
            sys.excepthook = log_uncaught
            warn_of_unknown_variables(os.environ)
            warn_of_other_port(options.connect[0])
            if given.is_check:
                check(given, stack)
            else:
                pool, ports = prepare(options, stack)
            signals.listen()
        except UsageError as exc:
            complain(str(exc), find_log_format(words, os.environ))
            return 2
        except LoadError as exc:
            complain(str(exc), find_log_format(words, os.environ), exc.trace)
            status = 3
        except KeyboardInterrupt:
            status = 0
        else:
            if not given.is_check:
                return serve(pool, ports, signals)
            status = 0
        signals.listen()  # an impatient second one must not show a traceback
        leave_soon(status, signals.wait_for_impatience)
        return status


def leave_soon(status: int, wait: Callable[[], None]) -> None:
    """End the process after `wait`, whatever the app has left running that the interpreter waits for."""
    has_waited = threading.Event()

    def flush() -> None:
        has_waited.wait()
        flush_output()
        os._exit(status)

    def leave() -> None:
        wait()
        report_left_behind()
        has_waited.set()
        time.sleep(STOP_NOW_GRACE_S)  # an output that nobody reads must not keep the process, either
        os._exit(status)

    with contextlib.suppress(OSError):  # then the interpreter ends alone, as long as that takes
        for target in (flush, leave):  # both now: while it ends, there are no new threads
            start_thread(target, "exit")


def report_left_behind() -> None:
    main_thread = threading.main_thread()
    threads = [thread.name for thread in threading.enumerate() if thread is not main_thread]
    left = [name for name in threads if not name.startswith("pothead-")]
    if left:
        log.warning("leaving without threads of the application: %s", ", ".join(left))
    else:
        log.warning("leaving although the application has not finished its exit")


if __name__ == "__main__":
    sys.exit(run_fork_server(int(sys.argv[2])) if sys.argv[1:2] == [FORK_SERVER] else main())
