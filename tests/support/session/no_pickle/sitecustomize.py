"""Python imports this at the start of every process of the tests (support/session/pickles.py): no unpickling unseen.

Unpickling by libraries that the project does not feed from the network is left alone: Ray's own frames, pipes of
multiprocessing to children of the same program, and libraries that tests alone use.
"""

import os
import sys

LOG = os.environ.get("UNPICKLED_LOG", "")
EXEMPT = ("/ray/", "/multiprocessing/", "/transformers/", "/hypothesis/", "/torch/_inductor/", "/joblib/")


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event != "pickle.find_class":
        return
    frame, files = sys._getframe(1), []
    while frame is not None:
        files.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    if any(part in file for file in files for part in EXEMPT):
        return
    said = f"{' '.join(sys.argv)[:200]}: unpickles {arguments} at {' < '.join(files[:12])}"
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"{said}\n")
    raise RuntimeError(f"nothing may be unpickled: {said}")


if LOG:
    sys.addaudithook(_hook)
