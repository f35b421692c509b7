"""Rotary tables: against transformers where both mean the same, and the rule where a length counts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints.logits_oracle import assert_same_logits, oracle
from support.checkpoints.models import resolved
from support.checkpoints.tiny_families import VOCAB, TinyFamily, write_family

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.spec import RopeScaling, RopeSpec
from twostroke.model.decoder.rope import rotary_table
from twostroke.model.loader import numerics_class

LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0]}
LONGROPE = TinyFamily(
    "longrope",
    "Phi3Config",
    {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            **LONG,
        },
    },
)
DYNAMIC = TinyFamily(
    "dynamic",
    "LlamaConfig",
    {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
)


def ids_of(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("family", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_agrees_with_transformers_on_texts_as_long_as_what_is_served(
    family: TinyFamily, tmp_path: Path, make_hand: Callable
) -> None:
    write_family(family, tmp_path)
    expected = oracle(tmp_path)(ids_of(200))
    served = make_hand(tmp_path, max_model_len=200)
    assert_same_logits(served.logits([("a", 0, ids_of(200))])[0], expected)
    # A part of it was computed as a part of it, whatever its own length: cached keys stay valid.
    (start,) = served.logits([("b", 0, ids_of(200)[:40])])
    assert torch.allclose(start, expected[:40], atol=1e-4 * float(expected.abs().max()))
    # Where the original length is served, both agree on short texts, and disagree with the stretched angles.
    short = make_hand(tmp_path, max_model_len=64).logits([("a", 0, ids_of(60))])[0]
    assert_same_logits(short, oracle(tmp_path)(ids_of(60)))
    assert (short[:40] - start).abs().max() > 0.01 * start.abs().max()


def test_dynamic_and_yarn_serve_their_stretched_length(tmp_path: Path) -> None:
    write_family(DYNAMIC, tmp_path)
    assert load_spec(tmp_path).max_model_len == 256


@pytest.mark.parametrize("family", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_the_served_length_is_part_of_the_numerics_class_where_angles_depend_on_it(
    family: TinyFamily, tmp_path: Path
) -> None:
    write_family(family, tmp_path)
    digests = {numerics_class(resolved(tmp_path, max_model_len=n)).digest for n in (64, 200, None)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 64), RopeScaling("yarn", 8.0, 64, magnitude=1.2)],
    ids=lambda scaling: scaling.kind if scaling else "default",
)
def test_an_entry_depends_on_its_position_alone(scaling: RopeScaling | None) -> None:
    rope = RopeSpec(10000.0, 24, scaling)
    (cos, sin), (longer_cos, longer_sin) = rotary_table(rope, 57), rotary_table(rope, 1000)
    assert cos.shape == sin.shape == (57, 12)
    assert torch.equal(cos, longer_cos[:57])
    assert torch.equal(sin, longer_sin[:57])
