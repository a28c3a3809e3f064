"""Several hubs behind a real balancer, HAProxy, as docs/hubs.md configures it. Under load, nobody notices."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_protocol import blocks as code_of_protocol
from test_restart import Crowd

import pothead_worker
import wire
from wire import HubProcess, Peer, get, post

HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed"),
    wire.in_clear_only,
]
DOCUMENT = (wire.ROOT / "docs" / "hubs.md").read_text(encoding="utf-8")
CONFIGURATIONS = {
    re.findall(r"^ +mode (\w+)$", text, re.MULTILINE)[0]: text
    for text in re.findall(r"^```haproxy\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
}
# The hub's port for consumers, that of its workers and its admin port.
MAIN, WORKERS, ADMIN = ("--main", "--ptth", "--admin")
CLOSE = b"Connection: close"

# Notes each request in a file when it starts, and returns path and body. With a query it waits for a file.
APP = """
import os
import time

ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def app(environ, start_response):
    path = environ["PATH_INFO"].encode()
    os.write(ledger, path + b"\\n")
    time.sleep(0.005)
    while environ["QUERY_STRING"] and not os.path.exists("release"):
        time.sleep(0.01)
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    return [path, environ["wsgi.input"].read()]
"""
NODE_WORK = "response.end(Buffer.concat(pieces).reverse());    // the work\n"
NODE_APP = """const [path, waits] = request.url.split('?');
  fs.appendFileSync(process.env.LEDGER, path + '\\n');
  const end = () => (waits && !fs.existsSync('release') ? setTimeout(end, 10)
    : response.end(Buffer.concat([Buffer.from(path), ...pieces])));
  setTimeout(end, 5);
"""


def test_there_is_a_configuration_for_each_mode() -> None:
    assert set(CONFIGURATIONS) == {"http", "tcp"}


def quiet_port() -> int:
    """Return a free port that the system gives to nobody by itself, so that a hub finds it free again."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Service:
    """Some hubs on addresses of their own, workers that serve all of them, and a balancer before them."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack, count: int, *options: str) -> None:
        self._directory, self._stack, self._options = directory, stack, options
        self._ports = {name: quiet_port() for name in (MAIN, WORKERS, ADMIN)}
        self.ledger = directory / "ledger"
        self.hubs = [self.start_hub(number) for number in range(count)]

    def start_hub(self, number: int) -> HubProcess:
        """Run the hub with that number on its ports, anew or for the first time."""
        command = [*wire.program("pothead"), "--worker-port", "0", *self._options]
        for name, port in self._ports.items():
            command += [f"{name}-host", f"127.0.1.{number + 1}", f"{name}-port", str(port)]
        hub = HubProcess(command, self._directory)
        self._stack.enter_context(wire.running(hub))
        hub.wait_until_ready()
        return hub

    def start_workers(self, kind: str, slots: int) -> None:
        """Run workers of all hubs with so many slots in all, and wait until each hub knows them."""
        if not shutil.which("node") and kind == "node":
            pytest.skip("needs Node")
        hubs = [f"{host}:{port}" for host, port in (hub.ptth for hub in self.hubs)]
        if kind == "node":
            script = code_of_protocol("js")[2].replace(NODE_WORK, NODE_APP)
            assert NODE_APP in script
            (self._directory / "worker.js").write_text("const fs = require('node:fs');\n" + script)
            commands = [["node", "worker.js", *hubs]] * slots
        else:
            (self._directory / "ledger_app.py").write_text(APP)
            names = ",".join(f"http://{hub}" for hub in hubs)
            options = ["--connect", names, "--workers", str(slots // 2), "ledger_app:app"]
            commands = [[*wire.program("pothead_worker"), *options]] * 2
        for command in commands:
            worker = wire.WorkerProcess(command, self._directory, {"LEDGER": str(self.ledger)})
            worker.may_have_ended = kind == "node"
            self._stack.enter_context(wire.running(worker))
        for hub in self.hubs:
            self.wait_for_workers(hub, slots)

    def wait_for_workers(self, hub: HubProcess, slots: int) -> None:
        hub.until(lambda stats: stats["slots"]["idle"] + stats["slots"]["busy"] == slots)

    def wait_for_starts(self, count: int) -> None:
        """Wait until so many requests have begun; one that is only offered to a slot has not."""
        wire.until(lambda: len(self.ledger.read_bytes().split()) if self.ledger.exists() else 0, count.__eq__)

    def start_balancer(self, mode: str) -> Balancer:
        balancer = Balancer(self._directory, mode, self.hubs)
        self._stack.enter_context(wire.running(balancer))
        for number, _ in enumerate(self.hubs):
            balancer.wait_for_state(number, "UP")
        return balancer


class Balancer(wire.Program):
    """HAProxy as the document configures it, with other addresses, and looking more often."""

    def __init__(self, directory: Path, mode: str, hubs: list[HubProcess]) -> None:
        self.main, self._control = (("127.0.0.1", quiet_port()) for _ in range(2))
        text, replaced = re.subn(r"^ +server .*\n.*$", "", CONFIGURATIONS[mode], count=1, flags=re.MULTILINE)
        assert replaced
        for number, hub in enumerate(hubs, 1):
            text += f"    server hub{number} {hub.main[0]}:{hub.main[1]}\n"
        for before, after in (
            ("/run/haproxy/admin.sock mode 660", f"ipv4@127.0.0.1:{self._control[1]}"),
            ("bind :8080", f"bind 127.0.0.1:{self.main[1]}"),
            ("port 4041 inter 1s", f"port {hubs[0].admin[1]} inter 100ms"),
        ):
            assert before in text
            text = text.replace(before, after)
        (directory / "haproxy.cfg").write_text(text)
        super().__init__([HAPROXY or "", "-db", "-f", "haproxy.cfg"], directory)

    def _interrupt(self) -> None:
        self.process.terminate()  # INT is ignored if whoever runs the tests does that

    def wait_for_state(self, number: int, wanted: str) -> None:
        """Wait until the checks of a hub have an end, and that one."""
        wire.until(lambda: self._states().get(f"hub{number + 1}", ""), lambda state: state == wanted)

    def _states(self) -> dict[str, str]:
        with contextlib.suppress(ConnectionRefusedError), Peer.connect(self._control) as peer:
            peer.send(b"show stat\n")
            rows = [line.split(",") for line in peer.read_to_end().decode().splitlines() if line]
            column = rows[0].index("status")
            return {row[1]: row[column] for row in rows[1:]}
        return {}


@contextlib.contextmanager
def crowd(service: Service, balancer: Balancer) -> Iterator[Crowd]:
    """Ask through the balancer; in the end each request has been answered, and has run once."""
    consumers = Crowd(balancer.main)
    try:
        yield consumers
    finally:
        consumers.end()
    assert consumers.failures == []
    started = collections.Counter(service.ledger.read_bytes().split())
    assert started == dict.fromkeys(consumers.answered, 1)


def wait_until_it_serves(hub: HubProcess, count: int) -> None:
    """Wait until the hub has answered some requests."""
    number = itertools.count(1)
    hub.wait_for_line(lambda line: line.endswith("code=OK") and next(number) == count, 60)


# One by each: our worker, if it knows several hubs, and the one of the document.
OURS = "ours" if hasattr(pothead_worker, "Line") else "node"
both_modes = pytest.mark.parametrize(("mode", "kind"), [("http", OURS), ("tcp", "node")])


@both_modes
def test_rolling_restart_of_three_hubs_fails_no_request(mode: str, kind: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        service = Service(tmp_path, stack, 3, "--drain-delay", "700ms")
        service.start_workers(kind, slots=4)
        balancer = service.start_balancer(mode)
        with crowd(service, balancer) as consumers:
            for number, hub in enumerate(service.hubs):
                wait_until_it_serves(hub, 40)
                hub.terminate()
                balancer.wait_for_state(number, "DOWN")
                assert hub.process.poll() is None, "it had gone before the balancer knew"
                assert hub.wait() == 0
                service.hubs[number] = service.start_hub(number)
                balancer.wait_for_state(number, "UP")
                service.wait_for_workers(service.hubs[number], 4)
            for hub in service.hubs:
                wait_until_it_serves(hub, 20)
        print(f"{mode} {kind}: {len(consumers.answered)} requests")


@both_modes
def test_hub_that_is_killed_costs_what_it_had_and_nothing_else(mode: str, kind: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        service = Service(tmp_path, stack, 2)
        service.start_workers(kind, slots=4)
        balancer = service.start_balancer(mode)
        running = []
        for number in range(4):
            running.append(peer := stack.enter_context(Peer.connect(balancer.main)))
            path = b"/%d?waits" % number
            peer.send(post(path, b"x", CLOSE) if number < 2 else get(path, CLOSE))
            service.wait_for_starts(number + 1)
        for hub in service.hubs:
            hub.until(lambda stats: stats["slots"]["busy"] == 2)
        service.hubs[0].kill()
        # In HTTP mode what may run twice does, at the other hub.
        service.hubs[1].until(lambda stats: stats["demand"] == (3 if mode == "http" else 2))
        (tmp_path / "release").touch()
        answers = [answer_of(peer) for peer in running]
        assert sorted(answers[:2]) == ([200, 502] if mode == "http" else [0, 200])
        assert sorted(answers[2:]) == ([200, 200] if mode == "http" else [0, 200])
        for number in range(20):
            response = wire.fetch(balancer.main, post(b"/after-%d" % number, b"x"))
            assert response.status == 200
        assert service.hubs[1].stats()["requeues"] == 0


def answer_of(peer: Peer) -> int:
    """Return the status of the response; 0 if the connection ends without one."""
    head = peer.read_to_end()
    return int(head.split(b" ")[1]) if head else 0


def test_script_of_the_document_adds_hubs_up(tmp_path: Path) -> None:
    script = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)[0]
    with contextlib.ExitStack() as stack:
        service = Service(tmp_path, stack, 2)
        service.start_workers("node", slots=2)
        waiting = [stack.enter_context(Peer.connect(hub.main)) for hub in service.hubs for _ in range(2)]
        for peer in waiting:
            peer.send(get(b"/?waits", CLOSE))
        service.wait_for_starts(2)
        wire.until(lambda: sum(hub.stats()["demand"] for hub in service.hubs), (4).__eq__)
        wire.until(lambda: sum(hub.stats()["slots"]["busy"] for hub in service.hubs), (2).__eq__)
        urls = [f"http://{host}:{port}" for host, port in (hub.admin for hub in service.hubs)]
        ended = wire.run_to_end(wire.python("-c", script, *urls), tmp_path)
        assert ended.lines == ["slots 2 busy 2", "demand 4 waiting 2"]
        (tmp_path / "release").touch()
        assert [answer_of(peer) for peer in waiting] == [200] * 4
