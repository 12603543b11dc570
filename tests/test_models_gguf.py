"""GGUF files: the header, the configuration, and weights equal to what transformers itself dequantises."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from shoestring.models import load_model, read_facts, weight_reader
from shoestring.models.gguf_header import read_gguf_header, write_header_copy
from shoestring.models.gguf_weights import _through_transformers, read_state
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4200,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
Q8, F32, F16 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "F32", "F16"))


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | Qwen2ForCausalLM,
    kind: gguf.GGMLQuantizationType = F32,
    leave_out: str = "",
    divisors: np.ndarray | None = None,
) -> Path:
    """`model` as llama.cpp stores it: rotary rows of q and k interleaved for the architecture llama."""
    config, llama = model.config, isinstance(model, LlamaForCausalLM)
    architecture = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.QWEN2
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(4200)])  # long enough to be skipped
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored == leave_out:
            continue
        data = value.float().numpy()
        if llama and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        raw = kind if data.ndim > 1 else F32
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(data), raw), raw_dtype=raw)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def recipe(path: Path, **keys: object) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(path), **keys)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM | Qwen2ForCausalLM:
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def test_float32_weights_come_back_to_the_bit(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    facts = read_facts(recipe(path))
    loaded = load_model(facts, recipe(path), device=CPU, dtype=torch.float32)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = torch.randint(0, 160, (1, 12))
    assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-5
    reader = weight_reader(facts)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(reader(name), model.state_dict()[name])


@pytest.mark.parametrize("kind", [Q8, F16])
def test_equal_to_what_transformers_dequantises(
    model: LlamaForCausalLM, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    header, skeleton = read_gguf_header(path), read_facts(recipe(path)).skeleton()
    ours = read_state(header, skeleton, torch.float32)
    theirs = _through_transformers(header, skeleton, torch.float32)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_loaded_model_saves_and_trains(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, Q8)
    loaded = load_model(read_facts(recipe(path)), recipe(path), device=CPU, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert getattr(loaded.config, "quantization_config", None) is None
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    ids = torch.randint(0, 160, (1, 12))
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    loaded(ids).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_the_header_copy_is_small_and_alike(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    header = read_gguf_header(path)
    assert header.array_lengths == {"tokenizer.ggml.tokens": 4200}
    write_header_copy(header, tmp_path / "copy.gguf")
    copy = read_gguf_header(tmp_path / "copy.gguf")
    assert (copy.metadata, copy.tensors) == (header.metadata, header.tensors)
    assert copy.data_offset < header.data_offset
    library = gguf.GGUFReader(path)
    for tensor in library.tensors:
        assert header.data_offset + header.tensors[tensor.name].offset == tensor.data_offset


def test_sizes_come_from_the_tensors(model: LlamaForCausalLM, tmp_path: Path) -> None:
    facts = read_facts(recipe(write_gguf(tmp_path / "m.gguf", model)))
    assert (facts.kind, facts.vocab_size, facts.tied) == ("gguf", 4200, False)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_cut_off_file_is_refused_before_loading(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"is cut off: .* ends at byte [\d,]+ of [\d,]+"):
        read_facts(recipe(path))


def test_a_missing_tensor_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"has no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(read_facts(recipe(path)), recipe(path), device=CPU, dtype=torch.float32)


def test_llama3_rotary_scaling_is_recovered(tmp_path: Path) -> None:
    rule = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"rope_parameters": rule})).eval()
    plain = 500000.0 ** -(np.arange(8) / 8)
    divisors = plain / model.model.rotary_emb.inv_freq.numpy()
    assert divisors.max() == pytest.approx(32)
    path = write_gguf(tmp_path / "m.gguf", model, divisors=divisors)
    loaded = load_model(read_facts(recipe(path)), recipe(path), device=CPU, dtype=torch.float32)
    ids = torch.randint(0, 160, (1, 64))
    assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-5
    odd = write_gguf(tmp_path / "odd.gguf", model, divisors=divisors[::-1] * math.pi)
    with pytest.raises(UserError, match="scales its rotary frequencies in a way that"):
        read_facts(recipe(odd))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "nonsense")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="the GGUF architecture 'nonsense', which transformers cannot read"):
        read_facts(recipe(tmp_path / "m.gguf"))


def test_four_bits_from_gguf(model: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = write_gguf(tmp_path / "m.gguf", model)
    keys = recipe(path, load_in_4bit=True)
    loaded = load_model(read_facts(keys), keys, device=CPU, dtype=torch.bfloat16)
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in loaded.named_modules()}
    assert (kinds["q_proj"], kinds["down_proj"], kinds["lm_head"]) == ("Linear4bit", "Linear4bit", "Linear")
    ids = torch.randint(0, 160, (1, 12))
    difference = (loaded(ids).logits.float() - model(ids).logits).norm() / model(ids).logits.norm()
    assert 1e-3 < difference < 0.3
