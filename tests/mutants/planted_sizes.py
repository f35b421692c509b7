"""Mutants of what fits a device, and of the remedies where nothing does."""

from __future__ import annotations

from mutant import Mutant

_SIZING, _AUTOMATIC, _FIT = "kv/sizing.py", "worker/automatic.py", "cluster/fit.py"

MUTANTS = [
    Mutant(_SIZING, "facts.memory_bytes < facts.device_bytes:", "True:"),
    Mutant(_SIZING, "facts.memory_bytes <= facts.process_bytes + facts.weight_bytes:", "False:"),
    Mutant(_SIZING, "fraction < 1 and left >= block_bytes:", "fraction < 1:"),
    Mutant(_SIZING, "    if facts.swap_bytes and not is_gpu:", "    if facts.swap_bytes or not is_gpu:"),
    Mutant(_AUTOMATIC, 'device_bytes=device_bytes if device == "cuda" else None', "device_bytes=device_bytes"),
    Mutant(_AUTOMATIC, "    if given.tokens is not None and pool", "    if given.tokens is None and pool"),
    Mutant(_FIT, "        return self.is_possible and self.num_ranks == 1", "        return self.is_possible"),
    Mutant(_FIT, "if _fit(1, needs, config, gpu).is_possible]", "if _fit(2, needs, config, gpu).is_possible]"),
    Mutant(_FIT, "    num_gpus = shape.gpus_per_node\n", "    num_gpus = shape.num_gpus\n"),
]
