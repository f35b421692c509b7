"""Model of the chart's values, and generator of `twostroke/values.schema.json`.

    python deploy/helm/schema.py           writes the schema
    python deploy/helm/schema.py --check   exits with 1 if the written schema differs

The sections below `config` are the program's own (`cluster/config.py`), without what the chart decides and without
secrets, so that a key cannot be written into values. `values.yaml` has the same defaults; a test compares them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from twostroke.checkpoint.config import ModelConfig
from twostroke.cluster.planner.config import PlannerConfig
from twostroke.engine.config import SpeculationConfig, StepConfig
from twostroke.kv.config import CacheConfig
from twostroke.router.config import RouterConfig

FILE = Path(__file__).resolve().parent / "twostroke/values.schema.json"

Object = dict[str, Any]
Labels = dict[str, str]
Quantity = Annotated[str, StringConstraints(pattern=r"^([0-9]+(\.[0-9]+)?([kMGTPE]i?|m)?)?$")]
Duration = Annotated[str, StringConstraints(pattern=r"^[0-9]+(ms|s|m|h)$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Uri = Annotated[
    str,
    StringConstraints(
        pattern=r"^(bundled|hf://[\w.-]+/[\w.-]+|pvc://[a-z0-9.-]+(/[\w./-]*)?"
        r"|pvc\+hf://[a-z0-9.-]+/[\w.-]+/[\w.-]+|host:///[\w./-]+)$"
    ),
]


class Values(BaseModel):
    """Base of all groups of values: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def _config_section(section: type[BaseModel], *, without: set[str]) -> type[BaseModel]:
    """A section of the program's configuration in which every key may be left out; `without` is not offered."""
    fields: dict[str, Any] = {
        name: (
            Annotated[(field.annotation, Field(), *field.metadata)] | None,
            Field(None, description=field.description),
        )
        for name, field in section.model_fields.items()
        if name not in without
    }
    return create_model(f"Config{section.__name__.removesuffix('Config')}", __base__=Values, **fields)


class Settings(Values):
    """The program's configuration: only keys that differ from its defaults."""

    model: _config_section(ModelConfig, without={"path", "name", "device"}) = Field(default_factory=dict)  # type: ignore[valid-type]
    cache: _config_section(CacheConfig, without=set()) = Field(default_factory=dict)  # type: ignore[valid-type]
    step: _config_section(StepConfig, without=set()) = Field(default_factory=dict)  # type: ignore[valid-type]
    speculation: _config_section(SpeculationConfig, without=set()) = Field(default_factory=dict)  # type: ignore[valid-type]
    router: _config_section(  # type: ignore[valid-type]
        RouterConfig,
        without={
            *("host", "port", "grpc_port", "internal_host", "internal_port", "insecure", "api_keys"),
            *("name", "shared_ports", "peers_at", "operator_key", "ssl_certfile", "ssl_keyfile"),
        },
    ) = Field(default_factory=dict)
    planner: _config_section(PlannerConfig, without={"enabled", "new_nodes"}) = Field(default_factory=dict)  # type: ignore[valid-type]


class Image(Values):
    repository: str = "twostroke"
    tag: str = ""
    digest: str = ""
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pullSecrets: list[Labels] = []


class ClusterKey(Values):
    secretName: str = ""
    secretKey: str = "key"


class CertManager(Values):
    issuerRef: Labels = {}
    duration: Duration = "2160h"
    renewBefore: Duration = "720h"


class Tls(Values):
    enabled: bool = False
    routerSecretName: str = ""
    workerSecretName: str = ""
    operatorSecretName: str = ""
    certManager: CertManager = CertManager()


class ApiKeys(Values):
    secretName: str = ""
    secretKey: str = "keys"
    singleSecretKey: str = "key"


class Model(Values):
    name: str = ""
    uri: Uri = "bundled"
    revision: str = ""
    size: Quantity = "50Gi"
    authSecretName: str = ""
    authSecretKey: str = "HF_TOKEN"
    mountPath: str = "/models"


class Accelerator(Values):
    type: Literal["cpu", "nvidia", "amd"] = "cpu"
    resources: Labels = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}


class ClaimTemplate(Values):
    name: str
    deviceClassName: str = "gpu.nvidia.com"
    count: int | None = Field(None, ge=1)
    selectors: list[Object] = []


class Dra(Values):
    claimTemplates: list[ClaimTemplate] = []


class Rdma(Values):
    enabled: bool = False
    resource: str = "rdma/ib"
    networks: str = ""
    capabilities: list[str] = ["IPC_LOCK"]
    env: Labels = {}


class Topology(Values):
    keys: list[str] = []


class Parallelism(Values):
    tensor: int = Field(1, ge=1, le=64)


class Disruption(Values):
    enabled: bool = True
    maxUnavailable: int | str = 1


class Probes(Values):
    startupSeconds: int = Field(1800, ge=10)
    periodSeconds: int = Field(5, ge=1)
    failureThreshold: int = Field(3, ge=1)


class Pods(Values):
    """What every kind of pod can be given."""

    resources: Object = {}
    nodeSelector: Labels = {}
    tolerations: list[Object] = []
    affinity: Object = {}
    topologySpreadConstraints: list[Object] = []
    priorityClassName: str = ""
    schedulerName: str = ""
    runtimeClassName: str = ""
    podAnnotations: Labels = {}
    podLabels: Labels = {}
    initContainers: list[Object] = []
    extraContainers: list[Object] = []
    extraArgs: list[str] = []
    extraEnv: list[Object] = []
    extraVolumes: list[Object] = []
    extraVolumeMounts: list[Object] = []
    pdb: Disruption = Disruption()


class RoleAutoscaling(Values):
    kind: Literal["none", "hpa", "keda"] = "none"
    minReplicas: int = Field(1, ge=1)
    maxReplicas: int = Field(4, ge=1)
    target: Quantity
    scaleUpSeconds: int = Field(0, ge=0, le=3600)
    scaleDownSeconds: int = Field(600, ge=0, le=3600)


class Role(Pods):
    create: bool = True
    replicas: int = Field(1, ge=0)
    parallelism: Parallelism = Parallelism()
    probes: Probes = Probes()
    terminationGracePeriodSeconds: int | None = Field(None, ge=1)
    autoscaling: RoleAutoscaling


class Service(Values):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    annotations: Labels = {}
    httpPort: Port = 8000
    grpcPort: Port = 8001


class RouterAutoscaling(Values):
    enabled: bool = False
    minReplicas: int = Field(1, ge=1)
    maxReplicas: int = Field(4, ge=1)
    cpuPercent: int = Field(70, ge=1, le=100)


class PublicTls(Values):
    enabled: bool = False
    secretName: str = ""
    issuerRef: Labels = {}
    dnsNames: list[str] = []


class Router(Pods):
    replicas: int = Field(1, ge=1)
    bindAddress: str = "0.0.0.0"
    service: Service = Service()
    tls: PublicTls = PublicTls()
    endpointSeconds: int = Field(5, ge=0, le=60)
    probes: Probes = Probes(startupSeconds=120)
    autoscaling: RouterAutoscaling = RouterAutoscaling()


class Ports(Values):
    internal: Port = 8002
    worker: Port = 8100
    metrics: Port = 8101


class Ray(Values):
    version: str = "2.60.0"
    enableInTreeAutoscaling: bool = False
    auth: bool = True
    headResources: Object = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    nodeResources: Object = {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}


class Placement(Values):
    type: Literal["None", "ExclusiveSlice", "ExclusiveTopology"] = "None"
    topology: str = ""


class DisaggregatedSet(Values):
    maxSurge: int | str = 1
    maxUnavailable: int | str = 0
    placementPolicy: Placement = Placement()


class Keda(Values):
    serverAddress: str = "http://prometheus-operated.monitoring.svc:9090"
    pollingInterval: int = Field(15, ge=1)
    authenticationRef: str = ""


class Monitor(Values):
    enabled: bool = False
    interval: Duration = "15s"
    scrapeTimeout: Duration = "10s"
    additionalLabels: Labels = {}
    relabelings: list[Object] = []
    metricRelabelings: list[Object] = []


class Rules(Values):
    enabled: bool = False
    additionalLabels: Labels = {}
    ttftSeconds: float = Field(2.0, gt=0)
    kvUsage: float = Field(0.95, gt=0, le=1)


class Dashboards(Values):
    enabled: bool = False
    labels: Labels = {"grafana_dashboard": "1"}


class Monitoring(Values):
    podMonitor: Monitor = Monitor()
    serviceMonitor: Monitor = Monitor()
    prometheusRule: Rules = Rules()
    dashboards: Dashboards = Dashboards()


class ApiServer(Values):
    to: list[Object] = [{"ipBlock": {"cidr": "0.0.0.0/0"}}]
    ports: list[Port] = [443, 6443]


class NetworkPolicy(Values):
    enabled: bool = True
    clients: list[Object] = [{"podSelector": {}}]
    scrapers: list[Object] = [{"namespaceSelector": {}}]
    hub: list[Object] = [{"ipBlock": {"cidr": "0.0.0.0/0"}}]
    apiServer: ApiServer = ApiServer()


class ServiceAccount(Values):
    create: bool = True
    name: str = ""
    annotations: Labels = {}


class Ingress(Values):
    enabled: bool = False
    className: str = ""
    annotations: Labels = {}
    hosts: list[str] = []
    tls: list[Object] = []


class HttpRoute(Values):
    enabled: bool = False
    parentRefs: list[Object] = []
    hostnames: list[str] = []


class EndpointPicker(Values):
    name: str = ""
    port: Port = 9002
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"


class InferencePool(Values):
    create: bool = False
    endpointPickerRef: EndpointPicker = EndpointPicker()


class Security(Values):
    runAsUser: int = Field(10001, ge=1)
    fsGroup: int = Field(10001, ge=1)


class Tests(Values):
    enabled: bool = True


class Planner(Values):
    enabled: bool = False
    resources: Object = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}}
    nodeSelector: Labels = {}
    tolerations: list[Object] = []
    affinity: Object = {}
    priorityClassName: str = ""
    podAnnotations: Labels = {}
    podLabels: Labels = {}


class Discovery(Values):
    kind: Literal["dns", "endpointslices"] = "dns"


class Chart(Values):
    """Values of the chart `twostroke`."""

    nameOverride: str = ""
    fullnameOverride: str = ""
    mode: Literal["deployments", "ray", "disaggregatedset"] = "deployments"
    image: Image = Image()
    clusterKey: ClusterKey = ClusterKey()
    tls: Tls = Tls()
    apiKeys: ApiKeys = ApiKeys()
    model: Model = Model()
    config: Settings = Settings()
    discovery: Discovery = Discovery()
    drainTimeoutSeconds: int = Field(30, ge=0, le=3600)
    accelerator: Accelerator = Accelerator()
    gpuResource: str = ""
    dra: Dra = Dra()
    rdma: Rdma = Rdma()
    shmSize: Quantity = ""
    topology: Topology = Topology()
    ports: Ports = Ports()
    router: Router = Router(resources={"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}})
    prefill: Role = Role(
        resources={"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        autoscaling=RoleAutoscaling(target="8192"),
    )
    decode: Role = Role(
        resources={"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        autoscaling=RoleAutoscaling(target="700m"),
    )
    combined: Role = Role(
        create=False,
        resources={"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        autoscaling=RoleAutoscaling(target="700m"),
    )
    ray: Ray = Ray()
    planner: Planner = Planner()
    disaggregatedSet: DisaggregatedSet = DisaggregatedSet()
    keda: Keda = Keda()
    monitoring: Monitoring = Monitoring()
    networkPolicy: NetworkPolicy = NetworkPolicy()
    serviceAccount: ServiceAccount = ServiceAccount()
    securityContext: Security = Security()
    ingress: Ingress = Ingress()
    httpRoute: HttpRoute = HttpRoute()
    inferencePool: InferencePool = InferencePool()
    extraObjects: list[Object] = []
    tests: Tests = Tests()
    global_: Object = Field({}, alias="global", description="Helm's own; unused")


def _without_noise(node: Any) -> Any:
    """The schema without the titles that pydantic makes of names, and without defaults of whole groups."""
    if isinstance(node, list):
        return [_without_noise(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        name: _without_noise(value)
        for name, value in node.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and isinstance(value, dict))
    }


def schema_text() -> str:
    """The schema as JSON, in the draft that Helm's validator reads."""
    schema = _without_noise(Chart.model_json_schema(by_alias=True))
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#"} | schema, indent=1) + "\n"


def main() -> int:
    """Write the schema, or compare it; returns the exit code."""
    if "--check" not in sys.argv[1:]:
        FILE.write_text(schema_text())
        return 0
    if FILE.exists() and FILE.read_text() == schema_text():
        return 0
    print(f"{FILE.name} differs from the model of the values; run python deploy/helm/schema.py")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
