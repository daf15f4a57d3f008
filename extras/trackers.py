"""--log tensorboard, wandb or swanlab: the figures of the log, in curves to look at in a browser.

    Log.step, Log.evaluation -> (step, figures) -> the board's own files or service

The same numbers as in metrics.jsonl and evaluations.jsonl, under train/ and eval/. None of the
packages is needed otherwise: requirements-extra.txt. A resumed run goes on in the same TensorBoard
directory, and there the curve is cut where it was resumed; wandb and swanlab begin a new run under
the same name, whose steps go on.
"""

from importlib.util import find_spec
from pathlib import Path

PROJECT = "vlm"  # under which wandb and swanlab list the runs


def check_installed(board: str | None) -> None:
    """Better now than after the model is loaded."""
    if board and find_spec(board) is None:
        raise SystemExit(f"--log {board}: the package {board} is not installed; "
                         f"pip install {board}, or leave --log out: metrics.jsonl has the figures")


def open_board(settings, first_step: int):
    """-> write(kind, step, figures) and close(), of the board that --log names; of none: both do
    nothing. kind: "train" or "eval". first_step: what the board knows from there on is dropped.
    """
    if settings.log == "tensorboard":
        return open_tensorboard(Path(settings.out) / "tensorboard", first_step)
    if settings.log == "wandb":
        import wandb

        run = wandb.init(project=PROJECT, name=settings.out, dir=settings.out,
                         config=vars(settings))
        return lambda kind, step, figures: run.log(named(kind, figures), step=step), run.finish
    if settings.log == "swanlab":
        import swanlab

        directory = Path(settings.out) / "swanlab"
        directory.mkdir(exist_ok=True)
        swanlab.init(project=PROJECT, experiment_name=settings.out, config=vars(settings),
                     logdir=str(directory))
        return (lambda kind, step, figures: swanlab.log(named(kind, figures), step=step),
                swanlab.finish)
    return lambda kind, step, figures: None, lambda: None


def open_tensorboard(directory: Path, first_step: int):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory), purge_step=first_step)

    def write(kind: str, step: int, figures: dict) -> None:
        for name, value in named(kind, figures).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def named(kind: str, figures: dict) -> dict:
    """{"loss": 1.5} -> {"train/loss": 1.5}; without what there is no number for."""
    return {f"{kind}/{name}": value for name, value in figures.items() if value is not None}
