"""Any Hugging Face causal language model as a trunk.

    trunk = CausalLM.load("directory")        config.json, safetensors; nothing is run from there

A model is a trunk if its logits are its output matrix times its base model's last hidden state
(after the last norm), softly capped or not. That is not believed but tried once, on two tokens,
when a model is wrapped.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from qvgpt.errors import QvgptError
from qvgpt.models.attention import (
    Packed,
    attend_once,
    attention,
    by_products,
    packed_attention,
    seen_in_rows,
)
from qvgpt.models.backbone import Dtype
from qvgpt.models.column_cache import ColumnCache
from qvgpt.models.disk import add_to_json, one_line, read_config
from qvgpt.models.lora import (
    ADAPTER,
    LoraConfig,
    add_lora,
    base_alone,
    base_sha256,
    load_adapter,
    merged_state,
    save_adapter,
)

_ATTENTION = "qvgpt_sdpa"
"""The name of `_attention` among transformers' implementations."""
_APART = 128
"""Tokens of packed rows up to which a mask costs less on a CPU than taking texts apart."""
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Keeps transformers from making a mask, which needs none where texts are taken apart."""


class CausalLM(nn.Module):
    """A `transformers` causal LM seen as hidden states and an output matrix."""

    lora: LoraConfig | None = None
    packs = False
    """Whether texts that share rows of a CPU are attended to one by one, which is faster than with
    a mask."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        name = type(model).__name__
        if head is None or getattr(head, "bias", None) is not None:
            raise QvgptError(f"{name}: a trunk needs an LM head that is a matrix without bias")
        self.vocab_size, self.embed_dim = head.weight.shape
        context = getattr(config, "max_position_embeddings", None)
        if not isinstance(context, int):
            raise QvgptError(
                f"{name}: says no context (max_position_embeddings), so that it can be no trunk"
            )
        self.seq_len = context
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(_ATTENTION)
        self._try()
        self.packs = self._can_pack()

    @property
    def output_weight(self) -> Float[Tensor, "vocab embed"]:
        """The LM head's matrix."""
        return self.model.get_output_embeddings().weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, by the names that the model itself says must not be split."""
        names = self.model._no_split_modules or ()
        return [m for m in self.model.modules() if type(m).__name__ in names]

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: ColumnCache | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        """States after the last norm; arguments as of `GPT.hidden`.

        With a `cache` that holds something, several new tokens a row must all be real.
        """
        if cache is None and mask is None:
            alone: Any = {"position_ids": positions, "use_cache": False}
            visible = None if positions is None else seen_in_rows(positions)
            if visible is not None:
                if not self.shares_prompts:  # windows would be forgotten
                    raise QvgptError(f"{type(self.model).__name__} cannot share prompts in a row")
                return self._base(tokens, attention_mask=visible, **alone)
            ours = self.model.config._attn_implementation == _ATTENTION and self.packs
            here = tokens.device.type == "cpu" and tokens.size(1) > _APART
            if ours and here and positions is not None:
                return self._taken_apart(tokens, positions)
            return self._base(tokens, **alone)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        # real tokens to the right: padding then stands only before a row's first token
        order = mask.int().argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        tokens, mask = tokens.gather(1, order), mask.gather(1, order)
        if positions is not None:
            positions = positions.gather(1, order)
        if cache is None:
            seen, past = mask, None
        else:
            cache.trim()
            seen, past = torch.cat([cache.mask, mask], dim=1), cache.past
        if positions is None:
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.size(1) :]
        out = self._base(
            tokens,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=past,
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.mask = seen
            cache.longest = min(cache.longest + tokens.size(1), cache.capacity)
        return out.gather(1, back[:, :, None].expand_as(out))

    def _taken_apart(self, tokens: Tensor, positions: Tensor) -> Tensor:
        heads = self.model.config.get_text_config().num_attention_heads
        return self._base(
            tokens,
            attention_mask=_NO_MASK,
            position_ids=positions,
            use_cache=False,
            packed=Packed.of(positions, heads),
        )

    def _base(self, tokens: Tensor, **options: Any) -> Tensor:
        hidden = self.model.base_model(input_ids=tokens, **options).last_hidden_state
        return hidden.to(self.output_weight.device)  # a device map may put it elsewhere

    def new_cache(self, batch: int, capacity: int) -> ColumnCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        if capacity > self.seq_len:
            raise QvgptError(f"{capacity} tokens do not fit the context of {self.seq_len}")
        mask = torch.zeros(batch, 0, dtype=torch.bool, device=self.output_weight.device)
        ours = self.model.config._attn_implementation == _ATTENTION
        return ColumnCache(mask, capacity, fp32=ours and mask.device.type == "cpu")

    def set_dropout(self, rate: float) -> None:
        """Drop another share of activations while training; `config.json` stays."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Dropout) and ".lora_dropout." not in name:
                module.p = rate
            for own in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, own, None), float):
                    setattr(module, own, rate)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep a layer's input alone while training; the backward pass computes the rest anew."""
        model, name = self.model, "activation_checkpointing"
        if not hasattr(model, f"{name}_enable"):
            name = "gradient_checkpointing"  # as transformers called it before
        if not on:
            getattr(model, f"{name}_disable")()
            return
        if not model.supports_gradient_checkpointing:
            raise QvgptError(f"{type(model).__name__}: transformers cannot checkpoint its layers")
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
        if hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()  # only the reentrant kind needs gradients there

    def with_head(self, weight: Float[Tensor, "vocab embed"]) -> "CausalLM":
        """A copy whose LM head is `weight`, untied from the token embedding."""
        model = copy.deepcopy(self.model)
        head = nn.Linear(self.embed_dim, self.vocab_size, bias=False, device=weight.device)
        head.weight = nn.Parameter(weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
        other = CausalLM(model)
        if self.lora is not None:
            other.lora, other.base_sha256 = self.lora, self.base_sha256
        return other

    def released(self) -> Any:
        """The `transformers` model as it was, for others to use."""
        if self.model.config._attn_implementation == _ATTENTION:
            self.model.set_attn_implementation("sdpa")
        return self.model

    def add_lora(self, config: LoraConfig) -> None:
        """Let fresh adapters be trained in the place of the model's own weights."""
        if self.lora is not None:
            raise QvgptError("lora: the model has adapters already")
        add_lora(self.model, config)
        self.lora, self.base_sha256 = config, base_sha256(self.model)

    def without_adapters(self) -> AbstractContextManager[None]:
        """As long as it lasts, the base model alone."""
        return base_alone(self.model)

    def save_adapter(self, path: Path) -> None:
        """Write the adapters alone, in peft's format."""
        save_adapter(self.model, path, self.base_sha256)

    def load_adapter(self, path: Path) -> None:
        """Put saved adapters in the place of those that `add_lora` made."""
        load_adapter(self.model, path, self.base_sha256)

    def save(self, path: str | Path, **config: Any) -> None:
        """Write the Hugging Face directory; `config` adds keys such as eos_token_id.

        Adapters are merged there, and stand in `adapter` beside.
        """
        path = Path(path)
        logging.disable_progress_bar()
        merged = None if self.lora is None else merged_state(self.model)
        self.model.save_pretrained(path, state_dict=merged)
        if self.lora is not None:
            self.save_adapter(path / ADAPTER)
        if config:
            add_to_json(path / "config.json", config)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: Dtype = "float32",
        device_map: str | dict[str, Any] | None = None,
    ) -> "CausalLM":
        """Read a Hugging Face directory: known architectures and safetensors only.

        `device_map` is accelerate's: "auto", a device, or module → device; None: the CPU.
        Raises `QvgptError` where it holds code of its own, no such model, or weights that do not
        fit.
        """
        path = Path(path)
        kinds = read_config(path).get("architectures") or []
        if any("Classification" in str(kind) for kind in kinds):
            raise QvgptError(
                f"{path}: is a classifier ({kinds[0]}), which writes no text; as a reward it is "
                f"classifier:{path}"
            )
        if not list(path.glob("*.safetensors")):
            raise QvgptError(f"{path}: no safetensors file (weights are read from those only)")
        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers raises for a damaged directory
            raise QvgptError(
                f"{path}: no causal language model can be read: {one_line(error)}"
            ) from None
        model, found = loaded
        wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
        if wrong:
            raise QvgptError(f"{path}: the weights do not fit config.json: {wrong[0]} and more")
        places = (getattr(model, "hf_device_map", None) or {}).values()
        head = model.get_output_embeddings()
        if "disk" in places or (head is not None and head.weight.is_meta):
            raise QvgptError(
                f"device_map: {device_map!r} leaves weights on disk, or the LM head where values "
                "cannot read it: there must be memory for them"
            )
        return cls(model.eval())

    @torch.no_grad()
    def _try(self) -> None:
        training = self.model.training
        self.model.eval()
        tokens = torch.tensor([[1, 2]], device=self.output_weight.device) % self.vocab_size
        theirs = self.model(input_ids=tokens).logits.float()
        ours = (self.hidden(tokens) @ self.output_weight.T).float()
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        self.model.train(training)
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
            raise QvgptError(
                f"{type(self.model).__name__}: its logits are not its output matrix times its last "
                "hidden state (it may scale them): it cannot carry value heads yet"
            )

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Tried on two texts in a row: not every architecture hands its attention what it needs."""
        ours = self.model.config._attn_implementation == _ATTENTION
        if not ours or self._has_windows or self.output_weight.device.type != "cpu":
            return False
        tokens = torch.tensor([[1, 2, 3, 4, 2]]) % self.vocab_size
        positions = torch.tensor([[0, 1, 0, 1, 2]])
        return self._are_alike(
            lambda: self.hidden(tokens, positions=positions),
            lambda: self._taken_apart(tokens, positions),
        )

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether a row may hold a prompt once and then several texts of it: tried on two."""
        if self._has_windows:
            return False
        device = self.output_weight.device
        alone = torch.tensor([[1, 2, 3], [1, 2, 4]], device=device) % self.vocab_size
        tokens, positions = alone.flatten()[[0, 1, 2, 5]][None], torch.tensor([[0, 1, 2, 2]])
        positions = positions.to(device)
        visible = seen_in_rows(positions)
        together = {"attention_mask": visible, "position_ids": positions, "use_cache": False}
        return self._are_alike(
            lambda: self.hidden(alone).flatten(0, 1)[[0, 1, 2, 5]][None],
            lambda: self._base(tokens, **together),
        )

    @property
    def _has_windows(self) -> bool:
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        return kinds != {"full_attention"} or bool(getattr(config, "sliding_window", None))

    @torch.no_grad()
    def _are_alike(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
        training = self.model.training
        self.model.eval()
        try:
            found = [way().float() for way in (one, other)]
        except Exception:  # whatever a model makes of an argument that it does not know
            return False
        finally:
            self.model.train(training)
        exact = 1e-4 if self.output_weight.dtype == torch.float32 else 1e-2
        return torch.allclose(*found, rtol=exact, atol=exact)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys head_dim"],
    attention_mask: Bool[Tensor, "#batch 1 #time #keys"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch time heads head_dim"], None]:
    """transformers' `sdpa`, but on a CPU for short texts that learn and for one token a row.

    `packed`: texts that share rows, each to be attended to by itself.
    """
    plain = not any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    if query.size(2) == 1 and query.device.type == "cpu" and plain and not query.requires_grad:
        size = (key.size(0), key.size(1), 1, key.size(2))
        added = key.new_zeros(key.size(0), 1, 1, key.size(2))
        if attention_mask is not None:  # a row that idles may see nothing: no softmax of −inf
            added.masked_fill_(~attention_mask, torch.finfo(key.dtype).min)
        found = attend_once(query, key, value, added.expand(size).flatten(0, 1), scale)
        return found.transpose(1, 2), None
    if torch.is_autocast_enabled("cpu"):  # rotated queries and keys are fp32 by then
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may be in fp32
    causal = getattr(module, "is_causal", True) and query.size(2) == key.size(2)
    ours = plain and causal
    if packed is not None and not ours:
        raise NotImplementedError
    if not ours or (packed is None and not by_products(query, key, dropout)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    own = query.size(-1) ** -0.5
    if scale != own:
        query = query * (scale / own)
    if packed is not None:
        qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], 2)
        return packed_attention(qkv, packed, dropout), None
    if attention_mask is not None:  # padding sees itself, so that no softmax is empty
        itself = torch.eye(key.size(2), dtype=torch.bool, device=key.device)
        attention_mask = attention_mask | itself
    found = attention(query, key, value, attention_mask, dropout)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
