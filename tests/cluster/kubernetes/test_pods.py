"""Names of pods: whose they are, and which can go."""

from twostroke.cluster.kubernetes.pods import DeploymentPods, SetPods
from twostroke.core.request import Role


def test_a_pod_belongs_to_the_deployment_that_made_it_whatever_it_does_now():
    pods = DeploymentPods({Role.PREFILL: "ts-prefill", Role.DECODE: "ts-decode"})
    assert pods.owner_of("ts-decode-5f7c9-x2x4z") is Role.DECODE
    assert pods.owner_of("ts-prefill-5f7c9-x2x4z") is Role.PREFILL
    assert pods.owner_of("other-decode-5f7c9-x2x4z") is None
    longer = DeploymentPods({Role.PREFILL: "ts", Role.DECODE: "ts-decode"})
    assert longer.owner_of("ts-decode-5f7c9-x2x4z") is Role.DECODE
    assert pods.order(["ts-decode-5f7c9-x2x4z"], {Role.DECODE: 4}) == {}


def test_a_pod_of_a_set_belongs_to_the_role_in_its_name():
    pods = SetPods("ts-decode")  # whatever the set is called
    assert pods.names == {Role.PREFILL: "ts-decode-prefill", Role.DECODE: "ts-decode-decode"}
    assert pods.owner_of("ts-decode-0-1a2b3c4d-prefill-0") is Role.PREFILL
    assert pods.owner_of("ts-decode-0-1a2b3c4d-decode-11") is Role.DECODE
    for stranger in ("ts-decode-0-1a2b3c4d-combined-0", "ts-0-1a2b3c4d-decode-0", "ts-decode-0-1a2b3c4d-decode-0-x"):
        assert pods.owner_of(stranger) is None


def test_pods_of_a_set_go_from_the_highest_ordinal_on_that_there_shall_be_known_or_not():
    pods = SetPods("ts")
    named = [f"ts-0-1a2b3c4d-decode-{n}" for n in (0, 1, 9, 10)]
    order = pods.order([*named, "ts-0-1a2b3c4d-prefill-0", "another"], {Role.PREFILL: 1, Role.DECODE: 11})
    assert order == {
        named[0]: named[1],
        named[1]: "ts-0-1a2b3c4d-decode-2",
        named[2]: named[3],
    }
    assert pods.order(named, {Role.DECODE: 10}) == {named[0]: named[1], named[1]: "ts-0-1a2b3c4d-decode-2"}
