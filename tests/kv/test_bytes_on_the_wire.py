"""FP8 frames have about half the bytes of bf16 frames, with headers, digests, scales and padding."""

import pytest

from twostroke.core.request import Epoch
from twostroke.kv.block import BlockId
from twostroke.kv.codec import Codec
from twostroke.kv.handover.frames import FrameLabel, encode_frame, tokens_per_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import HeldTokens
from twostroke.kv.spec import HASH_BLOCK_TOKENS, attention_spec
from twostroke.kv.store.store import KvStore

PROMPT_TOKENS = 1000


def bytes_of(codec: Codec, heads: int, head_dim: int, frame_bytes: int) -> int:
    """Bytes of all envelopes of one prompt."""
    spec = attention_spec(4, heads, head_dim, codec)
    blocks = -(-PROMPT_TOKENS // HASH_BLOCK_TOKENS)
    store = KvStore(spec, blocks, HASH_BLOCK_TOKENS, digest_key=1)
    table, uses = [BlockId(block) for block in range(blocks)], [1] * blocks
    store.seal(HeldTokens(table, uses, 0, PROMPT_TOKENS))
    step, total = tokens_per_frame(spec, frame_bytes), 0
    for sequence, start in enumerate(range(0, PROMPT_TOKENS, step), 1):
        count = min(step, PROMPT_TOKENS - start)
        label = FrameLabel(Label("request", 0, Epoch(1, 1)), sequence, bytes(16), start, count)
        sections = store.read_tokens(HeldTokens(table, uses, start, count))
        total += len(encode_frame(label, sections, is_last=start + count == PROMPT_TOKENS))
    return total


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.53), (128, 0.52)])
@pytest.mark.parametrize("frame_bytes", [1 << 18, 1 << 20, 4 << 20])
@pytest.mark.parametrize("heads", [1, 8])
def test_fp8_moves_half_the_bytes_of_bf16(head_dim: int, most: float, frame_bytes: int, heads: int) -> None:
    fp8, bf16 = (bytes_of(codec, heads, head_dim, frame_bytes) for codec in (Codec.FP8_E4M3, Codec.BF16))
    assert fp8 <= most * bf16, f"{fp8 / bf16:.4f}"
    assert fp8 > 0.5 * bf16
