"""Mutants of the engine."""

from __future__ import annotations

from mutant import Mutant

_ENGINE = [
    Mutant(
        "model/schedule.py",
        'it owns nothing any more and is forgotten."""\n        self._promise(sequence, 0)\n',
        'it owns nothing any more and is forgotten."""\n',
    ),
    Mutant(
        "model/schedule.py",
        "            self._promise(sequence, cost.new_blocks)\n",
        "            self._promise(sequence, 0)\n",
    ),
    Mutant(
        "model/schedule.py",
        "        self._promise(sequence, 0)\n        self.move(sequence, _S.PARKED)\n",
        "        self.move(sequence, _S.PARKED)\n",
    ),
    Mutant(
        "model/schedule.py",
        "return self.policy.has_room(Room(cost.from_free, pool.num_live, self.num_promised, pool.num_blocks))",
        "return True",
    ),
    Mutant(
        "model/schedule.py",
        "Room(cost.from_free, pool.num_live, self.num_promised, pool.num_blocks)",
        "Room(cost.from_free, pool.num_live, 0, pool.num_blocks)",
    ),
    Mutant("model/schedule.py", "if s.source is not Source.FOR_PEER][-1]", "if s.source is not Source.FOR_PEER][0]"),
    Mutant(
        "model/schedule.py",
        "        samples = end == len(sequence.tokens)\n",
        "        samples = end >= sequence.num_prompt\n",
    ),
    Mutant(
        "model/schedule.py",
        "                size -= (sequence.num_computed + size) % HASH_BLOCK_TOKENS\n",
        "                pass\n",
    ),
    Mutant(
        "model/schedule.py",
        "            seals_tail=samples and sequence.source is Source.FOR_PEER,\n",
        "            seals_tail=False,\n",
    ),
    Mutant(
        "model/schedule.py",
        "        sequence.source = Source.LOCAL\n        sequence.has_begun = True\n        sequence.preemptions",
        "        sequence.has_begun = True\n        sequence.preemptions",
    ),
    Mutant("model/holdings.py", "            asleep += self.pool.owners(block) == 0\n", ""),
    Mutant(
        "model/holdings.py",
        "        sequence.num_published = len(sequence.blocks)\n        self.residency",
        "        self.residency",
        survives="publishing what is published already changes nothing (`PrefixCache.publish`)",
    ),
    Mutant(
        "model/holdings.py",
        "        if not swapped.start <= found < swapped.end:\n",
        "        if not found < swapped.end:\n",
    ),
    Mutant(
        "model/holdings.py",
        "            link = sequence.identities[-1] if known else sequence.identity_root\n",
        "            link = sequence.identity_root\n",
    ),
    Mutant(
        "model/holdings.py", "            self._delta += 1  # this number is never sent as a delta: the gap tells\n", ""
    ),
    Mutant(
        "model/holdings.py",
        "and self.pool.owners(sequence.blocks[shared]) > 1:",
        "and self.pool.owners(sequence.blocks[shared]) > 2:",
    ),
    Mutant("model/core.py", "        lives.in_step = frozenset()\n        lives.holdings", "        lives.holdings"),
    Mutant("model/core.py", "            if step.key in result.non_finite:\n", "            if False:\n"),
    Mutant(
        "model/core.py",
        "                sequence.num_computed = step.end\n",
        "                sequence.num_computed = step.end - 1\n",
    ),
    Mutant(
        "model/core.py", "            self._scheduler.recompute(sequence)\n            if not", "            if not"
    ),
    Mutant(
        "model/core.py",
        "            if sequence.deadline_s is not None and sequence.deadline_s <= now_s:\n",
        "            if False:\n",
    ),
    Mutant(
        "model/commands.py",
        "        inside = sequence.cached_tokens <= start < end <= sequence.num_prompt\n",
        "        inside = start < end <= sequence.num_prompt\n",
    ),
    Mutant(
        "model/commands.py",
        "        if sequence.num_computed < sequence.num_prompt:\n            # The face",
        "        if False:\n            # The face",
    ),
    Mutant(
        "model/commands.py",
        "            kept = max(min(kept_tokens, sequence.num_computed), sequence.cached_tokens)\n",
        "            kept = max(kept_tokens, sequence.cached_tokens)\n",
    ),
    Mutant("model/commands.py", "        if submit.key in self._lives.scheduler.by_key:\n", "        if False:\n"),
    Mutant("model/commands.py", "            or not _is_sealed(sequence, command.token_start, end)\n", ""),
    Mutant("model/commands.py", "            or not 0 <= command.token_start < end <= sequence.num_computed\n", ""),
    Mutant("model/lives.py", "        if sequence.key in self.in_step:\n", "        if False:\n"),
    Mutant(
        "model/lives.py", "        sequence.tokens.append(token_id)\n", "        sequence.tokens.append(token_id ^ 1)\n"
    ),
    Mutant("model/swap.py", "            self.pool.give_back(sequence.swapped.blocks)\n", ""),
    Mutant(
        "model/swap.py",
        "        if num_blocks > self.pool.num_free:\n",
        "        if num_blocks > self.pool.num_free + 1:\n",
    ),
]

_AROUND = [
    Mutant("model/turn.py", "        self._say(self._core.drain())\n", ""),
    Mutant("model/turn.py", "                self._say(follows)\n", ""),
    Mutant(
        "model/turn.py",
        "                if store.swap_in(op):\n                    return [], []\n",
        "                store.swap_in(op)\n                if True:\n                    return [], []\n",
    ),
    Mutant(
        "model/turn.py",
        "                    answer.append(KvRead(op.key, op.token_start, op.token_count, None))\n",
        "                    pass\n",
    ),
    Mutant(
        "model/turn.py",
        "                return [BlocksFetched(op.fetch_id, 0, ())], []\n",
        "                return [], []\n",
    ),
    Mutant(
        "model/turn.py",
        "                self._emit(events)\n                events = []\n                self._say(follows)\n",
        "                self._say(follows)\n",
    ),
    Mutant("model/engine.py", "        self._failures_in_a_row = 0\n        now_s", "        now_s"),
    Mutant(
        "model/engine.py",
        "if self._failures_in_a_row >= FAILURES_TO_BREAK:",
        "if self._failures_in_a_row > FAILURES_TO_BREAK:",
    ),
    Mutant("model/engine.py", "        self.is_broken = True\n", ""),
    Mutant(
        "model/engine.py",
        "            self._next_checked = last % num_blocks\n",
        "            self._next_checked = 0\n",
    ),
    Mutant(
        "model/engine.py",
        "{key: told for result in results for key, told in result.prompt_logprobs.items()},\n        failed,",
        "{key: told for result in results for key, told in result.prompt_logprobs.items()},\n        {},",
    ),
    Mutant(
        "model/engine.py",
        "        frozenset(key for result in results for key in result.non_finite),\n",
        "        frozenset(),\n",
    ),
    Mutant(
        "model/engine.py",
        "InternalError.code, message) for key in self._core.states()]\n",
        "InternalError.code, message) for key in ()]\n",
    ),
    Mutant("model/dispatch.py", "            del self._fetches[fetch_id]\n", "            pass\n"),
    Mutant("model/dispatch.py", "            self._release_all()\n", "            pass\n"),
    Mutant(
        "model/dispatch.py",
        "            if not future.done():\n                future.set_exception(error)\n",
        "            pass\n",
    ),
    Mutant("model/dispatch.py", "        self._link.send(CancelSequence(key, FinishReason.ERROR))\n", ""),
    Mutant("model/dispatch.py", "        self._owner_by_key[key] = hear\n", ""),
    Mutant("model/dispatch.py", "self._owner_by_key.pop(key, None)", "self._owner_by_key.get(key)"),
    Mutant(
        "model/integrity.py",
        "        assert owners == claims[block],",
        "        assert owners >= claims[block],",
        survives="a proof: what is right passes a weaker one too; sim/planted.py has the bugs that it sees",
    ),
    Mutant(
        "model/integrity.py",
        "        assert sequence.num_promised == 0,",
        "        assert True,",
        survives="a proof: what is right passes a weaker one too; the sum of promises is proved beside it",
    ),
    Mutant(
        "model/commands.py", "if block is None or not holdings.prefix.is_of(block, command.root):", "if block is None:"
    ),
]

_TASTE = [
    Mutant("model/policy.py", "and before < budget // 2\n", "and before <= budget // 2\n"),
    Mutant("model/policy.py", "        left += half\n", ""),
    Mutant("model/policy.py", "size if size <= half else _whole_blocks(half)", "min(size, half)"),
    Mutant("model/policy.py", "                half -= shares[place]\n", "                pass\n"),
    Mutant("model/policy.py", "            max_rows -= bounded[place]\n", ""),
    Mutant("model/policy.py", "            freed -= more\n", ""),
    Mutant(
        "model/policy.py",
        "        if queue.items and queue.tokens + prompt_tokens",
        "        if queue.tokens + prompt_tokens",
    ),
    Mutant("model/policy.py", "sum(self.is_short(size, budget) is is_short for size in offered)", "len(offered)"),
    Mutant("model/policy.py", "return max(HASH_BLOCK_TOKENS, _whole_blocks(", "return max(1, _whole_blocks("),
    Mutant(
        "model/pace.py",
        "self._scored if any(step.targets for step in plan.sequences) else self._prefill",
        "self._prefill",
    ),
    Mutant("model/pace.py", "if is_scored and (self.scored_ms_per_token", "if (self.scored_ms_per_token"),
    Mutant("model/schedule.py", "is_scored = any(s.is_scored for s in works)", "is_scored = False"),
    Mutant("model/pace.py", "took_ms - (self.decode_step_ms if decodes else 0.0)", "took_ms"),
    Mutant("model/pace.py", "        pp += _PAIRS_TO_TELL**2\n", ""),
    Mutant(
        "model/pace.py", "if step.num_tokens == 1 and step.samples and step.num_generated:", "if step.num_tokens == 1:"
    ),
    Mutant("model/pace.py", "            if a < 0:\n", "            if False:\n"),
]

MUTANTS = [*_ENGINE, *_AROUND, *_TASTE]
