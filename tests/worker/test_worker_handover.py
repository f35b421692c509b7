"""Two real workers, real streams: what a peer computed is what one worker computes alone."""

import pytest

from twostroke.core.request import Role

SEEDED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 1234}


@pytest.mark.parametrize("sampling", [{}, SEEDED], ids=["greedy", "seeded"])
async def test_disaggregated_equals_local_token_for_token(start_worker, router_of, make_prompt, all_free, sampling):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    alone = await start_worker(Role.COMBINED)
    to_decode, to_alone = await router_of(decode), await router_of(alone)
    for place, length in enumerate((5, 16, 17, 48, 100, 161, 300)):
        ids = make_prompt(length, place)
        options = {"sampling": {"max_tokens": 12, **sampling}}
        remote = await to_decode.submit(f"r{place}", ids, [prefill], **options)
        local = await to_alone.submit(f"r{place}", ids, **options)
        await remote.ended()
        await local.ended()
        assert remote.token_ids == local.token_ids
        assert remote.text == local.text
        assert len(remote.token_ids) == remote.end.usage.completion_tokens
        handover = remote.end.handover
        if length >= 16:
            assert handover.prefill_worker == prefill.settings.worker_id
            assert handover.tokens_moved == length
            assert handover.bytes_moved > 0
        else:
            assert handover.local_reason == "under_a_block_missing"
        assert local.end.handover.local_reason == "ordered"
    await all_free(prefill, decode, alone)
