"""GPTQ checkpoints (AutoGPTQ, GPTQModel): integers of 2, 3, 4 or 8 bits in groups. Knows keys and shapes.

Source: GPTQModel 7, config.py (`dynamic`) and the torch kernel; AutoGPTQ for the first version's zero points.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .headers import FLOATS, ITEM_BYTES, ModuleTensors
from .keys import Keys
from .matrices import GptqMatrix, StoredMatrix
from .methods import INFORMATIVE, refuse_other_bits

BITS = (2, 3, 4, 8)
# Which numbers were chosen, not what they mean: damping, order of the columns (the tensor g_idx has it), calibration.
_INFORMATIVE = (
    *INFORMATIVE,
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "lm_head", "model_name_or_path"),
    *(
        "model_file_base_name",
        "modules_in_block_to_quantize",
        "dataset",
        "tokenizer",
        "batch_size",
        "cache_block_outputs",
    ),
    *("pad_token_id", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "exllama_config"),
    *("use_exllama", "disable_exllama", "use_cuda_fp16", "max_input_length", "backend", "is_marlin_format", "mse"),
    *("act_group_aware", "offload_to_disk", "offload_to_disk_path", "uri", "desc_act", "sym", "group_aware", "mock"),
    *("kv_cache_scheme", "modules_to_not_convert", "format_version"),
)


@dataclass(frozen=True, slots=True)
class _Settings:
    bits: int
    group: int  # -1: all columns


@dataclass(frozen=True, slots=True)
class _Override:
    """GPTQModel's `dynamic`: other settings for modules of a pattern."""

    pattern: re.Pattern[str]
    settings: _Settings


class Gptq:
    """Implements `Method`."""

    roles = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, keys: Keys) -> None:
        keys.know(("bits", "group_size", "checkpoint_format", "format", "pack_dtype", "dynamic"), _INFORMATIVE)
        keys.one_of("pack_dtype", ("int32", None))
        version = keys.config.get("checkpoint_format") or keys.config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise keys.wrong("checkpoint_format", version, "gptq or gptq_v2; export it again in one of these")
        self._zero_offset = 1 if version == "gptq" else 0
        self._settings = _settings(keys, None)
        self._overrides = tuple(_overrides(keys, self._settings))
        self.remarks: tuple[str, ...] = ()

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        found = (each.settings for each in self._overrides if each.pattern.match(tensors.module))
        settings = next(found, self._settings)
        return gptq_matrix(tensors, settings.bits, settings.group, self._zero_offset)


def gptq_matrix(tensors: ModuleTensors, bits: int, group: int, zero_offset: int) -> GptqMatrix:
    """A matrix in GPTQ's form. `group`: columns of a scale, -1 for all. Raises CheckpointError as `Method.matrix`."""
    tensors.only("qweight", "qzeros", "scales", "g_idx")
    weight = tensors.matrix("qweight", ("I32",))
    words, rows = weight.shape
    if words * 32 % bits or rows * bits % 32:
        raise weight.wrong(f"has shape {list(weight.shape)}, which {bits}-bit numbers do not fill")
    columns = words * 32 // bits
    group = columns if group < 0 else group
    groups = -(-columns // group)
    scale = tensors.need("scales", FLOATS, (groups, rows))
    zeros = tensors.need("qzeros", ("I32",), (groups, rows * bits // 32))
    index = tensors.need("g_idx", ("I32", "I64"), (columns,)).name if "g_idx" in tensors.by_role else None
    return GptqMatrix(
        rows, columns, weight.name, scale.name, zeros.name, bits, group, zero_offset, index, ITEM_BYTES[scale.dtype]
    )


def _settings(keys: Keys, base: _Settings | None) -> _Settings:
    bits = keys.count("bits", base.bits if base else None)
    refuse_other_bits(keys, bits, BITS)
    group = keys.config.get("group_size", base.group if base else 128)
    if not isinstance(group, int) or isinstance(group, bool) or group == 0 or group < -1:
        raise keys.wrong("group_size", group, "a whole number above 0, or -1")
    return _Settings(bits, group)


def _overrides(keys: Keys, base: _Settings) -> list[_Override]:
    section, found = keys.section("dynamic"), []
    for text in section.config:
        if text.startswith("-:"):
            continue  # stays a float matrix; its own tensors tell
        pattern = keys.pattern(text.removeprefix("+:"))
        one = section.section(text)
        one.know(("bits", "group_size"), ("sym", "desc_act", "damp_percent", "damp_auto_increment", "mse"))
        found.append(_Override(pattern, _settings(one, replace(base))))
    return found
