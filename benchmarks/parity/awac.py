"""AWAC compared with CORL, the implementation nearest to the paper that still runs.

The peer: `Actor`, `Critic` and `AdvantageWeightedActorCritic` of algorithms/offline/awac.py.
`_critic_loss` and `_actor_loss` give the losses, `backward` the gradients, `update` whole updates.

- Stubs replace d4rl, gym, pyrallis and wandb.
- torch's standard normal numbers are the noise that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- tanh of the mean: the peer gets a Tanh after the last layer of its policy
- number of hidden layers: our `widths` has three
- bounds of std: no number here reaches them

Weights: its two critics are our members 0 and 1 on axis 0; its _log_std is our log_std; its
awac_lambda is 1 / beta.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="CORL",
    repository="https://github.com/tinkoff-ai/CORL",
    commit="6afec90484bbf47dee05fdf525e26a3ebe028e9b",
    environment="torch numpy tqdm",
)
# Three hidden layers as theirs; large steps, so that three updates show.
SETTINGS = dict(
    widths=(16, 16, 16), gamma=0.9, lr=1e-2, polyak=0.1, beta=2.0, max_weight=100.0, normalize=False
)


def inputs():
    import jax

    rng = np.random.default_rng(2)  # no gradient so small that rounding turns Adam round
    batches = random_batches(rng)
    _, state = start("awac", batches, **SETTINGS)
    params = {n: scramble(getattr(state, n).params["params"], rng) for n in ("actor", "critic")}
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

    k_critic, k_actor = jax.random.split(key)
    normal = distrax.MultivariateNormalDiag(jnp.zeros(shape), jnp.ones(shape))
    return {
        "next": normal.sample(seed=k_critic),
        "own": normal.sample(seed=k_actor, sample_shape=1)[0],
    }


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import awac
    from common.datasets import Batch

    cfg, state = start("awac", batches, **SETTINGS)
    nets = {n: getattr(state, n).replace(params={"params": params[n]}) for n in ("actor", "critic")}
    state, batches = state.replace(target={"params": params["target"]}, **nets), Batch(**batches)

    out = {}
    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    for name, k in zip(("critic", "actor"), jax.random.split(key), strict=True):
        loss = jax.value_and_grad(getattr(awac, f"{name}_loss"), has_aux=True)
        (value, _), gradient = loss(getattr(state, name).params, state, batch, k, cfg)
        out |= {f"{name} loss": value, f"{name} gradient": gradient}

    state, infos = jax.lax.scan(lambda s, row: awac.update(s, *row, cfg), state, (batches, keys()))
    for name in ("critic", "actor"):
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
        out[f"{name} after 3 updates"] = getattr(state, name).params
    return out | {"target after 3 updates": state.target}


def theirs(inputs, checkout):
    from unittest import mock

    import torch

    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    obs_dim, action_dim = batches["obs"].shape[-1], batches["action"].shape[-1]
    agent = build(checkout, obs_dim, action_dim, 1 / SETTINGS["beta"])
    load(agent, params)
    queue = []

    def standard_normal(shape, dtype, device):
        x = torch.tensor(queue.pop(0))
        assert x.shape == shape
        return x

    columns = ("obs", "action", "reward", "next_obs", "done")
    with mock.patch("torch.distributions.normal._standard_normal", standard_normal):
        rows = []
        for i in range(3):
            b = [torch.tensor(batches[name][i]) for name in columns]
            rows.append([x[:, None] if x.dim() == 1 else x for x in b])

        obs, action, reward, next_obs, done = rows[0]
        queue += [noise["next"][0], noise["own"][0]]
        losses = {
            "critic": agent._critic_loss(obs, action, reward, done, next_obs),
            "actor": agent._actor_loss(obs, action),
        }
        out = {}
        for name, loss in losses.items():
            loss.backward()
            out |= {f"{name} loss": loss.item(), f"{name} gradient": read(agent, name, grad=True)}

        infos = []
        for i in range(3):
            queue += [noise["next"][i], noise["own"][i]]
            infos.append(agent.update(rows[i]))
    assert not queue
    for name in losses:
        out[f"{name} loss of 3 updates"] = np.array([info[f"{name}_loss"] for info in infos])
        out[f"{name} after 3 updates"] = read(agent, name)
    return out | {"target after 3 updates": read(agent, "target")}


def build(checkout, obs_dim, action_dim, awac_lambda):
    """The peer's agent; the mean of its policy gets a tanh, as in ours."""
    import sys
    from unittest import mock

    import torch

    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, f"{checkout}/algorithms/offline")
    import awac as corl

    sizes = (obs_dim, action_dim, SETTINGS["widths"][0])
    actor, *critics = corl.Actor(*sizes), corl.Critic(*sizes), corl.Critic(*sizes)
    actor._mlp.append(torch.nn.Tanh())
    nets = dict(zip(("actor", "critic_1", "critic_2"), (actor, *critics), strict=True))
    adams = {
        f"{name}_optimizer": torch.optim.Adam(net.parameters(), lr=SETTINGS["lr"])
        for name, net in nets.items()
    }
    return corl.AdvantageWeightedActorCritic(
        **nets, **adams, gamma=SETTINGS["gamma"], tau=SETTINGS["polyak"], awac_lambda=awac_lambda
    )


def members(agent, name):
    """The two networks that are our "critic" or our "target"."""
    prefix = "_target_critic" if name == "target" else "_critic"
    return [getattr(agent, f"{prefix}_{i}")._mlp for i in (1, 2)]


def load(agent, params):
    """Writes our weights into the peer's agent."""
    import torch

    to_mlp(agent._actor._mlp, params["actor"]["MLP_0"])
    agent._actor._log_std.data = torch.tensor(params["actor"]["log_std"])
    for name in ("critic", "target"):
        for i, layers in enumerate(members(agent, name)):
            to_mlp(layers, tree_map(lambda x, i=i: x[i], params[name]["MLP_0"]))


def read(agent, name, grad=False):
    """One of our trees, from the peer's parameters or gradients."""
    if name == "actor":
        log_std = agent._actor._log_std
        number = (log_std.grad if grad else log_std.data).numpy().copy()
        return {"MLP_0": from_mlp(agent._actor._mlp, grad), "log_std": number}
    trees = [from_mlp(layers, grad) for layers in members(agent, name)]
    return {"MLP_0": tree_map(lambda *x: np.stack(x), *trees)}
