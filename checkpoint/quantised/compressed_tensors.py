"""Checkpoints of compressed-tensors (llm-compressor): groups of matrices, each with a format of its own.

Source: compressed-tensors 0.20: config.py, quant_args.py, match.py, and each format's compressor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ...core.errors import CheckpointError
from .headers import EXPONENTS, FLOAT8, FLOATS, ITEM_BYTES, ModuleTensors
from .keys import Keys
from .matrices import Float4Matrix, PackedMatrix, ScaledMatrix, StoredMatrix
from .methods import INFORMATIVE, activation_remark

SERVED_FORMATS = (
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
_EMBEDDINGS = "embed_tokens"  # the one module of ours that is an Embedding; all other matrices are Linear


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of a group are quantised."""

    format: str
    bits: int
    is_float: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool


class _Group:
    """Matrices that a config's group names, and how they are stored (None: as floats)."""

    def __init__(self, keys: Keys, default_format: str) -> None:
        keys.know(("targets", "weights", "input_activations", "output_activations", "format"), ())
        self.targets = keys.names("targets")
        self.patterns = {target: keys.pattern(target[3:]) for target in self.targets if target.startswith("re:")}
        weights = keys.section("weights")
        self.scheme = _scheme(weights, _format(keys, default_format)) if weights.config else None
        for kind in ("input_activations", "output_activations"):
            keys.section(kind)  # must be an object

    def names(self, module: str) -> bool:
        """A target is the module's name or matches it."""
        return module in self.targets or any(pattern.match(module) for pattern in self.patterns.values())

    def takes_kind(self, module: str) -> bool:
        """A target is the module's class."""
        return ("Embedding" if module.endswith(_EMBEDDINGS) else "Linear") in self.targets


class CompressedTensors:
    """Implements `Method`."""

    roles = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
    )

    def __init__(self, keys: Keys) -> None:
        keys.know(
            ("config_groups", "format", "sparsity_config", "transform_config", "moe_sparsity_config"),
            (*INFORMATIVE, "ignore", "kv_cache_scheme", "quantization_status", "global_compression_ratio"),
        )
        _refuse_more(keys)
        keys.names("ignore")  # which matrices are quantised, their own tensors tell
        groups, format_ = keys.section("config_groups"), str(keys.config.get("format") or "dense")
        self._where = groups.where
        self._groups = [_Group(groups.section(name), format_) for name in groups.config]
        self.remarks = tuple(dict.fromkeys(_activation_remarks(groups)))

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        module = tensors.module
        by_name = [group for group in self._groups if group.names(module)]
        found = by_name or [group for group in self._groups if group.takes_kind(module)]
        if not found or found[0].scheme is None:
            beside = next(iter(tensors.by_role.values()))
            raise CheckpointError(
                f"{beside.file} holds {beside.name}, and no group of {self._where} with weights names {module}; "
                "take another export of the model"
            )
        return stored(tensors, found[0].scheme)


def stored(tensors: ModuleTensors, scheme: WeightScheme) -> StoredMatrix:
    """How a matrix of a scheme is stored. Raises CheckpointError as `Method.matrix`."""
    if scheme.format == "pack-quantized":
        return _packed(tensors, scheme)
    if scheme.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return _float4(tensors, scheme)
    tensors.only("weight", "weight_scale", "weight_zero_point")
    weight = tensors.matrix("weight", FLOAT8 if scheme.is_float else ("I8",))
    rows, columns = weight.shape
    shapes, block = _scale_shapes(scheme, rows, columns)
    scale = tensors.need("weight_scale", EXPONENTS if scheme.format == "mxfp8-quantized" else FLOATS, *shapes)
    zeros = None
    if not scheme.symmetric or "weight_zero_point" in tensors.by_role:
        zeros = tensors.need("weight_zero_point", ("I8", *FLOAT8, *FLOATS), *shapes).name
    return ScaledMatrix(rows, columns, weight.name, scale.name, block, zeros)


def _packed(tensors: ModuleTensors, scheme: WeightScheme) -> PackedMatrix:
    tensors.only("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    rows, columns = _true_shape(tensors)
    bits = scheme.bits
    weight = tensors.need("weight_packed", ("I32",), (rows, -(-columns * bits // 32)))
    shapes, (block_rows, group) = _scale_shapes(scheme, rows, columns)
    if block_rows != 1:
        raise weight.wrong(f"is packed with strategy {scheme.strategy}; served: channel and group")
    scale = tensors.need("weight_scale", FLOATS, *shapes)
    zeros = None
    if not scheme.symmetric:
        zeros = tensors.need("weight_zero_point", ("I32",), (-(-rows * bits // 32), -(-columns // group))).name
    index = None
    if "weight_g_idx" in tensors.by_role:
        index = tensors.need("weight_g_idx", ("I32", "I64"), (columns,)).name
    return PackedMatrix(rows, columns, weight.name, scale.name, bits, group, zeros, index, ITEM_BYTES[scale.dtype])


def _float4(tensors: ModuleTensors, scheme: WeightScheme) -> Float4Matrix:
    tensors.only("weight_packed", "weight_scale", "weight_global_scale")
    weight = tensors.matrix("weight_packed", ("U8",))
    rows, columns = weight.shape[0], weight.shape[1] * 2
    is_nvfp4 = scheme.format.startswith("nv")
    group = scheme.group or (16 if is_nvfp4 else 32)
    if columns % group:
        raise weight.wrong(f"has {columns} columns, which are no groups of {group}")
    scale = tensors.need("weight_scale", ("F8_E4M3",) if is_nvfp4 else EXPONENTS, (rows, columns // group))
    whole = tensors.need("weight_global_scale", ("F32",), (), (1,)).name if is_nvfp4 else None
    return Float4Matrix(rows, columns, weight.name, scale.name, group, whole, divides=True)


def _true_shape(tensors: ModuleTensors) -> tuple[int, int]:
    """Read `weight_shape`: packed rows may end with unused bits."""
    shape = tensors.need("weight_shape", ("I64", "I32"), (2,))
    raw, width = shape.read(), shape.size_bytes // 2
    rows, columns = (int.from_bytes(raw[at : at + width], "little", signed=True) for at in (0, width))
    if rows < 1 or columns < 1:
        raise shape.wrong(f"is [{rows}, {columns}]")
    return rows, columns


def _scale_shapes(scheme: WeightScheme, rows: int, columns: int) -> tuple[list[tuple[int, ...]], tuple[int, int]]:
    """Shapes that the scales may have, and the rows and columns of one."""
    if scheme.strategy == "tensor":
        return [(1,), (), (1, 1)], (rows, columns)
    if scheme.strategy == "channel":
        return [(rows, 1), (rows,)], (1, columns)
    if scheme.strategy == "block":
        assert scheme.block is not None
        high, wide = scheme.block
        return [(-(-rows // high), -(-columns // wide))], scheme.block
    assert scheme.group is not None
    return [(rows, -(-columns // scheme.group))], (1, scheme.group)


def _format(keys: Keys, default: str) -> str:
    name = keys.config.get("format") or default
    if name not in SERVED_FORMATS:
        raise CheckpointError(f"{keys.where}: format is {name!r}; served: {', '.join(SERVED_FORMATS)}")
    return str(name)


def _scheme(keys: Keys, format_: str) -> WeightScheme:
    keys.know(
        ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic", "actorder"),
        ("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),  # tensors have their own dtypes
    )
    keys.one_of("dynamic", (False, None))
    keys.one_of("actorder", ("group", "weight", "static", "dynamic", True, False, None))
    bits, kind = keys.count("num_bits", 8), keys.one_of("type", ("int", "float"), "int")
    group, block = _group_size(keys), _block(keys)
    default = "block" if block else "tensor" if group is None else "channel" if group < 0 else "group"
    strategy = keys.one_of("strategy", ("tensor", "channel", "group", "block", "tensor_group"), default)
    if strategy == "block" and block is None:
        raise keys.wrong("block_structure", None, "two whole numbers for strategy block")
    if strategy in ("group", "tensor_group") and (group is None or group < 1):
        raise keys.wrong("group_size", group, f"a whole number above 0 for strategy {strategy}")
    _check_width(keys, format_, bits, kind)
    return WeightScheme(format_, bits, kind == "float", strategy, group, block, keys.flag("symmetric", True))


def _check_width(keys: Keys, format_: str, bits: int, kind: str) -> None:
    """Each format has its own types and widths."""
    served = {
        "float-quantized": ("float", (8,)),
        "mxfp8-quantized": ("float", (8,)),
        "int-quantized": ("int", (8, 4)),
        "naive-quantized": (kind, (8, 4) if kind == "int" else (8,)),
        "pack-quantized": ("int", tuple(range(1, 9))),
    }.get(format_, ("float", (4,)))
    if kind != served[0] or bits not in served[1]:
        raise CheckpointError(
            f"{keys.where}: {bits}-bit {kind} weights in format {format_}; that format has {served[0]} of "
            f"{', '.join(map(str, served[1]))} bits"
        )


def _group_size(keys: Keys) -> int | None:
    value = keys.config.get("group_size")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value == 0 or value < -1):
        raise keys.wrong("group_size", value, "a whole number above 0, or -1")
    return value


def _block(keys: Keys) -> tuple[int, int] | None:
    value = keys.config.get("block_structure")
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    try:
        high, wide = (int(side) for side in sides)
    except (TypeError, ValueError):
        high = wide = 0
    if prod((high, wide)) < 1 or high < 1:
        raise keys.wrong("block_structure", value, "two whole numbers above 0, e.g. [128, 128]")
    return high, wide


def _refuse_more(keys: Keys) -> None:
    """Refuse sparse weights and rotations: they change what the tensors mean."""
    for key, harmless in (("sparsity_config", ("dense", None)), ("moe_sparsity_config", (None,))):
        section = keys.section(key)
        if section.config and section.config.get("format") not in harmless:
            raise CheckpointError(
                f"{section.where} is {dict(section.config)!r}: sparse weights are not served; take a dense export"
            )
    if keys.section("transform_config").config.get("config_groups"):
        raise CheckpointError(
            f"{keys.where} sets transform_config: rotations of activations are not served; take an export without them"
        )


def _activation_remarks(groups: Keys) -> Iterator[str]:
    for name in groups.config:
        group = groups.section(name)
        for kind in ("input_activations", "output_activations"):
            if rounded := group.section(kind).config:
                told = f"{kind.replace('_', ' ')} to {rounded.get('num_bits', 8)} bits ({rounded.get('type', 'int')})"
                yield activation_remark(told)
