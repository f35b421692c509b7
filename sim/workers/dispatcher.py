"""The face's access to a simulated engine: production's, with answers in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ...engine.link import messages as link
from ...engine.link.client import EngineClient, Owner, SequenceEvent
from ...worker.blocks.fetch import FetchPart


class SimDispatcher(EngineClient):
    """The production routing of events; an owner's exception is raised here instead of logged."""

    def ask_blocks(self, part: FetchPart, root: bytes, took: Callable[[link.BlocksFetched], None]) -> None:
        """Read cached blocks, as `fetch` does for a coroutine."""
        fetch_id = next(self._fetch_ids)
        self._fetches[fetch_id] = cast(Any, Answered(took))
        self.send(link.FetchBlocks(fetch_id, part.identities, part.first_token, root, part.how))

    def _call(self, owner: Owner, event: SequenceEvent) -> None:
        owner(event)


@dataclass
class Answered:
    """The part of a future that `EngineClient` uses."""

    took: Callable[[link.BlocksFetched], None]
    is_done: bool = False

    def done(self) -> bool:
        """True after the answer."""
        return self.is_done

    def set_result(self, found: link.BlocksFetched) -> None:
        """Pass the answer on."""
        self.is_done = True
        self.took(found)
