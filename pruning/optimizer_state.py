"""An optimizer follows a removal: its parameters are exchanged in place, its states cut like the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError


class Follower:
    """Keeps an optimizer's groups and states in step with parameters that are cut, removed or new."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """`parameters` are those that will be cut. Nothing is changed when a state cannot be.

        Raises:
            UserError: a state that is neither a scalar nor of its weight's shape.
        """
        self.optimizer = optimizer
        self.places = {
            id(parameter): (group, position)
            for group in optimizer.param_groups
            for position, parameter in enumerate(group["params"])
        }
        for parameter in parameters:
            for name, value in optimizer.state.get(parameter, {}).items():
                if _numbers(value) and value.shape != parameter.shape:
                    raise UserError(
                        f"pruning: the state {name} of {type(optimizer).__name__} has the shape "
                        f"{tuple(value.shape)} for a weight {tuple(parameter.shape)} and cannot be cut.\n"
                        "  Use an optimizer with states like its weights, such as adamw in 32 bits, or prune "
                        "before it is made."
                    )

    def replace(self, old: nn.Parameter, new: nn.Parameter, index: Tensor, dim: int) -> None:
        """`new` stands where `old` stood, with the same cut of its states."""
        if id(old) in self.places:
            group, position = self.places.pop(id(old))
            group["params"][position] = new
            self.places[id(new)] = (group, position)
        if old in self.optimizer.state:
            state = self.optimizer.state.pop(old)
            self.optimizer.state[new] = {
                name: value.index_select(dim, index.to(value.device)) if _numbers(value) else value
                for name, value in state.items()
            }

    def add(self, new: nn.Parameter, beside: nn.Parameter) -> None:
        """`new` joins the group of `beside`, at its end; no group when that has none."""
        if id(beside) in self.places:
            group = self.places[id(beside)][0]
            self.places[id(new)] = (group, len(group["params"]))
            group["params"].append(new)

    def drop(self, gone: Iterable[nn.Parameter]) -> None:
        """Forget parameters and their states; the last thing to do, since positions move."""
        names = {id(parameter) for parameter in gone}
        for group in self.optimizer.param_groups:
            group["params"] = [each for each in group["params"] if id(each) not in names]
        for parameter in [each for each in self.optimizer.state if id(each) in names]:
            del self.optimizer.state[parameter]
        self.places.clear()


def _numbers(value: Any) -> bool:
    """A tensor with a shape, not a step counter."""
    return isinstance(value, Tensor) and value.ndim > 0
