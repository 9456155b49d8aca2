"""Servers with a real socket in a thread, over tiny models."""

import contextlib
import json
import socket
import threading
import time

import httpx
import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import TokenScorer
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.serve.server import make_server
from qvgpt.serve.service import Service

TOKENIZER = Tokenizer.train(["今天天气很好,明天也好。hello 世界 😀"] * 3, "bpe", 280)
GUIDANCE = Guidance(beta=1.5, min_p=0.01)


def make_model(seq_len=96, heads=True, tokenizer=TOKENIZER, noise=0.3):
    torch.manual_seed(0)
    trunk = GPT(tokenizer.vocab_size, 16, 2, 2, seq_len=seq_len)
    model = ValueModel(trunk, HeadsConfig() if heads else None, tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


BYTES = Tokenizer.train(["a"], "bpe", 261)
"""Every byte a token of its own."""


def scripted(text, before=None, **options):
    """A service whose values have it write the text to any prompt of one letter.

    `before` sees each text that is about to get a token.
    """
    script = [*BYTES.encode(text), BYTES.template.eos]

    def says(texts, tokens):
        if before is not None:
            for read in texts:
                before(read)
        wanted = [script[min(len(read) - 3, len(script) - 1)] for read in texts]
        return (tokens == torch.tensor(wanted)[:, None]).float()

    values = TokenScorer(says, most_candidates=300)
    model = make_model(tokenizer=BYTES, noise=0.0)
    return Service(model, "tiny", values=values, guidance=Guidance(1000.0), **options)


class Running:
    """A server at work, and how to ask it."""

    def __init__(self, service, server, port):
        self.service, self.server, self.port = service, server, port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def post(self, path="/v1/completions", headers=None, **body):
        return self.http.post(path, json=body, headers=headers)

    def stream(self, path="/v1/completions", **body):
        """All chunks of a stream but [DONE], which must come last."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            events = [line[6:] for line in answer.iter_lines() if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def metric(self, name):
        text = self.http.get("/metrics").text
        return sum(
            float(li.split()[-1]) for li in text.splitlines() if li.split("{")[0].split()[0] == name
        )


@contextlib.contextmanager
def serving(service, buffer=None, **options):
    """The service, listening; `buffer` is what the kernel keeps for who takes nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    if buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    server = make_server(service, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.005)
    running = Running(service, server, listener.getsockname()[1])
    try:
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
