"""Draw what the tables of the tiny world say.

    python -m extras.measure.plots

writes two pictures beside this file from `tables.jsonl`: forest.png, each row's difference from
SynCoS with the paper's direction, and cost.png, coherence and fidelity against model evaluations.
The numbers drawn are kept in the PNGs' own text ("data"), where a test compares them with the file.
"""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from extras.measure import reproduce as R
from extras.models.tiny import TINY

FOLDER = Path(__file__).parent
TABLES = {  # the rows of `R.TABLES` by the paper's table
    "Table 1": ["Gen-L-Video", "FIFO-Diffusion"],
    "Table 2": ["w/o grounded timestep", "w/o fixed noise", "w/o t_min", "w/o structured prompt"],
    "Table 3": ["stage 2 alone", "CSD", "CSD, learning rate 1", "w/o stage 1", "w/o stage 2, its noise kept",
                "w/o stage 3"],
    "Table 5": ["DiTCtrl", "DiTCtrl, SDE"],
    "Settings": ["the paper's settings", "2 iterations", "1 iteration", "1 iteration, 20 steps"],
}  # fmt: skip
DIFFERENCES = ["subject consistency", "background consistency", "picture consistency", "local fidelity"]
FRONTIER = {  # SynCoS from its cheapest setting to the paper's: a line, with these words at its points
    "1 iteration, 20 steps": "1, 20 steps", "1 iteration": "1", "2 iterations": "2", "SynCoS": "5",
    "the paper's settings": "the paper's",
}  # fmt: skip
METHODS = ["Gen-L-Video", "w/o stage 2, its noise kept", "FIFO-Diffusion", "stage 2 alone", "CSD",
           "CSD, learning rate 1", "DiTCtrl", "DiTCtrl, SDE"]  # fmt: skip
AGAINST_COST = ["identities", "local fidelity", "distance x 1000"]
COLORS = {"reproduced": "tab:blue", "not reproduced": "tab:red", "not distinguishable": "0.55", None: "black"}


# --------------------------------------------------------------------------------------------------
# The numbers. Each: row -> measure -> a list that JSON keeps


def forest_points(videos: dict[str, list[dict]], rows: dict[str, tuple] = R.TABLES) -> dict:
    """Mean difference from SynCoS, its interval, the paper's difference and the verdict or None."""
    points = {}
    for name in (name for names in TABLES.values() for name in names if name in videos):
        points[name] = {}
        for measure in DIFFERENCES:
            values, pair = R.differences(videos, name, measure), R.papers_pair(rows[name], measure)
            papers = pair and round(pair[0] - pair[1], 4)
            points[name][measure] = [*rounded(values), papers, pair and R.verdict(values, papers)]
    return points


def cost_points(videos: dict[str, list[dict]]) -> dict:
    """Model evaluations, then mean and interval."""
    return {
        name: {m: [videos[name][0]["evaluations"], *rounded([v[m] for v in videos[name]])] for m in AGAINST_COST}
        for name in (*FRONTIER, *METHODS)
        if name in videos
    }


def rounded(values: list[float]) -> list[float]:
    return [round(x, 4) for x in R.bootstrap(values)]


# --------------------------------------------------------------------------------------------------
# The pictures


def draw_forest(points: dict) -> plt.Figure:
    """A row per table, a column per measure; shaded: the side of the paper's difference."""
    tables = {table: own for table, names in TABLES.items() if (own := [name for name in names if name in points])}
    figure, axes = plt.subplots(
        len(tables), len(DIFFERENCES), figsize=(12, 1.6 + 0.42 * len(points)), sharex=True, squeeze=False,
        height_ratios=[len(names) + 0.2 for names in tables.values()], layout="constrained",
    )  # fmt: skip
    reach = 1.08 * max(abs(x) for own in points.values() for point in own.values() for x in point[:3])
    for line, (table, names) in zip(axes, tables.items()):
        for axis, measure in zip(line, DIFFERENCES):
            axis.axvline(0, color="0.4", linewidth=0.8)
            for y, name in enumerate(names):
                mean, low, high, papers, verdict = points[name][measure]
                if papers:
                    axis.barh(y, reach if papers > 0 else -reach, 0.8, color="tab:blue", alpha=0.13)
                axis.plot([low, high], [y, y], color=COLORS[verdict], linewidth=2, solid_capstyle="butt")
                axis.plot(mean, y, "o", color=COLORS[verdict], markersize=5.5)
            axis.set(xlim=(-reach, reach), ylim=(len(names) - 0.45, -0.55), yticks=range(len(names)))
            axis.set_yticklabels(names if axis is line[0] else [])
            axis.tick_params(left=False)
            axis.spines[["top", "left", "right"]].set_visible(False)
        line[0].text(-0.03, 1.02, table, transform=line[0].transAxes, ha="right", fontweight="bold")
    for axis, measure in zip(axes[-1], DIFFERENCES):
        axis.set_xlabel(f"{measure},\ndifference from SynCoS")
    meanings = "in the paper's direction", "against it", "interval includes 0", "no number in the paper"
    handles = [plt.Line2D([], [], color=COLORS[v], marker="o", label=name) for v, name in zip(COLORS, meanings)]
    handles.append(plt.Rectangle((0, 0), 1, 1, color="tab:blue", alpha=0.13, label="side of the paper's difference"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def draw_cost(points: dict) -> plt.Figure:
    """A panel per measure, up is better. SynCoS's settings are a line; methods of nearly the same
    cost stand side by side."""
    figure, axes = plt.subplots(1, len(AGAINST_COST), figsize=(12, 4.1), layout="constrained")
    for axis, measure, better in zip(axes, AGAINST_COST, ("fewer", "more", "less")):
        own = {words: points[name][measure] for name, words in FRONTIER.items() if name in points}
        costs, means, lows, highs = zip(*own.values())
        bars = [[m - low for m, low in zip(means, lows)], [high - m for m, high in zip(means, highs)]]
        axis.errorbar(costs, means, bars, fmt="o-", color="C0", label="SynCoS by iterations", zorder=3)
        for words, (cost, _, low, high) in own.items():  # above the bars
            top = (cost, high if better == "more" else low)
            axis.annotate(words, top, (0, 3), textcoords="offset points", ha="center", fontsize=8, color="C0")
        taken = [*costs]
        for n, name in enumerate((name for name in METHODS if name in points), 1):
            cost, mean, low, high = points[name][measure]
            x = cost * 1.05 ** sum(0.97 < cost / other < 1.03 for other in taken)
            taken.append(cost)
            axis.errorbar(x, mean, [[mean - low], [high - mean]], fmt="oDs^vP*Xd"[n], color=f"C{n}", label=name)
        axis.set(xlabel="model evaluations (equal costs side by side)", title=f"{measure} ({better} is better)")
        axis.set(xscale="log", xticks=[250, 350, 500, 700, 1000], xticklabels=[250, 350, 500, 700, 1000])
        if better != "more":
            axis.invert_yaxis()
        if measure.startswith("distance"):
            axis.set(yscale="log", yticks=[2, 3, 5, 10, 15], yticklabels=[2, 3, 5, 10, 15])
        axis.margins(x=0.12)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


PICTURES: dict[str, tuple[Callable, Callable]] = {  # the numbers and the drawing of each
    "forest.png": (forest_points, draw_forest),
    "cost.png": (cost_points, draw_cost),
}


def missing(key: str, value: dict) -> None:
    raise SystemExit(f"tables.jsonl lacks {key!r}; run `python -m extras.measure.reproduce tables` with it first.")


def main() -> None:
    done = dict(map(json.loads, (FOLDER / "tables.jsonl").read_text().splitlines()))
    model = R.TinyModel(TINY.model, "float32")
    videos = R.measure_rows(model, range(*R.SEEDS["tables"]), R.TABLES, done, missing)
    for name, (numbers, draw) in PICTURES.items():
        draw(points := numbers(videos)).savefig(FOLDER / name, dpi=100, metadata={"data": json.dumps(points)})
        print(f"Wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
