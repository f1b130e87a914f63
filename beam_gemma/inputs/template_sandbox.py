"""Sandbox of chat templates: they reach nothing outside, and their steps and sizes are limited.

A template comes with a model and is not trusted. A rendering has a number of steps: repetitions of
loops, and calls of functions, macros and filters. A step may not make a large text, list or number.
The work within a step is limited by these sizes only.

What a template writes is a `TracedText`, which tells its own text from that of rows.
"""

import functools
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from beam_gemma.inputs.pure_macros import LITERAL, pure_macros
from beam_gemma.inputs.traced_text import TEMPLATE, TracedText, concatenated

MAX_STEPS = 100_000
"""Maximum repetitions of loops and calls in one rendering."""
MAX_LENGTH = 2_000_000
"""Maximum characters of a prompt, of a template and of a text within it, and items of a list."""
MAX_PRODUCT = 200_000_000
"""Maximum product of the two largest sizes that a step takes, as those of a text and its copies."""
MAX_BITS = 4096
"""Maximum bits of a whole number."""
CALL_DETAILS = frozenset({"_block_vars", "_loop_vars"})
"""Arguments that Jinja adds to calls, of which a macro gets none."""
WIDE = re.compile(r"[%:.][^%{}]{0,8}?[0-9]{5}")
"""A width of five digits in a format."""


class _Generation(jinja2.ext.Extension):
    """The `generation` block, which marks a model's answers for training; its text stands as is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("text_of"), [], [], body).set_lineno(line)

    def text_of(self, caller: jinja2.runtime.Macro) -> str:
        """Return the text of a block."""
        return caller()


class _Tracing(jinja2.visitor.NodeTransformer):
    """Makes every text that is written in a template a traced one."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802 - Jinja's name
        return _filtered(node, LITERAL) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 - Jinja's name
        return _filtered(nodes.Const(node.data), LITERAL)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "a joined text")


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Environment with Hugging Face's conventions and with limits, for any number of threads."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])
    concat = staticmethod(concatenated)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self._used = threading.local()
        self._pure: frozenset[str] = frozenset()
        self._lasting: dict[int, Any] = {}
        self._texts: dict[tuple[Any, ...], Any] = {}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join
        for name, function in self.filters.items():
            self.filters[name] = self._limited(function)
        self.filters["a loop"] = self._each
        self.filters["a text"] = _small
        self.filters["a joined text"] = _joined
        self.filters[LITERAL] = _literal

    def remember(self, values: Iterable[Any]) -> None:
        """Keep what pure macros write of values that stay the same in all renderings.

        Args:
            values: Mappings and lists, which nobody changes any more.
        """
        self._lasting = {id(value): value for value in values}

    def compiled(self, source: str) -> jinja2.Template:
        """Return a template whose loops and joined texts are limited.

        Raises:
            jinja2.TemplateError: it is malformed or too long.
        """
        self._used.steps = 0
        tree = _Tracing().visit(self.parse(_small(source)))
        if tree.find(nodes.ScopedEvalContextModifier):
            raise jinja2.TemplateRuntimeError("autoescape, which writes HTML")
        self._pure = pure_macros(tree)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "a loop")
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filtered(block.filter, "a text")
        tree.set_environment(self)
        return self.from_string(tree)

    def rendered(self, template: jinja2.Template, **variables: Any) -> TracedText:
        """Return the text of a template, with the origin of each character.

        Raises:
            jinja2.TemplateError: the template raises it, or exceeds a limit.
        """
        self._used.steps = 0
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_LENGTH:
                raise _excess("characters of a prompt", MAX_LENGTH)
        return concatenated(pieces)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Return what an operator gives, unless that is too large."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_BITS:
                raise _excess("bits of a number", MAX_BITS)
        elif isinstance(left, Sized) or isinstance(right, Sized):
            _check_sizes([left] if operator == "%" else [left, right] * (operator == "*"))
        return _small(super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, called: Any, *args: Any, **names: Any) -> Any:
        """Call a function, a method or a macro as one step."""
        self._step()
        if isinstance(called, jinja2.runtime.Macro):
            return self._written(context, called, args, names)
        # The sandbox wraps the method of a format.
        text = getattr(inspect.unwrap(called), "__self__", "")
        _check_sizes([text, *args, *names.values()])
        return _small(super().call(context, called, *args, **names))

    def _written(
        self,
        context: jinja2.runtime.Context,
        macro: jinja2.runtime.Macro,
        args: tuple[Any, ...],
        names: dict[str, Any],
    ) -> Any:
        """Return what a macro writes, kept where only lasting values decide it."""
        is_kept = macro.name in self._pure and args and names.keys() <= CALL_DETAILS
        if not is_kept or not all(id(value) in self._lasting for value in args):
            return _small(super().call(context, macro, *args, **names))
        key = (macro.name, *map(id, args))
        if key not in self._texts:
            self._texts[key] = _small(super().call(context, macro, *args, **names))
        return self._texts[key]

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter as one step, of limited arguments and result."""

        @functools.wraps(function)
        def limited(*args: Any, **names: Any) -> Any:
            self._step()
            _check_sizes([*args, *names.values()])
            return _small(function(*args, **names))

        return limited

    def _each(self, items: Iterable[Any]) -> Iterable[Any]:
        """Return the items of a loop, each of which is a step."""
        # A loop knows its length and its last item only of a list.
        return self._steps(_small(list(items)) if isinstance(items, Sized) else items)

    def _steps(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _step(self) -> None:
        self._used.steps = getattr(self._used, "steps", 0) + 1
        if self._used.steps > MAX_STEPS:
            raise _excess("steps", MAX_STEPS)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=1)


def _excess(what: str, limit: int) -> jinja2.TemplateError:
    return jinja2.TemplateRuntimeError(f"a template that takes more than {limit:,} {what}")


def _small(value: Any) -> Any:
    """Return a value unless it is a large text, list or number."""
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_LENGTH:
        raise _excess("characters or items in a value", MAX_LENGTH)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _excess("bits of a number", MAX_BITS)
    return value


def _joined(values: Iterable[Any]) -> Any:
    return _small(concatenated(map(str, values)))


@jinja2.pass_context  # so that Jinja does not apply it on compilation, which keeps plain texts
def _literal(_: jinja2.runtime.Context, text: str) -> TracedText:
    return TracedText(text, TEMPLATE)


def _check_sizes(values: Iterable[Any]) -> None:
    """Refuse values of which one step could make a large one, by repetition or by a width."""
    sizes = [1, 1]
    for value in values:
        if isinstance(value, str) and value.isascii() and len(value) < 1000 and WIDE.search(value):
            raise _excess("characters in a width", 9_999)
        if isinstance(value, int):
            sizes.append(abs(value))
        elif isinstance(value, str | list | tuple | dict):
            sizes.append(len(value))
    if math.prod(sorted(sizes)[-2:]) > MAX_PRODUCT:
        raise _excess("characters in a step", MAX_PRODUCT)


@jinja2.pass_eval_context
def _join(
    context: nodes.EvalContext,
    value: Iterable[Any],
    d: str = TracedText(),
    attribute: str | int | None = None,
) -> str:
    """Return what Jinja's own filter does, of which only the text between items is traced."""
    return jinja2.filters.do_join(context, value, d, attribute)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's filter does: without escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
