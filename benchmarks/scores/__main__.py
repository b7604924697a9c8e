"""Runs a grid of algorithms x datasets x seeds with the public commands; can be continued.

    python -m benchmarks.scores                                   # the default grid, short runs
    python -m benchmarks.scores --algorithms iql awac --num-seeds 5 --budget full
    python -m benchmarks.scores --dry-run                         # the commands and their state

A cell is one command, `python algorithms/NAME.py --env ...`. It is done if a run folder below --out
has the same config and the returns after the last update; these are then added to --results (see
report.py). A run with a checkpoint is resumed, else a new one is started. Output goes to
<out>/logs. On a cluster whose machines share this folder and --out:

    python -m benchmarks.scores --seeds-per-run 1 --slurm grid.sh && sbatch grid.sh
    python -m benchmarks.scores --seeds-per-run 1 --ray auto      # needs pip install ray

A machine without a shared folder computes a part of the grid in pieces, whose results are merged:

    python -m benchmarks.scores --algorithms cql --time-limit 540 --pack cql.tar.gz
    python -m benchmarks.scores --merge cql.tar.gz
"""

import dataclasses
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from benchmarks.scores import cluster, runs
from common import experiment

ROOT = Path(__file__).resolve().parents[2]

SETTLED = "--num-updates 100000 --eval-every 5000"  # five time constants of a usual critic
MODEL = f"{SETTLED} --widths 256 256 --max-epochs 100"
SHORT = {  # flags of three seeds on three datasets, some nights of two CPU cores
    "bc": "--num-updates 50000 --eval-every 5000",
    "10%bc": "--fraction 0.1 --num-updates 50000 --eval-every 5000",
    **dict.fromkeys("sac td3_bc rebrac edac bcq bear brac awr awac iql".split(), SETTLED),
    "cql": f"{SETTLED} --num-actions 1",
    **dict.fromkeys(("mopo", "combo", "mobile"), MODEL),
    "mbpo": f"--penalty-scale 0 {MODEL}",
    "fql": f"{SETTLED} --widths 256 256",
    "bc-categorical": "--head categorical --num-updates 5000 --eval-every 1000",
    "dqn": f"{SETTLED} --widths 64 64 --alpha 0",
    **dict.fromkeys(["discrete_bcq", "discrete_cql"], f"{SETTLED} --widths 64 64"),
    "cal_ql": f"{SETTLED} --num-actions 1",  # its offline phase
    "rvs": "--num-updates 50000 --eval-every 5000 --batch-size 256 --widths 256 256",
    "dt": "--num-updates 5000 --eval-every 1000 --warmup 1000",
    "diffuser": "--num-updates 16000 --eval-every 8000 --batch-size 32 --lr 5e-4"
    " --plan-every 2 --ddim-steps 5 --samples 16 --eval-episodes 5",  # a cheap planner
    "decision_diffuser": "--num-updates 16000 --eval-every 8000 --batch-size 32 --lr 5e-4"
    " --eval-episodes 5",
    "rlpd": "--num-updates 20000 --eval-every 2000",  # as many steps in the environment
}
FULL = dict.fromkeys(SHORT, "") | {"10%bc": "--fraction 0.1", "mbpo": "--penalty-scale 0"}
FULL |= {"dqn": "--alpha 0", "bc-categorical": "--head categorical"}
BUDGETS = {"short": SHORT, "full": FULL}
FILES = {"10%bc": "bc", "mbpo": "mopo", "dqn": "discrete_cql"}  # others are file names
FILES |= {"bc-categorical": "bc"}
DISCRETE = ("bc-categorical", "dqn", "discrete_bcq", "discrete_cql")  # take discrete actions
CHOICES = ("cartpole", "acrobot", "lunarlander", "minatar")  # words in names of discrete datasets
DATASETS = ("halfcheetah/medium-v0", "hopper/medium-replay-v0", "walker2d/medium-v0")


@dataclasses.dataclass(frozen=True)
class Config:
    algorithms: tuple[Literal[tuple(BUDGETS["short"])], ...] = tuple(BUDGETS["short"])
    datasets: tuple[str, ...] = tuple(f"stillwater/{name}" for name in DATASETS)  # as for --env
    num_seeds: int = 3  # seeds 0, 1, ...
    seeds_per_run: int = 0  # seeds trained together under vmap; 0: all; 1: the most cells
    budget: Literal[tuple(BUDGETS)] = "short"  # the flags of each algorithm
    updates: int = 0  # gradient steps of every algorithm; 0: as in the budget
    flags: str = ""  # additional flags for every command: --flags="--eval-episodes 100"
    out: str = "runs"  # folder for run folders
    results: str = str(ROOT / "benchmarks/results")  # folder for results
    jobs: int = 0  # runs at once; 0: one for two CPU cores, one on a GPU
    time_limit: int = 0  # seconds after which all runs save and stop; 0: no limit
    pack: str = ""  # at the end write the results of finished cells to this .tar.gz file
    merge: tuple[str, ...] = ()  # only add the results in these packed files
    dry_run: bool = False  # only print the commands and their state
    cell: int | None = None  # run only this cell, counted from 0
    slurm: str = ""  # only write a SLURM job script with one task a cell to this file
    ray: str = ""  # run on the Ray cluster at this address; "auto": a started one; "local": here


class Cell(NamedTuple):
    """One command of the grid."""

    name: str  # of the cell and its log
    algorithm: str  # name of the file
    config: object  # its Config as the command resolves it
    words: list[str]  # flags of the command


def grid(cfg):
    """All cells. Their order depends only on the flags.

    Algorithms for discrete actions are paired with datasets of such alone, the others with others.
    """
    cells, together = [], cfg.seeds_per_run or cfg.num_seeds
    seeds = range(0, cfg.num_seeds, together)
    for name, env, seed in itertools.product(cfg.algorithms, cfg.datasets, seeds):
        if (name in DISCRETE) != any(word in env.lower() for word in CHOICES):
            continue
        algorithm, flags = FILES.get(name, name), BUDGETS[cfg.budget][name]
        if cfg.updates:
            times = next(n for n in range(10, 0, -1) if cfg.updates % n == 0)  # evaluations
            flags = re.sub(r"--(num-updates|eval-every) \S+", "", flags)
            flags += f" --num-updates {cfg.updates} --eval-every {cfg.updates // times}"
        count = min(together, cfg.num_seeds - seed)
        words = ["--env", env, *shlex.split(f"{flags} {cfg.flags}")]
        words += ["--seed", str(seed), "--num-seeds", str(count), "--out", cfg.out]
        module = load(algorithm)
        wanted = tyro.cli(module.Config, args=words)
        wanted = identity(experiment.resolve(wanted, getattr(module, "TUNED", None)))
        stamp = hashlib.sha256(repr(wanted).encode()).hexdigest()[:8]
        label = re.sub(r"[^\w.%]+", "-", f"{name}-{env}-s{seed}x{count}")[-100:]
        cells.append(Cell(f"{label}-{stamp}", algorithm, wanted, words))
    return cells


load = functools.cache(experiment.module)


def identity(cfg):
    """A run's config without the fields that do not change its numbers."""
    return dataclasses.replace(cfg, out="", resume="", wandb=False)


def left_to_the_run(wanted, stored, words):
    """`wanted`, with the stored values of fields that are None and that its command left out.

    For example, DT's targets are then the best return of the data. words: of the stored command.
    """
    flags = {word.split("=")[0].replace("_", "-") for word in words}
    names = [name for name, value in vars(wanted).items() if value is None]
    names = [name for name in names if "--" + name.replace("_", "-") not in flags]
    return dataclasses.replace(wanted, **{name: getattr(stored, name) for name in names})


def find(cell, out):
    """("done", "partly done" or "missing"; the newest run folder in this state with the config)."""
    found = {"missing": None}
    for folder in sorted(out.glob(f"{cell.algorithm}/*/*/")):
        # a damaged folder counts as missing
        with suppress(experiment.RunError, OSError, ValueError, TypeError, KeyError):
            info, stored = experiment.read(folder, type(cell.config))
            if identity(stored) == left_to_the_run(cell.config, stored, info["command"]):
                returns, last = {}, str(cell.config.num_updates)
                with suppress(FileNotFoundError):
                    returns = experiment.read_returns(
                        folder, stored.num_seeds, stored.eval_episodes
                    )
                if last in returns:
                    found["done"] = folder
                elif any(folder.glob("checkpoint*/checkpoint.json")):
                    found["partly done"] = folder
    return next((x, found[x]) for x in ("done", "partly done", "missing") if x in found)


def command(cell, folder):
    """Words after `python`. folder: the run to resume; None: a new run."""
    words = ["--resume", str(folder)] if folder else cell.words
    return [f"algorithms/{cell.algorithm}.py", *words]


def run(cell, cfg, children, stops):
    """Runs a cell or what is left of it: "done", "failed", "stopped" or "running elsewhere".

    children: list of all running processes. stops: list; not empty once no cell may start.
    """
    out, began = Path(cfg.out).expanduser().resolve(), time.time()
    path = out / "logs" / f"{cell.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as log:
        try:  # the child keeps the lock even if this process is killed
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{cell.name}: running elsewhere", flush=True)
            return "running elsewhere"
        state, folder = find(cell, out)
        if state == "done":
            runs.add(folder, Path(cfg.results))
            print(f"{cell.name}: done before", flush=True)
            return "done"
        if stops:
            return "stopped"
        script, *words = command(cell, folder)
        print(f"{cell.name}: " + (f"resuming {folder}" if folder else "starting"), flush=True)
        log.write(f"\n$ python {shlex.join([script, *words])}\n".encode())
        log.flush()
        start = log.tell()
        line = [sys.executable, str(ROOT / script), *words]
        # in a session of its own, or Ctrl-C would reach it twice and it would not save
        child = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        children.append(child)
        if stops:
            child.terminate()
        code = child.wait()
        children.remove(child)
        state, folder = find(cell, out)
        minutes = (time.time() - began) / 60
        if state == "done":
            path = runs.add(folder, Path(cfg.results))
            print(f"{cell.name}: done in {minutes:.1f} min, {path.name}", flush=True)
            return "done"
        state = "stopped" if stops else "failed"
        log.seek(start)
        lines = [] if stops else log.read().decode(errors="replace").splitlines()[-10:]
        lines = [f"{cell.name}: {state}, exit code {code}, see {path}", *lines]
        print("\n    ".join(lines), flush=True)
        return state


def work(cells, cfg):
    """Runs the cells, --jobs at once; their states. On Ctrl-C or SIGTERM they save and stop."""
    children, stops, before = [], [], {}

    def stop(*_):
        stops.append(True)
        print("Stopping once each run has saved. Ctrl-C again stops at once.", flush=True)
        for child in list(children):
            child.terminate()  # SIGINT would be ignored in a background job until training begins

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, stop)
    alarm = threading.Timer(cfg.time_limit, stop)
    if cfg.time_limit:
        alarm.start()
    with ThreadPoolExecutor(cfg.jobs or fitting()) as pool:
        states = list(pool.map(lambda cell: run(cell, cfg, children, stops), cells))
    alarm.cancel()
    for number, handler in before.items():
        signal.signal(number, handler)
    return states


def fitting():
    """Number of runs at once, found in another process because JAX here would take the GPU."""
    code = "import jax; print(jax.default_backend())"
    backend = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    return max(1, os.cpu_count() // cluster.CORES) if backend.split()[-1:] == ["cpu"] else 1


def main(cfg: Config):
    if min(cfg.num_seeds - 1, cfg.seeds_per_run, cfg.updates, cfg.jobs, cfg.time_limit) < 0:
        raise SystemExit("--num-seeds must be at least 1, the other numbers at least 0.")
    if cfg.merge:
        for archive in cfg.merge:
            print(f"{archive}: {runs.unpack(archive, Path(cfg.results))} results added")
        return
    cells, out = grid(cfg), Path(cfg.out).expanduser().resolve()
    if cfg.cell is not None:
        if not 0 <= cfg.cell < len(cells):
            raise SystemExit(f"--cell {cfg.cell}: the grid has cells 0 to {len(cells) - 1}.")
        cells = [cells[cfg.cell]]
    if cfg.dry_run:
        states = [find(cell, out) for cell in cells]
        for cell, (state, folder) in zip(cells, states, strict=True):
            what = folder if state == "done" else f"python {shlex.join(command(cell, folder))}"
            print(f"{state:11}  {what}")
        states = [state for state, _ in states]
        print(", ".join(f"{states.count(x)} {x}" for x in ("done", "partly done", "missing")))
    elif cfg.slurm:
        cluster.slurm(cfg, len(cells))
    else:
        states = cluster.on_ray(cfg, len(cells)) if cfg.ray else work(cells, cfg)
        if cfg.pack:
            folders = [folder for state, folder in (find(cell, out) for cell in cells) if folder]
            print(f"{cfg.pack}: {runs.pack(folders, cfg.pack)} results")
        failed = [cell.name for cell, x in zip(cells, states, strict=True) if x == "failed"]
        if failed:
            print(f"{len(failed)} of {len(cells)} failed: {' '.join(failed)}")
        if "stopped" in states:
            print("Stopped. The same command continues.")
            raise SystemExit(130)
        raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
