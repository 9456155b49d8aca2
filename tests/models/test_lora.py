"""Adapters beside a frozen model: what is trained, what is saved, and how a run goes on."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from tiny_hf import FAMILIES, TOKENIZER, make_hf
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
from qvgpt.run import RunProgress
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train
from qvgpt.trajectory import Trajectory, collate

QUIET = Console(quiet=True)
TOKENS = torch.tensor([[1, 12, 7, 20, 2, 9, 9, 30]])
LORA = LoraConfig(rank=3, alpha=6)
FIT = FitOptions(max_steps=6, epochs=99.0, batch_size=4, lr=1e-2, save_every=2, tau=0.5)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def base(tmp_path):
    """A directory with a Qwen3, whose LM head is tied to its embedding."""
    return save_base(make_hf("qwen3"), tmp_path / "base")


@pytest.fixture
def config(base, tmp_path):
    rows = [
        {"prompt": p, "completion": p[::-1], "reward": float(i)}
        for i, p in enumerate(("abc", "bcd", "cde", "xyz", "fgh"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return TrainConfig(
        data=[str(tmp_path / "rows.jsonl")],
        model=str(base),
        output=str(tmp_path / "run"),
        objectives=["LM", "MonteCarlo"],
        heads=HeadsConfig("low_rank", rank=4),
        lora=LORA,
        fit=FIT,
    )


def save_base(model, path):
    model.save_pretrained(path)
    TOKENIZER.save(path)
    return path


def adapted(family="qwen3", lora=LORA):
    """A value model whose adapters change what it says."""
    model = ValueModel(CausalLM(make_hf(family)), HeadsConfig("linear"), TOKENIZER)
    model.trunk.add_lora(lora)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def logits(hf):
    with torch.no_grad():
        return hf.eval()(TOKENS).logits


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def state(path):
    return dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


def with_peft(base, adapter):
    """What a user of peft loads."""
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


# peft 0.21 asks transformers 5.23 for this property by its former name; our code never does
PEFT_ITSELF = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


class Killed(Exception):
    pass


def killed_at(step, monkeypatch, config):
    """Start a run and let it end without warning after a step."""
    whole = RunProgress.step

    def kill(self, at, *args):
        whole(self, at, *args)
        if at == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "step", kill)
        with pytest.raises(Killed):
            train(config, QUIET)


@PEFT_ITSELF
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_merged_and_the_adapter_is_pefts(family, tmp_path):
    plain = make_hf(family)
    plain.save_pretrained(tmp_path / "base")
    model = adapted(family)
    ours = logits(model.trunk.model)
    assert (ours - logits(plain)).abs().max() > 0.1
    model.save(tmp_path / "model")
    assert torch.equal(logits(model.trunk.model), ours)  # what was merged is a copy
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), ours
    )
    files = sorted(p.name for p in (tmp_path / "model/adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = with_peft(tmp_path / "base", tmp_path / "model/adapter")
    assert torch.equal(logits(theirs), ours)
    assert same(dict(theirs.merge_and_unload().state_dict()), state(tmp_path / "model"))


def test_fresh_adapters_change_nothing_and_only_they_and_the_heads_learn(config, tmp_path):
    model = ValueModel.from_pretrained(config.model, as_causal_lm=True)
    before = logits(model.trunk.model)
    model.trunk.add_lora(LORA)
    assert torch.equal(logits(model.trunk.model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B of seven layers in two blocks; not the LM head
    summary = train(config, QUIET)
    assert summary["eval_data"] is None
    was, now = state(config.model), state(config.output)
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    assert {name.rpartition("_proj")[1:] for name in changed} == {("_proj", ".weight")}
    assert len(changed) == 14
    learnt = ValueModel.from_pretrained(config.output)
    assert not learnt.heads.are_fresh
    assert learnt.trunk.lora is None  # a plain model, to generate from and to export
    [text] = generate(learnt, [TOKENIZER.encode_prompt("abc")], Guidance(1.0), max_tokens=5)
    assert text.tokens
    export_hf(config.output, tmp_path / "plain", beta=1.0)


def test_the_reference_of_adapters_is_the_model_without_them():
    model = adapted()
    batch = collate([Trajectory([1, 9, 2, 3], [False, False, True, True], [0.0] * 4, True)])
    needs = frozenset({"logprob", "ref_logprob"})
    model.keep_reference()
    values = model.train()(batch, needs)
    assert not torch.allclose(values.logprob, values.ref_logprob, atol=1e-3)
    torch.manual_seed(0)
    plain = ValueModel(CausalLM(make_hf("qwen3")), None, TOKENIZER).eval()
    expected = plain(batch, frozenset({"logprob"})).logprob
    torch.testing.assert_close(values.ref_logprob, expected, atol=1e-5, rtol=0)
    again = model(batch, needs)  # the adapters are there again, and learn
    torch.testing.assert_close(again.logprob, values.logprob)
    again.logprob.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.trunk.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_goes_on_bit_identically(config, tmp_path, monkeypatch, dropout):
    config = replace(config, lora=replace(LORA, dropout=dropout))
    train(config, QUIET)
    other = replace(config, output=str(tmp_path / "other"))
    killed_at(5, monkeypatch, other)
    names = {p.name for p in (tmp_path / "other/checkpoints/step-00000004").rglob("*")}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names  # it would be the base once more
    train(replace(other, resume=True), QUIET)
    for name in ("model.safetensors", "value_heads.safetensors", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors"):  # fmt: skip
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_saving_in_the_middle_changes_nothing(config, tmp_path):
    train(config, QUIET)
    rare = replace(config, output=str(tmp_path / "rare"), fit=replace(FIT, save_every=99))
    train(rare, QUIET)
    assert same(state(config.output), state(rare.output))


def test_the_best_adapters_are_put_back(config, tmp_path):
    best = replace(FIT, keep_best="total", eval_every=1, max_steps=2, lr=0.5)
    config = replace(config, eval_data=config.data, fit=best)
    assert train(config, QUIET)["best_step"] in (1, 2)
    once = replace(config, output=str(tmp_path / "once"), fit=replace(best, keep_best=None))
    train(once, QUIET)
    assert same(state(config.output), state(once.output)) == (
        json.loads((tmp_path / "run/summary.json").read_text())["best_step"] == 2
    )


def test_adapters_of_another_base_or_shape_are_refused(config, tmp_path, monkeypatch):
    killed_at(5, monkeypatch, config)
    hf = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        hf.model.norm.weight[0] += 1e-3
    save_base(hf, config.model)
    with pytest.raises(QvgptError, match="adapter: was trained on another base model"):
        train(replace(config, resume=True), QUIET)
    adapted().trunk.save_adapter(tmp_path / "saved")
    with pytest.raises(QvgptError, match="of another shape"):
        adapted(lora=replace(LORA, rank=2)).trunk.load_adapter(tmp_path / "saved")
    with pytest.raises(QvgptError, match="no such file"):
        adapted().trunk.load_adapter(tmp_path / "nowhere")


@PEFT_ITSELF
def test_a_gpt2_directory_is_adapted_and_stays_one(config, tmp_path):
    torch.manual_seed(0)
    plain = ValueModel(GPT(TOKENIZER.vocab_size, 16, 2, 2, 32), None, TOKENIZER)
    plain.save(tmp_path / "gpt2")
    config = replace(config, model=str(tmp_path / "gpt2"))
    train(config, QUIET)
    learnt = ValueModel.from_pretrained(config.output).eval()
    assert isinstance(learnt.trunk, GPT)
    assert not torch.equal(learnt.trunk(TOKENS), plain.eval().trunk(TOKENS))
    theirs = with_peft(config.model, Path(config.output) / "adapter")
    torch.testing.assert_close(learnt.trunk(TOKENS), logits(theirs))


def test_dropout_of_the_run_is_not_that_of_the_adapters():
    model = adapted("llama", replace(LORA, dropout=0.25))
    model.trunk.set_dropout(0.5)
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    assert model.trunk.model.model.layers[0].self_attn.attention_dropout == 0.5


def test_a_copy_with_another_head_keeps_the_adapters(tmp_path):
    trunk = adapted().trunk
    other = trunk.with_head(2.0 * trunk.output_weight)
    with torch.no_grad():
        torch.testing.assert_close(other.hidden(TOKENS), trunk.hidden(TOKENS))
    other.save(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), 2 * logits(trunk.model)
    )


def test_what_cannot_be_adapted_is_one_clear_line(config, monkeypatch):
    cases = [
        ({"lora": replace(LORA, target_modules=["q_pro"])}, "no 'q_pro' .did you mean 'q_proj'"),
        ({"lora": replace(LORA, target_modules=["lm_head"])}, "'lm_head' is frozen"),
        ({"lora": replace(LORA, target_modules=["embed_tokens"])}, "'embed_tokens' is frozen"),
        ({"lora": replace(LORA, target_modules=["norm"])}, "target_modules: .*not supported"),
        ({"model": None}, "lora: adapts a given model"),
        ({"freeze_trunk": True}, "leave freeze_trunk off"),
    ]
    for change, message in cases:
        with pytest.raises(QvgptError, match=message) as caught:
            train(replace(config, **change), QUIET)
        assert "\n" not in str(caught.value)
        assert not Path(config.output).exists()
    for bad in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}):
        with pytest.raises(QvgptError, match=f"lora.{next(iter(bad))}: must be"):
            replace(LORA, **bad)
    with pytest.raises(QvgptError, match="adapters already"):
        adapted().trunk.add_lora(LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(QvgptError, match=r"pip install 'qvgpt\[peft\]'"):
        train(config, QUIET)


def test_some_layers_alone():
    lora = replace(LORA, target_modules=["q_proj", "model.layers.1.mlp.up_proj"])
    names = {n.rpartition(".lora_")[0] for n, p in adapted(lora=lora).trunk.named_parameters()
             if p.requires_grad}  # fmt: skip
    assert names == {f"model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {
        "model.model.layers.1.mlp.up_proj"
    }
