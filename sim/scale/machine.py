"""Speeds of one simulated worker, as lines through measured step times. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """A worker: u prompt tokens after h held ones take a·u + b·u·(h + u/2) ms; a decode step c0 + c1·B + c2·K ms.

    B: sequences, K: tokens of KV in use.
    """

    name: str
    prefill_ms_per_token: float
    prefill_ms_per_token_pair: float
    step_base_ms: float
    step_ms_per_sequence: float
    step_ms_per_kv_token: float
    kv_capacity_tokens: int
    max_num_seqs: int

    def prefill_s(self, uncached: int, held: int) -> float:
        """Time to compute `uncached` tokens after `held` ones."""
        pairs = uncached * (held + uncached / 2)
        return (self.prefill_ms_per_token * uncached + self.prefill_ms_per_token_pair * pairs) / 1e3

    def step_s(self, sequences: int, kv_tokens: float) -> float:
        """Time of a decode step."""
        return (self.step_base_ms + self.step_ms_per_sequence * sequences + self.step_ms_per_kv_token * kv_tokens) / 1e3


H200_8B = Machine(
    # Measured (bench/results/gpu): engine.json, fp8 cache, graphs: prefill 1 x 2048 in 58.5 ms and 8 x 1024 in 205.4 ms
    # give a and b; decode with contexts of 1,036 takes 6.11 ms at 8 sequences and 12.80 at 128, of which 32 layers of
    # attention (kernels.json, 128 x 2048 in 299.9 us) are 3.66e-5 ms per token: c2, then c1, then c0.
    name="H200, Llama 8B, FP8 cache",
    prefill_ms_per_token=0.0216,
    prefill_ms_per_token_pair=6.8e-6,
    step_base_ms=5.6,
    step_ms_per_sequence=0.018,
    step_ms_per_kv_token=3.66e-5,
    kv_capacity_tokens=1_790_000,  # 0.9 of 139 GiB, less 16.1 GB of weights, at 66,048 bytes per token
    max_num_seqs=256,
)
