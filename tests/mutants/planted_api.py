"""Mutants of what a router does with requests before they are routed, and of its journal."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant("router/api/grammar_checks.py", "        await turn.acquire()\n", ""),
    Mutant(
        "router/api/grammar_checks.py", "        except _Lost:\n            checker.end()\n", "        except _Lost:\n"
    ),
    Mutant("router/api/grammar_checks.py", "< AT_ONCE else", "<= AT_ONCE else"),
    Mutant("router/api/http/reading.py", "            self._admit()  # those behind it\n", ""),
    Mutant("router/api/http/reading.py", "                    break\n", "                    continue\n"),
    Mutant(
        "router/api/http/reading.py", "one.tenant == tenant or self._is_within(one) for", "one.tenant == tenant for"
    ),
    Mutant(
        "router/api/grammar_checks.py", "        turn.release()\n        if work.cancelled", "        if work.cancelled"
    ),
    Mutant("router/api/grammar_checks.py", "asyncio.timeout(min(WAIT_S, left_s))", "asyncio.timeout(WAIT_S)"),
    Mutant("router/api/grammar_checks.py", "        self._answers[key] = work.result()\n", "        pass\n"),
    Mutant("router/api/validate.py", "(call.messages, call.tools, call.documents)", "(call.messages,)"),
    Mutant("router/api/checks.py", "            num_chars += sum(map(len, islice(inner, enough)))\n", ""),
    Mutant("text/schemas.py", 'kept["format"] not in FORMATS', 'kept["format"] in FORMATS'),
    Mutant("text/schemas.py", '"properties", "patternProperties", "required"}', '"patternProperties", "required"}'),
    Mutant("text/schemas.py", ', "additionalProperties": False}\n    allowed', "}\n    allowed"),
    Mutant("text/schemas.py", "dict.fromkeys(allowed, values)", "dict.fromkeys(allowed, {})"),
    Mutant("router/api/chat.py", "expected.pop(0)", "expected.pop()"),
    Mutant(
        "router/journal/redis_store.py",
        "1 + len(claim.stored.pieces)",
        "len(claim.stored.pieces)",
        "the last piece is written twice, and `read_back` takes each number once",
    ),
    Mutant(
        "router/journal/redis_store.py",
        "                break\n            batches.append(raw)",
        "                continue\n            batches.append(raw)",
        "`read_back` ends at the number that is missing",
    ),
]
