"""An inference request as the body of a completion, by the names of Triton's vLLM backend. Pure.

    text_input                 BYTES   the prompt
    stream                     BOOL    several answers, with ModelStreamInfer only
    exclude_input_in_output    BOOL    the answer without the prompt; usual for streams
    sampling_parameters        BYTES   JSON object of sampling fields
    return_finish_reason, return_num_input_tokens, return_num_output_tokens    BOOL

Sampling fields may also be parameters of the request, or tensors of their own. As text, "0.5" is a number where the
field is one: Triton's clients write them so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ....core.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from ....core.sampling import FIELDS, Form
from ....protos import kserve_pb2
from ..checks import refuse_constant, short
from ..fields import CompletionBody
from ..http.structure import Bounds, check
from ..openai_requests import parse
from .tensors import Value, parameter_of, values_of

VERSION = "1"  # models have one
MAX_SAMPLING_CHARS = 64 << 10
MAX_NUMBER_CHARS = 64  # of a number that is given as text; so none nests, or is too large for a float
MORE_OUTPUTS = ("finish_reason", "num_input_tokens", "num_output_tokens")
EMPTY_FINAL = "triton_enable_empty_final_response"  # parameter: an answer without outputs ends the stream

_FORMS = {field.api: field.form for field in FIELDS}
_REFUSED = (
    *("image", "return_logprobs", "return_cumulative_logprob", "embedding_request", "lora_name"),
    *("logprobs", "prompt_logprobs", "return_token_ids", "echo"),  # an answer has no place for them
)
_ELSEWHERE = {  # what a sampling field of this name would say is said by
    "text_input": "a tensor",
    "stream": "a tensor",
    "exclude_input_in_output": "a tensor",
    "prompt": "the tensor text_input",
    "model": "model_name",
}
_WITHOUT_EFFECT = frozenset({"priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "early_stopping"})


@dataclass(frozen=True, slots=True)
class Inference:
    """A checked inference request."""

    id: str  # the client's name for it, which its answers repeat
    body: CompletionBody
    is_streamed: bool
    has_prompt: bool  # the answer begins with the prompt
    outputs: tuple[str, ...]  # beside text_output
    has_empty_final: bool
    ignored: tuple[str, ...]  # names of fields without effect


def inference_of(message: kserve_pb2.ModelInferRequest, *, strict: bool) -> Inference:
    """Check a request.

    Raises:
        InvalidRequest: an input or a parameter has an invalid value; with `strict` also an unknown one.
        UnsupportedParameter: one that is not served.
        ModelNotFound: the version is none of the model's.
    """
    check_version(message.model_version)
    values = values_of(message)
    fields: dict[str, Any] = _sampling_parameters(values.pop("sampling_parameters", None))
    for name, parameter in message.parameters.items():
        fields[name] = parameter_of(parameter)
    prompt = values.pop("text_input", None)
    if not isinstance(prompt, str):
        raise InvalidRequest("text_input is missing; give the prompt as a BYTES tensor", param="text_input")
    is_streamed = _flag(values, "stream") or False
    excludes = _flag(values, "exclude_input_in_output")
    if is_streamed and excludes is False:
        raise InvalidRequest(
            "exclude_input_in_output is false and stream is true; a stream has the new text only: leave it out",
            param="exclude_input_in_output",
        )
    outputs = tuple(name for name in MORE_OUTPUTS if _flag(values, f"return_{name}"))
    for name, where in _ELSEWHERE.items():
        if fields.get(name) is not None or name in values:
            raise InvalidRequest(f"{name} is given as a sampling field; give it as {where}", param=name)
    has_empty_final = fields.pop(EMPTY_FINAL, None) in (True, "true")
    fields |= values
    for name in _REFUSED:
        if fields.pop(name, None) not in (None, False, ""):
            raise UnsupportedParameter(f"{name} is not served; leave it out", param=name)
    sent = {name: _in_form(name, value) for name, value in fields.items() if name not in _WITHOUT_EFFECT}
    _check_outputs(message, outputs)
    body, ignored = parse(
        {**sent, "model": message.model_name or None, "prompt": prompt, "stream": is_streamed},
        CompletionBody,
        strict=strict,
    )
    if (body.n or 1) > 1:
        raise UnsupportedParameter(f"n is {body.n}; one answer per request is served: send several", param="n")
    has_prompt = not is_streamed and not excludes
    return Inference(message.id, body, is_streamed, has_prompt, outputs, has_empty_final, tuple(ignored))


def check_version(version: str) -> None:
    """Check the version of a model.

    Raises:
        ModelNotFound: it has none of this name.
    """
    if version not in ("", VERSION):
        raise ModelNotFound(f"model_version is {short(version)}; models here have the version {VERSION}", param="model")


def _sampling_parameters(text: Value | None) -> dict[str, Any]:
    if text is None:
        return {}
    if not isinstance(text, str) or len(text) > MAX_SAMPLING_CHARS:
        raise InvalidRequest(
            f"sampling_parameters is {short(text)}; must be a BYTES tensor of at most {MAX_SAMPLING_CHARS} characters",
            param="sampling_parameters",
        )
    try:
        check(text, Bounds())
        values = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InvalidRequest(
            f"sampling_parameters is {short(text)}; must be a JSON object", param="sampling_parameters"
        )
    return values


def _flag(values: dict[str, Value], name: str) -> bool | None:
    value = values.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {short(value)}; must be a BOOL tensor", param=name)
    return value


def _in_form(name: str, value: Any) -> Any:
    """A sampling field's value; text becomes a number or a truth value where the field is one."""
    form = _FORMS.get(name)
    if not isinstance(value, str) or form not in (Form.WHOLE, Form.NUMBER, Form.FLAG) or len(value) > MAX_NUMBER_CHARS:
        return value
    try:
        found = json.loads(value.strip().lower(), parse_constant=refuse_constant)
    except ValueError:
        return value  # the validator names it
    return float(found) if form is Form.NUMBER and isinstance(found, int) and not isinstance(found, bool) else found


def _check_outputs(message: kserve_pb2.ModelInferRequest, outputs: tuple[str, ...]) -> None:
    known = ("text_output", *outputs)
    for output in message.outputs:
        if output.name not in known:
            raise InvalidRequest(
                f"output {short(output.name)} is not there; there are {', '.join(known)}", param=output.name
            )
