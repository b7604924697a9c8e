"""Policies -> returns; a run's policy for one's own code; facts about environments.

    returns = evaluation.evaluate(policy, "Hopper-v5", num_seeds=1, episodes=10)  # (1, 10)
    policy = evaluation.load_policy("runs/iql/...")
    action = policy(obs)  # obs (..., D) -> action (..., A) in [-1, 1]

`termination` tells a learned model where the real environment ends an episode. A trained run is
scored again, or filmed, by

    python -m common.evaluation runs/iql/...
    python -m common.evaluation runs/iql/... --video hopper.mp4
"""

from common.evaluation.environments import (
    Env,
    EvaluationError,
    goal_cell,
    inspect,
    make,
    mazes_installed,
)
from common.evaluation.policy import Policy, choose_seed, load, load_policy, recorded, stateless
from common.evaluation.rollout import evaluate
from common.evaluation.termination import termination

__all__ = [
    "Env",
    "EvaluationError",
    "Policy",
    "choose_seed",
    "evaluate",
    "goal_cell",
    "inspect",
    "load",
    "load_policy",
    "make",
    "mazes_installed",
    "recorded",
    "stateless",
    "termination",
]
