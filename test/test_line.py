"""Who is next among several hubs: the worker's line against a model of the hubs, in random interleavings.

    python3 test/test_line.py 100000

tries so many. What HUBS and workers say arrives in order on each connection and in any order between them;
connections are cut anywhere, hubs die, hang and come back, slots end.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pothead_worker import Bell, BellState, Line, Waiting

INTERLEAVINGS = 4000
COMING, WAITING, SERVING, HELD, GONE = BellState

Message = tuple[object, ...]
END: Message = ("end",)  # who is gone has closed: what was sent before has come
CUT: Message = ("cut",)  # the cable is: both find out, and cannot know what the other has got


class Wire:
    """One connection, with what is under way on it, and what the hub takes it for."""

    def __init__(self, hub: Hub, bell: Bell[Hub]) -> None:
        self.hub = hub
        self.bell = bell
        self.to_hub: deque[Message] = deque()
        self.to_worker: deque[Message] = deque()
        self.state = "new"
        self.request: int | None = None
        self.is_delivered = False  # the request: TCP has acknowledged it

    def cut(self, chance: random.Random) -> None:
        """Lose what comes after any point in both directions."""
        for way in (self.to_hub, self.to_worker):
            for _ in range(chance.randint(0, len(way))):
                way.pop()
            way.append(CUT)


class Hub:
    """What a hub does with requests that have to be claimed. A request is its age, too."""

    def __init__(self, name: str, model: Model) -> None:
        self.name = name
        self.model = model
        self.queue: list[int] = []
        self.wires: list[Wire] = []  # in the order of their handshakes
        self.is_dead = self.is_hung = False

    def dispatch(self) -> None:
        while (
            self.queue
            and not self.is_hung
            and (parked := [wire for wire in self.wires if wire.state == "parked"])
        ):
            wire = self.model.chance.choice(parked)
            wire.request = self.queue.pop(0)
            wire.state, wire.is_delivered = "offered", False
            queue = self.queue
            behind = Waiting(len(queue), queue[0], queue[-1]) if queue else None
            wire.to_worker.append(("request", wire.request, behind))

    def put_back(self, wire: Wire) -> None:
        assert wire.request is not None
        self.queue = sorted([*self.queue, wire.request])
        wire.request = None

    def on_message(self, wire: Wire, message: Message) -> None:
        match wire.state, message:
            case ("new" | "held", ("handshake",)):
                wire.state = "parked"
                self.wires = [*[each for each in self.wires if each is not wire], wire]
                wire.to_worker.append(("agreed", bool(self.queue)))
            case ("offered", ("claim",)):
                wire.state = "running"
            case ("offered", ("away",)):
                self.put_back(wire)
                wire.state = "held"
            case ("running", ("response", is_held)):
                self.model.answered.append(wire.request)
                wire.request = None
                wire.state = "held" if is_held else "parked"
            case (_, ("end" | "cut",)):
                self.on_end(wire, message is CUT and wire.is_delivered)
                wire.to_worker.clear()  # it is reset
                wire.to_worker.append(message)
            case _:
                raise AssertionError((wire.state, message))
        self.dispatch()

    def on_end(self, wire: Wire, may_have_begun: bool) -> None:
        if wire.state == "running" or (wire.state == "offered" and may_have_begun):
            self.model.lost.append(wire.request)  # as if all were POST
            wire.request = None
        elif wire.state == "offered":
            self.put_back(wire)
        wire.state = "closed"
        if wire in self.wires:
            self.wires.remove(wire)

    def die(self) -> None:
        self.model.lost += self.queue
        self.is_dead, self.queue = True, []
        for wire in self.model.wires:
            if wire.hub is self and wire.state != "closed":
                if wire.request is not None:
                    self.model.lost.append(wire.request)
                wire.to_hub.clear()
                wire.to_worker.append(END)
                wire.state, wire.request = "closed", None
        self.wires.clear()


class Model:
    """A worker with some slots, hubs, and all that is under way between them."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.slots = chance.randint(1, 4)
        self.line: Line[Hub] = Line(chance.choice([1, 2, 8]))
        self.wires: list[Wire] = []
        self.running: dict[Bell[Hub], int] = {}
        self.broken: set[Bell[Hub]] = set()  # that end while they serve
        self.begun: list[int] = []
        self.answered: list[int | None] = []
        self.lost: list[int | None] = []
        self.requests = 0
        self.hubs = [Hub(name, self) for name in "abcd"[: chance.randint(1, 4)]]
        for _ in range(self.slots):
            self.line.on_free()
        for hub in self.hubs:
            self.line.join(hub)
        self.obey()

    # -- what the worker does as it is told by the line

    def obey(self) -> None:
        for bell in self.line.take_orders():
            assert bell.state is COMING
            wire = next((wire for wire in self.wires if wire.bell is bell), None)
            if wire is None:
                wire = Wire(bell.hub, bell)
                self.wires.append(wire)
            if bell.hub.is_dead:
                wire.to_worker.append(END)
            else:
                wire.to_hub.append(("handshake",))
        self.check()

    def on_message(self, wire: Wire, message: Message) -> None:
        bell = wire.bell
        match bell.state, message:
            case (BellState.COMING, ("agreed", bool(is_waiting))):
                self.line.on_agreed(bell, is_waiting)
            case (BellState.COMING | BellState.HELD, ("request", _, _)):
                pass  # it crossed what holds the connection
            case (BellState.WAITING, ("request", int(request), (Waiting() | None) as behind)):
                self.on_request(wire, request, behind)
            case (BellState.SERVING, ("end" | "cut",)):
                self.broken.add(bell)
            case (BellState.GONE, _):
                pass
            case (_, ("end" | "cut",)):
                wire.to_hub.append(END)
                self.line.on_gone(bell)
            case _:
                raise AssertionError((bell.state, message))
        self.obey()

    def on_request(self, wire: Wire, request: int, behind: Waiting | None) -> None:
        if self.line.on_ring(wire.bell, request, behind):
            self.begun.append(request)
            self.running[wire.bell] = request
            wire.to_hub.append(("claim",))
        else:
            wire.to_hub.append(("away",))

    def finish(self, bell: Bell[Hub]) -> None:
        """A slot has its response ready."""
        del self.running[bell]
        wire = next(wire for wire in self.wires if wire.bell is bell)
        if bell in self.broken or self.chance.random() < 0.1:
            wire.to_hub.append(END)
            self.broken.discard(bell)
            self.line.on_gone(bell)
            self.line.on_free()
        else:
            is_held = self.line.must_hold(bell.hub)
            wire.to_hub.append(("response", is_held))
            self.line.on_response(bell, is_held)
            if bell.state is GONE:
                wire.to_hub.append(END)
        self.obey()

    # -- what may happen

    def deliverable(self) -> Iterator[tuple[Wire, bool]]:
        for wire in self.wires:
            if wire.to_hub and wire.state != "closed" and not wire.hub.is_hung:
                yield wire, True
            if wire.to_worker:
                yield wire, False

    def deliver(self, wire: Wire, is_to_hub: bool) -> None:
        if is_to_hub:
            wire.hub.on_message(wire, wire.to_hub.popleft())
        else:
            message = wire.to_worker.popleft()
            wire.is_delivered = wire.is_delivered or message[0] == "request"
            self.on_message(wire, message)

    def step(self) -> None:
        chance = self.chance
        die = chance.random()
        hub = chance.choice(self.hubs)
        late = [wire.bell for wire in self.wires if wire.bell.is_invited]
        if die < 0.15 and not hub.is_dead:
            hub.queue.append(self.requests)
            self.requests += 1
            hub.dispatch()
        elif die < 0.25 and self.running:
            self.finish(chance.choice(list(self.running)))
        elif die < 0.28 and late:
            self.line.on_late(chance.choice(late))
            self.obey()
        elif die < 0.30 and self.wires:
            wire = chance.choice(self.wires)
            if wire.state != "closed" and not {END, CUT} & {*wire.to_hub, *wire.to_worker}:
                wire.cut(chance)
        elif die < 0.31:
            hub.is_hung = not hub.is_hung
            hub.dispatch()
        elif die < 0.315:
            if not hub.is_dead:
                hub.die()
            else:
                hub.is_dead = False
        elif ways := list(self.deliverable()):
            self.deliver(*chance.choice(ways))

    # -- what has to hold

    def check(self) -> None:
        """After each step: no slot is used twice, none is forgotten, and no request is run twice."""
        for hub in self.hubs:
            serving = [bell for bell in self.running if bell.hub is hub]
            assert len(self.line.bells_of(hub)) <= len(serving) + 2 * self.slots + 1
        assert len(self.running) <= self.slots
        assert self.line.free == self.slots - len(self.running)
        assert len(self.begun) == len(set(self.begun)), "a request was run twice"
        places = [request for hub in self.hubs for request in hub.queue]
        places += [wire.request for wire in self.wires if wire.request is not None]
        assert len(places) == len(set(places)), "a request is in two places"

    def settle(self, ends: bool) -> None:
        """Deliver all that can be; whoever does not answer is late. If it `ends`, so do the responses."""
        for _ in range(100_000):
            if ways := list(self.deliverable()):
                self.deliver(*self.chance.choice(ways))
            elif late := [wire.bell for wire in self.wires if wire.bell.is_invited]:
                self.line.on_late(self.chance.choice(late))
                self.obey()
            elif ends and self.running:
                self.finish(self.chance.choice(list(self.running)))
            else:
                break
        else:
            raise AssertionError("it never comes to rest")
        for hub in self.hubs:  # no slot idles while a request waits anywhere
            assert hub.is_hung or not hub.queue or not self.line.free, (hub.name, hub.queue)

    def run(self) -> None:
        for _ in range(self.chance.randint(5, 60)):
            self.step()
        for hub in self.hubs:
            hub.is_dead = False
        self.settle(ends=False)
        self.settle(ends=True)
        for hub in self.hubs:
            hub.is_hung = False
            hub.dispatch()
        self.settle(ends=True)
        assert sorted([*self.answered, *self.lost], key=lambda each: each or 0) == list(range(self.requests))


def test_random_interleavings() -> None:
    for seed in range(INTERLEAVINGS):
        try:
            Model(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


# ---- One after the other -----------------------------------------------------------------------------


def full_line(slots: int = 1) -> tuple[Line[str], dict[str, Bell[str]]]:
    """Return a line with hubs a and b, and a bell at each that waits; the slots are busy."""
    line: Line[str] = Line(8)
    line.join("a")
    line.join("b")
    for _ in range(slots):
        line.on_free()
    for _ in range(slots):
        for bell in line.take_orders():
            line.on_agreed(bell, is_waiting=False)
    for bell in line.bells_of("a")[:slots]:
        assert line.on_ring(bell, 0, None)
    for bell in line.take_orders():
        line.on_agreed(bell, is_waiting=False)
    bells = {hub: next(each for each in line.bells_of(hub) if each.state is WAITING) for hub in "ab"}
    return line, bells


def test_full_worker_has_a_bell_at_each_hub_and_an_idle_one_as_many_as_it_has_slots() -> None:
    line, _ = full_line(slots=4)
    assert [bell.state for bell in line.bells_of("a")] == [SERVING] * 4 + [WAITING]
    for bell in line.bells_of("a")[:4]:
        line.on_response(bell, is_held=False)
    assert len([bell for bell in line.bells_of("b") if bell.state is WAITING]) == 4


def test_free_slot_goes_to_the_oldest_request_wherever_that_is() -> None:
    line, bells = full_line()
    assert not line.on_ring(bells["a"], 20, None)
    assert not line.on_ring(bells["b"], 10, None)
    serving = line.bells_of("a")[0]
    assert line.must_hold("a") and not line.must_hold("b")
    line.on_response(serving, is_held=True)
    assert line.take_orders() == [bells["b"]] and bells["b"].is_invited
    line.on_agreed(bells["b"], is_waiting=True)
    assert line.on_ring(bells["b"], 10, None)
    assert [bell.is_invited for bell in line.take_orders()] == [False]  # another bell there


def test_next_in_line_is_invited_if_nothing_waits_or_nobody_answers() -> None:
    line, bells = full_line()
    assert not line.on_ring(bells["a"], 20, None)
    assert not line.on_ring(bells["b"], 10, None)
    line.on_response(line.bells_of("a")[0], is_held=True)
    assert [bell.hub for bell in line.take_orders()] == ["b"]
    line.on_late(bells["b"])
    (invited,) = line.take_orders()
    assert invited.hub == "a"
    line.on_agreed(invited, is_waiting=False)
    assert line.first is None and line.free == 1
    line.on_agreed(bells["b"], is_waiting=True)  # better late than never
    assert line.on_ring(bells["b"], 10, None)


def test_hub_that_has_more_stands_in_line_again() -> None:
    line, bells = full_line()
    line.on_response(line.bells_of("a")[0], is_held=False)
    assert line.on_ring(bells["b"], 10, Waiting(1, 11, 11))
    assert line.first == "b" and line.must_hold("a")


def test_hub_stands_in_line_for_each_request_that_waits_there() -> None:
    """Else a slot that becomes free while the answer is on its way would be for a younger request."""
    line, bells = full_line(slots=3)
    assert not line.on_ring(bells["b"], 10, Waiting(2, 12, 20))
    assert not line.on_ring(bells["a"], 19, None)
    for bell in line.bells_of("a")[:3]:
        line.on_response(bell, is_held=True)
    assert [bell.hub for bell in line.take_orders() if bell.is_invited] == ["b", "b", "b"]
    assert line.first == "a"


def test_connection_of_the_first_in_line_is_kept_for_what_waits_there() -> None:
    line, bells = full_line()
    assert not line.on_ring(bells["a"], 20, None)
    serving = line.bells_of("a")[0]
    assert not line.must_hold("a")
    line.on_response(serving, is_held=False)
    assert serving.is_invited and serving.state is WAITING
    assert not [bell for bell in line.take_orders() if bell.is_invited]


def test_hub_that_cannot_be_reached_is_tried_by_one_connection_and_leaves_the_line() -> None:
    line, bells = full_line(slots=2)
    assert not line.on_ring(bells["b"], 10, None)
    for bell in line.bells_of("b"):
        line.on_gone(bell)
    assert line.first == "b"
    line.on_response(line.bells_of("a")[0], is_held=True)
    (invited,) = line.take_orders()
    line.on_gone(invited)
    assert line.first is None
    assert len([bell for bell in line.take_orders() if bell.hub == "b"]) == 1


if __name__ == "__main__":
    INTERLEAVINGS = int(sys.argv[1])
    test_random_interleavings()
    print(f"{INTERLEAVINGS} interleavings: no request lost or run twice, no slot used twice or idle")
