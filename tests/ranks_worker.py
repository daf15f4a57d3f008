"""What tests/test_distributed.py runs under torchrun: everything that two processes must show.

    ranks_worker.py DIRECTORY FLAGS...

Starting processes costs seconds, so both are done in one go; the tests look at the files:
gradients_N.pt of the first step with TRAINED[N], and weights_RANK.pt after three steps. A process
joins its group once and no more: joining anew through the same store can wait for ever.
"""

import itertools
import sys

import torch

from dataset.batching import Batches
from train_pretrain import backward, load_or_build, train
from training.data import open_training_data
from training.distributed import start_distributed
from training.optim import choose_trainable, make_optimizer
from training.presets import read_flags, resolve
from training.steps import Steps, TrainerState

TRAINED = ([], ["--train_language", "all", "--train_vision"])


def prepare(flags, distributed):
    settings = resolve(read_flags("", "pretrain", flags), "pretrain", {})
    parts = load_or_build(settings, None)
    choose_trainable(parts.model, settings, None)
    data, _ = open_training_data(settings, "pretrain")
    batches = Batches(data, parts.template, parts.processor, settings.batch_size,
                      settings.max_length, settings.seed, distributed.rank, distributed.world_size)
    return settings, parts.model, batches


def gradients(distributed, flags) -> tuple[torch.Tensor, list]:
    """-> the gradients summed over ranks, and the number of pictures in each of all batches."""
    settings, model, batches = prepare(flags, distributed)
    micro = [batch for batch,
             _ in itertools.islice(batches.epoch(0), settings.gradient_accumulation_steps)]
    supervised, = distributed.sum(sum(batch.supervised for batch in micro))
    for batch in micro:
        backward(model, batch, supervised, settings, distributed)
    trained = [p for p in model.parameters() if p.requires_grad]
    distributed.all_reduce_gradients(trained)
    images = [0 if batch.order is None else len(batch.order) for batch in micro]
    return torch.cat([p.grad.flatten() for p in trained]), distributed.gather(images)


def three_steps(distributed, flags) -> dict:
    settings, model, batches = prepare([*flags, "--steps", "3", "--train_language", "last:1"],
                                       distributed)
    if distributed.rank:  # a rank that starts elsewhere must be brought to rank 0's point
        for parameter in model.projector.parameters():
            parameter.data += 1
    distributed.place_model(model, settings)
    steps = Steps(batches, settings, TrainerState(), distributed)
    train(model, steps, make_optimizer(model, settings), settings, distributed, [])
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main():
    directory, *flags = sys.argv[1:]
    with start_distributed() as distributed:
        for number, trained in enumerate(TRAINED):
            flat, images = gradients(distributed, [*flags, *trained])
            if distributed.main:
                torch.save({"gradients": flat, "images": images},
                           f"{directory}/gradients_{number}.pt")
        torch.save(three_steps(distributed, flags), f"{directory}/weights_{distributed.rank}.pt")


if __name__ == "__main__":
    main()
