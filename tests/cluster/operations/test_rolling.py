"""Rolling restart: the order, and who may go first."""

from twostroke.cluster.operations.rolling import InPlace, Refused, Replace, how_to_restart, order_of
from twostroke.cluster.operations.room import NoRoom
from twostroke.cluster.placement import ProcessPlan
from twostroke.core.request import Role

PREFILL = ProcessPlan("prefill-0", "worker", Role.PREFILL)
DECODE = [ProcessPlan(f"decode-{number}", "worker", Role.DECODE) for number in range(2)]
FULL = NoRoom("every GPU has a worker")


def test_prefill_workers_go_first_and_routers_stay() -> None:
    members = [ProcessPlan("router-0", "router"), *reversed(DECODE), PREFILL]
    assert order_of(members) == ["prefill-0", "decode-0", "decode-1"]


def test_a_new_worker_serves_first_where_both_fit() -> None:
    new = ProcessPlan("decode-7", "worker", Role.DECODE)
    assert how_to_restart(DECODE[0], [DECODE[0]], new, force=False) == Replace(new)


def test_without_room_a_worker_goes_first_if_another_decodes() -> None:
    assert how_to_restart(DECODE[0], [PREFILL, *DECODE], FULL, force=False) == InPlace(FULL.reason)
    assert how_to_restart(PREFILL, [PREFILL, DECODE[0]], FULL, force=False) == InPlace(FULL.reason)
    alone = how_to_restart(DECODE[0], [PREFILL, DECODE[0]], FULL, force=False)
    assert isinstance(alone, Refused)
    assert "decode-0 alone decodes" in str(alone.error)
    assert "every GPU has a worker" in str(alone.error)
    assert how_to_restart(DECODE[0], [PREFILL, DECODE[0]], FULL, force=True) == InPlace(FULL.reason)
