"""Checkpoints to quantise, made of the bundled model, and token ids of texts that every Python has."""

import functools
import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from twostroke.checkpoint.locate import located
from twostroke.model.quantise.job import Texts, quantise
from twostroke.model.quantise.report import Report
from twostroke.model.quantise.scheme import Settings

BUNDLED = located("bundled")
PLENTY = 64 << 30  # bytes of memory: checks of this machine's are tested by themselves


@functools.cache
def _ids() -> tuple[list[int], list[int]]:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    help_ = "\n\n".join(topics[name] for name in sorted(topics))[:120_000]
    sources = "\n".join(inspect.getsource(module) for module in (json, textwrap, json.decoder))
    return tokenizer.encode(help_).ids, tokenizer.encode(sources).ids


def texts(calibration: int = 4, evaluation: int = 1, window: int = 256) -> Texts:
    """So many windows of help topics, and of sources."""
    first, second = _ids()
    return Texts(_cut(first, calibration, window), _cut(second, evaluation, window), "topics", "sources")


def _cut(ids: Sequence[int], count: int, window: int) -> list[list[int]]:
    assert len(ids) >= count * window
    return [list(ids[at * window : (at + 1) * window]) for at in range(count)]


def shallow(directory: Path, layers: int = 1) -> Path:
    """The bundled model's first layers as a checkpoint of its own."""
    directory.mkdir()
    tensors = load_file(BUNDLED / "model.safetensors")
    gone = tuple(f"model.layers.{index}." for index in range(layers, 6))
    save_file({name: t for name, t in tensors.items() if not name.startswith(gone)}, directory / "model.safetensors")
    config = json.loads((BUNDLED / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return directory


def with_outliers(directory: Path, factor: float = 64.0) -> Path:
    """The bundled model with activations as large models have them: a few channels `factor` times as large.

    The norm before the matrices multiplies these channels and the matrices' columns divide them, so the model computes
    the same numbers. Source: SmoothQuant (Xiao et al. 2023), section 3: outliers stay in a few channels for all tokens.
    """
    directory.mkdir()
    tensors = load_file(BUNDLED / "model.safetensors")
    channels = torch.tensor([3, 77, 130, 201])
    meets = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for index in range(6):
        for norm, matrices in meets.items():
            tensors[f"model.layers.{index}.{norm}.weight"][channels] *= factor  # a power of two: exact
            for name in matrices:
                tensors[f"model.layers.{index}.{name}.weight"][:, channels] /= factor
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((BUNDLED / "config.json").read_bytes())
    return directory


def quantised(directory: Path, out: Path, settings: Settings, given: Texts | None = None) -> Report:
    """Quantise on one thread."""
    return quantise(directory, out, settings, given or texts(), memory_bytes=PLENTY)
