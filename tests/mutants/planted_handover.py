"""Mutants of the hand-over: both machines, their carrier and the bytes."""

from __future__ import annotations

from mutant import Mutant

_HANDOVER = [
    Mutant("kv/handover/machine.py", "        if label.epoch < mine.epoch:\n", "        if False:\n"),
    Mutant("kv/handover/machine.py", "or label.epoch > mine.epoch:", "or label.epoch < mine.epoch:"),
    Mutant(
        "kv/handover/machine.py",
        "        if sequence > self._received + 1:\n",
        "        if sequence > self._received + 2:\n",
    ),
    Mutant(
        "kv/handover/machine.py",
        "        self.heard_s = now_s\n        self.counters.messages_received",
        "        self.counters.messages_received",
    ),
    Mutant("kv/handover/machine.py", "        self.said_s = now_s\n        self.counters", "        self.counters"),
    Mutant(
        "kv/handover/machine.py", "        if now_s >= self.deadline_s:\n            return HandoverEnd.DEADLINE\n", ""
    ),
    Mutant(
        "kv/handover/receiver.py",
        "if any(self._units[unit] != _MISSING for unit in self._range(frame.token_start, frame.token_count)):",
        "if False:",
    ),
    Mutant(
        "kv/handover/receiver.py",
        "        if len(self._writing) + len(self._unsaid_free) >= self._order.frame_slots:\n",
        "        if len(self._writing) + len(self._unsaid_free) > self._order.frame_slots:\n",
    ),
    Mutant("kv/handover/receiver.py", "            or frame.token_start < self._order.held_tokens\n", ""),
    Mutant("kv/handover/receiver.py", "        if end > self._num_tokens or (", "        if ("),
    Mutant(
        "kv/handover/receiver.py",
        "        self._awaited.difference_update(units)\n",
        "",
        survives="only blocks that are missing are looked up there, and what came is missing no more",
    ),
    Mutant("kv/handover/receiver.py", "            self._damaged[unit] += 1\n", "            pass\n"),
    Mutant("kv/handover/receiver.py", "        if done.num_frames != self.counters.frames:\n", "        if False:\n"),
    Mutant(
        "kv/handover/receiver.py",
        "if self.state is ReceiverState.STORING and self._stored_units == len(self._units):",
        "if self.state is ReceiverState.STORING:",
    ),
    Mutant("kv/handover/receiver.py", "self._is_done and self._has_all():", "self._is_done:"),
    Mutant(
        "kv/handover/receiver.py", "lost = Lost(reason, self.stored_upto,", "lost = Lost(reason, self.verified_upto,"
    ),
    Mutant(
        "kv/handover/receiver.py",
        "        while leading < len(self._units) and self._units[leading] >= at_least:\n            leading += 1\n",
        "        if leading < len(self._units) and self._units[leading] >= at_least:\n            leading += 1\n",
    ),
    Mutant(
        "kv/handover/receiver.py",
        "        return self._say_free(now_s) if is_due else []\n\n    def cancel",
        "        return []\n\n    def cancel",
    ),
    Mutant(
        "kv/handover/sender.py",
        "while len(self._reading) + self._unfreed < self._slots:",
        "while len(self._reading) < self._slots:",
    ),
    Mutant(
        "kv/handover/sender.py",
        "            if self._again:\n                start, count = self._again.popleft()\n            elif",
        "            if",
    ),
    Mutant(
        "kv/handover/sender.py",
        "        if any(self._times_refetched[unit] >= MAX_REFETCHES for unit in units):",
        "        if False:",
    ),
    Mutant("kv/handover/sender.py", "        if not 0 < count <= self._unfreed:\n", "        if not 0 < count:\n"),
    Mutant("kv/handover/sender.py", "        self._verified = upto\n", "        self._verified = self._next\n"),
    Mutant(
        "kv/handover/sender.py",
        "        if self.state is not SenderState.DONE or self._verified < self._num_tokens:\n",
        "        if self.state is not SenderState.DONE:\n",
    ),
    Mutant(
        "kv/handover/sender.py",
        "        self._sealed = max(self._sealed, num_computed)\n",
        "        self._sealed = num_computed + 1\n",
    ),
    Mutant(
        "kv/handover/sender.py",
        "return [*said, Abort(reason, detail), Close(now=True)]",
        "return [*said, Close(now=True)]",
    ),
    Mutant(
        "kv/handover/sender.py",
        "is_all_sent = self._next == self._num_tokens and not self._reading and not self._again",
        "is_all_sent = self._next == self._num_tokens and not self._reading",
    ),
]

_ENDS = [
    Mutant(
        "kv/handover/receiver.py",
        "attempt = max(self._damaged[unit] for unit in units)",
        "attempt = min(self._damaged[unit] for unit in units)",
    ),
    Mutant(
        "decode_worker/pull.py",
        "                self._give_back(has_failed=is_wrong and self.receiver.transport == SHM)\n"
        "                self._owner.pull_lost(action)\n",
        "                self._owner.pull_lost(action)\n"
        "                self._give_back(has_failed=is_wrong and self.receiver.transport == SHM)\n",
    ),
]

_CARRIED = [
    Mutant("kv/handover/carrier.py", "        self.rearm()\n\n    def rearm", "\n    def rearm"),
    Mutant("kv/handover/carrier.py", "        if self._is_doing:\n            return\n", ""),
    Mutant("kv/handover/carrier.py", "return bool(self._pending)\n", "return False\n"),
    Mutant("kv/handover/driver.py", "            answered(check.holds())\n", "            answered(True)\n"),
    Mutant("kv/handover/driver.py", "error is None and future.result())\n", "error is None)\n"),
    Mutant(
        "kv/handover/driver.py",
        "answered(error is None and future.result())\n\n\nclass",
        "answered(error is not None or future.result())\n\n\nclass",
    ),
    Mutant("kv/handover/driver.py", "            answered(False)\n", "            answered(True)\n"),
    Mutant("kv/handover/driver.py", "        self._hear(None)\n", ""),
    Mutant(
        "kv/handover/driver.py",
        "        while len(self._checks) >= MAX_CHECKS:\n",
        "        while False:\n",
    ),
    Mutant(
        "kv/handover/driver.py",
        "        if not self._closing.is_set():\n            self._queue",
        "        if True:\n            self._queue",
        survives="a machine that has closed says nothing more",
    ),
    Mutant("kv/handover/driver.py", "        await self._client.finish()\n", ""),
    Mutant("kv/handover/driver.py", "            self._client.close()\n", "            pass\n"),
]

_BYTES = [
    Mutant(
        "kv/handover/frames.py",
        "    if zlib.crc32(body, zlib.crc32(envelope[: _HEAD.size])) != _CRC.unpack_from(envelope, _HEAD.size)[0]:\n",
        "    if False:\n",
    ),
    Mutant("kv/handover/frames.py", "zlib.crc32(body, zlib.crc32(envelope[: _HEAD.size])) !=", "zlib.crc32(body) !="),
    Mutant("kv/handover/frames.py", "    if end != len(envelope):\n", "    if False:\n"),
    Mutant("kv/handover/frames.py", "    _check_overlap(sections)\n", ""),
    Mutant(
        "kv/handover/frames.py",
        "            if one.layer_start + one.layer_count <= other.layer_start:\n",
        "            if one.layer_start < other.layer_start:\n",
    ),
    Mutant(
        "kv/handover/frames.py",
        "if same_layers and one.head_start + one.head_count <= other.head_start:",
        "if same_layers:",
    ),
    Mutant("kv/handover/frames.py", "    _check_layout(extents, len(planes))\n", ""),
    Mutant("kv/handover/frames.py", "        if offset != end + -end % _ALIGN:\n", "        if offset % _ALIGN:\n"),
    Mutant("kv/handover/frames.py", "    if end != num_bytes:\n", "    if False:\n"),
    Mutant("kv/handover/damage.py", "not covers(frame.sections, spec, without_windows=may_lack)", "False"),
    Mutant(
        "kv/handover/damage.py", "        bad |= (found != section.digests)", "        bad = (found != section.digests)"
    ),
    Mutant(
        "kv/handover/damage.py",
        "            blocks = np.arange(first, first + len(bad), dtype=np.uint64)\n",
        "            blocks = np.arange(len(bad), dtype=np.uint64)\n",
    ),
    Mutant("kv/handover/damage.py", "    heads = head_start + np.arange", "    heads = np.arange"),
    Mutant("kv/handover/damage.py", "            return [(token_start, token_count)]\n", "            continue\n"),
    Mutant("kv/handover/damage.py", "    return not any(missing.values())\n", "    return True\n"),
    Mutant(
        "kv/handover/damage.py",
        "any(missing.values())",
        "all(missing.values())",
    ),
    Mutant("kv/handover/damage.py", "        if not fits_layers or not fits_heads:\n", "        if not fits_layers:\n"),
    Mutant(
        "kv/handover/damage.py",
        "        if section.row_bytes != payload_bytes(Codec(section.codec), component.width):\n",
        "        if False:\n",
    ),
    Mutant(
        "kv/handover/frames.py", "    if len(section.digests) != layers * heads * _units(tokens):\n", "    if False:\n"
    ),
    Mutant(
        "kv/handover/frames.py", "    if len(header.identities) > tokens // HASH_BLOCK_TOKENS:\n", "    if False:\n"
    ),
    Mutant("kv/handover/damage.py", "min(end, stop) - start", "end - start"),
]

_PULLED = [
    Mutant(
        "decode_worker/pull.py",
        "        if isinstance(received, handover_pb2.HandoverUp):\n",
        "        if False:\n",
    ),
    Mutant(
        "decode_worker/pull.py",
        "if arrival.envelope is None or self.receiver.is_over:\n            self._carrier",
        "if False:\n            self._carrier",
    ),
    Mutant(
        "decode_worker/pull.py",
        "verify_frame, frame, tools.digest_key, tools.kv_spec, self.receiver.windows_from)",
        "verify_frame, frame, tools.digest_key)",
    ),
    Mutant(
        "decode_worker/pull.py",
        "partial(verify_frame, frame, tools.digest_key, tools.kv_spec, self.receiver.windows_from)",
        "partial(bool, 1)",
    ),
    Mutant("decode_worker/pull.py", '            self._tools.counters["kv_corrupted_frames"] += 1\n', ""),
    Mutant(
        "decode_worker/pull.py",
        "                self.refetched_blocks += -(-message.refetch.token_count // HASH_BLOCK_TOKENS)\n",
        "                self.refetched_blocks += 1\n",
    ),
    Mutant("decode_worker/pull.py", "            self._carrier.do(self.receiver.garbled(now_s, str(error)))\n", ""),
    Mutant("decode_worker/pull.py", "                self._owner.pull_lost(action)\n", "                pass\n"),
    Mutant(
        "prefill_worker/task.py",
        "        holds = partial(verify_sections, sections, *place, self._tools.digest_key)\n",
        "        holds = partial(bool, 1)\n",
    ),
    Mutant(
        "prefill_worker/task.py",
        "        if self._mismatches[place] < MAX_READS:\n",
        "        if self._mismatches[place] <= MAX_READS:\n",
    ),
    Mutant("prefill_worker/task.py", "        self._mismatches[place] += 1\n", ""),
    Mutant("prefill_worker/task.py", "                if self._is_live:\n", "                if not self._is_live:\n"),
    Mutant(
        "prefill_worker/task.py",
        "            self._carrier.do(self.sender.closed(now_s))\n            return\n",
        "            return\n",
    ),
    Mutant(
        "prefill_worker/task.py", "        self._carrier.do(self.sender.closed(self._host.now_s()))\n", "        pass\n"
    ),
    Mutant(
        "prefill_worker/task.py",
        "                self._carrier.do(self.sender.failed(error_to_wire(_why(event)), now_s))\n",
        "",
    ),
    Mutant("prefill_worker/task.py", "                send(link.Release(self.key))\n", "                pass\n"),
    Mutant("kv/handover/plane_channel.py", "if is_orderly:", "if True:"),
    Mutant("kv/handover/plane_channel.py", "if other == peer]", "if other]"),
    Mutant("kv/handover/transports/shared_memory.py", "if ring.nonce != offer.nonce:", "if False:"),
    Mutant("prefill_worker/service.py", "        if order.identity_root != names.root:\n", "        if False:\n"),
    Mutant("prefill_worker/service.py", "        if self._role() is Role.COMBINED:\n", "        if False:\n"),
    Mutant(
        "prefill_worker/service.py",
        "        if len(self._jobs) >= self._max_streams:\n",
        "        if len(self._jobs) > self._max_streams:\n",
    ),
    Mutant("prefill_worker/service.py", "                self.leave(job)\n", "                pass\n"),
    Mutant("prefill_worker/service.py", "        job.leave()\n", ""),
    Mutant("kv/handover/pairing.py", "if mine and theirs and mine.isdisjoint(theirs):", "if False:"),
    Mutant("kv/handover/pairing.py", "    if unread:\n", "    if False:\n"),
    Mutant("kv/handover/shards.py", "least = min(ranks, key=lambda rank: loads[rank])", "least = ranks[0]"),
    Mutant("prefill_worker/service.py", "            num_emitted=order.emitted_tokens,\n", ""),
    Mutant("prefill_worker/service.py", 'f"{label.request_id}/p{self._count}"', 'f"{label.request_id}/p"'),
    Mutant(
        "prefill_worker/service.py", "if (order.deterministic or model.deterministic) and", "if order.deterministic and"
    ),
    Mutant("prefill_worker/service.py", "        if refused is not None:\n            raise refused\n", ""),
    Mutant(
        "prefill_worker/service.py",
        "        if self.is_draining:\n            raise",
        "        if False:\n            raise",
    ),
    Mutant("prefill_worker/service.py", "return self.cancel_all() if await", "return 0 if await"),
    Mutant("prefill_worker/service.py", "            deadline_s=now_s + order.timeout_ms / 1000,\n", ""),
    Mutant(
        "prefill_worker/service.py",
        "scope_from_wire(order)",
        "scope_from_wire(handover_pb2.Open())",
    ),
]

MUTANTS = [*_HANDOVER, *_ENDS, *_CARRIED, *_BYTES, *_PULLED]
