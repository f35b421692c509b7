"""Mutants of adapters: what is read, how they are named, held and applied, and who gets their requests."""

from __future__ import annotations

from mutant import Mutant

_READ = [
    Mutant("checkpoint/adapters/config.py", "alpha / (math.sqrt(rank) if self.root_scaled else rank)", "alpha / rank"),
    Mutant("checkpoint/adapters/config.py", 'module.endswith("." + name)', "module.endswith(name)"),
    Mutant("checkpoint/adapters/config.py", "_is_off(value):\n            continue", "True:\n            continue"),
    Mutant("checkpoint/adapters/config.py", "or begins in _KEEPS_THE_BASE)", "or begins)"),
    Mutant("checkpoint/adapters/adapter.py", "        digest.update(tensor.data)\n", ""),
    Mutant("checkpoint/adapters/adapter.py", "hashlib.blake2b(canonical, ", "hashlib.blake2b("),
    Mutant("checkpoint/adapters/adapter.py", "                row += rows\n", ""),
    Mutant("checkpoint/adapters/adapter.py", "        if sides[side].shape != shape:\n", "        if False:\n"),
]

_HELD = [
    Mutant(
        "engine/adapters.py", "if held.files.digest == digest and held.is_ready:", "if held.files.digest == digest:"
    ),
    Mutant("engine/adapters.py", "                held.uses += 1\n", "                held.uses = 1\n"),
    Mutant("engine/adapters.py", "if held.is_ready and not held.uses and", "if held.is_ready and"),
    Mutant("engine/adapters.py", "files.digest != digest and not replace:", "files.digest != digest and False:"),
    Mutant("engine/adapters.py", "        if len(self._held) >= bounds.max_adapters:", "        if False:"),
    Mutant("engine/adapters.py", "        if before is not None and before != held.slot:", "        if False:"),
    Mutant(
        "engine/adapters.py", "if held.is_ready and held.files.digest == digest)", "if held.files.digest == digest)"
    ),
    Mutant("engine/adapters.py", "        self._num_slots += 1\n", "        self._num_slots = len(self._held) + 1\n"),
]

_LEARNT = [
    Mutant("router/workers/loaded_adapters.py", "before.key == after.key", "before.worker_id == after.worker_id"),
    Mutant("router/workers/loaded_adapters.py", "self.gone(lost.name, lost.digest)", "self.gone(lost.name)"),
    Mutant("router/workers/loaded_adapters.py", "if held.asked and (held.name", "if (held.name"),
    Mutant("router/workers/loaded_adapters.py", "if held.asked and held.name not", "if held.name not"),
    Mutant("router/workers/loaded_adapters.py", "        if is_learning:\n", "        if True:\n"),
]

_APPLIED = [
    Mutant("model/ops/native_changes.py", ".transpose(2, 3).contiguous()", ".contiguous()"),
    Mutant("model/ops/low_rank.py", " * change.scales  # [rows, ranks] float32", ""),
    Mutant("model/ops/low_rank.py", "        done += rank\n", ""),
    Mutant("model/adapters/loaded.py", "if not (torch.isfinite(a).all() and", "if False and not (True and"),
    Mutant("model/adapters/loaded.py", "pair.scale, pair.place.first_row)", "pair.scale, 0)"),
]

_ROUTED = [
    Mutant(
        "router/routing/fleet.py",
        "worker.facts.model.name == model and worker.facts.holds(adapter)",
        "worker.facts.model.name == model",
    ),
    Mutant("router/routing/fleet.py", "key=lambda vote: (len(vote[1]), vote[0])", "key=lambda vote: vote[0]"),
]

MUTANTS = [*_READ, *_LEARNT, *_HELD, *_APPLIED, *_ROUTED]
