"""Straight lines through measured points: how bytes and seconds grow with layers and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Line:
    """constant + per_unit · x."""

    constant: float
    per_unit: float

    def at(self, x: float) -> float:
        """Value at x, never below zero."""
        return max(0.0, self.constant + self.per_unit * x)


@dataclass(frozen=True)
class Polyline:
    """Straight pieces through measured points, the first prolonged to zero, `after` a unit after the last."""

    points: tuple[tuple[float, float], ...]
    after: float

    def at(self, x: float) -> float:
        """Value at x, never below zero."""
        last_x, last_y = self.points[-1]
        for (x1, y1), (x2, y2) in pairwise(self.points):
            if x <= x2:
                return max(0.0, y1 + (y2 - y1) * (x - x1) / (x2 - x1))
        return last_y + self.after * (x - last_x)


@dataclass(frozen=True)
class Plane:
    """constant + per_layer · L + per_token · T + per_layer_token · L · T."""

    constant: float
    per_layer: float
    per_token: float
    per_layer_token: float

    def at(self, layers: float, tokens: float) -> float:
        """Value for `layers` decoder layers and `tokens` tokens, never below zero."""
        fixed = self.constant + self.per_layer * layers
        return max(0.0, fixed + (self.per_token + self.per_layer_token * layers) * tokens)


def line_through(x1: float, y1: float, x2: float, y2: float) -> Line:
    """The line through two points. Slope and intercept below zero are noise and become zero."""
    slope = max(0.0, (y2 - y1) / (x2 - x1))
    return Line(max(0.0, y2 - slope * x2), slope)


def plane_through(
    value: Callable[[int, int], float], layers: tuple[int, int], tokens: tuple[int, int]
) -> Plane:
    """The plane through four measured values, `value(L, T)` at both layer and both token counts.

    What a layer adds is measured as the difference of two depths, so embeddings, norms and start-up cancel
    out. A negative slope can only be noise (more layers or tokens never cost less) and becomes zero.
    """
    shallow, deep = layers
    few, many = tokens
    steps = deep - shallow
    layer = line_through(
        few,
        max(0.0, value(deep, few) - value(shallow, few)) / steps,
        many,
        max(0.0, value(deep, many) - value(shallow, many)) / steps,
    )
    outside = line_through(
        few,
        max(0.0, value(deep, few) - deep * layer.at(few)),
        many,
        max(0.0, value(deep, many) - deep * layer.at(many)),
    )
    return Plane(outside.constant, layer.constant, outside.per_unit, layer.per_unit)
