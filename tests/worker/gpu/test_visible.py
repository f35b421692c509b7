"""CUDA_VISIBLE_DEVICES as CUDA reads it: indices, UUIDs, slices; never a number where there is none."""

import pytest

from twostroke.worker.gpu.visible import DeviceName, device_of_process, parent_in_name, visible_devices

GPU, MIG = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1b5d4c0b-9a5d-5f6e-8b1a-0a1b2c3d4e5f"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", []),
        ("0,2", [DeviceName(0), DeviceName(2)]),
        (f"{GPU}, {MIG}", [DeviceName(uuid=GPU), DeviceName(uuid=MIG)]),
        ("GPU-8932", [DeviceName(uuid="GPU-8932")]),
        ("MIG-GPU-8932/1/0", [DeviceName(uuid="MIG-GPU-8932/1/0")]),
        ("1,-1,0", [DeviceName(1)]),  # the first entry that names nothing ends the list
        ("NoDevFiles", []),
        ("none", []),
        ("1,,0", [DeviceName(1)]),
    ],
)
def test_reads_the_variable(value, found):
    assert visible_devices({"CUDA_VISIBLE_DEVICES": value}) == tuple(found)


def test_without_the_variable_all_are_visible():
    assert visible_devices({}) is None
    assert device_of_process({}, 3) == DeviceName(3)


def test_an_index_counts_what_the_process_sees():
    environment = {"CUDA_VISIBLE_DEVICES": f"3,{MIG}"}
    assert device_of_process(environment, 0) == DeviceName(3)
    assert device_of_process(environment, 1) == DeviceName(uuid=MIG)
    assert device_of_process(environment, 1).is_slice
    assert device_of_process(environment, 2) is None


def test_old_names_of_slices_hold_their_gpu():
    assert parent_in_name(f"MIG-{GPU}/2/0") == (GPU, 2)
    assert parent_in_name(MIG) is None
    assert parent_in_name(GPU) is None
