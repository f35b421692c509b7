"""Adapters against PEFT, many in one batch; and bits that depend on a row's own prefix and adapter alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints.adapters import peft_oracle, save_adapter
from support.checkpoints.logits_oracle import assert_same_logits, oracle
from support.checkpoints.models import loaded_adapter
from support.checkpoints.tiny_families import VOCAB
from support.session.older_machines import PLAYED, library_for

from twostroke.core.errors import CheckpointError, InternalError
from twostroke.kernels.cpu import library as native
from twostroke.model.ops.low_rank import ComposedChange
from twostroke.model.ops.native_changes import PackedChange
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.ops.seam import LowRank, RowsOfChange
from twostroke.model.ops.torch_ops import TorchOps

KERNELS = pytest.mark.parametrize("kernels", ["torch", "native"])
CONFIGS: dict[str, dict[str, object]] = {
    "r8": {"r": 8, "lora_alpha": 16},
    "r64-rooted": {"r": 64, "lora_alpha": 12, "use_rslora": True, "std": 0.05},
    "r16-some": {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "r5-mixed": {"r": 5, "lora_alpha": 10, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"o_proj": 40}},
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama-biases": {},
    "qwen3": {},
    "gemma2": {},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "mixtral": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "gpt-oss": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}


def texts(*lengths: int, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def adapters(write_tiny: Callable[[dict[str, object]], Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("adapters")
    base = write_tiny({})
    return {
        name: save_adapter(base, folder / name, seed=seed, **config)
        for seed, (name, config) in enumerate(CONFIGS.items(), 1)
    }


@KERNELS
def test_many_adapters_in_one_batch_agree_with_peft(
    kernels: str, write_tiny: Callable, make_hand: Callable, adapters: dict[str, Path]
) -> None:
    base = write_tiny({})
    hand = make_hand(base, kernels=kernels)
    names = ["r8", "", "r64-rooted", "r16-some", "r8", "r5-mixed"]
    for i, name in enumerate(names):
        if name:
            hand.adapters[str(i)] = loaded_adapter(base, adapters[name], hand.decoder.ops)
    prompts = texts(17, 30, 40, 1, 33, 16)
    ours = hand.logits([(str(i), 0, ids) for i, ids in enumerate(prompts)])
    for _ in range(8):  # decode steps: one row each
        for ids, logits in zip(prompts, ours, strict=True):
            ids.append(int(logits[-1].argmax()))
        step = hand.logits([(str(i), len(ids) - 1, ids[-1:]) for i, ids in enumerate(prompts)])
        ours = [torch.cat(pair) for pair in zip(ours, step, strict=True)]
    plain = oracle(base)
    for name, ids, logits in zip(names, prompts, ours, strict=True):
        expected = peft_oracle(base, adapters[name])(ids) if name else plain(ids)
        assert_same_logits(logits, expected)
        if name:
            assert (logits - plain(ids)).abs().max() > 0.1  # the adapter does something


@KERNELS
@pytest.mark.parametrize("name", list(FAMILIES))
def test_adapters_of_other_families_agree_with_peft(
    name: str, kernels: str, family_directory: Callable[[str], Path], make_hand: Callable, tmp_path: Path
) -> None:
    base = family_directory(name)
    adapter = save_adapter(base, tmp_path / "adapter", seed=3, r=8, **FAMILIES[name])
    hand = make_hand(base, kernels=kernels)
    hand.adapters["a"] = loaded_adapter(base, adapter, hand.decoder.ops)
    ids, other = texts(40, 20)
    ours, plain = hand.logits([("a", 0, ids), ("b", 0, other)])
    assert_same_logits(ours, peft_oracle(base, adapter)(ids))
    assert_same_logits(plain, oracle(base)(other))


@KERNELS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_a_rows_own_adapter_and_prefix_alone(
    kernels: str, dtype: str, write_tiny: Callable, make_hand: Callable, adapters: dict[str, Path]
) -> None:
    base = write_tiny({})
    work = dict(zip(["r8", "none", "r64-rooted", "r8 again", "r5-mixed"], texts(37, 21, 18, 5, 70), strict=True))

    def new_hand():
        hand = make_hand(base, dtype, "fp8", kernels=kernels)
        loaded = {name: loaded_adapter(base, adapters[name], hand.decoder.ops) for name in CONFIGS}
        hand.adapters.update({name: loaded[name.split()[0]] for name in work if name != "none"})
        return hand

    together = new_hand()
    whole = dict(zip(work, together.logits([(name, 0, ids) for name, ids in work.items()]), strict=True))
    next_ = dict(zip(work, together.logits([(name, len(ids), [9]) for name, ids in work.items()]), strict=True))
    turned = new_hand()
    order = list(work)[::-1]
    for name, logits in zip(order, turned.logits([(name, 0, work[name]) for name in order]), strict=True):
        assert torch.equal(logits, whole[name])
    for name, ids in work.items():
        alone = new_hand()
        parts = [alone.logits([(name, 0, ids[:3])])[0], alone.logits([(name, 3, ids[3:])])[0]]
        assert torch.equal(torch.cat(parts), whole[name]), name
        assert torch.equal(alone.logits([(name, len(ids), [9])])[0], next_[name])
    plain = make_hand(base, dtype, "fp8", kernels=kernels)
    assert torch.equal(plain.logits([("none", 0, work["none"])])[0], whole["none"])  # adapters change nobody else's


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stack_gives_the_bits_of_op_by_op(
    name: str, dtype: str, family_directory: Callable[[str], Path], make_hand: Callable, tmp_path: Path
) -> None:
    base = family_directory(name)
    saved = [save_adapter(base, tmp_path / str(r), seed=r, r=r, **FAMILIES[name]) for r in (4, 7)]
    answers = []
    for by_stack in (True, False):
        hand = make_hand(base, dtype, "fp8", kernels="native")
        assert hand.decoder._stack is not None
        if not by_stack:
            hand.decoder._stack = None
        for sequence, directory in zip("ab", saved, strict=True):
            hand.adapters[sequence] = loaded_adapter(base, directory, hand.decoder.ops)
        ids = texts(33, 1, 50)
        answers.append(torch.cat(hand.logits(list(zip("abc", (0, 0, 0), ids, strict=True)), read_rows=(32, 33, 83))))
    assert torch.equal(answers[0][[32, 33, 83]], answers[1][[32, 33, 83]])


def test_bfloat16_adapters_are_held_in_two_bytes_a_number(
    write_tiny: Callable, make_hand: Callable, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = write_tiny({})
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    (narrow / "adapter_config.json").write_bytes((adapters["r8"] / "adapter_config.json").read_bytes())
    tensors = load_file(adapters["r8"] / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in tensors.items()}, narrow / "adapter_model.safetensors")
    logits = {}
    for kernels in ("torch", "native"):
        hand = make_hand(base, kernels=kernels)
        hand.adapters["a"] = loaded_adapter(base, narrow, hand.decoder.ops)
        if kernels == "native":
            wide = loaded_adapter(base, adapters["r8"], hand.decoder.ops)
            assert hand.adapters["a"].num_bytes * 2 == wide.num_bytes
        logits[kernels] = hand.logits([("a", 0, texts(20)[0])])[0]
    assert_same_logits(logits["native"], logits["torch"])


@pytest.mark.parametrize("rows", [1, 3, 4, 21])
@pytest.mark.parametrize("inner", [16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_kernel_agrees_with_its_definition_at_odd_sizes(
    rows: int, inner: int, dtype: torch.dtype, make_hand: Callable, write_tiny: Callable
) -> None:
    ours, plain = make_hand(write_tiny({}), kernels="native").decoder.ops, TorchOps(torch.float32)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows + 5, inner, generator=generator).to(dtype)
    y = torch.randn(rows + 5, 1100 + 19, generator=generator).to(dtype)
    parts = [
        LowRank(torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator), 0.5, first)
        for rank, out, first in ((9, 1100, 0), (1, 19, 1100))
    ]
    chosen = torch.randperm(rows + 5, generator=generator)[:rows].sort().values
    got, wanted = y.clone(), y.float()
    ours.add_changes(got, x, [RowsOfChange(PackedChange.of(parts, None), chosen)])
    for part in parts:
        columns = slice(part.first_row, part.first_row + len(part.b))
        wanted[chosen, columns] += part.scale * x[chosen].float() @ part.a.t() @ part.b.t()
    assert torch.allclose(got.float(), wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-3)
    others = torch.ones(len(y), dtype=torch.bool)
    others[chosen] = False
    assert torch.equal(got[others], y[others])
    assert isinstance(plain.pack_change(parts), ComposedChange)


@pytest.mark.parametrize("level", PLAYED)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_older_machines_compute_the_same_to_rounding(
    level: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_for(level)
    monkeypatch.setattr(native, "load", lambda: library)
    ops, generator = NativeOps(torch.bfloat16), torch.Generator().manual_seed(3)
    x = torch.randn(5, 70, generator=generator).bfloat16()
    y = torch.randn(5, 2 * 48, generator=generator).bfloat16()
    a, b = (torch.randn(sides, generator=generator).to(kind) for sides in ((9, 70), (80, 9)))
    rows, got = torch.tensor([0, 2, 4]), y.clone()
    ops.add_changes(got, x, [RowsOfChange(ops.pack_change([LowRank(a, b, 0.5, 0)], gate_width=40), rows)])
    change = 0.5 * x[rows].float() @ a.float().t() @ b.float().t()
    wanted = y[rows].float()
    for half, columns in ((0, change[:, :40]), (1, change[:, 40:])):  # panels of sixteen alternate
        for j in range(40):
            wanted[:, j // 16 * 32 + half * 16 + j % 16] += columns[:, j]
    assert torch.allclose(got[rows].float(), wanted, rtol=1e-2, atol=1e-2)
    assert torch.equal(got[[1, 3]], y[[1, 3]])


def test_numbers_that_are_not_finite_are_refused_by_module(
    write_tiny: Callable, make_hand: Callable, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = write_tiny({})
    directory = save_adapter(base, tmp_path / "bad", target_modules=["q_proj"])
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1" in name)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj has numbers that are not finite"):
        loaded_adapter(base, directory, make_hand(base).decoder.ops)


def test_an_empty_slot_fails_the_step(write_tiny: Callable, make_runner: Callable, adapters: dict[str, Path]) -> None:
    from support.checkpoints.models import GREEDY

    from twostroke.core.request import SequenceKey
    from twostroke.engine.plan import SequenceStep, StepPlan
    from twostroke.kv.block import BlockId

    base = write_tiny({})
    runner = make_runner(base, kernels="native")
    step = SequenceStep(SequenceKey("a", 0), 0, (5, 6), (BlockId(0),), (1,), True, GREEDY, 0)
    (plain,) = runner.run(StepPlan(1, (step,))).tokens
    adapted = step._replace(adapter_slot=3)
    with pytest.raises(InternalError, match="slot 3 is empty"):
        runner.run(StepPlan(2, (adapted,)))
    runner.hold_adapter(3, loaded_adapter(base, adapters["r8"], runner.ops))
    ids = [5, 6]
    (changed,) = runner.run(StepPlan(3, (adapted,))).tokens
    assert changed[0] == int(peft_oracle(base, adapters["r8"])(ids)[-1].argmax())
    assert runner.run(StepPlan(4, (step,))).tokens == (plain,)
    runner.drop_adapter(3)
    with pytest.raises(InternalError, match="slot 3 is empty"):
        runner.run(StepPlan(5, (adapted,)))
