"""Mutants that reviews invented: edges of blocks, stale values, waits without an end, what a key leaves out."""

from __future__ import annotations

from mutant import Mutant

_WINDOWS = "kv/windows.py"
_SENDER, _RECEIVER = "kv/handover/sender.py", "kv/handover/receiver.py"
_FETCHING = "kv/handover/fetching.py"
_ACCEPTED, _MADE = "prefill_worker/paired_peers.py", "decode_worker/paired_peers.py"
_MAKES = "decode_worker/pairs.py"
_PULL = "decode_worker/pull.py"
_HOLDINGS = "engine/speculation/draft_model/holdings.py"
_PLANNER = "engine/speculation/draft_model/planner.py"
_CATCH_UP = "engine/speculation/draft_model/catch_up.py"
_SPECULATION = "engine/speculation/speculation.py"
_GUARD = "engine/guard/machine.py"
_JOURNALING, _COPIES = "decode_worker/journaling.py", "worker/blocks/copies.py"
_SERVED = "worker/blocks/fetch.py"
_RAY, _ARGUMENTS = "cluster/launch/ray_session.py", "cli/arguments.py"
_FORMS, _OBJECTS = "text/parsing/call_forms.py", "cluster/kubernetes/objects.py"
_SCRAPE, _SCALER = "worker/scrape.py", "cluster/operations/scaler.py"

MUTANTS = [
    # Windowed layers: the edges between tokens with and without them.
    Mutant(_WINDOWS, "first_needed(windowed, num_tokens - 1)", "first_needed(windowed, num_tokens)"),
    Mutant(_WINDOWS, "        held = missing - missing % step", "        held = missing"),
    Mutant(_WINDOWS, "    edges = [-1, *left_out", "    edges = [0, *left_out"),
    Mutant(_WINDOWS, "<= first < s.layer_start + s.layer_count for", "<= first <= s.layer_start + s.layer_count for"),
    Mutant(
        _SENDER,
        "token_start + token_count <= self.order.windows_from",
        "token_start < self.order.windows_from",
        "no frame has tokens on both sides of it (`_frame_tokens`)",
    ),
    Mutant(_SENDER, "        if not slots <= self._unfreed_slots or len", "        if len"),
    Mutant(_RECEIVER, "            if not self._order.pair:\n", "            if False:\n"),
    Mutant(
        _RECEIVER,
        "usable(self._tokens(self._stored_units), order.held_tokens, order.windows_from, self._num_tokens)",
        "self._tokens(self._stored_units)",
    ),
    Mutant(_FETCHING, "            self._writing.clear()  # the", "            pass  # the"),
    Mutant(_SERVED, "max(0, first - start) // HASH_BLOCK_TOKENS", "max(0, first) // HASH_BLOCK_TOKENS"),
    # Paired channels: memory and numbers that are given back, and waits that end.
    Mutant(_ACCEPTED, "        del self._sizes[hello.number]\n", "        pass\n"),
    Mutant(_ACCEPTED, "hello.number in self._sizes:", "hello.number in self._ends:"),
    Mutant(_ACCEPTED, "        self._sizes[hello.number] = hello.slots * hello.slot_bytes\n", ""),
    Mutant(_ACCEPTED, "        if self._has_certificates and", "        if False and"),
    Mutant(_MADE, "        known.retry_at_s = self._clock.now_s() + self._retry_s\n", ""),
    Mutant(_MAKES, "        async with asyncio.timeout(HELLO_S):\n", "        async with asyncio.timeout(None):\n"),
    Mutant(_MADE, "        if self.num_channels >= self._max_channels:\n", "        if False:\n"),
    Mutant(_PULL, "            self._give_back_ring(is_orderly=True)  # the", "            pass  # the"),
    Mutant(_PULL, "has_failed=is_wrong and self.receiver.transport == SHM", "has_failed=is_wrong"),
    # A draft model: what is stale after a release, and what counts against a bound.
    Mutant(_HOLDINGS, "            proposer.blocks, proposer.guessed = [], ()\n", "            proposer.blocks = []\n"),
    Mutant(
        _HOLDINGS,
        "            proposer.num_computed = proposer.num_published = 0\n",
        "            proposer.num_computed = 0\n",
    ),
    Mutant(_HOLDINGS, "                return False\n", "                return True\n"),
    Mutant(_PLANNER, "if most <= 0 or proposer.is_off or not", "if most <= 0 or not"),
    Mutant(_PLANNER, "        if lacking in begun:\n", "        if False:\n"),
    Mutant(_CATCH_UP, "_FADE * known + (1 - _FADE) * new", "(1 - _FADE) * known + _FADE * new"),
    Mutant(_CATCH_UP, "        new = took_ms / num_tokens\n", "        new = took_ms\n"),
    Mutant(_SPECULATION, "                rows -= most\n", "                pass\n"),
    # A prompt that waits for another one's prefix: only for what will be there.
    Mutant("engine/scheduler.py", "        if not prefix.enabled:\n            return False\n", ""),
    Mutant("engine/scheduler.py", ".values() if work.num_computed < end]", ".values()]"),
    # The guard of the cache's codec.
    Mutant(_GUARD, "min(self._allowed_s + since_s * self._limits.busy_share, MOST_SAVED_S)", "MOST_SAVED_S"),
    Mutant(_GUARD, "            self.num_dropped += 1\n        self._samples", "        self._samples"),
    Mutant(
        _GUARD, "        self._forget_current()\n        self.num_dropped += 1\n", "        self.num_dropped += 1\n"
    ),
    Mutant("engine/loop.py", " and not command.adapter_slot:", ":"),
    # Copies and their journal: whose blocks they are, and when a wait ends.
    Mutant(_JOURNALING, "            **scope_to_wire(order.scope),\n", ""),
    Mutant(_JOURNALING, "            identity_root=order.prompt.names.root,\n", ""),
    Mutant(_COPIES, "                deadline_s=self._deadline_s,\n", ""),
    Mutant(_COPIES, "                priority=self._priority,\n", ""),
    Mutant(_COPIES, "facts.namer.name(token_ids, scope)", 'facts.namer.name(token_ids, CacheScope("", b""))'),
    Mutant("decode_worker/fetch.py", "                    **scope_to_wire(self._order.scope),\n", ""),
    Mutant("engine/link/draining.py", "        self._undone = asyncio.Event()\n\n", "\n"),
    Mutant("engine/link/draining.py", "        self._undone.set()\n        self._undone = asyncio.Event()\n", ""),
    Mutant("engine/link/draining.py", "asyncio.wait(waits, timeout=timeout_s, ", "asyncio.wait(waits, "),
    # What starts, scales and stops a cluster.
    Mutant(_RAY, "self._before = self._before or before_token", "self._before = before_token"),
    Mutant(_RAY, "                    shutil.rmtree(folder, ignore_errors=True)\n", ""),
    Mutant(_RAY, " or _TOO_SLOW not in str(error):", ":"),
    Mutant(_SCALER, "now_s - each[1] > self._config.start_timeout_s]", "now_s - each[1] > 1000 * LOOK_S]"),
    Mutant(_SCALER, "                await self._changes.withdraw(name)\n", ""),
    Mutant("cluster/operations/departures.py", "        if departure is None:\n", "        if False:\n"),
    Mutant(_OBJECTS, '"metadata": {"resourceVersion": version}, ', ""),
    # Doors and words.
    Mutant("router/api/http/page.py", "origin=escape(origin)", "origin=origin"),
    Mutant("router/api/http/page.py", ', headers={"content-security-policy": _POLICY}', ""),
    Mutant(_SCRAPE, "                if len(self._open) >= MAX_CONNECTIONS:\n", "                if False:\n"),
    Mutant(_SCRAPE, "            async with asyncio.timeout(self._exchange_s):\n", "            if True:\n"),
    Mutant(_SCRAPE, "                task.add_done_callback(self._open.discard)\n", ""),
    Mutant(_ARGUMENTS, '"k": 10**3,', '"k": 2**10,'),
    Mutant(_ARGUMENTS, 'takes_more = argument == "--lora-modules"', "takes_more = True"),
    Mutant(_FORMS, 'f"({member})" if key in required else f"({member})?"', 'f"({member})?"'),
    Mutant(_FORMS, "){'+' if parallel else ''}", ")+"),
    Mutant(_FORMS, 'schema.get("type") == "string" and schema.keys() <= _WORDS_OF_TEXT', "True"),
    Mutant(_FORMS, '"additionalProperties": False} if given', '"type": "object"} if given'),
]
