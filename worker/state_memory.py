"""Memory of recurrent states in a worker, and the settings that models with such states do not serve yet. Pure."""

from __future__ import annotations

from typing import NamedTuple

from ..checkpoint.config import ModelConfig
from ..checkpoint.spec import ModelSpec
from ..core.errors import ConfigError
from ..core.request import Role
from ..engine.config import SpeculationConfig, StepConfig
from ..engine.states import STATES_PER_SEAT
from ..kv.config import CacheConfig

SHARE_OF_STATES = 4  # a quarter of the memory left after the weights, for what is not given
LEAST_SNAPSHOTS, SNAPSHOTS_PER_SEAT = 4, 4


class DecidedStates(NamedTuple):
    """Sequences that run at once, and states of a worker."""

    max_num_seqs: int
    num_snapshots: int
    num_states: int  # 0: the model has none
    num_bytes: int
    reason: str = ""


def decided_states(state_bytes: int, step: StepConfig, cache: CacheConfig, left: int, *, given: bool) -> DecidedStates:
    """Number of states of a worker: `STATES_PER_SEAT` for every sequence that runs, and snapshots.

    `state_bytes`: of one state; 0: the model has none. `left`: memory after the weights. `given`: somebody has set
    `step.max_num_seqs`; else it is lowered until the sequences' states fit their share of the memory.
    """
    seats, share = step.max_num_seqs, max(0, left) // SHARE_OF_STATES
    if not state_bytes:
        return DecidedStates(seats, 0, 0, 0)
    if not given:
        seats = min(seats, max(1, share // (STATES_PER_SEAT * state_bytes)))
    snapshots = cache.state_snapshots
    if snapshots is None:
        snapshots = max(LEAST_SNAPSHOTS, min(SNAPSHOTS_PER_SEAT * seats, share // state_bytes))
    count = STATES_PER_SEAT * seats + snapshots
    num_bytes = (1 + count) * state_bytes  # and the state before the first token
    reason = f"states of {state_bytes:,} bytes: {STATES_PER_SEAT} × {seats} sequences and {snapshots} snapshots"
    return DecidedStates(seats, snapshots, count, num_bytes, reason)


def refuse_beside_states(
    spec: ModelSpec, model: ModelConfig, cache: CacheConfig, speculation: SpeculationConfig
) -> None:
    """Refuse settings that are not served for models with recurrent layers.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    if spec.delta is None:
        return
    found = {
        "speculation.method": (speculation.method, "a state cannot go back behind a wrong guess"),
        "cache.swap_space": (cache.swap_space, "preempted sequences are computed again from a snapshot"),
        "model.lora_modules or enable_lora": (model.serves_adapters, "recurrent layers take no adapters yet"),
    }
    for name, (value, why) in found.items():
        if value:
            raise ConfigError(f"{name} is {value!r}, and {spec.architecture} has recurrent layers: {why}; leave it out")


def refuse_role(model_name: str, role: Role) -> None:
    """Refuse the roles of a hand-over, for a model with recurrent layers.

    Raises:
        ConfigError: the role is not combined.
    """
    if role is not Role.COMBINED:
        raise ConfigError(
            f"the role is {role.value}, and {model_name} has recurrent layers, whose states are not handed over "
            "in this release; start combined workers: --prefill 0, or --role combined"
        )
