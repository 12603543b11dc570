"""A model whose layers' weights are streamed, and what can be done with it.

In memory are the embeddings, the head, the final norm, the adapters, and two or three layers. A weight that
is away keeps its shape, type and device and is one NaN: whoever reads it gets NaN and not old numbers, and to
write it raises RuntimeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..recipes.errors import UserError
from .layer_layout import Place
from .layer_tier import LayerTier
from .stored import Stored, whole
from .streamed_layer import Pass


@dataclass(eq=False)
class StreamedLayer:
    """One layer: its module, and the parameters of it that are streamed."""

    index: int
    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    place: Place
    owner: StreamedModel
    frozen: bool
    original: Callable[..., Any] = field(init=False)
    wrapped: bool = field(default=False, init=False)
    depth: int = field(default=0, init=False)  # of `present` inside `present`
    changes: bool = field(default=False, init=False)

    @contextmanager
    def present(self, which: Pass) -> Iterator[None]:
        """Inside, the weights are in memory; what the layers' order makes the next ones is read meanwhile."""
        count, index = len(self.owner.layers), self.index
        following: Sequence[int] = range(index + 1, count)
        if which == "backward":
            following = range(index - 1, -1, -1)
        elif which == "alone":
            following = [(index + step) % count for step in range(1, count)]
        trained = [p for p in self.parameters if p.requires_grad]
        if self.frozen and trained:
            name = next(name for name, p in self.module.named_parameters() if p is trained[0])
            raise UserError(
                f"offload.weights  {self.name}.{name} is streamed as a frozen weight and asks for a "
                "gradient.\n"
                "                 Freeze it, or stream for training: stream_layers(..., trainable=True)"
            )
        with self.weights(following, changes=which == "backward" and bool(trained)):
            yield

    @contextmanager
    def weights(self, following: Sequence[int] = (), *, changes: bool) -> Iterator[None]:
        """Inside, the parameters have their values; changed ones are written back where `changes` says so."""
        if self.depth:
            if changes and not self.changes:
                raise RuntimeError(f"{self.name} is in memory to be read, and cannot be changed inside that")
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
            return
        with self.owner.buffers.using(self.index, following, changes=changes) as use:
            views = self.place.views(use.memory)
            self.show(views)
            # Written back whether or not anything changed: fused kernels do not raise a tensor's version.
            self.depth, self.changes, use.changed = 1, changes, changes
            try:
                yield
            finally:
                self.depth = 0
                if changes:
                    _take_replaced(self.parameters, views)
                self.hide()

    def wrap(self, forward: Callable[..., Any]) -> None:
        """Give the module another forward; its own is `original`."""
        self.original, self.wrapped = self.module.forward, True
        self.module.forward = forward

    def unwrap(self) -> None:
        """Give the module its own forward back."""
        if self.wrapped:
            own: Any = self.original
            del self.module.forward
            if self.module.forward != own:  # another's wrapper was there, and no method of the class
                self.module.forward = own
            self.wrapped = False

    def show(self, values: Iterable[Tensor]) -> None:
        """Put the values into the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    def hide(self) -> None:
        """One NaN in place of each weight."""
        for parameter, shape in zip(self.parameters, self.place.shapes, strict=True):
            parameter.data = away(shape, parameter.dtype, parameter.device)


class StoredWeight:
    """`Stored`: a weight of a streamed layer, which is brought to be read."""

    def __init__(self, layer: StreamedLayer, at: int) -> None:
        self.dtype, self.shape = layer.place.dtypes[at], torch.Size(layer.place.shapes[at])
        self._layer, self._at = layer, at

    @property
    def nbytes(self) -> int:
        """See Stored."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """See Stored. OffloadError: the disk failed."""
        with self._layer.weights(changes=False):
            weight = self._layer.parameters[self._at].data
            return weight.view(-1)[first : first + count].to("cpu", copy=True)


class StreamedModel:
    """A model whose layers' weights are streamed. `lines` say how; `close` deletes the scratch file."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, list[nn.Parameter]],
        places: Sequence[Place],
        tier: LayerTier,
        *,
        frozen: bool,
    ) -> None:
        self.model, self.buffers, self.lines = model, tier.buffers, tier.lines
        self.layers = [
            StreamedLayer(index, name, model.get_submodule(name), parameters, places[index], self, frozen)
            for index, (name, parameters) in enumerate(layers.items())
        ]
        self._tier = tier
        self._hook = register_optimizer_step_pre_hook(self._check_step)

    def _check_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Refuse a step on weights that are away, in words."""
        stepped = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for layer in self.layers:
            if not layer.depth and not stepped.isdisjoint(layer.parameters):
                raise RuntimeError(
                    f"{layer.name} is not in memory: streamed weights take their step inside the "
                    "backward pass (optimizers.in_backward.step_in_backward), with one micro-batch a step"
                )

    @property
    def bytes_read(self) -> int:
        """From the store so far."""
        return self._tier.store.bytes_read

    @property
    def bytes_written(self) -> int:
        """To the store so far, with the first contents."""
        return self._tier.store.bytes_written

    @property
    def seconds_waited(self) -> float:
        """How long layers were waited for."""
        return self.buffers.seconds_waited

    @contextmanager
    def present(self, index: int, *, changes: bool = False) -> Iterator[nn.Module]:
        """Inside, layer `index` (the module) has its weights, for work on it outside its forward.

        changes: what is changed in place or put in a parameter's `.data` is stored.
        """
        layer = self.layers[index]
        with layer.weights(changes=changes):
            yield layer.module

    @contextmanager
    def mapped(self, *, writable: bool = False) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Inside, the values of all streamed parameters, on the CPU, none of them in memory of its own.

        On disk they are a mapping of the scratch file: the system reads what is touched and drops it again
        when memory is short. Do not keep them. With `writable` changes to them are stored; make none without.
        """
        with self._tier.mapped(writable=writable) as memory:
            values: dict[nn.Parameter, Tensor] = {}
            for layer in self.layers:
                place = layer.place
                views = place.views(memory[place.offset : place.offset + place.nbytes])
                values.update(zip(layer.parameters, views, strict=True))
            yield values

    def stored(self, parameter: nn.Parameter) -> StoredWeight | None:
        """A streamed parameter where it lies, for checkpoints; None for one that is in memory."""
        for layer in self.layers:
            for at, mine in enumerate(layer.parameters):
                if mine is parameter:
                    return StoredWeight(layer, at)
        return None

    @torch.no_grad()
    def load(self, values: Mapping[nn.Parameter, Tensor | Stored]) -> None:
        """Store new values of streamed parameters; those of others are left alone."""
        for layer in self.layers:
            mine = [p for p in layer.parameters if p in values]
            if mine:
                with layer.weights(changes=True):
                    for parameter in mine:
                        value = values[parameter]
                        parameter.copy_(value if isinstance(value, Tensor) else whole(value))

    def close(self, *, restore: bool = False) -> None:
        """Let go of store and buffers, and delete the scratch file; again does nothing.

        restore: the weights come back into memory for good, all of them, and the model is as it was. Without
        it they are gone.
        """
        try:
            for layer in self.layers:
                layer.unwrap()
                if restore:
                    with self.buffers.using(layer.index) as use:
                        values = [view.clone() for view in layer.place.views(use.memory)]
                    layer.show(values)
        finally:
            self.layers = []
            self._hook.remove()
            self._tier.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def away(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands for a weight that is not in memory: one NaN, seen as `shape`, that cannot be written.

    A fused kernel would write past the one element's end, so torch is told to refuse its address.
    """
    one = torch.full((), math.nan, dtype=dtype, device=device)
    torch._C._set_throw_on_mutable_data_ptr(one)  # as torch's own fake tensors do
    return one.expand(shape)


def _take_replaced(parameters: Sequence[nn.Parameter], views: Sequence[Tensor]) -> None:
    """Copy what was put in a parameter's `.data` into the buffer."""
    for parameter, view in zip(parameters, views, strict=True):
        if parameter.data_ptr() != view.data_ptr():
            view.copy_(parameter.data)
