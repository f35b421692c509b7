"""The chart's planner: a pod of its own that may scale two Deployments, and nothing else."""

from collections.abc import Callable

import click
import pytest
import typer
from support.deploy.charts import mode_arguments, of_kind, pod_specs, refusal, render
from support.deploy.kube.access import is_allowed, token_of
from support.deploy.kube.paths import Target
from support.deploy.kube.store import Store

from twostroke.cli.main import app
from twostroke.cluster.config import load_config

PLANNER = "--set=planner.enabled=true"
SET = [*mode_arguments(None, "disaggregatedset"), PLANNER]
COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def planner_of(manifests: list[dict]) -> dict:
    return pod_specs(of_kind(manifests, "Deployment", "-planner"))["Deployment/ts-twostroke-planner/template/spec"]


def test_without_it_there_is_nothing_of_it():
    assert "planner" not in {each["metadata"]["name"].rpartition("-")[2] for each in render()}
    for role in ("prefill", "decode"):
        assert of_kind(render(), "Deployment", f"-{role}")[0]["spec"]["replicas"] == 1


def test_its_command_and_settings_exist_and_it_alone_owns_the_numbers_of_pods(tmp_path):
    manifests = render(PLANNER, "--set=config.planner.max_workers=6,decode.replicas=3")
    spec = planner_of(manifests)
    (container,) = spec["containers"]
    program, command, *args = container["args"]
    assert program == "twostroke"
    context = COMMANDS[command].make_context(command, args)
    assert context.params["prefill_deployment"] == "ts-twostroke-prefill"
    assert context.params["decode_deployment"] == "ts-twostroke-decode"
    assert context.params["routers_at"] == ["ts-twostroke-routers:8002"]
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(manifests, "ConfigMap", "twostroke")[0]["data"]["config.yaml"])
    settings = {each["name"]: each["value"] for each in container["env"] if each["name"].startswith("TWOSTROKE__R")}
    config = load_config(file, settings | {"TWOSTROKE__CLUSTER__KEY": "k" * 32})
    assert config.planner.max_workers == 6
    for role in ("prefill", "decode"):
        assert "replicas" not in of_kind(manifests, "Deployment", f"-{role}")[0]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {each["name"] for each in container["volumeMounts"]} <= {each["name"] for each in spec["volumes"]}


def rights_of(manifests: list[dict]) -> Callable[..., bool]:
    """Whether an account may do something; the planner's, if none is named."""
    store = Store()
    for kind, plural in (("Role", "roles"), ("RoleBinding", "rolebindings")):
        for each in of_kind(manifests, kind):
            store.put(plural, each | {"metadata": each["metadata"] | {"namespace": "llm"}})
    account = planner_of(manifests)["serviceAccountName"]

    def may(verb: str, plural: str, name: str, subresource: str = "", who: str = account) -> bool:
        return is_allowed(store, f"Bearer {token_of('llm', who)}", verb, Target(plural, "llm", name, subresource))

    assert all(may(verb, "leases", "ts-twostroke-planner") for verb in ("get", "patch", "create"))
    assert not may("patch", "leases", "another")
    assert not any(may(verb, plural, "x") for verb in ("get", "patch", "delete") for plural in ("pods", "secrets"))
    others = {spec.get("serviceAccountName") for name, spec in pod_specs(manifests).items() if "planner" not in name}
    assert account not in others
    return may


def test_its_account_may_scale_the_two_deployments_and_keep_its_lease_and_no_other_account_may():
    may = rights_of(render(PLANNER))
    for role in ("prefill", "decode"):
        name = f"ts-twostroke-{role}"
        assert may("get", "deployments", name)
        assert may("get", "deployments", name, "scale")
        assert may("patch", "deployments", name, "scale")
        assert not may("patch", "deployments", name), "it would choose what runs there"
        assert not may("patch", "deployments", name, "scale", "ts-twostroke")
        assert not may("get", "disaggregatedsetrolescalers", name, "scale")
    assert not may("patch", "deployments", "ts-twostroke-router", "scale")
    assert not may("patch", "deployments", "another", "scale")


def test_of_a_disaggregated_set_its_account_may_scale_the_two_roles_and_read_the_set():
    may = rights_of(render(*SET))
    for role in ("prefill", "decode"):
        name = f"ts-twostroke-{role}"
        assert may("get", "disaggregatedsetrolescalers", name, "scale")
        assert may("patch", "disaggregatedsetrolescalers", name, "scale")
        assert not may("patch", "disaggregatedsetrolescalers", name)
        assert not may("patch", "disaggregatedsetrolescalers", name, "scale", "ts-twostroke")
        assert not may("patch", "deployments", name, "scale")
    assert may("get", "disaggregatedsets", "ts-twostroke")
    assert not may("patch", "disaggregatedsets", "ts-twostroke"), "it would choose what runs there"
    assert not may("get", "disaggregatedsets", "another")
    assert not may("patch", "disaggregatedsetrolescalers", "another", "scale")


def test_roles_of_a_disaggregated_set_are_scaled_by_it_alone():
    manifests = render(*SET)
    (found,) = of_kind(manifests, "DisaggregatedSet")
    for role in found["spec"]["roles"]:
        assert role["scaling"] == {"mode": "External"}
        assert "replicas" not in role["spec"]
    assert found["spec"]["slices"] == 1
    _, command, *args = planner_of(manifests)["containers"][0]["args"]
    params = COMMANDS[command].make_context(command, args).params
    assert params["disaggregated_set"] == "ts-twostroke"
    assert params["prefill_deployment"] is params["decode_deployment"] is None


def test_it_is_live_as_long_as_its_loop_turns():
    (container,) = planner_of(render(PLANNER))["containers"]
    probe = container["livenessProbe"]["httpGet"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert (probe["path"], ports[probe["port"]]) == ("/livez", 8101)
    params = COMMANDS["planner"].make_context("planner", container["args"][2:]).params
    assert (params["host"], params["health_port"]) == ("$(POD_IP)", 8101)


@pytest.mark.parametrize("kind", ["dns", "endpointslices"])
def test_it_reaches_routers_workers_and_the_api_server(kind: str):
    manifests = render(PLANNER, f"--set=discovery.kind={kind}")
    policies = {
        each["metadata"]["name"].rpartition("-")[2]: each["spec"] for each in of_kind(manifests, "NetworkPolicy")
    }
    out = [port["port"] for rule in policies["planner"]["egress"] for port in rule["ports"]]
    assert out == [8002, 8100, 443, 6443]
    me = policies["planner"]["podSelector"]
    for name, port in (("router", 8002), ("workers", 8100)):
        rule = next(each for each in policies[name]["ingress"] if each["ports"] == [{"port": port}])
        assert {"podSelector": me} in rule["from"]


def test_with_certificates_it_has_an_operators():
    manifests = render(PLANNER, "--set=tls.enabled=true", "--set=tls.certManager.issuerRef.name=ours")
    made = {each["spec"]["secretName"]: each["spec"] for each in of_kind(manifests, "Certificate")}
    (volume,) = [each for each in planner_of(manifests)["volumes"] if each["name"] == "tls"]
    assert made[volume["secret"]["secretName"]]["uris"] == ["spiffe://twostroke/ts-twostroke/operator"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (mode_arguments(None, "ray"), "mode ray"),
        ([*mode_arguments(None, "disaggregatedset"), "--set=decode.autoscaling.kind=hpa"], "autoscaling.kind is hpa"),
        (["--set=decode.autoscaling.kind=hpa"], "decode.autoscaling.kind is hpa"),
        (["--set=prefill.create=false,combined.create=true"], "prefill.create"),
        (["--set=decode.parallelism.tensor=2"], "parallelism.tensor"),
        (["--set=config.planner.enabled=true"], "enabled"),
    ],
)
def test_what_it_cannot_plan_is_refused_by_name(arguments: list[str], words: str):
    assert words in refusal(PLANNER, *arguments)
