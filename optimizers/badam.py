"""BAdam (arXiv:2404.02827): Adam on one block of layers at a time, nothing elsewhere; with LISA's order
(arXiv:2403.17919).

For `switch_block_every` steps one block is trained by AdamW and the rest of the model is frozen; then comes
the next. Only the active block has gradients and state. Backward stops at the shallowest active layer, so
steps on deep layers are quicker too. A block starts with zero moments and a bias correction from step 1 each
time that its turn comes; one whose turn comes twice running keeps its state.

    bytes for a block of n weights in bfloat16, beside the model's 2 a weight:
        gradient 2 n, moments 8 n (state_bits 32), 4 n (16) or 2 n (8), master 4 n, kahan 2 n, sr 0

A turn may move a weight by less than the last digit of bfloat16. A master or Kahan's compensation knows of
it, but goes when the turn ends: rounding to nearest would then undo every small move, turn after turn. So it
is rounded up or down at random in proportion, which is right on average (float16: to nearest).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from . import adamw
from .blocks import BlockSchedule, Order, take_turns
from .groups import parameter_groups
from .matrix import Group, MatrixOptimizer, as_groups
from .moments import State
from .weights import add_step

_ALWAYS = -1


class BAdam(MatrixOptimizer):
    """BAdam as a `torch.optim.Optimizer`; see the module.

    params: `model.named_parameters()`, or groups of such (name, tensor) pairs. Those that have a turn or are
    always trained become its own. Others that require a gradient are frozen for good, and those that require
    none when they come stay as they are. It is used like any optimizer:

        optimizer = BAdam(model.named_parameters(), lr=1e-5)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    switch_block_every: steps of a turn, also of the first. order, active_blocks: see `BlockSchedule`.
    train_embeddings: embeddings, and final norm with head, take turns too (with `lisa` they are always
    trained). blocks: lists of names or prefixes, from the input to the output, in place of the layers.
    freeze: only active tensors require a gradient, from the constructor on. With False those of all blocks do
    and the inactive are skipped, for DistributedDataParallel, which wants a fixed set.

    State loaded by other means than `load_state_dict` needs a call of `activate` before the next forward
    pass; `step` raises RuntimeError where it was forgotten. Raises ValueError for an option out of range, for
    names without layers, and for tensors without names.
    """

    steps_alone = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        switch_block_every: int = 50,
        order: Order = "random",
        active_blocks: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        train_embeddings: bool = False,
        state_bits: int = 32,
        weights: str = "master",
        seed: int = 0,
        freeze: bool = True,
        blocks: Sequence[Sequence[str] | str] | None = None,
    ) -> None:
        self.freeze = freeze
        groups = [{**group, "params": _pairs(group["params"])} for group in as_groups(params)]
        trained = [name for group in groups for name, p in group["params"] if p.requires_grad]
        turns, always = take_turns(trained, order=order, train_embeddings=train_embeddings, blocks=blocks)
        schedule = BlockSchedule(len(turns), order, switch_block_every, active_blocks, seed)
        block_of = {name: number for number, block in enumerate(turns) for name in block}
        block_of |= dict.fromkeys(always, _ALWAYS)
        kept = []
        self._left_out: list[Tensor] = []
        for group in groups:
            pairs = [(name, p) for name, p in group["params"] if name in block_of]
            self._left_out += [p for name, p in group["params"] if p.requires_grad and name not in block_of]
            if pairs:
                numbers = [block_of[name] for name, _ in pairs]
                kept.append({**group, "params": pairs, "kind": "adamw", "block_of": numbers})
        self._active: set[Tensor] = set()
        self._ready: object = None
        # All that decides what is active stands in the groups, so that every kind of checkpoint has it.
        super().__init__(
            kept,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_bits=state_bits,
            weights=weights,
            seed=seed,
            schedule=asdict(schedule),
            steps=0,
        )
        self.activate()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: the blocks are made once, from all parameters."""
        if "block_of" not in param_group:
            raise ValueError("BAdam: blocks are made once; give all groups to the constructor")
        super().add_param_group(param_group)

    @property
    def schedule(self) -> BlockSchedule:
        """Which blocks are active at a step."""
        return BlockSchedule(**self.param_groups[0]["schedule"])

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.param_groups[0]["steps"])

    def active_parameters(self) -> list[Tensor]:
        """The tensors that the next step changes: what a gradient's norm is the norm of."""
        return [p for group in self.param_groups for p in group["params"] if p in self._active]

    @torch.no_grad()
    def activate(self) -> None:
        """Make active what the schedule says for the next step, and free gradient and state of the others.

        `step` and `load_state_dict` end with it. Calling it again changes nothing.
        """
        active = self.schedule.at(self.steps)
        before, self._active = self._active, set()
        for group in self.param_groups:
            for p, block in zip(group["params"], group["block_of"], strict=True):
                trains = block == _ALWAYS or block in active
                if trains:
                    self._active.add(p)
                    if p not in before:
                        p.grad = None  # without freezing it has one, of a step that was not its own
                else:
                    self._leave(p, group)
                if p.requires_grad != (trains or not self.freeze):
                    p.requires_grad_(not p.requires_grad)
        # Under DDP they are frozen too: no step would ever clear their gradients.
        for p in self._left_out:
            p.requires_grad_(False)
        self._ready = self._moment()

    def unfreeze(self) -> None:
        """Let all tensors require a gradient that did when they came; `activate` freezes them again."""
        for p in [*(p for group in self.param_groups for p in group["params"]), *self._left_out]:
            p.requires_grad_(True)
        self._ready = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every active tensor that has a gradient; then the next block, if its turn has come.

        The switch is here, before the next forward pass, since that must already know where gradients go.
        """
        if self._ready != self._moment():
            raise RuntimeError(
                "BAdam: the state was loaded or tensors unfrozen; call activate() before the forward pass"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._advance(group, [p for p in group["params"] if p in self._active and p.grad is not None])
        for group in self.param_groups:
            group["steps"] += 1
        self.activate()
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """The update of one tensor alone, if it is active; `step` afterwards ends the step."""
        if parameter in self._active:
            super().step_parameter(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; then the blocks are active that were when it was saved."""
        super().load_state_dict(state_dict)
        self.activate()

    # --- the machinery

    def _moment(self) -> object:
        return self.schedule, self.steps

    def _leave(self, p: Tensor, group: Group) -> None:
        """Free the gradient and the state of `p`, whose turn is over."""
        p.grad = None
        state = self.state.pop(p, None)
        if state:
            self._settle(p, state, group)

    def _settle(self, p: Tensor, state: State, group: Group) -> None:
        """Round what the state knows of the weight beyond its type into it, up or down at random."""
        exact = state.get("master", state.get("compensation"))
        if exact is None:
            return
        beyond = exact.reshape(1, -1, 1)

        def put(target: Tensor, rows: slice) -> None:
            target.add_(beyond[:, rows])

        whole, keep = p.detach().contiguous(), 0.0 if "master" in state else 1.0
        noise = [self._noise_of(p, group)]
        add_step([whole.view(1, -1, 1)], [{}], put, keep=keep, mode="sr", noise=noise)
        if not p.is_contiguous():
            p.copy_(whole)

    def _noise_step(self, group: Group) -> int | None:
        # That of the run: a block's own starts again each turn, and a weight that met the same noise every
        # time might never be rounded up.
        return int(group["steps"])


def build(
    model: nn.Module, config: Any, *, seed: int = 0, loraplus_lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a recipe. UserError where the model has no layers, or fewer than active_blocks."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=config.weight_decay, loraplus_lr_ratio=loraplus_lr_ratio)
    for group in groups:
        group["params"] = [(names[id(p)], p) for p in group["params"]]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        return BAdam(
            groups,
            lr=0.0,
            switch_block_every=config.switch_block_every,
            order=config.order,
            active_blocks=config.active_blocks,
            betas=config.betas,
            eps=config.eps,
            train_embeddings=config.train_embeddings,
            state_bits=config.state_bits,
            weights=config.weights,
            seed=seed,
            freeze=not (distributed and torch.distributed.get_world_size() > 1),
        )
    except ValueError as error:
        raise UserError(f"optimizer.name  badam: {error}") from None


def trained_names(names: Iterable[str], config: Any) -> list[str]:
    """Which of `names` are ever trained: with the default, those in layers."""
    turns, always = take_turns(names, order=config.order, train_embeddings=config.train_embeddings)
    return [name for block in turns for name in block] + always


def state_bytes(
    names_and_shapes: Iterable[tuple[str, tuple[int, ...]]], config: Any, dtype: torch.dtype
) -> int:
    """Most bytes of state at a time for parameters of `dtype`; config is BAdam's part of a recipe.

    ValueError where names have no layers, or there are fewer than active_blocks.
    """
    return _largest(names_and_shapes, config, lambda shape: adamw.state_bytes(shape, config, dtype))


def largest_elements(names_and_shapes: Iterable[tuple[str, tuple[int, ...]]], config: Any) -> int:
    """Most elements of gradients at a time, in one process (several hold them all); as `state_bytes`."""
    return _largest(names_and_shapes, config, prod)


def _largest(
    names_and_shapes: Iterable[tuple[str, tuple[int, ...]]],
    config: Any,
    size: Callable[[tuple[int, ...]], int],
) -> int:
    sizes = {name: size(shape) for name, shape in names_and_shapes}
    turns, always = take_turns(sizes, order=config.order, train_embeddings=config.train_embeddings)
    schedule = BlockSchedule(len(turns), config.order, active=config.active_blocks)
    return schedule.largest([sum(sizes[name] for name in block) for block in turns]) + sum(
        sizes[name] for name in always
    )


def _pairs(params: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs as a list."""
    given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    for entry in given:
        if not isinstance(entry, tuple):
            raise ValueError(
                f"BAdam finds blocks by name, and a parameter of shape {tuple(entry.shape)} came without: "
                "give model.named_parameters(), or groups of (name, tensor) pairs"
            )
    return given
