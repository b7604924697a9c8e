"""Kills runs at random moments, resumes them, and compares with a run that was left alone.

    python -m benchmarks.faults.resume    # 24 times IQL, 8 times COMBO; half an hour on one core

Each trial starts the real command, kills it (SIGKILL) while it trains, evaluates or writes its
checkpoint, and resumes it with --resume, killing again, until the trial's kills are spent; then it
may finish. Equal bits: metrics.csv but for the timing columns, returns.json, and the weights, the
optimisers and all else in checkpoint/state.msgpack. To benchmarks/results/resume.json.
"""

import json
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from common import evaluation, experiment
from common.experiment import checkpoint

ROOT = Path(__file__).resolve().parents[2]

PHASES = ("starting", "training", "evaluating", "writing the checkpoint")
RUNS = {  # long enough to be hit anywhere, short enough to be run thirty times
    "iql": "--num-seeds 2 --num-updates 4000 --eval-every 200 --eval-episodes 5".split(),
    "combo": (
        "--num-updates 600 --eval-every 50 --eval-episodes 5 --save-every 100 --max-epochs 3 "
        "--rollout-every 100 --rollout-batch 10000 --widths 64 64 --model-widths 64 64"
    ).split()
    + "--model-decay 1e-5 1e-5 1e-5".split(),
}


@dataclass(frozen=True)
class Config:
    kills: tuple[str, ...] = ("iql", "24", "combo", "8")  # algorithm, how often, ...
    each: int = 4  # kills in one trial
    seed: int = 0  # of the moments
    results: str = str(ROOT / "benchmarks/results/resume.json")


def child(mark, script, *flags):
    """Runs a script as its command line would, and notes in the file `mark` what it is doing."""
    with open(mark, "r+b", buffering=0) as file:

        def doing(phase, then, call):
            def noted(*args, **kwargs):
                file.seek(0)
                file.write(bytes([phase]))
                value = call(*args, **kwargs)
                file.seek(0)
                file.write(bytes([then]))
                return value

            return noted

        score = doing(2, 1, evaluation.evaluate)

        def evaluate(policy, *args):
            jax.block_until_ready(policy.args)  # the state: it is still being trained until then
            return score(policy, *args)

        evaluation.evaluate = evaluate
        checkpoint.save = doing(3, 1, checkpoint.save)
        experiment.Run.restore = doing(0, 1, experiment.Run.restore)
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")


def start(algorithm, mark, *flags):
    script = str(ROOT / "algorithms" / f"{algorithm}.py")
    mark.write_bytes(b"\0")
    command = [sys.executable, "-m", "benchmarks.faults.resume", "child", str(mark), script, *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def durations(process, mark):
    """Seconds of one visit to each phase, the median of all visits until the process ends."""
    visits, last, begin = defaultdict(list), 0, time.perf_counter()
    while process.poll() is None:
        if (now := mark.read_bytes()[0]) != last:
            end = time.perf_counter()
            visits[last].append(end - begin)
            last, begin = now, end
        time.sleep(0.0005)
    return {phase: statistics.median(seconds) for phase, seconds in visits.items()}


def kill(process, mark, phase, visit, seconds):
    """SIGKILL at a random moment of the `visit`-th visit to a phase; what was hit, if anything."""
    count, last = 0, None
    while process.poll() is None:
        now = mark.read_bytes()[0]
        count += now == phase != last
        last = now
        if count == visit:
            time.sleep(random.uniform(0, seconds))
            process.kill()
            process.wait()
            return PHASES[mark.read_bytes()[0]]
        time.sleep(0.0002)
    return ""


def outcome(out):
    """What equal runs have in common, of the only run below a folder."""
    (folder,) = out.glob("*/*/*")
    lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [line.rsplit(",", len(experiment.TIMING))[0] for line in lines]
    files = [(folder / name).read_bytes() for name in ("returns.json", "checkpoint/state.msgpack")]
    return rows, *files


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {errors}")


def trial(algorithm, kills, folder, seconds):
    """A run killed `kills` times and then finished: [(phase hit, step of its checkpoint)], out."""
    out, mark, hits = folder / "out", folder / "mark", []
    while len(hits) < kills:
        found = [path.parent for path in out.glob("*/*/*/config.json")]
        flags = ["--resume", str(found[0])] if found else [*RUNS[algorithm], "--out", str(out)]
        phase = random.choice([1, 2, 3])
        hit = kill(
            start(algorithm, mark, *flags), mark, phase, random.randint(1, 3), seconds[phase]
        )
        if not hit:
            break  # finished before its turn came
        (run,) = out.glob("*/*/*")
        hits.append((hit, experiment.last_step(run)))
        print(f"{algorithm}: killed while {hit}, checkpoint of step {hits[-1][1]:,}", flush=True)
    found = [path.parent for path in out.glob("*/*/*/config.json")]
    finish(start(algorithm, mark, "--resume", str(found[0])))
    return hits, out


def main(cfg: Config):
    random.seed(cfg.seed)
    rows = []
    for algorithm, kills in zip(cfg.kills[::2], map(int, cfg.kills[1::2]), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            process = start(
                algorithm, folder / "mark", *RUNS[algorithm], "--out", str(folder / "whole")
            )
            seconds = durations(process, folder / "mark")
            finish(process)
            whole, phases, trials, same = outcome(folder / "whole"), Counter(), 0, 0
            while phases.total() < kills:
                place = folder / f"trial{trials}"
                place.mkdir()
                left = kills - phases.total()
                hits, out = trial(algorithm, min(cfg.each, left), place, seconds)
                equal = outcome(out) == whole
                print(f"{algorithm}: {len(hits)} kills, equal bits: {equal}", flush=True)
                phases.update(hit for hit, _ in hits)
                trials, same = trials + 1, same + equal
            row = {"algorithm": algorithm, "command": RUNS[algorithm], "kills": phases.total()}
            row |= {"phases": phases, "runs": trials, "runs_with_equal_bits": same}
            rows.append(row)
    facts = {"seed": cfg.seed, **experiment.machine()}
    Path(cfg.results).write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n", "utf-8")
    if any(row["runs"] != row["runs_with_equal_bits"] for row in rows):
        raise SystemExit("resumed runs differ")


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main(tyro.cli(Config))
