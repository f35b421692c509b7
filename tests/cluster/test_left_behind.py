"""What killed runs leave behind, and what running ones must not lose: folders, processes of Ray, the environment."""

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from twostroke.cluster.launch.environment import member_environment
from twostroke.cluster.launch.ray_processes import end_processes
from twostroke.cluster.launch.ray_session import RaySession
from twostroke.cluster.scratch import Scratch
from twostroke.core.errors import ConfigError

HOLD = "from twostroke.cluster.scratch import Scratch; s = Scratch('twostroke-'); print(s.path, flush=True); input()"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_the_folder_of_a_killed_run_is_removed_by_the_next_and_that_of_a_living_one_is_not(temporary: Path):
    (temporary / "twostroke-of-somebody-else").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().decode().strip())
        living = Scratch("twostroke-")
        assert held.is_dir()
        assert held.stat().st_mode & 0o77 == 0
        holder.kill()
    again = Scratch("twostroke-")
    assert not held.exists()
    assert {path.name for path in temporary.iterdir()} == {
        "twostroke-of-somebody-else",
        living.path.name,
        again.path.name,
    }
    for scratch in (living, again):
        scratch.remove()
        scratch.remove()
        assert not scratch.path.exists()


def test_all_processes_that_name_a_folder_end_and_their_children_too(tmp_path: Path):
    children = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True); input()"
    ours = subprocess.Popen(
        [sys.executable, "-c", children], stdout=subprocess.PIPE, stdin=subprocess.PIPE, env={"AT": str(tmp_path)}
    )
    other = subprocess.Popen(["sleep", "100"])
    assert ours.stdout is not None
    child = int(ours.stdout.readline())
    try:
        end_processes(tmp_path)
        assert ours.wait(10) == -9
        assert Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z" if _exists(child) else True
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        ours.communicate()


def _exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_an_aborted_start_of_ray_makes_nothing_more(temporary: Path):
    session = RaySession(None)
    opened, aborted, outcome = threading.Event(), threading.Event(), list[str]()

    def open_slowly() -> None:
        session._opener = threading.current_thread()
        opened.set()
        aborted.wait(30)
        for make in (lambda: subprocess.Popen(["true"]), (temporary / "more").mkdir):
            try:
                make()
                outcome.append("made")
            except RuntimeError as error:
                outcome.append(str(error))

    thread = threading.Thread(target=open_slowly)
    thread.start()
    opened.wait(30)
    session.abort()
    aborted.set()
    thread.join(30)
    assert outcome == ["Ray's start was aborted"] * 2
    assert list(temporary.iterdir()) == []
    session.open()  # too late: it does nothing


def test_a_ray_that_was_too_slow_to_start_is_started_again_in_a_fresh_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
):
    session, outcomes = RaySession(None), ["node timed out during startup", "it timed out again", ""]

    def start(folder: Path, empty: Path) -> None:
        folder.mkdir()  # fails if the last attempt left it
        assert empty.is_dir()
        if why := outcomes.pop(0):
            raise RuntimeError(why)

    monkeypatch.setattr(session, "_start", start)
    session.open()
    assert not outcomes
    outcomes += ["node timed out"] * 3 + ["no such file"]
    other = RaySession(None)
    monkeypatch.setattr(other, "_start", start)
    with pytest.raises(ConfigError, match="Ray did not start: node timed out"):
        other.open()
    with pytest.raises(ConfigError, match="no such file"):  # which no second attempt would mend
        other.open()
    assert not outcomes
    for each in (session, other):
        each.close()
    assert list(temporary.iterdir()) == []


def test_a_local_ray_is_ours_whatever_the_environment_says(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    given = {
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_REDIS_ADDRESS": "10.0.0.1",
        "RAY_RUNTIME_ENV_HOOK": "x",
        "RAY_TMPDIR": "/x",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    session = RaySession(None)
    with session._environment(session._scratch.path):
        assert not {"RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_RUNTIME_ENV_HOOK"} & set(os.environ)
        assert os.environ["RAY_TMPDIR"] == str(session._scratch.path)
        assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    assert {name: os.environ[name] for name in given} == given
    session.close()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_after_several_attempts_to_start_a_ray_the_program_has_its_own_settings_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
):
    given = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": mode and "/of/the/program"}
    for name, value in given.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    session = RaySession(None)
    for _ in range(2):
        with session._environment(session._scratch.path):
            pass
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(session._scratch.path / "token")
    session.close()
    assert {name: os.environ.get(name) for name in given} == given


IMPORTED_BEFORE = """
import os, sys
from pathlib import Path
os.environ["RAY_AUTH_MODE"] = sys.argv[2]
import ray
from twostroke.cluster.launch import ray_guard
from twostroke.core.errors import ConfigError
folder = Path(sys.argv[1])
before = ray_guard.set_variables(ray_guard.token_settings(folder))
assert (folder / "token").stat().st_mode & 0o77 == 0
try:
    ray_guard.check_token()
    print("asks")
except ConfigError as error:
    print("refused:", error)
ray_guard.read_settings()
ray_guard.check_token()
print("asks")
ray_guard.token_settings(folder)
ray_guard.read_settings()
assert ray._raylet.AuthenticationTokenLoader.instance().get_raw_token() == (folder / "token").read_text()
ray_guard.set_variables(before)
ray_guard.read_settings()
print("token" if ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN else "disabled")
with ray_guard.on_loopback():
    ray_guard.check_loopback()
    print(ray.util.get_node_ip_address())
print(ray._private.ray_constants.ENABLE_RAY_CLUSTER, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ)
"""


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_ray_that_was_imported_before_asks_for_our_token_all_the_same(tmp_path: Path, mode: str):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_BEFORE, str(tmp_path), mode],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith(
        "refused: it would ask nobody for a token (RAY_AUTH_MODE)" if mode == "disabled" else "asks"
    )
    assert others == ["asks", mode, "127.0.0.1", f"{sys.platform == 'linux'} False"]


def test_members_never_look_into_the_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    given = {"PYTHONPATH": f":src{os.pathsep}/opt/lib:", "TWOSTROKE__CLUSTER__KEY": "k", "HOME": "/root"}
    found = member_environment(given)
    assert found == {"PYTHONPATH": f"{tmp_path}/src:/opt/lib", "HOME": "/root", "PYTHONSAFEPATH": "1"}
    assert "PYTHONPATH" not in member_environment({"PYTHONPATH": ":"})


def test_a_folder_is_locked_for_as_long_as_it_is_in_use(temporary: Path):
    scratch = Scratch("twostroke-")
    with (scratch.path / "in-use").open("r+") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    scratch.remove()
