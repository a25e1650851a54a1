"""Rewrites a forward: an addition whose sum a norm takes next becomes one call with the norm."""

import ast
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

from triton_norm.converting.sources import compiled, source_of

METHOD = "_add_and_normalize"
"""Rewritten code calls this method: (norm, augend, addend) → (norm(augend + addend), augend + addend)."""

_INERT = (ast.Attribute, ast.Constant, ast.keyword, ast.List, ast.Name, ast.Starred, ast.Tuple)
"""These expressions compute nothing of a tensor's elements."""
_ORDERED = (*_INERT, ast.BinOp, ast.Call, ast.Subscript, ast.UnaryOp)
"""These expressions evaluate all of their parts, in the order in which ast lists them."""
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
_BLOCKS = {ast.For: ("body", "orelse"), ast.If: ("body", "orelse"), ast.While: ("body", "orelse"), ast.With: ("body",)}
"""Lists the fields with the statements of a compound statement."""


class Rewritten(NamedTuple):
    """Holds a forward with joined additions.

    Args:
        forward: takes the arguments of the forward that it was made from, decorators included.
        norms: names of the attributes with the norms, in the order of the code.
        n_results: the number of results of parts that return several, by the name of the attribute.
    """

    forward: Callable[..., Any]
    norms: tuple[str, ...]
    n_results: dict[str, int]


def rewritten(forward: Any) -> Rewritten | str:
    """Returns the rewritten forward, or why there is none."""
    source = source_of(forward)
    if isinstance(source, str):
        return source
    definition = source.definition
    if _stores_self(definition):
        return "its forward changes the meaning of self"
    n_results, norms = dict(_unpacked(definition)), list[str]()
    definition.body = _joined(definition.body, _untaken(source.function.__code__), norms)
    made = compiled(forward, source)
    return made if isinstance(made, str) else Rewritten(made, tuple(norms), n_results)


def _stores_self(definition: ast.FunctionDef) -> bool:
    """Decides whether `self` may be anything but the first argument."""
    first = definition.args.args[:1]
    names = (node for node in ast.walk(definition) if isinstance(node, ast.Name))
    stored = any(name.id == "self" and not isinstance(name.ctx, ast.Load) for name in names)
    return stored or not first or first[0].arg != "self"


def _unpacked(definition: ast.FunctionDef) -> Iterator[tuple[str, int]]:
    """Yields the parts whose results the function assigns to several names, at once or later, and their number."""
    assignments = [node for node in ast.walk(definition) if isinstance(node, ast.Assign)]
    calls: dict[str, Any] = {}
    for node in sorted(assignments, key=lambda each: each.lineno):
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name):
            calls[target.id] = value
        elif isinstance(target, ast.Tuple):
            call = calls.get(value.id) if isinstance(value, ast.Name) else value
            if _is_part(call):
                yield _attribute(call), len(target.elts)


def _untaken(code: CodeType) -> Iterator[str]:
    """Yields names that the code does not use."""
    used = {*code.co_varnames, *code.co_names, *code.co_cellvars}
    number = 0
    while True:
        name = f"normalized_{number}"
        if name not in used:
            yield name
        number += 1


class _Use(NamedTuple):
    """Describes an addition and the call of a norm that takes its sum next.

    Args:
        addition: assigns the sum to one name.
        copies: statements between, which assign it to other names.
        user: the next statement, which calls the norm before it does anything else.
    """

    addition: Any
    copies: list[ast.stmt]
    user: ast.stmt
    call: ast.Call


def _joined(body: list[ast.stmt], names: Iterator[str], norms: list[str]) -> list[ast.stmt]:
    """Returns the statements with joined additions. Appends the norms' names to `norms`."""
    result: list[ast.stmt] = []
    while body:
        use = _use(body)
        if use is None:
            statement, *body = body
            for field in _BLOCKS.get(type(statement), ()):
                setattr(statement, field, _joined(getattr(statement, field), names, norms))
            result.append(_Inline(norms).visit(statement) if isinstance(statement, _SIMPLE) else statement)
            continue
        norms.append(_attribute(use.call))
        name = next(names)
        result += [_addition(use, name), *use.copies]
        # The statement that takes the norm's result may be an addition that is joined, too.
        body = [*_user(use, name), *body[2 + len(use.copies) :]]
    return result


def _addition(use: _Use, name: str) -> ast.stmt:
    """Returns the statement that assigns the norm's result to the name, and the sum to the addition's."""
    target = ast.Tuple([ast.Name(name, ast.Store()), *use.addition.targets], ast.Store())
    return ast.copy_location(ast.Assign([target], _call(use.call, use.addition.value)), use.addition)


def _user(use: _Use, name: str) -> Iterator[ast.stmt]:
    """Yields the statement that takes the norm's result, from the name, and one that frees it."""
    loaded = ast.copy_location(ast.Name(name, ast.Load()), use.call)
    yield _Replaces(use.call, loaded).visit(use.user)
    if not isinstance(use.user, ast.Return):
        # The name would keep the result in memory until the forward returns.
        yield ast.copy_location(ast.Delete([ast.Name(name, ast.Del())]), use.user)


def _use(body: list[ast.stmt]) -> _Use | None:
    """Returns the addition that is the first of these statements and its use by a norm, or None."""
    addition, *others = body
    if not (isinstance(addition, ast.Assign) and _is_sum(addition.value) and _name(addition.targets) is not None):
        return None
    sums = {_name(addition.targets)}
    for place, statement in enumerate(others):
        if isinstance(statement, ast.Delete) and _name(statement.targets) is not None:
            continue
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            copied = _name(statement.targets)
            if statement.value.id not in sums or copied is None:
                return None
            sums.add(copied)
            continue
        value = getattr(statement, "value", None)
        call = _first_operation(value) if isinstance(statement, _SIMPLE) and isinstance(value, ast.expr) else None
        # `x += norm(h)` loads x first.
        if isinstance(statement, ast.AugAssign) or not (isinstance(call, ast.Call) and _is_norm(call)):
            return None
        (taken,) = call.args
        is_sum = isinstance(taken, ast.Name) and taken.id in sums
        return _Use(addition, others[:place], statement, call) if is_sum else None
    return None


def _name(targets: list[ast.expr]) -> str | None:
    """Returns the only target, if it is a name."""
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _is_sum(node: ast.expr | None) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _is_norm(call: ast.Call) -> bool:
    """Decides whether an attribute of self that is named as norms are is called with one argument."""
    if not _is_part(call) or len(call.args) != 1 or call.keywords:
        return False
    name = _attribute(call)
    return "norm" in name.lower() or name.startswith("ln")


def _is_part(node: ast.AST | None) -> bool:
    """Decides whether the node calls an attribute of self."""
    function = node.func if isinstance(node, ast.Call) else None
    of_name = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    return of_name and function.value.id == "self"  # type: ignore[union-attr]


def _attribute(call: Any) -> str:
    name: str = call.func.attr
    return name


def _first_operation(node: ast.AST) -> ast.AST | None:
    """Returns the first operation of an expression, in the order of evaluation, or None if it has none."""
    if isinstance(node, _ORDERED):
        for child in ast.iter_child_nodes(node):
            result = _first_operation(child) if isinstance(child, ast.expr | ast.keyword) else None
            if result is not None:
                return result
    return None if isinstance(node, _INERT) else node


def _call(call: ast.Call, total: Any) -> ast.Call:
    """Returns the call that normalizes a sum by the norm that `call` calls."""
    method = ast.Attribute(ast.Name("self", ast.Load()), METHOD, ast.Load())
    return ast.copy_location(ast.Call(method, [call.func, total.left, total.right], []), total)


class _Replaces(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


class _Inline(ast.NodeTransformer):
    """Joins norm(a + b) within an expression."""

    def __init__(self, norms: list[str]) -> None:
        self.norms = norms

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not (_is_norm(node) and _is_sum(node.args[0])):
            return node
        self.norms.append(_attribute(node))
        return ast.copy_location(ast.Subscript(_call(node, node.args[0]), ast.Constant(0), ast.Load()), node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        return node
