"""Settings of the served model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

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


class LoraModule(Section):
    """An adapter that workers load when they start."""

    name: str = Field(min_length=1, max_length=256, description="what clients call the model with this adapter")
    path: str = Field(min_length=1, description="directory that PEFT has saved")
    base_model_name: str | None = Field(None, description="as in vLLM; the adapters' model is the one that is served")


def _modules(value: Any) -> Any:
    """Adapters of a flag, a variable or a file: NAME=PATH, JSON objects, lists of both, or {name: path}."""
    if isinstance(value, str):
        return _modules(json.loads(value)) if value.lstrip()[:1] in ("[", "{") else [_module(value)]
    if isinstance(value, dict):
        return [value] if "path" in value else [{"name": name, "path": path} for name, path in value.items()]
    if isinstance(value, list | tuple):
        return [one for each in value for one in (_modules(each) if isinstance(each, str) else [each])]
    return value


def _module(text: str) -> dict[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name.strip() and path.strip()):
        raise ValueError(f"an adapter is {text[:80]!r}; must be NAME=PATH, or JSON with name and path")
    return {"name": name.strip(), "path": path.strip()}


LoraModules = Annotated[tuple[LoraModule, ...], BeforeValidator(_modules)]


class ModelConfig(Section):
    """Checkpoint, served name, and arithmetic of the model."""

    path: str = Field(BUNDLED, description="checkpoint directory, GGUF file, hub name, or 'bundled'")
    name: str | None = Field(None, description="what clients call it; default: the directory's or file's name")
    dtype: DTypeChoice = Field("auto", description="auto = the checkpoint's")
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8: 8-bit weights, rounded while loading; on a CPU what meets them is rounded too, on a GPU "
        "no memory is saved",
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
    enable_lora: bool = Field(
        False, description="keep memory for adapters, so that they can be loaded; lora_modules turns it on by itself"
    )
    lora_modules: LoraModules = Field((), description="adapters to serve from the start, each as a model of its name")
    max_loras: int = Field(64, ge=1, le=4096, description="adapters that a worker holds at once, all in one batch too")
    max_lora_rank: int = Field(64, ge=1, le=1024, description="largest rank of an adapter")
    max_lora_bytes: int = Field(
        512 << 20, ge=1 << 16, description="memory of all adapters of a worker; it is taken off what the pool may have"
    )

    @property
    def serves_adapters(self) -> bool:
        """True if workers may load adapters."""
        return self.enable_lora or bool(self.lora_modules)

    @property
    def adapter_bytes(self) -> int:
        """Memory that a worker keeps for adapters."""
        return self.max_lora_bytes if self.serves_adapters else 0

    @field_validator("lora_modules")
    @classmethod
    def _have_names_of_their_own(cls, modules: tuple[LoraModule, ...]) -> tuple[LoraModule, ...]:
        names = [module.name for module in modules]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two adapters have the name {twice!r}; give each its own")
        return modules

    @model_validator(mode="after")
    def _holds_its_adapters(self) -> ModelConfig:
        if len(self.lora_modules) > self.max_loras:
            raise ValueError(f"there are {len(self.lora_modules)} lora_modules; raise max_loras ({self.max_loras})")
        if any(module.name == self.name for module in self.lora_modules):
            raise ValueError(f"an adapter has the name of the model, {self.name!r}; give it another")
        return self

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        """Refuse a name that no request could give."""
        if name is not None and not name.strip():
            raise ValueError("it is empty; give the name that clients use, or leave it out for the checkpoint's own")
        return name
