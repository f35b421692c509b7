"""Flags of `serve`, with vLLM's names where they exist, and the settings that they set."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cluster.config import Config, load_config
from ..core.errors import ConfigError
from .keys import read_key

SETTING_BY_FLAG = {
    "model": "model.path",
    "served_model_name": "model.name",
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "kernels": "model.kernels",
    "max_model_len": "model.max_model_len",
    "generation_config": "model.generation_config",
    "enable_lora": "model.enable_lora",
    "lora_modules": "model.lora_modules",
    "max_loras": "model.max_loras",
    "max_lora_rank": "model.max_lora_rank",
    "enable_runtime_lora": "router.runtime_lora",
    "kv_cache_dtype": "cache.dtype",
    "kv_cache_dtype_k": "cache.key_dtype",
    "kv_cache_dtype_v": "cache.value_dtype",
    "block_size": "cache.block_size",
    "kv_cache_tokens": "cache.tokens",
    "kv_cache_memory_fraction": "cache.memory_fraction",
    "swap_space": "cache.swap_space",
    "kv_transport": "cache.transport",
    "require_kv_transport": "cache.require_transport",
    "max_num_seqs": "step.max_num_seqs",
    "max_num_batched_tokens": "step.max_num_batched_tokens",
    "speculative_config": "speculation",
    "threads": "step.num_threads",
    "prefill": "cluster.prefill",
    "decode": "cluster.decode",
    "tensor_parallel_size": "cluster.tensor_parallel_size",
    "prefill_tp": "cluster.prefill_tp",
    "decode_tp": "cluster.decode_tp",
    "launcher": "cluster.launcher",
    "ray_address": "cluster.ray_address",
    "worker_metrics_port": "cluster.worker_metrics_port",
    "host": "router.host",
    "port": "router.port",
    "grpc_port": "router.grpc_port",
    "insecure": "router.insecure",
    "ssl_certfile": "router.ssl_certfile",
    "ssl_keyfile": "router.ssl_keyfile",
    "ssl_ca_certs": "router.ssl_ca_certs",
    "strict": "router.strict",
    "chat_template": "router.chat_template",
    "tool_parser": "router.tool_parser",
    "reasoning_parser": "router.reasoning_parser",
    "api_keys": "router.api_keys",
    "allowed_hosts": "router.allowed_hosts",
    "allowed_origins": "router.allowed_origins",
    "allowed_methods": "router.allowed_methods",
    "allowed_headers": "router.allowed_headers",
    "allow_credentials": "router.allow_credentials",
}

Model = Annotated[str | None, typer.Option(help="Directory, GGUF file or hub name. Default: the bundled model.")]
Checkpoint = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False)]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call the model.")]
DType = Annotated[str | None, typer.Option(help="auto, bfloat16 or float32; auto is the checkpoint's dtype.")]
Quantization = Annotated[
    str | None, typer.Option(help="none or int8: 8-bit weights, rounded while loading. Saves no memory on a GPU.")
]
Kernels = Annotated[
    str | None,
    typer.Option(help="On a CPU: auto, native (needs a C++ compiler once) or torch. auto is native where it can be."),
]
KvCacheDType = Annotated[
    str | None,
    typer.Option(
        help="auto, fp8, fp8_e5m2, int8, int8_channel, bfloat16 or float32. Unlike vLLM, auto is FP8, not the model's "
        "dtype."
    ),
]
KvCacheDTypeK = Annotated[str | None, typer.Option(help="Of the keys, if it is not that of --kv-cache-dtype.")]
KvCacheDTypeV = Annotated[str | None, typer.Option(help="Of the values, if it is not that of --kv-cache-dtype.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Most prompt plus generated tokens. Default: the checkpoint's, as far as it fits."),
]
GenerationConfig = Annotated[
    str | None,
    typer.Option(help="Sampling where a request says nothing: auto, as the checkpoint recommends, or none."),
]
EnableLora = Annotated[
    bool | None, typer.Option("--enable-lora", help="Keep memory for adapters. --lora-modules does so by itself.")
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(help="Adapters to serve, as vLLM has them: NAME=PATH …, or JSON with name and path. PEFT's LoRA."),
]
MaxLoras = Annotated[int | None, typer.Option(help="Adapters that a worker holds at once. Default: 64.")]
MaxLoraRank = Annotated[int | None, typer.Option(help="Largest rank of an adapter. Default: 64.")]
EnableRuntimeLora = Annotated[
    bool | None,
    typer.Option("--enable-runtime-lora", help="Serve POST /v1/load_lora_adapter and /v1/unload_lora_adapter."),
]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per KV block: 16, 32 or 64.")]
KvCacheTokens = Annotated[int | None, typer.Option(help="Most tokens a worker's KV pool holds.")]
KvCacheMemoryFraction = Annotated[
    float | None,
    typer.Option(help="Share of what the weights leave that the pool may take. Default: 0.9, on a CPU 0.5."),
]
SwapSpace = Annotated[
    float | None,
    typer.Option(help="GiB of host memory per worker for preempted sequences' KV. Default: 0, they are recomputed."),
]
KvTransport = Annotated[
    str | None,
    typer.Option(help="Of hand-overs: auto, grpc, gloo, or shm, shared memory of one host."),
]
RequireKvTransport = Annotated[
    bool | None, typer.Option("--require-kv-transport", help="Refuse a hand-over that would use less than it.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Most sequences per step.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Most tokens per step: the prefill chunk.")]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        help="Speculative decoding, as JSON with vLLM's keys: "
        '\'{"method": "ngram", "num_speculative_tokens": 4}\', "mtp", or "draft_model", "medusa", "eagle3" with '
        '"model": PATH. Default: off. The output is the same.'
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads per worker. Default: physical cores / workers.")]
Prefill = Annotated[int | None, typer.Option(help="Prefill workers. 0: combined workers, no disaggregation.")]
Decode = Annotated[int | None, typer.Option(help="Decode workers.")]
TensorParallelSize = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size", "-tp", help="Ranks per worker: processes that split one model, on CPUs. Default: 1."
    ),
]
PrefillTp = Annotated[int | None, typer.Option(help="The same for prefill workers alone.")]
DecodeTp = Annotated[int | None, typer.Option(help="The same for decode workers alone.")]
Launcher = Annotated[str | None, typer.Option(help="ray, process or inprocess.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="host:port of a Ray cluster to run on, on all its nodes. Default: a Ray of our own, here."),
]
Host = Annotated[
    str | None, typer.Option(help="Address of both faces. Another than loopback needs TLS and keys, or --insecure.")
]
Port = Annotated[int | None, typer.Option(help="HTTP: OpenAI API and metrics. Default: 8000.")]
GrpcPort = Annotated[int | None, typer.Option(help="gRPC: the SDK. Default: 8001.")]
Insecure = Annotated[
    bool | None,
    typer.Option("--insecure", help="Allow a host that others can reach without certificates."),
]
SslCertfile = Annotated[str | None, typer.Option(help="Certificate that clients see: TLS for HTTP and gRPC.")]
SslKeyfile = Annotated[str | None, typer.Option(help="Its private key. Default: it is in --ssl-certfile.")]
SslCaCerts = Annotated[
    str | None, typer.Option(help="Authorities whose certificates clients must show. Default: they show none.")
]
Strict = Annotated[
    bool | None, typer.Option("--strict", help="Refuse unknown fields of a body; else they are named in the response.")
]
RouterApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        callback=read_key,
        help="Ask clients for this key: @FILE, or - to type it; more than one: router.api_keys. `ps` shows any other.",
    ),
]
AllowedHosts = Annotated[
    str | None,
    typer.Option(help="Names that clients may ask by, beside loopback's: a proxy's, llm.example.com."),
]
AllowedOrigins = Annotated[
    str | None, typer.Option(help="""Origins whose web pages may use the HTTP face: '["http://localhost:3000"]'.""")
]
AllowedMethods = Annotated[str | None, typer.Option(help="""Methods that those pages may use. Default: '["*"]'.""")]
AllowedHeaders = Annotated[str | None, typer.Option(help="""Headers that those pages may send. Default: '["*"]'.""")]
AllowCredentials = Annotated[
    bool | None, typer.Option("--allow-credentials", help="Let browsers send cookies along for those pages.")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Chat template (Jinja) instead of the checkpoint's: a file, or the template itself."),
]
ToolParser = Annotated[
    str | None,
    typer.Option(
        "--tool-parser",
        "--tool-call-parser",
        help="Format of the model's tool calls. Default: auto, the chat template's; none: they stay content.",
    ),
]
ReasoningParser = Annotated[
    str | None,
    typer.Option(help="Format of the model's reasoning. Default: auto, the chat template's; none: it stays content."),
]
EnableAutoToolChoice = Annotated[
    bool, typer.Option("--enable-auto-tool-choice", hidden=True, help="Taken as vLLM's; tool_choice auto always works.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file, or - for standard input; flags and environment win over it.")
]


_CLUSTER_FLAGS: dict[str, Any] = {  # in the order of --help
    "checkpoint": Checkpoint,
    "model": Model,
    "served_model_name": ServedModelName,
    "prefill": Prefill,
    "decode": Decode,
    "tensor_parallel_size": TensorParallelSize,
    "prefill_tp": PrefillTp,
    "decode_tp": DecodeTp,
    "launcher": Launcher,
    "ray_address": RayAddress,
    "host": Host,
    "port": Port,
    "grpc_port": GrpcPort,
    "dtype": DType,
    "quantization": Quantization,
    "kernels": Kernels,
    "kv_cache_dtype": KvCacheDType,
    "kv_cache_dtype_k": KvCacheDTypeK,
    "kv_cache_dtype_v": KvCacheDTypeV,
    "block_size": BlockSize,
    "max_model_len": MaxModelLen,
    "generation_config": GenerationConfig,
    "enable_lora": EnableLora,
    "lora_modules": LoraModules,
    "max_loras": MaxLoras,
    "max_lora_rank": MaxLoraRank,
    "enable_runtime_lora": EnableRuntimeLora,
    "max_num_seqs": MaxNumSeqs,
    "max_num_batched_tokens": MaxNumBatchedTokens,
    "speculative_config": SpeculativeConfig,
    "kv_cache_tokens": KvCacheTokens,
    "kv_cache_memory_fraction": KvCacheMemoryFraction,
    "swap_space": SwapSpace,
    "kv_transport": KvTransport,
    "require_kv_transport": RequireKvTransport,
    "threads": Threads,
    "insecure": Insecure,
    "ssl_certfile": SslCertfile,
    "ssl_keyfile": SslKeyfile,
    "ssl_ca_certs": SslCaCerts,
    "strict": Strict,
    "chat_template": ChatTemplate,
    "tool_parser": ToolParser,
    "reasoning_parser": ReasoningParser,
    "enable_auto_tool_choice": EnableAutoToolChoice,
    "api_key": RouterApiKey,
    "allowed_hosts": AllowedHosts,
    "allowed_origins": AllowedOrigins,
    "allowed_methods": AllowedMethods,
    "allowed_headers": AllowedHeaders,
    "allow_credentials": AllowCredentials,
    "config": ConfigFile,
}


def starts_a_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of all settings of a cluster: it gets `settings: Config`, and its own parameters.

    Raises:
        ConfigError: the model is given twice, or a setting is invalid (see `config_from`).
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]

    @functools.wraps(command)
    def with_settings(**values: Any) -> None:
        kept = {parameter.name: values.pop(parameter.name) for parameter in own}
        checkpoint, key = values["checkpoint"], values["api_key"]
        if checkpoint is not None and values["model"] not in (None, checkpoint):
            raise ConfigError(
                f"the model is given twice, as {checkpoint!r} and as --model {values['model']!r}; give one"
            )
        values["model"] = values["model"] or checkpoint
        command(config_from(values | {"api_keys": None if key is None else [key]}), **kept)

    given = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=False if name == "enable_auto_tool_choice" else None,
            annotation=kind,
        )
        for name, kind in _CLUSTER_FLAGS.items()
    ]
    with_settings.__signature__ = inspect.Signature([*given, *own])  # type: ignore[attr-defined]
    with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in (*given, *own)}
    return with_settings


def config_from(flags: dict[str, Any]) -> Config:
    """Build the configuration from flags, environment and file.

    Raises:
        ConfigError: a setting is invalid; names the setting, the value and the remedy.
    """
    given = {SETTING_BY_FLAG[name]: value for name, value in flags.items() if name in SETTING_BY_FLAG}
    if given.get("speculation") is not None:
        given["speculation"] = _json_mapping("--speculative-config", given["speculation"])
        if not given["speculation"].keys() & {"method", "model"}:
            raise ConfigError('--speculative-config has no "method"; give {"method": "ngram"}, or leave the flag out')
    if given.get("router.runtime_lora"):
        given["model.enable_lora"] = True
    return load_config(flags.get("config"), os.environ, given)


def _json_mapping(flag: str, text: str) -> dict[str, Any]:
    """Value of a flag that is a JSON object.

    Raises:
        ConfigError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{flag} is {text[:80]!r}, which is not JSON ({error}); give an object with keys") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{flag} is {text[:80]!r}; must be a JSON object, e.g. {{"method": "ngram"}}')
    return value
