"""MOBILE compared with its authors' code, OfflineRL-Kit.

The peer: `MOBILEPolicy.learn` makes whole updates; its optimisers keep the gradients they receive.
`compute_lcb`, which it calls, is U(s, a) from `EnsembleDynamics.sample_next_obss`; its values at
the model's rows are compared, too. The fit of the model is in combo.py.

- Stubs replace gym, pandas, matplotlib, tensorboard and the logger.
- torch returns our noise; where the peer computes U of the data's rows, which it sets to 0 later,
  the noise is 0.

Differences removed for the comparison:
- log std: the peer's layer is followed by our learned affine map; sigma_min is -20
- actor's learning rate: stepped after each update instead of each 1,000
- the 1e-6 in tanh's log-density: actions are small

The temperature starts above its bound of 1, which counts from the first update on, as after any
update of the peer's. Weights: see kit.py.
"""

import functools
from unittest import mock

import numpy as np

from benchmarks.parity import flatten, jit, kit, random_batches, tree_map, unflatten, vector
from benchmarks.parity.kit import ACTION, NETS, OBS, as_batch, keeping
from benchmarks.parity.mopo import keys, networks, our_updates

PEER = kit.PEER
UPDATES, REAL, SAMPLES = 3, 4, 5
MEMBERS = [2, 0]  # the elites
# Large steps, so that a few updates show; num_updates is short, so that the policy's rate falls.
SETTINGS = dict(
    widths=(16, 16), batch_size=16, num_updates=6, gamma=0.9, actor_lr=3e-3, critic_lr=3e-3,
    polyak=0.1, beta=2.0, clamp=True, temperature=0.0, num_samples=SAMPLES, real_fraction=0.25,
    horizon=1, rollout_batch=4, retain=1, model_widths=(8, 8), model_decay=(0.01, 0.02, 0.03),
    num_members=3, num_elites=2,
)  # fmt: skip


# --- Inputs ---


def noise(key, size):
    """The Gaussian noise that our update draws from its key."""
    import jax
    import jax.numpy as jnp

    from algorithms import mobile

    def gaussian(key, rows):
        pi = mobile.TanhNormal(jnp.zeros((rows, ACTION)), jnp.ones((rows, ACTION)))
        return pi.distribution.sample(seed=key)

    k_actor, k_critic = jax.random.split(key)
    k_next, k_penalty = jax.random.split(k_critic)
    k_model, k_action = jax.random.split(k_penalty)
    shape = len(MEMBERS), SAMPLES, size - REAL  # elites, samples, rows
    step = jax.random.normal(k_model, (shape[0], shape[1] * shape[2], OBS + 1))
    return {
        "actor": gaussian(k_actor, size),
        "next": gaussian(k_next, size),
        "model": step.reshape(*shape, OBS + 1),
        "model action": gaussian(k_action, np.prod(shape)).reshape(*shape, ACTION),
    }


def inputs():
    import jax

    from algorithms import mobile

    rng, cfg = np.random.default_rng(1), mobile.Config(**SETTINGS)
    params, model = networks(mobile, cfg, rng)
    params["temperature"]["log"] = np.float32(0.05)
    return flatten(jax.device_get({
        "batch": random_batches(rng, UPDATES, cfg.batch_size), "params": params, "model": model,
        "noise": jax.vmap(functools.partial(noise, size=cfg.batch_size))(keys()),
        "mean": np.float32(rng.normal(size=OBS + ACTION)),
        "std": np.float32(rng.uniform(0.5, 2, OBS + ACTION)),
    }))  # fmt: skip


# --- Theirs ---


def handed_out(noise):
    """Patches that make torch draw the noise of one update, in the order of `learn`."""
    import torch

    def all_rows(x):  # (E, S, rows, K) -> (S, E, B, K); no noise at the data's rows
        x = np.pad(x.swapaxes(0, 1), ((0, 0), (0, 0), (REAL, 0), (0, 0)))
        return torch.tensor(np.ascontiguousarray(x))

    steps = iter(all_rows(noise["model"]))
    actions = all_rows(noise["model action"]).reshape(-1, ACTION)
    gaussian = iter([actions, *(torch.tensor(noise[k]) for k in ("next", "actor"))])
    return mock.patch("torch.randn_like", lambda _: next(steps)), mock.patch(
        "torch.distributions.normal._standard_normal", lambda *_, **__: next(gaussian)
    )


def theirs(inputs, checkout):
    kit.load(checkout)
    import torch
    from offlinerlkit.policy import MOBILEPolicy
    from offlinerlkit.utils.scaler import StandardScaler

    nets = kit.networks(unflatten(inputs, "params"), SETTINGS)
    scaler = StandardScaler(inputs["mean"], inputs["std"])
    dynamics, _ = kit.ensemble(unflatten(inputs, "model"), scaler, SETTINGS)
    dynamics.model.set_elites(MEMBERS)
    critics, rates = (
        torch.nn.ModuleList(nets.critics),
        (SETTINGS["actor_lr"], SETTINGS["critic_lr"]),
    )
    adam = kit.late_adam()
    adam.late = False
    critics_adam = adam(critics.parameters(), rates[1])
    policy = MOBILEPolicy(
        dynamics, nets.actor, critics, torch.optim.Adam(nets.actor.parameters(), rates[0]),
        critics_adam, tau=SETTINGS["polyak"], gamma=SETTINGS["gamma"],
        alpha=(-ACTION, nets.log_alpha, torch.optim.Adam([nets.log_alpha], rates[0])),
        penalty_coef=SETTINGS["beta"], num_samples=SAMPLES, deterministic_backup=True,
    )  # fmt: skip
    policy._alpha = policy._alpha.clamp(0, 1)
    nets.copies(policy.critics_old)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        policy.actor_optim, SETTINGS["num_updates"]
    )
    compute, seen = policy.compute_lcb, []

    def compute_lcb(*rows):
        seen.append(compute(*rows))
        return seen[-1].clone()

    policy.compute_lcb = compute_lcb
    batches, noises, out = unflatten(inputs, "batch"), unflatten(inputs, "noise"), {}
    for t in range(UPDATES):
        batch = kit.halves(tree_map(lambda x, t=t: x[t], batches), REAL)
        steps, gaussian = handed_out(tree_map(lambda x, t=t: x[t], noises))
        with steps, gaussian:
            info = policy.learn(batch)
        critics_adam.step_now()  # gives the gradients back, to which the policy's have added
        schedule.step()
        found = {f"{name} gradient": vector(nets.read(name, grad=True)) for name in NETS}
        found |= {f"{k} loss": info[f"loss/{k}"] for k in ("actor", "critic")}
        found |= {"temperature loss": info["loss/alpha"], "U": seen[-1][REAL:].mean().item()}
        out = {name: [*out.get(name, []), x] for name, x in found.items()}
    final = {f"{name} after": vector(nets.read(name)) for name in (*NETS, "target")}
    return {name: np.array(x) for name, x in (out | final).items()} | {
        "U of each row": seen[0][REAL:, 0].numpy()
    }


# --- Ours ---


@functools.cache
def programs():
    """The structure of a State, the update and U, compiled once."""
    import jax

    from algorithms import mobile

    cfg = mobile.Config(**SETTINGS)
    rows = as_batch(tree_map(lambda x: x[0], random_batches(np.random.default_rng(0), 1)))
    state = jax.eval_shape(functools.partial(mobile.init, cfg=cfg), jax.random.key(0), rows)
    state = state.replace(**{name: keeping(getattr(state, name)) for name in NETS})
    functions = mobile.update, mobile.inconsistency
    return state, *(jit(functools.partial(f, cfg=cfg)) for f in functions)


def ours(inputs):
    import jax
    import jax.numpy as jnp

    from algorithms import mobile

    state, update, inconsistency = programs()
    model = tree_map(lambda x: jnp.asarray(x[np.array(MEMBERS)]), unflatten(inputs, "model"))
    dynamics = mobile.Dynamics({"params": model}, inputs["mean"], inputs["std"])
    still = dict(obs_mean=jnp.zeros(OBS), obs_std=jnp.ones(OBS))
    state = state.replace(dynamics=dynamics, **still)
    out = our_updates(mobile, state, update, inputs)

    params, none = unflatten(inputs, "params"), dict(opt_state=None, step=None)
    state = state.replace(
        actor=state.actor.replace(params={"params": params["actor"]}, **none),
        critic=state.critic.replace(params=None, **none),
        target={"params": params["target"]},
        **dict.fromkeys(("temperature", "buffer")),
    )
    first = as_batch(tree_map(lambda x: x[0, REAL:], unflatten(inputs, "batch")))
    _, k_penalty = jax.random.split(jax.random.split(keys()[0])[1])
    return out | {"U of each row": inconsistency(state, first, k_penalty)}
