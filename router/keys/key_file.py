"""The file of API keys: YAML with one entry per key, by digest, with what the key allows.

keys:
  - key: sha256:9f86d0...          # `twostroke keys new NAME` prints the key, once, and this entry
    tenant: acme                   # keys of one tenant share prefixes, requests and one fair share
    models: [small]                # none: all
    priority: 0                    # the highest of its requests; lower numbers are served earlier
    requests_per_minute: 600
    tokens_per_minute: 1000000
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...core.errors import ConfigError
from ...core.request import HIGHEST_PRIORITY, LOWEST_PRIORITY, Allowance
from .digests import check_digest, digest_of
from .grants import Grant, tenant_of

MAX_FILE_BYTES = 16 << 20
MAX_KEYS = 100_000
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("must have 1 to 64 letters, digits and . _ -")
    return name


Name = Annotated[str, BeforeValidator(_named)]


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    key: Annotated[str, BeforeValidator(check_digest)] = Field(repr=False)
    tenant: Name | None = None  # None: this key alone is a tenant
    isolation_domain: Name | None = None  # None: the tenant's
    models: tuple[str, ...] = ()
    priority: int = Field(0, ge=HIGHEST_PRIORITY, le=LOWEST_PRIORITY)
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    share: float = Field(1.0, gt=0, le=1000)
    monitor: bool = False
    manage: bool = False

    def grant(self) -> Grant:
        """What the key allows. A named domain never equals that of a bare key or of the public."""
        unnamed = tenant_of(digest_of(self.key))
        tenant = f"tenant-{self.tenant}" if self.tenant else unnamed
        domain = f"domain-{self.isolation_domain}" if self.isolation_domain else tenant
        allowance = Allowance(unnamed, self.requests_per_minute, self.tokens_per_minute, self.share)
        return Grant(tenant, domain, self.models, self.priority, self.monitor, allowance, self.manage)


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: tuple[KeyEntry, ...] = Field(max_length=MAX_KEYS)


def grants_in(path: Path) -> dict[bytes, Grant]:
    """The keys of a file, by digest.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong. The message names entry and field, and no key.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ConfigError(f"router.api_key_file {path} has more than {MAX_FILE_BYTES} bytes; split the tenants")
        read = _Keys.model_validate(yaml.safe_load(text) or {})
    except OSError as error:
        raise ConfigError(f"router.api_key_file {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"router.api_key_file {path} is no YAML{where}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        is_misspelt = first["type"] == "extra_forbidden" and first["loc"][0] == "keys"
        why = f" is not a setting; there are {', '.join(KeyEntry.model_fields)}" if is_misspelt else f": {first['msg']}"
        raise ConfigError(f"router.api_key_file {path}: {place}{why}") from None
    grants = {digest_of(entry.key): entry.grant() for entry in read.keys}
    if len(grants) < len(read.keys):
        raise ConfigError(f"router.api_key_file {path} has a key twice; give each entry a key of its own")
    return grants


def new_key() -> str:
    """A new key of 256 random bits."""
    return f"sk-{secrets.token_urlsafe(32)}"
