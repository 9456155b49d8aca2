import math
from dataclasses import replace

import pytest

from qvgpt.compare import CompareOptions, Method, compare
from qvgpt.decode.engine import Request, row_seed, write
from qvgpt.decode.policy import Guidance
from qvgpt.decode.rerank import candidate_seed, choice_kl, last_q, write_best
from qvgpt.decode.score import score
from qvgpt.errors import QvgptError
from qvgpt.export import export_hf
from qvgpt.sampling import check_values, engine_policy
from qvgpt.trajectory import Trajectory


def requests(model, count=3, **more):
    prompt = model.tokenizer.encode_prompt
    return [Request(prompt(w), 8, seed=row_seed(0, i), **more) for i, w in enumerate("abc"[:count])]


def test_of_several_candidates_the_one_of_the_highest_q_is_kept(model):
    asked, n = requests(model), 5
    best = write_best(model, asked, n, report=True)
    single = write(model, asked, report=True)
    changed = 0
    for request, kept, first in zip(asked, best, single, strict=True):
        seeds = [candidate_seed(request.seed, k) for k in range(n)]
        assert seeds[0] == request.seed
        assert len(set(seeds)) == n
        each = [write(model, [replace(request, seed=s)], report=True)[0] for s in seeds]
        assert each[0].tokens == first.tokens
        q = [last_q(text) for text in each]
        assert kept.tokens == each[q.index(max(q))].tokens
        text = Trajectory(
            [*request.tokens, *kept.tokens],
            [False] * len(request.tokens) + [True] * len(kept.tokens),
            [0.0] * (len(request.tokens) + len(kept.tokens)),
            kept.terminated,
        )
        [found] = score(model, [text])  # Q of the last token, read anew
        assert found.reports[-1].q == pytest.approx(max(q), abs=1e-4)
        changed += kept.tokens != first.tokens
    assert changed
    seeds = [candidate_seed(r.seed, k) for r in asked for k in range(n)]
    assert len(set(seeds)) == len(seeds)


def test_reports_are_kept_where_they_are_asked_for(model):
    asked = requests(model)
    assert not any(text.reports for text in write_best(model, asked, 3))
    kept = write_best(model, asked, 3, report=True, keep_reports=[1])
    assert [bool(text.reports) for text in kept] == [False, True, False]
    one = write_best(model, asked, 1)
    assert [text.tokens for text in one] == [text.tokens for text in write(model, asked)]


def test_a_policy_for_games_may_choose_its_turns(model):
    prompts = [list(request.tokens) for request in requests(model)]
    free, chosen = (
        [c.tokens for c in engine_policy(model, max_tokens=8, best_of=n)(prompts)] for n in (1, 4)
    )
    assert free != chosen
    assert chosen == [text.tokens for text in write_best(model, requests(model), 4)]


def test_the_best_of_n_is_compared_with_one(model, plain):
    prompts = [list(request.tokens) for request in requests(model)]
    methods = {"base": Guidance(), "chosen": Method(Guidance(), best_of=4)}

    def length(texts, _):
        return [float(len(text)) for text in texts]

    options = CompareOptions(samples=2, max_tokens=8, timing=2)
    base, chosen = compare(model, prompts, length, methods, options)
    assert (base.how.best_of, chosen.how.best_of) == (1, 4)
    found = [row.kl_per_sequence for row in (base, chosen)]
    assert found == pytest.approx([0, choice_kl(4)], abs=1e-6)
    assert choice_kl(4) == pytest.approx(math.log(4) - 0.75)
    assert choice_kl(1) == 0
    assert [s.written.tokens for s in chosen.samples] != [s.written.tokens for s in base.samples]
    assert chosen.as_dict()["best_of"] == 4
    # the base writes its own texts, and the model those that its values choose among
    _, apart = compare(model, prompts, length, methods, options, base=plain)
    assert [s.written.tokens for s in apart.samples] == [s.written.tokens for s in chosen.samples]
    with pytest.raises(QvgptError, match="no value heads to rank texts by"):
        compare(plain, prompts, length, methods, options)


def test_values_of_whole_turns_guide_no_token(make_model, tmp_path):
    model = make_model()
    model.info.level = "turn"
    guided = requests(model, guidance=Guidance(beta=1.0))
    with pytest.raises(QvgptError, match=r"of whole turns and guide no token: .* best_of"):
        write(model, guided)
    assert write_best(model, requests(model), 2)
    with pytest.raises(QvgptError, match=r"there: its values .* guide no token: beta must be 0"):
        check_values(model, "there", [0.0, 2.0])
    check_values(model, "there", [0.0], 4)
    model.save(tmp_path / "turns")
    with pytest.raises(QvgptError, match="no token's Q can be folded"):
        export_hf(tmp_path / "turns", tmp_path / "out", 1.0)


def test_what_cannot_choose_is_refused(plain, model):
    with pytest.raises(QvgptError, match="no value heads to rank texts by"):
        write_best(plain, requests(plain), 2)
    with pytest.raises(QvgptError, match="at least 1"):
        write_best(model, requests(model), 0)
    for more, message in ((([2.0],), "to guide with"), (([0.0], 3), "to rank by")):
        with pytest.raises(QvgptError, match=f"there: has no value heads {message}"):
            check_values(plain, "there", *more)
    with pytest.raises(QvgptError, match="best_of must be at least 1"):
        check_values(model, "there", [], 0)
