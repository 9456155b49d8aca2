from pathlib import Path

import pytest
import torch

from qvgpt import GPT, HeadsConfig, QvgptError, Tokenizer, ValueModel
from qvgpt.checkpoint import (
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    optimizer_state,
    parameter_names,
    replace_directory,
    save_best,
    save_checkpoint,
)
from qvgpt.models.disk import load_tensors

TOKENIZER = Tokenizer.train(["abc"], "char")
STATE = TrainState(step=3, best=0.1 + 0.2, best_step=2, bad_evals=1, tokens=7, eval={"total": 1e-9})


def make(embed_dim=8):
    model = ValueModel(
        GPT(TOKENIZER.vocab_size, embed_dim, 2, 1, 8), HeadsConfig(num_q=2), TOKENIZER
    )
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(model, optimizer):
    x = torch.arange(10).view(2, 5) % TOKENIZER.vocab_size
    (model.trunk(x).square().mean() + model.heads.v(torch.ones(1, 8)).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_is_saved_comes_back_bit_identical(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    save_checkpoint(
        tmp_path, model, optimizer_state(parameter_names(model, optimizer), optimizer), STATE
    )
    step(model, optimizer)
    other, other_optimizer = make()
    assert (
        load_checkpoint(
            newest_checkpoint(tmp_path),
            other,
            parameter_names(other, other_optimizer),
            other_optimizer,
        )
        == STATE
    )
    step(other, other_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_the_optimizer_is_read_by_name_and_its_rates_are_those_of_now(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    path = save_checkpoint(
        tmp_path, model, optimizer_state(parameter_names(model, optimizer), optimizer), STATE
    )
    found = load_tensors(path / "optimizer.safetensors")
    assert "trunk.token_embedding.weight.exp_avg" in found
    assert not [name for name in found if name.startswith("heads.q")]  # no gradient, no state
    other, _ = make()
    backwards = [p for p in other.parameters() if p.requires_grad][::-1]
    groups = [{"params": [p], "peak_lr": 0.3} for p in backwards]
    other_optimizer = torch.optim.AdamW(groups, lr=0.2)
    load_checkpoint(path, other, parameter_names(other, other_optimizer), other_optimizer)
    saved = {p: f"{name}." for name, p in other.named_parameters()}
    for group in other_optimizer.param_groups:
        assert (group["lr"], group["peak_lr"]) == (0.2, 0.3)
        [parameter] = group["params"]
        state = other_optimizer.state.get(parameter, {})
        assert set(state) == {
            name.rpartition(".")[2] for name in found if name.startswith(saved[parameter])
        }
        for key, value in state.items():
            assert torch.equal(value, found[saved[parameter] + key])
    frozen = torch.optim.AdamW(other.heads.v.parameters())
    with pytest.raises(QvgptError, match=r"there trunk\.\S+ was trained, which now it is not"):
        load_checkpoint(path, other, parameter_names(other, frozen), frozen)


def test_only_the_newest_is_kept_and_it_is_no_pickle(tmp_path):
    model, optimizer = make()
    (tmp_path / ".staged-step-00000001").mkdir()  # of a killed run
    for number in (1, 2, 10):
        save_checkpoint(
            tmp_path,
            model,
            optimizer_state(parameter_names(model, optimizer), optimizer),
            TrainState(step=number),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    kinds = {p.suffix for p in newest_checkpoint(tmp_path).iterdir()}
    assert kinds == {".json", ".safetensors"}


def test_a_failure_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = make()
    save_checkpoint(
        tmp_path,
        model,
        optimizer_state(parameter_names(model, optimizer), optimizer),
        TrainState(step=1),
    )
    monkeypatch.setattr("qvgpt.checkpoint.replace_directory", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(
            tmp_path,
            model,
            optimizer_state(parameter_names(model, optimizer), optimizer),
            TrainState(step=2),
        )
    assert newest_checkpoint(tmp_path).name == "step-00000001"


def test_none_and_another_models(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    model, optimizer = make()
    path = save_checkpoint(
        tmp_path,
        model,
        optimizer_state(parameter_names(model, optimizer), optimizer),
        TrainState(step=1),
    )
    other, other_optimizer = make(embed_dim=16)
    with pytest.raises(QvgptError, match="model of another shape"):
        load_checkpoint(path, other, parameter_names(other, other_optimizer), other_optimizer)


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
    save_checkpoint(
        tmp_path, model, optimizer_state(parameter_names(model, optimizer), optimizer), STATE
    )
    save_checkpoint(
        tmp_path,
        model,
        optimizer_state(parameter_names(model, optimizer), optimizer),
        TrainState(step=4),
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "notes.txt", "step-00000004"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = [
    "config.json", "generation_config.json", "manifest.json", "model.safetensors",
    "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer.json",
    "value_config.json", "value_heads.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def three_saved(tmp_path_factory):
    """Three checkpoints of which two are kept."""
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer = make()
    step(model, optimizer)
    for number in (1, 2, 3):
        save_checkpoint(
            folder,
            model,
            optimizer_state(parameter_names(model, optimizer), optimizer),
            TrainState(step=number),
            keep=2,
        )
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000002", "step-00000003"]
    assert sorted(p.name for p in (folder / "step-00000003").iterdir()) == FILES
    return folder


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_as_many_as_said_are_kept(tmp_path, keep):
    model, _ = make()
    for number in range(1, 9):
        save_checkpoint(tmp_path, model, {}, TrainState(step=number), keep)
        assert steps(tmp_path) == list(range(max(1, number - keep + 1), number + 1))


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_what_a_run_did_not_go_on_from_is_not_counted_among_those_to_keep(tmp_path):
    model, _ = make()
    for number in (20, 40, 25):
        save_checkpoint(tmp_path, model, {}, TrainState(step=number), keep=2)
    assert steps(tmp_path) == [20, 25]


def test_a_best_model_stays_as_long_as_a_checkpoint_names_it(tmp_path):
    model, _ = make()
    checkpoints, best = tmp_path / "checkpoints", tmp_path / "best"
    for number, kept in ((1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 4])):
        save_best(best, model, number, checkpoints)
        assert steps(best) == kept
        if number == 2:
            save_checkpoint(checkpoints, model, {}, TrainState(step=2, best=0.1, best_step=2))
    save_checkpoint(checkpoints, model, {}, TrainState(step=5, best=0.1, best_step=4))
    truncate(checkpoints / "step-00000005/trainer.json")
    save_best(best, model, 6, checkpoints)
    assert steps(best) == [6]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_and_named(three_saved, damage, name):
    newest, said = three_saved / "step-00000003", []
    whole = (newest / name).read_bytes()
    damage(newest / name)
    try:
        assert newest_checkpoint(three_saved, said.append).name == "step-00000002"
    finally:
        (newest / name).write_bytes(whole)
    assert len(said) == 1
    assert f"skipped {newest}" in said[0]
    assert name in said[0] or name == "manifest.json"  # a digit of it speaks of another file
    assert newest_checkpoint(three_saved) == newest


def test_where_no_checkpoint_is_whole_nothing_begins_anew(tmp_path):
    model, optimizer = make()
    path = save_checkpoint(
        tmp_path,
        model,
        optimizer_state(parameter_names(model, optimizer), optimizer),
        TrainState(step=1),
    )
    truncate(path / "model.safetensors")
    with pytest.raises(QvgptError, match=r"model.safetensors has \d+ bytes, not \d+"):
        newest_checkpoint(tmp_path)
