"""Generates the committed code of *.proto with the protoc of this environment; `--check` only compares.

`make protos` and `make check` call it in an environment of its own (docs/decisions/0002).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("inference", "peers", "worker")  # the others define messages only: no *_pb2_grpc for them


def generate(out: Path) -> int:
    """Write the generated code below `out`, as packages of `twostroke`; 0 when protoc is content."""
    source = ROOT / "src"
    names = [f"twostroke/protos/{p.name}" for p in sorted((source / "twostroke/protos").glob("*.proto"))]
    services = [name for name in names if Path(name).stem in SERVICES]
    common = ["protoc", f"-I{source}"]
    codes = [
        protoc.main([*common, f"--python_out={out}", f"--mypy_out=quiet:{out}", *names]),
        protoc.main([*common, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services]),
    ]
    return max(codes)


def drifted() -> list[str]:
    """Files whose committed code is not what the .proto files say."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        if generate(fresh):
            return ["protoc failed"]
        made = {p.name: p.read_bytes() for p in (fresh / "twostroke/protos").iterdir()}
    committed = {p.name: p.read_bytes() for p in (ROOT / "protos").iterdir() if "_pb2" in p.name}
    return sorted(name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name))


if __name__ == "__main__":
    if "--check" in sys.argv:
        found = drifted()
        sys.exit(f"generated code has drifted, run `make protos`: {', '.join(found)}" if found else 0)
    sys.exit(generate(ROOT / "src"))
