"""RMSNorm, SwiGLU and rotary embeddings by Liger (arXiv 2410.10989), an optional package, on CUDA.

Its public functions are used where it is installed and computes what ours do, which is tried once for each
operation, device and type, with gradients; else ours are, after one warning. Without it nothing is imported.

    rms_norm   y = x / sqrt(mean(x^2) + eps) w: 4 bytes an element in bfloat16, where plain operations move 36
    swiglu     y = silu(g) u: 6 bytes, where two operations move 10; backward writes over g and u
    rope       y = x cos + rotate_half(x) sin of queries and keys: 4 bytes, where plain operations move 22
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import providers
from .providers import Provider

_WIDEST = 65536  # elements of a row that its kernels hold
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def offers(operation: str, first: Tensor, *others: Tensor) -> list[Provider]:
    """["liger"] where Liger has `operation` for tensors of these types, or lacks something `choose` names."""
    if first.dtype not in _TOLERANCE or any(other.dtype != first.dtype for other in others):
        return []
    if not first.numel() or first.shape[-1] > _WIDEST:
        return []
    if not providers.runs("liger", first.device):
        return ["liger"]
    return ["liger"] if _agrees(operation, first.device, first.dtype) else []


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm.rms_norm`, whose rounding Llama's mode has; the incoming gradient is left as it is."""
    from liger_kernel.transformers.functional import liger_rms_norm

    y: Tensor = liger_rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=False)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `mlp.swiglu`; its backward overwrites gate and up, so a second one is a RuntimeError."""
    from liger_kernel.transformers.functional import liger_swiglu

    y: Tensor = liger_swiglu(gate, up)
    if y.requires_grad:
        y.register_hook(_Once())  # type: ignore[no-untyped-call]  # torch has no types here
    return y


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As transformers' `apply_rotary_pos_emb`: q, k [B, heads, T, d], cos and sin [B or 1, T, d]."""
    from liger_kernel.transformers.functional import liger_rope

    found: tuple[Tensor, Tensor] = liger_rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return found


def rotary_forward(attention: Any) -> Callable[..., Any] | None:
    """The forward of this attention module with Liger's rotary embedding in it; None where it has another.

    No module of transformers is changed: the function is the class's own, which finds another
    `apply_rotary_pos_emb` among its names.
    """
    return _rotary_forward(type(attention).forward)


@cache
def _rotary_forward(forward: Any) -> Callable[..., Any] | None:
    names = getattr(forward, "__globals__", {})
    own = names.get("apply_rotary_pos_emb")
    if own is None or not hasattr(forward, "__code__"):
        return None
    if "apply_rotary_pos_emb" not in forward.__code__.co_names or not _is_half_rotation(own):
        return None
    swapped = types.FunctionType(
        forward.__code__,
        {**names, "apply_rotary_pos_emb": _rotary_or(own)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    swapped.__kwdefaults__ = forward.__kwdefaults__
    return swapped


@cache
def _rotary_or(own: Callable[..., Any]) -> Callable[..., Any]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if torch.compiler.is_compiling() or cos.dtype not in (q.dtype, torch.float32) or unsqueeze_dim != 1:
            return own(q, k, cos, sin, unsqueeze_dim)
        if providers.choose("rope", q.device, offers("rope", q, k)) != "liger":
            return own(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, k, cos, sin)

    return apply


@cache
def _is_half_rotation(own: Callable[..., Any]) -> bool:
    """Whether a model's function is the plain rotation of the two halves of a head."""
    inputs = _rope_inputs(torch.device("cpu"), torch.float32)
    try:
        found = own(*inputs)
    except Exception:  # of a model whose function takes something else
        return False
    return len(found) == 2 and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(found, rotary_reference(*inputs), strict=True)
    )


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation by its formula."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return turned(q), turned(k)


class _Once:
    """A hook on a gradient that lets one through."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, grad: Tensor) -> None:
        if self._seen:
            raise RuntimeError(
                "Liger's SwiGLU overwrites what its backward reads: no second backward through one graph.\n"
                "  Set SHOESTRING_OPS=swiglu=torch"
            )
        self._seen = True


@cache
def _agrees(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Liger's function gives the values and gradients that ours gives, on numbers of `dtype`."""
    # at whatever moment the first call comes
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        good, why = _trial(operation, device, dtype)
    if not good:
        warnings.warn(f"Liger's {operation} {why} here, and is not used", stacklevel=2)
    return good


def _trial(operation: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the two agree, and what to say where they do not."""
    from . import mlp
    from .rms_norm import reference as norm_reference

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    if operation == "rms_norm":
        inputs = [
            _numbers(3, 5, 96, device=device, dtype=dtype),
            _numbers(96, device=device, dtype=dtype) + 1,
        ]
        ours, theirs = (lambda x, w: norm_reference(x, w, 1e-5)), (lambda x, w: rms_norm(x, w, 1e-5))
    elif operation == "swiglu":
        inputs = [_numbers(3, 5, 96, device=device, dtype=dtype, start=s) for s in (0, 1000)]
        ours, theirs = mlp.swiglu_reference, swiglu
    else:
        inputs = _rope_inputs(device, dtype)
        ours, theirs = rotary_reference, rotary
    try:
        pairs = zip(_results(ours, inputs), _results(theirs, inputs), strict=True)
        return all(_close(a, b, _TOLERANCE[dtype]) for a, b in pairs), "gives other numbers"
    except Exception as error:
        return False, f"failed with {type(error).__name__}: {error}"


def _results(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of `function` and gradients of the first two inputs."""
    leaves = [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    # what backward may write into is no leaf
    outputs = function(*(x * 1 for x in leaves[:2]), *leaves[2:])
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    weighed = [(y * _numbers(*y.shape, device=y.device, dtype=y.dtype)).sum() for y in outputs]
    gradients = torch.autograd.grad(sum(weighed[1:], weighed[0]), leaves[:2])
    return [*(y.detach() for y in outputs), *gradients]


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    a, b = ours.float(), theirs.float()
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


def _rope_inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    heads = [_numbers(1, n, 6, 16, device=device, dtype=dtype) for n in (4, 2)]
    angle = torch.arange(6.0)[:, None] * 10.0 ** -torch.arange(0, 1, 1 / 8)
    both = torch.cat([angle, angle], dim=-1)[None]
    return [*heads, both.cos().to(device, dtype), both.sin().to(device, dtype)]


def _numbers(*shape: int, device: torch.device, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Fixed numbers in [-1, 1]: the random generators stay where they are."""
    count = torch.Size(shape).numel()
    return (
        torch.arange(start, start + count, dtype=torch.float32).mul(1.7).sin().view(shape).to(device, dtype)
    )
