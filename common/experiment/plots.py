"""The picture and the statistics of a run."""

import numpy as np


def units(x):
    """What x (S, E) has to be counted: each seed's mean of its episodes; of one seed, these."""
    return x.mean(1) if len(x) > 1 else x[0]


def interval(x, size=2000):
    """(low, high): 95 % bootstrap interval of the mean of x (S, E), its `units` redrawn."""
    x = units(x)
    drawn = np.random.default_rng(0).integers(len(x), size=(size, len(x)))
    return np.percentile(x[drawn].mean(1), [2.5, 97.5])


def iqm(x):
    """Interquartile mean: of the middle half of all values."""
    x = np.sort(x, axis=None)
    return x[x.size // 4 : x.size - x.size // 4].mean()


def summary(x):
    """Words for the outcomes x (S, E) of E episodes of S seeds."""
    (low, high), (s, e) = interval(x), x.shape
    parts = f"IQM {iqm(units(x)):.1f}, 95 % interval {low:.1f} to {high:.1f}"
    return f"{x.mean():.1f} ({parts}, {s} seed{'s' * (s > 1)} x {e} episode{'s' * (e > 1)})"


def plot(path, title, columns, levels):
    """PNG: score (or return) against updates, and below it every metric whose name starts with q.

    columns: {name: (T, S)} as in metrics.csv, `step` among them. levels: {label: return or score}
    to mark. Thin lines are seeds, the thick one their mean, the band from the worst to the best.
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
            y, color = columns[name], f"C{i}"
            seeds = f"policy, mean of {y.shape[1]} seeds" if y.shape[1] > 1 else "policy"
            label = seeds if name == outcome else name
            axis.plot(step, y, color=color, lw=0.8, alpha=0.4 if y.shape[1] > 1 else 0)
            marker = "o" if len(step) < 30 else None
            axis.plot(step, y.mean(1), color=color, lw=2, marker=marker, ms=4, label=label)
            axis.fill_between(step, y.min(1), y.max(1), color=color, alpha=0.15, lw=0)
        if names == [outcome]:
            for (label, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
                axis.axhline(level, color="0.35", ls=style, lw=1.3, label=f"{label}, {level:,.1f}")
        axis.set_ylabel(labels.get(names[0], "Q-value"))
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        axis.legend(frameon=False, loc="lower right", fontsize=9)
    axes[0, 0].set_title(title, loc="left", fontsize=11)
    axes[-1, 0].set_xlabel("gradient updates")
    axes[-1, 0].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
