"""What hostile peers cost everybody else: consumers that send tiny chunks or more requests than they read
answers of, and workers that send interim responses without end, all at once against one hub.

Beside them, one person asks for /livez, one consumer has its requests answered by one good worker, and the
hub's memory and files are looked at.  Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "test")]

from wire import Address, HubProcess, Peer, hub_process, status_value  # noqa: E402

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
UPLOAD = b"PUT /tiny HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /many HTTP/1.1\r\nHost: a\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Attacker:
    """A connection that sends its bytes again and again, and is opened anew when it is closed."""

    def __init__(
        self, address: Address, opening: bytes, again: bytes, *, is_worker: bool = False, reads: bool = True
    ) -> None:
        self.address, self.opening, self.again = address, opening, again
        self.is_worker = is_worker  # it waits for a request
        self.reads = reads

    def connect(self, selector: selectors.BaseSelector) -> None:
        self.sock = socket.create_connection(self.address)
        self.sock.setblocking(False)
        self.left = memoryview(self.opening + self.again)
        selector.register(self.sock, READ if self.is_worker else self.events, self)

    @property
    def events(self) -> int:
        return (READ if self.reads else 0) | WRITE

    def on_events(self, events: int, selector: selectors.BaseSelector) -> None:
        try:
            if events & READ and not self.sock.recv(1 << 16):
                raise ConnectionResetError
            if events & WRITE:
                self.left = self.left[self.sock.send(self.left[: 1 << 16]) :] or memoryview(self.again)
            selector.modify(self.sock, self.events, self)
        except BlockingIOError:
            pass
        except OSError:
            selector.unregister(self.sock)
            self.sock.close()
            self.connect(selector)


def attack(main: Address, worker: Address, count: int, seconds: float) -> None:
    """Be all the hostile peers for so long."""
    attackers = [Attacker(main, UPLOAD, b"1\r\nx\r\n" * 20_000) for _ in range(count)]
    attackers += [Attacker(main, b"", GET * 10_000, reads=number % 2 == 0) for number in range(count)]
    attackers += [Attacker(worker, b"", INTERIM * 1000, is_worker=True) for _ in range(count)]
    with selectors.DefaultSelector() as selector:
        for attacker in attackers:
            attacker.connect(selector)
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            for key, events in selector.select(0.1):
                key.data.on_events(events, selector)


def serve(hub: HubProcess) -> None:
    """Be the good worker until the hub has gone."""
    with contextlib.suppress(AssertionError, OSError), Peer.connect(hub.worker) as slot:
        while True:
            slot.read_request()
            slot.send(OK)


def latencies(hub: HubProcess, ends_at: float) -> Iterator[float]:
    while time.monotonic() < ends_at:
        began = time.monotonic()
        with Peer.connect(hub.admin) as peer:
            peer.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert peer.read_response().status == 200
        yield time.monotonic() - began
        time.sleep(0.02)


def consume(hub: HubProcess, ends_at: float, statuses: collections.Counter[int]) -> None:
    while time.monotonic() < ends_at:
        with contextlib.suppress(OSError), Peer.connect(hub.main) as peer:
            peer.send(b"GET /good HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            while (status := peer.read_response().status) < 200:
                pass
            statuses[status] += 1
        time.sleep(0.01)


def spooled_bytes(pid: int) -> int:
    total = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "(deleted)" in os.readlink(fd):
                total += fd.stat().st_blocks * 512
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--count", type=int, default=40, help="hostile peers of each kind")
    parser.add_argument("--attack", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        main_address, worker_address = (("127.0.0.1", int(port)) for port in options.attack)
        attack(main_address, worker_address, options.count, options.seconds)
        return
    with hub_process("--max-queue", "20", "--queue-timeout", "2s") as hub:
        threading.Thread(target=serve, args=(hub,), daemon=True).start()
        command = [sys.executable, __file__, "--count", str(options.count), "--seconds", str(options.seconds)]
        attackers = subprocess.Popen([*command, "--attack", str(hub.main[1]), str(hub.worker[1])])
        ends_at = time.monotonic() + options.seconds
        statuses: collections.Counter[int] = collections.Counter()
        consumer = threading.Thread(target=consume, args=(hub, ends_at, statuses))
        consumer.start()
        spooled, waits = 0, []
        for wait in latencies(hub, ends_at):
            waits.append(wait)
            spooled = max(spooled, spooled_bytes(hub.pid))
        consumer.join()
        attackers.wait()
        print(
            f"/livez: median {statistics.median(waits) * 1000:.1f} ms, worst {max(waits) * 1000:.1f} ms"
            f" of {len(waits)}; requests of a consumer: {dict(statuses)};"
            f" memory at most {status_value(hub.pid, 'VmHWM:') >> 10} MiB, files {spooled >> 20} MiB"
        )


if __name__ == "__main__":
    main()
