"""What must be set before any test imports: Triton kernels run in the interpreter, on CPU tensors."""

import os

os.environ["TRITON_INTERPRET"] = "1"
