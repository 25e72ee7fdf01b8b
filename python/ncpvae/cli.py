"""The command line: `ncpvae COMMAND`, also `python -m ncpvae COMMAND`; `ncpvae --help` lists the commands."""

import atexit
import dataclasses
import io
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

from ._distributed import is_initialized, leave_group, rank, world_size


def _commands(argv: Sequence[str]) -> dict[str, Callable[..., None]]:
    """The commands by name; their parameters are their flags, their docstrings the help."""
    from tyro.conf import Positional, arg, subcommand

    from .recipes import RECIPES
    from .runs import Run, open_run
    from .runs.folder import writable
    from .runs.sampling import Sampling

    command = shlex.join(["ncpvae", *_without_resume(argv)])
    known = _settings_of(argv)
    Stage: Any = type(known.prior)
    Measuring: Any = type(known.evaluation)
    recipes = tuple(Annotated[type(r), subcommand(name, default=r)] for name, r in RECIPES.items())
    AnyRecipe: Any = Annotated[Union[recipes], arg(name="")]  # noqa: UP007

    def opened(run: Path, device: str, data_dir: str | None) -> Run:
        return open_run(run, device, data_dir)

    def train(
        recipe: AnyRecipe,
        output: Path | None = None,
        resume: str = "never",
        device: str = "auto",
        data_dir: str | None = None,
        dry_run: bool = False,
        page: bool = True,
        progress: bool = True,
    ) -> None:
        """Stage one: train the VAE of a recipe. Every field of the recipe is a flag.

        Args:
            output: folder of the run; runs/RECIPE by default
            resume: auto goes on from the newest checkpoint of the run, if any; a path from that one
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets (default: $NCPVAE_DATA, then the Hugging Face hub)
            dry_run: print the resolved recipe, the number of parameters and an estimate of memory, and stop
            page: write RUN/report.html at the end
            progress: show a progress bar
        """
        from .runs import training

        name = next(name for name, known in RECIPES.items() if type(known) is type(recipe))
        folder = output or Path("runs") / name
        if dry_run:
            print(_plan(name, recipe, folder))
            return
        writable(folder)
        started = time.perf_counter()
        run, result = training.train(folder, name, recipe, command, resume, device, data_dir, progress)
        best = f", weights of step {result.best_step:,}" if result.best_step != result.steps else ""
        last = next(r for r in result.history if r["step"] == result.best_step)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in last.items() if key != "step")
        _say(f"{folder}: {result.steps:,} steps in {time.perf_counter() - started:.0f} s{best}; {shown}")
        _page(run, page)
        _say(f"next: ncpvae fit-prior {shlex.quote(str(run.folder))}")

    def fit_prior(
        run: Positional[Path],
        stage: Annotated[Stage, arg(name="")] = known.prior,
        resume: str = "never",
        overwrite: bool = False,
        device: str = "auto",
        data_dir: str | None = None,
        page: bool = True,
        progress: bool = True,
    ) -> None:
        """Stage two: train the noise contrastive prior of a run's VAE.

        Args:
            run: folder of the run
            resume: auto goes on from the newest checkpoint, if any; a path from that one
            overwrite: throw away the prior that the run has, and all its checkpoints
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
            page: write RUN/report.html at the end
            progress: show a progress bar
        """
        from .runs import training

        if overwrite and resume != "never":
            raise ValueError("fit-prior: --overwrite starts afresh and --resume goes on, got both")
        trained = opened(run, device, data_dir)
        result = training.fit_prior(trained, stage, command, resume, overwrite, progress)
        _say(
            f"{run}: {result.steps:,} steps in {result.seconds:.0f} s; held-out loss {_numbers(result.loss)} (1.386 "
            f"where q(z) and the base agree), JSD ≥ {_numbers(result.jsd)} nats, accuracy {_numbers(result.accuracy)}"
        )
        _page(opened(run, device, data_dir), page)
        _say(f"next: ncpvae evaluate {shlex.quote(str(run))} && ncpvae report {shlex.quote(str(run))}")

    def sample(
        run: Positional[Path],
        count: int = 64,
        sampling: Annotated[Sampling, arg(name="")] = Sampling(),  # noqa: B008
        temperature: float = 1.0,
        base: bool = False,
        seed: int = 0,
        output: Path | None = None,
        device: str = "auto",
    ) -> None:
        """Draw samples from a run's prior: a picture and a safetensors file with z and x.

        Args:
            run: folder of the run
            count: how many, over all processes
            temperature: scales the base prior's standard deviation
            base: draw from the base prior instead
            seed: governs the draws
            output: the .safetensors file (default: in RUN/samples)
            device: auto, cpu, cuda, …
        """
        from .runs.hierarchical import Draws
        from .runs.sampling import sample as draw

        path, result = draw(opened(run, device, None), count, sampling, temperature, base, seed, output)
        beside = [path.with_suffix(suffix).name for suffix in (".png", ".txt") if path.with_suffix(suffix).is_file()]
        _say(" and ".join([str(path), *beside]))
        if isinstance(result, Draws):
            each = ", ".join("none" if math.isnan(value) else f"{value:.1f}" for value in result.ess.mean(0).tolist())
            _say(f"ESS of each group's proposals on average {each}; {result.seconds:.1f} s")
        elif result is not None:
            d = result.diagnostics
            if d.stopped == "num_steps":
                _say(f"{count:,} chains of {sampling.langevin_steps:,} steps, {d.seconds:.1f} s")
            else:
                ess = float(d.ess.mean())
                _say(f"{d.num_proposals:,} base draws for each, ESS {ess:.1f} on average, {d.seconds:.1f} s")

    def evaluate(
        run: Positional[Path],
        evaluation: Annotated[Measuring, arg(name="")] = known.evaluation,
        features: str | None = None,
        seed: int | None = None,
        device: str = "auto",
        data_dir: str | None = None,
        page: bool = True,
    ) -> None:
        """Measure a run: likelihoods, the prior hole, sample quality, memorisation; writes RUN/evaluation.json.

        Args:
            run: folder of the run
            features: feature space for images: folder of a classifier by train-features, or inception:FILE
            seed: governs all draws (default: the recipe's)
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
            page: write RUN/report.html anew
        """
        from .runs.evaluation import evaluate as measure
        from .runs.evaluation import table_of

        measured = opened(run, device, data_dir)
        _say(table_of(measure(measured, evaluation, features, seed, command)))
        _page(measured, page)

    def diagnose(
        run: Positional[Path],
        examples: int | None = None,
        seed: int | None = None,
        device: str = "auto",
        data_dir: str | None = None,
        page: bool = True,
    ) -> None:
        """Whether the code has collapsed: a verdict and the figures behind it; writes RUN/diagnosis.json.

        Args:
            run: folder of the run
            examples: test examples (default: all); more raise the cap of the mutual information
            seed: governs all draws (default: the recipe's)
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
            page: write RUN/diagnosis.html
        """
        from .runs import diagnosis

        examined = opened(run, device, data_dir)
        _say(diagnosis.text_of(diagnosis.diagnose(examined, examples, seed, command)))
        _page(examined, page, diagnosis.write_page)

    def reconstruct(run: Positional[Path], count: int = 32, device: str = "auto", data_dir: str | None = None) -> None:
        """Test examples and what the VAE makes of them, as a picture in RUN/samples.

        Args:
            run: folder of the run
            count: how many
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
        """
        from .runs.sampling import reconstruct as draw

        _say(str(draw(opened(run, device, data_dir), count)))

    def interpolate(
        run: Positional[Path], rows: int = 8, steps: int = 10, device: str = "auto", data_dir: str | None = None
    ) -> None:
        """Pictures between pairs of test examples, in RUN/samples.

        Args:
            run: folder of the run
            rows: pairs
            steps: pictures from one to the other
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
        """
        from .runs.sampling import interpolate as draw

        _say(str(draw(opened(run, device, data_dir), rows, steps)))

    def compare(runs: Positional[tuple[Path, ...]], output: Path | None = None) -> None:
        """Tables of the figures of several evaluated runs; those that differ by the seed alone count as one model.

        Args:
            runs: their folders
            output: JSON file for all figures, with protocols and settings
        """
        from .runs.comparison import compare as table

        if not runs:
            raise ValueError("compare: name the folders of runs that have been evaluated")
        _say(table(list(runs), output))

    def report(run: Positional[Path], device: str = "auto", data_dir: str | None = None) -> None:
        """Write RUN/report.html: curves, samples, reconstructions, latents, figures, all on one page.

        Args:
            run: folder of the run
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
        """
        from .runs.reporting import report as write

        _say(str(write(opened(run, device, data_dir))))

    def train_features(
        data: Positional[str],
        output: Path | None = None,
        steps: int = 5000,
        batch_size: int = 128,
        lr: float = 1e-3,
        seed: int = 0,
        device: str = "auto",
        data_dir: str | None = None,
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        """Train a classifier whose features `evaluate --features` compares images in.

        Args:
            data: name of a data set with one class per image
            output: folder for the classifier; features/DATA by default
            steps: optimiser steps
            batch_size: of all processes together
            lr: of Adam
            seed: governs all randomness
            device: auto, cpu, cuda, …
            data_dir: folder that holds data sets
            overwrite: replace a classifier that is there
            progress: show a progress bar
        """
        from .runs.features import train_features as fit

        kind, _, path = data.partition(":")
        folder = output or Path("features") / (Path(path).stem or kind)
        classifier = fit(data, folder, steps, batch_size, lr, seed, device, data_dir, overwrite, progress)
        _say(f"{folder}: {classifier.name}")

    def demo(
        names: Positional[tuple[str, ...]] = ("gaussians", "digits"),
        output: Path = Path("demo-output"),
        steps: int | None = None,
        seed: int = 0,
        device: str = "auto",
        data_dir: str | None = None,
        progress: bool = True,
    ) -> None:
        """Train a VAE, measure its prior hole, close it with a noise contrastive prior, and write a page about it.

        Args:
            names: of gaussians, digits, mnist
            output: folder for the runs; a demo that was interrupted goes on from there
            steps: of stage one; stage two in proportion
            seed: governs all randomness
            device: auto, cpu, cuda, …
            data_dir: folder that holds mnist
            progress: show progress bars
        """
        from .runs.demo import DEMOS
        from .runs.demo import demo as show

        for name in names:
            if name not in DEMOS:
                raise ValueError(f"demo must be one of {', '.join(DEMOS)}, got {name!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"--steps must be ≥ 1, got {steps}")
        writable(output)
        for name in names:
            _say(show(name, output, steps, seed, device, data_dir, progress))

    def bench(
        ops: Positional[tuple[str, ...]] = (),
        quick: bool = False,
        output: Path | None = None,
        seconds: float = 1.0,
        threads: int | None = None,
        device: str = "auto",
        allow_load: bool = False,
    ) -> None:
        """Time ops on this machine against eager torch and other peers, and say which goals they meet.

        Args:
            ops: of sir_resample, sir_update, langevin_step, similarity_logsumexp, gaussian_logsumexp; all by default
            quick: only the sizes of the goals and small ones, against the peers that goals name; a few minutes
            output: file for the figures, a JSON object per line
            seconds: of measuring for each contender
            threads: torch's (default: as many as it takes by itself)
            device: auto, cpu, cuda, …
            allow_load: accept a machine that other processes keep busy; the figures say so
        """
        from .bench import bench as measure
        from .runs.folder import chosen_device

        measure(ops, quick, output, seconds, threads, chosen_device(device), allow_load, _say)

    def info() -> None:
        """Versions, devices, and which kernels serve each op."""
        from .info import info as text

        _say(text())

    stages = (train, fit_prior, sample, evaluate, diagnose, reconstruct, interpolate, compare, report)
    return {f.__name__.replace("_", "-"): f for f in (*stages, train_features, demo, bench, info)}


def _page(run: Any, wanted: bool, write: Callable[[Any], Path] | None = None) -> None:
    """A page at the end of a command, the run's by default; what it needs may be missing, and the work is done."""
    from .runs.reporting import report

    if not wanted:
        return
    try:
        path = (write or report)(run)
    except (ImportError, RuntimeError) as error:  # on other processes than the first an ImportError is told of so
        if isinstance(error, RuntimeError) and "ImportError" not in str(error):
            raise
        _say(f"no page: {error}")
    else:
        _say(f"page: {path}")


def _settings_of(argv: Sequence[str]) -> Any:
    """The recipe of the run that the command line names: the defaults of flags that have its settings."""
    from .recipes import RECIPES
    from .runs import open_run

    models = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--features"]  # folders, but not runs
    folders = [Path(word) for word in argv[1:] if word not in models and (Path(word) / "config.json").is_file()]
    needed = argv[:1] in (["fit-prior"], ["evaluate"])
    return open_run(folders[0]).recipe if needed and folders else RECIPES["mnist-mlp"]


def _plan(name: str, recipe: Any, folder: Path) -> str:
    from .runs.training import plan

    planned = plan(recipe)
    settings = json.dumps(dataclasses.asdict(recipe), indent=2, ensure_ascii=False)
    lines = [f"recipe {name}, run {folder}", settings, ""]
    lines += [f"parameters of the {part}: {count:,}" for part, count in planned["parameters"].items()]
    total = sum(planned["memory"].values())
    parts = ", ".join(f"{part} {size / 2**20:,.0f} MiB" for part, size in planned["memory"].items())
    return "\n".join([*lines, f"memory for training, about {total / 2**20:,.0f} MiB a process: {parts}"])


def _numbers(value: float | list[float]) -> str:
    """A figure, or those of all groups."""
    return f"{value:.4f}" if isinstance(value, float) else ", ".join(f"{v:.4f}" for v in value)


def _say(text: str) -> None:
    """Print in the main process."""
    if rank() == 0:
        print(text, flush=True)


def _complain(error: Exception) -> None:
    """What went wrong, on one process's standard error."""
    if rank() == 0:
        print(f"ncpvae: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 failure, 2 usage or bad input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        import tyro
    except ImportError:
        print("ncpvae: the command line needs tyro: pip install 'ncpvae[cli]'", file=sys.stderr)
        return 2
    from .bench import MachineLoaded
    from .train import TrainingDiverged, TrainingInterrupted

    for stream in (sys.stdout, sys.stderr):  # a figure's name with a letter that it has not is still a figure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, in all that does not save its state
    try:
        tyro.extras.subcommand_cli_from_dict(
            _commands(argv),
            prog="ncpvae",
            description="Noise contrastive priors and contrastive critics for variational autoencoders.",
            args=argv,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except SystemExit as end:  # tyro's own: help, or usage
        return int(end.code or 0)
    except BrokenPipeError:  # whoever read the output has seen enough; what is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        _complain(error)
        return 2
    except MachineLoaded as error:
        _complain(error)
        return 1
    except RuntimeError as error:
        if "failed on rank" not in str(error):
            raise
        _complain(error)
        return 2
    except TrainingDiverged as error:
        _complain(error)
        return 1
    except TrainingInterrupted as error:
        if rank() == 0:
            print(f"ncpvae: {error}\nto go on{_by_the_launcher()}: {_resuming(argv)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("ncpvae: interrupted", file=sys.stderr)
        return 130
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        if is_initialized():
            atexit.register(leave_group)
    return 0


def _resuming(argv: Sequence[str]) -> str:
    """The command line that goes on with the run of this one."""
    words = [word for word in _without_resume(argv) if word != "--overwrite"]
    return shlex.join(["ncpvae", *words, *([] if words[:1] == ["demo"] else ["--resume", "auto"])])


def _by_the_launcher() -> str:
    return f", started as before in {world_size()} processes" if world_size() > 1 else ""


def _without_resume(argv: Sequence[str]) -> list[str]:
    words = [word for i, word in enumerate(argv) if word != "--resume" and (i == 0 or argv[i - 1] != "--resume")]
    return [word for word in words if not word.startswith("--resume=")]
