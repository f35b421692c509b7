"""The Responses API with its official client: a real router, and a worker that says what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from support.clusters.flow_cluster import until
from support.fakes.scripted_router import There, router, worker
from support.fakes.scripted_worker import MODEL, make_model

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
OSLO, ROME = {"city": "Oslo – Østkanten"}, {"city": "Rome"}
KINDS = ["reasoning", "message", "function_call", "function_call"]


def call_text(arguments: dict[str, Any]) -> str:
    said = json.dumps({"name": "get_weather", "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


SAID = f"<think>Rain.</think>Let me see.\n{call_text(OSLO)}\n{call_text(ROME)}"
SPOKEN = "It rains in Oslo – and it will rain tomorrow."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
async def there(model: Path) -> AsyncIterator[There]:
    async with router() as found:
        await found.add(worker(model, SPOKEN))
        yield found


def said(response: Any) -> Any:
    """A response without what only the client adds to it."""
    return json.loads(json.dumps(response.to_dict(mode="json")).replace(', "parsed": null', ""))


async def create(there: There, text: Any = "Hi", **more: Any) -> Any:
    return await there.openai.responses.create(model=MODEL, input=text, **more)


async def over(there: There, response: Any) -> Any:
    """The response when it is over, polled as clients do."""
    async with asyncio.timeout(60):
        while response.status in ("queued", "in_progress"):
            await asyncio.sleep(0.02)
            response = await there.openai.responses.retrieve(response.id)
    return response


def slow(there: There, token_s: float = 0.05) -> None:
    """Let the worker take its time for each token."""
    there.workers[0].token_s = token_s


# ---------------------------------------------------------------- answers


async def test_a_response_has_reasoning_text_and_calls_whole_and_streamed(there):
    there.workers[0].says = SAID
    asked: dict[str, Any] = {"model": MODEL, "input": "Weather?", "tools": [WEATHER], "instructions": "Be brief."}
    whole = await there.openai.responses.create(**asked)
    assert [item.type for item in whole.output] == KINDS
    assert whole.output[0].content[0].text == "Rain."
    assert whole.output_text == "Let me see."
    assert [json.loads(item.arguments) for item in whole.output[2:]] == [OSLO, ROME]
    assert (whole.status, whole.instructions, whole.tools[0].name) == ("completed", "Be brief.", "get_weather")
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    async with there.openai.responses.stream(**asked) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    for kind in ("output_item.added", "output_item.done"):
        assert kinds.count(f"response.{kind}") == len(KINDS)
    for kind, text in (("output_text", "Let me see."), ("reasoning_text", "Rain.")):
        deltas = [event.delta for event in events if event.type == f"response.{kind}.delta"]
        assert "".join(deltas) == text
        assert len(deltas) > 1, "it was streamed"
    calls = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments) for event in calls] == [OSLO, ROME]
    hidden = {"id", "call_id"}
    assert [item.model_dump(exclude=hidden | {"parsed_arguments", "content"}) for item in final.output] == [
        item.model_dump(exclude=hidden | {"content"}) for item in whole.output
    ]
    kept = await there.openai.responses.retrieve(final.id)
    last = events[-1].response.to_dict(mode="json")
    assert kept.to_dict(mode="json")["output"] == json.loads(
        json.dumps(last["output"]).replace(', "parsed_arguments": null', "").replace(', "parsed": null', "")
    )
    assert kept.usage == final.usage


async def test_every_event_is_one_of_the_clients_and_says_the_same_as_the_object(there):
    async with httpx.AsyncClient(base_url=there.url, timeout=60) as client:
        asked = {"model": MODEL, "input": "Hi", "stream": True, "reasoning": {"summary": "auto"}, "include": []}
        there.workers[0].says = SAID
        text = (await client.post("/v1/responses", json=asked)).text
        parts = [part.split("\n") for part in text.split("\n\n") if part]
        events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
        assert [name.removeprefix("event: ") for name, _ in parts] == [event["type"] for event in events]
        adapter: Any = pydantic.TypeAdapter(openai.types.responses.ResponseStreamEvent)
        for event in events:
            assert adapter.validate_python(event).type == event["type"]
        summary = [e["delta"] for e in events if e["type"] == "response.reasoning_summary_text.delta"]
        assert "".join(summary) == "Rain."
        final = events[-1]["response"]
        openai.types.responses.Response.model_validate(final)
        assert final["output"][0]["summary"] == [{"type": "summary_text", "text": "Rain."}]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == final["output"]
        assert (await client.get(f"/v1/responses/{final['id']}")).json() == final


async def test_an_answer_that_is_cut_is_incomplete(there):
    whole = await create(there, max_output_tokens=3)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.output[0].status == "incomplete"
    events = [event async for event in await create(there, max_output_tokens=3, stream=True)]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.usage.output_tokens == 3
    assert events[-1].response.output_text == whole.output_text != ""


async def test_a_response_that_says_nothing_has_an_empty_message(there):
    there.workers[0].says = ""
    whole = await create(there)
    assert (whole.status, whole.output_text, whole.output[0].type) == ("completed", "", "message")


async def test_pydantic_models_are_parsed(there):
    class Weather(pydantic.BaseModel):
        city: str
        days: int

    there.workers[0].says = '{"city": "Oslo", "days": 3}'
    response = await there.openai.responses.parse(model=MODEL, input="Hi", text_format=Weather)
    assert response.output_parsed == Weather(city="Oslo", days=3)
    order = there.workers[0].submits[-1]
    assert "days" in order.sampling.structured_outputs.json


async def test_logprobs_stand_with_the_text_whole_and_streamed(there):
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = await create(there, **asked)
    (part,) = whole.output[0].content
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode() == SPOKEN
    assert there.workers[0].submits[-1].sampling.logprobs == 2
    events = [event async for event in await create(there, stream=True, **asked)]
    deltas = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert [one.token for one in deltas] == [one.token for one in part.logprobs]
    assert (await create(there)).output[0].content[0].logprobs == []


# ---------------------------------------------------------------- conversations


async def test_a_conversation_goes_on_from_a_stored_response(there):
    there.workers[0].says = SAID
    first = await create(there, "Weather?", tools=[WEATHER])
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
        for item in first.output
        if item.type == "function_call"
    ]
    there.workers[0].says = SPOKEN
    second = await create(there, results, previous_response_id=first.id, tools=[WEATHER])
    assert second.previous_response_id == first.id
    by_hand = [{"role": "user", "content": "Weather?"}, *first.output, *results]
    same = await create(there, by_hand, tools=[WEATHER], store=False)
    assert same.usage.input_tokens == second.usage.input_tokens
    orders = there.workers[0].submits[-2:]
    assert list(orders[0].prompt_ids) == list(orders[1].prompt_ids)
    listed = [item async for item in there.openai.responses.input_items.list(second.id, order="asc", limit=2)]
    assert [item.type for item in listed] == ["message", *KINDS, *["function_call_output"] * 2]
    newest = await there.openai.responses.input_items.list(second.id, limit=1)
    assert newest.data[0].call_id == results[1]["call_id"]
    whole = await there.openai.responses.input_items.list(second.id, limit=len(listed))
    assert (newest.has_more, whole.has_more, len(whole.data)) == (True, False, len(listed))
    await there.openai.responses.delete(first.id)
    third = await create(there, "And then?", previous_response_id=second.id, tools=[WEATHER])
    assert third.usage.input_tokens > second.usage.input_tokens, "a response holds its whole conversation"
    with pytest.raises(openai.BadRequestError) as caught:
        await create(there, "And then?", previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_what_is_not_stored_cannot_be_asked_for(there):
    response = await create(there, store=False)
    assert response.store is False
    for ask in (
        there.openai.responses.retrieve(response.id),
        there.openai.responses.delete(response.id),
        there.openai.responses.cancel(response.id),
        there.openai.responses.retrieve("resp_never"),
        there.openai.responses.retrieve("x\r\ny: z"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await ask
        assert caught.value.code == "request_not_found"
    chat = await there.chat(extra_headers={"x-twostroke-resumable": "1"})
    with pytest.raises(openai.NotFoundError):
        await there.openai.responses.retrieve(chat.id)


async def test_the_bounds_hold_and_what_is_evicted_is_named(model):
    async with router(journal_requests=3, responses_s=30.0) as there:
        await there.add(worker(model, SPOKEN))
        made = [await create(there, f"number {number}") for number in range(5)]
        assert len(there.process._front.streams.journal) == 3
        with pytest.raises(openai.NotFoundError, match="is stored"):
            await there.openai.responses.retrieve(made[1].id)
        assert (await there.openai.responses.retrieve(made[4].id)).id == made[4].id
        journal = there.process._front.streams.journal
        journal.tick(there.process._flow.clock.now_s() + 31.0)
        assert len(journal) == 0


async def test_tenants_have_their_own(model):
    keys = ("first-key-of-this-test", "second-key-of-this-test")
    async with router(api_keys=keys) as there:
        await there.add(worker(model, SPOKEN))
        mine, theirs = (there.openai.with_options(api_key=key) for key in keys)
        response = await mine.responses.create(model=MODEL, input="Hi", background=True)
        for ask in (
            theirs.responses.retrieve(response.id),
            theirs.responses.cancel(response.id),
            theirs.responses.delete(response.id),
            theirs.responses.input_items.list(response.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await ask
        with pytest.raises(openai.BadRequestError, match="not stored"):
            await theirs.responses.create(model=MODEL, input="Hi", previous_response_id=response.id)
        assert (await mine.responses.retrieve(response.id)).id == response.id
        with pytest.raises(openai.AuthenticationError):
            await there.openai.with_options(api_key="none").responses.retrieve(response.id)


# ---------------------------------------------------------------- background


async def test_a_background_response_is_polled_and_continued_as_a_stream(there):
    response = await create(there, background=True)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    done = await over(there, response)
    assert (done.status, done.output_text) == ("completed", SPOKEN)
    events = [event async for event in await there.openai.responses.retrieve(response.id, stream=True)]
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert said(events[-1].response) == said(done)
    for after in (0, 7, len(events) - 2):
        rest = await there.openai.responses.retrieve(response.id, stream=True, starting_after=after)
        assert [event.to_dict() async for event in rest] == [event.to_dict() for event in events[after + 1 :]]
    last = await there.openai.responses.retrieve(response.id, stream=True, starting_after=len(events) - 1)
    with pytest.raises(openai.BadRequestError, match="events up to"):
        await there.openai.responses.retrieve(response.id, stream=True, starting_after=10**8)
    assert [event async for event in last] == []


async def test_a_background_stream_that_is_left_goes_on_where_it_was_left(there):
    slow(there)
    had: list[Any] = []
    async with there.openai.responses.stream(model=MODEL, input="Hi", background=True) as stream:
        async for event in stream:
            had.append(event)
            if len(had) == 8:
                break
    name = had[0].response.id
    now = await there.openai.responses.retrieve(name)
    assert now.status == "in_progress"
    assert SPOKEN.startswith(now.output_text)
    async with there.openai.responses.stream(response_id=name, starting_after=had[-1].sequence_number) as rest:
        more = [event async for event in rest]
        final = await rest.get_final_response()
    numbers = [event.sequence_number for event in had + more]
    assert numbers == list(range(len(numbers)))
    deltas = [event.delta for event in had + more if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == SPOKEN


async def test_a_background_response_is_cancelled_and_keeps_what_it_said(there):
    slow(there)
    response = await create(there, background=True, stream=False)
    with pytest.raises(openai.BadRequestError, match="still under way"):
        await create(there, previous_response_id=response.id)
    await until(lambda: bool(there.workers[0].submits))
    reading = asyncio.create_task(_last(await there.openai.responses.retrieve(response.id, stream=True)))
    await asyncio.sleep(0.3)
    cancelled = await there.openai.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    last = await reading
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    again = await there.openai.responses.cancel(response.id)
    assert again.status == "cancelled"
    assert SPOKEN.startswith(again.output_text)
    assert again.output_text not in ("", SPOKEN)
    assert there.process._flow.cluster()["router"]["in_flight_requests"] == 0


async def _last(stream: Any) -> Any:
    return [event async for event in stream][-1]


async def test_a_deleted_response_is_gone_and_computes_no_more(there):
    slow(there)
    response = await create(there, background=True)
    reading = asyncio.create_task(_last(await there.openai.responses.retrieve(response.id, stream=True)))
    await until(lambda: bool(there.workers[0].submits))
    await there.openai.responses.delete(response.id)
    assert (await reading).type == "response.failed"
    with pytest.raises(openai.NotFoundError):
        await there.openai.responses.retrieve(response.id)
    await until(lambda: there.process._flow.cluster()["router"]["in_flight_requests"] == 0)


async def test_a_refused_background_response_is_an_error_at_once(model):
    async with router(max_running=1) as there:
        await there.add(worker(model, SPOKEN))
        slow(there)
        first = await create(there, background=True)
        with pytest.raises(openai.RateLimitError):
            await create(there, background=True)
        assert len(there.process._front.streams.journal) == 1
        await there.openai.responses.cancel(first.id)


async def test_a_background_response_that_fails_is_kept_as_failed(there):
    slow(there, 1.0)
    response = await create(there, background=True, extra_headers={"x-request-timeout": "2"})
    failed = await over(there, response)
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    assert failed.error.message
    last = await _last(await there.openai.responses.retrieve(response.id, stream=True))
    assert (last.type, last.response.error.message) == ("response.failed", failed.error.message)


async def test_a_client_that_leaves_ends_its_request_unless_it_comes_back(there):
    slow(there)
    for headers, is_running in (({}, False), ({"x-twostroke-resumable": "1"}, True)):
        there.workers[0].submits.clear()
        asking = asyncio.create_task(create(there, extra_headers=headers))
        await until(lambda: bool(there.workers[0].submits))
        asking.cancel()
        await asyncio.wait((asking,))
        if not is_running:
            await until(lambda: there.process._flow.cluster()["router"]["in_flight_requests"] == 0)
    (entry,) = there.process._front.streams.journal.entries()
    await until(lambda: entry.is_over)
    kept = await there.openai.responses.retrieve(entry.asked.request.request_id)
    assert (kept.status, kept.output_text) == ("completed", SPOKEN)


async def test_an_idempotency_key_gives_the_same_response(there):
    key = {"idempotency-key": "once"}
    first = await create(there, extra_headers=key)
    again = await create(there, extra_headers=key)
    assert said(first) == said(again)
    assert len(there.workers[0].submits) == 1
    with pytest.raises(openai.UnprocessableEntityError):
        await create(there, "Other", extra_headers=key)


# ---------------------------------------------------------------- doors


@pytest.mark.parametrize(
    ("more", "status", "code", "param"),
    [
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"input": ""}, 400, "invalid_value", "input"),
        ({"input": []}, 400, "invalid_value", "input"),
        ({"input": 7}, 400, "invalid_value", "input"),
        ({"input": [7]}, 400, "invalid_value", "input[0]"),
        ({"input": [{"role": "user", "content": "x"}] * 5000}, 400, "invalid_value", "input"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"max_output_tokens": 0}, 400, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": 10**9}, 400, "context_length_exceeded", "max_output_tokens"),
        ({"input": "word " * 70_000}, 400, "context_length_exceeded", "input"),
        ({"conversation": "conv_1"}, 400, "unsupported_parameter", "conversation"),
        ({"background": True, "store": False}, 400, "invalid_value", "background"),
        ({"previous_response_id": "resp_x"}, 400, "previous_response_not_found", "previous_response_id"),
        ({"text": {"format": {"type": "xml"}}}, 400, "invalid_value", "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, 400, "invalid_value", "text.format.name"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": 7}}}},
            *(400, "invalid_value", "text.format"),
        ),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, 400, "invalid_value", "input"),
        ({"max_tokens": 3}, 400, "unsupported_parameter", "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "unsupported_parameter", "messages"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
        ({"n": 2}, 400, "unsupported_parameter", "n"),
        ({"reasoning": {"effort": "wild"}}, 400, "invalid_value", "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, 400, "unsupported_parameter", "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, 400, "unsupported_parameter", "tool_choice"),
    ],
)
async def test_errors_have_openais_form_and_the_clients_names(there, more, status, code, param):
    body = {"model": MODEL, "input": "Hi", **more}
    async with httpx.AsyncClient(base_url=there.url, timeout=30) as client:
        reply = await client.post("/v1/responses", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)


async def test_unknown_fields_are_named_as_the_client_wrote_them(model):
    async with router(strict=True) as there, httpx.AsyncClient(base_url=there.url, timeout=30) as client:
        await there.add(worker(model, "x"))
        reply = await client.post("/v1/responses", json={"model": MODEL, "input": "Hi", "max_outputs": 3})
        error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "max_outputs")
    assert error["message"].startswith("max_outputs is not a field of this API; did you mean max_output_tokens?")


async def test_a_call_that_is_not_served_is_no_wrong_method(there):
    async with httpx.AsyncClient(base_url=there.url, timeout=30) as client:
        assert (await client.post("/v1/responses/compact", json={})).status_code == 404


@pytest.mark.parametrize("after", ["-1", "1e3", "x", "9" * 30, "٣", "%00"])
async def test_a_place_that_is_no_number_is_refused(there, after):
    response = await create(there, background=True)
    async with httpx.AsyncClient(base_url=there.url, timeout=60) as client:
        reply = await client.get(f"/v1/responses/{response.id}?stream=true&starting_after={after}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "starting_after")
        for query in ("stream=maybe", "starting_after=3", "include=junk", "include[]=junk"):
            assert (await client.get(f"/v1/responses/{response.id}?{query}")).status_code == 400
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nothing", "include=junk"):
            assert (await client.get(f"/v1/responses/{response.id}/input_items?{query}")).status_code == 400


async def test_a_response_made_without_background_is_not_streamed_again(there):
    response = await create(there)
    with pytest.raises(openai.BadRequestError, match="without background"):
        await there.openai.responses.retrieve(response.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="without background"):
        await there.openai.responses.cancel(response.id)


async def test_what_agents_send_is_taken_and_what_has_no_effect_is_named(there):
    """The fields of Codex and of the Agents SDK, with tools of OpenAI's own servers beside a function."""
    body = {
        "model": MODEL,
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAAA"},
            {"type": "function_call", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "a.py"}]},
        ],
        "tools": [
            {"type": "function", "name": "shell", "strict": False, "parameters": SCHEMA},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
            {"type": "namespace", "name": "mcp", "tools": []},
            {"type": "web_search", "external_web_access": True},
            {"type": "image_generation", "output_format": "png"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a-session",
        "text": {"verbosity": "low"},
        "truncation": "auto",
        "client_metadata": {"x": "y"},
        "verve": 3,
    }
    async with httpx.AsyncClient(base_url=there.url, timeout=60) as client:
        reply = await client.post("/v1/responses", json=body)
    assert reply.status_code == 200
    assert "response.completed" in reply.text
    named = set(reply.headers["x-twostroke-ignored"].split(", "))
    assert {"verve", "truncation", "tools.custom", "tools.namespace", "tools.web_search"} <= named
    assert {"tools.image_generation", "input.encrypted_content"} <= named


async def test_tokens_are_counted_without_an_answer(there):
    counted = await there.openai.responses.input_tokens.count(model=MODEL, input="Hi", instructions="Be brief.")
    assert counted.input_tokens == (await create(there, instructions="Be brief.")).usage.input_tokens
