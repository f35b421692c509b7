"""Real models' chat templates in our sandbox, with transformers' apply_chat_template as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from support.checkpoints.real_models import real_models
from tokenizers import models

from twostroke.core.errors import InvalidRequest
from twostroke.text.templates.sandbox import Limits
from twostroke.text.templates.template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}},
}
ANSWER = {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"t": 20}'}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hi, what's <b>up</b>?")],
    "system": [SYSTEM, user("Naïve 日本 🎉\n\n  two")],
    "turns": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("<think>\nhm\n</think>\n\nd"), user("e")],
    "calls": [user("w?"), assistant("", tool_calls=[CALL]), ANSWER, assistant("20"), user("ok")],
    "nulls": [user("w?"), assistant(None, tool_calls=[CALL, CALL]), ANSWER],
    "reasoning": [user("q"), assistant("a", reasoning="because"), user("r")],
    "parts": [user([{"type": "text", "text": "p1"}, {"type": "text", "text": "p2"}])],
    "twice the user": [user("a"), user("b")],
    "assistant first": [assistant("a"), user("b")],
    "unknown role": [{"role": "wizard", "content": "a"}],
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}, "days": {"type": "integer", "enum": [1, 2, 3]}},
    "required": ["city"],
}
TOOL = {"name": "get_weather", "description": 'The "weather" <now>', "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": {**TOOL, "return": {"type": "string"}}}]
# Of those that users ask for first; the others are rendered, too.
EXPECTED = {
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen-QwQ-32B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-3.3-2B-Instruct",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "openai-gpt-oss-120b",
}


def oracle(source: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    theirs.chat_template = source
    return theirs


def compare(source: str, **more: Any) -> tuple[int, int]:
    """How many chats were rendered, and how many refused; raises where we differ."""
    ours, theirs = ChatTemplate({"default": source}, SPECIAL, Limits(max_seconds=20)), oracle(source)
    rendered = refused = 0
    for name, chat in CHATS.items():
        for tools in (None, TOOLS):
            for prompt in (True, False):
                arguments = {"tools": tools, "add_generation_prompt": prompt, **more}
                try:
                    expected = theirs.apply_chat_template(chat, tokenize=False, **arguments)
                except Exception:
                    refused += 1
                    with pytest.raises(InvalidRequest) as caught:
                        ours.render(chat, prompt, tools, options=more)
                    assert caught.value.param == "messages"
                else:
                    rendered += 1
                    assert ours.render(chat, prompt, tools, options=more) == expected, name
    return rendered, refused


@pytest.mark.timeout(240)  # the first one fetches 77 MB
def test_every_real_template_renders_as_transformers_does() -> None:
    sources = {path.stem: path.read_bytes().decode() for path in sorted(real_models().glob("*.jinja"))}
    assert sources.keys() >= EXPECTED
    counts = {}
    for name, source in sources.items():
        try:
            counts[name] = compare(source)
        except BaseException as error:
            error.add_note(f"template: {name}")
            raise
    assert min(counts[name][0] for name in EXPECTED) >= 12  # of 40; Gemma takes no system and no tools
    assert sum(rendered > 0 for rendered, _ in counts.values()) >= 65  # two want tools in a form of their own
    assert sum(refused > 0 for _, refused in counts.values()) >= 15  # their own raise_exception, and what they fail on


def test_what_a_template_asks_for_beside_messages_reaches_it() -> None:
    source = (real_models() / "Qwen-Qwen3-0.6B.jinja").read_text()
    thinking, silent = (
        ChatTemplate({"default": source}).render([user("a")], options={"enable_thinking": t}) for t in (True, False)
    )
    assert (thinking.endswith("<think>\n\n</think>\n\n"), silent.endswith("<think>\n\n</think>\n\n")) == (False, True)
    compare(source, enable_thinking=False)


def test_the_templates_refusal_reaches_the_client_in_its_own_words() -> None:
    gemma = ChatTemplate({"default": (real_models() / "google-gemma-2-2b-it.jinja").read_text()})
    with pytest.raises(InvalidRequest, match="System role not supported"):
        gemma.render([SYSTEM, user("a")])


def test_documents_reach_a_template() -> None:
    source = "{% for d in documents %}[{{ d.title }}: {{ d.text }}]{% endfor %}{{ messages[0].content }}"
    documents = [{"title": "t", "text": "x"}]
    expected = oracle(source).apply_chat_template([user("q")], tokenize=False, documents=documents)
    assert ChatTemplate({"default": source}).render([user("q")], documents=documents) == expected == "[t: x]q"


def test_options_hide_nothing_and_formats_stay_bare() -> None:
    chat = [user("q")]
    template = ChatTemplate({"default": "{{ messages[0].content }}{{ '<{}|{n}>'.format(7, n='x') }}"})
    assert template.render(chat, options={"messages": "other"}) == "q<7|x>"
    for hostile in ("{:>9}", "{!r}", "{0.__class__}", "{0[0]}"):
        with pytest.raises(InvalidRequest, match="bare fields"):
            ChatTemplate({"default": "{{ '" + hostile + "'.format('a') }}"}).render(chat)
