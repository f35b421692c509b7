"""Mutants of paired channels: their ends, who makes them, and who accepts them."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant(
        "kv/handover/transports/paired_end.py",
        "        if not self.is_open or not 0 < num_bytes <= self._slot_bytes:\n",
        "        if not self.is_open:\n",
    ),
    Mutant("kv/handover/transports/paired_end.py", "        self._free.append(action.slot)\n", ""),
    Mutant(
        "kv/handover/transports/paired_end.py",
        "                self.channel.release(filled.slot, time.monotonic())\n",
        "                pass\n",
    ),
    Mutant("kv/handover/transports/paired_end.py", "                    took(None)\n", "                    pass\n"),
    Mutant("kv/handover/transports/paired_end.py", "elif len(handover.here) < handover.most:\n", "elif True:\n"),
    Mutant(
        "kv/handover/transports/paired_end.py",
        "        if planes is not None or self._end.state is not LinkState.OPEN:\n",
        "        if planes is not None:\n",
    ),
    Mutant("kv/handover/transports/paired_end.py", "            self._early.append(said)\n", "            pass\n"),
    Mutant(
        "kv/handover/transports/paired_end.py",
        "                    self._say(pb.PairMessage(refused=pb.PairRefused(reason=self.reason)))\n",
        "                    pass\n",
    ),
    Mutant("decode_worker/pairs.py", "            self._begin(peer)\n", "            pass\n"),
    Mutant(
        "decode_worker/pairs.py", "            self._known(peer)\n\n        await", "            pass\n\n        await"
    ),
    Mutant("prefill_worker/pairs.py", "        if not self._policy.may_pair:\n", "        if False:\n"),
    Mutant("prefill_worker/pairs.py", "            del self._ends[hello.number]\n", "            pass\n"),
    Mutant("prefill_worker/service.py", "            sender.pair()\n", "            pass\n"),
    Mutant("decode_worker/pull.py", "            self._pair.close_key(self._pair_key)\n", "            pass\n"),
    Mutant(
        "decode_worker/pull.py",
        "        while self._arrived and self._arrived[0].is_whole:\n",
        "        while self._arrived:\n",
    ),
]
