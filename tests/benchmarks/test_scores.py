"""The grid through the real command line: lands, goes on, skips what is done, tells failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.scores import __main__ as scores
from benchmarks.scores import cluster as scores_cluster

ROOT = Path(__file__).parents[2]

PENDULUM = "stillwater/pendulum/medium-v0"
DISCRETE = ["stillwater/cartpole/replay-v0", "stillwater/acrobot/medium-v0"]
FLAGS = "--eval-every 500 --eval-episodes 1 --widths 8"
GRID = ["--algorithms", "bc", "10%bc", "--num-seeds=2", "--updates=9000", f"--flags={FLAGS}"]
GRID += ["--datasets", PENDULUM]
WITH_FAILURES = [*GRID, "nowhere.hdf5"]


def command(*words, out, background=False):
    """Runs scores.py with `out` as its folder: (code, text), or the process."""
    line = [sys.executable, "-m", "benchmarks.scores", *words]
    line += ["--out", str(out), "--results", str(out / "results")]
    kind = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if background:
        return subprocess.Popen(line, start_new_session=True, **kind)
    done = subprocess.run(line, **kind)
    return done.returncode, done.stdout


def parse(words, out):
    words = [*words, "--out", str(out), "--results", str(out / "results")]
    return scores.tyro.cli(scores.Config, args=words)


def folders(out):
    return sorted(path.parent for path in out.glob("*/*/*/config.json"))


def numbers(folder):
    """metrics.csv without its two columns of time."""
    rows = (folder / "metrics.csv").read_text().splitlines()
    return [row.split(",")[:-2] for row in rows]


def fraction(folder):
    return json.loads((folder / "config.json").read_text())["config"]["fraction"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid of four, of which two have no data, and what the command said."""
    out = tmp_path_factory.mktemp("grid")
    return out, *command(*WITH_FAILURES, "--jobs=2", out=out)


def test_a_grid_lands_and_a_failure_is_reported(grid):
    out, code, text = grid
    assert code == 1
    assert "2 of 4 failed: bc-nowhere.hdf5-s0x2-" in text
    assert text.count("failed, exit code 1, see ") == 2
    assert text.count("nowhere.hdf5: no such file") == 2  # the last lines of its log
    assert text.count(": done in ") == 2
    runs = [json.loads((folder / "config.json").read_text())["config"] for folder in folders(out)]
    assert sorted((run["fraction"], run["num_updates"], run["seed"]) for run in runs) == [
        (0.1, 9_000, 0),
        (1.0, 9_000, 0),
    ]
    results = [json.loads(x.read_text("utf-8")) for x in out.glob("results/runs/*.json")]
    assert sorted(result["config"]["fraction"] for result in results) == [0.1, 1.0]


def test_a_second_call_runs_nothing(grid, monkeypatch, capsys):
    """What is done is found; a lost JSON is written again."""
    out = grid[0]
    monkeypatch.setattr(scores, "command", lambda *_, **__: pytest.fail("it trains again"))
    before = {path: path.read_bytes() for path in out.glob("results/runs/*.json")}
    next(iter(before)).unlink()
    with pytest.raises(SystemExit) as end:
        scores.main(parse([*GRID, "--jobs", "1"], out))
    assert end.value.code == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert {path: path.read_bytes() for path in out.glob("results/runs/*.json")} == before


@pytest.mark.parametrize(
    ("words", "states"),
    [
        ([], [2, 0, 0]),
        ([f"--flags={FLAGS} --lr 1e-3"], [0, 0, 2]),
        ([f"--flags={FLAGS} --eval-episodes 2"], [0, 0, 2]),
        (["--updates=1000"], [0, 0, 2]),
        (["--num-seeds=3"], [0, 0, 2]),
        (["--seeds-per-run=1"], [0, 0, 4]),
    ],
)
def test_another_config_is_not_mistaken_for_done(grid, capsys, words, states):
    cfg = parse([*GRID, *words, "--dry-run"], grid[0])
    before = sorted(grid[0].rglob("*"))
    scores.main(cfg)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "{} done, {} partly done, {} missing".format(*states)
    assert sorted(grid[0].rglob("*")) == before


def test_a_setting_that_the_data_decide_does_not_hide_a_run(tmp_path):
    """DT asks for the data's best return where nothing is asked for; a run told to is another."""
    words = ["--algorithms=dt", "--num-seeds=1", "--updates=20", "--datasets", PENDULUM]
    flags = "--eval-every 20 --eval-episodes 1 --width 8 --layers 1 --context 2 --batch-size 4"
    told = f"{flags} --targets -300"
    for more in (told, flags):
        code, text = command(*words, f"--flags={more}", out=tmp_path)
        assert code == 0 and ": done in " in text
    runs = [json.loads((x / "config.json").read_text())["config"] for x in folders(tmp_path)]
    asked = sorted(run["targets"][0] for run in runs)
    assert asked[0] == -300 and asked[1] > -300
    for more, mine in ((told, asked[0]), (flags, asked[1])):
        (cell,) = scores.grid(parse([*words, f"--flags={more}"], tmp_path))
        state, folder = scores.find(cell, tmp_path)
        info = json.loads((folder / "config.json").read_text())
        assert state == "done" and info["config"]["targets"] == [mine]


def test_a_dry_run_says_the_command(grid, capsys, tmp_path):
    """Of what is missing a command that can be typed; of what is done its folder."""
    for folder in folders(grid[0]):  # a copy where one run has only a checkpoint, the other nothing
        new = tmp_path / folder.relative_to(grid[0])
        shutil.copytree(folder, new)
        (new / "returns.json").write_text('{"8500": [[0.0], [0.0]]}')
    full, tenth = sorted(folders(tmp_path), key=fraction, reverse=True)
    shutil.rmtree(full / "checkpoint")
    shutil.rmtree(full / "checkpoint.old")
    scores.main(parse([*GRID, "--dry-run"], tmp_path))
    flags = f"--env {PENDULUM} --num-updates 9000 --eval-every 900 {FLAGS}"
    assert capsys.readouterr().out.splitlines() == [
        f"missing      python algorithms/bc.py {flags} --seed 0 --num-seeds 2 --out {tmp_path}",
        f"partly done  python algorithms/bc.py --resume {tenth}",
        "0 done, 1 partly done, 1 missing",
    ]
    (tenth / "config.json").write_text("{")  # damaged: as if it were not there
    scores.main(parse([*GRID, "--dry-run"], tmp_path))
    assert "0 partly done, 2 missing" in capsys.readouterr().out


def test_stopped_it_saves_and_a_job_array_ends_it_as_if_it_had_not_been(grid, tmp_path):
    """SIGINT after a checkpoint: the run saves. The array's script, run as SLURM would, goes on.

    Of two cells the second; its numbers are those of the uninterrupted grid.
    """
    out, script = tmp_path / "out put", tmp_path / "grid.sh"
    process = command(*GRID, "--cell=1", "--jobs=1", out=out, background=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("bc/*/*/checkpoint/checkpoint.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that are in its group
    text, _ = process.communicate()
    assert process.returncode == 130, text
    assert text.endswith("Stopped. The same command continues.\n")
    assert "stopped, exit code 130" in text
    (log,) = out.glob("logs/10%bc-*.log")
    assert "Stopped. Saved up to step" in log.read_text()  # and not: at once
    assert not list(out.glob("results/runs/*"))
    (folder,) = folders(out)
    assert 1 < len(numbers(folder)) < 37, "too late: nothing was interrupted"

    scores.main(parse([*GRID, f"--slurm={script}"], out))
    assert "#SBATCH --array=0-1\n" in script.read_text()
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resuming {folder}" in done.stdout
    assert folders(out) == [folder]
    assert len(list(out.glob("results/runs/*.json"))) == 1
    (whole,) = (x for x in folders(grid[0]) if fraction(x) == 0.1)
    assert numbers(folder) == numbers(whole)


def test_two_at_once_do_not_share_a_run(grid, tmp_path, capsys):
    """A log that another process has locked is a cell that runs elsewhere, no failure."""
    cfg = parse([*GRID, "--jobs=1", "--cell=1"], tmp_path)
    path = tmp_path / "logs" / f"{scores.grid(cfg)[1].name}.log"
    path.parent.mkdir()
    with open(path, "a") as log:
        scores.fcntl.flock(log, scores.fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as end:
            scores.main(cfg)
    assert end.value.code == 0
    assert capsys.readouterr().out.endswith(": running elsewhere\n")
    assert not folders(tmp_path)


def test_the_cells_of_an_array_are_those_of_the_grid(tmp_path):
    """A cell's command, parsed again, is the grid's own; a number outside is refused."""
    cfg = parse([*GRID, "--seeds-per-run=1", "--jobs=3", "--dry-run", "--slurm=x"], tmp_path)
    words = scores_cluster.words(cfg)[3:]  # after python -m benchmarks.scores
    one = scores.tyro.cli(scores.Config, args=[*words, "3"])
    assert scores.grid(one) == scores.grid(cfg)
    assert (one.cell, one.jobs, one.dry_run, one.slurm) == (3, 0, False, "")
    with pytest.raises(SystemExit, match="the grid has cells 0 to 3"):
        scores.main(scores.tyro.cli(scores.Config, args=[*words, "4"]))


@pytest.mark.slow
def test_ray_runs_the_cells(grid, tmp_path):
    """A local Ray, in a process of its own for its warnings: a cell is done already, two fail."""
    pytest.importorskip("ray")
    (folder,) = (x for x in folders(grid[0]) if fraction(x) == 1)
    shutil.copytree(folder, tmp_path / folder.relative_to(grid[0]))
    code, text = command(*WITH_FAILURES, "--ray=local", out=tmp_path)
    assert code == 1, text
    assert text.count("done before") == 1
    assert text.count(": done in ") == 1
    assert text.count("nowhere.hdf5: no such file") == 2
    assert "2 of 4 failed" in text
    assert len(folders(tmp_path)) == 2


def test_without_ray_one_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="pip install ray"):
        scores.main(parse([*GRID, "--ray=local"], tmp_path))


@pytest.mark.parametrize("budget", scores.BUDGETS)
def test_every_budget_has_every_algorithm(budget, tmp_path):
    """Every trainer, 10%BC and MBPO, on three datasets, and the four for discrete actions on two;
    each command is one its file takes."""
    files = {x.stem for x in ROOT.glob("algorithms/*.py") if "\ndef train(" in x.read_text("utf-8")}
    sets = [*(f"stillwater/{name}" for name in scores.DATASETS), *DISCRETE]
    cells = scores.grid(parse([f"--budget={budget}", "--datasets", *sets], tmp_path))
    assert len(cells) == 3 * (len(files) - 2 + 2) + 2 * 4
    assert {cell.algorithm for cell in cells} == files
    assert len({cell.name for cell in cells}) == len(cells)
    cells = [cell for cell in cells if getattr(cell.config, "head", "") != "categorical"]
    updates = {(cell.algorithm, cell.config.num_updates) for cell in cells}
    assert len(updates) == len(files)
    if budget == "full":
        other = {"dt": 100_000, "rvs": 100_000, "brac": 500_000, "edac": 3_000_000, "rlpd": 250_000}
        other |= {"mopo": 3_000_000, "mobile": 3_000_000}
        assert dict(updates) == dict.fromkeys(dict(updates), 1_000_000) | other
    for name in sets:
        assert (ROOT / "data" / name).is_dir()


def test_files_for_discrete_actions_meet_their_datasets_alone(tmp_path):
    """And each of the four has a cell of its own: DQN is CQL's file, with another alpha."""
    names = ["bc", "bc-categorical", "dqn", "discrete_cql", "discrete_bcq"]
    words = ["--algorithms", *names, "--datasets", PENDULUM, *DISCRETE]
    cells = scores.grid(parse(words, tmp_path))
    found = {(cell.words[cell.words.index("--env") + 1], cell.algorithm) for cell in cells}
    assert (PENDULUM, "bc") in found and len(cells) == 1 + 2 * 4
    assert {name for env, name in found if env != PENDULUM} == {"bc", *names[3:]}
    heads = [cell.config.head for cell in cells if cell.algorithm == "bc"]
    assert heads == ["deterministic", "categorical", "categorical"]
    alphas = [cell.config.alpha for cell in cells if cell.algorithm == "discrete_cql"]
    assert alphas == [0, 0, 1, 1]


def test_make_run_is_no_longer_than_the_short_grid():
    """The same flags, but for the evaluations; and no more updates."""
    text = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    own = dict(re.findall(r"^RUN_(\w+) := (.*)$", text, re.M))
    usual = re.search(r"^RUN \?= .*,(--.*)\)$", text, re.M)[1]

    def flags(line):
        line = re.sub(r"\$\(RUN_(\w+)\)", lambda match: own[match[1]], line)
        found = dict(re.findall(r"--(\S+) ((?:(?!--)\S+ ?)+)", line))
        found = {name: value.strip() for name, value in found.items()}
        skip = {"eval-every", "eval-episodes", "num-updates"}
        return int(found["num-updates"]), {k: v for k, v in found.items() if k not in skip}

    for name in [path.stem for path in (ROOT / "algorithms").glob("*.py")]:
        if short := scores.SHORT.get(name):
            updates, others = flags(own.get(name, usual))
            at_most, expected = flags(short)
            assert updates <= at_most and others == expected, name
