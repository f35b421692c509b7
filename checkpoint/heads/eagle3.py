"""Finds the parts of an EAGLE-3 head in its files. Reads headers only.

One decoder layer of Llama's form, whose attention takes two hidden states side by side: that of the next token's
embedding, and `fc` of the model's residual stream before some of its layers. Names in the files, without `model.`:

    fc.weight                  [hidden, 3 * the model's hidden]      midlayer. or layers.0.   the decoder layer
    norm.weight, lm_head.weight [draft vocabulary, hidden]           embed_tokens.weight      absent: the model's
    d2t                        [draft vocabulary] int: what to add to a column's number to get its token

Source: EAGLE-3 (Li et al. 2025), section 3; the layouts of its authors, of vLLM and of `speculators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from ..config_fields import Fields, read_json
from ..config_json import spec_from_config
from ..layout import layer_layout
from ..safetensors_files import SafetensorsFiles
from ..spec import DenseFfn, ModelSpec, PlainAttention

LAYER = "model.layers.0."  # as `layer_layout` names it
_PLACES = ("midlayer.", "layers.0.")
_LATER = ("layers.1.", "midlayer.1.")
_TAPS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "aux_hidden_layers")
NUM_TAPS = 3
HIDDEN_NORM, FC, NORM, HEAD, EMBEDDING, MAP = (
    "hidden_norm.weight",
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
    "embed_tokens.weight",
    "d2t",
)


@dataclass(frozen=True, slots=True)
class Eagle3Spec:
    """Shape of an EAGLE-3 head, and the names of its tensors."""

    directory: Path
    layer: ModelSpec  # of one layer; `vocab_size` is the model's
    layers_tapped: tuple[int, ...]  # the residual stream before these layers of the model goes into `fc`
    num_rows: int  # of the output: the draft vocabulary
    norm_first: bool  # the residual stream of the layer is the normalised hidden state
    names: Mapping[str, str]  # names as above, or of `layer_layout`, to names in the files
    num_parameters: int
    fc_width: int  # numbers of hidden states that `fc` takes: three times the model's width

    @property
    def has_embedding(self) -> bool:
        """True if it has an embedding of its own; else it reads the model's."""
        return EMBEDDING in self.names


def load_eagle3(directory: Path, num_layers: int) -> Eagle3Spec:
    """Read config.json and the files' headers. `num_layers`: of the model that it is for.

    Raises:
        CheckpointError: a file is missing or damaged, the head is of a form that is not served, or a tensor is missing,
            unexpected or of a wrong shape; names it.
    """
    where = str(directory)
    whole = read_json(directory / "config.json")
    config = {**whole, **Fields(whole, where).mapping("transformer_layer_config")}
    fields = Fields(config, where)
    if fields.count("num_hidden_layers", 1) != 1:
        raise fields.wrong("num_hidden_layers", config["num_hidden_layers"], "1: an EAGLE-3 head of one layer")
    shapes = open_head(directory).shapes()
    present = {name.removeprefix("model."): name for name in shapes if name != "t2d"}
    layer = _layer(config, where)
    names = _layer_names(layer, present, where)
    taken = set(names.values())
    for name in (HIDDEN_NORM, FC, NORM, HEAD, EMBEDDING, MAP):
        stored = names.pop(LAYER + name) if name == HIDDEN_NORM else present.get(name)
        if stored is not None:
            names[name] = stored
            taken.add(stored)
        elif name not in (EMBEDDING, MAP):
            raise CheckpointError(f"{where} lacks {name}, a tensor of every EAGLE-3 head; fetch its files again")
    extra = sorted(set(present.values()) - taken)
    if extra:
        raise CheckpointError(f"{where} holds {extra[0]}, which an EAGLE-3 head of one layer has no place for")
    num_rows = shapes[names[HEAD]][0]
    expected = _shapes(layer, num_rows, shapes[names[FC]][-1]) | ({MAP: (num_rows,)} if MAP in names else {})
    for name, stored in names.items():
        if tuple(shapes[stored]) != expected[name]:
            raise CheckpointError(f"{where}: {stored} has shape {list(shapes[stored])}; must be {list(expected[name])}")
    if MAP not in names and num_rows != layer.vocab_size:
        raise CheckpointError(
            f"{where}: lm_head.weight has {num_rows} rows of a vocabulary of {layer.vocab_size}, and there is no d2t "
            "that names their tokens; fetch its files again"
        )
    sizes = [shapes[stored] for name, stored in names.items() if name != MAP]
    num_parameters = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes)
    tapped = _tapped(fields, num_layers)
    norm_first = fields.flag("norm_before_residual")
    return Eagle3Spec(directory, layer, tapped, num_rows, norm_first, names, num_parameters, shapes[names[FC]][-1])


def open_head(directory: Path) -> SafetensorsFiles:
    """The head's files. Raises CheckpointError as `SafetensorsFiles`."""
    return SafetensorsFiles(directory, quantised=True)  # maps of the vocabulary are of integers and truth values


def _layer(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The decoder layer, as one of a Llama."""
    fields = {**config, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "tie_word_embeddings": False}
    for name in ("eagle_config", "quantization_config", "eos_token_id"):
        fields.pop(name, None)
    eagle = Fields(config, where).mapping("eagle_config")
    if eagle.get("use_aux_hidden_state", True) is not True:
        raise CheckpointError(f"{where}: eagle_config.use_aux_hidden_state is off, which is EAGLE of an earlier form")
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config is set; give an EAGLE-3 head of floats")
    spec = spec_from_config(fields, {}, where)
    assert isinstance(spec.attention, PlainAttention)
    assert isinstance(spec.layers[0].ffn, DenseFfn)
    return replace(spec, layers=(replace(spec.layers[0], window=None),))


def _layer_names(layer: ModelSpec, present: Mapping[str, str], where: str) -> dict[str, str]:
    """Tensors of the decoder layer: names of `layer_layout` to names in the files."""
    place = next((place for place in _PLACES if f"{place}input_layernorm.weight" in present), None)
    if place is None:
        raise CheckpointError(f"{where} lacks midlayer.input_layernorm.weight; name the directory of an EAGLE-3 head")
    names = {LAYER + name.removeprefix(place): stored for name, stored in present.items() if name.startswith(place)}
    wanted = [name for name in _shapes(layer, 1, 1) if name.startswith(LAYER)]
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        raise CheckpointError(f"{where} lacks {place}{missing.removeprefix(LAYER)}; fetch its files again")
    return {name: names[name] for name in wanted}


def _shapes(layer: ModelSpec, num_rows: int, fc_width: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name; attention takes twice the width."""
    layout, hidden = layer_layout(layer, 0, ()), layer.hidden_size
    shapes: dict[str, tuple[int, ...]] = {name: (width,) for name, width in layout.vectors.values()}
    for key, matrix in layout.matrices.items():
        for name, rows in matrix.parts:
            shapes[f"{name}.weight"] = (rows, 2 * hidden if key == "qkv" else matrix.columns)
            if matrix.bias:
                shapes[f"{name}.bias"] = (rows,)
    parts = {HIDDEN_NORM: (hidden,), LAYER + HIDDEN_NORM: (hidden,), NORM: (hidden,), FC: (hidden, fc_width)}
    return shapes | parts | {HEAD: (num_rows, hidden), EMBEDDING: (layer.vocab_size, hidden)}


def _tapped(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """The model's layers before which its residual stream is read: as given, or a low, a middle and a high one."""
    eagle = fields.mapping("eagle_config")
    for name in _TAPS:
        ids = fields.ids(name) or Fields(eagle, fields.where).ids(name)
        if ids:
            break
    else:
        name, ids = "the head's default of tapped layers", (2, num_layers // 2, num_layers - 3)
    good = len(ids) == NUM_TAPS and all(0 <= i < num_layers for i in ids) and list(ids) == sorted(set(ids))
    if not good:
        raise CheckpointError(
            f"{fields.where}: {name} is {list(ids)}, and the model has layers 0 to {num_layers - 1}: three different "
            "ones, ascending, are read"
        )
    return ids
