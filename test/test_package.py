"""What is given away: the source distribution, and single files that are copied into other projects."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import pothead
import pothead_worker
import wire

MODULES = ("gating.py", "pothead.py", "pothead_worker.py")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def run(*command: str, cwd: Path = wire.ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of_the_project() -> set[str]:
    try:
        return set(run("git", "ls-files").splitlines())
    except (OSError, AssertionError):
        pytest.skip("git is not there to tell which files belong to the project")


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """A source distribution, unpacked. It is built from a copy of the project: that leaves traces."""
    pytest.importorskip("setuptools")
    for name in files_of_the_project():
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((wire.ROOT / name).read_bytes())
    archive = run(*wire.python("-c", BUILD, str(tmp_path)), cwd=tmp_path / "copy").splitlines()[-1]
    run("tar", "-xf", archive, cwd=tmp_path)
    return tmp_path / archive.removesuffix(".tar.gz")


def test_source_distribution_has_every_file_and_its_tests_run(sdist: Path) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()} - made
    assert {name for name in packed if ".egg-info/" not in name} == files_of_the_project()
    tests = wire.python("-m", "pytest", "-q", "test/test_minimal.py", "-k", "help")
    assert "2 passed" in run(*tests, cwd=sdist)


def test_source_distribution_is_called_as_the_programs_are(sdist: Path) -> None:
    version = pothead.__version__
    assert sdist.name == f"pothead-{version}" and pothead_worker.__version__ == version
    assert f"\nVersion: {version}\n" in (sdist / "PKG-INFO").read_text(encoding="utf-8")
    assert f" – {version}\n" in (wire.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_version_is_above_that_of_another_program_which_the_package_index_has_under_the_name() -> None:
    assert int(pothead.__version__.partition(".")[0]) >= 1, "it ended with 0.10.6"


@pytest.mark.parametrize("name", ["README.md", "docs", "deploy", *MODULES])
def test_nobody_is_told_to_install_that_other_program(name: str) -> None:
    path = wire.ROOT / name
    for each in path.rglob("*") if path.is_dir() else [path]:
        text = each.read_text(encoding="utf-8") if each.is_file() else ""
        assert not re.search(r"pip3? install[^\n]*[ '\"]pothead\b", text), each


@pytest.mark.parametrize("name", MODULES)
def test_file_that_is_copied_says_what_it_is_and_under_which_licence(name: str) -> None:
    top = (wire.ROOT / name).read_text(encoding="utf-8").partition('"""')[0].splitlines()
    assert top[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert 1 < len(top) <= 3 and "POTHEAD" in top[1] and all(line.startswith("# ") for line in top)
