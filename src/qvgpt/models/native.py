"""`native.c`, compiled on the machine that decodes: a step of a GPT or of its heads in one call.

    native.of(torch.bfloat16)                  # None: no C compiler, or it could not

It is compiled once for a machine and dtype (0.7 s), by `cc` or what the variable QVGPT_CC names
(set it to nothing to do without), into the user's cache directory. All it does torch does too,
slower where few rows leave little to do: a layer of a step is eleven calls of operators, each of
which gathers its threads anew.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qvgpt.models.kv_cache import KVCache

logger = logging.getLogger("qvgpt.native")
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi")
_LANES, _PAIR, _BLOCK = 16, 32, 256
_SUFFIX = {torch.float32: "", torch.bfloat16: "BFLOAT16"}
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_PLAIN = {"n": _COUNT, "x": ctypes.c_double}
_TAKES = {
    "linear": "WWWWWnnnnnf",
    "attend": "WWflnnnnnf",
    "step": "Wppllnnnf",
    "gathered": "ffflffnnnnnf",
    "spend": "ffffxxxnnnnf",
    "sample": "lfdnnnf",
    "values": "fppflnnnnnf",
}
"""Of each function: W numbers of its weights' dtype, f floats, l int64, d doubles; n a count, x a
number, p the address of a structure."""
_NUMBERS = {"f": torch.float32, "l": torch.int64, "d": torch.float64}
_OF_FLOATS = {"gathered", "spend", "sample"}


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            "norm_1", "norm_1_bias", "norm_2", "norm_2_bias", "qkv", "qkv_bias", "out", "out_bias",
            "up", "up_bias", "down", "down_bias", "kv",
        )
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _COUNT) for name in ("layers", "vocab", "seq_len", "embed", "hidden", "heads")),
        ("eps", ctypes.c_float),
        *((name, _POINTER) for name in ("tokens", "positions", "norm", "norm_bias")),
    )


class _Head(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            "project", "project_bias", "base", "base_bias", "last", "last_bias", "weight", "mean",
        )
    )  # fmt: skip


class _Values(ctypes.Structure):
    _fields_ = (
        *(
            (name, _COUNT)
            for name in ("heads", "vocab", "embed", "width", "bins", "base_width", "relu")
        ),
        ("centres", _POINTER),
    )


class Native:
    """What was compiled for weights of one dtype."""

    def __init__(self, library: Path, dtype: torch.dtype):
        self.dtype, found = dtype, ctypes.CDLL(str(library))
        self._numbers = {**_NUMBERS, "W": dtype}
        self._functions: dict[str, Any] = {}
        for name, takes in _TAKES.items():
            if dtype == torch.float32 or name not in _OF_FLOATS:
                function = self._functions[name] = getattr(found, name)
                function.argtypes = [_PLAIN.get(kind, _POINTER) for kind in takes]
                function.restype = _COUNT

    def call(self, name: str, *arguments: Any) -> int:
        """What a function returns, of tensors and numbers as it takes them."""
        given = (
            argument if kind in "nxp" else _address(argument, self._numbers[kind])
            for kind, argument in zip(_TAKES[name], arguments, strict=True)
        )
        return self._functions[name](*given)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a matrix lies as it is read: rows one after the other, each of whole vectors."""
        return weight.is_contiguous() and weight.size(1) % _PAIR == 0

    def linear(
        self,
        x: Float[Tensor, "*rows in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None,
        gelu: bool = False,
        onto: Float[Tensor, "*rows out"] | None = None,
    ) -> Float[Tensor, "*rows out"]:
        """x Wᵀ + b through a GELU (tanh), or added `onto` something; for few rows."""
        (out, width), threads = weight.shape, torch.get_num_threads()
        x = x.contiguous()
        onto = None if onto is None else onto.contiguous()
        rows = x.numel() // width
        found = x.new_empty((*x.shape[:-1], out))
        work = _floats(rows * (out + 2 * width))
        self.call("linear", found, x, weight, bias, onto, gelu, width, out, rows, threads, work)
        return found

    def attend(
        self,
        qkv: Float[Tensor, "batch three_embed"],
        kv: Float[Tensor, "2 batch heads slots head_dim"],
        length: Int[Tensor, "batch"],
    ) -> Float[Tensor, "batch embed"]:
        """Stores each row's new key and value at its `length`; what its query finds up to there."""
        _, batch, heads, slots, head_dim = kv.shape
        threads = torch.get_num_threads()
        found = qkv.new_empty(batch, heads * head_dim)
        work = _floats(threads * (4 * head_dim + slots + _LANES))
        self.call("attend", found, qkv, kv, length, batch, heads, slots, head_dim, threads, work)
        return found

    def gathered(
        self,
        features: Float[Tensor, "rows features"],
        weight: Float[Tensor, "vocab features"],
        tokens: Int[Tensor, "rows candidates"],
        mean: Float[Tensor, "features"] | None = None,
        plus: Float[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows candidates"]:
        """features[i] · (weight[tokens[i, j]] − mean) + plus[i], of both what there is; in fp32."""
        features, tokens = features.contiguous(), tokens.contiguous()
        plus = None if plus is None else plus.contiguous()
        found, (vocab, width) = _floats(*tokens.shape), weight.shape
        rows, picks = tokens.shape
        unknown = self.call(
            "gathered", found, features, weight, tokens, mean, plus,
            vocab, width, rows, picks, torch.get_num_threads(), _floats(rows),
        )  # fmt: skip
        _refuse(unknown, tokens, vocab)
        return found

    def spend(
        self,
        base_logprob: Float[Tensor, "rows candidates"],
        q: Float[Tensor, "rows candidates"],
        budget: float,
        beta_max: float,
        close: float,
        most_steps: int,
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
        """β that spends a budget of KL, and what it spends: `decode.budget.solve_beta`."""
        base_logprob, q = base_logprob.contiguous(), q.contiguous()
        (rows, candidates), threads = q.shape, torch.get_num_threads()
        beta, spent, work = _floats(rows), _floats(rows), _floats(threads * 4 * candidates)
        self.call(
            "spend", beta, spent, base_logprob, q, budget, beta_max, close, rows, candidates,
            most_steps, threads, work,
        )  # fmt: skip
        return beta, spent

    def sample(
        self, logits: Float[Tensor, "rows candidates"], level: Float[Tensor, "rows 1"]
    ) -> Int[Tensor, "rows 1"]:
        """Where the sum of exp(logits), from the left, first exceeds `level` of the whole, a number
        in [0, 1) of fp64."""
        logits, level = logits.contiguous(), level.contiguous()
        rows, count = logits.shape
        found = torch.empty(rows, 1, dtype=torch.int64)
        work = _floats(rows * 2 * (count // _BLOCK + 1))
        self.call("sample", found, logits, level, rows, count, torch.get_num_threads(), work)
        return found


class NativeStep:
    """`GPT.hidden` of one new token a row, all of it in one call."""

    def __init__(
        self,
        native: Native,
        tokens: Float[Tensor, "vocab embed"],
        positions: Float[Tensor, "seq_len embed"],
        norm: tuple[Tensor, Tensor, float],
        layers: Sequence[Sequence[Tensor]],
        heads: int,
    ):
        """`layers`: the twelve weights of each, in the order of `_Layer`."""
        self.native, self._kept = native, (tokens, positions, norm, layers)
        self.embed, self.hidden = tokens.size(1), layers[0][8].size(0)
        self.vocab = tokens.size(0)
        of_model = (tokens, positions, *norm[:2])
        self._model = _Model(
            len(layers), self.vocab, positions.size(0), self.embed, self.hidden, heads, norm[2],
            *(_address(t, native.dtype) for t in of_model),
        )  # fmt: skip
        addresses = (tuple(_address(t, native.dtype) for t in layer) for layer in layers)
        self._layers = (_Layer * len(layers))(*addresses)

    @staticmethod
    def suits(embed: int, head_dim: int, weights: Sequence[Tensor]) -> bool:
        """Whether the sizes are of whole vectors, and all of it lies in order."""
        sizes = embed % _PAIR == 0 and head_dim % _LANES == 0
        return sizes and all(w.is_contiguous() and w.size(-1) % _PAIR == 0 for w in weights)

    def __call__(self, tokens: Int[Tensor, "batch 1"], cache: KVCache) -> Float[Tensor, "batch e"]:
        """Hidden states after the last norm; keys and values are stored, the lengths are not."""
        batch, slots, threads = len(tokens), cache.kv[0].size(3), torch.get_num_threads()
        tokens, length = tokens.contiguous(), cache.length.contiguous()
        if batch != cache.kv[0].size(1):
            raise ValueError(f"{batch} tokens for {cache.kv[0].size(1)} rows of the cache")
        # a copy, since another thread may be in here with a cache of its own
        table = type(self._layers).from_buffer_copy(self._layers)
        for layer, kv in zip(table, cache.kv, strict=True):
            layer.kv = _address(kv, torch.float32)
        found = torch.empty(batch, self.embed, dtype=self.native.dtype)
        wide = max(self.embed, self.hidden)
        own = batch * wide + self.embed + slots + _LANES
        work = _floats(batch * (5 * self.embed + self.hidden) + threads * own)
        model, layers = ctypes.addressof(self._model), ctypes.addressof(table)
        unknown = self.native.call(
            "step", found, model, layers, tokens, length, batch, slots, threads, work
        )
        _refuse(unknown, tokens, self.vocab)
        return found


@dataclass(frozen=True)
class HeadWeights:
    """What one value head is made of, as `native.c` reads it."""

    project: tuple[Tensor, Tensor | None] | None
    """Weight and bias of the layer before the tokens' rows; None: those read the state itself."""
    base: tuple[Tensor, Tensor | None] | None
    """Of the baseline's hidden layer."""
    last: Tensor
    """Of the baseline's last layer; like all that follow, in fp32."""
    last_bias: Tensor
    weight: Tensor
    """Rows of tokens."""
    mean: Tensor
    """Their mean."""

    def addresses(self, dtype: torch.dtype) -> list[int | None]:
        """In the order of `_Head`."""
        hidden = [*(self.project or (None, None)), *(self.base or (None, None))]
        rest = [self.last, self.last_bias, self.weight, self.mean]
        return [_address(t, dtype) for t in hidden] + [_address(t, torch.float32) for t in rest]


class NativeValues:
    """Q of a few tokens a row by several value heads of one form, all of it in one call."""

    def __init__(
        self, native: Native, heads: Sequence[HeadWeights], embed: int, relu: bool,
        centres: Float[Tensor, "bins"] | None,
    ):  # fmt: skip
        """`relu`: whether features pass through one; `centres`: of a distribution's bins."""
        self.native, self._kept = native, (heads, centres)
        first, self.bins = heads[0], 1 if centres is None else len(centres)
        self.vocab, rank = first.weight.shape
        self.embed, self.width, self.base_width = embed, rank * self.bins, first.last.size(1)
        self._values = _Values(
            len(heads), self.vocab, embed, self.width, self.bins, self.base_width, relu,
            _address(centres, torch.float32),
        )  # fmt: skip
        addresses = (head.addresses(native.dtype) for head in heads)
        self._heads = (_Head * len(heads))(*(_Head(*each) for each in addresses))

    @staticmethod
    def suits(embed: int, weights: Sequence[Tensor]) -> bool:
        """Whether states are of whole vectors, and so is each row of these, in order."""
        rows = all(w.is_contiguous() and w.size(1) % _LANES == 0 for w in weights)
        return rows and embed % _PAIR == 0

    def __call__(
        self,
        hidden: Float[Tensor, "rows embed"],
        tokens: Int[Tensor, "rows candidates"],
        least: bool,
        relative: bool,
    ) -> Float[Tensor, "rows candidates"]:
        """The heads' mean, or (`least`) the least; `relative`: up to a number a row."""
        hidden, tokens = hidden.contiguous(), tokens.contiguous()
        (rows, picks), threads, bins = tokens.shape, torch.get_num_threads(), self.bins
        found, count = _floats(rows, picks), len(self._heads)
        work = count * rows * (self.width + self.base_width + bins) + threads * (bins + _LANES)
        missing = self.native.call(
            "values", found, ctypes.addressof(self._values), ctypes.addressof(self._heads), hidden,
            tokens, least, relative, rows, picks, threads, _floats(rows * self.embed + work),
        )  # fmt: skip
        _refuse(missing, tokens, self.vocab)
        return found


@cache
def of(dtype: torch.dtype) -> Native | None:
    """What is there for weights of a dtype; the first call on a machine compiles it."""
    compiler = shutil.which(os.environ.get("QVGPT_CC", "cc"))
    if dtype not in _SUFFIX or compiler is None:
        return None
    try:
        return Native(_compiled(compiler, _SUFFIX[dtype]), dtype)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("native.c was not compiled, so torch decodes alone: %s", said)
        return None


def reads(*tensors: Tensor) -> bool:
    """Whether they are fp32 on a CPU and no gradient is asked of them."""
    no_gradient = not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    return no_gradient and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)
        for t in tensors
    )


def few(rows: int, embed: int) -> bool:
    """Whether states are so few that reading weights is what takes the time of a step."""
    return rows == 1 or rows * embed <= 2048  # beyond, oneDNN multiplies faster


def _compiled(compiler: str, name: str) -> Path:
    """The library of a dtype, from the user's cache directory if it was compiled before."""
    openmp = _openmp()
    command = [compiler, *_FLAGS, *([f"-D{name}"] if name else ())]
    said = [_SOURCE.read_text("utf-8"), *command, str(openmp), _processor()]
    digest = hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvgpt"
    library = base / f"native-{digest}.so"
    if library.exists():
        return library
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as directory:
        made, part = Path(directory) / "native.o", Path(directory) / library.name
        with_openmp = [str(openmp)] if openmp else ["-fopenmp"]
        for line in (
            [*command, "-c", str(_SOURCE), "-o", str(made)],
            [compiler, "-shared", str(made), *with_openmp, "-lm", "-o", str(part)],
        ):
            subprocess.run(line, check=True, capture_output=True, text=True, timeout=120)
        part.replace(library)  # whole or not at all, whoever else compiles it meanwhile
    return library


def _openmp() -> Path | None:
    """The OpenMP library that torch runs on: two of them would be two teams on the same cores."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.name.startswith(("libgomp", "libiomp5", "libomp")):
                return path
    return None


def _processor() -> str:
    """What tells processors apart: a home directory may be that of several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    known = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *sorted(set(known or lines[:1]))])


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _refuse(unknown: int, tokens: Tensor, vocab: int) -> None:
    if unknown:
        raise IndexError(f"tokens beyond the vocabulary of {vocab}: {tokens.tolist()}")


def _address(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Where it begins: C reads one number after the other and believes what they are said to be."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        said = f"{tensor.dtype}, strides {tensor.stride()}, on {tensor.device}"
        raise TypeError(f"native.c reads {dtype} in order on a CPU, not {said}")
    return tensor.data_ptr()
