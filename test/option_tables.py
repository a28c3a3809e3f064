"""The tables of options in docs/options.md, made from what the programs print for `--help`.

    python3 test/option_tables.py

brings the document up to date.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "options.md"
PROGRAMS = {"The hub": "pothead.py", "The worker": "pothead_worker.py"}

# What stands in a help text as somebody would type it.
CODE = re.compile(
    r"--[a-z][a-z-]+|https?://[A-Z:]+|[A-Za-z]+:\w+(?:\(\))?|\$\w+|(?<!\S)/[a-z]+|\b\w+(?:_\w+)+\b|[\w-]+\*"
)


class Option(NamedTuple):
    group: str
    name: str  # with what stands for its value
    default: str  # "no" for a switch, nothing for what makes the program tell something and exit
    text: str


def options_of(program: str) -> Iterator[Option]:
    """Yield what a program takes, as its `--help` tells it."""
    environment = {**os.environ, "COLUMNS": "1000"}  # one line an option
    command = [sys.executable, "-W", "error", str(ROOT / program), "--help"]
    page = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30)
    group = ""
    for line in re.sub(r"\n {10,}", "  ", page.stdout).splitlines():
        if re.fullmatch(r"\S.*:", line):
            group = line[:-1]
        elif option := re.fullmatch(r"  (\S.*?) {2,}(\S.*?)(?: \(default: (.*)\))?", line):
            yield Option(group, option[1], option[3] or ("" if group == "options" else "no"), option[2])


def table_of(program: str) -> str:
    """Return a program's options as a table, group by group, with those that are no settings at the end."""
    options = sorted(options_of(program), key=lambda option: option.group == "options")
    lines, group = ["| option | default | what it is |", "|---|---|---|"], None
    for option in options:
        if option.group != group and not option.group.startswith(("options", "positional")):
            lines.append(f"| **{option.group}** | | |")
        group = option.group
        lines.append(f"| {as_code(option.name)} | {as_code(option.default)} | {with_code(option.text)} |")
    return "\n".join(lines) + "\n"


def as_code(text: str) -> str:
    """Return a name or a value as code, and words as they are."""
    is_words = text in ("", "no", "none") or (" " in text and not text.startswith("-"))
    return with_code(text) if is_words else f"`{text}`"


def with_code(text: str) -> str:
    """Return a text with all code in it marked as such."""
    return CODE.sub(r"`\g<0>`", text)


def up_to_date(document: str) -> str:
    """Return the document with the tables as they should be."""
    for heading, program in PROGRAMS.items():
        before, title, rest = document.partition(f"\n## {heading}\n")
        intro, _, rest = rest.partition("\n|")
        after = rest.partition("\n\n")[2]
        document = f"{before}{title}{intro}\n{table_of(program)}\n{after}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(up_to_date(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
