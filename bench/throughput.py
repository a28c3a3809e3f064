"""Requests a second of the plain worker beside waitress: as many threads, hello world, kept connections.

    python3 -m venv venv && venv/bin/pip install waitress
    venv/bin/python bench/throughput.py [--threads 4] [--seconds 3] [--rounds 5]

Both get the same requests from the same loop, one at a time on each of as many connections as there are
threads; to waitress it connects, and from the worker it accepts, as a hub would. The rounds alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

BENCH = pathlib.Path(__file__).resolve().parent
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
BODY = b"Hello, world!\n"


def app(_environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))])
    return [BODY]


@contextlib.contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *command], cwd=BENCH, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def worker(threads: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """Yields the process id of a worker and the connections that it has opened."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        address = f"127.0.0.1:{hub.getsockname()[1]}"
        options = ["--connect", address, "--workers", str(threads), "--log-level", "error"]
        with running(str(BENCH.parent / "pothead_worker.py"), *options, "throughput:app") as process:
            yield process.pid, [hub.accept()[0] for _ in range(threads)]


@contextlib.contextmanager
def waitress(threads: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """Yields the process id of waitress and connections to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = "import logging, socket, sys, throughput, waitress\n"
        code += "logging.getLogger('waitress').setLevel('ERROR')  # it complains a lot\n"
        code += "sock = socket.socket(fileno=int(sys.argv[1]))\n"
        code += "waitress.serve(throughput.app, sockets=[sock], threads=int(sys.argv[2]), _quiet=True)"
        fd = listener.fileno()
        with running("-c", code, str(fd), str(threads), pass_fds=[fd]) as process:
            yield process.pid, [socket.create_connection(listener.getsockname()) for _ in range(threads)]


def cpu_s(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(pid: int, socks: list[socket.socket], seconds: float) -> tuple[float, float]:
    """Return requests a second, and the CPU time of one in microseconds."""
    selector = selectors.DefaultSelector()
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(REQUEST)
        selector.register(sock, selectors.EVENT_READ)
    received = dict.fromkeys(socks, b"")
    count, began_at, began_cpu_s = 0, time.monotonic(), cpu_s(pid)
    while (elapsed_s := time.monotonic() - began_at) < seconds:
        for key, _ in selector.select(1):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            received[sock] += sock.recv(65536)
            if received[sock].endswith(BODY):
                received[sock] = b""
                count += 1
                sock.sendall(REQUEST)
    used_s = cpu_s(pid) - began_cpu_s
    for sock in socks:
        sock.close()
    return count / elapsed_s, used_s / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if importlib.util.find_spec("waitress") is None:
        sys.exit("waitress is not installed; the first lines of this file tell how to run it")
    found: dict[str, list[tuple[float, float]]] = {"worker": [], "waitress": []}
    for _ in range(arguments.rounds):
        for name, start in (("worker", worker), ("waitress", waitress)):
            with start(arguments.threads) as (pid, socks):
                found[name].append(measure(pid, socks, arguments.seconds))
    rates = {name: statistics.median(rate for rate, _ in runs) for name, runs in found.items()}
    for name, runs in found.items():
        cpu_us = statistics.median(us for _, us in runs)
        print(f"{name}: {rates[name]:.0f} requests/s, {cpu_us:.0f} us of CPU each")
    print(f"the worker serves {rates['worker'] / rates['waitress']:.2f} times as many as waitress")


if __name__ == "__main__":
    main()
