"""Checks of types while tests run, of each function of a package, jaxtyping's shapes among them.

Of every test the first `CHECKED` calls of a function are checked, then one of `EVERY`: a training
asks the same of the same function hundreds of times. (jaxtyping's own import hook checks all of
them, arguments twice, which was two fifths of the time that the tests took.)
"""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

P, R, C = ParamSpec("P"), TypeVar("R"), TypeVar("C", bound=type)
CHECKED, EVERY = 10, 64
types = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


class Running:
    """The number of the test that runs."""

    test = 0


class _Choice:
    """Which form of a function is called: as it is, or with its types checked."""

    def __init__(self, function: Callable[..., Any]):
        self.plain, self.strict = function, None
        self.test = self.calls = 0

    def __call__(self) -> Callable[..., Any]:
        if self.test != Running.test:
            self.test, self.calls = Running.test, 0
        self.calls += 1
        if self.calls > CHECKED and self.calls % EVERY:
            return self.plain
        if self.strict is None:  # made when it is first needed, for most never are
            _forget_unknown(self.plain)
            self.strict = jaxtyped(typechecker=None)(types(self.plain))
        return self.strict


def _forget_unknown(function: Callable[..., Any]) -> None:
    """Let annotations be `Any` whose names are imported for type checkers alone."""
    for name, hint in function.__annotations__.items():
        if isinstance(hint, str):
            try:
                eval(hint, function.__globals__)
            except NameError:
                function.__annotations__[name] = Any


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, its types checked in the calls that count (a generator's in all)."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return jaxtyped(typechecker=types)(function)
    form = _Choice(function)

    @functools.wraps(function)
    def typed(*args: P.args, **kwargs: P.kwargs) -> R:
        return form()(*args, **kwargs)

    return typed


def checked_fields(kind: C) -> C:
    """A dataclass, the types of its fields checked when it is made; another class as it is."""
    if dataclasses.is_dataclass(kind) and "__init__" in vars(kind):
        kind.__init__ = checked(kind.__init__)
    return kind


class _Decorate(ast.NodeTransformer):
    """Every function and class gets its decorator; coroutines have none: uvicorn calls one to see
    whether it is a factory, and Python's own error says that it is not."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(self._of(checked, node))  # others may drop annotations
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, self._of(checked_fields, node))
        return self.generic_visit(node)

    @staticmethod
    def _of(decorator: Callable[..., Any], node: ast.AST) -> ast.expr:
        module = f"__import__('sys').modules[{__name__!r}]"
        [found] = ast.parse(f"{module}.{decorator.__name__}").body
        for part in ast.walk(found):
            ast.copy_location(part, node)
        return found.value


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = _Decorate().visit(ast.parse(importlib.util.decode_source(data), path))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        # another name where `_Decorate` makes something else of a file
        own = functools.partial(importlib.util.cache_from_source, optimization="typed2")
        with patch("importlib._bootstrap_external.cache_from_source", own):
            super().exec_module(module)


class _Finder:
    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """From now on what is imported of a package is checked."""
    assert not any(name.partition(".")[0] == package for name in sys.modules)
    sys.meta_path.insert(0, _Finder(package))
