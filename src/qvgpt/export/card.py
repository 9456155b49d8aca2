"""The README of an export: what it is, how it is used, how faithful it is."""

from typing import Any

from qvgpt.model_card import front_matter, table

_TITLES = {
    "hf": "A guided language model",
    "lora": "A language model and its guidance as an adapter",
    "gguf": "A guided language model for llama.cpp",
    "gguf_lora": "A language model and its guidance as an adapter, for llama.cpp",
    "critic": "What text is worth: a value model",
}
_USE = {
    "hf": "model = AutoModelForCausalLM.from_pretrained(directory)",
    "lora": (
        "base = AutoModelForCausalLM.from_pretrained(directory + '/base')\n"
        "model = PeftModel.from_pretrained(base, directory)"
    ),
    "gguf": "llama-server -m model.gguf",
    "gguf_lora": "llama-server -m model.gguf --lora adapter.gguf",
    "critic": "model = AutoModelForSequenceClassification.from_pretrained(directory)",
}
_MEASURES = {
    "states": "states compared",
    "mean_kl": "KL(exact guided ‖ exported) per token, nats",
    "max_kl": "the same at the worst state",
    "greedy_agreement": "share of states with the same greedy token",
    "max_abs_logit_difference": "largest difference of two logits",
    "twins_kl": "KL(twins' minimum ‖ twins' mean) per token",
    "recommended_kl": "KL(guided as recommended, truncation too ‖ exported) per token",
    "value_rows_mass": "probability of the value rows, where nobody bans them",
    "rmse": "V: root of the mean square error",
    "max_error": "V: largest error",
    "r2": "V: share of its variance explained",
}


def card(manifest: dict[str, Any]) -> str:
    """Markdown; all figures are those of `export.json`."""
    kind, gguf = manifest["format"], manifest["format"].startswith("gguf")
    task = "text-classification" if kind == "critic" else "text-generation"
    head = [] if gguf else [front_matter(task)]
    parts = ["\n".join([*head, f"# {_TITLES[kind]}"])]
    parts.append(f"Written by `qvgpt export --to {kind}`; `export.json` holds all figures.")
    parts.append(f"```{'sh' if gguf else 'python'}\n{_USE[kind]}\n```")
    if kind == "critic":
        parts.append(
            "The score of the last token that is no padding is V: the return, in units of reward, "
            "to be expected of the text so far."
            + (f" Add {manifest['v']['offset']:.9g}." if manifest["v"]["offset"] else "")
        )
    else:
        parts += [_strength(manifest), *_limits(manifest), *_value_rows(manifest)]
    rows = manifest["fidelity"] | (manifest["fidelity"].get("v") or {})
    figures = [
        (name, float(rows[key])) for key, name in _MEASURES.items() if rows.get(key) is not None
    ]
    parts.append(f"## Fidelity\n{table(figures)}")
    return "\n\n".join(parts) + "\n"


def _strength(manifest: dict[str, Any]) -> str:
    beta, adapter = manifest["beta"], manifest.get("adapter")
    if adapter is None:
        return (
            f"Guidance of strength β = {beta:g} (1 / units of reward) is in the LM head: "
            "π ∝ π₀·exp(β·A). It costs nothing while writing."
        )
    rank, exact = adapter["rank"], adapter["kind"] == "exact"
    kept = "exactly" if exact else "as nearly as that rank allows"
    how = (
        f"peft: `lora_alpha` = β·{rank} in adapter_config.json, or `set_scale` of the layer"
        if manifest["format"] == "lora"
        else f"llama.cpp: scale = β / {beta:g}, by --lora-scaled or in a request's `lora`"
    )
    return (
        f"The adapter holds Q {kept}, at rank {rank}; as it is, β = {beta:g} (1 / units of "
        f"reward). Another β: {how}."
    )


def _limits(manifest: dict[str, Any]) -> list[str]:
    found = []
    if manifest["twins"] == "min":
        found.append("Of twin Q heads the mean is held, where the guidance takes the minimum.")
    if manifest["distilled"]:
        found.append(
            f"Q is not linear in the hidden state ({manifest['distilled']['kind']} heads): what is "
            f"held was fitted to it on {manifest['distilled']['states']} states (ridge regression)."
        )
    if manifest["not_in_the_weights"]:
        said = ", ".join(f"{k} {v}" for k, v in manifest["not_in_the_weights"].items())
        found.append(
            f"Not in the weights, though recommended: {said}. Engines truncate after guidance, "
            "where the recommendation may mean before."
        )
    return found


def _value_rows(manifest: dict[str, Any]) -> list[str]:
    rows = manifest.get("value_rows")
    if rows is None:
        return []
    return [
        f"V(s) = (log p({rows['ids'][1]}) − log p({rows['ids'][0]})) / {rows['c']:.9g} + "
        f"{rows['bias']:.9g}, with the log-probs of the next token after s. These two ids are not "
        "to be sampled: "
        + (
            "give them a logit bias of −100."
            if manifest["format"].startswith("gguf")
            else "`generation_config.json` suppresses them, other engines need a logit bias."
        )
    ]
