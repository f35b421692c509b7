"""A cluster of processes whose prefill and decode workers have other numbers of ranks says what one rank says."""

import sys
from typing import Any

import pytest

from twostroke import Client

PROMPTS = ("def add(a, b):", "import os\n\nfor name in os.listdir(", "class Stack:\n    def push(self, value):\n" * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory on Linux only")
@pytest.mark.timeout(600)
@pytest.mark.campaign
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_of_one_role_alone_change_no_token(run_cluster, dtype: str):
    common: dict[str, Any] = {
        "step__num_threads": 1,
        "cache__dtype": dtype,
        "cache__tokens": 16384,
        "model__dtype": "float32",  # with fewer bits, two tokens that are nearly equal could change places
        "model__deterministic": False,
        "router__local_prefill": False,
    }
    said = []
    for launcher, prefill, decode in (("inprocess", 1, 1), ("process", 2, 1), ("process", 1, 2)):
        ranks = {"cluster__launcher": launcher, "cluster__prefill_tp": prefill, "cluster__decode_tp": decode}
        with run_cluster(**common, **ranks) as cluster, Client(cluster.grpc, timeout_s=300) as client:
            asked = [
                client.generate(prompt, max_tokens=40, temperature=0.0, request_id=f"r{number}")
                for number, prompt in enumerate(PROMPTS)
            ]
            said.append([tuple(answer.choices[0].token_ids) for answer in asked])
            shown = {w["role"]: w["tensor_parallel_size"] for w in client.cluster()["workers"]}
            assert shown == {"prefill": prefill, "decode": decode}
            long = client.explain("r2")
            assert long["kv_bytes_moved"] > 0
            assert long["prefill_worker"] == "prefill-0"
    assert said[0] == said[1] == said[2]
