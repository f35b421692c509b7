"""The chart's ways for workers to find routers: what pods are given for it, and what they are not."""

import json
from typing import Any

import pytest
import yaml
from support.deploy.charts import mode_arguments, of_kind, pod_specs, render
from support.deploy.kube.access import is_allowed, token_of
from support.deploy.kube.paths import Target
from support.deploy.kube.store import Store

from twostroke.cluster.config import load_config
from twostroke.cluster.discovery.endpoint_slices import EndpointSlices
from twostroke.cluster.discovery.names import Names
from twostroke.cluster.discovery.sources import source_of, sources_of_peers

SLICES = "--set=discovery.kind=endpointslices"
MODES = pytest.mark.parametrize("mode", ["deployments", "ray", "disaggregatedset"])
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def ours(manifests: list[dict]) -> list[dict]:
    """Containers of routers and workers."""
    every = [each for spec in pod_specs(manifests).values() for each in spec["containers"]]
    return [each for each in every if each["name"] in ("router", "worker")]


def flag(container: dict, name: str) -> str:
    return next(each.partition("=")[2] for each in container["args"] if each.startswith(f"--{name}="))


@MODES
def test_workers_find_routers_by_the_services_name_or_by_its_slices(mode: str):
    for arguments, name, kind in (
        ((), "ts-twostroke-routers:8002", Names),
        ((SLICES,), "k8s://ts-twostroke-routers.llm:8002", EndpointSlices),
    ):
        manifests = render(*mode_arguments(None, mode), *arguments)
        workers = [each for each in ours(manifests) if each["name"] == "worker"]
        assert len(workers) == 2
        assert {flag(each, "routers-at") for each in workers} == {name}
        assert type(source_of(name, "--routers-at")) is kind
        assert of_kind(manifests, "Service", name.removeprefix("k8s://").partition(":")[0].removesuffix(".llm"))


@MODES
def test_with_slices_routers_find_each_other_and_know_their_own_pod(mode: str, tmp_path):
    manifests = render(*mode_arguments(None, mode), SLICES)
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(manifests, "ConfigMap", "twostroke")[0]["data"]["config.yaml"])
    environment = {"TWOSTROKE__CLUSTER__KEY": "k" * 32, "TWOSTROKE__ROUTER__INSECURE": "true"}
    config = load_config(file, environment | {"TWOSTROKE__ROUTER__NAME": "ts-twostroke-router-5f7c9d8b66-x2x4z"})
    assert [source.name for source in sources_of_peers(config.router)] == ["k8s://ts-twostroke-routers.llm:8002"]
    router = next(each for each in ours(manifests) if each["name"] == "router")
    name = next(each for each in router["env"] if each["name"] == "TWOSTROKE__ROUTER__NAME")
    assert name["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert "peers_at" not in of_kind(render(), "ConfigMap", "twostroke")[0]["data"]["config.yaml"]


@MODES
def test_the_token_is_in_our_containers_alone_and_gives_the_slices_alone(mode: str):
    side = "--set=decode.extraContainers[0].name=side,decode.extraContainers[0].image=side"
    manifests = render(*mode_arguments(None, mode), SLICES, "--set=model.uri=hf://a/b", side)
    for name, spec in pod_specs(manifests).items():
        is_autoscaler = "headGroupSpec" in name and mode == "ray"
        assert spec.get("automountServiceAccountToken") is (None if is_autoscaler else False), name
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            mounted = [each["mountPath"] for each in container.get("volumeMounts", [])]
            assert (ACCOUNT in mounted) is (container["name"] in ("router", "worker")), (name, container["name"])
    store = Store()
    for kind, plural in (("Role", "roles"), ("RoleBinding", "rolebindings")):
        for each in of_kind(manifests, kind):
            store.put(plural, each | {"metadata": each["metadata"] | {"namespace": "llm"}})
    account = of_kind(manifests, "ServiceAccount")[0]["metadata"]["name"]

    def may(verb: str, plural: str, namespace: str = "llm") -> bool:
        bearer = f"Bearer {token_of('llm', account)}"
        return is_allowed(store, bearer, verb, Target(plural, namespace, "", ""))

    assert all(may(verb, "endpointslices") for verb in ("get", "list", "watch"))
    others = ("pods", "secrets", "configmaps", "services", "deployments")
    assert not any(may(verb, plural) for verb in ("get", "list", "watch") for plural in others)
    assert not any(may(verb, "endpointslices") for verb in ("create", "update", "patch", "delete"))
    assert not may("list", "endpointslices", "kube-system")


def test_by_default_no_pod_has_an_account_or_a_right():
    text = json.dumps(render())
    assert ACCOUNT not in text
    assert "RoleBinding" not in text


@MODES
def test_the_network_is_open_to_the_api_server_and_among_routers_where_it_is_needed(mode: str):
    def egress(manifests: list[dict], name: str) -> list[Any]:
        found = of_kind(manifests, "NetworkPolicy", f"-{name}")[0]["spec"]
        return [each["port"] for rule in found["egress"] for each in rule["ports"]]

    arguments = mode_arguments(None, mode)
    plain, slices = render(*arguments), render(*arguments, SLICES, "--set=networkPolicy.apiServer.ports={6443}")
    assert (egress(plain, "router"), egress(plain, "workers")) == ([8100], [8002, 8100])
    assert (egress(slices, "router"), egress(slices, "workers")) == ([8100, 8002, 6443], [8002, 8100, 6443])
    router = of_kind(slices, "NetworkPolicy", "-router")[0]["spec"]
    inside = next(rule for rule in router["ingress"] if rule["ports"] == [{"port": 8002}])
    components = yaml.safe_dump(inside["from"])
    assert "component: router" in components
    assert "decode" in components
