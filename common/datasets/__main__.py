"""Shows what is in a dataset as a table and a picture: python -m common.datasets NAME."""

from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import datasets
from common.experiment import files, plots, printable, runtime


def show(data):
    """Prints a Dataset as a table."""
    table = Table(title=Text(printable(data.name)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in facts(data):
        table.add_row(Text(printable(title)), Text(printable(text)))  # untrusted
    Console().print(table)


def facts(data) -> list[tuple[str, str]]:
    """[(title, text)] of the rows of the table, for a Dataset."""
    returns, origin = data.returns(), data.provenance
    terminals, episodes = int(data.done.sum()), len(data.start)
    known = {True: "as published", False: "NOT as published", None: "no published hash"}
    scored = data.ref_min is not None
    rows = [
        ("transitions", f"{len(data.obs):,}"),
        ("episodes", f"{episodes:,}"),
        ("episode ends", f"{terminals:,} terminal, {episodes - terminals:,} time limit or cut off"),
        ("episode length", spread(data.length, "{:,.0f}")),
        ("return", spread(returns, "{:,.1f}")),
        ("normalised score", spread(data.score(returns), "{:.1f}") if scored else "no references"),
        ("references", f"0 is {data.ref_min:g}, 100 is {data.ref_max:g}" if scored else "none"),
        ("scored on", data.env_id or "nothing; --env-id names an environment"),
        ("reward", spread(data.reward, "{:.3g}")),
        (width("obs", data.obs), ranges(data.obs)),
        choices(data) if data.num_actions else (width("action", data.action), ranges(data.action)),
        ("file", f"{origin['file']} ({origin['layout']} layout, {origin['source']})"),
        ("SHA-256", f"{origin['sha256']} ({known[origin['verified']]})"),
    ]
    for title, value in origin["metadata"].items():
        nested = value if isinstance(value, dict) else {"": value}
        rows += [(f"{title} {key}".strip(), str(item)) for key, item in nested.items()]
    return rows


def spread(values, form):
    """Mean, deviation, range and quartiles of values (N,) in words; form: of one number."""
    low, first, middle, third, high = map(form.format, np.percentile(values, [0, 25, 50, 75, 100]))
    mean, std = form.format(values.mean()), form.format(values.std())
    return f"{mean} +- {std}   min {low}, quartiles {first} | {middle} | {third}, max {high}"


def choices(data):
    """(title, shares of the discrete actions in words) of a Dataset."""
    shares = np.bincount(data.action, minlength=data.num_actions) / len(data.action)
    text = "  ".join(f"{i}: {share:.1%}" for i, share in enumerate(shares))
    return f"action ({data.num_actions} discrete)", text


def width(name, values):
    """The title of values (N, D)."""
    return f"{name} ({values.shape[1]})"


def ranges(values):
    """Range of each column of values (N, D) in words."""
    pairs = zip(values.min(0), values.max(0), strict=True)
    return "  ".join(f"[{low:.3g}, {high:.3g}]" for low, high in pairs)


def draw(data, path):
    """Draws histograms of returns, episode lengths, rewards and actions of a Dataset to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise datasets.DatasetError(f"--plot {path}: the name must end in .{', .'.join(known)}.")
    axes = figure.subplots(2, 2)
    title = f"{data.name}: {len(data.obs):,} transitions, {len(data.start):,} episodes"
    figure.suptitle(printable(title), parse_math=False)
    returns = data.returns()
    panels = {
        "undiscounted return of an episode": returns,
        "length of an episode": data.length,
        "reward of a step": data.reward,
    }
    for axis, (label, values) in zip(axes.flat, panels.items(), strict=False):
        axis.hist(values, 60, color="tab:blue")
        axis.axvline(values.mean(), color="tab:red", label=f"mean {values.mean():,.4g}")
        axis.set(xlabel=label, ylabel="count")
        axis.ticklabel_format(axis="x", useOffset=False)
        axis.legend(loc="upper right")
    if data.ref_min is not None:
        score = axes[0, 0].secondary_xaxis("top", functions=scales(data))
        score.set_xlabel("normalised score")
    if data.num_actions:
        axes[1, 1].hist(data.action, np.arange(data.num_actions + 1) - 0.5, rwidth=0.8)
        axes[1, 1].set(xlabel="action", ylabel="count")
    else:
        for i, column in enumerate(data.action.T):
            axes[1, 1].hist(column, 60, range=(-1, 1), histtype="step", label=f"{i}")
        axes[1, 1].set(xlabel="action, by dimension", ylabel="count")
    if not data.num_actions and data.action.shape[1] <= 10:
        axes[1, 1].legend(ncols=2, loc="upper right")
    with plots.any_text():
        figure.savefig(path, dpi=120)


def scales(data):
    """(the function from return to score, its inverse)."""
    width = data.ref_max - data.ref_min
    return data.score, lambda score: data.ref_min + np.asarray(score) / 100 * width


def main(
    name: tyro.conf.Positional[str],
    env_id: str = "",
    plot: Path | None = None,
    env_module: str = "",
):
    """Show what is in a dataset.

    Args:
        name: D4RL name, Minari id or .hdf5 file, as for --env of an algorithm
        env_id: Gymnasium id to score an .hdf5 file on
        plot: .png file to draw histograms of returns, lengths, rewards and actions to
        env_module: Python module of yours to import, which registers the environment
    """
    runtime.open_streams()
    runtime.end_at_interrupt()
    runtime.import_own(env_module)
    data = datasets.load(name, env_id)
    show(data)
    if plot:
        with files.asked_for("--plot", plot):
            draw(data, plot)


if __name__ == "__main__":
    tyro.cli(main)
