"""Finds the matrices of Medusa heads in their files, in both published layouts. Reads headers only.

A head is residual blocks x + silu(W x + b), b perhaps absent, and a matrix to the vocabulary. The layouts, perhaps with
`medusa_heads.` before the names:

    FasterDecoding   {head}.{block}.linear.weight, .bias          {head}.{number of blocks}.weight
    vLLM             blocks.{head}.layers.{block}.weight, .bias   lm_heads.{head}.weight, perhaps token_map

Source: Medusa (Cai et al. 2024), section 2.1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import CheckpointError
from ..config_fields import Fields, read_json
from ..safetensors_files import SafetensorsFiles

PREFIX = "medusa_heads."
TOKEN_MAP = "token_map"  # of heads with a part of the vocabulary: the token of each row
_PICKLE, _FILE = "medusa_lm_head.pt", "medusa_lm_head.safetensors"


@dataclass(frozen=True, slots=True)
class MedusaHead:
    """Names of one head's tensors."""

    blocks: tuple[tuple[str, str | None], ...]  # weight [hidden, hidden], and bias [hidden] if there is one
    output: str  # [rows, hidden]


@dataclass(frozen=True, slots=True)
class MedusaSpec:
    """Shape of a checkpoint of Medusa heads."""

    directory: Path
    hidden_size: int
    num_rows: int  # of each head's output: the vocabulary, or the part of it that `token_map` names
    heads: tuple[MedusaHead, ...]  # the first guesses the token after the last one
    token_map: str | None

    @property
    def num_parameters(self) -> int:
        """Numbers of all heads."""
        block, output = self.hidden_size * (self.hidden_size + 1), self.num_rows * self.hidden_size
        return sum(len(head.blocks) * block + output for head in self.heads)


def load_medusa(directory: Path) -> MedusaSpec:
    """Read config.json and the files' headers.

    Raises:
        CheckpointError: a file is missing, pickled or damaged, or a tensor is missing or has a wrong shape; names it.
    """
    config = Fields(read_json(directory / "config.json"), str(directory))
    files = open_heads(directory)
    shapes = files.shapes()
    names = {name.removeprefix(PREFIX): name for name in shapes}
    asked = config.optional_count("medusa_num_heads") or config.count("num_heads", 5)
    num_blocks = config.optional_count("medusa_num_layers") or config.count("num_hidden_layers", 1)
    style = _faster if "0.0.linear.weight" in names else _vllm
    is_shared = config.flag("original_lm_head")  # all heads have the first one's output
    places = [style(index, num_blocks) for index in range(asked)]
    heads = tuple(_head(blocks, places[0][1] if is_shared else own, names, directory) for blocks, own in places)
    token_map = names.get(TOKEN_MAP)
    part = config.optional_count("truncated_vocab_size")
    if token_map is None and part not in (None, config.config.get("vocab_size")):
        raise CheckpointError(
            f"{directory}: truncated_vocab_size is {part}, and the files have no "
            f"{TOKEN_MAP} that names its tokens; fetch the files again"
        )
    output = shapes[heads[0].output]
    if len(output) != 2:
        raise CheckpointError(f"{directory}: {heads[0].output} has shape {list(output)}; must be [vocabulary, hidden]")
    rows, hidden = output
    for head in heads:
        _check(shapes, head.output, (rows, hidden), directory)
        for weight, bias in head.blocks:
            _check(shapes, weight, (hidden, hidden), directory)
            if bias is not None:
                _check(shapes, bias, (hidden,), directory)
    if token_map is not None:
        _check(shapes, token_map, (rows,), directory)
    return MedusaSpec(directory, hidden, rows, heads, token_map)


def open_heads(directory: Path) -> SafetensorsFiles:
    """The files of Medusa heads.

    Raises:
        CheckpointError: there are none, they are pickled, or one is damaged.
    """
    if (directory / _PICKLE).exists() and not (directory / _FILE).exists():
        raise CheckpointError(
            f"{directory / _PICKLE} is a pickle, which can run code when it is read; convert it: safetensors.torch."
            f"save_file(torch.load({_PICKLE!r}, weights_only=True), {_FILE!r})"
        )
    return SafetensorsFiles(directory, quantised=True)  # the token map is of integers


def _faster(head: int, num_blocks: int) -> tuple[list[str], str]:
    return [f"{head}.{block}.linear" for block in range(num_blocks)], f"{head}.{num_blocks}.weight"


def _vllm(head: int, num_blocks: int) -> tuple[list[str], str]:
    return [f"blocks.{head}.layers.{block}" for block in range(num_blocks)], f"lm_heads.{head}.weight"


def _head(blocks: list[str], output: str, names: Mapping[str, str], directory: Path) -> MedusaHead:
    missing = next((name for name in (*(f"{block}.weight" for block in blocks), output) if name not in names), None)
    if missing is not None:
        raise CheckpointError(
            f"{directory} lacks {missing}, one of the tensors that its config.json promises; give Medusa heads in "
            "FasterDecoding's or vLLM's layout"
        )
    return MedusaHead(tuple((names[f"{b}.weight"], names.get(f"{b}.bias")) for b in blocks), names[output])


def _check(shapes: Mapping[str, tuple[int, ...]], name: str, shape: tuple[int, ...], directory: Path) -> None:
    if tuple(shapes[name]) != shape:
        raise CheckpointError(f"{directory}: {name} has shape {list(shapes[name])}; must be {list(shape)}")
