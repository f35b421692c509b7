"""Builds the native CPU kernels on the machine that runs them, once, and keeps the library. Knows no tensor.

The sources beside this file are compiled for exactly this CPU with the machine's own C++ compiler, which takes some
twenty seconds, and are tried in a process of their own before anybody uses them. Without a compiler, everything runs
without them.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .commands import POLL_S, CommandFailed, Commands

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
        except NativeUnavailable as error:
            failure = failure or str(error)
    return failure


def found_library() -> Path | None:
    """The shared library for this machine, if it is built already.

    Raises:
        NativeUnavailable: no compiler, so that nobody can tell, and nobody could build it.
    """
    compiler, directory = find_compiler(), _cache_directory()
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
        directory = _cache_directory()
        with (directory / "lock").open("w") as lock:
            if _is_taken(lock):
                yield directory
                return
        if time.monotonic() > give_up_s:
            raise CommandFailed(f"another process has held {directory / 'lock'} for {2 * _BUILD_S} s")
        commands.check_wanted()
        time.sleep(0.1)


def _is_taken(lock: IO[str]) -> bool:
    """Whether the lock is ours now, and still lies where others look for it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except OSError:
        return False


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


def _cache_directory() -> Path:
    """A folder of this user's that nobody else can write to: what lies in it is executed."""
    for directory in (_home_cache(), _shared_folder()):
        if directory is not None and _is_ours(directory):
            return directory
    return _own_directory()


def _home_cache() -> Path | None:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None  # a user without a home
    return base / "twostroke" / "kernels" if base.is_absolute() else None  # none of the folder that somebody stands in


def _shared_folder() -> Path:
    """Of all processes of this user where the cache cannot be written: else each would build for itself."""
    return Path(tempfile.gettempdir()).absolute() / f"twostroke-kernels-{os.getuid()}"


def _is_ours(directory: Path) -> bool:
    """Whether it is there, now, for us alone to write to. In a folder of everybody's, a link is not trusted."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = directory.stat(follow_symlinks=not directory.parent.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return False
    is_safe = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return is_safe and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(directory, os.W_OK)


@functools.cache
def _own_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="twostroke-kernels-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def forget_empty_cache() -> None:
    """Remove the folder under the temporary one if no library came to lie in it."""
    directory = _shared_folder()
    with suppress(OSError), (directory / "lock").open("r+") as lock:
        if _is_taken(lock) and not any(directory.glob("*.so")):
            shutil.rmtree(directory)


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
        forget_empty_cache()


def _leave(number: int, _: object) -> None:
    """Through every `finally`, which end the compilers and remove what they made."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _outlive(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.2)
    stop_building(0.0)


if __name__ == "__main__":
    _main()
