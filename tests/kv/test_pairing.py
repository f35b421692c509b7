"""Which prefill and decode workers can hand over to each other, and the reason if they cannot."""

from dataclasses import dataclass, replace

import pytest

from twostroke.core.errors import InvalidRequest, PairRefused, from_code
from twostroke.kv.handover.pairing import CAPABILITIES, why_refused
from twostroke.kv.spec import Component, KvSpec, LayerGroup, attention_spec, mla_spec

SPEC = attention_spec(2, 4, 16, 1)


@dataclass(frozen=True)
class Side:
    numerics: bytes = b"n"
    capabilities: tuple[str, ...] = CAPABILITIES
    kv_spec: KvSpec | None = SPEC
    num_ranks: int = 1


def mixed(k: int, v: int) -> KvSpec:
    return KvSpec((LayerGroup("main", 2, (Component("k", 4, 16, k), Component("v", 4, 16, v))),))


@pytest.mark.parametrize("prefill", [1, 2, 4, 8])
@pytest.mark.parametrize("decode", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", [attention_spec(3, 4, 16, 1), attention_spec(3, 1, 16, 2), mla_spec(3, 32, 8, 3)])
def test_workers_of_any_numbers_of_ranks_pair(prefill: int, decode: int, spec: KvSpec) -> None:
    assert why_refused(Side(kv_spec=spec, num_ranks=prefill), Side(kv_spec=spec, num_ranks=decode)) is None


@pytest.mark.parametrize("prefill", [mixed(1, 2), mixed(2, 1), mixed(3, 1)])
@pytest.mark.parametrize("decode", [mixed(1, 1), mixed(1, 3), mixed(2, 2)])
def test_keys_and_values_may_have_other_codecs_each(prefill: KvSpec, decode: KvSpec) -> None:
    assert why_refused(Side(kv_spec=prefill), Side(kv_spec=decode)) is None


@pytest.mark.parametrize(
    ("prefill", "decode", "field", "told"),
    [
        ({"numerics": b"m"}, {}, "numerics_class", "model.deterministic"),
        ({"capabilities": ("handover.grpc.2",)}, {}, "capabilities", "handover.grpc.2, the decode worker handover.g"),
        ({}, {"capabilities": ("handover.grpc.1", "kv.read.float32")}, "kv_spec", "cannot store fp8"),
        ({"kv_spec": mixed(3, 2)}, {"capabilities": ("kv.read.float32",)}, "kv_spec", "cannot store bfloat16"),
        ({"kv_spec": attention_spec(3, 4, 16, 1)}, {}, "kv_spec", "layers"),
        ({"kv_spec": attention_spec(2, 8, 16, 1)}, {}, "kv_spec", "heads 0 to 7 of k"),
        ({"kv_spec": mla_spec(2, 32, 8, 1)}, {}, "kv_spec", "widths"),
        ({"num_ranks": 3}, {}, "tensor_parallel_size", "4 heads of k cannot be split over 3 ranks"),
        ({}, {"num_ranks": 3}, "tensor_parallel_size", "4 heads of k cannot be split over 3 ranks"),
        (
            {},
            {"kv_spec": attention_spec(2, 4, 16, 5)},
            "kv_spec",
            "its k as fp8, the decode worker as int8: rounded twice",
        ),
        (
            {"kv_spec": attention_spec(2, 4, 16, 6, 5)},
            {"kv_spec": attention_spec(2, 4, 16, 5)},
            "kv_spec",
            "its k as int8_channel, the decode worker as int8",
        ),
        (
            {"kv_spec": attention_spec(2, 4, 16, 2, 5)},
            {"kv_spec": attention_spec(2, 4, 16, 5, 4)},
            "kv_spec",
            "its v as int8, the decode worker as fp8_e5m2",
        ),
        (
            {"kv_spec": attention_spec(2, 4, 16, 6, 5)},
            {"capabilities": ("handover.grpc.1",)},
            "kv_spec",
            "the decode worker cannot store int8, int8_channel",
        ),
    ],
)
def test_an_impossible_pair_has_a_typed_reason(prefill: dict, decode: dict, field: str, told: str) -> None:
    refused = why_refused(Side(**prefill), Side(**decode))
    assert isinstance(refused, PairRefused)
    assert refused.param == field
    assert told in refused.message
    again = from_code(refused.code, refused.message, param=field)  # as the peer hears it
    assert type(again) is PairRefused
    assert isinstance(again, InvalidRequest)


@pytest.mark.parametrize(
    ("source", "destination"),
    [((6, 5), (2, 2)), ((2, 2), (6, 5)), ((3, 2), (5, 4)), ((1, 1), (1, 3)), ((6, 4), (6, 4))],
)
def test_a_pair_of_unlike_codecs_rounds_once(source: tuple[int, int], destination: tuple[int, int]) -> None:
    prefill, decode = (Side(kv_spec=attention_spec(2, 4, 16, *codecs)) for codecs in (source, destination))
    assert why_refused(prefill, decode) is None


def test_a_worker_that_announces_less_is_of_the_release_before() -> None:
    """It named its protocol alone: it stores the three codecs of that release, and has one rank."""
    before = Side(capabilities=("handover.grpc.1", "blocks.fetch.1", "session.1"))
    for codec in (1, 2, 3):
        assert why_refused(Side(kv_spec=attention_spec(2, 4, 16, codec), num_ranks=2), before) is None
        assert why_refused(before, Side(kv_spec=attention_spec(2, 4, 16, codec), num_ranks=2)) is None
    silent = Side(capabilities=(), kv_spec=None)
    assert why_refused(silent, Side()) is None
    assert why_refused(Side(), silent) is None
    assert why_refused(replace(silent, numerics=b"m"), Side()) is not None
