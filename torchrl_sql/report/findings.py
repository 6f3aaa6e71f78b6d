"""What a report concludes by itself, in sentences: where the method is better, as good or worse, and what to mind."""

from __future__ import annotations

from math import isfinite
from typing import Literal, NamedTuple

import numpy as np

from torchrl_sql.report.analysis import (
    BEHAVIOUR,
    BEST_CONSTANT,
    HUMAN,
    Analysis,
    Verdict,
    compare,
)
from torchrl_sql.report.model import Agent
from torchrl_sql.report.score_tables import MIN_PUBLISHED_GAMES, published_games, published_iqm
from torchrl_sql.report.text import REFERENCE_LABELS, format_score, name_games, sentence
from torchrl_sql.statistics.aggregates import Interval, aggregates


class Finding(NamedTuple):
    """A conclusion and how it speaks of the method."""

    kind: Literal["for", "neutral", "against"]
    text: str


_KINDS: dict[Verdict, Literal["for", "neutral", "against"]] = {
    "above": "for",
    "overlap": "neutral",
    "below": "against",
}


def findings(analysis: Analysis) -> list[Finding]:
    """The conclusions a reader needs first; two scores differ where their 95% intervals are apart.

    The comparison table has every policy and game; sentences are spent on the aggregate, on greedy behaviour cloning
    and the behaviour itself (what offline RL must beat), on a constant action that does as well, on seeds and humans.
    """
    label = analysis.method.label
    found = _aggregate_findings(analysis)
    cloning = analysis.first("bc_greedy")
    greedy = [] if cloning is None else [(cloning.label, cloning.label)]
    for policy, name in (*greedy, (BEHAVIOUR, "the behaviour mean of the data"), (BEST_CONSTANT, "always one action")):
        verdicts = analysis.verdicts(policy)
        for verdict, kind in _KINDS.items():
            games = [game for game, v in verdicts.items() if v == verdict]
            if not games or (policy == BEST_CONSTANT and verdict == "above"):
                continue
            where = name_games(games, len(verdicts))
            text = {
                "above": f"{label} scores higher than {name} on {where}.",
                "overlap": f"{sentence(name)} cannot be told from {label} on {where}: the 95% intervals overlap.",
                "below": f"{sentence(name)} scores higher than {label} on {where}.",
            }[verdict]
            found.append(Finding(kind, text))
    return found + _seed_findings(analysis) + _human_findings(analysis) + _published_findings(analysis)


def _aggregate_findings(analysis: Analysis) -> list[Finding]:
    estimates = analysis.aggregates("human")
    if not estimates:
        return []
    label = analysis.method.label
    games, _ = analysis.split("human")
    over = f"Human-normalised IQM over {len(games)} game{'s' * (len(games) > 1)}"
    ours = estimates[label]["IQM"]
    found = []
    for agent in _compared(analysis):
        theirs = estimates[agent.label]["IQM"]
        verdict = compare(ours, theirs)
        relation = {"above": "above", "below": "below", "overlap": "not separable from"}[verdict]
        text = f"{over}: {label} {_iqm(ours)} is {relation} {agent.label} {_iqm(theirs)}."
        found.append(Finding(_KINDS[verdict], text))
    sizes = _sizes(analysis)
    if sizes:
        values = [estimates[agent.label]["IQM"] for agent in sizes]
        verdict = compare(values[-1], values[0])
        relation = {"above": "above", "below": "below", "overlap": "not separable from"}[verdict]
        listed = ", ".join(f"{agent.label} {_iqm(value)}" for agent, value in zip(sizes, values, strict=True))
        text = f"{over}, by size: {listed}; the largest is {relation} the smallest."
        found.append(Finding(_KINDS[verdict], text))
    return found


def _iqm(interval: Interval) -> str:
    return f"{interval.point:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _sizes(analysis: Analysis) -> list[Agent]:
    """The method's sizes, ascending; empty with fewer than two."""
    methods = [
        agent
        for agent in analysis.data.agents
        if (agent.role, agent.decoding) == ("method", analysis.method.decoding) and agent.num_parameters is not None
    ]
    methods = sorted(methods, key=lambda agent: agent.num_parameters or 0)
    return methods if len({agent.num_parameters for agent in methods}) > 1 else []


def _compared(analysis: Analysis) -> list[Agent]:
    """Whom sentences compare the method with: of cloning the first agent, of the method none that is another size."""
    firsts = (analysis.first("bc_greedy"), analysis.first("bc_sampled"))
    sizes = _sizes(analysis)
    return [
        agent
        for agent in analysis.data.agents
        if agent != analysis.method and (agent in firsts or not agent.role.startswith("bc")) and agent not in sizes
    ]


def _seed_findings(analysis: Analysis) -> list[Finding]:
    runs = analysis.runs[analysis.method.label]
    if len(runs.seeds) < 2:
        return []
    label = analysis.method.label
    failures = [
        f"{game} (seed {seed}: {format_score(score)} against {format_score(behaviour[0].point)})"
        for g, game in enumerate(runs.games)
        if (behaviour := analysis.policies(game).get(BEHAVIOUR)) is not None
        for seed, score in zip(runs.seeds, runs.run_scores()[:, g].tolist(), strict=True)
        if score <= behaviour[0].point
    ]
    if failures:
        return [Finding("against", f"Not every seed of {label} is above the behaviour mean: {', '.join(failures)}.")]
    if any(BEHAVIOUR in analysis.policies(game) for game in runs.games):
        return [
            Finding("for", f"Each of the {len(runs.seeds)} seeds of {label} is above the behaviour mean in every game.")
        ]
    return []


def _human_findings(analysis: Analysis) -> list[Finding]:
    verdicts = analysis.verdicts(HUMAN)
    if not verdicts:
        return []
    means = analysis.game_means[analysis.method.label]
    reached = [game for game in verdicts if means[game].point >= analysis.policies(game)[HUMAN][0].point]
    where = name_games(reached, len(verdicts)) if reached else "none of the games"
    return [Finding("neutral", f"{analysis.method.label} reaches the published human score on {where}.")]


def _published_findings(analysis: Analysis) -> list[Finding]:
    human_games, _ = analysis.split("human")
    games = [game for game in published_games(analysis) if game in human_games]
    if len(games) < MIN_PUBLISHED_GAMES:
        return []
    label = analysis.method.label
    ours = aggregates(analysis.normalised("human")[label].select(games))["IQM"]
    theirs = " and ".join(
        f"{name.replace('_', ' ')} {published_iqm(name, games):.2f}" for name in ("Scaled_QL_80M", "MGDT_200M")
    )
    text = (
        f"Over the {len(games)} games shared with published agents, {label} has a human-normalised IQM of "
        f"{_iqm(ours)} beside {theirs} as published; protocols differ."
    )
    return [Finding("neutral", text)]


def notes(analysis: Analysis) -> list[str]:
    """What limits the numbers shown, found from the data; the caller's own caveats follow."""
    found: list[str] = []
    all_games = len(analysis.data.games)
    for reference, name in REFERENCE_LABELS.items():
        included, excluded = analysis.split(reference)
        covered = f"{sentence(name)}-normalised aggregates cover"
        if excluded:
            have = "has" if len(excluded) == 1 else "have"
            found.append(
                f"{covered} {len(included)} of the {all_games} games shown: {name_games(excluded, all_games)} {have} "
                f"no published {name} score."
            )
        elif all_games > 2:
            found.append(f"{covered} all {all_games} games shown.")
        else:
            found.append(f"{covered} {name_games(included, all_games)}.")
    runs = analysis.runs.values()
    num_scores = min(run.counts.shape[0] for run in runs) * len(analysis.split("human")[0])
    if 0 < num_scores < 4:
        found.append(
            f"With {num_scores} run scores (seeds x games) the IQM drops nothing and equals the mean; it becomes "
            "robust from four scores on."
        )
    found.append(_interval_note(min(len(run.seeds) for run in runs), max(len(run.seeds) for run in runs)))
    counts = np.concatenate([run.counts.ravel() for run in runs])
    if counts.min() != counts.max():
        found.append(
            f"Runs have between {counts.min()} and {counts.max()} episodes a game and seed; every run counts the same, "
            "whatever its number of episodes. What an interrupted evaluation lacks are the long episodes."
        )
    episodes = [episode for rows in analysis.episodes.values() for episode in rows]
    cut = sum(episode.truncated and not episode.terminated for episode in episodes)
    if cut:
        found.append(
            f"{cut:,} of {len(episodes):,} episodes were cut at the frame limit; their return up to there counts."
        )
    found += _unlike(analysis)
    if any(data.best_constant_action or data.best_behaviour for data in analysis.data.game_data):
        found.append(
            "The best behaviour and the best constant action were picked by the very episodes that score them, which "
            "favours them slightly. Intervals of data and constant actions are normal approximations over episodes."
        )
    clipped = [data.game for data in analysis.data.game_data if data.rewards == "clipped"]
    if clipped:
        found.append(
            f"The data of {name_games(clipped, all_games)} holds clipped rewards, so its returns are no game scores "
            "and are not compared with any."
        )
    if not published_games(analysis):
        found.append(
            "None of the games shown is among the 15 for which scores of published multi-game agents are at hand."
        )
    return found


def _unlike(analysis: Analysis) -> list[str]:
    """Where agents or checkpoints were not trained, evaluated or recorded alike."""
    found = []
    episodes = [episode for rows in analysis.episodes.values() for episode in rows]
    for name, values in (
        ("sticky-action probabilities", sorted({episode.sticky for episode in episodes})),
        ("exploration probabilities", sorted({episode.epsilon for episode in episodes})),
        ("frame limits", sorted({episode.max_env_frames for episode in episodes})),
    ):
        if len(values) > 1:
            listed = ", ".join(f"{value:,g}" if value < 1 else f"{value:,}" for value in values)
            found.append(f"The agents were not evaluated alike: {name} {listed}. Compare with care.")
    steps = sorted({rows[0].gradient_step for rows in analysis.episodes.values()})
    if len(steps) > 1:
        found.append(
            f"The agents were trained for different numbers of gradient steps: {', '.join(f'{s:,}' for s in steps)}."
        )
    said: dict[str, list[str]] = {}  # what is said of several agents is said once
    for label, curve in analysis.learning_curves.items():
        if curve.incomplete_steps:
            listed = ", ".join(f"{step:,}" for step in curve.incomplete_steps)
            text = (
                f"the learning curve leaves out the checkpoints at {listed} gradient steps, where not every seed was "
            )
            said.setdefault(f"{text}evaluated in every game", []).append(label)
        uneven = [f"{step:,} ({low} to {high})" for step, (low, high) in curve.num_episodes.items() if low < high]
        if uneven:
            text = (
                f"unequal numbers of episodes a game and seed at the checkpoints {', '.join(uneven)}; if their "
                "evaluation was interrupted, the missing episodes are the long ones and the curve is biased there"
            )
            said.setdefault(text, []).append(label)
        elif len(set(curve.num_episodes.values())) > 1:
            listed = ", ".join(f"{low} at {step:,}" for step, (low, _) in curve.num_episodes.items())
            said.setdefault(f"episodes a game and seed differ between checkpoints: {listed}", []).append(label)
    for label, games in analysis.calibration.items():
        cut, used = (sum(getattr(g, name) for g in games.values()) for name in ("num_cut", "num_episodes"))
        if cut:
            text = (
                f"value calibration leaves out {cut:,} of {cut + used:,} episodes, which were cut at the frame limit "
            )
            said.setdefault(f"{text}(their returns are incomplete; these are often an agent's best)", []).append(label)
        missing = [game for game in analysis.data.games if game not in games]
        if missing:
            text = f"no predicted values were recorded in {name_games(missing, len(missing))}"
            said.setdefault(text, []).append(label)
    found += [f"{', '.join(labels)}: {text}." for text, labels in said.items()]
    for logged in analysis.data.curves:
        points = zip(logged.gradient_steps, logged.values, strict=True)
        broken = [step for step, value in points if not isfinite(value)]
        if broken:
            found.append(f"{logged.metric} of {logged.label}, seed {logged.seed}, is not finite at step {broken[0]:,}.")
    return found


def _interval_note(fewest: int, most: int) -> str:
    if most == 1:
        return (
            "One training seed an agent: the intervals resample its evaluation episodes and do not cover the variation "
            "between training runs."
        )
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return (
        f"Intervals are 95% percentile bootstraps that resample the {seeds} training seeds of each game and then their "
        "episodes. With so few seeds they tend to be too narrow; and the games of one seed share a network, which the "
        "stratified bootstrap, as in rliable, does not model. Resampling both levels counts the noise of episodes "
        "twice: with few episodes this widens intervals and can move that of P(improvement) past its point."
    )
