"""What tests/test_distributed.py runs under torchrun: everything that two processes must show.

    ranks_worker.py DIRECTORY FLAGS...

Starting processes costs seconds, so both are done in one go; the tests look at the files:
gradients_N.pt of the first step with TRAINED[N], and weights_RANK.pt after three steps. A process
joins its group once and no more: joining anew through the same store can wait for ever.
"""

import itertools
import sys

import torch

import training.loop
from dataset.batching import Batches
from training.distributed import start_ranks
from training.loop import Progress, backward
from training.optim import choose_trained, make_optimizer
from training.presets import read_flags, resolve
from training.setup import assemble, open_training_data

TRAINED = ([], ["--train_language", "all", "--train_vision"])


class Quiet:
    """A log that tells nothing."""

    def step(self, *_):
        pass

    def bad_samples(self, *_):
        pass


def prepare(flags, ranks):
    settings = resolve(read_flags("", "pretrain", flags), "pretrain", {})
    parts = assemble(settings, None)
    choose_trained(parts.model, settings, None)
    data, _ = open_training_data(settings, "captions")
    batches = Batches(data, parts.template, parts.processor, settings.batch_size,
                      settings.max_length, settings.seed, ranks.rank, ranks.world_size)
    return settings, parts.model, batches


def gradients(ranks, flags) -> tuple[torch.Tensor, list]:
    """-> the gradients summed over ranks, and the number of pictures in each of all batches."""
    settings, model, batches = prepare(flags, ranks)
    micro = [batch for batch, _ in itertools.islice(batches.epoch(0), settings.accumulate)]
    supervised, = ranks.sum(sum(batch.supervised for batch in micro))
    for batch in micro:
        backward(model, batch, supervised, settings, ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    ranks.sum_gradients(trained)
    images = [0 if batch.order is None else len(batch.order) for batch in micro]
    return torch.cat([p.grad.flatten() for p in trained]), ranks.gather(images)


def three_steps(ranks, flags) -> dict:
    settings, model, batches = prepare([*flags, "--steps", "3", "--train_language", "last:1"],
                                       ranks)
    if ranks.rank:  # a rank that starts elsewhere must be brought to rank 0's point
        for parameter in model.projector.parameters():
            parameter.data += 1
    ranks.copy_from_main(model.parameters())
    training.loop.train(model, batches, make_optimizer(model, settings), settings, ranks,
                        Quiet(), lambda *_: None, Progress())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main():
    directory, *flags = sys.argv[1:]
    with start_ranks() as ranks:
        for number, trained in enumerate(TRAINED):
            flat, images = gradients(ranks, [*flags, *trained])
            if ranks.main:
                torch.save({"gradients": flat, "images": images},
                           f"{directory}/gradients_{number}.pt")
        torch.save(three_steps(ranks, flags), f"{directory}/weights_{ranks.rank}.pt")


if __name__ == "__main__":
    main()
