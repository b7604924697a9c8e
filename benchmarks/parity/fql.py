"""FQL compared with its authors' code, and Q-chunking with its own; both use JAX.

The peers: `FQLAgent` of agents/fql.py with the normalised Q loss, and `ACFQLAgent` of
agents/acfql.py of https://github.com/ColinQiyangLi/qc at commit
48283b4f662bd1c127ec9fa80647b49759f10653, which must lie beside the first as `qc`, with chunks of
three actions and the smaller of two target critics. Updates are those of `update`, with the
networks of utils/networks.py. Losses are among its metrics; gradients are read where they reach
`apply_gradients`. `Dataset.sample_sequence` makes the chunks of the data.

- A stub replaces ml_collections. Jit is off, so that each update draws anew.
- `jax.random.normal` and `uniform` return the noise that our update draws from fixed keys, and
  `sample_sequence` is given all rows.

Differences removed for the comparison:
- initialisation: both start from our weights
- number and width of hidden layers: equal
- rows: chunks that an episode cuts short have no reward and no next observation here, and the next
  episode's there, which no loss uses

Weights: their kernels are ours transposed.
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, start, tree_map, unflatten

PEER = dict(
    name="authors (fql, qc)",
    repository="https://github.com/seohongpark/fql",
    commit="719d04417cb0b206deddbc7d761b3e710c3d750c",
    environment="jax flax optax distrax numpy",
)
# Large steps, so that three updates show.
SETTINGS = dict(
    widths=(12, 12), gamma=0.9, lr=3e-3, polyak=0.1, alpha=0.7, flow_steps=10, shift_reward=0.0
)
KINDS = {
    "fql": dict(chunk=1, normalize_q=True, smaller_q=False),
    "qc": dict(chunk=3, normalize_q=False, smaller_q=True),
}
NETS = {  # ours: theirs, and the part of it that holds the layers
    "actor": ("modules_actor_onestep_flow", "mlp"),
    "flow": ("modules_actor_bc_flow", "mlp"),
    "critic": ("modules_critic", "value_net"),
    "target": ("modules_target_critic", "value_net"),
}
UPDATES, ROWS, ACTION = 3, 32, 2


# --- Inputs ---


def begin(kind, batches):
    """Our config and a fresh state."""
    plain = {name: x for name, x in batches.items() if name != "valid"}
    return start("fql", plain, **SETTINGS, **KINDS[kind])


def keys():
    """The keys of the updates."""
    import jax

    return jax.random.split(jax.random.key(0), UPDATES)


def drawn(key, chunk):
    """Noise of one update, in the order in which theirs draws it."""
    import jax

    k_critic, k_flow, k_actor = jax.random.split(key, 3)
    k_noise, k_t = jax.random.split(k_flow)
    shape = ROWS, chunk * ACTION
    critic, flow, actor = (jax.random.normal(k, shape) for k in (k_critic, k_noise, k_actor))
    t = jax.random.uniform(k_t, (ROWS, 1))
    return {"critic": critic, "flow": flow, "t": t, "actor": actor}


def inputs():
    import jax

    rng, out = np.random.default_rng(0), {}
    for kind, settings in KINDS.items():
        batches, chunk = random_batches(rng, count=UPDATES, rows=ROWS), settings["chunk"]
        shape = UPDATES, ROWS, chunk, ACTION
        batches["action"] = rng.uniform(-0.95, 0.95, shape).astype(np.float32)
        steps = rng.integers(1, chunk + 1, (UPDATES, ROWS, 1))
        steps[:, ::2] = chunk  # whole
        batches["valid"] = (np.arange(chunk) < steps).astype(np.float32)
        _, state = begin(kind, batches)
        params = {name: getattr(state, name) for name in NETS}
        params = {name: getattr(x, "params", x)["params"] for name, x in params.items()}
        noise = [jax.device_get(drawn(key, chunk)) for key in keys()]
        out[kind] = {
            "batch": batches,
            "params": {name: scramble(tree, rng) for name, tree in params.items()},
            "noise": tree_map(lambda *x: np.stack(x), *noise),
        }
    length = np.array([5, 2, 9, 3, 4])
    done = np.zeros(length.sum(), np.float32)
    done[np.cumsum(length)[[0, 2]] - 1] = 1  # two ends are terminal, three are time limits
    rows = {"done": done, "length": length}
    for name, shape in {"obs": (3,), "action": (ACTION,), "reward": (), "next_obs": (3,)}.items():
        rows[name] = rng.uniform(-0.9, 0.9, (len(done), *shape)).astype(np.float32)
    return flatten(out | {"rows": rows})


# --- Ours ---


def ours(inputs):
    out = {}
    for kind in KINDS:
        parts = (unflatten(inputs, f"{kind}/{part}") for part in ("batch", "params"))
        found = jit(outputs, static_argnums=0)(kind, *parts)
        out |= {f"{kind}: {name}": x for name, x in found.items()}
    return out | {"qc: chunks of the data": chunked(unflatten(inputs, "rows"))}


def outputs(kind, batches, params):
    import jax

    from algorithms import fql

    cfg, state = begin(kind, batches)
    nets = {name: getattr(state, name) for name in ("actor", "flow", "critic")}
    nets = {name: net.replace(params={"params": params[name]}) for name, net in nets.items()}
    state = state.replace(**nets, target={"params": params["target"]})
    batches = fql.Chunks(**batches)
    first = jax.tree.map(lambda x: x[0], batches)
    k_critic, k_flow, k_actor = jax.random.split(keys()[0], 3)
    losses = {
        "critic": (fql.critic_loss, k_critic, cfg),
        "flow": (fql.flow_loss, k_flow),
        "actor": (fql.actor_loss, k_actor, cfg),
    }
    out = {}
    for name, (loss, *args) in losses.items():
        slope, _ = jax.grad(loss, has_aux=True)(nets[name].params, state, first, *args)
        out[f"{name} gradient"] = slope["params"]

    def one(state, row):
        return fql.update(state, *row, cfg)

    state, infos = jax.lax.scan(one, state, (batches, keys()))
    for name in ("critic_loss", "flow_loss", "distillation_loss"):
        out[f"{name.replace('_', ' ')} of {UPDATES} updates"] = infos[name]
    policy = infos["actor_loss"] + infos["flow_loss"]  # theirs is the sum
    out[f"actor loss of {UPDATES} updates"] = policy
    for name in NETS:
        net = getattr(state, name)
        out[f"{name} after {UPDATES} updates"] = getattr(net, "params", net)["params"]
    return out


def used(action, reward, next_obs, done, valid):
    """What losses use of chunks: all steps that the episode has, and the rest of whole chunks."""
    whole = valid[:, -1]
    return {
        "action": action * valid[..., None],
        "reward": reward * whole,
        "next_obs": next_obs * whole[:, None],
        "done": done * whole,
        "valid": valid,
    }


def chunked(rows):
    from algorithms import fql
    from common import datasets

    length, chunk = np.int64(rows["length"]), KINDS["qc"]["chunk"]
    arrays = (rows[name] for name in ("obs", "action", "reward", "next_obs", "done"))
    begin = np.cumsum(length) - length
    dataset = datasets.Dataset("rows", "", *arrays, begin, length, None, None, {})
    found = fql.action_chunks(dataset, fql.Config(**SETTINGS, **KINDS["qc"]))
    found = [np.asarray(x)[: 1 - chunk] for x in found[1:]]
    return used(*found)


# --- Theirs ---


def theirs(inputs, checkout):
    import sys
    from pathlib import Path
    from unittest import mock

    sys.modules["ml_collections"] = mock.MagicMock()
    sys.modules["ml_collections.config_dict"] = mock.MagicMock()
    out = {}
    for kind, folder in (("fql", Path(checkout)), ("qc", Path(checkout).with_name("qc"))):
        for name in [x for x in sys.modules if x.partition(".")[0] in ("agents", "utils")]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
        found = trained(
            kind, *(unflatten(inputs, f"{kind}/{x}") for x in ("batch", "params", "noise"))
        )
        out |= {f"{kind}: {name}": x for name, x in found.items()}
    return out | {"qc: chunks of the data": sampled(unflatten(inputs, "rows"))}


def trained(kind, batches, params, noise):
    """Three updates of their agent."""
    from unittest import mock

    import jax
    from utils import flax_utils

    agent, gradients, infos = build(kind, params), [], []
    step = flax_utils.TrainState.apply_gradients

    def keep(network, grads, **more):
        gradients.append({name: from_theirs(grads[a][b]) for name, (a, b) in NETS.items()})
        return step(network, grads=grads, **more)

    with jax.disable_jit(), mock.patch.object(flax_utils.TrainState, "apply_gradients", keep):
        for i in range(UPDATES):
            # then they draw actions for a metric, which we do not compare
            normals = iter([noise[x][i] for x in ("critic", "flow", "actor", "critic")])
            with (
                mock.patch(
                    "jax.random.normal", lambda key, shape, n=normals: given(next(n), shape)
                ),
                mock.patch(
                    "jax.random.uniform", lambda key, shape, i=i: given(noise["t"][i], shape)
                ),
            ):
                agent, info = agent.update(columns(kind, batches, i))
            infos.append(info)
    out = {f"{name} gradient": gradients[0][name] for name in ("critic", "flow", "actor")}
    names = {
        "critic loss": "critic/critic_loss", "flow loss": "actor/bc_flow_loss",
        "distillation loss": "actor/distill_loss", "actor loss": "actor/actor_loss",
    }  # fmt: skip
    for name, metric in names.items():
        found = np.array([float(info[metric]) for info in infos])
        out[f"{name} of {UPDATES} updates"] = found
    after = {name: from_theirs(agent.network.params[a][b]) for name, (a, b) in NETS.items()}
    return out | {f"{name} after {UPDATES} updates": x for name, x in after.items()}


def given(noise, shape):
    assert noise.shape == tuple(shape)
    return noise


def columns(kind, batches, i):
    """Batch i under their names; Q-chunking has a row for each step, and uses the last."""
    batch = {name: x[i] for name, x in batches.items()}
    found = {
        "observations": batch["obs"],
        "actions": batch["action"],
        "rewards": batch["reward"],
        "next_observations": batch["next_obs"],
        "masks": 1 - batch["done"],
    }
    if kind == "fql":
        return found | {"actions": batch["action"][:, 0]}
    last = {name: found[name][:, None] for name in ("rewards", "next_observations", "masks")}
    return found | last | {"valid": batch["valid"]}


def build(kind, params):
    """Their agent with our weights."""
    if kind == "fql":
        from agents.fql import FQLAgent as Agent
    else:
        from agents.acfql import ACFQLAgent as Agent
    own = KINDS[kind]
    config = dict(
        lr=SETTINGS["lr"], tau=SETTINGS["polyak"], discount=SETTINGS["gamma"],
        alpha=SETTINGS["alpha"], flow_steps=SETTINGS["flow_steps"],
        actor_hidden_dims=SETTINGS["widths"], value_hidden_dims=SETTINGS["widths"],
        layer_norm=True, actor_layer_norm=False, encoder=None,
        q_agg="min" if own["smaller_q"] else "mean", normalize_q_loss=own["normalize_q"],
    )  # fmt: skip
    obs = np.zeros((1, 3), np.float32)
    if kind == "qc":
        obs = obs[0]
        config |= dict(
            num_qs=2, horizon_length=own["chunk"], action_chunking=True, weight_decay=0.0,
            actor_type="distill-ddpg", use_fourier_features=False, fourier_feature_dim=64,
        )  # fmt: skip
    agent = Agent.create(0, obs, np.zeros((*obs.shape[:-1], ACTION), np.float32), config)
    theirs = dict(agent.network.params)
    for name, (module, part) in NETS.items():
        wanted = tree_map(np.shape, theirs[module][part])
        theirs[module] = {part: to_theirs(params[name])}
        assert flatten(wanted).keys() == flatten(theirs[module][part]).keys()
    return agent.replace(network=agent.network.replace(params=theirs))


def sampled(rows):
    """All chunks by `sample_sequence`."""
    from unittest import mock

    from utils.datasets import Dataset

    ends, chunk = np.cumsum(np.int64(rows["length"])) - 1, KINDS["qc"]["chunk"]
    terminals = np.isin(np.arange(len(rows["done"])), ends).astype(np.float32)
    dataset = Dataset.create(
        observations=rows["obs"], actions=rows["action"], rewards=rows["reward"],
        next_observations=rows["next_obs"], masks=1 - rows["done"], terminals=terminals,
    )  # fmt: skip
    with mock.patch("numpy.random.randint", lambda high, size: np.arange(high)):
        found = dataset.sample_sequence(len(terminals) - chunk + 1, chunk, SETTINGS["gamma"])
    last = (found[name][:, -1] for name in ("rewards", "next_observations", "masks"))
    reward, next_obs, masks = last
    return used(found["actions"], reward, next_obs, 1 - masks, found["valid"])


def transposed(tree, name=""):
    """The same tree, kernels transposed."""
    if hasattr(tree, "items"):
        return {inner: transposed(x, inner) for inner, x in tree.items()}
    return tree.swapaxes(-1, -2) if name == "kernel" else tree


def to_theirs(tree):
    return transposed(tree)


def from_theirs(tree):
    """One of our trees from theirs."""
    return tree_map(np.asarray, transposed(tree))
