"""One schema, four sources: flags win over environment, environment over file, file over defaults."""

import io
from pathlib import Path

import pytest

from twostroke.cli import processes as members
from twostroke.cluster.config import Config, load_config
from twostroke.core.config import load_section
from twostroke.core.errors import ConfigError, TwostrokeError
from twostroke.core.ports import bindable_host, free_ports
from twostroke.core.request import Role
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess
from twostroke.worker.process import WorkerProcess
from twostroke.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: {prefill: 2, decode: 3, launcher: process}\ncache: {block_size: 64}\n")
    environment = {"TWOSTROKE__CLUSTER__DECODE": "4", "TWOSTROKE__CACHE__BLOCK_SIZE": "32", "HOME": "/root"}
    config = load_config(file, environment, {"cluster.decode": 5, "model.name": None})
    assert (config.cluster.prefill, config.cluster.decode, config.cluster.launcher) == (2, 5, "process")
    assert config.cache.block_size == 32
    assert config.step == Config().step


def test_a_variable_that_is_nearly_a_setting_is_refused():
    with pytest.raises(ConfigError, match="did you mean TWOSTROKE__CACHE__BLOCK_SIZE"):
        load_config(environment={"TWOSTROKE_CACHE__BLOCK_SIZE": "32"})
    with pytest.raises(ConfigError, match="TWOSTROKE__ROUTER__API_KEYS is empty; unset it, or give it a value"):
        load_config(environment={"TWOSTROKE__ROUTER__API_KEYS": ""})
    assert load_config(environment={"TWOSTROKE_API_KEY": "x", "TWOSTROKEN__X": "1"}).cache == Config().cache


@pytest.mark.parametrize("name", ["", " \t"])
def test_an_empty_served_name_is_refused_with_the_remedy(name: str):
    with pytest.raises(ConfigError, match=r"model\.name is .*: it is empty; give the name"):
        load_config(flags={"model.name": name})


def test_an_empty_cluster_key_is_refused_with_the_remedy(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: {key: }")
    with pytest.raises(ConfigError, match=r"cluster\.key: it is empty; give the secret"):
        load_config(file)


def test_vllms_word_for_no_defaults_is_known():
    assert load_config(flags={"model.generation_config": "vllm"}).model.generation_config == "none"


def test_the_example_file_is_valid():
    assert load_config(ROOT / "deploy/local/cluster.yaml").cluster.prefill == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"cluster.prefil": 1}, ["cluster.prefil", "did you mean 'prefill'"]),
        ({"cache": 3}, ["cache", "mapping of its settings"]),
        ({"cash.dtype": "fp8"}, ["cash", "did you mean 'cache'"]),
        ({"cluster.decode": 0}, ["cluster.decode", "0", "greater than or equal to 1"]),
        ({"model.kernels": "avx"}, ["model.kernels", "avx", "'auto', 'native' or 'torch'"]),
        ({"cache.block_size": 24}, ["cache.block_size", "24", "16, 32 or 64"]),
        ({"cache.memory_fraction": float("nan")}, ["cache.memory_fraction"]),
        ({"router.host": "0.0.0.0"}, ["0.0.0.0", "--insecure"]),
        ({"router.internal_host": "0.0.0.0"}, ["router.internal_host", "0.0.0.0", "--insecure"]),
        ({"router.port": 9000, "router.grpc_port": 9000}, ["must differ"]),
        ({"step.max_num_batched_tokens": 16, "cache.block_size": 64}, ["max_num_batched_tokens", "at least"]),
        (
            {"speculation": {"method": "eagle"}},
            ["speculation.method", "'eagle' is not served yet", "eagle3"],
        ),
        ({"speculation": {"num_speculative_tokens": 5}}, ["method is not given", "num_speculative_tokens"]),
        (
            {"speculation": {"method": "ngram", "num_speculative_tokens": 0}},
            ["num_speculative_tokens", "0", "equal to 1"],
        ),
        ({"speculation": {"method": "ngram", "num_speculative_tokens": 33}}, ["num_speculative_tokens", "33", "32"]),
        ({"speculation": {"method": "ngram", "prompt_lookup_max": 1}}, ["prompt_lookup_min is 2", "prompt_lookup_max"]),
        ({"speculation": {"method": "ngram", "num_speculativ_tokens": 4}}, ["did you mean 'num_speculative_tokens'"]),
        ({"speculation": {"method": "draft_model"}}, ["model is not given", "checkpoint"]),
        ({"speculation": {"method": "mtp", "model": "x"}}, ["model is a setting of draft_model", "method is mtp"]),
        ({"speculation": {"method": "medusa"}}, ["method is medusa", "model is not given", "the heads'"]),
        (
            {"speculation": {"method": "ngram", "model": "x"}},
            ["model is a setting of draft_model", "eagle3, and"],
        ),
        ({"speculation": {"model": "x", "prompt_lookup_max": 9}}, ["prompt_lookup_max is a setting of ngram"]),
        ({"speculation": {"model": "x"}, "cluster.tensor_parallel_size": 2}, ["2 tensor-parallel", "draft_model"]),
        ({"speculation": {"method": "ngram"}, "cluster.tensor_parallel_size": 2}, ["2 tensor-parallel ranks", "ngram"]),
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "no router is given"),
        ({"routers_at": ["routers"]}, "--routers-at"),
    ],
)
def test_a_worker_wants_a_router_to_announce_to(flags: dict, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOSTROKE__CLUSTER__KEY", "k" * 16)
    with pytest.raises(TwostrokeError, match=words):
        members.worker(Role.DECODE, **flags)


def test_a_router_wants_a_port_that_workers_can_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOSTROKE__CLUSTER__KEY", "k" * 16)
    with pytest.raises(ConfigError, match="internal_port"):
        members.router()


# ---------------------------------------------------------------- keys

WEAK_KEYS = [
    ([""], "empty"),
    (["  \t"], "empty"),
    (["sw0rd"], "5 characters"),
    (["1234567"], "7 characters"),
    (["a key with spaces"], "a space"),
    (["long-enough-key\n"], "a space"),
    (["sch\u00fcssel-der-t\u00fcr"], "no header can carry"),
    (["long-enough\x00-key"], "no header can carry"),
    (["good-key-number-1", ""], "key 2 of 2 is empty"),
    (["same-key-twice-0", "same-key-twice-0"], "the same"),
    ([None], "valid string"),
    ([1234567890123456], "valid string"),
    ("a-key-that-is-no-list", "JSON list"),
]


@pytest.mark.parametrize(("keys", "word"), WEAK_KEYS, ids=lambda value: str(value)[:20])
def test_a_key_that_guards_nothing_is_refused_and_not_shown(keys: object, word: str):
    with pytest.raises(ConfigError, match=r"router\.api_keys") as caught:
        load_config(flags={"router.api_keys": keys})
    assert word in str(caught.value)
    for key in keys if isinstance(keys, list) else [keys]:
        assert not str(key).strip() or str(key).strip() not in str(caught.value)


def test_an_unset_variable_is_no_open_door():
    for text in ("['']", '[""]', "[null]", "['  ']"):
        with pytest.raises(ConfigError, match=r"router\.api_keys"):
            load_config(environment={"TWOSTROKE__ROUTER__API_KEYS": text})


def test_short_keys_that_others_use_are_taken_and_counted():
    for key in ("sk-local", "token-abc123"):  # the examples of vLLM and of OpenAI's clients
        assert load_config(flags={"router.api_keys": [key, "a" * 16]}).router.num_weak_keys == 1


@pytest.mark.parametrize("key", ["k" * 16 + "\n", " " * 16, "\t" + "k" * 16])
def test_a_cluster_key_with_the_line_end_of_its_file_is_refused(key: str):
    with pytest.raises(ConfigError, match=r"^cluster\.key: .*remove it"):
        load_config(flags={"cluster.key": key})


def test_no_key_is_in_what_python_shows_of_the_settings():
    config = load_config(flags={"cluster.key": SECRET, "router.api_keys": [SECRET + "1"]})
    worker = WorkerSettings(
        worker_id="w", role=Role.DECODE, model_directory="", model_name="", cluster_key=SECRET, metrics_keys=(SECRET,)
    )
    assert SECRET not in f"{config!r} {config} {worker!r} {worker}"
    with pytest.raises(ValueError) as caught:  # pydantic's own words, where nobody makes ours of them
        WorkerSettings.model_validate({"worker_id": SECRET, "cluster_key": SECRET, "role": SECRET})
    assert SECRET not in str(caught.value)


def test_a_configuration_can_come_from_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("cluster: {prefill: 3}"))
    assert load_config(Path("-")).cluster.prefill == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("cluster: {"))
    with pytest.raises(ConfigError, match="--config -: line 1"):
        load_config(Path("-"))


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "fe80::1", "255.255.255.255"])
def test_a_public_address_needs_a_word_wherever_it_is_given(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOSTROKE__CLUSTER__KEY", "k" * 16)
    with pytest.raises(ConfigError, match="--insecure"):
        load_config(flags={"router.host": host})
    with pytest.raises(ConfigError, match=r"--host is .*--insecure"):
        members.worker(Role.DECODE, ["127.0.0.1:1"], host=host)
    with pytest.raises(ConfigError, match=r"--host is .*--insecure"):
        members.worker(Role.DECODE, ["127.0.0.1:1"], host=host, metrics_port="none")
    with pytest.raises(ConfigError, match="--insecure"):
        members.router(host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3", "::1"])
def test_a_loopback_address_needs_none(host: str):
    assert load_config(flags={"router.host": host}).router.host == host
    assert bindable_host(host, "--host", insecure=False)


def test_a_worker_takes_the_word_from_the_same_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TWOSTROKE__CLUSTER__KEY", "k" * 16)
    seen: list[WorkerSettings] = []
    monkeypatch.setattr("twostroke.worker.main.run_worker", lambda settings, *_: seen.append(settings))
    members.worker(Role.DECODE, ["127.0.0.1:1"], host="0.0.0.0")
    members.worker(Role.DECODE, ["127.0.0.1:1"], host="0.0.0.0", insecure=True)
    monkeypatch.setenv("TWOSTROKE__ROUTER__INSECURE", "true")
    members.worker(Role.DECODE, ["127.0.0.1:1"], host="0.0.0.0")
    assert [settings.insecure for settings in seen] == [False, True, True]


async def test_a_worker_that_may_not_binds_nothing(tiny_checkpoint: Path):
    settings = {"worker_id": "w", "role": Role.COMBINED, "model_name": "m", "cluster_key": "k" * 16}
    worker = WorkerProcess(WorkerSettings(**settings, model_directory=str(tiny_checkpoint), host="0.0.0.0"))
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0'.*--insecure"):
        await worker._bind()
    assert worker._server is None
    with pytest.raises(ConfigError, match="--insecure"):
        await worker.start()
    await worker.stop(0.0)


async def test_a_router_that_may_not_binds_nothing():
    router = RouterProcess(RouterConfig(host="0.0.0.0", port=free_ports("127.0.0.1", 1)[0], grpc_port=0), "k" * 16)
    with pytest.raises(ConfigError, match="--insecure"):
        await router.start()
    await router.stop(0.0)


def test_unlike_ranks_are_refused_in_deterministic_mode_before_anything_is_read():
    flags = {"cluster.prefill_tp": 2, "cluster.decode_tp": 4, "model.path": "/nowhere"}
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags)
    for word in ("have 2 tensor", "workers 4", "--tensor-parallel-size 4", "TWOSTROKE__MODEL__DETERMINISTIC=false"):
        assert word in caught.value.message
    free = load_config(None, {"TWOSTROKE__MODEL__DETERMINISTIC": "false"}, flags)
    assert (free.cluster.ranks_of(Role.PREFILL), free.cluster.ranks_of(Role.DECODE)) == (2, 4)
    load_config(flags=flags | {"cluster.decode_tp": 2})
    load_config(flags=flags | {"cluster.prefill": 0})  # combined workers hand over to none


def test_internal_ports_of_several_routers_may_not_meet_the_shared_ones() -> None:
    flags = {"cluster.routers": 3, "router.port": 8000, "router.grpc_port": 8001, "router.internal_port": 7999}
    with pytest.raises(ConfigError, match="3 routers take 7999 to 8001, and the routers share 8000"):
        load_config(flags=flags)
    with pytest.raises(ConfigError, match="65535 is the last port"):
        load_config(flags=flags | {"router.internal_port": 65534})
    assert load_config(flags=flags | {"router.internal_port": 8002}).cluster.routers == 3


def test_speculation_is_off_unless_it_is_asked_for_by_vllms_flag_or_by_the_environment():
    from twostroke.cli.options import config_from

    assert load_config().speculation.method is None
    given = config_from({"speculative_config": '{"method": "ngram", "num_speculative_tokens": 6}'}).speculation
    assert (given.method, given.num_speculative_tokens, given.prompt_lookup_max, given.prompt_lookup_min) == (
        *("ngram", 6),
        *(4, 2),
    )
    named = config_from({"speculative_config": '{"model": "bundled"}'}).speculation  # as in vLLM
    assert (named.method, named.checkpoint) == ("draft_model", "bundled")
    assert given.checkpoint is None
    names = {"TWOSTROKE__SPECULATION__METHOD": "ngram", "TWOSTROKE__SPECULATION__PROMPT_LOOKUP_MIN": "3"}
    assert load_config(environment=names).speculation.prompt_lookup_min == 3


def test_a_section_without_a_method_travels_whole_from_the_launcher_to_its_members():
    config = load_config()
    assert load_section(Config, config.model_dump(mode="json")).speculation == config.speculation


@pytest.mark.parametrize("text", ["{", "ngram", "[1]", "3", "{}", '{"num_speculative_tokens": 4}'])
def test_a_speculative_config_that_is_no_object_is_refused_with_an_example(text: str):
    from twostroke.cli.options import config_from

    with pytest.raises(ConfigError, match="--speculative-config"):
        config_from({"speculative_config": text})
