"""Tensors of safetensors files by their headers: dtype, shape, place. Knows no format of quantisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ...core.errors import CheckpointError
from ..safetensors_files import checkpoint_files, read_header

FLOATS = ("F32", "BF16", "F16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
EXPONENTS = ("F8_E8M0", "U8")  # a power of two; older files hold its bytes as U8
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1} | dict.fromkeys(
    (*FLOAT8, "F8_E8M0"), 1
)
MAX_READ_BYTES = 64 << 10  # of a tensor that describes another one


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in its file. `dtype` is safetensors' word for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    at: int  # first byte in the file
    size_bytes: int

    def read(self) -> bytes:
        """Read the bytes of a small tensor.

        Raises:
            CheckpointError: the file cannot be read, or the tensor is larger than a description of another one.
        """
        if self.size_bytes > MAX_READ_BYTES:
            raise self.wrong(f"has {self.size_bytes} bytes; at most {MAX_READ_BYTES} were expected")
        try:
            with self.file.open("rb") as file:
                file.seek(self.at)
                return file.read(self.size_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read ({error}); fetch the file again") from None

    def wrong(self, what: str) -> CheckpointError:
        """Make the error for a tensor that its format does not allow."""
        return CheckpointError(f"{self.file}: {self.name} {what}; fetch it again, or take another export of the model")


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of all files of a checkpoint; tensors by name.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor's bytes are not those of its dtype and shape.
    """
    found: dict[str, StoredTensor] = {}
    for file in checkpoint_files(directory):
        raw, header = read_header(file)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensor = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + len(raw) + start, end - start)
            if tensor.dtype in ITEM_BYTES and prod(tensor.shape) * ITEM_BYTES[tensor.dtype] != tensor.size_bytes:
                raise tensor.wrong(f"has {tensor.size_bytes} bytes for {tensor.dtype} {list(tensor.shape)}")
            found[name] = tensor
    return found


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """Tensors of one module of a model, by their names after the module's."""

    module: str
    by_role: Mapping[str, StoredTensor]

    def need(self, role: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> StoredTensor:
        """Tensor of a role, of one of these dtypes and shapes (none given: of any shape).

        Raises:
            CheckpointError: it is missing or different; names the tensor and its file.
        """
        tensor = self.by_role.get(role)
        if tensor is None:
            beside = next(iter(self.by_role.values()))
            raise CheckpointError(
                f"{beside.file} holds {beside.name}, and no file holds {self.module}.{role}, which its format needs; "
                "fetch the checkpoint again, or take another export of the model"
            )
        if tensor.dtype not in (allowed := tuple(dtypes)):
            raise tensor.wrong(f"is {tensor.dtype}; its format has {', '.join(allowed)} there")
        if shapes and tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise tensor.wrong(f"has shape {list(tensor.shape)}; its format asks for {wanted}")
        return tensor

    def matrix(self, role: str, dtypes: Iterable[str]) -> StoredTensor:
        """Tensor of a role with two axes, neither of them empty. Raises CheckpointError as `need`."""
        tensor = self.need(role, dtypes)
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise tensor.wrong(f"has shape {list(tensor.shape)}; its format asks for a matrix")
        return tensor

    def only(self, *roles: str) -> None:
        """Refuse tensors of other roles: they would change the numbers. Raises CheckpointError."""
        for role, tensor in self.by_role.items():
            if role not in roles:
                raise tensor.wrong("has no place in the format that the config names for this matrix")
