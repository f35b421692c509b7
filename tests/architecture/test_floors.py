"""The architecture as a test: imports go down the floors only, and heavy libraries stay in their rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOOR = {
    **dict.fromkeys(("core", "protos", "kernels"), 0),
    **dict.fromkeys(("kv", "client"), 1),
    **dict.fromkeys(("checkpoint", "engine"), 2),
    **dict.fromkeys(("text", "model"), 3),
    **dict.fromkeys(("router", "prefill_worker", "decode_worker"), 4),
    "worker": 5,
    "cluster": 6,
    "sim": 7,
    "cli": 8,
}
ROOMS = {
    "torch": ("kernels/", "model/", "kv/store/", "kv/handover/transports/", "checkpoint/safetensors_files.py"),
    "triton": ("kernels/gpu/", "model/ops/triton_ops.py"),
    "kubernetes": ("cluster/kubernetes/", "cluster/discovery/endpoint_slices.py"),
    "ray": ("cluster/launch/", "prefill_worker/actor.py", "decode_worker/actor.py", "router/actor.py"),
}
# Whole folders, without the files that drive them.
PURE_FOLDERS = {
    "engine": {"loop.py"},
    "engine/link": {"client.py", "draining.py", "process_link.py", "rank_link.py", "thread_link.py"},
    "kv/cache": set(),
    "kv/handover": {"driver.py"},
    "cluster/discovery": {"endpoint_slices.py", "names.py"},
    "cluster/planner": set(),
    "router/requests": {"decision_log.py", "dispatch.py", "flow.py"},
    "router/requests/admission": set(),
    "router/routing": set(),
    "text/parsing": set(),
}
PURE_FILES = (
    "client/reconnection.py",
    "core/proof.py",
    "core/tally.py",
    "kv/store/host_store.py",
    "prefill_worker/policy.py",
    "prefill_worker/task.py",
    "decode_worker/ledger.py",
    "decode_worker/policy.py",
    "decode_worker/pull.py",
    "decode_worker/task.py",
    "decode_worker/speed.py",
    "worker/automatic.py",
    "worker/gpu/reading.py",
    "worker/gpu/verdict.py",
    "worker/gpu/visible.py",
    "worker/gpu/xid.py",
    "router/journal/cursor.py",
    "router/journal/journal.py",
    "router/journal/stored.py",
    "router/journal/wire.py",
    "router/peers/joined.py",
    "cluster/catalogue.py",
    "cluster/devices.py",
    "cluster/fit.py",
    "cluster/kubernetes/lease.py",
    "cluster/kubernetes/owed.py",
    "cluster/kubernetes/pods.py",
    "cluster/nodes.py",
    "cluster/operations/rolling.py",
    "cluster/operations/room.py",
    "cluster/operations/standins.py",
    "cluster/wanted.py",
    "cluster/placement.py",
    "cluster/restarts.py",
)
IMPURE = {"torch", "triton", "ray", "grpc", "asyncio", "threading", "time", "random", "socket", "secrets", "os"}


def parts() -> list[str]:
    return sorted(link.name for link in (ROOT / "src/twostroke").iterdir() if link.is_symlink())


def files(part: str) -> Iterator[Path]:
    for path in sorted((ROOT / part).rglob("*.py")):
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            yield path


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted absolute names of everything a file imports, relative imports resolved."""
    package = ("twostroke", *path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_part_has_a_floor_and_a_link():
    assert set(parts()) == set(FLOOR)


@pytest.mark.parametrize("part", sorted(FLOOR))
def test_imports_go_down_the_floors_only(part: str):
    for path in files(part):
        for module in imported_modules(path):
            names = module.split(".")
            if names[0] != "twostroke" or len(names) < 2 or names[1] not in FLOOR or names[1] == part:
                continue
            other = names[1]
            where = f"{path.relative_to(ROOT)} imports {module}"
            neighbours = FLOOR[other] == FLOOR[part] <= 1  # the lowest floors may use each other
            assert FLOOR[other] < FLOOR[part] or neighbours, where


def test_kernels_know_tensors_and_nothing_else():
    for path in files("kernels"):
        others = {m.split(".")[1] for m in imported_modules(path) if m.startswith("twostroke.")}
        assert others <= {"kernels"}, path


@pytest.mark.parametrize("library", sorted(ROOMS))
def test_heavy_libraries_stay_in_their_rooms(library: str):
    for part in FLOOR:
        for path in files(part):
            name = str(path.relative_to(ROOT))
            if library in {module.split(".")[0] for module in imported_modules(path)}:
                assert name.startswith(ROOMS[library]), f"{name} imports {library}"


def test_what_decides_is_pure():
    found = [ROOT / name for name in PURE_FILES]
    for folder, drivers in PURE_FOLDERS.items():
        names = {path.name for path in (ROOT / folder).glob("*.py")}
        assert names - drivers, f"{folder} is not there"
        assert drivers <= names, f"{folder}: {drivers - names} was moved or renamed"
        found += [ROOT / folder / name for name in names - drivers]
    for path in found:
        impure = IMPURE & {module.split(".")[0] for module in imported_modules(path)}
        assert not impure, f"{path.relative_to(ROOT)} decides, and yet imports {impure}"


@pytest.mark.parametrize("part", [*FLOOR, "bench", "examples", "tools"])
def test_every_folder_says_what_it_is_and_is_small(part: str):
    top = ROOT / part
    for folder in (top, *(path for path in top.rglob("*") if path.is_dir() and path.name != "__pycache__")):
        files = [path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h")]
        files = [path for path in files if not path.stem.endswith(("_pb2", "_pb2_grpc"))]
        if files:
            assert (folder / "README.md").is_file() or folder == ROOT / "tools", f"{folder} has no README.md"
        assert len(files) <= (22 if part in FLOOR else 26), f"{folder.relative_to(ROOT)} holds {len(files)} files"


def test_parts_have_no_init_file():
    found = [part for part in FLOOR if (ROOT / part / "__init__.py").exists()]
    assert not found, "a root folder with __init__.py would shadow packages of the same name"


def test_the_sdk_needs_neither_torch_nor_ray():
    heavy = {"torch", "ray", "numpy", "pydantic"}
    code = f"import sys, twostroke; twostroke.Client; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
