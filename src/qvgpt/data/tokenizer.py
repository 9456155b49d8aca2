"""Text to token ids and back: train a tokenizer, or load any Hugging Face `tokenizer.json`.

User text can never become a special token here: `<eos>` typed by a user is five characters.
Special tokens enter a sequence only through the `Template`.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from qvgpt.errors import QvgptError

SPECIALS = ("<pad>", "<bos>", "<sep>", "<eos>", "<eot>")
"""Ids 0..4 of every tokenizer trained here; that they stand there is how we know it for ours."""
UNKNOWN = "<unk>"
_FAMILIAR_ENDS = ("<|endoftext|>", "</s>", "<eos>")
_BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class Template:
    """The ids that frame a text: `bos` prompt `sep` completion `eos`; `eot` ends a message."""

    bos: int
    sep: int | None
    eos: int
    eot: int | None
    pad: int

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a turn or a text."""
        return tuple(dict.fromkeys(i for i in (self.eos, self.eot) if i is not None))


class Tokenizer:
    """A `tokenizers.Tokenizer` together with its template."""

    def __init__(self, hf: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None):
        """Wrap `hf`; `config` is the content of `tokenizer_config.json`, kept by `save`.

        Raises `QvgptError` where neither `config` nor the vocabulary names an end token.
        """
        hf.encode_special_tokens = True
        hf.no_padding()
        hf.no_truncation()
        self._hf = hf
        self._config = dict(config or {})
        self.template = _find_template(hf, self._config)
        self.chat_template: str | None = _default_chat_template(self._config.get("chat_template"))
        unknown = _content(self._config.get("unk_token"))
        known_as = hf.token_to_id(unknown) if unknown else None
        self.unknown = None if known_as in self.template.end_ids else known_as
        """The id of what the vocabulary cannot say; None where it says everything."""
        self._special = {
            token.content: i
            for i, token in hf.get_added_tokens_decoder().items()
            if token.special
            and token.content != UNKNOWN
            # GPT-2 names its end token as the unknown one too.
            and (token.content != unknown or i in self.template.end_ids)
        }

    def count_unknown(self, texts: Iterable[Sequence[int]]) -> int:
        """How many of some texts, as tokens, have something that the vocabulary cannot say."""
        return 0 if self.unknown is None else sum(self.unknown in tokens for tokens in texts)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        kind: Literal["bpe", "char"] = "bpe",
        vocab_size: int = 8000,
    ) -> "Tokenizer":
        """Learn a vocabulary of at most `vocab_size` entries, specials included.

        `bpe`: byte-level with GPT-2's pre-tokeniser, lossless on any text (needs 261 entries or
        more). `char`: the most frequent characters; others become `<unk>`.
        """
        least = 256 + len(SPECIALS) if kind == "bpe" else len(SPECIALS) + 2
        if vocab_size < least:
            raise QvgptError(f"vocab_size {vocab_size} is too small: {kind} needs {least} or more")
        hf = _train_bpe(texts, vocab_size) if kind == "bpe" else _train_char(texts, vocab_size)
        pad, bos, sep, eos, eot = SPECIALS
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "additional_special_tokens": [sep, eot],
            "clean_up_tokenization_spaces": False,
        }
        if kind == "char":
            config["unk_token"] = UNKNOWN
        return cls(hf, config)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a directory with `tokenizer.json`, or GPT-2's `encoder.json` and `vocab.bpe`.

        Never touches the network and runs no code from the directory.
        Raises `QvgptError` where nothing is found or a file is damaged.
        """
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        config = _read_config(folder)
        file = folder / "tokenizer.json"
        try:
            if file.is_file():
                return cls(tokenizers.Tokenizer.from_str(file.read_text("utf-8")), config)
            for vocab, merges in _BPE_FILES:
                if (folder / vocab).is_file() and (folder / merges).is_file():
                    return cls(_gpt2_bpe(folder / vocab, folder / merges), config)
        except QvgptError as error:
            raise QvgptError(f"{folder}: {error}") from error
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise QvgptError(f"{folder}: the tokenizer cannot be read ({error})") from error
        raise QvgptError(
            f"no tokenizer in {folder}: expected a directory with tokenizer.json, "
            "or with encoder.json and vocab.bpe (or vocab.json and merges.txt)"
        )

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` reads them."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._hf.to_str(pretty=True), "utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        if not _content(config.get("eos_token")):
            config["eos_token"] = self._hf.id_to_token(self.template.eos)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")

    def with_special(self, names: Sequence[str]) -> "Tokenizer":
        """The same with more special tokens, whose ids follow the last one."""
        hf = tokenizers.Tokenizer.from_str(self._hf.to_str())
        hf.add_special_tokens(list(names))
        found = [hf.token_to_id(name) for name in names]
        if found != list(range(self.vocab_size, self.vocab_size + len(names))):
            raise QvgptError(f"this tokenizer has no room for {', '.join(names)} after its last id")
        other = Tokenizer(hf, self._config)
        other.chat_template = self.chat_template
        return other

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one, specials included."""
        return max(self._hf.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sha256(self) -> str:
        """Hex digest of what `tokenizer.json` says about text and ids, in canonical JSON."""
        content = json.loads(self._hf.to_str())
        content.pop("post_processor")  # never used here, and `transformers` rewrites it
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: no BOS is added, and special tokens in it are read as plain text."""
        ids = self._encode_part(text)
        if self._special_ids.isdisjoint(ids):
            return ids
        # Unigram and word-level models hold special strings as ordinary pieces: break them up.
        parts = self._special_pattern.sub(lambda m: m[0][0] + "\0" + m[0][1:], text).split("\0")
        ids = [i for part in parts for i in self._encode_part(part)]
        if not self._special_ids.isdisjoint(ids):
            raise QvgptError(f"this tokenizer reads a special token in the plain text {text!r}")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`, without the special tokens unless `skip_special` is False."""
        return self._hf.decode(list(ids), skip_special_tokens=skip_special)

    def decode_completion(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without the end token, special or not, where one was sampled."""
        ends = bool(ids) and ids[-1] in self.template.end_ids
        return self.decode(ids[:-1] if ends else ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One string per id, for display; special tokens by name.

        A character spread over several tokens is shown at the token that completes it, and the
        others show as "". Joined, the pieces give `decode(ids, skip_special=False)`.
        """
        shown = [""] * len(ids)
        context, start = 0, 0  # ids[context:start] is shown already and gives the spacing
        for i, token in enumerate(ids):
            special = token in self._special_ids
            if special or i + 1 == len(ids) or ids[i + 1] in self._special_ids:
                complete = True  # a broken character cannot be completed any more
            else:
                complete = not self.decode(ids[context : i + 1], False).endswith("\ufffd")
            if special:
                shown[i] = self.decode([token], False)
                context = start = i + 1
            elif complete:
                before = self.decode(ids[context:start], False)
                shown[i] = self.decode(ids[context : i + 1], False)[len(before) :]
                context, start = start, i + 1
        return shown

    def encode_prompt(self, prompt: str) -> list[int]:
        """`bos` prompt `sep`: what stands before a completion (no `sep` where there is none)."""
        sep = [] if self.template.sep is None else [self.template.sep]
        return [self.template.bos, *self.encode(prompt), *sep]

    def encode_messages(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool], list[int]]:
        """Tokens, is_action and the index of each token's message (-1: the template's own).

        Without a chat template: `bos`, then `role: ` and the text of each message, then `eot`;
        the assistant's have no role. With one, the assistant's tokens are what its message adds
        to the generation prompt, up to its end token.
        Raises `QvgptError` where a template rewrites earlier messages or fails.
        """
        if self.chat_template is not None:
            return self._encode_chat(messages, add_generation_prompt)
        end = self.template.eos if self.template.eot is None else self.template.eot
        tokens, is_action, owner = [self.template.bos], [False], [-1]
        for i, message in enumerate(messages):
            acts = message["role"] == "assistant"
            text = message["content"] if acts else f"{message['role']}: {message['content']}"
            added = [*self.encode(text), end]
            tokens += added
            is_action += [acts] * len(added)
            owner += [i] * len(added)
        return tokens, is_action, owner

    def encode_history(self, messages: list[dict[str, Any]]) -> list[int]:
        """What stands before the assistant's next message: `encode_messages`, but that a template
        may rewrite earlier messages (Qwen3's drops their thoughts)."""
        if self.chat_template is None:
            return self.encode_messages(messages)[0]
        self._refuse_specials(messages)
        return self._render(messages, True)

    def _refuse_specials(self, messages: list[dict[str, Any]]) -> None:
        for i, message in enumerate(messages):
            if found := self._special_pattern.search(message["content"]):
                raise QvgptError(f"message {i + 1} holds the special token {found[0]!r} as text")

    def _encode_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool
    ) -> tuple[list[int], list[bool], list[int]]:
        self._refuse_specials(messages)
        tokens: list[int] = []
        is_action: list[bool] = []
        owner: list[int] = []

        def extend(longer: list[int], acts: bool, index: int) -> None:
            if longer[: len(tokens)] != tokens:
                raise QvgptError(
                    "the chat template rewrites earlier messages, so that the tokens of message "
                    f"{max(index, 0) + 1} cannot be told apart: use a template that only appends"
                )
            added = len(longer) - len(tokens)
            last = added
            if acts:  # what follows the end token (a newline, say) is never sampled
                ends = [k for k in range(added) if longer[len(tokens) + k] in self.template.end_ids]
                last = ends[-1] + 1 if ends else added
            tokens.extend(longer[len(tokens) :])
            is_action.extend([acts] * last + [False] * (added - last))
            owner.extend([index] * last + [-1] * (added - last))

        for i, message in enumerate(messages):
            acts = message["role"] == "assistant"
            if acts:
                extend(self._render(messages[:i], True), False, -1)
            elif i + 1 < len(messages) and messages[i + 1]["role"] != "assistant":
                continue  # templates may demand that a system message is followed by a user's
            extend(self._render(messages[: i + 1], False), acts, i)
        if add_generation_prompt:
            extend(self._render(messages, True), False, -1)
        return tokens, is_action, owner

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> list[int]:
        try:
            text = self._transformers.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # whatever the template's own code raises
            raise QvgptError(f"the chat template fails on {len(messages)} messages: {error}") from (
                error
            )
        with _whole_characters():
            return self._transformers(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _transformers(self) -> Any:
        """The same tokenizer for `transformers`, which renders templates and reads specials."""
        from transformers import PreTrainedTokenizerFast

        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        known = {n: c for n in names if (c := _content(self._config.get(n)))}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(self._hf.to_str()),
            chat_template=self.chat_template,
            **known,
        )

    def _encode_part(self, text: str) -> list[int]:
        with _whole_characters():
            return self._hf.encode(text, add_special_tokens=False).ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@contextlib.contextmanager
def _whole_characters() -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise QvgptError("text with a lone surrogate (half a character) has no ids") from error


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    hf = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(texts, trainer)
    return hf


def _train_char(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    counts: dict[str, int] = {}
    for text in texts:
        for character in text:
            counts[character] = counts.get(character, 0) + 1
    specials = [*SPECIALS, UNKNOWN]
    kept = sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - len(specials)]
    vocab = {token: i for i, token in enumerate([*specials, *sorted(kept)])}
    hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    hf.add_special_tokens(specials)
    hf.decoder = decoders.Fuse()
    return hf


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    return hf


def _gpt2_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    hf = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    hf.add_special_tokens([t for t in _FAMILIAR_ENDS if hf.token_to_id(t) is not None])
    return hf


def _read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with what it leaves open filled in from the files beside it."""
    config = _read_json(folder / "tokenizer_config.json")
    for name in ("special_tokens_map.json", "generation_config.json", "config.json"):
        beside = _read_json(folder / name)
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if not config.get(key) and beside.get(key):
                config[key] = beside[key]
            if config.get(key + "_id") is None and beside.get(key + "_id") is not None:
                config[key + "_id"] = beside[key + "_id"]
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text("utf-8")
    return config


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise QvgptError(f"{file}: not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str | None:
    """The string of a special token, which files write as `"</s>"` or `{"content": "</s>"}`."""
    return token.get("content") if isinstance(token, dict) else token


def _default_chat_template(template: Any) -> str | None:
    if isinstance(template, list):  # the older form: several named ones
        return next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


def _find_template(hf: tokenizers.Tokenizer, config: dict[str, Any]) -> Template:
    if all(hf.id_to_token(i) == token for i, token in enumerate(SPECIALS)):
        return Template(bos=1, sep=2, eos=3, eot=4, pad=0)

    def find(name: str) -> int | None:
        token = _content(config.get(f"{name}_token"))
        if token and (found := hf.token_to_id(token)) is not None:
            return found
        given = config.get(f"{name}_token_id")
        return given[0] if isinstance(given, list) else given

    eos = find("eos")
    if eos is None:
        familiar = (hf.token_to_id(t) for t in _FAMILIAR_ENDS)
        eos = next((i for i in familiar if i is not None), None)
    if eos is None:
        raise QvgptError(
            "no end token is known: name eos_token in tokenizer_config.json, "
            "or eos_token_id in generation_config.json"
        )
    bos, pad = find("bos"), find("pad")
    return Template(
        bos=eos if bos is None else bos,
        sep=None,
        eos=eos,
        eot=None,
        pad=eos if pad is None else pad,
    )
