"""Settings of the served model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from ..core.config import Section

BUNDLED = "bundled"  # path of the model that is part of the package

DTypeChoice = Literal["auto", "bfloat16", "float32"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
KernelsChoice = Literal["auto", "native", "torch"]
Kernels = Literal["native", "torch", "triton"]


GenerationConfig = Annotated[
    Literal["auto", "none"], BeforeValidator(lambda value: "none" if value == "vllm" else value)
]
"""`vllm` is vLLM's own word for none."""


class ModelConfig(Section):
    """Checkpoint, served name, and arithmetic of the model."""

    path: str = Field(BUNDLED, description="checkpoint directory, GGUF file, hub name, or 'bundled'")
    name: str | None = Field(None, description="what clients call it; default: the directory's or file's name")
    dtype: DTypeChoice = Field("auto", description="auto = the checkpoint's")
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: 8-bit weights, rounded while loading; on a CPU what meets them is rounded too"
    )
    kernels: KernelsChoice = Field(
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
    generation_config: GenerationConfig = Field(
        "auto",
        description="sampling where a request says nothing; auto: as the checkpoint's generation_config.json (or GGUF) "
        "recommends; none: temperature 1 and no filters. Its end-of-sequence ids count either way",
    )
    device: DeviceChoice = Field("auto", description="auto: a GPU where torch sees one; workers take GPUs in turn")

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        """Refuse a name that no request could give."""
        if name is not None and not name.strip():
            raise ValueError("it is empty; give the name that clients use, or leave it out for the checkpoint's own")
        return name
