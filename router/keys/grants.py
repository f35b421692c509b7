"""API keys by their digests, and what each allows. Pure but for one random value per process. Knows no file."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...core.errors import KeyForbids, ModelNotFound, Unauthenticated
from ...core.request import Allowance
from .digests import digest_of, is_digest

PUBLIC = "public"  # tenant of all clients where there are no keys


@dataclass(frozen=True, slots=True)
class Grant:
    """What one key allows. The defaults are those of a bare key in `router.api_keys`."""

    tenant: str = PUBLIC  # owner of its requests: explains, aborts, and has one fair share
    isolation_domain: str = PUBLIC  # scope in which prefixes are shared
    models: tuple[str, ...] = ()  # empty: all
    priority: int = 0  # the highest that its requests may have: the lowest number
    may_monitor: bool = True  # read metrics and the state of the cluster, which tell about all tenants
    allowance: Allowance | None = None
    may_manage: bool = False  # load and unload adapters, which are directories of the workers' machines

    def check_model(self, name: str) -> None:
        """Check that requests of this key may use a model.

        Raises:
            ModelNotFound: they may not; the error is that of an unknown model and does not tell whether there is one.
        """
        if self.models and name not in self.models:
            raise ModelNotFound(f"no model {name!r} for this key; it has: {', '.join(self.models)}", param="model")

    def check_monitor(self) -> None:
        """Check that this key may read metrics and the cluster's state.

        Raises:
            KeyForbids: it may not.
        """
        if not self.may_monitor:
            raise KeyForbids("this key may not read metrics or the cluster's state; set `monitor: true` for it")

    def check_manage(self) -> None:
        """Check that this key may change what the cluster serves.

        Raises:
            KeyForbids: it may not.
        """
        if not self.may_manage:
            raise KeyForbids(
                "this key may not load or unload adapters; set `manage: true` for it in router.api_key_file"
            )


ANYONE = Grant(may_manage=True)
OPERATOR = Grant("operator", "operator", allowance=Allowance("operator"), may_manage=True)


def tenant_of(digest: bytes) -> str:
    """Tenant of a key without a named one, the same wherever the key stands in the configuration."""
    return "key-" + hashlib.blake2b(digest, digest_size=8, person=b"twostroke-tenant").hexdigest()


def bare_grant(digest: bytes) -> Grant:
    """Grant of a key in `router.api_keys`: everything, as a tenant of its own."""
    tenant = tenant_of(digest)
    return Grant(tenant, tenant, allowance=Allowance(tenant))


@dataclass(slots=True)
class KeyRing:
    """All accepted keys. `replace` exchanges them while others read, so one ring serves the whole process."""

    is_open: bool = True  # True: there are no keys, and nobody needs one
    _grants: dict[bytes, tuple[bytes, Grant]] = field(default_factory=dict, repr=False)  # by blinded digest
    _blind: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeyRing:
        """A ring of bare keys and digests; open if there are none."""
        digests = [digest_of(key) for key in keys]
        ring = cls(is_open=not digests)
        ring.replace({digest: bare_grant(digest) for digest in digests})
        return ring

    def __len__(self) -> int:
        return len(self._grants)

    def replace(self, grants: dict[bytes, Grant]) -> None:
        """Accept these keys, by digest, and no others. A ring that had keys does not open when it has none."""
        self._grants = {self._blinded(digest): (digest, grant) for digest, grant in grants.items()}

    def grant_of(self, api_key: str | None) -> Grant:
        """The grant of a presented key.

        The time depends on no byte of a known key: a digest is looked up under a random key of this process, and then
        compared in constant time.

        Raises:
            Unauthenticated: there are keys, and this is none of them.
        """
        if self.is_open:
            return ANYONE
        if api_key and not is_digest(api_key):  # who has read a digest in a configuration has no key
            presented = digest_of(api_key)
            known, grant = self._grants.get(self._blinded(presented), (b"", ANYONE))
            if hmac.compare_digest(known, presented):
                return grant
        raise Unauthenticated("the API key is missing or unknown; send 'Authorization: Bearer KEY'")

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=16, key=self._blind).digest()
