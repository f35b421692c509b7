"""Mutants of the engine."""

from __future__ import annotations

from mutant import Mutant

_ENGINE = [
    Mutant(
        "engine/scheduler.py",
        "if sequence.state is _S.WAITING and sequence.source is not Source.PEER and self._awaits_prefix",
        "if sequence.source is not Source.PEER and self._awaits_prefix",
    ),
    Mutant(
        "engine/scheduler.py",
        'it owns nothing any more and is forgotten."""\n        self._promise(sequence, 0)\n',
        'it owns nothing any more and is forgotten."""\n',
    ),
    Mutant(
        "engine/scheduler.py",
        "            self._promise(sequence, cost.new_blocks)\n",
        "            self._promise(sequence, 0)\n",
    ),
    Mutant(
        "engine/scheduler.py",
        "        self._promise(sequence, 0)\n        self.move(sequence, _S.PARKED)\n",
        "        self.move(sequence, _S.PARKED)\n",
    ),
    Mutant(
        "engine/scheduler.py",
        "return self.policy.has_room(Room(cost.from_free, pool.num_live, self.num_promised, pool.num_blocks))",
        "return True",
    ),
    Mutant(
        "engine/scheduler.py",
        "Room(cost.from_free, pool.num_live, self.num_promised, pool.num_blocks)",
        "Room(cost.from_free, pool.num_live, 0, pool.num_blocks)",
    ),
    Mutant("engine/scheduler.py", "if s.source is not Source.FOR_PEER][-1]", "if s.source is not Source.FOR_PEER][0]"),
    Mutant(
        "engine/scheduler.py",
        "        samples = end == len(sequence.tokens)\n",
        "        samples = end >= sequence.num_prompt\n",
    ),
    Mutant(
        "engine/scheduler.py",
        "                size -= (sequence.num_computed + size) % HASH_BLOCK_TOKENS\n",
        "                pass\n",
    ),
    Mutant(
        "engine/scheduler.py",
        "            seals_tail=samples and sequence.source is Source.FOR_PEER,\n",
        "            seals_tail=False,\n",
    ),
    Mutant(
        "engine/scheduler.py",
        "        sequence.source = Source.LOCAL\n        sequence.has_begun = True\n        sequence.preemptions",
        "        sequence.has_begun = True\n        sequence.preemptions",
    ),
    Mutant("engine/cache_manager.py", "            asleep += self.pool.owners(block) == 0\n", ""),
    Mutant(
        "engine/cache_manager.py",
        "        sequence.num_published = len(sequence.blocks)\n        self.residency",
        "        self.residency",
        survives="publishing what is published already changes nothing (`PrefixCache.publish`)",
    ),
    Mutant(
        "engine/cache_manager.py",
        "        if not swapped.start <= found < swapped.end:\n",
        "        if not found < swapped.end:\n",
    ),
    Mutant(
        "engine/cache_manager.py",
        "            link = sequence.identities[-1] if known else sequence.identity_root\n",
        "            link = sequence.identity_root\n",
    ),
    Mutant(
        "engine/cache_manager.py",
        "            self._delta += 1  # this number is never sent as a delta: the gap tells\n",
        "",
    ),
    Mutant(
        "engine/cache_manager.py",
        "and self.pool.owners(sequence.blocks[shared]) > 1:",
        "and self.pool.owners(sequence.blocks[shared]) > 2:",
    ),
    Mutant("engine/core.py", "        lives.in_step = frozenset()\n        lives.holdings", "        lives.holdings"),
    Mutant("engine/core.py", "            if step.key in result.non_finite:\n", "            if False:\n"),
    Mutant(
        "engine/core.py",
        "                sequence.num_computed = step.end\n",
        "                sequence.num_computed = step.end - 1\n",
    ),
    Mutant(
        "engine/core.py", "            self._scheduler.recompute(sequence)\n            if not", "            if not"
    ),
    Mutant(
        "engine/core.py",
        "            if sequence.deadline_s is not None and sequence.deadline_s <= now_s:\n",
        "            if False:\n",
    ),
    Mutant(
        "engine/commands.py",
        "        inside = sequence.cached_tokens <= start < end <= sequence.num_prompt\n",
        "        inside = start < end <= sequence.num_prompt\n",
    ),
    Mutant(
        "engine/commands.py",
        "        if sequence.num_computed < sequence.num_prompt:\n            # The face",
        "        if False:\n            # The face",
    ),
    Mutant(
        "engine/commands.py",
        "            kept = max(min(kept_tokens, sequence.num_computed), sequence.cached_tokens)\n",
        "            kept = max(kept_tokens, sequence.cached_tokens)\n",
    ),
    Mutant("engine/commands.py", "        if submit.key in self._lives.scheduler.by_key:\n", "        if False:\n"),
    Mutant("engine/commands.py", "            or not _is_sealed(sequence, command.token_start, end)\n", ""),
    Mutant("engine/commands.py", "            or not 0 <= command.token_start < end <= sequence.num_computed\n", ""),
    Mutant("engine/lifecycle.py", "        if sequence.key in self.in_step:\n", "        if False:\n"),
    Mutant(
        "engine/lifecycle.py",
        "        sequence.tokens.append(token_id)\n",
        "        sequence.tokens.append(token_id ^ 1)\n",
    ),
    Mutant("engine/swap.py", "            self.pool.give_back(sequence.swapped.blocks)\n", ""),
    Mutant(
        "engine/swap.py",
        "        if num_blocks > self.pool.num_free:\n",
        "        if num_blocks > self.pool.num_free + 1:\n",
    ),
]

_AROUND = [
    Mutant("engine/turn.py", "        self._say(self._core.drain())\n", ""),
    Mutant("engine/turn.py", "                self._say(follows)\n", ""),
    Mutant(
        "engine/turn.py",
        "                if store.swap_in(op):\n                    return [], []\n",
        "                store.swap_in(op)\n                if True:\n                    return [], []\n",
    ),
    Mutant(
        "engine/turn.py",
        "                    answer.append(KvRead(op.key, op.token_start, op.token_count, None))\n",
        "                    pass\n",
    ),
    Mutant(
        "engine/turn.py",
        "                return [BlocksFetched(op.fetch_id, 0, ())], []\n",
        "                return [], []\n",
    ),
    Mutant(
        "engine/turn.py",
        "                self._emit(events)\n                events = []\n                self._say(follows)\n",
        "                self._say(follows)\n",
    ),
    Mutant("engine/loop.py", "        self._failures_in_a_row = 0\n        now_s", "        now_s"),
    Mutant(
        "engine/loop.py",
        "if self._failures_in_a_row >= FAILURES_TO_BREAK:",
        "if self._failures_in_a_row > FAILURES_TO_BREAK:",
    ),
    Mutant("engine/loop.py", "        self.is_broken = True\n", ""),
    Mutant(
        "engine/loop.py",
        "            self._next_checked = last % num_blocks\n",
        "            self._next_checked = 0\n",
    ),
    Mutant(
        "engine/loop.py",
        "{key: told for result in results for key, told in result.prompt_logprobs.items()},\n        failed,",
        "{key: told for result in results for key, told in result.prompt_logprobs.items()},\n        {},",
    ),
    Mutant(
        "engine/loop.py",
        "        frozenset(key for result in results for key in result.non_finite),\n",
        "        frozenset(),\n",
    ),
    Mutant(
        "engine/loop.py",
        "InternalError.code, message) for key in self._core.states()]\n",
        "InternalError.code, message) for key in ()]\n",
    ),
    Mutant("engine/link/client.py", "            del self._fetches[fetch_id]\n", "            pass\n"),
    Mutant("engine/link/client.py", "            self._release_all()\n", "            pass\n"),
    Mutant(
        "engine/link/client.py",
        "            if not future.done():\n                future.set_exception(error)\n",
        "            pass\n",
    ),
    Mutant("engine/link/client.py", "        self._link.send(CancelSequence(key, FinishReason.ERROR))\n", ""),
    Mutant("engine/link/client.py", "        self._owner_by_key[key] = hear\n", ""),
    Mutant("engine/link/client.py", "self._owner_by_key.pop(key, None)", "self._owner_by_key.get(key)"),
    Mutant(
        "engine/integrity.py",
        "        assert owners == claims[block],",
        "        assert owners >= claims[block],",
        survives="a proof: what is right passes a weaker one too; sim/planted.py has the bugs that it sees",
    ),
    Mutant(
        "engine/integrity.py",
        "        assert sequence.num_promised == 0,",
        "        assert True,",
        survives="a proof: what is right passes a weaker one too; the sum of promises is proved beside it",
    ),
    Mutant(
        "engine/commands.py", "if block is None or not holdings.prefix.is_of(block, command.root):", "if block is None:"
    ),
]

_TASTE = [
    Mutant("engine/policy.py", "and before < budget // 2\n", "and before <= budget // 2\n"),
    Mutant("engine/policy.py", "        left += half\n", ""),
    Mutant("engine/policy.py", "size if size <= half else _whole_blocks(half)", "min(size, half)"),
    Mutant("engine/policy.py", "                half -= shares[place]\n", "                pass\n"),
    Mutant("engine/policy.py", "            max_rows -= bounded[place]\n", ""),
    Mutant("engine/policy.py", "            freed -= more\n", ""),
    Mutant(
        "engine/policy.py",
        "        if queue.items and queue.tokens + prompt_tokens",
        "        if queue.tokens + prompt_tokens",
    ),
    Mutant("engine/policy.py", "sum(self.is_short(size, budget) is is_short for size in offered)", "len(offered)"),
    Mutant("engine/policy.py", "return max(HASH_BLOCK_TOKENS, _whole_blocks(", "return max(1, _whole_blocks("),
    Mutant(
        "engine/step_times.py",
        "self._scored if any(step.targets for step in plan.sequences) else self._prefill",
        "self._prefill",
    ),
    Mutant("engine/step_times.py", "if is_scored and (self.scored_ms_per_token", "if (self.scored_ms_per_token"),
    Mutant("engine/scheduler.py", "is_scored = any(s.is_scored for s in works)", "is_scored = False"),
    Mutant("engine/step_times.py", "took_ms - (self.decode_step_ms if decodes else 0.0)", "took_ms"),
    Mutant("engine/step_times.py", "        pp += _MIN_PAIRS**2\n", ""),
    Mutant(
        "engine/step_times.py",
        "if count == 1 and step.samples and step.num_generated:",
        "if count == 1:",
    ),
    Mutant("engine/step_times.py", "            if a < 0:\n", "            if False:\n"),
]

_PLANS = [
    Mutant("engine/link/plan_stream.py", "        gone = self._forget()\n", "        gone = ()\n"),
    Mutant("engine/link/plan_stream.py", "before.step, before.message = step, self._message - 1", "before.step = step"),
    Mutant("engine/link/plan_stream.py", "or message != self._message + 1", ""),
    Mutant("engine/link/plan_stream.py", "        self._is_whole = True\n\n    def encode", "\n    def encode"),
    Mutant(
        "engine/link/plan_stream.py",
        "if more > 0 and all(",
        "if more > 0 and any(",
        survives="a growth that does not fit is overruled by the changed field: more bytes, the same plan",
    ),
    Mutant("engine/link/plan_stream.py", "        self._free += slots\n", ""),
    Mutant("engine/link/steady.py", "if not now or now[0] != last[0]:", "if not now:"),
    Mutant("engine/link/steady.py", "            or params != last[6]\n", ""),
    Mutant("engine/link/steady.py", "            or list(starts) != _next_starts(last)\n", ""),
    Mutant("engine/link/steady.py", "or list(numbers) != [number + 1 for number in last[7]]", ""),
    Mutant("engine/link/steady.py", "table[:count] != before or now[:used] != past or ", ""),
    Mutant("engine/link/steady.py", " or num_tokens != len(self._steps):", ":"),
    Mutant("engine/link/rank_link.py", "        if zlib.crc32(body) != checksum:\n", "        if False:\n"),
    Mutant("engine/link/rank_link.py", "        if number != self._number + 1:\n", "        if False:\n"),
    Mutant(
        "engine/link/rank_link.py", "body, self._unread = whole[:size], whole[size:]", 'body, self._unread = whole, b""'
    ),
    Mutant("engine/rank_store.py", "        _tell_failure(group)\n        raise", "        raise"),
    Mutant("engine/rank_store.py", "    if _DAMAGED in found:\n", "    if False:\n"),
    Mutant(
        "worker/rank_work.py",
        "            history = history._replace(output_ids=(*history.output_ids, first))\n",
        "            pass\n",
    ),
    Mutant("kv/slices.py", "head_start=heads.start - first_head,", "head_start=heads.start,"),
    Mutant(
        "kv/slices.py",
        "        layer_start=layers.start,\n        layer_count=len(layers),\n        head_start=h",
        "        head_start=h",
    ),
    Mutant(
        "kv/slices.py",
        "np.empty(dimensions, np.uint8) if into is None else into.take(dimensions)",
        "np.empty(dimensions, np.uint8)",
    ),
]

_LATER = [
    Mutant(
        "engine/commands.py",
        "        if sequence.state is not _S.PROMISED or sequence.wants_bind:",
        "        if sequence.state is not _S.PROMISED:",
    ),
    Mutant(
        "engine/cache_manager.py",
        "        sequence.written.clear()\n",
        "",
        survives=(
            "only a sequence that waits for a peer is written to, and one that gave its blocks back is computed here"
        ),
    ),
]

_REPORT = [
    Mutant("engine/report.py", "sum(s.num_expected for s in to_prefill)", "sum(s.num_remaining for s in to_prefill)"),
    Mutant("engine/sequence.py", "(len(self.tokens) - self.num_expected / 2)", "(self.num_expected / 2)"),
]

MUTANTS = [*_ENGINE, *_AROUND, *_TASTE, *_PLANS, *_LATER, *_REPORT]
