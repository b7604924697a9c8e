"""How long does a million updates of many seeds take, trained together under vmap?

    python -m benchmarks.speed.seeds                                   # IQL; for a GPU
    python -m benchmarks.speed.seeds --algorithm awac --seeds 1 4

Times chunks of the algorithm's own `train_chunk` with its defaults on halfcheetah's data, until
--updates are made or --seconds have passed, after a first chunk that compiles; evaluations are left
out. Writes benchmarks/results/speed-seeds.json.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from benchmarks.arrays import arrays
from benchmarks.speed.__main__ import DATA, ROOT, settings, start
from common import datasets, experiment


@dataclass(frozen=True)
class Config:
    algorithm: str = "iql"  # file in algorithms/
    seeds: tuple[int, ...] = (1, 8, 32, 128)  # numbers of seeds
    updates: int = 100_000  # updates to time at most
    seconds: float = 25.0  # time for each number of seeds
    out: str = str(ROOT / "benchmarks/results/speed-seeds.json")  # file to write


def measure(count, cfg):
    """The row of `count` seeds as plain data. us: microseconds of an update of all seeds."""
    module, own = settings(cfg.algorithm, {})
    first, batch = arrays(module, datasets.load(DATA), own)
    batch = jax.device_put(batch)
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    state = start(partial(module.init, cfg=own), keys, first)
    chunk = jax.vmap(partial(module.train_chunk, cfg=own), (0, None, 0, None))
    chunk = jax.jit(chunk, donate_argnums=0)
    state, _ = jax.block_until_ready(chunk(state, batch, keys, 0))
    begin, done, taken = time.perf_counter(), 0, 0.0
    while done < cfg.updates and taken < cfg.seconds:
        done += own.log_every
        state, _ = jax.block_until_ready(chunk(state, batch, keys, done))
        taken = time.perf_counter() - begin
    return {"seeds": count, "updates": done, "seconds": taken, "us": 1e6 * taken / done}


def main(cfg: Config):
    facts = experiment.machine() | {"algorithm": cfg.algorithm, "rows": []}
    for count in cfg.seeds:
        facts["rows"].append(row := measure(count, cfg))
        print("{seeds} seeds: {us:,.0f} us an update of all".format(**row), flush=True)
        Path(cfg.out).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
