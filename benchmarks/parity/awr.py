"""AWR compared with its authors' code.

The peer: `AWRAgent` of learning/awr_agent.py. Its `_update` makes whole iterations on a replay
buffer with our episodes; its methods give returns and weights, its graph losses and gradients.

- TensorFlow 2 runs it in compatibility mode for version 1. Two functions of tf.contrib, which no
  longer exist, are replaced by their successors in TensorFlow and TensorFlow Probability.
- Stubs replace gym and the logger.
- `np.random.shuffle` returns the rows that our update draws from fixed keys.

Differences removed for the comparison:
- initialisation: both start from our weights
- standardisation of observations: outside of an iteration in both
- size of the buffer: there are few rows

Weights: its kernels are (in, out), ours (out, in).
"""

import numpy as np

from benchmarks.parity import flatten, jit, random_batches, scramble, unflatten

PEER = dict(
    name="the authors' code",
    repository="https://github.com/xbpeng/awr",
    commit="831442fb8d4c24bd200667cbc5e458c7657effc2",
    environment="tensorflow-cpu==2.15.1 tensorflow-probability==0.23.0 numpy==1.26.4",
)
# Large steps, so that three iterations show; a low clip, so that some weights meet it.
SETTINGS = dict(
    widths=(16, 16), batch_size=32, gamma=0.9, lam=0.7, actor_lr=5e-3, critic_lr=0.1, std=0.4,
    max_weight=3.0, temperature=0.8, critic_steps=4, actor_steps=6, normalize=False,
)  # fmt: skip
LENGTHS, DONE = (20, 1, 13, 30), (1, 0, 0, 1)  # 64 rows: two of their minibatches a shuffle


def inputs():
    import jax

    rng = np.random.default_rng(3)
    rows = {name: x[0] for name, x in random_batches(rng, 1, sum(LENGTHS)).items()}
    last = np.cumsum(LENGTHS) - 1
    inner = np.setdiff1d(np.arange(sum(LENGTHS)), last)
    rows["next_obs"][inner] = rows["obs"][inner + 1]
    rows["done"] = np.zeros(sum(LENGTHS), np.float32)
    rows["done"][last] = DONE
    _, state, _ = ours_at_start({"rows": rows, "last": last})
    params = {n: scramble(getattr(state, n).params["params"], rng) for n in ("actor", "value")}
    drawn = jax.vmap(draw)(keys())
    return flatten({"data": {"rows": rows, "last": last}, "params": params, "drawn": drawn})


def keys():
    """The keys of three iterations."""
    import jax

    return jax.random.split(jax.random.key(0), 3)


def draw(key):
    """The rows (steps, batch_size) that our update draws from a key, for each regression."""
    import jax

    size, names = SETTINGS["batch_size"], ("critic", "actor")
    return {
        name: jax.vmap(lambda k: jax.random.randint(k, (size,), 0, sum(LENGTHS)))(
            jax.random.split(k, SETTINGS[f"{name}_steps"])
        )
        for name, k in zip(names, jax.random.split(key), strict=True)
    }


def ours_at_start(data):
    """(config, fresh State, Episodes)."""
    import jax

    from algorithms import awr
    from common.datasets import Batch

    cfg = awr.Config(**SETTINGS)
    data = awr.Episodes(Batch(**data["rows"]), data["last"])
    return cfg, awr.init(jax.random.key(0), data.rows, cfg), data


def ours(inputs):
    return jit(outputs)(*(unflatten(inputs, part) for part in ("data", "params", "drawn")))


def outputs(data, params, drawn):
    import jax

    from algorithms import awr

    cfg, state, data = ours_at_start(data)
    nets = {n: getattr(state, n).replace(params={"params": params[n]}) for n in ("actor", "value")}
    state = state.replace(**nets)

    returns, weight = awr.label(state, data, cfg)
    out = {"returns": returns, "weights": weight}
    rows, first = (data.rows.obs, data.rows.action), drawn["actor"][0, 0]
    batches = {"value": (rows[0], returns), "actor": (*rows, weight)}
    for name, batch in batches.items():
        loss = jax.value_and_grad(getattr(awr, f"{name}_loss"), has_aux=True)
        batch = (x[first] for x in batch)
        (value, _), gradient = loss(getattr(state, name).params, state, *batch, cfg)
        out |= {f"{name} loss": value, f"{name} gradient": gradient}

    state, infos = jax.lax.scan(lambda s, key: awr.update(s, data, key, cfg), state, keys())
    for name in batches:
        out[f"{name} loss of 3 iterations"] = infos[f"{name}_loss"]
        out[f"{name} after 3 iterations"] = getattr(state, name).params
    return out


def theirs(inputs, checkout):
    from unittest import mock

    data, params, drawn = (unflatten(inputs, part) for part in ("data", "params", "drawn"))
    agent, tf = build(checkout, data["rows"]["obs"].shape[1], data["rows"]["action"].shape[1])
    store(agent, data)
    trees = {"value": "critic", "actor": "actor"}
    for name, scope in trees.items():
        load(agent, scope, params[name])

    index = np.array(agent._replay_buffer.get_unrolled_indices())
    valid = ~agent._replay_buffer.is_path_end(index)
    v = agent._compute_batch_vals(index)
    returns = agent._compute_batch_new_vals(index, v)
    _, advantage, _, _ = agent._calc_adv(returns, v, valid)
    weight = agent._calc_adv_weights(advantage, valid)[0]
    out = {"returns": returns[valid], "weights": weight[valid]}

    first = drawn["actor"][0, 0]
    rows = {name: x[first] for name, x in data["rows"].items()}
    feed = {agent._s_tf: rows["obs"], agent._a_tf: rows["action"]}
    feed |= {agent._tar_val_tf: out["returns"][first], agent._a_w_tf: out["weights"][first]}
    for name, scope in trees.items():
        loss = getattr(agent, f"_{scope}_loss_tf")
        variables = agent._tf_vars(f"main/{scope}")
        loss, gradient = agent._sess.run([loss, tf.gradients(loss, variables)], feed)
        out |= {f"{name} loss": loss, f"{name} gradient": tree(variables, gradient)}

    queue, infos = [], []
    for i in range(3):
        for name in ("critic", "actor"):
            queue += list(drawn[name][i].reshape(-1, sum(LENGTHS)))
        with mock.patch("numpy.random.shuffle", Shuffle(queue)):
            infos.append(agent._update(i, agent._samples_per_iter))
    assert not queue
    for name, scope in trees.items():
        variables = agent._tf_vars(f"main/{scope}")
        losses = np.array([info[f"{scope}_info"]["loss"] for info in infos])
        out[f"{name} loss of 3 iterations"] = losses
        out[f"{name} after 3 iterations"] = tree(variables, agent._sess.run(variables))
    return out


class Shuffle:
    """Replaces np.random.shuffle: writes the next rows of the queue in place."""

    def __init__(self, queue):
        self._queue, self._all = queue, None

    def __call__(self, rows):
        if self._all is None:
            self._all = rows.copy()
        rows[:] = self._all[self._queue.pop(0)]


def build(checkout, obs_dim, action_dim):
    """(Their agent, the module tensorflow in the form of its version 1)."""
    import sys
    from types import SimpleNamespace
    from unittest import mock

    import tensorflow
    import tensorflow_probability as tfp

    tf = tensorflow.compat.v1
    tf.disable_eager_execution()
    glorot, gaussian = tf.glorot_uniform_initializer, tfp.distributions.MultivariateNormalDiag
    tf.contrib = SimpleNamespace(
        layers=SimpleNamespace(xavier_initializer=glorot),
        distributions=SimpleNamespace(MultivariateNormalDiag=gaussian),
    )
    box = type("Box", (), {})
    gym = SimpleNamespace(spaces=SimpleNamespace(Box=box, Discrete=type("Discrete", (), {})))
    sys.modules |= {"tensorflow": tf, "gym": gym, "util.logger": mock.MagicMock()}
    sys.path.insert(0, checkout)
    from learning import awr_agent

    env = SimpleNamespace(observation_space=box(), action_space=box())
    spaces = (env.observation_space, obs_dim, np.inf), (env.action_space, action_dim, 1.0)
    for space, size, bound in spaces:
        space.shape, space.high = (size,), np.full(size, bound, np.float32)
        space.low = -space.high
    agent = awr_agent.AWRAgent(
        env,
        tf.Session(),
        actor_net_layers=SETTINGS["widths"],
        actor_stepsize=SETTINGS["actor_lr"],
        actor_batch_size=SETTINGS["batch_size"],
        actor_steps=SETTINGS["actor_steps"],
        action_std=SETTINGS["std"],
        critic_net_layers=SETTINGS["widths"],
        critic_stepsize=SETTINGS["critic_lr"],
        critic_batch_size=SETTINGS["batch_size"],
        critic_steps=SETTINGS["critic_steps"],
        discount=SETTINGS["gamma"],
        weight_clip=SETTINGS["max_weight"],
        td_lambda=SETTINGS["lam"],
        temp=SETTINGS["temperature"],
    )
    agent._logger, agent._actor_step_count = mock.MagicMock(), 0  # which its train() would set
    return agent, tf


def store(agent, data):
    """Writes our episodes into their replay buffer."""
    from util import rl_path

    rows, first = data["rows"], 0
    for last in data["last"]:
        path, part = rl_path.RLPath(), slice(first, last + 1)
        path.states = [*rows["obs"][part], rows["next_obs"][last]]
        path.actions, path.rewards = list(rows["action"][part]), list(rows["reward"][part])
        path.logps = [0.0] * len(path.actions)
        if rows["done"][last]:
            path.terminate = rl_path.Terminate.Fail
        agent._replay_buffer.store(path)
        first = last + 1


def load(agent, scope, params):
    """Writes our weights into one of the peer's networks."""
    layers = [params["MLP_0"][f"Dense_{i}"] for i in range(len(SETTINGS["widths"]) + 1)]
    values = [x for layer in layers for x in (layer["kernel"].T, layer["bias"])]
    for variable, x in zip(agent._tf_vars(f"main/{scope}"), values, strict=True):
        variable.load(x, agent._sess)


def tree(variables, arrays):
    """Ours from theirs: kernels and biases by turns, layer after layer."""
    assert [v.name.rpartition("/")[2][:4] for v in variables] == ["kern", "bias"] * 3
    layers = zip(arrays[::2], arrays[1::2], strict=True)
    return {"MLP_0": {f"Dense_{i}": {"kernel": k.T, "bias": b} for i, (k, b) in enumerate(layers)}}
