"""Pairs of answers: read, written as one row of tokens, cut, held out, cached, collated, ordered, shown."""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from shoestring.data import Order, TokenRows, collate, describe, eval_batches, make_rows, prepare
from shoestring.data.encode import Encoded
from shoestring.data.preferences import choose_pair_format, cut_prompt, normalise_pair
from shoestring.data.raw import RowProblem
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import Columns, DataConfig
from test_data_mask import CHATML, LLAMA3, make_tokenizer

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(CHATML)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, tokenizer: Any, cache: Path | None = None, **given: Any) -> Any:
    data = DataConfig.model_validate({"train": str(path), **given})
    return prepare(data, tokenizer, seed=1, cache_dir=cache or path.parent / "cache", preferences=True)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {k}?", "chosen": f"Yes {k}.", "rejected": f"No {k}!"} for k in range(count)]


def pair(row: dict[str, Any], **given: Any) -> tuple[list[str], list[str], list[str]]:
    format = choose_pair_format([row], **({"format": None, "columns": None, "label": "a.jsonl"} | given))
    found = normalise_pair(row, format)
    return tuple([m["content"] for m in part] for part in (found.prompt, found.chosen, found.rejected))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, (["q"], ["good"], ["bad"])),
        ({"question": "q", "chosen": "good", "rejected": "bad"}, (["q"], ["good"], ["bad"])),
        (
            {"prompt": "q", "system": "Be kind.", "chosen": "good", "rejected": "bad"},
            (["Be kind.", "q"], ["good"], ["bad"]),
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (["q"], ["good"], ["bad"])),
        (
            {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": "bad"},
            (["q", "good", "q"], ["good"], ["bad"]),
        ),
        # whole conversations, with a prompt beside them or without
        (
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            (["q"], ["good"], ["bad"]),
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            (["q", "good", "q"], ["good"], ["bad"]),
        ),
        # they part at the first answer, and go on for different numbers of turns
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]},
            (["q"], ["good", "q", "good"], ["bad"]),
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD]},
            (["q"], ["good", "q", "good"], ["good"]),
        ),
        # what follows the last answer carries no loss
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, (["q"], ["good"], ["bad"])),
    ],
)
def test_columns_become_a_pair(row: dict[str, Any], expected: Any) -> None:
    assert pair(row) == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "chosen": "good"}, "have no `rejected`"),
        ({"prompt": "q", "chosen": None, "rejected": "bad"}, "have no `chosen`"),
        ({"prompt": "q", "chosen": "good", "rejected": " \n"}, "have an empty `rejected`"),
        ({"prompt": "q", "chosen": "good", "rejected": 3}, "have a `rejected` that is not text: int"),
        (
            {"prompt": "q", "chosen": [{"role": "assistant", "content": ""}], "rejected": [BAD]},
            "have an empty message: message 1, assistant",
        ),
        (
            {"prompt": "q", "chosen": "same", "rejected": "same"},
            "have the same `chosen` and `rejected`",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "have the same `chosen` and `rejected`"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
            "have prompts that differ",
        ),
        (
            {
                "chosen": [USER, GOOD, USER, GOOD],
                "rejected": [USER, GOOD, {"role": "user", "content": "other"}, BAD],
            },
            "have prompts that differ",
        ),
        (
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": "bad"},
            "have a whole conversation on one side and an answer on the other",
        ),
        ({"prompt": "", "chosen": "good", "rejected": "bad"}, "have an empty `prompt`"),
        (
            {"prompt": [USER, GOOD], "chosen": "good", "rejected": "bad"},
            "have a `prompt` that does not end before the assistant's turn",
        ),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "have no assistant turn in `chosen`"),
        ({"chosen": "good", "rejected": "bad", "prompt": None}, "have a `prompt` that is not text: NoneType"),
        (["chosen", "rejected"], "are not objects with columns: list"),
    ],
)
def test_rows_that_are_no_pairs(row: Any, problem: str) -> None:
    present = (
        {"prompt": "q", "chosen": "a", "rejected": "b"} if "prompt" in row else {"chosen": [], "rejected": []}
    )
    format = choose_pair_format([present], format=None, columns=None, label="a.jsonl")
    with pytest.raises(RowProblem) as caught:
        normalise_pair(row, format)
    assert str(caught.value) == problem


def test_answers_need_a_prompt() -> None:
    row = {"chosen": "good", "rejected": "bad"}
    with pytest.raises(RowProblem, match="have answers and no prompt before them"):
        pair(row)


def test_detection_and_its_errors() -> None:
    row = {"messages": [USER, GOOD], "prompt": "q", "chosen": "good", "rejected": "bad"}
    chosen = choose_pair_format([row, {"prompt": "q"}], format=None, columns=None, label="a.jsonl")
    assert chosen.name == "preference"
    assert chosen.why == "`chosen` and `rejected` in 1 of the first 2 rows"
    assert pair({"ask": "q", "chosen": "good", "rejected": "bad"}, columns=Columns(prompt="ask"))[0] == ["q"]
    with pytest.raises(UserError) as caught:
        pair({"question": "q", "answer": "a"})
    assert str(caught.value) == (
        "a.jsonl  has the columns 'question', 'answer'; dpo trains on pairs of answers: chosen and "
        "rejected.\n"
        "  Name yours: data.columns={prompt: ..., chosen: ..., rejected: ...}; to train on single answers: "
        "objective=sft"
    )
    with pytest.raises(UserError, match=r"data.format=text holds no pairs of answers"):
        pair(row, format="text")
    with pytest.raises(
        UserError, match=r"data.columns names completion, which a pair of answers does not have"
    ):
        pair(row, columns=Columns(prompt="prompt", completion="chosen"))
    with pytest.raises(
        UserError, match=r"no column 'promt' for the prompt of format preference(.|\n)*'prompt' \?"
    ):
        pair(row, columns=Columns(prompt="promt"))


def test_sft_refuses_pairs_and_says_what_to_type(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(4))
    for given in ({}, {"format": "preference"}):
        data = DataConfig.model_validate({"train": str(path), **given})
        with pytest.raises(UserError) as caught:
            prepare(data, tokenizer, seed=1, cache_dir=tmp_path / "cache")
        assert str(caught.value) == (
            f"{path}  holds preferences (columns chosen, rejected), which sft does not train on.\n"
            "  To train on the pairs: objective=dpo\n"
            "  To train on the chosen answers: data.columns={prompt: prompt, completion: chosen}"
        )


def test_a_pair_is_one_row_of_two_conversations(tmp_path: Path, tokenizer: Any) -> None:
    prepared = read(jsonl(tmp_path / "a.jsonl", numbered(20)), tokenizer, assistant_only_loss=False)
    rows = prepared.train
    assert rows.second is not None
    assert len(rows) + len(prepared.eval) == 20
    for index in range(len(rows)):
        sides = rows.sequences(index)
        texts = [tokenizer.decode(tokens) for tokens, _ in sides]
        number = texts[0].split("Question ")[1].split("?")[0]
        prompt = f"<|im_start|>user\nQuestion {number}?<|im_end|>\n<|im_start|>assistant\n"
        assert texts == [f"{prompt}Yes {number}.<|im_end|>\n", f"{prompt}No {number}!<|im_end|>\n"]
        answers = [tokenizer.decode(tokens[trained]) for tokens, trained in sides]
        assert answers == [f"Yes {number}.<|im_end|>", f"No {number}!<|im_end|>"]
        assert rows.trained_counts[index] == sum(trained.sum() for _, trained in sides)
    assert prepared.eval_references[0].startswith("Yes ")
    assert prepared.eval_prompts[0][-1]["content"].startswith("Question ")


def test_earlier_turns_of_the_assistant_are_not_scored(tmp_path: Path, tokenizer: Any) -> None:
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    path = jsonl(
        tmp_path / "a.jsonl", [row, row | {"chosen": [USER, GOOD, USER, {**GOOD, "content": "best"}]}]
    )
    rows = read(path, tokenizer).train
    answers = [tokenizer.decode(tokens[trained]) for tokens, trained in rows.sequences(0)]
    assert answers == ["good<|im_end|>", "bad<|im_end|>"]


def test_bad_rows_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*numbered(6), {"prompt": "q", "chosen": "a"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    report = read(path, tokenizer, on_bad_row="skip").report
    assert report.pairs
    assert report.lines()[:3] == [
        f"train  {path}: 6 of 8 rows, format preference (`chosen` and `rejected` in 7 of the first 8 rows)",
        f"  1 of 8 rows have no `rejected`: {path}:7",
        f"  1 of 8 rows have the same `chosen` and `rejected`: {path}:8",
    ]
    assert report.lines()[3].startswith("5 pairs to train on, ")
    with pytest.raises(UserError, match=r"1 of 8 rows have no `rejected`"):
        read(path, tokenizer)


def test_texts_that_a_template_makes_equal_are_no_pair(tmp_path: Path) -> None:
    rows = [*numbered(3), {"prompt": "q", "chosen": "a", "rejected": " a "}]  # Llama's template strips
    report = read(jsonl(tmp_path / "a.jsonl", rows), make_tokenizer(LLAMA3), on_bad_row="skip").report
    assert "have a chosen and a rejected answer of the same tokens" in report.sources[0].dropped


def test_the_prompt_is_cut_at_its_left(tmp_path: Path, tokenizer: Any) -> None:
    long = {"prompt": "word " * 60, "chosen": "short", "rejected": "also short"}
    full = {"prompt": "q", "chosen": "short", "rejected": "long " * 60}
    path = jsonl(tmp_path / "a.jsonl", [*numbered(3), long, full])
    uncut = read(path, tokenizer)
    whole = next(k for k in range(len(uncut.train)) if uncut.train.second[k] > 60)
    assert uncut.report.truncated_rows == 0
    prepared = read(path, tokenizer, max_length=60)
    report = prepared.report
    assert report.truncated_rows == 1
    assert "  1 rows cut to 60 tokens, at the start of their prompts" in report.lines()
    (reason,) = report.sources[0].dropped
    assert reason == "have answers that leave no room for a prompt within 60 tokens"
    assert report.sources[0].dropped[reason].examples[0].startswith(f"{path}:5 (")
    (index,) = [k for k in range(len(prepared.train)) if prepared.train.lengths[k] > 100]
    assert max(len(tokens) for tokens, _ in prepared.train.sequences(index)) == 60
    for cut, original in zip(prepared.train.sequences(index), uncut.train.sequences(whole), strict=True):
        assert np.array_equal(cut[0], original[0][-len(cut[0]) :])
        assert cut[1].sum() == original[1].sum()
    with pytest.raises(UserError, match=r"2 of 5 rows are longer than data.max_length=60"):
        read(path, tokenizer, max_length=60, on_long_row="error")
    assert read(path, tokenizer, max_length=60, on_long_row="skip").report.rows_dropped == 2


@pytest.mark.parametrize("seed", range(20))
def test_cuts_by_their_definition(seed: int) -> None:
    draw = random.Random(seed)
    prompt, first, second = draw.randint(1, 9), draw.randint(1, 6), draw.randint(1, 6)
    bos = draw.choice([None, 0])
    tokens = [*range(prompt), *range(100, 100 + first), *range(prompt), *range(200, 200 + second)]
    whole = Encoded(np.array(tokens, np.int32), np.array(tokens) >= 100, prompt + first)
    limit = draw.randint(1, prompt + max(first, second) - 1)
    cut = cut_prompt(whole, limit, bos)
    room = limit - max(first, second)
    if room < 1:
        assert cut is None
        return
    assert cut is not None
    kept = (
        [0, *range(prompt - room + 1, prompt)] if bos == 0 and room > 1 else [*range(prompt - room, prompt)]
    )
    assert cut.tokens.tolist() == [*kept, *range(100, 100 + first), *kept, *range(200, 200 + second)]
    assert cut.second == room + first
    assert cut.trained.tolist() == (cut.tokens >= 100).tolist()


def test_all_pairs_of_a_prompt_are_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": f"Question {k // 4}?", "chosen": f"Yes {k}.", "rejected": f"No {k}!"} for k in range(80)
    ]
    prepared = read(jsonl(tmp_path / "a.jsonl", rows), tokenizer, eval=0.2)
    assert (len(prepared.train), len(prepared.eval)) == (64, 16)

    def prompts(part: TokenRows) -> set[str]:
        return {tokenizer.decode(part.row(k)[0]).split("?")[0] for k in range(len(part))}

    assert not prompts(prepared.train) & prompts(prepared.eval)
    single = read(jsonl(tmp_path / "b.jsonl", rows[:4]), tokenizer)
    assert "nothing is held out: all training rows have the same prompt" in single.report.notes


def test_the_cache_keeps_pairs_apart_from_rows(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row | {"completion": row["chosen"]} for row in numbered(12)])
    first = read(path, tokenizer)
    again = read(path, tokenizer)
    assert not first.report.cache_hit
    assert again.report.cache_hit
    assert again.report.pairs
    for name in ("tokens", "trained", "offsets", "second"):
        assert np.array_equal(getattr(first.train, name), getattr(again.train, name))
    assert isinstance(again.train.second, np.memmap)
    data = DataConfig.model_validate(
        {"train": str(path), "columns": {"prompt": "prompt", "completion": "chosen"}}
    )
    plain = prepare(data, tokenizer, seed=1, cache_dir=tmp_path / "cache")
    assert plain.train.second is None
    sent = pickle.loads(pickle.dumps(again.train.part(2, 5)))
    assert np.array_equal(sent.second, again.train.second[2:5])
    assert np.array_equal(pickle.loads(pickle.dumps(again.train)).second, first.train.second)


def rows_of(lengths: list[tuple[int, int, int]]) -> TokenRows:
    """(prompt, chosen, rejected) lengths; row r's tokens are 10 r, its answers 10 r + 1 and 10 r + 2."""
    tokens, trained, second = [], [], []
    for row, (prompt, chosen, rejected) in enumerate(lengths):
        parts = [[10 * row] * prompt, [10 * row + 1] * chosen, [10 * row] * prompt, [10 * row + 2] * rejected]
        tokens.append(np.concatenate([np.array(part, np.int32) for part in parts]))
        trained.append(tokens[-1] % 10 > 0)
        second.append(prompt + chosen)
    return make_rows(tokens, trained, second=second)


def test_packed_collate() -> None:
    batch = collate(rows_of([(2, 1, 2), (1, 2, 1)]), [1, 0], packed=True)
    assert batch.segments == (0, 3, 5, 8, 12)
    assert batch.input_ids.tolist() == [[10, 11, 11, 10, 12, 0, 0, 1, 0, 0, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3]]
    assert batch.labels.tolist() == [11, 11, 12, 1, 2, 2]
    assert batch.targets.tolist() == [0, 1, 3, 6, 9, 10]
    assert batch.sequence_of_target().tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.last_positions().tolist() == [2, 4, 7, 11]
    assert (batch.pairs, batch.rows, batch.n_tokens) == (2, [1, 0], 12)
    assert batch.to("cpu").pairs == 2


def test_padded_collate() -> None:
    batch = collate(rows_of([(2, 1, 2), (1, 2, 1)]), [1, 0], packed=False)
    assert batch.input_ids.tolist() == [[10, 11, 11, 0], [10, 12, 0, 0], [0, 0, 1, 0], [0, 0, 2, 2]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [11, 11, 12, 1, 2, 2]
    assert batch.sequence_of_target().tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.last_positions().tolist() == [2, 5, 10, 15]
    assert (batch.pairs, batch.n_tokens) == (2, 12)


@pytest.mark.parametrize("packed", [True, False])
def test_no_pairs_and_plain_rows(packed: bool) -> None:
    empty = collate(rows_of([(2, 1, 2)]), [], packed=packed)
    assert (empty.pairs, len(empty.labels), len(empty.sequence_of_target())) == (0, 0, 0)
    plain = make_rows([np.arange(4, dtype=np.int32)] * 2, [np.arange(4) > 1] * 2)
    batch = collate(plain, [0, 1], packed=packed)
    assert batch.pairs == 0
    assert batch.sequence_of_target().tolist() == [0, 0, 1, 1]


def test_what_an_objective_adds_moves_with_the_batch() -> None:
    batch = collate(rows_of([(2, 1, 2)]), [0], packed=True)
    batch.extra["reward"] = torch.tensor([2.0])
    assert batch.to("meta").extra["reward"].device.type == "meta"
    assert batch.extra["reward"].device.type == "cpu"


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_keep_their_size(packed: bool) -> None:
    draw = random.Random(0)
    lengths = [(draw.randint(1, 30), draw.randint(1, 60), draw.randint(1, 60)) for _ in range(150)]
    rows = rows_of(lengths)
    order = Order(rows, seed=0, batch_tokens=2000, micro_tokens=500, packed=packed)
    batches = [b for k in range(order.steps_per_epoch) for b in order.step(k).micro_batches]
    assert sorted(row for batch in batches for row in batch) == list(range(150))
    batches += eval_batches(rows, micro_tokens=500, packed=packed)
    sizes = [collate(rows, batch, packed=packed).input_ids.numel() for batch in batches]
    assert max(sizes) <= 500
    worst = order.longest_step()
    assert collate(rows, worst.micro_batches[0], packed=packed).input_ids.numel() >= 0.95 * max(sizes)
    assert sum(order.step(k).tokens for k in range(order.steps_per_epoch)) == len(rows.tokens)


def test_check_shows_both_answers_and_the_prompt_once(tmp_path: Path, tokenizer: Any) -> None:
    prepared = read(jsonl(tmp_path / "a.jsonl", numbered(8)), tokenizer)
    console = Console(file=io.StringIO(), width=120)
    console.print(describe(prepared, tokenizer, samples=1))
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "7 pairs of answers to train on, 1 held out" in shown
    number = tokenizer.decode(prepared.train.row(0)[0]).split("Question ")[1].split("?")[0]
    assert shown.count(f"Question {number}?") == 1
    lines = [line for line in shown.splitlines() if "chosen " in line or "rejected " in line]
    assert any(f"Yes {number}." in line and "chosen" in line for line in lines)
    assert any(f"No {number}!" in line and "rejected" in line for line in lines)
