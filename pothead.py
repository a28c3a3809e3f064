# SPDX-License-Identifier: Apache-2.0
# The hub of POTHEAD, which queues expensive HTTP requests. It needs no other file and may be copied as it is;
# the project has its manual, its tests and the text of the licence. `__version__` tells which one this is.
"""POTHEAD: a hub for expensive HTTP requests, with one queue and workers that connect out to it.

An ordinary load balancer pushes requests at servers and has to guess which of them is free.  Here it
is the other way round: a worker opens a TCP connection *to* the hub and then plays the HTTP *server*
on it (reverse HTTP, "PTTH").  An open connection is the offer of one free slot.  The hub keeps one
queue, first come, first served, and hands the oldest request to a waiting slot::

    consumer ──HTTP──▶ :8080 ┌───────────────┐ :4040 ◀──TCP connect── worker slot
    consumer ──HTTP──▶       │ hub           │       ──HTTP request──▶  (WSGI app)
    consumer ──HTTP──▶       │ queue ▸▸▸ idle│       ◀─HTTP response──
                             └───────────────┘ :4041 admin (loopback)

Vocabulary:  a *consumer* sends a *request*, a *head* and perhaps a *body*, over its *stream*.  The hub
receives the body into a *spool*, then puts the *exchange* (a request and its response) into the
*queue*.  A *worker* offers a *slot*.  Nothing is sent to a slot that is busy, and no slot idles while
a request waits.

One thread, no locks.  Everything below happens in turns of one event loop: the sockets that are ready
are read and written, timers fire, requests and slots are paired, and the loop sleeps again.  To follow
a request, read ``Consumer.on_bytes``, ``Exchange`` from top to bottom, ``Hub.dispatch`` and
``Slot.on_bytes``.

Run it with ``python3 pothead.py``; ``--help`` tells the options.  Standard library only; the file may
be copied into another project as it is.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C is a quiet end even while the imports below are running
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import array
import base64
import bisect
import contextlib
import dataclasses
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import hashlib
import heapq
import hmac
import http
import http.client
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Generic, NamedTuple, NoReturn, Protocol, TypeVar

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

__version__ = "1.0.0"

log = logging.getLogger("pothead")

Bytes = bytes | bytearray | memoryview

# ---- Limits -----------------------------------------------------------------------------------------------

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The numbers that are nobody's business to tune, each with its unit and its reason."""

    request_line_bytes: int = 8 * KIB  # RFC 9112 §3 asks for 8000 at least; nginx and Apache take 8 KiB
    head_bytes: int = 32 * KIB  # nginx takes four buffers of 8 KiB
    host_bytes: int = 1 * KIB  # a name has 255; it is passed on twice, and a worker takes 64 KiB in all
    recalled_lines: int = 1024  # of fields that peers send again and again ...
    recalled_line_bytes: int = 256  # ... as long as this, so that they take 0.5 MiB at most
    head_fields: int = 100  # http.client, gunicorn and HAProxy (101) stop there
    chunk_line_bytes: int = 1 * KIB  # a chunk's size and its extensions, which nobody uses
    trailer_bytes: int = 8 * KIB
    length_digits: int = 18  # of a Content-Length: below 2**63
    receive_bytes: int = 256 * KIB  # one read or write; large, since a call costs more than its bytes
    shortcut_bytes: int = 64 * KIB  # of a body still to come, from where on moving it uncopied pays
    patience_s: float = 0.25  # in sum, that a slot waits for its consumer before the response is absorbed
    handshake_bytes: int = 16 * KIB  # of the head with which a worker joins
    offered_bytes: int = 64 * KIB  # of a body, before the request is claimed
    unclaimed_s: float = 2.0  # before a request that nobody has claimed is taken back
    heard_s: float = 0.05  # for so long a machine that has said something is taken to be there
    envoy_pause_s: float = 0.05  # after the 101, before an Envoy is asked for an echo ...
    envoy_echo_s: float = 1.0  # ... and how long that may take
    newcomers: int = 2000  # connections at once that have not shown yet who they are; the oldest goes
    complaint_s: float = 60.0  # between two log lines about the same kind of refused connection
    sealed_bytes: int = 64 * KIB  # encrypted at once; more would only be kept
    expiry_warning_s: float = 14 * 86400  # before the certificate expires
    expiry_check_s: float = 86400  # how often that is looked at
    pipelined_bytes: int = 64 * KIB  # kept of what has come before it can be understood or served
    upload_bytes: int = 4 * KIB  # of memory that a request takes while its body comes, beside its head ...
    uploads_bytes: int = 64 * MIB  # ... and what all such requests take together, before others get 503
    heads_a_turn: int = 5  # of interim responses of one slot, which are few; and one request of a consumer
    large_head_bytes: int = 8 * KIB  # that count as another head
    chunks_a_turn: int = 100  # of one body: about 100 µs, so that those who send them small stop nobody
    framing_bytes: int = 256 * KIB  # of chunks, beyond four times the bytes in them: nobody needs so much
    interim_responses: int = 50  # to one request: a job that tells its progress should do so in its body
    lingering_s: float = 5.0  # for a refused consumer to take the refusal before the connection is cut
    gone_check_s: float = 1.0  # how often a stream that may not be read is asked whether its peer is there
    accept_pause_s: float = 0.5  # without descriptors, before the next attempt
    handover_s: float = 1.0  # of a drain with a successor, for what is under way: TCP's first retransmission
    neighbour_check_s: float = 10.0  # how often another hub is looked for on a shared port ...
    neighbour_checks: int = 6  # ... and found, a minute, before it is no handover
    accepts_a_turn: int = 64  # so that a rush of new connections does not starve the old
    backlog: int = 4096  # the kernel trims it to net.core.somaxconn
    keepalive_idle_s: int = 15  # before TCP asks a silent peer for a sign of life ...
    keepalive_interval_s: int = 5  # ... then as often as this ...
    keepalive_probes: int = 3  # ... so many times: a dead machine is found within 30 s
    unacknowledged_s: float = 30.0  # sent bytes without an acknowledgement, before the peer is held for dead
    worker_full_s: float = 900.0  # the same while a slot is sent a large body: it may compute before it reads
    slow_turn_s: float = 0.5  # of the event loop, from where on it is worth a warning ...
    slow_turn_pause_s: float = 60.0  # ... and how long until the next one
    log_backlog_bytes: int = 1 * MIB  # log lines kept while the log's reader does not read ...
    log_retry_s: float = 0.1  # ... and how soon it is tried again
    reserved_descriptors: int = 64  # of the limit: not for consumers, and half not for files: workers, admin
    listed_rows: int = 100  # of each table of /stats: more than anybody reads, and 10,000 cost as much
    listed_path_bytes: int = 200  # of a path in these tables
    listed_failures: int = 10  # the last ones of each code
    timed_exchanges: int = 1000  # the last ones, from which median and 99th percentile are taken
    history_step_s: int = 5  # of the plot: about as many steps as a phone has room for
    history_steps: int = 120  # ten minutes
    rate_steps: int = 12  # of those, over which requests a second are told: a minute
    lonely_s: float = 5.0  # that a request waits and no worker is connected, before that is told
    rest_s: float = 0.05  # of a machine that has lost a slot: who dies takes all his slots along ...
    rest_again_s: float = 1.0  # ... and how soon it may rest again, for the sake of the others on the machine
    remembered_machines: int = 100  # that worked once and may come back
    token_bytes: int = 4 * KIB  # of the admin port's token: a head has room for it
    remembered_pools: int = 100  # with those in use, before one that is not is forgotten
    remembered_tenants: int = 1000  # that neither wait nor run, with what they have had
    served_to_estimate: int = 10  # requests, before anybody is refused since his turn would come too late
    claim_bytes: int = 1 * KIB  # of a field that says who goes first; a longer one is ignored
    tenant_bytes: int = 64  # of a tenant's name; a longer one is told by its beginning and a digest
    listed_tenants: int = 10  # those with the most worker time


LIMITS: Final = Limits()


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What can be set, by the command line or by a program that runs a ``Hub``.

    Durations are seconds, ``math.inf`` for off; sizes are bytes.  Raises ``ValueError`` with a sentence
    for the user where a value makes no sense.
    """

    main_host: str = "127.0.0.1"
    main_port: int = 8080
    worker_host: str = "127.0.0.1"
    worker_port: int = 4040
    admin_host: str = "127.0.0.1"
    admin_port: int | None = 4041  # None: no admin port
    ptth_host: str = "127.0.0.1"
    ptth_port: int | None = None  # None: no port for workers that shake hands
    ptth_compat: tuple[str, ...] = ()  # older protocols that are spoken there, too: "ptth/1.0"
    certfile: str | None = None
    keyfile: str | None = None
    tls: tuple[str, ...] = ()  # the ports that speak TLS, of TLS_PORTS; none, with a certificate: ptth
    workers_file: str | None = None
    workers_ca: str | None = None
    admin_allowed_hosts: tuple[str, ...] = ()  # names of the admin port, beside localhost and IP addresses
    admin_token_file: str | None = None
    admin_token_for: str = "orders"
    max_queue: int = 1000
    queue_timeout: float = 60.0
    no_worker_timeout: float = math.inf  # the queue's holds anyway
    route: tuple[str, ...] = ()  # each PREFIX=ORIGIN
    priority_step: float = 30.0
    fair_by: str = "none"
    retry_after: float = 30.0  # a worker that is started, or starts again, takes about as long
    response_timeout: float = math.inf
    max_attempts: int = 2
    max_request_body: int = 1 * GIB
    response_spool: int = 1 * GIB
    spool_memory: int = 64 * KIB
    memory_budget: int = 64 * MIB
    disk_budget: int = 16 * GIB
    spool_dir: str | None = None
    stream_requests: bool = False
    head_timeout: float = 10.0
    keep_alive: float = 75.0
    stall_timeout: float = 60.0
    drain_delay: float = 0.0
    graceful_timeout: float = 30.0
    forwarded_allow_ips: tuple[str, ...] = ("127.0.0.1",)
    log_format: str = "text"
    log_level: str = "info"
    allow_anonymous_workers: bool = False
    reuse_port: bool = False

    def __post_init__(self) -> None:
        """Checks each value by itself; what needs the network or a file's content is checked by ``Hub``."""
        for name in ("main_port", "worker_port", "admin_port", "ptth_port"):
            port = getattr(self, name)
            _check(port is None or 0 <= port <= 65535, name, "is a port: 0 to 65535 (0: any free one)")
        for name in ("main_host", "worker_host", "admin_host", "ptth_host"):
            _check(getattr(self, name) != "", name, "is empty")
        for name in (
            "queue_timeout", "no_worker_timeout", "response_timeout", "head_timeout", "keep_alive",
            "stall_timeout",
        ):  # fmt: skip
            _check(getattr(self, name) > 0, name, "must be longer than nothing (or off)")
        _check(0 < self.retry_after < math.inf, "retry_after", "must be longer than nothing, and have an end")
        _check(self.graceful_timeout >= 0, "graceful_timeout", "cannot be negative")
        _check(0 <= self.drain_delay < math.inf, "drain_delay", "cannot be negative, and must have an end")
        _check(self.max_queue >= 1, "max_queue", "must be 1 or more: every request passes through the queue")
        _check(self.max_attempts >= 1, "max_attempts", "must be 1 or more")
        try:
            read_routes(self.route)
        except ValueError as exc:
            raise ValueError(f"--route {exc}") from None
        _check(
            0 <= self.priority_step < math.inf, "priority_step", "cannot be negative, and must have an end"
        )
        _check(
            _TOKEN_ONLY.fullmatch(self.fair_by.encode()) is not None, "fair_by", "is none, address or a field"
        )
        for name in ("max_request_body", "response_spool", "spool_memory", "memory_budget", "disk_budget"):
            _check(getattr(self, name) >= 0, name, "cannot be negative")
        if self.spool_dir is not None:
            usable = os.path.isdir(self.spool_dir) and os.access(self.spool_dir, os.W_OK)
            _check(usable, "spool_dir", f"is not a directory to write to: {self.spool_dir}")
        for address in self.forwarded_allow_ips:
            _check(address == "*" or _is_network(address), "forwarded_allow_ips", f"is no address: {address}")
        lacks_it = self.reuse_port and not hasattr(socket, "SO_REUSEPORT")
        _check(not lacks_it, "reuse_port", "is not possible: this platform has no SO_REUSEPORT")
        for name in self.admin_allowed_hosts:
            _check(_HOST_NAME.fullmatch(name) is not None, "admin_allowed_hosts", f"is no host name: {name}")
        for name in self.tls:
            _check(name in TLS_PORTS, "tls", f"names no port: {name} (it is one of {', '.join(TLS_PORTS)})")
        for name in self.ptth_compat:
            _check(name in COMPATIBLE, "ptth_compat", f"is one of {', '.join(COMPATIBLE)}")
        _check(self.admin_token_for in TOKEN_USES, "admin_token_for", f"is one of {', '.join(TOKEN_USES)}")
        _check(self.log_format in LOG_FORMATS, "log_format", f"is one of {', '.join(LOG_FORMATS)}")
        _check(self.log_level in LOG_LEVELS, "log_level", f"is one of {', '.join(LOG_LEVELS)}")

    def check_together(self) -> None:
        """Checks that what is said of TLS and workers has a use: a typing error would leave a port open."""
        needs = (
            ("tls", "certfile"), ("keyfile", "certfile"), ("workers_file", "ptth_port"),
            ("workers_ca", "ptth_port"), ("workers_ca", "certfile"), ("ptth_compat", "ptth_port"),
        )  # fmt: skip
        for name, needed in needs:
            has_it = getattr(self, needed) is not None
            _check(has_it or not getattr(self, name), name, f"needs --{needed.replace('_', '-')}")
        for port in self.tls:
            is_on = getattr(self, f"{port}_port") is not None
            _check(is_on, "tls", f"names a port that is off: --{port}-port")
        is_idle = self.certfile is not None and self.ptth_port is None and not self.tls
        _check(not is_idle, "certfile", "is for no port: --ptth-port is off; for others there is --tls")
        lacks_file = self.workers_ca is not None and self.workers_file is None
        _check(not lacks_file, "workers_ca", "needs --workers-file, which says whose certificates are meant")
        lacks_token = self.admin_token_for == "all" and self.admin_token_file is None
        _check(not lacks_token, "admin_token_for", "all needs --admin-token-file")

    @property
    def tls_ports(self) -> tuple[str, ...]:
        """The ports that speak TLS."""
        return self.tls or (("ptth",) if self.certfile is not None else ())


TLS_PORTS: Final = ("main", "ptth", "admin")
COMPATIBLE: Final = ("ptth/1.0",)
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")


def _check(holds: bool, name: str, complaint: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} {complaint}")


def read_routes(routes: Iterable[str]) -> list[tuple[bytes, str]]:
    """Returns the prefix and the origin of each route, the longest prefix first.  Raises ``ValueError``."""
    found: dict[bytes, str] = {}
    for route in routes:
        prefix, _, text = route.partition("=")
        origin = read_origin(text.encode())
        if not re.fullmatch(r"/[!-~]*", prefix) or set(prefix) & set("?#"):
            raise ValueError(f"{route!r} has no path prefix, as in /render=http://gpu.example")
        if origin is None:
            raise ValueError(f"{route!r} names no origin, as in /render=http://gpu.example")
        if prefix.encode() in found:
            raise ValueError(f"names the prefix {prefix} twice")
        found[prefix.encode()] = origin
    return sorted(found.items(), key=lambda route: -len(route[0]))


_ORIGIN: Final = re.compile(rb"(https?)://([a-z0-9._~%-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORTS: Final = {b"http": b"80", b"https": b"443"}


@functools.lru_cache(maxsize=1024)
def read_origin(text: bytes) -> str | None:
    """Returns an origin as RFC 6454 serializes it, without a default port; ``None`` if it is none."""
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        return None
    scheme, host, port = match.groups()
    port = b"" if port is None else port.lstrip(b"0") or b"0"
    return (
        scheme + b"://" + host + (b":" + port if port not in (b"", _DEFAULT_PORTS[scheme]) else b"")
    ).decode()


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


# ---- Messages (pure) --------------------------------------------------------------------------------------
#
# A strict reader of RFC 9112.  What it does not understand it refuses: a hub that guesses is how requests
# are smuggled.  http.client.parse_headers is not used because it guesses.

Field = tuple[bytes, bytes]  # name, value
# A field line as it was read: its name in lower case if the hub acts on it (else nothing), its value, its
# name in lower case with - for _, and the line to pass on.  X_Forwarded_For is X-Forwarded-For to every
# program that reads fields as CGI variables.
FieldLine = tuple[bytes, bytes, bytes, bytes]

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TOKEN_ONLY: Final = re.compile(_TOKEN)
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb") ([!\"$-~]+) HTTP/([0-9])\.([0-9])(?=\r\n|\Z)")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9][0-9])(?: ([\t -~\x80-\xff]*))?")
# The value's trailing white space is trimmed afterwards: in here it would cost quadratic time.
_FIELD_LINE: Final = re.compile(rb"(" + _TOKEN + rb"):([\t -~\x80-\xff]*)")
_HOPELESS: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n")
_DIGITS: Final = re.compile(rb"[0-9]+")
_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)*")
_PLAIN_CHUNK: Final = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,7})\r\n")
_QUOTED: Final = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
# Each byte decides how it goes on, so that a line that fails at its end costs linear time.
_CHUNK_SIZE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,15})"
    rb"(?:[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*"
)
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_ABSOLUTE_FORM: Final = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*)(.*)")
# "." and ".." would be lost in the path that cancels a request: browsers and curl resolve them.
_REQUEST_ID: Final = re.compile(rb"(?!\.{1,2}\Z)[A-Za-z0-9._~+/=:@-]{1,128}")
# The fields that the hub itself looks at; the values of the others it only passes on.
_KNOWN_FIELDS: Final = frozenset(
    (
        b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"date",
        b"idempotency-key", b"max-forwards", b"prefer", b"priority", b"upgrade", b"alpn", b"pothead-claim",
        b"pothead-worker",
        b"x-request-id", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
        b"authorization", b"pothead-action", b"sec-fetch-site",
    )
)  # fmt: skip
_LIST_FIELDS: Final = frozenset((b"connection", b"content-length", b"transfer-encoding"))
# Peers repeat themselves: short lines of these fields, which hold no secret, are recalled and not read again.
_RECALLED_FIELDS: Final = frozenset(
    (
        b"accept", b"accept-encoding", b"accept-language", b"accept-ranges", b"cache-control", b"connection",
        b"content-length", b"content-type", b"date", b"dnt", b"expires", b"host", b"origin", b"pragma",
        b"priority", b"sec-ch-ua", b"sec-ch-ua-mobile", b"sec-ch-ua-platform", b"sec-fetch-dest",
        b"sec-fetch-mode", b"sec-fetch-site", b"sec-fetch-user", b"server", b"te", b"transfer-encoding",
        b"upgrade-insecure-requests", b"user-agent", b"vary", b"x-content-type-options", b"x-forwarded-host",
        b"x-forwarded-proto", b"x-frame-options",
    )
)  # fmt: skip
_recalled: Final[dict[bytes, FieldLine]] = {}
KnownFields = Mapping[bytes, list[bytes]]  # lower-case name -> values


class ProtocolError(http.client.HTTPException):
    """The peer broke the protocol; ``status`` is the answer it deserves, ``detail`` says why."""

    def __init__(self, status: int, detail: str, fields: Sequence[Field] = ()) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.fields = fields  # of the answer


class Inbuf(bytearray):
    """Received bytes that nobody has understood yet.

    It remembers how far the search for the end of a head has come, so that a head that arrives byte by
    byte is searched once and not once a byte.
    """

    __slots__ = ("searched",)

    def __init__(self, data: Bytes = b"") -> None:
        super().__init__(data)
        self.searched = 0

    def take(self, size: int) -> bytes:
        """Removes and returns the first ``size`` bytes."""
        self.searched = 0
        if size == len(self):
            data = bytes(self)
            self.clear()
            return data
        with memoryview(self) as view:
            data = bytes(view[:size])
        del self[:size]
        return data


@dataclasses.dataclass(slots=True)
class RequestHead:
    """What a request line and its fields say; the target is in origin form.

    Not frozen, since that takes three times as long to make, and each request makes one; nor a tuple,
    whose fields take longer to read.
    """

    method: bytes
    target: bytes
    minor_version: int
    host: bytes | None
    forwarded: bytes  # the lines for the worker, without those of the hub's own
    known: KnownFields
    content_length: int | None
    is_chunked: bool
    keep_alive: bool
    expects_continue: bool
    max_forwards: int | None = None  # of an OPTIONS: how many more proxies may pass it on

    @property
    def path(self) -> bytes:
        """The target without its query, which may hold what a log should not."""
        return self.target.partition(b"?")[0]

    @property
    def is_idempotent(self) -> bool:
        """Whether sending it twice does no harm (RFC 9110 §9.2.2), or its sender vouches for that."""
        return self.method in IDEMPOTENT_METHODS or b"idempotency-key" in self.known


REFUSED_METHODS: Final = {
    b"CONNECT": (501, "CONNECT: this is no tunnel"),
    b"TRACE": (405, "TRACE is not allowed"),
}
IDEMPOTENT_METHODS: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))


@dataclasses.dataclass(slots=True)
class ResponseHead:
    """What a status line and its fields say."""

    status: int
    forwarded: bytes  # the lines for the consumer, without those of the hub's own
    content_length: int | None
    is_chunked: bool
    keep_alive: bool
    has_date: bool
    request_id: bytes  # the worker's own, mostly none
    holds: bool  # the connection until the next handshake on it


def take_request_head(buffer: Inbuf) -> RequestHead | None:
    """Removes a request head from the front of ``buffer``; ``None`` when more bytes are needed.

    A head that cannot become valid any more is refused at once and not at its end.  Raises
    ``ProtocolError`` with the status to answer; the head stays in the buffer then.  RFC 9112 §2 to §6.
    """
    if buffer.startswith(b"\r\n"):  # RFC 9112 §2.2: empty lines before a request are skipped
        empty = _EMPTY_LINES.match(buffer)
        assert empty is not None
        del buffer[: empty.end()]
    head = _find_head(buffer, 400)
    if head is None:
        return None
    request = _request_head(head.split(b"\r\n"))
    del buffer[: len(head) + 4]
    buffer.searched = 0
    return request


def _request_head(lines: list[bytes]) -> RequestHead:
    method, target, _, minor = _read_request_line(lines[0]).groups()
    minor_version = 0 if minor == b"0" else 1  # HTTP/1.2 would be understood as 1.1
    known, options, passed_on = _read_fields(lines[1:], 400, _REQUEST_DROPS)
    length, is_chunked = _framing(known, minor_version, 400)
    if method in REFUSED_METHODS:
        raise ProtocolError(*REFUSED_METHODS[method])
    host = _host(known.get(b"host", ()), minor_version)
    if not target.startswith(b"/"):
        target, host = _origin_form(method, target, host)
    expects_continue = b"expect" in known and _expects_continue(known[b"expect"], minor_version)
    forwarded = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b" % (
        method, target, host or b"", b"".join(passed_on)
    )  # fmt: skip
    max_forwards = None
    if method == b"OPTIONS" and b"max-forwards" in known:
        max_forwards = _max_forwards(known[b"max-forwards"])
        forwarded += b"Max-Forwards: %d\r\n" % (max_forwards - 1)
    elif b"max-forwards" in known:
        forwarded += b"".join([b"Max-Forwards: %b\r\n" % value for value in known[b"max-forwards"]])
    return RequestHead(
        method, target, minor_version, host, forwarded, known, length, is_chunked,
        _keeps_alive(options, minor_version), expects_continue, max_forwards,
    )  # fmt: skip


def head_of_refused(received: Bytes) -> RequestHead:
    """Returns a head with the method and path that ``received`` begins with, for the log."""
    line = _REQUEST_LINE.match(received)
    if line is None or line.end() > LIMITS.request_line_bytes:
        return UNREADABLE_HEAD
    absolute = _ABSOLUTE_FORM.fullmatch(line[2])
    path = absolute[2] if absolute else line[2]
    if not path.startswith(b"/"):  # it may be anything, a URL with a password in it, too
        path = UNREADABLE_HEAD.target
    return dataclasses.replace(UNREADABLE_HEAD, method=line[1], target=path)


def take_response_head(buffer: Inbuf) -> ResponseHead | None:
    """Removes a response head from the front of ``buffer``; ``None`` when more bytes are needed.

    Raises ``ProtocolError(502)``: whatever is wrong with it is not the consumer's fault.
    """
    head = _find_head(buffer, 502)
    if head is None:
        return None
    del buffer[: len(head) + 4]
    buffer.searched = 0
    lines = head.split(b"\r\n")
    minor_version, status, reason = _read_status_line(lines[0])
    known, options, passed_on = _read_fields(lines[1:], 502, _RESPONSE_DROPS)
    length, is_chunked = _framing(known, minor_version, 502)
    forwarded = b"HTTP/1.1 %d %b\r\n%b" % (status, reason, b"".join(passed_on))
    if length is not None and status not in (204, 103):
        forwarded += b"Content-Length: %d\r\n" % length
    return ResponseHead(
        status, forwarded, length, is_chunked, _keeps_alive(options, minor_version),
        b"date" in known, known.get(b"x-request-id", NO_ID)[0], b"hold" in options,
    )  # fmt: skip


@functools.lru_cache(maxsize=16)  # workers repeat themselves; a line is no longer than a head, 0.5 MiB in all
def _read_status_line(line: bytes) -> tuple[int, int, bytes]:
    """Returns the minor version, the status and its reason."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(502, "no status line of HTTP/1.x")
    return min(int(match[1]), 1), int(match[2]), match[3] or b""


def _find_head(buffer: Inbuf, status: int) -> bytes | None:
    """Returns a head without its last two line ends."""
    end = buffer.find(b"\r\n\r\n", buffer.searched)
    if end > LIMITS.head_bytes or (end < 0 and len(buffer) > LIMITS.head_bytes):
        if status == 400 and buffer.find(b"\r\n", 0, LIMITS.request_line_bytes) < 0:
            raise ProtocolError(414, f"the request line is over {LIMITS.request_line_bytes} bytes")
        raise ProtocolError(431 if status == 400 else status, f"the head is over {LIMITS.head_bytes} bytes")
    if end < 0:
        _refuse_hopeless(buffer, status)
        buffer.searched = max(0, len(buffer) - 3)
        return None
    return bytes(buffer[:end])  # of a few bytes a second copy is cheaper than a view


def _refuse_hopeless(buffer: Inbuf, status: int) -> None:
    """Raises ``ProtocolError`` if what has come of a head cannot be the beginning of a valid one."""
    is_request = status == 400
    if _HOPELESS.search(buffer, max(0, buffer.searched - 1)):
        if buffer.startswith(b"\x16\x03"):  # the beginning of a handshake
            raise ProtocolError(status, "this is TLS, which is not spoken on this port")
        raise ProtocolError(status, "a control character, bare CR or bare LF in the head")
    line_end = buffer.find(b"\r\n")
    if line_end < 0:
        if is_request and len(buffer) > LIMITS.request_line_bytes:
            raise ProtocolError(414, f"the request line is over {LIMITS.request_line_bytes} bytes")
        if is_request and buffer and buffer != b"\r" and not _TOKEN_ONLY.match(buffer):
            raise ProtocolError(400, "this is not HTTP")
        if not is_request and not buffer.startswith(b"HTTP/1."[: len(buffer)]):
            raise ProtocolError(502, "this is not HTTP/1.x")
    elif line_end + 2 > buffer.searched:  # the line has just become complete
        read = _read_request_line if is_request else _read_status_line
        read(bytes(buffer[:line_end]))


def _read_request_line(line: bytes) -> re.Match[bytes]:
    """Returns the method, the target and the two numbers of the version, of which the first is 1."""
    if len(line) + 2 > LIMITS.request_line_bytes:
        raise ProtocolError(414, f"the request line is over {LIMITS.request_line_bytes} bytes")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(400, "no request line: method, target and HTTP/1.1, parted by one space each")
    if match[3] != b"1":
        raise ProtocolError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    return match


def _read_fields(
    lines: list[bytes], status: int, dropped: frozenset[bytes]
) -> tuple[dict[bytes, list[bytes]], frozenset[bytes], list[bytes]]:
    """Returns the fields that the hub itself acts on, the options of Connection, and the lines to pass on.

    The fields are values by lower-case name.  What is ``dropped``, or named by an option, is not passed on.
    """
    known: dict[bytes, list[bytes]] = {}
    passed_on = []
    for line in lines:
        name, value, key, line_out = _recalled.get(line) or _read_field(line, status)
        if name:
            known.setdefault(name, []).append(value)
        if key not in dropped:
            passed_on.append(line_out)
    if len(lines) > LIMITS.head_fields:
        raise ProtocolError(431 if status == 400 else status, f"more than {LIMITS.head_fields} fields")
    options = _connection_options(known) if b"connection" in known else NO_OPTIONS
    if not options <= dropped:  # rare; only now it is known what else ends here
        return _read_fields(lines, status, dropped | options)
    return known, options, passed_on


def _read_field(line: bytes, status: int) -> FieldLine:
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError(status, "a field line that is not 'name: value'")
    name, value = match[1], match[2].strip(b" \t")
    key = name.lower()
    if key in _LIST_FIELDS and value.count(b",") > LIMITS.head_fields:
        raise ProtocolError(status, f"a {name.decode()} of more than {LIMITS.head_fields} members")
    known_as = key if key in _KNOWN_FIELDS else b""
    field = (known_as, value, key.replace(b"_", b"-"), b"%b: %b\r\n" % (name, value))
    if key in _RECALLED_FIELDS and len(line) <= LIMITS.recalled_line_bytes:
        if len(_recalled) >= LIMITS.recalled_lines:
            _recalled.clear()
        _recalled[line] = field
    return field


def _list_of(values: Iterable[bytes]) -> list[bytes]:
    """Returns the members of a comma-separated field, in lower case (RFC 9110 §5.6.1)."""
    return [member.strip(b" \t").lower() for value in values for member in value.split(b",")]


NO_OPTIONS: Final[frozenset[bytes]] = frozenset()
KEEP_ALIVE: Final = frozenset((b"keep-alive",))
NO_ID: Final = (b"",)
# What stands in the log for a request whose first line could not be read.
UNREADABLE_HEAD: Final = RequestHead(b"-", b"-", 1, None, b"", {}, None, False, False, False)


def _connection_options(known: KnownFields) -> frozenset[bytes]:
    if known[b"connection"] == [b"keep-alive"]:
        return KEEP_ALIVE  # the usual case
    return frozenset(_list_of(known[b"connection"]))


def _keeps_alive(options: frozenset[bytes], minor_version: int) -> bool:
    """Whether the connection outlives this message (RFC 9112 §9.3)."""
    return b"close" not in options and (minor_version == 1 or b"keep-alive" in options)


def _framing(known: KnownFields, minor_version: int, status: int) -> tuple[int | None, bool]:
    """Returns the body's length, if there is one, and whether it is chunked (RFC 9112 §6)."""
    lengths, codings = known.get(b"content-length"), known.get(b"transfer-encoding")
    if codings is None:
        return (None if lengths is None else _content_length(lengths, status)), False
    if lengths is not None:
        raise ProtocolError(status, "both Content-Length and Transfer-Encoding")
    if minor_version == 0:
        raise ProtocolError(status, "Transfer-Encoding in a message of HTTP/1.0")
    _check_codings(_list_of(codings), status)
    return None, True


def _check_codings(codings: list[bytes], status: int) -> None:
    if codings == [b"chunked"]:
        return
    if not all(_TOKEN_ONLY.fullmatch(coding) for coding in codings):
        raise ProtocolError(status, "a malformed Transfer-Encoding")
    if b"chunked" in codings[:-1]:
        raise ProtocolError(status, "a Transfer-Encoding that is chunked twice, or not at its end")
    raise ProtocolError(501 if status == 400 else status, "a Transfer-Encoding other than chunked")


def _content_length(values: list[bytes], status: int) -> int:
    """Returns the one length that all values agree on (RFC 9112 §6.3, rule 5)."""
    if len(values) == 1 and values[0].isdigit() and len(values[0]) <= LIMITS.length_digits:
        return int(values[0])  # the usual case
    members = set(_list_of(values))
    digits = members.pop()
    if members or not _DIGITS.fullmatch(digits):
        raise ProtocolError(status, "a malformed Content-Length, or several that differ")
    if len(digits) > LIMITS.length_digits and len(digits.lstrip(b"0")) > LIMITS.length_digits:
        raise ProtocolError(413 if status == 400 else status, "a Content-Length beyond all measure")
    return int(digits[-LIMITS.length_digits :])


def _host(values: Sequence[bytes], minor_version: int) -> bytes | None:
    """Returns the Host field; it must be there once, in HTTP/1.0 at most once (RFC 9112 §3.2)."""
    if not values and minor_version == 0:
        return None
    if len(values) != 1:
        raise ProtocolError(400, "no Host field" if not values else "several Host fields")
    return _checked_host(values[0])


@functools.lru_cache(maxsize=64)  # a service has few names; what is refused is not kept
def _checked_host(value: bytes) -> bytes:
    if len(value) > LIMITS.host_bytes or not _HOST.fullmatch(value):
        raise ProtocolError(400, "a malformed Host field")
    return value


def _origin_form(method: bytes, target: bytes, host: bytes | None) -> tuple[bytes, bytes | None]:
    """Returns path and host of a target that is no path.

    An absolute target overrules the Host field (RFC 9112 §3.2.2).
    """
    if target == b"*" and method == b"OPTIONS":
        return target, host
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None or not 0 < len(absolute[1]) <= LIMITS.host_bytes or not _HOST.fullmatch(absolute[1]):
        raise ProtocolError(400, "a target that is neither a path nor an http URL")
    if absolute[1].startswith(b":"):
        raise ProtocolError(400, "a target without a host")
    path = absolute[2]
    if not path and method == b"OPTIONS":
        path = b"*"  # RFC 9112 §3.2.4
    return (path if path[:1] in (b"/", b"*") else b"/" + path), absolute[1]


def _expects_continue(values: list[bytes], minor_version: int) -> bool:
    """Whether the consumer waits for a 100 before it sends its body (RFC 9110 §10.1.1)."""
    if minor_version == 0:
        return False
    if any(value.lower() != b"100-continue" for value in values):
        raise ProtocolError(417, "an expectation other than 100-continue")
    return True


def _max_forwards(values: list[bytes]) -> int:
    """Returns the number, or less if it is beyond all measure (RFC 9110 §7.6.2).

    What cannot be counted down must not be passed on, and so is refused.
    """
    if len(values) != 1 or not _DIGITS.fullmatch(values[0]):
        raise ProtocolError(400, "a malformed Max-Forwards, or several")
    return int(values[0].lstrip(b"0")[: LIMITS.length_digits] or b"0")


# .. bodies ..


class BodyReader:
    """Reads one message body out of the bytes of a stream (RFC 9112 §6.3)."""

    __slots__ = ("done", "verbatim")
    done: bool
    verbatim: int  # so many of the next bytes are body as they stand, without any framing among them
    stopped = False  # ``take`` has left more in the buffer that it could have taken, for the next turn

    def skip(self, size: int) -> None:
        """Counts ``size`` bytes (at most ``verbatim``) that were read without ``take``."""
        self.verbatim -= size

    def take(self, buffer: Inbuf) -> bytes:
        """Removes from ``buffer`` what belongs to the body and returns the body bytes in it."""
        data = buffer.take(min(self.verbatim, len(buffer)))
        self.skip(len(data))
        return data

    def on_eof(self) -> None:
        """The stream has ended; raises ``ProtocolError`` if the body may not end here."""


class FixedBody(BodyReader):
    """A body with a Content-Length."""

    __slots__ = ("_status",)

    def __init__(self, length: int, status: int = 400) -> None:
        self.verbatim = length
        self.done = length == 0
        self._status = status

    def skip(self, size: int) -> None:
        self.verbatim -= size
        self.done = self.verbatim == 0

    def on_eof(self) -> None:
        if not self.done:
            raise ProtocolError(self._status, f"the body ended {self.verbatim} bytes early")


class UntilCloseBody(BodyReader):
    """A response body that ends with its connection."""

    __slots__ = ()

    def __init__(self) -> None:
        self.verbatim = sys.maxsize
        self.done = False

    def on_eof(self) -> None:
        self.done = True


class _ChunkedPart(enum.Enum):
    SIZE = enum.auto()
    DATA = enum.auto()  # and the line end behind it
    TRAILER = enum.auto()


class ChunkedBody(BodyReader):
    """A body in chunks; extensions and trailer fields are checked and dropped (RFC 9112 §7.1).

    Chunks are bounded in two ways, since they can be as small as a byte: each ``take`` takes so many, and
    all of their framing together may not outweigh what is in them by too much.
    """

    __slots__ = ("_allowance", "_excess", "_part", "_status", "stopped")

    def __init__(self, status: int = 400) -> None:
        self._status = status
        self._part = _ChunkedPart.SIZE
        # Bytes of framing for each byte of the body: four, where a byte by itself takes five.  A worker's
        # events may go on for days, byte by byte.
        self._allowance = 4 if status == 400 else 8
        self._excess = 0  # beyond that
        self.verbatim = 0
        self.done = False
        self.stopped = False

    def skip(self, size: int) -> None:
        self.verbatim -= size
        self._excess -= self._allowance * size

    def take(self, buffer: Inbuf) -> bytes:
        pieces: list[bytes | bytearray] = []
        before = len(buffer)
        left = LIMITS.chunks_a_turn
        while buffer and left > 0:
            if self._part is _ChunkedPart.SIZE:
                left -= self._take_plain_chunks(buffer, pieces, left)
            if not self._take_part(buffer, pieces):
                break
            left -= 1
        self.stopped = left <= 0 and bool(buffer) and not self.done
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._excess += before - len(buffer) - len(data)
        if self._excess > LIMITS.framing_bytes:
            raise ProtocolError(self._status, "chunks that are too small: more framing than bytes in them")
        return bytes(data)

    def _take_plain_chunks(self, buffer: Inbuf, pieces: list[bytes | bytearray], limit: int) -> int:
        """Takes the next chunks that are here from end to end, up to ``limit``; returns how many.

        A pattern over the buffer, since a call for each part of each chunk costs five times as much.
        """
        position = count = 0
        while count < limit and (line := _PLAIN_CHUNK.match(buffer, position)):
            start, end = line.end(), line.end() + int(line[1], 16)
            if buffer[end : end + 2] != b"\r\n":
                break
            pieces.append(buffer[start:end])
            self._excess -= self._allowance * (end - start)
            position = end + 2
            count += 1
        if position:
            del buffer[:position]
            buffer.searched = 0
        return count

    def on_eof(self) -> None:
        if not self.done:
            raise ProtocolError(self._status, "the body ended before its last chunk")

    def _take_part(self, buffer: Inbuf, pieces: list[bytes | bytearray]) -> bool:
        """Takes the next part of the framing; false when the body has ended or needs more bytes."""
        if self._part is _ChunkedPart.SIZE:
            return self._take_size(buffer)
        if self._part is _ChunkedPart.TRAILER:
            return self._take_trailer(buffer)
        if not self.verbatim:
            return self._take_data_end(buffer)
        pieces.append(super().take(buffer))
        return True

    def _take_size(self, buffer: Inbuf) -> bool:
        end = buffer.find(b"\r\n", 0, LIMITS.chunk_line_bytes + 2)
        if end < 0:
            if len(buffer) > LIMITS.chunk_line_bytes or _HOPELESS.search(buffer):
                raise ProtocolError(self._status, "a chunk without a size")
            return False
        size = _CHUNK_SIZE.fullmatch(buffer.take(end + 2)[:-2])
        if size is None:
            raise ProtocolError(self._status, "a malformed chunk size")
        self.verbatim = int(size[1], 16)
        self._part = _ChunkedPart.DATA if self.verbatim else _ChunkedPart.TRAILER
        return True

    def _take_data_end(self, buffer: Inbuf) -> bool:
        if not b"\r\n".startswith(buffer[:2]):
            raise ProtocolError(self._status, "a chunk that is longer than its size")
        if len(buffer) < 2:
            return False
        del buffer[:2]
        self._part = _ChunkedPart.SIZE
        return True

    def _take_trailer(self, buffer: Inbuf) -> bool:
        if buffer.startswith(b"\r\n"):
            del buffer[:2]
        else:
            end = buffer.find(b"\r\n\r\n", buffer.searched)
            if (len(buffer) if end < 0 else end) > LIMITS.trailer_bytes:
                raise ProtocolError(431 if self._status == 400 else self._status, "too many trailer fields")
            if end < 0:
                if _HOPELESS.search(buffer, max(0, buffer.searched - 1)):
                    raise ProtocolError(self._status, "a control character in the trailer fields")
                buffer.searched = max(0, len(buffer) - 3)
                return False
            _read_fields(buffer.take(end + 4)[:-4].split(b"\r\n"), self._status, NO_OPTIONS)
        self.done = True
        return False


def request_body(head: RequestHead) -> BodyReader | None:
    """Returns the reader for the body of this request; ``None`` if it has none."""
    if head.is_chunked:
        return ChunkedBody(400)
    return FixedBody(head.content_length, 400) if head.content_length else None


def response_body(head: ResponseHead, method: bytes) -> BodyReader | None:
    """Returns the reader for the body of the response to ``method``; ``None`` if it has none."""
    if method == b"HEAD" or head.status in (204, 304) or head.status < 200:
        return None
    if head.is_chunked:
        return ChunkedBody(502)
    if head.content_length is None:
        return UntilCloseBody()
    return FixedBody(head.content_length, 502) if head.content_length else None


class End(enum.Enum):
    """The end of a message, as ``MessageReader.next`` tells it."""

    END = enum.auto()


END: Final = End.END
NO_BYTES: Final = memoryview(b"")
_EMPTY: Final = FixedBody(0)
HeadT = TypeVar("HeadT", bound="RequestHead | ResponseHead")


class MessageReader(Generic[HeadT]):
    """Takes messages out of the bytes of one stream: a head, the pieces of its body, the end.

    ``feed`` it with what has come, then call ``next`` until it returns ``None``: more bytes are needed or,
    if ``stopped``, this turn's share is used up.
    """

    __slots__ = ("_body_of", "_fresh", "_left", "_take_head", "body", "inbuf")

    def __init__(
        self, take_head: Callable[[Inbuf], HeadT | None], body_of: Callable[[HeadT], BodyReader | None]
    ) -> None:
        self._take_head = take_head
        self._body_of = body_of
        self._fresh = NO_BYTES  # of a body: has come, and is not in the inbuf
        self._left = 0  # heads of this turn's share
        self.inbuf = Inbuf()  # has come and was not understood yet
        self.body: BodyReader | None = None  # of the message whose head was taken, until its end is told

    @property
    def stopped(self) -> bool:
        """Whether there may be more to take at once, but in the next turn."""
        return self._left <= 0 if self.body is None else self.body.stopped

    @property
    def is_at_end(self) -> bool:
        """Whether the body under way has been taken whole."""
        return self.body is not None and self.body.done

    def feed(self, data: memoryview) -> None:
        """Adds what has come, valid until ``next`` has returned ``None``; begins a turn's share."""
        self._left = LIMITS.heads_a_turn
        if self.body is None:
            self.inbuf += data
        else:
            self._fresh = data

    def next(self) -> HeadT | Bytes | End | None:
        """Returns a head, a piece of its body or ``END``.  Raises ``ProtocolError``.

        The usual piece, from the middle of a body, is what was fed, and not copied.  With the last piece,
        which may be empty, ``is_at_end`` tells that ``END`` follows.
        """
        body = self.body
        if body is None:
            size = len(self.inbuf)
            head = self._take_head(self.inbuf) if self._left > 0 else None
            if head is not None:
                self._left -= 1 + (size - len(self.inbuf)) // LIMITS.large_head_bytes
                self.body = self._body_of(head) or _EMPTY
            return head
        if body.done:
            self.body = None
            return END
        if body.stopped and self._left <= 0:
            return None
        fresh, self._fresh = self._fresh, NO_BYTES
        if not self.inbuf and 0 < len(fresh) <= body.verbatim:
            body.skip(len(fresh))
            return fresh
        self.inbuf += fresh
        piece = body.take(self.inbuf)
        if body.stopped:
            self._left = 0
        return piece if piece or body.done else None

    def end(self) -> None:
        """The stream has ended.  Raises ``ProtocolError`` if a message may not end here."""
        if self.body is not None:
            self.body.on_eof()


# .. what may be forwarded ..

HOP_BY_HOP: Final = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
        b"upgrade",
    )
)  # fmt: skip
# Fields of a request that the hub makes itself, or that are meant for it; what a consumer sends under these
# names is dropped.
HUB_FIELDS: Final = frozenset(
    (
        b"host", b"content-length", b"expect", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
        b"x-request-id", b"x-request-start", b"pothead-attempt", b"pothead-queue-seconds",
        b"pothead-waiting", b"proxy-authorization", b"http2-settings", b"max-forwards",
    )
)  # fmt: skip
_REQUEST_DROPS: Final = HOP_BY_HOP | HUB_FIELDS
_RESPONSE_DROPS: Final = HOP_BY_HOP | {b"content-length", b"x-request-id"}


def forwarded_request(head: RequestHead, length: int | None, hub_fields: bytes) -> bytes:
    """Returns the head to send to a worker.

    ``length`` is the body's (``None``: chunked if the request was, else no body), ``hub_fields`` the
    ready field lines that the hub adds.
    """
    framing = b""
    if length is not None:
        framing = b"Content-Length: %d\r\n" % length
    elif head.is_chunked:
        framing = b"Transfer-Encoding: chunked\r\n"
    return b"".join((head.forwarded, framing, hub_fields, b"\r\n"))


def forwarded_response(
    head: ResponseHead, connection: bytes, now: float, request_id: bytes = b"", hub_fields: bytes = b"",
    *, in_chunks: bool = False,
) -> bytes:  # fmt: skip
    """Returns the head to send to a consumer; ``in_chunks`` tells how the body follows.

    ``connection`` is the value of the Connection field (empty: none); ``now``, in seconds since the
    epoch, makes the Date where the worker sent none (RFC 9110 §6.6.1), and ``request_id`` the X-Request-Id.
    ``hub_fields`` are ready field lines.
    """
    parts = [head.forwarded, hub_fields]
    if in_chunks:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    if request_id := head.request_id or request_id:
        parts.append(b"X-Request-Id: %b\r\n" % request_id)
    if not head.has_date and head.status >= 200:
        parts.append(b"Date: %b\r\n" % http_date(int(now)))
    if connection:
        parts.append(b"Connection: %b\r\n" % connection)
    parts.append(b"\r\n")
    return b"".join(parts)


@functools.lru_cache(maxsize=4)
def http_date(epoch_s: int) -> bytes:
    """Returns the time as the fields of HTTP have it (RFC 9110 §5.6.7)."""
    return email.utils.formatdate(epoch_s, usegmt=True).encode()


def chunk(data: Bytes) -> bytes:
    """Returns ``data``, which must not be empty, as a chunk (RFC 9112 §7.1)."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


LAST_CHUNK: Final = b"0\r\n\r\n"


def own_response(
    status: int, body: bytes, content_type: str = "text/plain; charset=utf-8", fields: Sequence[Field] = (),
    *, keep_alive: bool, with_body: bool = True,
) -> bytes:  # fmt: skip
    """Returns a whole response of the hub's own."""
    parts = [b"HTTP/1.1 %d %b\r\n" % (status, http.HTTPStatus(status).phrase.encode())]
    parts += [b"%b: %b\r\n" % field for field in fields]
    parts.append(b"Content-Type: %b\r\nContent-Length: %d\r\n" % (content_type.encode(), len(body)))
    parts.append(b"Date: %b\r\n" % http_date(int(time.time())))
    parts.append(b"Connection: keep-alive\r\n\r\n" if keep_alive else b"Connection: close\r\n\r\n")
    if with_body:
        parts.append(body)
    return b"".join(parts)


# ---- Who may do what (pure) -------------------------------------------------------------------------------
#
# A worker on the PTTH port opens with the handshake of draft-kazuho-ptth-ptth-01 over HTTP/1.1.  Where the
# draft is silent, ``docs/protocol.md`` says what is done.

_ASCII_ORIGIN: Final = re.compile(
    r"https?://(?:[a-z0-9](?:[a-z0-9.\-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?"
)
_SCOPE: Final = re.compile(rb"/\.well-known/ptth/([^/?]+)/")
_PERCENT_ENCODED: Final = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2})+")
_CLAIMANT: Final = re.compile(rb"([A-Za-z0-9._\-]{1,64}); *slots=([1-9][0-9]{0,4})")
_ENVOY_FIELD: Final = re.compile(
    rb"\r\n(?i:x-envoy-reverse-tunnel-(?:node|cluster|tenant)-id):"
)  # it sends all
_TOKEN68: Final = rb"[A-Za-z0-9\-._~+/]+=*"  # RFC 6750 §2.1
_BEARER: Final = re.compile(rb"(?i:bearer) +(" + _TOKEN68 + rb")")
_WORKER_NAME: Final = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_CREDENTIAL: Final = re.compile(
    r"token:(?P<token>[A-Za-z0-9\-._~+/]+=*)|sha256:(?P<digest>[0-9A-Fa-f]{64})"
    r"|certificate:(?P<certificate>[A-Za-z0-9_*](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_])?)"
)


class Permit(NamedTuple):
    """A line of the workers file: who may be a worker, by what he proves it, and what he may serve."""

    name: str
    credential: str  # "sha256:" and a hexadecimal digest, or "certificate:" and a name
    origins: frozenset[str] = frozenset()  # none: all


class Registration(NamedTuple):
    """What a slot has joined with; nothing, if it came by the silent worker port."""

    permit: Permit | None = None
    origins: frozenset[str] = frozenset()  # that it serves; none: all that it may
    # The worker's name and the id that it gives its process, if it claims each request: it may offer the
    # same slot elsewhere, too.
    process: str = ""
    slots: int = 0  # that the process has
    words: bytes = b""  # of its handshake, which it says again on a connection that it has held

    @property
    def name(self) -> str:
        """The worker's, empty if it has none."""
        return "" if self.permit is None else self.permit.name

    def serves(self) -> str:
        """Returns the origins, for people."""
        return ", ".join(sorted(self.origins)) or "all origins"


class Application(NamedTuple):
    """The head of a handshake, understood."""

    protocol: bytes  # to switch to
    origins: frozenset[str]
    is_envoy: bool  # which must be treated with care
    process: str = ""  # the id of a worker that will claim what it is sent
    slots: int = 0


def is_origin(text: str) -> bool:
    """Whether it is the serialization of an origin, as RFC 6454 §6.2 makes it."""
    if not _ASCII_ORIGIN.fullmatch(text):
        return False
    scheme, _, rest = text.partition("://")
    port = rest.rpartition(":")[2] if re.search(r":[0-9]+\Z", rest) else ""
    return port != ("443" if scheme == "https" else "80") and int(port or 1) <= 65535


def read_application(head: RequestHead, compatible: Sequence[str] = ()) -> Application:
    """Returns what a worker offers.  Raises ``ProtocolError`` with the answer that it deserves."""
    known = head.known
    protocols = _list_of(known.get(b"upgrade", ()))
    is_old = "ptth/1.0" in compatible and b"ptth/1.0" in protocols
    switches = head.minor_version == 1 and b"upgrade" in _list_of(known.get(b"connection", ()))
    if not switches or not (is_old or b"ptth" in protocols):
        fields = [(b"Upgrade", b"ptth"), (b"Connection", b"upgrade")]
        detail = "this port is for workers, which ask for Upgrade: ptth; consumers go to the main port"
        raise ProtocolError(426, detail, fields)
    method = b"POST" if is_old else b"GET"
    if head.method != method:
        raise ProtocolError(405, f"the handshake is a {method.decode()}", [(b"Allow", method)])
    if head.content_length or head.is_chunked:
        raise ProtocolError(400, "a handshake has no content")
    scope = _SCOPE.fullmatch(head.target)
    if scope is None and head.target != b"/ptth" and not is_old:
        raise ProtocolError(404, "workers ask for /.well-known/ptth/ORIGINS/, or for /ptth")
    offered = b",".join(known.get(b"alpn", ())).split(b",")
    if not is_old and b"http%2F1.1" not in map(bytes.strip, offered):
        raise ProtocolError(400, "the field ALPN must offer http%2F1.1")
    origins = frozenset(_origins(scope[1])) if scope else frozenset[str]()
    is_envoy = len(_ENVOY_FIELD.findall(head.forwarded)) > 1
    process, slots = _claimant(known) if b"102" in known.get(b"pothead-claim", ()) else ("", 0)
    return Application(b"PTTH/1.0" if is_old else b"ptth", origins, is_envoy, process, slots)


def _claimant(known: KnownFields) -> tuple[str, int]:
    """Returns which process it is that claims requests, and how many slots it has."""
    match = _CLAIMANT.fullmatch(b", ".join(known.get(b"pothead-worker", ())))
    if match is None:
        raise ProtocolError(400, "with Pothead-Claim there is one Pothead-Worker: ID; slots=N")
    return match[1].decode(), int(match[2])


def _origins(scope: bytes) -> list[str]:
    if not _PERCENT_ENCODED.fullmatch(scope):
        raise ProtocolError(400, "a malformed percent-encoding")
    origins = [urllib.parse.unquote(member, "latin-1") for member in scope.decode().split(",")]
    for origin in origins:
        if not is_origin(origin):
            detail = "an origin is https://host or https://host:port, in lower case, without a default port"
            raise ProtocolError(400, detail)
    return origins


def bearer_digest(head: RequestHead) -> str | None:
    """Returns the SHA-256 of the bearer token, in hexadecimal digits; ``None`` if there is not just one.

    Digests are compared, since the time that takes tells nothing of a token, nor of its length.
    """
    given = head.known.get(b"authorization", ())
    bearer = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    return hashlib.sha256(bearer[1]).hexdigest() if bearer else None


def challenge(head: RequestHead) -> Field:
    """Returns the field of a 401 that asks for a bearer token (RFC 6750 §3)."""
    given = head.known.get(b"authorization", ())
    has_scheme = any(value.partition(b" ")[0].lower() == b"bearer" for value in given)
    return b"WWW-Authenticate", b'Bearer realm="pothead"' + (
        b', error="invalid_token"' if has_scheme else b""
    )


def find_permit(head: RequestHead, names: Sequence[str] | None, permits: Mapping[str, Permit]) -> Permit:
    """Returns whose handshake that is; ``names`` are those of the certificate, ``None`` without one.

    Raises ``ProtocolError``: 401 if nobody's, 403 if the certificate is good, but nobody's.
    """
    if b"authorization" in head.known:
        permit = permits.get(f"sha256:{bearer_digest(head)}")
        if permit is None:
            raise ProtocolError(401, "no worker has this token", [challenge(head)])
        return permit
    if names is None:
        raise ProtocolError(401, "workers need a token or a certificate here", [challenge(head)])
    for name in names:
        if (permit := permits.get(f"certificate:{name.lower()}")) is not None:
            return permit
    raise ProtocolError(403, "no worker has this certificate")


def register(
    head: RequestHead,
    application: Application,
    names: Sequence[str] | None,
    permits: Mapping[str, Permit] | None,
) -> Registration:
    """Returns with what a worker joins; without ``permits`` anybody may.  Raises ``ProtocolError``."""
    if permits is None:
        return Registration(None, application.origins, application.process, application.slots)
    permit = find_permit(head, names, permits)
    if permit.origins and not application.origins <= permit.origins:
        refused = ", ".join(sorted(application.origins - permit.origins))
        raise ProtocolError(403, f"worker {permit.name} may not serve {refused}")
    process = application.process and f"{permit.name}:{application.process}"  # of no other worker
    return Registration(permit, application.origins or permit.origins, process, application.slots)


def read_permits(text: str, path: str) -> dict[str, Permit]:
    """Returns the lines of a workers file by their credentials; ``path`` is for complaints.

    Raises ``ValueError`` with file, line and what is wrong; a secret is never repeated.
    """
    permits: dict[str, Permit] = {}
    for number, line in enumerate(text.split("\n"), 1):  # and at nothing else: a comment may have anything
        if words := line.partition("#")[0].split():
            try:
                permit = _permit(words)
                if permit.credential in permits:
                    raise ValueError("the same credential a second time")
            except ValueError as exc:
                raise ValueError(f"{path}, line {number}: {exc}") from None
            permits[permit.credential] = permit
    return permits


def load_permits(path: str) -> dict[str, Permit]:
    """Returns what a workers file says.  Raises ``ValueError`` with a sentence for the user."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return read_permits(file.read(), path)
    except UnicodeDecodeError:
        raise ValueError(f"--workers-file: {path} is no text in UTF-8") from None
    except OSError as exc:
        raise ValueError(f"--workers-file: cannot read {path}: {exc.strerror}") from exc


def _permit(words: list[str]) -> Permit:
    name, *rest = words
    if not _WORKER_NAME.fullmatch(name):
        raise ValueError("a name has letters, digits, dots, hyphens and underscores, 64 at most")
    credential = _CREDENTIAL.fullmatch(rest[0]) if rest else None
    if credential is None:
        raise ValueError("behind the name stands token:SECRET, sha256:HEX or certificate:DNS-NAME")
    for origin in rest[1:]:
        if not is_origin(origin):
            raise ValueError(f"no origin, such as https://api.example or http://api.example:8080: {origin}")
    if credential["certificate"]:
        key = f"certificate:{credential['certificate'].lower()}"
    else:
        digest = credential["digest"] or hashlib.sha256(credential["token"].encode()).hexdigest()
        key = f"sha256:{digest.lower()}"
    return Permit(name, key, frozenset(rest[1:]))


# ---- The policy: who is next, and who serves it (pure) ----------------------------------------------------
#
# A ticket has a rank: what its tenant has had, then its place (its arrival less its head start).  A slot has
# a rank: how many pools it serves, how much its machine runs, how long it waits.  What is first is found with
# ``Ranking``; the tenant that is next among those that wait in some pools, with ``Standings``.

ANYTHING: Final[frozenset[str]] = frozenset()  # the origins of a slot that serves all pools
NORMAL_URGENCY: Final = 3  # RFC 9218 §4.1
Rank = tuple[Any, ...]


class SlotLike(Protocol):
    """What the policy needs to know of a slot."""

    @property
    def offer(self) -> Offer[Any]:
        """What it is part of, as ``Policy.join`` has told it."""


ItemT = TypeVar("ItemT")
SlotT = TypeVar("SlotT", bound=SlotLike)
RankedT = TypeVar("RankedT")


class Ranking(Generic[RankedT]):
    """Things by rank, the least first; the rank is a function of the thing, ``None`` if it is not to be had.

    A rank may rise at any time and nobody need tell: it is looked at when the thing comes to the top.  One
    that has fallen must be filed again.  One thing alone is not ordered: only whether it is to be had counts.
    """

    __slots__ = ("_alone", "_filed", "_heap", "_numbers", "_rank")

    def __init__(self, rank: Callable[[RankedT], Rank | None]) -> None:
        self._rank = rank
        self._alone: RankedT | None = None  # as long as there has been no other
        self._heap: list[tuple[Rank, int, RankedT]] = []  # with some that are stale
        self._filed: dict[RankedT, Rank] = {}  # the entry that counts
        self._numbers = itertools.count()

    def file(self, thing: RankedT) -> None:
        """Takes the thing up, or its rank that has fallen."""
        alone = self._alone
        if alone is thing:
            return
        if not self._filed:
            if alone is None:
                self._alone = thing
                return
            self._alone = None
            if (rank := self._rank(alone)) is not None:
                self._filed[alone] = rank
                self._heap = [(rank, next(self._numbers), alone)]
        rank = self._rank(thing)
        if rank is None:
            return
        filed = self._filed.get(thing)
        if filed is not None and filed <= rank:
            return
        self._filed[thing] = rank
        heap = self._heap
        entry = rank, next(self._numbers), thing
        if heap and heap[0][2] is thing:
            heapq.heapreplace(heap, entry)
        else:
            heapq.heappush(heap, entry)
            if len(heap) > 2 * len(self._filed) + 64:
                self._heap = [each for each in heap if self._filed.get(each[2]) is each[0]]
                heapq.heapify(self._heap)

    def drop(self, thing: RankedT) -> None:
        """Forgets the thing."""
        if self._alone is thing:
            self._alone = None
        elif self._filed.pop(thing, None) is not None and not self._filed:
            self._heap.clear()  # nothing is kept alive that has gone

    def first(self) -> RankedT | None:
        """Returns what has the least rank."""
        alone = self._alone
        if alone is not None:
            return None if self._rank(alone) is None else alone
        heap, filed = self._heap, self._filed
        while heap:
            rank, number, thing = heap[0]
            if filed.get(thing) is not rank:
                heapq.heappop(heap)
                continue
            now = self._rank(thing)
            if now == rank:
                return thing
            if now is None:
                heapq.heappop(heap)
                del filed[thing]
            else:
                filed[thing] = now
                heapq.heapreplace(heap, (now, number, thing))
        return None


def least(things: Iterable[RankedT], rank: Callable[[RankedT], Rank | None]) -> RankedT | None:
    """Returns the thing with the least rank, of those that are to be had."""
    best, lowest = None, None
    for thing in things:
        if (its := rank(thing)) is not None and (lowest is None or its < lowest):
            best, lowest = thing, its
    return best


class Claim(NamedTuple):
    """What decides when a request is served, beside its arrival."""

    origin: str = ""  # its pool
    tenant: str = ""
    urgency: int = NORMAL_URGENCY
    head_start_s: float = 0.0
    wait_s: float | None = None  # that its consumer would wait at most, if it has said so


class Ticket(Generic[ItemT]):
    """A request's place in the line.  One that does not wait may come back to it."""

    __slots__ = (
        "expires_at", "item", "line", "number", "origin", "place", "run", "since", "urgency", "waits",
    )  # fmt: skip

    def __init__(
        self, item: ItemT, number: int, since: float, expires_at: float, claim: Claim | None
    ) -> None:
        self.item = item
        self.number = number  # by arrival
        self.since = since  # monotonic seconds
        self.expires_at = expires_at
        self.place = since  # monotonic seconds: when one without a head start would have come
        self.urgency = NORMAL_URGENCY
        self.origin = ""  # the pool that it belongs to, if that has a name
        if claim is not None:
            self.place -= claim.head_start_s
            self.urgency = claim.urgency
            self.origin = claim.origin
        self.line: Line[ItemT]  # where it waits, or has waited last
        self.run: Run | None = None  # the last one, if its tenant is charged for it
        self.waits = True


class Line(Generic[ItemT]):
    """The requests of one tenant in one pool, by place."""

    __slots__ = ("_by_arrival", "_by_place", "_odd", "pool", "tenant", "waiting")

    def __init__(self, pool: Pool, tenant: Tenant) -> None:
        self.pool = pool
        self.tenant = tenant
        self.waiting = 0
        self._by_arrival: deque[Ticket[ItemT]] = deque()  # as they came; with some that do not wait
        self._by_place: list[tuple[float, int, Ticket[ItemT]]] = []  # heap of those with another place
        self._odd: Counter[int] = Counter()  # how many wait with another urgency than the normal one

    def put(self, ticket: Ticket[ItemT]) -> bool:
        """Takes one up; returns whether it stands where it came, behind all who did."""
        arrived = self._by_arrival
        ticket.line = self
        self.waiting += 1
        if ticket.urgency != NORMAL_URGENCY:
            self._odd[ticket.urgency] += 1
        if ticket.place != ticket.since or (arrived and ticket.number < arrived[-1].number):
            heapq.heappush(self._by_place, (ticket.place, ticket.number, ticket))
            return False
        arrived.append(ticket)
        return True

    def first_to_come(self) -> Ticket[ItemT] | None:
        """Returns the first of those that wait as they came."""
        arrived = self._by_arrival
        while arrived and not arrived[0].waits:
            arrived.popleft()
        return arrived[0] if arrived else None

    def first(self) -> Ticket[ItemT] | None:
        """Returns the one that is next."""
        arrived, placed = self._by_arrival, self._by_place
        while arrived and not arrived[0].waits:
            arrived.popleft()
        while placed and not placed[0][2].waits:
            heapq.heappop(placed)
        if placed and (not arrived or placed[0][:2] < (arrived[0].place, arrived[0].number)):
            return placed[0][2]
        return arrived[0] if arrived else None

    def take(self) -> Ticket[ItemT]:
        """Removes and returns the one that is next; there must be one."""
        arrived, placed = self._by_arrival, self._by_place
        if placed or not arrived[0].waits:
            ticket = self.first()
            assert ticket is not None
            if arrived and arrived[0] is ticket:
                arrived.popleft()
            else:
                heapq.heappop(placed)
        else:
            ticket = arrived.popleft()
        self._count_off(ticket)
        return ticket

    def withdraw(self, ticket: Ticket[ItemT]) -> None:
        """Has a request that waits not wait any more."""
        self._count_off(ticket)
        self._sweep()

    def _count_off(self, ticket: Ticket[ItemT]) -> None:
        ticket.waits = False
        self.waiting -= 1
        if ticket.urgency != NORMAL_URGENCY:
            self._odd[ticket.urgency] -= 1

    def _sweep(self) -> None:
        """Drops what does not wait any more, when it is more than what does."""
        if len(self._by_arrival) + len(self._by_place) > 2 * self.waiting + 8:
            self._drop_gone()

    def _drop_gone(self) -> None:
        self._by_arrival = deque(ticket for ticket in self._by_arrival if ticket.waits)
        self._by_place = [each for each in self._by_place if each[2].waits]
        heapq.heapify(self._by_place)

    def rank(self) -> Rank | None:
        """Returns the place of the request that is next."""
        ticket = self.first()
        return None if ticket is None else (ticket.place, ticket.number)

    def count_ahead(self, urgency: int) -> int:
        """Returns how many of these are served before one that would come now, whatever happens."""
        later = sum(count for each, count in self._odd.items() if each > urgency)
        if urgency < NORMAL_URGENCY:
            later += self.waiting - sum(self._odd.values())
        return self.waiting - later

    def __iter__(self) -> Iterator[Ticket[ItemT]]:
        """Yields what waits, by place."""
        arrived = ((ticket.place, ticket.number, ticket) for ticket in self._by_arrival)
        for _, _, ticket in heapq.merge(arrived, sorted(self._by_place)):
            if ticket.waits:
                yield ticket

    def oldest(self) -> float:
        """Returns since when the oldest waits, infinity without one."""
        first = self.first_to_come()
        others = (each[2].since for each in self._by_place if each[2].waits)
        return min([math.inf if first is None else first.since, *others])

    def remove(self, origin: str) -> list[Ticket[ItemT]]:
        """Removes and returns those of a pool that has got a name."""
        found = [ticket for ticket in self if ticket.origin == origin]
        for ticket in found:
            self._count_off(ticket)
        if found:
            self._drop_gone()
        return found


class Run:
    """What a tenant is charged for one request that a slot serves, or has served."""

    __slots__ = ("counted_s", "had_s", "since", "tenant", "turn")

    GROWTH: Final = 1.25

    def __init__(self, tenant: Tenant, now: float) -> None:
        self.tenant = tenant
        self.since = now  # infinity when it is charged for no more: it has ended, or has to be run again
        self.counted_s = 0.0  # by estimate, and a little too much
        self.had_s = 0.0  # for certain, and a little too little
        self.turn = tenant.turn  # when that had one before


class Tenant:
    """One of those who share the slots, and what it has had of them."""

    __slots__ = (
        "charge_s", "epoch", "had_s", "lines", "name", "newest", "number", "order", "running",
        "turn", "waiting", "worked_s",
    )  # fmt: skip

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.charge_s = 0.0  # worker time as it counts, with estimates for what runs
        self.had_s = 0.0  # worker time as it counts, so far
        self.epoch = 0  # in which these count
        self.worked_s = 0.0  # worker time, as it was, of what has ended
        self.waiting = 0
        self.running = 0
        self.turn = number  # when it last got a slot, or began to wait for one; a running number
        self.lines: dict[Pool, Line[Any]] = {}  # with fair shares: of the pools that it waits in
        self.order: Ranking[Line[Any]] = Ranking(Line.rank)  # its lines, by place
        self.newest: list[tuple[int, Ticket[Any]]] = []  # heap, with some that do not wait

    def rank(self) -> Rank:
        """Returns what it is charged, then its turn."""
        return self.charge_s, self.turn

    def first_line(self, scope: Scope[Any]) -> Line[Any] | None:
        """Returns the line with the request that is next, of those that these slots serve."""
        if not scope.origins:
            return self.order.first()
        return least(filter(None, map(self.lines.get, scope.served)), Line.rank)

    def activity(self) -> Rank | None:
        """Returns its rank among those that wait or run."""
        return (self.had_s,) if self.waiting or self.running else None

    def size(self) -> Rank | None:
        """Returns its rank by what waits, most first."""
        return (-self.waiting, self.number) if self.waiting else None

    def newest_ticket(self) -> Ticket[Any]:
        """Returns the last to come of those that wait; there must be one."""
        while not self.newest[0][1].waits:
            heapq.heappop(self.newest)
        return self.newest[0][1]

    def note(self, ticket: Ticket[Any]) -> None:
        """Keeps in mind one that waits now."""
        heapq.heappush(self.newest, (-ticket.number, ticket))
        if len(self.newest) > 2 * self.waiting + 8:
            self.newest = sorted({each for each in self.newest if each[1].waits})


class Standings:
    """The tenants that wait, by rank; tells the first of those that wait in some pools.

    Sorted pieces of a bounded length, each with the pools in which somebody in it waits, or has waited not
    long ago.  So what a tenant is charged changes in one place, in however many pools it waits.
    """

    __slots__ = ("_filed", "_pieces", "_pools")

    LENGTH: Final = 64

    def __init__(self) -> None:
        self._pieces: list[list[tuple[float, int, Tenant]]] = [[]]
        self._pools: list[set[Pool]] = [set()]
        self._filed: dict[Tenant, tuple[float, int, Tenant]] = {}

    def file(self, tenant: Tenant) -> None:
        """Takes a tenant up, or its new rank, or another pool that it waits in."""
        self.drop(tenant)
        entry = self._filed[tenant] = (tenant.charge_s, tenant.turn, tenant)
        number = self._find(entry)
        piece = self._pieces[number]
        bisect.insort(piece, entry)
        self._pools[number].update(tenant.lines)
        if len(piece) > 2 * self.LENGTH:
            self._pieces[number : number + 1] = [piece[: self.LENGTH], piece[self.LENGTH :]]
            self._pools.insert(number, set(self._pools[number]))

    def drop(self, tenant: Tenant) -> None:
        """Forgets the tenant."""
        entry = self._filed.pop(tenant, None)
        if entry is None:
            return
        number = self._find(entry)
        piece = self._pieces[number]
        del piece[bisect.bisect_left(piece, entry)]
        if not piece and len(self._pieces) > 1:
            del self._pieces[number], self._pools[number]

    def first(self, scope: Scope[Any]) -> Tenant | None:
        """Returns the first that waits in a pool that these slots serve."""
        if not scope.origins:
            return self._pieces[0][0][2] if self._filed else None
        for number, known in enumerate(self._pools):
            if not known.isdisjoint(scope.served):
                seen: set[Pool] = set()
                for _, _, tenant in self._pieces[number]:
                    if not tenant.lines.keys().isdisjoint(scope.served):
                        return tenant
                    seen.update(tenant.lines)
                self._pools[number] = seen
        return None

    def forget(self, pool: Pool) -> None:
        """Nobody waits in the pool, and nobody will."""
        for known in self._pools:
            known.discard(pool)

    def _find(self, entry: tuple[float, int, Tenant]) -> int:
        number = bisect.bisect_left(self._pieces, entry, key=_last) if len(self._pieces) > 1 else 0
        return min(number, len(self._pieces) - 1)


def _last(piece: list[tuple[float, int, Tenant]]) -> tuple[float, int, Tenant]:
    return piece[-1]


class Pool:
    """The requests that the same slots may serve."""

    __slots__ = ("alone_since", "is_kept", "members", "origin", "scopes", "waiting")

    def __init__(self, origin: str, everything: Scope[Any], alone_since: float) -> None:
        self.origin = origin  # none: all origins that have no pool of their own
        self.is_kept = False
        self.waiting = 0
        self.alone_since = alone_since  # when the last slot for it went; infinity while there are some
        self.members: dict[Tenant, Line[Any]] = {}
        self.scopes: list[Scope[Any]] = [everything]  # that serve it; the others have slots

    @property
    def name(self) -> str:
        """Its origin, for people."""
        return self.origin or "other"


class Scope(Generic[SlotT]):
    """The slots that serve the same pools."""

    __slots__ = ("idle", "offers", "origins", "served", "slots")

    def __init__(self, origins: frozenset[str]) -> None:
        self.origins = origins
        self.served: list[Pool] = []  # by name; none if it is all
        self.offers: Ranking[Offer[SlotT]] = Ranking(Offer.rank)
        self.slots = 0
        self.idle = 0

    def rank(self) -> Rank | None:
        """Returns the rank of the slot that is next."""
        offer = self.offers.first()
        return None if offer is None else (len(self.origins) or math.inf, *(offer.rank() or ()))


class Offer(Generic[SlotT]):
    """The slots of one machine and one scope."""

    __slots__ = ("idle", "machine", "newest", "scope", "slots")

    def __init__(self, machine: Machine[SlotT], scope: Scope[SlotT]) -> None:
        self.machine = machine
        self.scope = scope
        self.slots = 0
        self.idle: dict[SlotT, int] = {}  # those that wait, and when each was parked: a number that falls
        self.newest = 0  # that of the last one

    def rank(self) -> Rank | None:
        """Returns the rank of the slot that is next: fewest running, last parked."""
        if not self.idle or self.machine.rests:
            return None
        return self.machine.running, self.newest

    def remove(self, slot: SlotT) -> bool:
        """Has a slot not wait any more; returns whether it did."""
        if self.idle.pop(slot, None) is None:
            return False
        if self.idle:
            self.newest = self.idle[next(reversed(self.idle))]
        return True


class Machine(Generic[SlotT]):
    """What is known of a machine that has, or had, slots.

    A slot that fails is closed and forgotten: only its machine tells that there were failures.
    """

    __slots__ = (
        "failures", "left_at", "may_rest_at", "name", "offers", "requeues", "rests", "rests_until", "running",
        "served", "slots",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.slots = 0  # connected now
        self.offers: dict[frozenset[str], Offer[SlotT]] = {}  # those slots, by what they serve
        self.running = 0
        self.rests = False  # its slots are given nothing
        self.rests_until = self.may_rest_at = -math.inf
        self.served = 0
        self.failures = 0
        self.requeues = 0  # those of the failures after which the request was tried again
        self.left_at = 0.0  # when the last slot went


class Policy(Generic[ItemT, SlotT]):
    """Requests and slots in, pairs out.

    Requests are served by rank; one that comes back has its old rank again.  Without pools, urgencies and
    fair shares that is first come, first served.  Of the slots that wait and may serve it, one that serves
    the fewest pools is taken, then one on the machine with the fewest running, there the one parked last.
    Each step costs O(log n) at most in requests, slots and machines, and less than O(√n) in tenants that
    wait; what it costs in pools and kinds of slots is linear, since people write those down.  The first slot
    that names an origin costs a look at all that waits.  ``now`` is monotonic seconds.
    """

    def __init__(
        self,
        max_length: int,
        *,
        no_worker_s: float = math.inf,
        is_fair: bool = False,
        origins: Iterable[str] = (),
    ) -> None:
        self._max_length = max_length
        self._no_worker_s = no_worker_s  # that a request waits at most while no slot could serve it
        self._gives_up = no_worker_s < math.inf  # before its time is over
        self.is_fair = is_fair
        self._numbers = itertools.count(1)
        # Most expire in the order of the line.  Filed are the others: those that have another place, or may
        # wait less long than who came before, and all where there are more lines than one.
        self._expiries: list[tuple[float, int, Ticket[ItemT]]] = []  # heap, with some that are stale
        self._last_expiry = -math.inf  # of those in the line that are not filed
        self._orphaned: deque[tuple[float, Pool]] = deque()  # by when those left without slots give up
        self._scopes: dict[frozenset[str], Scope[SlotT]] = {ANYTHING: Scope(ANYTHING)}
        self._anything = self._scopes[ANYTHING]
        self._others = Pool("", self._anything, -math.inf)
        self._everybody = Tenant("", 0)
        self._line: Line[ItemT] = Line(self._others, self._everybody)  # the only one, as long as that is so
        self._others.members[self._everybody] = self._everybody.lines[self._others] = self._line
        self._is_plain = not is_fair  # there is only one line
        self.pools: dict[str, Pool] = {}  # those that have a name
        self.machines: dict[str, Machine[SlotT]] = {}  # that have slots
        self._resting: deque[Machine[SlotT]] = deque()  # by when that is over
        self.gone: dict[str, Machine[SlotT]] = {}  # that had some, in the order in which they went
        self.waiting = 0  # requests
        self.idle = 0  # slots
        self.running = 0  # slots
        # What fair shares need.
        self._now = 0.0
        self.typical_s = 1.0  # what a request is charged at its start
        self.tenants: dict[str, Tenant] = {}
        self._away: dict[Tenant, None] = {}  # those of them that neither wait nor run, the first to go first
        self._epoch = 0  # changes when nobody waits or runs: all start afresh
        self._standings = Standings()
        self._active: Ranking[Tenant] = Ranking(Tenant.activity)
        self._largest: Ranking[Tenant] = Ranking(Tenant.size)
        self._runs: dict[SlotT, Run] = {}
        self._growing: list[tuple[float, int, Run]] = []  # heap, with some that are over
        for origin in origins:
            self._name(origin).is_kept = True

    # .. requests ..

    def __iter__(self) -> Iterator[ItemT]:
        """Yields what waits, in the order in which it will be served."""
        return (ticket.item for ticket in self.tickets())

    def tickets(self) -> Iterator[Ticket[ItemT]]:
        """Yields what waits, as it will be served if all take equally long and any slot serves any pool."""
        turns = itertools.count(next(self._numbers))
        heap: list[tuple[Rank, int, Iterator[Ticket[ItemT]]]] = []
        for tenant in {line.tenant for line in self._lines()}:
            by_place = heapq.merge(*tenant.lines.values(), key=lambda each: (each.place, each.number))
            heap.append((tenant.rank(), tenant.number, by_place))
        heapq.heapify(heap)
        while heap:
            rank, number, rest = heap[0]
            ticket = next(rest, None)
            if ticket is None:
                heapq.heappop(heap)
                continue
            yield ticket
            heapq.heapreplace(heap, ((rank[0] + self.typical_s, next(turns)), number, rest))

    def _lines(self) -> Iterator[Line[ItemT]]:
        for pool in self.all_pools():
            yield from pool.members.values()

    def all_pools(self) -> Iterator[Pool]:
        """Yields those that have a name, then the one of all others."""
        yield from self.pools.values()
        yield self._others

    @property
    def is_full(self) -> bool:
        """Whether no other request may wait."""
        return self.waiting >= self._max_length

    def put(self, item: ItemT, now: float, limit_s: float, claim: Claim | None = None) -> Ticket[ItemT]:
        """Has ``item`` wait, for so many seconds at most.  Ask ``is_full`` before."""
        ticket = Ticket(item, next(self._numbers), now, now + limit_s, claim)
        tenant = self._everybody
        if self.is_fair:
            tenant = self._find_tenant("" if claim is None else claim.tenant)
            if not tenant.waiting:
                self._enter(tenant)
                self._lift(tenant)
        self._put(ticket, tenant)
        return ticket

    def put_back(self, ticket: Ticket[ItemT], away_s: float) -> None:
        """Has a request wait again, at its old place; the ``away_s`` seconds do not count as waiting.

        Its tenant is not charged for a run that has come to nothing.
        """
        ticket.since += away_s
        ticket.expires_at += away_s
        ticket.waits = True
        tenant = ticket.line.tenant
        if self.is_fair:
            self.tenants[tenant.name] = tenant  # it may have been forgotten
            if ticket.run is not None:
                self._refund(ticket.run)
                ticket.run = None
            if not tenant.waiting:
                self._enter(tenant)
        self._put(ticket, tenant)

    def _put(self, ticket: Ticket[ItemT], tenant: Tenant) -> None:
        self.waiting += 1
        if self._is_plain:
            is_last = self._line.put(ticket)
            if is_last and ticket.expires_at >= self._last_expiry and not self._gives_up:
                self._last_expiry = ticket.expires_at
                return
        else:
            line = self._line_of(self.pool_of(ticket.origin), tenant)
            line.put(ticket)
            self._after_arrival(line, ticket)
        self._file_expiry(ticket)

    def withdraw(self, ticket: Ticket[ItemT]) -> None:
        """Has a request not wait any more; does nothing if it does not."""
        if ticket.waits:
            self.waiting -= 1
            ticket.line.withdraw(ticket)
            if not self._is_plain:
                self._after_removal(ticket.line)
            self._sweep()

    def evicted_by(self, tenant: str) -> Ticket[ItemT] | None:
        """Returns which request has to go, of those of the tenant with the most, for one of this tenant."""
        largest = self._largest.first()
        if largest is None:
            return None
        known = self.tenants.get(tenant)
        if known is not None and known.waiting >= largest.waiting:
            return None
        return largest.newest_ticket()

    def count_ahead(self, claim: Claim) -> int:
        """Returns how many requests are certain to be served before one that would come now."""
        known = self.tenants.get(claim.tenant) if self.is_fair else self._everybody
        line = None if known is None else self.pool_of(claim.origin).members.get(known)
        return 0 if line is None else line.count_ahead(claim.urgency)

    def pool_of(self, origin: str) -> Pool:
        """Returns the pool of an origin: the common one if it has none of its own."""
        return self.pools.get(origin, self._others)

    def slots_of(self, pool: Pool) -> int:
        """Returns how many slots serve it, idle or busy."""
        return sum(scope.slots for scope in pool.scopes)

    def idle_of(self, pool: Pool) -> int:
        """Returns how many of these are idle."""
        return sum(scope.idle for scope in pool.scopes)

    def next_event(self) -> float:
        """Returns when ``expire`` or ``wake`` have something to do, infinity if they do not."""
        at = self._next_to_expire()[0] if self.waiting else math.inf
        if self._resting:
            at = min(at, self._resting[0].rests_until)
        if self._orphaned and self.waiting:
            at = min(at, self._orphaned[0][0])
        return at

    def expire(self, now: float) -> list[ItemT]:
        """Withdraws and returns all whose time is over."""
        expired = []
        while self._orphaned and self._orphaned[0][0] <= now:
            pool = self._orphaned.popleft()[1]
            if pool.alone_since + self._no_worker_s <= now:  # nobody has come, not even for a while
                for ticket in itertools.chain(*pool.members.values()):
                    self._file_expiry(ticket)
        at, first = self._next_to_expire()
        while first is not None and at <= now:
            self.withdraw(first)
            expired.append(first.item)
            at, first = self._next_to_expire()
        return expired

    def oldest_wait(self, now: float) -> float:
        """Returns how long the request that has waited longest has waited, in seconds."""
        oldest = min((line.oldest() for line in self._lines()), default=math.inf)
        return now - oldest if oldest < math.inf else 0.0

    def _due(self, ticket: Ticket[ItemT]) -> float:
        """Returns when its time is over, as things stand."""
        pool = ticket.line.pool
        if pool.alone_since == math.inf:
            return ticket.expires_at
        return min(ticket.expires_at, max(ticket.since, pool.alone_since) + self._no_worker_s)

    def _next_to_expire(self) -> tuple[float, Ticket[ItemT] | None]:
        """Returns when the first expires, infinity if none does: the first in the line, or one that is filed.

        Where all are filed, it is one of those, and what it is filed for is not later.
        """
        filed = self._expiries
        first = self._line.first_to_come()
        at = math.inf if first is None else first.expires_at
        while filed and filed[0][0] < at:
            filed_at, number, ticket = filed[0]
            if not ticket.waits:
                heapq.heappop(filed)
            elif filed_at < (due := self._due(ticket)):  # it was away, or there is somebody to serve it now
                heapq.heapreplace(filed, (due, number, ticket))
            else:
                return filed_at, ticket
        return at, first

    def _file_expiry(self, ticket: Ticket[ItemT]) -> None:
        due = self._due(ticket)
        if due < math.inf:
            heapq.heappush(self._expiries, (due, ticket.number, ticket))
            self._sweep()

    def _sweep(self) -> None:
        """Drops expiries of what does not wait any more, when they are more than the others."""
        if len(self._expiries) > 4 * self.waiting + 64:
            waiting = {each[2] for each in self._expiries if each[2].waits}
            self._expiries = sorted((self._due(each), each.number, each) for each in waiting)

    # .. lines and pools ..

    def _line_of(self, pool: Pool, tenant: Tenant) -> Line[ItemT]:
        line = pool.members.get(tenant)
        if line is None:
            line = pool.members[tenant] = tenant.lines[pool] = Line(pool, tenant)
        return line

    def _after_arrival(self, line: Line[ItemT], ticket: Ticket[ItemT]) -> None:
        pool, tenant = line.pool, line.tenant
        pool.waiting += 1
        if line.first() is ticket:
            tenant.order.file(line)
        if not self.is_fair:
            return
        tenant.waiting += 1
        tenant.note(ticket)
        self._largest.file(tenant)
        if tenant.waiting == 1:
            self._active.file(tenant)
        if line.waiting == 1:
            self._standings.file(tenant)

    def _after_removal(self, line: Line[ItemT]) -> None:
        pool, tenant = line.pool, line.tenant
        pool.waiting -= 1
        if not self.is_fair:
            return
        if not line.waiting:
            self._drop_line(line)
        tenant.waiting -= 1
        if not tenant.waiting:
            tenant.newest.clear()
            self._standings.drop(tenant)
            self._exit(tenant)

    def _drop_line(self, line: Line[ItemT]) -> None:
        line.tenant.order.drop(line)
        del line.pool.members[line.tenant]
        del line.tenant.lines[line.pool]

    def _name(self, origin: str) -> Pool:
        """Returns the pool of an origin, which gets one of its own if it has none."""
        pool = self.pools.get(origin)
        if pool is None:
            if len(self.pools) >= LIMITS.remembered_pools:
                self._forget_a_pool()
            pool = self.pools[origin] = Pool(origin, self._anything, self._others.alone_since)
            self._end_plainness()
            for line in list(self._others.members.values()):
                self._move(line, pool)
        return pool

    def _end_plainness(self) -> None:
        if self._is_plain:
            self._is_plain = False
            for ticket in self._line:
                self._file_expiry(ticket)
            self._others.waiting = self.waiting
            self._everybody.order.file(self._line)

    def _move(self, line: Line[ItemT], pool: Pool) -> None:
        """Moves those of a line that belong to the pool."""
        found = line.remove(pool.origin)
        if not found:
            return
        tenant = line.tenant
        target = self._line_of(pool, tenant)
        for ticket in found:
            ticket.waits = True
            target.put(ticket)
        pool.waiting += len(found)
        tenant.order.file(target)
        line.pool.waiting -= len(found)
        if self.is_fair:
            self._standings.file(tenant)
            if not line.waiting:
                self._drop_line(line)

    def _forget_a_pool(self) -> None:
        """Forgets the first pool that nobody has, serves or waits for."""
        for pool in self.pools.values():
            if not (pool.is_kept or pool.waiting or len(pool.scopes) > 1):
                for line in list(pool.members.values()):
                    self._drop_line(line)
                self._standings.forget(pool)
                del self.pools[pool.origin]
                return

    # .. tenants ..

    def worker_times(self, now: float) -> dict[Tenant, float]:
        """Returns how many seconds each tenant has had of the slots, with what runs."""
        times = {tenant: tenant.worked_s for tenant in self.tenants.values()}
        for run in self._runs.values():
            if run.since < math.inf:
                times[run.tenant] += now - run.since
        return times

    def charge_of(self, tenant: Tenant) -> float:
        """Returns what a tenant's worker time counts."""
        return tenant.charge_s if tenant.epoch == self._epoch else 0.0

    def _find_tenant(self, name: str) -> Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = Tenant(name, next(self._numbers))
        return tenant

    def _enter(self, tenant: Tenant) -> None:
        """A tenant that had nothing waiting has a request."""
        self._away.pop(tenant, None)
        if tenant.epoch != self._epoch:
            tenant.epoch, tenant.charge_s, tenant.had_s = self._epoch, 0.0, 0.0

    def _lift(self, tenant: Tenant) -> None:
        """Has a tenant that had nothing waiting begin at the least that the other active ones have had."""
        self._active.drop(tenant)
        other = self._active.first()
        if other is not None and other.had_s > tenant.had_s:
            tenant.charge_s += other.had_s - tenant.had_s
            tenant.had_s = other.had_s
        tenant.turn = next(self._numbers)

    def _exit(self, tenant: Tenant) -> None:
        """Forgets a tenant, sooner or later, if it neither waits nor runs."""
        if tenant.waiting or tenant.running:
            return
        self._active.drop(tenant)
        self._largest.drop(tenant)
        self._away[tenant] = None
        if len(self._away) > LIMITS.remembered_tenants:
            oldest = next(iter(self._away))
            del self._away[oldest]
            del self.tenants[oldest.name]
        if not self.waiting and not self._runs:
            self._epoch += 1

    def _charge(self, slot: SlotT, ticket: Ticket[ItemT]) -> None:
        """Charges a tenant for a request that begins, by estimate."""
        tenant = ticket.line.tenant
        run = ticket.run = self._runs[slot] = Run(tenant, self._now)
        tenant.running += 1
        tenant.turn = next(self._numbers)
        self._after_removal(ticket.line)  # not before: with nothing that waits or runs it would have gone
        self._count(run, 0.0, max(self.typical_s, 0.001))
        heapq.heappush(self._growing, (run.since + run.counted_s, tenant.turn, run))
        if len(self._growing) > 4 * len(self._runs) + 64:
            self._growing = sorted(each for each in self._growing if each[2].since < math.inf)

    def _grow(self, now: float) -> None:
        """Charges a quarter more for each request that has run for as long as it has been charged for.

        So what a tenant is charged changes in steps, of which a request has few, however long it runs.
        """
        while self._growing and self._growing[0][0] <= now:
            _, turn, run = self._growing[0]
            if run.since == math.inf:
                heapq.heappop(self._growing)
            else:
                self._count(run, run.counted_s, run.counted_s * Run.GROWTH)
                heapq.heapreplace(self._growing, (run.since + run.counted_s, turn, run))

    def _settle(self, run: Run, now: float) -> None:
        """Corrects what was charged for a request that has ended."""
        tenant = run.tenant
        tenant.running -= 1
        if run.since < math.inf:
            worked_s = now - run.since
            tenant.worked_s += worked_s
            self._count(run, worked_s, worked_s)
            run.since = math.inf
        self._exit(tenant)

    def _refund(self, run: Run) -> None:
        """Takes back what was charged for a request that has to be run again."""
        tenant = run.tenant
        if run.since == math.inf:
            tenant.worked_s -= run.counted_s
        tenant.turn = min(tenant.turn, run.turn)
        self._count(run, 0.0, 0.0)
        run.since = math.inf

    def _count(self, run: Run, had_s: float, counted_s: float) -> None:
        """Has its tenant be charged so much for a request."""
        tenant = run.tenant
        tenant.had_s += had_s - run.had_s
        tenant.charge_s += counted_s - run.counted_s
        run.had_s, run.counted_s = had_s, counted_s
        self._active.file(tenant)
        if tenant.waiting:
            self._standings.file(tenant)

    # .. slots ..

    def join(self, name: str, origins: frozenset[str] = ANYTHING) -> Offer[SlotT]:
        """Counts a new slot of the machine, which serves these origins, and returns what it is part of."""
        machine = self.machines.get(name)
        if machine is None:
            machine = self.machines[name] = self.gone.pop(name) if name in self.gone else Machine(name)
        machine.slots += 1
        offer = machine.offers.get(origins)
        if offer is None:
            offer = machine.offers[origins] = Offer(machine, self._scope_of(origins))
        offer.slots += 1
        if not offer.scope.slots:
            for pool in offer.scope.served or self.all_pools():
                pool.alone_since = math.inf
        offer.scope.slots += 1
        return offer

    def _scope_of(self, origins: frozenset[str]) -> Scope[SlotT]:
        scope = self._scopes.get(origins)
        if scope is None:
            scope = self._scopes[origins] = Scope(origins)
            for origin in sorted(origins):
                pool = self._name(origin)
                scope.served.append(pool)
                pool.scopes.append(scope)  # so it is not forgotten for the next one
        return scope

    def leave(self, offer: Offer[SlotT], now: float) -> None:
        """Counts one slot less; it must not wait or run any more."""
        machine = offer.machine
        offer.slots -= 1
        if not offer.slots:
            del machine.offers[offer.scope.origins]
            offer.scope.offers.drop(offer)
        self._count_off(offer.scope, now)
        machine.slots -= 1
        if not machine.slots:
            machine.left_at = now
            self.gone[machine.name] = self.machines.pop(machine.name)
            if len(self.gone) > LIMITS.remembered_machines:
                del self.gone[next(iter(self.gone))]

    def _count_off(self, scope: Scope[SlotT], now: float) -> None:
        scope.slots -= 1
        if scope.slots:
            return
        if scope is not self._anything:
            del self._scopes[scope.origins]
            for pool in scope.served:
                pool.scopes.remove(scope)
        for pool in scope.served or self.all_pools():
            if not self.slots_of(pool):
                pool.alone_since = now
                if self._gives_up:
                    self._orphaned.append((now + self._no_worker_s, pool))

    def park(self, slot: SlotT) -> None:
        """Has a slot wait."""
        offer, scope = slot.offer, slot.offer.scope
        offer.newest = offer.idle[slot] = -next(self._numbers)
        scope.idle += 1
        self.idle += 1
        if len(offer.machine.offers) == 1:
            scope.offers.file(offer)
        else:
            self._file(offer.machine)

    def remove(self, slot: SlotT) -> None:
        """Has a slot not wait any more; does nothing if it does not."""
        if slot.offer.remove(slot):
            slot.offer.scope.idle -= 1
            self.idle -= 1

    def release(self, slot: SlotT, now: float, *, park: bool = False) -> None:
        """Stops counting a slot as running; with ``park`` it waits again."""
        slot.offer.machine.running -= 1
        self.running -= 1
        if self._runs and (run := self._runs.pop(slot, None)) is not None:
            self._settle(run, now)
        if park:
            self.park(slot)
        else:
            self._file(slot.offer.machine)

    def take_spare(self, needed: int) -> SlotT | None:
        """Returns, counted as running, a slot of which there are more than needed of its kind."""
        for scope in self._scopes.values():
            if scope.idle > needed and (slot := self._take_slot(scope)) is not None:
                return slot
        return None

    def _take_slot(self, scope: Scope[SlotT]) -> SlotT | None:
        """Returns the slot that is next, and counts it as running."""
        offer = scope.offers.first()
        if offer is None:
            return None
        idle = offer.idle
        slot, _ = idle.popitem()
        if idle:
            offer.newest = idle[next(reversed(idle))]
        offer.machine.running += 1
        scope.idle -= 1
        self.idle -= 1
        self.running += 1
        return slot

    def rest(self, machine: Machine[SlotT], now: float) -> None:
        """Gives a machine that has lost a slot nothing for a moment: its others may be about to go, too."""
        if now >= machine.may_rest_at:
            machine.rests, machine.rests_until = True, now + LIMITS.rest_s
            machine.may_rest_at = now + LIMITS.rest_again_s
            self._resting.append(machine)

    def wake(self, now: float) -> None:
        """Ends the rest of those that have rested, and brings what runs up to date."""
        while self._resting and self._resting[0].rests_until <= now:
            machine = self._resting.popleft()
            machine.rests = False
            self._file(machine)
        if self.is_fair:
            self._now = now
            self._grow(now)

    def _file(self, machine: Machine[SlotT]) -> None:
        """The rank of a machine's slots may have fallen."""
        for offer in machine.offers.values():
            offer.scope.offers.file(offer)

    # .. pairs ..

    def next_pair(self) -> tuple[Ticket[ItemT], SlotT] | None:
        """Returns the request that is next and the slot that serves it; ``None`` if one of them is missing.

        The slot counts as running.  What does not come about is returned with ``put_back`` and ``release``.
        """
        if not self.waiting:
            return None
        line = self._line if self._is_plain else self._next_line()
        if line is None:
            return None
        scope = self._anything if self._is_plain else least(line.pool.scopes, Scope.rank)
        slot = None if scope is None else self._take_slot(scope)
        if slot is None:
            return None
        ticket = line.take()
        self.waiting -= 1
        if self.is_fair:
            self._charge(slot, ticket)
        elif not self._is_plain:
            self._after_removal(line)
        return ticket, slot

    def _next_line(self) -> Line[ItemT] | None:
        """Returns the line whose first request is next, of those that a waiting slot serves."""
        lines = []
        for scope in self._scopes.values():
            if scope.idle and scope.offers.first() is not None:
                tenant = self._standings.first(scope) if self.is_fair else self._everybody
                lines.append(None if tenant is None else tenant.first_line(scope))
        return least(filter(None, lines), lambda line: (line.tenant.rank(), line.rank()))


# Structured fields (RFC 9651), as far as a dictionary of them needs to be understood.
_SF_KEY: Final = rb"[a-z*][a-z0-9_.*-]*"
_SF_BARE: Final = (
    rb"(?:-?[0-9]{1,15}(?:\.[0-9]{1,3})?|\"(?:[ !#-\[\]-~]|\\[\"\\])*\"|:[A-Za-z0-9+/=]*:|\?[01]"
    rb"|[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*)"
)
_SF_PARAMETERS: Final = rb"(?:; *" + _SF_KEY + rb"(?:=" + _SF_BARE + rb")?)*"
_SF_INNER_LIST: Final = rb"\( *(?:" + _SF_BARE + _SF_PARAMETERS + rb"(?: +|(?=\))))*\)"
_SF_MEMBER: Final = (
    rb"(" + _SF_KEY + rb")(?:=(" + _SF_BARE + rb"|" + _SF_INNER_LIST + rb"))?" + _SF_PARAMETERS
)
_SF_DICTIONARY: Final = re.compile(rb" *" + _SF_MEMBER + rb"(?:[ \t]*,[ \t]*" + _SF_MEMBER + rb")* *")
_SF_MEMBERS: Final = re.compile(_SF_MEMBER + rb"(?:[ \t]*,[ \t]*)?")
_WORD: Final = rb"(?:" + _TOKEN + rb"|" + _QUOTED + rb")"
_PARAMETER: Final = _TOKEN + rb"(?:[ \t]*=[ \t]*" + _WORD + rb")?"
_PREFERENCE: Final = (
    rb"(" + _TOKEN + rb")(?:[ \t]*=[ \t]*(" + _WORD + rb"))?(?:[ \t]*;(?:[ \t]*" + _PARAMETER + rb")?)*"
)
_PREFERENCES: Final = re.compile(rb"[ \t,]*" + _PREFERENCE + rb"[ \t]*(?:,|\Z)")


def read_urgency(values: Sequence[bytes]) -> int:
    """Returns what a Priority field tells (RFC 9218 §4.1), the normal urgency if it makes no sense."""
    text, urgency = b", ".join(values), NORMAL_URGENCY
    if len(text) <= LIMITS.claim_bytes and _SF_DICTIONARY.fullmatch(text):
        for match in _SF_MEMBERS.finditer(text):
            if match[1] == b"u":
                told = match[2] or b""
                urgency = int(told) if re.fullmatch(rb"0*[0-7]", told) else NORMAL_URGENCY
    return urgency


def read_wait(values: Sequence[bytes]) -> float | None:
    """Returns the seconds that a Prefer field would wait (RFC 7240 §4.3), ``None`` if it does not tell."""
    text, position, wait_s = b", ".join(values), 0, None
    if len(text) > LIMITS.claim_bytes:
        return None
    while position < len(text):
        match = _PREFERENCES.match(text, position)
        if match is None:
            return wait_s if not text[position:].strip(b" \t,") else None
        if match[1].lower() == b"wait" and wait_s is None:
            told = (match[2] or b"").strip(b'"')
            if not re.fullmatch(rb"[0-9]{1,9}", told):
                return None
            wait_s = float(told)
        position = match.end()
    return wait_s


def wait_estimate(queued: int, slots: int, mean_service_s: float) -> int | None:
    """Returns after how many seconds a refused request may hope for a place; ``None`` if nothing tells."""
    if not slots or not mean_service_s:
        return None
    return max(1, math.ceil(queued / slots * mean_service_s))


# ---- The spool --------------------------------------------------------------------------------------------


class SpoolBudget:
    """What all spools together may hold: bytes in memory, bytes on the disk, and open files."""

    def __init__(
        self, memory_limit: int, disk_limit: float = math.inf, may_open: Callable[[], bool] = lambda: True
    ) -> None:
        self.memory_limit = memory_limit
        self.memory_used = 0
        self.disk_limit = disk_limit
        self.disk_used = 0  # by the files, as long as each has ever been
        self.files = 0  # that are open because the memory did not suffice
        self.may_open = may_open  # another one

    def take_memory(self, size: int) -> bool:
        """Claims ``size`` bytes of memory; false if they are not to be had."""
        if self.memory_used + size > self.memory_limit:
            return False
        self.memory_used += size
        return True

    def take_disk(self, size: int) -> None:
        """Claims ``size`` bytes of the disk; raises ``OSError`` as a full disk does."""
        if self.disk_used + size > self.disk_limit:
            raise OSError(errno.ENOSPC, "the disk budget is used up")
        self.disk_used += size


class Spool:
    """Bytes in order: in memory up to a mark and while the budget lasts, in a temporary file beyond.

    With ``keep`` the bytes stay after they were read, for a second reading after ``rewind``.  Without it
    the file is used in a circle once it is as long as ``file_limit``, so that it does not hold what has
    been read.
    A full disk loses nothing: what does not fit into the file stays in memory, and ``disk_error`` tells
    the owner to take in no more.
    """

    __slots__ = (
        "_budget", "_directory", "_file", "_file_end", "_file_limit", "_file_size", "_held", "_keep",
        "_memory_limit", "_offset", "_read", "_unread", "disk_error", "size",
    )  # fmt: skip

    def __init__(
        self, budget: SpoolBudget, memory_limit: int, directory: str | None = None, keep: bool = False,
        file_limit: float = math.inf,
    ) -> None:  # fmt: skip
        self._budget = budget
        self._memory_limit = memory_limit
        self._directory = directory
        self._keep = keep
        self._unread: deque[bytearray | range] = deque()  # a range of the file
        self._read: list[bytearray | range] = []
        self._offset = 0  # of the first unread byte in the first unread part
        self._held = 0  # bytes of memory, as the budget counts them
        self._file: BinaryIO | None = None
        self._file_end = 0  # behind what was written last
        self._file_size = 0  # as the budget counts it
        self._file_limit = file_limit
        self.size = 0  # unread bytes
        self.disk_error: OSError | None = None

    def append(self, data: Bytes) -> None:
        """Adds ``data`` at the end."""
        size = len(data)
        if not size:
            return  # an empty part would pass for the end
        self.size += size
        if self._held + size <= self._memory_limit and self._budget.take_memory(size):
            self._append_to_memory(data)
            return
        try:
            if self._append_to_file(memoryview(data)):
                return
        except OSError as exc:
            self.disk_error = exc
        self._budget.memory_used += size  # it is held all the same, and shall be counted
        self._append_to_memory(data)

    def spill(self, memory_limit: int) -> None:
        """Lowers the mark, and moves to the file what is beyond it; only without ``keep``.

        What comes before bytes of the file stays in memory, since the file is used in their order: in a
        circle, what is out of order would be written over.
        """
        self._memory_limit = memory_limit
        tail: list[memoryview] = []
        while self._held > memory_limit and self._unread:
            last = self._unread[-1]
            if isinstance(last, range):
                break
            tail.append(memoryview(last))
            self._unread.pop()
            self._forget(len(last))
        if tail and not self._unread:
            tail[-1], self._offset = tail[-1][self._offset :], 0
        self.size -= sum(map(len, tail))
        for piece in reversed(tail):
            self.append(piece)

    def is_over(self, limit: int) -> bool:
        """Whether the spool should take in no more until it has been read."""
        return self.size > limit or self.disk_error is not None

    def peek(self, limit: int) -> Bytes:
        """Returns up to ``limit`` of the next unread bytes, none if there are none."""
        if not self._unread:
            return b""
        part = self._unread[0]
        if isinstance(part, range):
            assert self._file is not None
            length = min(limit, len(part) - self._offset)
            return os.pread(self._file.fileno(), length, part.start + self._offset)
        if self._offset == 0 and len(part) <= limit:
            return part
        return part[self._offset : self._offset + limit]

    def advance(self, size: int) -> None:
        """Marks ``size`` bytes as read."""
        self.size -= size
        self._offset += size
        while self._unread and self._offset >= len(self._unread[0]):
            part = self._unread.popleft()
            self._offset -= len(part)
            if self._keep:
                self._read.append(part)
            elif isinstance(part, bytearray):
                self._forget(len(part))
        if not self._unread and not self._keep:
            self._drop_file()

    def rewind(self) -> None:
        """Makes everything unread again; only with ``keep``."""
        self._unread.extendleft(reversed(self._read))
        self._read.clear()
        self._offset = 0
        self.size = sum(map(len, self._unread))

    def close(self) -> None:
        """Gives everything back; the spool is empty then."""
        self._unread.clear()
        self._read.clear()
        self.size = self._offset = 0
        self._forget(self._held)
        self._drop_file()

    def _append_to_memory(self, data: Bytes) -> None:
        self._held += len(data)
        last = self._unread[-1] if self._unread else None
        if isinstance(last, bytearray) and len(last) < 16 * KIB:
            last += data  # many small pieces cost more than their bytes
        else:
            self._unread.append(bytearray(data))

    def _append_to_file(self, data: memoryview) -> bool:
        place = self._place(len(data))
        if place is None:
            return False
        self._claim(place + len(data))
        fd = self._descriptor()
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], place + written)
        last = self._unread[-1] if self._unread else None
        self._file_end = place + written
        if isinstance(last, range) and last.stop == place:
            self._unread[-1] = range(last.start, self._file_end)
        else:
            self._unread.append(range(place, self._file_end))
        return True

    def _claim(self, end: int) -> None:
        if end > self._file_size:
            self._budget.take_disk(end - self._file_size)
            self._file_size = end

    def _descriptor(self) -> int:
        if self._file is None:
            if not self._budget.may_open():
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 (it lives as long as the spool)
                prefix="pothead-", dir=self._directory, buffering=0
            )
            self._budget.files += 1
        return self._file.fileno()

    def _place(self, size: int) -> int | None:
        """Returns where in the file the next ``size`` bytes go, ``None`` if they would meet unread ones."""
        start = None if self._keep else self._first_unread()
        if start is None:
            return self._file_end if self._keep else 0
        if self._file_end > start:  # what is unread lies between the two
            is_round = self._file_end >= self._file_limit and size < start
            return 0 if is_round else self._file_end
        return self._file_end if self._file_end + size < start else None

    def _first_unread(self) -> int | None:
        offset = self._offset
        for part in self._unread:
            if isinstance(part, range):
                return part.start + offset
            offset = 0
        return None

    def _drop_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._budget.files -= 1
            self._file = None
        self._budget.disk_used -= self._file_size
        self._file_end = self._file_size = 0
        self.disk_error = None

    def _forget(self, size: int) -> None:
        self._held -= size
        self._budget.memory_used -= size


# ---- The event loop ---------------------------------------------------------------------------------------

CAN_SPLICE: Final = hasattr(os, "splice") and hasattr(fcntl, "F_SETPIPE_SZ")
READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE


class Watched:
    """Something that the loop watches: a descriptor, a deadline, or both.

    ``deadline`` (monotonic seconds) may be set at any time; after setting it outside of an event of its
    own, and after anything that changes what ``settle`` returns, call ``loop.touch``.
    """

    __slots__ = ("armed", "closed", "deadline", "registered")

    def __init__(self) -> None:
        self.deadline = math.inf
        self.armed = math.inf  # the loop's: when its heap will look at the deadline
        self.registered = 0  # the loop's: the events that the selector has been asked for
        self.closed = False

    def fileno(self) -> int:
        """Returns the descriptor, -1 if there is none."""
        return -1

    def settle(self) -> int:
        """Returns the events to wait for, a function of the state alone; may set the deadline.

        Called before the loop sleeps, once for whatever something has happened to.
        """
        return 0

    def on_events(self, events: int) -> None:
        """The descriptor is ready."""

    def on_deadline(self) -> None:
        """The deadline has passed (and is off now)."""

    def on_fault(self) -> None:
        """One of the methods above raised: give up what this is about."""

    def release(self) -> None:
        """Closes the descriptor: the end of the turn in which ``closed`` was set."""


class EventLoop:
    """Sockets, timers and calls from other threads, one at a time.  It knows nothing of HTTP."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.now = clock()  # monotonic seconds, read once a turn
        self.before_sleep: list[Callable[[], None]] = []
        # One buffer to receive into serves all streams, since one is read at a time.
        self.scratch = memoryview(bytearray(LIMITS.receive_bytes))
        self.pipe: Pipe | None = None  # the same for bytes that are moved without being received
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Watched]] = []  # heap; the number breaks ties
        self._stale = 0  # entries of the heap that mean nothing any more
        self._numbers = itertools.count()
        self._touched: dict[Watched, None] = {}  # in order: the first to come is the first to be registered
        self.watched: set[Watched] = set()  # everything with a descriptor, until it is closed
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, READ, None)
        self._hears_signals = False
        self._running = True
        self._slow_at = -math.inf  # when that was last told

    def add(self, watched: Watched) -> None:
        """Takes over a descriptor: from now on the loop closes it."""
        self.watched.add(watched)
        self._touched[watched] = None

    def touch(self, watched: Watched) -> None:
        """Asks to look at the wanted events and the deadline before the loop sleeps."""
        self._touched[watched] = None

    def set_deadline(self, watched: Watched, delay_s: float) -> None:
        """Has ``watched`` wait for so many seconds from now."""
        watched.deadline = self.now + delay_s
        self._touched[watched] = None

    def call_soon(self, function: Callable[[], None]) -> None:
        """Calls ``function`` before the loop sleeps next; if it asks for another call, then a turn later."""
        self._calls.append(function)

    def call_from_thread(self, function: Callable[[], None]) -> None:
        """Calls ``function`` in the loop's thread; safe from any thread and from signal handlers."""
        self._calls.append(function)
        with contextlib.suppress(OSError):  # full: it will wake up anyway; closed: it has ended
            self._wake_sender.send(b"\0")

    def wake_on_signals(self) -> None:
        """Has signals end its sleep; for the main thread.

        A signal that comes just before the wait begins, or to another thread, does not interrupt it: its
        Python handler would run whenever something else happens.
        """
        signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        self._hears_signals = True

    def run(self) -> None:
        """Turns until ``stop``."""
        while self._running:
            self.turn()

    def stop(self) -> None:
        """Ends ``run`` after this turn."""
        self._running = False

    def close(self) -> None:
        """Closes everything that is watched, and what is the loop's own."""
        self._selector.close()
        for watched in list(self.watched):
            self._release(watched)
        if self.pipe is not None:
            self.pipe.close()
        if self._hears_signals:
            signal.set_wakeup_fd(-1)
        self._wake_receiver.close()
        self._wake_sender.close()

    def turn(self) -> None:
        """Sleeps until something happens and deals with it: sockets first, then timers."""
        self._settle()
        looked_at = self.clock()
        ready = self._selector.select(self._sleep_s(looked_at))
        self.now = self.clock()
        if not ready and self._timers and self._timers[0][0] <= self.now:
            looked_at = self.now
            ready = self._selector.select(0)
        for key, events in ready:
            watched: Watched | None = key.data
            if watched is None:
                self._wake_receiver.recv(4096)
            elif not watched.closed:
                self.deliver(watched, watched.on_events, events)
        if self._timers and self._timers[0][0] <= looked_at:
            self._fire_timers(looked_at)
        if (turn_s := self.clock() - self.now) > LIMITS.slow_turn_s:
            self._tell_of_slowness(turn_s)

    def _tell_of_slowness(self, turn_s: float) -> None:
        """While one turn lasts, nobody else is served: a slow disk under the spools shows here."""
        if self.now - self._slow_at > LIMITS.slow_turn_pause_s:
            log.warning(
                "everyone has waited for %.1f s: is the disk slow, or the machine overloaded?", turn_s
            )
            self._slow_at = self.now

    def deliver(self, watched: Watched, method: Callable[..., None], *arguments: object) -> None:
        """Calls ``method``; a fault in it ends what ``watched`` is about and nothing else."""
        self._touched[watched] = None
        try:
            method(*arguments)
        except Exception:
            log.exception("this is a fault of the hub; only the exchange that met it is ended")
            self._give_up(watched)

    def _give_up(self, watched: Watched) -> None:
        try:
            watched.on_fault()
        except Exception:
            log.exception("nor could it be ended in an orderly way")
            watched.closed = True

    def _settle(self) -> None:
        """Does everything that is left to do before the loop may sleep."""
        for _ in range(len(self._calls)):  # and not those that these ask for: sockets come in between
            self._calls.popleft()()
        for step in self.before_sleep:
            step()
        while self._touched:
            touched, self._touched = self._touched, {}
            for watched in touched:
                wanted = 0 if watched.closed else watched.settle()
                if wanted != watched.registered:
                    self._try_to_register(watched, wanted)
                if watched.closed:
                    self._release(watched)
                elif watched.deadline < watched.armed:
                    self._arm(watched)

    def _arm(self, watched: Watched) -> None:
        self._stale += watched.armed != math.inf
        watched.armed = watched.deadline
        heapq.heappush(self._timers, (watched.deadline, next(self._numbers), watched))

    def _try_to_register(self, watched: Watched, wanted: int) -> None:
        try:
            self._register(watched, wanted)
        except OSError as exc:  # the system's limit of watched descriptors, or of memory
            log.warning("a descriptor cannot be watched, and is given up: %s", exc)
            watched.registered = 0
            self._give_up(watched)

    def _release(self, watched: Watched) -> None:
        watched.deadline = math.inf
        if watched.armed != math.inf:
            watched.armed = math.inf
            self._stale += 1
            self._forget_stale()
        self.watched.discard(watched)
        watched.release()

    def _forget_stale(self) -> None:
        """Rebuilds the heap when most of it is stale, since it keeps what has been closed alive."""
        if self._stale > 64 + len(self._timers) // 2:
            self._timers = [entry for entry in self._timers if entry[0] == entry[2].armed]
            heapq.heapify(self._timers)
            self._stale = 0

    def _register(self, watched: Watched, wanted: int) -> None:
        # Unregistered when nothing is wanted: a selector that waits for no event still reports a hang-up,
        # without end.
        if not wanted:
            self._selector.unregister(watched)
        elif watched.registered:
            self._selector.modify(watched, wanted, watched)
        else:
            self._selector.register(watched, wanted, watched)
        watched.registered = wanted

    def _sleep_s(self, now: float) -> float | None:
        if self._calls or self._touched or not self._running:
            return 0
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - now)

    def _fire_timers(self, looked_at: float) -> None:
        """Tells those whose time was over when the sockets were looked at.

        And not those whose time has passed since: if the process was stopped meanwhile, what they wait for
        may have come in time, and the next look finds it.
        """
        # A deadline that has moved later stays where it is in the heap until its old time comes.
        while self._timers and self._timers[0][0] <= looked_at:
            when, _, watched = heapq.heappop(self._timers)
            if when != watched.armed:
                self._stale -= 1
                continue  # it moved earlier since: another entry speaks for it
            watched.armed = math.inf
            if watched.deadline <= looked_at:
                watched.deadline = math.inf
                self.deliver(watched, watched.on_deadline)
            else:
                self.touch(watched)


class Pipe:
    """A pipe through which bytes go from one socket to another inside of the kernel (Linux).

    It is empty whenever the loop is not in the middle of a move; if it might not be, it is closed.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        with contextlib.suppress(OSError):  # a small one will do, if a large one is not to be had
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, LIMITS.receive_bytes)

    def take(self, size: int) -> bytes:
        """Removes and returns ``size`` bytes, which must be in it."""
        pieces = []
        while size:
            pieces.append(os.read(self.reader, size))
            size -= len(pieces[-1])
        return b"".join(pieces)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


# ---- Streams ----------------------------------------------------------------------------------------------


class Transport:
    """What touches the socket of one stream: bytes in and out, as they are.

    Nothing here waits.  What fails for good raises ``OSError``.
    """

    __slots__ = ("_least", "_poll", "_sock", "_unacknowledged_s")

    scheme = b"http"  # of what a consumer asks for over it
    can_splice = CAN_SPLICE
    has_rest = False  # bytes that have come and of which the socket does not tell

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._least = 1
        self._unacknowledged_s = math.nan  # not set yet
        self._poll: select.poll | None = None  # made when it is first asked
        _tune(sock)

    def fileno(self) -> int:
        """Returns the descriptor to wait for."""
        return self._sock.fileno()

    def receive_into(self, buffer: memoryview) -> int | None:
        """Returns how many bytes have come; 0 at the end, ``None`` if there is nothing yet."""
        try:
            return self._sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, data: Bytes) -> int:
        """Returns how many bytes the network has taken; the others are to be offered again, and first."""
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def move_into(self, pipe: Pipe, limit: int) -> int | None:
        """The same as ``receive_into``, into a pipe."""
        try:
            return os.splice(self._sock.fileno(), pipe.writer, limit, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return None

    def send_from(self, pipe: Pipe, size: int) -> int:
        """The same as ``send``, out of a pipe."""
        try:
            return os.splice(pipe.reader, self._sock.fileno(), size, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return 0

    def has_news(self) -> bool:
        """Whether something has come, if only the end; receiving tells what."""
        return bool(self._look())

    def has_hung_up(self) -> bool:
        """Whether the peer has left, even if bytes come before that which nobody wants to read yet.

        Where the platform cannot tell, it is found out when they are read.
        """
        news = self._look()
        return bool(news) and news[0][1] != select.POLLIN

    def _look(self) -> list[tuple[int, int]]:
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._sock, select.POLLIN | getattr(select, "POLLRDHUP", 0))
        return self._poll.poll(0)  # a third of the price of a recv that has nothing to peek at

    def has_delivered(self, size: int) -> bool:
        """Whether the peer's machine may have received any of the last ``size`` bytes that were sent."""
        queued = array.array("i", [0])
        try:
            fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, queued)  # SIOCOUTQ: not acknowledged yet
        except OSError:
            return True  # nothing tells
        return sys.platform != "linux" or queued[0] < size

    def silent_s(self) -> float:
        """Returns for how long nothing has come from the peer's machine, not even an acknowledgement.

        Where the platform does not tell, it is no time at all.
        """
        if sys.platform != "linux":
            return 0.0
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
        data_ms, ack_ms = struct.unpack_from("=II", info, 52)  # tcpi_last_data_recv, tcpi_last_ack_recv
        return float(min(data_ms, ack_ms) / 1000)

    def set_unacknowledged_s(self, seconds: float) -> None:
        """Sets how long sent bytes may go without an acknowledgement, or the peer without reading."""
        if seconds != self._unacknowledged_s and hasattr(socket, "TCP_USER_TIMEOUT"):
            self._unacknowledged_s = seconds
            milliseconds = min(int(min(seconds, 1e6) * 1000), 2**31 - 1)
            with contextlib.suppress(OSError):  # the peer is gone already: reading will tell
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def set_least(self, size: int) -> None:
        """Sets how many bytes have to be there before anybody is told; of the end they are at once."""
        if size != self._least:
            self._least = size
            with contextlib.suppress(OSError):  # then somebody is told too early, or of the end
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def end_output(self) -> None:
        """Tells the peer that nothing more will come."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def abort_on_close(self) -> None:
        """Has the peer see an error when the socket is closed."""
        linger = b"\x01\0\0\0\0\0\0\0"  # struct linger {1, 0}: close sends RST
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def close(self) -> None:
        self._sock.close()


class TlsTransport(Transport):
    """The same over TLS, which works on two buffers (``ssl.MemoryBIO``) and never on the socket.

    The handshake goes on while bytes are received; ``on_open`` is called at its end, before they come.
    """

    __slots__ = (
        "_ahead", "_incoming", "_is_over", "_on_open", "_outgoing", "_overhead", "_sealed",
        "_tls", "_unsent", "fault", "has_heard", "has_rest", "is_open", "spoke_in_clear",
    )  # fmt: skip

    scheme = b"https"
    can_splice = False  # it would put cleartext on the wire

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, on_open: Callable[[], None]) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._on_open = on_open
        self._ahead = b""  # a byte that was received to see whether there is one
        self.fault: OSError | None = None  # what has ended the connection
        self._sealed = memoryview(b"")  # encrypted, and not sent yet ...
        self._unsent = 0  # ... how many bytes that is, with all of a record that has been sent in part ...
        self._overhead = 0  # ... and what each record takes beside its own
        self.has_heard = False
        self._is_over = False  # nothing more is sent, and what comes is not understood any more
        self.has_rest = False
        self.is_open = False
        self.spoke_in_clear = False  # the peer, with its first byte

    def receive_into(self, buffer: memoryview) -> int | None:
        if self._is_over:
            self.has_rest = False  # what was decrypted and not received yet is dropped, too
            return super().receive_into(buffer)
        size = len(self._ahead)
        buffer[:size] = self._ahead
        self._ahead, self.has_rest = b"", False
        may_fetch = True  # once: who sends without end gets no more of a turn than others
        while size < len(buffer):
            try:
                received = self._read(buffer[size:])
            except OSError:
                if not size:
                    raise
                received = 0  # the next call raises it again
            if received:
                size += received
            elif received is not None:  # the end
                self.has_rest = size > 0
                return size
            elif may_fetch and self._fetch():
                may_fetch = False
            else:
                return size or None
        self.has_rest = True  # or perhaps not: the next call tells
        return size

    def _read(self, buffer: memoryview) -> int | None:
        """Decrypts one record; 0 at the end (close_notify), ``None`` if more must be fetched."""
        if self.fault is not None:
            raise self.fault
        try:
            if not self.is_open:
                self._shake_hands()
            size: int = self._tls.read(len(buffer), buffer)  # type: ignore[assignment]  # as typeshed has it
            return size
        except ssl.SSLWantReadError:
            return None
        except OSError as exc:
            self.fault = exc
            raise
        finally:
            if self._outgoing.pending and not self._sealed:  # of the handshake, or an alert
                self._seal(0)
                with contextlib.suppress(OSError):  # reading will tell
                    self._send_sealed()

    def _shake_hands(self) -> None:
        self._tls.do_handshake()
        self.is_open = True
        on_open, self._on_open = self._on_open, _do_nothing
        on_open()

    def _fetch(self) -> bool:
        """Receives something to decrypt, if only the end; false if nothing has come."""
        if self._outgoing.pending > LIMITS.handshake_bytes:  # such as refusals to renegotiate, without end
            raise ConnectionAbortedError("it does not read what TLS answers")
        try:
            data = self._sock.recv(LIMITS.receive_bytes)
        except (BlockingIOError, InterruptedError):
            return False
        if not data:
            self._incoming.write_eof()
            return True
        if not self.has_heard and data[0] != TLS_FIRST_BYTE:
            self.spoke_in_clear = True
            raise ConnectionAbortedError("no TLS")
        self.has_heard = True
        self._incoming.write(data)
        return True

    def send(self, data: Bytes) -> int:
        taken, view = 0, memoryview(data)
        while not self._is_over:
            if self._sealed:
                taken += self._send_sealed()
            if self._sealed or taken >= len(view):  # more, if less was offered than the last time
                break
            if self._outgoing.pending:  # what TLS has to say for itself goes apart
                self._seal(0)
            else:
                self._seal(self._tls.write(view[taken : taken + LIMITS.sealed_bytes]))
        return taken

    def _seal(self, size: int) -> None:
        """Takes what ``size`` bytes have become."""
        sealed = self._outgoing.read()
        self._sealed, self._unsent = memoryview(sealed), size
        self._overhead = (len(sealed) - size) // max(1, -(-size // TLS_RECORD_BYTES))

    def _send_sealed(self) -> int:
        """Returns how many bytes have gone, in whole records: of half a record nobody can read anything."""
        self._sealed = self._sealed[super().send(self._sealed) :]
        left = 0
        if self._sealed and self._unsent:
            left = self._unsent % TLS_RECORD_BYTES or TLS_RECORD_BYTES  # in the last record
            others = max(0, len(self._sealed) - left - self._overhead)
            left += -(-others // (TLS_RECORD_BYTES + self._overhead)) * TLS_RECORD_BYTES
        gone, self._unsent = self._unsent - left, left
        return gone

    def has_news(self) -> bool:
        if not self._ahead and not self._is_over and (self.has_rest or super().has_news()):
            byte = bytearray(1)  # received for good, since a ticket or new keys are no news
            try:
                size = self._read(memoryview(byte))
                if size is None and self._fetch():
                    size = self._read(memoryview(byte))
            except OSError:
                size = 0
            self._ahead = bytes(byte[: size or 0])
            self.has_rest = size is not None
        return self.has_rest

    def set_least(self, size: int) -> None:
        """Changes nothing: how many bytes are in a record does not show from outside."""

    def end_output(self) -> None:
        self._say_goodbye()
        super().end_output()

    def abort_on_close(self) -> None:
        self._is_over = True  # without a goodbye, so that nothing can be taken for whole
        super().abort_on_close()

    def close(self) -> None:
        self._say_goodbye()
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        """Forgets who knows this: a circle would wait for the garbage collector, with all that TLS keeps."""
        self._on_open = _do_nothing
        self.fault = None  # whose traceback has been here

    def _say_goodbye(self) -> None:
        """Sends close_notify, unless a record has been sent in part: it would be lost in that."""
        if self._is_over or not self.is_open or self._sealed:
            return
        with contextlib.suppress(OSError):  # it wants to read the answer, and needs none
            self._tls.unwrap()
        self._is_over = True
        with contextlib.suppress(OSError):
            super().send(self._outgoing.read())

    def names(self) -> list[str] | None:
        """Returns the names in the peer's certificate, which has been verified; ``None`` without one."""
        certificate = self._tls.getpeercert()
        if not certificate:
            return None
        pairs: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
        return [name for kind, name in pairs if kind == "DNS"]

    def in_clear(self) -> Transport:
        """Returns a transport without TLS in the place of this one, for a peer that speaks none."""
        self._let_go()
        return Transport(self._sock)


TLS_FIRST_BYTE: Final = 0x16  # of a handshake (RFC 8446 §5.1)
TLS_RECORD_BYTES: Final = 16 * KIB  # of cleartext, at most (RFC 8446 §5.1)


def describe_tls(fault: OSError | None) -> str:
    """Returns what has ended a connection over TLS, for people."""
    told = getattr(fault, "verify_message", None) or getattr(fault, "reason", None) or fault
    return "the peer has left" if told is None else str(told).replace("_", " ").lower()


class Certificate:
    """The hub's certificate, as its files are now, and what it makes of a socket.

    The constructor raises ``ValueError`` with a sentence for the user where a file cannot be used.
    """

    def __init__(self, options: Options) -> None:
        assert options.certfile is not None
        self._context = _tls_context(options.certfile, options.keyfile)
        self._workers_context = self._context
        self.expires_at = _expiry(self._context, options.certfile)  # seconds since the epoch
        if options.workers_ca is not None:
            self._workers_context = _tls_context(options.certfile, options.keyfile)
            self._workers_context.verify_mode = ssl.CERT_OPTIONAL
            _check_readable("workers_ca", options.workers_ca)
            try:
                self._workers_context.load_verify_locations(options.workers_ca)
            except OSError as exc:
                raise ValueError(f"--workers-ca: {options.workers_ca} holds no certificates: {exc}") from exc

    def context(self, port: str) -> ssl.SSLContext:
        """Returns what a connection to that port speaks TLS with."""
        return self._workers_context if port == "ptth" else self._context


def _tls_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """TLS 1.2 and up, with forward secrecy, and no sessions to take up again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all of 1.3 are like these
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    _check_readable("certfile", certfile)
    if keyfile is not None:
        _check_readable("keyfile", keyfile)
    try:
        context.load_cert_chain(certfile, keyfile, _refuse_password)
    except OSError as exc:
        raise ValueError(_describe_tls_files(exc, certfile, keyfile or certfile)) from exc
    return context


def _check_readable(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as exc:
        raise ValueError(f"--{name.replace('_', '-')}: cannot read {path}: {exc.strerror}") from exc


def _refuse_password() -> str:
    raise ValueError("--keyfile: the key is encrypted, and there is nobody to ask for its password")


def _describe_tls_files(exc: OSError, certfile: str, keyfile: str) -> str:
    reason = getattr(exc, "reason", None)
    if reason == "KEY_VALUES_MISMATCH":
        return f"--keyfile: the key in {keyfile} does not belong to the certificate in {certfile}"
    with contextlib.suppress(OSError), open(certfile, encoding="latin-1") as file:
        if "-----BEGIN CERTIFICATE-----" not in file.read():
            return f"--certfile: there is no certificate (PEM) in {certfile}"
    with contextlib.suppress(OSError), open(keyfile, encoding="latin-1") as file:
        if "PRIVATE KEY-----" not in file.read():
            return f"--keyfile: there is no private key (PEM) in {keyfile}"
    return f"--certfile: {certfile} and {keyfile} cannot be used: {reason or exc}"


def _expiry(context: ssl.SSLContext, certfile: str) -> float:
    """Returns when the certificate expires, in seconds since the epoch.

    Nothing in ``ssl`` reads a certificate but a handshake: so the hub shakes hands with itself.  Raises
    ``ValueError`` if the certificate cannot be used.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted
    to_hub, from_hub = ssl.MemoryBIO(), ssl.MemoryBIO()
    hub = context.wrap_bio(to_hub, from_hub, server_side=True)
    try:
        trusting.load_verify_locations(certfile)
        peer = trusting.wrap_bio(from_hub, to_hub)
        for side in (peer, hub, peer):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        certificate = peer.getpeercert()
    except OSError as exc:  # of TLS, or the file has gone since it was read
        raise ValueError(f"--certfile: {certfile} cannot be used: {describe_tls(exc)}") from exc
    assert certificate
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


class Role:
    """What the bytes of a stream mean; by itself, nothing: the stream ends with its peer, or its time."""

    __slots__ = ("stream",)
    stream: Stream

    def on_bytes(self, data: memoryview) -> None:
        """Bytes have come; ``data`` is valid only during the call."""

    def on_hangup(self, *, reset: bool) -> None:
        """The peer has closed the connection, or broken it, or it cannot be written to any more."""
        self.stream.close()

    def on_taken(self) -> None:
        """The network has taken a piece of what was kept; more is left."""

    def on_drained(self) -> None:
        """Everything written has been handed to the network."""

    def on_deadline(self) -> None:
        """The stream's deadline has passed."""
        self.stream.close()

    def on_fault(self) -> None:
        """The hub itself failed while it served this stream, which is closed then."""

    def settle(self) -> int:
        """Returns how many bytes are welcome; may set the stream's deadline.

        Called before the loop sleeps, once for a stream that something has happened to.
        """
        return 0


NO_ROLE: Final = Role()  # of a stream to which nothing happens: it is closed, or has just been made


class Stream(Watched):
    """One connection: its bytes go to a role, and what is written and does not fit yet is kept.

    ``role`` says what the bytes mean and may be exchanged.  Nobody else touches the transport.
    """

    __slots__ = (
        "_failed", "_fills_soon", "_has_rest", "_loop", "_new_outbuf", "_room", "_was_reset", "address",
        "outbuf", "role", "shortcut", "transport", "written",
    )  # fmt: skip

    def __init__(
        self, loop: EventLoop, transport: Transport, address: str, new_outbuf: Callable[[], Spool]
    ) -> None:
        super().__init__()
        self._loop = loop
        self._new_outbuf = new_outbuf
        self._failed = self._was_reset = False
        self._has_rest = False  # the role, for the next turn ...
        self._fills_soon = False  # ... and the transport
        self._room = 0  # for bytes, as the role has told it
        self.transport = transport
        self.address = address
        self.outbuf: Spool | None = None  # what is written and the network has not taken; mostly nothing
        self.role: Role = NO_ROLE
        self.shortcut: Shortcut | None = None  # for bytes that nobody here need look at
        self.written = 0  # bytes that the network has taken

    def fileno(self) -> int:
        return self.transport.fileno()

    def settle(self) -> int:
        room = self._room = self.role.settle()
        events = READ if room > 0 and not self._has_rest else 0
        if events and self.transport.has_rest and not self._fills_soon:
            self._fills_soon = True
            self._loop.call_soon(lambda: self._loop.deliver(self, self._take_transports_rest))
        return events if self.outbuf is None else events | WRITE

    def resume(self) -> None:
        """What keeps bytes from being read may have changed, or who reads them."""
        self._loop.touch(self)

    def take_rest_later(self) -> None:
        """Gives the others their turn: ``on_bytes`` is called in the next one, before more is received."""
        if not self._has_rest:
            self._has_rest = True
            self._loop.call_soon(lambda: self._loop.deliver(self, self._take_rest))

    def _take_transports_rest(self) -> None:
        self._fills_soon = False
        if not self.closed:
            self._room = self.role.settle()  # it may have been filled since
            self._fill()

    def _take_rest(self) -> None:
        self._has_rest = False
        if not self.closed:
            self.role.on_bytes(NO_BYTES)

    def write(self, data: Bytes) -> None:
        """Sends ``data``, or keeps what the network does not take; never blocks, never fails."""
        if self._failed or self.closed:
            return
        if self.outbuf is None:
            sent = self._send(data)
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._keep(data)

    def close(self, *, abort: bool = False) -> None:
        """Closes the connection at the end of this turn; with ``abort`` so that the peer sees an error."""
        if abort and not self.closed:
            self.transport.abort_on_close()
        if self.outbuf is not None:
            self.outbuf.close()  # nobody waits for its end any more
        self.closed = True
        self._loop.touch(self)

    def on_events(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and not self.closed:
            self._fill()

    def on_deadline(self) -> None:
        if self._has_rest:  # that has come in time, and is looked at first
            self.deadline = self._loop.now
        else:
            self.role.on_deadline()

    def on_fault(self) -> None:
        self.role.on_fault()
        self.close()

    def release(self) -> None:
        if self.outbuf is not None:
            self.outbuf.close()
        self.transport.close()
        self.role = NO_ROLE  # which knows the stream, and would keep it until the collector comes

    def _fill(self) -> None:
        if self._has_rest or self._room <= 0 or self.closed:
            return
        if self.shortcut is not None and self._move(self.shortcut):
            return
        scratch = self._loop.scratch
        try:
            size = self.transport.receive_into(scratch[: self._room])
        except OSError as exc:
            log.debug("%s: %s", self.address, exc)
            self.role.on_hangup(reset=True)
            return
        if size:
            self.role.on_bytes(scratch[:size])
        elif size is not None:
            self.role.on_hangup(reset=self._was_reset)

    def _move(self, shortcut: Shortcut) -> bool:
        """Moves bytes to the shortcut's target without copying them; false if they must be received."""
        limit = min(shortcut.left(), LIMITS.receive_bytes)
        if limit < LIMITS.shortcut_bytes or shortcut.target.outbuf is not None:
            return False
        loop = self._loop
        if loop.pipe is None:
            try:
                loop.pipe = Pipe()
            except OSError:  # no descriptors: receiving needs none
                return False
        pipe = loop.pipe
        try:
            size = self.transport.move_into(pipe, limit)
            if size:
                shortcut.target.write_from(pipe, size)
        except BaseException as exc:
            loop.pipe = None
            pipe.close()
            if isinstance(exc, OSError):
                return False  # receiving will tell what is wrong
            raise
        if size:
            shortcut.on_moved(size)
        return size != 0

    def write_from(self, pipe: Pipe, size: int) -> None:
        """Sends ``size`` bytes out of the pipe, or keeps what the network does not take."""
        sent = 0
        if not self._failed and not self.closed:
            try:
                sent = self.transport.send_from(pipe, size)
            except OSError as exc:
                self._fail(exc)
        self.written += sent
        if sent < size:
            self._keep(pipe.take(size - sent))

    def _flush(self) -> None:
        """Sends one piece of the outbuf: one, so that a fast reader does not starve the others."""
        outbuf = self.outbuf
        assert outbuf is not None  # it was waited for
        outbuf.advance(self._send(outbuf.peek(LIMITS.receive_bytes)))
        if not outbuf.size:
            outbuf.close()
            self.outbuf = None
            self.role.on_drained()
        else:
            self.role.on_taken()

    def _send(self, data: Bytes) -> int:
        try:
            sent = self.transport.send(data)
        except OSError as exc:
            self._fail(exc)
            return 0
        self.written += sent
        return sent

    def _keep(self, data: Bytes) -> None:
        if self._failed or self.closed:
            return
        if self.outbuf is None:
            self.outbuf = self._new_outbuf()
        self.outbuf.append(data)
        self._loop.touch(self)

    def _fail(self, exc: OSError) -> None:
        """The connection is over.  ``on_hangup`` follows, but not in the middle of what goes on here."""
        log.debug("%s: %s", self.address, exc)
        self._failed = True
        # It is told once, to who sends or to who receives, who sees a mere end after that.
        self._was_reset = not isinstance(exc, BrokenPipeError)  # which a FIN has come before
        self._loop.call_soon(lambda: self._loop.deliver(self, self._give_up_writing))

    def _give_up_writing(self) -> None:
        """Reads what the peer may have said before it went, then tells the role."""
        if self.closed:
            return
        if self.outbuf is not None:
            self.outbuf.close()
        self.settle()
        self._fill()
        if not self.closed:
            self.role.on_hangup(reset=True)


class Shortcut(NamedTuple):
    """Where the next bytes of a stream may go unseen."""

    target: Stream
    left: Callable[[], int]  # how many bytes that holds for
    on_moved: Callable[[int], None]


# ---- Exchanges --------------------------------------------------------------------------------------------


class State(enum.Enum):
    """The life of an exchange."""

    RECEIVING = "receiving"  # the body is on its way into the spool
    QUEUED = "queued"
    SENT = "sent"  # handed to a slot; no response yet
    RESPONDING = "responding"
    FINISHED = "finished"

    __hash__ = object.__hash__  # members are one of a kind; Enum's own is a function in Python


TRANSITIONS: Final = {
    State.RECEIVING: (State.QUEUED, State.FINISHED),
    State.QUEUED: (State.SENT, State.FINISHED),
    State.SENT: (State.QUEUED, State.RESPONDING, State.FINISHED),
    State.RESPONDING: (State.FINISHED,),
    State.FINISHED: (),
}
# By names of their own here and below: up to Python 3.11 a look-up in an enumeration costs as much as a call.
RECEIVING, QUEUED, SENT, RESPONDING, FINISHED = State


class Outcome(enum.Enum):
    """How an exchange ended: the code in the log, the status, and the sentence for people.

    The status 0 is the worker's own (or the refusal's), 499 is for the log alone.
    """

    COMPLETED = ("OK", 0, "")
    QUEUE_FULL = ("QF", 503, "the queue is full")
    QUEUE_TIMEOUT = ("QT", 503, "no worker became free in time")
    QUEUE_TOO_LONG = ("QW", 503, "the queue is longer than the consumer would wait")
    DRAINING = ("DR", 503, "the service is shutting down")
    CANCELLED = ("AC", 503, "an operator cancelled the request")
    WORKER_LOST = ("WL", 502, "the worker was lost before it answered")
    WORKER_GARBAGE = ("WG", 502, "the worker's answer was not understood")
    WORKER_CUT = ("WC", 0, "the response was cut off midway")
    WORKER_TIMEOUT = ("WT", 504, "the worker did not answer in time")
    REFUSED = ("RQ", 0, "the request was refused")
    CONSUMER_GONE_QUEUED = ("CQ", 499, "the consumer left before a worker was found")
    CONSUMER_GONE_RUNNING = ("CR", 499, "the consumer left while the request ran")
    HUB_FAULT = ("HB", 500, "the hub met a fault of its own")

    __hash__ = object.__hash__  # members are one of a kind; Enum's own is a function in Python

    def __init__(self, code: str, status: int, sentence: str) -> None:
        self.code = code
        self.status = status
        self.sentence = sentence


COMPLETED: Final = Outcome.COMPLETED
CONSUMER_GONE_STATUS: Final = 499
ALLOWED_METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"


class Progress(enum.Enum):
    """How far one attempt has come."""

    OFFERED = "offered"  # to a slot that claims what it takes, and has not: nobody has begun
    SENT = "sent"  # or on its way: the slot has not said a word, or has claimed it
    HEARD = "heard"  # a byte of a response, if only of an interim one: nobody else may answer any more


OFFERED, UNHEARD, HEARD = Progress

# What claims a request, as most workers say it.  With nothing more of the request to be sent, that changes
# nothing before the response begins, or the time for it is over; so the hub sleeps on.
CLAIM: Final = b"HTTP/1.1 102 Processing\r\n\r\n"


class Attempt:
    """One try of an exchange with one slot; it is thrown away with the try."""

    __slots__ = (
        "body_sent", "interims", "is_chunked", "is_in_doubt", "progress", "since", "slot", "written_before"
    )  # fmt: skip

    def __init__(self, slot: Slot, now: float) -> None:
        self.slot = slot
        self.since = now
        self.written_before = slot.stream.written  # bytes
        self.progress = OFFERED if slot.registration.process else UNHEARD
        self.is_in_doubt = False  # it may have been claimed, which could not be heard
        self.interims = 0  # interim responses
        self.is_chunked = False  # the body of the request, as it is sent
        self.body_sent = False

    @property
    def bytes_taken(self) -> int:
        """How many bytes of it the network has taken."""
        return self.slot.stream.written - self.written_before


class Exchange:
    """One request and its response; the only object that knows both ends.

    The consumer's role feeds it the request, the hub gives it a slot, the slot's role feeds it the response.
    Whatever happens, it ends in ``finish``, once.
    """

    __slots__ = (
        "_absorbs", "_hub", "_in_chunks", "_keeps_consumer", "_patience_s", "_prefix", "_replayable",
        "_upload_bytes", "attempt", "attempts", "bytes_in", "bytes_out", "claim", "consumer", "detail",
        "head", "outcome", "queued_s", "received", "received_at", "request_id", "since", "slot_address",
        "spool", "state", "status", "ticket", "worker_name", "worker_s",
    )  # fmt: skip

    def __init__(self, hub: Hub, consumer: Consumer, head: RequestHead) -> None:
        self._hub = hub
        self.consumer = consumer
        self.head = head
        self.state = RECEIVING
        self.request_id = hub.forwarding.request_id(head)
        self.spool: Spool | None = None  # the request's body, if it has one
        self.received = False  # the request, whole
        self.ticket: Ticket[Exchange] | None = None  # its place in the line, once it has one
        self.attempt: Attempt | None = None  # the one under way
        self.attempts = 0  # that were made
        self.slot_address = "-"  # of the last one
        self.worker_name = ""  # of the last one, if it has one
        self.status = 0  # of the response to the consumer; 0 as long as there is none
        self.bytes_in = self.bytes_out = 0  # of the bodies
        self.received_at = hub.loop.now
        self.since = hub.loop.now  # it waits
        self.queued_s = self.worker_s = 0.0
        self.claim: Claim | None = None  # what it claims of the order, if anybody asks
        self.outcome: Outcome | None = None
        self.detail = ""
        self._upload_bytes = 0  # of memory, as the hub counts it while the body is coming
        self._replayable = True  # nothing of the body has been sent and dropped
        self._prefix = b""  # the response's head, until it is sent with what follows
        self._in_chunks = False  # the body of the response, as it is sent
        self._keeps_consumer = False  # as the head of the response has told it
        self._patience_s = LIMITS.patience_s  # left
        self._absorbs = False  # the response, whatever the consumer takes
        hub.exchanges.add(self)

    def _to(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} to {state}"
        self.state = state

    # .. the request ..

    def open(self, *, has_body: bool, head_bytes: int) -> None:
        """The head is there: refuse it, ask for the body, or queue the request."""
        hub, head = self._hub, self.head
        length = head.content_length or 0
        self.received = not has_body
        if hub.refuses:
            self.finish(Outcome.DRAINING)
        elif head.max_forwards == 0:
            self._answer_options()
        elif length > hub.options.max_request_body:
            self.refuse(413, f"a body of {length} bytes; the limit is {hub.options.max_request_body}")
        elif not has_body:
            self.on_request_end()
        elif not hub.has_room() and hub.policy.evicted_by(hub.claims.tenant_of(self)) is None:
            self.finish(Outcome.QUEUE_FULL)
        elif not hub.has_room_for_upload(head_bytes):
            self.finish(Outcome.QUEUE_FULL, "too many bodies are on their way")
        else:
            self._count_upload(head_bytes + LIMITS.upload_bytes)
            self.spool = hub.new_spool()
            if head.expects_continue:
                self.consumer.stream.write(CONTINUE)
            if hub.options.stream_requests:
                self._enqueue()

    def _answer_options(self) -> None:
        """Answers as the last recipient what may be passed on to nobody (RFC 9110 §7.6.2)."""
        self.status = 200
        self._keeps_consumer = self.keeps_consumer
        fields = [(b"X-Request-Id", self.request_id), (b"Allow", ALLOWED_METHODS)]
        self.consumer.stream.write(own_response(200, b"", fields=fields, keep_alive=self._keeps_consumer))
        self.finish(COMPLETED)

    def _count_upload(self, size: int) -> None:
        """Counts the request among those that come, with so many bytes; 0 when it has come."""
        self._hub.upload_bytes += size - self._upload_bytes
        self._upload_bytes = size

    def may_receive(self) -> bool:
        """Whether the body has room; a streamed one waits for its slot."""
        if self.spool is None or not self._hub.options.stream_requests:
            return True
        return not self.spool.is_over(self._hub.options.spool_memory)

    def on_request_body(self, data: Bytes) -> None:
        """A piece of the body has come."""
        if not data or self.spool is None:
            return
        self.bytes_in += len(data)
        if self.bytes_in > self._hub.options.max_request_body:
            self.refuse(413, f"a body of more than {self._hub.options.max_request_body} bytes")
            return
        self.spool.append(data)
        if self.spool.disk_error is not None and not self._hub.options.stream_requests:
            self._hub.on_disk_error(self.spool.disk_error)
            self.refuse(503, f"no room for the body: {self.spool.disk_error.strerror}")
        else:
            self.pump()

    def on_request_end(self) -> None:
        """The request is whole."""
        self.received = True
        if self.state is RECEIVING:
            self._enqueue()
        else:
            self.pump()

    def _enqueue(self) -> None:
        hub = self._hub
        if self._upload_bytes:
            self._count_upload(0)
        limit_s, tenant = hub.options.queue_timeout, ""
        claim = hub.claims.of(self)
        if claim is not None:
            self.claim = claim
            tenant = claim.tenant
            if claim.wait_s is not None:
                limit_s = min(limit_s, claim.wait_s)
                if (estimate_s := hub.estimate_start_s(claim)) > claim.wait_s:
                    self.finish(
                        Outcome.QUEUE_TOO_LONG, f"about {estimate_s:.0f} s, and not {claim.wait_s:.0f}"
                    )
                    return
        if hub.policy.is_full and not hub.make_room(tenant):
            self.finish(Outcome.QUEUE_FULL)
            return
        self._to(QUEUED)
        self.since = now = hub.loop.now
        self.ticket = hub.policy.put(self, now, limit_s, claim)

    @property
    def wait_s(self) -> float | None:
        """For how many seconds the consumer would wait at most, if it has said so."""
        return None if self.claim is None else self.claim.wait_s

    # .. to the slot ..

    def start(self, slot: Slot) -> None:
        """Sends the request to a slot."""
        now = self._hub.loop.now
        attempt = self.attempt = Attempt(slot, now)
        slot.begin(self)
        self.slot_address = slot.stream.address
        self.worker_name = slot.name
        self.attempts += 1
        self.queued_s += now - self.since
        self._to(SENT)
        length = self._length_for_worker()
        attempt.is_chunked = length is None
        fields = self._hub.forwarding.fields(self, now - self.received_at)
        if attempt.progress is OFFERED:
            fields += self._hub.waiting_field()
        head = forwarded_request(self.head, length, fields)
        if self.spool is None:
            attempt.body_sent = True
            slot.stream.write(head)
        else:
            self._send_with_body(attempt, self.spool, head)
        if attempt.progress is OFFERED and attempt.body_sent:
            slot.expect_claim()

    def _send_with_body(self, attempt: Attempt, spool: Spool, head: bytes) -> None:
        """Sends the head, with what there is of the body as far as it may be offered: one packet, mostly."""
        may_send = attempt.progress is not OFFERED or not self._hub.options.stream_requests
        if spool.size and not attempt.is_chunked and may_send:
            most = len(head) + LIMITS.offered_bytes
            while len(head) < most and (piece := self._take_body(most - len(head))):
                head += piece
        stream = attempt.slot.stream
        if spool.size or not self.received:
            stream.transport.set_unacknowledged_s(LIMITS.worker_full_s)
        stream.write(head)
        self.pump()

    def _length_for_worker(self) -> int | None:
        """A body that is there as a whole is sent with its length, however it came."""
        if self.spool is not None and self.received:
            return self.spool.size
        return self.head.content_length

    def _take_body(self, limit: int) -> bytes:
        assert self.spool is not None
        data = bytes(self.spool.peek(limit))
        self.spool.advance(len(data))
        self._replayable = not self._hub.options.stream_requests
        return data

    def pump(self) -> None:
        """Sends the slot the next piece of the body, if it takes more."""
        attempt, spool = self.attempt, self.spool
        if attempt is None or spool is None or attempt.body_sent:
            return
        if attempt.progress is OFFERED and (spool.size or not self.received):
            return  # the rest is for who claims it
        stream = attempt.slot.stream
        if spool.size and stream.outbuf is None:
            data = self._take_body(LIMITS.receive_bytes)
            stream.write(chunk(data) if attempt.is_chunked else data)
            if spool.size and stream.outbuf is None:  # it takes all at once: others come in between
                self._hub.loop.call_soon(lambda: self._hub.loop.deliver(stream, self.pump))
        if self.received and not spool.size:
            attempt.body_sent = True
            if attempt.is_chunked:
                stream.write(LAST_CHUNK)
        if self._hub.options.stream_requests:
            self.consumer.stream.resume()

    # .. from the slot ..

    def may_relay(self) -> bool:
        """Whether the response has room: its head always, since nobody knows before how it goes on.

        The slot waits for a consumer that is nearly as fast as itself, which costs nothing.  One that is
        slow is not waited for: its response is absorbed, and holds the slot only when the spool is full.
        """
        outbuf = self.consumer.stream.outbuf
        if outbuf is None or self.state is SENT:
            return True
        return self._absorbs and not outbuf.is_over(self._hub.options.response_spool)

    def _wait_for_consumer(self, stream: Stream) -> None:
        if self._absorbs:
            self._absorb()  # the outbuf may be another one
        elif stream.deadline == math.inf:
            self._hub.loop.set_deadline(stream, self._patience_s)

    def _stop_waiting(self, stream: Stream) -> None:
        if stream.deadline != math.inf:
            self._patience_s = stream.deadline - self._hub.loop.now
            stream.deadline = math.inf
        stream.resume()

    def _absorb(self) -> None:
        """The consumer is slow: from now on the response goes into the spool as fast as it comes."""
        self._absorbs = True
        if self.consumer.stream.outbuf is not None:
            self.consumer.stream.outbuf.spill(self._hub.options.spool_memory)

    def on_heard(self) -> None:
        """The slot has said something: from now on nobody else may answer, unless it does not claim it."""
        assert self.attempt is not None
        if self.attempt.progress is UNHEARD:
            self.attempt.progress = HEARD

    def on_claimed(self) -> None:
        """The slot begins with it, and has the time for that which any slot has."""
        attempt = self.attempt
        assert attempt is not None
        attempt.progress = UNHEARD
        attempt.slot.stream.deadline = attempt.since + self._hub.options.response_timeout
        self.pump()

    def on_interim(self, head: ResponseHead) -> None:
        """An interim response: 103 is of use to a consumer, the others end here (RFC 9110 §15.2)."""
        assert self.attempt is not None
        self.attempt.interims += 1
        if head.status == 101:
            raise ProtocolError(502, "101 Switching Protocols, which nobody asked for")
        if self.attempt.interims > LIMITS.interim_responses:
            raise ProtocolError(502, f"more than {LIMITS.interim_responses} interim responses")
        if head.status == 103 and self.head.minor_version == 1:
            self.consumer.stream.write(forwarded_response(head, b"", time.time()))

    def on_response(self, head: ResponseHead, body: BodyReader) -> None:
        """The head of the response.  It is sent with the first piece of the body, or by ``flush``."""
        self._to(RESPONDING)
        self.status = head.status
        has_length = isinstance(body, FixedBody)
        self._in_chunks = not has_length and self.head.minor_version == 1
        # HTTP/1.0 knows no chunks: there the end of the connection tells the end of the body.
        self._keeps_consumer = (has_length or self._in_chunks) and self.keeps_consumer
        if not self._keeps_consumer:
            connection = b"close"
        else:
            connection = b"" if self.head.minor_version else b"keep-alive"
        applied = b"" if self.claim is None or self.claim.wait_s is None else PREFERENCE_APPLIED
        self._prefix = forwarded_response(
            head, connection, time.time(), self.request_id, applied, in_chunks=self._in_chunks
        )

    def on_response_body(self, data: Bytes, *, is_last: bool) -> None:
        """A piece of the response's body."""
        self.bytes_out += len(data)
        prefix, self._prefix = self._prefix, b""
        if self._in_chunks:
            data = b"".join((prefix, chunk(data) if data else b"", LAST_CHUNK if is_last else b""))
        elif prefix:
            data = prefix + bytes(data)
        if data:
            self.consumer.stream.write(data)
        self._after_relay(is_last=is_last)

    def flush(self) -> None:
        """Sends the head of the response if nothing has come that it could be sent with."""
        if self._prefix:
            self.on_response_body(b"", is_last=False)

    def shortcut(self) -> Stream | None:
        """Returns where the body of the response may go as it stands; ``None`` if it is put into chunks."""
        return None if self._in_chunks else self.consumer.stream

    def on_response_moved(self, size: int, *, is_last: bool) -> None:
        """``size`` bytes of the body have taken the shortcut."""
        self.bytes_out += size
        self._after_relay(is_last=is_last)

    def on_response_end(self) -> None:
        """The response is whole: the slot is free, even if the consumer has not taken everything yet."""
        self.flush()
        attempt = self._end_attempt(reusable=True)
        attempt.slot.served += 1
        attempt.slot.machine.served += 1
        self._hub.counters.on_served(self.worker_s)
        if self.consumer.stream.outbuf is None:
            self.finish(COMPLETED)

    def on_consumer_drained(self) -> None:
        """The consumer has taken everything so far."""
        if self.state is RESPONDING:
            if self.attempt is None:
                self.finish(COMPLETED)
            else:
                self._stop_waiting(self.attempt.slot.stream)

    def on_consumer_took(self) -> None:
        """The consumer has taken a piece; more is left."""
        if self.attempt is not None:
            self.attempt.slot.stream.resume()

    def _after_relay(self, *, is_last: bool) -> None:
        if self.consumer.stream.outbuf is not None and self.attempt is not None and not is_last:
            self._wait_for_consumer(self.attempt.slot.stream)

    # .. the ends ..

    @property
    def has_begun(self) -> bool:
        """Whether a byte of a response has been sent to the consumer: from then on there is no other."""
        return self.status != 0 and not self._prefix

    @property
    def keeps_consumer(self) -> bool:
        """Whether the consumer's connection can serve another request after this one."""
        return self.head.keep_alive and self.received and not self._hub.draining

    def on_worker_gone(self, detail: str) -> None:
        """The connection of the slot has ended before the response did."""
        assert self.attempt is not None
        if self.attempt.progress is OFFERED and not self.attempt.is_in_doubt:
            self.on_turned_away()
            return
        self.attempt.slot.machine.failures += 1
        self._hub.policy.rest(self.attempt.slot.machine, self._hub.loop.now)
        if self.has_begun:
            self.finish(Outcome.WORKER_CUT, detail)
        elif self._may_run_again(self.attempt):
            self.attempt.slot.machine.requeues += 1
            self._requeue(self.attempt)
        else:
            self.finish(Outcome.WORKER_LOST, detail)

    def on_turned_away(self, *, is_held: bool = False) -> None:
        """Nobody claims it: it has its old place again, whatever its method, as if it had not been sent."""
        attempt = self.attempt
        assert attempt is not None
        self._hub.counters.turned_away += 1
        self.attempts -= 1
        attempt.body_sent = True  # nothing more of it, if the connection is held
        self._end_attempt(reusable=is_held)
        self._wait_again(attempt.since, away_s=0)

    def _on_unclaimed(self, attempt: Attempt) -> None:
        """It was sent a while ago, and not claimed: the worker hangs, or its machine is gone.

        What has reached that machine may be claimed yet, so only what may run twice is taken back then.  If
        the machine was there when it was sent, and nothing has come since, the network may have been cut just
        behind it, and have hidden the claim.
        """
        slot = attempt.slot
        process, once = slot.registration.process, not self.head.is_idempotent
        ends_at = attempt.since + self._hub.options.response_timeout
        slot.stream.transport.set_least(1)
        if slot.stream.transport.has_news():  # the claim, most likely
            slot.stream.deadline = min(self._hub.loop.now + LIMITS.unclaimed_s, ends_at)
        elif once and slot.stream.transport.has_delivered(attempt.bytes_taken):
            slot.stream.deadline = ends_at
        elif once and self._hub.has_heard(process, attempt.since - LIMITS.heard_s):
            attempt.is_in_doubt = True
            slot.stream.deadline = ends_at
        else:
            slot.stream.close(abort=True)
            self.on_turned_away()
            self._hub.drop_process(process)

    def _may_run_again(self, attempt: Attempt) -> bool:
        if attempt.progress is HEARD or not self._replayable:
            return False
        if not attempt.bytes_taken:
            return True
        return self.head.is_idempotent and self.attempts < self._hub.options.max_attempts

    def _requeue(self, attempt: Attempt) -> None:
        request_id = self.request_id.decode()
        log.info("%s: worker %s was lost; back to the head of the queue", request_id, self.slot_address)
        if not attempt.bytes_taken:
            self.attempts -= 1  # as if it had not been made
        self._hub.counters.requeues += 1
        self._end_attempt(reusable=False)
        self._wait_again(self._hub.loop.now, away_s=self.worker_s)

    def _wait_again(self, since: float, away_s: float) -> None:
        """Goes back to its place in the queue; it waits ``since`` then, and ``away_s`` do not count."""
        if self.spool is not None:
            self.spool.rewind()
        self._to(QUEUED)
        self.since = since
        assert self.ticket is not None
        self._hub.needy.add(self.consumer)
        self._hub.policy.put_back(self.ticket, away_s)

    def on_worker_garbage(self, error: ProtocolError) -> None:
        """The worker broke the protocol."""
        assert self.attempt is not None
        self.attempt.slot.machine.failures += 1
        self.finish(Outcome.WORKER_CUT if self.has_begun else Outcome.WORKER_GARBAGE, error.detail)

    def on_worker_deadline(self) -> None:
        """No response in time; or the slot has waited for its consumer for long enough."""
        assert self.attempt is not None
        limit_s = self._hub.options.response_timeout
        if self.attempt.progress is OFFERED and self._hub.loop.now < self.attempt.since + limit_s:
            self._on_unclaimed(self.attempt)
        elif self.state is RESPONDING:
            self._absorb()
        else:
            self.attempt.slot.machine.failures += 1
            self.finish(Outcome.WORKER_TIMEOUT)

    def on_consumer_gone(self, detail: str = "") -> None:
        """The consumer has left, or does not take what it asked for."""
        running = self.state in (SENT, RESPONDING)
        self.finish(Outcome.CONSUMER_GONE_RUNNING if running else Outcome.CONSUMER_GONE_QUEUED, detail)

    def refuse(self, status: int, detail: str) -> None:
        """Ends it with an error status that is the consumer's own fault."""
        self.finish(Outcome.REFUSED, detail, status)

    def finish(self, outcome: Outcome, detail: str = "", status: int = 0) -> None:
        """The one way out: lets go of everything, answers or cuts off the consumer, and counts."""
        if self.state is FINISHED:
            return
        # 1. Nothing more will happen to it.
        if self.state is QUEUED:
            self.queued_s += self._hub.loop.now - self.since
            if self.ticket is not None:
                self._hub.policy.withdraw(self.ticket)
        self._to(FINISHED)
        self.outcome, self.detail = outcome, detail
        if self.attempt is not None:
            self._end_attempt(reusable=False)
        if self.spool is not None:
            self.spool.close()
            self._count_upload(0)
        # 2. The consumer gets an answer as long as none has begun; what has begun is never ended cleanly.
        status = status or outcome.status
        if outcome is COMPLETED:
            self.consumer.end_exchange(keep_alive=self._keeps_consumer and not self._hub.refuses)
        elif not self.has_begun and 0 < status != CONSUMER_GONE_STATUS:
            self.status = status
            self._answer(status, detail)
        else:
            self.status = CONSUMER_GONE_STATUS if status == CONSUMER_GONE_STATUS else self.status
            self.consumer.cut()
        # 3. It is counted and logged.
        self._hub.on_finished(self)
        self.ticket = None  # which knows this exchange: a circle would wait for the garbage collector

    def _answer(self, status: int, detail: str) -> None:
        """Sends the hub's own error response, for a person to read."""
        assert self.outcome is not None
        sentence = self.outcome.sentence
        if detail and self.outcome in TOLD_IN_DETAIL:
            sentence = f"{sentence}: {detail}" if self.outcome is not Outcome.REFUSED else detail
        fields = [(b"X-Request-Id", self.request_id)]
        if status == 503 and self.outcome is not Outcome.CANCELLED:
            has_waited = self.outcome is Outcome.QUEUE_TIMEOUT
            retry_after_s = self._hub.retry_after_s(self.ticket, has_waited=has_waited)
            fields.append((b"Retry-After", b"%d" % retry_after_s))
        elif status == 405:
            fields.append((b"Allow", ALLOWED_METHODS))
        if self.wait_s is not None:
            fields.append((b"Preference-Applied", b"wait"))
        request_id = self.request_id.decode()
        text = f"{status} {http.HTTPStatus(status).phrase}: {sentence}.\nrequest id: {request_id}\n"
        keep_alive = self.keeps_consumer
        with_body = self.head.method != b"HEAD"
        page = own_response(status, text.encode(), fields=fields, keep_alive=keep_alive, with_body=with_body)
        self.consumer.stream.write(page)
        self.consumer.end_exchange(keep_alive=keep_alive)

    def describe(self, now: float) -> dict[str, object]:
        """Returns what /stats tells of it; durations in seconds."""
        description: dict[str, object] = {
            "id": self.request_id.decode(),
            "consumer": self.consumer.stream.address,
            "method": self.head.method.decode(),
            "path": short_path(self.head),
            "age_seconds": round(now - self.received_at, 3),
            "attempts": self.attempts,
        }
        if self.attempt is not None:
            description["worker"] = self.slot_address
            description["worker_seconds"] = round(now - self.attempt.since, 3)
        return {**description, **self.describe_order()}

    def describe_order(self) -> Mapping[str, str | int]:
        """Returns what its place in the line depends on, as far as that is in use."""
        ticket, claims = self.ticket, self._hub.claims
        if self.claim is None or ticket is None:
            return NOTHING
        description: dict[str, str | int] = {}
        if claims.uses_pools:
            description["pool"] = ticket.origin or "-"
        if ticket.urgency != NORMAL_URGENCY:
            description["urgency"] = ticket.urgency
        if claims.is_fair:
            description["tenant"] = ticket.line.tenant.name
        return description

    def _end_attempt(self, *, reusable: bool) -> Attempt:
        attempt = self.attempt
        assert attempt is not None
        self.attempt = None
        self.worker_s = self._hub.loop.now - attempt.since
        attempt.slot.end(reusable=reusable and attempt.body_sent)
        return attempt


TOLD_IN_DETAIL: Final = (
    Outcome.REFUSED, Outcome.WORKER_GARBAGE, Outcome.QUEUE_TIMEOUT, Outcome.QUEUE_TOO_LONG
)  # fmt: skip
NOTHING: Final[Mapping[str, str | int]] = {}
PREFERENCE_APPLIED: Final = b"Preference-Applied: wait\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


# ---- Roles: what the bytes of a stream mean ---------------------------------------------------------------


class Wait(enum.Enum):
    """What a consumer's stream waits for."""

    TAKING = "taking"  # the consumer, to take what is kept for it
    ROOM = "room"  # for what the consumer has sent ahead
    REQUEST = "request"  # the first byte of a head
    HEAD = "head"  # the rest of it
    BODY = "body"  # more of the body of the request
    NOTHING = "nothing"  # of the consumer's


FOR_TAKING, FOR_ROOM, FOR_REQUEST, FOR_HEAD, FOR_BODY, FOR_NOTHING = Wait


class Consumer(Role):
    """The role of a stream from a consumer: requests in, responses out, one after the other."""

    __slots__ = ("_hub", "_reader", "_waits_for", "exchange", "host", "is_trusted")

    def __init__(self, hub: Hub, stream: Stream) -> None:
        self._hub = hub
        self.stream = stream
        stream.role = self
        self.exchange: Exchange | None = None
        self.host = host_of(stream.address).encode()
        self.is_trusted = hub.forwarding.trusts(stream.address)  # with what it says of those behind it
        self._reader = MessageReader(take_request_head, request_body)
        self._waits_for: tuple[Wait, int, float] | None = None  # and progress, and time allowed
        hub.needy.add(self)
        stream.transport.set_unacknowledged_s(hub.options.stall_timeout)
        self.settle()

    # .. in ..

    def on_bytes(self, data: memoryview) -> None:
        reader = self._reader
        reader.feed(data)
        try:
            # Nothing begins before the consumer has taken the last answer.
            if self.exchange is None and self.stream.outbuf is None:
                self._begin()
            exchange = self.exchange
            while exchange is not None and exchange is self.exchange and reader.body is not None:
                event = reader.next()
                if event is None:
                    break
                if event is END:
                    exchange.on_request_end()
                elif not isinstance(event, RequestHead):
                    exchange.on_request_body(event)
        except ProtocolError as error:
            self._refuse(error)
        if reader.body is not None and reader.stopped:
            self.stream.take_rest_later()

    def _begin(self) -> None:
        """Begins the next exchange, if its head is there."""
        reader, size = self._reader, len(self._reader.inbuf)
        head = reader.next()
        if isinstance(head, RequestHead):
            has_body = not reader.is_at_end or reader.next() is not END
            self.exchange = Exchange(self._hub, self, head)
            self.exchange.open(has_body=has_body, head_bytes=size - len(reader.inbuf))

    def _refuse(self, error: ProtocolError) -> None:
        if self.exchange is None:
            self.exchange = Exchange(self._hub, self, head_of_refused(self._reader.inbuf))
        self.exchange.refuse(error.status, error.detail)

    # .. out ..

    def on_taken(self) -> None:
        if self.exchange is not None:
            self.exchange.on_consumer_took()

    def on_drained(self) -> None:
        if self.exchange is not None:
            self.exchange.on_consumer_drained()
        elif self._reader.inbuf:
            self.stream.take_rest_later()

    def end_exchange(self, *, keep_alive: bool) -> None:
        """The response is on its way; the stream is kept for the next request, or closed."""
        exchange, self.exchange = self.exchange, None
        assert exchange is not None
        stream = self.stream
        if keep_alive:
            self._hub.needy.add(self)
            stream.resume()
            if self._reader.inbuf:
                stream.take_rest_later()
        elif not exchange.received or self._reader.inbuf or stream.outbuf is not None:
            self._hub.needy.discard(self)
            Farewell(self._hub.loop, stream)
        else:
            self._close()

    def cut(self) -> None:
        """Breaks the connection, so that what was sent cannot be taken for a whole response."""
        self.exchange = None
        self._close(abort=True)

    def _close(self, *, abort: bool = False) -> None:
        self._hub.needy.discard(self)
        self.stream.close(abort=abort)

    # .. the rest ..

    def on_drain(self) -> None:
        """The hub drains: an idle stream is closed at once, or soon if its next request would be served."""
        self.stream.resume()
        is_idle = self.exchange is None and self.stream.outbuf is None and not self._reader.inbuf
        if self._hub.refuses and is_idle and not self.stream.transport.has_news():
            self._close()  # one whose request has just come is refused in words

    def on_hangup(self, *, reset: bool) -> None:
        if self.exchange is not None:
            self.exchange.on_consumer_gone()
        self._close()

    def on_fault(self) -> None:
        if self.exchange is not None:
            self.exchange.finish(Outcome.HUB_FAULT)
        self._close()

    def settle(self) -> int:
        """Bytes are welcome as far as they can be used; of those that run ahead of that, a bounded number.

        Every phase that waits for the consumer has a limit; those that wait for the hub have none.
        """
        exchange, body, options = self.exchange, self._reader.body, self._hub.options
        room = LIMITS.pipelined_bytes - len(self._reader.inbuf)
        if exchange is not None and body is not None:
            room = max(room, body.verbatim) if exchange.may_receive() else 0
        # What it waits for, how far that has come, and for how many seconds it need not go on.
        if self.stream.outbuf is not None:
            wait = FOR_TAKING, self.stream.written, options.stall_timeout
        elif room <= 0:
            wait = FOR_ROOM, 0, LIMITS.gone_check_s
        elif exchange is None and self._reader.inbuf:
            wait = FOR_HEAD, self.stream.written, options.head_timeout
        elif exchange is None:
            wait = FOR_REQUEST, self.stream.written, self._hub.keep_alive_s
        elif body is not None:
            wait = FOR_BODY, exchange.bytes_in, options.stall_timeout
        else:
            wait = FOR_NOTHING, 0, math.inf
        if wait != self._waits_for:
            self._waits_for = wait
            self.stream.deadline = self._hub.loop.now + wait[2]
        return room

    def on_deadline(self) -> None:
        assert self._waits_for is not None
        wait, _, limit_s = self._waits_for
        self._waits_for = None
        exchange, stream = self.exchange, self.stream
        if wait is FOR_TAKING:
            if exchange is not None:
                exchange.on_consumer_gone(f"it took nothing for {limit_s:g} s")
            self._close(abort=True)
        elif wait is FOR_ROOM:
            if stream.transport.has_hung_up():
                self.on_hangup(reset=False)
        elif wait is FOR_HEAD:
            self._refuse(ProtocolError(408, f"no whole head within {limit_s:g} s"))
        elif wait is FOR_BODY:
            self._refuse(ProtocolError(408, f"nothing more of the body for {limit_s:g} s"))
        elif not stream.transport.has_news():  # else a request has come this very moment
            self._close()


class Farewell(Role):
    """The role of a stream whose peer gets its last ``answer``, or has got it.

    What still comes is read and dropped for a while: to close a socket with unread bytes would destroy
    the answer on its way (RFC 9112 §9.6).
    """

    __slots__ = ()

    def __init__(self, loop: EventLoop, stream: Stream, answer: bytes = b"") -> None:
        self.stream = stream
        stream.role = self
        loop.set_deadline(stream, LIMITS.lingering_s)
        if answer:
            stream.write(answer)
        if stream.outbuf is None:
            stream.transport.end_output()

    def settle(self) -> int:
        return LIMITS.receive_bytes

    def on_drained(self) -> None:
        self.stream.transport.end_output()


class Handshaking(Role):
    """The role of a stream until TLS stands: ``begin`` gives it the next one.

    Until then nothing is known of who is there, and there may be many.
    """

    __slots__ = ("_begin", "_hub", "_transport", "port")

    def __init__(
        self, hub: Hub, port: str, sock: socket.socket, address: str, begin: Callable[[Stream], object]
    ) -> None:
        self._hub = hub
        self.port = port
        self._begin = begin
        assert hub.certificate is not None
        self._transport = TlsTransport(sock, hub.certificate.context(port), self._on_open)
        self.stream = hub.new_stream(address, self._transport)
        self.stream.role = self
        self.stream.deadline = hub.loop.now + hub.options.head_timeout
        hub.greet(self)

    def _on_open(self) -> None:
        self._hub.newcomers.pop(self, None)
        self._begin(self.stream)

    def settle(self) -> int:
        return LIMITS.handshake_bytes

    def on_hangup(self, *, reset: bool) -> None:
        if self._transport.spoke_in_clear:
            self._hub.complain(self.port, self.stream.address, "spoke without TLS on a port that wants it")
            self.stream.transport = self._transport.in_clear()
            text = b"This port speaks TLS: the address begins with https://\n"
            Farewell(self._hub.loop, self.stream, own_response(400, text, keep_alive=False))
        else:
            if self._transport.has_heard:  # and not one who only looks whether the port is open
                why = describe_tls(self._transport.fault)
                self._hub.complain(self.port, self.stream.address, f"no TLS handshake: {why}")
            self.stream.close()
        self._hub.newcomers.pop(self, None)

    def on_deadline(self) -> None:
        self.leave()

    def leave(self) -> None:
        """It has taken too long, or others need the room."""
        self._hub.newcomers.pop(self, None)
        self.stream.close()

    def on_fault(self) -> None:
        self._hub.newcomers.pop(self, None)


class Applicant(Role):
    """The role of a stream on the PTTH port until it has shown that it may have requests.

    Of those not a byte is sent before that.
    """

    __slots__ = ("_held", "_hub", "_inbuf")

    def __init__(self, hub: Hub, stream: Stream, held: Slot | None = None, received: Bytes = b"") -> None:
        self._hub = hub
        self.stream = stream
        self._held = held  # the slot that this was, if its worker holds the connection
        self._inbuf = Inbuf(received)
        stream.role = self
        stream.resume()
        if held is None:
            hub.greet(self)
            if stream.deadline == math.inf:  # TLS has not begun it
                stream.deadline = hub.loop.now + hub.options.head_timeout

    def settle(self) -> int:
        return LIMITS.handshake_bytes + 1 - len(self._inbuf)

    def on_bytes(self, data: memoryview) -> None:
        self._inbuf += data
        words, held = bytes(self._inbuf), self._held
        try:
            if held is not None and words == held.registration.words and self._hub.is_as_before(held):
                self._admit(held.registration, b"ptth")
            elif (head := take_request_head(self._inbuf)) is not None:
                self._answer(head, words)
            elif len(self._inbuf) > LIMITS.handshake_bytes:
                raise ProtocolError(431, f"the head is over {LIMITS.handshake_bytes} bytes")
        except ProtocolError as error:
            self._refuse(error)

    def _answer(self, head: RequestHead, words: bytes) -> None:
        application = read_application(head, self._hub.options.ptth_compat)
        if self._inbuf:
            raise ProtocolError(400, "bytes behind the head of a handshake: nobody has asked anything yet")
        transport = self.stream.transport
        names = transport.names() if isinstance(transport, TlsTransport) else None
        registration = register(head, application, names, self._hub.permits)
        if application.process and application.protocol == b"ptth":
            registration = registration._replace(words=words)
        self._admit(registration, application.protocol, is_envoy=application.is_envoy)

    def _admit(self, registration: Registration, protocol: bytes, *, is_envoy: bool = False) -> None:
        if self._hub.needs_no_workers:
            raise ProtocolError(503, "this hub is about to end")
        self.stream.deadline = math.inf
        extra = self._hub.claim_fields() if registration.process else b""
        self.stream.write(SWITCHING % (protocol, extra))
        held = self._held
        if held is not None and held.registration is registration:
            held.take_up_again()
            return
        self._leave()
        if is_envoy:
            Rehearsal(self._hub, self.stream, registration)
        else:
            self._hub.enlist(self.stream, registration)

    def _leave(self) -> None:
        self._hub.newcomers.pop(self, None)
        if self._held is not None:
            self._hub.strike_off(self._held)

    def _refuse(self, error: ProtocolError) -> None:
        self._leave()
        self._hub.complain("ptth", self.stream.address, f"refused as a worker with {error}")
        self._hub.counters.refused_workers[error.status] += 1
        fields = [*error.fields]
        if error.status == 503:
            fields.append((b"Retry-After", b"1"))  # there is room again, or the next hub, in a moment
        text = f"{error.status} {http.HTTPStatus(error.status).phrase}: {error.detail}.\n"
        answer = own_response(error.status, text.encode(), fields=fields, keep_alive=False)
        Farewell(self._hub.loop, self.stream, answer)

    def on_hangup(self, *, reset: bool) -> None:
        self._leave()
        self.stream.close()

    def on_deadline(self) -> None:
        limit_s = self._hub.options.head_timeout
        self._refuse(ProtocolError(408, f"no whole handshake within {limit_s:g} s"))

    def leave(self) -> None:
        """Others need the room."""
        self._refuse(ProtocolError(503, "too many connections have not shown yet who they are"))

    def on_fault(self) -> None:
        self._leave()


class Rehearsal(Role):
    """The role of a stream from an Envoy between its 101 and its first request.

    Envoy (1.40) loses what comes together with the 101, and the connection is of no use after that.  So it
    is given a moment, and then has to echo a word of its own protocol.
    """

    __slots__ = ("_hub", "_inbuf", "registration")

    PING: Final = b"RPING"

    def __init__(self, hub: Hub, stream: Stream, registration: Registration) -> None:
        self._hub = hub
        self.stream = stream
        self.registration = registration
        self._inbuf: bytes | None = None  # once it has been asked
        stream.role = self
        hub.loop.set_deadline(stream, LIMITS.envoy_pause_s)

    def settle(self) -> int:
        return LIMITS.handshake_bytes

    def on_bytes(self, data: memoryview) -> None:
        self._inbuf = None if self._inbuf is None else self._inbuf + bytes(data)
        if self._inbuf == self.PING:
            self.stream.deadline = math.inf
            self._hub.enlist(self.stream, self.registration)
        elif self._inbuf is None or not self.PING.startswith(self._inbuf):
            self.stream.close()

    def on_deadline(self) -> None:
        if self._inbuf is None:
            self._inbuf = b""
            self.stream.write(self.PING)
            self.stream.deadline = self._hub.loop.now + LIMITS.envoy_echo_s
        else:
            self._hub.complain("ptth", self.stream.address, "an Envoy that does not echo; it will come again")
            self.stream.close()


SWITCHING: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: %b\r\nALPN: http%%2F1.1\r\n%b\r\n"
)


UNREGISTERED: Final = Registration()  # of a slot that came by the silent worker port


class Slot(Role):
    """The role of a stream from a worker: one slot, waiting or busy."""

    __slots__ = (
        "_has_old_body", "_holds", "_hub", "_keep_alive", "_reader", "exchange", "is_welcome", "machine",
        "name", "offer", "registration", "served", "since",
    )  # fmt: skip

    def __init__(self, hub: Hub, stream: Stream, registration: Registration) -> None:
        self._hub = hub
        self.stream = stream
        stream.role = self
        self.registration = registration
        self.name = registration.name  # of the worker, empty if it has none
        self.is_welcome = True  # for another request: the workers file still allows it
        machine = stream.address.rpartition(":")[0]
        # What it serves, none: all.
        origins = registration.origins | {BY_ADDRESS} if registration.origins else registration.origins
        name = f"{self.name}@{machine}" if self.name else machine
        self.offer: Offer[Slot] = hub.join(name, origins)
        self.machine = self.offer.machine
        self.exchange: Exchange | None = None
        self.since = hub.loop.now
        self.served = 0
        self._reader = MessageReader(take_response_head, self._body_of)
        self._has_old_body = False  # still to be sent, of a request that was answered before it was read
        self._keep_alive = True  # the connection, after the response under way ...
        self._holds = False  # ... but nothing is sent on it before another handshake
        stream.transport.set_unacknowledged_s(LIMITS.unacknowledged_s)

    def _body_of(self, head: ResponseHead) -> BodyReader | None:
        return response_body(head, b"GET" if self.exchange is None else self.exchange.head.method)

    def begin(self, exchange: Exchange) -> None:
        """The slot is busy with ``exchange``, which the loop delivers to its stream."""
        self.exchange = exchange
        limit_s = self._hub.options.response_timeout
        if self.registration.process:
            limit_s = min(limit_s, LIMITS.unclaimed_s)
        self.stream.deadline = self._hub.loop.now + limit_s

    def expect_claim(self) -> None:
        """Sleeps on until more than a claim has come: the whole request has been sent."""
        if not self._reader.inbuf:
            self.stream.transport.set_least(len(CLAIM) + 1)

    def end(self, *, reusable: bool) -> None:
        """The slot has nothing to do with its exchange any more; it is free when all that has been sent."""
        self.exchange = self.stream.shortcut = None
        self.stream.transport.set_unacknowledged_s(LIMITS.unacknowledged_s)
        self.stream.deadline = math.inf
        if reusable and self._holds:
            self._hub.policy.release(self, self._hub.loop.now)
            self._hub.hold(self, self._reader.inbuf)
            return
        reusable = reusable and self._keep_alive and not self._reader.inbuf
        if reusable and self.stream.outbuf is not None:
            self._has_old_body = True
            self.stream.deadline = self._hub.loop.now + LIMITS.unacknowledged_s
        else:
            self._hub.release(self, reusable=reusable)

    def take_up_again(self) -> None:
        """The worker has held the connection, and offers it once more."""
        self._holds = False
        self.stream.role = self
        self._hub.count_connection(self.registration, 0)
        self._hub.policy.park(self)

    @property
    def is_waiting(self) -> bool:
        """Whether it has nothing to do."""
        return self.exchange is None and not self._has_old_body

    @property
    def is_held(self) -> bool:
        """Whether it has nothing to do, and is to be given nothing before another handshake."""
        return self._holds and self.is_waiting

    def _leave_old_body(self, *, reusable: bool) -> None:
        """The end of a body that was answered early has been sent, or the connection is over."""
        self._has_old_body = False
        self.stream.deadline = math.inf
        self._hub.release(self, reusable=reusable)

    def describe(self, now: float) -> dict[str, object]:
        """Returns what /stats tells of it; durations in seconds."""
        description: dict[str, object] = {
            "address": self.stream.address,
            "state": "idle" if self.exchange is None else "busy",
            "served": self.served,
            "connected_seconds": round(now - self.since, 3),
        }
        if self.name:
            description["name"] = self.name
        if self.registration.origins:
            description["origins"] = sorted(self.registration.origins)
        return description

    def settle(self) -> int:
        if self.exchange is not None and not self.exchange.may_relay():
            return 0
        body = self._reader.body
        return LIMITS.pipelined_bytes if body is None else max(LIMITS.pipelined_bytes, body.verbatim)

    def on_bytes(self, data: memoryview) -> None:
        exchange, reader = self.exchange, self._reader
        if exchange is None and not self.registration.process:
            self._hub.on_breach(self)
            return
        reader.feed(data)
        if exchange is None or (exchange.attempt is not None and exchange.attempt.progress is OFFERED):
            if not self._is_claimed(exchange) or not reader.inbuf:
                return  # a claim is no word of a response yet
            assert exchange is not None
        exchange.on_heard()
        try:
            while (event := reader.next()) is not None:
                if event is END:
                    if exchange.state is RESPONDING:  # and not an interim response
                        exchange.on_response_end()
                        return
                elif isinstance(event, ResponseHead):
                    self._on_head(exchange, event)
                else:
                    exchange.on_response_body(event, is_last=reader.is_at_end)
        except ProtocolError as error:
            exchange.on_worker_garbage(error)
            return
        exchange.flush()
        if reader.stopped:
            self.stream.take_rest_later()
        elif reader.body is not None and reader.body.verbatim > LIMITS.receive_bytes:
            self._take_shortcut(exchange, reader.body)

    def _is_claimed(self, exchange: Exchange | None) -> bool:
        """Looks at what a slot says that has not claimed the request, or has none; false if it does not.

        It turns a request away, or withdraws its offer, by a 503 that holds the connection.
        """
        self.stream.transport.set_least(1)
        try:
            head = self._reader.next()
            if head is None:
                return False
            assert isinstance(head, ResponseHead)
            if exchange is not None and head.status == 102:
                self._reader.next()  # its end
                exchange.on_claimed()
                return True
            if head.status != 503 or not head.holds or self._reader.next() is not END:
                raise ProtocolError(502, "a response to a request that it had not claimed")
        except ProtocolError as error:
            if exchange is None:
                self._hub.on_breach(self)
            else:
                exchange.on_worker_garbage(error)
            return False
        self._holds = True
        if exchange is not None:
            exchange.on_turned_away(is_held=True)
        elif self._has_old_body:  # which could not be taken back
            self._leave_old_body(reusable=False)
        else:
            self._hub.policy.remove(self)
            self._hub.hold(self, self._reader.inbuf)
        return False

    def _on_head(self, exchange: Exchange, head: ResponseHead) -> None:
        if head.status < 200:
            exchange.on_interim(head)
            return
        body = self._reader.body
        assert body is not None
        self._keep_alive = head.keep_alive and not isinstance(body, UntilCloseBody)
        self._holds = head.holds and self._keep_alive and bool(self.registration.process)
        self.stream.deadline = math.inf
        exchange.on_response(head, body)

    def _take_shortcut(self, exchange: Exchange, body: BodyReader) -> None:
        target = exchange.shortcut()
        if target is None or self.stream.shortcut is not None:
            return
        if self.stream.transport.can_splice and target.transport.can_splice:
            self.stream.shortcut = Shortcut(target, lambda: body.verbatim, self._on_moved)

    def _on_moved(self, size: int) -> None:
        """A part of the body has gone to the consumer by itself."""
        exchange, body = self.exchange, self._reader.body
        assert exchange is not None and body is not None
        body.skip(size)
        exchange.on_response_moved(size, is_last=body.done)
        if body.done:
            self.on_bytes(NO_BYTES)

    def on_drained(self) -> None:
        if self.exchange is not None:
            self.exchange.pump()
        elif self._has_old_body:
            self._leave_old_body(reusable=True)

    def on_hangup(self, *, reset: bool) -> None:
        exchange = self.exchange
        if self._has_old_body:
            self._leave_old_body(reusable=False)
        elif exchange is None:
            self._hub.on_worker_left(self)
        elif reset or exchange.state is not RESPONDING:
            if self._reader.inbuf:  # it may have been about to claim it
                exchange.on_claimed()
                exchange.on_heard()
            if exchange.attempt is not None and not reset:
                exchange.attempt.is_in_doubt = False  # a claim would have come before
            exchange.on_worker_gone("it reset the connection" if reset else "it closed the connection")
        else:
            self._end_body(exchange)
        self.stream.close()

    def _end_body(self, exchange: Exchange) -> None:
        """The connection has ended: so has the body, or it was cut."""
        try:
            self._reader.end()
        except ProtocolError as error:
            exchange.on_worker_gone(error.detail)
            return
        exchange.on_response_body(b"", is_last=True)
        exchange.on_response_end()

    def on_deadline(self) -> None:
        if self.exchange is not None:
            self.exchange.on_worker_deadline()
        elif self._has_old_body:
            self._leave_old_body(reusable=False)

    def on_fault(self) -> None:
        if self.exchange is not None:
            self.exchange.finish(Outcome.HUB_FAULT)
        elif self._has_old_body:
            self._leave_old_body(reusable=False)
        else:
            self._hub.on_worker_left(self)


class Admin(Role):
    """The role of a stream on the admin port: the hub itself answers, at once."""

    __slots__ = ("_hub", "_reader")

    def __init__(self, hub: Hub, stream: Stream) -> None:
        self._hub = hub
        self.stream = stream
        self._reader = MessageReader(take_request_head, request_body)
        stream.role = self
        self._set_deadline()

    def settle(self) -> int:
        return 0 if self.stream.outbuf is not None else LIMITS.pipelined_bytes

    def on_bytes(self, data: memoryview) -> None:
        self._reader.feed(data)
        try:
            head = self._reader.next()
            if isinstance(head, RequestHead):
                self._answer(head)
                self._take_next()
        except ProtocolError as error:
            detail = error.detail.encode() + b"\n"
            answer = own_response(error.status, detail, fields=ADMIN_FIELDS, keep_alive=False)
            Farewell(self._hub.loop, self.stream, answer)
        self._set_deadline()

    def _answer(self, head: RequestHead) -> None:
        if self._reader.next() is not END:
            raise ProtocolError(413, "no body is wanted here")
        answer = answer_admin(self._hub, head)
        page = own_response(
            answer.status, answer.body, answer.content_type, (*answer.fields, *ADMIN_FIELDS),
            keep_alive=head.keep_alive, with_body=head.method != b"HEAD",
        )  # fmt: skip
        if head.keep_alive:
            self.stream.write(page)
        else:
            Farewell(self._hub.loop, self.stream, page)

    def _take_next(self) -> None:
        """Looks at what has come after a request: in the next turn, and when its answer has been taken."""
        if self._reader.inbuf and self.stream.outbuf is None:
            self.stream.take_rest_later()

    def _set_deadline(self) -> None:
        if self.stream.role is self:
            self.stream.deadline = self._hub.loop.now + self._hub.options.keep_alive

    def on_drained(self) -> None:
        self._take_next()
        self._set_deadline()


# ---- The hub ----------------------------------------------------------------------------------------------


class Listener(Watched):
    """A listening socket.  It rests while there are no descriptors to be had."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket, accept: Callable[[socket.socket, str], None],
        may_accept: Callable[[], bool], *, is_shared: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._loop = loop
        self._socket = sock
        self._accept = accept
        self._may_accept = may_accept
        self._rests = False
        self._has_warned = False
        self._left = False  # to the successor
        self.is_shared = is_shared  # this very socket, with whoever passed it; it listens already
        self.address = address_text(sock.getsockname())
        sock.setblocking(False)

    def listen(self, what: str) -> None:
        """From now on connections come, unless they come already."""
        if self.is_shared:
            return
        try:
            self._socket.listen(LIMITS.backlog)
        except OSError as exc:  # another program has bound the port at the same moment
            raise OSError(f"cannot listen for {what} on {self.address}: {exc.strerror}") from exc

    def fileno(self) -> int:
        return self._socket.fileno()

    def settle(self) -> int:
        return 0 if self._rests or (self._left and self.is_shared) else READ

    def on_events(self, events: int) -> None:
        for _ in range(LIMITS.accepts_a_turn):
            if not self._may_accept():
                self._rest("as many connections as the limit of open files allows")
                return
            try:
                sock, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._rest(str(exc))
                    return
                log.debug("accept on %s: %s", self.address, exc)  # that connection is gone already
                continue
            self._has_warned = False
            self._accept(sock, address_text(peer))

    def on_deadline(self) -> None:
        self._rests = False

    def leave_to_successor(self, leaves: bool) -> None:
        """Lets new connections go to the hub that takes over, or takes them again.

        In a shared socket they wait until that hub accepts them.  Of a shared port (SO_REUSEPORT) this hub
        still accepts what the kernel has given to it, or gives to it because there is no other hub.
        """
        if leaves == self._left:
            return
        self._left = leaves
        self._loop.touch(self)
        if not self.is_shared:
            _prefer_newer(self._socket, leaves)

    def has_neighbour(self) -> bool:
        """Whether another socket listens on the same port (SO_REUSEPORT), where the platform can tell."""
        is_ipv6 = self._socket.family == socket.AF_INET6
        addresses = _listening_sockets("/proc/net/tcp6" if is_ipv6 else "/proc/net/tcp")
        own = addresses.get(os.fstat(self.fileno()).st_ino)
        return own is not None and list(addresses.values()).count(own) > 1

    def finish(self) -> None:
        """Accepts what has come already, which the kernel would reset, then closes."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        for _ in range(LIMITS.backlog // LIMITS.accepts_a_turn):  # more cannot have been waiting
            if poll.poll(0) and not self._rests:
                self.on_events(READ)
        self.closed = True
        self._loop.touch(self)

    def release(self) -> None:
        self._socket.close()

    def on_fault(self) -> None:
        self._rest("the loop could not serve it")

    def _rest(self, why: str) -> None:
        if not self._has_warned:  # once an episode
            log.warning("%s: accepting no connections for now: %s", self.address, why)
        self._has_warned = self._rests = True
        self.deadline = self._loop.now + LIMITS.accept_pause_s


def _listening_sockets(table: str) -> dict[int, str]:
    """Returns the addresses of all listening sockets by inode, as Linux tells them."""
    addresses = {}
    with contextlib.suppress(OSError), open(table, encoding="ascii") as lines:
        next(lines)
        for fields in map(str.split, lines):
            if fields[3] != "0A":  # those that listen come first, and a hub has many other connections
                break
            addresses[int(fields[9])] = fields[1]
    return addresses


class Timer(Watched):
    """A deadline without a descriptor."""

    def __init__(self, callback: Callable[[], None]) -> None:
        super().__init__()
        self._callback = callback

    def on_deadline(self) -> None:
        self._callback()


class Ports:
    """Where the hub listens, and how it leaves that to the hub that takes over.

    ``passed`` sockets are listening already, and used in place of the ports of these names.  ``accept`` has a
    function for each name, ``may_accept`` says whether there is room for another consumer.  The constructor
    binds; it raises ``OSError`` if it cannot, ``ValueError`` if it must not.
    """

    def __init__(
        self, loop: EventLoop, options: Options, passed: Mapping[str, socket.socket],
        accept: Mapping[str, Callable[[socket.socket, str], None]], may_accept: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._options = options
        self._passed = passed
        self.has_successor = options.reuse_port or "consumers" in passed
        self.listeners: dict[str, Listener] = {}
        self._handover_timer = Timer(self.finish)
        self._neighbour_timer = Timer(self._look_for_another_hub)
        self._neighbour_seen = 0  # times, one after the other
        self.is_left = False  # consumers are told to go elsewhere
        self._bind("consumers", options.main_host, options.main_port, accept, may_accept)
        self._bind("workers", options.worker_host, options.worker_port, accept, _always)
        if options.admin_port is not None or "admin" in passed:
            self._bind("admin", options.admin_host, options.admin_port or 0, accept, _always)
        if options.ptth_port is not None or "ptth" in passed:
            self._bind("ptth", options.ptth_host, options.ptth_port or 0, accept, may_accept)
        # From the first connection on nothing may fail any more: it would be lost with this hub.
        for name, listener in self.listeners.items():
            listener.listen(name)
        if options.reuse_port:
            self._look_for_another_hub()

    def _bind(
        self, what: str, host: str, port: int, accept: Mapping[str, Callable[[socket.socket, str], None]],
        may_accept: Callable[[], bool],
    ) -> None:  # fmt: skip
        sock = self._passed.get(what) or _bind(what, host, port, reuse_port=self._options.reuse_port)
        listener = Listener(self._loop, sock, accept[what], may_accept, is_shared=what in self._passed)
        self.listeners[what] = listener
        self._loop.add(listener)
        refuse_open_port(what, sock, self._options)

    def leave(self) -> None:
        """Takes no more consumers: these are for the hub that takes over, if one does."""
        self.is_left = True
        if not self.has_successor:
            self.finish()
            return
        self.listeners["consumers"].leave_to_successor(True)
        if self._options.reuse_port:
            # With a port of its own in SO_REUSEPORT's group this takes a moment: a connection whose handshake
            # is under way is this hub's, and would be reset if it closed at once.
            if "admin" in self.listeners:
                self.listeners["admin"].leave_to_successor(True)
            self._loop.set_deadline(self._handover_timer, LIMITS.handover_s)

    @property
    def is_leaving(self) -> bool:
        """Whether consumers may still come whose handshake was under way."""
        return self._handover_timer.deadline < math.inf

    def finish(self) -> None:
        """Closes the port for consumers; workers are still needed.

        An admin may watch to the end.  On a shared port that is the next hub's admin; but there may be no
        next hub on this very port, as with pods that have an address each.
        """
        listener = self.listeners["consumers"]
        if not listener.is_shared:
            listener.finish()

    def leave_workers(self, leaves: bool) -> bool:
        """Lets new slots go to the hub that takes over, or takes them again; false if none can."""
        names = [name for name in ("workers", "ptth") if name in self.listeners]
        can = self._options.reuse_port or all(name in self._passed for name in names)
        for name in names if can else ():
            self.listeners[name].leave_to_successor(leaves)
        return can

    @property
    def has_rival(self) -> bool:
        """Whether another hub takes a part of the requests without taking over."""
        return self._neighbour_seen >= LIMITS.neighbour_checks

    def _look_for_another_hub(self) -> None:
        """Warns, once an episode, when two hubs share the port for longer than a handover takes."""
        had_rival, listener = self.has_rival, self.listeners["consumers"]
        is_alone = self.is_left or not listener.has_neighbour()
        self._neighbour_seen = 0 if is_alone else self._neighbour_seen + 1
        if self.has_rival and not had_rival:
            log.warning("another hub listens on %s, too, and gets a part of the requests", listener.address)
        self._loop.set_deadline(self._neighbour_timer, LIMITS.neighbour_check_s)


class Forwarding:
    """What the hub adds to the requests that it forwards."""

    def __init__(self, options: Options) -> None:
        networks = [each for each in options.forwarded_allow_ips if each != "*"]
        self._trusted = [ipaddress.ip_network(each, strict=False) for each in networks]
        self._trusts_all = "*" in options.forwarded_allow_ips
        self._numbers = itertools.count(1)
        self._id_prefix = os.urandom(6).hex().encode()

    def trusts(self, address: str) -> bool:
        """Whether a consumer at that address may say whom it speaks for (X-Forwarded-*)."""
        if self._trusts_all or not self._trusted:
            return self._trusts_all
        ip = ipaddress.ip_address(host_of(address))
        return any(ip in network for network in self._trusted)

    def request_id(self, head: RequestHead) -> bytes:
        """Returns the request's id: the consumer's if it is well-formed, else a new one."""
        given = head.known.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given[0]):
            return given[0]
        return b"%b-%x" % (self._id_prefix, next(self._numbers))

    def fields(self, exchange: Exchange, age_s: float) -> bytes:
        """Returns the field lines for a worker; ``age_s`` is how long ago the request came."""
        head, consumer = exchange.head, exchange.consumer
        hops, proto, host = consumer.host, consumer.stream.transport.scheme, head.host or b""
        if consumer.is_trusted:
            known = head.known
            hops = b", ".join([*known.get(b"x-forwarded-for", ()), hops])
            proto = known.get(b"x-forwarded-proto", (proto,))[0]
            host = known.get(b"x-forwarded-host", (host,))[0]
        return (
            b"Via: 1.%d pothead\r\nX-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n"
            b"X-Request-Id: %b\r\nX-Request-Start: t=%.3f\r\n"
            b"Pothead-Attempt: %d\r\nPothead-Queue-Seconds: %.3f\r\n"
        ) % (
            head.minor_version, hops, proto, host, exchange.request_id,
            time.time() - age_s, exchange.attempts, exchange.queued_s,
        )  # fmt: skip


BY_ADDRESS: Final = "by address"  # the pool of those requests; whatever a slot serves, it serves these
_BY_ADDRESS: Final = re.compile(rb"(?:[0-9.]+|\[[0-9A-Fa-f:.]+\]|(?i:localhost))(?::[0-9]*)?\Z")


class Claims:
    """Reads out of a request who it is for, and what it may claim of the order."""

    def __init__(self, options: Options) -> None:
        self.pools: Container[str] = ()  # the origins that somebody has named
        self.routes = read_routes(options.route)
        self.uses_pools = bool(self.routes)  # or a worker has named what it serves
        self.is_fair = options.fair_by != "none"
        self._step_s = options.priority_step
        self._field: re.Pattern[bytes] | None = None  # finds the field that names the tenant
        if self.is_fair and options.fair_by != "address":
            name = re.escape(options.fair_by.encode())
            self._field = re.compile(rb"\r\n" + name + rb":[ \t]*([^\r]*)", re.IGNORECASE)

    def of(self, exchange: Exchange) -> Claim | None:
        """Returns the claim of a request; ``None`` if it has none, and nothing is asked of all."""
        known = exchange.head.known
        if not (self.uses_pools or self.is_fair or b"priority" in known or b"prefer" in known):
            return None
        urgency = NORMAL_URGENCY
        if self._step_s and b"priority" in known and exchange.consumer.is_trusted:
            urgency = read_urgency(known[b"priority"])
        return Claim(
            self.origin_of(exchange), self.tenant_of(exchange), urgency,
            (NORMAL_URGENCY - urgency) * self._step_s,
            read_wait(known[b"prefer"]) if b"prefer" in known and exchange.consumer.is_trusted else None,
        )  # fmt: skip

    def origin_of(self, exchange: Exchange) -> str:
        """Returns the pool of a request: its route's, else its own; nothing if there are no pools."""
        if not self.uses_pools:
            return ""
        head, consumer = exchange.head, exchange.consumer
        path = head.path
        for prefix, origin in self.routes:
            if path.startswith(prefix) and (prefix.endswith(b"/") or path[len(prefix) :][:1] in (b"", b"/")):
                return origin
        scheme, host = consumer.stream.transport.scheme, head.host or b""
        if consumer.is_trusted:
            scheme = head.known.get(b"x-forwarded-proto", (scheme,))[0].partition(b",")[0].strip()
            host = head.known.get(b"x-forwarded-host", (host,))[0].partition(b",")[0].strip()
        origin = read_origin(scheme + b"://" + host) or ""
        # Who asks for the hub itself, and not for a name that somebody may serve, takes whoever is free.
        return BY_ADDRESS if _BY_ADDRESS.match(host) and origin not in self.pools else origin

    def tenant_of(self, exchange: Exchange) -> str:
        """Returns whose share a request is served from; nothing if there are no shares."""
        if not self.is_fair:
            return ""
        head, consumer = exchange.head, exchange.consumer
        name = consumer.host
        if consumer.is_trusted:
            told = self._field.findall(head.forwarded) if self._field is not None else []
            hops = head.known.get(b"x-forwarded-for", ())
            if told and told[-1].strip():
                name = told[-1].strip()  # the last one, which a proxy may have added to the consumer's own
            elif hops and hops[-1].strip():
                name = hops[-1].rpartition(b",")[2].strip()
        if len(name) > LIMITS.tenant_bytes:
            name = name[:32] + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()
        return name.decode("ascii", "backslashreplace")


class Hub:
    """What pairs requests and slots, and how that lives and ends.

    The constructor binds the ports (``OSError`` if it cannot, ``ValueError`` if it must not); ``run``
    serves in the calling thread until ``drain`` or ``stop`` is called, from any thread.  ``access_log``
    is called with the line of each finished exchange.  ``sockets`` are listening already and used in place
    of ports; their names are those of ``addresses``.
    """

    def __init__(
        self,
        options: Options | None = None,
        access_log: Callable[[str], None] | None = None,
        sockets: Mapping[str, socket.socket] | None = None,
    ) -> None:
        self.options = options = options or Options()
        self.loop = EventLoop()
        self.claims = Claims(options)
        self.policy: Policy[Exchange, Slot] = Policy(
            options.max_queue,
            no_worker_s=options.no_worker_timeout,
            is_fair=self.claims.is_fair,
            origins=[origin for _, origin in self.claims.routes],
        )
        self.claims.pools = self.policy.pools
        self.exchanges: set[Exchange] = set()
        self.slots: set[Slot] = set()
        # Consumers whose next request, or the one that they have sent, no slot has been given yet.
        self.needy: set[Consumer] = set()
        self.budget = SpoolBudget(options.memory_budget, options.disk_budget, self._may_open_file)
        self.upload_bytes = 0  # of memory that requests take whose bodies are coming, beside the bodies
        self.draining = False
        # Requests that still come are refused.  Not if another hub takes over: those who have a connection
        # here are served once more, and told to close it.
        self.refuses = False
        self.keep_alive_s = options.keep_alive  # of an idle consumer's connection
        self.notify: Callable[[str], None] = _ignore  # called with what a service manager wants to know
        self.paused = False  # nothing is handed to a slot
        self.permits: Mapping[str, Permit] | None = None
        self.certificate: Certificate | None = None
        self.id = os.urandom(8).hex()  # so that workers know two addresses of one hub
        # Workers that claim requests, by their id: their slots, and how many connections they have.
        self.processes: dict[str, list[int]] = {}
        self.total_slots = 0  # one for each connection; of workers that claim requests, what they announce
        # Those who have not shown who they are, the oldest first.
        self.newcomers: dict[Handshaking | Applicant, None] = {}
        self._complained: dict[tuple[str, str], tuple[float, int]] = {}  # of what: when, and how often since
        self.counters = Counters()
        self.history = History(self.loop.now)
        self.rate = Rate(self.loop.now)
        self.forwarding = Forwarding(options)
        self.access_log = access_log
        self._format = _json_line if options.log_format == "json" else _text_line
        self._descriptor_limit = limit = descriptor_limit()
        self._descriptor_reserve = min(LIMITS.reserved_descriptors, limit // 4)
        self._disk_full_at = -math.inf
        self._queue_timer = Timer(self._expire)
        self._leave_timer = Timer(self._leave)
        self._drain_timer = Timer(self.loop.stop)
        self._lonely_timer = Timer(self._tell_of_loneliness)
        self._is_lonely = False  # as has been told
        self.token_digest: str | None = None  # of the token that the admin port wants, if it wants one
        self.started = self.loop.now
        self.at_end: list[Callable[[], None]] = []  # called between the end of the work and that of the ports
        self._expiry_timer = Timer(self._watch_expiry)
        begin: dict[str, Callable[[Stream], object]] = {
            "consumers": functools.partial(Consumer, self), "workers": self.enlist,
            "admin": functools.partial(Admin, self), "ptth": functools.partial(Applicant, self),
        }  # fmt: skip
        accept = {name: functools.partial(self._accept, name, begin[name]) for name in begin}
        try:
            options.check_together()
            # Who may be a worker, by credentials; without a file, anybody.
            self.permits = None if options.workers_file is None else load_permits(options.workers_file)
            self.certificate = None if options.certfile is None else Certificate(options)
            self.token_digest = read_token(options)
            self.ports = Ports(self.loop, options, sockets or {}, accept, self._may_accept)
        except (OSError, ValueError):
            self.loop.close()
            for sock in (sockets or {}).values():
                sock.close()
            raise
        self.addresses: dict[str, str | None] = dict.fromkeys(accept)  # each host:port, None: no such port
        self.addresses |= {name: listener.address for name, listener in self.ports.listeners.items()}
        self.loop.before_sleep += [self.dispatch, self._note]
        if self.certificate is not None:
            self._watch_expiry()

    # .. connections ..

    def _may_accept(self) -> bool:
        """Whether there is room for another connection of somebody who may be anybody."""
        return self._free_descriptors() > self._descriptor_reserve

    def _may_open_file(self) -> bool:
        return self._free_descriptors() > self._descriptor_reserve // 2

    def _free_descriptors(self) -> int:
        return self._descriptor_limit - len(self.loop.watched) - self.budget.files

    def _accept(
        self, port: str, begin: Callable[[Stream], object], sock: socket.socket, address: str
    ) -> None:
        if PORT_OPTIONS[port].removesuffix("-port") in self.options.tls_ports:
            Handshaking(self, port, sock, address, begin)
        else:
            begin(self.new_stream(address, Transport(sock)))

    def new_stream(self, address: str, transport: Transport) -> Stream:
        stream = Stream(self.loop, transport, address, self._new_outbuf)
        self.loop.add(stream)
        return stream

    def greet(self, newcomer: Handshaking | Applicant) -> None:
        """Counts a connection of which nothing is known yet; of too many the oldest goes."""
        self.newcomers[newcomer] = None
        if len(self.newcomers) > min(LIMITS.newcomers, self._descriptor_limit // 4):
            next(iter(self.newcomers)).leave()

    def enlist(self, stream: Stream, registration: Registration = UNREGISTERED) -> None:
        """Has a stream wait as a slot."""
        slot = Slot(self, stream, registration)
        self.count_connection(registration, 1)
        self.slots.add(slot)
        self.policy.park(slot)
        self._is_lonely = False
        if slot.name:
            log.debug("worker %s joined from %s for %s", slot.name, stream.address, registration.serves())

    def hold(self, slot: Slot, received: Inbuf) -> None:
        """The worker keeps the connection, but is to be sent nothing before another handshake on it."""
        stream = slot.stream
        # What has not been sent could not be taken back.
        if stream.closed or stream.outbuf is not None or not slot.is_welcome:
            self._forget(slot)
            return
        words = received.take(len(received))
        Applicant(self, stream, slot, words)
        if words:
            stream.take_rest_later()  # once the request that was turned away is back in the queue

    def count_connection(self, registration: Registration, change: int) -> None:
        """Counts a connection of a worker more or less, or one that has told its slots once more."""
        if not registration.process:
            self.total_slots += change
            return
        process = self.processes.setdefault(registration.process, [0, 0])
        if change >= 0:
            self.total_slots += registration.slots - process[0]
            process[0] = registration.slots  # as it says now
        process[1] += change
        if not process[1]:
            self.total_slots -= process[0]
            del self.processes[registration.process]

    def has_heard(self, process: str, since: float) -> bool:
        """Whether a worker's machine has said something since then, if only that it has got something."""
        return any(
            self.loop.now - each.stream.transport.silent_s() >= since
            for each in self.slots
            if each.registration.process == process and not each.stream.closed
        )

    def drop_process(self, process: str) -> None:
        """Closes what waits of a worker whose machine does not answer: its other slots are no better."""
        for slot in [each for each in self.slots if each.registration.process == process]:
            if slot.is_waiting:
                self.on_worker_left(slot)

    def claim_fields(self) -> bytes:
        """Returns what the 101 tells a worker that claims requests."""
        return b"Pothead-Claim: 102\r\nPothead-Hub: %b\r\n%b" % (self.id.encode(), self.waiting_field())

    def waiting_field(self) -> bytes:
        """Returns the field that tells how many requests wait, if any does that a slot could have."""
        waiting = 0 if self.paused else self.policy.waiting
        oldest_s = self.policy.oldest_wait(self.loop.now) if waiting else 0
        return b"Pothead-Waiting: %d; oldest=%.3f\r\n" % (waiting, oldest_s) if waiting else b""

    @property
    def needs_no_workers(self) -> bool:
        """Whether this hub is about to end, and nothing waits that a new slot could serve."""
        return self.refuses and not self.policy.waiting

    def complain(self, port: str, address: str, what: str) -> None:
        """Warns of a connection that was turned away: of each kind once in a while, whoever may call."""
        kind, now = (port, what.partition(":")[0]), self.loop.now
        told_at, more = self._complained.get(kind, (-math.inf, 0))
        if now - told_at < LIMITS.complaint_s:
            self._complained[kind] = told_at, more + 1
            return
        self._complained[kind] = now, 0
        others = f" (and {more} others since the last such line)" if more else ""
        log.warning("%s: %s%s", address, what, others)

    def new_spool(self) -> Spool:
        """Returns an empty spool for the body of a request, which is kept if it may be needed again."""
        options, keep = self.options, not self.options.stream_requests
        return Spool(self.budget, options.spool_memory, options.spool_dir, keep, options.spool_memory)

    def _new_outbuf(self) -> Spool:
        """Returns an empty spool for what a peer has not taken yet: one piece stays in memory."""
        memory_limit = max(LIMITS.receive_bytes + 1 * KIB, self.options.spool_memory)
        options = self.options
        return Spool(self.budget, memory_limit, options.spool_dir, file_limit=options.response_spool)

    # .. pairing ..

    def join(self, name: str, origins: frozenset[str]) -> Offer[Slot]:
        """Counts a new slot of a machine, which serves these origins, and returns what it is part of."""
        if origins and not self.claims.uses_pools:
            self.claims.uses_pools = True
            for exchange in self.exchanges:  # they came when nobody asked for their pool
                if exchange.ticket is not None:
                    claim = self.claims.of(exchange)
                    exchange.claim = claim
                    exchange.ticket.origin = "" if claim is None else claim.origin
        return self.policy.join(name, origins)

    def dispatch(self) -> None:
        """Hands requests to waiting slots; the only place where the two meet."""
        policy = self.policy
        policy.wake(self.loop.now)
        if policy.is_fair:
            policy.typical_s = self.counters.mean_service_s or policy.typical_s
        while policy.waiting and policy.idle and not self.paused and (pair := policy.next_pair()):
            self._pair(*pair)
        timer, event = self._queue_timer, policy.next_event()
        if event < timer.deadline:
            self.loop.touch(timer)  # which need not know at once of a later one
        timer.deadline = event
        if policy.waiting and not self.total_slots and self._lonely_timer.deadline == math.inf:
            self.loop.set_deadline(self._lonely_timer, LIMITS.lonely_s)

    def _tell_of_loneliness(self) -> None:
        """Warns, once an episode, that requests wait and no worker is there."""
        if self.policy.waiting and not self.total_slots and not self._is_lonely:
            self._is_lonely = True
            log.warning("requests wait, and no worker is connected: %d", self.policy.waiting)

    def _pair(self, ticket: Ticket[Exchange], slot: Slot) -> None:
        exchange, consumer = ticket.item, ticket.item.consumer
        if slot.stream.transport.has_news():  # it has left, or spoken: it will be told which
            self.loop.touch(slot.stream)
            self.policy.release(slot, self.loop.now)
            self.policy.put_back(ticket, 0)
        elif consumer.stream.transport.has_hung_up():
            self.policy.release(slot, self.loop.now, park=True)
            self.loop.deliver(consumer.stream, functools.partial(consumer.on_hangup, reset=False))
        else:
            self.needy.discard(consumer)
            self.loop.deliver(slot.stream, exchange.start, slot)

    def has_room_for_upload(self, head_bytes: int) -> bool:
        """Whether another request may send its body: those who do are not in the queue, but take memory."""
        return self.upload_bytes + head_bytes + LIMITS.upload_bytes <= LIMITS.uploads_bytes

    def has_room(self) -> bool:
        """Whether the queue takes another request; those that a slot waits for do not count."""
        if not self.policy.is_full:
            return True
        if self.policy.idle:
            self.dispatch()
        return not self.policy.is_full

    def make_room(self, tenant: str) -> bool:
        """Makes room for a request of this tenant in a full queue, if need be at another tenant's expense.

        The newest request of the tenant with the most has to go, if this one has fewer.
        """
        if self.has_room():
            return True
        victim = self.policy.evicted_by(tenant)
        if victim is None:
            return False
        exchange, detail = victim.item, "it made room for a tenant with fewer requests"
        self.loop.deliver(exchange.consumer.stream, exchange.finish, Outcome.QUEUE_FULL, detail)
        return not self.policy.is_full

    def estimate_start_s(self, claim: Claim) -> float:
        """Returns in how many seconds a request may hope to be started, at best; 0 if nothing tells."""
        pool = self.policy.pool_of(claim.origin)
        slots, ahead = self.policy.slots_of(pool), self.policy.count_ahead(claim)
        if slots and self.processes:
            slots = max(slots, self.total_slots)  # not all of them are offered here at once
        is_served_at_once = not ahead and self.policy.idle_of(pool)
        if not slots or is_served_at_once or self.counters.served < LIMITS.served_to_estimate:
            return 0.0
        return (ahead + 1) * self.counters.mean_service_s / slots

    def _expire(self) -> None:
        self.dispatch()  # after a standstill: slots that became free in time come first
        for exchange in self.policy.expire(self.loop.now):
            detail = self._describe_timeout(exchange)
            self.loop.deliver(exchange.consumer.stream, exchange.finish, Outcome.QUEUE_TIMEOUT, detail)

    def _describe_timeout(self, exchange: Exchange) -> str:
        """Returns what there is to say of a request that has waited in vain."""
        ticket = exchange.ticket
        if not self.total_slots:
            return "no worker is connected"
        if ticket is not None and not self.policy.slots_of(ticket.line.pool):
            return f"no worker serves {ticket.origin}" if ticket.origin else "no worker serves this host"
        if exchange.wait_s is not None and exchange.wait_s < self.options.queue_timeout:
            return f"the consumer would wait for {exchange.wait_s:g} s"
        return ""

    def release(self, slot: Slot, *, reusable: bool) -> None:
        """The slot is not running any more: it waits again, or its connection is closed."""
        reusable = reusable and slot.is_welcome and not slot.stream.closed
        self.policy.release(slot, self.loop.now, park=reusable)
        if not reusable:
            self._forget(slot)

    def on_worker_left(self, slot: Slot) -> None:
        """A waiting slot has hung up: its offer is withdrawn."""
        self.policy.remove(slot)
        self._forget(slot)

    def _forget(self, slot: Slot) -> None:
        self.strike_off(slot)
        slot.stream.close()

    def strike_off(self, slot: Slot) -> None:
        """Counts a slot less; it neither waits nor runs."""
        if slot in self.slots:
            self.slots.remove(slot)
            self.count_connection(slot.registration, -1)
            self.policy.leave(slot.offer, self.loop.now)

    def on_breach(self, slot: Slot) -> None:
        """A waiting slot has spoken without being asked."""
        address = slot.stream.address
        log.warning("worker %s sent bytes while it waited; closed (consumers come to the main port)", address)
        self.counters.breaches += 1
        slot.on_hangup(reset=False)

    def retry_after_s(self, ticket: Ticket[Exchange] | None = None, *, has_waited: bool = False) -> int:
        """Returns after how many seconds a refused consumer may hope for a place, in its pool if it has one.

        One that has waited in vain is not told to be back in a moment, whatever the estimate.
        """
        slots, waiting = self.policy.idle + self.policy.running, self.policy.waiting
        if ticket is not None and self.claims.uses_pools:
            slots, waiting = self.policy.slots_of(ticket.line.pool), ticket.line.pool.waiting
        if self.processes:  # their slots serve other hubs, too: what this one gets is what it has got
            rate = self.rate.read(self.loop.now)
            estimate_s = max(1, math.ceil(waiting / rate)) if rate else None
        else:
            estimate_s = wait_estimate(waiting, slots, self.counters.mean_service_s)
        if estimate_s is None or has_waited:
            return max(estimate_s or 0, math.ceil(self.options.retry_after))
        return estimate_s

    # .. what exchanges ask and report ..

    def on_disk_error(self, error: OSError) -> None:
        """A spool's file could not be written; warns, at most once a minute."""
        if self.loop.now - self._disk_full_at > 60:
            log.warning("cannot spool to a file: %s; refusing bodies that need one", error)
            self._disk_full_at = self.loop.now

    def _note(self) -> None:
        """Keeps the plot of the status page; a step of the loop, so that an idle hub need not wake for it."""
        self.history.note(self.loop.now, (self.policy.waiting, self.policy.running, self.total_slots))

    def on_finished(self, exchange: Exchange) -> None:
        """Counts and logs."""
        self.exchanges.discard(exchange)
        self.counters.on_finished(exchange)
        self.rate.count(self.loop.now)
        if self.access_log is not None:
            self.access_log(self._format(exchange, time.time(), self.loop.now))

    # .. living and dying ..

    def run(self) -> int:
        """Serves until it is drained or stopped; returns 1 if work was cut off, else 0."""
        try:
            self.loop.run()
            if not self.draining:
                self.notify("STOPPING=1\nSTATUS=stopping at once")
            self.draining, self.refuses = True, not self.ports.has_successor  # as the last answers shall say
            unfinished = list(self.exchanges)
            for exchange in unfinished:
                self.loop.deliver(exchange.consumer.stream, exchange.finish, Outcome.DRAINING)
            for function in self.at_end:
                function()
        finally:
            self.loop.close()
        return 1 if unfinished else 0

    # Orders.  They are safe from any thread, and carried out before the loop sleeps next.

    def drain(self) -> None:
        """Takes no more requests, finishes those it has, then ends ``run``."""
        self.loop.call_from_thread(self._drain)

    def stop(self) -> None:
        """Ends ``run`` at once."""
        self.loop.call_from_thread(self.loop.stop)

    def pause(self) -> None:
        """Hands no more requests to slots, which queue then; those that run go on.  Not while it drains."""
        self.loop.call_from_thread(lambda: self._set_paused(not self.draining))

    def resume(self) -> None:
        """Ends a pause."""
        self.loop.call_from_thread(lambda: self._set_paused(False))

    def cancel(self, request_id: str) -> None:
        """Ends all requests with that id, waiting or running."""
        self.loop.call_from_thread(lambda: self._cancel(request_id))

    def reload(self) -> None:
        """Reads again what is in files.  What cannot be used is told in the log, and stays as it was."""
        self.loop.call_from_thread(self._reload)

    # How they are carried out.

    def _set_paused(self, paused: bool) -> None:
        if paused != self.paused:
            self.paused = paused
            log.warning("paused: requests wait until it is resumed" if paused else "resumed")

    def _reload(self) -> None:
        options = self.options
        steps = (
            (options.certfile, self._reload_certificate),
            (options.workers_file, self._reload_permits),
            (options.admin_token_file, self._reload_token),
        )
        for file, step in steps:
            if file is not None:
                try:
                    step()
                except ValueError as exc:
                    log.error("%s; the old one stays", exc)
                else:
                    log.info("%s has been read again", file)

    def _reload_certificate(self) -> None:
        self.certificate = Certificate(self.options)
        self._watch_expiry()

    def _reload_token(self) -> None:
        self.token_digest = read_token(self.options)

    def _reload_permits(self) -> None:
        assert self.options.workers_file is not None
        self.permits = load_permits(self.options.workers_file)
        for slot in list(self.slots):
            slot.is_welcome = self._is_permitted(slot.registration)
            if not slot.is_welcome and slot.is_waiting:
                self.on_worker_left(slot)
        for watched in list(self.loop.watched):  # those that are about to be slots
            role = watched.role if isinstance(watched, Stream) else None
            if isinstance(role, Rehearsal) and not self._is_permitted(role.registration):
                role.on_hangup(reset=False)

    def _is_permitted(self, registration: Registration) -> bool:
        """Whether a slot may go on with what it has joined with; the silent worker port asks for nothing."""
        if registration.permit is None or self.permits is None:
            return True
        permit = self.permits.get(registration.permit.credential)
        if permit is None or permit.name != registration.permit.name:
            return False
        return not permit.origins or bool(registration.origins and registration.origins <= permit.origins)

    def is_as_before(self, slot: Slot) -> bool:
        """Whether the workers file says what it said when the worker joined."""
        permit = slot.registration.permit
        return permit is None or self.permits is None or self.permits.get(permit.credential) == permit

    def _watch_expiry(self) -> None:
        """Warns, once a day, of a certificate that is about to expire."""
        assert self.certificate is not None
        left_s = self.certificate.expires_at - time.time()
        if left_s <= 0:
            log.error("the certificate has expired: nobody who checks it connects any more")
        elif left_s < LIMITS.expiry_warning_s:
            log.warning("the certificate expires in %d days", left_s // 86400)
        self.loop.set_deadline(self._expiry_timer, LIMITS.expiry_check_s)

    def find(self, request_id: str) -> list[Exchange]:
        """Returns the requests with that id, which consumers may choose."""
        wanted = request_id.encode()
        return [each for each in self.exchanges if each.request_id == wanted]

    def _cancel(self, request_id: str) -> None:
        for exchange in self.find(request_id):
            log.warning("%s: cancelled by an operator", request_id)
            self.loop.deliver(exchange.consumer.stream, exchange.finish, Outcome.CANCELLED)

    def _drain(self) -> None:
        if self.draining:
            return
        self._set_paused(False)  # what waits is to be finished, too
        self.draining = True  # so /readyz says, and each response that its connection is not kept
        if not (delay_s := self.options.drain_delay):
            self._leave()
            return
        # Whoever deals out consumers has to see that first: what it sends until then would be refused.
        log.info("not ready any more: serving on for %g s, then draining", delay_s)
        self.notify(f"STOPPING=1\nSTATUS=not ready any more: serving on for {delay_s:g} s")
        self.loop.set_deadline(self._leave_timer, delay_s)

    def _leave(self) -> None:
        """Takes no more consumers, and ends when those who are here have what they came for."""
        self.refuses = not self.ports.has_successor
        self.keep_alive_s = min(self.keep_alive_s, LIMITS.handover_s)
        self.loop.before_sleep += [self._let_spare_slots_go, self._end_drain]
        self.ports.leave()
        for consumer in list(self.needy):
            consumer.on_drain()
        self.loop.set_deadline(self._drain_timer, self.options.graceful_timeout)
        # Not before: who has read it may count on new connections going elsewhere.
        log.info("draining: %d requests to finish", len(self.exchanges))
        self.notify(f"STOPPING=1\nSTATUS=draining: {len(self.exchanges)} requests to finish")

    def _let_spare_slots_go(self) -> None:
        """Lets waiting slots go to the hub that takes over, save as many as are needed here to the end."""
        needed = self.policy.waiting or len(self.needy) + self._consumers_at_hand()
        starves = self.policy.waiting and self.claims.uses_pools  # what is idle serves other pools
        if not self.ports.leave_workers(self.policy.idle >= needed and not starves):
            return
        while self.policy.idle > needed and (slot := self.policy.take_spare(needed)):
            self.release(slot, reusable=False)

    def _end_drain(self) -> None:
        if self.exchanges or self._has_unsent_bytes():
            return
        if not self.ports.has_successor or not (self.needy or self._expects_consumers):
            self.loop.stop()

    @property
    def _expects_consumers(self) -> bool:
        """Whether some are connecting here still, and would lose their connection."""
        return self.ports.is_leaving or self._consumers_at_hand() > 0

    def _consumers_at_hand(self) -> int:
        """Returns how many are in the middle of TLS's handshake: what they want, they will say here."""
        return sum(isinstance(each, Handshaking) and each.port == "consumers" for each in self.newcomers)

    def _has_unsent_bytes(self) -> bool:
        """Whether answers are still on their way: without an exchange, no spool holds anything else."""
        return bool(self.budget.memory_used or self.budget.disk_used)

    def stats(self) -> dict[str, object]:
        """Returns what goes on, ready for JSON; durations in seconds."""
        return describe_hub(self)


class Counters:
    """What has happened since the start.

    The metrics are made of these when somebody asks; what an exchange pays is one call of
    ``on_finished``.
    """

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.requests: dict[tuple[bytes, int, Outcome], int] = {}  # (method, status, outcome) -> how many
        self.worker_errors: Counter[int] = Counter()  # of what workers answered, by status from 500 on
        self.requeues = 0
        self.turned_away = 0  # requests that were offered to a slot which was not free any more
        self.breaches = 0
        self.refused_workers: Counter[int] = Counter()  # by status
        self.by_worker: Counter[str] = Counter()  # requests that workers with a name were given, by that
        self.bytes_in = 0
        self.bytes_out = 0
        self.served = 0  # whole responses
        self.mean_service_s = 0.0  # moving, over about the last 50
        self.queued = Durations()  # of exchanges that have left the queue, for whatever reason
        self.worked = Durations()  # of the last attempt, whether it ended well or not
        # By outcome, so that the many consumers who leave do not push out the one worker that was lost.
        self._failures: dict[Outcome, deque[tuple[int, dict[str, object]]]] = {
            outcome: deque(maxlen=LIMITS.listed_failures) for outcome in Outcome
        }
        self._numbers = itertools.count()

    def on_served(self, worker_s: float) -> None:
        self.served += 1
        self.mean_service_s += (worker_s - self.mean_service_s) / min(self.served, 50)

    def on_finished(self, exchange: Exchange) -> None:
        outcome, method = exchange.outcome, exchange.head.method
        assert outcome is not None
        self.outcomes[outcome] += 1
        label = (method if method in COUNTED_METHODS else b"other", exchange.status, outcome)
        self.requests[label] = self.requests.get(label, 0) + 1
        self.bytes_in += exchange.bytes_in
        self.bytes_out += exchange.bytes_out
        if exchange.attempts or exchange.queued_s:
            self.queued.add(exchange.queued_s)
        if exchange.attempts:
            self.worked.add(exchange.worker_s)
        if exchange.worker_name:
            self.by_worker[exchange.worker_name] += 1
        if outcome is not Outcome.COMPLETED:
            self._note_failure(exchange, outcome)
        elif exchange.status >= 500:
            self.worker_errors[exchange.status] += 1
            self._note_failure(exchange, outcome)

    def _note_failure(self, exchange: Exchange, outcome: Outcome) -> None:
        self._failures[outcome].append((next(self._numbers), describe_failure(exchange, outcome)))

    def last_failures(self) -> list[dict[str, object]]:
        """Returns those that are kept, the newest first."""
        return [row for _, row in sorted(itertools.chain(*self._failures.values()), reverse=True)]


# Any other is a word that a consumer chose, and no label.
COUNTED_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))


class Durations:
    """How long something took: all since the start in buckets, and the last ones as they were."""

    # Upper bounds of the buckets, in seconds; what took longer than the last is in one more bucket.
    BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.sum_s = 0.0
        self._last: deque[float] = deque(maxlen=LIMITS.timed_exchanges)

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum_s += seconds
        self._last.append(seconds)

    def summary(self) -> dict[str, object]:
        """Returns median and 99th percentile of the last ones (``None`` without any), and their number."""
        ordered = sorted(self._last)
        last = len(ordered) - 1
        median, p99 = (round(ordered[round(last * q)], 6) if ordered else None for q in (0.5, 0.99))
        return {"median": median, "p99": p99, "of_last": len(ordered)}


Levels = tuple[int, int, int]  # requests that wait, slots that are busy, slots


class History:
    """The levels of the last ten minutes, in steps of some seconds: the peak of each step.

    It is told of changes and does not look by itself, so that an idle hub sleeps on.  A step without a row
    is as the row before it ended.
    """

    def __init__(self, now: float) -> None:
        self._level: Levels = (0, 0, 0)
        self._peak = self._level  # of the step under way
        self._step = int(now / LIMITS.history_step_s)
        self._rows: deque[tuple[int, Levels, Levels]] = deque(maxlen=LIMITS.history_steps)  # step, peak, end

    def note(self, now: float, level: Levels) -> None:
        """The levels are these now."""
        if level == self._level:
            return
        step = int(now / LIMITS.history_step_s)
        if step != self._step:
            self._rows.append((self._step, self._peak, self._level))
            self._step, self._peak = step, self._level
        self._level = level
        waiting, busy, slots = self._peak
        if level[0] > waiting or level[1] > busy or level[2] > slots:
            self._peak = max(level[0], waiting), max(level[1], busy), max(level[2], slots)

    def read(self, now: float) -> list[Levels]:
        """Returns the peaks since the start, oldest first, the step that is under way last."""
        end = int(now / LIMITS.history_step_s) + 1
        start = end - LIMITS.history_steps
        rows = [*self._rows, (self._step, self._peak, self._level)]
        peaks: list[Levels] = []
        for (step, peak, level), after in itertools.zip_longest(rows, (row[0] for row in rows[1:])):
            if step >= start:
                peaks.append(peak)
            peaks += [level] * ((end if after is None else after) - max(step + 1, start))
        return peaks


class Rate:
    """How many a second, over about the last minute."""

    def __init__(self, now: float) -> None:
        self._started = now
        self._steps: deque[list[int]] = deque(maxlen=LIMITS.rate_steps + 1)  # step, count

    def count(self, now: float) -> None:
        """One more."""
        step = int(now / LIMITS.history_step_s)
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append([step, 0])
        self._steps[-1][1] += 1

    def read(self, now: float) -> float:
        """Returns the rate; that of the first seconds is too low rather than wild."""
        first = int(now / LIMITS.history_step_s) - LIMITS.rate_steps
        begun = max(self._started, first * LIMITS.history_step_s)
        counted = sum(count for step, count in self._steps if step >= first)
        return counted / max(now - begun, LIMITS.history_step_s)


def _always() -> bool:
    return True


def _ignore(text: str) -> None: ...


def _do_nothing() -> None: ...


PORT_OPTIONS: Final = {
    "consumers": "main-port", "workers": "worker-port", "admin": "admin-port", "ptth": "ptth-port"
}  # fmt: skip


def _bind(what: str, host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """Returns a bound socket; raises ``OSError`` that names what it was for."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or "no valid host name"
        in_use = isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
        if in_use and reuse_port:
            reason += " (to share it, the hub there needs --reuse-port too, and the same user)"
        elif in_use:
            reason += f"; for another port there is --{PORT_OPTIONS[what]}"
        raise OSError(f"cannot listen for {what} on {host}:{port}: {reason}") from exc
    return sock


def _prefer_newer(sock: socket.socket, prefer: bool) -> None:
    """Has the kernel give new connections not to this socket but to the next one on the port (Linux).

    With SO_REUSEPORT it deals them out among all sockets until one closes, and resets what that one had not
    accepted.  A classic BPF program that returns the number 1 chooses the second oldest socket; if there is
    none, all are dealt out as before.  The program belongs to the port and outlives this hub, so the next
    one to start gets the new connections as soon as it listens.
    """
    # struct sock_filter {code, jt, jf, k}: BPF_RET | BPF_K, 1; struct sock_fprog {len, *filter}
    program = array.array("B", struct.pack("=HBBI", 0x06, 0, 0, 1))
    attach, detach = 51, 68  # SO_ATTACH_REUSEPORT_CBPF, SO_DETACH_REUSEPORT_BPF: unknown to the socket module
    try:
        if sys.platform == "linux" and prefer:
            sock.setsockopt(socket.SOL_SOCKET, attach, struct.pack("HP", 1, program.buffer_info()[0]))
        elif sys.platform == "linux":
            sock.setsockopt(socket.SOL_SOCKET, detach, 0)
    except OSError as exc:  # then a few connections may be reset when this hub's socket closes
        log.debug("new connections are still dealt out among all hubs on the port: %s", exc)


def refuse_open_port(what: str, sock: socket.socket, options: Options) -> None:
    """Raises ``ValueError`` if the socket would let anybody on the network have consumers' requests."""
    host = sock.getsockname()[0]
    if what not in ("workers", "ptth") or ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return
    if what == "ptth" and options.workers_file is not None:
        if "ptth" not in options.tls_ports:
            raise ValueError(
                f"the PTTH port on {host} can be reached from other machines, and without TLS the tokens "
                "of workers would cross the network for all to see; add --certfile, or use a loopback address"
            )
    elif not options.allow_anonymous_workers:
        remedy = "say with --workers-file who may" if what == "ptth" else "let workers use --ptth-port"
        raise ValueError(
            f"the {what.removesuffix('s').replace('ptth', 'PTTH')} port on {host} can be reached from other "
            f"machines, and whoever connects there is sent consumers' requests; {remedy}, use a loopback "
            "address, or protect the port by a firewall and say --allow-anonymous-workers"
        )


def _tune(sock: socket.socket) -> None:
    """Makes a stream prompt, and its peer's death noticeable, as far as the platform knows how."""
    sock.setblocking(False)
    wanted = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", LIMITS.keepalive_idle_s),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", LIMITS.keepalive_interval_s),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", LIMITS.keepalive_probes),
    ]
    for level, name, value in wanted:
        if hasattr(socket, name):
            with contextlib.suppress(OSError):  # the peer is gone already: reading will tell
                sock.setsockopt(level, getattr(socket, name), value)


def address_text(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Returns ``host:port``, an IPv6 host in brackets; IPv4 that came through an IPv6 socket is IPv4."""
    host, port = address[:2]
    host = host.removeprefix("::ffff:") if "." in host else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """Returns the host of a ``host:port``, without brackets and zone."""
    return address.rpartition(":")[0].strip("[]").partition("%")[0]


def descriptor_limit() -> int:
    """Raises the limit of open files as far as it may be and returns it: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


# .. the access log ..


def _text_line(exchange: Exchange, wall_s: float, now: float) -> str:
    """One line of ``name=value`` pairs; the path goes without its query."""
    head, outcome = exchange.head, exchange.outcome
    assert outcome is not None
    detail = f" detail={json.dumps(exchange.detail)}" if exchange.detail else ""
    name = f" worker_name={exchange.worker_name}" if exchange.worker_name else ""
    order = ""
    if exchange.claim is not None:
        order = "".join([f" {name}={_log_word(value)}" for name, value in exchange.describe_order().items()])
    return (
        f"{timestamp(wall_s)} id={exchange.request_id.decode()} consumer={exchange.consumer.stream.address}"
        f" method={head.method.decode()} path={head.path.decode()} status={exchange.status}"
        f" bytes_in={exchange.bytes_in} bytes_out={exchange.bytes_out}"
        f" queued_ms={exchange.queued_s * 1000:.1f} worker_ms={exchange.worker_s * 1000:.1f}"
        f" total_ms={(now - exchange.received_at) * 1000:.1f} worker={exchange.slot_address}{name}"
        f" attempts={exchange.attempts}{order} code={outcome.code}{detail}\n"
    )


def _log_word(value: str | int) -> str:
    """Returns a value as it is, or as a string if it is more than a word."""
    text = str(value)
    return text if re.fullmatch(r"[!#-~]+", text) else json.dumps(text)


def _json_line(exchange: Exchange, wall_s: float, now: float) -> str:
    """The same as an object of JSON."""
    head, outcome = exchange.head, exchange.outcome
    assert outcome is not None
    fields = {
        "time": timestamp(wall_s),
        "id": exchange.request_id.decode(),
        "consumer": exchange.consumer.stream.address,
        "method": head.method.decode(),
        "path": head.path.decode(),
        "status": exchange.status,
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
        "queued_ms": round(exchange.queued_s * 1000, 1),
        "worker_ms": round(exchange.worker_s * 1000, 1),
        "total_ms": round((now - exchange.received_at) * 1000, 1),
        "worker": exchange.slot_address,
        "attempts": exchange.attempts,
        **exchange.describe_order(),
        "code": outcome.code,
    }
    if exchange.worker_name:
        fields["worker_name"] = exchange.worker_name
    if exchange.detail:
        fields["detail"] = exchange.detail
    return json.dumps(fields) + "\n"


def timestamp(epoch_s: float) -> str:
    """Returns the time in UTC, with milliseconds (RFC 3339)."""
    return _timestamp(int(epoch_s * 1000))


@functools.lru_cache(maxsize=4)  # under load, many lines share their millisecond
def _timestamp(epoch_ms: int) -> str:
    epoch_s, milliseconds = divmod(epoch_ms, 1000)
    return f"{_second(epoch_s)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=4)
def _second(epoch_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch_s))


# ---- The admin port ---------------------------------------------------------------------------------------
#
# Whoever can open a page in the operator's browser can make that browser send requests here.  So: what is
# asked for by a name that nobody has allowed is refused (DNS rebinding), what changes anything needs a field
# that no form of another site can send, and no answer may be framed.  Who reaches the port may do all that;
# with a token (RFC 6750) only who has it.

ADMIN_FIELDS: Final[Sequence[Field]] = (
    (b"Cache-Control", b"no-store"),
    (b"X-Content-Type-Options", b"nosniff"),
    (b"Referrer-Policy", b"no-referrer"),
    (b"Cross-Origin-Resource-Policy", b"same-origin"),
)
ACTION_FIELD: Final = b"pothead-action"  # "yes"
TEXT: Final = "text/plain; charset=utf-8"
TOKEN_USES: Final = ("orders", "all")
# Not even with a token for all: probes have none, and the page, which tells nothing by itself, asks for it.
FREE_PAGES: Final = (b"/", b"/livez", b"/readyz")


class Answer(NamedTuple):
    """What the admin port answers."""

    status: int
    body: bytes
    content_type: str = TEXT
    fields: Sequence[Field] = ()


def answer_admin(hub: Hub, head: RequestHead) -> Answer:
    """Answers a request on the admin port, and does what it asks for."""
    if not _may_be_called(hub.options, head.host):
        return Answer(421, b"this name is not among --admin-allowed-hosts: %b\n" % (head.host or b""))
    page, action = PAGES.get(head.path), _action(head.path)
    if page is not None:
        if head.method not in (b"GET", b"HEAD"):
            return Answer(405, b"GET or HEAD\n", fields=[(b"Allow", b"GET, HEAD")])
        is_free = hub.options.admin_token_for != "all" or head.path in FREE_PAGES
        return page(hub) if is_free else _ask_for_token(hub, head) or page(hub)
    if action is None:
        return Answer(404, b"here are: %b\n" % b" ".join([*PAGES, *ACTIONS, b"/requests/ID/cancel"]))
    if head.method != b"POST":
        return Answer(405, b"POST\n", fields=[(b"Allow", b"POST")])
    if not _is_meant(head):
        return Answer(403, b"this needs the field Pothead-Action: yes\n")
    return _ask_for_token(hub, head) or action(hub)


def _may_be_called(options: Options, host: bytes | None) -> bool:
    """Whether the admin port may be asked for by that ``Host``; no browser leaves it out."""
    name = re.sub(r":[0-9]*$", "", (host or b"").decode()).rstrip(".").lower()
    told = (options.admin_host, *options.admin_allowed_hosts)
    if not name or name == "localhost" or name in (each.rstrip(".").lower() for each in told):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _is_meant(head: RequestHead) -> bool:
    """Whether the request comes from the status page or a program, and not from a page of another site."""
    site = head.known.get(b"sec-fetch-site", [b"none"])[-1].lower()
    return head.known.get(ACTION_FIELD, [b""])[-1].lower() == b"yes" and site in (b"none", b"same-origin")


def read_token(options: Options) -> str | None:
    """Returns the digest of the token that the admin port wants; ``None`` if it wants none.

    The token itself is not kept.  Raises ``ValueError`` with a sentence for the user.
    """
    path = options.admin_token_file
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(LIMITS.token_bytes + 1)
    except OSError as exc:
        raise ValueError(f"--admin-token-file cannot be read ({exc.strerror}): {path}") from exc
    token = content.strip()
    _check(token != b"", "admin_token_file", f"has nothing in it: {path}")
    if len(content) > LIMITS.token_bytes or not re.fullmatch(_TOKEN68, token):
        what = f"no token, which is up to {LIMITS.token_bytes} letters, digits and -._~+/ (= at the end)"
        raise ValueError(f"--admin-token-file holds {what}: {path}")
    return hashlib.sha256(token).hexdigest()


def _ask_for_token(hub: Hub, head: RequestHead) -> Answer | None:
    """Returns 401 unless the request has the token, or none is wanted (RFC 6750 §2.1 and §3)."""
    if hub.token_digest is None:
        return None
    if hmac.compare_digest(bearer_digest(head) or "", hub.token_digest):
        return None
    text = b"this needs the token of --admin-token-file: Authorization: Bearer TOKEN\n"
    return Answer(401, text, fields=[challenge(head)])


# .. what can be looked at ..


def _livez(hub: Hub) -> Answer:
    return Answer(200, b"ok\n")


def _readyz(hub: Hub) -> Answer:
    """Neither workers nor a pause matter: requests are taken, and wait."""
    return Answer(503, b"draining\n") if hub.draining else Answer(200, b"ok\n")


def _stats(hub: Hub) -> Answer:
    return Answer(200, readable_json(describe_hub(hub)).encode(), "application/json")


def readable_json(fields: Mapping[str, object]) -> str:
    """Returns JSON with a line for each field and for each row of a table; json's own layout costs more."""
    lines = []
    for name, value in fields.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n]"
        lines.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def describe_hub(hub: Hub) -> dict[str, object]:
    """Returns what goes on, for ``/stats``; durations in seconds, long tables cut."""
    now, counters = hub.loop.now, hub.counters
    workers = sorted((each for each in hub.slots if not each.is_held), key=lambda each: each.since)
    running = [each.exchange for each in workers if each.exchange is not None]
    running.sort(key=lambda each: each.received_at)
    return {
        "version": __version__,
        "uptime_seconds": round(now - hub.started, 3),
        "draining": hub.draining,
        "paused": hub.paused,
        "has_rival": hub.ports.has_rival,
        "certificate_expires_seconds": hub.certificate and round(hub.certificate.expires_at - time.time()),
        "queue_length": hub.policy.waiting,
        "max_queue": hub.options.max_queue,
        "queue_oldest_seconds": round(hub.policy.oldest_wait(now), 3),
        "requests_in_flight": len(running),
        "hub": hub.id,
        "slots": {"idle": max(0, hub.total_slots - hub.policy.running), "busy": hub.policy.running},
        "demand": hub.policy.waiting + len(running),
        "requests_per_second": round(hub.rate.read(now), 3),
        "mean_service_seconds": round(counters.mean_service_s, 6),
        "retry_after_seconds": hub.retry_after_s(),
        "queued_seconds": counters.queued.summary(),
        "worker_seconds": counters.worked.summary(),
        "spool_memory_bytes": hub.budget.memory_used,
        "memory_budget_bytes": hub.budget.memory_limit,
        "spool_disk_bytes": hub.budget.disk_used,
        "disk_budget_bytes": hub.budget.disk_limit,
        "worker_errors": dict(sorted(counters.worker_errors.items())),
        "requeues": counters.requeues,
        "turned_away": counters.turned_away,
        "breaches": counters.breaches,
        "bytes": {"in": counters.bytes_in, "out": counters.bytes_out},
        "outcomes": {outcome.code: count for outcome, count in counters.outcomes.items()},
        "waiting": describe_waiting(hub, now),
        "waiting_not_listed": max(0, hub.policy.waiting - LIMITS.listed_rows),
        "running": [each.describe(now) for each in running[: LIMITS.listed_rows]],
        "running_not_listed": max(0, len(running) - LIMITS.listed_rows),
        "machines": describe_machines(hub.policy, now),
        "machines_not_listed": max(0, len(hub.policy.machines) + len(hub.policy.gone) - LIMITS.listed_rows),
        "workers": [each.describe(now) for each in workers[: LIMITS.listed_rows]],
        "processes": describe_processes(hub),
        "workers_not_listed": max(0, len(workers) - LIMITS.listed_rows),
        "failures": counters.last_failures(),
        "history": describe_history(hub.history, now),
        **({"pools": describe_pools(hub.policy)} if hub.claims.uses_pools else {}),
        **({"tenants": describe_tenants(hub.policy, now)} if hub.claims.is_fair else {}),
    }


def describe_pools(policy: Policy[Exchange, Slot]) -> list[dict[str, object]]:
    """Returns what waits, and which slots serve it, by pool; the last are all that have no name."""
    return [
        {
            "pool": pool.name,
            "waiting": pool.waiting,
            "slots": policy.slots_of(pool),
            "idle": policy.idle_of(pool),
        }
        for pool in policy.all_pools()
    ]


def describe_tenants(policy: Policy[Exchange, Slot], now: float) -> list[dict[str, object]]:
    """Returns the tenants with the most worker time, and what that counts when it is decided who is next."""
    worked = policy.worker_times(now)
    first = heapq.nsmallest(LIMITS.listed_tenants, worked, key=lambda each: (-worked[each], each.number))
    return [
        {
            "tenant": tenant.name,
            "waiting": tenant.waiting,
            "running": tenant.running,
            "worker_seconds": round(worked[tenant], 3),
            "counts_seconds": round(policy.charge_of(tenant), 3),
        }
        for tenant in first
    ]


def describe_history(history: History, now: float) -> dict[str, object]:
    """Returns a list for each level, oldest first, as far back as the start or ten minutes."""
    columns = zip(*history.read(now), strict=True)
    names = ("queue_length", "slots_busy", "slots")
    return {
        "step_seconds": LIMITS.history_step_s,
        **{name: list(column) for name, column in zip(names, columns, strict=True)},
    }


def describe_waiting(hub: Hub, now: float) -> list[dict[str, object]]:
    """Returns the head of the queue, with the place of each and when it may hope to be started."""
    slots, mean_s = hub.policy.idle + hub.policy.running, hub.counters.mean_service_s
    rows, ahead = [], Counter[Pool]()
    for position, ticket in enumerate(itertools.islice(hub.policy.tickets(), LIMITS.listed_rows), 1):
        row = {"position": position, **ticket.item.describe(now)}
        turn = position
        if hub.claims.uses_pools:
            pool = ticket.line.pool
            ahead[pool] += 1
            turn, slots = ahead[pool], hub.policy.slots_of(pool)
        can_tell = slots and mean_s and not hub.paused
        row["starts_in_seconds"] = round(turn * mean_s / slots, 3) if can_tell else None
        rows.append(row)
    return rows


def describe_processes(hub: Hub) -> dict[str, dict[str, int]]:
    """Returns the workers that claim requests, by their id: whoever adds hubs up counts each once."""
    busy = Counter(slot.registration.process for slot in hub.slots if slot.exchange is not None)
    return {
        process: {"slots": slots, "busy_here": busy[process], "connections": connections}
        for process, (slots, connections) in itertools.islice(hub.processes.items(), LIMITS.listed_rows)
    }


def describe_machines(policy: Policy[Exchange, Slot], now: float) -> list[dict[str, object]]:
    """Returns the machines that have slots, then those that had some, the last that went first."""
    known = itertools.chain(policy.machines.values(), reversed(policy.gone.values()))
    return [
        {
            **_name_and_address(machine.name),
            "slots": machine.slots,
            "busy": machine.running,
            "served": machine.served,
            "failures": machine.failures,
            "requeues": machine.requeues,
            "gone_seconds": None if machine.slots else round(now - machine.left_at, 3),
        }
        for machine in itertools.islice(known, LIMITS.listed_rows)
    ]


def _name_and_address(machine: str) -> dict[str, str]:
    name, _, address = machine.rpartition("@")
    return {"address": address, "name": name} if name else {"address": address}


def describe_failure(exchange: Exchange, outcome: Outcome) -> dict[str, object]:
    """Returns what ``/stats`` tells of an exchange that did not end well, or with an error of the app's."""
    return {
        "time": timestamp(time.time()),
        "id": exchange.request_id.decode(),
        "consumer": exchange.consumer.stream.address,
        "method": exchange.head.method.decode(),
        "path": short_path(exchange.head),
        "status": exchange.status,
        "worker": exchange.slot_address,
        "code": outcome.code,
        "meaning": outcome.sentence or "the app answered with an error",
        "detail": exchange.detail,
    }


def short_path(head: RequestHead) -> str:
    """Returns the path without its query, cut if it is very long."""
    path = head.path.decode()
    return path if len(path) <= LIMITS.listed_path_bytes else path[: LIMITS.listed_path_bytes] + "…"


# .. what can be done ..


def _action(path: bytes) -> Callable[[Hub], Answer] | None:
    """Returns what a POST to that path does; ``None`` if nothing."""
    match = re.fullmatch(rb"/requests/(.+)/cancel", path)
    if match is None:
        return ACTIONS.get(path)
    request_id = urllib.parse.unquote(match[1].decode())
    return lambda hub: _cancel(hub, request_id)


def _cancel(hub: Hub, request_id: str) -> Answer:
    count = len(hub.find(request_id))
    hub.cancel(request_id)
    if not count:
        return Answer(404, b"no such request, or it has ended\n")
    return Answer(200, b"cancelled %d\n" % count)


def _drain(hub: Hub) -> Answer:
    hub.drain()
    return Answer(202, b"draining\n")


def _pause(hub: Hub) -> Answer:
    hub.pause()
    return Answer(409, b"draining: too late for a pause\n") if hub.draining else Answer(200, b"paused\n")


def _resume(hub: Hub) -> Answer:
    hub.resume()
    return Answer(200, b"resumed\n")


# .. metrics ..


def _metrics(hub: Hub) -> Answer:
    try:
        import prometheus_client
    except ImportError:
        return Answer(501, b"metrics need a package: python3 -m pip install prometheus-client\n")
    registry = prometheus_client.CollectorRegistry()
    registry.register(MetricsCollector(hub))
    prometheus_client.ProcessCollector(registry=registry)  # what it counts, the kernel keeps
    return Answer(200, prometheus_client.generate_latest(registry), prometheus_client.CONTENT_TYPE_LATEST)


# outcome that is the hub's "no" -> reason
REJECTED: Final = {
    Outcome.QUEUE_FULL: "queue_full",
    Outcome.QUEUE_TIMEOUT: "queue_timeout",
    Outcome.QUEUE_TOO_LONG: "queue_too_long",
    Outcome.DRAINING: "draining",
    Outcome.REFUSED: "refused",
}


def by_label(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    numbers: Mapping[str, float] | Mapping[int, float],
) -> Metric:
    """Returns a metric with a number for each value of a label."""
    metric = kind(name, text, labels=[label])
    for value, number in numbers.items():
        metric.add_metric([str(value)], number)
    return metric


class MetricsCollector:
    """Makes Prometheus metrics of what the hub counts anyway."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics as they are now."""
        yield from self._gauges()
        yield from self._resources()
        yield from self._histograms()
        yield from self._counters()

    def _gauges(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        hub = self._hub
        waiting, busy = hub.policy.waiting, hub.policy.running
        yield Gauge("pothead_hub_queue_length", "Requests that wait for a slot.", waiting)
        oldest_s = hub.policy.oldest_wait(hub.loop.now)
        yield Gauge("pothead_hub_queue_oldest_seconds", "How long the oldest of them has waited.", oldest_s)
        yield Gauge("pothead_hub_requests_in_flight", "Requests that a worker runs.", busy)
        slots = {"idle": max(0, hub.total_slots - busy), "busy": busy}
        yield by_label(Gauge, "pothead_hub_slots", "Slots of workers that are connected.", "state", slots)
        yield from self._pools()
        yield Gauge(
            "pothead_hub_demand", "Slots that would be of use: requests waiting and running.", waiting + busy
        )
        yield Gauge(
            "pothead_hub_paused", "1 while an operator holds back all requests that wait.", hub.paused
        )
        build = Gauge(
            "pothead_build_info", "Version of the hub and its Python.", labels=["version", "python"]
        )
        build.add_metric([__version__, ".".join(map(str, sys.version_info[:3]))], 1)
        yield build

    def _pools(self) -> Iterator[Metric]:
        """Yields what there is by pool, if there are any; their names are the operator's and the workers'."""
        from prometheus_client.core import GaugeMetricFamily as Gauge

        policy = self._hub.policy
        if not self._hub.claims.uses_pools:
            return
        waiting = {pool.name: pool.waiting for pool in policy.all_pools()}
        text = "Requests that wait, by pool."
        yield by_label(Gauge, "pothead_hub_pool_queue_length", text, "pool", waiting)
        slots = Gauge("pothead_hub_pool_slots", "Slots that serve a pool.", labels=["pool", "state"])
        busy = Counter(each.offer.scope for each in self._hub.slots if each.exchange is not None)
        for pool in policy.all_pools():
            slots.add_metric([pool.name, "idle"], policy.idle_of(pool))
            slots.add_metric([pool.name, "busy"], sum(busy[scope] for scope in pool.scopes))
        yield slots

    def _resources(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        hub = self._hub
        roles = Counter(type(each.role) for each in hub.loop.watched if isinstance(each, Stream))
        connections = {"consumers": roles[Consumer], "workers": len(hub.slots), "admin": roles[Admin]}
        connections["newcomers"] = len(hub.newcomers)
        yield by_label(Gauge, "pothead_hub_connections", "Open connections.", "kind", connections)
        kept = {"memory": hub.budget.memory_used, "disk": hub.budget.disk_used}
        yield by_label(Gauge, "pothead_hub_spool_bytes", "Bytes of bodies that the hub keeps.", "where", kept)
        disk_limit = hub.budget.disk_limit
        yield Gauge("pothead_hub_disk_budget_bytes", "How many there may be on the disk.", disk_limit)
        text = "When the certificate expires."
        expiry = Gauge("pothead_hub_certificate_expiry_timestamp_seconds", text, labels=[])
        if hub.certificate is not None:
            expiry.add_metric([], hub.certificate.expires_at)
        yield expiry

    def _histograms(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily as Histogram

        counters = self._hub.counters
        for name, text, durations in (
            ("queue", "How long requests waited for a slot.", counters.queued),
            ("worker", "How long a worker took for a request.", counters.worked),
        ):
            sums = itertools.accumulate(durations.counts)  # each bucket counts those below, too
            bounds = [*(repr(float(bound)) for bound in durations.BOUNDS), "+Inf"]
            yield Histogram(
                f"pothead_hub_{name}_seconds", text,
                buckets=[(bound, float(count)) for bound, count in zip(bounds, sums, strict=True)],
                sum_value=durations.sum_s,
            )  # fmt: skip

    def _counters(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily as Counts

        counters = self._hub.counters
        requests = Counts(
            "pothead_hub_requests", "Requests that have ended.", labels=["method", "status", "code"]
        )
        for (method, status, outcome), count in counters.requests.items():
            requests.add_metric([method.decode(), str(status), outcome.code], count)
        yield requests
        text = "Answers of workers with 500 or more."
        yield by_label(Counts, "pothead_hub_worker_errors", text, "status", counters.worker_errors)
        text = "Requests that workers with a name were given."
        yield by_label(Counts, "pothead_hub_worker_requests", text, "worker", counters.by_worker)
        text = "Handshakes that were refused."
        yield by_label(Counts, "pothead_hub_refused_workers", text, "status", counters.refused_workers)
        yield Counts(
            "pothead_hub_requeues", "Requests sent again since a worker was lost.", counters.requeues
        )
        yield Counts(
            "pothead_hub_turned_away", "Requests offered to a slot that was not free any more.",
            counters.turned_away,
        )  # fmt: skip
        rejected = {reason: counters.outcomes[outcome] for outcome, reason in REJECTED.items()}
        text = "Requests that the hub turned away."
        yield by_label(Counts, "pothead_hub_rejected", text, "reason", rejected)
        text = "Bytes of bodies of requests that have ended."
        moved = {"in": counters.bytes_in, "out": counters.bytes_out}
        yield by_label(Counts, "pothead_hub_bytes", text, "direction", moved)


PAGES: Final[Mapping[bytes, Callable[[Hub], Answer]]] = {
    b"/": lambda hub: status_page(),
    b"/stats": _stats,
    b"/metrics": _metrics,
    b"/livez": _livez,
    b"/readyz": _readyz,
}
ACTIONS: Final[Mapping[bytes, Callable[[Hub], Answer]]] = {
    b"/drain": _drain,
    b"/pause": _pause,
    b"/resume": _resume,
}


# ---- The command line -------------------------------------------------------------------------------------


# .. lines of the log: the same in ``pothead_worker.py``, as a test holds ..

LOG_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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


def flush_each_turn(output: Output, loop: EventLoop) -> None:
    """Has the loop write what is written to the output, and turn again while not all of it was taken."""
    timer = Timer(lambda: None)  # that the loop turns is enough

    def flush() -> None:
        output.flush()
        if output.pending:
            timer.deadline = loop.now + LIMITS.log_retry_s
            loop.touch(timer)

    loop.before_sleep.append(flush)


def complain(message: str, log_format: str) -> None:
    """Says on stderr why the hub does not start."""
    line = f"pothead: {message}"
    if log_format == "json":
        line = json_message(time.time(), "ERROR", log.name, message)
    print(line, file=sys.stderr)


# .. the options: the same in ``pothead_worker.py``, but for what there is ..


class UsageError(Exception):
    """The command line or the environment makes no sense; the text is for the user."""


class OptionParser(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|)")
UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
LOG_FORMATS: Final = ("text", "json")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


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


UNITS_BYTES: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB}


def parse_size(text: str) -> int:
    """Returns bytes: ``4096``, ``64k``, ``1m``, ``2g``.  Raises ``ValueError``."""
    match = re.fullmatch(r"([0-9]{1,15})([kmg]?)", text.lower(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size like 4096, 64k, 1m or 2g")
    return int(match[1]) * UNITS_BYTES[match[2]]


def parse_count(text: str) -> int:
    """Returns a number of 1 or more.  Raises ``ValueError``."""
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def parse_list(text: str) -> tuple[str, ...]:
    """Returns the members of a comma-separated list."""
    return tuple(each.strip() for each in text.split(",") if each.strip())


def parse_port(text: str) -> int:
    """Returns a port; 0 is any free one.  Raises ``ValueError``."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def parse_port_or_off(text: str) -> int | None:
    """Returns a port, ``None`` for off.  Raises ``ValueError``."""
    return None if text.lower() == "off" else parse_port(text)


def parse_step(text: str) -> float:
    """Returns seconds, none for off.  Raises ``ValueError``."""
    return 0.0 if text.lower() == "off" else parse_duration(text)


def parse_routes(text: str) -> tuple[str, ...]:
    """Returns the routes of a list; each option gives one or several.  Raises ``ValueError``."""
    routes = parse_list(text)
    return tuple(f"{prefix.decode()}={origin}" for prefix, origin in read_routes(routes))


def parse_fair_by(text: str) -> str:
    """Returns none, address or the name of a field, in lower case."""
    return text.strip().lower()


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


ENVIRONMENT_PREFIX: Final = "POTHEAD_HUB_"

# option of Options: (group, reader, placeholder (none: it is a switch), what it is)
OPTION_HELP: Final[Mapping[str, tuple[str, Callable[[str], object], str, str]]] = {
    "main_host": ("ports", str, "HOST", "address for consumers"),
    "main_port": ("ports", parse_port, "PORT", "port for consumers; 0: any free one"),
    "worker_host": ("ports", str, "HOST", "address for workers"),
    "worker_port": ("ports", parse_port, "PORT", "port for workers; 0: any free one"),
    "ptth_host": ("ports", str, "HOST", "address for workers on the network"),
    "ptth_port": (
        "ports", parse_port_or_off, "PORT", "port for workers that shake hands (PTTH) and prove who they are"
    ),
    "ptth_compat": (
        "ports", parse_list, "NAMES", f"older protocols that are spoken there, too: {', '.join(COMPATIBLE)}"
    ),
    "admin_host": ("ports", str, "HOST", "address of the status page, /stats, /metrics, /livez and /readyz"),
    "admin_port": ("ports", parse_port_or_off, "PORT", "their port; 0: any free one, off: none"),
    "admin_allowed_hosts": (
        "ports", parse_list, "NAMES", "names by which they may be asked for, with commas between them, "
        "beside IP addresses, localhost and HOST (default: none)"
    ),
    "certfile": ("security", str, "FILE", "the certificate and its chain (PEM), read again on SIGHUP"),
    "keyfile": ("security", str, "FILE", "its key, unless that is in the same file"),
    "tls": (
        "security", parse_list, "PORTS", f"which ports speak TLS: {', '.join(TLS_PORTS)}; "
        "if nothing is said, ptth does with a certificate"
    ),
    "workers_file": (
        "security", str, "FILE", "who may be a worker on the PTTH port: a name, a credential, perhaps "
        "origins; read again on SIGHUP"
    ),
    "workers_ca": ("security", str, "FILE", "who signs the certificates of workers (PEM)"),
    "admin_token_file": (
        "security", str, "FILE", "holds the bearer token that each order to the admin port must come with "
        "(default: none)"
    ),
    "admin_token_for": (
        "security", parse_one_of(TOKEN_USES), "WHAT", "what the token is needed for: orders, or all (but for "
        "probes)"
    ),
    "max_queue": ("the queue", parse_count, "N", "requests that may wait; more are refused with 503 at once"),
    "queue_timeout": (
        "the queue", parse_duration, "TIME", "how long a request may wait for a slot before it gets 503"
    ),
    "no_worker_timeout": (
        "the queue", parse_duration, "TIME", "the same while no worker is connected that could serve it, if "
        "that is shorter"
    ),
    "route": (
        "the queue", parse_routes, "PREFIX=ORIGIN", "requests for paths below PREFIX are ORIGIN's; may be "
        "given several times (default: none)"
    ),
    "priority_step": (
        "the queue", parse_step, "TIME", "of waiting that each step of urgency is worth, as in "
        "Priority: u=2; 0: none"
    ),
    "fair_by": (
        "the queue", parse_fair_by, "WHAT", "share the slots evenly, by worker time: none, address, or the "
        "field that names the tenant"
    ),
    "retry_after": (
        "the queue", parse_duration, "TIME", "Retry-After of a 503 while nothing tells how long it takes"
    ),
    "response_timeout": (
        "the queue", parse_duration, "TIME", "how long a worker may take to begin its response before 504"
    ),
    "max_attempts": (
        "the queue", parse_count, "N", "how often a request is started when workers die before they answer"
    ),
    "max_request_body": ("bodies", parse_size, "SIZE", "longer bodies are refused with 413"),
    "response_spool": (
        "bodies", parse_size, "SIZE", "of each response: taken from the worker ahead of a slow consumer"
    ),
    "spool_memory": (
        "bodies", parse_size, "SIZE", "of each body: kept in memory, the rest in a temporary file"
    ),
    "memory_budget": ("bodies", parse_size, "SIZE", "of all bodies together: kept in memory"),
    "disk_budget": (
        "bodies", parse_size, "SIZE", "of all bodies together: kept in files; beyond it, as on a full disk"
    ),
    "spool_dir": (
        "bodies", str, "DIR", "where those files are made (default: the system's directory for them)"
    ),
    "stream_requests": (
        "bodies", parse_switch, "", "hand a request to a worker before its body is there, and relay the body"
    ),
    "head_timeout": (
        "consumers", parse_duration, "TIME", "for a consumer to send a request's head, before 408"
    ),
    "keep_alive": ("consumers", parse_duration, "TIME", "how long an idle consumer's connection is kept"),
    "stall_timeout": (
        "consumers", parse_duration, "TIME", "how long a consumer may stop in the middle of a body, "
        "either way"
    ),
    "drain_delay": (
        "the process", parse_duration, "TIME", "how long it serves on after SIGTERM, while /readyz says 503 "
        "to the balancer"
    ),
    "graceful_timeout": (
        "the process", parse_duration, "TIME", "how long requests may take to finish after SIGTERM"
    ),
    "forwarded_allow_ips": (
        "consumers", parse_list, "IPS", "consumers whose X-Forwarded-*, Priority and tenants are believed; "
        "networks, or *"
    ),
    "log_format": ("the process", parse_one_of(LOG_FORMATS), "FORMAT", "of all that is logged: text or json"),
    "log_level": (
        "the process", parse_one_of(LOG_LEVELS), "LEVEL", f"of the messages: {', '.join(LOG_LEVELS)}"
    ),
    "allow_anonymous_workers": (
        "ports", parse_switch, "", "let any machine that reaches the worker port be a worker"
    ),
    "reuse_port": (
        "ports", parse_switch, "", "share the ports with the hub that takes over when this one drains"
    ),
}  # fmt: skip


def write_value(value: object, parse: Callable[[str], object]) -> str:
    """Returns a value as a user would write it; nothing for none."""
    if value is None:
        return "off" if parse is parse_port_or_off else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "off" if value == math.inf else f"{value:g}s"
    if isinstance(value, int) and parse is parse_size:
        fitting = [unit for unit in "gmk" if value and value % UNITS_BYTES[unit] == 0]
        return f"{value // UNITS_BYTES[fitting[0]]}{fitting[0]}" if fitting else str(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> OptionParser:
    parser = OptionParser(
        prog="pothead",
        usage="%(prog)s [options] [-- command ...]",
        description="The hub: queues HTTP requests for workers that connect to it.",
        epilog="With '-- command ...' the command is started when the hub is ready, with "
        "POTHEAD_CONNECT=host:port in its environment, and both end together. Times take ms, s, m, h; "
        f"sizes k, m, g. Each option can be set in the environment too: {ENVIRONMENT_PREFIX}MAX_QUEUE=50.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--version", action="version", version=f"pothead {__version__}")
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
SERVICE_LINK: Final = re.compile(
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


def join_routes(words: Sequence[str]) -> list[str]:
    """Makes one option of several routes: of an option that comes twice argparse would take the last."""
    rest: list[str] = []
    routes: list[str] = []
    following = iter(words)
    for word in following:
        name, is_joined, value = word.partition("=")
        if name != "--route":
            rest.append(word)
        elif is_joined:
            routes.append(value)
        else:
            routes += itertools.islice(following, 1)
            rest += [] if routes else [word]
    return [*rest, *([f"--route={','.join(routes)}"] if routes else [])]


class Given:
    """What the user has said, on the command line and in the environment.  Raises ``UsageError``."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        words, self.command = split_command(argv)
        self._arguments, unknown = build_parser().parse_known_args(join_negatives(join_routes(words)))
        if unknown:
            hint = "" if unknown[0].startswith("-") else " (a command comes after --, an app is the worker's)"
            raise UsageError(describe_unknown(unknown) + hint)
        self._environ = environ
        self.is_check: bool = self._arguments.check
        self.sources: dict[str, str] = {}  # of the options that are given: the flag or the variable
        self.options = self._make_options()

    def _make_options(self) -> Options:
        values: dict[str, Any] = {}
        for name, (_, parse, _, _) in OPTION_HELP.items():
            source, text = self._said(name)
            if text is not None:
                self.sources[name] = source
                values[name] = parse_or_refuse(parse, text, f"{source}: ")
        try:
            return Options(**values)
        except ValueError as exc:
            raise UsageError(str(exc)) from None

    def _said(self, name: str) -> tuple[str, str | None]:
        """Returns where the option is given, and what is said there, ``None`` if nothing."""
        text = getattr(self._arguments, name)
        if text is not None:
            return flag_of(name), text
        variable = ENVIRONMENT_PREFIX + name.upper()
        return variable, self._environ.get(variable) or None

    def describe(self) -> Iterator[str]:
        """Yields a line for each option in force."""
        for name, (_, parse, _, _) in OPTION_HELP.items():
            text = write_value(getattr(self.options, name), parse)
            source = self.sources.get(name, "default")
            if self.options.log_format == "json":
                yield json.dumps({"option": flag_of(name), "value": text, "from": source})
            else:
                yield f"{flag_of(name)} {text or '-'} ({source})"


def split_command(argv: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """Returns the words before and behind the first ``--``.  Raises ``UsageError``."""
    words = list(argv)
    if "--" not in words:
        return words, []
    split = words.index("--")
    if split + 1 == len(words):
        raise UsageError("after -- there must be a command")
    return words[:split], words[split + 1 :]


def check_line(text: str, log_format: str) -> str:
    """Returns a line of what ``--check`` tells."""
    return json.dumps({"check": text}) if log_format == "json" else text


def check(given: Given, passed: Mapping[str, socket.socket]) -> None:
    """Tells what would run.  Raises what a start would raise; nothing listens, so that nobody connects."""
    options = given.options
    options.check_together()
    read_token(options)
    wanted = {
        "consumers": (options.main_host, options.main_port),
        "workers": (options.worker_host, options.worker_port),
        "admin": (options.admin_host, options.admin_port),
        "ptth": (options.ptth_host, options.ptth_port),
    }
    if options.certfile is not None:
        Certificate(options)
    if options.workers_file is not None:
        load_permits(options.workers_file)
    lines = list(given.describe())
    for name, (host, port) in wanted.items():
        if port is not None or name in passed:
            with passed.get(name) or _bind(name, host, port or 0, reuse_port=options.reuse_port) as sock:
                refuse_open_port(name, sock, options)
                text = f"would listen {name}={address_text(sock.getsockname())}"
                lines.append(check_line(text, options.log_format))
    if given.command and not shutil.which(given.command[0]):
        raise OSError(describe_missing(given.command))
    if given.command:
        lines.append(check_line(f"would start {shlex.join(given.command)}", options.log_format))
    print("\n".join(lines))


# .. the service manager, such as systemd ..

SOCKET_NAMES: Final = tuple(PORT_OPTIONS)
_FIRST_PASSED_FD: Final = 3  # SD_LISTEN_FDS_START


def take_sockets(environ: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """Takes over the listening sockets that the service manager passes, by name: sd_listen_fds(3).

    Removes the variables, whomever they are for: they are for no program started from here.  Raises
    ``ValueError``.
    """
    pid, count, names = (environ.pop(f"LISTEN_{each}", "") for each in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or count in ("", "0"):
        return {}
    listed = names.split(":")
    if str(len(listed)) != count:
        raise ValueError(f"LISTEN_FDS is {count!r} and LISTEN_FDNAMES {names!r}: not one name a socket")
    sockets: dict[str, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        for fd, name in enumerate(listed, _FIRST_PASSED_FD):
            if name not in SOCKET_NAMES:
                known = ", ".join(SOCKET_NAMES)
                raise ValueError(f"a socket is passed as {name!r}; FileDescriptorName= is one of {known}")
            if name in sockets:
                raise ValueError(f"two sockets are passed as {name!r}")
            sockets[name] = opened.enter_context(_passed_socket(fd, name))
        opened.pop_all()  # all are good: none is closed here
    return sockets


def _passed_socket(fd: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        raise ValueError(f"what is passed as {name!r} is no socket: {exc.strerror}") from exc
    is_tcp = sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6)
    if not is_tcp or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise ValueError(f"what is passed as {name!r} is no listening TCP socket")
    return sock


def notifier(address: str) -> Callable[[str], None]:
    """Returns a function that tells the service manager how things stand: sd_notify(3), one datagram."""
    if not address:
        return _ignore

    def notify(text: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1.0)
                sock.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as exc:
            log.debug("NOTIFY_SOCKET %s: %s", address, exc)

    return notify


def feed_watchdog(loop: EventLoop, notify: Callable[[str], None], environ: MutableMapping[str, str]) -> None:
    """Tells the service manager that the loop turns, twice in the time it asks for: sd_watchdog_enabled(3).

    Removes the variables, as ``take_sockets`` does.
    """
    pid, period = environ.pop("WATCHDOG_PID", ""), environ.pop("WATCHDOG_USEC", "")
    if pid not in ("", str(os.getpid())) or not period.isdecimal() or int(period) == 0:
        return

    def feed() -> None:
        notify("WATCHDOG=1")
        timer.deadline = loop.now + int(period) / 2e6
        loop.touch(timer)

    timer = Timer(feed)
    feed()


def describe_ending(status: int) -> str:
    """Returns words for an exit status, or for a signal, which is a negative one."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


class Companion:
    """The command that lives and dies with the hub."""

    def __init__(self, command: list[str], hub: Hub) -> None:
        self._name = command[0]
        self._hub = hub
        self._status = 0
        self._has_been_asked = self._is_hurried = False  # to end
        connect = {"POTHEAD_CONNECT": str(hub.addresses["workers"])}
        self._process = subprocess.Popen(command, env={**os.environ, **connect})

    def check(self) -> None:
        """Stops the hub if the command has ended by itself."""
        status = self._process.poll()
        if status is not None:
            self._status = status
            level = logging.ERROR if status else logging.INFO
            log.log(level, "%s %s", self._name, describe_ending(status))
            self._hub.loop.stop()

    def terminate(self) -> None:
        """Asks the command to end."""
        self._has_been_asked = True
        self._process.terminate()

    def hurry(self) -> None:
        """The hub ends at once, and so shall the command; if it has been asked already it is killed."""
        self._is_hurried = True
        if self._has_been_asked:
            self._process.kill()

    def wait(self) -> int:
        """Waits for its end; returns its exit status if it ended by itself, else 0."""
        limits_s = (0.5, 1.5) if self._is_hurried else (self._hub.options.graceful_timeout,)
        for limit_s in limits_s:
            try:
                self._process.wait(limit_s)
                return self._status
            except subprocess.TimeoutExpired:
                self._process.terminate()  # a second SIGTERM hurries a worker, too
        self._process.kill()
        self._process.wait()
        return self._status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the hub; returns the exit status: 0 drained, 1 work was cut off or an error, 2 usage."""
    words = sys.argv[1:] if argv is None else argv
    try:
        given = Given(words, os.environ)
        passed = take_sockets(os.environ)  # before anything else is opened, perhaps by a number of theirs
        err = configure_logging(given.options)
        warn_of_unknown_variables(os.environ)
        if given.is_check:
            check(given, passed)
            return 0
        return _serve(given, passed, err)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 2
    except KeyboardInterrupt:
        return 1
    except (OSError, ValueError, UsageError) as exc:  # of the start: a port in use, a command not there
        complain(str(exc), find_log_format(words, os.environ))
        return 2


def configure_logging(options: Options) -> Output:
    """Logs to stderr; returns what writes there."""
    err = Output(2, options.log_format, LIMITS.log_backlog_bytes)
    log.addHandler(OutputHandler(err, options.log_format))
    log.setLevel(options.log_level.upper())
    log.propagate = False
    sys.excepthook = log_uncaught
    return err


def _serve(given: Given, passed: Mapping[str, socket.socket], err: Output) -> int:
    # 1. Everything that can be refused is refused here.
    options, command = given.options, given.command
    notify = notifier(os.environ.pop("NOTIFY_SOCKET", ""))  # what is for the hub is not for the companion
    hub = Hub(options, sockets=passed)
    hub.notify = notify
    feed_watchdog(hub.loop, notify, os.environ)
    out = Output(1, options.log_format, LIMITS.log_backlog_bytes)
    hub.access_log = out.write
    for output in (out, err):
        flush_each_turn(output, hub.loop)
    signals = SignalHandler(hub)
    companion = _start_companion(command, hub) if command else None
    # 2. Ready.
    if companion is not None:
        signals.companion = companion
        hub.loop.call_soon(companion.check)  # it may have ended already
        hub.at_end.append(companion.terminate)
    for name, address in hub.addresses.items():
        if address is not None:
            out.write(_listening_line(name, address, options.log_format))
    where = f"consumers on {hub.addresses['consumers']}, workers on {hub.addresses['workers']}"
    notify(f"READY=1\nSTATUS=serving {where}")
    # 3. Serve; then wait for what has been started.
    status = hub.run()
    if companion is not None:
        status = companion.wait() or status
    out.flush()
    err.flush()
    return 1 if status else 0


def _listening_line(name: str, address: str, log_format: str) -> str:
    if log_format == "json":
        return json.dumps({"time": timestamp(time.time()), "listening": name, "address": address}) + "\n"
    return f"listening {name}={address}\n"


def _start_companion(command: list[str], hub: Hub) -> Companion:
    try:
        return Companion(command, hub)
    except OSError as exc:
        hub.loop.close()
        text = f"cannot start {command[0]}: {exc.strerror}"
        raise OSError(describe_missing(command) if exc.errno == errno.ENOENT else text) from exc


def describe_missing(command: list[str]) -> str:
    """Returns a sentence about a command that is not there, or is no program."""
    is_script = command[0].endswith(".py") and os.path.exists(command[0])
    hint = f"; did you mean -- python3 {shlex.join(command)}?" if is_script else ""
    return f"cannot start {command[0]}: {os.strerror(errno.ENOENT)}{hint}"


class SignalHandler:
    """TERM drains, a second one or INT stops, HUP reads files again, CHLD looks after the companion."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._terms = 0
        self.companion: Companion | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        hub.loop.wake_on_signals()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._terms += number == signal.SIGTERM
        if number == signal.SIGINT or self._terms > 1:
            if self.companion is not None:
                self.companion.hurry()
            self._hub.stop()
        elif number == signal.SIGTERM:
            self._hub.drain()
        elif number == signal.SIGHUP:
            self._hub.reload()
        elif number == signal.SIGCHLD and self.companion is not None:
            self._hub.loop.call_from_thread(self.companion.check)


# ---- The status page --------------------------------------------------------------------------------------
#
# One page without outside resources, which asks for /stats every two seconds while somebody looks.  What a
# consumer or a worker sent is put in by ``textContent`` alone.  Style and script are let in by their hashes,
# so that nothing else could run even if that were forgotten once.


def status_page() -> Answer:
    """Returns the page, with its Content-Security-Policy."""
    style, script = (
        b"'sha256-%b'" % base64.b64encode(hashlib.sha256(text.encode()).digest())
        for text in (PAGE_STYLE, PAGE_SCRIPT)
    )
    policy = (
        b"default-src 'none'; style-src %b; script-src %b; connect-src 'self'; img-src data:; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ) % (style, script)
    page = PAGE.replace("STYLE", PAGE_STYLE, 1).replace("SCRIPT", PAGE_SCRIPT, 1)
    fields = [(b"Content-Security-Policy", policy)]
    return Answer(200, page.encode(), "text/html; charset=utf-8", fields)


PAGE: Final = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>POTHEAD</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3C
path d='M2 3h12v3h-1v7a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V6H2z' fill='%23b45309'/%3E%3C/svg%3E">
<style>STYLE</style>
</head>
<body>
<header>
  <h1>POTHEAD</h1>
  <p id="state" role="status">Connecting</p>
  <p id="about"></p>
  <nav aria-label="For programs"><a href="stats">/stats</a> <a href="metrics">/metrics</a></nav>
  <div class="buttons">
    <button id="unlock" hidden>Unlock …</button>
    <button id="pause" disabled>Pause</button>
    <button id="drain" disabled>Drain …</button>
  </div>
</header>
<p id="banner" role="alert" hidden></p>
<p id="notice" role="status" hidden></p>
<noscript><p class="banner">This page needs JavaScript; <a href="stats">/stats</a> does not.</p></noscript>
<main>
  <section class="panel level waiting" aria-labelledby="waiting-title">
    <h2 id="waiting-title">Requests waiting</h2>
    <p class="big"><span id="queue-length">–</span></p>
    <p class="note" id="queue-note">&nbsp;</p>
    <div class="plot" id="queue-plot">
      <span class="top"></span><span class="zero">0</span>
      <svg role="img" viewBox="0 0 120 100" preserveAspectRatio="none">
        <path class="grid" d="M0 0H120M0 50H120M0 100H120"/><path class="area"/><path class="line"/>
      </svg>
      <span class="start">10 min ago</span><span class="middle">5 min ago</span><span class="end">now</span>
    </div>
  </section>
  <section class="panel level busy" aria-labelledby="busy-title">
    <h2 id="busy-title">Slots busy</h2>
    <p class="big"><span id="busy">–</span><small id="slots"></small></p>
    <p class="note" id="busy-note">&nbsp;</p>
    <div class="plot" id="busy-plot">
      <span class="top"></span><span class="zero">0</span>
      <svg role="img" viewBox="0 0 120 100" preserveAspectRatio="none">
        <path class="grid" d="M0 0H120M0 50H120M0 100H120"/><path class="limit"/><path class="area"/>
        <path class="line"/>
      </svg>
      <span class="start">10 min ago</span><span class="middle">5 min ago</span><span class="end">now</span>
    </div>
  </section>
  <div class="figures">
    <section class="panel" aria-labelledby="rate-title">
      <h2 id="rate-title">Requests ended</h2>
      <dl>
        <div><dt>a second</dt><dd id="rate">–</dd></div>
        <div><dt>since the start</dt><dd id="ended">–</dd></div>
      </dl>
      <p class="note">a second: over the last minute</p>
    </section>
    <section class="panel" aria-labelledby="queued-title">
      <h2 id="queued-title">Time queued</h2>
      <dl>
        <div><dt>median</dt><dd id="queued-median">–</dd></div>
        <div><dt>99th percentile</dt><dd id="queued-p99">–</dd></div>
      </dl>
      <p class="note" id="queued-note">&nbsp;</p>
    </section>
    <section class="panel" aria-labelledby="worked-title">
      <h2 id="worked-title">Time worked</h2>
      <dl>
        <div><dt>median</dt><dd id="worked-median">–</dd></div>
        <div><dt>99th percentile</dt><dd id="worked-p99">–</dd></div>
      </dl>
      <p class="note" id="worked-note">&nbsp;</p>
    </section>
    <section class="panel" aria-labelledby="spools-title">
      <h2 id="spools-title">Bodies kept</h2>
      <dl>
        <div><dt>in memory</dt><dd id="memory">–</dd></div>
        <div><dt>on disk</dt><dd id="disk">–</dd></div>
      </dl>
      <p class="note" id="spools-note">&nbsp;</p>
    </section>
  </div>
  <section class="panel failures" aria-labelledby="failures-title">
    <div class="title">
      <h2 id="failures-title">Last failures</h2><p class="count" id="failures-count"></p>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-labelledby="failures-title">
      <table>
        <thead><tr><th>Time</th><th>Code</th><th class="grow">What happened to which request</th></tr></thead>
        <tbody id="failures"></tbody>
      </table>
    </div>
    <p class="note" id="failures-note">&nbsp;</p>
  </section>
  <section class="panel machines" aria-labelledby="machines-title">
    <div class="title">
      <h2 id="machines-title">Workers</h2><p class="count" id="machines-count"></p>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-labelledby="machines-title">
      <table class="stack hosts">
        <thead><tr><th>Address</th><th>Slots</th><th class="n">Served</th><th class="n">Failures</th>
          <th class="n">Requeued</th></tr></thead>
        <tbody id="machines"></tbody>
      </table>
    </div>
    <p class="note" id="machines-note">&nbsp;</p>
    <details>
      <summary>Every slot <span class="count" id="workers-count"></span></summary>
      <div class="scroll" tabindex="0" role="region" aria-label="Every slot">
        <table>
          <thead><tr><th>Address</th><th>State</th><th class="n">Served</th><th class="n">Age</th>
          </tr></thead>
          <tbody id="workers"></tbody>
        </table>
      </div>
      <p class="note" id="workers-note">&nbsp;</p>
    </details>
  </section>
  <section class="panel running" aria-labelledby="running-title">
    <div class="title">
      <h2 id="running-title">Running</h2><p class="count" id="running-count"></p>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-labelledby="running-title">
      <table class="stack">
        <thead><tr><th class="n">Worked</th><th class="n">Queued</th><th class="grow">Request, worker, id</th>
          <th><span class="unseen">Action</span></th></tr></thead>
        <tbody id="running"></tbody>
      </table>
    </div>
    <p class="note" id="running-note">&nbsp;</p>
  </section>
  <section class="panel queue" aria-labelledby="waiting-table-title">
    <div class="title">
      <h2 id="waiting-table-title">Waiting</h2><p class="count" id="waiting-count"></p>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-labelledby="waiting-table-title">
      <table class="stack">
        <thead><tr><th class="n">Place</th><th class="n">Age</th><th class="n">Starts in</th>
          <th class="grow">Request, consumer, id</th><th><span class="unseen">Action</span></th></tr></thead>
        <tbody id="waiting"></tbody>
      </table>
    </div>
    <p class="note" id="waiting-note">&nbsp;</p>
  </section>
  <section class="panel" id="pools-panel" aria-labelledby="pools-title" hidden>
    <div class="title">
      <h2 id="pools-title">Pools</h2><p class="count" id="pools-count"></p>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-labelledby="pools-title">
      <table>
        <thead><tr><th class="grow">Pool</th><th class="n">Waiting</th><th class="n">Slots</th>
          <th class="n">Idle</th></tr></thead>
        <tbody id="pools"></tbody>
      </table>
    </div>
    <p class="note" id="pools-note">&nbsp;</p>
  </section>
  <section class="panel" id="tenants-panel" aria-labelledby="tenants-title" hidden>
    <div class="title">
      <h2 id="tenants-title">Most worker time</h2><p class="count" id="tenants-count"></p>
    </div>
    <div class="scroll" tabindex="0" role="region" aria-labelledby="tenants-title">
      <table>
        <thead><tr><th class="grow">Tenant</th><th class="n">Waiting</th><th class="n">Running</th>
          <th class="n">Worked</th><th class="n">Counts as</th></tr></thead>
        <tbody id="tenants"></tbody>
      </table>
    </div>
    <p class="note" id="tenants-note">&nbsp;</p>
  </section>
</main>
<dialog id="dialog" aria-labelledby="question" aria-describedby="wrong consequence">
  <form id="form" method="dialog">
    <h2 id="question"></h2>
    <p id="wrong" class="trouble" hidden></p>
    <p id="consequence"></p>
    <p id="entry" hidden>
      <label for="token">Token</label>
      <input id="token" type="password" autocomplete="off" autocapitalize="none" spellcheck="false"
        required disabled pattern="\s*[A-Za-z0-9._~+\/\-]+=*\s*"
        title="letters, digits and - . _ ~ + / (= at the end)">
    </p>
    <div class="buttons"><button id="no" type="button"></button><button id="yes"></button></div>
  </form>
</dialog>
<script>SCRIPT</script>
</body>
</html>
"""

PAGE_STYLE: Final = r"""
:root {
  --ground: #f5f4f0; --panel: #fff; --ink: #1d1e21; --soft: #5d616a; --line: #e3e1da;
  --queue: #b45309; --busy: #1f63b0; --bad: #b3261e; --good: #1f7a45; --on: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #111316; --panel: #1a1d22; --ink: #eceef1; --soft: #a1a8b3; --line: #2d3239;
    --queue: #f2a541; --busy: #74b4f7; --bad: #ff8a7e; --good: #66cf93; --on: #111316;
  }
}
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
body {
  background: var(--ground); color: var(--ink); padding: clamp(.75rem, 1.6vw, 1.75rem);
  font: 1rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; max-width: 220rem; margin: 0 auto;
}
header { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; margin-bottom: 1rem; }
h1 { font-size: 1.1rem; letter-spacing: .14em; font-weight: 700; }
h2 { font-size: .95rem; font-weight: 600; }
#state { font-weight: 600; border: 1.5px solid currentColor; border-radius: 99px; padding: .05rem .75rem; }
#state.good { color: var(--good); }
#state.warn { color: var(--queue); }
#state.bad { color: var(--bad); }
#about, nav { color: var(--soft); font-size: .9rem; }
nav { flex: 1; white-space: nowrap; }
nav a { margin-right: .6rem; }
a { color: inherit; text-underline-offset: .15em; }
.buttons { display: flex; gap: .5rem; }
button {
  font: inherit; font-size: .9rem; color: inherit; background: var(--panel); cursor: pointer;
  border: 1px solid var(--soft); border-radius: .4rem; padding: .35rem .9rem; min-height: 2.2rem;
}
button:hover:enabled { border-color: var(--ink); box-shadow: 0 0 0 1px var(--ink); }
button:disabled { opacity: .5; cursor: default; }
button.strong { background: var(--bad); border-color: var(--bad); color: var(--on); font-weight: 600; }
#pause.strong { background: var(--queue); border-color: var(--queue); }
:focus-visible { outline: 3px solid var(--busy); outline-offset: 2px; }
#banner, .banner, #notice {
  border-radius: .6rem; padding: .7rem 1.1rem; margin-bottom: 1rem; font-weight: 600;
  font-size: clamp(1.1rem, 1.8vw, 1.7rem); background: var(--queue); color: var(--on);
}
#banner.bad { background: var(--bad); }
#notice { background: var(--panel); color: var(--ink); border: 1.5px solid var(--soft); font-size: 1rem; }
main, .figures { display: grid; gap: clamp(.75rem, 1.1vw, 1.25rem); }
main { grid-template-columns: repeat(12, minmax(0, 1fr)); }
main > * { grid-column: span 6; }
main > .figures { grid-column: span 12; grid-template-columns: repeat(4, minmax(0, 1fr)); }
.stale main { opacity: .45; }
.panel { border: 1px solid var(--line); border-radius: .7rem; padding: 1rem 1.25rem; }
.panel, th { background: var(--panel); }
.note, .count { color: var(--soft); font-size: .9rem; }
.title { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 1rem; }
.level, .figures > * { display: flex; flex-direction: column; }
.figures > * { justify-content: space-between; }
.waiting { --tone: var(--queue); }
.busy { --tone: var(--busy); }
.big { font-size: clamp(3.5rem, 8vw, 8.5rem); line-height: 1.05; font-weight: 650; letter-spacing: -.035em; }
.big { color: var(--tone); }
.big small { color: var(--soft); font-size: .4em; font-weight: 400; letter-spacing: 0; margin-left: .4em; }
.plot {
  display: grid; grid-template: minmax(clamp(5.5rem, 15vh, 11rem), 1fr) auto / auto repeat(3, 1fr);
  column-gap: .5rem; margin-top: .75rem; flex: 1; color: var(--soft); font-size: .8rem; line-height: 1.3;
}
.plot svg { grid-area: 1 / 2 / 2 / 5; width: 100%; height: 0; min-height: 100%; overflow: visible; }
.plot .top, .plot .zero { grid-area: 1 / 1; text-align: right; min-width: 1.6em; }
.plot .top { align-self: start; margin-top: -.6em; }
.plot .zero { align-self: end; margin-bottom: -.6em; }
.plot .start, .plot .middle, .plot .end { grid-row: 2; margin-top: .4rem; }
.plot .start { grid-column: 2; }
.plot .middle { grid-column: 3; text-align: center; }
.plot .end { grid-column: 4; text-align: right; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .area { fill: var(--tone); opacity: .16; }
.plot .line { stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; }
.plot .limit { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
dl { display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .25rem 0; }
dl div { flex: 1 1 7rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { font-size: clamp(1.3rem, 1.9vw, 1.9rem); font-weight: 600; line-height: 1.2; }
dd, .big { white-space: nowrap; }
.scroll { overflow: auto; max-height: var(--rows, 24rem); margin: .5rem -.5rem .35rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .32rem .5rem; white-space: nowrap; vertical-align: baseline; }
th { color: var(--soft); font-weight: 500; font-size: .8rem; position: sticky; top: 0; }
tbody tr { border-top: 1px solid var(--line); }
tbody tr:hover { background: var(--ground); }
.n { text-align: right; }
.grow { width: 99%; max-width: 0; overflow: hidden; text-overflow: ellipsis; }
.grow p { overflow: hidden; text-overflow: ellipsis; }
.grow p + p { color: var(--soft); font: .78rem ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
.words p:first-child { white-space: normal; overflow-wrap: anywhere; }
.words p:first-child::first-letter { text-transform: uppercase; }
.code { font-weight: 650; }
.mono { font: .84rem ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.act { text-align: right; padding-block: .1rem; }
.act button { min-height: 1.7rem; padding: .05rem .6rem; font-size: .8rem; border-color: var(--line); }
.trouble { color: var(--bad); font-weight: 650; }
.gone td, .left { color: var(--soft); }
.meter { display: inline-block; width: 5rem; height: .55rem; margin-right: .6rem; border-radius: 2px; }
.meter { background: var(--line); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--busy); }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; padding-top: .35rem; }
dialog {
  margin: auto; max-width: min(32rem, 100% - 1.5rem); border: 1px solid var(--soft); border-radius: .8rem;
  padding: 1.4rem; background: var(--panel); color: var(--ink);
}
dialog::backdrop { background: rgb(0 0 0 / .55); }
dialog h2 { font-size: 1.2rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
dialog p { color: var(--soft); margin-bottom: 1.1rem; overflow-wrap: anywhere; }
dialog p.trouble { color: var(--bad); margin-bottom: .4rem; }
#yes:not(.strong) { background: var(--busy); border-color: var(--busy); color: var(--on); font-weight: 600; }
dialog .buttons { justify-content: flex-end; }
label { display: block; color: var(--ink); font-size: .9rem; font-weight: 600; margin-bottom: .25rem; }
input {
  font: inherit; color: var(--ink); background: var(--ground); width: 100%; min-height: 2.6rem;
  border: 1px solid var(--soft); border-radius: .4rem; padding: .35rem .7rem;
}
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (min-width: 110rem) {
  main { --rows: max(38rem, calc(100vh - 39rem)); grid-template-rows: auto auto 1fr; }
  main > * { grid-column: span 4; }
  main > .figures { grid-column: span 4; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .failures, .machines { --rows: max(15rem, calc(50vh - 25rem)); }
  .machines { grid-area: 3 / 1 / auto / span 4; }
  .running { grid-area: 2 / 5 / span 2 / span 4; }
  .queue { grid-area: 2 / 9 / span 2 / span 4; }
}
@media (min-width: 150rem) {
  main { --rows: max(30rem, calc(100vh - 39rem)); grid-template-rows: none; }
  main > :not(.level, .figures) { --rows: inherit; grid-area: auto / auto / auto / span 3; }
}
@media (max-width: 60rem) {
  main > * { grid-column: 1 / -1; }
  main > .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .panel { padding: .8rem .9rem; }
  .scroll { max-height: 20rem; }
  .big { font-size: clamp(3.5rem, 20vw, 7rem); }
}
@media (max-width: 34rem) {
  th, td { padding-inline: .3rem; }
  .big { font-size: 16vw; }
  .panel { padding-inline: .7rem; }
  th.grow, .grow p { white-space: normal; overflow-wrap: anywhere; }
  .scroll { margin-inline: -.3rem; }
  .meter { display: none; }
  .stack tr { display: grid; grid-template-columns: 3.4rem 3.6rem 5rem 1fr; align-items: baseline; }
  .stack td.grow { grid-column: 1 / -1; order: 1; width: auto; max-width: none; padding-top: 0; }
  .stack th.grow { display: none; }
  .stack .act { grid-column: 4; }
  .hosts tr { grid-template-columns: 1fr repeat(3, 4.6rem); }
  .hosts tr > :first-child { grid-column: 1 / -1; padding-bottom: 0; }
  .hosts td.grow { grid-column: 1; order: 0; }
  .buttons { width: 100%; }
  .buttons button { flex: 1; }
  .act button { min-height: 2rem; }
}
"""

PAGE_SCRIPT: Final = r"""
"use strict";
const PERIOD_MS = 2000, PATIENCE_MS = 5000;
const byId = id => document.getElementById(id);
let timer = 0, heardAt = new Date(), isPaused = false;

// ---- Words and numbers ----

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
function say(id, text) {
  setText(byId(id), text || "");
  byId(id).hidden = !text;
}
const count = number => number.toLocaleString("en");
function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}
const age = seconds => seconds < 9.95 ? `${seconds.toFixed(1)}\u00a0s` : span(seconds);
const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)}\u00a0ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)}\u00a0s`;
  const whole = Math.round(seconds);
  if (whole < 100) return `${whole}\u00a0s`;
  const place = UNITS.findIndex(([, size]) => whole >= size);
  const [[unit, size], [part, partSize]] = UNITS.slice(place, place + 2);
  const rest = Math.floor(whole % size / partSize);
  return `${Math.floor(whole / size)}\u00a0${unit}` + (rest ? ` ${rest}\u00a0${part}` : "");
}

function size(bytes) {
  let unit = "B";
  for (const next of ["KiB", "MiB", "GiB", "TiB"]) {
    if (bytes < 999.5) break;
    [bytes, unit] = [bytes / 1024, next];
  }
  return `${bytes.toFixed(bytes % 1 && bytes < 9.95 ? 1 : 0)}\u00a0${unit}`;
}
function rate(number) {
  if (number && number < 0.05) return "<\u00a00.1";
  return number && number < 9.95 ? number.toFixed(1) : count(Math.round(number));
}

// ---- Tables ----

// A column is [class, what to show of a row]: a text, two lines of text, or nothing if it is done already.
const request = row => row.method === "-" ? "(unreadable)" : `${row.method} ${row.path}`;
const hasLeft = row => row.code === "CQ" || row.code === "CR";
// A kept connection brings another request, and its row must not keep the button of the one before.
const exchange = row => `${row.consumer} ${row.id}`;
// A worker's name, what it serves if that is not everything, and its address.
const named = row => [row.name, row.address, ...row.origins ?? []].filter(Boolean).join(" · ");
const order = row => [row.tenant, row.pool, row.urgency === undefined ? undefined : `u=${row.urgency}`];
const told = parts => parts.filter(part => part !== undefined).join(" · ");
const TABLES = {
  running: {
    key: exchange, empty: "Nothing runs.",
    columns: [
      ["n", row => age(row.worker_seconds)],
      ["n", row => age(row.age_seconds - row.worker_seconds)],
      ["grow mono", row => [request(row), told([row.worker, row.id, ...order(row)])]],
      ["act", cancelButton],
    ],
  },
  waiting: {
    key: exchange, empty: "Nothing waits.",
    columns: [
      ["n", row => count(row.position)],
      ["n", row => age(row.age_seconds)],
      ["n", row => row.starts_in_seconds === null ? "–" : "≈\u00a0" + age(row.starts_in_seconds)],
      ["grow mono", row => [request(row), told([row.consumer, row.id, ...order(row)])]],
      ["act", cancelButton],
    ],
  },
  machines: {
    key: row => `${row.name} ${row.address}`, empty: "No worker has connected yet.",
    columns: [
      ["mono", named],
      ["grow", machineState],
      ["n", row => count(row.served)],
      ["n", row => count(row.failures), row => row.failures ? "trouble" : ""],
      ["n", row => count(row.requeues)],
    ],
  },
  workers: {
    key: row => row.address, empty: "No slot is connected.",
    columns: [
      ["mono", named],
      ["grow", row => row.state],
      ["n", row => count(row.served)],
      ["n", row => age(row.connected_seconds)],
    ],
  },
  pools: {
    key: row => row.pool, empty: "",
    columns: [
      ["grow mono", row => row.pool],
      ["n", row => count(row.waiting)],
      ["n", row => count(row.slots), row => row.waiting && !row.slots ? "trouble" : ""],
      ["n", row => count(row.idle)],
    ],
  },
  tenants: {
    key: row => row.tenant, empty: "Nobody has come yet.",
    columns: [
      ["grow mono", row => row.tenant],
      ["n", row => count(row.waiting)],
      ["n", row => count(row.running)],
      ["n", row => age(row.worker_seconds)],
      ["n", row => age(row.counts_seconds)],
    ],
  },
  failures: {
    key: row => `${row.time} ${exchange(row)}`, empty: "None.",
    columns: [
      ["", row => new Date(row.time).toLocaleTimeString([], {hour12: false})],
      ["code mono", row => row.code === "OK" ? `${row.status}` : row.code, row => hasLeft(row) ? "left" : ""],
      ["grow words", row => [
        row.detail ? `${row.meaning} – ${row.detail}` : row.meaning,
        [request(row), row.worker, row.id].filter(part => part !== "-").join(" · "),
      ]],
    ],
  },
};

function cancelButton(row) {
  const button = document.createElement("button");
  button.textContent = "Cancel";
  button.setAttribute("aria-label", `Cancel request ${row.id}`);
  button.onclick = () => actIfSure(
    "Cancel this request?", `${request(row)} (${row.id}). Its consumer is told that it was cancelled.`,
    "Keep it", "Cancel the request", `requests/${encodeURIComponent(row.id)}/cancel`);
  return button;
}

function machineState(row, cell) {
  if (!row.slots) return `gone for ${age(row.gone_seconds)}`;
  const meter = cell.querySelector(".meter") ?? document.createElement("span");
  if (!meter.parentNode) {
    meter.className = "meter";
    meter.append(document.createElement("i"));
    cell.replaceChildren(meter, "");
  }
  meter.firstChild.style.width = `${100 * row.busy / row.slots}%`;
  const text = `${count(row.busy)} of ${count(row.slots)} busy`;
  if (cell.lastChild.data !== text) cell.lastChild.data = text;
}

function fill(name, rows, total) {
  const body = byId(name), table = TABLES[name];
  const old = new Map([...body.rows].map(row => [row.dataset.key, row]));
  const fresh = rows.map(row => {
    const key = table.key(row), line = old.get(key) ?? newLine(key, row, table);
    old.delete(key);
    update(line, row, table);
    return line;
  });
  for (const line of old.values()) line.remove();
  fresh.forEach((line, place) => {
    if (body.rows[place] !== line) body.insertBefore(line, body.rows[place] ?? null);
  });
  body.closest(".scroll").hidden = !rows.length;
  const part = rows.length < total ? `${count(rows.length)} of ` : "";
  setText(byId(`${name}-count`), total ? part + count(total) : "");
  say(`${name}-note`, rows.length ? "" : table.empty);
}

function newLine(key, row, table) {
  const line = document.createElement("tr");
  line.dataset.key = key;
  for (const [kind, show] of table.columns) {
    const cell = line.insertCell();
    cell.className = kind;
    if (kind === "act") cell.append(show(row));
  }
  return line;
}

function setLines(cell, texts) {
  while (cell.childElementCount < texts.length) cell.append(document.createElement("p"));
  texts.forEach((text, place) => {
    setText(cell.children[place], text);
    cell.children[place].title = text;
  });
}

function update(line, row, table) {
  table.columns.forEach(([kind, show, mood], place) => {
    const cell = line.cells[place];
    if (kind === "act") return;
    const text = show(row, cell);
    if (Array.isArray(text)) setLines(cell, text);
    else if (text !== undefined) setText(cell, text);
    if (mood) cell.className = `${kind} ${mood(row)}`;
  });
  line.classList.toggle("gone", row.slots === 0);
}

// ---- The plots ----

const STEPS = 120;  // the width of a plot; a young hub has fewer
function steps(values, top) {
  const start = STEPS - values.length;
  return values.map((value, place) => {
    const x = start + place, y = (100 - 100 * value / top).toFixed(2);
    return place ? `V${y}H${x + 1}` : `M${x} ${y}H${x + 1}`;
  }).join("");
}

function plot(id, what, now, values, limits) {
  const peak = Math.max(...values);
  const wanted = Math.max(peak, ...(limits ?? []), 1), power = 10 ** Math.floor(Math.log10(wanted));
  const tops = [1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10].map(each => each * power);
  const top = Math.max(2, tops.find(each => each >= wanted));
  const figure = byId(id), line = steps(values, top);
  setText(figure.querySelector(".top"), count(top));
  figure.querySelector(".line").setAttribute("d", line);
  figure.querySelector(".area").setAttribute("d", `${line}V100H${STEPS - values.length}Z`);
  if (limits) figure.querySelector(".limit").setAttribute("d", steps(limits, top));
  const words = `${what} in the last ten minutes: ${now} now, ${peak} at most`;
  figure.querySelector("svg").setAttribute("aria-label", words);
}

// ---- All of it ----

function show(stats) {
  const {idle, busy} = stats.slots, slots = idle + busy, waiting = stats.queue_length;
  isPaused = stats.paused;
  setText(byId("queue-length"), count(waiting));
  setText(byId("queue-note"), waiting
    ? `the oldest for ${age(stats.queue_oldest_seconds)} · room for ${count(stats.max_queue)}`
    : `room for ${count(stats.max_queue)}`);
  setText(byId("busy"), count(busy));
  setText(byId("slots"), `of ${count(slots)}`);
  const free = Object.keys(stats.processes).length ? "idle or busy at other hubs" : "idle";
  setText(byId("busy-note"), slots ? `${count(idle)} ${free} · dashed: all slots` : "no worker is connected");
  for (const [name, times] of [["queued", stats.queued_seconds], ["worked", stats.worker_seconds]]) {
    setText(byId(`${name}-median`), span(times.median));
    setText(byId(`${name}-p99`), span(times.p99));
    const basis = times.of_last ? `of the last ${plural(times.of_last, "request")}` : "no request yet";
    setText(byId(`${name}-note`), basis);
  }
  plot("queue-plot", "Requests waiting", waiting, stats.history.queue_length);
  plot("busy-plot", "Slots busy", busy, stats.history.slots_busy, stats.history.slots);
  for (const name of ["running", "waiting", "machines", "workers"])
    fill(name, stats[name], stats[name].length + stats[`${name}_not_listed`]);
  for (const name of ["pools", "tenants"]) {
    byId(`${name}-panel`).hidden = !stats[name];
    if (stats[name]) fill(name, stats[name], stats[name].length);
  }
  if (stats.machines.some(row => row.requeues))
    say("machines-note", "Requeued: so many of the failures were tried again.");
  showEnds(stats);
  const {memory_budget_bytes: memory, disk_budget_bytes: disk} = stats;
  setText(byId("memory"), size(stats.spool_memory_bytes));
  setText(byId("disk"), size(stats.spool_disk_bytes));
  setText(byId("spools-note"), `of ${size(memory)}` + (disk === null ? " of memory" : ` and ${size(disk)}`));
  byId("disk").className = disk !== null && stats.spool_disk_bytes > 0.9 * disk ? "trouble" : "";
  setText(byId("about"), `version ${stats.version} · up ${age(stats.uptime_seconds)}`);
  setText(byId("pause"), isPaused ? "Resume" : "Pause");
  byId("pause").classList.toggle("strong", isPaused);
  byId("pause").disabled = byId("drain").disabled = stats.draining;
  document.body.classList.remove("stale");
  byId("unlock").hidden = true;
  showState(stats, slots, waiting);
}

function showEnds(stats) {
  const sum = numbers => Object.values(numbers).reduce((all, number) => all + number, 0);
  const ended = sum(stats.outcomes), errors = sum(stats.worker_errors);
  setText(byId("rate"), rate(stats.requests_per_second));
  setText(byId("ended"), count(ended));
  fill("failures", stats.failures, ended - stats.outcomes.OK + errors);
  const tally = Object.entries(stats.outcomes).filter(([, number]) => number)
    .map(([code, number]) => `${code}\u00a0${count(number)}`);
  if (errors) tally[0] += ` (${plural(errors, "error")} of the app)`;
  if (stats.requeues) tally.push(`requeued\u00a0${count(stats.requeues)}`);
  const words = tally.length ? `Since the start: ${tally.join(" · ")}` : "";
  say("failures-note", (stats.failures.length ? "" : "None. ") + words);
}

function showState(stats, slots, waiting) {
  let state = ["good", "● Serving"], banner = "";
  const lonely = !slots && waiting > 0;
  const helpless = lonely ? `No worker is connected: ${plural(waiting, "request")} cannot start.` : "";
  if (stats.draining) {
    state = ["warn", "▼ Draining"];
    banner = `Draining: no new requests are taken; ${plural(stats.demand, "request")} to finish.`;
    if (helpless) banner += ` ${helpless}`;
  } else if (stats.paused) {
    state = ["warn", "‖ Paused"];
    banner = "Paused: requests wait, and none is started until you resume.";
  } else if (!slots) {
    state = ["warn", "○ No workers"];
    banner = helpless;
  }
  if (stats.has_rival)
    banner += " Another hub listens on the same port, and gets a part of the requests: end one of them.";
  const expires = stats.certificate_expires_seconds;
  if (expires !== null && expires < 14 * 86400)
    banner += expires < 0 ? " The certificate has expired." : ` The certificate expires in ${span(expires)}.`;
  setState(...state, banner.trim(), "");
  const mark = stats.paused ? "‖ " : "";
  document.title = `${mark}${count(waiting)} waiting, ${count(stats.slots.busy)} busy – POTHEAD`;
}

function setState(kind, text, banner, mood) {
  byId("state").className = kind;
  setText(byId("state"), text);
  byId("banner").className = mood;
  say("banner", banner);
}

function freeze() {
  document.body.classList.add("stale");
  byId("pause").disabled = byId("drain").disabled = true;
}

function lose() {
  freeze();
  // The time of day and not the age, which would be read aloud again and again.
  const time = heardAt.toLocaleTimeString([], {hour12: false});
  setState("bad", "✕ No answer", `The hub has not answered since ${time}. What you see is from then.`, "bad");
  document.title = "✕ No answer – POTHEAD";
}

function lock() {
  freeze();
  byId("unlock").hidden = false;
  setState("warn", "■ Locked", "This hub tells how it is doing only to those who have its token.", "");
  document.title = "■ Locked – POTHEAD";
}

async function refresh() {
  let stats = null, isLocked = false;
  try {
    const response = await call("stats", {}, lock);
    isLocked = response.status === 401;
    if (response.ok) stats = await response.json();
  } catch (error) {
    console.info(error.message);
  }
  if (stats) {
    heardAt = new Date();
    show(stats);
  } else if (!isLocked) lose();
  clearTimeout(timer);
  // Who did not want to enter the token is asked again when he comes back, and not every two seconds.
  if (!document.hidden && !isLocked) timer = setTimeout(refresh, PERIOD_MS);
}

// ---- The token ----

let token = "";  // here and nowhere else: it goes with the page
let asking = null;

// Sends a request; if the hub wants another token than was sent, asks for it and sends the request again.
async function call(path, options, onLocked) {
  const sent = token, headers = {...options.headers};
  if (sent) headers.Authorization = `Bearer ${sent}`;
  const response = await fetch(path, {...options, headers, signal: AbortSignal.timeout(PATIENCE_MS)});
  if (response.status !== 401) return response;
  if (onLocked) onLocked();
  return token !== sent || await askForToken() ? call(path, options, onLocked) : response;
}

// Returns whether one was entered; all who want one meanwhile wait for the same.
function askForToken() {
  asking ??= enterToken().finally(() => { asking = null; });
  return asking;
}

async function enterToken() {
  const isGiven = await ask(
    "The hub wants its token", "It is what the hub's --admin-token-file holds. This page keeps it until " +
    "it is closed or loaded again.", "Not now", "Go on",
    {entry: true, wrong: token && "The hub did not accept that token."});
  token = isGiven ? byId("token").value.trim() : "";
  byId("token").value = "";
  return isGiven;
}

// ---- The dialog ----

let dialogs = Promise.resolve();  // one after the other

// Returns whether the answer was yes.
function ask(...what) {
  dialogs = dialogs.then(() => showDialog(...what));
  return dialogs;
}

function showDialog(question, consequence, no, yes, {strong = false, entry = false, wrong = ""}) {
  const dialog = byId("dialog");
  setText(byId("question"), question);
  setText(byId("consequence"), consequence);
  setText(byId("no"), no);
  setText(byId("yes"), yes);
  say("wrong", wrong);
  byId("yes").classList.toggle("strong", strong);
  byId("entry").hidden = byId("token").disabled = !entry;
  dialog.showModal();
  return new Promise(resolve => {
    const end = answer => { dialog.close(); resolve(answer); };
    byId("no").onclick = () => end(false);
    // Left to itself the form would close the dialog later, when it may show the next question.
    byId("form").onsubmit = event => { event.preventDefault(); end(true); };
    // The Escape key; if the dialog is open this is the event of the one before, which comes late.
    dialog.onclose = () => dialog.open || end(false);
  });
}

// ---- Actions ----

async function act(path) {
  let complaint = "";
  try {
    const response = await call(path, {method: "POST", headers: {"Pothead-Action": "yes"}});
    if (response.status === 401) complaint = "Nothing was done: the hub wants its token for that.";
    else if (!response.ok) complaint = await response.text();
  } catch {
    complaint = "The hub did not answer.";
  }
  say("notice", complaint);
  refresh();
}

async function actIfSure(question, consequence, no, yes, path) {
  if (await ask(question, consequence, no, yes, {strong: true})) act(path);
}

byId("unlock").onclick = refresh;
byId("pause").onclick = () => act(isPaused ? "resume" : "pause");
byId("drain").onclick = () => actIfSure(
  "Drain the hub?", "It takes no new requests, finishes those it has, and then ends. There is no way back.",
  "Keep serving", "Drain", "drain");
document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
"""


if __name__ == "__main__":
    sys.exit(main())
