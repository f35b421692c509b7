"""Meaning of the chart's manifests: commands that exist, secrets by reference, probes, grace, ports, GPUs."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from support.checkpoints.models import family_directory
from support.deploy.charts import CHART, ROOT, combinations, mode_arguments, of_kind, pod_specs, render, run_helm
from support.deploy.promql import scrape, unanswered
from support.engines.workers import start_worker, tiny_checkpoint
from typer.testing import CliRunner

from twostroke.checkpoint.config import ModelConfig
from twostroke.cli.main import app
from twostroke.cluster.config import load_config
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.engine.config import SpeculationConfig
from twostroke.model.resolved import DeviceKind, resolve
from twostroke.router.metrics import RouterMetrics
from twostroke.worker import main as worker_main
from twostroke.worker.build import refuse_settings
from twostroke.worker.settings import WorkerSettings

__all__ = ["family_directory", "start_worker", "tiny_checkpoint"]

COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ALL = pytest.mark.parametrize("arguments", combinations())
GPUS = ("--set=accelerator.type=nvidia", "--set=model.uri=pvc://models/m")


def containers(spec: dict) -> list[dict]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def worker_of(manifests: list[dict], role: str) -> dict:
    """The worker's container of a role, whatever the mode."""
    for spec in pod_specs(manifests).values():
        for container in spec["containers"]:
            if container["name"] == "worker" and f"--role={role}" in container["args"]:
                return container
    raise AssertionError(f"no worker with the role {role}")


# ---------------------------------------------------------------- values


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"deploy/helm/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_schema_and_the_documented_values_are_those_of_the_model():
    schema = script("schema")
    assert schema.FILE.read_text() == schema.schema_text(), "run make chart"
    written = yaml.safe_load((CHART / "values.yaml").read_text())
    assert written == schema.Chart().model_dump(by_alias=True, exclude_none=True) | {
        role: schema.Chart().model_dump(by_alias=True)[role] for role in ("prefill", "decode", "combined")
    }
    assert "key" not in json.loads(schema.schema_text())["$defs"]["Settings"]["properties"]


def test_the_rendered_manifests_are_those_of_the_chart():
    render()  # skips without helm
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy/helm/render.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- commands and configuration


@ALL
def test_every_command_and_setting_exists(arguments: list[str], tmp_path: Path):
    manifests = render(*arguments)
    ours = [each for spec in pod_specs(manifests).values() for each in spec["containers"] if "args" in each]
    assert len(ours) >= 2
    for container in ours:
        program, command, *args = container["args"]
        if program == "python":
            continue
        known = {name for option in COMMANDS[command].params for name in option.opts}
        if "--tensor-parallel-size" not in known:  # it is rendered above 1 only
            args = [each for each in args if not each.startswith("--tensor-parallel-size=")]
        COMMANDS[command].make_context(command, args)
        assert container.get("command") is None  # the image's entry point stays
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(manifests, "ConfigMap", "twostroke")[0]["data"]["config.yaml"])
    config = load_config(file, {"TWOSTROKE__CLUSTER__KEY": "k" * 32, "TWOSTROKE__ROUTER__INSECURE": "true"})
    assert config.router.internal_port == 8002
    assert config.cluster.drain_timeout_s == 30


@ALL
def test_a_worker_accepts_what_a_pod_gives_it(
    arguments: list[str],
    tmp_path: Path,
    family_directory: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
):
    """Arguments and settings of each worker's container pass its command and its own refusals, beside a small model."""
    started: list[WorkerSettings] = []
    monkeypatch.setattr(worker_main, "run_worker", lambda settings, *_: started.append(settings))
    manifests = render(*arguments)
    file = tmp_path / "config.yaml"
    file.write_text(of_kind(manifests, "ConfigMap", "twostroke")[0]["data"]["config.yaml"])
    model = family_directory("qwen3")
    environment = {"TWOSTROKE__CLUSTER__KEY": "k" * 32, "POD_NAME": "pod-1", "POD_IP": "127.0.0.1"}
    roles = [role for role in Role if any(f"--role={role}" in args for args in worker_arguments(manifests))]
    assert len(roles) in (1, 2)
    for role in roles:
        given = [each.replace("/etc/twostroke/config.yaml", str(file)) for each in worker_of(manifests, role)["args"]]
        given = [re.sub(r"^--model=.*", f"--model={model}", each) for each in given]
        given = [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], each) for each in given]
        done = CliRunner(env=environment).invoke(app, given[1:])
        assert done.exit_code == 0, f"{done.output} {done.exception}"
        settings = started.pop()
        kind: DeviceKind = "cpu" if settings.model.device == "cpu" else "cuda"
        refuse_settings(settings, kind)
        resolve(model, settings.model, settings.cache.dtype, kind)
        assert f"--role={settings.role}" in given


def worker_arguments(manifests: list[dict]) -> list[list[str]]:
    return [
        container["args"]
        for spec in pod_specs(manifests).values()
        for container in spec["containers"]
        if container["name"] == "worker"
    ]


def test_a_worker_refuses_what_its_device_has_not():
    """What the test above asks is a refusal: of the ranks on GPUs that the chart refuses too."""
    settings = WorkerSettings(
        worker_id="w", role=Role.DECODE, model_directory="m", model_name="m", num_ranks=2, cluster_key="k" * 16
    )
    refuse_settings(settings, "cpu")
    with pytest.raises(ConfigError, match="GPUs have one in this release"):
        refuse_settings(settings, "cuda")
    ngram = settings.model_copy(update={"speculation": SpeculationConfig(method="ngram")})
    with pytest.raises(ConfigError, match="served on one rank"):
        refuse_settings(ngram, "cpu")
    adapters = settings.model_copy(update={"model": ModelConfig(enable_lora=True)})
    with pytest.raises(ConfigError, match="served on one rank"):
        refuse_settings(adapters, "cpu")


def test_ray_itself_takes_the_arguments_of_its_nodes():
    program = [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"]
    known = set(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split())
    cluster = of_kind(render("--set=mode=ray"), "RayCluster")[0]["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 3
    for group in groups:
        assert {f"--{name}" for name in group["rayStartParams"]} <= known
    resources = [json.loads(group["rayStartParams"]["resources"].strip("'")) for group in groups[1:]]
    assert resources == [{"prefill": 1}, {"decode": 1}]


def test_settings_reach_the_configuration_and_roll_the_pods():
    before, after = render(), render("--set=config.cache.block_size=32,drainTimeoutSeconds=7")
    config = yaml.safe_load(of_kind(after, "ConfigMap", "twostroke")[0]["data"]["config.yaml"])
    assert config["cache"] == {"block_size": 32}
    assert config["cluster"] == {"drain_timeout_s": 7}
    for name in ("-router", "-prefill", "-decode"):
        sums = {
            of_kind(each, "Deployment", name)[0]["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for each in (before, after)
        }
        assert len(sums) == 2


@pytest.mark.parametrize(
    ("uri", "directory", "volume"),
    [
        ("bundled", None, None),
        ("hf://owner/model", "/models/owner/model/main", {"emptyDir": {"sizeLimit": "50Gi"}}),
        (
            "pvc+hf://claim/owner/model",
            "/models/owner/model/main",
            {"persistentVolumeClaim": {"claimName": "claim", "readOnly": False}},
        ),
        ("pvc://claim/a/b", "/models/a/b", {"persistentVolumeClaim": {"claimName": "claim", "readOnly": True}}),
        ("pvc://claim", "/models", {"persistentVolumeClaim": {"claimName": "claim", "readOnly": True}}),
        ("host:///srv/m", "/models", {"hostPath": {"path": "/srv/m", "type": "Directory"}}),
    ],
)
def test_a_model_is_where_its_uri_says(uri: str, directory: str | None, volume: dict | None):
    manifests = render(f"--set=model.uri={uri}", "--set=model.authSecretName=hub,model.name=served")
    for name, spec in pod_specs([each for each in manifests if each["kind"] == "Deployment"]).items():
        model = [each for each in spec["volumes"] if each["name"] == "model"]
        assert model == ([{"name": "model"} | volume] if volume else [])
        mounts = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "model"]
        assert mounts == ([{"name": "model", "mountPath": "/models", "readOnly": True}] if volume else [])
        downloads = [each for each in spec.get("initContainers", []) if each["name"] == "download"]
        assert len(downloads) == ("hf://" in uri)
        if downloads:
            assert downloads[0]["args"][:5] == [
                *("hf", "download", "owner/model"),
                *("--revision=main", f"--local-dir={directory}"),
            ]
            # A router needs the tokenizer alone.
            assert ("--include=*.safetensors" in downloads[0]["args"]) is ("-router" not in name)
            assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}} in downloads[
                0
            ]["env"]
    args = worker_of(manifests, "decode")["args"]
    assert [each for each in args if each.startswith("--model=")] == ([f"--model={directory}"] if directory else [])
    assert ("--served-model-name=served" in args) is bool(directory)


def test_the_hubs_own_program_takes_the_arguments_of_a_download():
    args = pod_specs(render("--set=model.uri=hf://a/b"))["Deployment/ts-twostroke-prefill/template/spec"][
        "initContainers"
    ][0]["args"]
    program = Path(sys.executable).with_name("hf")
    told = subprocess.run([program, "download", "--help"], capture_output=True, text=True, check=True)
    assert all(each.partition("=")[0] in told.stdout for each in args[3:]), told.stdout


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("mode", ["deployments", "ray", "disaggregatedset"])
def test_tensor_parallelism_sets_the_flag_and_the_shared_memory_together(mode: str):
    unlike = "--set=decode.parallelism.tensor=4,config.model.deterministic=false"
    manifests = render(unlike, *mode_arguments(None, mode))
    for role, tensor in (("prefill", 1), ("decode", 4)):
        container = worker_of(manifests, role)
        flags = [each for each in container["args"] if "tensor-parallel" in each]
        assert flags == ([f"--tensor-parallel-size={tensor}"] if tensor > 1 else [])
    shared = [
        volume["emptyDir"]["sizeLimit"]
        for spec in pod_specs(manifests).values()
        for volume in spec.get("volumes", [])
        if volume["name"] == "shm" and any(each["name"] == "worker" for each in spec["containers"])
    ]
    assert sorted(shared) == ["1Gi", "4Gi"]


def test_gpus_come_by_resource_slice_or_claim():
    assert worker_of(render(*GPUS, "--set=gpuResource=nvidia.com/mig-1g.10gb"), "decode")["resources"]["limits"] == {
        "memory": "4Gi",
        "nvidia.com/mig-1g.10gb": 1,
    }
    assert "amd.com/gpu" in worker_of(render("--set=accelerator.type=amd"), "decode")["resources"]["limits"]
    assert list(worker_of(render(), "decode")["resources"]["limits"]) == ["memory"]
    claimed = render(*GPUS, "--set=dra.claimTemplates[0].name=gpu")
    assert worker_of(claimed, "decode")["resources"]["claims"] == [{"name": "gpu"}]
    assert "nvidia.com/gpu" not in worker_of(claimed, "decode")["resources"]["limits"]
    counts = {
        claim["metadata"]["name"]: claim["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"]
        for claim in of_kind(claimed, "ResourceClaimTemplate")
    }
    assert counts == {"ts-twostroke-prefill-gpu": 1, "ts-twostroke-decode-gpu": 1}


def test_rdma_adds_a_device_and_a_capability_to_workers_alone():
    manifests = render("--set=rdma.enabled=true,rdma.networks=rail-0,rdma.env.NCCL_IB_HCA=mlx5")
    for name, spec in pod_specs(manifests).items():
        is_worker = spec["containers"][0]["name"] == "worker"
        capabilities = spec["containers"][0]["securityContext"]["capabilities"]
        assert capabilities == {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if is_worker else {}), name
        assert ("rdma/ib" in spec["containers"][0]["resources"]["limits"]) is is_worker
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in worker_of(manifests, "prefill")["env"]


# ---------------------------------------------------------------- security


@ALL
def test_no_pod_has_rights_and_every_secret_is_a_reference(arguments: list[str]):
    manifests = render(*arguments, "--set=apiKeys.secretName=clients")
    assert not [each for each in manifests if "Role" in each["kind"] and each["kind"] != "DisaggregatedSetRoleScaler"]
    assert not of_kind(manifests, "Secret")
    for name, spec in pod_specs(manifests).items():
        is_autoscaler = "headGroupSpec" in name and "enableInTreeAutoscaling=true" in "".join(arguments)
        assert spec.get("automountServiceAccountToken") is (None if is_autoscaler else False), name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        volumes = {each["name"] for each in spec.get("volumes", [])}
        for container in containers(spec):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert {each["name"] for each in container.get("volumeMounts", [])} <= volumes
            for each in container.get("env", []):
                if any(word in each["name"] for word in ("KEY", "TOKEN")):
                    assert list(each["valueFrom"]) == ["secretKeyRef"], each["name"]


@ALL
def test_declared_ports_are_open_to_whom_they_are_for_and_no_other_is(arguments: list[str]):
    manifests = render(*arguments)
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "NetworkPolicy")}
    assert policies["ts-twostroke-deny"].keys() == {"podSelector", "policyTypes"}
    assert policies["ts-twostroke-deny"]["policyTypes"] == ["Ingress", "Egress"]
    deny = policies["ts-twostroke-deny"]["podSelector"]["matchLabels"]
    declared: dict[str, set[int]] = {"router": set(), "workers": set()}
    for spec in pod_specs(manifests).values():
        for container in spec["containers"]:
            kind = {"router": "router", "worker": "workers"}.get(container["name"])
            if kind:
                declared[kind] |= {port["containerPort"] for port in container["ports"]}
    for kind, ports in declared.items():
        allowed = {port["port"] for rule in policies[f"ts-twostroke-{kind}"]["ingress"] for port in rule["ports"]}
        assert allowed == ports
    for name, policy in policies.items():
        selector = policy["podSelector"].get("matchLabels", {})
        assert deny.items() <= selector.items() or name == "ts-twostroke-ray"
    hub = [port["port"] for rule in policies["ts-twostroke-workers"]["egress"] for port in rule["ports"]]
    is_from_hub = any("download" in json.dumps(spec) for spec in pod_specs(manifests).values())
    assert (443 in hub) is is_from_hub


# ---------------------------------------------------------------- life


@ALL
def test_probes_ask_for_the_step_loop_and_for_a_worker_that_decodes(arguments: list[str]):
    for spec in pod_specs(render(*arguments)).values():
        for container in spec["containers"]:
            if container["name"] == "worker":
                asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
                assert asked == {
                    "startup": {"path": "/livez", "port": "metrics", "scheme": "HTTP"},
                    "liveness": {"path": "/livez", "port": "metrics", "scheme": "HTTP"},
                    "readiness": {"path": "/readyz", "port": "metrics", "scheme": "HTTP"},
                }
                start = container["startupProbe"]
                assert start["failureThreshold"] * start["periodSeconds"] >= 1800
            elif container["name"] == "router":
                assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http", "scheme": "HTTP"}
                assert container["livenessProbe"]["grpc"] == {"port": 8001}


def test_the_grace_covers_the_drain():
    manifests = render("--set=drainTimeoutSeconds=90,router.endpointSeconds=7")
    graces = {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for each in of_kind(manifests, "Deployment")
    }
    assert graces == {"ts-twostroke-router": 127, "ts-twostroke-prefill": 120, "ts-twostroke-decode": 120}
    router = pod_specs(of_kind(manifests, "Deployment", "-router"))
    hook = next(iter(router.values()))["containers"][0]["lifecycle"]["preStop"]
    assert hook == {"exec": {"command": ["sleep", "7"]}}
    own = render("--set=decode.terminationGracePeriodSeconds=300")
    assert of_kind(own, "Deployment", "-decode")[0]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 300


@ALL
def test_workers_carry_llm_ds_labels_and_every_budget_finds_its_pods(arguments: list[str]):
    manifests = render(*arguments)
    labels: list[dict[str, str]] = []

    def look(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("metadata"), dict) and "containers" in node.get("spec", {}):
                labels.append(node["metadata"].get("labels", {}))
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(manifests)
    roles = {each.get("llm-d.ai/role") for each in labels} - {None}
    assert roles in ({"prefill", "decode"}, {"both"})
    assert all(each["llm-d.ai/engine-type"] == "twostroke" for each in labels if "llm-d.ai/role" in each)
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert len(budgets) == len(roles) + 1
    for budget in budgets:
        assert any(budget["spec"]["selector"]["matchLabels"].items() <= each.items() for each in labels)


# ---------------------------------------------------------------- scale and measurements


@pytest.mark.parametrize(
    ("mode", "kind"), [("deployments", "Deployment"), ("disaggregatedset", "DisaggregatedSetRoleScaler")]
)
def test_prefill_scales_by_queued_tokens_and_decode_by_kv_use(mode: str, kind: str):
    manifests = render(f"--set=mode={mode},prefill.autoscaling.kind=keda,decode.autoscaling.kind=keda")
    for role, metric, threshold in (
        ("prefill", "twostroke_queued_prompt_tokens", "8192"),
        ("decode", "vllm:kv_cache_usage_perc", "0.7"),
    ):
        scaled = of_kind(manifests, "ScaledObject", f"-{role}")[0]["spec"]
        assert scaled["scaleTargetRef"]["kind"] == kind
        assert scaled["scaleTargetRef"]["name"] == f"ts-twostroke-{role}"
        trigger = scaled["triggers"][0]
        assert trigger["metadata"]["query"].startswith(f"sum({metric}{{")
        assert (trigger["metadata"]["threshold"], trigger["metricType"]) == (threshold, "AverageValue")
        assert scaled["minReplicaCount"] >= 1
    if mode == "deployments":  # two owners of a count would fight
        for role in ("prefill", "decode"):
            assert "replicas" not in of_kind(manifests, "Deployment", f"-{role}")[0]["spec"]
    else:
        roles = of_kind(manifests, "DisaggregatedSet")[0]["spec"]["roles"]
        assert [each["scaling"]["mode"] for each in roles] == ["External", "External"]


async def test_every_query_of_rules_and_scalers_finds_a_series(start_worker):
    manifests = render(
        "--set=monitoring.prometheusRule.enabled=true",
        "--set=prefill.autoscaling.kind=keda,decode.autoscaling.kind=keda",
    )
    rules = of_kind(manifests, "PrometheusRule")[0]["spec"]["groups"][0]["rules"]
    triggers = [each["spec"]["triggers"][0]["metadata"]["query"] for each in of_kind(manifests, "ScaledObject")]
    router = RouterMetrics()
    router.know_model("tiny")
    worker = await start_worker(Role.COMBINED)
    texts = (router.render("")[0], worker._metrics.render(worker.dispatcher.last_load, "")[0])
    series = [each for text in texts for each in scrape(text.decode())]
    assert len(rules) >= 5
    for query in [*(rule["expr"] for rule in rules), *triggers]:
        assert not unanswered(query, series), query
    assert unanswered("sum(twostroke_nothing)", series)


def test_monitors_send_a_key_where_metrics_want_one():
    both = ("--set=monitoring.podMonitor.enabled=true,monitoring.serviceMonitor.enabled=true",)
    for arguments, wanted in (
        (both, None),
        ((*both, "--set=apiKeys.secretName=clients"), {"credentials": {"name": "clients", "key": "key"}}),
    ):
        manifests = render(*arguments)
        ends = [each["spec"]["podMetricsEndpoints"][0] for each in of_kind(manifests, "PodMonitor")]
        ends += [each["spec"]["endpoints"][0] for each in of_kind(manifests, "ServiceMonitor")]
        assert [each["port"] for each in ends] == ["metrics", "metrics", "http"]
        assert all(each.get("authorization") == wanted for each in ends)


def test_dashboards_are_those_of_the_repository():
    data = of_kind(render("--set=monitoring.dashboards.enabled=true"), "ConfigMap", "-dashboards")[0]["data"]
    files = {file.name: json.loads(file.read_text()) for file in (ROOT / "deploy/dashboards").glob("*.json")}
    assert {name: json.loads(text) for name, text in data.items()} == files


def test_the_chart_can_be_packaged(tmp_path: Path):
    done = run_helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(["tar", "tzf", *tmp_path.glob("*.tgz")], capture_output=True, text=True, check=True).stdout
    assert "twostroke/dashboards/handover.json" in listed
    assert "twostroke/values.schema.json" in listed
