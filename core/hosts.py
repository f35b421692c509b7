"""Whether a Host header names a server of ours: the guard against DNS rebinding. Knows no server and no browser.

A page of evil.example can have its own name resolve to 127.0.0.1, and is then, for the browser, of the same origin as
whatever listens here. What it cannot do is send another Host than its own name. Source: RFC 9110, section 7.2.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.IGNORECASE)


def name_in(header: str) -> str | None:
    """The name in a Host header, in small letters, without port, brackets and the root's dot; None: it is malformed."""
    found = _HOST.fullmatch(header.strip())
    return found["name"].lower().strip("[]").removesuffix(".") if found else None


def is_loopback_name(name: str) -> bool:
    """Whether nobody else can own this name: `localhost` and what is below it (RFC 6761), a loopback address."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_allowed_name(name: str, allowed: Iterable[str]) -> bool:
    """Whether `allowed` has the name, `*.` and a name that it is below, or `*`."""
    for each in allowed:
        known = each.lower().strip("[]").removesuffix(".")
        if known in ("*", name) or (known.startswith("*.") and name.endswith(known[1:])):
            return True
    return False
