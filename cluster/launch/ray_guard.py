"""Access protection of our own local Ray: it listens on loopback only, and requires a token that we make.

A client that can reach Ray's ports can run code through them. So both protections are set here, regardless of the
environment and of settings made by a program that imported Ray before us, and both are checked afterwards.
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
    """Write a new token to a file in `folder` for its owner only; returns the variables that name it to Ray."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def read_settings() -> None:
    """Make Ray read mode and token from the present environment. Ray itself reads them once, at its import."""
    raylet = _raylet()
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def check_token() -> None:
    """Check that a Ray started now would require a token.

    Raises:
        ConfigError: it would accept every client.
    """
    raylet = _raylet()
    is_asked = raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN
    if not is_asked or not raylet.AuthenticationTokenLoader.instance().has_token():
        raise ConfigError("it would ask nobody for a token (RAY_AUTH_MODE), and whoever reaches it could run code")


@contextmanager
def on_loopback() -> Iterator[None]:
    """Context in which a started Ray listens on 127.0.0.1 only, as on macOS and Windows by default.

    On Linux Ray replaces a loopback address by the machine's own, so that other machines can join, unless this variable
    says that none will. Ray reads the variable at its import, and its processes read it when they start.
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
    """Check that the Ray to which this process is connected listens on loopback.

    Raises:
        ConfigError: other machines can reach its address.
    """
    import ray

    util: Any = ray.util
    address = util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(f"it listens on {address}, which others can reach")


def _raylet() -> Any:
    """Ray's own core module, which its type stubs do not declare."""
    return importlib.import_module("ray._raylet")


def set_variables(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables of this process, or remove those that are None; returns their values before."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        with suppress(KeyError):
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return before
