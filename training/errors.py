"""What stops a run, each in one sentence that says what to do; with exit status 1, no traceback.

    StopTraining, a full disk, a dead worker, no memory -> explain_errors -> SystemExit(sentence)
"""

import errno
import math
from contextlib import contextmanager

from dataset.readers.worker_state import explain
from model.pretrained.checkpoint import checkpoints
from training.device import is_out_of_memory
from training.precision import first_nonfinite_weight

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share, the file
MIN_SAMPLES = 100  # that must have been met before the share of unusable ones is judged
NO_GRADIENT = 20  # steps; some may be of text alone, by chance
MIN_SKIPPED = 10  # fewer may be chance: of 100 samples two are bad in 9 % of runs where 0.5 % are


class StopTraining(Exception):
    """The run cannot go on; the text says why and what to do. Checkpoints stay as they are."""


class NotFinite(StopTraining):
    """The loss, or a weight after an update, is not finite. A resume from before `step` may change
    the settings that change the curve, see training/settings.py."""

    def __init__(self, step: int, text: str):
        super().__init__(text)
        self.step = step


@contextmanager
def explain_errors(settings, loaders=(), advice=None):
    """loaders: the Batches whose workers may die. advice() -> what to do about a loss that is not
    finite."""
    try:
        yield
    except NotFinite as reason:
        raise SystemExit(f"\nstopped: {reason} {advice()}") from reason
    except StopTraining as reason:
        raise SystemExit(f"\nstopped: {reason}") from reason
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise SystemExit(out_of_memory(error, settings)) from error
        reason = explain(error, [loader.worker_state for loader in loaders])
        if reason is None:
            raise
        raise SystemExit(f"\nstopped: {reason}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise SystemExit(f"\nstopped: cannot write to {settings.out}: {error}. Its checkpoints are "
                         "as they were; make room, then go on with --resume.") from error


def out_of_memory(error: BaseException, settings) -> str:
    """The order of samples follows from the seed, so the same step would fail again: say what
    makes a step smaller and leaves its samples as they are."""
    size, ways = settings.batch_size, ("--gradient_checkpointing keeps fewer activations; a lower "
                                       "--max_length cuts long rows")
    if size > 1:
        ways = (f"--batch_size {math.ceil(size / 2)} --gradient_accumulation_steps "
                f"{settings.gradient_accumulation_steps * 2} takes "
                f"{'about as many' if size % 2 else 'the same'} samples in each step, half of them "
                f"at a time; {ways}")
    if checkpoints(settings.out):
        ways += "; --resume goes on from the last checkpoint"
    return (f"\nout of memory: {str(error).strip().splitlines()[0]}\nWhat helps: {ways}. `python "
            f"-m extras.memory {settings.preset}` with the flags of this run predicts what it "
            "takes.")


def check_skipped(state, max_share: float, at_end: bool = False) -> None:
    """Stop when too many samples are unusable: --image_folder or the format is likely wrong."""
    met = state.samples + state.skipped
    enough = at_end or (met >= MIN_SAMPLES and state.skipped >= MIN_SKIPPED)
    if enough and state.skipped > max_share * met:
        raise StopTraining(
            f"{state.skipped:,} of {met:,} samples were unusable ({state.skipped / met:.1%}), "
            f"more than --max_skip_ratio {max_share:g} allows; the first ones are listed above. "
            "Repair the data or check --image_folder and --max_length; or allow more with "
            "--max_skip_ratio.")


def gradient_check(steps):
    """-> a hook that stops a run whose trained parts get no gradient from any sample: the loss
    would stand still, and weight decay alone would move the weights."""
    silent = 0  # steps from the first on

    def check(step: int, metrics: dict) -> None:
        nonlocal silent
        if silent is not None and metrics["supervised_tokens"]:
            silent = silent + 1 if metrics["grad_norm"] == 0 else None
            if silent and (silent == NO_GRADIENT or step == steps.total):
                images = any(batch.order is not None for batch in steps.batches)
                raise StopTraining(
                    f"steps {step - silent + 1} to {step}: what is trained gets no gradient"
                    + ("" if images else ", and no sample of the last step shows an image. A "
                       "projector or a vision tower learns from images alone: is the key that "
                       "names them read (python -m extras.check_data)? For text alone, train the "
                       "language model (--lora, --train_language)"))

    return check


def not_finite(step: int, totals: tuple, batches, losses, unfit: str | None,
               rank: int) -> NotFinite:
    """Which samples made the loss infinite or NaN, as far as this rank knows.

    totals: loss and gradient norm over all ranks. losses: of this rank's batches. unfit: what
    precision.first_nonfinite_weight says of the weights.
    """
    loss, norm = totals
    guilty = [batch for batch, own in zip(batches, losses) if not math.isfinite(own)]
    if math.isfinite(loss):  # some derivative is not finite: any of them may have caused it
        guilty = batches
    return NotFinite(step, f"step {step}: the loss is {loss:g} and the gradient's length {norm:g}"
                     + (f"; {unfit}" if unfit else "")
                     + f". {list_samples(guilty, rank)} Weights were not changed.")


def check_weights(model, step: int, batches, dtype: str, distributed) -> None:
    """Before a save: from a checkpoint with which no loss is finite, no run can go on."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if unfit := first_nonfinite_weight(trained, dtype, distributed):
        raise NotFinite(step, f"step {step}: after its update {unfit}. "
                              f"{list_samples(batches, distributed.rank)} It was not saved.")


def list_samples(batches, rank: int) -> str:
    lines = [where for batch in batches for where in batch.where]
    return (f"Rank {rank} was at these samples: "
            f"{', '.join(lines) or 'none that was not finite, look at the other ranks'}.")
