"""How fast are the updates of other implementations on this machine?

    PEERENV/bin/python -m benchmarks.speed.peers corl --checkout DIR
    PEERENV/bin/python -m benchmarks.speed.peers corl --checkout DIR --only iql awac --threads 2

Runs in the peer's own environment with a checkout of its repository. benchmarks/peers/ has the
peers, benchmarks.speed our own times; compare only times of the same hour. Writes
results/speed/PEER.json, or PEER-2-threads.json, row by row.

The peer's training loop is run where it can be run by itself, else the calls inside it: drawing a
batch from the peer's buffer, one update, waiting for the result. The data are noise in the shapes
of HalfCheetah. A row has milliseconds per update, the median over chunks after two warm-up chunks;
for JAX, the extra time of the warm-up counts as compilation.
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
    """Ends a peer's loop when the time is up."""


def measure(loop, seconds):
    """Seconds of each chunk (n,): two for warm-up, then at least three, until `seconds` are over.

    loop: of a peers.Row.
    """
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
    """A row of the JSON, from seconds of chunks (n,). compiles: whether the peer uses JAX."""
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
    """Limits this process and its children to `threads` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= dict(OMP_NUM_THREADS=str(threads), JAX_PLATFORMS="cpu", TQDM_DISABLE="1")
    if compiles:
        if threads == 1:
            os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        import jax

        jax.jit(lambda x: x + 1)(1.0)  # reads XLA_FLAGS, before peers set them for a GPU
    else:
        import torch

        torch.set_num_threads(threads)


def described(facts, checkout):
    """Name, repository, commit and versions of a peer, as plain data."""
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
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row")
    parser.add_argument("--threads", type=int, default=1, help="cores to use")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/speed"))
    args = parser.parse_args()
    peer, checkout = importlib.import_module(f"benchmarks.peers.{args.peer}"), args.checkout
    if unknown := set(args.only or ()) - set(peer.CASES):
        parser.error(f"unknown case {', '.join(unknown)}; {args.peer} has {', '.join(peer.CASES)}")

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
