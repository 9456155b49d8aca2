"""A text's score, spread over the tokens that earn it."""

from collections.abc import Sequence

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.env import Reward
from qvgpt.envs.rewards.metric import Row
from qvgpt.errors import QvgptError


def shape(
    reward: Reward,
    tokens: Sequence[Sequence[int]],
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    brevity: bool = True,
) -> list[list[float]]:
    """Spread a text's score over its tokens: r_t = Φ(tokens[:t]) − Φ(tokens[:t−1]), Φ() = 0.

    `tokens` are completions as sampled, end token included, which earns 0 since it adds no text.
    Σ_t r_t is the score of the whole text, so the return and the best policy stay what they were
    (potential-based shaping: Ng, Harada & Russell 1999); only the credit comes earlier.

    BLEU's brevity penalty holds every early prefix near 0, so that most reward arrives late.
    `brevity=False` leaves it out of Φ except for the last token, which settles the difference:
    it then carries a negative reward where the text is too short. The sum is unchanged.

    Every prefix of every completion is scored: a metric other than BLEU costs time × its price.
    Raises `QvgptError` for an empty completion, or `brevity=False` with another metric than BLEU.
    """
    if any(not completion for completion in tokens):
        raise QvgptError("an empty completion has no token to carry a reward")
    prefixes = [
        [tokenizer.decode(whole[:t]) for t in range(1, len(whole))]
        + [tokenizer.decode_completion(whole)]
        for whole in tokens
    ]
    in_one = getattr(reward, "prefix_scores", None)
    if in_one is not None:
        pairs = zip(prefixes, rows, strict=True)
        return [_differences(in_one(texts, row, brevity)) for texts, row in pairs]
    if not brevity:
        raise QvgptError("brevity=False is for the reward 'bleu': others have no brevity penalty")
    repeated = [row for texts, row in zip(prefixes, rows, strict=True) for _ in texts]
    scores = iter(reward([text for texts in prefixes for text in texts], repeated))
    return [_differences([next(scores) for _ in texts]) for texts in prefixes]


def _differences(scores: list[float]) -> list[float]:
    return [b - a for a, b in zip([0.0, *scores], scores, strict=False)]
