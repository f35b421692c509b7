"""Contestant: OpenVINO GenAI's paged, continuously batched pipeline. Variants: `f16`, `q8_0`.

The GGUF reader knows no bf16, so the 16-bit weights come as float16; either computes in bf16.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import MAX_BATCH, RAMP_TOKENS, Trace, arguments, serve


class OpenVino:
    """Satisfies protocol.Contestant."""

    ramp_tokens = RAMP_TOKENS

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.count = 0

    def prepare(self) -> dict[str, Any]:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 1024
        scheduler.max_num_seqs = MAX_BATCH
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": self.given.threads, "INFERENCE_PRECISION_HINT": "bf16"}
        path = str(self.given.checkpoint / f"{self.given.variant}.gguf")
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        return {"precision": properties["INFERENCE_PRECISION_HINT"]}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = new_tokens
        options.ignore_eos = True
        options.do_sample = False
        trace = Trace(len(prompts))
        handles = {}
        for place, prompt in enumerate(prompts):
            self.count += 1
            handles[place] = self.pipeline.add_request(self.count, openvino.Tensor(np.array([prompt])), options)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            trace.note({place: _new_ids(handle) for place, handle in handles.items() if handle.can_read()})
        return trace


def _new_ids(handle: Any) -> list[int]:
    """What a request brought since the last look."""
    return [token for output in handle.read().values() for token in output.generated_ids]


if __name__ == "__main__":
    serve(OpenVino(arguments()))
