"""The planner's decisions become scales of Deployments: the official client against a stand-in API server."""

import asyncio
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from support.deploy.kube.access import token_of
from support.deploy.kube.api_server import ApiServer
from support.deploy.kube.store import Store

from twostroke.cluster.kubernetes.arm import PodScaler
from twostroke.cluster.kubernetes.connection import connect
from twostroke.cluster.kubernetes.lease import LeaseTiming, Tenure
from twostroke.cluster.kubernetes.objects import DRAINED, Leases
from twostroke.cluster.kubernetes.process import Place, livez
from twostroke.cluster.kubernetes.surroundings import Inside, Kubernetes
from twostroke.cluster.planner.config import PlannerConfig
from twostroke.cluster.planner.decision import HOLD, Action, ChangeRole, Decision, Drain, Start, Stop
from twostroke.core.errors import Unavailable
from twostroke.core.request import Role

pytest.importorskip("kubernetes", reason="pip install kubernetes")

NAMES = {Role.PREFILL: "ts-prefill", Role.DECODE: "ts-decode"}
SCALE = ("patch", "deployments/scale")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def now_s(self) -> float:
        return self.now


class Plan:
    """A planner that says what a test has prepared."""

    def __init__(self) -> None:
        self.actions: deque[Action] = deque()
        self.draining: tuple[str, ...] = ()
        self.adopted: tuple[str, ...] = ()
        self.refusals: list[tuple[int, str]] = []
        self.asked: list[tuple[Any, int | None]] = []
        self.made = 0

    def make(self, config: PlannerConfig, num_configured: int) -> "Plan":
        self.made += 1
        return self

    def decide(self, observation: Any, now_s: float, num_owned: int | None = None) -> Decision:
        self.asked.append((observation, num_owned))
        action = self.actions.popleft() if self.actions and observation is not None else HOLD
        return Decision(now_s, action, "planted", desired={"prefill": 1, "decode": 2})

    def adopt(self, draining: tuple[str, ...], now_s: float) -> None:
        self.adopted = draining

    def refused(self, count: int, reason: str, now_s: float) -> None:
        self.refusals.append((count, reason))


class Routers:
    """Two routers that know the same workers."""

    addresses = ("10.0.0.1:8002", "10.0.0.2:8002")

    def __init__(self, *workers: str) -> None:
        self.workers = workers

    async def reports(self) -> list[dict[str, Any]]:
        about = {"load": {"queued_prefill_tokens": 0, "running": 0, "waiting": 0}, "max_num_seqs": 8, "state": "live"}
        about["blocks"] = {"block_tokens": 16, "total": 8, "free": 8, "promised": 0}
        about["measured"] = {"prefill_ms_per_token": 1, "prefill_ms_per_token_pair": 0, "decode_step_ms": 1}
        workers = [
            about | {"worker_id": name, "address": f"{name}:8100", "role": "prefill" if "prefill" in name else "decode"}
            for name in self.workers
        ]
        sums = {"count": 1, "tokens": 10, "tokens_squared": 100}
        return [
            {"router": {"name": n, "incarnation": n}, "workers": workers, "prompts": sums, "counters": {}} for n in "ab"
        ]


class Hands:
    """Calls to workers and routers, noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.reports: list[Any] = []

    async def set_role(self, address: str, role: Role) -> None:
        self.calls.append(("role", address, role.value))

    async def drain(self, address: str, timeout_s: float) -> int:
        self.calls.append(("drain", address))
        return 0

    async def report(self, router: str, report: Any) -> None:
        self.reports.append(report)
        if router.startswith("10.0.0.2"):
            raise Unavailable("away")


class Room:
    """A planner's driver over a stand-in API server with two Deployments."""

    def __init__(
        self, api: ApiServer, me: str = "a", clock: Clock | None = None, workers: tuple[str, ...] = (), of_set: str = ""
    ) -> None:
        """`of_set`: a DisaggregatedSet in place of the Deployments."""
        self.api, self.clock, self.plan, self.hands = api, clock or Clock(), Plan(), Hands()
        self.tenure = Tenure(me, LeaseTiming(duration_s=30.0, renew_by_s=20.0, interval_s=2.0))
        connection = connect()
        place = Place("default", of_set or NAMES, "ts-planner", me)
        leases = Leases(connection, "default", "ts-planner")
        kubernetes = Kubernetes(*place.scales(connection), leases, self.tenure)
        routers = Routers(*(workers or ("ts-prefill-1-a", "ts-decode-1-a", "ts-decode-1-b")))
        inside = Inside(routers, self.hands)
        self.scaler = PodScaler(PlannerConfig(), inside, kubernetes, self.clock, self.plan.make)  # type: ignore[arg-type]

    async def turn(self, *actions: Action) -> Any:
        """One turn; gives the last report."""
        self.plan.actions.extend(actions)
        await self.scaler.turn()
        await asyncio.sleep(0)
        return self.hands.reports[-1] if self.hands.reports else None

    def replicas(self) -> dict[str, int]:
        return {each["metadata"]["name"]: each["spec"]["replicas"] for each in self.api.store.all("deployments")}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = ApiServer(Store())
    file = tmp_path / "kubeconfig"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    server.be = lambda account: file.write_text(server.kubeconfig(token_of("default", account) if account else ""))  # type: ignore[attr-defined]
    server.be("")  # type: ignore[attr-defined]
    for name, replicas in (("ts-prefill", 1), ("ts-decode", 2)):
        server.store.put("deployments", {"metadata": {"name": name}, "spec": {"replicas": replicas}})
    yield server
    server.close()


async def test_a_start_is_one_change_of_each_scale(api: ApiServer):
    room = Room(api)
    report = await room.turn(Start((Role.DECODE, Role.PREFILL, Role.DECODE)))
    assert room.replicas() == {"ts-prefill": 2, "ts-decode": 4}
    assert api.calls[SCALE] == 2
    assert report.action == "start"
    assert any("ts-decode has 4 replicas" in event for event in report.events)
    for _ in range(3):
        await room.turn()
    assert api.calls[SCALE] == 2
    assert room.plan.asked[-1][1] == 6
    assert report.actual == {"prefill": 1, "decode": 2}
    assert len(room.hands.reports) == 8  # every router, though one of them does not answer


async def test_a_change_that_crosses_anothers_is_made_upon_it(api: ApiServer):
    room = Room(api)
    await room.turn()
    api.refusals.append(("patch", 409))  # of the scale: somebody was quicker
    await room.turn(Start((Role.DECODE,)))
    assert room.replicas()["ts-decode"] == 3
    assert api.calls[SCALE] == 2
    assert not room.plan.refusals


async def test_a_missing_right_is_told_in_status_and_logged_once(api: ApiServer, caplog: pytest.LogCaptureFixture):
    api.be("planner")  # type: ignore[attr-defined]
    rules = [
        {"apiGroups": ["apps"], "resources": ["deployments", "deployments/scale"], "verbs": ["get"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "patch"]},
    ]
    api.store.put("roles", {"metadata": {"name": "planner"}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "planner", "namespace": "default"}
    binding = {"metadata": {"name": "planner"}, "roleRef": {"name": "planner"}, "subjects": [subject]}
    api.store.put("rolebindings", binding)
    room = Room(api)
    report = await room.turn(Start((Role.DECODE,)))
    assert room.plan.refusals[0][0] == 1
    assert "deployments/scale" in room.plan.refusals[0][1]
    assert any("403" in event for event in report.events)
    for _ in range(3):
        room.clock.now += 60.0
        api.calls.clear()
        await room.turn(Start((Role.DECODE,)))
    assert len([each for each in caplog.records if "403" in each.message]) == 1
    assert room.replicas()["ts-decode"] == 2
    rules[0]["verbs"] = ["get", "patch"]
    api.store.put("roles", {"metadata": {"name": "planner"}, "rules": rules})
    report = await room.turn(Start((Role.DECODE,)))
    assert room.replicas()["ts-decode"] == 3
    assert any("works again" in event for event in report.events)


async def test_a_worker_that_goes_drains_first_and_is_taken_away_once(api: ApiServer):
    room = Room(api)
    await room.turn(Drain(("ts-decode-1-b",)))
    await room.turn()
    assert room.hands.calls == [("drain", "ts-decode-1-b:8100")]
    assert api.calls[SCALE] == 0
    report = await room.turn(Stop("ts-decode-1-b"))
    assert room.replicas() == {"ts-prefill": 1, "ts-decode": 1}
    assert api.calls[SCALE] == 1
    assert report.action == "stop"


async def test_a_pod_that_the_api_server_does_not_take_away_is_pending_and_asked_for_again(api: ApiServer):
    room = Room(api)
    await room.turn()
    api.refusals.append(("patch", 503))  # of the Lease, at the stop
    api.refusals.append(("patch", 503))
    report = await room.turn(Stop("ts-decode-1-b"))
    assert "ts-decode is to have 1 pod fewer: 503" in report.decision
    room.clock.now += 1.0
    await room.turn()
    assert room.replicas()["ts-decode"] == 2
    room.clock.now += 5.0
    report = await room.turn()
    assert room.replicas()["ts-decode"] == 1
    assert "1 pod fewer" not in report.decision
    assert not room.plan.refusals


async def test_the_lease_names_a_worker_that_drains_until_just_before_its_deployment_shrinks(api: ApiServer):
    room = Room(api)
    written = lambda: api.store.all("leases")[0]["metadata"]["annotations"][DRAINED]  # noqa: E731
    room.plan.draining = ("ts-decode-1-b",)
    await room.turn(Drain(room.plan.draining))
    room.clock.now += 3.0
    await room.turn()
    assert written() == '["ts-decode-1-b"]'
    room.plan.draining = ()
    api.refusals.append(("patch", 503))  # of the Lease
    await room.turn(Stop("ts-decode-1-b"))
    assert written() == '["ts-decode-1-b"]'
    assert api.calls[SCALE] == 0, "a successor would end another one for it"
    room.clock.now += 3.0
    await room.turn()
    assert written() == "[]"
    assert room.replicas()["ts-decode"] == 1


async def test_a_role_changes_by_a_call_to_the_worker_and_no_scale(api: ApiServer):
    room = Room(api)
    await room.turn(ChangeRole("ts-decode-1-a", Role.PREFILL))
    assert room.hands.calls == [("role", "ts-decode-1-a:8100", "prefill")]
    report = await room.turn(ChangeRole("ts-decode-9-z", Role.PREFILL))
    assert any("no router knows ts-decode-9-z" in event for event in report.events)
    assert api.calls[SCALE] == 0


async def test_deployments_that_cannot_be_read_are_told_and_looked_at_again(api: ApiServer):
    room = Room(api)
    api.refusals.extend([("get", 404), ("get", 404)])  # of the Lease, which is then made, and of a Deployment
    report = await room.turn(Start((Role.DECODE,)))
    assert "cannot be read" in report.reason
    assert room.plan.made == 0
    room.clock.now += 3.0
    await room.turn()
    assert room.plan.made == 1
    assert room.replicas()["ts-decode"] == 3


async def test_a_worker_of_somebody_else_is_not_ended(api: ApiServer):
    room = Room(api)
    report = await room.turn(Stop("other-decode-1-a"))
    assert any("no pod of" in event for event in report.events)
    assert api.calls[SCALE] == 0


async def test_while_a_deployment_rolls_out_nothing_is_decided(api: ApiServer):
    room = Room(api)
    api.store.set_status("deployments", "default", "ts-decode", {"replicas": 2, "updatedReplicas": 1})
    report = await room.turn(Start((Role.DECODE,)))
    assert report.reason == "ts-decode: its pods roll out"
    assert room.plan.asked == [(None, None)]
    api.store.set_status("deployments", "default", "ts-decode", {"replicas": 2, "updatedReplicas": 2})
    room.clock.now += 6.0
    await room.turn()
    assert room.replicas()["ts-decode"] == 3


async def test_who_loses_the_lease_stops_and_who_takes_it_goes_on_with_what_drains(api: ApiServer):
    clock = Clock()
    first, second = Room(api, "a", clock), Room(api, "b", clock)
    await first.turn()
    await second.turn(Start((Role.DECODE,)))
    assert second.plan.made == 0
    assert api.calls[SCALE] == 0
    first.plan.draining = ("ts-decode-1-b",)
    clock.now += 3.0
    await first.turn()
    assert DRAINED in api.store.all("leases")[0]["metadata"]["annotations"]
    await second.turn()  # sees the last renewal

    # The first one cannot reach the Lease any more: it stops, and only later the other one begins.
    leases = api.store.all("leases")
    clock.now += 21.0
    api.refusals.extend([("get", 503)])
    told = len(first.hands.reports)
    await first.turn(Start((Role.DECODE,)))
    assert api.calls[SCALE] == 0
    assert len(first.hands.reports) == told, "who does not act tells the routers nothing"
    await second.turn()
    assert second.plan.made == 0
    assert api.store.all("leases") == leases
    clock.now += 12.0
    await second.turn()
    assert second.plan.made == 1
    assert second.plan.adopted == ("ts-decode-1-b",)
    await asyncio.sleep(0)
    assert ("drain", "ts-decode-1-b:8100") in second.hands.calls
    assert second.replicas()["ts-decode"] == 3
    clock.now += 3.0
    await first.turn(Start((Role.DECODE,)))
    assert first.replicas()["ts-decode"] == 3
    assert api.store.all("leases")[0]["spec"]["leaseTransitions"] == 1


async def test_whose_lease_ran_out_while_it_decided_changes_nothing(api: ApiServer):
    room = Room(api)
    await room.turn()
    decide = room.plan.decide

    def late(*given: Any) -> Decision:
        room.clock.now += 21.0
        return decide(*given)

    room.plan.decide = late  # type: ignore[method-assign]
    await room.turn(Start((Role.DECODE,)))
    assert api.calls[SCALE] == 0
    room.plan.decide = decide  # type: ignore[method-assign]
    await room.turn()  # nobody else took it
    assert room.replicas()["ts-decode"] == 3


async def test_who_finds_its_lease_deleted_begins_anew(api: ApiServer):
    room = Room(api)
    await room.turn()
    api.store.remove("leases", "default", "ts-planner")
    room.clock.now += 3.0
    await room.turn()
    assert room.plan.made == 2, "another one may have acted meanwhile"


async def test_a_tenure_counts_from_before_the_lease_was_read(api: ApiServer):
    room = Room(api)
    write = room.scaler._leases.write

    def slow(*given: Any) -> bool:
        is_ours = write(*given)
        room.clock.now += 15.0
        return is_ours

    room.scaler._leases.write = slow  # type: ignore[method-assign]
    await room.turn()
    assert [room.tenure.holds(100.0 + after_s) for after_s in (19.0, 21.0)] == [True, False]


async def test_the_last_pod_of_a_deployment_goes(api: ApiServer):
    room = Room(api)
    await room.turn(Stop("ts-prefill-1-a"))
    assert room.replicas() == {"ts-prefill": 0, "ts-decode": 2}


async def test_who_ends_lets_go_of_the_lease_so_that_a_successor_begins_at_once(api: ApiServer):
    clock = Clock()
    first, second = Room(api, "a", clock), Room(api, "b", clock)
    await first.turn()
    await second.turn()
    assert second.plan.made == 0
    await first.scaler.close(60.0)
    assert not first.tenure.holds(clock.now)
    clock.now += 2.0
    await second.turn(Start((Role.DECODE,)))
    assert second.replicas()["ts-decode"] == 3


async def test_who_ends_does_not_wait_for_an_api_server_that_does_not_answer(
    api: ApiServer, caplog: pytest.LogCaptureFixture
):
    room, answers = Room(api), threading.Event()
    await room.turn()

    def silent() -> Any:
        answers.wait(60)
        return None, ()

    room.scaler._leases.read = silent  # type: ignore[method-assign]
    await room.scaler.close(0.01)
    answers.set()
    assert "the Lease is not let go" in caplog.text


async def test_while_the_api_server_is_away_nothing_happens_and_it_is_said_once(
    api: ApiServer, caplog: pytest.LogCaptureFixture
):
    room = Room(api)
    await room.turn()
    api.close()
    for _ in range(3):
        room.clock.now += 6.0
        await room.turn()
    room.clock.now += 6.0
    await room.turn(Start((Role.DECODE,)))
    assert not room.tenure.holds(room.clock.now)
    assert len([each for each in caplog.records if "the Lease cannot be kept" in each.message]) <= 2
    api.start()
    room.clock.now += 31.0
    await room.turn()
    assert room.plan.made == 2
    assert room.replicas()["ts-decode"] == 3


# ---------------------------------------------------------------- a DisaggregatedSet

SCALER = ("patch", "disaggregatedsetrolescalers/scale")
OF_SET = ("ts-0-1a2b3c4d-prefill-0", "ts-0-1a2b3c4d-decode-0", "ts-0-1a2b3c4d-decode-1")


@pytest.fixture
def set_api(api: ApiServer) -> ApiServer:
    for role, replicas in (("prefill", 1), ("decode", 2)):
        scaler = {"metadata": {"name": f"ts-{role}"}, "spec": {"replicas": replicas}, "status": {"replicas": replicas}}
        api.store.put("disaggregatedsetrolescalers", scaler)
    api.store.put("disaggregatedsets", {"metadata": {"name": "ts"}, "spec": {"roles": []}})
    statuses(api, decode=2)
    return api


def statuses(api: ApiServer, *, decode: int) -> None:
    """What the set says of its roles: `decode` of two pods have the present template."""
    roles = [
        {"name": "prefill", "replicas": 1, "updatedReplicas": 1},
        {"name": "decode", "replicas": 2, "updatedReplicas": decode},
    ]
    api.store.set_status("disaggregatedsets", "default", "ts", {"observedGeneration": 1, "roleStatuses": roles})


def of_role_scalers(api: ApiServer) -> dict[str, int]:
    found = api.store.all("disaggregatedsetrolescalers")
    return {each["metadata"]["name"]: each["spec"]["replicas"] for each in found}


async def test_roles_of_a_set_are_scaled_by_their_scalers_and_workers_go_from_the_last_ordinal_on(set_api: ApiServer):
    room = Room(set_api, workers=OF_SET, of_set="ts")
    await room.turn(Start((Role.DECODE, Role.PREFILL)))
    assert of_role_scalers(set_api) == {"ts-prefill": 2, "ts-decode": 3}
    assert set_api.calls[SCALER] == 2
    assert set_api.calls[SCALE] == 0
    await room.turn()
    seen, num_owned = room.plan.asked[-1]
    assert num_owned == 5
    assert {worker.name: worker.goes_after for worker in seen.workers} == {
        OF_SET[0]: "ts-0-1a2b3c4d-prefill-1",
        OF_SET[1]: OF_SET[2],
        OF_SET[2]: "ts-0-1a2b3c4d-decode-2",
    }
    await room.turn(Stop(OF_SET[2]))
    assert of_role_scalers(set_api) == {"ts-prefill": 2, "ts-decode": 2}
    await room.turn()
    assert room.plan.asked[-1][0].find(OF_SET[2]).goes_after == ""


async def test_a_change_of_a_scaler_that_crosses_anothers_is_made_upon_it(set_api: ApiServer):
    room = Room(set_api, workers=OF_SET, of_set="ts")
    await room.turn()
    scales = room.scaler._scales
    read = scales._api.get_namespaced_custom_object_scale  # type: ignore[attr-defined]

    theirs = [5]

    def raced(*given: Any, **named: Any) -> Any:
        answer = read(*given, **named)
        if theirs:
            other = set_api.store.get("disaggregatedsetrolescalers", "default", "ts-decode")
            assert other is not None
            other["spec"]["replicas"] = theirs.pop()
            set_api.store.put("disaggregatedsetrolescalers", other)
        return answer

    scales._api.get_namespaced_custom_object_scale = raced  # type: ignore[attr-defined]
    await room.turn(Start((Role.DECODE,)))
    assert of_role_scalers(set_api)["ts-decode"] == 6
    assert not room.plan.refusals


async def test_while_a_set_rolls_out_nothing_is_decided(set_api: ApiServer):
    statuses(set_api, decode=1)
    room = Room(set_api, workers=OF_SET, of_set="ts")
    report = await room.turn(Start((Role.DECODE,)))
    assert report.reason == "ts-decode: its pods roll out"
    statuses(set_api, decode=2)
    newer = set_api.store.get("disaggregatedsets", "default", "ts")
    assert newer is not None
    newer["spec"] = {"roles": [{}]}
    set_api.store.put("disaggregatedsets", newer)  # which its controller has not seen yet
    room.clock.now += 6.0
    assert "its pods roll out" in (await room.turn()).reason
    set_api.store.set_status("disaggregatedsets", "default", "ts", {"observedGeneration": 2})
    room.clock.now += 6.0
    await room.turn()
    assert of_role_scalers(set_api)["ts-decode"] == 3


async def test_it_is_live_as_long_as_its_loop_turns(api: ApiServer):
    room = Room(api)
    page = livez(room.scaler, room.clock, 121.0)
    await room.turn()
    room.clock.now += 120.0
    assert page("")[0] == 200
    room.clock.now += 2.0
    assert page("")[0] == 503
    api.close()  # whatever else does not work
    await room.turn()
    assert page("")[0] == 200
