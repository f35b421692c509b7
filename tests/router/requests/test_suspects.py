"""Suspects at workers that confirm orders: who is blamed for a loss, and who is not."""

from support.fakes.list_router import MODEL, Router

from twostroke.core import errors
from twostroke.core.request import Epoch, Role, SamplingParams
from twostroke.router.requests.attempts import CONFIRMS
from twostroke.router.requests.lifecycle import MAX_DISPATCHES, MAX_RESUMED_DISPATCHES
from twostroke.router.requests.state import RequestState, Stage
from twostroke.router.requests.suspects import APART_S, PROOF_TOKENS
from twostroke.router.routing.candidates import PolicyLimits
from twostroke.router.routing.facts import WorkerFacts, WorkerKey
from twostroke.worker.process import CAPABILITIES

LONG = SamplingParams(max_tokens=50)
CONFIRMING = (CONFIRMS,)


def kill(router: Router, key: WorkerKey) -> None:
    """A worker's process is killed; who was on it is sent on."""
    lose(router, key)
    router.pass_s(0.0)


def lose(router: Router, key: WorkerKey) -> None:
    """A worker's loss is noticed; nobody is sent on yet."""
    router.roster.session_down(key, "broke", router.now_s)
    router.roster.announce_ended(key, router.now_s)


def placed(run: RequestState) -> WorkerKey:
    assert run.living is not None
    return run.living.decode


def lost_once(*names: str, num_requests: int = 1) -> tuple[Router, list[RequestState]]:
    """A router whose first worker was killed with its requests; the others are idle. The first one is sent on."""
    router = Router("a", return_s=30.0, capabilities=CONFIRMING)
    runs = [router.ask(f"r{index}", sampling=LONG, timeout_s=60.0) for index in range(num_requests)]
    for run in runs:
        router.tokens(run, 3)
    for name in names:
        router.join(name)
    kill(router, WorkerKey("a", 1))
    return router, runs


def test_only_orders_of_suspects_ask_to_be_confirmed() -> None:
    router, (run,) = lost_once("b")
    router.tokens(run, PROOF_TOKENS)
    router.join("c")
    router.roster.leaving(WorkerKey("b", 1))
    router.end(run, code="unavailable")
    router.pass_s(0.0)
    assert [order.confirm for order in router.orders] == [0, PROOF_TOKENS, 0]


def test_a_suspect_that_was_confirmed_is_guilty_of_the_second_loss() -> None:
    router, (run,) = lost_once("b", "c")
    router.taken(run)
    kill(router, placed(run))
    assert isinstance(run.error, errors.PoisonRequest)
    assert len(run.dispatches) == 2


def test_two_workers_killed_in_one_instant_end_nobody() -> None:
    router, (run,) = lost_once("b")
    kill(router, placed(run))  # it was dead as the order was sent
    assert (run.error, run.stage) == (None, Stage.ROUTING)
    router.join("c")
    router.pass_s(APART_S)
    assert placed(run).worker_id == "c"
    router.taken(run)
    router.tokens(run, PROOF_TOKENS)
    assert run.suspicion is None


def test_however_many_workers_are_killed_in_one_instant_one_of_them_counts() -> None:
    router, (run,) = lost_once("b", "c", "d", "e")
    for _ in range(4):
        if run.living is not None:
            kill(router, placed(run))
    assert len(run.dispatches) == 2, "it rests, and the others are noticed meanwhile"
    for worker in list(router.roster.fleet):
        lose(router, worker.facts.key)
    router.join("f")
    router.pass_s(APART_S - 0.01)
    assert run.stage is Stage.ROUTING
    router.pass_s(0.01)
    assert placed(run).worker_id == "f"


def test_a_request_that_is_never_confirmed_takes_three_workers() -> None:
    router, (run,) = lost_once("b", "c", "d")
    kill(router, placed(run))
    router.pass_s(APART_S)
    kill(router, placed(run))
    assert isinstance(run.error, errors.PoisonRequest)
    assert len(run.dispatches) == 3
    names = ", ".join(dispatch.decode.worker_id for dispatch in run.dispatches)
    assert f"the workers {names} were lost" in run.error.message


def test_a_confirmation_after_an_unconfirmed_loss_is_as_good_as_any() -> None:
    router, (run,) = lost_once("b", "c")
    kill(router, placed(run))
    router.pass_s(APART_S)
    router.taken(run)
    kill(router, placed(run))
    assert isinstance(run.error, errors.PoisonRequest)


def test_a_confirmation_of_an_older_dispatch_counts_for_nothing() -> None:
    router, (run,) = lost_once("b")
    router.taken(run, epoch=run.dispatches[0].epoch)
    assert router.drops == ["stale_epoch"]
    kill(router, placed(run))
    assert run.error is None
    router.taken(run, epoch=Epoch(7, 99))  # it is on no worker now
    assert run.dispatches[-1].is_taken is False


def test_one_choice_of_several_that_is_confirmed_is_enough() -> None:
    router = Router("a", "b", capabilities=CONFIRMING)
    run = router.ask(num_choices=3, sampling=LONG)
    kill(router, placed(run))
    router.taken(run, choice=2)
    kill(router, placed(run))
    assert isinstance(run.error, errors.PoisonRequest)


def test_beside_a_suspect_that_was_not_confirmed_anybody_may_have_done_it() -> None:
    router, (run,) = lost_once("b")
    other = router.ask("other", sampling=LONG, timeout_s=60.0)
    assert placed(run) == placed(other)
    kill(router, placed(run))
    assert other.suspicion is not None
    assert other.stage is run.stage is Stage.ROUTING
    router.join("c")
    router.pass_s(0.0)
    assert (placed(other).worker_id, run.stage) == ("c", Stage.ROUTING), "the one that rests holds up nobody"
    router.taken(other)
    router.tokens(other, PROOF_TOKENS)
    router.pass_s(APART_S)
    assert placed(run).worker_id == "c"


def test_beside_a_suspect_that_was_confirmed_nobody_else_is_blamed() -> None:
    router, (run,) = lost_once("b")
    other = router.ask("other", sampling=LONG, timeout_s=60.0)
    router.taken(run)
    kill(router, placed(run))
    assert isinstance(run.error, errors.PoisonRequest)
    assert (other.error, other.suspicion) == (None, None)


def test_the_patience_of_one_that_rests_begins_when_it_has_rested() -> None:
    router = Router("a", "b", worker_patience_s=0.5, capabilities=CONFIRMING)
    run = router.ask(sampling=LONG)
    for _ in range(2):
        kill(router, placed(run))
    router.roster.announced(WorkerFacts("c", 1, Role.COMBINED, "c:1", MODEL, 1000, 16, 16, 2048), router.now_s)
    router.pass_s(APART_S + 0.4)
    assert run.error is None, "a worker is joining"
    router.pass_s(0.2)
    assert isinstance(run.error, errors.WorkerLost)


def test_a_worker_of_an_older_release_counts_as_one_that_confirmed() -> None:
    router = Router("a", "b", return_s=30.0)
    run = router.ask(sampling=LONG)
    kill(router, placed(run))
    kill(router, placed(run))
    assert isinstance(run.error, errors.PoisonRequest)


# ------------------------------------------------------------------ prompts that another worker computes


def with_peers(*peers: str) -> tuple[Router, RequestState, list[WorkerKey]]:
    """A request at a decode worker, and the prefill workers of its order, best first."""
    router = Router(policy=PolicyLimits(local_prefill=False), return_s=30.0, capabilities=CONFIRMING)
    router.join("d", role=Role.DECODE)
    for name in peers:
        router.join(name, role=Role.PREFILL)
    run = router.ask(sampling=LONG, timeout_s=60.0)
    assert run.living is not None
    return router, run, [peer.key for peer in run.living.choice.prefill_peers]


def test_a_prompt_that_kills_each_prefill_worker_that_begins_with_it_takes_two() -> None:
    router, run, peers = with_peers("p", "q")
    kill(router, peers[0])
    router.taken(run, peers[1])
    kill(router, peers[1])
    assert isinstance(run.error, errors.PoisonRequest)


def test_prefill_workers_killed_in_one_instant_end_nobody() -> None:
    router, run, peers = with_peers("p", "q", "s", "t")
    assert len(peers) == 4
    for peer in peers:
        kill(router, peer)
    assert run.error is None
    assert run.stage is Stage.DISPATCHED, "its decode worker computes the prompt"


def test_a_prompt_whose_prefill_workers_are_lost_one_by_one_takes_three() -> None:
    router, run, peers = with_peers("p", "q", "s", "t")
    for peer in peers[:2]:
        kill(router, peer)
        assert run.error is None
        router.pass_s(APART_S)
    kill(router, peers[2])
    assert isinstance(run.error, errors.PoisonRequest)


def test_a_decode_worker_and_its_prefill_worker_killed_in_one_instant_end_nobody() -> None:
    router, run, peers = with_peers("p")
    kill(router, peers[0])
    kill(router, placed(run))
    assert run.error is None
    router.join("e", role=Role.DECODE)
    router.join("q", role=Role.PREFILL)
    router.pass_s(APART_S)
    assert placed(run).worker_id == "e"
    assert router.orders[-1].confirm == PROOF_TOKENS


def test_the_prefill_worker_that_began_is_the_one_that_the_decode_worker_named() -> None:
    """The best one refused it, so the second one computes it."""
    router, run, peers = with_peers("p", "q")
    router.taken(run, peers[1])
    kill(router, peers[0])
    assert run.suspicion is None
    kill(router, peers[1])
    assert run.suspicion is not None


def test_the_one_after_a_prefill_worker_that_is_lost_may_compute_it_before_anybody_says_so() -> None:
    router, run, peers = with_peers("p", "q")
    router.taken(run, peers[0])
    kill(router, peers[0])
    kill(router, peers[1])
    assert run.suspicion is not None
    assert list(run.suspicion.workers) == peers


def test_a_suspect_does_not_rest_because_a_prefill_worker_is_lost() -> None:
    router, run, peers = with_peers("p", "q", "s")
    kill(router, peers[0])
    kill(router, peers[1])
    router.join("e", role=Role.DECODE)
    router.roster.leaving(WorkerKey("d", 1))
    router.end(run, code="unavailable")
    router.pass_s(0.0)
    assert placed(run).worker_id == "e"


def test_workers_of_this_release_confirm() -> None:
    assert CONFIRMS in CAPABILITIES


# ------------------------------------------------------------------ suspects of other routers


def test_a_suspect_that_waits_for_another_routers_waits_until_its_deadline_and_spends_no_retries() -> None:
    router = Router("a", "b", capabilities=CONFIRMING)
    run = router.ask(sampling=LONG, timeout_s=60.0)
    kill(router, placed(run))
    for _ in range(20):
        router.end(run, code="overloaded")
        assert (run.error, run.stage) == (None, Stage.ROUTING)
        router.pass_s(1.0)
        assert run.stage is Stage.DISPATCHED
    router.end(run, code="overloaded")
    router.pass_s(60.0)
    assert isinstance(run.error, errors.DeadlineExceeded | errors.Overloaded)


def test_a_stream_that_waits_for_another_routers_suspect_is_refused_as_often_as_it_takes() -> None:
    router, (run,) = lost_once("b")
    for _ in range(20):
        router.end(run, code="overloaded")
        router.pass_s(1.0)
    router.tokens(run, PROOF_TOKENS)
    assert (run.error, run.suspicion) == (None, None)


def test_a_choice_whose_prompt_is_still_computed_may_have_killed_the_prefill_worker() -> None:
    """Else the request goes on to kill the next one, and whoever was beside it is blamed."""
    router = Router(policy=PolicyLimits(local_prefill=False), capabilities=CONFIRMING)
    router.join("d", role=Role.DECODE)
    for name in ("p", "q"):
        router.join(name, role=Role.PREFILL)
    run = router.ask(num_choices=3, sampling=LONG)
    assert run.living is not None
    peer = run.living.choice.prefill_peers[0].key
    router.tokens(run, choice=0)
    router.tokens(run, choice=1)
    kill(router, peer)
    assert run.suspicion is not None


# ------------------------------------------------------------------ workers that leave on purpose


def test_a_request_outlives_any_number_of_workers_that_drain_one_after_the_other() -> None:
    for num_tokens in (0, 1):
        router = Router("w0", "w1", capabilities=CONFIRMING)
        run = router.ask(sampling=LONG, timeout_s=60.0)
        router.tokens(run, num_tokens)
        for index in range(2, 2 + MAX_RESUMED_DISPATCHES):
            router.roster.leaving(placed(run))
            router.join(f"w{index}")
            if index % 2:
                router.end(run, code="unavailable")
            else:
                lose(router, placed(run))  # its grace was over
            router.pass_s(0.1)
            assert run.stage is Stage.DISPATCHED
        assert run.suspicion is None
        assert run.num_tries == 1


def test_a_request_that_is_refused_by_workers_that_stay_is_not_sent_for_ever() -> None:
    router = Router("a", "b", "c", "d")
    run = router.ask(sampling=LONG, timeout_s=60.0)
    for _ in range(MAX_DISPATCHES):
        router.end(run, code="unavailable")
        router.pass_s(0.1)
    assert isinstance(run.error, errors.Unavailable)


# ------------------------------------------------------------------ workers that were cut off


def cut(router: Router, key: WorkerKey) -> None:
    """A worker's session breaks; the worker lives and still announces itself."""
    router.roster.session_down(key, "broke", router.now_s)
    router.pass_s(0.0)


def is_back(router: Router, key: WorkerKey) -> None:
    """The session of a worker is open again, in the same life."""
    router.up.add(key)
    router.roster.session_up(key, None, router.now_s)


def test_a_worker_that_is_back_in_the_same_life_was_killed_by_nobody() -> None:
    router = Router("a", capabilities=CONFIRMING)
    runs = [router.ask(f"r{index}", sampling=LONG) for index in range(3)]
    router.join("b")
    cut(router, WorkerKey("a", 1))
    assert sum(run.stage is Stage.DISPATCHED for run in runs) == 1
    is_back(router, WorkerKey("a", 1))
    router.pass_s(0.0)
    router.life.tick(router.now_s)
    router.pass_s(0.0)
    assert all(run.suspicion is None and run.stage is Stage.DISPATCHED for run in runs)


def test_who_was_cut_off_twice_is_guilty_of_nothing() -> None:
    router, (run,) = lost_once("b")
    router.tokens(run, PROOF_TOKENS)
    router.join("c")
    for _ in range(2):
        key = placed(run)
        cut(router, key)
        router.taken(run)
        is_back(router, key)
    assert run.error is None
    kill(router, placed(run))
    assert (run.error, len(run.suspicion.workers)) == (None, 1)


def falls_silent(router: Router) -> None:
    """No worker says anything on its session any more; all announce themselves by another stream."""
    for _ in range(25):
        router.pass_s(0.1)
        for worker in router.roster.fleet:
            router.roster.announced(worker.facts, router.now_s)
        router.roster.tick(router.now_s, 100)


def test_a_worker_that_had_fallen_silent_and_is_back_in_the_same_life_was_slow() -> None:
    router = Router("a", return_s=30.0, capabilities=CONFIRMING)
    run = router.ask(sampling=LONG, timeout_s=60.0)
    router.tokens(run)
    for _ in range(3):
        falls_silent(router)
        assert run.suspicion is not None
        router.life.tick(router.now_s)
        assert run.suspicion is not None, "not back yet: it may hang"
        is_back(router, WorkerKey("a", 1))
        router.life.tick(router.now_s)
        assert (run.suspicion, run.error) == (None, None)


def test_a_worker_that_is_back_counts_no_more_against_a_suspect() -> None:
    router, (run,) = lost_once("b")
    cut(router, placed(run))
    is_back(router, WorkerKey("b", 1))
    router.life.tick(router.now_s)
    router.pass_s(2 * APART_S)
    assert run.suspicion is not None
    assert [key.worker_id for key in run.suspicion.workers] == ["a"]
    kill(router, placed(run))  # not confirmed: the first such loss that counts
    assert run.error is None
