"""Adds meters to a template's tree: to everything that repeats, nests, compares or copies. Knows no limits.

The meters' names contain a space, so that templates cannot use them.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError

from .charges import MAX_INT_BITS
from .sandbox_methods import MAX_PATTERN, search_weight

TICK, SIZE, CONCAT, SLICE, HOLDER = (f"metered {what}" for what in ("tick", "size", "concat", "slice", "holder"))
MAX_NODES = 50_000  # the largest known template has 5,000


def put_meters(tree: nodes.Template) -> None:
    """Add a tick to every body that can repeat, and a meter to every expression whose cost depends on its values.

    A tick charges a quarter of the body's literal text, because most of it is in branches that a round does not take.

    Raises:
        TemplateSyntaxError: the tree, or a number in it, is larger than any template needs.
    """
    for index, node in enumerate(tree.find_all(nodes.Node)):
        if index >= MAX_NODES:
            raise TemplateSyntaxError(f"more than {MAX_NODES} expressions and statements", node.lineno)
        if isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > MAX_INT_BITS:
            raise TemplateSyntaxError(f"an integer of more than {MAX_INT_BITS} bits", node.lineno)
        if isinstance(node, nodes.EvalContextModifier):
            raise TemplateSyntaxError("autoescape is not for chats", node.lineno)  # it enlarges texts uncharged
    for body_of in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tick = _filter(nodes.Const(1 + _literal_chars(body_of) // 4), TICK)
        body: list[nodes.Node] = body_of.body  # type: ignore[attr-defined]  # all three kinds have one
        body.insert(0, nodes.ExprStmt(tick, lineno=body_of.lineno))
    _meter_children(tree)


def _literal_chars(body_of: nodes.Node) -> int:
    return sum(len(data.data) for data in body_of.find_all(nodes.TemplateData))


def _meter_children(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _metered(value))
        elif isinstance(value, list):
            value[:] = [_metered(one) if isinstance(one, nodes.Node) else one for one in value]
    if isinstance(node, nodes.For) and node.test is not None:  # rejected rounds do not reach the body's tick
        node.test = _filter(node.test, SIZE)


def _metered(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Compare):
        _meter_comparison(node)
        return node
    _meter_children(node)
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes, lineno=node.lineno), CONCAT)
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return node if _is_constant(node) else _filter(node, SIZE)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        parts = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return _filter(node.node, SLICE, parts)
    if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Const):
        node.arg = _filter(node.arg, SIZE)  # a key is hashed
    return node


def _meter_comparison(node: nodes.Compare) -> None:
    """Charge both sides, unless one is a constant of the template, which bounds the work."""
    operands: list[nodes.Expr] = [node.expr, *(operand.expr for operand in node.ops)]
    constant = [_is_constant(operand) for operand in operands]
    _meter_children(node)
    operands = [node.expr, *(operand.expr for operand in node.ops)]
    for index, operand in enumerate(node.ops, 1):
        left, right = constant[index - 1], constant[index]
        if operand.op in ("in", "notin") and not right:
            operand.expr = _filter(operand.expr, HOLDER, [nodes.Const(_weight(operands[index - 1]))])
        elif not left and not right:
            operand.expr = _filter(operand.expr, SIZE)
        if not left and not right and index == 1:
            node.expr = _filter(operands[0], SIZE)


def _weight(wanted: nodes.Expr) -> int:
    known = isinstance(wanted, nodes.Const) and isinstance(wanted.value, str)
    return search_weight(len(wanted.value) if known else MAX_PATTERN + 1)  # type: ignore[attr-defined]


def _is_constant(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) or (
        isinstance(node, (nodes.List, nodes.Tuple)) and all(isinstance(item, nodes.Const) for item in node.items)
    )


def _filter(node: nodes.Node, name: str, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno or 1)
