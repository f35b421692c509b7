"""Known fields of request bodies, in three classes. Knows no HTTP and no model.

served     what `Body`, `ChatBody`, `CompletionBody` and `StreamOptions` hold; sampling fields stand in core/sampling.py
ACCEPTED   known to an API that clients speak, without effect on the answer: dropped
REFUSED    known, would change the answer, not served: refused by name, unless the value means "off"

Any other field is unknown: it is dropped and named in the response, or refused if `router.strict` is set. A misspelt
name is unknown, too. `null` always means that the field is not given.
Sources: the request fields of OpenAI's API reference, vLLM, SGLang, llama.cpp's server and Ollama.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from ...core.errors import InvalidRequest
from ...core.sampling import FIELDS, Form, SamplingField, SamplingOptions
from ...text.grammar_program import MAX_CHOICES
from .messages import MAX_MESSAGES
from .tools import MAX_TOOLS

# ------------------------------------------------------------------ served


def _whole(value: Any) -> Any:
    """Accept 16.0 as an integer, for clients whose language has one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bounded(max_entries: int, value: Any) -> Any:
    if isinstance(value, dict) and len(value) > max_entries:  # before each of them is looked at
        raise ValueError(f"it has {len(value)} entries; at most {max_entries} are taken")
    return value


def _number_of_scores(value: Any) -> Any:
    """Accept the boolean form of chats: true is 1, as in vLLM; false is None."""
    return (1 if value else None) if isinstance(value, bool) else _whole(value)


Whole = Annotated[int, BeforeValidator(_whole)]


class Known(BaseModel):
    """Base of body models. Strict types: a text is never converted to a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Known):
    """`stream_options` of a body."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: the usage so far in every chunk


class Named(Known):
    """Names of the model and of the request."""

    model: str | None = None
    request_id: str | None = None


def _json_type(field: SamplingField) -> Any:
    """The strict type of a sampling field in a body."""
    if field.form is Form.BIASES:
        return Annotated[dict[str, float], BeforeValidator(partial(_bounded, field.max_entries))]
    if field.form is Form.GRAMMAR:
        return dict[str, Any]
    if not field.is_list:
        return {Form.WHOLE: Whole, Form.NUMBER: float, Form.FLAG: bool}[field.form]
    item = Whole if field.form is Form.TOKEN_IDS else str
    bounds = Field(max_length=field.max_entries, fail_fast=True)
    return Annotated[list[item], bounds, *([BeforeValidator(_listed)] if field.takes_one else [])]  # type: ignore[valid-type]


if TYPE_CHECKING:  # code reads the fields of the table through `Body.sampling_options`, which is typed
    SamplingBody = Named
else:
    SamplingBody = create_model(
        "SamplingBody",
        __base__=Named,
        **{
            name: (_json_type(field) | None, None)
            for field in FIELDS
            if field.is_in_every_body
            for name in (field.api, *field.aliases)
        },
    )


class Body(SamplingBody):
    """Fields of both endpoints, with every sampling field of the table that has one form in both."""

    n: Whole | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, max_length=MAX_CHOICES, fail_fast=True)
    guided_grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling_options(self) -> SamplingOptions:
        """Sampling fields by the API's names, without `logprobs`, which chats and completions write differently.

        Raises:
            InvalidRequest: a field and its alias have different values.
        """
        found: dict[str, Any] = {}
        for field in FIELDS:
            if field.is_in_every_body and (value := self._said(field)) is not None:
                found[field.api] = value
        return cast(SamplingOptions, found)

    def _said(self, field: SamplingField) -> Any:
        value = getattr(self, field.api)
        for alias in field.aliases:
            other = getattr(self, alias)
            if value is not None and other not in (None, value):
                raise InvalidRequest(f"{field.api} and {alias} differ; give one", param=alias)
            value = other if value is None else value
        return value


class ChatBody(Body):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(max_length=MAX_MESSAGES, fail_fast=True)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = Field(None, max_length=MAX_MESSAGES, fail_fast=True)
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None


class CompletionBody(Body):
    """Body of POST /v1/completions."""

    prompt: Any  # a text, token ids, or a list of either; checked by `prompts_of` in openai_requests.py
    logprobs: Annotated[int | None, BeforeValidator(_number_of_scores)] = None
    echo: bool | None = None
    suffix: str | None = None


# ------------------------------------------------------------------ known, without effect on the answer

ACCEPTED = frozenset(
    {
        # Fields about the user, the purpose and the cost.
        *("user", "metadata", "store", "service_tier", "safety_identifier", "custom_labels", "extra_key"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "session_id", "session_params"),
        *("data_parallel_rank", "routed_dp_rank", "keep_alive", "cache_prompt", "id_slot", "slot_id"),
        # Options of images, beams and engines of grammars, none of which is served, and of how reasoning is separated.
        *("mm_processor_kwargs", "media_io_kwargs", "images_config", "return_mm_kwargs"),
        *("length_penalty", "early_stopping", "guided_decoding_backend", "guided_whitespace_pattern"),
        *("separate_reasoning", "stream_reasoning"),
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
    # The form of the answer, and the older names of tools and tool_choice.
    "functions": ([],),
    "function_call": ("none", "auto"),
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
REFUSED_OF_CHATS: dict[str, tuple[Any, ...]] = {"echo": _NO, "suffix": ("",), "add_special_tokens": _NO}
REFUSED_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "reasoning_effort": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
# What serves the purpose of a refused field; of the others nothing does.
INSTEAD = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "json_schema": "give response_format with type json_schema, or structured_outputs.json",
    "regex": "give structured_outputs.regex",
    "ebnf": "give structured_outputs.grammar (Lark or GBNF)",
    "grammar": "give structured_outputs.grammar (Lark or GBNF)",
    "format": "give response_format",
    "thinking_token_budget": "bound the whole answer with max_tokens",
    "input_ids": "give token ids as prompt to /v1/completions",
    "chat_template": "start the router with --chat-template",
    "truncate_prompt_tokens": "shorten the prompt; `usage.prompt_tokens` of an answer counts its tokens",
    "lora_path": "give the adapter's name as model",
    "no_stop_trim": "give include_stop_str_in_output",
    "allowed_token_ids": "give structured_outputs, or logit_bias",
    "best_of": "give n, and choose among the answers",
    "n_predict": "give max_tokens",
    "repeat_penalty": "give repetition_penalty",
    "typical_p": "give top_p or min_p",
    "n_probs": "give logprobs",
    "echo": "send it to /v1/completions",
    "suffix": "send it to /v1/completions",
    "reasoning_effort": "send it to /v1/chat/completions",
    "tools": "send them to /v1/chat/completions",
    "tool_choice": "send it to /v1/chat/completions",
}
