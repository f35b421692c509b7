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
    **dict.fromkeys(("kv", "client", "text"), 1),
    **dict.fromkeys(("model", "router"), 2),
    **dict.fromkeys(("prefill_worker", "decode_worker"), 3),
    "cluster": 4,
    "sim": 5,
    "cli": 6,
}
STRANGERS = {("router", "model")}  # same floor, and yet the router knows of no engine

ROOMS = {
    "torch": (
        "kernels/",
        "model/",
        "kv/store/store.py",
        "kv/planes_",
        "prefill_worker/",
        "decode_worker/",
        "worker/process.py",
    ),
    "triton": ("kernels/", "model/"),
    "ray": ("cluster/", "prefill_worker/actor.py", "decode_worker/actor.py", "router/actor.py"),
}
PURE = (
    "core/proof.py",
    "core/tally.py",
    "decode_worker/speed.py",
    "kv/cache/pool.py",
    "kv/cache/prefix.py",
    "kv/cache/residency.py",
    "kv/handover*.py",
    "kv/handover/carrier.py",
    "kv/store/host_store.py",
    "engine/scheduler.py",
    "engine/sequence.py",
    "engine/core.py",
    "engine/commands.py",
    "engine/lifecycle.py",
    "engine/holdings.py",
    "engine/policy.py",
    "engine/step_times.py",
    "engine/report.py",
    "engine/store_ops.py",
    "engine/swap.py",
    "engine/stopping.py",
    "engine/turn.py",
    "prefill_worker/policy.py",
    "prefill_worker/job.py",
    "decode_worker/policy.py",
    "decode_worker/pull.py",
    "decode_worker/run.py",
    "decode_worker/ledger.py",
    "router/routing/policy.py",
    "router/routing/prefixes.py",
    "router/routing/fleet.py",
    "router/requests/admission.py",
    "router/routing/coefficients.py",
    "router/requests/delivery.py",
    "router/requests/lifecycle.py",
    "router/requests/roster.py",
    "router/requests/run.py",
    "router/requests/surroundings.py",
    "router/routing/views.py",
    "cluster/placement.py",
    "cluster/membership.py",
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
            assert (part, other) not in STRANGERS, where
            same_floor_neighbour = FLOOR[other] == FLOOR[part] and FLOOR[part] < 2
            assert FLOOR[other] < FLOOR[part] or same_floor_neighbour, where


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
    found = {pattern: list(ROOT.glob(pattern)) for pattern in PURE}
    assert not [pattern for pattern, paths in found.items() if not paths], "a file was moved or renamed"
    for path in (path for paths in found.values() for path in paths):
        impure = IMPURE & {module.split(".")[0] for module in imported_modules(path)}
        assert not impure, f"{path.relative_to(ROOT)} decides, and yet imports {impure}"


def test_parts_have_no_init_file():
    found = [part for part in FLOOR if (ROOT / part / "__init__.py").exists()]
    assert not found, "a root folder with __init__.py would shadow packages of the same name"


def test_the_sdk_needs_neither_torch_nor_ray():
    heavy = {"torch", "ray", "numpy", "pydantic"}
    code = f"import sys, twostroke; twostroke.Client; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
