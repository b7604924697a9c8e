"""Exported policies give the run's own actions, without JAX or without this project."""

import subprocess
import sys
import zipfile

import bc
import dt
import jax
import numpy as np
import pytest

from common import datasets, evaluation
from common.evaluation.export import export

OBS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    return datasets.load("stillwater/pendulum/medium-v0").transitions()


def trained(module, data, **settings):
    cfg = module.Config(**settings)
    state = module.init(jax.random.key(0), data, cfg)
    return jax.jit(module.policy(cfg)), state


def test_numpy_alone_acts_as_the_run_does(data, tmp_path):
    """In a process without JAX, in the environment's units: Pendulum's torques reach 2."""
    act, state = trained(bc, data, widths=(8, 8))
    export(tmp_path / "policy.npz", act, state, "Pendulum-v1", 3)
    np.save(tmp_path / "obs.npy", OBS)
    code = (
        "import sys, numpy as np; sys.path.insert(0, '.'); from numpy_policy import NumpyPolicy; "
        "np.save('action.npy', NumpyPolicy('policy.npz')(np.load('obs.npy'))); "
        "assert not {'jax', 'common'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    wanted = 2 * np.asarray(bc.act(state, OBS))
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(np.load(tmp_path / "action.npy"), wanted, atol=1e-6)


def test_a_policy_with_memory_runs_without_the_project(data, tmp_path):
    settings = dict(width=8, layers=1, context=3, targets=(10.0,), rtg_scale=10.0)
    act, state = trained(dt, data, **settings)
    export(tmp_path / "policy.stablehlo", act, state, "Pendulum-v1", 3)
    with zipfile.ZipFile(tmp_path / "policy.stablehlo") as file:
        assert "deserialize" in file.read("README").decode()
        first, later = (
            jax.export.deserialize(bytearray(file.read(name))) for name in ("first", "later")
        )
    policy, memory = evaluation.Policy(act, state), []
    for t, obs in enumerate(OBS[:6]):
        inputs = obs[None], np.float32([0.1 * t]), np.uint32(t)
        action, *memory = later.call(*memory, *inputs) if t else first.call(*inputs)
        np.testing.assert_allclose(action[0], policy(obs, 0.1 * t), atol=1e-6)


def test_what_is_no_perceptron_is_refused(data, tmp_path):
    act, state = trained(dt, data, width=8, layers=1, context=3, targets=(10.0,), rtg_scale=1.0)
    with pytest.raises(evaluation.EvaluationError, match="not a plain multilayer perceptron"):
        export(tmp_path / "policy.npz", act, state, "Pendulum-v1", 3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(evaluation.EvaluationError, match=r"must end in .npz or .stablehlo"):
        export(tmp_path / "policy.onnx", act, state, "Pendulum-v1", 3)
