"""One model in, one export out: files, and `export.json` and a README on how faithful they are."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.checkpoint import replace_directory
from qvgpt.decode.policy import next_token
from qvgpt.errors import QvgptError
from qvgpt.export.card import card
from qvgpt.export.critic import load_critic, save_critic
from qvgpt.export.fidelity import Rows, divergence, fidelity, value_fidelity
from qvgpt.export.hf import (
    VALUE_TOKENS,
    language_model,
    load_language_model,
    save_language_model,
    with_value_rows,
)
from qvgpt.export.linear import LinearV, factors, fitted_q, is_linear, linear_v
from qvgpt.export.lora import BASE, import_peft, load_adapted, save_adapter
from qvgpt.export.options import ExportOptions
from qvgpt.export.source import Source, read_source
from qvgpt.models import vocab
from qvgpt.models.value_model import ValueModel
from qvgpt.run import write_json
from qvgpt.trajectory import Trajectory

MODEL_GGUF, ADAPTER_GGUF = "model.gguf", "adapter.gguf"


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

    `export_model` with `to="hf"`, judged by the first `max_texts` of the texts.
    """
    options = ExportOptions("hf", beta, twins, dtype)
    return export_model(model_dir, out_dir, options, texts[:max_texts])


def export_model(
    model_dir: str | Path,
    out_dir: str | Path,
    options: ExportOptions | None = None,
    texts: Sequence[Trajectory | Sequence[int]] = (),
    prompts: Sequence[list[int]] = (),
) -> dict[str, Any]:
    """Write the export that `options` ask for; returns what `export.json` holds.

    `beta` (1 / units of reward) and `twins` default to the recommended guidance. Fidelity is
    measured on the written files: at the decisions of trajectories and all tokens of lists of
    tokens; where no texts are given, at what the guided model writes after the `prompts` (none:
    after its first token). Raises `QvgptError`, and writes nothing, where `out_dir` is not empty,
    no beta is known, or no weights can stand for the guidance.
    """
    out, options = Path(out_dir), options or ExportOptions()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QvgptError(f"{out}: is not an empty directory; choose another output")
    if options.to == "lora":
        import_peft()
    of_v = options.to == "critic"
    source = read_source(
        model_dir, options.beta, options.twins, options.value_rows, of_v, texts, prompts
    )
    staged = out.with_name(f".staged-{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        said = {"format": options.to, "source": str(model_dir), "dtype": options.dtype}
        found = _critic(source, staged, options) if of_v else _guided(source, staged, options)
        manifest = said | found
        write_json(staged / "export.json", manifest)
        (staged / "README.md").write_text(card(manifest), "utf-8")
        replace_directory(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return manifest


def _critic(source: Source, staged: Path, options: ExportOptions) -> dict[str, Any]:
    v = save_critic(source, staged, getattr(torch, options.dtype))
    states = sum(len(at) for _, at in source.held_out)
    errors = value_fidelity(source, load_critic(staged), v["offset"])
    level = source.model.info.level
    return {"values_of": level, "v": v, "fidelity": {"states": states, **errors}}


def _guided(source: Source, staged: Path, options: ExportOptions) -> dict[str, Any]:
    model, guidance, found = source.model, source.guidance, dict[str, Any]()
    assert model.heads is not None
    advantage, distilled = _advantage(source)
    lm: Float[Tensor, "vocab embed"] = model.trunk.output_weight.detach()
    adapter = None
    if options.to in ("lora", "gguf_lora"):
        if not guidance.guides:
            raise QvgptError("export: an adapter needs a beta other than 0")
        up, down, kind = factors(model.heads, advantage, source.hidden(source.fit), options.rank)
        adapter, found["adapter"] = (up, down), {"rank": len(down), "kind": kind}
        plain = language_model(model, lm)
    else:
        plain = language_model(model, (lm + guidance.beta * advantage).to(lm.dtype))
    rows: Rows | None = None
    if options.value_rows:
        hidden = source.hidden(source.fit)
        v = linear_v(model.heads, hidden, source.hidden(source.held_out))
        plain, rows = with_value_rows(plain, v, hidden)
        found["value_rows"] = _rows_said(rows, v)
        if adapter is not None:  # the adapter leaves these rows alone, new or padding before
            more = plain.trunk.vocab_size - len(adapter[0])
            up = torch.nn.functional.pad(adapter[0], (0, 0, 0, more))
            up[[rows.zero, rows.value]] = 0
            adapter = (up, adapter[1])
    judged = _write(plain, adapter, rows, guidance.beta, staged, options)
    return {
        "beta": guidance.beta,
        "twins": guidance.twins,
        "functional": guidance.functional,
        "distilled": distilled,
        "not_in_the_weights": source.left_out,
        **found,
        "fidelity": asdict(fidelity(source, judged, rows)),
    }


def _write(
    plain: ValueModel,
    adapter: tuple[Tensor, Tensor] | None,
    rows: Rows | None,
    beta: float,
    staged: Path,
    options: ExportOptions,
) -> Any:
    """Write the files; returns what `transformers` makes of them."""
    if not options.to.startswith("gguf"):
        plain = plain.to(getattr(torch, options.dtype))
        place = staged if adapter is None else staged / BASE
        save_language_model(plain, place, rows)
        if adapter is None:
            return load_language_model(staged)
        save_adapter(adapter, beta, staged)
        return load_adapted(staged)
    from qvgpt.export import llama_cpp

    directory = staged / "hf"
    save_language_model(plain, directory, rows)
    llama_cpp.write_model(directory, staged / MODEL_GGUF, options.dtype)
    if adapter is not None:
        llama_cpp.write_adapter(directory, adapter, beta, staged / ADAPTER_GGUF)
    judged = llama_cpp.read_model(directory, staged / MODEL_GGUF)
    if adapter is not None:
        llama_cpp.adapt(judged, staged / ADAPTER_GGUF)
    shutil.rmtree(directory)
    return judged


def _advantage(source: Source) -> tuple[Float[Tensor, "vocab embed"], dict[str, Any] | None]:
    """F, and how it was distilled where Q is not linear."""
    model, guidance = source.model, source.guidance
    assert model.heads is not None
    if not guidance.guides:
        return torch.zeros_like(model.trunk.output_weight, dtype=torch.float32), None
    if is_linear(model.heads, guidance):
        return model.heads.folded(), None
    judge = source.hidden(source.fit[::4])
    trained = [text for i, text in enumerate(source.fit) if i % 4] or source.fit

    def loss(weight: Tensor) -> float:
        return _mean_kl(source, judge, weight)

    return fitted_q(model.heads, guidance, source.hidden(trained), loss)


def _rows_said(rows: Rows, v: LinearV) -> dict[str, Any]:
    """What a reader of log-probs needs, and how V became linear."""
    said = {"ids": [rows.zero, rows.value], "tokens": list(VALUE_TOKENS)}
    return said | {"c": rows.c, "bias": rows.bias, "fit": v.fit}


def _mean_kl(source: Source, hidden: Float[Tensor, "states embed"], advantage: Tensor) -> float:
    """KL(exact ‖ with this matrix) per state: what the penalty of a fit is chosen by."""
    total, weight = 0.0, source.model.trunk.output_weight + source.guidance.beta * advantage
    for h in hidden.split(vocab.chunk_rows(len(weight), tensors=6)):
        exact = next_token(source.model, h, source.guidance).logprob
        found = vocab.logits(h, weight).log_softmax(-1)
        total += float(divergence(exact, found).sum())
    return total / len(hidden)
