"""The GPT must be GPT-2: to 1e-5 against transformers, with and without cache and padding."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT

SHAPE = {"vocab_size": 97, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "seq_len": 64}


def noisy(model):
    """Weights far from their start, so that no zero or one hides a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path):
    ours = noisy(GPT(**SHAPE, tied=request.param))
    ours.save(tmp_path)
    return ours, GPT2LMHeadModel.from_pretrained(tmp_path).eval()


def test_the_stated_call_works_as_written():
    model = GPT(vocab_size=10000, embed_dim=512, num_heads=8, num_layers=6, seq_len=1024)
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 10000)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, theirs = pair
    tokens = torch.randint(0, 97, (3, 17))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_transformers_writes(tmp_path, tied):
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_head=4, n_layer=2, n_positions=64, tie_word_embeddings=tied
    )
    theirs = noisy(GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 97, (2, 9))
    ours = GPT.load(tmp_path).eval()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_changes_nothing(pair, side, cached):
    ours, theirs = pair
    short, long = torch.randint(0, 97, (5,)), torch.randint(0, 97, (11,))
    padding = torch.zeros(6, dtype=torch.long)
    parts = [padding, short] if side == "left" else [short, padding]
    tokens = torch.stack([torch.cat(parts), long])
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, slice(0, 6) if side == "left" else slice(5, 11)] = False
    cache = ours.new_cache(2, 16) if cached else None
    logits = ours(tokens, mask, cache=cache)
    alone = theirs(short[None]).logits[0]
    torch.testing.assert_close(logits[0][mask[0]], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], theirs(long[None]).logits[0], atol=1e-5, rtol=0)
    if side == "left":
        padded = theirs(
            tokens, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(0)
        ).logits
        torch.testing.assert_close(logits[mask], padded[mask], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cache_continues_rows_of_any_length(pair):
    ours, theirs = pair
    rows = [torch.randint(0, 97, (n,)) for n in (40, 9)]
    first = torch.zeros(2, 36, dtype=torch.long)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    for i, length in enumerate((36, 5)):
        first[i, :length], mask[i, :length] = rows[i][:length], True
    cache = ours.new_cache(2, 64)
    ours(first, mask, cache=cache)
    for step in range(4):
        token = torch.stack([rows[0][36 + step], rows[1][5 + step]])[:, None]
        logits = ours(token, cache=cache)
    for i in (0, 1):
        expected = theirs(rows[i][None]).logits[0, -1]
        torch.testing.assert_close(logits[i, -1], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_selected_and_inserted_cache_rows_are_the_same_text(pair):
    ours, _ = pair
    tokens = torch.randint(0, 97, (3, 7))
    cache = ours.new_cache(3, 32)
    ours(tokens, cache=cache)
    twice = cache.select(torch.tensor([2, 0, 2]))
    slots = ours.new_cache(4, 32)
    slots.insert(torch.tensor([3, 1]), cache.select(torch.tensor([0, 1])))
    new = torch.tensor([[5], [6], [7], [8]])
    expected = ours(torch.cat([tokens[[2, 0, 2]], new[:3]], 1))[:, -1]
    torch.testing.assert_close(ours(new[:3], cache=twice)[:, -1], expected, atol=1e-5, rtol=0)
    expected = ours(torch.cat([tokens[[1, 0]], new[[1, 3]]], 1))[:, -1]
    inserted = ours(new, cache=slots)[[1, 3], -1]
    torch.testing.assert_close(inserted, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_on_a_cpu_grows_by_buckets_and_has_no_slot_to_spare(pair):
    ours, _ = pair
    tokens = torch.randint(0, 50, (2, 60))
    whole = ours.hidden(tokens)
    cache = ours.new_cache(2, 60)
    assert (cache.capacity, cache.room) == (64, 0)
    for start, end, room in ((0, 20, 32), (20, 31, 32), (31, 32, 32), (32, 33, 64), (33, 60, 64)):
        found = ours.hidden(tokens[:, start:end], cache=cache)
        torch.testing.assert_close(found, whole[:, start:end], atol=1e-4, rtol=1e-4)
        assert cache.room == cache.extent == room
    cache.longest = 10  # both rows idle: where they said they are is beyond what is kept
    picked = cache.select(torch.tensor([1]))
    assert (picked.capacity, picked.room, picked.length.tolist()) == (64, 32, [32])
    small = ours.new_cache(2, 60)
    small.insert(torch.tensor([1]), picked)
    assert (small.room, small.length.tolist()) == (32, [0, 32])


def test_bad_directories_are_named(tmp_path):
    with pytest.raises(QvgptError, match=r"config\.json: no such file"):
        GPT.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(QvgptError, match="not 'bert'"):
        GPT.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 9}')
    with pytest.raises(QvgptError, match="n_embd, n_head, n_layer, n_positions missing"):
        GPT.load(tmp_path)
    GPT(**SHAPE).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04rubbish")
    with pytest.raises(QvgptError, match="no readable safetensors"):
        GPT.load(tmp_path)
