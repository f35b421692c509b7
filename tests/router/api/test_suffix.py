"""Completions between two texts, for models whose tokenizer has words for that."""

from pathlib import Path

import pytest
from support.fakes.scripted_worker import make_model

from twostroke.core.errors import InvalidRequest, UnsupportedParameter
from twostroke.router.api.call import GenerateCall
from twostroke.router.api.fields import ChatBody, CompletionBody
from twostroke.router.api.models import ServedModel
from twostroke.router.api.openai_requests import completion_calls, parse
from twostroke.router.api.validate import Limits, validate
from twostroke.router.keys.grants import KeyRing
from twostroke.text.fill_in import fill_in_prompt
from twostroke.text.tokenizer import Tokenizer

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
LIMITS = Limits(8, None, 10.0, KeyRing())


def served(path: Path, special: tuple[str, ...]) -> ServedModel:
    tokenizer = Tokenizer.load(make_model(path, special=special))
    return ServedModel("m", 4096, tokenizer.vocab_size, tokenizer, None, None)  # type: ignore[arg-type]


def test_the_prompt_holds_both_texts_in_the_models_words(tmp_path):
    model = served(tmp_path / "m", QWEN)
    request = validate(GenerateCall(prompt="def f(", suffix="return x"), model, LIMITS)
    text = model.tokenizer.decode(request.prompt_ids, False)
    assert text.endswith("<|fim_prefix|>def f(<|fim_suffix|>return x<|fim_middle|>")
    assert [id_ for id_ in request.prompt_ids if model.tokenizer.token(id_) in QWEN] == [
        model.tokenizer.backend.token_to_id(word) for word in QWEN
    ]


def test_a_tokenizer_without_such_words_is_told(tmp_path):
    model = served(tmp_path / "m", ())
    with pytest.raises(UnsupportedParameter, match="suffix: m has no tokens for text in the middle") as caught:
        validate(GenerateCall(prompt="def f(", suffix="return x"), model, LIMITS)
    assert caught.value.param == "suffix"


def test_token_ids_have_no_suffix(tmp_path):
    with pytest.raises(InvalidRequest, match="give the prompt as text"):
        validate(GenerateCall(prompt=[1, 2], suffix="x"), served(tmp_path / "m", QWEN), LIMITS)


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (QWEN, "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_prefix>a<fim_suffix>b<fim_middle>"),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"),
        (("[PREFIX]", "[SUFFIX]"), "[SUFFIX]b[PREFIX]a"),
        (("<fim_prefix>", "<fim_suffix>"), None),
    ],
)
def test_each_familys_words_are_known(words, prompt):
    assert fill_in_prompt("a", "b", words.__contains__) == prompt


def test_an_empty_suffix_is_none_and_echo_does_not_go_with_one():
    body, _ = parse({"prompt": "a", "suffix": ""}, CompletionBody)
    assert completion_calls(body, None, 1)[0].suffix is None
    body, _ = parse({"prompt": "a", "suffix": "b", "echo": True}, CompletionBody)
    with pytest.raises(InvalidRequest, match="leave one out"):
        completion_calls(body, None, 1)
    with pytest.raises(UnsupportedParameter, match="suffix"):
        parse({"messages": [{"role": "user", "content": "a"}], "suffix": "b"}, ChatBody)
