"""Optimizers that are taken from the best kept library instead of being written again.

| name                | from                 | rule                                                       |
|---------------------|----------------------|------------------------------------------------------------|
| adafactor           | torch.optim          | arXiv:1804.04235; the rate is relative to the weights' RMS |
| adam_mini           | adam-mini            | arXiv:2406.16793, blocks from the model's structure        |
| came                | came-pytorch         | arXiv:2307.02047                                           |
| schedule_free_adamw | schedulefree         | arXiv:2405.15682; trains at y, is used at x                |
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, assert_never

import torch
from torch import nn

from ..recipes.errors import UserError
from ..recipes.optimizers import Adafactor, AdamMini, Came, ScheduleFreeAdamW

LibraryConfig = Adafactor | AdamMini | Came | ScheduleFreeAdamW
"""The optimizers that are built here."""

# torch squares its ε1, so this is the published 1e-30 on the squared gradient. torch's default, the dtype's
# eps, is far above the squared gradients of a large model: in bfloat16 it shortens steps a hundredfold.
_ADAFACTOR_EPS = (1e-15, 1e-3)
_QUERY_OR_KEY = re.compile(r"(^|\.)(q_proj|k_proj|wq|wk|query|key|q_lin|k_lin)\.weight$")
_FUSED = re.compile(r"(^|\.)(qkv_proj|query_key_value|c_attn|qkv|Wqkv|in_proj)(\.weight|_weight)$")
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)


def build_from_library(
    model: nn.Module, config: LibraryConfig, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The library's optimizer for `groups` of `parameter_groups`, with a rate of zero.

    Its groups keep `rate_scale` and `weight_decay`; Adam-mini has a group for each tensor. Schedule-free
    AdamW is in train mode; see `averaged_weights`.

    Raises UserError when the package is missing, when the weights are of 16 bits and the library would keep a
    second moment in them that cannot decay (adam_mini, schedule_free_adamw), and when Adam-mini cannot find
    the heads of a query or key.
    """
    match config:
        case Adafactor():
            return torch.optim.Adafactor(
                groups,
                lr=0.0,
                beta2_decay=config.beta2_decay,
                eps=_ADAFACTOR_EPS,
                d=config.d,
                foreach=True,
            )
        case AdamMini():
            return _adam_mini(model, config, groups)
        case Came():
            came = _package(config.name, "came-pytorch").CAME
            optimizer = _built(came(groups, lr=1.0, betas=config.betas))  # it refuses a rate of zero
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            return optimizer
        case ScheduleFreeAdamW():
            library = _package(config.name, "schedulefree")
            _refuse_16_bits(config.name, groups)
            averaging = library.AdamWScheduleFree(groups, lr=0.0, betas=config.betas, eps=config.eps)
            averaging.train()
            return _built(averaging)
        case _:
            assert_never(config)


def library_state_bytes(
    config: LibraryConfig,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
) -> int:
    """Bytes of state after the first step, for parameters of these (name, shape), all of `dtype`.

    For n elements, in rows of c and columns of r (the last two dimensions), of s bytes each in `dtype`:

    | optimizer           | matrices                                  | vectors                           |
    |---------------------|-------------------------------------------|-----------------------------------|
    | adafactor           | s (n / c + n / r) + 4                     | s n + 4                           |
    | adam_mini           | s (n + blocks): a block is a row, or a    | s (n + 1) for norms,              |
    |                     | head of a query or key                    | 2 s n for biases and all others   |
    | came                | w (n + 2 n / c + 2 n / r) + s             | 2 w n + s, with w = max(s, 4)     |
    | schedule_free_adamw | 2 s n                                     | 2 s n                             |

    head_dim: rows in a head of queries and keys, for adam_mini; without it each of their rows counts as a
    block, which is above the truth by less than one part in the length of a row.
    """
    return sum(_bytes(config, name, shape, dtype.itemsize, head_dim) for name, shape in tensors)


def _bytes(
    config: LibraryConfig, name: str, shape: tuple[int, ...], itemsize: int, head_dim: int | None
) -> int:
    n = prod(shape)
    factors = n // shape[-1] + n // shape[-2] if len(shape) > 1 else n
    match config:
        case Adafactor():
            return itemsize * factors + 4
        case AdamMini():
            block = _block(name, len(shape))
            if block == "mlp":
                return itemsize * (n + shape[0])
            if block == "q_proj":
                return itemsize * (n + shape[0] // (head_dim or 1))
            return itemsize * (n + (1 if block == "norm" else n))
        case Came():
            wide = max(itemsize, 4)
            return wide * (n + (2 * factors if len(shape) > 1 else n)) + itemsize
        case ScheduleFreeAdamW():
            return 2 * itemsize * n
        case _:
            assert_never(config)


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights are those to evaluate, save and export; afterwards those to train, bit for bit.

    They differ for schedule-free AdamW alone (arXiv:2405.15682: trained at y, used at the average x); for
    every other optimizer, and inside another such block, nothing happens. Its own way back, y = x + (1 - β1)
    (z - x), rounds, and a run would depend on when it was evaluated; so a copy of y is kept. It takes no more
    memory than the gradients, of which there are none between two steps.
    """
    if not _trains_elsewhere(optimizer):
        yield
        return
    trained = {
        p: p.detach().clone()
        for group in optimizer.param_groups
        for p in group["params"]
        if "z" in optimizer.state.get(p, {})
    }
    switch: Any = optimizer
    switch.eval()
    try:
        yield
    finally:
        switch.train()
        with torch.no_grad():
            for parameter, value in trained.items():
                parameter.copy_(value)


def end_at_averaged_weights(optimizer: torch.optim.Optimizer) -> None:
    """As `averaged_weights`, for good: nothing can be trained afterwards, and no copy is kept."""
    if _trains_elsewhere(optimizer):
        switch: Any = optimizer
        switch.eval()


def _trains_elsewhere(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("train_mode", False) for group in optimizer.param_groups)


def _adam_mini(model: nn.Module, config: AdamMini, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam-mini with the blocks of `_block` and the model's own heads.

    The package tells blocks by substrings of names ("key" in any name is a key) and takes the size of a head
    for dim² / heads, which is wrong where heads are not hidden_size / heads wide (Gemma, Qwen3). So it gets
    the kind of a block as the name, and the size that the model's configuration states.
    """
    library = _package(config.name, "adam-mini")
    _refuse_16_bits(config.name, groups)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [(names[id(p)], p, group) for group in groups for p in group["params"]]
    head_numel = _head_elements(model, {name: p for name, p, _ in members})
    optimizer = library.Adam_mini(
        [(_block(name, p.ndim), p) for name, p, _ in members],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        dim=1,
        n_heads=1,
        verbose=False,
    )
    optimizer.head_numel = head_numel
    # It takes every visible GPU for a shard and would gather over a process group that need not exist; a
    # replica holds whole tensors.
    optimizer.world_size = 1
    for (_, _, given), own in zip(members, optimizer.param_groups, strict=True):
        own["weight_decay"], own["rate_scale"] = given["weight_decay"], given["rate_scale"]
    return _built(optimizer)


def _block(name: str, ndim: int) -> str:
    """What shares a second moment, in a word that adam-mini knows.

    q_proj: a head; mlp: a row, of embeddings, heads and adapters too; norm: the tensor; bias: nothing does.
    """
    if ndim < 2:
        return "norm" if _NORM.search(name) and not name.endswith("bias") else "bias"
    return "q_proj" if _QUERY_OR_KEY.search(name) and ".lora_" not in name else "mlp"


def _head_elements(model: nn.Module, trained: dict[str, nn.Parameter]) -> int:
    """Elements in a head of a query or key, the same for all; UserError where heads cannot be told."""
    transposed = {
        f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"
    }
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    found: set[int] = set()
    for name, parameter in trained.items():
        shape = list(parameter.shape)
        if ".lora_" not in f".{name}":
            if _FUSED.search(name):
                raise _untold(name, shape, "queries, keys and values share it")
            if name in transposed:
                raise _untold(name, shape, "its outputs are columns, not rows")
        if parameter.ndim > 2:
            raise _untold(name, shape, f"it has {parameter.ndim} dimensions")
        if parameter.ndim < 2 or _block(name, parameter.ndim) != "q_proj":
            continue
        if heads is None:
            raise _untold(name, shape, "the model's configuration has no num_attention_heads")
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        allowed = {heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size}
        found.add(size * shape[1])
        if shape[0] not in allowed or len(found) > 1:
            raise _untold(name, shape, f"it is not made of {heads} heads of {size}")
    return found.pop() if found else 1


def _untold(name: str, shape: list[int], why: str) -> UserError:
    return UserError(
        f"optimizer.name  adam_mini cannot tell the blocks of {name} {shape}: {why}\n"
        "                Use optimizer.name=adamw with optimizer.state_bits=8, or optimizer.name=adafactor"
    )


def _refuse_16_bits(name: str, groups: list[dict[str, Any]]) -> None:
    dtypes = {p.dtype for group in groups for p in group["params"]} & {torch.bfloat16, torch.float16}
    if dtypes:
        dtype = str(dtypes.pop()).removeprefix("torch.")
        raise UserError(
            f"optimizer.name  {name} keeps its state in the weights' dtype, and in {dtype} a second moment "
            "that decays by 0.999 a step never shrinks\n"
            "                Use model.dtype=float32, or optimizer.name=adamw, which rounds stochastically"
        )


def _package(name: str, package: str) -> Any:
    module = package.replace("-", "_")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"optimizer.name  {name} needs the package {package}: {error}\n"
            '                Install it: pip install "shoestring[optimizers]"   or use optimizer.name=adamw'
        ) from None


def _built(optimizer: Any) -> torch.optim.Optimizer:
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
