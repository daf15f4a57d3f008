"""Stage two, instruction tuning: the language model learns to converse about images.

    python train_sft.py --lora                                  the embedded default
    torchrun --nproc_per_node 4 train_sft.py --lora --data FILE --image_folder DIR

Starts from the newest checkpoint of stage one (--model), goes on training its projector, and opens
the language model as far as the preset says: all of it, some of its layers, or low-rank adapters.
--lora, --train_language all and --train_language last:2 say it otherwise. Writes checkpoints and
metrics.jsonl to --out; eval.py chats with them.

Only what differs from stage one is here; the loop is train_pretrain.train.
"""

from train_pretrain import fit, load_or_build, place_model, strategy
from training.data import open_data
from training.distributed import start_distributed
from training.errors import explain_errors
from training.optim import choose_trainable
from training.precision import resolve_dtype
from training.resume import read_settings


def main(arguments=None) -> None:
    # 1. Flags. The run starts from the newest checkpoint of stage one, whose preset, towers and
    #    template it keeps; --model none starts from the public towers and a new projector.
    settings, start = read_settings("sft", __doc__, arguments, start_from=("out/pretrain",))
    with start_distributed(strategy(settings)) as distributed, explain_errors(settings):
        # 2. Data: conversations instead of captions.
        data = open_data(settings, "sft", distributed)
        resolve_dtype(settings, distributed)
        with distributed.loading():
            # 3. Model: stage one's, its trained projector included.
            bundle = load_or_build(settings, start.checkpoint)
            # 4. What is trained. The projector goes on; the language model is opened:
            #      --lora                  low-rank adapters beside its frozen matrices
            #      --train_language all    every weight of it, 16 bytes each in training
            #      --train_language last:2 its last two layers
            #    The checkpoints hold what was trained and refer to the public towers for the rest.
            bundle.lora = choose_trainable(bundle.model, settings, bundle.lora)
            place_model(bundle, settings, distributed)
        # 5. to 8. The rest is stage one's. Learning rates by part: --learning_rate for all,
        #    --projector_learning_rate and --vision_learning_rate for those that need another one;
        #    weights that were trained before take smaller steps than new ones.
        log = fit(bundle, data, settings, start, distributed)
        log.finish(start.stage, "python eval.py")


if __name__ == "__main__":
    main()
