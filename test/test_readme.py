"""The README: its options, tables and limits are the programs' own, and its commands and examples work."""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pothead
import pothead_worker
import wire

README = (wire.ROOT / "README.md").read_text(encoding="utf-8")
DEFAULT_PORTS = {"MAIN": 8080, "WORKER": 4040, "ADMIN": 4041}
UNITS = {"": 1, "s": 1, "KiB": pothead.KIB, "MiB": pothead.MIB}

Ports = dict[str, int]


def section(heading: str) -> str:
    """Return the text below a heading, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"the README has no section {heading!r}"
    return match[1]


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table in a section, row by row, without its head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    head, line, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert set(line) == {"---"}
    assert all(len(row) == len(head) for row in rows), rows
    return rows


def blocks(language: str, text: str) -> list[str]:
    """Return the code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


# ---- Options -----------------------------------------------------------------------------------------


def options_in_help(program: str) -> dict[str, str]:
    """Return each option that takes a value or is a switch, as `--help` writes it, and its default."""
    environment = {**os.environ, "COLUMNS": "1000"}  # one line an option
    command = wire.python(str(wire.ROOT / program), "--help")
    text = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=30
    ).stdout
    found = {}
    for name, help_text in re.findall(r"^  (\S+(?: \S+)?)(?: {2,}|\n {10,})(\S.*)$", text, re.MULTILINE):
        default = re.search(r"\(default: (.*)\)$", help_text)
        found[name] = default[1] if default else "no"
    return found


def options_in_readme(heading: str) -> dict[str, str]:
    """Return the same from the table of a section."""
    return {option.strip("`"): default.replace("`", "") for option, default, _ in table(heading) if default}


@pytest.mark.parametrize(
    ("program", "heading"), [("pothead.py", "The hub"), ("pothead_worker.py", "The worker")]
)
def test_every_option_is_in_the_readme_with_its_default_and_no_other_is(program: str, heading: str) -> None:
    in_help = options_in_help(program)
    for name in ("--help", "--version", "--check"):
        if in_help.pop(name, None):
            assert f"`{name}`" in section(heading), f"{name} is not in the README"
    in_help = {name: default for name, default in in_help.items() if not name.startswith("-h,")}
    assert len(in_help) > 3
    assert options_in_readme(heading) == in_help


def test_defaults_in_the_readme_are_those_of_a_hub_in_a_program() -> None:
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(pothead.Options)}
    in_readme = {option.split()[0]: default for option, default in options_in_readme("The hub").items()}
    assert set(in_readme) == fields
    arguments = [
        f"{option}={default}"
        for option, default in in_readme.items()
        if default not in ("no", "none", "the system's directory for them")
    ]
    assert pothead.parse_args(arguments, {}) == (pothead.Options(), [])


# ---- Tables ------------------------------------------------------------------------------------------


def test_status_table_is_the_hubs_own() -> None:
    rows = {code.strip("`"): (status, text) for code, status, text in table("Statuses and log codes")}
    assert set(rows) == {outcome.code for outcome in pothead.Outcome}
    for outcome in pothead.Outcome:
        status, text = rows[outcome.code]
        if outcome is pothead.Outcome.REFUSED:
            assert status == "see below"
        elif outcome.status == pothead.CONSUMER_GONE_STATUS:
            assert status == "499, in the log only"
        else:
            assert status == (str(outcome.status) if outcome.status else "the worker's")
        sentence = outcome.sentence[:1].upper() + outcome.sentence[1:]
        assert text.startswith(f"{sentence}." if sentence else "The response is with the consumer.")


def test_admin_port_offers_what_the_readme_names() -> None:
    section_tables = re.split(r"\n\n(?=\|)", section("Looking at it"))[1:]
    requests, metrics = (re.findall(r"^\| `(.*?)` \|", each, re.MULTILINE) for each in section_tables)
    pages = {f"GET {path.decode()}" for path in pothead.PAGES}
    actions = {f"POST {path.decode()}" for path in pothead.ACTIONS}
    assert set(requests) == {*pages, *actions, "POST /requests/ID/cancel"}
    core = pytest.importorskip("prometheus_client.core")
    hub = pothead.Hub(pothead.Options(main_port=0, worker_port=0, admin_port=None))
    try:
        families = list(pothead.MetricsCollector(hub).collect())
    finally:
        hub.loop.close()
    total = {core.CounterMetricFamily: "_total"}
    names = [each.name + total.get(type(each), "") for each in families]
    assert metrics and sorted(metrics) == sorted([*names, "process_…"])


# What gets each status of refusal that the README names.
REFUSED = {
    400: b"GET / HTTP/1.1\r\n\r\n",
    405: b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n",
    408: b"GET / HTTP/1.1\r\n",
    413: b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n",
    414: b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 9000),
    417: b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: miracles\r\n\r\n",
    431: b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % (b"a: b\r\n" * 100),
    501: b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    505: b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
}


def test_refusals_are_those_that_the_readme_names() -> None:
    paragraph = next(
        part for part in section("Statuses and log codes").split("\n\n") if "refused with" in part
    )
    named = {int(number) for number in re.findall(r"(?<![-`0-9])[45][0-9][0-9](?![-`0-9])", paragraph)}
    assert named == {*REFUSED, 503}, "503 is for a disk that is full"
    with wire.hub_process("--head-timeout", "300ms", "--max-request-body", "1000") as hub:
        for status, request in REFUSED.items():
            with wire.Peer.connect(hub.main) as consumer:
                consumer.send(request)
                assert consumer.read_response().status == status
        assert hub.wait_for_line(lambda line: "status=505" in line and "code=RQ" in line)


def test_limits_are_the_hubs_own() -> None:
    rows = table("Limits")
    assert len(rows) > 5
    for name, value, _ in rows:
        number, _, unit = value.partition(" ")
        assert getattr(pothead.LIMITS, name.strip("`")) == int(number) * UNITS[unit], name


def test_environ_has_the_keys_that_the_readme_names(tmp_path: Path) -> None:
    (tmp_path / "keys.py").write_text(
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [f'{key} {type(environ[key]).__name__}\\n'.encode() for key in environ]\n"
    )
    with wire.hub_process() as hub, wire.worker_process(hub, "keys:app", cwd=tmp_path):
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            keys = dict(line.split() for line in consumer.read_response().body.decode().splitlines())
    named = [row[0].strip("`") for row in table("Your own app")]
    assert [keys[key] for key in named] == ["str", "float", "int", "Event"]


# ---- The commands, as a newcomer runs them -----------------------------------------------------------


def free_ports() -> Ports:
    """Return three ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in DEFAULT_PORTS]
        return {role: sock.getsockname()[1] for role, sock in zip(DEFAULT_PORTS, socks, strict=True)}


def with_ports(text: str, ports: Ports) -> str:
    """Return the text with its default ports replaced."""
    return re.sub(
        r"\b(8080|4040|4041)\b",
        lambda match: str(next(ports[role] for role, port in DEFAULT_PORTS.items() if port == int(match[0]))),
        text,
    )


class Newcomer:
    """Somebody with the two files in a directory, a shell and the README."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports: Ports = {}
        for name in ("pothead.py", "pothead_worker.py"):
            shutil.copy(wire.ROOT / name, directory)
        (directory / "bin").mkdir()
        python3 = directory / "bin" / "python3"
        python3.write_text(f'#!/bin/sh\nexec "{sys.executable}" -u -W error "$@"\n')
        python3.chmod(0o755)
        self.environment = {"PATH": f"{directory}/bin:{os.environ['PATH']}"}

    @contextlib.contextmanager
    def hub(self, command: str) -> Iterator[wire.HubProcess]:
        """Run a hub, on the default ports if they are free, else on others."""
        for self.ports in (DEFAULT_PORTS, free_ports(), free_ports()):
            if not all(self._is_free(port) for port in self.ports.values()):
                continue
            variables = {f"POTHEAD_HUB_{role}_PORT": str(port) for role, port in self.ports.items()}
            program = wire.HubProcess(
                ["sh", "-c", f"exec {command}"], self.directory, self.environment | variables
            )
            try:
                program.wait_until_ready()
            except AssertionError:
                program.may_have_ended = True
                program.stop()
                if "in use" not in program.stderr:
                    raise
                continue
            with wire.running(program):
                yield program
            return
        raise AssertionError("no free ports")

    def run(self, commands: str) -> str:
        """Run the commands in a shell to their end; return what they print."""
        done = subprocess.run(
            ["bash", "-e", "-c", with_ports(commands, self.ports)],
            cwd=self.directory,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done
        return done.stdout

    @staticmethod
    def _is_free(port: int) -> bool:
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return True
        return False


@pytest.fixture
def newcomer(tmp_path: Path) -> Newcomer:
    return Newcomer(tmp_path)


@pytest.mark.usefixtures("package_index")
def test_clone_runs_as_it_is_and_can_be_installed(newcomer: Newcomer) -> None:
    if not (wire.ROOT / ".git").exists():
        pytest.skip("what is tested here is no repository")
    clone, install = blocks("sh", section("Install"))
    version = f"pothead {pothead.__version__}\n"
    newcomer.run(clone.replace("REPOSITORY", str(wire.ROOT)))
    newcomer.directory /= "pothead"
    assert newcomer.run("python3 pothead.py --version") == version
    assert newcomer.run(install).endswith(version)


def test_quick_start_works(newcomer: Newcomer) -> None:
    service, greet, compress, three, stats = blocks("sh", section("Try it"))
    with newcomer.hub(service) as hub:
        hub.wait_for_error(lambda line: "connected slots=2" in line)
        assert newcomer.run(greet).startswith("Hello from a POTHEAD worker.\n")
        newcomer.run(compress.replace("5000000", "500000"))
        newcomer.run(three)
        original = (newcomer.directory / "somefile").read_bytes()
        assert len(original) == 500_000
        for name in ("somefile.xz", "1.xz", "2.xz", "3.xz"):
            assert lzma.decompress((newcomer.directory / name).read_bytes()) == original
        assert '"OK": 5' in newcomer.run(stats)


def test_output_of_the_quick_start_is_as_the_readme_shows_it(newcomer: Newcomer) -> None:
    service, greet, *_ = blocks("sh", section("Try it"))
    shown = blocks("", section("Try it"))[-1]
    logged = blocks("", section("Statuses and log codes"))[-1]
    with newcomer.hub(service) as hub:
        connected = hub.wait_for_error(lambda line: "connected slots=2" in line)
        newcomer.run(greet)
        line = hub.wait_for_line(lambda line: "code=" in line)
        start = "\n".join([*hub.lines[:3], connected])
    assert without_numbers(start) == without_numbers(with_ports(shown.strip(), newcomer.ports))
    assert re.findall(r" (\w+)=", line) == re.findall(r" (\w+)=", logged)


def without_numbers(text: str) -> str:
    """Return the text with every date and time made alike."""
    return re.sub(r"[0-9]{4}-[0-9-]+T[0-9:.]+Z", "NOW", text)


def test_app_of_the_readme_is_served(newcomer: Newcomer) -> None:
    (newcomer.directory / "slowhash.py").write_text(blocks("python", section("Your own app"))[0])
    service, ask, hub_alone, worker_alone = blocks("sh", section("Your own app"))
    with newcomer.hub(service):
        answer = newcomer.run(ask)
        assert re.fullmatch(r"[0-9a-f]{64}\n", answer)
    with newcomer.hub(hub_alone):
        command = ["sh", "-c", f"exec {with_ports(worker_alone, newcomer.ports)}"]
        with wire.running(wire.WorkerProcess(command, newcomer.directory, newcomer.environment)) as worker:
            assert newcomer.run(ask) == answer
            worker.wait_for_error(lambda line: "connected slots=2" in line)


def test_orders_of_the_readme_are_taken(newcomer: Newcomer) -> None:
    (orders,) = blocks("sh", section("Looking at it"))
    with newcomer.hub("python3 pothead.py"):
        assert newcomer.run(orders) == "paused\nresumed\n"


# ---- The worker's modes ------------------------------------------------------------------------------


def serve_once(listener: wire.Listener, worker: wire.WorkerProcess, body: bytes = b"") -> bytes:
    """Have a worker serve one request; return what it answers."""
    with listener.accept() as peer:
        peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nX-Request-Id: r1\r\nContent-Length: %d\r\n\r\n" % len(body))
        peer.send(body)
        response = peer.read_response()
    assert response.status == 200, worker.stderr
    return response.body


def options_of(command: str) -> list[str]:
    """Return what the command of the README gives to the worker."""
    return command.split("pothead_worker.py", 1)[1].split()


def test_gated_app_of_the_readme_is_served(tmp_path: Path, listener: wire.Listener) -> None:
    source, _ = blocks("python", section("Only as many jobs as fit"))
    (command,) = blocks("sh", section("Only as many jobs as fit"))
    (tmp_path / "slowhash.py").write_text(blocks("python", section("Your own app"))[0])
    (tmp_path / "gatedhash.py").write_text(source)
    shutil.copy(wire.ROOT / "gating.py", tmp_path)
    with wire.worker_process(listener, *options_of(command), cwd=tmp_path) as worker:
        for _ in range(2):
            assert len(serve_once(listener, worker)) == 65


def test_gate_of_the_readme_counts(tmp_path: Path, listener: wire.Listener) -> None:
    _, source = blocks("python", section("Only as many jobs as fit"))
    app = (
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [environ['myapp.licence'].encode()]\n"
        "app.wait_for_slot = wait_for_slot\n"
    )
    (tmp_path / "licensed.py").write_text(source + app)
    with wire.worker_process(listener, "--poll-jobs", "licensed:app", cwd=tmp_path) as worker:
        for _ in range(5):
            assert serve_once(listener, worker) == b"one of three"


@pytest.mark.parametrize("app", ["app", "create_app()", "create_app(rounds=5)"])
@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])
def test_app_of_the_readme_in_flask_is_served(
    tmp_path: Path, listener: wire.Listener, app: str, mode: list[str]
) -> None:
    pytest.importorskip("flask")
    _, source = blocks("python", section("Your own app"))
    (tmp_path / "flaskhash.py").write_text(source)
    assert f"`flaskhash:{app}`" in section("Your own app").replace("'", "")
    with wire.worker_process(listener, *mode, f"flaskhash:{app}", cwd=tmp_path) as worker:
        assert len(serve_once(listener, worker, b"some text")) == 65


def test_app_of_the_readme_in_fastapi_is_served(tmp_path: Path, listener: wire.Listener) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    (source,) = blocks("python", section("A service in another language"))
    serve, work = blocks("sh", section("A service in another language"))[1].splitlines()
    (tmp_path / "asgihash.py").write_text(source)
    command = [sys.executable, *serve.removesuffix(" &").replace("8000", "0").split()[1:]]
    with wire.running(wire.Program(command, tmp_path)) as service:
        line = service.wait_for_error(lambda text: "running on http://" in text)
        port = re.findall(r"http://127\.0\.0\.1:([0-9]+)", line)[0]
        with wire.worker_process(listener, *options_of(work.replace("8000", port))) as worker:
            assert len(serve_once(listener, worker, b"some text")) == 65
            assert len(serve_once(listener, worker, b"x" * 1_000_000)) == 65


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_service_of_the_readme_in_javascript_gets_requests(tmp_path: Path, listener: wire.Listener) -> None:
    (source,) = blocks("javascript", section("A service in another language"))
    commands = blocks("sh", section("A service in another language"))[0]
    port = str(free_ports()["MAIN"])
    (tmp_path / "render.js").write_text(source.replace("8000", port) + "console.log('ready');\n")
    service = wire.Program(["node", "render.js"], tmp_path)
    with wire.running(service):
        service.wait_for_line("ready".__eq__)
        options = options_of(commands.replace("8000", port))
        with wire.worker_process(listener, *options) as worker:
            assert serve_once(listener, worker) == b"rendered for request r1\n"


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]])
def test_counter_of_the_readme_is_on_the_page(
    tmp_path: Path, listener: wire.Listener, mode: list[str]
) -> None:
    pytest.importorskip("prometheus_client")
    (source,) = blocks("python", section("Metrics"))
    (tmp_path / "counted.py").write_text(source)
    (tmp_path / "metrics").mkdir()
    command = [*wire.python("-W", "ignore::ResourceWarning"), str(wire.ROOT / "pothead_worker.py"), *mode]
    command += ["--connect", f"127.0.0.1:{listener.worker[1]}", "counted:app"]
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"), "PROMETHEUS_PORT": "0"}
    with wire.running(wire.WorkerProcess(command, tmp_path, environment)) as worker:
        line = worker.wait_for_error(lambda text: "listening metrics" in text)
        for _ in range(3):
            assert serve_once(listener, worker) == b"counted\n"
        with wire.Peer.connect(("127.0.0.1", int(line.rpartition(":")[2]))) as visitor:
            visitor.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            page = visitor.read_response().body.decode()
    assert 'myapp_requests_total{method="POST"} 3.0\n' in page
    for name, _ in table("Metrics"):
        assert f"\n# TYPE {name.strip('`').partition('{')[0]} " in page


def test_pages_of_the_inspection_port_are_those_that_the_readme_names() -> None:
    pages = pothead_worker.Inspection(pothead_worker.WorkerPool(pothead_worker.demo_app)).pages
    assert {name.strip("`") for name, _ in table("What a worker is doing")} == set(pages)


def test_variables_of_the_worker_are_in_the_readme_with_their_defaults() -> None:
    options = pothead_worker.parse_args([], {})
    defaults = {name.strip("`"): default.strip("`") for name, default, _ in table("The worker's variables")}
    assert defaults == {
        "PROMETHEUS_MULTIPROC_DIR": "none",
        "PROMETHEUS_PORT": str(options.metrics_port),
        "POTHEAD_CPU_PROMISED": "0",
        "OOB_ITEM_EXPIRY_SECONDS": f"{options.pickup_expiry_s:g}",
        "OOB_CLEANUP_INTERVAL_SECONDS": f"{options.pickup_interval_s:g}",
    }


# ---- The library -------------------------------------------------------------------------------------


class Example:
    """An example of the README that runs until somebody presses Enter."""

    def __init__(self, source: str, directory: Path) -> None:
        (directory / "example.py").write_text(source)
        os.mkfifo(directory / "keyboard")
        self._keyboard = os.open(directory / "keyboard", os.O_RDWR)
        command = ["sh", "-c", 'exec "$@" < keyboard', "sh", *wire.python("example.py")]
        self.program = wire.Program(command, directory, {"PYTHONPATH": str(wire.ROOT)})

    def press_enter(self) -> None:
        os.write(self._keyboard, b"\n")

    def close(self) -> None:
        os.close(self._keyboard)


@contextlib.contextmanager
def example(import_line: str, directory: Path, ports: Ports) -> Iterator[Example]:
    sources = [block for block in blocks("python", section("As a library")) if import_line in block]
    assert len(sources) == 1
    with contextlib.closing(Example(with_ports(sources[0], ports), directory)) as running:
        with wire.running(running.program):
            yield running


def greeting_from(address: wire.Address) -> bytes:
    with wire.Peer.connect(address) as consumer:
        consumer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        return consumer.read_response().body


def test_hub_of_the_readme_runs_in_a_thread_and_is_stopped_from_another(tmp_path: Path) -> None:
    with example("from pothead import", tmp_path, dict.fromkeys(DEFAULT_PORTS, 0)) as running:
        line = running.program.wait_for_line(lambda line: line.startswith("Listening at"))
        addresses = dict(re.findall(r"'(\w+)': '(\S+:[0-9]+)'", line))
        command = wire.python(str(wire.ROOT / "pothead_worker.py"), "--connect", addresses["workers"])
        with wire.running(wire.WorkerProcess(command, tmp_path)):
            host, _, port = addresses["consumers"].rpartition(":")
            assert greeting_from((host, int(port))).startswith(b"Hello")
        running.program.wait_for_line(lambda line: line.endswith("code=OK"))
        running.press_enter()
        assert running.program.wait() == 0
        assert running.program.lines[-1].endswith("code=OK"), "the log has one line an exchange"


def test_worker_of_the_readme_runs_in_a_thread_and_is_stopped_from_another(tmp_path: Path) -> None:
    with wire.hub_process() as hub:
        ports = DEFAULT_PORTS | {"WORKER": hub.worker[1]}
        with example("from pothead_worker import", tmp_path, ports) as running:
            running.program.wait_for_line(lambda line: "Two slots" in line)
            assert greeting_from(hub.main).startswith(b"Hello")
            running.press_enter()
            assert running.program.wait() == 0
            assert running.program.stderr == ""


def test_both_programs_keep_to_the_versions_of_python_that_the_readme_names() -> None:
    assert "Python 3.10 or later" in README
    assert 'python_requires=">=3.10"' in (wire.ROOT / "setup.py").read_text(encoding="utf-8")
