"""How long requests stay in the system: the hub and HAProxy beside an ideal queue.

    python3 bench/tail.py [--requests 3000] [--load 0.8] [--slots 4] [--service-ms 50]

Needs ``haproxy``.  Requests arrive at random (Poisson) at the given share of what the slots can serve;
each keeps its slot for a log-normal time.  The ideal is a first-come-first-served queue before as many
slots, computed from the same times of arrival and service.  HAProxy has one server with ``maxconn 1`` for
each slot.  Everything is on loopback; the run takes about 40 s for each of the two.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import random
import statistics
import tempfile
import time

from cost import haproxy, hub

SIGMA = 1.0  # of the log-normal times: a long tail, as expensive requests have


def ideal(arrivals: list[float], services: list[float], slots: int) -> list[float]:
    """Returns each request's time in a perfect queue, in seconds."""
    free = [0.0] * slots
    times = []
    for arrival, service in zip(arrivals, services, strict=True):
        end = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        times.append(end - arrival)
    return times


async def request(port: int, service: float) -> float:
    """Sends one request on a connection of its own; returns the time until the answer."""
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /sleep/%.3f HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % (service * 1000))
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"not answered: {answer[:200]!r}")
    return time.monotonic() - start


async def run(port: int, arrivals: list[float], services: list[float]) -> tuple[list[float], list[float]]:
    """Returns when the requests were really sent, and how long each took."""
    start = time.monotonic()
    sent, tasks = [], []
    for arrival, service in zip(arrivals, services, strict=True):
        await asyncio.sleep(max(0.0, start + arrival - time.monotonic()))
        sent.append(time.monotonic() - start)
        tasks.append(asyncio.create_task(request(port, service)))
    return sent, list(await asyncio.gather(*tasks))


def percentile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100)[percent - 1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--service-ms", type=float, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    mean = args.service_ms / 1000
    median = mean / 2.718281828459045 ** (SIGMA**2 / 2)
    services = [median * 2.718281828459045 ** chance.gauss(0, SIGMA) for _ in range(args.requests)]
    arrivals, now = [], 0.0
    for _ in range(args.requests):
        now += chance.expovariate(args.load * args.slots / mean)
        arrivals.append(now)
    with tempfile.TemporaryDirectory() as directory:
        for name, service in (
            ("hub", hub(args.slots, f"{directory}/hub")),
            ("haproxy", haproxy(args.slots, f"{directory}/haproxy", servers=args.slots)),
        ):
            with service as (port, _):
                sent, times = asyncio.run(run(port, arrivals, services))
            perfect = ideal(sent, services, args.slots)
            line = ", ".join(
                f"p{percent} {percentile(times, percent) * 1000:.1f} ms"
                f" ({percentile(times, percent) / percentile(perfect, percent):.3f} x ideal)"
                for percent in (50, 90, 99)
            )
            print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
