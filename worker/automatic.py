"""Values of settings that are not given, decided for this machine, with the reasons. Pure: numbers in, decisions out.

A setting counts as given if a file, a variable or a flag has it, with any value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from ..checkpoint.activations import StepBytes
from ..core.config import Section
from ..core.errors import DoesNotFit
from ..engine.config import StepConfig
from ..kv.config import CacheConfig
from ..kv.sizing import MemoryFacts, PoolSize, size_pool
from ..kv.spec import KvSpec
from ..router.config import RouterConfig
from .state_memory import decided_states

Device = Literal["cpu", "cuda"]
S = TypeVar("S", bound=Section)

LARGE_GPU_BYTES = 64 << 30  # free memory of a GPU of 80 GB or more
LEAST_POOL_TOKENS = 64  # lower bound of cache.tokens
GPU_SHARE, CPU_SHARE = 0.9, 0.5  # of the memory left after the weights
PROCESS_BYTES = 300 << 20  # a worker without weights and pool: interpreter, torch, gRPC; 250 to 270 MiB measured
LOADED_BYTES_PER_S = 100 << 20  # of a slow or a network disk


@dataclass(frozen=True, slots=True)
class Decision:
    """Decided value of one setting, and its reason."""

    setting: str  # "step.max_num_seqs": its name in the configuration
    value: str
    reason: str


class ModelNeeds(Protocol):
    """Needs of a model, in its chosen dtypes."""

    @property
    def weight_bytes(self) -> int:
        """Memory of a worker's weights."""
        ...

    @property
    def kv_spec(self) -> KvSpec:
        """Layout of one token in the cache."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest context: as configured, or the checkpoint's."""
        ...

    @property
    def step_bytes(self) -> StepBytes:
        """Memory of a step's intermediate values, of all ranks."""
        ...

    @property
    def adapter_bytes(self) -> int:
        """Memory that is kept for adapters."""
        ...

    @property
    def state_bytes(self) -> int:
        """Memory of a sequence's recurrent state; 0: the model has none."""
        ...


class SizedWorker(NamedTuple):
    """Bounds of a worker's steps, its pool, its longest context, and the reasons."""

    step: StepConfig
    cache: CacheConfig
    max_model_len: int  # tokens
    pool: PoolSize
    decisions: list[Decision]
    activation_bytes: int = 0  # of all ranks, on a GPU
    num_states: int = 0  # recurrent states


def size_worker(
    model: ModelNeeds,
    step: StepConfig,
    cache: CacheConfig,
    device: Device,
    *,
    memory_bytes: int,
    device_bytes: int,
    wanted: int | None,
) -> SizedWorker:
    """Decide what a worker can hold. The plan of a cluster does so for all; a worker started by hand for itself.

    `memory_bytes`: the worker's share. `device_bytes`: free memory of its whole GPU. `wanted`: the configured context.

    Raises:
        DoesNotFit: nothing is left for the pool, or `wanted` does not fit it; with the arithmetic.
    """
    seats_given = "max_num_seqs" in step.model_fields_set
    step, decisions = decided_step(step, device, device_bytes)
    left = memory_bytes - model.weight_bytes - model.adapter_bytes
    states = decided_states(model.state_bytes, step, cache, left, given=seats_given)
    if states.num_states:
        step = step.model_copy(update={"max_num_seqs": states.max_num_seqs})
        cache = cache.model_copy(update={"state_snapshots": states.num_snapshots})
        seats = Decision("step.max_num_seqs", _told(step.max_num_seqs), "as given" if seats_given else states.reason)
        decisions = [seats if made.setting == seats.setting else made for made in decisions]
        decisions.append(Decision("cache.state_snapshots", _told(states.num_snapshots), states.reason))
    tokens, rows = step.max_num_batched_tokens, step.max_num_seqs
    activation_bytes = tokens * model.step_bytes.per_token + rows * model.step_bytes.per_row
    activation_bytes += cache.guarded_tokens * (model.kv_spec.bytes_per_token + model.kv_spec.bf16_bytes_per_token)
    facts = MemoryFacts(
        memory_bytes,
        model.weight_bytes,
        cache.swap_bytes,
        swaps_elsewhere=device == "cuda",
        ring_bytes=cache.handover_bytes,
        process_bytes=PROCESS_BYTES if device == "cpu" else 0,
        # On a CPU the half of the memory that the pool leaves is for them, too.
        activation_bytes=activation_bytes if device == "cuda" else 0,
        state_bytes=states.num_bytes,
        adapter_bytes=model.adapter_bytes,
        device_bytes=device_bytes if device == "cuda" else None,
    )
    given = cache
    pool, cache, more = decided_pool(model.kv_spec, cache, device, facts, step.max_num_seqs * model.max_model_len)
    context, decision = decided_context(model.max_model_len, wanted, pool, _ways_to_more(given, facts, pool))
    decisions += [*more, decision]
    return SizedWorker(step, cache, context, pool, decisions, facts.activation_bytes, states.num_states)


def decided_step(step: StepConfig, device: Device, device_bytes: int) -> tuple[StepConfig, list[Decision]]:
    """Bounds of a step. `device_bytes`: free memory of the worker's whole GPU; unused for "cpu"."""
    if device == "cpu":
        tokens, why = step.max_num_batched_tokens, "on a CPU: about a second of prefill that the others wait for"
        seqs, why_seqs = step.max_num_seqs, "on a CPU: more rows make a step longer in proportion"
    elif device_bytes >= LARGE_GPU_BYTES:
        tokens, why = 8192, f"on a GPU with {_gib(LARGE_GPU_BYTES)} free or more: fills its matrix units"
        seqs, why_seqs = 256, "on a GPU: a step reads the weights once for all of them"
    else:
        tokens, why = 2048, f"on a GPU with less than {_gib(LARGE_GPU_BYTES)} free: leaves memory to the pool"
        seqs, why_seqs = 256, "on a GPU: a step reads the weights once for all of them"
    wanted = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens}
    reasons = {"max_num_seqs": why_seqs, "max_num_batched_tokens": why}
    return _decide("step", step, wanted, reasons)


class DecidedPool(NamedTuple):
    """Size of a worker's pool, and the settings behind it."""

    size: PoolSize
    cache: CacheConfig
    decisions: list[Decision]


def decided_pool(spec: KvSpec, cache: CacheConfig, device: Device, facts: MemoryFacts, most_tokens: int) -> DecidedPool:
    """Size a worker's pool. `most_tokens`: all sequences of a step with the whole context each.

    Raises:
        DoesNotFit: raised by `size_pool`.
    """
    share = GPU_SHARE if device == "cuda" else CPU_SHARE
    others = (
        "the rest is for libraries and fragments"
        if device == "cuda"
        else "the rest is for other programs and cached files"
    )
    cache, decisions = _decide("cache", cache, {"memory_fraction": share}, {"memory_fraction": others})
    tokens = cache.tokens
    if tokens is not None:
        reason = "as given"
    elif device == "cpu":
        tokens, reason = most_tokens, f"at most {most_tokens:,}: all sequences of a step, the whole context each"
    else:
        reason = "by memory alone"
    assert cache.memory_fraction is not None
    pool = size_pool(spec, cache.block_size, tokens, cache.memory_fraction, facts)
    if tokens is None or pool.num_tokens < tokens - tokens % cache.block_size:
        reason += f"; memory holds {pool.num_tokens:,}"
    cache = cache.model_copy(update={"tokens": max(LEAST_POOL_TOKENS, pool.num_tokens)})
    return DecidedPool(pool, cache, [Decision("cache.tokens", f"{pool.num_tokens:,}", reason), *decisions])


def decided_context(context: int, wanted: int | None, pool: PoolSize, ways: str) -> tuple[int, Decision]:
    """Longest prompt with its answer, in tokens: `wanted`, or the checkpoint's `context` as far as the pool holds it.

    `ways`: to a larger pool, as text.

    Raises:
        DoesNotFit: `wanted` does not fit the pool.
    """
    name = "model.max_model_len"
    if wanted is not None and wanted > pool.num_tokens:
        raise DoesNotFit(
            f"{name} is {wanted:,}, and a worker's pool holds {pool.num_tokens:,} tokens: {pool.arithmetic}. Ask for "
            f"less, leave it out to get what fits, or give the pool more: {ways}"
        )
    if wanted is not None:
        return wanted, Decision(name, f"{wanted:,}", "as given")
    if context <= pool.num_tokens:
        return context, Decision(name, f"{context:,}", "what the checkpoint was made for")
    reason = f"the checkpoint was made for {context:,}; a worker's pool holds no more"
    return pool.num_tokens, Decision(name, f"{pool.num_tokens:,}", reason)


def _ways_to_more(given: CacheConfig, facts: MemoryFacts, pool: PoolSize) -> str:
    """Changes that would make this pool larger: `cache.tokens` where it is the bound, else those of memory."""
    if given.tokens is not None and pool.num_tokens >= given.tokens - given.tokens % given.block_size:
        return "a larger cache.tokens"
    is_gpu = facts.device_bytes is not None
    ways = ["a GPU with more memory"] if is_gpu else []
    if facts.device_bytes is None or facts.memory_bytes < facts.device_bytes:
        ways.append("fewer workers on a GPU" if is_gpu else "fewer workers")
    return ", ".join([*ways, "a larger cache.memory_fraction", f"a smaller model{'' if is_gpu else ' or dtype'}"])


def decided_router(
    router: RouterConfig, num_decoders: int, seats: int, pool: PoolSize
) -> tuple[RouterConfig, list[Decision]]:
    """Limits of admission: twice what the decode workers run at once, so that none of them waits for work."""
    wanted = {
        "max_running": max(router.max_running, 2 * num_decoders * seats),
        "max_running_tokens": max(router.max_running_tokens, 2 * num_decoders * pool.num_tokens),
    }
    reasons = {
        "max_running": f"twice {num_decoders} × {seats} sequences, at least {router.max_running:,}",
        "max_running_tokens": f"twice {num_decoders} × {pool.num_tokens:,}, at least {router.max_running_tokens:,}",
    }
    return _decide("router", router, wanted, reasons)


def decided_patience(cluster: S, weight_bytes: int, num_workers: int) -> tuple[S, list[Decision]]:
    """Timeout for a member to become ready: its start, and the reading of its weights."""
    least_s: float = cluster.__class__.model_fields["ready_timeout_s"].default
    load_s = weight_bytes * num_workers / LOADED_BYTES_PER_S
    weights = f"{num_workers} × {weight_bytes / 2**20:,.0f} MiB of weights"
    reason = (
        f"a limit, not an estimate: {least_s:g} s, and {weights} at {LOADED_BYTES_PER_S >> 20} MiB/s, as if all read "
        "one slow disk in turn"
    )
    return _decide("cluster", cluster, {"ready_timeout_s": float(round(least_s + load_s))}, {"ready_timeout_s": reason})


def _decide(section: str, values: S, wanted: dict[str, Any], reasons: dict[str, str]) -> tuple[S, list[Decision]]:
    """The section with values of `wanted` for settings that are not given."""
    given = {name for name in values.model_fields_set if getattr(values, name) is not None}
    missing = {name: value for name, value in wanted.items() if name not in given}
    decided = values.model_copy(update=missing)
    return decided, [
        Decision(f"{section}.{name}", _told(getattr(decided, name)), reasons[name] if name in missing else "as given")
        for name in wanted
    ]


def _told(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
