"""A plot of goodput over load as SVG, one line per policy. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .compare import Compared
from .figures import Row

COLOURS = ("#d62728", "#7f7f7f", "#8c564b", "#bcbd22", "#17becf", "#ff7f0e", "#2ca02c", "#9467bd", "#000000")
WIDTH, HEIGHT, LEFT, TOP = 560, 300, 60, 30


def plot(compared: Compared, title: str) -> str:
    """Goodput in requests per second over the load; the bars are 95 % intervals."""
    policies = list(dict.fromkeys(row.policy for row in compared.rows))
    most_x = max(row.load for row in compared.rows) * 1.05
    most_y = max(_goodput(row, row.attained.high) for row in compared.rows) * 1.05 or 1.0

    def x(load: float) -> float:
        return LEFT + WIDTH * load / most_x

    def y(value: float) -> float:
        return TOP + HEIGHT * (1.0 - value / most_y)

    parts = [_axes(sorted({row.load for row in compared.rows}), most_y, x, y)]
    for place, policy in enumerate(policies):
        rows = sorted((row for row in compared.rows if row.policy == policy), key=lambda row: row.load)
        colour = COLOURS[place % len(COLOURS)]
        points = " ".join(f"{x(row.load):.1f},{y(row.goodput_per_s):.1f}" for row in rows)
        dash = ' stroke-dasharray="6 3"' if policy == "oracle" else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for row in rows:
            low, high = (_goodput(row, value) for value in (row.attained.low, row.attained.high))
            parts.append(
                f'<line x1="{x(row.load):.1f}" x2="{x(row.load):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" '
                f'stroke="{colour}" stroke-width="1"/>'
            )
        top = TOP + 16 * place
        parts.append(
            f'<line x1="{LEFT + WIDTH + 15}" x2="{LEFT + WIDTH + 40}" y1="{top}" y2="{top}" stroke="{colour}" '
            f'stroke-width="2"{dash}/><text x="{LEFT + WIDTH + 46}" y="{top + 4}">{policy}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 160}" height="{TOP + HEIGHT + 50}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="18">{_escaped(title)}</text>{"".join(parts)}</svg>\n'
    )


def _goodput(row: Row, attained: float) -> float:
    return attained * row.rate_per_s


def _axes(loads: Sequence[float], most_y: float, x, y) -> str:  # type: ignore[no-untyped-def]
    bottom = TOP + HEIGHT
    found = [
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{bottom}" y2="{bottom}" stroke="#333"/>',
        f'<line x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom}" stroke="#333"/>',
        f'<text x="{LEFT + WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">load, of capacity</text>',
        f'<text x="14" y="{TOP + HEIGHT / 2}" transform="rotate(-90 14 {TOP + HEIGHT / 2})" text-anchor="middle">'
        "goodput, requests/s</text>",
    ]
    found += [f'<text x="{x(load):.1f}" y="{bottom + 18}" text-anchor="middle">{load:g}</text>' for load in loads]
    for quarter in range(5):
        value = most_y * quarter / 4
        found.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    return "".join(found)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
