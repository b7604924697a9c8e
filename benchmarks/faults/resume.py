"""Kills runs at random moments, resumes them, and compares them with an uninterrupted run.

    python -m benchmarks.faults.resume                       # every algorithm, 10 kills each
    python -m benchmarks.faults.resume --algorithms iql --kills 24   # the file keeps the others

Each trial starts the real command and kills it (SIGKILL) while it compiles, trains, evaluates, is
between the metrics and the checkpoint, or writes the checkpoint. It is resumed with --resume and
killed again, once in each of these phases, in random order. A kill while compiling follows each of
the others, so that nothing is saved in between. Then the run finishes.

Equal bits means: equal metrics.csv without the timing columns, equal returns.json, and equal
checkpoint/state.msgpack, which holds weights, optimisers and all other state. Writes
benchmarks/results/resume.json.
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

PHASES = {
    0: "starting",
    1: "compiling",
    2: "training",
    3: "evaluating",
    4: "between metrics and checkpoint",
    5: "writing the checkpoint",
}
COMPILING, TRAINING, EVALUATING, BETWEEN, WRITING = 1, 2, 3, 4, 5
PAUSE = 0.02  # seconds that a run waits between metrics and checkpoint, so that kills hit

# Long enough for a kill in each phase, short enough for a dozen runs
COMMON = "--num-seeds 2 --num-updates 600 --log-every 20 --eval-every 60 --eval-episodes 2"
COMMON += " --batch-size 32"
NETWORK = "--widths 32 32"
MODEL = "--save-every 120 --max-epochs 3 --rollout-every 60 --rollout-batch 2000 "
MODEL += "--model-widths 32 32 --model-decay 1e-5 1e-5 1e-5"
FLAGS = {
    "awr": f"{NETWORK} --actor-steps 10 --critic-steps 5",
    "bcq": f"{NETWORK} --vae-widths 32 32",
    "bear": f"{NETWORK} --vae-widths 32 32 --warm-start 200",
    "brac": f"{NETWORK} --clone-updates 200",
    "cal_ql": f"{NETWORK} --critic-widths 32 32 --num-actions 2 --online-steps 540",
    **dict.fromkeys(("combo", "mobile", "mopo"), f"{NETWORK} {MODEL}"),
    "cql": f"{NETWORK} --num-actions 2",
    "diffuser": "--width 16 --multiples 1 2 --horizon 4 --samples 2 --ddim-steps 2 --plan-every 4",
    "fql": f"{NETWORK} --chunk 3",
    "decision_diffuser": "--width 16 --multiples 1 2 --horizon 4 --ddim-steps 2 --plan-every 3",
    "dt": "--width 16 --layers 1 --context 5 --warmup 100",
    "iql": f"{NETWORK} --online-steps 540",
    "rlpd": f"{NETWORK} --utd 2 --num-critics 4 --random-steps 100 --pretrain-updates 60",
}


FILES = sorted((ROOT / "algorithms").glob("*.py"))
TRAINERS = tuple(x.stem for x in FILES if "\ndef train(" in x.read_text("utf-8"))


@dataclass(frozen=True)
class Config:
    algorithms: tuple[str, ...] = TRAINERS
    kills: int = 10  # for each algorithm
    seed: int = 0  # seed of the random moments
    results: str = str(ROOT / "benchmarks/results/resume.json")  # file to write


def flags(algorithm):
    """The flags of an algorithm's run."""
    return f"{COMMON} {FLAGS.get(algorithm, NETWORK)}".split()


def child(mark, script, *flags):
    """Runs a script as from the command line and notes its phase in the file `mark`."""
    with open(mark, "r+b", buffering=0) as file:

        def note(phase):
            file.seek(0)
            file.write(bytes([phase]))

        def doing(phase, then, call, pause=0.0):
            def noted(*args, **kwargs):
                note(phase)
                value = call(*args, **kwargs)
                note(then)
                time.sleep(pause)
                return value

            return noted

        score = doing(EVALUATING, TRAINING, evaluation.evaluate)

        def evaluate(policy, *args):
            jax.block_until_ready(policy.args)  # waits for the training of the state
            return score(policy, *args)

        run = experiment.Run
        evaluation.evaluate = evaluate
        checkpoint.save = doing(WRITING, WRITING, checkpoint.save)
        run.restore = doing(0, COMPILING, run.restore)
        run.record = doing(BETWEEN, BETWEEN, run.record, PAUSE)
        run.save = doing(BETWEEN, TRAINING, run.save)
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")


def start(algorithm, mark, *flags):
    script = str(ROOT / "algorithms" / f"{algorithm}.py")
    mark.write_bytes(b"\0")
    command = [sys.executable, "-m", "benchmarks.faults.resume", "child", str(mark), script, *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def durations(process, mark):
    """Seconds of one visit to each phase of a resumed run, the median until the process ends."""
    visits, last, begin = defaultdict(list), 0, time.perf_counter()
    while process.poll() is None:
        if (now := mark.read_bytes()[0]) != last:
            end = time.perf_counter()
            visits[last].append(end - begin)
            last, begin = now, end
        time.sleep(0.0005)
    finish(process)
    found = {phase: statistics.median(seconds) for phase, seconds in visits.items()}
    found[COMPILING] /= 5  # a resumed run finds its programs compiled
    return found


def kill(process, mark, phase, visit, seconds):
    """Kills at a random moment of the `visit`-th visit to a phase; the phase hit, "" for none."""
    count, last = 0, None
    while process.poll() is None:
        now = mark.read_bytes()[0]
        count += now == phase != last
        last = now
        if count == visit:
            time.sleep(random.uniform(0, seconds))
            process.kill()
            process.communicate()  # waits, and closes its pipe
            return PHASES[mark.read_bytes()[0]]
        time.sleep(0.0002)
    return ""


def outcome(out):
    """What must be equal in equal runs, for the only run below the folder `out`."""
    (folder,) = out.glob("*/*/*")
    lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [line.rsplit(",", len(experiment.TIMING))[0] for line in lines]
    files = [(folder / name).read_bytes() for name in ("returns.json", "checkpoint/state.msgpack")]
    return rows, *files


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {errors}")


def trial(algorithm, plan, folder, seconds):
    """([(phase hit, last step saved)], out) of a run killed in the phases of `plan`."""
    out, mark, hits = folder / "out", folder / "mark", []
    for phase in plan:
        found = [path.parent for path in out.glob("*/*/*/config.json")]
        words = ["--resume", str(found[0])] if found else [*flags(algorithm), "--out", str(out)]
        visit = 1 if phase == COMPILING else random.randint(1, 4)
        process = start(algorithm, mark, *words)
        hit = kill(process, mark, phase, visit, seconds.get(phase, 0.1))
        if not hit:
            finish(process)  # or it failed
            break  # the run finished first
        (run,) = out.glob("*/*/*")
        hits.append((hit, experiment.last_step(run)))
        print(f"{algorithm}: killed while {hit}, checkpoint of step {hits[-1][1]:,}", flush=True)
    found = [path.parent for path in out.glob("*/*/*/config.json")]
    finish(start(algorithm, mark, "--resume", str(found[0])))
    return hits, out


def plan(kills):
    """Phases to kill in: in random order, each followed by a kill while compiling."""
    others = [TRAINING, EVALUATING, BETWEEN, WRITING]
    random.shuffle(others)
    return [x for phase in others for x in (phase, COMPILING)][:kills]


def shake(algorithm, kills, folder):
    """The row of results for an algorithm, from trials in a folder."""
    process = start(algorithm, folder / "mark", *flags(algorithm), "--out", str(folder / "whole"))
    seconds = durations(process, folder / "mark")
    whole, phases, trials, same, twice = outcome(folder / "whole"), Counter(), 0, 0, 0
    while phases.total() < kills:
        place = folder / f"trial{trials}"
        place.mkdir()
        hits, out = trial(algorithm, plan(kills - phases.total()), place, seconds)
        equal = outcome(out) == whole
        print(f"{algorithm}: {len(hits)} kills, equal bits: {equal}", flush=True)
        phases.update(hit for hit, _ in hits)
        steps = [step for _, step in hits]
        twice += sum(a == b for a, b in zip(steps, steps[1:], strict=False))
        trials, same = trials + 1, same + equal
        if not hits:
            break
    row = {"algorithm": algorithm, "command": flags(algorithm), "kills": phases.total()}
    row |= {"phases": phases, "twice_in_a_row": twice}
    return row | {"runs": trials, "runs_with_equal_bits": same}


def main(cfg: Config):
    random.seed(cfg.seed)
    file, machine = Path(cfg.results), experiment.machine()
    rows = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    rows = {row["algorithm"]: row for row in rows}
    own = {"seed": cfg.seed} | {x: machine[x] for x in ("versions", "commit", "device")}
    for algorithm in cfg.algorithms:
        with tempfile.TemporaryDirectory() as folder:
            rows[algorithm] = shake(algorithm, cfg.kills, Path(folder)) | own
        facts = {"rows": [rows[name] for name in sorted(rows)]}
        file.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    if any(rows[x]["runs"] != rows[x]["runs_with_equal_bits"] for x in cfg.algorithms):
        raise SystemExit("resumed runs differ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main(tyro.cli(Config, description=__doc__))
