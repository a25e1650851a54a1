"""Everything that this machine can find out about the speed of triton_norm, written to one folder."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf import environment, options, workloads
from perf.findings import NOT_TIMED, Findings, Record
from perf.ledger import GPU_LOST
from perf.options import Do
from perf.worker import Worker

STORED = Path(__file__).resolve().parent / "results"
NO_GPU = "this machine has no GPU, and nothing else is worth timing."
INTERRUPTED, LOST = 130, 3
"""Exit statuses: of an interrupted run, and of one whose GPU no longer answers."""


def say(text: str) -> None:
    print(text, flush=True)


def refuse(verb: str, reason: object) -> int:
    print(f"perf {verb}: {reason}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(given.do(given))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    shared = options.parents()
    parser = argparse.ArgumentParser(
        prog="python -m perf", description=__doc__, parents=[shared.folder, shared.points, shared.timing]
    )
    parser.set_defaults(do=everything)
    verbs = parser.add_subparsers(metavar="PART")

    def verb(name: str, does: Do, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        part = verbs.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
        part.set_defaults(do=does)
        return part

    timing = (shared.folder, shared.points, shared.timing)
    verb("list", list_tasks, "what `run` would time, and who would be timed", *timing[1:])
    verb("run", run_timing, "time the kernels on this machine's GPU, and nothing else", *timing)
    report = verb("report", report_files, "pictures and a page from results files", shared.folder)
    report.add_argument("files", nargs="+", type=Path)
    text = (
        "what became slower and faster from one results file to another; medians decide, and where the spans from the "
        "20th to the 80th percentile overlap, it is said"
    )
    compare = verb("compare", compare_files, text)
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    text = "exit with 1 if the old time over the new one is less than this anywhere (default: %(default)g)"
    compare.add_argument("--fail-below", type=float, default=options.FAIL_BELOW, help=text)
    compare.add_argument("--contenders", default="triton_norm", metavar="NAME,...", help="whose times to compare")
    compare.add_argument("--any-gpu", action="store_true", help="compare runs on different GPUs, too")
    for name, does, text in (
        ("traffic", count_traffic, "bytes that the kernels move, counted under the interpreter, against the floor"),
        ("resources", compile_resources, "registers, spills, access widths and occupancy on GPUs that are not here"),
    ):
        options.choose_inspected(verb(name, does, text, shared.points, shared.lines), does is compile_resources)
    code = verb("code", compare_code, "which kernels no longer compile to the code that they did", shared.points)
    options.choose_inspected(code, compiled=True)
    either = code.add_mutually_exclusive_group(required=True)
    either.add_argument("--save", type=Path, metavar="FILE", help="store hashes of the kernels' code")
    either.add_argument("--compare", type=Path, metavar="FILE", help="list what differs; exit with 1 if anything does")
    tune = verb(
        "tune", tune_launches, "find the best launches on this machine's GPU, for the library to ship", *timing[:2]
    )
    tune.add_argument("--seconds", type=options.seconds, help="time for measuring (default: no limit)")
    tune.add_argument("--fresh", action="store_true", help="forget the choices that are there, and are not made anew")
    verb("numerics", compare_numerics, "errors against fp64 on hard data, triton_norm's beside torch's", shared.lines)
    text = "what a call costs on the host on top of its launches, over a stub of CUDA's driver"
    verb("host", time_host, text, shared.lines)
    readme = verb("readme", write_readme, "the README's pictures and figures, from the results files that are stored")
    readme.add_argument("files", nargs="*", type=Path, help="results to store first")
    return parser


def everything(given: argparse.Namespace) -> int:
    from perf import report

    findings = Findings(environment.describe())
    stored = Findings({})
    report.load(sorted(STORED.glob("*.json")), stored)
    findings.timed += stored.timed
    findings.problems += stored.problems
    workers = {verb: Worker(verb, say) for verb in ("traffic", "resources", "numerics")}
    try:
        if environment.has_gpu():
            _time_into(findings, given)
        for worker in workers.values():
            worker.start()
        for worker in workers.values():
            findings.problems += worker.wait()
    except KeyboardInterrupt:
        findings.interrupted = True
        say("interrupted: writing the report of what is done")
    finally:
        for worker in workers.values():
            worker.stop()
    findings.traffic += workers["traffic"].records
    findings.resources += workers["resources"].records
    findings.numerics += workers["numerics"].records
    return _finish(findings, given.out)


def run_timing(given: argparse.Namespace) -> int:
    if not environment.has_gpu():
        return refuse("run", NO_GPU)
    findings = Findings(environment.describe())
    try:
        _time_into(findings, given)
    except ValueError as error:
        return refuse("run", error)
    return _finish(findings, given.out)


def _time_into(findings: Findings, given: argparse.Namespace) -> None:
    from perf import planning, sweep

    results = sweep.timed_run(planning.plan_of(given), given.out / options.TIMING, say)
    findings.timed.insert(0, results)
    findings.timed_here = True
    findings.interrupted = results.get("stopped") == "interrupted"


def _finish(findings: Findings, out: Path) -> int:
    from perf import report

    index = report.write(findings, out)
    say(f"{NOT_TIMED + ' ' if not findings.timed_here else ''}The report is {index}")
    if findings.interrupted:
        return INTERRUPTED
    if findings.timed_here and str(findings.timed[0].get("stopped", "")).startswith(GPU_LOST):
        return LOST
    return int(report.has_failed(findings))


def report_files(given: argparse.Namespace) -> int:
    from perf import report

    findings = Findings(environment.describe())
    report.load(given.files, findings)
    return _finish(findings, given.out)


def compare_files(given: argparse.Namespace) -> int:
    from perf import compare, planning

    try:
        contenders = planning.contenders_of(given.contenders)
    except ValueError as error:
        return refuse("compare", error)
    return compare.compare(given.old, given.new, given.fail_below, contenders, given.any_gpu, say)


def list_tasks(given: argparse.Namespace) -> int:
    from perf import planning

    try:
        plan = planning.plan_of(given)
    except ValueError as error:
        return refuse("list", error)
    for contender in plan.chosen():
        say(f"{contender.name}: {contender.status()}")
    for task in plan.tasks():
        say(planning.line(task))
    return 0


def tune_launches(given: argparse.Namespace) -> int:
    if not environment.has_gpu():
        return refuse("tune", NO_GPU)
    from perf import planning, tune
    from triton_norm.tuning.choices import TUNED

    seconds = float("inf") if given.seconds is None else given.seconds
    try:
        found = tune.run(planning.points_of(given), TUNED, given.out, seconds, say, fresh=given.fresh)
    except OSError as error:
        return refuse("tune", error)
    if found.get("stopped") == "interrupted":
        return INTERRUPTED
    return int(bool(found.get("stopped") or found.get("problems")))


def _tell(records: Iterable[Record], line: Any, as_json: bool) -> int:
    failed = False
    for record in records:
        failed |= record["status"] != "ok"
        say(json.dumps(record) if as_json else line(record))
    return int(failed)


def count_traffic(given: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from perf import traffic

    torch.set_num_threads(1)  # as many as the interpreter has
    points = options.inspected_of(given, workloads.traffic_points)
    return _tell(traffic.records(points), traffic.line, given.lines)


def compare_numerics(given: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "0" if environment.has_gpu() else "1"
    from perf import numerics

    return _tell(numerics.records(), numerics.line, given.lines)


def compile_resources(given: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    from perf import resources

    try:
        targets = resources.targets_of(given.target or resources.TARGETS)
    except ValueError as error:
        return refuse("resources", error)
    points = options.inspected_of(given, workloads.resource_points)
    return _tell(resources.records(points, targets, every_config=given.every_config), resources.line, given.lines)


def compare_code(given: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    from perf import code, resources

    try:
        targets = resources.targets_of(given.target or ["sm_90"])
        before = code.load(given.compare) if given.compare else {}
    except (OSError, ValueError) as error:
        return refuse("code", error)
    points = options.inspected_of(given, workloads.resource_points)
    now = code.hashes(points, targets, given.every_config)
    if given.compare:
        return int(code.compare(before, now, say) > 0)
    code.save(given.save, now, say)
    return 0


def time_host(given: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as built:
        os.environ["TRITON_CACHE_DIR"] = built
        from perf import host

        return _tell(host.records(Path(built)), host.line, given.lines)


def write_readme(given: argparse.Namespace) -> int:
    from perf import readme

    try:
        readme.store(given.files, STORED)
        say(str(readme.write(STORED)))
    except ValueError as error:
        return refuse("readme", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
