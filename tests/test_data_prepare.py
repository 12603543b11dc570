"""From files to rows: counting what is left out, limits, the held-out split, the cache, and what is shown."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from shoestring.data import describe, prepare
from shoestring.data.cache import code_version
from shoestring.data.report import DataReport
from shoestring.data.split import held_out
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import DataConfig
from test_data_mask import CHATML, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(CHATML)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def config(*train: Any, **given: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"train": [t if isinstance(t, dict) else str(t) for t in train], **given}
    )


def qa(path: Path, count: int, start: int = 0, answer: str = "This is answer {}.") -> Path:
    rows = [{"question": f"Question {k}?", "answer": answer.format(k)} for k in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(rows.row(index)[0]) for index in range(len(rows))]


def test_rows_split_and_report(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = qa(tmp_path / "a.jsonl", 200)
    prepared = prepare(config(path, eval=0.1), tokenizer, seed=1, cache_dir=cache)
    report = prepared.report
    assert (len(prepared.train), len(prepared.eval)) == (180, 20) == (report.train_rows, report.eval_rows)
    assert texts(prepared.train, tokenizer)[0].startswith("<|im_start|>user\nQuestion ")
    assert report.train_tokens == len(prepared.train.tokens)
    assert report.trained_tokens == int(prepared.train.trained.sum())
    assert 0 < report.trained_share < 1
    assert not report.cache_hit
    assert report.sources[0].format == "question_answer"
    assert len(prepared.eval_prompts) == len(prepared.eval_references) == 20
    assert prepared.eval_prompts[0][-1]["role"] == "user"
    number = re.findall(r"\d+", prepared.eval_prompts[0][-1]["content"])[0]
    assert prepared.eval_references[0] == f"This is answer {number}."
    held = texts(prepared.eval, tokenizer)
    assert any(f"Question {number}?" in text for text in held)
    assert report.lines()[0] == (
        f"train  {path}: 200 of 200 rows, format question_answer (`question` and `answer` in 200 of "
        "the first 200 rows)"
    )


def test_the_split_depends_on_seed_and_content_alone(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = qa(tmp_path / "a.jsonl", 100)
    lines = path.read_text().splitlines()
    held = set(texts(prepare(config(path), tokenizer, seed=1, cache_dir=cache).eval, tokenizer))
    other = set(texts(prepare(config(path), tokenizer, seed=2, cache_dir=cache).eval, tokenizer))
    assert held != other
    same = config(path, seed=1)
    assert set(texts(prepare(same, tokenizer, seed=2, cache_dir=cache).eval, tokenizer)) == held
    path.write_text("\n".join(reversed(lines)))
    assert set(texts(prepare(config(path), tokenizer, seed=1, cache_dir=cache).eval, tokenizer)) == held


def test_duplicates_stay_on_one_side(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = qa(tmp_path / "a.jsonl", 60)
    path.write_text(path.read_text() * 3)
    prepared = prepare(config(path, eval=0.2), tokenizer, seed=1, cache_dir=cache)
    train, held = set(texts(prepared.train, tokenizer)), set(texts(prepared.eval, tokenizer))
    assert not train & held
    assert len(prepared.eval) == 36
    assert len({str(prompt) for prompt in prepared.eval_prompts}) == len(prepared.eval_prompts) == 12


def test_progress_is_told(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    told: list[int] = []
    path = qa(tmp_path / "a.jsonl", 4500)
    prepare(config(path, path), tokenizer, seed=1, cache_dir=cache, progress=told.append)
    assert told == [2000, 4000, 4500, 6500, 8500, 9000]


def test_held_out_shares() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    assert held_out(hashes, 0.05).sum() == 50
    assert held_out(hashes, 0.05, at_most=7).sum() == 7
    assert held_out(hashes[:10], 0.02).sum() == 1
    assert held_out(hashes[:1], 0.5).sum() == 0
    assert held_out(np.array([5, 5, 5], np.uint64), 0.5).sum() == 0
    # One content has nearly all rows: it stays in training.
    assert held_out(np.array([1] * 98 + [7, 9], np.uint64), 0.02).tolist() == [False] * 98 + [True] * 2
    assert held_out(np.array([1, 1, 1, 2, 2], np.uint64), 0.1).tolist() == [False] * 3 + [True] * 2


def test_nothing_to_hold_out(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    prepared = prepare(config(qa(tmp_path / "a.jsonl", 1)), tokenizer, seed=1, cache_dir=cache)
    assert (len(prepared.train), len(prepared.eval), prepared.eval_prompts) == (1, 0, [])
    assert "nothing is held out: all training rows are the same" in prepared.report.notes


def test_evaluation_sources_of_their_own(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    train = qa(tmp_path / "a.jsonl", 20)
    held = qa(tmp_path / "b.jsonl", 5, start=18)
    prepared = prepare(config(train, eval=str(held)), tokenizer, seed=1, cache_dir=cache)
    assert (len(prepared.train), len(prepared.eval)) == (20, 5)
    assert prepared.report.notes == ["2 of 5 evaluation rows are also in the training rows"]
    assert [source.role for source in prepared.report.sources] == ["train", "eval"]


def test_mixtures_keep_source_and_weight(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    first, second = qa(tmp_path / "a.jsonl", 30), tmp_path / "b.jsonl"
    second.write_text("".join(json.dumps({"text": f"words {k}"}) + "\n" for k in range(20)))
    data = config({"path": str(first), "weight": 0.3}, second)
    prepared = prepare(data, tokenizer, seed=1, cache_dir=cache)
    again = prepare(data, tokenizer, seed=1, cache_dir=cache)
    for given in (prepared, again):
        assert given.train.weights == (0.3, 1.0)
        assert {0, 1} == set(given.train.source.tolist())
    assert [source.format for source in prepared.report.sources] == ["question_answer", "text"]


BAD = (
    '{"messages": [{"role": "user", "content": "a"}]}\n'
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    '{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}\n'
    "{not json}\n"
    '{"messages": [{"role": "user", "content": "c"}]}\n'
)


def test_bad_rows_are_an_error_with_their_places(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(BAD)
    with pytest.raises(UserError) as caught:
        prepare(config(path), tokenizer, seed=1, cache_dir=cache)
    assert str(caught.value) == (
        f"{path}  2 of 5 rows have no assistant turn: {path}:1, {path}:5\n"
        f"{path}  1 of 5 rows are not valid JSON: {path}:4 (Expecting property name enclosed in "
        "double quotes at column 2)\n"
        "  Skip them with data.on_bad_row=skip"
    )


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(BAD)
    report = prepare(config(path, on_bad_row="skip"), tokenizer, seed=1, cache_dir=cache).report
    assert (report.rows_read, report.rows_dropped) == (5, 3)
    dropped = {reason: (d.count, d.examples) for reason, d in report.sources[0].dropped.items()}
    assert dropped["have no assistant turn"] == (2, [f"{path}:1", f"{path}:5"])
    assert f"  2 of 5 rows have no assistant turn: {path}:1, {path}:5" in report.lines()


def test_no_row_is_good(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 3)
    with pytest.raises(UserError) as caught:
        prepare(config(path, on_bad_row="skip"), tokenizer, seed=1, cache_dir=cache)
    assert str(caught.value) == (
        f"{path}  none of 3 rows can be used: 3 have no assistant turn.\n  shoestring check RECIPE"
    )
    path.write_text("")
    with pytest.raises(UserError) as caught:
        prepare(config(path), tokenizer, seed=1, cache_dir=cache)
    assert str(caught.value) == f"{path}  has no rows: the file is empty"


def test_a_template_that_refuses_every_row(tmp_path: Path, cache: Path) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        UserError, match=r"3 of 3 rows are refused by the chat template: .*:1 \(System role not"
    ):
        prepare(config(qa(tmp_path / "a.jsonl", 3)), make_tokenizer(template), seed=1, cache_dir=cache)


def test_system_prompt_where_a_row_has_none(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    pair = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "system", "content": "Own."}, *pair]}, {"messages": pair}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    data = config(path, system_prompt="Given.")
    prepared = prepare(data, tokenizer, seed=1, cache_dir=cache)
    every = texts(prepared.train, tokenizer) + texts(prepared.eval, tokenizer)
    assert {text.split("<|im_end|>")[0] for text in every} == {
        "<|im_start|>system\nOwn.",
        "<|im_start|>system\nGiven.",
    }


def long_rows(path: Path) -> Path:
    rows = [
        {"question": "Hi", "answer": "short"},
        {"question": "Hi", "answer": "long " * 60},
        {"question": "long " * 60, "answer": "short"},
        {"question": "Hello", "answer": "short"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_rows_are_cut_at_the_end(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = long_rows(tmp_path / "a.jsonl")
    prepared = prepare(config(path, max_length=40), tokenizer, seed=1, cache_dir=cache)
    report = prepared.report
    assert report.truncated_rows == 1
    assert max([*prepared.train.lengths, *prepared.eval.lengths]) == 40
    (reason,) = report.sources[0].dropped
    assert reason == "have no trained token within the first 40"
    assert report.sources[0].dropped[reason].examples[0].startswith(f"{path}:3 (")
    cut = next(t for t in texts(prepared.train, tokenizer) + texts(prepared.eval, tokenizer) if "long" in t)
    assert cut.startswith("<|im_start|>user\nHi<|im_end|>")
    assert prepare(config(path), tokenizer, seed=1, cache_dir=cache, max_length=40).report.truncated_rows == 1
    assert prepare(config(path), tokenizer, seed=1, cache_dir=cache).report.truncated_rows == 0


def test_long_rows_are_skipped_or_an_error(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = long_rows(tmp_path / "a.jsonl")
    report = prepare(
        config(path, max_length=40, on_long_row="skip"), tokenizer, seed=1, cache_dir=cache
    ).report
    assert report.sources[0].dropped["are longer than 40 tokens"].count == 2
    with pytest.raises(UserError) as caught:
        prepare(config(path, max_length=40, on_long_row="error"), tokenizer, seed=1, cache_dir=cache)
    longest = re.search(r"longest (\d+)", str(caught.value))
    assert longest is not None
    assert str(caught.value) == (
        f"{path}  2 of 4 rows are longer than data.max_length=40 (longest {longest[1]}: {path}:3).\n"
        f"  data.max_length={longest[1]}, or data.on_long_row=truncate, or skip"
    )


def test_rows_without_a_trained_token(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": "a", "weight": weight}]
        for k, weight in enumerate([1, 1, 0])
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    report = prepare(config(path, on_bad_row="skip"), tokenizer, seed=1, cache_dir=cache).report
    assert report.sources[0].dropped["have no trained token"].count == 1
    path.write_text(json.dumps({"messages": rows[2]}) + "\n")
    with pytest.raises(UserError, match=r"none of 1 rows can be used: 1 have no trained token"):
        prepare(config(path, on_bad_row="skip"), tokenizer, seed=1, cache_dir=cache)


def test_the_cache_is_hit_and_equal(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    data = config(qa(tmp_path / "a.jsonl", 50))
    first = prepare(data, tokenizer, seed=1, cache_dir=cache)
    second = prepare(data, tokenizer, seed=1, cache_dir=cache)
    assert second.report.cache_hit
    assert isinstance(second.train.tokens, np.memmap)
    for name in ("tokens", "trained", "offsets", "trained_counts", "source", "lengths"):
        assert np.array_equal(getattr(first.train, name), getattr(second.train, name))
        assert np.array_equal(getattr(first.eval, name), getattr(second.eval, name))
    assert first.eval_prompts == second.eval_prompts
    assert first.report.sources == second.report.sources
    assert second.report.lines()[-1].endswith("rows held out; from the cache")
    assert DataReport.from_json(json.loads(json.dumps(second.report.to_json()))) == second.report
    assert [entry.name for entry in cache.iterdir()] == [Path(str(second.report.cache_path)).name]


def test_what_makes_another_cache(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = qa(tmp_path / "a.jsonl", 50)
    prepare(config(path), tokenizer, seed=1, cache_dir=cache)

    def hit(data: DataConfig, other: Any = tokenizer, seed: int = 1) -> bool:
        return prepare(data, other, seed=seed, cache_dir=cache).report.cache_hit

    assert hit(config(path))
    assert hit(config(path, packing=True, num_workers=2))
    assert not hit(config(path, assistant_only_loss=False))
    assert not hit(config(path, max_length=30))
    assert not hit(config(path), seed=2)
    assert not hit(config(path), make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>")))
    qa(path, 51)
    assert not hit(config(path))


def test_other_code_makes_another_cache(
    tmp_path: Path, cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(qa(tmp_path / "a.jsonl", 5))
    prepare(data, tokenizer, seed=1, cache_dir=cache)
    assert len(code_version()) == 16
    monkeypatch.setattr("shoestring.data.prepared.code_version", lambda: "another")
    assert not prepare(data, tokenizer, seed=1, cache_dir=cache).report.cache_hit


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "index", "empty", "file"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, cache: Path, tokenizer: Any, damage: str) -> None:
    data = config(qa(tmp_path / "a.jsonl", 50))
    first = prepare(data, tokenizer, seed=1, cache_dir=cache)
    wanted = np.array(first.train.tokens)
    folder = Path(str(first.report.cache_path))
    victim = folder / "train-tokens.npy"
    content = bytearray(victim.read_bytes())
    match damage:
        case "cut":
            victim.write_bytes(content[:-10])
        case "flip":
            content[-10] ^= 1
            victim.write_bytes(content)
        case "gone":
            victim.unlink()
        case "index":
            (folder / "index.json").write_text("[")
        case "empty":
            (folder / "index.json").write_text("{}")
            victim.unlink()
        case "file":
            for entry in folder.iterdir():
                entry.unlink()
            folder.rmdir()
            folder.write_text("")
    second = prepare(data, tokenizer, seed=1, cache_dir=cache)
    assert not second.report.cache_hit
    assert second.report.notes[-1].startswith(f"the prepared data in {folder} is damaged (")
    assert second.report.notes[-1].endswith("): built again")
    assert np.array_equal(second.train.tokens, wanted)
    third = prepare(data, tokenizer, seed=1, cache_dir=cache)
    assert third.report.cache_hit
    assert third.report.notes == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, tokenizer: Any) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    data = config(qa(tmp_path / "a.jsonl", 20))
    prepared = prepare(data, tokenizer, seed=1, cache_dir=blocked / "deep")
    assert len(prepared.train) == 19 or len(prepared.train) == 18
    assert prepared.report.cache_path is None
    assert prepared.report.notes[-1].startswith("the prepared data could not be kept in ")
    assert prepared.report.notes[-1].endswith(": Not a directory")


def test_the_default_cache(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = prepare(config(qa(tmp_path / "a.jsonl", 5)), tokenizer, seed=1).report.cache_path
    assert path is not None
    assert Path(path).parent == tmp_path / "xdg" / "shoestring" / "data"
    assert os.listdir(tmp_path / "xdg" / "shoestring" / "data") == [Path(path).name]


def test_what_check_shows(tmp_path: Path, cache: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(BAD.replace('{"messages"', '{"id": 3, "messages"'))
    prepared = prepare(config(path, on_bad_row="skip"), tokenizer, seed=1, cache_dir=cache)
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(describe(prepared, tokenizer))
    shown = out.getvalue()
    assert "not used: id" in shown
    assert "have no assistant turn" in shown
    assert re.search(r"trained \d+ (b|d)<\|im_end\|>", shown)
    assert re.search(r"context \d+ <\|im_start\|>user⏎", shown)
    assert f"{prepared.report.trained_share:.1%} of them trained" in shown
    coloured = io.StringIO()
    Console(file=coloured, width=200, force_terminal=True).print(describe(prepared, tokenizer))
    assert "\x1b[1;32m" in coloured.getvalue()
