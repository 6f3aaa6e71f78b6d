"""What a report concludes by itself, in sentences: where the main agent scores higher or lower than others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torchrl_sql.report.analysis import ALL, BEHAVIOUR, BEST_CONSTANT, HUMAN, MANY_GAMES, Analysis
from torchrl_sql.report.score_tables import area_span, published_iqm
from torchrl_sql.report.text import format_interval, format_score, format_x, name_games, plural, sentence, two_digits
from torchrl_sql.statistics.intervals import Interval, Verdict, aggregates, verdict
from torchrl_sql.statistics.scores import split_by_reference

Kind = Literal["for", "equal", "against", "open", "note"]
"""``"open"`` is no verdict, which must not look like equality; a note is no comparison with the agent it speaks for."""


class Finding(NamedTuple):
    """A conclusion and how it speaks of the main agent, or of the first of a further pair."""

    kind: Kind
    text: str


_KINDS: dict[Verdict, Kind] = {
    "higher": "for",
    "not distinguishable": "equal",
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
    """The conclusions a reader needs first; none if the agent that the page is about has no scores.

    The comparison table has every policy and game; sentences are spent on the agents that the main one is compared with
    and the behaviour itself (what offline RL must beat), on a constant action that does as well, on seeds and humans.
    """
    if analysis.data.absent is not None:
        return []
    return [
        *_aggregate_findings(analysis),
        *_family_findings(analysis),
        *_game_findings(analysis),
        *_area_findings(analysis),
        *_zero_shot_findings(analysis),
        *_seed_findings(analysis),
        *_human_findings(analysis),
        *_published_findings(analysis),
    ]


def _aggregate_findings(analysis: Analysis) -> list[Finding]:
    estimates = analysis.aggregates("human")
    found = []
    for one, other in ((one.label, other.label) for one, other in analysis.comparisons):
        if {one, other} <= {*estimates}:
            relation = verdict(analysis.iqm_difference(one, other))
            ours, theirs = (_iqm(estimates[label]["IQM"]) for label in (one, other))
            text = f"{_over(analysis)}: {one} {ours} is {_RELATIONS[relation]} {other} {theirs}."
            found.append(Finding(_KINDS[relation], text))
    return found


def _family_findings(analysis: Analysis) -> list[Finding]:
    """Each family's last place on the axis against its first, by aggregates or game by game; those of other families
    than the main agent's are notes.
    """
    estimates, axis = analysis.aggregates("human"), analysis.data.x or ""
    found = []
    for name, family in analysis.families.items():
        first, last = family[0].label, family[-1].label
        if {first, last} <= {*estimates}:
            relation = verdict(analysis.iqm_difference(last, first))
            places = ", ".join(
                f"{_iqm(estimates[agent.label]['IQM'])} at {format_x(agent.x or 0.0, axis)}"
                for agent in family
                if agent.label in estimates
            )
            text = f"{_over(analysis)}, by {axis}: {name} {places}; the last is {_RELATIONS[relation]} the first."
            of_family = [Finding(_KINDS[relation], text)]
        else:
            of_family = _by_game(last, first, analysis.verdicts(first, of=last), f"By {axis}, ")
        found += [each if name == analysis.main.family else each._replace(kind="note") for each in of_family]
    return found


def _over(analysis: Analysis) -> str:
    return f"Human-normalised IQM over {plural(len(analysis.aggregate_games('human')), 'game')}"


def _iqm(interval: Interval) -> str:
    return f"{two_digits(interval.point)} {format_interval(interval, two_digits)}"


def _game_findings(analysis: Analysis) -> list[Finding]:
    main = analysis.main.label
    found = []
    for one, other in ((one.label, other.label) for one, other in analysis.comparisons):
        found += _by_game(one, other, analysis.verdicts(other, of=one))
    names = {} if _played_its_data(analysis) else {BEHAVIOUR: "the behaviour mean of the data"}
    names[BEST_CONSTANT] = "the best constant action"
    for policy, name in names.items():
        sentences = _by_game(main, name, analysis.verdicts(policy))
        found += [each for each in sentences if (policy, each.kind) != (BEST_CONSTANT, "for")]
    return found


def _played_its_data(analysis: Analysis) -> bool:
    """Then the behaviour mean is that of its own play while it explored, which judges nothing."""
    return analysis.main.agent_steps_per_gradient_step is not None


def _by_game(main: str, name: str, verdicts: Mapping[str, Verdict], where: str = "") -> list[Finding]:
    """A sentence per verdict, with the games that have it."""
    other = sentence(name) if name.startswith("the ") and not where else name  # agents are called what they are called
    texts: dict[Verdict, str] = {
        "higher": f"{main} scores higher than {name}",
        "not distinguishable": f"{other} is not distinguishable from {main}",
        "lower": f"{other} scores higher than {main}",
    }
    games = {relation: [game for game, of_game in verdicts.items() if of_game == relation] for relation in texts}
    return [
        Finding(_KINDS[relation], f"{where}{text} on {name_games(games[relation], len(verdicts))}.")
        for relation, text in texts.items()
        if games[relation]
    ]


def _area_findings(analysis: Analysis) -> list[Finding]:
    """The main agent's area under its learning curve against each agent's that it is compared with."""
    main = analysis.main.label
    found = []
    for other in (agent.label for agent in analysis.against if {main, agent.label} <= analysis.learning.areas.keys()):
        verdicts = analysis.area_verdicts(other)
        if ALL in verdicts:
            relation = verdicts[ALL]
            ours, theirs = (_iqm(analysis.scores_of(analysis.learning.areas[label])[ALL]) for label in (main, other))
            text = f"Human-normalised IQM of the areas under learning curves, over {area_span(analysis)}"
            text += f": {main} {ours} is {_RELATIONS[relation]} {other} {theirs}."
            found.append(Finding(_KINDS[relation], text))
        else:
            found += _by_game(main, other, verdicts, f"Over the learning curve, {area_span(analysis)}, ")
    return found


def _zero_shot_findings(analysis: Analysis) -> list[Finding]:
    """Scores before the first gradient step, where they are known."""
    found = []
    for agent in (analysis.main, *analysis.against):
        runs = analysis.learning.runs.get(agent, {}).get(0)
        if runs is None:
            continue
        scores = analysis.scores_of(runs)
        shown = {ALL: scores[ALL]} if analysis.many_games and ALL in scores else scores
        listed = ", ".join(
            f"{game} {_iqm(score) if game == ALL else f'{format_score(score.point)} {format_interval(score)}'}"
            for game, score in shown.items()
        )
        found.append(Finding("note", f"Zero-shot scores of {agent.label}, before its first step: {listed}."))
    return found


def _seed_findings(analysis: Analysis) -> list[Finding]:
    runs = analysis.runs[analysis.main.label]
    behaviours = {
        game: policies[BEHAVIOUR].mean.point
        for game in runs.games
        if BEHAVIOUR in (policies := analysis.policies[game])
    }
    if len(runs.seeds) < 2 or not behaviours or _played_its_data(analysis):
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
    means = analysis.game_means[analysis.main.label]
    games = [game for game in means if HUMAN in analysis.policies[game]]
    if not games:
        return []
    reached = [game for game in games if means[game].point >= analysis.policies[game][HUMAN].mean.point]
    where = name_games(reached, len(games)) if reached else "none of the games"
    return [Finding("note", f"{analysis.main.label} reaches the published human score on {where}.")]


def _published_findings(analysis: Analysis) -> list[Finding]:
    human_games, _ = split_by_reference(analysis.published_games, "human")
    if len(human_games) < MANY_GAMES:
        return []
    runs, label = analysis.runs[analysis.main.label], analysis.main.label
    ours = aggregates(runs.select(human_games).normalised("human"))["IQM"]
    theirs = ", ".join(
        f"{agent.label} {two_digits(published_iqm(agent.scores, human_games))}"
        for agent in analysis.published.values()
        if agent.mark is not None
    )
    text = (
        f"Over the {len(human_games)} games shared with published agents, {label} has a human-normalised IQM of "
        f"{_iqm(ours)} beside {theirs}; data and protocols differ."
    )
    return [Finding("note", text)]
