"""Formats: found from the columns, normalised to messages, and what is said about rows that do not fit."""

from typing import Any

import pytest
from shoestring.data.formats import choose_format, normalise
from shoestring.data.raw import RowProblem
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import Columns


def choose(*rows: dict[str, Any], **given: Any) -> Any:
    return choose_format(rows, **({"format": None, "columns": None, "label": "a.jsonl"} | given))


def turns(row: Any, **given: Any) -> list[tuple[str, str]]:
    messages = normalise(row, choose(row, **given))
    assert isinstance(messages, list)
    return [(message["role"], message["content"]) for message in messages]


PAIR = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "name", "why"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "messages",
            "`messages` is a list of {role, content} in 1 of the first 1 rows",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            "`conversations` is a list of {from, value} in 1 of the first 1 rows",
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "messages",
            "`conversations` is a list of {role, content} in 1 of the first 1 rows",
        ),
        (
            {"prompt": "q", "completion": "a", "id": 3},
            "prompt_completion",
            "`prompt` and `completion` in 1 of the first 1 rows",
        ),
        (
            {"question": "q", "answer": "a"},
            "question_answer",
            "`question` and `answer` in 1 of the first 1 rows",
        ),
        (
            {"instruction": "q", "input": "", "output": "a"},
            "alpaca",
            "`instruction` and `output` in 1 of the first 1 rows",
        ),
    ],
)
def test_detection(row: dict[str, Any], name: str, why: str) -> None:
    chosen = choose(row)
    assert (chosen.name, chosen.why) == (name, why)
    assert turns(row) == PAIR


def test_text() -> None:
    chosen = choose({"text": "some words"})
    assert chosen.name == "text"
    assert normalise({"text": "some words"}, chosen) == "some words"


def test_detection_looks_at_values_not_only_names() -> None:
    rows = [{"text": None, "question": "q", "answer": "a"}, {"text": "x", "question": None, "answer": None}]
    assert choose(*rows).name == "question_answer"
    assert choose({"messages": "not a list", "text": "x"}).name == "text"


def test_named_columns() -> None:
    row = {"q": "q", "a": "a", "persona": "Be kind."}
    assert turns(row, columns=Columns(prompt="q", completion="a")) == PAIR
    assert turns(row, columns=Columns(prompt="q", completion="a", system="persona")) == [
        ("system", "Be kind."),
        *PAIR,
    ]
    talk = {"talk": [{"from": "user", "value": "q"}, {"from": "bot", "value": "a"}]}
    assert turns(talk, columns=Columns(messages="talk")) == PAIR
    chosen = choose({"body": "words"}, columns=Columns(text="body"))
    assert (chosen.name, chosen.why) == ("text", "data.columns says so")


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(UserError) as caught:
        choose({"question": "q", "reply": "a"}, columns=Columns(prompt="qestion", completion="reply"))
    assert str(caught.value) == (
        "a.jsonl  has no column 'qestion' for the prompt of format prompt_completion "
        "(data.columns says so).\n"
        "  its columns: question, reply\n"
        "  Did you mean 'question' ?\n"
        "  Name them: data.columns={prompt: ..., completion: ...}, {messages: ...} or {text: ...}"
    )
    with pytest.raises(
        UserError, match=r"no column 'instruction' .* of format alpaca \(data.format says so\)"
    ):
        choose({"question": "q", "answer": "a"}, format="alpaca")


def test_nothing_known() -> None:
    with pytest.raises(UserError) as caught:
        choose({"What is AI?": "x", "A field": "y"})
    assert str(caught.value) == (
        "a.jsonl  has the columns 'What is AI?', 'A field': no known format.\n"
        "  Known: messages | conversations | prompt, completion | question, answer | instruction, output "
        "| text\n"
        "  Name yours: data.columns={prompt: ..., completion: ...}, {messages: ...} or {text: ...}"
    )


def test_preferences_are_named() -> None:
    with pytest.raises(UserError) as caught:
        choose({"prompt": "q", "chosen": "a", "rejected": "b"})
    assert str(caught.value) == (
        "a.jsonl  holds preferences (columns chosen, rejected), which sft does not train on.\n"
        "  To train on the pairs: objective=dpo\n"
        "  To train on the chosen answers: data.columns={prompt: prompt, completion: chosen}"
    )


def test_alpaca() -> None:
    row = {
        "instruction": "Add.",
        "input": "1+1",
        "output": "2",
        "system": "Be kind.",
        "history": [["Hi", "Hello."]],
    }
    assert turns(row) == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Add.\n1+1"),
        ("assistant", "2"),
    ]
    assert turns({"instruction": "q", "input": None, "output": "a", "system": "", "history": None}) == PAIR


def test_sharegpt_roles_and_system() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "look()"},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "thanks"},
        ]
    }
    assert turns(row) == [("user", "q"), ("assistant", "look()"), ("tool", "42"), ("assistant", "a")]


def test_conversational_prompt_and_completion_train_the_completion() -> None:
    row = {
        "prompt": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "q"},
        ],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    messages = normalise(row, choose(row))
    assert [message.get("weight", 1) for message in messages if isinstance(message, dict)] == [1, 0, 1, 1]


def test_parts_of_text_are_joined_and_keys_of_the_template_kept() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
            {"role": "tool", "content": "1", "tool_call_id": "x"},
            {"role": "assistant", "content": "a", "weight": 0, "reasoning_content": "hm", "extra": 1},
        ]
    }
    assert normalise(row, choose(row)) == [
        {"role": "user", "content": "q?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {"role": "assistant", "content": "a", "weight": 0, "reasoning_content": "hm"},
    ]


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([USER], "have no assistant turn"),
        ([], "have no assistant turn"),
        (None, "have a `messages` that is not a list: NoneType"),
        ("text", "have a `messages` that is not a list: str"),
        ([USER, "a"], "have a message that is not an object: message 2 is a str"),
        (
            [USER, {"role": "asistant", "content": "a"}],
            "have an unknown role: message 2: 'asistant', allowed: system, user, assistant, tool",
        ),
        (
            [USER, {"content": "a"}],
            "have an unknown role: message 2: None, allowed: system, user, assistant, tool",
        ),
        ([USER, {"role": "assistant", "content": " \n"}], "have an empty message: message 2, assistant"),
        (
            [USER, {"role": "assistant", "content": None}],
            "have content that is not text: message 2 is a NoneType",
        ),
        ([USER, {"role": "assistant", "content": 3}], "have content that is not text: message 2 is a int"),
        ([USER, {"role": "assistant"}], "have content that is not text: message 2 is a NoneType"),
        (
            [
                {"role": "user", "content": [{"type": "image", "url": "x"}]},
                {"role": "assistant", "content": "a"},
            ],
            "have content that is not text: message 1: image",
        ),
    ],
)
def test_bad_messages(value: Any, problem: str) -> None:
    good = {"messages": [USER, {"role": "assistant", "content": "a"}]}
    with pytest.raises(RowProblem) as caught:
        normalise({"messages": value}, choose(good))
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q"}, "have a `answer` that is not text: NoneType"),
        ({"question": "q", "answer": 3}, "have a `answer` that is not text: int"),
        ({"question": "", "answer": "a"}, "have an empty `question`"),
        (["q", "a"], "are not objects with columns: list"),
        (None, "are not objects with columns: NoneType"),
    ],
)
def test_bad_pairs(row: Any, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        normalise(row, choose({"question": "q", "answer": "a"}))
    assert str(caught.value) == problem
