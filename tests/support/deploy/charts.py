"""The chart, rendered by a real helm, and schemas of what it renders."""

import copy
import shutil
import subprocess
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "deploy/helm/twostroke"
PRESETS = sorted((ROOT / "deploy/helm/presets").glob("*.yaml"))
MODES = ("deployments", "ray", "disaggregatedset")
CRDS = ROOT.parent / "shared/crds"

Manifest = dict[str, Any]


def helm() -> str:
    """Path of helm: that of `make helm`, else one that is installed. Skips the test where there is none."""
    ours = ROOT / ".helm/helm"
    found = str(ours) if ours.exists() else shutil.which("helm")
    if found is None:
        pytest.skip("no helm here; `make helm` fetches one, where npm and Linux are")
    return found


def run_helm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run helm; its output is text. The caller looks at the exit code."""
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


@cache
def render(*arguments: str, version: str = "1.34.0") -> list[Manifest]:
    """Manifests of the chart for a version of Kubernetes; `arguments` as for `helm template`. Not to be changed."""
    done = run_helm("template", "ts", str(CHART), "--namespace", "llm", "--kube-version", version, *arguments)
    assert done.returncode == 0, done.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times faster
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=loader) if manifest]


def refusal(*arguments: str) -> str:
    """Message with which helm refuses these values."""
    done = run_helm("template", "ts", str(CHART), "--kube-version", "1.34.0", *arguments)
    assert done.returncode != 0
    return done.stderr


def mode_arguments(preset: Path | None, mode: str) -> list[str]:
    """Arguments for a preset in a mode. Mode ray has no autoscaling of ours: Ray's takes its place."""
    given = ["--values", str(preset)] if preset else []
    if mode == "ray":
        roles = ("prefill", "decode", "combined")
        given += [f"--set={role}.autoscaling.kind=none" for role in roles] + ["--set=ray.enableInTreeAutoscaling=true"]
    return [*given, f"--set=mode={mode}"]


def combinations() -> list[Any]:
    """Every preset, and none, in every mode."""
    return [
        pytest.param(mode_arguments(preset, mode), id=f"{preset.stem if preset else 'defaults'}-{mode}")
        for preset, mode in product([None, *PRESETS], MODES)
        if (preset and preset.stem, mode) != ("combined", "disaggregatedset")  # a set has two roles at least
    ]


def of_kind(manifests: list[Manifest], kind: str, name: str = "") -> list[Manifest]:
    """Manifests of a kind whose name ends so."""
    return [each for each in manifests if each["kind"] == kind and each["metadata"]["name"].endswith(name)]


def pod_specs(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod spec by the name and part of its manifest."""
    found = {}

    def look(node: Any, name: str) -> None:
        if isinstance(node, dict):
            if "containers" in node:
                found[name] = node
            for key, value in node.items():
                look(value, f"{name}/{key}")
        elif isinstance(node, list):
            for place, value in enumerate(node):
                called = value.get("name") or value.get("groupName") if isinstance(value, dict) else None
                look(value, f"{name}/{called or place}")

    for manifest in manifests:
        look(manifest.get("spec", {}), f"{manifest['kind']}/{manifest['metadata']['name']}")
    return found


# ---------------------------------------------------------------- schemas of custom resources


@cache
def custom_schemas() -> dict[tuple[str, str], Manifest]:
    """JSON schema by apiVersion and kind; none where ../shared is not."""
    schemas = {}
    for file in sorted(CRDS.glob("*.yaml")):
        definition = yaml.safe_load(file.read_text())["spec"]
        for version in definition["versions"]:
            key = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            schemas[key] = _closed(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
    return schemas


def _closed(schema: Any) -> Any:
    """Refuse fields that the schema does not name: an API server drops them silently."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    is_open = closed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closed
    if "properties" in closed and isinstance(closed["properties"], dict) and "type" in closed and not is_open:
        closed["additionalProperties"] = False
    if closed.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed
