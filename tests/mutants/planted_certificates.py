"""Mutants of certificates: roles, files that change, and connections with old ones."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant(
        "core/tls/callers.py",
        "    return caller is not None and caller in ALLOWED.get(method, frozenset())\n",
        "    return caller is not None and caller in ALLOWED.get(method, _EVERYBODY)\n",
    ),
    Mutant("core/tls/callers.py", "if len(found) == 1 else None", "if found else None"),
    Mutant("core/tls/pem.py", "            self._check(pem)\n        except", "            pass\n        except"),
    Mutant("core/tls/pem.py", "        if stamp == self._stamp:\n", "        if True:\n"),
    Mutant("core/tls/credentials.py", "        if present is used:\n", "        if True:\n"),
    Mutant(
        "core/tls/credentials.py",
        "require_client_authentication=wants_certificates",
        "require_client_authentication=False",
    ),
    Mutant("core/tls/rotating.py", "        if pem is not self._pem:\n", "        if False:\n"),
    Mutant("core/tls/identity.py", "        self.num_failed += 1\n", ""),
    Mutant("core/tls/handshake.py", "            return _flaw(pem)  #", "            return None  #"),
    Mutant("core/tls/rotating.py", "            connection.context = self._of_now()\n", "            pass\n"),
    Mutant(
        "core/tls/face.py",
        "            server_context(pem, wants_certificates=self.wants_certificates)\n",
        "            pass\n",
    ),
]
