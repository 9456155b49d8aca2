"""The bytes that each token adds to a text, which need not be whole characters."""

import json
import re

from qvgpt.data.tokenizer import Tokenizer

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_LETTERS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
"""GPT-2's letters for bytes: printable ones stand for themselves, others from 256 on."""
_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes by token id; joined, those of a text's tokens are the text in UTF-8.

    A special token has none. A space that a tokenizer leaves out at the beginning of a text is
    there all the same.
    """

    def __init__(self, tokenizer: Tokenizer):
        hf = tokenizer._hf
        decoder = json.dumps(json.loads(hf.to_str())["decoder"])
        self._tokenizer, self._added = tokenizer, hf.get_added_tokens_decoder()
        self._letters = _BYTES if '"ByteLevel"' in decoder else None
        self._single = '"ByteFallback"' in decoder
        self._before = tokenizer.encode("a")
        self._known: dict[int, bytes] = {}
        self.longest = max(map(len, hf.get_vocab(with_added_tokens=True)))
        """Of all tokens; in characters, or in bytes where tokens are of bytes."""

    def __getitem__(self, token: int) -> bytes:
        """Those of one token; none of an id that no token has."""
        if token not in self._known:
            self._known[token] = self._of(token)
        return self._known[token]

    def name(self, token: int) -> str:
        """The token for a reader: its text, or a special token's name."""
        if token in self._tokenizer._special_ids:
            return self._tokenizer.decode([token], skip_special=False)
        return self[token].decode("utf-8", "replace")

    def _of(self, token: int) -> bytes:
        piece = self._tokenizer._hf.id_to_token(token)
        if piece is None or token in self._tokenizer._special_ids:
            return b""
        if token in self._added:
            return piece.encode()
        if self._letters is not None:
            known = all(c in self._letters for c in piece)
            return bytes(self._letters[c] for c in piece) if known else piece.encode()
        if self._single and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, token])[len(before) :].encode()
