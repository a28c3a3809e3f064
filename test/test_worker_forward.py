"""--forward: a local HTTP program in the place of an app. Hub and program are scripted in raw bytes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_worker import Lines, lines, running_pool

import pothead_worker
import wire
from wire import Peer, request

__all__ = ["lines"]  # a fixture

DOWN = b"502 Bad Gateway: the service behind the worker cannot be reached.\nrequest id: r1\n"
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Forwarding:
    """A worker between this test's hub (`peer`) and this test's local program (`local`)."""

    def __init__(self, local: wire.Listener, peer: Peer) -> None:
        self.local = local
        self.peer = peer

    def pass_on(self, data: bytes, answer: bytes) -> Peer:
        """Send a request and have the program answer on a new connection, which is returned."""
        self.peer.send(data)
        program = self.local.accept()
        program.read_head()
        program.send(answer)
        return program


@pytest.fixture
def forwarding(listener: wire.Listener) -> Iterator[Forwarding]:
    with wire.Listener() as local:
        forwarder = pothead_worker.Forwarder(f"http://{local.worker[0]}:{local.worker[1]}")
        with running_pool(forwarder, listener), listener.accept() as peer:
            yield Forwarding(local, peer)


# ---- Requests and responses, byte by byte ------------------------------------------------------------


def test_request_arrives_without_what_concerns_one_connection_only(forwarding: Forwarding) -> None:
    forwarding.peer.send(
        b"PUT /a%20b?c=%2F HTTP/1.1\r\nHost: consumer.example:81\r\nX-Many: 1\r\nX-Many: 2\r\n"
        b"Cookie: a=1\r\nCookie: b=2\r\nConnection: keep-alive, X-Named\r\nX-Named: 1\r\nKeep-Alive: 1\r\n"
        b"TE: trailers\r\nUpgrade: h2c\r\nTrailer: X\r\nContent-Length: 3\r\nX-Latin: \xe9\r\n"
        b"Pothead-Queue-Seconds: 0.5\r\n\r\nabc"
    )
    with forwarding.local.accept() as program:
        program.expect(
            b"PUT /a%20b?c=%2F HTTP/1.1\r\nHost: consumer.example:81\r\nX-Many: 1, 2\r\n"
            b"Cookie: a=1; b=2\r\nContent-Length: 3\r\nX-Latin: \xe9\r\n"
            b"Pothead-Queue-Seconds: 0.5\r\nConnection: close\r\n\r\nabc"
        )
        program.send(HELLO)
        assert forwarding.peer.read_response().body == b"hello"


def test_response_arrives_with_every_field_in_order_and_without_what_concerns_one_connection_only(
    forwarding: Forwarding,
) -> None:
    answer = (
        b"HTTP/1.1 299 So \xe9\r\nSet-Cookie: a=1\r\nServer: it\r\nSet-Cookie: b=2\r\nDate: then\r\n"
        b"Connection: X-Named, keep-alive\r\nX-Named: 1\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\n"
        b"Trailer: X\r\nContent-Length: 5\r\n\r\nhello"
    )
    with forwarding.pass_on(request(), answer):
        forwarding.peer.expect(
            b"HTTP/1.1 299 So \xe9\r\nSet-Cookie: a=1\r\nServer: it\r\nSet-Cookie: b=2\r\nDate: then\r\n"
            b"Content-Length: 5\r\n\r\nhello"
        )


@pytest.mark.parametrize(
    ("start", "answer", "wanted"),
    [
        ("HEAD /", b"200 OK\r\nDate: d\r\nContent-Length: 9\r\n\r\n", None),
        ("HEAD /", b"200 OK\r\nDate: d\r\n\r\n", None),
        (
            "HEAD /",
            b"200 OK\r\nDate: d\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"200 OK\r\nDate: d\r\n\r\n",
        ),
        ("GET /", b"204 No Content\r\nDate: d\r\n\r\n", None),
        ("GET /", b"304 Not Modified\r\nDate: d\r\nETag: x\r\nContent-Length: 9\r\n\r\n", None),
        ("GET /", b"200 \r\nDate: d\r\nContent-Length: 0\r\n\r\n", None),
        (
            "GET /",
            b"200\r\nDate: d\r\nContent-Length: 0\r\n\r\n",
            b"200 \r\nDate: d\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "GET /",
            b"200 OK\r\nContent-Length: 1\r\nDate: d\r\nContent-Length: 1\r\n\r\nx",
            b"200 OK\r\nDate: d\r\nContent-Length: 1\r\n\r\nx",
        ),
        ("GET /", b"200 OK\r\nDate: d\r\nContent_Length: 9\r\nContent-Length: 1\r\n\r\nx", None),
        (
            "GET /",
            b"200 OK\r\nDate: d\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3;x=y\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n",
            b"200 OK\r\nDate: d\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ),
    ],
)
def test_next_request_comes_on_the_same_connection_of_the_hub(
    start: str, answer: bytes, wanted: bytes | None, forwarding: Forwarding
) -> None:
    with forwarding.pass_on(request(start), b"HTTP/1.1 " + answer) as program:
        forwarding.peer.expect(b"HTTP/1.1 " + (wanted or answer))
        program.expect_eof()
    with forwarding.pass_on(request("GET /next"), HELLO):  # a byte too many would show before its response
        assert forwarding.peer.read_response().body == b"hello"


def test_interim_responses_are_swallowed(forwarding: Forwarding) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 \r\n\r\n"
    with forwarding.pass_on(request(), interim + HELLO):
        assert forwarding.peer.read_response().status == 200


@pytest.mark.parametrize("version", [b"0", b"1"])
def test_response_that_ends_with_its_connection_is_sent_in_chunks(
    version: bytes, forwarding: Forwarding
) -> None:
    with forwarding.pass_on(request(), b"HTTP/1.%b 200 OK\r\n\r\nhel" % version) as program:
        assert b"\r\nTransfer-Encoding: chunked\r\n" in forwarding.peer.read_head()
        forwarding.peer.expect(b"3\r\nhel\r\n")
        program.send(b"lo")
        forwarding.peer.expect(b"2\r\nlo\r\n")
    forwarding.peer.expect(b"0\r\n\r\n")
    with forwarding.pass_on(request(), HELLO):
        assert forwarding.peer.read_response().body == b"hello"


# ---- Bodies flow -------------------------------------------------------------------------------------


def test_each_piece_of_a_request_is_passed_on_before_the_next_comes(forwarding: Forwarding) -> None:
    forwarding.peer.send(request("POST /", "Transfer-Encoding: chunked"))
    with forwarding.local.accept() as program:
        assert b"\r\nTransfer-Encoding: chunked\r\n" in program.read_head()
        for piece in (b"one", b"three"):
            chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
            forwarding.peer.send(chunk)
            program.expect(chunk)
        forwarding.peer.send(b"0\r\n\r\n")
        program.expect(b"0\r\n\r\n")
        program.send(HELLO)
        assert forwarding.peer.read_response().body == b"hello"


def test_head_and_each_piece_of_a_response_are_passed_on_before_the_next_comes(
    forwarding: Forwarding,
) -> None:
    with forwarding.pass_on(request(), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n") as program:
        assert b"\r\nTransfer-Encoding: chunked\r\n" in forwarding.peer.read_head()
        for piece in (b"one", b"three"):
            chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
            program.send(chunk)
            forwarding.peer.expect(chunk)
        program.send(b"0\r\n\r\n")
        forwarding.peer.expect(b"0\r\n\r\n")


def test_response_may_flow_while_the_request_still_comes(forwarding: Forwarding) -> None:
    forwarding.peer.send(request("POST /", "Content-Length: 6") + b"abc")
    with forwarding.local.accept() as program:
        program.read_until(b"\r\n\r\nabc")
        program.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nABC")
        forwarding.peer.read_until(b"\r\n\r\nABC")
        forwarding.peer.send(b"def")
        program.expect(b"def")
        program.send(b"DEF")
        forwarding.peer.expect(b"DEF")


@pytest.mark.parametrize(
    "pieces",
    [
        (b"3\r\none\r\n", b"3\r\ntwo\r\n"),
        (b"3\r\none", b"\r\n", b"3\r\ntwo\r\n"),
        (b"3", b"\r", b"\n", b"one\r", b"\n3\r\ntwo\r\n"),
        (b"3;x=y\r\none\r\n3", b"\r\ntwo\r\n"),
    ],
)
def test_framing_of_a_request_never_holds_up_its_response(
    pieces: tuple[bytes, ...], forwarding: Forwarding
) -> None:
    forwarding.peer.send(request("POST /", "Transfer-Encoding: chunked"))
    with forwarding.local.accept() as program:
        program.read_head()
        program.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        forwarding.peer.read_head()
        for number, piece in enumerate(pieces):
            forwarding.peer.send(piece)
            if b"one" in piece:
                program.expect(b"3\r\none\r\n")
            chunk = b"1\r\n%d\r\n" % number
            program.send(chunk)
            forwarding.peer.expect(chunk)
        program.expect(b"3\r\ntwo\r\n")
        for piece in (b"0\r\n", b"X: 1\r\n", b"\r\n"):
            program.send(b"1\r\nx\r\n")
            forwarding.peer.expect(b"1\r\nx\r\n")
            forwarding.peer.send(piece)
        program.expect(b"0\r\n\r\n")
        program.send(b"0\r\n\r\n")
        forwarding.peer.expect(b"0\r\n\r\n")


def test_refusal_of_a_chunked_request_arrives_in_its_middle(forwarding: Forwarding) -> None:
    forwarding.peer.send(request("POST /", "Transfer-Encoding: chunked") + b"3\r\none\r\n")
    with forwarding.local.accept() as program:
        program.read_until(b"3\r\none\r\n")
        program.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        response = forwarding.peer.read_response()
    assert (response.status, response.body) == (401, b"no")


def test_large_bodies_pass_each_other_without_a_deadlock(forwarding: Forwarding) -> None:
    size = 32 << 20  # more than all buffers together
    upload, download = b"u" * size, b"d" * size
    received: list[bytes] = []

    def run_program() -> None:
        """Send nearly all of the response before reading any of the request."""
        with forwarding.local.accept() as program:
            head = program.read_head()
            program.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            program.send(download[:-1])
            received.append(head)
            received.append(program.read_exactly(size))
            program.send(download[-1:])

    program = threading.Thread(target=run_program)
    uploader = threading.Thread(
        target=lambda: forwarding.peer.send(request("POST /", f"Content-Length: {size}") + upload)
    )
    program.start()
    uploader.start()
    assert forwarding.peer.read_response().body == download
    uploader.join(wire.DEADLINE_S)
    program.join(wire.DEADLINE_S)
    assert received[1] == upload


def test_early_refusal_of_a_large_request_arrives(forwarding: Forwarding) -> None:
    size = 32 << 20
    uploader = threading.Thread(
        target=lambda: forwarding.peer.send(request("POST /", f"Content-Length: {size}") + b"u" * (1 << 20))
    )
    uploader.start()
    with forwarding.local.accept() as program:
        program.read_head()
        program.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
    response = forwarding.peer.read_response()
    assert (response.status, response.body) == (413, b"no")
    assert response.value(b"connection") == b"close", "too much of the request is left to read it away"
    uploader.join(wire.DEADLINE_S)
    assert not uploader.is_alive()


# ---- The consumer leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"]
)
@pytest.mark.parametrize("leave", [Peer.close, Peer.finish_sending, Peer.reset])
def test_consumer_that_leaves_has_the_local_request_closed(
    answer: bytes, leave: Callable[[Peer], None], forwarding: Forwarding, lines: Lines
) -> None:
    with forwarding.pass_on(request(), answer) as program:
        if answer.endswith(b"abc"):
            forwarding.peer.read_until(b"abc")
        leave(forwarding.peer)
        program.expect_eof()
    lines.wait_for("request r1: the consumer has gone")


def test_consumer_that_leaves_in_the_middle_of_its_request_has_the_local_one_closed(
    forwarding: Forwarding,
) -> None:
    forwarding.peer.send(request("POST /", "Content-Length: 9") + b"abc")
    with forwarding.local.accept() as program:
        program.read_until(b"abc")
        forwarding.peer.close()
        program.expect_eof()


# ---- A connection for each request -------------------------------------------------------------------


@pytest.mark.parametrize("start", ["GET", "PUT", "POST"])
@pytest.mark.parametrize("leave", [Peer.close, Peer.reset])
def test_request_is_never_sent_a_second_time(
    start: str, leave: Callable[[Peer], None], forwarding: Forwarding
) -> None:
    with forwarding.pass_on(request(f"{start} /"), HELLO):
        assert forwarding.peer.read_response().body == b"hello"
        leave(forwarding.pass_on(request(f"{start} /"), b""))
    assert forwarding.peer.read_response().status == 502
    forwarding.peer.send(request(f"{start} /next"))
    with forwarding.local.accept() as program:
        assert program.read_request().target == b"/next"
        program.send(HELLO)
        assert forwarding.peer.read_response().body == b"hello"


def test_connection_is_closed_after_its_response(forwarding: Forwarding) -> None:
    with forwarding.pass_on(request(), HELLO) as program:
        assert forwarding.peer.read_response().body == b"hello"
        program.expect_eof()  # or a program that serves one connection at a time would wait there for ever


# ---- A program that fails ----------------------------------------------------------------------------


def test_program_that_is_down_gives_502_and_one_line_an_episode(
    listener: wire.Listener, lines: Lines
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and does not listen yet
        forwarder = pothead_worker.Forwarder(f"http://127.0.0.1:{sock.getsockname()[1]}/")
        with running_pool(forwarder, listener), listener.accept() as peer:
            for _ in range(3):
                peer.send(request())
                response = peer.read_response()
                assert (response.status, response.body) == (502, DOWN)
            assert len(lines.having("unreachable, answering 502")) == 1
            sock.listen()
            peer.send(request())
            with Peer(sock.accept()[0]) as program:
                program.read_head()
                program.send(HELLO)
                assert peer.read_response().status == 200
            lines.wait_for("reached again")
            sock.close()
            peer.send(request("POST /"))
            assert peer.read_response().status == 502
    assert len(lines.having("unreachable, answering 502")) == 2
    assert not lines.having("Traceback")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 33_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100 + b"Content-Length: 0\r\n\r\n",
    ],
)
def test_program_that_gives_no_understandable_response_gives_502_and_one_line(
    answer: bytes, forwarding: Forwarding, lines: Lines
) -> None:
    with forwarding.pass_on(request(), answer) as program:
        program.finish_sending()
        response = forwarding.peer.read_response()
        program.expect_eof()
    assert response.status == 502 and b"request id: r1" in response.body
    assert "ERROR request r1: the local program failed: " in lines.wait_for("ERROR")
    assert not lines.having("Traceback")
    with forwarding.pass_on(request(), HELLO):
        assert forwarding.peer.read_response().body == b"hello"


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", b"\n"),
        (b"\x15\x03\x03\x00\x02\x02\x50",),
        (b"220 mail.example ESMTP\r\n",),
        (b"HT", b"ML"),
        (b"HTTP/1.1 200 OK\r\nX: \0",),
        (b"HTTP/2 200\r\n",),
    ],
)
def test_program_that_speaks_no_http_and_then_is_silent_gives_502_at_once_and_one_line(
    pieces: tuple[bytes, ...], forwarding: Forwarding, lines: Lines
) -> None:
    with forwarding.pass_on(request(), b"") as program:
        for piece in pieces:
            program.send(piece)
        assert forwarding.peer.read_response().status == 502
        program.expect_eof()
    assert lines.wait_for("ERROR") == "ERROR request r1: the local program failed: this is not HTTP/1.x"
    assert len(lines.having("the local program failed")) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nx\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcde",
    ],
)
def test_response_that_is_cut_short_or_malformed_is_never_ended_as_if_it_were_whole(
    answer: bytes, forwarding: Forwarding, lines: Lines
) -> None:
    with forwarding.pass_on(request(), answer) as program:
        program.finish_sending()
        rest = forwarding.peer.read_to_end()
    assert b"abc" in rest and not rest.endswith(b"0\r\n\r\n")
    assert "ERROR request r1: the local program failed: " in lines.wait_for("ERROR")
    assert not lines.having("Traceback")


def test_response_without_an_end_of_its_own_that_is_reset_is_cut_off(forwarding: Forwarding) -> None:
    program = forwarding.pass_on(request(), b"HTTP/1.1 200 OK\r\n\r\nabc")
    forwarding.peer.read_until(b"abc\r\n")
    program.reset()
    forwarding.peer.expect_eof()


# ---- The program on the command line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://localhost:3000", ("localhost", 3000)),
        ("http://localhost", ("localhost", 80)),
        ("http://127.0.0.1:1/", ("127.0.0.1", 1)),
        ("http://[::1]:3000", ("::1", 3000)),
    ],
)
def test_url_to_forward_to(text: str, address: tuple[str, int]) -> None:
    assert pothead_worker.parse_forward(text) == address
    assert pothead_worker.parse_args(["--forward", text], {}).forward == text
    assert pothead_worker.parse_args([], {"POTHEAD_WORKER_FORWARD": text}).forward == text


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        *[
            (["--forward", text], text)
            for text in (
                *("localhost:3000", "https://localhost:3000", "http://", "http://localhost:", "http://a:0"),
                *("http://a:65536", "http://a:3000/path", "http://a b:1", "http://u@a:1", "HTTP://a:1?x"),
            )
        ],
        (["--forward", "http://localhost:3000", "mymodule:app"], "mymodule:app"),
        (["--forward", "http://localhost:3000", "--poll-jobs"], "--poll-jobs"),
    ],
)
def test_senseless_forwarding_is_one_line_that_says_what(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pothead_worker.main(words) == 2
    err = capsys.readouterr().err
    assert "--forward" in err and wanted in err and err.count("\n") == 1


# ---- Other people's programs -------------------------------------------------------------------------

NODE = """
const http = require("http");
const server = http.createServer((request, response) => {
  response.setHeader("Set-Cookie", ["a=1", "b=2"]);
  response.setHeader("X-Seen", `${request.method} ${request.url} ${request.headers.host}`);
  request.pipe(response);
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
"""

NGINX = """
daemon off; master_process off; worker_processes 1; pid {directory}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  server {{ listen 127.0.0.1:{port}; root {directory}; }}
}}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_program_in_javascript_gets_the_queue(hub: wire.HubProcess, tmp_path: Path) -> None:
    (tmp_path / "echo.js").write_text(NODE)
    with wire.running(wire.Program(["node", "echo.js"], tmp_path)) as node:
        node.may_have_ended = True
        url = "http://127.0.0.1:" + node.wait_for_line(str.isdigit)
        with wire.worker_process(hub, "--forward", url, "--workers", "2") as worker:
            body = b"abc" * 1_000_000
            response = wire.fetch(hub.main, request("PUT /x?y=z", body=body))
            assert response.body == body
            assert response.values(b"set-cookie") == [b"a=1", b"b=2"]
            assert response.value(b"x-seen") == b"PUT /x?y=z example.org"
            assert wire.fetch(hub.main, request("HEAD /")).status == 200
            assert wire.fetch(hub.main, request("GET /")).body == b""
            worker.terminate()
            assert worker.wait() == 0


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_gets_the_queue(hub: wire.HubProcess, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "conf").write_text(NGINX.format(directory=tmp_path, port=port))
    tmp_path.chmod(0o755)
    command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "conf")]
    with wire.running(wire.Program(command, tmp_path)) as nginx:
        wait_until_listening(port, nginx)
        with wire.worker_process(hub, "--forward", f"http://127.0.0.1:{port}"):
            response = wire.fetch(hub.main, request("GET /file"))
            assert response.body == content
            assert (response.value(b"server") or b"").startswith(b"nginx")
            etag = (response.value(b"etag") or b"").decode()
            assert wire.fetch(hub.main, request("GET /file", f"If-None-Match: {etag}")).status == 304
            assert wire.fetch(hub.main, request("HEAD /file")).value(b"content-length") == b"2560000"
            assert wire.fetch(hub.main, request("GET /file", "Range: bytes=1-3")).body == b"\1\2\3"
            assert wire.fetch(hub.main, request("GET /nosuch")).status == 404
            assert wire.fetch(hub.main, request("POST /file", body=b"x")).status == 405


def wait_until_listening(port: int, program: wire.Program) -> None:
    """A program that says nothing when it is ready has to be tried."""
    for _ in range(1000):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert program.process.poll() is None, program.stderr
        subprocess.run([sys.executable, "-c", ""], check=True)  # takes a moment
    raise AssertionError("not listening")
