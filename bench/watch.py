"""What it costs the hub to be watched: its CPU time while requests wait, with and without onlookers.

    python3 bench/watch.py [--seconds 20] [--queued 1000]

So many requests wait at a hub whose one slot is busy and never answers, so that whatever the hub does, it
does for the onlookers: a Prometheus that scrapes /metrics, and status pages that ask for /stats every two
seconds (bench/watch.py asks in their place; what a browser does with the answer costs the hub nothing).
The CPU time is that of the hub's process, user and system, from /proc; the wake-ups are its voluntary
context switches.  Needs ``prometheus-client``.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

HUB = pathlib.Path(__file__).resolve().parent.parent / "pothead.py"
PAGE_PERIOD_S = 2.0

# name -> (path, period in seconds) of each onlooker
ONLOOKERS = {
    "nobody": [],
    "a scrape every 5 s": [("/metrics", 5.0)],
    "a scrape every 1 s": [("/metrics", 1.0)],
    "an open page": [("/stats", PAGE_PERIOD_S)],
    "a scrape every 1 s and an open page": [("/metrics", 1.0), ("/stats", PAGE_PERIOD_S)],
}


@contextlib.contextmanager
def hub(max_queue: int) -> Iterator[tuple[int, dict[str, int]]]:
    """Yields the process id and the ports of a hub."""
    options = ["--main-port=0", "--worker-port=0", "--admin-port=0", f"--max-queue={max_queue}"]
    child = subprocess.Popen(
        [sys.executable, str(HUB), *options, "--queue-timeout=off"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(3)]
        yield child.pid, {name: int(port) for name, port in re.findall(r"(\w+)=.*:(\d+)", "".join(lines))}
    finally:
        child.kill()
        child.communicate()


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of the process, to the nanosecond: so little is lost in the ticks of stat."""
    return int(pathlib.Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def wake_ups(pid: int) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])


def get(admin: http.client.HTTPConnection, path: str) -> bytes:
    admin.request("GET", path)
    response = admin.getresponse()
    body = response.read()
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {body.decode()}")
    return body


def watch(port: int, path: str, period_s: float, is_over: threading.Event) -> None:
    """Asks at once and then again and again, on one connection."""
    admin = http.client.HTTPConnection("127.0.0.1", port)
    while not is_over.wait(period_s):
        get(admin, path)
    admin.close()


def measure(pid: int, port: int, onlookers: list[tuple[str, float]], seconds: float) -> tuple[float, int]:
    """Returns the share of a CPU that the hub takes, and how often it wakes up."""
    is_over = threading.Event()
    threads = [threading.Thread(target=watch, args=(port, *each, is_over)) for each in onlookers]
    before, woken, started = cpu_seconds(pid), wake_ups(pid), time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    share = (cpu_seconds(pid) - before) / (time.monotonic() - started)
    woken = wake_ups(pid) - woken
    is_over.set()
    for thread in threads:
        thread.join()
    return share, woken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--queued", type=int, default=1000)
    args = parser.parse_args()
    with hub(args.queued) as (pid, ports), contextlib.ExitStack() as stack:
        admin = http.client.HTTPConnection("127.0.0.1", ports["admin"])
        stack.enter_context(socket.create_connection(("127.0.0.1", ports["workers"])))
        for number in range(args.queued + 1):
            consumer = stack.enter_context(socket.create_connection(("127.0.0.1", ports["consumers"])))
            consumer.sendall(b"GET /number/%d HTTP/1.1\r\nHost: hub\r\n\r\n" % number)
        while json.loads(get(admin, "/stats"))["queue_length"] < args.queued:
            pass
        sizes = {path: len(get(admin, path)) for path in ("/stats", "/metrics", "/")}
        admin.close()
        print(f"{args.queued} requests wait; " + ", ".join(f"{k}: {v} bytes" for k, v in sizes.items()))
        for name, onlookers in ONLOOKERS.items():
            share, woken = measure(pid, ports["admin"], onlookers, args.seconds)
            print(f"{name}: {share:.3%} of a CPU, {woken} wake-ups in {args.seconds:g} s", flush=True)


if __name__ == "__main__":
    main()
