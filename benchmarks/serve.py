"""The server under load, beside the engine alone and `transformers serve`.

    python benchmarks/serve.py               writes serve.json beside itself; about twenty minutes
    python benchmarks/serve.py --seconds 30  the same, shorter
    python benchmarks/serve.py --quick       seconds, a tiny shape, nothing written

A random GPT of GPT-2's size in bf16 with low-rank value heads, guided (folded into the LM head). So
many clients, each a connection a request, stream texts of 64 tokens to prompts of about 16 tokens,
one after another, from a process of their own on the same machine. Of our server: tokens a second
of all texts, time to the first token (waiting for room in the batch included), answers by status,
memory and descriptors once a second. The engine alone writes the same requests in a process without
HTTP, with as many at a time: five times in turn with a short load of the server, whose
ratios are told beside that of the whole load. CPU time per token of both says what serving costs
where the machine is too busy for its clock to say so.
`transformers serve` gets the exported checkpoint (`qvgpt export`), continuous batching, and as many
clients. Close everything else first.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import GUIDED, SHAPES
from measure import MALLOC, in_process

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import Engine, Request, row_seed
from qvgpt.decode.policy import recommended
from qvgpt.export import export_hf
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

HERE = Path(__file__).parent
CLIENTS, SECONDS, MAX_BATCH, MAX_TOKENS = 200, 300.0, 64, 64
WARM = 0.2  # of the time, in which memory may still grow
PEER_SECONDS = 120.0
PAIRS, PAIR_SECONDS = 5, 30.0
"""Of engine and server, one after the other: a shared machine is another one minutes later."""
GRACE = 60.0
"""Seconds that texts have to be finished in after the load."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, nothing written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of load")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--shape", choices=SHAPES, help="other than GPT-2's; nothing written")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(WORKERS[options.worker.pop("do")](**options.worker)))
        return
    shape = options.shape or ("tiny" if options.quick else "M")
    seconds = min(options.seconds, 5.0) if options.quick else options.seconds
    clients = min(options.clients, 20) if options.quick else options.clients
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), shape, clients, seconds, options.peer and not options.quick)
    print(json.dumps(found, indent=1))
    if not options.quick and options.shape is None:
        (HERE / "serve.json").write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, shape: str, clients: int, seconds: float, peer: bool) -> dict[str, Any]:
    """Server and engine in turn, the long load, then the peer."""
    dtype = "float32" if shape == "tiny" else "bfloat16"
    make_model(folder / "model", shape)
    engine, ratios = [], []
    for _ in range(PAIRS if seconds >= PAIR_SECONDS else 1):
        engine.append(engine_alone(folder / "model", dtype, min(seconds, PAIR_SECONDS / 2)))
        short = served_load(folder / "model", dtype, clients, min(seconds, PAIR_SECONDS))
        ratios.append(short["tokens_per_second"] / engine[-1]["tokens_per_second"])
    served = served_load(folder / "model", dtype, clients, seconds)
    speeds, cpu_each = ([e[key] for e in engine] for key in ("tokens_per_second", "cpu_us"))
    found: dict[str, Any] = {
        "machine": {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "shape": SHAPES[shape], "dtype": dtype, "clients": clients, "seconds": seconds,
        "max_batch": MAX_BATCH, "max_tokens": MAX_TOKENS,
        "tokens_per_second": served["tokens_per_second"],
        "engine_tokens_per_second": speeds,
        "engine_cpu_us_per_token": cpu_each,
        **served,
        "vs_engine": served["tokens_per_second"] / float(np.mean(speeds)),
        "vs_engine_in_pairs": {"median": float(np.median(ratios)), "each": ratios},
    }  # fmt: skip
    if peer:
        other = peer_load(folder, clients, min(seconds, PEER_SECONDS))
        found["transformers_serve"] = other
        if other.get("tokens_per_second"):
            found["vs_transformers_serve"] = (
                served["tokens_per_second"] / other["tokens_per_second"]
            )
    return found


def cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def make_model(folder: Path, shape: str) -> None:
    """Random weights; a tokenizer whose ids fill the whole vocabulary or a part of it."""
    size = SHAPES[shape]["vocab_size"]
    kind = "char" if size < 261 else "bpe"
    tokenizer = Tokenizer.train([text(i) for i in range(400)], kind, min(size, 2000))
    torch.manual_seed(0)
    trunk = GPT(**{**SHAPES[shape], "vocab_size": max(size, tokenizer.vocab_size)})
    model = ValueModel(trunk, HeadsConfig("low_rank", 64), tokenizer)
    with torch.no_grad():
        assert model.heads is not None
        for p in model.heads.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.info.recommended_guidance = {"beta": GUIDED.beta}
    model.save(folder)


def text(i: int) -> str:
    """A prompt of three words and a number."""
    words = ["man", "woman", "dog", "street", "blue", "red", "walks", "reads", "under", "near"]
    return " ".join(words[(i * k + k) % len(words)] for k in (1, 3, 7)) + f" {i}"


# ── the engine alone ─────────────────────────────────────────────────────────────────────────


def engine_alone(folder: Path, dtype: str, seconds: float) -> dict[str, float]:
    """Tokens a second, and what each takes of CPUs."""
    job = {"do": "engine", "folder": str(folder), "dtype": dtype, "seconds": seconds}
    return in_process(__file__, advised=True, **job)


def run_engine(folder: str, dtype: Any, seconds: float) -> dict[str, float]:
    model = ValueModel.from_pretrained(folder, dtype=dtype)
    assert model.tokenizer is not None
    guidance = recommended(model.info, folder)
    assert guidance is not None
    engine, asked, tokens, started = Engine(model, MAX_BATCH), 0, 0, 0.0
    steps, left, cpu_started = 0, 0, 0.0
    while True:
        while left < MAX_BATCH + 8:
            prompt = model.tokenizer.encode_prompt(text(asked))
            engine.submit(Request(prompt, MAX_TOKENS, guidance, row_seed(0, asked)))
            asked, left = asked + 1, left + 1
        events = engine.step()
        left -= sum(event.finished is not None for event in events)
        steps, tokens = steps + 1, tokens + len(events)
        if steps == MAX_TOKENS:  # warm
            started, cpu_started, tokens = time.perf_counter(), time.process_time(), 0
        elif steps > MAX_TOKENS and time.perf_counter() > started + seconds:
            return {
                "tokens_per_second": tokens / (time.perf_counter() - started),
                "cpu_us": 1e6 * (time.process_time() - cpu_started) / tokens,
            }


# ── servers ──────────────────────────────────────────────────────────────────────────────────


def served_load(folder: Path, dtype: str, clients: int, seconds: float) -> dict[str, Any]:
    """Our server under load."""
    command = [
        sys.executable, "-m", "qvgpt", "serve", str(folder), "--port", "0", "--dtype", dtype,
        "--max_batch", str(MAX_BATCH), "--max_waiting", str(max(0, clients - MAX_BATCH)),
    ]  # fmt: skip
    log = folder.parent / "serve.log"
    with log.open("w") as lines:
        process = subprocess.Popen(command, stderr=lines, env={**os.environ, **MALLOC})
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        answers, held = load(process.pid, int(found[1]), clients, seconds, {})
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    warm = held[int(len(held) * WARM) :]
    tenth = max(1, len(warm) // 10)
    when, tokens, cpu_seconds, rss, descriptors = (np.array(c) for c in zip(*warm, strict=True))
    written = float(tokens[-1] - tokens[0])
    return {
        **answers,
        # those in the middle of a text too, as the server counts them
        "tokens_per_second": written / float(when[-1] - when[0]),
        "cpu_us_per_token": 1e6 * float(cpu_seconds[-1] - cpu_seconds[0]) / max(written, 1.0),
        "rss_mb": float(np.median(rss[-tenth:])),
        "rss_growth_mb": growth(rss, tenth),
        "descriptors": int(descriptors.max()),
        "descriptor_growth": growth(descriptors, tenth),
        "exit_code": code,
    }


def growth(found: np.ndarray, some: int) -> float:
    """From the first to the last of some."""
    return float(np.median(found[-some:]) - np.median(found[:some]))


def load(
    pid: int, port: int, clients: int, seconds: float, more: dict[str, Any]
) -> tuple[dict[str, Any], list[tuple[float, ...]]]:
    """What clients found, and what the server held once a second."""
    job = {"do": "load", "port": port, "clients": clients, "seconds": seconds, "more": more}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    asking.stdout.readline()  # it begins
    held, until = [], time.monotonic() + seconds
    while asking.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            held.append(look(pid, port))
        time.sleep(1.0)
    return json.loads(asking.stdout.read().splitlines()[-1]), held


def look(pid: int, port: int) -> tuple[float, ...]:
    """Seconds, tokens written (0: it does not say), CPU seconds, MB, descriptors."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = re.search(r"^qvgpt_tokens_total (\S+)", answer.read().decode(), re.MULTILINE)
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (
        time.monotonic(),
        float(found[1]) if found else 0.0,
        sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def peer_load(folder: Path, clients: int, seconds: float) -> dict[str, Any]:
    """`transformers serve` with the exported checkpoint; why not, where it does not run."""
    exported = folder / "exported"
    export_hf(folder / "model", exported, dtype="bfloat16")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(exported), "--port",
        str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "bfloat16",
        "--continuous-batching", "--cb-num-blocks", "1024", "--cb-block-size", "16",
    ]  # fmt: skip
    env = {**os.environ, **MALLOC, "HF_HUB_OFFLINE": "1"}
    log = folder / "peer.log"
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=env)
    try:
        until = time.monotonic() + 180
        while True:
            if process.poll() is not None or time.monotonic() > until:
                return {"fault": log.read_text()[-400:]}
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        more = {"model": str(exported), "temperature": 1.0}
        return load(process.pid, port, clients, seconds, more)[0]
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


# ── clients ──────────────────────────────────────────────────────────────────────────────────


def run_load(port: int, clients: int, seconds: float, more: dict[str, Any]) -> dict[str, Any]:
    """Statuses, tokens a second and times to first tokens, in ms."""
    statuses: Counter[str] = Counter()
    first: list[float] = []
    counted: list[tuple[float, int]] = []
    begun = time.perf_counter()
    until = begun + seconds

    async def client(i: int) -> None:
        asked = i
        while time.perf_counter() < until:
            status, ttft, tokens = await ask(port, asked, more)
            asked += clients
            statuses[status] += 1
            if ttft is not None:
                first.append(1000 * ttft)
            if tokens:
                counted.append((time.perf_counter(), tokens))
            if status != "200":
                await asyncio.sleep(0.1)

    async def everyone() -> None:
        tasks = [asyncio.create_task(client(i)) for i in range(clients)]
        _, slow = await asyncio.wait(tasks, timeout=seconds + GRACE)
        statuses["late"] += len(slow)
        for task in slow:
            task.cancel()

    print("begun", flush=True)
    asyncio.run(everyone())
    # what was finished after a warm beginning and before the end, where clients become fewer
    warm = begun + WARM * seconds
    tokens = sum(n for at, n in counted if warm <= at < until)
    p50, p90, p99 = np.percentile(first, [50, 90, 99]).tolist() if first else [None] * 3
    return {
        "tokens_per_second": tokens / (until - warm),
        "texts": len(counted),
        "status_counts": {status: n for status, n in statuses.items() if n},
        "p50_ttft_ms": p50,
        "p90_ttft_ms": p90,
        "p99_ttft_ms": p99,
    }


async def ask(port: int, i: int, more: dict[str, Any]) -> tuple[str, float | None, int]:
    """Status, seconds to the first token, tokens of one streamed text."""
    body = {
        "prompt": text(i), "max_tokens": MAX_TOKENS, "stream": True, "seed": i,
        "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    started, ttft, found = time.perf_counter(), None, b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "refused", None, 0
    try:
        writer.write(head.encode() + content)
        while piece := await reader.read(65536):
            found += piece
            if ttft is None and b"data: " in found:
                ttft = time.perf_counter() - started
    except OSError:
        return "reset", None, 0
    finally:
        writer.close()
    status = found[9:12].decode() or "empty"
    if status != "200":
        return status, None, 0
    counts = re.findall(rb'"completion_tokens": ?(\d+)', found)
    if not counts:
        return "cut", ttft, 0
    return status, ttft, int(counts[-1])


WORKERS = {"engine": run_engine, "load": run_load}

if __name__ == "__main__":
    main()
