"""Evaluates policies in Gymnasium environments, and loads trained ones.

    returns = evaluation.evaluate(policy, "Hopper-v5", num_seeds=1, episodes=10)  # (1, 10)
    policy = evaluation.load_policy("runs/iql/...")
    action = policy(obs)  # obs (..., D) -> action (..., A) in [-1, 1]

A `Collector` steps environments one step at a time, for training with them. `termination` tells a
learned model where the real environment ends an episode. These commands score a trained run again,
film it, and export its policy:

    python -m common.evaluation runs/iql/...
    python -m common.evaluation runs/iql/... --video hopper.mp4
    python -m common.evaluation runs/iql/... --export policy.npz
"""

from common.evaluation.collector import Collector, alternate
from common.evaluation.environments import (
    Env,
    EvaluationError,
    goal_cell,
    inspect,
    make,
    named,
)
from common.evaluation.policy import Policy, choose_seed, load, load_policy, recorded, stateless
from common.evaluation.rollout import evaluate, outcomes
from common.evaluation.termination import termination

__all__ = [
    "Collector",
    "Env",
    "EvaluationError",
    "Policy",
    "alternate",
    "choose_seed",
    "evaluate",
    "goal_cell",
    "inspect",
    "load",
    "load_policy",
    "make",
    "named",
    "outcomes",
    "recorded",
    "stateless",
    "termination",
]
