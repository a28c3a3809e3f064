"""The status page in a real browser: what a person sees there, and what the buttons do.

The pictures are kept in .ci/artefacts, to be looked at.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
import wire
from browser import Browser
from wire import OK, HubProcess, Peer, get, hub_process

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")

HURRY = "setInterval(refresh, 100)"
PICTURES = wire.ROOT / ".ci" / "artefacts"
# Everything that a request line may hold and HTML, JavaScript or CSS might take for its own.
HOSTILE = b"/<script>alert(1)</script><img/src=x/onerror=alert(2)>\"'`${alert(3)}&lt;%F0%9F%8D%B2\\"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    """One browser for all tests: it takes seconds to start."""
    with browser.chromium() as process:
        yield process


@contextlib.contextmanager
def asked(hub: HubProcess, *requests: bytes) -> Iterator[list[Peer]]:
    """Consumers who have sent a request each, in this order."""
    with contextlib.ExitStack() as stack:
        consumers = []
        for number, request in enumerate(requests, stats(hub)["demand"] + 1):
            consumers.append(stack.enter_context(Peer.connect(hub.main)))
            consumers[-1].send(request)
            hub.until(lambda stats, number=number: stats["demand"] >= number)
        yield consumers


def stats(hub: HubProcess) -> dict[str, Any]:
    return hub.stats()


def look(page: Browser, hub: HubProcess, *, in_a_hurry: bool = True, until: str = "#queue-length:0") -> None:
    """Open the page, as it is on a large screen, and wait for its first numbers, or what else it shows."""
    page.open("about:blank")  # so that the page of the test before complains of nothing any more
    page.wait_for("location.href == 'about:blank'")
    page.messages.clear()
    page.resize(1920, 1080)
    page.open(f"http://127.0.0.1:{hub.admin[1]}/")
    page.wait_for(f"location.port == {hub.admin[1]} && {shows(*until.split(':'))}")
    if in_a_hurry:
        page.evaluate(HURRY)


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
        page.evaluate(HURRY)  # that they change without it has been seen
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


def test_page_tells_why_an_order_was_refused(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    page.evaluate("act('requests/none/cancel')")
    assert page.text("#notice") == "no such request, or it has ended"


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
    with wire.reserved_port() as port:
        with hub_process("--reuse-port", "--admin-port", port) as hub:
            look(page, hub)
        page.wait_for(says("#state", "No answer"))
        with hub_process("--reuse-port", "--admin-port", port):
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


# ---- The token -------------------------------------------------------------------------------------------

TOKEN, NEW_TOKEN = "aZ09-._~+/==", "another"
ENTER, ESCAPE, TAB = ("Enter", 13, "\r"), ("Escape", 27), ("Tab", 9)
IS_OPEN = "document.querySelector('dialog').open"
WANTS_TOKEN = f"{IS_OPEN} && document.activeElement.id == 'token' && {says('#question', 'token')}"
IS_WRONG = f"{WANTS_TOKEN} && {shows('#wrong', 'The hub did not accept that token.')}"
IS_FIRST = f"{WANTS_TOKEN} && document.querySelector('#wrong').hidden"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    return path


@pytest.fixture
def orders_hub(token_file: Path) -> Iterator[HubProcess]:
    """A hub that wants a token for orders."""
    with hub_process("--admin-token-file", str(token_file)) as hub:
        yield hub


@pytest.fixture
def closed_hub(token_file: Path) -> Iterator[HubProcess]:
    """A hub that wants a token for all, with a slot."""
    with (
        hub_process("--admin-token-file", str(token_file), "--admin-token-for", "all") as hub,
        Peer.connect(hub.worker),
    ):
        yield hub


# Notes whether the page is going to look again by itself.
NOTE_TIMER = """(set => {
    window.isTimed = false;
    window.setTimeout = (what, ...how) => {
        window.isTimed ||= what === refresh;
        return set(what, ...how);
    };
})(window.setTimeout)"""


def change_token(hub: HubProcess, token_file: Path) -> None:
    token_file.write_text(NEW_TOKEN)
    hub.send_signal(signal.SIGHUP)
    hub.wait_for_error(lambda line: "has been read again" in line)


def complaints(page: Browser) -> list[str]:
    """Return the messages but for those about answers with 401, which the browser tells by itself."""
    return [each for each in page.messages if "status of 401" not in each]


def test_order_asks_for_the_token_once_and_says_if_it_is_wrong(page: Browser, orders_hub: HubProcess) -> None:
    look(page, orders_hub)
    page.click("#pause")
    page.wait_for(IS_FIRST)
    assert page.evaluate("document.querySelector('#token').labels[0].innerText") == "Token"
    page.write("wrong")
    page.click("#yes")
    page.wait_for(IS_WRONG)
    assert stats(orders_hub)["paused"] is False
    page.write(f" {TOKEN} ")
    page.click("#yes")
    page.wait_for(says("#state", "Paused"))
    assert page.evaluate(f"document.querySelector('#notice').hidden && !{IS_OPEN}") is True
    page.wait_for(shows("#pause", "Resume"))
    page.click("#pause")
    page.wait_for(shows("#pause", "Pause"))
    assert page.evaluate(IS_OPEN) is False
    assert complaints(page) == []


def test_token_is_kept_nowhere_but_in_the_page(page: Browser, orders_hub: HubProcess) -> None:
    look(page, orders_hub)
    page.click("#pause")
    page.wait_for(WANTS_TOKEN)
    page.write(TOKEN)
    page.press(*ENTER)
    page.wait_for(says("#state", "Paused"))
    url = f"http://127.0.0.1:{orders_hub.admin[1]}/"
    places = "[location.href, localStorage.length, sessionStorage.length, document.cookie, history.state]"
    assert page.evaluate(places) == [url, 0, 0, "", None]
    asked_for = page.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
    assert set(asked_for) <= {f"{url}stats", f"{url}pause"}
    assert page.evaluate("document.querySelector('#token').value") == ""
    assert TOKEN not in page.evaluate("document.documentElement.outerHTML")
    page.open(url)
    page.wait_for("document.querySelector('#pause').innerText == 'Resume'")
    page.click("#pause")
    page.wait_for(IS_FIRST)


def test_token_is_entered_and_declined_by_keyboard(page: Browser, orders_hub: HubProcess) -> None:
    look(page, orders_hub)
    page.evaluate("document.querySelector('#pause').focus()")
    page.press(*ENTER)
    page.wait_for(IS_FIRST)
    page.press(*ESCAPE)
    page.wait_for(shows("#notice", "Nothing was done: the hub wants its token for that."))
    assert page.evaluate("document.activeElement.id") == "pause"
    page.press(*ENTER)
    page.wait_for(IS_FIRST)
    for name in ("no", "yes"):
        page.press(*TAB)
        assert page.evaluate("document.activeElement.id") == name
    page.press(*ENTER)  # an empty field is not sent
    assert page.evaluate(f"{IS_OPEN} && document.querySelector('#token').validity.valueMissing") is True
    page.evaluate("document.querySelector('#token').focus()")
    page.write("€")  # nor is what no token has: no field of HTTP could carry it
    page.press(*ENTER)
    assert page.evaluate(f"{IS_FIRST} && document.querySelector('#token').validity.patternMismatch") is True
    page.evaluate("document.querySelector('#token').select()")
    page.write(TOKEN)
    page.press(*ENTER)
    page.wait_for(says("#state", "Paused"))
    assert complaints(page) == []


def test_drain_is_confirmed_once_and_needs_the_token(page: Browser, orders_hub: HubProcess) -> None:
    look(page, orders_hub)
    page.click("#drain")
    page.wait_for(says("#question", "Drain the hub?"))
    assert page.evaluate("document.querySelector('#entry').hidden") is True
    page.click("#yes")
    page.wait_for(IS_FIRST)
    assert stats(orders_hub)["draining"] is False
    page.write(TOKEN)
    page.press(*ENTER)
    assert orders_hub.wait() == 0


def test_closed_hub_is_shown_to_those_who_have_the_token(page: Browser, closed_hub: HubProcess) -> None:
    look(page, closed_hub, in_a_hurry=False, until="#state:■ Locked")
    page.wait_for(IS_FIRST)
    page.evaluate(NOTE_TIMER)
    page.click("#no")
    page.wait_for(f"!{IS_OPEN}")
    assert page.evaluate("isTimed") is False
    assert page.text("#banner") == "This hub tells how it is doing only to those who have its token."
    assert page.evaluate("document.querySelector('#pause').disabled") is True
    page.click("#unlock")
    page.wait_for(IS_FIRST)
    page.write("wrong")
    page.press(*ENTER)
    page.wait_for(IS_WRONG)
    page.write(TOKEN)
    page.press(*ENTER)
    page.wait_for(says("#state", "Serving"))
    page.wait_for("isTimed")
    assert page.text("#slots") == "of 1"
    assert page.evaluate("document.querySelector('#unlock').hidden") is True
    page.click("#pause")
    page.wait_for(says("#state", "Paused"))
    assert complaints(page) == []


def unlock(page: Browser, hub: HubProcess) -> None:
    """Open the page, and give it the token that it asks for."""
    look(page, hub, until="#state:■ Locked")
    page.wait_for(IS_FIRST)
    page.write(TOKEN)
    page.press(*ENTER)
    page.wait_for(says("#state", "Serving"))


def test_page_asks_again_when_the_token_has_changed(
    page: Browser, closed_hub: HubProcess, token_file: Path
) -> None:
    unlock(page, closed_hub)
    change_token(closed_hub, token_file)
    page.wait_for(IS_WRONG)
    assert page.text("#state") == "■ Locked"
    page.write(NEW_TOKEN)
    page.press(*ENTER)
    page.wait_for(f"{says('#state', 'Serving')} && !{IS_OPEN}")


@pytest.mark.parametrize("answer", ["no", "yes"])
def test_another_question_is_answered_before_the_token_is_asked_for(
    page: Browser, closed_hub: HubProcess, token_file: Path, answer: str
) -> None:
    unlock(page, closed_hub)
    page.click("#drain")
    page.wait_for(says("#question", "Drain the hub?"))
    change_token(closed_hub, token_file)
    page.wait_for(says("#state", "Locked"))
    assert page.text("#question") == "Drain the hub?"
    page.click(f"#{answer}")
    page.wait_for(IS_WRONG)
    page.write(NEW_TOKEN)
    page.press(*ENTER)
    if answer == "yes":
        assert closed_hub.wait() == 0
    else:
        page.wait_for(says("#state", "Serving"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", ["laptop", "phone"])
def test_question_for_the_token_fits_every_screen(
    page: Browser, closed_hub: HubProcess, screen: str, scheme: str
) -> None:
    look(page, closed_hub, until="#state:■ Locked")
    width, height = SCREENS[screen]
    page.resize(width, height, scheme=scheme, mobile=screen == "phone")
    page.wait_for(IS_FIRST)
    page.write("wrong")
    page.press(*ENTER)
    page.wait_for(IS_WRONG)
    page.screenshot(PICTURES / f"token-{screen}-{scheme}.png")
    box = page.evaluate("document.querySelector('dialog').getBoundingClientRect().toJSON()")
    assert box["left"] >= 8 and box["right"] <= width - 8
    assert box["bottom"] <= height / 2 + 200  # a keyboard on the screen takes the rest
    assert page.evaluate("document.documentElement.scrollWidth") == width
    inputs = page.evaluate("(field => [field.type, field.autocomplete])(document.querySelector('#token'))")
    assert inputs == ["password", "off"]


# ---- Every screen ----------------------------------------------------------------------------------------


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


def test_idle_slots_of_workers_with_several_hubs_may_be_busy_there(page: Browser, hub: HubProcess) -> None:
    look(page, hub)
    show_with(page, "{slots: {idle: 2, busy: 1}}")
    assert page.text("#busy-note") == "2 idle · dashed: all slots"
    show_with(page, "{slots: {idle: 2, busy: 1}, processes: {a: {slots: 3, busy_here: 1, connections: 2}}}")
    assert page.text("#busy-note") == "2 idle or busy at other hubs · dashed: all slots"


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
