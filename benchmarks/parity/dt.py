"""Decision Transformer compared with its authors' code, by a whole small experiment of theirs.

The peer: `experiment` of gym/experiment.py, unchanged, on our episodes: statistics, three
minibatches of `get_batch`, three steps of `SequenceTrainer` (loss, gradient, clipping, AdamW,
warm-up), then `evaluate_episode_rtg` for two target returns.

- Stubs replace gym and wandb.
- The environment "reacher2d", which has the smallest scale and the longest time, returns given
  observations and rewards.
- `numpy.random.choice` and `random.randint` return the given windows.
- The model starts from our weights, without dropout, and is told the size of a causal mask, which
  newer releases of transformers do not infer. A decorator of transformers that writes docstrings
  does nothing, because its arguments have changed.

Differences removed for the comparison:
- the constant added to the std of observations, 1e-6 (ours: 1e-3): observations are about 1e5
- padding: not compared

Weights: its Linear layers have our kernels transposed, its Conv1D layers have our kernels. Left out
are parameters that it does not train, `wte` and the heads for states and returns; and, after the
updates, the biases of the attention's keys. These add the same to all scores of a query, so their
gradient is a rounding error, which Adam turns into whole steps.
"""

import functools
import os
import pickle
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks.parity import flatten, jit, scramble, unflatten, vector

PEER = dict(
    name="authors (decision-transformer)",
    repository="https://github.com/kzl/decision-transformer",
    commit="e2d82e68f330c00f763507b3b01d774740bee53f",
    environment="torch==2.13.0 transformers==4.30.2 numpy",
)
LENGTHS = 9, 2, 104, 5  # one episode is shorter than a window, one longer than time is told apart
UPDATES, ACTED = 3, 7  # acting goes on for longer than the context
OBS, ACTION = 3, 2
# Two steps of warm-up and large ones, so that three updates show.
SETTINGS = dict(
    layers=2, heads=2, width=8, context=4, batch_size=6, lr=1e-3, weight_decay=0.1, warmup=2,
    dropout=0.0, max_time=100, rtg_scale=10.0, targets=(76.0, 40.0),
)  # fmt: skip


def inputs():
    import jax

    from algorithms import dt

    rng, rows = np.random.default_rng(0), sum(LENGTHS)
    given = dict(
        obs=1e5 * rng.normal(size=(rows, OBS)),
        action=rng.uniform(-1, 1, (rows, ACTION)),
        reward=3 * rng.normal(size=rows),
        acting_obs=1e5 * rng.normal(size=(2, ACTED, OBS)),
        acting_reward=3 * rng.normal(size=(2, ACTED)),
    )
    given = {name: x.astype(np.float32) for name, x in given.items()}
    episode = rng.integers(len(LENGTHS), size=(UPDATES, SETTINGS["batch_size"]))
    begin = rng.integers(np.array(LENGTHS)[episode])  # of the window, within its episode
    episode[:, 0], begin[:, 0] = 2, 99  # time embeddings stop at max_time
    episode[:, 1], begin[:, 1] = 1, 0  # padding
    cfg = dt.Config(**SETTINGS)
    state = jax.jit(dt.init, static_argnums=2)(jax.random.key(0), steps(given), cfg)
    params = scramble(state.actor.params["params"], rng)
    return given | flatten({"episode": episode, "begin": begin, "params": params})


def without_key_biases(params):
    """The parameters as one vector without the biases of the keys, see above."""
    flat, width = flatten(params), SETTINGS["width"]
    for i in range(SETTINGS["layers"]):
        query, _, value = np.split(flat[f"Block_{i}/Dense_0/bias"], [width, 2 * width])
        flat[f"Block_{i}/Dense_0/bias"] = np.concatenate([query, value])
    return vector(flat)


def stacked(seen):
    """Arrays of what was seen; windows of different lengths are concatenated."""
    ragged = "window", "prediction"
    return {k: np.concatenate(x) if k in ragged else np.array(x) for k, x in seen.items()}


# --- Theirs ---


def counterparts(model):
    """{our parameter's name: their parameter}, and the names of those that they hold transposed."""
    named, transposed = {}, set()

    def pair(ours, layer, weight="kernel"):
        named[f"{ours}/{weight}"] = layer.weight
        if weight != "embedding":
            named[f"{ours}/bias"] = layer.bias

    for ours, layer in [
        ("Dense_0", model.embed_return),
        ("Dense_1", model.embed_state),
        ("Dense_2", model.embed_action),
        ("head", model.predict_action[0]),
    ]:
        pair(ours, layer)
        transposed.add(f"{ours}/kernel")
    pair("Embed_0", model.embed_timestep, "embedding")
    pair("LayerNorm_0", model.embed_ln, "scale")
    pair("LayerNorm_1", model.transformer.ln_f, "scale")
    for i, block in enumerate(model.transformer.h):
        parts = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
        for j, layer in enumerate(parts):
            pair(f"Block_{i}/Dense_{j}", layer)
        for j, layer in enumerate((block.ln_1, block.ln_2)):
            pair(f"Block_{i}/LayerNorm_{j}", layer, "scale")
    return named, transposed


def read(model, grad=False):
    """{our parameter's name: its value, or gradient, in our layout}."""
    named, transposed = counterparts(model)
    arrays = {k: (x.grad if grad else x.data).numpy().copy() for k, x in named.items()}
    return {k: x.T if k in transposed else x for k, x in arrays.items()}


def world(inputs, acted):
    """The peer's environment; its observations and rewards are in `inputs`."""

    class Reacher2dEnv:
        observation_space = SimpleNamespace(shape=(OBS,))
        action_space = SimpleNamespace(shape=(ACTION,))
        episode = -1

        def reset(self):
            self.episode, self.time = self.episode + 1, 0
            return inputs["acting_obs"][self.episode, 0]

        def step(self, action):
            acted.append(action)
            reward = float(inputs["acting_reward"][self.episode, self.time])
            self.time += 1
            obs = inputs["acting_obs"][self.episode, self.time % ACTED]
            return obs, reward, self.time == ACTED, {}

    return Reacher2dEnv


def episodes(inputs):
    """The episodes as their data files hold them."""
    names = {"observations": "obs", "actions": "action", "rewards": "reward"}
    cuts = np.cumsum(LENGTHS)[:-1]
    columns = {there: np.split(inputs[here], cuts) for there, here in names.items()}
    columns["terminals"] = [np.zeros(length, bool) for length in LENGTHS]
    return [dict(zip(columns, x, strict=True)) for x in zip(*columns.values(), strict=True)]


def theirs(inputs, checkout):
    import torch
    import transformers

    transformers.file_utils.add_code_sample_docstrings = lambda **_: lambda function: function
    seen = {"window": [], "prediction": [], "loss": [], "gradient": [], "acting": []}
    sys.modules["decision_transformer.envs.reacher_2d"] = SimpleNamespace(
        Reacher2dEnv=world(inputs, seen["acting"])
    )
    sys.modules.update({name: ModuleType(name) for name in ("gym", "wandb")})
    sys.path.insert(0, f"{checkout}/gym")
    import experiment

    class Model(experiment.DecisionTransformer):
        def __init__(self, **sizes):
            super().__init__(**sizes, embd_pdrop=0.0, n_ctx=3 * SETTINGS["context"])
            named, transposed = counterparts(self)
            for name, x in flatten(unflatten(inputs, "params")).items():
                x = x.T if name in transposed else x
                assert x.shape == named[name].shape
                named[name].data = torch.tensor(np.ascontiguousarray(x))

        def forward(self, states, actions, rewards, returns_to_go, times, attention_mask):
            out = super().forward(states, actions, rewards, returns_to_go, times, attention_mask)
            if self.training:
                real = attention_mask > 0
                window = torch.cat([states, actions, returns_to_go, times[..., None] / 10], -1)
                seen["window"].append(window[real].numpy())
                seen["prediction"].append(out[1][real].detach().numpy())
            return out

    class Trainer(experiment.SequenceTrainer):
        def train_step(self):
            clip = torch.nn.utils.clip_grad_norm_

            def keep_and_clip(parameters, norm):
                seen["gradient"].append(vector(read(self.model, grad=True)))
                clip(parameters, norm)

            with mock.patch("torch.nn.utils.clip_grad_norm_", keep_and_clip):
                seen["loss"].append(super().train_step())
            seen["parameters"] = without_key_biases(read(self.model))
            return seen["loss"][-1]

    by_return = np.argsort([x["rewards"].sum() for x in episodes(inputs)])
    chosen = iter(np.argsort(by_return)[inputs["episode"]])  # they count episodes by their return
    begin = iter([0, *inputs["begin"].ravel()])  # first, a number for a name
    keep = {k: SETTINGS[k] for k in ("batch_size", "dropout", "weight_decay")}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(experiment, DecisionTransformer=Model, SequenceTrainer=Trainer),
        mock.patch("numpy.random.choice", lambda *_, **__: next(chosen)),
        mock.patch("random.randint", lambda *_: next(begin)),
    ):
        here = os.getcwd()
        os.chdir(folder)
        Path("data").mkdir()
        Path("data/reacher2d-medium-v2.pkl").write_bytes(pickle.dumps(episodes(inputs)))
        experiment.experiment("parity", keep | dict(
            env="reacher2d", dataset="medium", model_type="dt", device="cpu", K=SETTINGS["context"],
            embed_dim=SETTINGS["width"], n_layer=SETTINGS["layers"], n_head=SETTINGS["heads"],
            activation_function="relu", learning_rate=SETTINGS["lr"],
            warmup_steps=SETTINGS["warmup"], num_eval_episodes=1, max_iters=1,
            num_steps_per_iter=UPDATES,
        ))  # fmt: skip
        os.chdir(here)
    return stacked(seen)


# --- Ours ---


def steps(inputs):
    """Our Steps of the episodes."""
    from common import datasets

    obs, action, reward = (inputs[name] for name in ("obs", "action", "reward"))
    length, done = np.array(LENGTHS), np.zeros_like(reward)
    columns = obs, action, reward, obs, done, np.cumsum(length) - length, length
    return datasets.Dataset("parity", "", *columns, None, None, {}).steps()


@functools.cache
def programs():
    """What `ours` runs, compiled once."""
    import jax

    from algorithms import dt

    cfg, key = dt.Config(**SETTINGS), jax.random.key(0)

    def step(state, data, rows):
        batch = dt.minibatch(state, data, rows, cfg)
        loss = jax.grad(dt.actor_loss, has_aux=True)
        grads, _ = loss(state.actor.params, state, batch, key, cfg)
        action = state.actor.apply_fn(state.actor.params, batch)
        new, info = dt.update(state, batch, key, cfg)
        return new, batch, action, info["actor_loss"], grads

    def act(state, carry, obs, reward):
        return dt.act(state, carry, obs, reward, key, cfg)

    return jit(lambda data: dt.init(key, data, cfg)), jit(step), jit(act)


def ours(inputs):
    import jax
    import jax.numpy as jnp

    init, step, act = programs()
    data = jax.tree.map(jnp.asarray, steps(inputs))
    params = jax.tree.map(jnp.asarray, {"params": unflatten(inputs, "params")})
    state = init(data)
    state = state.replace(actor=state.actor.replace(params=params))
    seen = {"window": [], "prediction": [], "loss": [], "gradient": []}

    first = np.cumsum(LENGTHS) - LENGTHS
    for rows in first[inputs["episode"]] + inputs["begin"]:
        state, batch, action, loss, grads = step(state, data, rows)
        time = np.minimum(batch.time, SETTINGS["max_time"] - 1) / 10
        columns = batch.obs, batch.action, batch.returns_to_go[..., None], time[..., None]
        seen["window"].append(np.concatenate(columns, -1)[batch.mask])
        seen["prediction"].append(action[batch.mask])
        seen["loss"].append(loss)
        seen["gradient"].append(vector(jax.device_get(grads["params"])))
    out = stacked(seen) | {
        "parameters": without_key_biases(jax.device_get(state.actor.params["params"]))
    }

    carry, reward, actions = None, jnp.zeros(2), []
    for t in range(ACTED):
        action, carry = act(state, carry, inputs["acting_obs"][:, t], reward)
        actions.append(action)
        reward = inputs["acting_reward"][:, t]
    return out | {"acting": np.stack(actions, 1).reshape(-1, ACTION)}  # one episode, then the other
