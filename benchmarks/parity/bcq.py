"""BCQ compared with its authors' code.

The peer: `BCQ` of continuous_BCQ/BCQ.py. `BCQ.train` makes whole updates on batches from a stub of
its replay buffer. Losses are read where `backward` is called, gradients when an optimiser is about
to step, both in the first update.

- torch's `randn` and `randn_like` return the noise that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- numbers of hidden units, fixed in its code: a patched Linear maps them to ours

Weights: layers 1 to 3 and 4 to 6 of its critic are our members 0 and 1 on axis 0; mean and log_std
of its encoder are the two halves of our encoder's last layer. It repeats each next state; ours has
an axis of samples in front.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="authors (BCQ)",
    repository="https://github.com/sfujim/BCQ",
    commit="4876f7e5afa9eb2981feec5daf67202514477518",
    environment="torch numpy",
)
# Large Polyak steps, so that three updates show; the rate is theirs, which their code fixes.
SETTINGS = dict(widths=(16, 16), vae_widths=(16, 16), gamma=0.9, polyak=0.1, phi=0.2, lam=0.75)
UNITS = {400: 16, 300: 16, 750: 16}  # theirs: ours
LOSSES = ("vae", "critic", "actor")  # in the order of an update


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=16)
    cfg, state = start("bcq", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in LOSSES}
    params |= {n: scramble(getattr(state, n)["params"], rng) for n in ("target", "target_actor")}
    shape = batches["action"].shape[1:]
    noise = jax.vmap(lambda key: draw(key, cfg.num_samples, shape))(keys())
    return flatten({"batch": batches, "params": params, "noise": noise})


def keys():
    """The keys of three updates."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def draw(key, n, shape):
    """The latents that our update draws from a key, not clipped; shape (B, A)."""
    import jax

    rows, latent = shape[0], 2 * shape[1]
    k_vae, k_critic, k_actor = jax.random.split(key, 3)
    return {
        "encoder": jax.random.normal(k_vae, (rows, latent)),
        "target": jax.random.normal(k_critic, (n, rows, latent)),
        "policy": jax.random.normal(k_actor, (rows, latent)),
    }


def ours(inputs):
    return jit(outputs)(unflatten(inputs, "batch"), unflatten(inputs, "params"))


def outputs(batches, params):
    import jax

    from algorithms import bcq
    from common.datasets import Batch

    cfg, state = start("bcq", batches, **SETTINGS)
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in LOSSES}
    targets = {name: {"params": params[name]} for name in ("target", "target_actor")}
    state, batches = state.replace(**targets, **nets), Batch(**batches)

    def gradient(name, state, *args):
        loss = jax.value_and_grad(getattr(bcq, f"{name}_loss"), has_aux=True)
        (value, _), slope = loss(getattr(state, name).params, state, *args)
        return {f"{name} loss": value, f"{name} gradient": slope}

    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_vae, k_critic, k_actor = jax.random.split(key, 3)
    first, _ = bcq.update(state, batch, key, cfg)  # theirs are read within an update
    out = gradient("vae", state, batch, k_vae)
    out |= gradient("critic", state.replace(vae=first.vae), batch, k_critic, cfg)
    newer = state.replace(vae=first.vae, critic=first.critic)
    out |= gradient("actor", newer, batch, k_actor)

    state, infos = jax.lax.scan(lambda s, row: bcq.update(s, *row, cfg), state, (batches, keys()))
    for name in LOSSES:
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
        out[f"{name} after 3 updates"] = getattr(state, name).params
    out["target after 3 updates"] = state.target
    return out | {"target actor after 3 updates": state.target_actor}


def theirs(inputs, checkout):
    import sys
    from unittest import mock

    import torch

    sys.path.insert(0, f"{checkout}/continuous_BCQ")
    import BCQ as authors

    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    obs_dim, action_dim = batches["obs"].shape[-1], batches["action"].shape[-1]
    linear = torch.nn.Linear
    with mock.patch("torch.nn.Linear", lambda i, o: linear(UNITS.get(i, i), UNITS.get(o, o))):
        agent = authors.BCQ(
            obs_dim, action_dim, 1.0, "cpu", discount=SETTINGS["gamma"], tau=SETTINGS["polyak"],
            lmbda=SETTINGS["lam"], phi=SETTINGS["phi"],
        )  # fmt: skip
    nets = {"vae": agent.vae, "critic": agent.critic, "actor": agent.actor}
    nets |= {"target": agent.critic_target, "target_actor": agent.actor_target}
    for name, net in nets.items():
        load(net, params[name])

    losses, gradients = {name: [] for name in LOSSES}, {}
    backward, order = torch.Tensor.backward, iter(3 * LOSSES)

    def hook(name):
        def keep_gradient(*_):
            gradients.setdefault(name, read(nets[name], grad=True))  # of the first update

        getattr(agent, f"{name}_optimizer").register_step_pre_hook(keep_gradient)

    for name in LOSSES:
        hook(name)

    def keep(loss):
        losses[next(order)].append(loss.item())
        backward(loss)

    for i in range(3):
        given = {name: torch.tensor(x[i]) for name, x in noise.items()}
        rows = given["target"].transpose(0, 1).flatten(0, 1)  # theirs repeat each next state
        queue = [given["encoder"], rows, given["policy"]]

        def normal(like, queue=queue):
            x = queue.pop(0)
            assert x.shape == getattr(like, "shape", like)
            return x

        batch = tree_map(lambda x, i=i: torch.tensor(x[i]), batches)
        reward, going = batch["reward"][:, None], 1 - batch["done"][:, None]
        columns = batch["obs"], batch["action"], batch["next_obs"], reward, going
        buffer = mock.Mock(sample=lambda size, columns=columns: columns)
        with (
            mock.patch("torch.randn", normal),
            mock.patch("torch.randn_like", normal),
            mock.patch("torch.Tensor.backward", keep),
        ):
            agent.train(buffer, iterations=1, batch_size=len(reward))
        assert not queue

    out = {}
    for name in LOSSES:
        out |= {f"{name} loss": losses[name][0], f"{name} gradient": gradients[name]}
    for name in LOSSES:
        out[f"{name} loss of 3 updates"] = np.array(losses[name])
    for name, net in nets.items():
        out[f"{name.replace('_', ' ')} after 3 updates"] = read(net)
    return out


def stacks(net):
    """Our trees of layers in one of their networks: {name: layers}; a critic's are its members."""
    if hasattr(net, "e1"):
        return {"encoder": [net.e1, net.e2], "decoder": [net.d1, net.d2, net.d3]}
    numbers = ((1, 2, 3), (4, 5, 6)) if hasattr(net, "l6") else ((1, 2, 3),)
    return {i: [getattr(net, f"l{k}") for k in three] for i, three in enumerate(numbers)}


def load(net, params):
    """Writes our weights into one of the peer's networks."""
    import torch

    layers = stacks(net)
    if "encoder" not in layers:
        members, params = len(layers), params["MLP_0"]
        for i, stack in layers.items():
            to_mlp(stack, tree_map(lambda x, i=i: x[i], params) if members == 2 else params)
        return
    for name, stack in layers.items():
        to_mlp(stack, params[name])
    last = tree_map(lambda x: np.split(x, 2), params["encoder"]["Dense_2"])
    for i, head in enumerate((net.mean, net.log_std)):
        head.weight.data, head.bias.data = (torch.tensor(last[k][i]) for k in ("kernel", "bias"))


def read(net, grad=False):
    """One of our trees, from the parameters or gradients of the peer's network."""
    trees = {name: from_mlp(stack, grad) for name, stack in stacks(net).items()}
    if "encoder" not in trees:
        trees = [*trees.values()]
        return {"MLP_0": tree_map(lambda *x: np.stack(x), *trees) if trees[1:] else trees[0]}
    heads = [from_mlp([head], grad)["Dense_0"] for head in (net.mean, net.log_std)]
    trees["encoder"]["Dense_2"] = tree_map(lambda *x: np.concatenate(x), *heads)
    return trees
