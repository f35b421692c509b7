"""Finds the layer for multi-token prediction of a checkpoint of DeepSeek's form, beside the model's own. Headers only.

Layer N of a model of N layers, with further tensors under `model.layers.N.`:

    enorm, hnorm [hidden]                norms of the next token's embedding and of the hidden state
    eh_proj [hidden, 2 * hidden]         joins both
    shared_head.norm, shared_head.head   norm and matrix of the output; `embed_tokens` and the head repeat the model's

Of several such layers the first one guesses. Source: DeepSeek-V3 (2024), section 2.2; the layout of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from ...core.errors import CheckpointError, ConfigError
from ..layout import expected_shapes
from ..spec import ModelSpec

EMBEDDING_NORM, HIDDEN_NORM, JOIN = "enorm.weight", "hnorm.weight", "eh_proj.weight"
NORM, HEAD = "shared_head.norm.weight", "shared_head.head.weight"


@dataclass(frozen=True, slots=True)
class MtpSpec:
    """Shape of the layer, and where its tensors stand."""

    whole: ModelSpec  # the model with the layer behind its own
    has_head: bool  # False: it has the model's
    num_parameters: int

    @property
    def index(self) -> int:
        """Number of the layer."""
        return self.whole.num_layers - 1

    @property
    def layer(self) -> ModelSpec:
        """The layer alone."""
        return replace(self.whole, layers=self.whole.layers[-1:])

    def name(self, part: str) -> str:
        """Name of one of its tensors."""
        return f"model.layers.{self.index}.{part}"


def find_mtp(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], where: str) -> MtpSpec:
    """Find the layer among the tensors of a checkpoint.

    Raises:
        ConfigError: the model has no such layer.
        CheckpointError: a tensor of it is missing or has a wrong shape; names it.
    """
    index, hidden = spec.num_layers, spec.hidden_size
    at = f"model.layers.{index}."
    if spec.extra_layers == 0 or not any(name.startswith(at) for name in shapes):
        raise ConfigError(
            f"speculation.method is 'mtp', and {where} ({spec.architecture}) has no layer for multi-token prediction; "
            "serve a checkpoint that has one (num_nextn_predict_layers), or choose another method"
        )
    whole = replace(spec, layers=(*spec.layers, spec.layers[-1]), extra_layers=0)
    expected = {name: shape for name, shape in expected_shapes(whole, shapes).items() if name.startswith(at)}
    expected |= {at + EMBEDDING_NORM: (hidden,), at + HIDDEN_NORM: (hidden,), at + NORM: (hidden,)}
    expected[at + JOIN] = (hidden, 2 * hidden)
    if at + HEAD in shapes:
        expected[at + HEAD] = (spec.vocab_size, hidden)
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(
                f"{where} lacks {name}, of the layer for multi-token prediction that config.json promises; fetch its "
                "files again, or leave speculation out"
            )
        if tuple(shapes[name]) != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(shapes[name])}; must be {list(shape)}")
    return MtpSpec(whole, at + HEAD in shapes, sum(prod(shape) for shape in expected.values()))
