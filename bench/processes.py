"""What a process for each request costs: the same app in threads and in processes, side by side.

    python3 bench/processes.py [--requests 500] [--rounds 3]

One slot, one request at a time on one kept connection, straight from here to the worker without a hub, so
that the difference of the two medians is what --use-request-subprocess adds to a request.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

WORKER = pathlib.Path(__file__).resolve().parent.parent / "pothead_worker.py"
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"


@contextlib.contextmanager
def slot(*options: str) -> Iterator[socket.socket]:
    """Yields the connection of a worker that serves the demo."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        port = hub.getsockname()[1]
        command = [sys.executable, str(WORKER), "--connect", f"127.0.0.1:{port}", "--log-level", "error"]
        worker = subprocess.Popen([*command, *options])
        try:
            with hub.accept()[0] as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield sock
        finally:
            worker.terminate()
            worker.wait()


def ask(sock: socket.socket) -> float:
    """Returns the seconds until the whole response was there."""
    began_at = time.perf_counter()
    sock.sendall(REQUEST)
    received = b""
    while not received.endswith(b" s\n"):
        received += sock.recv(4096)
    return time.perf_counter() - began_at


def measure(requests: int, *options: str) -> list[float]:
    with slot(*options) as sock:
        for _ in range(20):
            ask(sock)
        return [ask(sock) * 1000 for _ in range(requests)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"threads": [], "processes": []}
    for _ in range(args.rounds):
        times["threads"] += measure(args.requests)
        times["processes"] += measure(args.requests, "--use-request-subprocess")
    for name, values in times.items():
        p99 = statistics.quantiles(values, n=100)[98]
        print(f"{name}: median {statistics.median(values):.2f} ms, p99 {p99:.2f} ms")
    overhead = statistics.median(times["processes"]) - statistics.median(times["threads"])
    print(f"overhead: {overhead:.2f} ms in the median")


if __name__ == "__main__":
    main()
