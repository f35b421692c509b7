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
    Mutant("cluster/planner/law.py", " and worker.is_empty and not worker.goes_after:", " and worker.is_empty:"),
    Mutant("cluster/planner/law.py", 'w.goes_after in ("", *names)]', 'w.goes_after == ""]'),
    Mutant("cluster/planner/law.py", 'w.name not in names and w.goes_after in ("", *names)]', "w.name not in names]"),
    Mutant("cluster/planner/law.py", "            return self._make_way()\n", "            return None\n"),
    Mutant("cluster/planner/law.py", "self._live[other] if not worker.goes_after]", "self._live[other]]"),
    Mutant("cluster/planner/queueing.py", "    return load.mean_s >= target.ttft_s\n", "    return False\n"),
    Mutant("cluster/operations/room.py", "                self._free.remove(place)\n", ""),
    Mutant("cluster/operations/room.py", "        self._next[role.value] += 1\n", ""),
    Mutant("cluster/operations/room.py", "self._bytes_of(on) * num_loading[on.node]", "self._bytes_of(on) * 0"),
    Mutant("cluster/operations/room.py", "g not in used and g not in cordoned", "g not in used"),
    Mutant("cluster/operations/room.py", "if g not in used and g not in cordoned]", "if g not in cordoned]"),
    Mutant("cluster/operations/room.py", "place.node == self._here and place.gpu in cordoned:", "False:"),
    Mutant("cluster/operations/room.py", "num_on_gpu >= max(1, self._most_on_gpu[place.node, place.gpu])", "False"),
    Mutant("cluster/operations/room.py", "if moves and place.node not in machines)", "if moves)"),
    Mutant("cluster/operations/room.py", "        if member.node not in self._planned_nodes:\n", "        if False:\n"),
    Mutant(
        "cluster/operations/room.py",
        "key=lambda place: place.node != TO_COME",
        "key=lambda place: place.node == TO_COME",
    ),
    Mutant("cluster/wanted.py", "(count[gpu] + 1) * place.gpu_share <= 1", "True"),
    Mutant("cluster/wanted.py", "not there or _cores(there)", "_cores(there)"),
    Mutant("cluster/wanted.py", "_cores(there) + _cores([place]) <= node", "_cores(there) <= node"),
    Mutant("cluster/wanted.py", "elif node.machine.num_cores and (", "elif ("),
    Mutant("cluster/wanted.py", "if worker.node in cpus_of:", "if False:"),
    Mutant("cluster/wanted.py", "cpus = min(cpus, ", "cpus = max(cpus, "),
    Mutant("cluster/wanted.py", "sorted(found, key=lambda each: each[0])", "found"),
    Mutant("cluster/placement.py", "max(num_configured, sum(node.units", "max(0, sum(node.units"),
    Mutant("cluster/placement.py", "if not config.planner.new_nodes:\n", "if True:\n"),
    Mutant("cluster/operations/scaler.py", "found.num_to_come - len(self._awaiting)", "found.num_to_come"),
    Mutant("cluster/operations/scaler.py", "        if num_waiting < len(roles):\n", "        if False:\n"),
    Mutant(
        "cluster/operations/scaler.py", "            self._awaiting.remove((role, since_s))\n", "            pass\n"
    ),
    Mutant("cluster/operations/scaler.py", "        if self._config.max_workers is None:\n", "        if False:\n"),
    Mutant("cluster/operations/scaler.py", "if asked and asked != self._asked:", "if asked:"),
    Mutant("cluster/operations/room.py", "port = member.metrics_port and 0  #", "port = member.metrics_port  #"),
    Mutant("cluster/operations/departures.py", "                if departure.stays:\n", "                if False:\n"),
    Mutant("cluster/operations/departures.py", "            departure.stays = True\n", ""),
    Mutant("cluster/members.py", "if self.going.pop(name, None) is not None:", "if name in self.plans:"),
    Mutant("cluster/restarts.py", "Standing.READY, now_s, None\n", "Standing.STOPPED, now_s, None\n"),
    Mutant("engine/link/draining.py", "        return not undone.is_set()\n", "        return True\n"),
    Mutant("router/routing/fleet.py", "worker.leaving or load.draining or", "load.draining or"),
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
        "router/requests/lifecycle.py",
        "        drains = has_left or self._drains(run)\n",
        "        drains = has_left\n",
    ),
]
