"""Cal-QL compared with its authors' code, with a fixed weight of the penalty and with Lagrange's.

The peer: `ConservativeSAC` of JaxCQL/conservative_sac.py with the networks of JaxCQL/model.py.
`ConservativeSAC.train` makes whole updates. Losses are the metrics that it returns; gradients are
read by an optimiser that keeps them.

- It runs without jit. jax.random.normal and jax.random.uniform return the noise that our update
  draws from fixed keys, in the order of its calls.
- jnp.clip takes a_min and a_max, as earlier versions did.

Differences removed for the comparison:
- initialisation: both start from our weights
- clipping of the data's actions: outside of an update

Weights: its qf1 and qf2 are our members 0 and 1 on axis 0. Its Scalars are our log_std_scale,
log_std_shift, and the logarithms of temperature and multiplier. With Lagrange its critic loss
contains - weight * gap, which has no gradient there; it is subtracted.
"""

import itertools

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten
from benchmarks.parity.cql import draw, keys
from benchmarks.parity.iql import turned

PEER = dict(
    name="authors (Cal-QL)",
    repository="https://github.com/nakamotoo/Cal-QL",
    commit="ac6eafec22e8d60836573e1f488c7f626ce8a77e",
    environment="jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9 ml_collections numpy",
)
# Large steps, so that three updates show; the authors' 10 actions, weight 5 and best next action.
SETTINGS = dict(
    widths=(16, 16), critic_widths=(16, 16, 16), gamma=0.9, actor_lr=3e-3, critic_lr=5e-3,
    polyak=0.1,
)  # fmt: skip
VARIANTS = {"fixed": dict(), "Lagrange": dict(lagrange=0.8)}
NETS = ("actor", "critic", "temperature", "multiplier")
THEIRS = dict(actor="policy", temperature="log_alpha", multiplier="log_alpha_prime")


def inputs():
    import jax

    rng = np.random.default_rng(0)
    batches = random_batches(rng, rows=16)
    cfg, state = start("cal_ql", batches, **SETTINGS)
    params = {name: scramble(getattr(state, name).params["params"], rng) for name in NETS}
    params["target"] = scramble(state.target["params"], rng)
    noise = jax.vmap(lambda key: draw(key, cfg.num_actions, batches["action"].shape[1:]))(keys())
    batches["to_go"] = rng.normal(size=batches["reward"].shape).astype(np.float32)
    return flatten({"batch": batches, "params": params, "noise": noise})


def ours(inputs):
    batches, params = unflatten(inputs, "batch"), unflatten(inputs, "params")
    run = jit(outputs, static_argnums=0)
    return {k: v for name in VARIANTS for k, v in run(name, batches, params).items()}


def outputs(variant, batches, params):
    import jax

    from algorithms import cal_ql

    rows = {name: x for name, x in batches.items() if name != "to_go"}
    cfg, state = start("cal_ql", rows, **SETTINGS, **VARIANTS[variant])
    nets = {name: getattr(state, name).replace(params={"params": params[name]}) for name in NETS}
    state = state.replace(target={"params": params["target"]}, **nets)
    batches = cal_ql.Labelled(**batches)

    def gradient(loss, name, *args):
        return jax.value_and_grad(loss, has_aux=True)(getattr(state, name).params, state, *args)

    batch, key = jax.tree.map(lambda x: x[0], (batches, keys()))
    k_actor, k_critic = jax.random.split(key)
    (loss, info), slope = gradient(cal_ql.critic_loss, "critic", batch, k_critic, cfg)
    out = {"critic loss": loss, "critic gradient": slope, "TD loss": info["td_loss"]}
    out |= {"gap": info["gap"], "share below": info["below"]}
    if variant == "Lagrange":
        (loss, _), slope = gradient(cal_ql.multiplier_loss, "multiplier", info["gap"], cfg)
        out |= {"multiplier loss": loss, "multiplier gradient": slope}
    else:  # the same in both
        (loss, info), slope = gradient(cal_ql.actor_loss, "actor", batch, k_actor)
        out |= {"actor loss": loss, "actor gradient": slope}
        args = info["entropy"], -batch.action.shape[-1]
        (loss, _), slope = gradient(cal_ql.temperature_loss, "temperature", *args)
        out |= {"temperature loss": loss, "temperature gradient": slope}

    def one(state, row):
        return cal_ql.update(state, *row, cfg)

    state, infos = jax.lax.scan(one, state, (batches, keys()))
    for name in ("actor", "critic"):
        out[f"{name} loss of 3 updates"] = infos[f"{name}_loss"]
    for name in NETS[: 4 if variant == "Lagrange" else 3]:
        out[f"{name} after 3 updates"] = getattr(state, name).params
    out["target after 3 updates"] = state.target
    return {f"{variant}: {k}": v for k, v in out.items()}


def theirs(inputs, checkout):
    import sys

    import jax
    import jax.numpy as jnp

    sys.path.insert(0, checkout)
    clip = jnp.clip
    jnp.clip = lambda x, *a, a_min=None, a_max=None: clip(x, *(a or (a_min, a_max)))
    batches, params, noise = (unflatten(inputs, part) for part in ("batch", "params", "noise"))
    out = {}
    with jax.disable_jit():
        for variant in VARIANTS:
            found = train(variant, batches, params, noise)
            out |= {f"{variant}: {quantity}": x for quantity, x in found.items()}
    return out


def train(variant, batches, params, noise):
    """Three of the authors' updates, and one whose optimisers keep the gradients."""
    import optax

    names = [name for name in NETS if name != "multiplier" or variant == "Lagrange"]
    keep = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, g))  # its state is g
    sac, kept = (build(variant, params, batches) for _ in range(2))
    for name, learner in kept._train_states.items():
        kept._train_states[name] = learner.replace(tx=keep, opt_state=learner.params)
    info = step(kept, batches, noise, 0)
    gradients = {name: read(kept, name, lambda learner: learner.opt_state) for name in names}
    infos = [step(sac, batches, noise, i) for i in range(3)]

    def critic_loss(info):
        loss = info["qf1_loss"] + info["qf2_loss"]
        if variant == "Lagrange":
            loss += 2 * 5.0 * info["cql/alpha_prime"] * sac.config.cql_target_action_gap
        return loss

    if variant == "Lagrange":
        del gradients["actor"], gradients["temperature"]
    out = {f"{name} gradient": tree for name, tree in gradients.items()}
    out |= {f"{name} after 3 updates": read(sac, name) for name in names}
    target = [sac._target_qf_params[q]["params"] for q in ("qf1", "qf2")]
    out["target after 3 updates"] = {"params": join(target)}
    out["actor loss of 3 updates"] = np.array([info["policy_loss"] for info in infos])
    out["critic loss of 3 updates"] = np.array([critic_loss(info) for info in infos])
    out["critic loss"] = critic_loss(info)
    out["TD loss"] = info["cql/qf1_bellman_loss"] + info["cql/qf2_bellman_loss"]
    out["gap"] = (info["cql/cql_qf1_diff"] + info["cql/cql_qf2_diff"]) / 2
    rates = [info[x] for x in info if x.startswith("cql/bound_rate")]
    out["share below"] = np.mean(rates)
    if variant == "Lagrange":
        out["multiplier loss"] = info["cql/alpha_prime_loss"]
    else:
        out["actor loss"], out["temperature loss"] = info["policy_loss"], info["alpha_loss"]
    return out


def build(variant, params, batches):
    """The authors' learner with our weights."""
    from JaxCQL import jax_utils, model
    from JaxCQL.conservative_sac import ConservativeSAC

    jax_utils.init_rng(0)
    sizes = batches["obs"].shape[-1], batches["action"].shape[-1]
    arch, critic_arch = ("-".join(map(str, SETTINGS[x])) for x in ("widths", "critic_widths"))
    settings = dict(
        discount=SETTINGS["gamma"],
        policy_lr=SETTINGS["actor_lr"],
        qf_lr=SETTINGS["critic_lr"],
        soft_target_update_rate=SETTINGS["polyak"],
        target_entropy=-float(sizes[1]),
        cql_lagrange=variant == "Lagrange",
        cql_target_action_gap=0.8,
    )
    policy = model.TanhGaussianPolicy(*sizes, arch)
    sac = ConservativeSAC(settings, policy, model.FullyConnectedQFunction(*sizes, critic_arch))
    for i, name in enumerate(("qf1", "qf2")):
        load(sac, name, critic(params["critic"], i))
        sac._target_qf_params[name] = critic(params["target"], i)
    for name, key in THEIRS.items():
        if key in sac._train_states:
            load(sac, key, scalars(params[name]) if name == "actor" else number(params[name]))
    return sac


def load(sac, name, params):
    """Sets a network's parameters, which must have the structure of its own."""
    learner = sac._train_states[name]
    mine, own = (flatten(x) for x in (params, learner.params))
    assert {k: np.shape(x) for k, x in mine.items()} == {k: np.shape(x) for k, x in own.items()}
    sac._train_states[name] = learner.replace(params=params, opt_state=learner.tx.init(params))


def number(params):
    return {"params": {"value": np.float32(params["log"])}}


def scalars(params):
    """Our policy's parameters in the authors' tree."""
    own = {"base_network": turned(params["MLP_0"])}
    own |= {"log_std_multiplier_module": {"value": np.float32(params["log_std_scale"])}}
    return {
        "params": own | {"log_std_offset_module": {"value": np.float32(params["log_std_shift"])}}
    }


def critic(params, i):
    member = tree_map(lambda x: x[i], params["MLP_0"])
    return {"params": {"FullyConnectedNetwork_0": turned(member)}}


def join(members):
    """Our critics' parameters from those of qf1 and qf2."""
    nets = [turned(x["FullyConnectedNetwork_0"]) for x in members]
    return {"MLP_0": tree_map(lambda *x: np.stack(x), *nets)}


def read(sac, name, part=lambda learner: learner.params):
    """One of our trees, from the authors' parameters or gradients."""
    if name == "critic":
        return {"params": join([part(sac._train_states[q])["params"] for q in ("qf1", "qf2")])}
    own = part(sac._train_states[THEIRS[name]])["params"]
    if name != "actor":
        return {"params": {"log": np.asarray(own["value"])}}
    scale, shift = (own[f"log_std_{x}_module"]["value"] for x in ("multiplier", "offset"))
    net = turned(own["base_network"])
    return {"params": {"MLP_0": net, "log_std_scale": scale, "log_std_shift": shift}}


def step(sac, batches, noise, i):
    """One of the authors' updates, on batch i with our noise; its metrics."""
    from unittest import mock

    given = {name: x[i] for name, x in noise.items()}
    order = [given["policy"], *(given[x].swapaxes(0, 1) for x in ("max backup", "pi", "next pi"))]
    normal = itertools.cycle(order)  # the loss is evaluated once for each network

    def standard_normal(key, shape=(), dtype=np.float32):
        x = next(normal)
        assert np.prod(shape) == x.size and tuple(shape)[-x.ndim :] == x.shape
        return x.reshape(shape)

    def uniform(key, shape=(), dtype=np.float32, minval=0.0, maxval=1.0):
        x = given["uniform"].swapaxes(0, 1)
        assert (minval, maxval) == (-1, 1) and shape == x.shape
        return x

    names = ("obs", "action", "reward", "next_obs", "done", "to_go")
    longer = ("observations", "actions", "rewards", "next_observations", "dones", "mc_returns")
    batch = {b: batches[a][i] for a, b in zip(names, longer, strict=True)}
    with (
        mock.patch("jax.random.normal", standard_normal),
        mock.patch("jax.random.uniform", uniform),
    ):
        return sac.train(batch, cql_min_q_weight=5.0, enable_calql=True)
