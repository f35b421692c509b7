"""The mutants, by part: changes that somebody could make by accident in files that decide, and in their drivers."""

from __future__ import annotations

from mutant import Mutant

TESTS: dict[str, tuple[str, ...]] = {  # of the first beginning that fits
    "kv/handover": ("tests/kv", "tests/scenarios"),
    "kv/": ("tests/kv",),
    "model/sampling": ("tests/model/test_sampling_adjust.py", "tests/model/test_sampling_exact.py"),
    "model/": (
        "tests/model/test_engine_core.py",
        "tests/model/test_schedule_scenarios.py",
        "tests/model/test_swap.py",
        "tests/model/test_fairness.py",
        "tests/model/test_pace.py",
        "tests/decode_worker",
        "tests/prefill_worker",
    ),
    "decode_worker/": ("tests/decode_worker", "tests/cluster/test_worker_session.py", "tests/kv"),
    "prefill_worker/": ("tests/prefill_worker", "tests/kv", "tests/cluster/test_worker_handover.py"),
    "router/": ("tests/router",),
    "text/": ("tests/text",),
    "cluster/": ("tests/cluster/test_membership.py", "tests/cluster/test_placement.py", "tests/cluster"),
}

# ------------------------------------------------------------------ blocks and prefixes

_POOL = [
    Mutant("kv/pool.py", "            self._generations[block] += 1\n", ""),
    Mutant("kv/pool.py", "for block in reversed(blocks):", "for block in blocks:"),
    Mutant("kv/pool.py", "if num_blocks > self.num_free:", "if num_blocks > self.num_free + 1:"),
    Mutant("kv/pool.py", "            self._owners[block] += 1\n", "            self._owners[block] = 1\n"),
    Mutant(
        "kv/pool.py",
        "            if self._owners[block] == 0:\n                assert",
        "            if False:\n                assert",
    ),
    Mutant(
        "kv/pool.py", "        block = next(iter(self._cached))\n", "        block = next(reversed(self._cached))\n"
    ),
    Mutant("kv/pool.py", "        if self._on_evict is not None:\n            self._on_evict(block)\n", ""),
    Mutant("kv/pool.py", "        self._is_cached[block] = 0\n", ""),
]

_PREFIX = [
    Mutant("kv/prefix.py", "        self._pool.retain(blocks)\n", ""),
    Mutant("kv/prefix.py", "                self._pool.give_back([result[i]])\n", ""),
    Mutant("kv/prefix.py", "                self._pool.retain([entry.block])\n", ""),
    Mutant("kv/prefix.py", "                result[i] = entry.block\n", ""),
    Mutant("kv/prefix.py", "            doomed.extend(dying.children)\n", "            pass\n"),
    Mutant("kv/prefix.py", "            del entry.parent.children[entry]\n", "            pass\n"),
    Mutant("kv/prefix.py", "        self._note(entry.key, is_stored=False)\n", ""),
    Mutant("kv/prefix.py", "                self._note(inner, is_stored=False)\n", ""),
    Mutant("kv/prefix.py", "            del self._pending[identity]  # undone", "            pass  # undone"),
    Mutant("kv/prefix.py", "            self.resync_needed = True\n", ""),
    Mutant(
        "kv/prefix.py",
        "                low = middle\n            else:\n                high = middle - 1",
        "                low = middle\n            else:\n                high = middle - 2",
    ),
    Mutant(
        "kv/prefix.py",
        "full = min(len(identities) // self._span, len(blocks))",
        "full = min(-(-len(identities) // self._span), len(blocks))",
    ),
]

_NAMES = [
    Mutant("kv/block.py", "            self.weights_fingerprint,\n", ""),
    Mutant("kv/block.py", "            self.isolation_domain.encode(),\n", ""),
    Mutant("kv/block.py", "            self.numerics_class,\n", ""),
    Mutant("kv/block.py", "            self.adapter,\n", ""),
    Mutant("kv/block.py", "            self.extra,\n", ""),
    Mutant("kv/block.py", 'hasher.update(len(part).to_bytes(4, "little") + part)', "hasher.update(part)"),
    Mutant("kv/block.py", "link = blake2b(link + data,", "link = blake2b(root + data,"),
    Mutant(
        "kv/block.py",
        "range(start, len(token_ids) - HASH_BLOCK_TOKENS + 1, HASH_BLOCK_TOKENS)",
        "range(start, len(token_ids), HASH_BLOCK_TOKENS)",
    ),
    Mutant(
        "kv/keys.py",
        "self.weights_fingerprint, self.numerics_class, adapter)",
        "self.weights_fingerprint, self.numerics_class)",
    ),
]

# ------------------------------------------------------------------ the hand-over

_HANDOVER = [
    Mutant("kv/handover.py", "        if label.epoch < mine.epoch:\n", "        if False:\n"),
    Mutant("kv/handover.py", "or label.epoch > mine.epoch:", "or label.epoch < mine.epoch:"),
    Mutant(
        "kv/handover.py", "        if sequence > self._received + 1:\n", "        if sequence > self._received + 2:\n"
    ),
    Mutant(
        "kv/handover.py",
        "        self.heard_s = now_s\n        self.counters.messages_received",
        "        self.counters.messages_received",
    ),
    Mutant("kv/handover.py", "        self.said_s = now_s\n        self.counters", "        self.counters"),
    Mutant("kv/handover.py", "        if now_s >= self.deadline_s:\n            return End.DEADLINE\n", ""),
    Mutant(
        "kv/handover_receiver.py",
        "if any(self._units[unit] != _MISSING for unit in self._range(frame.token_start, frame.token_count)):",
        "if False:",
    ),
    Mutant(
        "kv/handover_receiver.py",
        "        if len(self._writing) >= self._order.frame_slots:\n",
        "        if len(self._writing) > self._order.frame_slots:\n",
    ),
    Mutant("kv/handover_receiver.py", "            or frame.token_start < self._order.held_tokens\n", ""),
    Mutant("kv/handover_receiver.py", "        if end > self._num_tokens or (", "        if ("),
    Mutant("kv/handover_receiver.py", "        self._awaited.difference_update(units)\n", ""),
    Mutant("kv/handover_receiver.py", "            self._damaged[unit] += 1\n", "            pass\n"),
    Mutant("kv/handover_receiver.py", "        if done.num_frames != self.counters.frames:\n", "        if False:\n"),
    Mutant(
        "kv/handover_receiver.py",
        "if self.state is ReceiverState.STORING and self._stored_units == len(self._units):",
        "if self.state is ReceiverState.STORING:",
    ),
    Mutant("kv/handover_receiver.py", "self._is_done and self._has_all():", "self._is_done:"),
    Mutant(
        "kv/handover_receiver.py", "lost = Lost(reason, self.stored_upto,", "lost = Lost(reason, self.verified_upto,"
    ),
    Mutant(
        "kv/handover_receiver.py",
        "        while leading < len(self._units) and self._units[leading] >= at_least:\n            leading += 1\n",
        "        if leading < len(self._units) and self._units[leading] >= at_least:\n            leading += 1\n",
    ),
    Mutant(
        "kv/handover_receiver.py",
        "        return [self._send(pb.SlotFree(count=1), now_s)]\n\n    def cancel",
        "        return []\n\n    def cancel",
    ),
    Mutant(
        "kv/handover_sender.py",
        "while len(self._reading) + self._unfreed < self._slots:",
        "while len(self._reading) < self._slots:",
    ),
    Mutant(
        "kv/handover_sender.py",
        "            if self._again:\n                start, count = self._again.popleft()\n            elif",
        "            if",
    ),
    Mutant(
        "kv/handover_sender.py",
        "        if any(self._times_refetched[unit] >= MAX_REFETCHES for unit in units):",
        "        if False:",
    ),
    Mutant("kv/handover_sender.py", "        if not 0 < count <= self._unfreed:\n", "        if not 0 < count:\n"),
    Mutant("kv/handover_sender.py", "        self._verified = upto\n", "        self._verified = self._next\n"),
    Mutant(
        "kv/handover_sender.py",
        "        if self.state is not SenderState.DONE or self._verified < self._num_tokens:\n",
        "        if self.state is not SenderState.DONE:\n",
    ),
    Mutant(
        "kv/handover_sender.py",
        "        self._sealed = max(self._sealed, num_computed)\n",
        "        self._sealed = num_computed + 1\n",
    ),
    Mutant(
        "kv/handover_sender.py",
        "return [*said, Abort(reason, detail), Close(now=True)]",
        "return [*said, Close(now=True)]",
    ),
    Mutant(
        "kv/handover_sender.py",
        "is_all_sent = self._next == self._num_tokens and not self._reading and not self._again",
        "is_all_sent = self._next == self._num_tokens and not self._reading",
    ),
]

# ------------------------------------------------------------------ the engine

_ENGINE = [
    Mutant(
        "model/schedule.py",
        "        self._promise(sequence, 0)\n        self.holdings.release(sequence)\n        del",
        "        self.holdings.release(sequence)\n        del",
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

# ------------------------------------------------------------------ the router

_ROUTER = [
    Mutant("router/delivery.py", "            self._choices[index].epoch = epoch\n", "            pass\n"),
    Mutant("router/delivery.py", "            self._choices[index].epoch = None\n", "            pass\n"),
    Mutant(
        "router/delivery.py",
        "return Verdict.REPEATED if first_index < progress.next_index else Verdict.GAP",
        "return Verdict.REPEATED",
    ),
    Mutant(
        "router/delivery.py",
        "        return all(progress.next_index == 0",
        "        return any(progress.next_index == 0",
    ),
    Mutant(
        "router/delivery.py",
        "                if self._pieces[index].choice == piece.choice:\n",
        "                if True:\n",
    ),
    Mutant("router/run.py", "            if missing > 0:\n", "            if False:\n"),
    Mutant("router/admission.py", "        self.tokens -= offer.tokens\n", ""),
    Mutant("router/admission.py", "        self._share_by_tenant[offer.tenant] -= self._size(offer)\n", ""),
    Mutant("router/admission.py", "        self._retry_tokens -= 1.0\n", ""),
    Mutant(
        "router/admission.py",
        "            self.accepted -= 1\n            self.cancelled += 1\n",
        "            self.cancelled += 1\n",
    ),
    Mutant("router/admission.py", "if tenants > 1 and own and fill", "if own and fill"),
    Mutant(
        "router/prefixes.py",
        "                self._clear(identity, slot.bit)\n        self._store(slot, stored)\n",
        "        self._store(slot, stored)\n",
    ),
    Mutant("router/prefixes.py", "if slot.in_snapshot or sequence != slot.sequence + 1 or", "if slot.in_snapshot or"),
    Mutant("router/prefixes.py", "            self._live &= ~slot.bit\n            slot.died", "            slot.died"),
    Mutant("router/prefixes.py", "                    groups.append((mask ^ holders, low, middle - 1))\n", ""),
    Mutant(
        "router/prefixes.py",
        "            self._generation >= self._swept[0].died_in_generation + 2 or",
        "            self._generation >= self._swept[0].died_in_generation or",
    ),
    Mutant("router/policy.py", "        if p.numerics == d.numerics\n", ""),
    Mutant("router/policy.py", "if home.role is Role.COMBINED or limits.local_prefill]", "if True]"),
    Mutant("router/policy.py", "uncached = request.prompt_tokens - held\n", "uncached = request.prompt_tokens\n"),
    Mutant(
        "router/policy.py",
        "return min(equal, key=lambda c: (c.in_flight,",
        "return min(equal, key=lambda c: (-c.in_flight,",
    ),
    Mutant("router/fleet.py", "            return []  # a zombie of an earlier life\n", "            pass\n"),
    Mutant(
        "router/fleet.py",
        "        worker.in_flight.clear()\n        return [FleetChange(Change.LOST",
        "        return [FleetChange(Change.LOST",
    ),
    Mutant("router/fleet.py", "            worker.in_flight.pop(key, None)\n", "            pass\n"),
    Mutant("router/fleet.py", "and w.state is WorkerState.LIVE]", "and w.session_up]"),
    Mutant("router/fleet.py", "            worker.draining = worker.draining or load.draining\n", ""),
]

# ------------------------------------------------------------------ text, members

_OTHERS = [
    Mutant("text/stop.py", "            end, start = min(ends)\n", "            end, start = max(ends)\n"),
    Mutant(
        "text/stop.py", "range(min(len(text), len(stop) - 1), 0, -1)", "range(min(len(text), len(stop) - 2), 0, -1)"
    ),
    Mutant("text/stop.py", "seen.find(stop, max(0, num_old - len(stop) + 1))", "seen.find(stop, max(0, num_old))"),
    Mutant(
        "decode_worker/choice.py",
        "        for token_id in token_ids[start - first_index :]:\n",
        "        for token_id in token_ids:\n",
    ),
    Mutant("decode_worker/choice.py", "        if first_index > self.num_tokens:\n", "        if False:\n"),
    Mutant("decode_worker/outbox.py", "        self._room.set()\n        return output", "        return output"),
    Mutant(
        "cluster/membership.py",
        "        member.failures = 1 if healthy else member.failures + 1\n",
        "        member.failures = 1\n",
    ),
    Mutant("cluster/membership.py", "        if member.standing is Standing.STOPPED:\n            return None\n", ""),
    Mutant(
        "cluster/membership.py",
        "is_overdue = now_s - member.missing_since_s > self.patience.missing_s",
        "is_overdue = False",
    ),
    Mutant("cluster/membership.py", "                member.since_s, member.missing_since_s = now_s, None\n", ""),
]

MUTANTS = [*_POOL, *_PREFIX, *_NAMES, *_HANDOVER, *_ENGINE, *_ROUTER, *_OTHERS]
