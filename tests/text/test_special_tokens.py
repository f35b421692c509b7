"""Tokens that only the files beside tokenizer.json name or flag, with transformers as the oracle."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from twostroke.core.errors import CheckpointError
from twostroke.text.templates.template import ChatTemplate
from twostroke.text.tokenizer import Tokenizer

Files = dict[str, dict[str, Any]]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NUM_HELD = 260  # 256 bytes, <s>, </s>, <held> (flagged as no special one) and <flagged>
TEXTS = ["a <s>b</s>", "x<held>y<flagged>z", "a <tool> b<tool>", "<|call|> <|call|>c\n", "<image><pad><unk>"]


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, **plain, "special": True, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


def write(directory: Path, files: Files) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    held = [
        AddedToken(name, special=name != "<held>", normalized=False) for name in ("<s>", "</s>", "<held>", "<flagged>")
    ]
    backend.add_tokens(held)
    backend.save(str(directory / "tokenizer.json"))
    for name, content in ({CONFIG: {}} | files).items():
        (directory / name).write_text(json.dumps(content))
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return directory


def agrees_with_transformers(directory: Path) -> Tokenizer:
    """The same ids, and text; but what they name as special gives none here, and may be split, flagged or not."""
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    flagged = {id_ for id_, one in theirs.added_tokens_decoder.items() if one.special}
    hidden = set(theirs.all_special_ids) | flagged
    not_split = theirs.convert_ids_to_tokens(sorted(hidden - flagged)) if theirs.split_special_tokens else []
    for text in [*TEXTS, "".join(TEXTS), " ".join(theirs.all_special_tokens)]:
        if any(name in text for name in not_split):
            continue
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == theirs.decode([id_ for id_ in ids if id_ not in hidden], skip_special_tokens=True)
    assert ours.special_ids == hidden
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    return ours


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"added_tokens_decoder": {"260": token("<tool>"), "261": token("<|call|>", special=False)}}},
        {CONFIG: {"added_tokens_decoder": {"258": token("<held>", lstrip=True)}, "eos_token": "<held>"}},
        {CONFIG: {"added_tokens_decoder": {"260": token("<tool>", special=False)}, "eos_token": "<tool>"}},
        {CONFIG: {"added_tokens_decoder": {}}, MAP: {"bos_token": "<s>", "additional_special_tokens": ["<tool>"]}},
        {CONFIG: {"additional_special_tokens": ["<held>", "<tool>"]}},
        {CONFIG: {"additional_special_tokens": [typed("<tool>", rstrip=True), typed("<|call|>", lstrip=True)]}},
        {CONFIG: {"extra_special_tokens": ["<tool>"], "additional_special_tokens": ["<|call|>"]}},
        {CONFIG: {"extra_special_tokens": {"image_token": "<image>", "tool_token": "<tool>"}}},
        {CONFIG: {"extra_special_tokens": [], "additional_special_tokens": ["<tool>"]}},
        {CONFIG: {"image_token": "<image>", "call_token": typed("<|call|>"), "add_bos_token": True, "no_token": None}},
        {CONFIG: {"model_specific_special_tokens": {"image_token": "<image>"}}},
        {CONFIG: {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": typed("<unk>")}},
        {CONFIG: {"bos_token": "<s>"}, MAP: {"bos_token": token("</s>"), "eos_token": "<held>"}},
        {MAP: {"additional_special_tokens": ["<tool>", "<|call|>"], "pad_token": "<pad>", "image_token": "<image>"}},
        {
            MAP: {"extra_special_tokens": ["<tool>", {"content": "<|call|>"}]},
            CONFIG: {"extra_special_tokens": ["<held>"]},
        },
        {MAP: {"additional_special_tokens": ["<tool>"]}, CONFIG: {"additional_special_tokens": ["<held>"]}},
        {ADDED: {"<tool>": 260, "<|call|>": 261}, CONFIG: {"additional_special_tokens": ["<|call|>"]}},
        {ADDED: {"<held>": 258, "<tool>": 260}, MAP: {"eos_token": "<held>"}},
        {ADDED: {"<tool>": 999}, CONFIG: {"added_tokens_decoder": {}}},  # not read
        {CONFIG: {"split_special_tokens": True, "bos_token": "<s>"}},
        {CONFIG: {"split_special_tokens": True, "added_tokens_decoder": {"260": token("<tool>", special=False)}}},
    ],
    ids=str,
)
def test_what_the_files_name_is_what_transformers_makes_of_it(tmp_path: Path, files: Files) -> None:
    agrees_with_transformers(write(tmp_path, files))


contents = st.sampled_from(["<s>", "</s>", "<held>", "<flagged>", "<tool>", "<|call|>", "<image>", "<pad>", "a"])
values = st.one_of(
    contents,
    st.builds(lambda c, left, right: typed(c, lstrip=left, rstrip=right), contents, st.booleans(), st.booleans()),
)


# transformers 5 fails on some objects in special_tokens_map.json, so it has strings here.
def fields(values: st.SearchStrategy[Any], lists: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = dict.fromkeys(("bos_token", "pad_token", "image_token"), values)
    by_name = st.dictionaries(st.sampled_from(["own_token", "image_token"]), contents, max_size=2)
    listed = {"additional_special_tokens": lists, "extra_special_tokens": st.one_of(lists, by_name)}
    return st.fixed_dictionaries({}, optional=named | listed | {"split_special_tokens": st.booleans()})


decoder = st.lists(contents, max_size=3, unique=True).map(
    lambda names: {str(NUM_HELD + place): token(name, special=place != 1) for place, name in enumerate(names)}
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    # Of one that a list names twice with other flags, transformers takes now the first, now the last.
    config=fields(values, st.lists(values, max_size=3, unique_by=lambda v: v if isinstance(v, str) else v["content"])),
    older=fields(contents, st.lists(contents, max_size=3)),
    added=st.one_of(st.none(), decoder),
)
def test_any_files_agree_or_are_refused_by_name(config: Any, older: Any, added: Any) -> None:
    older.pop("split_special_tokens", None)
    files: Files = {CONFIG: config if added is None else {**config, "added_tokens_decoder": added}, MAP: older}
    with tempfile.TemporaryDirectory() as temporary:
        directory = write(Path(temporary), files)
        refused = ""
        try:
            agrees_with_transformers(directory)
        except CheckpointError as error:
            refused = error.message
    assert not refused or any(repr(one["content"]) in refused for one in (added or {}).values())


def test_spaces_between_special_tokens_is_nothing_to_fast_tokenizers(tmp_path: Path) -> None:
    """So the field of that name has no effect."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write(tmp_path, {}))
    ids = theirs.encode("<s></s> a<s>")
    for skip in (True, False):
        said = [theirs.decode(ids, skip_special_tokens=skip, spaces_between_special_tokens=on) for on in (True, False)]
        assert said[0] == said[1] == Tokenizer.load(tmp_path).decode(ids, skip)


def test_chat_templates_know_a_models_own_names(tmp_path: Path) -> None:
    config = {"image_token": "<image>", "bos_token": "<s>", "chat_template": "{{ bos_token }}{{ image_token }}"}
    template = ChatTemplate.load(write(tmp_path, {CONFIG: config}))
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<s><image>"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {CONFIG: {"added_tokens_decoder": {"300": token("<tool>")}}},
            "'<tool>' the id 300, tokenizer.json the id 260",
        ),
        (
            {CONFIG: {"added_tokens_decoder": {"260": token("<held>")}}},
            "'<held>' the id 260, tokenizer.json the id 258",
        ),
        ({ADDED: {"<tool>": 7}}, "added_tokens.json gives the token '<tool>' the id 7"),
        ({ADDED: {"<tool>": "260"}}, "added_tokens.json: the id of '<tool>' is '260'"),
        ({CONFIG: {"added_tokens_decoder": ["<tool>"]}}, "tokenizer_config.json: added_tokens_decoder is no object"),
        ({CONFIG: {"added_tokens_decoder": {"260": 3}}}, r"added_tokens_decoder\[260\] is 3; must be a string, or"),
        ({CONFIG: {"additional_special_tokens": "<tool>"}}, "additional_special_tokens is '<tool>'; must be a list"),
        ({CONFIG: {"additional_special_tokens": [None]}}, r"additional_special_tokens\[0\] is None"),
        ({CONFIG: {"extra_special_tokens": {"image_token": 3}}}, "tokenizer_config.json: image_token is 3"),
        ({CONFIG: {"model_specific_special_tokens": 3}}, "model_specific_special_tokens is 3"),
        ({MAP: {"pad_token": 3}}, "special_tokens_map.json: pad_token is 3"),
        ({CONFIG: {"split_special_tokens": "yes"}}, "split_special_tokens is 'yes'; must be true or false"),
        ({CONFIG: {"eos_token": "<nope>"}, "config.json": {"vocab_size": 260}}, "'<nope>' is not in"),
        ({CONFIG: {"eos_token": "<nope>"}, "config.json": {"text_config": {"vocab_size": 260}}}, "'<nope>' is not in"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, files: Files, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        Tokenizer.load(write(tmp_path, files))
    assert str(tmp_path) in caught.value.message


def test_a_model_with_more_rows_may_have_the_token(tmp_path: Path) -> None:
    files: Files = {CONFIG: {"eos_token": "<new>"}, "config.json": {"vocab_size": 320}}
    assert Tokenizer.load(write(tmp_path, files)).eos_ids == (260,)
