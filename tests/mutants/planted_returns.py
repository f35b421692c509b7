"""Bugs of blocks that come back to prefill workers."""

from mutant import Mutant

RETURNS = "worker/blocks/returns.py"
TASK = "prefill_worker/task.py"
COSTS = "router/routing/costs.py"
POLICY = "router/routing/returns.py"

MUTANTS = [
    Mutant(POLICY, "        if source.view.role is not Role.PREFILL\n", "        if True\n"),
    Mutant(POLICY, "        and source.view.key != prefill.key\n", ""),
    Mutant(POLICY, "        and why_refused(source.view, prefill) is None\n", ""),
    Mutant(
        POLICY, "RETURNS in prefill.capabilities and RETURNS in decode.capabilities", "RETURNS in prefill.capabilities"
    ),
    Mutant(POLICY, "not (RETURNS in prefill.capabilities and", "not ("),
    Mutant(POLICY, "any(holder_blocks > blocks", "any(holder_blocks >= blocks"),
    Mutant(COSTS, "returned.terms.total_ms < terms.total_ms else plain", "True else plain"),
    Mutant(
        COSTS,
        "bytes_per_s = min(speed.handover_bytes_per_s, returns[0]",
        "bytes_per_s = max(speed.handover_bytes_per_s, returns[0]",
    ),
    Mutant(
        COSTS,
        "load_penalty_ms=plain.terms.load_penalty_ms - limits.work_weight * saved_ms",
        "load_penalty_ms=plain.terms.load_penalty_ms",
    ),
    Mutant(
        COSTS,
        "throttle_ms=plain.terms.throttle_ms - (prefill.slowdown - 1.0) * saved_ms",
        "throttle_ms=plain.terms.throttle_ms",
    ),
    Mutant(
        "router/routing/policy.py",
        "    fetchers = decoders if request.is_resumed else []\n",
        "    fetchers = decoders\n",
    ),
    Mutant(
        "router/routing/policy.py",
        "    mine = [c for c in ranked if c.decode.key == winner.decode.key]\n",
        "    mine = [winner]\n",
    ),
    Mutant(
        "router/requests/choosing.py",
        "            holders = [w for w in decoders if has_more(held[w.facts.worker_id], theirs)]\n",
        "            holders = list(decoders)\n",
    ),
    Mutant(RETURNS, "        if self._line.may_help(self.held):\n", "        if True:\n"),
    Mutant(RETURNS, "            self.held = fetched.stored_upto\n", ""),
    Mutant(RETURNS, "        num_tokens -= num_tokens % self._tools.facts.block_tokens\n", ""),
    Mutant(RETURNS, "submit.prompt_ids[: num_tokens + 1]", "submit.prompt_ids[:num_tokens]"),
    Mutant(RETURNS, "min(most, len(submit.prompt_ids) - 1)", "most"),
    Mutant(
        TASK,
        "        if not self.sender.is_over:\n            self.sender.fetched",
        "        if True:\n            self.sender.fetched",
    ),
    Mutant(TASK, "                    self._returning.cancel()\n", "                    pass\n"),
    Mutant(
        "engine/commands.py",
        "            self._lives.holdings.publish(sequence)  # what was written without a gap stays cached\n",
        "            pass\n",
    ),
    Mutant(RETURNS, "            self._line.ended(fetched.end)\n", ""),
    Mutant(RETURNS, "source.worker_id if num_tokens else self._came.source", "source.worker_id"),
    Mutant(RETURNS, "FetchedBlocks(self._came.num_tokens + num_tokens, named", "FetchedBlocks(num_tokens, named"),
]
