"""The files in deploy/: their options, metrics and timeouts fit the programs and each other."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pothead
import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPLOY = wire.ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
KUBERNETES = DEPLOY / "kubernetes"

# The design's list, with what Prometheus makes of each kind.
HISTOGRAMS = (
    "pothead_hub_queue_seconds",
    "pothead_hub_worker_seconds",
    "pothead_worker_request_seconds",
    "pothead_worker_gate_seconds",
)
METRICS = {
    "pothead_hub_queue_length",
    "pothead_hub_queue_oldest_seconds",
    "pothead_hub_requests_in_flight",
    "pothead_hub_slots",
    "pothead_hub_demand",
    "pothead_hub_requests_total",
    "pothead_hub_worker_errors_total",
    "pothead_hub_requeues_total",
    "pothead_hub_rejected_total",
    "pothead_hub_bytes_total",
    "pothead_build_info",
    "pothead_hub_connections",
    "pothead_hub_spool_bytes",
    "pothead_hub_disk_budget_bytes",
    "pothead_hub_certificate_expiry_timestamp_seconds",
    "pothead_worker_slots",
    "pothead_worker_slots_busy",
    "pothead_worker_requests_total",
    # Of prometheus_client's own collector.
    "process_resident_memory_bytes",
    "process_open_fds",
    *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")),
}


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


@functools.cache
def options(program: str) -> frozenset[str]:
    """Return the options that `--help` of a program knows."""
    command = wire.python(str(wire.ROOT / program), "--help")
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    return frozenset(re.findall(r"--[a-z-]+", text))


def seconds(text: str) -> float:
    return pothead.parse_duration(text)


def first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"{pattern!r} is not there"
    return match[1]


# ---- Options -----------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Return the lists of words that begin with the name of a program, in YAML's two ways to write a list.

    What stands behind `--` is another program's.
    """
    blocks = re.findall(r"(?:args|command):\n((?: +(?:- |#).*\n)+)", text)
    found = [re.findall(r"^ +- (\S+)", block, re.MULTILINE) for block in blocks]
    found += [re.split(r", *", row) for row in re.findall(r"(?:args|command): \[(pothead.*)\]", text)]
    return [words[: words.index("--")] if "--" in words else words for words in found]


@pytest.mark.parametrize(
    "name", ["compose.yaml", *(f"kubernetes/{name}.yaml" for name in ("hub", "worker", "scaledjob"))]
)
def test_every_flag_of_a_container_is_an_option_of_its_program(name: str) -> None:
    found = commands(read(name))
    assert found
    for program, *flags in found:
        known = options(program.replace("-", "_") + ".py")
        unknown = [flag for flag in flags if flag.partition("=")[0] not in known]
        assert not unknown, f"{program}: {unknown}"
        assert len(flags) > 2, "the test has overlooked some"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_variable_is_an_option(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for prefix, program in (("POTHEAD_HUB_", "pothead.py"), ("POTHEAD_WORKER_", "pothead_worker.py")):
        for name in re.findall(rf"{prefix}([A-Z_]+)\b", text):
            assert f"--{name.lower().replace('_', '-')}" in options(program), name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_flag_in_the_prose_is_somebodys_option(path: Path) -> None:
    ours = options("pothead.py") | options("pothead_worker.py")
    others = {
        "--help", "--build", "--scale", "--build-arg", "--rm", "--now", "--full",  # docker, systemctl
        "--no-install-recommends", "--yes", "--no-cache-dir", "--from", "--directory", "--owner", "--group",
        "--create-home", "--uid", "--collector", "--system", "--deploy-hook",
        "--from-literal", "--from-file", "--type", "--since",
    }  # fmt: skip
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text(encoding="utf-8")))
    assert found <= ours | others


def test_units_name_the_sockets_as_the_hub_knows_them() -> None:
    names = {
        first(r"^FileDescriptorName=(.*)$", path.read_text()): path.name for path in DEPLOY.rglob("*.socket")
    }
    assert names == {name: f"pothead-{name}.socket" for name in pothead.SOCKET_NAMES}
    service = read("systemd/pothead.service")
    for setting in ("Requires", "Sockets", "Also"):
        always = set(first(rf"^{setting}=(.*)$", service).split())
        assert always == set(names.values()) - {"pothead-ptth.socket"}
    # It is there for those who enable it, and a restart of the hub starts it.
    wanted_by = first("^WantedBy=(.*)$", read("systemd/pothead-ptth.socket")).split()
    assert wanted_by == ["sockets.target", "pothead.service"]


def test_units_are_started_again_until_what_is_wrong_is_corrected() -> None:
    for name in ("pothead.service", "pothead@.service", "pothead-worker@.service"):
        unit = read(f"systemd/{name}").partition("\n[Service]\n")[0]
        assert first("^StartLimitIntervalSec=(.*)$", unit) == "0"
    service = read("systemd/pothead.service")
    assert "\nRestartPreventExitStatus=" not in service, "the sockets would start it, and at once"
    assert seconds(first("^WatchdogSec=(.*)$", service)) >= 30


def test_every_module_is_installed_where_the_units_look_for_it() -> None:
    target, names = re.findall(r"install -D .* -t (\S+) (.*\.py)$", read("README.md"), re.MULTILINE)[0]
    assert set(names.split()) == {"gating.py", "pothead.py", "pothead_worker.py"}
    for name in ("pothead.service", "pothead@.service", "pothead-worker@.service"):
        assert first(rf"^ExecStart=/usr/bin/python3 {target}/(\w+\.py)", read(f"systemd/{name}")) in names


def hardening(unit: str) -> list[str]:
    """Return the settings that do not tell one hub from another."""
    lines = [line for line in unit.partition("[Service]")[2].splitlines() if not line.startswith("#")]
    own = "(Exec|Sockets|Environment|CacheDirectory|TimeoutStop|RestartPrevent|Also)"
    return [line for line in lines if line and not re.match(own, line)]


def test_one_of_several_hubs_is_a_hub_like_the_single_one() -> None:
    several, single = (read(f"systemd/{name}") for name in ("pothead@.service", "pothead.service"))
    assert hardening(several) == hardening(single) and len(hardening(several)) > 30
    own = {line for line in set(several.splitlines()) - set(single.splitlines()) if re.match("[A-Z]", line)}
    assert all("%i" in line for line in own if "Directory" in line or "SPOOL" in line)


@pytest.mark.parametrize("number", [1, 2])
def test_hubs_of_one_machine_have_the_ports_that_the_readme_tells(number: int, tmp_path: Path) -> None:
    unit = read("systemd/pothead@.service").replace("%i", str(number)).replace("%C/", f"{tmp_path}/")
    told = first(rf"^\| `pothead@{number}` \| (.*) \| `/etc", read("README.md")).split(" | ")
    lines = re.findall(r"^Environment=(.*)$", unit, re.MULTILINE)
    environment = dict(each.split("=") for line in lines for each in line.split())
    (tmp_path / f"pothead-{number}").mkdir()
    ended = wire.run_to_end(wire.python(str(wire.ROOT / "pothead.py"), "--check"), tmp_path, environment)
    listens = re.findall(r"^would listen (\w+)=127\.0\.0\.1:(\d+)", "\n".join(ended.lines), re.MULTILINE)
    ports = dict(listens)
    assert ended.status == 0 and [ports[name] for name in ("consumers", "ptth", "admin")] == told
    connect = first(r"^POTHEAD_CONNECT=(http:.*)$", read("README.md")).split(",")
    assert connect[number - 1] == f"http://127.0.0.1:{told[1]}"
    assert f"`server hub{number} 127.0.0.1:{told[0]} port {told[2]}`" in read("README.md")


# ---- Certificates and tokens -------------------------------------------------------------------------


def variables(text: str) -> dict[str, str]:
    """Return the settings of a program that stand on lines of their own, perhaps in a comment."""
    return dict(re.findall(r"^(?:#   )?(POTHEAD_\w+)=(.+)$", text, re.MULTILINE))


def yaml_documents(name: str, text: str = "") -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(text or read(f"kubernetes/{name}.yaml")))


def pod_of(component: str) -> dict[str, Any]:
    return yaml_documents(component)[0]["spec"]["template"]["spec"]


def mounted_secrets(component: str) -> dict[str, tuple[str, str]]:
    """Return the files of a pod that come from Secrets, with the name of the Secret and the key in it."""
    pod = pod_of(component)
    (container,) = pod["containers"]
    found = {}
    for mount in container["volumeMounts"]:
        assert "subPath" not in mount, "it would stay as it is when the Secret changes"
        (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
        sources = [each["secret"] for each in volume.get("projected", {}).get("sources", [])]
        for secret in [*sources, *([volume["secret"]] if "secret" in volume else [])]:
            name = secret.get("secretName", secret.get("name"))
            for item in secret.get("items", [{"key": "token", "path": "token"}]):
                found[f"{mount['mountPath']}/{item['path']}"] = (name, item["key"])
    return found


def test_no_file_has_a_secret_in_it() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"-----BEGIN|^kind: Secret$|^ *(?:stringData|data):", text, re.MULTILINE), path
        assert not re.search(r"\b(?:token:(?!/)|sha256:|TOKEN=|[Bb]earer )[\w.~+/-]{12,}", text), path


@pytest.mark.parametrize("component", ["hub", "worker"])
def test_files_that_a_container_names_come_from_secrets(component: str) -> None:
    ((_, *flags),) = commands(read(f"kubernetes/{component}.yaml"))
    named = {path for flag, _, path in (each.partition("=") for each in flags) if flag.endswith("file")}
    assert named == set(mounted_secrets(component)) and len(named) > 1


def test_secrets_of_the_pods_are_those_that_the_readme_and_cert_manager_make() -> None:
    made = {
        (name, key)
        for name, rest in re.findall(
            r"kubectl create secret generic (\S+) ((?:.*\\\n)*.*)", read("README.md")
        )
        for key in re.findall(r"--from-(?:literal|file)=([\w.]+)", rest)
    }
    hub, worker = (set(mounted_secrets(each).values()) for each in ("hub", "worker"))
    assert hub | worker == made
    assert worker & hub == set() and ("pothead-hub-tls", "tls.key") in hub, "the key is for the hub alone"
    certificates = [each["spec"] for each in yaml_documents("certificate") if each["kind"] == "Certificate"]
    assert certificates[-1]["secretName"] == "pothead-hub-tls"


def test_workers_call_the_hub_by_a_name_and_a_port_that_it_has() -> None:
    worker = read("kubernetes/worker.yaml")
    host, port = re.findall(r"--connect=https://([\w.-]+):(\d+)$", worker, re.MULTILINE)[0]
    assert f"--ptth-port={port}" in commands(read("kubernetes/hub.yaml"))[0]
    services = {each["metadata"]["name"]: each for each in yaml_documents("hub") if each["kind"] == "Service"}
    service, namespace, _ = host.split(".")
    assert services[service]["metadata"]["namespace"] == namespace
    (listed,) = services[service]["spec"]["ports"]
    assert (listed["port"], listed["targetPort"]) == (int(port), "ptth")
    (container,) = pod_of("hub")["containers"]
    assert {"name": "ptth", "containerPort": int(port)} in container["ports"]
    assert [host] == yaml_documents("certificate")[-1]["spec"]["dnsNames"]
    assert f"subjectAltName=DNS:{host} " in read("README.md")
    assert f":{port}\n" in read("systemd/pothead-ptth.socket")
    units = read("systemd/pothead.service") + read("systemd/pothead-worker@.service")
    assert variables(units)["POTHEAD_HUB_PTTH_PORT"] == port
    assert variables(units)["POTHEAD_CONNECT"] == f"https://hub.example:{port}"


def test_anonymous_workers_are_nowhere_but_on_networks_of_their_own() -> None:
    for path in FILES:
        if path.name != "compose.yaml":
            assert "anonymous" not in path.read_text(encoding="utf-8").lower(), path
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load(read("compose.yaml"))
    assert compose["networks"]["workers"] == {"internal": True}
    assert not any(str(each).endswith(":4040") for each in compose["services"]["hub"]["ports"])


def test_token_for_all_is_shown_when_the_comments_are_taken_off() -> None:
    hub = mounted_secrets("hub")["/etc/pothead/admin.token"]
    begins = re.compile(r"# ?(?=---|auth\w+:|(?:apiVersion|kind|metadata|spec): ?|  )")
    text = begins.sub("", read("kubernetes/scaledobject.yaml"))
    scaled, authentication = yaml_documents("scaledobject", text)
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metadata"]["authMode"] == "bearer"
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (shown,) = authentication["spec"]["secretTargetRef"]
    assert (shown["parameter"], shown["name"], shown["key"]) == ("token", *hub)
    monitor = yaml_documents("podmonitor", re.sub("# (?=auth)", "", read("kubernetes/podmonitor.yaml")))[0]
    credentials = monitor["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]
    assert (credentials["name"], credentials["key"]) == hub


def lay_files(directory: Path, *names: str) -> None:
    """Put into a directory what a Secret, or an operator, would: by the names that the files have there."""
    (directory / "admin.token").write_text("abc")
    (directory / "workers").write_text("demo token:def\n")
    for name, source in zip(names, ("hub.pem", "hub.key"), strict=True):
        shutil.copy(wire.authority() / source, directory / name)


def test_unit_of_the_hub_has_what_the_readme_lays_there(tmp_path: Path) -> None:
    readme, service = read("README.md"), read("systemd/pothead.service")
    settings = {name: value for name, value in variables(readme).items() if name != "POTHEAD_CONNECT"}
    assert settings == variables(service)
    ports = {name: settings[name] for name in settings if name.endswith("PORT")}
    several = {**variables(read("systemd/pothead@.service")), **ports}
    assert several == {**settings, "POTHEAD_HUB_PTTH_HOST": "0.0.0.0"}
    ((group, directory, names),) = re.findall(r"install -D -m 640 -g (\S+) -t (\S+) (.*)\n", readme)
    assert first("^SupplementaryGroups=(.*)$", service) == group and f"groupadd --system {group}\n" in readme
    files = {value for name, value in settings.items() if "FILE" in name}
    assert files == {f"{directory}/{name}" for name in names.split()}
    lay_files(tmp_path, "hub.pem", "hub.key")
    environment = {name: value.replace(directory, str(tmp_path)) for name, value in settings.items()}
    ports = ["--main-port=0", "--worker-port=0", "--admin-port=0", "--ptth-host=0.0.0.0", "--ptth-port=0"]
    command = wire.python(str(wire.ROOT / "pothead.py"), "--check", *ports)
    ended = wire.run_to_end(command, tmp_path, environment)
    assert ended.status == 0 and any(line.startswith("would listen ptth=0.0.0.0:") for line in ended.lines)


def test_reload_reaches_the_hub_by_the_signal_that_it_knows() -> None:
    service = read("systemd/pothead.service")
    assert first("^ExecReload=(.*)$", service) == "/bin/kill -HUP $MAINPID"
    assert "\nLoadCredential" not in service, "what is copied at the start cannot be read again"


def test_unit_of_a_worker_has_its_token_where_its_settings_say() -> None:
    unit = read("systemd/pothead-worker@.service")
    name, source = re.findall("^LoadCredential=(.+):(.+)$", unit, re.MULTILINE)[0]
    settings = variables(unit)
    directory = "/run/credentials/pothead-worker@thumbnails.service"
    assert settings["POTHEAD_WORKER_TOKEN_FILE"] == f"{directory}/{name}"
    for path in (source.replace("%i", "thumbnails"), settings["POTHEAD_WORKER_CAFILE"].rpartition("/")[0]):
        assert re.search(rf"install .*{re.escape(path)}\b", read("README.md"))
    # A worker that has no token finds this, which must never be one.
    assert not re.fullmatch(r"[\w.~+/-]+=*", first(f"^SetCredential={name}:(.*)$", unit))


def put(mount: Path, version: str, fill: Callable[[Path], None]) -> None:
    """Write files as the kubelet does: anew in a directory of their own, to which `..data` leads then."""
    (mount / version).mkdir()
    fill(mount / version)
    (mount / "..new").symlink_to(version)
    (mount / "..new").rename(mount / "..data")
    for path in (mount / version).iterdir():
        if not (mount / path.name).is_symlink():
            (mount / path.name).symlink_to(f"..data/{path.name}")


def lay_secrets(directory: Path) -> None:
    lay_files(directory, "tls.crt", "tls.key")


@contextlib.contextmanager
def hub_of_a_pod(mount: Path) -> Iterator[wire.HubProcess]:
    """Run what the container of the hub does, on free ports, with its files in `mount`."""
    put(mount, "..1", lay_secrets)
    (container,) = pod_of("hub")["containers"]
    arguments = [each.replace("/etc/pothead", str(mount)) for each in container["args"][1:]]
    assert "sleep 10;" in arguments[-1]
    arguments[-1] = arguments[-1].replace("sleep 10;", "sleep 0.1;")
    at = arguments.index("--")
    changes = ["--main-port=0", "--worker-port=0", "--admin-port=0", "--ptth-port", "0"]
    changes += ["--log-format=text", "--drain-delay=0"]
    command = [*wire.python(str(wire.ROOT / "pothead.py")), *arguments[:at], *changes, *arguments[at:]]
    hub = wire.HubProcess(command, mount)
    with wire.running(hub):
        hub.wait_until_ready()
        yield hub
        hub.terminate()
        assert hub.wait() == 0, "what runs beside it ends with it"


def test_hub_in_a_pod_reads_secrets_again_when_they_change(tmp_path: Path) -> None:
    def times(name: str) -> int:
        return sum(line.endswith(f"/{name} has been read again") for line in hub.errors)

    with hub_of_a_pod(tmp_path) as hub:
        # The first time is for what may have changed while the hub started.
        for turn in (1, 2, 3):
            hub.wait_for_error(lambda _, turn=turn: times("admin.token") == turn)
            assert times("tls.crt") == times("workers") == turn
            put(tmp_path, f"..{turn + 1}", lay_secrets)


def test_worker_in_a_pod_shows_its_token_to_the_hub_that_it_trusts(tmp_path: Path) -> None:
    mount = tmp_path / "hub"
    mount.mkdir()
    (tmp_path / "token").write_text("def")
    files = {
        "/etc/pothead/ca/ca.crt": wire.authority() / "ca.pem",
        "/etc/pothead/token/token": tmp_path / "token",
    }
    with hub_of_a_pod(mount) as hub:
        arguments = commands(read("kubernetes/worker.yaml"))[0][1:]
        for inside, outside in files.items():
            arguments = [each.replace(inside, str(outside)) for each in arguments]
        arguments.append(f"--connect=https://localhost:{hub.ptth[1]}")
        command = [*wire.python(str(wire.ROOT / "pothead_worker.py")), *arguments]
        worker = wire.WorkerProcess(command, tmp_path)
        with wire.running(worker), wire.Peer.connect(("127.0.0.1", hub.main[1])) as consumer:
            consumer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert consumer.read_response().status == 200
            hub.wait_for_line(lambda line: "worker_name=demo" in line)


# ---- Timeouts ----------------------------------------------------------------------------------------


def given_s(flag_or_variable: str, text: str) -> float:
    """Return how long a program is told to take for something; 0 if it is not told."""
    return sum(
        map(
            seconds, re.findall(rf"^ *(?:- --|Environment=POTHEAD_\w+_){flag_or_variable}=(\w+)$", text, re.M)
        )
    )


@pytest.mark.parametrize("name", ["pothead.service", "pothead@.service", "pothead-worker@.service"])
def test_systemd_kills_later_than_the_program_gives_up(name: str) -> None:
    unit = read(f"systemd/{name}")
    graceful = given_s("GRACEFUL_TIMEOUT", unit)
    assert graceful and given_s("DRAIN_DELAY", unit) + graceful + 5 <= seconds(
        first(r"^TimeoutStopSec=(.*)$", unit)
    )


def test_compose_kills_later_than_the_programs_give_up() -> None:
    text = read("compose.yaml")
    graceful = [seconds(each) for each in re.findall(r"--graceful-timeout=(\w+)", text)]
    killed = [seconds(each) for each in re.findall(r"stop_grace_period: (\w+)", text)]
    assert len(graceful) == len(killed) == 2
    assert all(before + 5 <= after for before, after in zip(graceful, killed, strict=True))


@pytest.mark.parametrize("name", ["hub.yaml", "worker.yaml", "scaledjob.yaml"])
def test_kubernetes_kills_later_than_the_programs_give_up(name: str) -> None:
    text = (KUBERNETES / name).read_text(encoding="utf-8")
    graceful = given_s("graceful-timeout", text)
    before = given_s("drain-delay", text) + graceful
    assert graceful and before + 5 <= float(first(r"terminationGracePeriodSeconds: (\d+)", text))


# ---- Metrics -----------------------------------------------------------------------------------------


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:pothead_(?:hub|worker)_\w+|pothead_build_info|process_\w+)\b", text))


@pytest.mark.parametrize(
    "name", ["prometheus/alerts.yml", "prometheus/alerts_test.yml", "grafana/pothead.json"]
)
def test_every_metric_is_one_that_there_is(name: str) -> None:
    found = metrics_in(read(name))
    assert found and found <= METRICS


def test_every_metric_is_on_the_dashboard() -> None:
    shown = metrics_in(read("grafana/pothead.json"))
    assert {name for name in METRICS if not name.endswith(("_sum", "_count"))} == shown


def test_log_codes_of_the_alerts_and_the_dashboard_are_the_hubs() -> None:
    codes = {outcome.code for outcome in pothead.Outcome}
    for name in ("prometheus/alerts.yml", "grafana/pothead.json"):
        found = re.findall(r'code[=!]~?\\?"([A-Z|]+)\\?"', read(name))
        assert found and {code for each in found for code in each.split("|")} <= codes


def test_each_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    alerts = read("prometheus/alerts.yml").split("- alert: ")[1:]
    assert len(alerts) >= 9
    for alert in alerts:
        assert first(r"^ +runbook: (.*)$", alert) == f"docs/operating.md#{alert.split()[0]}"
        assert first(r"severity: (\w+)", alert) in ("page", "ticket")
        assert re.search("summary: .+", alert) and re.search("description: .+", alert)


# ---- Images ------------------------------------------------------------------------------------------


class Image:
    """What a Dockerfile makes, made by its steps in a directory in place of a container's root."""

    def __init__(self, root: Path) -> None:
        self.root = self.directory = root
        self.environment: dict[str, str] = {}
        self.command: list[str] = []

    def build(self, dockerfile: str, context: Path) -> None:
        for line in re.sub(r"^#.*\n|\\\n", "", read(dockerfile), flags=re.MULTILINE).splitlines():
            step, _, rest = line.partition(" ")
            if step == "WORKDIR":
                self.directory = Path(self.inside(rest))
                self.directory.mkdir(parents=True, exist_ok=True)
            elif step == "COPY" and "--from=" not in rest:
                for pattern in rest.split()[:-1]:
                    self.copy(context, pattern)
            elif step == "RUN":
                self.run(rest)
            elif step == "ENV":
                for name, value in (each.split("=") for each in rest.split()):
                    self.environment[name] = self.inside(value).replace("$PATH", os.environ["PATH"])
            elif step == "CMD":
                self.command = json.loads(rest)

    def inside(self, text: str) -> str:
        return re.sub(r"(?<![\w./])/(?=opt|src|srv|var)", f"{self.root}/", text)

    def copy(self, context: Path, pattern: str) -> None:
        paths = sorted(context.glob(pattern)) if pattern != "." else [context]
        assert paths, pattern
        for path in paths:
            if path.is_dir():
                shutil.copytree(path, self.directory, dirs_exist_ok=True)
            else:
                shutil.copy(path, self.directory)

    def run(self, command: str) -> None:
        command = re.sub(r"--(owner|group)=\d+ ", "", self.inside(command))  # nobody but root may give away
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        self.root.mkdir(exist_ok=True)
        done = subprocess.run(
            ["sh", "-ec", command],
            cwd=self.directory,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


FLASK_APP = """
import flask

app = flask.Flask(__name__)


@app.get("/")
def greet():
    return f"from {flask.__name__}"
"""


@pytest.mark.usefixtures("package_index")
def test_app_with_packages_is_served_from_an_image_built_step_by_step(tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    image.build("Dockerfile", wire.ROOT)
    hub_command = [*image.command, "--main-port=0", "--worker-port=0", "--admin-port=off"]
    app = tmp_path / "app"
    app.mkdir()
    (app / "requirements.txt").write_text("flask\n")
    (app / "myapp.py").write_text(FLASK_APP)
    hub = wire.HubProcess(hub_command, image.directory, image.environment)
    with wire.running(hub):
        hub.wait_until_ready(has_admin=False)
        assert hub.main[0] == "0.0.0.0", "where the engine passes a published port on to"
        image.build("app.Dockerfile", app)
        image.environment["POTHEAD_CONNECT"] = f"127.0.0.1:{hub.worker[1]}"
        worker = wire.WorkerProcess(image.command, image.directory, image.environment)
        with wire.running(worker), wire.Peer.connect(("127.0.0.1", hub.main[1])) as consumer:
            consumer.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert consumer.read_response().body == b"from flask"


def test_published_ports_lead_to_where_the_hub_listens() -> None:
    hub = read("compose.yaml").partition("  worker:\n")[0]
    published = re.findall(r'- "127\.0\.0\.1:(\d+):(\d+)"', hub)
    flags = {4041: "--admin-host=0.0.0.0", 8080: "--main-host=0.0.0.0"}
    assert [(int(outside), int(inside)) for outside, inside in sorted(published)] == [(n, n) for n in flags]
    assert set(flags.values()) <= set(commands(hub)[0])


def test_builder_is_sent_what_the_image_is_made_of() -> None:
    (sources,) = re.findall(r"^COPY (?!--from)(.*) \./$", read("Dockerfile"), re.MULTILINE)
    ignored = (wire.ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert set(re.findall(r"^!(.*)$", ignored, re.MULTILINE)) == set(sources.split())


def test_images_are_those_of_this_version() -> None:
    found = {
        (version, path.name)
        for path in FILES
        for version in re.findall(r"\bpothead:(\d+\.[\w.]*)", path.read_text(encoding="utf-8"))
    }
    assert {version for version, _ in found} == {pothead.__version__} and len(found) > 4


# ---- The form of the files ---------------------------------------------------------------------------


def test_dashboard_is_json_with_panels_that_do_not_overlap() -> None:
    dashboard = json.loads(read("grafana/pothead.json"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken and max(columns) < 24, panel["title"]
        taken |= cells
        assert panel["targets"]


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in (".yml", ".yaml")], ids=name_of)
def test_yaml_can_be_read(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert documents and all(isinstance(each, dict) for each in documents)


def test_services_select_the_pods_and_ports_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    deployment, *others = yaml.safe_load_all((KUBERNETES / "hub.yaml").read_text(encoding="utf-8"))
    pod = deployment["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    services = {each["metadata"]["name"]: each["spec"] for each in others if each["kind"] == "Service"}
    assert set(services) == {"pothead", "pothead-workers", "pothead-admin"}
    for spec in services.values():
        assert spec["selector"].items() <= pod["metadata"]["labels"].items()
        assert {port["targetPort"] for port in spec["ports"]} <= set(ports)
    assert services["pothead-workers"]["clusterIP"] == "None"
    assert services["pothead-workers"]["publishNotReadyAddresses"] is True
    assert pod["spec"]["enableServiceLinks"] is False, "POTHEAD_..._PORT=tcp://... would be taken for options"


def test_hubs_are_several_kept_apart_and_known_to_each_worker() -> None:
    deployment, *others = yaml_documents("hub")
    spec, labels = deployment["spec"], deployment["spec"]["template"]["metadata"]["labels"]
    assert spec["replicas"] == 2
    affinity = spec["template"]["spec"]["affinity"]["podAntiAffinity"]
    (preferred,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    apart = preferred["podAffinityTerm"]
    assert (apart["topologyKey"], apart["labelSelector"]) == (
        "kubernetes.io/hostname",
        {"matchLabels": labels},
    )
    (budget,) = [each["spec"] for each in others if each["kind"] == "PodDisruptionBudget"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    (container,) = spec["template"]["spec"]["containers"]
    assert "lifecycle" not in container and "--reuse-port" not in container["args"], (
        "--drain-delay is for that"
    )


def test_scaling_adds_up_what_all_hubs_have() -> None:
    hubs = {each["metadata"]["name"]: each for each in yaml_documents("hub") if each["kind"] == "Service"}
    for name in ("scaledobject", "scaledjob"):
        (trigger,) = yaml_documents(name)[0]["spec"]["triggers"]
        metadata = trigger["metadata"]
        assert (metadata["aggregateFromKubeServiceEndpoints"], metadata["aggregationType"]) == ("true", "sum")
        service, namespace, port = re.findall(r"^http://([\w-]+)\.(\w+):(\d+)/stats$", metadata["url"])[0]
        (listed,) = hubs[service]["spec"]["ports"]
        assert (hubs[service]["metadata"]["namespace"], listed["port"]) == (namespace, int(port))
        assert hubs[service]["spec"]["publishNotReadyAddresses"] is True, "one that drains has demand"
        with wire.hub_process() as hub:
            assert hub.stats()[metadata["valueLocation"]] == 0


def test_job_of_a_worker_is_its_deployment_but_for_its_end() -> None:
    job = yaml_documents("scaledjob")[0]["spec"]["jobTargetRef"]["template"]
    deployment = yaml_documents("worker")[0]["spec"]["template"]
    (of_job,), (of_deployment,) = (each["spec"]["containers"] for each in (job, deployment))
    extra = set(of_job["args"]) - set(of_deployment["args"])
    assert {each.partition("=")[0] for each in extra} == {"--idle-timeout"}
    of_job["args"] = [each for each in of_job["args"] if each not in extra]
    assert job["spec"].pop("restartPolicy") == "Never"
    assert job["metadata"].pop("annotations") == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    assert job == deployment


def test_jobs_are_what_kubernetes_takes_for_such() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = yaml_documents("scaledjob")[0]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": spec["jobTargetRef"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    # KEDA ends what runs when this changes, unless it is told not to.
    assert spec["rollout"] == {"strategy": "gradual"}


def container_ports(component: str) -> set[str]:
    """Return the names of the ports that a pod has."""
    yaml = pytest.importorskip("yaml")
    deployment = next(yaml.safe_load_all((KUBERNETES / f"{component}.yaml").read_text(encoding="utf-8")))
    return {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}


def test_what_is_scraped_is_let_in_and_named_as_the_alerts_know_it() -> None:
    yaml = pytest.importorskip("yaml")
    policies, monitors = (
        {each["metadata"]["name"]: each["spec"] for each in yaml.safe_load_all(text)}
        for text in (read("kubernetes/networkpolicy.yaml"), read("kubernetes/podmonitor.yaml"))
    )
    assert set(monitors) == set(policies) == {"pothead-hub", "pothead-worker"}
    scrapes = yaml.safe_load(read("prometheus/prometheus.yml"))["scrape_configs"]
    assert [each["job_name"] for each in scrapes] == list(monitors)
    for name, monitor in monitors.items():
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": name}]
        assert monitor["selector"] == policies[name]["podSelector"]
        let_in = {port["port"] for rule in policies[name]["ingress"] for port in rule["ports"]}
        assert endpoint["port"] in let_in <= container_ports(name.removeprefix("pothead-"))


def test_redirected_responses_are_let_in_when_the_comments_are_taken_off() -> None:
    yaml = pytest.importorskip("yaml")
    worker, policies = (
        list(yaml.safe_load_all(re.sub(r"# (?=- (?:--redirect|\{))", "", read(f"kubernetes/{name}.yaml"))))
        for name in ("worker", "networkpolicy")
    )
    (container,) = worker[0]["spec"]["template"]["spec"]["containers"]
    (port,) = [each["containerPort"] for each in container["ports"] if each["name"] == "responses"]
    assert f"--redirect-response={port}" in container["args"]
    rules = [rule for each in policies for rule in each["spec"]["ingress"]]
    (let_in,) = [rule["from"] for rule in rules if rule["ports"][0]["port"] == "responses"]
    (consumers,) = [rule["from"] for rule in rules if rule["ports"][0]["port"] == "consumers"]
    assert let_in == consumers


def test_worker_in_a_pod_has_a_directory_for_its_metrics() -> None:
    worker = read("kubernetes/worker.yaml")
    directory = first(r"PROMETHEUS_MULTIPROC_DIR, value: (\S+)}", worker)
    assert f"mountPath: {directory}}}" in worker


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("promtool", ["check", "config", "prometheus/prometheus.yml"]),
        ("promtool", ["check", "rules", "prometheus/alerts.yml"]),
        ("promtool", ["test", "rules", "prometheus/alerts_test.yml"]),
    ],
)
def test_rules_hold_their_promises(tool: str, arguments: list[str]) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_units_are_well_formed(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for path in (DEPLOY / "systemd").iterdir():
        (tmp_path / path.name).write_text(
            path.read_text().replace("/usr/bin/python3", shutil.which("true") or "")
        )
    units = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if "pothead" in line]
    assert done.returncode == 0 and not complaints, done.stderr
