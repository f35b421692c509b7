"""`twostroke quantize`: from a float checkpoint to a quantised one that this cluster, vLLM and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

SHIPPED = "help() topics"
_EVALUATED_OF = 5  # without a text for the comparison, every so many windows of the calibration's text serve it


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Float checkpoint: a directory, a hub name, or 'bundled'.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    method: Annotated[
        str,
        typer.Option(
            help="rtn, awq, gptq, nvfp4, mxfp4 (weights alone), fp8, int8, smoothquant (weights and activations)."
        ),
    ],
    bits: Annotated[int | None, typer.Option(help="3, 4 or 8, for rtn, awq and gptq (4 if not given).")] = None,
    group: Annotated[
        int | None, typer.Option(help="Columns per scale; 0: a scale per row. 128 or a divisor below, at 3 and 4 bits.")
    ] = None,
    granularity: Annotated[
        Literal["tensor", "channel", "block"], typer.Option(help="fp8: numbers that share a scale.")
    ] = "channel",
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="rtn, awq, gptq: with zero points.")] = False,
    alpha: Annotated[float | None, typer.Option(help="smoothquant: 0 to 1; searched if not given.")] = None,
    level: Annotated[
        Literal["o1", "o2", "o3"],
        typer.Option(help="smoothquant: activations per token (o1), per tensor (o2), per tensor and static (o3)."),
    ] = "o1",
    damp: Annotated[float, typer.Option(help="gptq: share of the mean diagonal.")] = 0.01,
    act_order: Annotated[bool, typer.Option(help="gptq: columns by their activations.")] = True,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text; Python's help() topics if not given.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text for the comparison; held-out windows of the other if not given."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="At most.")] = 65536,
    evaluation_tokens: Annotated[int, typer.Option(min=1, help="At most.")] = 16384,
    window: Annotated[
        int, typer.Option(min=16, help="Tokens of a text that are seen at once; a multiple of 16.")
    ] = 512,
    memory: Annotated[float | None, typer.Option(help="GiB that may be used; what is free if not given.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores; all if not given.")] = None,
) -> None:
    """Quantise a checkpoint layer by layer, and report what it costs. A killed run goes on when it is started again."""
    from ..checkpoint.locate import located
    from ..model.quantise.checks import opened, refuse_taken
    from ..model.quantise.job import REPORT_TEXT, Texts, quantise
    from ..model.quantise.scheme import METHODS, Settings, scheme_of
    from ..text.tokenizer import Tokenizer
    from ..worker.machine import machine_facts

    chosen = next((name for name in METHODS if name == method), None)
    if chosen is None:
        raise ConfigError(f"--method is {method!r}; must be one of {', '.join(METHODS)}")
    settings = Settings(chosen, bits, group, granularity, not asymmetric, alpha, level, damp, act_order)
    refuse_taken(out)
    directory = located(source)
    scheme_of(settings, opened(directory).widths())  # before a long text is read
    tokenizer, machine = Tokenizer.load(directory), machine_facts()
    counts = calibration_tokens // window, evaluation_tokens // window
    windows, evaluated = _windows(tokenizer, calibration, evaluation, window, counts)
    named = calibration.name if calibration else SHIPPED
    texts = Texts(windows, evaluated, named, evaluation.name if evaluation else f"{named}, held out")
    screen = Console(stderr=True)
    columns = TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=screen) as bar:
        task = bar.add_task("reading", total=None)

        def tell(done: int, of: int, what: str) -> None:
            bar.update(task, completed=done, total=of, description=what)
            if not screen.is_terminal:  # no bar is drawn there
                typer.echo(f"{what}: {done} of {of}", err=True)

        report = quantise(
            directory,
            out,
            settings,
            texts,
            memory_bytes=machine.memory_bytes if memory is None else int(memory * 2**30),
            num_threads=threads or machine.num_cores,
            tell=tell,
        )
    for line in report.summary():
        typer.echo(line)
    typer.echo(f"{out} is written; errors of all matrices: {out / REPORT_TEXT}")


def _windows(
    tokenizer: Tokenizer, calibration: Path | None, evaluation: Path | None, window: int, counts: tuple[int, int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows for the calibration and for the comparison, which share no token."""
    text = _shipped() if calibration is None else _read(calibration)
    found = _cut(tokenizer.encode(text), window)
    if evaluation is not None:
        return found[: counts[0]], _cut(tokenizer.encode(_read(evaluation)), window)[: counts[1]]
    kept = [ids for place, ids in enumerate(found) if place % _EVALUATED_OF != _EVALUATED_OF - 1]
    return kept[: counts[0]], found[_EVALUATED_OF - 1 :: _EVALUATED_OF][: counts[1]]


def _cut(ids: list[int], window: int) -> list[list[int]]:
    return [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]


def _shipped() -> str:
    """Text that comes with every Python: English prose about a language, with examples."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text ({error}); give another file") from None
