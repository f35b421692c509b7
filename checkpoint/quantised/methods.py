"""What a format of quantised weights offers to the plan, and values that several formats share. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from .headers import FLOAT8, FLOATS, ModuleTensors
from .keys import Keys
from .matrices import ScaledMatrix, StoredMatrix

ACTIVATION_ROLES = (
    *("input_scale", "input_global_scale", "input_zero_point", "input_scale_ub"),
    *("output_scale", "output_zero_point"),
)
"""Tensors that say how a product's rows would be rounded. Rows are not rounded here, so nobody reads them."""

INFORMATIVE = ("quant_method", "version", "producer", "meta", "library", "library_version", "provider")
"""Keys of any format that change no number."""


class Method(Protocol):
    """A format, as one checkpoint's config chooses its details."""

    remarks: tuple[str, ...]
    """Differences between the results that the config asks for and those that are served."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of a quantised matrix's tensors after their module's, besides `ACTIVATION_ROLES` and the bias."""
        ...

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """How a quantised matrix is stored.

        Raises:
            CheckpointError: a tensor is missing, or has another dtype or shape than the format says; names it.
        """
        ...


def scaled(
    tensors: ModuleTensors, scale_role: str, block: tuple[int, int] | None, *, kind: tuple[str, ...] = FLOAT8
) -> ScaledMatrix:
    """A matrix of one byte per number. `block`: rows and columns of a scale; None: the scale's shape tells.

    Without a block there is one scale for the tensor, or one for each row.
    """
    weight = tensors.matrix("weight", kind)
    rows, columns = weight.shape
    dtypes = (*FLOATS, "F8_E8M0")
    if block is None:
        scale = tensors.need(scale_role, dtypes, (), (1,), (1, 1), (rows,), (rows, 1))
        block = (rows if scale.size_bytes == _one(scale.dtype) else 1, columns)
    else:
        high, wide = -(-rows // block[0]), -(-columns // block[1])
        scale = tensors.need(scale_role, dtypes, (high, wide), (high, 1, wide, 1))  # the latter: ModelOpt's
    return ScaledMatrix(rows, columns, weight.name, scale.name, block)


def _one(dtype: str) -> int:
    return {"F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)


def activation_remark(what: str) -> str:
    """Remark on a config that also rounds what meets the weights."""
    return f"the config also rounds {what}; here weights alone are as stored, which is nearer to the float model"


def static_remark(config: Mapping[str, object]) -> tuple[str, ...]:
    """Remark on FP8's `activation_scheme`, if the config has one."""
    scheme = config.get("activation_scheme")
    return (activation_remark(f"activations to FP8 ({scheme})"),) if scheme else ()


def refuse_other_bits(keys: Keys, bits: int, served: tuple[int, ...]) -> None:
    """Raise CheckpointError if a width is not served."""
    if bits not in served:
        raise keys.wrong("bits", bits, f"one of {', '.join(map(str, served))}; take an export with one of them")
