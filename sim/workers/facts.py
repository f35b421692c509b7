"""Facts of simulated workers, as their faces and the routers know them."""

from __future__ import annotations

from dataclasses import replace

from ...core.request import Role
from ...engine.facts import FaceFacts, ModelFacts
from ...kv.handover.frames import slot_bytes
from ...kv.handover.plane_channel import GLOO, RingPool, TransportPolicy
from ...kv.keys import PromptHasher
from ...kv.spec import KvSpec
from ...router.routing import facts as router_facts
from ..rings import Host, SimRing
from ..setting import Setting, WorkerSetting
from .cells import DIGEST_KEY, SPEC, spec_of
from .engine import FINGERPRINT, IDENTITY_KEY, NUMERICS
from .store import EOS, VOCABULARY

MODEL = "model"
MAX_MODEL_LEN = 1 << 20
MODEL_FACTS = ModelFacts(
    name=MODEL,
    directory="",
    vocab_size=VOCABULARY,
    max_model_len=MAX_MODEL_LEN,
    eos_ids=frozenset([EOS]),
    weights_fingerprint=FINGERPRINT,
    numerics_class=NUMERICS,
    numerics_description="",
    deterministic=True,
    kv_spec=SPEC,
)
PORT = 1  # port of every worker: orders name peers by host and port
ROUTER_MODEL = router_facts.ModelFacts(
    name=MODEL,
    weights_fingerprint=FINGERPRINT,
    numerics_class=NUMERICS,
    numerics_description="",
    max_model_len=MAX_MODEL_LEN,
    vocab_size=VOCABULARY,
    deterministic=True,
    path="",
    kv_bytes_per_token=SPEC.bytes_per_token,
)


def address_of(worker: WorkerSetting) -> str:
    """Address of all services of a worker."""
    return f"{worker.worker_id}:{PORT}"


def ring_pool(host: Host, worker: WorkerSetting, spec: KvSpec) -> RingPool:
    """Shared memory that a worker offers to its peers."""
    size = slot_bytes(spec, worker.frame_tokens * spec.bytes_per_token)
    one = worker.frame_slots * size
    return RingPool(lambda: SimRing(host, worker.frame_slots, size), one, one * worker.num_rings)


def face_facts(worker: WorkerSetting, setting: Setting) -> FaceFacts:
    """Facts that a worker's face has of its engine."""
    transport, pairs, spec = TransportPolicy(), setting.pairs, spec_of(setting.window, setting.heads)
    if pairs is not None and worker.role is not Role.PREFILL:
        transport = TransportPolicy(GLOO, pairs.is_required)
    return FaceFacts(
        worker_id=worker.worker_id,
        model=replace(MODEL_FACTS, kv_spec=spec),
        namer=PromptHasher.of(IDENTITY_KEY, MODEL_FACTS),
        digest_key=DIGEST_KEY,
        num_blocks=worker.num_blocks,
        block_tokens=worker.block_tokens,
        frame_bytes=worker.frame_tokens * spec.bytes_per_token,
        frame_slots=worker.frame_slots,
        max_num_seqs=worker.limits.max_num_seqs,
        max_batch_tokens=worker.limits.max_batch_tokens,
        transport=transport,
        num_ranks=worker.num_ranks,
    )
