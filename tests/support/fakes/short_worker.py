"""A fake worker that serves the bundled model's name and tokenizer, and ends every text after a few tokens."""

from __future__ import annotations

from pathlib import Path

from support.fakes.fake_worker import FakeWorker, token_at

from twostroke.protos import common_pb2, worker_pb2

MODEL = "twostroke-bundled"
NUM_TOKENS = 3
CONTEXT_TOKENS = 262_144  # coding assistants ask for tens of thousands of tokens, whatever the model
BUNDLED = Path(__file__).resolve().parents[3] / "model" / "bundled"


class ShortWorker(FakeWorker):
    """Ends with `stop` after `NUM_TOKENS`, or with `length` where fewer are asked for; scores where asked for."""

    def info(self) -> common_pb2.WorkerInfo:
        info = super().info()
        info.model.name = MODEL
        info.model.path = str(BUNDLED)
        info.model.vocab_size = 4096
        info.model.max_model_len = CONTEXT_TOKENS
        return info

    async def _generate(self, order: worker_pb2.Submit) -> None:
        prompt, asked = list(order.prompt_ids), order.sampling.max_tokens
        count = min(asked, NUM_TOKENS)
        output = worker_pb2.TokenOutput(request_id=order.request_id, choice=order.choice, epoch=order.epoch)
        output.token_ids.extend(token_at(prompt, order.choice, index) for index in range(count))
        output.text = "".join(f"{token_id} " for token_id in output.token_ids)
        output.shown_tokens = count
        if order.sampling.HasField("logprobs"):
            output.logprobs.extend(_score(token_id, order.sampling.logprobs) for token_id in output.token_ids)
        if order.sampling.HasField("prompt_logprobs") and order.choice == 0:
            output.prompt_logprobs.extend(_score(token_id, order.sampling.prompt_logprobs) for token_id in prompt[1:])
        message = worker_pb2.SessionDown()
        message.step.tokens.append(output)
        self.running.pop((order.request_id, order.choice), None)
        message.step.ends.add(
            request_id=order.request_id,
            choice=order.choice,
            epoch=order.epoch,
            reason=common_pb2.FINISH_REASON_LENGTH if count == asked else common_pb2.FINISH_REASON_STOP,
            usage=common_pb2.Usage(prompt_tokens=len(prompt), completion_tokens=count),
            shown_tokens=count,
        )
        self.say(message)


def _score(token_id: int, num_top: int) -> common_pb2.TokenLogprobs:
    others = [other for other in range(num_top + 1) if other != token_id][:num_top]
    return common_pb2.TokenLogprobs(
        token_id=token_id,
        logprob=-0.5,
        rank=1,
        top_ids=[token_id, *others][:num_top],
        top_logprobs=[-0.5 - place for place in range(num_top)],
    )
