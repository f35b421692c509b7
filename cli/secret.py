"""A key for the command line that is not on it."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from ..core.errors import ConfigError


def read_key(given: str | None) -> str | None:
    """What `--api-key` means: the first line of @FILE, what is typed (or piped in) for -, else the key itself.

    Raises:
        ConfigError: the file cannot be read, or there is no key. No message shows one.
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
