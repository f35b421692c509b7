"""Texts of many kinds of characters, as long as one asks for, always the same ones."""

import random

_PARTS = (
    "the quick brown fox  jumps over   the lazy dog ",
    "x = {'a': 1,\n\t'b': [2, 3]}\n",
    "Hello,  world!\n\nI'm here; it's 12:30\r\nnext line",
    "这是一个测试，谢谢。\n再见 naïve façade ",
    "🎉🎉 party\n12345 67    indented\n        more",
    " <|eos|> </s><s> größer als b →",
)


def mixed_text(seed: int, size: int) -> str:
    """Pieces of words, code, other scripts and special tokens, `size` characters or a few more."""
    draw = random.Random(seed)
    found: list[str] = []
    length = 0
    while length < size:
        part = draw.choice(_PARTS)
        low = draw.randrange(len(part))
        found.append(part[low : draw.randrange(low, len(part) + 1)] + draw.choice(("", " ", "\n", "")))
        length += len(found[-1])
    return "".join(found)
