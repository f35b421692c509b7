"""Our CPU kernels as older machines would have them, built once for all tests. Skips what this machine cannot run."""

import functools

import pytest

from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable, build, cpu_features

LEVELS = {  # of instructions, and by which of its flags a CPU shows that it has them
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"},
    "x86-64": {"sse2"},
}
# `make targets` plays them: each is half a minute of compiling.
PLAYED = [pytest.param(level, marks=pytest.mark.campaign) for level in LEVELS]
QUICK = "-O1"  # half of the compiling; bits hang on the order that the sources write, as those of -O3 on this machine


@functools.cache
def _library(flags: tuple[str, ...]) -> native.Library | str:
    try:
        return native.Library(build(flags))
    except NativeUnavailable as error:
        return str(error)


def library_for(level: str) -> native.Library:
    """The kernels for a level of `LEVELS`, or "native": exactly this machine's, as they are served."""
    missing = LEVELS.get(level, set()) - set(cpu_features().split())
    if missing:
        pytest.skip(f"this machine lacks {', '.join(sorted(missing))}")
    library = _library((f"-march={level}",) if level == "native" else (f"-march={level}", QUICK))
    if isinstance(library, str):
        pytest.skip(library)
    return library
