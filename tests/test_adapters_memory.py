"""What an adapter's backward pass keeps, against training every weight: whole models, saved-tensor hooks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shoestring.adapters import attach
from shoestring.models import load_model, read_facts
from shoestring.ops import use_fused
from shoestring.recipes import LoraAdapter, ModelConfig, SokaAdapter, SvfitAdapter
from torch import Tensor

IDS = torch.arange(256).reshape(4, 64) % 23


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def kept(folder: Path, adapter: Any, dtype: torch.dtype, *, fused: bool = True) -> int:
    """Bytes that one forward pass holds for its backward pass, each memory once, without the model's own."""
    recipe = ModelConfig(model_name_or_path=str(folder))
    facts = read_facts(recipe)
    base = load_model(facts, recipe, device=torch.device("cpu"), dtype=dtype)
    model: Any = attach(base, adapter, facts, seed=0).train()
    if fused:
        use_fused(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    sizes = [one.untyped_storage().nbytes() for place, one in held.items() if place not in own]
    loss.backward()
    return sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_training_every_weight(folder: Path, dtype: torch.dtype) -> None:
    """Inputs of the layers are kept by full tuning too; beside them an adapter has little. SVFit spares them.

    A rank of 16 is a quarter of this model's width, far more than adapters have.
    """
    full = kept(folder, None, dtype)
    for rank in (1, 16):
        lora, svfit = (kept(folder, kind(r=rank), dtype) for kind in (LoraAdapter, SvfitAdapter))
        assert lora < full
        assert svfit < 0.9 * lora
    assert kept(folder, SokaAdapter(r=4), dtype) < full


def test_layers_of_peft_keep_more_in_bfloat16(folder: Path) -> None:
    """Their float32 adapters take a float32 copy of each input: what the measurement has to find."""
    full = kept(folder, None, torch.bfloat16)
    assert kept(folder, LoraAdapter(r=1), torch.bfloat16, fused=False) > 1.5 * full
