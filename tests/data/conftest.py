import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qvgpt.data.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat", "Question: what is 1 + 1?\nAnswer: 2", "naïve café <eos> 日本"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def char():
    return Tokenizer.train(["abcdefghijklmnopqrstuvwxyz :?"], "char")


@pytest.fixture(scope="session")
def bpe():
    return Tokenizer.train(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A Hugging Face chat model's tokenizer, as found on disk: Qwen's manner in small."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=hf.pre_tokenizer.alphabet(),
                                   show_progress=False)
    )  # fmt: skip
    hf.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("hf")
    hf.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or raw lines) as JSONL and returns the path."""

    def writer(*rows, name="data.jsonl"):
        path = tmp_path / name
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        path.write_text("\n".join(lines) + "\n" if lines else "", "utf-8")
        return path

    return writer
