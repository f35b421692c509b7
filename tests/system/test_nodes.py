"""A cluster over two machines, joined by Ray: both have a role, KV goes over the network with TLS, one is lost."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.clusters.namespaces import Machines, machines

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(600)]

DEPLOY = Path(__file__).parents[2] / "deploy/ray"
RAY_PORT, HTTP, GRPC = 6391, 25801, 25802
PATIENCE_S = 150.0
ASK = """
import json, sys
from twostroke import Client
with Client("127.0.0.1:{grpc}", timeout_s=120) as client:
    done = client.generate("def add(a, b):\\n" * 60, max_tokens=16, temperature=0.0)
    known = client.cluster()
    workers = {{w["worker_id"]: [w["state"], w["address"]] for w in known["workers"]}}
    print(json.dumps([done.choices[0].token_ids, workers]))
"""


class RayOnBoth:
    """`ray start` on both machines, and `twostroke serve` on the first."""

    def __init__(self, made: Machines, folder: Path) -> None:
        self.machines, self._folder = made, folder
        self._environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._said = (folder / "serve.log").open("w")
        self.serving: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        first, second = self.machines.addresses
        head = ["--head", f"--port={RAY_PORT}", f"--temp-dir={self._folder}/r", "--include-dashboard=false"]
        self._ray(0, [*head, f"--node-ip-address={first}"])
        self._ray(1, [f"--address={first}:{RAY_PORT}", f"--node-ip-address={second}"])

    def serve(self, *flags: str) -> None:
        command = [sys.executable, "-P", "-m", "twostroke.cli.main", "serve", "--launcher", "ray"]
        command += ["--ray-address", f"{self.machines.addresses[0]}:{RAY_PORT}", "--port", str(HTTP)]
        command += ["--grpc-port", str(GRPC), "--kv-cache-tokens", "8192", *flags]
        self.serving = subprocess.Popen(
            self.machines.on(0, command), env=self._environment, stdout=self._said, stderr=self._said
        )
        self.until(lambda: "is served at" in self.said, "the cluster serves")

    @property
    def said(self) -> str:
        return " ".join(Path(self._said.name).read_text().split())

    def ask(self) -> Any:
        program = ASK.format(grpc=GRPC)
        done = subprocess.run(
            self.machines.on(0, [sys.executable, "-P", "-c", program]),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stderr}\n{self.said[-3000:]}"
        return json.loads(done.stdout)

    def until(self, holds: Any, what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.serving is None or self.serving.poll() is None, self.said
            assert time.monotonic() < end_s, f"not within {PATIENCE_S:g} s: {what}\n{self.said[-3000:]}"
            time.sleep(0.2)

    def _ray(self, machine: int, words: list[str]) -> None:
        ray = Path(sys.executable).with_name("ray")
        command = [
            str(ray),
            "start",
            *words,
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        ]
        done = subprocess.run(
            self.machines.on(machine, command),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        if self.serving is not None and self.serving.poll() is None:
            self.serving.send_signal(signal.SIGTERM)
            try:
                self.serving.wait(30)
            except subprocess.TimeoutExpired:
                self.serving.kill()
        self._said.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets."""
    made = Path(tempfile.mkdtemp(prefix="tsn-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def both_empty(folder: Path) -> Iterator[Machines]:  # which is removed after the machines
    with machines() as made:
        yield made


@pytest.fixture
def both(both_empty: Machines, folder: Path) -> Iterator[RayOnBoth]:
    cluster = RayOnBoth(both_empty, folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_a_cluster_over_two_machines_outlives_one(both: RayOnBoth):
    both.serve("--prefill", "1", "--decode", "1", "--kv-transport", "grpc")
    before = both.machines.received_bytes(1)
    ids, workers = both.ask()
    first, second = both.machines.addresses
    assert workers["prefill-0"][1].split(":")[0] == first
    assert workers["decode-0"][1].split(":")[0] == second
    assert both.machines.received_bytes(1) - before > 100_000  # the prompt's KV
    assert "mutual TLS" in both.said
    both.machines.power_off(1)
    again, _ = both.ask()  # waits for the decode worker, which moves
    assert again == ids
    both.until(lambda: "decode-0 moves to" in both.said, "the move is said")
    ids, workers = both.ask()
    assert workers["decode-0"][0] == "live"
    assert workers["decode-0"][1].split(":")[0] == first


SSHD = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin yes
UsePAM no
StrictModes no
PasswordAuthentication no
MaxStartups 100
"""


def test_ray_up_and_down_as_in_the_readme(both_empty: Machines, folder: Path):
    """`ray up`, `twostroke up`, an answer, `down`, `ray down`: by ssh alone, and nothing runs afterwards."""
    for program in ("sshd", "rsync", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: openssh-server, rsync)")
    probe = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(both_empty.on(0, probe), capture_output=True, check=False).returncode:
        pytest.skip("processes cannot have numbers of their own here (unshare --pid --mount-proc)")
    home = folder / "home"
    home.mkdir()
    for key in ("id", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd.conf").write_text(SSHD.format(folder=folder))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    inside = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    inside |= {"RAY_AUTH_TOKEN_PATH": f"{folder}/remote-token", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    inside |= {"PYTHONSAFEPATH": "1", "TMPDIR": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    find = f"RAY_ADDRESS={both_empty.addresses[0]}:6379"  # else Ray looks for it in /tmp/ray
    # Both machines have this one's files. Where these commands run, the home of root is in the folder.
    accounts = Path("/etc/passwd").read_text().replace(":/root:", f":{home}:")
    (folder / "passwd").write_text(accounts)
    with_home = ["sh", "-c", f'mount --bind {folder}/passwd /etc/passwd && exec "$@"', "sh"]
    (home / ".bashrc").write_text("".join(f"export {name}={value}\n" for name, value in inside.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    daemons = []
    for machine, address in enumerate(both_empty.addresses):
        # With process numbers of its own: `ray stop` ends every Ray that it sees.
        command = ["unshare", "--pid", "--fork", "--mount-proc", shutil.which("sshd") or "", "-D"]
        command += ["-f", str(folder / "sshd.conf"), "-o", f"ListenAddress={address}"]
        command += ["-o", f"PidFile={folder}/sshd-{machine}", "-E", f"{folder}/sshd-{machine}.log"]
        daemons.append(subprocess.Popen(both_empty.on(machine, [*with_home, *command])))
    given = _as_here(folder, both_empty)

    def ray(*words: str, timeout_s: float = PATIENCE_S) -> str:
        command = both_empty.on(0, [*with_home, str(Path(sys.executable).with_name("ray")), *words])
        surroundings = os.environ | inside | {"RAY_AUTH_TOKEN_PATH": f"{folder}/token", "HOME": str(home)}
        said = folder / "said.txt"  # no pipe: ssh's shared connections live on for some seconds and keep it open
        with said.open("w") as out:
            done = subprocess.run(
                command, env=surroundings, stdout=out, stderr=out, timeout=timeout_s, check=False, cwd=folder
            )
        assert done.returncode == 0, said.read_text()[-3000:]
        return said.read_text()

    ray("up", "-y", "--no-config-cache", given)
    end_s = time.monotonic() + PATIENCE_S
    while "/2.0 CPU" not in ray("exec", given, f"{find} ray status"):
        assert time.monotonic() < end_s, "the second node never came"
        time.sleep(1)
    started = ray("exec", given, f"{find} twostroke up --config {folder}/cluster.yaml")
    assert "is served at" in started
    ask = f'from twostroke import Client; print(Client("127.0.0.1:{GRPC}").generate("def add(a, b):", max_tokens=4))'
    (folder / "ask.py").write_text(ask)
    assert "token_ids" in ray("exec", given, f"python -P {folder}/ask.py")
    status = ray("exec", given, f"twostroke status --grpc 127.0.0.1:{GRPC}")
    for address in both_empty.addresses:
        assert f"{address}:" in status, status
    assert "mutual TLS" in status
    assert "stopped" in ray("exec", given, f"twostroke down --grpc 127.0.0.1:{GRPC}")
    ray("down", "-y", given)
    second = ["ssh", "-i", f"{folder}/id", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    second += [f"root@{both_empty.addresses[1]}", "bash -ic 'ray stop'"]  # `ray down` stops the head's Ray alone
    subprocess.run(both_empty.on(0, second), check=True, timeout=PATIENCE_S, capture_output=True)
    end_s = time.monotonic() + PATIENCE_S
    while left := [line for machine in (0, 1) for line in both_empty.commands(machine) if "ssh" not in line]:
        assert time.monotonic() < end_s, left
        time.sleep(0.5)
    for machine in (0, 1):
        both_empty.power_off(machine)
    for daemon in daemons:
        daemon.wait(30)


def _as_here(folder: Path, made: Machines) -> str:
    """deploy/ray/local.yaml and cluster.yaml, for these machines."""
    values = yaml.safe_load((DEPLOY / "local.yaml").read_text())
    values["provider"] |= {"head_ip": made.addresses[0], "worker_ips": made.addresses[1:]}
    values["auth"] = {"ssh_user": "root", "ssh_private_key": f"{folder}/id"}
    values["file_mounts"] = {f"{folder}/remote-token": f"{folder}/token"}  # both are here already
    values["setup_commands"] = []
    limits = f" --num-cpus=1 --object-store-memory=100000000 --temp-dir={folder}/r"
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        values[name] = [
            c + (limits if name.startswith("head") else limits.rpartition(" ")[0]) if "start" in c else c
            for c in values[name]
        ]
    (folder / "up.yaml").write_text(yaml.safe_dump(values))
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    cluster["router"] |= {"port": HTTP, "grpc_port": GRPC}
    cluster["cache"] = {"tokens": 8192}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return str(folder / "up.yaml")
