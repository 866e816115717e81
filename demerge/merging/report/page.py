"""The report of one merge: a folder of tables, plots and a page, with the same bytes each time.

DIR is `report` inside an output folder, and comes into place with it. For a file it is NAME-report
next to the file, and exists before the file does. If an output has two denoisers, each has a folder
in DIR.

DIR/index.html                one page that loads nothing
DIR/diagnosis.json            every number, by model, block and tensor, see `report.diagnosis`
DIR/blocks.csv, tensors.csv   the same for spreadsheets
DIR/*.svg, *.png              lengths by block, agreement of the experts, what is kept of them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demerge.merging.blocks import block_of
from demerge.merging.recipe.recipe import Recipe
from demerge.merging.report.diagnosis import DIAGNOSIS, Diagnosis, Sums
from demerge.reporting.html import PageFigure, escape_formula, figure, render_page, section, table
from demerge.reporting.theme import KINDS, LIGHT, Theme, pictures, plain, styled

CAPTIONS = {
    "lengths": "Root mean square change of an entry, by block from input to output: each expert's, "
    "and the merge's (dashed).",
    "agreement": "Cosines of whole task vectors. Next to them, by block: the mean cosine of all "
    "pairs, and the share of the moved entries that experts move in both directions.",
    "kept": "By block: the share of entries in which the merge differs from the base, and the "
    "share of these that survives the dtype it is stored in.",
}
LEAD = (
    "|tau| is the length of a task vector, cosine the mean over all pairs, sign conflict the share "
    "of the moved entries whose signs conflict. Kept are the entries that the merge changes, "
    "survived those that still differ once rounded. The effective rank is 1 to K."
)
ROUNDED_AWAY = 0.9  # a share of surviving changes below this calls for a wider dtype
CONFLICT = 0.3  # a share of entries in conflict above this calls for a method that resolves it


def report_files(diagnosis: Diagnosis, recipe: Recipe, of: str = "") -> dict[str, bytes]:
    """Return the files of the report by name; `of` names an output that it does not lie in."""
    document = {**({"of": of} if of else {}), **diagnosis.document()}
    texts = {
        DIAGNOSIS: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "blocks.csv": to_csv(diagnosis.blocks),
        "tensors.csv": to_csv(diagnosis.tensors),
    }
    plots: dict[str, bytes] = {}
    figures = []
    for draw in (lengths, agreement, kept):
        name = draw.__name__
        plot = pictures(partial(draw, diagnosis))
        plots |= {f"{name}.svg": plot.svg, f"{name}.png": plot.png}
        figures.append(PageFigure(CAPTIONS[name], plot.svg, dark=plot.dark))
    texts["index.html"] = _page(diagnosis, recipe, figures)
    return {name: text.encode() for name, text in texts.items()} | plots


def finding(sums: Sums) -> str:
    """Return what the merge did, and what to do next."""
    shares = {name: f"{share:.1%}" for name, share in sums.shares.items()}
    text = (
        f"The merge changes {shares['kept']} of the weights, and {shares['survived']} of these "
        f"changes survive rounding. The experts disagree in sign on {shares['sign_conflict']} of "
        "the weights that they move. "
    )
    if sums.shares["survived"] < ROUNDED_AWAY:
        return text + "Merge again with --save-dtype float32, which keeps all changes."
    if sums.shares["sign_conflict"] > CONFLICT:
        return text + "Try --method ties or consensus, which resolve such conflicts."
    return text + "Score the result with demerge evaluate."


def _page(diagnosis: Diagnosis, recipe: Recipe, figures: Sequence[PageFigure]) -> str:
    experts = []
    for i, (name, weight) in enumerate(zip(diagnosis.experts, recipe.weights or (), strict=True)):
        span, norm = recipe.experts[i].range or "-", diagnosis.model.norms[i]
        experts.append([i, name, span, f"{weight:g}", f"{norm:.4g}"])
    lead = (
        f"{recipe.method} of {len(recipe.experts)} experts into {recipe.base.name}, "
        f"seed {recipe.seed}."
    )
    heads = ["", "expert", "timesteps", "weight", "|tau|"]
    sections = [
        section("Experts", lead, table(heads, experts, texts=3)),
        section("Plots", "", "".join(map(figure, figures))),
        section("Blocks", LEAD, _blocks_table([diagnosis.model, *diagnosis.blocks])),
    ]
    if recipe.rules:
        rules = [[str(rule)] for rule in recipe.rules[:100]]
        lead = "The first rule that matches a tensor wins."
        sections.append(section("Rules", lead, table(["rule"], rules)))
    footer = (
        "Made by demerge. All numbers, of every tensor too, are next to this page as CSV and JSON."
    )
    return render_page("What the merge did", finding(diagnosis.model), sections, footer)


def _blocks_table(rows: Sequence[Sums]) -> str:
    data = frame(rows)
    shares = data[["sign_conflict", "kept", "survived"]].map("{:.1%}".format)
    cells = pd.DataFrame(
        {
            "block": data["name"],
            "entries": data["entries"].map("{:,}".format),
            "|tau|": [" ".join(f"{norm:.3g}" for norm in row.norms) for row in rows],
            "cosine": mean_cosine(data).map("{:.3f}".format),
            "sign conflict": shares["sign_conflict"],
            "kept": shares["kept"],
            "survived": shares["survived"],
            "|merged - base|": data["distance"].map("{:.3g}".format),
            "effective rank": data["effective_rank"].map("{:.2f}".format),
        }
    )
    return table([*map(str, cells.columns)], cells.to_numpy().tolist())


def frame(rows: Sequence[Sums]) -> pd.DataFrame:
    """Return one row for each tensor or block: norm_i, cos_j_i, the shares, distance, rank."""
    records = []
    for row in rows:
        record: dict[str, object] = {"name": row.name, "block": block_of(row.name)}
        record["entries"] = row.entries
        record |= {f"norm_{i}": norm for i, norm in enumerate(row.norms)}
        for i, cosines in enumerate(row.cosines):
            record |= {f"cos_{j}_{i}": cosines[j] for j in range(i)}
        record |= row.shares | {"distance": row.distance, "effective_rank": row.effective_rank}
        records.append(record)
    return pd.DataFrame(records)


def to_csv(rows: Sequence[Sums]) -> str:
    """Return the frame as CSV, in which no name is a formula."""
    data = frame(rows)
    for column in ("name", "block"):
        data[column] = data[column].map(escape_formula)
    text: str = data.to_csv(index=False, float_format="%.9g", lineterminator="\n")
    return text


def mean_cosine(data: pd.DataFrame) -> pd.Series[float]:
    """Return the mean cosine of all pairs of experts in each row; 1 for a single expert."""
    return data.filter(regex="^cos_").mean(axis=1).fillna(1.0)


@styled
def lengths(diagnosis: Diagnosis, theme: Theme = LIGHT) -> Figure:
    """Draw the root mean square of each expert's task vector, and the merge's, by block."""
    figure, (axes,) = _axes(1, len(diagnosis.blocks))
    data = frame(diagnosis.blocks).set_index("name")
    rms = data.filter(regex="^norm_|^distance$").div(data["entries"] ** 0.5, axis=0)
    rms.columns = pd.Index(
        [*(f"{i}  {plain(n)}" for i, n in enumerate(diagnosis.experts)), "merged"]
    )
    merged = rms.pop("merged")
    colors = sns.color_palette("colorblind", len(diagnosis.experts))
    sns.lineplot(rms, ax=axes, palette=colors, markers=True, dashes=False)
    axes.plot(merged, color=KINDS["merge"], ls="--", lw=2, label="merged")
    _label(axes, diagnosis, theme)
    axes.set(ylabel="root mean square change", ylim=(0, None))
    return figure


@styled
def agreement(diagnosis: Diagnosis, theme: Theme = LIGHT) -> Figure:
    """Draw the cosines of whole task vectors, and mean cosine and sign conflict by block."""
    figure, (left, right) = _axes(2, len(diagnosis.blocks))
    sns.heatmap(
        pd.DataFrame(np.array(diagnosis.model.cosines)),
        ax=left,
        cmap=theme.maps,
        vmin=-1,
        vmax=1,
        annot=len(diagnosis.experts) <= 10,
        fmt=".2f",
        square=True,
        cbar_kws={"label": "cosine", "shrink": 0.8},
    )
    left.set(xlabel="expert", ylabel="expert")
    data = frame(diagnosis.blocks)
    first, second = sns.color_palette("colorblind", 2)
    right.plot(data["name"], mean_cosine(data), "o-", color=first, label="mean cosine")
    right.plot(data["name"], data["sign_conflict"], "s--", color=second, label="sign conflict")
    right.axhline(0, color=theme.line, lw=1, zorder=0)
    _label(right, diagnosis, theme)
    return figure


@styled
def kept(diagnosis: Diagnosis, theme: Theme = LIGHT) -> Figure:
    """Draw the share of entries that the merge changes, and what of it survives the rounding."""
    figure, (axes,) = _axes(1, len(diagnosis.blocks))
    data = frame(diagnosis.blocks).melt("name", ["kept", "survived"], "share")
    colors = sns.color_palette("colorblind", 2)
    sns.barplot(data, x="name", y="value", hue="share", palette=colors, ax=axes)
    for bar in axes.containers[1]:
        bar.set_hatch("//")  # told apart in grey, too
        bar.set_edgecolor("white")
    _label(axes, diagnosis, theme)
    axes.set(ylabel="share", ylim=(0, 1.05))
    return figure


def _axes(columns: int, blocks: int) -> tuple[Figure, list[Axes]]:
    width = max(6.4, min(14.0, 3.2 + 0.34 * blocks)) + 4.4 * (columns - 1)
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _label(axes: Axes, diagnosis: Diagnosis, theme: Theme) -> None:
    """Name the lines above the plot, and at most 40 blocks on the axis, from input to output."""
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, min(len(labels), 90 // (4 + max(map(len, labels)))))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
    )
    count = len(diagnosis.blocks)
    shown = range(0, count, -(-count // 40))
    names = [plain(diagnosis.blocks[i].name) for i in shown]
    axes.set_xticks(list(shown), names, rotation=60 if count > 8 else 0)
    axes.set_xlabel("block, from input to output")
    axes.grid(axis="y", color=theme.line, lw=0.6, alpha=0.7)
