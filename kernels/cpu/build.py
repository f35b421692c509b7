"""Builds the native CPU kernels on the machine that runs them, once, and keeps the library. Knows no tensor.

The sources beside this file are compiled for exactly this CPU with the machine's own C++ compiler, which takes some
twenty seconds, and are tried in a process of their own before anybody uses them. Without a compiler, everything runs
without them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

SOURCES = tuple(
    f"{name}.cpp"
    for name in ("pack", "linear", "linear_int8", "head", "rows", "attention", "digest", "layers", "check")
)
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # bits: nothing is fused but what the sources fuse
    "-fno-math-errno",
    "-w",
)
_BUILD_S = 300
_CHECK = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).twostroke_self_check())"


class NativeUnavailable(Exception):
    """The kernels cannot be had here; the message says why and what would help."""


@functools.cache
def built_library() -> Path:
    """The shared library for this machine, built if it is not there yet (several processes may ask at once).

    Raises:
        NativeUnavailable: no compiler, a failed build, or a library that does not compute right.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return build(())
    try:
        return build(("-march=native",))
    except NativeUnavailable:
        # Tiles are the one thing that a CPU may have and its system (a container's seccomp, an old kernel) refuse.
        return build(("-march=native", "-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"))


def build(machine_flags: tuple[str, ...]) -> Path:
    """`built_library` for flags that name a machine: tests build for older ones too."""
    compiler = find_compiler()
    directory = _cache_directory()
    library = directory / f"{_name(compiler, machine_flags)}.so"
    with (directory / "lock").open("w") as lock:
        _wait_for(lock)  # whoever comes second finds it built
        if not library.exists():
            _compile(compiler, machine_flags, library)
    return library


def find_compiler() -> str:
    """The machine's C++ compiler.

    Raises:
        NativeUnavailable: there is none.
    """
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found: install g++ or clang (Debian: apt install g++)")
    return compiler


def _wait_for(lock: IO[str]) -> None:
    """Take the lock, for as long as another process may take to build and try.

    Raises:
        NativeUnavailable: that process does not come to an end.
    """
    give_up_s = time.monotonic() + 2 * _BUILD_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_s:
                raise NativeUnavailable(f"another process has held {lock.name} for {2 * _BUILD_S} s") from None
            time.sleep(0.1)


def _compile(compiler: str, machine_flags: tuple[str, ...], library: Path) -> None:
    here = Path(__file__).parent
    unfinished = library.with_suffix(f".{os.getpid()}")
    sources = [str(here / name) for name in SOURCES]
    try:
        _run([compiler, *FLAGS, *machine_flags, *sources, "-o", str(unfinished)], "building the native kernels failed")
        _run([sys.executable, "-c", _CHECK, str(unfinished)], "the native kernels do not compute right here")
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: list[str], complaint: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{complaint}: {error}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise NativeUnavailable(f"{complaint}: {last[0]}")


def _name(compiler: str, machine_flags: tuple[str, ...]) -> str:
    """One name per sources, flags, compiler and CPU: none is ever used for another."""
    here = Path(__file__).parent
    hasher = hashlib.blake2b(digest_size=12)
    for source in (*(here / name for name in SOURCES), *sorted(here.glob("*.h"))):
        hasher.update(source.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=False).stdout
    hasher.update(repr((FLAGS, machine_flags, version, cpu_features())).encode())
    return hasher.hexdigest()


def cpu_features() -> str:
    """Model and instruction sets of this CPU, as the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return " ".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _cache_directory() -> Path:
    """A folder of this user's that nobody else can write to: what lies in it is executed."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "twostroke" / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = directory.stat()
        safe = facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if safe and os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):
        pass
    return _own_directory()


@functools.cache
def _own_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="twostroke-kernels-"))


def _main() -> None:
    try:
        print(f"native kernels: {built_library()}")
    except NativeUnavailable as error:
        print(f"no native kernels, everything runs without them but slower: {error}")


if __name__ == "__main__":
    _main()
