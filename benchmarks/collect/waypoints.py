"""D4RL's waypoint controller for PointMaze, and the data of one long walk (arXiv:2004.07219).

The controller follows the shortest path through the grid, from the middle of one cell to the next:

    a = clip(10 (waypoint - position) - velocity, -1, 1)

At its target it draws the next one. So the data cover the maze but not the way to a given goal.
"""

import numpy as np

NEAR = 0.1  # metres from a waypoint that count as reached
NOISE = 0.1  # metres, largest offset of a waypoint from the middle of its cell on each axis


def route(walls, start, goal):
    """The shortest path: cells (row, column) after `start` up to `goal`, by breadth-first search.

    walls: rows of the maze; 1 is a wall. Raises ValueError if there is no path.
    """
    came_from, queue = {start: None}, [start]
    for row, column in queue:
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if cell not in came_from and walls[cell[0]][cell[1]] != 1:
                came_from[cell] = row, column
                queue.append(cell)
    if goal not in came_from:
        raise ValueError(f"no path from {start} to {goal}")
    way = []
    while goal != start:
        way.append(goal)
        goal = came_from[goal]
    return way[::-1]


class Walker:
    """The controller in one maze. Targets are random cells, or always the cell `goal`."""

    def __init__(self, env, rng, goal=None):
        self._maze, self._rng, self._goal = env.unwrapped.maze, rng, goal
        walls = self._maze.maze_map
        self._free = [(i, j) for i, row in enumerate(walls) for j, x in enumerate(row) if x != 1]
        self._way = []

    def _middle(self, cell):
        return self._maze.cell_rowcol_to_xy(np.array(cell))

    def _plan(self, position):
        here = tuple(int(i) for i in self._maze.cell_xy_to_rowcol(position))
        there = self._goal or self._free[self._rng.integers(len(self._free))]
        cells = route(self._maze.maze_map, here, there) or [there]
        way = [self._middle(cell) + self._rng.uniform(-NOISE, NOISE, 2) for cell in cells]
        return way if self._goal is None else [*way[:-1], self._middle(there)]

    def __call__(self, obs):
        """The action (2,) at obs (x, y, vx, vy, ...)."""
        position, velocity = obs[:2], obs[2:4]
        if self._way and np.linalg.norm(self._way[0] - position) < NEAR:
            self._way.pop(0)
        self._way = self._way or self._plan(position)
        return np.float32((10 * (self._way[0] - position) - velocity).clip(-1, 1))


def walk(env, num_steps, seed):
    """One walk without a reset: stacked obs, action, reward, next_obs.

    The reward is for the environment's own goal, which the controller does not use.
    """
    walker, rows = Walker(env, np.random.default_rng(seed)), []
    obs, _ = env.reset(seed=seed)
    for _ in range(num_steps):
        action = walker(obs)
        next_obs, reward, *_ = env.step(action)
        rows.append((obs, action, np.float32(reward), next_obs))
        obs = next_obs
    return [np.stack(column) for column in zip(*rows, strict=True)]


def returns(env, episodes, seed, goal=None):
    """Returns (episodes,) of the controller walking to the cell `goal`; None: uniform actions."""
    rng, found = np.random.default_rng(seed), []
    for i in range(episodes):
        walker, total, over = Walker(env, rng, goal), 0.0, False
        obs, _ = env.reset(seed=seed + i)
        while not over:
            action = rng.uniform(-1, 1, 2).astype(np.float32) if goal is None else walker(obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        found.append(total)
    return np.array(found)
