"""The examples for a user's own logs run, each by the command in its first line."""

import json
import re
import runpy
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from qvgpt.cli import main
from qvgpt.data.split import split_rows
from qvgpt.envs.rewards import get_reward

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples/your_logs"
NOTEBOOK = ROOT / "examples/your_own_logs.ipynb"
SMALL = {
    "2_lm": "--fit.max_steps 30 --gpt.embed_dim 32 --gpt.num_layers 1",
    "3_collect": "--limit 20 --samples 3",
    "4_values": "--fit.max_steps 5",
    "5_evaluate": "--limit 16 --betas 4",
    "6_lens": "--rows 2",
    "reward_model": "--rates.epochs 1 --size.width 32 --size.layers 1",
}
VAL = "--data=runs/your_logs/split/val.jsonl", "--output=runs/your_logs/val_samples"
EVALUATED = {
    "model": "from_dialogues",
    "data": "val_dialogues.jsonl",
    "output": "evaluation_dialogues",
}
SMALL |= dict.fromkeys(("rewards", "preferences", "dialogues"), SMALL["2_lm"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the logs, few of them."""
    folder = tmp_path_factory.mktemp("examples")
    runpy.run_path(str(EXAMPLES / "make_logs.py"))["main"](folder / "runs/your_logs", 190, 30)
    return folder


@pytest.fixture
def call(made, monkeypatch, capsys):
    """Runs an example as its first line says, in small; returns what it prints."""
    monkeypatch.chdir(made)
    monkeypatch.setattr("os.fsync", lambda _: None)

    def run(name, *options):
        file = EXAMPLES / f"{name}.yaml"
        first = file.read_text().splitlines()[0]
        _, qvgpt, *words = shlex.split(first)
        assert qvgpt == "qvgpt"
        assert words[1:] == ["--config", str(file.relative_to(ROOT))]
        more = shlex.split(SMALL.get(name.removeprefix("variant_"), ""))
        code = main([words[0], "--config", str(file), *more, *options])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def summary(name):
    return json.loads(Path("runs/your_logs", name, "summary.json").read_text())


def lines(name):
    return Path("runs/your_logs", name).read_text().splitlines()


def prompts(name):
    return {json.dumps(json.loads(line)["prompt"]) for line in lines(name)}


def test_from_logs_to_a_guided_model(call):
    steps = sorted(path.stem for path in EXAMPLES.glob("[0-9]_*.yaml"))
    out = {}
    for name in steps:
        out[name] = call(name)
        if name == "3_collect":  # once more, to see what the values of step 4 are worth
            call(name, *VAL)
    assert [name[:2] for name in steps] == [f"{n}_" for n in range(1, 7)]
    assert re.search(r"faults +│ 0 ", out["1_check"])
    sides = {name: prompts(f"split/{name}.jsonl") for name in ("train", "val", "test")}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) > 150
    assert summary("lm")["eval"]["LM/nll"] < 2.5  # 42 characters: 3.7 for one who knows nothing
    assert summary("samples")["samples"] == 60
    assert summary("values")["data"]["trajectories"] == 60
    assert "ece" in summary("values")["values"]  # on val: the page's signs to go on
    found = summary("evaluation")
    assert (found["metric"], found["prompts"]) == ("exact_match", 16)
    assert [row["beta"] for row in found["rows"]] == [0, 4]
    said = json.loads(Path("runs/your_logs/values/value_config.json").read_text())
    best = max(found["rows"], key=lambda row: row["mean"])  # the base where all are alike
    assert (said["recommended_guidance"] or {"beta": 0})["beta"] == best["beta"]
    assert "<html" in Path("runs/your_logs/lens.html").read_text()


@pytest.mark.parametrize("form", ["rewards", "preferences", "dialogues"])
def test_logs_of_other_forms(call, form):
    file = form.replace("rewards", "rewarded")
    if form != "dialogues":
        places = f"--data=runs/your_logs/{file}.jsonl", f"--output=runs/your_logs/{file}"
        call("1_check", *places)
        held = split_rows(["runs/your_logs/logs.jsonl"], [0.1, 0.1])["val"]  # of all forms alike
        assert not prompts(f"{file}/train.jsonl") & {json.dumps(r.fields["prompt"]) for r in held}
    call(f"variant_{form}")
    found = summary(f"from_{form}")
    assert found["parameters"]["q"] > 0
    rows = lines(f"{file}.jsonl" if form == "dialogues" else f"{file}/train.jsonl")
    assert found["data"]["trajectories"] == len(rows) * (2 if form == "preferences" else 1)
    if form == "dialogues":  # the one that is evaluated on prompts of its own
        places = [f"--{k}=runs/your_logs/{v}" for k, v in EVALUATED.items()]
        call("5_evaluate", *places, "--limit", "4", "--recommend", "false")
        assert summary("evaluation_dialogues")["prompts"] == 4


def test_a_judge_of_what_people_rated(call):
    call("variant_reward_model")
    judge = get_reward("classifier:runs/your_logs/judge#right")
    assert 0 < judge(["2024-02-03"], [{"prompt": "Feb 3, 2024"}])[0] < 1
    assert set(summary("judge")["data"]["of_label"]) == {"wrong", "right"}


def test_the_prompts_of_dialogues_to_evaluate_on_are_in_no_logs(made, monkeypatch):
    monkeypatch.chdir(made)
    asked = {row["prompt"][-1]["content"] for row in map(json.loads, lines("val_dialogues.jsonl"))}
    assert len(asked) > 20
    assert not asked & {json.loads(p) for p in prompts("logs.jsonl")}


def test_every_example_is_run_and_told():
    names = {path.name for path in EXAMPLES.glob("*.yaml")}
    variants = ("rewards", "preferences", "dialogues", "reward_model")
    assert {f"variant_{name}.yaml" for name in variants} < names
    page = (ROOT / "docs/your_logs.md").read_text()
    told = set(re.findall(r"examples/your_logs/(\w+\.yaml)", page))
    assert told == names


def shown(notebook):
    """What each code cell shows, as text."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        "".join(o.get("text", "") or o.data.get("text/html", "") for o in several)
        for several in outputs
    ]


def test_the_notebook_runs(tmp_path, monkeypatch):
    """In its quick form, by a kernel, as its reader would have it."""
    monkeypatch.setenv("QVGPT_QUICK", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = shown(notebook)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=place).execute()
    found = shown(notebook)
    assert "guided, β = 64" in found[-3]
    assert found[-2].count("<p ") == 6
    assert found[-2].count('class="token') > 20
    assert [bool(text) for text in found] == [bool(text) for text in kept]
    assert all("/tmp" not in text for text in kept)
    assert "1900 (completion 1900)" in "".join(kept)  # what is shown is the whole form
