"""The suite in two processes: one summary of all that both have run, and no silence when one of them dies."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import wire

CONFTEST = """
import halves

pytest_addoption = halves.add_options
pytest_configure = halves.configure
"""
# The tests of a file wait until the other file's have begun, in the other process.
TESTS = """
import os, time
from pathlib import Path
import pytest

HERE = Path(__file__)


def test_that_passes(request):
    HERE.with_suffix(".begun").touch()
    ends_at = time.monotonic() + 10
    while len(list(HERE.parent.glob("*.begun"))) < 2:
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    if request.config.option.second_half and "DIE" in os.environ:
        os._exit(3)


def test_that_fails():
    assert HERE.name == "nothing"


@pytest.mark.skip(reason="no reason")
def test_that_is_skipped():
    raise AssertionError
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(TESTS)
    return tmp_path


def run(directory: Path, **environment: str) -> wire.Ended:
    command = wire.python("-m", "pytest", "--halves", "-rfs", "-p", "no:cacheprovider")
    environment = {"PYTHONPATH": os.fspath(wire.ROOT / "test"), **environment}
    return wire.run_to_end(command, directory, environment)


def test_what_both_halves_report_is_told_once(directory: Path) -> None:
    ended = run(directory)
    assert ended.status == 1
    assert re.search(r"=+ 2 failed, 2 passed, 2 skipped in ", ended.lines[-1]), ended
    failed = [line.partition(" - ")[0] for line in ended.lines if line.startswith("FAILED")]
    assert sorted(failed) == [f"FAILED test_{name}.py::test_that_fails" for name in ("one", "two")]
    skipped = [line.partition(":")[0] for line in ended.lines if line.startswith("SKIPPED")]
    assert sorted(skipped) == [f"SKIPPED [1] test_{name}.py" for name in ("one", "two")]


def test_end_of_the_second_half_before_its_time_is_told(directory: Path) -> None:
    ended = run(directory, DIE="1")
    assert ended.status == 1
    assert "the second half ended with 3" in "\n".join([*ended.lines, ended.stderr])
