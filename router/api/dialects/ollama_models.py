"""Descriptions of served models in Ollama's form, from their checkpoints. Reads files: call it in a thread."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ....checkpoint.gguf.file import is_gguf
from ....text.files import read_json
from ....text.parsing.parsers import NONE
from ...routing.facts import ModelFacts
from ..defaults import described
from ..models import ServedModel

_NEVER = "2318-01-01T00:00:00Z"  # the field is a time; Ollama's own for models that stay is some 290 years away


def tag_of(facts: ModelFacts) -> dict[str, Any]:
    """Entry of a model in the list of /api/tags. The digest names its weights; the size is that of its files."""
    path = Path(facts.path)
    files = [path] if is_gguf(path) else sorted(path.glob("*.safetensors"))
    stats = [file.stat() for file in files]
    changed_s = max((stat.st_mtime for stat in stats), default=0.0)
    return {
        "name": facts.name,
        "model": facts.name,
        "modified_at": datetime.fromtimestamp(changed_s, UTC).isoformat(),
        "size": sum(stat.st_size for stat in stats),
        "digest": facts.weights_fingerprint.hex(),
        "details": _details(path),
    }


def running(facts: ModelFacts) -> dict[str, Any]:
    """Entry of a model in the list of /api/ps: it is loaded, and stays so."""
    tag = tag_of(facts)
    del tag["modified_at"]
    return {**tag, "expires_at": _NEVER, "size_vram": tag["size"], "context_length": facts.max_model_len}


def shown(facts: ModelFacts, served: ServedModel) -> dict[str, Any]:
    """What /api/show says of a model."""
    template, path = served.template, Path(facts.path)
    family = _family(path)
    capabilities = ["completion"]
    if template is not None and template.asks_for("tools") and served.parsers.tools != NONE:
        capabilities.append("tools")
    if served.parsers.reasoning != NONE:
        capabilities.append("thinking")
    return {
        "modelfile": f"# {facts.name} is served by twostroke, which has no model files of this kind\n",
        "parameters": described(served.defaults),
        "template": "" if template is None else template.source,
        "details": _details(path),
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": facts.max_model_len,
            f"{family}.vocab_size": facts.vocab_size,
        },
        "capabilities": capabilities,
    }


def _details(path: Path) -> dict[str, Any]:
    family = _family(path)
    return {
        "parent_model": "",
        "format": "gguf" if is_gguf(path) else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


def _family(path: Path) -> str:
    """Name of the architecture in the checkpoint's config.json."""
    config = {} if is_gguf(path) else read_json(path / "config.json", optional=True)
    name = config.get("model_type")
    return name if isinstance(name, str) and name else "unknown"
