"""Bugs of fetches between workers: blocks that go along with a stream, and a draining worker that waits for them."""

from mutant import Mutant

FETCHING = "kv/handover/fetching.py"
POLICY = "router/routing/policy.py"

MUTANTS = [
    Mutant(FETCHING, "        if not frame.is_intact:\n", "        if False:\n"),
    Mutant(FETCHING, "or frame.sequence <= self._num_frames:\n", "or False:\n"),
    Mutant(FETCHING, "        if frame.token_start != self._taken_upto:\n", "        if False:\n"),
    Mutant(
        FETCHING,
        "        if frame.identities != self.wanted.identities[first : first + count]:\n",
        "        if False:\n",
    ),
    Mutant(
        FETCHING, "if self.end is None or self._writing or self.is_over:\n", "if self.end is None or self.is_over:\n"
    ),
    Mutant(FETCHING, "self._writing[0][0] if self._writing else self._taken_upto", "self._taken_upto"),
    Mutant(
        FETCHING,
        "        self._heard_s = now_s\n        fault = ",
        "        fault = ",
    ),
    Mutant(FETCHING, "        elif frame.is_last:\n", "        elif False:\n"),
    Mutant("decode_worker/sources.py", "identities[: (num_tokens - 1) // HASH_BLOCK_TOKENS]", "identities[:]"),
    Mutant("decode_worker/sources.py", "            self._has_asked_again = True\n", ""),
    Mutant("decode_worker/task.py", "            self._sources.ended(fetched.end)\n", ""),
    Mutant("decode_worker/task.py", "            self._held_tokens = fetched.stored_upto\n", ""),
    Mutant("decode_worker/task.py", "self.told.tokens_fetched and left < MOST_LEFT_TOKENS", "False"),
    Mutant("decode_worker/fetch.py", "        self._carrier.do(self.fetch.cancel())\n", "        pass\n"),
    Mutant("worker/blocks/departure.py", "        if is_whole:\n", "        if True:\n"),
    Mutant("worker/blocks/departure.py", "        if not self._running[key]:\n", "        if True:\n"),
    Mutant("worker/blocks/departure.py", "        if self._running:\n", "        if False:\n"),
    Mutant("worker/blocks/departure.py", "max(kept_s, grace_s * MOVE_SHARE)", "grace_s"),
    Mutant("worker/blocks/fetch.py", "        self._is_over = found.num_blocks < len(part.identities)\n", ""),
    Mutant("router/requests/choosing.py", "if w.can_give and held.get(", "if held.get("),
    Mutant(
        "router/requests/choosing.py", "        if not (run.dispatches or run.has_output):\n", "        if False:\n"
    ),
    Mutant("router/requests/orders.py", "            sources = choice.winner.sources\n", "            sources = ()\n"),
    Mutant(
        POLICY, "if s.view.key != decode.key and why_refused(s.view, decode) is None]", "if s.view.key != decode.key]"
    ),
    Mutant(POLICY, "        if held <= own.held or not (", "        if not ("),
    Mutant(POLICY, "seconds = (held - own.held) * decode", "seconds = held * decode"),
    Mutant(POLICY, "    if winner.prefill is None and not winner.sources:\n", "    if winner.prefill is None:\n"),
    Mutant("decode_worker/journal.py", "(num_tokens - 1) // self._block_tokens", "num_tokens // self._block_tokens"),
    Mutant("decode_worker/journal.py", "        if self._room <= 0 or sum(", "        if sum("),
    Mutant("decode_worker/journal.py", "        run.is_offered = True\n", ""),
    Mutant("decode_worker/journal.py", "        key = max(due, key=", "        key = min(due, key="),
    Mutant("decode_worker/journal.py", "self._limits.retry_s * 2**run.num_refused", "self._limits.retry_s"),
    Mutant("decode_worker/journal.py", "        run.kept = min(kept_tokens, run.full)\n", ""),
    Mutant("decode_worker/journal.py", "kept_tokens - kept_tokens % self._block_tokens", "0"),
    Mutant(
        "worker/blocks/keeping.py",
        "    left = load.free_blocks - load.promised_blocks - num_blocks\n",
        "    left = load.free_blocks - num_blocks\n",
    ),
    Mutant("worker/blocks/keeping.py", "    if num_keeping >= MAX_KEEPING:\n", "    if num_keeping > MAX_KEEPING:\n"),
    Mutant(
        "worker/blocks/keep.py",
        "        self._is_whole = fetched.end == FetchEnd.COMPLETE\n",
        "        self._is_whole = True\n",
    ),
    Mutant("worker/blocks/keep.py", "        if copied.names.root != identity_root:\n", "        if False:\n"),
    Mutant("router/routing/buddies.py", "    if choice.winner.computes in fitting:\n", "    if False:\n"),
    Mutant("router/routing/buddies.py", "if w.key != decode.key and KEEPS", "if KEEPS"),
    Mutant("router/routing/buddies.py", "(held.get(w.worker_id, 0), w.free_kv_tokens,", "(w.free_kv_tokens,"),
]
