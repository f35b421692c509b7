"""One schema, four sources: flags win over environment, environment over file, file over defaults."""

from pathlib import Path

import pytest

from twostroke.cli import members
from twostroke.cluster.config import Config, load_config
from twostroke.cluster.settings import WorkerSettings
from twostroke.core.config import load_section
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role

ROOT = Path(__file__).resolve().parents[2]


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: {prefill: 2, decode: 3, launcher: process}\ncache: {block_size: 64}\n")
    environment = {"TWOSTROKE__CLUSTER__DECODE": "4", "TWOSTROKE__CACHE__BLOCK_SIZE": "32", "HOME": "/root"}
    config = load_config(file, environment, {"cluster.decode": 5, "model.name": None})
    assert (config.cluster.prefill, config.cluster.decode, config.cluster.launcher) == (2, 5, "process")
    assert config.cache.block_size == 32
    assert config.step == Config().step


def test_the_example_file_is_valid():
    assert load_config(ROOT / "deploy/local/cluster.yaml").cluster.prefill == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"cluster.prefil": 1}, ["cluster.prefil", "did you mean 'prefill'"]),
        ({"cash.dtype": "fp8"}, ["cash", "did you mean 'cache'"]),
        ({"cluster.decode": 0}, ["cluster.decode", "0", "greater than or equal to 1"]),
        ({"model.kernels": "avx"}, ["model.kernels", "avx", "'auto', 'native' or 'torch'"]),
        ({"cache.block_size": 24}, ["cache.block_size", "24", "16, 32 or 64"]),
        ({"cache.memory_fraction": float("nan")}, ["cache.memory_fraction"]),
        ({"router.host": "0.0.0.0"}, ["0.0.0.0", "--insecure"]),
        ({"router.port": 9000, "router.grpc_port": 9000}, ["must differ"]),
        ({"step.max_num_batched_tokens": 16, "cache.block_size": 64}, ["max_num_batched_tokens", "at least"]),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(flags: dict[str, object], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "cluster: 3", "{", "cluster: {prefill: [1]}"])
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_two_clusters_do_not_share_a_key():
    assert load_config().cluster.key != load_config().cluster.key


def test_a_public_host_is_allowed_only_knowingly():
    assert load_config(flags={"router.host": "0.0.0.0", "router.insecure": True}).router.host == "0.0.0.0"


def test_a_mistaken_secret_is_not_shown():
    for flags in ({"cluster.key": "too-short"}, {"router.api_keys": {"too-short": 1}}):
        with pytest.raises(ConfigError) as caught:
            load_config(flags=flags)
        assert "too-short" not in str(caught.value)
        assert "not shown" in str(caught.value)


SECRET = "my-secret-key-0123456789"


@pytest.mark.parametrize(
    ("file", "environment"),
    [
        (f"cluster: {{key: {SECRET}}}", {"TWOSTROKE__CLUSTER__KEY__X": "1"}),
        (f"cluster: [{{key: {SECRET}}}]", {}),
        (f"router: {{api_keys: [{SECRET}]}}", {"TWOSTROKE__ROUTER__API_KEYS__X": "1"}),
        (f"cluster: {{key: {SECRET}", {}),
        (f"cluster: {{key: '{SECRET}'}}}}\n", {}),
    ],
)
def test_no_mistake_around_a_secret_shows_it(tmp_path, file: str, environment: dict[str, str]):
    (tmp_path / "config.yaml").write_text(file)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", environment)
    assert SECRET not in str(caught.value)
    assert "cluster" in str(caught.value) or "api_keys" in str(caught.value) or "line 1" in str(caught.value)


def test_settings_that_are_shown_show_no_key():
    config = load_config(flags={"cluster.key": SECRET})
    settings = {"worker_id": "w", "role": "decode", "model_directory": "d", "model_name": "m"}
    worker = load_section(WorkerSettings, settings | {"cluster_key": SECRET})
    for shown in (repr(config), str(config), repr(config.cluster), repr(worker), str(worker)):
        assert SECRET not in shown
    with pytest.raises(ConfigError) as refused:
        load_section(WorkerSettings, settings | {"cluster_key": "too-short"})
    assert "cluster_key" in refused.value.message
    assert "too-short" not in refused.value.message


@pytest.mark.parametrize(("command", "words"), [("worker", "cluster.key"), ("router", "cluster.key")])
def test_a_process_of_a_cluster_wants_the_clusters_key(command: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TWOSTROKE__CLUSTER__KEY", raising=False)
    with pytest.raises(ConfigError, match=words):
        members.worker(Role.DECODE, ["127.0.0.1:1"]) if command == "worker" else members.router()


def test_a_router_wants_a_port_that_workers_can_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOSTROKE__CLUSTER__KEY", "k" * 16)
    with pytest.raises(ConfigError, match="internal_port"):
        members.router()
