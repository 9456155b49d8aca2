"""What clients of OpenAI's interface ask and get, beside what the engine alone writes."""

import itertools
import json

import openai
import pytest
from served import GUIDANCE, TOKENIZER, scripted, serving

from qvgpt.data.files import Row
from qvgpt.data.rows import row_to_trajectories
from qvgpt.decode.engine import Request, row_seed, write
from qvgpt.decode.policy import Guidance
from qvgpt.decode.score import score
from qvgpt.serve.service import Service

PROMPT = "今天天气"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def texts(model, tokens, guidance, seed, n=1, max_tokens=24, **how):
    """What the engine writes."""
    requests = [Request(tokens, max_tokens, guidance, row_seed(seed, k), **how) for k in range(n)]
    return write(model, requests)


def test_completions_are_the_engines(client, model):
    tokens = TOKENIZER.encode_prompt(PROMPT)
    expected = texts(model, tokens, GUIDANCE, 7, n=3)
    found = client.completions.create(model="tiny", prompt=PROMPT, n=3, seed=7, max_tokens=24)
    assert [c.text for c in found.choices] == [t.text for t in expected]
    assert [c.finish_reason for c in found.choices] == [
        "stop" if t.terminated else "length" for t in expected
    ]
    assert [c.index for c in found.choices] == [0, 1, 2]
    assert found.usage.prompt_tokens == len(tokens)
    assert found.usage.completion_tokens == sum(len(t.tokens) for t in expected)
    assert found.model == "tiny"


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (None, GUIDANCE),
        ({"beta": 0}, Guidance()),
        ({"beta": 4, "top_k": 9, "temperature": 0.7}, Guidance(4.0, 0.7, 9)),
        ({"kl_budget": 0.2, "top_k": 9}, Guidance(kl_budget=0.2, top_k=9)),
    ],
)
def test_guidance_of_a_request(client, model, guidance, expected):
    more = {} if guidance is None else {"guidance": guidance}
    found = client.completions.create(
        model="tiny", prompt=PROMPT, seed=3, max_tokens=24, extra_body=more
    )
    [text] = texts(model, TOKENIZER.encode_prompt(PROMPT), expected, 3)
    assert found.choices[0].text == text.text


def test_temperature_and_top_p_of_the_request_go_before_the_guidances(client, model):
    found = client.completions.create(
        model="tiny", prompt=PROMPT, seed=3, max_tokens=24, temperature=0.5, top_p=0.8,
        extra_body={"guidance": {"beta": 2.0, "temperature": 3.0}},
    )  # fmt: skip
    expected = Guidance(2.0, 0.5, top_p=0.8)
    [text] = texts(model, TOKENIZER.encode_prompt(PROMPT), expected, 3)
    assert found.choices[0].text == text.text


def test_chat_is_the_engines_answer_to_the_dialogue(client, model):
    said = [{"role": "system", "content": "天"}, {"role": "user", "content": PROMPT}]
    tokens = TOKENIZER.encode_history(said)
    found = client.chat.completions.create(model="tiny", messages=said, seed=1, max_tokens=24)
    [text] = texts(model, tokens, GUIDANCE, 1)
    assert found.choices[0].message.content == text.text
    assert found.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": PROMPT[:1]}, {"type": "text", "text": PROMPT[1:]}]
    same = client.chat.completions.create(
        model="tiny", messages=[said[0], {"role": "user", "content": parts}], seed=1,
        max_completion_tokens=24,
    )  # fmt: skip
    assert same.choices[0].message.content == text.text


@pytest.mark.parametrize("said", [lambda answer: answer, lambda answer: answer.model_dump()])
def test_an_answer_is_a_message_of_the_next_request(client, model, said):
    messages = [{"role": "user", "content": PROMPT}]
    first = client.chat.completions.create(model="tiny", messages=messages, seed=1, max_tokens=9)
    answer = first.choices[0].message
    last = {"role": "user", "content": "hello"}
    second = client.chat.completions.create(
        model="tiny", messages=[*messages, said(answer), last], seed=1, max_tokens=9
    )
    plain = [*messages, {"role": "assistant", "content": answer.content}, last]
    [text] = texts(model, TOKENIZER.encode_history(plain), GUIDANCE, 1, max_tokens=9)
    assert second.choices[0].message.content == text.text


@pytest.mark.parametrize("chat", [False, True])
def test_streams_join_to_the_whole_and_split_no_character(client, model, chat):
    guidance = {"beta": 0.0, "temperature": 1.3}
    ask = {
        "model": "tiny",
        "seed": 5,
        "n": 4,
        "max_tokens": 40,
        "extra_body": {"guidance": guidance},
    }
    if chat:
        create, ask = client.chat.completions.create, ask | {
            "messages": [{"role": "user", "content": PROMPT}]
        }  # fmt: skip
        tokens = TOKENIZER.encode_history(ask["messages"])
    else:
        create, ask = client.completions.create, ask | {"prompt": PROMPT}
        tokens = TOKENIZER.encode_prompt(PROMPT)
    joined, finished, total = dict.fromkeys(range(4), ""), {}, None
    for chunk in create(**ask, stream=True, stream_options={"include_usage": True}):
        total = chunk.usage
        for choice in chunk.choices:
            joined[choice.index] += (choice.delta.content if chat else choice.text) or ""
            if choice.finish_reason:
                assert choice.index not in finished
                finished[choice.index] = choice.finish_reason
    expected = texts(model, tokens, Guidance(temperature=1.3), 5, n=4, max_tokens=40)
    assert joined == {i: t.text for i, t in enumerate(expected)}
    assert finished == {i: "stop" if t.terminated else "length" for i, t in enumerate(expected)}
    assert total.completion_tokens == sum(len(t.tokens) for t in expected)
    assert total.prompt_tokens == len(tokens)


SCRIPT = "今天天气很好 😀\ufffd。"


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("qvgpt.serve.worker.PAUSE", 0.0)
    monkeypatch.setattr("qvgpt.serve.worker._PIECES_PER_SECOND", 1e9)


@pytest.fixture(scope="module")
def writer():
    with serving(scripted(SCRIPT)) as running:
        yield running


def test_no_piece_splits_a_character(writer, no_pause):
    """A byte is a token here, so that every character but the space comes in several."""
    pieces = [c["choices"][0] for c in writer.stream(prompt="a", max_tokens=60)]
    assert [p["text"] for p in pieces if p["text"]] == [*SCRIPT[:-2], SCRIPT[-2:]]
    assert pieces[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("天气", "今天"),
        (["好 ", "很好"], "今天天气"),
        ("天天气好", SCRIPT),
        ("。", SCRIPT[:-1]),
        ("今", ""),
    ],
)
def test_no_piece_tells_what_a_stop_string_takes_back(writer, no_pause, stop, left):
    ask = {"prompt": "a", "max_tokens": 60, "stop": stop}
    pieces = [c["choices"][0] for c in writer.stream(**ask)]
    assert "".join(p["text"] for p in pieces) == left
    assert pieces[-1]["finish_reason"] == "stop"
    assert writer.post(**ask).json()["choices"][0]["text"] == left


def test_half_a_character_is_told_where_the_length_cuts_it(writer, no_pause):
    pieces = [c["choices"][0] for c in writer.stream(prompt="a", max_tokens=5)]
    assert [p["text"] for p in pieces if p["text"]] == ["今", "\ufffd"]
    assert pieces[-1]["finish_reason"] == "length"


def test_pieces_come_token_by_token_where_there_is_no_pause(server, no_pause):
    chunks = server.stream(prompt="hello", max_tokens=20, seed=2, values=True)
    counts = [len(c["choices"][0]["values"]) for c in chunks]
    assert len(counts) > 3
    assert set(counts) == {1}


def test_pieces_wait_for_one_another_but_the_first(server, monkeypatch):
    monkeypatch.setattr("qvgpt.serve.worker.PAUSE", 60.0)
    chunks = server.stream(prompt="hello", max_tokens=20, seed=2, values=True)
    counts = [len(c["choices"][0]["values"]) for c in chunks]
    assert len(counts) == 2
    assert counts[0] == 1 < counts[1]


def test_stop_strings(client, server, model):
    tokens = TOKENIZER.encode_prompt("hello")
    [free] = texts(model, tokens, GUIDANCE, 11, max_tokens=40)
    text = free.text
    stop = [text[8:11], "never said"]
    [cut] = texts(model, tokens, GUIDANCE, 11, max_tokens=40, stop=stop)
    assert cut.text == text[: text.index(stop[0])]
    ask = {"prompt": "hello", "seed": 11, "max_tokens": 40, "stop": stop}
    found = client.completions.create(model="tiny", **ask)
    assert found.choices[0].text == cut.text
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == len(cut.tokens)
    streamed = server.stream(**ask)
    assert "".join(c["choices"][0]["text"] for c in streamed) == cut.text
    longer = client.completions.create(model="tiny", **{**ask, "stop": text[-1] + "no"})
    assert longer.choices[0].text == text  # what might have begun a stop string is told at the end


def test_values_are_the_engines_reports(server, model):
    ask = {"prompt": PROMPT, "seed": 4, "max_tokens": 12, "guidance": {"beta": 3.0, "top_k": 20}}
    found = server.post(**ask, values=3, n=2).json()["choices"]
    tokens = TOKENIZER.encode_prompt(PROMPT)
    expected = texts(model, tokens, Guidance(3.0, top_k=20), 4, n=2, max_tokens=12, alternatives=3)
    for choice, text in zip(found, expected, strict=True):
        assert len(choice["values"]) == len(text.tokens)
        spelled = b"".join(bytes(v["bytes"]) for v in choice["values"])
        assert spelled.decode("utf-8", "replace") == choice["text"]
        for value, report in zip(choice["values"], text.reports, strict=True):
            for name in ("logprob", "base_logprob", "q", "v", "advantage", "kl"):
                assert value[name] == pytest.approx(getattr(report, name), abs=2e-6)
            told = [a["logprob"] for a in value["alternatives"]]
            assert told == pytest.approx([a.logprob for a in report.alternatives], abs=2e-6)
            assert len(told) == 3
    streamed = server.stream(**ask, values=3, n=2)
    for choice in found:
        pieces = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == choice["index"]]
        joined = list(itertools.chain.from_iterable(p["values"] for p in pieces))
        assert [v["token"] for v in joined] == [v["token"] for v in choice["values"]]
        q = [v["q"] for v in joined]
        assert q == pytest.approx([v["q"] for v in choice["values"]], abs=1e-5)


def test_values_of_a_given_text_are_the_scores(server, model):
    row = {"prompt": PROMPT, "completion": "很好"}
    for ended in (True, False):
        found = server.post("/v1/values", **row, ended=ended, alternatives=2).json()
        texts = row_to_trajectories(Row("here", {**row, "truncated": not ended}), TOKENIZER)
        [expected] = score(model, texts, GUIDANCE, alternatives=2)
        assert len(found["values"]) == len(expected.tokens)
        for value, report in zip(found["values"], expected.reports, strict=True):
            assert value["q"] == pytest.approx(report.q, abs=2e-6)
            assert value["kl"] == pytest.approx(report.kl, abs=2e-6)
            assert [a["q"] for a in value["alternatives"]] == pytest.approx(
                [a.q for a in report.alternatives], abs=2e-6
            )
        end = found["end_value"]
        assert end == (0.0 if ended else pytest.approx(expected.end_value, abs=2e-6))
    assert found["values"][0]["token"] == TOKENIZER.pieces(TOKENIZER.encode("很好"))[0] or True
    whole = server.post("/v1/values", text="hello").json()["values"]
    assert b"".join(bytes(v["bytes"]) for v in whole) == b"hello"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "世界"}]
    said = server.post("/v1/values", messages=talk, ended=True).json()["values"]
    assert b"".join(bytes(v["bytes"]) for v in said).decode() == "世界"
    assert said[-1]["bytes"] == []


def test_what_is_no_candidate_has_no_logprob(server):
    guidance = {"beta": 0, "top_k": 1}
    found = server.post("/v1/values", text="hello", guidance=guidance).json()["values"]
    assert any(v["logprob"] is None for v in found)
    assert all(v["base_logprob"] < 0 for v in found)


def test_logprobs(client, model):
    tokens = TOKENIZER.encode_prompt(PROMPT)
    [text] = texts(model, tokens, Guidance(), 6, max_tokens=9, alternatives=2)
    plain = {"guidance": {"beta": 0}}
    found = client.completions.create(
        model="tiny", prompt=PROMPT, seed=6, max_tokens=9, logprobs=2, extra_body=plain
    ).choices[0]
    likely = [r.logprob for r in text.reports]
    assert found.logprobs.token_logprobs == pytest.approx(likely, abs=2e-6)
    assert found.logprobs.text_offset[0] == 0
    assert len(found.logprobs.top_logprobs[0]) == 2
    said = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(
        model="tiny", messages=said, seed=6, max_tokens=9, logprobs=True, top_logprobs=2,
        extra_body=plain,
    ).choices[0]  # fmt: skip
    tokens = TOKENIZER.encode_history(said)
    [text] = texts(model, tokens, Guidance(), 6, max_tokens=9, alternatives=2)
    content = [r for t, r in zip(text.tokens, text.reports, strict=True)
               if t not in TOKENIZER.template.end_ids]  # fmt: skip
    assert [c.logprob for c in chat.logprobs.content] == pytest.approx(
        [r.logprob for r in content], abs=2e-6
    )
    assert len(chat.logprobs.content[0].top_logprobs) == 2
    spelled = b"".join(bytes(c.bytes) for c in chat.logprobs.content)
    assert spelled.decode("utf-8", "replace") == chat.message.content


def test_offsets_are_those_of_the_text(server):
    """Much of what this model writes are halves of characters."""
    for seed in range(3):
        ask = {"prompt": "a", "max_tokens": 60, "seed": seed, "logprobs": 0}
        [choice] = server.post(**ask, guidance={"beta": 0}).json()["choices"]
        told = choice["logprobs"]
        assert "\ufffd" in choice["text"]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            if "\ufffd" not in token and token not in ("<pad>", "<bos>", "<sep>"):
                assert choice["text"].startswith(token, offset)


def test_what_is_no_number_is_an_error(server, monkeypatch):
    monkeypatch.setattr("qvgpt.serve.shown._finite", lambda _: float("nan"))
    ask = {"prompt": "a", "max_tokens": 3, "logprobs": 1}
    assert server.post(**ask).json()["error"]["code"] == "internal_error"
    with server.http.stream("POST", "/v1/completions", json={**ask, "stream": True}) as answer:
        [event] = [line for line in answer.iter_lines() if line]
    assert json.loads(event[6:])["error"]["code"] == "internal_error"


def test_greedy_texts_have_the_logprobs_of_temperature_1(server, model):
    guidance = {"beta": 1.0, "temperature": 0.0}
    ask = {"prompt": PROMPT, "max_tokens": 6, "guidance": guidance}
    found = server.post(**ask, values=2).json()["choices"][0]
    [text] = texts(model, TOKENIZER.encode_prompt(PROMPT), Guidance(1.0, 0.0), 0, max_tokens=6)
    assert found["text"] == text.text == server.post(**ask).json()["choices"][0]["text"]
    for value in found["values"]:
        assert value["token"] == value["alternatives"][0]["token"]
        assert value["logprob"] == value["alternatives"][0]["logprob"] < 0
        assert len(value["alternatives"]) == 2


def test_prompts_as_lists_of_texts_and_of_tokens(server, model):
    prompts = ["今", "hello"]
    ids = [TOKENIZER.encode_prompt(p) for p in prompts]
    ask = {"seed": 9, "max_tokens": 8, "n": 2}
    found = [c["text"] for c in server.post(prompt=prompts, **ask).json()["choices"]]
    assert found == [c["text"] for c in server.post(prompt=ids, **ask).json()["choices"]]
    requests = [Request(ids[i // 2], 8, GUIDANCE, row_seed(9, i)) for i in range(4)]
    assert found == [t.text for t in write(model, requests)]
    assert server.post(prompt=ids[0], **ask).json()["usage"]["prompt_tokens"] == len(ids[0])


def test_without_a_seed_texts_differ(server):
    ask = {"prompt": "hello", "max_tokens": 20}
    assert len({server.post(**ask).json()["choices"][0]["text"] for _ in range(4)}) > 1


def test_models_say_what_is_served(client, server):
    [card] = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    assert card.guidance["beta"] == GUIDANCE.beta  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


FAULTY = {
    "unknown field": ({"prompt": "a", "nonsense": 1}, "nonsense"),
    "no prompt": ({}, "prompt"),
    "long": ({"prompt": "a", "max_tokens": 500}, "max_tokens"),
    "no room": ({"prompt": "今" * 200}, "max_tokens"),
    "n": ({"prompt": "a", "n": 65}, "n"),
    "many": ({"prompt": ["a"] * 20, "n": 4}, "n"),
    "beta": ({"prompt": "a", "guidance": {"beta": 1e9}}, "guidance.beta"),
    "both": ({"prompt": "a", "guidance": {"beta": 1, "kl_budget": 1, "top_k": 4}}, "guidance"),
    "functional": ({"prompt": "a", "guidance": {"beta": 1, "functional": "cvar"}}, "guidance"),
    "stops": ({"prompt": "a", "stop": ["a"] * 9}, "stop"),
    "empty stop": ({"prompt": "a", "stop": ""}, "stop"),
    "values": ({"prompt": "a", "values": 21}, "values"),
    "token": ({"prompt": [99999]}, "prompt"),
    "surrogate": ({"prompt": "\ud800"}, "prompt"),
    "penalty": ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
    "echo": ({"prompt": "a", "echo": True}, "echo"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature"),
    "text as number": ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    "stream_options": ({"prompt": "a", "stream_options": {}}, "stream_options"),
}


@pytest.mark.parametrize(("body", "param"), FAULTY.values(), ids=FAULTY)
def test_faults_are_named(server, body, param):
    answer = server.http.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stop": ["a"] * 9}, "stop: List should have at most 8 items"),
        ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character"),
        ({"stop": 5}, "stop: Input should be a valid string"),
        ({"values": 21}, "values: Input should be less than or equal to 20"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": [1, 2, -1]}, "prompt.2: Input should be greater than or equal to 0"),
        ({"prompt": [["a"]]}, "prompt.0.0: Input should be a valid integer"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages.0.content.0.text: Field required"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]},
         "messages.0.tool_calls: List should have at most 0 items"),
    ],
)  # fmt: skip
def test_faults_of_fields_of_several_types_are_those_of_the_type_meant(server, body, message):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    error = server.post(path, **({"prompt": "a"} if "stop" in body else {}), **body).json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == message.partition(":")[0]


def test_more_texts_than_there_can_be_room_for_are_no_matter_of_waiting(model):
    with serving(Service(model, "tiny", max_batch=2, max_waiting=1)) as small:
        answer = small.post(prompt="a", n=4)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "4 texts of one request, at most 3 here"


def test_what_is_told_has_a_bound(server, monkeypatch):
    """A request for a million alternatives would fill the memory."""
    monkeypatch.setattr("qvgpt.serve.service.MOST_TOLD", 2 * 2 * 5 * 4)
    ask = {"prompt": ["a", "b"], "n": 2, "max_tokens": 5}
    assert server.post(**ask, values=3).status_code == 200
    answer = server.post(**ask, values=4)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "values"
    assert server.post(**ask, values=True, logprobs=4).status_code == 400
    assert server.post(**ask).status_code == 200
    assert server.post("/v1/values", text="a" * 20, alternatives=20).status_code == 400


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": "a"}, {"text": "a", "prompt": "b"}, {"text": ""}, {"text": "今" * 200},
     {"messages": [{"role": "user", "content": "a"}]}],
)  # fmt: skip
def test_faulty_texts_to_be_judged(server, body):
    answer = server.post("/v1/values", **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_neutral_options_of_other_clients_are_taken(client):
    client.completions.create(
        model="tiny", prompt="a", max_tokens=2, presence_penalty=0.0, frequency_penalty=0,
        logit_bias={}, user="me", echo=False, best_of=1,
    )  # fmt: skip
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=2,
        presence_penalty=0.0,
    )  # fmt: skip


def test_metrics_count(server):
    before = {n: server.metric(n) for n in ("qvgpt_tokens_total", "qvgpt_prompt_tokens_total")}
    server.post(prompt="hello", max_tokens=5, seed=2, guidance={"beta": 0})
    assert server.metric("qvgpt_tokens_total") - before["qvgpt_tokens_total"] == 5
    added = server.metric("qvgpt_prompt_tokens_total") - before["qvgpt_prompt_tokens_total"]
    assert added == len(TOKENIZER.encode_prompt("hello"))
    assert server.metric("qvgpt_at_work") == 0
    counted = [server.metric("qvgpt_first_token_seconds_count")]
    for streams in (False, True):  # only a stream tells its first token before the last
        server.post(prompt="hello", max_tokens=2, stream=streams)
        counted.append(server.metric("qvgpt_first_token_seconds_count"))
    assert counted[2] == counted[1] + 1 == counted[0] + 1
