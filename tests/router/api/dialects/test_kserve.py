"""KServe's inference service with Triton's own client: a real router, and a worker that says what the test wants."""

from __future__ import annotations

import asyncio
import json
import queue
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from support.fakes.scripted_router import There, router, worker
from support.fakes.scripted_worker import MODEL, make_model
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from twostroke.core.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from twostroke.protos import kserve_pb2
from twostroke.router.api.grpc.message_bounds import check_bounds
from twostroke.router.api.kserve.completions import inference_of

SPOKEN = "It rains in Oslo – and it will rain tomorrow."
KEYS = ("first-key-of-this-test", "second-key-of-this-test")


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[There]:
    async with router() as found:
        await found.add(worker(make_model(tmp_path / "model"), SPOKEN))
        yield found


@pytest.fixture
async def client(there: There) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(there.grpc) as found:
        yield found


def tensor(name: str, value: Any) -> Any:
    kind = "BOOL" if isinstance(value, bool) else "BYTES"
    made = triton.InferInput(name, [1], kind)
    made.set_data_from_numpy(
        np.array([value if kind == "BOOL" else str(value).encode()], bool if kind == "BOOL" else object)
    )
    return made


def inputs(text: str = "Hi", **values: Any) -> list[Any]:
    return [tensor("text_input", text), *(tensor(name, value) for name, value in values.items())]


def texts_of(result: Any, name: str = "text_output") -> str:
    (text,) = result.as_numpy(name)
    return bytes(text).decode()


def test_the_messages_are_those_of_the_published_interface():
    ours = kserve_pb2.DESCRIPTOR.message_types_by_name
    for name, kind in ours.items():
        _compare(kind, service_pb2.DESCRIPTOR.message_types_by_name[name])


def _compare(ours: Any, theirs: Any) -> None:
    assert {(f.name, f.number, f.type, f.is_repeated) for f in ours.fields} == {
        (f.name, f.number, f.type, f.is_repeated) for f in theirs.fields
    }
    for kind in ours.nested_types:
        _compare(kind, theirs.nested_types_by_name[kind.name])


async def test_the_server_and_its_models_are_described(there, client):
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready(MODEL)
    assert await client.is_model_ready(MODEL, "1")
    assert not await client.is_model_ready(MODEL, "2")
    assert not await client.is_model_ready("gpt-9")
    assert (await client.get_server_metadata()).name == "twostroke"
    described = await client.get_model_metadata(MODEL)
    assert [one.name for one in described.inputs][:2] == ["text_input", "stream"]
    assert described.outputs[0].datatype == "BYTES"
    with pytest.raises(InferenceServerException, match="this cluster serves"):
        await client.get_model_metadata("gpt-9")


async def test_one_answer_has_the_prompt_before_it_unless_it_is_excluded(there, client):
    asked = {"max_tokens": 40, "temperature": 0}
    whole = await client.infer(MODEL, inputs(), parameters=asked, request_id="mine")
    assert texts_of(whole) == "Hi" + SPOKEN
    assert whole.get_response().id == "mine"
    more = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    only = await client.infer(MODEL, inputs(exclude_input_in_output=True, **more), parameters=asked)
    assert texts_of(only) == SPOKEN
    assert texts_of(only, "finish_reason") == "stop"
    order = there.workers[0].submits[-1]
    assert only.as_numpy("num_input_tokens")[0] == len(order.prompt_ids)
    assert only.as_numpy("num_output_tokens")[0] == len(there.workers[0].tokenizer.encode(SPOKEN, False))
    assert order.sampling.temperature == 0


async def test_sampling_is_taken_from_a_tensor_and_text_becomes_numbers(there, client):
    sampling = json.dumps({"temperature": "0.5", "top_p": "0.95", "max_tokens": "3", "ignore_eos": "true"})
    answer = await client.infer(MODEL, inputs(sampling_parameters=sampling, return_finish_reason=True))
    assert texts_of(answer, "finish_reason") == "length"
    order = there.workers[0].submits[-1].sampling
    assert (order.max_tokens, order.temperature, order.top_p) == (3, 0.5, 0.95)
    assert order.ignore_eos


async def test_a_stream_gives_the_new_text_piece_by_piece_and_goes_on_after_an_error(there, client):
    def asked(name: str, **values: Any) -> dict[str, Any]:
        return {
            "model_name": MODEL,
            "inputs": inputs(stream=True, **values),
            "request_id": name,
            "parameters": {"max_tokens": 40},
        }

    async def all_of() -> AsyncIterator[dict[str, Any]]:
        yield asked("a")
        yield asked("b", image="x")
        yield asked("c")

    texts: dict[str, list[str]] = {"a": [], "c": []}
    errors = []
    async for result, error in client.stream_infer(all_of()):
        if error is not None:
            errors.append(str(error))
            continue
        texts[result.get_response().id].append(texts_of(result))
    assert all("".join(parts) == SPOKEN for parts in texts.values())
    assert len(texts["a"]) > 3, "it came in pieces"
    assert len(errors) == 1
    assert "image is not served" in errors[0]


async def test_the_client_without_asyncio_is_told_which_response_is_the_last(there):
    def asked() -> list[tuple[bool, int]]:
        answers: queue.Queue[Any] = queue.Queue()
        found: list[tuple[bool, int]] = []
        with triton.InferenceServerClient(there.grpc) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(
                MODEL, inputs(stream=True), parameters={"max_tokens": 40}, enable_empty_final_response=True
            )
            while not found or not found[-1][0]:
                result, error = answers.get(timeout=60)
                assert error is None
                response = result.get_response()
                found.append((response.parameters["triton_final_response"].bool_param, len(response.outputs)))
            client.stop_stream()
        return found

    *parts, last = await asyncio.to_thread(asked)
    assert last == (True, 0)
    assert len(parts) > 3
    assert set(parts) == {(False, 1)}


async def test_a_client_that_leaves_its_stream_ends_its_request(there, client):
    there.workers[0].token_s = 0.1

    async def once() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": inputs(stream=True), "parameters": {"max_tokens": 40}}

    stream = client.stream_infer(once())
    await anext(stream)
    assert there.process._flow.cluster()["router"]["in_flight_requests"] == 1
    stream.cancel()
    async with asyncio.timeout(60):
        while there.process._flow.cluster()["router"]["in_flight_requests"]:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("values", "parameters", "words"),
    [
        ({"stream": True}, {}, "ModelStreamInfer"),
        ({}, {"max_tokens": -7}, "max_tokens is -7"),
        ({}, {"n": 2}, "n is 2"),
        ({}, {"temperature": "warm"}, "temperature is 'warm'"),
        ({"exclude_input_in_output": "yes"}, {}, "must be a BOOL tensor"),
        ({"sampling_parameters": "[1]"}, {}, "must be a JSON object"),
        ({"sampling_parameters": '{"temperature": NaN}'}, {}, "must be a JSON object"),
        ({"sampling_parameters": "[" * 60_000}, {}, "at most"),
        ({"return_logprobs": True}, {}, "return_logprobs is not served"),
        ({}, {"stream": True}, "stream is given as a sampling field; give it as a tensor"),
        ({}, {"text_input": "x"}, "text_input is given as a sampling field"),
        ({"sampling_parameters": '{"prompt": "x"}'}, {}, "prompt is given as a sampling field; give it as the tensor"),
        ({"model": "x"}, {}, "model is given as a sampling field; give it as model_name"),
        ({}, {"logprobs": 3}, "logprobs is not served"),
        ({}, {"echo": True}, "echo is not served"),
        ({"sampling_parameters": '{"prompt_logprobs": 1}'}, {}, "prompt_logprobs is not served"),
        ({}, {"temperature": "1" * 400}, "temperature is '111"),
        ({}, {"max_tokens": "[" * 100_000}, "max_tokens is '[["),
    ],
)
async def test_errors_name_the_value(there, client, values, parameters, words):
    with pytest.raises(InferenceServerException, match=re.escape(words)):
        await client.infer(MODEL, inputs(**values), parameters=parameters)


@pytest.mark.parametrize("name", ["\u2603", "a\r\nb: c", "long" * 10_000])
async def test_fields_without_effect_are_named_whatever_characters_they_have(there, name):
    async with grpc.aio.insecure_channel(there.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        made = request()
        made.parameters[name].int64_param = 1
        call = infer(made.SerializeToString())
        assert kserve_pb2.ModelInferResponse.FromString(await call).id == "r"
        (said,) = [value for key, value in await call.initial_metadata() if key == "x-twostroke-ignored"]
        assert 0 < len(said) <= 4096


async def test_keys_hold_here_too(tmp_path):
    async with router(api_keys=KEYS) as there:
        await there.add(worker(make_model(tmp_path / "model"), SPOKEN))
        async with triton_aio.InferenceServerClient(there.grpc) as client:
            with pytest.raises(InferenceServerException, match="key"):
                await client.is_server_live()
            held = {"authorization": f"Bearer {KEYS[0]}"}
            assert await client.is_server_live(headers=held)
            answer = await client.infer(MODEL, inputs(exclude_input_in_output=True), headers=held)
            assert texts_of(answer)


async def test_the_clients_deadline_is_the_requests(there):
    made = request()
    made.parameters["request_id"].string_param = "mine"
    async with grpc.aio.insecure_channel(there.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        await infer(made.SerializeToString(), timeout=7.0)
    async with httpx.AsyncClient(base_url=there.url, timeout=20) as client:
        told = (await client.get("/v1/requests/mine/explain")).json()
    assert 0 < told["timeout_s"] < 8.0, "the usual one is an hour"


def request(**more: Any) -> kserve_pb2.ModelInferRequest:
    made = kserve_pb2.ModelInferRequest(model_name=MODEL, id="r")
    text = made.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"Hi")
    made.MergeFrom(kserve_pb2.ModelInferRequest(**more))
    return made


def test_data_may_stand_in_the_fields_of_their_types():
    made = request()
    for name, kind, field, value in (
        ("max_tokens", "INT32", "int_contents", 7),
        ("seed", "UINT64", "uint64_contents", 5),
        ("temperature", "FP32", "fp32_contents", 0.5),
        ("ignore_eos", "BOOL", "bool_contents", True),
    ):
        getattr(made.inputs.add(name=name, datatype=kind, shape=[1, 1]).contents, field).append(value)
    body = inference_of(made, strict=True).body
    assert (body.prompt, body.max_tokens, body.seed, body.temperature, body.ignore_eos) == ("Hi", 7, 5, 0.5, True)


def test_a_stream_has_no_prompt_and_an_answer_has_it_unless_it_is_excluded():
    found = []
    for name in (None, "stream", "exclude_input_in_output"):
        made = request()
        if name is not None:
            made.inputs.add(name=name, datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
        found.append(inference_of(made, strict=True).has_prompt)
    assert found == [True, False, False]


def raw(kind: str, data: bytes, shape: tuple[int, ...] = (1,)) -> kserve_pb2.ModelInferRequest:
    made = kserve_pb2.ModelInferRequest(raw_input_contents=[data])
    made.inputs.add(name="text_input", datatype=kind, shape=shape)
    return made


def twice() -> kserve_pb2.ModelInferRequest:
    made = request()
    made.inputs.append(made.inputs[0])
    return made


def shared() -> kserve_pb2.ModelInferRequest:
    made = request()
    made.inputs[0].parameters["shared_memory_region"].string_param = "x"
    return made


def with_number(name: str, kind: str, field: str, value: int) -> kserve_pb2.ModelInferRequest:
    made = request()
    getattr(made.inputs.add(name=name, datatype=kind, shape=[1]).contents, field).append(value)
    return made


def another_output() -> kserve_pb2.ModelInferRequest:
    made = request()
    made.outputs.add(name="logits")
    return made


@pytest.mark.parametrize(
    ("made", "kind", "words"),
    [
        (kserve_pb2.ModelInferRequest(), InvalidRequest, "text_input is missing"),
        (request(model_version="7"), ModelNotFound, "model_version is '7'"),
        (request(raw_input_contents=[b"", b""]), InvalidRequest, "2 entries for 1 inputs"),
        (raw("BYTES", b"\x09\x00\x00\x00short"), InvalidRequest, "length of a text"),
        (raw("BYTES", b"\xff\xff\xff\xff"), InvalidRequest, "length of a text"),
        (
            request(raw_input_contents=[b"\x01\x00\x00\x00x"]),
            InvalidRequest,
            "has bytes_contents; .* raw_input_contents",
        ),
        (with_number("text_input", "BYTES", "int_contents", 7), InvalidRequest, "given twice"),
        (with_number("seed", "INT64", "int_contents", 7), InvalidRequest, "has int_contents; .* in int64_contents"),
        (with_number("max_tokens", "INT8", "int_contents", 300), InvalidRequest, "is 300, which is no INT8"),
        (with_number("max_tokens", "UINT16", "uint_contents", 1 << 16), InvalidRequest, "is 65536, which is no UINT16"),
        (raw("BYTES", b""), InvalidRequest, "length of a text"),
        (raw("BYTES", b"\x01\x00\x00\x00\xff"), InvalidRequest, "no UTF-8"),
        (raw("INT64", b"\x01"), InvalidRequest, "a INT64 has 8"),
        (raw("FP8", b"\x01"), InvalidRequest, "datatype is 'FP8'|has the datatype 'FP8'"),
        (raw("BYTES", b"\x01\x00\x00\x00a", (2,)), InvalidRequest, "must be"),
        (raw("BYTES", b"\x01\x00\x00\x00a", (-1,)), InvalidRequest, "must be"),
        (raw("BYTES", b"\x01\x00\x00\x00a", (1,) * 9), InvalidRequest, "must be"),
        (raw("BOOL", b"\x01"), InvalidRequest, "text_input is missing"),
        (twice(), InvalidRequest, "given twice"),
        (shared(), UnsupportedParameter, "shared memory"),
        (another_output(), InvalidRequest, "output 'logits'"),
    ],
)
def test_tensors_that_are_wrong_are_named(made, kind, words):
    with pytest.raises(kind, match=words):
        inference_of(made, strict=True)


@pytest.mark.parametrize("field", ["inputs", "outputs", "raw_input_contents", "shape", "int64_contents"])
def test_lists_are_bounded_before_they_are_built(field):
    made = request()
    match field:
        case "inputs" | "outputs":
            for _ in range(300):
                getattr(made, field).add(name="x")
        case "raw_input_contents":
            made.raw_input_contents.extend([b""] * 300)
        case "shape":
            made.inputs[0].shape.extend([1] * 2000)
        case _:
            made.inputs[0].contents.int64_contents.extend([1] * 2000)
    with pytest.raises(InvalidRequest, match=f"{field} has more than"):
        check_bounds(made.SerializeToString(), kserve_pb2.ModelInferRequest.DESCRIPTOR)


async def test_bytes_that_are_no_message_are_an_error_and_no_more(there):
    async with grpc.aio.insecure_channel(there.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for data in (b"\xff" * 100, b"\x2a\x05abc", b"", b"\x0a\xff\xff\xff\xff\x0f"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await infer(data)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
