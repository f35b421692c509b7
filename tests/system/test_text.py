"""Text of a model whose words hold the space before them: whole, streamed, echoed, over both faces of a cluster."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from twostroke import Client

MODEL = "words"
LETTERS = "▁abcdehlot"
NAMES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "▁a", "▁b", "▁h", "▁he"]
ID = {name: place for place, name in enumerate(NAMES)}
TOOL = len(NAMES)  # only the configuration names it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a vocabulary as Llama 2 has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp(MODEL)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=TOOL + 3, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    merges = [("▁", "a"), ("▁", "b"), ("▁", "h"), ("▁h", "e")]
    backend = tokenizers.Tokenizer(models.BPE(ID, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<tool>", "<t1>", "<t2>", "<t3>"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


@pytest.fixture(scope="module")
def cluster(run_cluster: Any, checkpoint: Path) -> Iterator[Any]:
    with run_cluster(
        cluster__launcher="inprocess",
        cluster__prefill=0,
        cluster__decode=1,
        model__path=str(checkpoint),
        model__name=MODEL,
        step__num_threads=1,
        cache__tokens=4096,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def sdk(cluster: Any) -> Iterator[Client]:
    with Client(cluster.grpc, timeout_s=60) as made:
        yield made


def forced(token_id: int, **fields: Any) -> dict[str, Any]:
    """A request whose output is one token again and again."""
    return {"prompt": "hello", "max_tokens": 2, "temperature": 0, "logit_bias": {token_id: 100}} | fields


def whole(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name.startswith(("skip", "include", "spaces"))}
    fields["logit_bias"] = {str(key): value for key, value in fields["logit_bias"].items()}
    return client.completions.create(model=MODEL, **fields, extra_body=extra)


def test_an_answer_keeps_its_first_space_however_it_is_asked_for(client, sdk):
    asked = forced(ID["▁he"])
    assert whole(client, **asked).choices[0].text == " he he"
    assert "".join(chunk.choices[0].text for chunk in whole(client, **asked, stream=True)) == " he he"
    prompt = asked.pop("prompt")
    assert sdk.generate(prompt, **asked).text == " he he"
    assert "".join(chunk.text for chunk in sdk.generate_stream(prompt, **asked)) == " he he"
    ids = sdk.tokenize(prompt).ids
    assert sdk.generate(ids, **asked).text == " he he"
    assert sdk.generate([ID["<s>"]], **asked).text == "he he"  # nothing stands before it
    assert sdk.generate(prompt, **asked, stop=" he h").text == ""


def test_echo_and_logprobs_are_of_the_one_text(client, sdk):
    for prompt in ("hello", sdk.tokenize("hello").ids, "日 é", "a <tool>b"):
        for streamed in (False, True):
            answer = whole(client, **forced(ID["▁he"], prompt=prompt, echo=True, logprobs=0, stream=streamed))
            choices = [chunk.choices[0] for chunk in answer] if streamed else answer.choices
            shown = "hello" if isinstance(prompt, tuple) else prompt
            assert "".join(choice.text for choice in choices) == shown + " he he"
            told = [choice.logprobs for choice in choices if choice.logprobs]
            tokens = [token for one in told for token in one.tokens]
            places = [place for one in told for place in one.text_offset]
            assert tokens[-2:] == [" he", " he"]
            assert places[-2:] == [len(shown), len(shown) + 3]
            assert places == sorted(places)
            if shown == "日 é":
                assert places == [
                    0,
                    0,
                    0,
                    0,
                    0,
                    1,
                    2,
                    2,
                    3,
                    6,
                ]  # <s>, the space in front, three bytes, space, two bytes


def test_special_tokens_show_where_they_are_asked_for_and_stop_where_they_are_named(client, sdk):
    asked = forced(TOOL, spaces_between_special_tokens=False)
    answer = whole(client, **asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "length")
    assert whole(client, **asked, skip_special_tokens=True).choices[0].text == ""
    assert whole(client, **asked, skip_special_tokens=False).choices[0].text == "<tool><tool>"
    assert whole(client, **asked, skip_special_tokens=False, stop="ol>").choices[0].text == "<to"
    for stop, skip in (("<tool>", True), ("<tool>", False), ("<tool><tool>", True)):
        answer = whole(client, **asked, stop=[stop], skip_special_tokens=skip)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
        assert answer.usage.completion_tokens == stop.count("<tool>")
        answer = whole(client, **asked, stop=[stop], skip_special_tokens=skip, include_stop_str_in_output=True)
        assert answer.choices[0].text == stop
    over_grpc = {
        name: value for name, value in asked.items() if name not in ("prompt", "spaces_between_special_tokens")
    }
    assert sdk.generate("hello", **over_grpc).text == ""
    assert sdk.generate("hello", **over_grpc, skip_special_tokens=False).text == "<tool><tool>"
    assert sdk.generate("hello", **over_grpc, stop="<tool>").choices[0].finish_reason == "stop"
    assert TOOL in sdk.tokenize("a<tool>b").ids


def test_a_token_that_the_model_has_no_row_for_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError, match="prompt holds '<t3>'"):
        client.completions.create(model=MODEL, prompt="a <t3>")
