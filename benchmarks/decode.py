"""What guidance costs while decoding, and how fast our engine is beside others' code.

    python benchmarks/decode.py            writes decode.json beside itself; half an hour
                                           (on a CUDA GPU decode_gpu.json)
    python benchmarks/decode.py --llama-cpp PROGRAM     its llama-batched-bench is a peer, at M
    python benchmarks/decode.py --quick    seconds, tiny shapes, nothing written

Random weights, prompts of 16 random tokens, bf16 unless a name says fp32; sampled from the whole
vocabulary. A time is that of the steps after the first one, which reads the prompts. New tokens a
row: 128 at batch 1, 64 at 16, 32 at 64 (`new_tokens`). Candidates take turns within a block, a
ratio is the median over blocks, its interval a bootstrap. Peers: transformers' `generate` with its
dynamic cache, unguided; a loop of trlX's shape; llama.cpp, unguided and without choosing tokens
(baselines.py). Each group is a process of its own, with the malloc settings that docs/scaling.md
advises. Close everything else first.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from baselines import hugging_face_generate, llama_cpp_writes, trlx_generate
from measure import device, in_process, interleaved, ratio, synchronize

from qvgpt.decode.engine import Engine, Request
from qvgpt.decode.policy import Guidance
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, int]] = {
    "S": {"vocab_size": 512, "embed_dim": 256, "num_heads": 4, "num_layers": 4, "seq_len": 256},
    "M": {"vocab_size": 50257, "embed_dim": 768, "num_heads": 12, "num_layers": 12, "seq_len": 256},
    "tiny": {"vocab_size": 97, "embed_dim": 32, "num_heads": 2, "num_layers": 1, "seq_len": 256},
}
NEW_TOKENS = {1: 128, 16: 64, 64: 32}
PROMPT = 16
TOP = 50
GUIDED = Guidance(beta=2.0)
"""Folded into the LM head where the value heads are linear."""
ENGINES: dict[str, tuple[HeadsConfig | None, Guidance]] = {
    "plain": (None, Guidance()),
    "guided": (HeadsConfig("low_rank", 64), GUIDED),
    "guided_linear": (HeadsConfig("linear"), GUIDED),
    "plain_top_k": (None, Guidance(top_k=TOP)),
    "guided_top_k_mlp": (HeadsConfig("mlp"), Guidance(beta=2.0, top_k=TOP)),
    "guided_top_k_min": (HeadsConfig("mlp"), Guidance(beta=2.0, top_k=TOP, twins="min")),
    "guided_top_k_categorical": (
        HeadsConfig("categorical", 16, bins=21, low=0.0, high=1.0),
        Guidance(beta=2.0, top_k=TOP),
    ),
    "kl_budget": (HeadsConfig("mlp"), Guidance(top_k=TOP, kl_budget=0.1)),
}
"""Ours: value heads, and how they guide."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, nothing written")
    parser.add_argument("--blocks", type=int, default=20, help="of ours; of peers half as many")
    parser.add_argument("--llama-cpp", metavar="PROGRAM", help="its llama-batched-bench, a peer")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(WORKERS[options.worker.pop("do")](**options.worker)))
        return
    shapes = ("tiny", "tiny") if options.quick else ("S", "M")
    blocks = 2 if options.quick else options.blocks
    results = measure_all(shapes, blocks, options.llama_cpp)
    print(json.dumps(results, indent=1))
    if not options.quick:
        name = "decode.json" if device().type == "cpu" else "decode_gpu.json"
        (HERE / name).write_text(json.dumps(results, indent=1) + "\n")


def measure_all(
    shapes: tuple[str, str], blocks: int, llama_cpp: str | None = None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    speed: dict[str, dict[int, dict[str, float]]] = {}

    def times(size: str, shape: str, batch: int, names: list[str], n: int) -> dict[str, Any]:
        job = {"shape": shape, "batch": batch, "names": names, "blocks": n}
        seconds = in_process(__file__, do="time", **job, llama_cpp=llama_cpp)
        for name, taken in seconds.items():
            rate = batch * NEW_TOKENS[batch] / sorted(taken)[len(taken) // 2]
            speed.setdefault(size, {}).setdefault(batch, {})[name] = rate
        return seconds

    def keep(key: str, over: list[float], under: list[float]) -> None:
        value = ratio(over, under)
        found[key], intervals[key] = value["median"], value["ci95"]

    for size, shape in zip("SM", shapes, strict=True):
        for batch in NEW_TOKENS:
            peers = ["guided", "hf", "trlx"] + ["guided_fp32", "hf_fp32"] * (size == "S")
            peers += ["llama_cpp"] * (size == "M" and llama_cpp is not None)
            taken = times(size, shape, batch, peers, max(2, blocks // 2))
            if "llama_cpp" in taken:
                keep(f"vs_llama_cpp_M_b{batch}", taken["llama_cpp"], taken["guided"])
            keep(f"vs_hf_{size}_b{batch}", taken["hf"], taken["guided"])
            keep(f"vs_trlx_shape_{size}_b{batch}", taken["trlx"], taken["guided"])
            if size == "S":
                keep(f"vs_hf_S_fp32_b{batch}", taken["hf_fp32"], taken["guided_fp32"])
            ours = times(size, shape, batch, list(ENGINES), blocks)
            suffix = f"_b{batch}"
            for name in ("guided", "guided_linear"):
                key = name.replace("guided", f"guided_over_unguided_{size}")
                keep(key + suffix, ours[name], ours["plain"])
            for name in ("mlp", "min", "categorical"):
                key = f"guided_over_unguided_{size}_top_k_{name}"
                keep(key + suffix, ours[f"guided_top_k_{name}"], ours["plain_top_k"])
            key = f"kl_budget_overhead_{size}{suffix}"
            keep(key, ours["kl_budget"], ours["guided_top_k_mlp"])
            found[key], intervals[key] = found[key] - 1, [x - 1 for x in intervals[key]]
    for key, of in {
        "guided_over_unguided_S": "guided_over_unguided_S",
        "guided_over_unguided_M": "guided_over_unguided_M",
        "kl_budget_overhead": "kl_budget_overhead_M",
    }.items():  # of the batch where it is most
        worst = max((f"{of}_b{batch}" for batch in NEW_TOKENS), key=found.__getitem__)
        found[key], intervals[key] = found[worst], intervals[worst]
    bandwidth = in_process(__file__, do="bandwidth")
    return found | {
        "intervals": intervals,
        "tokens_per_s": speed,
        "memory_read_bytes_per_s": bandwidth,
        "share_of_roofline_b1": {
            size: speed[size][1]["guided"] * weight_bytes(shape) / bandwidth
            for size, shape in zip("SM", shapes, strict=True)
        },
        "new_tokens": NEW_TOKENS,
        "blocks": blocks,
        "machine": {
            "device": torch.cuda.get_device_name()
            if device().type == "cuda"
            else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def time_engines(
    shape: str, batch: int, names: list[str], blocks: int, llama_cpp: str | None = None
) -> dict[str, list[float]]:
    with TemporaryDirectory() as directory:
        runs = {name: make(name, SHAPES[shape], batch) for name in names if name != "llama_cpp"}
        if "llama_cpp" in names:
            assert llama_cpp is not None
            model = Path(directory) / "model.gguf"
            runs["llama_cpp"] = llama_cpp_writes(
                llama_cpp, SHAPES[shape], model, batch, PROMPT, NEW_TOKENS[batch]
            )
        return interleaved(runs, blocks, warmup=1, own_clock=True)


def make(name: str, shape: dict[str, int], batch: int) -> Callable[[], float]:
    """A callable that writes a batch of texts and returns the seconds after the first step."""
    torch.manual_seed(0)
    new = NEW_TOKENS[batch]
    prompts = torch.randint(0, shape["vocab_size"], (batch, PROMPT)).to(device())
    dtype = torch.float32 if name.endswith("_fp32") else torch.bfloat16
    name = name.removesuffix("_fp32")
    if name == "hf":
        return hugging_face_generate(shape, prompts, new, dtype)
    if name == "trlx":
        return trlx_generate(shape, prompts, new, dtype)
    heads, guidance = ENGINES[name]
    with device():
        model = ValueModel(trunk(tuple(shape.items()), dtype), heads)
    if model.heads is not None:
        for parameter in model.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # else they know nothing yet
    texts = prompts.tolist()

    def run() -> float:
        engine = Engine(model, max_batch=batch)
        for i, prompt in enumerate(texts):
            engine.submit(Request(prompt, new + 1, guidance, seed=i))
        engine.step()
        synchronize()
        started = time.perf_counter()
        while engine.busy:
            engine.step()
        synchronize()
        return time.perf_counter() - started

    return run


@cache
def trunk(shape: tuple[tuple[str, int], ...], dtype: torch.dtype) -> GPT:
    """One for all engines."""
    with device():
        return GPT(**dict(shape)).eval().to(dtype)


def weight_bytes(shape: str) -> int:
    """Of what a step must read: all weights but the embeddings of tokens it does not see."""
    size = SHAPES[shape]
    width = size["embed_dim"]
    return 2 * (12 * width**2 * size["num_layers"] + size["vocab_size"] * width)


def bandwidth(seconds: float = 2.0) -> float:
    """Bytes a second that all threads read at best."""
    x = torch.ones(2**27 if device().type == "cpu" else 2**31, device=device())  # 0.5, 8 GB
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        synchronize()
        started = time.perf_counter()
        x.sum()
        synchronize()
        best = max(best, 4 * len(x) / (time.perf_counter() - started))
    return best


WORKERS = {"time": time_engines, "bandwidth": bandwidth}

if __name__ == "__main__":
    main()
