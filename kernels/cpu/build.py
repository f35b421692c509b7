"""Builds the native CPU kernels on the machine that runs them, once, and keeps the library. Knows no tensor.

The sources beside this file are compiled for exactly this CPU with the machine's own C++ compiler, which takes some
twenty seconds, and are tried in a process of their own before anybody uses them. Without a compiler, everything runs
without them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import POLL_S, CommandFailed, Commands, CommandsStopped
from .folder import forget_empty_folder, library_folder, take_lock

SOURCES = tuple(  # what takes longest first, so that the cores end together
    f"{name}.cpp"
    for name in ("linear_int8", "attention", "linear", "pack", "head", "rows", "check", "layers", "digest")
)
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # bits: nothing is fused but what the sources fuse
    "-fno-math-errno",
    "-w",
)
_BUILD_S = 300
_CHECK = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).twostroke_self_check())"

Progress = Callable[[int, int], None]
"""Called with how many sources are compiled, and how many there are."""

_builds: set[Commands] = set()  # of this process


class NativeUnavailable(Exception):
    """The kernels cannot be had here; the message says why and what would help."""


class BuildStopped(NativeUnavailable):
    """`stop_building` was called."""


def built_library(progress: Progress | None = None) -> Path:
    """The shared library for this machine, built if it is not there yet (several processes may ask at once).

    Raises:
        NativeUnavailable: no compiler, a failed build, or a library that does not compute right.
    """
    outcome = _outcome(progress)
    if isinstance(outcome, str):
        raise NativeUnavailable(outcome)
    return outcome


@functools.cache
def _outcome(progress: Progress | None) -> Path | str:
    """The library, or why there is none: a build that failed is not tried again by the same process."""
    failure = ""
    for machine_flags in _machine_flags():
        try:
            return build(machine_flags, progress)
        except BuildStopped:
            raise
        except NativeUnavailable as error:
            failure = failure or str(error)
    return failure


def found_library() -> Path | None:
    """The shared library for this machine, if it is built already.

    Raises:
        NativeUnavailable: no compiler, so that nobody can tell, and nobody could build it.
    """
    compiler, directory = find_compiler(), library_folder()
    names = (directory / f"{_name(compiler, flags)}.so" for flags in _machine_flags())
    return next((library for library in names if library.exists()), None)


def build(machine_flags: tuple[str, ...], progress: Progress | None = None) -> Path:
    """`built_library` for flags that name a machine: tests build for older ones too."""
    compiler = find_compiler()
    name, commands = _name(compiler, machine_flags), Commands(_BUILD_S)
    _builds.add(commands)
    try:
        with _locked_cache(commands) as directory:  # whoever comes second finds it built
            library = directory / f"{name}.so"
            if not library.exists():
                _compile(compiler, machine_flags, library, commands, progress)
            return library
    except CommandsStopped as error:
        raise BuildStopped(f"building the native kernels was given up: {error}") from None
    except (CommandFailed, OSError) as error:
        raise NativeUnavailable(f"building the native kernels failed: {error}") from None
    finally:
        _builds.discard(commands)


def stop_building(within_s: float) -> None:
    """End every build of this process and remove what it made so far; waits for that. Its caller gets an error."""
    give_up_s = time.monotonic() + within_s
    for commands in list(_builds):
        commands.stop()
    while _builds and time.monotonic() < give_up_s:
        time.sleep(POLL_S)


def find_compiler() -> str:
    """The machine's C++ compiler.

    Raises:
        NativeUnavailable: there is none.
    """
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found: install g++ or clang (Debian: apt install g++)")
    return compiler


def _machine_flags() -> list[tuple[str, ...]]:
    """For exactly this CPU; then without what its system may forbid."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return [()]
    # Tiles are the one thing that a CPU may have and its system (a container's seccomp, an old kernel) refuse.
    return [("-march=native",), ("-march=native", "-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")]


@contextmanager
def _locked_cache(commands: Commands) -> Iterator[Path]:
    """The cache's folder, for this process alone, for as long as another one may take to build and try.

    Raises:
        CommandFailed: that process does not come to an end, or `stop_building` was called.
    """
    give_up_s = time.monotonic() + 2 * _BUILD_S
    while True:
        directory = library_folder()
        with (directory / "lock").open("w") as lock:
            if take_lock(lock):
                yield directory
                return
        if time.monotonic() > give_up_s:
            raise CommandFailed(f"another process has held {directory / 'lock'} for {2 * _BUILD_S} s")
        commands.check_wanted()
        time.sleep(0.1)


def _compile(
    compiler: str, machine_flags: tuple[str, ...], library: Path, commands: Commands, progress: Progress | None
) -> None:
    """Compile, link, try, and only then let the library be found. Nothing else stays; the caller holds the lock."""
    for abandoned in library.parent.glob("*.building"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    folder = library.with_suffix(".building")
    folder.mkdir(mode=0o700)
    here, unfinished = Path(__file__).parent, folder / "library.so"
    objects = {name: folder / f"{name}.o" for name in SOURCES}
    compiles = [
        [compiler, *FLAGS, *machine_flags, "-c", str(here / name), "-o", str(made)] for name, made in objects.items()
    ]
    link = [compiler, *FLAGS, *machine_flags, "-shared", *map(str, objects.values()), "-o", str(unfinished)]

    def done(num_done: int) -> None:
        if progress is not None:
            progress(num_done, len(SOURCES))

    try:
        done(0)
        commands.run(folder, compiles, done)
        commands.run(folder, [link])
        try:
            commands.run(folder, [[sys.executable, "-I", "-c", _CHECK, str(unfinished)]])
        except CommandsStopped:
            raise
        except CommandFailed as error:
            raise NativeUnavailable(f"the native kernels do not compute right here: {error}") from None
        unfinished.replace(library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _main() -> None:
    """Build and report, a line at a time: for `make setup`, and for a launcher that shows the lines.

    A launcher gives its process id: when it is gone, nobody wants the library any more.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if len(sys.argv) > 1:
        threading.Thread(target=_outlive, args=(int(sys.argv[1]),), daemon=True).start()

    def show(num_done: int, total: int) -> None:
        what = "compiling native kernels for this CPU (about 20 s)"
        print(f"{what} … {num_done} of {total} files", flush=True)

    try:
        print(f"native kernels: {built_library(show)}")
    except NativeUnavailable as error:
        print(f"no native kernels, everything runs without them but slower: {error}")
    finally:
        forget_empty_folder()


def _leave(number: int, _: object) -> None:
    """Through every `finally`, which end the compilers and remove what they made."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _outlive(parent_pid: int) -> None:
    while True:
        if os.getppid() != parent_pid:
            stop_building(0.0)  # again and again: one may begin just now
        time.sleep(0.1)


if __name__ == "__main__":
    _main()
