"""Sources and readers: what is found, what is read, and what is said about files that are broken."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from shoestring.data import readers
from shoestring.data.raw import RawRow
from shoestring.data.sources import open_source
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import Source


def read(path: Any, **given: Any) -> list[RawRow]:
    return list(open_source(Source(path=str(path), **given)).rows())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Any, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **given)
    return str(caught.value)


def test_jsonl_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u00e9"}\n  \n{"text": "c"}'
    )
    assert [(row.where, row.value) for row in read(path)] == [
        (f"{path}:1", {"text": "a"}),
        (f"{path}:3", {"text": "bé"}),
        (f"{path}:5", {"text": "c"}),
    ]


def test_bad_lines_are_rows_with_a_problem(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b'{"text": }', b'{"text": "\xff"}', b"[" * 100_000, b"3", b""]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    rows = read(path)
    assert [str(row.problem) for row in rows] == [
        "None",
        "are not valid JSON: Expecting value at column 10",
        "are not UTF-8 text: byte 0xff at column 11",
        "are not valid JSON: nested too deeply",
        "None",
    ]


def test_long_lines_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * (3 << 20)}) + '\n{"text": "b"}\n')
    rows = read(path)
    assert str(rows[0].problem) == "are lines above 1 MiB"
    assert rows[1] == (f"{path}:2", {"text": "b"}, None)


def test_utf16_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16"))
    assert refusal(path) == (
        f"{path}  is UTF-16 text.   Save it as UTF-8, for example: "
        "iconv -f UTF-16 -t UTF-8 a.jsonl > utf8.jsonl"
    )


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ('[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ('{"version": 1, "data": [{"text": "a"}]}', [{"text": "a"}]),
        ('{"text": "a"}', [{"text": "a"}]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('\ufeff[{"text": "a"}]', [{"text": "a"}]),
        ("", []),
        (
            '{"conversations": [["Hi", "Hello."]]}',
            [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}],
        ),
    ],
)
def test_json(tmp_path: Path, content: str, values: list[Any]) -> None:
    assert [row.value for row in read(write(tmp_path / "a.json", content))] == values


def test_broken_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[\n {"text": "a"},\n {"text" "b"}\n]')
    assert refusal(path) == f"{path}:3  is not valid JSON: Expecting ':' delimiter at column 10"
    path = write(tmp_path / "b.json", b'[\n"\xe9"]')
    assert refusal(path) == f"{path}:2  is not UTF-8 text (byte 0xe9).   Save the file as UTF-8."
    path = write(tmp_path / "c.json", "3")
    assert refusal(path) == f"{path}:1  holds a single int.   A list of objects is needed."


def test_csv(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv",
        b'\xef\xbb\xbfprompt,completion\r\n"a, b","c\nd"\r\n\r\nonly one\r\ne,\xff\r\nf,g\r\n',
    )
    rows = read(path)
    assert rows[0] == (f"{path}:2", {"prompt": "a, b", "completion": "c\nd"}, None)
    assert (rows[1].where, str(rows[1].problem)) == (
        f"{path}:5",
        "do not have the header's number of fields: 1 instead of 2",
    )
    assert (rows[2].where, str(rows[2].problem)) == (f"{path}:6", "are not UTF-8 text: byte 0xff")
    assert rows[3] == (f"{path}:7", {"prompt": "f", "completion": "g"}, None)


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ";"), ("b.csv", "\t")])
def test_separators(tmp_path: Path, name: str, separator: str) -> None:
    path = write(tmp_path / name, f"prompt{separator}completion\na,b{separator}c\n".replace("a,b", "a b"))
    assert read(path)[0].value == {"prompt": "a b", "completion": "c"}


def test_broken_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt,completion\na,b\nc,"d\ne,f\n')
    assert refusal(path) == f"{path}:3  is not valid CSV: unexpected end of data (row starts on line 3)"
    path = write(tmp_path / "b.csv", "prompt,prompt\na,b\n")
    assert refusal(path) == (
        f"{path}:1  the header line has empty or repeated names: 'prompt', 'prompt'.\n"
        "  Give each column its own name: prompt,completion"
    )


def test_parquet_whole_and_cut(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": [f"row {k}" for k in range(3000)]}), path)
    rows = read(path)
    assert len(rows) == 3000
    assert rows[1234] == (f"{path} row 1235", {"text": "row 1234"}, None)
    whole = path.read_bytes()
    write(path, whole[: len(whole) // 2])
    assert refusal(path).startswith(f"{path}  cannot be read as parquet: ")
    assert refusal(path).endswith(f"the file has {len(whole) // 2:,} bytes; was it copied whole?")
    write(path, b"")
    assert "the file has 0 bytes" in refusal(path)


def test_yaml_conversations(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yml",
        "categories:\n- trivia\nconversations:\n- - What is 1+1?\n  - 2\n- - Is it?\n  - yes\n"
        "- - And?\n  - 'Note: this'\n- - Why?\n  - Because: it is so\n- a bare string\n"
        "- - Hi\n  - [nested]\n- - lonely\n",
    )
    rows = read(path)
    turns = [[m["content"] for m in row.value["messages"]] for row in rows if row.problem is None]
    assert turns == [
        ["What is 1+1?", "2"],
        ["Is it?", "yes"],
        ["And?", "Note: this"],
        ["Why?", "Because: it is so"],
        ["lonely"],
    ]
    assert [(row.where, str(row.problem)) for row in rows if row.problem] == [
        (f"{path}:12", "are not a list of turns: the text 'a bare string'"),
        (f"{path}:13", "have a turn that is not text: line 14"),
    ]
    assert [m["role"] for m in rows[0].value["messages"]] == ["user", "assistant"]


def test_yaml_never_runs_code_and_never_ends_in_a_loop(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yml", "conversations:\n- - !!python/object/apply:os.system ['exit']\n  - b\n")
    assert str(read(path)[0].problem) == "have a turn that is not text: line 2"
    path = write(tmp_path / "b.yml", "- &a {text: [*a]}\n")
    assert str(read(path)[0].problem) == "are nested too deeply: line 1"


def test_broken_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yml", "conversations:\n- - a\n  b: c\n")
    assert refusal(path).startswith(f"{path}:3  is not valid YAML: ")
    path = write(tmp_path / "b.yml", "rows:\n- a\n")
    assert refusal(path) == (
        f"{path}:1  has the keys rows.   Wanted: `conversations:` with lists of turns, or a list of mappings."
    )
    path = write(tmp_path / "c.yml", "conversations: 3\n")
    assert refusal(path) == f"{path}:1  a list of conversations is wanted here"
    assert read(write(tmp_path / "d.yml", "")) == []


def test_text_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\n \n\xe9\nlast")
    rows = read(path)
    assert [(row.where, row.value["text"], str(row.problem)) for row in rows] == [
        (f"{path}:1", "one\ntwo", "None"),
        (f"{path}:5", "three", "None"),
        (f"{path}:7", "?\nlast", "are not UTF-8 text: byte 0xe9 at column 1"),
    ]


def test_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "README.md"):
        write(tmp_path / name, json.dumps({"text": name}) + "\n")
    assert [row.value["text"] for row in read(tmp_path)] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [row.value["text"] for row in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [row.value["text"] for row in read(f"{tmp_path}/**/*.jsonl")] == [
        "a.jsonl",
        "b.jsonl",
        "deep/c.jsonl",
    ]


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl", "")
    assert refusal("chat.jsonl") == (
        f"data: chat.jsonl does not exist   (looked from {tmp_path})\n  Did you mean chats.jsonl ?"
    )
    assert refusal("*.csv") == f"data: no file matches *.csv   (looked from {tmp_path})"
    (tmp_path / "empty").mkdir()
    assert refusal("empty").startswith("data: the folder empty has no file of a known kind (.jsonl, ")
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(b"{}")
    assert refusal("a.gz").startswith(
        "a.gz  is a kind of file that shoestring does not read.   Known: .jsonl, "
    )
    assert refusal("no/such/place/x") == f"data: no/such/place/x does not exist   (looked from {tmp_path})"


def test_package_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "chatty_rows"
    (package / "data").mkdir(parents=True)
    write(package / "__init__.py", "raise AssertionError('must not be imported')\n")
    write(package / "data" / "a.jsonl", '{"text": "inside"}\n')
    outside = write(tmp_path / "secret.jsonl", '{"text": "outside"}\n')
    (package / "data" / "link.jsonl").symlink_to(outside)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [row.value["text"] for row in read("package:chatty_rows/data/*.jsonl")] == ["inside"]
    assert [row.value["text"] for row in read("package:chatty_rows/data/a.jsonl")] == ["inside"]
    for bad in ("../secret.jsonl", "/etc/*.txt", ""):
        assert refusal(f"package:chatty_rows/{bad}") == (
            f"data: package:chatty_rows/{bad}: wanted a path below the package, such as "
            "package:chatty_rows/data/*.yml"
        )
    assert refusal("package:chatty_rows/data/*.csv").startswith(
        "data: no file matches package:chatty_rows/data/*.csv   (looked in "
    )
    assert refusal("package:not_there/a.yml") == (
        "data: package:not_there/a.yml: no package 'not_there' is installed.   pip install not-there"
    )


def test_a_folder_of_a_package_keeps_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "chatty_folder"
    (package / "data").mkdir(parents=True)
    write(package / "__init__.py", "")
    write(package / "data" / "a.jsonl", '{"text": "inside"}\n')
    (tmp_path / "other").mkdir()
    secret = write(tmp_path / "other" / "secret.jsonl", '{"text": "outside"}\n')
    (package / "data" / "link.jsonl").symlink_to(secret)
    (package / "away").symlink_to(tmp_path / "other")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [row.value["text"] for row in read("package:chatty_folder/data")] == ["inside"]
    assert "no file matches" in refusal("package:chatty_folder/away")


def test_hub_ids_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(path: str, *, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("org/name", name="main", split="train[:20%]")
    assert rows == [("org/name row 1", {"text": "a"}, None), ("org/name row 2", {"text": "b"}, None)]
    read("imdb")
    assert asked == [("org/name", "main", "train[:20%]"), ("imdb", None, "train")]

    def fail(path: str, *, name: str | None, split: str) -> Any:
        raise ValueError("Unknown split 'valid'.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refusal("org/name", split="valid") == (
        "data: org/name (split valid) is no file or folder here, and the hub did not give it:\n"
        "  ValueError: Unknown split 'valid'.\n"
        "  Check id, split and connection, or give a local file, folder or glob."
    )


def test_the_identity_is_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    first = open_source(Source(path=str(path))).identity()
    path.touch()
    assert open_source(Source(path=str(path))).identity() == first
    write(path, '{"text": "b"}\n')
    assert open_source(Source(path=str(path))).identity() != first
