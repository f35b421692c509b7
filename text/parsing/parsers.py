"""The parsers by name, and which one a model's chat template calls for. Knows no request.

A tool parser and a reasoning parser are chosen apart, because models share them in many pairs. The formats that are
one grammar (harmony, kimi_k3) are chosen for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...core.errors import ConfigError
from .deepseek import DeepSeekCalls
from .formats import CallFormat, Reading, Tags, read_output
from .gemma import GemmaCalls
from .glm import GlmCalls
from .harmony import read_harmony
from .hermes import HermesCalls
from .kimi import KimiCalls
from .kimi_k3 import read_kimi_k3
from .llama import LlamaJsonCalls, LlamaPythonCalls
from .mistral import MistralCalls
from .qwen_xml import QwenXmlCalls
from .source import Source, Steps
from .values import Tools

AUTO, NONE = "auto", "none"

CALLS: Mapping[str, type[CallFormat]] = {
    "hermes": HermesCalls,
    "qwen3_xml": QwenXmlCalls,
    "glm": GlmCalls,
    "deepseek": DeepSeekCalls,
    "kimi_k2": KimiCalls,
    "mistral": MistralCalls,
    "llama3_json": LlamaJsonCalls,
    "llama4_pythonic": LlamaPythonCalls,
    "gemma4": GemmaCalls,
}
TAGS: Mapping[str, Tags] = {
    "think": Tags(("<think>",), ("</think>",)),
    "mistral": Tags(("[THINK]", "<think>"), ("[/THINK]", "</think>")),
    "gemma4": Tags(("<|channel>",), ("<channel|>",), label="thought", comes_again=True),
}
WHOLE = {"harmony": read_harmony, "kimi_k3": read_kimi_k3}  # grammars of the whole output
_WHOLE_TAGS = {
    "harmony": Tags(("<|channel|>analysis<|message|>",), ("<|end|>",)),
    "kimi_k3": Tags(("<|open|>think<|sep|>",), ("<|close|>think<|sep|>", "<|open|>response<|sep|>")),
}
# Special tokens of a format, beside the openers of its calls and its tags: text without them cannot be parsed.
_WORDS = {
    "harmony": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"),
    "kimi_k3": ("<|open|>", "<|close|>", "<|sep|>"),
    "mistral": ("[ARGS]", "[CALL_ID]"),
    "gemma4": ('<|"|>', "<tool_call|>"),
    "deepseek": ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "｜DSML｜"),
    "kimi_k2": ("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
    "glm": ("<arg_key>", "<arg_value>"),
}
# Names of vLLM's and SGLang's parsers of the same formats.
_SAME_TOOLS = {
    "qwen3_coder": "qwen3_xml",
    "qwen": "hermes",
    "qwen25": "hermes",
    "deepseek_v3": "deepseek",
    "deepseekv3": "deepseek",
    "deepseek_v31": "deepseek",
    "glm45": "glm",
    "glm47": "glm",
    "openai": "harmony",
    "gpt-oss": "harmony",
    "llama3": "llama3_json",
    "pythonic": "llama4_pythonic",
}
_SAME_REASONING = {
    **dict.fromkeys(("deepseek_r1", "deepseek-r1", "deepseek_v3", "qwen3", "glm45", "kimi_k2", "step3"), "think"),
    **dict.fromkeys(("openai_gptoss", "gpt-oss"), "harmony"),
}
TOOL_PARSERS = (AUTO, NONE, *CALLS, *WHOLE)
REASONING_PARSERS = (AUTO, NONE, *TAGS, *WHOLE)

# Parser and words of a chat template; the first whose words all occur is taken.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>", "<|start|>")),
    ("kimi_k3", ("<|open|>", "<|close|>", "<|sep|>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek", ("｜DSML｜",)),
    ("deepseek", ("<｜tool▁calls▁begin｜>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("glm", ("<arg_key>", "<arg_value>")),
    ("qwen3_xml", ("<tool_call>", "<function=", "<parameter=")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("llama4_pythonic", ("<|header_start|>",)),
    ("llama3_json", ("<|start_header_id|>", '{"name": function name, "parameters"')),
    ("hermes", ("<tool_call>", "arguments")),
)
_REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>", "<|start|>")),
    ("kimi_k3", ("<|open|>", "<|close|>", "<|sep|>")),
    ("gemma4", ("<|channel>", "<channel|>")),
    ("mistral", ("[THINK]",)),
    ("think", ("</think>",)),
)


class Parsers(NamedTuple):
    """The parsers of one model; NONE: that part of the output stays content."""

    tools: str = NONE
    reasoning: str = NONE

    @property
    def words(self) -> frozenset[str]:
        """Words that the text of an output must keep, special tokens or not, so that it can be parsed."""
        found: set[str] = set()
        for name in self:
            found.update(CALLS[name].openers if name in CALLS else (), _WORDS.get(name, ()))
        for tags in (TAGS.get(self.reasoning), _WHOLE_TAGS.get(self.reasoning)):
            found.update((*tags.openers, *tags.closers) if tags else ())
        return frozenset(found)


NO_PARSERS = Parsers()
OWN_PARSERS = Parsers(AUTO, AUTO)  # those that the model's chat template calls for


def parsers_of(template: str | None, tools: str = AUTO, reasoning: str = AUTO) -> Parsers:
    """The parsers for a model with this source of its chat template; AUTO: what the template calls for.

    Raises:
        ConfigError: a name is unknown, or the two do not go together; names those that do.
    """
    tools, reasoning = _SAME_TOOLS.get(tools, tools), _SAME_REASONING.get(reasoning, reasoning)
    for field, name, known in (
        ("router.tool_parser", tools, TOOL_PARSERS),
        ("router.reasoning_parser", reasoning, REASONING_PARSERS),
    ):
        if name not in known:
            raise ConfigError(f"{field} is {name!r}; must be one of {', '.join(known)}")
    text = template or ""
    if tools == AUTO:
        tools = reasoning if reasoning in WHOLE else _first(_SIGNS, text)
    if reasoning == AUTO:
        reasoning = tools if tools in WHOLE else _first(_REASONING_SIGNS, text)
        reasoning = NONE if reasoning in WHOLE and tools not in (NONE, reasoning) else reasoning
    for whole, other in ((tools, reasoning), (reasoning, tools)):
        if whole in WHOLE and other not in (whole, NONE):
            raise ConfigError(
                f"router.tool_parser is {tools!r} and router.reasoning_parser {reasoning!r}; {whole} is a grammar of "
                f"the whole output: set both to {whole}, or the other to none"
            )
    return Parsers(tools, reasoning)


def _first(signs: Sequence[tuple[str, tuple[str, ...]]], text: str) -> str:
    return next((name for name, words in signs if all(word in text for word in words)), NONE)


def reading_of(parsers: Parsers, source: Source, prompt_end: str, tools: Tools | None) -> Steps[None]:
    """The generator that reads an output from `source`.

    `prompt_end`: the end of the prompt's text, which may have begun the reasoning. `tools`: those that may be called;
    None: calls stay content.
    """
    tags, is_thinking = _tags_of(parsers), begins_reasoning(parsers, prompt_end)
    whole = next((WHOLE[name] for name in parsers if name in WHOLE), None)
    if whole is not None:
        may_call = tools is not None and parsers.tools in WHOLE
        return whole(source, Reading(tags, CallFormat(tools) if may_call and tools is not None else None, is_thinking))
    kind = CALLS.get(parsers.tools)
    return read_output(source, Reading(tags, kind(tools) if kind and tools is not None else None, is_thinking))


def begins_reasoning(parsers: Parsers, prompt_end: str) -> bool:
    """True if the end of a prompt has begun the reasoning, which the output goes on with."""
    tags = _tags_of(parsers)
    return tags is not None and _is_open(tags, prompt_end)


def _tags_of(parsers: Parsers) -> Tags | None:
    return TAGS.get(parsers.reasoning) or _WHOLE_TAGS.get(parsers.reasoning)


def _is_open(tags: Tags, text: str) -> bool:
    """True if the last tag of reasoning in a text is an opening one."""
    opened = max(text.rfind(word) for word in tags.openers)
    return opened > max(text.rfind(word) for word in tags.closers)
