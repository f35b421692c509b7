"""Adapters over real processes and HTTP: a prefill and a decode worker, loaded at the start and while they serve."""

import httpx
import pytest
from support.checkpoints.adapters import peft_oracle, save_adapter
from support.clusters.supervised import BUSY_MACHINE_S, supervised
from support.engines.workers import tiny_checkpoint

__all__ = ["tiny_checkpoint"]

PROMPT, NUM_TOKENS = list(range(40, 110)), 5


@pytest.mark.timeout(300)
async def test_adapters_are_models_over_http_and_come_and_go(tiny_checkpoint, tmp_path):
    saved = {name: save_adapter(tiny_checkpoint, tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    flags = {
        "model.name": "tiny",
        "model.lora_modules": [f"a={saved['a']}"],
        "router.runtime_lora": True,
        "cache.dtype": "float32",
    }
    async with (
        supervised(tiny_checkpoint, **flags) as supervisor,
        httpx.AsyncClient(base_url=supervisor.http_url, timeout=BUSY_MACHINE_S) as client,
    ):

        async def models() -> dict[str, str | None]:
            return {card["id"]: card["parent"] for card in (await client.get("/v1/models")).json()["data"]}

        async def say(model: str) -> httpx.Response:
            body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
            return await client.post("/v1/completions", json=body | {"ignore_eos": True, "return_token_ids": True})

        async def change(what: str, **body: object) -> httpx.Response:
            return await client.post(f"/v1/{what}_lora_adapter", json=body)

        def expected(name: str) -> list[int]:
            oracle, ids = peft_oracle(tiny_checkpoint, saved[name]), list(PROMPT)
            for _ in range(NUM_TOKENS):
                ids.append(int(oracle(ids)[-1].argmax()))
            return ids[len(PROMPT) :]

        assert list((await models()).items()) == [("tiny", None), ("a", "tiny")]  # the model itself comes first
        answer = (await say("a")).json()
        assert answer["model"] == "a"
        assert answer["choices"][0]["token_ids"] == expected("a")
        explained = (await client.get(f"/v1/requests/{answer['id']}/explain")).json()
        assert explained["prefill_worker"] == "prefill-0"  # it was handed over
        assert explained["kv_bytes_moved"] > 0
        base = (await say("tiny")).json()["choices"][0]["token_ids"]
        assert base != expected("a")
        assert (await say("b")).status_code == 404

        loaded = await change("load", lora_name="b", lora_path=str(saved["b"]))
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'b' added successfully.")
        assert (await say("b")).json()["choices"][0]["token_ids"] == expected("b")
        refused = await change("load", lora_name="b", lora_path=str(saved["a"]))
        assert refused.status_code == 400
        assert "loaded already" in refused.json()["error"]["message"]
        assert (await change("load", lora_name="b", lora_path=str(saved["a"]), load_inplace=True)).status_code == 200
        assert (await say("b")).json()["choices"][0]["token_ids"] == expected("a")
        assert (await change("load", lora_name="c", lora_path=str(tmp_path))).status_code == 400

        removed = await change("unload", lora_name="b")
        assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'b' removed successfully.")
        assert list(await models()) == ["tiny", "a"]
        assert (await say("b")).status_code == 404
        assert (await change("unload", lora_name="b")).status_code == 404
        assert (await say("tiny")).json()["choices"][0]["token_ids"] == base
