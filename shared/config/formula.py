"""What the formula of a public score may say, and what it computes, for all records at once.

Numbers, variables, `+ - * / **`, comparisons (also chained), and/or/not, `a if condition else b` and the functions
below. A missing value makes what is computed from it missing, except in `known` and `points`, and in the branch of
an `if` that is not taken. So does what has no number: a division by 0, the logarithm of a negative number.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gapweave.shared.config.base import unknown_key
from gapweave.shared.config.expression import one_line, parse, wrong
from gapweave.shared.config.modalities import (
    Categories,
    Column,
    ModalitySpec,
    SeriesModality,
    TableModality,
    category_code,
)

DEEPEST = 200
"""Levels of a formula; a chain of sums has one level a term."""

Statistic = Literal["last", "mean", "min", "max"]
"""What a formula may read of a series' variable: of its values in the study's window."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A variable that a formula reads; of a series, one statistic of it."""

    modality: str
    variable: str
    statistic: Statistic | None = None


Values = Mapping[Reference, NDArray[Any]]
Term = Callable[[Values, int], Numbers]
"""(values by reference, number of records R) -> [R], NaN where missing."""


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A checked formula.

    Attributes:
        reads: the variables in it.
        term: what it computes.
    """

    reads: frozenset[Reference]
    term: Term

    def evaluate(self, values: Values, records: int) -> Numbers:
        """The score of each record.

        Args:
            values: [R] a reference, in the study's unit: float64 with NaN for missing, or codes with None; a
                reference that is not there is missing throughout.
            records: R.

        Returns:
            [R], NaN where missing; also for a record that has none of the variables.
        """
        some = np.zeros(records, np.bool_)
        for reference in self.reads & values.keys():
            column = values[reference]
            some |= column != None if column.dtype == object else ~np.isnan(column)  # noqa: E711
        with np.errstate(all="ignore"):
            return np.where(some, self.term(values, records), np.nan)


def compile_formula(text: str, modalities: Mapping[str, ModalitySpec]) -> Formula:
    """Check a formula against the study's variables.

    Args:
        text: the formula.
        modalities: of the study; those that are no table and no series hold no variable.

    Raises:
        ValueError: with the position of what is wrong, and the nearest name for one that is unknown.
    """
    text = one_line(text)
    compiler = _Compiler(text, modalities)
    tree = parse(text)
    term = compiler.term(tree, 0)
    if not compiler.reads:
        raise wrong(text, tree, "the expression reads no variable")
    return Formula(reads=frozenset(compiler.reads), term=term)


def _missing(records: int) -> Numbers:
    return np.full(records, np.nan)


def _number(values: Numbers) -> Numbers:
    return np.where(np.isfinite(values), values, np.nan)


def _truth(values: Numbers) -> Numbers:
    return np.where(np.isnan(values), np.nan, values != 0)


def _least(*terms: Numbers) -> Numbers:
    found: Numbers = np.min(np.stack(terms), axis=0)
    return found


def _greatest(*terms: Numbers) -> Numbers:
    found: Numbers = np.max(np.stack(terms), axis=0)
    return found


def _known(values: Numbers, default: Numbers) -> Numbers:
    return np.where(np.isnan(values), default, values)


def _compared(compare: Callable[[Any, Any], Any]) -> Callable[[Numbers, Numbers], Numbers]:
    return lambda one, other: np.where(np.isnan(one) | np.isnan(other), np.nan, compare(one, other))


ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
SIGNS: dict[type[ast.AST], Callable[[Numbers], Numbers]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: lambda values: 1 - _truth(values),
}
FUNCTIONS: dict[str, tuple[int, int, Callable[..., Numbers]]] = {
    "abs": (1, 1, np.fabs),
    "log": (1, 1, np.log),
    "exp": (1, 1, np.exp),
    "min": (2, 20, _least),
    "max": (2, 20, _greatest),
    "known": (2, 2, _known),
}
"""Name -> fewest and most arguments, and what it computes. `points` takes a list and stands for itself."""

CATEGORICAL = "a categorical variable: compare it by == or != with one of its codes"

Choice = TypeVar("Choice")


@dataclass
class _Compiler:
    """Walks a formula once: checks every part, and makes of it a function over all records."""

    text: str
    modalities: Mapping[str, ModalitySpec]
    reads: set[Reference] = field(default_factory=set)

    def term(self, node: ast.expr, depth: int) -> Term:
        """What a part computes."""
        if depth > DEEPEST:
            raise wrong(self.text, node, f"nested more than {DEEPEST} levels deep")
        match node:
            case ast.Constant():
                value = np.nan if node.value is None else self._constant(node)
                return lambda values, records: np.full(records, value)
            case ast.Name() | ast.Attribute():
                return self._variable(node)
            case ast.Call():
                return self._call(node, depth)
            case ast.UnaryOp():
                sign, inner = self._choose(SIGNS, node.op, node), self.term(node.operand, depth + 1)
                return lambda values, records: sign(inner(values, records))
            case ast.BinOp():
                act = self._choose(ARITHMETIC, node.op, node)
                left, right = self.term(node.left, depth + 1), self.term(node.right, depth + 1)
                return lambda values, records: _number(act(left(values, records), right(values, records)))
            case ast.BoolOp():
                parts = [self.term(part, depth + 1) for part in node.values]
                join = _least if isinstance(node.op, ast.And) else _greatest
                return lambda values, records: join(*(_truth(part(values, records)) for part in parts))
            case ast.Compare():
                return self._compare(node, depth)
            case ast.IfExp():
                return self._if(node, depth)
        raise wrong(self.text, node, "not allowed in an expression")

    def _choose(self, table: Mapping[type[ast.AST], Choice], key: ast.AST, node: ast.expr) -> Choice:
        if type(key) not in table:
            raise wrong(self.text, node, "this operator is not allowed")
        return table[type(key)]

    def _constant(self, node: ast.expr) -> float:
        """A written number; a minus sign may stand before it."""
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        value = inner.value if isinstance(inner, ast.Constant) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise wrong(self.text, node, "not a number")
        return -float(value) if negative else float(value)

    def _if(self, node: ast.IfExp, depth: int) -> Term:
        condition, one, other = (self.term(part, depth + 1) for part in (node.test, node.body, node.orelse))

        def chosen(values: Values, records: int) -> Numbers:
            truth = _truth(condition(values, records))
            found = np.where(truth == 1, one(values, records), other(values, records))
            return np.where(np.isnan(truth), np.nan, found)

        return chosen

    def _compare(self, node: ast.Compare, depth: int) -> Term:
        column = self._find(node.left) if isinstance(node.left, ast.Name | ast.Attribute) else None
        if column is not None and isinstance(column[1], Categories):
            return self._code(node, column[0], column[1])
        sides = [self.term(part, depth + 1) for part in (node.left, *node.comparators)]
        tests = [_compared(self._choose(COMPARISONS, op, node)) for op in node.ops]

        def compared(values: Values, records: int) -> Numbers:
            found = [side(values, records) for side in sides]
            pairs = zip(tests, found, found[1:], strict=False)
            return _least(*(test(one, other) for test, one, other in pairs))

        return compared

    def _code(self, node: ast.Compare, reference: Reference, card: Categories) -> Term:
        """A categorical variable compared with one of its codes."""
        other, equal = node.comparators[0], isinstance(node.ops[0], ast.Eq)
        plain = len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.NotEq)
        if not plain or not isinstance(other, ast.Constant):
            raise wrong(self.text, node, CATEGORICAL)
        code = category_code(other.value)
        if code not in card.categories:
            raise wrong(self.text, other, unknown_key(code, card.categories, "code"))
        self.reads.add(reference)

        def same(values: Values, records: int) -> Numbers:
            if reference not in values:
                return _missing(records)
            codes = values[reference]
            return np.where(codes == None, np.nan, (codes == code) == equal)  # noqa: E711

        return same

    def _call(self, node: ast.Call, depth: int) -> Term:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if node.keywords:
            raise wrong(self.text, node, "arguments are given without their names")
        if name not in (*FUNCTIONS, *get_args(Statistic), "points"):
            known = sorted({*FUNCTIONS, *get_args(Statistic), "points"})
            raise wrong(self.text, node, unknown_key(name, known, "function") if name else "not a function")
        arguments = node.args
        if name == "points":
            return self._points(node, depth)
        if name in get_args(Statistic) and len(arguments) == 1:
            return self._statistic(node, arguments[0], name)
        if name not in FUNCTIONS or not FUNCTIONS[name][0] <= len(arguments) <= FUNCTIONS[name][1]:
            raise wrong(self.text, node, f"{name} takes another number of arguments than {len(arguments)}")
        act, terms = FUNCTIONS[name][2], [self.term(argument, depth + 1) for argument in arguments]
        return lambda values, records: _number(act(*(term(values, records) for term in terms)))

    def _points(self, node: ast.Call, depth: int) -> Term:
        """`points(x, [[low, high, p], ...])`: p where low <= x < high, else 0, and 0 where x is missing."""
        bands = node.args[1].elts if len(node.args) == 2 and isinstance(node.args[1], ast.List) else []
        table = [self._band(band) for band in bands]
        if not table:
            raise wrong(self.text, node, "points takes a term and a list of [low, high, points]")
        for (_, end, _), (start, _, _), band in zip(table, table[1:], bands[1:], strict=False):
            if start < end:
                raise wrong(self.text, band, "bands must ascend and not overlap")
        inner = self.term(node.args[0], depth + 1)

        def looked_up(values: Values, records: int) -> Numbers:
            found = inner(values, records)
            return sum((np.where((low <= found) & (found < high), p, 0.0) for low, high, p in table), np.zeros(records))

        return looked_up

    def _band(self, node: ast.expr) -> tuple[float, float, float]:
        parts = node.elts if isinstance(node, ast.List) else []
        if len(parts) != 3:
            raise wrong(self.text, node, "a band is [low, high, points]; None is an open end")
        open_ends = [isinstance(part, ast.Constant) and part.value is None for part in parts[:2]]
        low = -np.inf if open_ends[0] else self._constant(parts[0])
        high = np.inf if open_ends[1] else self._constant(parts[1])
        if low >= high:
            raise wrong(self.text, node, "a band ascends from low to high")
        return low, high, self._constant(parts[2])

    def _statistic(self, call: ast.Call, node: ast.expr, name: str) -> Term:
        if not isinstance(node, ast.Name | ast.Attribute):
            raise wrong(self.text, call, f"{name} of one term is a statistic of a series' variable")
        reference, _ = self._find(node)
        if not isinstance(self.modalities[reference.modality], SeriesModality):
            raise wrong(self.text, call, f"{name} is a statistic of a series; {reference.modality} is a table")
        statistic: Any = name
        return self._read(Reference(modality=reference.modality, variable=reference.variable, statistic=statistic))

    def _variable(self, node: ast.Name | ast.Attribute) -> Term:
        reference, card = self._find(node)
        if isinstance(card, Categories):
            raise wrong(self.text, node, CATEGORICAL)
        if isinstance(self.modalities[reference.modality], SeriesModality):
            raise wrong(self.text, node, f"a series' variable: read {', '.join(get_args(Statistic))} of it")
        return self._read(reference)

    def _read(self, reference: Reference) -> Term:
        self.reads.add(reference)
        return lambda values, records: values[reference] if reference in values else _missing(records)

    @cached_property
    def _variables(self) -> dict[str, tuple[Reference, Column]]:
        return {
            f"{modality}.{variable}": (Reference(modality=modality, variable=variable), card)
            for modality, spec in self.modalities.items()
            if isinstance(spec, TableModality | SeriesModality)
            for variable, card in spec.columns.items()
        }

    def _find(self, node: ast.Name | ast.Attribute) -> tuple[Reference, Column]:
        """The variable that `variable` or `modality.variable` names."""
        found = self._variables
        name = ast.unparse(node)
        if name in found:
            return found[name]
        fitting = [full for full in found if full.partition(".")[2] == name]
        if len(fitting) > 1:
            raise wrong(
                self.text, node, f"{name!r} is a variable of several modalities ({', '.join(fitting)}); name one"
            )
        if not fitting:
            known = [*found] if "." in name else [full.partition(".")[2] for full in found]
            raise wrong(self.text, node, unknown_key(name, sorted(set(known)), "variable"))
        return found[fitting[0]]
