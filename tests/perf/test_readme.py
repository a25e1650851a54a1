"""The figures of the README and of docs/numerics.md, from results that are stored or made up."""

import re
import shutil

import pytest

from perf import __main__ as cli
from perf import readme
from perf.points import Point, Workload
from perf.records import FORMAT, read
from support import results

pytestmark = pytest.mark.unguarded

RUN = {
    "format": FORMAT,
    "environment": {"GPU": "NVIDIA Made-Up 1", "torch": "2", "triton": "3", "date": "2026-01-02 03:04 UTC"},
    "copy_gbps": 1000.0,
    "records": [],
    "steps": [],
}


def timed(gpu="NVIDIA Made-Up 1", date="2026-01-02"):
    """A run in which torch takes twice and eight times as long."""
    records = []
    for columns, slower in ((64, 2), (128, 8)):
        point = Point("layer_norm", "forward", "bf16", Workload("rows", "columns", (32, columns), ""))
        for contender, us in (("triton_norm", 1.0), ("torch", 1.0 * slower)):
            times = {"median_us": us, "p20_us": us, "p80_us": us, "host_us": us, "gbps": 1.0, "errors": {"y": 0.0}}
            records.append({**point.describe(), "contender": contender, "status": "ok", "message": "", **times})
    return RUN | {"environment": RUN["environment"] | {"GPU": gpu, "date": date}, "records": records}


PAGES = "README.md", "numerics.md"


def write(project):
    readme.write(project / "results", *(project / page for page in PAGES))


@pytest.fixture
def project(tmp_path):
    """A README and a page on numerics with a place for figures each, and a folder for results."""
    for page in PAGES:
        (tmp_path / page).write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    (tmp_path / "results").mkdir()
    return tmp_path


def test_the_readme_shows_what_is_stored():
    """If this fails: python -m perf readme."""
    shown, errors = (
        page.read_text().partition(f"{readme.BEGIN}\n")[2].partition(readme.END)[0]
        for page in (readme.README, readme.NUMERICS)
    )
    timed_runs, counted = readme.load(cli.STORED)
    assert shown == readme.block(timed_runs, "perf/results")
    assert errors == readme.errors(counted)
    assert counted.run["environment"]["date"] in errors
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", shown)
    assert pictures
    assert all((readme.ROOT / picture).is_file() for picture in pictures)
    for run in timed_runs:
        assert run["environment"]["date"] in shown


def test_stored_results_name_no_path_of_a_machine():
    for path in (*cli.STORED.glob("*.jsonl"), readme.README, readme.NUMERICS):
        assert not re.search(r"/(tmp|home|root|work|usr)/", path.read_text()), path.name


def test_a_timed_run_is_stored_by_its_gpu_and_shown_with_its_date(project):
    source = results.write(project / "results.jsonl", timed())
    readme.store([source], project / "results")
    assert read(project / "results" / "nvidia-made-up-1.jsonl").run == timed()
    write(project)
    text = (project / "README.md").read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text
    assert "| LayerNorm | forward | · | 4.00× (2) |" in text
    assert text.count("NVIDIA Made-Up 1 · torch 2 · triton 3 · 2026-01-02") == 2
    assert "No GPU has timed" not in text
    assert (project / "results" / "nvidia-made-up-1-speedups.png").stat().st_size > 0


def test_the_latest_run_comes_first_and_each_gpu_has_one(project):
    for number, (gpu, date) in enumerate((("A", "2026-01-01"), ("B", "2026-01-03"), ("A", "2026-01-02"))):
        source = results.write(project / f"{number}.jsonl", timed(gpu, date))
        readme.store([source], project / "results")
    result, _ = readme.load(project / "results")
    assert [(run["environment"]["GPU"], run["environment"]["date"]) for run in result] == [
        ("B", "2026-01-03"),
        ("A", "2026-01-02"),
    ]


def test_without_a_timed_run_the_readme_says_so(project):
    shutil.copy(cli.STORED / readme.COUNTED, project / "results")
    write(project)
    text = (project / "README.md").read_text()
    assert readme.NOT_TIMED in text
    assert "| LayerNorm | fp32 |" not in text
    numerics = (project / "numerics.md").read_text()
    assert numerics.startswith(f"before\n{readme.BEGIN}\n")
    assert numerics.endswith(f"{readme.END}\nafter\n")
    assert "old" not in numerics
    assert "| LayerNorm | fp32 |" in numerics


def test_one_common_point_is_named():
    """A mean of one point says nothing of others."""
    run = timed()
    run["records"] = run["records"][:2]
    assert "| LayerNorm | forward | · | 2.00× (32×64) |" in readme.block([run], "results")


@pytest.mark.parametrize("content", ["", "[]\n", '{"kind": "tuning"}\n', '{"kind": "facts"}\n'])
def test_what_is_no_result_is_refused_and_nothing_stored(content, project):
    source = project / "other.jsonl"
    source.write_text(content)
    with pytest.raises(ValueError, match=r"other\.jsonl is not a results file"):
        readme.store([source], project / "results")
    assert list((project / "results").iterdir()) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_a_place_for_figures_is_an_error_and_nothing_is_written(page, project):
    (project / page).write_text("nothing\n")
    before = [(project / one).read_text() for one in PAGES]
    with pytest.raises(ValueError, match=f"{re.escape(page)} has no place for figures"):
        write(project)
    assert [(project / one).read_text() for one in PAGES] == before


@pytest.mark.parametrize("page", [readme.README, readme.NUMERICS], ids=lambda page: page.name)
def test_the_marks_are_in_each_page_once(page):
    text = page.read_text()
    assert text.count(readme.BEGIN) == text.count(readme.END) == 1
