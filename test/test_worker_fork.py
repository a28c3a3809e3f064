"""Processes that the app forks: they are no workers, whatever they do, and whatever becomes of the worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import wire
from wire import ask, is_line

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="descriptors are looked up in /proc, as Linux has them"
)

APP = """
    import ctypes, glob, multiprocessing, os, signal, sys, threading, warnings
    from concurrent.futures import ProcessPoolExecutor

    warnings.simplefilter("ignore")  # Python's own of a fork in a process with threads
    CONTEXT = multiprocessing.get_context("fork")
    EXECUTORS = []

    def status_of(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def pool(environ):
        with CONTEXT.Pool(1) as pool:  # which terminates it
            return pool.apply(abs, (-7,))

    def executor(environ):
        EXECUTORS.append(ProcessPoolExecutor(1, CONTEXT))
        return EXECUTORS[-1].submit(abs, -7).result()

    def helper(environ):
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return pid

    def terminated(environ):
        pid = os.fork()
        if pid == 0:
            signal.pause()
        os.kill(pid, signal.SIGTERM)
        return status_of(pid)

    def sockets(environ):
        pid = os.fork()
        if pid == 0:
            links = map(os.path.realpath, glob.glob("/proc/self/fd/*"))
            os._exit(sum("socket:" in link for link in links))
        return status_of(pid)

    def leaving(how):
        def page(environ):
            pid = os.fork()
            if pid == 0:
                how(environ)
            return status_of(pid)
        return page

    def fail(environ):
        raise RuntimeError("in the child")

    def write(environ):
        environ["write"](b"of the child")

    PAGES = {
        "/exit": leaving(lambda environ: sys.exit()),
        "/exit-3": leaving(lambda environ: sys.exit(3)),
        "/exit-text": leaving(lambda environ: sys.exit("bye")),
        "/fail": leaving(fail),
        "/write": leaving(write),
    }
    PAGES |= {"/" + page.__name__: page for page in (pool, executor, helper, terminated, sockets)}

    def answer(environ):
        if environ["PATH_INFO"] == "/return":
            pid = os.fork()
            return [b"of the child"] if pid == 0 else [str(status_of(pid)).encode()]
        return [str(PAGES[environ["PATH_INFO"]](environ)).encode()]

    def app(environ, start_response):
        environ["write"] = start_response("299 Not Redirected", [])
        return answer(environ)

    def generator(environ, start_response):
        environ["write"] = start_response("200 OK", [("Content-Length", "1")])
        yield answer(environ)[0]

    def gated(environ, start_response):
        start_response("200 OK", [])
        return []

    def gate(halt):
        if not EXECUTORS:
            EXECUTORS.append(None)
            pid = os.fork()
            if pid == 0:
                return None
            print("the gate's process ended with", status_of(pid), flush=True)

    gated.wait_for_slot = gate

    def raw(environ, start_response):
        library = ctypes.PyDLL(None)
        pid = library.fork()
        if pid == 0:
            library.pause()
        start_response("200 OK", [])
        return [str(pid).encode()]
"""

FORKED_BY_IMPORT = """
    from forking import app, terminated, PAGES

    STATUS = terminated({})
    PAGES["/imported"] = lambda environ: STATUS
"""

MODES = pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])


@pytest.fixture
def start(tmp_path: Path, listener: wire.Listener) -> Iterator[Callable[..., wire.WorkerProcess]]:
    """Run a worker with further options."""
    (tmp_path / "forking.py").write_text(textwrap.dedent(APP))
    (tmp_path / "importing.py").write_text(textwrap.dedent(FORKED_BY_IMPORT))
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> wire.WorkerProcess:
            return stack.enter_context(wire.worker_process(listener, *options, cwd=tmp_path))

        yield start


@MODES
def test_pool_that_is_terminated_takes_nothing_with_it(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode, "forking:app")
    with listener.accept() as peer:
        for _ in range(3):
            assert ask(peer, "GET /pool").body == b"7"
        assert ask(peer, "GET /terminated").body == b"-15"
        assert not [line for line in worker.errors if "draining" in line]


def test_idle_worker_drains_at_once_although_forked_processes_live(
    start: Any, listener: wire.Listener
) -> None:
    worker = start("--workers", "2", "forking:app")
    with listener.accept() as one, listener.accept() as two:
        assert ask(one, "GET /executor").body == b"7"
        worker.terminate()
        one.expect_eof()
        two.expect_eof()
        assert worker.wait() == 0


def test_drain_does_not_wait_for_a_process_that_was_forked_by_somebody_else(
    start: Any, listener: wire.Listener
) -> None:
    """A program that calls fork(2) by itself: no hook of Python's runs in the child."""
    worker = start("forking:raw")
    with listener.accept() as peer:
        pid = int(ask(peer, "GET /").body)
        try:
            worker.terminate()
            peer.expect_eof()
            assert worker.process.wait(wire.DEADLINE_S) == 0
        finally:
            os.kill(pid, signal.SIGKILL)


@MODES
def test_killed_worker_leaves_no_connection_behind(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode, "--workers", "2", "forking:app")
    with listener.accept() as one, listener.accept() as two:
        pid = int(ask(one, "GET /helper").body)
        try:
            worker.kill()
            one.expect_eof()
            two.expect_eof()
        finally:
            with contextlib.suppress(ProcessLookupError):  # request processes take theirs with them
                os.kill(pid, signal.SIGKILL)


CANNOT_ANSWER = "RuntimeError: a process that the application has forked cannot answer in its place"
# What a forked process does: its status, and what it says.
COMING_BACK = {
    "/exit": (b"0", []),
    "/exit-3": (b"3", []),
    "/exit-text": (b"1", ["bye"]),
    "/fail": (b"1", ["RuntimeError: in the child"]),
    "/return": (b"1", [CANNOT_ANSWER]),
    "/write": (b"1", [CANNOT_ANSWER]),
}


@pytest.mark.parametrize("name", ["app", "generator"])
@MODES
def test_forked_process_that_comes_back_to_the_worker_ends_and_never_answers(
    start: Any, listener: wire.Listener, mode: list[str], name: str
) -> None:
    worker = start(*mode, f"forking:{name}")
    with listener.accept() as peer:
        for path, (status, _) in COMING_BACK.items():
            for _ in range(2):  # on the same connection, where every byte of a child would be seen
                assert ask(peer, f"GET {path}").body == status, path
        worker.terminate()
        assert worker.wait() == 0
    told = [line for line in worker.errors if line == "bye" or line.startswith("RuntimeError: ")]
    assert told == [line for _, lines in COMING_BACK.values() for line in lines * 2]
    worker.errors.clear()  # the tracebacks


def test_forked_process_has_no_socket_of_the_worker(start: Any, listener: wire.Listener) -> None:
    start("--workers", "2", "--redirect-response", "0", "--inspection-port", "0", "forking:app")
    with listener.accept() as peer, listener.accept():
        assert ask(peer, "GET /sockets").body == b"0"


@MODES
def test_process_that_the_import_forks_can_be_ended(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    start(*mode, "importing:app")
    with listener.accept() as peer:
        assert ask(peer, "GET /imported").body == b"-15"


@MODES
def test_process_that_comes_back_from_the_gate_opens_no_slot(
    start: Any, listener: wire.Listener, mode: list[str]
) -> None:
    worker = start(*mode, "--poll-jobs", "forking:gated")
    worker.wait_for_line(is_line("the gate's process ended with 0"))
    with listener.accept() as peer:
        assert ask(peer).status == 200
