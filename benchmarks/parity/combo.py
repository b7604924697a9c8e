"""COMBO compared with the trusted port, OfflineRL-Kit; its authors published no code.

The peer: `COMBOPolicy.learn` makes whole updates; its optimisers keep the gradients they receive.
`EnsembleDynamics.train` fits the model for three epochs, with its split, bootstrap, order, best
weights and elites. `EnsembleDynamics.step` is a step of a rollout.

- Stubs replace gym, pandas, matplotlib, tensorboard and the logger.
- torch and NumPy return our noise and our rows.

Differences removed for the comparison:
- the lost reshape: `learn` reshapes the values of `calc_pi_values` and `calc_random_values` to
  (rows, actions, 1) but drops the result, so that its log-sum-exp runs over the three kinds of
  actions instead of all 30 actions. Here the two functions return the intended shape. The gradient
  with the lost reshape is compared too, and differs.
- order: the policy's optimiser steps after `learn`. The gradient with the peer's order is compared
  too, and differs.
- log std: the peer's layer is followed by our learned affine map; sigma_min is -20
- variance bounds of the model: the peer gets one for each member
- actor's learning rate: stepped after each update instead of each 1,000
- the 1e-6 in tanh's log-density: actions are small
- the 1e-6 added to the std of model inputs: inputs have a wide range
- partial minibatches: there are none

Weights: see kit.py.
"""

import functools
import tempfile
from types import SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks.parity import (
    flatten,
    jit,
    kit,
    random_batches,
    scramble,
    tree_map,
    unflatten,
    vector,
)
from benchmarks.parity.kit import ACTION, NETS, OBS, as_batch, keeping, started

PEER = kit.PEER
DIFFERS = {
    "critic gradient, reshape lost": "since the result of a reshape is lost",
    "critic gradient, policy first": "updated with the policy from before its own update",
}
UPDATES, EPOCHS, ROWS = 3, 3, 80
# Large steps, so that a few updates show; num_updates is short, so that the policy's rate falls.
SETTINGS = dict(
    widths=(16, 16), batch_size=16, num_updates=6, gamma=0.9, actor_lr=3e-3, critic_lr=3e-3,
    polyak=0.1, beta=2.0, num_actions=10, real_fraction=0.5, horizon=1, rollout_batch=4,
    retain=1, model_widths=(8, 8), model_decay=(0.01, 0.02, 0.03), model_lr=0.01, num_members=3,
    num_elites=2,
)  # fmt: skip


# --- Inputs ---


def noise(key, size):
    """The noise that our update draws from its key: standard Gaussians and uniform actions."""
    import jax
    import jax.numpy as jnp

    from algorithms import combo

    def gaussian(key, *shape):
        pi = combo.TanhNormal(jnp.zeros((size, ACTION)), jnp.ones((size, ACTION)))
        return pi.distribution.sample(seed=key, sample_shape=shape)

    k_actor, k_critic = jax.random.split(key)
    k_backup, k_propose = jax.random.split(k_critic)
    k_uniform, k_pi, k_next = jax.random.split(k_propose, 3)
    n = SETTINGS["num_actions"]
    return {
        "actor": gaussian(k_actor),
        "backup": gaussian(k_backup, 1)[0],
        "uniform": jax.random.uniform(k_uniform, (n, size, ACTION), minval=-1, maxval=1),
        "pi": gaussian(k_pi, n),
        "next": gaussian(k_next, n),
    }


def keys(of, count):
    """Keys of updates and of epochs."""
    import jax

    return jax.random.split(jax.random.key(of), count)


def inputs():
    import jax
    import jax.numpy as jnp

    from algorithms import combo

    rng, cfg = np.random.default_rng(0), combo.Config(**SETTINGS)
    batches = random_batches(rng, UPDATES, cfg.batch_size)
    data = tree_map(lambda x: x[0], random_batches(rng, 1, ROWS))
    data |= {"obs": 100 * data["obs"], "action": 100 * data["action"]}
    data["next_obs"] += data["obs"]
    batch = as_batch(data)
    state = jax.jit(combo.init, static_argnums=2)(jax.random.key(0), batch, cfg)
    nets = {name: getattr(state, name).params["params"] for name in NETS}
    params = {name: scramble(net, rng, 0.2) for name, net in nets.items()}
    params["target"] = scramble(state.target["params"], rng, 0.2)
    last = params["actor"]["MLP_0"]["Dense_2"]  # of the policy: small actions
    params["actor"]["MLP_0"]["Dense_2"] = tree_map(lambda x: x * np.float32(0.2), last)

    fit = jax.jit(combo.init_fit, static_argnums=2)(jax.random.key(1), batch, cfg)
    orders = [  # each epoch's rows of each member, as fit_epoch draws them
        jax.random.permutation(key, fit.bootstrap, 1, independent=True) for key in keys(2, EPOCHS)
    ]
    model = {
        "params": scramble(fit.model.params["params"], rng, 0.2),
        "holdout": fit.holdout,
        "order": np.stack(orders),
    }
    return flatten(jax.device_get({
        "batch": batches, "params": params, "data": data, "model": model,
        "noise": jax.vmap(functools.partial(noise, size=cfg.batch_size))(keys(3, UPDATES)),
        "rollout": {
            "obs": jnp.float32(rng.normal(size=(6, OBS))),
            "action": jnp.float32(rng.uniform(-1, 1, (6, ACTION))),
            "noise": jax.random.normal(jax.random.key(4), (cfg.num_elites, 3, OBS + 1)),
            "mean": jnp.float32(rng.normal(size=OBS + ACTION)),
            "std": jnp.float32(rng.uniform(0.5, 2, OBS + ACTION)),
            "members": np.array([2, 0]),
        },
    }))  # fmt: skip


# --- Theirs ---


def learner(inputs, reshape=True, late=True):
    """(the peer's policy with our weights, a function that reads its networks in our layout)."""
    import torch
    from offlinerlkit.policy import COMBOPolicy

    given, n = unflatten(inputs, "params"), SETTINGS["num_actions"]

    class Policy(COMBOPolicy):
        def calc_pi_values(self, *args):
            values = super().calc_pi_values(*args)
            return tuple(x.reshape(-1, n, 1) for x in values) if reshape else values

        def calc_random_values(self, *args):
            values = super().calc_random_values(*args)
            return tuple(x.reshape(-1, n, 1) for x in values) if reshape else values

    nets = kit.networks(given, SETTINGS)
    rates = SETTINGS["actor_lr"], SETTINGS["critic_lr"]
    actor_adam = kit.late_adam()(nets.actor.parameters(), rates[0])
    actor_adam.late = late
    policy = Policy(
        None, nets.actor, *nets.critics, actor_adam,
        *(torch.optim.Adam(critic.parameters(), rates[1]) for critic in nets.critics),
        SimpleNamespace(low=[-1.0], high=[1.0]), tau=SETTINGS["polyak"], gamma=SETTINGS["gamma"],
        alpha=(-ACTION, nets.log_alpha, torch.optim.Adam([nets.log_alpha], rates[0])),
        cql_weight=SETTINGS["beta"], with_lagrange=False, num_repeart_actions=n,
    )  # fmt: skip
    nets.copies([policy.critic1_old, policy.critic2_old])
    return policy, nets.read


def handed_out(noise):
    """Patches that make torch draw the noise of one update, in the order of `learn`."""
    import torch

    def by_row(x):  # (N, B, A) -> (B N, A), theirs
        return torch.tensor(np.ascontiguousarray(x.swapaxes(0, 1)).reshape(-1, ACTION))

    flat = [torch.tensor(noise[k]) for k in ("actor", "backup")]
    gaussian = iter(flat + [by_row(noise[k]) for k in ("pi", "next")])
    uniform = lambda x, low, high: x.copy_(by_row(noise["uniform"]))  # noqa: E731
    return mock.patch.multiple(torch.Tensor, uniform_=uniform), mock.patch(
        "torch.distributions.normal._standard_normal", lambda *_, **__: next(gaussian)
    )


def learn(inputs, updates=UPDATES, **how):
    """Losses and gradients of each update, and all parameters in the end."""
    import torch

    policy, read = learner(inputs, **how)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        policy.actor_optim, SETTINGS["num_updates"]
    )
    batches, noises = unflatten(inputs, "batch"), unflatten(inputs, "noise")
    out = {}
    for t in range(updates):
        real = int(SETTINGS["real_fraction"] * SETTINGS["batch_size"])
        halves = kit.halves(tree_map(lambda x, t=t: x[t], batches), real)
        uniform, gaussian = handed_out(tree_map(lambda x, t=t: x[t], noises))
        with uniform, gaussian:
            info = policy.learn(halves)
        policy.actor_optim.step_now()
        schedule.step()
        found = {f"{name} gradient": vector(read(name, grad=True)) for name in NETS}
        found["actor loss"], found["temperature loss"] = info["loss/actor"], info["loss/alpha"]
        found["critic loss"] = info["loss/critic1"] + info["loss/critic2"]
        out = {name: [*out.get(name, []), x] for name, x in found.items()}
    final = {f"{name} after": vector(read(name)) for name in (*NETS, "target")}
    return {name: np.array(x) for name, x in (out | final).items()}


def places(order, before):
    """Positions in each row of `before` of the entries of `order`, a permutation of it."""
    found = np.empty_like(order)
    ranks = np.argsort(order, 1, kind="stable"), np.argsort(before, 1, kind="stable")
    np.put_along_axis(found, *ranks, 1)
    return found


def fit(inputs):
    """The peer's training of the model: losses and last gradient of each epoch, weights kept."""
    from offlinerlkit.utils.scaler import StandardScaler

    model, data = unflatten(inputs, "model"), unflatten(inputs, "data")
    columns = {"observations": "obs", "actions": "action", "next_observations": "next_obs"}
    samples = {there: data[here] for there, here in columns.items()}
    samples["rewards"] = data["reward"][:, None]
    train = np.setdiff1d(np.arange(ROWS), model["holdout"])
    split = [SimpleNamespace(indices=rows) for rows in (train, model["holdout"])]
    orders = np.searchsorted(train, model["order"])  # rows among those that are trained on
    # They order an epoch's rows anew by sorting uniform numbers: ours are the wanted places.
    moves = [places(new, old) for old, new in zip(orders, orders[1:], strict=False)]
    moves = iter([*(np.argsort(x, 1) for x in moves), orders[-1]])  # the last is never used
    dynamics, read = kit.ensemble(model["params"], StandardScaler(), SETTINGS)
    seen = {"model loss": [], "holdout error": []}

    def kept(name, f):
        def run(*args):
            seen[name].append(f(*args))
            weights = read()  # before the best ones come back
            seen["model's bounds after"] = [weights.pop("upper"), weights.pop("lower")]
            seen["model after"] = vector(weights)
            return seen[name][-1]

        return run

    dynamics.learn = kept("model loss", dynamics.learn)
    dynamics.validate = kept("holdout error", dynamics.validate)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("torch.utils.data.random_split", lambda *_: split),
        mock.patch("numpy.random.randint", lambda *_, **__: orders[0]),
        mock.patch("numpy.random.uniform", lambda *_, **__: next(moves)),
    ):
        logger = mock.MagicMock(model_dir=folder)
        dynamics.train(samples, logger, max_epochs=EPOCHS, batch_size=SETTINGS["batch_size"])
    elites = dynamics.model.elites.numpy()
    steps = len(train) // SETTINGS["batch_size"]
    weights = {name: x for name, x in read().items() if name.startswith("Dense")}
    return {name: np.array(x) for name, x in seen.items()} | {
        "model gradient": np.array(dynamics.optim.gradients[steps - 1 :: steps]),
        "elites": vector(tree_map(lambda x: x[elites], weights)),
    }


def rollout(inputs):
    """One step of the peer, in which each given member serves the next rows."""
    from offlinerlkit.utils.scaler import StandardScaler

    given, params = unflatten(inputs, "rollout"), unflatten(inputs, "model/params")
    dynamics, _ = kit.ensemble(params, StandardScaler(given["mean"], given["std"]), SETTINGS)
    members = np.repeat(given["members"], given["noise"].shape[1])
    drawn = np.zeros((SETTINGS["num_members"], len(given["obs"]), OBS + 1), np.float32)
    drawn[members, np.arange(len(members))] = given["noise"].reshape(-1, OBS + 1)
    with (
        mock.patch("numpy.random.normal", lambda **_: drawn),
        mock.patch("numpy.random.choice", lambda *_, **__: members),
    ):
        obs, reward, _, _ = dynamics.step(given["obs"], given["action"])
    return {"rollout step": np.concatenate([obs - given["obs"], reward], -1)}


def theirs(inputs, checkout):
    kit.load(checkout)
    out = learn(inputs) | fit(inputs) | rollout(inputs)
    variants = {"reshape lost": dict(reshape=False), "policy first": dict(late=False)}
    for name, how in variants.items():
        gradient = learn(inputs, updates=1, **how)["critic gradient"]
        out[f"critic gradient, {name}"] = gradient[0]
    return out


# --- Ours ---


@functools.cache
def programs():
    """Structures of a State and a Fit, and what `ours` runs, compiled once."""
    import jax

    from algorithms import combo

    cfg, key = combo.Config(**SETTINGS), jax.random.key(0)
    batch = as_batch(tree_map(lambda x: x[0], random_batches(np.random.default_rng(0), 1, ROWS)))
    state = jax.eval_shape(functools.partial(combo.init, cfg=cfg), key, batch)
    state = state.replace(**{name: keeping(getattr(state, name)) for name in NETS})
    fit = jax.eval_shape(functools.partial(combo.init_fit, cfg=cfg), key, batch)
    functions = combo.update, combo.init_fit, combo.fit_epoch, combo.model_step
    run = {f.__name__: jit(functools.partial(f, cfg=cfg)) for f in functions}
    return state, keeping(fit.model), SimpleNamespace(**run)


def our_updates(inputs):
    import jax
    import jax.numpy as jnp

    from algorithms import combo

    state, _, run = programs()
    params = unflatten(inputs, "params")
    state = state.replace(
        **{name: started(getattr(state, name), params[name]) for name in NETS},
        target={"params": jax.tree.map(jnp.asarray, params["target"])},
        **dict.fromkeys(("obs_mean", "obs_std", "dynamics", "buffer")),  # an update needs none
    )
    out, batches = {}, unflatten(inputs, "batch")
    for t, key in enumerate(keys(3, UPDATES)):
        old = state
        batch = as_batch(tree_map(lambda x, t=t: x[t], batches))
        state, info = run.update(old, batch, key)
        loss, _ = combo.temperature_loss(old.temperature.params, old, info["entropy"], -ACTION)
        found = {"temperature loss": loss} | {k: info[k.replace(" ", "_")] for k in (
            "actor loss", "critic loss")}  # fmt: skip
        for name in NETS:
            kept, _ = jax.device_get(getattr(state, name).opt_state)
            found[f"{name} gradient"] = vector(kept["params"])
        out = {name: [*out.get(name, []), x] for name, x in found.items()}
    out = {name: np.array(x) for name, x in out.items()}
    final = {name: getattr(state, name).params for name in NETS} | {"target": state.target}
    for name, x in jax.device_get(final).items():
        out[f"{name} after"] = vector(x["params"])
    return out | dict.fromkeys(DIFFERS, out["critic gradient"][0])


def our_fit(inputs):
    import jax

    from algorithms import combo

    _, model, run = programs()
    data = as_batch(unflatten(inputs, "data"))
    fit = run.init_fit(jax.random.key(1), data)
    fit = fit.replace(model=started(model, unflatten(inputs, "model/params")))
    seen = {"model loss": [], "holdout error": [], "model gradient": []}
    for key in keys(2, EPOCHS):
        fit, info = run.fit_epoch(fit, data, key)
        kept, _ = jax.device_get(fit.model.opt_state)
        seen["model loss"].append(info["train_loss"])
        seen["holdout error"].append(info["holdout_error"])
        seen["model gradient"].append(vector(kept["params"]))
    last = jax.device_get(fit.model.params["params"])
    best = jax.device_get(combo.elites(fit, SETTINGS["num_elites"]).params["params"])
    return {name: np.array(x) for name, x in seen.items()} | {
        "model's bounds after": np.array([last.pop("upper"), last.pop("lower")]),
        "model after": vector(last),
        "elites": vector({name: x for name, x in best.items() if name.startswith("Dense")}),
    }


def our_rollout(inputs):
    import jax

    from algorithms import combo

    _, _, run = programs()
    given, params = unflatten(inputs, "rollout"), unflatten(inputs, "model/params")
    params = {"params": tree_map(lambda x: x[given["members"]], params)}
    dynamics = combo.Dynamics(params, given["mean"], given["std"])
    obs, reward = run.model_step(dynamics, given["obs"], given["action"], jax.random.key(4))
    return {"rollout step": np.concatenate([obs - given["obs"], reward[:, None]], -1)}


def ours(inputs):
    return our_updates(inputs) | our_fit(inputs) | our_rollout(inputs)
