"""What limits the numbers of a report, found from its data."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, isnan

import numpy as np

from torchrl_sql.report.agents import PARAMETERS
from torchrl_sql.report.analysis import BEST_BEHAVIOUR, BEST_CONSTANT, Analysis
from torchrl_sql.report.text import REFERENCE_LABELS, name_games, plural, sentence, span
from torchrl_sql.statistics.scores import split_by_reference


def caveats(analysis: Analysis) -> list[str]:
    """What a reader must know of the numbers shown; those of the report's data come last."""
    return [
        *_of_agents(analysis),
        *_of_intervals(analysis),
        *_of_references(analysis),
        *_of_episodes(analysis),
        *_of_protocols(analysis),
        *_of_checkpoints(analysis),
        *_of_curves(analysis),
        *_of_calibration(analysis),
        *_of_data(analysis),
        *_of_training(analysis),
        *analysis.data.caveats,
    ]


def _of_agents(analysis: Analysis) -> Iterator[str]:
    games = analysis.data.games
    if (absent := analysis.data.absent) is not None:
        yield f"{absent}, which the page is about, has no scores yet: nothing is compared."
    elif families := analysis.unmatched:
        axis = analysis.data.x or ""
        why = (
            "their sizes are more or fewer than its own family's"
            if axis == PARAMETERS
            else f"none there has its {axis}"
        )
        yield (
            f"{analysis.main.label} is not compared with {', '.join(families)}: {why}; --against names others to "
            "compare it with."
        )
    for agent in analysis.data.agents:
        label = agent.label
        if agent not in analysis.agents:
            yield f"{label} is not on this page: at no gradient step was a seed evaluated in each of its games."
            continue
        missing = [game for game in games if game not in analysis.runs[label].games]
        if missing:
            aggregated = analysis.aggregates("human")
            consequence = ", and is left out of the aggregates" if aggregated and label not in aggregated else ""
            yield f"{label} has no episode that counts in {name_games(missing, len(games))}{consequence}."
        if seeds := analysis.selection[label].seeds_left_out:
            yield (
                f"{label} is shown without seed {', '.join(map(str, seeds))}, not evaluated in each of its games at "
                f"{analysis.selection[label].step:,} gradient steps."
            )


def _of_intervals(analysis: Analysis) -> Iterator[str]:
    counts = {label: len(runs.seeds) for label, runs in analysis.runs.items() if runs.trained}
    if single := [label for label, count in counts.items() if count == 1]:
        yield (
            f"One training seed of {', '.join(single)}: nothing here is a verdict about a method of one seed. Its "
            "intervals are of evaluation episodes only and do not cover the variation between training runs."
        )
    if untrained := [label for label in analysis.runs if label not in counts]:
        yield (
            f"{' and '.join(untrained)}: no training, so no training seeds. Intervals are over episodes; differences "
            "to an agent have the spread of that agent's seeds."
        )
    unknown = [label for label, means in analysis.game_means.items() if any(isnan(mean.low) for mean in means.values())]
    if unknown:
        yield (
            f"No interval of {', '.join(unknown)} where all training seeds, or all episodes of one seed, score the "
            "same or there is one only: nothing is known of their spread."
        )
    few, most = min(counts.values(), default=1), max(counts.values(), default=1)
    if most > 1:
        yield (
            f"Intervals are Student's 95% intervals over {span(few, most)} training seeds "
            "of per-seed means and aggregates: the games of one seed share a network. An aggregate is the mean of the "
            "seeds' own aggregates."
        )
        if analysis.many_games:
            yield (
                f"Verdicts of single games are not corrected for their number: of {len(analysis.data.games)} equal "
                "games, one in twenty would differ by chance."
            )


def _of_references(analysis: Analysis) -> Iterator[str]:
    num_games = len(analysis.data.games)
    if not analysis.many_games and not analysis.data.aggregate:
        yield f"{sentence(plural(num_games, 'game'))}, too few for aggregates over games (--aggregate shows them)."
        return
    for reference, name in REFERENCE_LABELS.items():
        included = analysis.aggregate_games(reference)
        _, without = split_by_reference(analysis.data.games, reference)
        if len(included) == num_games:
            continue
        text = f"{sentence(name)}-normalised aggregates cover {len(included)} of the {num_games} games shown"
        if without:
            have = "has" if len(without) == 1 else "have"
            text += f": {name_games(without, num_games)} {have} no published {name} score"
        yield f"{text}."
    if 0 < (count := len(analysis.aggregate_games("human"))) < 4:
        yield f"With {plural(count, 'game')} the IQM drops nothing and equals the mean; it becomes robust from 4 on."


def _of_episodes(analysis: Analysis) -> Iterator[str]:
    counts = np.concatenate([runs.counts.ravel() for runs in analysis.runs.values()])
    if counts.min() != counts.max():
        yield (
            f"Runs have between {counts.min()} and {counts.max()} episodes per game and seed; every run counts the "
            "same, whatever its number of episodes. What an interrupted evaluation lacks are the long episodes."
        )
    episodes = [row for rows in analysis.episodes.values() for row in rows]
    cut = sum(row.truncated and not row.terminated for row in episodes)
    if cut:
        yield f"{cut:,} of {len(episodes):,} episodes were cut at the frame limit; their return up to there counts."


def _of_protocols(analysis: Analysis) -> Iterator[str]:
    episodes = [row for rows in analysis.episodes.values() for row in rows]
    for name, values in (
        ("sticky-action probabilities", sorted({row.sticky for row in episodes})),
        ("exploration probabilities", sorted({row.epsilon for row in episodes})),
        ("frame limits", sorted({row.max_env_frames for row in episodes})),
    ):
        if len(values) > 1:
            listed = ", ".join(f"{value:,g}" if value < 1 else f"{value:,}" for value in values)
            yield f"The agents were not evaluated alike: {name} {listed}. Compare with care."
    steps = sorted({analysis.selection[label].step for label, runs in analysis.runs.items() if runs.trained})
    if len(steps) > 1:
        yield f"The agents were trained for different numbers of gradient steps: {', '.join(f'{s:,}' for s in steps)}."


def _of_checkpoints(analysis: Analysis) -> Iterator[str]:
    texts: list[tuple[str, str]] = []
    for label, which in analysis.selection.items():
        complete, counts = which.complete, which.counts
        others = [step for step in counts if step not in complete]
        if later := [f"{step:,}" for step in others if step > which.step and analysis.data.step is None]:
            text = f"scores are those at {which.step:,} gradient steps, the last checkpoint that was"
            texts.append((label, f"{text} evaluated with every seed in every game; later ones: {', '.join(later)}"))
        if others and len(complete) > 1:
            listed = ", ".join(f"{step:,}" for step in others)
            text = f"the learning curve leaves out the checkpoints at {listed} gradient steps, where not every seed was"
            texts.append((label, f"{text} evaluated in every game"))
        if len(complete) > 1:
            ends = {step: (min(counts[step].values()), max(counts[step].values())) for step in complete}
            uneven = [f"{step:,} ({low} to {high})" for step, (low, high) in ends.items() if low < high]
            if uneven:
                text = f"unequal numbers of episodes per game and seed at the checkpoints {', '.join(uneven)}; if their"
                why = "evaluation was interrupted, the missing episodes are the long ones and the curve is biased there"
                texts.append((label, f"{text} {why}"))
            elif len({*ends.values()}) > 1:
                listed = ", ".join(f"{low} at {step:,}" for step, (low, _) in ends.items())
                texts.append((label, f"episodes per game and seed differ between checkpoints: {listed}"))
    yield from _together(texts)


def _of_curves(analysis: Analysis) -> Iterator[str]:
    learning = analysis.learning
    if len(learning.paces) > 1:
        paces = ", ".join(f"{pace:g}" for pace in sorted(pace for pace in learning.paces if pace is not None))
        none = ", or none" if None in learning.paces else ""
        yield f"Learning curves are against gradient steps; their agents played {paces} agent steps in each{none}."
    if learning.runs and learning.main is not None and learning.main not in learning.runs:
        yield f"No areas under learning curves: {learning.main.label} was evaluated in full at one gradient step only."
    if not learning.areas:
        return
    without = [label for label, runs in analysis.runs.items() if runs.trained and label not in learning.areas]
    if without:
        yield (
            f"No area under the learning curve of {', '.join(without)}: not evaluated in full at each of the "
            f"{len(learning.area_steps)} gradient steps that areas are over."
        )
    texts: list[tuple[str, str]] = []
    for agent, curve in learning.runs.items():
        left_out = ", ".join(f"{step:,}" for step in curve if step not in learning.area_steps)
        if left_out and agent.label in learning.areas:
            text = (
                f"the area under the learning curve leaves out the scores at {left_out} gradient steps, where not all"
            )
            texts.append((agent.label, f"{text} that are compared were evaluated in full"))
    yield from _together(texts)


def _of_calibration(analysis: Analysis) -> Iterator[str]:
    texts: list[tuple[str, str]] = []
    for label, games in analysis.calibration.items():
        cut, used = (sum(getattr(game, name) for game in games.values()) for name in ("num_cut", "num_episodes"))
        if cut:
            text = f"value calibration leaves out {cut:,} of {cut + used:,} episodes, which were cut at the frame limit"
            texts.append((label, f"{text} (their returns are incomplete; these are often an agent's best)"))
        missing = [game for game in analysis.data.games if game not in games]
        if missing:
            texts.append((label, f"no predicted values were recorded in {name_games(missing, len(missing))}"))
    yield from _together(texts)


def _together(texts: list[tuple[str, str]]) -> Iterator[str]:
    """What holds for several agents, once."""
    labels: dict[str, list[str]] = {}
    for label, text in texts:
        labels.setdefault(text, []).append(label)
    for text, names in labels.items():
        yield f"{', '.join(names)}: {text}."


def _of_data(analysis: Analysis) -> Iterator[str]:
    if {BEST_BEHAVIOUR, BEST_CONSTANT} & {*analysis.policy_columns}:
        yield (
            "The best behaviour and the best constant action were picked by the very episodes that score them, which "
            "favours them slightly."
        )
    clipped = [data.game for data in analysis.data.game_data if data.rewards == "clipped"]
    if clipped:
        yield (
            f"The data of {name_games(clipped, len(analysis.data.games))} holds clipped rewards, so that its returns "
            "are not game scores and are left out of comparisons."
        )


def _of_training(analysis: Analysis) -> Iterator[str]:
    for curve in analysis.data.curves:
        points = zip(curve.gradient_steps, curve.values, strict=True)
        broken = [step for step, value in points if not isfinite(value)]
        if broken:
            yield f"{curve.metric} of {curve.label}, seed {curve.seed}, is not finite at step {broken[0]:,}."
