"""Mutants of paired channels: their ends, who makes them, and who accepts them."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant(
        "kv/handover/paired_transfers.py",
        "        if not self.is_open or not 0 < num_bytes <= self._slots.slot_bytes:\n",
        "        if not self.is_open:\n",
    ),
    Mutant("kv/handover/paired_transfers.py", "        self._free.append(action.slot)\n", ""),
    Mutant(
        "kv/handover/paired_transfers.py",
        "                self.channel.release(filled.slot, self._host.now_s())\n",
        "                pass\n",
    ),
    Mutant("kv/handover/paired_transfers.py", "                    took(None)\n", "                    pass\n"),
    Mutant("kv/handover/paired_transfers.py", "elif len(handover.here) < handover.most:\n", "elif True:\n"),
    Mutant(
        "kv/handover/paired_transfers.py",
        "        if planes is not None or is_repeated or self._end.state is not LinkState.OPEN:\n",
        "        if planes is not None or is_repeated:\n",
    ),
    Mutant("kv/handover/paired_transfers.py", "            self._early.append(said)\n", "            pass\n"),
    Mutant(
        "kv/handover/paired_transfers.py",
        "            self._host.say(pb.PairMessage(refused=pb.PairRefused(reason=self.reason)))\n",
        "            pass\n",
    ),
    Mutant(
        "kv/handover/paired_transfers.py",
        "        is_repeated = transfer <= handover.last_claimed\n",
        "        is_repeated = False\n",
    ),
    Mutant("decode_worker/pairs.py", "            self.over(address, why)\n", "            pass\n"),
    Mutant("prefill_worker/pairs.py", "            self.over(hello)\n", "            pass\n"),
    Mutant("decode_worker/paired_peers.py", "            self._begin(peer)\n", "            pass\n"),
    Mutant("decode_worker/paired_peers.py", "        self._known(self._peers[peer])\n", "        pass\n"),
    Mutant("prefill_worker/paired_peers.py", "        if not self._policy.may_pair:\n", "        if False:\n"),
    Mutant("prefill_worker/service.py", "            sender.pair()\n", "            pass\n"),
    Mutant("decode_worker/pull.py", "            self._pair.close_key(self._pair_key)\n", "            pass\n"),
    Mutant(
        "decode_worker/pull.py",
        "        while self._arrived and self._arrived[0].is_whole:\n",
        "        while self._arrived:\n",
    ),
]
