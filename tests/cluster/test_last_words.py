"""Of a process's last output, the one line that says why it ended."""

import pytest

from twostroke.cluster.launch.last_words import (
    DeviceEnd,
    ProcessEnd,
    cause_of,
    end_of_error,
    end_of_process,
    end_of_typed,
)
from twostroke.core import errors

CRASH = """INFO: loading
Traceback (most recent call last):
  File "/somewhere/worker.py", line 7, in run
    weights = load()
RuntimeError: [enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory
Exception ignored in: <function Server.__del__ at 0x7f>
Traceback (most recent call last):
  File "/somewhere/_server.py", line 1, in __del__
RuntimeError: Event loop is closed
"""
RAY_ERROR = """The actor died because of an error raised in its creation task, ray::Router.__init__() (pid=7)
  File "/somewhere/hosted.py", line 50, in __init__
    self._call(self._server.start(), None)
twostroke.core.errors.DoesNotFit: memory 1 MiB
weights 2 MiB = 0 blocks
"""


@pytest.mark.parametrize(
    ("code", "output", "end"),
    [
        (2, "a warning\ntwostroke: port 1 is in use\n", ProcessEnd("port 1 is in use", is_certain=True)),
        (1, CRASH, ProcessEnd("exit code 1: RuntimeError: [enforce fail at alloc_cpu.cpp:117] data. "
                              "DefaultCPUAllocator: can't allocate memory")),
        (1, "the engine has ended\n", ProcessEnd("exit code 1: the engine has ended")),
        (1, "", ProcessEnd("exit code 1")),
        (-9, "loading", ProcessEnd("exit code -9: SIGKILL: `kill -9`, or a system out of memory")),
        (143, CRASH, ProcessEnd("exit code 143: it was told to stop by SIGTERM, more than once")),
        (-11, "", ProcessEnd("exit code -11: SIGSEGV")),
        (3, "twostroke: GPU-a is cordoned: XID 79", ProcessEnd("GPU-a is cordoned: XID 79", device=DeviceEnd.CORDONED)),
        (4, "twostroke: GPU-a: restart: XID 31\n", ProcessEnd("GPU-a: restart: XID 31", False, DeviceEnd.FAULT)),
    ],
)  # fmt: skip
def test_the_end_of_a_process_is_its_cause_in_one_line(code: int, output: str, end: ProcessEnd):
    assert end_of_process(code, output) == end


def test_an_error_of_ours_in_another_process_is_its_message_and_certain():
    assert end_of_error(RAY_ERROR) == ProcessEnd("memory 1 MiB weights 2 MiB = 0 blocks", is_certain=True)
    assert end_of_error("The actor died unexpectedly.\n\tpid: 7") == ProcessEnd("pid: 7")
    assert end_of_error("") == ProcessEnd("it ended without a word")


def test_a_long_cause_is_cut():
    assert len(cause_of("x" * 10_000)) == 400


@pytest.mark.parametrize(("kind", "device"), [("DeviceFault", DeviceEnd.FAULT), ("DeviceCordoned", DeviceEnd.CORDONED)])
def test_an_actor_says_what_its_gpu_did(kind: str, device: DeviceEnd):
    end = end_of_error(RAY_ERROR.replace("DoesNotFit: memory 1 MiB", f"{kind}: GPU-a"))
    assert (end.device, end.is_certain) == (device, False)
    here = end_of_typed(getattr(errors, kind)("GPU-a"))
    assert here == ProcessEnd("GPU-a", False, device)


def test_another_typed_error_says_nothing_of_a_gpu():
    assert end_of_typed(errors.DoesNotFit("too large")) == ProcessEnd("too large", is_certain=True)
