"""The main job of the README, as a newcomer runs it; `make demo` does the same on Ray."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_the_demo_serves_explains_and_compares():
    command = [sys.executable, str(DEMO), "--launcher", "process"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all 12 greedy texts equal those of the model in one piece" in result.stdout
    long_prompt = next(line for line in result.stdout.splitlines() if "long prompt" in line and "│" in line)
    cells = [cell.strip().replace(",", "") for cell in long_prompt.strip("│ ").split("│")]
    assert int(cells[3]) >= 2000
    assert re.fullmatch(r"prefill-\d", cells[5])
    assert re.fullmatch(r"decode-\d", cells[6])
    assert 0 < int(cells[7]) < int(cells[8]) < 2 * int(cells[7])
