"""Offline, then online: what is stored, what batches hold, one reward transform, exact resuming."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import run
from test_all import differing, leaves, saved, table

from common import evaluation, experiment
from common.experiment import checkpoint, plots

NAMES = ("awac", "cal_ql", "iql", "rlpd")
ONLINE = dict(num_updates=100, eval_every=20, log_every=10, eval_episodes=1)
PHASES = dict.fromkeys(NAMES, dict(online_steps=60)) | {"rlpd": dict(pretrain_updates=40)}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook"])
    monkeypatch.setattr(plots, "plot", lambda path, *_: path.write_bytes(b""))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield tiny.dataset(folder / "tiny.hdf5")


def train(name, data, out, **changes):
    cfg = tiny.config(name, **ONLINE | PHASES[name] | changes, out=str(out))
    state = importlib.import_module(name).train(cfg, data)
    (folder,) = out.glob(f"{name}/*/*")
    return cfg, state, folder


@pytest.fixture(scope="module", params=NAMES)
def whole(request, data, tmp_path_factory):
    """A run of both phases: name, config, last state, folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["notebook"])
        patch.setattr(plots, "plot", lambda path, *_: path.write_bytes(b""))
        yield request.param, *train(request.param, data, tmp_path_factory.mktemp("whole"))
    jax.clear_caches()


def test_rows_are_those_of_the_environment_with_the_datas_reward_transform(whole, data):
    """The actions that are stored, taken again in a fresh environment, bring what is stored."""
    name, cfg, state, _ = whole
    cfg = experiment.resolve(cfg, importlib.import_module(name).TUNED, data)
    scale = float(getattr(cfg, "scale_reward", 1))
    scale = float(data.reward_scale()) if getattr(cfg, "scale_reward", 0) is True else scale
    scale = scale or 1.0  # AWAC's False
    count = 60 + getattr(cfg, "random_steps", 0)
    env = evaluation.make("Hopper-v5")
    for i, seed in enumerate((0, 1)):
        rows, end = jax.tree.map(lambda x, i=i: np.asarray(x[i]), (state.replay, state.end))
        episode, obs = 0, None
        assert end.sum() > 1 and np.abs(rows.action).max() <= 1
        assert len(end) == count
        for t in range(count):
            if obs is None:
                words = np.random.SeedSequence([seed, episode]).generate_state(1)
                obs = env.reset(seed=int(words[0] >> 1))[0]
            np.testing.assert_array_equal(rows.obs[t], np.float32(obs))
            obs, reward, terminated, truncated, _ = env.step(rows.action[t])
            np.testing.assert_array_equal(rows.next_obs[t], np.float32(obs))
            assert rows.done[t] == terminated and end[t] == (terminated or truncated)
            expected = reward * scale + cfg.shift_reward
            np.testing.assert_allclose(rows.reward[t], expected, rtol=1e-6)
            if end[t]:
                episode, obs = episode + 1, None


def test_the_policy_explores(whole):
    """Both seeds act differently, and no action comes twice."""
    action = np.asarray(whole[2].replay.action).reshape(-1, 3)
    assert len(np.unique(action, axis=0)) == len(action) >= 120


class Killed(BaseException):
    """Ends a run where SIGKILL would."""


def test_killed_online_and_resumed_it_ends_with_the_same_bits(whole, data, tmp_path, monkeypatch):
    """Killed at step 70; at the checkpoint of step 60 an episode is unfinished."""
    name, _, _, folder = whole
    record = experiment.Run.record

    def killed(self, step, *args):
        record(self, step, *args)
        if step == 70:
            raise Killed

    monkeypatch.setattr(experiment.Run, "record", killed)
    with pytest.raises(Killed):
        train(name, data, tmp_path)
    (half,) = tmp_path.glob(f"{name}/*/*")
    step, kept = checkpoint.read(half)
    assert step == 60 and not np.array(kept["end"])[:, 19].all()
    monkeypatch.setattr(experiment.Run, "record", record)
    code, text, errors = run(name, "--resume", half)
    assert code == 0, errors
    assert (half / "checkpoint/state.msgpack").read_bytes() == (
        folder / "checkpoint/state.msgpack"
    ).read_bytes()
    assert table(half) == table(folder)


def test_however_it_is_cut_and_before_the_first_step(data, tmp_path):
    """Chunks of 20 updates give the bits of chunks of 10. Until the environment's first step the
    bits are those of a run without one."""
    short = dict(num_updates=40, online_steps=20)
    _, fine, folder = train("iql", data, tmp_path / "a", **short)
    _, state, _ = train("iql", data, tmp_path / "b", **short, log_every=20)
    assert differing(leaves(fine), leaves(state)) == []
    _, offline, _ = train(
        "iql", data, tmp_path / "c", num_updates=20, online_steps=0, lr_decay=False
    )
    before = saved(folder, "checkpoint.old")
    assert checkpoint.read(folder)[0] == 40
    for path, x in leaves(offline).items():
        if "replay" not in path and path != "['end']":
            np.testing.assert_array_equal(x, before[path], err_msg=path)


@pytest.mark.parametrize("name", ["awac", "iql"])
def test_batches_come_from_data_and_stored_rows_alike(name, data, monkeypatch):
    """Rewards of data are 1, stored ones 2, rows that are not filled yet 3: none of the last."""
    module = importlib.import_module(name)
    cfg = tiny.config(name, **ONLINE | PHASES[name] | {"batch_size": 64})
    rows = jax.tree.map(jnp.asarray, data.transitions())._replace(reward=jnp.ones(64))
    seen = []

    def update(state, batch, key, cfg):
        seen.append(np.asarray(batch.reward))
        return state, {}

    monkeypatch.setattr(module, "update", update)
    state = module.init(jax.random.key(0), rows, cfg)
    reward = jnp.full(60, 3.0).at[:16].set(2.0)
    state = state.replace(replay=state.replay._replace(reward=reward))
    for seed in range(20):
        module.learn(state, rows, jax.random.key(seed), 56, cfg)  # after the 16th step
    seen = np.concatenate(seen)
    assert set(np.unique(seen)) == {1.0, 2.0}
    share = 16 / 80
    assert abs((seen == 2).mean() - share) < 4 * np.sqrt(share * (1 - share) / len(seen))


@pytest.mark.parametrize("name", ["awac", "cal_ql", "iql"])
@pytest.mark.parametrize("steps", [55, 120])
def test_phases_that_do_not_fill_chunks_are_refused(name, steps, data, tmp_path):
    with pytest.raises(SystemExit, match=f"--online-steps {steps}: must be a multiple"):
        train(name, data, tmp_path, online_steps=steps)
    assert not list(tmp_path.iterdir())
