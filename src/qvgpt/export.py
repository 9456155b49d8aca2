"""A guided model as an ordinary checkpoint, for everything that knows nothing of values.

Where Q is linear in the hidden state and β is fixed, LM head and guidance are one matrix,
W′ = W + β·F with F the centred slow Q heads. What is written is a GPT-2 directory with that
(untied) head, and `export.json`, which says how far it is from the guidance it stands for.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from qvgpt.checkpoint import replace_directory
from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance, fold, next_token, recommended, refuse_v_alone
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.value_model import ValueModel
from qvgpt.run import write_json
from qvgpt.trajectory import Trajectory

_OWN_TEXTS, _OWN_TOKENS = 16, 48  # written by the guided model itself where no texts are given


@dataclass(frozen=True)
class Fidelity:
    """How far an exported model is from exact guidance, over `states` states of some texts."""

    states: int
    max_abs_logit_difference: float
    """Largest difference of two logits, a constant per state taken off."""
    greedy_agreement: float
    """Share of the states where both would pick the same token."""
    mean_kl: float
    """KL(exact guided ‖ exported) per token, in nats."""


def export_hf(
    model_dir: str | Path,
    out_dir: str | Path,
    beta: float | None = None,
    twins: Literal["mean", "min"] | None = None,
    texts: Sequence[Trajectory | Sequence[int]] = (),
    max_texts: int = 64,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> dict[str, Any]:
    """Write `model_dir`, guided with `beta`, to `out_dir` as an ordinary checkpoint.

    `beta` (1 / units of reward) and `twins` default to the recommended guidance. Twins are folded
    as their mean; with `min`, `mean_kl` is what that costs. Fidelity is measured by
    `transformers` on the written files: on the decisions of the first `max_texts` trajectories,
    on all tokens of lists of tokens, and on texts of the guided model's own where none are given.
    Returns what `export.json` holds. Raises `QvgptError`, and writes nothing, where `out_dir` is
    not empty, no beta is known, or the heads do not fold.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QvgptError(f"{out}: is not an empty directory; choose another output")
    model = ValueModel.from_pretrained(model_dir).eval()
    guidance, left_out = _guidance(model, model_dir, beta, twins)
    exported = _folded(model, guidance.beta).to(getattr(torch, dtype))
    sequences = list(texts[:max_texts]) or _own_texts(model, guidance)
    staged = out.with_name(f".staged-{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        exported.save(staged)
        manifest = {
            "format": "hf",
            "source": str(model_dir),
            "beta": guidance.beta,
            "twins": guidance.twins,
            "dtype": dtype,
            "not_in_the_weights": left_out,
            "fidelity": asdict(fidelity(model, guidance, staged, sequences)),
        }
        write_json(staged / "export.json", manifest)
        replace_directory(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return manifest


def _guidance(
    model: ValueModel,
    model_dir: str | Path,
    beta: float | None,
    twins: Literal["mean", "min"] | None,
) -> tuple[Guidance, dict[str, Any]]:
    """The guidance to fold, and the options of the recommended one that weights cannot hold."""
    if model.heads is None:
        raise QvgptError(f"{model_dir}: has no value heads, so there is nothing to fold")
    if model.info.level == "turn":
        raise QvgptError(f"{model_dir}: its values are of whole turns: no token's Q can be folded")
    if model.trunk.softcap is not None:
        raise QvgptError(f"{model_dir}: its logits are capped: no LM head can hold guidance")
    refuse_v_alone(model.heads)
    said = recommended(model.info, model_dir)
    if beta is None and said is not None and not said.fixed:
        raise QvgptError(
            f"{model_dir}: recommends a beta of each token (kl_budget or beta_end), which weights "
            "cannot hold; say which beta to export"
        )
    if beta is None and (said is None or "beta" not in (model.info.recommended_guidance or {})):
        raise QvgptError(f"{model_dir}: recommends no beta; say which one to export")
    said = said or Guidance()
    chosen = Guidance(
        beta=said.beta if beta is None else beta, twins=said.twins if twins is None else twins
    )
    folded, standard = ("beta", "twins"), vars(Guidance())
    left_out = {k: v for k, v in vars(said).items() if k not in folded and v != standard[k]}
    return chosen, left_out


@torch.no_grad()
def _folded(model: ValueModel, beta: float) -> ValueModel:
    """The model without heads, its LM head untied and guided."""
    assert model.heads is not None
    weight = fold(model.trunk.output_weight, model.heads, beta)
    return ValueModel(model.trunk.with_head(weight), None, model.tokenizer)


def _own_texts(model: ValueModel, guidance: Guidance) -> list[list[int]]:
    assert model.tokenizer is not None
    prompt = [model.tokenizer.template.bos]
    room = min(_OWN_TOKENS, model.trunk.seq_len - 1)
    written = generate(model, [prompt] * _OWN_TEXTS, guidance, max_tokens=room)
    return [prompt + completion.tokens for completion in written]


@torch.no_grad()
def fidelity(
    model: ValueModel,
    guidance: Guidance,
    exported_dir: str | Path,
    texts: Sequence[Trajectory | Sequence[int]],
) -> Fidelity:
    """Compare exact guidance (temperature 1) with what `transformers` makes of `exported_dir`.

    States are those before the actions of trajectories, and all of bare lists of tokens.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(exported_dir).eval()
    theirs = loaded.to(model.device)
    worst, agreed, kl, count = 0.0, 0, 0.0, 0
    for tokens, at in _states(texts, model.trunk.seq_len):
        tokens, at = tokens.to(model.device), at.to(model.device)
        ours = model.trunk.hidden(tokens[None])[0, at]
        folded = theirs.base_model(tokens[None]).last_hidden_state[0, at]
        size = vocab.chunk_rows(model.trunk.vocab_size, tensors=4)
        for h, g in zip(ours.split(size), folded.split(size), strict=True):
            exact = next_token(model, h, guidance).logprob
            found = theirs.get_output_embeddings()(g).float().log_softmax(-1)
            difference = found - exact
            difference = difference - difference.mean(-1, keepdim=True)
            worst = max(worst, float(difference.abs().max()))
            agreed += int((exact.argmax(-1) == found.argmax(-1)).sum())
            kl += float((exact.double().exp() * (exact.double() - found.double())).sum())
            count += len(h)
    return Fidelity(count, worst, agreed / max(count, 1), max(0.0, kl / max(count, 1)))


def _states(
    texts: Sequence[Trajectory | Sequence[int]], limit: int
) -> Iterator[tuple[Int[Tensor, "time"], Int[Tensor, "states"]]]:
    """The tokens of each text, cut to the context, and the states in it to compare."""
    for text in texts:
        if isinstance(text, Trajectory):
            tokens = torch.tensor(text.tokens)[:limit]
            at = torch.tensor(text.is_action)[1:limit].nonzero()[:, 0]
        else:
            tokens = torch.tensor(text, dtype=torch.long)[:limit]
            at = torch.arange(len(tokens))
        if len(at):
            yield tokens, at
