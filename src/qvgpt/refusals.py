"""What a training refuses before it begins: all that could only fail later, or fail silently."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from qvgpt.data.files import read_rows
from qvgpt.errors import QvgptError, nearest
from qvgpt.fit_options import FitOptions
from qvgpt.models.value_model import OF_THE_TRUNK, ValueModel
from qvgpt.objectives import QSFT, Objectives, counted, discount_of
from qvgpt.run import require_tensorboard
from qvgpt.trajectory import Trajectory, by_prompt, collate, returns_to_go


def refuse(
    model: ValueModel,
    data: Sequence[Trajectory],
    objectives: Objectives,
    options: FitOptions,
    eval_data: Sequence[Trajectory],
) -> None:
    """Raise `QvgptError` for what does not go together."""
    if not data:
        raise QvgptError("the data set is empty: there is nothing to train on")
    refuse_options(model, objectives, options, eval_data)
    _refuse_nothing_counted(objectives, data, "texts to train on")
    if options.keep_best:
        which = options.keep_best.split("/")[0]
        both = zip(objectives.names, objectives.terms, strict=True)
        terms = [term for name, term in both if which in ("total", name)]
        _refuse_nothing_counted(Objectives(tuple(terms)), eval_data, "evaluation texts")
    for name, texts in (("text", data), ("evaluation text", eval_data)):
        for i, text in enumerate(texts):
            if not math.isfinite(sum(text.reward)):
                raise QvgptError(f"{name} {i + 1} of {len(texts)}: its reward is NaN or infinite")
            if len(text.tokens) > model.trunk.seq_len:
                raise QvgptError(
                    f"{name} {i + 1} of {len(texts)}: {len(text.tokens)} tokens do not fit the "
                    f"context of {model.trunk.seq_len}"
                )
            _refuse_return(model, objectives, text, f"{name} {i + 1} of {len(texts)}")


def refuse_options(
    model: ValueModel,
    objectives: Objectives,
    options: FitOptions,
    eval_data: Sequence[Trajectory],
) -> None:
    """What `refuse` says whatever the texts to train on are."""
    _refuse_objectives(model, objectives)
    _refuse_heads(model, objectives)
    _refuse_fit(model, objectives, options, eval_data)


def _refuse_objectives(model: ValueModel, objectives: Objectives) -> None:
    """What cannot be learned of a trunk like this."""
    if objectives.needs_reference and model.trunk_is_frozen:
        raise QvgptError("freeze_trunk: the objectives learn in the trunk's own logits")
    if model.trunk_is_frozen and not objectives.teaches_values:
        raise QvgptError("freeze_trunk: nothing is left to train, the objectives learn no values")
    if "expected_q" in objectives.needs and model.judged is None:
        raise QvgptError("FQE judges a policy: use `fqe.evaluate_offline`, which says which one")
    if "dummy_logprob" in objectives.needs:
        _ = model.dummy  # raises where there is none


def _refuse_heads(model: ValueModel, objectives: Objectives) -> None:
    """Heads that are missing, of another kind, or left behind."""
    if not objectives.learns_values:
        return
    _ = objectives.level, objectives.candidates  # raise where objectives do not go together
    if model.heads is None:
        raise QvgptError("the objectives learn values, but the model has no value heads")
    own = model.info.gamma, model.info.per_turn_discount
    objectives.refuse_other_discounts(*(objectives.discount if objectives.teaches_values else own))
    if objectives.weighs_by_values_alone and model.info.level == "turn":
        raise QvgptError("the model's values are of whole turns: AWAC and AWR weigh tokens by none")
    if missing := sorted(objectives.needs - model.offers - OF_THE_TRUNK):
        numbers = "linear, low_rank, bilinear or mlp"
        kind = "categorical" if "v_return_logits" in missing else numbers
        raise QvgptError(
            f"the objectives read {', '.join(missing)}, which these value heads do not have: they "
            f"need heads of kind {kind}"
        )
    if objectives.weighs_by_values_alone and model.heads.are_fresh:
        raise QvgptError(
            "the objectives weigh texts by values that nothing here learns: add ILQL or "
            "MonteCarlo, or start from a model with values"
        )
    if objectives.teaches_v_alone and not model.trunk_is_frozen and model.heads.know_q:
        raise QvgptError(
            "the objectives change the language model and teach it V alone, so that the Q it knows "
            "would no longer fit it: freeze_trunk, or start from a model without values"
        )


def _refuse_nothing_counted(objectives: Objectives, texts: Sequence[Trajectory], name: str) -> None:
    """A loss that is 0 whatever is learned, for nothing counts in its mean."""
    for _, objective in objectives.terms:
        parts = (texts[start : start + 64] for start in range(0, len(texts), 64))
        if not any(counted(objective, collate(part)).any() for part in parts):
            raise QvgptError(
                f"objectives: none of the {len(texts)} {name} counts for "
                f"{type(objective).__name__}: none has a decision to learn from, all were cut, or "
                "none has a return that is asked for"
            )


def _refuse_return(model: ValueModel, objectives: Objectives, text: Trajectory, name: str) -> None:
    """A return that the objectives, or a distribution over returns, do not know."""
    for _, objective in objectives.terms:
        if isinstance(objective, QSFT):
            for value in returns_to_go(text, *discount_of(objective)):
                if not -1e-6 <= value <= 1 + 1e-6:
                    raise QvgptError(
                        f"{name}: its return {value:g} is not in [0, 1], where QSFT's returns lie: "
                        "scale or shift the rewards"
                    )
    support = model.heads.config.support if model.heads is not None else None
    if support is None:
        return
    slack = 1e-6 * (support.high - support.low)
    for value in objectives.returns_of(text):
        if not support.low - slack <= value <= support.high + slack:
            raise QvgptError(
                f"{name}: its return {value:g} is none that the value heads know, {support.low:g} "
                f"to {support.high:g}: give fitting heads.low and heads.high, or scale the rewards "
                "by reward_scale"
            )


def refuse_no_rewards(
    paths: Sequence[str], data: Sequence[Trajectory], rows: int, missing: int, console: Console
) -> None:
    """Raise `QvgptError`, or say so, where values would learn of rewards that nobody gave."""
    if missing and missing == rows:
        columns = {name for path in paths for row in read_rows(path) for name in row.fields}
        raise QvgptError(
            f"objectives: they learn values, and none of the {rows} rows has a reward; the columns "
            f"are {', '.join(sorted(columns))}, rewards stand in reward, rewards or token_rewards"
        )
    if missing:
        console.print(f"{missing} of {rows} rows have no reward: it is read as 0")
    if len(returns := {t.total_reward for t in data}) == 1:
        said = f"every text has the same return, {returns.pop():g}"
        console.print(f"{said}: there is nothing in it to learn")


def refuse_centring(
    centred: bool, model: ValueModel, objectives: Objectives, data: Sequence[Trajectory]
) -> None:
    """Raise `QvgptError` where returns and values would not be counted from the same point.

    Without data only the values to start from are looked at.
    """
    learned = model.heads is not None and not model.heads.are_fresh
    if objectives.learns_values and learned and model.info.centred != centred:
        said = "true" if model.info.centred else "false"
        raise QvgptError(
            f"centred: the values to start from were learned with {said}: say the same"
        )
    if centred and data and all(len(several) == 1 for several in by_prompt(data)):
        raise QvgptError(
            "centred: every prompt has one text, whose return counted from their mean is 0: give "
            "several texts a prompt, or leave it out"
        )


def refuse_shared_prompts(model: ValueModel, objectives: Objectives) -> None:
    """Raise `QvgptError` where a row cannot hold a prompt once for several texts."""
    trunk: Any = model.trunk
    if "token_logprob" in objectives.needs:
        raise QvgptError(
            "fit.share_prompts: LM with `on: all` learns a prompt as often as it has texts: leave "
            "one of them off"
        )
    if not getattr(trunk, "shares_prompts", True):
        raise QvgptError(
            f"fit.share_prompts: {type(trunk.model).__name__} cannot be told which token sees "
            "which, having sliding windows or an attention of its own: leave it off"
        )


def _refuse_fit(
    model: ValueModel,
    objectives: Objectives,
    options: FitOptions,
    eval_data: Sequence[Trajectory],
) -> None:
    """Options that mean nothing here."""
    trunk: Any = model.trunk
    short = {str(p.dtype)[6:] for p in trunk.parameters() if p.requires_grad and p.itemsize < 4}
    if short:
        raise QvgptError(
            f"dtype: weights of {short.pop()} have too few digits to be trained: add lora or "
            "freeze_trunk (fit.bf16 computes in bfloat16 and keeps weights of float32)"
        )
    if model.trunk_is_frozen and options.gradient_checkpointing:
        raise QvgptError("fit.gradient_checkpointing: a frozen trunk keeps no activations anyway")
    if options.slow_trunk and model.trunk_is_frozen:
        raise QvgptError("fit.slow_trunk: a frozen trunk does not move: leave it off")
    if options.slow_trunk and not objectives.needs & {"target_q", "target_q_at_argmax"}:
        raise QvgptError("fit.slow_trunk: the objectives read no slow Q: leave it off")
    if options.share_prompts:
        refuse_shared_prompts(model, objectives)
    if options.keep_best and not eval_data:
        raise QvgptError("fit.keep_best: needs evaluation data")
    if options.keep_best and options.keep_best not in (parts := objectives.parts):
        name, there = options.keep_best, ", ".join(parts)
        raise QvgptError(
            f"fit.keep_best: no loss part {name!r}{nearest(name, parts)}; there are {there}"
        )
    if options.tensorboard:
        require_tensorboard()
