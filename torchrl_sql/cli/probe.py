"""``torchrl-sql probe``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from torchrl_sql.files import check_exists


def add_commands(commands: Any) -> None:
    """Adds the parser of this command to ``commands``, the subparsers of ``torchrl-sql``."""
    probe = commands.add_parser(
        "probe", help="how well a linear model reads the game's state from encoders", description=_probe.__doc__
    )
    probe.add_argument(
        "policies", nargs="+", type=Path, metavar="RUN_OR_POLICY",
        help="policy.safetensors files, folders of finished runs, or folders that hold those; same-named runs are "
        "seeds of one encoder",
    )  # fmt: skip
    probe.add_argument("--games", help="names separated by commas, of games with labels (default: all that have some)")
    probe.add_argument("--episodes", type=int, default=24, metavar="N", help="per game (default: 24)")
    probe.add_argument("--states", type=int, default=50, metavar="N", help="per episode, at most (default: 50)")
    probe.add_argument("--max-env-frames", type=int, default=4_000, help="at which an episode is cut (default: 4000)")
    probe.add_argument("--seed", type=int, default=0, help="of episodes and states (default: 0)")
    probe.add_argument("--out", type=Path, help="folder of probes.json and probes.png (default: the folder given)")
    probe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    probe.add_argument("--json", action="store_true", help="print probes.json in place of the table")
    probe.set_defaults(run_command=_probe)


def _probe(args: argparse.Namespace) -> None:
    """Plays games as data is collected, and fits ridge regressions from feature maps to what the machine's memory says:
    positions, lives, score. Compares trained encoders with those before training, and with pixels, on unseen episodes.
    """
    for path in args.policies:
        check_exists(path)
    if args.out is None and (len(args.policies) > 1 or not args.policies[0].is_dir()):
        raise ValueError("--out must be given unless there is one folder, which the result goes to")
    from torchrl_sql.envs.labels import LABELS
    from torchrl_sql.evaluation.probing import PROBES, ProbeProtocol, find_policies, probe
    from torchrl_sql.games import resolve_games
    from torchrl_sql.provenance import describe_benchmark
    from torchrl_sql.report.probes import probe_plot, probe_table
    from torchrl_sql.report.style import draw
    from torchrl_sql.training.device import resolve_device

    result = probe(
        find_policies(args.policies),
        tuple(LABELS) if args.games is None else resolve_games(args.games),
        ProbeProtocol(
            num_episodes=args.episodes, states_per_episode=args.states, max_env_frames=args.max_env_frames,
            seed=args.seed,
        ),
        made=describe_benchmark() | {"command": shlex.join(["torchrl-sql", *args.words])},
        device=resolve_device(args.device),
    )  # fmt: skip
    folder = args.out or args.policies[0]
    folder.mkdir(parents=True, exist_ok=True)
    result.write(folder / PROBES)
    (plot,) = draw(lambda: [probe_plot(result)])
    picture = (folder / PROBES).with_suffix(".png")
    picture.write_bytes(plot.png())
    if args.json:
        print(result.to_json())
    else:
        table = probe_table(result)
        print(f"{table.to_text(details=False)}\n\n{table.caption}\n\nProbes: {folder / PROBES}, {picture}")
