"""Q and V heads on hidden states, and their slow copies.

Every Q head has the same form, whatever its kind:

    Q(s, a) = b(s) + (wₐ − w̄) · f(s)          w̄ = meanₐ wₐ

with features f(s) = h (linear), P·h (low rank) or relu(U·h) (mlp). It is a dueling head with a
centred advantage: linear in h wherever f is, so that it folds into the LM head. The last layers
are zero at the start, so guidance begins as a no-op. Weights, last layers and values are fp32;
autocast shortens the products of hidden layers, and the sums over the vocabulary, alone.

A trap: a plain zero-initialised head leaves tokens never seen at Q = 0, and where rewards are
negative that makes them the best ones. Centring puts them at the mean of all tokens instead, and
`ValueHeads.start_at` sees to it that no constant in the rewards has to be learned at all: else
the advantages of the tokens seen take up a part of it.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qvgpt.errors import QvgptError
from qvgpt.models.vocab import gather_dot, taken_and_logsumexp, wide


@dataclass(frozen=True)
class HeadsConfig:
    """What the value heads look like."""

    kind: Literal["linear", "low_rank", "mlp"] = "linear"
    """linear and low_rank fold into an ordinary checkpoint; mlp is ILQL's."""
    rank: int = 64
    """Rank of a low_rank head."""
    num_q: int = 2
    """Q heads: 2 are twins, whose minimum curbs overestimation."""
    v: Literal["linear", "mlp"] = "mlp"
    """The head of V, and of the baseline b of Q."""

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.kind not in ("linear", "low_rank", "mlp") or self.v not in ("linear", "mlp"):
            raise QvgptError(f"heads: unknown kind in {self}")
        if not all(isinstance(n, int) and n >= 1 for n in (self.num_q, self.rank)):
            raise QvgptError("heads: num_q and rank must be whole numbers of at least 1")


def exact(hidden: Tensor) -> torch.autocast:
    """A region without autocast: hidden layers may be short of digits, values are not."""
    return torch.autocast(hidden.device.type, enabled=False)


class StateHead(nn.Module):
    """A number per state: V(s), or the baseline b(s)."""

    def __init__(self, embed_dim: int, kind: Literal["linear", "mlp"]):
        super().__init__()
        last = nn.Linear(embed_dim if kind == "linear" else 2 * embed_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = [] if kind == "linear" else [nn.Linear(embed_dim, 2 * embed_dim), nn.ReLU()]
        self.layers = nn.Sequential(*first, last)

    def forward(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape"]:
        """[.., embed] → [..]."""
        features = self.layers[:-1](hidden)
        with exact(hidden):
            return self.layers[-1](wide(features)).squeeze(-1)


class QHead(nn.Module):
    """Q(s, ·) over the vocabulary; see the head of this file."""

    def __init__(self, embed_dim: int, vocab_size: int, config: HeadsConfig):
        super().__init__()
        self.kind = config.kind
        width = {"linear": embed_dim, "low_rank": config.rank, "mlp": 2 * embed_dim}[config.kind]
        self.baseline = StateHead(embed_dim, config.v)
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))
        self._mean: tuple[tuple[int, int], Tensor] | None = None
        if config.kind == "low_rank":
            self.project = nn.Linear(embed_dim, width, bias=False)
        elif config.kind == "mlp":
            self.project = nn.Linear(embed_dim, width)

    def train(self, mode: bool = True) -> "QHead":
        """What was kept is forgotten: sharded weights change in ways that nobody sees."""
        self._mean = None
        return super().train(mode)

    def features(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape features"]:
        """f(s): the part that does not depend on the token."""
        if self.kind == "linear":
            return hidden
        projected = self.project(hidden)
        return projected.relu() if self.kind == "mlp" else projected

    def mean_weight(self) -> Float[Tensor, "features"]:
        """w̄; that of a slow copy is kept while decoding, which asks at each token."""
        if self.training or self.weight.requires_grad:
            return self.weight.mean(0)
        # in-place changes count up; only fused optimizers do not, which never touch a slow copy
        state = (self.weight._version, self.weight.data_ptr())
        if self._mean is None or self._mean[0] != state:
            self._mean = (state, self.weight.mean(0))
        return self._mean[1]

    def centred_weight(self) -> Float[Tensor, "vocab features"]:
        """wₐ − w̄."""
        return self.weight - self.mean_weight()

    def of(
        self, hidden: Float[Tensor, "rows embed"], token: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        """Q of one token per row, reading only that token's weights (and their mean)."""
        f, baseline = self.features(hidden), self.baseline(hidden)
        with exact(hidden):
            f = wide(f)
            return baseline + gather_dot(f, self.weight, token) - f @ self.mean_weight()

    def of_many(
        self, hidden: Float[Tensor, "rows embed"], tokens: Int[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates"]:
        """Q of several candidate tokens per row."""
        f = self.features(hidden)
        taken = torch.einsum("rf,rcf->rc", f, self.weight[tokens])
        return taken + (self.baseline(hidden) - f @ self.mean_weight())[:, None]

    def forward(self, hidden: Float[Tensor, "rows embed"]) -> Float[Tensor, "rows vocab"]:
        """Q of every token."""
        f = self.features(hidden)
        return f @ self.weight.T + (self.baseline(hidden) - f @ self.mean_weight())[:, None]

    def of_and_logsumexp(
        self, hidden: Float[Tensor, "rows embed"], token: Int[Tensor, "rows"]
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
        """Q of one token per row and log Σₐ exp Q(s, a), in chunks of rows."""
        f, baseline = self.features(hidden), self.baseline(hidden)
        taken, total = taken_and_logsumexp(f, self.weight, token, centred=True)
        return taken + baseline, total + baseline

    def folded(self) -> Float[Tensor, "vocab embed"]:
        """The matrix F with A(s, a) = Fₐ · h up to a number per state, where there is one."""
        if self.kind == "mlp":
            raise QvgptError(
                "an mlp Q head is not linear in the hidden state and does not fold: "
                "train with heads.kind linear or low_rank"
            )
        centred = self.centred_weight()
        return centred @ self.project.weight if self.kind == "low_rank" else centred


class ValueHeads(nn.Module):
    """V, one or more Q heads, and slow copies of the Q heads."""

    def __init__(self, embed_dim: int, vocab_size: int, config: HeadsConfig):
        super().__init__()
        self.config = config
        self.v = StateHead(embed_dim, config.v)
        self.q = nn.ModuleList([QHead(embed_dim, vocab_size, config) for _ in range(config.num_q)])
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.shape = (vocab_size, embed_dim)

    @property
    def are_fresh(self) -> bool:
        """Whether nothing was learned yet: what begins at 0 is 0 still."""
        heads: list[Any] = [*self.q, *self.target_q]
        last: list[Any] = [h.layers[-1] for h in (self.v, *(head.baseline for head in heads))]
        found = [head.weight for head in heads] + [p for x in last for p in (x.weight, x.bias)]
        return not any(bool(tensor.any()) for tensor in found)

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Let V and every Q of fresh heads be `value`, best the mean return of the data.

        With γ = 1 a constant added to every terminal reward then leaves all that is learned of
        advantages exactly as it was.
        """
        heads: list[Any] = [*self.q, *self.target_q]
        for state_head in [self.v, *(head.baseline for head in heads)]:
            last: Any = state_head.layers[-1]
            last.bias.fill_(value)

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        """Q̄ ← (1 − τ) Q̄ + τ Q, once per optimizer step."""
        for slow, fast in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            slow.lerp_(fast, tau)

    @torch.no_grad()
    def folded(self) -> Float[Tensor, "vocab embed"]:
        """The mean of the slow Q heads as one matrix: logits + β·A = (W + β·folded) h."""
        return torch.stack([head.folded() for head in self.target_q]).mean(0)  # type: ignore[operator]
