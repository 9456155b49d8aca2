"""Who may ask, from where, how much and how slowly."""

import base64
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from served import make_model, scripted, serving

from qvgpt.cli import main
from qvgpt.errors import QvgptError
from qvgpt.serve import gate as gates
from qvgpt.serve import server as servers
from qvgpt.serve import static
from qvgpt.serve.command import ServeConfig, check
from qvgpt.serve.gate import depth_exceeds
from qvgpt.serve.server import Limits, LogFormatter
from qvgpt.serve.service import Service

KEY = "sésame-open"
ROUTES = [
    ("GET", "/"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/metrics"),
    ("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/values"),
]  # fmt: skip


def code_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code


def raw(server, data, seconds=5.0, pause=0.0):
    """What comes back for bytes as they are, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as sock:
        for part in data if isinstance(data, list) else [data]:
            sock.sendall(part)
            time.sleep(pause)
        found = b""
        while part := sock.recv(65536):
            found += part
        return found


def posted(body):
    """A request for completions, as bytes."""
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    return head + content


# ── the key ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def locked(model):
    with serving(Service(model, "tiny"), key=KEY, hosts=None) as running:
        yield running


def basic(password):
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


WRONG = {
    "none": None, "other": "Bearer other", "longer": f"Bearer {KEY}x",
    "shorter": f"Bearer {KEY[:-1]}", "bare": KEY, "empty": "Bearer",
    "basic": basic("other"), "broken": "Basic %%%", "kind": f"Digest {KEY}",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_every_route_asks_for_the_key(locked, wrong):
    headers = {} if wrong is None else {"Authorization": wrong.encode()}
    for method, path in ROUTES:
        answer = locked.http.request(method, path, headers=headers)
        assert code_of(answer) == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "Basic" in answer.headers["www-authenticate"]
    for path in ("/health", "/ready"):
        assert locked.http.get(path, headers=headers).status_code == 200


def test_no_route_is_forgotten(locked):
    """Every path of the application is asked above, or is open on purpose."""
    paths = {r.path for r in locked.server.config.app._app.routes}
    known = {path for _, path in ROUTES} | gates.OPEN
    assert {p.replace("{name:path}", "tiny") for p in paths} <= known | set(static.load())


def test_with_the_key(locked):
    for value in (f"Bearer {KEY}", f"bearer  {KEY}", basic(KEY)):
        headers = {"Authorization": value.encode()}
        assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_the_key_is_compared_in_constant_time(locked, monkeypatch):
    compared = []
    monkeypatch.setattr(
        gates.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b
    )
    for given in ("s", KEY, "", "x" * 3000):
        locked.http.get("/v1/models", headers={"Authorization": f"Bearer {given}".strip().encode()})
    assert compared == [(32, 32)] * 4


@pytest.mark.parametrize(
    ("host", "key", "hosts"),
    [
        ("127.0.0.1", None, {"localhost", "127.0.0.1", "::1"}),
        ("::1", None, {"localhost", "127.0.0.1", "::1"}),
        ("0.0.0.0", KEY, None),
        ("127.0.0.1", KEY, None),
    ],
)
def test_where_it_listens(monkeypatch, host, key, hosts):
    monkeypatch.delenv("QVGPT_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("QVGPT_API_KEY", key)
    assert check(ServeConfig(model="m", host=host)) == (key, hosts)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_beyond_this_machine_only_with_a_key(monkeypatch, host, capsys):
    monkeypatch.delenv("QVGPT_API_KEY", raising=False)
    assert main(["serve", "nowhere", f"--host={host}"]) == 2
    assert "QVGPT_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("QVGPT_API_KEY", " ")
    with pytest.raises(QvgptError, match="empty"):
        check(ServeConfig(model="m", host=host))


def test_space_around_a_key_is_none_of_it(monkeypatch):
    monkeypatch.setenv("QVGPT_API_KEY", f" {KEY}\n")
    assert check(ServeConfig(model="m"))[0] == KEY
    monkeypatch.setenv("QVGPT_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(QvgptError, match="no line of text"):
        check(ServeConfig(model="m"))


# ── whose page ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # DNS rebinding
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # another port is another origin
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_foreign_pages_ask_in_vain(server, headers):
    answer = server.post(prompt="a", max_tokens=1, headers=headers)
    assert code_of(answer) == 403
    assert "access-control-allow-origin" not in answer.headers


def test_own_pages_may_ask(server):
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.post(prompt="a", max_tokens=1, headers=headers).status_code == 200
    for host in ("localhost", "LOCALHOST:99", "[::1]:8000"):
        assert server.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data", "application/jsonx"])
def test_what_forms_of_foreign_pages_can_send_is_no_json(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert code_of(answer) == 415


def test_headers_of_every_answer(server):
    for path in ("/", "/v1/models", "/nothing", "/v1/completions"):
        headers = server.http.get(path).headers
        csp = dict(
            p.strip().partition(" ")[::2] for p in headers["content-security-policy"].split(";")
        )
        assert csp["default-src"] == csp["frame-ancestors"] == csp["base-uri"] == "'none'"
        assert csp["script-src"] == csp["style-src"] == csp["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


# ── how much ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_bound(server, chunked):
    headers = {"content-type": "application/json"}

    def ask(size):
        body = b'{"prompt":"' + b" " * (size - 13) + b'"}'
        assert len(body) == size
        content = iter([body[:1000], body[1000:]]) if chunked else body
        return server.http.post("/v1/completions", content=content, headers=headers)

    assert code_of(ask(gates.MOST_BYTES + 1)) == 413
    assert code_of(ask(gates.MOST_BYTES)) == 400  # no room in the context
    assert server.http.get("/health").status_code == 200


def test_an_announced_giant_is_refused_unread(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    assert raw(server, head + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("body", "exceeds"),
    [
        (b"[" * 33 + b"]" * 33, True),
        (b"[" * 32 + b"]" * 32, False),
        (b'{"a":' * 33 + b"1" + b"}" * 33, True),
        (b"[" + b"[]," * 500 + b"[]]", False),
        (b'["' + b"[" * 99 + b'"]', False),
        (b'["\\"' + b"[" * 99 + b'"]', False),
        (b'["\\\\",' + b"[" * 40, True),
        (b"[" * 1_000_000, True),
        (b'"' + b"[" * 99, False),  # a string without an end
    ],
)
def test_depth(body, exceeds):
    assert depth_exceeds(body, 32) is exceeds


def test_depth_takes_no_longer_for_what_is_meant_to_be_slow():
    started = time.perf_counter()
    for body in (
        b"[" * 40 + b'"' + b'\\"' * 500_000,
        b'{"' * 500_000,
        b"[]" * 500_000,
        b'"\\' * 500_000,
    ):
        depth_exceeds(body, 32)
    assert time.perf_counter() - started < 3


BROKEN = [
    b"[" * 100_000, b'{"prompt": "a"', b"\xff\xfe", b"nul", b"[1]", b'"a"', b'{"prompt": 1e400}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "temperature": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("body", BROKEN)
def test_broken_json(server, body):
    answer = server.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert code_of(answer) == 400


def test_unknown_paths_and_methods(server):
    assert code_of(server.http.get("/v1/nothing")) == 404
    assert code_of(server.http.delete("/v1/completions")) == 405
    assert code_of(server.http.get("/v1/completions")) == 405
    for path in ("/..%2f..%2fetc/passwd", "/static/../../pyproject.toml", "//etc/passwd", "/%00",
                 "/index.html", "/api.py"):  # fmt: skip
        assert raw(
            server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        ).startswith(b"HTTP/1.1 404 ")


def test_pages_are_those_of_the_table(server):
    assert re.match(r"<!doctype html>", server.http.get("/").text)
    for path, (body, kind) in static.load().items():
        answer = server.http.get(path)
        assert (answer.content, answer.headers["content-type"]) == (body, kind)


# ── how slowly ───────────────────────────────────────────────────────────────────────────────


def test_slow_heads_are_cut_off(server, monkeypatch):
    monkeypatch.setattr(servers, "HEAD_SECONDS", 0.3)
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        try:
            while time.monotonic() < started + 5:  # a byte now and then buys no time
                sock.sendall(b"X")
                time.sleep(0.05)
        except OSError:
            pass
    assert 0.2 < time.monotonic() - started < 2
    assert raw(server, b"") == b""  # nor saying nothing


def test_slow_second_heads_are_cut_off_too(server, monkeypatch):
    monkeypatch.setattr(servers, "HEAD_SECONDS", 0.3)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    started = time.monotonic()
    assert raw(server, [whole, b"GET /health"], pause=0.1).count(b"HTTP/1.1 200") == 1
    assert time.monotonic() - started < 2


def test_slow_bodies_are_answered_with_408(server, monkeypatch):
    monkeypatch.setattr(gates, "BODY_SECONDS", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    assert raw(server, head).startswith(b"HTTP/1.1 408 ")


def test_who_takes_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(servers, "STALL_SECONDS", 0.3)
    monkeypatch.setattr("qvgpt.serve.worker.PAUSE", 0.0)
    with serving(Service(make_model(seq_len=900), "tiny"), buffer=4096) as server:
        body = {"prompt": "a", "n": 8, "max_tokens": 880, "stream": True, "values": 20}
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(posted(body))
            until = time.monotonic() + 15
            while not server.service.live and time.monotonic() < until:
                time.sleep(0.01)
            while server.service.live and time.monotonic() < until:
                time.sleep(0.05)
            assert server.metric("qvgpt_cancelled_total") > 0


def sipped(server, connection, values, most):
    """How much of an answer is taken until all is over, and how much was announced."""
    body = {"prompt": "a", "max_tokens": 80, "guidance": {"beta": 0}, "seed": 1, "values": values}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(posted(body).replace(b": close", b": " + connection))
        found = b""
        while len(found) < most and (part := sock.recv(4096)):
            found += part
            time.sleep(0.02)
        deadline = time.monotonic() + 10
        while server.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.server.server_state.connections
    head, _, content = found.partition(b"\r\n\r\n")
    return len(content), int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]


def test_who_takes_an_answer_slowly_gets_all_of_it(model, monkeypatch):
    monkeypatch.setattr(servers, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(servers, "HEAD_SECONDS", 0.1)
    with serving(Service(model, "tiny"), buffer=4096) as server:
        server.server.config.timeout_keep_alive = 0.05
        for connection in (b"close", b"keep-alive"):
            started = time.monotonic()
            found, announced = sipped(server, connection, values=20, most=1 << 30)
            assert found == announced > 90_000
            assert time.monotonic() - started > 0.4
        found, announced = sipped(server, b"close", values=4, most=1000)  # pauses no writing
        assert found < announced < 1 << 16


def test_connections_have_a_bound(model):
    with serving(Service(model, "tiny"), limits=Limits(connections=3)) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        time.sleep(0.2)
        assert raw(server, b"").startswith(b"HTTP/1.1 503 ")
        held.pop().close()
        time.sleep(0.2)
        assert server.http.get("/health").status_code == 200
        for sock in held:
            sock.close()


def test_large_heads_are_refused(server):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000
    assert raw(server, head).startswith(b"HTTP/1.1 400 ")


# ── the log ──────────────────────────────────────────────────────────────────────────────────


def test_what_clients_say_cannot_forge_the_log(server):
    lines = []
    handler = logging.Handler()
    handler.setFormatter(LogFormatter())
    handler.emit = lambda record: lines.append(handler.format(record))
    logger = logging.getLogger("qvgpt.serve")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        server.http.get("/v1/models/a%0Ab%1B%5B2J%E2%80%AEc%C2%9B")
        server.post(prompt="a", **{"bad\n\x1bname": 1})
    finally:
        logger.removeHandler(handler)
    assert len(lines) == 2
    assert r"/v1/models/a\nb\x1b[2J\u202ec\x9b 404" in lines[0]
    for line in lines:
        assert line.isprintable()


def test_errors_within_are_logged_and_not_told(server, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("secret\n\x1bpath")

    monkeypatch.setattr(server.service, "_begin", fail)
    with caplog.at_level(logging.ERROR, "qvgpt.serve"):
        answer = server.post(prompt="a")
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:  # logged after the answer
            time.sleep(0.005)
    assert code_of(answer) == 500
    assert "secret" not in answer.text
    [record] = caplog.records
    shown = LogFormatter().format(record)
    assert "secret" in shown
    assert all(line.startswith("  | ") for line in shown.splitlines()[1:])
    assert "\x1b" not in shown


# ── the end ──────────────────────────────────────────────────────────────────────────────────


def test_draining(model):
    go = threading.Event()
    with serving(scripted("so it goes", lambda _: go.wait(10))) as server:
        found = []
        busy = threading.Thread(target=lambda: found.append(server.post(prompt="a")))
        busy.start()
        while not server.service.live:
            time.sleep(0.005)
        server.server._end()
        refused = server.post(prompt="a")
        assert code_of(refused) == 503
        assert refused.headers["retry-after"]
        assert code_of(server.http.get("/ready")) == 503
        assert server.http.get("/health").status_code == 200
        go.set()
        busy.join()
        assert found[0].json()["choices"][0]["text"] == "so it goes"


def test_sigterm_ends_the_program_in_order(tmp_path):
    """As a user runs it: a text at work is finished, new ones are refused, the code is 0."""
    make_model(seq_len=3000).save(tmp_path / "model")
    env = {k: v for k, v in os.environ.items() if k != "QVGPT_API_KEY"}
    command = [sys.executable, "-m", "qvgpt", "serve", str(tmp_path / "model"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])  # type: ignore[index]
            assert process.stderr.readline() == (
                "guidance: none (beta 0), temperature 1, where a request says no other\n"
            )
            body = {"prompt": "a", "max_tokens": 400, "stream": True, "guidance": {"beta": 0}}
            with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                sock.sendall(posted(body))
                found = sock.recv(65536)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                while part := sock.recv(65536):
                    found += part
            assert found.startswith(b"HTTP/1.1 200 ")
            assert b"data: [DONE]" in found
            assert process.wait(20) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_a_port_that_is_taken(tmp_path, capsys, server):
    make_model().save(tmp_path / "model")
    assert main(["serve", str(tmp_path / "model"), "--port", str(server.port)]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_help_comes_without_torch():
    code = (
        "import sys; from qvgpt.cli import main; main(['serve', '--help']); "
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--drain_seconds" in done.stdout
    assert {"torch", "fastapi", "transformers", "pydantic"}.isdisjoint(done.stderr.split())


def test_a_missing_package_costs_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [n for n in sys.modules if n.startswith("qvgpt.serve.s")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "nowhere"]) == 2
    assert "pip install 'qvgpt[serve]'" in capsys.readouterr().err
