"""AWQ checkpoints (AutoAWQ, GPTQModel): 4-bit integers in groups. Knows keys and shapes.

Source: AutoAWQ 0.2, config of its `gemm` version.
"""

from __future__ import annotations

from .headers import FLOATS, ITEM_BYTES, ModuleTensors
from .keys import Keys
from .matrices import AwqMatrix, StoredMatrix
from .methods import INFORMATIVE, refuse_other_bits

_INFORMATIVE = (
    *INFORMATIVE,
    *("modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"),
    *("kv_cache_scheme", "desc_act", "lm_head", "sym", "pack_dtype", "checkpoint_format"),
)


class Awq:
    """Implements `Method`."""

    roles = ("qweight", "qzeros", "scales")

    def __init__(self, keys: Keys) -> None:
        keys.know(("bits", "w_bit", "group_size", "q_group_size", "zero_point", "format"), _INFORMATIVE)
        version = keys.config.get("version") or keys.config.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise keys.wrong("version", version, "gemm; export it again with it")
        refuse_other_bits(keys, keys.count("bits", keys.config.get("w_bit") or 4), (4,))
        group = keys.config.get("group_size", keys.config.get("q_group_size", 128))
        if not isinstance(group, int) or isinstance(group, bool) or group == 0 or group < -1:
            raise keys.wrong("group_size", group, "a whole number above 0, or -1")
        self._group, self._has_zeros = group, keys.flag("zero_point", True)
        self.remarks: tuple[str, ...] = ()

    def matrix(self, tensors: ModuleTensors) -> StoredMatrix:
        """Implements `Method.matrix`."""
        return awq_matrix(tensors, self._group, has_zeros=self._has_zeros)


def awq_matrix(tensors: ModuleTensors, group: int, *, has_zeros: bool) -> AwqMatrix:
    """A matrix in AWQ's form. Raises CheckpointError as `Method.matrix`."""
    tensors.only("qweight", "qzeros", "scales")
    weight = tensors.matrix("qweight", ("I32",))
    columns, rows = weight.shape[0], weight.shape[1] * 8
    group = columns if group < 0 else group
    groups = -(-columns // group)
    scale = tensors.need("scales", FLOATS, (groups, rows))
    zeros = None
    if has_zeros or "qzeros" in tensors.by_role:
        zeros = tensors.need("qzeros", ("I32",), (groups, rows // 8)).name
    return AwqMatrix(rows, columns, weight.name, scale.name, zeros, group, ITEM_BYTES[scale.dtype])
