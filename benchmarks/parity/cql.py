"""CQL compared with the most trusted port, in four variants, one of them SAC.

The peer: `ConservativeSAC` of SimpleSAC/conservative_sac.py with the networks of
SimpleSAC/model.py. `ConservativeSAC.train` makes whole updates. Losses are computed from the
metrics it returns; gradients are read when an optimiser is about to step.

- A stub replaces wandb.
- torch's standard normal numbers and `Tensor.uniform_` are the noise that our update draws from
  fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- clipping of the data's actions: outside of an update

Weights: its two critics are our members 0 and 1 on axis 0. Its Scalars log_std_multiplier and
log_std_offset are our log_std_scale and log_std_shift; its log_alpha is the logarithm of our
temperature, its log_alpha_prime that of our multiplier. With Lagrange its critic loss contains
- weight * gap, which has no gradient there; it is subtracted.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="young-geng/CQL",
    repository="https://github.com/young-geng/CQL",
    commit="21efac46faadef7d24ecf03a8091ab9cc3a613fd",
    environment="torch numpy ml_collections absl-py",
)
# The port's defaults of 10 actions and a weight of 5; large steps, so that three updates show.
SETTINGS = dict(widths=(16, 16), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3, polyak=0.1)
VARIANTS = {
    "H": (dict(), dict()),
    "Lagrange": (dict(lagrange=1.5), dict(cql_lagrange=True, cql_target_action_gap=1.5)),
    "max-backup": (dict(max_backup=True), dict(cql_max_target_backup=True)),
    "SAC": (dict(alpha=0.0), dict(use_cql=False)),
}
NETS = ("actor", "critic", "temperature", "multiplier")


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=16)
    cfg, state = start("cql", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    noise = jax.vmap(lambda key: draw(key, cfg.num_actions, batches["action"].shape[1:]))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def keys():
    """The keys of three updates."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def draw(key, n, shape):
    """What our update draws from a key, before the policy scales and squashes it; shape (B, A)."""
    import distrax
    import jax
    import jax.numpy as jnp

    k_actor, k_critic = jax.random.split(key)
    k_backup, k_propose = jax.random.split(k_critic)
    k_uniform, k_pi, k_next = jax.random.split(k_propose, 3)
    normal = distrax.MultivariateNormalDiag(jnp.zeros(shape), jnp.ones(shape))
    return {
        "policy": normal.sample(seed=k_actor),
        "backup": normal.sample(seed=k_backup, sample_shape=1)[0],
        "max backup": normal.sample(seed=k_backup, sample_shape=n),  # (n, B, A), as those below
        "uniform": jax.random.uniform(k_uniform, (n, *shape), minval=-1, maxval=1),
        "pi": normal.sample(seed=k_pi, sample_shape=n),
        "next pi": normal.sample(seed=k_next, sample_shape=n),
    }


def ours(inputs):
    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    run = jit(outputs, static_argnums=0)
    return {k: v for name in VARIANTS for k, v in run(name, batches, params).items()}


def outputs(variant, batches, params):
    import jax

    from algorithms import cql
    from common.datasets import Batch

    cfg, state = start("cql", batches, **SETTINGS, **VARIANTS[variant][0])
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    state, batches = state.replace(target={"params": params["target"]}, **nets), Batch(**batches)

    def gradient(loss, name, *args):
        return jax.value_and_grad(loss, has_aux=True)(getattr(state, name).params, state, *args)

    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_actor, k_critic = jax.random.split(key)
    (loss, info), slope = gradient(cql.critic_loss, "critic", batch, k_critic, cfg)
    out = {"critic loss": loss, "critic gradient": slope, "TD loss": info["td_loss"]}
    if variant != "SAC":
        out["gap"] = info["gap"]
    if variant == "Lagrange":
        (loss, _), slope = gradient(cql.multiplier_loss, "multiplier", info["gap"], cfg)
        out |= {"multiplier loss": loss, "multiplier gradient": slope}
    if variant == "H":  # the same in all
        (loss, info), slope = gradient(cql.actor_loss, "actor", batch, k_actor)
        out |= {"actor loss": loss, "actor gradient": slope}
        args = info["entropy"], -batch.action.shape[-1]
        (loss, _), slope = gradient(cql.temperature_loss, "temperature", *args)
        out |= {"temperature loss": loss, "temperature gradient": slope}

    state, infos = jax.lax.scan(lambda s, row: cql.update(s, *row, cfg), state, (batches, keys()))
    for name in ("actor", "critic"):
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
    for name in NETS[: 4 if variant == "Lagrange" else 3]:
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
    nets = {"actor": "policy", "critic": "qf", "temperature": "alpha", "multiplier": "alpha_prime"}
    if variant != "Lagrange":
        del nets["multiplier"]
    gradients, infos = {}, []

    def keep(name):
        def hook(*_):
            gradients.setdefault(name, read(sac, name, grad=True))  # of the first update

        getattr(sac, f"{nets[name]}_optimizer").register_step_pre_hook(hook)

    for name in nets:
        keep(name)

    for i in range(3):
        given = {name: torch.tensor(x[i]) for name, x in noise.items()}
        rows = {name: x.transpose(0, 1) for name, x in given.items() if x.dim() == 3}  # (B, n, A)
        backup = rows["max backup"] if variant == "max-backup" else given["backup"]
        normal = iter([given["policy"], backup, rows["pi"], rows["next pi"]])

        def standard_normal(shape, dtype, device, normal=normal):
            x = next(normal)
            assert x.shape == shape
            return x

        def uniform(tensor, low, high, x=rows["uniform"]):
            assert (low, high) == (-1, 1)
            return tensor.copy_(x)

        names = ("obs", "action", "reward", "next_obs", "done")
        longer = ("observations", "actions", "rewards", "next_observations", "dones")
        batch = {b: torch.tensor(batches[a][i]) for a, b in zip(names, longer, strict=True)}
        with (
            mock.patch("torch.distributions.normal._standard_normal", standard_normal),
            mock.patch.object(torch.Tensor, "uniform_", uniform),
        ):
            infos.append(sac.train(batch))

    def critic_loss(info):
        loss = info["qf1_loss"] + info["qf2_loss"]
        if variant != "SAC":
            loss += info["cql/cql_min_qf1_loss"] + info["cql/cql_min_qf2_loss"]
        if variant == "Lagrange":
            weight = sac.config.cql_min_q_weight * info["cql/alpha_prime"]
            loss += 2 * weight * sac.config.cql_target_action_gap
        return loss

    info = infos[0]
    if variant != "H":
        del gradients["actor"], gradients["temperature"]
    out = {f"{name} gradient": tree for name, tree in gradients.items()}
    out |= {f"{name} after 3 updates": read(sac, name) for name in (*nets, "target")}
    out["actor loss of 3 updates"] = np.array([info["policy_loss"] for info in infos])
    out["critic loss of 3 updates"] = np.array([critic_loss(info) for info in infos])
    out["critic loss"], out["TD loss"] = critic_loss(info), info["qf1_loss"] + info["qf2_loss"]
    if variant == "H":
        out["actor loss"], out["temperature loss"] = info["policy_loss"], info["alpha_loss"]
    if variant != "SAC":
        out["gap"] = (info["cql/cql_qf1_diff"] + info["cql/cql_qf2_diff"]) / 2
    if variant == "Lagrange":
        out["multiplier loss"] = info["cql/alpha_prime_loss"]
    return out


def build(variant, params, obs_dim, action_dim):
    """The port's learner with our weights."""
    import torch
    from SimpleSAC import model
    from SimpleSAC.conservative_sac import ConservativeSAC

    arch = "-".join(map(str, SETTINGS["widths"]))
    policy = model.TanhGaussianPolicy(obs_dim, action_dim, arch)
    critics = [model.FullyConnectedQFunction(obs_dim, action_dim, arch) for _ in range(4)]
    settings = dict(
        discount=SETTINGS["gamma"],
        policy_lr=SETTINGS["actor_lr"],
        qf_lr=SETTINGS["critic_lr"],
        soft_target_update_rate=SETTINGS["polyak"],
        target_entropy=-float(action_dim),
    )
    sac = ConservativeSAC(settings | VARIANTS[variant][1], policy, *critics)
    to_mlp(policy.base_network.network, params["actor"]["MLP_0"])
    policy.log_std_multiplier.constant.data = torch.tensor(params["actor"]["log_std_scale"])
    policy.log_std_offset.constant.data = torch.tensor(params["actor"]["log_std_shift"])
    sac.log_alpha.constant.data = torch.tensor(params["temperature"]["log"])
    if variant == "Lagrange":
        sac.log_alpha_prime.constant.data = torch.tensor(params["multiplier"]["log"])
    for i, critic in enumerate(critics):
        both = params["critic" if i < 2 else "target"]["MLP_0"]
        to_mlp(critic.network.network, tree_map(lambda x, i=i: x[i % 2], both))
    return sac


def read(sac, name, grad=False):
    """One of our trees, from the port's parameters or gradients."""

    def number(scalar):
        x = scalar.constant
        return (x.grad if grad else x.data).numpy().copy()

    if name == "actor":
        scale, shift = sac.policy.log_std_multiplier, sac.policy.log_std_offset
        layers = from_mlp(sac.policy.base_network.network, grad)
        return {"MLP_0": layers, "log_std_scale": number(scale), "log_std_shift": number(shift)}
    if name in ("temperature", "multiplier"):
        return {"log": number(sac.log_alpha if name == "temperature" else sac.log_alpha_prime)}
    pair = (sac.qf1, sac.qf2) if name == "critic" else (sac.target_qf1, sac.target_qf2)
    members = [from_mlp(critic.network.network, grad) for critic in pair]
    return {"MLP_0": tree_map(lambda *x: np.stack(x), *members)}
