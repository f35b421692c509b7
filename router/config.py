"""Settings of the router and its two APIs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..core.config import Section, as_word
from ..core.errors import ConfigError
from ..text.parsing.parsers import AUTO, parsers_of
from ..text.templates.given import chat_template_of
from .keys.digests import DIGEST_PREFIX, check_digest, is_digest


def _listed(value: Any) -> Any:
    """Parse the text of a flag: a JSON list, as in vLLM, or words separated by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [word.strip() for word in value.split(",") if word.strip()]


Words = Annotated[tuple[str, ...], BeforeValidator(_listed)]


MIN_KEY_CHARS = 8  # shorter keys can be found by trial
GOOD_KEY_CHARS = 16


class RouterConfig(Section):
    """Addresses, keys and limits of the router."""

    host: str = Field("127.0.0.1", description="address of both faces; another than loopback needs insecure=true")
    port: int = Field(8000, ge=0, le=65535, description="HTTP (OpenAI API, metrics)")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC (the SDK)")
    internal_host: str = Field(
        "127.0.0.1", description="address of the port for workers; another than loopback needs insecure=true"
    )
    internal_port: int = Field(0, ge=0, le=65535, description="where workers announce themselves; 0 = any")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="name of this router in status, metrics and logs; none: router-PID",
    )
    peers: Words = Field(
        (), description="host:port of the other routers' internal ports: explain, abort, status and metrics ask them"
    )
    peers_at: Words = Field(
        (),
        description="k8s://SERVICE.NAMESPACE:PORT: the routers of a Kubernetes Service, at their internal port; needs "
        "router.name, the name of this router's own pod",
    )
    shared_ports: bool = Field(
        False, description="share port and grpc_port with other routers of this user on this machine (SO_REUSEPORT)"
    )
    insecure: bool = Field(
        False, description="allow a host that others can reach, without certificates, with or without keys"
    )
    ssl_certfile: str | None = Field(
        None, description="file of the certificate that clients see, with its chain; read again when it changes"
    )
    ssl_keyfile: str | None = Field(None, description="file of its private key; none: it is in ssl_certfile")
    ssl_ca_certs: str | None = Field(
        None, description="file of the authorities whose certificates clients must show; none: they show none"
    )
    api_keys: tuple[str, ...] = Field(
        (),
        repr=False,
        description="accepted keys, 16 characters or more, or their digests (sha256:...); none: no authentication",
    )
    api_key_file: Path | None = Field(
        None, description="YAML file of more keys with what each allows; read again when it changes"
    )
    operator_key: str | None = Field(
        None, repr=False, description="digest of a key for whoever manages the cluster; `serve` makes one"
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="of one message; a larger one is refused")
    max_bodies_bytes: int = Field(
        24 << 20,
        ge=1024,
        description="of all messages that are read at once, over HTTP and gRPC; more wait, then get a 429",
    )
    max_connections: int = Field(
        4096, ge=1, description="HTTP connections; at the bound the longest idle one is closed, or a new one gets a 503"
    )
    runtime_lora: bool = Field(
        False,
        description="serve POST /v1/load_lora_adapter and /v1/unload_lora_adapter, which read directories of the "
        "workers; with keys, for those alone that may manage the cluster",
    )
    strict: bool = Field(False, description="refuse unknown fields of a body instead of naming them in the response")
    allowed_hosts: Words = Field(
        (), description="names that clients may ask this router by, '*.name': below it, '*': any; loopback ones always"
    )
    allowed_origins: Words = Field((), description="origins whose web pages may use this router; '*': all")
    allowed_methods: Words = Field(("*",), description="methods that pages of these origins may use")
    allowed_headers: Words = Field(("*",), description="headers that pages of these origins may send")
    allow_credentials: bool = Field(False, description="whether browsers may send cookies along")
    max_choices: int = Field(8, ge=1, le=128, description="largest n")
    max_prompts: int = Field(256, ge=1, description="most prompts in one request; more than one: completions only")
    max_running: int = Field(
        512,
        ge=1,
        description="requests under way, more get a 429; default: twice what decode workers run, 512 at least",
    )
    max_running_tokens: int = Field(
        2_000_000,
        ge=1,
        description="prompt and asked-for tokens under way, 1,024 where none are asked for; default: twice what decode "
        "workers hold, 2,000,000 at least",
    )
    default_max_tokens: int | None = Field(
        None, ge=1, description="of a chat that says nothing; none: until it ends or the context is full"
    )
    max_wait_s: float = Field(
        60.0, gt=0, description="longest predicted wait for a free worker; a request that would wait longer gets a 429"
    )
    request_timeout_s: float = Field(
        3600.0, gt=0, description="longest life of a request; clients give theirs, and leaving ends it at once"
    )
    client_buffer_pieces: int = Field(1024, ge=16, description="pieces kept for a slow client before it is dropped")
    slow_client_s: float = Field(10.0, gt=0, description="how long a client may leave that buffer full")
    worker_patience_s: float = Field(2.0, ge=0, description="how long a request waits for a worker that is on its way")
    worker_return_s: float = Field(
        30.0,
        ge=0,
        description="how long a request waits for a lost decode worker that no other replaces",
    )
    kv_journal: Annotated[Literal["off", "buddy"], BeforeValidator(as_word)] = Field(
        "off",
        description="buddy: another worker keeps a copy of each stream's KV, which need not be computed again if its "
        "decode worker is lost",
    )
    chat_template: str | None = Field(
        None,
        repr=False,
        description="Jinja source, or the file that it is read from once, instead of the checkpoint's chat template",
    )
    tool_parser: str = Field(
        AUTO, description="format of the model's tool calls; auto: the chat template's; none: they stay content"
    )
    reasoning_parser: str = Field(
        AUTO, description="format of the model's reasoning; auto: the chat template's; none: it stays content"
    )
    local_prefill: bool = Field(True, description="decode workers may prefill where that is predicted to be quicker")
    resume_grace_s: float = Field(
        30.0, ge=0, description="how long a resumable request is computed on without its client, before it is cancelled"
    )
    journal_s: float = Field(300.0, gt=0, description="how long a resumable request is kept after its end")
    responses_s: float = Field(3600.0, gt=0, description="how long a stored response is kept after its end")
    journal_url: str | None = Field(
        None,
        repr=False,
        pattern=r"^(rediss?|unix)://",
        description="Redis 7 or later, where others find resumable requests of a router that died; none: memory only",
    )
    journal_requests: int = Field(4096, ge=1, description="most resumable requests and stored responses kept")
    journal_bytes: int = Field(64 << 20, ge=1 << 20, description="most memory of what is kept of them")
    decision_log: Path | None = Field(None, description="JSONL file of every decision")

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse values that cannot be the name in a Host header."""
        for name in names:
            if "/" in name or (name.count(":") == 1 and not name.startswith("[")):
                raise ValueError(f"{name!r} is not the name of a host; give it without scheme, port and path")
        return names

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse values that cannot be an Origin header."""
        for origin in origins:
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise ValueError(f"{origin!r} is not an origin; it has a scheme and no path: http://localhost:3000")
        return origins

    @field_validator("chat_template")
    @classmethod
    def _is_read(cls, value: str | None) -> str | None:
        """Replace the name of a file by its text, so that members on other machines need no such file."""
        return None if value is None else chat_template_of(value)

    @field_validator("api_keys")
    @classmethod
    def _are_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse keys that are empty or can be guessed. No message shows a key."""
        for place, key in enumerate(keys, 1):
            which = f"key {place} of {len(keys)}"
            if is_digest(key):
                try:
                    check_digest(key)
                except ValueError as error:
                    raise ValueError(f"{which} {error}") from None
                continue
            if not key.strip():
                raise ValueError(f"{which} is empty: is a variable unset? For no keys, leave the list out")
            if not re.fullmatch("[!-~]+", key):
                raise ValueError(
                    f"{which} has a character that no header can carry, or a space; use letters, digits, -"
                )
            if len(key) < MIN_KEY_CHARS:
                raise ValueError(
                    f"{which} has {len(key)} characters; {MIN_KEY_CHARS} are the least, {GOOD_KEY_CHARS} or more are "
                    "safe: openssl rand -hex 24"
                )
        if len(set(keys)) < len(keys):
            raise ValueError("two of them are the same; give each tenant a key of its own")
        return keys

    @field_validator("operator_key")
    @classmethod
    def _is_digest(cls, key: str | None) -> str | None:
        """Refuse a plain key: only its digest is needed here."""
        return None if key is None else check_digest(key)

    @model_validator(mode="after")
    def _has_parsers(self) -> RouterConfig:
        """Refuse names of parsers that are unknown, or do not go together."""
        try:
            parsers_of(None, self.tool_parser, self.reasoning_parser)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return self

    @model_validator(mode="after")
    def _has_a_certificate(self) -> RouterConfig:
        """Refuse parts of a certificate without the certificate."""
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ValueError("ssl_keyfile and ssl_ca_certs need ssl_certfile (--ssl-certfile)")
        return self

    @property
    def may_be_public(self) -> bool:
        """Whether the faces may have an address that others can reach: TLS, and clients who prove who they are."""
        return self.insecure or bool(self.ssl_certfile and (self.has_keys or self.ssl_ca_certs))

    @property
    def has_keys(self) -> bool:
        """True if clients need a key."""
        return bool(self.api_keys or self.api_key_file)

    @property
    def metrics_keys(self) -> tuple[str, ...]:
        """Keys and digests for /metrics of workers. Workers do not have the file: where it has all keys, none fits."""
        own = (*self.api_keys, *((self.operator_key,) if self.operator_key else ()))
        return (own or (f"{DIGEST_PREFIX}{'0' * 64}",)) if self.has_keys else ()

    @property
    def has_tenants(self) -> bool:
        """True if clients may be of several tenants."""
        return len(self.api_keys) > 1 or self.api_key_file is not None

    @property
    def num_weak_keys(self) -> int:
        """Number of accepted keys that are shorter than recommended."""
        return sum(len(key) < GOOD_KEY_CHARS and not is_digest(key) for key in self.api_keys)
