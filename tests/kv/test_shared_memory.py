"""Rings of shared memory between real processes, and the pool that lends them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

from twostroke.kv.handover import plane_channel
from twostroke.kv.handover.plane_channel import RingPool, TransportPolicy, UnusableMemory
from twostroke.kv.handover.transports import shared_memory
from twostroke.kv.handover.transports.shared_memory import OwnRing, host_identity, open_ring, ring_bytes
from twostroke.protos import handover_pb2 as pb

pytestmark = pytest.mark.skipif(not host_identity(), reason="this system has no memfd")

SLOTS, SLOT_BYTES = 3, 8192


@pytest.fixture
def ring():
    made = OwnRing(SLOTS, SLOT_BYTES)
    yield made
    made.close()


def changed(offer, **fields):
    other = pb.SharedMemory()
    other.CopyFrom(offer)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def holders(inode: int) -> list[str]:
    """Mappings of this memory in all processes that we may look into."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        found += [f"{maps} {line}" for line in text.splitlines() if f" {inode} " in line and shared_memory.NAME in line]
    return found


def inode_of(offer) -> int:
    return os.stat(f"/proc/{offer.pid}/fd/{offer.descriptor}").st_ino


CHILD = """
    import sys, time
    from twostroke.kv.handover.transports.shared_memory import OwnRing, open_ring
    from twostroke.protos import handover_pb2 as pb

    def say(data):
        sys.stdout.write(data.hex() + "\\n")
        sys.stdout.flush()

    def hear():
        return bytes.fromhex(sys.stdin.readline())
"""


class Child:
    """Another process with the same package."""

    def __init__(self, code: str, **options):
        text = textwrap.dedent(CHILD) + textwrap.dedent(code)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", text], **pipes, **options)

    def hear(self) -> bytes:
        return bytes.fromhex(self.process.stdout.readline())

    def say(self, data: bytes) -> None:
        self.process.stdin.write(data.hex() + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def child():
    made = []

    def start(code, **options):
        made.append(Child(code, **options))
        return made[-1]

    yield start
    for one in made:
        one.end()


WRITER = """
    ring = open_ring(pb.SharedMemory.FromString(hear()))
    while True:
        number, seed = hear()
        ring.slot(number)[:] = bytes((seed + i) % 251 for i in range(ring.slot_bytes))
        say(b"written")
"""
MAKER = """
    ring = OwnRing(3, 8192)
    ring.slot(2)[:] = bytes(i % 251 for i in range(ring.slot_bytes))
    say(ring.offer().SerializeToString())
    time.sleep(600)
"""


def expected(seed: int) -> bytes:
    return bytes((seed + i) % 251 for i in range(SLOT_BYTES))


def test_another_process_writes_and_this_one_reads_the_same_bytes(ring, child):
    writer = child(WRITER)
    writer.say(ring.offer().SerializeToString())
    for number, seed in ((0, 7), (2, 9), (0, 11)):
        writer.say(bytes((number, seed)))
        assert writer.hear() == b"written"
        assert bytes(ring.slot(number)) == expected(seed)
    assert bytes(ring.slot(1)) == bytes(SLOT_BYTES)
    assert bytes(ring.slot(2)) == expected(9)


def test_the_memory_has_no_name_in_a_file_system_and_cannot_be_resized(ring):
    assert not list(Path("/dev/shm").glob(f"*{shared_memory.NAME}*"))
    with pytest.raises(PermissionError):
        os.ftruncate(ring.offer().descriptor, 4096)


@pytest.mark.parametrize("who", ["maker", "writer"])
def test_nothing_is_left_after_kill_9(who, child):
    maker, writer = child(MAKER), child(WRITER + "\n")
    offer = pb.SharedMemory.FromString(maker.hear())
    inode = inode_of(offer)
    writer.say(offer.SerializeToString())
    writer.say(bytes((0, 1)))
    assert writer.hear() == b"written"
    assert len(holders(inode)) == 2
    first, second = (maker, writer) if who == "maker" else (writer, maker)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert len(holders(inode)) == 1
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    assert holders(inode) == []


def test_a_view_keeps_the_memory_until_it_is_gone(child):
    maker = child(MAKER)
    offer = pb.SharedMemory.FromString(maker.hear())
    inode, mine = inode_of(offer), open_ring(offer)
    view = np.frombuffer(mine.slot(2), np.uint8)
    mine.close()
    maker.end()
    assert not mine.is_gone
    assert bytes(view) == expected(0)  # also after the maker's death: no access can fail
    del view
    assert mine.is_gone
    assert holders(inode) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"host": b""}, "another host"),
        ({"host": b"x" * 16}, "another host"),
        ({"nonce": b"y" * 16}, "another hand-over"),
        ({"slots": SLOTS + 1}, "not those of the offer"),
        ({"slot_bytes": 4096}, "not those of the offer"),
        ({"slots": 0}, "beyond the limits"),
        ({"slots": 1 << 31}, "beyond the limits"),
        ({"slot_bytes": 1 << 40}, "beyond the limits"),
        ({"descriptor": 1 << 20}, "cannot be opened"),
        ({"pid": (1 << 22) + 1}, "cannot be opened"),
    ],
    ids=str,
)
def test_an_offer_that_is_not_this_memory_is_refused_with_the_reason(ring, fields, reason):
    with pytest.raises(UnusableMemory, match=reason):
        open_ring(changed(ring.offer(), **fields))


def test_a_descriptor_of_another_file_is_not_opened(ring):
    with tempfile.TemporaryFile() as file, socket.socket() as sock:
        os.ftruncate(file.fileno(), ring_bytes(SLOTS, SLOT_BYTES))
        for other in (file.fileno(), sock.fileno()):
            with pytest.raises(UnusableMemory, match="another file's"):
                open_ring(changed(ring.offer(), descriptor=other))


def test_memory_that_the_peer_could_shrink_is_refused(ring):
    unsealed = os.memfd_create(shared_memory.NAME, os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(unsealed, ring_bytes(SLOTS, SLOT_BYTES))
        os.pwrite(unsealed, ring.nonce, 0)
        with pytest.raises(UnusableMemory, match="not sealed"):
            open_ring(changed(ring.offer(), descriptor=unsealed))
    finally:
        os.close(unsealed)


def test_a_closed_ring_is_not_opened_and_its_descriptor_is_given_back(ring):
    offer, before = ring.offer(), len(os.listdir("/proc/self/fd"))
    other = OwnRing(SLOTS, SLOT_BYTES)
    theirs = other.offer()
    open_ring(theirs).close()
    other.close()
    assert other.is_gone
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UnusableMemory):
        open_ring(theirs)
    open_ring(offer).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_another_user_cannot_open_it(ring, child):
    stranger = child(
        """
        import os
        offer = pb.SharedMemory.FromString(hear())
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            open_ring(offer)
        except Exception as error:
            say(str(error).encode())
        """
    )
    stranger.say(ring.offer().SerializeToString())
    assert b"cannot be opened: Permission denied" in stranger.hear()


# ------------------------------------------------------------------ the pool


class Ring:
    """Memory of the pool's tests."""

    slots, slot_bytes = 2, 100

    def __init__(self):
        self.is_closed = self.is_viewed = False

    @property
    def is_gone(self):
        return self.is_closed and not self.is_viewed

    def slot(self, index):
        raise AssertionError("the pool looks into no slot")

    def close(self):
        self.is_closed = True

    def offer(self):
        return pb.SharedMemory()


@pytest.fixture
def made():
    return []


@pytest.fixture
def pool(made):
    def make():
        made.append(Ring())
        return made[-1]

    return RingPool(make, 200, 500)  # two rings


def test_a_ring_is_used_again_by_the_same_peer_after_an_orderly_end(pool, made):
    first = pool.take("p:1")
    first.give_back(is_orderly=True)
    assert pool.take("p:1").memory is first.memory
    assert len(made) == 1


def test_a_ring_is_never_used_again_after_any_other_end(pool, made):
    first = pool.take("p:1")
    first.give_back(is_orderly=False)
    first.give_back(is_orderly=True)  # too late
    assert made[0].is_closed
    assert pool.take("p:1").memory is not first.memory


def test_a_ring_is_not_used_again_by_another_peer(pool):
    first = pool.take("p:1")
    first.give_back(is_orderly=True)
    assert pool.take("p:2").memory is not first.memory


def test_there_are_never_more_rings_than_the_bound(pool, made):
    first, second = pool.take("p:1"), pool.take("p:2")
    assert pool.take("p:3") is None
    first.give_back(is_orderly=True)
    assert pool.take("p:3").memory is made[2]  # the idle one makes room
    assert made[0].is_closed
    assert not made[1].is_closed
    assert second.memory is made[1]


def test_a_closed_ring_counts_until_its_last_view_is_gone(pool, made):
    first, _ = pool.take("p:1"), pool.take("p:2")
    made[0].is_viewed = True
    first.give_back(is_orderly=False)
    assert pool.num_rings == 2
    assert pool.take("p:3") is None
    made[0].is_viewed = False
    assert pool.take("p:3") is not None


def test_after_wrong_bytes_a_peer_gets_no_ring_for_a_while_and_the_reason_says_so(pool, monkeypatch):
    monkeypatch.setattr(plane_channel, "DISTRUSTED", 2)
    assert pool.why_none("p:1") == plane_channel.ALL_USED
    pool.take("p:1").give_back(is_orderly=False, has_failed=True)
    for _ in range(2):
        assert pool.why_none("p:1") == plane_channel.WRONG_BYTES
        assert pool.take("p:1") is None
    assert pool.take("p:1") is not None
    assert pool.take("p:2") is not None


def test_distrusted_peers_are_bounded(pool, monkeypatch):
    monkeypatch.setattr(plane_channel, "MAX_DISTRUSTED", 2)
    for number in range(3):
        pool.distrust(f"p:{number}")
    assert pool.take("p:0") is not None
    assert pool.take("p:1") is None
    assert pool.take("p:2") is None


def test_no_memory_means_no_ring():
    def refuse():
        raise OSError("no memory")

    assert RingPool(refuse, 200, 500).take("p:1") is None
    assert RingPool(Ring, 200, 199).take("p:1") is None


def test_a_closed_pool_lends_nothing(pool, made):
    lent, idle = pool.take("p:1"), pool.take("p:2")
    idle.give_back(is_orderly=True)
    pool.close()
    assert all(ring.is_closed for ring in made)
    lent.give_back(is_orderly=True)
    assert pool.take("p:9") is None


@pytest.mark.parametrize(
    ("policy", "required", "may_share"),
    [
        (TransportPolicy(), "", True),
        (TransportPolicy("grpc"), "", False),
        (TransportPolicy("shm"), "", True),
        (TransportPolicy("shm", True), "shm", True),
        (TransportPolicy("grpc", True), "grpc", False),
    ],
    ids=str,
)
def test_what_a_policy_requires(policy, required, may_share):
    assert (policy.required, policy.may_share) == (required, may_share)
