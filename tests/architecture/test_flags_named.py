"""Every flag that a document, a help text or an error tells a user to give can be given."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import twostroke
from twostroke.cli.arguments import ALWAYS, INSTEAD, SAME
from twostroke.cli.main import app

ROOT = Path(twostroke.__file__).resolve().parents[2]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
PARTS = ("cli", "client", "cluster", "core", "engine", "kernels", "kv", "model", "router", "sim", "text", "worker")
OF_OTHERS = {
    "--help": "of every command",
    "--cacert": "curl",
    "--cert": "curl",
    "--key": "curl",
    "--index-url": "pip",
    "--merge": "llama-gguf-split",
    "--num-cpus": "ray start",
    "--num-gpus": "ray start",
    "--num": "ray start --num-cpus or --num-gpus",
}


def flags_of(command: typer.core.TyperGroup | typer.core.TyperCommand) -> set[str]:
    """Flags of a command and of all below it."""
    found = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return found.union(*map(flags_of, getattr(command, "commands", {}).values()))


def named() -> Iterator[tuple[str, str]]:
    """Flags in documents and in string literals of the code, each with its place."""
    for path in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield from ((flag, f"{path.relative_to(ROOT)}:{number}") for flag in FLAG.findall(line))
    for path in sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from ((flag, f"{path.relative_to(ROOT)}:{node.lineno}") for flag in FLAG.findall(node.value))


def test_every_flag_that_is_named_exists():
    known = flags_of(typer.main.get_command(app)) | {*OF_OTHERS, *SAME, *ALWAYS, *INSTEAD}
    places = list(named())
    assert len(places) > 200  # the search finds them
    assert [place for place in places if place[0] not in known] == []


@pytest.mark.parametrize("flag", ["--tool-parser", "--tool-call-parser", "--reasoning-parser", "--chat-template"])
def test_flags_of_vllm_are_among_them(flag):
    assert flag in flags_of(typer.main.get_command(app))
