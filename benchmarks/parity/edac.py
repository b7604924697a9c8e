"""EDAC and SAC-N compared with their authors' code.

The peer: `SACTrainer.train_from_torch` of lifelong_rl/trainers/q_learning/sac.py makes whole
updates with its own policy and ensemble. Losses are read where it calls `backward`, gradients when
an optimiser is about to step.

- Stubs replace the base class of trainers and statistics.
- `torch.normal` returns the noise that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- affine map of log std: the peer's layer is followed by the same map
- floor of log std and the 1e-6 in the log density: the peer gets our constants
- number and width of hidden layers: equal

Weights: its W is our kernel transposed; the two last layers of its policy are the halves of our
last layer; its log_alpha is the logarithm of our temperature.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, unflatten
from benchmarks.parity.layers import from_linear, to_linear

PEER = dict(
    name="snu-mllab/EDAC",
    repository="https://github.com/snu-mllab/EDAC",
    commit="198d5708701b531fd97a918a33152e1914ea14d7",
    environment="torch numpy",
)
# Large steps, so that three updates show.
SETTINGS = dict(
    widths=(16, 16), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3, polyak=0.1, num_critics=3
)
VARIANTS = {"EDAC": 1.5, "SAC-N": 0.0}  # eta
NETS = ("actor", "critic", "temperature")


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=16)
    _, state = start("edac", batches, **SETTINGS, eta=1.0)
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

    from algorithms import edac
    from common.datasets import Batch

    cfg, state = start("edac", batches, **SETTINGS, eta=VARIANTS[variant])
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    state, batches = state.replace(target={"params": params["target"]}, **nets), Batch(**batches)

    def gradient(loss, name, *args):
        return jax.value_and_grad(loss, has_aux=True)(getattr(state, name).params, state, *args)

    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_actor, k_critic = jax.random.split(key)
    (loss, _), slope = gradient(edac.critic_loss, "critic", batch, k_critic, cfg)
    out = {"critic loss": loss, "critic gradient": slope}
    if variant == "EDAC":  # the same in both
        (loss, info), slope = gradient(edac.actor_loss, "actor", batch, k_actor)
        out |= {"actor loss": loss, "actor gradient": slope}
        args = info["entropy"], -batch.action.shape[-1]
        (loss, _), slope = gradient(edac.temperature_loss, "temperature", *args)
        out |= {"temperature loss": loss, "temperature gradient": slope}

    state, infos = jax.lax.scan(lambda s, row: edac.update(s, *row, cfg), state, (batches, keys()))
    for name in ("actor", "critic"):
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
    for name in NETS:
        out[f"{name} after 3 updates"] = getattr(state, name).params
    out["target after 3 updates"] = state.target
    return {f"{variant}: {k}": v for k, v in out.items()}


def theirs(inputs, checkout):
    import sys
    import types
    from unittest import mock

    base = types.ModuleType("base")
    base.TorchTrainer = Trainer
    sys.modules["lifelong_rl.core.rl_algorithms.torch_rl_algorithm"] = base
    sys.modules["lifelong_rl.util.eval_util"] = mock.MagicMock()
    sys.path.insert(0, checkout)
    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    out = {}
    for variant in VARIANTS:
        found = train(variant, batches, params, noise)
        out |= {f"{variant}: {quantity}": x for quantity, x in found.items()}
    return out


class Trainer:
    """The part of the base class that the peer's learner needs."""

    def __init__(self):
        self._num_train_steps = 0


def train(variant, batches, params, noise):
    """Three of their updates."""
    from unittest import mock

    import torch

    agent = build(variant, params, batches["obs"].shape[-1], batches["action"].shape[-1])
    agent._need_to_update_eval_statistics = False
    optimisers = {"temperature": "alpha", "actor": "policy", "critic": "qfs"}  # in their order
    losses, gradients = {name: [] for name in optimisers}, {}

    def keep(name):
        def hook(*_):
            gradients.setdefault(name, read(agent, name, grad=True))  # of the first update

        getattr(agent, f"{optimisers[name]}_optimizer").register_step_pre_hook(hook)

    for name in optimisers:
        keep(name)

    columns = dict(
        observations="obs",
        actions="action",
        rewards="reward",
        next_observations="next_obs",
        terminals="done",
    )
    backward = torch.Tensor.backward
    for i in range(3):
        order = iter(optimisers)
        normal = iter([torch.tensor(noise[name][i]) for name in ("policy", "backup")])

        def record(loss, order=order):
            losses[next(order)].append(loss.item())
            backward(loss)

        def draw_normal(mean, std, normal=normal):
            return mean + std * next(normal)

        batch = {name: torch.tensor(batches[column][i]) for name, column in columns.items()}
        batch = {name: x[:, None] if x.dim() == 1 else x for name, x in batch.items()}
        with (
            mock.patch.object(torch.Tensor, "backward", record),
            mock.patch("torch.normal", draw_normal),
        ):
            agent.train_from_torch(batch, None)
        assert next(normal, None) is None

    names = NETS if variant == "EDAC" else ("critic",)
    out = {f"{name} gradient": gradients[name] for name in names}
    out |= {f"{name} loss": np.array(losses[name][0]) for name in names}
    out |= {f"{name} loss of 3 updates": np.array(losses[name]) for name in ("actor", "critic")}
    return out | {f"{name} after 3 updates": read(agent, name) for name in (*NETS, "target")}


def build(variant, params, obs_dim, action_dim):
    """Their learner with our weights, and our map behind their layer of log std."""
    from types import SimpleNamespace

    import torch
    from lifelong_rl.models.networks import ParallelizedEnsembleFlattenMLP
    from lifelong_rl.policies.models import tanh_gaussian_policy
    from lifelong_rl.torch.distributions import TanhNormal
    from lifelong_rl.trainers.q_learning.sac import SACTrainer

    class Mapped(torch.nn.Module):
        """scale * layer + shift."""

        def __init__(self, layer, scale, shift):
            super().__init__()
            self.layer = layer
            self.scale = torch.nn.Parameter(torch.tensor(scale))
            self.shift = torch.nn.Parameter(torch.tensor(shift))

        def forward(self, x):
            return self.scale * self.layer(x) + self.shift

    tanh_gaussian_policy.LOG_SIG_MIN = -20
    TanhNormal.__init__.__defaults__ = (0.0,)  # epsilon
    widths, count = list(SETTINGS["widths"]), SETTINGS["num_critics"]
    policy = tanh_gaussian_policy.TanhGaussianPolicy(widths, obs_dim, action_dim)
    own = params["actor"]
    policy.last_fc_log_std = Mapped(
        policy.last_fc_log_std, own["log_std_scale"], own["log_std_shift"]
    )
    for layer, dense in zip(linears(policy), split(own["MLP_0"]), strict=True):
        to_linear(layer, dense)
    ensembles = []
    for name in ("critic", "target"):
        ensemble = ParallelizedEnsembleFlattenMLP(count, widths, obs_dim + action_dim, 1)
        for i, layer in enumerate((*ensemble.fcs, ensemble.last_fc)):
            dense = params[name]["MLP_0"][f"Dense_{i}"]
            layer.W.data = torch.tensor(dense["kernel"].swapaxes(1, 2).copy())
            layer.b.data = torch.tensor(dense["bias"][:, None])
        ensembles.append(ensemble)
    agent = SACTrainer(
        SimpleNamespace(action_space=np.zeros(action_dim)),  # for its shape
        policy,
        *ensembles,
        discount=SETTINGS["gamma"],
        policy_lr=SETTINGS["actor_lr"],
        qf_lr=SETTINGS["critic_lr"],
        soft_target_tau=SETTINGS["polyak"],
        eta=VARIANTS[variant],
        num_qs=count,
    )
    agent.log_alpha.data = torch.tensor(params["temperature"]["log"])[None]
    return agent


def linears(policy):
    """Their layers of the policy in their order."""
    return [*policy.fcs, policy.last_fc, policy.last_fc_log_std.layer]


def split(layers):
    """Our layers of the policy as theirs: the last one is two."""
    *hidden, last = (layers[name] for name in sorted(layers))
    half = len(last["bias"]) // 2
    halves = (
        {name: x[rows] for name, x in last.items()} for rows in (slice(half), slice(half, None))
    )
    return [*hidden, *halves]


def read(agent, name, grad=False):
    """One of our trees, from the peer's parameters or gradients."""

    def number(x):
        return (x.grad if grad else x.data).numpy().copy()

    if name == "temperature":
        return {"log": number(agent.log_alpha)}
    if name == "actor":
        *hidden, mean, log_std = (from_linear(layer, grad) for layer in linears(agent.policy))
        last = {leaf: np.concatenate([mean[leaf], log_std[leaf]]) for leaf in mean}
        tree = {f"Dense_{i}": layer for i, layer in enumerate([*hidden, last])}
        own = agent.policy.last_fc_log_std
        more = {"log_std_scale": number(own.scale), "log_std_shift": number(own.shift)}
        return {"MLP_0": tree} | more
    ensemble = agent.qfs if name == "critic" else agent.target_qfs
    layers = (*ensemble.fcs, ensemble.last_fc)
    dense = [{"kernel": number(x.W).swapaxes(1, 2), "bias": number(x.b)[:, 0]} for x in layers]
    return {"MLP_0": {f"Dense_{i}": layer for i, layer in enumerate(dense)}}
