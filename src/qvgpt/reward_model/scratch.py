"""A small BERT or RoBERTa from nothing, its size and tokenizer taken from the data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qvgpt.errors import QvgptError

Family = Literal["bert", "roberta"]
_SIZES = ((50_000, 128, 2), (500_000, 192, 3))
"""Up to so many examples: width and depth."""
_LARGEST = (256, 4)


@dataclass(frozen=True)
class Size:
    """A model from scratch; what is left open follows from the number of examples."""

    width: int | None = None
    """Of hidden states, a multiple of 32 (none: 128; from 50,000 examples 192, 500,000 256)."""
    layers: int | None = None
    """Depth (none: 2, 3 or 4)."""
    vocab_size: int | None = None
    """Entries of the tokenizer, at most (none: 2000 to 8000, a quarter of the examples)."""
    dropout: float = 0.1
    """Share of activations dropped while training."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the key."""
        if self.width is not None and (self.width < 32 or self.width % 32):
            raise QvgptError(f"size.width: a multiple of 32 was expected, not {self.width}")
        for name, least in (("layers", 1), ("vocab_size", 10)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise QvgptError(f"size.{name}: must be at least {least}, not {given}")
        if not 0 <= self.dropout < 1:
            raise QvgptError(f"size.dropout: must be 0 or more and below 1, not {self.dropout}")

    def fitted_to(self, examples: int) -> "Size":
        """With nothing left open."""
        width, layers = next(((w, d) for n, w, d in _SIZES if examples < n), _LARGEST)
        vocab = min(8000, max(2000, examples // 4))
        return Size(
            width if self.width is None else self.width,
            layers if self.layers is None else self.layers,
            vocab if self.vocab_size is None else self.vocab_size,
            self.dropout,
        )


def new_tokenizer(texts: Sequence[str], family: Family, vocab_size: int) -> Any:
    """A `transformers` tokenizer, trained on the texts.

    bert: WordPiece on lower-cased words, where a Chinese character is a word. roberta: byte-level
    BPE, which tells upper from lower case.
    """
    from transformers import PreTrainedTokenizerFast

    if family == "bert":
        named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
        kept = _word_pieces(texts, vocab_size, [*named.values()])
    else:
        named = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        kept = Tokenizer(models.BPE())
        kept.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        kept.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*named.values()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        kept.train_from_iterator(texts, trainer)
    if family == "bert":
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    else:
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
    framing = [named[name] for name in ("cls", "bos", "sep", "eos") if name in named]
    kept.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, kept.token_to_id(token)) for token in framing],
    )
    tokens = {f"{name}_token": token for name, token in named.items()}
    if family == "roberta":
        tokens |= {"cls_token": "<s>", "sep_token": "</s>"}
    reads = ["input_ids", "attention_mask"]
    if family == "bert":
        reads.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(tokenizer_object=kept, model_input_names=reads, **tokens)


def _word_pieces(texts: Sequence[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """BERT's tokenizer, the same for the same texts.

    The trainer gives the pieces `##c` numbers in the order of a hash table, and by these settles
    ties: so they are told it beforehand, as if they were special tokens, by frequency.
    """
    normalise, cut = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in cut.pre_tokenize_str(normalise.normalize_str(text)))
    letters: Counter[str] = Counter()
    for word, n in counts.items():
        for letter in _letters(word):
            letters[letter] += n
    known = sorted(letters, key=lambda x: (-letters[x], x))[: 3 * vocab_size // 4]
    all_known = frozenset(known).issuperset
    words = sorted(word for word in counts if all_known(_letters(word)))
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer: Any = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*specials, *known], show_progress=False
    )
    trained.train_from_iterator((" ".join([w] * counts[w]) for w in words), trainer)
    vocab = trained.get_vocab()
    kept = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    kept.add_special_tokens([*specials])
    kept.normalizer, kept.pre_tokenizer, kept.decoder = normalise, cut, decoders.WordPiece()
    return kept


def _letters(word: str) -> list[str]:
    """As WordPiece writes them."""
    return [*word[:1], *(f"##{letter}" for letter in word[1:])]


def new_model(
    family: Family, size: Size, tokenizer: Any, longest: int, labels: dict[str, Any]
) -> Any:
    """Fresh weights for texts of at most `longest` tokens; `labels` go into the configuration."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    assert size.width is not None
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "intermediate_size": 4 * size.width,
        "hidden_dropout_prob": size.dropout,
        "attention_probs_dropout_prob": size.dropout,
        "pad_token_id": tokenizer.pad_token_id,
        **labels,
    }
    if family == "bert":
        return BertForSequenceClassification(BertConfig(max_position_embeddings=longest, **options))
    return RobertaForSequenceClassification(
        RobertaConfig(
            max_position_embeddings=longest + tokenizer.pad_token_id + 1,
            type_vocab_size=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **options,
        )
    )
