"""The examples that use the SDK run as they stand, against the protocol peer on the port that they name."""

from __future__ import annotations

import runpy
import socket
import sys
from pathlib import Path

import pytest

import twostroke

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _at_the_peer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The port in the examples may be taken on this machine, so only the address is another one.
    for name in ("Client", "AsyncClient"):
        kind = getattr(twostroke, name)
        monkeypatch.setattr(twostroke, name, lambda _, kind=kind, **options: kind(address, **options))
    monkeypatch.setattr(sys, "argv", ["example"])


@pytest.mark.parametrize(
    ("name", "prints"), [("sdk_generate.py", "def fibonacci(n):0.0 0.1"), ("sdk_stream.py", "0.46 0.47")]
)
def test_an_example_runs(name, prints, capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 0
    assert prints in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sdk_generate.py", "sdk_stream.py"])
def test_an_example_without_a_server_says_so(name, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    for kind in (twostroke.client.client.Client, twostroke.client.async_client.AsyncClient):
        monkeypatch.setattr(twostroke, kind.__name__, lambda _, kind=kind, **options: kind(nobody, **options))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 1
    assert "unavailable: " in capsys.readouterr().err
