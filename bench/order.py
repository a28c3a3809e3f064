"""Who goes first: what it costs, and whether the shares are fair.

    python3 bench/order.py

compares 100,000 random histories with sorting everything every time (`--histories`), times decisions among
100,000 waiting requests, and plays ten minutes of tenants that share four slots, in no time.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import math
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

import order_model  # noqa: E402

import wire  # noqa: E402
from pothead import ANYTHING, Claim, Policy  # noqa: E402

Job = tuple[str, float]  # tenant, seconds


class Simulation:
    """A policy, slots that serve jobs under a clock of their own, and how long each job has waited."""

    def __init__(self, slots: int) -> None:
        self.policy: Policy[Job, order_model.Slot] = Policy(1_000_000, is_fair=True)
        self.now = 0.0
        self.served = 0
        self.worked: Counter[str] = Counter()
        self.waits: list[tuple[str, float, float]] = []  # tenant, its wait, the shortest remaining job then
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._ends: dict[order_model.Slot, float] = {}
        self._remaining: dict[int, float] = {}
        for number in range(slots):
            self.policy.park(order_model.Slot(str(number), self.policy.join("m")))

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._numbers), what))

    def arrive(self, tenant: str, seconds: float) -> None:
        ticket = self.policy.put((tenant, seconds), self.now, math.inf, Claim(tenant=tenant))
        full = not self.policy.idle
        self._remaining[ticket.number] = min(self._ends.values()) - self.now if full else 0.0

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, what = heapq.heappop(self._events)
            what()
            if not self._events or self._events[0][0] > self.now:
                self.dispatch()
        for slot, end in self._ends.items():  # what runs has been worked, too
            tenant, seconds = slot.job  # type: ignore[attr-defined]
            self.worked[tenant] += seconds - (end - until_s)

    def dispatch(self) -> None:
        self.policy.wake(self.now)
        self.policy.next_event()
        while pair := self.policy.next_pair():
            ticket, slot = pair
            tenant, seconds = ticket.item
            self.waits.append((tenant, self.now - ticket.since, self._remaining.pop(ticket.number)))
            slot.job = ticket.item  # type: ignore[attr-defined]
            self._ends[slot] = self.now + seconds
            self.at(self.now + seconds, lambda slot=slot: self.finish(slot))  # type: ignore[misc]

    def finish(self, slot: order_model.Slot) -> None:
        tenant, seconds = slot.job  # type: ignore[attr-defined]
        del self._ends[slot]
        self.worked[tenant] += seconds
        self.served += 1
        mean_s = self.policy.typical_s if self.served > 1 else 0.0
        self.policy.typical_s = mean_s + (seconds - mean_s) / min(self.served, 50)
        self.policy.release(slot, self.now, park=True)


def occasional(slots: int = 4) -> float:
    """Return by how much the waits of one who asks every 3 s exceed the shortest remaining job, at most."""
    rng = random.Random(1)
    simulation = Simulation(slots)
    for _ in range(1000):
        simulation.at(0.0, lambda: simulation.arrive("many", rng.uniform(0.9, 1.1)))
    for number in range(60):
        simulation.at(1.0 + 3 * number, lambda: simulation.arrive("few", 1.0))
    simulation.run(200.0)
    waits = [wait - remaining for tenant, wait, remaining in simulation.waits if tenant == "few"]
    assert len(waits) == 60
    return max(waits)


def share(long_s: float, slots: int = 4, until_s: float = 600.0) -> float:
    """Return the difference of the shares of two who both want more than they get."""
    rng = random.Random(2)
    simulation = Simulation(slots)
    for _ in range(3000):
        simulation.at(0.0, lambda: simulation.arrive("short", rng.uniform(0.5, 1.5)))
    for _ in range(3000):
        simulation.at(0.0, lambda: simulation.arrive("long", long_s * rng.uniform(0.5, 1.5)))
    simulation.run(until_s)
    total = sum(simulation.worked.values())
    return abs(simulation.worked["short"] - simulation.worked["long"]) / total


def decisions(is_fair: bool, *, scoped: bool) -> tuple[float, float, float]:
    """Return median and p99 of a decision among 100,000, and the median of a slot's release, in us."""
    rng = random.Random(3)
    pools = [f"http://pool{number}" for number in range(50)]
    policy: Policy[str, order_model.Slot] = Policy(1_000_000, is_fair=is_fair, origins=pools)
    slots = []
    for number in range(120):
        origins = frozenset(pools[number % 60 : number % 60 + 1]) if scoped else ANYTHING
        slots.append(order_model.Slot(str(number), policy.join(str(number), origins), origins))
        policy.park(slots[-1])
    claims = [Claim(rng.choice(pools), str(rng.randrange(1000))) for _ in range(120_000)]
    for claim in claims[:100_000]:
        policy.put("x", 0.0, math.inf, claim)
    policy.wake(0.0)
    while policy.next_pair():
        pass
    took, freed = [], []
    for number, claim in enumerate(claims[100_000:]):
        now = number * 0.01
        policy.put("x", now, math.inf, claim)
        policy.next_event()
        policy.wake(now)
        began = time.perf_counter()
        policy.release(slots[number % 120], now, park=True)
        released = time.perf_counter()
        assert policy.next_pair() is not None
        took.append(time.perf_counter() - released)
        freed.append(released - began)
    return (
        statistics.median(took) * 1e6,
        sorted(took)[-len(took) // 100] * 1e6,
        statistics.median(freed) * 1e6,
    )


def serve(hub: wire.HubProcess, worked: Counter[str]) -> None:
    """Be a slot, whose jobs take as long as their requests say."""
    with contextlib.suppress(OSError, AssertionError), wire.Peer.connect(hub.worker) as slot:
        slot.sock.settimeout(60)
        while True:
            request = slot.read_request()
            seconds = float(request.target[1:])
            time.sleep(seconds)
            worked[(request.value(b"X-Key") or b"").decode()] += seconds
            slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def real(seconds: float) -> tuple[float, float]:
    """Return the longest wait beyond one job of who asks seldom, and the difference of two shares, in a hub.

    Everything goes ten times as fast as in the simulation.
    """
    options = ("--fair-by", "X-Key", "--max-queue", "5000", "--queue-timeout", "off")
    waits, worked = [], Counter[str]()
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(wire.hub_process(*options))

        def ask(key: str, job_s: float) -> wire.Peer:
            consumer = stack.enter_context(wire.Peer.connect(hub.main))
            consumer.send(f"GET /{job_s} HTTP/1.1\r\nHost: bench\r\nX-Key: {key}\r\n\r\n".encode())
            return consumer

        for _ in range(400):
            ask("many", 0.1)
        for _ in range(4):
            threading.Thread(target=serve, args=(hub, worked), daemon=True).start()
        for _ in range(int(seconds / 0.9)):
            time.sleep(0.3)
            began = time.monotonic()
            ask("few", 0.1).read_response()
            waits.append(time.monotonic() - began - 0.2)
        while hub.stats()["queue_length"]:
            time.sleep(0.1)
        worked.clear()
        for _ in range(100):
            ask("long", 2.0)
        for _ in range(1200):
            ask("short", 0.1)
        time.sleep(seconds * 2 / 3)
        running = hub.stats()
        total = {row["tenant"]: row["worker_seconds"] for row in running["tenants"]}
    return max(waits), abs(total["short"] - total["long"]) / (total["short"] + total["long"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--histories", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--real", type=float, default=0.0, help="seconds to do it in a hub, too (default: 0)")
    options = parser.parse_args()
    print(
        f"one of 1 s each 3 s beside 1,000: waits {occasional():.3f} s longer than the shortest rest, at most"
    )
    for long_s in (1.0, 20.0):
        print(f"ten minutes, jobs of 1 s and of {long_s:g} s: the shares differ by {share(long_s):.2%}")
    for is_fair, scoped in itertools.product((False, True), (False, True)):
        what = ("fair shares" if is_fair else "by place") + (", slots with pools" if scoped else "")
        pair, p99, release = decisions(is_fair, scoped=scoped)
        print(f"100,000 wait, {what}: a decision {pair:.1f} us, p99 {p99:.0f} us; a release {release:.1f} us")
    if options.real:
        wait_s, difference = real(options.real)
        print(f"in a hub, jobs of 0.1 s: waits {wait_s:.3f} s longer than one job, at most")
        print(f"in a hub, jobs of 0.1 s and of 2 s: the shares differ by {difference:.2%}")
    began = time.monotonic()
    for seed in range(options.histories):
        order_model.check_history(seed)
    print(f"{options.histories} histories agree with the model, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
