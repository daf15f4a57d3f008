"""--report_to wandb, swanlab, trackio or tensorboard: the figures of a run as curves in a browser.

    metrics.jsonl, evaluations.jsonl -> the same numbers, named train/... and eval/...

A resumed run goes on in the same TensorBoard directory, whose curves are cut where it was resumed;
the others begin a new run of the same name, whose steps go on.
"""

from importlib import import_module
from importlib.util import find_spec


def check_installed(tracker: str) -> None:
    """Better now than after the model is loaded."""
    if find_spec(tracker) is None:
        raise SystemExit(f"--report_to {tracker}: the package {tracker} is not installed; pip "
                         f"install {tracker}, or leave --report_to out: metrics.jsonl has the "
                         "figures")


def open_tracker(settings, first_step: int):
    """-> log({name: number}, step=...) and finish() of the tracker that --report_to names."""
    if settings.report_to == "tensorboard":
        return TensorBoard(f"{settings.out}/tensorboard", first_step)
    tracker = import_module(settings.report_to)
    tracker.init(project="vlm", name=str(settings.out), config=vars(settings))
    return tracker


class TensorBoard:
    """What the three others have in common."""

    def __init__(self, directory: str, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # here: the package may not be there

        self.writer = SummaryWriter(directory, purge_step=first_step)
        self.finish = self.writer.close

    def log(self, figures: dict, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
