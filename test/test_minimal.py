"""The modules copied into an empty directory and run there, with nothing but the standard library."""

from __future__ import annotations

import lzma
import shutil
import sys
from pathlib import Path

import pytest

import wire

# No environment variables of Python's, no site-packages, no directory of the script on the path.
BARE = [sys.executable, "-I", "-S", "-u", "-W", "error"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory with copies of the modules."""
    for name in ("gating.py", "pothead.py", "pothead_worker.py"):
        shutil.copy(wire.ROOT / name, tmp_path)
    return tmp_path


def test_copied_modules_serve_requests_without_any_package(directory: Path) -> None:
    ports = ["--main-port", "0", "--worker-port", "0", "--admin-port", "0"]
    service = [*BARE, "pothead.py", *ports, "--", *BARE, "pothead_worker.py", "--workers", "2"]
    hub = wire.HubProcess(service, directory)
    with wire.running(hub):
        hub.wait_until_ready()
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
            assert consumer.read_response().status == 200
            consumer.send(b"PUT /xz HTTP/1.1\r\nHost: example\r\nContent-Length: 11\r\n\r\nhello world")
            assert lzma.decompress(consumer.read_response().body) == b"hello world"


@pytest.mark.parametrize("name", ["pothead.py", "pothead_worker.py"])
def test_copied_module_prints_its_help_without_any_package(directory: Path, name: str) -> None:
    program = wire.Program([*BARE, name, "--help"], directory)
    program.may_have_ended = True
    with wire.running(program):
        assert program.wait() == 0
        assert any("usage:" in line for line in program.lines)


def test_metrics_without_their_package_tell_how_to_install_it(directory: Path) -> None:
    ports = ["--main-port", "0", "--worker-port", "0", "--admin-port", "0"]
    hub = wire.HubProcess([*BARE, "pothead.py", *ports], directory)
    with wire.running(hub):
        hub.wait_until_ready()
        with wire.Peer.connect(hub.admin) as admin:
            admin.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            response = admin.read_response()
    assert response.status == 501
    assert b"python3 -m pip install prometheus-client\n" in response.body


def test_copied_gates_open_without_any_package(directory: Path) -> None:
    code = "import sys; sys.path.insert(0, '.'); import gating\n"
    code += "gate = gating.all_of(gating.wait_for_idle_cpus(1), gating.wait_for_free_memory(1))\n"
    code += "gate(lambda: False).done(); print('opened')"
    program = wire.Program([*BARE, "-c", code], directory)
    program.may_have_ended = True
    with wire.running(program):
        program.wait_for_line("opened".__eq__)
        assert program.wait() == 0
