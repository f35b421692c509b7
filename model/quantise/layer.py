"""Quantises the matrices of one layer by a method. Knows no file and no other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import awq, smoothquant
from .folding import LayerTensors, folds
from .gptq import Factor, round_by_columns
from .observing import Observed
from .packing import tensors_of
from .rounding import Rounded, grid_of, rounded
from .scheme import Scheme, Settings

_UNCLIPPED = ("q_proj", "k_proj")  # queries meet keys in a product, where clipping costs more. Source: AWQ's code


@dataclass(frozen=True, slots=True)
class MatrixError:
    """What rounding did to a matrix. Errors are shares: ‖difference‖² of ‖the original‖²."""

    module: str
    weight: float
    output: float | None  # over the calibration's inputs; None: the matrix had none
    note: str = ""


@dataclass(slots=True)
class QuantisedLayer:
    """Result of a layer."""

    stored: dict[str, Tensor] = field(default_factory=dict)  # for the file
    served: dict[str, Tensor] = field(default_factory=dict)  # float32, under a float checkpoint's names
    scales: dict[str, Tensor] = field(default_factory=dict)  # static ones of rows, by the decoder's names
    errors: list[MatrixError] = field(default_factory=list)


def quantise_layer(
    tensors: LayerTensors, seen: Mapping[str, Observed], settings: Settings, scheme: Scheme
) -> QuantisedLayer:
    """Quantise a layer. `seen`: inputs of its products, by the decoder's names. Folding changes `tensors`.

    Raises:
        CheckpointError: the calibration's inputs cannot be used.
    """
    folded, result = _fold(tensors, dict(seen), settings, scheme), QuantisedLayer()
    observed = folded.observed
    for name, joined in tensors.matrices.items():
        one = observed.get(name)
        factor = None
        if settings.method == "gptq" and one is not None:
            factor = Factor(one, settings.damp, settings.ordered)
        for module, weight in tensors.parts(name, joined).items():
            if scheme.is_float4:  # matrices that a kernel joins share the scale of the tensor
                matrix = rounded(weight, grid_of(weight, scheme, tensors.dtype, most=joined.abs().max()), scheme)
            else:
                matrix = _round(
                    module, weight, one, factor=factor, settings=settings, scheme=scheme, dtype=tensors.dtype
                )
            values = matrix.values(scheme)
            result.served[module + ".weight"] = values
            result.stored |= {
                f"{module}.{role}": tensor for role, tensor in tensors_of(matrix, scheme, tensors.dtype).items()
            }
            result.errors.append(_error(module, weight, values, one, folded.told.get(name, "")))
        how = scheme.activations
        if how is not None and not how.dynamic and one is not None:
            scale = smoothquant.static_scale(one.most, how)
            assert scale is not None
            result.scales[name] = scale
            result.stored |= {f"{module}.input_scale": scale.clone() for module in tensors.parts(name, joined)}
    result.served |= {full: tensors.kept[full] for full, _ in tensors.layout.vectors.values()}
    result.stored |= tensors.kept
    return result


@dataclass(slots=True)
class _Folded:
    observed: dict[str, Observed]
    told: dict[str, str] = field(default_factory=dict)  # by matrix


def _fold(tensors: LayerTensors, observed: dict[str, Observed], settings: Settings, scheme: Scheme) -> _Folded:
    done = _Folded(observed)
    if settings.method not in ("awq", "smoothquant"):
        return done
    for fold in folds(tensors.spec, tensors.index):
        if any(name not in observed for name in fold.consumers):
            continue
        weights = [tensors.matrices[name] for name in fold.consumers]
        seen = [observed[name] for name in fold.consumers]
        if settings.method == "awq":
            scale = awq.channel_scale(weights, seen, scheme, tensors.dtype, fold.tie)
            told = "scaled"
        elif fold.norm is None:
            continue  # the paper smooths the inputs that norms give
        else:
            scale, alpha = smoothquant.channel_scale(weights, seen, scheme, tensors.dtype, settings.alpha)
            told = f"alpha {alpha:g}"
        applied = tensors.fold(fold, scale)
        for name in fold.consumers:
            observed[name] = observed[name].divided(applied)
            done.told[name] = told
    return done


def _round(
    module: str,
    weight: Tensor,
    one: Observed | None,
    *,
    factor: Factor | None,
    settings: Settings,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Rounded:
    if factor is not None:
        return round_by_columns(weight, factor, grid_of(weight, scheme, dtype), scheme)
    if settings.method == "awq" and one is not None and not module.endswith(_UNCLIPPED):
        return rounded(weight, awq.clipped_grid(weight, one, scheme, dtype), scheme)
    return rounded(weight, grid_of(weight, scheme, dtype), scheme)


def _error(module: str, weight: Tensor, values: Tensor, one: Observed | None, note: str) -> MatrixError:
    delta = values - weight
    size = float(weight.square().sum()) or 1.0
    output = None
    if one is not None:
        output = one.output_error(delta) / (one.output_error(weight) or 1.0)
    else:
        note = "no calibration token met it: rounded to nearest"
    return MatrixError(module, float(delta.square().sum()) / size, output, note)
