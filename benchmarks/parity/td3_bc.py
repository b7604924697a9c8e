"""TD3+BC compared with its authors' code.

The peer: `TD3_BC.train` of TD3_BC.py makes whole updates of the critics, and on every second call
of the policy and the targets. Losses are read where it calls `backward`, gradients when an
optimiser is about to step.

- `randn_like` returns the noise that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- width of 256 and learning rate: the peer gets smaller Linears and new optimisers
- standardisation of observations: part of the data for the peer

Weights: l1, l2, l3 of its critic are our member 0 on axis 0, l4, l5, l6 our member 1.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_linear, to_linear

PEER = dict(
    name="sfujim/TD3_BC",
    repository="https://github.com/sfujim/TD3_BC",
    commit="8791ad7d7656cb8396f1b3ac8c37f170b2a2dd5f",
    environment="torch numpy",
)
# Large steps and noise, so that four updates and the clips show.
SETTINGS = dict(
    widths=(16, 16), gamma=0.9, lr=3e-3, polyak=0.1, alpha=2.5, policy_noise=0.4, normalize=False
)
NETS = ("actor", "critic")
UPDATES = 4  # two rounds


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, count=UPDATES)
    _, state = start("td3_bc", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    params["target_actor"] = scramble(state.target_actor["params"], rng)
    shape = batches["action"].shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def keys():
    """The keys of four updates."""
    import jax

    return jax.random.split(jax.random.key(0), UPDATES)


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import td3_bc
    from common.datasets import Batch

    cfg, state = start("td3_bc", batches, **SETTINGS)
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    targets = {name: {"params": params[name]} for name in ("target", "target_actor")}
    state, batches = state.replace(**nets, **targets), Batch(**batches)
    rows = [jax.tree.map(lambda x, i=i: x[i], (batches, keys())) for i in range(2)]

    def gradient(loss, learner, *args):
        (value, _), slope = jax.value_and_grad(loss, has_aux=True)(learner.params, *args)
        return value, slope

    out, critic = {}, state.critic
    loss = gradient(td3_bc.critic_loss, critic, state, *rows[0], cfg)
    out["critic loss"], out["critic gradient"] = loss
    for row in rows:
        critic, _ = td3_bc.descend(td3_bc.critic_loss, critic, state, *row, cfg)
    after = state.replace(critic=critic)
    loss = gradient(td3_bc.actor_loss, state.actor, after, rows[1][0], cfg)
    out["actor loss"], out["actor gradient"] = loss

    rounds = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), (batches, keys()))
    state, infos = jax.lax.scan(lambda s, row: td3_bc.update(s, *row, cfg), state, rounds)
    out["actor loss of 2 rounds"] = infos["actor_loss"]
    out["critic loss of 2 rounds"] = infos["critic_loss"]
    for name in NETS:
        out[f"{name} after 2 rounds"] = getattr(state, name).params
    for name in targets:
        out[f"{name} after 2 rounds"] = getattr(state, name)
    return out


def theirs(inputs, checkout):
    import sys
    from unittest import mock

    import torch

    sys.path.insert(0, checkout)
    import TD3_BC

    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    agent = build(TD3_BC, params, batches["obs"].shape[-1], batches["action"].shape[-1])
    losses, gradients = {name: [] for name in NETS}, {}

    def keep(name):
        def hook(*_):
            gradients.setdefault(name, read(agent, name, grad=True))  # of the first step

        getattr(agent, f"{name}_optimizer").register_step_pre_hook(hook)

    for name in NETS:
        keep(name)

    backward = torch.Tensor.backward
    for i in range(UPDATES):
        calls = iter(NETS[::-1])  # the critic's, then perhaps the actor's

        def record(loss, calls=calls):
            losses[next(calls)].append(loss.item())
            backward(loss)

        def randn_like(action, i=i):
            assert action.shape == noise[i].shape
            return torch.tensor(noise[i])

        with (
            mock.patch.object(torch.Tensor, "backward", record),
            mock.patch("torch.randn_like", randn_like),
        ):
            agent.train(Buffer(batches, i), len(noise[i]))

    pairs = np.array(losses["critic"]).reshape(-1, 2)
    out = {f"{name} gradient": gradients[name] for name in NETS}
    out |= {f"{name} loss": np.array(losses[name][0]) for name in NETS}
    out["actor loss of 2 rounds"] = np.array(losses["actor"])
    out["critic loss of 2 rounds"] = pairs.mean(1)
    for name in (*NETS, "target", "target_actor"):
        out[f"{name} after 2 rounds"] = read(agent, name)
    return out


class Buffer:
    """Their replay buffer, which holds one batch."""

    def __init__(self, batches, i):
        import torch

        rows = {name: torch.tensor(x[i]) for name, x in batches.items()}
        column = {name: x[:, None] if x.dim() == 1 else x for name, x in rows.items()}
        names = ("obs", "action", "next_obs", "reward")
        self.rows = (*(column[name] for name in names), 1 - column["done"])

    def sample(self, size):
        assert size == len(self.rows[0])
        return self.rows


def build(module, params, obs_dim, action_dim):
    """Their agent with our weights, in networks of our width."""
    import torch

    agent = module.TD3_BC(
        obs_dim,
        action_dim,
        max_action=1.0,
        discount=SETTINGS["gamma"],
        tau=SETTINGS["polyak"],
        policy_noise=SETTINGS["policy_noise"],
        alpha=SETTINGS["alpha"],
    )
    for name in (*NETS, "target", "target_actor"):
        net = network(agent, name)
        for layer, dense in zip(names(name), dense_layers(name, params[name]), strict=True):
            linear = torch.nn.Linear(*dense["kernel"].shape[::-1])
            to_linear(linear, dense)
            setattr(net, layer, linear)
    for name in NETS:
        adam = torch.optim.Adam(network(agent, name).parameters(), lr=SETTINGS["lr"])
        setattr(agent, f"{name}_optimizer", adam)
    return agent


def network(agent, name):
    """Their module for our "actor", "critic", "target" or "target_actor"."""
    own = {"target": "critic_target", "target_actor": "actor_target"}
    return getattr(agent, own.get(name, name))


def names(name):
    """The names of their layers."""
    return [f"l{i}" for i in range(1, 4 if "actor" in name else 7)]


def dense_layers(name, tree):
    """Our Dense layers in their order: of the actor, or of one critic after the other."""
    layers = [tree["MLP_0"][f"Dense_{i}"] for i in range(3)]
    if "actor" in name:
        return layers
    return [tree_map(lambda x, i=i: x[i], layer) for i in range(2) for layer in layers]


def read(agent, name, grad=False):
    """One of our trees, from the peer's parameters or gradients."""
    net = network(agent, name)
    layers = [from_linear(getattr(net, layer), grad) for layer in names(name)]
    if "actor" not in name:
        pairs = zip(layers[:3], layers[3:], strict=True)
        layers = [tree_map(lambda *x: np.stack(x), *pair) for pair in pairs]
    return {"MLP_0": {f"Dense_{i}": layer for i, layer in enumerate(layers)}}
