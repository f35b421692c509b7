"""The gRPC API of KServe v2: `inference.GRPCInferenceService`. Holds no logic of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any, TypeAlias

import grpc

from .... import __version__
from ....core.errors import InternalError, InvalidRequest, ModelNotFound, TwostrokeError
from ....protos import kserve_pb2
from ...keys.grants import Grant
from ...requests.pieces import OutputDelta
from ..call import GenerateCall
from ..frontend import Frontend
from ..grpc.call_wire import checked_left_s
from ..grpc.guard import api_key
from ..openai_requests import completion_calls, names_of_ignored
from ..running.started import Started
from .completions import VERSION, Inference, check_version, inference_of
from .tensors import count_tensor, text_tensor

SERVICE = "inference.GRPCInferenceService"

Context: TypeAlias = Any  # a GuardedContext, or grpc.aio's for streams
Tensor: TypeAlias = "tuple[kserve_pb2.ModelInferResponse.InferOutputTensor, bytes]"

_INPUTS = (
    ("text_input", "BYTES"),
    ("stream", "BOOL"),
    ("sampling_parameters", "BYTES"),
    ("exclude_input_in_output", "BOOL"),
    ("return_finish_reason", "BOOL"),
    ("return_num_input_tokens", "BOOL"),
    ("return_num_output_tokens", "BOOL"),
)
_OUTPUTS = (
    ("text_output", "BYTES"),
    ("finish_reason", "BYTES"),
    ("num_input_tokens", "UINT32"),
    ("num_output_tokens", "UINT32"),
)


class KserveService:
    """One per router, behind a `Guard`, which checks keys and bounds and turns errors into statuses."""

    def __init__(self, front: Frontend, *, strict: bool) -> None:
        self._front = front
        self._strict = strict

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server."""
        pb = kserve_pb2
        unary: dict[str, tuple[Any, Any, Any]] = {
            "ServerLive": (self.server_live, pb.ServerLiveRequest, pb.ServerLiveResponse),
            "ServerReady": (self.server_ready, pb.ServerReadyRequest, pb.ServerReadyResponse),
            "ModelReady": (self.model_ready, pb.ModelReadyRequest, pb.ModelReadyResponse),
            "ServerMetadata": (self.server_metadata, pb.ServerMetadataRequest, pb.ServerMetadataResponse),
            "ModelMetadata": (self.model_metadata, pb.ModelMetadataRequest, pb.ModelMetadataResponse),
            "ModelInfer": (self.model_infer, pb.ModelInferRequest, pb.ModelInferResponse),
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                method, request_deserializer=asked.FromString, response_serializer=told.SerializeToString
            )
            for name, (method, asked, told) in unary.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.model_stream_infer,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=pb.ModelStreamInferResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def server_live(self, request: Any, context: Context) -> kserve_pb2.ServerLiveResponse:
        """Whether the router answers."""
        return kserve_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, context: Context) -> kserve_pb2.ServerReadyResponse:
        """Whether a worker is connected, and requests are accepted."""
        return kserve_pb2.ServerReadyResponse(ready=self._is_ready)

    async def model_ready(
        self, request: kserve_pb2.ModelReadyRequest, context: Context
    ) -> kserve_pb2.ModelReadyResponse:
        """Whether a model is served to this key."""
        is_served = request.name in self._names(context) and request.version in ("", VERSION)
        return kserve_pb2.ModelReadyResponse(ready=is_served and self._is_ready)

    async def server_metadata(self, request: Any, context: Context) -> kserve_pb2.ServerMetadataResponse:
        """Name and version of the server."""
        return kserve_pb2.ServerMetadataResponse(name="twostroke", version=__version__)

    async def model_metadata(
        self, request: kserve_pb2.ModelMetadataRequest, context: Context
    ) -> kserve_pb2.ModelMetadataResponse:
        """The tensors of a model: all have the same."""
        check_version(request.version)
        names = self._names(context)
        if request.name not in names:
            known = ", ".join(names)
            raise ModelNotFound(f"model is {request.name[:200]!r}; this cluster serves {known}", param="model")
        tensor = kserve_pb2.ModelMetadataResponse.TensorMetadata
        return kserve_pb2.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform="twostroke",
            inputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind in _INPUTS],
            outputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind in _OUTPUTS],
        )

    async def model_infer(
        self, request: kserve_pb2.ModelInferRequest, context: Context
    ) -> kserve_pb2.ModelInferResponse:
        """One answer."""
        inference = inference_of(request, strict=self._strict)
        if inference.is_streamed:
            raise InvalidRequest("stream is true; a stream needs ModelStreamInfer", param="stream")
        if inference.ignored:
            await context.send_initial_metadata((("x-twostroke-ignored", names_of_ignored(inference.ignored)),))
        started = await self._front.start(self._call(inference, context), context.admitted)
        return await _whole(inference, started)

    async def model_stream_infer(
        self, requests: AsyncIterator[kserve_pb2.ModelInferRequest], context: Context
    ) -> AsyncIterator[kserve_pb2.ModelStreamInferResponse]:
        """The answers to requests, one request after the other. An error is the answer to its request alone."""
        async for request in requests:
            try:
                inference = inference_of(request, strict=self._strict)
                started = await self._front.start(self._call(inference, context))
                async with contextlib.aclosing(_answers(inference, started)) as answers:
                    async for answer in answers:
                        yield kserve_pb2.ModelStreamInferResponse(infer_response=answer)
            except TwostrokeError as error:
                failed = kserve_pb2.ModelInferResponse(id=request.id, model_name=request.model_name)
                yield kserve_pb2.ModelStreamInferResponse(error_message=error.message, infer_response=failed)

    # -------------------------------------------------------------- inside

    @property
    def _is_ready(self) -> bool:
        return self._front.flow.is_ready and not self._front.flow.refusing

    def _grant(self, context: Context) -> Grant:
        return self._front.grant_of(api_key(context.invocation_metadata()))

    def _names(self, context: Context) -> list[str]:
        allowed = self._grant(context).models
        return [name for name in self._front.models.names() if not allowed or name in allowed]

    def _call(self, inference: Inference, context: Context) -> GenerateCall:
        (call,) = completion_calls(inference.body, api_key(context.invocation_metadata()), 1)
        return replace(call, timeout_s=checked_left_s(context.time_remaining()))


async def _whole(inference: Inference, started: Started) -> kserve_pb2.ModelInferResponse:
    texts = [str(inference.body.prompt)] if inference.has_prompt else []
    last: OutputDelta | None = None
    num_tokens = 0
    async with contextlib.aclosing(started.pieces()) as pieces:
        async for piece in pieces:
            texts.append(piece.text)
            num_tokens += len(piece.token_ids)
            last = piece
    if last is None:
        raise InternalError("the request ended without an answer")
    return _response(inference, started, "".join(texts), num_tokens, last)


async def _answers(inference: Inference, started: Started) -> AsyncGenerator[kserve_pb2.ModelInferResponse, None]:
    """The answers of a stream; of a request that wants one, that one."""
    if not inference.is_streamed:
        yield _marked(await _whole(inference, started), inference, is_final=False)
    else:
        async with contextlib.aclosing(started.pieces()) as pieces:
            async for piece in pieces:
                response = _response(inference, started, piece.text, len(piece.token_ids), piece)
                yield _marked(response, inference, is_final=False)
    if inference.has_empty_final:
        model = started.request.model
        final = kserve_pb2.ModelInferResponse(model_name=model, model_version=VERSION, id=inference.id)
        yield _marked(final, inference, is_final=True)


def _marked(
    response: kserve_pb2.ModelInferResponse, inference: Inference, *, is_final: bool
) -> kserve_pb2.ModelInferResponse:
    """The response with Triton's mark of the last one, for those who asked for it."""
    if inference.has_empty_final:
        response.parameters["triton_final_response"].bool_param = is_final
    return response


def _response(
    inference: Inference, started: Started, text: str, num_tokens: int, piece: OutputDelta
) -> kserve_pb2.ModelInferResponse:
    tensors = [text_tensor("text_output", text)]
    tensors += [_more(name, started, num_tokens, piece) for name in inference.outputs]
    return kserve_pb2.ModelInferResponse(
        model_name=started.request.model,
        model_version=VERSION,
        id=inference.id,
        outputs=[tensor for tensor, _ in tensors],
        raw_output_contents=[data for _, data in tensors],
    )


def _more(name: str, started: Started, num_tokens: int, piece: OutputDelta) -> Tensor:
    if name == "finish_reason":
        return text_tensor(name, "None" if piece.finish_reason is None else piece.finish_reason.value)
    return count_tensor(name, len(started.request.prompt_ids) if name == "num_input_tokens" else num_tokens)
