"""Stage one, alignment: the projector learns to turn image features into token embeddings.

    python train_pretrain.py                                 the embedded emoji world
    torchrun --nproc_per_node 4 train_pretrain.py --preset qwen2.5-siglip --data FILE

Both towers are frozen. The projector starts from random weights, and the gradient that comes back
through the frozen language model is all that it learns from. Writes checkpoints and metrics.jsonl
to --out; train_sft.py goes on from there. Both stages share fit() and train().
"""

import contextlib
import math
import time
from functools import partial

import torch

from model.config import ProjectorConfig, VLMConfig
from model.pretrained.checkpoint import base_reference, own_names
from model.pretrained.hub import resolve
from model.pretrained.load import load_language, load_vision
from model.vlm import build_model
from training.bundle import ModelBundle, embedding_rms, load_bundle, make_inputs
from training.data import batch_maker, open_data
from training.device import HAS_EXTRAS
from training.distributed import Distributed, start_distributed
from training.errors import check_skipped, check_weights, explain_errors, not_finite
from training.hooks import make_hooks, report_at_end
from training.log import Log
from training.messages import introduction, way_out
from training.optim import choose_trainable, make_optimizer, set_learning_rate
from training.precision import (
    autocast,
    cast_weights,
    first_nonfinite_weight,
    resolve_dtype,
    update_loss_scale,
)
from training.resume import read_settings, restore, save
from training.run_metadata import describe, record_launch, summarise
from training.schedules import SCHEDULES
from training.signal_handler import handle_signals, stop_requested
from training.steps import Steps
from training.validation import ShuffledImages


def main(arguments=None) -> None:
    # 1. Flags. What is not given comes from the preset, or from the run that is resumed.
    settings, start = read_settings("pretrain", __doc__, arguments)
    with start_distributed(strategy(settings)) as distributed, explain_errors(settings):
        # 2. Data: a line on disk -> Sample. One process of each machine reads the index.
        data = open_data(settings, "pretrain", distributed)
        resolve_dtype(settings, distributed)
        with distributed.loading():
            # 3. Model: two public towers, a new projector between them.
            bundle = load_or_build(settings, start.checkpoint)
            # 4. What is trained: the projector alone, unless the preset or a flag says more.
            bundle.lora = choose_trainable(bundle.model, settings, bundle.lora)
            place_model(bundle, settings, distributed)
        # 5. to 8. Optimizer, batches, loop and checkpoints are those of both stages.
        log = fit(bundle, data, settings, start, distributed)
        log.finish(start.stage, "python train_sft.py --lora")


def strategy(settings) -> type[Distributed]:
    """How several processes share the work: each holds the whole model, or a share of it."""
    if settings.parallel == "ddp":
        return Distributed
    from extras.fsdp import FSDP  # here: sharding is an extra

    return FSDP


def load_or_build(settings, checkpoint) -> ModelBundle:
    """The model of the checkpoint; without one, two public towers and a new projector."""
    torch.manual_seed(settings.seed)  # of the first weights of projector and adapters
    try:
        return load_bundle(checkpoint, settings) if checkpoint else build(settings)
    except (OSError, ValueError, KeyError) as error:  # each says what to do
        raise SystemExit(f"cannot build the model: {error}") from error


def build(settings) -> ModelBundle:
    """Two public towers and, between them, a new projector."""
    directories = resolve(settings.language_model), resolve(settings.vision_tower)
    # Each weight in the dtype of its file; cast_weights decides once it is known what is trained.
    language = load_language(directories[0], None)
    vision = load_vision(directories[1], None, settings.vision_feature_layer,
                         settings.vision_feature_select)
    template, processor = make_inputs(settings, language.config, vision.config, *directories)
    projector = ProjectorConfig(settings.projector, vision.config.hidden_size,
                                language.config.hidden_size, settings.pixel_shuffle)
    config = VLMConfig(language.config, vision.config, projector, template.image_token_id)
    model = build_model(config, language, vision, embedding_rms(language))
    if settings.pretrained_projector:
        from extras.convert.published_projector import load_projector  # here: it is an extra

        load_projector(model.projector, settings.pretrained_projector)
    bases = {"language": base_reference(settings.language_model),
             "vision": base_reference(settings.vision_tower)}
    return ModelBundle(model, template, processor, bases)


def place_model(bundle, settings, distributed) -> None:
    """Trained weights in float32, frozen matrices in --dtype; then to this rank's device."""
    model = bundle.model
    cast_weights(model, settings.dtype, keep=bundle.changed | set(own_names(model)))
    model.set_checkpointing(settings.gradient_checkpointing)
    if HAS_EXTRAS:
        from extras.fast import prepare_for_training  # here: the same results, faster

        prepare_for_training(model)
    distributed.place_model(model, settings)


def fit(bundle, data, settings, start, distributed) -> Log:
    """Both stages: train what requires gradients. data: of open_data. start: of read_settings."""
    samples, data_facts, held_out = data
    # 5. Optimizer. --resume restores its state, and how far the run had come.
    optimizer = make_optimizer(bundle.model, settings)
    state = restore(settings, start, optimizer, data_facts, distributed)
    distributed.check_same_start(state.step)

    # 6. Batches: Sample -> ids, labels (B,T), pixels (N,3,H,W). Held-out samples go the same way.
    make_batches = batch_maker(bundle, settings, distributed)
    loader = make_batches(samples, bucket=state.bucket)
    steps = Steps(loader, settings, state, distributed)
    held_out = [held_out, ShuffledImages(held_out)] if held_out else []
    eval_loaders = [make_batches(data) for data in held_out]

    # 7. Checkpoints, and what else is written down on the way.
    facts = describe(settings, start.stage, distributed, data_facts, start.changes)
    log = Log(settings, steps)
    log.say(introduction(bundle.model, optimizer, settings, steps, facts))

    def save_checkpoint(step: int, metrics: dict) -> None:
        if step % settings.save_steps == 0 or step == steps.total or steps.stopping:
            check_skipped(state, settings.max_skip_ratio, at_end=step == steps.total)
            check_weights(bundle.model, step, steps.batches, settings.dtype, distributed)
            save(bundle, optimizer, state, settings, facts, distributed)

    hooks = [*make_hooks(bundle, steps, log, eval_loaders), save_checkpoint]

    # 8. Train. Whatever ends the run is explained in a sentence and recorded in run.json.
    with report_at_end(settings.out, distributed.main):
        with (record_launch(settings.out, facts, state, steps.total, distributed),
              explain_errors(settings, [loader, *eval_loaders], partial(way_out, settings, start)),
              handle_signals(), contextlib.closing(steps)):
            train(bundle.model, steps, optimizer, settings, distributed, hooks)
        log.summary = summarise(settings.out, state, log.seconds, distributed)
    return log


def train(model, steps, optimizer, settings, distributed, hooks) -> None:
    """The training loop of both stages.

    steps: (step, this rank's micro-batches) until the run ends, see training/steps.py. hooks: each
    is called as hook(step, metrics) after the step; the log, the checkpoint, whatever is measured.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state, fp16 = steps.state, settings.dtype == "fp16"
    schedule = SCHEDULES[settings.schedule]
    model.train()
    start = time.monotonic()
    for step, batches in steps:
        # Every supervised token of the step weighs the same, whichever micro-batch or rank it is
        # in: sum the token losses and divide once by their number. A mean per micro-batch would
        # let the tokens of a short answer weigh more than those of a long one.
        num_tokens, = distributed.sum(sum(batch.supervised for batch in batches))
        # Dropout follows from seed, step and rank alone, so a resumed run draws the same numbers,
        # and there is no generator state to save.
        torch.manual_seed((settings.seed * 1_000_003 + step) * 4099 + distributed.rank)
        # fp16 has no number below 6e-8: the scale keeps small gradients above it.
        scale = state.loss_scale if fp16 else 1.0
        losses = [backward(model, batch, max(num_tokens, 1), settings, distributed, scale)
                  for batch in batches]
        losses = [float(loss) for loss in losses]  # after all of them: a GPU is waited for once
        # A signal reaches one rank; by this sum all of them stop after the same step.
        loss, stop = distributed.sum(sum(losses), stop_requested())

        distributed.all_reduce_gradients(params)  # a sum over ranks, no mean
        if fp16:
            torch._foreach_div_([p.grad for p in params], scale)
        grad_norm = distributed.clip_gradients(params, settings.max_grad_norm)
        # Both numbers are sums over all ranks, so all ranks skip a step, or stop, together.
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite:
            weight = first_nonfinite_weight(model.named_parameters(), settings.dtype, distributed)
            if weight or scale <= 1:  # else fp16 overflowed: this step is skipped
                raise not_finite(step, (loss, grad_norm), batches, losses, weight, distributed.rank)
        lr = set_learning_rate(optimizer, schedule(step + steps.ahead, steps.total + steps.ahead,
                                                   settings.warmup_ratio))
        if finite and num_tokens:  # without a usable row nothing moves, by decay or momentum either
            optimizer.step()
        optimizer.zero_grad()

        state.step, steps.stopping = step, bool(stop)
        seconds = time.monotonic() - start
        usable = num_tokens and math.isfinite(loss)  # JSON has no infinity
        metrics = {"loss": loss if usable else None,
                   "grad_norm": grad_norm if finite else None, "learning_rate": lr,
                   "supervised_tokens": int(num_tokens),
                   "tokens_per_second": round(steps.non_padding_tokens / seconds, 1),
                   "seconds": round(seconds, 4)}
        if fp16:
            metrics |= update_loss_scale(state, finite)
        for hook in hooks:
            hook(step, metrics)
        start = time.monotonic()


def backward(model, batch, num_tokens: float, settings, distributed,
             scale: float = 1.0) -> torch.Tensor:
    """Add a micro-batch's share of the step's loss, times scale, to the gradients; return it."""
    batch = batch.to(distributed.device, non_blocking=True)
    with autocast(settings.dtype, distributed.device):
        images = batch.pixels if batch.features is None else batch.features
        token_losses, _ = model(batch.ids, batch.labels, images, batch.order)  # their sum
    loss = token_losses / num_tokens
    (loss * scale).backward()
    return loss.detach()


if __name__ == "__main__":
    main()
