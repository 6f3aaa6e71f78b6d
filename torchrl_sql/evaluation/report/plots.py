"""The report's plots, from the analysis of its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from torchrl_sql.evaluation.report.data import BEHAVIOUR, BEST_COMPONENT, BEST_CONSTANT, Agent, Analysis, GameData
from torchrl_sql.evaluation.report.style import COLOURS, SMALL_WIDTH, WIDTH, Plot, new_figure
from torchrl_sql.evaluation.report.tables import format_score
from torchrl_sql.evaluation.scores import AGGREGATES, normalised_score, performance_profile, published_scores
from torchrl_sql.games import ACTION_NAMES, GAMES

GAMES_IN_ONE_PLOT = 20

_MARK: dict[str, Any] = {
    "marker": "D",
    "markersize": 4.5,
    "markerfacecolor": COLOURS["paper"][0],
    "markeredgecolor": COLOURS["ink"][0],
    "linestyle": "none",
}
_STEPS = [1, 2, 2.5, 5, 10]


def _colour(agent: Agent | None, analysis: Analysis) -> str:
    if agent is None:
        return COLOURS["other"][0]
    if agent.role == "method":
        return COLOURS["method" if agent == analysis.method else "method2"][0]
    return COLOURS["bc" if agent.role.startswith("bc") else "other"][0]


def _bar_style(policy: str, analysis: Analysis) -> dict[str, Any]:
    """Solid for the method, greedy BC and the behaviour; outlined for their variants."""
    agents = {agent.label: agent for agent in analysis.data.agents}
    colour = _colour(agents[policy], analysis) if policy in agents else COLOURS["data"][0]
    outlined = policy in (BEST_COMPONENT, BEST_CONSTANT) or (policy in agents and agents[policy].role == "bc_sampled")
    return {"facecolor": COLOURS["paper"][0] if outlined else colour, "edgecolor": colour, "linewidth": 1.2}


def _shown_policies(analysis: Analysis, game: str) -> list[str]:
    known = analysis.policies(game)
    return [
        policy
        for policy in (*(agent.label for agent in analysis.data.agents), BEHAVIOUR, BEST_COMPONENT, BEST_CONSTANT)
        if policy in known
    ]


def _scale(game: str) -> Callable[[float], float]:
    if GAMES[game].human_score is None:
        return lambda score: score
    return lambda score: float(normalised_score(score, game, "human"))


def game_plot(analysis: Analysis, game: str) -> Plot:
    """One game: every policy's score as a bar with its interval, on the human-normalised scale where there is one."""
    policies = analysis.policies(game)
    shown = _shown_policies(analysis, game)
    to_x = _scale(game)
    normalised = GAMES[game].human_score is not None
    figure, axes = new_figure(0.27 * len(shown) + 0.75)
    reach = [0.0]
    for row, policy in enumerate(shown):
        interval = policies[policy][0]
        x, low, high = (to_x(value) for value in interval)
        axes.barh(row, x, height=0.62, **_bar_style(policy, analysis))
        for colour, width in (("paper", 2.6), ("ink", 1.1)):  # a light rim keeps the line visible on a dark bar
            axes.plot([low, high], [row, row], color=COLOURS[colour][0], linewidth=width, solid_capstyle="butt")
        reach += [x, low, high]
        axes.annotate(
            format_score(interval.point),
            (max(x, high, 0), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    span = max(reach) - min(reach) or 1.0
    axes.set_xlim(min(reach) - 0.02 * span, max(reach) + 0.16 * span)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    if normalised and axes.get_xlim()[1] > 1:
        axes.axvline(1, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.set_xlabel("human-normalised score (numbers: raw)" if normalised else "raw score")
    axes.set_title(game, fontweight="bold")
    return Plot(
        name=f"scores_{game}",
        caption=f"{game}: mean score of each policy with its 95% interval.",
        description=f"Bar chart for {game}. "
        + "; ".join(f"{policy} {format_score(policies[policy][0].point)}" for policy in shown),
        figure=figure,
    )


def all_games_plots(analysis: Analysis) -> list[Plot]:
    """Many games, a row each: agents and behaviour side by side, published Scaled QL as a mark; one scale for all."""
    games, _ = analysis.split("human")
    scores = {
        game: {
            policy: [float(normalised_score(value, game, "human")) for value in known[policy][0]]
            for policy in (*(agent.label for agent in analysis.data.agents), BEHAVIOUR)
            if policy in (known := analysis.policies(game))
        }
        for game in games
    }
    marks = {
        game: float(normalised_score(score, game, "human"))
        for game, score in published_scores()["Scaled_QL_80M"].items()
        if game in games
    }
    edges = [x for found in scores.values() for interval in found.values() for x in interval] + list(marks.values())
    num_plots = -(-len(games) // GAMES_IN_ONE_PLOT)
    size = -(-len(games) // max(num_plots, 1))
    return [
        _games_plot(analysis, number, games[number * size : (number + 1) * size], scores, marks, min(edges), max(edges))
        for number in range(num_plots)
    ]


def _games_plot(
    analysis: Analysis,
    number: int,
    games: Sequence[str],
    scores: dict[str, dict[str, list[float]]],
    marks: dict[str, float],
    lowest: float,
    highest: float,
) -> Plot:
    policies = [agent.label for agent in analysis.data.agents]
    policies += [BEHAVIOUR] * any(BEHAVIOUR in scores[game] for game in scores)
    figure, axes = new_figure(0.075 * len(games) * (len(policies) + 1.2) + 1.0)
    height = 0.8 / len(policies)
    for row, game in enumerate(games):
        for place, policy in enumerate(policies):
            if policy in scores[game]:
                y = row - 0.4 + (place + 0.5) * height
                x, low, high = scores[game][policy]
                axes.barh(y, x, height=height * 0.86, **(_bar_style(policy, analysis) | {"linewidth": 0.8}))
                axes.plot([low, high], [y, y], color=COLOURS["ink"][0], linewidth=0.9)
        if game in marks:
            axes.plot(marks[game], row, **_MARK)
    if highest > 3:
        axes.set_xscale("symlog", linthresh=1, linscale=1.5)
        axes.set_xticks([v for v in (-10, -1, 0, 1, 3, 10, 30, 100) if lowest <= v <= highest])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(min(0.0, 1.1 * lowest), 1.15 * highest)
    else:
        axes.set_xlim(min(0.0, 1.1 * lowest), 1.05 * max(highest, 1.0))
    axes.set_yticks(range(len(games)), games)
    axes.set_ylim(len(games) - 0.45, -0.55)
    axes.axvline(0, color=COLOURS["muted"][0], linewidth=0.8)
    axes.axvline(1, color=COLOURS["muted"][0], linewidth=0.8, dashes=(3, 2))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("human-normalised score" + (", logarithmic beyond 1" if highest > 3 else ""))
    handles: list[Artist] = [Patch(label=policy, **_bar_style(policy, analysis)) for policy in policies]
    if marks:
        handles.append(Line2D([], [], label="Scaled QL 80M, published", **_MARK))
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return Plot(
        name=f"scores_by_game_{number + 1}",
        caption=f"Human-normalised score (0 random, 1 human) with 95% intervals, {games[0]} to {games[-1]}.",
        description=f"Bars of human-normalised score in {len(games)} games, {games[0]} to {games[-1]}, for "
        f"{', '.join(policies)}; the numbers are in the score table.",
        figure=figure,
    )


def aggregate_plot(analysis: Analysis) -> Plot | None:
    """The four aggregates of every agent as points with intervals."""
    estimates = analysis.aggregates("human")
    if not estimates:
        return None
    agents = analysis.data.agents
    figure = Figure(figsize=(WIDTH, 2 * (0.26 * len(agents) + 0.62)), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, aggregate in zip(grid.flat, AGGREGATES, strict=True):
        for row, agent in enumerate(agents):
            interval = estimates[agent.label][aggregate]
            colour = _colour(agent, analysis)
            hollow = agent.role == "bc_sampled"
            axes.plot(
                [interval.low, interval.high], [row, row], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
            )
            axes.plot(
                interval.point, row, marker="o", markersize=5, color=colour,
                markerfacecolor=COLOURS["paper"][0] if hollow else colour,
            )  # fmt: skip
        better = "lower is better" if aggregate == "optimality gap" else ""
        axes.set_title(aggregate[0].upper() + aggregate[1:])
        axes.set_xlabel(better)
        axes.set_ylim(len(agents) - 0.4, -0.6)
        axes.set_yticks(range(len(agents)), [agent.label for agent in agents])
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    games, _ = analysis.split("human")
    return Plot(
        name="aggregates",
        caption=f"Human-normalised aggregates over {len(games)} game{'s' * (len(games) > 1)} with 95% intervals.",
        description="; ".join(
            f"{label}: IQM {found['IQM'].point:.2f} from {found['IQM'].low:.2f} to {found['IQM'].high:.2f}"
            for label, found in estimates.items()
        ),
        figure=figure,
    )


def profile_plot(analysis: Analysis) -> Plot | None:
    """Performance profiles, from five games with a human score on (with fewer the curve is a handful of steps)."""
    games, _ = analysis.split("human")
    if len(games) < 5:
        return None
    runs = {label: runs.select(games).normalised("human") for label, runs in analysis.runs.items()}
    top = float(np.quantile(np.concatenate([run.run_scores().ravel() for run in runs.values()]), 0.98))
    thresholds = np.linspace(0, max(1.2, min(top, 8.0)), 121)
    figure, axes = new_figure(2.7)
    for agent in analysis.data.agents:
        fraction, low, high = performance_profile(
            runs[agent.label], thresholds, num_resamples=analysis.data.num_resamples, seed=analysis.data.bootstrap_seed
        )
        colour = _colour(agent, analysis)
        style = "--" if agent.role == "bc_sampled" else "-"
        axes.plot(thresholds, fraction, style, color=colour, linewidth=1.6, label=agent.label)
        axes.fill_between(thresholds, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, thresholds[-1])
    axes.grid()
    axes.set_xlabel("human-normalised score τ")
    axes.set_ylabel("share of runs above τ")
    figure.legend(loc="outside upper left", ncols=3)
    return Plot(
        name="performance_profile",
        caption=f"Performance profile: the share of runs (seed and game) that score above τ, over {len(games)} games. "
        "Higher is better; bands are 95% intervals.",
        description="Performance profiles. Share of runs above the human score: "
        + "; ".join(f"{label} {(run.run_scores() > 1).mean():.2f}" for label, run in runs.items()),
        figure=figure,
    )


def scaling_plot(analysis: Analysis) -> Plot | None:
    """IQM against the number of parameters, when a role comes in at least two sizes."""
    estimates = analysis.aggregates("human")
    series: dict[str, list[Agent]] = {}
    for agent in analysis.data.agents:
        if agent.num_parameters is not None:
            series.setdefault(agent.role, []).append(agent)
    series = {role: agents for role, agents in series.items() if len({a.num_parameters for a in agents}) > 1}
    if not estimates or not series:
        return None
    figure, axes = new_figure(2.7)
    for role, agents in series.items():
        agents = sorted(agents, key=lambda agent: agent.num_parameters or 0)
        sizes = [agent.num_parameters or 0 for agent in agents]
        found = [estimates[agent.label]["IQM"] for agent in agents]
        colour = COLOURS["method"][0] if role == "method" else _colour(agents[0], analysis)
        axes.plot(sizes, [v.point for v in found], marker="o", markersize=5, color=colour, linewidth=1.4)
        axes.vlines(sizes, [v.low for v in found], [v.high for v in found], color=colour, linewidth=5, alpha=0.35)
        for size, value, agent in zip(sizes, found, agents, strict=True):
            axes.annotate(
                agent.label, (size, value.high), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xticks(sorted({agent.num_parameters or 0 for agents in series.values() for agent in agents}))
    axes.minorticks_off()
    axes.margins(x=0.15, y=0.15)
    axes.grid()
    axes.set_xlabel("parameters")
    axes.set_ylabel("human-normalised IQM")
    return Plot(
        name="scaling",
        caption="Human-normalised IQM against the number of parameters, with 95% intervals.",
        description="; ".join(
            f"{agent.label}: {agent.num_parameters:,} parameters, IQM {estimates[agent.label]['IQM'].point:.2f}"
            for agents in series.values()
            for agent in agents
        ),
        figure=figure,
    )


def curve_plots(analysis: Analysis) -> list[Plot]:
    """One panel a training metric, one line a run."""
    metrics = list(dict.fromkeys(curve.metric for curve in analysis.data.curves))
    plots = []
    for number, metric in enumerate(metrics):
        curves = [curve for curve in analysis.data.curves if curve.metric == metric]
        figure, axes = new_figure(2.1, width=SMALL_WIDTH)
        labelled: set[str] = set()
        for curve in curves:
            agent = next((agent for agent in analysis.data.agents if agent.agent == curve.agent), None)
            axes.plot(
                curve.gradient_steps, curve.values, color=_colour(agent, analysis),
                linewidth=1.5 if len(curves) <= 2 else 1.1, alpha=1.0 if len(curves) <= 2 else 0.8,
                label=None if curve.label in labelled else curve.label,
            )  # fmt: skip
            labelled.add(curve.label)
        axes.set_title(metric)
        axes.set_xlabel("gradient steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.tick_params(axis="y", labelsize=8.5, labelcolor=COLOURS["muted"][0])
        axes.grid()
        if len(labelled) > 1:
            axes.legend()
        else:
            axes.set_title(curves[0].label, loc="right", color=COLOURS["muted"][0], fontsize=8.5)
        plots.append(
            Plot(
                name=f"curve_{number}_" + "".join(c if c.isalnum() else "_" for c in metric.lower()).strip("_"),
                caption=metric,
                description=f"{metric} against gradient steps. Last values: "
                + "; ".join(f"{c.label} seed {c.seed} {c.values[-1]:.3g}" for c in curves if len(c.values)),
                figure=figure,
            )
        )
    return plots


def action_plot(data: GameData) -> Plot:
    """How often each of the 18 actions occurs in one game's data."""
    counts = np.asarray(data.action_counts, dtype=np.float64)
    shares = counts / max(counts.sum(), 1.0)
    legal = set(GAMES[data.game].minimal_actions)
    figure, axes = new_figure(3.1, width=SMALL_WIDTH)
    colours = [COLOURS["method" if action in legal else "data"][0] for action in range(len(ACTION_NAMES))]
    axes.barh(range(len(ACTION_NAMES)), shares, color=colours, height=0.7)
    axes.set_yticks(range(len(ACTION_NAMES)), ACTION_NAMES, fontsize=7.5)
    axes.set_ylim(len(ACTION_NAMES) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_title(data.game, fontweight="bold")
    return Plot(
        name=f"actions_{data.game}",
        caption=f"{data.game}: share of each action in the data. Blue actions are legal; grey ones act as NOOP.",
        description=f"Share of actions in the data of {data.game}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in zip(ACTION_NAMES, shares, strict=True) if share >= 0.01),
        figure=figure,
    )
