"""TRL's SFTTrainer as its documentation has it: LoRA r 16 on all linears, batch 8, bf16.

TRL has no time budget, so it is given what it needs to look its best: the steps that fit are computed from
a measured step, its linear schedule ends at exactly that step, and a callback stops it if it is late.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

STARTED = time.monotonic() - (time.time() - os.stat(f"/proc/{os.getpid()}").st_ctime)

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from gsm8k import conversation, rows  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Watch(TrainerCallback):
    """Times every step; stops at the deadline."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline, self.seconds, self.began = deadline, [], 0.0

    def on_step_begin(self, *_args, **_kwargs):
        """Start of one optimizer step."""
        self.began = time.monotonic()

    def on_step_end(self, _args, _state, control, **_kwargs):
        """End of one optimizer step."""
        self.seconds.append(time.monotonic() - self.began)
        if self.deadline is not None and time.monotonic() + self.seconds[-1] > self.deadline:
            control.should_training_stop = True


def main() -> None:
    """Train, save the merged model, print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()

    data = Dataset.from_list(
        [{"prompt": m[:1], "completion": m[1:]} for m in map(conversation, rows(options.train))]
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    watch = Watch(None if options.seconds is None else STARTED + options.seconds - 8.0)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=data,
        args=SFTConfig(
            output_dir=options.output + "-trainer",
            per_device_train_batch_size=8,
            learning_rate=options.rate,
            max_steps=options.steps,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )
    began = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(options.output)
    trainer.processing_class.save_pretrained(options.output)
    print(
        json.dumps(
            {
                "seconds": time.monotonic() - STARTED,
                "start_up": began - STARTED,
                "save": time.monotonic() - trained,
                "step_seconds": watch.seconds,
                "steps": len(watch.seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
