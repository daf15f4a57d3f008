"""Stage one: teach the projector to say what the vision tower sees in words that it can read.

    torchrun train_pretrain.py                                  the embedded default
    torchrun --nproc_per_node 4 train_pretrain.py --preset qwen2.5-siglip --data FILE --images DIR

Both towers are frozen. The projector starts from noise, and what comes back through the frozen
language model is the only thing that tells it which vectors mean "two cats". Writes checkpoints
and metrics.jsonl to --out; train_sft.py goes on from there.
"""

from dataset.batching import Batches
from training.distributed import start_ranks
from training.log import Log, closing, introduction
from training.loop import StopTraining, steps_of_run, train
from training.optim import choose_trained, make_optimizer
from training.presets import read_flags, resolve
from training.setup import (
    assemble,
    newest_checkpoint,
    open_training_data,
    prepare_out,
    saver,
    where_to_start,
)

STAGE = "pretrain"  # which recipe of the preset counts


def main(arguments=None) -> None:
    flags = read_flags(__doc__, STAGE, arguments)
    checkpoint, earlier = where_to_start(flags, STAGE)
    settings = resolve(flags, STAGE, earlier)
    data, about_data = open_training_data(settings, "captions")

    with start_ranks() as ranks:
        try:
            parts = assemble(settings, checkpoint)
        except (OSError, ValueError) as error:  # each says what is wrong and what to do
            raise SystemExit(f"cannot build the model: {error}") from error
        parts.config["lora"] = choose_trained(parts.model, settings, parts.config["lora"])
        parts.model.to(ranks.device)
        optimizer = make_optimizer(parts.model, settings)
        progress = prepare_out(settings, ranks, checkpoint, optimizer, about_data)
        ranks.copy_from_main(parts.model.parameters())

        batches = Batches(data, parts.template, parts.processor, settings.batch_size,
                          settings.max_length, settings.seed, ranks.rank, ranks.world_size,
                          settings.workers)
        steps = steps_of_run(settings, batches)
        log = Log(settings.out, steps, progress, ranks.main)
        log.say(introduction(parts.model, optimizer, settings, data, batches, steps, ranks))
        save = saver(parts, settings, STAGE, ranks, about_data)
        try:
            progress = train(parts.model, batches, optimizer, settings, ranks, log, save, progress)
        except StopTraining as reason:
            raise SystemExit(f"\nstopped: {reason}") from reason
        model = "" if settings.out == "out/pretrain" else f" --model {settings.out}"
        log.say(closing(progress, log, newest_checkpoint(settings.out),
                        f"python train_sft.py --lora{model}"))


if __name__ == "__main__":
    main()
