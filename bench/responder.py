"""A worker, or a server, that does nothing: it answers each request from memory.

    python3 bench/responder.py connect HOST:PORT SLOTS     as POTHEAD's workers do
    python3 bench/responder.py listen  HOST:PORT           as HAProxy's servers do
    ... tls [CERTIFICATE]                                  over TLS, a worker with the handshake of PTTH

``GET /large`` is answered with 16 MiB, ``GET /sleep/50.5`` with two bytes after 50.5 ms, everything else
with two bytes at once.  It stops with its parent.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
import time

SMALL = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
LARGE_BYTES = 16 * 1024 * 1024
LARGE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % LARGE_BYTES
LARGE_BODY = bytes(LARGE_BYTES)
HANDSHAKE = (
    b"GET /ptth HTTP/1.1\r\nHost: hub\r\nConnection: upgrade\r\nUpgrade: ptth\r\nALPN: http%2F1.1\r\n\r\n"
)


def serve(sock: socket.socket, context: ssl.SSLContext | None, *, is_worker: bool) -> None:
    """Answers requests without a body until the peer hangs up."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pending = b""
    if context is not None:
        sock = context.wrap_socket(sock, server_side=not is_worker)
        if is_worker:
            sock.sendall(HANDSHAKE)
            while not pending.endswith(b"\r\n\r\n"):
                pending += sock.recv(1)
            pending = b""
    with sock:
        while data := sock.recv(65536):
            pending += data
            while (end := pending.find(b"\r\n\r\n")) >= 0:
                head, pending = pending[:end], pending[end + 4 :]
                if head.startswith(b"GET /large"):
                    sock.sendall(LARGE_HEAD)
                    sock.sendall(LARGE_BODY)
                else:
                    if head.startswith(b"GET /sleep/"):
                        time.sleep(float(head.split(b" ", 2)[1][len(b"/sleep/") :]) / 1000)
                    sock.sendall(SMALL)


def serve_quietly(sock: socket.socket, context: ssl.SSLContext | None, *, is_worker: bool) -> None:
    with contextlib.suppress(OSError):  # the peer has left in the middle of a response
        serve(sock, context, is_worker=is_worker)


def connect(address: tuple[str, int], context: ssl.SSLContext | None) -> None:
    """Offers one slot, and again whenever its connection has ended."""
    with contextlib.suppress(ConnectionRefusedError):  # the hub is gone: the measurement is over
        while True:
            serve_quietly(socket.create_connection(address), context, is_worker=True)


def main() -> None:
    mode, address = sys.argv[1:3]
    context = None
    if "tls" in sys.argv:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if mode == "listen" else ssl.PROTOCOL_TLS_CLIENT)
        if mode == "listen":
            context.load_cert_chain(sys.argv[-1])
        else:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is to be kept secret
    host, _, port = address.rpartition(":")
    if mode == "connect":
        for _ in range(int(sys.argv[3])):
            threading.Thread(target=connect, args=((host, int(port)), context), daemon=True).start()
    else:
        listener = socket.create_server((host, int(port)), backlog=1024)
        threading.Thread(target=accept, args=(listener, context), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()  # until the parent is gone


def accept(listener: socket.socket, context: ssl.SSLContext | None) -> None:
    while True:
        sock, _ = listener.accept()
        arguments, keywords = (sock, context), {"is_worker": False}
        threading.Thread(target=serve_quietly, args=arguments, kwargs=keywords, daemon=True).start()


if __name__ == "__main__":
    main()
