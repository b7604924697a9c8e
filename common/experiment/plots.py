"""The learning curve of a run."""

import io
import warnings
from contextlib import contextmanager

import numpy as np

from common.experiment import files


@contextmanager
def any_text():
    """Nothing is said of characters that the font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def plot(path, title, columns, levels):
    """Writes a PNG: the score (or return) by updates, and below it all metrics that start with q.

    columns: {name: (T, S)} as in metrics.csv, `step` among them. levels: {label: score or return}
    of dashed lines. Thin lines are seeds, the thick line is their mean, the band their range.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    outcome = "score" if np.isfinite(columns["score"]).any() else "return_mean"
    panels = [[outcome], [name for name in columns if name.startswith("q")]]
    panels = [names for names in panels if any(np.isfinite(columns[x]).any() for x in names)]
    if not panels:
        return
    labels = {"score": "normalised score", "return_mean": "return of an episode"}
    heights = [3.2, 2.2][: len(panels)]
    options = {"figsize": (7.2, sum(heights) + 1), "height_ratios": heights}
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, squeeze=False, **options)
    step = columns["step"][:, 0]
    for names, axis in zip(panels, axes[:, 0], strict=True):
        for i, name in enumerate(names):
            seen = np.isfinite(columns[name]).any(1)  # scores come with evaluations alone
            x, y, color = step[seen], columns[name][seen], f"C{i}"
            seeds = f"policy, mean of {y.shape[1]} seeds" if y.shape[1] > 1 else "policy"
            label = seeds if name == outcome else name
            axis.plot(x, y, color=color, lw=0.8, alpha=0.4 if y.shape[1] > 1 else 0)
            marker = "o" if len(x) < 30 else None
            axis.plot(x, y.mean(1), color=color, lw=2, marker=marker, ms=4, label=label)
            axis.fill_between(x, y.min(1), y.max(1), color=color, alpha=0.15, lw=0)
        if names == [outcome]:
            for (label, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
                axis.axhline(level, color="0.35", ls=style, lw=1.3, label=f"{label}, {level:,.1f}")
        axis.set_ylabel(labels.get(names[0], "Q-value"))
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        axis.legend(frameon=False, loc="lower right", fontsize=9)
    title = files.printable(title)  # a dataset's name: no formula, and not in every font
    axes[0, 0].set_title(title, loc="left", fontsize=11, parse_math=False)
    axes[-1, 0].set_xlabel("gradient updates")
    axes[-1, 0].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    picture = io.BytesIO()
    with any_text():
        figure.tight_layout()
        figure.savefig(picture, dpi=150, format="png")
    files.write(path, picture.getvalue())
    pyplot.close(figure)
