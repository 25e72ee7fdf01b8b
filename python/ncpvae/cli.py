"""The command line: `ncpvae demo [gaussians] [digits] [mnist]` and `ncpvae info`."""

import argparse
import sys
from collections.abc import Sequence

DEMOS = ("gaussians", "digits", "mnist")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ncpvae", description="Noise contrastive priors for variational autoencoders."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="train a VAE, measure its prior hole, close it with a noise contrastive prior"
    )
    demo.add_argument("name", nargs="*", metavar="NAME", help=f"of {', '.join(DEMOS)}; gaussians and digits by default")
    demo.add_argument("--output", default="demo-output", help="folder for tables and pictures (default: %(default)s)")
    demo.add_argument(
        "--steps", type=int, help="training steps of stage one; stage two in proportion, for mnist at most 50,000"
    )
    demo.add_argument("--seed", type=int, default=0, help="governs all randomness (default: %(default)s)")
    demo.add_argument("--data-dir", help="folder that holds mnist (default: $NCPVAE_DATA, then the Hugging Face hub)")
    demo.add_argument("--vae", metavar="FILE", help="mnist: weights of an earlier run, to skip stage one")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    commands.add_parser("info", help="versions, devices, and which kernels serve each op")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from importlib import import_module
    from pathlib import Path

    from .data import check_folder
    from .demos.report import output_folder

    names = arguments.name or ["gaussians", "digits"]
    for name in names:
        if name not in DEMOS:
            raise ValueError(f"demo must be one of {', '.join(DEMOS)}, got {name!r}")
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps must be ≥ 1, got {arguments.steps}")
    if "mnist" not in names and (arguments.data_dir or arguments.vae):
        raise ValueError("--data-dir and --vae are for the demo mnist, which is not among those to run")
    if arguments.vae and not Path(arguments.vae).is_file():
        raise OSError(f"weights file {arguments.vae!r} is not a file")
    if "mnist" in names:
        check_folder("mnist", arguments.data_dir)
    folder = output_folder(arguments.output)
    for name in names:
        options = {"seed": arguments.seed, "progress": not arguments.no_progress}
        if arguments.steps is not None:
            options["steps"] = arguments.steps
        if name == "mnist":
            options |= {"data_folder": arguments.data_dir, "vae_file": arguments.vae}
        print(import_module(f".demos.{name}", __package__).run(folder, **options), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 failure, 2 usage or bad input, 130 interrupted."""
    from .train import TrainingDiverged

    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "demo":
            _demo(arguments)
        else:
            from .info import info

            print(info())
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"ncpvae: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"ncpvae: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ncpvae: interrupted", file=sys.stderr)
        return 130
    return 0
