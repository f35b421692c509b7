"""The scripts that trained the bundled model: corpus, n-gram baseline, network, optimizer and schedule."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from bundled_model import train
from bundled_model.conversations import from_source, from_topic
from bundled_model.corpus import is_held_out, source_files
from bundled_model.network import Network, Shape
from bundled_model.ngram import KneserNey, perplexity
from bundled_model.optimizer import Muon, orthogonalise
from bundled_model.train import LENGTHS, TOKENS_PER_PASS, Plan, Run, TokenStream, length_at, rate_at
from bundled_model.weights import from_hugging_face, hugging_face_config, hugging_face_weights
from transformers import LlamaConfig, LlamaForCausalLM


def test_a_bigram_model_gives_the_probabilities_computed_by_hand():
    # Bigrams 01 12 21 12 23: three occur once, one twice, so D = 3 / 5. Tokens in front: of 1 two, of 2 and 3 one each,
    # so D = 2 / 4 below, 1.5 of 4 kept back for the uniform distribution over four tokens.
    model = KneserNey([np.array([0, 1, 2, 1, 2, 3])], 4, order=2)
    assert model.distribution([3]) == pytest.approx([0.09375, 0.46875, 0.21875, 0.21875])  # nothing followed a 3
    assert model.distribution([1]) == pytest.approx(
        [0.3 * 0.09375, 0.3 * 0.46875, (1.4 + 0.6 * 0.21875) / 2, 0.3 * 0.21875]
    )
    assert model.distribution([2]) == pytest.approx(
        [0.6 * 0.09375, (0.4 + 1.2 * 0.46875) / 2, 0.6 * 0.21875, (0.4 + 1.2 * 0.21875) / 2]
    )
    expected = math.log(0.765625) + math.log(0.33125)
    assert model.log_probabilities(np.array([1, 2, 3])).sum() == pytest.approx(expected)


def test_modified_discounts_are_those_of_chen_and_goodman():
    # As unigrams with themselves in front: 5 tokens seen once, 3 twice, 2 three times, 1 four times, 1 five times.
    times = [1] * 5 + [2] * 3 + [3] * 2 + [4, 5]
    document = np.array([0, *(token for token, n in enumerate(times, start=1) for _ in range(n))])
    model = KneserNey([document], 16, order=1, modified=True)
    share = 5 / (5 + 2 * 3)
    one, two, more = 1 - 2 * share * 3 / 5, 2 - 3 * share * 2 / 3, 3 - 4 * share * 1 / 2
    uniform = (5 * one + 3 * two + 4 * more) / 16
    total = sum(times)
    assert model.distribution([])[[1, 6, 9, 12, 14]] == pytest.approx(
        [(own + uniform) / total for own in (1 - one, 2 - two, 3 - more, 5 - more, 0)]
    )


@pytest.mark.parametrize("modified", [False, True])
def test_probabilities_sum_to_one_after_every_context(modified: bool):
    random = np.random.default_rng(7)
    documents = [np.concatenate([[0], random.zipf(1.5, size=400) % 37 + 1]) for _ in range(6)]
    model = KneserNey(documents[:5], 40, order=5, modified=modified)
    for context in ([], [3], [1, 1, 2], list(documents[0][1:9]), [39, 39, 39, 39, 39]):
        distribution = model.distribution(context)
        assert distribution.sum() == pytest.approx(1.0, abs=1e-12)
        assert (distribution > 0).all()


def test_a_document_is_judged_token_by_token_from_what_precedes():
    random = np.random.default_rng(3)
    documents = [np.concatenate([[0], random.integers(1, 9, size=200)]) for _ in range(2)]
    model = KneserNey(documents[:1], 9, order=4)
    held_out = documents[1]
    singly = [math.log(model.distribution(held_out[:index])[held_out[index]]) for index in range(1, len(held_out))]
    assert model.log_probabilities(held_out) == pytest.approx(singly)
    assert perplexity(model, [held_out]) == pytest.approx(math.exp(-sum(singly) / len(singly)))


def test_an_order_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="6 tokens of 12 bits"):
        KneserNey([np.array([0, 1])], 4_096, order=6)


@pytest.fixture(scope="module")
def random_network() -> Network:
    torch.manual_seed(11)
    network = Network(Shape(vocab_size=160, hidden=96, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, ffn=80))
    for parameter in network.parameters():  # the writers of the residual stream begin at zero: fill them, and the norms
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.08)
    return network


@pytest.mark.parametrize("length", [1, 63, 256, 300, 1_100])
@torch.no_grad()
def test_the_network_gives_the_logits_of_transformers(random_network: Network, length: int):
    config = hugging_face_config(random_network.shape, context_tokens=2_048, bos=0, eos=1, pad=2)
    theirs = LlamaForCausalLM(LlamaConfig(**{**config, "torch_dtype": "float32"})).eval()
    missing = theirs.load_state_dict(hugging_face_weights(random_network), strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    theirs.tie_weights()
    tokens = torch.randint(160, (2, length), generator=torch.Generator().manual_seed(length))
    ours, reference = random_network(tokens), theirs(tokens).logits
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


@torch.no_grad()
def test_weights_come_back_from_their_exported_names(random_network: Network):
    other = Network(random_network.shape)
    other.load_state_dict(from_hugging_face(hugging_face_weights(random_network), random_network.shape))
    tokens = torch.arange(40)[None]
    assert torch.equal(other(tokens), random_network(tokens))


def test_orthogonalised_matrices_have_singular_values_near_one():
    for rows, columns in ((32, 32), (16, 80), (80, 16)):
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        values = torch.linalg.svdvals(orthogonalise(matrix))
        assert values.max() < 1.35
        assert values.median() > 0.65


def test_muon_turns_each_piece_of_a_fused_weight_by_itself():
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(8, 24, generator=generator), 1_000 * torch.randn(16, 24, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(24, 24))
    weight.grad = torch.cat([first, second])
    Muon([(weight, (8, 16))], lr=0.1, weight_decay=0.0).step()
    scale = -0.1 * 0.2 * 24**0.5
    assert torch.allclose(weight[:8] / scale, orthogonalise(first), atol=0.02)
    assert torch.allclose(weight[8:] / scale, orthogonalise(second), atol=0.02)


def test_a_small_network_learns_a_pattern():
    torch.manual_seed(0)
    network = Network(Shape(vocab_size=16, hidden=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn=32))
    block = network.blocks[0]
    matrices = [(m.weight, (m.weight.shape[0],)) for m in (block.qkv, block.out, block.gate_up, block.down)]
    muon = Muon(matrices, lr=0.02, weight_decay=0.0)
    adam = torch.optim.AdamW([network.embedding.weight, network.norm.weight], lr=0.02)
    tokens = torch.arange(65).remainder(5).repeat(4, 1)
    losses = []
    for _ in range(40):
        loss = network.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(16), abs=0.3)
    assert losses[-1] < 0.1


def test_rates_rise_and_end_at_zero_and_lengths_grow():
    assert rate_at(0.0) == 0.0
    assert rate_at(0.2) == 1.0
    assert rate_at(1.0) == 0.0
    assert rate_at(0.9) < rate_at(0.5) < 1.0
    used = {length_at(fraction / 100, step) for fraction in range(101) for step in range(2)}
    assert used == set(LENGTHS)
    assert all(TOKENS_PER_PASS % length == 0 for length in LENGTHS)


def test_the_stream_loses_no_token_and_shuffles_each_epoch():
    documents = [np.array([0, *range(10 * n, 10 * n + 9), 1]) for n in range(1, 9)]
    stream = TokenStream(documents, seed=0)
    taken, targets = zip(*(stream.take(22, 11) for _ in range(8)), strict=True)
    flat = torch.cat([part.flatten() for part in taken])
    assert torch.equal(torch.cat([part.flatten() for part in targets])[:-1], flat[1:])
    first, second = flat[:88], flat[88:]
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)
    again = TokenStream(documents, seed=0)
    assert torch.equal(again.take(22, 11)[0], taken[0])


def test_the_split_hangs_on_the_path_alone_and_spares_tests(tmp_path):
    names = ["a.py", "deep/b.py", "test/c.py", "deep/idle_test/d.py", "_sysconfigdata_x.py", "site-packages/e.py"]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    assert [path for path, _ in source_files(tmp_path)] == ["a.py", "deep/b.py"]
    share = sum(is_held_out(f"module_{n}.py") for n in range(4_000)) / 4_000
    assert share == pytest.approx(0.05, abs=0.015)
    assert is_held_out("argparse.py")
    assert not is_held_out("os.py")


MODULE = '''\
"""Adds things."""

def add(a, b=2):
    """Return the sum."""
    return a + b

def _hidden():
    """Never asked about."""
'''


def test_conversations_alternate_and_answer_from_the_source():
    made = from_source("adding.py", MODULE)
    assert made == from_source("adding.py", MODULE)
    answers = set()
    for conversation in made:
        roles = [message.role for message in conversation if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        answers.update(message.content for message in conversation if message.role == "assistant")
    assert "Adds things." in answers
    assert "Return the sum." in answers
    assert not any("Never asked" in answer for answer in answers)


def test_a_topic_goes_on_where_it_stopped():
    paragraphs = [f"{n} " + "word " * 200 for n in range(4)]
    for conversation in from_topic("with", "\n\n".join(paragraphs)):
        asked = [message.content for message in conversation if message.role == "user"]
        told = [message.content for message in conversation if message.role == "assistant"]
        assert "the with statement" in asked[0]
        assert told[0].startswith("0 ")
        assert told[1].startswith("1 ")


def test_a_run_goes_on_from_its_kept_state(tmp_path, monkeypatch):
    small = partial(Shape, vocab_size=160, hidden=96, num_heads=6, num_kv_heads=2, head_dim=16, ffn=80)
    monkeypatch.setattr(train, "Shape", small)
    run = Run(Plan(minutes=10.0, out=tmp_path))
    tokens = torch.arange(7, 71)[None]
    for _ in range(2):
        run.elapsed_s += 60.0
        run.step += 1
        run.set_rates()
        run.network.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.keep()
        again = Run(Plan(minutes=10.0, out=tmp_path))
        assert (again.step, again.fraction) == (run.step, run.fraction)
        assert torch.equal(again.network(tokens), run.network(tokens))
        run = again
    assert [one["step"] for one in run.resumed] == [1, 2]
    velocities = [state["velocity"].norm() for state in run.optimizers[0].state.values()]
    assert len(velocities) == 24
    assert max(velocities) > 0.0
