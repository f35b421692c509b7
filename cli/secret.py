"""Reads an API key from a file or from standard input, so that it is not on the command line."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from ..core.errors import ConfigError


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
