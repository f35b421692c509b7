"""What keeps strangers out of a Ray of our own: it listens on loopback alone, and asks for a token that we made.

Who may talk to Ray's ports may run code with them. So neither is left to the environment, nor to what a program that
imported Ray before us had set: both are set here, and looked at afterwards.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError


def token_settings(folder: Path) -> dict[str, str]:
    """A new token, in a file of `folder` for its owner alone, and the variables that tell Ray of it."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def read_settings() -> None:
    """Have Ray read mode and token from the environment as it is now. By itself it does so once, when imported."""
    raylet = _raylet()
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def check_token() -> None:
    """Raises ConfigError when a Ray that was started now would let anybody in."""
    raylet = _raylet()
    is_asked = raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN
    if not is_asked or not raylet.AuthenticationTokenLoader.instance().has_token():
        raise ConfigError("it would ask nobody for a token (RAY_AUTH_MODE), and whoever reaches it could run code")


@contextmanager
def on_loopback() -> Iterator[None]:
    """While this is entered, a Ray that is started listens on 127.0.0.1 alone, as on macOS and Windows by default.

    On Linux it replaces a loopback address by the machine's own, for other machines to join, unless it is told that
    none will. It reads the variable when it is imported, and its own processes read it when they start.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    variables = set_variables({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"})
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        set_variables(variables)


def check_loopback() -> None:
    """Raises ConfigError when the Ray that this process is connected to listens where other machines reach it."""
    import ray

    util: Any = ray.util
    address = util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(f"it listens on {address}, which others can reach")


def _raylet() -> Any:
    """Ray's own core, which its types do not know."""
    return importlib.import_module("ray._raylet")


def set_variables(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set or (None) remove variables of this process; gives what they were before."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        with suppress(KeyError):
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return before
