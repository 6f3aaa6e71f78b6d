r"""Makes examples/quickstart_policy.safetensors and its card of a finished quickstart.

    torchrl-sql study quickstart --seeds 0,1,2
    python benchmarks/ship_policy.py runs/quickstart
    torchrl-sql enjoy examples/quickstart_policy.safetensors --game Breakout,Enduro,Freeway --seconds 20 \
        --out docs/quickstart.gif

The card's scores are those of the shipped file, whose weights are rounded to float16: 20 episodes per
game, played here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from torchrl_sql.cli import run
from torchrl_sql.config import load_run_config
from torchrl_sql.data import FrameStore
from torchrl_sql.evaluation.episodes import read_episodes
from torchrl_sql.provenance import describe_benchmark
from torchrl_sql.statistics.intervals import student
from torchrl_sql.training import export_policy

ROOT = Path(__file__).resolve().parent.parent
POLICY = ROOT / "examples" / "quickstart_policy.safetensors"

CARD = """\
# The quickstart's policy

`quickstart_policy.safetensors` ({kilobytes:.0f} kB) is the network of `{run}` of `torchrl-sql study quickstart`:
{games} with one network, by distributional conservative Q-learning. It was trained on weak scripted
play and never acted while it learned. Weights are float16, and of the heads only the rows of legal actions
(`export_policy(compact=True)`).

```bash
torchrl-sql enjoy examples/quickstart_policy.safetensors --game Breakout --out breakout.gif
torchrl-sql evaluate examples/quickstart_policy.safetensors --episodes 20 --out runs/example
```

| game | mean return of {episodes} episodes, 95% interval over episodes | mean of its data |
|---|---|---|
{scores}

One training seed; what three say of the method is in `benchmarks/results/quickstart.json`.

**Data.** {transitions:,} transitions per game, by `torchrl-sql collect` (seed {seed}):

{sources}

**Settings.** `configs/study/quickstart.yaml`: {steps:,} gradient steps of {batch} transitions, {encoder}, C51, CQL
alpha {alpha}. Protocol: epsilon {epsilon}, sticky actions {sticky}, at most {frames:,} emulator frames per episode.

**Limits.** It plays these games as the emulator of ale-py 0.12 starts them, from 84 x 84 grey frames, and nothing else.
A small network trained for minutes: an example, not a baseline to compare with. To train on from it, take its encoder
(`init.policy=FILE init.load=encoder`): its heads lack the actions that are not legal.

**Licence.** MIT, as the repository. Trained as `benchmarks/results/quickstart.md` says; file and card made by
`python benchmarks/ship_policy.py`, commit {commit}, {date}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--run", default="scaled_ql/seed0")
    args = parser.parse_args()
    folder = args.study / args.run
    config = load_run_config(folder / "config.yaml")
    export_policy(folder, POLICY, compact=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(["evaluate", str(POLICY), "--episodes", "20", "--out", scratch])
        played = read_episodes(Path(scratch, "scores.csv"))
    store = FrameStore.open(args.study / "store")
    scores, sources = [], []
    for game in config.games:
        recording = store.recording(game)
        returns = [row.episode_return for row in played if row.game == game]
        point, low, high = (float(end) for end in student(np.array(returns)))
        data = float(recording.rewards.sum()) / len(recording.episodes)
        scores.append(f"| {game} | {point:.1f} [{low:.1f}, {high:.1f}] | {data:.1f} |")
        sources.append(f"- {game}: {recording.manifest.source}")
    machine, method, evaluation = describe_benchmark(), config.method, config.evaluation
    card = CARD.format(
        kilobytes=POLICY.stat().st_size / 1000, run=args.run, games=", ".join(config.games), episodes=20,
        scores="\n".join(scores), sources="\n".join(sources), transitions=config.collection.num_agent_steps_per_game,
        seed=config.collection.seed, steps=config.trainer.num_gradient_steps, batch=config.data.batch_size,
        encoder=config.model.encoder, alpha=method.cql_alpha, epsilon=evaluation.epsilon,
        sticky=evaluation.sticky_action_probability, frames=evaluation.max_env_frames_per_episode,
        commit=machine["commit"], date=machine["date"],
    )  # fmt: skip
    POLICY.with_suffix(".md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
