"""What must be set before any test imports: Triton kernels run in the interpreter, on CPU tensors.

Properties are tried with the same examples everywhere; HYPOTHESIS_PROFILE=explore draws new ones.

With TWOSTROKE_TEST_GPU=1 they are compiled and run on a GPU: of use to the tests of kernels, of the store on a device
and of the ops over both (`tests/kernels tests/kv/test_device_store.py tests/model/test_triton_ops.py`).
"""

import os

if os.environ.get("TWOSTROKE_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU, torch and pytest is enough for the tests named above
    pass
else:
    settings.register_profile("same", derandomize=True)
    settings.register_profile("explore", derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
