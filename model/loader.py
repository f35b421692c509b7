"""Makes a runner from a checkpoint, and computes its numerics class. Knows files and sizes, no requests."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..checkpoint.config import DeviceChoice, DTypeChoice, KernelsChoice
from ..checkpoint.config_json import load_spec
from ..checkpoint.safetensors_files import checkpoint_files
from ..checkpoint.shards import Shard, shard_spec
from ..checkpoint.sizes import cache_codec, compute_dtype, context_length
from ..checkpoint.spec import DType, Quantization
from ..kernels.cpu import library as native
from ..kv.store.store import KvStore
from .ops.device import chosen_kernels, describe_device, refuse_unserved, resolve_device
from .ops.native_ops import NativeOps
from .ops.seam import Ops
from .ops.torch_ops import TorchOps
from .parallel.collectives import ONE_RANK, Collectives
from .runner import Runner
from .weights.host_memory import give_back_after_load
from .weights.rank_source import cut_source
from .weights.tensors import open_source, weights_fingerprint
from .weights.weights import load_weights

KERNEL_SET_VERSION = 7  # increase it with every change that can change a bit of any logit

KvDType = Literal["auto", "fp8", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """Options to run a checkpoint. `kv_dtype` auto means fp8, `dtype` auto means the checkpoint's dtype."""

    num_blocks: int
    block_tokens: int = 16
    dtype: DTypeChoice = "auto"
    kv_dtype: KvDType = "auto"
    num_threads: int = 1
    max_model_len: int | None = None
    digest_key: int = 0  # the cluster's 64-bit key
    quantization: Quantization = "none"
    kernels: KernelsChoice = "auto"  # on a CPU
    device: DeviceChoice = "cpu"
    gpu: int = 0  # index of the GPU
    graph_seqs: int = 0  # on a GPU: the largest decode step that runs as a graph
    end_ids: tuple[int, ...] = ()  # end tokens of the tokenizer, in addition to those of the config


@dataclass(frozen=True, slots=True)
class NumericsClass:
    """Class of workers that compute the same bits for the same prefix."""

    digest: bytes  # 16 bytes
    description: str


def load_runner(directory: Path, options: RunnerOptions, collectives: Collectives = ONE_RANK) -> Runner:
    """Load weights and make a store of `num_blocks` blocks. Call `warm_up` in the thread that runs the steps.

    `collectives`: of a tensor-parallel group. Then weights and store are those of its rank.

    Raises:
        CheckpointError: the directory holds no model that is served.
        ConfigError: max_model_len exceeds the checkpoint's context length, the device cannot serve the model, or its
            heads cannot be split over the ranks.
    """
    spec = load_spec(directory)
    more_ends = (id_ for id_ in options.end_ids if id_ < spec.vocab_size)  # the tokenizer may have more ids
    spec = replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *more_ends))))
    device = resolve_device(options.device, options.gpu)
    context_length(spec, options.max_model_len)
    dtype = torch_dtype(compute_dtype(spec, options.dtype))
    if device.type != "cpu":
        refuse_unserved(spec, cache_codec(options.kv_dtype))
    ops = make_ops(dtype, options.quantization, options.num_threads, kernels=options.kernels, device=device)
    rank = shard_spec(spec, Shard(collectives.rank, collectives.size))
    weights = load_weights(cut_source(open_source(directory), rank), rank.local, ops)
    give_back_after_load(checkpoint_files(directory) if directory.is_dir() else (directory,))
    kv_spec = rank.kv_spec(cache_codec(options.kv_dtype))
    store = KvStore(kv_spec, options.num_blocks, options.block_tokens, device, options.digest_key)
    graph_seqs = options.graph_seqs if device.type != "cpu" else 0
    return Runner(
        rank.local, weights, ops, store, options.max_model_len, graph_seqs=graph_seqs, collectives=collectives
    )


def make_ops(
    dtype: torch.dtype,
    quantization: Quantization = "none",
    num_threads: int = 1,
    *,
    kernels: KernelsChoice = "auto",
    device: torch.device | None = None,
) -> Ops:
    """Make the ops of a device (None: the CPU). On a CPU, `kernels` selects them; `auto` takes the fastest available.

    Raises:
        ConfigError: the requested kernels cannot run on this machine.
    """
    if device is not None and device.type != "cpu":
        from .ops.triton_ops import TritonOps  # needs triton

        return TritonOps(dtype, device, quantization)
    if chosen_kernels(kernels, "cpu", native.load) == "native":
        return NativeOps(dtype, num_threads, quantization)
    return TorchOps(dtype, num_threads, quantization)


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's dtype for a compute dtype."""
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def numerics_class(directory: Path, options: RunnerOptions, tp: int = 1) -> NumericsClass:
    """Compute the numerics class: a digest of everything that can change a bit of a logit.

    This is: weights, compute dtype, cache codec, TP, ops, machine, and the served context length if rotary angles
    depend on it. The number of threads and the sizes of blocks, batches and chunks change no bit.
    """
    spec = load_spec(directory)
    weights = weights_fingerprint(directory)
    dtype = compute_dtype(spec, options.dtype)
    device = resolve_device(options.device, options.gpu)
    ops = make_ops(torch_dtype(dtype), options.quantization, kernels=options.kernels, device=device)
    machine = machine_description() if device.type == "cpu" else describe_device(device)
    length = f", for {options.max_model_len or spec.max_model_len} tokens" if spec.length_matters else ""
    arithmetic = (
        f"{dtype}, {cache_codec(options.kv_dtype)} cache{length}, TP {tp}, kernels {KERNEL_SET_VERSION}, "
        f"{ops.description} on {machine}"
    )
    digest = hashlib.blake2b(weights + arithmetic.encode(), digest_size=16, person=b"twostroke-numer").digest()
    return NumericsClass(digest, f"weights {weights.hex()[:8]}, {arithmetic}")


def machine_description() -> str:
    """Properties by which libraries choose their CPU kernels: architecture, vector extensions, CPU model."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("vendor_id", "cpu family", "model\t")):
                model += " " + line.partition(":")[2].strip()
            elif not line:
                break  # read the first core only
    except OSError:
        model = " " + platform.processor()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{model}"
