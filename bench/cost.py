"""What a request costs in CPU time: the hub and HAProxy, side by side, on the same machine.

    python3 bench/cost.py [--seconds 4] [--rounds 3] [--slots 8] [--consumers 32] [--tls]

Needs ``haproxy`` and ``wrk``.  Both stand between the same load and the same idle responder
(bench/responder.py), on loopback, on kept connections; HAProxy runs one thread, ``mode http``, as many
connections to its server as the hub has slots, each in use by one request at a time.  The CPU time is
that of the hub's or HAProxy's process alone, user and system, from /proc, so that what else the machine
does hardly matters.  The rounds alternate, and the median is reported.  With ``--tls`` both speak TLS 1.3
to both sides (AES-128-GCM), and the hub without TLS runs beside them; that needs ``openssl``, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

HERE = pathlib.Path(__file__).resolve().parent
HAPROXY_CONFIG = """
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout queue 60s
    http-reuse always
listen main
    bind 127.0.0.1:{port}{bind}
{servers}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def process(*command: str, stdin: int | None = None) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def responder(*arguments: str) -> Iterator[None]:
    with process(sys.executable, str(HERE / "responder.py"), *arguments, stdin=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield


@contextlib.contextmanager
def hub(slots: int, log_path: str, certificate: str = "") -> Iterator[tuple[int, int]]:
    """Yields the port and the process id of a hub with waiting slots; it logs to a file."""
    main, workers = free_port(), free_port()
    arguments = ["--main-port", str(main), "--worker-port", str(workers), "--admin-port", "off"]
    if certificate:
        arguments[2:4] = ["--worker-port", "0", "--ptth-port", str(workers)]
        arguments += ["--certfile", certificate, "--tls", "main,ptth"]
    with open(log_path, "w") as log:
        child = subprocess.Popen([sys.executable, str(HERE.parent / "pothead.py"), *arguments], stdout=log)
    try:
        wait_for_port(workers)
        with responder("connect", f"127.0.0.1:{workers}", str(slots), *(["tls"] if certificate else [])):
            yield main, child.pid
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def haproxy(
    slots: int, config_path: str, certificate: str = "", *, servers: int = 1
) -> Iterator[tuple[int, int]]:
    """The same for HAProxy; its slots are the connections to one server, or one each to several."""
    port, responder_port = free_port(), free_port()
    lines = [
        f"    server responder{number} 127.0.0.1:{responder_port} maxconn {slots // servers}"
        + (" ssl verify none" if certificate else "")
        for number in range(servers)
    ]
    bind = f" ssl crt {certificate} ciphersuites TLS_AES_128_GCM_SHA256" if certificate else ""
    config = HAPROXY_CONFIG.format(port=port, bind=bind, servers="\n".join(lines))
    pathlib.Path(config_path).write_text(config)
    tls = ["tls", certificate] if certificate else []
    with (
        responder("listen", f"127.0.0.1:{responder_port}", *tls),
        process("haproxy", "-f", config_path) as child,
    ):
        wait_for_port(port)
        yield port, child.pid


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise SystemExit(f"nothing listens on port {port}")


def cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(
    port: int, pid: int, path: str, consumers: int, seconds: float, scheme: str = "http"
) -> tuple[float, float, float]:
    """Returns requests per second, CPU seconds a request and CPU seconds a MiB of response."""
    before = cpu_seconds(pid)
    command = ["wrk", "-t1", f"-c{consumers}", f"-d{seconds:g}s", f"{scheme}://127.0.0.1:{port}{path}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = cpu_seconds(pid) - before
    match = re.search(r"(\d+) requests in ([\d.]+)s, ([\d.]+)([KMG])B read", text)
    if match is None or "Non-2xx" in text:
        raise SystemExit(text)
    requests, elapsed = int(match[1]), float(match[2])
    mib = float(match[3]) * {"K": 1 / 1024, "M": 1, "G": 1024}[match[4]]
    return requests / elapsed, cpu / requests, cpu / mib


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--consumers", type=int, default=32)
    parser.add_argument("--tls", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        kinds = [("haproxy", haproxy, ""), ("hub", hub, "")]
        if args.tls:
            pem = make_certificate(directory)
            kinds = [("haproxy", haproxy, pem), ("hub", hub, pem), ("hub without TLS", hub, "")]
        small: dict[str, list[tuple[float, float, float]]] = {name: [] for name, _, _ in kinds}
        large: dict[str, list[tuple[float, float, float]]] = {name: [] for name, _, _ in kinds}
        for _ in range(args.rounds):
            for name, service, pem in kinds:
                scheme = "https" if pem else "http"
                with service(args.slots, f"{directory}/{name}", pem) as (port, pid):
                    small[name].append(load(port, pid, "/", args.consumers, args.seconds, scheme))
                    large[name].append(load(port, pid, "/large", 2, args.seconds, scheme))
    for what, results, column, unit in (("small", small, 1, "us/request"), ("large", large, 2, "us/MiB")):
        costs = {name: statistics.median(row[column] for row in rows) * 1e6 for name, rows in results.items()}
        rates = {name: statistics.median(row[0] for row in rows) for name, rows in results.items()}
        for name in [name for name in results if name != "hub"]:
            print(
                f"{what}: hub {costs['hub']:.1f} {unit} at {rates['hub']:.0f}/s, "
                f"{name} {costs[name]:.1f} {unit} at {rates[name]:.0f}/s, "
                f"cost ratio {costs['hub'] / costs[name]:.2f}, rate ratio {rates['hub'] / rates[name]:.2f}"
            )


def make_certificate(directory: str) -> str:
    """Returns a file with a certificate and its key."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
    files = [f"{directory}/{name}" for name in ("key.pem", "certificate.pem")]
    command = [*make.split(), "-keyout", files[0], "-out", files[1]]
    subprocess.run(command, check=True, capture_output=True)
    both = pathlib.Path(f"{directory}/both.pem")
    both.write_text("".join(pathlib.Path(file).read_text() for file in files))
    return str(both)


if __name__ == "__main__":
    main()
