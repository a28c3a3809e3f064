"""The hub on the open network: who may be a worker (the handshake, raw), and TLS."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import random
import re
import select
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wire
from pothead import (
    Certificate,
    Inbuf,
    Options,
    ProtocolError,
    TlsTransport,
    is_origin,
    load_permits,
    read_application,
    read_permits,
    register,
    take_request_head,
)
from wire import HubProcess, Peer, hub_process

API, IMG = "https://api.example", "https://img.example:8443"
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%2F1.1\r\n\r\n"
)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PATH = b"/.well-known/ptth/https%3A%2F%2Fapi.example/"
WORKERS = f"""
# name   credential                    origins
alpha    token:s3cr3t-of-alpha         {API} {IMG}
beta     sha256:{hashlib.sha256(b"s3cr3t-of-beta").hexdigest().upper()}
gamma    certificate:gamma.example     {API}   # by its certificate
"""


def handshake(
    path: bytes = PATH, token: bytes | None = b"Bearer s3cr3t-of-alpha", *lines: bytes,
    method: bytes = b"GET", version: bytes = b"HTTP/1.1", **change: bytes | None,
) -> bytes:  # fmt: skip
    """Return the example of the draft, with changes; a field that is `None` is left out."""
    fields: dict[str, bytes | None] = {
        "Host": b"hub.example", "Connection": b"upgrade", "Upgrade": b"ptth", "ALPN": b"http%2F1.1",
        "Authorization": token,
    }  # fmt: skip
    fields.update({name.replace("_", "-"): value for name, value in change.items()})
    head = [b"%b %b %b" % (method, path, version)]
    head += [b"%b: %b" % (name.encode(), value) for name, value in fields.items() if value is not None]
    return b"\r\n".join((*head, *lines, b"", b""))


@contextlib.contextmanager
def network_hub(directory: Path, *options: str, workers: str | None = WORKERS) -> Iterator[HubProcess]:
    """A hub with a PTTH port, and a workers file unless that is `None`."""
    if workers is not None:
        (directory / "workers").write_text(workers)
        options = ("--workers-file", str(directory / "workers"), *options)
    with hub_process("--ptth-port", "0", *options) as hub:
        yield hub


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with network_hub(tmp_path_factory.mktemp("common"), "--ptth-compat", "ptth/1.0") as hub:
        yield hub


@pytest.fixture
def network(common: HubProcess) -> HubProcess:
    """The shared hub, once nothing of earlier tests is left."""
    common.until(lambda stats: not stats["workers"] and not stats["demand"])
    return common


def tls_options(directory: Path, ports: str = "ptth") -> tuple[str, ...]:
    return (
        "--certfile", str(directory / "hub.pem"), "--keyfile", str(directory / "hub.key"), "--tls", ports
    )  # fmt: skip


def join(hub: HubProcess, *arguments: bytes, context: ssl.SSLContext | None = None) -> Peer:
    """Return a slot that has joined with the handshake."""
    peer = Peer.connect(hub.ptth, context)
    peer.send(handshake(*arguments))
    peer.expect(SWITCHED)
    return peer


def ask(hub: HubProcess, path: bytes, context: ssl.SSLContext | None = None) -> Peer:
    peer = Peer.connect(hub.main, context)
    peer.send(b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path)
    return peer


def serve_one(hub: HubProcess, slot: Peer, path: bytes) -> None:
    with ask(hub, path) as consumer:
        assert slot.read_request().target == path
        slot.send(OK)
        assert consumer.read_response().body == b"ok"


# ---- The handshake -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        handshake(),
        handshake(b"/ptth"),
        handshake(Connection=b"keep-alive, Upgrade"),
        handshake(Upgrade=b"websocket,PTTH"),
        handshake(ALPN=b"h2, http%2F1.1"),
        handshake(b"/.well-known/ptth/https%3a%2f%2fapi.example,https%3A%2F%2Fimg.example%3A8443/"),
        handshake(b"http://hub.example" + PATH),
        handshake(PATH, b"bearer   s3cr3t-of-alpha"),
        handshake(b"/.well-known/ptth/http%3A%2F%2Fanything.example/", b"Bearer s3cr3t-of-beta"),
        handshake(PATH, b"Bearer s3cr3t-of-alpha", b"X-Envoy-Reverse-Tunnel-Node-Id: just one of three"),
        b"\r\n" + handshake(),
    ],
)
def test_handshake_is_answered_with_101_alone(network: HubProcess, head: bytes) -> None:
    with Peer.connect(network.ptth) as slot:
        slot.send(head)
        slot.expect(SWITCHED)
        serve_one(network, slot, b"/first")
        serve_one(network, slot, b"/second")


def percent(origin: str) -> bytes:
    return origin.replace(":", "%3A").replace("/", "%2F").encode()


def scope(*origins: str) -> bytes:
    return b"/.well-known/ptth/%b/" % b",".join(map(percent, origins))


REFUSED = {
    "no upgrade": (handshake(Upgrade=None), 426, b"Upgrade: ptth\r\n"),
    "another upgrade": (handshake(Upgrade=b"ptth-udp, xptth"), 426, b"Connection: upgrade\r\n"),
    "an upgrade that is not asked for": (handshake(Connection=b"upgraded"), 426, b"Upgrade: ptth\r\n"),
    "HTTP/1.0": (handshake(version=b"HTTP/1.0"), 426, b"Upgrade: ptth\r\n"),
    "a consumer": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 426, b"main port"),
    "another method": (handshake(method=b"POST", Content_Length=b"0"), 405, b"Allow: GET\r\n"),
    "another path": (handshake(b"/other"), 404, b"/.well-known/ptth/"),
    "a query": (handshake(PATH + b"?x"), 404, b""),
    "no origin": (handshake(b"/.well-known/ptth/"), 404, b""),
    "two scopes": (handshake(PATH + b"../" + PATH[1:]), 404, b""),
    "no ALPN": (handshake(ALPN=None), 400, b"http%2F1.1"),
    "another protocol": (handshake(ALPN=b"h2"), 400, b"http%2F1.1"),
    "ALPN in lower case": (handshake(ALPN=b"http%2f1.1"), 400, b"http%2F1.1"),
    "an origin in upper case": (handshake(scope("https://API.example")), 400, b"lower case"),
    "a default port": (handshake(scope("https://api.example:443")), 400, b"default port"),
    "a port beyond all": (handshake(scope("https://api.example:65536")), 400, b""),
    "null": (handshake(scope(API, "null")), 400, b""),
    "nothing beside an origin": (handshake(scope(API, "")), 400, b""),
    "a comma in code": (handshake(scope(API, IMG).replace(b",", b"%2C")), 400, b""),
    "user information": (handshake(scope("https://u@api.example")), 400, b""),
    "a wildcard": (handshake(scope("https://*.example")), 400, b""),
    "a path": (handshake(scope(API + "/")), 400, b""),
    "bad percent-encoding": (handshake(PATH.replace(b"%3A", b"%3G")), 400, b"percent-encoding"),
    "content": (handshake(Content_Length=b"3") + b"abc", 400, b""),
    "bytes behind the head": (handshake() + b"H", 400, b"behind"),
    "no Host": (handshake(Host=None), 400, b"Host"),
    "no credential": (handshake(PATH, None), 401, b'WWW-Authenticate: Bearer realm="pothead"\r\n'),
    "an unknown token": (handshake(PATH, b"Bearer x"), 401, b'error="invalid_token"'),
    "a token cut short": (handshake(PATH, b"Bearer s3cr3t-of-alph"), 401, b'error="invalid_token"'),
    "a token with more": (handshake(PATH, b"Bearer s3cr3t-of-alphaa"), 401, b'error="invalid_token"'),
    "a token in other case": (handshake(PATH, b"Bearer S3cr3t-of-alpha"), 401, b'error="invalid_token"'),
    "a token as Basic": (handshake(PATH, b"Basic s3cr3t-of-alpha"), 401, b"Bearer realm"),
    "its digest": (
        handshake(PATH, b"Bearer " + hashlib.sha256(b"s3cr3t-of-alpha").hexdigest().encode()), 401, b""
    ),
    "no token": (handshake(PATH, b"Bearer "), 401, b'error="invalid_token"'),
    "two tokens": (handshake(PATH, b"Bearer x, Bearer s3cr3t-of-alpha"), 401, b'error="invalid_token"'),
    "two fields": (
        handshake(PATH, b"Bearer s3cr3t-of-alpha", b"Authorization: Bearer s3cr3t-of-alpha"), 401, b""
    ),
    "an origin that is not its own": (handshake(scope("https://evil.example")), 403, b"evil.example"),
    "one of them": (handshake(scope(API, "https://evil.example")), 403, b"evil.example"),
    "another scheme": (handshake(scope("http://api.example")), 403, b"http://api.example"),
    "another port": (handshake(scope("https://api.example:8443")), 403, b"api.example:8443"),
    "a large head": (handshake(PATH, None, b"X: " + b"x" * 16_400), 431, b"16384"),
    "a large line": (handshake(b"/" + b"x" * 8192), 414, b"8192"),
    "TLS": (b"\x16\x03\x01\x00\xfc\x01\x00\x00\xf8\x03\x03" + bytes(64), 400, b"TLS"),
    "another version": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, b""),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", 400, b""),
}  # fmt: skip


@pytest.mark.parametrize(("head", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_handshake_is_told_why_and_gets_no_request(
    network: HubProcess, head: bytes, status: int, words: bytes
) -> None:
    with ask(network, b"/waits") as consumer:
        network.until(lambda stats: stats["queue_length"] == 1)
        with Peer.connect(network.ptth) as applicant:
            applicant.send(head)
            answer = applicant.read_to_end()
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
        assert words in answer
        assert b"Connection: close\r\n" in answer
        assert b"/waits" not in answer
        with join(network) as slot:
            assert slot.read_request().target == b"/waits"
            slot.send(OK)
        assert consumer.read_response().status == 200


def test_head_may_come_in_two_pieces_cut_anywhere(network: HubProcess) -> None:
    head = handshake()
    for cut in range(1, len(head)):
        with Peer.connect(network.ptth) as slot:
            slot.send(head[:cut])
            assert not select.select([slot.sock], [], [], 0)[0]
            slot.send(head[cut:])
            slot.expect(SWITCHED)


def test_first_request_may_follow_at_once(network: HubProcess) -> None:
    with ask(network, b"/waits") as consumer:
        network.until(lambda stats: stats["queue_length"] == 1)
        with join(network) as slot:
            assert slot.read_request().target == b"/waits"
            slot.send(OK)
            assert consumer.read_response().body == b"ok"


def test_response_that_was_planted_before_the_request_answers_nobody(network: HubProcess) -> None:
    with join(network) as slot:
        network.suspend()
        consumer = ask(network, b"/planted")
        slot.send(OK.replace(b"ok", b"no"))
        network.process.send_signal(signal.SIGCONT)
        slot.expect_eof()
        with join(network) as honest:
            assert honest.read_request().target == b"/planted"
            honest.send(OK)
        assert consumer.read_response().body == b"ok"
        consumer.close()


def test_name_and_origins_of_a_worker_are_shown(network: HubProcess) -> None:
    with join(network) as slot:
        serve_one(network, slot, b"/shown")
        [row] = network.stats()["workers"]
        assert (row["name"], row["origins"]) == ("alpha", [API])
        [machine] = [each for each in network.stats()["machines"] if each["slots"]]
        assert (machine["name"], machine["address"]) == ("alpha", "127.0.0.1")
    line = network.wait_for_line(lambda line: "path=/shown " in line)
    assert " worker_name=alpha " in line


def test_secrets_are_told_to_nobody(network: HubProcess) -> None:
    with Peer.connect(network.ptth) as applicant:
        applicant.send(handshake(PATH, b"Bearer wr0ng-s3cr3t"))
        assert b"s3cr3t" not in applicant.read_to_end()
    with join(network) as slot:
        serve_one(network, slot, b"/secret")
        network.wait_for_line(lambda line: "path=/secret " in line)
    assert "s3cr3t" not in network.stderr + "".join(network.lines) + json.dumps(network.stats())


# ---- Older and other workers -------------------------------------------------------------------------

ENVOY = tuple(b"x-envoy-reverse-tunnel-%b-id: lab" % each for each in (b"node", b"cluster", b"tenant"))


def test_envoy_is_asked_for_an_echo_before_it_gets_a_request(network: HubProcess) -> None:
    with ask(network, b"/envoy") as consumer, Peer.connect(network.ptth) as slot:
        slot.send(handshake(PATH, b"Bearer s3cr3t-of-alpha", *ENVOY))
        slot.expect(SWITCHED)
        slot.expect(b"RPING")
        assert not network.stats()["workers"]
        slot.send(b"RPI")
        slot.send(b"NG")
        assert slot.read_request().target == b"/envoy"
        slot.send(OK)
        assert consumer.read_response().status == 200


@pytest.mark.parametrize("echo", [b"", b"RPONG", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_envoy_without_an_echo_is_closed(network: HubProcess, echo: bytes) -> None:
    with Peer.connect(network.ptth) as slot:
        slot.send(handshake(PATH, b"Bearer s3cr3t-of-alpha", *ENVOY))
        slot.expect(SWITCHED)
        slot.expect(b"RPING")
        slot.send(echo)
        slot.expect_eof()


def test_older_protocol_is_spoken_where_it_is_named(network: HubProcess, tmp_path: Path) -> None:
    old = (
        b"POST / HTTP/1.1\r\nHost: hub\r\nConnection: Upgrade\r\nUpgrade: PTTH/1.0\r\n"
        b"Authorization: Bearer s3cr3t-of-beta\r\nContent-Length: 0\r\n\r\n"
    )
    with Peer.connect(network.ptth) as slot:
        slot.send(old)
        head = slot.read_head()
        assert b"\r\nConnection: upgrade\r\nUpgrade: PTTH/1.0\r\n" in head
        serve_one(network, slot, b"/old")
    with network_hub(tmp_path) as hub, Peer.connect(hub.ptth) as slot:
        slot.send(old)
        assert slot.read_response().status == 426


# ---- The workers file --------------------------------------------------------------------------------


def test_workers_file_is_read_line_by_line() -> None:
    permits = read_permits(WORKERS, "workers")
    assert [each.name for each in permits.values()] == ["alpha", "beta", "gamma"]
    alpha, beta, gamma = permits.values()
    assert alpha.credential == "sha256:" + hashlib.sha256(b"s3cr3t-of-alpha").hexdigest()
    assert beta.credential == "sha256:" + hashlib.sha256(b"s3cr3t-of-beta").hexdigest()
    assert (gamma.credential, gamma.origins) == ("certificate:gamma.example", {API})
    assert "s3cr3t" not in repr(permits)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("alone", "token:SECRET"),
        ("a secret:x", "token:SECRET"),
        ("a token:", "token:SECRET"),
        ("a token:not/a token!", "no origin"),
        ("a token:umläut", "token:SECRET"),
        ("a sha256:abc", "token:SECRET"),
        ("ä token:x", "a name has"),
        ("a" * 65 + " token:x", "a name has"),
        ("a token:x api.example", "no origin"),
        ("a token:x https://api.example/", "no origin"),
        ("a token:x https://api.example:443", "no origin"),
        ("b token:s3cr3t-of-alpha", "a second time"),
    ],
)
def test_malformed_line_is_named(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        read_permits(WORKERS + line, "/etc/workers")
    assert str(caught.value).startswith("/etc/workers, line 6: ")
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "origin", ["https://a", "http://a.b-c.d:8080", "https://[::1]:8443", "http://127.0.0.1", "http://a:443"]
)
def test_origin_is_one(origin: str) -> None:
    assert is_origin(origin)


def reload(hub: HubProcess, told: str) -> None:
    """Have the hub read its files again, and wait until it says so."""
    before = hub.stderr.count(told)
    hub.send_signal(signal.SIGHUP)
    hub.wait_for_error(lambda line: told in line and hub.stderr.count(told) > before)


def test_worker_whose_line_has_gone_gets_no_other_request(tmp_path: Path) -> None:
    with network_hub(tmp_path) as hub, join(hub) as idle, join(hub) as busy:
        with ask(hub, b"/running") as consumer:
            assert busy.read_request().target == b"/running"
            stays = join(hub, b"/ptth", b"Bearer s3cr3t-of-beta")
            (tmp_path / "workers").write_text(WORKERS.replace("s3cr3t-of-alpha", "n3w-of-alpha"))
            reload(hub, "workers has been read again")
            idle.expect_eof()
            busy.send(OK)
            assert consumer.read_response().body == b"ok"
            busy.expect_eof()
        with Peer.connect(hub.ptth) as late:
            late.send(handshake())
            assert late.read_response().status == 401
        serve_one(hub, stays, b"/stays")
        stays.close()
        with join(hub, PATH, b"Bearer n3w-of-alpha") as slot:
            serve_one(hub, slot, b"/new")


def test_worker_whose_origins_have_gone_is_gone(tmp_path: Path) -> None:
    with network_hub(tmp_path) as hub, join(hub) as slot, join(hub, scope(IMG)) as other:
        (tmp_path / "workers").write_text(WORKERS.replace(f" {API} {IMG}", f" {IMG}"))
        reload(hub, "workers has been read again")
        slot.expect_eof()
        serve_one(hub, other, b"/other")


def test_broken_workers_file_changes_nothing(tmp_path: Path) -> None:
    with network_hub(tmp_path) as hub, join(hub) as slot:
        (tmp_path / "workers").write_text(WORKERS + "broken\n")
        reload(hub, "the old one stays")
        assert f"{tmp_path / 'workers'}, line 6: " in hub.stderr
        assert "Traceback" not in hub.stderr
        serve_one(hub, slot, b"/old")
        with join(hub):
            pass


# ---- What is refused at the start --------------------------------------------------------------------


def start(*options: str) -> tuple[int, str]:
    command = wire.python(str(wire.ROOT / "pothead.py"), "--main-port", "0", "--worker-port", "0", *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ptth-port", "0", "--ptth-host", "0.0.0.0"], "--workers-file"),
        (["--ptth-port", "0", "--ptth-host", "0.0.0.0", "--workers-file", "workers"], "--certfile"),
        (["--workers-file", "workers"], "--workers-file needs --ptth-port"),
        (["--certfile", "hub.pem", "--keyfile", "hub.key"], "--ptth-port is off"),
        (["--tls", "main"], "--tls needs --certfile"),
        (["--tls", "web", "--certfile", "hub.pem"], "names no port: web"),
        (["--tls", "ptth", "--certfile", "hub.pem"], "names a port that is off"),
        (["--keyfile", "hub.key"], "--keyfile needs --certfile"),
        (["--ptth-port", "0", "--workers-ca", "ca.pem"], "--workers-ca needs --certfile"),
        (["--tls", "main", "--certfile", "none.pem"], "cannot read none.pem: No such file"),
        (["--tls", "main", "--certfile", "hub.pem", "--keyfile", "other.key"], "does not belong"),
        (["--tls", "main", "--certfile", "hub.key"], "no certificate (PEM) in hub.key"),
        (["--tls", "main", "--certfile", "hub.pem"], "no private key (PEM) in hub.pem"),
        (["--tls", "main", "--certfile", "old.pem", "--keyfile", "old.key"], "certificate has expired"),
        (["--tls", "main", "--certfile", "hub.pem", "--keyfile", "locked.key"], "encrypted"),
        (["--ptth-port", "0", "--workers-file", "none"], "cannot read none: No such file"),
        (["--ptth-port", "0", "--workers-file", "broken"], "broken, line 2: "),
        (["--ptth-port", "0", "--ptth-compat", "ptth/2.0"], "--ptth-compat is one of ptth/1.0"),
    ],
)
@pytest.mark.parametrize("check", [[], ["--check"]])
def test_what_cannot_work_is_refused_in_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], complaint: str, check: list[str]
) -> None:
    monkeypatch.chdir(files)
    status, told = start("--admin-port", "0", *options, *check)
    assert (status, told.count("\n")) == (2, 1), told
    assert complaint in told


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good and bad certificates, keys and workers files."""
    directory = tmp_path_factory.mktemp("files")
    wire.certificate(directory, "ca", "/CN=the tests")
    for name in ("hub", "other"):
        wire.certificate(directory, name, f"/CN={name}", names="DNS:localhost,IP:127.0.0.1")
    wire.expired_certificate(directory, "old")
    for name, dns in (("gamma", "gamma.example"), ("nobody", "nobody.example")):
        wire.certificate(directory, name, f"/CN={name}", names=f"DNS:{dns}", use="clientAuth")
    lock = ["openssl", "pkey", "-in", "hub.key", "-aes256", "-passout", "pass:x", "-out", "locked.key"]
    subprocess.run(lock, cwd=directory, check=True, capture_output=True)
    (directory / "workers").write_text(WORKERS)
    (directory / "broken").write_text("a token:x\nb\n")
    return directory


# ---- TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common_tls(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    options = (*tls_options(files, "main,ptth,admin"), "--workers-ca", str(files / "ca.pem"))
    with running_tls(tmp_path_factory.mktemp("tls"), *options) as hub:
        yield hub


@contextlib.contextmanager
def running_tls(directory: Path, *options: str) -> Iterator[HubProcess]:
    with network_hub(directory, *options) as hub:
        yield hub


@pytest.fixture
def trust(files: Path) -> ssl.SSLContext:
    return wire.trusting(files)


def with_certificate(files: Path, name: str) -> ssl.SSLContext:
    context = wire.trusting(files)
    context.load_cert_chain(files / f"{name}.pem", files / f"{name}.key")
    return context


def test_request_over_tls_from_end_to_end(common_tls: HubProcess, trust: ssl.SSLContext) -> None:
    with join(common_tls, context=trust) as slot, ask(common_tls, b"/tls", trust) as consumer:
        request = slot.read_request()
        assert request.value(b"X-Forwarded-Proto") == b"https"
        slot.send(OK)
        assert consumer.read_response().body == b"ok"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_carry_bodies_of_any_size(
    common_tls: HubProcess, files: Path, version: ssl.TLSVersion
) -> None:
    context = wire.trusting(files)
    context.minimum_version = context.maximum_version = version
    body = bytes(range(256)) * 12_345
    with join(common_tls, context=context) as slot, Peer.connect(common_tls.main, context) as consumer:
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        sender = threading.Thread(target=consumer.send, args=(head + body,))
        sender.start()
        received = slot.read_request().body
        sender.join()
        assert received == body
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        sender = threading.Thread(target=slot.send, args=(head + body,))
        sender.start()
        assert consumer.read_response().body == body
        sender.join()


@pytest.mark.parametrize(
    ("version", "ciphers"),
    [(ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"), (ssl.TLSVersion.TLSv1_2, "AES128-GCM-SHA256")],
    ids=["older", "without forward secrecy"],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_weak_tls_is_refused(
    common_tls: HubProcess, files: Path, version: ssl.TLSVersion, ciphers: str
) -> None:
    context = wire.trusting(files)
    context.set_ciphers(ciphers)
    context.minimum_version = context.maximum_version = version
    with pytest.raises(ssl.SSLError):
        Peer.connect(common_tls.main, context)


@pytest.mark.parametrize("port", ["main", "ptth", "admin"])
def test_who_speaks_without_tls_is_told_so_in_words(common_tls: HubProcess, port: str) -> None:
    with Peer.connect(getattr(common_tls, port)) as peer:
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        response = peer.read_response()
        assert (response.status, response.body) == (
            400, b"This port speaks TLS: the address begins with https://\n"
        )  # fmt: skip
        peer.expect_eof()


def test_half_done_handshakes_cost_nothing_else(files: Path, tmp_path: Path) -> None:
    options = (*tls_options(files, "main,ptth"), "--head-timeout", "3s")
    trust = wire.trusting(files)
    with network_hub(tmp_path, *options) as hub, contextlib.ExitStack() as stack:
        hello = client_hello(files)
        half = []
        for number in range(1000):
            peer = stack.enter_context(Peer.connect(hub.ptth if number % 2 else hub.main))
            peer.send(hello[: number % len(hello)])
            half.append(peer)
        slot = stack.enter_context(join(hub, context=trust))
        with ask(hub, b"/served", trust) as consumer:
            assert slot.read_request().target == b"/served"
            slot.send(OK)
            assert consumer.read_response().status == 200
        for peer in half:
            peer.read_to_end()
        assert not [line for line in hub.stderr.splitlines() if "Traceback" in line]


def client_hello(files: Path) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = wire.trusting(files).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_certificate_of_a_worker_is_its_credential(common_tls: HubProcess, files: Path) -> None:
    with join(common_tls, PATH, None, context=with_certificate(files, "gamma")) as slot:  # type: ignore[arg-type]
        [row] = common_tls_stats(common_tls, files)["workers"]
        assert row["name"] == "gamma"
        slot.close()
    for name, status in (("gamma", 403), ("nobody", 403), (None, 401)):
        context = with_certificate(files, name) if name else wire.trusting(files)
        path = scope(IMG) if name == "gamma" else PATH
        with Peer.connect(common_tls.ptth, context) as applicant:
            applicant.send(handshake(path, None))
            assert applicant.read_response().status == status


def common_tls_stats(hub: HubProcess, files: Path) -> wire.Stats:
    with Peer.connect(hub.admin, wire.trusting(files)) as peer:
        peer.send(b"GET /stats HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        stats: wire.Stats = json.loads(peer.read_response().body)
        return stats


def test_cut_connection_is_not_the_end_of_a_response(common_tls: HubProcess, trust: ssl.SSLContext) -> None:
    for ends_well in (True, False):
        slot = join(common_tls, context=trust)
        with ask(common_tls, b"/until-close", trust) as consumer:
            slot.read_request()
            slot.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            consumer.read_until(b"half\r\n")
            if ends_well:
                slot.close()
            else:
                slot.sock.below.close()  # type: ignore[attr-defined]  # FIN, and no close_notify
            if ends_well:
                consumer.expect(b"0\r\n\r\n")
            else:
                consumer.expect_eof()


def test_drain_says_goodbye_to_waiting_slots(files: Path, tmp_path: Path) -> None:
    trust = wire.trusting(files)
    with network_hub(tmp_path, *tls_options(files)) as hub, join(hub, context=trust) as slot:
        hub.terminate()
        assert read_goodbye(slot)
        assert hub.wait() == 0


def read_goodbye(peer: Peer) -> bool:
    """Whether the other end has ended with close_notify, and not with a mere FIN."""
    tls = peer.sock
    try:
        return tls._until_done(lambda: tls.tls.read(1)) == b""  # type: ignore[attr-defined]
    except ssl.SSLEOFError:
        return False


def test_certificate_and_token_are_rotated_under_load(files: Path, tmp_path: Path) -> None:
    for name in ("hub.pem", "hub.key"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    seen: list[int] = []
    stop = threading.Event()

    def consume(hub: HubProcess) -> None:
        while not stop.is_set():
            with ask(hub, b"/load", wire.trusting(files)) as consumer:
                seen.append(consumer.read_response().status)

    def work(hub: HubProcess) -> None:
        while not stop.is_set():
            token = re.search(r"alpha +token:(\S+)", (tmp_path / "workers").read_text())
            with Peer.connect(hub.ptth, wire.trusting(files)) as slot:
                slot.send(handshake(PATH, b"Bearer " + token[1].encode() if token else None))
                if slot.read_head() == SWITCHED:
                    while slot._receive():
                        slot._take(len(slot.received))
                        slot.send(OK)

    with network_hub(tmp_path, *tls_options(tmp_path, "main,ptth")) as hub:
        consumers, workers = (
            [threading.Thread(target=each, args=(hub,)) for _ in range(2)] for each in (consume, work)
        )
        threads = consumers + workers
        for thread in threads:
            thread.start()
        hub.wait_for_line(lambda line: "path=/load " in line)
        for turn in range(20):
            name = ("other", "hub")[turn % 2]
            for suffix in ("pem", "key"):
                (tmp_path / f"hub.{suffix}").write_bytes((files / f"{name}.{suffix}").read_bytes())
            (tmp_path / "workers").write_text(WORKERS.replace("s3cr3t-of-alpha", f"s3cr3t-{turn}"))
            reload(hub, "workers has been read again")
            count = len(seen)
            hub.until(lambda _, count=count: len(seen) > count + 5)
            with Peer.connect(hub.main, wire.trusting(files)) as peer:
                der = peer.sock.tls.getpeercert()["subject"]  # type: ignore[attr-defined]
            assert name in str(der)
        stop.set()
        for thread in consumers:
            thread.join(wire.DEADLINE_S)
        hub.terminate()
        for thread in workers:
            thread.join(wire.DEADLINE_S)
        assert set(seen) == {200}
        assert hub.wait() == 0


def test_broken_certificate_changes_nothing(files: Path, tmp_path: Path) -> None:
    for name in ("hub.pem", "hub.key"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    with network_hub(tmp_path, *tls_options(tmp_path)) as hub:
        (tmp_path / "hub.key").write_bytes((files / "other.key").read_bytes())
        reload(hub, "the old one stays")
        assert "does not belong" in hub.stderr
        with join(hub, context=wire.trusting(files)):
            pass


@pytest.mark.parametrize("port", ["main", "ptth"])
def test_what_was_decrypted_before_a_refusal_keeps_nothing_busy(files: Path, port: str) -> None:
    with (
        network_hub(files, *tls_options(files, "main,ptth"), workers=None) as hub,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(3):
            peer = stack.enter_context(Peer.connect(getattr(hub, port), wire.trusting(files)))
            peer.send(b"GARBAGE\r\n\r\n" + bytes(200_000))
            assert peer.read_response().status == 400
        before = wire.cpu_ticks(hub.pid)
        time.sleep(1)
        assert wire.cpu_ticks(hub.pid) - before < 10


class Chatterer:
    """In the place of OpenSSL: it has much to answer to each thing that comes, and understands none of it."""

    def __init__(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self.incoming, self.outgoing = incoming, outgoing

    def do_handshake(self) -> None:
        self.outgoing.write(self.incoming.read() * 10)
        raise ssl.SSLWantReadError


def test_answers_of_tls_that_nobody_reads_are_not_kept_without_end(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Certificate(Options(certfile=str(files / "hub.pem"), keyfile=str(files / "hub.key"))).context(
        "ptth"
    )
    monkeypatch.setattr(context, "wrap_bio", lambda *bios, server_side: Chatterer(*bios))
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        transport = TlsTransport(near, context, lambda: None)
        sent = 0
        with pytest.raises(ConnectionAbortedError):
            while sent < 10_000_000:
                sent += far.send(b"\x16" + bytes(999))
                assert transport.receive_into(memoryview(bytearray(1000))) is None


class Owner:
    """Who knows a transport and is known to it, as a role is."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.transport = TlsTransport(sock, context, self.on_open)

    def on_open(self) -> None: ...


@pytest.mark.parametrize("said", [b"\x16garbage", b"GET / HTTP/1.1\r\n\r\n", b""])
def test_failed_handshake_leaves_nothing_for_the_garbage_collector(files: Path, said: bytes) -> None:
    context = Certificate(Options(certfile=str(files / "hub.pem"), keyfile=str(files / "hub.key"))).context(
        "ptth"
    )
    gc.collect()
    gc.disable()
    try:
        near, far = socket.socketpair(socket.AF_UNIX)
        with near, far:
            far.sendall(said)
            far.shutdown(socket.SHUT_WR)
            owner = Owner(near, context)
            with pytest.raises(OSError):
                while owner.transport.receive_into(memoryview(bytearray(1000))) != 0:
                    pass
            (owner.transport.in_clear() if owner.transport.spoke_in_clear else owner.transport).close()
            del owner
        assert not [each for each in gc.get_objects() if isinstance(each, TlsTransport)]
    finally:
        gc.enable()


ENVOY = [b"x-envoy-reverse-tunnel-%b-id: it" % each for each in (b"node", b"cluster", b"tenant")]
ANYTHING = "alpha token:s3cr3t-of-alpha\n"
CLAIMANT = [b"Pothead-Claim: 102", b"Pothead-Worker: one; slots=3"]
HOLD = b"HTTP/1.1 503 Service Unavailable\r\nConnection: hold\r\nContent-Length: 0\r\n\r\n"


def lock_out_alpha(hub: HubProcess, directory: Path) -> None:
    (directory / "workers").write_text("beta token:s3cr3t-of-beta\n")
    hub.send_signal(signal.SIGHUP)
    hub.wait_for_error(lambda line: "workers has been read again" in line)


def test_envoy_that_is_locked_out_while_it_rehearses_is_closed(tmp_path: Path) -> None:
    with network_hub(tmp_path) as hub, Peer.connect(hub.ptth) as envoy:
        envoy.send(handshake(PATH, b"Bearer s3cr3t-of-alpha", *ENVOY))
        envoy.expect(SWITCHED + b"RPING")
        lock_out_alpha(hub, tmp_path)
        envoy.expect_eof()


@pytest.mark.parametrize("holds", ["while it waits", "with its response"])
def test_held_connection_of_who_is_locked_out_is_closed(tmp_path: Path, holds: str) -> None:
    with network_hub(tmp_path, workers=ANYTHING) as hub, Peer.connect(hub.ptth) as slot:
        slot.send(handshake(b"/ptth", b"Bearer s3cr3t-of-alpha", *CLAIMANT))
        slot.read_head()
        if holds == "while it waits":
            slot.send(HOLD)
            hub.until(lambda stats: not stats["workers"])
            lock_out_alpha(hub, tmp_path)
        else:
            with Peer.connect(hub.main) as consumer:
                consumer.send(wire.get(b"/", host=b"api.example"))
                slot.read_request()
                lock_out_alpha(hub, tmp_path)
                slot.send(
                    b"HTTP/1.1 102 Processing\r\n\r\n" + OK.replace(b"OK\r\n", b"OK\r\nConnection: hold\r\n")
                )
                assert consumer.read_response().body == b"ok"
        slot.expect_eof()
        assert hub.stats()["processes"] == {} and hub.stats()["slots"] == {"idle": 0, "busy": 0}


def test_workers_with_the_id_of_another_change_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text(
        "beta token:b http://beta.example\nalpha token:a http://alpha.example\n"
    )
    options = ("--ptth-port", "0", "--workers-file", str(tmp_path / "workers"))
    with hub_process(*options, limits={"unclaimed_s": 0.1}) as hub, contextlib.ExitStack() as stack:
        alpha, beta = (stack.enter_context(Peer.connect(hub.ptth)) for _ in range(2))
        alpha.send(handshake(b"/ptth", b"Bearer a", *CLAIMANT))
        alpha.read_head()
        beta.send(handshake(b"/ptth", b"Bearer b", CLAIMANT[0], b"Pothead-Worker: one; slots=50000"))
        beta.read_head()
        assert {name: row["slots"] for name, row in hub.stats()["processes"].items()} == {
            "alpha:one": 3,
            "beta:one": 50000,
        }
        consumer = stack.enter_context(Peer.connect(hub.main))
        consumer.send(wire.get(b"/", host=b"beta.example"))
        beta.read_request()
        beta.expect_eof()  # it has not claimed it
        assert not alpha.has_bytes()
        assert hub.stats()["slots"] == {"idle": 3, "busy": 0}


@pytest.mark.parametrize("is_in_pieces", [False, True])
def test_held_connection_is_asked_for_its_token_again(tmp_path: Path, is_in_pieces: bool) -> None:
    hello = handshake(b"/ptth", b"Bearer s3cr3t-of-alpha", *CLAIMANT)
    with network_hub(tmp_path) as hub, Peer.connect(hub.ptth) as slot:
        slot.send(hello)
        assert slot.read_head().startswith(SWITCHED[:12])
        for _ in range(2):
            slot.send(HOLD)
            for piece in (hello[:90], hello[90:]) if is_in_pieces else (hello,):
                slot.send(piece)
            assert slot.read_head().startswith(SWITCHED[:12])
        slot.send(HOLD + hello.replace(b"of-alpha", b"of-alphA"))
        assert slot.read_response().status == 401


def test_claim_and_response_in_a_record_that_comes_in_parts(files: Path) -> None:
    options = ("--ptth-port", "0", *tls_options(files), "--response-timeout", "1s")
    with hub_process(*options) as hub, Peer.connect(hub.ptth, wire.trusting(files)) as slot:
        slot.send(handshake(b"/ptth", b"Bearer x", *CLAIMANT))
        slot.read_head()
        with ask(hub, b"/") as consumer:
            slot.read_request()
            assert isinstance(slot.sock, wire.TlsSocket)
            slot.sock.tls.write(b"HTTP/1.1 102 Processing\r\n\r\n" + OK)
            record = slot.sock.outgoing.read()
            slot.sock.below.sendall(record[:-20])
            hub.stats()  # which the hub answers after it has read that, so that the rest comes alone
            slot.sock.below.sendall(record[-20:])
            assert consumer.read_response().status == 200


def test_certificate_that_goes_while_it_is_read_is_a_complaint(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_arguments: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", gone)
    with pytest.raises(ValueError, match="cannot be used"):
        Certificate(Options(certfile=str(files / "hub.pem"), keyfile=str(files / "hub.key")))


def test_workers_file_of_other_systems(tmp_path: Path) -> None:
    text = "alpha token:a # a form\x0cfeed, and \u2028 beta token:b\r\n\r\ngamma\ttoken:c\r\n"
    (tmp_path / "workers").write_bytes(text.encode("utf-8-sig"))
    assert [permit.name for permit in load_permits(str(tmp_path / "workers")).values()] == ["alpha", "gamma"]


def test_key_update_of_a_waiting_worker_is_no_breach(files: Path, tmp_path: Path) -> None:
    """By openssl itself: Python can send none."""
    with network_hub(tmp_path, *tls_options(files)) as hub:
        host, port = hub.ptth
        command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-CAfile", str(files / "ca.pem")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as worker:
            assert worker.stdin and worker.stdout
            worker.stdin.write(handshake())
            worker.stdin.flush()
            hub.until(lambda stats: len(stats["workers"]) == 1)
            worker.stdin.write(b"K\n")  # the worker's keys are new, and the hub is to renew its own
            worker.stdin.flush()
            for line in worker.stdout:
                if b"KEYUPDATE" in line:
                    break
            with ask(hub, b"/after-key-update") as consumer:
                for line in worker.stdout:
                    if line == b"GET /after-key-update HTTP/1.1\r\n":
                        break
                worker.stdin.write(OK)
                worker.stdin.flush()
                assert consumer.read_response().body == b"ok"
            worker.kill()


def test_certificate_that_expires_soon_is_told(files: Path, tmp_path: Path) -> None:
    wire.certificate(tmp_path, "ca", "/CN=the tests")
    wire.certificate(tmp_path, "hub", "/CN=hub", names="DNS:localhost", days=5)
    with network_hub(tmp_path, *tls_options(tmp_path)) as hub:
        assert "the certificate expires in 4 days" in hub.wait_for_error(lambda line: "expires" in line)
        assert 4 < hub.stats()["certificate_expires_seconds"] / 86400 <= 5


class Trickle:
    """A socket that takes and gives pieces of random size, and often nothing."""

    def __init__(self, sock: socket.socket, chance: random.Random) -> None:
        self.sock, self.chance = sock, chance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def size(self, wanted: int) -> int:
        if self.chance.random() < 0.3:
            raise BlockingIOError
        return min(wanted, self.chance.choice([1, 5, 22, 1000, 16_384, 16_406, 70_000]))

    def recv(self, size: int) -> bytes:
        return self.sock.recv(self.size(size))

    def send(self, data: memoryview) -> int:
        return self.sock.send(memoryview(data)[: self.size(len(data))])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_bytes_count_as_taken_when_the_peer_can_read_them(files: Path, version: ssl.TLSVersion) -> None:
    """Not a byte more and not one less: that decides whether a request may be repeated."""
    chance = random.Random(5)
    context = Certificate(Options(certfile=str(files / "hub.pem"), keyfile=str(files / "hub.key"))).context(
        "main"
    )
    trust = wire.trusting(files)
    trust.minimum_version = trust.maximum_version = version
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        opened: list[bool] = []
        transport = TlsTransport(Trickle(ours, chance), context, lambda: opened.append(True))  # type: ignore
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        peer = trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
        buffer = memoryview(bytearray(100_000))

        def fetch() -> None:
            with contextlib.suppress(BlockingIOError):
                while data := theirs.recv(1 << 18):
                    incoming.write(data)

        is_done = False
        while not (is_done and opened):
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.do_handshake()
                is_done = True
            theirs.sendall(outgoing.read())
            assert transport.receive_into(buffer) is None
            assert transport.send(b"") == 0  # what is left of the handshake goes with it
            fetch()
        body = chance.randbytes(1_500_000)
        got = bytearray()
        taken = 0
        while taken < len(body):
            with contextlib.suppress(BlockingIOError):
                taken += transport.send(
                    memoryview(body)[taken : taken + chance.choice([1, 300, 20_000, 200_000])]
                )
            fetch()
            with contextlib.suppress(ssl.SSLWantReadError):
                while piece := peer.read(1 << 18):
                    got += piece
            assert len(got) == taken
        assert got == body
        peer.write(body[:300_000])
        theirs.setblocking(True)
        sender = threading.Thread(target=theirs.sendall, args=(outgoing.read(),))
        sender.start()
        received = bytearray()
        while len(received) < 300_000:
            if transport.has_rest or transport.has_news():
                size = transport.receive_into(buffer[: chance.choice([1, 10, 20_000, 100_000])])
                received += buffer[: size or 0]
        sender.join()
        assert received == body[:300_000]
        ours.setblocking(False)
        transport._sock = ours
        peer.write(b"x" * 100)
        theirs.sendall(outgoing.read())
        assert transport.receive_into(buffer[:100]) == 100
        assert not transport.has_news(), "there was just as much as there was room for"
        transport.close()


# ---- Whatever comes ----------------------------------------------------------------------------------


def test_random_handshakes_never_get_a_byte_of_a_request(network: HubProcess) -> None:
    """Pure: what is let in is what the model lets in, however the head is changed."""
    permits = read_permits(WORKERS, "workers")
    chance = random.Random(11)
    let_in = 0
    for _ in range(10_000):
        head = bytearray(handshake())
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(head))
            head[place : place + chance.randint(0, 2)] = bytes(
                chance.choices(b"\r\n :,%/aAzZ059-\x00\xff", k=chance.randint(0, 2))
            )
        try:
            request = take_request_head(Inbuf(bytes(head)))
            if request is not None:
                register(request, read_application(request), None, permits)
                let_in += 1
                assert re.search(rb"\n(?i:authorization):[ \t]*(?i:bearer) +s3cr3t-of-alpha[ \t]*\r\n", head)
        except ProtocolError as error:
            assert 400 <= error.status < 600
    assert 100 < let_in < 9_000
