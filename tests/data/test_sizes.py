import re
from pathlib import Path

import pytest

from qvgpt.data.sizes import GPTShape, TokenizerConfig, context_for
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions

PAGE = (Path(__file__).parents[2] / "docs/your_logs.md").read_text()


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "layers"),
    [(0, 64, 2, 2), (299_999, 64, 2, 2), (300_000, 192, 3, 3), (800_000, 256, 4, 4)],
)
def test_a_shape_follows_from_the_amount_of_text(tokens, width, heads, layers):
    fitted = GPTShape().fitted_to(tokens, 100)
    assert fitted == GPTShape(width, heads, layers, 256)
    assert not fitted.is_open
    assert fitted.fitted_to(10**9, 10**9) == fitted


def test_what_is_said_of_a_shape_stays_and_the_rest_goes_with_it():
    for said, expected in {
        GPTShape(embed_dim=16): (16, 2, 2),
        GPTShape(embed_dim=17, num_layers=5): (17, 1, 5),
        GPTShape(embed_dim=512): (512, 8, 2),
        GPTShape(num_heads=3): (66, 3, 2),
    }.items():
        fitted = said.fitted_to(1000, 9)
        assert (fitted.embed_dim, fitted.num_heads, fitted.num_layers) == expected
    assert GPTShape(seq_len=24).fitted_to(1000, 999).seq_len == 24
    with pytest.raises(QvgptError, match=r"gpt\.seq_len: must be at least 1, not 0"):
        GPTShape(seq_len=0)


def test_a_context_holds_the_longest_text_and_what_is_written_after_it():
    assert [context_for(n) for n in (0, 64, 65, 1920, 1921, 9000)] == [
        128, 192, 256, 2048, 2048, 2048
    ]  # fmt: skip


def test_a_context_has_room_for_what_is_asked():
    assert GPTShape().fitted_to(1000, 20, 1000).seq_len == 1024
    assert GPTShape().fitted_to(1000, 9999, 3000).seq_len == 3008
    assert GPTShape().fitted_to(1000, 100, 10).seq_len == 256


def test_a_vocabulary_follows_from_the_characters():
    def size(characters, **said):
        return TokenizerConfig(**said).fitted_to(characters).vocab_size

    assert [size(n) for n in (0, 600_000, 10**8)] == [500, 1000, 8000]
    assert size(10, kind="char") == 8000  # of which there are as many as there are
    assert size(10**8, vocab_size=300) == 300
    assert size(10, path="there") is None


def test_epochs_and_rates_follow_from_data_and_model():
    def fitted(texts, tokens, width, scratch=True, lora=False, **said):
        options = FitOptions(**said)
        found = options.fitted_to(texts, tokens, width, from_scratch=scratch, adapters=lora)
        return found.epochs, found.lr, found.value_lr

    assert fitted(1500, 36_000, 64) == (20, 4e-3, 4e-3)
    assert fitted(29_000, 1_000_000, 256) == (14, 1e-3, 1e-3)
    assert fitted(10**7, 10**9, 512) == (1, 5e-4, 1e-3)  # fresh heads are no slower than that
    assert fitted(4000, 10**5, 64, scratch=False) == (3, 1e-3, 1e-3)
    assert fitted(10**5, 10**6, 768, scratch=False) == (1, 8.3e-5, 1e-3)
    assert fitted(10**5, 10**6, 768, scratch=False, lora=True)[1] == 8.3e-4
    assert fitted(10, 100, 64, epochs=0.5, lr=0.1) == (0.5, 0.1, None)
    assert fitted(10, 100, 64, value_lr=0.1) == (20, 4e-3, 0.1)
    assert FitOptions().passes == 1  # of `fit` in memory


def test_the_page_says_the_same():
    table = re.findall(r"^\| ([\w ,]+) tokens \| (\d) × (\d+), (\d) heads \| (\d+)", PAGE, re.M)
    below = {"below 300,000": 299_999, "below 800,000": 600_000, "more": 10**6}
    assert {name for name, *_ in table} == set(below)
    for name, *figures in table:
        shape = GPTShape().fitted_to(below[name], 9)
        epochs = FitOptions().fitted_to(9, below[name], 64, from_scratch=True).epochs
        expected = [shape.num_layers, shape.embed_dim, shape.num_heads, epochs]
        assert [*map(int, figures)] == expected
