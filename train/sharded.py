"""What the engines share that keep weights, gradients or optimizer state in shards.

Such an engine is an ordinary one, with whole weights in every process, until `begin` and again after `end`:
what comes before the first step (the untrained model's answers) and after the last (checkpoint, export) is
the same code as without shards. In between, `whole` brings the weights together for what one process does
alone.

State has names here, not places in shards: what `state_dict` gives are the files of the native engine,
whatever the number of processes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ..checkpoint import Piece
from ..recipes import Recipe
from ..recipes.optimizers import AdamW, OptimizerConfig
from .engine import NativeEngine

MASTER = "master"
"""Key of the float32 weights in the state of a parameter whose own are narrower."""
MOMENTS = ("exp_avg", "exp_avg_sq")
OwnPieces = Iterator[tuple[str, Piece | None, dict[str, Piece]]]
"""Of each trained parameter: its name, and this process's piece of the weight and of its state by key."""


class ShardedEngine(NativeEngine, ABC):
    """An engine that shards in `begin` and holds whole tensors again after `end`.

    `optimizer` is one over the whole, named parameters: rates and weight decay are set in its groups, and its
    state is only filled outside of begin and end, or while a checkpoint is made.
    """

    sharding = False
    """True between begin and end."""
    weights_in_shards = False
    """Whether a process must gather to read a weight, so that all must do it together."""
    _gathered = False

    def __post_init__(self) -> None:
        self.forward = self.loss_module
        self.parameters = {
            name: p for name, p in self.loss_module.model.named_parameters() if p.requires_grad
        }

    @abstractmethod
    def shard(self) -> None:
        """Cut up model and optimizer; the state is put in afterwards. On all processes."""

    @abstractmethod
    def unshard(self) -> None:
        """Undo `shard`: plain, whole parameters in the model, and no hooks. On all processes."""

    @abstractmethod
    def gather_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, every parameter is whole on every process, and stays so when the model is run."""

    @abstractmethod
    def whole_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter's name and whole state, gathered on all processes; nothing before the first step."""

    @abstractmethod
    def put_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Cut up whole states by name, and keep this process's part of each."""

    @property
    def state_in_shards(self) -> bool:
        """Whether a process has the state of a part of the weights alone."""
        return True

    @abstractmethod
    def own_pieces(self) -> OwnPieces:
        """What this process holds, as it lies there; nothing is sent. Between begin and end."""

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Of each trained parameter, whole."""

    @abstractmethod
    def steps(self) -> Tensor:
        """The count of steps, as the state of each parameter has it."""

    def replicated_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `state_dict`, of an engine whose processes hold all of it: nothing is sent."""
        self._fill(dict(self.whole_states()))
        try:
            return super().state_dict()
        finally:
            self.optimizer.state.clear()

    def begin(self) -> None:
        """Shard, with the state that the optimizer has (of a resumed run). On all processes."""
        states = {name: dict(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}
        self.optimizer.state.clear()
        self.shard()
        self.sharding = True
        states = {name: state for name, state in states.items() if state}
        if states:
            self.put_states(states)

    def end(self) -> None:
        """Hold whole tensors again. On all processes; the state is whole on the main one alone."""
        if not self.sharding:
            return
        states = self._kept_states()
        self.unshard()
        self.sharding = False
        self.optimizer.zero_grad(set_to_none=True)
        self._fill(states)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every parameter is whole on every process. Enter it on all of them."""
        if not (self.sharding and self.weights_in_shards) or self._gathered:
            yield
            return
        with self.gather_weights():
            self._gathered = True
            try:
                yield
            finally:
                self._gathered = False

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights to measure. With several processes they are gathered first: one may measure more
        batches than another, and must not wait for it.
        """
        with self.whole() if self.accelerator.num_processes > 1 else contextlib.nullcontext():
            yield

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the native engine's, and in the same files; on all processes, inside `whole`."""
        if not self.sharding:
            return super().state_dict()
        self._fill(self._kept_states())
        try:
            return super().state_dict()
        finally:
            self.optimizer.state.clear()

    def load_state_dict(self, tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        """Restore what state_dict gave, before `begin`."""
        if self.sharding:
            raise ValueError("the state is loaded before the shards are made")
        super().load_state_dict(tensors, settings)

    def _kept_states(self) -> dict[str, dict[str, Tensor]]:
        """Gathered on all processes, kept on the main one, in host memory."""
        main = self.accelerator.is_main_process
        return {
            name: {key: value.to("cpu", copy=True) for key, value in state.items()}
            for name, state in self.whole_states()
            if main and state
        }

    def _fill(self, states: dict[str, dict[str, Tensor]]) -> None:
        for name, state in states.items():
            self.optimizer.state[self.parameters[name]] = state


def begin_sharding(engine: NativeEngine) -> None:
    """Before the first step; nothing for an engine without shards."""
    if isinstance(engine, ShardedEngine):
        engine.begin()


def end_sharding(engine: NativeEngine) -> None:
    """After the last step; nothing for an engine without shards."""
    if isinstance(engine, ShardedEngine):
        engine.end()


@contextlib.contextmanager
def whole_state(engine: NativeEngine) -> Iterator[tuple[dict[str, Any], dict[str, Any]] | None]:
    """What `state_dict` gives, on the main process (None on the others), which may write the model inside.

    Enter it on all processes.
    """
    main = engine.accelerator.is_main_process
    if not isinstance(engine, ShardedEngine):
        yield engine.state_dict() if main else None
        return
    with engine.whole():
        state = engine.state_dict()
        yield state if main else None


def optimizer_of(recipe: Recipe) -> OptimizerConfig:
    """The recipe's optimizer, as the engine takes it.

    An engine with shards steps float32 weights, its own where the model's are bfloat16, so that nothing is
    rounded and PyTorch's AdamW is the rule.
    """
    config = recipe.optimizer
    if recipe.engine.name == "native" or not isinstance(config, AdamW):
        return config
    return config.model_copy(update={"weights": "plain"})


def process_group(accelerator: Accelerator) -> None:
    """A group of one process, where the launcher made none: shards are of a group."""
    if not dist.is_initialized():
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's list of names lacks it
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
