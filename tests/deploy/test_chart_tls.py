"""The chart's certificates: what cert-manager is asked for is what the processes accept."""

import yaml
from support.charts import MODES, mode_arguments, render

from twostroke.core.tls.callers import Caller, name_of, uri_of
from twostroke.core.tls.config import TlsConfig

ISSUER = ["--set=tls.enabled=true", "--set=tls.certManager.issuerRef.name=ours"]
NAME = "ts-twostroke"


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
