"""The authors of Diffuser, PyTorch: their Trainer and their guided sampling.

An update uses one batch (the authors accumulate the gradients of two). Their loader reads the data
in processes of its own.
"""

import sys
import tempfile
from functools import partial
from types import ModuleType

import numpy as np

from benchmarks.peers import (
    ACTION,
    DIFFUSION_STEPS,
    LENGTH,
    MULTIPLES,
    OBS,
    Row,
    diffuser_sizes,
    repeat,
    without,
)

PEER = dict(
    name="authors' Diffuser",
    repository="https://github.com/jannerm/diffuser",
    packages=("torch",),
)


def rows(horizon, checkout, world):
    import torch

    np.int = int  # noqa: NPY001, as it was called then
    for name in "environments", *(f"utils.{x}" for x in ("rendering", "setup", "config", "colab")):
        sys.modules[f"diffuser.{name}"] = ModuleType(name)
    without("scipy", "scipy.interpolate", "scipy.spatial", "scipy.spatial.transform")
    sys.path.insert(0, checkout)
    from diffuser import datasets, models, sampling
    from diffuser.utils import training

    training.batch_to_device = lambda batch: batch  # there is no GPU
    common = dict(
        env=world, horizon=horizon, normalizer="GaussianNormalizer", max_path_length=LENGTH
    )
    windows = datasets.SequenceDataset(**common)
    returns = datasets.ValueDataset(discount=0.99, termination_penalty=-100, **common)
    nets, sizes = (horizon, OBS + ACTION, OBS, 32, MULTIPLES[horizon]), (horizon, OBS, ACTION)
    how = dict(loss_type="l2", predict_epsilon=False, action_weight=10)
    model = models.GaussianDiffusion(models.TemporalUnet(*nets), *sizes, DIFFUSION_STEPS, **how)
    value = models.ValueFunction(*nets)
    value = models.ValueDiffusion(value, *sizes, DIFFUSION_STEPS, loss_type="value_l2")

    with tempfile.TemporaryDirectory() as folder:
        how = dict(results_folder=folder, save_freq=10**9, log_freq=10**9, sample_freq=0)
        how |= dict(train_lr=2e-4, gradient_accumulate_every=1)
        fit_model = partial(training.Trainer(model, windows, None, **how).train, 1)
        fit_value = partial(training.Trainer(value, returns, None, **how).train, 1)
        steps = dict(diffuser_model=fit_model, diffuser_value=fit_value)
        steps["diffuser"] = lambda: (fit_model(), fit_value())
        for what, step in steps.items():
            yield Row(what, diffuser_sizes(horizon, batch=32), 5, repeat(step, 5))

    how = dict(sample_fn=sampling.n_step_guided_p_sample, guide=sampling.ValueGuide(value))
    how |= dict(n_guide_steps=2, scale=0.1, t_stopgrad=2, scale_grad_by_std=True, verbose=False)
    plan = partial(model, {0: torch.zeros(64, OBS)}, **how)
    yield Row("plan", diffuser_sizes(horizon, samples=64, guide_steps=2), 1, repeat(plan, 1))


CASES = {f"horizon_{horizon}": partial(rows, horizon) for horizon in MULTIPLES}
