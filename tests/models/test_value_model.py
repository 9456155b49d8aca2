"""Trunk and heads together: what objectives read, what it costs, and the artefact on disk."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.decision_time import used_states
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import AMONG_CANDIDATES, ValueModel
from qvgpt.objectives import NEEDS, Candidates
from qvgpt.trajectory import Trajectory, collate

TOKENIZER = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz"], "char")
BATCH = collate(
    [
        Trajectory([1, 9, 2, 10, 11, 3], [False] * 3 + [True] * 3, [0.0] * 6, True),
        Trajectory([1, 12, 8, 13], [False, True, False, True], [0.0, 1.0, 0.0, 2.0], False),
        Trajectory([1, 12], [False, True], [0.0, 1.0], False),
    ]
)


PLAIN = NEEDS - {"return_logits", "v_return_logits", "expected_q"}
PLAIN -= {"ref_logprob", "max_ratio", "dummy_logprob"}
"""What a model without distributions and without a reference offers."""


def make(kind="linear", noise=0.3, freeze=False, tied=True, tokenizer=TOKENIZER, **heads):
    torch.manual_seed(0)
    trunk = GPT(TOKENIZER.vocab_size, 16, 2, 2, seq_len=32, tied=tied)
    model = ValueModel(trunk, HeadsConfig(kind, rank=4, **heads), tokenizer, freeze)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("candidates", [Candidates(top_k=3), Candidates(min_p=0.4)])
def test_the_best_is_sought_among_what_the_language_model_might_say(candidates):
    model = make("low_rank", noise=0.6)
    free = model(BATCH)
    model.candidates = candidates
    values = model(BATCH)
    hidden = model.states(model.trunk.hidden(BATCH.tokens), BATCH)
    logits = hidden @ model.trunk.output_weight.T
    for row, count in ((0, 4), (1, 3), (2, 2)):
        for k in range(count):
            h, there = hidden[row, k][None], logits[row, k]
            may = there >= there.max() + math.log(candidates.min_p or 1e-30)
            if candidates.top_k:
                may = torch.zeros_like(may).index_fill(0, there.topk(3).indices, True)
            q = torch.stack([head(h)[0] for head in model.heads.q]).mean(0)
            best = max((q[a].item(), a) for a in range(len(q)) if may[a])
            assert values.q_max[row, k] == pytest.approx(best[0], abs=1e-5)
            for i, head in enumerate(model.heads.target_q):
                expected = head(h)[0, best[1]].item()
                assert values.target_q_at_argmax[i, row, k] == pytest.approx(expected, abs=1e-5)
    assert (values.q_max < free.q_max - 1e-3).any()
    assert (values.q_max <= free.q_max + 1e-6).all()


@torch.no_grad()
def test_slow_heads_read_the_slow_trunk_where_there_is_one():
    model = make("mlp")
    model.keep_slow_trunk()
    before = model(BATCH)
    for p in model.trunk.parameters():
        p.add_(0.3 * torch.randn_like(p))
    after, slow = model(BATCH), model.slow
    for name in ("q", "v", "logprob"):
        assert not torch.allclose(getattr(after, name), getattr(before, name), atol=1e-2)
    torch.testing.assert_close(after.target_q, before.target_q)
    old = {name: x.clone() for name, x in slow.state_dict().items()}
    slow.update(model.trunk, 0.25)
    for name, fast in model.trunk.named_parameters():
        torch.testing.assert_close(slow.state_dict()[name], torch.lerp(old[name], fast, 0.25))
    assert old.keys() == dict(model.trunk.named_parameters()).keys()
    assert not any(name.startswith("slow") for name in model.state_dict())
    model.slow = None
    assert not torch.allclose(model(BATCH).target_q, before.target_q, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("candidates", [Candidates(), Candidates(top_k=10**6)])
def test_the_best_is_never_a_row_that_only_pads_the_vocabulary(candidates):
    torch.manual_seed(0)
    size = TOKENIZER.vocab_size
    model = ValueModel(GPT(size + 3, 16, 2, 1, seq_len=32), HeadsConfig("linear"), TOKENIZER)
    hidden = model.eval().trunk.hidden(BATCH.tokens)[0, 2]
    for head in [*model.heads.q, *model.heads.target_q]:
        head.weight[size] = hidden  # a great Q of what is no token
        head.weight[5] = 0.5 * hidden
    model.candidates = candidates
    q = model.heads.q[0](hidden[None])[0]
    assert q.argmax() == size
    found = model(BATCH, frozenset({"q_max", "target_q_at_argmax"}))
    assert found.q_max[0, 0] == pytest.approx(q[5].item(), abs=1e-5)
    assert found.target_q_at_argmax[0, 0, 0] == pytest.approx(q[5].item(), abs=1e-5)
    model.trunk.output_weight[size] = 9.0 * hidden  # and what the language model is sure of
    likely = (model.trunk.output_weight[:size] @ hidden).topk(20)
    found = model(BATCH, AMONG_CANDIDATES)
    assert found.candidate_q_max[0, 0] == pytest.approx(q[likely.indices].max().item(), abs=1e-5)
    assert found.any_q_max[0, 0] == pytest.approx(q[5].item(), abs=1e-5)
    spread = (likely.values.softmax(0) * likely.values.square()).sum()
    spread -= (likely.values.softmax(0) * likely.values).sum().square()
    assert found.logit_spread[0, 0] == pytest.approx(spread.sqrt().item(), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear", "mlp"])
def test_p04_values_are_read_at_the_states_of_the_decisions(kind):
    model = make(kind)
    values = model(BATCH)
    for row, steps in ((0, [(2, 10), (3, 11), (4, 3)]), (1, [(0, 12), (2, 13)])):
        length = int(BATCH.attention_mask[row].sum())
        tokens = BATCH.tokens[row, :length]
        hidden = model.trunk.hidden(tokens[None])[0]
        logprob = (hidden @ model.trunk.output_weight.T).log_softmax(-1)
        for k, (state, action) in enumerate(steps):
            h = hidden[state : state + 1]
            for i, head in enumerate(model.heads.q):
                assert values.q[i, row, k] == pytest.approx(head(h)[0, action].item(), abs=1e-5)
                expected = head(h)[0].logsumexp(-1).item()
                assert values.q_logsumexp[i, row, k] == pytest.approx(expected, abs=1e-5)
                slow = model.heads.target_q[i](h)[0, action].item()
                assert values.target_q[i, row, k] == pytest.approx(slow, abs=1e-5)
            mean = torch.stack([head(h)[0] for head in model.heads.q]).mean(0)
            assert values.q_max[row, k] == pytest.approx(mean.max().item(), abs=1e-5)
            for i, head in enumerate(model.heads.target_q):
                slow = head(h)[0, mean.argmax()].item()
                assert values.target_q_at_argmax[i, row, k] == pytest.approx(slow, abs=1e-5)
            likely = logprob[state].topk(20)
            slow = torch.stack([head(h)[0] for head in model.heads.target_q]).mean(0)
            found, pi = slow[likely.indices], likely.values.softmax(-1)
            assert values.candidate_q_max[row, k] == pytest.approx(found.max().item(), abs=1e-5)
            assert values.any_q_max[row, k] == pytest.approx(slow.max().item(), abs=1e-5)
            for name, x in (("q_spread", found), ("logit_spread", likely.values)):
                spread = (pi @ x.square() - (pi @ x).square()).sqrt().item()
                assert vars(values)[name][row, k] == pytest.approx(spread, abs=1e-4)
            assert values.logprob[row, k] == pytest.approx(logprob[state, action].item(), abs=1e-5)
            assert values.v[row, k] == pytest.approx(model.heads.v(h).item(), abs=1e-5)
        end = model.heads.v(hidden[-1]).item()
        assert values.v[row, len(steps)] == pytest.approx(end, abs=1e-5)
        mean = torch.stack([head(hidden[-1:])[0] for head in model.heads.q]).mean(0)
        assert values.q_max[row, len(steps)] == pytest.approx(mean.max().item(), abs=1e-5)
        seen = logprob[:-1].gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(values.token_logprob[row, : length - 1], seen, atol=1e-5, rtol=0)
    assert values.v[2, 3:].eq(0).all()
    assert values.q[:, ~BATCH.mask].eq(0).all()
    assert values.token_logprob[~BATCH.attention_mask[:, 1:]].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("needs", [set(), {"v"}, {"logprob"}, {"q", "target_q"}, PLAIN])
def test_only_what_is_needed_is_computed(needs):
    values = make()(BATCH, frozenset(needs))
    assert {name for name, value in vars(values).items() if value is not None} == needs


@torch.no_grad()
def test_packed_texts_have_the_values_they_have_alone():
    model = make("low_rank")
    texts = [
        Trajectory([1, *range(5, 5 + n), 3], [False, *[True] * (n + 1)], [0.0] * (n + 2), n % 2 > 0)
        for n in (3, 9, 1, 4, 2, 6)
    ]
    packed, alone = collate(texts, packed=True), collate(texts)
    assert len(packed.tokens) == 2
    found, expected = vars(model(packed)), vars(model(alone))
    for name in PLAIN - {"token_logprob"}:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    seen = [values["token_logprob"].sum() for values in (found, expected)]
    torch.testing.assert_close(*seen)


@torch.no_grad()
def test_texts_that_share_a_prompt_have_the_values_they_have_alone():
    model = make("low_rank")
    texts = [
        Trajectory(
            [1, 2 + n % 2, 9, *range(5, 5 + n), 3],
            [False] * 3 + [True] * (n + 1),
            [0.0] * (n + 4),
            True,
        )
        for n in (3, 9, 1, 4, 2, 6)
    ]
    shared, alone = collate(texts, shared=True), collate(texts)
    assert shared.tokens.shape == (2, 19)
    found, expected = vars(model(shared)), vars(model(alone))
    for name in PLAIN - {"token_logprob"}:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


def test_gradients_reach_what_learns_and_nothing_else():
    model = make().train()
    values = model(BATCH)
    (values.q.sum() + values.v.sum() + values.logprob.sum()).backward()
    assert model.trunk.token_embedding.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.heads.target_q.parameters())
    assert not values.target_q.requires_grad

    frozen = make(freeze=True).train()
    assert frozen.heads.training
    assert not frozen.trunk.training
    values = frozen(BATCH)
    (values.q.sum() + values.v.sum()).backward()
    assert all(p.grad is None for p in frozen.trunk.parameters())
    assert all(p.grad is not None for p in frozen.heads.q.parameters())


def test_heads_stay_in_fp32_under_autocast():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = model(BATCH)
    assert {vars(values)[name].dtype for name in PLAIN} == {torch.float32}
    torch.testing.assert_close(values.q, model(BATCH).q, atol=0.2, rtol=0.1)
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}


def test_a_batch_without_decisions_gives_zeros():
    batch = collate([Trajectory([1, 3], [False, True], [0.0, 1.0], False)], end_ids=[3])
    assert not batch.mask.any()
    values = make()(batch)
    assert values.q.eq(0).all()
    assert values.logprob.eq(0).all()


def test_values_are_said_anew_in_one_piece(tmp_path, monkeypatch):
    def cut(path, text, *_):
        path.write_bytes(text.encode()[:20])
        raise OSError("no space left")

    model = make()
    model.save(tmp_path)
    model.info.recommended_guidance = {"beta": 2.0}
    monkeypatch.setattr("pathlib.Path.write_text", cut)
    with pytest.raises(QvgptError, match=r"value_config.json: cannot be written \(no space left"):
        model.save_config(tmp_path)
    assert ValueModel.from_pretrained(tmp_path).info.recommended_guidance is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear", "mlp"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_read_it_is_the_same(tmp_path, kind, tied):
    model = make(kind, tied=tied, num_q=3, v="linear")
    model.info.gamma = 0.9
    model.info.objectives = [{"ILQL": {"weight": 1.0}}]
    model.info.recommended_guidance = {"beta": 2.0}
    model.save(tmp_path)
    again = ValueModel.from_pretrained(tmp_path).eval()
    assert again.info == model.info
    assert again.heads.config == model.heads.config
    assert again.tokenizer.sha256 == TOKENIZER.sha256
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name in model.offers:
        found, expected = (getattr(m(BATCH), name) for m in (again, model))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits = hf(BATCH.tokens[:1]).logits
    torch.testing.assert_close(logits, model.trunk(BATCH.tokens[:1]), atol=1e-5, rtol=0)
    assert hf.generation_config.eos_token_id == [3, 4]


@torch.no_grad()
def test_distributions_are_read_at_the_states_of_the_decisions(tmp_path):
    model = make("categorical", bins=6, low=-2.0, high=3.0)
    values = model(BATCH)
    assert values.q_logsumexp is None
    assert values.return_logits.shape == (2, 3, 3, 6)
    assert values.v_return_logits.shape == (3, 4, 6)
    centres = values.support.centres(values.v)
    for head in range(2):
        mean = (values.return_logits[head].softmax(-1) @ centres).where(BATCH.mask, 0.0)
        torch.testing.assert_close(values.q[head], mean, atol=1e-5, rtol=0)
    mean = (values.v_return_logits.softmax(-1) @ centres).where(used_states(BATCH.mask), 0.0)
    torch.testing.assert_close(values.v, mean, atol=1e-5, rtol=0)
    assert values.return_logits[:, ~BATCH.mask].eq(0).all()
    model.save(tmp_path)
    again = ValueModel.from_pretrained(tmp_path).eval()
    assert again.heads.config == model.heads.config
    assert torch.equal(again(BATCH).return_logits, values.return_logits)
    config = json.loads((tmp_path / "value_config.json").read_text())
    for wrong in ({"bins": 10**12}, {"rank": 5}):
        heads = {"heads": config["heads"] | wrong}
        (tmp_path / "value_config.json").write_text(json.dumps(config | heads))
        with pytest.raises(QvgptError, match="does not fit value_config"):
            ValueModel.from_pretrained(tmp_path)


def test_the_reference_is_the_model_as_it_was(tmp_path):
    model = make()
    with pytest.raises(QvgptError, match="keeps no reference"):
        model(BATCH, frozenset({"ref_logprob"}))
    before = model(BATCH).logprob.detach()
    model.keep_reference()
    names = set(model.state_dict())
    with torch.no_grad():
        for p in model.trunk.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.train()
    values = model(BATCH)
    torch.testing.assert_close(values.ref_logprob, before)
    assert not values.ref_logprob.requires_grad
    assert not torch.allclose(values.logprob, before, atol=1e-3)
    policy = (model.trunk.hidden(BATCH.tokens) @ model.trunk.output_weight.T).log_softmax(-1)
    was = model.reference.trunk.hidden(BATCH.tokens) @ model.reference.trunk.output_weight.T
    was = was.log_softmax(-1)
    ratio = (policy - was).exp().where(was.exp() >= 1e-3, 0.0)
    ratio[..., 0] = 0.0  # padding, the dummy
    ratio = model.states(ratio, BATCH).amax(-1)
    for row, steps in ((0, 4), (1, 3), (2, 2)):
        torch.testing.assert_close(values.max_ratio[row, :steps], ratio[row, :steps])
    expected = model.states(policy, BATCH)[:, :-1, 0].where(BATCH.mask, 0.0)
    torch.testing.assert_close(values.dummy_logprob, expected)
    assert names == set(make().state_dict())  # neither saved nor trained
    assert model.trunk.training


@torch.no_grad()
@pytest.mark.parametrize("chunk", [64, 2**26])
def test_the_expected_q_is_that_of_the_judged_policy(monkeypatch, chunk):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    model = make()
    with pytest.raises(QvgptError, match="no policy to judge"):
        model(BATCH, frozenset({"expected_q"}))
    model.judged = lambda h: (h @ model.trunk.output_weight.T).softmax(-1)
    values = model(BATCH, frozenset({"expected_q"}))
    hidden = model.states(model.trunk.hidden(BATCH.tokens), BATCH)
    pi = model.judged(hidden)
    for i, head in enumerate(model.heads.target_q):
        expected = (pi * head(hidden.flatten(0, 1)).view(pi.shape)).sum(-1)
        for row, steps in ((0, 4), (1, 3), (2, 2)):
            torch.testing.assert_close(values.expected_q[i, row, :steps], expected[row, :steps])


def test_reward_scale_is_kept_and_must_be_a_number(tmp_path):
    model = make()
    model.heads.reward_scale = 0.1
    model.save(tmp_path)
    again = ValueModel.from_pretrained(tmp_path)
    assert again.heads.reward_scale == 0.1
    h = torch.randn(3, 16)
    torch.testing.assert_close(again.heads.state_value(h), again.heads.v(h) * 10)
    config = json.loads((tmp_path / "value_config.json").read_text())
    for wrong in (0, -1.0, "1", None, True):
        changed = json.dumps(config | {"reward_scale": wrong})
        (tmp_path / "value_config.json").write_text(changed)
        with pytest.raises(QvgptError, match="reward_scale: a number above 0"):
            ValueModel.from_pretrained(tmp_path)


def test_a_directory_without_values_is_a_plain_model(tmp_path):
    model = make()
    ValueModel(model.trunk, None, TOKENIZER).save(tmp_path)
    plain = ValueModel.from_pretrained(tmp_path)
    assert plain.heads is None
    with pytest.raises(QvgptError, match="no value heads"):
        plain(BATCH)
    plain(BATCH, frozenset({"logprob", "token_logprob"}))


def test_the_tokenizer_of_a_plain_model_is_known_too(tmp_path, caplog):
    ValueModel(make().trunk, None, TOKENIZER).save(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    Tokenizer.train(["zyxwvu"], "char").save(tmp_path)
    with pytest.raises(QvgptError, match=r"tokenizer\.json is not the one the model was saved"):
        ValueModel.from_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    ValueModel.from_pretrained(tmp_path)


def test_a_plain_model_saved_over_one_with_values_is_plain(tmp_path):
    model = make()
    model.save(tmp_path)
    ValueModel(model.trunk, None, TOKENIZER).save(tmp_path)
    assert ValueModel.from_pretrained(tmp_path).heads is None


def test_what_does_not_belong_together_is_refused(tmp_path):
    big = Tokenizer.train(["abcdefghijklmnopqrstuvwxyzäöü"], "char")
    with pytest.raises(QvgptError, match="do not belong together"):
        make(tokenizer=big)
    make().save(tmp_path)
    Tokenizer.train(["zyxwvu"], "char").save(tmp_path)
    with pytest.raises(QvgptError, match=r"tokenizer\.json is not the one"):
        ValueModel.from_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    config = json.loads((tmp_path / "value_config.json").read_text())
    damaged = {
        "value format 99": {"format_version": 99},
        "does not fit value_config": {"heads": {"kind": "mlp"}},
        "bad heads: .*num_q": {"heads": {"num_q": 0}},
        "bad heads: .*colour": {"heads": {"colour": "red"}},
    }
    for message, change in damaged.items():
        (tmp_path / "value_config.json").write_text(json.dumps(config | change))
        with pytest.raises(QvgptError, match=message):
            ValueModel.from_pretrained(tmp_path)
    with pytest.raises(QvgptError, match="no such directory"):
        ValueModel.from_pretrained(tmp_path / "nowhere")


def test_chunks_change_no_value_of_a_model(monkeypatch):
    model = make("mlp")
    expected = vars(model(BATCH))
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", 64)
    found = vars(model(BATCH))
    for name in model.offers:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change", [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}]
)
def test_another_gpt2_is_not_read_as_ours(tmp_path, change):
    make().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(QvgptError, match="is not known here, only"):
        ValueModel.from_pretrained(tmp_path)
