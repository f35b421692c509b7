"""Which worker is asked next for blocks, and for which of them."""

from twostroke.kv.block import BlockIdentity
from twostroke.kv.handover.sources import MOST_SOURCES, BlockSource, SourceLine

NAMES = tuple(BlockIdentity(bytes([n]) * 16) for n in range(6))


def source(name: str, blocks: int) -> BlockSource:
    return BlockSource(name, 1, f"{name}:1", blocks)


def test_each_is_asked_once_if_it_may_have_more():
    line = SourceLine([source("a", 6), source("b", 2), source("c", 4)], NAMES, 97)
    assert line.may_help(0)
    assert line.next(0).worker_id == "a"
    line.ended("closed")
    assert line.next(48).worker_id == "c"
    line.ended("short")
    assert line.next(48) is None
    assert not line.may_help(0)


def test_what_arrived_damaged_is_asked_for_once_more():
    line = SourceLine([source("a", 6), source("b", 6)], NAMES, 97)
    asked = []
    held = 0
    while (found := line.next(held)) is not None:
        asked.append(found.worker_id)
        line.ended("corrupted")
        held += 16
    assert asked == ["a", "a", "b"]


def test_all_blocks_after_the_held_ones_are_wanted_but_never_the_last_token():
    line = SourceLine([source("a", 3)], NAMES, 97)
    assert line.wanted(32, b"c").identities == NAMES[2:]
    assert (line.wanted(32, b"c").first_token, line.wanted(32, b"c").end_token) == (32, 96)
    whole = SourceLine([source("a", 6)], NAMES, 96)
    assert whole.wanted(0, None).end_token == 80
    assert not whole.may_help(80)
    assert whole.next(80) is None


def test_of_many_the_first_are_asked():
    line = SourceLine([source(str(n), 6) for n in range(MOST_SOURCES + 1)], NAMES, 97)
    found = [line.next(0) for _ in range(MOST_SOURCES + 1)]
    assert [one and one.worker_id for one in found] == [*map(str, range(MOST_SOURCES)), None]
