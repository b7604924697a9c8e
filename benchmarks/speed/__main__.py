"""How fast is an update, and how near to what the machine can do?

    python -m benchmarks.speed                            # all rows, an hour or so
    python -m benchmarks.speed --only iql cql --seeds 1   # these anew; the file keeps the others

Each row is measured in a process of its own, with its own compilation and peak memory: data of
HalfCheetah, the algorithm's own `train_chunk`, which also draws the rows, and one seed or several
under vmap.

- time: the median over chunks after a warm-up
- FLOPs: the necessary ones, counted by hand (flops.py)
- the machine's rate: that of the same matrix products alone in the same process, each shape by XLA
  or by NumPy's BLAS, whichever is faster
- share: the FLOP/s of the whole update, divided by the machine's rate

Writes benchmarks/results/speed.json. Machines differ, and one machine varies from hour to hour: of
rows that were measured at different times only the shares can be compared. Other implementations:
python -m benchmarks.speed.peers.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.arrays import arrays
from benchmarks.speed import flops
from common import datasets, evaluation, experiment

ROOT = Path(__file__).resolve().parents[2]

DATA = "stillwater/halfcheetah/medium-v0"
CHOICES = "stillwater/cartpole/replay-v0"  # for files that take discrete actions alone
COMBO = dict(beta=0.5, horizon=5, num_actions=10)  # as many actions as CQL and its peer
ROLLOUT = dict(horizon=1, rollout_batch=500, retain=500)  # so small that updates alone count
DIFFUSER = dict(horizon=32, multiples=(1, 2, 4, 8), batch_size=32, diffusion_steps=20)
UPDATES = {  # row: (algorithm, settings that differ from its defaults)
    "bc": ("bc", {}),
    "sac": ("sac", {}),
    "td3_bc": ("td3_bc", {}),
    "rebrac": ("rebrac", {}),
    "edac": ("edac", {}),
    "bcq": ("bcq", {}),
    "bear": ("bear", {}),
    "brac": ("brac", {}),
    "awr": ("awr", {}),
    "iql": ("iql", {}),
    "fql": ("fql", {}),
    "awac": ("awac", {}),
    "awac, 2 layers": ("awac", dict(widths=(256, 256))),
    "cql": ("cql", {}),
    "cql, 3 layers": ("cql", dict(widths=(256, 256, 256))),
    "cal_ql": ("cal_ql", {}),
    "rlpd": ("rlpd", dict(pretrain_updates=250_000)),  # without the environment
    "combo": ("combo", COMBO | ROLLOUT),
    "mopo": ("mopo", ROLLOUT),
    "mobile": ("mobile", ROLLOUT),
    "discrete_cql": ("discrete_cql", {}),
    "discrete_bcq": ("discrete_bcq", {}),
    "dt": ("dt", dict(targets=(1.0,))),
    "rvs": ("rvs", dict(horizon=1000)),
    "diffuser": ("diffuser", DIFFUSER),
    "decision_diffuser": ("decision_diffuser", dict(batch_size=32)),
}
OTHERS = ("dynamics", "rollout", "plan", "evaluation", "evaluation, dt")


@dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = (*UPDATES, *OTHERS)  # rows to measure
    seeds: tuple[int, ...] = (1, 2, 4, 8, 16)  # numbers of seeds, for rows of updates
    cores: int = 1  # cores for each row
    seconds: float = 10.0  # time for each row
    chunks: int = 15  # chunks for each row at most; the median counts
    out: str = str(ROOT / "benchmarks/results/speed.json")  # file to write
    row: str = ""  # NAME:SEEDS: measure only this row, in this process, and print it


class Work(NamedTuple):
    """A row, ready to be timed."""

    call: object  # makes `updates` updates
    updates: int
    products: dict  # matrix products of one update, see flops.py
    program: object  # compiled
    compiling: tuple  # seconds to compile: from scratch, and with JAX's cache
    more: dict = {}  # other entries of the row


def data_of(algorithm):
    """The name of the dataset that an algorithm is timed on."""
    kinds = getattr(experiment.module(algorithm), "ACTIONS", ())
    return CHOICES if kinds == ("discrete",) else DATA


def settings(algorithm, changes):
    """(the algorithm's module, its config as its `main` makes it)."""
    module = experiment.module(algorithm)
    cfg = module.Config(env=data_of(algorithm), **changes)
    return module, experiment.resolve(cfg, getattr(module, "TUNED", None))


def compiled(function, *inputs):
    """(the compiled program, seconds to trace and compile it: from scratch, with JAX's cache)."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            program = function.lower(*inputs).compile()
            taken.append(time.perf_counter() - start)
            jax.clear_caches()
    jax.config.update("jax_compilation_cache_dir", None)
    return program, tuple(taken)


def start(function, keys, batch):
    """function(key, batch) for the keys of all seeds."""
    return jax.jit(jax.vmap(function, (0, None)))(keys, batch)


def update(name, data, sizes, keys):
    """The Work of a row of UPDATES. sizes: (D, A). keys: of the seeds."""
    algorithm, changes = UPDATES[name]
    module, cfg = settings(algorithm, changes)
    (first, batch), more = arrays(module, data, cfg), {}
    rows = {"rows": len(data.obs)} if algorithm == "awr" else {}
    products = flops.times(len(keys), getattr(flops, algorithm)(cfg, *sizes, **rows))
    updates = int(np.clip(5e10 / flops.total(products), 2, 5000))
    whole = getattr(cfg, "policy_delay", getattr(cfg, "actor_steps", 1))  # an iteration's updates
    updates = max(updates // whole, 1) * whole
    cfg = replace(cfg, log_every=updates, eval_every=updates)
    if hasattr(module, "rollout"):  # based on a model
        cfg, more = replace(cfg, rollout_every=updates), dict(terminal=module.never)
    state = start(partial(module.init, cfg=cfg), keys, first)
    batch = jax.device_put(batch)
    chunk = jax.vmap(partial(module.train_chunk, cfg=cfg, **more), (0, None, 0, None))
    inputs = batch, keys, updates
    program, compiling = compiled(jax.jit(chunk, donate_argnums=0), state, *inputs)

    def call():
        nonlocal state
        state, metrics = program(state, *inputs)
        jax.block_until_ready(metrics)

    return Work(call, updates, products, program, compiling, {"settings": vars(cfg)})


def dynamics(data, sizes, keys):
    """An update of COMBO's model, all members."""
    module, cfg = settings("combo", COMBO)
    rows, updates = 1000 + 40 * cfg.batch_size, 40  # 1,000 are held out
    batch = jax.device_put(jax.tree.map(lambda x: x[:rows], data.transitions()))
    fit = start(partial(module.init_fit, cfg=cfg), keys, batch)
    epoch = jax.jit(jax.vmap(partial(module.fit_epoch, cfg=cfg), (0, None, 0)))
    program, compiling = compiled(epoch, fit, batch, keys)
    call = lambda: jax.block_until_ready(program(fit, batch, keys))  # noqa: E731
    return Work(call, updates, flops.dynamics(cfg, *sizes), program, compiling)


def rollout(data, sizes, keys):
    """A rollout of COMBO's model: 50,000 starts, five steps."""
    module, cfg = settings("combo", COMBO)
    state = start(partial(module.init, cfg=cfg), keys, data.transitions())
    steps = jax.vmap(partial(module.rollout, cfg=cfg, terminal=module.never), (0, None, 0))
    inputs = state, jax.device_put(data.transitions()), keys
    program, compiling = compiled(jax.jit(steps), *inputs)
    call = lambda: jax.block_until_ready(program(*inputs))  # noqa: E731
    return Work(call, 1, flops.rollout(cfg, *sizes), program, compiling)


def plan(data, sizes, keys):
    """Diffuser's plan for one step of one episode."""
    module, cfg = settings("diffuser", DIFFUSER)
    state = start(partial(module.init, cfg=cfg), keys, data.steps())
    inputs = state, None, jnp.asarray(data.obs[None, :1]), jnp.zeros((1, 1)), keys[0]
    program, compiling = compiled(
        jax.jit(jax.vmap(module.policy(cfg), (0, 0, 0, 0, None))), *inputs
    )
    call = lambda: jax.block_until_ready(program(*inputs))  # noqa: E731
    return Work(call, 1, flops.plan(cfg, *sizes), program, compiling)


def ten_episodes(data, sizes, keys, algorithm="iql"):
    """An evaluation of ten episodes; for comparison, the environment's steps alone."""
    module, cfg = settings(*UPDATES[algorithm])
    state = start(partial(module.init, cfg=cfg), keys, arrays(module, data, cfg)[0])
    policy = jax.jit(jax.vmap(module.policy(cfg), (0, 0, 0, 0, None)))
    inputs = None, jnp.asarray(data.obs[None, :10]), jnp.zeros((1, 10)), keys[0]
    program, compiling = compiled(policy, state, *inputs)
    still = np.zeros((1, 10, sizes[1]), np.float32)
    alone = partial(evaluation.evaluate, lambda *_: (still, None), data.env_id, 1, 10)
    call = partial(evaluation.evaluate, partial(policy, state), data.env_id, 1, 10)
    more = {"stepping_alone_us": 1e6 * median_time(alone, 3, 5)}
    return Work(call, 1, {}, program, compiling, more)


def median_time(work, seconds, most):
    """Median seconds of work(), after one warm-up call.

    At least three calls, at most `most`, and none begins after `seconds`.
    """
    work()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < end and len(taken) < most):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def products_rate(products, seconds=4.0):
    """FLOP/s of matrix products alone, each shape by XLA or NumPy's BLAS, whichever is faster."""
    several = jax.jit(lambda a, b: jax.lax.map(lambda ab: ab[0] @ ab[1], (a, b)))
    rng, spent, each = np.random.default_rng(0), 0.0, seconds / 2 / len(products)
    for (m, k, n), count in products.items():
        copies = int(np.clip(2e8 / (2 * m * k * n), 1, 16))
        a, b = (rng.standard_normal((copies, *x), np.float32) for x in ((m, k), (k, n)))
        c, inputs = np.empty((copies, m, n), np.float32), jax.device_put((a, b))

        def blas(a=a, b=b, c=c):
            for x, y, out in zip(a, b, c, strict=True):
                np.matmul(x, y, out=out)

        xla = lambda inputs=inputs: jax.block_until_ready(several(*inputs))  # noqa: E731
        spent += count * min(median_time(way, each, 30) for way in (blas, xla)) / copies
    return flops.total(products) / spent


def work_of(name, seeds):
    """The Work of a row."""
    data = datasets.load(data_of(UPDATES[name][0]) if name in UPDATES else DATA)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    inputs = data, (data.obs.shape[1], data.num_actions or data.action.shape[1]), keys
    sequences = partial(ten_episodes, algorithm="dt")
    others = dict(zip(OTHERS, (dynamics, rollout, plan, ten_episodes, sequences), strict=True))
    return others[name](*inputs) if name in others else update(name, *inputs)


def measure(name, seeds, cfg):
    """One row as plain data."""
    work = work_of(name, seeds)
    before = products_rate(work.products) if work.products else 0
    us = 1e6 * median_time(work.call, cfg.seconds, cfg.chunks) / work.updates
    row = {"row": name, "seeds": seeds, "us": us, **work.more}
    row |= dict(zip(("compile_seconds", "cached_compile_seconds"), work.compiling, strict=True))
    if work.products:
        gflop = flops.total(work.products) / 1e9
        rate = max(before, products_rate(work.products)) / 1e9
        row |= {"gflop": gflop, "gflops": gflop / us * 1e6, "machine_gflops": rate}
        row["share"] = row["gflops"] / rate
    return row | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def summary(row):
    """A row in words."""
    rate = "{share:.0%} of {machine_gflops:.0f} GFLOP/s, " if "share" in row else ""
    words = "{us:,.0f} us, " + rate + "compiled in {compile_seconds:.1f} s, {peak_mb:,.0f} MB"
    return words.format(**row)


def apart(module, words, cores, root=ROOT):
    """The JSON in the last line of `python -m module words`, run on `cores` cores in `root`."""
    names = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
    environ = os.environ | dict.fromkeys(names, str(cores))
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    words = ["taskset", "-c", cpus, sys.executable, "-m", module, *words]
    done = subprocess.run(words, cwd=root, env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def kept(file, facts):
    """What `file` holds, if it was measured on such a machine with these versions; else no rows."""
    old = json.loads(file.read_text("utf-8")) if file.exists() else {}
    same = facts.items() <= old.items()
    return facts | {"rows": old["rows"] if same else []}


def merge(rows, row):
    """Puts a row among `rows`, in the order of UPDATES and OTHERS; it replaces an older one."""
    order = [*UPDATES, *OTHERS]
    rows[:] = [x for x in rows if (x["row"], x["seeds"]) != (row["row"], row["seeds"])] + [row]
    rows.sort(key=lambda x: (order.index(x["row"]), x["seeds"]))


def main(cfg: Config):
    if cfg.row:
        name, seeds = cfg.row.rsplit(":", 1)
        print(json.dumps(measure(name, int(seeds), cfg), default=list))
        return
    machine = experiment.machine()
    own = {"commit": machine["commit"], "time": time.strftime("%FT%TZ", time.gmtime())}
    facts = {x: machine[x] for x in ("versions", "device")} | {"cores": cfg.cores}
    facts = kept(Path(cfg.out), facts)
    for name in cfg.only:
        for seeds in cfg.seeds if name in UPDATES else [1]:
            words = ["--row", f"{name}:{seeds}"]
            words += ["--seconds", str(cfg.seconds), "--chunks", str(cfg.chunks)]
            row = apart("benchmarks.speed", words, cfg.cores) | own
            print(f"{name}, {seeds} seed{'s' * (seeds > 1)}: {summary(row)}", flush=True)
            merge(facts["rows"], row)
            Path(cfg.out).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
