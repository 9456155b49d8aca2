import sys
import types

import pytest

from qvgpt.data.rows import (
    DataError,
    Row,
    load_trajectories,
    prompt_tokens,
    read_rows,
    row_to_trajectories,
)
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.trajectory import Trajectory, collate

BOS, SEP, EOS, EOT = 1, 2, 3, 4
A, B, C = 9, 10, 11  # the ids of a, b, c: after the specials, <unk>, " ", ":" and "?"


def make(tokens, actions, reward=None, terminated=True):
    """Expected trajectory; `actions` as a string of 0 and 1, `reward` by position."""
    is_action = [c == "1" for c in actions]
    reward = [(reward or {}).get(i, 0.0) for i in range(len(tokens))]
    return Trajectory(tokens, is_action, reward, terminated)


def convert(tokenizer, **fields):
    return row_to_trajectories(Row("file.jsonl:17", fields), tokenizer)


P = [BOS, A, SEP]
FORMS = {
    "text": ({"text": "ab"}, [make([BOS, A, B, EOS], "0111")]),
    "text with reward": ({"text": "a", "reward": 2}, [make([BOS, A, EOS], "011", {2: 2.0})]),
    "text with a class": ({"text": "a", "label": 1}, [make([BOS, A, EOS], "011")]),
    "completion": ({"prompt": "a", "completion": "b"}, [make([*P, B, EOS], "00011")]),
    "reward": (
        {"prompt": "a", "completion": "b", "reward": 0.5, "references": ["x"], "options": [1]},
        [make([*P, B, EOS], "00011", {4: 0.5})],
    ),
    "truncated": (
        {"prompt": "a", "completion": "b", "reward": 1, "truncated": True},
        [make([*P, B], "0001", {3: 1.0}, terminated=False)],
    ),
    "label": (
        {"prompt": "a", "completion": "b", "label": False},
        [make([*P, B, EOS], "00011")],
    ),
    "label true": (
        {"prompt": "a", "completion": "b", "label": True},
        [make([*P, B, EOS], "00011", {4: 1.0})],
    ),
    "ids": (
        {
            "prompt_ids": [BOS, B],
            "completion_ids": [C, EOT],
            "prompt": "?",
            "completion": "?",
            "reward": 1,
        },
        [make([BOS, B, C, EOT], "0011", {3: 1.0})],
    ),
    "token rewards": (
        {"prompt": "a", "completion_ids": [B, C, EOS], "token_rewards": [-0.5, 0, 1]},
        [make([*P, B, C, EOS], "000111", {3: -0.5, 5: 1.0})],
    ),
    "samples": (
        {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0.5], "truncated": [False, True]},
        [make([*P, B, EOS], "00011", {4: 1.0}), make([*P, C], "0001", {3: 0.5}, False)],
    ),
    "samples by id": (
        {"prompt": "a", "completion_ids": [[B, EOS], [C]], "token_rewards": [[0, 1], [2]]},
        [make([*P, B, EOS], "00011", {4: 1.0}), make([*P, C], "0001", {3: 2.0})],
    ),
    "steps": (
        {"prompt": "a", "steps": ["ab", "c"], "rewards": [0.25, 1]},
        [make([*P, A, B, C, EOS], "0001111", {4: 0.25, 5: 1.0})],
    ),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "prompt_id": "f3a"},
        [make([*P, B, EOS], "00011", {4: 1.0}), make([*P, C, EOS], "00011", {4: -1.0})],
    ),
    "messages": (
        {
            "messages": [
                {"role": "assistant", "content": "a", "reward": None},
                {"role": "user", "content": "b", "reward": -1},
                {"role": "assistant", "content": "c", "reward": 0.5},
            ],
            "reward": 2,
        },
        [
            make(
                [BOS, A, EOT, *[29, 27, 13, 26, 7, 6], B, EOT, C, EOT],
                "011" + "0" * 8 + "11",
                {10: -1.0, 12: 2.5},
            )
        ],
    ),
    "cut messages": (
        {"messages": [{"role": "assistant", "content": "ab", "reward": 1}], "truncated": True},
        [make([BOS, A, B], "011", {2: 1.0}, terminated=False)],
    ),
    "TRL's dialogues": (
        {
            "prompt": [{"role": "assistant", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
            "reward": 1,
        },
        [make([BOS, A, EOT, B, EOT], "00011", {4: 1.0})],
    ),
    "TRL's implicit prompt": (
        {
            "chosen": [{"role": "assistant", "content": c} for c in "ab"],
            "rejected": [{"role": "assistant", "content": c} for c in "ac"],
        },
        [
            make([BOS, A, EOT, B, EOT], "00011", {4: 1.0}),
            make([BOS, A, EOT, C, EOT], "00011", {4: -1.0}),
        ],
    ),
    "a dialogue and sampled ids": (
        {"prompt": [{"role": "assistant", "content": "a"}], "completion_ids": [B]},
        [make([BOS, A, EOT, B], "0001")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(char, form):
    fields, expected = FORMS[form]
    assert convert(char, **fields) == expected
    collate(expected)


def test_a_truncated_dialogue_that_ends_in_an_observation_keeps_it(char):
    said = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    (t,) = convert(char, messages=said, truncated=True)
    assert (t.tokens[-1], t.terminated) == (EOT, False)


def test_chat_template_rows(hf_folder):
    tokenizer = Tokenizer.load(hf_folder)
    said = [
        {"role": "system", "content": "x", "reward": 0},
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "tool", "content": "1", "reward": 3},
        {"role": "user", "content": "2"},
    ]
    (whole,) = convert(tokenizer, messages=said)
    assert sum(whole.reward) == 3
    assert whole.reward[-1] == 3  # both observations are one reply, whose last token carries it
    (cut,) = convert(tokenizer, messages=said[:3], truncated=True)
    assert tokenizer.pieces(cut.tokens)[-1] == "sat"  # neither <|im_end|> nor the newline
    (split,) = convert(tokenizer, prompt=said[:2], completion="sat", reward=1)
    ids = [t for t, a in zip(split.tokens, split.is_action, strict=True) if a]
    assert tokenizer.decode(ids, False) == "sat<|im_end|>"
    (sampled,) = convert(tokenizer, prompt=said[:2], completion_ids=ids)
    assert sampled.tokens == split.tokens[: len(sampled.tokens)]


SAY = {"role": "assistant", "content": "a"}
FAULTS = [
    ({"prompt": "a", "completion": "b", "rewad": 1}, "'rewad'", "did you mean 'reward'"),
    ({"Text": "a"}, "'Text'", "did you mean 'text'"),
    ({"text": 3}, "'text'", "expected text, found 3"),
    ({"prompt": "a"}, "", "nothing to train on"),
    ({"completion": "a"}, "'prompt'", "expected text, found nothing"),
    ({"prompt": "a", "completion": "b", "reward": "1"}, "'reward'", "expected a number"),
    ({"prompt": "a", "completion": "b", "reward": True}, "'reward'", "expected a number"),
    ('{"text": "a", "reward": NaN}', "'reward'", "expected a finite number"),
    (
        {"text": "a", "reward": 10**400},
        "'reward'",
        "expected a finite number, below 3.4e38, found 1000",
    ),
    ({"text": "a", "reward": 1e39}, "'reward'", "expected a finite number, below 3.4e38, found 1e"),
    ({"prompt": "a", "completion": "b", "rewards": [1]}, "'rewards'", "belongs to 'completions'"),
    ({"prompt": "a", "completion": "b", "messages": []}, "'messages'", "does not go with"),
    ({"prompt": "a", "completion": "b", "label": 1}, "'label'", "a number stands in `reward`"),
    ({"prompt": "a", "completion": "b", "label": True, "reward": 1}, "'label'", "remove one"),
    ({"prompt": "a", "completion": "b", "truncated": 1}, "'truncated'", "true or false"),
    ({"prompt": "a", "completion": "", "truncated": True}, "", "no action"),
    ({"prompt": "a", "completion": "b", "references": "c"}, "'references'", "expected a list"),
    ({"prompt": "a", "completions": "b"}, "'completions'", "expected a list"),
    ({"prompt": "a", "completions": []}, "'completions'", "at least one"),
    ({"prompt": "a", "completions": ["b", 1]}, "'completions[1]'", "expected text, found 1"),
    ({"prompt": "a", "completions": ["b", "c"], "rewards": [1]}, "'rewards'", "expected 2 entries"),
    ({"prompt": "a", "completions": ["b"], "rewards": [None]}, "'rewards[0]'", "expected a number"),
    ({"prompt": "a", "completions": ["b"], "truncated": []}, "'truncated'", "expected 1 entries"),
    ({"prompt": "a", "steps": ["b", ""], "rewards": [1, 1]}, "'steps[1]'", "empty step"),
    ({"prompt": "a", "steps": ["b"], "rewards": [1, 1]}, "'rewards'", "expected 1 entries"),
    ({"prompt": "a", "steps": ["b"], "rewards": ["x"]}, "'rewards[0]'", "expected a number"),
    ({"prompt": "a", "chosen": "b"}, "'rejected'", "needs both"),
    ({"prompt": "a", "rejected": "b"}, "'chosen'", "needs both"),
    ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen'", "expected text"),
    ({"messages": []}, "'messages'", "expected a list of messages, found an empty one"),
    ({"messages": ["a"]}, "'messages[0]'", "expected an object"),
    ({"messages": [{"role": "user", "content": "a"}]}, "'messages'", "no assistant message"),
    ({"messages": [SAY, {"role": "usr", "content": ""}]}, "'messages[1].role'", "mean 'user'"),
    ({"messages": [{"role": "assistant"}]}, "'messages[0].content'", "expected text"),
    ({"messages": [{**SAY, "rewards": 1}]}, "'messages[0].rewards'", "did you mean 'reward'"),
    ({"messages": [{**SAY, "reward": "x"}]}, "'messages[0].reward'", "expected a number"),
    (
        {"messages": [{"role": "user", "content": "a", "reward": 1}, SAY]},
        "'messages[0].reward'",
        "before the first action",
    ),
    ({"prompt_ids": [], "completion_ids": [9]}, "'prompt_ids'", "a token or more before"),
    ({"prompt_ids": [1], "completion_ids": [999]}, "'completion_ids'", "expected token ids"),
    (
        {"prompt_ids": [1], "completion_ids": [9, 3], "token_rewards": [1]},
        "'token_rewards'",
        "expected 2 entries",
    ),
    (
        {"prompt_ids": [1], "completion_ids": [9], "token_rewards": [1], "reward": 1},
        "'token_rewards'",
        "remove the column of totals",
    ),
    ({"prompt_ids": [1], "completion": [SAY]}, "'prompt_ids'", "needs completion_ids"),
    ('{"text": "\\ud800"}', "'text'", "surrogate"),
    ('{"text": ', "", "not JSON"),
    ("[1]", "", "expected one JSON object a line, found a list"),
    pytest.param('{"a": 1' + "0" * 5000 + "}", "", "not JSON that can be read", id="digits"),
    pytest.param("[" * 100_000, "", "not JSON that can be read", id="brackets"),
]


@pytest.mark.parametrize(("row", "column", "expected"), FAULTS)
def test_a_fault_is_one_line_with_file_row_and_column(char, write, row, column, expected):
    path = write({"text": "good"}, "", row)
    with pytest.raises(DataError) as caught:
        load_trajectories(path, char)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: " + (f"column {column}: " if column else ""))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"text": "a", "label": 1}, "text", "cut its beginning off as `prompt`"),
        ({"messages": [SAY]}, "messages", "its messages but the last answer into `prompt`"),
        ({"chosen": [SAY], "rejected": [SAY]}, "chosen", "what both begin with into `prompt`"),
        ({"completion": "a"}, "prompt", "expected text, found nothing"),
    ],
)
def test_rows_without_a_prompt_are_told_what_to_do(char, row, column, expected):
    with pytest.raises(DataError, match=expected) as caught:
        prompt_tokens(Row("file.jsonl:17", row), char)
    assert (caught.value.where, caught.value.column) == ("file.jsonl:17", column)
    assert prompt_tokens(Row("file.jsonl:17", {**row, "prompt": "a"}), char) == P


def test_files_that_cannot_be_read(tmp_path, write):
    def fault(path):
        with pytest.raises(DataError) as caught:
            list(read_rows(path))
        return str(caught.value)

    assert "no such file" in fault(tmp_path / "none.jsonl")
    assert "the file is empty" in fault(write())
    assert "unknown kind of file" in fault(write("x", name="x.parquet"))
    assert "not one that `datasets` saved" in fault(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert "latin.jsonl:2: not UTF-8" in fault(tmp_path / "latin.jsonl")


def test_a_prompt_that_both_conversations_repeat_is_read_once(char, write):
    user = {"role": "user", "content": "ab"}
    both = [[user, {"role": "assistant", "content": c}] for c in "xy"]
    rows = [
        {"prompt": prompt, "chosen": both[0][start:], "rejected": both[1][start:]}
        for prompt, start in (("ab", 0), ([user], 0), ("ab", 1))
    ]
    found = [row_to_trajectories(row, char) for row in read_rows(write(*rows))]
    assert found[0] == found[1] == found[2]


def test_a_column_that_stands_twice_is_a_fault(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("prompt,completion,reward,reward\nab,c,1,0\n")
    with pytest.raises(DataError, match="csv:1: column 'reward': stands twice"):
        list(read_rows(path))


def test_csv(tmp_path, char):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion,reward,truncated\n"a\n",b,0.5,\na,c,,true\n', "utf-8")
    rows = list(read_rows(path))
    assert [r.where for r in rows] == [f"{path}:2", f"{path}:4"]
    assert rows[1].fields == {"prompt": "a", "completion": "c", "truncated": True}
    assert row_to_trajectories(rows[1], char) == [make([*P, C], "0001", terminated=False)]
    path.write_text('prompt,completions,rewards\na,"[""b"", ""c""]","[1, 0]"\na,"[""b""]",x\n')
    first, second = read_rows(path)
    assert [t.total_reward for t in row_to_trajectories(first, char)] == [1, 0]
    with pytest.raises(DataError, match="csv:3: column 'rewards': expected a list, found 'x'"):
        row_to_trajectories(second, char)
    path.write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match="csv:2: expected 2 cells"):
        list(read_rows(path))


def test_datasets_folder(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        list(read_rows(folder))
    fake = types.SimpleNamespace(load_from_disk=lambda path: [{"text": "a", "reward": None}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(read_rows(folder)) == [Row(f"{folder}:1", {"text": "a"})]
    (folder / "dataset_dict.json").write_text("{}")
    (folder / "train").mkdir()
    with pytest.raises(DataError, match=r"name one of \['train'\]"):
        list(read_rows(folder))


def test_texts_that_are_too_long(char, write):
    path = write(
        {"text": "ab"},  # 4 tokens
        {"text": "abab"},  # 6, unrewarded
        {"text": "abababab", "reward": 1},  # 10, and its reward is beyond the cut
        {"prompt": "abab", "completion": "c"},  # 8, and no action is left before the cut
    )
    expected = "3 of 4 texts are longer than max_length 5 .the longest has 10 tokens"
    with pytest.raises(QvgptError, match=expected):
        load_trajectories(path, char, max_length=5)
    kept, report = load_trajectories([path], char, max_length=5, on_too_long="drop")
    assert (len(kept), report.too_long, report.cut, report.dropped) == (1, 3, 0, 3)
    kept, report = load_trajectories(path, char, max_length=5, on_too_long="cut")
    assert kept[1] == make([BOS, A, B, A, B], "01111", terminated=False)
    assert (report.rows, report.trajectories, report.longest) == (4, 2, 10)
    assert (report.too_long, report.cut, report.dropped) == (3, 1, 2)
