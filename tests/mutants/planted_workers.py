"""Mutants of the workers' faces: runs, sessions, what is told, and the cluster around them."""

from __future__ import annotations

from mutant import Mutant

_DECODE = [
    Mutant(
        "decode_worker/choice.py",
        "        for token_id in token_ids[start - first_index :]:\n",
        "        for token_id in token_ids:\n",
    ),
    Mutant("decode_worker/choice.py", "        if first_index > self.num_tokens:\n", "        if False:\n"),
    Mutant(
        "decode_worker/choice.py",
        "        if self._text.is_stopped and self.ended is FinishReason.LENGTH:\n",
        "        if False:\n",
    ),
    Mutant("decode_worker/choice.py", "logprobs[start - first_index :][: len(counted)]", "logprobs[: len(counted)]"),
    Mutant("decode_worker/task.py", "        self._pull_waits = False\n        host", "        host"),
    Mutant("decode_worker/task.py", "        if not self._has_asked:\n", "        if True:\n"),
    Mutant("decode_worker/task.py", "                self._is_put_off = True\n", ""),
    Mutant("decode_worker/ledger.py", "self._newest.get(router, {})  #", "self._newest[router]  #"),
    Mutant(
        "decode_worker/task.py",
        "is_untouched = lost.stored_upto <= self._held_tokens and lost.first_token is None",
        "is_untouched = lost.first_token is None",
    ),
    Mutant(
        "decode_worker/task.py",
        "lost.stored_upto <= self._held_tokens and lost.first_token is None",
        "lost.stored_upto <= self._held_tokens",
    ),
    Mutant(
        "decode_worker/task.py",
        "        if self._verdict is not None:\n            return\n        is_untouched",
        "        is_untouched",
    ),
    Mutant("decode_worker/task.py", "        if self._pull is not None:\n            self._pull.cancel(reason)\n", ""),
    Mutant("decode_worker/task.py", '            self._pull.cancel("ended")\n', ""),
    Mutant(
        "decode_worker/task.py",
        "        if not (self.order.peers or self.order.sources) or self._verdict is not None:\n",
        "        if not (self.order.peers or self.order.sources):\n",
    ),
    Mutant("decode_worker/messages.py", "        identity_root=order.prompt.names.root,\n", ""),
    Mutant("decode_worker/messages.py", "        emitted_tokens=order.num_emitted,\n", ""),
    Mutant("decode_worker/messages.py", "        **scope_to_wire(order.scope),\n", ""),
    Mutant("decode_worker/messages.py", "        held_tokens=held_tokens,\n", ""),
    Mutant("decode_worker/task.py", '            self.cancel("finished", spoken.ended)\n', "            pass\n"),
    Mutant("decode_worker/task.py", "(spoken.is_by_text or self._pull is not None)", "spoken.is_by_text"),
    Mutant(
        "decode_worker/task.py",
        "        if self._has_bound:\n            self._pull.bound()\n",
        "        if False:\n            self._pull.bound()\n",
    ),
    Mutant("decode_worker/messages.py", "        deadline_s=deadline_s,\n", "        deadline_s=None,\n"),
    Mutant("decode_worker/task.py", "kept_tokens, first_token))\n", "kept_tokens, None))\n"),
    Mutant("decode_worker/task.py", "        self._ended(self)\n", ""),
    Mutant("decode_worker/task.py", "            self._pull.bound()  # else", "            pass  # else"),
    Mutant(
        "decode_worker/task.py",
        "        elif self._pull is not None and self._pull_waits:\n            self._pull.bound()",
        "        elif self._pull is not None:\n            self._pull.bound()",
    ),
    Mutant("decode_worker/service.py", '            older.cancel("a newer dispatch")\n', "            pass\n"),
    Mutant(
        "decode_worker/service.py",
        "            self._ledger.refuse(router, key, epoch)\n            session.outbox.add_end(refusal",
        "            session.outbox.add_end(refusal",
    ),
    Mutant(
        "decode_worker/service.py",
        '_ended_already"] += 1\n            self._ledger.refuse(router, key, epoch)\n',
        '_ended_already"] += 1\n',
    ),
    Mutant("decode_worker/service.py", "            if end is not None:\n", "            if False:\n"),
    Mutant("decode_worker/choice.py", "        self.push(0, emitted_ids)", "        self._text.push(emitted_ids)"),
    Mutant("decode_worker/report.py", "    tail = choice.flush()  # may", '    tail = ""  # may'),
    Mutant(
        "decode_worker/report.py",
        "min(cached, len(order.prompt_ids) - order.num_emitted)",
        "min(cached, len(order.prompt_ids))",
    ),
    Mutant(
        "decode_worker/order.py",
        "model.check_prompt(prompt_ids, message.emitted_tokens)",
        "model.check_prompt(prompt_ids)",
    ),
    Mutant("decode_worker/service.py", "        self._after(grace_s, lambda: self._end_orphans(orphans))\n", ""),
    Mutant(
        "decode_worker/service.py", '        return self.cancel_all("draining")\n', "        return self.num_running\n"
    ),
    Mutant("decode_worker/service.py", "            self.lose(session)\n", "            pass\n"),
    Mutant("decode_worker/service.py", "            session.outbox.at_step(step)\n", "            pass\n"),
    Mutant(
        "decode_worker/service.py",
        "        if standing is not Standing.NEW:\n",
        "        if standing is Standing.STALE:\n",
    ),
    Mutant(
        "decode_worker/service.py",
        "        if self.is_draining:\n            raise",
        "        if False:\n            raise",
    ),
    Mutant("decode_worker/service.py", "        self._ledger.end(run)\n        if not len", "        if not len"),
    Mutant(
        "decode_worker/service.py",
        "prompt, emitted = order.prompt_ids[:start], order.prompt_ids[start:]",
        "prompt, emitted = order.prompt_ids[:start], ()",
    ),
    Mutant("decode_worker/ledger.py", "if known is None or epoch > known:", "if known is None or epoch >= known:"),
    Mutant("decode_worker/ledger.py", "if epoch >= self._entries[run].epoch)", "if True)"),
    Mutant(
        "decode_worker/ledger.py",
        "epoch >= self._entries[run].epoch)\n        return",
        "epoch == self._entries[run].epoch)\n        return",
    ),
    Mutant("decode_worker/ledger.py", "            self._remember(router, key, epoch)\n\n    # ", "\n    # "),
    Mutant("decode_worker/ledger.py", "        if newest.get(key) is run:\n", "        if key in newest:\n"),
    Mutant(
        "decode_worker/ledger.py",
        "for run, entry in self._entries.items() if entry.session is session)",
        "for run in self._entries)",
    ),
    Mutant("decode_worker/ledger.py", "self._ended.popitem(last=False)", "self._ended.popitem(last=True)"),
    Mutant("decode_worker/ledger.py", "        self._ended.move_to_end((router, key))\n", ""),
    Mutant("decode_worker/ledger.py", "            if not newest:\n                del self._newest[router]\n", ""),
    Mutant("decode_worker/outbox.py", "        self._room.set()\n        return output", "        return output"),
    Mutant(
        "decode_worker/outbox.py",
        "(self._ends if place in self._tokens else output.ends).append(end)",
        "output.ends.append(end)",
    ),
    Mutant("decode_worker/outbox.py", "                self._num_bytes -= pending.num_bytes\n", ""),
    Mutant("decode_worker/outbox.py", "                self._num_tokens -= len(pending.token_ids)\n", ""),
    Mutant("decode_worker/outbox.py", "is_long or self._num_bytes >= self._max_bytes", "is_long"),
    Mutant(
        "decode_worker/outbox.py",
        "if num_bytes and num_bytes + pending.num_bytes > self._max_message_bytes:",
        "if False:",
    ),
    Mutant(
        "decode_worker/outbox.py",
        "        if not self._tokens and not self._ends:\n            self._waiting",
        "        if True:\n            self._waiting",
    ),
    Mutant("decode_worker/outbox.py", "                    prompt_logprobs=pending.prompt_logprobs,\n", ""),
    Mutant("decode_worker/router_session.py", "            await self.outbox.wait_for_room()", "            pass"),
    Mutant("decode_worker/router_session.py", "not await self._send(context, step=first):", "False:"),
    Mutant(
        "decode_worker/router_session.py",
        "        if not order.confirm or self._owner",
        "        if True or self._owner",
    ),
    Mutant("decode_worker/router_session.py", "stall_s), self._writing:", "stall_s):"),
    Mutant("decode_worker/router_session.py", " or self._owner.has_others_suspect(self):", ":"),
    Mutant("decode_worker/service.py", "if message.confirm and self.has_others_suspect(session):", "if False:"),
    Mutant("decode_worker/service.py", "any(run.is_suspect and router_of(run)", "any(router_of(run)"),
    Mutant("decode_worker/service.py", "run.is_suspect and router_of(run) != session.router for", "run.is_suspect for"),
    Mutant("decode_worker/task.py", "        self._num_said += len(spoken.token_ids)\n", "        pass\n"),
    Mutant("decode_worker/outbox.py", " + len(self._taken) >= self._max_ends", " >= self._max_ends"),
    Mutant("decode_worker/outbox.py", "        self._taken.clear()\n", ""),
    Mutant("decode_worker/outbox.py", " or output.taken else None", " else None"),
    Mutant("decode_worker/task.py", "(order.confirm or self._peer != order.peers[0])", "order.confirm"),
    Mutant("decode_worker/task.py", "order.confirm or self._peer != order.peers[0]", "self._peer != order.peers[0]"),
    Mutant("decode_worker/outbox.py", "output.ends or output.taken else None", "output.ends else None"),
    Mutant("decode_worker/router_session.py", "                self._has_beaten = True\n", "                pass\n"),
    Mutant(
        "decode_worker/router_session.py",
        "async with asyncio.timeout(self._timing.stall_s), self._writing:",
        "async with asyncio.timeout(None), self._writing:",
    ),
    Mutant(
        "decode_worker/router_session.py",
        "RouterKey(hello.router_id, hello.router_incarnation)",
        "RouterKey(hello.router_id, 0)",
    ),
    Mutant(
        "decode_worker/router_session.py",
        "(hello.router_id, hello.router_incarnation)\n\n    async",
        '("", hello.router_incarnation)\n\n    async',
    ),
]

_CLUSTER = [
    Mutant("worker/watch.py", "elif event.sequence != self._known + 1 or self._num_pending", "elif self._num_pending"),
    Mutant(
        "worker/watch.py",
        "event.sequence != self._known + 1 or self._num_pending > self._max_pending:",
        "event.sequence != self._known + 1:",
    ),
    Mutant("worker/watch.py", "            self.await_snapshot()  # whatever waits is older\n", ""),
    Mutant("worker/watch.py", "        if watcher.lost_count:\n", "        if False:\n"),
    Mutant("worker/watch.py", "        pieces[-1].last = True\n", ""),
    Mutant(
        "worker/watch.py",
        "            if self._known is not None and event.sequence <= self._known:\n                return  #",
        "            if False:\n                return  #",
    ),
    Mutant("worker/watch.py", "            self.leave(watcher)\n", "            pass\n"),
    Mutant("worker/watch.py", 'removed=b"".join(delta.removed)', 'removed=b""'),
    Mutant(
        "worker/watch.py",
        '            watcher.sequence += event.HasField("load") is False\n',
        "            watcher.sequence += 1\n",
    ),
    Mutant("worker/watch.py", "            self._num_pending += len(event.stored) + len(event.removed)\n", ""),
    Mutant(
        "worker/watch.py",
        "        elif self._known is None or self.lost_count or event.sequence <= self._known:\n",
        "        elif self._known is None or self.lost_count:\n",
    ),
    Mutant(
        "worker/announcer.py",
        "Announcement(leaving=leaving, sequence=sequence)",
        "Announcement(leaving=False, sequence=sequence)",
    ),
    Mutant("worker/announcer.py", "            if said is not self._info:\n", "            if said is None:\n"),
    Mutant("worker/announcer.py", "said = sent[sequence] = self._info\n", "sent[sequence] = self._info\n"),
    Mutant("worker/announcer.py", "        self._info = info\n        for event", "        for event"),
    Mutant(
        "worker/announcer.py", "            failures = 0 if reached else failures + 1\n", "            failures += 1\n"
    ),
    Mutant("worker/blocks/fetch.py", "scope_from_wire(wanted)", "scope_from_wire(handover_pb2.FetchRequest())"),
    Mutant(
        "worker/blocks/fetch.py",
        "self._wanted.first_token + self._first * HASH_BLOCK_TOKENS",
        "self._wanted.first_token",
    ),
    Mutant("worker/blocks/fetch.py", "                digests=section.digests[layers, heads],\n", ""),
    Mutant("worker/blocks/fetch.py", "    if len(wanted.identities) > MAX_IDENTITIES:\n", "    if False:\n"),
    Mutant(
        "worker/blocks/fetch.py",
        "            part.identities[: found.num_blocks],\n",
        "            part.identities,\n",
    ),
    Mutant(
        "cluster/restarts.py",
        "        member.failures = 1 if healthy else member.failures + 1\n",
        "        member.failures = 1\n",
    ),
    Mutant("cluster/restarts.py", "        if member.standing is Standing.STOPPED:\n            return None\n", ""),
    Mutant(
        "cluster/restarts.py",
        "                is_overdue = now_s - member.missing_since_s > patience_s\n",
        "                is_overdue = False\n",
    ),
    Mutant("cluster/restarts.py", "                member.since_s, member.missing_since_s = now_s, None\n", ""),
    Mutant(
        "cluster/restarts.py",
        "self.patience.draining_s if is_draining else self.patience.missing_s",
        "self.patience.missing_s",
    ),
    Mutant(
        "cluster/restarts.py",
        "        elif member.missing_since_s is None or member.use is not use:\n",
        "        elif member.missing_since_s is None:\n",
    ),
    Mutant("cluster/restarts.py", "        member.use = Use.SERVES\n\n", "\n"),
    Mutant(
        "cluster/restarts.py",
        "        if use in (None, Use.SERVES) or member",
        "        if use is Use.SERVES or member",
    ),
    Mutant("cluster/members.py", '        self._ended_life[name] = self._life.get(name, "")\n', ""),
    Mutant(
        "cluster/supervisor.py",
        "            elif self._members.book.restarts(name) >= _START_TRIES:\n",
        "            elif False:\n",
    ),
    Mutant("cluster/members.py", "name, use if is_heard else None, now_s)", "name, use, now_s)"),
    Mutant("cluster/supervisor.py", "            if end.is_certain:\n", "            if False:\n"),
    Mutant(
        "cluster/supervisor.py", "        self._members.replaced(name)\n        await self._launcher.kill(name)\n", ""
    ),
]

_LATER = [
    Mutant(
        "cluster/supervisor.py",
        'for kind in ("router", "worker"):',
        'for kind in ("worker", "router"):',
    ),
    Mutant(
        "decode_worker/task.py",
        "        left_s = self._deadline_s - now_s\n",
        "        left_s = self._deadline_s - self._received_at_s\n",
    ),
    Mutant(
        "decode_worker/task.py",
        "            self._verdict = verdict\n"
        "            self._tools.pull.dispatcher.send(link.CancelSequence(self.order.engine_key, verdict))\n",
        "            self._tools.pull.dispatcher.send(link.CancelSequence(self.order.engine_key, verdict))\n"
        "        self._verdict = verdict\n",
    ),
    Mutant("cluster/members.py", "            self._replaced.remove(name)\n            end", "            end"),
    Mutant("cluster/members.py", "cordon = self._cordons.pop(name, None)", "cordon = self._cordons.get(name)"),
    Mutant("cluster/members.py", 'hears_routers if member.kind == "router" else hears_workers', "hears_workers"),
    Mutant("cluster/members.py", ' if member.kind == "router" else hears_workers', ""),
]

MUTANTS = [*_DECODE, *_CLUSTER, *_LATER]
