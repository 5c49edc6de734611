"""Muon: gradient descent whose every step moves all directions of the rows alike."""

import math
from typing import Any, Dict, Iterable

import torch

_COEFFICIENTS = 5 * ((3.4445, -4.7750, 2.0315),) + 2 * ((1.5, -0.5, 0.0),)
"""Of each round. Five of Keller Jordan's (Muon, 2024) bring singular values to between about 0.7 and 1.2, also those
that were a three-hundredth of the norm; two of Newton and Schulz's bring these to between 0.97 and 1."""


class Muon(torch.optim.Optimizer):
    """Changes each parameter by ``lr`` times its momentum with all singular values brought to about one.

    About half of the square of a soft prompt's first gradient is one of its twenty directions (demonstration model);
    here all move alike. A step's root mean square is about ``lr``, as Adam's, so that both take the same rates.
    Of a parameter of three dimensions each matrix is a parameter of its own; one of one dimension is a row.

    torch has a Muon from 2.9 on, which takes two dimensions and calculates in bfloat16; this one is float32, and
    on a CPU the same bit for bit.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Change the parameters that have a gradient, in place."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _move(parameter, self.state[parameter], group)


def _move(parameter: torch.Tensor, state: Dict[str, torch.Tensor], group: Dict[str, Any]) -> None:
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(parameter)
    momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)  # type: ignore[arg-type]
    ahead = momentum * group["momentum"] + parameter.grad  # Nesterov's
    matrix = ahead[None] if ahead.dim() == 1 else ahead
    step = orthogonal(matrix).reshape(parameter.shape)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(step, alpha=group["lr"] * math.sqrt(max(matrix.shape[-2:])))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """``[..., rows, columns]``: the same singular vectors, all singular values about one."""
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.transpose(-2, -1)
    wide = wide / torch.linalg.norm(wide, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for first, third, fifth in _COEFFICIENTS:
        product = wide @ wide.transpose(-2, -1)
        wide = first * wide + (third * product + fifth * product @ product) @ wide
    return wide if matrix.shape[-2] <= matrix.shape[-1] else wide.transpose(-2, -1)
