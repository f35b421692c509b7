"""Flags of the commands that start a cluster: the same for both, checked before anything is started."""

import subprocess
import sys

import pytest
from typer.main import get_command

from twostroke.cli.main import app

OF_SERVE_ALONE = {"detached"}


def said(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "twostroke.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_both_commands_have_the_same_flags() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    serve, up = ({option.name for option in commands[name].params} for name in ("serve", "up"))
    assert serve - up == OF_SERVE_ALONE
    assert up <= serve


@pytest.mark.parametrize("command", [("serve", "--dry-run"), ("up", "--grpc-port", "0")])
def test_a_model_that_is_given_twice_is_refused(command: tuple[str, ...]) -> None:
    answer = said(*command, "here", "--model", "there")
    assert answer.returncode == 2
    assert "the model is given twice, as 'here' and as --model 'there'" in answer.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora-modules", "a=nowhere"), "nowhere/adapter_config.json cannot be read"),
        (("--ssl-certfile", "nothing.pem"), "nothing.pem"),
        (("--chat-template", "nothing.jinja"), "nothing.jinja"),
    ],
)
def test_a_dry_run_refuses_files_that_serve_would_refuse(flags: tuple[str, str], words: str) -> None:
    answer = said("serve", "--dry-run", "--max-model-len", "256", *flags)
    assert answer.returncode == 2
    assert words in answer.stderr
