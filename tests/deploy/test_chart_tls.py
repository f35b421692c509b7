"""The chart's certificates: what cert-manager is asked for is what the processes accept."""

import yaml
from support.deploy.charts import MODES, mode_arguments, render

from twostroke.core.tls.callers import Caller, name_of, uri_of
from twostroke.core.tls.config import TlsConfig
from twostroke.router.config import RouterConfig

ISSUER = ["--set=tls.enabled=true", "--set=tls.certManager.issuerRef.name=ours"]
PUBLIC = ["--set=router.tls.enabled=true", "--set=router.tls.issuerRef.name=public"]
NAME = "ts-twostroke"
FACE = "/etc/twostroke-public-tls"


def pods(manifests):
    """Specs of the pods of routers and workers, by container."""
    text = [m for m in manifests if m["kind"] in ("Deployment", "RayCluster", "DisaggregatedSet")]
    found = []

    def look(value):
        if isinstance(value, dict):
            if "containers" in value:
                found.append(value)
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(text)
    return [(c, p) for p in found for c in p["containers"] if c["name"] in ("router", "worker")]


def test_cert_manager_makes_what_the_processes_accept():
    made = {m["spec"]["secretName"]: m["spec"] for m in render(*ISSUER) if m["kind"] == "Certificate"}
    for caller in (Caller.ROUTER, Caller.WORKER):
        spec = made[f"{NAME}-{caller}-tls"]
        assert spec["dnsNames"] == [name_of(NAME, caller)]
        assert spec["uris"] == [uri_of(NAME, caller)]
        assert set(spec["usages"]) == {"server auth", "client auth"}
        assert spec["issuerRef"] == {"name": "ours"}
    (config,) = [m for m in render(*ISSUER) if m["kind"] == "ConfigMap" and m["metadata"]["name"] == NAME]
    tls = TlsConfig(**yaml.safe_load(config["data"]["config.yaml"])["cluster"]["tls"])
    assert tls.deployment == NAME


def test_every_pod_has_its_roles_certificate_in_every_mode():
    for mode in MODES:
        found = pods(render(*mode_arguments(None, mode), *ISSUER))
        assert {container["name"] for container, _ in found} == {"router", "worker"}
        for container, pod in found:
            (volume,) = [each for each in pod["volumes"] if each["name"] == "tls"]
            assert volume["secret"]["secretName"] == f"{NAME}-{container['name']}-tls"
            assert volume["secret"]["defaultMode"] & 0o007 == 0
            assert [m for m in container["volumeMounts"] if m["mountPath"] == "/etc/twostroke-tls"]
            assert ("--insecure" in container["args"]) == (container["name"] == "router")


def test_workers_are_scraped_and_probed_with_tls_where_their_links_have_it():
    monitored = "--set=monitoring.podMonitor.enabled=true"
    made = render(*ISSUER, monitored)
    monitors = [m for m in made if m["kind"] == "PodMonitor"]
    assert {m["metadata"]["name"] for m in monitors} == {f"{NAME}-prefill", f"{NAME}-decode"}
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["scheme"] == "https"
        ca = {"secret": {"name": f"{NAME}-worker-tls", "key": "ca.crt"}}
        assert endpoint["tlsConfig"] == {"ca": ca, "serverName": name_of(NAME, Caller.WORKER)}
    for container, _ in pods(made):
        if container["name"] == "worker":
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    for monitor in [m for m in render(monitored) if m["kind"] == "PodMonitor"]:
        assert not {"scheme", "tlsConfig"} & set(monitor["spec"]["podMetricsEndpoints"][0])


def test_own_secrets_need_no_cert_manager_and_without_tls_there_is_nothing():
    own = render("--set=tls.enabled=true", "--set=tls.workerSecretName=mine")
    assert not [m for m in own if m["kind"] == "Certificate"]
    secrets = {
        volume["secret"]["secretName"]
        for container, pod in pods(own)
        for volume in pod["volumes"]
        if volume["name"] == "tls" and container["name"] == "worker"
    }
    assert secrets == {"mine"}
    for container, pod in pods(render()):
        assert not [each for each in pod["volumes"] if each["name"] == "tls"]
        assert "--insecure" in container["args"]


def test_clients_see_a_certificate_of_their_own():
    """All that speaks to the routers' faces speaks TLS then: probes, monitors, the chart's test, the Service."""
    made = render(
        *PUBLIC, "--set=monitoring.serviceMonitor.enabled=true", "--set=router.tls.dnsNames={llm.example.com}"
    )
    (config,) = [m for m in made if m["kind"] == "ConfigMap" and m["metadata"]["name"] == NAME]
    settings = RouterConfig(**yaml.safe_load(config["data"]["config.yaml"])["router"])
    assert (settings.ssl_certfile, settings.ssl_keyfile) == (f"{FACE}/tls.crt", f"{FACE}/tls.key")
    ((container, pod),) = [(c, p) for c, p in pods(made) if c["name"] == "router"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "public-tls"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "public-tls"]
    assert (mount["mountPath"], volume["secret"]["secretName"]) == (FACE, f"{NAME}-public-tls")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    (certificate,) = [m for m in made if m["kind"] == "Certificate"]
    assert certificate["spec"]["secretName"] == f"{NAME}-public-tls"
    assert {NAME, f"{NAME}.llm.svc", "llm.example.com"} <= set(certificate["spec"]["dnsNames"])
    (service,) = [m for m in made if m["kind"] == "Service" and m["metadata"]["name"] == NAME]
    assert [port["appProtocol"] for port in service["spec"]["ports"]] == ["https", "https"]
    (monitor,) = [m for m in made if m["kind"] == "ServiceMonitor"]
    assert monitor["spec"]["endpoints"][0]["scheme"] == "https"
    assert monitor["spec"]["endpoints"][0]["tlsConfig"]["serverName"] in certificate["spec"]["dnsNames"]
    (test,) = [m for m in made if m["kind"] == "Pod"]
    assert {"name": "URL", "value": f"https://{NAME}:8000"} in test["spec"]["containers"][0]["env"]
    for container, pod in pods(made):
        assert (container["name"] == "router") == ("public-tls" in [each["name"] for each in pod["volumes"]])


def test_without_it_probes_ask_in_plain_words():
    ((container, _),) = [(c, p) for c, p in pods(render()) if c["name"] == "router"]
    assert container["livenessProbe"]["grpc"] == {"port": 8001}
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTP"
