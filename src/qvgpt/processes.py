"""Several processes of one training, by Accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs

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
