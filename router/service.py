"""The gRPC client face: `twostroke.v1.Inference`. Holds no logic of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio

from ..client.status import to_rpc_status
from ..core.errors import InternalError, InvalidRequest, RequestNotFound, TwostrokeError
from ..core.request import FinishReason, Request
from ..kv.messages import logprobs_to_wire
from ..protos import common_pb2, inference_pb2, inference_pb2_grpc
from .call import Call
from .chat_wire import chat_messages, template_options
from .front import Front
from .pieces import Piece, Usage

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}


_USUAL_COMPLETION = 256  # tokens of a completion that asks for none: no template makes it end
_OPTIONAL = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logprobs", "prompt_logprobs"),
)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """One per router. Every failure leaves as a typed status (client/status.py)."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> Any:
        """A completion in one piece."""
        return await _typed(context, self._whole(_generate_call, request, context))

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> Any:
        """A chat answer in one piece."""
        return await _typed(context, self._whole(_chat_call, request, context))

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """A completion, piece by piece."""
        async for chunk in self._chunks(_generate_call, request, context):
            yield chunk

    async def ChatStream(
        self, request: inference_pb2.ChatRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        """A chat answer, piece by piece."""
        async for chunk in self._chunks(_chat_call, request, context):
            yield chunk

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Context) -> Any:
        """The ids that a prompt or a chat becomes."""
        return await _typed(context, self._tokenize(request, context))

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Context) -> Any:
        """What is served."""
        return await _typed(context, self._list_models(context))

    async def Abort(self, request: inference_pb2.AbortRequest, context: Context) -> Any:
        """Cancel a running request."""
        return await _typed(context, self._abort(request, context))

    async def Explain(self, request: inference_pb2.ExplainRequest, context: Context) -> Any:
        """Where a request went, why, and when."""
        return await _typed(context, self._explain(request, context))

    async def Cluster(self, request: inference_pb2.ClusterRequest, context: Context) -> Any:
        """The workers as the router sees them."""
        return await _typed(context, self._cluster(context))

    # -------------------------------------------------------------- what the calls do

    async def _whole(self, read: Any, message: Any, context: Context) -> inference_pb2.GenerateResponse:
        started = await self._front.start(read(message, context))
        request = started.request
        await _tell_ignored(request, context)
        choices = [inference_pb2.Choice(index=index) for index in range(request.num_choices)]
        usage: Usage | None = None
        prompt_logprobs: list[common_pb2.TokenLogprobs] = []
        pieces = started.pieces()
        try:
            async for piece in pieces:
                choice = choices[piece.choice]
                choice.text += piece.text
                choice.token_ids.extend(piece.token_ids)
                choice.finish_reason = _REASONS[piece.finish_reason]
                choice.logprobs.extend(logprobs_to_wire(piece.logprobs))
                prompt_logprobs += logprobs_to_wire(piece.prompt_logprobs)
                usage = piece.usage or usage
        finally:
            await pieces.aclose()
        return inference_pb2.GenerateResponse(
            request_id=request.request_id,
            model=request.model,
            choices=choices,
            usage=_usage(usage),
            prompt_logprobs=prompt_logprobs,
        )

    async def _chunks(self, read: Any, message: Any, context: Context) -> AsyncIterator[inference_pb2.GenerateChunk]:
        try:
            started = await self._front.start(read(message, context))
            pieces = started.pieces()
            try:
                await _tell_ignored(started.request, context)
                async for piece in pieces:
                    yield _chunk(piece, started.request.request_id, started.request.model)
            finally:
                await pieces.aclose()
        except TwostrokeError as error:
            await context.abort_with_status(to_rpc_status(error))
        except Exception as error:
            await context.abort_with_status(to_rpc_status(_unexpected(error)))

    async def _tokenize(
        self, message: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        which = message.WhichOneof("input")
        if which is None:
            raise InvalidRequest("input is missing; give text or chat", param="input")
        call = Call(
            model=message.model or None,
            prompt=message.text if which == "text" else None,
            messages=chat_messages(message.chat.messages) if which == "chat" else None,
            **template_options(message.chat.options),
            max_tokens=1,
            api_key=_api_key(context),
        )
        request, model = await self._front.admit(call)
        await _tell_ignored(request, context)
        return inference_pb2.TokenizeResponse(token_ids=request.prompt_ids, max_model_len=model.max_model_len)

    async def _list_models(self, context: Context) -> inference_pb2.ListModelsResponse:
        self._front.authenticate(_api_key(context))
        cards = [
            inference_pb2.ModelCard(id=name, max_model_len=self._front.models.facts(name).max_model_len)
            for name in self._front.models.names()
        ]
        return inference_pb2.ListModelsResponse(models=cards)

    async def _abort(self, message: inference_pb2.AbortRequest, context: Context) -> inference_pb2.AbortResponse:
        domain = self._front.authenticate(_api_key(context))
        return inference_pb2.AbortResponse(found=await self._front.abort(message.request_id, domain))

    async def _explain(self, message: inference_pb2.ExplainRequest, context: Context) -> inference_pb2.ExplainResponse:
        domain = self._front.authenticate(_api_key(context))
        explained = self._front.explain(message.request_id, domain)
        if explained is None:
            raise RequestNotFound(
                f"no request {message.request_id[:128]!r} is known here (any more)", param="request_id"
            )
        return inference_pb2.ExplainResponse(json=json.dumps(explained))

    async def _cluster(self, context: Context) -> inference_pb2.ClusterResponse:
        self._front.authenticate(_api_key(context))
        return inference_pb2.ClusterResponse(json=json.dumps(self._front.flow.cluster()))


# ------------------------------------------------------------------ words


def _generate_call(message: inference_pb2.GenerateRequest, context: Context) -> Call:
    which = message.WhichOneof("prompt")
    if which is None:
        raise InvalidRequest("prompt is missing; give text or token_ids", param="prompt")
    prompt = message.text if which == "text" else list(message.token_ids.ids)
    return Call(prompt=prompt, usual_max_tokens=_USUAL_COMPLETION, **_common(message, context))


def _chat_call(message: inference_pb2.ChatRequest, context: Context) -> Call:
    return Call(
        messages=chat_messages(message.messages), **template_options(message.options), **_common(message, context)
    )


def _common(message: Any, context: Context) -> dict[str, Any]:
    sampling = message.sampling
    given = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    if sampling.bad_word_ids:
        raise InvalidRequest("bad_word_ids are the router's to make; give bad_words", param="bad_word_ids")
    if "seed" in given and given["seed"] >= 1 << 63:
        given["seed"] -= 1 << 64  # the validator's range is the signed one of JSON clients
    left_s = context.time_remaining()
    return given | {
        "model": message.model or None,
        "n": message.num_choices or None,
        "stop": tuple(sampling.stop),
        "stop_token_ids": tuple(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "include_stop_str_in_output": sampling.include_stop_str_in_output,
        "skip_special_tokens": sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True,
        "logit_bias": dict(sampling.logit_bias),
        "bad_words": tuple(sampling.bad_words),
        "request_id": message.request_id or None,
        "api_key": _api_key(context),
        "timeout_s": left_s if left_s and left_s > 0 else None,
    }


def _chunk(piece: Piece, request_id: str, model: str) -> inference_pb2.GenerateChunk:
    return inference_pb2.GenerateChunk(
        request_id=request_id,
        model=model,
        choice=piece.choice,
        text=piece.text,
        token_ids=piece.token_ids,
        first_index=piece.first_index,
        finish_reason=_REASONS[piece.finish_reason],
        usage=_usage(piece.usage),
        logprobs=logprobs_to_wire(piece.logprobs),
        prompt_logprobs=logprobs_to_wire(piece.prompt_logprobs),
    )


def _usage(usage: Usage | None) -> common_pb2.Usage | None:
    if usage is None:
        return None
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


async def _tell_ignored(request: Request, context: Context) -> None:
    """Name what nothing reads in the metadata before the answer, as the HTTP face does in a header."""
    if request.ignored_fields:
        await context.send_initial_metadata((("x-twostroke-ignored", ", ".join(request.ignored_fields)),))


def _api_key(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, secret = value.partition(" ")
            return secret.strip() if scheme.lower() == "bearer" else None
    return None


async def _typed(context: Context, work: Any) -> Any:
    try:
        return await work
    except TwostrokeError as error:
        await context.abort_with_status(to_rpc_status(error))
    except Exception as error:
        await context.abort_with_status(to_rpc_status(_unexpected(error)))


def _unexpected(error: Exception) -> InternalError:
    log.error("a call failed", exc_info=error)
    return InternalError("the call failed; the router's log has more")
