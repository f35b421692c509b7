"""A tiny random Llama, and a quantised checkpoint of it with what it must give. Knows no format.

Each matrix is quantised by a function of a format's own library, which also dequantises it, in float32. The checkpoint
records digests of the dequantised matrices, and logits and greedy tokens of transformers over them.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PLACE = Path(__file__).resolve().parents[2] / "tests" / "support" / "checkpoints" / "quantised"
PROMPT = [3, 17, 44, 9, 60, 21, 8, 8, 35, 52, 1, 30]
NUM_TOKENS = 16

# Name of a module and its weight, float32 -> (tensors by their names after the module's, the weight dequantised)
Quantise = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def tiny_llama() -> LlamaForCausalLM:
    """One layer of widths that groups of 32 divide and blocks of 64 do not."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
        bos_token_id=0,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def write(
    name: str,
    library: str,
    config: dict[str, object],
    quantise: Quantise,
    *,
    dtype: torch.dtype = torch.bfloat16,
    beside: dict[str, object] | None = None,
) -> None:
    """Write a checkpoint `name`. `dtype`: of what stays float. `beside`: hf_quant_config.json, in place of `config`."""
    model, tensors, digests = tiny_llama(), {}, {}
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for kind, weight in module.named_parameters(recurse=False):
                full = f"{module_name}.{kind}"
                if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
                    parts, again = quantise(module_name, weight.detach().clone())
                    tensors |= {f"{module_name}.{role}": part.contiguous().clone() for role, part in parts.items()}
                    digests[full] = digest(again)
                    weight.copy_(again)
                elif full != "lm_head.weight":
                    tensors[full] = weight.to(dtype)
                    weight.copy_(tensors[full].float())
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
        tokens = list(PROMPT)
        for _ in range(NUM_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    place = PLACE / name
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    said = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    if beside is None:
        said["quantization_config"] = config
    else:
        (place / "hf_quant_config.json").write_text(json.dumps(beside, indent=1) + "\n")
    (place / "config.json").write_text(json.dumps(said, indent=1) + "\n")
    expected = {
        "library": library,
        "prompt": PROMPT,
        "tokens": tokens[len(PROMPT) :],
        "logits": [round(float(value), 5) for value in logits],
        "digests": digests,
    }
    (place / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(name, sum(file.stat().st_size for file in place.iterdir()), "bytes", tokens[len(PROMPT) :][:6])


def digest(matrix: Tensor) -> str:
    """Digest of a matrix's float32 numbers; both zeros count as one."""
    numbers = matrix.detach().float().contiguous() + 0.0
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).hexdigest()
