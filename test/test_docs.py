"""The documents: every list in them is the code's own, in both directions, and every link leads somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Iterator

import pytest

import pothead
import pothead_worker
import wire

DOCUMENTS = {
    str(path.relative_to(wire.ROOT)): path.read_text(encoding="utf-8")
    for folder in (wire.ROOT, wire.ROOT / "docs", wire.ROOT / "bench", wire.ROOT / "deploy")
    for path in sorted(folder.glob("*.md"))
}
OPERATING, DESIGN = DOCUMENTS["docs/operating.md"], DOCUMENTS["docs/design.md"]
NO_GUIDES = ("CHANGELOG.md", "docs/reliability.md", "bench/README.md", "deploy/README.md")
PROGRAMS = ("pothead.py", "pothead_worker.py")

# Options of other programs that the documents mention.
FOREIGN_FLAGS = {"--ulimit"}


def section(text: str, heading: str) -> str:
    """Return what is below a heading, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"there is no section {heading!r}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the last table in a text, row by row, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = max(number for number, line in enumerate(lines) if set(line) <= set("|- "))
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines[start + 1 :]]


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_column(heading: str, text: str = OPERATING) -> set[str]:
    """Return the code words in the first column of a section's table."""
    return {word for row in rows(section(text, heading)) for word in code_words(row[0])}


# ---- What the code has -------------------------------------------------------------------------------
#
# Each of these asks the code where it can tell best, so that only these change when the code is rebuilt.


def flags_of(program: str) -> set[str]:
    command = wire.python(str(wire.ROOT / program), "--help")
    environment = {**os.environ, "COLUMNS": "1000"}  # a flag is broken at its hyphens where a line ends
    text = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=30
    ).stdout
    return set(re.findall(r"--[a-z][a-z-]+", text)) | {"--help"}


def endpoints_of(hub: wire.HubProcess) -> set[str]:
    """The page for what is not there tells what is there."""
    return set(re.findall(r"(?<!\S)/\S*", hub.ask_admin(b"/nowhere").body.decode()))


def metrics_of_hub(hub: wire.HubProcess) -> set[str]:
    """None at all if this hub has no metrics, or not the package for them."""
    response = hub.ask_admin(b"/metrics")
    page = response.body.decode() if response.status == 200 else ""
    return {
        name for name in re.findall(r"^# TYPE (\S+)", page, re.MULTILINE) if not name.endswith("_created")
    }


def metrics_of_worker() -> set[str]:
    return set(re.findall(r'"(pothead_worker_[a-z_]+)"', source_of("pothead_worker.py")))


def source_of(program: str) -> str:
    return (wire.ROOT / program).read_text(encoding="utf-8")


def messages_of(program: str) -> Iterator[tuple[str, str]]:
    """Yield level and format of each message that the program can log, but for DEBUG."""
    for node in ast.walk(ast.parse(source_of(program))):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")):
            continue
        level = ast.unparse(node.func).removeprefix("log.")
        if level in ("info", "warning", "error", "exception", "log"):
            text = node.args[level == "log"]
            for choice in [text.body, text.orelse] if isinstance(text, ast.IfExp) else [text]:
                if isinstance(choice, ast.Constant):
                    yield level, str(choice.value)


def patterns_of(program: str) -> dict[str, str]:
    """Return each message of the program with a pattern for what it may look like."""
    return {text: re.sub(r"%(\\.\d)?[srdgf]", ".+", re.escape(text)) for _, text in messages_of(program)}


# ---- The lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_in_the_documents(program: str) -> None:
    words = set(re.findall(r"--[a-z][a-z-]+", "\n".join(DOCUMENTS.values())))
    assert flags_of(program) <= words


def test_no_document_tells_of_a_flag_that_is_not_there() -> None:
    known = flags_of("pothead.py") | flags_of("pothead_worker.py") | FOREIGN_FLAGS
    for name in set(DOCUMENTS) - set(NO_GUIDES):
        told = set(re.findall(r"`(--[a-z][a-z-]+)", DOCUMENTS[name]))
        assert told <= known, name


def test_log_codes_are_those_of_the_hub() -> None:
    told = {code_words(row[0])[0]: row[1] for row in rows(section(OPERATING, "Log codes"))}
    assert set(told) == {outcome.code for outcome in pothead.Outcome}
    for outcome in pothead.Outcome:
        if outcome.status:
            assert told[outcome.code] == str(outcome.status)


def test_outcomes_of_the_design_are_those_of_the_hub() -> None:
    told = [
        pair
        for row in rows(section(DESIGN, "Endings"))
        for pair in zip(*map(code_words, row[:2]), strict=True)
    ]
    in_code = {(outcome.name, outcome.code) for outcome in pothead.Outcome}
    assert in_code == set(told)


def test_states_of_the_design_are_those_of_the_hub() -> None:
    picture = section(DESIGN, "States").split("```")[1]
    assert set(re.findall(r"[A-Z]{3,}", picture)) == set(pothead.State.__members__)


def test_endpoints_are_those_of_the_admin_port(hub: wire.HubProcess) -> None:
    told = first_column("Pages") | first_column("Actions")
    assert {word.split()[1] for word in told} == endpoints_of(hub)


def test_metrics_of_the_hub_are_those_it_serves(hub: wire.HubProcess) -> None:
    served = metrics_of_hub(hub)
    if not served:
        pytest.skip("this hub serves no metrics, or prometheus-client is not installed")
    assert first_column("Metrics of the hub") == served


def test_metrics_of_the_worker_are_those_in_its_code() -> None:
    in_code = metrics_of_worker()
    if not in_code:
        pytest.skip("this worker has no metrics")
    assert first_column("Metrics of the worker") == in_code


def test_fields_of_stats_are_those_that_are_served(hub: wire.HubProcess) -> None:
    assert first_column("Stats") == set(hub.stats())


def test_fields_of_a_log_line_are_those_that_are_written() -> None:
    with wire.hub_process("--log-format", "json") as hub, wire.Peer.connect(hub.main) as consumer:
        consumer.send(b"?\r\n")
        consumer.read_response()
        line = json.loads(hub.wait_for_line(lambda line: '"code"' in line))
    assert first_column("The log") == set(line) - {"time"}


@pytest.mark.parametrize(
    ("program", "heading"),
    [("pothead.py", "Messages of the hub"), ("pothead_worker.py", "Messages of the worker")],
)
def test_messages_are_those_of_the_program(program: str, heading: str) -> None:
    told, patterns = first_column(heading) | first_column("Messages of both"), patterns_of(program)
    for message in told:
        assert any(re.fullmatch(pattern, message) for pattern in patterns.values()), f"stale: {message}"
    for level, text in messages_of(program):
        if level != "info":
            assert any(re.fullmatch(patterns[text], message) for message in told), f"not told: {text}"


def test_names_in_the_design_are_in_the_code() -> None:
    for word in re.findall(r"`([A-Z][A-Za-z]*\.\w+)", DESIGN):
        name, attribute = word.split(".")
        owners = [getattr(module, name, None) for module in (pothead, pothead_worker)]
        assert any(hasattr(owner, attribute) for owner in owners), word


def test_code_words_of_the_design_are_in_the_code() -> None:
    modules = "".join(source_of(program) for program in (*PROGRAMS, "gating.py"))
    foreign = {"SSLSocket", "WantWrite", "asyncio"}  # of Python, and told why they are not used
    for word in set(re.findall(r"`([A-Za-z_]\w+)`", DESIGN)) - foreign:
        assert re.search(rf"\b{word}\b", modules), word


@pytest.mark.parametrize(
    ("program", "heading"), [("pothead.py", "The hub"), ("pothead_worker.py", "The worker")]
)
def test_every_class_has_a_place_in_the_picture_or_right_below(program: str, heading: str) -> None:
    part = re.split(rf"^## {heading}\b.*$", DESIGN, flags=re.MULTILINE)[1]
    _, picture, below = part.split("```", 2)
    below = below.partition("\n|")[0]
    for name in re.findall(r"^class (\w+)", source_of(program), re.MULTILINE):
        assert re.search(rf"\b{name}\b", picture + below), name


@pytest.mark.parametrize("heading", ["Log codes", "Pages", "Actions", "Stats", "Metrics of the hub"])
def test_nothing_is_told_by_two_rows(heading: str) -> None:
    told = [word for row in rows(section(OPERATING, heading)) for word in code_words(row[0])]
    assert len(told) == len(set(told))


def test_no_message_is_told_by_two_rows() -> None:
    of_both = rows(section(OPERATING, "Messages of both"))
    for heading in ("Messages of the hub", "Messages of the worker"):
        told = [word for row in rows(section(OPERATING, heading)) + of_both for word in code_words(row[0])]
        assert len(told) == len(set(told))


# ---- Links -------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> list[str]:
    """Return the anchors of a document's headings, as they are made of them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links() -> list[tuple[str, str]]:
    """Return each link within the project: the document it is in, and where it leads."""
    found = []
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`\n]*`", "", without_blocks(text))):
            if not re.match(r"[a-z]+:", target):
                found.append((name, target))
    return found


@pytest.mark.parametrize(("name", "target"), links())
def test_link_leads_somewhere(name: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    leads_to = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
    assert (wire.ROOT / leads_to).exists(), target
    if anchor:
        assert anchor in anchors(DOCUMENTS[leads_to]), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_anchor_is_that_of_one_heading(name: str) -> None:
    found = anchors(DOCUMENTS[name])
    assert name == "CHANGELOG.md" or len(found) == len(set(found))


@pytest.mark.parametrize("name", ["docs/operating.md", "docs/worker.md"])
def test_contents_of_a_long_document_are_its_sections(name: str) -> None:
    contents, *sections = without_blocks(DOCUMENTS[name]).split("\n## ")
    listed = re.findall(r"\]\(#([^)]+)\)", contents)
    top = [anchors(f"## {each}")[0] for each in sections]
    assert [anchor for anchor in listed if anchor in top] == top


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_stands_twice(name: str) -> None:
    """A paragraph or a table's row stands once, wherever it may be."""
    others = {paragraph for other, text in DOCUMENTS.items() if other != name for paragraph in pieces(text)}
    found = pieces(DOCUMENTS[name])
    assert len(found) == len(set(found))
    assert not set(found) & others


def pieces(text: str) -> list[str]:
    """Return the paragraphs and rows of a text that say something of their own."""
    rows_and_paragraphs = re.split(r"\n\n|\n(?=[|-])", without_blocks(text))
    return [piece for piece in rows_and_paragraphs if len(piece) > 100]


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for name, target in links() if name == "README.md"}
    assert {name for name in DOCUMENTS if name.startswith("docs/")} <= linked


ALERT_RULES = wire.ROOT / "deploy" / "prometheus" / "alerts.yml"


@pytest.mark.skipif(not ALERT_RULES.exists(), reason="there are no alert rules")
def test_each_alert_has_its_section_and_leads_there() -> None:
    rules = ALERT_RULES.read_text(encoding="utf-8")
    alerts = re.findall(r"- alert: (\w+)", rules)
    sections = re.findall(r"^### (Pothead\w+)$", OPERATING, re.MULTILINE)
    assert sections == alerts
    assert re.findall(r"docs/operating\.md#(\S+)", rules) == alerts


# ---- The design ------------------------------------------------------------------------------------------


def hub_part() -> str:
    return (wire.ROOT / "docs" / "design.md").read_text("utf-8").partition("\n## The worker")[0]


def test_names_that_the_design_gives_are_the_hubs() -> None:
    for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", hub_part()):
        owner, _, attribute = name.partition(".")
        if owner in vars(pothead) and attribute:
            instances = {"Stream": ("role", "outbuf", "written"), "Limits": ()}.get(owner, ())
            assert hasattr(vars(pothead)[owner], attribute) or attribute in instances, name
