"""What an idle consumer costs the hub: memory, and CPU time while nothing happens, in the clear and over TLS.

    python3 bench/idle.py [--consumers 5000]

Needs ``openssl``, and a limit of open files above twice the consumers.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time

from cost import HERE, cpu_seconds, free_port, make_certificate, wait_for_port


def resident_kib(pid: int) -> int:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def measure(consumers: int, certificate: str) -> None:
    port = free_port()
    command = [
        sys.executable,
        str(HERE.parent / "pothead.py"),
        "--main-port",
        str(port),
        "--worker-port",
        "0",
    ]
    command += ["--admin-port", "off", "--keep-alive", "1h"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        command += ["--certfile", certificate, "--tls", "main"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as hub:
        wait_for_port(port)
        before = resident_kib(hub.pid)
        idle = []
        for _ in range(consumers):
            sock = socket.create_connection(("127.0.0.1", port))
            idle.append(context.wrap_socket(sock) if certificate else sock)
        handshake_us = cpu_seconds(hub.pid) / consumers * 1e6
        time.sleep(15)  # the deadlines of the handshakes pass
        memory_kib = (resident_kib(hub.pid) - before) / consumers
        cpu = cpu_seconds(hub.pid)
        time.sleep(20)
        share = (cpu_seconds(hub.pid) - cpu) / 20
        kind = "over TLS" if certificate else "in the clear"
        costs = f"{memory_kib:.1f} KiB each, {handshake_us:.0f} us of CPU to connect, idle {share:.2%}"
        print(f"{consumers} {kind}: {costs}")
        hub.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--consumers", type=int, default=5000)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory:
        for certificate in ("", make_certificate(directory)):
            measure(args.consumers, certificate)


if __name__ == "__main__":
    main()
