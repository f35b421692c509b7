"""Makes a runner from a checkpoint, and computes its numerics class. Knows files and sizes, no requests."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.config import KernelsChoice
from ..checkpoint.safetensors_files import checkpoint_files
from ..checkpoint.shards import RankSpec, Shard, shard_spec
from ..checkpoint.spec import DType, Quantization
from ..kernels.cpu import library as native
from ..kv.store.states import StateStore
from ..kv.store.store import KvStore
from .ops.device import chosen_kernels, describe_device
from .ops.native_ops import NativeOps
from .ops.seam import Ops
from .ops.torch_ops import TorchOps
from .parallel.collectives import ONE_RANK, Collectives
from .resolved import ResolvedModel
from .runner import Runner
from .weights.host_memory import give_back_after_load
from .weights.rank_source import cut_source
from .weights.tensors import open_source, weights_fingerprint
from .weights.weights import load_weights

KERNEL_SET_VERSION = 8  # increase it with every change that can change a bit of any logit


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a runner needs besides the resolved model: sizes, threads, and the key of digests."""

    num_blocks: int
    block_tokens: int = 16
    num_threads: int = 1
    digest_key: int = 0  # the cluster's 64-bit key
    gpu: int = 0  # index of the GPU
    samples: bool = True  # False: for a tensor-parallel rank whose tokens nobody reads
    graph_seqs: int = 0  # on a GPU: the largest decode step that runs as a graph
    num_states: int = 0  # of a model with recurrent layers
    seals: bool = True  # False: the store's bytes stay in it, and nobody verifies them


@dataclass(frozen=True, slots=True)
class NumericsClass:
    """Class of workers that compute the same bits for the same prefix."""

    digest: bytes  # 16 bytes
    description: str


def load_runner(
    model: ResolvedModel, options: RunnerOptions, collectives: Collectives = ONE_RANK, *, ops: Ops | None = None
) -> Runner:
    """Load weights and make a store of `num_blocks` blocks. Call `warm_up` in the thread that runs the steps.

    `collectives`: of a tensor-parallel group. Then weights and store are those of its rank. `ops`: of another runner of
    this model's dtype, quantization and kernels, in the same thread; None: its own.

    Raises:
        CheckpointError: the directory holds no model that is served.
        ConfigError: the kernels cannot run on this machine, or the heads cannot be split over the ranks.
    """
    directory, device = model.directory, _torch_device(model, options.gpu)
    ops = ops or _ops(model, device, options.num_threads)
    rank = shard_spec(model.spec, Shard(collectives.rank, collectives.size))
    weights = load_weights(cut_source(open_source(directory), rank), rank.local, ops)
    give_back_after_load(checkpoint_files(directory) if directory.is_dir() else (directory,))
    store = _store(rank, model, options, device)
    graph_seqs = options.graph_seqs if device.type != "cpu" else 0
    return Runner(
        rank.local,
        weights,
        ops,
        store,
        model.max_model_len,
        graph_seqs=graph_seqs,
        collectives=collectives,
        samples=options.samples,
        seals=options.seals,
    )


def runner_over_new_store(loaded: Runner, model: ResolvedModel, options: RunnerOptions) -> Runner:
    """A runner of loaded weights over a new store; the old store's memory is given back first.

    `model`: the one that was loaded, with another codec. `loaded` must not run any more. Its group has one rank.
    """
    device = loaded.ops.device
    loaded.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return loaded.over(_store(shard_spec(model.spec, Shard(0, 1)), model, options, device))


def _store(rank: RankSpec, model: ResolvedModel, options: RunnerOptions, device: torch.device) -> KvStore:
    state_spec = rank.local.state_spec
    return KvStore(
        rank.kv_spec(model.codec),
        options.num_blocks,
        options.block_tokens,
        device,
        options.digest_key,
        states=None if state_spec is None else StateStore(state_spec, options.num_states, device),
    )


def _torch_device(model: ResolvedModel, gpu: int) -> torch.device:
    return torch.device("cpu") if model.device == "cpu" else torch.device(model.device, gpu)


def _ops(model: ResolvedModel, device: torch.device, num_threads: int = 1) -> Ops:
    kernels: KernelsChoice = "native" if model.kernels == "native" else "torch"
    return make_ops(torch_dtype(model.dtype), model.quantization, num_threads, kernels=kernels, device=device)


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


def numerics_class(model: ResolvedModel, gpu: int = 0, tp: int = 1, weights: bytes = b"") -> NumericsClass:
    """Compute the numerics class: a digest of everything that can change a bit of a logit.

    This is: weights, compute dtype, cache codec, TP, ops, machine, and the served context length if rotary angles
    depend on it. The number of threads and the sizes of blocks, batches and chunks change no bit.
    `weights`: their fingerprint, if it is known already.
    """
    weights, device = weights or weights_fingerprint(model.directory), _torch_device(model, gpu)
    machine = machine_description() if device.type == "cpu" else describe_device(device)
    length = f", for {model.max_model_len} tokens" if model.spec.length_matters else ""
    arithmetic = (
        f"{model.dtype}, {model.codec} cache{length}, TP {tp}, kernels {KERNEL_SET_VERSION}, "
        f"{_ops(model, device).description} on {machine}"
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
