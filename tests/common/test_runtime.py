"""Seeds over several devices, and programs kept for the next start, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = "--num-updates 40 --eval-every 20 --eval-episodes 1 --num-seeds 4 --widths 32 32".split()
SHARDED = """
import sys
sys.path[:0] = ["algorithms", "."]
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import {name} as module
from common import datasets, experiment
from common.experiment import runtime
cfg = experiment.resolve(module.Config(log_every=5), getattr(module, "TUNED", None))
data = datasets.load(cfg.env)
batch = data.steps() if "windows" in open(module.__file__).read() else data.transitions()
keys = jax.vmap(jax.random.key)(jnp.arange({seeds}))
state = jax.jit(jax.vmap(partial(module.init, cfg=cfg), (0, None)))(keys, batch)
state = runtime.shard_seeds(state)
chunk = jax.vmap(partial(module.train_chunk, cfg=cfg), (0, None, 0, None))
chunk = jax.jit(chunk, donate_argnums=0)
program = chunk.lower(state, batch, keys, 5).compile()
words = "all-reduce", "all-gather", "all-to-all", "collective-permute"
talk = [word for word in words if word in program.as_text()]
state, _ = chunk(state, batch, keys, 5)
places = {{len(x.sharding.device_set) for x in jax.tree.leaves(state)}}
print(talk, places)
"""


def run(words, home, devices=1, **environ):
    """A process with that many CPU devices and a cache of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    inherited = {name: x for name, x in os.environ.items() if "CACHE" not in name}
    environ = inherited | {"XLA_FLAGS": flags, "XDG_CACHE_HOME": str(home)} | environ
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def train(home, out, devices=1, **environ):
    """What metrics.csv holds, without its timing columns, and every return."""
    said = run(["algorithms/iql.py", *SHORT, "--out", str(out)], home, devices, **environ)
    (folder,) = out.glob("iql/*/*")
    lines = (folder / "metrics.csv").read_text().splitlines()[1:]
    returns = json.loads((folder / "returns.json").read_text())
    return np.array([x.split(",")[:-2] for x in lines], float), returns, said


def programs(home):
    return sorted(path.name for path in home.rglob("jit_*-cache"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(home, metrics, returns) of a run on one device."""
    folder = tmp_path_factory.mktemp("first")
    return folder / "home", *train(folder / "home", folder / "runs")[:2]


@pytest.mark.slow
def test_seeds_on_four_devices_learn_what_they_learn_on_one(first, tmp_path):
    _, metrics, returns = first
    four, four_returns, _ = train(tmp_path / "home", tmp_path / "four", devices=4)
    np.testing.assert_allclose(four[:, 5:], metrics[:, 5:], rtol=1e-4)
    for step, expected in returns.items():
        np.testing.assert_allclose(four_returns[step], expected, rtol=1e-2)


def test_each_device_has_whole_seeds_and_they_do_not_talk(tmp_path):
    said = run(["-c", SHARDED.format(name="iql", seeds=4)], tmp_path, devices=4)
    assert said.splitlines()[-1] == "[] {4}"


def test_as_many_devices_work_as_divide_the_seeds(tmp_path):
    words = (
        "import jax.numpy as jnp; from common.experiment.runtime import shard_seeds; "
        "print([len(shard_seeds(jnp.zeros((n, 2))).sharding.device_set) for n in range(1, 9)])"
    )
    assert run(["-c", words], tmp_path, devices=4).splitlines()[-1] == "[1, 2, 3, 4, 1, 3, 1, 4]"


def test_a_second_start_compiles_nothing(first, tmp_path):
    home, metrics, _ = first
    kept = programs(home)
    assert any(name.startswith("jit_train_chunk") for name in kept)
    again, _, said = train(home, tmp_path, JAX_LOG_COMPILES="1")
    assert programs(home) == kept
    assert "Persistent compilation cache hit for 'jit_train_chunk'" in said
    np.testing.assert_array_equal(again, metrics)


WHERE = "import jax; from common.experiment import runtime; runtime.keep_programs(); "
WHERE += "print(jax.config.jax_compilation_cache_dir); jax.jit(lambda x: x + 1)(1)"


def test_a_users_own_folder_for_programs_comes_first(tmp_path):
    said = run(["-c", WHERE], tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert said.splitlines()[-1] == str(tmp_path / "own")
    assert run(["-c", WHERE], tmp_path / "x").startswith(str(tmp_path / "x/stillwater/programs/"))


def test_a_home_that_cannot_be_written_to_costs_the_cache_alone(tmp_path):
    home = tmp_path / "home"
    home.write_text("a file")
    assert run(["-c", WHERE], home) == "None\n"
