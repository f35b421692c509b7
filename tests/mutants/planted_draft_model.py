"""Mutants of guesses by a draft model."""

from __future__ import annotations

from mutant import Mutant

_PLANNER = "engine/speculation/draft_model/planner.py"
_HOLDINGS = "engine/speculation/draft_model/holdings.py"
_PROPOSER = "engine/speculation/draft_model/proposer.py"
_CATCH_UP = "engine/speculation/draft_model/catch_up.py"

MUTANTS = [
    Mutant(_PROPOSER, "min(num_right, len(self.guessed) - 1, len(came) - 1)", "min(num_right, len(came) - 1)"),
    Mutant(_PROPOSER, "        while num_right < min(", "        while False and num_right < min("),
    Mutant(_PROPOSER, " and self.guessed[num_right] == came[num_right]:", ":"),
    Mutant(_PROPOSER, "len(self.guessed) - 1, len(came) - 1)", "len(self.guessed) - 1)"),
    Mutant(_PROPOSER, "if self.guessed_after == len(tokens) else ()", "if tokens else ()"),
    Mutant(_PLANNER, "                    left -= end - start\n", ""),
    Mutant(_PLANNER, "end = min(start + left, known - 1)", "end = known - 1"),
    Mutant(_PLANNER, " and not proposer.guessed:", ":"),
    Mutant(_PLANNER, "self._bounds.max_model_len - known + 1", "self._bounds.max_model_len"),
    Mutant(_PLANNER, "known + most - 1):\n", "known):\n"),
    Mutant(_PLANNER, "takewhile(lambda id_: id_ < self._bounds.vocab_size, guessed)", "guessed"),
    Mutant(_PLANNER, ">= self._bounds.vocab_size:", "> self._bounds.vocab_size:"),
    Mutant(_PLANNER, "        proposer.is_off = True\n", ""),
    Mutant(_PLANNER, "min(step.end, len(sequence.tokens) - 1)", "step.end"),
    Mutant(_HOLDINGS, "(len(sequence.tokens) - 1) // HASH_BLOCK_TOKENS", "len(sequence.tokens) // HASH_BLOCK_TOKENS"),
    Mutant(_HOLDINGS, "min(proposer.num_computed, num_named)", "num_named"),
    Mutant(_HOLDINGS, "            self.pool.give_back(spare)\n", ""),
    Mutant(_HOLDINGS, "                proposer.guessed = ()  #", "                pass  #"),
    Mutant(_HOLDINGS, "if spare and proposer.guessed_after == len(sequence.tokens):", "if spare:"),
    Mutant(_HOLDINGS, "            self.pool.give_back(proposer.blocks)\n", ""),
    Mutant(_PLANNER, "        begun.add(lacking)\n", ""),
    Mutant(
        _PLANNER,
        "                    self.holdings.release(sequence)\n                    continue\n",
        "                    continue\n",
    ),
    Mutant(_CATCH_UP, "_GROWTH * self.tokens, ", ""),
    Mutant(_CATCH_UP, "max(LEAST_TOKENS, ", "max(1, "),
    Mutant("engine/speculation/pace.py", "        each.left += each.is_counted\n", "        each.left += 1\n"),
    Mutant(
        "engine/speculation/pace.py", "        each = self._of(num_seqs)\n        each.left += each.is_counted\n", ""
    ),
    Mutant("engine/cache_manager.py", "            self.drafts.release(sequence)\n", "            pass\n"),
    Mutant("model/drafter.py", "num_generated=step.num_generated + 1, ", ""),
    Mutant("model/drafter.py", "(*history.output_ids, *sampled)", "history.output_ids"),
    Mutant("model/drafter.py", " or self._ends_text(works[i], sampled[0]):", ":"),
    Mutant("text/same_tokens.py", " and not set(target.eos_ids) & set(draft.eos_ids):", ":"),
    Mutant("text/same_tokens.py", "    if target.bos_id != draft.bos_id:\n", "    if False:\n"),
]
