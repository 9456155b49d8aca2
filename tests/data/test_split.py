import json
from pathlib import Path

import pytest

from qvgpt.commands import CheckConfig, check
from qvgpt.data.split import split_rows
from qvgpt.errors import QvgptError

ROWS = [
    {"prompt": f"Question {i}?", "completion": str(k), "noted": [i, k]}
    for i in range(60)
    for k in range(3)
]


def prompts(rows):
    return {json.dumps(row["prompt"]) for row in rows}


def test_the_rows_of_a_prompt_are_on_one_side_and_all_are_somewhere(write, tmp_path, capsys):
    path, out = write(*ROWS), tmp_path / "split"
    config = CheckConfig([str(path)], split=[0.2, 0.1], output=str(out))
    summary = check(config)
    assert "train" in capsys.readouterr().out.partition("rows by prompt")[2]
    sides = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "val", "test")
    }
    assert summary["split"] == {name: len(rows) for name, rows in sides.items()}
    assert sorted((r for rows in sides.values() for r in rows), key=lambda r: r["noted"]) == ROWS
    counts = {name: len(prompts(rows)) for name, rows in sides.items()}
    assert sum(counts.values()) == 60
    assert 5 < counts["val"] < 20
    assert 1 < counts["test"] < 12
    with pytest.raises(QvgptError, match="continue it with --resume true"):
        check(config)
    assert check(CheckConfig([str(path)], split=[0.2, 0.1], output=str(out), resume=True))


def test_a_prompt_falls_on_the_same_side_whatever_the_file_and_its_spaces(write):
    def held(*rows, name):
        return split_rows([write(*rows, name=name)], [0.3])["val"]

    first = held(*ROWS, name="a.jsonl")
    asked = prompts(row.fields for row in first)
    others = [{"prompt": r["prompt"], "chosen": "a", "rejected": "b"} for r in ROWS[:90]]
    assert prompts(r.fields for r in held(*others, name="b.jsonl")) == asked & prompts(others)
    spaced = [{**r, "prompt": f" {r['prompt'].upper()} !"} for r in ROWS]
    assert [r.fields["noted"] for r in held(*spaced, name="c.jsonl")] == [
        r.fields["noted"] for r in first
    ]


def test_dialogues_are_split_by_all_before_the_last_answer(write):
    def dialogue(i, answer):
        said = ("user", "Hello."), ("assistant", "Hi."), ("user", f"No. {i}"), ("assistant", answer)
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    rows = [dialogue(i, answer) for i in range(40) for answer in ("yes", "no")]
    sides = split_rows([write(*rows)], [0.3])
    seen = [{row.fields["messages"][2]["content"] for row in side} for side in sides.values()]
    assert len(seen[0]) + len(seen[1]) == 40
    whole = split_rows([write(*({"text": f"text {i}"} for i in range(40)))], [0.3])
    assert len(whole["train"]) + len(whole["val"]) == 40


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        (ROWS[:3], [0.2], "val would have no rows: there are 1 different prompts"),
        (ROWS, [1.2], "split: .*together below 1"),
        (ROWS, [0.2, 0.8], "split: .*together below 1"),
        (ROWS, [0.0], "split: .*each above 0"),
        (ROWS, [0.1, 0.1, 0.1], "split: .*perhaps one for test"),
    ],
)
def test_a_split_that_cannot_be_is_refused_and_leaves_nothing(
    write, tmp_path, rows, split, message
):
    out = tmp_path / "split"
    with pytest.raises(QvgptError, match=message):
        check(CheckConfig([str(write(*rows))], split=split, output=str(out)))
    assert not out.exists()


def test_faulty_rows_are_not_split(write, tmp_path, capsys):
    path = write(*ROWS, {"prompt": 3, "completion": "a"})
    assert check(CheckConfig([str(path)], split=[0.2], output=str(tmp_path / "out")))["faults"] == 1
    assert "not split, for there are faults" in capsys.readouterr().out
    assert not Path(tmp_path / "out/train.jsonl").exists()
    with pytest.raises(QvgptError, match="split: say by output"):
        check(CheckConfig([str(path)], split=[0.2]))
