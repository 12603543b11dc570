"""Rows and chat templates from a stranger: read as text, bounded, and never run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import malicious
import pyarrow as pa
import pytest
import tiny
from malicious import bounded
from pyarrow import parquet
from shoestring.data import prepare
from shoestring.data import readers as readers_module
from shoestring.data.raw import RawRow, RowProblem
from shoestring.data.readers import read_file
from shoestring.data.sources import open_source
from shoestring.data.template import render
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import Source

GOOD = {"prompt": "a bee has", "completion": "five eyes"}


def read(path: Path, content: bytes | None = None) -> list[RawRow]:
    if content is not None:
        path.write_bytes(content)
    with bounded():
        return list(read_file(path))


# Lines


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (malicious.DEEP, "are not valid JSON", "nested too deeply"),
        (b'{"a":' * 100_000, "are not valid JSON", "nested too deeply"),
        (b'{"prompt": ' + b"9" * 1_000_000 + b"}", "are not valid JSON", "Exceeds the limit"),
        (b'{"prompt": "\xff"}', "are not UTF-8 text", "byte 0xff at column 13"),
        (b'{"prompt": "\xed\xa0\x80"}', "are not UTF-8 text", "byte 0xed"),
        (b'{"prompt": "a\\ud800b"}', "hold half a character", "the lone surrogate \\ud800"),
        (b'{"\\uDFFF": 1}', "hold half a character", "the lone surrogate \\udfff"),
        (b'{"prompt": "a\0b"}', "are not valid JSON", "Invalid control character"),
        (b"\0" * 1000, "are not valid JSON", "Expecting value"),
    ],
)
def test_a_hostile_line_is_one_bad_row(tmp_path: Path, line: bytes, reason: str, detail: str) -> None:
    good = json.dumps(GOOD).encode()
    found = read(tmp_path / "rows.jsonl", good + b"\n" + line + b"\n" + good + b"\n")
    assert [row.problem is None for row in found] == [True, False, True]
    problem = found[1].problem
    assert problem is not None
    assert problem.reason == reason
    assert detail in problem.detail
    assert len(str(problem)) < 300


def test_whole_characters_in_two_escapes_pass(tmp_path: Path) -> None:
    line = b'{"prompt": "\\ud83d\\udc1d", "completion": "\\\\ud800"}\n'
    assert read(tmp_path / "rows.jsonl", line)[0].value == {"prompt": "\N{HONEYBEE}", "completion": "\\ud800"}


@pytest.mark.parametrize("content", [malicious.DEEP, b'[{"a": ' + b"9" * 1_000_000 + b"}]"])
def test_a_hostile_json_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="is not valid JSON") as caught:
        read(tmp_path / "rows.json", content)
    assert len(str(caught.value)) < 400


def test_half_characters_in_a_json_file_are_bad_rows(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.json", b'[{"a": "\\ud800"}, {"a": "b"}]')
    assert [row.problem is None for row in found] == [False, True]


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.touch()
    os.truncate(path, 64 << 20)
    with bounded(peak=8 << 20):
        found = list(read_file(path))
    assert [row.problem.reason for row in found if row.problem] == ["are lines above 1 MiB"]


# Columns


def test_parquet_with_text_that_is_none(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe"], type=pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"]
)
def test_malformed_parquet(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "rows.parquet", content)


def test_every_damaged_parquet_is_refused_or_read(tmp_path: Path) -> None:
    """No damage ends the process or escapes as another error than a person can read."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({key: [value] * 3 for key, value in GOOD.items()}), path)
    whole = path.read_bytes()
    refusals = 0
    for position in range(0, len(whole), 17):
        bad = bytearray(whole)
        bad[position] ^= 0xFF
        path.write_bytes(bad)
        try:
            list(read_file(path))
        except UserError:
            refusals += 1
    assert refusals > 10


def test_a_parquet_bomb_is_refused_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "_LEAST_BOMB", 1 << 20)
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": ["a" * (16 << 20)], "completion": ["b"]})
    parquet.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)
    assert path.stat().st_size < 16 << 10
    with pytest.raises(UserError, match="and unpacks to 16,777,"):
        read(path)


def test_quotes_without_end_in_csv(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not valid CSV"):
        read(tmp_path / "rows.csv", b'prompt,completion\n"' + b"a\n" * 100_000)


# YAML

TAGS = "conversations:\n- - !!python/object/apply:os.mkdir [canary]\n  - b\n"
WIDE = "conversations:\n- - &a b\n  - c\n" + "".join(
    f"- &{new} {{x: [{', '.join(['*' + old] * 50)}]}}\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


def in_a_process(path: Path) -> str:
    """What the reader says, from a process of its own: a stack that overflows in C ends it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom shoestring.data.readers import read_file\n"
        "from shoestring.recipes.errors import UserError\n"
        "try: print(len(list(read_file(Path(sys.argv[1])))))\nexcept UserError as error: print(error)"
    )
    done = forked.run([sys.executable, "-c", code, path], timeout=60)
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.parametrize("text", ["[" * 200_000, "- " * 200_000 + "a", "{a: " * 200_000])
def test_nested_yaml_does_not_end_the_process(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.yml").write_text(text)
    assert "is nested more than 32 deep" in in_a_process(tmp_path / "rows.yml")


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="aliases that multiply its size"):
        read(tmp_path / "rows.yml", WIDE.encode())
    long = f"conversations:\n- - &a {'x' * 100_000}\n" + "  - *a\n" * 5_000
    with pytest.raises(UserError, match="aliases that multiply its size"):
        read(tmp_path / "rows.yml", long.encode())


def test_large_yaml_without_aliases_is_never_a_bomb(tmp_path: Path) -> None:
    rows = "".join(f"- [a{index}, b]\n" for index in range(3000))
    assert len(read(tmp_path / "rows.yml", f"conversations:\n{rows}".encode())) == 3000


def test_tags_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = read(tmp_path / "rows.yml", TAGS.encode())
    assert found[0].problem is not None
    assert not (tmp_path / "canary").exists()


# Sources


def test_a_folder_s_own_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("set.py", "dataset.py", "__init__.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text("import os\nos.mkdir('canary')\n")
    (folder / "data.pkl").write_bytes(malicious.payload(tmp_path / "canary"))
    (folder / "dataset_infos.json").write_text("{}")
    with pytest.raises(UserError):
        [*open_source(Source(path="set")).rows(), *open_source(Source(path="set/set.py")).rows()]
    (folder / "rows.jsonl").write_text(json.dumps(GOOD))
    assert GOOD in [row.value for row in open_source(Source(path="set")).rows()]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("put", [malicious.pipe, malicious.endless, malicious.listener])
def test_what_is_no_file_is_no_source(tmp_path: Path, put: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    put(folder / "rows.jsonl")
    with bounded():
        for given in (folder / "rows.jsonl", folder, f"{folder}/*.jsonl"):
            with pytest.raises(UserError):
                open_source(Source(path=str(given)))


def test_a_login_in_a_url_is_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        open_source(Source(path="https://bee:hf_canary@example.org/rows.jsonl?token=canary"))
    assert str(caught.value).startswith("data: https://***@example.org/rows.jsonl is a URL")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.zip", "a.jsonl.gz", "a.tar", "a.pkl", "a.npy", "a.arrow"])
def test_archives_and_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(malicious.payload(tmp_path / "canary"))
    with pytest.raises(UserError, match="does not read"):
        open_source(Source(path=str(tmp_path / name)))
    assert not (tmp_path / "canary").exists()


# Templates

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].mkdir('canary') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.mkdir('canary') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('canary') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('canary') }}",
    "{% for i in range(10 ** 9) %}a{% endfor %}",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.model_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(
    tokenizer: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "chat_template", text)
    messages = [{"role": "user", "content": "a"}]
    with bounded():
        try:
            said = render(tokenizer, messages)
        except RowProblem as problem:
            said = problem.reason
    assert said in ("are refused by the chat template", "")
    assert list(tmp_path.iterdir()) == []
    assert messages == [{"role": "user", "content": "a"}]


def test_what_a_row_says_is_no_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}]
    assert "{{ 7 * 7 }}{% raw %}" in render(tokenizer, messages)


def test_hostile_rows_are_told_through_the_whole_preparation(tokenizer: Any, tmp_path: Path) -> None:
    rows = [json.dumps(GOOD)] * 8 + [
        '{"prompt": "a\\ud800", "completion": "b"}',
        '{"prompt": "\\u0000", "completion": "b"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: m\ndata: {{train: {tmp_path}/rows.jsonl, on_bad_row: skip}}\nbudget: {{steps: 1}}\n"
    )
    prepared = prepare(
        load_recipe(tmp_path / "recipe.yaml").recipe.data, tokenizer, seed=0, cache_dir=tmp_path
    )
    assert len(prepared.train) + len(prepared.eval) == 9
    assert any("half a character" in line for line in prepared.report.lines())
