"""Generates the committed code of *.proto with the protoc of this environment. `make protos` calls it."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

SERVICES = ("inference", "worker")  # the others define messages only: no *_pb2_grpc for them


def generate(out: Path, source: Path) -> int:
    """Write the generated code below `out`; `source` is the directory that holds the package `twostroke`."""
    names = [f"twostroke/protos/{p.name}" for p in sorted((source / "twostroke/protos").glob("*.proto"))]
    services = [name for name in names if Path(name).stem in SERVICES]
    common = ["protoc", f"-I{source}"]
    codes = [
        protoc.main([*common, f"--python_out={out}", f"--mypy_out=quiet:{out}", *names]),
        protoc.main([*common, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services]),
    ]
    return max(codes)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.exit(generate(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "src", root / "src"))
