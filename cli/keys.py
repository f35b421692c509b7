"""`twostroke keys`: make API keys for clients, and check a file of them; and how any command is given one."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ConfigError

app = typer.Typer(help="API keys of clients.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def new(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose key it is; several keys may have one tenant.")],
) -> None:
    """Print a new key, which is stored nowhere, and its entry for router.api_key_file."""
    from ..router.keys.digests import line_for
    from ..router.keys.key_file import KeyEntry, new_key

    key = new_key()
    try:
        KeyEntry(key=line_for(key), tenant=tenant)
    except ValueError:
        raise ConfigError(f"the tenant is {tenant[:80]!r}; must have 1 to 64 letters, digits and . _ -") from None
    typer.echo(f"{key}\n", nl=True)
    typer.echo("# This is the only time that the key is shown. For router.api_key_file, below `keys:`", err=True)
    typer.echo(f"  - key: {line_for(key)}\n    tenant: {tenant}")


@app.command()
def check(path: Annotated[Path, typer.Argument(metavar="FILE", help="A file for router.api_key_file.")]) -> None:
    """Check a file of keys before a router reads it; print what each key allows."""
    from ..router.keys.key_file import grants_in

    for grant in grants_in(path).values():
        allowance = grant.allowance
        assert allowance is not None
        bounds = [
            f"models {', '.join(grant.models) or 'all'}",
            f"priority {grant.priority}",
            f"{allowance.requests_per_minute or 'any number of'} requests and "
            f"{allowance.tokens_per_minute or 'any number of'} tokens per minute",
            *(["may monitor"] if grant.may_monitor else []),
        ]
        typer.echo(f"{allowance.key} of {grant.tenant} in {grant.isolation_domain}: {'; '.join(bounds)}")


def read_key(given: str | None) -> str | None:
    """Resolve a value of `--api-key`: @FILE is the file's first line, - is typed or piped input, else it is the key.

    Raises:
        ConfigError: the file cannot be read, or there is no key. No message shows a key.
    """
    if given is None or not (given == "-" or given.startswith("@")):
        return given
    if given == "-":
        where = "standard input"
        text = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline()
    else:
        where = f"the file {given[1:]!r}"
        try:
            text = Path(given[1:]).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--api-key: {where} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
    key = text.strip().partition("\n")[0].strip()
    if not key:
        raise ConfigError(f"--api-key: {where} holds no key")
    return key
