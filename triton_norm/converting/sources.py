"""Compiles a method again from an edited source, where that is the source of the code that runs."""

import __future__

import ast
import copy
import functools
import inspect
import linecache
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Holds the syntax of a method's file, of which only the method's class and the imports are left.

    The compiler's choice of instructions depends on the imports of a file.

    Args:
        function: the method, without decorators.
        definition: its syntax, a part of `tree`, to be edited.
    """

    function: Any
    tree: ast.Module
    definition: ast.FunctionDef


def source_of(method: Any) -> Source | str:
    """Returns the source of a method, or why it can't be edited."""
    function = inspect.unwrap(method)
    if not isinstance(function, FunctionType) or function.__code__.co_freevars:
        return "its forward is no plain function"
    source = _source(function)
    if source is None or _code(source) != function.__code__:
        return "the source of its forward is not at hand"
    return source


def compiled(method: Any, source: Source) -> Callable[..., Any] | str:
    """Returns a method of the edited source with the decorators of `method`, or why there is none."""
    code = _code(source._replace(tree=ast.fix_missing_locations(source.tree)))
    made: Any = _copied(source.function, code, ())
    for wrapper, inner in reversed(list(_wrappers(method))):
        made = _around(made, wrapper, inner)
    return "a decorator hides its forward" if made is None else made


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _source(function: FunctionType) -> Source | None:
    """Returns the source where the function's code says that it is, or None."""
    code = function.__code__
    try:
        whole = _parsed("".join(linecache.getlines(code.co_filename, function.__globals__)))
    except (SyntaxError, ValueError):
        return None
    for statement in whole.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and _encloses(statement, code.co_firstlineno):
            own = copy.deepcopy(statement)
            result = [node for node in ast.walk(own) if isinstance(node, ast.FunctionDef) and _is_of(node, code)]
            others = [other for other in whole.body if not isinstance(other, ast.ClassDef | ast.FunctionDef)]
            return Source(function, ast.Module([*others, own], []), result[0]) if len(result) == 1 else None
    return None


def _first_line(node: ast.ClassDef | ast.FunctionDef) -> int:
    return min(part.lineno for part in (node, *node.decorator_list))


def _encloses(node: ast.ClassDef | ast.FunctionDef, line: int) -> bool:
    return _first_line(node) <= line <= (node.end_lineno or 0)


def _is_of(node: ast.FunctionDef, code: CodeType) -> bool:
    return node.name == code.co_name and _first_line(node) == code.co_firstlineno


def _code(source: Source) -> CodeType | None:
    """Returns the code of the function in this source, compiled as its file was."""
    code = source.function.__code__
    flags = code.co_flags & __future__.annotations.compiler_flag
    try:
        inside: list[CodeType] = [compile(source.tree, code.co_filename, "exec", flags, dont_inherit=True)]
    except (SyntaxError, ValueError):
        return None
    for each in inside:
        if (each.co_name, each.co_firstlineno) == (code.co_name, code.co_firstlineno):
            return each
        inside.extend(constant for constant in each.co_consts if isinstance(constant, CodeType))
    return None


def _wrappers(method: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each decorator's function from the outside in, with the function inside."""
    while hasattr(method, "__wrapped__"):
        yield method, method.__wrapped__
        method = method.__wrapped__


def _around(made: Any, wrapper: Any, inner: Any) -> Callable[..., Any] | None:
    """Returns a copy of a decorator's function that calls `made` in place of `inner`, or None."""
    if made is None or not isinstance(wrapper, FunctionType):
        return None
    cells = wrapper.__closure__ or ()
    contents = [_content(cell) for cell in cells]
    if not any(content is inner for content in contents):
        return None
    own = CellType()  # a decorator's function may refer to itself
    chosen = (
        CellType(made) if content is inner else own if content is wrapper else cell
        for cell, content in zip(cells, contents, strict=True)
    )
    copied = own.cell_contents = _copied(wrapper, wrapper.__code__, tuple(chosen))
    functools.update_wrapper(copied, made)
    return copied


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _copied(function: FunctionType, code: Any, closure: tuple[CellType, ...]) -> FunctionType:
    """Returns a function with the attributes of another, and its own code and closure."""
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure or None)
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, function)
    del copied.__wrapped__  # type: ignore[attr-defined]
    return copied
