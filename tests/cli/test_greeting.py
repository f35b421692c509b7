"""The commands that `serve` prints can be run as they stand, with keys and with certificates."""

import shlex

import pytest
import typer

from twostroke.cli.greeting import commands
from twostroke.cli.main import app
from twostroke.router.config import RouterConfig

KEYS = {"api_keys": ("0123456789abcdef",)}
TLS = {"ssl_certfile": "router.pem", "ssl_keyfile": "router.key"}


@pytest.mark.parametrize("more", [{}, KEYS, TLS, {**KEYS, **TLS}, {**TLS, "ssl_ca_certs": "clients.pem"}])
def test_each_names_what_the_face_asks_for(more):
    config = RouterConfig(**more)
    *exports, curl, sdk, chat, status = commands(config, "https://h:1", "h:2", "m", "twostroke", "python")
    named = {word.partition("=")[0] for line in exports for word in line.partition("#")[0].split()[1:]}
    wanted = ({"TWOSTROKE_API_KEY"} if "api_keys" in more else set()) | ({"CA"} if "ssl_certfile" in more else set())
    wanted |= {"CERT", "KEY"} if "ssl_ca_certs" in more else set()
    assert named == wanted
    for name in wanted:
        assert f"${name}" in curl
        assert f"os.environ['{name}']" in sdk
    compile(shlex.split(sdk)[3], "sdk", "exec")
    known = {flag for option in typer.main.get_command(app).commands["status"].params for flag in option.opts}
    for line in (chat, status):
        assert {word for word in shlex.split(line) if word.startswith("--")} <= known
    for name in wanted - {"TWOSTROKE_API_KEY"}:
        assert f'"${name}"' in status
