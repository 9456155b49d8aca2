"""Collecting: what is written reads back as it was sampled, and survives being stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvgpt import collect as collecting
from qvgpt.collect import CollectConfig, collect
from qvgpt.data.rows import load_trajectories
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.beam import BeamSearch
from qvgpt.envs.rewards import bleu_prefixes, get_reward
from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.run import alone_in

PAIRS = [("ab", "a a b"), ("c", "c b"), ("d e", "h"), ("f", "f g h a"), ("gh", "b"), ("e", "c d")]


@pytest.fixture
def task(tmp_path) -> CollectConfig:
    tokenizer = Tokenizer.train(["abcdefgh "], "char")
    torch.manual_seed(0)
    gpt = GPT(tokenizer.vocab_size, embed_dim=16, num_heads=2, num_layers=1, seq_len=32)
    ValueModel(gpt, HeadsConfig(), tokenizer).save(tmp_path / "model")
    rows = [{"prompt": p, "completion": c, "topic": i} for i, (p, c) in enumerate(PAIRS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CollectConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "in.jsonl"),
        reward="chrf",
        output=str(tmp_path / "out"),
        samples=4,
        max_tokens=8,
        max_batch=1,  # two prompts a chunk
    )


def read(config: CollectConfig) -> list[dict]:
    lines = (Path(config.output) / "data.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_read_back_as_sampled(task):
    summary = collect(task)
    tokenizer = Tokenizer.load(task.model)
    trajectories, report = load_trajectories(Path(task.output) / "data.jsonl", tokenizer)
    lines = read(task)
    assert [line["prompt"] for line in lines] == [p for p, _ in PAIRS]
    assert [line["topic"] for line in lines] == list(range(6))
    assert lines[0]["references"] == ["a a b"]
    assert report.trajectories == 24
    flat = [(line, i) for line in lines for i in range(len(line["completions"]))]
    for t, (line, i) in zip(trajectories, flat, strict=True):
        prompt = tokenizer.encode_prompt(line["prompt"])
        assert t.tokens == prompt + line["completion_ids"][i]
        assert t.prompt == tuple(prompt)
        assert t.total_reward == line["rewards"][i]
        assert t.reward[-1] == line["rewards"][i]
        ended = t.tokens[-1] in tokenizer.template.end_ids
        assert line["length_limited"][i] is not ended
        assert t.terminated  # the reward is final, cut or not
        assert get_reward("chrf")([line["completions"][i]], [line]) == [line["rewards"][i]]
    assert {True, False} == {cut for line in lines for cut in line["length_limited"]}
    assert (summary["prompts"], summary["samples"]) == (6, 24)
    assert summary["tokens"] == sum(len(ids) for line in lines for ids in line["completion_ids"])
    assert 0 < summary["length_limited_share"] < 1
    assert 0 < summary["reward_std_within_prompt"] < summary["reward_std"]
    assert json.loads((Path(task.output) / "summary.json").read_text()) == summary


@pytest.mark.parametrize("brevity", [True, False])
def test_shaped_rewards_sum_to_the_metric(task, brevity):
    task = replace(task, reward="bleu", shaped=True, brevity=brevity, include_references=True)
    collect(task)
    for line in read(task):
        scores = get_reward("bleu")(line["completions"], [line] * 5)
        assert [sum(r) for r in line["token_rewards"]] == pytest.approx(scores, abs=1e-12)
        assert [len(r) for r in line["token_rewards"]] == [len(i) for i in line["completion_ids"]]
        assert "rewards" not in line
    trajectories, _ = load_trajectories(
        Path(task.output) / "data.jsonl", Tokenizer.load(task.model)
    )
    given = [r for line in read(task) for r in line["token_rewards"]]
    for t, rewards in zip(trajectories, given, strict=True):
        assert [r for r, a in zip(t.reward, t.is_action, strict=True) if a] == rewards


def test_references_are_added_with_their_own_reward(task):
    collect(replace(task, include_references=True))
    tokenizer = Tokenizer.load(task.model)
    for line, (_, own) in zip(read(task), PAIRS, strict=True):
        assert line["completions"][4:] == [own]
        assert line["completion_ids"][4] == [*tokenizer.encode(own), tokenizer.template.eos]
        assert line["rewards"][4] == pytest.approx(1)
        assert (line["truncated"][4], line["sampled"]) == (False, 4)
    summary = json.loads((Path(task.output) / "summary.json").read_text())
    assert (summary["samples"], summary["references_added"]) == (24, 6)
    assert summary["reward_mean"] < 0.5


def test_a_row_without_a_text_to_add_is_named(task, tmp_path):
    with Path(task.data).open("a") as lines:
        lines.write('{"prompt": "a", "label": true, "completion_ids": [3]}\n')
    with pytest.raises(QvgptError, match=r"in.jsonl:7: column 'completion'"):
        collect(replace(task, include_references=True))
    assert not Path(task.output).exists()


@pytest.mark.parametrize("row", [{}, {"references": []}, {"references": [1]}])
def test_a_row_without_a_text_to_compare_with_is_named(task, row):
    with Path(task.data).open("a") as lines:
        lines.write(json.dumps({"prompt": "a", **row}) + "\n")
    with pytest.raises(QvgptError, match=r"in.jsonl:7: .*to compare with"):
        collect(task)
    assert not Path(task.output).exists()
    if row != {"references": [1]}:  # a reward that compares with nothing needs none
        collect(replace(task, reward="length"))
        assert "references" not in read(task)[-1]


def test_unique_keeps_one_of_each(task, tmp_path):
    greedy = replace(task, temperatures=[0.0, 2.0], samples=6)
    collect(greedy)
    collect(replace(greedy, unique=True, output=str(tmp_path / "unique")))
    for all_, kept in zip(read(greedy), read(replace(greedy, output=str(tmp_path / "unique"))),
                          strict=True):  # fmt: skip
        ids = all_["completion_ids"]
        assert ids[0] == ids[2] == ids[4]  # the greedy ones
        assert kept["completion_ids"] == [x for i, x in enumerate(ids) if x not in ids[:i]]
        assert kept["sampled"] == len(kept["rewards"]) == len(kept["completions"]) <= 4


def test_samples_depend_on_the_seed_alone(task, tmp_path):
    collect(task)
    large = replace(task, max_batch=64, output=str(tmp_path / "large"))
    other = replace(task, seed=1, output=str(tmp_path / "other"))
    collect(large)
    collect(other)
    assert read(task) == read(large)
    ids = [[line["completion_ids"] for line in read(c)] for c in (task, other)]
    assert all(one != two for one, two in zip(*ids, strict=True))


@pytest.mark.parametrize(
    "left", ["nothing", "half a line", "a line and a half", "a chunk", "a chunk and a half line"]
)
def test_a_stopped_collection_goes_on_to_the_same_file(task, tmp_path, monkeypatch, left):
    collect(task)
    whole = (Path(task.output) / "data.jsonl").read_bytes()
    stopped = replace(task, output=str(tmp_path / "stopped"))
    chunks = []

    def stop_after_one(*args, **kwargs):
        chunks.append(args)
        if len(chunks) == 2:
            raise KeyboardInterrupt
        return collecting_write(*args, **kwargs)

    collecting_write = collecting.write_best
    monkeypatch.setattr(collecting, "write_best", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        collect(stopped)
    monkeypatch.undo()
    file = tmp_path / "stopped" / "data.jsonl"
    assert whole.startswith(file.read_bytes())
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(file.read_bytes()) == ends[1]
    keep = {
        "nothing": 0,
        "half a line": ends[0] // 2,
        "a line and a half": (ends[0] + ends[1]) // 2,
        "a chunk": ends[1],
        "a chunk and a half line": (ends[1] + ends[2]) // 2,
    }
    file.write_bytes(whole[: keep[left]])
    with pytest.raises(QvgptError, match="resume"):
        collect(stopped)
    summary = collect(replace(stopped, resume=True))
    assert file.read_bytes() == whole
    assert summary["samples"] == 24
    again = collect(replace(stopped, resume=True))  # nothing is left to do
    assert file.read_bytes() == whole
    assert again["tokens"] == summary["tokens"]


def test_one_process_collects_at_a_time(task):
    collect(task)
    with alone_in(Path(task.output)), pytest.raises(QvgptError, match="another process"):
        collect(replace(task, resume=True))


def test_resume_notices_other_data(task):
    collect(task)
    Path(task.data).write_text('{"prompt": "h", "completion": "x"}\n' * 6)
    before = (Path(task.output) / "data.jsonl").read_bytes()
    with pytest.raises(QvgptError, match="another prompt"):
        collect(replace(task, resume=True))
    assert (Path(task.output) / "data.jsonl").read_bytes() == before


def test_prompts_with_other_references_in_other_rows_are_said(task, capsys):
    rows = [{"prompt": "h", "completion": c} for c in "xxy"] + [{"prompt": "a", "completion": "b"}]
    for some, said in ((rows[:2], False), (rows, True)):
        Path(task.data).write_text("".join(json.dumps(row) + "\n" for row in some))
        collect(replace(task, output=f"{task.output}-{said}"))
        found = "1 prompts stand in several rows with other references" in capsys.readouterr().err
        assert found == said


def test_resume_notices_other_references_and_metadata(task):
    rows = [{"prompt": "h", "completion": "x", "note": "\ud83d"}] * 2  # half a character
    Path(task.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect(task)
    assert [line["note"] for line in read(task)] == ["\ud83d"] * 2
    for other, name in (({"completion": "y"}, "references"), ({"note": ""}, "note")):
        changed = [{**row, **other} for row in rows]
        Path(task.data).write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(QvgptError, match=rf"data.jsonl:1: another {name} than now"):
            collect(replace(task, resume=True))


def test_what_makes_no_sense_is_refused_before_anything_is_written(task):
    for change, message in (
        ({"samples": 0}, "samples"),
        ({"temperatures": []}, "temperatures"),
        ({"max_tokens": 40}, "6 of 6 prompts"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"max_batch": 0}, "max_batch"),
        ({"limit": -1}, "limit"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperatures": [1.0, -1.0]}, "temperature must be finite"),
        ({"as_chat": True}, "as_chat is for a server"),
        ({"api_key_env": "KEY"}, "api_key_env is for a server"),
    ):
        with pytest.raises(QvgptError, match=message):
            collect(replace(task, **change))
    assert not Path(task.output).exists()


def test_beams_join_the_samples_and_samples_judge(task):
    base = replace(task, reward="bleu", beams=3, length_penalty=1.5, samples=3)
    collect(replace(base, compare_with="samples"))
    model = ValueModel.from_pretrained(task.model)
    search = BeamSearch(3, 1.5, task.max_tokens)
    for line in read(task):
        assert line["sampled"] == len(line["completions"]) == 6
        prompt = model.tokenizer.encode_prompt(line["prompt"])
        assert line["completion_ids"][3:] == [h.tokens for h in search(model, [prompt]).texts[0]]
        samples = line["completions"][:3]
        for i, (text, reward) in enumerate(zip(line["completions"], line["rewards"], strict=True)):
            others = [s for j, s in enumerate(samples) if j != i]
            each = [bleu_prefixes([text], {"references": [other]})[0] for other in others]
            assert reward == pytest.approx(sum(each) / len(each))


def test_rewards_by_consensus_can_be_shaped(task):
    how = replace(task, reward="bleu", compare_with="samples", unique=True)
    collect(how)
    whole = [line["rewards"] for line in read(task)]
    shaped = replace(how, shaped=True, brevity=False, output=task.output + "-shaped")
    collect(shaped)
    for rewards, line in zip(whole, read(shaped), strict=True):
        assert [sum(r) for r in line["token_rewards"]] == pytest.approx(rewards)


def test_beams_alone_are_enough(task):
    summary = collect(replace(task, samples=0, beams=2))
    assert summary["samples"] == 12
    assert all(line["sampled"] == len(line["rewards"]) == 2 for line in read(task))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beams": -1}, "beams must be 0 or more"),
     ({"compare_with": "samples", "samples": 1}, "at least 2 samples")],
)  # fmt: skip
def test_senseless_beams_and_judges_are_refused(task, options, message):
    with pytest.raises(QvgptError, match=message):
        collect(replace(task, **options))
    assert not Path(task.output).exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "abc", "label": 1}, "in.jsonl:1: column 'text': .* `qvgpt reward-model`"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "'messages': a whole dialogue"),
    ],
)
def test_rows_without_prompts_are_told_what_to_do(task, row, message):
    Path(task.data).write_text(json.dumps(row) + "\n")
    with pytest.raises(QvgptError, match=message):
        collect(task)
    assert not Path(task.output).exists()
