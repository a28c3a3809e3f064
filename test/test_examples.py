"""The examples as a user runs them: hub and worker processes, and a consumer that speaks bytes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import wire
from wire import fetch, request

EXAMPLES = wire.ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
ON_PATH = os.pathsep.join([str(EXAMPLES), str(wire.ROOT)])
WAVE_S = 20


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc here")


def has_option(option: str) -> bool:
    command = wire.python(str(wire.ROOT / "pothead_worker.py"), "--help")
    return option in subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Service(NamedTuple):
    hub: wire.HubProcess
    worker: wire.WorkerProcess


@contextlib.contextmanager
def example(name: str, directory: Path, *options: str, hub_options: Iterable[str] = ()) -> Iterator[Service]:
    """Run an example, wrapped in the standard library's checker of WSGI apps."""
    (directory / "checked.py").write_text(
        "from wsgiref.validate import validator\n"
        f"import {name}\n"
        f"app = validator({name}.app)\n"
        f"app.wait_for_slot = getattr({name}.app, 'wait_for_slot', None)\n"
    )
    environment = {"PYTHONPATH": ON_PATH}
    with wire.hub_process(*hub_options) as hub:
        arguments = (*options, "checked:app")
        with wire.worker_process(hub, *arguments, cwd=directory, environment=environment) as worker:
            yield Service(hub, worker)


def wait_until_busy(hub: wire.HubProcess) -> None:
    hub.until(lambda stats: stats["running"])


# ---- All of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short_and_runs_as_its_docstring_says(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    (line,) = re.findall(r"^    (python3 .+)$", text, re.MULTILINE)
    if "--poll-jobs" in line and not has_option("--poll-jobs"):
        pytest.skip("this worker has no --poll-jobs")
    ports = {f"POTHEAD_HUB_{role}_PORT": "0" for role in ("MAIN", "WORKER", "ADMIN")}
    hub = wire.HubProcess(shlex.split(line.replace("python3", sys.executable)), EXAMPLES, ports)
    with wire.running(hub):
        hub.wait_until_ready()
        assert fetch(hub.main, request("GET /?digits=9")).status in (200, 405)


@pytest.mark.parametrize("name", ["transcode", "memory_hungry"])
def test_example_refuses_other_methods(name: str, tmp_path: Path) -> None:
    with example(name, tmp_path) as (hub, _worker):
        response = fetch(hub.main, request("GET /"))
        assert (response.status, response.value(b"Allow")) == (405, b"POST, PUT")
        assert fetch(hub.main, request("HEAD /")).status == 405


# ---- cancellable.py ----------------------------------------------------------------------------------


def test_cancellable_finds_a_prime(tmp_path: Path) -> None:
    with example("cancellable", tmp_path) as (hub, _worker):
        prime = int(fetch(hub.main, request("GET /?digits=3")).body)
        assert 100 < prime < 1000 and all(prime % divisor for divisor in range(2, 32))
        prime = int(fetch(hub.main, request("GET /?digits=80")).body)
        assert len(str(prime)) == 80 and pow(3, prime - 1, prime) == 1
        assert fetch(hub.main, request("GET /?digits=0")).status == 400


@needs_proc
def test_cancellable_stops_when_its_consumer_leaves(tmp_path: Path) -> None:
    with example("cancellable", tmp_path) as (hub, worker):
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(request("GET /?digits=999"))
            wait_until_busy(hub)
            ticks = wire.cpu_ticks(worker.pid)
            wire.until(lambda: wire.cpu_ticks(worker.pid) > ticks + 5)  # or it had not even begun
        worker.wait_for_error(re.compile(r"cancelled after [0-9.]+ s, [0-9]+ candidates").fullmatch)
        assert fetch(hub.main, request("GET /?digits=2")).status == 200


# ---- memory_hungry.py --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--workers", "2"), ("--poll-jobs",)], ids=["fixed", "gated"])
def test_memory_hungry_sorts_lines(tmp_path: Path, options: tuple[str, ...]) -> None:
    if not has_option(options[0]):
        pytest.skip(f"this worker has no {options[0]}")
    with example("memory_hungry", tmp_path, *options) as (hub, _worker):
        for _ in range(3):
            response = fetch(hub.main, request("PUT /", body=b"pear\napple\nquince\n"))
            assert response.body == b"apple\npear\nquince\n"
        assert fetch(hub.main, request("POST /", "Content-Length: 0")).body == b""


def test_memory_hungry_refuses_what_is_too_long(tmp_path: Path) -> None:
    with example("memory_hungry", tmp_path) as (hub, _worker):
        assert fetch(hub.main, request("PUT /", body=bytes((16 << 20) + 1))).status == 413


# ---- transcode.py ------------------------------------------------------------------------------------


def ffmpeg(*arguments: str, stdin: bytes = b"") -> bytes:
    command = ["ffmpeg", "-hide_banner", "-loglevel", "error", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def wave() -> bytes:
    """A tone as a WAV file, made by ffmpeg."""
    tone = f"sine=frequency=440:sample_rate=48000:duration={WAVE_S}"
    return ffmpeg("-nostdin", "-f", "lavfi", "-i", tone, "-f", "wav", "pipe:1")


@needs_ffmpeg
def test_transcode_makes_opus_of_the_whole_tone(tmp_path: Path, wave: bytes) -> None:
    with example("transcode", tmp_path) as (hub, _worker):
        response = fetch(hub.main, request("PUT /", body=wave))
    assert (response.status, response.value(b"Content-Type")) == (200, b"audio/ogg")
    assert response.body.startswith(b"OggS") and b"OpusHead" in response.body[:100]
    pcm = ffmpeg("-i", "pipe:0", "-f", "s16le", "-ac", "1", "-ar", "48000", "pipe:1", stdin=response.body)
    assert len(pcm) / 2 / 48000 == pytest.approx(WAVE_S, abs=0.1)


@needs_ffmpeg
def test_transcode_answers_while_the_request_is_still_being_sent(tmp_path: Path, wave: bytes) -> None:
    with example("transcode", tmp_path, hub_options=["--stream-requests"]) as (hub, _worker):
        with wire.Peer.connect(hub.main) as consumer:
            message = request("PUT /", body=wave)
            consumer.send(message[: len(message) * 3 // 4])
            head = consumer.read_head()
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"OggS" in consumer.read_until(b"OpusHead")
            consumer.send(message[len(message) * 3 // 4 :])
            assert consumer.read_until(b"\r\n0\r\n\r\n")


@needs_ffmpeg
def test_transcode_refuses_what_is_no_audio(tmp_path: Path) -> None:
    with example("transcode", tmp_path) as (hub, _worker):
        assert fetch(hub.main, request("PUT /", body=b"this is not audio\n" * 1000)).status == 422
        assert fetch(hub.main, request("PUT /", "Content-Length: 0")).status == 422


@needs_ffmpeg
@needs_proc
@pytest.mark.parametrize("has_answered", [True, False], ids=["while answering", "before the answer"])
def test_transcode_kills_ffmpeg_when_the_consumer_leaves(
    tmp_path: Path, wave: bytes, has_answered: bool
) -> None:
    with example("transcode", tmp_path, hub_options=["--stream-requests"]) as (hub, worker):
        message = request("PUT /", body=wave)
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(message[: len(message) * 3 // 4] if has_answered else message[:1000])
            if has_answered:
                consumer.read_head()
            process = os.pidfd_open(wire.until(lambda: find_child(worker.pid)) or 0)
        try:
            assert select.select([process], [], [], wire.DEADLINE_S)[0]
        finally:
            os.close(process)
        assert fetch(hub.main, request("PUT /", body=wave)).status == 200


def find_child(pid: int) -> int | None:
    """Return the process id of a child of `pid`."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if children := (task / "children").read_text().split():
                return int(children[0])
    return None
