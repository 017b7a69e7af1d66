"""Small charts as SVG text that takes its colours from the page around it. Knows nothing of what it draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 12, 44


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most `most` steps between them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Chart:
    """Axes with points and lines in data coordinates; `svg()` gives the text.

    Series are drawn in the page's CSS classes s0, s1, ...: the page decides their colours, light and dark.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    x_format: Callable[[float], str] = "{:g}".format
    y_format: Callable[[float], str] = "{:g}".format
    height: int = HEIGHT
    _marks: list[str] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], series: int, dashed: bool = False) -> None:
        """A line through the points; it breaks where a value is not finite."""
        parts, pen = [], "M"
        for x, y in points:
            if not math.isfinite(y):
                pen = "M"
                continue
            parts.append(f"{pen}{self._px(x):.1f} {self._py(y):.1f}")
            pen = "L"
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._marks.append(f'<path class="line s{series}"{dash} d="{"".join(parts)}"/>')

    def point(self, x: float, y: float, series: int, title: str, interval: tuple[float, float] | None = None, beside: float = 0.0) -> None:
        """A dot with a title that shows when pointed at, and its interval as a vertical bar; `beside` moves it to the right."""
        px, bar = self._px(x) + beside, ""
        if interval is not None:
            low, high = (self._py(value) for value in interval)
            bar = f'<path class="line s{series}" d="M{px:.1f} {low:.1f}L{px:.1f} {high:.1f}"/>'
        self._marks.append(
            f'<g>{bar}<circle class="dot s{series}" cx="{px:.1f}" cy="{self._py(y):.1f}" r="5"/><title>{escape(title)}</title></g>'
        )

    def level(self, y: float) -> None:
        """A faint line across."""
        self._marks.append(f'<path class="level" d="M{_LEFT} {self._py(y):.1f}H{WIDTH - _RIGHT}"/>')

    def band(self, x0: float, x1: float, css: str) -> None:
        """A strip of the class `css` along the bottom, from x0 to x1."""
        left, right = self._px(x0), self._px(x1)
        self._marks.append(f'<rect class="{css}" x="{left:.2f}" width="{right - left:.2f}" y="{self.height - _BOTTOM - 9}" height="9"/>')

    def svg(self) -> str:
        """The chart; it scales with the page's width."""
        bottom, right = self.height - _BOTTOM, WIDTH - _RIGHT
        axes = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
        for value in ticks(*self.x):
            px = self._px(value)
            axes.append(f'<text class="tick" x="{px:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(self.x_format(value))}</text>')
        for value in ticks(*self.y, most=5):
            py = self._py(value)
            axes.append(f'<path class="grid" d="M{_LEFT} {py:.1f}H{right}"/>')
            axes.append(f'<text class="tick" x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{escape(self.y_format(value))}</text>')
        middle = (_TOP + bottom) / 2
        axes.append(
            f'<text class="label" x="{(_LEFT + right) / 2}" y="{self.height - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        axes.append(
            f'<text class="label" transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y_label)}</text>'
        )
        name = escape(f"{self.y_label} by {self.x_label}", quote=True)
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{name}">{"".join(axes)}{"".join(self._marks)}</svg>'

    def _px(self, x: float) -> float:
        low, high = self.x
        return _LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - _LEFT - _RIGHT)

    def _py(self, y: float) -> float:
        low, high = self.y
        return self.height - _BOTTOM - (y - low) / ((high - low) or 1.0) * (self.height - _BOTTOM - _TOP)
