"""The README and the documents for users: what they say is so, and their commands and examples work."""

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

import option_tables
import pothead
import pothead_worker
import wire

README = (wire.ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY, OPERATING, OPTIONS, WORKER = (
    (wire.ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("library", "operating", "options", "worker")
)
DEFAULT_PORTS = {"MAIN": 8080, "WORKER": 4040, "ADMIN": 4041}
UNITS = {"ms": 0.001, "": 1, "s": 1, "KiB": pothead.KIB, "MiB": pothead.MIB}

Ports = dict[str, int]


def section(heading: str, document: str = README) -> str:
    """Return the text below a heading, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", document, re.MULTILINE | re.DOTALL)
    assert match, f"there is no section {heading!r}"
    return match[1]


def table(heading: str, document: str = README) -> list[list[str]]:
    """Return the cells of the table in a section, row by row, without its head."""
    lines = [line for line in section(heading, document).splitlines() if line.startswith("|")]
    head, line, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert set(line) == {"---"}
    assert all(len(row) == len(head) for row in rows), rows
    return rows


def blocks(language: str, text: str) -> list[str]:
    """Return the code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


# ---- The README ----------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 300


def test_readme_has_a_table_of_contents() -> None:
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    contents = README.partition("\n## ")[0]
    assert re.findall(r"\[([^]]+)\]\(#", contents) == headings


def test_promises_of_the_readme_are_ten() -> None:
    assert len(re.findall(r"^- \*\*", section("What you can rely on"), re.MULTILINE)) == 10


def test_image_for_development_is_used_as_its_file_says() -> None:
    commands = blocks("sh", section("Development"))[1].splitlines()
    told = (wire.ROOT / "deploy" / "dev.Dockerfile").read_text(encoding="utf-8")
    assert len(commands) == 2 and all(f"#   {command}" in told for command in commands)


# ---- Options -----------------------------------------------------------------------------------------


def options_in_document(heading: str) -> dict[str, str]:
    """Return each option of a program that has a default, with it, from docs/options.md."""
    rows = table(heading, OPTIONS)
    return {option.strip("`"): default.replace("`", "") for option, default, _ in rows if default}


def test_tables_of_options_are_what_the_programs_tell() -> None:
    """If this fails: python3 test/option_tables.py"""
    assert option_tables.up_to_date(OPTIONS) == OPTIONS


@pytest.mark.parametrize(
    ("program", "heading"), [("pothead.py", "The hub"), ("pothead_worker.py", "The worker")]
)
def test_every_option_is_in_the_document_and_no_other_is(program: str, heading: str) -> None:
    module = {"pothead.py": pothead, "pothead_worker.py": pothead_worker}[program]
    named = {option.split()[0] for option in options_in_document(heading)} - {"MODULE:APP"}
    assert named == {module.flag_of(name) for name in module.OPTION_HELP}
    for name in ("--help", "--version", "--check"):
        assert f"{name}`" in section(heading, OPTIONS)


def test_defaults_in_the_document_are_those_of_a_hub_in_a_program() -> None:
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(pothead.Options)}
    told = {option.split()[0]: default for option, default in options_in_document("The hub").items()}
    assert set(told) == fields
    arguments = [
        f"{option}={default}"
        for option, default in told.items()
        if default not in ("no", "none", "the system's directory for them")
    ]
    assert pothead.Given(arguments, {}).options == pothead.Options()


def test_options_of_the_readme_have_their_defaults() -> None:
    programs = {"hub": ["The hub"], "worker": ["The worker"], "both": ["The hub", "The worker"]}
    rows = table("Options")
    assert len(rows) == 12
    for option, of, default, _ in rows:
        for heading in programs[of]:
            assert options_in_document(heading)[option.strip("`")] == default.replace("`", "")


# ---- Tables ------------------------------------------------------------------------------------------


# What gets each status of refusal that docs/operating.md names.
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


def test_refusals_are_those_that_are_named() -> None:
    paragraphs = section("Log codes", OPERATING).split("\n\n")
    paragraph = next(part for part in paragraphs if "refused with" in part)
    named = {int(number) for number in re.findall(r"(?<![-`0-9])[45][0-9][0-9](?![-`0-9])", paragraph)}
    assert named == {*REFUSED, 503}, "503 is for a disk that is full"
    with wire.hub_process("--head-timeout", "300ms", "--max-request-body", "1000") as hub:
        for status, request in REFUSED.items():
            with wire.Peer.connect(hub.main) as consumer:
                consumer.send(request)
                assert consumer.read_response().status == status
        assert hub.wait_for_line(lambda line: "status=505" in line and "code=RQ" in line)


def test_limits_are_the_hubs_own() -> None:
    rows = table("Limits of the hub", OPERATING)
    assert len(rows) > 5
    for name, value, _ in rows:
        number, _, unit = value.partition(" ")
        assert getattr(pothead.LIMITS, name.strip("`")) == int(number) * UNITS[unit], name


def test_environ_has_the_keys_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "keys.py").write_text(
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    return [f'{key} {type(environ[key]).__name__}\\n'.encode() for key in environ]\n"
    )
    with wire.hub_process() as hub, wire.worker_process(hub, "keys:app", cwd=tmp_path):
        with wire.Peer.connect(hub.main) as consumer:
            consumer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            keys = dict(line.split() for line in consumer.read_response().body.decode().splitlines())
    named = [row[0].strip("`") for row in table("The app", WORKER)]
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
    clone, change, _ = blocks("sh", section("Try it"))[0].splitlines()
    (install,) = blocks("sh", section("Install"))
    version = f"pothead {pothead.__version__}\n"
    newcomer.run(clone.replace("REPOSITORY", str(wire.ROOT)) + "\n" + change)
    newcomer.directory /= "pothead"
    assert newcomer.run("python3 pothead.py --version") == version
    assert newcomer.run(install).endswith(version)


def test_quick_start_works(newcomer: Newcomer) -> None:
    start, greet, compress, three = blocks("sh", section("Try it"))
    service, elsewhere = start.splitlines()[-1], 'cd "$(mktemp -d)"\n'
    assert compress.startswith(elsewhere)
    with newcomer.hub(service) as hub:
        hub.wait_for_error(lambda line: "connected slots=2" in line)
        assert newcomer.run(greet).startswith("Hello from a POTHEAD worker.\n")
        newcomer.run(compress.removeprefix(elsewhere).replace("5000000", "500000"))
        newcomer.run(three)
        original = (newcomer.directory / "somefile").read_bytes()
        assert len(original) == 500_000
        for name in ("somefile.xz", "1.xz", "2.xz", "3.xz"):
            assert lzma.decompress((newcomer.directory / name).read_bytes()) == original
        assert '"OK": 5' in newcomer.run("curl localhost:4041/stats")


def test_output_of_the_quick_start_is_as_the_readme_shows_it(newcomer: Newcomer) -> None:
    start, greet, *_ = blocks("sh", section("Try it"))
    shown = blocks("", section("Try it"))[-1]
    logged = blocks("", section("The log", OPERATING))[-1]
    with newcomer.hub(start.splitlines()[-1]) as hub:
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
    service, ask = blocks("sh", section("Your own app"))
    hub_alone, worker_alone = blocks("sh", section("Several machines", WORKER))
    with newcomer.hub(service):
        answer = newcomer.run(ask)
        assert re.fullmatch(r"[0-9a-f]{64}\n", answer)
    with newcomer.hub(hub_alone):
        command = ["sh", "-c", f"exec {with_ports(worker_alone, newcomer.ports)}"]
        with wire.running(wire.WorkerProcess(command, newcomer.directory, newcomer.environment)) as worker:
            assert newcomer.run(ask) == answer
            worker.wait_for_error(lambda line: "connected slots=2" in line)


def test_actions_of_the_documents_are_taken(newcomer: Newcomer) -> None:
    (orders,) = blocks("sh", section("Actions", OPERATING))
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
    """Return what a command of the documents gives to the worker."""
    return command.split("pothead_worker.py", 1)[1].split()


def test_gated_app_of_the_documents_is_served(tmp_path: Path, listener: wire.Listener) -> None:
    source, _ = blocks("python", section("Only as many jobs as fit", WORKER))
    (command,) = blocks("sh", section("Only as many jobs as fit", WORKER))
    (tmp_path / "slowhash.py").write_text(blocks("python", section("Your own app"))[0])
    (tmp_path / "gatedhash.py").write_text(source)
    shutil.copy(wire.ROOT / "gating.py", tmp_path)
    with wire.worker_process(listener, *options_of(command), cwd=tmp_path) as worker:
        for _ in range(2):
            assert len(serve_once(listener, worker)) == 65


def test_gate_of_the_documents_counts(tmp_path: Path, listener: wire.Listener) -> None:
    _, source = blocks("python", section("Only as many jobs as fit", WORKER))
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


def test_app_of_the_readme_in_flask_is_served(tmp_path: Path, listener: wire.Listener) -> None:
    pytest.importorskip("flask")
    (source,) = blocks("python", section("Flask"))
    (tmp_path / "flaskhash.py").write_text(source)
    assert "`flaskhash:app`" in section("Flask")
    with wire.worker_process(listener, "flaskhash:app", cwd=tmp_path) as worker:
        assert len(serve_once(listener, worker, b"some text")) == 65


@pytest.mark.parametrize("app", ["create_app()", "create_app(rounds=5)"])
@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]], ids=["threads", "processes"])
def test_app_that_a_function_makes_in_flask_is_served(
    tmp_path: Path, listener: wire.Listener, app: str, mode: list[str]
) -> None:
    pytest.importorskip("flask")
    (source,) = blocks("python", section("The app", WORKER))
    (tmp_path / "factory.py").write_text(source)
    assert f"`'factory:{app}'`" in section("The app", WORKER)
    with wire.worker_process(listener, *mode, f"factory:{app}", cwd=tmp_path) as worker:
        assert len(serve_once(listener, worker, b"some text")) == 65


def test_app_of_the_readme_in_fastapi_is_served(tmp_path: Path, listener: wire.Listener) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    (source,) = blocks("python", section("ASGI"))
    serve, work = blocks("sh", section("ASGI"))[0].splitlines()
    (tmp_path / "asgihash.py").write_text(source)
    command = [sys.executable, *serve.removesuffix(" &").replace("8000", "0").split()[1:]]
    with wire.running(wire.Program(command, tmp_path)) as service:
        line = service.wait_for_error(lambda text: "running on http://" in text)
        port = re.findall(r"http://127\.0\.0\.1:([0-9]+)", line)[0]
        with wire.worker_process(listener, *options_of(work.replace("8000", port))) as worker:
            assert len(serve_once(listener, worker, b"some text")) == 65
            assert len(serve_once(listener, worker, b"x" * 1_000_000)) == 65


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_service_in_javascript_gets_requests(tmp_path: Path, listener: wire.Listener) -> None:
    (source,) = blocks("javascript", section("A service in another language", WORKER))
    (commands,) = blocks("sh", section("A service in another language", WORKER))
    port = str(free_ports()["MAIN"])
    (tmp_path / "render.js").write_text(source.replace("8000", port) + "console.log('ready');\n")
    service = wire.Program(["node", "render.js"], tmp_path)
    with wire.running(service):
        service.wait_for_line("ready".__eq__)
        options = options_of(commands.replace("8000", port))
        with wire.worker_process(listener, *options) as worker:
            assert serve_once(listener, worker) == b"rendered for request r1\n"


@pytest.mark.parametrize("mode", [[], ["--use-request-subprocess"]])
def test_counter_of_the_documents_is_on_the_page(
    tmp_path: Path, listener: wire.Listener, mode: list[str]
) -> None:
    pytest.importorskip("prometheus_client")
    (source,) = blocks("python", section("Metrics", WORKER))
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
    for row in table("Metrics of the worker", OPERATING):
        assert f"\n# TYPE {row[0].strip('`')} " in page


def test_pages_of_the_inspection_port_are_those_that_are_named() -> None:
    pages = pothead_worker.Inspection(pothead_worker.WorkerPool(pothead_worker.demo_app)).pages
    assert {name.strip("`") for name, _ in table("What a worker is doing", WORKER)} == set(pages)


def test_variables_of_the_worker_are_told_with_their_defaults() -> None:
    options = pothead_worker.parse_args([], {})
    rows = table("The worker's variables", OPTIONS)
    defaults = {name.strip("`"): default.strip("`") for name, default, _ in rows}
    assert defaults == {
        "PROMETHEUS_MULTIPROC_DIR": "none",
        "PROMETHEUS_PORT": str(options.metrics_port),
        "POTHEAD_CPU_PROMISED": "0",
        "POTHEAD_WORKER_TOKEN": "none",
        "OOB_ITEM_EXPIRY_SECONDS": f"{options.pickup_expiry_s:g}",
        "OOB_CLEANUP_INTERVAL_SECONDS": f"{options.pickup_interval_s:g}",
    }


# ---- The library -------------------------------------------------------------------------------------


class Example:
    """An example of docs/library.md that runs until somebody presses Enter."""

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
    sources = [block for block in blocks("python", LIBRARY) if import_line in block]
    assert len(sources) == 1
    with contextlib.closing(Example(with_ports(sources[0], ports), directory)) as running:
        with wire.running(running.program):
            yield running


def test_hub_of_the_documents_runs_in_a_thread_and_is_stopped_from_another(tmp_path: Path) -> None:
    with example("from pothead import", tmp_path, dict.fromkeys(DEFAULT_PORTS, 0)) as running:
        line = running.program.wait_for_line(lambda line: line.startswith("Listening at"))
        addresses = dict(re.findall(r"'(\w+)': '(\S+:[0-9]+)'", line))
        command = wire.python(str(wire.ROOT / "pothead_worker.py"), "--connect", addresses["workers"])
        with wire.running(wire.WorkerProcess(command, tmp_path)):
            host, _, port = addresses["consumers"].rpartition(":")
            assert wire.fetch((host, int(port)), wire.get(b"/")).body.startswith(b"Hello")
        running.program.wait_for_line(lambda line: line.endswith("code=OK"))
        running.press_enter()
        assert running.program.wait() == 0
        assert running.program.lines[-1].endswith("code=OK"), "the log has one line an exchange"


def test_worker_of_the_documents_runs_in_a_thread_and_is_stopped_from_another(tmp_path: Path) -> None:
    with wire.hub_process() as hub:
        ports = DEFAULT_PORTS | {"WORKER": hub.worker[1]}
        with example("from pothead_worker import", tmp_path, ports) as running:
            running.program.wait_for_line(lambda line: "Two slots" in line)
            assert wire.fetch(hub.main, wire.get(b"/")).body.startswith(b"Hello")
            running.press_enter()
            assert running.program.wait() == 0
            assert running.program.stderr == ""


def test_both_programs_keep_to_the_versions_of_python_that_the_readme_names() -> None:
    assert "Python 3.10 or later" in README
    assert 'python_requires=">=3.10"' in (wire.ROOT / "setup.py").read_text(encoding="utf-8")
