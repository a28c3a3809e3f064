"""The policy: order, bound, expiry and withdrawal of requests, the choice among waiting slots, and pairs."""

from __future__ import annotations

import importlib.util
import math
import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import order_model
import pytest

import wire
from pothead import LIMITS, Claim, Offer, Policy, Ticket, wait_estimate


@dataclass(eq=False)
class Slot:
    name: str
    offer: Offer


class Line:
    """A policy of which the tests see the requests: a slot is there whenever one is to be taken."""

    def __init__(self, max_length: int = 100, timeout_s: float = 60.0) -> None:
        self.policy: Policy[object, Slot] = Policy(max_length)
        self.timeout_s = timeout_s
        self.tickets: dict[object, Ticket] = {}
        self.slot = Slot("any", self.policy.join("any"))
        self.policy.park(self.slot)

    def __len__(self) -> int:
        return self.policy.waiting

    def __iter__(self) -> Iterator[object]:
        return iter(self.policy)

    def put(self, item: object, now: float) -> bool:
        if self.policy.is_full:
            return False
        self.tickets[item] = self.policy.put(item, now, self.timeout_s)
        return True

    def put_back(self, item: object, away_s: float) -> None:
        self.policy.put_back(self.tickets[item], away_s)

    def take(self) -> object | None:
        pair = self.policy.next_pair()
        if pair is None:
            return None
        self.policy.release(pair[1], 0.0, park=True)
        return pair[0].item

    def cancel(self, item: object) -> None:
        self.policy.withdraw(self.tickets[item])

    def expire(self, now: float) -> list[object]:
        return self.policy.expire(now)

    def next_event(self) -> float:
        return self.policy.next_event()

    def oldest_wait(self, now: float) -> float:
        return self.policy.oldest_wait(now)


def filled(*items: str, max_length: int = 100, timeout_s: float = 60.0) -> Line:
    """Return a line that got `items` at the times 0, 1, 2, …"""
    queue = Line(max_length, timeout_s)
    for now, item in enumerate(items):
        assert queue.put(item, float(now))
    return queue


def take_all(queue: Line) -> str:
    return "".join(iter(queue.take, None))


# ---- Order and bound ---------------------------------------------------------------------------------


def test_requests_leave_in_the_order_they_came() -> None:
    assert take_all(filled("a", "b", "c")) == "abc"


def test_empty_queue_has_nothing_to_take() -> None:
    queue = filled()
    assert (len(queue), list(queue), queue.take()) == (0, [], None)


def test_iteration_shows_the_oldest_first_and_takes_nothing() -> None:
    queue = filled("a", "b", "c")
    assert list(queue) == ["a", "b", "c"]
    assert len(queue) == 3


def test_full_queue_refuses_until_there_is_room_again() -> None:
    queue = filled("a", "b", max_length=2)
    assert not queue.put("c", 2.0)
    assert list(queue) == ["a", "b"]
    assert queue.take() == "a"
    assert queue.put("c", 3.0)
    assert take_all(queue) == "bc"


def test_cancelled_request_makes_room_at_once() -> None:
    queue = filled("a", "b", max_length=2)
    queue.cancel("a")
    assert queue.put("c", 2.0)
    assert take_all(queue) == "bc"


def test_queue_of_no_length_refuses_everything() -> None:
    assert not Line(0).put("a", 0.0)


# ---- Requests whose worker died ----------------------------------------------------------------------


def test_request_put_back_goes_ahead_of_those_that_came_later() -> None:
    queue = filled("a", "b", "c")
    queue.take()
    queue.put_back("a", 0.0)
    assert take_all(queue) == "abc"


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_requests_put_back_in_any_order_keep_the_order_of_arrival(order: str) -> None:
    queue = filled("a", "b", "c", "d")
    for _ in order:
        queue.take()
    queue.put("e", 9.0)
    for item in order:
        queue.put_back(item, 0.0)
    assert list(queue) == ["a", "b", "c", "d", "e"]
    assert take_all(queue) == "abcde"


def test_request_put_back_does_not_overtake_an_older_one() -> None:
    queue = filled("a", "b", "c")
    queue.take()
    queue.take()
    queue.put_back("a", 0.0)
    queue.put_back("b", 0.0)
    assert take_all(queue) == "abc"


def test_request_is_put_back_even_into_a_full_queue() -> None:
    queue = filled("a", max_length=1)
    queue.take()
    assert queue.put("b", 1.0)
    queue.put_back("a", 0.0)
    assert len(queue) == 2
    assert not queue.put("c", 2.0)
    assert take_all(queue) == "ab"


def test_request_may_be_put_back_twice() -> None:
    queue = filled("a", "b")
    for _ in range(2):
        assert queue.take() == "a"
        queue.put_back("a", 0.0)
    assert take_all(queue) == "ab"


# ---- Cancellation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gone", "rest"), [("a", "bc"), ("b", "ac"), ("c", "ab")])
def test_cancelled_request_is_never_taken(gone: str, rest: str) -> None:
    queue = filled("a", "b", "c")
    queue.cancel(gone)
    assert len(queue) == 2
    assert list(queue) == list(rest)
    assert take_all(queue) == rest


def test_cancelling_what_is_not_queued_changes_nothing() -> None:
    queue = filled("a", "b")
    queue.take()
    queue.cancel("a")
    queue.cancel("a")
    assert (len(queue), list(queue)) == (1, ["b"])


def test_request_put_back_can_be_cancelled() -> None:
    queue = filled("a", "b")
    queue.take()
    queue.put_back("a", 0.0)
    queue.cancel("a")
    assert take_all(queue) == "b"


def test_cancelling_many_requests_costs_linear_time() -> None:
    queue = Line(100_000, 60.0)
    for item in range(50_000):
        queue.put(item, 0.0)
    began = time.process_time()
    for item in range(49_999, 0, -1):
        queue.cancel(item)
    assert time.process_time() - began < 2.0
    assert list(queue) == [0]


def test_putting_many_requests_back_costs_linear_time() -> None:
    """A rack of workers dies at once: its requests come back in any order, and are looked at every turn."""
    queue = Line(100_000, 60.0)
    for item in range(20_000):
        queue.put(item, float(item))
        queue.take()
    began = time.process_time()
    for item in range(19_999, -1, -1):
        queue.put_back(item, 0.0)
        assert queue.next_event() == item + 60.0
    for item in range(20_000):
        assert queue.take() == item
        assert queue.next_event() == (item + 61.0 if item < 19_999 else math.inf)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("away_s", [0.0, 1.0])
def test_request_that_comes_back_again_and_again_leaves_nothing_behind(away_s: float) -> None:
    queue = filled("a", "b", timeout_s=math.inf)
    queue.take()
    queue.take()
    queue.put_back("b", 0.0)  # has waited for longest, and is never taken
    tracemalloc.start()
    for _ in range(10_000):
        queue.put_back("a", away_s)
        assert queue.take() == "a"
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 10_000
    assert take_all(queue) == "b"


# ---- Expiry ------------------------------------------------------------------------------------------


def test_requests_expire_when_they_have_waited_for_the_timeout() -> None:
    queue = filled("a", "b", "c", timeout_s=10.0)
    assert queue.expire(9.999) == []
    assert queue.expire(10.0) == ["a"]
    assert queue.expire(12.5) == ["b", "c"]
    assert (len(queue), queue.take()) == (0, None)


def test_next_expiry_is_that_of_the_oldest_request() -> None:
    queue = filled("a", "b", timeout_s=10.0)
    assert queue.next_event() == 10.0
    queue.take()
    assert queue.next_event() == 11.0
    queue.cancel("b")
    assert queue.next_event() == math.inf


def test_time_away_from_the_queue_does_not_count_as_waiting() -> None:
    queue = filled("a", "b", timeout_s=10.0)
    queue.take()
    queue.put_back("a", 100.0)
    assert queue.next_event() == 11.0
    assert queue.expire(109.0) == ["b"]
    assert (list(queue), queue.next_event(), queue.oldest_wait(104.0)) == (["a"], 110.0, 4.0)
    assert queue.expire(110.0) == ["a"]


def test_time_waited_before_counts_again_after_a_return() -> None:
    queue = filled("a", "b", timeout_s=10.0)
    queue.take()
    queue.put_back("a", 0.5)
    assert queue.oldest_wait(4.0) == 3.5
    assert queue.expire(10.5) == ["a"]
    assert list(queue) == ["b"]


def test_cancelled_request_does_not_expire() -> None:
    queue = filled("a", "b", timeout_s=10.0)
    queue.cancel("a")
    assert queue.expire(100.0) == ["b"]


def test_expired_requests_make_room() -> None:
    queue = filled("a", max_length=1, timeout_s=10.0)
    queue.expire(10.0)
    assert queue.put("b", 10.0)


def test_each_request_has_a_time_limit_of_its_own() -> None:
    policy: Policy[str, Slot] = Policy(10)
    for item, limit_s in (("patient", 60.0), ("hurried", 1.0), ("endless", math.inf), ("usual", 10.0)):
        policy.put(item, 0.0, limit_s)
    assert policy.next_event() == 1.0
    assert policy.expire(10.0) == ["hurried", "usual"]
    assert (list(policy), policy.next_event()) == (["patient", "endless"], 60.0)


def test_requests_never_expire_without_a_timeout() -> None:
    queue = filled("a", timeout_s=math.inf)
    assert queue.next_event() == math.inf
    assert queue.expire(1e12) == []
    assert list(queue) == ["a"]


def test_empty_queue_has_no_oldest_wait_and_no_expiry() -> None:
    queue = filled()
    assert (queue.oldest_wait(5.0), queue.next_event(), queue.expire(5.0)) == (0.0, math.inf, [])


def test_oldest_wait_is_that_of_the_request_that_is_taken_next() -> None:
    queue = filled("a", "b")
    assert queue.oldest_wait(5.0) == 5.0
    queue.cancel("a")
    assert queue.oldest_wait(5.0) == 4.0


def test_oldest_wait_is_not_that_of_a_request_that_was_away_for_longer() -> None:
    queue = filled("a", "b")
    queue.take()
    queue.take()
    queue.put_back("a", 5.0)
    queue.put_back("b", 0.0)
    assert list(queue) == ["a", "b"]
    assert queue.oldest_wait(6.0) == 5.0


@pytest.mark.parametrize("seed", range(20))
def test_queue_behaves_like_a_sorted_list_whatever_is_done_to_it(seed: int) -> None:
    rng = random.Random(seed)
    queue = Line(8, 10.0)
    waiting: list[int] = []
    taken: dict[int, int] = {}  # and when
    since: dict[int, int] = {}
    for now in range(500):
        action = rng.choice(("put", "put", "put", "take", "put back", "cancel", "expire"))
        if action == "put":
            assert queue.put(now, float(now)) == (len(waiting) < 8)
            waiting += [now] if len(waiting) < 8 else []
            since[now] = now
        elif action == "take":
            assert queue.take() == (waiting[0] if waiting else None)
            taken |= dict.fromkeys(waiting[:1], now)
            del waiting[:1]
        elif action == "put back" and taken:
            item = rng.choice(list(taken))
            away = now - taken.pop(item)
            since[item] += away
            queue.put_back(item, float(away))
            waiting = sorted([*waiting, item])
        elif action == "cancel" and waiting:
            queue.cancel(waiting.pop(rng.randrange(len(waiting))))
        elif action == "expire":
            late = [item for item in waiting if now - since[item] >= 10]
            assert sorted(queue.expire(float(now))) == late
            waiting = [item for item in waiting if now - since[item] < 10]
        assert (len(queue), list(queue)) == (len(waiting), waiting)
        assert queue.next_event() == min((since[item] for item in waiting), default=math.inf) + 10.0


# ---- The estimate of the wait ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queued", "slots", "mean_service_s", "seconds"),
    [
        pytest.param(10, 2, 3.0, 15, id="queued through the slots"),
        pytest.param(3, 2, 1.0, 2, id="rounded up"),
        pytest.param(0, 4, 30.0, 1, id="at least a second"),
        pytest.param(5, 4, 0.001, 1, id="short requests"),
        pytest.param(5, 0, 2.0, None, id="no slots"),
        pytest.param(5, 1, 0.0, None, id="nothing served yet"),
    ],
)
def test_estimated_wait(queued: int, slots: int, mean_service_s: float, seconds: int | None) -> None:
    estimate = wait_estimate(queued, slots, mean_service_s)
    assert (estimate, type(estimate)) == (seconds, type(seconds))


# ---- Waiting slots -----------------------------------------------------------------------------------


class Idle:
    """A policy of which the tests see the slots; the first letter of a name is its machine."""

    def __init__(self) -> None:
        self.policy: Policy[object, Slot] = Policy(1)

    def __len__(self) -> int:
        return self.policy.idle

    @property
    def running(self) -> int:
        return self.policy.running

    def new_slot(self, name: str, machine: str = "") -> Slot:
        return Slot(name, self.policy.join(machine or name[0]))

    def park(self, slot: Slot) -> None:
        self.policy.park(slot)

    def remove(self, slot: Slot) -> None:
        self.policy.remove(slot)

    def take(self) -> Slot | None:
        return self.policy.take_spare(0)

    def release(self, slot: Slot) -> None:
        self.policy.release(slot, 0.0)


def parked(*names: str) -> tuple[Idle, dict[str, Slot]]:
    """Return slots that were parked in this order; the first letter of a name is its machine."""
    idle = Idle()
    slots = {name: idle.new_slot(name) for name in names}
    for slot in slots.values():
        idle.park(slot)
    return idle, slots


def names_taken(idle: Idle, count: int) -> list[str]:
    return [idle.take().name for _ in range(count)]


def test_without_waiting_slots_there_is_none_to_take() -> None:
    idle = Idle()
    assert (len(idle), idle.running, idle.take()) == (0, 0, None)


def test_slots_of_one_machine_are_taken_most_recently_parked_first() -> None:
    idle, _ = parked("a1", "a2", "a3")
    assert names_taken(idle, 3) == ["a3", "a2", "a1"]


def test_machine_with_the_fewest_running_requests_is_taken_first() -> None:
    idle, _ = parked("b1", "b2", "a1", "a2")
    assert names_taken(idle, 4) == ["a2", "b2", "a1", "b1"]


def test_among_equally_busy_machines_the_most_recently_parked_slot_is_taken() -> None:
    idle, slots = parked("a1", "b1", "c1")
    assert names_taken(idle, 2) == ["c1", "b1"]
    idle.release(slots["c1"])
    idle.park(slots["c1"])
    assert names_taken(idle, 2) == ["c1", "a1"]


def test_released_slot_counts_no_longer_and_waits_only_once_it_is_parked() -> None:
    idle, slots = parked("a1", "a2", "b1")
    assert names_taken(idle, 2) == ["b1", "a2"]
    assert (len(idle), idle.running) == (1, 2)
    idle.release(slots["b1"])
    assert (len(idle), idle.running) == (1, 1)
    idle.park(slots["b1"])
    assert (len(idle), idle.running) == (2, 1)
    assert names_taken(idle, 2) == ["b1", "a1"]


def test_slot_that_hung_up_while_waiting_is_not_taken() -> None:
    idle, slots = parked("a1", "a2", "b1")
    idle.remove(slots["b1"])
    idle.remove(slots["a2"])
    assert len(idle) == 1
    assert idle.take() is slots["a1"]
    assert idle.take() is None


def test_slot_that_died_while_running_frees_its_machine() -> None:
    idle, slots = parked("a1", "a2", "b1", "b2")
    assert names_taken(idle, 2) == ["b2", "a2"]
    idle.release(slots["a2"])
    assert names_taken(idle, 1) == ["a1"]


@pytest.mark.parametrize("seed", range(20))
def test_choice_of_a_slot_is_that_of_a_plain_search(seed: int) -> None:
    rng = random.Random(seed)
    idle = Idle()
    waiting: list[Slot] = []
    running: list[Slot] = []
    for number in range(600):
        action = rng.choice(("park", "take", "take", "hang up", "finish", "finish", "die"))
        if action == "park" and len(waiting) + len(running) < 12:
            waiting.append(idle.new_slot(str(number), rng.choice("abcd")))
            idle.park(waiting[-1])
        elif action == "take":
            wanted = plain_search(waiting, running)
            assert idle.take() is wanted
            if wanted is not None:
                waiting.remove(wanted)
                running.append(wanted)
        elif action == "hang up" and waiting:
            idle.remove(waiting.pop(rng.randrange(len(waiting))))
        elif action in ("finish", "die") and running:
            slot = running.pop(rng.randrange(len(running)))
            idle.release(slot)
            if action == "finish":
                waiting.append(slot)
                idle.park(slot)
        assert (len(idle), idle.running) == (len(waiting), len(running))


def plain_search(waiting: list[Slot], running: list[Slot]) -> Slot | None:
    """Return the latest of the waiting slots whose machine runs the fewest requests."""

    def load(slot: Slot) -> int:
        return sum(other.offer == slot.offer for other in running)

    least = min(map(load, waiting), default=0)
    return next((slot for slot in reversed(waiting) if load(slot) == least), None)


@pytest.mark.parametrize("machines", [1, 100, 10_000])
def test_choosing_among_ten_thousand_slots_is_quick(machines: int) -> None:
    idle = Idle()
    slots = [idle.new_slot(str(number), str(number % machines)) for number in range(10_000)]
    began = time.process_time()
    for slot in slots:
        idle.park(slot)
    taken = [idle.take() for _ in slots]
    for slot in taken:
        idle.release(slot)
    assert time.process_time() - began < 2.0
    assert set(taken) == set(slots)


# ---- Machines and pairs ------------------------------------------------------------------------------


def test_machines_that_left_are_forgotten_the_oldest_first() -> None:
    policy: Policy[object, Slot] = Policy(1)
    count = LIMITS.remembered_machines
    for number in range(count + 1):
        offer = policy.join(str(number))
        offer.machine.served = number
        policy.leave(offer, 2.0)
    assert len(policy.gone) == count
    assert policy.join("0").machine.served == 0
    assert policy.join("1").machine.served == 1
    assert set(policy.machines) == {"0", "1"}


def test_pair_needs_a_request_and_a_slot() -> None:
    policy: Policy[str, Slot] = Policy(10)
    slot = Slot("a1", policy.join("a"))
    policy.park(slot)
    assert policy.next_pair() is None
    ticket = policy.put("request", 0.0, 60.0)
    assert policy.next_pair() == (ticket, slot)
    policy.put("next", 1.0, 60.0)
    assert policy.next_pair() is None
    assert (policy.waiting, policy.idle, policy.running) == (1, 0, 1)


def test_pair_that_does_not_come_about_is_given_back() -> None:
    policy: Policy[str, Slot] = Policy(10)
    slots = [Slot(name, policy.join(name[0])) for name in ("a1", "b1")]
    for slot in slots:
        policy.park(slot)
    for item in "xy":
        policy.put(item, 0.0, 60.0)
    first = policy.next_pair()
    assert first is not None and first[0].item == "x"
    policy.put_back(first[0], 0.0)
    policy.release(first[1], 0.0)
    second = policy.next_pair()
    assert second is not None and (second[0].item, second[1]) == ("x", slots[0])
    assert list(policy) == ["y"]


# ---- Pools, urgencies and fair shares ----------------------------------------------------------------


@pytest.mark.parametrize("batch", range(10))
def test_policy_agrees_with_sorting_everything_every_time(batch: int) -> None:
    for seed in range(150 * batch, 150 * (batch + 1)):
        order_model.check_history(seed)


A, B, C = "http://a", "http://b", "http://c"


class Site:
    """A policy with slots of several kinds. Times are what the tests say."""

    def __init__(self, **options: Any) -> None:
        self.policy: Policy[str, Slot] = Policy(options.pop("max_length", 100), **options)
        self.now = 0.0

    def add(self, name: str, *origins: str) -> Slot:
        slot = Slot(name, self.policy.join(name, frozenset(origins)))
        self.policy.park(slot)
        return slot

    def put(self, item: str, *, limit_s: float = math.inf, **how: Any) -> Ticket:
        return self.policy.put(item, self.now, limit_s, Claim(**how))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.policy.wake(self.now)
        self.policy.next_event()

    def pairs(self) -> list[tuple[str, str]]:
        return [(ticket.item, slot.name) for ticket, slot in iter(self.policy.next_pair, None)]

    def finish(self, slot: Slot) -> None:
        self.policy.release(slot, self.now, park=True)


def test_slot_serves_what_it_has_named_and_no_pool_waits_for_another() -> None:
    site = Site()
    site.add("b", B)
    for item, origin in (("a1", A), ("a2", A), ("b1", B), ("b2", B)):
        site.put(item, origin=origin)
    assert site.pairs() == [("b1", "b")]
    site.add("a", A)
    assert site.pairs() == [("a1", "a")]
    assert list(site.policy) == ["a2", "b2"]


def test_slot_that_serves_the_fewest_pools_is_taken_first() -> None:
    site = Site()
    for name, origins in (("all", ()), ("one", (A,)), ("two", (A, B)), ("other", (B,))):
        site.add(name, *origins)
    for item in ("first", "second", "third", "fourth"):
        site.put(item, origin=A)
    assert site.pairs() == [("first", "one"), ("second", "two"), ("third", "all")]


def test_generalist_serves_whoever_has_waited_longest() -> None:
    site = Site()
    slots = [site.add(name, origin) for name, origin in (("a1", A), ("a2", A), ("b1", B), ("b2", B))]
    generalist = site.add("both", A, B)
    for number in range(4):
        site.put(f"b{number}", origin=B)
    site.put("a0", origin=A)
    assert site.pairs() == [("b0", "b2"), ("b1", "b1"), ("b2", "both"), ("a0", "a2")]
    for number in range(1, 4):
        site.put(f"a{number}", origin=A)
    assert site.pairs() == [("a1", "a1")]
    site.finish(generalist)
    assert site.pairs() == [("b3", "both")]  # came before a2 and a3
    site.finish(generalist)
    assert site.pairs() == [("a2", "both")]
    site.finish(slots[3])
    assert site.pairs() == []  # b2 is for B
    site.put("b4", origin=B)
    assert site.pairs() == [("b4", "b2")]  # though a3 has waited for longer


def test_spare_slots_are_those_beyond_what_is_needed_of_each_kind() -> None:
    site = Site()
    for name, origin in (("a1", A), ("a2", A), ("b1", B)):
        site.add(name, origin)
    spare = site.policy.take_spare(1)
    assert spare is not None and spare.name[0] == "a"
    assert site.policy.take_spare(1) is None
    assert (site.policy.idle, site.policy.running) == (2, 1)


def test_origin_that_gets_slots_of_its_own_takes_what_waits_along() -> None:
    site = Site()
    for item, origin in (("a1", A), ("b1", B), ("a2", A), ("c1", C)):
        site.put(item, origin=origin)
    site.add("a", A)
    assert site.pairs() == [("a1", "a")]
    site.add("all")
    assert site.pairs() == [("b1", "all")]
    assert list(site.policy) == ["a2", "c1"]


def test_slots_of_many_kinds_that_come_and_go_leave_nothing_behind() -> None:
    site = Site()
    site.put("x", origin="http://nobody")

    def come_and_go(count: int) -> None:
        for number in range(count):
            origins = frozenset((f"http://{number}", A))
            slot = Slot("s", site.policy.join("m", origins))
            site.policy.park(slot)
            site.policy.remove(slot)
            site.policy.leave(slot.offer, 0.0)

    come_and_go(500)
    tracemalloc.start()
    come_and_go(2000)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 200_000
    assert len(site.policy.pools) == LIMITS.remembered_pools
    assert len(site.policy.pool_of(A).scopes) == 1


@pytest.mark.parametrize("is_fair", [False, True])
def test_pools_that_have_had_requests_are_forgotten_with_all_that_is_theirs(is_fair: bool) -> None:
    site = Site(is_fair=is_fair)
    site.put("waits", origin="http://nobody")
    for number in range(3 * LIMITS.remembered_pools):
        origin = f"http://{number}"
        slot = site.add("m", origin)
        site.put("x", origin=origin)
        assert site.pairs() == [("x", "m")]
        site.policy.release(slot, 0.0)
        site.policy.leave(slot.offer, 0.0)
    assert len(site.policy.pools) == LIMITS.remembered_pools
    assert len(site.policy._everybody.lines) <= LIMITS.remembered_pools + 1
    assert sum(map(len, site.policy._standings._pools)) <= LIMITS.remembered_pools + 1


@pytest.mark.parametrize(
    ("served", "expired"), [((), ["a", "n"]), ((A,), ["n"]), ((A, B), ["n"]), (None, [])]
)
def test_request_that_nobody_could_serve_waits_less_long(
    served: tuple[str, ...] | None, expired: list[str]
) -> None:
    site = Site(no_worker_s=5.0)
    site.put("a", origin=A, limit_s=60.0)
    site.put("n", origin="http://nobody", limit_s=60.0)
    if served != ():
        site.policy.join("m", frozenset(served or ()))
    assert site.policy.next_event() == (5.0 if expired else 60.0)
    assert site.policy.expire(4.9) == []
    assert site.policy.expire(5.0) == expired
    assert site.policy.next_event() in (60.0, math.inf)


def test_request_waits_anew_when_the_last_slot_for_it_leaves() -> None:
    site = Site(no_worker_s=5.0)
    slot = site.add("a", A)
    site.policy.take_spare(0)
    site.put("early", origin=A, limit_s=60.0)
    assert site.policy.next_event() == 60.0
    site.policy.release(slot, 10.0)
    site.policy.leave(slot.offer, 10.0)
    site.now = 12.0
    site.put("late", origin=A, limit_s=60.0)
    assert site.policy.next_event() == 15.0
    assert site.policy.expire(15.0) == ["early"]
    assert site.policy.next_event() == 17.0
    site.policy.join("a", frozenset((A,)))
    assert site.policy.next_event() == 72.0


def test_request_that_nobody_serves_does_not_keep_those_that_came_after_it() -> None:
    site = Site()
    slot = site.add("a", A)
    site.policy.join("b", frozenset((B,)))
    site.put("waits", origin=B, limit_s=10.0)
    tracemalloc.start()
    for _ in range(10_000):
        site.put("x", origin=A, limit_s=60.0)
        assert site.policy.next_event() == 10.0
        assert site.pairs() == [("x", "a")]
        site.finish(slot)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 100_000


@pytest.mark.parametrize("is_fair", [False, True])
def test_requests_that_are_served_at_once_leave_nothing_behind(is_fair: bool) -> None:
    site = Site(is_fair=is_fair)
    slot = site.add("a", A)
    tracemalloc.start()
    for _ in range(10_000):
        site.put("x", origin=A, tenant="anna", limit_s=60.0)
        assert site.pairs() == [("x", "a")]
        assert site.policy.next_event() == math.inf
        site.pass_time(0.125)
        site.finish(slot)
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 100_000


def test_head_start_is_worth_that_much_waiting() -> None:
    """u=0 with steps of 30 s: ahead of all u=3 of the last 90 s, and behind those before."""
    site = Site()
    for second in (0, 9, 10, 11, 99):
        site.now = float(second)
        site.put(f"u3 of {second}")
    site.now = 100.0
    site.put("u0", urgency=0, head_start_s=90.0)
    site.put("u7", urgency=7, head_start_s=-120.0)
    site.now = 219.0
    site.put("u3 of 219")
    site.now = 221.0
    site.put("u3 of 221")
    expected = [
        "u3 of 0",
        "u3 of 9",
        "u3 of 10",
        "u0",
        "u3 of 11",
        "u3 of 99",
        "u3 of 219",
        "u7",
        "u3 of 221",
    ]
    assert list(site.policy) == expected
    site.add("slot")
    served = []
    while pair := site.policy.next_pair():
        served.append(pair[0].item)
        site.finish(pair[1])
    assert served == expected


def test_urgent_request_that_comes_back_has_its_old_place() -> None:
    site = Site()
    slot = site.add("slot")
    for item, head_start_s in (("x", 0.0), ("urgent", 90.0), ("y", 0.0)):
        site.put(item, urgency=0 if head_start_s else 3, head_start_s=head_start_s)
    ticket, _ = site.policy.next_pair() or pytest.fail("no pair")
    assert ticket.item == "urgent"
    site.put("z", urgency=0, head_start_s=90.0)
    site.policy.put_back(ticket, 0.0)
    site.finish(slot)
    assert list(site.policy) == ["urgent", "z", "x", "y"]


def test_least_urgent_request_is_served_when_its_head_start_is_used_up() -> None:
    """Twice as much comes as one slot serves, all of it with u=3, beside one with u=7 and steps of 30 s."""
    site = Site(max_length=1000)
    slot = site.add("1")
    site.put("u7", urgency=7, head_start_s=-120.0)
    for second in range(300):
        for number in range(2):
            site.put(f"{second}.{number}")
        if ("u7", "1") in site.pairs():
            break
        site.pass_time(1.0)
        site.finish(slot)
    assert 239 <= second <= 241  # what came until 120 takes 240 s


def load_bench() -> Any:
    spec = importlib.util.spec_from_file_location("order", wire.ROOT / "bench" / "order.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_who_asks_seldom_waits_for_one_turn_beside_who_asks_for_much() -> None:
    assert load_bench().occasional() <= 1e-6


@pytest.mark.parametrize("long_s", [1.0, 20.0])
def test_shares_of_two_who_want_more_are_even(long_s: float) -> None:
    assert load_bench().share(long_s) < 0.05


def test_tenant_with_the_least_worker_time_is_next() -> None:
    site = Site(is_fair=True)
    slots = {name: site.add(name) for name in "12"}
    for number in range(4):
        site.put(f"a{number}", tenant="anna")
    site.put("b0", tenant="bert")
    pairs = site.pairs()
    assert [item for item, _ in pairs] == ["a0", "b0"]  # a0 is charged for as it begins
    site.put("b1", tenant="bert")
    site.pass_time(8.0)
    site.finish(slots[pairs[0][1]])
    assert [item for item, _ in site.pairs()] == ["a1"]  # anna has had 8 s, bert is counted 25 % more
    site.pass_time(4.0)
    site.finish(slots[pairs[0][1]])
    site.finish(slots[pairs[1][1]])
    assert [item for item, _ in site.pairs()] == ["b1", "a2"]  # both have had 12 s; bert waits for longer


def test_tenant_that_was_away_has_saved_nothing_up() -> None:
    site = Site(is_fair=True)
    slot = site.add("1")
    served = []
    for number in range(100):
        site.put(f"a{number}", tenant="anna")
    for second in range(40):
        if second == 20:
            for number in range(30):
                site.put(f"b{number}", tenant="bert")
        served += [item[0] for item, _ in site.pairs()]
        site.pass_time(1.0)
        site.finish(slot)
    assert "".join(served) == "a" * 20 + "ab" * 10


def test_when_nobody_waits_or_runs_all_start_afresh() -> None:
    site = Site(is_fair=True)
    slot = site.add("1")
    site.put("a", tenant="anna")
    site.pairs()
    site.pass_time(1000.0)
    site.finish(slot)
    served = []
    for number in range(4):
        site.put(f"a{number}", tenant="anna")
        site.put(f"b{number}", tenant="bert")
    while pair := site.policy.next_pair():
        served.append(pair[0].item[0])
        site.pass_time(1.0)
        site.finish(slot)
    assert "".join(served) == "abababab"


@pytest.mark.parametrize("ran_s", [100.0, 1000.0, 20_000.0])
def test_running_request_is_charged_while_it_runs(ran_s: float) -> None:
    site = Site(is_fair=True)
    site.add("1")
    site.put("a0", tenant="anna")
    site.pairs()
    began_s = site.now
    while site.now < ran_s:
        site.pass_time(ran_s / 100)
        anna = site.policy.tenants["anna"]
        assert site.now - began_s <= anna.charge_s <= max(1.0, 1.25 * (site.now - began_s))
        assert anna.had_s <= site.now - began_s <= max(1.0, 1.25 * anna.had_s)


@pytest.mark.parametrize("released_first", [True, False])
def test_tenant_is_not_charged_for_a_run_that_came_to_nothing(released_first: bool) -> None:
    site = Site(is_fair=True)
    slots = [site.add(name) for name in "12"]
    for item, tenant in (("a0", "anna"), ("b0", "bert"), ("a1", "anna"), ("b1", "bert")):
        site.put(item, tenant=tenant)
    first = site.policy.next_pair()
    assert first is not None and first[0].item == "a0"
    site.pairs()
    site.pass_time(10.0)
    anna = site.policy.tenants["anna"]
    assert anna.charge_s > 10.0
    if released_first:
        site.policy.release(first[1], site.now)
    site.policy.put_back(first[0], 10.0)
    assert anna.charge_s == 0.0
    if not released_first:
        site.policy.release(first[1], site.now)
    assert (anna.charge_s, anna.worked_s) == (0.0, 0.0)
    site.policy.park(first[1])
    assert site.pairs() == [("a0", first[1].name)]
    site.pass_time(3.0)
    site.finish(first[1])
    assert (anna.charge_s, anna.worked_s) == (3.0, 3.0)
    assert len(slots) == 2


def test_full_queue_costs_the_tenant_with_the_most_its_newest() -> None:
    site = Site(is_fair=True, max_length=4)
    for item in ("a0", "a1", "a2", "b0"):
        site.put(item, tenant={"a": "anna", "b": "bert"}[item[0]])
    assert site.policy.evicted_by("anna") is None
    victim = site.policy.evicted_by("cleo")
    assert victim is not None and victim.item == "a2"
    site.policy.withdraw(victim)
    site.put("c0", tenant="cleo")
    victim = site.policy.evicted_by("dora")
    assert victim is not None and victim.item == "a1"


def test_without_tenants_nobody_is_evicted() -> None:
    site = Site(max_length=1)
    site.put("x")
    assert site.policy.evicted_by("") is None


def test_million_tenants_take_bounded_memory_and_no_more_time() -> None:
    site = Site(is_fair=True, max_length=1000)
    slot = site.add("1")

    def come_and_go(start: int, count: int) -> float:
        began = time.process_time()
        for number in range(start, start + count):
            ticket = site.put("x", tenant=f"tenant {number}")
            site.pass_time(0.001)
            if number % 2:
                site.policy.withdraw(ticket)
            elif site.pairs():
                site.finish(slot)
        return time.process_time() - began

    for number in range(500):
        site.put("waits", tenant=f"waits {number}")
    first_s = come_and_go(0, 5000)
    tracemalloc.start()
    later_s = min(come_and_go(5000 * batch, 5000) for batch in range(1, 5))
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < 5_000_000  # of those that wait and those that are remembered
    assert len(site.policy.tenants) <= LIMITS.remembered_tenants + 501
    assert later_s < 10 * first_s  # tracing takes most of it


@pytest.mark.parametrize("is_fair", [False, True])
def test_dispatch_among_a_hundred_thousand_is_quick(is_fair: bool) -> None:
    """1,000 tenants and 50 pools; bench/order.py tells how quick."""
    pools = [f"http://pool{number}" for number in range(50)]
    site = Site(max_length=1_000_000, is_fair=is_fair)
    slots = [site.add(str(number), *pools[number % 60 : number % 60 + 1]) for number in range(120)]
    rng = random.Random(7)
    for _ in range(100_000):
        site.put("x", origin=rng.choice(pools), tenant=str(rng.randrange(1000)))
    site.pairs()
    took = []
    for number in range(2000):
        site.pass_time(0.01)
        site.finish(slots[number % 120])
        began = time.perf_counter()
        assert site.policy.next_pair() is not None
        took.append(time.perf_counter() - began)
    assert sorted(took)[1000] < 500e-6


@pytest.mark.parametrize("has_more", [False, True])
def test_example_of_the_document_is_true(has_more: bool) -> None:
    """docs/order.md, An example."""
    site = Site(is_fair=True)
    site.policy.typical_s = 4.0
    for item, second, tenant, urgency in (
        ("a1", 0, "anna", 3), ("a2", 1, "anna", 3), ("a3", 2, "anna", 1), ("b1", 2, "bert", 3),
    ):  # fmt: skip
        site.now = float(second)
        site.put(item, tenant=tenant, urgency=urgency, head_start_s=(3 - urgency) * 30.0)
    if has_more:
        site.put("b2", tenant="bert")
    site.pass_time(1.0)
    slots = {name: site.add(name) for name in "12"}
    pairs = site.pairs()
    assert [item for item, _ in pairs] == ["a3", "b1"]
    counts = {}
    for second in (4, 5, 6, 7, 8):
        site.pass_time(1.0)
        counts[second] = site.policy.tenants["anna"].charge_s
    site.finish(slots[pairs[1][1]])
    assert counts == {4: 4.0, 5: 4.0, 6: 4.0, 7: 5.0, 8: 6.25}
    assert site.policy.tenants["bert"].worked_s == 5.0
    assert [item for item, _ in site.pairs()] == ["b2" if has_more else "a1"]
