"""The FLOPs that benchmarks/speed divides by, beside XLA's own count of one update."""

import io
import json
import tarfile
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.arrays import arrays
from benchmarks.speed import __main__ as speed
from benchmarks.speed import changes as speed_changes
from benchmarks.speed import flops
from benchmarks.speed import profile as speed_profile
from benchmarks.speed import seeds as speed_seeds
from benchmarks.speed import tables as speed_tables
from common import datasets

SIZES = 17, 6
OF_CHOICES = 4, 2  # of CartPole


def counts(name, changes):
    """Necessary FLOPs, and XLA's for the program as it is written, before any optimisation."""
    module, cfg = speed.settings(name, changes)
    once = "policy_delay actor_steps critic_steps flow_steps utd".split()
    once = {x: 1 for x in once if hasattr(cfg, x)}
    cfg, key = replace(cfg, **once), jax.random.key(0)  # XLA counts a loop's body once
    first, data = arrays(module, datasets.load(cfg.env), cfg)
    state = jax.eval_shape(partial(module.init, cfg=cfg), key, first)
    rows, sizes, more = jnp.zeros(cfg.batch_size, int), {}, {}
    rows = rows[None] if name == "rlpd" else rows  # an update of one minibatch
    if name in ("dt", "decision_diffuser", "diffuser", "rvs"):
        more = dict(cfg=cfg) | (dict(key=key) if name == "rvs" else {})
    if name == "awr":  # an iteration on an episode of one minibatch's size
        data, sizes = data._replace(rows=jax.tree.map(lambda x: x[rows], data.rows)), {"rows": 256}
        batch = data._replace(last=np.array([255]))
    else:
        batch = jax.eval_shape(partial(module.minibatch, **more), state, data, rows)
    if "policy_delay" in once:  # a round of one minibatch
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
        key = key[None]
    program = jax.jit(partial(module.update, cfg=cfg)).lower(state, batch, key)
    shape = OF_CHOICES if cfg.env == speed.CHOICES else SIZES
    necessary = getattr(flops, name)(cfg, *shape, **sizes)
    return flops.total(necessary), program.cost_analysis()["flops"]


@pytest.mark.parametrize("name", speed.UPDATES)
def test_an_update_does_little_but_the_necessary_products(name):
    """A sixth more at most: activations, optimisers, and what XLA has yet to find superfluous."""
    algorithm, changes = speed.UPDATES[name]
    necessary, all_of_them = counts(algorithm, changes)
    assert 0.85 * all_of_them < necessary < all_of_them


def test_flops_of_a_layer_by_hand():
    """Two layers, 3 -> 4 -> 2, on 5 rows: 2 x 5 x (12 + 8) forward, as much again for the weights,
    and 2 x 5 x 8 for the hidden units; with the gradient of the inputs 2 x 5 x 12 more."""
    layers = flops.mlp(5, 3, 4, 2)
    assert flops.total(flops.forward(layers)) == 200
    assert flops.total(flops.learn(layers)) == 200 + 200 + 80
    assert flops.total(flops.learn(layers, inputs=True)) == 200 + 200 + 200
    assert flops.total(flops.to_inputs(layers)) == 400
    assert flops.total(flops.times(3, flops.forward(layers))) == 600


def test_a_rollout_asks_one_elite_for_each_row():
    _, cfg = speed.settings("combo", speed.COMBO)
    model = 2 * 50_000 * (23 * 200 + 3 * 200 * 200 + 200 * 36)
    policy = 2 * 50_000 * (17 * 256 + 2 * 256 * 256 + 256 * 12)
    assert flops.total(flops.rollout(cfg, *SIZES)) == 5 * (model + policy)


def test_the_median_leaves_out_the_first_call(monkeypatch):
    clock = iter(np.cumsum([0, 0, 1, 0, 5, 0, 2, 0]))  # the end; then begin and end of three calls
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    assert speed.median_time(lambda: calls.append(1), 0.5, 3) == 2
    assert len(calls) == 4


def test_the_machines_rate_is_at_least_a_plain_products():
    """Of a product in two sizes, as NumPy does it here; half of it, for a busy machine."""
    products = {(64, 64, 64): 3, (128, 32, 64): 1}
    a = np.ones((64, 64), np.float32)
    plain = speed.median_time(lambda: [a @ a for _ in range(20)], 0.2, 20) / 20
    assert speed.products_rate(products, 0.4) > 0.5 * 2 * 64**3 / plain


def test_every_step_of_a_program_goes_to_its_kind_of_work(optimised):
    """A product of 2 x 600^3 FLOPs takes longer than all else; each other kind is seen."""

    def work(x, w, rows, key):
        y = jax.nn.softmax((x @ w)[rows] + jax.random.uniform(key, x.shape)).T
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), y)  # runs thrice

    x = jnp.ones((600, 600)) / 600
    inputs = x, x, jnp.arange(600)[::-1], jax.random.key(0)
    program = jax.jit(work).lower(*inputs).compile()
    call = lambda: jax.block_until_ready(program(*inputs))  # noqa: E731
    for _ in range(5):  # others may take the machine while one of the two times is measured
        found = speed_profile.steps(program, call, 5)
        kinds = speed_profile.KINDS
        ms = {kind: sum(s["ms"] for s in found if s["kind"] == kind) for kind in kinds}
        whole = 1e3 * speed.median_time(call, 0.5, 20)
        if 2 * ms["matrix products"] > sum(ms.values()) and 0.5 < sum(ms.values()) / whole < 2:
            break
    assert found[0]["kind"] == "matrix products" and found[0]["shape"].startswith("f32[600,600]")
    assert ms["matrix products"] > 0.5 * sum(ms.values())
    assert min(ms[x] for x in ms if x != "elementwise") > 0
    assert 0.5 < sum(ms.values()) / whole < 2


def test_two_commits_are_timed_in_turns_by_their_own_scripts(monkeypatch):
    def archive(word, commit):
        assert word == "archive"
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
            for name in ("algorithms/iql.py", "benchmarks/speed/__main__.py"):
                info = tarfile.TarInfo(name)
                info.size = len(commit)
                tar.addfile(info, io.BytesIO(commit.encode()))
        return file.getvalue()

    def apart(module, words, cores, root):
        assert module == "benchmarks.speed"
        assert words[:2] == ["--row", "iql:1"] and cores == 2
        files = [root / name for name in ("algorithms/iql.py", "benchmarks/speed/__main__.py")]
        (text,) = {file.read_text() for file in files}
        seen.append(text)
        return {"us": len(seen)}

    seen = []
    monkeypatch.setattr(speed_changes, "git", archive)
    monkeypatch.setattr(speed, "apart", apart)
    assert speed_changes.compare("iql", "old", "new", 2, 2) == ([1, 3], [2, 4])
    assert seen == ["old", "new"] * 2


def test_chunks_of_many_seeds_are_timed_after_the_first(monkeypatch, tmp_path):
    """Chunks of 10 updates that take 3 ms by the clock: 300 us an update."""
    now = iter([0.0, *(0.003 * np.arange(1, 9))])
    clock = SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr(speed_seeds, "time", clock)
    monkeypatch.setattr(
        speed_seeds, "settings", lambda *_: (module, replace(cfg, log_every=10, batch_size=4))
    )
    module, cfg = speed.settings("bc", dict(widths=(4,)))
    out = tmp_path / "seeds.json"
    speed_seeds.main(speed_seeds.Config(seeds=(2,), updates=40, out=str(out)))
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["seeds"], row["updates"]) == (2, 40)
    np.testing.assert_allclose(row["us"], 300)
    (line,) = speed_tables.million_table(
        {"algorithm": "bc", "device": "here", "rows": [row]}
    ).splitlines()[2:]
    assert line == "| 2 seeds | 0.3 | 5 | 150 | 1.0 |"
