"""What the face of a decode worker does with orders, told without a stream."""

from collections import Counter
from types import SimpleNamespace

from twostroke.core.request import Epoch, SequenceKey
from twostroke.decode_worker.ledger import RouterKey
from twostroke.decode_worker.outbox import Outbox
from twostroke.decode_worker.service import DecodeService
from twostroke.kv.keys import PromptHasher
from twostroke.kv.messages import epoch_to_wire
from twostroke.protos import worker_pb2


class OlderRun:
    def __init__(self):
        self.reasons = []

    def cancel(self, reason):
        self.reasons.append(reason)


class Session:
    def __init__(self, router_id):
        self.router, self.outbox = RouterKey(router_id, 1), Outbox()


def service_and_session():
    dispatcher = SimpleNamespace(on_step=lambda act: None)
    facts = SimpleNamespace(namer=PromptHasher(b"k" * 32, b"w" * 16, b""))
    tools = SimpleNamespace(facts=facts, pull=SimpleNamespace(counters=Counter(), dispatcher=dispatcher))
    return DecodeService(tools, None), Session("a")


def test_a_newer_order_that_is_refused_ends_the_older_run_all_the_same():
    service, session = service_and_session()
    older = OlderRun()
    service._ledger.begin(older, session, session.router, SequenceKey("r", 0), Epoch(1, 1))
    service.draining.is_on = True
    service.submit(session, worker_pb2.Submit(request_id="r", epoch=epoch_to_wire(Epoch(1, 2))))
    assert older.reasons == ["a newer dispatch"]
    assert [end.error.code for end in session.outbox.take().ends] == ["unavailable"]


def test_two_suspects_of_different_routers_are_not_computed_at_once():
    """Each router would see one suspect alone on a lost worker, and blame it."""
    service, session = service_and_session()
    other, run = Session("b"), OlderRun()
    run.is_suspect = True
    service._ledger.begin(run, other, other.router, SequenceKey("theirs", 0), Epoch(1, 1))
    order = worker_pb2.Submit(request_id="ours", epoch=epoch_to_wire(Epoch(1, 1)), confirm=4)
    service.submit(session, order)
    (end,) = session.outbox.take().ends
    assert (end.error.code, "another router" in end.error.message) == ("overloaded", True)
    assert not service.has_others_suspect(other), "of its own suspects the router takes care"
    run.is_suspect = False
    assert not service.has_others_suspect(session)
