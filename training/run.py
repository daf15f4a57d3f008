"""One stage of training from its flags to its last checkpoint: what both scripts do.

    flags + preset + checkpoint -> settings -> data, model, optimizer -> train -> checkpoint

The two scripts differ in their recipe (presets.py), in the half of the embedded world that they
read and in what comes next; that is all they say. The loop itself is loop.py.
"""

import errno
import math
import sys
from contextlib import contextmanager
from functools import partial

from dataset.batching import Batches
from dataset.readers.worker_state import told_by
from extras.fast.feature_cache import open_features, told
from extras.fsdp import check_same_start, in_turn, make_mesh, spread
from extras.memory import in_a_line, predict
from extras.report import reported
from extras.sample_generations import Answers
from extras.trackers import check_installed
from model.pretrained.checkpoint import checkpoints, newest_checkpoint, own_names
from training.device import is_out_of_memory
from training.distributed import start_ranks
from training.index_cache import open_once
from training.log import Log, closing, introduction, stopped, way_out
from training.loop import NotFinite, StopTraining, steps_of_run, train
from training.optim import choose_trained, make_optimizer
from training.precision import choose_dtype, store_weights
from training.presets import read_flags, resolve
from training.run_metadata import describe, launch, summarise
from training.setup import (
    assemble,
    changed,
    open_training_data,
    prepare_out,
    saver,
    where_to_start,
)
from training.signal_handler import listen
from training.validation import HeldOut, open_held_out
from training.writable import check_directory

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share, the file


def run(stage: str, description: str, emoji_kind: str, next_command: str, arguments=None) -> None:
    """stage: "pretrain" or "sft", which recipe of the preset counts. description: the script's
    docstring, for --help. emoji_kind: what --data emoji means. arguments: as on the command line.
    """
    flags = read_flags(description, stage, arguments)
    try:
        check_directory("--out", flags.out)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    try:
        checkpoint, earlier = where_to_start(flags, stage)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot start: {error}") from error
    settings = resolve(flags, stage, earlier)
    check_installed(settings.log)

    def open_all():
        data, about = open_training_data(settings, emoji_kind)
        return data, about, open_held_out(settings, emoji_kind, data)

    with start_ranks() as ranks, out_of_memory_explained(settings):
        data, about_data, unseen = open_once(open_all, ranks)
        settings.dtype, why = choose_dtype(settings.dtype, ranks.device)
        mesh = make_mesh(settings, ranks)
        with in_turn(ranks, wanted=mesh is not None):
            try:
                parts = assemble(settings, checkpoint)
            except (OSError, ValueError, KeyError) as error:  # each says what to do
                raise SystemExit(f"cannot build the model: {error}") from error
            parts.config["lora"] = choose_trained(parts.model, settings, parts.config["lora"])
            store_weights(parts.model, settings.dtype, parts.held | set(own_names(parts.model)))
            parts.model.set_checkpointing(settings.checkpointing)
            weights_sum = spread(parts.model, mesh, settings, ranks)
        optimizer = make_optimizer(parts.model, settings)
        try:
            progress = prepare_out(settings, ranks, checkpoint, optimizer, about_data)
        except ValueError as error:
            raise SystemExit(f"cannot go on: {error}") from error
        check_same_start(progress.step, weights_sum, ranks)

        features = open_features(parts.model, parts.processor, settings, ranks)

        def make_batches(samples, block=None, hands=None):
            return Batches(samples, parts.template, parts.processor, settings.batch_size,
                           settings.max_length, settings.seed, ranks.rank, ranks.world_size,
                           settings.workers, block=block, features=features, hands=hands)

        batches = make_batches(data, progress.block, progress.hands)
        held_out = None
        if unseen:
            answers = Answers(unseen, parts.template, parts.processor, settings)
            held_out = HeldOut(unseen, make_batches, answers)
        steps = steps_of_run(settings, batches, progress)
        facts = describe(settings, stage, ranks, about_data, changed(settings, checkpoint))
        save = saver(parts, settings, ranks, facts)
        loaders = [batches, *((held_out.right, held_out.wrong) if held_out else ())]
        with told_plainly(settings.out, loaders):
            log = Log(settings, steps, progress, ranks.main)
            log.say(introduction(parts.model, optimizer, settings, data, batches, steps, ranks))
            log.say(f"numbers   {settings.dtype}: {why}")
            for change in facts["changes"]:
                log.say("changed   from step {from_step}: {setting} is {now}, before it was "
                        "{before}".format(**change))
            if unseen and settings.eval_answers and mesh is not None:
                log.say("answers   none while it trains: under --parallel fsdp every process would "
                        "have to go through each token; eval.py asks the checkpoints")
            if ranks.main and mesh is None:  # a prediction for shares of a model is not built
                memory = predict(parts.model.config, settings, parts.processor.size,
                                 parts.template.image_tokens, ranks.device, ranks.world_size,
                                 parts.held)
                log.say(in_a_line(memory, settings))
            with reported(settings.out, ranks.main):
                advice = partial(way_out, settings, stage,
                                 sys.argv[1:] if arguments is None else arguments)
                with (launch(settings.out, facts, progress, steps, ranks),
                      told_plainly(settings.out, loaders, advice), listen() as stop):
                    train(parts.model, batches, optimizer, settings, ranks, log, save, progress,
                          held_out, stop)
                summary = summarise(settings.out, progress, log.seconds, ranks)
            if features:
                log.say(told(features, ranks))
            if progress.step < steps:
                log.close()
                log.say(stopped(progress, stage, settings))
                return
        model = "" if settings.out == f"out/{stage}" else f" --model {settings.out}"
        log.close()
        if ranks.main:
            log.say(closing(summary, newest_checkpoint(settings.out), next_command + model))


@contextmanager
def out_of_memory_explained(settings):
    """The order of samples follows from the seed, so the same step would fail again: say what
    makes a step smaller and leaves its samples as they are."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size, times = settings.batch_size, settings.accumulate
        ways = ["--checkpointing keeps fewer activations", "a lower --max_length cuts long rows"]
        if size > 1:
            ways.insert(0, f"--batch_size {math.ceil(size / 2)} --accumulate {times * 2} takes "
                        f"{'the same samples' if size % 2 == 0 else 'about as many samples'} in "
                        "each step, half of them at a time")
        go_on = "; --resume goes on from the last checkpoint" if checkpoints(settings.out) else ""
        raise SystemExit(f"\nout of memory: {str(error).strip().splitlines()[0]}\nWhat helps: "
                         f"{'; '.join(ways)}{go_on}. `python -m extras.memory PRESET` predicts "
                         "what a run takes.") from error


@contextmanager
def told_plainly(out, loaders: list[Batches], advice=None):
    """What stops a run from outside is told in a sentence, with exit status 1: no traceback.

    advice() -> what to do about a loss that is not finite."""
    try:
        yield
    except NotFinite as reason:
        raise SystemExit(f"\nstopped: {reason} {advice()}") from reason
    except StopTraining as reason:
        raise SystemExit(f"\nstopped: {reason}") from reason
    except RuntimeError as error:
        reason = told_by(error, [loader.whereabouts for loader in loaders])
        if reason is None:
            raise
        raise SystemExit(f"\nstopped: {reason}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise SystemExit(f"\nstopped: cannot write to {out}: {error}. Its checkpoints are as they "
                         "were; make room, then go on with --resume.") from error
