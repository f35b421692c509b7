"""docs/gpu_health.md has the table of XIDs that the code has."""

from itertools import groupby
from pathlib import Path

from twostroke.worker.gpu.xid import XIDS, Action, XidRule

DOCUMENT = Path(__file__).parents[3] / "docs" / "gpu_health.md"
HEAD = "| XID | class | action | running work | meaning |\n|---|---|---|---|---|\n"


def table() -> str:
    """Rows of neighbouring codes with equal rules are one."""
    rows = []
    for rule, group in groupby(sorted(XIDS), key=XIDS.__getitem__):
        codes = ", ".join(str(code) for code in group)
        rows.append(f"| {codes} | {rule.kind.value} | {rule.action.word} | {_work(rule)} | {rule.meaning} |")
    return HEAD + "\n".join(rows) + "\n"


def _work(rule: XidRule) -> str:
    if rule.action in (Action.NOTHING, Action.THROTTLED):
        return "goes on"
    return "ends first" if rule.lets_work_end else "is lost, and goes elsewhere"


def test_the_document_has_the_codes_table():
    assert table() in DOCUMENT.read_text(), f"the table of {DOCUMENT} is not the code's; it must be\n{table()}"
