"""Chat templates and vocabularies of real models, out of llama-cpp-python's source distribution.

pip fetches it from the package index when the first test asks, and what is needed of it stays in the user's cache;
nothing of it is part of this project.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
VOCABULARIES = ("llama-spm", "phi-3", "llama-bpe", "qwen2", "gpt-2", "deepseek-llm", "deepseek-coder", "starcoder")
_INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/models/"


def real_models() -> Path:
    """A folder with `NAME.jinja`, and `ggml-vocab-NAME.gguf` with its `.inp` and `.out`.

    Skips the test where the index cannot be reached.
    """
    found = _fetched()
    if isinstance(found, str):
        pytest.skip(f"real chat templates and vocabularies cannot be fetched: {found}")
    return found


@cache
def _fetched() -> Path | str:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_home / "twostroke-tests" / f"llama-cpp-python-{VERSION}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable,
            "-P",
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries",
            "0",
            "--timeout",
            "20",
        ]
        wanted = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}", "--dest", temporary]
        try:
            subprocess.run([*command, *wanted], check=True, capture_output=True, text=True, timeout=90)
        except subprocess.CalledProcessError as error:
            return f"pip says {error.stderr.strip().splitlines()[-1:]}"
        except subprocess.TimeoutExpired:
            return "pip took more than 90 s"
        archive = Path(temporary) / f"llama_cpp_python-{VERSION}.tar.gz"
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            pytest.fail(f"{archive.name} is not the file that these tests were written for")
        _unpack(archive, folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Only what is needed, by its bare name; whole or not at all."""
    vocabularies = tuple(f"ggml-vocab-{name}.gguf" for name in VOCABULARIES)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tarfile.open(archive) as tar:
        part = Path(temporary) / "part"
        part.mkdir()
        for member in tar:
            name = Path(member.name).name
            needed = name.endswith(".jinja") or name.removesuffix(".inp").removesuffix(".out") in vocabularies
            if member.isfile() and member.name.startswith(_INSIDE) and needed:
                content = tar.extractfile(member)
                assert content is not None
                (part / name).write_bytes(content.read())
        try:
            part.rename(folder)
        except OSError:  # another run was faster
            assert folder.is_dir()
