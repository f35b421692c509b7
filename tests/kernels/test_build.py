"""How the native kernels are compiled: several at a time, with progress, stoppable, and leaving only the library."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from twostroke.kernels.cpu import build
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kernels.cpu.folder import forget_empty_folder, library_folder, take_lock

REAL = shutil.which("c++") or shutil.which("g++")
COMPILER = """#!/bin/sh
case "$*" in
*--version*) echo a compiler of the tests ;;
*" -c "*) {compile} ;;
*) echo 'extern "C" int twostroke_self_check() {{ return {check}; }}' > check.cpp
   for last; do :; done; exec {real} -shared -fPIC check.cpp -o "$last" ;;
esac
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache" / "twostroke" / "kernels"


def use_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, compile: str = ":", check: int = 0) -> None:
    compiler = folder / "c++"
    compiler.write_text(COMPILER.format(compile=compile, check=check, real=REAL))
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
def test_files_are_compiled_one_by_one_and_nothing_but_the_library_stays(cache, tmp_path, monkeypatch):
    use_compiler(tmp_path, monkeypatch, compile='echo "$@" >> ' + str(tmp_path / "calls"))
    seen: list[tuple[int, int]] = []
    library = build.build(("-DX",), lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(build.SOURCES)) for done in range(len(build.SOURCES) + 1)]
    assert sorted(path.name for path in cache.iterdir()) == [library.name, "lock"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(Path(call.split(" -c ")[1].split()[0]).name for call in calls) == sorted(
        Path(name).name for name in build.SOURCES
    )
    assert all(" ".join((*build.FLAGS, "-DX")) in call for call in calls)
    assert build.build(("-DX",), lambda *_: seen.append((0, 0))) == library
    assert (0, 0) not in seen  # it was found


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
def test_a_library_that_is_there_waits_for_no_build_of_others(cache, tmp_path, monkeypatch):
    use_compiler(tmp_path, monkeypatch)
    library = build.build(("-DX",))
    monkeypatch.setattr(build, "_LOCK_S", 0)
    with (cache / "lock").open("w") as lock:
        assert take_lock(lock)
        assert build.build(("-DX",)) == library
        seen = []
        with pytest.raises(build.BuildLate, match="another process has held"):
            build.build(("-DY",), lambda *told: seen.append(told))
        assert seen in ([], [(0, 0)]), "it says once that it waits"


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
def test_a_build_that_is_too_slow_is_not_tried_again_with_fewer_instruction_sets(cache, tmp_path, monkeypatch):
    use_compiler(tmp_path, monkeypatch, compile=f'echo "$@" >> {tmp_path}/calls; sleep 100 & wait')
    monkeypatch.setattr(build, "_FILE_S", 5)
    monkeypatch.setattr(build, "_machine_flags", lambda: [("-DX",), ("-DY",)])
    build._outcome.cache_clear()
    with pytest.raises(NativeUnavailable, match=r"no file of it was done for 5 s; try again"):
        build.built_library()
    build._outcome.cache_clear()
    assert "-DY" not in (tmp_path / "calls").read_text()
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ({"compile": "echo a.cpp:1: error: no such thing >&2; echo more >&2; exit 1"}, "error: no such thing"),
        ({"compile": "exit 3"}, "status 3"),
        ({"check": 7}, "do not compute right here: status 7"),
    ],
)
def test_a_failed_build_says_why_and_leaves_nothing(cache, tmp_path, monkeypatch, compiler, words):
    use_compiler(tmp_path, monkeypatch, **compiler)
    with pytest.raises(NativeUnavailable, match=words):
        build.build(())
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_build_that_is_stopped_ends_its_compilers_and_leaves_nothing(cache, tmp_path, monkeypatch):
    use_compiler(tmp_path, monkeypatch, compile=f"echo $$ >> {tmp_path}/pids; sleep 100 & wait")
    failures: list[str] = []

    def run() -> None:
        try:
            build.built_library(lambda *_: None)
        except NativeUnavailable as error:
            failures.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    _until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
    build.stop_building(30.0)
    thread.join(10)
    assert not thread.is_alive()  # it does not try other flags
    assert failures == ["building the native kernels was given up: it was stopped"]
    assert [path.name for path in cache.iterdir()] == ["lock"]
    for process in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{process}").exists()


def test_the_rest_of_a_killed_build_is_removed_by_the_next(cache, tmp_path, monkeypatch):
    use_compiler(tmp_path, monkeypatch, compile="exit 1")
    (cache / "0123.building").mkdir(parents=True)
    with pytest.raises(NativeUnavailable):
        build.build(())
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_builder_whose_launcher_is_gone_stops(cache, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(compile=f"touch {tmp_path}/began; sleep 100", check=0, real=REAL))
    compiler.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "twostroke.kernels.cpu.build", "1"]  # its parent is another one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "it was stopped" in done.stdout
    assert [path.name for path in cache.iterdir()] == ["lock"]


# ---------------------------------------------------------------- where the library lies


@pytest.mark.parametrize("home", ["/proc", "relative"])
def test_where_the_cache_cannot_be_written_all_processes_of_a_user_share_a_folder(cache, monkeypatch, home, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home)  # relative: what lies there is executed, so nobody may stand in it
    directory = library_folder()
    assert directory == tmp_path / "temporary" / f"twostroke-kernels-{os.getuid()}"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert library_folder() == directory
    (directory / "lock").touch()
    forget_empty_folder()
    assert not directory.exists()


def test_a_shared_folder_that_others_can_write_to_or_that_is_a_link_is_not_used(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    shared = tmp_path / "temporary" / f"twostroke-kernels-{os.getuid()}"
    (tmp_path / "temporary").chmod(0o1777)
    shared.mkdir()
    shared.chmod(0o777)
    assert library_folder() != shared
    shared.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    shared.symlink_to(tmp_path / "elsewhere")
    assert library_folder() != shared


def test_a_folder_with_a_library_is_kept(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    directory = library_folder()
    (directory / "lock").touch()
    (directory / "a.so").touch()
    forget_empty_folder()
    assert (directory / "a.so").exists()


def _until(holds) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)
