"""A grid of runs, algorithms x datasets x seeds, by the public commands; called again, it goes on.

    python -m benchmarks.scores                                   # the default grid, short runs
    python -m benchmarks.scores --algorithms iql awac --num-seeds 5 --budget full
    python -m benchmarks.scores --dry-run                         # the commands; what is done

A cell is one command, `python algorithms/NAME.py --env ...`. It is done when a run folder below
--out whose config.json holds its very config has the returns of the last update, which then go to
--results (see report.py); one with a checkpoint is resumed; else a new one begins. The output goes
to <out>/logs. On a cluster whose machines share this folder and --out:

    python -m benchmarks.scores --seeds-per-run 1 --slurm grid.sh && sbatch grid.sh
    python -m benchmarks.scores --seeds-per-run 1 --ray auto      # needs pip install ray

A machine without a shared folder does its part in pieces, and the results are added to the others:

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
SHORT = {  # flags of three seeds on three datasets, some nights of two CPU cores
    "bc": "--num-updates 50000 --eval-every 5000",
    "10%bc": "--fraction 0.1 --num-updates 50000 --eval-every 5000",
    **dict.fromkeys("sac td3_bc rebrac bcq bear awr awac iql".split(), SETTLED),
    "cql": f"{SETTLED} --num-actions 1",
    "combo": f"{SETTLED} --widths 256 256 --max-epochs 100",
    "rvs": "--num-updates 50000 --eval-every 5000 --batch-size 256 --widths 256 256",
    "dt": "--num-updates 5000 --eval-every 1000 --warmup 1000",
    "diffuser": "--num-updates 16000 --eval-every 8000 --batch-size 32 --lr 5e-4"
    " --plan-every 2 --ddim-steps 5 --samples 16 --eval-episodes 5",  # a cheap planner
}
BUDGETS = {"short": SHORT, "full": dict.fromkeys(SHORT, "") | {"10%bc": "--fraction 0.1"}}
FILES = {"10%bc": "bc"}  # the other names are those of their files
DATASETS = ("halfcheetah/medium-v0", "hopper/medium-replay-v0", "walker2d/medium-v0")


@dataclasses.dataclass(frozen=True)
class Config:
    algorithms: tuple[Literal[tuple(BUDGETS["short"])], ...] = tuple(BUDGETS["short"])
    datasets: tuple[str, ...] = tuple(f"stillwater/{name}" for name in DATASETS)  # as for --env
    num_seeds: int = 3  # 0, 1, ...
    seeds_per_run: int = 0  # trained together under vmap; 0: all; 1: the most cells
    budget: Literal[tuple(BUDGETS)] = "short"  # each algorithm's flags
    updates: int = 0  # of every algorithm; 0: as the budget says
    flags: str = ""  # more of them for every command: --flags="--eval-episodes 100"
    out: str = "runs"  # where run folders go, and are looked for
    results: str = str(ROOT / "benchmarks/results")  # where report.py looks for runs
    jobs: int = 0  # runs at once; 0: one for every two CPU cores, on a GPU one
    time_limit: int = 0  # seconds until all runs save and stop, to be resumed; 0: none
    pack: str = ""  # then write the finished cells' results to this .tar.gz file
    merge: tuple[str, ...] = ()  # add the results in these files, packed elsewhere, no more
    dry_run: bool = False  # print the commands and what is done, no more
    cell: int | None = None  # run this one alone; the first is 0
    slurm: str = ""  # write a job script, one task a cell, to this file, no more
    ray: str = ""  # run on Ray at this address; "auto": where it was started; "local": here


class Cell(NamedTuple):
    name: str
    algorithm: str  # its file
    config: object  # its Config as the command resolves it
    words: list[str]  # of the command


def grid(cfg):
    """Every cell, in an order that the flags alone decide."""
    cells, together = [], cfg.seeds_per_run or cfg.num_seeds
    seeds = range(0, cfg.num_seeds, together)
    for name, env, seed in itertools.product(cfg.algorithms, cfg.datasets, seeds):
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
    """A run's config without what leaves its numbers as they are."""
    return dataclasses.replace(cfg, out="", resume="", wandb=False)


def left_to_the_run(wanted, stored, words):
    """`wanted`, but None as the stored run has it where its command, these words, set nothing: DT's
    targets, for one, are then the data's best return."""
    flags = {word.split("=")[0].replace("_", "-") for word in words}
    names = [name for name, value in vars(wanted).items() if value is None]
    names = [name for name in names if "--" + name.replace("_", "-") not in flags]
    return dataclasses.replace(wanted, **{name: getattr(stored, name) for name in names})


def find(cell, out):
    """("done", "partly done" or "missing", the newest such run folder of this config)."""
    found = {"missing": None}
    for folder in sorted(out.glob(f"{cell.algorithm}/*/*/")):
        # A damaged folder is as if it were not there
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
    """Words after `python`; folder: of the run to resume, None: a new one."""
    words = ["--resume", str(folder)] if folder else cell.words
    return [f"algorithms/{cell.algorithm}.py", *words]


def run(cell, cfg, children, stops):
    """Trains what is left of a cell: "done", "failed", "stopped" or "running elsewhere".

    children: the processes of all cells, this one among them; stops: not empty: start no more.
    """
    out, began = Path(cfg.out).expanduser().resolve(), time.time()
    path = out / "logs" / f"{cell.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as log:
        try:  # the child keeps the lock, too, even if this process is killed
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
        # In a session of its own Ctrl-C does not reach it: told twice, it would not save
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
    """Runs the cells, --jobs at once; their states. Ctrl-C (SIGTERM): they save and end."""
    children, stops, before = [], [], {}

    def stop(*_):
        stops.append(True)
        print("Stopping: each run ends its chunk and saves. Again: at once.", flush=True)
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
    """How many runs at once; asked in another process, as JAX in this one would take the GPU."""
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
            raise SystemExit(f"--cell {cfg.cell}: the grid has 0 to {len(cells) - 1}.")
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
            print("Stopped. The same command goes on.")
            raise SystemExit(130)
        raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
