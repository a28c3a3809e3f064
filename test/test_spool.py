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

from pothead import Spool, SpoolBudget

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def budget() -> SpoolBudget:
    return SpoolBudget(MIB)


SMALL_FILE = 64 * KIB


@contextlib.contextmanager
def small_files(limit: int = SMALL_FILE) -> Iterator[None]:
    """The disk is full at so many bytes a file: the kernel refuses writes beyond.

    It holds for pytest's own output, too, which may be a file: so only within a test, not in a fixture.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
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
    budget = SpoolBudget(100)
    assert budget.take_memory(60) and budget.take_memory(40)
    assert not budget.take_memory(1)
    assert budget.memory_used == 100


def test_refused_share_of_the_budget_is_not_counted() -> None:
    budget = SpoolBudget(100)
    assert not budget.take_memory(101)
    assert budget.memory_used == 0


def test_budget_given_back_can_be_taken_again() -> None:
    budget = SpoolBudget(100)
    budget.take_memory(100)
    budget.memory_used -= 30
    assert budget.memory_used == 70
    assert budget.take_memory(30)


# ---- Order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 7, 1000, MIB])
def test_bytes_come_out_as_they_went_in(budget: SpoolBudget, tmp_path: Path, memory_limit: int) -> None:
    data = random.Random(1).randbytes(10_000)
    spool = Spool(budget, memory_limit, str(tmp_path))
    for start in range(0, len(data), 333):
        spool.append(data[start : start + 333])
    assert spool.size == 10_000
    assert read_all(spool) == data
    assert (spool.size, bytes(spool.peek(10))) == (0, b"")
    spool.close()


def test_directory_may_be_left_to_the_system(budget: SpoolBudget) -> None:
    spool = Spool(budget, 0, None)
    spool.append(b"hello")
    assert read_all(spool) == b"hello"
    spool.close()


def test_peek_takes_nothing(budget: SpoolBudget) -> None:
    spool = Spool(budget, 100, None)
    spool.append(b"hello")
    assert bytes(spool.peek(3)) == b"hel"
    assert bytes(spool.peek(100)) == b"hello"
    assert spool.size == 5
    spool.close()


def test_advance_may_take_less_than_was_shown(budget: SpoolBudget) -> None:
    spool = Spool(budget, 3, None)
    spool.append(b"hello")
    spool.append(b" world")
    assert bytes(spool.peek(2)) == b"he"
    spool.advance(1)
    assert read_all(spool) == b"ello world"
    spool.close()


@pytest.mark.parametrize("memory_limit", [0, 100])
def test_appended_memory_belongs_to_the_caller_again(budget: SpoolBudget, memory_limit: int) -> None:
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
def test_bytes_that_were_read_stay_valid_when_more_come(budget: SpoolBudget, memory_limit: int) -> None:
    """A stream may still be writing what it was given when the next bytes are appended."""
    spool = Spool(budget, memory_limit, None)
    spool.append(b"hello")
    shown = memoryview(spool.peek(5))
    spool.advance(5)
    spool.append(b" world")
    assert shown == b"hello"
    assert read_all(spool) == b" world"
    spool.close()


def test_spool_behaves_like_a_byte_string_whatever_is_done_to_it(tmp_path: Path) -> None:
    for seed in range(3000):
        rng = random.Random(seed)
        budget = SpoolBudget(rng.choice((0, 200, 100_000)), rng.choice((0, 700, math.inf)))
        with small_files(rng.choice((300, 1000, MIB))):
            live_at_random(rng, budget, str(tmp_path), f"history {seed}")
        assert (budget.memory_used, budget.disk_used, budget.files) == (0, 0, 0), seed


def live_at_random(rng: random.Random, budget: SpoolBudget, directory: str, which: str) -> None:
    """Hold a spool against all bytes since it was empty, and how many of them were read."""
    keep, memory_limit = rng.random() < 0.3, rng.choice((0, 50, 300, 5000))
    file_limit = rng.choice((0, 400, math.inf))
    spool = Spool(budget, memory_limit, directory, keep=keep, file_limit=file_limit)
    content, read = b"", 0
    again = "rewind" if keep else "spill"
    for _ in range(rng.randint(1, 80)):
        action = rng.choices(("append", "read", again, "close"), (40, 40, 10, 1))[0]
        if action == "append":
            data = rng.randbytes(rng.choice((0, rng.randint(1, 30), rng.randint(1, 400))))
            spool.append(data)
            content += data
        elif action == "read":
            limit = rng.randint(1, 500)
            piece = bytes(spool.peek(limit))
            assert content[read : read + limit].startswith(piece), which
            assert piece or read == len(content), which
            read += (step := rng.randint(0, len(piece)))
            spool.advance(step)
        elif action == "rewind":
            spool.rewind()
            read = 0
        elif action == "spill":
            spool.spill(memory_limit := rng.randint(0, memory_limit))
        else:
            spool.close()
            content, read = b"", 0
        assert spool.size == len(content) - read, which
        assert 0 <= budget.disk_used <= budget.disk_limit, which
        # What finds no place in a file that is full, or used in a circle, stays in memory.
        if keep and spool.disk_error is None:
            assert budget.memory_used <= min(budget.memory_limit, memory_limit), which
    assert read_all(spool) == content[read:], which
    spool.close()


def test_spilling_keeps_clear_of_what_the_file_holds(budget: SpoolBudget, tmp_path: Path) -> None:
    """The first bytes are in memory and the next in the file, which is used in a circle."""
    spool = Spool(budget, 100, str(tmp_path), file_limit=150)
    pieces = [bytes([letter]) * 100 for letter in b"abcd"]
    for piece in pieces[:2]:
        spool.append(piece)
    spool.spill(0)
    for piece in pieces[2:]:
        spool.append(piece)
    assert read_all(spool) == b"".join(pieces)
    spool.close()


def test_appending_nothing_does_not_look_like_the_end(budget: SpoolBudget, tmp_path: Path) -> None:
    spool = Spool(budget, 100, str(tmp_path))
    spool.append(b"")
    spool.append(b"a" * 200)
    spool.append(b"")
    spool.append(b"b")
    assert read_all(spool) == b"a" * 200 + b"b"
    spool.close()


# ---- Memory and file ---------------------------------------------------------------------------------


def test_small_content_stays_in_memory_and_opens_no_file(budget: SpoolBudget, tmp_path: Path) -> None:
    open_files = count_open_files()
    spool = Spool(budget, 1000, str(tmp_path))
    spool.append(b"x" * 1000)
    assert budget.memory_used == 1000
    assert count_open_files() == open_files
    spool.close()


def test_content_beyond_the_mark_goes_to_a_file_that_close_removes(
    budget: SpoolBudget, tmp_path: Path
) -> None:
    open_files = count_open_files()
    spool = Spool(budget, 1000, str(tmp_path))
    spool.append(b"x" * 1001)
    assert budget.memory_used <= 1000
    assert count_open_files() == open_files + 1
    spool.close()
    assert count_open_files() == open_files
    assert os.listdir(tmp_path) == []


def test_beyond_the_budget_every_spool_goes_to_its_file_at_once(tmp_path: Path) -> None:
    budget = SpoolBudget(100)
    first, second = Spool(budget, 80, str(tmp_path)), Spool(budget, 80, str(tmp_path))
    first.append(b"a" * 80)
    second.append(b"b" * 80)
    assert budget.memory_used <= 100
    assert read_all(first) == b"a" * 80
    assert read_all(second) == b"b" * 80
    first.close()
    second.close()
    assert budget.memory_used == 0


def test_memory_goes_back_to_the_budget_as_it_is_read(budget: SpoolBudget) -> None:
    spool = Spool(budget, 1000, None)
    spool.append(b"x" * 900)
    read_all(spool)
    assert budget.memory_used == 0
    spool.append(b"y" * 900)
    assert read_all(spool) == b"y" * 900
    spool.close()


def test_memory_does_not_grow_with_the_content(tmp_path: Path) -> None:
    spool = Spool(SpoolBudget(MIB), 64 * 1024, str(tmp_path))
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
def test_file_starts_over_when_everything_has_been_read(budget: SpoolBudget, tmp_path: Path) -> None:
    """A long stream whose reader keeps up must not fill the disk with what has been read."""
    spool = Spool(budget, 0, str(tmp_path))
    for _ in range(20):
        spool.append(b"x" * (SMALL_FILE // 4))
        assert len(read_all(spool, SMALL_FILE)) == SMALL_FILE // 4
    spool.close()


@small_files()
def test_file_is_used_in_a_circle_and_does_not_hold_what_was_read(
    budget: SpoolBudget, tmp_path: Path
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
    assert (spool.disk_error, budget.memory_used) == (None, 0)
    assert read + read_all(spool) == sent
    spool.close()


def test_disk_budget_counts_the_file_as_long_as_it_has_been(tmp_path: Path) -> None:
    budget = SpoolBudget(0)
    spool = Spool(budget, 0, str(tmp_path), file_limit=200)
    for size in (100, 100):
        spool.append(b"x" * size)
    spool.advance(100)
    spool.append(b"y" * 50)  # goes where the first hundred have been
    assert budget.disk_used == 200
    assert len(read_all(spool)) == 150
    assert budget.disk_used == 0
    spool.append(b"z" * 10)
    assert budget.disk_used == 10
    spool.close()
    assert (budget.disk_used, budget.memory_used, budget.files) == (0, 0, 0)


def test_disk_budget_bounds_all_spools_together_as_a_full_disk_does(tmp_path: Path) -> None:
    budget = SpoolBudget(0, 150)
    first, second = Spool(budget, 0, str(tmp_path)), Spool(budget, 0, str(tmp_path))
    first.append(b"a" * 100)
    second.append(b"b" * 100)
    assert (first.disk_error, budget.disk_used, budget.files) == (None, 100, 1)
    assert second.disk_error is not None and second.disk_error.strerror == "the disk budget is used up"
    assert (read_all(first), read_all(second)) == (b"a" * 100, b"b" * 100)
    second.append(b"c" * 100)
    assert (second.disk_error, budget.disk_used, budget.memory_used) == (None, 100, 0)
    second.close()


# ---- Keeping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 7, 1000])
def test_kept_content_can_be_read_again_from_the_start(budget: SpoolBudget, memory_limit: int) -> None:
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
    assert budget.memory_used == 0


# ---- Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 1000])
def test_close_may_come_twice_and_gives_back_once(budget: SpoolBudget, memory_limit: int) -> None:
    budget.take_memory(10)
    spool = Spool(budget, memory_limit, None)
    spool.append(b"x" * 500)
    spool.close()
    spool.close()
    assert budget.memory_used == 10


def test_unused_spool_can_be_closed(budget: SpoolBudget) -> None:
    open_files = count_open_files()
    Spool(budget, 0, None).close()
    assert count_open_files() == open_files


@small_files()
def test_full_disk_is_told_and_loses_nothing(budget: SpoolBudget, tmp_path: Path) -> None:
    open_files = count_open_files()
    spool = Spool(budget, 1000, str(tmp_path))
    data = random.Random(1).randbytes(SMALL_FILE * 3 // 2)
    for start in range(0, len(data), 8192):
        spool.append(data[start : start + 8192])
    assert isinstance(spool.disk_error, OSError)
    assert spool.is_over(2 * SMALL_FILE)
    assert read_all(spool, 65536) == data
    spool.close()
    assert (budget.memory_used, count_open_files(), os.listdir(tmp_path)) == (0, open_files, [])


def test_missing_directory_is_told_when_the_file_is_needed(budget: SpoolBudget, tmp_path: Path) -> None:
    spool = Spool(budget, 10, str(tmp_path / "missing"))
    spool.append(b"x" * 10)
    assert spool.disk_error is None
    spool.append(b"y")
    assert isinstance(spool.disk_error, FileNotFoundError)
    assert read_all(spool) == b"x" * 10 + b"y"
    spool.close()
    assert budget.memory_used == 0


def test_spool_is_over_a_limit_by_what_is_unread(budget: SpoolBudget, tmp_path: Path) -> None:
    spool = Spool(budget, 100, str(tmp_path))
    spool.append(b"x" * 100)
    assert not spool.is_over(100)
    spool.append(b"x" * 100)
    assert spool.is_over(100)
    spool.advance(len(spool.peek(100)))
    assert not spool.is_over(100)
    spool.close()
