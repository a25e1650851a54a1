"""The pictures, one module for each kind. Each function draws one PNG and returns its path."""

from perf.charts.canvas import short
from perf.charts.errors import errors
from perf.charts.resources import resources
from perf.charts.roofline import roofline
from perf.charts.speedups import speedups
from perf.charts.steps import steps
from perf.charts.throughput import throughput
from perf.charts.traffic import PARTS, part_bytes, traffic

__all__ = [
    "PARTS",
    "errors",
    "part_bytes",
    "resources",
    "roofline",
    "short",
    "speedups",
    "steps",
    "throughput",
    "traffic",
]
