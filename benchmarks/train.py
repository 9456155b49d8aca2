"""What learning Q and V costs beside plain language modelling, and beside others' code.

    python benchmarks/train.py            writes train.json beside itself; half an hour on two cores
    python benchmarks/train.py --quick    seconds, tiny shapes, nothing written

Random weights and tokens, every token an action; a step is forward, losses, backward, clipping,
AdamW and slow targets: what `qvgpt train` does, by its own loop, all with the settings of malloc
that docs/scaling.md advises (`…_default_malloc`: without). Candidates take turns within a block; a
ratio is the median over blocks, its interval a bootstrap. Peers are of their code's shape
(baselines.py). Close everything else first, or give it a core of its own and OMP_NUM_THREADS=1.
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from baselines import hugging_face_lm, nanogpt_lm, trlx_ilql
from measure import extra_peak, in_process, interleaved, matmul_peak, ratio

from qvgpt.fit_options import FitOptions
from qvgpt.loop import Training
from qvgpt.losses import expectile_loss
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.trajectory import Trajectory

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, int]] = {
    "S": {"vocab_size": 512, "embed_dim": 256, "num_heads": 4, "num_layers": 4, "seq_len": 256},
    "M": {"vocab_size": 50257, "embed_dim": 768, "num_heads": 12, "num_layers": 12, "seq_len": 256},
    "V32k": {
        "vocab_size": 32000,
        "embed_dim": 512,
        "num_heads": 8,
        "num_layers": 6,
        "seq_len": 256,
    },
    "tiny": {"vocab_size": 300, "embed_dim": 32, "num_heads": 2, "num_layers": 1, "seq_len": 32},
}
BATCH = {"S": 16, "M": 4, "V32k": 8, "tiny": 2}
HEADS = {
    "lowrank": HeadsConfig("low_rank", rank=64),
    "linear": HeadsConfig("linear"),
    "mlp": HeadsConfig("mlp"),
    "default": HeadsConfig(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(WORKERS[options.worker.pop("do")](**options.worker)))
        return
    results = measure_all(("tiny", "tiny", "tiny") if options.quick else ("S", "M", "V32k"),
                          2 if options.quick else options.blocks)  # fmt: skip
    print(json.dumps(results, indent=1))
    if not options.quick:
        (HERE / "train.json").write_text(json.dumps(results, indent=1) + "\n")


def measure_all(shapes: tuple[str, str, str], blocks: int) -> dict[str, Any]:
    small, medium, wide = shapes
    found: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    speed: dict[str, dict[str, float]] = {}

    def times(shape: str, *names: str, advised: bool = True) -> dict[str, list[float]]:
        seconds = in_process(__file__, advised, do="time", shape=shape, names=names, blocks=blocks)
        if not advised:
            return seconds
        tokens = BATCH[shape] * SHAPES[shape]["seq_len"]
        for name, taken in seconds.items():
            speed.setdefault(shape, {})[name] = tokens / sorted(taken)[len(taken) // 2]
        return seconds

    def keep(key: str, over: list[float], under: list[float]) -> None:
        value = ratio(over, under)
        found[key], intervals[key] = value["median"], value["ci95"]

    for advised in (True, False):
        heads = times(medium, "lm", "lowrank", "linear", "mlp", advised=advised)
        for name in ("lowrank", "linear", "mlp"):
            key = f"ilql_over_lm_M_{name}" + ("" if advised else "_default_malloc")
            keep(key, heads[name], heads["lm"])
    default = times(small, "lm", "default", "lm-compiled")
    keep("ilql_over_lm_S_default", default["default"], default["lm"])
    keep("lm_vs_compiled_S", default["lm-compiled"], default["lm"])
    for size, shape in (("S", small), ("M", medium)):
        peers = times(shape, "lm", "hf", "nanogpt")
        keep(f"lm_vs_hf_{size}", peers["hf"], peers["lm"])
        keep(f"lm_vs_nanogpt_shape_{size}", peers["nanogpt"], peers["lm"])
    trlx = times(medium, "lowrank", "mlp", "trlx")
    keep("vs_trlx_shape_M", trlx["trlx"], trlx["lowrank"])
    keep("vs_trlx_shape_M_mlp", trlx["trlx"], trlx["mlp"])
    wider = times(wide, "lm", "lowrank", "linear")
    for name in ("lowrank", "linear"):
        keep(f"ilql_over_lm_32k_{name}", wider[name], wider["lm"])
    packing = in_process(__file__, do="packing", shape=small, blocks=blocks)
    keep("packing_speedup", packing["padded"], packing["packed"])
    for name, prompt in (("long", 160), ("short", 24)):
        sharing = in_process(__file__, do="sharing", shape=small, prompt=prompt, blocks=blocks)
        keep(f"sharing_speedup_{name}_prompts", sharing["alone"], sharing["shared"])

    peaks: dict[str, dict[str, int]] = {}
    for advised, suffix in ((True, ""), (False, "_default_malloc")):
        names = ("lm", "lowrank", "linear", "mlp", "hf", "nanogpt", "trlx")
        found_here = {
            name: in_process(__file__, advised, do="memory", shape=medium, name=name)
            for name in names
        }
        for name in ("lowrank", "linear", "mlp"):
            found[f"memory_over_lm_M_{name}{suffix}"] = found_here[name] / found_here["lm"]
            found[f"memory_over_trlx_shape_M_{name}{suffix}"] = (
                found_here[name] / found_here["trlx"]
            )
        peaks["advised malloc" if advised else "default malloc"] = found_here
    peak = {str(d).removeprefix("torch."): matmul_peak(d) for d in (torch.float32, torch.bfloat16)}
    return found | {
        "intervals": intervals,
        "vocab128k_memory_fraction": in_process(__file__, do="vocab128k", quick=small == "tiny"),
        "tokens_per_s": speed,
        "extra_peak_bytes_M": peaks,
        "packing_fill": packing["fill"],
        "share_of_peak": _share_of_peak(speed, peak["bfloat16"]),
        "matmul_flops_per_s": peak,
        "blocks": blocks,
        "machine": _machine(),
    }


def make(name: str, shape: str) -> Any:
    """A callable that takes one training step of the named candidate."""
    torch.manual_seed(0)
    size = SHAPES[shape]
    tokens = torch.randint(0, size["vocab_size"], (BATCH[shape], size["seq_len"]), device=device())
    if name == "hf":
        return hugging_face_lm(size, tokens, bf16=True)
    if name.startswith("nanogpt"):
        return nanogpt_lm(size, tokens, bf16=True, compiled=name.endswith("compiled"))
    if name == "trlx":
        return trlx_ilql(size, tokens, bf16=True)
    texts = [
        Trajectory(
            row, [False] + [True] * (len(row) - 1), [0.0] * (len(row) - 1) + [1.0], terminated=True
        )
        for row in tokens.tolist()
    ]
    return stepper(name, size, texts)


def stepper(name: str, size: dict[str, int], texts: list[Trajectory], **options: Any) -> Any:
    """Our own step: `lm`, or ILQL and the language model with the named heads."""
    heads = HEADS.get(name)
    model = ValueModel(GPT(**size), heads)
    said = ["LM"] if heads is None else ["LM", "ILQL"]
    fit = FitOptions(batch_size=len(texts), bf16=True, max_steps=10**6, epochs=10**6)
    fit = replace(fit, compiled=name.endswith("compiled"), **options)
    training = Training(model, texts, parse_objectives(said), fit)
    batch = [training.collate(texts)]
    return lambda: training.learn(batch)


def time_steps(shape: str, names: list[str], blocks: int) -> dict[str, list[float]]:
    return interleaved({name: make(name, shape) for name in names}, blocks)


def memory_of_step(shape: str, name: str) -> int:
    step = make(name, shape)
    step()
    step()
    return extra_peak(step)


def packing(shape: str, blocks: int) -> dict[str, Any]:
    """Texts that fill 56 % of their padded batch: a row each, and packed."""
    size = SHAPES[shape]
    longest = size["seq_len"]
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(2 * BATCH[shape], generator=generator)
    lengths = [
        longest,
        *(2 + (spread[1:] * (1.17 * longest - 6)).long().clamp(max=longest - 2)).tolist(),
    ]
    texts = []
    for n in lengths:
        tokens = torch.randint(0, size["vocab_size"], (n,), generator=generator).tolist()
        texts.append(Trajectory(tokens, [False] + [True] * (n - 1), [0.0] * (n - 1) + [1.0], True))
    padded = stepper("default", size, texts)
    packed = stepper("default", size, texts, packed=True)
    seconds = interleaved({"padded": padded, "packed": packed}, blocks)
    return {**seconds, "fill": sum(lengths) / (longest * len(lengths))}


def sharing(shape: str, prompt: int, blocks: int) -> dict[str, list[float]]:
    """Eight texts of 24 tokens to each of four prompts: a row each, and a row a prompt."""
    size = SHAPES[shape]
    length = min(24, size["seq_len"] // 2)
    prompt = min(prompt, size["seq_len"] - length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, size["vocab_size"], (4, prompt + 8 * length), generator=generator)
    action, reward = [False] * prompt + [True] * length, [0.0] * (prompt + length - 1) + [1.0]
    texts = [
        Trajectory(row[:prompt].tolist() + text.tolist(), action, reward, True)
        for row in tokens
        for text in row[prompt:].split(length)
    ]
    steps = {
        name: stepper("default", size, texts, share_prompts=name == "shared")
        for name in ("alone", "shared")
    }
    return interleaved(steps, blocks)


def vocab128k(quick: bool = False) -> float:
    """Extra peak of ILQL's value terms, 4096 actions, as a share of five fp32 [tokens, vocab]."""
    rows, size, width = (64, 4000, 32) if quick else (4096, 128_000, 768)
    torch.manual_seed(0)
    heads = ValueHeads(width, size, HEADS["lowrank"]).to(device())
    hidden = torch.randn(rows, width, device=device()).requires_grad_()
    token = torch.randint(0, size, (rows,), device=device())
    fast: Any = heads.q
    slow: Any = heads.target_q

    def step() -> None:
        total = expectile_loss(
            heads.v(hidden)[None], torch.stack([h.of(hidden, token).detach() for h in slow]), 0.7
        ).mean()
        for head in fast:
            with torch.autocast(device(), torch.bfloat16):
                q, lse = head.of_and_logsumexp(hidden, token)
            total = total + (q.square() + 0.01 * (lse - q)).mean()
        total.backward()
        heads.zero_grad(set_to_none=True)
        hidden.grad = None

    step()
    return extra_peak(step) / (5 * 4 * rows * size)


def _share_of_peak(speed: dict[str, dict[str, float]], peak: float) -> dict[str, dict[str, float]]:
    """Floating-point operations of the matrix products a token ÷ what the machine's best gives."""
    shares: dict[str, dict[str, float]] = {}
    for shape, found in speed.items():
        size = SHAPES[shape]
        width, time = size["embed_dim"], size["seq_len"]
        trunk = size["num_layers"] * (24 * width**2 + 2 * time * width)  # causal attention: half
        head = 2 * width * size["vocab_size"]
        heads = {"lowrank": 4 * 64 * (width + size["vocab_size"]), "linear": 2 * head}
        heads |= {"mlp": 4 * head + 8 * width**2, "default": 2 * head}
        shares[shape] = {
            name: 3 * (trunk + head + heads.get(name, 0)) * speed / peak
            for name, speed in found.items()
            if name != "trlx"
        }
    return shares


def _machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"device": name or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}  # fmt: skip


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


WORKERS = {
    "time": time_steps,
    "memory": memory_of_step,
    "packing": packing,
    "sharing": sharing,
    "vocab128k": vocab128k,
}

if __name__ == "__main__":
    main()
