"""Mutants of how processes find each other in Kubernetes."""

from __future__ import annotations

from mutant import Mutant

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
    Mutant("cluster/discovery/outage.py", "if not at_once and now_s", "if now_s"),
    Mutant("cluster/discovery/outage.py", "        self._said_at_s = now_s\n", ""),
    Mutant("worker/announcer.py", "silent_s > WORKER_LEASE.silence_s and not", "not"),
]
