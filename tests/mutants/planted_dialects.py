"""Mutants of the dialects: Anthropic's messages and Ollama's chats as OpenAI's, and their answers."""

from __future__ import annotations

from mutant import Mutant

_DIALECTS = "router/api/dialects"
_ANTHROPIC = f"{_DIALECTS}/anthropic_requests.py"
_MESSAGE = f"{_DIALECTS}/anthropic_responses.py"
_OLLAMA = f"{_DIALECTS}/ollama_requests.py"
_REPLY = f"{_DIALECTS}/ollama_responses.py"

MUTANTS = [
    Mutant(_ANTHROPIC, '"stop": list(stops) or None', '"stop": None'),
    Mutant(_ANTHROPIC, "True if stops else None,  # so", "None,  # so"),
    Mutant(_ANTHROPIC, '["role"] == "assistant":\n', '["role"] == "user":\n'),
    Mutant(_ANTHROPIC, "        if texts:\n            yield", "        if False:\n            yield"),
    Mutant(_ANTHROPIC, "            texts = []\n        yield _result", "        yield _result"),
    Mutant(_ANTHROPIC, '"any": "required"', '"any": "auto"'),
    Mutant(_ANTHROPIC, '{"parallel_tool_calls": not single}', '{"parallel_tool_calls": single}'),
    Mutant(_ANTHROPIC, 'return bool(kind != "disabled")', "return True"),
    Mutant(_ANTHROPIC, "            thoughts.append(_string", "            str(_string"),
    Mutant(_ANTHROPIC, "or len(content) > MAX_PARTS:", "or False:"),
    Mutant(_ANTHROPIC, '"content": content or ""}', '"content": content}'),
    Mutant(_ANTHROPIC, "return Asked(parsed, stops, bool(wants_thoughts))", "return Asked(parsed, stops, True)"),
    Mutant(_MESSAGE, "            if self._open != kind:\n", "            if self._open is None:\n"),
    Mutant(
        _MESSAGE,
        "        for call in parsed.calls:\n            yield from self._close()\n",
        "        for call in parsed.calls:\n",
    ),
    Mutant(_MESSAGE, '"input_tokens": prompt - cached', '"input_tokens": prompt'),
    Mutant(_MESSAGE, 'reason == "end_turn":\n', "False:\n"),
    Mutant(_MESSAGE, 'self._blocks[-1]["type"] != kind', "False"),
    Mutant(_MESSAGE, "if parsed.reasoning and self._shows_thinking:", "if parsed.reasoning:"),
    Mutant(_OLLAMA, "            open_calls.remove(answered)\n", ""),
    Mutant(_OLLAMA, "if call[0] == name), open_calls[0])", "if call[0] == name), open_calls[-1])"),
    Mutant(_OLLAMA, "next((call for call in open_calls if call[0] == name), open_calls[0])", "open_calls[0]"),
    Mutant(_OLLAMA, '    if found["max_tokens"] == -2:\n', "    if False:\n"),
    Mutant(_OLLAMA, "            if value not in REFUSED_OPTIONS[name]:\n", "            if False:\n"),
    Mutant(_OLLAMA, "body.stream is not False", "bool(body.stream)"),
    Mutant(_OLLAMA, "        if chat is None or not body.system:\n", "        if chat is None:\n"),
    Mutant(_OLLAMA, "        elif body.system:\n", "        elif False:\n"),
    Mutant(_OLLAMA, "    if think not in _EFFORTS:\n", "    if False:\n"),
    Mutant(_REPLY, "says = parsed.content or parsed.calls or", "says = parsed.content or"),
    Mutant(_REPLY, "self._choice.reason is FinishReason.LENGTH else", "False else"),
    Mutant(_REPLY, "if parsed.reasoning and self._shows_thinking else {}", "if parsed.reasoning else {}"),
    Mutant(f"{_DIALECTS}/one_choice.py", "or self._last_id in self._ends:\n", "or False:\n"),
    Mutant(f"{_DIALECTS}/one_choice.py", "            self._held = found\n", ""),
    Mutant(f"{_DIALECTS}/one_choice.py", "sorted(stops, key=len, reverse=True)", "sorted(stops, key=len)"),
    Mutant(
        f"{_DIALECTS}/one_choice.py",
        "        self.usage = piece.usage or self.usage\n",
        "        self.usage = piece.usage\n",
    ),
    Mutant(f"{_DIALECTS}/errors.py", 'or path.startswith("/v1/messages/")', ""),
    Mutant(f"{_DIALECTS}/errors.py", "if error.http_status < 500 else", "if error.http_status < 400 else"),
    Mutant(
        f"{_DIALECTS}/door.py",
        "return call if timeout_s is None else replace(call, timeout_s=timeout_s)",
        "return call",
    ),
    Mutant(f"{_DIALECTS}/door.py", "[their_names.get(name, name) for name in names]", "names"),
    Mutant("router/api/grpc/call_wire.py", 'message.priority if message.HasField("priority") else None', "None"),
]
