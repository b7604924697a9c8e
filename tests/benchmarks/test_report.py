"""The pages' tables show the committed results; the statistics, computed another way."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from benchmarks import report
from benchmarks.scores import __main__ as scores
from benchmarks.scores import figures
from benchmarks.scores import runs as score_runs
from benchmarks.scores import tables as score_tables
from benchmarks.speed import __main__ as speed
from benchmarks.speed import tables as speed_tables
from benchmarks.studies import sweep
from common.experiment import statistics

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGES = {name: (ROOT / name).read_text("utf-8") for name in report.PAGES}
README = PAGES["README.md"]


def test_the_pages_show_the_results():
    """Tables and lines of code are as `python -m benchmarks.report` writes them."""
    stored = report.Stored(RESULTS)
    for name, text in PAGES.items():
        assert report.fill(text, stored) == text, f"{name}: run python -m benchmarks.report"


def test_every_table_is_on_one_page():
    """Filling would pass over a mark that is missing or misspelt."""
    marks = re.findall(r"<!-- (.*?) -->", "".join(PAGES.values()))
    names = [
        name for name in report.TABLES if (RESULTS / "planning.json").exists() or name != "planning"
    ]
    assert sorted(marks) == sorted([*names, *(f"end of {name}" for name in names)])
    headline = {"headline", "trust", "speed summary"}
    assert headline == {name for name in names if f"<!-- {name} -->" in README}


def test_a_page_is_filled():
    page = "a\n<!-- resume -->\nold\n<!-- end of resume -->\nb\n"
    page += "| [`iql.py`](algorithms/iql.py) | 1 | 7 |\n"
    lines = len((ROOT / "algorithms/iql.py").read_text("utf-8").splitlines())
    filled = report.fill(page, report.Stored(RESULTS))
    assert filled.startswith("a\n<!-- resume -->\n|  | kills |") and "old" not in filled
    assert filled.endswith(
        f"\n<!-- end of resume -->\nb\n| [`iql.py`](algorithms/iql.py) | 1 | {lines} |\n"
    )


def test_every_method_has_a_colour_of_its_own_in_its_panel():
    named = [name for names in figures.KINDS.values() for name in names]
    assert sorted(named) == sorted(score_runs.STANDARD)
    for names in figures.KINDS.values():
        assert len({figures.COLORS[name] for name in names}) == len(names)


def test_a_speed_can_be_traced():
    """Every row is there, with its commit; a share is what it says."""
    for cores, file in speed_tables.load(RESULTS)[0].items():
        assert file["cores"] == cores and "jax" in file["versions"]
        found = {(row["row"], row["seeds"]) for row in file["rows"]}
        assert {(name, 1) for name in (*speed.UPDATES, *speed.OTHERS)} <= found
        for row in file["rows"]:
            assert re.fullmatch(r"[0-9a-f]{40}", row["commit"])
            if "share" in row:
                seconds = row["gflop"] / row["machine_gflops"]
                np.testing.assert_allclose(row["share"], 1e6 * seconds / row["us"])


def test_a_profile_can_be_traced():
    """Commits and versions; the steps are the update, but for what is between them."""
    profile = json.loads((RESULTS / "profile.json").read_text("utf-8"))
    assert "jax" in profile["versions"]
    for row in profile["rows"]:
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"])
        assert 0.85 < sum(row["kinds_ms"].values()) / row["ms"] < 1.1, row["row"]
        longest = [step["ms"] for step in row["longest"]]
        assert longest == sorted(longest, reverse=True)
        for kind, ms in row["kinds_ms"].items():
            assert sum(x["ms"] for x in row["longest"] if x["kind"] == kind) < 1.001 * ms


def test_a_change_is_a_ratio_of_medians():
    change = dict(what="a change", row="iql", cores=2, us_before=[9e3, 6e3, 5e3], us_after=[4e3])
    (line,) = speed_tables.changes_table({"rows": [change]}).splitlines()[2:]
    assert line == "| a change | iql, 2 cores | 6 | 4 | 1.50 |"


def test_peers_count_at_equal_sizes_alone():
    def peer(name, **rows):
        sizes = dict(widths=[256] * 2, critics=2, actions=30)
        rows = [
            dict(what="cql", sizes=sizes | changed, ms_per_update=ms, compile_seconds=ms / 10)
            for ms, changed in rows.values()
        ]
        return dict(peer=dict(name=name), rows=rows)

    peers = [
        peer("A", equal=(30.0, {}), small=(1.0, dict(actions=3))),
        peer("B", deep=(4.0, dict(widths=[256] * 3)), equal=(20.0, {})),
    ]
    assert speed_tables.theirs(peers, "cql") == [(20.0, 2.0, "B"), (30.0, 3.0, "A")]
    assert speed_tables.theirs(peers, "cql, 3 layers") == [(4.0, 0.4, "B")]
    rows = [
        dict(row=name, seeds=1, us=10_000.0, compile_seconds=1.0) for name in speed_tables.COMPARED
    ]
    table = speed_tables.peers_table({1: dict(rows=rows), 2: dict(rows=rows)}, {1: peers, 2: []})
    assert "| cql | 10 (1) | B 20 (2), A 30 (3) | 2.00 |  |" in table.splitlines()


@pytest.mark.parametrize("path", sorted((RESULTS / "runs").glob("*.json")), ids=lambda p: p.stem)
def test_a_result_can_be_traced(path):
    """Command, commit and versions; curve, returns and evaluations are of the same numbers."""
    run = json.loads(path.read_text("utf-8"))
    assert re.fullmatch(r"python algorithms/\w+\.py.*", run["command"])
    assert re.fullmatch(r"[0-9a-f]{40}", run["commit"])
    assert {"jax", "gymnasium", "mujoco"} <= run["versions"].keys()
    last = max(run["curve"], key=int)  # num_updates, but for a run that was stopped
    assert int(last) <= run["config"]["num_updates"]
    np.testing.assert_allclose(run["curve"][last], np.mean(run["returns"], 1), atol=0.01)
    end = run["evaluations"][last]
    np.testing.assert_allclose(end, run["returns"], atol=0.0051)
    assert run["evaluations"].keys() == run["curve"].keys() == run["seconds"].keys()
    for step, means in run["curve"].items():
        np.testing.assert_allclose(np.mean(run["evaluations"][step], 1), means, atol=0.011)
    assert list(run["seconds"].values()) == sorted(run["seconds"].values())
    assert run["data"]["source"] == "ours"


def test_a_value_can_be_traced():
    """Commit and versions of the measuring; command and commit of each run."""
    record = json.loads((RESULTS / "values.json").read_text("utf-8"))
    assert {"jax", "mujoco"} <= record["versions"].keys()
    for facts in (record, *record["rows"]):
        assert re.fullmatch(r"[0-9a-f]{40}", facts["commit"])
    for row in record["rows"]:
        assert re.fullmatch(r"python algorithms/\w+\.py .+", row["command"])


@pytest.fixture
def folder(tmp_path):
    """A finished run of two seeds of two episodes; 0 and 100 score 0 and 100."""
    folder = tmp_path / "runs/iql/a/1"
    folder.mkdir(parents=True)
    info = {
        "algorithm": "iql",
        "command": ["algorithms/iql.py", "--out", "x", "--seed", "1"],
        "config": {"num_updates": 4, "seed": 1, "num_seeds": 2, "out": "x", "resume": ""},
        "dataset": {
            **{"name": "hopper-medium-v2", "env_id": "Hopper-v4", "metadata": {}, "sha256": "0"},
            **{"layout": "D4RL", "verified": None, "mean_return": 15.0, "best_return": 90.0},
            **{"ref_min_score": 0.0, "ref_max_score": 100.0},
        },
        **{"commit": "0" * 40, "versions": {}, "device": "CPU"},
    }
    returns = {"2": [[1.234, 2.0], [3.0, 4.0]], "4": [[10.0, 20.0], [30.0, 40.004]]}
    (folder / "config.json").write_text(json.dumps(info))
    (folder / "returns.json").write_text(json.dumps(returns))
    rows = ["step,seed,score,seconds,speed"]
    rows += [f"{t},{seed},0,{60 * t},1" for t in (1, 2, 3, 4) for seed in (1, 2)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_run_is_collected(folder, tmp_path):
    path = report.add(folder, tmp_path / "results")
    assert path == tmp_path / "results/runs/iql-hopper-medium-v2-1.json"
    run = json.loads(path.read_text("utf-8"))
    assert run == score_runs.collect(folder)
    assert run["command"] == "python algorithms/iql.py --seed 1"
    assert run["curve"] == {"2": [1.62, 3.5], "4": [15.0, 35.0]}
    assert run["evaluations"]["2"] == [[1.23, 2.0], [3.0, 4.0]]
    assert run["returns"] == [[10.0, 20.0], [30.0, 40.004]]
    assert run["seconds"] == {"2": 120.0, "4": 240.0}
    info = json.loads((folder / "config.json").read_text())
    other = info | {"command": [*info["command"], "--beta", "3"]}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="another run's"):  # begun in the same second
        report.add(folder, tmp_path / "results")
    info["config"]["num_updates"] = 6
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(SystemExit, match="not finished"):
        score_runs.collect(folder)
    stopped = score_runs.collect(folder, stopped=True)
    assert stopped["returns"] == run["returns"]
    (merged,) = score_runs.merge([stopped])
    assert merged["updates"] == 4  # not the 6 that it was to have


@pytest.mark.parametrize(
    ("change", "source"),
    [
        ({}, "D4RL"),
        ({"verified": True}, "D4RL"),
        ({"verified": False}, "other"),  # under D4RL's name, but not its file
        ({"layout": "HDF5"}, "other"),
        ({"layout": "Minari"}, "other"),
        ({"layout": "Minari", "metadata": {"stillwater": {}}}, "ours"),
    ],
)
def test_whose_data(change, source):
    assert score_runs.whose({"layout": "D4RL", "verified": None, "metadata": {}} | change) == source


def test_a_runs_numbers_in_the_tables(folder):
    """Seeds 15 and 35: the interval of two is from one to the other, of one its episodes'."""
    (run,) = score_runs.merge([score_runs.collect(folder)])
    *_, row, _, _ = score_tables.long_table([run]).splitlines()
    assert row == "| hopper-medium-v2 | IQL | 4 | 2 x 2 † | 25.0 [15.0, 35.0] | 25.0 | 25 |"
    assert "| IQL | 25.0 ± 10.0 | 4 | 2 † |" in score_tables.headline([run]).splitlines()
    assert score_tables.time_table([run]).endswith("| IQL | 4 |\n")
    one = run | {"scores": run["scores"][:1]}
    assert "| 1 x 2 † | 15.0 [10.0, 20.0]° | 15.0 |" in score_tables.long_table([one])
    text = score_tables.long_table([one])
    assert all(score_tables.MARKS[mark] in text for mark in "°†")
    assert not any("°" in x for x in score_tables.long_table([run]).splitlines())
    five = run | {"scores": np.tile(run["scores"], (3, 1))[:5], "diverged": 1}
    assert "| 5 x 2, 1 diverged |" in score_tables.long_table([five])


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_files_and_commands_exist(name):
    text, folder = PAGES[name], (ROOT / name).parent
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = folder / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            assert anchor in {title.lower().replace(" ", "-") for title in headings}, target
    for path in re.findall(r"python ((?:algorithms|benchmarks|tests)/\S+\.py)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:benchmarks|common)[\w.]*)", text):
        spec = importlib.util.find_spec(module)
        assert spec, module
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{module}.__main__"), module
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_first_page_counts_the_lines_of_every_algorithm():
    counted = re.findall(r"\(algorithms/(\w+)\.py\) \|.*\| (\d+) \|", README)
    files = {p.stem: len(p.read_text("utf-8").splitlines()) for p in ROOT.glob("algorithms/*.py")}
    assert {name: int(lines) for name, lines in counted} == files


def test_the_first_page_is_short():
    assert len(README.splitlines()) < 260


def made(algorithm="awac", dataset="n", updates=5, seed=0, scores=((10.0,),), **change):
    """A collected run with these last scores (S, E), as it lies in results/runs."""
    means = np.mean(scores, 1).tolist()
    config = {"num_updates": updates, "seed": seed, "num_seeds": len(scores)}
    data = {"mean_return": 5.0, "policy_return": None, "sha256": "0", "source": "ours"}
    return {
        **{"algorithm": algorithm, "dataset": dataset, "env_id": "Hopper-v5", "config": config},
        "command": f"python algorithms/{algorithm}.py --env {dataset} --num-updates {updates}",
        "data": data | {"ref_min": 0.0, "ref_max": 100.0},
        "curve": {str(updates): means},
        "returns": [list(x) for x in scores],
        "evaluations": {str(updates): [list(x) for x in scores]},
    } | change


def test_seeds_of_several_runs_are_merged():
    """Of two runs of a seed the later counts; other updates, data or settings are other runs."""
    one = made(seed=0, scores=[[10.0, 10.0], [11.0, 11.0]])
    two = made(seed=1, scores=[[20.0, 20.0], [30.0, 30.0]])
    two["command"] += " --batch-size 256"  # the default
    long, other = made(updates=9), made(data=made()["data"] | {"sha256": "1"})
    merged, *others = score_runs.merge([one, two, long, other])
    assert len(others) == 2
    np.testing.assert_array_equal(merged["scores"], [[10, 10], [20, 20], [30, 30]])
    np.testing.assert_array_equal(merged["curve"][5], [10, 20, 30])
    assert merged["title"] == "AWAC"


def test_a_diverged_seed_is_left_out_and_counted():
    (run,) = score_runs.merge([made(scores=[[10.0, 20.0], [np.nan, np.nan], [30.0, 40.0]])])
    np.testing.assert_array_equal(run["scores"], [[10, 20], [30, 40]])
    np.testing.assert_array_equal(run["curve"][5], [15, 35])
    assert run["diverged"] == 1
    assert not list(score_runs.merge([made(scores=[[np.nan]])]))


@pytest.mark.parametrize(
    ("algorithm", "flags", "name"),
    [
        ("iql", "--num-seeds 3 --num-updates=50 --eval_every 5", "IQL"),
        ("iql", "--no-normalize --num-seeds 3", "IQL --no-normalize"),
        ("awac", "--widths 256 256 256 --seed 1", "AWAC --widths 256 256 256"),
        ("combo", "--widths 256 256 --beta 5", "COMBO --beta 5"),
        ("cql", "--alpha 0 --env x", "SAC (cql --alpha 0)"),
        ("cql", "--alpha 0 --max-backup", "CQL --alpha 0 --max-backup"),
        ("bc", "--fraction=0.1", "10%BC"),
        ("bc", "--fraction 0.5", "BC --fraction 0.5"),
        ("dt", "--targets 1500 800", "DT --targets 1500 800"),
        ("mopo", "--polyak 0.02 --penalty-scale 0", "MBPO --polyak 0.02"),
        ("mopo", "--penalty-scale 0.5", "MOPO --penalty-scale 0.5"),
    ],
)
def test_a_variant_is_named(algorithm, flags, name):
    command = f"python algorithms/{algorithm}.py {flags}"
    assert score_runs.title({"algorithm": algorithm, "command": command}) == name


def test_the_grids_settings_are_standard():
    for budget in scores.BUDGETS.values():
        for (name, flags), title in zip(budget.items(), budget, strict=True):
            algorithm = scores.FILES.get(name, name)
            run = {"algorithm": algorithm, "command": f"python algorithms/{algorithm}.py {flags}"}
            assert score_runs.title(run).upper() == score_runs.NAMES.get(title, title).upper()


def grid_of_runs():
    """IQL on a and b, at length on a alone; CQL, of one seed, on a alone; a variant; a maze."""
    variant = made("iql", "a", scores=[[99.0]])
    variant["command"] += " --tau 0.9"
    variant["config"]["tau"] = 0.9
    runs = [
        made("iql", "a", scores=[[10.0], [20.0]]),
        made("iql", "b", scores=[[40.0], [70.0], [0.0]]),
        made("iql", "a", 9, scores=[[30.0], [30.0]]),
        made("bc", "a", scores=[[1.0], [1.0]]),
        made("bc", "b", scores=[[3.0], [3.0]]),
        made("cql", "a", scores=[[7.0, 9.0]]),
        made("iql", "maze", env_id="PointMaze_UMaze-v3"),
        variant,
    ]
    return list(score_runs.merge(runs))


def test_the_headline_takes_the_longer_run():
    """CQL is not on b, so it is left out."""
    lines = score_tables.headline(grid_of_runs()).splitlines()
    assert lines[:6] == [
        "| score | a | b | updates | seeds |",
        "|---|---|---|---|---|",
        "| *data's mean* | *5.0* | *5.0* |  |  |",
        "| BC | 1.0 ± 0.0 | 3.0 ± 0.0 | 5 | 2 † |",
        "| IQL | 30.0 ± 0.0 | 36.7 ± 35.0 | 9 / 5 | 2 † / 3 † |",
        "",
    ]
    assert lines[6] == f"† {score_tables.MARKS['†']}"


@pytest.mark.parametrize(
    ("updates", "config", "enough"),
    [
        (100_000, dict(polyak=0.005, gamma=0.99), True),
        (99_000, dict(polyak=0.005, gamma=0.99), False),
        (10_000, dict(polyak=0.05, gamma=0.99), True),
        (100_000, dict(polyak=0.005, gamma=0.995), False),
        (5, dict(gamma=0.99), True),  # no target network
    ],
)
def test_a_critic_needs_five_time_constants(updates, config, enough):
    assert score_runs.settled({"updates": updates, "config": config}) == enough
    q = 1 - (1 - config.get("polyak", 1) * (1 - config["gamma"])) ** updates  # of a constant reward
    assert (q > 0.993) == enough or "polyak" not in config


def test_what_has_not_settled_is_marked_in_the_long_table_alone():
    slow = dict(polyak=0.005, gamma=0.99)
    runs = [made("bc", "a"), made("iql", "a"), made("cql", "a")]
    runs[1]["config"] |= slow
    runs[2]["config"] |= slow | {"num_updates": 100_000}
    for key in ("curve", "evaluations"):
        runs[2][key] = {"100000": runs[2][key]["5"]}
    runs = list(score_runs.merge(runs))
    for write in report.SCORES:
        text = write(runs)
        assert ("IQL" in text) == ("‡" in text) == (write is score_tables.long_table)
        assert not text or ("BC" in text and "CQL" in text)
    assert "| IQL | 5 ‡ |" in score_tables.long_table(runs)


def test_the_aggregate_is_of_equal_budgets_on_all_datasets():
    """Of IQL two seeds each, 10, 20 and 40, 70: mean 35, middle half 20, 40. c is CQL's alone."""
    runs = grid_of_runs() + list(score_runs.merge([made("cql", "c")]))
    lines = score_tables.aggregate(runs).splitlines()
    assert lines[2:4] == [
        "| BC | 5 | 2 † | 2.0 [2.0, 2.0] | 2.0 [2.0, 2.0] |",
        "| IQL | 5 | 2 † | 35.0 [25.0, 45.0] | 30.0 [25.0, 45.0] |",
    ]
    assert "Over a, b. Not on each with equally many updates: CQL." in lines[5]
    assert score_tables.aggregate([run for run in grid_of_runs() if run["dataset"] == "a"]) == ""


def test_sources_never_meet(tmp_path):
    """D4RL's runs: tables and pictures of their own; those of ours are as without them."""
    ours = grid_of_runs()
    theirs = [run | {"data": run["data"] | {"source": "D4RL"}} for run in grid_of_runs()]
    for write in report.SCORES:
        alone, both = (score_tables.by_source(runs, write) for runs in (ours, ours + theirs))
        assert both.startswith(alone + "\nOn D4RL's own data:")
        assert alone.startswith("On our own data, collected by `benchmarks/collect`:")
    for runs in (ours, theirs):
        report.draw(runs, runs[0]["data"]["source"], tmp_path)
    sizes = {path.name: matplotlib.image.imread(path).shape for path in tmp_path.iterdir()}
    assert sizes.keys() == {f"{x}{y}.png" for x in ("curves", "profiles") for y in ("", "-D4RL")}
    assert min(min(shape[:2]) for shape in sizes.values()) > 400
    assert "(benchmarks/results/curves-D4RL.png)" in score_tables.headline(theirs)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 30])
def test_the_interquartile_mean(n):
    x = np.random.default_rng(n).normal(size=n)
    np.testing.assert_allclose(statistics.iqm(x), scipy.stats.trim_mean(x, 0.25), rtol=1e-12)


def every_resample(x):
    """All equally likely (K, S) resamples of x: within each dataset, every choice of seeds."""
    rows = [list(itertools.product(row, repeat=len(row))) for row in x]
    return np.array(list(itertools.product(*rows)))


@pytest.mark.parametrize("statistic", [np.mean, statistics.iqm])
def test_the_bootstrap_against_every_resample(statistic):
    """Two datasets, three seeds each: 27 x 27 resamples, whose shares the drawn ones must have."""
    x = np.array([[1.0, 2.0, 4.0], [108.0, 116.0, 132.0]])
    exact = np.sort([statistic(y) for y in every_resample(x)])
    drawn = np.sort([statistic(y) for y in statistics.resamples(x, 20_000)])
    assert set(np.round(drawn, 9)) <= set(np.round(exact, 9))
    shares = [np.searchsorted(v, exact + 1e-9) / len(v) for v in (exact, drawn)]
    np.testing.assert_allclose(*shares, atol=0.011)  # three deviations of a share of 20,000
    low, high = np.percentile(exact, [2.5, 97.5])
    np.testing.assert_allclose(statistics.interval(x, statistic), (low, high), atol=0.35)


def test_the_bootstrap_against_scipys():
    """scipy draws within each of several samples, too."""
    x = np.random.default_rng(0).normal([[50], [0]], [[10], [3]], (2, 12))

    def mean(a, b, axis):
        return (a.mean(axis) + b.mean(axis)) / 2

    options = {"method": "percentile", "n_resamples": 20_000, "rng": 1}
    theirs = scipy.stats.bootstrap(list(x), mean, **options).confidence_interval
    np.testing.assert_allclose(statistics.interval(x), theirs, atol=0.1)


def test_the_interval_of_two_or_three_seeds_is_their_range():
    """As the docstring of statistics.py says; of four it is not."""
    for n in (2, 3):
        assert tuple(statistics.interval(np.arange(n, dtype=float)[None])) == (0, n - 1)
    low, high = statistics.interval(np.arange(4.0)[None])
    assert 0 < low < high < 3


def test_the_score_of_a_seed_is_its_mean():
    x = np.array([[0.0, 10.0], [20.0, 40.0]])
    np.testing.assert_array_equal(statistics.of_seeds(x), [[5, 30]])
    np.testing.assert_array_equal(statistics.of_seeds(x[:1]), [[0, 10]])  # one seed: its episodes


def test_performance_profiles():
    """Counted one by one; the band against that of every resample."""
    x, tau = np.array([[1.0, 2.0], [2.0, 5.0]]), np.array([0.0, 1.0, 2.0, 4.9, 5.0])
    np.testing.assert_array_equal(statistics.profile(x, tau), [1, 0.75, 0.25, 0.25, 0])
    shares = [[np.mean([score > t for score in y.ravel()]) for t in tau] for y in every_resample(x)]
    exact = np.percentile(shares, [2.5, 97.5], axis=0)
    np.testing.assert_array_equal(statistics.profile_band(x, tau), exact)


def test_time_to_a_score():
    steps = [10, 20, 30, 40]
    assert statistics.time_to(5, steps, [1, 6, 4, 5]) == 40  # 6 at 20 did not last
    assert statistics.time_to(5, steps, [1, 2, 5, 9]) == 30
    assert statistics.time_to(5, steps, [5, 6, 7, 8]) == 10
    assert statistics.time_to(5, steps, [9, 9, 9, 4]) is None
    assert statistics.time_to(5, steps, [9, 9, 9, np.nan]) is None


def test_a_peers_score_stands_beside_ours_of_as_many_updates():
    """Seeds 0 and 1 of ours came in two runs; a third had more updates."""
    one, two = made(scores=[[10.0, 10.0]]), made(seed=1, scores=[[20.0, 20.0]])
    runs = list(score_runs.merge([one, two, made(updates=9, scores=[[99.0, 99.0]])]))
    peer = {"algorithm": "awac", "peer": {"name": "them"}, "updates": 5, "seed": 0}
    peer |= {"data": {"name": "n", "ref": [0.0, 50.0]}, "returns": {"5": [25.0, 25.0]}}
    row = report.peers_table(runs, [peer]).splitlines()[2]
    ours, theirs = "30.0 [20.0, 40.0], 2 seeds", "50.0 [50.0, 50.0], 1 seed"
    assert row == f"| n | AWAC | 5 | {ours} | them | {theirs} |"
    more = peer | {"seed": 1, "returns": {"5": [30.0, 30.0]}}
    row = report.peers_table(runs, [peer, more]).splitlines()[2]
    assert row.endswith("| them | 55.0 [50.0, 60.0], 2 seeds |")


def test_a_longer_run_stands_in_where_its_learning_rate_knows_no_end():
    """Its returns after 5 of 9 updates; not those of one whose rate decays with its length."""
    evaluations = {"5": [[1.0], [2.0]], "9": [[3.0], [4.0]]}
    long = made(updates=9, scores=[[3.0], [4.0]], evaluations=evaluations)
    long["curve"] = dict.fromkeys(["5", "9"], [0, 0])
    for decays in (False, True):
        long["config"]["lr_decay"] = decays
        runs = list(score_runs.merge([long]))
        assert report.ours(runs, "AWAC", "n", 9) == [[3.0], [4.0]]
        if decays:
            with pytest.raises(SystemExit, match="no run of AWAC on n has 5 updates"):
                report.ours(runs, "AWAC", "n", 5)
        else:
            assert report.ours(runs, "AWAC", "n", 5) == [[1.0], [2.0]]


def test_discrete_actions_have_a_table_of_their_own():
    """Methods by datasets, a gap where a run is missing; not in the headline, nor by time."""
    runs = [
        made("discrete_cql", "cart", env_id="CartPole-v1", scores=[[10.0]] * 5),
        made("discrete_cql", "acro", env_id="Acrobot-v1", scores=[[30.0]] * 5),
        made("bc", "cart", env_id="CartPole-v1", scores=[[50.0]] * 5),
        made("iql", "n", scores=[[70.0]] * 5),
    ]
    runs[2]["command"] += " --head categorical"
    runs = list(score_runs.merge(runs))
    lines = score_tables.discrete_table(runs).splitlines()
    assert lines[0] == "| score | acro | cart | updates | seeds |"
    assert lines[3:] == [
        "| BC-categorical |  | 50.0 ± 0.0 | 5 | 5 |",
        "| discrete CQL | 30.0 ± 0.0 | 10.0 ± 0.0 | 5 | 5 |",
    ]
    assert "discrete" not in score_tables.headline(runs) + score_tables.time_table(runs)
    assert score_tables.discrete_table(runs[-1:]) == ""


def test_the_table_of_ogbench_sorts_and_counts_solved_episodes():
    run = {"run": "IQL", "dataset": "stillwater/scene/play-v0", "updates": 9000}
    run |= {"successes": [[1.0, 0.0], [1.0, 1.0]], "returns": [[-3.0, -9.0], [-3.0, -1.0]]}
    one = run | {"run": "FQL, alpha 1", "successes": [[1.0, 0.0]], "returns": [[-3.0, -9.0]]}
    lines = report.ogbench_table({"b": run, "a": one}).splitlines()
    assert lines[2] == "| scene/play | FQL, alpha 1 | 9,000 | 1 x 2 † | 50 [0, 100]° | -6 |"
    assert lines[3] == "| scene/play | IQL | 9,000 | 2 x 2 † | 75 [50, 100] | -4 |"
    assert "° one seed" in lines[5] and "† preliminary" in lines[5]


def test_a_sweep_is_of_runs_that_differ_in_one_setting():
    def run(dataset, alpha, **change):
        config = {"alpha": alpha, "lr": 0.1, "seed": 0, "num_updates": 9, **change}
        return {
            **{"algorithm": "fql", "folder": "a", "dataset": f"stillwater/{dataset}-v0"},
            **{"config": config, "data": {"ref_min": 0.0, "ref_max": 200.0}},
            **{"evaluations": {"5": [[20.0, 40.0], [60.0, 80.0]]}},
            **{"command": "c", "commit": "0", "device": "CPU"},
        }

    runs = [run("b", 10.0), run("a", 10.0, num_updates=20), run("b", 0.3, seed=4)]
    found = sweep.rows(runs, "alpha", 5)
    assert found[2]["scores"] == [[10.0, 20.0], [30.0, 40.0]]
    lines = sweep.table(found).splitlines()
    assert lines[0] == "|  | updates | seeds x episodes | a | b |"
    assert lines[2] == "| FQL, alpha 0.3 | 5 | 2 x 2 |  | 25.0 [15.0, 35.0] |"
    assert lines[3] == "| FQL, alpha 10 | 5 | 2 x 2 | 25.0 [15.0, 35.0] | 25.0 [15.0, 35.0] |"
    with pytest.raises(SystemExit, match="more than alpha: lr is 0.2"):
        sweep.rows([*runs, run("b", 1.0, lr=0.2)], "alpha", 5)
