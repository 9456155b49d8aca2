"""What tokens are in bytes: a token may be a part of a character, or of several."""

import re
from collections.abc import Sequence

from qvgpt.data.tokenizer import Tokenizer

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
"""GPT-2's alphabet, in which byte-level vocabularies spell their tokens."""


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    """The bytes of a token, be it where it may; None for special tokens and unknown ids."""
    entry = tokenizer.entry(token)
    if entry is None:
        return None
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", entry):
        return bytes.fromhex(fallback[1])
    if all(c in _BYTE_OF for c in entry):
        spelled = bytes(_BYTE_OF[c] for c in entry)
        if spelled.decode(errors="replace") == tokenizer.decode([token], skip_special=False):
            return spelled
    return entry.replace("▁", " ").encode()


def text_bytes(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[tuple[str, bytes | None]]:
    """Each token of a text as `Tokenizer.pieces` shows it, and its bytes; None: a special token.

    Joined, the bytes are the text in UTF-8. Half a character that nothing completes keeps the
    bytes it has.
    """
    found: list[tuple[str, bytes | None]] = []
    pieces = tokenizer.pieces(tokens)
    begun = 0  # tokens[begun:i] are parts of a character that is not whole yet
    for i, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        raw = token_bytes(tokenizer, token)
        if raw is None or (begun == i and piece and "\ufffd" not in piece):
            found.append((piece, None if raw is None else piece.encode()))
            begun = i + 1
            continue
        found.append((piece, raw))
        if piece:
            group = [spelled or b"" for _, spelled in found[begun:]]
            if b"".join(group).decode(errors="replace") != piece:  # spelled in no way known here
                found[begun:] = [(p, p.encode()) for p, _ in found[begun:]]
            begun = i + 1
    return found
