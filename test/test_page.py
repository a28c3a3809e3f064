"""The status page in a real browser: what a person sees there, and what the buttons do.

The pictures are kept in .ci/artefacts, to be looked at.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import browser
import wire
from browser import Browser
from wire import HubProcess, Peer, hub_process

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")

PICTURES = wire.ROOT / ".ci" / "artefacts"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
# Everything that a request line may hold and HTML, JavaScript or CSS might take for its own.
HOSTILE = b"/<script>alert(1)</script><img/src=x/onerror=alert(2)>\"'`${alert(3)}&lt;%F0%9F%8D%B2\\"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    """One browser for all tests: it takes seconds to start."""
    with browser.chromium() as process:
        yield process


def get(path: bytes, *lines: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join((b"%b %b HTTP/1.1" % (method, path), b"Host: page.test", *lines)) + b"\r\n\r\n"


@contextlib.contextmanager
def asked(hub: HubProcess, *requests: bytes) -> Iterator[list[Peer]]:
    """Consumers who have sent a request each, in this order."""
    with contextlib.ExitStack() as stack:
        consumers = []
        for number, request in enumerate(requests, stats(hub)["demand"] + 1):
            consumers.append(stack.enter_context(Peer.connect(hub.main)))
            consumers[-1].send(request)
            while stats(hub)["demand"] < number:
                pass
        yield consumers


def stats(hub: HubProcess) -> dict[str, Any]:
    return hub.stats()


def look(page: Browser, hub: HubProcess, *, in_a_hurry: bool = True) -> None:
    """Open the page, as it is on a large screen, and wait for its first numbers."""
    page.open("about:blank")  # so that the page of the test before complains of nothing any more
    page.wait_for("location.href == 'about:blank'")
    page.messages.clear()
    page.resize(1920, 1080)
    page.open(f"http://127.0.0.1:{hub.admin[1]}/")
    page.wait_for(f"location.port == {hub.admin[1]} && {shows('#queue-length', '0')}")
    if in_a_hurry:
        page.evaluate("setInterval(refresh, 100)")


def cells(page: Browser, selector: str) -> list[str]:
    """Return the texts of the cells of a table with one row."""
    return page.evaluate(f"[...document.querySelectorAll('{selector} td')].map(cell => cell.innerText)")


def shows(selector: str, text: str) -> str:
    """Return the condition that the first such element shows exactly this."""
    return f"document.querySelector({selector!r}).innerText == {text!r}"


def says(selector: str, text: str) -> str:
    """Return the condition that the first such element shows this among other things."""
    return f"document.querySelector({selector!r}).innerText.includes({text!r})"


def test_numbers_change_by_themselves_when_requests_are_queued(page: Browser, hub: HubProcess) -> None:
    look(page, hub, in_a_hurry=False)
    assert page.text("#state") == "○ No workers"
    assert page.text("#waiting-note") == "Nothing waits."
    with asked(hub, get(b"/a"), get(b"/b")) as consumers:
        page.wait_for(shows("#queue-length", "2"))
        assert page.text("#banner") == "No worker is connected: 2 requests cannot start."
        assert [page.text(f"#waiting tr:nth-child({n}) .grow p") for n in (1, 2)] == ["GET /a", "GET /b"]
        assert page.text("#waiting tr:nth-child(2) td") == "2"
        with Peer.connect(hub.worker) as slot:
            slot.read_request()
            page.wait_for(f"{shows('#queue-length', '1')} && {shows('#busy', '1')}")
            assert (page.text("#slots"), page.text("#state")) == ("of 1", "● Serving")
            assert page.text("#running .grow p") == "GET /a"
            assert cells(page, "#machines") == ["127.0.0.1", "1 of 1 busy", "0", "0", "0"]
            slot.send(OK)
            slot.read_request()
            slot.send(OK)
            for consumer in consumers:
                assert consumer.read_response().status == 200
            page.wait_for(f"{shows('#queue-length', '0')} && {shows('#busy', '0')}")
            assert page.text("#failures-note") == "None. Since the start: OK\u00a02"
            assert page.text("#queued-note") == "of the last 2 requests"
            label = page.evaluate("document.querySelector('#queue-plot svg').getAttribute('aria-label')")
            assert label == "Requests waiting in the last ten minutes: 0 now, 2 at most"
    assert page.messages == []


def test_pools_and_tenants_are_shown_where_there_are_some(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    assert page.evaluate("byId('pools-panel').hidden && byId('tenants-panel').hidden")
    with hub_process("--fair-by", "X-Key", "--route", "/gpu=http://gpu.example") as shared:
        look(page, shared)
        requests = get(b"/gpu", b"X-Key: anna", b"Priority: u=5"), get(b"/b", b"X-Key: <b>bert</b>")
        with asked(shared, *requests):
            page.wait_for("document.querySelectorAll('#waiting tr').length == 2")
            assert page.text("#waiting tr .grow p + p").endswith(" · anna · http://gpu.example · u=5")
            assert cells(page, "#pools") == ["http://gpu.example", "1", "0", "0", "other", "1", "0", "0"]
            shown = cells(page, "#tenants")
            assert shown[:4] == ["anna", "1", "0", "0.0\u00a0s"]
            assert shown[5] == "<b>bert</b>"
    assert page.messages == []


def test_what_a_consumer_sends_is_shown_as_text(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    page.evaluate("window.alert = () => { window.isHit = true; }")
    with asked(hub, get(HOSTILE, b"X-Request-Id: <b>", method=b"x'`|~")), Peer.connect(hub.worker) as slot:
        slot.read_request()
        shown = f"x'`|~ {HOSTILE.decode()}"
        page.wait_for("document.querySelector('#running .grow p')")
        assert page.text("#running .grow p") == shown
        slot.close()  # it may not be tried again, since nobody knows this method
        page.wait_for("document.querySelector('#failures .grow p')")
        assert (
            page.text("#failures .grow p")
            == "The worker was lost before it answered – it closed the connection"
        )
        assert shown in page.text("#failures .grow p:nth-child(2)")
    assert (
        page.evaluate("window.isHit ?? document.querySelectorAll('main img, main script, main b').length")
        == 0
    )
    assert page.messages == []


def test_policy_stops_whatever_would_get_in_all_the_same(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    page.evaluate("""(() => {
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.isHit = 1'>");
        const script = document.createElement("script");
        script.textContent = "window.isHit = 1";
        document.body.append(script);
    })()""")
    reply = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.name)")
    assert (reply, page.evaluate("window.isHit ?? 0")) == ("TypeError", 0)
    assert len([each for each in page.messages if "Content Security Policy" in each]) >= 3


def test_buttons_pause_and_resume(page: Browser, hub: HubProcess, slot: Peer) -> None:
    look(page, hub)
    page.wait_for(says("#state", "Serving"))
    page.click("#pause")
    page.wait_for(says("#state", "Paused"))
    assert page.text("#banner") == "Paused: requests wait, and none is started until you resume."
    assert stats(hub)["paused"] is True
    with asked(hub, get(b"/")) as (consumer,):
        page.wait_for(shows("#queue-length", "1"))
        page.wait_for(shows("#pause", "Resume"))
        page.click("#pause")
        slot.read_request()
        slot.send(OK)
        assert consumer.read_response().status == 200
    page.wait_for(says("#state", "Serving"))
    assert page.evaluate("document.querySelector('#banner').hidden") is True


def test_cancel_button_asks_first(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    with asked(hub, get(b"/a", b"X-Request-Id: ../a"), get(b"/b")) as (first, second):
        page.wait_for(shows("#queue-length", "2"))
        page.click("#waiting button")
        page.wait_for("document.querySelector('dialog').open")
        assert "GET /a (../a)" in page.text("#consequence")
        page.click("#no")
        page.wait_for("!document.querySelector('dialog').open")
        assert stats(hub)["queue_length"] == 2
        page.click("#waiting button")
        page.click("#yes")
        assert first.read_response().status == 503
        page.wait_for(shows("#queue-length", "1"))
        assert page.text("#failures .code") == "AC"
        with Peer.connect(hub.worker) as slot:
            assert slot.read_request().target == b"/b"
            page.wait_for("document.querySelector('#running button')")
            page.click("#running button")
            page.click("#yes")
            assert second.read_response().status == 503
            slot.expect_eof()
    assert page.messages == []


def test_cancel_button_is_that_of_the_request_which_is_shown(
    page: Browser, hub: HubProcess, slot: Peer
) -> None:
    look(page, hub)
    with Peer.connect(hub.main) as consumer:
        consumer.send(get(b"/first"))
        slot.read_request()
        page.wait_for(says("#running .grow p", "/first"))
        page.evaluate("kept = show; show = () => {}")  # the next request comes before the page looks again
        slot.send(OK)
        assert consumer.read_response().status == 200
        consumer.send(get(b"/second"))
        slot.read_request()
        page.evaluate("fetch('stats').then(answer => answer.json()).then(kept)")
        assert page.text("#running .grow p") == "GET /second"
        page.click("#running button")
        assert "GET /second" in page.text("#consequence")
        page.click("#yes")
        assert consumer.read_response().status == 503


def test_drain_button_asks_first_and_the_page_tells_when_the_hub_is_gone(
    page: Browser, hub: HubProcess, slot: Peer
) -> None:
    look(page, hub)
    with asked(hub, get(b"/")) as (consumer,):
        slot.read_request()
        page.click("#drain")
        page.click("#no")
        assert stats(hub)["draining"] is False
        page.click("#drain")
        page.click("#yes")
        page.wait_for(says("#state", "Draining"))
        banner = "Draining: no new requests are taken; 1 request to finish."
        assert page.text("#banner") == banner
        assert page.evaluate("document.querySelector('#pause').disabled") is True
        slot.send(OK)
        assert consumer.read_response().status == 200
    assert hub.wait() == 0
    page.wait_for(says("#state", "No answer"))
    assert page.text("#banner").startswith("The hub has not answered since ")


def test_drain_without_workers_says_so(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    with asked(hub, get(b"/")):
        page.click("#drain")
        page.click("#yes")
        page.wait_for(says("#banner", "1 request to finish. No worker is connected: 1 request cannot start."))


def test_page_recovers_by_itself_when_the_hub_is_back(page: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
    with hub_process("--admin-port", port) as hub:
        look(page, hub)
    page.wait_for(says("#state", "No answer"))
    with hub_process("--admin-port", port):
        page.wait_for(says("#state", "No workers"))
        assert page.evaluate("document.querySelector('#banner').hidden") is True


def test_long_queue_stays_a_short_table(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    with asked(hub, *[get(b"/%d" % number) for number in range(103)]):
        page.wait_for(shows("#queue-length", "103"))
        assert page.evaluate("document.querySelectorAll('#waiting tr').length") == 100
        assert page.text("#waiting-count") == "100 of 103"


def test_errors_of_the_app_and_requests_tried_again_are_shown(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    with Peer.connect(hub.worker) as first, asked(hub, get(b"/a", b"X-Request-Id: a1")) as (consumer,):
        first.read_request()
        first.close()
        with Peer.connect(hub.worker) as second:
            second.read_request()
            second.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
            assert consumer.read_response().status == 503
            page.wait_for(says("#failures-note", "Since"))
            note = "Since the start: OK\u00a01 (1 error of the app) · requeued\u00a01"
            assert page.text("#failures-note") == note
            assert page.text("#failures .code") == "503"
            assert page.text("#failures .grow p") == "The app answered with an error"
            assert cells(page, "#machines")[2:] == ["1", "1", "1"]
            assert page.text("#machines-note") == "Requeued: so many of the failures were tried again."
            assert (page.text("#ended"), page.text("#failures-count")) == ("1", "1")
            page.wait_for("document.querySelector('#rate').innerText != '0'")


def test_page_leads_to_the_numbers_for_programs(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(link => link.href)")
    assert links == [f"http://127.0.0.1:{hub.admin[1]}/{path}" for path in ("stats", "metrics")]


def show_with(page: Browser, changes: str) -> None:
    """Show what the hub tells with some of it changed, and from then on nothing else."""
    page.evaluate("kept = window.kept ?? show; show = () => {}")
    page.evaluate(f"fetch('stats').then(answer => answer.json()).then(now => kept({{...now, ...{changes}}}))")


def test_page_tells_what_the_bodies_take_of_memory_and_disk(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    memory = "spool_memory_bytes: 1.5 * 2 ** 20, memory_budget_bytes: 2 ** 26"
    show_with(page, f"{{{memory}, spool_disk_bytes: 3 * 2 ** 30, disk_budget_bytes: 16 * 2 ** 30}}")
    assert (page.text("#memory"), page.text("#disk")) == ("1.5\u00a0MiB", "3\u00a0GiB")
    assert page.text("#spools-note") == "of 64\u00a0MiB and 16\u00a0GiB"
    assert page.evaluate("document.querySelector('#disk').className") == ""
    show_with(page, "{spool_disk_bytes: 15 * 2 ** 30, disk_budget_bytes: 16 * 2 ** 30}")
    assert page.evaluate("document.querySelector('#disk').className") == "trouble"
    show_with(page, "{spool_disk_bytes: 15 * 2 ** 30, disk_budget_bytes: null}")
    assert page.text("#spools-note") == "of 64\u00a0MiB of memory"


def test_page_warns_of_another_hub_on_the_port(page: Browser, hub: HubProcess, slot: Peer) -> None:
    look(page, hub)
    show_with(page, "{has_rival: true}")
    assert page.text("#banner").startswith(
        "Another hub listens on the same port, and gets a part of the requests"
    )


def tops(page: Browser, *names: str) -> list[float]:
    """Return how far down the panels with these tables begin."""
    top = "document.getElementById('{}').closest('section').getBoundingClientRect().top"
    return [page.evaluate(top.format(name)) for name in names]


TABLES = ("failures", "machines", "running", "waiting")


@pytest.mark.parametrize(("width", "height", "abreast"), [(1920, 1080, 3), (2560, 1440, 4)])
def test_wide_screen_is_used(page: Browser, hub: HubProcess, width: int, height: int, abreast: int) -> None:
    look(page, hub)
    page.resize(width, height)
    assert page.evaluate("document.querySelector('main').getBoundingClientRect().width") > 0.95 * width
    places = tops(page, *TABLES)
    assert places.count(places[0]) == abreast


def test_phone_shows_failures_before_the_long_tables(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    page.resize(390, 844, mobile=True)
    first, *others = tops(page, *TABLES)
    assert first < min(others)


def test_large_numbers_fit_a_phone(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    page.resize(360, 780, mobile=True)
    show_with(page, "{queue_length: 123456, slots: {idle: 3000, busy: 12340}, requests_per_second: 12345.6}")
    assert page.text("#slots") == "of 15,340"
    assert page.evaluate("document.documentElement.scrollWidth") == 360


SCREENS = {"huge": (2560, 1440), "wide": (1920, 1080), "laptop": (1366, 768), "phone": (360, 780)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_page_fits_every_screen(page: Browser, hub: HubProcess, slot: Peer, screen: str, scheme: str) -> None:
    look(page, hub)
    requests = [get(b"/render/%b" % (b"a-long-name-" * number)) for number in range(1, 12)]
    with asked(hub, get(HOSTILE), *requests), Peer.connect(hub.main) as lost:
        lost.send(b"garbage\r\n\r\n")
        lost.read_to_end()
        page.wait_for(shows("#queue-length", "11"))
        page.resize(*SCREENS[screen], scheme=scheme, mobile=screen == "phone")
        # Not compared with innerWidth: on a phone that grows with the page.
        assert page.evaluate("document.documentElement.scrollWidth") == SCREENS[screen][0]
        page.evaluate("document.querySelector('details').open = true")
        tables = "[...document.querySelectorAll('.scroll')]"
        assert page.evaluate(f"{tables}.filter(each => each.scrollWidth > each.clientWidth).length") == 0
        page.screenshot(PICTURES / f"{screen}-{scheme}.png")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (brightness > 384) is (scheme == "light")
