"""Trunks in bfloat16 and on a device map: what they say, what may be trained, what is saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_hf import TOKENIZER, make_hf
from transformers import AutoModelForCausalLM

from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.export import export_hf
from qvgpt.fit_options import FitOptions
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import LoraConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train
from qvgpt.trajectory import Trajectory, collate

QUIET = Console(quiet=True)
BATCH = collate([Trajectory([1, 9, 2, 10, 11, 3], [False] * 3 + [True] * 3, [0.0] * 6, True)])
PROMPTS = [[1, 12, 7, 20, 2], [1, 12], [1, 30, 8, 8, 8, 17, 21, 9, 2]]


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def make_trunk(family):
    torch.manual_seed(0)
    if family == "gpt":
        return GPT(TOKENIZER.vocab_size, 16, 2, 2, 64)
    return CausalLM(make_hf(family))


@pytest.fixture(params=["gpt", "qwen3", "gemma2"])
def saved(request, tmp_path):
    """A directory with values, all in fp32."""
    model = ValueModel(make_trunk(request.param), HeadsConfig("low_rank", rank=4), TOKENIZER)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.save(tmp_path / "model")
    return tmp_path / "model"


def dtypes(module):
    return {p.dtype for p in module.parameters()}


@torch.no_grad()
def test_the_trunk_is_in_bfloat16_and_the_values_are_not(saved, tmp_path):
    whole = ValueModel.from_pretrained(saved).eval()
    short = ValueModel.from_pretrained(saved, dtype="bfloat16").eval()
    assert (dtypes(short.trunk), dtypes(short.heads)) == ({torch.bfloat16}, {torch.float32})
    expected, found = vars(whole(BATCH)), vars(short(BATCH))
    # rounding may choose another best token
    for name in whole.offers - {"target_q_at_argmax"}:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], atol=0.15, rtol=0.05)
        assert not torch.equal(found[name], expected[name])
    for guidance in (Guidance(2.0, temperature=0.0), Guidance(2.0, top_k=3, twins="min")):
        assert all(text.tokens for text in generate(short, PROMPTS, guidance, max_tokens=8))
    short.save(tmp_path / "short")
    stored = {"auto": torch.bfloat16, "float32": torch.float32}
    for dtype, expected in stored.items():
        again = ValueModel.from_pretrained(tmp_path / "short", dtype=dtype)
        assert dtypes(again.trunk) == {expected}
        for name, value in short.state_dict().items():
            assert torch.equal(again.state_dict()[name], value.to(again.state_dict()[name].dtype))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_no_value(saved, device_map):
    plain = ValueModel.from_pretrained(saved).eval()
    mapped = ValueModel.from_pretrained(saved, device_map=device_map).eval()
    assert isinstance(mapped.trunk, CausalLM)  # GPT-2 too: accelerate knows transformers' alone
    if device_map == "auto" and mapped.device.type != "cpu":
        pytest.skip("there is an accelerator here")
    for name, value in vars(plain(BATCH)).items():
        torch.testing.assert_close(vars(mapped(BATCH))[name], value, atol=1e-5, rtol=1e-5)
    guidance = Guidance(2.0, temperature=0.0)
    ours, theirs = (generate(m, PROMPTS, guidance, max_tokens=8) for m in (plain, mapped))
    assert [text.tokens for text in ours] == [text.tokens for text in theirs]


def test_a_device_map_without_room_is_refused(saved):
    layers = CausalLM.load(saved).model.base_model_prefix
    for device_map in ({"": "disk"}, {layers: "cpu", "lm_head": "disk"}):
        with pytest.raises(QvgptError, match=r"device_map: .* leaves weights on disk"):
            ValueModel.from_pretrained(saved, device_map=device_map)
    with pytest.raises(QvgptError, match="no causal language model can be read"):
        ValueModel.from_pretrained(saved, device_map="no_such_device")


@pytest.fixture
def config(tmp_path):
    make_hf("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    TOKENIZER.save(tmp_path / "base")
    rows = [
        {"prompt": p, "completion": p[::-1], "reward": float(i)}
        for i, p in enumerate(("abc", "bcd", "cde", "xyz"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return TrainConfig(
        data=[str(tmp_path / "rows.jsonl")],
        model=str(tmp_path / "base"),
        output=str(tmp_path / "run"),
        objectives=["MonteCarlo"],
        dtype="auto",
        fit=FitOptions(max_steps=4, epochs=99.0, batch_size=4, lr=1e-2, save_every=2, tau=0.5),
    )


@pytest.mark.parametrize("change", [{"lora": LoraConfig(rank=2)}, {"freeze_trunk": True}])
def test_short_weights_may_stand_beside_what_is_trained(config, tmp_path, change):
    config = replace(config, **change)
    train(config, QUIET)
    was = ValueModel.from_pretrained(config.model, dtype="auto")
    now = ValueModel.from_pretrained(config.output, dtype="auto")
    assert (dtypes(now.trunk), dtypes(now.heads)) == ({torch.bfloat16}, {torch.float32})
    assert not now.heads.are_fresh
    moved = [name for name, p in was.trunk.state_dict().items()
             if not torch.equal(p, now.trunk.state_dict()[name])]  # fmt: skip
    assert bool(moved) == ("lora" in change)
    export_hf(config.output, tmp_path / "plain", beta=1.0)


def test_a_run_in_bfloat16_goes_on_bit_identically(config, tmp_path, monkeypatch):
    for change in ({"lora": LoraConfig(rank=2)}, {"freeze_trunk": True}):
        straight = replace(config, output=str(tmp_path / next(iter(change))), **change)
        train(straight, QUIET)
        halves = replace(straight, output=str(tmp_path / f"{next(iter(change))}-halves"))
        with monkeypatch.context() as patch:
            patch.setattr("qvgpt.run.RunProgress.step", die)
            with pytest.raises(Killed):
                train(halves, QUIET)
        assert [p.name for p in Path(halves.output, "checkpoints").iterdir()] == ["step-00000002"]
        train(replace(halves, resume=True), QUIET)
        one, other = (ValueModel.from_pretrained(c.output) for c in (straight, halves))
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


class Killed(Exception):
    pass


def die(self, at, *_):
    if at == 3:  # the checkpoint of step 2 is there
        raise Killed


def test_adapters_are_in_fp32():
    trunk = CausalLM(make_hf("llama").to(torch.bfloat16))
    trunk.add_lora(LoraConfig(rank=2))
    trained = {p.dtype for p in trunk.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert trunk.hidden(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_what_has_too_few_digits_is_not_trained(config, tmp_path):
    cases = [
        ({}, "dtype: weights of bfloat16 .* add lora or freeze_trunk"),
        ({"dtype": "bfloat16"}, "dtype: weights of bfloat16"),
        ({"model": None}, "dtype: a GPT from scratch has weights of float32"),
    ]
    for change, message in cases:
        with pytest.raises(QvgptError, match=message):
            train(replace(config, **change), QUIET)
        assert not (tmp_path / "run").exists()
