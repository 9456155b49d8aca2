"""The same steps on a CUDA GPU: tokens a second, share of its peak, memory.

    python benchmarks/gpu.py              writes gpu.json beside itself
    python benchmarks/gpu.py --quick      tiny models, on a CPU too; nothing written

Random weights and tokens at three shapes: GPT-2 (124 M, our GPT), Qwen3-0.6B (full weights) and
an 8 B Qwen3 (LoRA of rank 16 on bfloat16 weights, layers recomputed). Each as plain language
modelling and with ILQL's low-rank and linear twin heads; where all weights learn, with compiled
layers too. At GPT-2's shape beside work of the shape of others' code (baselines.py).
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines import hugging_face_lm, nanogpt_lm, trlx_ilql
from measure import device, in_process, interleaved, matmul_peak

from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import Training
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import LoraConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.trajectory import Trajectory

HERE = Path(__file__).parent
HEADS = {"lm": None, "lowrank": HeadsConfig("low_rank", rank=64), "linear": HeadsConfig("linear")}
QWEN = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 4096}  # fmt: skip
PEERS: dict[str, Callable[..., Callable[[], float]]] = {
    "hugging_face": hugging_face_lm,
    "nanogpt": nanogpt_lm,
    "nanogpt_compiled": partial(nanogpt_lm, compiled=True),
    "trlx_ilql": trlx_ilql,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"batch": 32, "time": 1024, "vocab_size": 50257, "embed_dim": 768, "num_heads": 12},
    "qwen3-0.6b": {
        "batch": 8, "time": 1024,
        "config": QWEN | {"hidden_size": 1024, "intermediate_size": 3072,
                          "num_hidden_layers": 28, "num_attention_heads": 16,
                          "tie_word_embeddings": True},
    },
    "qwen3-8b-lora": {
        "batch": 2, "time": 1024, "lora": True,
        "config": QWEN | {"hidden_size": 4096, "intermediate_size": 12_288,
                          "num_hidden_layers": 36, "num_attention_heads": 32,
                          "tie_word_embeddings": False},
    },
    "tiny": {
        "batch": 2, "time": 16, "lora": True,
        "config": {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8,
                   "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    every = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=every, default=every)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(measure(**options.worker)))
        return
    if not (options.quick or torch.cuda.is_available()):
        raise SystemExit("a CUDA GPU is needed; --quick runs tiny models on a CPU")
    shapes = ["tiny"] if options.quick else options.shapes
    peak = matmul_peak(torch.bfloat16, 256 if options.quick else 8192)
    steps = 2 if options.quick else options.steps
    rows = [
        row for shape in shapes for row in in_process(__file__, shape=shape, steps=steps, peak=peak)
    ]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = {
        "device": name,
        "torch": torch.__version__,
        "matmul_flops_per_s": peak,
        "rows": rows,
    }
    print(json.dumps(results, indent=1))
    if not options.quick:
        (HERE / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


def measure(shape: str, steps: int, peak: float) -> list[dict[str, Any]]:
    """All of one shape, in a process of its own: plain and, where all weights learn, compiled."""
    size, rows = SHAPES[shape], []
    for which in [*HEADS, *(PEERS if shape == "gpt2" else ())]:
        for compiled in (False, True)[: 1 if "lora" in size or which in PEERS else 2]:
            row: dict[str, Any] = {"shape": shape, "which": which, "compiled": compiled}
            try:
                row |= _measured(size, which, steps, peak, compiled)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
    return rows


def _measured(
    size: dict[str, Any], which: str, steps: int, peak: float, compiled: bool
) -> dict[str, Any]:
    tokens = torch.randint(0, _vocab_size(size), (size["batch"], size["time"]))
    if which in PEERS:
        shape = {name: size[name] for name in ("vocab_size", "embed_dim", "num_heads")}
        shape |= {"num_layers": 12, "seq_len": size["time"]}
        step, more = PEERS[which](shape, tokens.to(device()), True), {}
    else:
        step, more = _ours(size, which, tokens, compiled)
    cuda = torch.cuda.is_available()
    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(interleaved({"step": step}, steps)["step"])
    speed = tokens.numel() / seconds[len(seconds) // 2]
    if "flops_per_token" in more:
        more["share_of_peak"] = speed * more["flops_per_token"] / peak
    memory = torch.cuda.max_memory_allocated() if cuda else None
    return {"tokens_per_s": speed, "memory_bytes": memory, **more}


def _ours(
    size: dict[str, Any], which: str, tokens: torch.Tensor, compiled: bool
) -> tuple[Callable[[], Any], dict[str, Any]]:
    model = _model(size, HEADS[which])
    texts = [
        Trajectory(t, [False] + [True] * (len(t) - 1), [0.0] * (len(t) - 1) + [1.0], True)
        for t in tokens.tolist()
    ]
    fit = FitOptions(
        batch_size=len(texts),
        bf16=True,
        gradient_checkpointing="lora" in size,
        max_steps=10**6,
        compiled=compiled,
    )
    said = ["LM"] if model.heads is None else ["LM", "ILQL"]
    training = Training(model, texts, parse_objectives(said), fit)
    batch = [training.collate(texts)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = _flops_per_token(model, size["time"], lora="lora" in size)
    more = {"trained_parameters": trained, "flops_per_token": flops}
    return lambda: training.learn(batch), more


def _vocab_size(size: dict[str, Any]) -> int:
    return size["config"]["vocab_size"] if "config" in size else size["vocab_size"]


def _model(size: dict[str, Any], heads: HeadsConfig | None) -> ValueModel:
    torch.manual_seed(0)
    if "config" not in size:
        return ValueModel(GPT(size["vocab_size"], size["embed_dim"], size["num_heads"]), heads)
    config = transformers.Qwen3Config(**size["config"])
    dtype = torch.bfloat16 if "lora" in size else torch.float32
    with device():
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    trunk = CausalLM(lm.eval())
    if "lora" in size:
        try:
            trunk.add_lora(LoraConfig())
        except QvgptError as error:
            raise SystemExit(str(error)) from None
    return ValueModel(trunk, heads)


def _flops_per_token(model: ValueModel, time: int, lora: bool) -> float:
    """Of the matrix products, forward and backward; frozen weights need no gradient."""
    embeddings = model.trunk.vocab_size * model.trunk.embed_dim
    weights = sum(p.numel() for p in model.trunk.parameters() if p.dim() == 2)
    tied = sum(p.numel() == embeddings for p in model.trunk.parameters()) == 1
    weights -= 0 if tied else embeddings  # looking a token up is no product
    layers = len(list(model.trunk.blocks))
    attention = 2 * layers * time * model.trunk.embed_dim  # causal: half of all pairs
    trunk = (4 if lora else 6) * weights + 3 * attention
    if model.heads is None:
        return trunk
    width = {"low_rank": model.heads.config.rank, "linear": model.trunk.embed_dim}
    return trunk + 2 * 6 * model.trunk.vocab_size * width[model.heads.config.kind]


if __name__ == "__main__":
    main()
