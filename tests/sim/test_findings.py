"""What the simulator found in production machines, as the smallest case that shows it."""

from twostroke.core.errors import TokensLost
from twostroke.core.lease import HANDOVER_LEASE
from twostroke.core.request import Epoch, Request, SamplingParams
from twostroke.core.timeline import Instant, Timeline
from twostroke.kv.handover.machine import Label
from twostroke.kv.handover.receiver import Receiver
from twostroke.kv.messages import epoch_to_wire
from twostroke.protos import common_pb2, worker_pb2
from twostroke.protos import handover_pb2 as pb
from twostroke.router.requests.delivery import DeliveryVerdict
from twostroke.router.requests.state import Dispatch, RequestState
from twostroke.sim.workers.facts import ROUTER_MODEL

EPOCH = Epoch(1, 1)


def run_that_was_dispatched() -> RequestState:
    timeline = Timeline()
    timeline.mark(Instant.ARRIVED, 0.0)
    request = Request("r", "model", (1, 2, 3), SamplingParams(max_tokens=2), 1, "acme", 5.0)
    run = RequestState("r", request, timeline, ROUTER_MODEL, 16)
    run.dispatched(Dispatch(EPOCH, None, 0.0))
    return run


def end_after(num_tokens: int) -> worker_pb2.RequestEnd:
    usage = common_pb2.Usage(completion_tokens=num_tokens)
    reason = common_pb2.FINISH_REASON_LENGTH
    return worker_pb2.RequestEnd(request_id="r", choice=0, epoch=epoch_to_wire(EPOCH), reason=reason, usage=usage)


def test_an_end_whose_last_tokens_never_came_is_no_clean_end():
    run = run_that_was_dispatched()
    tokens = worker_pb2.TokenOutput(request_id="r", epoch=epoch_to_wire(EPOCH), first_index=0, token_ids=[7])
    assert run.take_tokens(tokens, 1.0) is DeliveryVerdict.TAKE
    assert isinstance(run.take_end(end_after(2), 1.0), TokensLost)
    assert run.take_end(end_after(1), 1.0) is DeliveryVerdict.TAKE


def test_a_write_of_a_lost_hand_over_is_not_taken_for_one_of_the_next():
    order = pb.Open(prompt_ids=range(40), frame_slots=2, timeout_ms=1000)
    receiver = Receiver(Label("r", 0, EPOCH), order, HANDOVER_LEASE, 1.0, 0.0)
    receiver.opened(0.0)
    assert receiver.written(0, 16, 0.1) == []
    assert receiver.stored_upto == 0
