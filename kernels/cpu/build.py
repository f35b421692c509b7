"""Build of the native CPU kernels, once per machine, and the cache of built libraries. Knows no tensor.

The machine's C++ compiler compiles the sources beside this file for exactly this CPU, which takes about twenty seconds.
A library must pass its self-test in a separate process before it enters the cache. Without a compiler, the model runs
without these kernels.
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

from .commands import POLL_S, CommandFailed, Commands, CommandsLate, CommandsStopped
from .folder import forget_empty_folder, library_folder, take_lock

SOURCES = tuple(  # longest compile first, so that all cores end together
    f"{name}.cpp"
    for name in (
        "attention",
        "linear/int8",
        "linear/avx2",
        "linear/int4",
        "linear/int8_avx2",
        "linear/int4_avx2",
        "linear/linear",
        "linear/pack",
        "rows",
        "low_rank",
        "recurrent/delta",
        "head",
        "check",
        "layers",
        "group",
        "digest",
    )
)
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # only the sources decide which products and sums are fused: it changes bits
    "-fno-math-errno",
    "-w",
)
_FILE_S = 600  # longest time in which no file is done
_LOCK_S = 4 * _FILE_S  # longest wait for the build of another process
_CHECK = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).twostroke_self_check())"

Progress = Callable[[int, int], None]
"""Called with the number of compiled sources and the number of all sources; (0, 0): another process builds them."""

_builds: set[Commands] = set()  # running in this process
_leaving: list[int] = []  # the signal that ends this process, while a build stops


class NativeUnavailable(Exception):
    """The kernels cannot be built or used here. The message names cause and remedy."""


class BuildStopped(NativeUnavailable):
    """`stop_building` was called."""


class BuildLate(NativeUnavailable):
    """The machine is too busy. Fewer instruction sets would not be compiled faster."""


def built_library(progress: Progress | None = None) -> Path:
    """The shared library for this machine; built if it is missing. Several processes may call this at once.

    Raises:
        NativeUnavailable: no compiler, a failed build, or a library that fails its self-test.
    """
    outcome = _outcome(progress)
    if isinstance(outcome, str):
        raise NativeUnavailable(outcome)
    return outcome


@functools.cache
def _outcome(progress: Progress | None) -> Path | str:
    """The library, or why there is none. A process does not repeat a failed build."""
    failure = ""
    for machine_flags in _machine_flags():
        try:
            return build(machine_flags, progress)
        except BuildStopped:
            raise
        except BuildLate as error:
            return str(error)
        except NativeUnavailable as error:
            failure = failure or str(error)
    return failure


def found_library() -> Path | None:
    """The shared library for this machine; None if it is not built yet.

    Raises:
        NativeUnavailable: no compiler, so the library can neither be named nor built.
    """
    compiler, directory = find_compiler(), library_folder()
    names = (directory / f"{_name(compiler, flags)}.so" for flags in _machine_flags())
    return next((library for library in names if library.exists()), None)


def build(machine_flags: tuple[str, ...], progress: Progress | None = None) -> Path:
    """`built_library` for the flags of a given machine: tests build for older machines too."""
    compiler = find_compiler()
    name, commands = _name(compiler, machine_flags), Commands(_FILE_S)
    built = library_folder() / f"{name}.so"
    if built.exists():  # it came there whole; the lock may be held for minutes by a build of other sources
        return built
    _builds.add(commands)
    try:
        with _locked_cache(commands, progress) as directory:  # a second process finds the library built
            library = directory / f"{name}.so"
            if not library.exists():
                _compile(compiler, machine_flags, library, commands, progress)
            return library
    except CommandsStopped as error:
        raise BuildStopped(f"building the native kernels was given up: {error}") from None
    except CommandsLate as error:
        raise BuildLate(f"building the native kernels was given up: {error}") from None
    except (CommandFailed, OSError) as error:
        raise NativeUnavailable(f"building the native kernels failed: {error}") from None
    finally:
        _builds.discard(commands)


def stop_building(within_s: float) -> None:
    """Stop every build of this process and wait up to `within_s` until its files are removed.

    Callers of a stopped build get `BuildStopped`.
    """
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
    """Sets of flags to try: exactly this CPU, then without AMX tiles."""
    if platform.machine() in ("aarch64", "arm64"):
        return [("-mcpu=native",), ()]
    if platform.machine() not in ("x86_64", "AMD64"):
        return [()]
    # A CPU may have tiles while its system (seccomp in a container, an old kernel) refuses them.
    return [("-march=native",), ("-march=native", "-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")]


@contextmanager
def _locked_cache(commands: Commands, progress: Progress | None) -> Iterator[Path]:
    """The cache's folder, locked for this process. Waits for the lock as long as a build and its self-test may take.

    Raises:
        CommandsLate: another process held the lock too long.
        CommandsStopped: `stop_building` was called.
    """
    give_up_s, waits = time.monotonic() + _LOCK_S, False
    while True:
        directory = library_folder()
        with (directory / "lock").open("w") as lock:
            if take_lock(lock):
                yield directory
                return
        if time.monotonic() > give_up_s:
            raise CommandsLate(f"another process has held {directory / 'lock'} for {_LOCK_S} s")
        if progress is not None and not waits:
            progress(0, 0)
        waits = True
        commands.check_wanted()
        time.sleep(0.1)


def _compile(
    compiler: str, machine_flags: tuple[str, ...], library: Path, commands: Commands, progress: Progress | None
) -> None:
    """Compile, link, test, and then move the library to its name. Removes other files; the caller holds the lock."""
    for abandoned in library.parent.glob("*.building"):  # left by a killed process
        shutil.rmtree(abandoned, ignore_errors=True)
    folder = library.with_suffix(".building")
    folder.mkdir(mode=0o700)
    here, unfinished = Path(__file__).parent, folder / "library.so"
    objects = {name: folder / f"{name.replace('/', '-')}.o" for name in SOURCES}
    compiles = [
        [compiler, *FLAGS, *machine_flags, f"-I{here}", "-c", str(here / name), "-o", str(made)]
        for name, made in objects.items()
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
    """Name of a library: a hash of sources, flags, compiler and CPU."""
    here = Path(__file__).parent
    hasher = hashlib.blake2b(digest_size=12)
    for source in (*(here / name for name in SOURCES), *sorted(here.rglob("*.h"))):
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
    """Build and print progress, a line at a time, for `make setup` and for launchers.

    A launcher passes its process id; the build stops when that process has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if len(sys.argv) > 1:
        threading.Thread(target=_outlive, args=(int(sys.argv[1]),), daemon=True).start()

    def show(num_done: int, total: int) -> None:
        if not total:
            print("waiting for another process, which compiles native kernels for this CPU", flush=True)
            return
        what = "compiling native kernels for this CPU (about 20 s where nothing else runs)"
        print(f"{what} … {num_done} of {total} files", flush=True)

    try:
        print(f"native kernels: {built_library(show)}")
    except NativeUnavailable as error:
        if _leaving:
            raise SystemExit(128 + _leaving[0]) from None
        print(f"no native kernels, everything runs without them but slower: {error}")
    finally:
        forget_empty_folder()


def _leave(number: int, _: object) -> None:
    """Stop a build, which ends its compilers and removes their files; without one, exit.

    An exception here could come while a compiler is started and not yet known: it would outlive this process.
    """
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    if not _builds:
        raise SystemExit(128 + number)
    _leaving.append(number)
    stop_building(0.0)


def _outlive(parent_pid: int) -> None:
    while True:
        if os.getppid() != parent_pid:
            stop_building(0.0)  # repeatedly: a build may begin after a call
        time.sleep(0.1)


if __name__ == "__main__":
    _main()
