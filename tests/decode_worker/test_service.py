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


def test_a_newer_order_that_is_refused_ends_the_older_run_all_the_same():
    dispatcher = SimpleNamespace(on_step=lambda act: None)
    facts = SimpleNamespace(namer=PromptHasher(b"k" * 32, b"w" * 16, b""))
    tools = SimpleNamespace(facts=facts, pull=SimpleNamespace(counters=Counter(), dispatcher=dispatcher))
    service, session = DecodeService(tools, None), SimpleNamespace(router=RouterKey("a", 1), outbox=Outbox())
    older = OlderRun()
    service._ledger.begin(older, session, session.router, SequenceKey("r", 0), Epoch(1, 1))
    service.draining.is_on = True
    service.submit(session, worker_pb2.Submit(request_id="r", epoch=epoch_to_wire(Epoch(1, 2))))
    assert older.reasons == ["a newer dispatch"]
    assert [end.error.code for end in session.outbox.take().ends] == ["unavailable"]
