"""Mutants of the verdict on GPUs, and of what is done with it."""

from __future__ import annotations

from mutant import Mutant

_VERDICT = "worker/gpu/verdict.py"

MUTANTS = [
    Mutant(_VERDICT, "            if CONTAINED not in self._num_xids:\n", "            if True:\n"),
    Mutant(
        _VERDICT,
        "        elif code == CONTAINED:\n            self._doubt_since_s = None\n",
        "        elif code == CONTAINED:\n            pass\n",
    ),
    Mutant(_VERDICT, "            action = Action.RESTART\n", "            pass\n"),
    Mutant(_VERDICT, "elif reading.recovery in _DRAINED_BY and not is_first:", "elif reading.recovery in _DRAINED_BY:"),
    Mutant(
        _VERDICT,
        "            self._first_uncorrected = errors\n        elif",
        "            self._first_uncorrected = 0\n        elif",
    ),
    Mutant(_VERDICT, "        if action > self._action:\n", "        if action is not self._action:\n"),
    Mutant(
        _VERDICT,
        "self._lets_work_end = self._lets_work_end and lets_work_end",
        "self._lets_work_end = lets_work_end",
    ),
    Mutant(_VERDICT, "            self._throttled_since_s = None\n            seen_s", "            seen_s"),
    Mutant(
        _VERDICT,
        "            if seen_s is None or now_s - seen_s >= limits.cool_after_s:\n",
        "            if True:\n",
    ),
    Mutant(_VERDICT, "now_s - self._throttled_since_s >= limits.throttled_after_s", "True"),
    Mutant(_VERDICT, "        if silence_s > self._limits.silent_after_s:\n", "        if False:\n"),
    Mutant(_VERDICT, "        elif kind is Failure.RESET_REQUIRED:\n", "        elif False:\n"),
    Mutant("worker/gpu/reading.py", "(self.clock_reasons or ClockReason(0)) & THROTTLED_BY", "self.clock_reasons"),
    Mutant(
        "worker/gpu/visible.py",
        "        if name is None:\n            break\n",
        "        if name is None:\n            continue\n",
    ),
    Mutant("worker/gpu/nvml.py", " and not is_void:", ":"),
    Mutant(
        "worker/gpu/nvml.py",
        "        if instance is not None and belongs_to not in (instance, _ANY_INSTANCE):\n",
        "        if False:\n",
    ),
    Mutant("worker/gpu/monitor.py", "            self._opened.clear()  # with", "            pass  # with"),
    Mutant("cluster/devices.py", "len(faults) > MAX_FAULTS and now_s - faults[0]", "now_s - faults[0]"),
    Mutant(
        "cluster/devices.py",
        "return self._spare.popleft() if self._spare else None",
        "return self._spare[0] if self._spare else None",
    ),
    Mutant("router/routing/costs.py", "            slower * (queue_ms + prefill_ms),\n", "            0.0,\n"),
    Mutant("router/routing/costs.py", "            slower * (decode_queue_ms + steps_ms),\n", "            0.0,\n"),
    Mutant("router/routing/cordoned.py", "                self._found.pop(gpu.uuid, None)\n", "                pass\n"),
]
