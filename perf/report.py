"""Results to something to read: one page, and a table in CSV. Nothing here measures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perf import page, records
from perf.environment import machine
from perf.findings import OURS, Findings


def load(paths: Sequence[Path], findings: Findings) -> None:
    """Adds the content of results files; a file that is none is a problem that the page tells."""
    for path in paths:
        try:
            findings.add(records.read(path))
        except ValueError as error:
            findings.problems.append(str(error))


def write(findings: Findings, out: Path) -> Path:
    """Writes index.html and results.csv. Returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    index = out / "index.html"
    index.write_text(page.html(findings))
    _write_csv(findings, out / "results.csv")
    return index


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record whose mappings are columns of their own."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": json.dumps(v) if isinstance(v, dict) else v for inner, v in value.items()}
        elif name == "shape":
            flat[name] = "x".join(map(str, value))
        else:
            flat[name] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _write_csv(findings: Findings, path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for run in findings.timed:
        where = {"machine": machine(run["environment"]), "copy_gbps": run.get("copy_gbps")}
        rows += [{"record": "timing", **where, **_flat(record)} for record in run["records"]]
        rows += [{"record": "step", **where, **_flat(record)} for record in run["steps"]]
    rows += [{"record": "traffic", **_flat(record)} for record in findings.traffic]
    rows += [{"record": "resources", **_flat(record)} for record in findings.resources]
    rows += [{"record": "numerics", **_flat(record)} for record in findings.numerics]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)) or ["record"])
        writer.writeheader()
        writer.writerows(rows)


def has_failed(findings: Findings) -> bool:
    """Returns whether anything of ours is wrong or missing; another contender's failure is only recorded."""
    here = findings.timed[:1] if findings.timed_here else []
    timed = [record for run in here for record in (*run["records"], *run["steps"])]
    statuses = [record["status"] for record in timed if record["contender"].startswith(OURS)]
    statuses += [record["status"] for record in (*findings.traffic, *findings.resources, *findings.numerics)]
    unsound = any(run.get("stopped") or run.get("tests", {}).get("passed") is False for run in here)
    return bool(findings.problems) or unsound or bool({"wrong", "error"} & set(statuses))
