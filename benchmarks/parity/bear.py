"""BEAR compared with its authors' code.

The peer: `BEAR` of algos.py. `BEAR.train` makes whole updates on batches from a stub of its replay
buffer; `mmd_loss_laplacian` and `mmd_loss_gaussian` are also called alone. Losses are read where
`backward` is called, gradients when an optimiser is about to step, both in the first update.

- NumPy's `random.normal` returns the noise that our update draws from fixed keys.
- A stub replaces the logger.
- Since torch 1.5 the loop fails, because the policy's step comes between two backward passes of one
  graph. Here it comes after both, with the gradients of the first; the numbers are the same.

Differences removed for the comparison:
- initialisation: both start from our weights
- numbers of hidden units, fixed in its code: a patched Linear maps them to ours
- bounds of the policy's std: no number here reaches them

Weights: layers 1 to 3 and 4 to 6 of its critic are our members 0 and 1 on axis 0; mean and log_std
of its policy and encoder are the two halves of our last layer. Its multiplier's loss also contains
-Q, which has no gradient there, so only the gradient is compared.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.layers import from_mlp, to_mlp

PEER = dict(
    name="authors (BEAR)",
    repository="https://github.com/aviralkumar2907/BEAR",
    commit="f2e31c1b5f81c4fb0e692a34949c7d8b48582d8f",
    environment="torch numpy",
)
# Large Polyak steps, so that three updates show; rates and lam are theirs, which their code fixes.
SETTINGS = dict(
    widths=(12, 12), vae_widths=(12, 12), gamma=0.9, polyak=0.1, warm_start=0, gaussian=False,
    sigma=10.0,
)  # fmt: skip
UNITS = {400: 12, 300: 12, 750: 12}  # theirs: ours
VARIANTS = {  # ours, theirs
    "Laplacian": (dict(), dict()),
    "Gaussian": (dict(gaussian=True, sigma=20.0), dict(kernel_type="gaussian", mmd_sigma=20.0)),
    "warm start": (dict(warm_start=20), dict(epoch=0)),
    "mean of critics": (dict(ensemble="mean"), dict(version="2")),
    "fixed multiplier": (dict(fixed_multiplier=100.0), dict(mode="hardcoded")),
}
LOSSES = ("vae", "critic", "actor")  # in the order of an update; the multiplier's is the last


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=16)
    cfg, state = start("bear", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in LOSSES}
    params |= {n: scramble(getattr(state, n)["params"], rng) for n in ("target", "target_actor")}
    params["multiplier"] = {"log": np.float32(0.7)}
    shape = batches["action"].shape[1:]
    noise = jax.vmap(lambda key: draw(key, cfg, shape))(keys())
    samples = rng.normal(scale=3, size=(2, cfg.num_matches, *shape)).astype(np.float32)
    return flatten({"batch": batches, "params": params, "noise": noise, "samples": samples})


def keys():
    """The keys of three updates."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def draw(key, cfg, shape):
    """What our update draws from a key, not clipped; shape (B, A)."""
    import jax

    (rows, dim), n = shape, cfg.num_matches
    k_vae, k_critic, k_actor = jax.random.split(key, 3)
    k_decoder, k_pi = jax.random.split(k_actor)
    return {
        "encoder": jax.random.normal(k_vae, (rows, 2 * dim)),
        "target": jax.random.normal(k_critic, (cfg.num_samples, rows, dim)),
        "decoder": jax.random.normal(k_decoder, (n, rows, 2 * dim)),
        "policy": jax.random.normal(k_pi, (n, rows, dim)),
    }


def ours(inputs):
    trees = [unflatten(inputs, part) for part in ("batch", "params", "samples")]
    run = jit(outputs, static_argnums=0)
    return {k: v for name in VARIANTS for k, v in run(name, *trees).items()}


def outputs(variant, batches, params, samples):
    import jax

    from algorithms import bear
    from common.datasets import Batch

    cfg, state = start("bear", batches, **SETTINGS | VARIANTS[variant][0])
    nets = {n: getattr(state, n).replace(params={"params": params[n]}) for n in LOSSES}
    targets = {name: {"params": params[name]} for name in ("target", "target_actor")}
    nets["multiplier"] = state.multiplier.replace(params=params["multiplier"])
    state, batches = state.replace(**targets, **nets), Batch(**batches)

    def gradient(name, *args):
        loss = jax.value_and_grad(getattr(bear, f"{name}_loss"), has_aux=True)
        (value, _), slope = loss(nets[name].params, *args)
        return {f"{name} loss": value, f"{name} gradient": slope}

    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_vae, k_critic, k_actor = jax.random.split(key, 3)
    first, info = bear.update(state, batch, key, cfg)
    newer = state.replace(vae=first.vae, critic=first.critic)  # theirs are read within an update
    out = gradient("actor", newer, batch, k_actor, cfg)
    if variant in ("Laplacian", "Gaussian"):
        slope = jax.grad(bear.dual_loss, has_aux=True)
        out["multiplier gradient"], _ = slope(params["multiplier"], info["mmd"], cfg)
        out["MMD"] = bear.mmd(*samples, cfg)
    if variant == "Laplacian":
        out |= gradient("vae", state, batch, k_vae)
        out |= gradient("critic", state.replace(vae=first.vae), batch, k_critic, cfg)
        step = lambda s, row: bear.update(s, *row, cfg)  # noqa: E731
        state, infos = jax.lax.scan(step, state, (batches, keys()))
        for name in LOSSES:
            out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
            out[f"{name} after 3 updates"] = getattr(state, name).params
        out["target after 3 updates"] = state.target
        out["target actor after 3 updates"] = state.target_actor
        out["multiplier after 3 updates"] = state.multiplier.params
    return {f"{variant}: {k}": v for k, v in out.items()}


def theirs(inputs, checkout):
    import sys
    from unittest import mock

    sys.modules["logger"] = mock.MagicMock()
    sys.path.insert(0, checkout)
    parts = [unflatten(inputs, part) for part in ("batch", "params", "noise", "samples")]
    out = {}
    for variant in VARIANTS:
        found = train(variant, *parts)
        out |= {f"{variant}: {quantity}": x for quantity, x in found.items()}
    return out


def train(variant, batches, params, noise, samples):
    """Three of their updates in the first variant, one in the others."""
    from unittest import mock

    import torch

    agent = build(variant, params, batches["obs"].shape[-1], batches["action"].shape[-1])
    nets = dict(vae=agent.vae, critic=agent.critic, actor=agent.actor)
    nets |= dict(target=agent.critic_target, target_actor=agent.actor_target)
    for name, net in nets.items():
        load(net, params[name])
    losses, gradients = {name: [] for name in (*LOSSES, "multiplier")}, {}
    backward, order = torch.Tensor.backward, []
    whole, auto = variant == "Laplacian", agent.mode == "auto"

    def keep(loss, **options):
        losses[order.pop(0)].append(loss.item())
        backward(loss, **options)

    def hook(name):
        def keep_gradient(*_):
            gradients.setdefault(name, read(nets[name], grad=True))  # of the first update

        getattr(agent, f"{name}_optimizer").register_step_pre_hook(keep_gradient)

    for name in LOSSES:
        hook(name)
    if auto:
        defer(agent, gradients)

    for i in range(3 if whole else 1):
        order += losses if auto else LOSSES
        given = {k: x[i] if k == "encoder" else np.swapaxes(x[i], 0, 1) for k, x in noise.items()}
        given["target"] = given["target"].reshape(-1, given["target"].shape[-1])
        queue = [given[name] for name in ("encoder", "target", "decoder", "policy")]

        def normal(low, high, size, queue=queue):
            x = queue.pop(0)
            assert (low, high, x.shape) == (0, 1, tuple(size))
            return x

        batch = tree_map(lambda x, i=i: x[i], batches)
        reward, done = batch["reward"][:, None], batch["done"][:, None]
        columns = batch["obs"], batch["next_obs"], batch["action"], reward, done, np.ones((1, 4))
        buffer = mock.Mock(sample=lambda size, columns=columns: columns)
        with (
            mock.patch("numpy.random.normal", normal),
            mock.patch("torch.Tensor.backward", keep),
        ):
            agent.train(buffer, 1, len(reward), SETTINGS["gamma"], SETTINGS["polyak"])
        assert not queue and not order

    shown = LOSSES if whole else ("actor",)
    out = {f"{name} loss": losses[name][0] for name in shown}
    out |= {f"{name} gradient": gradients[name] for name in shown}
    if variant in ("Laplacian", "Gaussian"):
        out["multiplier gradient"] = gradients["multiplier"]
        x, y = (torch.tensor(s).transpose(0, 1) for s in samples)
        kernel = getattr(agent, f"mmd_loss_{variant.lower()}")
        out["MMD"] = kernel(x, y, sigma=agent.mmd_sigma).numpy()
    if whole:
        out |= {f"{name} loss of 3 updates": np.array(losses[name]) for name in LOSSES}
        out |= {f"{n.replace('_', ' ')} after 3 updates": read(net) for n, net in nets.items()}
        out["multiplier after 3 updates"] = agent.log_lagrange2.item()
    return out


def build(variant, params, obs_dim, action_dim):
    """Their agent, past its warm start unless the variant says so."""
    from unittest import mock

    import algos
    import torch

    settings = dict(
        use_bootstrap=False, lambda_=0.0, num_samples_match=5, mmd_sigma=SETTINGS["sigma"],
        version="0", epoch=20,
    )  # fmt: skip
    settings |= VARIANTS[variant][1]
    epoch, linear = settings.pop("epoch"), torch.nn.Linear
    with mock.patch("torch.nn.Linear", lambda i, o: linear(UNITS.get(i, i), UNITS.get(o, o))):
        agent = algos.BEAR(2, obs_dim, action_dim, 1.0, **settings)
    agent.epoch = epoch
    if agent.mode == "auto":
        agent.log_lagrange2.data = torch.tensor(params["multiplier"]["log"])
    return agent


def defer(agent, gradients):
    """Makes the policy's step after the multiplier's, with the gradients of its own loss."""
    step, kept = agent.actor_optimizer.step, []

    def remember():
        kept.extend(x.grad.clone() for x in agent.actor.parameters())

    def both(*_):
        gradients.setdefault("multiplier", agent.log_lagrange2.grad.item())
        for x in agent.actor.parameters():
            x.grad = kept.pop(0)
        step()

    agent.actor_optimizer.step = remember
    agent.lagrange2_opt.register_step_pre_hook(both)


def stacks(net):
    """Our trees of layers in one of their networks: {name: layers}; a critic's are its members."""
    if hasattr(net, "e1"):
        return {"encoder": [net.e1, net.e2], "decoder": [net.d1, net.d2, net.d3]}
    if hasattr(net, "l6"):
        return {i: [getattr(net, f"l{3 * i + k}") for k in (1, 2, 3)] for i in range(2)}
    return {"MLP_0": [net.l1, net.l2]}


def load(net, params):
    """Writes our weights into one of the peer's networks."""
    import torch

    for name, stack in stacks(net).items():
        if hasattr(net, "l6"):
            to_mlp(stack, tree_map(lambda x, i=name: x[i], params["MLP_0"]))
        else:
            to_mlp(stack, params[name])
    if hasattr(net, "log_std"):
        last = params["encoder" if hasattr(net, "e1") else "MLP_0"]["Dense_2"]
        for i, head in enumerate((net.mean, net.log_std)):
            halves = {name: torch.tensor(np.split(x, 2)[i]) for name, x in last.items()}
            head.weight.data, head.bias.data = halves["kernel"], halves["bias"]


def read(net, grad=False):
    """One of our trees, from the parameters or gradients of the peer's network."""
    trees = {name: from_mlp(stack, grad) for name, stack in stacks(net).items()}
    if hasattr(net, "l6"):
        return {"MLP_0": tree_map(lambda *x: np.stack(x), *trees.values())}
    heads = [from_mlp([head], grad)["Dense_0"] for head in (net.mean, net.log_std)]
    last = tree_map(lambda *x: np.concatenate(x), *heads)
    trees["encoder" if hasattr(net, "e1") else "MLP_0"]["Dense_2"] = last
    return trees
