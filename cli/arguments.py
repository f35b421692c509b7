"""Arguments as users of other servers write them: in our words, or a refusal that names ours. Knows no setting's value.

Sources: the engine arguments in vLLM's and SGLang's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..core.errors import ConfigError

_STARTING = ("serve", "up")  # commands that take a cluster's flags
_COUNTS = ("--max-model-len", "--max-num-batched-tokens")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}  # as vLLM reads them
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmgKMG])")
SAME = {  # flags with the same values
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--model-path": "--model",
    "--context-length": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "-q": "--quantization",
}
SAME_VALUES = {
    "--dtype": {"half": "float16", "float": "float32"},
}
ALWAYS = {  # switches whose effect is always there, or never needed
    "--enable-prefix-caching": "prefixes are cached unless cache.prefix_caching says no",
    "--enable-chunked-prefill": "prompts are always computed in chunks",
    "--trust-remote-code": "no code of a checkpoint is ever run",
    "--disable-log-requests": "requests are not logged",
    "--no-enable-log-requests": "requests are not logged",
    "--enable-metrics": "/metrics is always there",
    "--disable-log-stats": "statistics are not logged; /metrics has them",
    "--uvicorn-log-level": "the HTTP server is not uvicorn",
    "--async-scheduling": "the next step is always planned while one runs",
    "--enable-cache-report": "usage always names cached tokens",
}
_MEMORY = "give --kv-cache-memory-fraction: the share for KV of what the weights leave"
_NO_PREFIXES = "set TWOSTROKE__CACHE__PREFIX_CACHING=false, or cache.prefix_caching in the configuration"
_SEED = "every request may give a seed; without one its own is drawn"
_REVISION = "fetch that revision first (`hf download`) and give its folder as --model"
INSTEAD = {
    "--gpu-memory-utilization": _MEMORY,
    "--mem-fraction-static": _MEMORY,
    "--data-parallel-size": "give --prefill and --decode, the numbers of workers",
    "-dp": "give --prefill and --decode, the numbers of workers",
    "--dp": "give --prefill and --decode, the numbers of workers",
    "--dp-size": "give --prefill and --decode, the numbers of workers",
    "--pipeline-parallel-size": "a worker is one node and has no stages; --tensor-parallel-size splits a model",
    "-pp": "a worker is one node and has no stages; --tensor-parallel-size splits a model",
    "--disaggregation-mode": "one command starts both roles: --prefill and --decode, the numbers of workers",
    "--kv-transfer-config": "workers find their own way for KV; --kv-transport names one",
    "--kv-transfer-backend": "workers find their own way for KV; --kv-transport names one",
    "--disaggregation-transfer-backend": "workers find their own way for KV; --kv-transport names one",
    "--seed": _SEED,
    "--random-seed": _SEED,
    "--no-enable-prefix-caching": _NO_PREFIXES,
    "--disable-radix-cache": _NO_PREFIXES,
    "--chunked-prefill-size": "give --max-num-batched-tokens",
    "--tokenizer": "the tokenizer is read from the model's directory",
    "--tokenizer-path": "the tokenizer is read from the model's directory",
    "--load-format": "the format is read from the files",
    "--task": "models generate text; leave it out",
    "--runner": "models generate text; leave it out",
    "--revision": _REVISION,
    "--code-revision": "no code of a checkpoint is ever run; leave it out",
    "--download-dir": "set HF_HOME, the folder of the hub's downloads",
    "--hf-overrides": "a model's config.json is taken as it is; change it in a copy",
    "--override-generation-config": "generation_config.json is taken as it is; change it in a copy, or per request",
    "--calculate-kv-scales": "scales of the KV cache are always those of its numbers; leave it out",
    "--distributed-executor-backend": "give --launcher: process, ray or inprocess",
    "--enforce-eager": "steps are captured where that helps; leave it out",
    "--compilation-config": "nothing is compiled by settings; leave it out",
    "--max-seq-len-to-capture": "steps are captured by their number of sequences; leave it out",
    "--root-path": "routes are served at /; rewrite paths in the proxy",
    "--middleware": "routers load no code; put a proxy before them",
    "--num-gpu-blocks-override": "give --kv-cache-tokens",
    "--cpu-offload-gb": "weights stay on their device; --swap-space keeps preempted KV in host memory",
    "--speculative-model": 'give --speculative-config, a JSON object such as {"method": "ngram"}',
    "--speculative-algorithm": 'give --speculative-config, a JSON object such as {"method": "ngram"}',
    "--guided-decoding-backend": "there is one, llguidance; leave it out",
    "--grammar-backend": "there is one, llguidance; leave it out",
}


def translated(arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The arguments in our words. `say`: is given a line about each that has no effect.

    Raises:
        ConfigError: a flag of another server that is not ours; names what to give instead.
    """
    if not arguments or arguments[0] not in _STARTING:
        return list(arguments)
    found: list[str] = []
    for argument in arguments:
        flag, is_joined, value = argument.partition("=") if argument.startswith("-") else (argument, "", "")
        if not argument.startswith("-"):
            found.append(_value(found[-1] if found else "", argument))
        elif flag in INSTEAD:
            raise ConfigError(f"{flag} is no flag here; {INSTEAD[flag]}")
        elif flag in ALWAYS:
            say(f"{flag} has no effect: {ALWAYS[flag]}")
        else:
            ours = SAME.get(flag, flag)
            found.append(f"{ours}={_value(ours, value)}" if is_joined else ours)
    return _spread_modules(found)


def _value(flag: str, value: str) -> str:
    if flag in _COUNTS and (found := _COUNT.fullmatch(value)):
        return str(round(float(found[1]) * _UNITS[found[2]]))
    if flag == "--quantization" and value not in ("none", "int8"):
        raise ConfigError(
            f"--quantization is {value[:40]!r}: a checkpoint's own quantisation is read from its files, so leave the "
            "flag out; int8 quantises a float checkpoint while it is loaded"
        )
    return SAME_VALUES.get(flag, {}).get(value, value)


def _spread_modules(arguments: Sequence[str]) -> list[str]:
    """Every value behind --lora-modules as a flag of its own: vLLM's flag takes several."""
    spread: list[str] = []
    takes_more = False
    for argument in arguments:
        is_module = "=" in argument or argument.startswith(("{", "["))
        if takes_more and not argument.startswith("-") and is_module and spread[-1] != "--lora-modules":
            spread.append("--lora-modules")
        elif argument.startswith("-"):
            takes_more = argument == "--lora-modules"
        spread.append(argument)
    return spread
