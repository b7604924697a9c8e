"""Damaged run folders, metadata and caches: are all of them read or refused?

    python -m benchmarks.faults.fuzz_folders --cases 25000 --seed 0

A small run stopped half-way, the metadata.json of a Minari dataset and the cache of a dataset are
damaged, one file at a time. Damages change bytes, as in fuzz.py, or the content: JSON values of
other types and sizes, or a checkpoint whose hash fits its damage. A damaged run is resumed to its
end, or scored up to its environment; metadata is read with its dataset; a cache is read. Outcomes,
besides crashed, hung and grew of fuzz.py:

    read          the run made all its steps, or the cache gave the right numbers
    refused       one message, as a user sees it
    exception     a traceback, or a damaged cache that was used

Case i of a seed is always the same (`make_case`).
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import jax
import numpy as np
import tyro

from benchmarks.faults import fuzz
from common import datasets, evaluation, experiment
from common.datasets import cache
from common.experiment import files, plots, runtime

RUN_FILES = (
    "config.json metrics.csv returns.json diverged.json checkpoint/state.msgpack "
    "checkpoint/checkpoint.json checkpoint.old/state.msgpack checkpoint.old/checkpoint.json"
).split()
TARGETS = [("resume", name) for name in RUN_FILES] + [("score", name) for name in RUN_FILES]
TARGETS += [("metadata", "metadata.json"), ("cache", "about.json")]
TARGETS += [("cache", f"{name}.npy") for name in cache.ARRAYS]
ODD = [None, True, False, 0, 1, -1, 3.5, 10**10, -(10**30), 2**31, 1e308, "", "x", "\x1b[2J", "9"]
ODD += [[], {}, [[]], [1, [2, 3]], {"a": {}}, float("nan"), float("inf"), "a" * 10_000]


@dataclass(frozen=True)
class Config:
    cases: int = len(TARGETS) * 1_000  # number of damaged files
    seed: int = 0  # seed of the damages
    workers: int = 1  # processes at once
    out: str = str(fuzz.ROOT / "benchmarks/results/fuzz-folders.json")  # file for the figures


# --- Whole folders ---


def dataset():
    """A Dataset with twenty rows of an unknown environment."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(21, 3)).astype(np.float32)
    action = rng.uniform(-1, 1, (20, 2)).astype(np.float32)
    reward, done = rng.normal(size=20).astype(np.float32), np.zeros(20, np.float32)
    arrays = obs[:-1], action, reward, obs[1:], done, np.array([0, 10]), np.array([10, 10])
    told = {"sha256": "0" * 64, "notes": [], "layout": "HDF5", "verified": None, "metadata": {}}
    return datasets.Dataset("mine", "Hopper-v5", *arrays, 0.0, 10.0, told)


def template(bc, cfg, data):
    """A fresh state of BC."""
    keys = jax.vmap(jax.random.key)(np.arange(cfg.num_seeds))
    return jax.vmap(partial(bc.init, cfg=cfg), (0, None))(keys, data.transitions())


def go_on(run, state, last):
    """Records and saves every step up to `last`, without training."""
    for step in run.steps():
        returns = np.full((2, 2), float(step))
        loss = np.array([0.5, np.nan if step >= 4 else 0.5])  # the second seed diverges
        run.record(step, {"actor_loss": loss}, returns if step % run.cfg.eval_every == 0 else None)
        run.save(step, state)
        if step == last:
            return


def make_run(out, state_of):
    """The folder of a BC run stopped at update 6 of 10."""
    bc, data = experiment.module("bc"), dataset()
    cfg = bc.Config(num_updates=10, log_every=2, eval_every=2, eval_episodes=2, num_seeds=2,
                    batch_size=4, widths=(4,), out=str(out))  # fmt: skip
    cfg = experiment.resolve(cfg, {}, data)
    run = experiment.Run(cfg, data)
    go_on(run, run.restore(state_of(bc, cfg, data)), 6)
    return run.folder


def make_minari(folder):
    """The HDF5 file of a new Minari dataset with two episodes."""
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for name, x in fuzz.fields("Minari").items():
            file[name] = x
    spec = json.dumps({"id": "Mine-v0", "kwargs": {}, "max_episode_steps": 9})
    about = {"env_spec": spec, "ref_min_score": 0.0, "ref_max_score": 9.0, "author": "me"}
    about["stillwater"] = {"settings": {"seed": 1, "steps": [1, 2]}}
    (folder / "metadata.json").write_text(json.dumps(about))
    return folder / "main_data.hdf5"


# --- Damages ---


def other_value(rng, raw):
    """JSON with one value changed, left out or under another name."""
    tree = json.loads(raw)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = places[rng.integers(len(places))]
    how = rng.random()
    if how < 0.15:
        del node[key]
    elif how < 0.25 and isinstance(node, dict):
        node["other"] = node.pop(key)
    elif how < 0.3:
        return (b'{"a":' if rng.random() < 0.5 else b"[") * 100_000
    else:
        node[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(tree).encode()


def other_cell(rng, raw):
    """A CSV table with another text in one cell."""
    lines = raw.decode().split("\n")
    line = rng.integers(len(lines))
    cells = lines[line].split(",")
    cells[rng.integers(len(cells))] = str(ODD[rng.integers(len(ODD))])
    lines[line] = ",".join(cells)
    return "\n".join(lines).encode()


def make_case(seed, i, wholes):
    """Case i of a seed: (target, file, name of the damage, damaged bytes, whether a hash fits)."""
    rng = np.random.default_rng([seed, i])
    target, name = TARGETS[i % len(TARGETS)]
    raw, meant = wholes[target, name], rng.random() < 0.6
    if meant and name.endswith(".json"):
        damage = other_value
    elif meant and name.endswith(".csv"):
        damage = other_cell
    else:
        damage = fuzz.DAMAGES[rng.integers(len(fuzz.DAMAGES))]
    fits = meant and name.endswith(".msgpack")
    return target, name, damage.__name__, bytes(damage(rng, bytearray(raw))), fits


# --- What is done with them ---


class World:
    """Undamaged folders below `folder`, and the programs that read damaged copies of them."""

    def __init__(self, folder):
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.environ["MINARI_DATASETS_PATH"] = str(folder / "home")
        sys.argv = ["bc.py"]
        facts = runtime.machine()
        runtime.machine = lambda: facts  # asks git
        runtime.keep_programs = lambda: None
        plots.plot = lambda *_: None  # slow, and reads no file
        self.folder, self.data, states = folder, dataset(), {}

        def state_of(bc, cfg, data):
            if cfg.widths not in states:
                states[cfg.widths] = template(bc, cfg, data)
            return states[cfg.widths]

        self.state_of = state_of
        self.run = make_run(folder / "runs", state_of)
        self.minari = make_minari(folder / "minari/data")
        self.cached = folder / "cached"
        self.arrays = {name: getattr(self.data, name) for name in cache.ARRAYS}
        about = dict.fromkeys(cache.ABOUT, "") | {"notes": []}
        cache.write(self.cached / "x", self.arrays, about)
        places = {"metadata": self.minari.parent, "cache": self.cached / "x"}
        self.places = {"resume": self.run, "score": self.run, **places}
        self.wholes = {
            (target, name): (self.places[target] / name).read_bytes() for target, name in TARGETS
        }

    def outcome(self, target, name, raw, fits):
        """(kind, note) of one damaged file."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.places[target], copy)
        (copy / name).write_bytes(raw)
        if fits:
            note = json.loads((copy / name).with_name("checkpoint.json").read_text())
            note |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
            (copy / name).with_name("checkpoint.json").write_text(json.dumps(note))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                kind = getattr(self, target)(copy)
        except SystemExit as error:
            text = str(error.code)
            clear = isinstance(error.code, str) and len(text) < 20_000
            clear &= all(c.isprintable() or c == "\n" for c in text)
            kind = ("refused", "") if clear else ("exception", f"unclear: {text[:200]!r}")
        except Exception as error:
            kind = "exception", f"{type(error).__name__}: {error}"[:300]
        return kind

    def resume(self, copy):
        bc = experiment.module("bc")
        cfg = experiment.resolve(bc.Config(resume=str(copy)))
        cfg = experiment.resolve(cfg, {}, self.data)
        run = experiment.Run(cfg, self.data)
        if cfg.num_updates > 1000 or cfg.num_seeds != 2:
            return "read", ""  # a valid run of another length or number of seeds
        go_on(run, run.restore(self.state_of(bc, cfg, self.data)), cfg.num_updates)
        run.finish()
        whole = experiment.last_step(copy) == cfg.num_updates
        return ("read", "") if whole else ("exception", "it ended before its last step")

    def score(self, copy):
        evaluation.load(copy)
        evaluation.recorded(copy)
        info, _ = experiment.read(copy)
        with contextlib.suppress(evaluation.EvaluationError):
            evaluation.inspect(info["dataset"]["env_id"])
        return "read", ""

    def metadata(self, copy):
        home = self.folder / "home/mine/x-v0"
        if not home.exists():
            home.mkdir(parents=True)
            (home / "data").symlink_to(copy)
        datasets.load("mine/x-v0")
        return "read", ""

    def cache(self, copy):
        kept = cache.read(copy)
        if kept is None:
            return "refused", ""
        same = all(files.checksum(x) == files.checksum(self.arrays[k]) for k, x in kept[0].items())
        return ("read", "") if same else ("exception", "a damaged cache was used")


def work(pipe, folder, seed, reader):
    """fuzz.work for the cases of this file."""
    del reader
    world = World(Path(folder, str(os.getpid())))
    for target, name in TARGETS:  # imports and compiled programs are no growth
        found = world.outcome(target, name, world.wholes[target, name], False)
        assert found == ("read", ""), (target, name, found)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + fuzz.MEMORY, space + fuzz.MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(fuzz.memory()[0])
    for i in iter(pipe.recv, None):
        target, name, _, raw, fits = make_case(seed, i, world.wholes)
        before, _ = fuzz.memory()
        kind, note = world.outcome(target, name, raw, fits)
        after, peak = fuzz.memory()
        if peak - before > fuzz.GROWTH:
            kind, note = "grew", f"{(peak - before) / 2**20:.0f} MiB"
        pipe.send((kind, note, peak - before, after))


def main(cfg: Config):
    """Prints the figures and writes them to `out`; exit code 1 if there is a fault."""
    began = time.perf_counter()
    shares = [range(k, cfg.cases, cfg.workers) for k in range(cfg.workers)]
    with ThreadPoolExecutor(cfg.workers) as pool:
        parts = list(pool.map(lambda share: fuzz.fuzz(share, cfg.seed, work=work), shares))
    found = {i: x for part, _ in parts for i, x in part.items()}
    table = {f"{target} {name}": Counter() for target, name in TARGETS}
    for i, (kind, *_) in found.items():
        table[" ".join(TARGETS[i % len(TARGETS)])][kind] += 1
    figures = {
        "cases": cfg.cases,
        "seed": cfg.seed,
        "counts": {kind: sum(x[kind] for x in table.values()) for kind in fuzz.KINDS},
        "counts_by_file": {name: {k: x[k] for k in fuzz.KINDS} for name, x in table.items()},
        "seconds": round(time.perf_counter() - began, 1),
        "slowest_case_seconds": round(max(x[3] for x in found.values()), 3),
        "faults": [[i, *x[:2]] for i, x in sorted(found.items()) if x[0] in fuzz.FAULTS][:100],
        **experiment.machine(),
    }
    print(json.dumps(figures, indent=2))
    Path(cfg.out).write_text(json.dumps(figures, indent=2) + "\n")
    raise SystemExit(int(any(figures["counts"][kind] for kind in fuzz.FAULTS)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
