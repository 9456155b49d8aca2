"""Another source of values, named on the command line: it guides, or there is one clear error."""

import json
from pathlib import Path

import pytest
import torch

from qvgpt.cli import main
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import Contrast, HeadValues, PrefixValues, WeightedSum
from qvgpt.guidance_options import GuidanceOptions
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.sampling import load_values

TOKENIZER = Tokenizer.train(["abcdefgh "], "char")
FUDGE = HeadsConfig("categorical", rank=2, bins=2)


def make(seed, heads=None, embed_dim=8, tokenizer=TOKENIZER, seq_len=32):
    torch.manual_seed(seed)
    gpt = GPT(tokenizer.vocab_size, embed_dim, 2, 1, seq_len=seq_len)
    model = ValueModel(gpt, heads, tokenizer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories by name: lm is to be guided."""
    v_alone = make(4, FUDGE)
    with torch.no_grad():
        for head in (*v_alone.heads.q, *v_alone.heads.target_q):
            head.weight.zero_()
    made = {
        "lm": make(0, embed_dim=16), "small": make(1), "plus": make(2),
        "q": make(3, HeadsConfig()), "v": v_alone, "nothing": v_alone,
        "foreign": make(5, HeadsConfig(), tokenizer=Tokenizer.train(["ABCDEFGH "], "char")),
        "short": make(6, HeadsConfig(), seq_len=8), "own": make(7, HeadsConfig(), embed_dim=16),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.info.objectives = [{"FUDGE": {}}] if name == "v" else []
        if name == "own":
            model.info.recommended_guidance = {"beta": 1.0, "temperature": 0.5}
        model.save(folder / name)
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "completion": "a b"}) + "\n" for p in ("ab", "c", "d e"))
    )
    return folder


@pytest.fixture
def call(models, tmp_path, capsys, monkeypatch):
    """Runs `qvgpt`, directories by name, OUT a new one; (exit code, stdout, stderr)."""
    monkeypatch.chdir(models)
    monkeypatch.setattr("os.fsync", lambda _: None)

    def run(words):
        capsys.readouterr()
        code = main([word.replace("OUT", str(tmp_path / "out")) for word in words.split()])
        return code, *capsys.readouterr()

    return run


def test_directories_become_sources(models):
    model = ValueModel.from_pretrained(models / "lm")
    path = {name: str(models / name) for name in ("lm", "q", "v", "plus", "small", "own")}

    def load(values=(), contrast=(), weights=()):
        return load_values(model, path["lm"], values, contrast, weights)

    assert load() is None
    assert isinstance(load([path["q"]]), HeadValues)
    prefix = load([path["v"]])
    assert isinstance(prefix, PrefixValues)
    assert prefix.log
    contrast = load((), [path["plus"], path["lm"]])
    assert isinstance(contrast, Contrast)
    assert contrast.minus is model  # read once
    summed = load([path["q"], path["v"]], [path["plus"], path["small"]], [1.0, 2.0, -0.5])
    assert isinstance(summed, WeightedSum)
    assert [w for w, _ in summed.terms] == [1.0, 2.0, -0.5]
    kinds = [type(source) for _, source in summed.terms]
    assert kinds == [HeadValues, PrefixValues, Contrast]
    both = load([path["q"], path["v"]])
    assert [w for w, _ in both.terms] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--beta 3 --value_models q", "beta 3, temperature 1; values: Q, from q"),
        ("--beta 3 --value_models v", "values: log of V after each candidate, from v"),
        ("--beta 3 --contrast plus small", "values: log π₊ − log π₋, from plus, small"),
        ("--kl_budget 0.2 --top_k 9 --value_models q", "temperature 1, top_k 9, kl_budget"),
        ("--beta 3 --value_models q v --weights 1 0.5", "1·(Q) + 0.5·(log of V"),
    ],
)  # fmt: skip
def test_generate_is_guided_by_others_and_says_so(call, models, options, said):
    code, out, err = call(f"generate lm --prompt ab --max_tokens 20 --n 5 {options}")
    assert code == 0
    assert said in err
    plain = call("generate lm --prompt ab --max_tokens 20 --n 5")[1]
    assert out != plain
    if "--value_models q" in options and "--beta" in options and "weights" not in options:
        model, other = (ValueModel.from_pretrained(models / n) for n in ("lm", "q"))
        prompt = model.tokenizer.encode_prompt("ab")
        texts = generate(model, [prompt] * 5, Guidance(beta=3.0), max_tokens=20,
                         values=HeadValues(other))  # fmt: skip
        assert out.splitlines() == [model.tokenizer.decode_completion(t.tokens) for t in texts]


def test_what_is_recommended_is_of_the_models_own_values(call):
    assert "beta 1, temperature 0.5 (recommended" in call("generate own --prompt a")[2]
    other = call("generate own --prompt a --beta 2 --value_models q")[2]
    assert "beta 2, temperature 1; values: Q, from q" in other
    assert "none (beta 0)" in call("generate own --prompt a --beta 0")[2]
    # searches that know no temperature
    beam = call("generate own --prompt a --search beam")[2]
    assert "beta 1, temperature 1 (recommended by the model but for temperature)" in beam
    assert "temperature 0.5" in call("generate own --prompt a --search block")[2]
    # one says how strongly in the place of the other
    budget = call("generate own --prompt a --kl_budget 0.1 --top_k 5")[2]
    assert "temperature 0.5, top_k 5, kl_budget 0.1" in budget
    assert "beta" not in budget.partition("(")[0]


def test_beta_is_in_the_place_of_a_recommended_schedule(models):
    model = ValueModel.from_pretrained(models / "own")
    schedule = {"beta": 8.0, "beta_end": 2.0, "beta_tokens": 4}
    model.info.recommended_guidance = schedule
    assert not GuidanceOptions(beta=0.0).guidance(model, "own", None).guides
    assert GuidanceOptions(beta=1.0).guidance(model, "own", None) == Guidance(beta=1.0)
    assert GuidanceOptions(top_k=3).guidance(model, "own", None) == Guidance(top_k=3, **schedule)
    other = GuidanceOptions(beta=1.0, beta_end=3.0).guidance(model, "own", None)
    assert other == Guidance(beta=1.0, beta_end=3.0, beta_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--value_models q", "by beta or kl_budget, or what"),
        ("--contrast plus small --beta 0", "say how strongly"),
        ("--beta 1 --value_models small", "value_models: small has no value heads"),
        ("--beta 1 --value_models nothing", "nothing: these value heads know V and no Q"),
        ("--beta 1 --value_models foreign", "foreign: another tokenizer"),
        ("--beta 1 --contrast plus foreign", "foreign: another tokenizer"),
        ("--beta 1 --contrast plus", "contrast: two directories, PLUS and MINUS, not 1"),
        ("--beta 1 --contrast plus nowhere", "nowhere: no such directory"),
        ("--beta 1 --value_models q --weights 1 2", "weights: 2 for 1 sources"),
        ("--beta 1 --value_models short --max_tokens 9", "context of 8 of the model of the values"),
        ("--beta 1 --value_models v --top_k 5 --functional soft --kl_budget 1", "leave beta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate lm --prompt ab", "collect --model lm"])
def test_bad_sources_are_one_line_and_leave_nothing(call, tmp_path, command, options, message):
    if command.startswith("collect"):
        command += " --data data.jsonl --reward length --max_tokens 9"
        if "--functional" in options:
            pytest.skip("collect has no functionals")
    code, out, err = call(f"{command} --output OUT {options}")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", ["--value_models q v", "--contrast plus small --kl_budgets 0.1"]
)
def test_evaluate_compares_with_what_others_guide(call, tmp_path, options):
    command = "evaluate --model lm --data data.jsonl --reward length --max_tokens 9 --top_k 9"
    code, _, err = call(f"{command} --samples 2 --betas 2 --output OUT {options}")
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    base, *guided = summary["rows"]
    assert len(guided) == 1 + ("--kl_budgets" in options)
    assert all(row["kl_per_sequence"] > base["kl_per_sequence"] for row in guided)
    assert [row["kl_budget"] for row in guided] == [None, 0.1][: len(guided)]
    assert summary["guided_by"].startswith("log π₊" if "contrast" in options else "1·(Q)")
    assert summary["values"] is None  # those of a sum foretell no return


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model lm --value_models q --betas []",
            "by beta or kl_budget, or what",
        ),
        ("--model lm --value_models q --recommend", "not the model's own values"),
        ("--model own --kl_budgets 0.1", "top_k of at most 64"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(call, tmp_path, options, message):
    code, _, err = call(
        f"evaluate --data data.jsonl --reward length --output OUT --max_tokens 9 {options}"
    )
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", ["--model lm --value_models q", "--model lm --contrast plus small", "--model v"]
)
def test_evaluate_measures_kl_to_a_base_whatever_guides(call, tmp_path, options):
    """To the model itself it is what it is without a base; to another, something else."""
    name = options.split()[1]
    command = "evaluate --data data.jsonl --reward length --max_tokens 9 --top_k 6 --betas 2"
    kl = {}
    for base in ("", f"--base {name}", "--base small"):
        out = f"OUT-{base.partition(' ')[2] or 'none'}"
        code, _, err = call(f"{command} {options} {base} --output {out}")
        assert code == 0, err
        out = out.replace("OUT", str(tmp_path / "out"))
        rows = json.loads((Path(out) / "summary.json").read_text())["rows"]
        kl[base] = [row["kl_per_sequence"] for row in rows]
    none, itself, other = kl.values()
    assert itself == pytest.approx(none, abs=1e-4)
    assert abs(other[1] - none[1]) > 0.05


def test_score_reads_any_values(call, models, tmp_path):
    """Σ A of the file is what the engine's reports would add up to; ranks follow it."""
    command = "score lm --data data.jsonl"
    code, out, err = call(command)
    assert (code, out) == (2, "")
    assert "lm: has no value heads to score with; --value_models or --contrast name other" in err
    expected = {
        "--value_models q": "Q",
        "--value_models v": "log of V after each candidate",
        "--contrast plus small": "log π₊ − log π₋",
        "--value_models q --contrast plus small --weights 1 0.5": "1·(Q) + 0.5·(log π₊ − log π₋)",
    }
    found = {}
    for i, (options, said) in enumerate(expected.items()):
        code, out, err = call(f"{command} {options} --output OUT-{i}")
        assert code == 0, err
        assert "advantage" in out
        assert json.loads((tmp_path / f"out-{i}/summary.json").read_text())["values"] == said
        lines = (tmp_path / f"out-{i}/scores.jsonl").read_text().splitlines()
        found[options] = {(row := json.loads(x))["prompt"]: row["advantage"] for x in lines}
    q, _, contrast, both = found.values()
    for prompt, total in both.items():
        assert total == pytest.approx(q[prompt] + 0.5 * contrast[prompt], abs=1e-4)
    code, out, err = call("score nothing --data data.jsonl")
    assert (code, out) == (2, "")
    assert "know V and no Q" in err
    code, _, err = call(f"{command} --value_models short")
    assert "texts are longer than the context, 8" in err
    assert code == 2


def test_collect_samples_and_searches_with_what_others_guide(call, tmp_path):
    command = "collect --model lm --data data.jsonl --reward length --max_tokens 9 --samples 3"
    code, _, err = call(f"{command} --beams 2 --beta 3 --contrast plus small --output OUT")
    assert code == 0, err
    rows = [json.loads(x) for x in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    call(f"{command} --beams 2 --output OUT-2")
    plain = [json.loads(x) for x in (tmp_path / "out-2" / "data.jsonl").read_text().splitlines()]
    for ours, theirs in zip(rows, plain, strict=True):
        assert len(ours["completions"]) == 5
        assert ours["completion_ids"][3:] != theirs["completion_ids"][3:]
    assert [r["completions"][:3] for r in rows] != [r["completions"][:3] for r in plain]


def test_a_recommended_budget_cannot_be_exported(call, models):
    model = ValueModel.from_pretrained(models / "own")
    model.info.recommended_guidance = {"kl_budget": 0.1, "top_k": 9, "beta": 0.0}
    model.save(models / "budget")
    code, _, err = call("export budget --output OUT")
    assert code == 2
    assert "recommends a beta of each token" in err
    code, _, err = call("generate budget --prompt a")
    assert code == 0
    assert "top_k 9, kl_budget 0.1 (recommended" in err
