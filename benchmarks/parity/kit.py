"""OfflineRL-Kit's networks and model with our weights, for the checks of combo, mopo and mobile.

Weights: its Linear layers have our kernels, EnsembleLinear has them transposed. Its two critics are
our members 0 and 1 on axis 0. Its last layers are outside the backbone, the policy's are separate
for mean and log std; ours is the last layer of the MLP.

settings: the fields of Config that a check sets.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks.parity import tree_map, vector
from benchmarks.parity.layers import from_linear, to_linear

PEER = dict(
    name="OfflineRL-Kit",
    repository="https://github.com/yihaosun1124/OfflineRL-Kit",
    commit="e3ce69793766d02660217d4dfc0af4693a5531bd",
    environment="torch==2.13.0 numpy tqdm",
)
OBS, ACTION = 3, 2
NETS = "actor", "critic", "temperature"


def load(checkout):
    """Imports the peer without gym, pandas, matplotlib and tensorboard."""
    stubs = "gym", "gym.envs", "gym.envs.mujoco", "pandas", "matplotlib", "matplotlib.pyplot"
    stubs = {name: mock.MagicMock() for name in (*stubs, "torch.utils.tensorboard")}
    sys.path.insert(0, checkout)
    sys.modules.update(stubs)
    import offlinerlkit.policy  # noqa: F401

    for name in stubs:  # torch, too, looks whether some of them are there
        del sys.modules[name]


class Columns:
    """Copies between our MLP_0 and the peer's MLP with its separate last layers."""

    def __init__(self, backbone, *last):
        self.hidden, self.last = list(backbone.model)[::2], last

    def write(self, mlp):
        for i, layer in enumerate(self.hidden):
            to_linear(layer, mlp[f"Dense_{i}"])
        final = mlp[f"Dense_{len(self.hidden)}"]
        parts = tree_map(lambda x: np.split(x, len(self.last), 0), final)
        for i, layer in enumerate(self.last):
            to_linear(layer, {name: x[i] for name, x in parts.items()})

    def read(self, grad):
        mlp = {f"Dense_{i}": from_linear(layer, grad) for i, layer in enumerate(self.hidden)}
        parts = [from_linear(layer, grad) for layer in self.last]
        mlp[f"Dense_{len(self.hidden)}"] = tree_map(lambda *x: np.concatenate(x), *parts)
        return mlp


def networks(given, settings):
    """The peer's networks with our weights.

    actor, critics, log_alpha: as its policies take them. copies(members): gives the targets our
    weights. read(name, grad): a network's parameters, or gradients, in our layout.
    """
    import torch
    from offlinerlkit.modules import ActorProb, Critic, TanhDiagGaussian
    from offlinerlkit.nets import MLP

    class Affine(torch.nn.Module):
        """Their layer for the log std, with our affine map."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.scale = torch.nn.Parameter(torch.tensor(given["actor"]["log_std_scale"]))
            self.shift = torch.nn.Parameter(torch.tensor(given["actor"]["log_std_shift"]))

        def forward(self, x):
            return self.scale * self.inner(x) + self.shift

    def mlp(size):
        return MLP(size, settings["widths"])

    width = settings["widths"][-1]
    dist = TanhDiagGaussian(width, ACTION, unbounded=True, conditioned_sigma=True, sigma_min=-20.0)
    actor = ActorProb(mlp(OBS), dist)
    critics = [Critic(mlp(OBS + ACTION)) for _ in range(2)]
    layers = {"actor": Columns(actor.backbone, dist.mu, dist.sigma)}
    layers["actor"].write(given["actor"]["MLP_0"])
    dist.sigma = Affine(dist.sigma)
    log_alpha = torch.tensor(given["temperature"]["log"].reshape(1), requires_grad=True)

    def copies(members, name="target"):
        layers[name] = [Columns(member.backbone, member.last) for member in members]
        for i, member in enumerate(layers[name]):
            member.write(tree_map(lambda x, i=i: x[i], given[name]["MLP_0"]))

    def read(name, grad=False):
        if name == "temperature":
            return {"log": (log_alpha.grad if grad else log_alpha.data).numpy().reshape(())}
        if name != "actor":
            return {
                "MLP_0": tree_map(lambda *x: np.stack(x), *(m.read(grad) for m in layers[name]))
            }
        sigma = dist.sigma
        affine = {"log_std_scale": sigma.scale, "log_std_shift": sigma.shift}
        affine = {k: (x.grad if grad else x.data).numpy().copy() for k, x in affine.items()}
        return {"MLP_0": layers["actor"].read(grad)} | affine

    copies(critics, "critic")
    return SimpleNamespace(
        actor=actor, critics=critics, log_alpha=log_alpha, copies=copies, read=read
    )


def late_adam():
    """Adam whose `step` keeps the gradients and whose `step_now` takes the step; `late`: whether
    it waits."""
    import torch

    class Late(torch.optim.Adam):
        late = True

        def step(self):
            self.kept = [p.grad.clone() for p in self.param_groups[0]["params"]]
            if not self.late:
                super().step()

        def step_now(self):
            for p, grad in zip(self.param_groups[0]["params"], self.kept, strict=True):
                p.grad = grad
            if self.late:
                super().step()

    return Late


def halves(batch, real):
    """A Batch's fields as the peer takes them, the first `real` rows and the others."""
    import torch

    names = {"observations": "obs", "actions": "action", "next_observations": "next_obs"}
    names |= {"rewards": "reward", "terminals": "done"}
    batch = {k: torch.tensor(batch[v]) for k, v in names.items()}
    batch |= {k: batch[k][:, None] for k in ("rewards", "terminals")}
    parts = {"real": slice(None, real), "fake": slice(real, None)}
    return {name: {k: x[part] for k, x in batch.items()} for name, part in parts.items()}


def ensemble(params, scaler, settings, **options):
    """(the peer's dynamics with our weights, a function that reads it in our layout)."""
    import torch
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.modules import EnsembleDynamicsModel

    model = EnsembleDynamicsModel(
        OBS, ACTION, settings["model_widths"], settings["num_members"], settings["num_elites"],
        weight_decays=settings["model_decay"],
    )  # fmt: skip
    layers = {f"Dense_{i}": x for i, x in enumerate([*model.backbones, model.output_layer])}
    for name, layer in layers.items():
        layer.weight.data = torch.tensor(params[name]["kernel"].swapaxes(-1, -2).copy())
        layer.bias.data = torch.tensor(params[name]["bias"][:, None])
    model.max_logvar = torch.nn.Parameter(torch.tensor(params["upper"][:, None]))
    model.min_logvar = torch.nn.Parameter(torch.tensor(params["lower"][:, None]))

    def read(grad=False):
        def one(x):
            return (x.grad if grad else x.data).numpy().copy()

        tree = {
            name: {"kernel": one(layer.weight).swapaxes(-1, -2), "bias": one(layer.bias)[:, 0]}
            for name, layer in layers.items()
        }
        return tree | {"upper": one(model.max_logvar)[:, 0], "lower": one(model.min_logvar)[:, 0]}

    class Keep(torch.optim.Adam):
        def step(self):
            self.gradients.append(vector(read(grad=True)))
            super().step()

    trained = [p for name, p in model.named_parameters() if not name.startswith("elites")]
    optimiser = Keep(trained, settings.get("model_lr", 1e-3))
    optimiser.gradients = []
    never = lambda obs, *_: np.zeros((len(obs), 1))  # noqa: E731
    return EnsembleDynamics(model, optimiser, scaler, never, **options), read


# --- Ours ---


def as_batch(fields):
    """Our Batch of a dict of arrays."""
    import jax.numpy as jnp

    from common.datasets import Batch

    return Batch(**{name: jnp.asarray(x) for name, x in fields.items()})


def keeping(net):
    """The TrainState with an optimiser that keeps the gradients it receives."""
    import optax

    keep = optax.GradientTransformation(lambda params: params, lambda grads, *_: (grads, grads))
    return net.replace(tx=optax.chain(keep, net.tx))


def started(net, params):
    """That TrainState at `params`, before its first step."""
    import jax
    import jax.numpy as jnp

    params = {"params": jax.tree.map(jnp.asarray, params)}
    return net.create(apply_fn=net.apply_fn, params=params, tx=net.tx)
