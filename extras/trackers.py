"""--report_to wandb, swanlab, trackio or tensorboard: the figures of a run as curves in a browser.

    metrics.jsonl, evaluations.jsonl -> the same numbers, named train/... and eval/...

None of the packages is needed otherwise: requirements-extra.txt. A resumed run goes on in the same
TensorBoard directory, whose curves are cut where it was resumed; the others begin a new run of the
same name, whose steps go on, and keep their files where they always do (WANDB_DIR, SWANLAB_LOG_DIR,
TRACKIO_DIR).
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def check_installed(tracker: str | None) -> None:
    """Better now than after the model is loaded."""
    if tracker and find_spec(tracker) is None:
        raise SystemExit(f"--report_to {tracker}: the package {tracker} is not installed; pip "
                         f"install "
                         f"{tracker}, or leave --report_to out: metrics.jsonl has the figures")


def open_tracker(settings, first_step: int):
    """-> log(kind, step, figures) and close() of the tracker that --report_to names; of none, both
    do nothing. kind: "train" or "eval". first_step: TensorBoard's curves are cut before it."""
    if not settings.report_to:
        return lambda kind, step, figures: None, lambda: None
    if settings.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(Path(settings.out) / "tensorboard"), purge_step=first_step)
        close = writer.close

        def write(values: dict, step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()
    else:
        tracker = import_module(settings.report_to)
        tracker.init(project="vlm", name=str(settings.out), config=vars(settings))
        write, close = tracker.log, tracker.finish

    def log(kind: str, step: int, figures: dict) -> None:
        write({f"{kind}/{name}": value for name, value in figures.items() if value is not None},
              step=step)

    return log, close
