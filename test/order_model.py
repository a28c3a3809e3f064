"""Who goes first, by brute force: everything is sorted every time. What `Policy` must agree with.

`check_history` plays a random history to both: arrivals, departures, requeues, slots that come and go, expiry
and eviction. All times and charges are multiples of 1/8, so that sums are exact in any order.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from pothead import Claim, Machine, Offer, Policy, Ticket

NAMES = ("http://a", "http://b", "http://c", "http://nobody")
SCOPES = tuple(
    frozenset(scope)
    for scope in ((), (NAMES[0],), (NAMES[1],), (NAMES[0], NAMES[1]), (NAMES[1], NAMES[2]), NAMES[:3])
)
TENANTS = ("anna", "bert", "cleo")


@dataclass(eq=False)
class Slot:
    name: str
    offer: Offer
    origins: frozenset[str] = frozenset()
    parked: int = 0
    idle: bool = False
    run: Run | None = None  # what it is busy with, even if its request is not with it any more

    @property
    def machine(self) -> Machine:
        return self.offer.machine

    def serves(self, origin: str) -> bool:
        return not self.origins or origin in self.origins


@dataclass(eq=False)
class Request:
    number: int
    since: float
    limit_at: float
    place: float
    origin: str
    tenant: str
    urgency: int
    waits: bool = True
    ticket: Ticket | None = None
    run: Run | None = None


@dataclass(eq=False)
class Run:
    request: Request
    since: float
    estimate_s: float
    ended_at: float = math.inf
    is_charged: bool = True
    turn: int = 0  # of its tenant before

    def counts(self, now: float) -> float:
        """Return the estimate, a quarter more each time that has passed; at its end, how long it ran."""
        return self.bounds(now)[1]

    def bounds(self, now: float) -> tuple[float, float]:
        """Return what it has had for certain, and what it counts."""
        if not self.is_charged:
            return 0.0, 0.0
        if self.ended_at < math.inf:
            return self.ended_at - self.since, self.ended_at - self.since
        had_s, counted_s = 0.0, self.estimate_s
        while self.since + counted_s <= now:
            had_s, counted_s = counted_s, counted_s * 1.25
        return had_s, counted_s


@dataclass
class Model:
    max_length: int
    is_fair: bool
    no_worker_s: float
    requests: list[Request] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # that count
    granted: dict[str, float] = field(default_factory=dict)  # what tenants are treated as if they had had it
    left: list[tuple[float, Slot]] = field(default_factory=list)
    now: float = 0.0
    turns: dict[str, int] = field(default_factory=dict)  # when tenants began to wait, or last had a slot
    last_turn: int = 0

    @property
    def waiting(self) -> list[Request]:
        return [each for each in self.requests if each.waits]

    def of(self, tenant: str) -> list[Request]:
        return [each for each in self.waiting if each.tenant == tenant]

    def running_of(self, tenant: str) -> int:
        return sum(each.run is not None and each.run.request.tenant == tenant for each in self.slots)

    def load(self, machine: Machine) -> int:
        return sum(each.run is not None and each.machine is machine for each in self.slots)

    # What tenants have had.

    def charge(self, tenant: str) -> float:
        own = [each.counts(self.now) for each in self.runs if each.request.tenant == tenant]
        return self.granted.get(tenant, 0.0) + sum(own)

    def had(self, tenant: str) -> float:
        own = [each.bounds(self.now)[0] for each in self.runs if each.request.tenant == tenant]
        return self.granted.get(tenant, 0.0) + sum(own)

    def is_active(self, tenant: str) -> bool:
        return bool(self.of(tenant) or self.running_of(tenant))

    def arrive(self, request: Request) -> None:
        """A tenant with nothing waiting begins at the least of the other active ones."""
        if not self.of(request.tenant):
            others = [each for each in TENANTS if each != request.tenant and self.is_active(each)]
            lacks = min(map(self.had, others), default=0.0) - self.had(request.tenant)
            if lacks > 0:
                self.granted[request.tenant] = self.granted.get(request.tenant, 0.0) + lacks
            self.turns[request.tenant] = self.turn()
        self.requests.append(request)

    def forget_if_nobody_is_active(self) -> None:
        if not any(map(self.is_active, TENANTS)):
            self.runs.clear()
            self.granted.clear()

    # Who is next.

    def rank(self, request: Request) -> tuple[float, ...]:
        if not self.is_fair:
            return request.place, request.number
        tenant = request.tenant
        return self.charge(tenant), self.turns[tenant], request.place, request.number

    def turn(self) -> int:
        self.last_turn += 1
        return self.last_turn

    def next_pair(self) -> tuple[Request, Slot] | None:
        idle = [each for each in self.slots if each.idle and not each.machine.rests]
        may_go = [each for each in self.waiting if any(slot.serves(each.origin) for slot in idle)]
        if not may_go:
            return None
        request = min(may_go, key=self.rank)
        fitting = [each for each in idle if each.serves(request.origin)]
        return request, min(
            fitting, key=lambda each: (len(each.origins) or math.inf, self.load(each.machine), -each.parked)
        )

    def line(self, typical_s: float) -> list[Request]:
        """Return what waits, as it is served if each takes `typical_s` and any slot serves all."""
        rest, order = self.waiting, []
        more, last = dict.fromkeys(TENANTS, 0), dict.fromkeys(TENANTS, 0)

        def rank(request: Request) -> tuple[float, ...]:
            if not self.is_fair:
                return self.rank(request)
            charge, turn, place, number = self.rank(request)
            count = more[request.tenant]
            return charge + count * typical_s, last[request.tenant] or turn, place, number

        while rest:
            order.append(min(rest, key=rank))
            rest.remove(order[-1])
            more[order[-1].tenant] += 1
            last[order[-1].tenant] = self.last_turn + len(order)
        return order

    def victim(self, tenant: str) -> Request | None:
        """Return which request has to go for one of this tenant when the queue is full."""
        if not self.is_fair or not self.waiting:
            return None
        seen = list(dict.fromkeys(each.tenant for each in self.requests))
        largest = max(seen, key=lambda each: (len(self.of(each)), -seen.index(each)))
        if len(self.of(tenant)) >= len(self.of(largest)):
            return None
        return max(self.of(largest), key=lambda each: each.number)

    def due(self, request: Request) -> float:
        """Return when a request has waited for too long."""
        if any(each.serves(request.origin) for each in self.slots):
            return request.limit_at
        left = [at for at, slot in self.left if slot.serves(request.origin)]
        return min(request.limit_at, max([request.since, *left]) + self.no_worker_s)


class History:
    """A policy and the model of it, to which the same happens."""

    def __init__(self, seed: int) -> None:
        self.random = rng = random.Random(seed)
        self.is_scoped, self.is_urgent, is_fair = (rng.random() < 0.6 for _ in range(3))
        max_length, no_worker_s = rng.choice((2, 5, 50)), rng.choice((math.inf, 3.0))
        self.model = Model(max_length, is_fair, no_worker_s)
        named = rng.sample(NAMES, 2) if self.is_scoped and rng.random() < 0.5 else ()
        self.policy: Policy[Request, Slot] = Policy(
            max_length, no_worker_s=no_worker_s, is_fair=is_fair, origins=named
        )
        self.policy.wake(0.0)
        self.numbers = 0
        self.late: list[Slot] = []  # that are busy, though their request has gone elsewhere

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def play(self, steps: int) -> None:
        actions = (
            self.put, self.put, self.put, self.put, self.join, self.join, self.pass_time, self.pass_time,
            self.finish, self.finish, self.finish, self.die, self.hang_up, self.withdraw, self.fail_pair,
            self.let_go,
        )  # fmt: skip
        for _ in range(steps):
            self.random.choice(actions)()
            if self.random.random() < 0.7:
                self.dispatch()
            self.compare()
        self.compare_line()

    def compare(self) -> None:
        model, policy = self.model, self.policy
        assert policy.waiting == len(model.waiting)
        assert policy.idle == sum(each.idle for each in model.slots)
        assert policy.running == sum(each.run is not None for each in model.slots)
        oldest = min((each.since for each in model.waiting), default=model.now)
        assert policy.oldest_wait(model.now) == model.now - oldest

    def compare_line(self) -> None:
        assert list(self.policy) == self.model.line(self.policy.typical_s)
        for origin in NAMES:
            served = any(each.serves(origin) for each in self.model.slots)
            assert bool(self.policy.slots_of(self.policy.pool_of(origin))) == served

    def dispatch(self) -> None:
        while True:
            expected, pair = self.model.next_pair(), self.policy.next_pair()
            assert (pair and (pair[0].item, pair[1])) == expected
            if expected is None:
                return
            self.begin(*expected)

    def begin(self, request: Request, slot: Slot) -> None:
        request.waits, slot.idle = False, False
        slot.run = request.run = Run(request, self.model.now, self.policy.typical_s)
        if self.model.is_fair:
            slot.run.turn = self.model.turns[request.tenant]
            self.model.turns[request.tenant] = self.model.turn()
            self.model.runs.append(slot.run)

    # What may happen.

    def put(self) -> None:
        rng, model, policy = self.random, self.model, self.policy
        origin = rng.choice(NAMES)
        tenant = rng.choice(TENANTS)
        urgency = rng.choice((0, 3, 3, 4, 7)) if self.is_urgent else 3
        if policy.is_full:
            assert len(model.waiting) >= model.max_length
            victim, ticket = model.victim(tenant), policy.evicted_by(tenant)
            assert (ticket and ticket.item) == victim
            if victim is None or ticket is None:
                return
            policy.withdraw(ticket)
            self.lose(victim)
        head_start_s, limit_s = (3 - urgency) * 1.5, rng.choice((4.0, 8.0, math.inf))
        request = Request(
            self.next_number(),
            model.now,
            model.now + limit_s,
            model.now - head_start_s,
            origin,
            tenant,
            urgency,
        )
        ahead = policy.count_ahead(Claim(origin, tenant, urgency))
        model.arrive(request)
        request.ticket = policy.put(request, model.now, limit_s, Claim(origin, tenant, urgency, head_start_s))
        sure = [each for each in model.waiting if model.rank(each) < model.rank(request)]
        assert ahead <= len(sure)

    def lose(self, request: Request) -> None:
        request.waits = False
        self.model.forget_if_nobody_is_active()

    def withdraw(self) -> None:
        if waiting := self.model.waiting:
            request = self.random.choice(waiting)
            self.policy.withdraw(request.ticket)
            self.policy.withdraw(request.ticket)  # is nothing
            self.lose(request)

    def join(self) -> None:
        if len(self.model.slots) < 6:
            origins = self.random.choice(SCOPES) if self.is_scoped else frozenset()
            slot = Slot(
                str(self.next_number()), self.policy.join(self.random.choice("xyz"), origins), origins
            )
            self.model.slots.append(slot)
            self.park(slot)

    def park(self, slot: Slot) -> None:
        slot.idle, slot.parked = True, self.next_number()
        self.policy.park(slot)

    def hang_up(self) -> None:
        idle = [each for each in self.model.slots if each.idle]
        if idle:
            self.policy.remove(slot := self.random.choice(idle))
            slot.idle = False
            self.leave(slot)

    def leave(self, slot: Slot) -> None:
        self.model.slots.remove(slot)
        self.model.left.append((self.model.now, slot))
        self.policy.leave(slot.offer, self.model.now)

    def busy(self) -> Slot | None:
        busy = [each for each in self.model.slots if each.run is not None and each not in self.late]
        return self.random.choice(busy) if busy else None

    def end_run(self, slot: Slot) -> Run:
        run, slot.run = slot.run, None
        assert run is not None
        run.ended_at = self.model.now
        return run

    def finish(self) -> None:
        if (slot := self.busy()) is not None:
            self.end_run(slot)
            self.policy.release(slot, self.model.now, park=True)
            slot.idle, slot.parked = True, self.next_number()
            self.model.forget_if_nobody_is_active()
            self.policy.typical_s = self.random.choice((0.5, 1.0, 2.0))

    def die(self) -> None:
        """A worker is lost; its request waits again, or not; its machine rests."""
        if (slot := self.busy()) is None:
            return
        run = slot.run
        assert run is not None
        away_s = self.model.now - run.since
        if self.random.random() < 0.5:
            self.policy.rest(slot.machine, self.model.now)
        if self.random.random() < 0.3:  # its connection is still needed for a moment
            self.late.append(slot)
            self.put_back(run, away_s)
            return
        self.end_run(slot)
        self.policy.release(slot, self.model.now)
        if self.random.random() < 0.5:
            self.model.forget_if_nobody_is_active()
            self.put_back(run, away_s)
        self.leave(slot)
        self.model.forget_if_nobody_is_active()

    def put_back(self, run: Run, away_s: float) -> None:
        request = run.request
        assert request.ticket is not None
        request.since += away_s
        request.limit_at += away_s
        request.waits, run.is_charged = True, False
        turns = self.model.turns
        turns[request.tenant] = min(turns.get(request.tenant, 0), run.turn)
        self.policy.put_back(request.ticket, away_s)

    def let_go(self) -> None:
        """A connection whose request has gone elsewhere ends at last."""
        if self.late:
            slot = self.late.pop()
            self.end_run(slot)
            self.policy.release(slot, self.model.now)
            self.leave(slot)
            self.model.forget_if_nobody_is_active()

    def fail_pair(self) -> None:
        """A pair does not come about: the slot has left, or the consumer has."""
        expected, pair = self.model.next_pair(), self.policy.next_pair()
        assert (pair and (pair[0].item, pair[1])) == expected
        if pair is None or expected is None:
            return
        self.begin(*expected)
        run = self.end_run(pair[1])
        if self.random.random() < 0.5:
            self.policy.release(pair[1], self.model.now)
            self.model.forget_if_nobody_is_active()
            self.put_back(run, 0.0)
            self.leave(pair[1])
        else:
            self.policy.release(pair[1], self.model.now, park=True)
            pair[1].idle, pair[1].parked = True, self.next_number()
            self.model.forget_if_nobody_is_active()

    def pass_time(self) -> None:
        """Time passes; those whose time is over go."""
        model, policy = self.model, self.policy
        model.now += self.random.choice((0.125, 0.5, 1.0, 2.0))
        policy.wake(model.now)
        late = [each for each in model.waiting if model.due(each) <= model.now]
        assert policy.next_event() <= min(map(model.due, model.waiting), default=math.inf)
        assert sorted(each.number for each in policy.expire(model.now)) == [each.number for each in late]
        for request in late:
            request.waits = False
        model.forget_if_nobody_is_active()
        assert policy.next_event() > model.now
        assert all(each.machine.rests_until > model.now for each in model.slots if each.machine.rests)


def check_history(seed: int, steps: int = 40) -> None:
    History(seed).play(steps)
