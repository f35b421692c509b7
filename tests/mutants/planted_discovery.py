"""Mutants of how processes find each other in Kubernetes, and of the planner there."""

from __future__ import annotations

from mutant import Mutant

LEASE, OWED = "cluster/kubernetes/lease.py", "cluster/kubernetes/owed.py"
PODS = "cluster/kubernetes/pods.py"
SLICES, WATCHING = "cluster/discovery/slices.py", "cluster/discovery/watching.py"

MUTANTS = [
    Mutant(SLICES, 'is_ready=conditions.get("ready") is not False', 'is_ready=conditions.get("ready") is True'),
    Mutant(SLICES, "if endpoint.is_terminating and not wanted.with_terminating:", "if False:"),
    Mutant(SLICES, "is_usable = endpoint.is_ready or", "is_usable = True or"),
    Mutant(SLICES, "setdefault(endpoint.pod, {})", "setdefault(endpoint.host, {})"),
    Mutant(SLICES, " and endpoint.pod != wanted.without_pod", ""),
    Mutant(SLICES, "each.ports.get(wanted.port)", "next(iter(each.ports.values()), None)"),
    Mutant(SLICES, "min(by_family.items(), key=_preference)", "max(by_family.items(), key=_preference)"),
    Mutant(
        WATCHING, "self._slices = {each.name: each for each in slices}", "self._slices |= {s.name: s for s in slices}"
    ),
    Mutant(WATCHING, "self._slices.pop(name, None)", "pass"),
    Mutant(
        WATCHING, "        self._version = version\n        self._has_news = True\n", "        self._has_news = True\n"
    ),
    Mutant(WATCHING, "        if self._was_expired:\n            return List(self._wait_s(draw))\n", ""),
    Mutant(
        WATCHING,
        "            return Watch(self._version, self._wait_s(draw))\n",
        "            return Watch(self._version)\n",
    ),
    Mutant(WATCHING, "2 ** min(failures - 1, 20)) * (0.5 + draw)", "2 ** min(failures - 1, 20))"),
    Mutant(WATCHING, "self._failures += 1", "self._failures = 1"),
    Mutant(WATCHING, "        self._rest()\n        self._has_news = False\n", "        self._has_news = False\n"),
    Mutant(
        WATCHING,
        "        self._has_news = False\n        self._count()\n",
        "        self._count()\n",
    ),
    Mutant("cluster/discovery/outage.py", "if not at_once and now_s", "if now_s"),
    Mutant("cluster/discovery/outage.py", "        self._said_at_s = now_s\n", ""),
    Mutant(LEASE, "now_s - self._renewed_at_s < self.timing.renew_by_s", "True"),
    Mutant(
        LEASE, "        if record.version != self._seen[0]:\n            self._seen = (record.version, now_s)\n", ""
    ),
    Mutant(LEASE, "        self._renewed_at_s = None\n        if not record.holder", "        if not record.holder"),
    Mutant(
        LEASE,
        "        if record is None:\n            self._renewed_at_s = None\n",
        "        if record is None:\n",
    ),
    Mutant(LEASE, "not record.holder or now_s", "now_s"),
    Mutant(LEASE, "self._seen[1] > record.duration_s", "self._seen[1] > self.timing.renew_by_s"),
    Mutant(OWED, "            del self._debts[role]\n            return debt.count", "            return debt.count"),
    Mutant(OWED, "if now_s >= debt.due_s", "if debt.count"),
    Mutant(PODS, "max(found, key=lambda role: len(self.names[role]), default=None)", "found[0] if found else None"),
    Mutant(PODS, "int(found[3]) + 1 < replicas", "int(found[3]) < replicas"),
    Mutant(PODS, "fullmatch(worker)\n        return None", "match(worker)\n        return None"),
    Mutant(PODS, "replicas.get(Role(found[2]), 0)", "max(replicas.values())"),
    Mutant("cluster/kubernetes/objects.py", "is_unseen or old > 0)", "is_unseen)"),
    Mutant("cluster/kubernetes/objects.py", "is_unseen = 0 < seen", "is_unseen = 0 > seen"),
    Mutant("cluster/kubernetes/arm.py", 'goes_after=after.get(worker.name, "")', 'goes_after=""'),
    Mutant("cluster/kubernetes/process.py", "age_s <= within_s", "age_s <= within_s * 2"),
    Mutant("cluster/kubernetes/objects.py", "if error.status != CONFLICT or not left:", "if True:"),
    Mutant("cluster/kubernetes/objects.py", "max(0, int((scale", "max(1, int((scale"),
    Mutant("cluster/kubernetes/arm.py", "            self._ended.add(action.worker)\n", ""),
    Mutant("cluster/kubernetes/arm.py", "        if self._problems.get(what) != problem:", "        if True:"),
    Mutant("cluster/kubernetes/arm.py", "            if not self._holds():\n                return\n", ""),
    Mutant("cluster/kubernetes/arm.py", "            if not isinstance(step, Renew):\n", "            if False:\n"),
    Mutant("cluster/kubernetes/arm.py", "self._tenure.written(began_s)", "self._tenure.written(self._clock.now_s())"),
    Mutant("cluster/kubernetes/arm.py", "        if not is_ours or release:\n", "        if not is_ours:\n"),
    Mutant("cluster/discovery/endpoint_slices.py", "self._ending.wait(step.after_s)", "self._ending.wait(0.0)"),
    Mutant("cluster/discovery/names.py", "                    self.addresses = found\n", ""),
    Mutant("cluster/discovery/names.py", "                if found != self.addresses:\n", "                if True:\n"),
    Mutant("worker/announcer.py", "silent_s > WORKER_LEASE.silence_s and not", "not"),
]
