"""Known fields of request bodies, in three classes. Knows no HTTP and no model.

served     the fields of `Body`, `ChatBody`, `CompletionBody` and `StreamOptions`
ACCEPTED   known to an API that clients use, without effect on the answer: dropped
REFUSED    known, would change the answer, not served: refused by name, unless the value means "off"

Any other field is unknown: it is dropped and named in the response, or refused if `router.strict` is set. A misspelt
name is unknown, too. `null` always means that the field is not given.
Sources: the request fields of OpenAI's API reference, vLLM, SGLang, llama.cpp's server and Ollama.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .defaults import MAX_STOPS
from .messages import MAX_MESSAGES
from .sampling import MAX_BAD_WORDS, MAX_BIASES, MAX_STOP_IDS

# ------------------------------------------------------------------ served


def _whole(value: Any) -> Any:
    """Accept 16.0 as an integer, for clients whose language has one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bounded(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:  # before pydantic checks each of them
        raise ValueError(f"it has {len(value)} entries; at most {MAX_BIASES} are taken")
    return value


def _number_of_scores(value: Any) -> Any:
    """Accept the boolean form of chats: true is 1, as in vLLM; false is None."""
    return (1 if value else None) if isinstance(value, bool) else _whole(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Stops = Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_listed)]
Biases = Annotated[dict[str, float], BeforeValidator(_bounded)]


class Known(BaseModel):
    """Base of body models. Strict types: a text is never converted to a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Known):
    """`stream_options` of a body."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: the usage so far in every chunk


class Body(Known):
    """Fields common to both endpoints."""

    model: str | None = None
    request_id: str | None = None
    max_tokens: Whole | None = None  # -1: until the context is full
    max_completion_tokens: Whole | None = None
    min_tokens: Whole | None = None
    n: Whole | None = None
    seed: Whole | None = None  # -1: not given, as in vLLM and llama.cpp
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Biases | None = None
    bad_words: list[str] | None = Field(None, max_length=MAX_BAD_WORDS, fail_fast=True)
    stop: Stops | None = None
    stop_token_ids: list[Whole] | None = Field(None, max_length=MAX_STOP_IDS, fail_fast=True)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Whole | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(Body):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(max_length=MAX_MESSAGES, fail_fast=True)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = Field(None, max_length=MAX_MESSAGES, fail_fast=True)
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None


class CompletionBody(Body):
    """Body of POST /v1/completions."""

    prompt: Any  # a text, token ids, or a list of either; checked by `prompts_of` in openai_requests.py
    logprobs: Annotated[int | None, BeforeValidator(_number_of_scores)] = None
    echo: bool | None = None


# ------------------------------------------------------------------ known, without effect on the answer

ACCEPTED = frozenset(
    {
        # Fields about the user, the purpose and the cost.
        *("user", "metadata", "store", "service_tier", "safety_identifier", "custom_labels", "extra_key"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "session_id", "session_params"),
        *("priority", "data_parallel_rank", "routed_dp_rank", "keep_alive", "cache_prompt", "id_slot", "slot_id"),
        # Options of tools, images, beams, grammars and separated reasoning, none of which is served.
        *("parallel_tool_calls", "mm_processor_kwargs", "media_io_kwargs", "images_config", "return_mm_kwargs"),
        *("length_penalty", "early_stopping", "guided_decoding_backend", "guided_whitespace_pattern"),
        *("include_reasoning", "separate_reasoning", "stream_reasoning"),
        # Fast tokenizers put no spaces there.
        "spaces_between_special_tokens",
        # A hint that a model may ignore; it promises nothing about the answer.
        "verbosity",
        # The chunks of a stream, and extra information about the answer.
        *("stream_interval", "timings_per_token", "return_progress", "return_cached_tokens_details"),
        # Settings of samplers that are refused below when they are switched on.
        *("repeat_last_n", "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        *("dry_sequence_breakers", "dynatemp_exponent", "xtc_threshold", "min_keep", "custom_params"),
    }
)
ACCEPTED_STREAM_OPTIONS = frozenset({"include_obfuscation"})

# ------------------------------------------------------------------ known, would change the answer, not served

_NO = (False,)
_NOTHING: tuple[Any, ...] = ("", [], {})

# Field name to the values, beside null, that mean "off".
REFUSED: dict[str, tuple[Any, ...]] = {
    # Tools and the form of the answer.
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({}, {"type": "text"}),
    "structured_outputs": _NOTHING,
    "structural_tag": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "json_schema": _NOTHING,
    "regex": _NOTHING,
    "ebnf": _NOTHING,
    "grammar": _NOTHING,
    "format": _NOTHING,
    "modalities": ([], ["text"]),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    # Bounded reasoning.
    "thinking_token_budget": (-1,),
    # The source of the prompt.
    "suffix": ("",),
    "prompt_embeds": ([],),
    "input_ids": ([],),
    "chat_template": ("",),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "lora_path": ("",),
    # Sampling and stopping.
    "best_of": (1,),  # or equal to `n`
    "use_beam_search": _NO,
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "vllm_xargs": ({},),
    "watermarking": _NO,
    "repetition_detection": ({},),
    "stop_regex": ("", []),
    "no_stop_trim": _NO,
    "n_predict": (-1,),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "top_n_sigma": (-1, 0),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "samplers": ([],),
    # Extra content of the answer.
    "logprob_token_ids": ([],),
    "n_probs": (0,),
    "post_sampling_probs": _NO,
    "return_hidden_states": _NO,
    "return_routed_experts": _NO,
    "return_prompt_text": _NO,
    "return_token_offsets": _NO,
    "return_meta_info": _NO,
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
}
REFUSED_OF_CHATS: dict[str, tuple[Any, ...]] = {"echo": _NO, "add_special_tokens": _NO}
REFUSED_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,), "reasoning_effort": ()}
