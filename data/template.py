"""The chat template: messages -> text, in one call, the same for training and for answering.

Without a template there is a plain form for a single question and answer: the prompt as it is, a newline
unless one of the two brings its own space, the answer, the end-of-text token.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..recipes.errors import UserError
from .formats import Messages
from .raw import RowProblem


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(tokenizer.chat_template)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation_prompt: bool = False) -> str:
    """One conversation as text.

    Raises:
        RowProblem: the template refuses the conversation, with its own words.

    """
    try:
        text = tokenizer.apply_chat_template(
            _for_template(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template is a program of its author's: it may raise anything
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RowProblem("are refused by the chat template", words[:200]) from None
    return str(text)


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]
) -> list[str | RowProblem]:
    """Many conversations; a refusal stands in the place of its text."""
    try:
        texts = tokenizer.apply_chat_template([_for_template(c) for c in conversations], tokenize=False)
        return [str(text) for text in texts]
    except Exception:  # one of them is refused: find out which
        return [_text_or_problem(tokenizer, conversation) for conversation in conversations]


def _text_or_problem(tokenizer: PreTrainedTokenizerBase, conversation: Messages) -> str | RowProblem:
    try:
        return render(tokenizer, conversation)
    except RowProblem as problem:
        return problem


def _for_template(messages: Messages) -> list[dict[str, Any]]:
    """Without `weight`, which is ours: some templates print every key of a message."""
    if any("weight" in message for message in messages):
        return [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return messages


def plain_parts(messages: Messages) -> tuple[str, str]:
    """(prompt, answer) of a conversation of one turn, for a tokenizer without a chat template.

    Raises:
        UserError: more than one turn, which has no natural plain form.

    """
    roles = [message["role"] for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise UserError(
            "this tokenizer has no chat template, and without one only rows of one question and one answer "
            f"can be written out (a row has the turns: {', '.join(roles[:6])}).\n"
            "  Give one: model.chat_template_path=template.jinja"
        )
    answer = messages[-1]["content"]
    return plain_prompt(messages[:-1], answer), answer


def plain_prompt(messages: Messages, answer: str = "") -> str:
    """What stands before the answer: system prompt, blank line, question, newline unless a space is there
    already.
    """
    prompt = "\n\n".join(message["content"] for message in messages)
    spaced = prompt[-1:].isspace() or answer[:1].isspace()
    return prompt if spaced else prompt + "\n"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids after which the model answers: the very form in which it was trained.

    Raises:
        RowProblem: the template refuses the conversation.

    """
    if has_template(tokenizer):
        text = render(tokenizer, messages, generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    return plain_prompt_ids(tokenizer, plain_prompt(messages))


def plain_prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text at the start of a row: with the special tokens that the tokenizer puts first, none at
    the end.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]  # the text brought its own
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids
