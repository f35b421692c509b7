"""A local Ray of our own that leaves nothing behind, or a given one joined. The only file that configures Ray."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

NAMESPACE = "twostroke"
_OBJECT_STORE_BYTES = 80 << 20  # about the smallest Ray takes; no KV ever goes through it


class RaySession:
    """Ray, from `open` to `close`."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._directory: Path | None = None

    def open(self) -> None:
        """Start or join Ray. Takes 3 to 6 seconds.

        Raises:
            ConfigError: Ray did not start or the cluster was not found.
        """
        common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self._address:
                import ray

                ray.init(address=self._address, **common)
                return
            self._directory = Path(tempfile.mkdtemp(prefix="ts-ray-"))  # short: Ray keeps unix sockets below it
            self._write_token(self._directory)
            import ray

            ray.init(
                _temp_dir=str(self._directory),
                include_dashboard=False,
                num_cpus=1,  # actors ask for none: threads are ours to count (cluster/placement.py)
                object_store_memory=_OBJECT_STORE_BYTES,
                _system_config={"worker_niceness": 0},  # else 15: any neighbour makes our workers look dead
                **common,
            )
        except Exception as error:
            self._remove_files()
            raise ConfigError(f"Ray did not start: {error}. --launcher process needs no Ray") from error

    def close(self) -> None:
        """Shut down what `open` started and remove its files."""
        import ray

        ray.shutdown()
        self._remove_files()

    def _write_token(self, directory: Path) -> None:
        # Ray reads its authentication mode once, when it is first imported; a program that imported it earlier keeps
        # the mode it chose.
        if "ray" in sys.modules or os.environ.get("RAY_AUTH_MODE"):
            return
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)

    def _remove_files(self) -> None:
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            if os.environ.get("RAY_AUTH_TOKEN_PATH", "").startswith(str(self._directory)):
                del os.environ["RAY_AUTH_TOKEN_PATH"], os.environ["RAY_AUTH_MODE"]
            self._directory = None
