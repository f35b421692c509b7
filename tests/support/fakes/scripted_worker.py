"""A fake worker that answers every request with a text of the test's, token by token, its text made as real workers do.

Its model has the bundled model's tokenizer, with the special tokens and the chat template that the test gives.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.fakes.fake_worker import FakeWorker

from twostroke.protos import common_pb2, worker_pb2
from twostroke.text.stream import TextStream
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[3] / "model" / "bundled"
MODEL = "scripted"

# Prints tools, turns and calls in the Hermes style; begins the reasoning if `enable_thinking` asks for it.
HERMES = """\
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call></tool_call><|end|>{% endif %}
{%- for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {{
call.function.arguments | tojson }}}</tool_call>{% endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{{ '\\n' }}{% endif %}{% endif %}
{%- if false %}</think>{{ reasoning_effort }}{% endif %}"""
# The same with control tokens of Mistral's kind, which are special.
CONTROL = HERMES.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "").replace("think>", "THINK]")
CONTROL = CONTROL.replace("<THINK]", "[THINK]").replace("</THINK]", "[/THINK]")
CONTROL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")


def make_model(path: Path, template: str = HERMES, special: Sequence[str] = ()) -> Path:
    """Write the files of a tokenizer with this chat template; returns the directory."""
    path.mkdir()
    shutil.copy(BUNDLED / "tokenizer.json", path)
    config = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    config["additional_special_tokens"] += list(special)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@dataclass
class ScriptedWorker(FakeWorker):
    """Says `says` to everybody; `outputs[choice]` instead, where it is given."""

    model_path: Path = BUNDLED
    says: str = ""
    outputs: tuple[str, ...] = ()
    token_s: float = 0.0  # before each token
    dies_at: int | None = None  # no more tokens from this index on; the test ends the worker then

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer = Tokenizer.load(self.model_path)
        self.is_stuck = asyncio.Event()

    def info(self) -> common_pb2.WorkerInfo:
        info = super().info()
        info.model.name = MODEL
        info.model.path = str(self.model_path)
        info.model.vocab_size = self.tokenizer.vocab_size
        info.model.max_model_len = 65_536
        return info

    async def _generate(self, order: worker_pb2.Submit) -> None:
        text = self.outputs[order.choice] if self.outputs else self.says
        ids = list(self.tokenizer.encode(text, False))
        ends = common_pb2.FINISH_REASON_STOP
        if len(ids) > order.sampling.max_tokens:
            ids, ends = ids[: order.sampling.max_tokens], common_pb2.FINISH_REASON_LENGTH
        prompt = list(order.prompt_ids[: len(order.prompt_ids) - order.emitted_tokens])
        sampling = order.sampling
        stream = TextStream(
            self.tokenizer,
            tuple(sampling.stop),
            sampling.skip_special_tokens or not sampling.HasField("skip_special_tokens"),
            prompt_ids=prompt,
        )
        stream.push(ids[: order.emitted_tokens])
        count = order.emitted_tokens
        for index in range(order.emitted_tokens, len(ids)):
            if index == self.dies_at:
                self.is_stuck.set()
                await asyncio.Event().wait()
            await asyncio.sleep(self.token_s)
            piece = stream.push([ids[index]])
            count += 1
            self._say(order, index, ids[index], piece.text, stream.num_shown)
            if piece.is_stopped:
                ends = common_pb2.FINISH_REASON_STOP
                break
        self.running.pop((order.request_id, order.choice), None)
        message = worker_pb2.SessionDown()
        message.step.ends.add(
            request_id=order.request_id,
            choice=order.choice,
            epoch=order.epoch,
            reason=ends,
            usage=common_pb2.Usage(prompt_tokens=len(prompt), completion_tokens=count),
            tail_text=stream.flush(),
            shown_tokens=stream.num_shown,
        )
        self.say(message)

    def _say(self, order: worker_pb2.Submit, index: int, token_id: int, text: str, num_shown: int) -> None:
        message = worker_pb2.SessionDown()
        output = message.step.tokens.add(
            request_id=order.request_id,
            choice=order.choice,
            epoch=order.epoch,
            first_index=index,
            token_ids=[token_id],
            text=text,
            shown_tokens=num_shown,
        )
        if order.sampling.HasField("logprobs"):
            output.logprobs.add(token_id=token_id, logprob=-0.5, rank=1)
        self.say(message)
