"""Results to something to read: JSON, CSV, pictures, one page. Nothing here measures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from perf import sections
from perf.environment import machine
from perf.findings import Findings, Record


def load(paths: Sequence[Path], findings: Findings) -> None:
    """Add what is in results files: timed runs, and whole reports."""
    for path in paths:
        try:
            content = json.loads(path.read_text())
            if content["kind"] == "timing":
                findings.timed.append(content)
            elif content["kind"] == "report":
                for name in ("timed", "traffic", "resources", "numerics", "problems"):
                    getattr(findings, name).extend(content.get(name, []))
            else:
                raise ValueError(f"kind {content['kind']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            findings.problems.append(f"{path.name} is not a results file: {type(error).__name__}: {error}")


def write(findings: Findings, out: Path) -> Path:
    """results.json, results.csv, the PNGs and index.html. Returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    index = out / "index.html"
    index.write_text(sections.html(findings, out))
    (out / "results.json").write_text(json.dumps(vars(findings), indent=1))
    _write_csv(findings, out / "results.csv")
    return index


def _flat(kind: str, record: Record, extra: Record) -> Record:
    flat = {"record": kind, **extra}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": json.dumps(v) if isinstance(v, dict) else v for inner, v in value.items()}
        elif name == "shape":
            flat[name] = "x".join(map(str, value))
        else:
            flat[name] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _write_csv(findings: Findings, path: Path) -> None:
    rows = [
        _flat("timing", record, {"machine": machine(run["environment"]), "copy_gbps": run.get("copy_gbps")})
        for run in findings.timed
        for record in run["records"]
    ]
    rows += [
        _flat("step", record, {"machine": machine(run["environment"])})
        for run in findings.timed
        for record in run.get("steps", [])
    ]
    rows += [_flat("traffic", record, {}) for record in findings.traffic]
    rows += [_flat("resources", record, {}) for record in findings.resources]
    rows += [_flat("numerics", record, {}) for record in findings.numerics]
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["record"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def has_failed(findings: Findings) -> bool:
    """Whether anything of ours is wrong or missing; another contender's failure is only recorded."""
    here = findings.timed[:1] if findings.timed_here else []
    timed = [record for run in here for record in run["records"] + run.get("steps", [])]
    ours = [record for record in timed if record["contender"].startswith("triton_norm")]
    records = ours + findings.traffic + findings.resources + findings.numerics
    unsound = any(run.get("stopped") or run.get("tests", {}).get("passed") is False for run in here)
    return bool(findings.problems) or unsound or any(record["status"] in ("wrong", "error") for record in records)
