"""Loads adapters in a thread of its own, so that no step waits for a disk. Knows no name and no request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ...checkpoint.adapters.adapter import AdapterLimits, read_adapter
from ...core.errors import CheckpointError, InternalError, Overloaded, TwostrokeError
from ...engine.link.messages import AdapterLoaded, AdapterRefused, Event, LoadAdapter
from ..runner import Runner
from .loaded import pack_adapter

_log = logging.getLogger(__name__)
_LOG = "; the worker's log has more"


class AdapterLoader:
    """Implements `AdapterHost` of engine/loop.py for one runner. Loads one adapter at a time."""

    def __init__(self, runner: Runner, present: Container[str], limits: AdapterLimits) -> None:
        """`present`: names of the tensors of the model's checkpoint."""
        self._runner = runner
        self._present = present
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, "adapters")

    def load(self, command: LoadAdapter, tell: Callable[[Sequence[Event]], None]) -> None:
        """Implements `AdapterHost.load`."""
        self._thread.submit(self._load, command, tell)

    def drop(self, slot: int) -> None:
        """Implements `AdapterHost.drop`. An adapter that is still being loaded is forgotten after that."""
        self._thread.submit(self._runner.drop_adapter, slot)

    def _load(self, command: LoadAdapter, tell: Callable[[Sequence[Event]], None]) -> None:
        try:
            answer: Event = AdapterLoaded(command.slot, self._held(command))
        except TwostrokeError as error:
            answer = AdapterRefused(command.slot, error.code, error.message)
        except (MemoryError, torch.OutOfMemoryError):
            why = f"{command.directory}: not enough memory is free for this adapter; unload one"
            answer = AdapterRefused(command.slot, Overloaded.code, why)
        except Exception as error:  # the engine must go on, and its client must be answered
            _log.exception("the adapter in %s could not be loaded", command.directory)
            answer = AdapterRefused(
                command.slot, InternalError.code, f"{command.directory} cannot be loaded ({error!r})"[:500] + _LOG
            )
        tell((answer,))

    def _held(self, command: LoadAdapter) -> int:
        """Load an adapter; returns its bytes in memory."""
        runner = self._runner
        adapter = read_adapter(Path(command.directory), runner.spec, self._present, self._limits)
        if adapter.digest != command.digest:
            raise CheckpointError(f"{command.directory} changed while it was loaded; load it again")
        packed = pack_adapter(adapter, runner.ops, runner.spec)
        runner.hold_adapter(command.slot, packed)
        return packed.num_bytes
