"""Mutants of guesses by heads on the model's hidden states."""

from __future__ import annotations

from mutant import Mutant

_PLANNER = "engine/speculation/heads/planner.py"
_LAYER = "engine/speculation/heads/layer_planner.py"
_PROPOSER = "engine/speculation/heads/proposer.py"
_FILES = "checkpoint/heads/medusa.py"
_FEATURES = "model/heads/features.py"
_LAYERED = "model/heads/layered.py"
_EAGLE3 = "checkpoint/heads/eagle3.py"
_DRAWING = "model/heads/drawing.py"

MUTANTS = [
    Mutant(_PLANNER, "min(wish, self._num_heads)", "self._num_heads"),
    Mutant(_PLANNER, "            if not proposer.is_off:\n", "            if True:\n"),
    Mutant(_PLANNER, "proposer.is_off or step.key in result.unusable", "proposer.is_off"),
    Mutant(_PLANNER, "        num_generated=sequence.num_generated,\n", "        num_generated=0,\n"),
    Mutant(_PLANNER, "tuple(sequence.tokens[len(sequence.prompt_ids) :])", "()"),
    Mutant(_PROPOSER, "self.guessed[:most] if", "self.guessed if"),
    Mutant(_PROPOSER, "if self.guessed_after == len(tokens) else ()", "if tokens else ()"),
    Mutant(_FEATURES, "step.end - 1, count)", "step.end, count)"),
    Mutant(_FEATURES, "                row += count\n", "                row += 1\n"),
    Mutant(_FEATURES, "place.rows[place.row + position - place.position]", "place.rows[place.row]"),
    Mutant(_DRAWING, "history.output_ids + self.ids", "history.output_ids"),
    Mutant(_DRAWING, "self.step.num_generated + len(self.ids)", "self.step.num_generated"),
    Mutant(_DRAWING, " and not self._ends_text(guess.step, outcome.token_id)", ""),
    Mutant(_FILES, "_check(shapes, weight, (hidden, hidden), directory)", "pass"),
    Mutant(_FILES, "            if bias is not None:\n", "            if False:\n"),
    Mutant(_FILES, "places[0][1] if is_shared else own", "own"),
    Mutant(_LAYER, "min(sequence.num_computed, len(sequence.tokens) - 1)", "sequence.num_computed"),
    Mutant(_LAYER, " or each.sequence.state not in _RUNNING:", ":"),
    Mutant(_LAYER, " or proposer.first + proposer.num_computed != rows.start:", ":"),
    Mutant(_LAYER, "            proposer.first = rows.start\n", ""),
    Mutant(_LAYER, "self._max_rows - count + 1)", "self._max_rows)"),
    Mutant(_LAYER, "count + max(most - 1, 0)):", "count):"),
    Mutant(
        _LAYER,
        "                self.holdings.release(each.sequence)\n                continue\n",
        "                continue\n",
    ),
    Mutant(_LAYER, "proposer.first + step.end + 1", "proposer.first + step.end"),
    Mutant(_LAYER, "sequence.tokens[rows.start + 1 : rows.end + 1]", "sequence.tokens[rows.start : rows.end]"),
    Mutant(_LAYER, "            proposer.is_off = True\n", "            pass\n"),
    Mutant(
        _LAYERED, "features = spoken[torch.tensor(places, device=spoken.device)]", "features = spoken[: len(places)]"
    ),
    Mutant(_EAGLE3, '2 * hidden if key == "qkv" else matrix.columns', "matrix.columns"),
    Mutant(_EAGLE3, " and all(0 <= i < num_layers for i in ids)", ""),
    Mutant(
        "model/heads/resolved.py",
        "replace(draft, kv_spec=draft.layer.kv_spec(codec))",
        "draft",
    ),
    Mutant("worker/codec/guard.py", "with_codec(draft, codec).beside.group", "draft.beside.group"),
]
