"""One pass over all gradients: their global norm, whether they are finite, the largest, and a packed copy.

    y_i = s g_i        norm = √Σ y_i²        largest = max |y_i|        target = cast(y_1), cast(y_2), ...

s is what undoes a loss scale (1 where none is given). Squares are summed in float32 inside blocks of a fixed
size and the blocks' sums in float64, so that the norm of any number of elements is good to 1e-6, and the same
to the bit for any number of threads. PyTorch's own norm of float32 and bfloat16 tensors on a CPU keeps one
float32 sum a lane: of 1e8 elements it is a hundredth too small.

Whether all is finite is an answer of its own, and no sign or special value of the norm: a norm of -1 that
finds its way into a clipping factor turns gradients round. Squares of finite elements above 1.8e19 overflow
float32, then the norm alone is infinite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kept import Kept, sent, stream_of
from .providers import Provider, choose

BLOCK = 16_384
"""Elements of one float32 sum in the kernels."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = (Tensor, torch.nn.Parameter)
_ROW = 4096
_CHUNK = {"cpu": 1 << 18}  # what stays in a core's cache; elsewhere what is worth a launch


@dataclass(frozen=True)
class Packed:
    """What the pass has found of the scaled elements: tensors of no dimension, where the gradients are.

    norm: float64. largest: float32 (float64 where a gradient is), NaN where an element is.
    """

    norm: Tensor
    largest: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether no element is infinite or NaN (bool)."""
        return torch.isfinite(self.largest)


def pack(
    grads: Sequence[Tensor], *, target: Tensor | None = None, scale: Tensor | float | None = None
) -> Packed:
    """Norm and largest of `grads` (any shapes and strides, one device), times `scale`; waits for no GPU.

    target: contiguous, gets the scaled elements one tensor after the other, rounded to nearest; what it has
    beyond them stays. scale: a number or a tensor of one element on the gradients' device. The gradients are
    left as they are. Raises ValueError for a target that is too small, strided or elsewhere.
    """
    _check(grads, target)
    if not grads:
        return Packed(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float32))
    if isinstance(scale, float | int):
        scale = torch.full((), float(scale), dtype=torch.float32, device=grads[0].device)
    if torch.compiler.is_compiling():
        return Packed(*pack_op(list(grads), target, scale))
    return Packed(*_pack(grads, target, scale))


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm alone, float64: as `pack` finds it, without what PyTorch's operations pay for the largest."""
    _check(grads, None)
    if torch.compiler.is_compiling() or not grads:
        return pack(grads).norm
    return _pack(grads, None, None, only_norm=True)[0]


def _pack(
    grads: Sequence[Tensor], target: Tensor | None, scale: Tensor | None, *, only_norm: bool = False
) -> tuple[Tensor, Tensor]:
    provider = choose("grad_pack", grads[0].device, _offered(grads, target))
    if provider == "torch":
        return _by_torch(grads, target, scale, only_norm)
    ordered = target is not None
    flat = [g if g.is_contiguous() else flattened(g, ordered=ordered) for g in grads]
    if provider == "triton":
        from .kernels.grad_pack import pack as launch
    else:
        from .native.grad_pack import pack as launch
    sums, tops = launch(flat, target, scale)
    return total(sums).sqrt(), tops.amax() if tops.numel() else tops.new_zeros(())


@torch.library.custom_op("shoestring::grad_pack", mutates_args=("target",))
def pack_op(grads: list[Tensor], target: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`pack` as an operation that torch.compile keeps whole: norm and largest."""
    return _pack(grads, target, scale)


@pack_op.register_fake
def _(grads: list[Tensor], target: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return grads[0].new_empty((), dtype=torch.float64), grads[0].new_empty((), dtype=_wide(grads))


def total(sums: Tensor) -> Tensor:
    """float64 sum of a flat tensor, in an order that no number of threads changes."""
    rest = -sums.numel() % 1024
    return torch.nn.functional.pad(sums.double(), (0, rest)).view(-1, 1024).sum(1).sum()


def flattened(grad: Tensor, *, ordered: bool) -> Tensor:
    """`grad` as one run, copied only where it has holes; in memory's order unless `ordered`."""
    if grad.is_contiguous():
        return grad.detach().view(-1)
    if not ordered:
        dense = grad.detach().permute(sorted(range(grad.dim()), key=grad.stride().__getitem__, reverse=True))
        if dense.is_contiguous():
            return dense.view(-1)
    return grad.detach().contiguous().view(-1)


class Table(NamedTuple):
    """Where the elements of all tensors lie, for one pass over blocks of `BLOCK` of them.

    rows: int64 [5, tensors] on the device: address, elements, place in the target, first block, kind.
    owner: int32 [blocks]: the tensor that a block belongs to. runs: (dtype, aligned, first block, blocks) of
    tensors of one sort; aligned: all their addresses, in the target too, are multiples of 16 bytes.
    """

    rows: Tensor
    owner: Tensor
    runs: list[tuple[torch.dtype, bool, int, int]]


def table_of(flat: Sequence[Tensor], target: Tensor | None) -> Table:
    """`new_table`, kept for gradients that lie where they lay before: it is sent to a GPU once."""
    device = flat[0].device
    where = None if target is None else (target.data_ptr(), target.element_size())
    key = (device, stream_of(device), where, tuple((t.data_ptr(), t.numel(), t.dtype) for t in flat))
    return _TABLES.find(key, lambda: new_table(flat, target))


def new_table(flat: Sequence[Tensor], target: Tensor | None) -> Table:
    """The table of tensors without holes."""
    device = flat[0].device
    stream, where = stream_of(device), (0, 0)
    if target is not None:
        where = (target.data_ptr(), target.element_size())
    place, entries = 0, []
    for tensor in flat:
        if tensor.numel():
            aligned = tensor.data_ptr() % 16 == 0 and (where[0] + place * where[1]) % 16 == 0
            entries.append(
                (KINDS[tensor.dtype], not aligned, tensor.data_ptr(), tensor.numel(), place, tensor.dtype)
            )
        place += tensor.numel()
    entries.sort(key=lambda e: e[:2])  # the order within a sort stays
    columns, counts, first = [], [], 0
    runs: list[tuple[torch.dtype, bool, int, int]] = []
    for kind, unaligned, address, elements, place, dtype in entries:
        blocks = -(-elements // BLOCK)
        columns.append((address, elements, place, first, kind))
        counts.append(blocks)
        if runs and runs[-1][:2] == (dtype, not unaligned):
            runs[-1] = (*runs[-1][:3], runs[-1][3] + blocks)
        else:
            runs.append((dtype, not unaligned, first, blocks))
        first += blocks
    rows = torch.tensor(columns, dtype=torch.int64, device="cpu").view(-1, 5).t().contiguous()
    owner = _OWNERS.find(  # which stay where addresses do not
        (tuple(counts), device, stream), lambda: sent(_owner(counts), device)
    )
    return Table(sent(rows, device), owner, runs)


def _owner(counts: Sequence[int]) -> Tensor:
    numbers = torch.arange(len(counts), dtype=torch.int32, device="cpu")
    return numbers.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"))


# A table of all tensors, or a thousand of one tensor each: what steps from inside a backward ask for.
_TABLES: Kept[Table] = Kept(1 << 18, lambda table: table.rows.numel())
_OWNERS: Kept[Tensor] = Kept(1 << 24, Tensor.numel)


def _by_torch(
    grads: Sequence[Tensor], target: Tensor | None, scale: Tensor | None, only_norm: bool
) -> tuple[Tensor, Tensor]:
    wide = _wide(grads)
    if target is None and grads[0].device.type != "cpu":
        return _at_once(grads, scale, wide, only_norm)
    return _in_chunks(grads, target, scale, wide, only_norm)


def _in_chunks(
    grads: Sequence[Tensor], target: Tensor | None, scale: Tensor | None, wide: torch.dtype, only_norm: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch's own operations on what stays in a core's cache."""
    device, place = grads[0].device, 0
    chunk = _CHUNK.get(device.type, 1 << 24)
    room = min(chunk, sum(g.numel() for g in grads))
    # Written again and again: memory that the system takes back after each chunk costs more than the sums.
    wider, squares = torch.empty(2, -(-room // _ROW) * _ROW, dtype=wide, device=device)
    top = torch.zeros((), dtype=wide, device=device)
    sums = [torch.zeros(1, dtype=wide, device=device)]
    for part in _parts(grads, chunk, target is not None):
        count = len(part)
        value = part if part.dtype == wide else wider[:count].copy_(part)
        if scale is not None:
            value = torch.mul(value, scale.to(wide), out=wider[:count])
        if target is not None:
            target.view(-1)[place : place + count].copy_(value)
            place += count
        if not only_norm:
            low, high = value.aminmax()
            top = torch.maximum(top, torch.maximum(-low, high))
        torch.mul(value, value, out=squares[:count])
        rows = -(-count // _ROW)
        squares[count : rows * _ROW].zero_()
        sums.append(squares[: rows * _ROW].view(rows, _ROW).sum(1))
    return total(torch.cat(sums)).sqrt(), top


def _parts(grads: Sequence[Tensor], chunk: int, ordered: bool) -> Iterator[Tensor]:
    """All elements in order, at most `chunk` at a time: parts of large tensors, many small ones together."""
    small: list[Tensor] = []
    waiting = 0
    for grad in grads:
        count = grad.numel()
        large = count * 8 > chunk
        if small and (large or grad.dtype != small[0].dtype or waiting + count > chunk):
            yield torch.cat(small)
            small, waiting = [], 0
        if large:
            yield from torch.split(flattened(grad, ordered=ordered), chunk)
        elif count:
            small.append(flattened(grad, ordered=ordered))
            waiting += count
    if small:
        yield torch.cat(small)


def _at_once(
    grads: Sequence[Tensor], scale: Tensor | None, wide: torch.dtype, only_norm: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch's norms of all tensors at once, which on a GPU are as good; the scale goes to the results."""
    full = [g.detach() for g in grads if g.numel()]
    norms = tops = [torch.zeros((), dtype=wide, device=grads[0].device)]
    for dtype in dict.fromkeys(g.dtype for g in full):
        same = [g for g in full if g.dtype == dtype]
        norms = [*norms, *torch._foreach_norm(same, 2.0, dtype=wide)]
        if not only_norm:
            tops = [*tops, *torch._foreach_norm(same, float("inf"), dtype=wide)]
    norm, top = total(torch.stack(norms).double().square()).sqrt(), torch.stack(tops).amax()
    return (norm, top) if scale is None else (norm * scale.abs(), top * scale.abs().to(wide))


def _wide(grads: Sequence[Tensor]) -> torch.dtype:
    """What is computed in: float64 keeps what it has."""
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


def _offered(grads: Sequence[Tensor], target: Tensor | None) -> list[Provider]:
    # A subclass may have its numbers elsewhere than at its address.
    if any(g.dtype not in KINDS or type(g) not in _PLAIN for g in grads):
        return []
    if target is None or target.dtype in (torch.float32, torch.bfloat16):
        return ["triton", "native"]
    return ["triton"] if target.dtype in KINDS else []


def _check(grads: Sequence[Tensor], target: Tensor | None) -> None:
    devices = {g.device for g in grads}
    if len(devices) > 1:
        raise ValueError(f"gradients are packed on one device, not on {sorted(map(str, devices))}")
    if target is None:
        return
    needed = sum(g.numel() for g in grads)
    if not target.is_contiguous() or not target.is_floating_point():
        raise ValueError(
            f"a target is contiguous and of a floating type, not {target.dtype} {target.stride()}"
        )
    if target.numel() < needed:
        raise ValueError(f"a target of {target.numel():,} elements is too small for {needed:,}")
    if devices and target.device not in devices:
        raise ValueError(f"a target lies where the gradients do, on {devices.pop()}, not on {target.device}")
