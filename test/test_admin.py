"""The admin port in bytes: who may ask, what /stats and /metrics tell, and what can be done there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

import pothead
import wire
from wire import HubProcess, Peer, hub_process

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
YES = b"Pothead-Action: yes"


# ---- Helpers -----------------------------------------------------------------------------------------


def request(
    path: bytes, *lines: bytes, method: bytes = b"GET", host: bytes = b"localhost", body: bytes = b""
) -> bytes:
    if body:
        lines = (*lines, b"Content-Length: %d" % len(body))
    head = (b"%b %b HTTP/1.1" % (method, path), b"Host: %b" % host, *lines)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def ask_admin(hub: HubProcess, path: bytes, *lines: bytes, method: bytes = b"GET") -> wire.Response:
    with Peer.connect(hub.admin) as admin:
        admin.send(request(path, *lines, method=method))
        return admin.read_response(method)


def act(hub: HubProcess, path: bytes, *lines: bytes) -> tuple[int, bytes]:
    """Post to an action; return status and body."""
    response = ask_admin(hub, path, *(lines or (YES,)), method=b"POST")
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


def serve(slot: Peer, response: bytes = OK) -> wire.Request:
    taken = slot.read_request()
    slot.send(response)
    return taken


def logged(hub: HubProcess, code: str) -> str:
    return hub.wait_for_line(lambda line: f" code={code}" in line)


# ---- Who may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", [b"127.0.0.1", b"10.1.2.3:4041", b"[::1]:4041", b"localhost:1", b"LocalHost.", b""]
)
def test_admin_port_may_be_called_by_address_and_as_localhost(hub: HubProcess, host: bytes) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(request(b"/livez", host=host))
        assert admin.read_response().status == 200


@pytest.mark.parametrize(
    "host", [b"evil.example", b"127.0.0.1.evil.example", b"localhost.evil.example:80", b"2130706433"]
)
@pytest.mark.parametrize("path", [b"/", b"/stats", b"/metrics", b"/livez", b"/nowhere"])
def test_admin_port_refuses_a_name_that_it_was_not_told(hub: HubProcess, host: bytes, path: bytes) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(request(path, host=host))
        response = admin.read_response()
        assert response.status == 421
        assert response.body == b"this name is not among --admin-allowed-hosts: %b\n" % host


def test_action_by_a_foreign_name_is_refused(hub: HubProcess) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(request(b"/pause", YES, method=b"POST", host=b"evil.example"))
        assert admin.read_response().status == 421
    assert hub.stats()["paused"] is False


def test_admin_port_may_be_called_by_the_names_that_it_was_told() -> None:
    with hub_process("--admin-allowed-hosts", "hub.example, Hub") as hub:
        for host, status in ((b"HUB.example.:80", 200), (b"hub", 200), (b"hub.example.org", 421)):
            with Peer.connect(hub.admin) as admin:
                admin.send(request(b"/livez", host=host))
                assert admin.read_response().status == status


@pytest.mark.parametrize("name", ["http://hub", "hub:4041", "*", "a b"])
def test_allowed_hosts_are_names_and_nothing_else(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--admin-allowed-hosts is no host name: "):
        pothead.Options(admin_allowed_hosts=(name,))


@pytest.mark.parametrize("path", [b"/", b"/stats", b"/metrics", b"/livez", b"/readyz"])
def test_what_can_be_looked_at_takes_get_and_head(hub: HubProcess, path: bytes) -> None:
    got, head = ask_admin(hub, path), ask_admin(hub, path, method=b"HEAD")
    assert got.status == head.status
    assert got.body and not head.body
    for method in (b"POST", b"PUT", b"DELETE", b"OPTIONS", b"BREW"):
        response = ask_admin(hub, path, YES, method=method)
        assert (response.status, response.value(b"Allow")) == (405, b"GET, HEAD")


@pytest.mark.parametrize("path", [b"/drain", b"/pause", b"/resume", b"/requests/x/cancel"])
def test_actions_take_post_alone_and_only_on_purpose(hub: HubProcess, path: bytes) -> None:
    for method in (b"GET", b"HEAD", b"PUT", b"OPTIONS"):
        response = ask_admin(hub, path, YES, method=method)
        assert (response.status, response.value(b"Allow")) == (405, b"POST")
    assert act(hub, path, b"X-Nothing: 1") == (403, b"this needs the field Pothead-Action: yes\n")
    for lines in (
        [b"Pothead-Action: no"],
        [YES, b"Sec-Fetch-Site: cross-site"],
        [YES, b"Sec-Fetch-Site: same-site"],
    ):
        assert act(hub, path, *lines)[0] == 403
    stats = hub.stats()
    assert (stats["paused"], stats["draining"]) == (False, False)


def test_action_takes_no_body(hub: HubProcess) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(request(b"/pause", YES, method=b"POST", body=b"a=b"))
        assert admin.read_response().status == 413
    assert hub.stats()["paused"] is False
    assert act(hub, b"/pause", YES, b"Content-Length: 0", b"Sec-Fetch-Site: same-origin")[0] == 200


@pytest.mark.parametrize("data", [request(b"/stats"), request(b"/nowhere"), request(b"/", method=b"TRACE")])
def test_every_answer_forbids_guessing_keeping_and_telling(hub: HubProcess, data: bytes) -> None:
    with Peer.connect(hub.admin) as admin:
        admin.send(data)
        response = admin.read_response()
    assert response.value(b"X-Content-Type-Options") == b"nosniff"
    assert response.value(b"Cache-Control") == b"no-store"
    assert response.value(b"Referrer-Policy") == b"no-referrer"
    assert response.value(b"Access-Control-Allow-Origin") is None


# ---- The page ----------------------------------------------------------------------------------------


def test_page_lets_in_its_own_style_and_script_and_nothing_else(hub: HubProcess) -> None:
    response = ask_admin(hub, b"/")
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
        first.send(request(b"/first"))
        serve(slot)
        first.read_response()
        mean_s = hub.until(lambda stats: stats["mean_service_seconds"])["mean_service_seconds"]
        with runs(hub, slot, request(b"/a")), waits(hub, request(b"/b")), waits(hub, request(b"/c")):
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
            stack.enter_context(Peer.connect(hub.main)).send(request(path))
        stats = hub.until(lambda stats: stats["demand"] == 2 * rows + 12)
    for name, left in (("waiting", 7), ("running", 5), ("workers", 5)):
        assert (len(stats[name]), stats[f"{name}_not_listed"]) == (rows, left)
    assert stats["waiting"][0]["path"] == "/" + "a" * (pothead.LIMITS.listed_path_bytes - 1) + "…"


def test_failures_are_told_in_plain_words_and_counted_for_their_machine(hub: HubProcess) -> None:
    with Peer(socket.create_connection(hub.worker, wire.DEADLINE_S, ("127.0.0.1", 0))) as slot:
        with runs(hub, slot, request(b"/fails?secret", b"X-Request-Id: f1", method=b"POST")) as consumer:
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
            consumer.send(request(b"/%d" % number))
            serve(slot, b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
            consumer.read_response()
    stats = hub.until(lambda stats: stats["outcomes"]["OK"] == len(statuses))
    assert stats["worker_errors"] == {"500": 2, "504": 1}
    assert [(row["path"], row["status"], row["code"], row["meaning"]) for row in stats["failures"]] == [
        (path, status, "OK", "the app answered with an error")
        for path, status in (("/4", 500), ("/3", 504), ("/2", 500))
    ]


def test_consumers_who_leave_do_not_push_out_the_real_failures(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, request(b"/lost", method=b"POST")) as consumer:
        slot.close()
        assert consumer.read_response().status == 502
    count = 2 * pothead.LIMITS.listed_failures
    for number in range(1, count + 1):
        with waits(hub, request(b"/leaves-%d" % number)):
            pass
        hub.until(lambda stats, number=number: stats["outcomes"]["CQ"] == number)
    *left, lost = hub.stats()["failures"]
    assert (lost["code"], lost["path"]) == ("WL", "/lost")
    kept = range(count, pothead.LIMITS.listed_failures, -1)
    assert [row["path"] for row in left] == [f"/leaves-{number}" for number in kept]


def test_failures_of_a_machine_after_which_a_request_was_tried_again_are_told_apart(hub: HubProcess) -> None:
    with Peer.connect(hub.worker) as first, runs(hub, first, request(b"/again")) as consumer:
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
            consumer.send(request(b"/%d" % number, b"Content-Length: 2g", method=b"PUT"))
            consumer.read_to_end()
            consumer.close()
            consumer = Peer.connect(hub.main)
        consumer.close()
    stats = hub.until(lambda stats: stats["outcomes"]["RQ"] == count)
    assert len(stats["failures"]) == pothead.LIMITS.listed_failures


def test_history_tells_the_peak_of_a_burst_that_is_over(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, request(b"/a")) as first, waits(hub, request(b"/b")) as second:
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
    with waits(hub, request(b"/", method=b"PUT", body=b"x" * 1000)):
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
    response = ask_admin(hub, b"/metrics")
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
        with waits(hub, request(b"/", method=b"PUT", body=b"x" * 1000)):
            metrics = scrape(hub)
    kinds = ("consumers", "workers", "admin")
    assert [metrics[f"pothead_hub_connections{{kind={kind}}}"] for kind in kinds] == [2, 2, 1]
    assert metrics["pothead_hub_spool_bytes{where=memory}"] == 1000
    assert metrics["pothead_hub_spool_bytes{where=disk}"] == 0


def test_metrics_tell_what_waits_and_what_runs(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, request(b"/a")), waits(hub, request(b"/b")), Peer.connect(hub.worker) as other:
        with other:
            serve(other)
        act(hub, b"/pause")
        with waits(hub, request(b"/c")):
            metrics = scrape(hub)
    assert metrics["pothead_hub_queue_length"] == metrics["pothead_hub_requests_in_flight"] == 1
    assert metrics["pothead_hub_queue_oldest_seconds"] >= 0
    assert metrics["pothead_hub_demand"] == 2
    assert metrics["pothead_hub_paused"] == 1
    assert metrics["pothead_hub_slots{state=busy}"] == 1


def test_metrics_count_requests_by_method_status_and_code(hub: HubProcess, slot: Peer) -> None:
    with Peer.connect(hub.main) as consumer:
        for method in (b"GET", b"PUT", b"BREW", b"x-any-word"):
            consumer.send(request(b"/", method=method, body=b"1234"))
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
            consumer.send(request(b"/"))
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
    with runs(hub, slot, request(b"/a")) as consumer:
        with waits(hub, request(b"/gives-up")):
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
        consumer.send(request(b"/"))
        serve(slot)
        consumer.read_response()
    text = ask_admin(hub, b"/metrics").body
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


# ---- Actions -----------------------------------------------------------------------------------------


def test_paused_hub_starts_nothing_until_it_is_resumed(hub: HubProcess, slot: Peer) -> None:
    hub.until(lambda stats: stats["slots"]["idle"] == 1)
    assert act(hub, b"/pause") == (200, b"paused\n")
    assert act(hub, b"/pause") == (200, b"paused\n")
    with waits(hub, request(b"/a")) as consumer:
        stats = hub.stats()
        assert (stats["paused"], stats["slots"]) == (True, {"idle": 1, "busy": 0})
        assert ask_admin(hub, b"/readyz").status == 200
        assert act(hub, b"/resume") == (200, b"resumed\n")
        assert serve(slot).target == b"/a"
        assert consumer.read_response().status == 200
    assert hub.stats()["paused"] is False


def test_pause_lets_running_requests_go_on(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, request(b"/a")) as first, waits(hub, request(b"/b")) as second:
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
            consumer.send(request(b"/"))
            assert consumer.read_response().status == 503
        logged(hub, "QT")


def test_full_queue_of_a_paused_hub_refuses_more() -> None:
    with hub_process("--max-queue", "1") as hub, Peer.connect(hub.worker):
        act(hub, b"/pause")
        with waits(hub, request(b"/")), Peer.connect(hub.main) as consumer:
            consumer.send(request(b"/"))
            assert consumer.read_response().status == 503
            logged(hub, "QF")


def test_drain_by_the_admin_port_finishes_what_there_is_even_if_paused(hub: HubProcess, slot: Peer) -> None:
    act(hub, b"/pause")
    with waits(hub, request(b"/")) as consumer:
        assert act(hub, b"/drain") == (202, b"draining\n")
        assert act(hub, b"/pause") == (409, b"draining: too late for a pause\n")
        serve(slot)
        assert consumer.read_response().status == 200
    assert hub.wait() == 0


def test_drain_of_an_idle_hub_is_answered_before_it_ends(hub: HubProcess) -> None:
    assert act(hub, b"/drain") == (202, b"draining\n")
    assert hub.wait() == 0


def test_cancelled_request_that_waits_gets_503_and_no_worker_sees_it(hub: HubProcess) -> None:
    with waits(hub, request(b"/a", b"X-Request-Id: a1")) as consumer, waits(hub, request(b"/b")) as other:
        assert act(hub, b"/requests/a1/cancel") == (200, b"cancelled 1\n")
        response = consumer.read_response()
        assert response.status == 503
        assert response.value(b"Retry-After") is None
        assert b"an operator cancelled the request" in response.body
        assert "id=a1 " in logged(hub, "AC")
        with Peer.connect(hub.worker) as slot:
            assert serve(slot).target == b"/b"
            assert other.read_response().status == 200
            consumer.send(request(b"/again"))
            serve(slot)
            assert consumer.read_response().status == 200
        assert act(hub, b"/requests/a1/cancel") == (404, b"no such request, or it has ended\n")


def test_cancelled_request_that_runs_gets_503_and_its_worker_is_told(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, request(b"/", b"X-Request-Id: r1", method=b"POST")) as consumer:
        assert act(hub, b"/requests/r1/cancel")[0] == 200
        assert consumer.read_response().status == 503
        slot.expect_eof()
    assert " status=503 " in logged(hub, "AC")


def test_cancelled_request_whose_response_has_begun_is_cut(hub: HubProcess, slot: Peer) -> None:
    with runs(hub, slot, request(b"/", b"X-Request-Id: r1")) as consumer:
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1234")
        consumer.read_until(b"1234")
        act(hub, b"/requests/r1/cancel")
        consumer.expect_eof()
        slot.expect_eof()
    assert " status=200 " in logged(hub, "AC")


def test_request_whose_body_is_still_coming_can_be_cancelled(hub: HubProcess) -> None:
    with Peer.connect(hub.main) as consumer:
        head = request(
            b"/", b"X-Request-Id: r1", b"Content-Length: 100", b"Expect: 100-continue", method=b"PUT"
        )
        consumer.send(head)
        consumer.expect(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert act(hub, b"/requests/r1/cancel")[0] == 200
        assert consumer.read_response().status == 503
        consumer.expect_eof()


def test_all_requests_with_the_same_id_are_cancelled_whatever_it_looks_like(hub: HubProcess) -> None:
    for given in (b"../../drain", b"a/b=c+d@e:f~", b"%b" % (b"x" * 128)):
        lines = (b"X-Request-Id: %b" % given,)
        path = b"/requests/%b/cancel" % b"".join(b"%%%02X" % byte for byte in given)
        with waits(hub, request(b"/", *lines)) as first, waits(hub, request(b"/", *lines)) as second:
            assert act(hub, path) == (200, b"cancelled 2\n")
            assert first.read_response().status == second.read_response().status == 503
    assert hub.stats()["draining"] is False


@pytest.mark.parametrize(
    "path", [b"/requests/%FF%00/cancel", b"/requests//cancel", b"/requests/x", b"/cancel"]
)
def test_nonsense_cancels_nothing(hub: HubProcess, path: bytes) -> None:
    with waits(hub, request(b"/")):
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
            consumer.send(request(b"/", b"X-Request-Id: one"))
            while not hub.policy.waiting:
                pass
            hub.cancel("one")
            assert consumer.read_response().status == 503
            consumer.send(request(b"/"))
            hub.resume()
            serve(slot)
            assert consumer.read_response().status == 200
    finally:
        hub.stop()
        thread.join()
