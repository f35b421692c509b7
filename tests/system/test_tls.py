"""A cluster with certificates everywhere: clients over TLS, links inside with mutual TLS, in processes of their own."""

import json
import ssl
import subprocess
import sys

import httpx
import pytest
from support.clusters.certificates import made

from twostroke import Client, ConfigError, Unavailable
from twostroke.cluster.authority import renew, renew_authority


@pytest.fixture(scope="module", params=["inprocess", pytest.param("process", marks=pytest.mark.campaign)])
def secured(run_cluster, request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("certificates")
    made(directory)
    with run_cluster(
        cluster__launcher=request.param,
        cluster__prefill=1,
        cluster__decode=1,
        cluster__tls={
            "ca": f"{directory}/ca.pem",
            "cert": f"{directory}/{{role}}.pem",
            "key": f"{directory}/{{role}}.key",
        },
        cache__tokens=8192,
        step__num_threads=1,
        router__local_prefill=False,
        router__ssl_certfile=f"{directory}/router.pem",
        router__ssl_keyfile=f"{directory}/router.key",
        router__ssl_ca_certs=f"{directory}/ca.pem",
    ) as running:
        running.certificates = directory
        yield running


def options(directory):
    return {
        "tls": directory / "ca.pem",
        "cert": directory / "operator.pem",
        "key": directory / "operator.key",
    }


def test_clients_speak_tls_and_show_certificates(secured):
    directory = secured.certificates
    with Client(secured.grpc, **options(directory), timeout_s=60) as client:
        answer = client.generate("def add(a, b): return a + b\n" * 20, max_tokens=4)
        explained = client.explain(answer.request_id)
    assert explained["handover"]["bytes_moved"] > 0
    assert secured.url.startswith("https://")
    bare, shown = (ssl.create_default_context(cafile=str(directory / "ca.pem")) for _ in range(2))
    shown.load_cert_chain(directory / "operator.pem", directory / "operator.key")
    assert httpx.get(f"{secured.url}/health", verify=shown).status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{secured.url}/health", verify=bare)
    with Client(secured.grpc, tls=directory / "ca.pem") as stranger, pytest.raises(Unavailable, match="tls="):
        stranger.models()
    with Client(secured.grpc) as plain, pytest.raises(Unavailable, match="tls="):
        plain.models()


def test_commands_speak_tls(secured):
    directory = secured.certificates
    command = [sys.executable, "-P", "-m", "twostroke.cli.main", "status", "--json", "--grpc", secured.grpc]
    command += ["--tls-ca", f"{directory}/ca.pem", "--tls-cert", f"{directory}/operator.pem"]
    command += ["--tls-key", f"{directory}/operator.key"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert len(json.loads(done.stdout)["workers"]) == 2
    command.remove("--json")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    assert "links inside: mutual TLS" in shown
    with Client(secured.grpc, **options(directory), timeout_s=60) as client:
        speaks_shm = any(pair["transport"] == "shm" for pair in client.cluster()["pairs"])
    assert ("not encrypted: shm" in shown) == speaks_shm


def test_no_request_fails_while_all_certificates_change(secured):
    directory = secured.certificates
    with Client(secured.grpc, **options(directory), timeout_s=60) as client:
        for turn in range(3):
            stream = client.generate_stream(f"turn {turn}", max_tokens=48, ignore_eos=True)
            next(stream)
            renew_authority(directory)
            assert client.generate(f"between {turn}", max_tokens=2).text is not None
            renew(directory, 10)
            assert client.generate(f"after {turn}", max_tokens=2).text is not None
            assert len(list(stream)) > 0
            with Client(secured.grpc, **options(directory), timeout_s=60) as other:
                assert other.generate(f"other {turn}", max_tokens=2).text is not None


def test_a_certificate_without_keys_of_clients_is_not_enough_for_a_public_address(run_cluster, tmp_path):
    made(tmp_path)
    certificate = {"router__ssl_certfile": f"{tmp_path}/router.pem", "router__ssl_keyfile": f"{tmp_path}/router.key"}
    with pytest.raises(ConfigError, match="--insecure"), run_cluster(router__host="0.0.0.0", **certificate):
        pass
