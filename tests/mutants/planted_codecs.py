"""Mutants of the cache's codecs and of their guard."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant("engine/guard/machine.py", "        if len(prompt_ids) < LEAST_TOKENS:\n            return\n", ""),
    Mutant("engine/guard/machine.py", "        self._credit_share -= 1.0\n", ""),
    Mutant("engine/guard/machine.py", "tuple(prompt_ids[: self._limits.max_tokens])", "tuple(prompt_ids)"),
    Mutant("engine/guard/machine.py", "            self._samples.popleft()\n", ""),
    Mutant("engine/guard/machine.py", "self._worked_s + self._limits.idle_s", "self._limits.idle_s"),
    Mutant("engine/guard/machine.py", "        self._allowed_s -= took_s\n        self._sum", "        self._sum"),
    Mutant("engine/guard/machine.py", "len(self._recent) < LEAST_SCORES or ", ""),
    Mutant("engine/guard/machine.py", "mean <= self._limits.bound_nats", "divergence <= self._limits.bound_nats"),
    Mutant("engine/guard/machine.py", "if self.verdict is not None or len", "if len"),
    Mutant("engine/guard/machine.py", "len(self._current) - SCORED_ROWS", "len(self._current) - PART_TOKENS"),
    Mutant(
        "engine/guard/machine.py",
        "self._current, self._done, self._sum, self._rows = None, 0, 0.0, 0",
        "self._current, self._done = None, 0",
    ),
    Mutant("engine/guard/machine.py", "        if not isfinite(divergence):", "        if False:"),
    Mutant("engine/guard/idle.py", "            self._guard.failed(self._clock.now_s() - began_s)\n", ""),
    Mutant("engine/guard/idle.py", "_s() - began_s)\n            return\n", "_s() * 0)\n            return\n"),
    Mutant("engine/guard/fallback.py", "block_bytes = after.per_token * pool", "block_bytes = before.per_token * pool"),
    Mutant("engine/guard/fallback.py", "return self.own + self.beside", "return self.own"),
    Mutant(
        "engine/guard/fallback.py",
        "min(pool.num_blocks, pool.pool_bytes // block_bytes)",
        "pool.pool_bytes // block_bytes",
    ),
    Mutant("engine/guard/fallback.py", "pool.num_swap_blocks * before.own // after.own", "pool.num_swap_blocks"),
    Mutant("engine/guard/fallback.py", "pool.num_tokens >= context", "pool.num_tokens > context"),
    Mutant("engine/guard/fallback.py", "self.stage is not Stage.WATCHING or is_ending", "is_ending"),
    Mutant("engine/guard/fallback.py", "Stage.WATCHING or is_ending:", "Stage.WATCHING:"),
    Mutant(
        "engine/guard/fallback.py",
        "self.stage in (Stage.BUILDING, Stage.CHANGED) else",
        "self.stage is Stage.BUILDING else",
    ),
    Mutant(
        "engine/guard/fallback.py", "Stage.RETURNING if self.stage is Stage.BUILDING else Stage.LOST", "Stage.RETURNING"
    ),
    Mutant(
        "engine/guard/fallback.py", "Stage.CHANGED if self.stage is Stage.BUILDING else Stage.KEPT", "Stage.CHANGED"
    ),
    Mutant("router/routing/fleet.py", "(w.state in hopeful or w.comes_back)", "w.state in hopeful"),
    Mutant("router/routing/fleet.py", "known.draining = known.draining or known.comes_back", "pass"),
    Mutant(
        "router/routing/fleet.py",
        "may_return = worker.comes_back or not worker.draining",
        "may_return = not worker.draining",
    ),
    Mutant(
        "router/routing/known_worker.py",
        "bool(self.facts.changes_codec_to) and not self.leaving",
        "bool(self.facts.changes_codec_to)",
    ),
    Mutant("cluster/lives.py", "use is Use.DRAINS and worker.get", "worker.get"),
    Mutant("engine/loop.py", "            if self._guard is not None:\n                self._guard.turn()\n", ""),
    Mutant("engine/loop.py", "                    self._guard.saw(command.prompt_ids)\n", "                    pass\n"),
    Mutant("model/codec_guard.py", "max(part.first_scored, part.start) - part.start", "0"),
    Mutant("kv/handover/pairing.py", "    if twice is not None:\n", "    if False:\n"),
    Mutant("kv/handover/pairing.py", "is_rounded(found) and is_rounded(component.codec)", "is_rounded(found)"),
    Mutant("kv/codec.py", "    spread[..., ::ANCHOR_TOKENS, :] = 0\n", ""),
    Mutant("kv/codec.py", "_significant_bits(np.maximum(magnitude, partner))", "_significant_bits(magnitude)"),
    Mutant("kv/codec.py", "    anchors[refused[..., ::ANCHOR_TOKENS]] = 0\n", ""),
    Mutant("kernels/reference_codecs.py", "masked_fill(is_anchor.view(-1, 1, 1), 0)", "clone()"),
    Mutant("kv/spec.py", "    if values == KEYS_ONLY:\n", "    if False:\n"),
]
