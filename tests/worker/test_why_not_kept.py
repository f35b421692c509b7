"""When a worker keeps no copy: little is free, much is promised, or many copies are made already."""

from dataclasses import replace

from twostroke.engine.link.messages import LoadNews
from twostroke.worker.blocks.keeping import MAX_KEEPING, why_not_kept

LOAD = LoadNews("idle", 0, 0, 0, 0, 0, 60, 0, 10, 100, 0.0, 0.0, 0.0, ())


def test_it_leaves_a_share_of_the_pool_free():
    assert why_not_kept(LOAD, 25, 0) == ""
    assert why_not_kept(LOAD, 26, 0) == "26 blocks would leave 24 of 100 free"


def test_others_go_first():
    assert why_not_kept(replace(LOAD, waiting_for_room=1), 1, 0) == "sequences wait for room"
    assert why_not_kept(LOAD, 1, MAX_KEEPING) == f"{MAX_KEEPING} copies are being made"
    assert why_not_kept(LOAD, 1, MAX_KEEPING - 1) == ""
    assert why_not_kept(None, 1, 0) == "its load is not known yet"
