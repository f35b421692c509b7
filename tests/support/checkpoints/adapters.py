"""Random adapters of tiny checkpoints, saved by PEFT, and what PEFT says about them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(base: Path, directory: Path, seed: int = 0, *, std: float = 0.1, **config: Any) -> Path:
    """Save a random adapter of a checkpoint: both matrices of every pair away from zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    fields = {"r": 8, "lora_alpha": 16, "target_modules": list(ALL_LINEAR), "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    model.save_pretrained(directory)
    return directory


def change_config(directory: Path, **changes: object) -> None:
    """Set keys of a saved adapter's config."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def peft_oracle(base: Path, adapter: Path) -> Callable[[Sequence[int]], torch.Tensor]:
    """Logits [tokens, vocab] of a text by PEFT, not merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(plain, adapter).eval()

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(torch.tensor([list(ids)])).logits[0]
        return result

    return logits
