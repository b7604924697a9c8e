"""CleanDiffuser, PyTorch: the calls inside its pipeline for Diffuser.

Its value network gets the authors' kernel size 5 (its own: 3). It guides with one gradient a step
(the authors: two).
"""

import sys
from functools import partial

from benchmarks.peers import (
    ACTION,
    DIFFUSION_STEPS,
    MULTIPLES,
    OBS,
    Row,
    diffuser_sizes,
    repeat,
    without,
)

PEER = dict(
    name="CleanDiffuser",
    repository="https://github.com/CleanDiffuserTeam/CleanDiffuser",
    packages=("torch",),
)


def rows(horizon, checkout, world):
    import torch

    without("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    without("numba", "numcodecs", "zarr", "scipy", "scipy.interpolate")
    sys.path.insert(0, checkout)
    from cleandiffuser import classifier, diffusion, nn_classifier, nn_diffusion
    from cleandiffuser.dataset import d4rl_mujoco_dataset, dataset_utils

    data = world.get_dataset() | {"terminals": world.get_dataset()["terminals"] > 0}
    windows = d4rl_mujoco_dataset.D4RLMuJoCoDataset(data, horizon=horizon, discount=0.997)
    loader = torch.utils.data.DataLoader(windows, batch_size=32, shuffle=True, drop_last=True)
    batches = dataset_utils.loop_dataloader(loader)
    known, weight = torch.zeros(horizon, OBS + ACTION), torch.ones(horizon, OBS + ACTION)
    known[0, :OBS], weight[0, OBS:] = 1.0, 10.0
    multiples = MULTIPLES[horizon]
    factors = [b // a for a, b in zip((1, *multiples[:-1]), multiples, strict=True)]
    nets = dict(model_dim=32, emb_dim=32, dim_mult=factors, kernel_size=5)
    value = nn_classifier.HalfJannerUNet1d(horizon, OBS + ACTION, **nets)
    agent = diffusion.DiscreteDiffusionSDE(
        nn_diffusion.JannerUNet1d(OBS + ACTION, **nets), None, fix_mask=known,
        loss_weight=weight, classifier=classifier.CumRewClassifier(value), ema_rate=0.9999,
        diffusion_steps=DIFFUSION_STEPS, predict_noise=False,
    )  # fmt: skip

    def step(model=True, value=True):
        batch = next(batches)
        x = torch.cat([batch["obs"]["state"], batch["act"]], -1)
        if model:
            agent.update(x)
        if value:
            agent.update_classifier(x, batch["val"])

    steps = dict(diffuser_model=partial(step, value=False))
    steps |= dict(diffuser_value=partial(step, model=False), diffuser=step)
    agent.train()
    for what, run in steps.items():
        yield Row(what, diffuser_sizes(horizon, batch=32), 5, repeat(run, 5))
    agent.eval()
    how = dict(solver="ddpm", n_samples=64, sample_steps=DIFFUSION_STEPS, w_cg=1e-4)
    plan = partial(agent.sample, torch.zeros(64, horizon, OBS + ACTION), temperature=0.5, **how)
    yield Row("plan", diffuser_sizes(horizon, samples=64, guide_steps=1), 1, repeat(plan, 1))


CASES = {f"horizon_{horizon}": partial(rows, horizon) for horizon in MULTIPLES}
