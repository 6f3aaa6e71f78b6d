"""The main job, end to end: emulator data, training, evaluation, report, in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torchrl_sql.collection import collect_data
from torchrl_sql.config import ConfigError, RunConfig, compose_run_config
from torchrl_sql.evaluation.agents import TrainedAgent, make_agents
from torchrl_sql.evaluation.protocol import DECODINGS, Protocol
from torchrl_sql.report import format_score_table, write_report
from torchrl_sql.report.gather import gather
from torchrl_sql.training import train

NUM_CONSTANT_ACTION_EPISODES = 5
_MADE_HERE = (
    "store",
    "scaled_ql",
    "bc",
    "clips",
    "report_files",
    "scores.csv",
    "calibration.csv",
    "evaluation_versions.json",
    "report.html",
)


def quickstart(
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Runs the main job, or continues it where it was interrupted.

    Args:
        folder (Path): where everything goes: the store, the two runs, ``scores.csv``, clips and ``report.html``.

    Keyword Args:
        overrides (sequence of str): overrides of ``scale=cpu``, e.g. ``["seed=1"]``.
        fresh (bool): delete what an earlier quickstart left in ``folder`` first.
        say (callable): is given a line of progress for people.

    Returns:
        The page ``folder/report.html``.

    Raises:
        ConfigError: for bad overrides, or if ``folder`` holds a quickstart of other settings.
    """
    own = [
        override
        for override in overrides
        if override.split("=")[0] in ("scale", "method", "name", "run_dir", "data.store")
    ]
    if own:
        raise ConfigError(f"the quickstart decides {own[0].split('=')[0]} itself, got {own[0]!r}")
    of_method = [override for override in overrides if override.startswith("method.")]
    others = [override for override in overrides if override not in of_method]
    common = ["scale=cpu", "data.games=[Freeway,Assault]", "data.n_steps=10", *others, f"data.store={folder / 'store'}"]
    values = ["method.cql_alpha=0.3", "method.value_prior_std=1.0", *of_method]
    method = compose_run_config([*common, *values, "name=scaled_ql", f"run_dir={folder / 'scaled_ql'}"])
    bc = compose_run_config([*common, "method=bc", "name=bc", f"run_dir={folder / 'bc'}"])
    if fresh:
        _delete_earlier(folder)
    page = folder / "report.html"

    say(f"1/4  Collecting {method.collection.num_agent_steps_per_game:,} transitions of {', '.join(method.games)}")
    collect_data(method)
    say(
        f"2/4  Training one network for all games: CQL + C51, then behavioural cloning "
        f"({method.trainer.num_gradient_steps:,} gradient steps each)"
    )
    train(method)
    train(bc)
    episodes = method.evaluation.num_episodes_per_game
    say(f"3/4  Evaluating {episodes} episodes a game in the emulator")
    TrainedAgent(Path(method.run_dir)).evaluate(folder, clips=folder / "clips")
    for decoding in DECODINGS:
        TrainedAgent(Path(bc.run_dir), decoding=decoding).evaluate(folder)
    protocol = Protocol.from_config(method.evaluation)
    few = replace(protocol, num_episodes=min(episodes, NUM_CONSTANT_ACTION_EPISODES))
    for agent in make_agents("constant", method.games):
        agent.evaluate(folder, protocol=few)
    say("4/4  Writing the report")
    data = gather(
        [folder], title="Quickstart: one offline Q-network, several games", introduction=_introduction(method)
    )
    write_report(data, page)
    say("")
    say(format_score_table(data))
    return page


def _delete_earlier(folder: Path) -> None:
    """Deletes what an earlier quickstart made; a folder without its marks is left alone."""
    if not (folder / "store" / "store.json").is_file():
        return
    for name in _MADE_HERE:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _introduction(config: RunConfig) -> list[str]:
    return [
        f"One network was trained on {len(config.games)} games at once with distributional conservative Q-learning "
        "(CQL with C51, learned spatial embeddings, feature normalization, one head a game), without ever acting in "
        "the games, and then played them. A second network of the same encoder was trained on the same data, for as "
        "many gradient steps, by behavioural cloning (BC).",
        "The data was made for this run by deliberately weak policies: a simple script for each game, followed at "
        "only some steps and mixed with noise (the mixture is stated under Data). No policy in the data is close to a "
        "good one, but good decisions are in it: the setting in which the paper claims that offline Q-learning can end "
        "above its data. How well cloning does depends on the noise: where the scripted action is the most frequent "
        "one in every state, greedy cloning recovers the script. Where it does as well as Q-learning, the findings "
        "say so.",
        f"A quickstart is small: {config.collection.num_agent_steps_per_game:,} transitions a game, a small ResNet, "
        f"{config.trainer.num_gradient_steps:,} gradient steps of batch {config.data.batch_size}. Its scores are not "
        "comparable with the paper's.",
    ]
