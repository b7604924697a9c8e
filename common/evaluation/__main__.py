"""Scores, films or exports a trained run: python -m common.evaluation runs/iql/..."""

import functools
import os
from pathlib import Path

import jax
import numpy as np
import tyro

from common import evaluation, experiment
from common.evaluation import export as exports
from common.evaluation import video as films
from common.experiment import files, printable, runtime


def main(
    run: tyro.conf.Positional[Path],
    video: Path | None = None,
    export: Path | None = None,
    episodes: int = 0,
    seed: int = 0,
    env_id: str = "",
    env_module: str = "",
):
    """Score every seed of a run's last checkpoint as training does, or film or export one seed.

    Args:
        run: run folder
        video: film one seed instead, to this .mp4 or .gif file
        export: export one seed's policy instead: .npz for NumPy, .stablehlo for JAX
        episodes: number of episodes; 0: as many as in training (10 if none), one for a film
        seed: the seed to film or export, counted from 0
        env_id: Gymnasium id to score on instead of the run's own
        env_module: Python module of yours to import, which registers the environment
    """
    runtime.open_streams()
    runtime.end_at_interrupt()
    runtime.import_own(env_module)
    run = Path(os.path.expanduser(run))
    if episodes < 0:
        raise evaluation.EvaluationError(f"--episodes {episodes}: must be at least 0.")
    if video:
        films.choose_renderer()
    module, cfg, state = evaluation.load(run)
    info, _ = experiment.read(run)
    (_, obs_dim, action_dim), data = info["dims"], info["dataset"]
    own, env_id = data["env_id"], env_id or data["env_id"]
    discrete = bool(data.get("num_actions"))
    if not env_id:
        how = "--env-id names one, --episodes a number of episodes"
        raise evaluation.EvaluationError(f"{run} has no environment to score on: {how}.")
    evaluation.choose_seed(run, cfg, seed, "--seed")
    env = evaluation.inspect(env_id)
    count = env.num_actions or len(env.low)
    if (env.obs_dim, count, env.num_actions > 0) != (obs_dim, action_dim, discrete):
        sizes = f"{env.obs_dim} observations and {count} actions"
        sizes += " (discrete)" if env.num_actions else ""
        why = f"{env_id} has {sizes}, the run {obs_dim} and {action_dim}"
        why += " (discrete)" if discrete else ""
        raise evaluation.EvaluationError(f"{run} cannot be scored: {why}.")
    if export:
        one = jax.tree.map(lambda x: x[seed], state)
        with files.asked_for("--export", export):
            exports.export(export, jax.jit(module.policy(cfg)), one, env_id, obs_dim)
        print(printable(f"{export}: the policy of seed {cfg.seed + seed}"))
        return
    act = jax.jit(jax.vmap(module.policy(cfg), (0, 0, 0, 0, None)))
    if video:
        act = functools.partial(act, jax.tree.map(lambda x: x[seed : seed + 1], state))
        with files.asked_for("--video", video):
            returns = films.film(act, env_id, video, episodes or 1)
        print(printable(f"{video}: {env_id}, return {', '.join(f'{r:.1f}' for r in returns)}"))
        return
    act = functools.partial(act, state)
    count = episodes or cfg.eval_episodes or 10
    returns, successes = evaluation.outcomes(act, env_id, cfg.num_seeds, count)
    low, high = data["ref_min_score"], data["ref_max_score"]
    if env_id.rpartition("-v")[0] != own.rpartition("-v")[0]:  # other options are other returns
        low = None
    for i, (row, success) in enumerate(zip(returns, successes, strict=True)):
        mean = f"return {row.mean():.1f} +- {row.std():.1f}"
        if np.isfinite(success).all():
            mean += f", success {success.mean():.0%}"
        score = "" if low is None else f", score {100 * (row.mean() - low) / (high - low):.1f}"
        print(f"seed {cfg.seed + i}: {mean}{score}, {len(row)} episodes of {env_id}")
    saved = evaluation.recorded(run) if env_id == own else None
    if saved is not None and np.shape(saved) == returns.shape:
        left = np.isfinite(saved).all(1)  # seeds that have not diverged
        same = np.array_equal(np.array(saved)[left], returns[left])
        print("Bit for bit what training recorded." if same else "Training recorded other returns.")


if __name__ == "__main__":
    tyro.cli(main)
