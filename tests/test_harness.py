"""lm-evaluation-harness on a guided model against our own policy: `make harness`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import generate
from qvgpt.decode.policy import NEG_INF, Guidance, next_token
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

ROOT = Path(__file__).parent.parent
OFFLINE = {
    **{f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")},
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9"),
}


def shortest_ways(walks, node):
    """All shortest ways from a node to the goal, without the node itself."""
    if node == 0:
        return [""]
    nearer = [j for j in walks.edges[node] if walks.shortest[j] == walks.shortest[node] - 1]
    return sorted(chr(97 + j) + way for j in nearer for way in shortest_ways(walks, j))


def test_the_task_data_are_the_demos_graph():
    walks = RandomWalks.draw(0)
    rows, steps = (
        list(map(json.loads, (ROOT / f"examples/harness/{name}.jsonl").read_text().splitlines()))
        for name in ("walks", "steps")
    )
    assert [row["start"] for row in rows] == list(walks.starts)
    for row in rows:
        assert row["ways"] == shortest_ways(walks, ord(row["start"]) - 97)
    for row in steps:
        q = walks.q_star(row["start"])
        assert row["steps"] == list(q)
        assert [i for i, value in enumerate(q.values()) if value == max(q.values())] == [
            row["best"]
        ]


@pytest.mark.harness
@pytest.mark.timeout(600)
@pytest.mark.parametrize("top_k", [None, 4], ids=["folded", "candidates"])
def test_it_says_what_our_policy_says(tmp_path, top_k):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([RandomWalks.draw(0).letters], "char")
    trunk = GPT(tokenizer.vocab_size, 16, 2, 2, seq_len=16)
    model = ValueModel(trunk, HeadsConfig("low_rank", rank=4), tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.save(tmp_path / "model")
    more = [] if top_k is None else ["--top_k", str(top_k)]
    command = [sys.executable, "examples/harness/run.py", str(tmp_path / "model"), "--beta", "2"]
    env = os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "cache")}
    output = ["--output", str(tmp_path / "found.json")]
    subprocess.run([*command, *more, *output], cwd=ROOT, env=env, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    outcomes = {
        "plain": check(model, found["plain"], Guidance()),
        "guided": check(model, found["guided"], Guidance(beta=2.0, top_k=top_k)),
    }
    assert outcomes["plain"] != outcomes["guided"]


@torch.no_grad()
def check(model, found, guidance):
    """Hold all answers against the policy; returns them."""
    right, answers = [], []
    for sample in found["samples"]["walk_step"]:
        tokens = model.tokenizer.encode_prompt(sample["doc"]["start"])
        hidden = model.trunk.hidden(torch.tensor([tokens]))[:, -1]
        policy = next_token(model, hidden, guidance)
        ours = dict(zip(policy.tokens[0].tolist(), policy.logprob[0].tolist(), strict=True))
        steps = [model.tokenizer.encode(step)[0] for step in sample["doc"]["steps"]]
        expected = [ours.get(step, NEG_INF) for step in steps]
        theirs = [float(value) for [[value, _]] in sample["resps"]]
        assert theirs == pytest.approx(expected, abs=1e-4)
        likeliest = max(ours, key=ours.__getitem__)
        assert [greedy in (True, "True") for [[_, greedy]] in sample["resps"]] == [
            step == likeliest for step in steps
        ]
        right.append(max(range(len(steps)), key=expected.__getitem__) == sample["doc"]["best"])
        answers.append(theirs)
    assert found["results"]["walk_step"]["acc,none"] == pytest.approx(sum(right) / len(right))
    samples = found["samples"]["walk"]
    prompts = [model.tokenizer.encode_prompt(sample["doc"]["start"]) for sample in samples]
    greedy = Guidance(**{**vars(guidance), "temperature": 0.0})
    texts = [
        model.tokenizer.decode_completion(c.tokens)
        for c in generate(model, prompts, greedy, max_tokens=11)
    ]
    assert [sample["resps"] for sample in samples] == [[[text]] for text in texts]
    hits = [text in sample["doc"]["ways"] for text, sample in zip(texts, samples, strict=True)]
    assert found["results"]["walk"]["exact_match,none"] == pytest.approx(sum(hits) / len(hits))
    return answers, texts
