"""PTTH and TLS: how the worker asks to be one, what it says of refusals, and that all modes work over TLS.

The hub is scripted in raw bytes, below TLS and above it.
"""

from __future__ import annotations

import contextlib
import email.utils
import itertools
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_worker import Lines, hello, lines, request, running_pool

import pothead_worker
import wire
from pothead_worker import Credentials, Secret

__all__ = ["lines"]  # a fixture

SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%2F1.1\r\n\r\n"
)
ASKING = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%%2F1.1\r\n"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="request processes need Linux")


# ---- Certificates, and a hub that speaks TLS ---------------------------------------------------------


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities and what they have signed: NAME.pem with its key in NAME.key."""
    directory = tmp_path_factory.mktemp("certificates")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("ca", "other-ca"):
        openssl(
            *(directory, "req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            *("-days", "30", "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
    for name, san, authority, days in (
        ("hub", "DNS:localhost,IP:127.0.0.1", "ca", "30"),
        ("hub-of-others", "DNS:localhost", "other-ca", "30"),
        ("hub-elsewhere", "DNS:other.example", "ca", "30"),
        ("hub-expired", "DNS:localhost", "ca", "-1"),
        ("worker", "DNS:worker-1.example,DNS:localhost", "ca", "30"),
        ("worker-expired", "DNS:worker-1.example", "ca", "-1"),
    ):
        (directory / "extensions").write_text(f"subjectAltName={san}\nbasicConstraints=CA:FALSE\n")
        openssl(directory, "req", *key, "-new", "-keyout", f"{name}.key", "-out", "csr", "-subj", "/CN=x")
        openssl(
            *(directory, "x509", "-req", "-in", "csr", "-CA", f"{authority}.pem", "-CAkey"),
            *(f"{authority}.key", "-CAcreateserial", "-days", days, "-extfile", "extensions"),
            *("-out", f"{name}.pem"),
        )
    openssl(directory, "ec", "-in", "worker.key", "-aes256", "-passout", "pass:x", "-out", "locked.key")
    return directory


class TlsPeer(wire.Peer):
    """The hub's end of a worker's connection over TLS. `raw` is the TCP connection below."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self.raw = socket.socket(fileno=sock.detach())
        self.raw.settimeout(wire.DEADLINE_S)
        self.sock = context.wrap_socket(self.raw, server_side=True, suppress_ragged_eofs=False)
        self.raw = self.sock

    def finish_sending(self) -> None:
        """Send FIN without close_notify."""
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def say_goodbye(self) -> None:
        """Send close_notify, and no FIN."""
        self.sock.settimeout(0)
        with contextlib.suppress(ssl.SSLError):  # there is no answer yet, or data instead
            self.sock.unwrap()
        self.sock.settimeout(wire.DEADLINE_S)

    def ends_with_close_notify(self) -> bool:
        try:
            rest = self.sock.recv(1)
        except ssl.SSLZeroReturnError:
            return True
        except (ssl.SSLEOFError, ConnectionResetError):
            return False
        assert rest == b"", rest
        return True


class Hub:
    """A scripted hub that speaks PTTH, over TLS with a context."""

    def __init__(self, listener: wire.Listener, context: ssl.SSLContext | None = None) -> None:
        self.listener = listener
        self.context = context
        self.port = listener.worker[1]

    @property
    def worker(self) -> str:
        """What a pool is told to connect to."""
        return self.url

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self.context else f"http://127.0.0.1:{self.port}"

    def accept_unswitched(self) -> wire.Peer:
        """Return the next connection, of which nothing has been read but TLS."""
        sock = self.listener.sock.accept()[0]
        return TlsPeer(sock, self.context) if self.context else wire.Peer(sock)

    def accept_asking(self) -> wire.Peer:
        """Return it with the worker's request read."""
        peer = self.accept_unswitched()
        head = peer.read_head()
        assert head.startswith(b"GET ") and not peer.received
        return peer

    def accept(self) -> wire.Peer:
        """Return it switched, so that it waits for a request."""
        peer = self.accept_asking()
        peer.send(SWITCH)
        return peer


def context_for(certificates: Path, name: str = "hub", **settings: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    for setting, value in settings.items():
        setattr(context, setting, value)
    return context


@pytest.fixture
def plain_hub(listener: wire.Listener) -> Hub:
    return Hub(listener)


@pytest.fixture(params=["plain", "tls"])
def hub(request: pytest.FixtureRequest, listener: wire.Listener, certificates: Path) -> Hub:  # type: ignore[misc]
    return Hub(listener, context_for(certificates) if request.param == "tls" else None)


@pytest.fixture
def tls_hub(listener: wire.Listener, certificates: Path) -> Hub:
    return Hub(listener, context_for(certificates))


@pytest.fixture
def pool_for(certificates: Path) -> Iterator[Callable[..., pothead_worker.WorkerPool]]:
    """Run a pool in this process that connects to a scripted hub and trusts this session's authority."""
    with contextlib.ExitStack() as stack:

        def run(hub: Hub, app: Any = hello, **options: Any) -> pothead_worker.WorkerPool:
            credentials = {"cafile": str(certificates / "ca.pem"), **options.pop("credentials", {})}
            options["credentials"] = Credentials(**credentials)
            return stack.enter_context(running_pool(app, hub, **options))

        yield run


def ask(peer: wire.Peer, start: str = "GET /", *fields: str, body: bytes = b"") -> wire.Response:
    peer.send(request(start, *fields, body=body))
    return peer.read_response(start.split()[0].encode())


def send_while_receiving(peer: wire.Peer, data: bytes) -> None:
    """Send what is answered while it is sent; in one thread, since an SSLSocket may not have two."""
    left = memoryview(data)
    peer.sock.settimeout(0)
    while left:
        select.select([peer.sock], [peer.sock], [], wire.DEADLINE_S)
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
            left = left[peer.sock.send(left[:16384]) :]
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            peer.received += peer.sock.recv(1 << 18)
    peer.sock.settimeout(wire.DEADLINE_S)


# ---- What the worker says ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "credentials", "target", "more"),
    [
        ("", {}, b"/ptth", b""),
        ("/", {}, b"/ptth", b""),
        ("/hub/workers?pool=1", {}, b"/hub/workers?pool=1", b""),
        ("", {"token": Secret("s3-cr.et/+~_==")}, b"/ptth", b"Authorization: Bearer s3-cr.et/+~_==\r\n"),
        (
            *("", {"origins": ("https://api.example", "http://img.example:8443")}),
            b"/.well-known/ptth/https%3A%2F%2Fapi.example,http%3A%2F%2Fimg.example%3A8443/",
            b"",
        ),
    ],
)
def test_handshake_byte_by_byte(
    path: str, credentials: dict[str, Any], target: bytes, more: bytes, plain_hub: Hub, pool_for: Any
) -> None:
    class Elsewhere(Hub):
        url = plain_hub.url + path

    pool_for(Elsewhere(plain_hub.listener), credentials=credentials)
    with plain_hub.accept_unswitched() as peer:
        peer.expect(ASKING % (target, f"127.0.0.1:{plain_hub.port}".encode()) + more + b"\r\n")
        peer.send(SWITCH)
        assert ask(peer).body == b"hello"
        assert ask(peer).body == b"hello"


def test_token_is_read_again_for_each_connection(plain_hub: Hub, pool_for: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("one\n")
    pool_for(plain_hub, credentials={"token_file": str(tmp_path / "token")})
    for token, next_one in (
        ("one", "two"),
        ("two", ""),
        ("two", "no token\n"),
        ("two", "three"),
        ("three", ""),
    ):
        with plain_hub.accept_unswitched() as peer:
            assert peer.read_head().endswith(b"\r\nAuthorization: Bearer %b\r\n\r\n" % token.encode())
            (tmp_path / "token").write_text(next_one)
            peer.send(SWITCH)
            assert ask(peer, "GET /", "Connection: close").body == b"hello"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://hub.example", ("https", "hub.example", 443, "/", "hub.example")),
        ("HTTPS://hub.example:4443/", ("https", "hub.example", 4443, "/", "hub.example:4443")),
        ("http://[::1]/ptth", ("http", "::1", 80, "/ptth", "[::1]")),
        ("http://[::1]:81", ("http", "::1", 81, "/", "[::1]:81")),
        ("http://hub_1:80/a?b=%20", ("http", "hub_1", 80, "/a?b=%20", "hub_1")),
    ],
)
def test_hub_is_named_by_a_url(text: str, wanted: tuple[str, str, int, str, str]) -> None:
    hub = pothead_worker.parse_hub(text)
    assert isinstance(hub, pothead_worker.HubURL)
    assert (hub.scheme, *hub.address, hub.path, hub.authority) == wanted
    assert pothead_worker.parse_hub(str(hub)) == hub


@pytest.mark.parametrize(
    "text",
    [
        *("ftp://hub", "https://", "https://hub:0", "https://hub:65536", "https://u@hub", "https://hub/a b"),
        *("https://hub/#x", "https://hub:x", "https://.", "https://hüb", "https://hub/\r\nX: y", "https:/h"),
    ],
)
def test_what_is_no_url_of_a_hub_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|neither user"):
        pothead_worker.parse_hub(text)


def test_origins_are_written_as_the_hub_compares_them() -> None:
    text = "HTTPS://API.example:443/, http://x:80,http://[::1]:8080,,https://x:80"
    wanted = ("https://api.example", "http://x", "http://[::1]:8080", "https://x:80")
    assert pothead_worker.parse_args(["--origin", text, "--connect=http://h"], {}).origin == wanted
    repeated = ["--origin", "https://a", "m:app", "--origin=https://b,https://c"]
    assert pothead_worker.parse_args([*repeated, "--connect=http://h"], {}).origin == (
        *("https://a", "https://b"),
        "https://c",
    )
    for wrong in ("api.example", "https://a/b", "null", "https://a?", "https://a b", "wss://a", "https://é"):
        with pytest.raises(pothead_worker.UsageError, match=r"--origin: .* is not an origin"):
            pothead_worker.parse_args(["--origin", wrong], {})


# ---- The hub's answer --------------------------------------------------------------------------------


def test_first_request_in_the_segment_of_the_answer_is_served(hub: Hub, pool_for: Any) -> None:
    pool_for(hub)
    with hub.accept_asking() as peer:
        peer.send(SWITCH + request("GET /one"))
        assert peer.read_response().body == b"hello"
        assert ask(peer).body == b"hello"


def test_pipelined_requests_in_the_segment_of_the_answer_are_served(hub: Hub, pool_for: Any) -> None:
    pool_for(hub)
    with hub.accept_asking() as peer:
        peer.send(SWITCH + request() * 3)
        for _ in range(3):
            assert peer.read_response().body == b"hello"


def test_answer_cut_at_any_byte_is_one_answer(plain_hub: Hub, pool_for: Any) -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + SWITCH
    pool_for(plain_hub)
    for at in range(1, len(answer)):
        with plain_hub.accept_asking() as peer:
            peer.send(answer[:at])
            select.select([peer.sock], [], [], 0.001)  # which lets the first part go alone
            peer.send(answer[at:] + request("GET /", "Connection: close"))
            assert peer.read_response().body == b"hello"


def test_answer_that_ends_at_any_byte_is_no_answer(plain_hub: Hub, pool_for: Any, lines: Lines) -> None:
    pool_for(plain_hub, workers=20)
    with contextlib.ExitStack() as stack:
        for at in range(0, len(SWITCH) - 1, 7):
            peer = stack.enter_context(plain_hub.accept_asking())
            peer.send(SWITCH[:at])
            peer.finish_sending()
            peer.expect_eof()
    lines.wait_for("closes the connection without an answer")
    assert len(lines.having("WARNING")) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 \r\nconnection: keep-alive, Upgrade\r\nUPGRADE: PTTH\r\nalpn:http%2F1.1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + SWITCH,
    ],
)
def test_answer_may_be_spelt_otherwise(answer: bytes, plain_hub: Hub, pool_for: Any) -> None:
    pool_for(plain_hub)
    with plain_hub.accept_asking() as peer:
        peer.send(answer)
        assert ask(peer).body == b"hello"


def switch(*changes: tuple[bytes, bytes]) -> bytes:
    answer = SWITCH
    for old, new in changes:
        assert old in answer
        answer = answer.replace(old, new)
    return answer


PORT_HINT = "is this the port where it speaks PTTH?"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            switch((b"ALPN: http%2F1.1\r\n", b"")),
            "switches to something else than PTTH: Upgrade: ptth, ALPN: -",
        ),
        (switch((b"%2F", b"%2f")), "Upgrade: ptth, ALPN: http%2f1.1"),
        (switch((b"http%2F1.1", b"h2")), "Upgrade: ptth, ALPN: h2"),
        (switch((b"http%2F1.1", b"http%2F1.1, h2")), "Upgrade: ptth, ALPN: http%2F1.1, h2"),
        (switch((b"1.1\r\n\r", b"1.1\r\nALPN: h2\r\n\r")), "Upgrade: ptth, ALPN: http%2F1.1, h2"),
        (switch((b"Upgrade: ptth", b"Upgrade: websocket")), "Upgrade: websocket, ALPN"),
        (switch((b"Upgrade: ptth\r\n", b"")), "Upgrade: -, ALPN"),
        (switch((b"Connection: upgrade\r\n", b"")), "switches to something else"),
        (switch((b"HTTP/1.1", b"HTTP/1.0")), "switches to something else"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", f"answers 200 OK: hi; {PORT_HINT}"),
        (b"HTTP/1.0 200 OK\r\nServer: nginx\r\n\r\n<html>", "200 OK; this looks like a web server (nginx)"),
        (b"HTTP/1.1 404 Not Found\r\nX-Request-Id: r\r\n\r\n", "the port that a hub has for consumers"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\n404 No: x", "but answers 404 No: x; is"),
        (
            b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\n<>",
            "answers 400 Bad; perhaps it speaks TLS: say https",
        ),
        (b"HTTP/1.1 426 No\r\nContent-Length: 0\r\n\r\n", "does not switch to PTTH, but answers 426 No"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nh\x1b\r\n2\r\ni\n\r\n0\r\n\r\n",
            "200 OK: h i;",
        ),
        (b"HTTP/1.1 500 E\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", "answers 500 E;"),
        (b"HTTP/1.1 102 Processing\r\n\r\n" * 100, "answers with interim responses only"),
        (b"HTTP/1.1 101 " + b"x" * 20_000, "answers with a head that is too long"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is an SSH server"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "speaks TLS; say https://"),
        (bytes.fromhex("000012040000000000000300000064"), "speaks HTTP/2 only"),
        (b"POST /job?x HTTP/1.1\r\nHost: h\r\n\r\n", "its port for silent workers; say HOST:PORT"),
        (
            b"220 mail.example ESMTP\r\n",
            "does not answer as a hub would, but with '220 mail.example ESMTP'",
        ),
    ],
)
def test_what_answers_in_the_hubs_place_is_told_once_and_not_served(
    answer: bytes, told: str, plain_hub: Hub, pool_for: Any, lines: Lines
) -> None:
    pool_for(plain_hub)
    for _ in range(3):
        with plain_hub.accept_asking() as peer:
            with contextlib.suppress(OSError):
                peer.send(answer)
                peer.send(request())
                peer.finish_sending()
            peer.expect_eof()
    assert lines.wait_for("WARNING").startswith(f"WARNING hub {plain_hub.url} ")
    with plain_hub.accept() as peer:
        assert ask(peer).body == b"hello"
    assert len(lines.having("WARNING")) == 1 and told in lines.having("WARNING")[0]
    assert lines.having("WARNING")[0].endswith("; trying again") and lines.having("connected")


def test_reason_of_a_refusal_is_told_without_what_could_harm(
    plain_hub: Hub, pool_for: Any, lines: Lines
) -> None:
    pool_for(plain_hub, credentials={"token": Secret("s3cr3t")})
    reason = "no\r\nWARNING fake\x1b[31m\u2028line, Bearer s3cr3t \u00e9".encode() + b"\xff" + b"y" * 1000
    with plain_hub.accept_asking() as peer:
        peer.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n" % len(reason) + reason)
        peer.expect_eof()
    line = lines.wait_for("refuses this worker")
    assert "401 Unauthorized: no WARNING fake [31m line, Bearer (not shown) é\ufffdyyy" in line
    assert "…; see --token-file and --certfile; trying again" in line
    assert len(line) < 400 and not lines.having("s3cr3t")


def test_reason_that_does_not_come_is_not_waited_for_long(
    plain_hub: Hub, pool_for: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "REASON_TIMEOUT_S", 0.05)
    pool_for(plain_hub)
    with plain_hub.accept_asking() as peer:
        peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 100\r\n\r\nnot you")
        peer.expect_eof()
    lines.wait_for("refuses this worker: 403 Forbidden: not you; see --origin")


def test_silence_is_not_waited_for_longer_than_one_deadline(
    plain_hub: Hub, pool_for: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "CONNECT_TIMEOUT_S", 0.5)
    began_at = time.monotonic()
    pool_for(plain_hub)
    with plain_hub.accept_asking() as peer:
        peer.sock.settimeout(0.1)
        for byte in itertools.cycle(b"HTTP/1.1 103 x\r\nA: b\r\n\r\n"):
            peer.send(bytes([byte]))
            with contextlib.suppress(AssertionError):
                if not peer._receive():
                    break
    assert 0.4 < time.monotonic() - began_at < 5
    lines.wait_for("does not answer within 0.5 s; is this the port where it speaks PTTH")


# ---- When it comes again -----------------------------------------------------------------------------


def pause_after(answer: bytes, hub: Hub, times: int = 1) -> float:
    """Return how long the worker stays away after the last of some refusals."""
    for _ in range(times):
        with hub.accept_asking() as peer:
            peer.send(answer)
            peer.expect_eof()
            refused_at = time.monotonic()
    with hub.accept():
        return time.monotonic() - refused_at


@pytest.mark.parametrize(
    ("start", "least_s", "most_s"),
    [
        (b"401 Unauthorized\r\n", 0.9, 3),
        (b"403 Forbidden\r\n", 0.9, 3),
        (b"429 Too Many Requests\r\nRetry-After: 1\r\n", 1.0, 3),
        (b"503 Service Unavailable\r\nRetry-After: 1\r\n", 1.0, 3),
        (b"503 Service Unavailable\r\nRetry-After: 100000000000000000000000\r\n", 0, 0.8),
        (b"503 Service Unavailable\r\nRetry-After: 99999999\r\n", 1.4, 3),  # at most so long
        (b"503 Service Unavailable\r\nRetry-After: soon\r\n", 0, 0.8),
        (b"503 Service Unavailable\r\n", 0, 0.8),
        (b"404 Not Found\r\nRetry-After: 5\r\n", 0, 0.8),
    ],
)
def test_refused_worker_comes_again_when_it_is_told_to(
    start: bytes, least_s: float, most_s: float, plain_hub: Hub, pool_for: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(pothead_worker, "BACKOFF_REFUSED_S", 0.9)
    monkeypatch.setattr(pothead_worker, "MAX_RETRY_AFTER_S", 1.4)
    pool_for(plain_hub)
    pause_s = pause_after(b"HTTP/1.1 " + start + b"Content-Length: 0\r\n\r\n", plain_hub)
    assert least_s <= pause_s < most_s


def test_retry_after_may_be_a_date() -> None:
    seconds = pothead_worker.retry_after_s(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert 95 < seconds <= 100
    assert pothead_worker.retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert pothead_worker.retry_after_s("Thu, 01 Jan 2970 00:00:00 GMT") == 300
    for nonsense in (
        "",
        "-1",
        "1.5",
        "soon",
        "Thu, 99 Jan 2970 00:00:00 GMT",
        "Thu, 01 Jan 99999 00:00:00 GMT",
    ):
        assert pothead_worker.retry_after_s(nonsense) == 0


def test_slots_that_come_and_go_keep_to_retry_after_too(plain_hub: Hub, pool_for: Any) -> None:
    def gated(environ: Any, start_response: Any) -> Any:
        return hello(environ, start_response)

    gated.wait_for_slot = lambda halt: None  # type: ignore[attr-defined]
    pool_for(plain_hub, gated, poll_jobs=True)
    answer = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
    assert pause_after(answer, plain_hub) >= 1


def test_slot_that_is_refused_is_told_once_while_others_work(lines: Lines) -> None:
    hub = pothead_worker.parse_hub("https://hub.example")
    reachability = pothead_worker.Reachability(hub, 2, "slots=2")
    refused: Any = object()
    working: Any = object()
    for _ in range(3):
        reachability.on_refused(refused, pothead_worker.Refusal("is full", "503"))
        reachability.on_connected(working)
    assert len(lines.having("WARNING hub https://hub.example is full; trying again")) == 1
    assert reachability.is_reached
    reachability.on_refused(working, pothead_worker.Refusal("does not want it", "403"))
    assert not reachability.is_reached
    for seat in (working, refused):
        reachability.on_connected(seat)
    reachability.on_refused(refused, pothead_worker.Refusal("is full", "503"))
    assert len(lines.having("is full")) == 2 and len(lines.having("does not want it")) == 1


# ---- TLS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hub-of-others", "unable to get local issuer certificate"),
        ("hub-elsewhere", "Hostname mismatch, certificate is not valid for 'localhost'"),
        ("hub-expired", "certificate has expired"),
    ],
)
def test_hub_that_is_not_trusted_gets_nothing_and_one_line(
    name: str, told: str, listener: wire.Listener, certificates: Path, pool_for: Any, lines: Lines
) -> None:
    hub = Hub(listener, context_for(certificates, name))
    pool_for(hub, credentials={"token": Secret("s3cr3t")})
    for _ in range(3):
        with contextlib.suppress(ssl.SSLError), hub.accept_unswitched() as peer:
            peer.expect_eof()
    line = lines.wait_for("WARNING")
    assert f"hub {hub.url} has a certificate that is not trusted: {told}" in line
    assert len(lines.having("WARNING")) == 1 and not lines.having("s3cr3t")


def test_hubs_own_certificate_may_be_what_is_trusted(tls_hub: Hub, certificates: Path, pool_for: Any) -> None:
    pool_for(tls_hub, credentials={"cafile": str(certificates / "hub.pem")})
    with tls_hub.accept() as peer:
        assert ask(peer).body == b"hello"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_worker_says_whom_it_wants_and_that_it_speaks_http(
    version: ssl.TLSVersion, tls_hub: Hub, pool_for: Any
) -> None:
    names: list[str | None] = []
    assert tls_hub.context
    tls_hub.context.maximum_version = tls_hub.context.minimum_version = version
    tls_hub.context.set_alpn_protocols(["h2", "http/1.1"])
    tls_hub.context.sni_callback = lambda sock, name, context: names.append(name)  # type: ignore[assignment]
    pool_for(tls_hub)
    with tls_hub.accept() as peer:
        assert isinstance(peer.sock, ssl.SSLSocket)
        assert (names, peer.sock.selected_alpn_protocol()) == (["localhost"], "http/1.1")
        assert ask(peer).body == b"hello"


def test_client_certificate_is_shown(tls_hub: Hub, certificates: Path, pool_for: Any) -> None:
    assert tls_hub.context
    tls_hub.context.load_verify_locations(certificates / "ca.pem")
    tls_hub.context.verify_mode = ssl.CERT_REQUIRED
    files = {"certfile": str(certificates / "worker.pem"), "keyfile": str(certificates / "worker.key")}
    pool_for(tls_hub, credentials=files)
    with tls_hub.accept() as peer:
        assert isinstance(peer.sock, ssl.SSLSocket)
        names = (peer.sock.getpeercert() or {})["subjectAltName"]
        assert ("DNS", "worker-1.example") in names
        assert ask(peer).body == b"hello"


def test_certificates_are_read_again_when_they_have_changed(
    tls_hub: Hub, certificates: Path, pool_for: Any, tmp_path: Path, lines: Lines
) -> None:
    def put(name: str) -> None:
        for suffix in ("key", "pem"):
            (tmp_path / "next").write_bytes((certificates / f"{name}.{suffix}").read_bytes())
            (tmp_path / "next").rename(tmp_path / f"mine.{suffix}")

    assert tls_hub.context
    tls_hub.context.load_verify_locations(certificates / "ca.pem")
    tls_hub.context.verify_mode = ssl.CERT_REQUIRED
    put("worker")
    files = {"certfile": str(tmp_path / "mine.pem"), "keyfile": str(tmp_path / "mine.key")}
    pool_for(tls_hub, credentials=files)
    for shown, next_one in (
        ("worker-1.example", "hub-elsewhere"),
        ("other.example", "worker-expired"),
        ("other.example", ""),
        ("other.example", "worker"),
        ("worker-1.example", ""),
    ):
        with tls_hub.accept() as peer:
            assert isinstance(peer.sock, ssl.SSLSocket)
            assert ("DNS", shown) in (peer.sock.getpeercert() or {})["subjectAltName"]
            if next_one:
                put(next_one)
            assert ask(peer, "GET /", "Connection: close").body == b"hello"
    assert lines.wait_for("expired on") and lines.wait_for("read again")


def test_files_that_could_not_be_read_are_read_for_the_next_connection(tmp_path: Path, lines: Lines) -> None:
    faults: list[Exception] = []

    def make() -> ssl.SSLContext:
        if faults:
            raise faults.pop()
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    (tmp_path / "ca.pem").write_text("one")
    files = pothead_worker.TlsFiles(make, [str(tmp_path / "ca.pem")])
    before = files.context()
    (tmp_path / "ca.pem").write_text("another")
    faults += [FileNotFoundError("it has just gone"), ValueError("too many open files")]
    assert files.context() is files.context() is before
    after = files.context()
    assert files.context() is after is not before
    assert len(lines.having("what was there before")) == 1  # of one change


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_missing_certificate_is_told(
    version: ssl.TLSVersion, tls_hub: Hub, certificates: Path, pool_for: Any, lines: Lines
) -> None:
    assert tls_hub.context
    tls_hub.context.maximum_version = tls_hub.context.minimum_version = version
    tls_hub.context.load_verify_locations(certificates / "ca.pem")
    tls_hub.context.verify_mode = ssl.CERT_REQUIRED
    pool_for(tls_hub)
    sock = tls_hub.listener.sock.accept()[0]
    with pytest.raises(ssl.SSLError), sock:
        TlsPeer(sock, tls_hub.context)
    assert lines.wait_for("WARNING")


def tls_records(data: bytes) -> bool:
    return data[:1] == b"\x16" and data[1:2] == b"\x03"


def test_token_does_not_go_out_where_tls_was_wanted(tls_hub: Hub, pool_for: Any, lines: Lines) -> None:
    pool_for(tls_hub, credentials={"token": Secret("s3cr3t")})
    with tls_hub.listener.accept() as peer:
        hello_record = peer.read_exactly(100)
        assert tls_records(hello_record) and b"s3cr3t" not in hello_record
        peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        peer.finish_sending()
        assert b"GET" not in peer.read_to_end()
    lines.wait_for("answers in HTTP without TLS; say http:// if that is meant")


def test_other_end_that_is_slow_with_tls_is_given_up(
    tls_hub: Hub, pool_for: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "CONNECT_TIMEOUT_S", 0.2)
    pool_for(tls_hub)
    with tls_hub.listener.accept() as peer:
        assert tls_records(peer.read_to_end())
    lines.wait_for("does not answer within 0.2 s")


def test_bodies_of_any_size_come_and_go(hub: Hub, pool_for: Any) -> None:
    def echo(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        while data := environ["wsgi.input"].read(70_001):
            yield data

    pool_for(hub, echo)
    with hub.accept() as peer:
        for size in (1, 16_383, 16_384, 16_385, 65_537, 3_000_000):
            body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            head = request("POST /", f"Content-Length: {size}")
            send_while_receiving(peer, head + body)
            assert peer.read_response(b"POST").body == body


def test_kept_link_takes_requests_that_come_in_one_record(tls_hub: Hub, pool_for: Any) -> None:
    pool_for(tls_hub)
    with tls_hub.accept() as peer:
        for _ in range(20):
            peer.send(request() * 5)
            for _ in range(5):
                assert peer.read_response().body == b"hello"


@pytest.mark.parametrize("end", ["close_notify", "fin", "reset"])
@pytest.mark.parametrize("chunked", [True, False])
def test_body_that_is_cut_off_is_not_whole(
    end: str, chunked: bool, tls_hub: Hub, pool_for: Any, lines: Lines
) -> None:
    read: list[object] = []
    began = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        began.set()
        try:
            read.append(environ["wsgi.input"].read())
        except OSError as exc:
            read.append(exc)
            raise
        return hello(environ, start_response)

    pool_for(tls_hub, app)
    with tls_hub.accept() as peer:
        framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100"
        peer.send(request("POST /", framing) + b"5\r\nabcde\r\n")
        assert began.wait(wire.DEADLINE_S)
        if end == "close_notify":
            assert isinstance(peer, TlsPeer)
            peer.say_goodbye()
        elif end == "fin":
            peer.finish_sending()
        else:
            peer.reset()
    tls_hub.accept().close()
    assert len(read) == 1 and isinstance(read[0], OSError)


def test_idle_link_is_closed_and_opened_again_when_the_hub_says_goodbye(tls_hub: Hub, pool_for: Any) -> None:
    pool_for(tls_hub)
    with tls_hub.accept() as peer:
        assert isinstance(peer, TlsPeer)
        peer.say_goodbye()
        assert peer.ends_with_close_notify()
        with tls_hub.accept() as another:
            assert ask(another).body == b"hello"


def test_drain_ends_a_waiting_link_with_close_notify(tls_hub: Hub, pool_for: Any) -> None:
    pool = pool_for(tls_hub)
    with tls_hub.accept() as peer:
        assert ask(peer).body == b"hello"
        pool.stop()
        assert isinstance(peer, TlsPeer) and peer.ends_with_close_notify()


def test_request_that_crosses_a_halt_in_the_handshake_is_served(
    hub: Hub, pool_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pothead_worker, "CROSSING_S", wire.DEADLINE_S)
    pool = pool_for(hub)
    with hub.accept_asking() as peer:
        pool.stop()
        while not pool.lobby.is_halted:
            signal.sigtimedwait([], 0.01)
        peer.send(SWITCH + request())
        assert peer.read_response().body == b"hello"


def test_last_response_of_a_drain_ends_with_close_notify(tls_hub: Hub, pool_for: Any) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        pool.stop()
        return hello(environ, start_response)

    pool = pool_for(tls_hub, app)
    with tls_hub.accept() as peer:
        response = ask(peer)
        assert (response.body, response.value(b"Connection")) == (b"hello", b"close")
        assert isinstance(peer, TlsPeer) and peer.ends_with_close_notify()


def test_response_that_is_broken_off_ends_without_close_notify(tls_hub: Hub, pool_for: Any) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", "10")])
        return [b"half"]

    pool_for(tls_hub, app)
    with tls_hub.accept() as peer:
        peer.send(request("GET /", "Connection: close"))
        assert peer.read_until(b"\r\n\r\n")
        peer.read_exactly(4)
        assert isinstance(peer, TlsPeer) and not peer.ends_with_close_notify()


@pytest.mark.parametrize("how", ["close", "reset", "close_notify_and_fin"])
def test_app_is_told_within_a_tenth_of_a_second_that_its_consumer_has_gone(
    how: str, tls_hub: Hub, pool_for: Any
) -> None:
    began = threading.Event()
    told_at: list[float] = []

    def app(environ: Any, start_response: Any) -> Any:
        began.set()
        assert environ["pothead.cancelled"].wait(wire.DEADLINE_S)
        told_at.append(time.monotonic())
        return hello(environ, start_response)

    pool_for(tls_hub, app)
    peer = tls_hub.accept()
    peer.send(request("POST /", "Content-Length: 100000") + b"x" * 50_000)
    assert began.wait(wire.DEADLINE_S)
    left_at = time.monotonic()
    if how == "close_notify_and_fin":
        assert isinstance(peer, TlsPeer)
        peer.say_goodbye()
    peer.reset() if how == "reset" else peer.close()
    tls_hub.accept().close()
    assert told_at[0] - left_at < 0.1


def test_consumer_that_leaves_is_seen_by_the_lobby_alone_too(
    tls_hub: Hub, pool_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("select.POLLRDHUP")
    began, told = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        began.set()
        environ["wsgi.input"].read()  # the lobby looks at what this waits for
        if environ["PATH_INFO"] == "/wait" and environ["pothead.cancelled"].wait(wire.DEADLINE_S):
            told.set()
        return hello(environ, start_response)

    pool_for(tls_hub, app)
    with tls_hub.accept() as peer:
        peer.send(request("POST /", "Content-Length: 3"))
        assert began.wait(wire.DEADLINE_S)
        for byte in (b"a", b"b", b"c"):
            signal.sigtimedwait([], 0.06)
            peer.send(byte)
        assert peer.read_response(b"POST").body == b"hello"
        peer.send(request("GET /wait"))
    assert told.wait(wire.DEADLINE_S)


def test_who_looks_whether_the_hub_has_gone_takes_nothing_from_who_waits(certificates: Path) -> None:
    pothead_worker.load_ssl()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(certificates / "hub.pem")
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = pothead_worker.TlsTransport(ours, trusting, "localhost")
        hub = pothead_worker.TlsTransport(theirs, context_for(certificates), None)
        while any([link.shake_hands(), hub.shake_hands()]):
            pass
        hub.send(b"ab")
        assert (link.peek(), link.peek(), link.take(1)) == (b"a", b"a", b"a")
        assert (link.take(9), link.take(9), link.peek()) == (b"b", None, None)
        assert link.take(9, will_wait=True) is None  # and now waits for the socket
        hub.send(b"c")
        assert link.peek() is None
        assert link.recv(9) == b"c"
        hub.say_goodbye()
        assert (link.peek(), link.recv(9), link.has_news(False)) == (b"", b"", True)


@pytest.fixture
def s_server(certificates: Path) -> Iterator[Callable[..., Any]]:
    """OpenSSL's own server on a free port, which sends what it is told, and KeyUpdates."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> OpenSSLServer:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", "hub.pem", "-key"]
            output, theirs = os.openpty()  # to a pipe it would write late
            stack.callback(os.close, output)
            stack.callback(os.close, theirs)
            process = subprocess.Popen(
                [*command, "hub.key", *options], cwd=certificates, stdin=subprocess.PIPE, stdout=theirs
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return OpenSSLServer(port, process, output)

        yield start


@dataclass(frozen=True)
class OpenSSLServer:
    port: int
    process: subprocess.Popen[bytes]
    output: int

    @property
    def worker(self) -> str:
        return f"https://localhost:{self.port}"

    def say(self, data: bytes) -> None:
        """Send bytes with CR before each LF; a line alone that begins with certain letters is an order."""
        assert self.process.stdin
        self.process.stdin.write(data.replace(b"\r\n", b"\n"))
        self.process.stdin.flush()

    def wait_for(self, wanted: bytes) -> None:
        output, ends_at = b"", time.monotonic() + wire.DEADLINE_S
        while wanted not in output:
            ready, _, _ = select.select([self.output], [], [], ends_at - time.monotonic())
            assert ready, output
            output += os.read(self.output, 65536)


@pytest.mark.parametrize("key_update", [b"k\n", b"K\n"])
def test_key_updates_and_tickets_are_no_requests(
    key_update: bytes, s_server: Any, certificates: Path, lines: Lines
) -> None:
    server = s_server("-num_tickets", "5", "-crlf")
    server.wait_for(b"ACCEPT")
    credentials = Credentials(cafile=str(certificates / "ca.pem"))
    with running_pool(hello, server, credentials=credentials):
        server.wait_for(b"ALPN: http%2F1.1")
        server.say(SWITCH)
        lines.wait_for("connected")
        for _ in range(3):
            server.say(key_update)
            server.wait_for(b"SSL_do_handshake -> 1")
            server.say(request())
            server.wait_for(b"hello")
        server.process.kill()


# ---- The modes over TLS ------------------------------------------------------------------------------

APP = """
    import os, subprocess, time, zlib

    def echo(environ):
        while data := environ["wsgi.input"].read(70_001):
            yield data

    def whole(environ):
        yield environ["wsgi.input"].read()

    def checksum(environ):
        crc, size = 0, 0
        while data := environ["wsgi.input"].read(1 << 18):
            crc, size = zlib.crc32(data, crc), size + len(data)
        yield f"{size} {crc}".encode()

    def zeros(environ):
        for _ in range(int(environ["QUERY_STRING"])):
            yield bytes(1 << 20)

    def unread(environ):
        yield b"not read"

    def hang(environ):
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        print("started", os.getpid(), child.pid, flush=True)
        yield b"part"
        time.sleep(60)

    def polite(environ):
        yield b"part"
        assert environ["pothead.cancelled"].wait(60)
        print("cancelled", flush=True)

    def crash(environ):
        yield b"part"
        os._exit(3)

    def address(environ):
        yield environ["REMOTE_ADDR"].encode()

    PAGES = {"/" + page.__name__: page for page in
             (echo, whole, checksum, zeros, unread, hang, polite, crash, address)}

    def app(environ, start_response):
        start_response("200 OK", [("X-Pid", str(os.getpid()))])
        if environ["PATH_INFO"] == "/much":
            return [bytes(300_000)]
        return PAGES[environ["PATH_INFO"]](environ)
"""
PROCESSES = pytest.param(["--use-request-subprocess"], id="processes", marks=linux)
in_both_modes = pytest.mark.parametrize("mode", [pytest.param([], id="threads"), PROCESSES])


@pytest.fixture
def start(tmp_path: Path, certificates: Path) -> Iterator[Callable[..., wire.WorkerProcess]]:
    """Run a worker's process, with further options."""
    (tmp_path / "jobs.py").write_text(textwrap.dedent(APP))
    with contextlib.ExitStack() as stack:

        def start(hub: Hub, *options: str, app: Sequence[str] = ("jobs:app",)) -> wire.WorkerProcess:
            trust = ["--cafile", str(certificates / "ca.pem")]
            command = wire.python(str(wire.ROOT / "pothead_worker.py"), "--connect", hub.url, *trust)
            worker = wire.WorkerProcess([*command, *options, *app], tmp_path)
            return stack.enter_context(wire.running(worker))

        yield start


@in_both_modes
def test_bodies_of_any_size_and_framing_come_and_go(mode: list[str], tls_hub: Hub, start: Any) -> None:
    start(tls_hub, *mode)
    with tls_hub.accept() as peer:
        for size in (0, 1, 16_383, 16_385, 70_000, 2_000_000):
            body = os.urandom(1000) * (size // 1000) + b"x" * (size % 1000)
            send_while_receiving(peer, request("POST /whole", f"Content-Length: {size}") + body)
            assert peer.read_response(b"POST").body == body
            pieces = [body[at : at + 50_000] for at in range(0, size, 50_000)]
            chunks = b"".join([b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces])
            head = request("POST /whole", "Transfer-Encoding: chunked")
            send_while_receiving(peer, head + chunks + b"0\r\nX-T: 1\r\n\r\n" + request("GET /address"))
            assert peer.read_response(b"POST").body == body
            assert peer.read_response().body == b"127.0.0.1"


@in_both_modes
def test_next_request_on_the_heels_of_a_response_is_served(mode: list[str], tls_hub: Hub, start: Any) -> None:
    start(tls_hub, *mode)
    with tls_hub.accept() as peer:
        for _ in range(50):
            assert ask(peer, "POST /echo", body=b"abc").body == b"abc"


@in_both_modes
def test_much_goes_both_ways_in_little_memory(mode: list[str], tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, *mode)
    piece, count = bytes(1 << 20), 200
    with tls_hub.accept() as peer:
        assert ask(peer, "POST /checksum", body=piece).body
        before = wire.status_value(worker.pid, "VmHWM:")
        peer.send(request("POST /checksum", f"Content-Length: {count << 20}"))
        for _ in range(count):
            peer.send(piece)
        assert peer.read_response(b"POST").body.startswith(b"%d " % (count << 20))
        peer.send(request(f"GET /zeros?{count}"))
        peer.read_head()
        left = (count << 20) - len(peer.received)
        while left > 0:
            peer.received.clear()
            assert peer._receive()
            left -= len(peer.received)
        assert wire.status_value(worker.pid, "VmHWM:") - before < 8 << 10


@in_both_modes
def test_hub_that_does_not_read_stops_the_app(mode: list[str], tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, *mode)
    with tls_hub.accept() as peer:
        peer.send(request("GET /zeros?300"))
        peer.read_head()
        wire.until_asleep(worker.pid)
        assert wire.resident_kib(worker.pid) < 100 << 10
        while len(peer.received) < 300 << 20:
            assert peer._receive()


@in_both_modes
def test_body_that_the_app_did_not_read_ends_the_connection_after_the_response(
    mode: list[str], tls_hub: Hub, start: Any
) -> None:
    start(tls_hub, *mode)
    with tls_hub.accept() as peer:
        peer.send(request("POST /unread", f"Content-Length: {1 << 30}") + bytes(1 << 16))
        response = peer.read_response(b"POST")
        assert (response.body, response.value(b"Connection")) == (b"not read", b"close")
    with tls_hub.accept() as peer:
        assert ask(peer, "POST /echo", body=b"abc").body == b"abc"


@in_both_modes
def test_consumer_that_leaves_is_noticed_by_the_app(mode: list[str], tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, *mode)
    with tls_hub.accept() as peer:
        peer.send(request("GET /polite"))
        peer.read_until(b"part")
    worker.wait_for_line(lambda line: line == "cancelled")
    worker.wait_for_error(lambda line: "request r1: the consumer has gone" in line)


@linux
def test_consumer_that_leaves_ends_the_process_and_all_that_it_started(tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, "--use-request-subprocess")
    with tls_hub.accept() as peer:
        peer.send(request("GET /hang"))
        peer.read_until(b"part")
        pids = worker.wait_for_line(lambda line: line.startswith("started")).split()[1:]
        watched = [os.pidfd_open(int(pid)) for pid in pids]
        left_at = time.monotonic()
    for pidfd in watched:
        assert select.select([pidfd], [], [], wire.DEADLINE_S)[0]
        os.close(pidfd)
    assert time.monotonic() - left_at < 1


@linux
def test_process_that_crashes_leaves_a_response_that_is_not_whole(tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, "--use-request-subprocess")
    with tls_hub.accept() as peer:
        peer.send(request("GET /crash"))
        peer.read_until(b"part\r\n")
        assert isinstance(peer, TlsPeer) and not peer.ends_with_close_notify()
    worker.wait_for_error(lambda line: "its process ended with status 3" in line)
    worker.errors.clear()


@linux
def test_process_may_end_before_the_hub_has_read_its_response(tls_hub: Hub, start: Any) -> None:
    tls_hub.listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    start(tls_hub, "--use-request-subprocess")
    with tls_hub.accept() as peer:
        peer.send(request("GET /much"))
        head = peer.read_head()
        pidfd = os.pidfd_open(int(head.partition(b"X-Pid: ")[2].partition(b"\r")[0]))
        assert select.select([pidfd], [], [], wire.DEADLINE_S)[0]
        os.close(pidfd)
        signal.sigtimedwait([], 0.1)  # the worker gets to know it
        peer.read_exactly(int(head.partition(b"Content-Length: ")[2].partition(b"\r")[0]))
        assert ask(peer, "POST /whole", body=b"abc").body == b"abc"


@linux
def test_request_timeout_is_answered_over_tls(tls_hub: Hub, start: Any) -> None:
    start(tls_hub, "--use-request-subprocess", "--request-timeout", "200ms")
    with tls_hub.accept() as peer:
        peer.send(request("POST /checksum", "Content-Length: 5") + b"abc")
        assert peer.read_response(b"POST").status == 504
        assert isinstance(peer, TlsPeer) and peer.ends_with_close_notify()


@in_both_modes
def test_drain_lets_the_request_finish(mode: list[str], tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, *mode)
    with tls_hub.accept() as peer:
        peer.send(request("POST /echo", "Content-Length: 5") + b"ab")
        worker.wait_for_error(lambda line: "connected" in line)
        worker.terminate()
        worker.wait_for_error(lambda line: "draining" in line)
        peer.send(b"cde")
        response = peer.read_response(b"POST")
        assert response.body == b"abcde"
        assert isinstance(peer, TlsPeer) and peer.ends_with_close_notify()
    assert worker.wait() == 0


@pytest.mark.parametrize("framing", ["Content-Length: 2000000", "Transfer-Encoding: chunked"])
def test_forwarded_bodies_flow_both_ways(framing: str, tls_hub: Hub, pool_for: Any) -> None:
    body = os.urandom(1000) * 2000
    sent = body if "Length" in framing else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with wire.Listener() as local:
        pool_for(tls_hub, pothead_worker.Forwarder(f"http://127.0.0.1:{local.worker[1]}"))
        with tls_hub.accept() as peer:
            for _ in range(2):
                sender = threading.Thread(target=peer.send, args=(request("POST /", framing) + sent,))
                sender.start()
                with local.accept() as program:
                    assert program.read_request().body == body
                    program.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + body)
                    sender.join()
                    assert peer.read_response(b"POST").body == body


def test_forwarded_request_is_cut_when_the_consumer_leaves(tls_hub: Hub, pool_for: Any) -> None:
    with wire.Listener() as local:
        pool_for(tls_hub, pothead_worker.Forwarder(f"http://127.0.0.1:{local.worker[1]}"))
        peer = tls_hub.accept()
        peer.send(request("POST /", "Content-Length: 10") + b"abc")
        with local.accept() as program:
            program.read_until(b"abc")
            peer.close()
            program.expect_eof()


def test_gate_opens_one_connection_for_a_request(tls_hub: Hub, pool_for: Any) -> None:
    def gated(environ: Any, start_response: Any) -> Any:
        return hello(environ, start_response)

    gated.wait_for_slot = pothead_worker.CountingGate(1)  # type: ignore[attr-defined]
    pool_for(tls_hub, gated, poll_jobs=True)
    for _ in range(3):
        with tls_hub.accept() as peer:
            response = ask(peer)
            assert (response.body, response.value(b"Connection")) == (b"hello", b"close")
            assert isinstance(peer, TlsPeer) and peer.ends_with_close_notify()


# ---- Responses past the hub --------------------------------------------------------------------------


@in_both_modes
def test_response_is_picked_up_over_tls(
    mode: list[str], tls_hub: Hub, start: Any, certificates: Path
) -> None:
    files = ["--certfile", str(certificates / "worker.pem"), "--keyfile", str(certificates / "worker.key")]
    start(
        tls_hub, *mode, "--redirect-response", "0", "--redirect-host", "localhost", "--redirect-tls", *files
    )
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    for target, wanted in (("POST /echo", b"abc"), ("POST /zeros?20", bytes(20 << 20))):
        with tls_hub.accept() as peer:
            response = ask(peer, target, body=b"abc")
            assert response.status == 303
            location = urllib.parse.urlsplit((response.value(b"Location") or b"").decode())
            assert (location.scheme, location.hostname) == ("https", "localhost")
            assert isinstance(peer, TlsPeer) and peer.ends_with_close_notify()
        with socket.create_connection(("127.0.0.1", location.port or 0)) as sock:
            with wire.Peer(context.wrap_socket(sock, server_hostname="localhost")) as consumer:
                consumer.send(f"GET {location.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert consumer.read_response().body == wanted
                assert consumer.sock.recv(1) == b""


@in_both_modes
def test_consumers_are_sent_to_the_proxy_before_the_worker(mode: list[str], tls_hub: Hub, start: Any) -> None:
    worker = start(tls_hub, *mode, "--redirect-response", "0", "--redirect-url", "https://w.example/films")
    line = worker.wait_for_error(lambda line: "listening redirects=" in line)
    for prefix in ("/films/", "/"):  # which the proxy passes on, or takes away
        with tls_hub.accept() as peer:
            location = (ask(peer, "POST /echo", body=b"abc").value(b"Location") or b"").decode()
        start_of_url, _, key = location.rpartition("/")
        assert (start_of_url, len(key)) == ("https://w.example/films", 43)
        with wire.Peer.connect(("127.0.0.1", int(line.rpartition(":")[2]))) as consumer:
            consumer.send(f"GET {prefix}{key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert consumer.read_response().body == b"abc"


# ---- The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (
            "--connect http://hub.example --token-file token",
            "a token would go to http://hub.example in the clear",
        ),
        ("--connect https://h --token-file none", "'none' cannot be read: No such file or directory"),
        ("--connect https://h --token-file empty", "'empty': this is not a token"),
        ("--connect https://h --token-file ca.key", "'ca.key': this is not a token"),
        ("--connect https://h --cafile none", "--cafile: 'none' cannot be read: No such file or directory"),
        ("--connect https://h --cafile empty", "--cafile: there is no certificate in 'empty'"),
        ("--connect https://h --cafile ca.key", "--cafile: there is no certificate in 'ca.key'"),
        ("--connect https://h --certfile none", "--certfile: 'none' cannot be read"),
        ("--connect https://h --certfile worker.pem --keyfile none", "--keyfile: 'none' cannot be read"),
        (
            "--connect https://h --certfile worker.pem",
            "--certfile: no certificate with its key in 'worker.pem'",
        ),
        (
            *("--connect https://h --certfile worker.pem --keyfile ca.key",),
            "--keyfile: the key in 'ca.key' does not belong to 'worker.pem'",
        ),
        (
            *("--connect https://h --certfile worker.pem --keyfile locked.key",),
            "--keyfile: the key in 'locked.key' is encrypted, and there is nobody to ask",
        ),
        (
            "--connect https://h --certfile worker-expired.pem --keyfile worker-expired.key",
            "has expired on 20",
        ),
        ("--connect https://h --keyfile worker.key", "--keyfile: there is no --certfile"),
        ("--connect h:1 --token-file token", "h:1 is a port where nothing is said"),
        ("--connect h:1 --origin https://a", "h:1 is a port where nothing is said"),
        ("--connect https://h/path --origin https://a", "the origins stand in the path"),
        ("--connect https://a..b", "'a..b' is not the name of a host"),
        ("--connect https://u:s3cr3t@h", "--connect: a hub's URL has neither user nor password"),
        ("--connect https://h --redirect-tls", "--redirect-tls: there is no --redirect-response"),
        (
            "--connect https://h --redirect-tls --redirect-response 0",
            "--redirect-tls: there is no --certfile",
        ),
        (
            "--connect https://h --redirect-url x --redirect-response 0",
            "--redirect-url: 'x' is not HOST:PORT",
        ),
    ],
)
def test_credentials_that_cannot_be_used_end_it_with_one_line(
    options: str, wanted: str, certificates: Path
) -> None:
    (certificates / "token").write_text("s3cr3t\n")
    (certificates / "empty").write_text("")
    command = wire.python(str(wire.ROOT / "pothead_worker.py"), *options.split(), "pothead_worker:demo_app")
    ended = subprocess.run(command, cwd=certificates, capture_output=True, text=True, timeout=wire.DEADLINE_S)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended
    assert wanted in ended.stderr and "s3cr3t" not in ended.stderr


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "[::1]", "a.localhost"]
)
def test_token_may_go_to_loopback_in_the_clear(host: str) -> None:
    hub = pothead_worker.parse_hub(f"http://{host}:1")
    assert pothead_worker.introduce(hub, Credentials(token=Secret("x")))


@pytest.mark.parametrize(
    "host", ["hub", "127.0.0.1.example", "10.0.0.1", "[::2]", "localhost.example", "127.1"]
)
def test_token_may_go_nowhere_else(host: str) -> None:
    with pytest.raises(ValueError, match="in the clear"):
        pothead_worker.introduce(pothead_worker.parse_hub(f"http://{host}:1"), Credentials(token=Secret("x")))


def test_token_is_not_shown_by_check_and_not_left_to_the_app(tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text(
        "import os\nprint(os.environ.get('POTHEAD_WORKER_TOKEN'))\ndef app(e, s): pass\n"
    )
    command = wire.python(str(wire.ROOT / "pothead_worker.py"), "--check", "mod:app")
    environment = {"POTHEAD_WORKER_TOKEN": "s3cr3t", "POTHEAD_WORKER_CONNECT": "https://h"}
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=wire.DEADLINE_S,
    )
    assert ended.returncode == 0 and ended.stderr == ""
    assert ended.stdout.startswith("None\n")
    assert "POTHEAD_WORKER_TOKEN (not shown) (POTHEAD_WORKER_TOKEN)" in ended.stdout
    assert "s3cr3t" not in ended.stdout


def test_worker_without_tls_does_not_import_it() -> None:
    script = (
        "import pothead_worker as w\n"
        "w.WorkerPool(w.demo_app, 'http://localhost:1', credentials=w.Credentials(token=w.Secret('x')))\n"
        "assert 'ssl' not in vars(w)\n"
        "w.WorkerPool(w.demo_app, 'https://localhost:1')\n"
        "assert 'ssl' in vars(w)\n"
    )
    subprocess.run(wire.python("-c", script), cwd=wire.ROOT, check=True, timeout=wire.DEADLINE_S)
