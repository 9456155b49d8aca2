"""`collect --base-url`: from our server, and from one that fails as servers do."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from served import GUIDANCE, TOKENIZER, serving

from qvgpt import remote
from qvgpt.collect import CollectConfig, collect
from qvgpt.data.rows import load_trajectories
from qvgpt.decode.engine import Request, row_seed, write
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.serve.service import Service

PROMPTS = ["今天", "hello", "明天", "世界", "a"]


@pytest.fixture
def task(tmp_path, server):
    rows = [{"prompt": p, "completion": "很好", "topic": i} for i, p in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CollectConfig(
        model="tiny",
        base_url=server.url + "/v1",
        data=str(tmp_path / "in.jsonl"),
        reward="chrf",
        output=str(tmp_path / "out"),
        samples=2,
        temperatures=[1.0, 0.5],
        max_tokens=8,
        max_batch=1,  # four prompts a chunk
    )


def read(config):
    lines = (Path(config.output) / "data.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_our_server_writes_what_the_engine_writes(task, model):
    summary = collect(replace(task, beta=2.0, top_k=30))
    for i, line in enumerate(read(task)):
        prompt = TOKENIZER.encode_prompt(PROMPTS[i])
        requests = [
            # the server's own choice of a seed's text: the first of one
            Request(prompt, 8, Guidance(2.0, t, 30), row_seed(row_seed(0, i * 2 + k) % 2**31, 0))
            for k, t in enumerate((1.0, 0.5))
        ]
        texts = write(model, requests)
        assert line["completions"] == [t.text for t in texts]
        assert line["length_limited"] == [not t.terminated for t in texts]
        assert "completion_ids" not in line
        assert (line["prompt"], line["topic"], line["references"]) == (PROMPTS[i], i, ["很好"])
    assert (summary["prompts"], summary["samples"], summary["tokens"]) == (5, 10, None)
    assert summary["tokens_per_second"] > 0
    texts, _ = load_trajectories(Path(task.output) / "data.jsonl", TOKENIZER)
    assert len(texts) == 10


def test_a_stopped_collection_goes_on(task, tmp_path):
    collect(task)
    whole = (Path(task.output) / "data.jsonl").read_bytes()
    again = replace(task, output=str(tmp_path / "again"))
    collect(again)
    file = Path(again.output) / "data.jsonl"
    assert file.read_bytes() == whole
    file.write_bytes(whole[: len(whole) * 9 // 10])  # within the second chunk
    collect(replace(again, resume=True))
    assert file.read_bytes() == whole


def test_messages_and_references(task, model, tmp_path):
    said = [{"role": "user", "content": "hello"}]
    row = {"prompt": said, "references": ["很好"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    collect(replace(task, include_references=True, unique=True, samples=1, temperatures=[1.0]))
    [line] = read(task)
    request = Request(TOKENIZER.encode_history(said), 8, Guidance(), row_seed(row_seed(0, 0), 0))
    assert line["completions"] == [write(model, [request])[0].text, "很好"]
    assert (line["sampled"], line["rewards"][1]) == (1, pytest.approx(1.0))


NO_ADDRESSES = [
    "a:80000", "a:abc", "a:0", "[::1/v1", "a/v 1", "a/v1\n", "a/ü", "a b/v1", "a..b/v1", ":80/v1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 2}, "beams needs the model here"),
        ({"best_of": 2}, "best_of needs the model here"),
        ({"shaped": True}, "shaped needs the model here"),
        ({"value_models": ["x"]}, "value_models needs the model here"),
        ({"dtype": "bfloat16"}, "dtype needs the model here"),
        ({"length_penalty": 0.5}, "length_penalty needs the model here"),
        ({"brevity": False}, "brevity needs the model here"),
        ({"base_url": "127.0.0.1:8000"}, "expected an address"),
        ({"base_url": "file:///etc/passwd"}, "expected an address"),
        *(({"base_url": f"http://{rest}"}, "expected an address") for rest in NO_ADDRESSES),
        ({"base_url": "http://me:key@localhost/v1"}, "leave the key out"),
        ({"base_url": "http://localhost/v1?key=key"}, "leave the key out"),
        ({"model": "other"}, "answers 404: the model served here is 'tiny'"),
        ({"max_tokens": 500}, "answers 400: .*do not fit the context"),
        ({"samples": 0}, "samples"),
    ],
)
def test_what_makes_no_sense_is_one_line(task, change, message):
    with pytest.raises(QvgptError, match=message) as caught:
        collect(replace(task, **change))
    assert "\n" not in str(caught.value)


def test_an_address_may_have_an_at_in_its_path():
    assert remote.Server("http://localhost/v1/@me/", "m")._path == "/v1/@me"


def test_the_key_comes_from_the_environment(task, model, monkeypatch):
    with serving(Service(model, "tiny", guidance=GUIDANCE), key="sésame", hosts=None) as locked:
        config = replace(task, base_url=locked.url + "/v1", api_key_env="SESAME")
        with pytest.raises(QvgptError, match="answers 401"):
            collect(config)
        monkeypatch.setenv("SESAME", "open\nsésame")
        with pytest.raises(QvgptError, match="no line of text") as caught:
            collect(config)
        assert "sésame" not in str(caught.value)
        monkeypatch.setenv("SESAME", " sésame\n")
        assert collect(config)["samples"] == 10


# ── a server of another make, which fails as told ────────────────────────────────────────────


class Fake:
    """Answers by a list of (status, headers, body), then well; keeps what it was asked."""

    def __init__(self):
        self.asked, self.answers = [], []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.tell(200, {}, {"data": [{"id": "m", "owned_by": "llamacpp"}]})

            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    outer.asked.append((self.path, json.loads(content), dict(self.headers)))
                    status, headers, body = (
                        outer.answers.pop(0) if outer.answers else (200, {}, None)
                    )
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                chat = self.path.endswith("/chat/completions")
                said = (
                    {"message": {"role": "assistant", "content": "很"}} if chat else {"text": "很"}
                )
                good = {"choices": [{**said, "finish_reason": "stop"}],
                        "usage": {"completion_tokens": 3}}  # fmt: skip
                self.tell(status, headers, good if body is None else body)

            def tell(self, status, headers, body):
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def fake(monkeypatch):
    pauses = []
    monkeypatch.setattr(
        remote, "_pause", lambda n, after, of=remote._pause: pauses.append(of(n, after)) or 0.0
    )
    fake = Fake()
    fake.pauses = pauses
    thread = threading.Thread(target=fake.server.serve_forever)
    thread.start()
    yield fake
    fake.server.shutdown()
    thread.join()
    fake.server.server_close()


def test_other_servers_get_what_they_understand(task, fake):
    collect(replace(task, base_url=fake.url, model="m", top_k=5, min_p=0.1))
    assert len(fake.asked) == 10
    path, body, headers = fake.asked[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "m", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 1.0, "top_k": 5,
        "min_p": 0.1, "seed": body["seed"],
    }  # fmt: skip
    assert "Authorization" not in headers
    assert len({body["seed"] for _, body, _ in fake.asked}) == 10
    assert read(task)[0]["completions"] == ["很", "很"]


def test_other_servers_cannot_guide(task, fake):
    with pytest.raises(QvgptError, match="is no qvgpt server"):
        collect(replace(task, base_url=fake.url, beta=1.0))


def test_text_prompts_as_chat(task, fake):
    collect(replace(task, base_url=fake.url, as_chat=True, limit=1, samples=1))
    [(path, body, _)] = fake.asked
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": PROMPTS[0]}]


def test_busy_servers_are_asked_again(task, fake):
    fake.answers = [
        (429, {"Retry-After": "7"}, {"error": {"message": "busy"}}), (503, {}, b"no"),
        (0, {}, b""), (500, {}, b"<html>"), (502, {"Retry-After": "9999"}, b""),
    ]  # fmt: skip
    summary = collect(replace(task, base_url=fake.url, limit=2))
    assert summary["samples"] == 4
    assert len(fake.asked) == 4 + 5
    assert fake.pauses[0] == 7.0
    assert fake.pauses[-1] == remote.LONGEST_PAUSE
    assert 1.0 <= fake.pauses[1] <= 2.0  # the second attempt's


def test_servers_that_stay_busy_are_given_up(task, fake):
    fake.answers = [(503, {}, b"no")] * 99
    with pytest.raises(QvgptError, match="answers 503: 'no'"):
        collect(replace(task, base_url=fake.url, limit=1, samples=1))
    assert len(fake.asked) == remote.TRIES


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", {}, {"choices": []}, {"choices": [{"text": 3, "finish_reason": "stop"}]},
     {"choices": [{"text": "a"}]}, {"choices": [{"text": "a", "finish_reason": "stop"}],
                                    "usage": {"completion_tokens": "x"}}],
)  # fmt: skip
def test_what_is_no_answer_is_one_line(task, fake, body):
    fake.answers = [(200, {}, body)]
    with pytest.raises(QvgptError, match="its answer is no") as caught:
        collect(replace(task, base_url=fake.url, limit=1, samples=1))
    assert "\n" not in str(caught.value)


def test_redirects_are_not_followed(task, fake, server):
    """They would take the key elsewhere."""
    fake.answers = [(307, {"Location": server.url + "/v1/completions"}, b"")]
    with pytest.raises(QvgptError, match="answers 307"):
        collect(replace(task, base_url=fake.url, limit=1, samples=1))


def test_nobody_there(task, monkeypatch):
    monkeypatch.setattr(remote, "_pause", lambda *_: 0.0)
    with pytest.raises(QvgptError, match="cannot be reached"):
        collect(replace(task, base_url="http://127.0.0.1:9/v1"))
