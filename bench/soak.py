"""Hours of trouble in minutes: random requests through a hub whose workers are killed all the time.

    python3 bench/soak.py [--seconds 600] [--consumers 40] [--workers 4] [--seed 1]

Consumers send random methods, sizes and framings on kept and fresh connections, and some leave in the
middle.  Every request carries a token in its path and a random body; the worker program writes the token
to a ledger when it starts, and answers with the token and the hash of what it received, followed by
filling.  Workers are killed with SIGKILL and started again at random.  Each outcome is accounted for:

    answered     the right token and the right hash, whole
    refused      an error of the hub, with its code in the log
    cut          a response that visibly broke off
    left         the consumer itself went away

and what must never happen is counted: **lost** (no answer in time), **swapped** (somebody else's answer),
**truncated** (a short answer that looked whole), **duplicated** (run twice without a right to).  Loopback
only, bounded by its options; exits with 1 if anything of that kind was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import hashlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
IDEMPOTENT = ("GET", "PUT", "DELETE")
LIMIT_S = 60.0  # for one answer; the queue's own limit is far below
APP = """
import hashlib, os, random, time
LEDGER = os.open(os.environ["SOAK_LEDGER"], os.O_WRONLY | os.O_APPEND)

def app(environ, start_response):
    token = environ["PATH_INFO"].lstrip("/")
    os.write(LEDGER, token.encode() + b"\\n")
    digest = hashlib.sha256()
    while data := environ["wsgi.input"].read(65536):
        digest.update(data)
    chance = random.Random(token)
    time.sleep(chance.choice((0, 0, 0.002, 0.02)))
    answer = f"{token} {digest.hexdigest()} ".encode()
    filling = chance.choice((0, 10, 5000, 300_000))
    fields = [("Content-Type", "text/plain")]
    if chance.random() < 0.5:
        fields.append(("Content-Length", str(len(answer) + filling)))
    start_response("200 OK", fields)
    yield answer
    for start in range(0, filling, 50_000):
        yield b"x" * min(50_000, filling - start)
"""


def filling_of(token: str) -> int:
    """Returns how much filling the worker program sends for this token."""
    chance = random.Random(token)
    chance.choice((0, 0, 0.002, 0.02))
    return chance.choice((0, 10, 5000, 300_000))


class Broken(Exception):
    """The connection ended in the middle of a response."""


class Soak:
    """The consumers, and what became of their requests."""

    def __init__(self, port: int, seconds: float, seed: int) -> None:
        self.port = port
        self.ends_at = time.monotonic() + seconds
        self.seed = seed
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.methods: dict[str, str] = {}  # of all tokens sent

    async def consumer(self, number: int) -> None:
        """Sends one request after the other."""
        chance = random.Random(self.seed * 1000 + number)
        connection = None
        count = 0
        while time.monotonic() < self.ends_at:
            count += 1
            token = f"{number}-{count}"
            if connection is None:
                connection = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = connection
            keep = False
            try:
                exchange = self.exchange(reader, writer, token, chance)
                outcome, keep = await asyncio.wait_for(exchange, LIMIT_S)
            except (Broken, ConnectionError, asyncio.IncompleteReadError):
                outcome = "cut"
            except asyncio.TimeoutError:
                outcome = "lost"
                self.wrong.append(f"lost: {token}")
            self.outcomes[outcome] += 1
            if not keep:
                writer.close()
                connection = None
        if connection is not None:
            connection[1].close()

    async def exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, chance: random.Random
    ) -> tuple[str, bool]:
        """Sends a request and checks the answer; returns the outcome and whether the connection lives."""
        method = chance.choice(("GET", "GET", "POST", "PUT", "DELETE"))
        self.methods[token] = method
        size = 0 if method in ("GET", "DELETE") else chance.choice((0, 1, 1000, 70_000, 400_000))
        body = chance.randbytes(size)
        close = chance.random() < 0.3
        head = f"{method} /{token} HTTP/1.1\r\nHost: soak\r\nX-Request-Id: {token}\r\n"
        if close:
            head += "Connection: close\r\n"
        leaves = chance.random() < 0.05
        if method in ("POST", "PUT") and chance.random() < 0.5:
            message = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + in_chunks(body, chance)
        else:
            message = head.encode() + b"Content-Length: %d\r\n\r\n" % size + body
        if leaves:
            writer.write(message[: chance.randrange(len(message)) + 1])
            await asyncio.sleep(chance.choice((0, 0.005)))
            return "left", False
        writer.write(message)
        status, fields, answer = await read_response(reader)
        if status != 200:
            return "refused", fields.get("connection") != "close"
        digest = hashlib.sha256(body).hexdigest()
        wanted = f"{token} {digest} ".encode()
        if not answer.startswith(wanted):
            self.wrong.append(f"swapped: {token} got {answer[:80]!r}")
            return "swapped", False
        if len(answer) != len(wanted) + filling_of(token):
            self.wrong.append(f"truncated: {token}: {len(answer)} bytes")
            return "truncated", False
        return "answered", not close and fields.get("connection") != "close"


def in_chunks(body: bytes, chance: random.Random) -> bytes:
    pieces = []
    while body:
        size = chance.randrange(len(body)) + 1
        pieces.append(b"%x\r\n%b\r\n" % (size, body[:size]))
        body = body[size:]
    return b"".join(pieces) + b"0\r\n\r\n"


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Reads one response, strictly by its framing; raises ``Broken`` if it ends early."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    status = int(lines[0].split(" ")[1])
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    if "content-length" in fields:
        return status, fields, await reader.readexactly(int(fields["content-length"]))
    if fields.get("transfer-encoding") != "chunked":
        raise Broken(f"no framing: {head!r}")
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise Broken("bad chunk")
    if await reader.readexactly(2) != b"\r\n":
        raise Broken("bad end")
    return status, fields, body


class Workers:
    """Worker processes that are killed and started again."""

    def __init__(self, count: int, address: str, directory: str, chance: random.Random) -> None:
        self.kills = 0
        self._chance = chance
        self._environment = {**os.environ, "SOAK_LEDGER": f"{directory}/ledger", "PYTHONPATH": directory}
        self._command = [sys.executable, str(ROOT / "pothead_worker.py"), "--connect", address]
        self._command += ["--workers", "2", "--log-level", "error", "soak_app:app"]
        self.processes = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=self._environment, stderr=subprocess.DEVNULL)

    async def torment(self, ends_at: float) -> None:
        """Kills one now and then; the last seconds are calm, so that everything can end."""
        while time.monotonic() < ends_at - 2:
            await asyncio.sleep(self._chance.uniform(0.1, 0.6))
            index = self._chance.randrange(len(self.processes))
            self.processes[index].kill()
            self.processes[index].wait()
            self.kills += 1
            self.processes[index] = self._start()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def at_rest(admin: str, slots: int) -> dict[str, Any]:
    """Returns /stats once all slots wait and nobody else is there, or after ten seconds."""
    ends_at = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(f"http://{admin}/stats") as page:
            stats: dict[str, Any] = json.load(page)
        if stats["slots"] == {"idle": slots, "busy": 0} or time.monotonic() > ends_at:
            return stats
        time.sleep(0.05)


def state_of(pid: int) -> str:
    """Returns resident memory and open descriptors of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+)", status)
    assert resident is not None
    return f"{int(resident[1]) / 1024:.1f} MiB, {len(os.listdir(f'/proc/{pid}/fd'))} descriptors"


def duplicated(ledger: pathlib.Path, requeued: set[str], methods: dict[str, str]) -> list[str]:
    """Returns the tokens that were started more often than the hub had a right to."""
    starts = collections.Counter(ledger.read_text().split())
    return [
        f"duplicated: {methods[token]} {token}, {count} times"
        for token, count in starts.items()
        if count > (2 if methods.get(token) in IDEMPOTENT and token in requeued else 1)
    ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--consumers", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(f"{directory}/soak_app.py").write_text(APP)
        ledger = pathlib.Path(f"{directory}/ledger")
        ledger.touch()
        log_path = pathlib.Path(f"{directory}/log")
        command = [sys.executable, str(ROOT / "pothead.py"), "--log-format", "json"]
        command += ["--main-port", "0", "--worker-port", "0", "--admin-port", "0"]
        with log_path.open("w") as log, open(f"{directory}/err", "w") as err:
            hub = subprocess.Popen(command, stdout=log, stderr=err)
        while log_path.read_text().count("listening") < 3:
            time.sleep(0.01)
        ready = [json.loads(line) for line in log_path.read_text().splitlines()[:3]]
        addresses = {entry["listening"]: entry["address"] for entry in ready}
        workers = Workers(args.workers, addresses["workers"], directory, random.Random(args.seed))
        soak = Soak(int(addresses["consumers"].rpartition(":")[2]), args.seconds, args.seed)
        at_rest(addresses["admin"], 2 * args.workers)
        before = state_of(hub.pid)

        async def run() -> None:
            consumers = [soak.consumer(number) for number in range(args.consumers)]
            await asyncio.gather(workers.torment(soak.ends_at), *consumers)

        try:
            asyncio.run(run())
            stats = at_rest(addresses["admin"], 2 * args.workers)
            after = state_of(hub.pid)
        finally:
            workers.end()
            hub.terminate()
            status = hub.wait()
        entries = [json.loads(line) for line in log_path.read_text().splitlines()[3:]]
        requeued = {entry["id"] for entry in entries if entry["attempts"] > 1}
        soak.wrong += duplicated(ledger, requeued, soak.methods)
        codes = collections.Counter(entry["code"] for entry in entries)
        errors = pathlib.Path(f"{directory}/err").read_text()
    refused = sum(codes[code] for code in ("WL", "QF", "QT", "DR", "WG", "WT", "HB", "RQ"))
    requests = sum(soak.outcomes.values())
    print(f"requests {requests}, workers killed {workers.kills}, requeued {stats['requeues']}")
    print("outcomes " + ", ".join(f"{name} {count}" for name, count in sorted(soak.outcomes.items())))
    print("codes " + ", ".join(f"{name} {count}" for name, count in sorted(codes.items())))
    print(f"hub at the start {before}; at the end {after}; exit status {status}")
    cut = codes["WC"] + codes["CR"] + codes["CQ"]
    if soak.outcomes["refused"] > refused or soak.outcomes["cut"] > cut:
        soak.wrong.append("failures without a code in the log")
    if "Traceback" in errors:
        soak.wrong.append(errors)
    kinds = collections.Counter(line.partition(":")[0] for line in soak.wrong)
    print(", ".join(f"{kind} {kinds[kind]}" for kind in ("lost", "swapped", "truncated", "duplicated")))
    print("\n".join(soak.wrong[:20]) or "nothing lost, nothing swapped, nothing passed off as whole")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
