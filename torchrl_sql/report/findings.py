"""What a report concludes by itself, in sentences: where the main agent scores higher or lower than others."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torchrl_sql.report.analysis import BEHAVIOUR, BEST_CONSTANT, HUMAN, Analysis
from torchrl_sql.report.score_tables import MIN_PUBLISHED_GAMES, published_games, published_iqm, published_name
from torchrl_sql.report.text import format_interval, format_score, name_games, plural, sentence, two_digits
from torchrl_sql.statistics.intervals import Interval, Verdict, aggregates, verdict

Kind = Literal["for", "neutral", "against", "open"]
"""``"open"`` is no verdict, which must not look like equality."""


class Finding(NamedTuple):
    """A conclusion and how it speaks of the main agent."""

    kind: Kind
    text: str


_KINDS: dict[Verdict, Kind] = {
    "higher": "for",
    "not distinguishable": "neutral",
    "lower": "against",
    "unknown": "open",
}
_RELATIONS: dict[Verdict, str] = {
    "higher": "higher than",
    "not distinguishable": "not distinguishable from",
    "lower": "lower than",
    "unknown": "without a verdict beside",
}


def findings(analysis: Analysis) -> list[Finding]:
    """The conclusions a reader needs first.

    The comparison table has every policy and game; sentences are spent on the aggregates, on the first agent that the
    main one is compared with and the behaviour itself (what offline RL must beat), on a constant action that does as
    well, on seeds and humans.
    """
    return [
        *_one_seed_findings(analysis),
        *_aggregate_findings(analysis),
        *_game_findings(analysis),
        *_seed_findings(analysis),
        *_human_findings(analysis),
        *_published_findings(analysis),
    ]


def _one_seed_findings(analysis: Analysis) -> list[Finding]:
    if not analysis.one_seed:
        return []
    text = (
        f"One training seed of {analysis.main.label}: nothing here is a verdict about its method. Intervals are of "
        "evaluation episodes only and do not cover the variation between training runs."
    )
    return [Finding("open", text)]


def _aggregate_findings(analysis: Analysis) -> list[Finding]:
    estimates = analysis.aggregates("human")
    if not estimates:
        return []
    main = analysis.main.label
    over = f"Human-normalised IQM over {plural(len(analysis.split('human')[0]), 'game')}"
    found = []
    for other in analysis.against:
        relation = verdict(analysis.iqm_difference(main, other.label))
        ours, theirs = (_iqm(estimates[label]["IQM"]) for label in (main, other.label))
        found.append(
            Finding(_KINDS[relation], f"{over}: {main} {ours} is {_RELATIONS[relation]} {other.label} {theirs}.")
        )
    if sizes := analysis.sizes:
        relation = verdict(analysis.iqm_difference(sizes[-1].label, sizes[0].label))
        listed = ", ".join(f"{agent.label} {_iqm(estimates[agent.label]['IQM'])}" for agent in sizes)
        text = f"{over}, by size: {listed}; the largest is {_RELATIONS[relation]} the smallest."
        found.append(Finding(_KINDS[relation], text))
    return found


def _iqm(interval: Interval) -> str:
    return f"{two_digits(interval.point)} {format_interval(interval, two_digits)}"


def _game_findings(analysis: Analysis) -> list[Finding]:
    main = analysis.main.label
    names = {agent.label: agent.label for agent in analysis.against[:1]}
    names |= {BEHAVIOUR: "the behaviour mean of the data", BEST_CONSTANT: "the best constant action"}
    found = []
    for policy, name in names.items():
        verdicts = analysis.verdicts(policy)
        texts: dict[Verdict, str] = {
            "higher": f"{main} scores higher than {name} on",
            "not distinguishable": f"{sentence(name)} is not distinguishable from {main} on",
            "lower": f"{sentence(name)} scores higher than {main} on",
        }
        for relation, text in texts.items():
            games = [game for game, of_game in verdicts.items() if of_game == relation]
            if games and (policy, relation) != (BEST_CONSTANT, "higher"):
                found.append(Finding(_KINDS[relation], f"{text} {name_games(games, len(verdicts))}."))
    return found


def _seed_findings(analysis: Analysis) -> list[Finding]:
    runs = analysis.runs[analysis.main.label]
    behaviours = {
        game: policies[BEHAVIOUR].mean.point
        for game in runs.games
        if BEHAVIOUR in (policies := analysis.policies(game))
    }
    if len(runs.seeds) < 2 or not behaviours:
        return []
    label = analysis.main.label
    failures = [
        f"{game} (seed {seed}: {format_score(score)} against {format_score(behaviour)})"
        for game, behaviour in behaviours.items()
        for seed, score in zip(runs.seeds, runs.run_scores()[:, runs.games.index(game)].tolist(), strict=True)
        if score <= behaviour
    ]
    if failures:
        return [Finding("against", f"Not every seed of {label} is above the behaviour mean: {', '.join(failures)}.")]
    where = "every game" if len(behaviours) == len(runs.games) else name_games([*behaviours], len(runs.games))
    return [Finding("for", f"Each of the {len(runs.seeds)} seeds of {label} is above the behaviour mean in {where}.")]


def _human_findings(analysis: Analysis) -> list[Finding]:
    games, _ = analysis.split("human")
    if not games:
        return []
    means = analysis.game_means[analysis.main.label]
    reached = [game for game in games if means[game].point >= analysis.policies(game)[HUMAN].mean.point]
    where = name_games(reached, len(games)) if reached else "none of the games"
    return [Finding("neutral", f"{analysis.main.label} reaches the published human score on {where}.")]


def _published_findings(analysis: Analysis) -> list[Finding]:
    human_games, _ = analysis.split("human")
    games = [game for game in published_games(analysis) if game in human_games]
    if len(games) < MIN_PUBLISHED_GAMES:
        return []
    label = analysis.main.label
    ours = aggregates(analysis.normalised("human")[label].select(games))["IQM"]
    theirs = " and ".join(
        f"{published_name(name)} {two_digits(published_iqm(name, games))}" for name in ("Scaled_QL_80M", "MGDT_200M")
    )
    text = (
        f"Over the {len(games)} games shared with published agents, {label} has a human-normalised IQM of "
        f"{_iqm(ours)} beside {theirs}, trained on 10% of DQN-Replay; protocols differ."
    )
    return [Finding("neutral", text)]
