"""A hub inside the process of the tests, which turn it by hand, under a clock that they move."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pothead
import wire
from pothead import Hub, Options, Outcome, State, Stream
from wire import Peer


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A hub on free ports that turns only when told to, and the peers that a test connects to it."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[str] = []
        ports: dict[str, Any] = {"main_port": 0, "worker_port": 0, "admin_port": None}
        self.hub = Hub(Options(**{**ports, **options}), self.lines.append)
        self.clock = self.hub.loop.clock = Clock()
        self.hub.loop.now = self.clock()
        self._peers: list[Peer] = []

    def turn(self) -> None:
        """Let the hub deal with what has happened, without sleeping."""
        self.hub.loop.call_from_thread(lambda: None)
        self.hub.loop.turn()

    def until(self, holds: Callable[[], object]) -> None:
        ends_at = time.monotonic() + wire.DEADLINE_S
        while not holds():
            assert time.monotonic() < ends_at, self.hub.stats()
            self.turn()

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.turn()
        self.turn()  # what a timer did may have left something to do

    def slot(self) -> Peer:
        count = len(self.hub.slots)
        peer = self.connect(self.hub.addresses["workers"])
        self.until(lambda: len(self.hub.slots) == count + 1)
        return peer

    def consumer(self, data: bytes = b"") -> Peer:
        """Connect a consumer, and let the hub begin with its first request."""
        count = len(self.hub.exchanges)
        peer = self.connect(self.hub.addresses["consumers"])
        peer.send(data)
        if data:
            self.until(lambda: len(self.hub.exchanges) == count + 1)
        return peer

    def exchange(self, path: bytes) -> pothead.Exchange:
        (found,) = [each for each in self.hub.exchanges if each.head.path == path]
        return found

    def response(self, consumer: Peer) -> wire.Response:
        self.until(lambda: consumer.has_bytes())
        return consumer.read_response()

    def is_closed(self, peer: Peer) -> bool:
        """Whether the hub has closed the connection, with nothing left to read."""
        peer.sock.setblocking(False)
        try:
            return peer.sock.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        finally:
            peer.sock.settimeout(wire.DEADLINE_S)

    def consumers(self) -> list[pothead.Consumer]:
        roles = [each.role for each in self.hub.loop.watched if isinstance(each, Stream) and not each.closed]
        return [each for each in roles if isinstance(each, pothead.Consumer)]

    def may_need_a_slot(self) -> set[pothead.Consumer]:
        """Return what the hub keeps in `needy`, by looking at everything."""
        unserved = (State.RECEIVING, State.QUEUED)
        return {each for each in self.consumers() if not each.exchange or each.exchange.state in unserved}

    def close(self) -> None:
        assert self.hub.needy == self.may_need_a_slot()
        for exchange in list(self.hub.exchanges):
            exchange.finish(Outcome.DRAINING)
        self.hub.loop.close()
        for peer in self._peers:
            peer.close()

    def connect(self, address: str | None) -> Peer:
        assert address
        host, _, port = address.rpartition(":")
        peer = Peer.connect((host, int(port)))
        self._peers.append(peer)
        return peer
