"""Adapters of a worker: reads their files beside the event loop, has the engine load them, tells the routers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..core.errors import CheckpointError, DeadlineExceeded, InvalidRequest, TwostrokeError, from_code
from ..engine.adapters import AdapterFiles, AdapterTable
from ..engine.link.client import EngineClient
from ..engine.link.messages import AdapterRefused
from ..protos import common_pb2

log = logging.getLogger(__name__)

LOAD_S = 120.0  # longest time to load one adapter
MAX_LOADS = 64  # that wait for their turn

ReadAdapter = Callable[[Path], AdapterFiles]
"""Reads a directory: blocks. Raises CheckpointError if it holds no adapter of this worker's model."""


class WorkerAdapters:
    """Loads and unloads the adapters of one worker, one at a time."""

    def __init__(
        self, table: AdapterTable, engine: EngineClient, read: ReadAdapter, model: str, changed: Callable[[], None]
    ) -> None:
        """`model`: name of the worker's model. `changed`: called when routers should know of other adapters."""
        self.table = table
        self._engine = engine
        self._read = read
        self._model = model
        self._changed = changed
        self._asked: set[str] = set()  # names that came with requests to load
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    def follow(self, engine: EngineClient) -> None:
        """Use another engine of the same adapters from now on."""
        self._engine = engine

    @property
    def turn(self) -> asyncio.Lock:
        """Held while an adapter is loaded, or by who does not want that."""
        return self._turn

    async def load(
        self, name: str, path: str, digest: bytes = b"", *, replace: bool = False, asked: bool = False
    ) -> None:
        """Serve the adapter in a directory under a name. Steps and sequences go on meanwhile.

        `asked`: somebody asked for it while the worker runs; else its configuration names it.

        Raises:
            InvalidRequest: the name or the path cannot be, or the directory holds no adapter of this worker's model.
            Overloaded: it does not fit beside the others.
            DeadlineExceeded: it was not loaded within `LOAD_S`.
        """
        if name == self._model:
            raise InvalidRequest(f"{name!r} is the model itself; give the adapter another name", param="lora_name")
        if not name.isprintable():  # it stands in logs and lists
            raise InvalidRequest(f"the name {name[:100]!r} has characters that cannot be shown", param="lora_name")
        if not Path(path).is_absolute():
            raise InvalidRequest(f"lora_path is {path[:200]!r}; must be an absolute path", param="lora_path")
        if self._num_waiting >= MAX_LOADS:
            raise InvalidRequest(f"{MAX_LOADS} adapters wait to be loaded; load them one after the other")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(LOAD_S), self._turn:
                await self._load(name, path, digest, replace=replace, asked=asked)
        except TimeoutError:
            raise DeadlineExceeded(f"the adapter in {path} was not loaded within {LOAD_S:g} s") from None
        finally:
            self._num_waiting -= 1

    def unload(self, name: str) -> None:
        """Serve a name no longer; sequences that have begun with its adapter go on.

        Raises:
            ModelNotFound: no adapter has this name.
        """
        self.table.remove(name)
        self._asked.discard(name)
        log.info("the adapter %s is unloaded", name)
        self._changed()

    def messages(self) -> list[common_pb2.AdapterInfo]:
        """What routers are told of them."""
        return [
            common_pb2.AdapterInfo(
                name=served.name,
                digest=served.digest,
                path=served.directory,
                rank=served.rank,
                size_bytes=served.num_bytes,
                asked=served.name in self._asked,
            )
            for served in self.table.served
        ]

    async def _load(self, name: str, path: str, digest: bytes, *, replace: bool, asked: bool) -> None:
        try:
            # What is held already needs no file, and cannot fail by one.
            held = self.table.files_of(digest)
            files = await asyncio.to_thread(self._read, Path(path)) if held is None else held
        except CheckpointError as error:
            raise InvalidRequest(error.message, param="lora_path") from None
        if digest and files.digest != digest:
            raise InvalidRequest(
                f"{path} holds another adapter here ({files.digest.hex()}) than was asked for ({digest.hex()})",
                param="lora_path",
            )
        slot = self.table.claim(name, files, replace=replace)
        if slot is not None:
            try:
                answer = await self._engine.load_adapter(slot, files.directory, files.digest)
            except BaseException:
                # The engine may still load it: what it loads is forgotten then.
                self._forget(slot)
                raise
            if isinstance(answer, AdapterRefused):
                self.table.failed(slot)
                raise _refusal(answer)
            self.table.ready(slot, answer.num_bytes)
        if asked:
            self._asked.add(name)
        log.info("the adapter %s (%s, rank %d) is served", name, files.digest.hex()[:8], files.rank)
        self._changed()

    def _forget(self, slot: int) -> None:
        self.table.failed(slot)
        with suppress(TwostrokeError):
            self._engine.drop_adapter(slot)


def _refusal(answer: AdapterRefused) -> TwostrokeError:
    error = from_code(answer.code, answer.message)
    return InvalidRequest(error.message, param="lora_path") if isinstance(error, CheckpointError) else error
