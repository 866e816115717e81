"""The report of one merge: a folder of tables, plots and a page, each the same bytes for the same merge.

DIR is `report` inside an output folder, and comes into place with it; a file has NAME-report beside it, which is there before
the file is. Where an output has two denoisers, each has a folder in DIR.

DIR/index.html                one page that loads nothing
DIR/diagnosis.json            every number, by model, block and tensor; `demerge.merging.report.diagnosis` says what they are
DIR/blocks.csv, tensors.csv   the same for spreadsheets
DIR/*.svg, *.png              lengths by block, agreement of the experts, what is kept of their changes
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

from demerge.merging.recipe.recipe import Recipe
from demerge.merging.report.diagnosis import DIAGNOSIS, Diagnosis, Sums, table
from demerge.reporting.html import PageFigure, escape_formula, figure, render_page, section
from demerge.reporting.html import table as html_table
from demerge.reporting.theme import KINDS, LIGHT, Theme, pictures, plain, styled

CAPTIONS = {
    "lengths": "Root mean square change of an entry, by block from input to output: each expert's, and the merge's (dashed).",
    "agreement": "Cosines of whole task vectors; beside them, by block, the mean cosine of all pairs and the share of the "
    "moved entries that experts move in both directions.",
    "kept": "By block: the share of entries in which the merge differs from the base, and the share of these that survives the "
    "dtype it is stored in.",
}
LEAD = (
    "Length of the task vectors |tau|, mean cosine of their pairs, share of the moved entries where signs conflict, shares of "
    "entries kept and surviving, length of the merged change, effective rank of the task vectors (1 to K)."
)


def report_files(diagnosis: Diagnosis, recipe: Recipe, of: str = "") -> dict[str, bytes]:
    """Return the files of the report by their names; `of` is the name of an output that it does not lie in."""
    drawn = {
        plot.__name__: pictures(partial(plot, diagnosis)) for plot in (lengths, agreement, kept)
    }
    document = {**({"of": of} if of else {}), **diagnosis.document()}
    exhibits = [
        PageFigure(CAPTIONS[name], plot.svg, dark=plot.dark) for name, plot in drawn.items()
    ]
    files = {
        DIAGNOSIS: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "blocks.csv": table(diagnosis.blocks, escape_formula),
        "tensors.csv": table(diagnosis.tensors, escape_formula),
        "index.html": _page(diagnosis, recipe, exhibits),
    }
    plots = {f"{name}.svg": plot.svg for name, plot in drawn.items()}
    plots |= {f"{name}.png": plot.png for name, plot in drawn.items()}
    return {name: text.encode() for name, text in files.items()} | plots


def _page(diagnosis: Diagnosis, recipe: Recipe, exhibits: Sequence[PageFigure]) -> str:
    subtitle = f"{recipe.method} of {len(recipe.experts)} experts into {recipe.base.name}, seed {recipe.seed}"
    spans = [expert.range or "-" for expert in recipe.experts]
    experts = zip(
        diagnosis.experts, spans, recipe.weights or (), diagnosis.model.norms, strict=True
    )
    rows = [
        [i, name, span, f"{weight:g}", f"{norm:.4g}"]
        for i, (name, span, weight, norm) in enumerate(experts)
    ]
    rules = [[str(rule)] for rule in recipe.rules[:100]]
    sections = [
        section(
            "Experts", "", html_table(["", "expert", "timesteps", "weight", "|tau|"], rows, texts=3)
        ),
        section("Plots", "", "".join(map(figure, exhibits))),
        section(
            "Blocks",
            LEAD,
            html_table(HEADS, [_line(s) for s in [diagnosis.model, *diagnosis.blocks]]),
        ),
        section("Rules", "The first that matches a tensor wins.", html_table(["rule"], rules))
        if rules
        else "",
    ]
    footer = "Made by demerge. The same numbers, and those of every tensor, lie beside this page as CSV and JSON."
    return render_page("What the merge did", subtitle, sections, footer)


HEADS = (
    "block",
    "entries",
    "|tau|",
    "cosine",
    "sign conflict",
    "kept",
    "survived",
    "|merged - base|",
    "effective rank",
)


def _line(sums: Sums) -> list[object]:
    norms = " ".join(f"{norm:.3g}" for norm in sums.norms)
    shares = [f"{share:.1%}" for share in sums.shares.values()]
    return [
        sums.name,
        f"{sums.entries:,}",
        norms,
        f"{_mean_cosine(sums):.3f}",
        *shares,
        f"{sums.squares**0.5:.3g}",
        f"{sums.effective_rank:.2f}",
    ]


@styled
def lengths(diagnosis: Diagnosis, theme: Theme = LIGHT) -> Figure:
    """Draw the root mean square of each task vector by block, one line for each expert, and the merge's."""
    figure, (axes,) = _axes(1, len(diagnosis.blocks))
    labels = [f"{i}  {plain(name)}" for i, name in enumerate(diagnosis.experts)]
    values = {
        block.name: [norm / block.entries**0.5 for norm in [*block.norms, block.squares**0.5]]
        for block in diagnosis.blocks
    }
    frame = pd.DataFrame(values, index=[*labels, "merged"]).T
    sns.lineplot(
        frame[labels],
        ax=axes,
        palette=sns.color_palette("colorblind", len(labels)),
        markers=True,
        dashes=False,
    )
    axes.plot(frame["merged"], color=KINDS["merge"], ls="--", lw=2, label="merged")
    _legend(axes, theme)
    _blocks(axes, diagnosis, theme)
    axes.set(ylabel="root mean square change", ylim=(0, None))
    return figure


@styled
def agreement(diagnosis: Diagnosis, theme: Theme = LIGHT) -> Figure:
    """Draw the cosines of whole task vectors; beside them mean cosine and sign conflict by block."""
    figure, (left, right) = _axes(2, len(diagnosis.blocks))
    K = len(diagnosis.experts)
    sns.heatmap(
        pd.DataFrame(np.array(diagnosis.model.cosines)),
        ax=left,
        cmap=theme.maps,
        vmin=-1,
        vmax=1,
        annot=K <= 10,
        fmt=".2f",
        square=True,
        cbar_kws={"label": "cosine", "shrink": 0.8},
    )
    left.set(xlabel="expert", ylabel="expert")
    colors = sns.color_palette("colorblind", 2)
    names = [block.name for block in diagnosis.blocks]
    right.plot(
        names,
        [_mean_cosine(block) for block in diagnosis.blocks],
        "o-",
        color=colors[0],
        label="mean cosine",
    )
    conflict = [block.shares["sign_conflict"] for block in diagnosis.blocks]
    right.plot(names, conflict, "s--", color=colors[1], label="sign conflict")
    right.axhline(0, color=theme.line, lw=1, zorder=0)
    _legend(right, theme)
    _blocks(right, diagnosis, theme)
    return figure


@styled
def kept(diagnosis: Diagnosis, theme: Theme = LIGHT) -> Figure:
    """Draw the share of entries that the merge changes, and of those the share that survives the rounding, by block."""
    figure, (axes,) = _axes(1, len(diagnosis.blocks))
    wide = pd.DataFrame(
        {block.name: [block.shares["kept"], block.shares["survived"]] for block in diagnosis.blocks}
    ).T
    wide.columns = pd.Index(["kept", "survived"])
    long = (
        wide.rename_axis("block")
        .melt(ignore_index=False, var_name="share", value_name="value")
        .reset_index()
    )
    sns.barplot(
        long, x="block", y="value", hue="share", palette=sns.color_palette("colorblind", 2), ax=axes
    )
    for bars in axes.containers[1:]:
        for bar in bars:
            bar.set_hatch("//")  # told apart in grey, too
            bar.set_edgecolor("white")
    _legend(axes, theme)
    _blocks(axes, diagnosis, theme)
    axes.set(ylabel="share", ylim=(0, 1.05))
    return figure


def _axes(columns: int, blocks: int) -> tuple[Figure, list[Axes]]:
    width = min(14.0, 3.2 + 0.34 * blocks)
    figure = Figure(figsize=(max(6.4, width) + 4.4 * (columns - 1), 3.8), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _legend(axes: Axes, theme: Theme) -> None:
    """Name the lines above the plot, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 90 // (4 + max(map(len, labels)))))
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
    )


def _blocks(axes: Axes, diagnosis: Diagnosis, theme: Theme) -> None:
    """Name at most 40 blocks on the axis, from input to output."""
    count = len(diagnosis.blocks)
    shown = range(0, count, -(-count // 40))
    axes.set_xticks(
        list(shown),
        [plain(diagnosis.blocks[i].name) for i in shown],
        rotation=60 if count > 8 else 0,
    )
    axes.set_xlabel("block, from input to output")
    axes.grid(axis="y", color=theme.line, lw=0.6, alpha=0.7)


def _mean_cosine(sums: Sums) -> float:
    """Return the mean cosine of all pairs; 1 for a single expert."""
    K = len(sums.cosines)
    pairs = [sums.cosines[i][j] for i in range(K) for j in range(i)]
    return sum(pairs) / len(pairs) if pairs else 1.0
