"""Check of Host headers, which protects against DNS rebinding. Knows no server and no browser.

The owner of evil.example can let this name resolve to 127.0.0.1. For a browser, its pages then have the same origin as
a server that listens there. But they cannot send another Host than their own name. Source: RFC 9110, section 7.2.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.IGNORECASE)


def name_in(header: str) -> str | None:
    """Name in a Host header, in lower case, without port, brackets and the final dot. None: the header is malformed."""
    found = _HOST.fullmatch(header.strip())
    return found["name"].lower().strip("[]").removesuffix(".") if found else None


def is_loopback_name(name: str) -> bool:
    """Return whether a name always means this machine: `localhost`, names below it (RFC 6761), loopback addresses."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_allowed_name(name: str, allowed: Iterable[str]) -> bool:
    """Return whether `allowed` contains the name, `*`, or `*.` with a parent domain of the name."""
    for each in allowed:
        known = each.lower().strip("[]").removesuffix(".")
        if known in ("*", name) or (known.startswith("*.") and name.endswith(known[1:])):
            return True
    return False
