"""Settings of the model and of the step that runs it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..core.config import Section

BUNDLED = "bundled"  # the name of the model that travels with the package


class ModelConfig(Section):
    """Which checkpoint, under which name, in which arithmetic."""

    path: str = Field(BUNDLED, description="checkpoint directory, GGUF file, hub name, or 'bundled'")
    name: str | None = Field(None, description="what clients call it; default: the directory's or file's name")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto = the checkpoint's")
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: 8-bit weights, rounded while loading; on a CPU what meets them is rounded too"
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto", description="on a CPU; native: built on first use, by the machine's C++ compiler; auto: torch without"
    )
    max_model_len: int | None = Field(
        None, ge=16, description="prompt plus generated tokens; default: the checkpoint's, or what the pool holds"
    )
    deterministic: bool = Field(
        True,
        description="hand-overs only between workers that compute the same bits; false allows mixed ones. "
        "Within a worker on a CPU, logits never depend on batch, chunking or cached prefix; on a GPU, last bits may: "
        "cuBLAS chooses by the number of rows",
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="sampling where a request says nothing; auto: as the checkpoint's generation_config.json (or GGUF) "
        "recommends; none: temperature 1 and no filters. Its end-of-sequence ids count either way",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where torch sees one; workers take GPUs in turn"
    )


class StepConfig(Section):
    """Bounds of one engine step and of the queues before it. What is not given is a CPU's; for a GPU see the plan."""

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
