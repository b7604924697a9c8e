"""COMBO's generalisation tasks: what a model is worth on a task that the data do not show.

    python -m benchmarks.studies.generalisation collect --task jump    # runs/generalisation/data
    python -m benchmarks.studies.generalisation commands --task jump   # the public commands, next
    python -m benchmarks.studies.generalisation report    # results/generalisation.json, tables

The data of `jump` and `angle` are all steps in which SAC learned to run. They keep their actions
and get the rewards of the task: for height beside the speed, for speed 30 degrees off. The data of
`drawer-close` are by a script that opens a drawer, with noise; the task is to close it. No policy
that collected data pursued the task, so that the best policy is far from the data. Scores are
returns. Environments and rewards are in tasks.py.

As Yu et al. 2021 (arXiv:2102.08363) and 2020 (arXiv:2005.13239), who give no code. Differs:
- height is measured from 0, not from the start of each episode, which varies by 0.1; obs has 17
  entries
- speed is the velocity in next_obs, not the distance of a step
- Ant's episodes do not end when it falls; instead, such steps lack the 1 for survival. Contacts
  cost nothing
- `drawer-close` is a replacement. The authors' door-close is a Sawyer arm seen in images, and
  how its data were made is unpublished
- fewer steps and updates (a million of each)
"""

import json
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.collect import __main__ as collecting
from benchmarks.collect import recording
from benchmarks.report import generalisation_table
from benchmarks.scores import runs
from benchmarks.studies.generalisation import tasks
from common import evaluation
from common.experiment import statistics

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks/results"
MODULE = "benchmarks.studies.generalisation.tasks"
Name = Literal["jump", "angle", "drawer-close"]

# Of the authors where they give some: horizon 5, weight of MOPO's penalty 1. No episode ends.
MODEL = "--no-termination --horizon 5 --widths 256 256 --rollout-batch 10000 --max-epochs 30"
FLAGS = {
    "sac": "",
    "iql": "",
    "cql": "--num-actions 1",
    "mopo --penalty-scale 0": MODEL,
    "mopo": f"--penalty-scale 1 {MODEL}",
    "combo": f"--beta 0.5 {MODEL}",
}


@dataclass(frozen=True)
class Collect:
    """Collects steps, and writes them with the rewards of the task."""

    task: Name = "jump"  # see tasks.py
    seed: int = 0  # of SAC or the script's noise, and the environment
    num_steps: int = 100_000  # environment steps, each of which is in the data
    start_steps: int = 5_000  # SAC's steps with uniform actions and without updates
    out: str = "runs/generalisation"  # folder for SAC's checkpoints and for data


@dataclass(frozen=True)
class Commands:
    """Prints the command of each algorithm."""

    task: Name = "jump"  # see tasks.py
    num_updates: int = 10_000  # gradient steps
    num_seeds: int = 1  # seeds trained together
    out: str = "runs/generalisation"  # folder with data


@dataclass(frozen=True)
class Report:
    """Writes results/generalisation.json and prints the table of all finished runs."""

    out: str = "runs/generalisation"  # folder with the runs
    results: str = str(RESULTS)  # folder for the results


def relabel(rows, task):
    """The rows of a replay with the rewards of a task."""
    reward = tasks.REWARDS[tasks.TASKS[task].env_id]
    reward = reward(rows["obs"], rows["action"], rows["next_obs"])
    return rows | {"reward": reward.astype(np.float32)}


def learn(cfg, own):
    """All rows of SAC's training."""
    folder = Path(cfg.out) / f"{own.env_id}-s{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    own = replace(own, kind="expert")  # to the end, whatever the returns
    collecting.check_settings(own, folder)
    _, replay, _ = collecting.train(own, evaluation.make(own.env_id), folder, -np.inf)
    return replay.filled()


def script(cfg, own):
    """Rows of the script in equal parts: with noise of std 0.1, 0.2, 0.3, and uniform actions."""
    rng, noise = np.random.default_rng(cfg.seed), (0.1, 0.2, 0.3, None)

    def take(action, i):
        if noise[i] is None:
            return (rng.uniform(-1, 1, action.shape).astype(np.float32),)
        return ((action + noise[i] * rng.normal(size=action.shape)).clip(-1, 1, dtype=np.float32),)

    envs = [evaluation.make(own.env_id) for _ in noise]
    rows = recording.play(envs, tasks.open_drawer, rng, cfg.num_steps, lambda: take)
    return recording.cut(rows, cfg.num_steps)


def collect(cfg):
    """The dataset's Path."""
    task = tasks.TASKS[cfg.task]
    own = collecting.Config(
        env_id=task.before, seed=cfg.seed, num_steps=cfg.num_steps, sac_steps=cfg.num_steps,
        start_steps=cfg.start_steps, work=cfg.out, out=str(Path(cfg.out) / "data"),
    )  # fmt: skip
    before = (learn if task.kind == "replay" else script)(cfg, own)
    rows = relabel(before, cfg.task)
    path = recording.export(
        replace(own, env_id=task.env_id, kind=task.kind),
        rows,
        rows["obs"].shape[1:],
        evaluation.make(task.env_id).action_space,
        (0.0, 100.0, "scores are returns: 0 and 100 are those"),
        {
            "command": shlex.join(
                [*"python -m benchmarks.studies.generalisation".split(), *sys.argv[1:]]
            ),
            "collected_on": task.before,
            "returns_there": summary(recording.episode_returns(before)),
        },
        made_by="SAC" if task.kind == "replay" else "a script with noise",
        packages=["mujoco", *["ogbench"] * (cfg.task == "drawer-close")],
    )
    print(f"{path}: {summary(recording.episode_returns(rows))}")
    return path


def summary(returns):
    return {name: float(f(returns)) for name, f in (("mean", np.mean), ("max", np.max))}


def dataset(task):
    """The dataset's name."""
    task = tasks.TASKS[task]
    return f"stillwater/{task.env_id.removesuffix('-v0').lower()}/{task.kind}-v0"


def commands(cfg):
    """[words after `python`] of each algorithm."""
    every = max(1, cfg.num_updates // 5_000) * 1_000  # five evaluations
    end = f"--num-updates {cfg.num_updates} --eval-every {every} --num-seeds {cfg.num_seeds}"
    where = f"--env {dataset(cfg.task)} --env-module {MODULE} --out {cfg.out}"
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
    """Collects the finished runs below --out: {task: {"data": ..., "rows": [...]}}; to a file."""
    found, record = [], {}
    for path in sorted(Path(cfg.out).glob("*/*/*/config.json")):
        with suppress(SystemExit, FileNotFoundError):  # not finished
            found.append(runs.collect(path.parent))
    merged = list(runs.merge(found))
    for task in tasks.TASKS:
        mine = [run for run in merged if run["dataset"] == dataset(task)]
        if mine:
            mine.sort(key=lambda run: list(FLAGS).index(which(run)))
            data = {k: mine[0]["data"][f"{k}_return"] for k in ("mean", "best")}
            record[task] = {"data": data, "rows": [row(run) for run in mine]}
    if not record:
        raise SystemExit(f"{cfg.out}: no finished run on a task's data.")
    path = Path(cfg.results) / "generalisation.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(generalisation_table(record), end="")
    return record


def row(run):
    """What the results keep of merged runs."""
    returns = np.array(run["returns"])
    low, high = statistics.interval(statistics.of_seeds(returns))
    values = dict(mean=returns.mean(), low=low, high=high)
    return {
        "run": runs.NAMES[which(run)], **{k: round(float(x), 1) for k, x in values.items()},
        "seeds": len(returns), "diverged": run["diverged"], "updates": run["updates"],
        "curve": {step: round(float(np.mean(x)), 1) for step, x in run["evaluations"].items()},
        "command": run["command"], "commit": run["commit"],
    }  # fmt: skip


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
