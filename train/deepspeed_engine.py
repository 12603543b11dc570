"""DeepSpeed's ZeRO behind the same loop: the sums, the clock, the rate and the checkpoints are ours.

DeepSpeed gets the model with its loss, PyTorch's AdamW and the number to clip by; it shards, moves and
steps. It flattens what it trains: a shard is a run of elements that knows no matrices, so that only a rule
that works element by element can step it.

What it does not do, and is done here: a gradient that is not finite stops the run before anything is stepped
(with float32 weights DeepSpeed 0.19 would step, and report a norm of 1).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..offload.scratch import Scratch, open_scratch
from ..optimizers import clip_by_global_norm
from ..recipes import DeepSpeedConfig
from .deepspeed_config import deepspeed_config
from .deepspeed_import import import_deepspeed
from .deepspeed_zenflow import HostAdamW, ZenFlow, check_shapes
from .engine import Interrupted, loss_and_sums
from .sharded import OwnPieces, ShardedEngine, process_group
from .zero_states import ZeroStates


@dataclass
class DeepSpeedEngine(ShardedEngine):
    """`NativeEngine`'s calls, made by DeepSpeed between `begin` and `end`."""

    config: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    max_grad_norm: float | None = None
    deepspeed: Any = field(default=None, init=False)
    """DeepSpeed's engine, between begin and end."""
    flat: torch.optim.AdamW = field(init=False)
    """What DeepSpeed steps with: its groups hold this process's shards."""
    _states: ZeroStates | None = field(default=None, init=False)
    """Of stages 1 to 3; at stage 0 the parameters are whole."""
    _zenflow: ZenFlow | None = field(default=None, init=False)
    _scratch: Scratch | None = field(default=None, init=False)
    _finite_loss: bool = field(default=True, init=False)

    @property
    def weights_in_shards(self) -> bool:  # type: ignore[override]  # a plain value elsewhere
        """Stage 3; and with ZenFlow, whose matrices lie column by column, as no file has them."""
        return self.config.zero_stage == 3 or self._zenflow is not None

    # --- the calls of the loop

    def forward_backward(
        self, batches: Sequence[Batch], count: int, interrupted: Callable[[], bool]
    ) -> Tensor:
        """As NativeEngine's: DeepSpeed averages over the processes, so the sum is divided accordingly."""
        device = self.accelerator.device
        if self._zenflow is not None and len(batches) != 1:
            raise ValueError(f"a step of {len(batches)} micro-batches: ZenFlow takes each of them for a step")
        total = torch.zeros((), device=device)
        scale = self.accelerator.num_processes / count
        for number, batch in enumerate(batches):
            if interrupted():  # what has been accumulated is never stepped: the run ends here
                raise Interrupted
            if self._zenflow is None:
                self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
            else:
                self._zenflow.before_backward(self.optimizer.param_groups)
            loss, _ = loss_and_sums(self.deepspeed(batch.to(device)))
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        reduced: Tensor = self.accelerator.reduce(total, reduction="sum")
        self._finite_loss = bool(torch.isfinite(reduced))
        return reduced

    def step(self, max_grad_norm: float | None) -> Tensor:
        """Clip and apply; returns the norm before clipping. On one that is not finite nothing is applied, and
        the shards are dissolved: the run is over, and what is left of it works with whole tensors.
        """
        for ours, theirs in zip(self.optimizer.param_groups, self.flat.param_groups, strict=True):
            theirs.update({key: value for key, value in ours.items() if key != "params"})
        if self._zenflow is not None:
            return self._step_with(self._zenflow)
        norm = self._clipped(max_grad_norm)
        if not self._finite_loss or (norm is not None and not bool(torch.isfinite(norm))):
            self.end()
            return torch.tensor(float("nan")) if norm is None else norm
        self.deepspeed.step()
        if norm is None:
            norm = torch.as_tensor(self.deepspeed.get_global_grad_norm())
        self.freed.after_step()
        return norm

    def _step_with(self, zenflow: ZenFlow) -> Tensor:
        mine = torch.tensor(float(self._finite_loss and zenflow.finite()), device=self.accelerator.device)
        finite = self.accelerator.reduce(mine, reduction="sum")
        if int(finite) < self.accelerator.num_processes:
            self.end()
            return torch.tensor(float("nan"))
        norm = zenflow.step()
        self.freed.after_step()
        return norm

    def _clipped(self, max_grad_norm: float | None) -> Tensor | None:
        """The norm, where it is known before the step; from stage 1 on that is only whether it is finite."""
        if self.config.zero_stage == 0:
            return clip_by_global_norm(self.parameters.values(), max_grad_norm)
        return torch.tensor(float("inf")) if self.deepspeed.optimizer.has_overflow() else None

    # --- shards

    def shard(self) -> None:
        """Hand model and optimizer to DeepSpeed."""
        deepspeed = import_deepspeed(self.accelerator.device)
        process_group(self.accelerator)
        self._attributes = {id(p): set(vars(p)) for p in self.loss_module.parameters()}
        kind = torch.optim.AdamW
        if self.config.zenflow is not None:
            check_shapes(self.parameters)
            kind = HostAdamW
        self.flat = kind(
            [{**group, "params": list(group["params"])} for group in self.optimizer.param_groups]
        )
        if self.config.nvme_path is not None:
            self._scratch = open_scratch(Path(self.config.nvme_path))
        config = deepspeed_config(
            self.config,
            trained=sum(p.numel() for p in self.parameters.values()),
            max_grad_norm=self.max_grad_norm if self.config.zero_stage else None,
            bfloat16=all(p.dtype == torch.bfloat16 for p in self.parameters.values()),
            on_cpu=self.accelerator.device.type == "cpu",
            scratch=None if self._scratch is None else str(self._scratch.path),
        )
        # DeepSpeed reads it in every step of stage 3, and a single process has no launcher to set it.
        os.environ.setdefault("LOCAL_RANK", str(self.accelerator.local_process_index))
        deepspeed.comm.init_distributed(
            deepspeed.get_accelerator().communication_backend_name(), auto_mpi_discovery=False
        )
        self.deepspeed, *_ = deepspeed.initialize(model=self.loss_module, optimizer=self.flat, config=config)
        if self.config.zero_stage:
            zero = self.deepspeed.optimizer
            by_columns = self.config.zenflow is not None
            self._states = ZeroStates(
                zero, self.flat, self.parameters, stage=self.config.zero_stage, by_columns=by_columns
            )
            self._zenflow = ZenFlow(self.deepspeed) if by_columns else None
        if self.autocast:  # inside, since DeepSpeed turns off an autocast that surrounds it
            forward = self.loss_module.forward

            def precise(batch: Batch) -> Any:
                with self.precision():
                    return forward(batch)

            self.loss_module.forward = precise  # type: ignore[method-assign]

    def unshard(self) -> None:
        """Whole weights in memory of their own, DeepSpeed's hooks and attributes removed."""
        whole = {}
        for name, p in self.loss_module.named_parameters():
            with _gathering([p]):
                whole[name] = p.detach().clone(memory_format=torch.contiguous_format)
        engine = self.deepspeed
        self.deepspeed = None
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.destroy()
        self.loss_module.__dict__.pop("forward", None)
        for module in self.loss_module.modules():
            if type(module._parameters) is not dict:
                module._parameters = dict(module._parameters)
        for name, p in self.loss_module.named_parameters():
            p.data = whole.pop(name)
            for attribute in set(vars(p)) - self._attributes[id(p)]:
                delattr(p, attribute)
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        self.flat = torch.optim.AdamW([torch.zeros(0)])
        self._states = self._zenflow = None

    @contextlib.contextmanager
    def gather_weights(self) -> Iterator[None]:
        """All weights of the model, and none given back by a forward pass."""
        if self._zenflow is not None:
            with self._zenflow.by_rows():
                yield
            return
        parameters = list(self.loss_module.parameters())
        with _gathering(parameters):
            for p in parameters:
                p.ds_active_sub_modules.add(_HELD)  # type: ignore[attr-defined]  # DeepSpeed's
            try:
                yield
            finally:
                for p in parameters:
                    p.ds_active_sub_modules.discard(_HELD)  # type: ignore[attr-defined]  # DeepSpeed's

    # --- state

    def whole_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Moments, the count of steps, and DeepSpeed's float32 weight where the model's is narrower."""
        if self._states is not None:
            yield from self._states.gather()
            return
        for name, parameter in self.parameters.items():
            yield name, dict(self.flat.state.get(parameter, {}))

    @property
    def state_in_shards(self) -> bool:
        """See ShardedEngine: not at stage 0."""
        return self._states is not None

    def own_pieces(self) -> OwnPieces:
        """See ShardedEngine."""
        assert self._states is not None
        return self._states.own()

    def shapes(self) -> dict[str, torch.Size]:
        """See ShardedEngine."""
        return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}

    def steps(self) -> Tensor:
        """See ShardedEngine."""
        assert self._states is not None
        return self._states.steps

    def put_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Cut up whole states, and keep this process's part of each."""
        if self._states is not None:
            self._states.scatter(states)
            if self._zenflow is not None:
                self._zenflow.go_on()
            return
        for name, state in states.items():
            self.flat.state[self.parameters[name]] = dict(state)


_HELD = -1
"""Stands for a module that is using a weight; DeepSpeed counts from 0."""


def _gathering(parameters: list[nn.Parameter]) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
