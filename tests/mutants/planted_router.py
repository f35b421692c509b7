"""Mutants of the router: what decides, and what drives it."""

from __future__ import annotations

from mutant import Mutant

_ROUTER = [
    Mutant("router/requests/delivery.py", "            self._choices[index].epoch = epoch\n", "            pass\n"),
    Mutant("router/requests/delivery.py", "            self._choices[index].epoch = None\n", "            pass\n"),
    Mutant(
        "router/requests/delivery.py",
        "return DeliveryVerdict.REPEATED if first_index < progress.next_index else DeliveryVerdict.GAP",
        "return DeliveryVerdict.REPEATED",
    ),
    Mutant(
        "router/requests/delivery.py",
        "        progress.token_ids.extend(token_ids)\n",
        "        progress.token_ids.extend(token_ids[:1])\n",
    ),
    Mutant(
        "router/requests/delivery.py",
        "                if self._pieces[index].choice == piece.choice:\n",
        "                if True:\n",
    ),
    Mutant("router/requests/state.py", "            if missing > 0:\n", "            if False:\n"),
    Mutant("router/requests/admission/bounds.py", "        self.tokens -= offer.tokens\n", ""),
    Mutant(
        "router/requests/admission/bounds.py",
        "            self.full_rate.note(offer.tokens, now_s)\n",
        "            self.full_rate.note(1, now_s)\n",
    ),
    Mutant("router/requests/admission/estimates.py", "            self._tokens *= kept\n", "            pass\n"),
    Mutant("router/requests/admission/fair_queue.py", "start + ticket.cost / ticket.share\n", "start + ticket.cost\n"),
    Mutant("router/requests/admission/fair_queue.py", "= start + ticket.cost / ticket", "= start + 1.0 / ticket"),
    Mutant(
        "router/requests/admission/fair_queue.py",
        "= max(self._virtual, self._starts.get(ticket.tenant, 0.0))\n",
        "= self._starts.get(ticket.tenant, 0.0)\n",
    ),
    Mutant("router/requests/admission/fair_queue.py", "self._lines[min(self._lines)]", "self._lines[max(self._lines)]"),
    Mutant("router/requests/admission/fair_queue.py", "left[tenant] <= own:\n", "left[tenant] < own:\n"),
    Mutant(
        "router/requests/admission/quotas.py",
        "            wait_s = self._bucket",
        "            wait_s = 0.0 * self._bucket",
    ),
    Mutant(
        "router/requests/admission/quotas.py",
        "lacking = min(cost, self.per_minute) - self.level\n",
        "lacking = cost - self.level\n",
    ),
    Mutant("router/requests/admission/entrance.py", "        self.quotas.take(", "        self.quotas.check("),
    Mutant("router/requests/admission/entrance.py", "requests=0 if served else 1)", "requests=0)"),
    Mutant("router/requests/admission/entrance.py", "if newcomer.left_s <= 0:", "if False:"),
    Mutant("router/keys/grants.py", "if hmac.compare_digest(known, presented):\n", "if True:\n"),
    Mutant("router/keys/grants.py", "if api_key and not is_digest(api_key):", "if api_key:"),
    Mutant("router/keys/rotation.py", "            self.ring.is_open = False", "            pass"),
    Mutant("router/api/validate.py", "    grant.check_model(model.name)\n", ""),
    Mutant("router/api/validate.py", "    return max(wanted, grant.priority)\n", "    return wanted\n"),
    Mutant("router/api/http/callers.py", 'scope["path"] not in PROBES:', 'scope["path"] in ("/v1/completions",):'),
    Mutant(
        "engine/scheduler.py", "        if held == len(findable):\n            return False\n", "        return False\n"
    ),
    Mutant("router/requests/admission/bounds.py", "        self._retry_tokens -= 1.0\n", ""),
    Mutant(
        "router/requests/admission/bounds.py",
        "            self.accepted -= 1\n            self.cancelled += 1\n",
        "            self.cancelled += 1\n",
    ),
    Mutant(
        "router/routing/prefixes.py",
        "                self._clear(identity, slot.bit)\n        self._store(slot, stored, lacking)\n",
        "        self._store(slot, stored, lacking)\n",
    ),
    Mutant(
        "router/routing/prefixes.py",
        "if slot.in_snapshot or sequence != slot.sequence + 1 or",
        "if slot.in_snapshot or",
    ),
    Mutant(
        "router/routing/prefixes.py",
        "            self._live &= ~slot.bit\n            slot.died",
        "            slot.died",
    ),
    Mutant("router/routing/prefixes.py", "                    groups.append((mask ^ holders, low, middle - 1))\n", ""),
    Mutant(
        "router/routing/prefixes.py",
        "            self._generation >= self._swept[0].died_in_generation + 2 or",
        "            self._generation >= self._swept[0].died_in_generation or",
    ),
    Mutant("kv/handover/pairing.py", "    if prefill.numerics != decode.numerics:\n", "    if False:\n"),
    Mutant("router/routing/policy.py", "if d.role is Role.COMBINED or limits.local_prefill]", "if True]"),
    Mutant(
        "router/routing/costs.py", "uncached = request.prompt_tokens - held\n", "uncached = request.prompt_tokens\n"
    ),
    Mutant(
        "router/routing/policy.py",
        "return min(equal, key=lambda c: (c.in_flight,",
        "return min(equal, key=lambda c: (-c.in_flight,",
    ),
    Mutant(
        "router/routing/costs.py",
        "speed.work_ms(worker.queued_prefill_tokens, worker.queued_prefill_pairs)",
        "speed.work_ms(worker.queued_prefill_tokens, 0.0)",
    ),
    Mutant(
        "router/routing/costs.py",
        "if self._request.prompt_tokens - d.held < HASH_BLOCK_TOKENS:",
        "if self._request.prompt_tokens - d.held <= HASH_BLOCK_TOKENS:",
    ),
    Mutant(
        "router/routing/candidates.py",
        "if self.prefill is None or self.is_under_a_block else",
        "if self.prefill is None else",
    ),
    Mutant("router/routing/policy.py", "    if winner.prefill and winner.is_under_a_block:\n", "    if False:\n"),
    Mutant(
        "router/routing/costs.py",
        "disturbed = min(worker.num_decoding, self._limits.max_disturbed)\n",
        "disturbed = worker.num_decoding\n",
    ),
    Mutant(
        "router/routing/costs.py",
        "disturbed = min(decode.num_decoding, self._limits.max_disturbed) +",
        "disturbed = decode.num_decoding +",
    ),
    Mutant("router/routing/recorded.py", '"side": sides.index(side)', '"side": 0'),
    Mutant("router/routing/recorded.py", "    if side not in sides:\n", "    if True:\n"),
    Mutant("router/routing/recorded.py", "int(blocks) for name", "1 for name"),
    Mutant(
        "router/routing/policy.py",
        "asked = Asked(request, tuple(workers), held,",
        "asked = Asked(request, tuple(workers), {},",
    ),
    Mutant("router/requests/history.py", "_line(logged, MAX_LOGGED_BYTES)", "_line(entry, MAX_LOGGED_BYTES)"),
    Mutant("router/routing/coefficients.py", "uncached * (held + uncached / 2)", "uncached * uncached / 2"),
    Mutant("router/routing/known_worker.py", "recent += amount(work)\n", "pass\n"),
    Mutant(
        "router/routing/known_worker.py",
        "if work.at_s > since else 0.0",
        "if work.at_s > since - REPORT_LAG_S else 0.0",
    ),
    Mutant("router/routing/views.py", "if is_leading else 0.0\n", "if is_leading else 1e6\n"),
    Mutant("router/routing/views.py", "Dispatched(now_s, uncached, 0, pairs)", "Dispatched(now_s, uncached, 0)"),
    Mutant(
        "router/routing/views.py", "Dispatched(now_s, uncached, context, pairs)", "Dispatched(now_s, uncached, context)"
    ),
    Mutant(
        "router/requests/explain.py",
        'if why and choice["winner"]["computed_by"] != choice["winner"]["decode_worker"]:',
        "if why:",
    ),
    Mutant("router/routing/fleet.py", "            return []  # a zombie of an earlier life\n", "            pass\n"),
    Mutant(
        "router/routing/fleet.py",
        "        worker.in_flight.clear()\n        return [FleetChange(Change.LOST",
        "        return [FleetChange(Change.LOST",
    ),
    Mutant("router/routing/fleet.py", "            worker.in_flight.pop(key, None)\n", "            pass\n"),
    Mutant("router/routing/fleet.py", "if w.state is WorkerState.LIVE and", "if w.session_up and"),
    Mutant("router/routing/fleet.py", "worker.leaving or load.draining or worker.comes_back", "worker.draining"),
]

_LIVES = [
    Mutant(
        "router/requests/lifecycle.py",
        "        if self.runs.find(request.owner, request.request_id) is not None:\n",
        "        if False:\n",
    ),
    Mutant("core/request.py", "return self.num_choices * (len(", "return (len("),
    Mutant("router/requests/lifecycle.py", "        self._orders.cancel(run, error.code)\n", ""),
    Mutant("router/requests/lifecycle.py", '        self._orders.cancel(run, "sent elsewhere")\n', ""),
    Mutant(
        "router/requests/lifecycle.py",
        "        run.recall(error, now_s, drains=drains)  # a token",
        "        run.stage = Stage.ROUTING  # a token",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "        self._orders.forget(run)\n        if not may_return",
        "        if not may_return",
    ),
    Mutant("router/requests/lifecycle.py", "            run.exclude(worker, error, now_s)\n", "            pass\n"),
    Mutant(
        "router/requests/lifecycle.py",
        "        elif run.living is None or run.living.decode != key:\n",
        "        elif run.living is None:\n",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "if (not drains and run.num_tries >= most) or not (",
        "if not (",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "most = MAX_RESUMED_DISPATCHES if run.has_output else MAX_DISPATCHES",
        "most = MAX_DISPATCHES",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "is_free or self.admission.may_retry()",
        "True",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "            run.deadline.cancel()\n        self._orders.forget(run)\n",
        "            run.deadline.cancel()\n",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "        self._observer.settled(run)\n        self.workers_changed()\n",
        "        self._observer.settled(run)\n",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "        self._waiting.remove(run.name)\n",
        "",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "            self._fleet.first_token(SequenceKey(run.name, tokens.choice))\n",
        "            pass\n",
    ),
    Mutant("router/requests/lifecycle.py", "        self._fleet.ended(SequenceKey(run.name, end.choice))\n", ""),
    Mutant(
        "router/requests/choosing.py",
        "usable = run.identities if request.sampling.prompt_logprobs is None or run.has_output else ()",
        "usable = run.identities",
    ),
    Mutant(
        "router/requests/choosing.py",
        "prompt_logprobs is None or run.has_output else ()",
        "prompt_logprobs is None else ()",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "            self.fail(run, run.cause or nobody, now_s)",
        "            self.fail(run, nobody, now_s)",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "        cancelled = isinstance(run.error, Cancelled)\n",
        "        cancelled = False\n",
    ),
    Mutant("router/requests/lifecycle.py", "@{self._incarnation:x}.{self._num_admitted:x}", "@{self._num_admitted:x}"),
    Mutant(
        "router/requests/choosing.py",
        "prefixes.predict([choice.winner.computes.worker_id]",
        "prefixes.predict([choice.winner.decode.worker_id]",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "        self._recall(run, error, now_s, may_return=is_lost, drains=drains)\n",
        "        self._recall(run, error, now_s)\n",
    ),
    Mutant("router/requests/choosing.py", "if not run.excludes(w.facts.key, now_s)]", "if True]"),
    Mutant("router/requests/choosing.py", "if w.facts.key not in taken]", "if True]"),
    Mutant(
        "router/requests/choosing.py",
        "            return now_s + max(0.0, run.left_s(now_s))\n",
        "            return now_s\n",
    ),
    Mutant("router/requests/choosing.py", "patience_s = max(patience_s, limits.worker_return_s)", "pass"),
    Mutant("router/requests/orders.py", "emitted_ids=emitted_ids,", "emitted_ids=emitted_ids[:-1],"),
    Mutant("router/requests/orders.py", "is_leading=index == unfinished[0]", "is_leading=index == 0"),
    Mutant("router/workers/wire.py", "        emitted_tokens=len(emitted_ids),\n", ""),
    Mutant("router/workers/wire.py", "key.choice == 0 and not emitted_ids", "key.choice == 0"),
    Mutant(
        "router/requests/state.py",
        "may_ask = self.has_output or isinstance(failed.error, Overloaded)",
        "may_ask = False",
    ),
    Mutant("router/requests/state.py", " or isinstance(failed.error, Overloaded)", ""),
    Mutant("router/requests/state.py", "self.has_output or isinstance(failed.error, Overloaded)", "True"),
    Mutant("router/requests/lifecycle.py", "None if has_left else blame(", "blame("),
    Mutant(
        "router/requests/lifecycle.py",
        "            self.fail(guilty, PoisonRequest(poison), now_s)\n",
        "            pass\n",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "            self.workers_changed()  # the next suspect",
        "            pass  # the next suspect",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "tokens.first_index == run.living.begins_with(tokens.choice)",
        "tokens.first_index == 0",
    ),
    Mutant("router/requests/lifecycle.py", "if run.dispatches or self._chooser.has_room(run):", "if True:"),
    Mutant(
        "router/requests/lifecycle.py",
        "            self.workers_changed()  # another suspect",
        "            pass  # another suspect",
    ),
    Mutant(
        "router/requests/choosing.py",
        "if run.has_output or fleet.may_be_lost(model, run.request.adapter):",
        "if run.has_output:",
    ),
    Mutant("router/requests/suspects.py", "for run in suspects if confirmed else involved:", "for run in involved:"),
    Mutant(
        "router/requests/suspects.py",
        " in suspects if confirmed else involved:",
        " in suspects or involved:",
    ),
    Mutant("router/requests/suspects.py", "    if len(suspects) == 1 and (", "    if suspects and ("),
    Mutant("router/requests/suspects.py", "(confirmed or _uses_up_its_bound(suspects[0], now_s))", "confirmed"),
    Mutant("router/requests/suspects.py", "    return said or not living.confirms\n", "    return True\n"),
    Mutant("router/requests/suspects.py", "said or not living.confirms", "said"),
    Mutant("router/requests/suspects.py", "        rests_s = now_s + APART_S\n", "        pass\n"),
    Mutant("router/requests/suspects.py", "return now_s - old.unconfirmed_s >= APART_S", "return True"),
    Mutant(
        "router/requests/suspects.py", "            run.suspicion, is_one_dropped = None, True\n", "            pass\n"
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "            self.workers_changed()  # suspects that wait",
        "            pass  # suspects that wait",
    ),
    Mutant("router/requests/lifecycle.py", "        forgive(active, self._fleet.lives)\n", ""),
    Mutant("router/requests/lifecycle.py", "            rest(active, now_s)\n", ""),
    Mutant("router/requests/suspects.py", "min(old.num_unconfirmed, len(left) - 1)", "old.num_unconfirmed"),
    Mutant("router/requests/suspects.py", "MAX_UNCONFIRMED = 2", "MAX_UNCONFIRMED = 3"),
    Mutant("router/requests/suspects.py", " and living.prefill not in lost:", ":"),
    Mutant("router/requests/suspects.py", " and run.living is not None and run.living.decode == key:", ":"),
    Mutant("router/requests/suspects.py", "if living.prefill is not None and living.prefill not in lost:", "if False:"),
    Mutant("router/requests/choosing.py", "        if rests_until_s(run) > now_s:\n            return None\n", ""),
    Mutant(
        "router/requests/attempts.py", "return self.is_suspect or not self.is_resumed", "return not self.is_resumed"
    ),
    Mutant("router/requests/lifecycle.py", "run.suspicion is not None or drains", "drains"),
    Mutant("router/requests/choosing.py", "if may_ask_again or taken_by", "if taken_by"),
    Mutant("router/requests/choosing.py", "max(run.waits_since_s, rests_until_s(run))", "run.waits_since_s"),
    Mutant("router/requests/orders.py", "order.confirm = PROOF_TOKENS if run", "order.confirm = 0 if run"),
    Mutant("router/requests/orders.py", " if run.suspicion is not None else 0", ""),
    Mutant(
        "router/requests/state.py", "living is None or living.epoch != epoch_from_wire(taken.epoch)", "living is None"
    ),
    Mutant(
        "router/requests/suspects.py",
        "for choice in run.delivery.unfinished):",
        "for choice in range(run.request.num_choices)):",
    ),
    Mutant(
        "router/requests/suspects.py", "run.delivery.tokens_of(choice) == living.begins_with(choice) for", "True for"
    ),
    Mutant(
        "router/requests/suspects.py",
        "any(\n        run.delivery.tokens_of(choice) == living",
        "all(\n        run.delivery.tokens_of(choice) == living",
    ),
    Mutant("router/requests/state.py", "            self.identities = None  # of", "            pass  # of"),
    Mutant("router/requests/state.py", " and not current.is_resumed:", ":"),
    Mutant(
        "router/requests/state.py", "self.first_choice in (None, end.choice) and", "self.first_choice == end.choice and"
    ),
    Mutant("router/requests/state.py", "        self.living.left = Left(now_s, error, drains)\n", ""),
    Mutant(
        "router/requests/roster.py",
        "        if key in self._connected:\n            self.prefixes.join",
        "        if True:\n            self.prefixes.join",
    ),
    Mutant(
        "router/requests/roster.py",
        "        if key not in self._connected or event.incarnation != key.incarnation:\n",
        "        if event.incarnation != key.incarnation:\n",
    ),
    Mutant("router/requests/roster.py", "                self.prefixes.leave(key.worker_id)\n", ""),
    Mutant("router/requests/roster.py", "                self._wires.reset(key)\n", "                pass\n"),
    Mutant("router/requests/roster.py", "                self._connected.discard(key)\n", ""),
    Mutant("router/requests/roster.py", "        self.prefixes.sweep(sweep_entries)\n", ""),
    Mutant(
        "router/requests/roster.py",
        "        if self.fleet.beat(key, now_s, phase, steps):\n",
        "        if self.fleet.beat(key, now_s):\n",
    ),
    Mutant(
        "router/requests/roster.py",
        "phase, steps):\n            self._wires.changed()\n",
        "phase, steps):\n            pass\n",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "        if run.has_output or not isinstance(error, Overloaded):\n",
        "        if True:\n",
    ),
    Mutant(
        "router/requests/state.py", "one.was_drained or (one.was_refused and one.may_be_refused)", "one.was_drained"
    ),
    Mutant("router/requests/state.py", "(one.was_drained or ", "("),
    Mutant("router/requests/lifecycle.py", "(not drains and run.num_tries", "(run.num_tries"),
    Mutant("router/requests/lifecycle.py", "        drains = has_left or self", "        drains = self"),
    Mutant("router/requests/roster.py", "            self._wires.lost(change)\n", ""),
    Mutant(
        "router/requests/roster.py",
        "key.worker_id, event.sequence, delta.stored, delta.removed, lacking",
        'key.worker_id, event.sequence, delta.stored, b"", lacking',
    ),
    Mutant("router/requests/state.py", "        self.delivery.recall()\n", ""),
    Mutant(
        "router/requests/state.py",
        "            if not self.delivery.is_awaited(end.choice, epoch):\n                return",
        "            if False:\n                return",
    ),
    Mutant(
        "router/requests/state.py",
        "        usage = None if self.delivery.unfinished else self.usage\n",
        "        usage = self.usage\n",
    ),
    Mutant(
        "router/requests/state.py",
        "if run.living is not None and run.living.decode == key]",
        "if run.current is not None and run.current.decode == key]",
    ),
    Mutant(
        "router/requests/state.py", "min(self._cached.values(), default=0)", "max(self._cached.values(), default=0)"
    ),
]

_DRIVEN = [
    Mutant("router/requests/dispatch.py", "        self.life.tick(now_s)\n", "        pass\n"),
    Mutant("router/requests/dispatch.py", "        self.life.workers_changed()\n", "        pass\n"),
    Mutant(
        "router/requests/dispatch.py",
        '            self.fail(run, Unavailable("the router is stopping", retry_after_s=RETRY_AFTER_S))\n',
        "            pass\n",
    ),
    Mutant("router/workers/registry.py", "                self._handlers.ticked(now_s)\n", ""),
    Mutant("router/workers/registry.py", "        self._num_lost = self.fleet.num_lost\n", ""),
    Mutant(
        "router/workers/registry.py",
        "PromptHasher.of(self._identity.identity_key, model)",
        'PromptHasher(self._identity.identity_key, model.weights_fingerprint, b"")',
    ),
    Mutant(
        "router/workers/registry.py",
        "hasher.name(request.prompt_ids, request.cache_scope)",
        'hasher.name(request.prompt_ids, type(request.cache_scope)("", b""))',
    ),
    Mutant(
        "router/workers/registry.py",
        "        link = self._links.pop(facts.key, None)\n",
        "        link = self._links.get(facts.key)\n",
    ),
    Mutant("router/workers/registry.py", "            self._metrics.forget_worker(facts)\n", ""),
    Mutant(
        "router/workers/registry.py",
        "            if worker is not None and worker.facts.key == key:\n                self._metrics",
        "            if False:\n                self._metrics",
    ),
    Mutant("router/workers/registry.py", "        self._is_closed = True\n", ""),
    Mutant(
        "router/requests/flow.py",
        '            self._dispatcher.fail(run, Cancelled("the client went away"))',
        "            pass",
    ),
    Mutant("router/requests/flow.py", "            self._conclude(run)\n", ""),
    Mutant("router/requests/flow.py", '        self._life.refusing = "the router is draining"\n', ""),
    Mutant(
        "router/requests/flow.py",
        'self._moved["handovers"] += report["bytes_moved"] > 0',
        'self._moved["handovers"] += 1',
    ),
    Mutant("router/requests/flow.py", "                timeline.mark(Instant.FIRST_SENT, self.clock.now_s())\n", ""),
    Mutant("router/requests/flow.py", "server(options=options, interceptors=[self._guard])", "server(options=options)"),
    Mutant(
        "router/requests/flow.py",
        "run = self._life.runs.find(tenant, request_id)\n        return",
        "run = next((r for r in self._life.runs.open.values() if r.request_id == request_id), None)\n        return",
    ),
    Mutant("router/workers/links.py", "        if facts.key != self.key:\n", "        if False:\n"),
    Mutant(
        "router/workers/links.py",
        "                if event.incarnation != self.key.incarnation:\n",
        "                if False:\n",
        survives="the roster refuses it too (`take_event`), and the watch begins again all the same",
    ),
    Mutant(
        "router/workers/links.py",
        '                    raise _Broken("a gap in the worker\'s events")\n',
        "                    pass\n",
    ),
    Mutant("router/workers/links.py", "        while not self._orders.empty():", "        while False:"),
    Mutant(
        "router/workers/links.py",
        '        if message.WhichOneof("body") != "welcome":\n',
        "        if False:\n",
        survives="what is no welcome names no worker: the next lines refuse it as another one",
    ),
    Mutant("router/workers/links.py", "            self._has_complained = True\n", ""),
    Mutant("router/workers/links.py", "            self._handlers.down(self.key, reason)\n", ""),
    Mutant(
        "router/workers/links.py",
        '            self.reset(f"orders cannot be written: {_words(error)}")\n',
        "            pass\n",
    ),
    Mutant("router/workers/links.py", "        if not self._is_up:\n            return False\n", ""),
    Mutant(
        "router/requests/history.py",
        '(entry["tenant"], entry["request_id"]), _line(entry, MAX',
        '("", entry["request_id"]), _line(entry, MAX',
    ),
    Mutant(
        "router/requests/history.py",
        "len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:",
        "len(self._entries) > self._max_entries:",
    ),
    Mutant(
        "router/requests/history.py",
        "        self._forget(key)\n        self._entries[key] = line\n",
        "        self._entries[key] = line\n",
    ),
    Mutant("router/requests/history.py", "    while len(line) > most:\n", "    while False:\n"),
    Mutant(
        "router/requests/history.py",
        " for name, value in entry.items() if name not in _NAMES}",
        " for name, value in entry.items()}",
        survives="names are bounded at the door: of 16 KiB another value is always longer",
    ),
]

_LATER = [
    Mutant(
        "router/workers/links.py",
        "            self._is_up = False\n            self._handlers.down(self.key, reason)\n",
        "            self._handlers.down(self.key, reason)\n            self._is_up = False\n",
    ),
    Mutant(
        "router/requests/orders.py",
        "            left_s = run.left_s(now_s)\n            key",
        "            left_s = run.request.timeout_s\n            key",
    ),
    Mutant(
        "router/requests/lifecycle.py",
        "self._driver.later(max(0.0, run.left_s(now_s)),",
        "self._driver.later(run.request.timeout_s,",
    ),
    Mutant("router/requests/lifecycle.py", "            run.waits_since_s = now_s  # else", "            pass  # else"),
    Mutant(
        "router/routing/fleet.py",
        "            worker.heard_s = worker.beat_s = worker.step_changed_s = now_s\n",
        "            worker.heard_s = now_s\n",
    ),
    Mutant("router/routing/fleet.py", " = worker.step_changed_s = now_s\n", " = now_s\n"),
    Mutant(
        "router/routing/fleet.py",
        "            worker.silent = worker.stalled = False\n            worker.heard_s",
        "            worker.heard_s",
    ),
    Mutant("router/routing/lost_workers.py", "return max((lost.until_s", "return min((lost.until_s"),
    Mutant(
        "router/requests/flow.py",
        "        while self._life.runs.open and loop.time()",
        "        while self._life.runs.active and loop.time()",
    ),
]

MUTANTS = [*_ROUTER, *_LIVES, *_DRIVEN, *_LATER]
