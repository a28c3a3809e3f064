"""How long requests stay in the system with several hubs, beside one hub with the same slots.

    python3 bench/hubs.py [--hubs 2 4] [--slots 4 16] [--load 0.8] [--share 0.9] [--far-ms 1]

One worker process has all slots. Requests arrive at random (Poisson) at the given share of what the slots can
serve; a share of them at the first hub, the rest at the others in turn. Each keeps its slot for 20 to 50 ms.
One hub and several have the same times of arrival and service, by turns in the same run; of the rounds the
median counts. With --far-ms, the last hub is behind a relay that delays by so much each way, and what its
requests took is compared with what those of the others did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORTEST_S, LONGEST_S = 0.02, 0.05
APP = """
import time

def app(environ, start_response):
    time.sleep(float(environ["PATH_INFO"][1:]))
    start_response("200 OK", [])
    return [b"done"]
"""


@contextlib.contextmanager
def hub() -> Iterator[tuple[int, int, subprocess.Popen[str]]]:
    """Run a hub; yield its ports for consumers and PTTH, and the process."""
    ports = ["--main-port", "0", "--worker-port", "0", "--ptth-port", "0", "--admin-port", "off"]
    command = [sys.executable, "-u", ROOT / "pothead.py", *ports, "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = {}
    for _ in range(3):
        name, _, address = process.stdout.readline().removeprefix("listening ").partition("=")
        found[name] = int(address.rpartition(":")[2])
    threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()
    try:
        yield found["consumers"], found["ptth"], process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def worker(ports: list[int], slots: int, directory: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker of these hubs, and yield when it is connected to all."""
    connect = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    options = ["--connect", connect, "--workers", str(slots), "jobs:app"]
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "pothead_worker.py", *options],
        cwd=directory,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for _ in ports:
        assert "connected" in process.stderr.readline()
    try:
        time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


async def relay(target: int, delay_s: float) -> tuple[asyncio.Server, int]:
    """Serve a port from which bytes reach another one later, each way."""

    async def move(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 16):
            loop.call_later(delay_s, writer.write, data)
        loop.call_later(delay_s, writer.close)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        with contextlib.suppress(OSError):
            await asyncio.gather(move(reader, far_writer), move(far_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def run_relay(target: int, delay_s: float) -> int:
    """The same in a thread of its own; return its port."""
    ports: list[int] = []
    ready = threading.Event()

    async def run() -> None:
        server, port = await relay(target, delay_s)
        ports.append(port)
        ready.set()
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    ready.wait()
    return ports[0]


async def request(port: int, service_s: float) -> float:
    """Send one request on a connection of its own; return the time until the answer."""
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /%.4f HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % service_s
    )
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"not answered: {answer[:200]!r}")
    return time.monotonic() - start


async def consume(jobs: list[tuple[float, float, int]], ports: list[int]) -> list[float]:
    """Return how long each job took; they are: when it arrives, how long it takes, at which hub."""
    start = time.monotonic()
    tasks = []
    for arrival, service_s, which in jobs:
        await asyncio.sleep(max(0.0, start + arrival - time.monotonic()))
        tasks.append(asyncio.create_task(request(ports[which % len(ports)], service_s)))
    return list(await asyncio.gather(*tasks))


def cpu_s(process: subprocess.Popen[str]) -> float:
    """The CPU time of a process; the clock is what clock_getcpuclockid(3) returns on Linux."""
    return time.clock_gettime(~process.pid << 3 | 2)


def measure(
    hubs: int, slots: int, jobs: list[tuple[float, float, int]], far_s: float, directory: str
) -> tuple[list[float], float, float]:
    """Return the times, and the CPU time of all hubs and of the worker, for each request."""
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(hub()) for _ in range(hubs)]
        ports = [ptth for _, ptth, _ in several]
        if far_s and hubs > 1:
            ports[-1] = run_relay(ports[-1], far_s)
        process = stack.enter_context(worker(ports, slots, directory))
        processes = [each for _, _, each in several]
        before = [sum(map(cpu_s, processes)), cpu_s(process)]
        times = asyncio.run(consume(jobs, [main for main, _, _ in several]))
        return (
            times,
            (sum(map(cpu_s, processes)) - before[0]) / len(jobs),
            (cpu_s(process) - before[1]) / len(jobs),
        )


def percentile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100)[percent - 1]


def compare(hubs: int, slots: int, args: argparse.Namespace, directory: str) -> None:
    ratios: list[dict[str, float]] = []
    for number in range(args.rounds):
        chance = random.Random(number)
        jobs, now = [], 0.0
        for _ in range(args.requests):
            now += chance.expovariate(args.load * slots / ((SHORTEST_S + LONGEST_S) / 2))
            which = 0 if chance.random() < args.share else chance.randrange(1, hubs)
            jobs.append((now, chance.uniform(SHORTEST_S, LONGEST_S), which))
        alone, hub_s, worker_s = measure(1, slots, jobs, 0.0, directory)
        times, hubs_s, workers_s = measure(hubs, slots, jobs, args.far_ms / 1000, directory)
        found = {
            "mean": statistics.mean(times) / statistics.mean(alone),
            "p99": percentile(times, 99) / percentile(alone, 99),
            "p99 ms": percentile(times, 99) * 1000,
            "CPU of hubs": hubs_s / hub_s,
            "CPU of the worker": workers_s / worker_s,
        }
        if args.far_ms:
            far = [time for time, (_, _, which) in zip(times, jobs, strict=True) if which == hubs - 1]
            near = [time for time, (_, _, which) in zip(times, jobs, strict=True) if which != hubs - 1]
            found["far beside near, mean"] = statistics.mean(far) / statistics.mean(near)
            found["far beside near, p99"] = percentile(far, 99) / percentile(near, 99)
        ratios.append(found)
    middle = {name: statistics.median(each[name] for each in ratios) for name in ratios[0]}
    text = ", ".join(f"{name} {value:.2f}" for name, value in middle.items())
    print(f"{hubs} hubs, {slots} slots, beside one hub: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hubs", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--share", type=float, default=0.9, help="of the requests, at the first hub")
    parser.add_argument("--far-ms", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "jobs.py").write_text(APP)
        for hubs in args.hubs:
            for slots in args.slots:
                compare(hubs, slots, args, directory)


if __name__ == "__main__":
    main()
