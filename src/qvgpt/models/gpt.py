"""The GPT: GPT-2's architecture in one file, with its KV cache and its way to and from disk.

Token and position embedding, pre-layer-norm blocks of causal softmax attention and a GELU MLP,
residuals, a final layer norm and a tied or untied head (Radford et al., 2019). Directories are
Hugging Face's GPT-2 directories, read and written exactly.
"""

import json
from abc import ABCMeta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvgpt.errors import QvgptError
from qvgpt.models.attention import Packed, attention, packed_attention, seen_in_rows
from qvgpt.models.backbone import Backbone, Dtype
from qvgpt.models.disk import load_tensors, one_line, read_config
from qvgpt.models.dropout import Dropout
from qvgpt.models.kv_cache import KVCache


class Attention(nn.Module):
    """Causal multi-head softmax attention."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Float[Tensor, "batch time embed"],
        visible: Tensor | Packed | None,
        cache: KVCache | None = None,
        layer: int = 0,
        slot: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        """Each token looks at the `visible` ones; None means all before it and itself.

        A tensor is a mask [batch, 1, time, keys].
        """
        batch, time, embed = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.num_heads, -1)
        dropout = self.dropout if self.training else 0.0
        if isinstance(visible, Packed):
            return self.out(packed_attention(qkv, visible, dropout).flatten(2))
        query, key, value = qkv.unbind(2)  # [batch, time, heads, head_dim] each
        if cache is not None:
            assert slot is not None
            assert visible is not None
            cache.write(layer, slot, key, value)
            return self.out(cache.attend(layer, query, visible).flatten(2))
        attended = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            visible,
            dropout,
        )  # [batch, heads, time, head_dim]
        return self.out(attended.transpose(1, 2).reshape(batch, time, embed))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm_1 = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads, dropout)
        self.norm_2 = nn.LayerNorm(embed_dim)
        self.up = nn.Linear(embed_dim, 4 * embed_dim)
        self.down = nn.Linear(4 * embed_dim, embed_dim)
        self.drop = Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch time embed"], *where: Any) -> Tensor:
        """One layer; `where` is handed to the attention."""
        x = x + self.drop(self.attention(self.norm_1(x), *where))
        hidden = F.gelu(self.up(self.norm_2(x)), approximate="tanh")
        return x + self.drop(self.down(hidden))


class GPT(nn.Module):
    """A decoder-only transformer language model; `model(tokens)` gives next-token logits."""

    softcap: float | None = None  # of the logits; GPT-2 has none
    lora: None = None  # a GPT-2 to be adapted is read as `CausalLM`

    def __init__(
        self,
        vocab_size: int = 50257,
        embed_dim: int = 768,
        num_heads: int = 12,
        num_layers: int = 12,
        seq_len: int = 1024,
        dropout: float = 0.0,
        tied: bool = True,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise QvgptError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}")
        self.shape = {
            "vocab_size": vocab_size,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "seq_len": seq_len,
            "dropout": dropout,
            "tied": tied,
        }
        self.vocab_size, self.embed_dim = vocab_size, embed_dim
        self.seq_len, self.num_heads = seq_len, num_heads
        self.gradient_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(seq_len, embed_dim)
        self.drop = Dropout(dropout)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, dropout) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # GPT-2 scales these by depth
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5)
        if tied:
            self.head.weight = self.token_embedding.weight

    @property
    def output_weight(self) -> Float[Tensor, "vocab embed"]:
        """The LM head's matrix: logits = hidden @ output_weight.T."""
        return self.head.weight

    def set_dropout(self, rate: float) -> None:
        """Drop another share of activations while training; `shape` and `config.json` stay."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
            elif isinstance(module, Attention):
                module.dropout = rate

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep a block's input alone while training; the backward pass computes the rest anew."""
        self.gradient_checkpointing = on

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of each next token. Arguments as for `hidden`."""
        return self.head(self.hidden(tokens, mask, positions, cache))

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: KVCache | None = None,
        embedded: Float[Tensor, "batch time embed"] | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        """Hidden states after the last norm; see `Backbone.hidden`.

        `embedded`: the tokens' embeddings, where they were looked up already.
        """
        if mask is None and cache is not None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        slot = visible = None
        if cache is not None:
            assert mask is not None
            cache.grow(tokens.size(1))
            slot = cache.slots(mask)
            visible = cache.visible(slot)
            positions = slot.clamp(max=self.seq_len - 1) if positions is None else positions
        elif mask is not None:
            visible = _causal(mask)
        elif positions is not None:
            visible = seen_in_rows(positions)
            visible = Packed.of(positions, self.num_heads) if visible is None else visible
        if positions is None:
            positions = _default_positions(tokens, mask)
        embedded = self.token_embedding(tokens) if embedded is None else embedded
        x = self.drop(embedded + self.position_embedding(positions))
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, visible, use_reentrant=False)
            else:
                x = block(x, visible, cache, layer, slot)
        if cache is not None and mask is not None:
            cache.length = cache.length + mask.sum(1)
        return self.norm(x)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        if capacity > self.seq_len:
            raise QvgptError(f"{capacity} tokens do not fit the context of {self.seq_len}")
        like, heads = self.token_embedding.weight, self.num_heads
        head_dim = self.embed_dim // heads
        return KVCache.new(like, len(self.blocks), batch, heads, capacity, head_dim)

    def with_head(self, weight: Float[Tensor, "vocab embed"]) -> "GPT":
        """A copy whose LM head is `weight`, untied from the token embedding."""
        other = GPT(**{**self.shape, "tied": False})
        other.to(self.output_weight).load_state_dict({**self.state_dict(), "head.weight": weight})
        return other.train(self.training)

    def save(self, path: str | Path, **config: Any) -> None:
        """Write a Hugging Face GPT-2 directory; `config` adds keys such as eos_token_id."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous() for k, v in _to_hugging_face(self.state_dict()).items()}
        if self.shape["tied"]:
            del state["lm_head.weight"]
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        hf = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_embd": self.embed_dim,
            "n_head": self.num_heads,
            "n_layer": len(self.blocks),
            "n_positions": self.seq_len,
            "vocab_size": self.vocab_size,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": self.shape["tied"],
            **{f"{place}_pdrop": self.shape["dropout"] for place in ("attn", "embd", "resid")},
            "torch_dtype": str(self.token_embedding.weight.dtype).removeprefix("torch."),
            **config,
        }
        (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, dtype: Dtype = "float32") -> "GPT":
        """Read a Hugging Face GPT-2 directory; raises `QvgptError` where it is none."""
        path = Path(path)
        hf = read_config(path)
        if hf.get("model_type") != "gpt2":
            found = hf.get("model_type")
            raise QvgptError(f"{path}: a GPT-2 directory was expected, not {found!r}")
        for name, value in _FIXED.items():
            if hf.get(name, value) != value:
                raise QvgptError(f"{path}: {name} {hf[name]!r} is not known here, only {value!r}")
        if missing := {"vocab_size", "n_embd", "n_head", "n_layer", "n_positions"} - hf.keys():
            raise QvgptError(f"{path}/config.json: {', '.join(sorted(missing))} missing")
        tensors, tied = (
            load_tensors(path / "model.safetensors"),
            hf.get("tie_word_embeddings", True),
        )
        try:
            state = _from_hugging_face(tensors, tied)
            _refuse_other_sizes(state, hf)
            model = cls(
                vocab_size=hf["vocab_size"],
                embed_dim=hf["n_embd"],
                num_heads=hf["n_head"],
                num_layers=hf["n_layer"],
                seq_len=hf["n_positions"],
                dropout=hf.get("resid_pdrop", 0.0),
                tied=tied,
            )
            model.load_state_dict(state)
        except Exception as error:  # whatever sizes that make no sense lead to
            raise QvgptError(
                f"{path}: the weights do not fit config.json: {one_line(error)}"
            ) from None
        return model.to(state["head.weight"].dtype if dtype == "auto" else getattr(torch, dtype))


# a module within a module is no attribute to the protocols of Python 3.12
ABCMeta.register(Backbone, GPT)  # pyright: ignore[reportArgumentType]


def _causal(mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch 1 time time"]:
    """Real tokens up to one's own; padding sees itself, so that no softmax is empty."""
    itself = torch.eye(mask.size(1), dtype=torch.bool, device=mask.device)
    return ((itself.logical_not().tril() & mask[:, None, :]) | itself)[:, None]


def _default_positions(
    tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None
) -> Int[Tensor, "batch time"]:
    if mask is None:
        return torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return (mask.cumsum(1) - 1).clamp(min=0)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


_FIXED = {  # what GPT-2 directories may vary, and this file does not
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
_NAMES = (  # ours, Hugging Face's
    ("token_embedding.", "transformer.wte."),
    ("position_embedding.", "transformer.wpe."),
    ("blocks.", "transformer.h."),
    (".norm_1.", ".ln_1."),
    (".norm_2.", ".ln_2."),
    (".attention.qkv.", ".attn.c_attn."),
    (".attention.out.", ".attn.c_proj."),
    (".up.", ".mlp.c_fc."),
    (".down.", ".mlp.c_proj."),
    ("head.", "lm_head."),
)


def _rename(name: str, backwards: bool) -> str:
    if not backwards and name.startswith("norm."):
        return "transformer.ln_f." + name.removeprefix("norm.")
    if backwards and name.startswith("transformer.ln_f."):
        return "norm." + name.removeprefix("transformer.ln_f.")
    for ours, theirs in _NAMES:
        name = name.replace(theirs, ours) if backwards else name.replace(ours, theirs)
    return name


def _is_conv1d(theirs: str) -> bool:
    return ".c_" in theirs and theirs.endswith("weight")  # GPT-2 stores these [in, out]


def _to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {_rename(k, backwards=False): v for k, v in state.items()}
    return {k: v.t() if _is_conv1d(k) else v for k, v in renamed.items()}


def _refuse_other_sizes(state: dict[str, Tensor], hf: dict[str, Any]) -> None:
    """Before anything is made: nobody's sizes shall fill the memory."""
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    tokens, positions = (state[f"{kind}_embedding.weight"].shape for kind in ("token", "position"))
    found = {"vocab_size": tokens[0], "n_embd": tokens[1], "n_positions": positions[0],
             "n_layer": len(layers)}  # fmt: skip
    for key, size in found.items():
        if hf[key] != size:
            raise QvgptError(f"{key} is {hf[key]!r} there, {size} here")


def _from_hugging_face(state: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    state = {
        k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": v
        for k, v in state.items()
        if not k.endswith((".attn.bias", ".attn.masked_bias"))  # buffers of old checkpoints
    }
    if tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return {_rename(k, True): v.t() if _is_conv1d(k) else v for k, v in state.items()}
