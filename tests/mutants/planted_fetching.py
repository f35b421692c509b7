"""Bugs of fetches between workers: blocks that go along with a stream, and a draining worker that waits for them."""

from mutant import Mutant

FETCHING = "kv/handover/fetching.py"
FETCH, DEPARTING = "decode_worker/fetch.py", "worker/blocks/departing.py"
POLICY = "router/routing/policy.py"
COSTS = "router/routing/costs.py"

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
    Mutant(FETCHING, "frame.token_count % HASH_BLOCK_TOKENS or ", ""),
    Mutant(FETCHING, "not in (FetchEnd.COMPLETE, FetchEnd.SHORT)", "is not FetchEnd.COMPLETE"),
    Mutant(FETCH, "num_writing >= MAX_WRITING and self.fetch.end is None", "num_writing >= MAX_WRITING"),
    Mutant(FETCH, "(stored_upto - self.fetch.wanted.first_token) // HASH", "stored_upto // HASH"),
    Mutant(FETCH, "            self._carrier.do(self.fetch.closed())\n", ""),
    Mutant(FETCH, "self._host.close(now=now)", "self._host.close(now=True)"),
    Mutant(DEPARTING, "            self._changed.clear()\n", ""),
    Mutant(DEPARTING, "min(until_s, end_s) - now_s", "until_s - now_s"),
    Mutant(DEPARTING, "is_whole=is_whole)\n        self._changed.set()\n", "is_whole=is_whole)\n"),
    Mutant("worker/blocks/fetch.py", "fetch_ended(key, is_whole=is_whole)", "fetch_ended(key, is_whole=True)"),
    Mutant("kv/handover/sources.py", "identities[: (num_tokens - 1) // HASH_BLOCK_TOKENS]", "identities[:]"),
    Mutant("kv/handover/sources.py", "            self._has_asked_again = True\n", ""),
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
        "router/requests/state.py",
        "is_resumed = bool(self.dispatches or self.has_output)",
        "is_resumed = True",
    ),
    Mutant("router/requests/orders.py", "            sources = choice.winner.sources\n", "            sources = ()\n"),
    Mutant(
        POLICY, "if s.view.key != decode.key and why_refused(s.view, decode) is None]", "if s.view.key != decode.key]"
    ),
    Mutant(COSTS, "        if held <= own.held or not (", "        if not ("),
    Mutant(COSTS, "seconds = (held - own.held) * decode", "seconds = held * decode"),
    Mutant(POLICY, "    if winner.prefill is None and not winner.sources:\n", "    if winner.prefill is None:\n"),
    Mutant("decode_worker/journal.py", "(num_tokens - 1) // self._block_tokens", "num_tokens // self._block_tokens"),
    Mutant("decode_worker/journal.py", "        if self._room <= 0 or self", "        if self"),
    Mutant("decode_worker/journal.py", " or self.num_under_way >= self._limits.max_under_way:\n", ":\n"),
    Mutant("decode_worker/journal.py", "        self.num_under_way -= 1\n", "        pass\n"),
    Mutant(
        "decode_worker/journal.py", "run.kept, run.num_refused = offer.num_tokens, 0", "run.kept = offer.num_tokens"
    ),
    Mutant("decode_worker/journal.py", "min(self._limits.bytes_per_s, self._room + passed_s", "(self._room + passed_s"),
    Mutant("decode_worker/journal.py", "max(run.retry_at_s, now_s) for run", "now_s for run"),
    Mutant("decode_worker/journaling.py", "if told.kept_tokens <= offer.num_tokens else 0", "if True else 0"),
    Mutant("decode_worker/journaling.py", "    except DecodeError as error:\n", "    except KeyError as error:\n"),
    Mutant("decode_worker/journaling.py", "        if self._is_closed:\n", "        if False:\n"),
    Mutant("decode_worker/journaling.py", "        if has_kv:\n", "        if True:\n"),
    Mutant("decode_worker/journaling.py", "        self._journal.end(key)\n", ""),
    Mutant("decode_worker/journaling.py", "len(order.prompt_ids) if is_prefill else 0", "0"),
    Mutant("decode_worker/journaling.py", "for peer in order.peers[:1])", "for peer in order.peers)"),
    Mutant("decode_worker/journaling.py", "        if due_s is not None:\n", "        if False:\n"),
    Mutant(
        "decode_worker/buddy_calls.py",
        "        finally:\n            answered(reply)",
        "        else:\n            answered(reply)",
    ),
    Mutant("decode_worker/journal.py", "        run.is_offered = True\n", ""),
    Mutant("decode_worker/journal.py", "        key = max(due, key=", "        key = min(due, key="),
    Mutant("decode_worker/journal.py", "self._limits.retry_s * 2 ** min(run.num_refused, 20)", "self._limits.retry_s"),
    Mutant("decode_worker/journal.py", "min(run.num_refused, 20)", "run.num_refused"),
    Mutant("decode_worker/journal.py", "        run.kept = min(kept_tokens, run.full)\n", ""),
    Mutant("decode_worker/journal.py", "kept_tokens - kept_tokens % self._block_tokens", "0"),
    Mutant(
        "worker/blocks/keeping.py",
        "    left = load.free_blocks - load.promised_blocks - num_blocks\n",
        "    left = load.free_blocks - num_blocks\n",
    ),
    Mutant("worker/blocks/keeping.py", "    if num_keeping >= MAX_KEEPING:\n", "    if num_keeping > MAX_KEEPING:\n"),
    Mutant(
        "worker/blocks/copies.py",
        "        self._is_whole = fetched.end == FetchEnd.COMPLETE\n",
        "        self._is_whole = True\n",
    ),
    Mutant("worker/blocks/copies.py", "        if copied.names.root != wanted.identity_root:\n", "        if False:\n"),
    Mutant("worker/blocks/copies.py", "        if self._is_draining():\n", "        if False:\n"),
    Mutant("worker/blocks/copies.py", "            self.num_keeping -= 1\n", "            pass\n"),
    Mutant("worker/blocks/copies.py", "        if len(token_ids) % HASH_BLOCK_TOKENS:\n", "        if False:\n"),
    Mutant(
        "worker/blocks/copies.py", "        else:\n            self.cancel()\n", "        else:\n            pass\n"
    ),
    Mutant("worker/blocks/copies.py", "model.numerics_class if model.deterministic else None", "None"),
    Mutant("worker/blocks/copies.py", "                    self.fetch.cancel()\n", "                    pass\n"),
    Mutant(
        "worker/blocks/copies.py", "                self.cancel()  # others need the room\n", "                pass\n"
    ),
    Mutant(
        "worker/blocks/keep.py", "                task.cancel()  # it matters", "                pass  # it matters"
    ),
    Mutant("worker/blocks/keeping.py", "    if load.waiting_for_room:\n", "    if False:\n"),
    Mutant(
        "worker/blocks/departure.py",
        "        if not key.request_id:\n            return\n        self._running[key] += 1\n",
        "        self._running[key] += 1\n",
    ),
    Mutant("worker/blocks/fetch.py", "        if self._departing is None:\n", "        if True:\n"),
    Mutant(
        "worker/blocks/fetch.py",
        "        self._first += len(part.identities)\n",
        "        self._first += found.num_blocks\n",
    ),
    Mutant("worker/blocks/fetch.py", "        is_last = self._is_over or ", "        is_last = "),
    Mutant("worker/blocks/fetch.py", "    if wanted.first_token % HASH_BLOCK_TOKENS:\n", "    if False:\n"),
    Mutant("worker/blocks/fetch.py", "slice(max(0, wanted_start - start), end - start)", "slice(0, end - start)"),
    Mutant("worker/blocks/departing.py", "        self._changed.set()\n\n    def fetch_began", "\n    def fetch_began"),
    Mutant("worker/blocks/departing.py", "            if until_s is None:\n", "            if False:\n"),
    Mutant("kv/handover/sources.py", "list(sources[:MOST_SOURCES])", "list(sources)"),
    Mutant(
        "kv/handover/sources.py",
        "            source = self._waiting.pop(0)\n",
        "            source = self._waiting.pop()\n",
    ),
    Mutant("kv/handover/sources.py", "self._findable[held_tokens // HASH_BLOCK_TOKENS :]", "self._findable"),
    Mutant("decode_worker/fetch.py", "self.fetch.num_writing >= MAX_WRITING and", "False and"),
    Mutant(
        "decode_worker/fetch.py",
        "        if envelope is None or self.fetch.end is not None:\n",
        "        if envelope is None:\n",
    ),
    Mutant(
        "decode_worker/fetch.py",
        "            self._carrier.do(self.fetch.garbled(str(error)))\n",
        "            del error\n",
    ),
    Mutant(FETCHING, "        if self.wanted.numerics_class is not None and frame", "        if False and frame"),
    Mutant(FETCHING, "        if frame.sequence != self._num_frames + 1:\n", "        if False:\n"),
    Mutant(
        FETCHING,
        "or end > self.wanted.end_token:\n",
        "or False:\n",
        survives="blocks behind the last one have identities that were not asked for, which the next check finds",
    ),
    Mutant(FETCHING, "            self._writing.clear()  # the sequence", "            pass  # the sequence"),
    Mutant(FETCHING, "        if now_s >= self._deadline_s:\n", "        if False:\n"),
    Mutant(FETCHING, "FetchEnd.CLOSED if self._num_frames else FetchEnd.EMPTY", "FetchEnd.CLOSED"),
    Mutant(FETCHING, "Close(now=self.end not in (FetchEnd.COMPLETE, FetchEnd.SHORT))", "Close(now=True)"),
    Mutant("router/routing/buddies.py", "    if choice.winner.computes in fitting:\n", "    if False:\n"),
    Mutant("router/routing/buddies.py", "if w.key != decode.key and KEEPS", "if KEEPS"),
    Mutant("router/routing/buddies.py", "(held.get(w.worker_id, 0), w.free_kv_tokens,", "(w.free_kv_tokens,"),
]
