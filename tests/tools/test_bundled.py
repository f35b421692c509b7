"""The bundled model: it is small, loads anywhere, speaks its template and is better than the n-gram it must beat."""

import ast
import json
import math
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from bundled_model.conversations import Message
from bundled_model.corpus import is_held_out
from bundled_model.evaluate import perplexity, training_command
from bundled_model.export import load_network
from bundled_model.tokenizer import SPECIAL_TOKENS, render
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parents[2] / "model" / "bundled"
MOST_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text())


def test_the_whole_folder_fits_its_limit():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= {
        file.name for file in files
    }
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_config_states_the_shape_that_was_asked_for(tokenizer: PreTrainedTokenizerBase):
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] // config["num_key_value_heads"] == 2
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 4_096
    assert config["tie_word_embeddings"] is True
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert config["eos_token_id"] == tokenizer.eos_token_id
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])


@torch.no_grad()
def test_transformers_agrees_with_the_network_that_was_trained(model: PreTrainedModel):
    tokens = torch.randint(7, 4_096, (1, 700), generator=torch.Generator().manual_seed(1))
    ours, theirs = load_network(FOLDER)(tokens), model(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_special_tokens_are_the_first_ids(tokenizer: PreTrainedTokenizerBase):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert tokenizer("x = 1")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode([0, *range(7, 30), 6], skip_special_tokens=True).count("<|") == 0


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet=" \n\t\r'\"<|>énd漢🙂\x00", max_size=60))
def test_any_text_survives_the_tokenizer(text: str):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER) if not _KEPT else _KEPT[0]
    _KEPT[:] = [tokenizer]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(0 <= token < 4_096 for token in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


_KEPT: list[PreTrainedTokenizerBase] = []

TALK = [
    {"role": "system", "content": "You answer questions about Python."},
    {"role": "user", "content": "What does os.path.join do?"},
    {"role": "assistant", "content": "  It joins.\n"},
    {"role": "user", "content": "Thanks! "},
]


def test_the_template_ends_where_the_model_must_speak(tokenizer: PreTrainedTokenizerBase):
    open_text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    closed = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert open_text == closed + "<|assistant|>"
    assert closed == render([Message(turn["role"], turn["content"]) for turn in TALK])
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(open_text, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_template_keeps_earlier_turns_as_a_prefix(tokenizer: PreTrainedTokenizerBase):
    shorter = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    longer = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert longer[: len(shorter)] == shorter


def test_the_template_refuses_a_role_it_does_not_know(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(Exception, match="got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


@torch.no_grad()
def test_three_turns_stay_in_form_and_end_by_themselves(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    talk: list[dict[str, str]] = []
    for question in ("Hello!", "What does os.path.join do?", "Thanks!"):
        talk.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=400)[0, prompt["input_ids"].shape[1] :].tolist()
        assert answer[-1] == end
        assert not set(answer[:-1]) & set(range(7))
        talk.append({"role": "assistant", "content": tokenizer.decode(answer[:-1])})
        assert talk[-1]["content"].strip()


PROMPTS = (
    'class Stack:\n    """A stack."""\n\n    def push(self, item):',
    'def is_even(number):\n    """Return True if the number is even."""',
    'def copy(source, target):\n    """Copy a file."""\n    with open(source) as f:',
    "from collections import deque\n\nclass Queue:",
)


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_python_up_to_where_it_breaks_off(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=120)[0].tolist()
    assert all(0 <= token < 4_096 for token in out)
    lines = tokenizer.decode(out, skip_special_tokens=True).split("\n")
    written = len(lines) - prompt.count("\n")
    assert written >= 8, lines
    assert any(parses("\n".join(lines[: len(lines) - cut])) for cut in range(4)), lines


def held_out_texts() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = ("fnmatch.py", "symtable.py", "tracemalloc.py", "email/utils.py", "fractions.py")
    assert all(is_held_out(name) for name in names)
    return [(root / name).read_text(encoding="utf-8") for name in names]


@pytest.mark.campaign
def test_the_weights_predict_held_out_files_better_than_the_ngram_did(
    tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]
):
    texts = held_out_texts()[:3]
    documents = [torch.tensor([*tokenizer(text)["input_ids"], 1]).numpy() for text in texts]
    measured = perplexity(load_network(FOLDER), documents)
    assert measured < facts["held_out_perplexity"]["kneser_ney_5gram"]


@torch.no_grad()
@pytest.mark.campaign
def test_the_end_of_the_context_is_predicted_as_well_as_its_middle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    ids = tokenizer("\n".join(held_out_texts()), return_tensors="pt")["input_ids"][:, :4_096]
    assert ids.shape[1] == 4_096
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert losses[3_072:].mean() < losses[1_024:2_048].mean() + 0.5
    assert losses[3_072:].mean() < math.log(60)


def test_the_card_shows_the_figures_that_were_measured(facts: dict[str, Any]):
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip(" *"): [float(cell.strip(" *")) for cell in cells[1:]]
        for line in card.splitlines()
        if len(cells := line.strip("|").split("|")) == 3 and re.search(r"\d\.\d\d", cells[1])
    }
    figures = facts["held_out_perplexity"]
    for name, key in (
        ("interpolated Kneser–Ney 5-gram", "kneser_ney_5gram"),
        ("the same, modified discounts", "modified_kneser_ney_5gram"),
        ("this model", "model"),
    ):
        assert rows[name] == [round(figures[key], 2), round(figures[f"conversations_{key}"], 2)]
    assert figures["model"] < figures["modified_kneser_ney_5gram"]
    assert figures["model"] < figures["kneser_ney_5gram"]
    assert facts["command"] == training_command(facts["run"])
    assert facts["command"] in card
    assert "Python Software Foundation License" in card
    assert facts["run"]["parameters"] == sum(weight.numel() for weight in load_network(FOLDER).parameters())
