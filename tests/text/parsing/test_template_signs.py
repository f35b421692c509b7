"""The chat templates of real models tell which parsers read their output."""

import pytest
from support.checkpoints.real_models import real_models

from twostroke.text.parsing.parsers import Parsers, parsers_of

EXPECTED = {
    "Qwen-Qwen2.5-7B-Instruct": Parsers("hermes", "none"),
    "Qwen-Qwen3-0.6B": Parsers("hermes", "think"),
    "Qwen-QwQ-32B": Parsers("hermes", "think"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": Parsers("hermes", "none"),
    "Qwen3-Coder": Parsers("qwen3_xml", "none"),
    "Qwen3.5-4B": Parsers("qwen3_xml", "think"),
    "GLM-4.6": Parsers("glm", "think"),
    "GLM-4.7-Flash": Parsers("glm", "think"),
    "deepseek-ai-DeepSeek-V3.1": Parsers("deepseek", "think"),
    "deepseek-ai-DeepSeek-V3.2": Parsers("deepseek", "think"),
    "deepseek-ai-DeepSeek-V4": Parsers("deepseek", "think"),
    "Kimi-K2-Instruct": Parsers("kimi_k2", "none"),
    "Kimi-K2-Thinking": Parsers("kimi_k2", "think"),
    "Kimi-K3": Parsers("kimi_k3", "kimi_k3"),
    "mistralai-Mistral-Nemo-Instruct-2407": Parsers("mistral", "none"),
    "Mistral-Small-3.2-24B-Instruct-2506": Parsers("mistral", "none"),
    "mistralai-Ministral-3-14B-Reasoning-2512": Parsers("mistral", "mistral"),
    "meta-llama-Llama-3.1-8B-Instruct": Parsers("llama3_json", "none"),
    "meta-llama-Llama-3.3-70B-Instruct": Parsers("llama3_json", "none"),
    "google-gemma-4-31B-it": Parsers("gemma4", "gemma4"),
    "openai-gpt-oss-120b": Parsers("harmony", "harmony"),
    # Formats without a parser here, or without tools.
    "google-gemma-2-2b-it": Parsers("none", "none"),
    "microsoft-Phi-3.5-mini-instruct": Parsers("none", "none"),
    "meetkai-functionary-medium-v3.1": Parsers("none", "none"),
    "ByteDance-Seed-OSS": Parsers("none", "none"),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_real_template_tells_its_parsers(name: str):
    assert parsers_of((real_models() / f"{name}.jinja").read_text()) == EXPECTED[name]
