"""PEFT and transformers write their own files into a checkpoint, and read them back from it."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shoestring.checkpoint import newest, save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
        )
    )


def test_adapter_and_model_are_part_of_the_checkpoint_and_load_with_their_own_libraries(
    tmp_path: Path,
) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))

    def copy(folder: Path) -> None:
        model.save_pretrained(folder)
        tiny().save_pretrained(folder / "base")

    save(tmp_path, step=1, tensors={}, json={"trainer": {}}, copy=copy)
    checkpoint = newest(tmp_path, lambda line: None)
    assert checkpoint is not None
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base/model.safetensors",
        "base/config.json",
    } <= set(checkpoint.manifest.files)
    ids = torch.arange(12).view(1, 12)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.path / "base")
    loaded = PeftModel.from_pretrained(base, checkpoint.path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
