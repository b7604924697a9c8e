"""The grid of benchmarks.scores on a cluster: a SLURM job array or Ray tasks, each `--cell K`."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

CORES = 2  # CPU cores for a run
OWN = ("jobs", "dry_run", "slurm", "ray", "pack")  # flags of the whole grid, not of one cell
SLURM = """#!/bin/bash
# One task a cell: sbatch {file}. Options go before the name: --time=12:00:00 --gpus=1
# Submitted again, it skips finished cells and resumes those that the time limit stopped. A signal
# of SLURM ten minutes before the limit lets a run save.
#SBATCH --job-name=stillwater
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task={cores}
#SBATCH --signal=B:TERM@600
#SBATCH --output={out}/logs/slurm-%A-%a.log
cd {here} || exit
exec {words} "$SLURM_ARRAY_TASK_ID"
"""


def words(cfg):
    """Words of the command for one cell; its number follows."""
    found = [sys.executable, "-m", "benchmarks.scores"]
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        if value != field.default and field.name not in OWN:
            found += [flag, *value] if isinstance(value, tuple) else [f"{flag}={value}"]
    return [*found, "--cell"]


def slurm(cfg, count):
    """Writes the job script of `count` tasks to cfg.slurm."""
    out = Path(cfg.out).expanduser().resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)  # SLURM does not create it
    values = {"out": out, "here": shlex.quote(os.getcwd()), "words": shlex.join(words(cfg))}
    values |= {"file": Path(cfg.slurm).name, "last": count - 1, "cores": CORES}
    Path(cfg.slurm).write_text(SLURM.format(**values), "utf-8")
    print(f"{count} tasks. Submit them: sbatch {cfg.slurm}")


def on_ray(cfg, count):
    """Runs `count` cells as Ray tasks; their states."""
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray needs one more package: pip install ray") from None

    def task(line, here):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        child = subprocess.Popen(line, cwd=here, **pipe)
        while True:
            try:  # ray.cancel is heard between two waits
                return child.communicate(timeout=1)[0], child.returncode
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                child.terminate()

    ray.init(None if cfg.ray == "local" else cfg.ray, log_to_driver=False)
    have = ray.cluster_resources()
    needs = {"num_cpus": min(CORES, have["CPU"]), "num_gpus": int(have.get("GPU", 0) >= 1)}
    task = ray.remote(max_retries=0, **needs)(task)
    sent = {task.remote([*words(cfg), str(i)], os.getcwd()): i for i in range(count)}
    states = ["stopped"] * count
    while sent:
        try:
            (one, *_), _ = ray.wait(list(sent))
            text, code = ray.get(one)
            states[sent[one]] = {0: "done", 130: "stopped"}.get(code, "failed")
            print(text, end="", flush=True)
        except KeyboardInterrupt:
            print("Stopping: each run ends its chunk and saves.", flush=True)
            for one in sent:
                ray.cancel(one)
            continue
        except ray.exceptions.TaskCancelledError:
            pass  # it had not begun
        except ray.exceptions.RayError as error:  # its machine is gone, say
            states[sent[one]] = "failed"
            print(error, flush=True)
        del sent[one]
    return states
