"""Trouble for several hubs and their workers, each in a network namespace of its own. As root, on Linux.

    python3 bench/hubs_soak.py [--seconds 600] [--hubs 3] [--workers 2] [--slots 4] [--seed 1]

Consumers ask all hubs, most of them the first one. Every second or so a hub is killed (SIGKILL), stopped for
a while (SIGSTOP), drained and started anew, or cut off the network; or a worker is killed or cut off. Workers
speak TLS to all hubs, and write down in a ledger what they begin and end. Counted is what failed:

    hub      its hub was not well at the time, or what it was said in was lost with it
    worker   its worker was killed or cut off meanwhile
    LOST     neither: there must be none of these

and from the ledger TWICE, a POST that has been begun more than once, and BOTH, a slot that had two at the
same time. It exits with 1 if there is anything in capital letters.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.client
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
NETWORK = "10.213.0."
MAIN, PTTH = 4000, 4041
LIMIT_S = 60.0  # for one answer
TOKEN = "soak"
EVENTS = ["kill", "stop", "drain", "cut", "kill a worker", "cut a worker"]
APP = """
import os, threading, time

def note(word, path):
    line = f"{word} {path} {os.getpid()}-{threading.get_ident()} {time.monotonic():.3f}\\n"
    fd = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)

def app(environ, start_response):
    path = environ["REQUEST_METHOD"] + environ["PATH_INFO"]
    body = environ["wsgi.input"].read()
    note("begin", path)
    time.sleep(float(environ["QUERY_STRING"]))
    note("end", path)
    start_response("200 OK", [])
    return [b"%d %s" % (len(body), environ["PATH_INFO"].encode())]
"""


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@dataclasses.dataclass
class Trouble:
    """A time at which something was not well; without an end it still is not."""

    begins: float
    ends: float = float("inf")


class Node:
    """A hub or a worker behind its own cable. It may be harmed by one thread at a time."""

    def __init__(self, name: str, number: int, command: list[str], directory: str) -> None:
        self.name = f"pothead-{name}"
        self.address = f"{NETWORK}{number}"
        self.troubles: list[Trouble] = []
        self._cable = f"cable{number}"
        self._command = ["ip", "netns", "exec", self.name, *command]
        self._directory = directory
        run(f"ip netns add {self.name}")
        run(f"ip link add {self._cable} type veth peer name eth0 netns {self.name}")
        run(f"ip link set {self._cable} master switch up")
        run(f"ip -n {self.name} address add {self.address}/24 dev eth0")
        run(f"ip -n {self.name} link set eth0 up")
        run(f"ip -n {self.name} link set lo up")

    def start(self) -> None:
        with open(f"{self._directory}/{self.name}.log", "a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._directory)

    @contextlib.contextmanager
    def trouble(self) -> Iterator[None]:
        self.troubles.append(Trouble(time.monotonic()))
        yield
        self.troubles[-1].ends = time.monotonic()

    def was_well(self, since: float, until: float) -> bool:
        return not any(each.begins <= until and each.ends >= since for each in self.troubles)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop_for(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def drain(self) -> None:
        self.process.terminate()
        self.process.wait(LIMIT_S)

    def cut_for(self, seconds: float) -> None:
        run(f"ip link set {self._cable} nomaster")
        time.sleep(seconds)
        run(f"ip link set {self._cable} master switch")


class Soak:
    def __init__(self, args: argparse.Namespace, directory: str) -> None:
        self._args = args
        self._chance = random.Random(args.seed)
        self._ledger = pathlib.Path(directory) / "ledger"
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self.outcomes = collections.Counter({"answered": 0, "hub": 0, "worker": 0, "LOST": 0})
        self.events: collections.Counter[str] = collections.Counter()
        self._lost: dict[str, str] = {}  # what is known of each
        self.longest_s = 0.0  # where its hub and the workers were well
        hub = [sys.executable, str(ROOT / "pothead.py"), "--main-host", "0.0.0.0", "--main-port", str(MAIN)]
        hub += ["--worker-port", "0", "--admin-port", "off", "--ptth-host", "0.0.0.0", "--ptth-port"]
        hub += [str(PTTH), "--certfile", "hub.pem", "--keyfile", "hub.key", "--workers-file", "workers"]
        self.hubs = [Node(f"hub{number}", 10 + number, hub, directory) for number in range(args.hubs)]
        worker = [sys.executable, str(ROOT / "pothead_worker.py"), "--cafile", "hub.pem"]
        worker += ["--token-file", "token", "--workers", str(args.slots), "--connect"]
        worker += [",".join(f"https://{each.address}:{PTTH}" for each in self.hubs), "noting:app"]
        self.workers = [Node(f"worker{each}", 100 + each, worker, directory) for each in range(args.workers)]

    def run(self) -> None:
        for node in [*self.hubs, *self.workers]:
            with node.trouble():
                node.start()
        for hub in self.hubs:
            self._wait_for(hub)
        threads = [threading.Thread(target=self._consume, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        ends_at = time.monotonic() + self._args.seconds
        while time.monotonic() < ends_at:
            time.sleep(self._chance.uniform(0.3, 1.5))
            self._harm()
        time.sleep(2)
        self._is_over.set()
        for thread in threads:
            thread.join()
        for node in [*self.workers, *self.hubs]:
            node.drain()

    def _harm(self) -> None:
        """Do something bad to somebody, and make it good again."""
        what = self._chance.choice(self._args.events)
        node = self._chance.choice(self.workers if "worker" in what else self.hubs)
        seconds = self._chance.choice([self._chance.uniform(0, 1), self._chance.uniform(1, 8)])
        self.events[what] += 1
        with node.trouble():
            if "cut" in what:
                node.cut_for(seconds)
                time.sleep(2)  # until TCP has sent again what was lost
            elif what == "stop":
                node.stop_for(seconds)
            elif what == "drain":
                node.drain()
                node.start()
            else:
                node.kill()
                node.start()
            if what in ("drain", "kill"):
                self._wait_for(node)

    def _wait_for(self, hub: Node) -> None:
        while hub.process.poll() is None:
            with contextlib.suppress(OSError):
                http.client.HTTPConnection(hub.address, MAIN, timeout=5).connect()
                return
            time.sleep(0.02)
        raise RuntimeError(f"{hub.name} does not start")

    def _consume(self, number: int) -> None:
        chance = random.Random(self._args.seed * 1000 + number)
        count = 0
        while not self._is_over.is_set():
            hub = self.hubs[0] if chance.random() < 0.6 else chance.choice(self.hubs)
            method, size = chance.choice(["GET", "POST", "POST"]), chance.choice([0, 10, 1000, 100_000])
            count += 1
            path = f"/{number}-{count}"
            began = time.monotonic()
            status, complaint = self._ask(hub, method, path, size, chance.uniform(0.005, 0.06))
            self._account(hub, f"{method}{path}", began, status, complaint)
            if status != 200:
                time.sleep(0.05)

    def _ask(self, hub: Node, method: str, path: str, size: int, service_s: float) -> tuple[int, str]:
        connection = http.client.HTTPConnection(hub.address, MAIN, timeout=LIMIT_S)
        body = b"b" * size if method == "POST" else b""
        try:
            connection.request(method, f"{path}?{service_s:.3f}", body)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as exc:
            return 0, repr(exc)
        finally:
            connection.close()
        is_right = response.status != 200 or text == f"{len(body)} {path}"
        return (response.status if is_right else 0), text

    def _account(self, hub: Node, name: str, began: float, status: int, complaint: str) -> None:
        now = time.monotonic()
        with self._lock:
            if all(node.was_well(began, now) for node in [hub, *self.workers]):
                self.longest_s = max(self.longest_s, now - began)
            if status == 200:
                self.outcomes["answered"] += 1
            elif not hub.was_well(began - 0.1, now):
                self.outcomes["hub"] += 1
            elif status == 502 and not all(each.was_well(began, now) for each in self.workers):
                self.outcomes["worker"] += 1
            else:
                self.outcomes["LOST"] += 1
                lasted = f"from {began:.2f} to {now:.2f}"
                self._lost[name] = f"LOST {name} at {hub.name} {lasted}: {status} {complaint}"

    def read_ledger(self) -> dict[str, int]:
        begun: collections.Counter[str] = collections.Counter()
        busy: dict[str, str] = {}
        both = 0
        for line in self._ledger.read_text().splitlines():
            word, path, slot, _ = line.split()
            if word == "end":
                busy.pop(slot, None)
                continue
            begun[path] += 1
            both += slot in busy
            busy[slot] = path
        again = [path for path, times in begun.items() if times > 1]
        posts = [path for path in again if path.startswith("POST")]
        for path in [*posts, *self._lost]:
            self._tell_of(path)
        found = {"begun": begun.total(), "GET again": len(again) - len(posts)}
        return {**found, "TWICE": len(posts), "BOTH": both}

    def _tell_of(self, path: str) -> None:
        """Print what the ledger and the logs know of it."""
        print(self._lost.get(path, f"TWICE {path}"))
        for log in [self._ledger, *sorted(self._ledger.parent.glob("*.log"))]:
            name = path if log == self._ledger else path[path.index("/") :]
            lines = [line for line in log.read_text().splitlines() if re.search(rf"{name}\b", line)]
            print(*[f"{log.name}: {line}" for line in lines], sep="\n", flush=True)


def prepare(directory: str) -> None:
    os.chdir(directory)
    os.environ["LEDGER"] = f"{directory}/ledger"
    pathlib.Path("noting.py").write_text(APP)
    pathlib.Path("token").write_text(TOKEN)
    pathlib.Path("workers").write_text(f"soak token:{TOKEN}\n")
    names = ",".join(f"IP:{NETWORK}{10 + number}" for number in range(10))
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=hub -keyout hub.key -out hub.pem"
    command = [*request.split(), "-addext", f"subjectAltName={names}"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    run("ip link add switch type bridge")
    run(f"ip address add {NETWORK}1/24 dev switch")
    run("ip link set switch up")
    run("ip link set lo up")


def tell(what: str, counts: Mapping[str, int]) -> None:
    print(what, ", ".join(f"{name} {count}" for name, count in counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--hubs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=EVENTS, metavar="EVENT")
    args = parser.parse_args()
    if "POTHEAD_SOAK" not in os.environ:  # once more, apart from the network of this machine
        os.environ["POTHEAD_SOAK"] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    nodes: list[Node] = []
    with tempfile.TemporaryDirectory() as directory:
        prepare(directory)
        soak = Soak(args, directory)
        nodes = [*soak.hubs, *soak.workers]
        try:
            soak.run()
            found = {**soak.outcomes, **soak.read_ledger()}
            tell("events", soak.events)
            tell("requests", found)
            print(f"the longest wait while all was well: {soak.longest_s:.2f} s")
            for log in sorted(pathlib.Path(directory).glob("*.log")):
                text = log.read_text()
                if "Traceback" in text:
                    print(f"TRACEBACK in {log.name}:", text[text.index("Traceback") - 500 :][:3000])
                    found["TRACEBACK"] = 1
        finally:
            for node in nodes:
                with contextlib.suppress(AttributeError):
                    node.kill()
                run(f"ip netns delete {node.name}")
    return 1 if any(count for name, count in found.items() if name.isupper()) else 0


if __name__ == "__main__":
    sys.exit(main())
