"""Renders the chart into `deploy/kubernetes/`, for `kubectl apply` without helm.

    python deploy/helm/render.py           writes the manifests
    python deploy/helm/render.py --check   exits with 1 if the written manifests differ

Needs helm: that of `make helm`, else one that is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/twostroke"
FOLDER = ROOT / "deploy/kubernetes"
PRESET = ROOT / "deploy/helm/presets/kind.yaml"
MODES = ("deployments", "ray", "disaggregatedset")
KUBERNETES = "1.34.0"
HEAD = """# Rendered from deploy/helm/twostroke by `make chart`; do not edit. Mode {mode}, the preset kind.yaml.
# kubectl create secret generic twostroke-cluster-key --from-literal=key=$(openssl rand -hex 24)
# kubectl apply -f {mode}.yaml
"""


def rendered(mode: str) -> str:
    """Manifests of one mode.

    Raises:
        FileNotFoundError: there is no helm.
        subprocess.CalledProcessError: helm refuses the chart.
    """
    ours = ROOT / ".helm/helm"
    helm = str(ours) if ours.exists() else shutil.which("helm") or "helm"
    command = [helm, "template", "twostroke", str(CHART), "--kube-version", KUBERNETES, "--values", str(PRESET)]
    settings = [f"--set=mode={mode}", "--set=tests.enabled=false"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    return HEAD.format(mode=mode) + done.stdout


def main() -> int:
    """Write the manifests, or compare them; returns the exit code."""
    FOLDER.mkdir(exist_ok=True)
    is_check = "--check" in sys.argv[1:]
    differing = []
    for mode in MODES:
        file, text = FOLDER / f"{mode}.yaml", rendered(mode)
        if not file.exists() or file.read_text() != text:
            differing.append(file.name)
            if not is_check:
                file.write_text(text)
    if is_check and differing:
        print(f"deploy/kubernetes: {', '.join(differing)} differ from the chart; run make chart")
    return 1 if is_check and differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
