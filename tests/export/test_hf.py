"""What is exported must be an ordinary checkpoint, and equal to the guidance it stands for."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.errors import QvgptError
from qvgpt.export import ExportOptions, export_hf, export_model
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

PEFT_ITSELF = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TOKENIZER = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz"], "char")
DIALOGUE = Trajectory([1, 9, 2, 7, 3], [False] * 3 + [True] * 2, [0.0] * 5, terminated=True)
TEXTS = [[1, 7, 9, 2, 8, 8, 3], DIALOGUE]


def save_model(path, heads, tied=True, recommended=None):
    torch.manual_seed(0)
    model = ValueModel(GPT(TOKENIZER.vocab_size, 16, 2, 2, 48, tied=tied), heads, TOKENIZER)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.info.recommended_guidance = recommended
    model.save(path)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear"])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_reads_the_guided_model(tmp_path, kind, tied):
    model = save_model(tmp_path / "model", HeadsConfig(kind, rank=5), tied)
    manifest = export_hf(tmp_path / "model", tmp_path / "new" / "out", beta=2.0)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").eval()
    tokens = torch.randint(0, TOKENIZER.vocab_size, (3, 20))
    exact = next_token(model, model.trunk.hidden(tokens).flatten(0, 1), Guidance(beta=2.0)).logprob
    found = hf(tokens).logits.flatten(0, 1).log_softmax(-1)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    assert not hf.config.tie_word_embeddings
    torch.testing.assert_close(
        hf.transformer.wte.weight, model.trunk.token_embedding.weight, atol=0, rtol=0
    )
    assert manifest["fidelity"]["max_abs_logit_difference"] < 1e-4
    assert manifest["fidelity"]["greedy_agreement"] == 1.0
    assert abs(manifest["fidelity"]["mean_kl"]) < 1e-6
    assert manifest["fidelity"]["states"] > 16


@torch.no_grad()
@pytest.mark.parametrize("to", ["hf", pytest.param("lora", marks=PEFT_ITSELF)])
def test_rows_that_only_pad_the_vocabulary_are_silent_and_v_is_read_beside_them(tmp_path, to):
    torch.manual_seed(0)
    known = TOKENIZER.vocab_size
    heads = HeadsConfig("bilinear", v="linear")
    model = ValueModel(GPT(known + 30, 16, 2, 2, 48), heads, TOKENIZER).eval()
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))
    model.save(tmp_path / "model")
    told = ExportOptions(to=to, beta=2.0, value_rows=True)
    said = export_model(tmp_path / "model", tmp_path / "out", told, prompts=[[1, 7, 2], [1, 9, 2]])
    assert said["fidelity"]["v"]["rmse"] < 1e-4
    place = tmp_path / "out" / ("" if to == "hf" else "base")
    silent = json.loads((place / "generation_config.json").read_text())["suppress_tokens"]
    assert sorted(silent) == list(range(known, known + 30))


def test_the_directory_is_whole(tmp_path):
    save_model(tmp_path / "model", HeadsConfig(), recommended={"beta": 1.5, "top_k": 9})
    manifest = export_hf(tmp_path / "model", tmp_path / "out", texts=TEXTS)
    out = tmp_path / "out"
    assert manifest == json.loads((out / "export.json").read_text())
    assert manifest["beta"] == 1.5
    assert manifest["not_in_the_weights"] == {"top_k": 9}
    assert manifest["fidelity"]["states"] == 7 + 2  # all of a list, the actions of a trajectory
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [3, 4]
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == TOKENIZER.encode("abc")
    assert not list(out.glob("value*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    ValueModel.from_pretrained(out)  # ours again, as a plain language model
    card = (out / "README.md").read_text()
    assert "top_k 9" in card
    assert "β = 1.5" in card


def test_min_twins_become_their_mean_and_the_cost_is_told(tmp_path):
    save_model(tmp_path / "model", HeadsConfig(), recommended={"beta": 1.0, "twins": "min"})
    mean = export_hf(tmp_path / "model", tmp_path / "mean", twins="mean", texts=TEXTS)
    low = export_hf(tmp_path / "model", tmp_path / "min", texts=TEXTS)
    assert low["twins"] == "min"
    assert low["fidelity"]["mean_kl"] > 1e-3 > abs(mean["fidelity"]["mean_kl"])
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("mean", "min")]
    assert weights[0] == weights[1]


@torch.no_grad()
def test_what_truncation_would_change_is_told(tmp_path):
    recommended = {"beta": 1.5, "top_k": 2, "temperature": 0.5}
    model = save_model(tmp_path / "model", HeadsConfig(), recommended=recommended)
    found = export_hf(tmp_path / "model", tmp_path / "out", texts=TEXTS[:1])["fidelity"]
    hidden = model.trunk.hidden(torch.tensor(TEXTS[:1]))[0]
    whole = next_token(model, hidden, Guidance(beta=1.5)).logprob
    base = next_token(model, hidden, Guidance()).logprob
    kept = whole.gather(1, base.topk(2).indices)  # of two kept, all else lies outside
    lost = -kept.logsumexp(-1).mean()
    assert found["recommended_kl"] == pytest.approx(float(lost), rel=1e-4)
    both = [
        next_token(model, hidden, Guidance(beta=1.5, twins=twins)).logprob
        for twins in ("min", "mean")
    ]
    kl = (both[0].exp() * (both[0] - both[1])).sum(-1).mean()
    assert found["twins_kl"] == pytest.approx(float(kl), rel=1e-4)


def test_half_precision_is_told_too(tmp_path):
    save_model(tmp_path / "model", HeadsConfig())
    made = export_hf(tmp_path / "model", tmp_path / "out", beta=1.0, dtype="bfloat16", texts=TEXTS)
    assert 1e-4 < made["fidelity"]["max_abs_logit_difference"] < 1.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_only_so_many_texts_are_compared(tmp_path):
    save_model(tmp_path / "model", HeadsConfig())
    made = export_hf(tmp_path / "model", tmp_path / "out", beta=1.0, texts=TEXTS, max_texts=1)
    assert made["fidelity"]["states"] == 7


def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path):
    save_model(tmp_path / "mlp", HeadsConfig("mlp"))
    save_model(tmp_path / "plain", None)
    save_model(tmp_path / "linear", HeadsConfig())
    cases = {"mlp": "to be fitted on 32 states or more", "plain": "no value heads"}
    for name, message in cases.items():
        with pytest.raises(QvgptError, match=message):
            export_hf(tmp_path / name, tmp_path / "out", beta=1.0, texts=TEXTS)
    with pytest.raises(QvgptError, match="say which one"):
        export_hf(tmp_path / "linear", tmp_path / "out")
    with pytest.raises(QvgptError, match="no such directory"):
        export_hf(tmp_path / "nowhere", tmp_path / "out", beta=1.0)
    with pytest.raises(QvgptError, match="not an empty directory"):
        export_hf(tmp_path / "linear", tmp_path / "mlp", beta=1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["linear", "mlp", "plain"]
    (tmp_path / "out").mkdir()  # an empty one is welcome
    export_hf(tmp_path / "linear", tmp_path / "out", beta=1.0, texts=TEXTS)
