"""Stage two: teach the language model to converse about what it is shown.

    python train_sft.py --lora                                  the embedded default
    torchrun --nproc_per_node 4 train_sft.py --lora --data FILE --images DIR

Starts from the newest checkpoint of stage one (--model), goes on training its projector, and
opens the language model: by low-rank adapters (--lora), altogether (--train_language all, the
default without --lora) or its last layers (--train_language last:2). Writes checkpoints and
metrics.jsonl to --out; eval.py chats with them.
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

STAGE = "sft"  # which recipe of the preset counts


def main(arguments=None) -> None:
    flags = read_flags(__doc__, STAGE, arguments)
    checkpoint, earlier = where_to_start(flags, STAGE)
    settings = resolve(flags, STAGE, earlier)
    data, about_data = open_training_data(settings, "chat")

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
        model = "" if settings.out == "out/sft" else f" --model {settings.out}"
        log.say(closing(progress, log, newest_checkpoint(settings.out),
                        f"python eval.py{model}"))


if __name__ == "__main__":
    main()
