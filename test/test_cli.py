"""The command lines: options, environment, signals, exit statuses, and what a user gets to read."""

from __future__ import annotations

import calendar
import contextlib
import dataclasses
import fcntl
import inspect
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pothead
import pothead_worker
import wire
from wire import Ended

HUB = wire.compiled("pothead")
WORKER = wire.compiled("pothead_worker")
FREE_PORTS = ("--main-port", "0", "--worker-port", "0", "--admin-port", "0")
GET = wire.get(b"/")


def run(*command: str, environment: dict[str, str] | None = None, cwd: Path = wire.ROOT) -> Ended:
    """Run a program of Python to its end, which must come by itself."""
    return wire.run_to_end(wire.python(*command), cwd, environment)


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[pothead.Options, list[str]]:
    """Return the hub's options and the command to run."""
    given = pothead.Given(argv, environ)
    return given.options, given.command


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
    "ptth_host": ("::1", "::1"),
    "ptth_port": ("4443", 4443),
    "ptth_compat": ("ptth/1.0", ("ptth/1.0",)),
    "certfile": ("/run/hub.pem", "/run/hub.pem"),
    "keyfile": ("/run/hub.key", "/run/hub.key"),
    "tls": ("main, ptth", ("main", "ptth")),
    "workers_file": ("/run/workers", "/run/workers"),
    "workers_ca": ("/run/ca.pem", "/run/ca.pem"),
    "admin_token_file": ("/run/token", "/run/token"),
    "admin_token_for": ("All", "all"),
    "max_queue": ("1", 1),
    "queue_timeout": ("250ms", 0.25),
    "no_worker_timeout": ("5s", 5.0),
    "route": ("/a=http://A:80, /b/c=https://b", ("/b/c=https://b", "/a=http://a")),
    "priority_step": ("off", 0.0),
    "fair_by": ("X-Key", "x-key"),
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
    "drain_delay": ("2s", 2.0),
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
    options, command = parse_args(words, {})
    assert options == dataclasses.replace(pothead.Options(), **{name: value})
    assert command == []


@pytest.mark.parametrize("name", GIVEN)
def test_option_of_the_hub_comes_from_the_environment(name: str) -> None:
    text, value = GIVEN[name]
    options, _ = parse_args([], {variable(name): text})
    assert options == dataclasses.replace(pothead.Options(), **{name: value})


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in SWITCHES])
def test_command_line_of_the_hub_goes_before_its_environment(name: str) -> None:
    text, value = GIVEN[name]
    options, _ = parse_args([flag(name), text], {variable(name): "nonsense, but nobody asks"})
    assert getattr(options, name) == value


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(("text", "value"), [("0", False), ("no", False), ("", False), ("True", True)])
def test_switch_is_yes_or_no_in_the_environment(name: str, text: str, value: bool) -> None:
    options, _ = parse_args([], {variable(name): text})
    assert getattr(options, name) is value


def test_routes_are_given_one_by_one() -> None:
    words = ["--route", "/a=http://a", "--max-queue", "5", "--route=/b=http://b"]
    options, _ = parse_args(words, {"POTHEAD_HUB_ROUTE": "/c=http://c"})
    assert (set(options.route), options.max_queue) == ({"/a=http://a", "/b=http://b"}, 5)
    with pytest.raises(pothead.UsageError, match="--route: expected one argument"):
        parse_args(["--route"], {})


def test_empty_variable_is_no_variable() -> None:
    options, _ = parse_args([], {variable(name): "" for name in GIVEN})
    assert options == pothead.Options()


@pytest.mark.parametrize(
    ("words", "environment"), [(["--admin-port", "off"], {}), ([], {"POTHEAD_HUB_ADMIN_PORT": "off"})]
)
def test_admin_port_can_be_off(words: list[str], environment: dict[str, str]) -> None:
    options, _ = parse_args(words, environment)
    assert options.admin_port is None


def test_command_line_switches_the_admin_port_off_whatever_the_environment_says() -> None:
    options, _ = parse_args(["--admin-port", "off"], {"POTHEAD_HUB_ADMIN_PORT": "4000"})
    assert options.admin_port is None


def test_command_is_everything_behind_the_first_two_dashes() -> None:
    options, command = parse_args(["--max-queue", "5", "--", "a", "--max-queue", "6", "--", "b"], {})
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
    ("--admin-token-for", "nobody"),
    ("--ptth-port", "65536"),
    ("--ptth-compat", "ptth/2.0"),
    ("--tls", "main,worker"),
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


def hub_usage_error(words: list[str], environment: dict[str, str]) -> str:
    """Return the one line that the hub writes about a senseless command line."""
    with pytest.raises(pothead.UsageError) as caught:
        parse_args(words, environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("option", "text"), SENSELESS_OF_THE_HUB)
def test_senseless_value_on_the_hubs_command_line_is_a_usage_error_that_names_the_option(
    option: str, text: str
) -> None:
    err = hub_usage_error([f"{option}={text}"], {})
    assert option in err


@pytest.mark.parametrize(("option", "text"), [pair for pair in SENSELESS_OF_THE_HUB if pair[1]])
def test_senseless_value_in_the_hubs_environment_is_a_usage_error_that_names_it(
    option: str, text: str
) -> None:
    name = variable(option.strip("-").replace("-", "_"))
    err = hub_usage_error([], {name: text})
    assert name in err or option in err


def test_senseless_switch_in_the_hubs_environment_is_a_usage_error() -> None:
    err = hub_usage_error([], {"POTHEAD_HUB_STREAM_REQUESTS": "maybe"})
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
    words: list[str], wanted: str
) -> None:
    assert wanted in hub_usage_error(words, {})


def test_process_ends_with_2_after_a_usage_error() -> None:
    ended = run(HUB, "--max-queue", "0", environment={"POTHEAD_HUB_MAIN_PORT": "0"})
    assert (ended.status, ended.lines, ended.stderr.count("\n")) == (2, [], 1)


# ---- Options of the worker ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("connect", "[::1]:4041", "connect", (pothead_worker.Address("::1", 4041),)),
        ("workers", "7", "workers", 7),
        ("graceful_timeout", "250ms", "graceful_timeout", 0.25),
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
                "ftp://hub.example:4040",
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
    reason = f"Address already in use; for another port there is {option}"
    assert ended == Ended(2, [], f"pothead: cannot listen for {what} on {address}: {reason}\n")


def test_script_without_its_interpreter_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "my_worker.py").write_text("")
    for check in ([], ["--check"]):
        ended = run(HUB, *FREE_PORTS, *check, "--", "my_worker.py", "--workers", "2", cwd=tmp_path)
        assert ended.status == 2
        assert ended.stderr.endswith("did you mean -- python3 my_worker.py --workers 2?\n")


def test_command_that_is_killed_is_told_by_the_name_of_the_signal() -> None:
    ended = run(HUB, *FREE_PORTS, "--", "sh", "-c", "kill -9 $$")
    assert ended.status == 1
    assert ended.stderr.endswith("ERROR pothead: sh was killed by SIGKILL\n")


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
    reason = f"there is no module 'nosuch'; looked in {tmp_path} first"
    assert ended == Ended(3, [], f"pothead-worker: cannot load 'nosuch:app': {reason}\n")


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


def test_signal_that_does_not_interrupt_the_wait_is_obeyed() -> None:
    """As one that comes just before the wait; here another thread gets it."""
    program = """
import signal, sys, threading
import pothead
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
sys.exit(pothead.main(sys.argv[1:]))
"""
    ports = ("--main-port", "0", "--worker-port", "0", "--admin-port", "0")
    with wire.running(wire.HubProcess(wire.python("-c", program, *ports), wire.ROOT)) as hub:
        hub.wait_until_ready()
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(GET[:10])
            hub.terminate()
            assert hub.wait() == 0


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
        assert consumer.ask(GET).status == 200
        for program in (hub, worker):
            program.process.send_signal(signal.SIGHUP)
        assert consumer.ask(GET).status == 200
        assert consumer.ask(GET).status == 200


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
        self.stdout.close()  # which ends a command that writes there
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
def test_hub_serves_on_when_its_command_fills_the_pipe_that_both_write_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    shell = ("sh", "-c", f"read go < {tmp_path}/go; yes & exec yes")
    with Unread(HUB, *FREE_PORTS, "--", *shell) as hub:
        main, worker = hub.read_address(), hub.read_address()
        hub.stdout.readline()
        (tmp_path / "go").write_text("go\n")
        with wire.Peer.connect(worker) as slot, wire.Peer.connect(main) as consumer:
            for _ in range(2000):
                os.read(hub.stdout.fileno(), 4096)  # there is room for a moment, and all three would have it
                consumer.send(GET)
                slot.read_request()
                slot.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                assert consumer.read_response().status == 204


@needs_small_pipes
def test_worker_serves_on_when_nobody_reads_its_log(listener: wire.Listener) -> None:
    address = f"127.0.0.1:{listener.worker[1]}"
    with Unread(WORKER, "--connect", address, "--log-level", "debug") as worker:
        with listener.accept() as hub:
            for _ in range(100):  # lines of 60 bytes
                assert hub.ask(GET).status == 200
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(wire.DEADLINE_S) == 0


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
                assert hub.ask(GET).status == 200
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(wire.DEADLINE_S) == 0


class Output:
    """A program's output into a pipe, of which this is the reader."""

    def __init__(self, module: ModuleType, log_format: str) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        self.writer = writer
        self.output = module.Output(writer, log_format, pothead.LIMITS.log_backlog_bytes)

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
        os.close(self._reader)
        os.close(self.writer)


@pytest.fixture(params=[pothead, pothead_worker], ids=["hub", "worker"])
def pipe(request: pytest.FixtureRequest) -> Iterator[Output]:
    with Output(request.param, "text") as output:
        yield output


@pytest.fixture(params=[pothead, pothead_worker], ids=["hub", "worker"])
def json_pipe(request: pytest.FixtureRequest) -> Iterator[Output]:
    with Output(request.param, "json") as output:
        yield output


def test_log_lines_beyond_the_backlog_are_dropped_whole_and_counted(pipe: Output) -> None:
    line = "x" * 999 + "\n"
    for _ in range(2000):
        pipe.output.write(line)
    kept = pipe.read_all().decode()
    assert kept == line * (len(kept) // 1000)
    assert 0 <= len(kept) - pothead.LIMITS.log_backlog_bytes <= 1000
    pipe.output.write("the next\n")
    lost = 2000 - len(kept) // 1000
    assert pipe.read_all().decode() == f"({lost} log lines were lost: nobody read them)\nthe next\n"


def test_lost_log_lines_are_counted_in_json_where_the_log_is_json(json_pipe: Output) -> None:
    for _ in range(3):
        json_pipe.output.write("{" + "x" * pothead.LIMITS.log_backlog_bytes + "}\n")
    json_pipe.read_all()
    json_pipe.output.write("{}\n")
    notice, line, rest = json_pipe.read_all().split(b"\n")
    assert (line, rest) == (b"{}", b"")
    assert json.loads(notice)["message"] == "2 log lines were lost: nobody read them"


def test_log_line_waits_for_room(pipe: Output) -> None:
    pipe.output.write("x" * 200_000 + "\n")
    pipe.output.flush()
    assert len(pipe.output.pending) > 100_000
    assert len(pipe.read_all()) == 200_001


def test_hub_asks_for_another_turn_when_a_log_line_waits_for_room() -> None:
    loop = pothead.EventLoop()
    with Output(pothead, "text") as pipe:
        pothead.flush_each_turn(pipe.output, loop)
        loop.call_soon(lambda: pipe.output.write("x" * 200_000 + "\n"))
        left = 0

        def read() -> None:
            nonlocal left
            left += len(pipe.read())
            if left == 200_001:
                loop.stop()

        loop.before_sleep.append(read)
        loop.run()
    loop.close()


def test_log_lines_of_two_writers_are_not_mixed(pipe: Output) -> None:
    pipe.output.write("x" * 2999 + "\n" + "y" * 2999 + "\n")
    os.write(pipe.writer, b"z" * 63_000 + b"\n")
    pipe.output.flush()
    lines = pipe.read_all().splitlines()
    assert [(line[:1], len(set(line))) for line in lines] == [(b"z", 1), (b"x", 1), (b"y", 1)]


def test_output_leaves_the_pipe_of_others_as_it_is(pipe: Output) -> None:
    pipe.output.write("x" * 200_000 + "\n")
    pipe.output.flush()
    assert pipe.output.pending
    assert os.get_blocking(pipe.writer)


@pytest.mark.parametrize("module", [pothead, pothead_worker])
def test_output_into_a_socket_does_not_wait(module: ModuleType) -> None:
    reader, writer = socket.socketpair()
    with reader, writer:
        output = module.Output(writer.fileno(), "text", pothead.LIMITS.log_backlog_bytes)
        output.write("first\n")
        output.flush()
        assert reader.recv(100) == b"first\n"
        output.write("x" * 1_000_000 + "\n")
        output.flush()
        assert output.pending
        assert os.get_blocking(writer.fileno()), "what is shared stays as it is"


@pytest.mark.parametrize("module", [pothead, pothead_worker])
def test_output_into_a_terminal_does_not_wait(module: ModuleType) -> None:
    master, terminal = os.openpty()
    try:
        output = module.Output(terminal, "text", pothead.LIMITS.log_backlog_bytes)
        output.write("x" * 1_000_000 + "\n")
        output.flush()
        assert output.pending
        assert os.get_blocking(terminal), "what is shared stays as it is"
    finally:
        os.close(master)
        os.close(terminal)


@pytest.mark.parametrize("module", [pothead, pothead_worker])
def test_output_that_cannot_open_the_pipe_looks_whether_there_is_room(module: ModuleType) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Output(module, "text") as pipe:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            pipe.output = module.Output(pipe.writer, "text", pothead.LIMITS.log_backlog_bytes)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        pipe.output.write("x" * 200_000 + "\n")
        pipe.output.flush()
        assert len(pipe.output.pending) > 100_000
        assert len(pipe.read_all()) == 200_001


@pytest.mark.parametrize("module", [pothead, pothead_worker])
def test_output_into_a_file_goes_to_its_end(module: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+b") as file:
        output = module.Output(file.fileno(), "text", pothead.LIMITS.log_backlog_bytes)
        for writer in (output, None, output):
            if writer:
                writer.write("ours\n")
                writer.flush()
            else:
                os.write(file.fileno(), b"theirs\n")
    assert (tmp_path / "log").read_text() == "ours\ntheirs\nours\n"


def test_log_line_that_cannot_be_encoded_is_written_all_the_same(pipe: Output) -> None:
    pipe.output.write("lone \udc80\n")
    assert pipe.read_all() == b"lone \\udc80\n"


# ---- Times and JSON ----------------------------------------------------------------------------------

# An application that moves the worker to another zone, and fails.
ELSEWHERE = """
import os, time

os.environ["TZ"] = "Asia/Kolkata"
time.tzset()

def app(environ, start_response):
    raise RuntimeError("two\\nlines")
"""
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")


def assert_is_now(text: str) -> None:
    assert TIME.fullmatch(text), text
    seconds = calendar.timegm(time.strptime(text[:-5], "%Y-%m-%dT%H:%M:%S"))
    assert abs(time.time() - seconds) < 600, text


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_times_of_hub_and_worker_are_in_utc_whatever_the_app_does_to_the_zone(
    tmp_path: Path, mode: list[str], log_format: str
) -> None:
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {f"POTHEAD_{name}_LOG_FORMAT": log_format for name in ("HUB", "WORKER")}
    environment["TZ"] = "America/New_York"
    command = [*wire.python(WORKER), *mode, "elsewhere:app"]
    with wire.hub_process("--", *command, cwd=tmp_path, environment=environment) as hub:
        with wire.Peer.connect(hub.main) as consumer:
            assert consumer.ask(GET).status == 500
        hub.wait_for_error(lambda line: "two" in line)
        hub.terminate()
        hub.wait()
        errors = hub.errors[:]
        hub.errors.clear()  # of the traceback that is meant
    assert len(hub.lines) == 4
    if log_format == "text":
        times = [line.split()[0] for line in errors if re.search(r" (INFO|ERROR) ", line)]
        times.append(hub.lines[3].split()[0])
    else:
        entries = [json.loads(line) for line in [*hub.lines, *errors]]
        times = [entry["time"] for entry in entries]
        assert [entry.get("listening") for entry in entries[:4]] == ["consumers", "workers", "admin", None]
        assert {entry["logger"] for entry in entries[4:]} == {"pothead", "pothead.worker"}
        (fault,) = [entry for entry in entries if "traceback" in entry]
        assert fault["traceback"].endswith("RuntimeError: two\nlines")
        assert (fault["level"], "raised an exception" in fault["message"]) == ("ERROR", True)
    assert len(times) >= 4
    for text in times:
        assert_is_now(text)


@pytest.mark.parametrize(
    ("command", "status", "wanted"),
    [
        ([HUB, "--log-format", "json", "--max-que", "5"], 2, "there is no option --max-que"),
        ([HUB, "--log-format=JSON", "--main-host", "nosuch.invalid"], 2, "cannot listen for consumers"),
        ([HUB, "--log-format=json", *FREE_PORTS, "--", "nosuch-command"], 2, "cannot start nosuch-command"),
        ([WORKER, "--workers", "x", "--log-format=json"], 2, "--workers: 'x'"),
        ([WORKER, "--log-format=json", "broken:app"], 3, "cannot load 'broken:app': importing module"),
        ([WORKER, "--log-format=json", "--use-request-subprocess", "broken"], 3, "cannot load 'broken'"),
    ],
)
def test_reason_why_a_program_does_not_start_is_json_too(
    tmp_path: Path, command: list[str], status: int, wanted: str
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    ended = subprocess.run(
        wire.python(*command), cwd=tmp_path, capture_output=True, text=True, timeout=wire.DEADLINE_S
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (status, "", 1)
    entry = json.loads(ended.stderr)
    assert wanted in entry["message"] and entry["level"] == "ERROR"
    assert_is_now(entry["time"])
    assert ("traceback" in entry) is (status == 3)


def test_log_format_of_the_command_is_not_that_of_the_hub() -> None:
    ended = run(HUB, "--max-que", "5", "--", "worker", "--log-format", "json")
    assert ended.stderr.startswith("pothead: ")


@pytest.mark.parametrize(
    ("module", "owner", "words"),
    [
        ("pothead", "Hub", ("--admin-port=off", "--main-port=0", "--worker-port=0")),
        ("pothead_worker", "WorkerPool", ()),
    ],
)
def test_fault_that_ends_a_program_is_json_too(module: str, owner: str, words: tuple[str, ...]) -> None:
    source = f"import sys, {module} as it\nit.{owner}.__init__ = lambda *_, **__: 1 / 0\n"
    source += "sys.exit(it.main(sys.argv[1:]))\n"
    ended = subprocess.run(
        wire.python("-c", source, "--log-format=json", *words),
        cwd=wire.ROOT, capture_output=True, text=True, timeout=wire.DEADLINE_S,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    entry = json.loads(ended.stderr)
    assert entry["message"] == "this is a fault of the program, which ends"
    assert entry["traceback"].endswith("ZeroDivisionError: division by zero")


def test_log_of_the_gates_is_the_workers_log(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(
        "import logging\n"
        "logging.getLogger('pothead.gating').warning('no /proc')\n"
        "def app(environ, start_response): ...\n"
    )
    ended = run(WORKER, "--check", "--log-format", "json", "gated", cwd=tmp_path)
    entry = json.loads(ended.stderr)
    assert (entry["logger"], entry["message"]) == ("pothead.gating", "no /proc")


def test_json_of_the_hub_can_be_asked_for_in_the_environment() -> None:
    ended = run(HUB, "--max-queue", "0", environment={"POTHEAD_HUB_LOG_FORMAT": "json"})
    assert "--max-queue" in json.loads(ended.stderr)["message"]


# ---- Hints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "words", "wanted"),
    [
        (HUB, ["--max-que", "5"], "there is no option --max-que; did you mean --max-queue?"),
        (HUB, ["--Max_Queue=5"], "there is no option --Max_Queue; did you mean --max-queue?"),
        (HUB, ["--zzz"], "there is no option --zzz; see --help"),
        (HUB, ["worker:app"], "no option; see --help (a command comes after --, an app is the worker's)"),
        (HUB, ["--max-queue", "-1"], "--max-queue: '-1' is not a whole number of 1 or more"),
        (
            HUB,
            ["--priority-step", "-1s"],
            "--priority-step: '-1s' is not a duration like 250ms, 10s, 5m, 1h or off",
        ),
        (
            HUB,
            ["--route", "r=http://a"],
            "--route: 'r=http://a' has no path prefix, as in /render=http://gpu.example",
        ),
        (HUB, ["--route", "/r=a"], "--route: '/r=a' names no origin, as in /render=http://gpu.example"),
        (HUB, ["--route", "/r=http://a", "--route", "/r=http://b"], "--route: names the prefix /r twice"),
        (HUB, ["--fair-by", "a b"], "--fair-by is none, address or a field"),
        (HUB, ["--admin-port", "-1"], "--admin-port: '-1' is not a port from 0 to 65535"),
        (WORKER, ["--worker", "2"], "there is no option --worker; did you mean --workers?"),
        (WORKER, ["--gracefull-timeout=5"], "did you mean --graceful-timeout?"),
        (WORKER, ["--workers", "-1"], "--workers: '-1' is not a number from 1 to 9999"),
        (WORKER, ["--inspection-port", "-1"], "--inspection-port: '-1' is not a port from 0 to 65535"),
    ],
)
def test_mistake_on_the_command_line_gets_a_hint(program: str, words: list[str], wanted: str) -> None:
    ended = run(program, *words)
    assert ended.status == 2
    assert ended.stderr.rstrip("\n").endswith(wanted)


@pytest.mark.parametrize("module", [pothead, pothead_worker])
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("graceful_timeout", "OFF", math.inf),
        ("graceful_timeout", "off", math.inf),
        ("graceful_timeout", "5M", 300.0),
        ("log_level", "Debug", "debug"),
        ("log_format", "JSON", "json"),
    ],
)
def test_both_programs_take_the_same_values(module: ModuleType, name: str, text: str, value: object) -> None:
    assert getattr(module.Given([flag(name), text], {}).options, name) == value


@pytest.mark.parametrize("program", [HUB, WORKER])
def test_help_is_in_groups_and_has_one_word_for_times(program: str) -> None:
    text = "\n".join(run(program, "--help").lines)
    assert len(re.findall(r"^[a-z ]+:$", text, re.MULTILINE)) >= 5
    assert "--graceful-timeout TIME" in text and "DURATION" not in text


UNKNOWN = {
    "POTHEAD_HUB_MAXQUEUE": "5",
    "POTHEAD_WORKER_GRACEFUL": "5",
    # Nothing of this is a mistake.
    "POTHEAD_HUB_QUEUE": "",
    "POTHEAD_HUB_MAX_QUEUE": "7",
    "POTHEAD_HUB_SERVICE_HOST": "10.0.0.1",
    "POTHEAD_HUB_SERVICE_PORT_HTTP": "80",
    "POTHEAD_HUB_PORT": "tcp://10.0.0.1:80",
    "POTHEAD_HUB_PORT_80_TCP_ADDR": "10.0.0.1",
    "POTHEAD_WORKER_WORKERS": "1",
    "POTHEAD_WORKERS": "1",
    "POTHEAD_CONNECT": "localhost:1",
    "POTHEAD_CPU_PROMISED": "1",
}


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (HUB, "POTHEAD_HUB_MAXQUEUE is the variable of no option; did you mean POTHEAD_HUB_MAX_QUEUE?"),
        (
            WORKER,
            "POTHEAD_WORKER_GRACEFUL is the variable of no option; did you mean POTHEAD_WORKER_GRACEFUL",
        ),
    ],
)
def test_variable_that_no_option_has_gets_a_warning(program: str, wanted: str) -> None:
    words = FREE_PORTS if program == HUB else ()
    ended = run(program, "--check", *words, environment=UNKNOWN)
    assert ended.status == 0
    assert ended.stderr.count("\n") == 1 and wanted in ended.stderr and " WARNING " in ended.stderr


# ---- What would run ----------------------------------------------------------------------------------


def test_check_of_the_hub_tells_its_options_where_they_are_from_and_its_ports() -> None:
    environment = {"POTHEAD_HUB_QUEUE_TIMEOUT": "2m", "POTHEAD_HUB_MAX_QUEUE": "7"}
    ended = run(HUB, "--check", *FREE_PORTS, "--max-queue", "5", "--", "sh", environment=environment)
    assert (ended.status, ended.stderr) == (0, "")
    told = dict(line.rsplit(" (", 1) for line in ended.lines if line.startswith("--"))
    assert {word.split()[0] for word in told} == {flag(name) for name in GIVEN}
    assert told["--max-queue 5"] == "--max-queue)"
    assert told["--queue-timeout 120s"] == "POTHEAD_HUB_QUEUE_TIMEOUT)"
    assert told["--max-request-body 1g"] == "default)"
    assert [line.rpartition(":")[0] for line in ended.lines[-4:-1]] == [
        f"would listen {role}=127.0.0.1" for role in ("consumers", "workers", "admin")
    ]
    assert ended.lines[-1] == "would start sh"


@pytest.mark.parametrize("name", GIVEN)
def test_check_of_the_hub_writes_a_value_as_it_may_be_given(name: str) -> None:
    value = GIVEN[name][1]
    parse = pothead.OPTION_HELP[name][1]
    assert parse(pothead.write_value(value, parse)) == value


def test_check_of_a_hub_that_could_not_start_ends_as_the_start_would() -> None:
    assert run(HUB, "--check", "--max-queue", "0").status == 2
    assert run(HUB, "--check", *FREE_PORTS, "--worker-host", "0.0.0.0").status == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run(HUB, "--check", *FREE_PORTS, "--main-port", str(taken.getsockname()[1]))
        assert (ended.status, ended.lines) == (2, []) and "in use" in ended.stderr
    ended = run(HUB, "--check", *FREE_PORTS, "--", "nosuch-command")
    assert ended == Ended(2, [], "pothead: cannot start nosuch-command: No such file or directory\n")


def test_check_takes_no_connection_from_the_hub_whose_ports_it_would_share() -> None:
    with wire.hub_process("--reuse-port") as hub:
        ports = [
            word
            for role in ("main", "worker", "admin")
            for word in (f"--{role}-port", str(getattr(hub, role)[1]))
        ]
        check = wire.Program(wire.python(HUB, "--check", "--reuse-port", *ports), wire.ROOT)
        check.may_have_ended = True
        with wire.running(check), wire.Peer.connect(hub.main) as consumer:
            while check.process.poll() is None:
                with wire.Peer.connect(hub.main) as other:
                    other.send(b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n")
                    assert other.read_response().status == 405
            assert check.wait() == 0
            consumer.send(b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert consumer.read_response().status == 405


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]])
def test_check_of_the_worker_loads_the_app_and_connects_to_nobody(tmp_path: Path, mode: list[str]) -> None:
    (tmp_path / "counted.py").write_text("print('imported')\ndef app(environ, start_response): ...\n")
    with wire.Listener() as listener:
        address = f"127.0.0.1:{listener.worker[1]}"
        words = ["--check", *mode, "--inspection-port", "0", "counted:app"]
        ended = run(WORKER, *words, cwd=tmp_path, environment={"POTHEAD_CONNECT": address})
        listener.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.sock.accept()
    assert ended.status == 0
    assert ended.lines[0] == "imported"
    assert ended.lines[-1] == f"would connect to {address} and serve counted:app"
    assert f"--connect {address} (POTHEAD_CONNECT)" in ended.lines
    assert "--workers 1 (default)" in ended.lines and "PROMETHEUS_PORT 9090 (default)" in ended.lines


def test_check_of_a_worker_that_could_not_start_ends_as_the_start_would(tmp_path: Path) -> None:
    assert run(WORKER, "--check", "nosuch:app", cwd=tmp_path).status == 3
    assert run(WORKER, "--check", "--use-request-subprocess", "nosuch:app", cwd=tmp_path).status == 3
    assert run(WORKER, "--check", "--workers", "0").status == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(WORKER, "--check", "--inspection-port", str(taken.getsockname()[1])).status == 2


def test_check_of_a_worker_leaves_the_metrics_of_the_one_that_runs(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    (tmp_path / "counted.py").write_text(
        "from prometheus_client import Counter\n"
        "counter = Counter('a', 'b')\n"
        "def app(environ, start_response): ...\n"
    )
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "counter_1.db").write_bytes(b"")
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"), "PROMETHEUS_PORT": "0"}
    assert run(WORKER, "--check", "counted", cwd=tmp_path, environment=environment).status == 0
    assert os.listdir(tmp_path / "metrics") == ["counter_1.db"]


def test_check_in_json_is_json() -> None:
    for program, words in ((HUB, FREE_PORTS), (WORKER, ())):
        ended = run(program, "--check", "--log-format", "json", *words)
        entries = [json.loads(line) for line in ended.lines]
        assert {"option": "--log-format", "value": "json", "from": "--log-format"} in entries
        assert "would " in entries[-1]["check"]


# What both programs have of the log and of the options.
SHARED = (
    *("log_uncaught", "json_message", "LogFormatter", "Output", "write_if_there_is_room", "OutputHandler"),
    *("UsageError", "OptionParser", "parse_duration", "parse_port", "parse_port_or_off", "parse_switch"),
    *("parse_one_of", "flag_of", "add_options", "join_negatives", "describe_unknown"),
    *("suggest", "warn_of_unknown_variables", "parse_or_refuse", "find_log_format", "check_line"),
)


@pytest.mark.parametrize("name", SHARED)
def test_what_both_programs_have_is_the_same(name: str) -> None:
    hubs, workers = (inspect.getsource(getattr(module, name)) for module in (pothead, pothead_worker))
    assert hubs == workers


def test_network_may_be_given_by_any_of_its_addresses() -> None:
    hub = pothead.Hub(
        pothead.Options(main_port=0, worker_port=0, admin_port=None, forwarded_allow_ips=("10.1.2.3/8",))
    )
    assert (hub.forwarding.trusts("10.9.9.9:1"), hub.forwarding.trusts("11.0.0.1:1")) == (True, False)
    hub.loop.close()


def test_options_of_a_program_are_checked_as_those_of_the_command_line_are() -> None:
    senseless: list[dict[str, Any]] = [
        {"main_port": 65536},
        {"max_queue": 0},
        {"queue_timeout": 0},
        {"graceful_timeout": -1},
        {"drain_delay": -1},
        {"drain_delay": float("inf")},
        {"spool_memory": -1},
        {"spool_dir": "/nonexistent"},
        {"admin_token_for": "nobody"},
        {"forwarded_allow_ips": ("x",)},
        {"forwarded_allow_ips": ("10.0.0.0/33",)},
    ]
    for options in senseless:
        with pytest.raises(ValueError, match=flag(next(iter(options)))):
            pothead.Options(**options)
