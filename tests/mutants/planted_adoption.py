"""Mutants of what a cluster without a supervisor is taken for, and of who is noticed to stand still."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant("cluster/deployment/adoption.py", "found.get(handle) == record.deployment}", "handle in found}"),
    Mutant("cluster/deployment/adoption.py", "    if not living:\n        return Anew(tuple(found))\n", ""),
    Mutant("cluster/deployment/adoption.py", "dead, _strays(found, living.values()))", "dead, ())"),
    Mutant(
        "cluster/deployment/adoption.py",
        "    return tuple(handle for handle in found if handle not in known)\n",
        "    return tuple(found)\n",
    ),
    Mutant("cluster/deployment/adoption.py", "    if record.release != given.release:", "    if False:"),
    Mutant("cluster/deployment/adoption.py", "    elif record.launcher != given.launcher:", "    elif False:"),
    Mutant("cluster/deployment/adoption.py", "return not is_asked if is_served else is_adopted", "return not is_asked"),
    Mutant("cluster/deployment/settings.py", "        values[_KEY] = UNSET\n", "        pass\n"),
    Mutant("cluster/deployment/settings.py", "before.keys() | now.keys()", "before.keys() & now.keys()"),
    Mutant("cluster/deployment/settings.py", "values[name] = str(path.absolute())", "pass"),
    Mutant("cluster/deployment/settings.py", "json.dumps([name, value]", "json.dumps([value]"),
    Mutant(
        "cluster/deployment/processes.py",
        "return identity_of(identity.pid) == identity",
        "return identity_of(identity.pid) is not None",
    ),
    Mutant("cluster/deployment/processes.py", 'return None if state in "ZX" else', "return"),
    Mutant("cluster/deployment/processes.py", "option == NAME_OPTION.encode() and ", ""),
    Mutant(
        "cluster/deployment/processes.py", "            os.killpg(identity.pid, signal.SIGKILL)\n", "            pass\n"
    ),
    Mutant("cluster/restarts.py", "member.stopped_looks + 1 if is_stopped else 0", "member.stopped_looks + is_stopped"),
    Mutant(
        "cluster/restarts.py",
        " or member.standing is Standing.STOPPED:\n            return False",
        ":\n            return False",
    ),
    Mutant("cluster/restarts.py", "                member.missing_since_s += pause_s\n", "                pass\n"),
    Mutant("cluster/restarts.py", "                member.since_s += pause_s\n", "                pass\n"),
    Mutant("router/routing/fleet.py", "now_s - self._ticked_s - TICK_S", "now_s - self._ticked_s"),
    Mutant("router/routing/known_worker.py", "max(LEAST_STALL_S, STALL_STEPS", "max(0.0, STALL_STEPS"),
    Mutant("router/routing/known_worker.py", "STALL_STEPS * self.slowdown * longest_ms", "STALL_STEPS * longest_ms"),
]
