"""What a report concludes by itself, in sentences: where the method is better, as good or worse, and what to mind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from torchrl_sql.evaluation.report.data import (
    BEHAVIOUR,
    BEST_CONSTANT,
    HUMAN,
    Analysis,
    Verdict,
    compare,
)
from torchrl_sql.evaluation.report.tables import REFERENCE_LABELS, format_score, published_table


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
    greedy = [(agent.label, agent.label) for agent in analysis.data.agents if agent.role == "bc_greedy"]
    for policy, name in (*greedy, (BEHAVIOUR, "the behaviour mean of the data"), (BEST_CONSTANT, "always one action")):
        verdicts = analysis.verdicts(policy)
        for verdict, kind in _KINDS.items():
            games = [game for game, v in verdicts.items() if v == verdict]
            if not games or (policy == BEST_CONSTANT and verdict == "above"):
                continue
            where = name_games(games, len(verdicts))
            text = {
                "above": f"{label} scores higher than {name} on {where}.",
                "overlap": f"{name[0].upper()}{name[1:]} is as good as {label} on {where}: the 95% intervals overlap.",
                "below": f"{name[0].upper()}{name[1:]} scores higher than {label} on {where}.",
            }[verdict]
            found.append(Finding(kind, text))
    return found + _seed_findings(analysis) + _human_findings(analysis)


def name_games(games: Sequence[str], total: int) -> str:
    """``Breakout and Freeway``, ``all 40 games``, ``5 of 40 games (...)``, or only the count beyond eight."""
    if len(games) == total and total > 2:
        return f"all {total} games"
    if len(games) <= 3:
        return " and ".join([", ".join(games[:-1]), games[-1]] if len(games) > 1 else games)
    return f"{len(games)} of {total} games" + (f" ({', '.join(games)})" if len(games) <= 8 else "")


def _aggregate_findings(analysis: Analysis) -> list[Finding]:
    estimates = analysis.aggregates("human")
    if not estimates:
        return []
    label = analysis.method.label
    games, _ = analysis.split("human")
    ours = estimates[label]["IQM"]
    found = []
    for other, found_aggregates in estimates.items():
        if other == label:
            continue
        theirs = found_aggregates["IQM"]
        verdict = compare(ours, theirs)
        relation = {"above": "above", "below": "below", "overlap": "not separable from"}[verdict]
        text = (
            f"Human-normalised IQM over {len(games)} game{'s' * (len(games) > 1)}: {label} {ours.point:.2f} "
            f"[{ours.low:.2f}, {ours.high:.2f}] is {relation} {other} {theirs.point:.2f} "
            f"[{theirs.low:.2f}, {theirs.high:.2f}]."
        )
        found.append(Finding(_KINDS[verdict], text))
    return found


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


def notes(analysis: Analysis) -> list[str]:
    """What limits the numbers shown, found from the data; the caller's own caveats follow."""
    found = []
    all_games = len(analysis.data.games)
    for reference, name in REFERENCE_LABELS.items():
        included, excluded = analysis.split(reference)
        covered = f"{name[0].upper()}{name[1:]}-normalised aggregates cover"
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
            "whatever its number of episodes."
        )
    episodes = [episode for rows in analysis.episodes.values() for episode in rows]
    cut = sum(episode.truncated and not episode.terminated for episode in episodes)
    if cut:
        found.append(
            f"{cut:,} of {len(episodes):,} episodes were cut at the frame limit; their return up to there counts."
        )
    sticky = sorted({episode.sticky for episode in episodes})
    if len(sticky) > 1:
        found.append(f"The agents were not evaluated alike: sticky-action probabilities {sticky}. Compare with care.")
    limits = sorted({episode.max_env_frames for episode in episodes})
    if len(limits) > 1:
        found.append(f"The agents were not evaluated alike: frame limits {limits}. Compare with care.")
    steps = sorted({rows[0].gradient_step for rows in analysis.episodes.values()})
    if len(steps) > 1:
        found.append(
            f"The agents were trained for different numbers of gradient steps: {', '.join(f'{s:,}' for s in steps)}."
        )
    if any(data.best_constant_action or data.best_component for data in analysis.data.game_data):
        found.append(
            "The best component and the best constant action were picked by the very episodes that score them, which "
            "favours them slightly. Intervals of data and constant actions are normal approximations over episodes."
        )
    clipped = [data.game for data in analysis.data.game_data if data.rewards == "clipped"]
    if clipped:
        found.append(
            f"The data of {name_games(clipped, all_games)} holds clipped rewards, so its returns are no game scores "
            "and are not compared with any."
        )
    if published_table(analysis) is None:
        found.append(
            "None of the games shown is among the 15 for which scores of published multi-game agents are at hand."
        )
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
        "stratified bootstrap, as in rliable, does not model."
    )
