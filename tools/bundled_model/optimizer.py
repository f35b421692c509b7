"""Muon for the matrices, AdamW for embeddings and norms. Knows no network.

Source: Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"): momentum whose direction
is made orthogonal by a quintic Newton-Schulz iteration; the size of the update follows Moonlight (Liu et al. 2025,
section 2.2).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """Approximate the nearest matrix with all singular values one. `matrix` [rows, columns]; computes in bfloat16."""
    a, b, c = _QUINTIC
    wide: Tensor = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).bfloat16()
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x if wide is matrix else x.T
    return result.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix. Pieces are the row counts of the matrices in a fused weight."""

    def __init__(self, matrices: Sequence[tuple[Tensor, tuple[int, ...]]], *, lr: float, weight_decay: float) -> None:
        groups = [{"params": [parameter], "pieces": pieces} for parameter, pieces in matrices]
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update from the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(velocity, group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                for piece, part in zip(
                    parameter.split(list(group["pieces"])), direction.split(list(group["pieces"])), strict=True
                ):
                    # 0.2 sqrt(max side) gives the root mean square of an AdamW update, so both use the same rates.
                    piece.add_(orthogonalise(part), alpha=-group["lr"] * 0.2 * max(part.shape) ** 0.5)


def adamw(parameters: Iterable[nn.Parameter], *, lr: float) -> torch.optim.AdamW:
    """Make AdamW for parameters that are no matrix of a layer: embeddings and norms."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
