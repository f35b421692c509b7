"""`docs/settings.md` has every key of the configuration, as the model has it, and its variables set what they name."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.cluster.config import Config, load_config
from twostroke.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "tools/settings_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


REFERENCE = script()
SETTINGS = list(REFERENCE.settings_of(Config))
SAMPLES = {
    "cluster.key": "k" * 16,
    "cluster.prefill_tp": 1,
    "cluster.decode_tp": 1,
    "cache.key_dtype": "int8",
    "cache.value_dtype": "int8",
    "router.chat_template": "{% for m in messages %}{% endfor %}",
    "router.operator_key": "sha256:" + "0" * 64,
    "speculation.method": "ngram",
}
FOR_NONE = {"integer": 64, "number": 1, "text": "k8s", "path": "file"}
BESIDE = {  # settings that another one needs
    "router.ssl_keyfile": {"TWOSTROKE__ROUTER__SSL_CERTFILE": "c"},
    "router.ssl_ca_certs": {"TWOSTROKE__ROUTER__SSL_CERTFILE": "c"},
}


def test_the_page_is_that_of_the_model():
    assert REFERENCE.FILE.read_text(encoding="utf-8") == REFERENCE.page(), "run make docs"


def test_every_key_has_a_meaning_and_a_line():
    keys = [setting.key for setting in SETTINGS]
    assert len(keys) == len(set(keys)) > 120
    assert [setting.key for setting in SETTINGS if not (setting.field.description or "").strip()] == []
    assert {"router.port", "cluster.tls.ca", "model.lora_modules[].path", "planner.max_workers"} <= set(keys)
    page = REFERENCE.page()
    for setting in SETTINGS:
        assert page.count(f"| `{setting.key}` | ") == 1
    dumped = Config().model_dump()
    assert {(section, key) for section, inner in dumped.items() for key in inner} == {
        tuple(key.split(".")) for key in keys if key.count(".") == 1
    }


@pytest.mark.parametrize(
    "setting",
    [s for s in SETTINGS if s.variable and ".tls" not in s.key and s.key != "router.journal_url"],
    ids=lambda setting: setting.key,
)
def test_a_variable_sets_its_key(setting: Any):
    section, name = setting.key.split(".")
    default = None if setting.field.default_factory else setting.field.default
    value = SAMPLES.get(setting.key, default)
    if value is None:
        value = FOR_NONE[REFERENCE.type_of(setting.field).split()[0]]
    text = json.dumps(value) if not isinstance(value, Path | str) else str(value)
    config = load_config(environment={setting.variable: text, **BESIDE.get(setting.key, {})})
    assert name in getattr(config, section).model_fields_set
    assert yaml.safe_load(json.dumps(getattr(getattr(config, section), name), default=str)) == (
        list(value) if isinstance(value, tuple) else value
    )


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_words_that_yaml_takes_for_truth_values_stay_words(word: str, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(f"cluster: {{gpu_health: {word}}}")
    assert load_config(file).cluster.gpu_health == word
    assert load_config(environment={"TWOSTROKE__CLUSTER__GPU_HEALTH": word}).cluster.gpu_health == word
    with pytest.raises(ConfigError, match=r"router\.kv_journal is 'on'"):
        load_config(environment={"TWOSTROKE__ROUTER__KV_JOURNAL": "on"})


def test_types_defaults_and_units_are_told():
    by_key = {setting.key: setting for setting in SETTINGS}
    told = {
        key: (
            REFERENCE.type_of(by_key[key].field),
            REFERENCE.default_of(by_key[key]),
            REFERENCE.unit_of(key),
            by_key[key].variable,
        )
        for key in ("router.port", "cache.ring_bytes", "cluster.tls.ca", "model.lora_modules", "step.target_ms")
    }
    assert told == {
        "router.port": ("integer ≥ 0, ≤ 65535", "8000", "", "TWOSTROKE__ROUTER__PORT"),
        "cache.ring_bytes": (
            "integer ≥ 0, ≤ 68719476736",
            "134217728 (128 MiB)",
            "bytes",
            "TWOSTROKE__CACHE__RING_BYTES",
        ),
        "cluster.tls.ca": ("text", "must be given", "", "TWOSTROKE__CLUSTER__TLS__CA"),
        "model.lora_modules": ("list of keys below", "empty", "", "TWOSTROKE__MODEL__LORA_MODULES"),
        "step.target_ms": ("number ≥ 1", "70", "ms", "TWOSTROKE__STEP__TARGET_MS"),
    }


def test_readme_and_help_say_where_it_is():
    assert "](docs/settings.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    told = " ".join(CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"]).output.split())
    assert "docs/settings.md" in told
