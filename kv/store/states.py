"""Recurrent states of one rank: what a sequence keeps instead of keys and values in the layers that have no cache.

    convs     float32 [layers, 1 + num_states, taps, channels]
    memories  float32 [layers, 1 + num_states, heads, key width, value width]

A state is the whole of a sequence at one position. A step reads one state and writes another, so that it can be
repeated, and a state that was written once may serve as a snapshot for other sequences. Place 0 is the state before the
first token: zeros, never written. Knows neither prompts nor which states are free (`kv/cache/states.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import InternalError
from ..spec import StateSpec

NO_STATE = 0  # place of the state before the first token


class LayerStates(NamedTuple):
    """All states of one layer: the store's own memory."""

    convs: Tensor  # [1 + num_states, taps, channels]
    memories: Tensor  # [1 + num_states, heads, key width, value width]


class StateStore:
    """The states of one rank. Used by the engine's thread only."""

    def __init__(self, spec: StateSpec, num_states: int, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.num_states = num_states
        count, on = 1 + num_states, torch.device(device)
        self._convs = torch.zeros(spec.num_layers, count, spec.num_taps, spec.conv_width, device=on)
        matrices = (spec.num_heads, spec.key_width, spec.value_width)
        self._memories = torch.zeros(spec.num_layers, count, *matrices, device=on)
        self._ends = [0] * count  # tokens that each state covers

    def layer(self, index: int) -> LayerStates:
        """States of the `index`-th layer that has some."""
        return LayerStates(self._convs[index], self._memories[index])

    def check(self, place: int, end: int) -> None:
        """Check that a state covers `end` tokens.

        Raises:
            InternalError: it covers another number; a step that read it would be wrong.
        """
        if self._ends[place] != end:
            raise InternalError(f"state {place} covers {self._ends[place]} tokens, and a step begins at {end}")

    def note(self, written: Iterable[tuple[int, int]]) -> None:
        """Remember how many tokens the states that a step has written cover: (place, tokens) each."""
        for place, end in written:
            assert place != NO_STATE, "the state before the first token is never written"
            self._ends[place] = end
