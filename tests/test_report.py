"""The README's tables are what the committed results say, and its commands exist."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks/results"


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(mark):
    return README.split(f"<!-- {mark} -->\n")[1].split(f"<!-- end of {mark} -->")[0]


def test_the_readmes_tables_are_the_results():
    report = benchmark("report")
    runs, peers = (
        [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / kind).glob("*.json"))]
        for kind in ("runs", "peers")
    )
    runs = list(report.merge(runs))
    assert section("scores") == report.table(runs)
    assert section("peers") == report.peers_table(runs, peers)
    parity = json.loads((RESULTS / "parity.json").read_text("utf-8"))
    assert section("parity") == report.parity_table(parity)
    resume = json.loads((RESULTS / "resume.json").read_text("utf-8"))
    assert section("resume") == report.resume_table(resume["rows"])
    values = json.loads((RESULTS / "values.json").read_text("utf-8"))
    assert section("values") == report.value_table(values)
    planning = json.loads((RESULTS / "planning.json").read_text("utf-8"))
    assert section("planning") == report.planning_table(planning)
    stitching = json.loads((RESULTS / "stitching.json").read_text("utf-8"))
    assert section("stitching") == report.stitching_table(stitching["runs"])


@pytest.mark.parametrize("path", sorted((RESULTS / "runs").glob("*.json")), ids=lambda p: p.stem)
def test_a_result_can_be_traced(path):
    """Command, commit and versions; the last point of the curve is the mean of the returns."""
    run = json.loads(path.read_text("utf-8"))
    assert re.fullmatch(r"python algorithms/\w+\.py.*", run["command"])
    assert re.fullmatch(r"[0-9a-f]{40}", run["commit"])
    assert {"jax", "gymnasium", "mujoco"} <= run["versions"].keys()
    last = run["curve"][str(run["config"]["num_updates"])]
    np.testing.assert_allclose(last, np.mean(run["returns"], 1), atol=0.01)


def test_a_runs_numbers_in_the_table(tmp_path):
    """Two seeds of two episodes: 10, 20, 30, 40; 0 and 100 score 0 and 100."""
    folder = tmp_path / "runs/iql/a/1"
    folder.mkdir(parents=True)
    info = {
        "algorithm": "iql",
        "command": ["algorithms/iql.py", "--out", "x", "--seed", "1"],
        "config": {"num_updates": 5, "normalize": True, "out": "x", "resume": "", "wandb": False},
        "dataset": {
            **{"name": "n", "env_id": "E", "metadata": {}, "sha256": "0", "mean_return": 5.0},
            **{"best_return": 9.0, "ref_min_score": 0.0, "ref_max_score": 100.0},
        },
        **{"commit": "0" * 40, "versions": {}, "device": "CPU"},
    }
    (folder / "config.json").write_text(json.dumps(info))
    (folder / "returns.json").write_text(json.dumps({"5": [[10.0, 20.0], [30.0, 40.0]]}))
    report = benchmark("report")
    run = report.collect(folder)
    assert run["command"] == "python algorithms/iql.py --seed 1"
    assert run["curve"] == {"5": [15.0, 35.0]}
    cells = [cell.strip() for cell in report.table([run]).splitlines()[2].strip("|").split("|")]
    assert cells[:4] == ["n", "IQL", "5", "2 x 2"]
    assert cells[4].startswith("25 [")
    low, high = map(int, re.findall(r"\d+", cells[4])[1:])
    assert 10 <= low < 25 < high <= 40
    assert cells[5:7] == ["25.0", "5"]

    info["config"]["num_updates"] = 6
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(SystemExit, match="not finished"):
        report.collect(folder)


def test_the_readmes_files_exist():
    for path in re.findall(r"\]\(((?:algorithms|benchmarks|common)[^)]*)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python ((?:algorithms|benchmarks)/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_readme_counts_lines_truly():
    counted = re.findall(r"\(algorithms/(\w+)\.py\) \|.*\| (\d+) \|", README)
    files = {p.stem: len(p.read_text("utf-8").splitlines()) for p in ROOT.glob("algorithms/*.py")}
    assert {name: int(lines) for name, lines in counted} == files


def test_a_peers_score_stands_beside_ours_of_as_many_updates():
    """Seeds 0 and 1 of ours came in two runs; a third had more updates."""
    report = benchmark("report")
    one = {
        **{"algorithm": "awac", "dataset": "n", "curve": {"5": [10.0]}, "returns": [[10.0, 10.0]]},
        "config": {"num_updates": 5, "seed": 0, "num_seeds": 1, "widths": [8, 8]},
    }
    two = one | {"config": one["config"] | {"seed": 1}, "returns": [[20.0, 20.0]]}
    long = one | {"config": one["config"] | {"num_updates": 9}, "returns": [[99.0, 99.0]]}
    runs = list(report.merge([one, two, long]))
    assert [run["returns"] for run in runs] == [[[10.0, 10.0], [20.0, 20.0]], [[99.0, 99.0]]]
    assert runs[0]["curve"] == {"5": [10.0, 10.0]}
    peer = {"algorithm": "awac", "peer": {"name": "them"}, "updates": 5, "seed": 0}
    peer |= {"data": {"name": "n", "ref": [0.0, 50.0]}, "returns": {"5": [25.0, 25.0]}}
    row = report.peers_table(runs, [peer]).splitlines()[2]
    ours, theirs = "30.0 [20.0, 40.0], 2 seeds", "50.0 [50.0, 50.0], 1 seed"
    assert row == f"| n | AWAC | 5 | {ours} | them | {theirs} |"
