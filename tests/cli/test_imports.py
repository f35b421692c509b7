"""Imports of our processes: heavy libraries only where they are used, because each takes a part of a second or more."""

import subprocess
import sys

import click
import pytest
import typer

from twostroke.cli.main import COMMANDS, app, program

HEAVY = {"gguf", "huggingface_hub", "kubernetes", "numpy", "ray", "requests", "torch", "transformers", "triton"}
NOBODY = ["--grpc", "127.0.0.1:1"]

ROUTER = """
import asyncio
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess

async def live():
    router = RouterProcess(RouterConfig(port=0, grpc_port=0, internal_port=0), "k" * 32)
    await router.start()
    await router.stop(0.0)

asyncio.run(live())
"""
SUPERVISOR = """
import asyncio
from twostroke.cli import serve
from twostroke.cluster.config import load_config
from twostroke.cluster.prepare import prepare
from twostroke.cluster.supervisor import Supervisor

async def live():
    config = load_config(flags={"cluster.launcher": "process", "router.port": 0, "router.grpc_port": 0})
    config, plan = await prepare(config, print)
    await Supervisor(config, plan).abort()

asyncio.run(live())
"""


def imported_by(code: str) -> set[str]:
    """The HEAVY libraries that a process of this code imports until its end, which may be an error that it tells."""
    command = [sys.executable, "-P", "-X", "importtime", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "twostroke.core.errors" in modules
    return HEAVY & {module.split(".")[0] for module in modules}


def commands(of: typer.Typer) -> dict[str, click.Command]:
    return typer.main.get_command(of).commands  # type: ignore[attr-defined]


def called(words: list[str]) -> str:
    """Code of the command `twostroke`."""
    return f"import sys\nsys.argv[1:] = {words}\nfrom twostroke.cli.entry import main\nmain()"


@pytest.mark.parametrize("words", [["--help"], ["status", *NOBODY], ["chat", *NOBODY]], ids="_".join)
def test_a_command_that_only_asks_imports_nothing_heavy(words: list[str]):
    assert imported_by(called(words)) == set()


@pytest.mark.parametrize("code", [ROUTER, SUPERVISOR], ids=["router", "supervisor"])
def test_processes_without_an_engine_import_no_engine(code: str):
    assert imported_by(code) <= {"numpy"}


def test_the_list_of_commands_says_what_their_docstrings_say():
    said = {name: (shown.help or "").split("\n")[0] for name, shown in commands(app).items()}
    assert said == {name: command.summary for name, command in COMMANDS.items()}


def test_a_word_that_is_no_command_and_no_word_at_all_list_all_of_them():
    for words in ([], ["--help"], ["serv"]):
        assert list(commands(program(words))) == list(COMMANDS)
    for words in (["--", "serve"], ["--version", "serve"], ["serve", "status"]):
        assert list(commands(program(words))) == ["serve"]
