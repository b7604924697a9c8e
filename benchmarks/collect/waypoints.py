"""D4RL's waypoint controller for PointMaze, and the data of one long walk under it.

It walks the shortest way through the grid, from the middle of one cell to that of the next, by

    a = clip(10 (waypoint - position) - velocity, -1, 1)

and where it arrives it draws the next target: the data say how to get about in the maze, and not
how to get to any one goal (Fu et al. 2020, arXiv:2004.07219).
"""

import numpy as np

NEAR = 0.1  # metres from a waypoint that count as being there
NOISE = 0.1  # metres, the most that a waypoint is off the middle of its cell, each way


def route(walls, start, goal):
    """Cells (row, column) from start, which is left out, to goal, by a breadth-first search.

    walls: the maze's rows; 1 is a wall. Raises ValueError where there is no way.
    """
    came_from, queue = {start: None}, [start]
    for row, column in queue:
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if cell not in came_from and walls[cell[0]][cell[1]] != 1:
                came_from[cell] = row, column
                queue.append(cell)
    if goal not in came_from:
        raise ValueError(f"no way from {start} to {goal}")
    way = []
    while goal != start:
        way.append(goal)
        goal = came_from[goal]
    return way[::-1]


class Walker:
    """The controller in one maze. Targets are drawn cells, or always the cell `goal`."""

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
    """One walk without a reset, rows (obs, action, reward, next_obs), each stacked.

    The reward is that of the environment's own goal, which the controller does not know.
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
    """Of whole episodes, (episodes,): to the cell `goal` by the controller, else at random."""
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
