"""Which texts go into which batch, and how long its rows are."""

from collections.abc import Sequence

import torch

from qvgpt.trajectory import Trajectory, by_prompt


class Rows:
    """What a training's batches are made of: a text a row, or `packed`, or prompts `shared`."""

    def __init__(self, texts: Sequence[Trajectory], packed: bool = False, shared: bool = False):
        self.packed = packed
        self.lengths = [len(t.tokens) for t in texts]
        """Tokens of each text."""
        self.prompts = by_prompt(texts) if shared else None
        """The texts of each prompt."""
        self._prompt = [0] * len(texts)
        self._prompt_length = [0] * len(texts)
        for number, several in enumerate(self.prompts or ()):
            length = len(texts[several[0]].prompt)
            for i in several:
                self._prompt[i], self._prompt_length[i] = number, length

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The texts of each batch of an epoch."""
        lengths = self.lengths
        if self.prompts is not None:
            row = [self._shared_row(several) for several in self.prompts]
            lengths = [row[number] for number in self._prompt]
        return batches(lengths, batch_size, seed, epoch, not self.packed, self.prompts)

    def padded_tokens(self, indices: Sequence[int]) -> int:
        """Tokens of a batch of these texts, padding included; of packed ones an estimate."""
        lengths = [self.lengths[i] for i in indices]
        if self.prompts is not None:
            together: dict[int, list[int]] = {}
            for i in indices:
                together.setdefault(self._prompt[i], []).append(i)
            lengths = [self._shared_row(several) for several in together.values()]
        longest = max(lengths, default=0)
        rows = -(-sum(lengths) // max(longest, 1)) if self.packed else len(lengths)
        return longest * rows

    def _shared_row(self, texts: Sequence[int]) -> int:
        """Tokens of a row of texts of one prompt."""
        prompt = self._prompt_length[texts[0]]
        return prompt + sum(self.lengths[i] - prompt for i in texts)


def batches(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    bucketed: bool = True,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Indices of each batch of one epoch: shuffled, yet of similar lengths within a batch.

    Not `bucketed`: shuffled through and through, for texts that are packed anyway. `groups` stay
    together, but for those that a batch's end divides; all of a group have one length then. A pure
    function of its arguments, so that a resumed run goes on where it stopped.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    together = [[i] for i in range(len(lengths))] if groups is None else groups
    shuffled = torch.randperm(len(together), generator=generator).tolist()
    order = [i for group in shuffled for i in together[group]]
    window = (64 if bucketed else 1) * batch_size
    chunks = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        chunks += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    shuffled = torch.randperm(len(chunks), generator=generator).tolist()
    return [chunks[i] for i in shuffled]
