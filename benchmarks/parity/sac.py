"""SAC, with and without entropy in the target, compared with the base of the port used for CQL.

The peer: `SAC` of SimpleSAC/sac.py with the networks of SimpleSAC/model.py. `SAC.train` makes whole
updates. Losses are among its metrics; gradients are read when an optimiser is about to step.

- torch's standard normal numbers are the noise that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights

Weights: its two critics are our members 0 and 1 on axis 0. Its Scalars log_std_multiplier and
log_std_offset are our log_std_scale and log_std_shift; its log_alpha is the logarithm of our
temperature.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.cql import read
from benchmarks.parity.layers import to_mlp

PEER = dict(
    name="young-geng/CQL",
    repository="https://github.com/young-geng/CQL",
    commit="21efac46faadef7d24ecf03a8091ab9cc3a613fd",
    environment="torch numpy ml_collections absl-py",
)
# Large steps, so that three updates show.
SETTINGS = dict(widths=(16, 16), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3, polyak=0.1)
VARIANTS = {"entropy": True, "no entropy": False}  # backup_entropy, ours and theirs
NETS = {"actor": "policy", "critic": "qf", "temperature": "alpha"}  # ours: their optimiser's name


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=16)
    _, state = start("sac", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    noise = jax.vmap(lambda key: draw(key, batches["action"].shape[1:]))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def keys():
    """The keys of three updates."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def draw(key, shape):
    """The standard normal numbers (B, A) that our update draws from a key."""
    import distrax
    import jax
    import jax.numpy as jnp

    k_actor, k_critic = jax.random.split(key)
    normal = distrax.MultivariateNormalDiag(jnp.zeros(shape), jnp.ones(shape))
    k_backup, _ = jax.random.split(k_critic)
    return {"policy": normal.sample(seed=k_actor), "backup": normal.sample(seed=k_backup)}


def ours(inputs):
    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    run = jit(outputs, static_argnums=0)
    return {k: v for name in VARIANTS for k, v in run(name, batches, params).items()}


def outputs(variant, batches, params):
    import jax

    from algorithms import sac
    from common.datasets import Batch

    cfg, state = start("sac", batches, **SETTINGS, backup_entropy=VARIANTS[variant])
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    state, batches = state.replace(target={"params": params["target"]}, **nets), Batch(**batches)

    def gradient(loss, name, *args):
        return jax.value_and_grad(loss, has_aux=True)(getattr(state, name).params, state, *args)

    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_actor, k_critic = jax.random.split(key)
    (loss, _), slope = gradient(sac.critic_loss, "critic", batch, k_critic, cfg)
    out = {"critic loss": loss, "critic gradient": slope}
    if variant == "entropy":  # the same in both
        (loss, info), slope = gradient(sac.actor_loss, "actor", batch, k_actor)
        out |= {"actor loss": loss, "actor gradient": slope}
        args = info["entropy"], -batch.action.shape[-1]
        (loss, _), slope = gradient(sac.temperature_loss, "temperature", *args)
        out |= {"temperature loss": loss, "temperature gradient": slope}

    state, infos = jax.lax.scan(lambda s, row: sac.update(s, *row, cfg), state, (batches, keys()))
    for name in ("actor", "critic"):
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
    for name in NETS:
        out[f"{name} after 3 updates"] = getattr(state, name).params
    out["target after 3 updates"] = state.target
    return {f"{variant}: {k}": v for k, v in out.items()}


def theirs(inputs, checkout):
    import sys
    import types

    sys.path.insert(0, checkout)
    sys.modules["wandb"] = types.ModuleType("wandb")
    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    out = {}
    for variant in VARIANTS:
        found = train(variant, batches, params, noise)
        out |= {f"{variant}: {quantity}": x for quantity, x in found.items()}
    return out


def train(variant, batches, params, noise):
    """Three of the port's updates."""
    from unittest import mock

    import torch

    sac = build(variant, params, batches["obs"].shape[-1], batches["action"].shape[-1])
    gradients, infos = {}, []

    def keep(name):
        def hook(*_):
            gradients.setdefault(name, read(sac, name, grad=True))  # of the first update

        getattr(sac, f"{NETS[name]}_optimizer").register_step_pre_hook(hook)

    for name in NETS:
        keep(name)

    columns = dict(
        observations="obs",
        actions="action",
        rewards="reward",
        next_observations="next_obs",
        dones="done",
    )
    for i in range(3):
        normal = iter([torch.tensor(noise[name][i]) for name in ("policy", "backup")])

        def standard_normal(shape, dtype, device, normal=normal):
            x = next(normal)
            assert x.shape == shape
            return x

        batch = {name: torch.tensor(batches[column][i]) for name, column in columns.items()}
        with mock.patch("torch.distributions.normal._standard_normal", standard_normal):
            infos.append(sac.train(batch))
        assert next(normal, None) is None

    critic_losses = np.array([info["qf1_loss"] + info["qf2_loss"] for info in infos])
    actor_losses = np.array([info["policy_loss"] for info in infos])
    if variant == "entropy":
        out = {f"{name} gradient": gradients[name] for name in NETS}
        out |= {"actor loss": actor_losses[0], "temperature loss": infos[0]["alpha_loss"]}
    else:
        out = {"critic gradient": gradients["critic"]}
    out |= {f"{name} after 3 updates": read(sac, name) for name in (*NETS, "target")}
    out |= {"actor loss of 3 updates": actor_losses, "critic loss of 3 updates": critic_losses}
    return out | {"critic loss": critic_losses[0]}


def build(variant, params, obs_dim, action_dim):
    """The port's learner with our weights."""
    import torch
    from SimpleSAC import model
    from SimpleSAC.sac import SAC

    arch = "-".join(map(str, SETTINGS["widths"]))
    policy = model.TanhGaussianPolicy(obs_dim, action_dim, arch)
    critics = [model.FullyConnectedQFunction(obs_dim, action_dim, arch) for _ in range(4)]
    settings = dict(
        discount=SETTINGS["gamma"],
        policy_lr=SETTINGS["actor_lr"],
        qf_lr=SETTINGS["critic_lr"],
        soft_target_update_rate=SETTINGS["polyak"],
        target_entropy=-float(action_dim),
        backup_entropy=VARIANTS[variant],
    )
    sac = SAC(settings, policy, *critics)
    to_mlp(policy.base_network.network, params["actor"]["MLP_0"])
    policy.log_std_multiplier.constant.data = torch.tensor(params["actor"]["log_std_scale"])
    policy.log_std_offset.constant.data = torch.tensor(params["actor"]["log_std_shift"])
    sac.log_alpha.constant.data = torch.tensor(params["temperature"]["log"])
    for i, critic in enumerate(critics):
        both = params["critic" if i < 2 else "target"]["MLP_0"]
        to_mlp(critic.network.network, tree_map(lambda x, i=i: x[i % 2], both))
    return sac
