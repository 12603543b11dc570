"""A model loaded into the store, changed there layer by layer, and written from it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft.tuners.lora import LoraLayer
from shoestring.adapters import merge_in_place
from shoestring.checkpoint import newest, save
from shoestring.offload import Stored
from shoestring.offload.layer_layout import predicted_bytes
from shoestring.offload.streamed_loading import load_streamed, safetensors_reader
from shoestring.offload.streamed_saving import save_streamed
from shoestring.recipes.errors import UserError
from streaming import llama, loss_of, rows, streamed, with_lora
from transformers import AutoConfig, AutoModelForCausalLM

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied float32 model in several files."""
    path = tmp_path_factory.mktemp("model")
    llama(tie_word_embeddings=True).save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def loaded(folder, scratch, dtype=torch.float32, **options):
    config = AutoConfig.from_pretrained(folder)
    options = {"tier": "disk", "folder": scratch, "io": "threads", **options}
    return load_streamed(config, safetensors_reader(folder), dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_model_that_transformers_loads(folder, tmp_path, dtype):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with loaded(folder, tmp_path, dtype) as offloaded, torch.no_grad():
        model = offloaded.model
        assert not model.training
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in plain.named_parameters()
        ]
        for name, buffer in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer)
        assert torch.equal(loss_of(model, rows(0)), loss_of(plain, rows(0)))


def test_an_adapter_attached_to_it_trains_as_on_the_loaded_model(folder, tmp_path):
    def gradients(model):
        adapted = with_lora(model.train())
        loss_of(adapted, rows(0)).backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}

    wanted = gradients(AutoModelForCausalLM.from_pretrained(folder))
    with loaded(folder, tmp_path) as offloaded:
        got = gradients(offloaded.model)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.parametrize("tied", [True, False])
def test_predicted_bytes_are_those_that_are_taken(tmp_path, tied):
    for dtype, buffers in ((torch.bfloat16, 2), (torch.float32, 3)):
        model = llama(dtype, tie_word_embeddings=tied)
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        said = predicted_bytes(shapes, itemsize=dtype.itemsize, buffers=buffers)
        with streamed(model, tmp_path, trainable=True, buffers=buffers) as offloaded:
            slots = [slot.memory for slot in offloaded.buffers._slots]
            assert said.buffers == sum(slot.nbytes for slot in slots)
            assert said.store == offloaded._tier.held.nbytes
            assert said.kept == sum(p.nbytes for n, p in model.named_parameters() if "layers" not in n)
            assert said.memory == said.buffers + said.kept
            in_layers = sum(p.numel() for n, p in model.named_parameters() if "layers" in n) * dtype.itemsize
            assert in_layers < said.store <= in_layers + 5 * (2 * 4096)


def test_what_does_not_fit_is_refused_in_words(folder, tmp_path):
    with pytest.raises(UserError, match="holds no safetensors files"):
        safetensors_reader(tmp_path)
    with pytest.raises(UserError, match=r"lack model\.layers\.0\.nothing"):
        safetensors_reader(folder)("model.layers.0.nothing")
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 96
    with pytest.raises(UserError, match=r"has shape \[80, 48\], config.json says \[96, 48\]"):
        load_streamed(
            config,
            safetensors_reader(folder),
            dtype=torch.float32,
            tier="disk",
            folder=tmp_path,
            io="threads",
        )
    assert list(tmp_path.iterdir()) == []


def test_one_file_without_an_index(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    assert not (folder / "model.safetensors.index.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(8)[None]
    with loaded(folder, tmp_path / "scratch") as offloaded, torch.no_grad():
        assert torch.equal(offloaded.model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_it_is_a_model_for_plain_transformers(folder, tmp_path, dtype):
    with loaded(folder, tmp_path / "scratch") as offloaded:
        save_streamed(offloaded, tmp_path / "saved", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    saved, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert saved.dtype == (dtype or torch.float32)
    ours = dict(saved.named_parameters())
    assert ours.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(ours[name], p) for name, p in plain.named_parameters())
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in plain.parameters())


@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_is_merged_layer_by_layer(folder, tmp_path, dtype, tier):
    wanted = merge_in_place(with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)))
    with loaded(folder, tmp_path / "scratch", dtype, tier=tier) as offloaded:
        adapted = with_lora(offloaded.model)
        with pytest.raises(ValueError, match="has an adapter"):
            save_streamed(offloaded, tmp_path / "saved")
        merge_streamed(adapted, offloaded)
        save_streamed(offloaded, tmp_path / "saved")
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").named_parameters())
    assert all(torch.equal(saved[name], p) for name, p in wanted.named_parameters())


def merge_streamed(adapted, offloaded):
    """As docs/streaming.md says."""
    for index in range(len(offloaded.layers)):
        with offloaded.present(index, changes=True) as layer, torch.no_grad():
            for module in layer.modules():
                if isinstance(module, LoraLayer):
                    weight = module.get_base_layer().weight
                    stored = weight.dtype
                    weight.data = weight.data.float()
                    module.merge(safe_merge=True)
                    weight.data = weight.data.to(stored)
    return adapted.merge_and_unload()


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_all_weights_can_be_read_and_written_where_they_lie(tmp_path, tier):
    model, plain = llama(), llama()
    with streamed(model, tmp_path, tier, trainable=True) as offloaded:
        with torch.no_grad():
            loss_of(model, rows(0))  # the buffers hold layers that will be old
        with offloaded.mapped(writable=True) as stored:
            for name, p in model.named_parameters():
                assert torch.equal(stored.get(p, p), plain.get_parameter(name))
                stored.get(p, p.data).mul_(0.5)
        for p in plain.parameters():
            p.data.mul_(0.5)
        with torch.no_grad():
            assert torch.equal(loss_of(model, rows(1)), loss_of(plain, rows(1)))
        with offloaded.mapped() as stored:
            assert torch.equal(
                stored[model.model.layers[4].mlp.up_proj.weight], plain.model.layers[4].mlp.up_proj.weight
            )


def test_through_a_checkpoint(tmp_path):
    """Weights are saved from where they lie, and loaded to there."""
    model, plain = llama(torch.bfloat16), llama(torch.bfloat16)
    with streamed(model, tmp_path / "scratch", trainable=True) as offloaded:
        values = {n: offloaded.stored(p) or p.detach() for n, p in model.named_parameters()}
        assert isinstance(values["model.layers.3.mlp.up_proj.weight"], Stored)
        before = offloaded.bytes_read
        path = save(tmp_path / "run", step=1, tensors={"trained": values}, json={})
        assert offloaded.bytes_read - before <= 5 * offloaded.layers[0].place.nbytes, "each layer once"
        saved = newest(tmp_path / "run", on_broken=print)
        assert saved is not None
        assert saved.path == path
        tensors = saved.tensors("trained")
        assert [n for n, p in plain.named_parameters() if not torch.equal(tensors[n], p)] == []
        half = {n: tensor * 0.5 for n, tensor in tensors.items()}
        assert isinstance(saved.open_tensors("trained")["model.norm.weight"], Stored)
        offloaded.load({p: half[n] for n, p in model.named_parameters()})
        offloaded.load({model.model.layers[1].mlp.up_proj.weight: saved.open_tensors("trained")[NAME]})
        with offloaded.mapped() as stored:
            for n, p in model.named_parameters():
                wanted = plain.get_parameter(n) * (0.5 if p in stored and n != NAME else 1)
                assert torch.equal(stored.get(p, p), wanted), n


def test_present_inside_present(tmp_path):
    model = llama()
    with streamed(model, tmp_path, trainable=True) as offloaded:
        with offloaded.present(1, changes=True) as layer:
            with offloaded.present(1):
                layer.mlp.up_proj.weight.data.zero_()
            assert bool((layer.mlp.up_proj.weight == 0).all())
            layer.mlp.up_proj.weight.data = torch.ones(80, 48)
        with offloaded.present(1) as layer:
            assert bool((layer.mlp.up_proj.weight == 1).all())
            with pytest.raises(RuntimeError, match="to be read"), offloaded.present(1, changes=True):
                pass
