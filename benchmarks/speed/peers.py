"""How fast are other people's updates on this machine? speed.py has ours.

    PEERENV/bin/python -m benchmarks.speed.peers corl --checkout DIR
    PEERENV/bin/python -m benchmarks.speed.peers corl --checkout DIR --only iql awac --threads 2

Runs in the peer's own environment, with a checkout of its repository, on one core or on more;
benchmarks/peers/ has the peers. Writes results/speed/PEER.json, or PEER-2-threads.json, row by row.
Ratios to ours count only within the same hour.

The peer's code is called as its training calls it: its own loop where that can be run by itself,
else the calls inside that loop: drawing a batch from its own buffer, one update, and a wait for the
result. Data: noise in the shapes of halfcheetah. A row has milliseconds per update, the median over
chunks after two to warm up; for JAX, what these took longer than the median is compilation.
"""

import argparse
import importlib
import json
import os
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import peers

ROOT = Path(__file__).resolve().parents[2]

NAMES = sorted(x.stem for x in Path(peers.__file__).parent.glob("*.py") if x.stem != "__init__")


class Over(Exception):
    """Time is up."""


def measure(loop, seconds):
    """Seconds of each chunk: two to warm up, three or more of so many seconds in all."""
    times = [time.perf_counter()]

    def tick():
        times.append(time.perf_counter())
        if len(times) > 5 and times[-1] - times[2] >= seconds:
            raise Over

    try:
        loop(tick)
    except Over:
        return np.diff(times)


def result(row, chunks, compiles):
    """A row of the JSON from seconds of chunks; compiles: the peer is JAX."""
    steady = np.median(chunks[2:])
    return dict(
        what=row.what,
        sizes=row.sizes,
        ms_per_update=round(1000 * steady / row.updates, 4),
        ms_min=round(1000 * chunks[2:].min() / row.updates, 4),
        compile_seconds=round(max(0.0, chunks[:2].sum() - 2 * steady), 2) if compiles else 0.0,
        chunks=len(chunks) - 2,
        updates_per_chunk=row.updates,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def confine(threads, compiles):
    """This process, and those that it starts, to as many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= dict(OMP_NUM_THREADS=str(threads), JAX_PLATFORMS="cpu", TQDM_DISABLE="1")
    if compiles:
        if threads == 1:
            os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        import jax

        jax.jit(lambda x: x + 1)(1.0)  # reads XLA_FLAGS for good, before peers set them for a GPU
    else:
        import torch

        torch.set_num_threads(threads)


def described(facts, checkout):
    """Name, repository, commit and versions of a peer."""
    git = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = " ".join(f"{name}=={version(name)}" for name in (*facts["packages"], "numpy"))
    keep = {k: facts[k] for k in ("name", "repository")}
    return keep | dict(commit=commit, environment=versions)


def device(threads):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return dict(cpu=model, cores=os.cpu_count(), threads=threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=NAMES)
    parser.add_argument("--checkout", required=True, help="folder with the peer's repository")
    parser.add_argument("--only", nargs="+", help="some of the peer's cases")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each row")
    parser.add_argument("--threads", type=int, default=1, help="cores to use")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/speed"))
    args = parser.parse_args()
    peer, checkout = importlib.import_module(f"benchmarks.peers.{args.peer}"), args.checkout
    if unknown := set(args.only or ()) - set(peer.CASES):
        parser.error(f"{args.peer} has no {', '.join(unknown)}, but {', '.join(peer.CASES)}")

    checkout, compiles = str(Path(checkout).resolve()), "jax" in peer.PEER["packages"]
    facts = dict(peer=described(peer.PEER, checkout), device=device(args.threads))
    confine(args.threads, compiles)
    suffix = f"-{args.threads}-threads" if args.threads > 1 else ""
    file = Path(args.out) / f"{args.peer}{suffix}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    world = peers.prepare()
    for case in args.only or peer.CASES:
        for row in peer.CASES[case](checkout, world):
            new = result(row, measure(row.loop, args.seconds), compiles)
            print(json.dumps(new), flush=True)
            rows = [x for x in rows if (x["what"], x["sizes"]) != (row.what, row.sizes)] + [new]
            facts["time"] = new["time"]
            file.write_text(json.dumps(facts | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
