"""Fixtures; what they yield is explained in wire.py and rig.py. And pytest's options of halves.py."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rig import Rig

import halves
import wire

pytest_addoption = halves.add_options
pytest_configure = halves.configure


@pytest.fixture
def hub() -> Iterator[wire.HubProcess]:
    """A hub process with default options on free ports."""
    with wire.hub_process() as process:
        yield process


@pytest.fixture(scope="module")
def common_hub() -> Iterator[wire.HubProcess]:
    """A hub process that the tests of a module may share, through `resting_hub`."""
    with wire.hub_process() as process:
        yield process


@pytest.fixture
def resting_hub(common_hub: wire.HubProcess) -> wire.HubProcess:
    """The shared hub, once no slot and no request of earlier tests is left."""
    common_hub.until(lambda stats: not stats["workers"] and not stats["demand"])
    return common_hub


@pytest.fixture
def worker(hub: wire.HubProcess) -> Iterator[wire.WorkerProcess]:
    """A worker process with one slot and the built-in demo application, dialling `hub`."""
    with wire.worker_process(hub) as process:
        yield process


@pytest.fixture
def consumer(hub: wire.HubProcess) -> Iterator[wire.Peer]:
    """A scripted consumer, connected to `hub`."""
    with wire.Peer.connect(hub.main) as peer:
        yield peer


@pytest.fixture
def slot(hub: wire.HubProcess) -> Iterator[wire.Peer]:
    """A scripted worker slot that has dialled `hub`."""
    with wire.Peer.connect(hub.worker) as peer:
        yield peer


@pytest.fixture(scope="session")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips a test that installs packages where there are none to be had."""
    fetch = [sys.executable, "-m", "pip", "download", "--retries=0", "--no-deps", "setuptools"]
    directory = tmp_path_factory.mktemp("index")
    if subprocess.run(fetch, cwd=directory, capture_output=True, timeout=60).returncode:
        pytest.skip("no package index can be reached")


@pytest.fixture
def listener() -> Iterator[wire.Listener]:
    """A scripted hub that workers can dial."""
    with wire.Listener() as stand_in:
        yield stand_in


@pytest.fixture
def new_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(new_rig: Callable[..., Rig]) -> Rig:
    return new_rig()
