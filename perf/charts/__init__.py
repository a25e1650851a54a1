"""The pictures. Each function draws one, and returns its figure."""

from perf.charts.errors import errors
from perf.charts.speedups import by_rival, mean_of, mean_text, over_rivals
from perf.charts.throughput import shares, throughput

__all__ = ["by_rival", "errors", "mean_of", "mean_text", "over_rivals", "shares", "throughput"]
