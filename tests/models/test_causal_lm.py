"""Any Hugging Face causal LM as a trunk: its own logits, its own generate, and back to disk."""

import json

import pytest
import torch
import transformers
from rich.console import Console
from tiny_hf import FAMILIES, SIZES, TOKENIZER, make_hf
from transformers import AutoModelForCausalLM

from qvgpt.checkpoint import load_model, newest_checkpoint
from qvgpt.collect import CollectConfig, collect
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import Request, generate, write
from qvgpt.decode.guided_head import load_guided
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.export import export_hf
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.models.attention import attention
from qvgpt.models.causal_lm import _ATTENTION, CausalLM
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train
from qvgpt.trajectory import Trajectory, collate

PACKING = {"llama", "qwen3", "gemma"}
"""Those without windows whose attention is torch's."""
PROMPTS = [[1, 12, 7, 20, 2], [1, 12], [1], [1, 30, 8, 8, 8, 17, 21, 9, 2]]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def saved(family, tmp_path):
    """A value model on such a trunk, with heads far from their start, in a directory."""
    model = ValueModel(CausalLM(make_hf(family)), HeadsConfig("low_rank", rank=4), TOKENIZER)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.save(tmp_path / "model")
    return ValueModel.from_pretrained(tmp_path / "model").eval(), tmp_path / "model"


def logits(trunk, hidden):
    plain = hidden @ trunk.output_weight.T
    return plain if trunk.softcap is None else trunk.softcap * (plain / trunk.softcap).tanh()


@torch.no_grad()
def test_states_give_the_models_own_logits_with_padding_on_either_side(family):
    hf = make_hf(family)
    trunk = CausalLM(hf)
    for prompt in PROMPTS:
        theirs = hf(torch.tensor([prompt])).logits[0]
        for left, right in ((0, 0), (3, 0), (0, 3), (2, 2)):
            tokens = torch.tensor([[5] * left + prompt + [5] * right])
            mask = torch.tensor([[False] * left + [True] * len(prompt) + [False] * right])
            for cache in (None, trunk.new_cache(1, 20)):
                hidden = trunk.hidden(tokens, mask, cache=cache)
                ours = logits(trunk, hidden[0, left : left + len(prompt)])
                assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.allclose(
            logits(trunk, trunk.hidden(torch.tensor([prompt])))[0], theirs, atol=1e-5
        )


def hf_generate(hf, prompt, **options):
    """What Hugging Face writes after a prompt, cut after its end token."""
    x = torch.tensor([prompt])
    with torch.no_grad():
        out = hf.generate(
            x,
            attention_mask=torch.ones_like(x),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[3, 4],
            **options,
        )
    text = out[0, len(prompt) :].tolist()
    return text[: next((i + 1 for i, t in enumerate(text) if t in (3, 4)), len(text))]


@torch.no_grad()
def test_packed_texts_do_not_see_each_other(family):
    trunk, sizes = CausalLM(make_hf(family)), [9, 4, 3, 12]
    texts = [torch.randint(4, 30, (n,)) for n in sizes]
    padding = torch.zeros(2, dtype=torch.long)
    row = torch.cat([*texts, padding])[None]
    positions = torch.cat([*(torch.arange(n) for n in sizes), padding])[None]
    found = trunk.hidden(row, positions=positions)[0].split([*sizes, 2])
    for tokens, states in zip(texts, found, strict=False):
        torch.testing.assert_close(states, trunk.hidden(tokens[None])[0], atol=1e-5, rtol=0)


def test_texts_share_a_prompt_where_a_model_can_be_told(family):
    trunk = CausalLM(make_hf(family))
    assert trunk.shares_prompts == (family in PACKING)
    if not trunk.shares_prompts:
        with pytest.raises(QvgptError, match="cannot share prompts"):
            trunk.hidden(torch.ones(1, 4, dtype=torch.long), positions=torch.tensor([[0, 1, 2, 2]]))
        return
    prompt, *texts = (torch.randint(4, 30, (n,)) for n in (5, 4, 1, 7))
    alone = torch.arange(3)
    row = torch.cat([prompt, *texts, alone])[None]
    after = [5 + torch.arange(len(text)) for text in texts]
    positions = torch.cat([torch.arange(5), *after, alone])[None]
    found = trunk.hidden(row, positions=positions)[0].split([5, 4, 1, 7, 3])
    separate = [trunk.hidden(torch.cat([prompt, tokens])[None])[0, 5:] for tokens in texts]
    for states, expected in zip(found[1:4], separate, strict=True):
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[4], trunk.hidden(alone[None])[0], atol=1e-5, rtol=0)
    learned = [p for name, p in trunk.named_parameters() if "lm_head" not in name]
    ways = [torch.cat(list(way)).square().mean() for way in (found[1:4], separate)]
    ours, wanted = (torch.autograd.grad(loss, learned) for loss in ways)
    for gradient, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_packed_texts_learn_taken_apart_as_by_a_mask(family, monkeypatch):
    monkeypatch.setattr("qvgpt.models.causal_lm._APART", 0)
    trunk = CausalLM(make_hf(family)).train()
    assert trunk.packs == (family in PACKING)
    tokens = torch.randint(4, 30, (2, 12))
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(2, 12)
    gradients: list[dict[str, torch.Tensor]] = []
    for packs in (trunk.packs, False):
        trunk.packs = packs
        trunk.zero_grad()
        trunk.hidden(tokens, positions=positions).square().sum().backward()
        found = [(n, p.grad) for n, p in trunk.named_parameters() if p.grad is not None]
        gradients.append(dict(found))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[-1][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
def test_short_texts_learn_by_plain_products_as_by_sdpa(family, layout, monkeypatch):
    if not make_hf(family)._supports_sdpa:
        assert CausalLM(make_hf(family)).model.config._attn_implementation == "eager"
        return
    where: dict[str, torch.Tensor] = {}
    if layout == "padded":
        where["mask"] = torch.ones(2, 12, dtype=torch.bool)
        where["mask"][0, :4] = where["mask"][1, 9:] = False
    elif layout == "packed":
        where["positions"] = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(2, 12)
    real = where.get("mask", torch.ones(2, 12, dtype=torch.bool))
    used, gradients = [], []
    spied = lambda *args: used.append(args) or attention(*args)  # noqa: E731
    monkeypatch.setattr("qvgpt.models.causal_lm.attention", spied)
    for kind in ("sdpa", _ATTENTION):
        trunk = CausalLM(make_hf(family)).train()
        trunk.model.set_attn_implementation(kind)
        torch.manual_seed(0)
        tokens = torch.randint(4, 30, (2, 12))
        with torch.autocast("cpu", torch.bfloat16):
            states = trunk.hidden(tokens, **where)
        (states.float()[real] ** 3).sum().backward()
        assert bool(used) == (kind == _ATTENTION)
        gradients.append(
            torch.cat([p.grad.flatten() for p in trunk.parameters() if p.grad is not None])
        )
    torch_own, ours = gradients
    assert torch.nn.functional.cosine_similarity(ours, torch_own, dim=0) > 0.999
    assert abs(ours.norm() / torch_own.norm() - 1) < 0.01


def test_the_engine_writes_what_hugging_face_writes(saved):
    model, path = saved
    hf = AutoModelForCausalLM.from_pretrained(path).eval()
    ours = generate(model, PROMPTS, Guidance(temperature=0.0), max_tokens=20, max_batch=3)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        assert hf_generate(hf, prompt, max_new_tokens=20) == completion.tokens


def test_requests_that_come_and_go_write_what_each_writes_alone(saved):
    model, _ = saved
    requests = [
        Request(PROMPTS[i % 4], 5 + 7 * (i % 3), Guidance(beta=float(i % 2), temperature=0.9), i)
        for i in range(10)
    ]
    together = write(model, requests, max_batch=3, report=True)
    for request, text in zip(requests, together, strict=True):
        [alone] = write(model, [request], report=True)
        assert alone.tokens == text.tokens
        ours, theirs = ([r.base_logprob for r in t.reports] for t in (alone, text))
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_beams_are_hugging_faces(saved):
    model, path = saved
    hf = AutoModelForCausalLM.from_pretrained(path).eval()
    found = BeamSearch(beams=3, max_tokens=12)(model, PROMPTS)
    for prompt, best in zip(PROMPTS, found.best, strict=True):
        assert hf_generate(hf, prompt, max_new_tokens=12, num_beams=3) == best.tokens


def test_guidance_leaves_as_a_plain_checkpoint_or_is_refused(saved, tmp_path):
    model, path = saved
    if model.trunk.softcap is not None:
        with pytest.raises(QvgptError, match="capped"):
            export_hf(path, tmp_path / "plain", beta=2.0)
        with pytest.raises(QvgptError, match="caps its logits"):
            load_guided(path, Guidance(beta=2.0))
        return
    export_hf(path, tmp_path / "plain", beta=2.0)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    guided = load_guided(path, Guidance(beta=2.0))
    ours = generate(model, PROMPTS, Guidance(beta=2.0, temperature=0.0), max_tokens=12)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        for theirs in (hf, guided):
            assert hf_generate(theirs, prompt, max_new_tokens=12) == completion.tokens


def test_it_learns_and_comes_back(saved, tmp_path):
    model, _ = saved
    texts = [
        Trajectory([1, 9 + i, 2, 10, 11, 3], [False] * 3 + [True] * 3, [0.0] * 5 + [1.0], True)
        for i in range(4)
    ]
    before = float(model(collate(texts)).logprob.detach().mean())
    options = FitOptions(
        max_steps=10, epochs=20.0, batch_size=4, lr=1e-2, dropout=0.0, save_every=10
    )
    fit(model, texts, parse_objectives(["LM", "ILQL"]), options, output=tmp_path / "run")
    with torch.no_grad():
        ours = model(collate(texts))
        theirs = ValueModel.from_pretrained(tmp_path / "run").eval()(collate(texts))
    assert float(ours.logprob.mean()) > before + 0.5
    last = newest_checkpoint(tmp_path / "run/checkpoints")
    other = ValueModel.from_pretrained(last)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    load_model(last, other)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in model.state_dict().items())
    for name in ("q", "v", "logprob", "target_q", "q_logsumexp"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_logits_that_are_scaled_are_noticed():
    config = transformers.CohereConfig(**{**SIZES, "logit_scale": 0.1})
    with pytest.raises(QvgptError, match="scale"):
        CausalLM(AutoModelForCausalLM.from_config(config))


def test_the_commands_take_such_a_directory(tmp_path):
    """collect → train → generate on a Qwen3, from files to files."""
    hf = make_hf("qwen3", vocab_size=TOKENIZER.vocab_size + 40)  # padded, as real ones are
    hf.save_pretrained(tmp_path / "hf")
    TOKENIZER.save(tmp_path / "hf")
    rows = [{"prompt": p, "completion": p[::-1]} for p in ("abc", "bcd", "cde", "xyz")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = {"model": str(tmp_path / "hf"), "data": str(tmp_path / "rows.jsonl")}
    collect(CollectConfig(**options, reward="chrf", output=str(tmp_path / "samples"), samples=2,
                          beams=2, max_tokens=6, include_references=True))  # fmt: skip
    config = TrainConfig(
        data=[str(tmp_path / "samples/data.jsonl")],
        model=options["model"],
        output=str(tmp_path / "values"),
        objectives=["LM", "MonteCarlo"],
        fit=FitOptions(max_steps=3, epochs=9.0, batch_size=8),
    )
    summary = train(config, Console(quiet=True))
    assert summary["parameters"]["trunk"] == sum(p.numel() for p in hf.parameters())
    model = ValueModel.from_pretrained(tmp_path / "values")
    assert isinstance(model.trunk, CausalLM)
    [text] = generate(model, [model.tokenizer.encode_prompt("abc")], Guidance(1.0), max_tokens=9)
    assert text.tokens
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "values")
    assert type(plain) is type(hf)


def test_a_model_that_says_no_context_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(QvgptError, match="BloomForCausalLM: says no context"):
        CausalLM(BloomForCausalLM(config))
