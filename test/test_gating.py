"""The gates: decisions on samples, whole days of a simulated machine on a fake clock, and real readings."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import gating
import wire
from gating import (
    CpuAverage,
    CpuPolicy,
    CpuReading,
    CpuSample,
    Job,
    MemoryPolicy,
    MemoryReading,
    MemorySample,
)

MIB = 1 << 20
GIB = 1 << 30


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def nothing_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTHEAD_CPU_PROMISED", raising=False)


# ---- Deciding on CPUs --------------------------------------------------------------------------------

OFFER = Job(cpus=1.0)
OLD = Job(cpus=1.0, started_at_s=0.0)  # runs since the average began
NEW = Job(cpus=1.0, started_at_s=10.0)  # started when the average ended


def cpu_sample(*jobs: Job, free: float = 2.0, own: float = 0.0, capacity: float = 2.0) -> CpuSample:
    """A sample at the time 10, of an average that began at 0."""
    average = CpuAverage(since_s=0.0, until_s=10.0, capacity=capacity, free=free, own=own)
    return CpuSample(jobs, average)


ONE = CpuPolicy(required=1.0)


@pytest.mark.parametrize(
    ("sample", "may_start"),
    [
        pytest.param(cpu_sample(free=0.0), True, id="the first job, however busy the machine"),
        pytest.param(cpu_sample(OFFER), True, id="one offer, two idle"),
        pytest.param(cpu_sample(OFFER, OFFER), False, id="offers promise all there is"),
        pytest.param(cpu_sample(OFFER, free=1.0), False, id="an offer promises the one that is idle"),
        pytest.param(cpu_sample(OFFER, OFFER, free=1.76, capacity=4.0), False, id="too little beside offers"),
        pytest.param(cpu_sample(OFFER, OFFER, free=2.78, capacity=4.0), True, id="enough beside offers"),
        pytest.param(cpu_sample(NEW, free=1.5), False, id="a job that does not show yet"),
        pytest.param(cpu_sample(OLD, free=1.0, own=1.0), True, id="a job that shows"),
        pytest.param(cpu_sample(OLD, free=0.8, own=1.0), True, id="nearly a whole idle CPU"),
        pytest.param(cpu_sample(OLD, free=0.7, own=1.0), False, id="less than required / 1.3"),
        pytest.param(cpu_sample(OLD, OLD, free=0.0, own=2.0), False, id="two jobs on two CPUs"),
        pytest.param(cpu_sample(OLD, OLD, OLD, free=2.0), True, id="sleeping jobs use nothing"),
    ],
)
def test_jobs_start_while_cpus_are_idle_and_not_promised(sample: CpuSample, may_start: bool) -> None:
    assert gating.may_start_on_cpus(ONE, sample) is may_start


def test_a_reservation_fades_just_as_fast_as_its_use_shows() -> None:
    """At any moment in the life of a job that uses what it said, the outlook is the same."""
    for age_s in (0.0, 0.05, 0.1, 0.33, 1.0, 4.0):
        job = Job(cpus=1.0, started_at_s=10.0 - age_s)
        shown = 1.0 - 0.7 ** (age_s / gating.SAMPLE_INTERVAL_S)
        average = CpuAverage(0.0, 10.0, capacity=4.0, free=3.0 - shown, own=shown)
        assert gating.expected_idle_cpus(average, [job], inertia=0.7) == pytest.approx(2.0)


def test_an_ended_job_frees_at_once_what_the_average_still_shows() -> None:
    """The average fell to 0.5 while it ran, and has begun to rise again."""
    ended = replace(OLD, ended_at_s=10.0)
    assert gating.may_start_on_cpus(ONE, cpu_sample(ended, OLD, free=0.0, own=2.0))
    share_left = 0.7**2
    ended = replace(OLD, ended_at_s=9.8)
    average = CpuAverage(0.0, 10.0, capacity=2.0, free=1.0 - share_left, own=1.0 + share_left)
    assert gating.expected_idle_cpus(average, [ended, OLD], 0.7) == pytest.approx(1.0)


def test_an_ended_job_frees_no_more_than_it_used() -> None:
    """Two of our jobs and somebody else's shared two CPUs; one leaves, and less than one CPU is free."""
    ended = replace(OLD, ended_at_s=10.0)
    assert not gating.may_start_on_cpus(ONE, cpu_sample(ended, OLD, free=0.0, own=1.33))
    assert not gating.may_start_on_cpus(ONE, cpu_sample(ended, OLD, free=0.5, own=0.0))


def test_an_ended_job_frees_no_more_than_it_said() -> None:
    """Where our own use is not known, all that the machine does counts as ours."""
    ended = replace(OLD, ended_at_s=10.0)
    average = CpuAverage(0.0, 10.0, capacity=4.0, free=0.0, own=4.0)
    assert gating.expected_idle_cpus(average, [ended, OLD], 0.7) == pytest.approx(1.0)


def test_idle_cpus_never_exceed_what_there_is() -> None:
    ended = tuple(replace(OLD, ended_at_s=10.0) for _ in range(3))
    average = CpuAverage(0.0, 10.0, capacity=2.0, free=1.9, own=2.0)
    assert gating.expected_idle_cpus(average, ended, 0.7) == 2.0


def test_a_kept_reservation_does_not_fade() -> None:
    kept = replace(OLD, keeps_reservation=True)
    assert not gating.may_start_on_cpus(ONE, cpu_sample(kept, free=1.0))
    assert gating.may_start_on_cpus(ONE, cpu_sample(kept, free=2.0))


def test_a_busy_interpreter_lets_only_one_through() -> None:
    assert not gating.may_start_on_cpus(ONE, replace(cpu_sample(OLD), is_interpreter_busy=True))
    assert gating.may_start_on_cpus(ONE, replace(cpu_sample(), is_interpreter_busy=True))


def test_max_concurrent_counts_offers_and_jobs() -> None:
    two = replace(ONE, max_concurrent=2)
    ended = replace(OLD, ended_at_s=1.0)
    assert gating.may_start_on_cpus(two, cpu_sample(OLD, ended, free=2.0))
    assert not gating.may_start_on_cpus(two, cpu_sample(OLD, OLD, free=2.0))
    assert not gating.may_start_on_cpus(replace(two, promised=64.0), cpu_sample(OLD, OFFER, free=2.0))


def test_promised_cpus_are_used_without_asking() -> None:
    promised = replace(ONE, promised=3.0)
    busy = replace(cpu_sample(OLD, OLD, free=0.0), is_interpreter_busy=True)
    assert gating.may_start_on_cpus(promised, busy)
    assert not gating.may_start_on_cpus(promised, cpu_sample(OLD, OLD, OLD, free=0.0))
    assert gating.may_start_on_cpus(promised, CpuSample((OLD, OLD), average=None))
    no_longer_computing = replace(OLD, cpus=0.0)
    assert gating.may_start_on_cpus(promised, cpu_sample(OLD, OLD, no_longer_computing, free=0.0))


def test_nothing_is_known_before_the_first_average() -> None:
    assert gating.may_start_on_cpus(ONE, CpuSample((), average=None))
    assert not gating.may_start_on_cpus(ONE, CpuSample((OFFER,), average=None))


def test_where_nothing_can_be_measured_jobs_are_counted() -> None:
    blind = CpuSample((OLD,) * 3, average=None, cpus=4, is_measurable=False)
    assert gating.may_start_on_cpus(ONE, blind)
    assert not gating.may_start_on_cpus(ONE, replace(blind, jobs=(OLD,) * 4))
    assert gating.may_start_on_cpus(replace(ONE, max_concurrent=9), replace(blind, jobs=(OLD,) * 8))
    assert not gating.may_start_on_cpus(replace(ONE, max_concurrent=9), replace(blind, jobs=(OLD,) * 9))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"required": 0}, "required must be more than 0 CPUs, not 0"),
        ({"required": float("nan")}, "required"),
        ({"max_concurrent": 0}, "max_concurrent must be at least 1"),
        ({"inertia": 1.0}, "inertia"),
        ({"inertia": -0.1}, "inertia"),
        ({"reservation_uncertainty": 0.9}, "reservation_uncertainty"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gating.wait_for_idle_cpus(**{"required": 1, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["two", "-1", "1e3", "inf", "nan", "1_0", " 1"])
def test_a_malformed_promise_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("POTHEAD_CPU_PROMISED", text)
    with pytest.raises(ValueError, match="POTHEAD_CPU_PROMISED is a number of CPUs"):
        gating.wait_for_idle_cpus(1)


# ---- Averages ----------------------------------------------------------------------------------------


def test_an_average_is_the_difference_of_two_readings() -> None:
    earlier = CpuReading(cpus=4, idle_s=100.0, own_s=7.0)
    later = CpuReading(cpus=4, idle_s=101.25, own_s=7.5)
    average = gating.average_between(earlier, later, 20.0, 20.5)
    assert average == CpuAverage(20.0, 20.5, capacity=4.0, free=2.5, own=1.0, first_until_s=20.5)


def test_the_tightest_quota_bounds_what_is_free() -> None:
    earlier = CpuReading(8, 100.0, 0.0, (gating.Quota(4.0, 10.0), gating.Quota(1.5, 50.0)))
    later = CpuReading(8, 108.0, 0.5, (gating.Quota(4.0, 13.5), gating.Quota(1.5, 50.25)))
    average = gating.average_between(earlier, later, 0.0, 1.0)
    assert (average.capacity, average.free, average.own) == (1.5, 0.5, 0.5)


def test_an_overdrawn_quota_is_remembered() -> None:
    """CPU time comes in bursts; what was used too much in one interval must count against the next."""
    readings = [CpuReading(8, None, None, (gating.Quota(1.0, used_s),)) for used_s in (0.0, 0.15, 0.20)]
    first = gating.average_between(readings[0], readings[1], 0.0, 0.1)
    second = gating.average_between(readings[1], readings[2], 0.1, 0.2)
    assert first.free == pytest.approx(-0.5)
    assert gating.smooth(first, second, inertia=0.5).free == pytest.approx(0.0)


def test_counters_that_run_backwards_do_no_harm() -> None:
    average = gating.average_between(CpuReading(2, 10.0, 5.0), CpuReading(2, 9.9, 4.0), 0.0, 0.1)
    assert (average.free, average.own) == (0.0, 0.0)


def test_our_use_is_never_more_than_what_was_used() -> None:
    """Both counters are coarse, and the CPUs are read a moment before our processes are."""
    average = gating.average_between(CpuReading(2, 10.0, 5.0), CpuReading(2, 10.1, 5.2), 0.0, 0.1)
    assert average.own == pytest.approx(1.0)


def test_inertia_is_what_an_average_keeps_in_an_interval() -> None:
    before = CpuAverage(0.0, 1.0, capacity=2.0, free=2.0, own=0.0)
    once = gating.smooth(before, CpuAverage(1.0, 1.1, 2.0, 0.0, 2.0), inertia=0.7)
    assert (once.since_s, once.until_s) == (0.0, 1.1)
    assert (once.free, once.own) == (pytest.approx(1.4), pytest.approx(0.6))
    at_once = gating.smooth(before, CpuAverage(1.0, 1.2, 2.0, 0.0, 2.0), inertia=0.7)
    assert at_once.free == pytest.approx(2.0 * 0.49)
    assert gating.smooth(before, CpuAverage(1.0, 1.1, 2.0, 0.3, 1.7), inertia=0.0).free == 0.3


def test_job_that_began_during_the_first_measurement_shows_as_long_as_it_ran() -> None:
    """Else the first job after a worker's start would be reserved for although it is all there."""
    first = gating.average_between(CpuReading(2, 0.0, 0.0), CpuReading(2, 0.52, 0.48), 10.0, 10.5)
    job = Job(1.0, started_at_s=10.02)
    assert first.share(job, inertia=0.7) == pytest.approx(0.96)
    assert gating.expected_idle_cpus(first, [job], 0.7) == pytest.approx(1.04 - 0.04)
    later = gating.smooth(first, CpuAverage(10.5, 10.6, 2.0, 1.0, 1.0), inertia=0.7)
    assert later.share(job, inertia=0.7) == pytest.approx(1 - 0.7 * 0.04)
    assert later.share(replace(job, ended_at_s=10.6), inertia=0.7) == pytest.approx(1 - 0.7 * 0.04)


# ---- A simulated machine -----------------------------------------------------------------------------


@dataclass(eq=False)
class Work:
    """A job of the simulation: computes for `cpu_s` on `threads` CPUs, or sleeps for `sleep_s`."""

    cpu_s: float = 0.0
    sleep_s: float = 0.0
    ticket: gating.Ticket | None = None


@dataclass
class Machine:
    """CPUs that are shared fairly, counters as coarse as those of /proc, and a clock that only `sleep` moves.

    It plays the worker too: an offer is taken at once if there is a job in the queue.
    """

    cpus: int = 2
    quota: float | None = None
    others: float = 0.0  # CPUs that other programs would like to use
    noise: float = 0.0  # other programs' random bursts: up to so many CPUs, for a hundredth of a second
    now_s: float = 1000.0
    queue: list[Work] = field(default_factory=list)
    running: list[Work] = field(default_factory=list)
    history: list[tuple[float, int]] = field(default_factory=list)
    idle_s: float = 0.0
    own_s: float = 0.0
    dice: random.Random = field(default_factory=lambda: random.Random(20))

    # -- as a probe

    def read_cpus(self) -> CpuReading:
        quotas = () if self.quota is None else (gating.Quota(self.quota, self.own_s),)
        return CpuReading(self.cpus, self._ticks(self.idle_s), self._ticks(self.own_s), quotas)

    def read_memory(self) -> MemoryReading:
        raise AssertionError

    @staticmethod
    def _ticks(seconds: float) -> float:
        return int(seconds * 100) / 100

    # -- as clock and sleep

    def clock(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> bool:
        """Let time pass; True if a job ended before."""
        ends_at_s = self.now_s + duration_s
        while self.now_s < ends_at_s - 1e-9:
            if self._step(min(0.005, ends_at_s - self.now_s)):
                return True
        return False

    def _step(self, duration_s: float) -> bool:
        others = self.others + self.dice.uniform(0, self.noise)
        computing = [work for work in self.running if work.cpu_s > 0]
        wanted = len(computing) + others
        granted = min(1.0, self.cpus / wanted) if wanted else 0.0
        if self.quota is not None and computing:
            granted = min(granted, self.quota / len(computing))
        for work in self.running:
            work.cpu_s -= granted * duration_s
            work.sleep_s -= duration_s
        self.own_s += granted * len(computing) * duration_s
        self.idle_s += max(0.0, self.cpus - granted * len(computing) - min(others, self.cpus)) * duration_s
        self.now_s += duration_s
        ended = [work for work in self.running if work.cpu_s <= 1e-9 and work.sleep_s <= 1e-9]
        for work in ended:
            self._end(work)
        return bool(ended)

    # -- as a worker

    def _end(self, work: Work) -> None:
        assert work.ticket is not None
        self.running.remove(work)
        work.ticket.done()
        self.history.append((self.now_s, len(self.running)))

    def run(self, gate: gating.WaitForSlot) -> float:
        """Run the whole queue; return how long it took."""
        began_at_s = self.now_s

        def is_empty() -> bool:
            return not self.queue and not self.running

        while True:
            ticket = gate(is_empty)
            if ticket is None:
                return self.now_s - began_at_s
            assert isinstance(ticket, gating.Ticket)
            if self.queue:
                self.take(ticket)

    def take(self, ticket: gating.Ticket) -> None:
        """Send the oldest request to an offer."""
        work = self.queue.pop(0)
        work.ticket = ticket
        ticket.request_received({})
        self.running.append(work)
        self.history.append((self.now_s, len(self.running)))

    def most_running(self) -> int:
        return max(count for _, count in self.history)


def idle_cpus_gate(machine: Machine, **options: float) -> gating.WaitForSlot:
    required = options.pop("required", 1)
    return gating.wait_for_idle_cpus(  # type: ignore[arg-type]
        required, probe=machine, clock=machine.clock, sleep=machine.sleep, **options
    )


class BlindMachine(Machine):
    """One whose gates can measure nothing, so that a number of jobs at a time is fixed."""

    def read_cpus(self) -> CpuReading:
        return CpuReading(self.cpus, None)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("cpu_s", [0.15, 0.2, 0.35, 1.0, 5.0])
def test_jobs_that_compute_take_as_many_cpus_as_there_are(cpu_s: float, noise: float) -> None:
    """20 jobs within 15 % of two fixed slots, from the first moment on; never three at a time."""
    machine = Machine(noise=noise, queue=[Work(cpu_s) for _ in range(20)])
    took_s = machine.run(idle_cpus_gate(machine))
    assert machine.most_running() == 2
    fixed = BlindMachine(noise=noise, queue=[Work(cpu_s) for _ in range(20)])
    best_s = fixed.run(idle_cpus_gate(fixed, max_concurrent=2))
    assert fixed.most_running() == 2
    assert took_s <= 1.15 * best_s


def test_sleeping_jobs_rise_to_max_concurrent() -> None:
    machine = Machine(queue=[Work(sleep_s=60.0) for _ in range(30)])
    machine.run(idle_cpus_gate(machine, max_concurrent=12))
    assert machine.most_running() == 12
    reached_at_s = next(moment_s for moment_s, count in machine.history if count == 12)
    assert reached_at_s - machine.history[0][0] < 5.0


@pytest.mark.parametrize(("quota", "most"), [(0.5, 1), (1.0, 1), (2.0, 2), (3.0, 3)])
def test_the_quota_of_a_cgroup_bounds_the_jobs_on_a_large_machine(quota: float, most: int) -> None:
    machine = Machine(cpus=8, quota=quota, queue=[Work(1.0) for _ in range(20)])
    took_s = machine.run(idle_cpus_gate(machine))
    assert machine.most_running() == most
    assert took_s <= 1.15 * 20 / quota


def test_jobs_make_room_for_somebody_else_and_take_it_back() -> None:
    machine = Machine(queue=[Work(0.5) for _ in range(200)])
    gate = idle_cpus_gate(machine)
    counts = []
    for machine.others in (0.0, 1.0, 0.0):
        ends_at_s = machine.now_s + 15.0
        run_until(machine, gate, ends_at_s)
        counts.append(max(count for moment_s, count in machine.history if moment_s > ends_at_s - 3.0))
    assert counts == [2, 1, 2]


def run_until(machine: Machine, gate: gating.WaitForSlot, ends_at_s: float) -> None:
    """Like Machine.run, for a queue that is never empty."""
    while (ticket := gate(lambda: machine.now_s >= ends_at_s)) is not None:
        assert isinstance(ticket, gating.Ticket)
        machine.take(ticket)


def test_offers_that_nobody_takes_promise_the_whole_machine_once() -> None:
    machine = Machine(cpus=2)
    gate = idle_cpus_gate(machine)
    tickets = offers(machine, gate, for_s=10.0)
    assert len(tickets) == 2
    tickets[0].done()
    assert len(offers(machine, gate, for_s=10.0)) == 1


def offers(machine: Machine, gate: gating.WaitForSlot, for_s: float) -> list[gating.Ticket]:
    """Return the tickets that `gate` gives in the next seconds."""
    ends_at_s = machine.now_s + for_s
    tickets = []
    while (ticket := gate(lambda: machine.now_s >= ends_at_s)) is not None:
        assert isinstance(ticket, gating.Ticket)
        tickets.append(ticket)
    return tickets


def test_a_job_that_starts_slowly_keeps_its_reservation_until_it_computes() -> None:
    machine = Machine(cpus=2)
    gate = idle_cpus_gate(machine, keep_cpu_reservation=True)
    first, second = offers(machine, gate, for_s=5.0)
    environ: dict[str, object] = {}
    first.request_received(environ)
    second.request_received({})
    assert offers(machine, gate, for_s=60.0) == []
    reset = environ["RESET_CPU_RESERVATION"]
    assert callable(reset)
    reset(0)
    assert len(offers(machine, gate, for_s=0.1)) == 1


def test_a_new_reservation_fades_as_its_use_shows() -> None:
    machine = Machine(cpus=2)
    gate = idle_cpus_gate(machine, keep_cpu_reservation=True, max_concurrent=2)
    first, second = offers(machine, gate, for_s=5.0)
    second.done()
    environ: dict[str, object] = {}
    first.request_received(environ)
    first.reset_cpu_reservation(2)
    assert offers(machine, gate, for_s=0.1) == []
    assert len(offers(machine, gate, for_s=5.0)) == 1  # it did not use them


@pytest.mark.parametrize("cpus", [-1, float("nan"), float("inf")])
def test_a_reservation_that_makes_no_sense_is_refused(cpus: float) -> None:
    ticket = idle_cpus_gate(Machine())(never)
    assert isinstance(ticket, gating.Ticket)
    with pytest.raises(ValueError, match="RESET_CPU_RESERVATION"):
        ticket.reset_cpu_reservation(cpus)


def test_promised_cpus_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTHEAD_CPU_PROMISED", "3.5")
    machine = Machine(cpus=2, others=64.0, queue=[Work(1.0) for _ in range(20)])
    machine.run(idle_cpus_gate(machine))
    assert machine.most_running() == 3


def test_after_a_long_break_the_machine_is_measured_anew() -> None:
    """An average over the break would tell of its beginning, when the machine was idle."""
    machine = Machine(cpus=2)
    gate = idle_cpus_gate(machine)
    for ticket in offers(machine, gate, for_s=1.0)[1:]:
        ticket.done()
    machine.sleep(100.0)
    machine.others = 2.0
    machine.sleep(1.0)
    assert offers(machine, gate, for_s=5.0) == []


def test_cpus_and_quotas_may_come_and_go_while_a_gate_waits() -> None:
    """The counters of another set of CPUs must not be taken for time that passed."""
    machine = Machine(cpus=4, others=4.0, idle_s=1000.0)
    gate = idle_cpus_gate(machine)
    assert len(offers(machine, gate, for_s=5.0)) == 1
    machine.cpus, machine.idle_s, machine.others = 6, 2000.0, 6.0
    assert offers(machine, gate, for_s=5.0) == []
    machine.quota, machine.others = 0.5, 0.0
    assert offers(machine, gate, for_s=5.0) == []
    machine.quota = None
    assert len(offers(machine, gate, for_s=5.0)) == 5


def test_a_second_done_and_calls_after_it_do_nothing() -> None:
    machine = Machine(cpus=2)
    gate = idle_cpus_gate(machine, max_concurrent=2)
    first, _second = offers(machine, gate, for_s=5.0)
    first.request_received({})
    first.done()
    first.done()
    first.reset_cpu_reservation(0)
    first.request_received({})
    assert len(offers(machine, gate, for_s=5.0)) == 1


# ---- Deciding on memory ------------------------------------------------------------------------------

RUNNING = Job(started_at_s=0.0)
TWO_GIB = MemoryPolicy(bytes_per_job=2 * GIB)
REST = MemoryReading(8 * GIB, 0)


@pytest.mark.parametrize(
    ("jobs", "now", "may_start"),
    [
        pytest.param((), MemoryReading(0, 0), True, id="the first job, however little there is"),
        pytest.param((Job(),) * 3, REST, True, id="8 GiB take a fourth offer"),
        pytest.param((Job(),) * 4, REST, False, id="but no fifth"),
        pytest.param((RUNNING,) * 3, REST, True, id="jobs that have not grown count as offers do"),
        pytest.param((RUNNING,) * 4, REST, False, id="and as much"),
        pytest.param((RUNNING,) * 3, MemoryReading(2 * GIB, 6 * GIB), True, id="three that have grown"),
        pytest.param((RUNNING,) * 3, MemoryReading(2 * GIB - 1, 6 * GIB), False, id="and leave too little"),
        pytest.param((RUNNING,), MemoryReading(5 * GIB, 3 * GIB), True, id="one that grew too much"),
        pytest.param((RUNNING, RUNNING), MemoryReading(4 * GIB, 0), False, id="others took it, ours will"),
        pytest.param((RUNNING,) * 4, MemoryReading(7 * GIB, 9 * GIB), False, id="shared pages prove little"),
        pytest.param((RUNNING,) * 3, MemoryReading(7 * GIB, None), True, id="scarcity alone shows it"),
    ],
)
def test_jobs_start_while_memory_is_free_and_not_promised(
    jobs: tuple[Job, ...], now: MemoryReading, may_start: bool
) -> None:
    assert gating.may_start_in_memory(TWO_GIB, MemorySample(jobs, now, REST)) is may_start


def test_max_concurrent_bounds_jobs_in_memory() -> None:
    two = replace(TWO_GIB, max_concurrent=2)
    assert gating.may_start_in_memory(two, MemorySample((RUNNING,), REST, REST))
    assert not gating.may_start_in_memory(two, MemorySample((RUNNING, Job()), REST, REST))


def test_where_memory_cannot_be_measured_max_concurrent_decides() -> None:
    blind = MemorySample((RUNNING,), MemoryReading(None), MemoryReading(None))
    assert not gating.may_start_in_memory(TWO_GIB, blind)
    assert gating.may_start_in_memory(replace(TWO_GIB, max_concurrent=2), blind)


@pytest.mark.parametrize("wrong", [{"bytes_per_job": 0}, {"bytes_per_job": 1, "max_concurrent": 0}])
def test_memory_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        gating.wait_for_free_memory(**wrong)  # type: ignore[arg-type]


class Memory(Machine):
    """A machine of 8 GiB with nothing but memory; `used` is ours."""

    used = 0

    def read_memory(self) -> MemoryReading:
        return MemoryReading(8 * GIB - self.used, self.used)


def test_memory_is_reserved_until_it_shows_and_free_when_it_is_done() -> None:
    machine = Memory()
    gate = gating.wait_for_free_memory(3 * GIB, probe=machine, clock=machine.clock, sleep=machine.sleep)
    first, second = offers(machine, gate, for_s=60.0)
    first.request_received({})
    second.request_received({})
    machine.used = 5 * GIB
    assert offers(machine, gate, for_s=60.0) == []
    machine.used = 2 * GIB
    first.done()
    assert len(offers(machine, gate, for_s=60.0)) == 1


def test_what_the_app_holds_at_rest_is_no_sign_of_a_job() -> None:
    """A model of 3 GiB is loaded when the gate is waiting already."""
    machine = Memory()
    gate = gating.wait_for_free_memory(2 * GIB, probe=machine, clock=machine.clock, sleep=machine.sleep)
    first = gate(never)
    assert isinstance(first, gating.Ticket)
    machine.used = 3 * GIB
    machine.sleep(1.0)
    assert len(offers(machine, gate, for_s=1.0)) == 1
    first.request_received({})
    assert offers(machine, gate, for_s=1.0) == []


def test_memory_gate_leaves_the_environ_alone() -> None:
    environ: dict[str, object] = {}
    ticket = gating.wait_for_free_memory(MIB)(never)
    assert isinstance(ticket, gating.Ticket)
    ticket.request_received(environ)
    assert environ == {}


# ---- Reading from files ------------------------------------------------------------------------------


class Root:
    """A directory that is laid out as / of a Linux system is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, name: str, text: str) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def probe(self, allowed: frozenset[int] | None = None) -> gating.ProcProbe:
        return gating.ProcProbe(self.path, lambda: allowed)


V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_CPU = "31 23 0:27 {root} /sys/fs/cgroup/cpu\\040all rw - cgroup cgroup rw,cpu,cpuacct\n"
V1_MEMORY = "32 23 0:28 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
OTHER_MOUNT = "23 1 8:1 / / rw,relatime - ext4 /dev/root rw\n"
STAT = """\
cpu  9 9 9 9 9 9 9 9 9 9
cpu0 1 0 1 500 50 0 0 0 0 0
cpu1 1 0 1 300 0 0 0 0 0 0
cpu10 1 0 1 7 0 0 0 0 0 0
"""


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_idle_cpus_are_those_this_process_may_run_on(root: Root) -> None:
    root.put("proc/stat", STAT + "intr 5810488 0 0\nctxt 1\n")
    tick_s = 1 / gating.TICKS_PER_S
    reading = root.probe(frozenset({1, 10})).read_cpus()
    assert (reading.cpus, reading.idle_s) == (2, pytest.approx(307 * tick_s))
    reading = root.probe().read_cpus()
    assert (reading.cpus, reading.idle_s) == (3, pytest.approx(857 * tick_s))


def test_own_use_counts_descendants_and_children_that_ended(root: Root) -> None:
    root.put("proc/stat", STAT)
    processes = {"self": ("py) R (thon", "10 20 3 4", 1), "71": ("x", "5 5 0 0", 5)}
    processes["72"] = ("y", "1 0 0 0", 1)
    for process, (name, counters, kib) in processes.items():
        root.put(f"proc/{process}/stat", f"7 ({name}) S 1 7 7 0 -1 4 5 0 0 0 {counters} 20 0 2 0\n")
        root.put(f"proc/{process}/status", f"Name:\tx\nVmRSS:\t  999 kB\nRssAnon:\t    {kib} kB\n")
    root.put("proc/self/task/7/children", "71 ")
    root.put("proc/self/task/8/children", "")
    root.put("proc/71/task/71/children", "72 99999 ")  # the last one is gone already
    assert root.probe().read_cpus().own_s == pytest.approx(48 / gating.TICKS_PER_S)
    assert root.probe().read_memory().own_bytes == (1 + 5 + 1) << 10


def test_available_memory_is_the_machines(root: Root) -> None:
    root.put("proc/meminfo", "MemTotal:       24684096 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n")
    assert root.probe().read_memory().available_bytes == 20000000 << 10


def test_cgroup_v2_limits_count_at_every_level(root: Root) -> None:
    root.put("proc/self/cgroup", "0::/pods/mine\n")
    root.put("proc/self/mountinfo", OTHER_MOUNT + V2.format(root="/"))
    root.put("proc/meminfo", f"MemAvailable:   {16 << 20} kB\n")
    top = "sys/fs/cgroup"
    root.put(f"{top}/cpu.stat", "usage_usec 99000000\nuser_usec 1\n")
    root.put(f"{top}/pods/cpu.max", "max 100000\n")
    root.put(f"{top}/pods/cpu.stat", "usage_usec 5000000\n")
    root.put(f"{top}/pods/memory.max", f"{GIB}\n")
    root.put(f"{top}/pods/memory.high", "max\n")
    root.put(f"{top}/pods/memory.current", f"{900 * MIB}\n")
    root.put(f"{top}/pods/memory.stat", f"anon 1\ninactive_file {500 * MIB}\nactive_file 7\n")
    root.put(f"{top}/pods/mine/cpu.max", "150000 100000\n")
    root.put(f"{top}/pods/mine/cpu.stat", "usage_usec 2500000\nnr_throttled 3\n")
    root.put(f"{top}/pods/mine/memory.max", f"{800 * MIB}\n")
    root.put(f"{top}/pods/mine/memory.high", f"{700 * MIB}\n")
    root.put(f"{top}/pods/mine/memory.current", f"{300 * MIB}\n")
    root.put(f"{top}/pods/mine/memory.stat", f"inactive_file {100 * MIB}\n")
    assert root.probe().read_cpus().quotas == (gating.Quota(cpus=1.5, used_s=2.5),)
    assert root.probe().read_memory().available_bytes == 500 * MIB  # 700 - (300 - 100), below 1024 - 400
    root.put(f"{top}/pods/memory.current", f"{1200 * MIB}\n")
    assert root.probe().read_memory().available_bytes == 324 * MIB
    root.put(f"{top}/pods/memory.current", f"{1600 * MIB}\n")
    assert root.probe().read_memory().available_bytes == 0


def test_cgroup_v1_limits_count_at_every_level(root: Root) -> None:
    root.put("proc/self/cgroup", "5:cpu,cpuacct:/docker/a:b\n4:memory:/docker/a:b\n1:name=systemd:/\n")
    root.put("proc/self/mountinfo", OTHER_MOUNT + V1_CPU.format(root="/") + V1_MEMORY.format(root="/"))
    cpu, memory = "sys/fs/cgroup/cpu all", "sys/fs/cgroup/memory"
    groups = (("", -1, 9), ("docker/", 300000, 7 * 10**9), ("docker/a:b/", 50000, 10**9))
    for group, quota_us, used_ns in groups:
        root.put(f"{cpu}/{group}cpu.cfs_quota_us", f"{quota_us}\n")
        root.put(f"{cpu}/{group}cpu.cfs_period_us", "100000\n")
        root.put(f"{cpu}/{group}cpuacct.usage", f"{used_ns}\n")
    for group, limit, used in (("", 9223372036854771712, GIB), ("docker/a:b/", 512 * MIB, 400 * MIB)):
        root.put(f"{memory}/{group}memory.limit_in_bytes", f"{limit}\n")
        root.put(f"{memory}/{group}memory.usage_in_bytes", f"{used}\n")
        root.put(f"{memory}/{group}memory.stat", f"inactive_file 1\ntotal_inactive_file {90 * MIB}\n")
    assert root.probe().read_cpus().quotas == (gating.Quota(0.5, 1.0), gating.Quota(3.0, 7.0))
    assert root.probe().read_memory().available_bytes == 202 * MIB


@pytest.mark.parametrize(
    ("group", "mount_root"),
    [
        pytest.param("/", "/", id="a namespace of its own"),
        pytest.param("/docker/abc", "/docker/abc", id="the mount shows the group"),
        pytest.param("/docker/abc", "/", id="the group is not to be seen"),
        pytest.param("/../other", "/", id="outside of the namespace"),
        pytest.param("/docker/abcd", "/docker/abc", id="a name that begins alike"),
    ],
)
def test_in_a_container_the_limit_is_found_at_the_mount(root: Root, group: str, mount_root: str) -> None:
    root.put("proc/self/cgroup", f"0::{group}\n")
    root.put("proc/self/mountinfo", V2.format(root=mount_root))
    root.put("sys/fs/cgroup/cpu.max", "200000 100000")
    root.put("sys/fs/cgroup/cpu.stat", "usage_usec 1000000")
    root.put("sys/fs/other/cpu.max", "100000 100000")
    assert root.probe().read_cpus().quotas == (gating.Quota(2.0, 1.0),)


def test_cpuacct_in_another_hierarchy_counts_our_own_group(root: Root) -> None:
    root.put("proc/self/cgroup", "2:cpuacct:/\n1:cpu:/jobs\n")
    root.put(
        "proc/self/mountinfo",
        "31 23 0:27 / /cpu rw - cgroup cgroup rw,cpu\n32 23 0:28 / /acct rw - cgroup cgroup rw,cpuacct\n",
    )
    root.put("cpu/jobs/cpu.cfs_quota_us", "100000")
    root.put("cpu/jobs/cpu.cfs_period_us", "100000")
    root.put("acct/cpuacct.usage", "4000000000")
    assert root.probe().read_cpus().quotas == (gating.Quota(1.0, 4.0),)


# ---- Readings of this machine ------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="there is no /proc here")


@needs_proc
def test_proc_tells_about_this_machine() -> None:
    probe = gating.ProcProbe()
    before, before_s = probe.read_cpus(), time.thread_time()
    while time.thread_time() < before_s + 0.2:
        pass
    after = probe.read_cpus()
    assert before.idle_s is not None and after.idle_s is not None
    assert before.own_s is not None and after.own_s is not None
    assert after.cpus == len(os.sched_getaffinity(0))
    assert after.idle_s >= before.idle_s
    assert after.own_s - before.own_s >= 0.15
    memory = probe.read_memory()
    assert memory.available_bytes and memory.own_bytes and memory.own_bytes > MIB


@needs_proc
def test_psutil_and_proc_agree() -> None:
    pytest.importorskip("psutil")
    ours, theirs = gating.ProcProbe().read_cpus(), gating.PsutilProbe().read_cpus()
    assert ours.cpus == theirs.cpus
    assert ours.idle_s == pytest.approx(theirs.idle_s, abs=1.0)
    ours_available = gating.ProcProbe().read_memory().available_bytes
    theirs_available = gating.PsutilProbe().read_memory().available_bytes
    assert ours_available and theirs_available
    assert ours_available <= theirs_available + 512 * MIB


def test_psutil_stands_in_where_there_is_no_proc(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    assert isinstance(gating.find_probe(tmp_path), gating.PsutilProbe)


def test_without_proc_and_psutil_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    machine = Machine()
    probe = gating.find_probe(tmp_path)
    cpus = gating.wait_for_idle_cpus(
        1, max_concurrent=3, probe=probe, clock=machine.clock, sleep=machine.sleep
    )
    memory = gating.wait_for_free_memory(
        MIB, max_concurrent=4, probe=probe, clock=machine.clock, sleep=machine.sleep
    )
    with caplog.at_level(logging.WARNING, "pothead.gating"):
        assert len(offers(machine, cpus, for_s=10.0)) == 3
        assert len(offers(machine, memory, for_s=10.0)) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "cannot tell how many CPUs are idle: no /proc, and no psutil; letting through 3 jobs at a time",
        "cannot tell how much memory is available: no /proc, and no psutil; letting through 4 jobs at a time",
    ]


# ---- Real limits -------------------------------------------------------------------------------------


def run_in(groups: list[Path], code: str) -> str:
    """Run Python code in a process of the given cgroups; return what it prints."""
    joins = "".join(f"echo $$ > '{group}/cgroup.procs'; " for group in groups)
    command = ["sh", "-ec", f'{joins}exec "$@"', "sh", *wire.python("-c", code)]
    done = subprocess.run(command, cwd=wire.ROOT, capture_output=True, text=True, timeout=wire.DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def make_cgroup() -> Iterator[Callable[[str, dict[str, str]], Path]]:
    """Return what makes a cgroup with limits below the top of a controller's hierarchy, or skips the test."""
    made: list[Path] = []

    def make(controller: str, limits: dict[str, str]) -> Path:
        mounts = gating.cgroup_mounts(Path("/proc/self/mountinfo").read_text())
        group = next((Path(mount[2]) for mount in mounts if controller in mount[0]), Path("/nowhere"))
        group /= f"pothead-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
            made.append(group)
            for name, value in limits.items():
                (group / name).write_text(value)
        except OSError as exc:
            pytest.skip(f"cannot make a cgroup with {' and '.join(limits) or controller}: {exc}")
        return group

    yield make
    for group in made:
        group.rmdir()


BURN = """
import threading, time, zlib
def burn():
    while not over:
        zlib.crc32(data)
over, data = False, bytes(1 << 16)
"""

MEASURE_CPUS = f"""
import gating
{BURN}
gate, offers = gating.wait_for_idle_cpus(0.5), []
ends_s = time.monotonic() + 0.5
while gate(lambda: time.monotonic() >= ends_s) is not None:
    offers.append(None)
for _ in range(2):
    threading.Thread(target=burn).start()
probe = gating.ProcProbe()
began_s, began = time.monotonic(), probe.read_cpus()
time.sleep(1.0)
average = gating.average_between(began, probe.read_cpus(), began_s, time.monotonic())
over = True
print(average.capacity, average.free, len(offers))
"""


def check_quota_of_half_a_cpu(output: str) -> None:
    """The gate offers the half a CPU once, though the machine has more that are idle."""
    capacity, free, offers = map(float, output.split())
    assert (capacity, offers) == (0.5, 1)
    assert -0.3 < free < 0.3


def test_a_real_quota_of_cgroup_v1_is_offered_once_and_seen_to_be_used_up(
    make_cgroup: Callable[[str, dict[str, str]], Path],
) -> None:
    cpu = make_cgroup("cpu", {"cpu.cfs_period_us": "20000", "cpu.cfs_quota_us": "10000"})
    groups = [cpu] if (cpu / "cpuacct.usage").exists() else [cpu, make_cgroup("cpuacct", {})]
    check_quota_of_half_a_cpu(run_in(groups, MEASURE_CPUS))


def test_a_real_quota_of_cgroup_v2_is_offered_once_and_seen_to_be_used_up(
    make_cgroup: Callable[[str, dict[str, str]], Path],
) -> None:
    group = make_cgroup("", {"cpu.max": "10000 20000"})
    check_quota_of_half_a_cpu(run_in([group], MEASURE_CPUS))


MEASURE_MEMORY = """
import gating, mmap, os, tempfile
probe = gating.ProcProbe()
before = probe.read_memory()
held = bytearray(os.urandom(20 << 20))
holding = probe.read_memory()
with tempfile.TemporaryFile(dir=".") as file:
    for _ in range(20):
        file.write(bytes(1 << 20))
    file.flush()
    os.fsync(file.fileno())
    caching = probe.read_memory()
print(before.available_bytes, holding.available_bytes, caching.available_bytes)
print(holding.own_bytes - before.own_bytes)
"""


@pytest.mark.parametrize(
    ("controller", "limit"), [("memory", "memory.limit_in_bytes"), ("", "memory.max")], ids=["v1", "v2"]
)
def test_a_real_memory_limit_is_seen_and_file_cache_does_not_count(
    make_cgroup: Callable[[str, dict[str, str]], Path], controller: str, limit: str
) -> None:
    group = make_cgroup(controller, {limit: str(128 * MIB)})
    before, holding, caching, grown = map(int, run_in([group], MEASURE_MEMORY).split())
    assert 64 * MIB < before <= 128 * MIB
    assert 18 * MIB < before - holding < 45 * MIB
    assert holding - caching < 10 * MIB
    assert 18 * MIB < grown < 45 * MIB


# ---- Gates in real time ------------------------------------------------------------------------------


class Halting:
    """A `halt` that another thread sets, and the moment at which it did."""

    def __init__(self) -> None:
        self.at_s = float("inf")

    def __call__(self) -> bool:
        return time.monotonic() >= self.at_s


@pytest.mark.parametrize(
    "gate",
    [
        pytest.param(gating.wait_for_idle_cpus(1, max_concurrent=1), id="cpus"),
        pytest.param(gating.wait_for_free_memory(MIB, max_concurrent=1), id="memory"),
        pytest.param(gating.all_of(gating.wait_for_idle_cpus(1, max_concurrent=1)), id="all"),
    ],
)
def test_a_halt_is_obeyed_promptly(gate: gating.WaitForSlot) -> None:
    halt = Halting()
    assert gate(halt) is not None
    delays_s = []
    for _ in range(5):
        halt.at_s = time.monotonic() + 0.1
        assert gate(halt) is None
        delays_s.append(time.monotonic() - halt.at_s)
    assert min(delays_s) <= 0.05  # the best of some, since the machine may be busy
    assert gate(lambda: True) is None


def test_done_in_another_thread_wakes_a_waiting_gate() -> None:
    """A gate that only looked every 0.03 s would be 0.02 s late here."""
    gate = gating.wait_for_idle_cpus(1, max_concurrent=1)
    ticket = gate(never)
    delays_s = []
    for _ in range(5):
        done_at_s = []

        def end(ticket: object = ticket, done_at_s: list[float] = done_at_s) -> None:
            assert isinstance(ticket, gating.Ticket)
            done_at_s.append(time.monotonic())
            ticket.done()

        timer = threading.Timer(0.04, end)
        timer.start()
        ticket = gate(never)
        delays_s.append(time.monotonic() - done_at_s[0])
        timer.join()
    assert min(delays_s) < 0.01  # the best of some, since the machine may be busy


def test_threads_that_hold_the_interpreter_do_not_open_the_gate() -> None:
    """A job in pure Python leaves other CPUs idle, but another in this process would not get to them."""
    machine = BusyInterpreter(cpus=4)
    gate = gating.wait_for_idle_cpus(1, probe=machine, clock=machine.clock, sleep=machine.sleep)
    first = gate(never)
    assert isinstance(first, gating.Ticket)
    first.request_received({})
    machine.delay_s = 0.005
    assert offers(machine, gate, for_s=10.0) == []
    machine.delay_s = 0.0
    assert len(offers(machine, gate, for_s=10.0)) == 4


class BusyInterpreter(Machine):
    """Sleeps end late by `delay_s`; while another thread computes it is the switch interval."""

    delay_s = 0.0

    def sleep(self, duration_s: float) -> bool:
        return super().sleep(duration_s + self.delay_s)


@needs_proc
@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="no lock to wait for")
def test_real_threads_in_pure_python_are_noticed() -> None:
    gate = gating.wait_for_idle_cpus(0.01, reservation_uncertainty=1000)  # any CPU time at all will do
    over = threading.Event()

    def burn() -> None:
        while not over.is_set():
            sum(range(100))

    ticket = gate(never)
    assert isinstance(ticket, gating.Ticket)
    ticket.request_received({})
    burner = threading.Thread(target=burn)
    burner.start()
    try:
        collect(gate, for_s=0.3)  # what it takes to notice
        assert collect(gate, for_s=0.5) == []
    finally:
        over.set()
        burner.join()
    assert len(collect(gate, for_s=wire.DEADLINE_S, at_most=1)) == 1


def collect(gate: gating.WaitForSlot, for_s: float, at_most: int = 1000) -> list[object]:
    """Return the tickets that `gate` gives in the next seconds."""
    halt = Halting()
    halt.at_s = time.monotonic() + for_s
    tickets: list[object] = []
    while len(tickets) < at_most and (ticket := gate(halt)) is not None:
        tickets.append(ticket)
    return tickets


# ---- Several gates -----------------------------------------------------------------------------------


class Scripted:
    """A gate that gives itself as the ticket, and remembers what was called."""

    def __init__(self, calls: list[str], name: str, failure: Exception | None = None) -> None:
        self.calls = calls
        self.name = name
        self.failure = failure

    def __call__(self, halt: gating.Halt) -> Scripted:
        if self.failure:
            raise self.failure
        self.calls.append(f"{self.name} gives")
        return self

    def request_received(self, environ: gating.Environ) -> None:
        environ[self.name] = True

    def done(self) -> None:
        self.calls.append(f"{self.name} done")


def test_all_of_returns_one_ticket_for_all_gates() -> None:
    calls: list[str] = []
    ticket = gating.all_of(Scripted(calls, "a"), lambda halt: None, Scripted(calls, "b"))(never)
    assert isinstance(ticket, gating.Tickets)
    environ: dict[str, object] = {}
    ticket.request_received(environ)
    assert environ == {"a": True, "b": True}
    assert calls == ["a gives", "b gives"]
    ticket.done()
    assert sorted(calls[2:]) == ["a done", "b done"]


@pytest.mark.parametrize(
    ("counts", "has_done", "is_counted"),
    [((True, True), True, True), ((True, False), True, False), ((False, False), False, False)],
)
def test_all_of_looks_counted_only_if_its_gates_are(
    counts: tuple[bool, ...], has_done: bool, is_counted: bool
) -> None:
    gates = [Scripted([], "a") if counted else lambda halt: None for counted in counts]
    for gate in (gating.all_of(*gates), gating.all_of(gating.all_of(gates[0]), gating.all_of(gates[1]))):
        ticket = gate(never)
        assert hasattr(ticket, "done") == has_done
        assert getattr(ticket, "is_counted", None) == is_counted


def test_all_of_gives_back_what_it_has_when_a_later_gate_raises() -> None:
    calls: list[str] = []
    gate = gating.all_of(Scripted(calls, "a"), Scripted(calls, "b"), Scripted(calls, "c", OSError("no")))
    with pytest.raises(OSError, match="no"):
        gate(never)
    assert calls[:2] == ["a gives", "b gives"] and sorted(calls[2:]) == ["a done", "b done"]


def test_all_of_gives_back_what_it_has_when_halted() -> None:
    calls: list[str] = []
    cpus = gating.wait_for_idle_cpus(1, max_concurrent=1)
    assert cpus(never) is not None
    halt = Halting()
    halt.at_s = time.monotonic() + 0.05
    assert gating.all_of(Scripted(calls, "a"), cpus, Scripted(calls, "b"))(halt) is None
    assert calls == ["a gives", "a done"]


def test_all_of_returns_every_ticket_even_if_one_cannot_be() -> None:
    calls: list[str] = []

    class Broken(Scripted):
        def done(self) -> None:
            super().done()
            raise OSError("broken")

    ticket = gating.all_of(Scripted(calls, "a"), Broken(calls, "b"), Scripted(calls, "c"))(never)
    assert isinstance(ticket, gating.Tickets)
    with pytest.raises(OSError, match="broken"):
        ticket.done()
    assert sorted(calls[3:]) == ["a done", "b done", "c done"]


def test_all_of_the_real_gates_opens_and_opens_again() -> None:
    machine = Memory(cpus=2)
    seams = {"probe": machine, "clock": machine.clock, "sleep": machine.sleep}
    gate = gating.all_of(gating.wait_for_free_memory(5 * GIB, **seams), gating.wait_for_idle_cpus(1, **seams))
    for _ in range(3):
        ticket = gate(never)
        assert isinstance(ticket, gating.Tickets)
        environ: dict[str, object] = {}
        ticket.request_received(environ)
        assert callable(environ["RESET_CPU_RESERVATION"])
        ends_at_s = machine.now_s + 5.0
        assert gate(lambda ends_at_s=ends_at_s: machine.now_s >= ends_at_s) is None
        ticket.done()


def test_all_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one gate"):
        gating.all_of()
