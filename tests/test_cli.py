import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from qvgpt.cli import COMMANDS, main
from qvgpt.commands import CheckConfig
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.errors import Terminated

ROWS = RandomWalks.draw(0).logged_walks(40, 0)
YAML = """
data: {data}
output: {output}
tokenizer: {{kind: char}}
gpt: {{embed_dim: 16, num_heads: 2, num_layers: 1, seq_len: 24}}
objectives: [LM, {{ILQL: {{gamma: 1.0}}}}]
fit: {{max_steps: 3, batch_size: 8, lr: 1e-2}}
"""


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A data file, a YAML file and a trained model."""
    folder = tmp_path_factory.mktemp("cli")
    write(folder / "walks.jsonl", *ROWS)
    text = YAML.format(data=folder / "walks.jsonl", output=folder / "unused")
    (folder / "train.yaml").write_text(text)
    assert main(["train", "--config", str(folder / "train.yaml"), f"--output={folder}/model"]) == 0
    return folder


@pytest.fixture
def call(place, tmp_path, capsys):
    """Runs `qvgpt` on words, DATA, YAML, MODEL and OUT being paths; (exit code, stdout, stderr)."""
    paths = {"DATA": place / "walks.jsonl", "YAML": place / "train.yaml", "MODEL": place / "model"}
    paths["OUT"] = tmp_path / "out"

    def run(*words):
        capsys.readouterr()
        code = main([str(paths.get(word, word)) for word in words])
        return code, *capsys.readouterr()

    return run


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def qvgpt(*words, cwd=None):
    program = Path(sys.executable).parent / "qvgpt"
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=100, cwd=cwd)


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_help_imports_no_torch():
    done = qvgpt("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    code = (
        "import sys, qvgpt, qvgpt.cli; qvgpt.__version__; dir(qvgpt); print(*sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert {"torch", "jsonargparse", "rich", "transformers"}.isdisjoint(loaded.stdout.split())


def test_commands_begin_without_what_few_of_them_need():
    """Seconds of imports: torch's compiler, sharded tensors, transformers."""
    code = "import sys, qvgpt.rounds, qvgpt.commands, qvgpt.chat; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    slow = {"torch._dynamo", "torch.distributed.tensor", "transformers", "datasets", "pandas"}
    assert slow.isdisjoint(loaded.stdout.split())


def test_public_names():
    import qvgpt
    import qvgpt.evaluate  # a module of the name of a function: the function must win

    for name in qvgpt.__all__:
        assert getattr(qvgpt, name) is not None
    assert callable(qvgpt.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qvgpt.Nothing


def test_the_program_as_a_user_runs_it(place, tmp_path):
    shutil.copy(place / "walks.jsonl", tmp_path)
    text = YAML.format(data="walks.jsonl", output="run")
    (tmp_path / "train.yaml").write_text(text)
    done = qvgpt("train", "--config", "train.yaml", "--fit.max_steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parameters.trunk" in done.stdout
    assert "warn" not in done.stderr.lower()
    assert summary(tmp_path / "run")["steps"] == 2
    again = qvgpt("train", "--config", "train.yaml", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("qvgpt: error: run: holds another run already;")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_describes_its_options(name, call):
    if importlib.util.find_spec(COMMANDS[name].module) is None:
        pytest.skip("not written yet")
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    assert f"usage: qvgpt {name}" in out
    assert "--config" in out


def test_print_config_and_overrides(call):
    words = "train --print_config --config YAML --fit.lr 3 --objectives LM --heads.kind mlp"
    code, out, _ = call(*words.split())
    assert code == 0
    assert "lr: 3.0" in out
    assert "batch_size: 8" in out
    assert "kind: mlp" in out
    assert "ILQL" not in out


def test_a_dry_run_writes_nothing_and_dashes_are_as_good(call, tmp_path):
    for option in ("--dry-run", "--dry_run", "--dry-run=true"):
        code, out, err = call("train", "--config", "YAML", "--output", "OUT", option)
        assert code == 0
        assert "memory_mib.weights" in out
        fitted, heads, plan = err.splitlines()
        assert fitted.startswith("fitted to the data")
        assert heads == "heads: linear, for 27 tokens (heads.kind says otherwise)"
        assert plan.startswith("fits: ")
        assert not (tmp_path / "out").exists()
    code, out, _ = call("train", "--config", "YAML", "--on-too-long", "cut", "--print-config")
    assert (code, "on_too_long: cut" in out) == (0, True)


# what is typed → what is said
MISTYPED = [
    ("trian", "unknown command 'trian' (did you mean 'train'?)"),
    ("train --config nowhere.yaml", "nowhere.yaml: no such file"),
    ("train --config YAML --fit.lrr 3", "--fit.lrr (did you mean '--fit.lr'?)"),
    ("train --config YAML --lr 3", "--lr (did you mean '--fit.lr'?)"),
    ("train --config YAML --batch_sise 3", "(did you mean '--fit.batch_size'?)"),
    ("train --config YAML --fit.lr much", "fit.lr: expected a number or null, found much"),
    ("train --config YAML --fit.epochs 0", "fit.epochs: must be more than 0"),
    ("train --config YAML --heads.kind mpl", "heads.kind: expected 'linear' or 'low_rank' or"),
    ("train --config YAML --heads mlp", "heads: expected keys (kind, rank, num_q"),
    ("train --config YAML --heads.rank x", "heads.rank: expected a whole number, found x\n"),
    ("train --config YAML --lora.rank 0", "error: lora.rank: must be at least 1, not 0\n"),
    ("train --config YAML --gpt big", "gpt: expected keys (embed_dim, num_heads"),
    ("train --config YAML --on_too_long x", "on_too_long: expected 'error' or 'drop' or 'cut'"),
    ("train --config YAML --objectives ILQ", "unknown method 'ILQ' (did you mean 'ILQL'?)"),
    ("train --config YAML --objectives ilql", "unknown method 'ilql' (did you mean 'ILQL'?)"),
    ("train --config YAML --Fit.LR 3", "--Fit.LR (did you mean '--fit.lr'?)"),
    ("train --config YAML x", "unexpected argument 'x'"),
    ("train --config YAML --fit.lr", "--fit.lr: expected a value"),
    ("train --data DATA", "--output: missing"),
    ("check", "DATA: missing"),
    ("generate nowhere --prompt c", "nowhere: no such directory"),
    ("generate MODEL", "give either --prompt or --data"),
    ("generate MODEL --prompt c --n 0", "n, max_tokens and max_batch must be at least 1"),
    ("generate MODEL --prompt c --max_tokens 0", "n, max_tokens and max_batch must be at least 1"),
    ("generate MODEL --prompt c --top_p 2", "top_p must lie in (0, 1]"),
    ("score MODEL", "--data: missing"),
    ("export MODEL --output OUT", "recommends no beta"),
    ("export MODEL --output OUT --to onnx", "to: expected 'hf' or 'lora' or 'gguf'"),
    ("export MODEL --output OUT --to critic --beta 1", "a critic holds V alone"),
    ("export MODEL --output OUT --beta 1 --dtype q8_0", "hf holds float32"),
]


@pytest.mark.parametrize(("words", "message"), MISTYPED)
def test_mistyped(words, message, call):
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith("qvgpt: error: ")
    assert err.count("\n") == 1
    assert message in err


UNKNOWN_KEYS = [
    ("fit: {lrr: 1}", "unknown key 'fit.lrr' (did you mean 'fit.lr'?)"),
    ("lr: 1", "unknown key 'lr' (did you mean 'fit.lr'?)"),
    ("outptu: x", "unknown key 'outptu' (did you mean 'output'?)"),
    ("heads: {knd: mlp}", "unknown key 'heads.knd' (did you mean 'heads.kind'?)"),
    ("zzz: 1", "unknown key 'zzz'\n"),
    ("gpt: 3", "gpt: expected keys (embed_dim, num_heads, num_layers, seq_len, dropout, tied), "),
    ("output: x\nfit: null", "fit: expected keys (epochs, max_steps"),
    ("output: x\nheads: mlp", "heads: expected keys (kind, rank"),
    ("a: [", "broken YAML"),
    ("[]", "expected `key: value` lines"),
]


@pytest.mark.parametrize(("text", "message"), UNKNOWN_KEYS)
def test_a_yaml_key_nobody_knows(text, message, call, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    code, _, err = call("train", "--config", tmp_path / "x.yaml")
    assert code == 2
    assert err.startswith(f"qvgpt: error: {tmp_path}/x.yaml: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_section_may_be_a_file_of_its_own(call, tmp_path):
    (tmp_path / "fit.yaml").write_text("epochs: 0\n")
    (tmp_path / "x.yaml").write_text(f"data: [d]\noutput: o\nfit: {tmp_path}/fit.yaml\n")
    _, _, err = call("train", "--config", tmp_path / "x.yaml")
    assert "fit.epochs: must be more than 0" in err


def unknown(fields):
    return [{"prompt": "b", "completion": "c", **fields}]


BAD_DATA = {
    "missing": (None, "no such file"),
    "empty": ([], "the file is empty"),
    "broken JSON": ([*ROWS[:2], '{"prompt": '], ":3: not JSON"),
    "wrong type": (unknown({"reward": "1"}), ":1: column 'reward': expected a number, found '1'"),
    "half a character": (['{"text": "\\ud800"}'], ":1: column 'text': text with a lone surrogate"),
    "unknown field": (
        unknown({"rewad": 1}),
        ":1: column 'rewad': unknown (did you mean 'reward'?)",
    ),
    "too long": (
        [*ROWS[:2], {"prompt": "b" * 30, "completion": "c"}],
        "1 of 3 texts are longer than max_length 24",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(case, call, tmp_path):
    rows, message = BAD_DATA[case]
    path = tmp_path / "bad.jsonl"
    if rows is not None:
        write(path, *rows)
    code, out, err = call("train", "--config", "YAML", "--data", path, "--output", "OUT")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_another_run(call, place, tmp_path):
    before = {p: p.read_bytes() for p in (place / "model").iterdir()}
    for words in (
        f"train --config YAML --output {place}/model",
        f"train --config YAML --output {place}/model --resume --fit.lr 0.5",
        f"check DATA --output {place}/model",
        f"generate MODEL --prompt b --output {place}/model",
        f"score MODEL --data DATA --output {place}/model",
        f"export MODEL --beta 1 --output {place}/model",
    ):
        code, out, err = call(*words.split())
        assert (code, out) == (2, "")
        assert "choose another output" in err
    assert {p: p.read_bytes() for p in (place / "model").iterdir()} == before


def test_tokenizer_and_model_that_do_not_belong_together(call, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "copy")
    other = tmp_path / "copy" / "tokenizer.json"
    other.write_text(other.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    code, _, err = call("generate", tmp_path / "copy", "--prompt", "b")
    assert code == 2
    assert "tokenizer.json is not the one the values were learned with" in err
    words = f"train --config YAML --model MODEL --output OUT --tokenizer.path {tmp_path}/copy"
    code, _, err = call(*words.split())
    assert code == 2
    assert "is not the tokenizer of" in err
    assert not (tmp_path / "out").exists()


def test_check(call, tmp_path):
    code, out, _ = call("check", "DATA", "--kind", "char", "--max_length", "6", "--output", "OUT")
    assert code == 0
    assert "tokenizer: char, trained on this data" in out
    assert "longer than max_length 6" in out
    assert summary(tmp_path / "out")["rows"] == 40
    code, out, err = call("check", "DATA", "--tokenizer", "MODEL", "--json")
    assert (code, json.loads(out)["faults"], err) == (0, 0, "")
    bad = write(tmp_path / "bad.jsonl", *ROWS[:2], "{")
    code, out, _ = call("check", bad, "DATA")
    assert code == 2
    assert "bad.jsonl:3: not JSON" in out
    assert call("check", "nowhere.jsonl")[0] == 2


def test_generate_streams_one_text(call):
    code, first, err = call("generate", "MODEL", "--prompt", "c", "--beta", "2", "--seed", "3")
    assert (code, err) == (0, "guidance: beta 2, temperature 1\n")
    assert first.endswith("\n")
    assert call("generate", "MODEL", "--prompt", "c", "--beta", "2", "--seed", "3")[1] == first
    code, many, _ = call("generate", "MODEL", "--prompt", "c", "--n", "3", "--max_tokens", "4")
    assert (code, many.count("\n")) == (0, 3)


@pytest.mark.parametrize("prompt", ["# b", "&c", "null", "~", "[a]", "1", '"b"', "", "- b: 'ü😀"])
def test_a_prompt_arrives_as_typed(prompt, call, tmp_path):
    def tokens():  # the model knows few characters, so look at what it is given
        return read(tmp_path / "out" / "completions.jsonl")[0]["prompt"]

    words = ("generate", "MODEL", "--max_tokens", "2", "--output", "OUT")
    code, _, err = call(*words, f"--prompt={prompt}")
    assert (code, tokens()) == (0, prompt), err
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "x.yaml").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False))
    assert call(*words, "--config", tmp_path / "x.yaml")[0] == 0
    assert tokens() == prompt
    code, out, _ = call("generate", "MODEL", "--print_config", f"--prompt={prompt}")
    (tmp_path / "y.yaml").write_text(out)
    shutil.rmtree(tmp_path / "out")
    assert call("generate", "--config", tmp_path / "y.yaml", "--output", "OUT")[0] == 0
    assert tokens() == prompt


def test_generate_says_which_guidance_it_uses(call, place, tmp_path):
    hint = "; the model has values: try --beta"
    lines = {"": f"none (beta 0), temperature 1{hint}",
             "--temperature 0 --top_k 3": f"none (beta 0), temperature 0, top_k 3{hint}",
             "--beta 0": "none (beta 0), temperature 1"}  # fmt: skip
    for words, line in lines.items():
        _, _, err = call(*f"generate MODEL --prompt b {words}".split())
        assert err == f"guidance: {line}\n"
    folder = shutil.copytree(place / "model", tmp_path / "m")
    config = json.loads((folder / "value_config.json").read_text())
    config["recommended_guidance"] = {"beta": 8}
    (folder / "value_config.json").write_text(json.dumps(config))
    _, _, err = call("generate", folder, "--prompt", "b")
    assert err == "guidance: beta 8, temperature 1 (recommended by the model)\n"
    _, _, err = call("generate", folder, "--prompt", "b", "--temperature", "0.5")
    said = "guidance: beta 8, temperature 0.5 (recommended by the model but for temperature)\n"
    assert err == said


BAD_GUIDANCE = [
    ({"bta": 1}, ": unknown key 'bta' (did you mean 'beta'?)"),
    ({"beta": "8"}, ".beta: '8' is of the wrong type"),
    ({"top_k": 2.5}, ".top_k: 2.5 is of the wrong type"),
    ({"top_p": 3}, ": guidance: top_p must lie in (0, 1]"),
    ([1], ": an object was expected, not [1]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_GUIDANCE)
def test_a_bad_recommended_guidance_is_named(bad, message, call, place, tmp_path):
    from qvgpt.decode.guided_head import load_guided
    from qvgpt.errors import QvgptError

    folder = shutil.copytree(place / "model", tmp_path / "m")
    config = json.loads((folder / "value_config.json").read_text())
    (folder / "value_config.json").write_text(json.dumps(config | {"recommended_guidance": bad}))
    expected = f"{folder}/value_config.json: recommended_guidance{message}"
    for words in (("generate", folder, "--prompt", "b"), ("export", folder, "--output", "OUT")):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"qvgpt: error: {expected}")
        assert err.count("\n") == 1
    with pytest.raises(QvgptError) as caught:
        load_guided(folder)
    assert str(caught.value).startswith(expected)


def test_generate_shows_values(call):
    code, out, _ = call("generate", "MODEL", "--prompt", "c", "--values", "--top_k", "5")
    assert code == 0
    assert "advantage" in out


def test_generate_writes_rows_that_can_be_trained_on(call, tmp_path):
    words = "generate MODEL --data DATA --n 2 --max_tokens 6 --output OUT --temperature 0.5"
    code, out, _ = call(*words.split())
    assert (code, out) == (0, "")
    rows = read(tmp_path / "out" / "completions.jsonl")
    assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in ROWS]
    assert set(rows[0]) >= {"prompt", "completion", "completion_ids", "logprob", "truncated"}
    assert all(row["logprob"] < 0 and len(row["completion_ids"]) <= 6 for row in rows)
    found = summary(tmp_path / "out")
    assert found["tokens"] == sum(len(row["completion_ids"]) for row in rows)
    assert found["guidance"]["temperature"] == 0.5
    code, out, _ = call("check", tmp_path / "out" / "completions.jsonl", "--tokenizer", "MODEL")
    assert code == 0


def test_prompts_longer_than_the_context_are_counted(call, tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "b"}, {"prompt": "b" * 30}, {"prompt": "c" * 22})
    code, out, err = call("generate", "MODEL", "--data", path)
    assert (code, out) == (2, "")
    assert (
        "2 of 3 prompts (the longest has 32 tokens) leave less than 1 in the context of 24" in err
    )


def test_recommended_guidance_is_the_default(call, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "copy")
    file = tmp_path / "copy" / "value_config.json"
    config = json.loads(file.read_text())
    config["recommended_guidance"] = {"beta": 4.0, "top_k": 3}
    file.write_text(json.dumps(config))
    words = f"generate {tmp_path}/copy --prompt c --top_k 0 --output OUT"
    assert call(*words.split())[0] == 0
    used = summary(tmp_path / "out")["guidance"]
    assert (used["beta"], used["top_k"]) == (4.0, None)


def test_score_ranks_within_each_prompt(call, tmp_path):
    code, out, _ = call("score", "MODEL", "--data", "DATA", "--output", "OUT", "--show", "2")
    assert code == 0
    assert "advantage" in out
    rows = read(tmp_path / "out" / "scores.jsonl")
    assert len(rows) == 40
    for before, after in pairwise(rows):
        if before["prompt"] == after["prompt"]:
            assert before["advantage"] >= after["advantage"]
            assert after["rank"] == before["rank"] + 1
    assert summary(tmp_path / "out")["texts"] == 40


def test_export(call, tmp_path):
    code, out, _ = call("export", "MODEL", "--to", "hf", "--output", "OUT", "--beta", "2")
    assert code == 0
    assert "beta" in out
    assert summary(tmp_path / "out")["beta"] == 2.0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_export_for_llama_cpp_and_as_a_critic(call, tmp_path, monkeypatch):
    monkeypatch.setattr("qvgpt.export.source._TO_FIT", 16)
    words = "export MODEL --to gguf --beta 2 --dtype float16 --value_rows --data DATA --output OUT"
    code, out, _ = call(*words.split(), "--max_prompts", "8")
    assert code == 0
    assert "fidelity.mean_kl" in out
    assert summary(tmp_path / "out")["value_rows"]["tokens"] == ["<|value_zero|>", "<|value|>"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "export.json", "model.gguf", "summary.json",
    ]  # fmt: skip
    words = f"export MODEL --to critic --data DATA --output {tmp_path}/critic"
    assert call(*words.split())[0] == 0
    assert "r2" in summary(tmp_path / "critic")["fidelity"]


@pytest.mark.parametrize(("kind", "expected"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ctrl_c_is_130_and_sigterm_143(kind, expected, call, monkeypatch):
    def interrupted(*_, **__):
        raise kind("; step 2 is in run/checkpoints: go on with --resume")

    monkeypatch.setattr("qvgpt.trainer.fit", interrupted)
    code, out, err = call("train", "--config", "YAML", "--output", "OUT")
    assert (code, out) == (expected, "")
    said = err.splitlines()[-1]
    assert said == "qvgpt: interrupted; step 2 is in run/checkpoints: go on with --resume"


@pytest.mark.parametrize("has_begun", [True, False])
def test_ctrl_c_says_how_to_go_on(has_begun, call, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        if has_begun:
            (tmp_path / "out").mkdir()
            (tmp_path / "out/run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("qvgpt.evaluate"), "_read", interrupted)
    words = f"evaluate --model m --data d --reward bleu --output {tmp_path}/out"
    code, _, err = call(*words.split())
    ways = f"; what is done is in {tmp_path}/out: go on with --resume" if has_begun else ""
    assert (code, err) == (130, f"qvgpt: interrupted{ways}\n")


def test_check_keeps_nothing_to_go_on_with(call, monkeypatch, tmp_path):
    def interrupted(_: CheckConfig):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("qvgpt.commands"), "check", interrupted)
    assert call("check", "d", "--output", f"{tmp_path}/out") == (130, "", "qvgpt: interrupted\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_line(call, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = call("train", "--config", "YAML", "--output", "OUT")
    assert code == 2
    assert "Permission denied" in err


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "MODEL", "--prompt", "ab", "--max_tokens", "3"),
        ("score", "MODEL", "--data", "DATA"),
        ("collect", "--model", "MODEL", "--data", "DATA", "--reward", "chrf", "--samples", "1",
         "--max_tokens", "3", "--limit", "3", "--output", "OUT"),
        ("evaluate", "--model", "MODEL", "--data", "DATA", "--reward", "chrf", "--betas", "1",
         "--samples", "1", "--max_tokens", "3", "--limit", "3", "--output", "OUT"),
    ],
)  # fmt: skip
def test_a_model_is_read_in_bfloat16_onto_a_device(words, call, monkeypatch):
    read = []
    monkeypatch.setattr(
        "qvgpt.models.causal_lm.CausalLM._try", lambda self: read.append(self.output_weight)
    )
    code, _, err = call(*words, "--dtype", "bfloat16", "--device_map", "cpu")
    assert (code, [(w.dtype, w.device.type) for w in read]) == (0, [(torch.bfloat16, "cpu")]), err
    code, out, err = call(*words, "--dtype", "float8")
    assert (code, out) == (2, "")
    assert err == (
        "qvgpt: error: dtype: expected 'float32' or 'bfloat16' or 'auto', found float8\n"
    )


def test_adapters_are_trained_by_options(call, tmp_path):
    words = ("train", "--config", "YAML", "--model", "MODEL", "--output", "OUT")
    code, _, err = call(*words, "--lora.rank", "2", "--lora.target_modules", "c_attn", "c_proj")
    assert code == 0, err
    said = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert said["r"] == 2
    assert {name.rpartition(".")[2] for name in said["target_modules"]} == {"c_attn", "c_proj"}
    code, out, err = call(*words, "--lora.rank", "0")
    assert (code, out) == (2, "")
    assert "lora.rank: must be at least 1, not 0" in err


def test_the_best_of_several_texts_is_written(call):
    words = ["generate", "MODEL", "--prompt", "b", "--max_tokens", "6", "--seed", "1"]
    texts = [
        call(*words, *more) for more in ([], ["--best_of", "4"], ["--best_of", "4", "--n", "2"])
    ]
    assert [code for code, _, _ in texts] == [0, 0, 0]
    assert "try --beta" in texts[0][2]
    assert "guidance: none (beta 0), best of 4 by Q, temperature 1\n" in texts[1][2]
    assert texts[2][1].startswith(texts[1][1])
    assert texts[0][1] != texts[1][1]
    assert call(*words, "--best_of", "0")[0] == 2


def test_texts_are_searched_for(call, tmp_path):
    """By name or with options; what was read is said."""
    words = ["generate", "MODEL", "--prompt", "b", "--max_tokens", "6", "--seed", "1"]
    found = {}
    for i, search in enumerate(
        ("block", "{block: {samples: 1}}", "tree", "{beam: {beams: 1}}", "{block: {keep: 1}}")
    ):
        output = tmp_path / f"found-{i}"
        code, out, err = call(*words, "--search", search, "--output", str(output))
        assert code == 0, err
        assert re.search(
            r"guidance: none \(beta 0\), (block|tree|beam) search.*, temperature 1", err
        )
        said = json.loads((output / "summary.json").read_text())
        found[search] = out, said["forward_tokens_per_token"]
    code, greedy, _ = call(*words, "--temperature", "0")
    code, sampled, _ = call(*words)
    code, chosen, _ = call(*words, "--best_of", "8")
    assert found["{beam: {beams: 1}}"][0] == greedy
    assert found["{block: {samples: 1}}"][0] == sampled
    assert found["{block: {keep: 1}}"][0] == chosen
    assert found["{block: {samples: 1}}"][1] < found["block"][1] / 4
    for wrong, message in (
        (["--search", "three"], r"unknown search 'three' \(did you mean 'tree'\?\)"),
        (["--search", "{tree: {simulations: 0}}"], "simulations must be at least 1"),
        (["--search", "tree", "--n", "2"], "finds one text a prompt: n must be 1"),
        (["--search", "block", "--best_of", "2"], "both choose: give one of them"),
        (["--search", "beam", "--temperature", "0"], "beam search has no temperature"),
        (["--search", "tree", "--temperature", "0.5"], "tree search has no temperature"),
    ):
        code, out, err = call(*words, *wrong)
        assert (code, out) == (2, "")
        assert re.search(message, err), err


def test_each_prompt_is_searched_as_far_as_it_has_room(call, tmp_path):
    """In the order of the file, whatever is searched together."""
    prompts = ["b", "b" * 20, "c"]
    write(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in prompts))
    long = "{beam: {length_penalty: 9}}"
    words = ["--data", tmp_path / "prompts.jsonl", "--search", long, "--output", "OUT"]
    code, _, err = call("generate", "MODEL", *words)
    assert code == 0, err
    rows = read(tmp_path / "out/completions.jsonl")
    assert [row["prompt"] for row in rows] == prompts
    assert [len(row["completion_ids"]) for row in rows] == [21, 2, 21]


def test_rounds_take_the_options_of_their_parts(call, place, tmp_path):
    write(tmp_path / "prompts.jsonl", *({"prompt": letter} for letter in "bc"))
    (tmp_path / "rounds.yaml").write_text(
        f"{{model: {place}/model, data: {tmp_path}/prompts.jsonl, reward: length, beta: 1,"
        " collect: {samples: 2, max_tokens: 6},"
        " train: {objectives: [LM, MonteCarlo], fit: {max_steps: 1}}}"
    )
    words = ["rounds", "--config", str(tmp_path / "rounds.yaml"), "--output", "OUT"]
    code, out, err = call(*words, "--train.fit.batch_size", "2")
    assert code == 0, err
    assert "round 2 of 2" in err
    assert "collected" in out
    of = json.loads((tmp_path / "out/round-2/model/run.json").read_text())["config"]
    assert of["fit"]["batch_size"] == 2
    assert of["objectives"] == ["LM", "MonteCarlo"]
    code, _, err = call(*words, "--collect.output", "x")
    assert (code, "holds another run already" in err) == (2, True)
    code, _, err = call(*words[:-1], str(tmp_path / "new"), "--collect.output", "x")
    assert (code, err) == (
        2,
        "qvgpt: error: collect.output: is for the rounds to say; leave it out\n",
    )
