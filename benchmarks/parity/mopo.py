"""MOPO compared with the trusted port, OfflineRL-Kit; the authors' code needs TensorFlow 1.

The peer: `MOPOPolicy.learn` makes whole updates; its optimisers keep the gradients they receive.
`EnsembleDynamics.step` is a step of a rollout; its three kinds of penalty are ours of the same
numbers. The fit of the model is in combo.py.

- Stubs replace gym, pandas, matplotlib, tensorboard and the logger.
- torch and NumPy return our noise and our rows.

Differences removed for the comparison:
- order: the critics' optimisers step, and the targets follow, after `learn`. The policy's gradient
  with the peer's order is compared too, and differs.
- temperature: below the peer's bound of 1
- log std: the peer's layer is followed by our learned affine map; sigma_min is -20
- actor's learning rate: stepped after each update instead of each 1,000
- the 1e-6 in tanh's log-density: actions are small

Weights: see kit.py.
"""

import functools
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
DIFFERS = {"actor gradient, critics first": "policy, temperature and critics learn from each other"}
UPDATES, ROWS = 3, 6
KINDS = {"std": "aleatoric", "disagreement": "pairwise-diff", "spread": "ensemble_std"}
# Large steps, so that a few updates show; num_updates is short, so that the policy's rate falls.
SETTINGS = dict(
    widths=(16, 16), batch_size=16, num_updates=6, gamma=0.9, actor_lr=3e-3, critic_lr=3e-3,
    polyak=0.1, penalty_scale=2.0, real_fraction=0.25, horizon=1, rollout_batch=ROWS, retain=1,
    model_widths=(8, 8), model_decay=(0.01, 0.02, 0.03), num_members=3, num_elites=2,
)  # fmt: skip


# --- Inputs ---


def keys():
    """Keys of the updates."""
    import jax

    return jax.random.split(jax.random.key(3), UPDATES)


def noise(key, size):
    """The Gaussian noise that our update draws from its key."""
    import jax
    import jax.numpy as jnp

    from algorithms import mopo

    pi = mopo.TanhNormal(jnp.zeros((size, ACTION)), jnp.ones((size, ACTION))).distribution
    return {k: pi.sample(seed=x) for k, x in zip(("actor", "backup"), jax.random.split(key))}  # noqa: B905


def networks(module, cfg, rng):
    """(scrambled parameters of the learners and the target, of the model); actions are small and
    the temperature is below 1."""
    import jax

    rows = as_batch(tree_map(lambda x: x[0], random_batches(rng, 1)))
    state = jax.jit(module.init, static_argnums=2)(jax.random.key(0), rows, cfg)
    nets = {name: getattr(state, name).params["params"] for name in NETS}
    params = {name: scramble(net, rng, 0.2) for name, net in nets.items()}
    params["target"] = scramble(state.target["params"], rng, 0.2)
    last = params["actor"]["MLP_0"]["Dense_2"]
    params["actor"]["MLP_0"]["Dense_2"] = tree_map(lambda x: x * np.float32(0.2), last)
    params["actor"]["log_std_shift"] = np.float32(-2.5)
    params["temperature"]["log"] = np.float32(-0.3)
    fit = module.init_fit(jax.random.key(1), rows, cfg)
    return params, scramble(fit.model.params["params"], rng, 0.2)


def inputs():
    import jax

    from algorithms import mopo

    rng, cfg = np.random.default_rng(1), mopo.Config(**SETTINGS)
    params, model = networks(mopo, cfg, rng)
    return flatten(jax.device_get({
        "batch": random_batches(rng, UPDATES, cfg.batch_size), "params": params, "model": model,
        "noise": jax.vmap(functools.partial(noise, size=cfg.batch_size))(keys()),
        "rollout": {
            "obs": np.float32(rng.normal(size=(ROWS, OBS))),
            "action": np.float32(rng.uniform(-1, 1, (ROWS, ACTION))),
            "noise": jax.random.normal(jax.random.key(4), (2, ROWS // 2, OBS + 1)),
            "mean": np.float32(rng.normal(size=OBS + ACTION)),
            "std": np.float32(rng.uniform(0.5, 2, OBS + ACTION)),
        },
    }))  # fmt: skip


# --- Theirs ---


def learn(inputs, updates=UPDATES, late=True):
    """Losses and gradients of each update, and all parameters in the end."""
    import torch
    from offlinerlkit.policy import MOPOPolicy

    nets, adam = kit.networks(unflatten(inputs, "params"), SETTINGS), kit.late_adam()
    adam.late = late
    rates = SETTINGS["actor_lr"], SETTINGS["critic_lr"]
    optimisers = [adam(critic.parameters(), rates[1]) for critic in nets.critics]
    policy = MOPOPolicy(
        None, nets.actor, *nets.critics, torch.optim.Adam(nets.actor.parameters(), rates[0]),
        *optimisers, tau=SETTINGS["polyak"], gamma=SETTINGS["gamma"],
        alpha=(-ACTION, nets.log_alpha, torch.optim.Adam([nets.log_alpha], rates[0])),
    )  # fmt: skip
    nets.copies([policy.critic1_old, policy.critic2_old])
    sync, policy._sync_weight = policy._sync_weight, lambda: None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        policy.actor_optim, SETTINGS["num_updates"]
    )
    batches, noises, out = unflatten(inputs, "batch"), unflatten(inputs, "noise"), {}
    for t in range(updates):
        batch = kit.halves(tree_map(lambda x, t=t: x[t], batches), 4)
        gaussian = iter(torch.tensor(noises[k][t]) for k in ("backup", "actor"))
        draw = lambda *_, gaussian=gaussian, **__: next(gaussian)  # noqa: E731
        with mock.patch("torch.distributions.normal._standard_normal", draw):
            info = policy.learn(batch)
        for optimiser in optimisers:
            optimiser.step_now()  # gives the gradients back, to which the policy's have added
        sync()
        schedule.step()
        found = {f"{name} gradient": vector(nets.read(name, grad=True)) for name in NETS}
        found["actor loss"], found["temperature loss"] = info["loss/actor"], info["loss/alpha"]
        found["critic loss"] = info["loss/critic1"] + info["loss/critic2"]
        out = {name: [*out.get(name, []), x] for name, x in found.items()}
    final = {f"{name} after": vector(nets.read(name)) for name in (*NETS, "target")}
    return {name: np.array(x) for name, x in (out | final).items()}


def rollout(inputs):
    """Each kind of penalty, of all members, and a step of which the first two are the elites."""
    from offlinerlkit.utils.scaler import StandardScaler

    given, model = unflatten(inputs, "rollout"), unflatten(inputs, "model")
    scaler, out = StandardScaler(given["mean"], given["std"]), {}
    members = np.repeat([0, 1], ROWS // 2)
    drawn = np.zeros((SETTINGS["num_members"], ROWS, OBS + 1), np.float32)
    drawn[members, np.arange(ROWS)] = given["noise"].reshape(-1, OBS + 1)
    for kind, name in KINDS.items():
        how = dict(penalty_coef=SETTINGS["penalty_scale"], uncertainty_mode=name)
        dynamics, _ = kit.ensemble(model, scaler, SETTINGS, **how)
        with (
            mock.patch("numpy.random.normal", lambda **_: drawn),
            mock.patch("numpy.random.choice", lambda *_, **__: members),
        ):
            _, reward, _, info = dynamics.step(given["obs"], given["action"])
        out |= {f"u, {kind}": info["penalty"][:, 0], f"reward, {kind}": reward[:, 0]}
    return out


def theirs(inputs, checkout):
    kit.load(checkout)
    first = learn(inputs, updates=1, late=False)["actor gradient"][0]
    return learn(inputs) | rollout(inputs) | {"actor gradient, critics first": first}


# --- Ours ---


@functools.cache
def programs():
    """The structure of a State, and the update, compiled once."""
    import jax

    from algorithms import mopo

    cfg = mopo.Config(**SETTINGS)
    rows = as_batch(tree_map(lambda x: x[0], random_batches(np.random.default_rng(0), 1)))
    state = jax.eval_shape(functools.partial(mopo.init, cfg=cfg), jax.random.key(0), rows)
    state = state.replace(**{name: keeping(getattr(state, name)) for name in NETS})
    return state, jit(functools.partial(mopo.update, cfg=cfg))


def our_updates(module, state, update, inputs):
    """What `learn` gives, of a module's updates from that State."""
    import jax
    import jax.numpy as jnp

    params = unflatten(inputs, "params")
    state = state.replace(
        **{name: started(getattr(state, name), params[name]) for name in NETS},
        target={"params": jax.tree.map(jnp.asarray, params["target"])},
        buffer=None,  # an update needs none
    )
    out, batches = {}, unflatten(inputs, "batch")
    for t, key in enumerate(keys()):
        old = state
        state, info = update(old, as_batch(tree_map(lambda x, t=t: x[t], batches)), key)
        loss, _ = module.temperature_loss(old.temperature.params, old, info["entropy"], -ACTION)
        found = {"temperature loss": loss}
        found |= {k: info[k.replace(" ", "_")] for k in ("actor loss", "critic loss")}
        if "inconsistency" in info:
            found["U"] = info["inconsistency"]
        for name in NETS:
            kept, _ = jax.device_get(getattr(state, name).opt_state)
            found[f"{name} gradient"] = vector(kept["params"])
        out = {name: [*out.get(name, []), x] for name, x in found.items()}
    out = {name: np.array(x) for name, x in out.items()}
    final = {name: getattr(state, name).params for name in NETS} | {"target": state.target}
    for name, x in jax.device_get(final).items():
        out[f"{name} after"] = vector(x["params"])
    return out


def ours(inputs):
    import jax

    from algorithms import mopo

    state, update = programs()
    nothing = dict.fromkeys(("obs_mean", "obs_std", "dynamics"))
    out = our_updates(mopo, state.replace(**nothing), update, inputs)
    given, params = unflatten(inputs, "rollout"), {"params": unflatten(inputs, "model")}
    dynamics = mopo.Dynamics(params, given["mean"], given["std"])
    for kind in KINDS:
        cfg = mopo.Config(**SETTINGS, uncertainty=kind)
        u = mopo.uncertainty(dynamics, given["obs"], given["action"], cfg)
        _, reward = mopo.model_step(dynamics, given["obs"], given["action"], jax.random.key(4), cfg)
        out |= {f"u, {kind}": u, f"reward, {kind}": reward - cfg.penalty_scale * u}
    return out | {"actor gradient, critics first": out["actor gradient"][0]}
