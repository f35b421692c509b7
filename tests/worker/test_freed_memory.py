"""A worker's allocator keeps the memory of freed frames: a new frame costs no page faults."""

import subprocess
import sys
import textwrap

import pytest

FRAMES = textwrap.dedent("""
    import resource, sys
    from twostroke.worker.machine import keep_freed_memory

    if sys.argv[1] == "keep" and not keep_freed_memory():
        print("no glibc")
        raise SystemExit

    def use(count):
        for _ in range(count):
            frames = [bytearray(2 << 20) for _ in range(4)]
            del frames

    use(8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(16)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""")
PAGES_PER_ROUND = 4 * (2 << 20) // 4096


def faults(how: str) -> int:
    told = subprocess.run(
        [sys.executable, "-c", FRAMES, how], capture_output=True, text=True, check=True
    ).stdout.strip()
    if told == "no glibc":
        pytest.skip(told)
    return int(told)


def test_frames_cost_page_faults_once() -> None:
    assert faults("keep") < PAGES_PER_ROUND  # 16 rounds, less than one round's pages
