"""The spool: bytes in order, in memory up to a mark and while the budget lasts, in a file beyond."""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pothead import MemoryBudget, Spool

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(MIB)


SMALL_FILE = 64 * KIB


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The disk is full at SMALL_FILE a file: the kernel refuses writes beyond.

    It holds for pytest's own output, too, which may be a file: so only within a test, not in a fixture.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_all(spool: Spool, piece_bytes: int = 1000) -> bytes:
    content = bytearray()
    while piece := bytes(spool.peek(piece_bytes)):
        assert len(piece) <= piece_bytes
        content += piece
        spool.advance(len(piece))
    return bytes(content)


def count_open_files() -> int:
    return len(os.listdir("/dev/fd"))


# ---- The budget --------------------------------------------------------------------------------------


def test_budget_is_given_out_up_to_its_limit() -> None:
    budget = MemoryBudget(100)
    assert budget.take(60) and budget.take(40)
    assert not budget.take(1)
    assert budget.used == 100


def test_refused_share_of_the_budget_is_not_counted() -> None:
    budget = MemoryBudget(100)
    assert not budget.take(101)
    assert budget.used == 0


def test_budget_given_back_can_be_taken_again() -> None:
    budget = MemoryBudget(100)
    budget.take(100)
    budget.give_back(30)
    assert budget.used == 70
    assert budget.take(30)


# ---- Order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 7, 1000, MIB])
def test_bytes_come_out_as_they_went_in(budget: MemoryBudget, tmp_path: Path, memory_limit: int) -> None:
    data = random.Random(1).randbytes(10_000)
    spool = Spool(budget, memory_limit, str(tmp_path))
    for start in range(0, len(data), 333):
        spool.append(data[start : start + 333])
    assert spool.size == 10_000
    assert read_all(spool) == data
    assert (spool.size, bytes(spool.peek(10))) == (0, b"")
    spool.close()


def test_directory_may_be_left_to_the_system(budget: MemoryBudget) -> None:
    spool = Spool(budget, 0, None)
    spool.append(b"hello")
    assert read_all(spool) == b"hello"
    spool.close()


def test_peek_takes_nothing(budget: MemoryBudget) -> None:
    spool = Spool(budget, 100, None)
    spool.append(b"hello")
    assert bytes(spool.peek(3)) == b"hel"
    assert bytes(spool.peek(100)) == b"hello"
    assert spool.size == 5
    spool.close()


def test_advance_may_take_less_than_was_shown(budget: MemoryBudget) -> None:
    spool = Spool(budget, 3, None)
    spool.append(b"hello")
    spool.append(b" world")
    assert bytes(spool.peek(2)) == b"he"
    spool.advance(1)
    assert read_all(spool) == b"ello world"
    spool.close()


@pytest.mark.parametrize("memory_limit", [0, 100])
def test_appended_memory_belongs_to_the_caller_again(budget: MemoryBudget, memory_limit: int) -> None:
    """A role appends a view of its input buffer and then reuses the buffer."""
    data = bytearray(b"hello")
    spool = Spool(budget, memory_limit, None)
    with memoryview(data) as view:
        spool.append(view)
    data[:] = b"xxxxx"
    data.clear()
    assert read_all(spool) == b"hello"
    spool.close()


@pytest.mark.parametrize("memory_limit", [0, 100])
def test_bytes_that_were_read_stay_valid_when_more_come(budget: MemoryBudget, memory_limit: int) -> None:
    """A stream may still be writing what it was given when the next bytes are appended."""
    spool = Spool(budget, memory_limit, None)
    spool.append(b"hello")
    shown = memoryview(spool.peek(5))
    spool.advance(5)
    spool.append(b" world")
    assert shown == b"hello"
    assert read_all(spool) == b" world"
    spool.close()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("memory_limit", [0, 50, 300, 5000])
@pytest.mark.parametrize("budget_bytes", [0, 200, 100_000])
@pytest.mark.parametrize("file_limit", [0, 400, math.inf])
def test_spool_behaves_like_a_byte_string_whatever_is_done_to_it(
    tmp_path: Path, keep: bool, memory_limit: int, budget_bytes: int, file_limit: float
) -> None:
    rng = random.Random(f"{keep} {memory_limit} {budget_bytes} {file_limit}")
    budget = MemoryBudget(budget_bytes)
    spool = Spool(budget, memory_limit, str(tmp_path), keep=keep, file_limit=file_limit)
    content, read = b"", 0
    for _ in range(400):
        action = rng.choice(("append", "append", "read", "read", "read", "rewind"))
        if action == "append":
            data = rng.randbytes(rng.randint(0, 120))
            spool.append(data)
            content += data
        elif action == "read":
            limit = rng.randint(1, 200)
            piece = bytes(spool.peek(limit))
            assert content[read : read + limit].startswith(piece)
            assert piece or read == len(content)
            read += (step := rng.randint(0, len(piece)))
            spool.advance(step)
        elif keep:
            spool.rewind()
            read = 0
        assert spool.size == len(content) - read
        # What finds no place in a file that is used in a circle stays in memory.
        assert budget.used <= min(budget_bytes, memory_limit) or (not keep and file_limit < math.inf)
    assert read_all(spool) == content[read:]
    spool.close()
    assert budget.used == 0


# ---- Memory and file ---------------------------------------------------------------------------------


def test_small_content_stays_in_memory_and_opens_no_file(budget: MemoryBudget, tmp_path: Path) -> None:
    open_files = count_open_files()
    spool = Spool(budget, 1000, str(tmp_path))
    spool.append(b"x" * 1000)
    assert budget.used == 1000
    assert count_open_files() == open_files
    spool.close()


def test_content_beyond_the_mark_goes_to_a_file_that_close_removes(
    budget: MemoryBudget, tmp_path: Path
) -> None:
    open_files = count_open_files()
    spool = Spool(budget, 1000, str(tmp_path))
    spool.append(b"x" * 1001)
    assert budget.used <= 1000
    assert count_open_files() == open_files + 1
    spool.close()
    assert count_open_files() == open_files
    assert os.listdir(tmp_path) == []


def test_beyond_the_budget_every_spool_goes_to_its_file_at_once(tmp_path: Path) -> None:
    budget = MemoryBudget(100)
    first, second = Spool(budget, 80, str(tmp_path)), Spool(budget, 80, str(tmp_path))
    first.append(b"a" * 80)
    second.append(b"b" * 80)
    assert budget.used <= 100
    assert read_all(first) == b"a" * 80
    assert read_all(second) == b"b" * 80
    first.close()
    second.close()
    assert budget.used == 0


def test_memory_goes_back_to_the_budget_as_it_is_read(budget: MemoryBudget) -> None:
    spool = Spool(budget, 1000, None)
    spool.append(b"x" * 900)
    read_all(spool)
    assert budget.used == 0
    spool.append(b"y" * 900)
    assert read_all(spool) == b"y" * 900
    spool.close()


def test_memory_does_not_grow_with_the_content(tmp_path: Path) -> None:
    spool = Spool(MemoryBudget(MIB), 64 * 1024, str(tmp_path))
    piece = b"x" * 65536
    tracemalloc.start()
    for _ in range(256):
        spool.append(piece)
    while shown := len(spool.peek(65536)):
        spool.advance(shown)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    spool.close()
    assert peak < MIB


@small_files()
def test_file_starts_over_when_everything_has_been_read(budget: MemoryBudget, tmp_path: Path) -> None:
    """A long stream whose reader keeps up must not fill the disk with what has been read."""
    spool = Spool(budget, 0, str(tmp_path))
    for _ in range(20):
        spool.append(b"x" * (SMALL_FILE // 4))
        assert len(read_all(spool, SMALL_FILE)) == SMALL_FILE // 4
    spool.close()


@small_files()
def test_file_is_used_in_a_circle_and_does_not_hold_what_was_read(
    budget: MemoryBudget, tmp_path: Path
) -> None:
    """A response many times as long as the spool, to a reader that never catches up."""
    piece, limit = SMALL_FILE // 16, SMALL_FILE // 2
    spool = Spool(budget, 0, str(tmp_path), file_limit=limit)
    sent, read = random.Random(1).randbytes(SMALL_FILE * 8), b""
    for start in range(0, len(sent), piece):
        while spool.is_over(limit - piece):
            read += bytes(spool.peek(piece // 3))
            spool.advance(len(spool.peek(piece // 3)))
        spool.append(sent[start : start + piece])
    assert (spool.disk_error, budget.used) == (None, 0)
    assert read + read_all(spool) == sent
    spool.close()


# ---- Keeping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 7, 1000])
def test_kept_content_can_be_read_again_from_the_start(budget: MemoryBudget, memory_limit: int) -> None:
    spool = Spool(budget, memory_limit, None, keep=True)
    spool.append(b"hello ")
    spool.append(b"world")
    for _ in range(3):
        spool.advance(len(spool.peek(4)))
        spool.rewind()
        assert spool.size == 11
        assert read_all(spool, 4) == b"hello world"
        spool.rewind()
    spool.close()
    assert budget.used == 0


# ---- Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 1000])
def test_close_may_come_twice_and_gives_back_once(budget: MemoryBudget, memory_limit: int) -> None:
    budget.take(10)
    spool = Spool(budget, memory_limit, None)
    spool.append(b"x" * 500)
    spool.close()
    spool.close()
    assert budget.used == 10


def test_unused_spool_can_be_closed(budget: MemoryBudget) -> None:
    open_files = count_open_files()
    Spool(budget, 0, None).close()
    assert count_open_files() == open_files


@small_files()
def test_full_disk_is_told_and_loses_nothing(budget: MemoryBudget, tmp_path: Path) -> None:
    open_files = count_open_files()
    spool = Spool(budget, 1000, str(tmp_path))
    data = random.Random(1).randbytes(SMALL_FILE * 3 // 2)
    for start in range(0, len(data), 8192):
        spool.append(data[start : start + 8192])
    assert isinstance(spool.disk_error, OSError)
    assert spool.is_over(2 * SMALL_FILE)
    assert read_all(spool, 65536) == data
    spool.close()
    assert (budget.used, count_open_files(), os.listdir(tmp_path)) == (0, open_files, [])


def test_missing_directory_is_told_when_the_file_is_needed(budget: MemoryBudget, tmp_path: Path) -> None:
    spool = Spool(budget, 10, str(tmp_path / "missing"))
    spool.append(b"x" * 10)
    assert spool.disk_error is None
    spool.append(b"y")
    assert isinstance(spool.disk_error, FileNotFoundError)
    assert read_all(spool) == b"x" * 10 + b"y"
    spool.close()
    assert budget.used == 0


def test_spool_is_over_a_limit_by_what_is_unread(budget: MemoryBudget, tmp_path: Path) -> None:
    spool = Spool(budget, 100, str(tmp_path))
    spool.append(b"x" * 100)
    assert not spool.is_over(100)
    spool.append(b"x" * 100)
    assert spool.is_over(100)
    spool.advance(len(spool.peek(100)))
    assert not spool.is_over(100)
    spool.close()
