"""What compressed-tensors reads in checkpoints of `twostroke quantize`: `python read_written_here.py FOLDER...`.

Prints JSON: for each folder's name, the digest of every matrix that the library dequantises, in float32. The tests
hold it as tests/support/checkpoints/quantised/written_here.json; the folders are those of `FORMS` in
tests/model/test_quantise.py.
"""

import json
import sys
from pathlib import Path

import torch
from base import digest
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file
from torch import Tensor

ROLES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


def read(folder: Path) -> dict[str, str]:
    """Digests by name of the float matrix."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    found = {}
    for name in sorted(tensors):
        module, _, role = name.rpartition(".")
        if role == "weight_scale":
            state = {role: tensors[f"{module}.{role}"] for role in ROLES if f"{module}.{role}" in tensors}
            state["weight_scale"] = state["weight_scale"].float()  # else it rounds the products to bfloat16
            if "weight_global_scale" in state:
                found[f"{module}.weight"] = digest(_nvfp4(state, scheme))
            else:
                found[f"{module}.weight"] = digest(compressor.decompress(state, scheme)["weight"])
    return found


def _nvfp4(state: dict[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """What the library's `decompress` does, in float32: it rounds the products to bfloat16."""
    packed = state["weight_packed"]
    numbers = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    whole = state["weight_global_scale"]
    return dequantize(numbers, state["weight_scale"], args=scheme.weights, global_scale=whole, dtype=torch.float32)


if __name__ == "__main__":
    print(json.dumps({Path(name).name: read(Path(name)) for name in sys.argv[1:]}, indent=1))
