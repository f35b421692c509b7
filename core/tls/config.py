"""Settings of the certificates that processes of a cluster show each other."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from ..config import Section
from .callers import Caller

PEM_BEGINS = "-----BEGIN "
_ROLE = "{role}"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class TlsConfig(Section):
    """Certificates for the gRPC links inside the cluster, as files in PEM. They are read again when they change.

    `{role}` in a path is replaced by the role of the process (router, worker, operator). A launcher gives the text of a
    certificate in the place of a path, so that it is in no file.
    """

    ca: str = Field(description="file of the authority's certificate, or of several: all of them are trusted")
    cert: str = Field(description="file of this process's certificate; {role} is router, worker or operator")
    key: str = Field(repr=False, description="file of its private key, readable by its owner alone; {role} as in cert")
    deployment: str = Field("twostroke", description="name of the cluster in its certificates")

    @field_validator("deployment")
    @classmethod
    def _is_label(cls, name: str) -> str:
        if not _LABEL.fullmatch(name):
            raise ValueError("must be a label of a DNS name: small letters, digits and -, 63 at most, e.g. team-a")
        return name

    def of(self, caller: Caller) -> TlsConfig:
        """These settings for a process of one role."""
        update = {name: getattr(self, name).replace(_ROLE, caller.value) for name in ("ca", "cert", "key")}
        return self.model_copy(update=update)
