import hashlib
import io
import json
import re
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from qvgpt import RandomWalks, ValueModel
from qvgpt.data.sizes import GPTShape, TokenizerConfig
from qvgpt.fit_options import FitOptions
from qvgpt.model_card import _data, add_evaluation, evaluation, files_of, table, write_card
from qvgpt.models.lora import LoraConfig
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train

ROWS = RandomWalks.draw(0).logged_walks(24, 0)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def trained(folder, console=None, **options):
    data = folder / "walks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {
        "objectives": ["LM", "MonteCarlo"],
        "gpt": GPTShape(embed_dim=16, num_heads=2, num_layers=1, seq_len=24),
        "tokenizer": TokenizerConfig(kind="char"),
        "fit": FitOptions(max_steps=2, batch_size=8),
        **options,
    }
    config = TrainConfig(data=[str(data)], output=str(folder / "model"), **given)
    summary = train(config, console or Console(quiet=True))
    return data, summary, folder / "model" / "README.md"


def test_a_card_says_what_was_learned_from_what(tmp_path):
    data, summary, card = trained(tmp_path, eval_data=[str(tmp_path / "walks.jsonl")])
    text = card.read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["qvgpt"],
    }  # fmt: skip
    assert "# A language model with Q and V\n" in body
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    row = f"| walks.jsonl | {data.stat().st_size:,} | `{digest}` |"
    assert body.count(row) == 2
    assert "24 rows, 24 texts trained on" in body
    for name, x in summary["eval"].items():
        assert f"| loss {name} | {x:.4g} |" in body
    whole = {name: x for name, x in summary["values"].items() if "/" not in name}
    assert {"slope", "rank"} <= whole.keys() < summary["values"].keys()
    for name, x in whole.items():
        assert f"| values: {name} | {x:.4g} |" in body
    assert body.count("| values: ") == len(whole)
    assert "| layers, width, context | 1, 16, 24 |" in body
    assert f"q {summary['parameters']['q']:,}" in body
    assert "| heads | 2 × Q linear, V mlp |" in body
    assert str(tmp_path) not in text


def test_what_a_card_says_of_loading_is_so(tmp_path):
    *_, card = trained(tmp_path)
    [python] = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    found: dict[str, Any] = {"path": str(card.parent)}
    exec(python, found)
    own = ValueModel.from_pretrained(card.parent).eval()
    assert own.tokenizer is not None
    tokens = found["tokenizer"](ROWS[0]["prompt"], add_special_tokens=False)["input_ids"]
    assert tokens == own.tokenizer.encode(ROWS[0]["prompt"])
    x = torch.tensor([own.tokenizer.encode_prompt(ROWS[0]["prompt"])])
    with torch.no_grad():
        torch.testing.assert_close(
            found["model"](x).logits, own.trunk.hidden(x) @ own.trunk.output_weight.T
        )


def test_what_does_not_hold_is_not_said(tmp_path):
    *_, card = trained(tmp_path, objectives=["LM"])
    text = card.read_text()
    assert "# A language model\n" in text
    assert "None: no `eval_data` were given." in text
    assert "no values of its own" in text
    for word in ("β", "heads", "beta"):
        assert word not in text


def test_centred_values_and_judges_are_told(tmp_path, monkeypatch):
    judge = "ab" * 32
    monkeypatch.setattr("test_model_card.ROWS", [{**row, "judged_by": [judge]} for row in ROWS])
    text = trained(tmp_path, centred=True)[-1].read_text()
    assert "differences to the mean" in text
    assert f"`{judge}`" in text


def test_a_card_is_utf8_and_its_tables_hold_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "latin-1")
    write_card(tmp_path, f"---\na: 1\n---\n# β\n\n{table([('a|b', '数|据')])}\n", print)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text.endswith("# β\n\n| | |\n| --- | --- |\n| a\\|b | 数\\|据 |\n")
    file = {"name": "a|b.jsonl", "bytes": 1, "sha256": "0"}
    counts = {"rows": 1, "trajectories": 1, "too_long": 0, "longest": 1, "files": [file]}
    assert "| a\\|b.jsonl | 1 | `0` |" in _data("trained on", counts)


def test_a_readme_of_the_users_stays(tmp_path, monkeypatch):
    import qvgpt.trainer

    fit = qvgpt.trainer.fit

    def fit_while_somebody_writes(*args, **more):
        (more["output"] / "README.md").write_text("# Mine\n")
        return fit(*args, **more)

    monkeypatch.setattr("qvgpt.trainer.fit", fit_while_somebody_writes)
    said = io.StringIO()
    *_, card = trained(tmp_path, Console(file=said, width=1000))
    assert card.read_text() == "# Mine\n"
    assert "# A language model with Q and V" in (card.parent / "README.qvgpt.md").read_text()
    assert "README.md is not ours and stays; the model card is" in said.getvalue()


def test_a_card_of_ours_is_replaced(tmp_path):
    said = []
    for title in ("One", "Two"):
        write_card(tmp_path, f"---\na: 1\n---\n# {title}\n\n## Part\n", said.append)
    assert not said
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    text = (tmp_path / "README.md").read_text()
    assert re.fullmatch(r"---\na: 1\n---\n<!-- written by qvgpt.*-->\n# Two\n\n## Part\n", text)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_an_adapter_says_whose_it_is_and_how_it_is_read(tmp_path):
    _, _, base = trained(tmp_path, objectives=["LM"])
    base = base.parent.rename(tmp_path / "base")
    for objective in ("LM", "MonteCarlo"):
        folder = tmp_path / objective
        folder.mkdir()
        lora = {"model": str(base), "lora": LoraConfig(rank=2), "objectives": [objective]}
        *_, card = trained(folder, gpt=GPTShape(), tokenizer=TokenizerConfig(), **lora)
        text = (card.parent / "adapter" / "README.md").read_text()
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"
        assert "| rank, alpha, dropout | 2, 32, 0 |" in text
        assert "| base | base |" in text
        assert str(tmp_path) not in text
        assert ("--beta" in text) == (objective == "MonteCarlo")
        [python] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        found: dict[str, Any] = {"path": str(card.parent / "adapter"), "base": str(base)}
        exec(python, found)
        own = ValueModel.from_pretrained(card.parent).eval()
        assert own.tokenizer is not None
        x = torch.tensor([own.tokenizer.encode_prompt(ROWS[0]["prompt"])])
        with torch.no_grad():
            torch.testing.assert_close(
                found["model"](x).logits, own.trunk.hidden(x) @ own.trunk.output_weight.T
            )


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("classifier:/a/b c/judge#plus", "classifier:judge#plus"),
        (
            "0.5*classifier:a/b + 0.5*classifier:../c/d:logit",
            "0.5*classifier:b + 0.5*classifier:d:logit",
        ),
        ("classifier:judge/#plus", "classifier:judge/#plus"),
        ("regex:a/b", "regex:a/b"),
        ("command:/home/me/judge.sh --by /x/y", "command:judge.sh --by /x/y"),
        ("json:/home/me/schema.json", "json:schema.json"),
    ],
)
def test_a_card_names_no_place(given, shown):
    row = {
        "method": "base",
        "mean": 1.0,
        "ci95": [0.5, 1.5],
        "delta": 0.0,
        "delta_ci95": [0.0, 0.0],
    }
    lines = evaluation("How.", given, [row]).splitlines()
    assert lines[:2] == ["## Evaluation", "How."]
    assert lines[3] == f"| method | {shown} | difference |"
    assert lines[5] == "| base | 1 [0.5, 1.5] | 0 [0, 0] |"


def test_an_evaluation_replaces_the_one_before_and_nothing_else(tmp_path):
    write_card(tmp_path, "---\n# Title\n\n## Evaluation\nMine.\n\n## Limits\n- some\n", print)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## Appendix\nMine too.\n")
    add_evaluation(tmp_path, "## Evaluation\nfirst")
    once = card.read_text()
    add_evaluation(tmp_path, "## Evaluation\nsecond")
    twice = card.read_text()
    assert once.replace("first", "second") == twice
    for kept in ("## Evaluation\nMine.", "## Appendix\nMine too.", "## Limits\n- some"):
        assert kept in twice
    card.write_bytes(card.read_bytes() + b"\xff")
    add_evaluation(tmp_path, "## Evaluation\nthird")
    assert "third" in card.read_text("utf-8")


def test_the_sum_of_a_directory_sees_names_and_bytes(tmp_path):
    def of(**files):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for name, text in files.items():
            (folder / name).write_text(text)
        [found] = files_of([folder])
        return found

    first = of(a="x", b="yz")
    assert (first["name"], first["bytes"]) == ("data", 3)
    assert of(a="x", b="yz") == first
    assert len({found["sha256"] for found in (first, of(a="x", b="yw"), of(a="x", c="yz"))}) == 3
