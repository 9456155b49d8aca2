"""Directories by somebody who means harm: one clear error each, and nothing of theirs is run."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import TOKENIZER, make_hf

from qvgpt.cli import main
from qvgpt.decode.guided_head import load_guided
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import LoraConfig
from qvgpt.models.value_model import ValueModel


@pytest.fixture(params=["gpt2", "llama"])
def folder(request, tmp_path):
    """A directory with values that is in order still."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        trunk = GPT(TOKENIZER.vocab_size, 16, 2, 2, 64)
    else:
        trunk = CausalLM(make_hf(request.param))
    ValueModel(trunk, HeadsConfig("low_rank", rank=4), TOKENIZER).save(tmp_path / "model")
    ValueModel.from_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def canary(tmp_path):
    """A file that comes to be where somebody else's code is run."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def refused(capsys):
    """A directory is refused in one line, in Python and on the command line."""

    def check(folder, match, words=("--prompt", "ab", "--beta", "1")):
        with pytest.raises(QvgptError, match=match) as caught:
            ValueModel.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        with pytest.raises(QvgptError):
            load_guided(folder, Guidance(beta=1.0))
        capsys.readouterr()
        assert main(["generate", str(folder), *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("qvgpt: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err

    return check


class Evil:
    """What a pickle runs when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def change(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def broken(name, whole):
    """A safetensors file: 8 bytes with the header's length, the header, the tensors."""
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")

    def rewritten(**entry):
        text = json.dumps(header | {first: header[first] | entry}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    return {
        "a header of 2**63 bytes": struct.pack("<Q", 2**63) + whole[8:],
        "a header of a terabyte": struct.pack("<Q", 2**40) + whole[8:],
        "a header longer than the file": struct.pack("<Q", len(whole)) + whole[8:],
        "a header that is no JSON": whole[:8] + b"x" * length + whole[8 + length :],
        "a header that is nested deeply": struct.pack("<Q", 90000) + b"[" * 90000,
        "tensors beyond the end": rewritten(data_offsets=[0, 2**50]),
        "a shape that overflows": rewritten(shape=[2**40, 2**40]),
        "a type that is unknown": rewritten(dtype="PICKLE"),
        "tensors cut off": whole[:-9],
        "nothing": b"",
    }[name]


BROKEN = [
    "a header of 2**63 bytes", "a header of a terabyte", "a header longer than the file",
    "a header that is no JSON", "a header that is nested deeply", "tensors beyond the end",
    "a shape that overflows", "a type that is unknown", "tensors cut off", "nothing",
]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("file", ["model.safetensors", "value_heads.safetensors"])
def test_broken_safetensors(folder, refused, file, name):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(broken(name, whole))
    refused(folder, "no readable safetensors file|no causal language model can be read")


def test_heads_of_another_shape(folder, refused):
    file = folder / "value_heads.safetensors"
    heads = load_file(file)
    name = next(key for key in heads if key.endswith("q.0.weight"))
    wrong = [
        heads | {name: heads[name][:-1].clone()},
        heads | {name: heads[name][None].clone()},
        heads | {"q.9.weight": torch.zeros(3)},
        {key: value for key, value in heads.items() if key != name},
        {},
    ]
    for tensors in wrong:
        save_file(tensors, file)
        refused(folder, r"value_heads\.safetensors: does not fit value_config\.json")


@pytest.mark.parametrize(
    "heads",
    [
        {"kind": "low_rank", "rank": 10**12},
        {"kind": "low_rank", "rank": 10**30},
        {"kind": "low_rank", "rank": 4.5},
        {"kind": "low_rank", "rank": "4"},
        {"num_q": 10**9},
        {"kind": ["low_rank"]},
        ["low_rank"],
        None,
    ],
)
def test_heads_that_no_machine_holds(folder, refused, heads):
    change(folder / "value_config.json", heads=heads)
    refused(folder, "value_config.json: bad heads|does not fit value_config.json")


SIZES = {"gpt2": ("n_embd", "n_layer", "vocab_size"),
         "llama": ("hidden_size", "num_hidden_layers", "vocab_size")}  # fmt: skip


def test_sizes_that_the_weights_have_not(folder, refused):
    config = json.loads((folder / "config.json").read_text())
    for key in SIZES[config["model_type"]]:
        for size in (7, 48, 3.5, "16", -1, 0, None):
            (folder / "config.json").write_text(json.dumps(config | {key: size}))
            refused(folder, "config.json|no causal language model can be read|do not fit")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map names code"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "auto_map names code"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel'"),
        ({"attn_implementation": "flash_attention_3"}, "may be code to fetch"),
        (
            {"_attn_implementation": {"": "evil/kernel"}},
            r"_attn_implementation {'': 'evil/kernel'} may",
        ),
        ({"model_type": "no_such_type"}, "no causal language model"),
        ({"model_type": ["gpt2"]}, "no causal language model"),
    ],
)
def test_configurations_that_name_code(folder, refused, canary, more, match):
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    change(folder / "config.json", **more)
    refused(folder, match)


@pytest.mark.parametrize("name", ["config.json", "value_config.json"])
def test_json_that_python_cannot_hold(folder, refused, name):
    whole = (folder / name).read_text()
    for damage in ("[" * 10**5, whole[:-3] + f', "n": {"9" * 5000}}}', "\0", "[1]"):
        (folder / name).write_text(damage)
        refused(folder, f"{name}: (broken JSON|a JSON object)")


def test_code_beside_the_model_is_not_run(folder, canary):
    """`transformers` knows a place for a `generate` of the model's own."""
    (folder / "custom_generate").mkdir()
    code = f"open({str(canary)!r}, 'w').close()\ndef generate(model, **_): pass\n"
    (folder / "custom_generate/generate.py").write_text(code)
    (folder / "__init__.py").write_text(code)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    ValueModel.from_pretrained(folder)
    load_guided(folder, Guidance(beta=1.0))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_pickles_are_not_read(folder, refused, canary, name):
    (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    ValueModel.from_pretrained(folder)  # beside a safetensors file it is nothing
    (folder / "value_heads.safetensors").rename(folder / "there")
    refused(folder, "value_heads.safetensors: no such file")
    (folder / "there").rename(folder / "value_heads.safetensors")
    (folder / "model.safetensors").unlink()
    refused(folder, "safetensors")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(canary)))
    refused(folder, "no readable safetensors file|no causal language model can be read")


def test_an_adapter_is_no_model(folder, refused, canary, tmp_path):
    """`transformers` would follow its base model and read its weights, a pickle too."""
    adapted = CausalLM(make_hf("llama"))
    adapted.add_lora(LoraConfig(rank=2))
    adapted.save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(QvgptError, match=r"adapter_model\.safetensors: no such file"):
        adapted.load_adapter(tmp_path / "adapter")
    TOKENIZER.save(tmp_path / "adapter")
    change(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(folder))
    refused(tmp_path / "adapter", "holds an adapter of peft; merge it into its base model")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    refused(folder, "holds an adapter of peft; merge it into its base model")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters(name, tmp_path):
    adapted = CausalLM(make_hf("llama"))
    adapted.add_lora(LoraConfig(rank=2))
    adapted.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(broken(name, file.read_bytes()))
    with pytest.raises(QvgptError, match="no readable safetensors file"):
        adapted.load_adapter(tmp_path)


def test_weights_that_do_not_fit(tmp_path, refused):
    make_hf("llama").save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more, match in (
        ({"hidden_size": 32}, "do not fit|no causal language model"),
        ({"num_hidden_layers": 3}, "do not fit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        refused(tmp_path, match)
