"""Q and V heads on hidden states, and their slow copies.

Every Q head has the same form, whatever its kind:

    Q(s, a) = b(s) + (wₐ − w̄) · f(s)          w̄ = meanₐ wₐ

with features f(s) = h (linear), P·h (low rank), M·h (bilinear) or relu(U·h) (mlp). It is a dueling
head with a centred advantage: linear in h wherever f is, so that it folds into the LM head. The
last layers are zero at the start, so guidance begins as a no-op. Weights, last layers and values
are fp32; autocast shortens the products of hidden layers, and the sums over the vocabulary, alone.

Of kind `bilinear`, wₐ is the LM head's row of the token as it was when the heads were made, and is
not learned: M alone is, embed × embed numbers, so that what is seen of a token is known of all that
are like it (action embeddings; Dulac-Arnold et al., 2015). All heads share these rows, in memory
and on disk. The other kinds learn a row for each token, and of a rare one they know little.

A trap: a plain zero-initialised head leaves tokens never seen at Q = 0, and where rewards are
negative that makes them the best ones. Centring puts them at the mean of all tokens instead, and
`ValueHeads.start_at` sees to it that no constant in the rewards has to be learned at all: else
the advantages of the tokens seen take up a part of it.

Of kind `categorical`, each number is a distribution over returns instead, and what is said of
numbers holds for its logits; Q and V are its means. Its features are one low-rank projection a
bin, f(s, z) = P_z·h, for weights of their own for every token and bin would be billions.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qvgpt.categorical import Support, read_distribution
from qvgpt.errors import QvgptError
from qvgpt.models import native
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.vocab import best, chunk_rows, gather_dot, pick, taken_and_logsumexp, wide

_NO_CHANGE = nullcontext()
_TAKEN = 2**21  # elements of weights that are gathered at a time: they stay in the cores' cache


def exact(hidden: Tensor) -> AbstractContextManager[Any]:
    """A region without autocast: hidden layers may be short of digits, values are not."""
    where = hidden.device.type
    return torch.autocast(where, enabled=False) if torch.is_autocast_enabled(where) else _NO_CHANGE


def version(tensor: Tensor) -> int:
    """How often it was changed in place, as far as that is told: of inference tensors it is not."""
    return 0 if tensor.is_inference() else tensor._version


class StateHead(nn.Module):
    """A number per state, V(s) or the baseline b(s); with a `support`, a distribution of it."""

    def __init__(
        self, embed_dim: int, kind: Literal["linear", "mlp"], support: Support | None = None
    ):
        super().__init__()
        outputs = 1 if support is None else support.bins
        last = nn.Linear(embed_dim if kind == "linear" else 2 * embed_dim, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = [] if kind == "linear" else [nn.Linear(embed_dim, 2 * embed_dim), nn.ReLU()]
        self.layers = nn.Sequential(*first, last)
        self.support = support

    def logits(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape bins"]:
        """[.., embed] → [.., bins]."""
        *layers, last = self.layers  # a slice would make a module each time
        features = hidden
        for layer in layers:
            features = layer(features)
        with exact(hidden):
            return last(wide(features))

    def forward(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape"]:
        """[.., embed] → [..]: the number, or the mean of its distribution."""
        found = self.logits(hidden)
        if self.support is None:
            return found.squeeze(-1)
        return read_distribution(found, self.support.centres(found))


class _OverVocab(nn.Module):
    """A head with a row of weights for each token, of which their mean is taken off."""

    weight: nn.Parameter
    _mean: tuple[tuple[int, int], Tensor] | None = None

    @property
    def last(self) -> Tensor:
        """The matrix that is zero as long as no token is told from another."""
        return self.weight

    def train(self, mode: bool = True) -> "_OverVocab":
        """What was kept is forgotten: sharded weights change in ways that nobody sees."""
        self._mean = None
        return super().train(mode)

    def mean_weight(self) -> Float[Tensor, "features"]:
        """w̄; that of a slow copy is kept while decoding, which asks at each token."""
        if self.training or self.weight.requires_grad:
            return self.weight.mean(0)
        # in-place changes count up; only fused optimizers do not, which never touch a slow copy
        state = (version(self.weight), self.weight.data_ptr())
        if self._mean is None or self._mean[0] != state:
            self._mean = (state, self.weight.mean(0))
        return self._mean[1]


class QHead(_OverVocab):
    """Q(s, ·) over the vocabulary; see the head of this file."""

    def __init__(self, embed_dim: int, vocab_size: int, config: HeadsConfig):
        super().__init__()
        self.kind = config.kind
        widths: dict[str | None, int] = {"low_rank": config.rank, "mlp": 2 * embed_dim}
        width = widths.get(config.kind, embed_dim)
        self.baseline = StateHead(embed_dim, config.v)
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))
        if config.kind == "low_rank":
            self.project = nn.Linear(embed_dim, width, bias=False)
        elif config.kind == "bilinear":
            self.project = nn.Linear(embed_dim, width, bias=False)
            nn.init.zeros_(self.project.weight)
            self.weight.requires_grad_(False)
        elif config.kind == "mlp":
            self.project = nn.Linear(embed_dim, width)

    @property
    def last(self) -> Tensor:
        """Of bilinear heads the rows are given."""
        return self.project.weight if self.kind == "bilinear" else self.weight

    def features(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape features"]:
        """f(s): the part that does not depend on the token."""
        if self.kind == "linear":
            return hidden
        projected = self.project(hidden)
        return projected.relu() if self.kind == "mlp" else projected

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
        return _dots(f, self.weight, tokens, self.mean_weight(), self.baseline(hidden))

    def relative(
        self, hidden: Float[Tensor, "rows embed"], tokens: Int[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates"]:
        """Q of several candidates per row, up to a number per row: all that guidance reads."""
        return _dots(self.features(hidden), self.weight, tokens)

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
                "train with heads.kind linear, low_rank or bilinear"
            )
        if self.kind == "linear":
            return self.centred_weight()
        mean = self.mean_weight() @ self.project.weight
        return torch.addmm(mean, self.weight, self.project.weight, beta=-1)


def _dots(
    features: Float[Tensor, "rows features"],
    weight: Float[Tensor, "vocab features"],
    tokens: Int[Tensor, "rows candidates"],
    mean: Float[Tensor, "features"] | None = None,
    plus: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "rows candidates"]:
    """features[i] · (weight[tokens[i, j]] − mean) + plus[i], of the last two both or neither."""
    given = [t for t in (features, weight, mean, plus) if t is not None]
    compiled = native.of(torch.float32) if native.reads(*given) else None
    if compiled is not None and not native.Native.fits(weight):
        compiled = None
    # a product apart takes the time of so many in a matrix product, or longer
    apart = 4 if compiled is not None else 12
    few = apart * tokens.size(1) < len(weight)
    if few and compiled is not None:
        return compiled.gathered(features, weight, tokens, mean, plus)
    found = _gathered(features, weight, tokens) if few else (features @ weight.T).gather(1, tokens)
    return found if mean is None or plus is None else found + (plus - features @ mean)[:, None]


def _gathered(
    features: Float[Tensor, "rows features"],
    weight: Float[Tensor, "vocab features"],
    tokens: Int[Tensor, "rows candidates"],
) -> Float[Tensor, "rows candidates"]:
    """features[i] · weight[tokens[i, j]], in parts whose rows of `weight` fit a core's cache."""
    size = max(1, _TAKEN // (tokens.size(1) * weight.size(1)))
    if len(tokens) > size:
        parts = zip(features.split(size), tokens.split(size), strict=True)
        return torch.cat([_gathered(f, weight, t) for f, t in parts])
    # of rows that differ, products and sums take a third of the time of a batched product
    taken, each = pick(weight, tokens), features[:, None]
    return (taken * each if torch.is_grad_enabled() else taken.mul_(each)).sum(-1)


class ReturnHead(_OverVocab):
    """The distribution of returns of (s, a), for every token: see the head of this file."""

    def __init__(self, embed_dim: int, vocab_size: int, config: HeadsConfig):
        super().__init__()
        if config.rank >= embed_dim:
            raise QvgptError(
                f"heads: a categorical head needs a rank below the model's {embed_dim} dimensions, "
                f"not {config.rank}: weights for every token and bin would be "
                f"{vocab_size * config.bins * embed_dim:,} numbers"
            )
        assert config.support is not None
        self.support = config.support
        self.baseline = StateHead(embed_dim, config.v, config.support)
        self.project = nn.Linear(embed_dim, config.bins * config.rank, bias=False)
        self.weight = nn.Parameter(torch.zeros(vocab_size, config.rank))

    def features(self, hidden: Float[Tensor, "rows embed"]) -> Float[Tensor, "rows bins rank"]:
        """f(s, z): the part that does not depend on the token."""
        return self.project(hidden).unflatten(-1, (self.support.bins, -1))

    def logits(
        self, hidden: Float[Tensor, "rows embed"], tokens: Int[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates bins"]:
        """Of several tokens a row."""
        taken = pick(self.weight, tokens) - self.mean_weight()
        change = taken @ self.features(hidden).transpose(1, 2)
        return self.baseline.logits(hidden)[:, None] + change

    def of(
        self, hidden: Float[Tensor, "rows embed"], token: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        """Q of one token per row: the mean."""
        return self.of_many(hidden, token[:, None])[:, 0]

    def of_many(
        self,
        hidden: Float[Tensor, "rows embed"],
        tokens: Int[Tensor, "rows candidates"],
        **functional: Any,
    ) -> Float[Tensor, "rows candidates"]:
        """What `read_distribution` reads of several candidate tokens per row; Q unless told."""
        logits = self.logits(hidden, tokens)
        return read_distribution(logits, self.support.centres(logits), **functional)

    def forward(
        self, hidden: Float[Tensor, "rows embed"], **functional: Any
    ) -> Float[Tensor, "rows vocab"]:
        """The same of every token, a part of the vocabulary at a time."""
        f, base = self.features(hidden), self.baseline.logits(hidden)[:, None]
        centres, found = self.support.centres(base), []
        size = chunk_rows(max(1, 2 * len(hidden) * self.support.bins))
        for weight in (self.weight - self.mean_weight()).split(size):
            logits = base + torch.einsum("rbf,cf->rcb", f, weight)
            found.append(read_distribution(logits, centres, **functional))
        return torch.cat(found, dim=-1)

    def folded(self) -> Float[Tensor, "vocab embed"]:
        """There is no such matrix."""
        raise QvgptError(
            "a categorical Q head is not linear in the hidden state and does not fold: "
            "train with heads.kind linear, low_rank or bilinear"
        )


class ValueHeads(nn.Module):
    """V, one or more Q heads, and slow copies of the Q heads."""

    def __init__(self, embed_dim: int, vocab_size: int, config: HeadsConfig):
        super().__init__()
        self.config = config = config.for_vocabulary(vocab_size)
        self.v = StateHead(embed_dim, config.v, config.support)
        kind = QHead if config.support is None else ReturnHead
        self.q = nn.ModuleList([kind(embed_dim, vocab_size, config) for _ in range(config.num_q)])
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        if config.kind == "bilinear":
            heads: list[Any] = [*self.q, *self.target_q]
            for head in heads:
                head.weight = heads[0].weight
            self.register_state_dict_post_hook(_once)
            self.register_load_state_dict_pre_hook(_for_each)
        self.shape = (vocab_size, embed_dim)
        self.reward_scale = 1.0
        """What rewards were multiplied with when these were learned; decoding divides by it."""

    @property
    def hidden_layers(self) -> list[nn.Linear]:
        """Those that values are read after: digits that autocast takes from them are not missed."""
        states = [m for m in self.modules() if isinstance(m, StateHead) and len(m.layers) > 1]
        found = [m.layers[0] for m in states] + [
            getattr(m, "project", None) for m in self.modules()
        ]
        return [m for m in found if isinstance(m, nn.Linear)]

    @property
    def side_by_side(self) -> list[list[nn.Linear]]:
        """Hidden layers of the slow heads that read the same states: for Q, for its baseline."""
        heads: list[Any] = [*self.target_q]
        groups = [[h.project for h in heads]] if hasattr(heads[0], "project") else []
        if self.config.v == "mlp":
            groups.append([h.baseline.layers[0] for h in heads])
        return groups

    @property
    def are_fresh(self) -> bool:
        """Whether nothing was learned yet: what begins at 0 is 0 still."""
        heads: list[Any] = [*self.q, *self.target_q]
        last: list[Any] = [h.layers[-1] for h in (self.v, *(head.baseline for head in heads))]
        found = [head.last for head in heads] + [p for x in last for p in (x.weight, x.bias)]
        return not any(bool(tensor.any()) for tensor in found)

    @property
    def know_q(self) -> bool:
        """Whether Q tells any token from another. Looks no further than the first that it does."""
        heads: list[Any] = [*self.q]
        return any(bool(part.any()) for head in heads for part in head.last.split(1024))

    @property
    def know_v_alone(self) -> bool:
        """Whether V was learned and Q was not."""
        return not self.know_q and not self.are_fresh

    @torch.no_grad()
    def tell_tokens_by(self, rows: Float[Tensor, "vocab embed"]) -> None:
        """Let bilinear heads tell tokens apart by these rows, centred, of a mean square norm of
        1 / embed: a step then changes Q about as much as one of a linear head does."""
        rows = rows.float() - rows.float().mean(0)
        size = rows.square().sum(-1).mean().mul(rows.size(1)).sqrt()
        first: Any = self.q[0]
        first.weight.copy_(rows / size.clamp(min=1e-12))  # all the others' too

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Let V and every Q of fresh heads be `value`, best the mean return of the data.

        With γ = 1 a constant added to every terminal reward then leaves all that is learned of
        advantages exactly as it was. A distribution starts with all returns alike.
        """
        if self.config.support is not None:
            return
        heads: list[Any] = [*self.q, *self.target_q]
        for state_head in [self.v, *(head.baseline for head in heads)]:
            last: Any = state_head.layers[-1]
            last.bias.fill_(value)

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        """Q̄ ← (1 − τ) Q̄ + τ Q, once per optimizer step."""
        for slow, fast in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            if slow is not fast:
                slow.lerp_(fast, tau)

    @torch.no_grad()
    def best(
        self,
        hidden: Float[Tensor, "rows embed"],
        slow_hidden: Float[Tensor, "rows embed"],
        among: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "heads rows"]]:
        """maxₐ of the heads' mean Q, and what each slow copy, which reads `slow_hidden`, says of
        that action. `among`: hidden states → which tokens are candidates; None: all are."""
        fast: list[Any] = [*self.q]
        slow: list[Any] = [*self.target_q]

        def mean(h: Tensor) -> Tensor:
            q = torch.stack([head(h) for head in fast]).mean(0)
            return q if among is None else q.masked_fill(~among(h), -torch.inf)

        tensors = 2 * len(fast) + 1 + 3 * (among is not None)
        value, token = best(mean, hidden, self.shape[0], tensors)
        return value, torch.stack([head.of(slow_hidden, token) for head in slow])

    @torch.no_grad()
    def expected(
        self, hidden: Float[Tensor, "rows embed"], policy: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "heads rows"]:
        """Σₐ π(a|s) Q̄(s, a) of each slow copy, with π(·|s) = policy(hidden)."""
        slow, found = [*self.target_q], []
        for h in hidden.split(chunk_rows(self.shape[0], tensors=4)):
            pi = policy(h)
            found.append(torch.stack([(pi * head(h)).sum(-1) for head in slow]))
        return torch.cat(found, dim=1)

    def state_value(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape"]:
        """V in the units that rewards were given in."""
        return self.v(hidden) / self.reward_scale

    @torch.no_grad()
    def folded(self) -> Float[Tensor, "vocab embed"]:
        """The mean of the slow Q heads as one matrix: logits + β·A = (W + β·folded) h."""
        slow: list[Any] = [*self.target_q]
        total = slow[0].folded()
        for head in slow[1:]:
            total += head.folded()
        return total.div_(len(slow) * self.reward_scale)


def _names_of_rows(heads: ValueHeads, prefix: str) -> list[str]:
    return [f"{prefix}{of}.{i}.weight" for of in ("q", "target_q") for i in range(len(heads.q))]


def _once(heads: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Rows that all heads share are saved under the first one's name."""
    for name in _names_of_rows(heads, prefix)[1:]:
        del state[name]


def _for_each(heads: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """And loaded under every one's, as files had them before."""
    first, *others = _names_of_rows(heads, prefix)
    if first in state:
        state.update(dict.fromkeys(others, state[first]))
