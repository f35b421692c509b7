"""Tools and reasoning through a whole router: the official client, the SDK, streams, and a worker that dies.

The workers are scripted, because the bundled model emits no calls; router, wire, tokenizer and templates are real.
"""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from support.clusters.flow_cluster import until
from support.fakes.scripted_router import HELLO, router, worker
from support.fakes.scripted_worker import CONTROL, CONTROL_TOKENS, HERMES, MODEL, make_model

from twostroke.router.config import RouterConfig

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OSLO, ROME = {"city": "Oslo – Østkanten"}, {"city": "Rome"}


UNKNOWN = {"type": "object", "properties": {"x": {"type": "nonsense"}}}


def with_function(**fields: Any) -> dict[str, Any]:
    """WEATHER with other fields of its function."""
    return {**WEATHER, "function": {**WEATHER["function"], **fields}}


def among(mode: str, *names: str) -> dict[str, Any]:
    """The choice of OpenAI's `allowed_tools`."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def call_text(arguments: dict[str, Any], name: str = "get_weather") -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


TWO = f"Let me see.\n{call_text(OSLO)}\n{call_text(ROME)}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def assembled(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """What the chunks of a stream say together, per choice."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        said = found.setdefault(choice.index, {"content": "", "reasoning": "", "calls": [], "reason": None})
        said["content"] += choice.delta.content or ""
        reasoning = getattr(choice.delta, "reasoning", None) or ""
        assert reasoning == (getattr(choice.delta, "reasoning_content", None) or "")
        said["reasoning"] += reasoning
        for call in choice.delta.tool_calls or []:
            if call.index == len(said["calls"]):
                assert call.id
                assert call.type == "function"
                assert call.function.name
                said["calls"].append([call.id, call.function.name, ""])
            else:
                assert call.id is None
                assert call.function.name is None
            said["calls"][call.index][2] += call.function.arguments
        assert said["reason"] is None, "nothing follows the finish reason"
        said["reason"] = choice.finish_reason
    return found


async def test_calls_are_the_same_whole_and_streamed(model):
    async with router() as there:
        await there.add(worker(model, TWO))
        whole = await there.chat(tools=[WEATHER])
        (choice,) = whole.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        calls = choice.message.tool_calls
        assert [call.function.name for call in calls] == ["get_weather", "get_weather"]
        assert [json.loads(call.function.arguments) for call in calls] == [OSLO, ROME]
        assert len({call.id for call in calls}) == 2
        stream = await there.chat(tools=[WEATHER], stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        said = assembled(chunks)[0]
        assert said["content"] == "Let me see."
        assert [(name, json.loads(text)) for _, name, text in said["calls"]] == [
            ("get_weather", OSLO),
            ("get_weather", ROME),
        ]
        assert said["reason"] == "tool_calls"
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 0


async def test_the_clients_own_accumulator_reads_the_stream(model):
    async with router() as there:
        await there.add(worker(model, TWO))
        asked = {
            "model": MODEL,
            "messages": HELLO,
            "tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}],
        }
        async with there.openai.chat.completions.stream(**asked) as stream:
            events = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert [json.loads(call.function.arguments) for call in final.choices[0].message.tool_calls] == [OSLO, ROME]
        assert events.count("tool_calls.function.arguments.done") == 2


async def test_a_conversation_goes_on_with_the_results(model):
    async with router() as there:
        scripted = await there.add(worker(model, call_text(OSLO)))
        first = (await there.chat(tools=[WEATHER])).choices[0].message
        scripted.says = "It rains."
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
        messages = [*HELLO, first.model_dump(exclude_none=True), result]
        answer = await there.openai.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
        assert answer.choices[0].message.content == "It rains."
        assert answer.choices[0].finish_reason == "stop"
        prompt = scripted.tokenizer.decode(list(scripted.submits[-1].prompt_ids), False)
        assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo' in prompt
        assert '"description": "The weather of a city."' in prompt
        assert prompt.count("rain") == 1


async def test_reasoning_has_both_names_and_is_counted(model):
    thoughts = "Rain is likely, I think."
    async with router() as there:
        scripted = await there.add(worker(model, f"{thoughts}\n</think>\n\nIt rains."))
        asked: dict[str, Any] = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
        whole = await there.chat(**asked)
        message = whole.choices[0].message
        assert message.content == "It rains."
        assert message.reasoning == message.reasoning_content == thoughts
        counted = whole.usage.completion_tokens_details.reasoning_tokens
        assert abs(counted - len(scripted.tokenizer.encode(thoughts, False))) <= 1
        said = assembled([chunk async for chunk in await there.chat(stream=True, **asked)])[0]
        assert (said["content"], said["reasoning"], said["reason"]) == ("It rains.", thoughts, "stop")
        asked["extra_body"]["include_reasoning"] = False
        without = (await there.chat(**asked)).choices[0].message
        assert without.content == "It rains."
        assert not hasattr(without, "reasoning")


async def test_reasoning_effort_reaches_the_template(model):
    async with router() as there:
        scripted = await there.add(worker(model, "I see.</think>Yes."))
        assert (await there.chat(reasoning_effort="low")).choices[0].message.content == "Yes."
        scripted.says = "Yes."
        assert (await there.chat(reasoning_effort="none")).choices[0].message.content == "Yes."
        prompts = [scripted.tokenizer.decode(list(order.prompt_ids), False) for order in scripted.submits]
        assert [prompt.endswith("<think>\n") for prompt in prompts] == [True, False]


async def test_a_call_that_max_tokens_cuts_is_not_given_out(model):
    async with router() as there:
        scripted = await there.add(worker(model, TWO))
        enough = len(scripted.tokenizer.encode(f"Let me see.\n{call_text(OSLO)}", False))
        for stream in (False, True):
            answer = await there.chat(tools=[WEATHER], max_tokens=enough + 8, stream=stream)
            if stream:
                said = assembled([chunk async for chunk in answer])[0]
                assert (said["content"], len(said["calls"]), said["reason"]) == ("Let me see.", 1, "length")
            else:
                (choice,) = answer.choices
                assert choice.message.content == "Let me see."
                assert len(choice.message.tool_calls) == 1
                assert choice.finish_reason == "length"


async def test_without_parallel_calls_only_the_first_is_given_out(model):
    async with router() as there:
        await there.add(worker(model, TWO))
        answer = await there.chat(tools=[WEATHER], parallel_tool_calls=False)
        assert [json.loads(call.function.arguments) for call in answer.choices[0].message.tool_calls] == [OSLO]
        said = assembled(
            [chunk async for chunk in await there.chat(tools=[WEATHER], parallel_tool_calls=False, stream=True)]
        )
        assert len(said[0]["calls"]) == 1


async def test_every_choice_has_calls_of_its_own(model):
    outputs = (call_text(OSLO), "No call.", call_text(ROME))
    async with router() as there:
        await there.add(worker(model, outputs=outputs))
        whole = await there.chat(tools=[WEATHER], n=3)
        assert [choice.finish_reason for choice in whole.choices] == ["tool_calls", "stop", "tool_calls"]
        said = assembled([chunk async for chunk in await there.chat(tools=[WEATHER], n=3, stream=True)])
        assert [len(said[index]["calls"]) for index in range(3)] == [1, 0, 1]
        assert said[1]["content"] == "No call."
        ids = [choice.message.tool_calls[0].id for choice in whole.choices if choice.message.tool_calls]
        assert len(set(ids)) == 2


async def test_no_tools_and_tool_choice_none_leave_the_text_alone(model):
    async with router() as there:
        scripted = await there.add(worker(model, TWO))
        assert (await there.chat()).choices[0].message.content == TWO
        answer = await there.chat(tools=[WEATHER], tool_choice="none")
        assert answer.choices[0].message.content == TWO
        assert answer.choices[0].finish_reason == "stop"
        assert "get_weather" not in scripted.tokenizer.decode(list(scripted.submits[-1].prompt_ids), False)


async def test_stop_strings_and_logprobs_count_the_whole_output(model):
    async with router() as there:
        scripted = await there.add(worker(model, TWO))
        stopped = await there.chat(tools=[WEATHER], stop=["Rome"])
        assert len(stopped.choices[0].message.tool_calls) == 1
        assert stopped.choices[0].finish_reason == "tool_calls"
        scored = await there.chat(tools=[WEATHER], logprobs=True)
        assert len(scored.choices[0].logprobs.content) == len(scripted.tokenizer.encode(TWO, False))
        chunks = [chunk async for chunk in await there.chat(tools=[WEATHER], logprobs=True, stream=True)]
        parts = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
        assert sum(map(len, parts)) == len(scored.choices[0].logprobs.content)


@pytest.mark.parametrize("index", [1, 6, 14, 30])
async def test_a_stream_goes_on_when_its_worker_dies(model, index):
    async with router() as there:
        first = await there.add(worker(model, TWO, name="w0", dies_at=index))
        stream = await there.chat(tools=[WEATHER], stream=True)
        await until(first.is_stuck.is_set)
        await there.add(worker(model, TWO, name="w1"))
        await first.die()
        said = assembled([chunk async for chunk in stream])[0]
        assert said["content"] == "Let me see."
        assert [json.loads(text) for _, _, text in said["calls"]] == [OSLO, ROME]
        assert said["reason"] == "tool_calls"


async def test_markers_that_are_special_tokens_are_seen_and_ids_fit_the_template(tmp_path):
    path = make_model(tmp_path / "control", CONTROL, CONTROL_TOKENS)
    output = 'Hi.[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}'
    async with router() as there:
        scripted = await there.add(worker(path, output))
        (choice,) = (await there.chat(tools=[WEATHER])).choices
        assert choice.message.content == "Hi."
        assert json.loads(choice.message.tool_calls[0].function.arguments) == ROME
        assert len(choice.message.tool_calls[0].id) == 9
        assert not scripted.submits[-1].sampling.skip_special_tokens


async def test_other_special_tokens_show_only_where_the_client_wants_them(tmp_path):
    path = make_model(tmp_path / "control", CONTROL, CONTROL_TOKENS)
    async with router() as there:
        await there.add(worker(path, "Hi [ARGS]there<|user|>.[TOOL_CALLS] Bye."))
        plain = await there.chat(tools=[WEATHER])
        assert plain.choices[0].message.content == "Hi there. Bye."
        shown = await there.chat(tools=[WEATHER], extra_body={"skip_special_tokens": False})
        assert shown.choices[0].message.content == "Hi [ARGS]there<|user|>.[TOOL_CALLS] Bye."


async def test_a_named_parser_overrides_the_template(model):
    async with router(tool_parser="mistral", reasoning_parser="none") as there:
        await there.add(worker(model, '<think>x</think>[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}'))
        message = (await there.chat(tools=[WEATHER])).choices[0].message
        assert message.content == "<think>x</think>"
        assert json.loads(message.tool_calls[0].function.arguments) == ROME


@pytest.mark.parametrize(
    ("schema", "about"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems cannot be kept"),
        ({"type": "string", "pattern": "(?=a)b"}, "the pattern cannot be kept (look-around"),
    ],
)
async def test_a_schema_that_cannot_be_kept_is_named_with_its_tool(model, schema, about):
    tools = [WEATHER, with_function(name="other", parameters={"type": "object", "properties": {"a": schema}})]
    async with router() as there:
        await there.add(worker(model, TWO))
        with pytest.raises(openai.BadRequestError) as caught:
            await there.chat(tools=tools, tool_choice="required")
        assert f"tools[1].function.parameters.properties.a: {about}" in caught.value.message
        assert "start:" not in caught.value.message


async def test_a_given_template_replaces_the_checkpoints(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(HERMES)
    model = make_model(tmp_path / "model", "{{ messages[0].content }}")  # no tools in it
    async with router(chat_template=str(path)) as there:
        path.unlink()  # it was read when the router was configured
        await there.add(worker(model, TWO))
        (call, _) = (await there.chat(tools=[WEATHER])).choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", OSLO)


async def test_a_given_template_that_prints_nothing_is_named(model):
    async with router(
        chat_template="{% for m in message %}{{ m.content }}{% endfor %}"
    ) as there:  # a slip: no messages
        await there.add(worker(model, TWO))
        with pytest.raises(openai.BadRequestError, match="chat template makes an empty prompt"):
            await there.chat()


async def test_parsers_can_be_switched_off(model):
    async with router(tool_parser="none", reasoning_parser="none") as there:
        await there.add(worker(model, TWO))
        assert (await there.chat(tools=[WEATHER])).choices[0].message.content == TWO


async def test_the_sdk_has_calls_and_reasoning(model):
    async with router() as there:
        await there.add(worker(model, f"<think>Hm.</think>{TWO}"))
        whole = await there.sdk.chat(HELLO, tools=[WEATHER], tool_choice="auto")
        (choice,) = whole.choices
        assert (choice.text, choice.reasoning, choice.finish_reason) == ("Let me see.", "Hm.", "tool_calls")
        assert [json.loads(call.arguments) for call in choice.tool_calls] == [OSLO, ROME]
        assert whole.usage.reasoning_tokens > 0
        chunks = [chunk async for chunk in there.sdk.chat_stream(HELLO, tools=[WEATHER], parallel_tool_calls=False)]
        assert "".join(chunk.text for chunk in chunks) == "Let me see."
        assert "".join(chunk.reasoning for chunk in chunks) == "Hm."
        assert [call.name for chunk in chunks for call in chunk.tool_calls] == ["get_weather"]
        assert chunks[-1].finish_reason == "tool_calls"
        later = [*HELLO, {"role": "assistant", "tool_calls": [choice.tool_calls[0].message_part]}]
        later.append({"role": "tool", "content": "rain", "tool_call_id": choice.tool_calls[0].id})
        assert (await there.sdk.chat(later, tools=[WEATHER])).choices[0].reasoning == "Hm."


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "allows calls only",
        ),
        ({"tools": [WEATHER], "tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos", "tools"),
        ({"tools": [with_function(parameters=UNKNOWN)], "tool_choice": "required"}, "tools", "nonsense"),
        ({"tools": [with_function(parameters=UNKNOWN, strict=True)]}, "tools", "nonsense"),
        ({"tools": [with_function(strict="yes")]}, "tools[0].function.strict", "true or false"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "none of the tools",
        ),
        ({"tools": [WEATHER], "tool_choice": among("auto", "other")}, "tool_choice", "names 'other'"),
        ({"tools": [WEATHER], "tool_choice": among("never", "get_weather")}, "tool_choice", "mode is 'never'"),
        ({"tools": [WEATHER], "tool_choice": among("auto")}, "tool_choice", "a list of 1 to"),
        ({"tools": [WEATHER], "tool_choice": "never"}, "tool_choice", "auto, none, required"),
        ({"tool_choice": "required"}, "tool_choice", "give tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "only function"),
        ({"tools": [{"type": "function", "name": "x"}]}, "tools[0].function", "an object with name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "another tool's"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]},
            "tools[0].function.parameters",
            "JSON schema",
        ),
        ({"tools": [WEATHER] * 129}, "tools", "at most 128"),
        ({"extra_body": {"functions": [WEATHER["function"]]}}, "functions", "give tools"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(model, more, param, words):
    async with router() as there:
        await there.add(worker(model, "Hi."))
        with pytest.raises(openai.BadRequestError) as caught:
            await there.chat(**more)
        assert caught.value.param == param
        assert words in caught.value.message


async def test_a_template_without_tools_is_told(tmp_path):
    path = make_model(tmp_path / "plain", "{% for m in messages %}{{ m.content }}{% endfor %}")
    async with router() as there:
        await there.add(worker(path, "Hi."))
        with pytest.raises(openai.BadRequestError, match="chat template reads none"):
            await there.chat(tools=[WEATHER])


async def test_a_template_of_an_unknown_format_is_told(tmp_path):
    path = make_model(tmp_path / "unknown", "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}")
    async with router() as there:
        await there.add(worker(path, "Hi."))
        with pytest.raises(openai.BadRequestError, match="--tool-parser, one of auto, none, hermes"):
            await there.chat(tools=[WEATHER])


def test_an_unknown_parser_in_the_configuration_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"router\.tool_parser is 'hermse'; must be one of auto, none, hermes"):
        RouterConfig(tool_parser="hermse")


@pytest.mark.parametrize(
    ("more", "mentions", "not_mentioned"),
    [
        ({"tool_choice": "required"}, ("call (", "get_weather", "get_time"), "before"),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, ("get_time",), "get_weather"),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, ("get_time",), "call ("),
        ({"tool_choice": among("required", "get_time")}, ("get_time",), "get_weather"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ("get_weather",), "call ("),
        ({"tools": [with_function(strict=True)]}, ("before", "get_weather"), "call ("),
    ],
)
async def test_the_choice_of_a_tool_reaches_the_worker_as_a_grammar(model, more, mentions, not_mentioned):
    asked = {"tools": [WEATHER, {"type": "function", "function": {"name": "get_time"}}], **more}
    async with router() as there:
        scripted = await there.add(worker(model, call_text(OSLO)))
        await there.chat(**asked)
        by_http = scripted.submits[-1].sampling.structured_outputs
        assert all(word in by_http.grammar for word in mentions)
        assert not_mentioned not in by_http.grammar
        await there.sdk.chat(HELLO, **asked)
        assert scripted.submits[-1].sampling.structured_outputs == by_http


async def test_a_format_without_a_grammar_refuses_to_enforce_and_names_strict_as_ignored(model):
    async with router(tool_parser="gemma4", reasoning_parser="none") as there:
        await there.add(worker(model, "Hi."))
        with pytest.raises(openai.BadRequestError, match="cannot be enforced: give auto"):
            await there.chat(tools=[WEATHER], tool_choice="required")
        answer = await there.openai.chat.completions.with_raw_response.create(
            model=MODEL, messages=HELLO, tools=[with_function(strict=True)]
        )
        assert answer.headers["x-twostroke-ignored"] == "tools.strict"
