"""Hugging Face's generate with a guided head must write what our engine writes."""

import pytest
import torch
from tiny_hf import SIZES, TOKENIZER, make_hf
from transformers import AutoModelForCausalLM, CohereConfig

from qvgpt.decode.engine import generate
from qvgpt.decode.guided_head import GuidedHead, guide, load_guided, unguide
from qvgpt.decode.policy import Guidance, fold, folds, next_token
from qvgpt.decode.sources import Contrast, HeadValues, PrefixValues, TokenScorer, WeightedSum
from qvgpt.errors import QvgptError
from qvgpt.export import export_hf, export_model
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.heads import ValueHeads
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

PROMPT = [1, 12, 7, 20, 2]
PATHS = {
    "folded": Guidance(beta=2.0),
    "gathered": Guidance(beta=2.0, top_k=6),
    "top_p": Guidance(beta=2.0, top_p=0.7, twins="min"),
    "guided": Guidance(beta=-1.0, top_k=4, candidates="guided"),
    "plain": Guidance(beta=0.0, min_p=0.1),
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(request, make_model, tmp_path):
    model = make_model("low_rank", tied=request.param)
    model.save(tmp_path / "model")
    return model, tmp_path / "model"


def hf_generate(hf, tokens, **options):
    x = torch.tensor([tokens])
    with torch.no_grad():
        out = hf.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=20, pad_token_id=0, **options
        )
    return out[0, len(tokens) :].tolist()


@pytest.mark.parametrize("guidance", PATHS.values(), ids=PATHS)
def test_greedy_writes_what_the_engine_writes(saved, guidance):
    model, path = saved
    greedy = Guidance(**{**vars(guidance), "temperature": 0.0})
    hf = load_guided(path, guidance)
    for prompt in (PROMPT, PROMPT[:2], [1]):
        (ours,) = generate(model, [prompt], greedy, max_tokens=20)
        assert hf_generate(hf, prompt, do_sample=False) == ours.tokens


@pytest.mark.parametrize("guidance", PATHS.values(), ids=PATHS)
def test_a_left_padded_batch_writes_what_each_prompt_alone_writes(saved, guidance):
    _, path = saved
    hf = load_guided(path, guidance)
    prompts = [PROMPT, PROMPT[:2], [1], [1, 30, 8, 8, 8, 17, 2]]
    longest = max(map(len, prompts))
    x = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = hf.generate(
            x, attention_mask=mask, max_new_tokens=20, pad_token_id=0, do_sample=False
        )
    for prompt, row in zip(prompts, out[:, longest:].tolist(), strict=True):
        alone = hf_generate(hf, prompt, do_sample=False)
        assert row == alone + [0] * (len(row) - len(alone))


@pytest.mark.parametrize("guidance", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_distribution_is_the_policys(saved, guidance):
    model, path = saved
    tokens = torch.randint(0, model.trunk.vocab_size, (3, 9))
    logits = load_guided(path, guidance)(tokens).logits
    assert logits.dtype == torch.float32
    found = logits.flatten(0, 1).softmax(-1)
    policy = next_token(model, model.trunk.hidden(tokens).flatten(0, 1), guidance)
    expected = torch.zeros_like(found).scatter(1, policy.tokens, policy.logprob.exp())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sampling_draws_from_the_guided_distribution(saved):
    model, path = saved
    hf = load_guided(path, Guidance(beta=2.0, top_k=5))
    torch.manual_seed(0)
    x = torch.tensor([PROMPT]).expand(4000, -1)
    with torch.no_grad():
        drawn = hf.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=1, pad_token_id=0,
            do_sample=True, temperature=0.5, top_k=0,
        )[:, -1]  # fmt: skip
        hidden = model.trunk.hidden(torch.tensor([PROMPT]))[:, -1]
        policy = next_token(model, hidden, Guidance(beta=2.0, top_k=5, temperature=0.5))
    frequency = torch.bincount(drawn, minlength=model.trunk.vocab_size) / len(x)
    expected = torch.zeros_like(frequency).scatter(0, policy.tokens[0], policy.logprob[0].exp())
    assert (frequency - expected).abs().max() < 0.03
    assert set(drawn.tolist()) <= set(policy.tokens[0].tolist())


def test_beams_are_those_of_the_folded_export(saved, tmp_path):
    _, path = saved
    export_hf(path, tmp_path / "export", beta=2.0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    guided = load_guided(path, Guidance(beta=2.0))
    for beams in (1, 2, 4):
        options = {"do_sample": False, "num_beams": beams}
        assert hf_generate(guided, PROMPT, **options) == hf_generate(plain, PROMPT, **options)


def test_beams_stay_among_the_candidates(saved):
    model, path = saved
    guidance = Guidance(beta=3.0, top_k=8)
    written = hf_generate(load_guided(path, guidance), PROMPT, do_sample=False, num_beams=4)
    tokens = PROMPT
    for token in written:
        with torch.no_grad():
            hidden = model.trunk.hidden(torch.tensor([tokens]))[:, -1]
        assert token in next_token(model, hidden, guidance).tokens[0].tolist()
        tokens = [*tokens, token]


def test_guiding_is_undone_and_breaks_no_tie(saved):
    model, path = saved
    hf = AutoModelForCausalLM.from_pretrained(path).eval()
    head, embedding = hf.lm_head, hf.transformer.wte.weight
    before, plain = embedding.clone(), hf_generate(hf, PROMPT, do_sample=False)
    assert guide(hf, model, Guidance(beta=2.0)) is hf
    assert isinstance(hf.lm_head, GuidedHead)
    assert hf.lm_head.weight is head.weight
    assert hf.transformer.wte.weight is embedding
    assert (hf.lm_head.weight is embedding) == model.trunk.shape["tied"]
    guided = hf_generate(hf, PROMPT, do_sample=False)
    guide(hf, model.heads, Guidance(beta=-5.0))  # anew, and not on top of the first
    assert hf_generate(hf, PROMPT, do_sample=False) != guided
    assert hf_generate(unguide(hf), PROMPT, do_sample=False) == plain != guided
    assert unguide(hf).lm_head is head
    torch.testing.assert_close(hf.transformer.wte.weight, before, atol=0, rtol=0)


def test_recommended_guidance_is_the_default(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path)
    for said in (None, {"beta": 0.0, "min_p": 0.05}):
        model.info.recommended_guidance = said
        model.save(tmp_path)
        with pytest.raises(QvgptError, match="recommends no guidance"):
            load_guided(tmp_path)
        with pytest.raises(QvgptError, match="recommends no beta"):
            export_model(tmp_path, tmp_path / "out")
    model.info.recommended_guidance = {"beta": 1.5, "top_k": 3}
    model.save(tmp_path)
    assert load_guided(tmp_path).lm_head.guidance == Guidance(beta=1.5, top_k=3)


def test_heads_that_do_not_fit_are_refused(saved, plain):
    _, path = saved
    hf = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(QvgptError, match="no value heads"):
        guide(hf, plain, Guidance(beta=1.0))
    with pytest.raises(QvgptError, match="do not fit"):
        guide(hf, ValueHeads(16, 7, HeadsConfig()), Guidance(beta=1.0))
    assert not isinstance(hf.lm_head, GuidedHead)


@pytest.mark.parametrize("name", ["folded", "gathered"])
def test_a_guided_model_is_not_saved(saved, tmp_path, name):
    _, path = saved
    hf = load_guided(path, PATHS[name])
    for save in (hf.save_pretrained, lambda _: hf.state_dict()):
        with pytest.raises(QvgptError, match=r"unguide.*qvgpt export"):
            save(tmp_path / "written")
    assert not list((tmp_path / "written").glob("*.safetensors"))
    unguide(hf).save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    options = {"do_sample": False}
    assert hf_generate(again, PROMPT, **options) == hf_generate(plain, PROMPT, **options)


def test_a_guided_model_is_not_trained(saved):
    hf = load_guided(saved[1], Guidance(beta=1.0)).train()
    x = torch.tensor([PROMPT])
    with pytest.raises(QvgptError, match="before it is trained"):
        hf(x, labels=x)
    assert hf_generate(hf, PROMPT[:2], do_sample=True, top_k=0)  # as trainers that sample do
    embedded = hf.eval().get_input_embeddings()(x).detach().requires_grad_()
    hf(inputs_embeds=embedded).logits[0, -1].amax().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["folded", "gathered", "top_p"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_stay_in_fp32_whatever_the_model_is_cast_to(saved, name, dtype):
    model, path = saved
    before = {k: v.clone() for k, v in model.heads.state_dict().items()}
    hf = guide(AutoModelForCausalLM.from_pretrained(path).eval(), model, PATHS[name])
    plain = AutoModelForCausalLM.from_pretrained(path).eval().to(getattr(torch, dtype))
    hf.to(getattr(torch, dtype))
    assert hf.transformer.wte.weight.dtype == hf.lm_head.weight.dtype == getattr(torch, dtype)
    assert {p.dtype for n, p in hf.lm_head.named_parameters() if "heads" in n} <= {torch.float32}
    found = hf(torch.tensor([PROMPT])).logits
    assert found.dtype == torch.float32
    expected = guide(plain, model, PATHS[name])(torch.tensor([PROMPT])).logits
    torch.testing.assert_close(found.exp(), expected.exp(), atol=0.02, rtol=0)
    after = model.heads.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


def test_the_value_model_does_not_move_with_the_guided_one(saved):
    model, path = saved
    hf = guide(AutoModelForCausalLM.from_pretrained(path), model, PATHS["gathered"])
    ours, theirs = (list(h.target_q.parameters()) for h in (model.heads, hf.lm_head.heads))
    assert ours
    assert not {*map(id, ours)} & {*map(id, theirs)}  # `.to` moves parameters in place
    assert [p.data_ptr() for p in ours] == [p.data_ptr() for p in theirs]  # and yet no copy
    hf.train().to("meta")
    assert not model.heads.training
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(p.requires_grad for p in model.heads.q.parameters())


@pytest.mark.parametrize("guidance", PATHS.values(), ids=PATHS)
def test_loaded_in_bfloat16_it_gives_the_engines_distribution(saved, guidance):
    _, path = saved
    model = ValueModel.from_pretrained(path, dtype="bfloat16").eval()
    hf = load_guided(path, guidance, dtype="bfloat16")
    assert hf.dtype == hf.lm_head.weight.dtype == torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(7, model.trunk.embed_dim).bfloat16()
    with torch.no_grad():
        folded = None
        if folds(model.heads, guidance):
            folded = fold(model.trunk.output_weight, model.heads, guidance.beta)
        found, policy = hf.lm_head(hidden).exp(), next_token(model, hidden, guidance, folded)
    expected = torch.zeros_like(found).scatter(1, policy.tokens, policy.logprob.exp())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_values_from_elsewhere_are_refused(saved):
    model, path = saved
    hf = AutoModelForCausalLM.from_pretrained(path)
    both = WeightedSum(((1.0, HeadValues(model)),))
    scorer = TokenScorer(lambda texts, tokens: tokens)
    for source in (HeadValues(model), PrefixValues(model), Contrast(model, model), both, scorer):
        with pytest.raises(QvgptError, match=r"qvgpt\.generate\(…, values=…\)"):
            guide(hf, source, Guidance(beta=1.0))
    assert not isinstance(hf.lm_head, GuidedHead)


def test_guidance_that_no_head_can_give_is_refused(make_model, tmp_path):
    model = make_model("low_rank")
    model.info.level = "turn"
    model.save(tmp_path)
    with pytest.raises(QvgptError, match="whole turns"):
        load_guided(tmp_path, Guidance(beta=1.0))
    model.info.level = "token"
    model.save(tmp_path)
    with pytest.raises(QvgptError, match="distribution of returns"):
        load_guided(tmp_path, Guidance(beta=1.0, functional="soft"))
    with pytest.raises(QvgptError, match="which token it is"):
        load_guided(tmp_path, Guidance(beta=1.0, beta_end=2.0, beta_tokens=3))


def test_logits_that_are_changed_after_the_head_are_refused():
    config = CohereConfig(**{**SIZES, "logit_scale": 0.1})
    hf = AutoModelForCausalLM.from_config(config)
    heads = ValueHeads(SIZES["hidden_size"], SIZES["vocab_size"], HeadsConfig())
    with pytest.raises(QvgptError, match="may scale"):
        guide(hf, heads, Guidance(beta=1.0))
    capped = make_hf("gemma2")
    with pytest.raises(QvgptError, match=r"caps its logits.*qvgpt\.generate"):
        guide(capped, heads, Guidance(beta=1.0))
    assert capped.lm_head is capped.get_output_embeddings()


def test_generate_ends_where_the_engine_does(tmp_path):
    """A trunk's own generation_config.json is kept but for the ids of the template."""
    hf = make_hf("llama")
    hf.generation_config.eos_token_id, hf.generation_config.repetition_penalty = 3, 1.5
    ValueModel(CausalLM(hf), HeadsConfig("low_rank", rank=4), TOKENIZER).save(tmp_path)
    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        load_guided(tmp_path, Guidance()),
    ):
        config = found.generation_config
        assert config.eos_token_id == sorted(TOKENIZER.template.end_ids) == [3, 4]
        assert config.pad_token_id == TOKENIZER.template.pad
        assert config.repetition_penalty == 1.5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_a_model_with_adapters_is_guided(saved):
    peft = pytest.importorskip("peft")
    model, path = saved
    guidance = PATHS["gathered"]
    expected = hf_generate(load_guided(path, guidance), PROMPT, do_sample=False)
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora).eval()
    head = adapted.get_output_embeddings()
    guide(adapted, model, guidance)
    assert hf_generate(adapted, PROMPT, do_sample=False) == expected
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    assert hf_generate(adapted, PROMPT, do_sample=False) != expected
    assert unguide(adapted).get_output_embeddings() is head
