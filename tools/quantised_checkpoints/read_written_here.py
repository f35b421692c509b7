"""What compressed-tensors reads in checkpoints of `twostroke quantize`: `python read_written_here.py FOLDER...`.

Prints JSON: for each folder's name, the digest of every matrix that the library dequantises, in float32. The tests
hold it as tests/support/checkpoints/quantised/written_here.json; the folders are those of `FORMS` in
tests/model/test_quantise.py.
"""

import json
import sys
from pathlib import Path

from base import digest
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor

ROLES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


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
            found[f"{module}.weight"] = digest(compressor.decompress(state, scheme)["weight"])
    return found


if __name__ == "__main__":
    print(json.dumps({Path(name).name: read(Path(name)) for name in sys.argv[1:]}, indent=1))
