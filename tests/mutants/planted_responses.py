"""Mutants of stored and numbered responses, and of KServe's tensors."""

from __future__ import annotations

from mutant import Mutant

_RESPONSES = "router/api/dialects/responses"

MUTANTS = [
    Mutant(
        f"{_RESPONSES}/items.py",
        '        if is_said and any(one["type"] != "reasoning" for one in turn):\n',
        "        if False:\n",
    ),
    Mutant(
        f"{_RESPONSES}/items.py",
        'part["text"] for part in item["content"] or item["summary"]',
        'part["text"] for part in item["content"]',
    ),
    Mutant(f"{_RESPONSES}/items.py", "    if num_items > MAX_ITEMS:\n", "    if num_items > MAX_ITEMS + 1:\n"),
    Mutant(f"{_RESPONSES}/tools.py", "    if others and not tools:\n", "    if others:\n"),
    Mutant(f"{_RESPONSES}/fields.py", "    if body.background and body.store is False:\n", "    if False:\n"),
    Mutant(
        f"{_RESPONSES}/reply.py",
        "        if self._open is None or self._open.kind != kind:\n",
        "        if self._open is None:\n",
    ),
    Mutant(
        f"{_RESPONSES}/reply.py",
        "            scores, self._shown = self._shown, []\n",
        "            scores = self._shown\n",
    ),
    Mutant(f"{_RESPONSES}/reply.py", "        self.num_events += 1\n", "        self.num_events += 2\n"),
    Mutant(f"{_RESPONSES}/reply.py", '        yield from self._close("incomplete")\n', ""),
    Mutant(f"{_RESPONSES}/streams.py", 'event["sequence_number"] > after]', 'event["sequence_number"] >= after]'),
    Mutant(
        f"{_RESPONSES}/streams.py",
        "            if proven is not None and place >= proven and reply.num_events <= after:\n",
        "            if False:\n",
    ),
    Mutant(f"{_RESPONSES}/items.py", "            if name not in known:\n", "            if name in unanswered:\n"),
    Mutant(f"{_RESPONSES}/items.py", "            unanswered.pop(name, None)\n", "            pass\n"),
    Mutant(f"{_RESPONSES}/items.py", "content = None if calls and not texts else", "content = None if not texts else"),
    Mutant(f"{_RESPONSES}/fields.py", "if name != LOGPROBS and name not in _INCLUDED_OF_NOTHING:", "if False:"),
    Mutant(f"{_RESPONSES}/tools.py", "if verbosity is not None and verbosity not in _VERBOSITIES:", "if False:"),
    Mutant(f"{_RESPONSES}/routes.py", "        check_calls(items)\n", ""),
    Mutant(f"{_RESPONSES}/routes.py", '"has_more": len(listed) > num,', '"has_more": len(listed) >= num,'),
    Mutant(
        f"{_RESPONSES}/kept.py",
        "                    async for _ in pieces:\n                        pass\n",
        "                    pass\n",
    ),
    Mutant(f"{_RESPONSES}/kept.py", "stored is None or not stored.asked.is_response:\n", "stored is None:\n"),
    Mutant(f"{_RESPONSES}/kept.py", "        if not stored.is_over:\n", "        if False:\n"),
    Mutant(
        "router/journal/journal.py", "and not entry.pieces and not entry.asked.runs_alone:", "and not entry.pieces:"
    ),
    Mutant("router/journal/journal.py", "entry.left_s is None or entry.asked.runs_alone:", "entry.left_s is None:"),
    Mutant("router/journal/journal.py", "for tenant, _ in self._bytes.most_common()]", "for tenant in self._bytes]"),
    Mutant("router/journal/journal.py", "        if not self._bytes[tenant]:\n", "        if False:\n"),
    Mutant("router/journal/merged.py", "any(piece.logprobs or piece.choice for", "any(piece.choice for"),
    Mutant("router/journal/streams.py", "self.num_safe(entry) if entry.asked.is_response else None", "None"),
    Mutant(
        "router/journal/redis_store.py",
        "        if not self.is_up or not is_waiting:\n",
        "        if not is_waiting:\n",
    ),
    Mutant("router/api/kserve/tensors.py", "if len(raw) < 4 or len(raw) != 4 + size:", "if len(raw) < 4:"),
    Mutant("router/api/kserve/tensors.py", "if raw and len(raw) != len(message.inputs):", "if False:"),
    Mutant("router/api/kserve/tensors.py", "any(size != 1 for size in tensor.shape) or ", ""),
    Mutant("router/api/kserve/tensors.py", "if raw is not None or one.name != field]", "if one.name != field]"),
    Mutant("router/api/kserve/tensors.py", "        struct.pack(_NUMBERS[kind][0], value)\n", "        pass\n"),
    Mutant("router/api/kserve/service.py", "replace(call, timeout_s=checked_left_s(context.time_remaining()))", "call"),
    Mutant("router/api/kserve/completions.py", "is not None or name in values:", "is not None:"),
    Mutant("router/api/kserve/completions.py", "not is_streamed and not excludes", "not excludes"),
    Mutant("router/api/kserve/completions.py", "    if (body.n or 1) > 1:\n", "    if False:\n"),
]
