"""A trained policy for other programs: as arrays for NumPy, or compiled by jax.export."""

import io
import shutil
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common.evaluation.environments import EvaluationError, inspect
from common.evaluation.numpy_policy import NumpyPolicy

README = """A Stillwater policy, exported by jax.export. Load it without Stillwater:

    first, later = (jax.export.deserialize(open(f, "rb").read()) for f in ("first", "later"))
    action, *memory = first.call(obs, reward, seed)            # at an episode's first step
    action, *memory = later.call(*memory, obs, reward, seed)   # at each later one

obs (1, D) float32; reward (1,) float32, of the last step, 0 at first; seed uint32, another one at
each step; action (1, A) float32 in [-1, 1]; of A discrete actions the one with the largest entry.
"""


def export(path, act, state, env_id, obs_dim):
    """Writes one seed's policy to the Path `path`.

    act: (state, carry, obs, reward, key) -> (action, carry), as in `Policy`. A name that ends in
    .npz gives the arrays of a plain multilayer perceptron, in the environment's units, and
    numpy_policy.py, which reads them, beside it. One that ends in .stablehlo gives any policy, as a
    zip file of two programs and a README. Raises EvaluationError where the policy is not such a
    perceptron, and for other names.
    """
    if path.suffix == ".npz":
        arrays = perceptron(state, env_id)
        np.savez(path, **arrays)
        agree(path, act, state, obs_dim)
        shutil.copy(Path(__file__).with_name("numpy_policy.py"), path.parent)
    elif path.suffix == ".stablehlo":
        path.write_bytes(programs(act, state, obs_dim))
    else:
        raise EvaluationError(f"--export {path}: the name must end in .npz or .stablehlo.")


def perceptron(state, env_id):
    """The arrays that NumpyPolicy reads."""
    layers = {}
    params = getattr(getattr(state, "actor", None), "params", {})
    for keys, x in jax.tree_util.tree_leaves_with_path(params):
        *_, layer, name = [key.key for key in keys]
        if layer.startswith("Dense_"):
            layers[f"{name}_{layer.removeprefix('Dense_')}"] = np.asarray(x)
    env = inspect(env_id)
    return layers | {
        "obs_mean": np.asarray(state.obs_mean),
        "obs_std": np.asarray(state.obs_std),
        "low": np.float32(env.low),
        "high": np.float32(env.high),
    }


def agree(path, act, state, obs_dim):
    """EvaluationError, and no file, unless the arrays give the policy's actions to 1e-5."""
    obs = np.random.default_rng(0).normal(size=(64, obs_dim)).astype(np.float32)
    obs = obs * state.obs_std + state.obs_mean
    action, _ = act(state, None, obs, jnp.zeros(len(obs)), jax.random.key(0))
    try:
        numpy_policy = NumpyPolicy(path)
        low, high = numpy_policy.arrays["low"], numpy_policy.arrays["high"]
        wanted = low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)
        same = np.allclose(numpy_policy(obs), wanted, atol=1e-5)
    except (KeyError, ValueError):
        same = False
    if not same:
        path.unlink()
        raise EvaluationError(
            f"--export {path}: this policy is not a plain multilayer perceptron. "
            "A name that ends in .stablehlo exports any policy."
        )


def programs(act, state, obs_dim):
    """A zip file, as bytes, of the policy at an episode's first step and at later ones."""

    def step(carry, obs, reward, seed):
        action, carry = act(state, carry, obs, reward, jax.random.key(seed))
        return action.clip(-1, 1), *jax.tree.leaves(carry)

    inputs = (
        jax.ShapeDtypeStruct((1, obs_dim), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    carry = jax.eval_shape(lambda *x: act(state, None, *x[:2], jax.random.key(x[2]))[1], *inputs)
    leaves, tree = jax.tree.flatten(carry)

    def later(*memory_and_inputs):
        memory = memory_and_inputs[: len(leaves)]
        return step(jax.tree.unflatten(tree, memory), *memory_and_inputs[len(leaves) :])

    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise EvaluationError("--export needs a package: pip install flatbuffers") from None
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("README", README)
        file.writestr("first", jax.export.export(jax.jit(partial(step, None)))(*inputs).serialize())
        file.writestr("later", jax.export.export(jax.jit(later))(*leaves, *inputs).serialize())
    return raw.getvalue()
