"""The hook of support/session/pickles.py sees what is unpickled, here and in child processes."""

import collections
import os
import pickle
import subprocess
import sys

import pytest


def test_unpickling_is_refused_and_seen(monkeypatch, tmp_path):
    log = tmp_path / "seen.txt"
    monkeypatch.setenv("UNPICKLED_LOG", str(log))
    bytes_ = pickle.dumps(collections.OrderedDict())
    program = f"import pickle; pickle.loads({bytes_!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert "nothing may be unpickled" in done.stderr
    assert "OrderedDict" in log.read_text()
    assert pickle.loads(pickle.dumps({"numbers": [1, 2.0, "three"]}))  # no class: nothing can be called


def test_this_process_has_the_hook_too():
    before = os.path.getsize(os.environ["UNPICKLED_LOG"])
    with pytest.raises(RuntimeError, match="nothing may be unpickled"):
        pickle.loads(pickle.dumps(collections.OrderedDict()))
    with open(os.environ["UNPICKLED_LOG"], "r+") as log:
        log.truncate(before)  # this one was wanted
