"""The directory of a value model.

It is the trunk in its own Hugging Face format, so that `AutoModelForCausalLM.from_pretrained(dir)`
gives the plain language model, and beside it `value_config.json` and `value_heads.safetensors`.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.models.backbone import Backbone, Dtype
from qvgpt.models.disk import add_to_json, load_tensors, one_line, read_config, read_json, writing
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import ADAPTER

FORMAT_VERSION = 1
_CONFIG, _HEADS = "value_config.json", "value_heads.safetensors"


@dataclass
class ValueInfo:
    """What an artefact says about its values, beside the heads' shape."""

    objectives: list[dict[str, Any]] = field(default_factory=list)
    """What it was trained with, as `parse_objectives` reads it."""
    gamma: float = 1.0
    """Discount the values were learned with."""
    per_turn_discount: bool = False
    """Whether γ applied at the ends of turns only."""
    level: str = "token"
    """What a decision was: a token, or a whole turn, whose Q guides no token but ranks texts."""
    centred: bool = False
    """Whether returns were counted from the mean of each prompt's texts."""
    dialogues: bool = False
    """Whether it was trained on dialogues, so that it knows what `eot` is for."""
    judged_by: list[str] = field(default_factory=list)
    """SHA-256 of the reward models whose rewards it learned from: no judges of what it gained."""
    recommended_guidance: Any = None
    """Chosen on validation data; what `generate` uses when nothing is said: a dictionary of
    `Guidance`, or None. Checked where it is used, by `decode.policy.recommended`."""


@dataclass(frozen=True)
class Artefact:
    """What a directory holds."""

    trunk: Backbone
    tokenizer: Tokenizer
    info: ValueInfo
    heads: HeadsConfig | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The heads' weights."""
    reward_scale: float = 1.0

    @classmethod
    def read(
        cls, path: Path, as_causal_lm: bool, dtype: Dtype, device_map: str | dict[str, Any] | None
    ) -> "Artefact":
        """Read what `save` wrote, or a plain Hugging Face directory; arguments of `load_trunk`.

        Raises `QvgptError` where the parts do not belong together.
        """
        if not path.is_dir():
            raise QvgptError(f"{path}: no such directory; a model directory was expected")
        trunk = load_trunk(path, as_causal_lm, dtype, device_map)
        tokenizer = Tokenizer.load(path)
        if not (path / _CONFIG).exists():
            ours = read_json(path / "config.json").get("qvgpt") or {}
            if ours.get("tokenizer_sha256") not in (None, tokenizer.sha256):
                raise QvgptError(
                    f"{path}: tokenizer.json is not the one the model was saved with; restore it, "
                    "or delete the key `qvgpt` of config.json if they belong together"
                )
            judges = [str(sha256) for sha256 in ours.get("judged_by") or ()]
            info = ValueInfo(dialogues=ours.get("dialogues") is True, judged_by=judges)
            return cls(trunk, tokenizer, info)
        config = read_json(path / _CONFIG)
        if config.get("format_version") != FORMAT_VERSION:
            found = config.get("format_version")
            raise QvgptError(f"{path}: value format {found!r}; this qvgpt reads {FORMAT_VERSION}")
        if config.get("tokenizer_sha256") not in (None, tokenizer.sha256):
            raise QvgptError(
                f"{path}: tokenizer.json is not the one the values were learned with; "
                "restore it, or train the values again"
            )
        heads = stored_heads(path)
        tensors, known = _head_tensors(path, heads), ValueInfo.__dataclass_fields__
        info = ValueInfo(**{k: v for k, v in config.items() if k in known})
        return cls(trunk, tokenizer, info, heads, tensors, _reward_scale(path, config))


def save(
    path: Path,
    trunk: Any,
    heads: ValueHeads | None,
    tokenizer: Tokenizer | None,
    info: ValueInfo,
    merged: bool,
) -> None:
    """Write the directory; without `merged`, adapters are all that is written of the trunk."""
    path.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {}
    if tokenizer is not None:
        template = tokenizer.template
        extra = {
            "bos_token_id": template.bos,
            "eos_token_id": template.eos,
            "pad_token_id": template.pad,
        }
        tokenizer.save(path)
        said: dict[str, Any] = {
            "tokenizer_sha256": tokenizer.sha256,
            "dialogues": info.dialogues,
        }
        if info.judged_by:
            said["judged_by"] = info.judged_by
        extra["qvgpt"] = said
    if merged or trunk.lora is None:
        trunk.save(path, **extra)
    else:
        trunk.save_adapter(path / ADAPTER)
    if tokenizer is not None:
        # here and not before, for a trunk of transformers writes a file of its own
        ends = {"eos_token_id": sorted(tokenizer.template.end_ids)}
        generation = {k: v for k, v in extra.items() if k != "qvgpt"} | ends
        add_to_json(path / "generation_config.json", generation)
    if heads is None:
        for stale in (_CONFIG, _HEADS):
            (path / stale).unlink(missing_ok=True)
        return
    save_file({k: v.contiguous() for k, v in heads.state_dict().items()}, path / _HEADS)
    save_config(path, heads, tokenizer, info)


def save_config(
    path: Path, heads: ValueHeads, tokenizer: Tokenizer | None, info: ValueInfo
) -> None:
    """Write `value_config.json` alone, in one piece: the tensors stay."""
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "heads": asdict(heads.config),
        "trunk": "shared",
        **asdict(info),
        "reward_scale": heads.reward_scale,
    }
    if tokenizer is not None:
        config["template"] = asdict(tokenizer.template)
        config["end_ids"] = sorted(tokenizer.template.end_ids)
        config["tokenizer_sha256"] = tokenizer.sha256
    file = path / _CONFIG
    staged = file.with_name(f".{file.name}.staged")
    with writing(file):
        staged.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(staged, file)


def stored_heads(path: Path) -> HeadsConfig:
    """What the value heads of an artefact look like."""
    try:
        return HeadsConfig(**read_json(path / _CONFIG)["heads"])
    except (KeyError, TypeError, QvgptError) as error:
        raise QvgptError(f"{path}/{_CONFIG}: bad heads: {one_line(error)}") from None


def load_trunk(
    path: Path,
    as_causal_lm: bool = False,
    dtype: Dtype = "float32",
    device_map: str | dict[str, Any] | None = None,
) -> Backbone:
    """The language model of a directory: our GPT where it is a GPT-2, else transformers' own.

    `as_causal_lm`: transformers' own GPT-2 too, which can be adapted; a `device_map`
    (accelerate's; for reading alone) asks for it as well.
    """
    ours = read_config(path).get("model_type") == "gpt2"
    if ours and not as_causal_lm and device_map is None:
        return GPT.load(path, dtype)
    from qvgpt.models.causal_lm import CausalLM  # transformers takes seconds to import

    return CausalLM.load(path, dtype, device_map)


def _reward_scale(path: Path, config: dict[str, Any]) -> float:
    found = config.get("reward_scale", 1.0)
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise QvgptError(
            f"{path}/{_CONFIG}: reward_scale: a number above 0 was expected, not {found!r}"
        )
    return float(found)


def _head_tensors(path: Path, heads: HeadsConfig) -> dict[str, Tensor]:
    """The heads' weights; refused before any head is made, lest sizes fill the memory."""
    tensors = load_tensors(path / _HEADS)
    own = "project.weight" if heads.kind == "bilinear" else "weight"  # whose rows all heads share
    last = tensors.get(f"q.{heads.num_q - 1}.{own}")
    ranked = heads.kind in ("low_rank", "categorical")
    fits = last is not None and (not ranked or last.shape[-1:] == (heads.rank,))
    if heads.support is not None:
        project = tensors.get(f"q.{heads.num_q - 1}.project.weight")
        fits = fits and project is not None and len(project) == heads.rank * heads.bins
    if not fits:
        raise QvgptError(f"{path}/{_HEADS}: does not fit {_CONFIG}, which says {heads}")
    return tensors
