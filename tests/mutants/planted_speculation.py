"""Mutants of speculative decoding."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant("engine/speculation/ngram.py", "            if length > longest:\n", "            if length >= longest:\n"),
    Mutant(
        "engine/speculation/ngram.py", "        length = 0  # two runs may have one hash\n", "        length = least\n"
    ),
    Mutant("engine/speculation/ngram.py", "            guessed.append(guessed[-period])\n", "            break\n"),
    Mutant("engine/speculation/ngram.py", "earlier.append(latest.get(run, -1))", "earlier.append(-1)"),
    Mutant("engine/speculation/length.py", "            if num_drafted >= self.length:\n", "            if True:\n"),
    Mutant("engine/speculation/length.py", "2 * num_accepted < num_drafted", "num_accepted < num_drafted"),
    Mutant("engine/speculation/length.py", "self.rest = min(2 * self.rest, LONGEST_REST)", "pass"),
    Mutant("engine/speculation/length.py", "            self.rest = FIRST_REST\n", ""),
    Mutant(
        "engine/speculation/drafting.py",
        "        self.num_under_way = 0\n        self.num_drafted += num_drafted\n",
        "        self.num_drafted += num_drafted\n",
    ),
    Mutant("engine/speculation/pace.py", "(num_seqs - 1).bit_length()", "num_seqs.bit_length()"),
    Mutant("engine/speculation/pace.py", "ms = min(ms, _MOST_OVER_MEAN * self.ms / self.steps)", "pass"),
    Mutant(
        "engine/speculation/pace.py",
        "each.drafted.rate >= MARGIN * each.plain.rate",
        "each.drafted.rate >= each.plain.rate",
    ),
    Mutant("engine/speculation/pace.py", "            each.pause = min(2 * each.pause, _LONGEST_PAUSE)\n", ""),
    Mutant("engine/speculation/pace.py", "        return not is_on\n", "        return is_on\n"),
    Mutant("engine/speculation/speculation.py", "max(pool.num_free - num_promised, 0)", "pool.num_free"),
    Mutant("engine/speculation/speculation.py", "                rows -= len(ids)\n", ""),
    Mutant(
        "engine/speculation/speculation.py",
        "sequence.params.max_tokens - sequence.num_generated - 1",
        "sequence.params.max_tokens - sequence.num_generated",
    ),
    Mutant("model/sampling/masks.py", "job.result()[: same + 1]", "job.result()"),
    Mutant("model/sampling/masks.py", "        self._stuck.append(job)\n", ""),
    Mutant("model/sampling/masks.py", "[job for job in self._stuck if not job.done()]", "self._stuck"),
    Mutant("model/sampling/masks.py", "        known.matcher = None  # until it is known to be whole\n", ""),
    Mutant("model/sampling/masks.py", "if time.monotonic() - known.began_s > OVERDUE_S:", "if False:"),
    Mutant("model/sampling/masks.py", "_masks_behind(matcher.copy(), ", "_masks_behind(matcher, "),
    Mutant("model/sampling/masks.py", "            del self._known[key]\n", "            pass\n"),
    Mutant("model/sampling/masks.py", "        self._known.move_to_end(step.key)\n", ""),
    Mutant("model/sampling/masks.py", "known is None or known.grammar != grammar", "known is None"),
    Mutant("model/sampling/masks.py", "matcher is None or ids[:count] != known.taken", "matcher is None"),
    Mutant("engine/core.py", "                    lives.drop_drafts(sequence)\n", ""),
    Mutant(
        "engine/lifecycle.py",
        "            sequence.drafting.num_under_way = 0\n            self.holdings.trim",
        "            sequence.drafting.num_under_way = 0\n            len",
    ),
    Mutant("model/sampling/step.py", "            if draw is None and is_draft:\n", "            if False:\n"),
    Mutant(
        "engine/scheduler.py",
        "rows = budget.max_batch_tokens - len(decodes) - prompts",
        "rows = budget.max_batch_tokens - len(decodes)",
    ),
    Mutant(
        "engine/lifecycle.py",
        "        while doom is None and num_taken < len(token_ids):",
        "        while num_taken < len(token_ids):",
    ),
    Mutant(
        "engine/lifecycle.py",
        "        self.holdings.trim(sequence, len(sequence.tokens))\n        assert",
        "        assert",
    ),
    Mutant("engine/core.py", "            logprobs = logprobs[: len(token_ids)]\n", ""),
    Mutant(
        "model/runner.py",
        "                end += max(len(sampled) - 1, 0)\n",
        "                end += len(step.draft_ids)\n",
    ),
    Mutant("model/runner.py", "            spoken.cut(i, step.key, good + 1)\n", "            pass\n"),
    Mutant(
        "model/sampling/step.py",
        "output_ids=history.output_ids + step.draft_ids[:row]",
        "output_ids=history.output_ids",
    ),
    Mutant("model/sampling/step.py", "step.num_generated + row, mask, history", "step.num_generated, mask, history"),
    Mutant(
        "model/sampling/step.py",
        "(row == 0 or sampled[-1] == draft_ids[row - 1])",
        "(row == 0 or sampled[-1] in draft_ids)",
    ),
]
