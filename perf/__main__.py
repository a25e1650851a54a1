"""Everything that this machine can find out about the speed of triton_norm, written to one folder."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perf import environment, workloads
from perf.findings import NOT_TIMED, Findings
from perf.worker import Worker

STORED = Path(__file__).resolve().parent / "results"
NO_GPU = "perf run: this machine has no GPU, and nothing else is worth timing."
INTERRUPTED = 130


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(options.do(options))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.set_defaults(do=everything, full=False, tests=False)
    verbs = parser.add_subparsers(metavar="PART")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--out", type=Path, default=Path("perf-report"), help="folder to write (default: %(default)s)")
    timing = argparse.ArgumentParser(add_help=False)
    timing.add_argument("--seconds", type=float, default=420, help="time for measuring on a GPU (default: %(default)g)")
    for action in (*folder._actions, *timing._actions):
        parser._add_action(action)

    def verb(name: str, does: object, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        part = verbs.add_parser(name, help=text, description=text, parents=parents)
        part.set_defaults(do=does)
        return part

    verb("list", list_points, "the points that `run` would time").add_argument("--full", action="store_true")
    run = verb("run", run_timing, "time the kernels on this machine's GPU, and nothing else", folder, timing)
    run.add_argument("--full", action="store_true", help="every workload, not the quick ones")
    run.add_argument("--tests", action="store_true", help="first run the library's tests on the GPU")
    report = verb("report", report_files, "pictures and a page from results files", folder)
    report.add_argument("files", nargs="+", type=Path)
    for name, does, text in (
        ("traffic", count_traffic, "bytes that the kernels move, counted under the interpreter, against the floor"),
        ("resources", compile_resources, "registers, spills, access widths and occupancy on GPUs that are not here"),
    ):
        part = verb(name, does, text)
        part.add_argument("--lines", action="store_true", help="one JSON record a line")
        part.add_argument("--points", type=int, default=None, help="only the first so many points")
        part.add_argument("--full", action="store_true", help="every shape for every op")
        if does is compile_resources:
            part.add_argument("--target", action="append", help="only for this GPU, such as sm_90; may be repeated")
    numerics = verb("numerics", compare_numerics, "errors against fp64 on hard data, triton_norm's beside torch's")
    numerics.add_argument("--lines", action="store_true", help="one JSON record a line")
    host = verb("host", time_host, "what a call costs on the host on top of its launches, over a stub of CUDA's driver")
    host.add_argument("--lines", action="store_true", help="one JSON record a line")
    verb("anatomy", draw_anatomy, "the picture of which elements each norm reduces over", folder)
    return parser


def everything(options: argparse.Namespace) -> int:
    from perf import report

    findings = Findings(environment.describe())
    report.load(sorted(STORED.glob("*.json")), findings)
    workers = {verb: Worker(verb, say) for verb in ("traffic", "resources", "numerics")}
    try:
        if environment.has_gpu():
            _time_into(findings, options)
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
    return _finish(findings, options.out)


def run_timing(options: argparse.Namespace) -> int:
    if not environment.has_gpu():
        print(NO_GPU, file=sys.stderr)
        return 2
    findings = Findings(environment.describe())
    _time_into(findings, options)
    return _finish(findings, options.out)


def _time_into(findings: Findings, options: argparse.Namespace) -> None:
    from perf import sweep

    points = workloads.points(quick=not options.full)
    path = options.out / "timing.json"
    results = sweep.timed_run(points, path, options.seconds, not options.full, options.tests, say)
    findings.timed.insert(0, results)
    findings.timed_here = True
    findings.interrupted = results.get("stopped") == "interrupted"


def _finish(findings: Findings, out: Path) -> int:
    from perf import report

    index = report.write(findings, out)
    say(f"{NOT_TIMED + ' ' if not findings.timed_here else ''}The report is {index}")
    return INTERRUPTED if findings.interrupted else int(report.has_failed(findings))


def report_files(options: argparse.Namespace) -> int:
    from perf import report

    findings = Findings(environment.describe())
    report.load(options.files, findings)
    return _finish(findings, options.out)


def list_points(options: argparse.Namespace) -> int:
    for point in workloads.points(quick=not options.full):
        say(f"{point}  {point.workload.source}  floor {point.floor_bytes / 2**20:.2f} MiB")
    return 0


def count_traffic(options: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from perf import traffic

    torch.set_num_threads(1)  # as many as the interpreter has
    failed = False
    for record in traffic.records(workloads.traffic_points(options.full)[: options.points]):
        failed |= record["status"] != "ok"
        say(json.dumps(record) if options.lines else traffic.line(record))
    return int(failed)


def compare_numerics(options: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "0" if environment.has_gpu() else "1"
    from perf import numerics

    failed = False
    for record in numerics.records():
        failed |= record["status"] != "ok"
        say(json.dumps(record) if options.lines else numerics.line(record))
    return int(failed)


def compile_resources(options: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        from perf import resources

        points = workloads.resource_points(options.full)[: options.points]
        for record in resources.records(points, options.target or list(resources.TARGETS)):
            failed |= record["status"] != "ok"
            say(json.dumps(record) if options.lines else resources.line(record))
    return int(failed)


def time_host(options: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    failed = False
    with tempfile.TemporaryDirectory() as built:
        os.environ["TRITON_CACHE_DIR"] = built
        from perf import host

        for record in host.records(Path(built)):
            failed |= record["status"] != "ok"
            say(json.dumps(record) if options.lines else host.line(record))
    return int(failed)


def draw_anatomy(options: argparse.Namespace) -> int:
    from perf import anatomy

    options.out.mkdir(parents=True, exist_ok=True)
    say(str(anatomy.draw(options.out / "anatomy.png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
