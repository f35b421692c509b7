"""Mutants of the doors: proofs inside, keys and bounds outside; and of the text that leaves."""

from __future__ import annotations

from mutant import Mutant

_INSIDE = [
    Mutant(
        "core/proof.py",
        "        if self.audience is not None and claim.audience != self.audience:\n",
        "        if False:\n",
    ),
    Mutant("core/proof.py", "        if claim.nonce in self._seen:\n", "        if False:\n"),
    Mutant("core/proof.py", "        if abs(ahead_ms) > WINDOW_MS:\n", "        if ahead_ms > WINDOW_MS:\n"),
    Mutant(
        "core/proof.py",
        "for text in (direction.value, claim.method, claim.audience):",
        "for text in (claim.method, claim.audience):",
    ),
    Mutant(
        "core/proof.py", "in (direction.value, claim.method, claim.audience):", "in (direction.value, claim.audience):"
    ),
    Mutant("core/proof.py", "(direction.value, claim.method, claim.audience):", "(direction.value, claim.method):"),
    Mutant("core/proof.py", 'claim.sent_ms.to_bytes(8, "big") + claim.nonce)', 'claim.sent_ms.to_bytes(8, "big"))'),
    Mutant(
        "core/proof.py",
        '    mac.update(claim.sent_ms.to_bytes(8, "big") + claim.nonce)\n',
        "    mac.update(claim.nonce)\n",
    ),
    Mutant("core/proof.py", 'mac.update(len(data).to_bytes(4, "big") + data)', "mac.update(data)"),
    Mutant("core/proof.py", "            self._oldest_ms = max(self._oldest_ms, sent_ms + 1)\n", ""),
    Mutant("core/proof.py", "self._by_age[0][0] < now_ms - WINDOW_MS:", "self._by_age[0][0] < now_ms:"),
    Mutant("core/proof.py", "        if claim.sent_ms < self._oldest_ms:\n", "        if False:\n"),
    Mutant("core/proof.py", "            self._oldest_ms = 0  #", "            pass  #"),
    Mutant("core/guard.py", "        if header is None and method == HEALTH_CHECK:\n", "        if header is None:\n"),
    Mutant("core/guard.py", "            self._health_watches -= 1\n", "            pass\n"),
    Mutant("core/guard.py", "        if self._health_watches >= MAX_HEALTH_WATCHES:\n", "        if False:\n"),
    Mutant("core/guard.py", "send_initial_metadata(((ANSWER_HEADER, answer),))", "send_initial_metadata(())"),
    Mutant("core/guard.py", "            self._said_at_s[error.fault] = now_s\n", ""),
    Mutant("core/inside.py", "        self._check(await self._call.initial_metadata())\n", ""),
    Mutant("core/inside.py", "        self._check(metadata)\n", ""),
    Mutant("core/inside.py", "if task is not None and task.cancelling():", "if True:"),
    Mutant(
        "core/inside.py",
        "                raise\n            # grpc.aio also",
        "                pass\n            # grpc.aio also",
    ),
    Mutant("checkpoint/safetensors_files.py", "if length > max_bytes:", "if False:"),
    Mutant("checkpoint/safetensors_files.py", "IndexError, RecursionError) as error", "IndexError) as error"),
    Mutant("checkpoint/safetensors_files.py", "not isinstance(offsets, list) or len(offsets) != 2 or ", ""),
    Mutant("checkpoint/adapters/config.py", "if path.exists() and not path.is_file():", "if False:"),
    Mutant("checkpoint/adapters/config.py", "file.read(MAX_CONFIG_BYTES + 1)", "file.read(MAX_CONFIG_BYTES)"),
    Mutant("worker/adapters.py", "if not name.isprintable():", "if False:"),
    Mutant(
        "core/inside.py",
        "            await self._prove()\n        await self._call.write(message)\n",
        "            pass\n        await self._call.write(message)\n",
    ),
    Mutant(
        "core/inside.py",
        "        if not self._is_proven:\n            await self._prove()\n        return await self._call.read()\n",
        "        if not self._is_proven:\n            pass\n        return await self._call.read()\n",
    ),
    Mutant("core/inside.py", "            self._call.cancel()\n            what", "            what"),
]

_OUTSIDE = [
    Mutant(
        "router/api/grpc/guard.py",
        "        if details.method in OPEN:\n",
        "        if not details.method.startswith(self._own):\n",
    ),
    Mutant(
        "router/api/grpc/guard.py",
        "            await _send_all(answer, write)\n        finally:\n            lease.give_back()\n",
        "            await _send_all(answer, write)\n        finally:\n            pass\n",
    ),
    Mutant("router/api/grpc/guard.py", "            self._num_calls[is_own] -= 1\n", "            pass\n"),
    Mutant("router/api/grpc/guard.py", "        lease.shrink(len(raw))\n", ""),
    Mutant("router/api/grpc/guard.py", "            if self._num_calls[is_own] > most:\n", "            if False:\n"),
    Mutant(
        "router/api/grpc/guard.py",
        "            async with asyncio.timeout(self._stall_s):\n",
        "            async with asyncio.timeout(None):\n",
    ),
    Mutant("router/api/grpc/guard.py", "and len(raw) > SMALL_BYTES:", "and False:"),
    Mutant("router/api/grpc/guard.py", "    check_bounds(raw, kind)\n", ""),
    Mutant(
        "core/call_reaper.py",
        "        call.add_done_callback(lambda _: ending.cancel())\n",
        "",
        survives="the timer finds a call that has ended: there is nothing to let go",
    ),
    Mutant("core/call_reaper.py", "        call.cancel()\n        self._stalled", "        self._stalled"),
    Mutant("core/call_reaper.py", "            self._sweep = None\n\n\ndef", "            pass\n\n\ndef"),
    Mutant("core/probes.py", "if not oldest.expired():", "if True:"),
    Mutant("core/probes.py", "                        oldest.reschedule(0.0)\n", "                        pass\n"),
    Mutant("core/probes.py", "            self._reaper.end_later(PROBE_TIMEOUT_S)\n", ""),
    Mutant(
        "router/api/grpc/guard.py",
        "        if self._tenant_calls[tenant] > self._max_tenant_calls:\n",
        "        if False:\n",
    ),
    Mutant("router/api/grpc/message_bounds.py", "            if num_fields > MAX_FIELDS:\n", "            if False:\n"),
    Mutant("router/api/grpc/message_bounds.py", "_num_varints(raw[start:place]) if is_packed else 1", "1"),
    Mutant("router/api/grpc/message_bounds.py", "            if place > end:\n", "            if False:\n"),
    Mutant(
        "router/api/grpc/message_bounds.py",
        "                todo.append((start, place, field.inner))\n",
        "                pass\n",
    ),
    Mutant(
        "router/api/grpc/message_bounds.py",
        "                if num_entries[field.name] > field.most:\n",
        "                if num_entries[field.name] > 2 * field.most:\n",
    ),
    Mutant(
        "router/api/grpc/message_bounds.py",
        "        value |= (byte & 0x7F) << shift\n",
        "        value = (byte & 0x7F) << shift\n",
    ),
    Mutant("router/api/http/structure.py", '        if is_escaped:\n            part = b"." + part[1:]\n', ""),
    Mutant("router/api/http/structure.py", "accumulate(chars == _QUOTE) ^ is_inside", "accumulate(chars == _QUOTE)"),
    Mutant("router/api/http/structure.py", "(depth + np.cumsum(_STEP[kinds]))", "np.cumsum(_STEP[kinds])"),
    Mutant(
        "router/api/http/structure.py", "                if not run and len(ends) > 1:\n", "                if False:\n"
    ),
    Mutant("router/api/http/structure.py", "        if count > most:\n", "        if count > 2 * most:\n"),
    Mutant(
        "router/api/http/structure.py",
        '        (depth, bounds.depth, "levels of lists and objects within each other"),\n',
        "",
    ),
    Mutant("router/api/http/structure.py", "_PAIRS.get(data[opening]) == data[closing : closing + 1]", "True"),
    Mutant(
        "router/api/http/structure.py",
        "(marks.kinds[inner] == _COMMA) & (marks.depths[inner] == marks.depths[first])",
        "marks.kinds[inner] == _COMMA",
    ),
    Mutant("router/api/http/bodies.py", "        lease.give_back()\n", "        pass\n"),
    Mutant("router/api/http/bodies.py", "(len(announced) > 20 or int(announced) > limit)", "len(announced) > 20"),
    Mutant("router/api/http/bodies.py", "unpacker.decompress(data, limit + 1)", "unpacker.decompress(data)"),
    Mutant(
        "router/api/http/bodies.py",
        "    if not unpacker.eof or unpacker.unused_data:\n",
        "    if unpacker.unused_data:\n",
    ),
    Mutant("router/api/http/bodies.py", "        if len(data) + len(part) > limit:\n", "        if False:\n"),
    Mutant(
        "router/api/http/bodies.py",
        "                async with asyncio.timeout(IDLE_S):\n",
        "                async with asyncio.timeout(None):\n",
    ),
    Mutant("router/api/http/bodies.py", "size_bytes + (limit if is_packed else 0)", "size_bytes"),
    Mutant("router/api/http/browser.py", "    if len(hosts) != 1:\n", "    if not hosts:\n"),
    Mutant(
        "router/api/http/browser.py",
        "bool(config.allowed_hosts) or (is_private and not config.has_keys)",
        "is_private and not config.has_keys",
    ),
    Mutant(
        "router/api/http/browser.py",
        "(is_private and not config.has_keys)\n        self._names",
        "is_private\n        self._names",
    ),
    Mutant("router/api/http/browser.py", "            _check_content_type(headers)\n", "            pass\n"),
    Mutant("router/api/http/browser.py", 'site not in ("cross-site", "same-site")', 'site != "cross-site"'),
    Mutant(
        "router/api/http/browser.py",
        ' and scope["path"].rstrip("/") not in PROBES:',
        ' and not scope["path"].startswith(PROBES):',
    ),
    Mutant("router/api/http/browser.py", "        _check_origin(headers)\n", ""),
    Mutant("router/api/validate.py", "_isolation_domain(grant.isolation_domain, call.cache_salt)", "grant.tenant"),
    Mutant(
        "router/api/validate.py",
        '    return f"{tenant}/salt-{digest.hexdigest()}"\n',
        '    return f"salt-{digest.hexdigest()}"\n',
    ),
    Mutant(
        "router/api/validate.py",
        "min(call.timeout_s or limits.request_timeout_s, limits.request_timeout_s)",
        "call.timeout_s or limits.request_timeout_s",
    ),
    Mutant("router/api/validate.py", "        tenant=grant.tenant,\n", ""),
    Mutant(
        "router/api/validate.py",
        "    if len(ids) >= model.max_model_len:\n",
        "    if len(ids) > model.max_model_len:\n",
    ),
    Mutant(
        "router/api/validate.py",
        "    if (beyond := max(ids)) >= model.vocab_size:",
        "    if (beyond := max(ids)) > model.vocab_size:",
    ),
    Mutant("router/api/validate.py", "isinstance(token_id, bool) or not", "not"),
]

_TEXT = [
    Mutant("text/stop.py", "            end, start = min(ends)\n", "            end, start = max(ends)\n"),
    Mutant(
        "text/stop.py", "range(min(len(text), len(stop) - 1), 0, -1)", "range(min(len(text), len(stop) - 2), 0, -1)"
    ),
    Mutant("text/stop.py", "seen.find(stop, max(0, num_old - len(stop) + 1))", "seen.find(stop, max(0, num_old))"),
    Mutant("text/stream.py", "may_stop=self._num_pushed > self._min_tokens).text", "may_stop=True).text"),
    Mutant(
        "text/stream.py",
        "out = self._stop.flush(text, may_stop=self._num_pushed > self._min_tokens)",
        "out = self._stop.flush(text, may_stop=True)",
    ),
    Mutant("text/stream.py", "self._text.flush() + mark", "mark"),
    Mutant("text/stream.py", "stop if skip_special_tokens else ())", "stop)"),
    Mutant("text/stream.py", "        self._num_unsettled = 0\n\n    def _show", "\n    def _show"),
    Mutant(
        "text/stream.py",
        "(self._spans[0][1] <= out or (self._stop.is_stopped and self._spans[0][0] < out))",
        "self._spans[0][1] <= out",
    ),
    Mutant(
        "text/stream.py",
        '        if self._stop.is_stopped:\n            return ""\n',
        "",
        survives="once stopped, `StopText` lets nothing through, and every token is settled: there is nothing to show",
    ),
    Mutant("text/incremental.py", "        while len(data) < 3 and", "        while len(data) < 1 and"),
    Mutant("text/incremental.py", '        self._said = tail.decode("utf-8", "replace")\n', ""),
    Mutant("text/incremental.py", "            return run[error.start : error.end + 1]\n", "            return run\n"),
    Mutant(
        "text/incremental.py",
        "run[error.start : error.end + 1]\n        return",
        "[]\n        return",
    ),
    Mutant(
        "text/incremental.py",
        "last = ids[-1] if ids[-1] not in self._byte_by_id else self._any_other",
        "last = ids[-1]",
    ),
    Mutant(
        "text/incremental.py", "            self._waiting += waiting\n", "            self._waiting = list(waiting)\n"
    ),
    Mutant("text/incremental.py", "        self._waiting = list(waiting)\n        return text", "        return text"),
    Mutant(
        "text/incremental.py",
        '        while self._num_said and text.startswith("\\ufffd"):\n',
        "        while False:\n",
    ),
    Mutant("text/incremental.py", "return tail if not codecs", 'return b"" if not codecs'),
    Mutant("text/incremental.py", "if not waiting or not first or self._said:", "if not waiting or not first:"),
    Mutant("text/incremental.py", 'set(after_fuse) <= {"Strip"}', "True"),
]

_CONNECTIONS = [
    Mutant("router/api/http/selector.py", "self._second.poll(0, MAX_EVENTS)", "self._second.poll(0)"),
    Mutant("router/api/http/selector.py", "self._second if fd in self._demoted", "self._first if fd in self._demoted"),
    Mutant("router/api/http/selector.py", "        self._demoted.discard(fd)\n", "        pass\n"),
    Mutant(
        "router/api/http/connections.py",
        "                if due_s > now_s:\n                    break\n",
        "",
        survives="a connection is looked at before its time, which changes nothing",
    ),
    Mutant(
        "router/api/http/connections.py", "                    connection.look(now_s)\n", "                    pass\n"
    ),
    Mutant("router/api/http/connection.py", "        self._among.demote(transport)\n", ""),
]

_LATER = [
    Mutant("router/api/http/connection.py", "            self._may_frame -= len(data)\n", "            pass\n"),
    Mutant("router/api/frontend.py", "        self._num_reading += len(calls)\n", "        self._num_reading += 1\n"),
    Mutant(
        "router/api/frontend.py",
        "            self._num_reading -= len(calls)\n            raise\n",
        "            raise\n",
    ),
    Mutant("router/api/frontend.py", "is_full=self._num_reading > self._num_loading", "is_full=False"),
    Mutant(
        "router/api/frontend.py",
        "        finally:\n            self._num_loading -= len(calls)\n",
        "        finally:\n            pass\n",
    ),
    Mutant(
        "router/api/batch.py",
        "            if has_begun or loop.time() >= end_s:",
        "            if loop.time() >= end_s:",
    ),
    Mutant(
        "router/api/http/connection.py", "if self._is_answering and not self._takes_back():", "if self._is_answering:"
    ),
    Mutant("router/api/http/connection.py", "or self.pipeline or cycle.response_started:", "or self.pipeline:"),
    Mutant("router/api/http/sse.py", '.encode("utf-8", "backslashreplace")', ".encode()"),
]

_PROCESSES = [
    Mutant("router/workers/links.py", "        self._is_closing = True\n", ""),
    Mutant("router/api/http/connection.py", 'if name.lower() == b"transfer-encoding" and', "if False and"),
    Mutant("core/hosted.py", "        keep_present_objects()\n", ""),
    Mutant("worker/main.py", "    keep_freed_memory()\n    switch_often()\n", "    keep_freed_memory()\n"),
    Mutant("worker/main.py", "    await starting\n    keep_present_objects()\n", "    await starting\n"),
    Mutant("cluster/launch/last_words.py", "    if code - 128 in _WANTED_ENDS:", "    if False:"),
]

MUTANTS = [*_PROCESSES, *_INSIDE, *_OUTSIDE, *_TEXT, *_CONNECTIONS, *_LATER]
