"""Machines for tests: network namespaces of this machine, each with an address of its own. Needs root and iproute2."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

SUBNET = "10.213.77"


def require_namespaces() -> None:
    """Skip the test where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    probe = subprocess.run(["ip", "netns", "add", "ts-probe"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "ts-probe"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"network namespaces cannot be made: {probe.stderr.strip()}")


class Machines:
    """Two machines that reach each other and nobody else."""

    def __init__(self) -> None:
        self.names = [f"ts{os.getpid()}-{n}" for n in (1, 2)]
        self.addresses = [f"{SUBNET}.{n}" for n in (1, 2)]

    def make(self) -> None:
        """Make the namespaces and the cable between them."""
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")

    def on(self, machine: int, command: Sequence[str]) -> list[str]:
        """The command on a machine."""
        return ["ip", "netns", "exec", self.names[machine], *command]

    def received_bytes(self, machine: int) -> int:
        """Bytes that came over the cable so far."""
        path = "/sys/class/net/cable/statistics/rx_bytes"
        mounted = ["ip", "netns", "exec", self.names[machine], "cat", path]  # ip mounts the namespace's own /sys
        return int(subprocess.run(mounted, capture_output=True, text=True, check=True, timeout=30).stdout)

    def commands(self, machine: int) -> list[str]:
        """Command lines of its processes."""
        lines = []
        for pid in self._pids(machine):
            with contextlib.suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
        return [line for line in lines if line]

    def power_off(self, machine: int) -> None:
        """Kill all its processes at once, and take its cable away."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("-n", self.names[machine], "link", "set", "cable", "down")
        self._kill(machine)

    def remove(self) -> None:
        """Power off and remove everything."""
        for machine, name in enumerate(self.names):
            self._kill(machine)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=30)

    def _kill(self, machine: int) -> None:
        for _ in range(20):
            listed = subprocess.run(
                ["ip", "netns", "pids", self.names[machine]], capture_output=True, text=True, check=False
            )
            pids = [int(pid) for pid in listed.stdout.split()]
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _pids(self, machine: int) -> list[int]:
        ask = ["ip", "netns", "pids", self.names[machine]]
        listed = subprocess.run(ask, capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """Two machines, removed at the end."""
    require_namespaces()
    made = Machines()
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*words: str) -> None:
    subprocess.run([shutil.which("ip") or "ip", *words], check=True, capture_output=True, timeout=30)
