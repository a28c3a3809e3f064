# SPDX-License-Identifier: Apache-2.0
# The gates of POTHEAD, which queues expensive HTTP requests. They need no other file and may be copied as
# they are; the project has their manual, their tests and the text of the licence.
"""Gates for POTHEAD's workers: how many jobs at a time this machine can take just now.

A worker with `--poll-jobs` has no fixed number of slots. It asks its app's gate, and each time the gate
opens it connects to the hub once, for one request:

    app.wait_for_slot = wait_for_idle_cpus(1)
    app.wait_for_slot = wait_for_free_memory(2 << 30, max_concurrent=8)
    app.wait_for_slot = all_of(wait_for_idle_cpus(1), wait_for_free_memory(2 << 30))

    worker ── wait_for_slot(halt) ──▶ ticket        waits; None if `halt()` became true
           ── connects to the hub: an *offer* ──
           ── ticket.request_received(environ) ──▶  the offer is now a *job*
           ── ticket.done() ──▶                     it is over, or the connection failed

Nothing here knows the worker, so a gate can be used by any program that starts jobs.

**What wait_for_idle_cpus does.** One job is let through always: a gate that waited for a machine to be
quite idle could wait forever. More are let through while `required` CPUs are idle among those this process
may run on, and the CPU quotas of its cgroup and of those around it have room. All else is about the word
"idle", since what is measured is the past:

- *Inertia.* The idle CPUs are measured ten times a second and smoothed: the average keeps `inertia` of its
  value at each measurement. With 0 the gate believes every lull; at 0.7 it has forgotten 97 % after a
  second; at 0.95 it opens late. Raise it if your jobs compute in bursts and too many run at a time.

- *Reservation.* A job that has just come does not show in that average yet, and an offer to the hub not at
  all. So each reserves the `required` CPUs, wholly while it is an offer, and then less and less, just as
  fast as the average comes to show it: both together are always the CPUs of one job. A job that ended goes
  on to show in the average, and what it used is added in the same way. Were it not, a machine with short
  jobs would look busy when it has just become free.

- *Jobs that begin slowly.* A job that first waits (for its body, its data) and then computes has used up its
  reservation before it needs it. With `keep_cpu_reservation=True` the reservation stays whole until the
  job itself calls `environ["RESET_CPU_RESERVATION"](cpus)`: from now on I use that many CPUs, 0 for none.
  It should call that when it begins to compute; until then it counts twice, as reserved and as used.
  Any job may call it, as often as its needs change; it makes a new reservation, which fades.

- *Uncertainty.* A job that needs one CPU rarely uses exactly 1.0, and two idle CPUs are rarely measured as
  2.0, for something else always runs a little. So `required / reservation_uncertainty` idle CPUs are
  enough. At 1.3 that is 0.77 of a CPU; at 1.0 a second job starts only on a machine without any other load;
  at 2.0 half of an idle CPU will do.

- *Promised CPUs.* Where somebody has promised CPUs to this worker (Kubernetes' `requests`, a CPU weight),
  it may claim them although others use them just now: the scheduler sees to it. Set `POTHEAD_CPU_PROMISED`
  to their number. Jobs that fit into it are let through without measuring, more of them as above.

- *Threads share an interpreter.* Jobs in pure Python hold the interpreter's lock while they compute, so any
  number of them uses one CPU, and the other CPUs look idle. The gate notices, since it wakes late itself,
  and lets no more through. To use more CPUs, run requests in processes, or compute in code that releases
  the lock (compression, hashing, numpy).

Jobs that sleep use no CPU, and are let through until there are `max_concurrent`. Bound it if your jobs wait
for something that is scarce. What a gate cannot know is the load to come after an offer was made.

**What wait_for_free_memory does.** It lets one job through always, and more while `bytes_per_job` are
available, both on the machine and below the memory limits of the cgroups. A job reserves its bytes until they
show: in what this process and its descendants hold more than they did without a job.

The numbers come from /proc and the cgroup file systems (v1 and v2); where there is no /proc, from `psutil`.
Without either, a gate says so once and lets through `max_concurrent` jobs (by default one for each
`required` CPUs of the machine, or for memory one).

Vocabulary: a *reading* is what the counters say at one moment, a *sample* is all that a decision depends on.
`may_start_on_cpus` and `may_start_in_memory` decide; they are pure functions of their samples.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

log = logging.getLogger("pothead.gating")

SAMPLE_INTERVAL_S = 0.1  # /proc counts in 0.01 s; `inertia` is per interval
FIRST_INTERVAL_S = 0.05  # coarse, but a second job waits for it when the first has just begun
STALE_S = 1.0  # after so long without a measurement, an average would tell of another time
POLL_S = 0.03  # how long a halt may go unnoticed, so below 0.05
FORGOTTEN = 0.01  # a job that ended is dropped when its share in the average is below this
ROUNDING = 1e-6

Halt = Callable[[], object]
WaitForSlot = Callable[[Halt], object]
Environ = MutableMapping[str, object]


# ---- Jobs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """An offer (it has not started), a job, or one that has ended."""

    cpus: float = 0.0  # what it is expected to use
    started_at_s: float | None = None
    ended_at_s: float | None = None
    keeps_reservation: bool = False

    @property
    def is_active(self) -> bool:
        return self.ended_at_s is None


# ---- Deciding on CPUs (pure) -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quota:
    """What a cgroup may use of the CPUs, and what its processes have used so far."""

    cpus: float
    used_s: float


@dataclass(frozen=True, slots=True)
class CpuReading:
    """The counters at one moment."""

    cpus: int  # those this process may run on
    idle_s: float | None  # how long these have been idle, added up; None where nobody knows
    own_s: float | None = None  # CPU time of this process and its descendants
    quotas: tuple[Quota, ...] = ()

    @property
    def is_usable(self) -> bool:
        return self.idle_s is not None or bool(self.quotas)

    def is_like(self, later: CpuReading) -> bool:
        """Return whether both count the same CPUs and quotas, so that their difference means something."""
        counts_the_same = (self.idle_s is None) == (later.idle_s is None)
        return counts_the_same and self.cpus == later.cpus and len(self.quotas) == len(later.quotas)


@dataclass(frozen=True, slots=True)
class CpuAverage:
    """The mean number of CPUs from `since_s` to `until_s`; recent moments count more."""

    since_s: float
    until_s: float
    capacity: float  # all that we may use
    free: float  # what of it nobody used
    own: float  # what we used of it
    first_until_s: float = -math.inf  # where its first measurement ended

    def share(self, job: Job, inertia: float) -> float:
        """Return how much of `job` the average shows: 1 for a job that ran all the time, 0 for an offer."""
        if job.started_at_s is None:
            return 0.0
        return self._weight_before(job.ended_at_s, inertia) - self._weight_before(job.started_at_s, inertia)

    def _weight_before(self, moment_s: float | None, inertia: float) -> float:
        if moment_s is None or moment_s >= self.until_s:
            return 1.0
        if moment_s <= self.since_s:
            return 0.0
        if moment_s >= self.first_until_s:
            return decay(inertia, self.until_s - moment_s)
        # The first measurement was drawn towards from nothing: all its moments count alike.
        first_share = (moment_s - self.since_s) / (self.first_until_s - self.since_s)
        return decay(inertia, self.until_s - self.first_until_s) * first_share


@dataclass(frozen=True, slots=True)
class CpuPolicy:
    """What the app and the deployer want."""

    required: float
    max_concurrent: int | None = None
    inertia: float = 0.7
    reservation_uncertainty: float = 1.3
    promised: float = 0.0

    @property
    def remember_s(self) -> float:
        """How long an ended job can be seen in the average: until its share is below FORGOTTEN."""
        intervals = math.log(FORGOTTEN) / math.log(self.inertia) if self.inertia else 0.0
        return SAMPLE_INTERVAL_S * max(2.0, intervals)

    def __post_init__(self) -> None:
        check(0 < self.required < float("inf"), "required must be more than 0 CPUs", self.required)
        check_max_concurrent(self.max_concurrent)
        check(0 <= self.inertia < 1, "inertia must be at least 0 and below 1", self.inertia)
        uncertainty = self.reservation_uncertainty
        check(1 <= uncertainty < float("inf"), "reservation_uncertainty must be at least 1", uncertainty)


@dataclass(frozen=True, slots=True)
class CpuSample:
    """What the decision depends on. Without an average, `is_measurable` tells whether there will be one."""

    jobs: tuple[Job, ...]
    average: CpuAverage | None
    cpus: int = 1
    is_measurable: bool = True
    is_interpreter_busy: bool = False


def may_start_on_cpus(policy: CpuPolicy, sample: CpuSample) -> bool:
    """Return whether one more job may start."""
    active = [job for job in sample.jobs if job.is_active]
    claimed = sum(job.cpus for job in active) + policy.required
    if not active:
        return True
    if policy.max_concurrent is not None and len(active) >= policy.max_concurrent:
        return False
    if claimed <= policy.promised + ROUNDING:
        return True
    if not sample.is_measurable:
        return policy.max_concurrent is not None or (len(active) + 1) * policy.required <= sample.cpus
    if sample.average is None or sample.is_interpreter_busy:
        return False
    idle = expected_idle_cpus(sample.average, sample.jobs, policy.inertia)
    return idle >= policy.required / policy.reservation_uncertainty


def expected_idle_cpus(average: CpuAverage, jobs: Iterable[Job], inertia: float) -> float:
    """Return the CPUs that will be idle when the average shows all active jobs and none that has ended.

    What one job really uses is our CPU time over the mean number of our jobs, and never more than it said:
    a machine's other load must not be taken for that of a job that ended.
    """
    shares = [(job, average.share(job, inertia)) for job in jobs]
    mean_jobs = sum(share for _, share in shares)
    used_by_one = average.own / mean_jobs if mean_jobs > ROUNDING else 0.0
    freed = sum(share * min(job.cpus, used_by_one) for job, share in shares if not job.is_active)
    reserved = 0.0
    for job, share in shares:
        if job.is_active:
            reserved += job.cpus * (1.0 if job.keeps_reservation else 1.0 - share)
    return min(average.capacity, average.free + freed) - reserved


def average_between(earlier: CpuReading, later: CpuReading, since_s: float, until_s: float) -> CpuAverage:
    """Return what happened between two readings."""
    elapsed_s = until_s - since_s
    capacity = float(later.cpus)
    free = capacity
    if earlier.idle_s is not None and later.idle_s is not None:
        free = min(capacity, max(0.0, (later.idle_s - earlier.idle_s) / elapsed_s))
    for before, after in zip(earlier.quotas, later.quotas, strict=True):
        capacity = min(capacity, after.cpus)
        free = min(free, after.cpus - (after.used_s - before.used_s) / elapsed_s)
    own = capacity - free  # all that is used, unless we know better
    if earlier.own_s is not None and later.own_s is not None:
        own = min(own, max(0.0, (later.own_s - earlier.own_s) / elapsed_s))
    return CpuAverage(since_s, until_s, capacity, free, own, first_until_s=until_s)


def smooth(before: CpuAverage | None, latest: CpuAverage, inertia: float) -> CpuAverage:
    """Return `before`, which ends where `latest` begins, drawn towards `latest`."""
    if before is None:
        return latest
    keep = decay(inertia, latest.until_s - latest.since_s)
    return CpuAverage(
        since_s=before.since_s,
        until_s=latest.until_s,
        capacity=latest.capacity,
        free=keep * before.free + (1 - keep) * latest.free,
        own=keep * before.own + (1 - keep) * latest.own,
        first_until_s=before.first_until_s,
    )


def decay(inertia: float, elapsed_s: float) -> float:
    """Return what an average keeps of a moment `elapsed_s` ago."""
    return float(inertia ** (elapsed_s / SAMPLE_INTERVAL_S))


# ---- Deciding on memory (pure) -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The counters at one moment; None where nobody knows."""

    available_bytes: int | None
    own_bytes: int | None = None  # anonymous memory of this process and its descendants


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What the decision depends on; `at_rest` was read when no job was running (offers do not count)."""

    jobs: tuple[Job, ...]
    now: MemoryReading
    at_rest: MemoryReading


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """What the app wants."""

    bytes_per_job: int
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        check(self.bytes_per_job > 0, "bytes_per_job must be more than 0", self.bytes_per_job)
        check_max_concurrent(self.max_concurrent)


def may_start_in_memory(policy: MemoryPolicy, sample: MemorySample) -> bool:
    """Return whether one more job may start."""
    active = [job for job in sample.jobs if job.is_active]
    if not active:
        return True
    if policy.max_concurrent is not None and len(active) >= policy.max_concurrent:
        return False
    if sample.now.available_bytes is None:
        return policy.max_concurrent is not None
    running = sum(job.started_at_s is not None for job in active)
    reserved = len(active) * policy.bytes_per_job
    shown = min(running * policy.bytes_per_job, shown_bytes(sample.now, sample.at_rest))
    return sample.now.available_bytes - (reserved - shown) >= policy.bytes_per_job


def shown_bytes(now: MemoryReading, at_rest: MemoryReading) -> int:
    """Return how much of our jobs' memory has shown: the lesser of what we gained and what became scarce.

    Either alone can deceive. What became scarce may have gone to somebody else. What we gained may be pages
    that forked processes share and that are counted in each.
    """
    signs = []
    if now.available_bytes is not None and at_rest.available_bytes is not None:
        signs.append(at_rest.available_bytes - now.available_bytes)
    if now.own_bytes is not None and at_rest.own_bytes is not None:
        signs.append(now.own_bytes - at_rest.own_bytes)
    return max(0, min(signs, default=0))


# ---- Reading /proc -----------------------------------------------------------------------------------

CPU_LINE = re.compile(rb"^cpu([0-9]+) (.+)$", re.MULTILINE)
AVAILABLE = re.compile(rb"^MemAvailable: +([0-9]+) kB$", re.MULTILINE)
ANONYMOUS = re.compile(rb"^RssAnon:\s+([0-9]+) kB$", re.MULTILINE)
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def read_file(path: Path | str) -> bytes:
    """Return a file's bytes; none if there is no such file, or no more, or it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def allowed_cpus() -> frozenset[int] | None:
    """Return the CPUs this process may run on; None where the system cannot tell, which means all."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return frozenset(os.sched_getaffinity(0))


class ProcProbe:
    """Reads /proc and the cgroup file systems. `root` is where they are mounted."""

    def __init__(
        self, root: Path = Path("/"), allowed: Callable[[], frozenset[int] | None] = allowed_cpus
    ) -> None:
        self._proc = root / "proc"
        self._allowed = allowed
        self._cgroups = Cgroups(root)

    def read_cpus(self) -> CpuReading:
        idle_s = self._read_idle_s()
        return CpuReading(
            cpus=len(idle_s) or len(self._allowed() or ()) or os.cpu_count() or 1,
            idle_s=sum(idle_s) if idle_s else None,
            own_s=sum(map(cpu_time_s, own_processes(self._proc))) if idle_s else None,
            quotas=tuple(self._cgroups.read_quotas()),
        )

    def read_memory(self) -> MemoryReading:
        match = AVAILABLE.search(read_file(self._proc / "meminfo"))
        available = [int(match[1]) << 10] if match else []
        available += self._cgroups.read_available_bytes()
        own_bytes = sum(map(anonymous_bytes, own_processes(self._proc)))
        return MemoryReading(min(available, default=None), own_bytes or None)

    def _read_idle_s(self) -> list[float]:
        """Return for each CPU that we may run on how long it has been idle, waiting for disks included."""
        allowed = self._allowed()
        idle_s = []
        for number, counters in CPU_LINE.findall(read_file(self._proc / "stat")):
            if allowed is None or int(number) in allowed:
                _user, _nice, _system, idle, iowait = counters.split()[:5]
                idle_s.append((int(idle) + int(iowait)) / TICKS_PER_S)
        return idle_s


def own_processes(proc: Path) -> Iterator[str]:
    """Yield the directories below `proc` of this process and of its descendants."""
    found = [f"{proc}/self"]
    while found:
        process = found.pop()
        yield process
        for task in list_directory(f"{process}/task"):
            children = read_file(f"{process}/task/{task}/children").decode()
            found += [f"{proc}/{pid}" for pid in children.split()]


def list_directory(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def cpu_time_s(process: str) -> float:
    """Return the CPU time of a process and of the children it has waited for; 0 if it is gone."""
    counters = read_file(f"{process}/stat").rpartition(b")")[2].split()
    return sum(map(int, counters[11:15])) / TICKS_PER_S


def anonymous_bytes(process: str) -> int:
    """Return the memory that a process holds and that is no file's; 0 if it is gone."""
    match = ANONYMOUS.search(read_file(f"{process}/status"))
    return int(match[1]) << 10 if match else 0


# ---- Reading cgroups ---------------------------------------------------------------------------------

UNLIMITED_BYTES = 1 << 60  # cgroup v1 says so with a number near 2**63
ESCAPE = re.compile(r"\\([0-7]{3})")  # how mountinfo writes a space


class Cgroups:
    """The cgroups this process is in, for each controller its own first, then those around it.

    Every limit on the way up counts. In a container often only the innermost is to be seen.
    """

    def __init__(self, root: Path) -> None:
        groups = own_groups(read_file(root / "proc/self/cgroup").decode(errors="replace"))
        mounts = read_file(root / "proc/self/mountinfo").decode(errors="replace")
        found: dict[str, list[Path]] = {}
        for controllers, mount_root, mount_point in cgroup_mounts(mounts):
            for name in controllers & groups.keys():
                found[name] = levels(root / mount_point.lstrip("/"), mount_root, groups[name])
        self._unified = found.get("", [])
        self._memory = found.get("memory", [])
        cpu, accounts = found.get("cpu", []), found.get("cpuacct", [])
        # Both controllers are mounted together nearly everywhere. Where they are not, and the groups differ,
        # what our own group used is the best guess.
        if len(accounts) != len(cpu):
            accounts = accounts[:1] * len(cpu)
        self._cpu = list(zip(cpu, accounts, strict=False))  # none where nobody accounts

    def read_quotas(self) -> Iterator[Quota]:
        for level in self._unified:
            limit, _, period = read_file(level / "cpu.max").partition(b" ")
            used_us = read_keyed_number(level / "cpu.stat", b"usage_usec")
            if limit.isdigit() and used_us is not None:
                yield Quota(int(limit) / int(period), used_us / 1e6)
        for level, accounts in self._cpu:
            quota_us = read_number(level / "cpu.cfs_quota_us")  # -1 without a quota
            period_us = read_number(level / "cpu.cfs_period_us")
            used_ns = read_number(accounts / "cpuacct.usage")
            if quota_us is not None and period_us and used_ns is not None:
                yield Quota(quota_us / period_us, used_ns / 1e9)

    def read_available_bytes(self) -> Iterator[int]:
        """Yield for each cgroup with a limit what is free, or holds files that the kernel can drop."""
        for level in self._unified:
            limits = [level / "memory.max", level / "memory.high"]
            yield from below_limit(limits, level / "memory.current", b"inactive_file")
        for level in self._memory:
            limits = [level / "memory.limit_in_bytes"]
            yield from below_limit(limits, level / "memory.usage_in_bytes", b"total_inactive_file")


def own_groups(text: str) -> dict[str, str]:
    """Return the path of our group by controller, from /proc/self/cgroup; cgroup v2 has the name ""."""
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            groups[name] = path
    return groups


def cgroup_mounts(mountinfo: str) -> Iterator[tuple[set[str], str, str]]:
    """Yield the controllers, the group at the top, and the mount point of each cgroup file system."""
    for line in mountinfo.splitlines():
        mount, _, file_system = line.partition(" - ")
        mount_root, mount_point = [unescape(field) for field in mount.split(" ")[3:5]]
        kind, _, options = file_system.split(" ", 2)
        if kind == "cgroup2":
            yield {""}, mount_root, mount_point
        elif kind == "cgroup":
            yield set(options.split(",")), mount_root, mount_point


def unescape(field: str) -> str:
    return ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def levels(mount_point: Path, mount_root: str, group: str) -> list[Path]:
    """Return the directories of `group` and of those around it, as far as they are mounted."""
    top = mount_root.rstrip("/")
    inside = group[len(top) :] if f"{group}/".startswith(f"{top}/") else ""
    own = mount_point / inside.strip("/")
    if ".." in own.parts or not own.is_dir():  # what /proc says is not what is mounted here
        own = mount_point
    return [path for path in (own, *own.parents) if path.is_relative_to(mount_point)]


def below_limit(limits: Iterable[Path], used: Path, idle_key: bytes) -> Iterator[int]:
    known = [limit for limit in map(read_number, limits) if limit is not None and limit < UNLIMITED_BYTES]
    used_bytes = read_number(used)
    if known and used_bytes is not None:
        idle_bytes = read_keyed_number(used.with_name("memory.stat"), idle_key) or 0
        yield max(0, min(known) - max(0, used_bytes - idle_bytes))


def read_number(path: Path) -> int | None:
    """Return the number a file consists of; None for a missing file, "max", and -1."""
    text = read_file(path).strip()
    return int(text) if text.isdigit() else None


def read_keyed_number(path: Path, key: bytes) -> int | None:
    match = re.search(rb"^%b ([0-9]+)$" % key, read_file(path), re.MULTILINE)
    return int(match[1]) if match else None


# ---- Reading without /proc ---------------------------------------------------------------------------


class PsutilProbe:
    """Reads the machine through psutil. What our own processes use costs too much to ask for here."""

    def __init__(self) -> None:
        import psutil  # optional

        self._psutil = psutil

    def read_cpus(self) -> CpuReading:
        times = self._psutil.cpu_times(percpu=True)
        allowed = allowed_cpus()
        mine = [cpu for number, cpu in enumerate(times) if allowed is None or number in allowed]
        return CpuReading(len(mine), sum(cpu.idle + getattr(cpu, "iowait", 0.0) for cpu in mine))

    def read_memory(self) -> MemoryReading:
        return MemoryReading(self._psutil.virtual_memory().available)


class Probe(Protocol):
    """Where the numbers come from."""

    def read_cpus(self) -> CpuReading: ...

    def read_memory(self) -> MemoryReading: ...


def find_probe(root: Path = Path("/")) -> Probe:
    """Return the probe for this system: /proc where there is one, else psutil, else one that knows nothing.

    /proc comes first even where psutil is installed: it costs less, and knows of cgroups.
    """
    probe = ProcProbe(root)
    if probe.read_cpus().is_usable or probe.read_memory().available_bytes is not None:
        return probe
    try:
        return PsutilProbe()
    except ImportError:
        return probe


# ---- Gates -------------------------------------------------------------------------------------------


class Judge(Protocol):
    """Knows the machine, and says whether one more job may start beside `jobs`."""

    def may_start(self, now_s: float, jobs: tuple[Job, ...], wake_delay_s: float) -> bool: ...


class Gate:
    """Lets jobs through, and remembers them until they are done.

    One thread calls `wait_for_slot`; tickets are used by any.
    """

    def __init__(
        self,
        judge: Judge,
        offer: Job,
        remember_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], object] | None,
    ) -> None:
        self._judge = judge
        self._offer = offer
        self._remember_s = remember_s  # how long an ended job still counts
        self.clock = clock
        self.changed = threading.Event()
        self._sleep = sleep or self.changed.wait
        self.lock = threading.Lock()  # of the tickets, and what they say of their jobs
        self._tickets: list[Ticket] = []  # whose jobs count
        self._wake_delay_s = 0.0

    def wait_for_slot(self, halt: Halt) -> Ticket | None:
        """Return when one more job may start, or None when `halt()` is true."""
        while not halt():
            ticket = self._try_start()
            if ticket is not None:
                return ticket
            self._pause()
        return None

    def _try_start(self) -> Ticket | None:
        with self.lock:
            now_s = self.clock()
            self._tickets = [each for each in self._tickets if self._counts(each.job, now_s)]
            jobs = tuple([each.job for each in self._tickets])
            if not self._judge.may_start(now_s, jobs, self._wake_delay_s):
                return None
            ticket = Ticket(self, self._offer)
            self._tickets.append(ticket)
            return ticket

    def _counts(self, job: Job, now_s: float) -> bool:
        """Return whether a job matters still: one that has ended does for a while, an offer does not."""
        if job.ended_at_s is None:
            return True
        return job.started_at_s is not None and now_s - job.ended_at_s < self._remember_s

    def _pause(self) -> None:
        """Wait for a moment, or until a job changes; learn how late we wake."""
        before_s = self.clock()
        was_changed = self._sleep(POLL_S)
        self.changed.clear()
        if not was_changed:
            delay_s = max(0.0, self.clock() - before_s - POLL_S)
            self._wake_delay_s += (delay_s - self._wake_delay_s) * WAKE_DELAY_WEIGHT


class Ticket:
    """The promise of a gate to one job. `done` gives it back; what is called after that does nothing."""

    def __init__(self, gate: Gate, offer: Job) -> None:
        self.job = offer
        self._gate = gate

    def request_received(self, environ: Environ) -> None:
        """Tell that the offer was taken, and let the job change its reservation."""
        with self._gate.lock:
            if self.job.is_active:
                self.job = replace(self.job, started_at_s=self._gate.clock())
        if self.job.cpus > 0:
            environ["RESET_CPU_RESERVATION"] = self.reset_cpu_reservation

    def reset_cpu_reservation(self, cpus: float) -> None:
        """From now on the job uses `cpus` CPUs."""
        check(0 <= cpus < float("inf"), "RESET_CPU_RESERVATION: cpus must be at least 0", cpus)
        with self._gate.lock:
            if self.job.is_active:
                self.job = Job(cpus, started_at_s=self._gate.clock())
        self._gate.changed.set()

    def done(self) -> None:
        """Tell that the job is over, or that its connection failed."""
        with self._gate.lock:
            if self.job.is_active:
                self.job = replace(self.job, ended_at_s=self._gate.clock())
        self._gate.changed.set()


# What a thread waits for the interpreter's lock while another computes is the switch interval. Without that
# it wakes within a millisecond.
BUSY_WAKE_DELAY_S = sys.getswitchinterval() / 2
WAKE_DELAY_WEIGHT = 0.3  # of the latest: noticed within an interval, not deceived by a single one


class CpuJudge:
    """Measures the CPUs, at most once in an interval."""

    def __init__(self, policy: CpuPolicy, probe: Probe) -> None:
        self._policy = policy
        self._probe = probe
        self._average: CpuAverage | None = None
        self._reading: CpuReading | None = None
        self._read_at_s = 0.0
        self._has_warned = False

    def may_start(self, now_s: float, jobs: tuple[Job, ...], wake_delay_s: float) -> bool:
        reading = self._measure(now_s)
        is_busy = wake_delay_s >= BUSY_WAKE_DELAY_S
        sample = CpuSample(jobs, self._average, reading.cpus, reading.is_usable, is_busy)
        return may_start_on_cpus(self._policy, sample)

    def _measure(self, now_s: float) -> CpuReading:
        """Return the latest reading, and keep the average up to it."""
        last, last_s = self._reading, self._read_at_s
        interval_s = FIRST_INTERVAL_S if self._average is None else SAMPLE_INTERVAL_S
        if last is not None and now_s - last_s < interval_s:
            return last
        self._read_at_s, self._reading = now_s, self._probe.read_cpus()
        if not self._reading.is_usable:
            self._warn_once("cannot tell how many CPUs are idle")
        elif last is None or now_s - last_s > STALE_S or not last.is_like(self._reading):
            self._average = None
        else:
            latest = average_between(last, self._reading, last_s, now_s)
            self._average = smooth(self._average, latest, self._policy.inertia)
        return self._reading

    def _warn_once(self, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(problem, self._policy.max_concurrent)


class MemoryJudge:
    """Measures the memory, at most once in an interval."""

    def __init__(self, policy: MemoryPolicy, probe: Probe) -> None:
        self._policy = policy
        self._probe = probe
        self._reading: MemoryReading | None = None
        self._at_rest: MemoryReading | None = None
        self._read_at_s = 0.0

    def may_start(self, now_s: float, jobs: tuple[Job, ...], wake_delay_s: float) -> bool:
        reading = self._measure(now_s)
        has_running = any(job.started_at_s is not None for job in jobs)
        if self._at_rest is None or not has_running:
            self._at_rest = reading
        return may_start_in_memory(self._policy, MemorySample(jobs, reading, self._at_rest))

    def _measure(self, now_s: float) -> MemoryReading:
        if self._reading is None or now_s - self._read_at_s >= SAMPLE_INTERVAL_S:
            is_first = self._reading is None
            self._read_at_s, self._reading = now_s, self._probe.read_memory()
            if is_first and self._reading.available_bytes is None:
                warn("cannot tell how much memory is available", self._policy.max_concurrent)
        return self._reading


def warn(problem: str, max_concurrent: int | None) -> None:
    bound = "a default number of" if max_concurrent is None else max_concurrent
    log.warning("%s: no /proc, and no psutil; letting through %s jobs at a time", problem, bound)


# ---- What apps use -----------------------------------------------------------------------------------


def wait_for_idle_cpus(
    required: float,
    *,
    max_concurrent: int | None = None,
    inertia: float = 0.7,
    reservation_uncertainty: float = 1.3,
    keep_cpu_reservation: bool = False,
    probe: Probe | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] | None = None,
) -> WaitForSlot:
    """Return a gate that lets a job through while `required` CPUs are idle; the module tells what all mean.

    `sleep` returns whether it was interrupted. Raises ValueError for numbers that make no sense, also for
    that of $POTHEAD_CPU_PROMISED.
    """
    policy = CpuPolicy(
        required,
        max_concurrent,
        inertia,
        reservation_uncertainty,
        parse_promised(os.environ),
    )
    offer = Job(cpus=required, keeps_reservation=keep_cpu_reservation)
    judge = CpuJudge(policy, probe or find_probe())
    return Gate(judge, offer, policy.remember_s, clock, sleep).wait_for_slot


def wait_for_free_memory(
    bytes_per_job: int,
    *,
    max_concurrent: int | None = None,
    probe: Probe | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] | None = None,
) -> WaitForSlot:
    """Return a gate that lets a job through while there is memory for it. Raises ValueError."""
    judge = MemoryJudge(MemoryPolicy(bytes_per_job, max_concurrent), probe or find_probe())
    return Gate(judge, Job(), 0.0, clock, sleep).wait_for_slot


def all_of(*gates: WaitForSlot) -> WaitForSlot:
    """Return a gate that opens when each of `gates` has, asked in this order; put the slowest to open first.

    Any callable can take part that obeys the worker's contract. When one raises, or the worker halts, what
    the others have given is given back.
    """
    check(bool(gates), "all_of needs at least one gate", len(gates))

    def wait_for_slot(halt: Halt) -> Tickets | None:
        with contextlib.ExitStack() as release:
            tickets = []
            for gate in gates:
                ticket = gate(halt)
                tickets.append(ticket)
                if (done := getattr(ticket, "done", None)) is not None:
                    release.callback(done)
                if halt():
                    return None
            return Tickets(tickets, release.pop_all().close)

    return wait_for_slot


class Tickets:
    """The tickets of several gates as one; a gate may have given None, or an object without some method.

    With a `done`, who asks takes it that the gate counts its jobs, and asks for the next one at once. So it
    has one only if a ticket has, and tells by `is_counted` if another has none: that one's gate must not be
    asked again before its job has begun, or it would let through any number.
    """

    def __init__(self, tickets: list[object], give_back: Callable[[], None]) -> None:
        """`give_back` returns them all, even if returning one raises."""
        self._tickets = tickets
        self.is_counted = all(map(is_counted, tickets))
        if any([hasattr(each, "done") for each in tickets]):
            self.done = give_back

    def request_received(self, environ: Environ) -> None:
        for ticket in self._tickets:
            call = getattr(ticket, "request_received", None)
            if call is not None:
                call(environ)


def is_counted(ticket: object) -> bool:
    return bool(getattr(ticket, "is_counted", hasattr(ticket, "done")))


# ---- Checking arguments ------------------------------------------------------------------------------

PROMISED = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,9})?")


def parse_promised(environment: Mapping[str, str]) -> float:
    """Return $POTHEAD_CPU_PROMISED, 0 if it is not set. Raises ValueError."""
    text = environment.get("POTHEAD_CPU_PROMISED") or "0"
    check(PROMISED.fullmatch(text) is not None, "POTHEAD_CPU_PROMISED is a number of CPUs like 1.5", text)
    return float(text)


def check_max_concurrent(number: int | None) -> None:
    check(number is None or number >= 1, "max_concurrent must be at least 1", number)


def check(is_right: bool, rule: str, value: object) -> None:
    if not is_right:
        raise ValueError(f"{rule}, not {value!r}")
