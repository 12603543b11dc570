"""A layer whose weights are in memory only while it runs: once forward, once more in the backward pass.

The forward pass keeps the layer's input and nothing of its inside. The backward pass brings the weights back,
runs the layer again as it ran the first time (random numbers, autocast) and goes backward through it, so what
comes out is what plain autograd computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Pass = Literal["alone", "forward", "backward"]
"""A forward pass without a backward pass after it, one with, and that one."""


class Layer(Protocol):
    """What is asked of a layer: its module, its own forward, and its weights while it runs."""

    @property
    def module(self) -> nn.Module:
        """The layer."""
        ...

    @property
    def original(self) -> Callable[..., Any]:
        """Its own forward."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether its streamed weights have no gradient."""
        ...

    def present(self, which: Pass) -> AbstractContextManager[None]:
        """Inside, the weights are in memory."""
        ...


def streamed_forward(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `layer.original(*args, **kwargs)` gives, with the gradients it gives.

    A cache of keys and values is left out where gradients are recorded, since running the layer again would
    write it twice; transformers' own checkpointing does so too.
    """
    if not torch.is_grad_enabled():
        with layer.present("alone"), _fresh_casts():
            return layer.original(*args, **kwargs)
    if kwargs.get("past_key_values") is not None:
        kwargs = {**kwargs, "past_key_values": None, "use_cache": False}
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    trained = [p for p in layer.module.parameters() if p.requires_grad]
    if not inputs and not trained:
        with layer.present("alone"), _fresh_casts():
            return layer.original(*args, **kwargs)
    tensors = [leaves[at] for at in inputs]
    for at in inputs:
        leaves[at] = None
    call = _Call(layer, leaves, spec, inputs, trained, _modes(layer.module))
    flat = _Recomputed.apply(call, *tensors, *trained)  # type: ignore[no-untyped-call]  # torch has no types here
    assert call.results is not None
    return tree_unflatten(list(flat), call.results)


@dataclass
class _Call:
    """One call of a layer, to be made again."""

    layer: Layer
    leaves: list[Any]  # of its arguments; None in place of those that want a gradient
    spec: TreeSpec
    inputs: list[int]  # which leaves want a gradient
    trained: list[nn.Parameter]
    modes: Callable[[], AbstractContextManager[None]]
    results: TreeSpec | None = None

    def run(self, tensors: list[Tensor]) -> Any:
        leaves = list(self.leaves)
        for at, tensor in zip(self.inputs, tensors, strict=True):
            leaves[at] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.layer.original(*args, **kwargs)


class _Recomputed(torch.autograd.Function):
    """The trained parameters are arguments so that autograd knows of them; the call finds them by itself."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Any, ...]:
        inputs = list(tensors[: len(call.inputs)])
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        with call.layer.present("forward"), _fresh_casts():
            flat, call.results = tree_flatten(call.run(inputs))
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with call.layer.present("backward"):
            with call.modes(), torch.enable_grad():
                flat = tree_leaves(call.run(inputs))
            reached = [
                (output, grad)
                for output, grad in zip(flat, grads, strict=True)
                if grad is not None and output.requires_grad
            ]
            found = _gradients(call, inputs, reached)
        return None, *found


def _gradients(
    call: _Call, inputs: list[Tensor], reached: list[tuple[Tensor, Tensor]]
) -> list[Tensor | None]:
    """Gradients of the inputs and of the trained parameters, backward from outputs with their gradients.

    Those of streamed weights are not handed on: they are accumulated here, while the weights are in memory,
    so that a hook on them can take the weight's step and free the gradient.
    """
    if not reached:
        return [None] * (len(inputs) + len(call.trained))
    outputs, grads = [output for output, _ in reached], [grad for _, grad in reached]
    if call.layer.frozen:
        wanted = [*inputs, *call.trained]
        return list(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    torch.autograd.backward(outputs, grads)
    return [*(tensor.grad for tensor in inputs), *(None for _ in call.trained)]


def _modes(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context with autocast and random numbers as they are now. Only layers in training draw any."""
    devices = {"cpu", *(p.device.type for p in module.parameters())}
    casts = {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in devices
        if torch.amp.is_autocast_available(kind)
    }
    numbers = torch.get_rng_state() if module.training else None
    on_device = None
    if module.training and "cuda" in devices:
        on_device = torch.cuda.get_rng_state()

    @contextmanager
    def restored() -> Iterator[None]:
        kinds = ["cuda"] if on_device is not None else []
        with torch.random.fork_rng([torch.cuda.current_device() for _ in kinds], enabled=numbers is not None):
            if numbers is not None:
                torch.set_rng_state(numbers)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device)
            with _autocast(casts):
                yield

    return restored


@contextmanager
def _autocast(casts: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    (kind, (enabled, dtype)), *rest = casts.items()
    with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        if rest:
            with _autocast(dict(rest)):
                yield
        else:
            yield


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Inside, autocast casts each weight anew: its cache would hold all layers in half precision."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
