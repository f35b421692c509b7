"""Contestant: transformers, bf16, a static batch through `generate`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from protocol import Trace, arguments, serve
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Never stops anything; notes every step's ids."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        last = input_ids[:, -1].tolist()
        self.trace.note({place: [token] for place, token in enumerate(last)})
        return torch.zeros(len(last), dtype=torch.bool)  # type: ignore[return-value]


class Transformers:
    """Satisfies protocol.Contestant."""

    ramp_tokens = 0

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given

    def prepare(self) -> dict[str, Any]:
        torch.set_num_threads(self.given.threads)
        path = self.given.checkpoint / "hf"
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        return {"attention": self.model.config._attn_implementation, "dtype": str(self.model.dtype)}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        ids = torch.tensor(prompts)
        trace = Trace(len(prompts))
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([Clock(trace)]),
            )
        return trace


if __name__ == "__main__":
    serve(Transformers(arguments()))
