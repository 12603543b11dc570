"""Weights of one byte that train: int8 codes outside, ordinary dense gradients, no dense copy kept.

The rule is that of Q-GaLore (arXiv:2407.08296) and Q-APOLLO (arXiv:2412.05270, Table 8): asymmetric, in
groups of g consecutive elements of the flattened weight,

    w ≈ scale · (code - zero),   code = round(w / scale) + zero in [0, 255]        scale float32, zero uint8
    scale = max(high - low, 1e-5) / 254,   zero = ceil(-low / scale),   low = min(w, 0),   high = max(w, 0)

Two things differ from what is published. Zero always lies in the range: a group of one sign keeps its values,
where a zero point clamped to [0, 255] would lose them; and a weight of zero is exact. And the range has 254
steps, not 255: the one to spare lets both ends of a group be rounded up or down. With 255 one end is cut off,
and as each update makes scale and zero anew the error adds up: 500 updates of about a fortieth of a step left
the largest weights 2.2 steps behind, now less than 0.1 (measured in tests/test_ops_int8_weight.py).

A weight takes 1 + 5 / g bytes. `F.linear` decodes it in forward and again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from .autocast import computing_dtype

_aten = torch.ops.aten
_LARGEST_CODE = 255
_STEPS = _LARGEST_CODE - 1
_SMALLEST_RANGE = 1e-5
_BITS = {torch.bfloat16: 16, torch.float32: 32}
_LAYOUT_VERSION = 1
_PARTS = ("codes", "scale", "zero")
# A weight is coded piece by piece: the float32 temporaries stay in a core's cache, or small beside a GPU.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 24


class Int8Weight(Tensor):
    """A weight held as codes uint8 [shape], scale float32 [groups] and zero uint8 [groups].

    To the outside it is a contiguous tensor of `shape` in `dtype`, bfloat16 or float32, fit for a parameter.
    `F.linear` reads its codes; any other operation works on a decoded copy. An operation in place writes its
    result back rounded to nearest, where a small update is lost: use `requantise_`. A view is a copy: what
    is written into it does not reach the weight. `.to` another outward type keeps the codes.

    Raises ValueError for parts that do not belong together and for other dtypes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int

    @staticmethod
    def __new__(
        cls: type[Int8Weight], codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
    ) -> Int8Weight:
        """codes [shape] uint8 and contiguous, scale float32 and zero uint8, one for each group."""
        _check_dtype(dtype)
        groups = _groups(codes.numel(), group_size)
        kinds = (codes.dtype, scale.dtype, zero.dtype)
        if kinds != (torch.uint8, torch.float32, torch.uint8):
            raise ValueError(f"codes, scale and zero are uint8, float32 and uint8, not {kinds}")
        if not codes.is_contiguous() or scale.shape != (groups,) or zero.shape != (groups,):
            raise ValueError(
                f"contiguous codes {tuple(codes.shape)} in groups of {group_size} need scale and zero of "
                f"shape ({groups},), not {tuple(scale.shape)} and {tuple(zero.shape)}"
            )
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
    ) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.group_size = group_size

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch declares a property as an attribute
        """Bytes of codes, scale and zero together."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.zero))

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [shape] without a graph, in the outward type or in `dtype`.

        An optimizer asks for float32: bfloat16 has one digit less than the larger codes need.
        """
        out = torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device)
        flat, codes = out.view(-1), self.codes.view(-1)
        for elements, groups, width in _pieces(codes.numel(), self.group_size, codes.device):
            piece = codes[elements].view(-1, width).to(torch.float32)
            piece.sub_(self.zero[groups, None]).mul_(self.scale[groups, None])
            flat[elements].view(-1, width).copy_(piece)
        return out

    @torch.no_grad()
    def requantise_(
        self,
        values: Tensor,
        noise: Tensor | Callable[[slice], Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Int8Weight:
        """Take `values` [shape], rounded up or down at random in proportion; scale and zero are made anew.

        code = floor(value / scale + u) + zero with u in [0, 1): `noise` [shape] float32, or what it gives
        for a slice of the flat elements, or drawn piece by piece from `generator`; either is on the weight's
        device. Right on average for every element (arXiv:2407.08296). Raises ValueError unless exactly one of
        them is given, and for a wrong shape.
        """
        if (noise is None) == (generator is None):
            raise ValueError("rounding at random needs either noise or a generator")
        shapes = [values.shape, *([noise.shape] if isinstance(noise, Tensor) else [])]
        if any(shape != self.shape for shape in shapes):
            raise ValueError(f"values and noise must have the weight's shape {tuple(self.shape)}")
        device = self.codes.device
        given = noise.reshape(-1).__getitem__ if isinstance(noise, Tensor) else noise

        def draw(elements: slice) -> Tensor:
            if given is not None:
                return given(elements)
            return torch.rand(elements.stop - elements.start, generator=generator, device=device)

        self._store(values, draw)
        # Backward of a graph made before would decode the new codes: autograd must be able to object.
        torch.autograd.graph.increment_version(self)
        return self

    def _store(self, values: Tensor, draw: Callable[[slice], Tensor] | None = None) -> None:
        source, codes = values.reshape(-1), self.codes.view(-1)
        for elements, groups, width in _pieces(codes.numel(), self.group_size, codes.device):
            piece = source[elements].to(codes.device, torch.float32).view(-1, width)
            scale, zero = _grid(piece)
            ratio = piece / scale
            if draw is None:
                ratio.round_()
            else:
                ratio.add_(draw(elements).view(-1, width)).floor_()
            # The clamp is for the last bit of the division alone.
            codes[elements].view(-1, width).copy_(ratio.add_(zero).clamp_(0, _LARGEST_CODE))
            self.scale[groups] = scale.squeeze(1)
            self.zero[groups] = zero.squeeze(1).to(torch.uint8)

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Int8Weight:
        parts = change(self.codes), change(self.scale), change(self.zero)
        return Int8Weight(*parts, self.group_size, dtype or self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own hands contents on to itself
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, group_size={self.group_size}, "
            f"device={self.device}, requires_grad={self.requires_grad})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype]]:
        return list(_PARTS), (self.group_size, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor],
        kept: tuple[int, torch.dtype],
        outer_size: object = None,
        outer_stride: object = None,
    ) -> Int8Weight:
        return Int8Weight(parts["codes"], parts["scale"], parts["zero"], *kept)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **given)
            if isinstance(weight, Int8Weight) and not isinstance(x, Int8Weight):
                return _Int8Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            # It would exchange the shell and leave the codes as they are.
            raise TypeError("an Int8Weight takes new values by copy_ or requantise_, not through .data")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is not the documented signature
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in (_aten.detach.default, _aten.alias.default):
            shared = args[0]._with(lambda part: part)
            return return_and_correct_aliasing(func, args, given, shared)  # type: ignore[no-untyped-call]
        if func is _aten.clone.default:
            return args[0]._with(torch.clone)
        if func is _aten._to_copy.default:
            dtype = given.get("dtype") or args[0].dtype
            if dtype in _BITS:
                device, soon = given.get("device"), given.get("non_blocking", False)
                return args[0]._with(lambda part: part.to(device, non_blocking=soon, copy=True), dtype)
        if func is _aten.copy_.default:
            return _copy(*args[:2])
        return _decoded(func, args, given)


def quantise(weight: Tensor, group_size: int = 128, dtype: torch.dtype | None = None) -> Int8Weight:
    """weight [any shape] rounded to nearest, each within half a step of its group; no graph, nothing shared.

    dtype: bfloat16 or float32, what it is to the outside; the weight's own by default. The last group is
    shorter where group_size does not divide the number of elements. Raises ValueError for other dtypes and
    for a group_size below 1.
    """
    dense = weight.detach()
    codes = torch.empty(dense.shape, dtype=torch.uint8, device=dense.device)
    groups = _groups(codes.numel(), group_size)
    scale = torch.empty(groups, dtype=torch.float32, device=dense.device)
    zero = torch.empty(groups, dtype=torch.uint8, device=dense.device)
    coded = Int8Weight(codes, scale, zero, group_size, dtype or dense.dtype)
    coded._store(dense.dequantise(torch.float32) if isinstance(dense, Int8Weight) else dense)
    return coded


def to_plain(name: str, weight: Int8Weight) -> dict[str, Tensor]:
    """Plain tensors for a file: NAME.codes, NAME.scale, NAME.zero, and NAME.layout int64 [3].

    layout: its version, the group size, bits of the outward type. Codes, scale and zero are not copied.
    """
    layout = torch.tensor([_LAYOUT_VERSION, weight.group_size, _BITS[weight.dtype]])
    return {f"{name}.{part}": getattr(weight, part) for part in _PARTS} | {f"{name}.layout": layout}


def from_plain(name: str, tensors: Mapping[str, Tensor]) -> Int8Weight:
    """The weight that `to_plain` took apart, bit for bit, on the tensors' own memory.

    Raises KeyError for a missing part, ValueError for an unknown layout or parts that do not fit.
    """
    version, group_size, bits = tensors[f"{name}.layout"].tolist()
    dtypes = {size: dtype for dtype, size in _BITS.items()}
    if version != _LAYOUT_VERSION or bits not in dtypes:
        raise ValueError(f"{name}: int8 layout {version} of {bits} bits is not known here")
    codes, scale, zero = (tensors[f"{name}.{part}"] for part in _PARTS)
    return Int8Weight(codes, scale, zero, group_size, dtypes[bits])


def use_int8_weights(model: nn.Module, group_size: int = 128) -> list[str]:
    """Hold the weight of each trained nn.Linear in int8; one line for the log with bytes before and after.

    Left as they are: frozen weights, the output head, and weights that more than one module uses. Call it
    before the optimizer is built, for the parameters are new. Harmless when repeated. Raises ValueError for
    weights of other types than bfloat16 and float32.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    count = before = after = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head or not module.weight.requires_grad:
            continue
        if isinstance(module.weight, Int8Weight) or users[id(module.weight)] > 1:
            continue
        before += module.weight.nbytes
        module.weight = nn.Parameter(quantise(module.weight, group_size))
        after += module.weight.nbytes
        count += 1
    if not count:
        return []
    return [f"int8: {count} linear weights in groups of {group_size}, {before:,} -> {after:,} bytes"]


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the model has dense parameters of the outward type, for `save_pretrained` and its like.

    After it the int8 parameters are back, the same objects; what was written into the dense ones is dropped.
    """
    held: list[tuple[nn.Module, str, Any]] = []
    dense: dict[int, nn.Parameter] = {}
    try:
        for module in model.modules():
            for name, weight in module._parameters.items():
                if isinstance(weight, Int8Weight):
                    if id(weight) not in dense:
                        dense[id(weight)] = nn.Parameter(weight.dequantise(), weight.requires_grad)
                    held.append((module, name, weight))
                    module._parameters[name] = dense[id(weight)]
        yield
    finally:
        for module, name, weight in held:
            module._parameters[name] = weight


def make_dense(model: nn.Module) -> None:
    """Give the model dense parameters of the outward type, for good."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, Int8Weight):
                module._parameters[name] = nn.Parameter(weight.dequantise(), weight.requires_grad)


class _Int8Linear(torch.autograd.Function):
    """y = x W^T + b;   dx = g W,   dW = g^T x,   db = sum g: W is decoded for y, and once more for dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            y = nn.functional.linear(flat, weight.dequantise(dtype), None if bias is None else bias.to(dtype))
        ctx.save_for_backward(flat if ctx.needs_input_grad[1] else None, weight)
        ctx.dtype, ctx.shape, ctx.x_dtype = dtype, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        flat, weight = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            # A hook on saved tensors, such as one that moves them to the host, may hand back a dense copy.
            coded = isinstance(weight, Int8Weight)
            dense = weight.dequantise(ctx.dtype) if coded else weight.to(ctx.dtype)
            dx = (grad @ dense).view(ctx.shape).to(ctx.x_dtype)
            del dense
        if ctx.needs_input_grad[1]:
            dw = (grad.t() @ flat).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.sum(0).to(ctx.bias_dtype)
        return dx, dw, db


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _copy(target: Tensor, source: Tensor) -> Tensor:
    """target.copy_(source), where at least one is an Int8Weight."""
    if not isinstance(target, Int8Weight):
        assert isinstance(source, Int8Weight)
        return target.copy_(source.dequantise(torch.float32))
    if isinstance(source, Int8Weight):
        if source.group_size == target.group_size and source.shape == target.shape:
            for part in _PARTS:
                getattr(target, part).copy_(getattr(source, part))
            return target
        source = source.dequantise(torch.float32)
    target._store(source.expand(target.shape))
    return target


def _decoded(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """func on decoded copies; what it writes into one of them is coded again, rounded to nearest."""
    weights = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Int8Weight)}
    dense = {key: weight.dequantise() for key, weight in weights.items()}
    new_args, new_kwargs = tree_map_only(Int8Weight, lambda weight: dense[id(weight)], (args, kwargs))
    result = func(*new_args, **new_kwargs)
    written: set[int] = set()
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written |= {id(leaf) for leaf in tree_leaves(value) if id(leaf) in weights}
    for key in written:
        weights[key]._store(dense[key])
    back = {id(dense[key]): weights[key] for key in written}
    return tree_map_only(Tensor, lambda tensor: back.get(id(tensor), tensor), result)


def _grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [groups, g] -> scale and zero, float32 [groups, 1]: the formulas at the top of this file."""
    low = values.amin(1, keepdim=True).clamp_(max=0)
    high = values.amax(1, keepdim=True).clamp_(min=0)
    scale = (high - low).clamp_(min=_SMALLEST_RANGE).div_(_STEPS)
    return scale, low.neg_().div_(scale).ceil_()


def _pieces(numel: int, group_size: int, device: torch.device) -> Iterator[tuple[slice, slice, int]]:
    """(elements, groups, elements in each group) of pieces of whole groups, and of a shorter last group."""
    most = max(1, (_CPU_ELEMENTS if device.type == "cpu" else _CUDA_ELEMENTS) // group_size)
    full = numel // group_size
    for first in range(0, full, most):
        last = min(first + most, full)
        yield slice(first * group_size, last * group_size), slice(first, last), group_size
    if numel > full * group_size:
        yield slice(full * group_size, numel), slice(full, full + 1), numel - full * group_size


def _groups(numel: int, group_size: int) -> int:
    if group_size < 1:
        raise ValueError(f"a group has at least one weight, not {group_size}")
    return -(-numel // group_size)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _BITS:
        raise ValueError(f"an int8 weight is bfloat16 or float32 to the outside, not {dtype}")
