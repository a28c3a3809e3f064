"""Workers that leave by themselves: when they have had nothing to do for a while, or enough."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

import wire
from wire import ask, is_line, request

SLOW = """
import time

def app(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"] or 0))
    start_response("200 OK", [])
    return [b"done"]
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def test_worker_with_nothing_to_do_ends(listener: wire.Listener) -> None:
    with wire.worker_process(listener, "--idle-timeout", "300ms") as worker, listener.accept() as peer:
        peer.expect_eof()
        assert worker.wait() == 0
    assert "draining: it has had nothing to do for 0.3 s" in worker.stderr


def test_idle_time_begins_with_the_last_response(listener: wire.Listener, slow: Path) -> None:
    with (
        wire.worker_process(listener, "--idle-timeout", "500ms", "slow:app", cwd=slow) as worker,
        listener.accept() as peer,
    ):
        began_at = time.monotonic()
        assert ask(peer, "GET /?0.7").body == b"done"
        peer.expect_eof()
        assert time.monotonic() - began_at > 1.15
        assert worker.wait() == 0


def test_worker_ends_after_its_number_of_requests(listener: wire.Listener) -> None:
    with wire.worker_process(listener, "--max-requests", "2") as worker, listener.accept() as peer:
        assert ask(peer).value(b"connection") is None
        assert ask(peer).value(b"connection") == b"close"
        peer.expect_eof()
        assert worker.wait() == 0


def test_what_runs_has_more_than_the_graceful_timeout_unless_told_to_end(
    listener: wire.Listener, slow: Path
) -> None:
    options = ("--max-requests", "1", "--graceful-timeout", "100ms", "slow:app")
    with wire.worker_process(listener, *options, cwd=slow) as worker, listener.accept() as peer:
        assert ask(peer, "GET /?0.4").body == b"done"
        assert worker.wait() == 0
    with wire.worker_process(listener, *options, cwd=slow) as worker, listener.accept() as peer:
        peer.send(request("GET /?30"))
        worker.wait_for_error(is_line("draining: "))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 1


def test_gated_worker_with_nothing_to_do_ends(listener: wire.Listener) -> None:
    options = ("--poll-jobs", "--idle-timeout", "200ms")
    with wire.worker_process(listener, *options) as worker, listener.accept() as peer:
        peer.expect_eof()
        assert worker.wait() == 0


@pytest.mark.parametrize(
    ("option", "text"), [("--idle-timeout", "0"), ("--max-requests", "0"), ("--max-requests", "many")]
)
def test_limits_that_are_none_are_refused(option: str, text: str) -> None:
    ended = wire.run_to_end([*wire.program("pothead_worker"), option, text])
    assert ended.status == 2
    assert option in ended.stderr
