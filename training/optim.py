"""What is trained, how fast: freezing by part, AdamW, and the learning rate of each step.

    VLM + settings -> parameters that require gradients -> AdamW; step number -> share of the rate
"""

import math

import torch

from extras.export.peft import add_peft
from model.lora import add_lora
from training.trainable import set_requires_grad

PARTS = ("language", "projector", "vision")


def choose_trained(model, settings, lora: dict | None) -> dict | None:
    """Freeze all but the parts that the settings name; return the LoRA settings of the model.

    lora: those of the adapters that a checkpoint has brought along, or None. A frozen part gets
    no gradient of its own, yet gradients pass through it: the projector learns from what the
    frozen language model makes of its tokens.
    """
    language = settings.train_language
    if settings.lora:
        if language != "none":
            raise SystemExit(f"--lora trains adapters in a frozen language model, but "
                             f"--train_language is {language}: leave one of them out")
        try:
            lora, language = put_adapters(model, settings, lora), "lora"
        except ValueError as error:
            raise SystemExit(f"--lora: {error}") from error
    try:
        set_requires_grad(model, settings.train_projector, settings.train_vision, language)
    except ValueError as error:
        raise SystemExit(f"--train_language {settings.train_language}: {error}") from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SystemExit("nothing to train: every part is frozen. Use --train_projector, --lora, "
                         "--train_language all or --train_vision.")
    return lora


def put_adapters(model, settings, present: dict | None) -> dict:
    """Put low-rank adapters into the language model, or go on with those that are there."""
    wanted = {"targets": settings.lora_targets, "rank": settings.lora_rank,
              "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    # A preset alone, whose parameters are only counted, names no directory.
    lora_from = settings.lora_from if "lora_from" in settings else None
    if lora_from and not (present and settings.resume):
        if present:
            raise SystemExit(f"--lora_from {lora_from}: the checkpoint to start from has "
                             "adapters of its own; export it with --to merged first")
        wanted = add_peft(model.language, lora_from, settings.lora_dropout)
        for name, value in wanted.items():  # the run says with what it trains
            setattr(settings, f"lora_{name}", value)
    elif present is None:
        add_lora(model.language, **wanted)
    elif present != wanted:
        raise SystemExit(f"the checkpoint has LoRA adapters with {present}, the settings say "
                         f"{wanted}: give the --lora_* flags of the checkpoint to go on with them")
    return wanted


def parameter_groups(model, settings) -> list[dict]:
    """One learning rate per part, and weight decay for matrices alone.

    Decay pulls weights towards zero. For a norm's scale, whose neutral value is one, and for a
    bias, which no input multiplies, that is harm without use; both have one dimension.
    """
    rates = {"language": settings.learning_rate, "projector": settings.projector_learning_rate,
             "vision": settings.vision_learning_rate}
    groups = []
    for part in PARTS:
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        rate = settings.learning_rate if rates[part] is None else rates[part]
        for decay, members in (
            (settings.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if members:
                groups.append({"params": members, "weight_decay": decay,
                               "lr": rate, "peak": rate})
    return groups


def make_optimizer(model, settings) -> torch.optim.AdamW:
    # beta2 0.95 instead of 0.999 forgets old gradients sooner: usual for language models, whose
    # runs are short and whose gradients change a lot (Brown et al. 2020, GPT-3).
    return torch.optim.AdamW(parameter_groups(model, settings), betas=(0.9, 0.95),
                             fused=True)


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """The share of the peak learning rate for optimizer step 1..steps.

    A straight line up over the first warmup_ratio of the run (Adam's statistics are still noise),
    then half a cosine down to 10 % of the peak at the last step.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)  # over 0..1
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer, share: float) -> float:
    """Scale every group's peak rate; return the first group's, the one that metrics.jsonl tells."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return optimizer.param_groups[0]["lr"]
