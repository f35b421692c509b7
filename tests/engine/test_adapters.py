"""Adapters of a worker: names, slots, bounds, and adapters that nobody needs any more."""

import random

import pytest

from twostroke.core.errors import InvalidRequest, ModelNotFound, Overloaded, Unavailable
from twostroke.engine.adapters import AdapterBounds, AdapterFiles, AdapterTable


def files(digest, num_bytes=10):
    return AdapterFiles(digest, f"/{digest.decode()}", 8, num_bytes)


class Table(AdapterTable):
    def __init__(self, **bounds):
        self.dropped = []
        super().__init__(AdapterBounds(**{"max_adapters": 3, "max_bytes": 100} | bounds), self.dropped.append)

    def load(self, name, digest, num_bytes=10, **how):
        slot = self.claim(name, files(digest, num_bytes), **how)
        if slot is not None:
            self.ready(slot, num_bytes)
        return slot

    def names(self):
        return {served.name: served.digest for served in self.served}


def test_an_adapter_is_served_when_the_engine_has_it_and_not_before():
    table = Table()
    slot = table.claim("x", files(b"a"))
    assert slot > 0
    assert table.served == ()
    with pytest.raises(Unavailable, match="is not loaded"):
        table.hold(b"a")
    table.ready(slot, 12)
    (served,) = table.served
    assert (served.name, served.digest, served.directory, served.num_bytes, served.uses) == ("x", b"a", "/a", 12, 0)
    assert table.hold(b"a") == slot
    assert table.served[0].uses == 1


def test_sequences_without_an_adapter_hold_nothing():
    table = Table()
    assert table.hold(b"") == 0
    table.release(0)
    assert table.dropped == []


def test_one_adapter_may_have_many_names_in_one_slot():
    table = Table()
    slot = table.load("x", b"a")
    assert table.load("y", b"a") is None
    assert table.load("x", b"a") is None
    assert table.names() == {"x": b"a", "y": b"a"}
    table.remove("x")
    assert table.dropped == []
    table.remove("y")
    assert table.dropped == [slot]
    assert table.num_bytes == 0


def test_a_removed_adapter_stays_for_the_sequences_that_have_it():
    table = Table()
    slot = table.load("x", b"a")
    table.hold(b"a"), table.hold(b"a")
    table.remove("x")
    assert table.served == ()
    with pytest.raises(ModelNotFound):
        table.remove("x")
    table.release(slot)
    assert table.dropped == []
    table.release(slot)
    assert table.dropped == [slot]
    with pytest.raises(Unavailable):
        table.hold(b"a")


def test_a_name_is_given_to_another_adapter_only_on_demand_and_when_that_is_ready():
    table = Table()
    old = table.load("x", b"a")
    with pytest.raises(InvalidRequest, match="loaded already"):
        table.claim("x", files(b"b"))
    new = table.claim("x", files(b"b"), replace=True)
    assert table.names() == {"x": b"a"}
    table.hold(b"a")
    table.ready(new, 10)
    assert table.names() == {"x": b"b"}
    assert table.dropped == []
    table.release(old)
    assert table.dropped == [old]
    assert new != old


def test_a_failed_load_leaves_everything_as_it_was():
    table = Table()
    table.load("x", b"a")
    slot = table.claim("x", files(b"b", 90), replace=True)
    with pytest.raises(Overloaded, match="being loaded already"):
        table.claim("y", files(b"b"))
    table.failed(slot)
    assert table.names() == {"x": b"a"}
    assert table.num_bytes == 10
    assert table.load("y", b"b", 90) > slot  # slots are never used twice


def test_number_and_bytes_are_bounded():
    table = Table()
    with pytest.raises(InvalidRequest, match="max_lora_bytes is 100"):
        table.claim("x", files(b"a", 101))
    table.load("x", b"a", 60)
    with pytest.raises(Overloaded, match="take 60 bytes, /b 41"):
        table.claim("y", files(b"b", 41))
    table.load("y", b"b", 40)
    full = Table(max_adapters=1)
    slot = full.load("x", b"a")
    full.hold(b"a")
    full.remove("x")
    with pytest.raises(Overloaded, match="1 adapters are loaded"):
        full.claim("y", files(b"b"))  # what only finishes its sequences counts, too
    full.release(slot)
    assert full.load("y", b"b")
    with pytest.raises(InvalidRequest, match="serves no adapters"):
        AdapterTable().claim("x", files(b"a"))


@pytest.mark.parametrize("name", ["", "  ", "n" * 257])
def test_names_are_checked(name):
    with pytest.raises(InvalidRequest, match="lora_name is"):
        Table().claim(name, files(b"a"))


def test_whatever_happens_no_used_slot_is_dropped_and_every_other_one_is():
    for seed in range(200):
        draw, table, held = random.Random(seed), Table(max_adapters=4, max_bytes=1000), []
        loading, known = [], set()
        for _ in range(60):
            digest, name = bytes([97 + draw.randrange(5)]), draw.choice("xyz")
            match draw.choice(["claim", "ready", "failed", "remove", "hold", "release", "release"]):
                case "claim":
                    try:
                        slot = table.claim(name, files(digest), replace=draw.random() < 0.5)
                    except (InvalidRequest, Overloaded):
                        continue
                    if slot is not None:
                        assert slot not in known
                        known.add(slot)
                        loading.append(slot)
                case "ready" if loading:
                    table.ready(loading.pop(), 10)
                case "failed" if loading:
                    table.failed(loading.pop())
                case "remove" if name in table.names():
                    table.remove(name)
                case "hold" if table.served:
                    held.append(table.hold(draw.choice(table.served).digest))
                case "release" if held:
                    table.release(held.pop(draw.randrange(len(held))))
            assert not set(table.dropped) & set(held)
            assert len(table.dropped) == len(set(table.dropped))
        for slot in held:
            table.release(slot)
        for slot in loading:
            table.failed(slot)
        for name in table.names():
            table.remove(name)
        assert table.num_bytes == 0


def test_what_is_held_and_ready_needs_no_file_to_get_another_name():
    table = Table()
    slot = table.claim("x", files(b"a"))
    assert table.files_of(b"a") is None
    table.ready(slot, 10)
    assert table.files_of(b"a") == files(b"a")
    assert table.files_of(b"b") is None
