"""The core under random commands, with a store that remembers which prefix every cell was computed from."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from support.engines.core_machine import CoreMachine
from support.fakes.cell_store import EOS, KEY

from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Source
from twostroke.engine.policy import StepLimits
from twostroke.engine.states import STATES_PER_SEAT
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache


class StateMachine(CoreMachine):
    """A combined worker of a model with recurrent layers: few states, and every step reads that of its very prefix."""

    @initialize(
        num_blocks=st.integers(4, 14),
        span=st.sampled_from([16, 16, 32]),
        seqs=st.integers(1, 5),
        batch=st.sampled_from([16, 32, 48, 96]),
        snapshots=st.sampled_from([0, 1, 2, 20]),
        enabled=st.sampled_from([True, True, True, False]),
    )
    def begin(self, *, num_blocks, span, seqs, batch, snapshots, enabled):
        self.start_with(StepLimits(seqs, batch, 8, 600), BlockPool(num_blocks, span))
        limits = CoreLimits(num_states=STATES_PER_SEAT * seqs + snapshots, num_seats=seqs)
        prefix = PrefixCache(self.pool, enabled=enabled)
        self.core = EngineCore(limits, self.pool, prefix, combined_policy(self.limits), eos_ids=[EOS], key=KEY)

    @rule(
        sizes=st.tuples(st.integers(1, 120), st.integers(1, 60), st.integers(0, 3)),
        family=st.integers(0, 2),
        copies=st.integers(1, 4),
        patience=st.none() | st.none() | st.floats(0.5, 20),
    )
    def submit(self, sizes, family, copies, patience):
        length, max_tokens, emitted = sizes
        for copy in range(copies):
            self.submit_one(Source.LOCAL, (length + 9 * copy, max_tokens, emitted), family, patience)

    def drain(self):
        super().drain()
        counters = dict(self.core.load(self.now_s).counters)
        assert counters["states_in_use"] == 0, "a state was not given back"


for machine in (CoreMachine, StateMachine):
    machine.TestCase.settings = settings(
        max_examples=100,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
TestRandomLives = CoreMachine.TestCase
TestRandomLivesWithStates = StateMachine.TestCase
