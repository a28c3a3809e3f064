"""Runs the suite in two processes at the same time, as `pytest --halves`: most tests wait for others.

A second pytest collects the same tests. Each of the two takes one file of tests after the other that nobody
has taken yet, and what the second one reports is told by the first one, as if it had been there. So nothing
is run twice, a file's tests stay together with what they share, and there is one summary.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# They take longest, so that they come first: what comes last is waited for by the other process.
SLOW = "worker restart hostile hub worker_subprocess faults page cli readme worker_redirect protocol"


class Half:
    """One of the two processes, as a plugin of its pytest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        for item, following in self._items(session):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self._on_turn(session)
            if session.shouldfail or session.shouldstop:
                break
        self._on_end(session)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        return True

    def _items(self, session: pytest.Session) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
        """Yield the tests of each file that this process gets, and which comes next in it."""
        files = {
            path: list(items) for path, items in itertools.groupby(session.items, lambda item: item.path)
        }
        for path in sorted(files, key=place):
            if self._take(path.name):
                yield from itertools.zip_longest(files[path], files[path][1:])

    def _take(self, name: str) -> bool:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._directory / name, os.O_CREAT | os.O_EXCL))
            return True
        return False

    def _on_turn(self, session: pytest.Session) -> None:
        """A test has run."""

    def _on_end(self, session: pytest.Session) -> None:
        """There are no more files."""


class SecondHalf(Half):
    """Writes down what it reports."""

    def __init__(self, directory: Path, config: pytest.Config) -> None:
        super().__init__(directory)
        self._config = config
        self._reports = (directory / "reports").open("a", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._reports.write(json.dumps(data) + "\n")
        self._reports.flush()

    def pytest_unconfigure(self) -> None:
        self._reports.close()


class FirstHalf(Half):
    """Starts the other one, and tells what that reports."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (directory / "reports").touch()
        self._reports = (directory / "reports").open(encoding="utf-8")
        self._output = (directory / "output").open("w+", encoding="utf-8", errors="backslashreplace")
        self._partial = ""
        self._told = 0
        arguments = [word for word in sys.argv[1:] if word != "--halves"]
        command = [sys.executable, "-m", "pytest", *arguments, f"--second-half={directory}"]
        self._other = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT
        )

    def pytest_unconfigure(self) -> None:
        self._other.terminate()  # if this one was interrupted
        self._other.wait()
        self._reports.close()
        self._output.close()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._told += report.when == "teardown"

    def _on_turn(self, session: pytest.Session) -> None:
        hook = session.config.hook
        *lines, self._partial = (self._partial + self._reports.read()).split("\n")
        for line in lines:
            data: dict[str, Any] = json.loads(line)
            if isinstance(data["longrepr"], list):  # where and why a test was skipped
                data["longrepr"] = tuple(data["longrepr"])
            report = hook.pytest_report_from_serializable(config=session.config, data=data)
            hook.pytest_runtest_logreport(report=report)

    def _on_end(self, session: pytest.Session) -> None:
        if session.shouldfail or session.shouldstop:
            return
        status = self._other.wait()
        self._on_turn(session)
        if self._told != len(session.items) and not session.shouldfail:
            self._output.seek(0)
            session.shouldfail = f"the second half ended with {status}:\n{self._output.read()}"


def place(path: Path) -> int:
    """Return where in the order of files this one comes."""
    names = SLOW.split()
    name = path.stem.removeprefix("test_")
    return names.index(name) if name in names else len(names)


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--halves", action="store_true", help="run the tests in two processes")
    parser.addoption("--second-half", metavar="DIR", help="be the other one of the two")


def configure(config: pytest.Config) -> None:
    """Register the half that this process is, if it is one."""
    if config.option.second_half:
        config.pluginmanager.register(SecondHalf(Path(config.option.second_half), config))
    elif config.option.halves and not config.option.collectonly:
        directory = tempfile.TemporaryDirectory(prefix="pothead-halves-")
        config.add_cleanup(directory.cleanup)
        config.pluginmanager.register(FirstHalf(Path(directory.name)))
