"""Addresses of other processes that change while this one runs: the seam between who needs them and who finds them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol


class AddressSource(Protocol):
    """The addresses behind one name. What finds them is in cluster/discovery."""

    @property
    def name(self) -> str:
        """The name as the user gave it, e.g. routers.llm.svc:8002 or k8s://routers.llm:8002."""

    @property
    def addresses(self) -> frozenset[str]:
        """The last known host:port of every process, in the form of `core.ports.target`."""

    @property
    def problem(self) -> str:
        """Why `addresses` may be out of date or is empty; empty: nothing is wrong."""

    def follow(self) -> AsyncGenerator[frozenset[str], None]:
        """All addresses as soon as they are known, and again after every change, until it is closed.

        Never raises for what a network does: the last known ones stay, and `problem` says why.
        """
