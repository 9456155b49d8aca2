"""Tiny Hugging Face models of several families, with weights far from their start."""

import torch
import transformers
from transformers import AutoModelForCausalLM

from qvgpt.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz :?"], "char")
PROMPTS = [TOKENIZER.encode_prompt(c) for c in "abcdefgh"]
SIZES = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6}),
}


def make_hf(family, **options):
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **more, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model
