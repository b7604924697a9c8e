"""Float64 mathematics and a Batch of noise, for the golden tests of all algorithms."""

import jax
import jax.numpy as jnp
import numpy as np

from common.datasets import Batch


def random_batch(rows=16, obs_dim=3, action_dim=2, seed=0):
    """A third of its rows are done."""
    rng = np.random.default_rng(seed)
    obs, next_obs = rng.normal(size=(2, rows, obs_dim))
    action = rng.uniform(-0.95, 0.95, (rows, action_dim))
    done = np.arange(rows) % 3 == 1
    fields = Batch(obs, action, rng.normal(size=rows), next_obs, done)
    return Batch(*(jnp.asarray(x, jnp.float32) for x in fields))


def shifted(rows):
    """A random_batch whose observations have mean 5 and standard deviation 3."""
    noise = random_batch(rows)
    return noise._replace(obs=5 + 3 * noise.obs, next_obs=5 + 3 * noise.next_obs)


def f64(tree):
    """The same tree of arrays in numpy's float64, safe to write to."""
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def scramble(params, seed, scale=0.4):
    """Parameters moved off their start, so that no bias is 0 and no two networks are equal."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.float32(scale * rng.normal(size=x.shape)), params)


def mlp(params, x):
    """Dense_0, relu, Dense_1, relu, ..., Dense_n in numpy."""
    for i in range(len(params)):
        x = x @ params[f"Dense_{i}"]["kernel"].T + params[f"Dense_{i}"]["bias"]
        x = np.maximum(x, 0) if i < len(params) - 1 else x
    return x


def gradient(loss, params, step=1e-6):
    """Central differences of loss(params), one parameter at a time; `params` of float64."""
    leaves, tree = jax.tree.flatten(params)
    grads = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        for i in np.ndindex(leaf.shape):
            kept = leaf[i]
            leaf[i] = kept + step
            above = loss(params)
            leaf[i] = kept - step
            grad[i] = (above - loss(params)) / (2 * step)
            leaf[i] = kept
    return jax.tree.unflatten(tree, grads)


def assert_first_adam_step(before, after, grads, lr):
    """`after` (a TrainState) is `before` after one Adam step along `grads`: size and direction."""
    first_moment = after.opt_state[0].mu  # (1 - 0.9) g
    trees = (before.params, after.params, first_moment, grads)
    for old, new, moment, g in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(moment, 0.1 * g, rtol=2e-4, atol=2e-6)
        clear = (np.abs(g) > 1e-4) | (g == 0)  # elsewhere rounding decides the direction
        expected = np.float64(old) - lr * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(np.asarray(new)[clear], expected[clear], rtol=1e-6, atol=1e-6)
