"""Quantising a checkpoint: its files are what the format's library and our loader read; methods beat the baseline."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints.models import Hand
from support.checkpoints.quantised_checkpoints import digest
from support.checkpoints.quantised_here import BUNDLED, quantised, shallow, texts, with_outliers
from typer.testing import CliRunner

from twostroke.checkpoint.quantised.plan import quantised_plan
from twostroke.cli.main import app
from twostroke.core.errors import CheckpointError, ConfigError, DoesNotFit
from twostroke.model.quantise.gptq import Factor, round_by_columns
from twostroke.model.quantise.job import REPORT_JSON, REPORT_TEXT, Texts, quantise
from twostroke.model.quantise.journal import DIGESTS, Journal, digest_of
from twostroke.model.quantise.observing import Observed
from twostroke.model.quantise.packing import packed
from twostroke.model.quantise.rounding import grid_of, rounded
from twostroke.model.quantise.scheme import Scheme, Settings
from twostroke.model.weights.quantised.numbers import unpacked
from twostroke.model.weights.tensors import open_source

LIBRARY_DIGESTS = Path(__file__).parents[1] / "support" / "checkpoints" / "quantised" / "written_here.json"
FORMS = {
    "rtn-4": Settings("rtn"),
    "rtn-4-asymmetric": Settings("rtn", symmetric=False),
    "rtn-3": Settings("rtn", 3, 32),
    "rtn-8": Settings("rtn", 8),
    "int8": Settings("int8"),
    "smoothquant-o3": Settings("smoothquant", alpha=0.0, level="o3"),
    "fp8-tensor": Settings("fp8", granularity="tensor"),
    "fp8-channel": Settings("fp8"),
    "fp8-block": Settings("fp8", granularity="block"),
    "nvfp4": Settings("nvfp4"),
    "mxfp4": Settings("mxfp4"),
}
FAMILIES = ("phi3", "gemma3", "mixtral", "qwen2-moe", "deepseek-v2")
NO_CALIBRATION = [name for name in FORMS if not name.startswith("smooth")]  # their matrices are the same everywhere


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(tmp_path_factory.mktemp("float") / "one")


@pytest.fixture(scope="module")
def form(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place, made = tmp_path_factory.mktemp("forms"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = place / name
            quantised(one_layer, made[name], FORMS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", NO_CALIBRATION)
def test_compressed_tensors_reads_the_same_numbers(name: str, form: Callable[[str], Path]) -> None:
    """`tools/quantised_checkpoints/read_written_here.py` recorded what the library read."""
    wanted, source = json.loads(LIBRARY_DIGESTS.read_text())[name], open_source(form(name))
    assert len(wanted) == 7
    assert {matrix: digest(source.take(matrix)) for matrix in wanted} == wanted


@pytest.mark.parametrize("name", FORMS)
def test_the_loader_serves_the_rounded_matrices(
    name: str, form: Callable[[str], Path], make_hand: Callable[..., Hand], tmp_path: Path
) -> None:
    """Greedy tokens come out, and logits are those of a float checkpoint of the dequantised matrices."""
    source = open_source(form(name))
    plan = quantised_plan(form(name))
    assert plan is not None
    assert len(plan.matrices) == 7
    (tmp_path / "float").mkdir()
    save_file({key: source.take(key).float() for key in source.shapes()}, tmp_path / "float" / "model.safetensors")
    config = json.loads((form(name) / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    ids = texts().evaluation[0][:40]
    hand, other = make_hand(form(name)), make_hand(tmp_path / "float")
    (ours,) = hand.logits([("a", 0, ids)])
    (theirs,) = other.logits([("a", 0, ids)])
    assert torch.equal(ours, theirs)
    (next_,) = hand.logits([("a", len(ids), [int(ours[-1].argmax())])])
    assert torch.isfinite(next_).all()


@pytest.mark.campaign
def test_four_bits_by_gptq_and_awq_are_nearer_to_the_original_than_rounding(tmp_path: Path) -> None:
    given = texts(calibration=8, evaluation=3, window=512)
    reports = {m: quantised(BUNDLED, tmp_path / m, Settings(m), given) for m in ("rtn", "awq", "gptq")}  # type: ignore[arg-type]
    kl = {method: report.comparison.kl for method, report in reports.items()}
    assert kl["gptq"] < 0.85 * kl["rtn"], kl
    assert kl["awq"] < 0.9 * kl["rtn"], kl
    for report in reports.values():
        assert report.quantised_bytes < 0.45 * report.original_bytes  # the embedding stays as it is


def test_smoothquant_keeps_the_perplexity_where_outliers_spoil_plain_eight_bits(tmp_path: Path) -> None:
    outliers, given = with_outliers(tmp_path / "outliers"), texts(calibration=4, evaluation=2, window=256)
    naive = quantised(outliers, tmp_path / "int8", Settings("int8"), given).comparison
    smooth = quantised(outliers, tmp_path / "smooth", Settings("smoothquant"), given).comparison
    plain = naive.original_perplexity
    assert smooth.original_perplexity == plain
    assert naive.perplexity > 1.05 * plain
    assert abs(smooth.perplexity / plain - 1) < 0.01


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_killed_run_goes_on_at_its_last_layer_with_the_same_bytes(
    kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a layer's file is there and its progress is not, and after it."""
    two = shallow(tmp_path / "two", layers=2)
    quantised(two, tmp_path / "whole", Settings("gptq"))
    began: list[int] = []

    def kill(done: int, of: int, what: str) -> None:
        began.append(done)
        if done == kill_at:
            raise _Killed

    with pytest.raises(_Killed):
        quantise(two, tmp_path / "out", Settings("gptq"), texts(), memory_bytes=1 << 40, tell=kill)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"begun with another .* remove"):
        quantised(two, tmp_path / "out", Settings("awq"))
    quantise(
        two, tmp_path / "out", Settings("gptq"), texts(), memory_bytes=1 << 40, tell=lambda d, o, w: began.append(d)
    )
    assert began == [*range(kill_at + 1), *range(kill_at, 4)]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert not (tmp_path / "out.partial").exists()


def test_a_half_written_file_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", "key")
    journal.add_weights("a.safetensors", {"a": torch.ones(2)})
    journal.finish_layer({"x": torch.zeros(1)}, {})
    journal.add_weights("b.safetensors", {"b": torch.ones(3)})  # killed before `finish_layer`
    with pytest.raises(ConfigError, match="in use by another run"):
        Journal(tmp_path / "out", "key")
    journal.close()
    again = Journal(tmp_path / "out", "key")
    assert (again.progress.layers, list(again.progress.names)) == (1, ["a.safetensors"])
    assert again.state()["x"].tolist() == [0]
    again.close()
    (tmp_path / "out.partial" / "a.safetensors").write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"a\.safetensors is not as it was written"):
        Journal(tmp_path / "out", "key")


def test_the_written_folder_is_whole_and_says_what_it_cost(form: Callable[[str], Path]) -> None:
    folder = form("rtn-4")
    listed = dict(reversed(line.split("  ")) for line in (folder / DIGESTS).read_text().splitlines())
    assert set(listed) | {DIGESTS} == {path.name for path in folder.iterdir()}
    assert all(digest_of(folder / name) == wanted for name, wanted in listed.items())
    report = json.loads((folder / REPORT_JSON).read_text())
    assert len(report["matrices"]) == 7
    assert all(0 < matrix["output"] < 0.1 for matrix in report["matrices"])
    assert f"{report['comparison']['perplexity']:.4f}" in (folder / REPORT_TEXT).read_text()
    assert "rounded to nearest, not calibrated" in (folder / REPORT_TEXT).read_text()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Settings("rtn", 5), r"--bits is 5; must be 3, 4 or 8"),
        (Settings("fp8", 4), r"--bits is 4; fp8 has 8"),
        (
            Settings("gptq", group=100),
            r"--group is 100, which does not divide the 256 columns of model\.layers\.0.* give 64",
        ),
        (Settings("nf4"), r"--method is 'nf4'; must be one of rtn, fp8"),  # type: ignore[arg-type]
        (Settings("smoothquant", alpha=1.5), r"--alpha is 1\.5.* 0 to 1"),
        (Settings("gptq", level="o2"), r"--level is 'o2'; only smoothquant"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    settings: Settings, told: str, one_layer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        quantised(one_layer, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_checkpoints_texts_and_machines_that_do_not_do_are_refused(
    one_layer: Path, form: Callable[[str], Path], family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    rtn = Settings("rtn")
    with pytest.raises(CheckpointError, match="it is quantised already; give the float checkpoint"):
        quantised(form("rtn-4"), tmp_path / "out", rtn)
    with pytest.raises(CheckpointError, match=r"stacked with biases \(GptOssForCausalLM\).*MXFP4 release"):
        quantised(family_directory("gpt-oss"), tmp_path / "out", rtn)
    with pytest.raises(ConfigError, match="which exists; give a new name"):
        quantised(one_layer, one_layer, rtn)
    with pytest.raises(ConfigError, match=r"gives 768 tokens in whole windows; at least 1024 are needed"):
        quantised(one_layer, tmp_path / "out", rtn, texts(calibration=3))
    with pytest.raises(ConfigError, match=r"--window is 250; must be a multiple of 16"):
        quantised(one_layer, tmp_path / "out", rtn, texts(calibration=5, window=250))
    with pytest.raises(DoesNotFit, match=r"needs \d+ MiB, and 1 MiB are free"):
        quantise(one_layer, tmp_path / "out", rtn, texts(), memory_bytes=1 << 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "awq") for name in FAMILIES),
        ("gemma3", "smoothquant"),
        ("deepseek-v2", "smoothquant"),
        ("phi3", "gptq"),
    ],
)
def test_families_keep_their_numbers_in_eight_bits(
    name: str, method: str, family_directory: Callable[[str], Path], make_hand: Callable[..., Hand], tmp_path: Path
) -> None:
    """Fused projections, norms minus one, experts, latents: folded scales change nothing, and all is served again."""
    chance = random.Random(5)
    ids = [[chance.randrange(3, 150) for _ in range(64)] for _ in range(20)]
    settings = Settings(method, 8) if method != "smoothquant" else Settings("smoothquant")  # type: ignore[arg-type]
    report = quantised(
        family_directory(name), tmp_path / "out", settings, Texts(ids[:17], ids[17:], "random", "random")
    )
    (floats,) = make_hand(family_directory(name)).logits([("a", 0, ids[0])])
    (ours,) = make_hand(tmp_path / "out").logits([("a", 0, ids[0])])
    rows = (ours - floats).norm(dim=1) / floats.norm(dim=1)
    assert rows.median() < 0.03  # some rows may choose other experts
    assert report.comparison.kl < 0.02
    unseen = [matrix.module for matrix in report.matrices if matrix.output is None]
    assert all("kv_b_proj" in module for module in unseen), unseen


def test_the_command_writes_a_checkpoint_and_says_what_it_cost(one_layer: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, one_layer / name)
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n\n" * 400)
    flags = ["--method", "gptq", "--calibration", str(tmp_path / "text"), "--window", "64", "--threads", "1"]
    done = CliRunner().invoke(app, ["quantize", str(one_layer), str(tmp_path / "out"), *flags])
    assert done.exit_code == 0, done.output
    assert "KL" in done.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = CliRunner().invoke(app, ["quantize", str(one_layer), str(tmp_path / "out"), *flags])
    assert isinstance(again.exception, ConfigError)
    other = CliRunner().invoke(app, ["quantize", str(one_layer), str(tmp_path / "new"), "--method", "best"])
    assert "must be one of rtn, fp8" in str(other.exception)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_numbers_come_back(bits: int) -> None:
    numbers = torch.randint(0, 1 << bits, (5, 71), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpacked(packed(numbers, bits), bits, range(71)).long(), numbers)


@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_lessens_the_error_of_the_output_on_inputs_that_resemble_each_other(ordered: bool) -> None:
    chance = torch.Generator().manual_seed(4)
    x = torch.randn(500, 8, generator=chance) @ torch.randn(8, 70, generator=chance)
    x += 0.1 * torch.randn(500, 70, generator=chance)
    x[:, 5] = 0  # never used
    weight, seen = torch.randn(33, 70, generator=chance), Observed.nothing(70)
    seen.add(x)
    scheme = Scheme(4, strategy="group", group=35)
    grid = grid_of(weight, scheme, torch.float32)
    nearest = rounded(weight, grid, scheme).values(scheme)
    by_columns = round_by_columns(weight, Factor(seen, 0.01, ordered), grid, scheme).values(scheme)
    errors = [float((x @ (values - weight).t()).square().sum()) for values in (nearest, by_columns)]
    assert errors[1] < 0.3 * errors[0]
    assert seen.output_error(nearest - weight) == pytest.approx(errors[0], rel=1e-3)
