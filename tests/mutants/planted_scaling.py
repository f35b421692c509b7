"""Mutants of what changes a running cluster: the planner's refusals, places, rolling restarts, workers that go."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant(
        "cluster/planner/law.py",
        "if self._pending.changes_machines or self._pending.changes_role or self._refusal:",
        "if self._pending.changes_machines or self._pending.changes_role:",
    ),
    Mutant("cluster/planner/law.py", "        self._pending.refused(count)\n", ""),
    Mutant("cluster/planner/queueing.py", "    return load.mean_s >= target.ttft_s\n", "    return False\n"),
    Mutant("cluster/operations/room.py", "                self._free.remove(place)\n", ""),
    Mutant("cluster/operations/room.py", "        self._next[role.value] += 1\n", ""),
    Mutant("cluster/operations/room.py", "self._bytes_of(place) * num_loading", "self._bytes_of(place) * 0"),
    Mutant("cluster/operations/room.py", "g not in used and g not in cordoned", "g not in used"),
    Mutant("cluster/operations/room.py", "if g not in used and g not in cordoned]", "if g not in cordoned]"),
    Mutant("cluster/operations/room.py", 'if place.device == "cuda" and place.gpu in cordoned:', "if False:"),
    Mutant("cluster/operations/room.py", "on_gpu[place.gpu] >= self._most_on_gpu[place.gpu]", "False"),
    Mutant("cluster/operations/room.py", "port = member.metrics_port and 0  #", "port = member.metrics_port  #"),
    Mutant("cluster/operations/rolling.py", "if each.name != member.name and each.role", "if each.role"),
    Mutant("cluster/operations/rolling.py", "member.name and each.role is not Role.PREFILL]", "member.name]"),
    Mutant("cluster/operations/rolling.py", "(m.role is not Role.PREFILL, m.name)", "m.name"),
    Mutant(
        "cluster/members.py",
        "            self.forget(name)\n            return None\n        if name in self._rep",
        "            pass\n        if name in self._rep",
    ),
    Mutant("cluster/members.py", "        if frees_place:\n", "        if True:\n"),
    Mutant("cluster/members.py", "        self.room.restore(now.free_places, now.next_numbers)\n", ""),
    Mutant("cluster/members.py", "            self._devices.take(member.gpu)\n", "            pass\n"),
    Mutant("cluster/members.py", "            told.pop(name, None)\n", "            pass\n"),
    Mutant(
        "cluster/supervisor.py",
        "        await self._end_of(name)\n        self._members.book.want",
        "        self._members.book.want",
    ),
    Mutant(
        "router/requests/lifecycle.py", "is_lost or run.has_output or self._drains(run)", "is_lost or run.has_output"
    ),
]
