"""API keys: digests at rest, what a key allows, and a file that changes while the router runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.core.errors import ConfigError, KeyForbids, ModelNotFound, Unauthenticated
from twostroke.router.config import RouterConfig
from twostroke.router.keys.digests import line_for
from twostroke.router.keys.grants import ANYONE, KeyRing
from twostroke.router.keys.key_file import grants_in, new_key
from twostroke.router.keys.rotation import KeyRotation

KEY, OTHER = "sk-one-key-of-the-tests", "sk-other-key-of-the-tests"


def written(path: Path, text: str) -> Path:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)
    return path


def entry(key: str, more: str = "") -> str:
    return f"  - key: {line_for(key)}\n{more}"


def test_a_key_and_its_digest_are_one_tenant() -> None:
    plain, hashed = KeyRing.of([KEY]), KeyRing.of([line_for(KEY)])
    assert plain.grant_of(KEY) == hashed.grant_of(KEY)
    assert plain.grant_of(KEY) != KeyRing.of([OTHER]).grant_of(OTHER)


@pytest.mark.parametrize("given", [None, "", OTHER, KEY[:-1], KEY + " ", line_for(KEY), "sha256:", "sha256:zz"])
def test_whoever_has_no_key_gets_nothing_also_not_by_the_digest(given: str | None) -> None:
    for ring in (KeyRing.of([KEY]), KeyRing.of([line_for(KEY)])):
        with pytest.raises(Unauthenticated):
            ring.grant_of(given)


def test_a_ring_holds_no_key() -> None:
    ring = KeyRing.of([KEY])
    assert KEY not in repr(ring)
    held = [part for pair in ring._grants.items() for part in (pair[0], pair[1][0])]
    assert KEY.encode() not in held


def test_without_keys_everybody_is_the_public_and_a_ring_that_lost_its_keys_is_closed() -> None:
    assert KeyRing.of([]).grant_of(None) is ANYONE
    ring = KeyRing.of([KEY])
    ring.replace({})
    with pytest.raises(Unauthenticated):
        ring.grant_of(KEY)


def test_a_file_says_what_a_key_allows(tmp_path: Path) -> None:
    more = (
        "    tenant: acme\n    models: [small]\n    priority: 3\n    requests_per_minute: 60\n"
        "    tokens_per_minute: 1000\n    share: 2\n"
    )
    text = (
        "keys:\n"
        + entry(KEY, more)
        + entry(OTHER, "    tenant: acme\n    isolation_domain: alone\n    monitor: true\n")
    )
    ring = KeyRotation((), written(tmp_path / "keys.yaml", text)).ring
    one, other = ring.grant_of(KEY), ring.grant_of(OTHER)
    assert (one.tenant, one.isolation_domain, one.priority, one.models) == ("tenant-acme", "tenant-acme", 3, ("small",))
    assert one.allowance is not None
    assert (one.allowance.requests_per_minute, one.allowance.tokens_per_minute, one.allowance.share) == (60, 1000, 2)
    assert (other.tenant, other.isolation_domain) == ("tenant-acme", "domain-alone")
    one.check_model("small")
    with pytest.raises(ModelNotFound):
        one.check_model("large")
    other.check_model("large")
    other.check_monitor()
    with pytest.raises(KeyForbids):
        one.check_monitor()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("keys: [", "YAML"),
        ("keys:\n  - key: sk-in-plain-text-by-mistake\n", "keys.0.key"),
        ("keys:\n" + entry(KEY, "    tennant: acme\n"), "keys.0.tennant is not a setting; there are key, tenant"),
        ("keys:\n" + entry(KEY, "    tenant: a b\n"), "keys.0.tenant"),
        ("keys:\n" + entry(KEY, "    priority: 100000\n"), "keys.0.priority"),
        ("keys:\n" + entry(KEY, "    tokens_per_minute: 0\n"), "keys.0.tokens_per_minute"),
        ("keys:\n" + entry(KEY) + entry(KEY), "twice"),
        ("[]", "router.api_key_file"),
        ("", "keys"),
    ],
)
def test_a_wrong_file_is_refused_by_entry_and_field_without_a_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grants_in(written(tmp_path / "keys.yaml", text))
    assert named in caught.value.message
    assert "by-mistake" not in caught.value.message
    assert line_for(KEY) not in caught.value.message


def test_a_changed_file_changes_the_keys_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.yaml", "keys:\n" + entry(KEY))
    rotation = KeyRotation(("a-bare-key-of-the-operator",), path)
    ring = rotation.ring
    assert not rotation.look(), "nothing has changed"
    written(path, "keys:\n" + entry(OTHER))
    assert rotation.look()
    ring.grant_of(OTHER)
    ring.grant_of("a-bare-key-of-the-operator")
    with pytest.raises(Unauthenticated):
        ring.grant_of(KEY)
    written(path, "keys: nonsense")
    assert not rotation.look()
    assert (rotation.num_failed, bool(rotation.problem)) == (1, True)
    path.unlink()
    assert not rotation.look()
    ring.grant_of(OTHER)
    written(path, "keys:\n" + entry(KEY))
    assert rotation.look()
    assert rotation.problem is None
    with pytest.raises(Unauthenticated):
        ring.grant_of(OTHER)


def test_a_broken_file_is_read_once_and_a_configured_key_keeps_its_grant_whatever_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.yaml", "keys: []")
    rotation = KeyRotation((KEY,), path)
    bare = rotation.ring.grant_of(KEY)
    written(path, "keys:\n" + entry(KEY, "    tenant: other\n") + entry(OTHER))
    assert rotation.look()
    assert rotation.ring.grant_of(KEY) == bare
    written(path, "keys: nonsense")
    assert [rotation.look() for _ in range(3)] == [False] * 3
    assert rotation.num_failed == 1, "until it changes again"


def test_an_empty_list_in_the_file_keeps_everybody_out(tmp_path: Path) -> None:
    ring = KeyRotation((), written(tmp_path / "keys.yaml", "keys: []")).ring
    with pytest.raises(Unauthenticated):
        ring.grant_of(None)


def test_the_operators_key_opens_only_what_has_a_lock() -> None:
    with_keys = KeyRotation((KEY,), None, line_for(OTHER)).ring
    assert with_keys.grant_of(OTHER).tenant == "operator"
    assert KeyRotation((), None, line_for(OTHER)).ring.grant_of(None) is ANYONE
    with pytest.raises(ValueError, match="sha256"):
        RouterConfig(operator_key=OTHER)


def test_workers_metrics_want_a_key_wherever_clients_need_one(tmp_path: Path) -> None:
    assert RouterConfig().metrics_keys == ()
    assert RouterConfig(operator_key=line_for(KEY)).metrics_keys == ()
    assert RouterConfig(api_keys=(KEY,)).metrics_keys == (KEY,)
    assert RouterConfig(api_key_file=tmp_path / "keys.yaml").metrics_keys == ("sha256:" + "0" * 64,)


def test_the_command_makes_an_entry_that_the_file_takes(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["keys", "new", "acme"])
    key, text = made.stdout.split("\n", 1)
    path = written(tmp_path / "keys.yaml", "keys:\n" + text)
    assert KeyRotation((), path).ring.grant_of(key).tenant == "tenant-acme"
    assert len(key) > 40
    assert key != new_key()
    checked = CliRunner().invoke(app, ["keys", "check", str(path)])
    assert "tenant-acme" in checked.stdout
    assert key not in checked.stdout
    refused = CliRunner().invoke(app, ["keys", "new", "a b"])
    assert "a b" in str(refused.exception)
