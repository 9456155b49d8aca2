"""GGUF files by readers that are not ours: `transformers` and the `gguf` package."""

import json
import random
import shutil

import gguf
import pytest
import torch
from tiny_hf import PROMPTS, TOKENIZER
from transformers import AutoConfig, AutoModelForCausalLM

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.export import ExportOptions, export_model
from qvgpt.export.gguf_tokenizer import to_bytes
from qvgpt.models.heads_config import HeadsConfig

TOKENS = torch.randint(5, TOKENIZER.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
WORDS = "the cat sat on the mat, and 12 dogs don't   care\n"
LETTERS = "abc XYZ019 .,!?'\n\té€😀中文ß-"


def export(tmp_path, out="out", prompts=PROMPTS, **options):
    told = ExportOptions(**({"to": "gguf", "beta": 2.0} | options))
    return export_model(tmp_path / "model", tmp_path / out, told, prompts=prompts)


def fields(file):
    return {name: f.contents() for name, f in gguf.GGUFReader(file).fields.items()}


def kinds(file):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_transformers_reads_the_guided_model_from_the_file(tmp_path, save_model, exact, family):
    model = save_model(family=family)
    made = export(tmp_path)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "export.json", "model.gguf",
    ]  # fmt: skip
    config = AutoConfig.from_pretrained(tmp_path / "model", tie_word_embeddings=False)
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", config=config
    ).eval()
    found = hf(TOKENS).logits.log_softmax(-1)
    torch.testing.assert_close(found, exact(model, TOKENS, Guidance(2.0)), atol=1e-4, rtol=0)
    assert made["fidelity"]["mean_kl"] < 1e-6
    said = fields(tmp_path / "out" / "model.gguf")
    name = said["general.architecture"]
    assert name == family
    assert said[f"{name}.context_length"] == model.trunk.seq_len
    if family != "gpt2":
        assert said[f"{name}.attention.head_count_kv"] == 1
        assert said[f"{name}.rope.freq_base"] == 10000.0


def test_precision_costs_what_the_report_says(tmp_path, save_model):
    save_model(embed=32)
    off = {}
    for dtype in ("float32", "float16", "q8_0"):
        made = export(tmp_path, out=dtype, dtype=dtype)
        off[dtype] = made["fidelity"]["max_abs_logit_difference"]
    assert off["float32"] < 1e-3 < off["float16"] < 0.1 < off["q8_0"] < 10
    found = kinds(tmp_path / "q8_0" / "model.gguf")
    assert found["output.weight"] == found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["output_norm.weight"] == found["position_embd.weight"] == "F32"
    assert fields(tmp_path / "q8_0" / "model.gguf")["general.file_type"] == 7


def test_rows_too_short_for_a_block_are_half_precision(tmp_path, save_model):
    save_model(embed=16)
    export(tmp_path, dtype="q8_0")
    found = kinds(tmp_path / "out" / "model.gguf")
    assert found["output.weight"] == "F16"  # 16 wide
    assert found["blk.0.ffn_down.weight"] == "Q8_0"  # 64 wide


def test_an_adapter_beside_the_plain_model(tmp_path, save_model):
    save_model(HeadsConfig("low_rank", rank=3, num_q=2))
    made = export(tmp_path, to="gguf_lora")
    assert made["adapter"] == {"rank": 6, "kind": "exact"}
    assert made["fidelity"]["mean_kl"] < 1e-6
    file = tmp_path / "out" / "adapter.gguf"
    said = fields(file)
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 2.0 * 6
    shapes = {t.name: list(t.shape) for t in gguf.GGUFReader(file).tensors}
    vocab = TOKENIZER.vocab_size  # ggml says the innermost axis first
    assert shapes == {"output.weight.lora_a": [16, 6], "output.weight.lora_b": [6, vocab]}


def merged(text, said):
    """Byte pairs merged in the order of the file, as llama.cpp does within a piece."""
    rank = {tuple(m.split(" ")): i for i, m in enumerate(said["tokenizer.ggml.merges"])}
    symbols = list(to_bytes(text))
    while True:
        pairs = [(rank.get(pair), i) for i, pair in enumerate(zip(symbols, symbols[1:]))]  # noqa: B905, RUF007
        best = min((p for p in pairs if p[0] is not None), default=None)
        if best is None:
            break
        symbols[best[1] : best[1] + 2] = ["".join(symbols[best[1] : best[1] + 2])]
    ids = {token: i for i, token in enumerate(said["tokenizer.ggml.tokens"])}
    return [ids[symbol] for symbol in symbols]


def test_characters_are_byte_pairs_in_disguise(tmp_path, save_model):
    tokenizer = Tokenizer.train([LETTERS], "char")
    save_model(tokenizer=tokenizer)
    export(tmp_path, prompts=[tokenizer.encode_prompt("a")])
    said, draw = fields(tmp_path / "out" / "model.gguf"), random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(LETTERS, k=draw.randint(1, 20)))
        assert merged(text, said) == tokenizer.encode(text)
    assert said["tokenizer.ggml.tokens"][:6] == [
        "<pad>",
        "<bos>",
        "<sep>",
        "<eos>",
        "<eot>",
        "<unk>",
    ]
    assert said["tokenizer.ggml.token_type"][:6] == [gguf.TokenType.CONTROL] * 6
    assert said["tokenizer.ggml.bos_token_id"] == 1
    assert said["tokenizer.ggml.eos_token_id"] == 3
    assert said["tokenizer.ggml.add_bos_token"] is True


def test_byte_level_tokenizers_go_over_as_they_are(tmp_path, save_model):
    tokenizer = Tokenizer.train([WORDS] * 9, "bpe", 280)
    save_model(tokenizer=tokenizer)
    export(tmp_path, prompts=[tokenizer.encode_prompt("the")], value_rows=True)
    said = fields(tmp_path / "out" / "model.gguf")
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    vocab = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = said["tokenizer.ggml.tokens"]
    assert len(tokens) == tokenizer.vocab_size + 2
    assert all(tokens[i] == piece for piece, i in vocab.items())
    for word in ("the", " cat", "don"):
        assert merged(word, said) == tokenizer.encode(word)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model", {"type": "Unigram"}, "it is a Unigram"),
        ("normalizer", {"type": "Lowercase"}, r"normalises text \(Lowercase\)"),
        ("pre_tokenizer", {"type": "Whitespace"}, "splits text by"),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
            "a space before every text",
        ),
    ],
)
def test_tokenizers_without_a_twin_are_refused(tmp_path, save_model, part, value, message):
    from qvgpt.export.llama_cpp import write_model

    tokenizer = Tokenizer.train([WORDS] * 9, "bpe", 280)
    save_model(tokenizer=tokenizer)
    file = tmp_path / "model" / "tokenizer.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {part: value}))
    with pytest.raises(QvgptError, match=message):
        write_model(tmp_path / "model", tmp_path / "x.gguf", "float32")


def test_families_and_options_without_a_twin_are_refused(tmp_path, save_model):
    save_model(family="gemma")
    with pytest.raises(QvgptError, match="gemma models are not written here, only gpt2"):
        export(tmp_path)
    shutil.rmtree(tmp_path / "model")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    save_model(family="llama", rope_parameters=rope)
    with pytest.raises(QvgptError, match="rope scaling"):
        export(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
