"""Stands in for nvidia-ml-py in a process of a test: this folder comes first on its PYTHONPATH.

The file that SCRIPTED_NVML names describes the devices (support/fakes/nvml_script.py), at any time anew.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from support.fakes.nvml_script import NvmlScript

_script = NvmlScript.following(Path(os.environ["SCRIPTED_NVML"]))


def __getattr__(name: str) -> object:
    return getattr(_script, name)
