"""Contestant: llama.cpp through llama-cpp-python's low-level calls, so that batches are real ones.

Variants: `bf16`, `q8_0` or `q4_0`, with `-fa` for flash attention.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterable
from typing import Any

import llama_cpp
import numpy as np
from protocol import MAX_BATCH, NEW_TOKENS, PROMPT_TOKENS, VOCABULARY, Trace, arguments, serve

BATCH_TOKENS = 2048  # llama.cpp's default


class LlamaCpp:
    """Satisfies protocol.Contestant. All prompts first, then every sequence one token per call."""

    ramp_tokens = 0

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given

    def prepare(self) -> dict[str, Any]:
        weights, _, flash = self.given.variant.partition("-")
        llama_cpp.llama_backend_init()
        path = self.given.checkpoint / f"{weights}.gguf"
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = MAX_BATCH
        options.n_ctx = MAX_BATCH * (PROMPT_TOKENS + 2 * NEW_TOKENS)
        options.n_batch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = self.given.threads
        options.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        return {
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "flash_attention": bool(flash),
            "weight_bytes": llama_cpp.llama_model_size(model),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Trace:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        trace = Trace(len(prompts))
        last: dict[int, int] = {}
        rows = [
            (token, position, place, position == len(prompt) - 1)
            for place, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(rows), BATCH_TOKENS):
            news = self._run(rows[first : first + BATCH_TOKENS])
            last.update(news)
            trace.note({place: [token] for place, token in news.items()})
        for step in range(new_tokens - 1):
            news = self._run((last[place], len(prompt) + step, place, True) for place, prompt in enumerate(prompts))
            last.update(news)
            trace.note({place: [token] for place, token in news.items()})
        return trace

    def _run(self, rows: Iterable[tuple[int, int, int, bool]]) -> dict[int, int]:
        """One call; the greedy token of every sequence whose row asked for logits."""
        batch, wanted = self.batch, {}
        count = 0
        for token, position, place, wants_logits in rows:
            batch.token[count] = token
            batch.pos[count] = position
            batch.n_seq_id[count] = 1
            batch.seq_id[count][0] = place
            batch.logits[count] = wants_logits
            if wants_logits:
                wanted[place] = count
            count += 1
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode says {status}")
        tokens = {}
        for place, row in wanted.items():
            address = llama_cpp.llama_get_logits_ith(self.context, row)
            logits = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (VOCABULARY,))
            tokens[place] = int(logits.argmax())
        return tokens


if __name__ == "__main__":
    serve(LlamaCpp(arguments()))
