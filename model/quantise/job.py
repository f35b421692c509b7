"""Quantises a checkpoint layer by layer, compares it with the original, and publishes it.

A killed run goes on at its last layer.

Each layer is calibrated on what it gets from the quantised layers before it. The original's residual stream is carried
beside it over other windows, for the comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.config_fields import read_json
from ...checkpoint.layout import EMBEDDING, FINAL_NORM, HEAD
from ...core.errors import ConfigError
from ..weights.weights import LayerWeights, load_layer
from .checks import Original, check_room, needed_memory, opened, refuse_taken
from .folding import LayerTensors, linears
from .journal import Journal
from .layer import MatrixError, QuantisedLayer, quantise_layer
from .observing import Observer, ObservingOps
from .report import Report
from .scheme import Scheme, Settings, scheme_of
from .stream import Overlay, compare, first_rows, through_layer

VERSION = 1  # of the results: increase it with every change of a number that is written
LIBRARY = "0.20.0"  # of compressed-tensors, whose layout is written
REPORT_TEXT, REPORT_JSON = "quantization_report.txt", "quantization_report.json"
LEAST_TOKENS = 1024  # of calibration
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")

Windows = Sequence[Sequence[int]]
Tell = Callable[[int, int, str], None]  # steps done, of how many, what comes next


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids in windows of one length, a multiple of 16. Names are for the report."""

    calibration: Windows
    evaluation: Windows
    calibration_name: str
    evaluation_name: str


def quantise(
    directory: Path,
    out: Path,
    settings: Settings,
    texts: Texts,
    *,
    memory_bytes: int,
    num_threads: int = 1,
    tell: Tell = lambda done, of, what: None,
) -> Report:
    """Write the quantised form of a float checkpoint to `out`, with its report.

    Raises:
        CheckpointError: the checkpoint is damaged, not supported, or quantised already.
        ConfigError: a setting cannot be followed, `out` exists, or the texts are too short; names value and remedy.
        DoesNotFit: memory or disk is too small.
    """
    refuse_taken(out)
    original = opened(directory)
    scheme = scheme_of(settings, original.widths())
    _check_texts(texts, original)
    sizes = [len(windows) * len(windows[0]) for windows in (texts.calibration, texts.evaluation)]
    state_bytes = 4 * original.spec.hidden_size * (sizes[0] + 2 * sizes[1])
    check_room(original, out, memory_bytes, state_bytes, needed_memory(original, *sizes))
    torch.set_num_threads(num_threads)
    journal = Journal(out, _key(original, settings, texts, num_threads))
    try:
        return _Job(original, settings, scheme, texts, journal, ObservingOps(num_threads), tell).run()
    finally:
        journal.close()


@dataclass(frozen=True, slots=True)
class _Job:
    original: Original
    settings: Settings
    scheme: Scheme
    texts: Texts
    journal: Journal
    ops: ObservingOps
    tell: Tell

    @torch.inference_mode()
    def run(self) -> Report:
        """Do all that is left."""
        journal, spec = self.journal, self.original.spec
        state = journal.state() if journal.progress.layers else self._begin()
        for index in range(journal.progress.layers, spec.num_layers):
            self.tell(index, spec.num_layers + 1, f"layer {index}")
            state = self._layer(index, state)
        self.tell(spec.num_layers, spec.num_layers + 1, "comparison")
        report = self._report(state)
        self._finish(report)
        self.tell(spec.num_layers + 1, spec.num_layers + 1, "done")
        return report

    def _begin(self) -> dict[str, Tensor]:
        source, spec = self.original.source, self.original.spec
        names = [EMBEDDING, FINAL_NORM, *([] if spec.tied_embeddings else [HEAD])]
        self.journal.add_weights(self._file(0), {name: source.take(name) for name in names})
        evaluated = first_rows(source, spec, self.texts.evaluation)
        calibration = first_rows(source, spec, self.texts.calibration)
        return {"calibration": calibration, "original": evaluated, "quantised": evaluated.clone()}

    def _layer(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Quantise a layer; streams [windows, tokens, hidden] before it become those after it."""
        source, spec, ops = self.original.source, self.original.spec, self.ops
        ops.rounds, ops.scales = None, {}
        floats = load_layer(source, spec, ops, index)
        observer = Observer(linears(floats, spec, index))
        ops.seen = observer
        through_layer(spec, index, floats, ops, state["calibration"])
        ops.seen = None
        original = through_layer(spec, index, floats, ops, state["original"])
        del floats
        result = quantise_layer(LayerTensors(source, spec, index), observer.found, self.settings, self.scheme)
        del observer
        served = load_layer(Overlay(source, result.served), spec, ops, index)
        self._round_activations(served, index, result)
        is_last = index + 1 == spec.num_layers
        calibration = state["calibration"][:0] if is_last else state["calibration"]  # nobody needs it after the last
        after = {
            "calibration": through_layer(spec, index, served, ops, calibration),
            "original": original,
            "quantised": through_layer(spec, index, served, ops, state["quantised"]),
        }
        self.journal.add_weights(self._file(index + 1), result.stored)
        self.journal.finish_layer(after, {"matrices": [asdict(error) for error in result.errors]})
        return after

    def _round_activations(self, served: LayerWeights, index: int, result: QuantisedLayer) -> None:
        self.ops.rounds = self.scheme.activations
        name_by_id = linears(served, self.original.spec, index)
        self.ops.scales = {id_: result.scales[name] for id_, name in name_by_id.items() if name in result.scales}

    def _report(self, state: dict[str, Tensor]) -> Report:
        original, progress, texts = self.original, self.journal.progress, self.texts
        self.ops.rounds, self.ops.scales = None, {}
        streams = state["original"], state["quantised"]
        comparison = compare(original.source, original.spec, self.ops, texts.evaluation, streams)
        dropped = original.dropped()
        remarks = [f"left out, as no decoder uses them: {', '.join(dropped[:3])} ({len(dropped)} tensors)"] * bool(
            dropped
        )
        return Report(
            method=self.settings.method,
            scheme=self.scheme.describe(),
            calibration=_told(texts.calibration, texts.calibration_name),
            evaluation=_told(texts.evaluation, texts.evaluation_name),
            original_bytes=original.size_bytes,
            quantised_bytes=sum((self.journal.folder / name).stat().st_size for name in progress.names),
            comparison=comparison,
            matrices=[MatrixError(**matrix) for note in progress.notes for matrix in note["matrices"]],
            remarks=remarks,
        )

    def _finish(self, report: Report) -> None:
        journal, directory = self.journal, self.original.directory
        places = {tensor: file for file, names in sorted(journal.progress.names.items()) for tensor in names}
        index = {"metadata": {"total_size": journal.progress.num_bytes}, "weight_map": places}
        config = read_json(directory / "config.json")
        config["quantization_config"] = self.scheme.config(self.original.ignored(), LIBRARY)
        for file in sorted(directory.iterdir()):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHT_FILES):
                journal.copy(file)
        journal.add_text("model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        journal.add_text("config.json", json.dumps(config, indent=2) + "\n")
        journal.add_text(REPORT_TEXT, report.text())
        journal.add_text(REPORT_JSON, report.json())
        journal.publish()

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self.original.spec.num_layers + 1:05}.safetensors"


def _check_texts(texts: Texts, original: Original) -> None:
    for name, windows, least in (("calibration", texts.calibration, LEAST_TOKENS), ("evaluation", texts.evaluation, 1)):
        count = sum(map(len, windows))
        if count < least:
            raise ConfigError(
                f"the {name} text gives {count} tokens in whole windows; at least {least} are needed: give a "
                "longer text, or a shorter --window"
            )
        if len({len(window) for window in windows}) != 1 or len(windows[0]) % 16:
            raise ConfigError(f"--window is {len(windows[0])}; must be a multiple of 16, e.g. 512")
        if len(windows[0]) > original.spec.max_model_len:
            raise ConfigError(
                f"--window is {len(windows[0])}; the model has {original.spec.max_model_len} positions: give fewer"
            )
        if max(map(max, windows)) >= original.spec.vocab_size:
            raise ConfigError(f"the {name} text has tokens outside the vocabulary of {original.spec.vocab_size}")


def _key(original: Original, settings: Settings, texts: Texts, num_threads: int) -> str:
    """Digest of all that decides the bytes of the result, on one machine."""
    said: dict[str, Any] = {
        "version": VERSION,
        "weights": original.source.fingerprint().hex(),
        "settings": asdict(settings),
        "calibration": texts.calibration,
        "evaluation": texts.evaluation,
        "names": [texts.calibration_name, texts.evaluation_name],
        "torch": [torch.__version__, torch.backends.cpu.get_cpu_capability(), num_threads],
    }
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def _told(windows: Windows, name: str) -> str:
    return f"{len(windows)} windows of {len(windows[0])} tokens of {name}"
