"""Settings of the engine's step and queues, and of speculative decoding."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

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


SPECULATIVE_METHODS = ("ngram", "draft_model", "medusa", "eagle3", "mtp")
_ALIASES = {"deepseek_mtp": "mtp", "qwen3_next_mtp": "mtp"}  # names of vLLM
_WITH_MODEL = ("draft_model", "medusa", "eagle3")
_NGRAM = ("ngram",)
_OF_SOME_METHODS = {"model": _WITH_MODEL, "prompt_lookup_max": _NGRAM, "prompt_lookup_min": _NGRAM}


class SpeculationConfig(Section):
    """Speculative decoding: guess tokens, compute several at a time, keep the right ones. The output stays the same."""

    method: str | None = Field(
        None,
        description="what guesses: ngram, from earlier occurrences in prompt and output; draft_model, a small model "
        "with the same tokenizer; medusa and eagle3, heads on the model's hidden states; mtp, the model's own layer "
        "that predicts further tokens; none: off, or draft_model if a model is given",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="draft_model: checkpoint directory, GGUF file, hub name, or 'bundled'; medusa, eagle3: directory "
        "or hub name of the heads",
    )
    num_speculative_tokens: int = Field(4, ge=1, le=32, description="most guessed tokens per sequence and step")
    prompt_lookup_max: int = Field(4, ge=1, le=32, description="ngram: longest match that is looked for, in tokens")
    prompt_lookup_min: int = Field(2, ge=1, le=32, description="ngram: shortest match that is guessed from, in tokens")

    @property
    def checkpoint(self) -> str | None:
        """Checkpoint of the draft model or of the heads; None: neither guesses."""
        return self.model if self.method in _WITH_MODEL else None

    @property
    def has_weights(self) -> bool:
        """True if weights beside the model's decoder guess."""
        return self.checkpoint is not None or self.method == "mtp"

    @model_validator(mode="before")
    @classmethod
    def _names_its_method(cls, values: object) -> object:
        """As in vLLM, a model alone means draft_model."""
        if isinstance(values, dict) and values.get("model") and values.get("method") is None:
            return {**values, "method": "draft_model"}
        return values

    @field_validator("method")
    @classmethod
    def _is_served(cls, method: str | None) -> str | None:
        method = _ALIASES.get(method or "", method)
        if method is not None and method not in SPECULATIVE_METHODS:
            raise ValueError(
                f"{method!r} is not served yet; use {' or '.join(SPECULATIVE_METHODS)}, or leave speculation out"
            )
        return method

    @model_validator(mode="after")
    def _has_its_own_settings(self) -> SpeculationConfig:
        # What differs from the default, not what was set: members get the whole section from the launcher.
        fields = type(self).model_fields
        given = [name for name in fields if name != "method" and getattr(self, name) != fields[name].default]
        if self.method is None and given:
            raise ValueError(f"method is not given, and {', '.join(sorted(given))} needs it; give method: ngram")
        if self.method in _WITH_MODEL and self.model is None:
            what = "the small model's" if self.method == "draft_model" else "the heads'"
            raise ValueError(f"method is {self.method}, and model is not given; name {what} checkpoint")
        wrong = next((name for name in given if self.method not in _OF_SOME_METHODS.get(name, (self.method,))), None)
        if wrong is not None:
            methods = ", ".join(_OF_SOME_METHODS[wrong])
            raise ValueError(f"{wrong} is a setting of {methods}, and method is {self.method}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _is_a_range(self) -> SpeculationConfig:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, above prompt_lookup_max "
                f"({self.prompt_lookup_max}); lower it"
            )
        return self
