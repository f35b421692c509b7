"""A layer for multi-token prediction through the real core and runners, and its guesses by transformers."""

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints.heads import write_mtp
from support.engines.guessed import GREEDY, SETTINGS, counted, told
from support.engines.sampling_room import Room, ids_of, submit

from twostroke.checkpoint.heads.mtp import find_mtp
from twostroke.engine.speculation.draft_model.holdings import DraftHoldings
from twostroke.engine.speculation.heads.layer_planner import LayerPlanner
from twostroke.engine.speculation.speculation import Speculation
from twostroke.kv.store.store import KvStore
from twostroke.model.heads.layered import LayerDrafter
from twostroke.model.heads.mtp import load_mtp_head
from twostroke.model.weights.tensors import open_source


@pytest.fixture(params=[True, False], ids=["own head", "the model's head"])
def directory(family_directory, tmp_path, request):
    return write_mtp(family_directory("deepseek-v3"), tmp_path / "mtp", has_head=request.param)


@pytest.fixture
def runner(directory, make_runner):
    return make_runner(directory, dtype="float32", kv_dtype="float32")


def head_of(runner, directory):
    source = open_source(directory)
    spec = find_mtp(runner.spec, source.shapes(), str(directory))
    store = KvStore(spec.layer.kv_spec("float32"), 64, 16)
    drafter = LayerDrafter(runner, load_mtp_head(spec, source, runner), store, (spec.index,))
    runner.ops.prepare()
    drafter.warm_up()
    planner = LayerPlanner(1024, DraftHoldings(64, 16, finds_prefixes=False))
    return drafter, Speculation(planner, 3, "mtp")


@pytest.mark.parametrize("name", ["greedy", "filtered", "penalised", "logprobs"])
def test_the_layer_changes_no_token(runner, directory, name):
    work = [submit(f"a{n}", ids_of(length, n), SETTINGS[name]) for n, length in enumerate((1, 40))]
    plain = Room(runner).run(*work)
    drafter, speculation = head_of(runner, directory)
    room = Room(runner, speculation=speculation, drafter=drafter, max_batch_tokens=32).run(*work)
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    assert counted(room, "draft_tokens") > 0
    assert room.core.counters["draft_model_failures"] == 0
    assert room.pool.num_live == room.core._scheduler.guess_planner.holdings.pool.num_live == 0


def test_guesses_are_those_of_transformers_layer(runner, directory):
    drafter, speculation = head_of(runner, directory)
    drawn = []
    original = drafter.guess

    def guess(plan):
        result = original(plan)
        drawn.extend(zip(plan.guesses.sequences, plan.lengths, result.guesses, strict=True))
        return result

    drafter.guess = guess
    command = submit("a", ids_of(40), GREEDY)
    room = Room(runner, speculation=speculation, drafter=drafter, max_batch_tokens=32)
    room.send(command)
    while room.step():
        for sequence in room.core._scheduler.by_key.values():
            if sequence.drafting is not None:
                sequence.drafting.length.length = 2  # guess two after each step, right or not
    text, layer = [*command.prompt_ids, *room.tokens["a"]], Plain(directory)
    assert len(drawn) > 10
    for step, length, ids in drawn:
        assert list(ids) == layer.guesses(text[: step.end + 1], length)


class Plain:
    """Guesses by transformers: the model's hidden states, and a model of one layer over given rows."""

    def __init__(self, directory):
        from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Model

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        config = AutoConfig.from_pretrained(directory)
        last = config.num_hidden_layers
        config.num_hidden_layers, config.first_k_dense_replace = 1, 0
        tensors = load_file(directory / "model.safetensors")
        at = f"model.layers.{last}."
        self.w = {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
        self.layer = DeepseekV3Model(config).float().eval()
        weights = self.layer.state_dict()
        for name in weights:
            if name.startswith("layers.0."):
                weights[name] = self._stored(name.removeprefix("layers.0."), weights[name].shape)
        self.layer.load_state_dict(weights)
        self.layer.norm = torch.nn.Identity()
        self.head = self.w.get("shared_head.head.weight", self.model.lm_head.weight)

    def _stored(self, name, shape):
        """A tensor of the layer; those of experts are stacked in transformers 5."""
        if name in self.w:
            return self.w[name]
        num = shape[0]
        if name.endswith("experts.gate_up_proj"):
            pairs = [[self.w[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")] for e in range(num)]
            return torch.stack([torch.cat(pair) for pair in pairs])
        assert name.endswith("experts.down_proj"), name
        return torch.stack([self.w[f"mlp.experts.{e}.down_proj.weight"] for e in range(num)])

    def _norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.w[f"{name}.weight"]

    @torch.no_grad()
    def guesses(self, ids, count):
        features = self.model.model(torch.tensor([ids[:-1]])).last_hidden_state[0]
        behind, found = list(ids[1:]), []
        for _ in range(count):
            embedded = self.model.get_input_embeddings()(torch.tensor(behind))
            both = torch.cat((self._norm(embedded, "enorm"), self._norm(features, "hnorm")), dim=1)
            y = self.layer(inputs_embeds=(both @ self.w["eh_proj.weight"].T)[None]).last_hidden_state[0]
            found.append(int((self.head @ self._norm(y[-1:], "shared_head.norm")[0]).argmax()))
            features, behind = torch.cat((features, y[-1:])), [*behind, found[-1]]
        return found
