import asyncio

import pytest

from twostroke.core.request import Epoch, SequenceKey, TokenLogprobs
from twostroke.decode_worker.outbox import Outbox, Scores
from twostroke.kv.messages import epoch_to_wire
from twostroke.protos import worker_pb2

KEY, OTHER = SequenceKey("r", 0), SequenceKey("other", 1)
EPOCH = Epoch(1, 1)


def test_everything_that_waits_leaves_in_one_message():
    outbox = Outbox()
    outbox.at_step(5)
    outbox.add_tokens(KEY, EPOCH, 3, (7,), "a")
    outbox.add_tokens(OTHER, EPOCH, 0, (8,), "b")
    outbox.at_step(6)
    outbox.add_tokens(KEY, EPOCH, 4, (9, 10), "cd")
    outbox.add_end(worker_pb2.RequestEnd(request_id="r"))
    step = outbox.take()
    assert step.step == 6
    first, second = step.tokens
    assert (first.request_id, first.first_index, list(first.token_ids), first.text) == ("r", 3, [7, 9, 10], "acd")
    assert (second.request_id, second.choice, list(second.token_ids)) == ("other", 1, [8])
    assert [end.request_id for end in step.ends] == ["r"]
    assert outbox.take() is None


def test_tokens_of_two_dispatches_never_mix():
    outbox = Outbox()
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "")
    outbox.add_tokens(KEY, Epoch(1, 2), 0, (2,), "")
    assert [(t.epoch.counter, list(t.token_ids)) for t in outbox.take().tokens] == [(1, [1]), (2, [2])]


def test_a_gap_is_our_own_error():
    outbox = Outbox()
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "")
    with pytest.raises(AssertionError):
        outbox.add_tokens(KEY, EPOCH, 2, (1,), "")


@pytest.mark.parametrize("by", ["tokens", "ends"])
async def test_a_router_that_does_not_listen_gets_no_more_work(by):
    outbox = Outbox(max_tokens=10, max_ends=10)
    for place in range(10):
        assert not outbox.is_full
        await asyncio.wait_for(outbox.wait_for_room(), 60)
        if by == "tokens":
            outbox.add_tokens(KEY, EPOCH, place, (1,), "")
        else:
            outbox.add_end(worker_pb2.RequestEnd())
    assert outbox.is_full
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.wait_for_room(), 0.02)
    outbox.take()
    await asyncio.wait_for(outbox.wait_for_room(), 60)


async def test_the_writer_sleeps_until_something_waits():
    outbox = Outbox()
    waiting = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "a")
    await asyncio.wait_for(waiting, 60)


def end_of(key, epoch=EPOCH):
    return worker_pb2.RequestEnd(request_id=key.request_id, choice=key.choice, epoch=epoch_to_wire(epoch))


def taken(outbox):
    messages = []
    while not outbox.is_empty:
        message = outbox.take()  # None: scores are converted
        messages += [] if message is None else [message]
    return messages


def scores(num_tokens, num_top=20):
    top = tuple((place, -1.5) for place in range(num_top))
    return tuple(TokenLogprobs(7, -1.0, 3, top) for _ in range(num_tokens))


def test_prompt_scores_of_many_requests_leave_in_messages_of_a_bounded_size():
    outbox, told = Outbox(max_message_bytes=300_000), scores(1000)
    keys = [SequenceKey(f"r{number}", 0) for number in range(12)]
    for key in keys:  # each alone more than half a message
        outbox.add_tokens(key, EPOCH, 0, (7,), "a", scores=Scores((), told, 1))
        outbox.add_end(end_of(key))
    messages = taken(outbox)
    assert len(messages) > 2
    assert max(message.ByteSize() for message in messages) < 600_000
    ended, spoken = set(), []
    for message in messages:
        spoken += [tokens.request_id for tokens in message.tokens]
        assert not ended & {tokens.request_id for tokens in message.tokens}
        ended |= {end.request_id for end in message.ends}
        assert ended <= set(spoken), "an end before its tokens"
    assert spoken == [key.request_id for key in keys]
    assert ended == set(spoken)
    assert sum(len(tokens.prompt_logprobs) for message in messages for tokens in message.tokens) == 12 * len(told)


def test_one_choice_that_has_much_to_tell_is_split_in_order():
    outbox = Outbox(max_message_bytes=1000)
    for place in range(40):
        outbox.add_tokens(KEY, EPOCH, place, (place,), f"{place} ", scores=Scores(scores(1), (), place))
    outbox.add_end(end_of(KEY))
    messages = taken(outbox)
    assert len(messages) > 2
    assert max(message.ByteSize() for message in messages) < 2000
    parts = [tokens for message in messages for tokens in message.tokens]
    assert [token_id for part in parts for token_id in part.token_ids] == list(range(40))
    assert "".join(part.text for part in parts) == "".join(f"{place} " for place in range(40))
    assert [part.first_index for part in parts] == [sum(len(p.token_ids) for p in parts[:i]) for i in range(len(parts))]
    assert [len(message.ends) for message in messages] == [0] * (len(messages) - 1) + [1]
    assert parts[-1].shown_tokens == 39


def test_others_do_not_wait_while_the_scores_of_a_long_prompt_are_converted():
    outbox, told = Outbox(), scores(2_000)
    other = SequenceKey("other", 0)
    outbox.add_tokens(KEY, EPOCH, 0, (7,), "a", scores=Scores((), told, 1))
    outbox.add_end(end_of(KEY))
    for place in range(5):
        outbox.add_tokens(other, EPOCH, place, (place,), "b")
        message = outbox.take()
        assert [tokens.request_id for tokens in message.tokens] == ["other"]
        assert not message.ends
    long, *rest = taken(outbox)
    assert (len(long.tokens[0].prompt_logprobs), len(long.ends), rest) == (2_000, 1, [])


async def test_bytes_count_as_being_behind_too():
    outbox = Outbox(max_bytes=2000)
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "", scores=Scores((), scores(30), 0))
    assert outbox.is_full
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.wait_for_room(), 0.02)
    outbox.take()
    await asyncio.wait_for(outbox.wait_for_room(), 60)
    assert outbox.take() is None
    assert (outbox._num_bytes, outbox._num_tokens) == (0, 0)


def test_a_gap_between_parts_is_our_own_error():
    outbox = Outbox(max_message_bytes=10)
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "")
    with pytest.raises(AssertionError):
        outbox.add_tokens(KEY, EPOCH, 2, (1,), "")


def test_a_part_stops_growing_at_half_a_message():
    outbox = Outbox(max_message_bytes=1000)
    for place in range(300):  # each counts 12 bytes
        outbox.add_tokens(KEY, EPOCH, place, (place,), "x")
    sizes = [len(tokens.token_ids) for message in taken(outbox) for tokens in message.tokens]
    assert sizes == [42] * 7 + [6]


def test_who_takes_an_order_is_said_once_and_counts_as_an_end_does():
    outbox = Outbox(max_ends=2)
    outbox.add_taken(worker_pb2.OrderTaken(request_id="r"))
    outbox.add_end(worker_pb2.RequestEnd(request_id="other"))
    assert outbox.is_full
    assert [taken.request_id for taken in outbox.take().taken] == ["r"]
    assert (outbox.is_full, outbox.take()) == (False, None)
    outbox.add_taken(worker_pb2.OrderTaken(request_id="alone"))
    assert [taken.request_id for taken in outbox.take().taken] == ["alone"]
