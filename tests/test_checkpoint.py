from pathlib import Path

import pytest
import torch

from qvgpt import GPT, HeadsConfig, QvgptError, Tokenizer, ValueModel
from qvgpt.checkpoint import (
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    replace_directory,
    save_checkpoint,
)

TOKENIZER = Tokenizer.train(["abc"], "char")
STATE = TrainState(step=3, best=0.1 + 0.2, best_step=2, bad_evals=1, tokens=7, eval={"total": 1e-9})


def make(embed_dim=8):
    model = ValueModel(
        GPT(TOKENIZER.vocab_size, embed_dim, 2, 1, 8), HeadsConfig(num_q=2), TOKENIZER
    )
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(model, optimizer):
    x = torch.randint(0, TOKENIZER.vocab_size, (2, 5))  # draws from the generator, as dropout does
    (model.trunk(x).square().mean() + model.heads.v(torch.rand(1, 8)).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return x


def test_what_is_saved_comes_back_bit_identical(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, STATE)
    expected = step(model, optimizer)
    torch.manual_seed(99)
    other, other_optimizer = make()
    assert load_checkpoint(newest_checkpoint(tmp_path), other, other_optimizer) == STATE
    assert torch.equal(step(other, other_optimizer), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_only_the_newest_is_kept_and_it_is_no_pickle(tmp_path):
    model, optimizer = make()
    (tmp_path / ".staged-step-00000001").mkdir()  # of a killed run
    for number in (1, 2, 10):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=number))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    kinds = {p.suffix for p in newest_checkpoint(tmp_path).iterdir()}
    assert kinds == {".json", ".safetensors"}


def test_a_failure_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = make()
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1))
    monkeypatch.setattr("qvgpt.checkpoint.replace_directory", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=2))
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def test_none_and_another_models(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    model, optimizer = make()
    path = save_checkpoint(tmp_path, model, optimizer, TrainState(step=1))
    with pytest.raises(QvgptError, match="model of another shape"):
        load_checkpoint(path, *make(embed_dim=16))


def test_replace_directory(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "new"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    model, optimizer = make()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".staged-step-00000001").mkdir()  # what a killed run leaves
    save_checkpoint(tmp_path, model, optimizer, STATE)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "notes.txt", "step-00000004"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, damage):
    model, optimizer = make()
    names = []
    for number in (1, 2, 3):
        newest = save_checkpoint(tmp_path, model, optimizer, TrainState(step=number), keep=2)
        names = sorted(p.name for p in newest.iterdir())
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    assert {"manifest.json", "model.safetensors", "optimizer.safetensors"} < set(names)
    for name in names:
        whole = (newest / name).read_bytes()
        damage(newest / name)
        said = []
        assert newest_checkpoint(tmp_path, said.append).name == "step-00000002", name
        assert len(said) == 1
        assert f"skipped {newest}" in said[0]
        assert name in said[0] or name == "manifest.json"
        (newest / name).write_bytes(whole)
    assert newest_checkpoint(tmp_path, said.append) == newest


def test_where_no_checkpoint_is_whole_nothing_begins_anew(tmp_path):
    model, optimizer = make()
    path = save_checkpoint(tmp_path, model, optimizer, TrainState(step=1))
    truncate(path / "model.safetensors")
    with pytest.raises(QvgptError, match=r"model.safetensors has \d+ bytes, not \d+"):
        newest_checkpoint(tmp_path)
