"""Settings of the engine's step and queues."""

from __future__ import annotations

from pydantic import Field

from ..core.config import Section


class StepConfig(Section):
    """Bounds of one engine step and of the queues before it. Defaults are for a CPU; the plan sets those of a GPU."""

    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences per step; default: 64, on a GPU 256")
    max_num_batched_tokens: int = Field(
        1024,
        ge=16,
        le=65536,
        description="tokens per step: the prefill chunk; default: 1,024, on a GPU 2,048, with 64 GiB free 8,192",
    )
    target_ms: float = Field(
        70.0,
        ge=1,
        description="how long a step of a decode or combined worker may take where it computes prompts beside streams "
        "(at least twice the streams' own time): less is a steadier stream, more a sooner first token",
    )
    max_waiting: int = Field(256, ge=1, description="sequences that may wait on one worker")
    num_threads: int | None = Field(None, ge=1, description="CPU threads per worker; default: physical cores / workers")
