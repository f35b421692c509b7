"""Mutants of recurrent states and their snapshots."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant("kv/cache/states.py", "range(held, 0, -self._hash_blocks)", "range(held, 0, -1)"),
    Mutant("kv/cache/states.py", "            self._snapshots[place].is_passing = False\n", ""),
    Mutant("kv/cache/states.py", "            self._snapshots[known].is_passing &= is_passing\n", ""),
    Mutant(
        "kv/cache/states.py", "snapshot.identity == identity and snapshot.is_passing", "snapshot.identity == identity"
    ),
    Mutant("kv/cache/states.py", "            self.pool.mark_plain(BlockId(place - 1))\n", ""),
    Mutant("kv/cache/states.py", "        return self.pool.take(1)[0] + 1\n", "        return self.pool.take(1)[0]\n"),
    Mutant(
        "engine/states.py",
        "        self.pool.retain(place)\n        sequence.state_place = place\n",
        "        sequence.state_place = place\n",
    ),
    Mutant("engine/states.py", "(held * HASH_BLOCK_TOKENS, last)", "(last,)"),
    Mutant(
        "engine/states.py",
        "(len(sequence.tokens) - 1) // self._block_tokens",
        "len(sequence.tokens) // self._block_tokens",
    ),
    Mutant(
        "engine/states.py",
        "            if self.pool.num_free <= self._num_seats:\n",
        "            if self.pool.num_free < 1:\n",
    ),
    Mutant("engine/states.py", "        self.pool.give_back(move.source)\n", ""),
    Mutant(
        "engine/states.py",
        "            marks.append((wanted - start, self.pool.take()))",
        "            marks.append((wanted, self.pool.take()))",
    ),
    Mutant("engine/states.py", "            self.pool.pass_on(*sequence.passing)\n", "            pass\n"),
    Mutant("engine/states.py", "        if move is not None:\n            self._drop(move)\n", "        pass\n"),
    Mutant(
        "engine/states.py",
        "        sequence.state_place, sequence.passing = 0, None\n",
        "        sequence.state_place = 0\n",
    ),
    Mutant("engine/states.py", "        sequence.wanted_states.clear()\n", ""),
    Mutant("engine/states.py", "or not 0 < end <= published", "or not 0 < end < published"),
    Mutant("engine/states.py", "in sorted(at for at in", "in list(at for at in"),
    Mutant("engine/scheduler.py", "                states.want(work, common * HASH_BLOCK_TOKENS)\n", ""),
    Mutant("engine/cache_manager.py", "held if self.states is None else self.states.matched(findable, held)", "held"),
    Mutant("engine/cache_manager.py", "return step.start if self.states is not None else", "return"),
    Mutant("engine/cache_manager.py", "            self.states.release(sequence)\n", "            pass\n"),
]
