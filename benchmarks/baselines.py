"""Work of the shape of others' code, to stand beside ours: same trunk, batch and dtype.

Written after the formulas and the tensors of nanoGPT's model, Hugging Face's GPT-2 and trlX's ILQL,
not after their text. To train: `step()` is forward, loss, backward, AdamW and, for ILQL, the slow
targets. To decode: `run()` writes a batch of texts and returns the seconds after the first step.
"""

import copy
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import synchronize
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.export.llama_cpp import write_model
from qvgpt.models.gpt import GPT
from qvgpt.models.value_model import ValueModel


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    learns = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learns, lr=1e-4, betas=(0.9, 0.95), fused=True)


def _hugging_face(shape: dict[str, int], heads: bool, use_cache: bool = False) -> Any:
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_embd=shape["embed_dim"],
        n_head=shape["num_heads"],
        n_layer=shape["num_layers"],
        n_positions=shape["seq_len"],
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        use_cache=use_cache,
    )
    model = GPT2LMHeadModel(config)
    return (model, nn.ModuleDict(_ilql_heads(shape))) if heads else model


def hugging_face_lm(shape: dict[str, int], tokens: Tensor, bf16: bool) -> Callable[[], float]:
    """Transformers' GPT-2 with its own loss."""
    model = _hugging_face(shape, heads=False).to(tokens.device)
    optimizer = _optimizer(model)

    def step() -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            y.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for y in self.attn(self.ln_1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(batch, time, width))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class _NanoShape(nn.Module):
    def __init__(self, shape: dict[str, int]):
        super().__init__()
        width = shape["embed_dim"]
        self.wte = nn.Embedding(shape["vocab_size"], width)
        self.wpe = nn.Embedding(shape["seq_len"], width)
        layers = range(shape["num_layers"])
        self.blocks = nn.ModuleList([_Block(width, shape["num_heads"]) for _ in layers])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape["vocab_size"], bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def nanogpt_lm(
    shape: dict[str, int], tokens: Tensor, bf16: bool, compiled: bool = False
) -> Callable[[], float]:
    """The step of nanoGPT's training script."""
    model: Any = _NanoShape(shape).to(tokens.device)
    optimizer = _optimizer(model)
    if compiled:
        model = torch.compile(model)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _ilql_heads(shape: dict[str, int]) -> dict[str, nn.Module]:
    width, vocab = shape["embed_dim"], shape["vocab_size"]

    def head(out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, out))

    q = nn.ModuleList([head(vocab), head(vocab)])
    return {"q": q, "target": copy.deepcopy(q).requires_grad_(False), "v": head(1)}


def trlx_ilql(shape: dict[str, int], tokens: Tensor, bf16: bool) -> Callable[[], float]:
    """ILQL as trlX computes it: two MLP heads and their slow copies over the whole vocabulary."""
    trunk, heads = _hugging_face(shape, heads=True)
    trunk, heads = trunk.to(tokens.device), heads.to(tokens.device)
    optimizer = _optimizer(nn.ModuleList([trunk, heads]))
    actions, reward = tokens[:, 1:, None], torch.zeros(tokens.size(0), tokens.size(1) - 1)
    reward[:, -1] = 1.0
    reward = reward.to(tokens.device)
    alive = torch.ones_like(reward)
    alive[:, -1] = 0.0
    gamma, tau, cql, awac, rate = 0.99, 0.7, 0.1, 1.0, 0.005

    def loss() -> Tensor:
        out = trunk(input_ids=tokens, output_hidden_states=True)
        hidden = out.hidden_states[-1]
        q_all = [head(hidden[:, :-1]) for head in heads["q"]]
        with torch.no_grad():
            slow = [head(hidden[:, :-1]).gather(-1, actions)[..., 0] for head in heads["target"]]
        v = heads["v"](hidden)[..., 0]
        q = [x.gather(-1, actions)[..., 0] for x in q_all]
        target = reward + gamma * alive * v[:, 1:].detach()
        lowest = torch.minimum(*slow)
        loss_q = sum((x - target).square().mean() for x in q)
        u = lowest - v[:, :-1]
        loss_v = ((tau - (u < 0).float()).abs() * u.square()).mean()
        flat = actions[..., 0].flatten()
        loss_cql = sum(F.cross_entropy(x.flatten(0, 1), flat) for x in q_all)
        logits = out.logits[:, :-1].flatten(0, 1)
        nll = F.cross_entropy(logits, flat, reduction="none").view_as(u)
        with torch.no_grad():
            weight = torch.exp(0.0 * u)
        return loss_q + loss_v + cql * loss_cql + awac * (nll * weight).mean()

    def step() -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            total = loss()
        total.backward()
        nn.utils.clip_grad_norm_([*trunk.parameters(), *heads.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            pairs = zip(heads["target"].parameters(), heads["q"].parameters(), strict=True)
            for slow, fast in pairs:
                slow.copy_(rate * fast + (1 - rate) * slow)
        return total.item()

    return step


def hugging_face_generate(
    shape: dict[str, int], prompts: Tensor, new: int, dtype: torch.dtype
) -> Callable[[], float]:
    """Transformers' `generate` with its dynamic cache, sampling from the whole vocabulary."""
    with prompts.device:
        model = _hugging_face(shape, heads=False, use_cache=True).to(dtype).eval()
    mask = torch.ones_like(prompts)

    def run() -> float:
        stamps: list[float] = []

        def clock(tokens: Tensor, scores: Any, **options: Any) -> Tensor:
            synchronize()
            stamps.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        model.generate(
            prompts,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            min_new_tokens=None,
            max_new_tokens=new + 1,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        return stamps[-1] - stamps[0]

    return run


def llama_cpp_writes(
    program: str, shape: dict[str, int], model: Path, batch: int, prompt: int, new: int
) -> Callable[[], float]:
    """llama.cpp's own measure of its decoding, `llama-batched-bench`, of such a GPT-2 in bf16.

    It says the seconds of the steps after the prompt, in which no token is chosen.
    """
    directory = model.parent / "gpt2"
    ValueModel(GPT(**shape), None, Tokenizer.train("abc", "char")).save(directory)
    write_model(directory, model, "bfloat16")
    threads = str(torch.get_num_threads())
    context = batch * (prompt + new)
    command = [program, "-m", str(model), "-t", threads, "-tb", threads, "-c", str(context)]
    command += ["-npp", str(prompt), "-ntg", str(new), "-npl", str(batch)]

    def run() -> float:
        for _ in range(3):  # it has been seen to end well and say nothing
            done = subprocess.run(
                [*command, "--output-format", "jsonl"], capture_output=True, text=True, check=True
            )
            if found := re.search(r'"t_tg": ([\d.]+)', done.stdout):
                return float(found[1])
        raise RuntimeError(f"{program} said no t_tg: {done.stdout!r} {done.stderr[-500:]!r}")

    return run


def trlx_generate(
    shape: dict[str, int], prompts: Tensor, new: int, dtype: torch.dtype, beta: float = 2.0
) -> Callable[[], float]:
    """trlX's ILQL sampler: the lesser of two slow MLP heads of the whole vocabulary, top 20."""
    with prompts.device:
        trunk, heads = _hugging_face(shape, heads=True, use_cache=True)
    trunk, heads = trunk.to(dtype).eval(), heads.to(dtype).eval()

    @torch.no_grad()
    def run() -> float:
        cache, tokens, started = DynamicCache(), prompts, 0.0
        for step in range(new + 1):
            out = trunk(
                input_ids=tokens, past_key_values=cache, use_cache=True, output_hidden_states=True
            )
            hidden = out.hidden_states[-1][:, -1]
            q = torch.minimum(*(head(hidden) for head in heads["target"]))
            advantage = q - heads["v"](hidden)
            scores = F.log_softmax(out.logits[:, -1], -1) + beta * advantage
            least = scores.topk(20, dim=-1).values[:, -1:]
            probability = scores.masked_fill(scores < least, float("-inf")).float().softmax(-1)
            tokens = torch.multinomial(probability, 1)
            if step == 0:
                synchronize()
                started = time.perf_counter()
        synchronize()
        return time.perf_counter() - started

    return run
