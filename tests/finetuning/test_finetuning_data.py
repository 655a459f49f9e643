"""Rows and their checks, chat templates, what is learnt, the order of training."""

import json
from pathlib import Path

import pytest
from finetuning_cases import MARKED, chats, write_rows
from tokenizers_of_tests import TEMPLATE, chat_tokenizer

from modeling_deepseekmoe.finetuning.data import order_examples, split_examples
from modeling_deepseekmoe.finetuning.encoding import IGNORED, Example, encode_rows
from modeling_deepseekmoe.finetuning.rows import load_rows

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second, longer."},
]


def learnt_text(example: Example) -> str:
    """The token that ends a turn is decoded as byte 1."""
    return chat_tokenizer().decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 3 is no JSON"),
        ("[1, 2]", "line 3 is not allowed: it must be a row with names and values"),
        ({"text": "no messages"}, "line 3 is not allowed: its messages is missing, and must be a list"),
        ({"messages": []}, "line 3 is not allowed: its messages is an empty list"),
        ({"messages": ["Hi"]}, "message 1 of its messages is a text, and must have a role and a content"),
        ({"messages": [{"content": "Hi"}]}, "message 1 of its messages has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "has 3 as content, and must have a text"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "none of its messages is the assistant's"),
        ({"messages": [*GOOD["messages"][:1], {"role": "assistant", "content": ""}]}, "message 2 .* and empty"),
        ({**GOOD, "tools": "{"}, "line 3 is not allowed: its tools are no JSON"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path: Path, line: object, message: str) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [GOOD, GOOD, line, GOOD])
    with pytest.raises(ValueError, match=message):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "is empty: there is nothing to train on"),
        ([{"body": "x"}], {}, "line 1 .*neither messages, nor prompt and completion, nor text, but 'body'"),
        ([{"body": "x"}], {"column": "page"}, "column='page' is not allowed: .*line 1 holds 'body'"),
        ([{"text": "x"}, {"text": " "}], {}, "line 2 is not allowed: its text is empty"),
        ([{"text": None}], {}, "line 1 is not allowed: its text is missing, and must be a text"),
        ([{"prompt": "a", "completion": ""}], {}, "line 1 is not allowed: its completion is empty"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:3]}],
            {},
            "line 2 is not allowed: prompts are texts in all rows, or messages in all",
        ),
        ([{"prompt": "a", "completion": 1}], {}, "its completion is 1, and must be a text"),
    ],
)
def test_files_without_what_is_needed(tmp_path: Path, rows: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(str(write_rows(tmp_path / "rows.jsonl", rows)), **options)


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_files_hold_the_same_rows(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    rows = [
        {"prompt": f"Question {number}?", "completion": f"Answer {number}.", "source": "me"} for number in range(3)
    ]
    path = tmp_path / f"rows.{suffix}"
    getattr(Dataset.from_list(rows), f"to_{suffix}")(str(path))
    found = load_rows(str(path))
    assert found.kind == "completion" and found.unused == ("source",)
    assert found.digest == load_rows(str(write_rows(tmp_path / "rows.jsonl", rows))).digest
    assert [row.where.rpartition(", ")[2] for row in found.rows] == ["row 1", "row 2", "row 3"]


def test_a_broken_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"rows\.parquet, row 1 cannot be read"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_rows_of_tables_have_no_empty_fields(tmp_path: Path) -> None:
    """A table has every field in every row, and a template would see those that are null."""
    from datasets import Dataset

    tool = {"role": "tool", "name": "sum", "content": "3"}
    rows = [{"messages": [*GOOD["messages"], tool]}, GOOD]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = load_rows(str(tmp_path / "rows.parquet"))
    assert [list(row.messages) for row in found.rows] == [row["messages"] for row in rows]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["unmarked", "marked"])
def test_the_assistants_tokens_are_learnt(tmp_path: Path, template: str) -> None:
    rows = load_rows(str(write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])))
    encoded = encode_rows(rows, chat_tokenizer(template), loss_on="assistant", max_length=200)
    (example,) = encoded.examples
    assert learnt_text(example) == "First.\x01Second, longer.\x01"  # with what ends a turn, and no line break
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    assert bool(encoded.notes) == (template is TEMPLATE)


def test_all_tokens_are_learnt(tmp_path: Path) -> None:
    rows = load_rows(str(write_rows(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])))
    (example,) = encode_rows(rows, chat_tokenizer(), loss_on="all", max_length=200).examples
    assert example.labels == example.ids
    text = chat_tokenizer().decode(example.ids)
    assert text.startswith("system: Be brief.\x01\nuser: One?\x01\nassistant: First.\x01")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CONVERSATION, r"chat\.jsonl holds messages, and the tokenizer has no chat template"),
        (
            "{% for message in messages %}{{ message.content if loop.last else message.content[:2] }}{% endfor %}",
            CONVERSATION,
            "line 1: the chat template does not mark the assistant's tokens, and writes message 3 otherwise when",
        ),
        (TEMPLATE, CONVERSATION[2:], "line 1: it begins with the assistant, and the chat template does not mark"),
        ("{{ raise_exception('no system') }}", CONVERSATION, "line 1: the chat template refuses it: no system"),
        (
            MARKED.replace("== 'assistant'", "== 'nobody'"),
            CONVERSATION,
            "line 1: the chat template marks no token as the assistant's",
        ),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, template: str, messages: list, message: str) -> None:
    rows = load_rows(str(write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])))
    with pytest.raises(ValueError, match=message):
        encode_rows(rows, chat_tokenizer(template), loss_on="assistant", max_length=200)


def test_a_template_that_does_not_end_a_turn_is_said(tmp_path: Path) -> None:
    rows = load_rows(str(write_rows(tmp_path / "chat.jsonl", [GOOD])))
    encoded = encode_rows(
        rows, chat_tokenizer(TEMPLATE.replace("eos_token + ", "")), loss_on="assistant", max_length=99
    )
    assert any("the model may not learn to stop" in note for note in encoded.notes)


@pytest.mark.parametrize("conversational", [False, True])
def test_completions_are_learnt(tmp_path: Path, conversational: bool) -> None:
    row = {"prompt": "What is 1 + 1?", "completion": "It is 2."}
    if conversational:
        row = {"prompt": CONVERSATION[:2], "completion": [{"role": "assistant", "content": "It is 2."}]}
    rows = load_rows(str(write_rows(tmp_path / "rows.jsonl", [row])))
    (example,) = encode_rows(rows, chat_tokenizer(), loss_on="completion", max_length=99).examples
    assert learnt_text(example) == "It is 2.\x01"
    (example,) = encode_rows(rows, chat_tokenizer(), loss_on="all", max_length=99).examples
    assert example.labels == example.ids


@pytest.mark.parametrize("length", [5, 19, 20, 21, 40, 41, 59])
def test_texts_are_continued_and_nothing_is_lost(tmp_path: Path, length: int) -> None:
    text = "".join(chr(97 + number % 26) for number in range(length))
    rows = load_rows(str(write_rows(tmp_path / "rows.jsonl", [{"text": text}])))
    encoded = encode_rows(rows, chat_tokenizer(), loss_on="all", max_length=20)
    ids = [token for example in encoded.examples for token in example.ids]
    assert chat_tokenizer().decode(ids) == f"{text}\x01"
    assert all(2 <= len(example.ids) <= 20 for example in encoded.examples)
    assert encoded.cut == (length + 1 > 20) and not encoded.left_out


def test_long_chats_are_cut_and_counted(tmp_path: Path) -> None:
    rows = load_rows(str(write_rows(tmp_path / "chat.jsonl", [GOOD, {"messages": CONVERSATION}])))
    encoded = encode_rows(rows, chat_tokenizer(), loss_on="assistant", max_length=26)
    assert encoded.cut == 2 and encoded.left_out == 1  # of the second, the assistant comes later
    (example,) = encoded.examples
    assert len(example.ids) == 26 and learnt_text(example) == "Hello"[: 26 - len("user: Hi#\nassistant: ")]
    with pytest.raises(ValueError, match="nothing would be learnt of any row, with max_length=9"):
        encode_rows(rows, chat_tokenizer(), loss_on="assistant", max_length=9)


def sequences(number: int, per_row: int = 1) -> list[Example]:
    return [
        Example(row, [1] * (2 + 7 * row % 31), [1] * (2 + 7 * row % 31))
        for row in range(number)
        for _ in range(per_row)
    ]


def test_the_split_keeps_rows_together() -> None:
    examples = sequences(20, per_row=3)
    train, evaluation = split_examples(examples, 0.2, seed=3)
    assert len({example.row for example in evaluation}) == 4 and len(evaluation) == 12 and len(train) == 48
    assert not {example.row for example in train} & {example.row for example in evaluation}
    assert split_examples(examples, 0.2, seed=3) == (train, evaluation)
    assert split_examples(examples, 0.2, seed=4)[1] != evaluation
    assert split_examples(examples, 0.0, seed=3) == (tuple(examples), ())
    one_row = sequences(1, per_row=10)
    assert [len(part) for part in split_examples(one_row, 0.2, seed=3)] == [8, 2]
    with pytest.raises(ValueError, match=r"eval_share=0\.9 is not allowed for 2 rows: nothing would be left"):
        split_examples(sequences(2), 0.9, seed=0)


@pytest.mark.parametrize("number", [50, 100, 37, 170])
def test_the_order_has_every_sequence_in_every_pass(number: int) -> None:
    examples = sequences(50)
    ordered = order_examples(examples, number=number, batch_size=4, seed=0)
    counts = [sum(one is example for one in ordered) for example in examples]
    assert len(ordered) == number and max(counts) - min(counts) <= 1
    assert ordered == order_examples(examples, number=number, batch_size=4, seed=0)
    assert ordered != order_examples(examples, number=number, batch_size=4, seed=1)

    def padded(order: list[Example]) -> int:
        return sum(4 * max(len(one.ids) for one in order[start : start + 4]) for start in range(0, number, 4))

    assert padded(ordered) < padded((examples * 4)[:number])


def test_rows_are_told_apart_by_their_content(tmp_path: Path) -> None:
    first = load_rows(str(write_rows(tmp_path / "a.jsonl", chats(5))))
    same = load_rows(str(write_rows(tmp_path / "b.jsonl", ["", *chats(5)])))
    assert first.digest == same.digest != load_rows(str(write_rows(tmp_path / "c.jsonl", chats(6)))).digest
    changed = json.loads(json.dumps(chats(5)))
    changed[2]["messages"][1]["content"] += "."
    assert load_rows(str(write_rows(tmp_path / "d.jsonl", changed))).digest != first.digest
