"""The report's pictures: inline SVG by matplotlib, coloured by the page.

Every colour that matplotlib writes is a stand-in which svg() replaces by a variable of the page's style
sheet, so one picture serves light and dark. Text stays text and takes the page's font.
"""

import io
import math
import re

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

INK, FAINT, LINE, FIRST, SECOND = "#010101", "#010102", "#010103", "#010104", "#010105"
SHADES = [f"#0101{16 + step:02x}" for step in range(9)]
VARIABLES = {INK: "--ink", FAINT: "--faint", LINE: "--line", FIRST: "--first", SECOND: "--second"}
VARIABLES |= {shade: f"--shade-{step}" for step, shade in enumerate(SHADES)}

plt.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "espalier", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.labelcolor": FAINT, "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": FAINT, "ytick.labelcolor": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": False, "grid.color": LINE, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlecolor": FAINT,
})


def svg(figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Attributes cannot hold var(); style declarations can, and matplotlib writes those.
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="width:100%;max-width:\2pt;height:auto"',
                  text, count=1)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def bars(names: list[str], values: list[float], labels: list[str], description: str, colour: str = FIRST) -> str:
    """Horizontal bars from zero, the first on top, each with its value at its end. Where the greatest is more
    than thirty times the least the axis is logarithmic, and then starts below the least instead of at zero."""
    figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(names) + 0.35))
    logarithmic = len(values) > 1 and min(values) > 0 and max(values) > 30 * min(values)
    left = 10 ** math.floor(math.log10(min(values)) - 0.01) if logarithmic else 0
    positions = range(len(names))
    axes.barh(positions, [value - left for value in values], left=left, height=0.62, color=colour)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlabel("logarithmic axis")
    axes.set_xlim(left, max(values) * (3 if logarithmic else 1.16) or 1)
    axes.set_yticks(positions, names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    for position, (value, label) in enumerate(zip(values, labels)):
        axes.annotate(label, (value, position), xytext=(4, 0), textcoords="offset points", va="center")
    if not logarithmic:
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return svg(figure, description)


def grid(values: dict[str, list[float | None]], title: str, description: str, percent: bool) -> str:
    """Matrix kinds as rows, blocks as columns, nine shades from the least value to the greatest."""
    kinds = list(values)
    blocks = max(map(len, values.values()))
    known = [value for row in values.values() for value in row if value is not None]
    low, high = min(known), max(known)
    spread = high - low if high > low else max(abs(high), 1.0) * 1e-9
    figure, axes = plt.subplots(figsize=(7.2, 0.27 * len(kinds) + 0.75))
    cells = [[math.nan if value is None else value for value in row] + [math.nan] * (blocks - len(row))
             for row in values.values()]
    mesh = axes.pcolormesh(cells, cmap=ListedColormap(SHADES), vmin=low, vmax=low + spread, edgecolors="none")
    mesh.set_antialiased(False)
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    axes.invert_yaxis()
    step = max(1, math.ceil(blocks / 16))
    axes.set_xticks([block + 0.5 for block in range(0, blocks, step)], range(0, blocks, step))
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    axes.set_title(title)
    scale = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.02, aspect=max(8, 2 * len(kinds)))
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0)
    if high > low:
        digits = max(0, 1 - math.floor(math.log10(spread * (100 if percent else 1))))
        ticks = [low, (low + high) / 2, high]
    else:
        digits, ticks = 1, [low]
    if all(value == round(value) for value in known) and not percent:
        digits, ticks = 0, sorted({low, round((low + high) / 2), high})
    scale.set_ticks(ticks, labels=[f"{100 * tick:.{digits}f} %" if percent else f"{tick:.{digits}f}" for tick in ticks])
    return svg(figure, description)


def running_mean(values: list[float], width: int) -> list[float]:
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means


def loss_curve(steps: list[int], losses: list[float], rates: list[float | None], description: str) -> str:
    """The loss of each step, faint, its mean over a twentieth of the steps, and below it the learning rate."""
    with_rate = any(rate is not None for rate in rates)
    figure, axes = plt.subplots(2 if with_rate else 1, 1, figsize=(7.2, 3.4 if with_rate else 2.6), sharex=True,
                                squeeze=False, height_ratios=[3, 1] if with_rate else [1])
    upper = axes[0][0]
    width = max(1, len(losses) // 20)
    upper.plot(steps, losses, color=FIRST, linewidth=0.8, alpha=0.45 if width > 1 else 1)
    if width > 1:
        upper.plot(steps, running_mean(losses, width), color=FIRST, linewidth=1.8)
    upper.set_title("loss" if width == 1 else f"loss; the bold line is the mean of the last {width} steps")
    upper.grid(axis="y", linewidth=0.6)
    if with_rate:
        lower = axes[1][0]
        lower.plot(steps, [math.nan if rate is None else rate for rate in rates], color=SECOND, linewidth=1.4)
        lower.set_title("learning rate")
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[-1][0].set_xlabel("step")
    axes[-1][0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.tight_layout()
    return svg(figure, description)
