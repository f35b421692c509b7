"""Every place that opens a port is known, and has its address from `bindable_host`, which lets no public one pass."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = sorted(link.name for link in (ROOT / "src/twostroke").iterdir() if link.is_symlink())
OPENS = re.compile(
    r"\badd_port\(|\.bind\((?=\()|add_(?:in)?secure_port\(|start_(?:unix_)?server\(|create_(?:unix_)?server\(|HTTPServer\("
)
KNOWN = {
    "cluster/operations/control.py",  # a socket in a folder that only its owner can enter
    "core/tls/identity.py",  # a gRPC server's port, with or without TLS, at the address that its caller gives
    "core/ports.py",  # a socket for the router's HTTP port, and probes
    "router/process.py",  # the router's two gRPC ports
    "worker/process.py",  # the worker's services
    "worker/scrape.py",  # the worker's metrics, at the address that its services have
}


def test_ports_are_opened_in_known_places_alone():
    files = [path for part in PARTS for path in (ROOT / part).rglob("*.py") if "_pb2" not in path.name]
    found = {str(path.relative_to(ROOT)) for path in files if OPENS.search(path.read_text())}
    assert found == KNOWN


def test_the_processes_that_open_ports_ask_for_their_address():
    for name in ("router/process.py", "worker/process.py"):
        assert "bindable_host(" in (ROOT / name).read_text()
