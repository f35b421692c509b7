"""The chart renders valid manifests: every preset in every mode, against published schemas."""

import jsonschema
import pytest
import yaml
from support.deploy.charts import CHART, CRDS, MODES, PRESETS, combinations, custom_schemas, refusal, render, run_helm

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

VERSIONS = ("1.31.0", "1.34.0", "1.37.0")
DRA_SINCE = "1.34.0"  # resource.k8s.io/v1
WITHOUT_SCHEMA = {"HTTPRoute"}  # neither kubernetes-validate nor ../shared has that of the Gateway API
CUSTOM_GROUPS = {
    *("ray.io", "disaggregatedset.x-k8s.io", "monitoring.coreos.com", "keda.sh", "inference.networking.k8s.io")
}
EVERYTHING = """
router: {autoscaling: {enabled: true}, tls: {enabled: true, secretName: public}}
prefill: {autoscaling: {kind: hpa}, extraEnv: [{name: A, value: b}], extraArgs: [--memory-bytes=1000000000]}
decode: {autoscaling: {kind: keda}}
combined: {create: true, replicas: 2}
discovery: {kind: endpointslices}
apiKeys: {secretName: keys}
model: {uri: pvc+hf://claim/owner/model, authSecretName: hub}
rdma: {enabled: true, networks: rail-0}
topology: {keys: [nvidia.com/gpu.clique, topology.kubernetes.io/zone]}
monitoring:
  podMonitor: {enabled: true, additionalLabels: {a: b}}
  serviceMonitor: {enabled: true}
  prometheusRule: {enabled: true}
  dashboards: {enabled: true}
keda: {authenticationRef: prometheus}
ingress: {enabled: true, hosts: [a.example], tls: [{hosts: [a.example], secretName: cert}]}
httpRoute: {enabled: true, parentRefs: [{name: gateway}], hostnames: [a.example]}
inferencePool: {create: true, endpointPickerRef: {name: picker}}
extraObjects: [{apiVersion: v1, kind: ConfigMap, metadata: {name: "{{ .Release.Name }}-more"}}]
"""


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("values") / "everything.yaml"
    file.write_text(EVERYTHING)
    return str(file)


def check(manifests: list[dict], version: str) -> set[str]:
    """Validate against all schemas; gives the kinds. Skips at the end if a custom resource's schema is not here."""
    custom, unchecked = custom_schemas(), set()
    for manifest in manifests:
        key = (manifest["apiVersion"], manifest["kind"])
        if key in custom:
            for error in jsonschema.Draft202012Validator(custom[key]).iter_errors(manifest):
                pytest.fail(f"{key[1]} {error.json_path}: {error.message[-300:]}")
        elif key[0].partition("/")[0] in CUSTOM_GROUPS and not custom:
            unchecked.add(manifest["kind"])
        elif key[1] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(manifest, version, strict=True)  # a missing schema raises
    if unchecked:
        pytest.skip(f"no schema of {', '.join(sorted(unchecked))}: {CRDS} is not here; all else is valid")
    return {manifest["kind"] for manifest in manifests}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arguments", combinations())
def test_every_preset_is_valid_in_every_mode(arguments: list[str], version: str):
    if "dra.yaml" in "".join(arguments) and version < DRA_SINCE:
        pytest.skip("dynamic resource allocation is v1 since Kubernetes 1.34")
    kinds = check(render(*arguments, version=version), version)
    assert {"Service", "Deployment", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget"} <= kinds


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_everything_at_once_is_valid(everything: str, mode: str, version: str):
    arguments = ["--values", everything, f"--set=mode={mode}"]
    if mode == "ray":
        arguments += ["--set=prefill.autoscaling.kind=none", "--set=decode.autoscaling.kind=none"]
    kinds = check(render(*arguments, version=version), version)
    assert {"PodMonitor", "ServiceMonitor", "PrometheusRule", "Ingress", "HTTPRoute", "InferencePool"} <= kinds
    assert {"ray": "RayCluster", "disaggregatedset": "DisaggregatedSet"}.get(mode, "Deployment") in kinds


@pytest.mark.parametrize("mode", ["deployments", "disaggregatedset"])
def test_the_planner_and_scrapes_with_tls_are_valid(mode: str):
    given = ["planner.enabled=true", "tls.enabled=true", "monitoring.podMonitor.enabled=true"]
    kinds = check(render(*(f"--set={each}" for each in (f"mode={mode}", *given))), VERSIONS[1])
    assert {"Role", "RoleBinding", "PodMonitor"} <= kinds


def test_a_missing_schema_and_an_unknown_field_are_failures():
    with pytest.raises(kubernetes_validate.utils.SchemaNotFoundError):
        check([{"apiVersion": "v1", "kind": "Nonsense", "metadata": {"name": "a"}}], VERSIONS[0])
    with pytest.raises(kubernetes_validate.ValidationError):
        check([{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "dato": {}}], VERSIONS[0])
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {"name": "a"}}
    if not custom_schemas():
        return
    with pytest.raises(pytest.fail.Exception, match="podMetricEndpoints"):
        check([monitor | {"spec": {"selector": {}, "podMetricEndpoints": []}}], VERSIONS[0])


@pytest.mark.parametrize("preset", [None, *PRESETS], ids=lambda preset: preset.stem if preset else "defaults")
def test_lint_finds_nothing(preset):
    done = run_helm("lint", "--strict", str(CHART), *(["--values", str(preset)] if preset else []))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("prefil: {}", "prefil"),
        ("prefill: {replica: 3}", "replica"),
        ("clusterKey: {value: 0123456789abcdef}", "value"),
        ("config: {router: {api_keys: [0123456789abcdef]}}", "api_keys"),
        ("config: {cluster: {key: 0123456789abcdef}}", "cluster"),
        ("config: {cache: {block_size: 24}}", "block_size"),
        ("model: {uri: s3://bucket/model}", "uri"),
        ("accelerator: {type: tpu}", "accelerator.type"),
        ("prefill: {parallelism: {tensor: 0}}", "tensor"),
        (
            "{accelerator: {type: nvidia}, gpuResource: nvidia.com/mig-1g.10gb, prefill: {parallelism: {tensor: 2}}, "
            "decode: {parallelism: {tensor: 2}}}",
            "MIG",
        ),
        (
            "{accelerator: {type: nvidia}, prefill: {parallelism: {tensor: 2}}, decode: {parallelism: {tensor: 2}}}",
            "GPUs have one tensor-parallel rank in this release",
        ),
        (
            "{accelerator: {type: amd}, prefill: {create: false}, decode: {create: false}, "
            "combined: {create: true, parallelism: {tensor: 4}}}",
            "combined.parallelism.tensor is 4 with accelerator.type amd",
        ),
        ("{decode: {parallelism: {tensor: 2}}}", "with model.deterministic only equal ones hand over"),
        (
            "{config: {speculation: {method: ngram}}, prefill: {create: false}, decode: {create: false}, "
            "combined: {create: true, parallelism: {tensor: 2}}}",
            "speculation is served on one rank",
        ),
        (
            "{config: {model: {enable_lora: true}}, prefill: {parallelism: {tensor: 2}}, "
            "decode: {parallelism: {tensor: 2}}}",
            "served on one rank",
        ),
        ("{decode: {create: false}}", "no worker would decode"),
        ("{mode: disaggregatedset, prefill: {create: false}}", "two roles"),
        ("{mode: ray, decode: {autoscaling: {kind: hpa}}}", "enableInTreeAutoscaling"),
        ("{drainTimeoutSeconds: 90, decode: {terminationGracePeriodSeconds: 60}}", "drainTimeoutSeconds"),
        ("{inferencePool: {create: true}}", "endpointPickerRef.name"),
    ],
)
def test_a_mistake_in_values_is_refused_by_name(tmp_path, values: str, words: str):
    file = tmp_path / "values.yaml"
    file.write_text(values)
    assert yaml.safe_load(values)
    assert words in refusal("--values", str(file))
