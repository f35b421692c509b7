"""Mutants of what leaves out the layers that have windows, and of what must not use them then."""

from __future__ import annotations

from mutant import Mutant

PREFIXES = "router/routing/prefixes.py"

MUTANTS = [
    Mutant("kv/windows.py", "        del found[:1]  #", "        pass  #"),
    Mutant("kv/windows.py", "max(0, begin - windowed.tokens + 1)", "max(0, begin - windowed.tokens + 100)"),
    Mutant("kv/windows.py", "    begin = start - start % WINDOW_STEP\n", "    begin = start\n"),
    Mutant("kv/windows.py", "    return seen - seen % WINDOW_STEP\n", "    return seen\n"),
    Mutant("kv/windows.py", "    return first if first > held else 0\n", "    return first\n"),
    Mutant("kv/windows.py", "if first <= block < held", "if first < block < held"),
    Mutant("kv/windows.py", "    return held\n\n\ndef layer_runs", "    return stored\n\n\ndef layer_runs"),
    Mutant("kv/windows.py", "or stored >= num_tokens - 1 - (num_tokens - 1) % WINDOW_STEP", "or stored == num_tokens"),
    Mutant("kv/store/store.py", "        if lacking.any() and not without_windows:\n", "        if False:\n"),
    Mutant(
        "kv/store/store.py", "            self._lacking_generation[blocks, units] = generations\n", "            pass\n"
    ),
    Mutant(
        "kv/store/store.py",
        "        if self._windowed.size:\n            for held in ranges:\n",
        "        if False:\n            for held in ranges:\n",
    ),
    Mutant(
        "kv/store/store.py",
        "generations\n        self._lacking_generation[blocks, units] = _NOT_SEALED\n",
        "generations\n",
    ),
    Mutant(
        "kv/store/store.py",
        "self._lacking_generation[blocks, units] == generations",
        "self._lacking_generation[blocks, units] > 0",
        "every seal of another generation clears the mark, so that none of an earlier one is found",
    ),
    Mutant(
        "kv/store/store.py",
        "                store.clear(self._windowed.tolist(), blocks, units)\n",
        "                pass\n",
    ),
    Mutant("kv/store/store.py", "wanted[self._windowed] *= not lacks", "wanted[self._windowed] *= 1"),
    Mutant(
        "kv/cache/prefix.py",
        "        if not self._lacking:\n            return held\n",
        "        if True:\n            return held\n",
    ),
    Mutant(
        "kv/windows.py",
        "        held = found  # every start between here and there sees this block too\n    return held\n\n\ndef u",
        "        break\n    return held\n\n\ndef u",
    ),
    Mutant("kv/cache/prefix.py", "                self._replace(entry, result[i])\n", "                pass\n"),
    Mutant("kv/cache/prefix.py", "and i not in lacking:\n", "and True:\n"),
    Mutant(
        "kv/cache/prefix.py",
        "        self._pool.mark_plain(entry.block)\n        entry.block = block\n",
        "        entry.block = block\n",
    ),
    Mutant("kv/handover/sender.py", "(edge if start < edge < end else end)", "end"),
    Mutant("engine/commands.py", "            sequence.lacking.update(hash_blocks)\n", "            pass\n"),
    Mutant(
        "engine/commands.py",
        "            sequence.num_computed = self._lives.holdings.furthest_start(sequence, kept)\n",
        "            sequence.num_computed = kept - kept % HASH_BLOCK_TOKENS\n",
    ),
    Mutant("engine/commands.py", "                if command.how is Reading.ALL:\n                    break\n", ""),
    Mutant(
        "engine/commands.py",
        "            end = max(start, furthest * HASH_BLOCK_TOKENS)\n",
        "            pass\n",
    ),
    Mutant("engine/cache_manager.py", "        self._note_lacking(sequence)\n", ""),
    Mutant(
        "engine/cache_manager.py",
        "        sequence.lacking |= {number for number in swapped.lacking if number * HASH_BLOCK_TOKENS >= found}\n",
        "",
    ),
    Mutant(
        "engine/cache_manager.py",
        "        lacking = {number // span for number in sequence.lacking}\n",
        "        lacking = set[int]()\n",
    ),
    Mutant(
        "kv/cache/prefix.py",
        "        self._lacking.discard(entry.block)\n        self._note_layers(entry.key)\n",
        "        self._lacking.discard(entry.block)\n",
    ),
    Mutant(
        "kv/cache/prefix.py",
        "        stored += [key for key in self._changed",
        "        [] + [key for key in self._changed",
    ),
    Mutant(
        "kv/cache/prefix.py",
        "            self._note_layers(entry.key)  # it may come back",
        "            pass  # it may come back",
    ),
    Mutant("kv/cache/reach.py", "identities[(number + 1) * span - 1]", "identities[number * span]"),
    Mutant("kv/cache/reach.py", "        return num_held - num_held % (", "        return num_held + 0 * ("),
    Mutant("kv/cache/reach.py", "or block_tokens % HASH_BLOCK_TOKENS:", "or False:"),
    Mutant("router/routing/prefixes.py", "        slot.lacking.difference_update(listed)\n", ""),
    Mutant("router/routing/prefixes.py", "            if slot.reach != EVERYWHERE:\n", "            if False:\n"),
    Mutant("router/routing/prefixes.py", "if place < len(listed))", "if place < len(listed) - 1)"),
    Mutant("router/requests/choosing.py", "usable[: (facts.prompt_tokens - 1) // HASH_BLOCK_TOKENS]", "usable[:]"),
    Mutant("router/requests/foretold.py", "if run.error is not None or len(run.dispatches)", "if len(run.dispatches)"),
    Mutant("router/requests/foretold.py", "winner.prefill.worker_id == report", "winner.prefill.worker_id != report"),
    Mutant(
        PREFIXES,
        "slot.lacking.discard(identity)\n                self._clear(identity, slot.bit)\n            self.num",
        "self._clear(identity, slot.bit)\n            self.num",
    ),
    Mutant(PREFIXES, "bits = lacking[: -(-len(listed) // 8)]", "bits = lacking"),
    Mutant(PREFIXES, "len(stored) % IDENTITY_BYTES or len(removed)", "(len(stored) + len(removed))"),
    Mutant("worker/watch.py", "lacking=bits_of(part, lacking)", "lacking=bits_of(identities, lacking)"),
]
