"""Proofs of the cluster's key: everything that one binds, and that each counts once."""

import hmac
from dataclasses import replace

import pytest

from twostroke.core import proof
from twostroke.core.proof import (
    WINDOW_MS,
    Claim,
    Direction,
    Fault,
    ProofRefused,
    Verifier,
    call_header,
    is_answer_to,
    sign,
)

KEY = b"k" * 32
METHOD = "/twostroke.v1.Worker/Drain"
NOW_MS = 1_700_000_000_000
CLAIM = Claim(METHOD, "10.0.0.7:8100", NOW_MS, b"n" * 16)


def verifier(**options: int) -> Verifier:
    made = Verifier(KEY, NOW_MS - 10 * WINDOW_MS, **options)
    made.audience = CLAIM.audience
    return made


def fault_of(door: Verifier, header: bytes | None, method: str = METHOD, now_ms: int = NOW_MS) -> Fault | None:
    try:
        door.check(method, header, now_ms)
    except ProofRefused as refused:
        return refused.fault
    return None


def numbered(number: int, sent_ms: int = NOW_MS) -> Claim:
    return replace(CLAIM, nonce=number.to_bytes(16, "big"), sent_ms=sent_ms)


def test_no_two_claims_are_signed_alike():
    """What moves from the end of a text to the beginning of the next is another claim."""
    moved = replace(CLAIM, method=METHOD[:-1], audience=METHOD[-1] + CLAIM.audience)
    assert sign(KEY, CLAIM, Direction.CALL) != sign(KEY, moved, Direction.CALL)


def test_the_right_key_passes_and_the_answer_proves_it_back():
    answer = verifier().check(METHOD, call_header(KEY, CLAIM), NOW_MS)
    assert is_answer_to(CLAIM, KEY, answer)


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        (replace(CLAIM, method="/twostroke.v1.Worker/Describe"), Fault.KEY),
        (replace(CLAIM, audience="10.0.0.8:8100"), Fault.AUDIENCE),
        (replace(CLAIM, sent_ms=NOW_MS + WINDOW_MS + 1), Fault.CLOCK),
        (replace(CLAIM, sent_ms=NOW_MS - WINDOW_MS - 1), Fault.CLOCK),
    ],
)
def test_a_proof_of_another_call_is_refused(claim: Claim, fault: Fault):
    assert fault_of(verifier(), call_header(KEY, claim)) is fault


def test_every_bit_of_a_proof_counts():
    header = call_header(KEY, CLAIM)
    for place in range(len(header)):
        changed = bytes(byte ^ (1 << place % 8 if i == place else 0) for i, byte in enumerate(header))
        assert fault_of(verifier(), changed) in (Fault.KEY, Fault.MALFORMED), f"byte {place}"


@pytest.mark.parametrize("header", [b"", b"\x01" * 56, b"\x01" * 57, call_header(KEY, CLAIM)[:57], b"\x01" * 4096])
def test_what_is_no_proof_is_refused(header: bytes):
    assert fault_of(verifier(), header) in (Fault.MALFORMED, Fault.KEY)


def test_no_proof_and_another_keys_proof_are_refused_with_the_remedy():
    for header in (None, call_header(b"K" * 32, CLAIM)):
        with pytest.raises(ProofRefused, match=r"set TWOSTROKE__CLUSTER__KEY to the same secret") as refused:
            verifier().check(METHOD, header, NOW_MS)
        assert refused.value.fault is (Fault.KEY if header else Fault.MISSING)


def test_a_refusal_tells_no_key():
    with pytest.raises(ProofRefused) as refused:
        verifier().check(METHOD, call_header(b"the other secret", CLAIM), NOW_MS)
    assert "other secret" not in str(refused.value)
    assert "kkk" not in str(refused.value)


def test_a_callers_proof_is_no_answer_and_an_answer_no_callers_proof():
    call, answer = (proof.sign(KEY, CLAIM, direction) for direction in Direction)
    assert not is_answer_to(CLAIM, KEY, call)
    head = call_header(KEY, CLAIM)
    assert fault_of(verifier(), head.replace(call, answer)) is Fault.KEY


@pytest.mark.parametrize("field", ["method", "audience", "sent_ms", "nonce"])
def test_an_answer_is_to_one_call(field: str):
    answer = verifier().check(METHOD, call_header(KEY, CLAIM), NOW_MS)
    other = {"method": "/a/b", "audience": "b:1", "sent_ms": NOW_MS + 1, "nonce": b"m" * 16}[field]
    assert not is_answer_to(replace(CLAIM, **{field: other}), KEY, answer)
    assert not is_answer_to(CLAIM, b"K" * 32, answer)
    assert not is_answer_to(CLAIM, KEY, None)
    assert not is_answer_to(CLAIM, KEY, b"")


def test_a_proof_counts_once_for_as_long_as_its_time_would_pass():
    door = verifier()
    header = call_header(KEY, replace(CLAIM, sent_ms=NOW_MS + WINDOW_MS))  # from a clock that is as early as may be
    assert fault_of(door, header) is None
    assert fault_of(door, header) is Fault.REPLAY
    assert fault_of(door, call_header(KEY, numbered(1, NOW_MS + 2 * WINDOW_MS)), now_ms=NOW_MS + 2 * WINDOW_MS) is None
    assert fault_of(door, header, now_ms=NOW_MS + 2 * WINDOW_MS) is Fault.REPLAY
    assert fault_of(door, header, now_ms=NOW_MS + 2 * WINDOW_MS + 1) is Fault.CLOCK


def test_the_memory_is_bounded_and_what_it_forgot_is_still_refused():
    door = verifier(max_nonces=8)
    claims = [numbered(i, NOW_MS + i) for i in range(100)]
    assert all(fault_of(door, call_header(KEY, claim), now_ms=NOW_MS + 100) is None for claim in claims)
    assert len(door._seen) == len(door._by_age) == 8
    assert {fault_of(door, call_header(KEY, claim), now_ms=NOW_MS + 100) for claim in claims} == {Fault.REPLAY}


def test_nonces_whose_time_is_over_are_forgotten():
    door = verifier()
    for i in range(50):
        door.check(METHOD, call_header(KEY, numbered(i)), NOW_MS)
    later_ms = NOW_MS + WINDOW_MS + 1
    door.check(METHOD, call_header(KEY, numbered(50, later_ms)), later_ms)
    assert len(door._seen) == len(door._by_age) == 1


def test_what_a_stranger_sends_takes_no_memory():
    door = verifier()
    for i in range(50):
        assert fault_of(door, call_header(b"K" * 32, numbered(i))) is Fault.KEY
    assert not door._seen


def test_a_proof_that_an_earlier_life_may_have_seen_is_refused_unless_the_clock_went_back():
    born = Verifier(KEY, NOW_MS)
    assert fault_of(born, call_header(KEY, numbered(1, NOW_MS - 1)), now_ms=NOW_MS) is Fault.REPLAY
    assert fault_of(born, call_header(KEY, numbered(2, NOW_MS)), now_ms=NOW_MS) is None
    set_back_ms = NOW_MS - 3_600_000
    assert fault_of(born, call_header(KEY, numbered(3, set_back_ms)), now_ms=set_back_ms) is None
    assert fault_of(born, call_header(KEY, numbered(3, set_back_ms)), now_ms=set_back_ms) is Fault.REPLAY


def test_a_server_without_an_address_of_its_own_takes_any_audience():
    door = Verifier(KEY, NOW_MS)
    assert fault_of(door, call_header(KEY, CLAIM)) is None


def test_macs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared = []
    honest = hmac.compare_digest
    monkeypatch.setattr(proof.hmac, "compare_digest", lambda a, b: compared.append(1) or honest(a, b))
    answer = verifier().check(METHOD, call_header(KEY, CLAIM), NOW_MS)
    assert is_answer_to(CLAIM, KEY, answer)
    assert len(compared) == 2
