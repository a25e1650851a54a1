"""Finds out everything that this machine can about the speed of triton_norm, and writes it to one folder."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from perf import environment, options, workloads
from perf.findings import NOT_TIMED, Findings
from perf.points import Point
from perf.records import RESULTS, STATIC, Outcome, Refused, ResultsFile, dumped, read

Do = Callable[[argparse.Namespace], int]

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "perf" / "results"
NO_GPU = "this machine has no GPU, and nothing else is worth timing."
PROCESSES = (
    ("resources", "--target=sm_80", "--target=sm_90"),
    ("resources", "--target=sm_100", "--target=gfx942"),
    ("traffic",),
    ("numerics",),
)
"""Commands that make the records without a clock. Compiling takes longest, where Triton's cache is empty."""
# Verbs under Triton's interpreter, and those that compile: it is switched on or off before Triton is imported.
INTERPRETED, COMPILED = ("traffic",), ("resources", "code", "host", "launches")
# Exit statuses: of an interrupted run, and of one that ended early.
INTERRUPTED, FAILED = 130, 3
# A process that is told to end has this long to.
GRACE_SECONDS = 5.0


def say(text: str) -> None:
    print(text, flush=True)


def require_gpu() -> None:
    if not environment.has_gpu():
        raise Refused(NO_GPU)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.verb in INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
    elif args.verb in COMPILED:
        os.environ.pop("TRITON_INTERPRET", None)
    try:
        return int(args.do(args))
    except Refused as reason:
        print(f"perf {args.verb}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    folder, points, timing, lines = options.parents()
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__, parents=[folder, points, timing])
    parser.set_defaults(do=everything, verb="everything")
    verbs = parser.add_subparsers(metavar="PART")

    def verb(name: str, does: Do, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        part = verbs.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
        part.set_defaults(do=does, verb=name)
        return part

    verb("list", list_tasks, "the points that `run` would time, and the contenders", points, timing)
    verb("run", run_timing, "time the kernels on this machine's GPU, and nothing else", folder, points, timing)
    report = verb("report", report_files, "pictures and a page from results files", folder)
    report.add_argument("files", nargs="+", type=Path)
    compare = verb("compare", compare_files, "points that became slower and faster from one results file to another")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    text = "exit with 1 if the old time over the new one is less than this anywhere (default: %(default)g)"
    compare.add_argument("--fail-below", type=float, default=options.FAIL_BELOW, help=text)
    compare.add_argument("--contenders", default="triton_norm", metavar="NAME,...", help="whose times to compare")
    compare.add_argument("--any-gpu", action="store_true", help="compare runs on different GPUs, too")
    text = "bytes that the kernels move, counted under the interpreter, against the floor"
    options.choose_inspected(verb("traffic", count_traffic, text, points, lines), compiled=False)
    text = "registers, spills, access widths and occupancy on GPUs that are not here"
    options.choose_inspected(verb("resources", compile_resources, text, points, lines), compiled=True)
    code = verb("code", compare_code, "which kernels no longer compile to the code that they did", points)
    options.choose_inspected(code, compiled=True)
    either = code.add_mutually_exclusive_group(required=True)
    either.add_argument("--save", type=Path, metavar="FILE", help="store hashes of the kernels' code")
    either.add_argument("--compare", type=Path, metavar="FILE", help="list differences; exit with 1 if there are any")
    tune = verb("tune", tune_launches, "find the best launches on this GPU, for the library to ship", folder, points)
    tune.add_argument("--seconds", type=options.seconds, help="time for measuring (default: no limit)")
    tune.add_argument("--fresh", action="store_true", help="forget the choices that are there, and are not made anew")
    verb("numerics", compare_numerics, "errors against fp64 on hard data, triton_norm's beside torch's", lines)
    verb("host", time_host, "time of a call on the host on top of its launches, over a stub of CUDA's driver", lines)
    text = "operators and launches of a training step of each model, converted and not, over a stub of CUDA's driver"
    launches = verb("launches", count_launches, text, points, lines)
    either = launches.add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help="put the table into docs/convert.md")
    options.choose_blocks(either)
    readme = verb("readme", write_readme, "the figures of the documents, from the results files that are stored")
    readme.add_argument("files", nargs="*", type=Path, help="results to store first")
    return parser


def everything(args: argparse.Namespace) -> int:
    from perf import report

    file = ResultsFile(args.out / RESULTS, environment.describe(), args.resume)
    file.drop(STATIC)
    stored, findings = Findings(environment={}), Findings(environment=file.results.run["environment"])
    report.load(sorted(STORED.glob("*.jsonl")), stored)
    try:
        if environment.has_gpu():
            _time_into(file, findings, args)
        findings.problems += _in_processes(file)
    except KeyboardInterrupt:
        findings.interrupted = True
        say("interrupted: writing the report of what is done")
    static = read(file.path)
    for kind in STATIC:
        setattr(findings, kind, getattr(static, kind))
    findings.timed += stored.timed
    findings.problems += stored.problems
    return _finish(findings, args.out)


def _in_processes(file: ResultsFile) -> list[str]:
    """Runs the parts that need no clock, which add their records to the file, in processes of their own: the
    interpreter and the compiler cannot share one. Returns the reasons of those that failed."""
    problems = []
    with ExitStack() as running, file.path.open("a") as out:
        processes = {}
        for command in PROCESSES:
            errors = running.enter_context(tempfile.TemporaryFile("w+"))
            line = [sys.executable, "-m", "perf", *command, "--lines"]
            process = subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=errors)
            running.callback(_stop, process)
            processes[" ".join(command)] = process, errors
        say("compiling, counting and comparing")
        for command_line, (process, errors) in processes.items():
            status = process.wait()
            say(f"{command_line}: done")
            if status not in (0, 1):
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                problems.append(f"{command_line} ended with exit status {status}: {last}")
    return problems


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # an import can swallow the signal's exception
            process.kill()
            process.wait()


def run_timing(args: argparse.Namespace) -> int:
    require_gpu()
    file = ResultsFile(args.out / RESULTS, environment.describe(), args.resume)
    findings = Findings(environment=file.results.run["environment"])
    _time_into(file, findings, args)
    return _finish(findings, args.out)


def _time_into(file: ResultsFile, findings: Findings, args: argparse.Namespace) -> None:
    from perf import sweep

    run = sweep.timed_run(options.plan_of(args), file, say)
    findings.timed.append(run)
    findings.timed_here = True
    findings.interrupted = run.get("stopped") == "interrupted"


def _finish(findings: Findings, out: Path) -> int:
    from perf import report

    index = report.write(findings, out)
    say(f"{NOT_TIMED + ' ' if not findings.timed_here else ''}The report is {index}")
    if findings.interrupted:
        return INTERRUPTED
    if findings.timed_here and findings.timed[0].get("stopped"):
        return FAILED
    return int(report.has_failed(findings))


def report_files(args: argparse.Namespace) -> int:
    from perf import report

    findings = Findings(environment=environment.describe())
    report.load(args.files, findings)
    return _finish(findings, args.out)


def compare_files(args: argparse.Namespace) -> int:
    from perf import compare

    contenders = options.contenders_of(args.contenders)
    return compare.compare(args.old, args.new, args.fail_below, contenders, args.any_gpu, say)


def list_tasks(args: argparse.Namespace) -> int:
    plan = options.plan_of(args)
    for contender in plan.chosen():
        say(f"{contender.name}: {contender.status()}")
    for task in plan.tasks():
        floor = f"  floor {task.floor_bytes / 2**20:.2f} MiB" if isinstance(task, Point) else ""
        say(f"{task}  {task.workload.source if isinstance(task, Point) else task.source}{floor}")
    return 0


def tune_launches(args: argparse.Namespace) -> int:
    require_gpu()
    from perf import tune
    from triton_norm.tuning.choices import TUNED

    seconds = float("inf") if args.seconds is None else args.seconds
    result = tune.run(options.points_of(args), TUNED, args.out, seconds, say, fresh=args.fresh)
    if result.get("stopped") == "interrupted":
        return INTERRUPTED
    return int(bool(result.get("stopped") or result.get("problems")))


def _tell(kind: str, records: Iterable[Outcome], line: Callable[[Any], str], as_json: bool) -> int:
    failed = False
    for record in records:
        failed |= record["status"] != "ok"
        say(dumped(kind, record) if as_json else line(record))
    return int(failed)


def count_traffic(args: argparse.Namespace) -> int:
    import torch

    from perf import traffic

    torch.set_num_threads(1)  # as many as the interpreter has
    points = options.inspected_of(args, workloads.traffic_points)
    return _tell("traffic", traffic.records(points, traffic.h100(args.blocks)), traffic.line, args.lines)


def compare_numerics(args: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = str(int(not environment.has_gpu()))
    from perf import numerics

    return _tell("numerics", numerics.records(), numerics.line, args.lines)


def compile_resources(args: argparse.Namespace) -> int:
    from perf import resources

    targets = resources.targets_of(args.target or resources.TARGETS, args.blocks)
    points = options.inspected_of(args, workloads.resource_points)
    records = resources.records(points, targets, every_config=args.every_config)
    return _tell("resources", records, resources.line, args.lines)


def compare_code(args: argparse.Namespace) -> int:
    from perf import code, resources

    targets = resources.targets_of(args.target or ["sm_90"], args.blocks)
    before = code.load(args.compare) if args.compare else {}
    points = options.inspected_of(args, workloads.resource_points)
    now = code.hashes(points, targets, args.every_config)
    if args.compare:
        return int(code.compare(before, now, say) > 0)
    code.save(args.save, now, say)
    return 0


@contextmanager
def _folder_of_stub() -> Iterator[Path]:
    """Makes a folder for the stub of CUDA's driver, and for what Triton compiles over it."""
    with tempfile.TemporaryDirectory() as built:
        os.environ["TRITON_CACHE_DIR"] = built
        yield Path(built)


def time_host(args: argparse.Namespace) -> int:
    with _folder_of_stub() as built:
        from perf import host

        return _tell("host", host.records(built), host.line, args.lines)


def count_launches(args: argparse.Namespace) -> int:
    with _folder_of_stub() as built:
        from perf import launches, models, resources

        if args.blocks > 1:
            resources.require_clusters()
        chosen = [model for model in models.MODELS if set(model.ops) & set(args.op)]
        counted = list(launches.records(built, chosen, args.blocks))
    failed = _tell("launches", counted, launches.line, args.lines)
    if args.write and not failed:
        launches.write(counted, STORED)
    return failed


def write_readme(args: argparse.Namespace) -> int:
    from perf import readme

    readme.store(args.files, STORED)
    say(str(readme.write(STORED)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
