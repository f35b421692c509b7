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


SPECULATIVE_METHODS = ("ngram",)


class SpeculationConfig(Section):
    """Speculative decoding: guess tokens, compute several at a time, keep the right ones. The output stays the same."""

    method: str | None = Field(
        None, description="what guesses: ngram, from earlier occurrences in prompt and output; none: off"
    )
    num_speculative_tokens: int = Field(4, ge=1, le=32, description="most guessed tokens per sequence and step")
    prompt_lookup_max: int = Field(4, ge=1, le=32, description="ngram: longest match that is looked for, in tokens")
    prompt_lookup_min: int = Field(2, ge=1, le=32, description="ngram: shortest match that is guessed from, in tokens")

    @field_validator("method")
    @classmethod
    def _is_served(cls, method: str | None) -> str | None:
        if method is not None and method not in SPECULATIVE_METHODS:
            raise ValueError(f"{method!r} is not served yet; use ngram, or leave speculation out")
        return method

    @model_validator(mode="after")
    def _has_a_method(self) -> SpeculationConfig:
        # What differs from the default, not what was set: members get the whole section from the launcher.
        fields = type(self).model_fields
        given = [name for name in fields if name != "method" and getattr(self, name) != fields[name].default]
        if self.method is None and given:
            raise ValueError(f"method is not given, and {', '.join(sorted(given))} needs it; give method: ngram")
        return self

    @model_validator(mode="after")
    def _is_a_range(self) -> SpeculationConfig:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, above prompt_lookup_max "
                f"({self.prompt_lookup_max}); lower it"
            )
        return self
