"""Which texts go into which batch."""

from collections.abc import Sequence

import torch


def batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, bucketed: bool = True
) -> list[list[int]]:
    """Indices of each batch of one epoch: shuffled, yet of similar lengths within a batch.

    Not `bucketed`: shuffled through and through, for texts that are packed anyway. A pure function
    of its arguments, so that a resumed run goes on where it stopped.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = (64 if bucketed else 1) * batch_size
    chunks = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        chunks += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    shuffled = torch.randperm(len(chunks), generator=generator).tolist()
    return [chunks[i] for i in shuffled]
