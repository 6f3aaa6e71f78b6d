"""``torchrl-sql bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchrl_sql.cli.train import OVERRIDES_HELP
from torchrl_sql.files import write_text


def add_commands(commands: Any) -> None:
    """Adds the parsers of these commands to ``commands``, the subparsers of ``torchrl-sql``."""
    bench = commands.add_parser(
        "bench", help="measure steps, readers and links here, and plan a run", description=_bench.__doc__
    )
    bench.add_argument("--samples", default="512,128,64,16,4", help="batch sizes of one device (default: %(default)s)")
    bench.add_argument("--gpus", default="1,8,32,128", help="numbers of GPUs to plan for (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=20, help="of each measurement (default: %(default)s)")
    bench.add_argument("--json", type=Path, help="write the measurements to this file")
    bench.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    bench.set_defaults(run_command=_bench)


def _bench(args: argparse.Namespace) -> None:
    """Time a run's gradient step at several batch sizes, its readers and, if started on several GPUs (as with
    torchrun), the links between them; then print how long the run would take on more of them. docs/scaling.md
    explains the arithmetic.
    """
    import json
    from dataclasses import asdict

    from torchrl_sql.config import compose_run_config

    config = compose_run_config(args.overrides)  # before torch is imported: a mistake is named at once
    from torchrl_sql.bench import format_measurements, format_plans, measure, plan
    from torchrl_sql.training.device import resolve_device
    from torchrl_sql.training.ranks import process_group

    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    samples, numbers_of_gpus = _numbers("--samples", args.samples), _numbers("--gpus", args.gpus)
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json must be a file, got the folder {args.json}")
    with process_group(resolve_device(config.trainer.device)) as ranks:
        measured = measure(config, ranks, samples_per_gpu=samples, num_repeats=args.repeats)
    if not ranks.is_main:
        return
    print(format_measurements(measured))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps(asdict(measured), indent=1) + "\n")
    plans = []
    for num_gpus in numbers_of_gpus:
        try:
            plans.append(
                plan(
                    measured,
                    num_gpus=num_gpus,
                    batch_size=config.data.batch_size,
                    num_gradient_steps=config.trainer.num_gradient_steps,
                )
            )
        except ValueError as error:
            print(f"no plan for {num_gpus} GPUs: {error}")
    print(f"\n{config.trainer.num_gradient_steps:,} gradient steps of {config.data.batch_size} transitions:\n")
    print(format_plans(plans))


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be whole numbers separated by commas, got {text!r}") from None
    if min(numbers) < 1:
        raise ValueError(f"{option} must be numbers of at least 1, got {text!r}")
    return numbers
