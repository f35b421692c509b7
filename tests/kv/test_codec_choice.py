"""Names of --kv-cache-dtype, of keys and values each, and the specs they stand for."""

import pytest
from pydantic import ValidationError

from twostroke.checkpoint.sizes import cache_codec
from twostroke.kv.config import CacheConfig
from twostroke.kv.spec import attention_spec, codec_ids


@pytest.mark.parametrize(
    ("settings", "name", "ids"),
    [
        ({}, "fp8", (1, 1)),
        ({"dtype": "fp8_e4m3"}, "fp8", (1, 1)),
        ({"dtype": "fp8_e5m2"}, "fp8_e5m2", (4, 4)),
        ({"dtype": "int8_per_token_head"}, "int8", (5, 5)),
        ({"dtype": "int8_channel"}, "int8_channel", (6, 5)),
        ({"dtype": "int8", "key_dtype": "int8_channel"}, "int8_channel", (6, 5)),
        ({"key_dtype": "int8_channel"}, "int8_channel/fp8", (6, 1)),
        ({"dtype": "bfloat16", "value_dtype": "fp8_e4m3"}, "bfloat16/fp8", (2, 1)),
        ({"dtype": "int8_channel", "key_dtype": "fp8"}, "fp8/int8", (1, 5)),
        ({"dtype": "int8_channel", "value_dtype": "float32"}, "int8_channel/float32", (6, 3)),
    ],
)
def test_settings_name_the_codecs_of_keys_and_values(settings: dict, name: str, ids: tuple[int, int]) -> None:
    assert CacheConfig(**settings).codec == name
    assert cache_codec(name) == name
    assert codec_ids(name) == ids


def test_values_have_no_codec_per_channel() -> None:
    with pytest.raises(ValidationError, match="value_dtype"):
        CacheConfig(value_dtype="int8_channel")  # type: ignore[arg-type]


def test_a_rounded_cache_takes_a_byte_per_number_and_one_per_row() -> None:
    for codec in ("fp8", "fp8_e5m2", "int8", "int8_channel"):
        assert attention_spec(3, 2, 64, *codec_ids(codec)).bytes_per_token == 3 * 2 * 2 * (64 + 1)
    assert attention_spec(3, 2, 64, *codec_ids("bfloat16/int8")).bytes_per_token == 3 * 2 * (128 + 65)
