"""llama.cpp itself on exported files: `make llama-cpp`; its server where `llama-server` is found.

Its GELU is a table of float16, so that logits of a GPT-2 differ from ours by a few thousandths;
those of a Llama do not.
"""

import contextlib
import ctypes
import json
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_hf import PROMPTS, TOKENIZER

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance
from qvgpt.export import ExportOptions, export_model
from qvgpt.models.heads_config import HeadsConfig

pytestmark = [pytest.mark.llama_cpp, pytest.mark.timeout(600)]
LETTERS = "abc XYZ019 .,!?'\n\té€😀中文ß-"
NEAR = {"gpt2": 2e-2, "llama": 1e-4, "qwen3": 1e-4}  # two candidates closer than that are a tie


def load(file, **options):
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = {"type_k": 0, "type_v": 0, "flash_attn": False, "n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, **exact, **options)


def logprobs(llm, tokens):
    llm.reset()
    llm.eval(tokens)
    return torch.tensor(np.array(llm.scores[: len(tokens)])).log_softmax(-1)


def export(tmp_path, **options):
    told = ExportOptions(**({"to": "gguf", "beta": 2.0} | options))
    return export_model(tmp_path / "model", tmp_path / "out", told, prompts=PROMPTS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_greedy_texts_are_ours(tmp_path, save_model, exact, family):
    model, guidance = save_model(family=family), Guidance(2.0)
    export(tmp_path)
    llm, draw = load(tmp_path / "out" / "model.gguf"), random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [
        TOKENIZER.encode_prompt("".join(draw.choices(letters, k=draw.randint(1, 9))))
        for _ in range(200)
    ]
    texts = generate(model, prompts, Guidance(2.0, temperature=0.0), max_tokens=20)
    ties = 0
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [*prompt, *text.tokens]
        found = logprobs(llm, tokens[:-1])[len(prompt) - 1 :]
        true = exact(model, torch.tensor([tokens[:-1]]), guidance)[0, len(prompt) - 1 :]
        assert float((found - true).abs().max()) < max(10 * NEAR[family], 2e-3)
        for here, theirs, token in zip(true, found, text.tokens, strict=True):
            if int(theirs.argmax()) != token:
                assert float(here[token] - here[theirs.argmax()]) < NEAR[family]
                ties += 1
                break
    assert ties < 10


def test_the_scale_of_an_adapter_is_chosen_while_it_runs(tmp_path, save_model, exact):
    import llama_cpp as lib

    model = save_model(HeadsConfig("low_rank", rank=3, num_q=2), "llama")
    export(tmp_path, to="gguf_lora")
    llm = load(tmp_path / "out" / "model.gguf", lora_path=str(tmp_path / "out" / "adapter.gguf"))
    tokens = PROMPTS[0] + TOKENIZER.encode("hello there")
    for beta in (2.0, 0.0, 5.0):
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)
        scales = (ctypes.c_float * 1)(beta / 2.0)
        assert lib.llama_set_adapters_lora(llm.ctx, adapters, 1, scales) == 0
        true = exact(model, torch.tensor([tokens]), Guidance(beta))[0]
        torch.testing.assert_close(logprobs(llm, tokens), true, atol=2e-3, rtol=0)


@contextlib.contextmanager
def llama_server(*files, slots):
    """llama.cpp's server, ready; its address."""
    if (program := shutil.which("llama-server")) is None:
        pytest.skip("no llama-server on the path")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    exact = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    how = ["--port", port, "--threads", "1", "--parallel", str(slots), "--ctx-size", "512"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, *map(str, files), *how, *exact], **quiet)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            assert process.poll() is None, "llama-server ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_each_request_to_its_server_says_the_scale(tmp_path, save_model, exact):
    model = save_model(HeadsConfig("low_rank", rank=3, num_q=2), "llama")
    export(tmp_path, to="gguf_lora")
    out, tokens = tmp_path / "out", PROMPTS[0] + TOKENIZER.encode("hello there")

    def ask(url, beta):
        body = {"prompt": tokens, "n_predict": 1, "n_probs": 20, "cache_prompt": False,
                "lora": [{"id": 0, "scale": beta / 2.0}]}  # fmt: skip
        request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as reply:
            (found,) = json.load(reply)["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in found["top_logprobs"]}

    betas = [2.0, 0.0, 5.0] * 4
    files = ("--model", out / "model.gguf", "--lora", out / "adapter.gguf")
    with llama_server(*files, slots=4) as url, ThreadPoolExecutor(6) as clients:
        found = list(clients.map(lambda beta: ask(url, beta), betas))
    for beta, told in zip(betas, found, strict=True):
        true = exact(model, torch.tensor([tokens]), Guidance(beta))[0, -1]
        assert len(told) == 20
        ids = list(told)
        torch.testing.assert_close(torch.tensor([*told.values()]), true[ids], atol=2e-3, rtol=0)


def test_v_is_read_from_two_log_probs(tmp_path, save_model):
    model = save_model(family="llama")
    rows = export(tmp_path, value_rows=True)["value_rows"]
    llm = load(tmp_path / "out" / "model.gguf")
    tokens = PROMPTS[0] + TOKENIZER.encode("hello there")
    found = logprobs(llm, tokens)
    told = (found[:, rows["ids"][1]] - found[:, rows["ids"][0]]) / rows["c"] + rows["bias"]
    with torch.no_grad():
        v = model.heads.state_value(model.trunk.hidden(torch.tensor([tokens]))[0])
    torch.testing.assert_close(told, v, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_text_is_read_as_we_read_it(tmp_path, save_model, kind):
    size = {"char": 100, "bpe": 320}[kind]
    tokenizer = Tokenizer.train([LETTERS, "the cat sat on the mat. " * 20], kind, size)
    save_model(tokenizer=tokenizer)
    prompts = [tokenizer.encode_prompt("a")]
    options = ExportOptions(to="gguf", beta=2.0)
    export_model(tmp_path / "model", tmp_path / "out", options, prompts=prompts)
    llm, draw = load(tmp_path / "out" / "model.gguf"), random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(LETTERS, k=draw.randint(1, 30)))
        ids = llm.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text)
        assert llm.detokenize(ids).decode() == text
    framed = llm.tokenize(b"a cat<sep>", add_bos=True, special=True)
    assert framed == tokenizer.encode_prompt("a cat")
