"""A raw peer: send these bytes, expect those. And the programs under test as processes.

Both ends of an exchange are scripted in bytes, since an HTTP library hides what matters. Every wait ends with
its event or fails at a generous deadline. What no event tells of is looked for again and again, by `until`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import py_compile
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 10.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Address = tuple[str, int]
Fields = list[tuple[bytes, bytes]]
T = TypeVar("T")
ProgramT = TypeVar("ProgramT", bound="Program")

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)")
REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/1\.([01])" % TOKEN)
FIELD_LINE = re.compile(rb"(%b):[ \t]*([^\r\n\x00]*?)[ \t]*" % TOKEN)
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


@dataclass(frozen=True)
class Message:
    """What requests and responses share: the fields as they came, and the decoded body."""

    fields: Fields
    body: bytes

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of every field called `name`, in order."""
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def value(self, name: bytes) -> bytes | None:
        """Return the value of the field called `name`, which must not be repeated."""
        values = self.values(name)
        assert len(values) < 2, f"{name!r} is repeated: {values!r}"
        return values[0] if values else None


@dataclass(frozen=True)
class Request(Message):
    method: bytes
    target: bytes
    minor_version: int


@dataclass(frozen=True)
class Response(Message):
    status: int
    reason: bytes
    minor_version: int


# ---- TLS ---------------------------------------------------------------------------------------------


class TlsSocket:
    """A socket over TLS with what tests use of one; `shutdown` and `close` say close_notify first.

    `ssl.SSLSocket` will not do: its `shutdown` throws TLS away, and what comes then is ciphertext.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, name: str = "localhost", is_hub: bool = False
    ) -> None:
        self.below = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, is_hub, None if is_hub else name)
        self.unsent = b""
        self.ahead = b""  # has come, and was not asked for yet
        self.is_reset = False
        try:
            self._until_done(self.tls.do_handshake)
        except BaseException:
            sock.close()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def _until_done(self, step: Callable[[], Any]) -> Any:
        """Call `step` until it needs to receive no more; what it says is sent meanwhile."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            finally:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receiving will tell
                    self._flush()
            data = self.below.recv(1 << 18)
            if data:
                self.incoming.write(data)
            else:
                self.incoming.write_eof()

    def _flush(self) -> None:
        self.unsent += self.outgoing.read()
        while self.unsent:
            self.unsent = self.unsent[self.below.send(self.unsent) :]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return what has come; nothing at the end, be it close_notify or a mere FIN."""
        if not self.ahead:
            with contextlib.suppress(ssl.SSLEOFError):
                self.ahead = self._until_done(lambda: self.tls.read(1 << 18))
        data = self.ahead[:size]
        if not flags & socket.MSG_PEEK:
            self.ahead = self.ahead[size:]
        return data

    def sendall(self, data: bytes | memoryview) -> None:
        self.tls.write(data)
        self._flush()

    def send(self, data: bytes | memoryview) -> int:
        """Take all of it, unless what was taken before could not be sent."""
        self._flush()
        size = self.tls.write(data)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            self._flush()
        return size

    def setsockopt(self, level: int, name: int, value: Any) -> None:
        self.is_reset = self.is_reset or name == socket.SO_LINGER
        self.below.setsockopt(level, name, value)

    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_RD:
            self._say_goodbye()
        with contextlib.suppress(OSError):  # the other end has closed already
            self.below.shutdown(how)

    def close(self) -> None:
        if not self.is_reset:
            self._say_goodbye()
        self.below.close()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError):
            self.tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()


@functools.cache
def authority() -> Path:
    """Return a directory with a certificate authority of the tests: `ca.pem`, `hub.pem` and `hub.key`."""
    directory = Path(tempfile.mkdtemp(prefix="pothead-certificates-"))
    certificate(directory, "ca", "/CN=the tests")
    certificate(directory, "hub", "/CN=hub", names="DNS:localhost,IP:127.0.0.1")
    return directory


def certificate(
    directory: Path, name: str, subject: str, *, names: str = "", use: str = "serverAuth", days: int = 30
) -> Path:
    """Make a certificate and its key, signed by `ca` or, if it is that itself, by nobody else."""
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    make += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", str(days), "-subj", subject]
    if name == "ca":
        make += ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    else:
        make += ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"subjectAltName={names}"]
        make += ["-addext", f"extendedKeyUsage={use}", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(make, cwd=directory, check=True, capture_output=True)
    return directory / f"{name}.pem"


def expired_certificate(directory: Path, name: str) -> None:
    """Make one that ended yesterday, and its key."""
    key = ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key"]
    sign = ["openssl", "x509", "-req", "-days", "-1", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    request = [*key, "-out", f"{name}.csr", "-subj", f"/CN={name}"]
    for command in (request, [*sign, "-in", f"{name}.csr", "-out", f"{name}.pem"]):
        subprocess.run(command, cwd=directory, check=True, capture_output=True)


def trusting(directory: Path) -> ssl.SSLContext:
    """Return what a consumer or a worker speaks TLS with who trusts the directory's `ca.pem`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(directory / "ca.pem")
    return context


HANDSHAKE = (
    b"GET /ptth HTTP/1.1\r\nHost: hub\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%2F1.1\r\n\r\n"
)
OVER_TLS = bool(os.environ.get("POTHEAD_TEST_OVER_TLS"))  # the port for consumers, and PTTH for slots
SCHEME = b"https" if OVER_TLS else b"http"  # of consumers
in_clear_only = pytest.mark.skipif(OVER_TLS, reason="what it does to the connection cannot be done to TLS")
_secure: dict[Address, str] = {}  # what listens there
# ---- Messages that tests send ------------------------------------------------------------------------


def get(path: bytes, *lines: bytes, method: bytes = b"GET", host: bytes = b"pothead.test") -> bytes:
    """Return a consumer's request without a body; `lines` are further field lines."""
    head = (b"%b %b HTTP/1.1" % (method, path), b"Host: %b" % host, *lines)
    return b"\r\n".join(head) + b"\r\n\r\n"


def post(path: bytes, body: bytes, *lines: bytes, method: bytes = b"POST", **options: bytes) -> bytes:
    """Return a consumer's request with a body of known length; see `get`."""
    return get(path, b"Content-Length: %d" % len(body), *lines, method=method, **options) + body


def request(start: str = "GET /", *fields: str, body: bytes = b"") -> bytes:
    """Return a request as a hub passes it on; `start` is its first line without the version."""
    if body:
        fields = (*fields, f"Content-Length: {len(body)}")
    lines = [f"{start} HTTP/1.1", "Host: example.org", "X-Request-Id: r1", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def chunked(*pieces: bytes) -> bytes:
    """Return a chunked body, whole."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def is_line(text: str) -> Callable[[str], bool]:
    """Return the predicate of a program's line that has `text` in it."""
    return lambda line: text in line


# ---- A peer that speaks raw bytes --------------------------------------------------------------------


class Peer:
    """One end of a TCP connection, scripted: a consumer, or a worker slot that dialled the hub."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.received = bytearray()

    @classmethod
    def connect(
        cls, address: Address, context: ssl.SSLContext | None = None, *, host: str = "127.0.0.1"
    ) -> Peer:
        """Connect from `host`, over TLS with a `context` or if a program under test speaks it there.

        At a PTTH port that `--over-tls` has put in the place of a worker port, a slot shakes hands.
        """
        secure = _secure.get(address)
        # A port that is bound before is a port less for everybody.
        source = None if host == "127.0.0.1" else (host, 0)
        sock = socket.create_connection(address, DEADLINE_S, source)
        if context is None and secure is None:
            return cls(sock)
        peer = cls(TlsSocket(sock, context or trusting(authority())))  # type: ignore[arg-type]
        if secure == "ptth":
            peer.send(HANDSHAKE)
            assert peer.read_head().startswith(b"HTTP/1.1 101 "), peer.received
        return peer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    @property
    def address(self) -> Address:
        """This end's own address, as the other end sees it."""
        return self.sock.getsockname()[:2]

    # -- sending and leaving

    def send(self, data: bytes | memoryview) -> None:
        self.sock.sendall(data)

    def ask(self, data: bytes) -> Response:
        """Send a request and return the response to it."""
        self.send(data)
        return self.read_response(data.partition(b" ")[0])

    def finish_sending(self) -> None:
        """Send FIN and keep reading."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Leave with RST, as a crashed machine's kernel would."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    # -- expecting bytes

    def has_bytes(self) -> bool:
        """Whether something has come that was not read."""
        self.sock.setblocking(False)
        try:
            return bool(self.received or self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self.sock.settimeout(DEADLINE_S)

    def expect(self, wanted: bytes) -> None:
        """Read as many bytes as `wanted` has, and compare; a difference shows as soon as it arrives."""
        while len(self.received) < len(wanted) and wanted.startswith(self.received):
            if not self._receive():
                got = bytes(self.received)
                raise AssertionError(f"wanted {wanted!r}, the other end closed after {got!r}")
        got = bytes(self.received[: len(wanted)])
        assert got == wanted, f"wanted {wanted!r}, got {got!r}"
        del self.received[: len(wanted)]

    def expect_eof(self) -> None:
        """Expect the other end to close, with FIN or RST, without another byte."""
        rest = self.read_to_end()
        assert rest == b"", f"wanted the end of the connection, got {rest!r}"

    def read_exactly(self, count: int) -> bytes:
        while len(self.received) < count:
            self._receive_more(f"{count} bytes")
        return self._take(count)

    def read_until(self, end: bytes) -> bytes:
        """Return everything up to and including `end`."""
        searched = 0
        while (found := self.received.find(end, searched)) < 0:
            searched = max(0, len(self.received) - len(end) + 1)
            self._receive_more(repr(end))
        return self._take(found + len(end))

    def read_to_end(self) -> bytes:
        """Return what comes until the other end closes; a reset counts as a close."""
        while self._receive():
            pass
        return self._take(len(self.received))

    # -- expecting messages

    def read_head(self) -> bytes:
        """Return a head's lines with the empty line that ends them."""
        return self.read_until(b"\r\n\r\n")

    def read_response(self, method: bytes = b"GET") -> Response:
        """Return the next response, interim ones included, to a request with `method`."""
        lines = self.read_head()[:-4].split(b"\r\n")
        match = STATUS_LINE.fullmatch(lines[0])
        assert match, f"not a status line: {lines[0]!r}"
        minor_version, status, reason = int(match[1]), int(match[2]), match[3]
        fields = parse_fields(lines[1:])
        has_no_body = method == b"HEAD" or status < 200 or status in (204, 304)
        body = b"" if has_no_body else self._read_body(fields, until_close=True)
        return Response(fields, body, status, reason, minor_version)

    def read_request(self) -> Request:
        """Return the next request, as a worker sees it."""
        lines = self.read_head()[:-4].split(b"\r\n")
        match = REQUEST_LINE.fullmatch(lines[0])
        assert match, f"not a request line: {lines[0]!r}"
        fields = parse_fields(lines[1:])
        return Request(fields, self._read_body(fields, until_close=False), match[1], match[2], int(match[3]))

    def _read_body(self, fields: Fields, until_close: bool) -> bytes:
        lengths = [value for name, value in fields if name.lower() == b"content-length"]
        codings = [value for name, value in fields if name.lower() == b"transfer-encoding"]
        assert len(lengths) + len(codings) <= 1, f"ambiguous framing: {fields!r}"
        if codings:
            assert codings == [b"chunked"], f"unexpected coding: {codings!r}"
            return self._read_chunks()
        if lengths:
            assert re.fullmatch(rb"[0-9]+", lengths[0]), f"bad length: {lengths[0]!r}"
            return self.read_exactly(int(lengths[0]))
        return self.read_to_end() if until_close else b""

    def _read_chunks(self) -> bytes:
        body = bytearray()
        while True:
            line = self.read_until(b"\r\n")[:-2]
            assert CHUNK_SIZE.fullmatch(line), f"bad chunk size: {line!r}"
            size = int(line, 16)
            if size == 0:
                self.expect(b"\r\n")
                return bytes(body)
            body += self.read_exactly(size)
            self.expect(b"\r\n")

    # -- the socket

    def _receive(self) -> bool:
        """Receive once; False at the end of the connection."""
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            return False
        except TimeoutError:
            got, deadline_s = bytes(self.received), self.sock.gettimeout()
            raise AssertionError(f"nothing came for {deadline_s} s after {got!r}") from None
        self.received += data
        return bool(data)

    def _receive_more(self, wanted: str) -> None:
        if not self._receive():
            got = bytes(self.received)
            raise AssertionError(f"wanted {wanted}, the other end closed after {len(got)}: {got[-2000:]!r}")

    def _take(self, count: int) -> bytes:
        data = bytes(memoryview(self.received)[:count])
        del self.received[:count]
        return data


def ask(peer: Peer, start: str = "GET /", *fields: str, body: bytes = b"") -> Response:
    """Ask a worker as a hub does; see `request`."""
    return peer.ask(request(start, *fields, body=body))


def fetch(address: Address, data: bytes) -> Response:
    """Ask on a connection of its own."""
    with Peer.connect(address) as peer:
        return peer.ask(data)


def serve(slot: Peer, response: bytes = OK) -> Request:
    """Take the next request as a worker, and answer it."""
    taken = slot.read_request()
    slot.send(response)
    return taken


class Listener:
    """Stands in for a hub: workers dial its address, and the test plays the hub on what `accept` returns."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.sock.settimeout(DEADLINE_S)
        self.worker: Address = self.sock.getsockname()[:2]

    def accept(self) -> Peer:
        return Peer(self.sock.accept()[0])

    def turn_away(self) -> None:
        """Close the connections that wait for being accepted: a worker need not wait for requests there."""
        with contextlib.suppress(OSError):  # the test may have closed it
            self.sock.settimeout(0)
            with contextlib.suppress(BlockingIOError):  # there are no more
                while True:
                    self.accept().close()
            self.sock.settimeout(DEADLINE_S)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.close()


@contextlib.contextmanager
def reserved_port() -> Iterator[str]:
    """Yield a port for hubs with --reuse-port, one after the other: in between, nobody else is given it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))  # and does not listen: who dials it is refused
        yield str(sock.getsockname()[1])


def parse_fields(lines: list[bytes]) -> Fields:
    fields = []
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        assert match, f"not a field line: {line!r}"
        fields.append((match[1], match[2]))
    return fields


def field_lines(fields: Fields) -> bytes:
    """Return the fields as lines, for a head that a test writes."""
    return b"".join(b"%b: %b\r\n" % field for field in fields)


# ---- The programs under test -------------------------------------------------------------------------


class Program:
    """A running process whose output is collected in threads, so that it never blocks on a full pipe."""

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.process = subprocess.Popen(
            arguments,
            cwd=cwd,
            pass_fds=pass_fds,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.may_have_ended = False
        self._changed = threading.Condition()
        self._open_pipes = 2
        self._readers = [
            threading.Thread(target=self._collect, args=pipe, daemon=True)
            for pipe in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        return "".join(f"{line}\n" for line in self.errors)

    def wait_for_line(self, predicate: Callable[[str], object], deadline_s: float = DEADLINE_S) -> str:
        """Return the first line of stdout, past or future, that satisfies `predicate`."""
        return self._wait_for(self.lines, predicate, deadline_s)

    def wait_for_error(self, predicate: Callable[[str], object], deadline_s: float = DEADLINE_S) -> str:
        """Return the first line of stderr, past or future, that satisfies `predicate`."""
        return self._wait_for(self.errors, predicate, deadline_s)

    def send_signal(self, number: signal.Signals) -> None:
        self.may_have_ended = True
        self.process.send_signal(number)

    def suspend(self) -> None:
        """Stop it until SIGCONT. It stands still when this returns, and not yet when the signal is sent."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def terminate(self) -> None:
        """Ask for a drain; `wait` tells how it ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Return the exit status, once everything the process wrote has been collected."""
        self.may_have_ended = True
        status = self.process.wait(deadline_s)
        for reader in self._readers:
            reader.join(deadline_s)
        return status

    def stop(self) -> None:
        """End the process, whatever it is doing; fail the test if it had ended by itself or complained."""
        ended_by_itself = self.process.poll() is not None and not self.may_have_ended
        try:
            if self.process.poll() is None:
                self._interrupt()
            self.wait()
        finally:
            self.process.kill()
            self.process.wait()
            self._close_pipes()
        assert not ended_by_itself, f"ended by itself with status {self.process.returncode}: {self.stderr}"
        assert "Traceback" not in self.stderr and "ResourceWarning" not in self.stderr, self.stderr

    def _interrupt(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGINT)

    def _collect(self, pipe: IO[str], lines: list[str]) -> None:
        for line in pipe:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._open_pipes -= 1
            self._changed.notify_all()

    def _wait_for(self, lines: list[str], predicate: Callable[[str], object], deadline_s: float) -> str:
        ends_at = time.monotonic() + deadline_s
        seen = 0
        with self._changed:
            while True:
                for line in lines[seen:]:
                    if predicate(line):
                        return line
                seen = len(lines)
                if not self._open_pipes or not self._changed.wait(ends_at - time.monotonic()):
                    break
        ended = "the process ended" if self.process.poll() is not None else f"nothing in {deadline_s} s"
        raise AssertionError(f"{ended}; no such line in {lines!r}; stderr: {self.stderr}")

    def _close_pipes(self) -> None:
        """Close the pipes; a reader whose pipe a grandchild still holds is left to it."""
        for reader, pipe in zip(self._readers, (self.process.stdout, self.process.stderr), strict=True):
            reader.join(DEADLINE_S)
            assert not reader.is_alive(), f"a descendant of {self.process.args!r} outlived it"
            assert pipe is not None
            pipe.close()


def until(look: Callable[[], T], holds: Callable[[T], object] = bool, deadline_s: float = DEADLINE_S) -> T:
    """Look until what is seen is as wanted, and return that: for what nobody tells of.

    After a look in vain the processor is left to those who shall bring it about, longer each time.
    """
    ends_at = time.monotonic() + deadline_s
    pause_s = 0.001
    while not holds(seen := look()):
        assert time.monotonic() < ends_at, seen
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.02)
    return seen


Stats = dict[str, Any]  # what the hub's /stats says


class HubProcess(Program):
    """A hub on free ports: `main`, `worker` and `admin` are its addresses, `lines` its access log too."""

    LISTENING = re.compile(
        r'(?:listening |{"time": "[^"]+", "listening": ")(consumers|workers|admin|ptth)(?:=|", "address": ")'
        r'\[?(.+?)\]?:([0-9]+)(?:"})?'
    )

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        super().__init__(arguments, cwd, environment, pass_fds)
        self.main: Address = ("", 0)
        self.worker: Address = ("", 0)
        self.admin: Address = ("", 0)
        self.ptth: Address = ("", 0)

    def wait_until_ready(self, has_admin: bool = True) -> None:
        self.main = self._read_address("consumers")
        self.worker = self._read_address("workers")
        if "--ptth-port" in self.process.args:
            self.ptth = self._read_address("ptth")
        if OVER_TLS and "--ptth-port" in self.process.args:
            self.worker = self.ptth
            _secure[self.main], _secure[self.ptth] = "main", "ptth"
        if has_admin:
            self.admin = self._read_address("admin")

    @property
    def slots(self) -> Address:
        """Where workers connect: to the PTTH port, if there is one."""
        return self.ptth if self.ptth[1] else self.worker

    def _read_address(self, role: str) -> Address:
        matches = map(
            self.LISTENING.fullmatch, [self.wait_for_line(lambda line: self._is_address(role, line))]
        )
        return next((match[2], int(match[3])) for match in matches if match)

    def _is_address(self, role: str, line: str) -> bool:
        match = self.LISTENING.fullmatch(line)
        return match is not None and match[1] == role

    def ask_admin(self, path: bytes, *lines: bytes, method: bytes = b"GET") -> Response:
        return fetch(self.admin, get(path, *lines, method=method, host=b"localhost"))

    def stats(self) -> Stats:
        """Return the admin port's `/stats`."""
        response = self.ask_admin(b"/stats")
        assert response.status == 200, response
        stats: Stats = json.loads(response.body)
        return stats

    def until(self, holds: Callable[[Stats], object], deadline_s: float = DEADLINE_S) -> Stats:
        """Ask for `/stats` until they are as wanted."""
        return until(self.stats, holds, deadline_s)


@contextlib.contextmanager
def dial(hub: HubProcess, host: str = "127.0.0.1") -> Iterator[Peer]:
    """Connect a slot from the loopback address `host`; the hub knows of it."""
    with Peer.connect(hub.worker, host=host) as slot:
        address = f"{host}:{slot.address[1]}"
        hub.until(lambda stats: address in [each["address"] for each in stats["workers"]], 2 * DEADLINE_S)
        yield slot


class WorkerProcess(Program):
    """A worker that dials the given hub."""

    stand_in: Listener | None = None

    def _interrupt(self) -> None:
        super()._interrupt()
        if self.stand_in:
            self.stand_in.turn_away()


@dataclass(frozen=True)
class Ended:
    """What is left of a process."""

    status: int
    lines: list[str]
    stderr: str


def run_to_end(
    command: list[str],
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    may_complain: bool = False,
) -> Ended:
    """Run a program to its end, which must come by itself and, unless it may complain, with no traceback."""
    program = Program(command, cwd, environment)
    program.may_have_ended = True
    with running(program):
        ended = Ended(program.wait(), list(program.lines), program.stderr)
        if may_complain:
            program.errors.clear()
    return ended


def python(*arguments: str) -> list[str]:
    """Return the command of an interpreter like this one that reports every warning as an error."""
    return [sys.executable, "-u", "-W", "error", *arguments]


@functools.cache
def compiled(name: str) -> str:
    """Return the path of one of the programs as Python has compiled it, once for all the tests here.

    Python does that anew each time it is given a program's text, which is a third of the start. The text lies
    beside it, for whoever imports it, and so that a measurement of coverage knows what is run.
    """
    directory = Path(tempfile.mkdtemp(prefix="pothead-test-"))
    atexit.register(shutil.rmtree, directory)
    for text in (ROOT / each for each in ("gating.py", "pothead.py", "pothead_worker.py")):
        (directory / text.name).symlink_to(text)
    target = directory / f"{name}.pyc"
    py_compile.compile(str(ROOT / f"{name}.py"), str(target), doraise=True)
    return str(target)


def program(name: str, limits: Mapping[str, float] | None = None) -> list[str]:
    """Return the command of a program, perhaps with other `limits`: half a minute teaches nothing.

    They are fields of the hub's LIMITS, and constants of the worker.
    """
    if not limits:
        return python(compiled(name))
    change = f"vars(program).update({dict(limits)})"
    if name == "pothead":
        change = f"program.LIMITS = dataclasses.replace(program.LIMITS, **{dict(limits)})"
    load = f"import dataclasses, sys; sys.path.insert(0, {str(ROOT)!r}); import {name} as program"
    return python("-c", f"{load}; {change}; sys.exit(program.main())")


@contextlib.contextmanager
def hub_process(
    *options: str,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    limits: Mapping[str, float] | None = None,
) -> Iterator[HubProcess]:
    """Run pothead.py on free ports with further `options`, which a `-- command …` may end; it is ready."""
    ports = ["--main-port", "0", "--worker-port", "0", "--admin-port", "0"]
    if OVER_TLS and "--certfile" not in options:
        files = [str(authority() / name) for name in ("hub.pem", "hub.key")]
        ports += ["--certfile", files[0], "--keyfile", files[1], "--tls", "main,ptth"]
        ports += [] if "--ptth-port" in options else ["--ptth-port", "0"]
    hub = HubProcess([*program("pothead", limits), *ports, *options], cwd, environment)
    try:
        with running(hub):
            hub.wait_until_ready(has_admin=("--admin-port", "off") not in pairwise(options))
            yield hub
    finally:  # another program may be given its ports
        for address in (hub.main, hub.ptth):
            _secure.pop(address, None)


@contextlib.contextmanager
def worker_process(
    hub: HubProcess | Listener,
    *arguments: str,
    cwd: Path = ROOT / "test",
    environment: dict[str, str] | None = None,
    limits: Mapping[str, float] | None = None,
) -> Iterator[WorkerProcess]:
    """Run pothead_worker.py against `hub`. Applications are looked up in `cwd`."""
    host, port = hub.worker
    command = [*program("pothead_worker", limits), "--connect", f"{host}:{port}", *arguments]
    if (host, port) in _secure:
        command[-len(arguments) - 1 :] = [f"https://{host}:{port}", *arguments]
        command += ["--cafile", str(authority() / "ca.pem")]
    worker = WorkerProcess(command, cwd, environment)
    worker.stand_in = hub if isinstance(hub, Listener) else None
    with running(worker):
        yield worker


@contextlib.contextmanager
def running(program: ProgramT) -> Iterator[ProgramT]:
    """Stop `program` at the end, even when the test has failed already."""
    try:
        yield program
    except BaseException:
        with contextlib.suppress(Exception):
            program.stop()
        print(f"stderr of {program.process.args!r}:\n{program.stderr}", file=sys.stderr)
        raise
    program.stop()


# ---- What the system tells of a process (Linux) ------------------------------------------------------


def status_value(pid: int, name: str) -> int:
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith(name)]
    return int(line.split()[1])


def resident_kib(pid: int) -> int:
    return status_value(pid, "VmRSS:")


def wake_ups(pid: int) -> int:
    return status_value(pid, "voluntary_ctxt_switches")


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def descriptors(pid: int) -> int:
    """Return how many descriptors the process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def until_asleep(pid: int) -> None:
    """Wait until the process has nothing left to do: asleep, and not woken between two looks."""
    ends_at = time.monotonic() + DEADLINE_S
    before = -1
    while (now := wake_ups(pid)) != before:
        assert time.monotonic() < ends_at
        before = now
        signal.sigtimedwait([], 0.05)
