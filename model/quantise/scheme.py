"""What a quantised checkpoint asks for: widths, groups and rounded activations, and its config. Knows no tensor.

Source of the config's keys: compressed-tensors 0.20, quant_args.py and quant_config.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.errors import ConfigError

MethodName = Literal["rtn", "fp8", "int8", "smoothquant", "awq", "gptq", "nvfp4", "mxfp4"]
METHODS: tuple[MethodName, ...] = ("rtn", "fp8", "int8", "smoothquant", "awq", "gptq", "nvfp4", "mxfp4")
WEIGHT_ONLY: tuple[MethodName, ...] = ("rtn", "awq", "gptq")
CALIBRATED: tuple[MethodName, ...] = ("awq", "gptq", "smoothquant")  # the others round each weight by itself
GROUP = 128  # columns per scale at 3 and 4 bits, or the largest divisor below
LEAST_GROUP = 16  # smaller groups cost more bits for scales than they save
BLOCK = (128, 128)
_SCALES_OF_FLOAT4 = {"tensor_group": "torch.float8_e4m3fn", "group": "torch.uint8"}  # as configs name them
FLOAT4_GROUPS = {"nvfp4": 16, "mxfp4": 32}  # columns per scale; the formats leave no choice


@dataclass(frozen=True, slots=True)
class Activations:
    """How the rows that meet a quantised matrix are rounded. `strategy`: what shares a scale."""

    is_float: bool
    strategy: Literal["token", "tensor", "group"] = "token"
    dynamic: bool = True
    group: int | None = None

    def config(self) -> dict[str, Any]:
        """`input_activations` of a config group."""
        return {
            "num_bits": 8,
            "type": "float" if self.is_float else "int",
            "strategy": self.strategy,
            "dynamic": self.dynamic,
            "symmetric": True,
            **({} if self.group is None else {"group_size": self.group}),
        }


@dataclass(frozen=True, slots=True)
class Scheme:
    """How all matrices of the layers are quantised. `group`: columns per scale; None: a row, a block or all.

    "tensor_group": scales of groups are themselves rounded to 8 bits, under a scale of the tensor (NVFP4).
    """

    bits: int
    is_float: bool = False
    strategy: Literal["tensor", "channel", "group", "tensor_group", "block"] = "channel"
    group: int | None = None
    symmetric: bool = True
    activations: Activations | None = None
    ordered: bool = False  # columns were rounded in order of activation; changes no stored form

    @property
    def format(self) -> str:
        """compressed-tensors' name of the stored form."""
        if self.is_float4:
            return "nvfp4-pack-quantized" if self.strategy == "tensor_group" else "mxfp4-pack-quantized"
        if self.is_float:
            return "float-quantized"
        return "pack-quantized" if self.activations is None else "int-quantized"

    @property
    def is_float4(self) -> bool:
        """True if numbers are e2m1."""
        return self.is_float and self.bits == 4

    @property
    def least(self) -> int:
        """Least stored integer."""
        return -(1 << (self.bits - 1))

    @property
    def most(self) -> int:
        """Greatest stored integer."""
        return (1 << (self.bits - 1)) - 1

    def config(self, ignored: Sequence[str], version: str) -> dict[str, Any]:
        """`quantization_config` of the checkpoint. `ignored`: modules that stay floats."""
        weights = {
            "num_bits": self.bits,
            "type": "float" if self.is_float else "int",
            "strategy": self.strategy,
            "symmetric": self.symmetric,
            "dynamic": False,
            **({} if self.group is None else {"group_size": self.group}),
            **({"block_structure": list(BLOCK)} if self.strategy == "block" else {}),
            **({"actorder": "weight"} if self.ordered else {}),
            **({"scale_dtype": _SCALES_OF_FLOAT4[self.strategy]} if self.is_float4 else {}),
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None if self.activations is None else self.activations.config(),
            "output_activations": None,
            "format": self.format,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "version": version,
        }

    def describe(self) -> str:
        """The scheme in words, for the report."""
        shared = {"tensor": "tensor", "channel": "row", "block": "block of 128 x 128"}.get(
            self.strategy, f"{self.group} columns"
        )
        rounded = "" if self.activations is None else f", activations 8 bits per {self.activations.strategy}"
        kind = ("e2m1" if self.is_float4 else "e4m3") if self.is_float else f"{self.bits}-bit integers"
        return f"{kind}, a scale per {shared}{'' if self.symmetric else ' and a zero point'}{rounded}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chose. Defaults are each method's paper's, or what serves most kernels."""

    method: MethodName
    bits: int | None = None  # None: 4 for rtn, awq and gptq; 8 else
    group: int | None = None  # None: 128 or the largest divisor below, at 3 and 4 bits; 0: a scale per row
    granularity: Literal["tensor", "channel", "block"] = "channel"  # fp8
    symmetric: bool = True
    alpha: float | None = None  # smoothquant; None: searched
    level: Literal["o1", "o2", "o3"] = "o1"  # smoothquant: activations per token, per tensor, per tensor and static
    damp: float = 0.01  # gptq
    ordered: bool = True  # gptq


def scheme_of(settings: Settings, widths: Sequence[tuple[str, int]]) -> Scheme:
    """Scheme of a model whose matrices have these (name, columns).

    Raises:
        ConfigError: a setting does not exist, belongs to another method, or does not divide a matrix.
    """
    method, bits = settings.method, settings.bits
    if method not in METHODS:
        raise ConfigError(f"--method is {method!r}; must be one of {', '.join(METHODS)}")
    if settings.alpha is not None and not (method == "smoothquant" and 0 <= settings.alpha <= 1):
        raise ConfigError(f"--alpha is {settings.alpha}; it is smoothquant's, and must be 0 to 1, e.g. 0.5")
    if settings.level != "o1" and method != "smoothquant":
        raise ConfigError(f"--level is {settings.level!r}; only smoothquant has levels: leave it out")
    if settings.granularity != "channel" and method != "fp8":
        raise ConfigError(f"--granularity is {settings.granularity!r}; only fp8 has it: leave it out")
    if not 0 < settings.damp < 1:
        raise ConfigError(f"--damp is {settings.damp}; must be between 0 and 1, e.g. 0.01")
    if method in FLOAT4_GROUPS:
        return _float4(settings, widths)
    if method not in WEIGHT_ONLY:
        return _eight_bits(settings)
    bits = 4 if bits is None else bits
    if bits not in (3, 4, 8):
        raise ConfigError(f"--bits is {bits}; must be 3, 4 or 8")
    group = _group(settings.group, bits, widths)
    ordered = method == "gptq" and settings.ordered
    return Scheme(
        bits,
        strategy="channel" if group is None else "group",
        group=group,
        symmetric=settings.symmetric,
        ordered=ordered,
    )


def _eight_bits(settings: Settings) -> Scheme:
    method = settings.method
    if settings.bits not in (None, 8):
        raise ConfigError(f"--bits is {settings.bits}; {method} has 8: leave it out, or take rtn, awq or gptq")
    if settings.group is not None:
        raise ConfigError(f"--group is {settings.group}; {method} has a scale per row: leave it out")
    if not settings.symmetric:
        raise ConfigError(f"--asymmetric is for rtn, awq and gptq; {method} has no zero points: leave it out")
    if method == "fp8":
        is_block = settings.granularity == "block"
        rounded = Activations(True, "group" if is_block else "token", group=BLOCK[1] if is_block else None)
        return Scheme(8, True, settings.granularity, activations=rounded)
    strategy: Literal["token", "tensor"] = "token" if settings.level == "o1" else "tensor"
    return Scheme(8, activations=Activations(False, strategy, dynamic=settings.level != "o3"))


def _float4(settings: Settings, widths: Sequence[tuple[str, int]]) -> Scheme:
    method, group = settings.method, FLOAT4_GROUPS[settings.method]
    if settings.bits not in (None, 4):
        raise ConfigError(f"--bits is {settings.bits}; {method} has 4: leave it out")
    if settings.group not in (None, group):
        raise ConfigError(f"--group is {settings.group}; {method} has groups of {group}: leave it out")
    if not settings.symmetric:
        raise ConfigError(f"--asymmetric is for rtn, awq and gptq; {method} has no zero points: leave it out")
    for name, columns in widths:
        if columns % group:
            raise ConfigError(
                f"{method} has groups of {group} columns, and {name} has {columns}; take rtn, awq or gptq"
            )
    return Scheme(4, True, "tensor_group" if method == "nvfp4" else "group", group)


def _group(given: int | None, bits: int, widths: Sequence[tuple[str, int]]) -> int | None:
    if given == 0 or (given is None and bits == 8):
        return None
    if given is None:
        for size in range(GROUP, LEAST_GROUP - 1, -1):
            if all(columns % size == 0 for _, columns in widths):
                return size
        name, columns = min(widths, key=lambda width: width[1] % GROUP == 0)
        raise ConfigError(
            f"no group of {LEAST_GROUP} to {GROUP} columns divides all matrices ({name} has {columns}); "
            "give --group 0 for a scale per row"
        )
    if given < 0:
        raise ConfigError(f"--group is {given}; must be a number of columns, or 0 for a scale per row")
    for name, columns in widths:
        if columns % given:
            fitting = max(size for size in range(1, given) if all(c % size == 0 for _, c in widths))
            raise ConfigError(
                f"--group is {given}, which does not divide the {columns} columns of {name}; "
                f"give {fitting}, another divisor, or 0 for a scale per row"
            )
    return given
