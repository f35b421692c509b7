"""What a model takes on GPUs that are not here, rank by rank, as a table for `twostroke serve --dry-run --machine`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..cluster.catalogue import MachineShape
from ..cluster.config import Config
from ..cluster.fit import RankFit, fits
from ..cluster.model_facts import needs_by_ranks
from ..core.errors import ConfigError

_HEADINGS = ("GPUs", "weights each", "activations each", "KV pool each", "tokens of KV", "context", "weights read in")


def show_fits(config: Config, shape: MachineShape, out: Console) -> None:
    """Print the machine, one worker's needs by its number of GPUs, and how many it needs at least.

    Raises:
        ConfigError: the model is for the CPU.
        CheckpointError: the checkpoint cannot be found or is not supported.
    """
    if config.model.device == "cpu":
        raise ConfigError("model.device is 'cpu', and --machine names GPUs: leave one of them out")
    out.print(str(shape), highlight=False)
    found = fits(needs_by_ranks(config, shape.gpus_per_node), config, shape.gpu)
    table = Table(title="one worker, by its GPUs", title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for fit in found:
        step = [mib(fit.activation_bytes), mib(fit.pool_bytes), f"{fit.num_tokens:,}", f"{fit.max_model_len:,}"]
        shown = step if fit.is_possible else ["", "does not fit", "", ""]
        table.add_row(str(fit.num_ranks), mib(fit.weight_bytes), *shown, f"{fit.read_ms(shape.gpu):.2f} ms")
    out.print(table)
    out.print(f"on one GPU: {found[0].arithmetic}", highlight=False)
    out.print(f"note: {_least_ranks(found)}; this release runs workers of one GPU, more are for planning")


def mib(num_bytes: int) -> str:
    """Bytes in MiB, as text."""
    return f"{num_bytes / 2**20:,.0f} MiB"


def _least_ranks(found: Sequence[RankFit]) -> str:
    least = next((fit.num_ranks for fit in found if fit.is_possible), None)
    if least is None:
        return f"a worker does not fit {found[-1].num_ranks} GPUs, the most of a node that its heads can be split over"
    return f"a worker fits {least} {'GPU' if least == 1 else 'GPUs'} of this kind"
