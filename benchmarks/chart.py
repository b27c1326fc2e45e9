"""Horizontal bars around the line of equality, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Rows = Sequence[tuple[str, Sequence[tuple[str, float]]]]

_WIDTH, _LEFT, _BAR, _GAP, _TOP = 860, 250, 16, 26, 56
_MAX_VALUE = 3.0
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")


def bar_chart(title: str, rows: Rows) -> str:
    """Each row has a caption and bars (label, ratio); what is above 3 is cut, its number says how much it is."""
    labels = list(dict.fromkeys(label for _, bars in rows for label, _ in bars))
    parts, y = [_text(12, 28, title, 18)], _TOP
    for caption, bars in rows:
        parts.append(_text(12, y, caption, 13))
        y += 8
        for label, value in bars:
            parts.append(_bar(y, label, value, _COLOURS[labels.index(label) % len(_COLOURS)]))
            y += _BAR + 4
        y += _GAP
    one = _x(1.0)
    parts.append(
        f'<line x1="{one:.1f}" y1="{_TOP}" x2="{one:.1f}" y2="{y - _GAP}" stroke="#333" stroke-dasharray="3 3"/>'
    )
    size = f'width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}"'
    style = 'font-family="system-ui, sans-serif" fill="#222"'
    background = f'<rect width="{_WIDTH}" height="{y}" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'


def _x(value: float) -> float:
    return _LEFT + min(value, _MAX_VALUE) / _MAX_VALUE * (_WIDTH - _LEFT - 70)


def _bar(y: int, label: str, value: float, colour: str) -> str:
    width = max(1.0, _x(value) - _LEFT)
    rectangle = f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>'
    name = _text(_LEFT - 8, y + 12, label, 12, anchor="end")
    return name + rectangle + _text(int(_x(value)) + 6, y + 12, f"{value:.2f}", 12)


def _text(x: int, y: int, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
