"""Jobs beside one another: a faulty one harms nobody, and who is gone is written for no more."""

import asyncio
import logging
import threading
import time

import pytest
import torch
from served import BYTES, GUIDANCE, TOKENIZER, make_model, scripted, serving

from qvgpt.decode.engine import Engine, Request, row_seed, write
from qvgpt.decode.policy import Guidance
from qvgpt.serve.command import _alone
from qvgpt.serve.service import Service
from qvgpt.serve.worker import Worker

SCRIPT = "so it goes on and on"


def ask_all(server, bodies):
    """The answers to requests that are all there at once."""
    answers = [None] * len(bodies)

    def ask(i):
        answers[i] = server.post(**bodies[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_only_the_thread_that_writes_takes_several():
    before = torch.get_num_threads()
    with _alone() as threads:
        assert threads == before
        assert torch.get_num_threads() == 1
        found = []
        worker = Worker(make_model(), print, threads=3)
        worker.call(lambda: found.append(torch.get_num_threads()))
        worker.start()
        worker.stop()
        assert found == [3]
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("place", [3, 9])
def test_a_faulty_text_harms_no_other(place):
    """The values fail for texts to "x" at one of their tokens, in a batch with eleven others."""
    x = BYTES.encode("x")[0]
    gate = threading.Event()
    fails = []

    def before(read):
        gate.wait(10)
        if x in read and len(read) == place:
            fails.append(read)
            raise RuntimeError("poison")

    with serving(scripted(SCRIPT, before)) as server:
        bodies = [{"prompt": c, "max_tokens": 40} for c in "abcdefxghijk"]
        threading.Timer(0.3, gate.set).start()
        answers = ask_all(server, bodies)
        good = [a for a, b in zip(answers, bodies, strict=True) if b["prompt"] != "x"]
        [bad] = [a for a, b in zip(answers, bodies, strict=True) if b["prompt"] == "x"]
        assert bad.status_code == 500
        assert bad.json()["error"]["type"] == "server_error"
        assert "poison" not in bad.text
        assert [a.json()["choices"][0]["text"] for a in good] == [SCRIPT] * 11
        assert len(fails) <= 6  # found by halves
        assert server.metric("qvgpt_failed_total") == 1
        assert server.post(prompt="a", max_tokens=40).json()["choices"][0]["text"] == SCRIPT


def test_a_failed_step_is_not_seen_in_streams(monkeypatch):
    """One step in the middle fails, for no text's fault: all begin anew, and nothing is told
    twice."""
    monkeypatch.setattr("qvgpt.serve.worker.PAUSE", 0.0)
    failed = []

    def before(read):
        if len(read) == 12 and len(failed) < 2:
            failed.append(read)
            raise RuntimeError("cosmic ray")

    with serving(scripted(SCRIPT, before)) as server:
        chunks = server.stream(prompt="a", max_tokens=40, n=4)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == [SCRIPT] * 4


def test_what_always_fails_ends(caplog):
    def before(read):
        raise RuntimeError("nothing works")

    with serving(scripted(SCRIPT, before)) as server, caplog.at_level(logging.CRITICAL):
        answers = ask_all(server, [{"prompt": c, "max_tokens": 4} for c in "abcde"])
        assert [a.status_code for a in answers] == [500] * 5


def test_texts_of_a_full_batch_are_those_of_each_alone(model):
    """Three at a time, each as the engine writes it alone, whoever comes and goes."""
    with serving(Service(model, "tiny", guidance=GUIDANCE, max_batch=3)) as server:
        bodies = [
            {"prompt": "今天" * (i % 3) + "a", "seed": i, "max_tokens": 3 + 5 * (i % 4),
             "values": bool(i % 2), "guidance": {"beta": i % 3}}
            for i in range(14)
        ]  # fmt: skip
        answers = ask_all(server, bodies)
    for body, answer in zip(bodies, answers, strict=True):
        tokens = TOKENIZER.encode_prompt(body["prompt"])
        guidance = Guidance(float(body["guidance"]["beta"]))
        request = Request(tokens, body["max_tokens"], guidance, row_seed(body["seed"], 0))
        assert answer.json()["choices"][0]["text"] == write(model, [request])[0].text


@pytest.mark.parametrize("streams", [True, False])
def test_who_is_gone_is_written_for_no_more(streams):
    """A client that leaves in the middle; within a second its text is given up."""
    count = []

    def before(read):
        count.append(read)
        time.sleep(0.01)

    with serving(scripted("x" * 80, before)) as server:
        body = {"prompt": "a", "max_tokens": 90, "stream": streams}
        if streams:
            with server.http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(Exception, match="timed out"):
                server.http.post("/v1/completions", json=body, timeout=0.15)
        left = time.monotonic()
        while server.service.worker.at_work and time.monotonic() < left + 1:
            time.sleep(0.01)
        assert not server.service.worker.at_work
        assert not server.service.live
        assert len(count) < 75
        assert server.metric("qvgpt_cancelled_total") == 1


def test_who_is_gone_while_waiting_is_never_written():
    written = []

    def before(read):
        written.append(tuple(read[:3]))
        time.sleep(0.005)

    with serving(scripted("x" * 60, before, max_batch=1)) as server:
        busy = threading.Thread(target=server.post, kwargs={"prompt": "a", "max_tokens": 70})
        busy.start()
        while not server.service.worker.at_work:
            time.sleep(0.005)
        with pytest.raises(Exception, match="timed out"):
            server.http.post("/v1/completions", json={"prompt": "b"}, timeout=0.1)
        busy.join()
        server.post(prompt="c", max_tokens=70)
    assert {p[1] for p in written} == {BYTES.encode(c)[0] for c in "ac"}


def test_a_full_queue_answers_429(model):
    gate = threading.Event()
    with serving(scripted(SCRIPT, lambda _: gate.wait(10), max_batch=2, max_waiting=3)) as server:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.post(prompt="a", n=2)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while len(server.service.live) < 4:
            time.sleep(0.005)
        refused = server.post(prompt="a", n=2)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        gate.set()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200, 200]
        assert server.post(prompt="a", n=2).status_code == 200


def test_values_of_texts_queue_too():
    gate = threading.Event()
    with serving(scripted(SCRIPT, lambda _: gate.wait(10), max_batch=1, max_waiting=0)) as server:
        busy = threading.Thread(target=server.post, kwargs={"prompt": "a"})
        busy.start()
        while not server.service.live:
            time.sleep(0.005)
        assert server.post("/v1/values", text="ab").status_code == 429
        gate.set()
        busy.join()
        assert server.post("/v1/values", text="ab").status_code == 200


def test_only_the_recommended_strength_is_folded(model, monkeypatch):
    """Each fold is a matrix of the LM head's size: strangers' β must not fill the memory."""
    with serving(Service(model, "tiny", guidance=Guidance(1.5))) as server:
        for beta in (1.5, 2.5, 3.5):
            server.post(prompt="a", max_tokens=4, guidance={"beta": beta})
        assert list(server.service.worker.guide._folded[1]) == [1.5]


def test_reports_are_asked_for_only_where_someone_reads_them(model, monkeypatch):
    asked = []
    make = Engine._reports

    def spy(self, *arguments):
        asked.append(arguments[3].numel())
        return make(self, *arguments)

    monkeypatch.setattr(Engine, "_reports", spy)
    with serving(Service(model, "tiny", guidance=GUIDANCE)) as server:
        server.post(prompt="a", max_tokens=4)
        assert not asked
        server.post(prompt="a", max_tokens=4, seed=0, values=True)
        assert sum(asked) == 4


def test_what_cannot_fit_is_not_even_read(server, monkeypatch):
    """Texts of a megabyte would keep the one thread that reads texts busy for seconds."""
    monkeypatch.setattr(server.service.tokenizer, "_encode_part", None)
    text = "a" * (server.service.most_characters + 1)
    said = [{"role": "user", "content": text[:-1]}, {"role": "user", "content": "a"}]
    for path, body in [
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": ["a", text]}),
        ("/v1/chat/completions", {"messages": said}),
        ("/v1/values", {"text": text}),
        ("/v1/values", {"messages": said}),
    ]:
        answer = server.post(path, **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_loop_answers_while_a_long_text_is_read():
    service = Service(make_model(), "tiny")

    async def both():
        service._loop = asyncio.get_running_loop()
        slow = asyncio.create_task(service._read(lambda _: time.sleep(0.3) or [1], ""))
        started = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - started < 0.2
        assert await slow == [1]

    asyncio.run(both())
    service._reader.shutdown()
