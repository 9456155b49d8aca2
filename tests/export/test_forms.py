"""Each form of an export is read by its own package and equal to the guidance it stands for."""

import json

import pytest
import torch
from tiny_hf import PROMPTS, TOKENIZER
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.export import ExportOptions, export_model
from qvgpt.export.linear import factors
from qvgpt.models.heads import ValueHeads
from qvgpt.models.heads_config import HeadsConfig

TOKENS = torch.randint(5, TOKENIZER.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
TIED = [True, False]
PEFT_ITSELF = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def export(tmp_path, prompts=PROMPTS, out="out", **options):
    told = ExportOptions(**options)
    return export_model(tmp_path / "model", tmp_path / out, told, prompts=prompts)


@torch.no_grad()
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_other_families_fold_too(tmp_path, save_model, exact, family, tied):
    model = save_model(family=family, tie_word_embeddings=tied)
    made = export(tmp_path, beta=2.0)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = hf(TOKENS).logits.log_softmax(-1)
    torch.testing.assert_close(found, exact(model, TOKENS, Guidance(2.0)), atol=1e-4, rtol=0)
    assert not hf.config.tie_word_embeddings
    before = model.trunk.model.get_input_embeddings().weight
    torch.testing.assert_close(hf.get_input_embeddings().weight, before, atol=0, rtol=0)
    mean, own = hf.get_output_embeddings().weight.mean(0), model.trunk.output_weight.mean(0)
    torch.testing.assert_close(mean, own, atol=1e-6, rtol=0)  # no state's logits are shifted
    assert made["fidelity"]["mean_kl"] < 1e-6


@PEFT_ITSELF
@torch.no_grad()
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False), ("qwen3", True)])
def test_the_strength_of_an_adapter_is_chosen_when_it_is_loaded(
    tmp_path, save_model, exact, family, tied
):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    heads = HeadsConfig("low_rank", rank=3, num_q=2)
    tie = {"tied": tied} if family == "gpt2" else {"tie_word_embeddings": tied}
    model = save_model(heads, family, **tie)
    made = export(tmp_path, to="lora", beta=2.0)
    assert made["adapter"] == {"rank": 6, "kind": "exact"}
    assert made["fidelity"]["mean_kl"] < 1e-6
    for beta in (2.0, 0.75):
        file = tmp_path / "out" / "adapter_config.json"
        said = json.loads(file.read_text())
        file.write_text(json.dumps(said | {"lora_alpha": beta * 6}))
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
        torch.testing.assert_close(
            base(TOKENS).logits.log_softmax(-1), exact(model, TOKENS, Guidance()), atol=1e-4, rtol=0
        )
        adapted = PeftModel.from_pretrained(base, tmp_path / "out")
        found = adapted(TOKENS).logits.log_softmax(-1)
        torch.testing.assert_close(found, exact(model, TOKENS, Guidance(beta)), atol=1e-4, rtol=0)
    [layer] = [m for m in adapted.modules() if isinstance(m, LoraLayer)]
    layer.set_scale("default", 3.0 / 0.75)  # while it runs
    found = adapted(TOKENS).logits.log_softmax(-1)
    torch.testing.assert_close(found, exact(model, TOKENS, Guidance(3.0)), atol=1e-4, rtol=0)


def test_of_a_rank_the_nearest_matrix_to_what_the_states_see():
    torch.manual_seed(0)
    heads = ValueHeads(8, 20, HeadsConfig())
    weight, hidden = torch.randn(20, 8), torch.randn(500, 8) * torch.arange(1.0, 9)
    whole = torch.linalg.svdvals((weight @ hidden.T).double())
    for rank in (1, 3, 7):
        up, down, kind = factors(heads, weight, hidden, rank)
        left = ((weight - up @ down) @ hidden.T).double().norm()
        torch.testing.assert_close(left, whole[rank:].norm(), rtol=1e-3, atol=0)
        assert (up.shape, down.shape, kind) == ((20, rank), (rank, 8), "svd")
    up, down, kind = factors(heads, weight, hidden, None)  # 64 at most, and no more than there are
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-4)
    assert kind == "exact"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_rows_tell_v_by_log_probs(tmp_path, save_model, exact, family):
    model = save_model(family=family)
    made = export(tmp_path, beta=2.0, value_rows=True)
    rows = made["value_rows"]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logprob = hf(TOKENS).logits.log_softmax(-1)
    told = (logprob[..., rows["ids"][1]] - logprob[..., rows["ids"][0]]) / rows["c"] + rows["bias"]
    v = model.heads.state_value(model.trunk.hidden(TOKENS))
    torch.testing.assert_close(told, v, atol=1e-4, rtol=0)
    assert made["fidelity"]["v"]["rmse"] < 1e-4
    assert rows["fit"] is None  # V is linear: nothing was fitted
    without = logprob.clone()
    without[..., rows["ids"]] = -torch.inf
    found = without.log_softmax(-1)[..., : TOKENIZER.vocab_size]
    torch.testing.assert_close(found, exact(model, TOKENS, Guidance(2.0)), atol=1e-4, rtol=0)
    assert made["fidelity"]["mean_kl"] < 1e-6
    out = hf.generate(
        TOKENS[:1], max_new_tokens=3, output_scores=True, return_dict_in_generate=True,
        attention_mask=torch.ones_like(TOKENS[:1]),
    )  # fmt: skip
    assert all(score[0, i] == -torch.inf for score in out.scores for i in rows["ids"])
    tokenizer = TOKENIZER.load(tmp_path / "out")
    assert [tokenizer.decode([i], False) for i in rows["ids"]] == rows["tokens"]
    assert tokenizer.encode("abc") == TOKENIZER.encode("abc")


@torch.no_grad()
def test_v_alone_goes_with_the_plain_model(tmp_path, save_model, exact):
    model = save_model()
    for head in [*model.heads.q, *model.heads.target_q]:
        head.weight.zero_()
    model.save(tmp_path / "model")
    with pytest.raises(QvgptError, match="know V and no Q"):
        export(tmp_path, beta=1.0)
    made = export(tmp_path, beta=0.0, value_rows=True)
    assert made["fidelity"]["v"]["rmse"] < 1e-4
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = hf(TOKENS).logits[..., : TOKENIZER.vocab_size].log_softmax(-1)
    torch.testing.assert_close(found, exact(model, TOKENS, Guidance()), atol=1e-4, rtol=0)


@torch.no_grad()
def test_heads_that_are_affine_in_disguise_are_distilled_exactly(tmp_path, save_model, exact):
    """An mlp whose units are never off: ridge regression must find the matrix it is."""
    model = save_model(HeadsConfig("mlp", num_q=2), embed=8)
    model.trunk.norm.bias.add_(1.0)  # else no sum of a state's entries is a constant
    for head in model.heads.target_q:
        head.project.bias.fill_(5.0)
    model.heads.v.layers[0].bias.fill_(5.0)
    model.save(tmp_path / "model")
    made = export(tmp_path, beta=1.0, value_rows=True)
    assert made["distilled"]["kind"] == "mlp"
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits = hf(TOKENS).logits[..., : TOKENIZER.vocab_size]
    found = logits.log_softmax(-1)
    torch.testing.assert_close(found, exact(model, TOKENS, Guidance(1.0)), atol=2e-2, rtol=0)
    assert made["fidelity"]["mean_kl"] < 1e-6
    assert made["fidelity"]["v"]["r2"] > 0.9999
    mean = hf.get_output_embeddings().weight[: TOKENIZER.vocab_size].mean(0)
    torch.testing.assert_close(mean, model.trunk.output_weight.mean(0), atol=1e-4, rtol=0)


def test_what_a_fit_costs_is_told(tmp_path, save_model):
    save_model(HeadsConfig("mlp", num_q=2))
    for name, kind in (("mean", "mean"), ("min", "min")):
        made = export(tmp_path, out=name, beta=3.0, twins=kind)
        assert 1e-4 < made["fidelity"]["mean_kl"] < made["fidelity"]["max_kl"]
        assert 0.0 < made["fidelity"]["greedy_agreement"] <= 1.0
        assert made["fidelity"]["twins_kl"] > 1e-4
    options = ExportOptions(beta=3.0)
    with pytest.raises(QvgptError, match="have to be fitted on 32 states or more"):
        export_model(tmp_path / "model", tmp_path / "few", options, texts=[[1, 7], [1, 8]])


@torch.no_grad()
@pytest.mark.parametrize(("family", "v"), [("gpt2", "linear"), ("gpt2", "mlp"), ("llama", "mlp")])
def test_the_critic_is_a_sequence_classifier(tmp_path, save_model, family, v):
    model = save_model(HeadsConfig(v=v), family)
    model.heads.reward_scale = 4.0
    model.heads.v.layers[-1].bias.fill_(2.5)
    model.save(tmp_path / "model")
    made = export(tmp_path, to="critic")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    true = model.heads.state_value(model.trunk.hidden(TOKENS[:, :9]))[:, -1]
    padded = torch.nn.functional.pad(TOKENS[:, :9], (0, 4), value=TOKENIZER.template.pad)
    mask = (padded != TOKENIZER.template.pad).long()
    found = critic(padded, attention_mask=mask).logits
    assert found.shape == (3, 1)
    fit = made["fidelity"]
    if v == "linear":  # the last norm's bias holds V's
        assert made["v"] == {"offset": 0.0, "fit": None}
        torch.testing.assert_close(found[:, 0], true, atol=1e-4, rtol=0)
        assert fit["r2"] > 0.999999
    else:
        assert 0.2 < fit["r2"] < 0.999
        assert fit["rmse"] == pytest.approx(made["v"]["fit"]["rmse"], rel=1e-3)
        offset = made["v"]["offset"]
        assert (offset == 0) == (family == "gpt2")  # Llama's norm has no bias to hold it
        alone = critic(TOKENS[:, :9], attention_mask=torch.ones(3, 9).long()).logits
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    assert critic.config.num_labels == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "q8_0"}, "hf holds float32"),
        ({"rank": 4}, "rank is that of a lora"),
        ({"to": "lora", "rank": 0}, "at least 1"),
        ({"to": "critic", "value_rows": True}, "no vocabulary"),
        ({"to": "critic", "beta": 1.0}, "V alone"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(QvgptError, match=message):
        ExportOptions(**options)


def test_what_no_matrix_can_hold_is_refused_with_the_reason(tmp_path, save_model):
    save_model(family="gemma2")
    with pytest.raises(QvgptError, match="capped"):
        export(tmp_path, beta=1.0)
    model = save_model()
    with pytest.raises(QvgptError, match="an adapter needs a beta"):
        export(tmp_path, to="lora", beta=0.0)
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(QvgptError, match="merge it into its base"):
        export(tmp_path, beta=1.0)
    (tmp_path / "model" / "adapter_config.json").unlink()
    model.tokenizer.with_special(["<x>"]).save(tmp_path / "model")
    with pytest.raises(QvgptError, match="not the one the values were learned with"):
        export(tmp_path, beta=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
