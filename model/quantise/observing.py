"""The decoder's ops for calibration: they show what each product gets, and round it as a scheme asks. Knows no model.

Arithmetic is float32. Products are whole calls of the library: a run needs the same bits from the same rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.seam import Linear
from ..ops.torch_ops import TorchLinear, TorchOps
from .rounding import FLOAT8_MAX, rounded_rows
from .scheme import Activations

SAMPLE_ROWS = 512  # of each product's input, for searches that round activations
_SAMPLED_AT_ONCE = 64
_LEAST_SCALE = 1e-10


class ObservingOps(TorchOps):
    """Ops in float32. `seen`: called with each product's matrix and rows. `rounds`: of rows before a quantised one."""

    def __init__(self, num_threads: int = 1) -> None:
        super().__init__(torch.float32, num_threads)
        self.seen: Callable[[Linear, Tensor], None] | None = None
        self.rounds: Activations | None = None
        self.scales: Mapping[int, Tensor] = {}  # of rows, by id of the matrix, where they are static

    def pack(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gated: bool = False,
        wide: bool = False,
    ) -> TorchLinear:
        """Convert a matrix to float32. Rows for `exact` matrices and the head are never rounded."""
        del gated
        return TorchLinear(matrix.float().contiguous(), None if bias is None else bias.float(), exact or wide)

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        """Show x [rows, in], round it if asked, and multiply it."""
        assert isinstance(packed, TorchLinear)
        if self.seen is not None:
            self.seen(packed, x)
        if self.rounds is not None and not packed.exact:
            x = rounded_activations(x, self.rounds, self.scales.get(id(packed)))
        return torch.nn.functional.linear(x, packed.matrix, packed.bias)


def rounded_activations(x: Tensor, how: Activations, static: Tensor | None = None) -> Tensor:
    """Round x [rows, in] to 8 bits and back. `static`: the scale, if it was measured before."""
    if static is not None:
        return rounded_rows(x, how.is_float, static)
    ceiling = FLOAT8_MAX if how.is_float else 127.5
    if how.strategy == "tensor":
        most = x.abs().amax()
    elif how.strategy == "token":
        most = x.abs().amax(-1, keepdim=True)
    else:
        assert how.group is not None
        wide = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % how.group))
        most = wide.reshape(len(x), -1, how.group).amax(-1).repeat_interleave(how.group, 1)[:, : x.shape[1]]
    return rounded_rows(x, how.is_float, (most / ceiling).clamp(min=_LEAST_SCALE))


@dataclass(slots=True)
class Observed:
    """What is kept of a product's inputs X [tokens, in], all float32."""

    second: Tensor  # [in, in]: the sum of x xᵀ over the tokens
    total: Tensor  # [in]: the sum of |x|
    most: Tensor  # [in]: the greatest |x|
    sample: Tensor  # [n, in]: some of the rows
    count: int = 0

    @classmethod
    def nothing(cls, width: int) -> Observed:
        """Before the first token."""
        return cls(torch.zeros(width, width), torch.zeros(width), torch.zeros(width), torch.zeros(0, width))

    def add(self, x: Tensor) -> None:
        """Take rows x [rows, in] in."""
        self.second.addmm_(x.t(), x)
        size = x.abs()
        self.total += size.sum(0)
        self.most = torch.maximum(self.most, size.amax(0))
        self.count += len(x)
        if len(self.sample) < SAMPLE_ROWS:
            step = max(1, len(x) // _SAMPLED_AT_ONCE)
            self.sample = torch.cat((self.sample, x[::step]))[:SAMPLE_ROWS]

    def divided(self, scale: Tensor) -> Observed:
        """The same for inputs whose column j is divided by scale[j]."""
        inner = self.second / scale.unsqueeze(0) / scale.unsqueeze(1)
        return Observed(inner, self.total / scale, self.most / scale, self.sample / scale, self.count)

    def output_error(self, delta: Tensor) -> float:
        """Sum over the tokens of ‖delta x‖² for a difference of matrices, delta [out, in]."""
        return float(((delta @ self.second) * delta).sum().clamp(min=0))


@dataclass(slots=True)
class Observer:
    """Collects `Observed` by the matrix's name."""

    name_by_id: Mapping[int, str]
    found: dict[str, Observed] = field(default_factory=dict)

    def __call__(self, packed: Linear, x: Tensor) -> None:
        """Take one product's rows in; a matrix without a name is none of the layer's."""
        name = self.name_by_id.get(id(packed))
        if name is None:
            return
        if name not in self.found:
            self.found[name] = Observed.nothing(x.shape[1])
        self.found[name].add(x)
