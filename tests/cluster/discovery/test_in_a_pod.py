"""Discovery as a pod has it: HTTPS, the cluster's authority, and the token of its account."""

import ssl
import threading
from pathlib import Path

import pytest
from support.clusters.flow_cluster import until
from support.deploy.kube.access import token_of
from support.deploy.kube.api_server import ApiServer
from support.deploy.kube.slices import endpoint, endpoint_slice
from support.deploy.kube.store import Store

from twostroke.cluster.authority import make
from twostroke.cluster.discovery.endpoint_slices import EndpointSlices, ServiceAt, Timing
from twostroke.cluster.discovery.slices import Wanted
from twostroke.cluster.discovery.watching import Waits
from twostroke.cluster.kubernetes.connection import ApiAway, answer_of, connect

pytest.importorskip("kubernetes", reason="pip install kubernetes")

RIGHTS = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in API server behind HTTPS, and the files and variables that a kubelet gives a container."""
    make(tmp_path / "authority", "kube", 1.0, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "authority/router.pem", tmp_path / "authority/router.key")
    server = ApiServer(Store(), context)
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "ca.crt").write_bytes((tmp_path / "authority/ca.pem").read_bytes())
    (account / "token").write_text(token_of("llm", "worker"))
    module = "kubernetes.config.incluster_config"
    monkeypatch.setattr(f"{module}.SERVICE_TOKEN_FILENAME", str(account / "token"))
    monkeypatch.setattr(f"{module}.SERVICE_CERT_FILENAME", str(account / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.url.rpartition(":")[2])
    yield server
    server.close()


def allow(api: ApiServer) -> None:
    about = {"name": "find", "namespace": "llm"}
    api.store.put("roles", {"metadata": about, "rules": [RIGHTS]})
    subject = {"kind": "ServiceAccount", "name": "worker", "namespace": "llm"}
    api.store.put("rolebindings", {"metadata": about, "roleRef": {"name": "find"}, "subjects": [subject]})


async def test_slices_come_over_https_with_the_accounts_token_and_the_end_is_quick(api: ApiServer):
    allow(api)
    slices = endpoint_slice("a", "routers", [endpoint("r-1", "fd00::1")], family="IPv6", namespace="llm")
    api.store.put("endpointslices", slices)
    at = ServiceAt("k8s://routers.llm:8002", "routers", "llm", Wanted(8002))
    source = EndpointSlices(at, Timing(watch_s=600.0, waits=Waits(0.05, 0.2)))
    changes = source.follow()
    assert await anext(changes) == {"[fd00::1]:8002"}
    await until(lambda: api.calls["watch", "endpointslices"] == 1)
    api.store.put("endpointslices", slices | {"endpoints": [endpoint("r-2", "fd00::2")]})
    assert await anext(changes) == {"[fd00::2]:8002"}
    await changes.aclose()
    await until(lambda: not any("k8s://" in thread.name for thread in threading.enumerate()))  # not after ten minutes
    assert source.addresses == {"[fd00::2]:8002"}


def test_a_server_of_another_authority_is_not_spoken_to(api: ApiServer, tmp_path: Path):
    from kubernetes.client import DiscoveryV1Api

    make(tmp_path / "other", "kube", 1.0, ["127.0.0.1"])
    (tmp_path / "serviceaccount/ca.crt").write_bytes((tmp_path / "other/ca.pem").read_bytes())
    with pytest.raises(ApiAway, match="certificate"):
        answer_of(DiscoveryV1Api(connect()).list_namespaced_endpoint_slice, "llm")
    assert not api.calls
