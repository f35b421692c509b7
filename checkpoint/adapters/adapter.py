"""An adapter as PEFT saves it: pairs of low-rank matrices and their places in a model. Knows no torch.

A module's weight W [rows, columns] acts as W + scale * B A, with A [rank, columns] and B [rows, rank]. All bytes are
read once: the digest names exactly the numbers that are computed with, whatever happens to the files later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import CheckpointError
from ..layout import layer_layout
from ..safetensors_files import read_header
from ..spec import ExpertsFfn, LatentAttention, ModelSpec
from .config import AdapterConfig, read_config

TENSORS_FILE = "adapter_model.safetensors"
DIGEST_BYTES = 16
MAX_HEADER_BYTES = 1 << 20  # 150 bytes per tensor; parsing it takes the interpreter for 10 ms
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_DTYPES = ("F32", "BF16", "F16")
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")

MatrixName = Literal["qkv", "output", "gate_up", "down"]
ADAPTED: tuple[MatrixName, ...] = ("qkv", "output", "gate_up", "down")
"""Matrices of a layer (layout.py) that adapters may change."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it is stored."""

    dtype: str  # of safetensors: "F32", "BF16", "F16"
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a matrix of the decoder that a module of the checkpoint is."""

    layer: int
    matrix: MatrixName
    first_row: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class AdapterPair:
    """The change of one module."""

    module: str
    place: Place
    scale: float
    a: StoredTensor  # [rank, columns]
    b: StoredTensor  # [rows, rank]

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter of one model, whole in memory."""

    directory: str
    digest: bytes  # of its config and tensors
    pairs: tuple[AdapterPair, ...]  # sorted by layer, matrix and row

    @property
    def rank(self) -> int:
        """The largest rank of its pairs."""
        return max(pair.rank for pair in self.pairs)

    @property
    def num_parameters(self) -> int:
        """Numbers of all matrices."""
        return sum(pair.rank * (pair.place.rows + pair.place.columns) for pair in self.pairs)


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Bounds for one adapter."""

    max_rank: int = 64
    max_bytes: int = 1 << 30  # of its file


def places(spec: ModelSpec, present: Container[str]) -> dict[str, Place]:
    """Modules of a model that an adapter may change, by name. `present`: as for `layer_layout`."""
    found: dict[str, Place] = {}
    for index, layer in enumerate(spec.layers):
        layout = layer_layout(spec, index, present)
        for name in ADAPTED:
            is_attention = name in ("qkv", "output")
            if isinstance(spec.attention, LatentAttention) if is_attention else isinstance(layer.ffn, ExpertsFfn):
                continue
            matrix, row = layout.matrices[name], 0
            for module, rows in matrix.parts:
                found[module] = Place(index, name, row, rows, matrix.columns)
                row += rows
    return found


def read_adapter(
    directory: Path, spec: ModelSpec, present: Container[str], limits: AdapterLimits = AdapterLimits()
) -> Adapter:
    """Read an adapter of the model `spec`, whose checkpoint has the tensors `present`.

    Raises:
        CheckpointError: a file is missing, damaged, pickled or too large, or the adapter changes what is not served, or
            it is not of this model. The message names the file, and the key or the tensor.
    """
    config, canonical = read_config(directory)
    path = directory / TENSORS_FILE
    tensors = _read_tensors(directory, path, limits.max_bytes)
    digest = hashlib.blake2b(canonical, digest_size=DIGEST_BYTES, person=b"twostroke-lora")
    known, sides = places(spec, present), dict[str, dict[str, StoredTensor]]()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(tensor.data)
        module, side = _split(name, path)
        if module not in known:
            raise CheckpointError(_no_place(path, module, spec))
        sides.setdefault(module, {})[side] = tensor
    if not sides:
        raise CheckpointError(f"{path} holds no tensor; save the adapter again")
    pairs = [_pair(module, both, known[module], config, path) for module, both in sides.items()]
    pairs.sort(key=lambda pair: (pair.place.layer, ADAPTED.index(pair.place.matrix), pair.place.first_row))
    adapter = Adapter(str(directory), digest.digest(), tuple(pairs))
    if adapter.rank > limits.max_rank:
        raise CheckpointError(
            f"{directory}: its rank is {adapter.rank}, and model.max_lora_rank {limits.max_rank}; raise that"
        )
    return adapter


def _read_tensors(directory: Path, path: Path, max_bytes: int) -> dict[str, StoredTensor]:
    if not path.is_file():
        pickled = next((name for name in _PICKLES if (directory / name).exists()), None)
        if pickled is not None:
            raise CheckpointError(
                f"{directory / pickled} is a pickle, which can run code when it is read; save the adapter with "
                "safe_serialization=True"
            )
        raise CheckpointError(f"{path} is missing; give the directory of an adapter that PEFT has saved")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{path} has {size} bytes, and an adapter {max_bytes} at most; raise model.max_lora_bytes"
        )
    try:
        raw, header = read_header(path, MAX_HEADER_BYTES)
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if len(content) != size or bytes(content[8 : 8 + len(raw)]) != raw:
        raise CheckpointError(f"{path} changed while it was read; load it again")
    return {name: _stored(path, name, entry, content[8 + len(raw) :]) for name, entry in header.items()}


_WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: memoryview) -> StoredTensor:
    dtype, shape, (start, end) = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is {dtype}; served: {', '.join(_DTYPES)}")
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(f"{path}: {name} has shape {shape}; matrices of LoRA have two sides")
    if not 0 <= start <= end <= len(data) or end - start != sides[0] * sides[1] * _WIDTHS[dtype]:
        raise CheckpointError(f"{path}: {name} has a damaged place in the file; fetch it again")
    return StoredTensor(dtype, (sides[0], sides[1]), data[start:end])


def _split(name: str, path: Path) -> tuple[str, str]:
    """Module and side ("A" or "B") of a tensor."""
    if any(word in name.split(".") for word in ("lm_head", "embed_tokens")):
        raise CheckpointError(f"{path} holds {name}; adapters of the embedding and of the head are not served")
    found = _NAME.fullmatch(name.removeprefix(_PREFIX))
    if found is None or not name.startswith(_PREFIX):
        raise CheckpointError(
            f"{path} holds {name}, which is not served: only pairs lora_A and lora_B of linear modules are "
            "(no DoRA vectors, no saved modules)"
        )
    return found["module"], found["side"]


def _no_place(path: Path, module: str, spec: ModelSpec) -> str:
    if isinstance(spec.attention, LatentAttention) or any(isinstance(layer.ffn, ExpertsFfn) for layer in spec.layers):
        return (
            f"{path} changes {module}; adapters of experts, of their router and of latent attention are not served, "
            f"and {spec.architecture} has such modules"
        )
    return f"{path} changes {module}, which this model ({spec.architecture}, {spec.num_layers} layers) does not have"


def _pair(
    module: str, sides: Mapping[str, StoredTensor], place: Place, config: AdapterConfig, path: Path
) -> AdapterPair:
    for side in ("A", "B"):
        if side not in sides:
            raise CheckpointError(f"{path} lacks lora_{side} of {module}; fetch it again")
    rank = config.rank_of(module)
    wanted = {"A": (rank, place.columns), "B": (place.rows, rank)}
    for side, shape in wanted.items():
        if sides[side].shape != shape:
            raise CheckpointError(
                f"{path}: lora_{side} of {module} has shape {list(sides[side].shape)}; this model and the adapter's "
                f"config ask for {list(shape)}"
            )
    return AdapterPair(module, place, config.scale_of(module), sides["A"], sides["B"])
