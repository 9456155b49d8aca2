import json

from rich.console import Console

from qvgpt.data.check import MAX_FAULTS_SHOWN, check, picture, render
from qvgpt.data.rows import read_rows, row_form

SAMPLES = {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0]}
DIALOGUE = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "w"},
        {"role": "user", "content": "o", "reward": -1},
    ]
}


def test_figures(char, write):
    report = check(write(SAMPLES, {"text": "abc", "truncated": True}, DIALOGUE), char, 4)
    assert (report.rows, report.trajectories, report.faults, report.ok) == (3, 4, 0, True)
    assert report.forms == {"completions": 1, "text": 1, "messages": 1}
    lengths = report.lengths
    assert (lengths.min, lengths.median, lengths.max, report.too_long) == (4, 5, 19, 3)
    assert report.action_share == (2 + 2 + 3 + 2) / (5 + 5 + 4 + 19)
    assert report.terminated_share == 0.75
    assert (report.prompts, report.group_sizes) == (3, {1: 2, 2: 1})
    rewards = report.rewards
    assert (rewards.min, rewards.mean, rewards.max, rewards.nonzero) == (-1, 0, 1, 0.5)
    assert rewards.counts == (1, 0, 0, 0, 0, 2, 0, 0, 0, 1)
    assert len(rewards.edges) == 11
    assert json.loads(json.dumps(report.as_dict()))["group_sizes"] == {"1": 2, "2": 1}
    assert report.as_dict()["context"] == 192  # 19 tokens and 128, in steps of 64


def test_all_faults_are_counted_and_the_first_shown(char, write, tmp_path):
    path = write(*[{"text": i} for i in range(30)], "{", SAMPLES)
    report = check([path, tmp_path / "none.csv"], char)
    assert (report.faults, report.trajectories, report.ok) == (32, 2, False)
    assert len(report.first_faults) == MAX_FAULTS_SHOWN
    assert report.first_faults[1] == f"{path}:2: column 'text': expected text, found 1"


def test_rows_without_rewards_and_unknown_characters_are_counted(char, write):
    judged = [{"prompt": "a", "completion": "b", "reward": 0}, SAMPLES, DIALOGUE]
    judged += [{"prompt": "a", "completion": "b", "label": True}]
    judged += [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    said = [[{"role": "assistant", "content": c, "reward": i}] for i, c in enumerate("bc")]
    judged += [{"prompt": "a", "completions": said, "judged_by": 7}]  # whoever that may be
    plain = [{"prompt": "a", "completion": "b", "score": 1}, {"text": "a", "label": 1}]
    plain += [{"messages": [{"role": "assistant", "content": "中"}]}]
    for rows, unrewarded, unknown in ((judged, 0, 0), (plain, 3, 1), ([*judged, *plain], 3, 1)):
        report = check(write(*rows), char)
        assert (report.faults, report.unrewarded, report.unknown) == (0, unrewarded, unknown)
        shown = Console(width=200, force_terminal=False)
        with shown.capture() as captured:
            render(report, (), char, shown)
        wanted = f"3 of {len(rows)} rows, read as 0 (columns: "
        assert (wanted in captured.get()) == bool(unrewarded)
        assert ("1 texts have characters that" in captured.get()) == bool(unknown)
    assert "score" in report.columns


def test_nothing_at_all(char, write):
    report = check(write(), char)
    assert (report.ok, report.trajectories, report.rewards.counts) == (False, 0, ())
    render(report, report.examples, char, Console(quiet=True))


def test_picture(char, write):
    report = check(write({"text": 1}, DIALOGUE), char)
    console = Console(record=True, width=80, quiet=True)
    render(report, report.examples, char, console)
    text = picture(report.examples[0], char)
    assert text.plain == "<bos>user: q<eot>w<eot>user: o<eot>[-1]"
    styles = {text.plain[s.start : s.end]: s.style for s in text.spans}
    assert (styles["q"], styles["w"], styles["o"]) == ("dim", "green", "blue")
    assert styles["[-1]"] == "bold magenta"
    shown = Console(width=80, force_terminal=False)
    with shown.capture() as captured:
        render(report, report.examples, char, shown)
    assert "data.jsonl:1: column 'text'" in captured.get()
    assert "<bos>user: q<eot>w<eot>user: o<eot>[-1]" in captured.get()


def test_row_form_is_known_before_tokenising(write):
    assert [row_form(r) for r in read_rows(write(SAMPLES, DIALOGUE))] == ["completions", "messages"]


def test_a_long_text_is_shown_with_its_end(char, write):
    rows = [{"prompt": "q", "completion": "a" * 500 + "z", "reward": 1}]
    (example,) = check(write(*rows), char).examples
    shown = picture(example, char).plain
    assert shown.startswith("<bos>q<sep>aaa")
    assert shown.endswith("az<eos>[+1]")
    assert f"a … {len(example.tokens) - 300} tokens … a" in shown


def test_examples_are_of_different_prompts_where_there_are_enough(char, write):
    rows = [SAMPLES, {"prompt": "b", "completion": "a"}, {"prompt": "c", "completion": "a"}]
    prompts = [char.decode(t.prompt) for t in check(write(*rows), char).examples]
    assert prompts == ["a", "b", "c"]
    prompts = [char.decode(t.prompt) for t in check(write(*rows[:2]), char).examples]
    assert prompts == ["a", "a", "b"]
