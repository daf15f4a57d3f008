"""Stage two: teach the language model to converse about what it is shown.

    python train_sft.py --lora                                  the embedded default
    torchrun --nproc_per_node 4 train_sft.py --lora --data FILE --images DIR

Starts from the newest checkpoint of stage one (--model), goes on training its projector, and
opens the language model as far as the checkpoint's preset says: altogether, some of its layers,
or by low-rank adapters. --lora, --train_language all and --train_language last:2 say it
otherwise. Writes checkpoints and metrics.jsonl to --out; eval.py chats with them.

What happens is told in training/run.py, from top to bottom.
"""

from training.run import run


def main(arguments=None) -> None:
    run("sft", __doc__, emoji_kind="chat", next_command="python eval.py", arguments=arguments)


if __name__ == "__main__":
    main()
