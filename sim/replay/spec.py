"""The simulated cluster of a replay: how many workers of which role, and how fast each is; its parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ...core.errors import ConfigError
from ...core.request import Role
from ...decode_worker.policy import combined_policy, decode_policy
from ...engine.policy import RolePolicy, StepLimits
from ...prefill_worker.policy import prefill_policy
from ..scale.machine import H200_8B, Machine

MAX_WORKERS = 256
KV_BYTES_PER_TOKEN = 66_048  # of an 8B model with an FP8 cache, as in sim/scale/machine.py
HANDOVER_BYTES_PER_S = 40e9  # one 400 Gbit/s port, less 20 % for its protocol
STEP_LIMITS = StepLimits(max_num_seqs=256, max_batch_tokens=8192, max_waiting=1 << 30, max_waiting_tokens=1 << 50)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Workers of one machine type."""

    combined: int = 0
    prefill: int = 0
    decode: int = 0
    machine: Machine = H200_8B

    @property
    def roles(self) -> list[Role]:
        """The role of each worker."""
        return [Role.COMBINED] * self.combined + [Role.PREFILL] * self.prefill + [Role.DECODE] * self.decode

    def __str__(self) -> str:
        counts = [(self.combined, "combined"), (self.prefill, "prefill"), (self.decode, "decode")]
        workers = " + ".join(f"{count} {role}" for count, role in counts if count)
        return f"{workers} ({self.machine.name})"


def policy_of(role: Role, machine: Machine) -> RolePolicy:
    """The production scheduling policy of a role, with a GPU's step limits."""
    limits = replace(STEP_LIMITS, max_num_seqs=machine.max_num_seqs)
    return {Role.COMBINED: combined_policy, Role.PREFILL: prefill_policy, Role.DECODE: decode_policy}[role](limits)


def parse_cluster(text: str) -> ClusterSpec:
    """Read "combined=16" or "prefill=8,decode=8", optionally with ",machine=FILE": a JSON object of `Machine`'s fields.

    Raises:
        ConfigError: another form; names the part and the remedy.
    """
    counts: dict[str, int] = {}
    machine = H200_8B
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name == "machine":
            machine = _machine(Path(value))
        elif name in ("combined", "prefill", "decode") and value.isdecimal() and len(value) < 6:
            counts[name] = int(value)
        else:
            raise ConfigError(
                f"--cluster has the part {part!r}; must be combined=N, prefill=N, decode=N or machine=FILE, "
                "e.g. combined=16 or prefill=8,decode=8"
            )
    spec = ClusterSpec(**counts, machine=machine)
    if not 1 <= len(spec.roles) <= MAX_WORKERS:
        raise ConfigError(f"--cluster {text!r} has {len(spec.roles)} workers; must have 1 to {MAX_WORKERS}")
    if not spec.combined + spec.decode:
        raise ConfigError(f"--cluster {text!r} has no worker that decodes; add decode=N or combined=N")
    return spec


def _machine(path: Path) -> Machine:
    names = {field.name for field in fields(Machine)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--cluster machine={path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--cluster machine={path} is no JSON: {error}") from None
    if not isinstance(found, dict) or set(found) != names:
        raise ConfigError(
            f"--cluster machine={path} must be an object with exactly the fields {', '.join(sorted(names))}"
        )
    bad = [name for name in names - {"name"} if type(found[name]) not in (int, float) or not 0 < found[name] < 1e12]
    if bad:
        raise ConfigError(f"--cluster machine={path}: {bad[0]} is {found[bad[0]]!r}; must be a positive number")
    whole = {name: int(found[name]) for name in ("kv_capacity_tokens", "max_num_seqs")}
    return Machine(**{**found, "name": str(found["name"]), **whole})
