"""SAC's policy and critics in float64, for the golden tests of SAC and its siblings."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from float64 import mlp


def critics(params, obs, action):
    """Q of every member: action (..., B, A) -> (members, ..., B)."""
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1])), action], -1)
    layers = params["params"]["MLP_0"]
    count = len(layers["Dense_0"]["bias"])
    members = [jax.tree.map(lambda p, i=i: p[i], layers) for i in range(count)]
    return np.stack([mlp(member, x)[..., 0] for member in members])


def gaussian(params, obs):
    """Mean and standard deviation of u, where a = tanh(u)."""
    p = params["params"]
    mean, log_std = np.split(mlp(p["MLP_0"], obs), 2, -1)
    return mean, np.exp(np.clip(p["log_std_scale"] * log_std + p["log_std_shift"], -20, 2))


def log_density(u, mean, std):
    """log density of tanh(u): the Gaussian's less log |d tanh(u) / du|."""
    normal = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    return np.sum(normal + 2 * np.log(np.cosh(u)), -1)


def sample(params, obs, key):
    """Actions of pi(. | obs) with the numbers that `key` draws, and their log density."""
    mean, std = gaussian(params, obs)
    unit = distrax.MultivariateNormalDiag(jnp.zeros(mean.shape), jnp.ones(mean.shape))
    u = mean + std * np.float64(unit.sample(seed=key))
    return np.tanh(u), log_density(u, mean, std)


def backup(p, b, key, gamma, entropy=True):
    """r + gamma (min Q_target(s', a') - temperature log pi(a' | s')), 0 after a terminal row."""
    action, log_pi = sample(p.actor, b.next_obs, key)
    value = critics(p.target, b.next_obs, action).min(0)
    if entropy:
        value = value - np.exp(p.temperature["params"]["log"]) * log_pi
    return b.reward + gamma * np.where(b.done == 1, 0, value)


def actor_loss(pi, p, b, key):
    """E[temperature log pi(a | s) - min Q(s, a)]."""
    action, log_pi = sample(pi, b.obs, key)
    temperature = np.exp(p.temperature["params"]["log"])
    return np.mean(temperature * log_pi - critics(p.critic, b.obs, action).min(0))
