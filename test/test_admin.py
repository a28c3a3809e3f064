"""The admin port in bytes: who may ask, what /stats and /metrics tell, and what can be done there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pothead
import wire
from wire import OK, HubProcess, Peer, get, hub_process, post, serve

YES = b"Pothead-Action: yes"


# ---- Helpers -----------------------------------------------------------------------------------------


def act(hub: HubProcess, path: bytes, *lines: bytes) -> tuple[int, bytes]:
    """Post to an action; return status and body."""
    response = hub.ask_admin(path, *(lines or (YES,)), method=b"POST")
    return response.status, response.body


@contextlib.contextmanager
def waits(hub: HubProcess, data: bytes) -> Iterator[Peer]:
    """A consumer whose request has joined the queue."""
    before = hub.stats()["queue_length"]
    assert isinstance(before, int)
    with Peer.connect(hub.main) as consumer:
        consumer.send(data)
        hub.until(lambda stats: stats["queue_length"] == before + 1)
        yield consumer


@contextlib.contextmanager
def runs(hub: HubProcess, slot: Peer, data: bytes) -> Iterator[Peer]:
    """A consumer whose request the slot has read."""
    with Peer.connect(hub.main) as consumer:
        consumer.send(data)
        slot.read_request()
        yield consumer


def logged(hub: HubProcess, code: str) -> str:
    return hub.wait_for_line(lambda line: f" code={code}" in line)


# ---- Who may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", [b"127.0.0.1", b"10.1.2.3:4041", b"[::1]:4041", b"localhost:1", b"LocalHost.", b""]
)
def test_admin_port_may_be_called_by_address_and_as_localhost(common_hub: HubProcess, host: bytes) -> None:
    with Peer.connect(common_hub.admin) as admin:
        admin.send(get(b"/livez", host=host))
        assert admin.read_response().status == 200


@pytest.mark.parametrize(
    "host", [b"evil.example", b"127.0.0.1.evil.example", b"localhost.evil.example:80", b"2130706433"]
)
@pytest.mark.parametrize("path", [b"/", b"/stats", b"/metrics", b"/livez", b"/nowhere"])
def test_admin_port_refuses_a_name_that_it_was_not_told(
    common_hub: HubProcess, host: bytes, path: bytes
) -> None:
    with Peer.connect(common_hub.admin) as admin:
        admin.send(get(path, host=host))
        response = admin.read_response()
        assert response.status == 421
        assert response.body == b"this name is not among --admin-allowed-hosts: %b\n" % host


def test_action_by_a_foreign_name_is_refused(common_hub: HubProcess) -> None:
    with Peer.connect(common_hub.admin) as admin:
        admin.send(get(b"/pause", YES, method=b"POST", host=b"evil.example"))
        assert admin.read_response().status == 421
    assert common_hub.stats()["paused"] is False


def test_admin_port_may_be_called_by_the_names_that_it_was_told() -> None:
    with hub_process("--admin-allowed-hosts", "hub.example, Hub") as hub:
        for host, status in ((b"HUB.example.:80", 200), (b"hub", 200), (b"hub.example.org", 421)):
            with Peer.connect(hub.admin) as admin:
                admin.send(get(b"/livez", host=host))
                assert admin.read_response().status == status


@pytest.mark.parametrize("name", ["http://hub", "hub:4041", "*", "a b"])
def test_allowed_hosts_are_names_and_nothing_else(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--admin-allowed-hosts is no host name: "):
        pothead.Options(admin_allowed_hosts=(name,))


@pytest.mark.parametrize("path", [b"/", b"/stats", b"/metrics", b"/livez", b"/readyz"])
def test_what_can_be_looked_at_takes_get_and_head(common_hub: HubProcess, path: bytes) -> None:
    got, head = common_hub.ask_admin(path), common_hub.ask_admin(path, method=b"HEAD")
    assert got.status == head.status
    assert got.body and not head.body
    for method in (b"POST", b"PUT", b"DELETE", b"OPTIONS", b"BREW"):
        response = common_hub.ask_admin(path, YES, method=method)
        assert (response.status, response.value(b"Allow")) == (405, b"GET, HEAD")


@pytest.mark.parametrize("path", [b"/drain", b"/pause", b"/resume", b"/requests/x/cancel"])
def test_actions_take_post_alone_and_only_on_purpose(common_hub: HubProcess, path: bytes) -> None:
    for method in (b"GET", b"HEAD", b"PUT", b"OPTIONS"):
        response = common_hub.ask_admin(path, YES, method=method)
        assert (response.status, response.value(b"Allow")) == (405, b"POST")
    assert act(common_hub, path, b"X-Nothing: 1") == (403, b"this needs the field Pothead-Action: yes\n")
    for lines in (
        [b"Pothead-Action: no"],
        [YES, b"Sec-Fetch-Site: cross-site"],
        [YES, b"Sec-Fetch-Site: same-site"],
    ):
        assert act(common_hub, path, *lines)[0] == 403
    stats = common_hub.stats()
    assert (stats["paused"], stats["draining"]) == (False, False)


def test_action_takes_no_body(hub: HubProcess) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(post(b"/pause", b"a=b", YES, host=b"localhost"))
        assert admin.read_response().status == 413
    assert hub.stats()["paused"] is False
    assert act(hub, b"/pause", YES, b"Content-Length: 0", b"Sec-Fetch-Site: same-origin")[0] == 200


@pytest.mark.parametrize(("path", "method"), [(b"/stats", b"GET"), (b"/nowhere", b"GET"), (b"/", b"TRACE")])
def test_every_answer_forbids_guessing_keeping_and_telling(
    common_hub: HubProcess, path: bytes, method: bytes
) -> None:
    response = common_hub.ask_admin(path, method=method)
    assert response.value(b"X-Content-Type-Options") == b"nosniff"
    assert response.value(b"Cache-Control") == b"no-store"
    assert response.value(b"Referrer-Policy") == b"no-referrer"
    assert response.value(b"Access-Control-Allow-Origin") is None


# ---- The token ---------------------------------------------------------------------------------------

TOKEN = b"aZ09-._~+/=="
BEARER = b"Authorization: Bearer " + TOKEN
ACTIONS = (b"/pause", b"/resume", b"/requests/x/cancel", b"/drain")
PLAIN, WRONG = b'Bearer realm="pothead"', b'Bearer realm="pothead", error="invalid_token"'


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_bytes(b" " + TOKEN + b"\r\n")
    return path


@pytest.fixture(scope="module")
def tokened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    """A hub with a token, for the tests that change nothing."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_bytes(TOKEN)
    with hub_process("--admin-token-file", str(path)) as hub:
        yield hub


def refusal(hub: HubProcess, path: bytes, *lines: bytes, method: bytes = b"POST") -> bytes:
    """Return the challenge of a request that is refused for its token."""
    response = hub.ask_admin(path, *lines, method=method)
    assert response.status == 401, response
    assert b"Bearer TOKEN" in response.body
    (challenge,) = response.values(b"WWW-Authenticate")
    return challenge


def test_order_needs_the_token_and_looking_does_not(token_file: Path) -> None:
    with hub_process("--admin-token-file", str(token_file)) as hub:
        for path in ACTIONS:
            assert refusal(hub, path, YES) == PLAIN
            assert act(hub, path, BEARER) == (403, b"this needs the field Pothead-Action: yes\n")
            assert act(hub, path, YES, BEARER, b"Sec-Fetch-Site: cross-site")[0] == 403
        stats = hub.stats()
        assert (stats["paused"], stats["draining"]) == (False, False)
        for path in (b"/", b"/metrics", b"/livez", b"/readyz"):
            assert hub.ask_admin(path).status in (200, 501)
        assert act(hub, b"/pause", YES, BEARER) == (200, b"paused\n")
        assert hub.stats()["paused"] is True
        assert act(hub, b"/resume", YES, BEARER) == (200, b"resumed\n")
        assert act(hub, b"/requests/x/cancel", YES, BEARER)[0] == 404
        assert act(hub, b"/drain", YES, BEARER) == (202, b"draining\n")
        assert hub.wait() == 0


@pytest.mark.parametrize(
    ("lines", "challenge"),
    [
        ([b"Authorization: Bearer " + TOKEN[:-1]], WRONG),
        ([b"Authorization: Bearer " + TOKEN.lower()], WRONG),
        ([b"Authorization: Bearer x" + TOKEN], WRONG),
        ([b"Authorization: Bearer " + TOKEN + b" x"], WRONG),
        ([b"Authorization: Bearer " + TOKEN + b", Bearer " + TOKEN], WRONG),
        ([b"Authorization: Bearer \xe9"], WRONG),
        ([b"Authorization: Bearer"], WRONG),
        ([BEARER, BEARER], WRONG),
        ([BEARER, b"Authorization: Basic eDp5"], WRONG),
        ([b"Authorization: Basic " + base64.b64encode(b"x:" + TOKEN)], PLAIN),
        ([b"Authorization: " + TOKEN], PLAIN),
        ([b"Authorization:"], PLAIN),
        ([b"X-Authorization: Bearer " + TOKEN], PLAIN),
        ([b"Cookie: access_token=" + TOKEN], PLAIN),
    ],
)
def test_anything_but_the_token_once_is_refused(
    tokened: HubProcess, lines: list[bytes], challenge: bytes
) -> None:
    assert refusal(tokened, b"/pause", YES, *lines) == challenge
    assert refusal(tokened, b"/pause?access_token=" + TOKEN, YES, *lines) == challenge
    assert tokened.stats()["paused"] is False


@pytest.mark.parametrize("scheme", [b"bearer ", b"BEARER ", b"Bearer   "])
def test_scheme_of_the_token_is_written_in_any_case(tokened: HubProcess, scheme: bytes) -> None:
    assert act(tokened, b"/resume", YES, b"authorization: " + scheme + TOKEN)[0] == 200


def test_token_for_all_leaves_the_probes_and_the_bare_page_free(token_file: Path) -> None:
    with hub_process("--admin-token-file", str(token_file), "--admin-token-for", "all") as hub:
        for path in (b"/stats", b"/metrics"):
            for method in (b"GET", b"HEAD"):
                assert hub.ask_admin(path, method=method).status == 401
            assert refusal(hub, path, b"Authorization: Bearer x", method=b"GET") == WRONG
            assert hub.ask_admin(path, BEARER).status in (200, 501)
        for path in (b"/", b"/livez", b"/readyz"):
            assert hub.ask_admin(path).status == 200
            assert hub.ask_admin(path, b"Authorization: Bearer x").status == 200
        assert refusal(hub, b"/pause", YES) == PLAIN
        assert act(hub, b"/pause", YES, BEARER)[0] == 200


def test_connection_goes_on_after_a_refusal(token_file: Path) -> None:
    with hub_process("--admin-token-file", str(token_file)) as hub, Peer.connect(hub.admin) as admin:
        for lines in ((YES,), (YES, BEARER)):
            admin.send(get(b"/pause", *lines, method=b"POST", host=b"localhost"))
        assert [admin.read_response().status for _ in range(2)] == [401, 200]


def test_connection_is_kept_if_that_is_said(hub: HubProcess) -> None:
    """As the consumers' is, by HTTP/1.0 as well."""
    with Peer.connect(hub.admin) as admin:
        for lines in ([b"Connection: keep-alive"], []):
            admin.send(b"\r\n".join([b"GET /livez HTTP/1.0", b"Host: localhost", *lines, b"", b""]))
            response = admin.read_response()
            assert (response.status, response.value(b"Connection")) == (
                200,
                b"keep-alive" if lines else b"close",
            )
        admin.expect_eof()


def test_token_is_neither_logged_nor_shown(token_file: Path) -> None:
    options = ("--admin-token-file", str(token_file), "--log-level", "debug")
    with hub_process(*options) as hub:
        for lines in ([BEARER], [BEARER, BEARER]):
            act(hub, b"/pause", YES, *lines)
        for path in (b"/", b"/stats", b"/metrics"):
            assert TOKEN not in hub.ask_admin(path, BEARER).body
        hub.send_signal(signal.SIGHUP)
        hub.wait_for_error(lambda line: "has been read again" in line)
    assert TOKEN.decode() not in hub.stderr + "".join(hub.lines)


def test_authorization_of_a_consumer_is_for_the_worker(tokened: HubProcess) -> None:
    with Peer.connect(tokened.worker) as slot, Peer.connect(tokened.main) as consumer:
        consumer.send(get(b"/", BEARER, b"Authorization: Basic eDp5"))
        assert serve(slot).values(b"Authorization") == [b"Bearer " + TOKEN, b"Basic eDp5"]
        assert consumer.read_response().status == 200


def test_new_token_counts_from_a_hang_up_signal_on(token_file: Path) -> None:
    with hub_process("--admin-token-file", str(token_file)) as hub:
        token_file.write_bytes(b"new\n")
        assert act(hub, b"/pause", YES, BEARER)[0] == 200
        hub.send_signal(signal.SIGHUP)
        hub.wait_for_error(lambda line: "has been read again" in line)
        assert refusal(hub, b"/resume", YES, BEARER) == WRONG
        assert act(hub, b"/resume", YES, b"Authorization: Bearer new")[0] == 200


@pytest.mark.parametrize("content", [b"", b"two words", None])
def test_old_token_stays_if_the_new_one_cannot_be_used(token_file: Path, content: bytes | None) -> None:
    with hub_process("--admin-token-file", str(token_file)) as hub:
        if content is None:
            token_file.unlink()
        else:
            token_file.write_bytes(content)
        hub.send_signal(signal.SIGHUP)
        line = hub.wait_for_error(lambda line: line.endswith("; the old one stays"))
        assert "ERROR pothead: --admin-token-file " in line and str(token_file) in line
        assert "words" not in line
        assert refusal(hub, b"/pause", YES) == PLAIN
        assert act(hub, b"/pause", YES, BEARER)[0] == 200
        assert len([each for each in hub.errors if "token" in each]) == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"cannot be read \(No such file or directory\): "),
        (b" \r\n", "has nothing in it: "),
        (b"two words", "holds no token, "),
        (b"one\ntwo", "holds no token, "),
        (b"a=b", "holds no token, "),
        (b"=", "holds no token, "),
        (b"\xef\xbb\xbftoken", "holds no token, "),
        (b"x" * 5000, "holds no token, which is up to 4096 letters"),
    ],
)
@pytest.mark.parametrize("check", [[], ["--check"]])
def test_hub_does_not_start_without_a_token_that_can_be_used(
    tmp_path: Path, content: bytes | None, complaint: str, check: list[str]
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    ended = run_hub(*check, "--admin-token-file", str(path))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"pothead: --admin-token-file {complaint}.*{path}\n", ended.stderr)


def run_hub(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a hub that ends by itself."""
    ports = [word for port in ("main", "worker", "admin") for word in (f"--{port}-port", "0")]
    command = wire.python(str(wire.ROOT / "pothead.py"), *ports, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=wire.DEADLINE_S)


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_token_for_all_without_a_token_is_refused(check: list[str]) -> None:
    ended = run_hub(*check, "--admin-token-for", "all")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "pothead: --admin-token-for all needs --admin-token-file\n"


def test_check_tells_the_file_of_the_token_and_not_the_token(token_file: Path) -> None:
    ended = run_hub("--check", "--admin-token-file", str(token_file))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"--admin-token-file {token_file} (--admin-token-file)\n" in ended.stdout
    assert "--admin-token-for orders (default)\n" in ended.stdout
    assert TOKEN.decode() not in ended.stdout


def test_program_around_a_hub_has_the_token_read_again(token_file: Path) -> None:
    options = pothead.Options(main_port=0, worker_port=0, admin_port=0, admin_token_file=str(token_file))
    hub = pothead.Hub(options)
    old = hub.token_digest
    token_file.write_bytes(b"new")
    thread = threading.Thread(target=hub.run)
    thread.start()
    hub.reload()
    hub.stop()
    thread.join()
    assert hub.token_digest not in (old, None)


# ---- The page ----------------------------------------------------------------------------------------


def test_page_lets_in_its_own_style_and_script_and_nothing_else(hub: HubProcess) -> None:
    response = hub.ask_admin(b"/")
    assert (response.status, response.value(b"Content-Type")) == (200, b"text/html; charset=utf-8")
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in (response.value(b"Content-Security-Policy") or b"").decode().split(";")
    )
    page = response.body.decode()
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        (inner,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "frame-ancestors": "'none'",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert not re.search(r"\bon\w+=|\bstyle=|innerHTML|src=|url\(|@import", page)
    assert set(re.findall(r"https?://[^'\" ]*", page)) == {"http://www.w3.org/2000/svg"}


# ---- What /stats tells -------------------------------------------------------------------------------


def test_waiting_requests_have_their_place_and_the_time_until_they_start(hub: HubProcess, slot: Peer) -> None:
    with Peer.connect(hub.main) as first:
        first.send(get(b"/first"))
        serve(slot)
        first.read_response()
        mean_s = hub.until(lambda stats: stats["mean_service_seconds"])["mean_service_seconds"]
        with runs(hub, slot, get(b"/a")), waits(hub, get(b"/b")), waits(hub, get(b"/c")):
            rows = hub.stats()["waiting"]
            assert [(row["position"], row["path"]) for row in rows] == [(1, "/b"), (2, "/c")]
            assert rows[1]["starts_in_seconds"] == pytest.approx(2 * mean_s, abs=0.01)
            act(hub, b"/pause")
            assert [row["starts_in_seconds"] for row in hub.stats()["waiting"]] == [None, None]


def test_long_tables_and_paths_are_cut(hub: HubProcess) -> None:
    rows = pothead.LIMITS.listed_rows
    path = b"/" + b"a" * 5000
    with contextlib.ExitStack() as stack:
        slots = [stack.enter_context(Peer.connect(hub.worker)) for _ in range(rows + 5)]
        hub.until(lambda stats: stats["slots"]["idle"] == len(slots))
        for _ in range(2 * rows + 12):
            stack.enter_context(Peer.connect(hub.main)).send(get(path))
        stats = hub.until(lambda stats: stats["demand"] == 2 * rows + 12)
    for name, left in (("waiting", 7), ("running", 5), ("workers", 5)):
        assert (len(stats[name]), stats[f"{name}_not_listed"]) == (rows, left)
    assert stats["waiting"][0]["path"] == "/" + "a" * (pothead.LIMITS.listed_path_bytes - 1) + "…"


def test_failures_are_told_in_plain_words_and_counted_for_their_machine(hub: HubProcess) -> None:
    with Peer.connect(hub.worker) as slot:
        with runs(hub, slot, get(b"/fails?secret", b"X-Request-Id: f1", method=b"POST")) as consumer:
            slot.close()
            assert consumer.read_response().status == 502
    with Peer.connect(hub.main) as consumer:
        consumer.send(b"garbage\r\n\r\n")
        consumer.read_to_end()
    stats = hub.until(lambda stats: stats["outcomes"]["RQ"])
    last, before = stats["failures"]
    assert (last["code"], last["method"], last["path"], last["status"]) == ("RQ", "-", "-", 400)
    assert (before["code"], before["id"], before["path"], before["status"]) == ("WL", "f1", "/fails", 502)
    assert before["meaning"] == "the worker was lost before it answered"
    (machine,) = stats["machines"]
    assert (machine["address"], machine["slots"], machine["failures"]) == ("127.0.0.1", 0, 1)
    assert machine["gone_seconds"] >= 0
    with Peer.connect(hub.worker):
        (machine,) = hub.until(lambda stats: stats["slots"]["idle"])["machines"]
        assert (machine["slots"], machine["busy"], machine["failures"]) == (1, 0, 1)
        assert machine["gone_seconds"] is None


def test_errors_of_the_app_are_counted_and_told_as_failures(hub: HubProcess, slot: Peer) -> None:
    statuses = (b"200 OK", b"404 Not Found", b"500 Oops", b"504 Gateway Timeout", b"500 Oops")
    with Peer.connect(hub.main) as consumer:
        for number, status in enumerate(statuses):
            consumer.send(get(b"/%d" % number))
            serve(slot, b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
            consumer.read_response()
    stats = hub.until(lambda stats: stats["outcomes"]["OK"] == len(statuses))
    assert stats["worker_errors"] == {"500": 2, "504": 1}
    assert [(row["path"], row["status"], row["code"], row["meaning"]) for row in stats["failures"]] == [
        (path, status, "OK", "the app answered with an error")
        for path, status in (("/4", 500), ("/3", 504), ("/2", 500))
    ]


def test_consumers_who_leave_do_not_push_out_the_real_failures(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, get(b"/lost", method=b"POST")) as consumer:
        slot.close()
        assert consumer.read_response().status == 502
    count = 2 * pothead.LIMITS.listed_failures
    for number in range(1, count + 1):
        with waits(hub, get(b"/leaves-%d" % number)):
            pass
        hub.until(lambda stats, number=number: stats["outcomes"]["CQ"] == number)
    *left, lost = hub.stats()["failures"]
    assert (lost["code"], lost["path"]) == ("WL", "/lost")
    kept = range(count, pothead.LIMITS.listed_failures, -1)
    assert [row["path"] for row in left] == [f"/leaves-{number}" for number in kept]


def test_failures_of_a_machine_after_which_a_request_was_tried_again_are_told_apart(hub: HubProcess) -> None:
    with Peer.connect(hub.worker) as first, runs(hub, first, get(b"/again")) as consumer:
        first.close()
        with Peer.connect(hub.worker) as second:
            second.read_request()
            second.close()
            assert consumer.read_response().status == 502
    stats = hub.until(lambda stats: stats["outcomes"]["WL"])
    assert stats["requeues"] == 1
    (machine,) = stats["machines"]
    assert (machine["failures"], machine["requeues"]) == (2, 1)


def test_only_the_last_failures_of_each_code_are_kept(hub: HubProcess) -> None:
    count = pothead.LIMITS.listed_failures + 3
    with Peer.connect(hub.main) as consumer:
        for number in range(count):
            consumer.send(get(b"/%d" % number, b"Content-Length: 2g", method=b"PUT"))
            consumer.read_to_end()
            consumer.close()
            consumer = Peer.connect(hub.main)
        consumer.close()
    stats = hub.until(lambda stats: stats["outcomes"]["RQ"] == count)
    assert len(stats["failures"]) == pothead.LIMITS.listed_failures


def test_history_tells_the_peak_of_a_burst_that_is_over(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, get(b"/a")) as first, waits(hub, get(b"/b")) as second:
        slot.send(OK)
        serve(slot)
        first.read_response()
        second.read_response()
    history = hub.until(lambda stats: stats["demand"] == 0)["history"]
    assert history["step_seconds"] == pothead.LIMITS.history_step_s
    for name in ("queue_length", "slots_busy", "slots"):
        assert 1 <= len(history[name]) < pothead.LIMITS.history_steps
        assert max(history[name]) == 1


STEP_S = pothead.LIMITS.history_step_s
STEPS = pothead.LIMITS.history_steps


def test_history_is_as_before_where_nothing_changed() -> None:
    history = pothead.History(1000.0)
    history.note(1000.0 + 2 * STEP_S, (3, 1, 1))
    history.note(1000.1 + 2 * STEP_S, (2, 1, 1))
    steps = history.read(1000.0 + 4 * STEP_S)
    assert steps == [(0, 0, 0), (0, 0, 0), (3, 1, 1), (2, 1, 1), (2, 1, 1)]


def test_history_of_a_step_includes_what_it_began_with() -> None:
    history = pothead.History(0.0)
    history.note(1.0, (5, 2, 2))
    history.note(1.0 + STEP_S, (0, 0, 2))
    assert history.read(1.0 + 2 * STEP_S) == [(5, 2, 2), (5, 2, 2), (0, 0, 2)]


def test_history_reaches_back_ten_minutes_and_no_further() -> None:
    assert STEP_S * STEPS == 600
    history = pothead.History(0.0)
    for step in range(3 * STEPS):
        history.note(step * STEP_S, (step, 0, 0))
    end = 3 * STEPS - 1
    steps = history.read(end * STEP_S)
    assert [each[0] for each in steps] == list(range(end - STEPS + 1, end + 1))
    assert history.read((end + 10 * STEPS) * STEP_S) == [(end, 0, 0)] * STEPS


def test_rate_is_that_of_the_last_minute() -> None:
    rate = pothead.Rate(1000.0)
    assert rate.read(1000.0) == 0
    for _ in range(10):
        rate.count(1001.0)
    assert rate.read(1002.0) == 10 / STEP_S, "too low rather than wild"
    assert rate.read(1030.0) == pytest.approx(10 / 30)
    for second in range(1060, 1180):
        rate.count(second)
        rate.count(second)
    assert rate.read(1180.0) == pytest.approx(2, rel=0.1)
    assert rate.read(1300.0) == 0


def test_stats_tell_requests_a_second_and_what_bodies_take(hub: HubProcess) -> None:
    assert hub.stats()["requests_per_second"] == 0
    with Peer.connect(hub.main) as consumer:
        consumer.send(b"garbage\r\n\r\n")
        consumer.read_to_end()
    with waits(hub, post(b"/", b"x" * 1000, method=b"PUT")):
        stats = hub.until(lambda stats: stats["requests_per_second"])
        assert 0 < stats["requests_per_second"] <= 1 / STEP_S
        assert stats["spool_memory_bytes"] == 1000
        assert stats["memory_budget_bytes"] == pothead.Options().memory_budget
        assert stats["spool_disk_bytes"] == 0


def test_durations_are_put_into_buckets_and_the_last_are_summed_up() -> None:
    durations = pothead.Durations()
    assert durations.summary() == {"median": None, "p99": None, "of_last": 0}
    for seconds in (0.005, 0.0051, 7200.0):
        durations.add(seconds)
    assert [durations.counts[0], durations.counts[1], durations.counts[-1]] == [1, 1, 1]
    assert sum(durations.counts) == 3
    for number in range(pothead.LIMITS.timed_exchanges):
        durations.add(float(number))
    assert durations.summary() == {"median": 500.0, "p99": 989.0, "of_last": 1000}


# ---- Metrics -----------------------------------------------------------------------------------------


NAMES = {
    "pothead_hub_turned_away": "counter",
    "pothead_hub_certificate_expiry_timestamp_seconds": "gauge",
    "pothead_hub_worker_requests": "counter",
    "pothead_hub_refused_workers": "counter",
    "pothead_hub_queue_length": "gauge",
    "pothead_hub_queue_oldest_seconds": "gauge",
    "pothead_hub_requests_in_flight": "gauge",
    "pothead_hub_slots": "gauge",
    "pothead_hub_demand": "gauge",
    "pothead_hub_paused": "gauge",
    "pothead_hub_connections": "gauge",
    "pothead_hub_spool_bytes": "gauge",
    "pothead_hub_disk_budget_bytes": "gauge",
    "pothead_build_info": "gauge",
    "pothead_hub_queue_seconds": "histogram",
    "pothead_hub_worker_seconds": "histogram",
    "pothead_hub_requests": "counter",
    "pothead_hub_worker_errors": "counter",
    "pothead_hub_requeues": "counter",
    "pothead_hub_rejected": "counter",
    "pothead_hub_bytes": "counter",
}


class Metrics(dict[str, float]):
    """The samples of a scrape, by name and labels; `types` are those of the metrics."""

    def __init__(self, text: str) -> None:
        parser = pytest.importorskip("prometheus_client.parser")
        super().__init__()
        self.types = {}
        for family in parser.text_string_to_metric_families(text):
            self.types[family.name] = family.type
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                self[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value


# What prometheus_client itself tells of a process on Linux.
PROCESS = {
    "process_virtual_memory_bytes": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
    "process_cpu_seconds": "counter",
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
}


def scrape(hub: HubProcess) -> Metrics:
    pytest.importorskip("prometheus_client")
    response = hub.ask_admin(b"/metrics")
    assert response.status == 200, response
    assert (response.value(b"Content-Type") or b"").startswith(b"text/plain; version=")
    return Metrics(response.body.decode())


def test_metrics_have_the_names_and_types_that_are_promised(hub: HubProcess) -> None:
    assert scrape(hub).types == {**NAMES, **PROCESS}


def test_metrics_of_the_process_are_the_hubs_and_do_not_begin_again(hub: HubProcess) -> None:
    first, second = scrape(hub), scrape(hub)
    assert first["process_start_time_seconds"] == second["process_start_time_seconds"]
    assert 0 < first["process_cpu_seconds_total"] <= second["process_cpu_seconds_total"]
    assert first["process_resident_memory_bytes"] == pytest.approx(wire.resident_kib(hub.pid) * 1024, rel=0.2)


def test_metrics_tell_who_is_connected_and_what_bodies_take(hub: HubProcess) -> None:
    with Peer.connect(hub.main), Peer.connect(hub.worker), Peer.connect(hub.worker):
        hub.until(lambda stats: stats["slots"]["idle"] == 2)
        act(hub, b"/pause")
        with waits(hub, post(b"/", b"x" * 1000, method=b"PUT")):
            metrics = scrape(hub)
    kinds = ("consumers", "workers", "admin")
    assert [metrics[f"pothead_hub_connections{{kind={kind}}}"] for kind in kinds] == [2, 2, 1]
    assert metrics["pothead_hub_spool_bytes{where=memory}"] == 1000
    assert metrics["pothead_hub_spool_bytes{where=disk}"] == 0


def test_metrics_tell_what_waits_and_what_runs(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, get(b"/a")), waits(hub, get(b"/b")), Peer.connect(hub.worker) as other:
        with other:
            serve(other)
        act(hub, b"/pause")
        with waits(hub, get(b"/c")):
            metrics = scrape(hub)
    assert metrics["pothead_hub_queue_length"] == metrics["pothead_hub_requests_in_flight"] == 1
    assert metrics["pothead_hub_queue_oldest_seconds"] >= 0
    assert metrics["pothead_hub_demand"] == 2
    assert metrics["pothead_hub_paused"] == 1
    assert metrics["pothead_hub_slots{state=busy}"] == 1


def test_metrics_count_requests_by_method_status_and_code(hub: HubProcess, slot: Peer) -> None:
    with Peer.connect(hub.main) as consumer:
        for method in (b"GET", b"PUT", b"BREW", b"x-any-word"):
            consumer.send(post(b"/", b"1234", method=method))
            serve(slot, b"HTTP/1.1 418 Short\r\nContent-Length: 2\r\n\r\nok")
            consumer.read_response()
    with Peer.connect(hub.main) as consumer:
        consumer.send(b"garbage\r\n\r\n")
        consumer.read_to_end()
    hub.until(lambda stats: stats["outcomes"]["RQ"] and stats["outcomes"]["OK"] == 4)
    metrics = scrape(hub)
    counts = {key: value for key, value in metrics.items() if key.startswith("pothead_hub_requests_total")}
    assert counts == {
        "pothead_hub_requests_total{code=OK,method=GET,status=418}": 1,
        "pothead_hub_requests_total{code=OK,method=PUT,status=418}": 1,
        "pothead_hub_requests_total{code=OK,method=other,status=418}": 2,
        "pothead_hub_requests_total{code=RQ,method=other,status=400}": 1,
    }
    assert metrics["pothead_hub_bytes_total{direction=in}"] == 16
    assert metrics["pothead_hub_bytes_total{direction=out}"] == 8
    rejected = {key: value for key, value in metrics.items() if key.startswith("pothead_hub_rejected_total")}
    assert rejected == {
        f"pothead_hub_rejected_total{{reason={reason}}}": float(reason == "refused")
        for reason in ("queue_full", "queue_timeout", "queue_too_long", "draining", "refused")
    }


def test_metrics_count_errors_of_the_app_by_status(hub: HubProcess, slot: Peer) -> None:
    with Peer.connect(hub.main) as consumer:
        for status in (b"200 OK", b"503 Busy", b"500 Oops", b"503 Busy"):
            consumer.send(get(b"/"))
            serve(slot, b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
            consumer.read_response()
    hub.until(lambda stats: stats["outcomes"]["OK"] == 4)
    metrics = scrape(hub)
    errors = {key: value for key, value in metrics.items() if "worker_errors_total" in key}
    assert errors == {
        "pothead_hub_worker_errors_total{status=500}": 1,
        "pothead_hub_worker_errors_total{status=503}": 2,
    }


def test_histograms_count_what_was_queued_and_what_was_worked(slot: Peer, hub: HubProcess) -> None:
    with runs(hub, slot, get(b"/a")) as consumer:
        with waits(hub, get(b"/gives-up")):
            pass
        hub.until(lambda stats: stats["outcomes"]["CQ"])
        slot.send(OK)
        consumer.read_response()
    hub.until(lambda stats: stats["demand"] == 0)
    metrics = scrape(hub)
    assert (
        metrics["pothead_hub_queue_seconds_count"]
        == metrics["pothead_hub_queue_seconds_bucket{le=+Inf}"]
        == 2
    )
    assert (
        metrics["pothead_hub_worker_seconds_count"]
        == metrics["pothead_hub_worker_seconds_bucket{le=1800.0}"]
        == 1
    )
    assert 0 < metrics["pothead_hub_worker_seconds_sum"] < wire.DEADLINE_S
    bounds = [key for key in metrics if key.startswith("pothead_hub_worker_seconds_bucket")]
    assert len(bounds) == 18


def test_promtool_finds_nothing_to_complain_of(hub: HubProcess, slot: Peer) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool (Debian: prometheus) is not installed")
    pytest.importorskip("prometheus_client")
    with Peer.connect(hub.main) as consumer:
        consumer.send(get(b"/"))
        serve(slot)
        consumer.read_response()
    text = hub.ask_admin(b"/metrics").body
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


# ---- Actions -----------------------------------------------------------------------------------------


def test_paused_hub_starts_nothing_until_it_is_resumed(hub: HubProcess, slot: Peer) -> None:
    hub.until(lambda stats: stats["slots"]["idle"] == 1)
    assert act(hub, b"/pause") == (200, b"paused\n")
    assert act(hub, b"/pause") == (200, b"paused\n")
    with waits(hub, get(b"/a")) as consumer:
        stats = hub.stats()
        assert (stats["paused"], stats["slots"]) == (True, {"idle": 1, "busy": 0})
        assert hub.ask_admin(b"/readyz").status == 200
        assert act(hub, b"/resume") == (200, b"resumed\n")
        assert serve(slot).target == b"/a"
        assert consumer.read_response().status == 200
    assert hub.stats()["paused"] is False


def test_pause_lets_running_requests_go_on(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, get(b"/a")) as first, waits(hub, get(b"/b")) as second:
        act(hub, b"/pause")
        slot.send(OK)
        assert first.read_response().status == 200
        hub.until(lambda stats: stats["slots"]["idle"] == 1 and stats["queue_length"] == 1)
        act(hub, b"/resume")
        serve(slot)
        assert second.read_response().status == 200


def test_requests_time_out_while_the_hub_is_paused() -> None:
    with hub_process("--queue-timeout", "200ms") as hub, Peer.connect(hub.worker):
        act(hub, b"/pause")
        with Peer.connect(hub.main) as consumer:
            consumer.send(get(b"/"))
            assert consumer.read_response().status == 503
        logged(hub, "QT")


def test_full_queue_of_a_paused_hub_refuses_more() -> None:
    with hub_process("--max-queue", "1") as hub, Peer.connect(hub.worker):
        act(hub, b"/pause")
        with waits(hub, get(b"/")), Peer.connect(hub.main) as consumer:
            consumer.send(get(b"/"))
            assert consumer.read_response().status == 503
            logged(hub, "QF")


def test_drain_by_the_admin_port_finishes_what_there_is_even_if_paused(hub: HubProcess, slot: Peer) -> None:
    act(hub, b"/pause")
    with waits(hub, get(b"/")) as consumer:
        assert act(hub, b"/drain") == (202, b"draining\n")
        assert act(hub, b"/pause") == (409, b"draining: too late for a pause\n")
        serve(slot)
        assert consumer.read_response().status == 200
    assert hub.wait() == 0


def test_drain_of_an_idle_hub_is_answered_before_it_ends(hub: HubProcess) -> None:
    assert act(hub, b"/drain") == (202, b"draining\n")
    assert hub.wait() == 0


def test_cancelled_request_that_waits_gets_503_and_no_worker_sees_it(hub: HubProcess) -> None:
    with waits(hub, get(b"/a", b"X-Request-Id: a1")) as consumer, waits(hub, get(b"/b")) as other:
        assert act(hub, b"/requests/a1/cancel") == (200, b"cancelled 1\n")
        response = consumer.read_response()
        assert response.status == 503
        assert response.value(b"Retry-After") is None
        assert b"an operator cancelled the request" in response.body
        assert "id=a1 " in logged(hub, "AC")
        with Peer.connect(hub.worker) as slot:
            assert serve(slot).target == b"/b"
            assert other.read_response().status == 200
            consumer.send(get(b"/again"))
            serve(slot)
            assert consumer.read_response().status == 200
        assert act(hub, b"/requests/a1/cancel") == (404, b"no such request, or it has ended\n")


def test_cancelled_request_that_runs_gets_503_and_its_worker_is_told(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, get(b"/", b"X-Request-Id: r1", method=b"POST")) as consumer:
        assert act(hub, b"/requests/r1/cancel")[0] == 200
        assert consumer.read_response().status == 503
        slot.expect_eof()
    assert " status=503 " in logged(hub, "AC")


def test_cancelled_request_whose_response_has_begun_is_cut(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, get(b"/", b"X-Request-Id: r1")) as consumer:
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1234")
        consumer.read_until(b"1234")
        act(hub, b"/requests/r1/cancel")
        consumer.expect_eof()
        slot.expect_eof()
    assert " status=200 " in logged(hub, "AC")


def test_request_whose_body_is_still_coming_can_be_cancelled(hub: HubProcess) -> None:
    with Peer.connect(hub.main) as consumer:
        head = get(b"/", b"X-Request-Id: r1", b"Content-Length: 100", b"Expect: 100-continue", method=b"PUT")
        consumer.send(head)
        consumer.expect(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert act(hub, b"/requests/r1/cancel")[0] == 200
        assert consumer.read_response().status == 503
        consumer.expect_eof()


def test_all_requests_with_the_same_id_are_cancelled_whatever_it_looks_like(hub: HubProcess) -> None:
    for given in (b"../../drain", b"a/b=c+d@e:f~", b"%b" % (b"x" * 128)):
        lines = (b"X-Request-Id: %b" % given,)
        path = b"/requests/%b/cancel" % b"".join(b"%%%02X" % byte for byte in given)
        with waits(hub, get(b"/", *lines)) as first, waits(hub, get(b"/", *lines)) as second:
            assert act(hub, path) == (200, b"cancelled 2\n")
            assert first.read_response().status == second.read_response().status == 503
    assert hub.stats()["draining"] is False


@pytest.mark.parametrize(
    "path", [b"/requests/%FF%00/cancel", b"/requests//cancel", b"/requests/x", b"/cancel"]
)
def test_nonsense_cancels_nothing(hub: HubProcess, path: bytes) -> None:
    with waits(hub, get(b"/")):
        assert act(hub, path)[0] == 404
        assert hub.stats()["queue_length"] == 1


def test_program_around_a_hub_pauses_cancels_and_resumes() -> None:
    lines: list[str] = []
    options = pothead.Options(main_port=0, worker_port=0, admin_port=None)
    hub = pothead.Hub(options, lines.append)
    thread = threading.Thread(target=hub.run)
    thread.start()
    try:
        addresses = {name: text.rpartition(":") for name, text in hub.addresses.items() if text}
        main, worker = ((host, int(port)) for host, _, port in (addresses["consumers"], addresses["workers"]))
        hub.pause()
        with Peer.connect(worker) as slot, Peer.connect(main) as consumer:
            consumer.send(get(b"/", b"X-Request-Id: one"))
            wire.until(lambda: hub.policy.waiting)
            hub.cancel("one")
            assert consumer.read_response().status == 503
            consumer.send(get(b"/"))
            hub.resume()
            serve(slot)
            assert consumer.read_response().status == 200
    finally:
        hub.stop()
        thread.join()
