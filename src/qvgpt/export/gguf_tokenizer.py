"""A tokenizer in a GGUF file, where llama.cpp has a twin of it.

llama.cpp splits text by one of the regular expressions it knows by name, then merges bytes. Three
of them are found here by what `tokenizer.json` says. Tokenizers of characters have a twin too:
each byte is a symbol, and the bytes of one character are merged, left to right, and nothing else.
There a character that was never seen is left out, where ours says <unk>.
"""

from pathlib import Path
from typing import Any

from qvgpt.data.token_bytes import BYTE_LETTERS
from qvgpt.errors import QvgptError
from qvgpt.models.disk import read_json

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_BY_REGEX = {_LLAMA_3: "llama-bpe", _QWEN_2: "qwen2"}
_NO_TWIN = "gguf: llama.cpp has no twin of this tokenizer"


def add_tokenizer(gguf: Any, writer: Any, directory: Path, config: dict[str, Any]) -> None:
    """Write vocabulary, merges, special ids and chat template of a Hugging Face directory.

    Raises `QvgptError` with the reason where llama.cpp would read text otherwise.
    """
    said = read_json(directory / "tokenizer.json")
    model = said["model"]
    if model.get("type") != "BPE":
        raise QvgptError(f"{_NO_TWIN}: it is a {model.get('type')}, not byte-level BPE")
    if said.get("normalizer") not in (None, {"type": "NFC"}):
        raise QvgptError(f"{_NO_TWIN}: it normalises text ({said['normalizer'].get('type')})")
    pieces: dict[int, str] = {i: piece for piece, i in model["vocab"].items()}
    added = {token["id"]: token for token in said.get("added_tokens", [])}
    if is_char(said):
        name, merges = "gpt-2", _character_merges(pieces, added)
        pieces = {i: p if i in added else to_bytes(p) for i, p in pieces.items()}
    else:
        name = _pre_tokenizer(said.get("pre_tokenizer"))
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds, tokens, types = gguf.TokenType, list[str](), list[int]()
    for i in range(config["vocab_size"]):
        token = added.get(i)
        if token is not None:
            tokens.append(token["content"])
            types.append(kinds.CONTROL if token["special"] else kinds.USER_DEFINED)
        else:
            tokens.append(pieces.get(i, f"[PAD{i}]"))
            types.append(kinds.NORMAL if i in pieces else kinds.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    _add_specials(writer, directory, {t["content"]: i for i, t in added.items()})


def is_char(said: dict[str, Any]) -> bool:
    """Whether `tokenizer.json` is that of a tokenizer of single characters."""
    model = said["model"]
    special = {token["content"] for token in said.get("added_tokens", [])}
    plain = said.get("pre_tokenizer") is None and not model["merges"]
    return plain and all(len(piece) == 1 or piece in special for piece in model["vocab"])


def to_bytes(text: str) -> str:
    """Its UTF-8 bytes, each as the character that stands for it in GPT-2's vocabulary."""
    return "".join(BYTE_LETTERS[byte] for byte in text.encode())


def _character_merges(pieces: dict[int, str], added: dict[int, Any]) -> list[str]:
    """What puts the bytes of each character together; shorter beginnings first.

    Where nothing has to be, a pair of bytes that no text has: llama.cpp wants some.
    """
    found: dict[str, None] = {}
    for piece in (p for i, p in sorted(pieces.items()) if i not in added):
        symbols = to_bytes(piece)
        for k in range(1, len(symbols)):
            found[f"{symbols[:k]} {symbols[k]}"] = None
    return sorted(found, key=len) or [f"{BYTE_LETTERS[255]} {BYTE_LETTERS[255]}"]


def _pre_tokenizer(said: Any) -> str:
    """llama.cpp's name of how text is split before bytes are merged."""
    steps = [said] if (said or {}).get("type") != "Sequence" else said["pretokenizers"]
    kinds = [(step or {}).get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        if steps[0].get("add_prefix_space"):
            raise QvgptError(f"{_NO_TWIN}: it puts a space before every text")
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        regex = steps[0]["pattern"].get("Regex")
        if regex in _BY_REGEX and steps[0]["behavior"] == "Isolated":
            return _BY_REGEX[regex]
        raise QvgptError(f"{_NO_TWIN}: it splits text by {regex}")
    raise QvgptError(f"{_NO_TWIN}: before merging it splits text by {kinds}")


def _add_specials(writer: Any, directory: Path, ids: dict[str, int]) -> None:
    """Begin, end and padding, and what stands before every text: BOS, where there is one."""
    said = read_json(directory / "tokenizer_config.json")
    config = read_json(directory / "config.json")
    for name in ("bos", "eos", "pad"):
        found = config.get(f"{name}_token_id")
        if isinstance(found, int):
            getattr(writer, f"add_{name}_token_id")(found)
    if "<eot>" in ids:
        writer.add_eot_token_id(ids["<eot>"])
    if "<unk>" in ids:
        writer.add_unk_token_id(ids["<unk>"])
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    writer.add_add_bos_token(bos is not None and bos != eos)
    writer.add_add_eos_token(False)
    if said.get("chat_template"):
        writer.add_chat_template(said["chat_template"])
