"""Error texts of recipes, to the character: what was wrong, where, what is allowed, what to type next."""

from pathlib import Path

import pytest
from shoestring.recipes import UserError, load_recipe

BASE = "model: m\ndata: a.jsonl\nbudget: 1h\n"

OPTIMIZERS = (
    "adamw, adamw_8bit, paged_adamw_8bit, lion_8bit, apollo, apollo_mini, q_apollo, galore, "
    "natural_galore, frugal, cosmos, muon, soap, badam, lomo, adalomo, adafactor, lion, adam_mini, came or "
    "schedule_free_adamw"
)

# What is appended to BASE (so its first line is line 4), and the whole message.
AFTER = {
    "typo_in_a_key": (
        "optimizer:\n  lerning_rate: 1e-3\n",
        "recipe.yaml:5  optimizer.lerning_rate is not a key.   Did you mean optimizer.learning_rate ?",
    ),
    "key_of_another_section": (
        "learning_rate: 1\n",
        "recipe.yaml:4  learning_rate is not a key.   Did you mean optimizer.learning_rate ?",
    ),
    "key_of_two_sections": (
        "every: 3\n",
        "recipe.yaml:4  every is not a key.   Did you mean eval.every or checkpoint.every ?",
    ),
    "dotted_key_in_the_file": (
        "optimizer.learning_rate: 1e-3\n",
        "recipe.yaml:4  optimizer.learning_rate with a dot is for the command line.   Write optimizer: "
        "{learning_rate: ...}",
    ),
    "key_of_nowhere": (
        "optimizer: {zzz: 3}\n",
        "recipe.yaml:4  optimizer.zzz is not a key; allowed: learning_rate, weight_decay, "
        "max_grad_norm, weights, step_in_backward, clipping, state_bits, name, betas, eps",
    ),
    "section_of_nowhere": (
        "surgery: null\n",
        "recipe.yaml:4  surgery is not a key; allowed: model, data, budget, objective, adapter, "
        "optimizer, schedule, pruning, offload, engine, train, eval, checkpoint, track, export, output_dir",
    ),
    "names_of_other_tools": (
        "micro_batch_size: 3\nlr: 3\nnum_epochs: 3\nwarmup_ratio: 0.1\ncutoff_len: 1\n",
        "recipe.yaml:4  micro_batch_size is not a key.   It is called "
        "train.per_device_train_batch_size here\n"
        "recipe.yaml:5  lr is not a key.   It is called optimizer.learning_rate here\n"
        "recipe.yaml:6  num_epochs is not a key.   It is called budget.epochs here\n"
        "recipe.yaml:7  warmup_ratio is not a key.   It is called schedule.warmup_steps (below 1 it is "
        "a share of the budget) here\n"
        "recipe.yaml:8  cutoff_len is not a key.   It is called data.max_length here",
    ),
    "old_and_new_name": (
        "train: {gradient_checkpointing: true, activation_checkpointing: true}\n",
        "recipe.yaml:4  train.gradient_checkpointing is not a key.   It is called "
        "train.activation_checkpointing here",
    ),
    "unknown_choice": (
        "optimizer: adamv\n",
        f"recipe.yaml:4  optimizer.name is 'adamv'; allowed: {OPTIMIZERS}.   Did you mean adamw ?",
    ),
    "optimizer_of_transformers": (
        "optimizer: galore_adamw_layerwise\n",
        f"recipe.yaml:4  optimizer.name is 'galore_adamw_layerwise'; allowed: {OPTIMIZERS}.   "
        "It is called galore with optimizer.step_in_backward=true here",
    ),
    "optimizer_that_is_nearly_another": (
        "optimizer: Adam\n",
        f"recipe.yaml:4  optimizer.name is 'Adam'; allowed: {OPTIMIZERS}.   It is called adamw here",
    ),
    "keys_of_other_light_optimizers": (
        "optimizer: {name: galore, proj_type: std, galore_target: all, galore_layerwise: true}\n"
        "adapter: {rank: 8}\n",
        "recipe.yaml:4  optimizer.proj_type is not a key.   It is called optimizer.projection "
        "(the side follows from the shape) here\n"
        "recipe.yaml:4  optimizer.galore_target is not a key.   Leave it out: linear layers get the "
        "method, embeddings, head and norms AdamW\n"
        "recipe.yaml:4  optimizer.galore_layerwise is not a key.   It is called "
        "optimizer.step_in_backward here\n"
        "recipe.yaml:5  adapter.rank is not a key.   It is called adapter.r here",
    ),
    "schedule_free_with_a_schedule": (
        "optimizer: schedule_free_adamw\nschedule: cosine\n",
        "recipe.yaml:4  optimizer.name=schedule_free_adamw averages the weights in place of a falling rate, "
        "and schedule=cosine lowers it.   Set schedule=constant, or optimizer.name=adamw   "
        "(schedule.name: recipe.yaml:5)",
    ),
    "schedule_free_with_the_default_schedule": (
        "optimizer: schedule_free_adamw\n",
        "recipe.yaml:4  optimizer.name=schedule_free_adamw averages the weights in place of a falling rate, "
        "and schedule=rex lowers it.   Set schedule=constant, or optimizer.name=adamw",
    ),
    "unknown_adapter": (
        "adapter: full\n",
        "recipe.yaml:4  adapter.name is 'full'; allowed: lora, svfit, soka or peft, or adapter: null to "
        "train every weight",
    ),
    "unknown_objective": (
        "objective: kto\n",
        "recipe.yaml:4  objective.name is 'kto'; allowed: sft, dpo, sft_then_dpo, distill or "
        "your own as module:attribute",
    ),
    "two_stages_without_pairs": (
        "objective: sft_then_dpo\n",
        "recipe.yaml:4  objective=sft_then_dpo needs data.preferences, rows with prompt, chosen and rejected."
        "   For example data.preferences=pairs.jsonl, or objective=sft",
    ),
    "stored_teacher_without_top_k": (
        "objective: {name: distill, teacher: t, teacher_logits: stored}\n",
        "recipe.yaml:4  objective.teacher_logits=stored keeps the likeliest tokens, and objective.top_k=null "
        "keeps none.   Set objective.top_k=64, or objective.teacher_logits=online",
    ),
    "a_branch_that_cannot_be_kept": (
        "checkpoint: {keep_pre_decay: true}\n",
        "recipe.yaml:4  checkpoint.keep_pre_decay=true is for schedule=wsd, and schedule=rex has no such "
        "point.   Set schedule=wsd, or checkpoint.keep_pre_decay=false",
    ),
    "key_of_another_choice": (
        "schedule: {name: rex, power: 2}\n",
        "recipe.yaml:4  schedule.power is not a key of rex; polynomial has it.",
    ),
    "key_of_other_choices": (
        "optimizer: {name: lion_8bit, eps: 1e-8}\n",
        "recipe.yaml:4  optimizer.eps is not a key of lion_8bit; adamw, adamw_8bit, paged_adamw_8bit "
        "and 12 others have it.",
    ),
    "key_of_few_other_choices": (
        "optimizer: {name: adamw, density: 0.5, scale_front: true}\n",
        "recipe.yaml:4  optimizer.density is not a key of adamw; frugal has it.\n"
        "recipe.yaml:4  optimizer.scale_front is not a key of adamw; apollo, apollo_mini and q_apollo "
        "have it.",
    ),
    "section_is_a_number": (
        "train: 5\n",
        "recipe.yaml:4  train is 5; allowed: a mapping with batch_tokens, per_device_train_batch_size, "
        "gradient_accumulation_steps, activation_checkpointing, wta_crs_ratio, fused_ops, ...",
    ),
    "section_is_empty": (
        "train:\n  # seed: 3\n",
        "recipe.yaml:4  train is empty; leave the line out for the defaults, or give a mapping with "
        "batch_tokens, per_device_train_batch_size, gradient_accumulation_steps, "
        "activation_checkpointing, wta_crs_ratio, fused_ops, ...",
    ),
    "adapter_is_a_list": (
        "adapter: [1]\n",
        "recipe.yaml:4  adapter is [1]; allowed: text, null, a mapping with name, r, use_rslora, "
        "lora_alpha, lora_dropout, target_modules, ..., a mapping with name, r, energy, target_modules, "
        "exclude_modules, layers_to_transform or a mapping with name, peft_type, options, target_modules, "
        "exclude_modules, layers_to_transform",
    ),
    "text_for_a_number": (
        "train: {per_device_train_batch_size: many}\n",
        "recipe.yaml:4  train.per_device_train_batch_size is 'many'; allowed: auto or a whole number "
        "of at least 1",
    ),
    "number_for_a_switch": (
        "train: {fused_ops: 1}\n",
        "recipe.yaml:4  train.fused_ops is 1; allowed: true or false",
    ),
    "number_out_of_range": (
        "adapter: {r: 0}\n",
        "recipe.yaml:4  adapter.r is 0; allowed: a whole number of at least 1 and at most 4096",
    ),
    "fraction_for_a_whole_number": (
        "adapter: {r: 8.5}\n",
        "recipe.yaml:4  adapter.r is 8.5; allowed: a whole number of at least 1 and at most 4096",
    ),
    "not_a_number": (
        "optimizer: {learning_rate: .nan}\n",
        "recipe.yaml:4  optimizer.learning_rate is .nan; allowed: auto or a number above 0",
    ),
    "negative_rate": (
        "optimizer: {learning_rate: -1}\n",
        "recipe.yaml:4  optimizer.learning_rate is -1; allowed: auto or a number above 0",
    ),
    "betas_one": (
        "optimizer: {betas: [0.9]}\n",
        "recipe.yaml:4  optimizer.betas is [0.9]; allowed: a list of 2, each a number of at least 0 "
        "and below 1",
    ),
    "betas_out_of_range": (
        "optimizer: {betas: [0.9, 1.5]}\n",
        "recipe.yaml:4  optimizer.betas.1 is 1.5; allowed: a number of at least 0 and below 1",
    ),
    "unknown_start": (
        "adapter: {init_lora_weights: pizza}\n",
        "recipe.yaml:4  adapter.init_lora_weights is 'pizza'; allowed: true, gaussian, orthogonal, "
        "olora, pissa, corda, loftq, eva or pissa_niter_N.   Did you mean pissa ?",
    ),
    "rank_of_a_pattern": (
        "adapter: {rank_pattern: {q_proj: x}}\n",
        "recipe.yaml:4  adapter.rank_pattern.q_proj is 'x'; allowed: a whole number of at least 1",
    ),
    "every_is_a_fraction": (
        "eval: {every: 0.1}\n",
        "recipe.yaml:4  eval.every: 0.1 is not a number of steps such as 500, a share of the budget "
        "such as 10%, or a duration such as 5min.   Did you mean 10% ?",
    ),
    "every_is_too_much": (
        "eval: {every: 150%}\n",
        "recipe.yaml:4  eval.every: '150%' is not a number of steps such as 500, a share of the budget "
        "such as 10%, or a duration such as 5min",
    ),
    "several_problems": (
        "checkpoint: {every: soon,\n  kepe: 3}\ntrain:\n  seed: -1\n",
        "recipe.yaml:4  checkpoint.every: 'soon' is not a number of steps such as 500, a share of the "
        "budget such as 10%, or a duration such as 5min\n"
        "recipe.yaml:5  checkpoint.kepe is not a key.   Did you mean checkpoint.keep ?\n"
        "recipe.yaml:7  train.seed is -1; allowed: a whole number of at least 0",
    ),
    "unknown_tracker": (
        "track: {report_to: [wandb, mlflow]}\n",
        "recipe.yaml:4  track.report_to.1 is 'mlflow'; allowed: wandb, tensorboard or trackio",
    ),
    "empty_output_dir": (
        "output_dir:\n",
        "recipe.yaml:4  output_dir is null; allowed: text",
    ),
    "batch_twice": (
        "train:\n  batch_tokens: 100\n  per_device_train_batch_size: 2\n",
        "recipe.yaml:5  train.batch_tokens=100 and train.per_device_train_batch_size=2 exclude each "
        "other.   Keep one; the other is train.batch_tokens=auto or "
        "train.per_device_train_batch_size=auto   (train.per_device_train_batch_size: "
        "recipe.yaml:6)",
    ),
    "warmup_of_one_and_a_half": (
        "schedule: {warmup_steps: 1.5}\n",
        "recipe.yaml:4  schedule.warmup_steps is 1.5; allowed: a share of the budget below 1, or a "
        "whole number of steps",
    ),
    "orthogonal_needs_even": (
        "adapter: {init_lora_weights: orthogonal, r: 7}\n",
        "recipe.yaml:4  adapter.r=7 is odd, and adapter.init_lora_weights=orthogonal needs an even "
        "rank.   Take 8",
    ),
    "export_of_no_adapter": (
        "adapter: null\nexport: adapter\n",
        "recipe.yaml:5  export.final=adapter needs an adapter, and adapter=null trains every weight.   "
        "Set export.final=merged, or adapter=lora   (adapter: recipe.yaml:4)",
    ),
    "layers_of_an_expression": (
        "adapter:\n  target_modules: .*proj\n  layers_to_transform: [0]\n",
        "recipe.yaml:6  adapter.layers_to_transform needs adapter.target_modules as all-linear or a "
        "list of names, not as a regular expression.   Put the layers into the expression instead   "
        "(adapter.target_modules: recipe.yaml:5)",
    ),
    "given_twice": (
        "train:\n  seed: 1\n  seed: 2\n",
        "recipe.yaml:6  train.seed is given twice, first in line 5.   Remove one of them",
    ),
    "tab": (
        "train:\n\tseed: 1\n",
        "recipe.yaml:5  is indented with a tab; YAML allows only spaces.   Replace each tab by two",
    ),
    "unclosed": (
        "train: {seed: 1\n",
        "recipe.yaml:5  is not YAML: expected ',' or '}', but got '<stream end>', at: the end of the file",
    ),
    "unclosed_quote": (
        "track: 'x\n",
        "recipe.yaml:5  is not YAML: found unexpected end of stream, at: the end of the file",
    ),
    "python_object": (
        "track: !!python/object/apply:os.system [ls]\n",
        "recipe.yaml:4  the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed; a "
        "recipe has plain values only.   Remove it",
    ),
    "unknown_alias": (
        "track: *x\n",
        "recipe.yaml:4  found undefined alias 'x'.",
    ),
    "second_document": (
        "---\nmodel: n\n",
        "recipe.yaml:4  a second document starts here; a recipe is one document.   Remove the line ---",
    ),
}

WHOLE = {
    "a_second_moment_that_cannot_shrink": (
        "model: {model_name_or_path: m, dtype: bfloat16}\ndata: a\nbudget: 1h\n"
        "optimizer: adam_mini\nadapter: null\n",
        "recipe.yaml:1  model.dtype=bfloat16 and adapter=null train bfloat16 weights, and "
        "optimizer.name=adam_mini would keep a second moment in bfloat16, where it cannot shrink.   Set "
        "model.dtype=auto, or optimizer.name=adamw   (optimizer.name: recipe.yaml:4)",
    ),
    "rank_of_lora": (
        "model: m\ndata: a\nbudget: 1h\nrank: 8\n",
        "recipe.yaml:4  rank is not a key.   It is called adapter.r (optimizer.rank is for galore, apollo "
        "and their kin) here",
    ),
    "empty": (
        "",
        "recipe.yaml  is empty; a recipe has model, data and budget.   See shoestring new",
    ),
    "comments_only": (
        "# nothing\n",
        "recipe.yaml  is empty; a recipe has model, data and budget.   See shoestring new",
    ),
    "list": (
        "- a\n- b\n",
        "recipe.yaml:1  is a list; a recipe is a mapping such as model: ID.   See shoestring new",
    ),
    "one_word": (
        "hello\n",
        "recipe.yaml:1  is one value; a recipe is a mapping such as model: ID.   See shoestring new",
    ),
    "nothing_but_data": (
        "data: x\n",
        "recipe.yaml  model is missing.   Add a line such as   model: "
        "HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "recipe.yaml  budget is missing.   Add a line such as   budget: 2h",
    ),
    "model_is_a_list": (
        "data: a\nmodel: [1, 2]\nbudget: 1h\n",
        "recipe.yaml:2  model is [1, 2]; allowed: text, or a mapping with model_name_or_path, "
        "revision, dtype, load_in_4bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant, ...",
    ),
    "type_by_its_old_name": (
        "model: {model_name_or_path: m, torch_dtype: bfloat16}\ndata: a\nbudget: 1h\n",
        "recipe.yaml:1  model.torch_dtype is not a key.   It is called model.dtype here",
    ),
    "type_abbreviated": (
        "model: {model_name_or_path: m, dtype: bf16}\ndata: a\nbudget: 1h\n",
        "recipe.yaml:1  model.dtype is 'bf16'; allowed: auto, bfloat16 or float32.   Did you mean bfloat16 ?",
    ),
    "no_model_name": (
        "model: {dtype: auto}\ndata: a\nbudget: 1h\n",
        "recipe.yaml:1  model.model_name_or_path is missing.   Add model_name_or_path",
    ),
    "four_bits_of_everything": (
        "model:\n  model_name_or_path: m\n  load_in_4bit: true\ndata: a\nbudget: 1h\nadapter: null\n",
        "recipe.yaml:3  model.load_in_4bit=true needs an adapter: 4-bit weights cannot be trained.   "
        "Set adapter=lora, or model.load_in_4bit=false   (adapter: recipe.yaml:6)",
    ),
    "pissa_of_four_bits": (
        "model:\n"
        "  model_name_or_path: m\n"
        "  load_in_4bit: true\n"
        "data: a\n"
        "budget: 1h\n"
        "adapter: {init_lora_weights: pissa_niter_4}\n",
        "recipe.yaml:6  adapter.init_lora_weights=pissa_niter_4 needs weights that are not quantised, "
        "and model.load_in_4bit=true.   Set model.load_in_4bit=false, or "
        "adapter.init_lora_weights=olora   (model.load_in_4bit: recipe.yaml:3)",
    ),
    "loftq_of_four_bits": (
        "model:\n"
        "  model_name_or_path: m\n"
        "  load_in_4bit: true\n"
        "data: a\n"
        "budget: 1h\n"
        "adapter: {init_lora_weights: loftq}\n",
        "recipe.yaml:6  adapter.init_lora_weights=loftq quantises the weights itself and cannot start "
        "from model.load_in_4bit=true.   Set model.load_in_4bit=false, or "
        "adapter.init_lora_weights=true   (model.load_in_4bit: recipe.yaml:3)",
    ),
    "no_source": (
        "model: m\ndata: []\nbudget: 1h\n",
        "recipe.yaml:2  data.train is []; allowed: a path or hub id, a mapping with path, split, name, "
        "weight, format, columns, or a list of these",
    ),
    "source_without_path": (
        "model: m\ndata:\n  - a\n  - {paht: b}\nbudget: 1h\n",
        "recipe.yaml:4  data.train.1.path is missing.   Add path\n"
        "recipe.yaml:4  data.train.1.paht is not a key.   Did you mean data.train.1.path ?",
    ),
    "source_is_a_number": (
        "model: m\ndata: {train: [a, 5]}\nbudget: 1h\n",
        "recipe.yaml:2  data.train.1 is 5; allowed: a path or hub id or a mapping with path, split, "
        "name, weight, format, columns",
    ),
    "share_above_one": (
        "model: m\ndata: {train: a, eval: 1.5}\nbudget: 1h\n",
        "recipe.yaml:2  data.eval is 1.5; allowed: a share such as 0.02, a path or hub id, or a list "
        "of sources",
    ),
    "split_is_a_number": (
        "model: m\ndata: {train: a, eval: {path: x, split: 3}}\nbudget: 1h\n",
        "recipe.yaml:2  data.eval.0.split is 3; allowed: text or null",
    ),
    "column_typo": (
        "model: m\ndata: {train: a, columns: {promt: x}}\nbudget: 1h\n",
        "recipe.yaml:2  data.columns.promt is not a key.   Did you mean data.columns.prompt ?",
    ),
    "prompt_without_completion": (
        "model: m\ndata: {train: a, columns: {prompt: x}}\nbudget: 1h\n",
        "recipe.yaml:2  data.columns names prompt; allowed: prompt and completion, or messages, or "
        "text (system may join the first two).   For example {prompt: question, completion: answer}",
    ),
    "budget_without_unit": (
        "model: m\ndata: a\nbudget: 600\n",
        "recipe.yaml:3  budget.time: 600 is not a duration such as 90s, 5min, 1h30m, 3h or 2d.   Did "
        "you mean 600s ?",
    ),
    "budget_of_epochs": (
        "model: m\ndata: a\nbudget: 10 epochs\n",
        "recipe.yaml:3  budget.time: '10 epochs' is not a duration such as 90s, 5min, 1h30m, 3h or 2d. "
        "  Did you mean budget.epochs=10 ?",
    ),
    "budget_of_money": (
        "model: m\ndata: a\nbudget: 20 USD\n",
        "recipe.yaml:3  budget.time: '20 USD' is not a duration such as 90s, 5min, 1h30m, 3h or 2d.   "
        'Did you mean budget.cost="20 USD" ?',
    ),
    "budget_without_limit": (
        "model: m\ndata: a\nbudget: {device_memory: 8GB}\n",
        "recipe.yaml:3  budget has no limit; give at least one of time, cost, energy, tokens, steps, "
        "epochs.   For example budget.time=2h",
    ),
    "cost_without_price": (
        "model: m\ndata: a\nbudget: {cost: 20 USD}\n",
        "recipe.yaml:3  budget.cost=20 USD needs budget.price, what the machine costs an hour.   For "
        'example budget.price="2.49 USD/h"',
    ),
    "two_currencies": (
        "model: m\ndata: a\nbudget:\n  cost: 20 USD\n  price: 2 EUR/h\n",
        "recipe.yaml:4  budget.cost=20 USD and budget.price=2 EUR/h are in different currencies.   "
        "Give both in one   (budget.price: recipe.yaml:5)",
    ),
    "amounts_without_units": (
        "model: m\n"
        "data: a\n"
        "budget: {cost: 20, price: 2.49, energy: 3, device_memory: 16, time: 0s, tokens: 1.5, steps: "
        "-3}\n",
        "recipe.yaml:3  budget.time: '0s' is not above 0 and finite; allowed: a duration such as 90s, "
        "5min, 1h30m, 3h or 2d\n"
        "recipe.yaml:3  budget.cost: 20 is not an amount of money with its currency, such as 20 USD.   "
        "Did you mean 20 USD ?\n"
        "recipe.yaml:3  budget.price: 2.49 is not a price per hour such as 2.49 USD/h.   Did you mean "
        "2.49 USD/h ?\n"
        "recipe.yaml:3  budget.energy: 3 is not an amount of energy such as 500 Wh, 0.5 kWh or 2 MJ.   "
        "Did you mean 3 Wh ?\n"
        "recipe.yaml:3  budget.tokens: 1.5 is not a whole number above 0, such as 500, 20k, 2M or "
        "1.5e6\n"
        "recipe.yaml:3  budget.steps: -3 is not a whole number above 0, such as 500, 20k, 2M or 1.5e6\n"
        "recipe.yaml:3  budget.device_memory: 16 is not an amount of memory such as 16GB (10^9 bytes) "
        "or 16 GiB (2^30).   Did you mean 16 GB ?",
    ),
}

OVERRIDES = {
    "no_equals_sign": (
        ["foo"],
        "command line  'foo' is not an override; allowed: KEY=VALUE, such as optimizer.learning_rate=1e-4",
    ),
    "no_key": (
        ["=3"],
        "command line  '=3' is not an override; allowed: KEY=VALUE, such as optimizer.learning_rate=1e-4",
    ),
    "empty_part": (
        ["a..b=3"],
        "command line  'a..b=3' is not an override; allowed: KEY=VALUE, such as optimizer.learning_rate=1e-4",
    ),
    "bad_yaml": (
        ["adapter.r=["],
        "command line  'adapter.r=[': the value is not YAML.   Put it into quotes: adapter.r='\"...\"'",
    ),
    "key_of_no_adapter": (
        ["adapter=null", "adapter.r=8"],
        "command line  adapter.r needs an adapter, and adapter is null (command line).   Put "
        "adapter=lora before it",
    ),
    "foreign_name": (
        ["optimizer.lr=3"],
        "command line  optimizer.lr is not a key.   It is called optimizer.learning_rate here",
    ),
    "index_too_large": (
        ["data.train.3.weight=2"],
        "command line  data.train.3.weight is not a key: data.train is a list of 1; allowed: data.train.0",
    ),
    "no_index": (
        ["data.train.weight=2"],
        "command line  data.train.weight is not a key: data.train is a list of 1; allowed: data.train.0",
    ),
    "inside_a_value": (
        ["model.model_name_or_path.x=2"],
        "command line  model.model_name_or_path.x is not a key: model.model_name_or_path is m, which "
        "has no keys.",
    ),
    "null_model": (
        ["model="],
        "command line  model is empty; give text, or a mapping with model_name_or_path, revision, "
        "dtype, load_in_4bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant, ...",
    ),
    "bad_value": (
        ["eval.every=often"],
        "command line  eval.every: 'often' is not a number of steps such as 500, a share of the budget "
        "such as 10%, or a duration such as 5min",
    ),
    "batch_twice": (
        ["train.batch_tokens=9", "train.per_device_train_batch_size=3"],
        "command line  train.batch_tokens=9 and train.per_device_train_batch_size=3 exclude each "
        "other.   Keep one; the other is train.batch_tokens=auto or "
        "train.per_device_train_batch_size=auto",
    ),
}


def message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes, overrides: list[str]) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        load_recipe("recipe.yaml", overrides, env={})
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("case", AFTER)
def test_wrong_section(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = AFTER[case]
    assert message(tmp_path, monkeypatch, BASE + text, []) == expected


@pytest.mark.parametrize("case", WHOLE)
def test_wrong_recipe(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = WHOLE[case]
    assert message(tmp_path, monkeypatch, text, []) == expected


@pytest.mark.parametrize("case", OVERRIDES)
def test_wrong_override(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, expected = OVERRIDES[case]
    assert message(tmp_path, monkeypatch, BASE, overrides) == expected


def test_conflict_between_command_line_and_recipe_names_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = message(
        tmp_path, monkeypatch, BASE + "train: {batch_tokens: 9}\n", ["train.per_device_train_batch_size=3"]
    )
    assert text == (
        "recipe.yaml:4  train.batch_tokens=9 and train.per_device_train_batch_size=3 exclude each other.   "
        "Keep one; the other is train.batch_tokens=auto or train.per_device_train_batch_size=auto   "
        "(train.per_device_train_batch_size: command line)"
    )


def test_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(tmp_path, monkeypatch, b"model: m\ndata: caf\xe9.jsonl\n", []) == (
        "recipe.yaml:2  byte 0xe9 is not UTF-8.   Save the file with the encoding UTF-8"
    )


def test_control_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(tmp_path, monkeypatch, "model: m\ndata: \x00\n", []) == (
        "recipe.yaml:2  character U+0000 is not allowed in YAML."
    )


def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(tmp_path, monkeypatch, "#" * (2**20 + 1), []) == (
        "recipe.yaml  is 1,048,577 bytes long; a recipe has at most 1,048,576.   Is it a data file?"
    )


def test_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(tmp_path, monkeypatch, "model: " + "[" * 100_000, []) == (
        "recipe.yaml:1  is nested more than 32 deep; a recipe needs at most 5."
    )


def test_aliases_that_multiply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    assert message(tmp_path, monkeypatch, "\n".join(rows), []) == (
        "recipe.yaml:1  the recipe has more than 20,000 values, aliases written out."
    )


def test_alias_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(tmp_path, monkeypatch, "model: m\ndata: &d [*d]\n", []) == (
        "recipe.yaml:2  an alias refers to a value that contains it."
    )


def test_many_problems_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(tmp_path, monkeypatch, BASE + "".join(f"zz{n}qq: 1\n" for n in range(30)), [])
    assert len(text.splitlines()) == 21
    assert text.splitlines()[-1] == "recipe.yaml     has 10 more problems."


def test_missing_file_names_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value) == (
        "recipe.yaml  no such file, and no preset has this name.   See shoestring new for presets"
    )
    Path("recipe.yml").write_text(BASE)
    with pytest.raises(UserError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value) == (
        "recipe.yaml  no such file, and no preset has this name.   Did you mean recipe.yml ?"
    )
    with pytest.raises(UserError) as caught:
        load_recipe("cpu-dmeo")
    assert (
        str(caught.value) == "cpu-dmeo  no such file, and no preset has this name.   Did you mean cpu-demo ?"
    )


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(UserError) as caught:
        load_recipe("here")
    assert str(caught.value) == "here  is a folder; a recipe is a YAML file.   For example here/recipe.yaml"
