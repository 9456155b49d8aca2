"""Several processes of one training, by Accelerate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from jaxtyping import Float
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import Objectives


def accelerator(model: ValueModel, objectives: Objectives) -> Accelerator:
    """Accelerate's, told whether every parameter that may learn will."""
    needs = objectives.needs
    heads_learn = model.heads is None or {"q", "v"} <= needs
    trunk_learns = model.trunk_is_frozen or needs & {"logprob", "token_logprob"}
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not (heads_learn and trunk_learns))
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[ddp])


def processes() -> PartialState:
    """Which process this is, of how many; joins the others where a launcher started several.

    Accelerate has to be told of a machine without a GPU, or each of several would think itself
    alone there.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def sums(accelerator: Accelerator, numbers: Sequence[float | int]) -> list[float]:
    """Each number summed over all processes; as they are where there is one."""
    if accelerator.num_processes == 1:
        return [float(n) for n in numbers]
    mine = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    total: Any = accelerator.reduce(mine, "sum")
    return total.tolist()


def gathered_rows(
    accelerator: Accelerator, rows: Float[Tensor, "mine columns"]
) -> Float[Tensor, "all columns"]:
    """The rows of all processes, of which each may have another number."""
    if accelerator.num_processes == 1:
        return rows
    counts: Any = accelerator.gather(torch.tensor([len(rows)], device=rows.device))
    most = int(counts.max())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.size(1))])
    everything: Any = accelerator.gather(padded)
    parts = zip(everything.split(most), counts.tolist(), strict=True)
    return torch.cat([part[:count] for part, count in parts])


@contextmanager
def others_there(accelerator: Accelerator) -> Iterator[None]:
    """Say plainly that another process of a training has died, for this one cannot go on either."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "Connection" in str(error)
        if accelerator.num_processes == 1 or not lost:
            raise
        reason = str(error).strip().splitlines()[0]
        raise QvgptError(
            f"process {accelerator.process_index} of {accelerator.num_processes} has lost another "
            f"one, whose own message says why; then go on with --resume true ({reason})"
        ) from None
