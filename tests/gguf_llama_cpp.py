"""llama.cpp as an oracle: logits and token ids of a GGUF file, where the package llama_cpp is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def opened(path: Path, context: int, **given: Any) -> Any:
    """A model on one thread, its cache of keys and values in float32."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        type_k=0,
        type_v=0,
        logits_all=True,
        verbose=False,
        **given,
    )


def logits(path: Path, ids: list[int]) -> np.ndarray:
    """float32 [L, vocabulary]."""
    model = opened(path, max(len(ids), 64))
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)], copy=True)
    finally:
        model.close()


def token_ids(path: Path, texts: list[str]) -> list[list[int]]:
    """Ids of each text, special tokens recognised and none added."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        return [model.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in texts]
    finally:
        model.close()
