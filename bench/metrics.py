"""What a scrape costs after many request processes, and whether it shows each of their counts.

    python3 bench/metrics.py [--requests 10000]

Needs prometheus-client. One slot with --use-request-subprocess; each request increments a counter and
observes a histogram. The time of a scrape is the median of 20.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

WORKER = pathlib.Path(__file__).resolve().parent.parent / "pothead_worker.py"
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
APP = """
from prometheus_client import Counter, Histogram
REQUESTS = Counter("bench_requests", "Requests that came.")
SECONDS = Histogram("bench_seconds", "Time that they took.")

@SECONDS.time()
def app(environ, start_response):
    REQUESTS.inc()
    start_response("200 OK", [])
    return [b"hello"]
"""


def serve(slot: socket.socket, requests: int) -> None:
    for _ in range(requests):
        slot.sendall(REQUEST)
        answer = b""
        while not answer.endswith(b"hello"):
            data = slot.recv(4096)
            assert data, "the worker closed its connection"
            answer += data


def scrape(port: int) -> tuple[float, float]:
    """Return how many requests the page shows, and the median time of a scrape in ms."""
    times = []
    for _ in range(20):
        began_at = time.perf_counter()
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        times.append((time.perf_counter() - began_at) * 1000)
    shown = next(line.split()[1] for line in page.splitlines() if line.startswith("bench_requests_total "))
    assert f"bench_seconds_count {shown}" in page
    return float(shown), statistics.median(times)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    requests = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as hub:
        metrics = pathlib.Path(directory, "metrics")
        metrics.mkdir()
        pathlib.Path(directory, "counting.py").write_text(APP)
        port = free_port()
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "PROMETHEUS_PORT": str(port)}
        command = [sys.executable, str(WORKER), "--connect", f"127.0.0.1:{hub.getsockname()[1]}"]
        command += ["--log-level", "error", "--use-request-subprocess", "counting:app"]
        worker = subprocess.Popen(command, cwd=directory, env={**os.environ, **environment})
        with hub.accept()[0] as slot:
            done = 0
            for wanted in (10, requests):
                serve(slot, wanted - done)
                done = wanted
                time.sleep(1)  # until the last process has ended
                shown, scrape_ms = scrape(port)
                files = len(list(metrics.iterdir()))
                print(f"after {wanted}: shows {shown:.0f}; a scrape takes {scrape_ms:.1f} ms; {files} files")
                assert shown == wanted
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    main()
