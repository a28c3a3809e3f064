"""Prometheus: what the worker and all processes of its app have counted, on one page."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pothead_worker
import wire

APP = """
    import multiprocessing, os
    from prometheus_client import Counter, Gauge, Histogram

    REQUESTS = Counter("myapp_requests", "Requests that came.", ["path"])
    JOBS = Gauge("myapp_jobs", "Jobs that run.", multiprocess_mode="livesum")
    SECONDS = Histogram("myapp_seconds", "Time that they take.")

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        REQUESTS.labels(path).inc()
        with JOBS.track_inprogress(), SECONDS.time():
            if path == "/fork":
                process = multiprocessing.get_context("fork").Process(target=REQUESTS.labels("/child").inc)
                process.start()
                process.join()
            if path == "/violate":
                return [b"before start_response"]
            if path == "/hang":
                environ["pothead.cancelled"].wait()
            if path == "/exit":
                os._exit(3)
            if path == "/quit":
                os._exit(0)
            if path == "/wait":
                environ["wsgi.input"].read()
            start_response("404 Not Found" if path == "/missing" else "200 OK", [])
            return [b"hello"]

    turns = iter(range(1_000))
    app.wait_for_slot = lambda halt: next(turns) and None
"""

PROCESSES = "--use-request-subprocess"
in_both_modes = pytest.mark.parametrize(
    "mode",
    [
        pytest.param((), id="threads"),
        pytest.param(
            (PROCESSES,),
            id="processes",
            marks=pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes need Linux"),
        ),
    ],
)
needs_prometheus = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="prometheus-client is not installed"
)


class Metered:
    """A worker with metrics, the slot that it has opened, and its page."""

    def __init__(self, worker: wire.WorkerProcess, listener: wire.Listener) -> None:
        self.worker = worker
        self.listener = listener
        line = worker.wait_for_error(lambda text: "listening metrics=*:" in text)
        self.port = int(line.rpartition(":")[2])
        self.peer = listener.accept()

    def ask(self, path: str = "/", **fields: str) -> wire.Response:
        return wire.ask(self.peer, f"GET {path}", *(f"{name}: {value}" for name, value in fields.items()))

    def reconnect(self) -> None:
        self.peer.close()
        self.peer = self.listener.accept()

    def scrape(self) -> dict[str, float]:
        response = wire.fetch(("127.0.0.1", self.port), wire.get(b"/metrics"))
        assert response.status == 200
        assert response.value(b"content-type").startswith(b"text/plain; version=")
        return samples(response.body.decode())

    def wait_for(self, name: str, value: float) -> dict[str, float]:
        """Return the first page that says so."""
        return wire.until(self.scrape, lambda page: page.get(name) == value)


def samples(page: str) -> dict[str, float]:
    """Return the values by name and labels."""
    found = re.findall(r"^([^#\s]\S*(?:\{.*\})?) (\S+)$", page, re.MULTILINE)
    assert len(found) == len(dict(found)), "a sample is there twice"
    return {name: float(value) for name, value in found}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "metrics").mkdir()
    return tmp_path / "metrics"


@pytest.fixture
def start(tmp_path: Path, directory: Path, listener: wire.Listener) -> Iterator[Callable[..., Metered]]:
    """Run a worker with metrics and further options."""
    (tmp_path / "counting.py").write_text(textwrap.dedent(APP))
    # What prometheus_client leaves open until the end is not the worker's.
    command = [*wire.python("-W", "ignore::ResourceWarning"), wire.compiled("pothead_worker")]
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(directory), "PROMETHEUS_PORT": "0"}
    with contextlib.ExitStack() as stack:

        def start(*options: str, app: str = "counting:app") -> Metered:
            arguments = [*command, "--connect", f"127.0.0.1:{listener.worker[1]}", *options, app]
            worker = wire.WorkerProcess(arguments, tmp_path, environment)
            stack.enter_context(wire.running(worker))
            metered = Metered(worker, listener)
            stack.callback(lambda: metered.peer.close())
            return metered

        yield start


# ---- The page ----------------------------------------------------------------------------------------


@needs_prometheus
@in_both_modes
def test_what_the_app_and_the_worker_have_counted_is_on_one_page(
    start: Callable[..., Metered], mode: tuple[str]
) -> None:
    metered = start(*mode)
    for path in ("/", "/", "/missing", "/violate"):
        metered.ask(path)
    page = metered.wait_for("pothead_worker_slots_busy", 0)
    counted = {name: value for name, value in page.items() if name.startswith("myapp_requests_total")}
    assert counted == {
        'myapp_requests_total{path="/"}': 2,
        'myapp_requests_total{path="/missing"}': 1,
        'myapp_requests_total{path="/violate"}': 1,
    }
    assert (page["myapp_jobs"], page["myapp_seconds_count"]) == (0, 4)
    assert {name: value for name, value in page.items() if "worker_requests_total" in name} == {
        'pothead_worker_requests_total{status="200"}': 2,
        'pothead_worker_requests_total{status="404"}': 1,
        'pothead_worker_requests_total{status="500"}': 1,
    }
    assert (page["pothead_worker_slots"], page["pothead_worker_request_seconds_count"]) == (1, 4)


@needs_prometheus
@in_both_modes
def test_running_request_is_on_the_page(start: Callable[..., Metered], mode: tuple[str]) -> None:
    metered = start(*mode)
    metered.peer.send(b"GET /wait HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
    metered.wait_for("myapp_jobs", 1)  # a page is read file by file: the next one has all of it
    page = metered.wait_for('myapp_requests_total{path="/wait"}', 1)
    assert page["pothead_worker_slots_busy"] == 1
    metered.peer.send(b"x")
    assert metered.peer.read_response().status == 200
    metered.wait_for("pothead_worker_slots_busy", 0)


@needs_prometheus
def test_consumer_that_leaves_and_process_that_dies_have_a_status_too(start: Callable[..., Metered]) -> None:
    metered = start(PROCESSES, "--request-timeout", "1s")
    metered.ask("/")
    for path in (b"/exit", b"/quit"):
        metered.peer.send(wire.get(path))
        metered.peer.expect_eof()
        metered.reconnect()
    assert metered.ask("/hang").status == 504
    metered.reconnect()
    metered.peer.send(wire.get(b"/hang"))
    metered.wait_for("pothead_worker_slots_busy", 1)
    metered.reconnect()
    page = metered.wait_for('pothead_worker_requests_total{status="499"}', 1)
    counted = {name[-5:-2]: value for name, value in page.items() if "worker_requests_total" in name}
    assert counted == {"200": 1, "499": 1, "502": 2, "504": 1}
    assert page['myapp_requests_total{path="/hang"}'] == 2


@needs_prometheus
def test_time_at_the_gate_is_counted(start: Callable[..., Metered]) -> None:
    metered = start("--poll-jobs")
    assert metered.ask().status == 200
    metered.reconnect()
    assert metered.scrape()["pothead_worker_gate_seconds_count"] == 2


@needs_prometheus
@in_both_modes
def test_processes_that_the_app_starts_are_counted_and_leave_no_file(
    start: Callable[..., Metered], directory: Path, mode: tuple[str]
) -> None:
    metered = start(*mode)
    assert [metered.ask("/fork").status for _ in range(3)] == [200] * 3
    page = metered.wait_for("pothead_worker_slots_busy", 0)
    assert (page['myapp_requests_total{path="/fork"}'], page['myapp_requests_total{path="/child"}']) == (3, 3)
    assert metered.scrape() == page
    pids = {path.stem.rpartition("_")[2] for path in directory.glob("*.db")}
    assert len(pids) == (2 if not mode else 3), "the worker, its fork server, and those that have ended"


@needs_prometheus
def test_many_processes_lose_no_count_and_leave_no_files(
    start: Callable[..., Metered], directory: Path
) -> None:
    """`bench/metrics.py` does the same with 10,000 requests."""
    metered = start(PROCESSES)
    for _ in range(10):
        metered.ask()
    metered.wait_for("pothead_worker_slots_busy", 0)
    files_after_10 = sorted(directory.iterdir())
    for _ in range(190):
        metered.ask()
    page = metered.wait_for("pothead_worker_slots_busy", 0)
    assert page['myapp_requests_total{path="/"}'] == page["myapp_seconds_count"] == 200
    assert page['pothead_worker_requests_total{status="200"}'] == 200
    assert sorted(directory.iterdir()) == files_after_10


@needs_prometheus
def test_unreadable_file_of_an_ended_process_is_logged_and_harms_nothing_else(
    start: Callable[..., Metered], directory: Path
) -> None:
    metered = start()
    metered.ask()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (directory / f"counter_{ended.pid}.db").write_bytes(b"\xff\xff\xff\x7f garbage")
    assert metered.scrape()['myapp_requests_total{path="/"}'] == 1
    metered.worker.wait_for_error(lambda line: "metrics of an ended process are lost" in line)
    assert not (directory / f"counter_{ended.pid}.db").exists()


@needs_prometheus
def test_file_that_is_just_being_made_does_not_spoil_the_page(
    start: Callable[..., Metered], directory: Path
) -> None:
    metered = start()
    metered.ask()
    (directory / f"counter_{os.getpid()}.db").touch()  # as of a process that lives
    assert metered.scrape()['myapp_requests_total{path="/"}'] == 1


# What a process has in all kinds of metrics is the same on the page before and after its end.
MERGING = """
    import os, socket, sys
    sys.path.insert(0, sys.argv[1])
    import pothead_worker
    metrics = pothead_worker.PrometheusMetrics(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    from prometheus_client import Counter, Gauge, Histogram, Summary

    counter, histogram, summary = Counter("c", "."), Histogram("h", "."), Summary("s", ".")
    modes = ("max", "min", "sum", "mostrecent", "all", "liveall")
    gauges = [Gauge("g_" + mode, ".", multiprocess_mode=mode) for mode in modes]
    pids = []
    for number in (3, 1, 2):
        pid = os.fork()
        if pid == 0:
            counter.inc(number)
            histogram.observe(number)
            summary.observe(number)
            for gauge in gauges:
                gauge.set(number)
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        pids.append(pid)
    one, two = socket.socketpair()
    before = metrics.page(one).body
    for pid in pids:
        metrics.merge_ended(pid)
    after = metrics.page(one).body
    print(before.decode() + "====\\n" + after.decode(), end="")
"""


@needs_prometheus
def test_all_kinds_of_metrics_are_merged_as_they_are_shown(directory: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", textwrap.dedent(MERGING), str(wire.ROOT)]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    before, after = map(samples, output.split("====\n"))
    assert any("g_all" in name for name in before)
    ending = ("g_all", "g_liveall", "pothead_")  # they tell of a process that lives
    shown = {name: value for name, value in after.items() if not name.startswith(ending)}
    assert shown == {name: value for name, value in before.items() if not name.startswith(ending)}
    assert (shown["c_total"], shown["h_sum"], shown["s_count"], shown["g_max"]) == (6, 6, 3, 3)
    assert (shown["g_min"], shown["g_sum"], shown["g_mostrecent"]) == (0, 6, 2)  # 0: of the parent


# ---- The directory -----------------------------------------------------------------------------------


@needs_prometheus
def test_directory_is_emptied_of_old_metrics_before_the_app_is_imported(
    start: Callable[..., Metered], directory: Path, tmp_path: Path
) -> None:
    (directory / "counter_1.db").write_bytes(b"from the run before")
    (directory / "notes.txt").write_bytes(b"not metrics")
    (tmp_path / "looking.py").write_text(
        "import os\n"
        "seen = ' '.join(sorted(os.listdir(os.environ['PROMETHEUS_MULTIPROC_DIR'])))\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [seen.encode()]\n"
    )
    seen = start(app="looking:app").ask().body.decode().split()
    assert "counter_1.db" not in seen and "notes.txt" in seen


@needs_prometheus
def test_directory_of_a_worker_that_runs_is_refused_and_left_alone(
    start: Callable[..., Metered], directory: Path, tmp_path: Path
) -> None:
    metered = start()
    metered.ask()
    command = wire.python(wire.compiled("pothead_worker"), "--connect", "127.0.0.1:1")
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(directory), "PROMETHEUS_PORT": "0"}
    for options, status in ((["--check"], 0), ([], 2)):
        second = wire.Program([*command, *options, "counting:app"], tmp_path, environment)
        assert second.wait() == status, second.stderr
        second.stop()
    assert second.errors == [
        f"pothead-worker: PROMETHEUS_MULTIPROC_DIR: another worker counts in {str(directory)!r}; "
        "each needs a directory of its own"
    ]
    assert metered.scrape()['myapp_requests_total{path="/"}'] == 1


@needs_prometheus
def test_directory_is_free_when_its_worker_is_killed_whatever_the_app_has_forked(
    start: Callable[..., Metered], tmp_path: Path
) -> None:
    (tmp_path / "forking.py").write_text(
        "import os, time\n"
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [b'%d' % (os.fork() or time.sleep(60) or os._exit(0))]\n"
    )
    metered = start(app="forking:app")
    child = int(metered.ask().body)
    try:
        metered.worker.kill()
        metered.worker.process.wait(wire.DEADLINE_S)  # its output stays open: the child has it, too
        metered.peer.close()
        assert start().ask().status == 200
    finally:
        os.kill(child, signal.SIGKILL)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which the worker refuses to start."""
    assert pothead_worker.main(["--log-level", "error"]) == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.count("\n") == 1
    return written.err


@needs_prometheus
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path / "missing", "is not a directory"),
        (lambda path: path / "counter_1.db", "is not a directory"),
        (lambda path: "/proc", "is not writable"),
        (lambda path: "/", "will not be emptied"),
        (lambda path: "//", "will not be emptied"),
        (lambda path: path, "will not be emptied"),  # it is HOME
        (lambda path: path / "link", "will not be emptied"),
        (lambda path: os.path.expanduser("~root"), "will not be emptied"),
        (lambda path: path / "odd", "will not be emptied"),
    ],
)
def test_directory_that_must_not_be_emptied_is_refused_before_anything_is_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path | str],
    reason: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "counter_1.db").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "odd" / "directory.db").mkdir(parents=True)
    (tmp_path / "odd" / "counter_1.db").write_bytes(b"precious")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(make(tmp_path)))
    written = refusal(capsys)
    assert written.startswith("pothead-worker: PROMETHEUS_MULTIPROC_DIR: ") and reason in written
    assert (tmp_path / "counter_1.db").read_bytes() == b"precious"
    assert (tmp_path / "odd" / "counter_1.db").read_bytes() == b"precious"


@needs_prometheus
def test_taken_port_is_refused_before_anything_is_removed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "counter_1.db").write_bytes(b"precious")
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
        monkeypatch.setenv("PROMETHEUS_PORT", str(taken.getsockname()[1]))
        assert "PROMETHEUS_PORT: cannot listen on port" in refusal(capsys)
    assert (directory / "counter_1.db").exists()


@needs_prometheus
def test_directory_that_cannot_be_emptied_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", path)  # it is somebody else's

    (directory / "counter_1.db").touch()
    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    monkeypatch.setenv("PROMETHEUS_PORT", "0")
    assert "PROMETHEUS_MULTIPROC_DIR: cannot be emptied: " in refusal(capsys)


def test_missing_package_is_one_line_with_the_command_that_installs_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    assert refusal(capsys) == (
        "pothead-worker: PROMETHEUS_MULTIPROC_DIR: prometheus_client is not installed: "
        "python3 -m pip install prometheus-client\n"
    )


def test_port_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS_PORT", "x")
    assert "PROMETHEUS_PORT: 'x' is not a port" in refusal(capsys)
