"""What a request costs in CPU time: the hub and HAProxy, side by side, on the same machine.

    python3 bench/cost.py [--seconds 4] [--rounds 3] [--slots 8] [--consumers 32]

Needs ``haproxy`` and ``wrk``.  Both stand between the same load and the same idle responder
(bench/responder.py), on loopback, on kept connections; HAProxy runs one thread, ``mode http``, as many
connections to its server as the hub has slots, each in use by one request at a time.  The CPU time is
that of the hub's or HAProxy's process alone, user and system, from /proc, so that what else the machine
does hardly matters.  The rounds alternate, and the median is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

HERE = pathlib.Path(__file__).resolve().parent
HAPROXY_CONFIG = """
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout queue 60s
    http-reuse always
listen main
    bind 127.0.0.1:{port}
{servers}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def process(*command: str, stdin: int | None = None) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def responder(*arguments: str) -> Iterator[None]:
    with process(sys.executable, str(HERE / "responder.py"), *arguments, stdin=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield


@contextlib.contextmanager
def hub(slots: int, log_path: str) -> Iterator[tuple[int, int]]:
    """Yields the port and the process id of a hub with waiting slots; it logs to a file."""
    main, workers = free_port(), free_port()
    arguments = ["--main-port", str(main), "--worker-port", str(workers), "--admin-port", "off"]
    with open(log_path, "w") as log:
        child = subprocess.Popen([sys.executable, str(HERE.parent / "pothead.py"), *arguments], stdout=log)
    try:
        wait_for_port(workers)
        with responder("connect", f"127.0.0.1:{workers}", str(slots)):
            yield main, child.pid
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def haproxy(slots: int, config_path: str, *, servers: int = 1) -> Iterator[tuple[int, int]]:
    """The same for HAProxy; its slots are the connections to one server, or one each to several."""
    port, responder_port = free_port(), free_port()
    lines = [
        f"    server responder{number} 127.0.0.1:{responder_port} maxconn {slots // servers}"
        for number in range(servers)
    ]
    config = HAPROXY_CONFIG.format(port=port, servers="\n".join(lines))
    pathlib.Path(config_path).write_text(config)
    with responder("listen", f"127.0.0.1:{responder_port}"), process("haproxy", "-f", config_path) as child:
        wait_for_port(port)
        yield port, child.pid


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise SystemExit(f"nothing listens on port {port}")


def cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(port: int, pid: int, path: str, consumers: int, seconds: float) -> tuple[float, float, float]:
    """Returns requests per second, CPU seconds a request and CPU seconds a MiB of response."""
    before = cpu_seconds(pid)
    command = ["wrk", "-t1", f"-c{consumers}", f"-d{seconds:g}s", f"http://127.0.0.1:{port}{path}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = cpu_seconds(pid) - before
    match = re.search(r"(\d+) requests in ([\d.]+)s, ([\d.]+)([KMG])B read", text)
    if match is None or "Non-2xx" in text:
        raise SystemExit(text)
    requests, elapsed = int(match[1]), float(match[2])
    mib = float(match[3]) * {"K": 1 / 1024, "M": 1, "G": 1024}[match[4]]
    return requests / elapsed, cpu / requests, cpu / mib


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--consumers", type=int, default=32)
    args = parser.parse_args()
    small: dict[str, list[tuple[float, float, float]]] = {"hub": [], "haproxy": []}
    large: dict[str, list[tuple[float, float, float]]] = {"hub": [], "haproxy": []}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(args.rounds):
            for name, service in (("haproxy", haproxy), ("hub", hub)):
                with service(args.slots, f"{directory}/{name}") as (port, pid):
                    small[name].append(load(port, pid, "/", args.consumers, args.seconds))
                    large[name].append(load(port, pid, "/large", 2, args.seconds))
    for what, results, column, unit in (("small", small, 1, "us/request"), ("large", large, 2, "us/MiB")):
        costs = {name: statistics.median(row[column] for row in rows) * 1e6 for name, rows in results.items()}
        rates = {name: statistics.median(row[0] for row in rows) for name, rows in results.items()}
        print(
            f"{what}: hub {costs['hub']:.1f} {unit} at {rates['hub']:.0f}/s, "
            f"haproxy {costs['haproxy']:.1f} {unit} at {rates['haproxy']:.0f}/s, "
            f"cost ratio {costs['hub'] / costs['haproxy']:.2f}, "
            f"rate ratio {rates['hub'] / rates['haproxy']:.2f}"
        )


if __name__ == "__main__":
    main()
