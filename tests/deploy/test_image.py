"""The image's instructions, as far as they can be followed without a builder: what is copied installs and runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.deploy.charts import CHART, ROOT

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
COPIED = [
    line[1:]
    for line in (ROOT / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
    if line.startswith("!")
]


def test_the_image_has_every_part_of_the_package():
    parts = {link.name for link in (ROOT / "src/twostroke").iterdir() if link.is_symlink()}
    assert parts <= set(COPIED)
    assert all((ROOT / name).exists() for name in COPIED)


def test_the_image_runs_as_the_charts_user_under_tini():
    text = DOCKERFILE.read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())["securityContext"]
    assert f"USER {values['runAsUser']}:{values['fsGroup']}" in text
    assert 'ENTRYPOINT ["tini", "--"]' in text
    assert "STOPSIGNAL SIGTERM" in text
    pinned = re.search(r"torch==[\d.]+", (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert pinned[0] in text


@pytest.mark.campaign
def test_what_is_copied_installs_and_starts(tmp_path: Path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    no_caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": no_caches} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **options)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)  # as the image does
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words, expected in (("--version", "twostroke "), ("worker --help", "--routers-at")):
        told = subprocess.run(
            [sys.executable, "-P", "-c", "from twostroke.cli.entry import main; main()", *words.split()],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(site), "COLUMNS": "200"},
        )
        assert expected in told.stdout
    checkpoint = list((site / "twostroke/model/bundled").glob("*.safetensors"))
    assert checkpoint, "the bundled model is part of the package"
