"""Stage one: teach the projector to say what the vision tower sees in words that it can read.

    torchrun train_pretrain.py                                  the embedded default
    torchrun --nproc_per_node 4 train_pretrain.py --preset qwen2.5-siglip --data FILE --images DIR

Both towers are frozen. The projector starts from noise, and what comes back through the frozen
language model is the only thing that tells it which vectors mean "two cats". Writes checkpoints
and metrics.jsonl to --out; train_sft.py goes on from there.

What happens is told in training/run.py, from top to bottom.
"""

from training.run import run


def main(arguments=None) -> None:
    run("pretrain", __doc__, emoji_kind="captions", next_command="python train_sft.py --lora",
        arguments=arguments)


if __name__ == "__main__":
    main()
