"""How close a gate on idle CPUs comes to the best fixed number of slots: 20 queued jobs that compute.

    python3 bench/gates.py [--cpu-seconds 0.2 1] [--jobs 20] [--rounds 3]

All jobs are in the hub's queue before the worker begins. Each uses so much CPU time in a thread, without the
interpreter's lock. The time counts from the worker's first connection to the last answer, without the
worker's start. The best fixed --workers is looked for from 1 to one more than there are CPUs. Run it on an
idle machine: a gate leaves alone what others use, and a fixed number of slots does not.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gating  # noqa: E402  # after the path is set

DATA = b"x" * (1 << 20)


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Use as much CPU time as the path says, outside of the interpreter's lock; tell when it was."""
    began_at, until = time.monotonic(), time.thread_time() + float(environ["PATH_INFO"][1:])
    while time.thread_time() < until:
        hashlib.sha256(DATA)
    start_response("200 OK", [])
    return [f"{began_at} {time.monotonic()}".encode()]


app.wait_for_slot = gating.wait_for_idle_cpus(1)  # type: ignore[attr-defined]


def run(jobs: int, cpu_s: float, options: list[str]) -> tuple[float, int]:
    """Return the time for all jobs, and how many ran at most at the same time."""
    with tempfile.TemporaryFile("w+") as log:
        ports = ["--main-port", "0", "--worker-port", "0", "--admin-port", "off", "--log-level", "error"]
        hub = subprocess.Popen(
            [sys.executable, "-u", ROOT / "pothead.py", *ports], stdout=subprocess.PIPE, text=True
        )
        assert hub.stdout is not None
        main, worker_port = (int(hub.stdout.readline().rpartition(":")[2]) for _ in range(2))
        threading.Thread(target=log.writelines, args=(hub.stdout,), daemon=True).start()
        spans: list[tuple[float, float]] = []

        def ask() -> None:
            consumer = http.client.HTTPConnection("127.0.0.1", main)
            consumer.request("GET", f"/{cpu_s}")
            began_at, ended_at = map(float, consumer.getresponse().read().split())
            spans.append((began_at, ended_at))
            consumer.close()

        asking = [threading.Thread(target=ask) for _ in range(jobs)]
        for thread in asking:
            thread.start()
        time.sleep(0.5)  # until all wait in the queue
        command = [sys.executable, ROOT / "pothead_worker.py", "--connect", f"127.0.0.1:{worker_port}"]
        worker = subprocess.Popen(
            [*command, "--log-level", "error", *options, "gates:app"], cwd=ROOT / "bench"
        )
        for thread in asking:
            thread.join()
        for process in (worker, hub):
            process.terminate()
            process.wait()
    took_s = max(ended for _, ended in spans) - min(began for began, _ in spans)
    return took_s, max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu-seconds", type=float, nargs="+", default=[0.2, 1.0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    kinds = {f"--workers {n}": ["--workers", str(n)] for n in range(1, len(os.sched_getaffinity(0)) + 2)}
    kinds["--poll-jobs"] = ["--poll-jobs"]
    for cpu_s in arguments.cpu_seconds:
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in kinds}
        for _ in range(arguments.rounds):
            for name, options in kinds.items():
                found[name].append(run(arguments.jobs, cpu_s, options))
        medians = {name: statistics.median(took_s for took_s, _ in runs) for name, runs in found.items()}
        for name, runs in found.items():
            most = max(count for _, count in runs)
            print(f"{cpu_s:g} s of CPU: {name}: {medians[name]:.2f} s, at most {most} at a time")
        best = min((name for name in kinds if name != "--poll-jobs"), key=medians.__getitem__)
        print(
            f"{cpu_s:g} s of CPU: --poll-jobs takes {medians['--poll-jobs'] / medians[best]:.2f} times {best}"
        )


if __name__ == "__main__":
    main()
