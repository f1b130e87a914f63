"""Macros of a chat template whose text their arguments alone decide.

Such a macro gives the same text for the same arguments in each row, so that what it makes of a
function that the model may call needs no second rendering. What is not certain counts as impure.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2.nodes as nodes

FUNCTIONS = frozenset({"dict", "namespace", "raise_exception", "range"})
"""Functions of every template that give the same for the same arguments."""
UNSTEADY_FILTERS = frozenset({"random"})
LITERAL = "a literal"
"""The sandbox's filter of texts that are written in a template."""
_ANYTHING = ""
"""Stands for the names of a statement that may read any of them."""


def pure_macros(template: nodes.Template) -> frozenset[str]:
    """Return the names of the macros that read nothing but arguments and constants.

    A constant is set once, to a literal, before the macro. Macros may call one another.
    """
    names = template.find_all(nodes.Name)
    stored = Counter(name.name for name in names if name.ctx == "store")
    stored.update(macro.name for macro in template.find_all(nodes.Macro))
    constants = set(FUNCTIONS) - set(stored)
    reads: dict[str, set[str]] = {}
    for node in template.body:
        if isinstance(node, nodes.Macro) and stored[node.name] == 1:
            reads[node.name] = _outer_names(node) - constants
        elif isinstance(node, nodes.Assign) and _is_literal(node.node):
            constants |= {n.name for n in _all(node.target, nodes.Name) if stored[n.name] == 1}
    while impure := {name for name, read in reads.items() if not read <= reads.keys()}:
        reads = {name: read for name, read in reads.items() if name not in impure}
    return frozenset(reads)


def _is_literal(node: nodes.Node) -> bool:
    """Return whether an expression is a literal, which the sandbox wraps in filters if a text."""
    if isinstance(node, nodes.Filter) and node.name == LITERAL and node.node is not None:
        return _is_literal(node.node)
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_literal, node.items))
    return isinstance(node, nodes.Const)


def _outer_names(macro: nodes.Macro) -> set[str]:
    """Return the names of a macro's body that may mean something outside of it."""
    if any(found.name in UNSTEADY_FILTERS for found in macro.find_all(nodes.Filter)):
        return {_ANYTHING}
    own = {name.name for name in macro.args}
    return {*_loads(macro.defaults, set()), *_reads(macro.body, own)}


def _reads(statements: Iterable[nodes.Node], own: set[str]) -> Iterator[str]:
    """Yield the names that statements read before they have set them; add to `own` those set."""
    for node in statements:
        match node:
            case nodes.Output() | nodes.Break() | nodes.Continue():
                yield from _loads([node], own)
            case nodes.Assign():
                yield from _loads([node.node, node.target], own)
                own |= {n.name for n in _all(node.target, nodes.Name) if n.ctx == "store"}
            case nodes.If():
                yield from _reads_of_branches(node, own)
            case nodes.For():
                yield from _loads([node.iter], own)
                inner = own | {name.name for name in _all(node.target, nodes.Name)} | {"loop"}
                yield from _loads([node.test] if node.test else [], inner)
                yield from _reads(node.body, inner)
                yield from _reads(node.else_, set(own))
            case _:
                yield _ANYTHING


def _reads_of_branches(node: nodes.If, own: set[str]) -> Iterator[str]:
    """Yield what a condition and its branches read; what all branches set is set after them."""
    yield from _loads([node.test, *(other.test for other in node.elif_)], own)
    ends = []
    for branch in (node.body, *(other.body for other in node.elif_), node.else_):
        inner = set(own)
        yield from _reads(branch, inner)
        ends.append(inner)
    own |= set.intersection(*ends)


def _loads(expressions: Iterable[nodes.Node], own: set[str]) -> Iterator[str]:
    for expression in expressions:
        for name in _all(expression, (nodes.Name, nodes.NSRef)):
            if name.name not in own and getattr(name, "ctx", "load") == "load":
                yield name.name


def _all(node: nodes.Node, kinds: type | tuple[type, ...]) -> Iterator[Any]:
    """Yield a node, if it is of some kinds, and all such nodes in it."""
    if isinstance(node, kinds):
        yield node
    yield from node.find_all(kinds)
