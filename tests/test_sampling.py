from dataclasses import replace

import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import Contrast
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.sampling import engine_policy


def test_the_engine_as_a_policy_draws_anew_each_turn():
    tok = Tokenizer.train("abcdefgh", "char")
    torch.manual_seed(0)
    model = ValueModel(GPT(tok.vocab_size, 16, 2, 1, seq_len=32), HeadsConfig(), tok)
    prompts = [tok.encode_prompt("ab"), tok.encode_prompt("c")]
    guidance = Guidance(beta=1.0)
    act = engine_policy(model, guidance, max_tokens=9, seed=3)
    first, second = act(prompts), act(prompts)
    assert first == generate(model, prompts, guidance, max_tokens=9, seed=3)
    assert first != second
    assert act(prompts[:1]) != first[:1]
    again = engine_policy(model, guidance, max_tokens=9, seed=3)
    assert [again(prompts), again(prompts)] == [first, second]


def test_a_policy_that_searches_says_the_best_of_what_is_found():
    tok = Tokenizer.train("abcdefgh", "char")
    torch.manual_seed(0)
    model = ValueModel(GPT(tok.vocab_size, 16, 2, 1, seq_len=32), HeadsConfig("mlp"), tok)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(torch.randn_like(p))
    prompts = [tok.encode_prompt("ab"), tok.encode_prompt("c")]
    search = BeamSearch(3, max_tokens=4, value_weight=2.0)
    said = engine_policy(model, search=search)(prompts)
    found = search(model, prompts)
    assert [(c.tokens, c.terminated) for c in said] == [
        (h.tokens, h.terminated) for h in found.best
    ]
    plain = replace(search, value_weight=0.0)
    assert said != engine_policy(model, search=plain)(prompts)  # values choose


def test_a_policy_is_guided_by_other_values():
    tok = Tokenizer.train(["abcdefgh "], "char")
    model, plus, minus = (
        ValueModel(GPT(tok.vocab_size, size, 2, 1, seq_len=32), None, tok) for size in (16, 8, 8)
    )
    with torch.no_grad():
        for p in plus.parameters():
            p.add_(0.5 * torch.randn_like(p))
    how = {"max_tokens": 9, "seed": 3, "values": Contrast(plus, minus)}
    prompts, guidance = [tok.encode_prompt("ab"), tok.encode_prompt("c")], Guidance(beta=2.0)
    written = engine_policy(model, guidance, **how)(prompts)
    assert written == generate(model, prompts, guidance, **how)
    assert written != engine_policy(model, guidance, **how | {"values": Contrast(plus, plus)})(
        prompts
    )
