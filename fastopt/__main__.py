"""The command line: ``python -m fastopt info | compare | demo`` (or ``fastopt ...`` once installed).

Each command imports what it needs when it runs, so that ``info`` is quick and needs no extras.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fastopt.backends import BackendError
from fastopt.tools.compare import Interrupted, NothingComparedError

COMPARE_EXAMPLES = """\
examples:
  fastopt compare --task digits
  fastopt compare --task digits --optimizers adam,radam,ranger --lrs 1e-3,1e-2,1e-1 --seeds 5
  fastopt compare --task chars --optimizers "sgd(momentum=0.9), lookahead(adam, k=6), torch.adam" --out results

optimizers, in small letters or as here:
{names}
  and torch's own, as in torch.adam

For a model and a loss of your own: fastopt.compare(make_model, loss, batches) in Python; see help(fastopt.compare).
"""


PICTURES = (".png", ".svg", ".pdf")
THREADS = "torch threads (default: 1; such small models gain nothing by more, and lose much where another job runs)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a request that cannot be met."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, TypeError, ModuleNotFoundError, BackendError, NothingComparedError, OSError) as error:
        print(f"fastopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastopt: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    from .tools.entrants import default_names

    parser = argparse.ArgumentParser(prog="fastopt", description="Optimizers for PyTorch: look, compare, watch.")
    parser.add_argument("--version", action="version", version=f"fastopt {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, devices, and which backend serves which device")
    info.set_defaults(run=_info)

    compare = commands.add_parser(
        "compare",
        help="find out which optimizer suits a problem, and at which learning rate",
        description="Train a model with several optimizers, learning rates and seeds, and rank them against the noise.",
        epilog=COMPARE_EXAMPLES.format(names=textwrap.indent(textwrap.fill(", ".join(default_names()), 100), "  ")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("--task", default="digits", help="digits (default) or chars")
    compare.add_argument("--optimizers", metavar="NAMES", help="separated by commas (default: all that fastopt has)")
    compare.add_argument(
        "--lrs", metavar="RATES", help="the grid, separated by commas (default: searched for each optimizer)"
    )
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (default: 3)")
    compare.add_argument(
        "--steps", type=int, default=300, metavar="N", help="optimizer steps of each run (default: 300)"
    )
    compare.add_argument("--threads", type=int, default=1, metavar="N", help=THREADS)
    compare.add_argument("--out", type=Path, metavar="DIR", help="write compare.csv and compare.png there")
    compare.set_defaults(run=_compare)

    demo = commands.add_parser(
        "demo",
        help="watch fastopt and torch.optim train real models side by side (about a minute)",
        description="Train real models with torch.optim and with fastopt side by side, for a table and a picture.",
    )
    demo.add_argument("--task", help="digits or chars (default: both)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo.png"),
        metavar="PNG",
        help="the picture (default: demo.png), beside which the numbers are written as .csv",
    )
    demo.add_argument(
        "--steps", type=int, metavar="N", help="steps of each training (default: 600 for digits, 250 for chars)"
    )
    demo.add_argument("--threads", type=int, default=1, metavar="N", help=THREADS)
    demo.set_defaults(run=_demo)
    return parser


def _info(options: argparse.Namespace) -> int:
    import fastopt

    print(fastopt.info())
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .report import need
    from .tools import tasks
    from .tools.compare import compare
    from .tools.entrants import split_names

    task = tasks.get(options.task)
    names = None if options.optimizers is None else split_names(options.optimizers)
    lrs = None if options.lrs is None else _rates(options.lrs)
    if options.out is not None:  # whatever is in the way of writing there is better known before the training
        need("matplotlib", "the picture of --out")
        _check_writable(options.out / "compare.csv", options.out / "compare.png")
    try:
        with tasks.threads(options.threads):
            result = compare(
                task.build, task.loss, task.batches, task.evaluate,
                optimizers=names, lrs=lrs, seeds=options.seeds, steps=options.steps,
            )  # fmt: skip
    except Interrupted as stop:
        if stop.result.runs:
            print(f"{task.name}, the optimizers that were finished:\n\n{stop.result}")
        raise
    print(f"{task.name}: {task.description}\n\n{result}")
    if options.out is not None:
        result.to_csv(options.out / "compare.csv")
        print(f"\nNumbers: {options.out / 'compare.csv'}")
        result.plot(options.out / "compare.png")
        print(f"Picture: {options.out / 'compare.png'}")
    return 0


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",") if rate.strip()]
    except ValueError:
        raise ValueError(f"--lrs={text}: accepted are numbers separated by commas, as in 1e-3,1e-2,1e-1") from None


def _tasks_to_show(wanted: list[str]) -> list[str]:
    """Those of the tasks that can run here; says on stderr, all at once, what the others and the picture need."""
    from .tools import demo

    lacking = demo.lacking([*wanted, "picture"])
    names = [name for name in wanted if name not in lacking]
    needs = ", ".join(f"{what} needs {package}" for what, package in lacking.items())
    install = f'pip install {" ".join(lacking.values())} (in the source tree: pip install ".[demo]")'
    if not names:
        raise ModuleNotFoundError(f"{needs}; {install}, or take --task chars")
    if lacking:
        print(f"fastopt: going on without {', '.join(lacking)}: {needs}; {install}", file=sys.stderr)
    return names


def _check_writable(*paths: Path) -> None:
    """Whether these files can be made; better known before the training. Leaves none behind that was not there."""
    for path in paths:
        existed = os.path.lexists(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass
            if not existed:
                path.unlink()
        except OSError as error:
            raise OSError(f"--out: {path} cannot be written: {error.strerror}") from error


def _version() -> str:
    import fastopt

    return fastopt.__version__


def _demo(options: argparse.Namespace) -> int:
    from .tools import demo

    if options.out.suffix.lower() not in PICTURES or options.out.is_dir():  # better known before the training
        raise ValueError(f"--out={options.out}: accepted are files whose names end in {', '.join(PICTURES)}")
    _check_writable(options.out, options.out.with_suffix(".csv"))
    names = _tasks_to_show([options.task] if options.task else list(demo.STEPS))
    result = demo.run(names, steps=options.steps, threads=options.threads)
    print(f"{result}\n", flush=True)
    print(demo.save(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
