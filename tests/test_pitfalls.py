"""What went wrong in other implementations of ILQL and its kin: docs/pitfalls.md, by number.

Only what no test elsewhere covers is here.
"""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from mdp import Game, Table, learn
from test_diagnostics import look
from test_trainer import FIT, TOKENIZER, model, run, texts
from torch.utils._python_dispatch import TorchDispatchMode

from qvgpt import GPT, HeadsConfig, Tokenizer, Trajectory, ValueModel
from qvgpt.categorical import Support
from qvgpt.data.rows import Row, row_to_trajectories
from qvgpt.diagnostics import figures
from qvgpt.models import vocab
from qvgpt.models.decision_time import states_of
from qvgpt.models.heads import ValueHeads
from qvgpt.objectives import ILQL, METHODS, Candidates, MonteCarlo, Values, parse_objectives
from qvgpt.trajectory import collate, nothing_counts

# two turns and a text that was cut; rows of unlike length, so that there is padding
BATCH = collate(
    [
        Trajectory([0, 1, 2, 7, 1, 2], [False, True, True, False, True, True],
                   [0.0, 0.25, 0.25, 0.0, 0.0, 0.5], True),
        Trajectory([0, 3, 1], [False, True, True], [0.0, 0.0, 0.25], False),
    ]
)  # fmt: skip
STEPS = BATCH.mask.size(1)
METHOD = pytest.mark.parametrize("name", sorted(METHODS))


def values(seed=0, batch=BATCH):
    """Random ones of every kind."""
    generator = torch.Generator().manual_seed(seed)
    n, steps = batch.mask.shape

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    of_steps = {k: draw(2, n, steps) for k in ("q", "target_q", "q_logsumexp")}
    of_steps |= {k: -draw(n, steps).abs() for k in ("logprob", "ref_logprob", "dummy_logprob")}
    of_states = {k: draw(n, steps + 1) for k in ("v", "q_max")}
    of_states |= {k: draw(2, n, steps + 1) for k in ("target_q_at_argmax", "expected_q")}
    return Values(
        **of_steps,
        **of_states,
        max_ratio=draw(n, steps + 1).sigmoid(),
        token_logprob=-draw(*batch.predicted.shape).abs(),
        return_logits=draw(2, n, steps, 2),
        v_return_logits=draw(n, steps + 1, 2),
        support=Support(0.0, 1.0, 2),
    )


def total(name, found, batch=BATCH, **options):
    return METHODS[name](**options)(found, batch).total


def test_p03_no_module_asks_for_packages_of_large_machines_or_of_extras():
    code = """
import importlib, pkgutil, sys
for name in ("deepspeed", "bitsandbytes", "flash_attn", "xformers", "apex", "ray", "wandb",
             "peft", "sacrebleu", "rouge_score", "datasets", "tensorboard", "matplotlib"):
    sys.modules[name] = None
import qvgpt
for module in pkgutil.walk_packages(qvgpt.__path__, "qvgpt."):
    if module.name != "qvgpt.__main__":
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@METHOD
def test_p08_what_is_masked_is_read_by_nobody(name):
    """Not by way of an index 0 that stands for padding and for the first token alike."""
    plain, spoilt = values(), values()
    assert not BATCH.mask.all()
    states = torch.cat([torch.ones(len(BATCH.mask), 1, dtype=torch.bool), BATCH.mask], dim=1)
    for x in vars(spoilt).values():
        if isinstance(x, torch.Tensor):
            by_bin = x.size(-1) == 2
            used = {STEPS: BATCH.mask, STEPS + 1: states}.get(x.size(-2 if by_bin else -1))
            used = BATCH.predicted if x is spoilt.token_logprob else used
            used = used[..., None] if by_bin else used
            x.copy_(x.where(used, 1e3))
    assert (spoilt.v != plain.v).any()
    assert torch.equal(total(name, spoilt), total(name, plain))


@METHOD
def test_p09_a_loss_is_a_mean_over_decisions_whatever_the_prompts_length(name):
    long = collate(
        [
            Trajectory([0] * 9 + [1, 2, 7, 1, 2], [False] * 9 + [True, True, False, True, True],
                       [0.0] * 9 + [0.25, 0.25, 0.0, 0.0, 0.5], True),
            Trajectory([0, 3, 1], [False, True, True], [0.0, 0.0, 0.25], False),
        ]
    )  # fmt: skip
    assert torch.equal(total(name, values(), long), total(name, values()))
    assert total(name, values(), nothing_counts(BATCH)) == 0


def test_p10_rewards_are_learned_as_they_were_given(monkeypatch):
    """Nothing is standardised behind one's back: that changes what is best of several turns."""
    seen = []
    call = MonteCarlo.__call__
    monkeypatch.setattr(
        MonteCarlo, "__call__", lambda self, v, b: seen.append(b.reward.sum(1)) or call(self, v, b)
    )
    data = [replace(t, reward=[3.0 * r - 7.0 for r in t.reward]) for t in texts(16)]
    data = [replace(t, reward=[r * a for r, a in zip(t.reward, t.is_action, strict=True)])
            for t in data]  # fmt: skip
    m = model()
    run(m, ["MonteCarlo"], replace(FIT, max_steps=2, lr=0.0), data)
    found, given = torch.cat(seen), torch.tensor([t.total_reward for t in data])
    torch.testing.assert_close(found.sort().values, given.sort().values)


def test_p11_each_target_is_read_from_where_it_should_be():
    """V from the lesser of the slow twins, not from a fast one; Q from V as it is."""

    def parts(**change):
        return {k: x.item() for k, x in ILQL()(replace(values(), **change), BATCH).parts.items()}

    before, v = parts(), values()
    fast = parts(q=v.q + 1.0)
    assert fast["v"] == before["v"]
    assert fast["q"] != before["q"]
    slow = parts(target_q=v.target_q - 1.0)
    assert slow["q"] == before["q"]
    assert slow["v"] != before["v"]
    greater = torch.stack([v.target_q.amin(0), v.target_q.amax(0) + 5.0])
    assert parts(target_q=greater)["v"] == before["v"]
    assert parts(v=v.v + 1.0)["q"] != before["q"]


def test_p12_on_a_frozen_trunk_slow_q_moves_by_tau_alone():
    m = model(dropout=0.5, heads=HeadsConfig("linear", v="linear"), freeze=True)
    batch = collate(texts(8))
    m.heads.start_at(0.1)

    def q():
        with torch.no_grad():
            found = m.eval()(batch, frozenset({"q", "target_q"}))
        return found.q, found.target_q

    _, before = q()
    for _ in range(3):
        run(m, ["MonteCarlo"], replace(FIT, max_steps=1, batch_size=8, tau=0.25), texts(8))
        fast, slow = q()
        assert (fast - before).abs().max() > 1e-3
        torch.testing.assert_close(slow, torch.lerp(before, fast, 0.25), atol=1e-5, rtol=0)
        before = slow


def test_p13_a_frozen_trunk_knows_no_dropout_and_its_heads_learn():
    m = model(dropout=0.5, freeze=True)
    batch = collate(texts(8))
    with torch.no_grad():
        for p in m.heads.parameters():
            p.add_(0.3)
    found = [vars(m.train(training)(batch, frozenset({"q", "v", "target_q"})))
             for training in (True, True, False)]  # fmt: skip
    for name in ("q", "v", "target_q"):
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], found[2][name])
    assert found[0]["q"].requires_grad
    assert not found[0]["target_q"].requires_grad


def test_p15_no_tensor_of_decisions_times_vocabulary_is_kept(monkeypatch):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", 8 * 900)
    torch.manual_seed(0)
    m = ValueModel(GPT(900, 16, 2, 1, seq_len=64), HeadsConfig("low_rank", rank=4, v="linear"))
    rows = [Trajectory([*range(60)], [False] * 4 + [True] * 56, [0.0] * 60, True)] * 2
    kept = []
    hooks = (lambda x: kept.append(x.numel()) or x, lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        m(collate(rows), frozenset({"q", "target_q", "v", "q_logsumexp", "logprob"}))
    assert 0 < max(kept) <= 900 * 16 < 2 * 56 * 900


def test_p16_low_rank_heads_are_a_fraction_of_their_model():
    """Twin MLP heads with slow copies of GPT-2's size are 2.5 times the model."""

    def share(kind):
        with torch.device("meta"):
            heads = ValueHeads(768, 50257, HeadsConfig(kind, rank=64))
        return sum(p.numel() for p in heads.parameters()) / 124e6

    assert share("low_rank") < 0.2
    assert share("mlp") > 2


def test_p17_a_heavy_conservative_term_shows_in_the_figures():
    """Q turns into a copy of the logits, and its errors and its size say so."""
    game = Game.draw(3, horizon=3, stochastic=True)
    batch, prompts = game.batch(cut=False), [t.prompt for t in game.texts(cut=False)]
    found = {}
    for weight in (0.0, 1e-3, 1.0):
        table = learn(ILQL(gamma=1.0, expectile=0.5, cql_weight=weight), Table(game), batch, 300)
        with torch.no_grad():
            found[weight] = figures(look(table(batch, {"v", "target_q"}), batch), prompts)
    none, light, heavy = found.values()
    assert abs(light["td_error"]) < 0.02
    assert heavy["td_error_abs"] > 1.5 * none["td_error_abs"]
    assert light["td_error_abs"] < 1.1 * none["td_error_abs"]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_p21_a_prompt_is_read_in_training_as_it_is_when_decoding(kind):
    """Pieces never join across the boundary, and there is one token that begins a text."""
    tokenizer = Tokenizer.train(["hello there hello then"] * 5, kind, vocab_size=280)
    for prompt, completion in (("hel", "lo"), ("hello ", "there"), ("", "then")):
        row = Row("row", {"prompt": prompt, "completion": completion})
        [text] = row_to_trajectories(row, tokenizer)
        assert list(text.prompt) == tokenizer.encode_prompt(prompt)
        assert list(text.tokens).count(tokenizer.template.bos) == 1
        said = [t for t, a in zip(text.tokens, text.is_action, strict=True) if a]
        assert tokenizer.decode(said[:-1]) == completion


@METHOD
def test_p22_a_discount_of_zero_makes_no_nan(name):
    options = {"gamma": 0.0} if "gamma" in {f.name for f in fields(METHODS[name])} else {}
    assert total(name, values(), **options).isfinite()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return found


def test_p23_decisions_are_gathered_in_space_linear_in_the_text():
    sizes = []
    for n in (1000, 4000):
        text = Trajectory([1] * n, [False] + [True] * (n - 1), [0.0] * n, True)
        with Largest() as largest:
            batch = collate([text] * 3)
            states_of(torch.zeros(3, n, 8), batch)
        sizes.append(largest.size)
    assert sizes[1] <= 4.1 * sizes[0]


def test_p24_small_steps_and_fractions_are_not_rounded_away():
    m = model(heads=HeadsConfig("linear"))
    m.trunk.to(torch.bfloat16)
    with torch.no_grad():
        for p in m.heads.q.parameters():
            p.fill_(1.001)
        for p in m.heads.target_q.parameters():
            p.fill_(1.0)
    for _ in range(100):
        m.heads.update_targets(1e-3)
    expected = 1.001 - 0.001 * (1 - 1e-3) ** 100
    for slow in m.heads.target_q.parameters():
        assert slow.flatten()[0].item() == pytest.approx(expected, abs=5e-6)
    batch = collate([Trajectory([1, 2, 3], [False, True, True], [0.0, 0.3, -0.7], True)])
    assert batch.reward[0].tolist() == pytest.approx([0.3, -0.7])


# an option of each method, to another value than its default
OTHERWISE = {
    "on": "all", "min_return": 0.5, "top_share": 0.5, "temperature": 0.3, "max_weight": 0.9,
    "gamma": 0.5, "lambda_": 0.4, "per_turn_discount": True, "expectile": 0.9, "cql_weight": 0.7,
    "eta": 0.5, "level": "turn", "bootstrap": "turn", "whole_path": True,
}  # fmt: skip


@METHOD
def test_p26_every_option_is_read(name):
    method = METHODS[name]
    for option in fields(method):
        if option.name in ("top_k", "min_p"):  # read by the model, on the objective's behalf
            said = {"top_k": 3} if option.name == "top_k" else {"min_p": 0.25}
            assert parse_objectives([{name: said}]).candidates == Candidates(**said)
            continue
        base = {"gamma": 0.5} if option.name == "per_turn_discount" else {}
        base |= {"cql_weight": 0.0} if option.name == "level" else {}
        plain, other = method(**base), method(**base, **{option.name: OTHERWISE[option.name]})
        if option.name == "top_share":
            other = other.fitted_to([1.0, 0.25])
        assert not torch.equal(plain(values(), BATCH).total, other(values(), BATCH).total), option


def test_p27_norms_are_of_what_learns_and_nothing_watches_for_anomalies(monkeypatch):
    """Slow copies have no gradient that a norm could count or clip."""
    m = model()
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append([p.grad is not None for p in m.heads.target_q.parameters()])
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    run(m, ["LM", "ILQL"], replace(FIT, max_steps=2, micro_batch_size=2))
    assert seen
    assert not any(map(any, seen))
    assert not torch.is_anomaly_enabled()
    assert TOKENIZER is m.tokenizer
