"""What must be set before any test imports: Triton kernels run in the interpreter, on CPU tensors.

`--rewrite` records transcripts and digests again, see support/session/recorded.py.

Properties are tried with the same examples everywhere; HYPOTHESIS_PROFILE=explore draws new ones.

With TWOSTROKE_TEST_GPU=1 they are compiled and run on a GPU: of use to the tests of kernels, of the store on a device
and of the ops over both (`tests/kernels tests/kv/test_device_store.py tests/model/test_triton_ops.py`).
"""

import os
import re
from collections.abc import Callable

import pytest
from support.session.pickles import Watch
from support.session.recorded import REWRITTEN, Recorded
from support.session.shares import dealt

PICKLES = Watch()

if os.environ.get("TWOSTROKE_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

# Test processes share the cores: torch computes with one thread unless a test asks for more, and threads of OpenMP that
# wait for each other sleep. Where they spin, two threads on a busy core take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU, torch and pytest is enough for the tests named above
    pass
else:
    settings.register_profile("same", derandomize=True)
    settings.register_profile("explore", derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


SLOW_TO_START = re.compile(r"tests/system/test_ray\.py$")  # half a minute in each process that takes some of its tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write what the code says into recorded files (tests/scenarios, …)"
    )


@pytest.fixture
def recorded(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Recorded:
    """Compares what the code says with a file; with `--rewrite` it writes the file."""
    return Recorded(request.node.nodeid, request.config.getoption("--rewrite"), record_property)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several test processes: a module whose cluster starts slowly comes first, and whole in one process."""
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_processes > 1:
        items[:] = dealt(items, num_processes, lambda item: item.nodeid.split("::")[0], SLOW_TO_START.match)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The run fails if any of its processes unpickled something."""
    if PICKLES.seen():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    paths = {value for report in reports for name, value in report.user_properties if name == REWRITTEN}
    if paths:
        terminalreporter.section(f"{len(paths)} recorded files rewritten; read them with git diff")
    for path in sorted(paths):
        terminalreporter.line(str(path))
    lines = PICKLES.seen()
    if lines:
        terminalreporter.section(f"unpickled {len(lines)} times (support/session/pickles.py)", red=True)
    for line in lines[:20]:
        terminalreporter.line(line)
    PICKLES.close()
