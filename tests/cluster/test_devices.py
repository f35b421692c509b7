"""GPUs of a plan: spare ones replace cordoned ones, and too many faults cordon."""

from twostroke.cluster.devices import FAULT_WINDOW_S, MAX_FAULTS, Devices
from twostroke.cluster.restarts import RestartBook, Standing


def test_a_cordoned_gpu_is_replaced_while_there_are_spare_ones():
    devices = Devices((4, 6))
    assert devices.cordon(0, "XID 79") == 4
    assert devices.cordon(4, "XID 95") == 6
    assert devices.cordon(6, "XID 64") is None
    assert devices.cordoned == {0: "XID 79", 4: "XID 95", 6: "XID 64"}


def test_two_workers_of_one_gpu_get_a_spare_one_each():
    devices = Devices((2, 3))
    assert [devices.cordon(0, "first"), devices.cordon(0, "second")] == [2, 3]
    assert devices.cordoned == {0: "first"}


def test_faults_are_forgiven_unless_there_are_many_in_an_hour():
    devices = Devices()
    assert not any(devices.faulted(0, 100.0 * n) for n in range(MAX_FAULTS))
    assert not devices.faulted(1, 300.0)  # another GPU
    assert devices.faulted(0, FAULT_WINDOW_S)
    slow = Devices()
    assert not any(slow.faulted(0, n * FAULT_WINDOW_S / 2) for n in range(20))


def test_a_withheld_member_is_neither_due_nor_starting():
    members = RestartBook()
    members.want("decode-0", 0.0)
    members.started("decode-0", 0.0)
    members.ready("decode-0", 1.0)
    members.withhold("decode-0", "XID 79", 2.0)
    assert members.standing("decode-0") is Standing.WITHHELD
    assert members.last_words("decode-0") == "XID 79"
    assert members.due(1e9) == members.starting() == members.overdue(1e9) == []
    assert members.next_due_s() is None


def test_a_stopped_member_stays_stopped():
    members = RestartBook()
    members.want("decode-0", 0.0)
    members.stop("decode-0")
    members.withhold("decode-0", "XID 79", 2.0)
    assert members.standing("decode-0") is Standing.STOPPED
