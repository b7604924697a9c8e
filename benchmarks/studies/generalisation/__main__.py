"""COMBO's generalisation task `jump`: what a model is worth on a task that the data do not show.

    python -m benchmarks.studies.generalisation collect     # runs/generalisation/data
    python -m benchmarks.studies.generalisation commands    # the public commands, to run next
    python -m benchmarks.studies.generalisation report      # results/generalisation.json, a table

SAC learns to run for `--sac-steps`, at a speed that pays up to 3. All its steps are the data; they
keep their actions and get the rewards of the task, 15 for each metre of the torso's height beside
the speed (tasks.py). No policy that ran has jumped, so that the best policy is far from the data.
Scores are returns.

As Yu et al. 2021 (arXiv:2102.08363) and 2020 (arXiv:2005.13239), who give no code. Differs:
- obs has 17 entries and height is measured from 0, not from the start of each episode, which
  varies by 0.1
- speed is the velocity in next_obs, not the distance of a step
- 200,000 steps of data and 100,000 updates by default (a million of each)
"""

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from benchmarks.collect import __main__ as collecting
from benchmarks.markdown import markdown
from benchmarks.scores import runs
from benchmarks.studies.generalisation import tasks
from common import evaluation
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks/results"
DATASET, ENV_ID = "stillwater/halfcheetahjump/replay-v0", "HalfCheetahJump-v0"
MODULE = "benchmarks.studies.generalisation.tasks"

MODEL = "--no-termination --horizon 5 --widths 256 256 --max-epochs 100"  # it never ends
FLAGS = {  # of the authors where they give some: horizon 5, weight of MOPO's penalty 1
    "sac": "",
    "iql": "",
    "cql": "--num-actions 1",
    "mopo --penalty-scale 0": MODEL,
    "mopo": f"--penalty-scale 1 {MODEL}",
    "combo": f"--beta 0.5 {MODEL}",
}


@dataclass(frozen=True)
class Collect:
    """Trains SAC to run, and writes all its steps with the rewards of the task."""

    seed: int = 0  # of SAC and the environment
    sac_steps: int = 200_000  # environment steps, each of which is in the data
    start_steps: int = 5_000  # steps with uniform actions and without updates
    out: str = "runs/generalisation"  # folder for SAC's checkpoints and for data


@dataclass(frozen=True)
class Commands:
    """Prints the command of each algorithm."""

    num_updates: int = 100_000  # gradient steps
    num_seeds: int = 3  # seeds trained together
    out: str = "runs/generalisation"  # folder with data


@dataclass(frozen=True)
class Report:
    """Writes results/generalisation.json and prints the table of all finished runs."""

    out: str = "runs/generalisation"  # folder with the runs
    results: str = str(RESULTS)  # folder for the results


def relabel(rows, task):
    """The rows of a replay with the rewards of a task."""
    reward = tasks.REWARDS[task](rows["obs"], rows["action"], rows["next_obs"])
    return rows | {"reward": reward.astype(np.float32)}


def collect(cfg):
    """The dataset's Path."""
    # To SAC's end, whatever the returns: its first policy counts as the medium one.
    own = collecting.Config(
        env_id="HalfCheetahRun-v0", kind="expert", seed=cfg.seed, sac_steps=cfg.sac_steps,
        start_steps=cfg.start_steps, work=cfg.out, out=str(Path(cfg.out) / "data"),
    )  # fmt: skip
    folder = Path(cfg.out) / f"sac-s{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    collecting.check_settings(own, folder)
    _, replay, _ = collecting.train(own, evaluation.make(own.env_id), folder, -np.inf)
    ran = replay.filled()
    rows = relabel(ran, "jump")
    about = {"collected_on": own.env_id, "returns_there": summary(collecting.episode_returns(ran))}
    own = replace(own, env_id=ENV_ID, kind="replay")
    source = "scores are returns: 0 and 100 are those"
    path = collecting.export(own, evaluation.make(ENV_ID), rows, 0.0, 100.0, source, about)
    print(f"{path}: {summary(collecting.episode_returns(rows))}")
    return path


def summary(returns):
    return {name: float(f(returns)) for name, f in (("mean", np.mean), ("max", np.max))}


def commands(cfg):
    """[words after `python`] of each algorithm."""
    every = cfg.num_updates // 20
    end = f"--num-updates {cfg.num_updates} --eval-every {every} --num-seeds {cfg.num_seeds}"
    where = f"--env {DATASET} --env-module {MODULE} --out {cfg.out}"
    found = []
    for name, flags in FLAGS.items():
        file, *own = name.split()
        words = f"algorithms/{file}.py {where} {' '.join(own)} {flags} {end}"
        found.append(shlex.split(words))
    return found


def which(run):
    """The entry of FLAGS that a collected run belongs to."""
    free = run["config"].get("penalty_scale") == 0
    return "mopo --penalty-scale 0" if free else run["algorithm"]


def report(cfg):
    """Collects the finished runs below --out: {"data": ..., "rows": [...]}, also to a file."""
    found = []
    for path in sorted(Path(cfg.out).glob("*/*/*/config.json")):
        with suppress(SystemExit, FileNotFoundError):  # not finished
            found.append(runs.collect(path.parent))
    found = [run for run in runs.merge(found) if run["dataset"] == DATASET]
    if not found:
        raise SystemExit(f"{cfg.out}: no finished run on {DATASET}.")
    record = {"data": {k: found[0]["data"][f"{k}_return"] for k in ("mean", "best")}, "rows": []}
    for run in sorted(found, key=lambda run: list(FLAGS).index(which(run))):
        returns = np.array(run["returns"])
        low, high = statistics.interval(statistics.of_seeds(returns))
        values = dict(mean=returns.mean(), low=low, high=high)
        record["rows"].append({
            "run": runs.NAMES[which(run)], **{k: round(float(x), 1) for k, x in values.items()},
            "seeds": len(returns), "diverged": run["diverged"], "updates": run["updates"],
            "command": run["command"], "commit": run["commit"],
        })  # fmt: skip
    path = Path(cfg.results) / "generalisation.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(table(record), end="")
    return record


def table(record):
    """Returns on the task, in Markdown."""
    lines = [["*data's mean*", f"*{record['data']['mean']:,.0f}*", "", "", ""]]
    lines += [["*data's best episode*", f"*{record['data']['best']:,.0f}*", "", "", ""]]
    for row in record["rows"]:
        cell = f"{row['mean']:,.0f} [{row['low']:,.0f}, {row['high']:,.0f}]"
        lines.append([row["run"], cell, f"{row['updates']:,}", row["seeds"], row["diverged"] or ""])
    return markdown(["jump", "return", "updates", "seeds", "diverged"], lines)


def main(cfg: Collect | Commands | Report):
    if isinstance(cfg, Collect):
        collect(cfg)
    elif isinstance(cfg, Report):
        report(cfg)
    else:
        for words in commands(cfg):
            data = shlex.quote(str(Path(cfg.out) / "data"))
            print(f"MINARI_DATASETS_PATH={data} python {shlex.join(words)}")


if __name__ == "__main__":
    main(tyro.cli(Collect | Commands | Report, description=__doc__))
