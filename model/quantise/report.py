"""What quantising cost: error per matrix, perplexity and KL beside the original, sizes; as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .layer import MatrixError
from .scheme import CALIBRATED
from .stream import Comparison


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a run. Sizes are of the files of weights."""

    method: str
    scheme: str
    calibration: str  # the text whose inputs of matrices were seen
    evaluation: str
    original_bytes: int
    quantised_bytes: int
    comparison: Comparison
    matrices: Sequence[MatrixError]
    remarks: Sequence[str]

    def json(self) -> str:
        """All numbers."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in Report.__slots__}
        plain["comparison"] = asdict(self.comparison)
        plain["matrices"] = [asdict(matrix) for matrix in self.matrices]
        plain["remarks"] = list(self.remarks)
        return json.dumps(plain, indent=1) + "\n"

    def summary(self) -> list[str]:
        """The lines that a terminal shows."""
        c, sizes = self.comparison, [size / 2**20 for size in (self.quantised_bytes, self.original_bytes)]
        return [
            f"{self.method}: {self.scheme}",
            self._use_of_text(),
            f"compared on {self.evaluation}, activations rounded as the config asks",
            f"perplexity {c.perplexity:.4f}, original {c.original_perplexity:.4f} "
            f"({c.perplexity / c.original_perplexity - 1:+.3%})",
            f"KL {c.kl:.3e} nats per token, the same first token for {c.same_first:.2%}",
            f"weights {sizes[0]:,.2f} MiB, original {sizes[1]:,.2f} MiB ({sizes[0] / sizes[1]:.1%})",
            *self.remarks,
        ]

    def _use_of_text(self) -> str:
        if self.method in CALIBRATED:
            return f"calibrated on {self.calibration}"
        return f"rounded to nearest, not calibrated; output errors are of {self.calibration}"

    def text(self) -> str:
        """Summary and all matrices. Errors are shares of the original's squared size."""
        width = max(len(matrix.module) for matrix in self.matrices)
        lines = [*self.summary(), "", f"{'matrix':{width}}  weight error  output error"]
        for matrix in self.matrices:
            output = "" if matrix.output is None else f"{matrix.output:.3e}"
            lines.append(f"{matrix.module:{width}}  {matrix.weight:12.3e}  {output:>12}  {matrix.note}".rstrip())
        return "\n".join(lines) + "\n"
