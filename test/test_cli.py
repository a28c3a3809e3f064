"""The command lines: options, environment, signals, exit statuses, and what a user gets to read."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pothead
import pothead_worker
import wire

HUB = str(wire.ROOT / "pothead.py")
WORKER = str(wire.ROOT / "pothead_worker.py")
FREE_PORTS = ("--main-port", "0", "--worker-port", "0", "--admin-port", "0")
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Ended:
    """What is left of a process."""

    status: int
    lines: list[str]
    stderr: str


def run(*command: str, environment: dict[str, str] | None = None, cwd: Path = wire.ROOT) -> Ended:
    """Run a program of Python to its end, which must come by itself."""
    program = wire.Program(wire.python(*command), cwd, environment)
    program.may_have_ended = True
    with wire.running(program):
        return Ended(program.wait(), program.lines, program.stderr)


def ask(peer: wire.Peer) -> wire.Response:
    peer.send(GET)
    return peer.read_response()


# ---- Options of the hub ------------------------------------------------------------------------------

# option: a text, and its value
GIVEN: dict[str, tuple[str, object]] = {
    "main_host": ("::1", "::1"),
    "main_port": ("0", 0),
    "worker_host": ("localhost", "localhost"),
    "worker_port": ("65535", 65535),
    "admin_host": ("127.0.0.2", "127.0.0.2"),
    "admin_port": ("1", 1),
    "admin_allowed_hosts": ("hub.example, hub", ("hub.example", "hub")),
    "max_queue": ("1", 1),
    "queue_timeout": ("250ms", 0.25),
    "retry_after": ("2m", 120.0),
    "response_timeout": ("1.5m", 90.0),
    "max_attempts": ("3", 3),
    "max_request_body": ("0", 0),
    "response_spool": ("2G", 2 << 30),
    "spool_memory": ("1k", 1024),
    "memory_budget": ("3m", 3 << 20),
    "disk_budget": ("4g", 4 << 30),
    "spool_dir": ("/tmp", "/tmp"),
    "stream_requests": ("yes", True),
    "head_timeout": ("7", 7.0),
    "keep_alive": ("2h", 7200.0),
    "stall_timeout": ("off", math.inf),
    "graceful_timeout": ("0s", 0.0),
    "forwarded_allow_ips": ("10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
    "log_format": ("json", "json"),
    "log_level": ("error", "error"),
    "allow_anonymous_workers": ("1", True),
    "reuse_port": ("on", True),
}
SWITCHES = ("stream_requests", "allow_anonymous_workers", "reuse_port")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    return f"POTHEAD_HUB_{name.upper()}"


def test_every_option_of_the_hub_is_tried_here() -> None:
    assert set(GIVEN) == {field.name for field in dataclasses.fields(pothead.Options)}
    defaults = pothead.Options()
    assert all(value != getattr(defaults, name) for name, (_, value) in GIVEN.items())


@pytest.mark.parametrize("name", GIVEN)
def test_option_of_the_hub_comes_from_the_command_line(name: str) -> None:
    text, value = GIVEN[name]
    words = [flag(name)] if name in SWITCHES else [flag(name), text]
    options, command = pothead.parse_args(words, {})
    assert options == dataclasses.replace(pothead.Options(), **{name: value})
    assert command == []


@pytest.mark.parametrize("name", GIVEN)
def test_option_of_the_hub_comes_from_the_environment(name: str) -> None:
    text, value = GIVEN[name]
    options, _ = pothead.parse_args([], {variable(name): text})
    assert options == dataclasses.replace(pothead.Options(), **{name: value})


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in SWITCHES])
def test_command_line_of_the_hub_goes_before_its_environment(name: str) -> None:
    text, value = GIVEN[name]
    options, _ = pothead.parse_args([flag(name), text], {variable(name): "nonsense, but nobody asks"})
    assert getattr(options, name) == value


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(("text", "value"), [("0", False), ("no", False), ("", False), ("True", True)])
def test_switch_is_yes_or_no_in_the_environment(name: str, text: str, value: bool) -> None:
    options, _ = pothead.parse_args([], {variable(name): text})
    assert getattr(options, name) is value


def test_empty_variable_is_no_variable() -> None:
    options, _ = pothead.parse_args([], {variable(name): "" for name in GIVEN})
    assert options == pothead.Options()


@pytest.mark.parametrize(
    ("words", "environment"), [(["--admin-port", "off"], {}), ([], {"POTHEAD_HUB_ADMIN_PORT": "off"})]
)
def test_admin_port_can_be_off(words: list[str], environment: dict[str, str]) -> None:
    options, _ = pothead.parse_args(words, environment)
    assert options.admin_port is None


def test_command_line_switches_the_admin_port_off_whatever_the_environment_says() -> None:
    options, _ = pothead.parse_args(["--admin-port", "off"], {"POTHEAD_HUB_ADMIN_PORT": "4000"})
    assert options.admin_port is None


def test_command_is_everything_behind_the_first_two_dashes() -> None:
    options, command = pothead.parse_args(["--max-queue", "5", "--", "a", "--max-queue", "6", "--", "b"], {})
    assert options.max_queue == 5
    assert command == ["a", "--max-queue", "6", "--", "b"]


SENSELESS_OF_THE_HUB = [
    *[
        ("--main-port", text)
        for text in ("+5", "1_0", " 5", "5 ", "-1", "65536", "0x10", "5.0", "", "٣", "off")
    ],
    ("--worker-port", "65536"),
    ("--worker-port", "http"),
    ("--admin-port", "65536"),
    ("--admin-port", "on"),
    *[("--max-queue", text) for text in ("0", "-1", "+1", "1_000", "many", "9" * 20)],
    ("--max-attempts", "0"),
    *[
        ("--queue-timeout", text)
        for text in ("0", "0s", "1_0s", "+1s", "1 s", "1d", "s", ".5s", "1e3", "nan", "inf", "")
    ],
    ("--retry-after", "off"),
    ("--retry-after", "0s"),
    ("--response-timeout", "0ms"),
    ("--head-timeout", "never"),
    ("--keep-alive", "0"),
    ("--stall-timeout", "0"),
    ("--graceful-timeout", "-1s"),
    *[("--max-request-body", text) for text in ("-1", "1kb", "1_0", "+1", "1.5g", " 1", "k", "off")],
    ("--response-spool", "1t"),
    ("--spool-memory", "x"),
    ("--memory-budget", "-1k"),
    ("--disk-budget", "off"),
    ("--spool-dir", "/nonexistent"),
    ("--spool-dir", __file__),
    ("--forwarded-allow-ips", "localhost"),
    ("--forwarded-allow-ips", "127.0.0.1,10.0.0.0/33"),
    ("--log-format", "xml"),
    ("--log-level", "loud"),
]


def hub_usage_error(words: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that the hub writes about a senseless command line."""
    with pytest.raises(SystemExit) as caught:
        pothead.parse_args(words, environment)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pothead: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


@pytest.mark.parametrize(("option", "text"), SENSELESS_OF_THE_HUB)
def test_senseless_value_on_the_hubs_command_line_is_a_usage_error_that_names_the_option(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = hub_usage_error([f"{option}={text}"], {}, capsys)
    assert option in err


@pytest.mark.parametrize(("option", "text"), [pair for pair in SENSELESS_OF_THE_HUB if pair[1]])
def test_senseless_value_in_the_hubs_environment_is_a_usage_error_that_names_it(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = variable(option.strip("-").replace("-", "_"))
    err = hub_usage_error([], {name: text}, capsys)
    assert name in err or option in err


def test_senseless_switch_in_the_hubs_environment_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    err = hub_usage_error([], {"POTHEAD_HUB_STREAM_REQUESTS": "maybe"}, capsys)
    assert "POTHEAD_HUB_STREAM_REQUESTS" in err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--nosuch"], "--nosuch"),
        (["--max", "5"], "--max"),
        (["--queue-timeout"], "--queue-timeout"),
        (["python3", "worker.py"], "python3"),
        (["--"], "command"),
        (["--max-queue", "5", "--"], "command"),
        (["--queue-timeout", "-1s"], "-1s"),
        (["--stream-requests=yes"], "--stream-requests"),
    ],
)
def test_command_line_that_makes_no_sense_is_a_usage_error_that_says_what(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in hub_usage_error(words, {}, capsys)


def test_process_ends_with_2_after_a_usage_error() -> None:
    ended = run(HUB, "--max-queue", "0", environment={"POTHEAD_HUB_MAIN_PORT": "0"})
    assert (ended.status, ended.lines, ended.stderr.count("\n")) == (2, [], 1)


# ---- Options of the worker ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("connect", "[::1]:4041", "connect", pothead_worker.Address("::1", 4041)),
        ("workers", "7", "workers", 7),
        ("graceful_timeout", "250ms", "graceful_timeout_s", 0.25),
        ("log_level", "DEBUG", "log_level", "debug"),
    ],
)
def test_option_of_the_worker_comes_from_the_command_line_before_the_environment(
    name: str, text: str, field: str, value: object
) -> None:
    wanted = dataclasses.replace(pothead_worker.parse_args([], {}), **{field: value})  # type: ignore[arg-type]
    name_in_environment = f"POTHEAD_WORKER_{name.upper()}"
    assert pothead_worker.parse_args([flag(name), text], {}) == wanted
    assert pothead_worker.parse_args([], {name_in_environment: text}) == wanted
    assert pothead_worker.parse_args([flag(name), text], {name_in_environment: "nonsense"}) == wanted
    assert pothead_worker.parse_args([], {name_in_environment: ""}) == pothead_worker.parse_args([], {})


SENSELESS_OF_THE_WORKER = [
    *[
        ("--connect", text)
        for text in (
            *("hub.example", "hub.example:", ":4040", "hub.example:0", "hub.example:65536", "hub.example:+1"),
            *(
                "hub.example:1_0",
                "hub.example: 1",
                "::1:4040",
                "http://hub.example:4040",
                "[]:1",
                "a b:1",
                "",
            ),
        )
    ],
    *[("--workers", text) for text in ("0", "-1", "+2", "1_0", " 2", "2 ", "two", "10000", "٣", "")],
    *[("--graceful-timeout", text) for text in ("x", "+1s", "1_0s", " 1s", "1d", "-1s", "1e3", "")],
    ("--log-level", "loud"),
]


@pytest.mark.parametrize(("option", "text"), SENSELESS_OF_THE_WORKER)
def test_senseless_value_on_the_workers_command_line_is_a_usage_error_that_names_the_option(
    option: str, text: str
) -> None:
    with pytest.raises(pothead_worker.UsageError, match=f"^{option}: "):
        pothead_worker.parse_args([f"{option}={text}"], {})


@pytest.mark.parametrize(("option", "text"), [pair for pair in SENSELESS_OF_THE_WORKER if pair[1]])
def test_senseless_value_in_the_workers_environment_is_a_usage_error_that_names_the_variable(
    option: str, text: str
) -> None:
    name = f"POTHEAD_WORKER_{option.strip('-').replace('-', '_').upper()}"
    with pytest.raises(pothead_worker.UsageError, match=f"^{name}: "):
        pothead_worker.parse_args([], {name: text})


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--nosuch"], "--nosuch"),
        (["--work", "2"], "--work"),
        (["--workers"], "--workers"),
        (["a:b", "c:d"], "c:d"),
        (["a b"], "a b"),
        (["a:b:c"], "a:b:c"),
        (["--graceful-timeout", "-1s"], "-1s"),
    ],
)
def test_command_line_of_the_worker_that_makes_no_sense_is_a_usage_error_that_says_what(
    words: list[str], wanted: str
) -> None:
    with pytest.raises(pothead_worker.UsageError, match=wanted):
        pothead_worker.parse_args(words, {})


@pytest.mark.parametrize("words", [["--nosuch"], ["--workers", "x"], ["--connect", "hub.example"]])
def test_worker_process_ends_with_2_and_one_line_after_a_usage_error(words: list[str]) -> None:
    ended = run(WORKER, *words)
    assert (ended.status, ended.lines) == (2, [])
    assert ended.stderr.startswith("pothead-worker: ") and ended.stderr.count("\n") == 1


# ---- Starting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[HUB], ["-m", "pothead"], [WORKER], ["-m", "pothead_worker"]], ids=lambda words: words[-1]
)
def test_version_and_help_are_printed_on_stdout(command: list[str]) -> None:
    version = run(*command, "--version")
    assert (version.status, version.stderr) == (0, "")
    assert len(version.lines) == 1 and version.lines[0].endswith(f" {pothead.__version__}")
    usage = run(*command, "--help")
    assert (usage.status, usage.stderr) == (0, "")
    assert usage.lines[0].startswith("usage: pothead")


def test_hub_says_where_it_listens_and_nothing_else() -> None:
    with wire.hub_process() as hub:
        pass
    assert [line.partition("=")[0] for line in hub.lines] == [
        "listening consumers",
        "listening workers",
        "listening admin",
    ]
    assert hub.stderr == ""


def test_hub_without_an_admin_port_does_not_listen_for_one() -> None:
    with wire.hub_process("--admin-port", "off") as hub:
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert consumer.read_response().status == 405
    assert [line.partition("=")[0] for line in hub.lines[:3]][:2] == [
        "listening consumers",
        "listening workers",
    ]
    assert not any(line.startswith("listening admin") for line in hub.lines)


def test_hub_can_be_run_as_a_module_with_its_options_in_the_environment() -> None:
    ports = {f"POTHEAD_HUB_{role}_PORT": "0" for role in ("MAIN", "WORKER", "ADMIN")}
    hub = wire.HubProcess(wire.python("-m", "pothead"), wire.ROOT, ports)
    with wire.running(hub):
        hub.wait_until_ready()
        assert hub.stats()["demand"] == 0


@pytest.mark.parametrize(
    ("option", "what"),
    [("--main-port", "consumers"), ("--worker-port", "workers"), ("--admin-port", "admin")],
)
def test_port_in_use_is_one_line_that_says_which(option: str, what: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run(HUB, *FREE_PORTS, option, str(taken.getsockname()[1]))
    assert ended == Ended(2, [], f"pothead: cannot listen for {what} on {address}: Address already in use\n")


@pytest.mark.parametrize("option", ["--main-host", "--worker-host", "--admin-host"])
@pytest.mark.parametrize("host", ["nosuch.invalid", "a..b", "192.0.2.1"])
def test_host_that_is_not_this_machines_is_one_line_that_names_it(option: str, host: str) -> None:
    ended = run(HUB, *FREE_PORTS, option, host)
    assert ended.status in (1, 2) and ended.lines == []
    assert ended.stderr.startswith("pothead: ") and host in ended.stderr and ended.stderr.count("\n") == 1
    assert "codec" not in ended.stderr


def test_empty_host_is_refused_by_name() -> None:
    ended = run(HUB, *FREE_PORTS, "--main-host=")
    assert ended.status == 2
    assert "--main-host" in ended.stderr


def test_worker_port_that_others_can_reach_is_refused_with_the_reason() -> None:
    ended = run(HUB, *FREE_PORTS, "--worker-host", "0.0.0.0")
    assert (ended.status, ended.lines) == (2, [])
    assert ended.stderr.count("\n") == 1
    assert "whoever connects" in ended.stderr and "--allow-anonymous-workers" in ended.stderr


def test_worker_port_that_others_can_reach_is_opened_when_that_is_wanted() -> None:
    with wire.hub_process("--worker-host", "0.0.0.0", "--allow-anonymous-workers") as hub:
        assert hub.worker[0] == "0.0.0.0"
        with wire.Peer.connect(("127.0.0.1", hub.worker[1])) as slot, wire.Peer.connect(hub.main) as consumer:
            consumer.send(GET)
            assert slot.read_request().method == b"GET"


@pytest.mark.parametrize("option", ["--main-host", "--admin-host"])
def test_other_ports_may_be_reached_by_others(option: str) -> None:
    with wire.hub_process(option, "0.0.0.0") as hub:
        assert "0.0.0.0" in (hub.main[0], hub.admin[0])


def test_worker_whose_app_is_not_there_ends_with_3_and_one_line(tmp_path: Path) -> None:
    ended = run(WORKER, "--connect", "localhost:1", "nosuch:app", cwd=tmp_path)
    assert ended == Ended(3, [], "pothead-worker: cannot load 'nosuch:app': there is no module 'nosuch'\n")


# ---- The command behind the dashes -------------------------------------------------------------------


def test_command_is_told_where_to_connect() -> None:
    shell = ("sh", "-c", 'echo "connect=$POTHEAD_CONNECT"; exec sleep 60')
    with wire.hub_process("--", *shell) as hub:
        line = hub.wait_for_line(lambda line: line.startswith("connect="))
        assert line == f"connect=127.0.0.1:{hub.worker[1]}"


@pytest.mark.parametrize(("command_status", "wanted"), [(0, 0), (3, 1)])
def test_hub_ends_with_its_command(command_status: int, wanted: int) -> None:
    ended = run(HUB, *FREE_PORTS, "--", "sh", "-c", f"exit {command_status}")
    assert ended.status == wanted
    assert ended.stderr.endswith(f"sh ended with status {command_status}\n")
    assert ended.stderr.count("\n") == 1


# A hub that is slow to go on after it has started its command.
SLOW_HUB = """
import os, signal, subprocess, sys
import pothead

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        self.send_signal(signal.SIGCONT)

subprocess.Popen = Popen
sys.exit(pothead.main())
"""


def test_command_that_ends_at_once_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "slow_hub.py").write_text(SLOW_HUB)
    environment = {"PYTHONPATH": str(wire.ROOT)}
    ended = run("slow_hub.py", *FREE_PORTS, "--", "sh", "-c", "exit 3", cwd=tmp_path, environment=environment)
    assert ended.status == 1


@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_signal_that_comes_while_the_command_is_started_leaves_no_orphan(tmp_path: Path, number: str) -> None:
    (tmp_path / "slow_hub.py").write_text(SLOW_HUB)
    # It signals the hub and stops: that is when the slow hub goes on, and lets it go on, too.
    shell = f"kill -{number} $PPID; echo pid=$$; kill -STOP $$; exec sleep 60"
    hub = wire.Program(
        wire.python("slow_hub.py", *FREE_PORTS, "--", "sh", "-c", shell),
        tmp_path,
        {"PYTHONPATH": str(wire.ROOT)},
    )
    with wire.running(hub):
        hub.may_have_ended = True
        child = int(hub.wait_for_line(lambda line: line.startswith("pid="))[4:])
        try:
            hub.process.wait(wire.DEADLINE_S)
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("command", "reason"),
    [("nosuch-command", "No such file or directory"), ("/", "Permission denied"), ("", "")],
)
def test_command_that_cannot_be_started_is_one_line(command: str, reason: str) -> None:
    ended = run(HUB, *FREE_PORTS, "--", command, "argument")
    assert ended.status == 2 and ended.lines == []
    assert ended.stderr.startswith(f"pothead: cannot start {command}: {reason}")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_hub_and_its_worker_end_together_and_quietly(number: signal.Signals) -> None:
    with wire.hub_process("--", *wire.python(WORKER)) as hub:
        hub.wait_for_error(lambda line: "connected slots=1" in line)
        hub.send_signal(number)
        assert hub.wait() == 0
    assert not any("unreachable" in line for line in hub.errors), hub.stderr
    assert "Traceback" not in hub.stderr


def test_command_that_does_not_listen_is_killed_after_the_graceful_timeout() -> None:
    shell = ("sh", "-c", 'trap "" TERM; echo ready; exec sleep 60')
    with wire.hub_process("--graceful-timeout", "100ms", "--", *shell) as hub:
        hub.wait_for_line(lambda line: line == "ready")
        hub.terminate()
        hub.wait()


# A worker whose application takes no notice of anything.
BUSY_APP = """
import time

def app(environ, start_response):
    print("running", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["INT", "second TERM"]
)
def test_interrupted_hub_does_not_wait_for_what_its_worker_runs(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    (tmp_path / "busy.py").write_text(BUSY_APP)
    command = [*wire.python(WORKER), "busy:app"]
    with wire.hub_process("--", *command, cwd=tmp_path) as hub, wire.Peer.connect(hub.main) as consumer:
        consumer.send(GET)
        hub.wait_for_line(lambda line: line == "running")
        began = time.monotonic()
        for number in signals:
            hub.send_signal(number)
            if number == signal.SIGTERM:
                hub.wait_for_error(lambda line: "draining" in line)
        assert consumer.read_response().status == 503
        assert hub.wait() == 1
        assert time.monotonic() - began < 10


def test_second_interrupt_does_not_wait_for_a_command_that_does_not_listen() -> None:
    shell = ("sh", "-c", 'trap "" TERM INT; echo ready; exec sleep 20')
    with wire.hub_process("--graceful-timeout", "60s", "--", *shell) as hub:
        hub.wait_for_line(lambda line: line == "ready")
        with wire.Peer.connect(hub.main) as consumer:
            hub.send_signal(signal.SIGINT)
            consumer.expect_eof()
        hub.send_signal(signal.SIGINT)
        hub.wait()


# ---- Signals -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_request(hub: wire.HubProcess) -> Iterator[tuple[wire.Peer, wire.Peer]]:
    """Yield a consumer and the slot that has just received its request."""
    with wire.Peer.connect(hub.worker) as slot, wire.Peer.connect(hub.main) as consumer:
        consumer.send(GET)
        slot.read_request()
        yield consumer, slot


@pytest.mark.parametrize("program", [HUB, WORKER])
def test_interrupt_at_the_start_ends_quietly(program: str, tmp_path: Path) -> None:
    # The first module that the programs import interrupts them.
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ended = run(program, environment={"PYTHONPATH": str(tmp_path)})
    assert ended == Ended(-signal.SIGINT, [], "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_idle_hub_with_0(hub: wire.HubProcess, number: signal.Signals) -> None:
    with wire.Peer.connect(hub.worker), wire.Peer.connect(hub.main) as consumer:
        consumer.send(GET[:10])
        hub.send_signal(number)
        assert hub.wait() == 0
    assert all("draining" in line for line in hub.errors), hub.stderr


def test_interrupt_with_work_running_cuts_it_off_and_gives_1(hub: wire.HubProcess) -> None:
    with running_request(hub) as (consumer, slot):
        hub.send_signal(signal.SIGINT)
        assert consumer.read_response().status == 503
        slot.expect_eof()
        assert hub.wait() == 1
    assert hub.stderr == ""
    assert hub.lines[-1].endswith("code=DR")


def test_term_lets_running_work_finish_and_gives_0(hub: wire.HubProcess) -> None:
    with running_request(hub) as (consumer, slot):
        hub.terminate()
        hub.wait_for_error(lambda line: "draining: 1 request" in line)
        slot.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        assert consumer.read_response().body == b"hi"
        assert hub.wait() == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_cuts_running_work_off_and_gives_1(
    hub: wire.HubProcess, second: signal.Signals
) -> None:
    with running_request(hub) as (consumer, _):
        hub.terminate()
        hub.wait_for_error(lambda line: "draining" in line)
        hub.send_signal(second)
        assert consumer.read_response().status == 503
        assert hub.wait() == 1


def test_work_that_outlasts_the_graceful_timeout_is_cut_off_and_gives_1() -> None:
    with wire.hub_process("--graceful-timeout", "50ms") as hub:
        with wire.Peer.connect(hub.main) as consumer, wire.Peer.connect(hub.main) as second:
            consumer.send(GET)
            with running_request(hub):  # the slot takes the first; the second waits
                second.send(GET)
                hub.terminate()
                assert consumer.read_response().status == 503
                assert hub.wait() == 1


def test_hub_survives_a_hangup_of_its_terminal(hub: wire.HubProcess, worker: wire.WorkerProcess) -> None:
    with wire.Peer.connect(hub.main) as consumer:
        assert ask(consumer).status == 200
        for program in (hub, worker):
            program.process.send_signal(signal.SIGHUP)
        assert ask(consumer).status == 200
        assert ask(consumer).status == 200


# ---- Logs that nobody reads --------------------------------------------------------------------------


class Unread:
    """A program whose output goes into small pipes that nobody empties."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            wire.python(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert self.process.stdout and self.process.stderr
        self.stdout, self.stderr = self.process.stdout, self.process.stderr
        for pipe in (self.stdout, self.stderr):
            fcntl.fcntl(pipe, 1031, 4096)  # F_SETPIPE_SZ: as small as a pipe can be

    def read_address(self) -> wire.Address:
        """Read one line and return the address in it."""
        return "127.0.0.1", int(self.stdout.readline().rpartition(b":")[2])

    def __enter__(self) -> Unread:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        self.stderr.close()


needs_small_pipes = pytest.mark.skipif(sys.platform != "linux", reason="pipes have one size only")


@needs_small_pipes
def test_hub_serves_on_when_nobody_reads_its_log() -> None:
    with Unread(HUB, *FREE_PORTS, "--log-level", "debug") as hub:
        main, worker = hub.read_address(), hub.read_address()
        hub.stdout.readline()
        with wire.Peer.connect(worker) as slot, wire.Peer.connect(main) as consumer:
            for _ in range(100):  # lines of 200 bytes
                consumer.send(GET)
                slot.read_request()
                slot.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                assert consumer.read_response().status == 204
        hub.process.send_signal(signal.SIGTERM)
        assert hub.process.wait(wire.DEADLINE_S) == 0
        lines = hub.stdout.read().splitlines()
        assert lines and all(line.endswith(b"code=OK") for line in lines), "no line is cut in two"


@needs_small_pipes
def test_worker_serves_on_when_nobody_reads_its_log(listener: wire.Listener) -> None:
    address = f"127.0.0.1:{listener.worker[1]}"
    with Unread(WORKER, "--connect", address, "--log-level", "debug") as worker:
        with listener.accept() as hub:
            for _ in range(100):  # lines of 60 bytes
                assert ask(hub).status == 200
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(wire.DEADLINE_S) == 0


@needs_small_pipes
def test_worker_counts_the_log_lines_that_nobody_read() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)
    handler = pothead_worker.LogHandler(writer)

    def log(text: str) -> None:
        handler.emit(logging.makeLogRecord({"msg": text}))

    log("a" * 4000)
    log("b" * 4000)
    log("c\nd")
    assert os.read(reader, 1 << 16) == b"a" * 4000 + b"\n"
    log("e" * 5000 + "\n\nf")
    wanted = b"(3 log lines were lost: nobody read them)\n"
    assert os.read(reader, 1 << 16) == wanted, "a pipe of one page takes one piece"
    log("g")
    assert os.read(reader, 1 << 16) == b"(4 log lines were lost: nobody read them)\ng\n"
    os.close(reader)
    log("h")
    os.close(writer)


def test_long_lines_of_the_workers_log_are_broken_and_nothing_of_them_is_lost(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+b") as file:
        text = "a" * 5000 + "\n\n" + "b" * 4095 + "\nf"
        pothead_worker.LogHandler(file.fileno()).emit(logging.makeLogRecord({"msg": text}))
        lines = (tmp_path / "log").read_text().split("\n")
    assert lines == ["a" * 4095, "a" * 905, "", "b" * 4095, "f", ""]


def test_hub_serves_on_when_its_log_is_closed() -> None:
    with Unread(HUB, *FREE_PORTS) as hub:
        main, worker = hub.read_address(), hub.read_address()
        hub.stdout.close()
        hub.stderr.close()
        with wire.Peer.connect(worker) as slot, wire.Peer.connect(main) as consumer:
            for _ in range(3):
                consumer.send(GET)
                slot.read_request()
                slot.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                assert consumer.read_response().status == 204
        hub.process.send_signal(signal.SIGTERM)
        assert hub.process.wait(wire.DEADLINE_S) == 0


def test_worker_serves_on_when_its_log_is_closed(listener: wire.Listener) -> None:
    address = f"127.0.0.1:{listener.worker[1]}"
    with Unread(WORKER, "--connect", address, "--log-level", "debug") as worker:
        worker.stderr.close()
        with listener.accept() as hub:
            for _ in range(3):
                assert ask(hub).status == 200
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(wire.DEADLINE_S) == 0


class Output:
    """The hub's output into a pipe, of which this is the reader."""

    def __init__(self) -> None:
        self.loop = pothead.EventLoop()
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._writer = writer
        self.output = pothead.Output(self.loop, writer)

    def read(self) -> bytes:
        """Return what is in the pipe."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self._reader, 1 << 20)
        return b""

    def read_all(self) -> bytes:
        """Return everything, with the output writing on whenever there is room."""
        data = bytearray()
        while True:
            self.output.flush()
            if not (piece := self.read()):
                return bytes(data)
            data += piece

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.loop.close()
        os.close(self._reader)
        os.close(self._writer)


def test_log_lines_beyond_the_backlog_are_dropped_whole_and_counted() -> None:
    line = "x" * 999 + "\n"
    with Output() as pipe:
        for _ in range(2000):
            pipe.output.write(line)
        kept = pipe.read_all().decode()
        assert kept == line * (len(kept) // 1000)
        assert 0 <= len(kept) - pothead.LIMITS.log_backlog_bytes <= 1000
        pipe.output.write("the next\n")
        lost = 2000 - len(kept) // 1000
        assert pipe.read_all().decode() == f"({lost} log lines were lost: nobody read them)\nthe next\n"


def test_log_line_waits_for_room_and_asks_for_another_turn() -> None:
    with Output() as pipe:
        pipe.output.write("x" * 200_000 + "\n")
        pipe.output.flush()
        assert pipe.output.deadline < math.inf
        assert len(pipe.read_all()) == 200_001


def test_log_line_that_cannot_be_encoded_is_written_all_the_same() -> None:
    with Output() as pipe:
        pipe.output.write("lone \udc80\n")
        assert pipe.read_all() == b"lone \\udc80\n"


def test_network_may_be_given_by_any_of_its_addresses() -> None:
    hub = pothead.Hub(
        pothead.Options(main_port=0, worker_port=0, admin_port=None, forwarded_allow_ips=("10.1.2.3/8",))
    )
    assert (hub.trusts("10.9.9.9:1"), hub.trusts("11.0.0.1:1")) == (True, False)
    hub.loop.close()


def test_options_of_a_program_are_checked_as_those_of_the_command_line_are() -> None:
    senseless: list[dict[str, Any]] = [
        {"main_port": 65536},
        {"max_queue": 0},
        {"queue_timeout": 0},
        {"graceful_timeout": -1},
        {"spool_memory": -1},
        {"spool_dir": "/nonexistent"},
        {"forwarded_allow_ips": ("x",)},
        {"forwarded_allow_ips": ("10.0.0.0/33",)},
    ]
    for options in senseless:
        with pytest.raises(ValueError, match=flag(next(iter(options)))):
            pothead.Options(**options)
