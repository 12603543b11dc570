"""Random generators as plain JSON values, bit for bit.

Python's generator is a tuple of integers, numpy's an array, torch's an opaque byte string: bytes go as
base64. On resume, restore them last: building loaders and skipping rows draw from them.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..recipes.errors import UserError

Generator = torch.Generator | np.random.Generator


def random_state(generators: Mapping[str, Generator] | None = None) -> dict[str, Any]:
    """Python's, numpy's legacy and torch's global generators, every CUDA device's, and the named ones."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch
    return {
        "python": random.getstate(),
        "numpy": [name, _encode(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _encode_tensor(torch.get_rng_state()),
        "cuda": [_encode_tensor(state) for state in cuda],
        "named": {key: _encode_generator(generator) for key, generator in (generators or {}).items()},
    }


def set_random_state(
    state: Mapping[str, Any], generators: Mapping[str, Generator] | None = None
) -> list[str]:
    """Restore what `random_state` gave. Returns a line for each thing that this machine cannot restore.

    UserError when the state is malformed or names other generators than `generators`; then nothing is
    changed.
    """
    given = dict(generators or {})
    try:
        version, words, gauss = state["python"]
        python = (version, tuple(words), gauss)
        name, keys, position, has_gauss, cached = state["numpy"]
        legacy = (name, np.frombuffer(_decode(keys), dtype=np.uint32), position, has_gauss, cached)
        cpu = _decode_tensor(state["torch"])
        cuda = [_decode_tensor(text) for text in state["cuda"]]
        named = dict(state["named"])
        # Tried on generators of our own first, so that a bad state leaves the real ones as they are.
        random.Random().setstate(python)
        np.random.RandomState().set_state(legacy)
        torch.Generator().set_state(cpu)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The random generators in this checkpoint cannot be restored: {error!r}.\n"
            "Resume from an older checkpoint, or start over with --fresh."
        ) from None
    if named.keys() != given.keys():
        raise UserError(
            f"The checkpoint has the random generators {sorted(named)}, this run has {sorted(given)}.\n"
            "It was written by another version of the program: start over with --fresh."
        )
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(cpu)
    for key, generator in given.items():
        _set_generator(generator, named[key])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(min(len(cuda), here)):
        torch.cuda.set_rng_state(cuda[index], index)
    if len(cuda) > here:
        return [
            f"random generators of {len(cuda)} CUDA devices were saved, {here} are here: other random numbers"
        ]
    return []


def _encode_generator(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return _encode_tensor(generator.get_state())
    return _encode_nested(generator.bit_generator.state)


def _set_generator(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(_decode_tensor(state))
    else:
        generator.bit_generator.state = _decode_nested(state)


def _encode_nested(value: Any) -> Any:
    """numpy's states: dicts of integers, strings and, for some generators, arrays."""
    if isinstance(value, dict):
        return {key: _encode_nested(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "array": _encode(value.tobytes())}
    return value.item() if isinstance(value, np.generic) else value


def _decode_nested(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "array"}:
        return np.frombuffer(_decode(value["array"]), dtype=value["dtype"])
    return {key: _decode_nested(item) for key, item in value.items()}


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _encode_tensor(state: torch.Tensor) -> str:
    return _encode(state.cpu().numpy().tobytes())


def _decode_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_decode(text)), dtype=torch.uint8)
