"""Contestant: vLLM's CPU wheel, bf16, its engine stepped in this process. Variants: `eager`, `compiled`."""

from __future__ import annotations

import argparse
import os
from typing import Any

# Read when vllm is imported. One process, no compile workers: what is idle must be idle.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from protocol import MAX_BATCH, RAMP_TOKENS, Trace, arguments, serve


class Vllm:
    """Satisfies protocol.Contestant."""

    ramp_tokens = RAMP_TOKENS

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.count = 0

    def prepare(self) -> dict[str, Any]:
        os.environ["OMP_NUM_THREADS"] = str(self.given.threads)
        import torch
        from vllm import LLM

        self.engine = LLM(
            model=str(self.given.checkpoint / "hf"),
            dtype="bfloat16",
            enforce_eager=self.given.variant == "eager",
            max_num_seqs=MAX_BATCH,
            max_model_len=1024,
            enable_prefix_caching=False,
            seed=0,
        ).llm_engine
        torch.set_num_threads(self.given.threads)
        return {"threads": torch.get_num_threads()}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        trace = Trace(len(prompts))
        places = {}
        for place, prompt in enumerate(prompts):
            self.count += 1
            places[str(self.count)] = place
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            trace.note({_place(places, output.request_id): list(output.outputs[0].token_ids) for output in outputs})
        return trace


def _place(places: dict[str, int], request_id: str) -> int:
    """The engine may add a suffix of its own to a request's name."""
    return places[request_id.partition("-")[0]]


if __name__ == "__main__":
    serve(Vllm(arguments()))
