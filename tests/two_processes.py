"""One of two processes that train together on a CPU, for test_processes.py.

`torchrun --nproc_per_node 2 two_processes.py FOLDER` or, without torchrun, alone.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from crash_runs import config
from rich.console import Console
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qvgpt import GPT, HeadsConfig, Trajectory, ValueModel, loop
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.lora import LoraConfig
from qvgpt.models.sharded import whole
from qvgpt.objectives import parse_objectives
from qvgpt.run import RunProgress
from qvgpt.trainer import train

QUIET = Console(quiet=True)
PLAIN = loop.accelerator


def sharded(model, objectives):
    """Accelerate's FSDP2. It takes it to be for GPUs only, so that it has to be told on a CPU."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    found = Accelerator(cpu=True, fsdp_plugin=plugin)
    found.state.distributed_type = DistributedType.FSDP
    found.state.fsdp_plugin = plugin
    return found


def use(way):
    AcceleratorState._reset_state()
    loop.accelerator = sharded if way == "fsdp2" else PLAIN


def texts(prompts=40):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(23):  # a last batch of three, one of them for nobody
        length = int(torch.randint(4, 30, (1,), generator=generator))
        tokens = torch.randint(0, 40, (length,), generator=generator).tolist()
        tokens[:2] = [t % prompts for t in tokens[:2]]
        reward = [0.0] * (length - 1) + [float(i % 3)]
        found.append(Trajectory(tokens, [False] * 2 + [True] * (length - 2), reward, True))
    return found


def gpt(tied=True, **heads):
    trunk = GPT(40, 16, 2, 2, seq_len=32, tied=tied)
    return ValueModel(trunk, HeadsConfig(**{"kind": "low_rank", "rank": 4, **heads}))


def adapted():
    """A Qwen3 in bfloat16 with adapters that are no longer at their start."""
    sys.path.append(str(Path(__file__).parent / "models"))
    from tiny_hf import make_hf

    trunk = CausalLM(make_hf("qwen3", vocab_size=40).bfloat16())
    trunk.add_lora(LoraConfig(rank=2))
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return ValueModel(trunk, HeadsConfig("low_rank", rank=4))


def learned(make, steps, said=("LM", "ILQL"), dtype=torch.float64, prompts=40, **rows):
    """The weights after some steps, the first step's gradients, the last losses and figures."""
    torch.manual_seed(3)
    model = make() if dtype is None else make().to(dtype)
    gradients = {}

    def keep(optimizer, *_):
        if not gradients:
            for name, p in model.named_parameters():
                if p.grad is not None:
                    gradients[f"gradient.{name}"] = whole(p.grad).clone()

    hook = register_optimizer_step_pre_hook(keep)
    options = FitOptions(
        batch_size=5, micro_batch_size=2, max_steps=steps, epochs=9, dropout=0.0, **rows
    )
    objectives, data = parse_objectives(list(said)), texts(prompts)
    found = fit(model, data, objectives, options, eval_data=data[:5], console=QUIET)
    hook.remove()
    weights = {f"weight.{k}": whole(v).clone() for k, v in model.state_dict().items()}
    losses = {f"loss.{k}": torch.tensor(v) for k, v in found["eval"].items()}
    figures = {f"value.{k}": torch.tensor(v) for k, v in found["values"].items()}
    return weights | gradients | losses | figures


def resumed(folder, way):
    """A run that a signal to one process stops on the way, and that another way ends."""
    settings = config(folder, folder / way)
    settings = replace(settings, fit=replace(settings.fit, dropout=0.0))
    step, processes = RunProgress.step, int(os.environ.get("WORLD_SIZE", 1))

    def stop(self, at, *args):
        step(self, at, *args)
        if at == 3 and int(os.environ.get("RANK", 0)) == processes - 1:
            signal.raise_signal(signal.SIGTERM)

    use(way)
    RunProgress.step = stop
    with pytest.raises(KeyboardInterrupt, match="step 3 is in"):  # Terminated is of its kind
        train(settings, QUIET)
    RunProgress.step = step
    use("plain")
    train(settings, QUIET)


def endless(folder):
    """A training that only a signal ends; which process is which is left in files."""
    (folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    settings = config(folder, folder / "endless", steps=10**6)
    train(replace(settings, fit=replace(settings.fit, save_every=1000)), QUIET)


def main(folder):
    cases = {
        "float64": {"make": gpt, "steps": 20},
        "fp32": {"make": gpt, "dtype": torch.float32, "steps": 1},
        "packed": {"make": partial(gpt, tied=False), "steps": 6, "packed": True},
        "shared": {"make": gpt, "steps": 6, "prompts": 2, "share_prompts": True},
        "reference": {"make": gpt, "steps": 6, "said": ["PathConsistency"]},
        "bilinear": {"make": partial(gpt, kind="bilinear"), "steps": 6},
        "categorical": {
            "make": partial(gpt, kind="categorical", bins=5, low=0.0, high=2.0),
            "steps": 6,
            "said": ["LM", "ReturnDistribution"],
        },
        "lora": {"make": adapted, "dtype": None, "steps": 1},
        "lora-reference": {
            "make": adapted,
            "dtype": None,
            "steps": 1,
            "said": ["PathConsistency"],
        },
    }
    ways = ["plain", "fsdp2"] if "RANK" in os.environ else ["plain"]
    for way in ways:
        for name, case in cases.items():
            use(way)
            found = learned(**case)
            if int(os.environ.get("RANK", 0)) == 0:
                save_file(found, folder / f"{way}-{name}.safetensors")
        resumed(folder, way)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({"done": ways}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    (endless if "endless" in sys.argv else main)(Path(sys.argv[1]))
