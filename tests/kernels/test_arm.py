"""The CPU kernels on 64-bit Arm, under qemu: they compute the bits of this machine's AVX2 build.

Needs a cross compiler and qemu's user mode (Debian: apt install g++-aarch64-linux-gnu qemu-user-static).
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.session.older_machines import LEVELS

from twostroke.kernels.cpu.build import FLAGS, SOURCES, cpu_features, find_compiler

CPU = Path(__file__).parents[2] / "kernels" / "cpu"
CROSS = shutil.which("aarch64-linux-gnu-g++") or ""
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64") or ""
QUICK = ("-O1", "-Wno-psabi")  # bits hang on the order that the sources write, not on the optimiser

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(not (CROSS and QEMU), reason="no cross compiler or no qemu-user for 64-bit Arm"),
]


def program(compiler: str, folder: Path, *flags: str) -> Path:
    """tests/kernels/every_kernel.cpp with all kernels, linked for a machine."""
    sources = [Path(__file__).with_name("every_kernel.cpp"), *(CPU / name for name in SOURCES)]
    made = folder / "every_kernel"
    command = [compiler, *FLAGS, *QUICK, *flags, f"-I{CPU}", *map(str, sources), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return made


def answers(*command: str) -> list[str]:
    """One line per call of a kernel: its name, and a digest of what it wrote."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stderr.split()[-1] == "0", f"the self-test failed: {done.stderr}"
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if missing := LEVELS["x86-64-v3"] - set(cpu_features().split()):
        pytest.skip(f"this machine lacks {', '.join(sorted(missing))}")
    return answers(str(program(find_compiler(), tmp_path_factory.mktemp("x86"), "-march=x86-64-v3")))


@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod", "armv8.6-a+i8mm+bf16"])
def test_every_kernel_computes_the_bits_of_a_machine_with_avx2(march: str, ours: list[str], tmp_path: Path) -> None:
    theirs = answers(QEMU, "-cpu", "max", str(program(CROSS, tmp_path, f"-march={march}", "-static")))
    assert len(ours) > 200
    assert theirs == ours
