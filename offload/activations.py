"""Keep, compute again or swap out what each decoder layer saves for its backward pass (arXiv:2407.12117).

Applied from outside to a transformers model, also inside PEFT and with fused modules: a layer that does not
keep gets a `forward` of its own, which `Handle.remove` takes away again. Weights, names and classes stay.

    keep        autograd saves as ever
    recompute   the layer's input is saved, and its forward pass runs again in backward, with the same random
                numbers (torch.utils.checkpoint without reentry; arXiv:1604.06174)
    swap        what is saved goes to a pool in host memory and comes back (swap.py)

All three give the same gradients, bit for bit. With a token share s below 1 the feed-forward block of layers
that keep or swap runs on two parts of the rows: the first round(s · rows) are saved as the layer's are, the
others are computed again. The block works token by token, so this is the same function; but a matrix product
of fewer rows may round differently, a weight's gradient becomes the sum of two products, and dropout inside
the block draws its numbers part by part. At 0 the block runs whole, and bits are equal again.

Without gradients (evaluation, generation, a reference model) layers run as if nothing had been applied.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .activation_model import ActivationChoice
from .pool import HostPool
from .swap import SMALLEST, Link, Swap, link_for

_BLOCKS = ("mlp", "feed_forward", "ffn")
_ROWS = 5
_TOLERANCE = 2e-2  # of the largest output, for the trial of a block: bfloat16 products of other shapes


@dataclass(frozen=True)
class Handle:
    """What was applied. `remove`, or the end of a `with` block, makes the model what it was.

    line: for the log. pool: what swapped layers use. Graphs made before removal can still run backward.
    """

    choice: ActivationChoice
    line: str
    pool: HostPool | None
    _changed: tuple[_Forward, ...]

    def remove(self) -> None:
        """Give each layer and block its own forward back; harmless when repeated."""
        for forward in self._changed:
            forward.restore()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply_activations(
    model: nn.Module,
    choice: ActivationChoice,
    *,
    pool: HostPool | None = None,
    link: Link | None = None,
    smallest: int = SMALLEST,
) -> Handle:
    """Let the decoder layers of `model` do with their activations as `choice` says.

    pool: for swapped layers; what it has no room for stays on the device. link: copies otherwise than
    `link_for` the model's device would. smallest: bytes below which a tensor is not swapped.

    Raises ValueError: not as many fates as layers; a choice is applied already, or transformers' gradient
    checkpointing is on; swapped layers without a pool; a token share where the block is not found or does
    not work token by token.
    """
    layers = decoder_layers(model)
    if len(choice.layers) != len(layers):
        raise ValueError(f"the choice is for {len(choice.layers)} layers, the model has {len(layers)}")
    _check_free(layers)
    swap = None
    if "swap" in choice.layers:
        if pool is None:
            raise ValueError("swapped layers need a pool of host memory: pool=HostPool(bytes)")
        device = next(layers[0].parameters()).device
        swap = Swap(pool, link or link_for(device), device, smallest=smallest)
    blocks = {}
    if choice.token_share < 1.0:
        width = _text_config(model).hidden_size
        places = [i for i, fate in enumerate(choice.layers) if fate != "recompute"]
        blocks = {i: _block_of(layers[i], width) for i in places}
    changed: list[_Forward] = []
    for i, (layer, fate) in enumerate(zip(layers, choice.layers, strict=True)):
        if fate == "recompute":
            changed.append(_Recomputed(layer))
        elif fate == "swap":
            assert swap is not None
            changed.append(_Swapped(layer, swap, i))
        if i in blocks:
            changed.append(_InTwoParts(blocks[i], choice.token_share))
    return Handle(choice, str(choice), pool if swap is not None else None, tuple(changed))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, PEFT or not, from the input to the output.

    Raises ValueError where its decoder has no one list of as many modules as its configuration has layers.
    """
    count = _text_config(model).num_hidden_layers
    decoder: nn.Module = _inner(model).get_decoder()
    stacks: list[Any] = []
    for module in decoder.modules():  # a module comes before those inside it
        is_stack = isinstance(module, nn.ModuleList) and len(module) == count
        if is_stack and not any(module is part for stack in stacks for part in stack.modules()):
            stacks.append(module)
    if len(stacks) != 1:
        raise ValueError(f"{type(decoder).__name__} has {len(stacks)} lists of {count} layers, not one")
    return list(stacks[0])


class _Forward:
    """A module's forward in place of its own. As an object it follows its module into a deep copy.

    The module is held weakly: a cycle would keep a model's weights in memory after the last use of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._own = module.__dict__.get("forward")  # of an instance, such as accelerate makes
        module.__dict__["forward"] = self

    @property
    def module(self) -> nn.Module:
        """Whose forward this is."""
        module = self._module()
        assert module is not None
        return module

    @property
    def inner(self) -> Callable[..., Any]:
        """The module's own forward, holding the module."""
        own: Callable[..., Any] | None = self._own
        return own or MethodType(type(self.module).forward, self.module)

    def restore(self) -> None:
        """Undo what making this did, if it still stands."""
        module = self._module()
        if module is None or module.__dict__.get("forward") is not self:
            return
        del module.__dict__["forward"]
        if self._own is not None:
            module.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        copied = copy.copy(self)
        copied._module = weakref.ref(memo[id(self.module)])
        copied._own = copy.deepcopy(self._own, memo)
        return copied


class _Recomputed(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        for name in ("past_key_values", "past_key_value", "layer_past"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    "a layer whose activations are computed again would fill the key-value cache twice: "
                    "call the model with use_cache=False"
                )
        return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


class _Swapped(_Forward):
    def __init__(self, module: nn.Module, swap: Swap, index: int) -> None:
        super().__init__(module)
        self._swap = swap
        self._index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        shared = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
        stays = chain(self.module.parameters(), self.module.buffers(), _tensors((args[1:], shared)))
        with self._swap.layer(self._index, stays):
            return self.inner(*args, **kwargs)


class _InTwoParts(_Forward):
    def __init__(self, module: nn.Module, share: float) -> None:
        super().__init__(module)
        self._share = share

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        rows = x.reshape(1, -1, x.shape[-1])
        saved = round(self._share * rows.shape[1])
        block: Callable[[Tensor], Tensor] = self.inner
        if not torch.is_grad_enabled() or saved == rows.shape[1]:
            return block(x)
        if saved == 0:
            again: Tensor = checkpoint(block, x, use_reentrant=False)
            return again
        parts = block(rows[:, :saved]), checkpoint(block, rows[:, saved:], use_reentrant=False)
        return torch.cat(parts, dim=1).view(x.shape)


def _inner(model: nn.Module) -> Any:
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped


def _text_config(model: nn.Module) -> Any:
    return _inner(model).config.get_text_config()


def _check_free(layers: list[nn.Module]) -> None:
    for layer in layers:
        if any(isinstance(part.__dict__.get("forward"), _Forward) for part in layer.modules()):
            raise ValueError("a choice for activations is applied already: remove() its handle first")
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                "transformers' own gradient checkpointing is on: call gradient_checkpointing_disable() first"
            )


@torch.no_grad()
def _block_of(layer: nn.Module, width: int) -> nn.Module:
    """The feed-forward block, once it was tried that it works token by token."""
    kind = type(layer).__name__
    block = next((getattr(layer, name) for name in _BLOCKS if hasattr(layer, name)), None)
    if not isinstance(block, nn.Module):
        raise ValueError(f"{kind} has no block called {', '.join(_BLOCKS)}: token_share must be 1")
    parameter = next(p for p in layer.parameters() if p.is_floating_point())
    flags = [(part, part.training) for part in block.modules()]
    block.eval()
    try:
        # a fixed input: the random generators stay where they are
        x = torch.arange(_ROWS * width, device=parameter.device, dtype=torch.float32).sin()
        x = x.to(parameter.dtype).view(1, _ROWS, width)
        whole = block(x)
        single = [block(x[:, i : i + 1]) for i in range(_ROWS)]
    finally:
        for part, flag in flags:
            part.training = flag
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        raise ValueError(
            f"the {type(block).__name__} of {kind} gives more than tokens: token_share must be 1"
        )
    if not bool((torch.cat(single, dim=1) - whole).abs().max() <= _TOLERANCE * whole.abs().max()):
        raise ValueError(f"the {type(block).__name__} of {kind} mixes tokens: token_share must be 1")
    return block


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
