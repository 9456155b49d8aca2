import copy
import io
import json
import math
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_hf import make_hf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qvgpt import GPT, HeadsConfig, QvgptError, RandomWalks, Tokenizer, Trajectory, ValueModel
from qvgpt.data.batches import Rows, batches
from qvgpt.data.sizes import GPTShape, TokenizerConfig
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.fit_options import FitOptions, step_seed
from qvgpt.loop import Training, fit
from qvgpt.models.causal_lm import CausalLM
from qvgpt.objectives import parse_objectives
from qvgpt.run import RunProgress, alone_in, open_run, read_log
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train
from qvgpt.trajectory import centred, collate, mean_return

QUIET = Console(quiet=True)
BOTH = ["LM", {"ILQL": {"gamma": 1.0}}]
WALKS = RandomWalks.draw(0)
ROWS = WALKS.logged_walks(60, 0)
TOKENIZER = Tokenizer.train(WALKS.letters, "char")
TINY = GPTShape(embed_dim=16, num_heads=2, num_layers=1, seq_len=24, dropout=0.1)
FIT = FitOptions(max_steps=4, epochs=100.0, batch_size=8, lr=1e-2, tau=0.5)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only lose by more, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


def texts(count=60, reward=1.0):
    def one(row):
        prompt = TOKENIZER.encode_prompt(row["prompt"])
        said = [*TOKENIZER.encode(row["completion"]), TOKENIZER.template.eos]
        is_action = [False] * len(prompt) + [True] * len(said)
        return Trajectory(
            prompt + said, is_action, [0.0] * (len(is_action) - 1) + [reward * row["reward"]], True
        )

    return [one(row) for row in ROWS[:count]]


def length(text):
    return len(text.tokens)


def model(dropout=0.0, heads=HeadsConfig(num_q=2), freeze=False):  # noqa: B008
    torch.manual_seed(1)
    gpt = GPT(TOKENIZER.vocab_size, 16, 2, 1, 24, dropout)
    return ValueModel(gpt, heads or None, TOKENIZER, freeze)


def run(m, objectives=BOTH, options=FIT, data=None, **more):
    data = texts() if data is None else data
    return fit(m, data, parse_objectives(objectives), options, console=QUIET, **more)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_p01_slow_targets_move_on_every_step_and_only_by_tau(monkeypatch):
    m = model()
    found = []
    step = RunProgress.step

    def spy(self, *args):
        slow, fast = dict(m.heads.target_q.state_dict()), dict(m.heads.q.state_dict())
        found.append(
            ({k: v.clone() for k, v in slow.items()}, {k: v.clone() for k, v in fast.items()})
        )
        return step(self, *args)

    monkeypatch.setattr(RunProgress, "step", spy)
    m.heads.start_at(0.1)  # as fit does on heads that are fresh
    before = {k: v.clone() for k, v in m.heads.target_q.state_dict().items()}
    run(m)
    assert len(found) == 4
    for slow, fast in found:
        for head in ("0.", "1."):  # layers below a zero one wait for a step: some tensor moves
            assert any(not torch.equal(slow[k], before[k]) for k in slow if k.startswith(head))
        for k, was in before.items():
            torch.testing.assert_close(slow[k], torch.lerp(was, fast[k], 0.5))
        before = slow


@pytest.mark.parametrize(
    "objectives",
    [
        BOTH,
        [{"LM": {"on": "all"}}, "MonteCarlo"],
        [{"LM": {"min_return": 0.1}}, "MonteCarlo"],
        [{"LM": {"on": "all", "min_return": 0.1}}, "MonteCarlo"],
        ["LM", "AWR", "MonteCarlo"],
        ["LM", {"DoubleQ": {"cql_weight": 0.0, "gamma": 1.0}}, "SARSA"],
        [{"LM": {"top_share": 0.4}}, "PathConsistency", "QSFT"],
        ["LM", "ReturnDistribution", "FUDGE"],
    ],
)
def test_four_micro_batches_or_other_rows_are_one_batch(objectives):
    """In gradients: Adam blows rounding up where one is 0 by construction (the keys' bias)."""
    found = []

    def keep(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        grads = [g.clone() for g in grads if g is not None]
        found.append(torch.cat([g.flatten() for g in grads]))

    hook = register_optimizer_step_pre_hook(keep)
    data = [*texts(2), *sorted(texts(), key=length)[:2]]
    assert len({t.total_reward >= 0.1 for t in data}) == 2
    ways = [(None, {}), (1, {}), (None, {"packed": True}), (2, {"packed": True})]
    if not any("all" in str(o) for o in objectives):
        ways += [(None, {"share_prompts": True}), (2, {"share_prompts": True})]
    for size, way in ways:
        # texts differ in length, so that a mean of means would be wrong
        options = replace(FIT, max_steps=1, batch_size=4, micro_batch_size=size, clip=1e9)
        categorical = HeadsConfig("categorical", rank=3, bins=2)
        m = model(heads=categorical if "FUDGE" in objectives else HeadsConfig())
        run(m, objectives, replace(options, **way), data)
    hook.remove()
    assert found[0].abs().max() > 0.01
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_frozen_trunk_is_bit_unchanged_and_the_heads_learn():
    m = model(dropout=0.5, freeze=True)
    trunk = {k: v.clone() for k, v in m.trunk.state_dict().items()}
    heads = {k: v.clone() for k, v in m.heads.state_dict().items()}
    run(m, ["MonteCarlo"], replace(FIT, max_steps=8))
    assert same(trunk, m.trunk.state_dict())
    assert not same(heads, m.heads.state_dict())
    with pytest.raises(QvgptError, match="nothing is left to train"):
        run(m, ["LM"])


def test_bf16_autocast_leaves_parameters_and_values_in_fp32():
    m = model()
    summary = run(m, options=replace(FIT, bf16=True), eval_data=texts(9))
    assert {p.dtype for p in m.parameters()} == {torch.float32}
    assert math.isfinite(summary["eval"]["total"])
    seen = []
    m.heads.v.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    run(m, options=replace(FIT, bf16=True, max_steps=1))
    assert {x.dtype for x in seen} == {torch.float32}


def test_dropout_is_that_of_the_run_and_the_shape_stays(tmp_path):
    plain, dropping, told = model(), model(0.5), model(0.5)
    for m, dropout in ((plain, None), (dropping, None), (told, 0.0)):
        run(m, options=replace(FIT, dropout=dropout))
    assert same(plain.state_dict(), told.state_dict())
    assert not same(plain.state_dict(), dropping.state_dict())
    told.save(tmp_path)
    assert ValueModel.from_pretrained(tmp_path).trunk.shape["dropout"] == 0.5
    with pytest.raises(QvgptError, match="dropout: must be at most 1"):
        FitOptions(dropout=1.5)


def test_it_learns_and_keeps_the_best(tmp_path):
    m = model()
    options = replace(FIT, max_steps=30, eval_every=5, keep_best="LM/nll")
    summary = run(m, options=options, eval_data=texts(20), output=tmp_path)
    evals = [e["eval/LM/nll"] for e in read_log(tmp_path / "log.jsonl") if "eval/LM/nll" in e]
    assert len(evals) == 6
    assert summary["best"] == min(evals) < evals[0]
    again = run(model(), options=replace(options, max_steps=1), eval_data=texts(20))
    assert again["eval"]["total"] > summary["eval"]["total"]
    assert same(dict(ValueModel.from_pretrained(tmp_path).state_dict()), dict(m.state_dict()))


class Killed(Exception):
    pass


@contextmanager
def stopped_at(last):
    """Training ends with `Killed` after this step, before it is saved."""
    step = RunProgress.step

    def kill(self, at, *args):
        step(self, at, *args)
        if at == last:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunProgress, "step", kill)
        yield


def test_p02_resume_is_bit_identical(tmp_path):
    """20 steps straight == a checkpoint at 10, a kill at 13, and the rest."""
    options = replace(
        FIT, max_steps=20, save_every=5, eval_every=3, keep_best="total", patience=5, lr=0.1
    )
    more = {"options": options, "eval_data": texts(9)}
    straight, resumed = model(dropout=0.3), model(dropout=0.3)
    expected = run(straight, output=tmp_path / "a", **more)
    with stopped_at(13), pytest.raises(Killed):
        run(resumed, output=tmp_path / "b", **more)
    fresh = model(dropout=0.3)
    found = run(fresh, output=tmp_path / "b", resume=True, **more)
    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
    assert same(dict(straight.state_dict()), dict(fresh.state_dict()))
    logs = [read_log(tmp_path / name / "log.jsonl") for name in "ab"]
    for log in logs:
        for entry in log:
            entry.pop("tokens_per_second", None)
    assert logs[0] == logs[1]


def test_resume_passes_over_what_is_damaged_and_refuses_other_data(tmp_path):
    options = replace(FIT, max_steps=20, save_every=5)
    straight = model(dropout=0.3)
    run(straight, options=options, output=tmp_path / "a")
    run(model(dropout=0.3), options=options, output=tmp_path / "b")
    newest = tmp_path / "b/checkpoints/step-00000020/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    said = io.StringIO()
    resumed = model(dropout=0.3)
    fit(resumed, texts(), parse_objectives(BOTH), options, output=tmp_path / "b", resume=True,
        console=Console(file=said))  # fmt: skip
    assert "step-00000020: optimizer.safetensors has" in said.getvalue()
    assert same(dict(straight.state_dict()), dict(resumed.state_dict()))
    other = [replace(t, reward=[0.0] * len(t.reward)) for t in texts()]
    with pytest.raises(QvgptError, match="other data"):
        run(model(), options=options, data=other, output=tmp_path / "b", resume=True)


def test_a_resumed_run_that_finds_nothing_better_has_the_best_of_its_checkpoint(tmp_path):
    options = replace(FIT, max_steps=8, eval_every=1, save_every=4, keep_best="LM/nll", keep=1)
    more = {"eval_data": texts(20), "output": tmp_path}
    with stopped_at(7), pytest.raises(Killed):
        run(model(), options=options, **more)
    assert (tmp_path / "best/step-00000006").exists()  # better than what the checkpoint knows
    still = replace(options, lr=0.0)
    assert run(model(), options=still, resume=True, **more)["best_step"] == 4


def test_epochs_are_counted_without_their_rounding():
    steps = {}
    for epochs in (1.1, 1.101, 1e-15):
        options = FitOptions(epochs=epochs, batch_size=1)
        training = Training(model(), texts(50), parse_objectives(BOTH), options)
        steps[epochs] = training.total_steps
    assert steps == {1.1: 55, 1.101: 56, 1e-15: 1}


def test_patience_stops_and_the_best_is_kept_in_memory_too():
    m = model()
    options = replace(FIT, max_steps=50, lr=0.0, eval_every=1, keep_best="total", patience=3)
    summary = run(m, options=options, eval_data=texts(5))
    assert (summary["steps"], summary["best_step"]) == (4, 1)


def test_ctrl_c_saves_the_whole_step(tmp_path, monkeypatch):
    step = RunProgress.step

    def interrupt(self, at, *args):
        step(self, at, *args)
        if at == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "step", interrupt)
        with pytest.raises(KeyboardInterrupt, match="step 2 is in"):
            run(model(dropout=0.3), output=tmp_path)
    straight, resumed = model(dropout=0.3), model(dropout=0.3)
    run(straight)
    run(resumed, output=tmp_path, resume=True)
    assert same(dict(straight.state_dict()), dict(resumed.state_dict()))


def test_tensorboard(tmp_path, monkeypatch):
    run(model(), options=replace(FIT, max_steps=1, tensorboard=True), output=tmp_path)
    assert list(tmp_path.glob("tensorboard/events.out.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(QvgptError, match=r"pip install 'qvgpt\[tensorboard\]'"):
        run(model(), options=replace(FIT, tensorboard=True), output=tmp_path / "b")


def masked():
    end = TOKENIZER.template.eos  # cut right after a turn: its only decision has no target
    return Trajectory([1, 9, end], [False, False, True], [0.0] * 3, False)


BAD = {
    "empty": ({"data": []}, "the data set is empty"),
    "NaN reward": ({"data": texts(3, math.nan)}, "text 1 of 3: its reward is NaN"),
    "masked": ({"data": [masked()]}, "step 1: no decision in the whole batch counts"),
    "too long": (
        {"data": [Trajectory([1] * 30, [False] * 29 + [True], [0.0] * 30, True)]},
        "30 tok",
    ),
    "no eval": ({"options": replace(FIT, keep_best="total")}, "fit.keep_best: needs evaluation"),
    "no part": (
        {"options": replace(FIT, keep_best="nll", max_steps=1), "eval_data": texts(2)},
        r"no loss part 'nll' \(did you mean 'LM/nll'\?\); there are total, LM/nll",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_clear_line(case):
    more, message = BAD[case]
    with pytest.raises(QvgptError, match=message) as caught:
        run(model(), **more)
    assert "\n" not in str(caught.value)


def test_a_masked_micro_batch_is_left_out():
    run(model(), data=[masked(), *texts(3)], options=replace(FIT, micro_batch_size=1))


def test_a_loss_that_is_nan_stops_before_the_weights_are_spoilt():
    m = model()
    with torch.no_grad():
        m.trunk.norm.weight[0] = math.nan
    with pytest.raises(QvgptError, match=r"step 1: total, .* became NaN or infinite; lower"):
        run(m)
    assert not m.heads.v.layers[0].weight.isnan().any()


@pytest.mark.parametrize("freeze", [True, False])
def test_a_constant_in_all_rewards_leaves_guidance_alone(freeze):
    """Through the real loop: only values know the constant, no advantage does."""
    found = []
    for constant in (0.0, -5.0):
        m = model(freeze=freeze)
        data = [replace(t, reward=[*t.reward[:-1], t.reward[-1] + constant]) for t in texts()]
        options = replace(FIT, max_steps=30, batch_size=20)
        run(m, ["LM", "MonteCarlo"] if not freeze else ["MonteCarlo"], options, data)
        batch = collate(texts(10))
        with torch.no_grad():
            hidden = m.trunk.hidden(batch.tokens)[batch.attention_mask]
            policy = next_token(m, hidden, Guidance(beta=5.0)).logprob.exp()
            plain = next_token(m, hidden, Guidance()).logprob.exp()
            found.append((policy, m.heads.v(hidden)))
        assert (policy - plain).abs().max() > 0.02
    (one, v_one), (two, v_two) = found
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)
    torch.testing.assert_close(v_one - 5.0, v_two, atol=2e-2, rtol=0)


def test_only_fresh_heads_start_at_the_mean_return(tmp_path):
    still = replace(FIT, max_steps=1, lr=0.0)
    m = model()
    assert m.heads.are_fresh
    run(m, options=still, output=tmp_path)
    assert not m.heads.are_fresh
    start = mean_return(texts())
    assert start > 0.01
    assert m.heads.v(torch.randn(3, 16)).detach().tolist() == pytest.approx([start] * 3)
    learnt = ValueModel.from_pretrained(tmp_path)
    run(learnt, options=still, data=texts(reward=7.0))
    assert learnt.heads.v(torch.randn(1, 16)).item() == pytest.approx(start)
    plain = model()
    run(plain, ["LM"])
    assert plain.heads.are_fresh


def test_a_batch_without_a_good_text_teaches_a_filtered_lm_nothing():
    m = model(heads=False)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    good = replace(texts(1)[0], reward=[0.0] * (length(texts(1)[0]) - 1) + [9.0])
    options = replace(FIT, weight_decay=0.0, max_steps=1, batch_size=4, micro_batch_size=3)
    run(m, [{"LM": {"min_return": 9.0}}], options, [*texts(), good])
    assert same(before, m.state_dict())
    run(m, [{"LM": {"min_return": 9.0}}], options, [*texts(3), good])
    assert not same(before, m.state_dict())


def test_objectives_for_which_nothing_counts_are_refused():
    cut = [replace(t, terminated=False) for t in texts(8)]
    two = HeadsConfig("categorical", rank=3, bins=2)
    cases = [
        ([{"LM": {"min_return": 9.0}}], HeadsConfig(), texts(8), {}, "texts to train on .* LM"),
        (["LM", "FUDGE"], two, cut, {}, "texts to train on .* FUDGE"),
        (["LM", "ReturnDistribution"], two, cut, {}, "texts to train on .* ReturnDistribution"),
        ([{"LM": {"top_share": 0.5}}], HeadsConfig(), texts(8), {"keep_best": "LM/nll"},
         "evaluation texts .* LM"),
    ]  # fmt: skip
    for objectives, heads, data, options, match in cases:
        worse = [replace(t, reward=[-9.0 * a for a in t.is_action]) for t in texts(8)]
        with pytest.raises(QvgptError, match=match):
            run(model(heads=heads), objectives, replace(FIT, **options), data, eval_data=worse)
    found = run(
        model(), [{"LM": {"top_share": 0.5}}, "MonteCarlo"], eval_data=[worse[0]],
        options=replace(FIT, eval_every=1, keep_best="MonteCarlo/v"),
    )  # fmt: skip
    assert "LM/nll" not in found["eval"]
    assert found["eval"]["MonteCarlo/v"] > 0


def test_sums_of_many_rewards_reach_the_threshold_that_they_make():
    """fp32 knows 2.3 · 12 to six digits, and the threshold was found in fp64."""
    t = texts(1)[0]
    several = replace(t, reward=[0.0 if not a else 2.3 for a in t.is_action])
    ((_, lm),) = parse_objectives([{"LM": {"top_share": 0.5}}]).fitted_to([several] * 4).terms
    batch = collate([several] * 4)
    assert lm.min_return > 10
    assert lm.counted(batch).any(1).all()
    less = replace(several, reward=[0.999 * r for r in several.reward])
    assert not lm.counted(collate([less])).any()


def test_returns_that_qsft_does_not_know_are_refused():
    for reward, known in ((-1.0, False), (1.5, False), (1.0, True)):
        data = [replace(t, reward=[0.0] * (length(t) - 1) + [reward]) for t in texts(4)]
        m = model()
        m.keep_reference()
        if known:
            run(m, ["QSFT"], data=data)
            continue
        with pytest.raises(QvgptError, match=r"its return .* is not in \[0, 1\]"):
            run(m, ["QSFT"], data=data)


def test_values_that_nobody_teaches_weigh_nothing():
    for objectives in (["AWR"], ["LM", "AWAC"]):
        with pytest.raises(QvgptError, match="add ILQL or MonteCarlo"):
            run(model(), objectives)
    m = model()
    run(m, ["MonteCarlo"])
    run(m, ["AWR"])


def test_the_best_is_kept_without_a_tokenizer_too(tmp_path):
    m = model()
    m.tokenizer = None
    options = replace(FIT, keep_best="total", eval_every=1)
    run(m, options=options, eval_data=texts(8), output=tmp_path)
    assert (tmp_path / "value_heads.safetensors").exists()


def test_shared_prompts_are_refused_where_they_are_learned_or_cannot_be_shared():
    shared = replace(FIT, share_prompts=True)
    with pytest.raises(QvgptError, match=r"fit.share_prompts: LM with `on: all` learns a prompt"):
        run(model(), [{"LM": {"on": "all"}}, "MonteCarlo"], options=shared)
    windows = ValueModel(CausalLM(make_hf("mistral")), HeadsConfig(), TOKENIZER)
    with pytest.raises(QvgptError, match=r"fit.share_prompts: Mistral.* leave it off"):
        run(windows, ["LM", "MonteCarlo"], options=shared)


def test_no_heads():
    with pytest.raises(QvgptError, match="no value heads"):
        run(model(heads=False))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch_size": 0}, "fit.batch_size: must be at least 1, not 0"),
        ({"epochs": 0.0}, "fit.epochs: must be more than 0"),
        ({"tau": 2.0}, "fit.tau: must be at most 1"),
        ({"patience": 2}, "fit.patience: needs fit.keep_best"),
        ({"packed": True, "share_prompts": True}, "two ways to fill a row"),
    ],
)
def test_options_are_refused_by_name(bad, message):
    with pytest.raises(QvgptError, match=message):
        FitOptions(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_heads": 0}, "gpt.num_heads: must be at least 1, not 0"),
        ({"embed_dim": -16}, "gpt.embed_dim: must be at least 1, not -16"),
        ({"num_layers": 0}, "gpt.num_layers: must be at least 1, not 0"),
        ({"dropout": 2.0}, "gpt.dropout: must be between 0 and 1, not 2"),
    ],
)
def test_shapes_are_refused_by_name(bad, message):
    with pytest.raises(QvgptError, match=message):
        GPTShape(**bad)


def test_batches_hold_everything_once_and_like_lengths_together():
    lengths = [i % 37 for i in range(500)]
    found = batches(lengths, 8, seed=3, epoch=1)
    assert sorted(i for batch in found for i in batch) == list(range(500))
    assert found == batches(lengths, 8, seed=3, epoch=1) != batches(lengths, 8, seed=3, epoch=2)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in found]
    assert sum(spread) / len(spread) < 2
    loose = batches(lengths, 8, seed=3, epoch=1, bucketed=False)
    assert sorted(i for batch in loose for i in batch) == list(range(500))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in loose]
    assert sum(spread) / len(spread) > 20


def test_texts_of_a_prompt_come_together():
    lengths = [1 + i % 9 for i in range(200)]
    data = [
        Trajectory([i % 50] + [7] * n, [False] + [True] * n, [0.0] * (n + 1), True)
        for i, n in enumerate(lengths)
    ]  # four texts of each prompt
    rows = Rows(data, shared=True)
    assert rows.prompts == [[i, i + 50, i + 100, i + 150] for i in range(50)]
    found = rows.batches(8, seed=3, epoch=1)
    assert sorted(i for batch in found for i in batch) == list(range(200))
    assert all(len(batch) == 8 and len({i % 50 for i in batch}) == 2 for batch in found)
    assert found != rows.batches(8, seed=3, epoch=2)
    for batch in found:
        tokens = collate([data[i] for i in batch], shared=True).tokens
        assert rows.padded_tokens(batch) == tokens.numel()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "walks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainConfig(
        data=[str(path)],
        output=str(tmp_path / "run"),
        gpt=TINY,
        tokenizer=TokenizerConfig(kind="char"),
        objectives=BOTH,
        fit=replace(FIT, save_every=2),
    )


@pytest.mark.parametrize(
    ("objectives", "shared", "is_said"),
    [(BOTH, False, True), (BOTH, True, False), ([{"LM": {"on": "all"}}], False, False)],
)
def test_it_is_said_where_sharing_prompts_would_save_much(config, objectives, shared, is_said):
    several = [{"prompt": "abcdefgh", "completion": x, "reward": 1.0} for x in "abcdefgh"]
    Path(config.data[0]).write_text("".join(json.dumps(row) + "\n" for row in several))
    said = Console(file=io.StringIO())
    fit = replace(config.fit, share_prompts=shared, max_steps=1)
    train(replace(config, objectives=objectives, fit=fit), said)
    text = "73% of the tokens are prompts that other texts have too: fit.share_prompts"
    assert (text in said.file.getvalue()) == is_said


def test_train_from_files_to_files(config):
    summary = train(replace(config, eval_data=config.data), QUIET)
    out = Path(config.output)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["data"]["trajectories"], summary["steps"]) == (60, 4)
    assert set(summary["parameters"]) == {"trunk", "q", "v"}
    assert not (out / "checkpoints").exists()
    learnt = ValueModel.from_pretrained(out)
    assert learnt.info.objectives[1]["ILQL"]["gamma"] == 1.0
    from transformers import AutoModelForCausalLM

    x = torch.tensor([[1, 9, 2]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(x).logits
        torch.testing.assert_close(theirs, learnt.eval().trunk(x))


def test_train_on_from_a_model_with_and_without_heads(config, tmp_path):
    plain = replace(config, objectives=["LM"], output=str(tmp_path / "lm"))
    train(plain, QUIET)
    assert not (tmp_path / "lm" / "value_config.json").exists()
    heads = HeadsConfig(kind="low_rank", rank=4)
    value = replace(
        config, model=plain.output, freeze_trunk=True, objectives=["MonteCarlo"], heads=heads
    )
    train(value, QUIET)
    before, after = (ValueModel.from_pretrained(c.output) for c in (plain, value))
    assert same(dict(before.trunk.state_dict()), dict(after.trunk.state_dict()))
    assert after.heads.config == heads
    more = replace(value, model=value.output, output=str(tmp_path / "more"), heads=None)
    assert train(more, QUIET)["parameters"]["q"] > 0
    same_kind = replace(more, heads=HeadsConfig(rank=4), output=str(tmp_path / "same"))
    train(same_kind, QUIET)
    assert ValueModel.from_pretrained(same_kind.output).heads.config == heads
    with pytest.raises(QvgptError, match=r"heads: .* has other ones"):
        train(replace(more, heads=HeadsConfig(kind="mlp"), output=str(tmp_path / "x")), QUIET)


@pytest.mark.parametrize("objectives", [["LM"], ["AWR"]])
def test_values_that_no_longer_fit_the_trunk_are_left_out(config, tmp_path, objectives):
    train(config, QUIET)
    learnt = ValueModel.from_pretrained(config.output)
    learnt.info.recommended_guidance = {"beta": 2.0}
    learnt.save(config.output)
    console = Console(record=True, quiet=False, file=io.StringIO())
    after = replace(
        config, model=config.output, objectives=objectives, output=str(tmp_path / "after")
    )
    summary = train(after, console)
    assert console.export_text().count("saved without its value heads") == 1
    assert set(summary["parameters"]) == {"trunk"}
    assert not list((tmp_path / "after").glob("value_*"))
    assert ValueModel.from_pretrained(after.output).heads is None


def test_what_is_said_of_values_follows_their_training(config, tmp_path):
    train(replace(config, objectives=[{"ILQL": {"gamma": 0.9, "per_turn_discount": True}}]), QUIET)
    learnt = ValueModel.from_pretrained(config.output)
    assert (learnt.info.gamma, learnt.info.per_turn_discount) == (0.9, True)
    learnt.info.recommended_guidance = {"beta": 2.0}
    per_turn = {"gamma": 0.9, "per_turn_discount": True}
    for other in ({"gamma": 0.9}, {"gamma": 0.1, "per_turn_discount": True}):
        with pytest.raises(QvgptError, match=r"AWR compares .* gamma 0.9, per_turn_discount, its"):
            run(copy.deepcopy(learnt), [{"AWR": other}])
    run(copy.deepcopy(learnt), [{"AWR": per_turn}])
    learnt.info.level = "turn"
    with pytest.raises(QvgptError, match="values are of whole turns"):
        run(learnt, ["AWAC"])
    learnt.info.level = "token"
    with pytest.raises(QvgptError, match=r"AWR compares .* gamma 0.8, its own gamma 1: give"):
        run(learnt, ["AWR", {"MonteCarlo": {"gamma": 0.8}}])
    run(learnt, ["AWAC", {"AWR": {"gamma": 0.8}}, {"MonteCarlo": {"gamma": 0.8}}])
    assert (learnt.info.gamma, learnt.info.per_turn_discount) == (0.8, False)
    assert learnt.info.recommended_guidance is None


def test_centred_values_are_those_of_centred_returns(config, tmp_path):
    config = replace(config, objectives=["MonteCarlo"])
    train(replace(config, centred=True), QUIET)
    learnt = ValueModel.from_pretrained(config.output)
    assert learnt.info.centred
    plain = replace(config, output=str(tmp_path / "plain"))
    train(plain, QUIET)
    other = ValueModel.from_pretrained(plain.output)
    assert not other.info.centred
    assert not same(learnt.heads.state_dict(), other.heads.state_dict())
    assert mean_return(centred(texts())) != pytest.approx(mean_return(texts()), abs=1e-3)
    again = {"model": config.output, "output": str(tmp_path / "again")}
    with pytest.raises(QvgptError, match=r"centred: the values .* learned with true: say the same"):
        train(replace(config, **again), QUIET)
    train(replace(config, **again, centred=True), QUIET)
    assert ValueModel.from_pretrained(again["output"]).info.centred
    one = tmp_path / "one.jsonl"
    rows = ({"prompt": c, "completion": c, "reward": 1} for c in "ab")
    one.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(QvgptError, match="centred: every prompt has one text"):
        train(replace(config, data=[str(one)], centred=True, output=str(tmp_path / "x")), QUIET)


def test_values_need_rewards(config, tmp_path):
    def said_of(rows, objectives=BOTH):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = Console(file=io.StringIO(), width=500)
        output = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        train(replace(config, data=[str(path)], objectives=objectives, output=output), said)
        return said.file.getvalue()

    scored = [{"prompt": c, "completion": c, "score": i} for i, c in enumerate("abcd")]
    match = "none of the 4 rows has a reward; the columns are completion, prompt, score, rewards"
    with pytest.raises(QvgptError, match=match):
        said_of(scored)
    assert "reward" not in said_of(scored, ["LM"])
    rewarded = [{"prompt": c, "completion": c, "reward": 1.0} for c in "ef"]
    assert "4 of 6 rows have no reward: it is read as 0" in said_of([*scored, *rewarded])
    assert "every text has the same return, 1: there is nothing in it" in said_of(rewarded)
    unknown = [{"prompt": "e", "completion": "中", "reward": 0.5}]
    path = tmp_path / "zh.jsonl"
    path.write_text(json.dumps(unknown[0]) + "\n")
    said = Console(file=io.StringIO(), width=500)
    train(replace(config, eval_data=[str(path)], output=str(tmp_path / "zh")), said)
    assert "1 texts have characters that the tokenizer does not know" in said.file.getvalue()


def test_another_shape_than_that_of_the_model_is_refused(config, tmp_path):
    train(config, QUIET)
    more = replace(config, model=config.output, output=str(tmp_path / "more"))
    other = replace(more, gpt=replace(TINY, embed_dim=32))
    with pytest.raises(QvgptError, match=r"gpt.embed_dim: .* has 16, not 32; leave it out"):
        train(other, QUIET)
    assert not Path(more.output).exists()
    train(more, QUIET)


def test_train_resumes_as_if_nothing_had_happened(config, tmp_path):
    train(config, QUIET)
    other = replace(config, output=str(tmp_path / "other"))
    with stopped_at(3), pytest.raises(Killed):
        train(other, QUIET)
    with pytest.raises(QvgptError, match="continue it with --resume true"):
        train(other, QUIET)
    with pytest.raises(QvgptError, match=r"other settings \(fit.lr 0.01 → 0.5\)"):
        train(replace(other, resume=True, fit=replace(other.fit, lr=0.5)), QUIET)
    summary = train(replace(other, resume=True), QUIET)
    assert summary["steps"] == 4
    for name in ("model.safetensors", "value_heads.safetensors", "tokenizer.json"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert train(replace(other, resume=True), QUIET) == summary  # finished: nothing to do


@pytest.fixture
def left_open(config):
    """Nothing is said of sizes, epochs and rates."""
    fit = replace(FitOptions(), batch_size=20, max_steps=4, save_every=2)
    return replace(config, gpt=GPTShape(dropout=0.0), fit=fit, eval_data=config.data)


FITTED = {
    "gpt": {"embed_dim": 64, "num_heads": 2, "num_layers": 2, "seq_len": 192},
    "tokenizer": {"vocab_size": 8000},
    "fit": {"epochs": 20.0, "lr": 4e-3, "value_lr": 4e-3},
}


def settings(output):
    return json.loads((Path(output) / "run.json").read_text())["config"]


def told(config, wanted):
    """What `run.json` says of the keys of `wanted`."""
    found = settings(config.output)
    return {section: {k: found[section][k] for k in keys} for section, keys in wanted.items()}


def test_what_is_left_open_is_fitted_to_the_data_said_and_kept(left_open):
    _, said = said_by(left_open)
    assert said.startswith("fitted to the data (what you say stays): gpt.embed_dim 64, ")
    assert "gpt.seq_len 192, tokenizer.vocab_size 8000, fit.epochs 20, fit.lr 0.004" in said
    assert told(left_open, FITTED) == FITTED
    made = ValueModel.from_pretrained(left_open.output)
    assert (made.trunk.embed_dim, made.trunk.seq_len, made.trunk.num_heads) == (64, 192, 2)
    assert "20, 0.004, 0" in (Path(left_open.output) / "README.md").read_text()
    assert "fitted" not in said_by(replace(left_open, resume=True))[1]


def test_a_longer_text_needs_a_longer_context_up_to_a_limit(left_open, tmp_path):
    def row(letters):
        path = tmp_path / f"{letters}.jsonl"
        path.write_text(json.dumps({"text": "ab" * (letters // 2)}) + "\n")
        return [str(path)]

    config = replace(left_open, objectives=["LM"], eval_data=row(300), dry_run=True)
    assert "gpt.seq_len 448, " in said_by(config)[1]
    with pytest.raises(QvgptError, match=r"max_length 2048 \(the longest has 3002 .* up to 2048\)"):
        train(replace(config, data=row(3000)), QUIET)
    assert "gpt.seq_len 2048" in said_by(replace(config, data=row(3000), on_too_long="cut"))[1]
    short = replace(config, on_too_long="cut", max_length=20, eval_data=left_open.data)
    assert "gpt.seq_len 192" in said_by(short)[1]
    long = row(400_000)  # of which a model of three layers would be made
    for way in ("drop", "cut"):
        data = [*left_open.data, *long]
        _, said = said_by(replace(short, data=data, on_too_long=way, output=f"{tmp_path}/{way}"))
        assert "gpt.embed_dim 64, gpt.num_heads 2, gpt.num_layers 2, gpt.seq_len 192" in said
    assert "gpt.seq_len 3008" in said_by(replace(config, data=row(3000), max_length=3003))[1]
    with pytest.raises(QvgptError, match="max_length: must be at least 2, not -300"):
        train(replace(config, max_length=-300), QUIET)


@pytest.mark.parametrize("broken", [None, [1], {"gpt": None}, {"fit": {"lr": "x"}}])
def test_a_broken_record_is_no_traceback(left_open, broken):
    train(left_open, QUIET)
    (Path(left_open.output) / "run.json").write_text(
        json.dumps({"command": "train", "config": broken})
    )
    with pytest.raises(QvgptError, match="holds a run with other settings"):
        train(replace(left_open, resume=True), QUIET)


def test_a_run_goes_on_with_what_it_was_fitted_to(left_open, tmp_path):
    train(left_open, QUIET)
    other = replace(left_open, output=str(tmp_path / "other"))
    with stopped_at(3), pytest.raises(Killed):
        train(other, QUIET)
    _, said = said_by(replace(other, resume=True))
    assert "fitted" not in said
    for name in ("model.safetensors", "value_heads.safetensors", "README.md"):
        there = [Path(c.output, name).read_bytes() for c in (left_open, other)]
        assert there[0] == there[1], name
    shape = replace(left_open.gpt, embed_dim=32)
    with pytest.raises(QvgptError, match=r"gpt.embed_dim 64 → 32: a run cannot go on"):
        train(replace(other, resume=True, accept_changes=True, gpt=shape), QUIET)


@pytest.mark.parametrize("from_model", [False, True])
def test_a_run_of_before_goes_on_with_the_constants_that_were_usual_then(
    left_open, tmp_path, from_model
):
    """Their run.json has figures where nothing was said, also of a given model."""
    usual = {
        "gpt": {"embed_dim": 32, "num_heads": 4, "num_layers": 1, "seq_len": 64},
        "tokenizer": {"vocab_size": 60},
        "fit": {"epochs": 1.0, "lr": 1e-3, "value_lr": None},
    }
    said = left_open
    if from_model:
        train(replace(left_open, output=str(tmp_path / "lm"), objectives=["LM"]), QUIET)
        said = replace(left_open, model=str(tmp_path / "lm"), tokenizer=TokenizerConfig())
    sections = {s: replace(getattr(said, s), **keys) for s, keys in usual.items()}
    before = replace(said, **sections)
    if from_model:  # these were recorded and had no meaning
        before = replace(before, gpt=said.gpt)
    with stopped_at(2), pytest.raises(Killed):
        train(before, QUIET)
    file = Path(before.output) / "run.json"
    record = json.loads(file.read_text())
    for section, keys in usual.items():
        record["config"][section] |= keys
    file.write_text(json.dumps(record))
    assert train(replace(said, resume=True), QUIET)["steps"] == 3
    assert told(said, usual) == usual


def test_labels_are_returns_of_0_and_1(config, tmp_path):
    rows = [{k: row[k] for k in ("prompt", "completion")} for row in ROWS]
    labelled = [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]
    Path(config.data[0]).write_text("".join(json.dumps(row) + "\n" for row in labelled))
    plain = replace(config, objectives=["LM"], output=str(tmp_path / "lm"))
    train(plain, QUIET)
    two = HeadsConfig("categorical", rank=3, bins=2)
    for objective in ("FUDGE", "ReturnDistribution", "QSFT"):
        said = {"model": plain.output} if objective == "QSFT" else {"heads": two}
        given = {"objectives": [objective], "output": str(tmp_path / objective), **said}
        assert train(replace(config, **given), QUIET)["steps"] == 4


@pytest.fixture
def half_done(config, tmp_path):
    """The files of a run that was stopped at step 2 of 4, training on a model with heads."""
    begun = replace(config, output=str(tmp_path / "start"))
    train(begun, QUIET)
    shutil.copytree(begun.output, tmp_path / "start_copy")
    half = replace(config, model=begun.output, tokenizer=TokenizerConfig(), eval_data=config.data)
    with stopped_at(3), pytest.raises(Killed):
        train(half, QUIET)
    return replace(half, resume=True)


def said_by(config):
    said = io.StringIO()
    summary = train(config, Console(file=said, width=1000))
    return summary, said.getvalue()


def rewards_changed(config, tmp_path):
    path = tmp_path / "changed.jsonl"
    rows = [{**row, "reward": row["reward"] + 1} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_dry_run_leaves_a_run_alone(half_done):
    def content():
        files = [p for p in sorted(Path(half_done.output).rglob("*")) if p.is_file()]
        return {path: path.read_bytes() for path in files}

    before = content()
    with alone_in(Path(half_done.output)):  # nor does it need to be alone
        before[Path(half_done.output) / ".lock"] = (Path(half_done.output) / ".lock").read_bytes()
        found = train(replace(half_done, dry_run=True), QUIET)
        assert content() == before
    assert found["steps"] == 4
    assert train(half_done, QUIET)["steps"] == 4  # and the record does not count it as a change


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_changed_data_are_refused_unless_accepted(half_done, tmp_path, which):
    path = Path(half_done.data[0])
    other = rewards_changed(half_done, tmp_path)
    if which == "data":  # the path stays, what it holds does not
        copy = tmp_path / "copy.jsonl"
        copy.write_text(path.read_text())
        path.write_text(Path(other).read_text())
        half_done = replace(half_done, eval_data=[str(copy)])
    else:
        half_done = replace(half_done, eval_data=[other])
    with pytest.raises(QvgptError, match=r"eval_data .*; choose another output, or accept them"):
        train(half_done, QUIET)
    summary, said = said_by(replace(half_done, accept_changes=True))
    assert summary["steps"] == 4
    assert "goes on with other settings: eval_data [" in said
    assert "goes on with other data than the run began with" in said


def test_changed_contents_of_the_data_are_refused(half_done, tmp_path):
    Path(half_done.data[0]).write_text(Path(rewards_changed(half_done, tmp_path)).read_text())
    with pytest.raises(QvgptError, match=r"other data than there are now; .* --accept_changes"):
        train(half_done, QUIET)
    assert "goes on with other data" in said_by(replace(half_done, accept_changes=True))[1]


def test_changed_settings_are_taken_and_recorded_only_when_accepted(half_done):
    other = replace(half_done, fit=replace(half_done.fit, value_lr=0.5, max_steps=5))
    with pytest.raises(QvgptError, match=r"fit.max_steps 4 → 5, fit.value_lr None → 0.5"):
        train(other, QUIET)
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda o, *_: rates.append([g["peak_lr"] for g in o.param_groups])
    )
    summary, said = said_by(replace(other, accept_changes=True))
    hook.remove()
    assert summary["steps"] == 5
    assert rates == [[0.01, 0.01, 0.5]] * 3
    assert "goes on with other settings: fit.max_steps 4 → 5, fit.value_lr None → 0.5\n" in said
    record = json.loads((Path(other.output) / "run.json").read_text())
    assert record["config"]["fit"]["value_lr"] == 0.5
    assert train(other, QUIET) == summary
    with pytest.raises(QvgptError, match="is finished and takes no other settings"):
        train(replace(half_done, accept_changes=True), QUIET)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gpt": replace(TINY, embed_dim=8)}, "gpt.embed_dim 16 → 8"),
        ({"heads": HeadsConfig(kind="mlp")}, "heads.kind None → 'mlp'"),
        ({"freeze_trunk": True}, "freeze_trunk False → True"),
        ({"model": None}, "model '.*' → None"),
        ({"fit": replace(FIT, save_every=2, keep_best="total")}, "fit.keep_best None → 'total'"),
    ],
)
def test_what_makes_the_model_cannot_change(half_done, change, named):
    before = (Path(half_done.output) / "run.json").read_bytes()
    with pytest.raises(QvgptError, match=f"{named}.*a run cannot go on with that"):
        train(replace(half_done, accept_changes=True, **change), QUIET)
    assert (Path(half_done.output) / "run.json").read_bytes() == before


def test_a_run_gains_no_heads(config, tmp_path):
    plain = replace(config, objectives=["LM"])
    with stopped_at(3), pytest.raises(Killed):
        train(plain, QUIET)
    more = replace(plain, objectives=BOTH, resume=True, accept_changes=True)
    with pytest.raises(QvgptError, match="has no value heads and a run cannot gain them"):
        train(more, QUIET)


def test_a_changed_tokenizer_is_refused_unless_accepted(half_done, tmp_path):
    file = tmp_path / "start" / "tokenizer.json"
    file.write_text(file.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    changed = Tokenizer.load(tmp_path / "start").sha256
    with pytest.raises(QvgptError, match="start: is not the tokenizer the run began with"):
        train(half_done, QUIET)
    _, said = said_by(replace(half_done, accept_changes=True))
    assert f"goes on with another tokenizer, that of {tmp_path}/start" in said
    assert ValueModel.from_pretrained(half_done.output).tokenizer.sha256 == changed


def test_a_run_goes_on_without_the_model_it_began_with(half_done, tmp_path):
    shutil.rmtree(tmp_path / "start")
    assert train(half_done, QUIET)["steps"] == 4


def test_a_directory_claimed_meanwhile_is_left_alone(config, monkeypatch):
    def also_begun(*_):
        open_run(config.output, "train", asdict(config))

    monkeypatch.setattr("qvgpt.trainer.refuse", also_begun)
    with pytest.raises(QvgptError, match="holds another run already"):
        train(replace(config, resume=True), QUIET)


def test_random_numbers_are_those_of_seed_and_step(config, tmp_path):
    """Whatever was drawn before; other seeds, steps and processes draw others."""
    torch.rand(3)
    train(config, QUIET)
    torch.rand(5)
    train(replace(config, output=str(tmp_path / "b")), QUIET)
    one, two = (ValueModel.from_pretrained(x) for x in (config.output, tmp_path / "b"))
    assert same(one.state_dict(), two.state_dict())
    seeds = {step_seed(s, k, p) for s in range(4) for k in range(50) for p in range(4)}
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_initial_weights_follow_from_the_seed_alone(config, tmp_path):
    found = []
    still = replace(FIT, lr=0.0, weight_decay=0.0, max_steps=1)
    for i, (seed, size) in enumerate([(0, 8), (0, 3), (1, 8)]):
        fit = replace(still, seed=seed, batch_size=size)
        train(replace(config, fit=fit, output=str(tmp_path / f"{i}")), QUIET)
        found.append(ValueModel.from_pretrained(tmp_path / f"{i}").trunk.state_dict())
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_train_refuses_before_it_writes(config, tmp_path, monkeypatch):
    cases = [
        ({"max_length": 8}, "texts are longer than max_length 8"),
        ({"max_length": 25}, "max_length: 25 is not between 2 and the context of 24"),
        ({"freeze_trunk": True}, "freeze_trunk: a GPT from scratch"),
        ({"objectives": ["ILQ"]}, "did you mean 'ILQL'"),
        ({"model": str(tmp_path)}, r"config.json: no such file"),
        ({"max_length": 3, "on_too_long": "drop"}, "none of 60 texts fits 3 tokens"),
        ({"fit": replace(FIT, keep_best="total")}, "needs evaluation data"),
        (
            {"fit": replace(FIT, keep_best="LM/nl"), "eval_data": config.data},
            r"no loss part 'LM/nl' \(did you mean 'LM/nll'\?\); there are total, LM/nll, ILQL/q",
        ),
        ({"fit": replace(FIT, tensorboard=True)}, "tensorboard is not installed"),
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for change, message in cases:
        with pytest.raises(QvgptError, match=message):
            train(replace(config, **change), QUIET)
        assert not Path(config.output).exists()


def test_p25_long_texts_are_cut_only_when_told_to(config):
    console = Console(record=True, quiet=True)
    summary = train(replace(config, max_length=8, on_too_long="cut"), console)
    assert summary["data"]["cut"] > 0
    assert summary["data"]["cut"] + summary["data"]["dropped"] == summary["data"]["too_long"]


def test_any_seed_has_an_order():
    for seed in (0, 2**45, -(2**45), 10**30):
        assert sorted(i for b in batches([1, 2, 3], 2, seed, 0) for i in b) == [0, 1, 2]
