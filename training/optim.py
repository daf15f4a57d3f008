"""What is trained, and how fast: freezing by part, parameter groups for AdamW.

    VLM + settings -> choose_trainable -> requires_grad of every parameter
                   -> parameter_groups -> AdamW; share of the peak -> lr
"""

import torch

from model.lora import add_lora, lora_parameters


def choose_trainable(model, settings, lora: dict | None) -> dict | None:
    """Freeze all but the parts that the settings name; return the LoRA settings of the model.

    lora: those of the adapters that a checkpoint has brought along, or None. A frozen part gets
    no gradient of its own, yet gradients pass through it: the projector learns from what the
    frozen language model makes of its tokens.
    """
    language = settings.train_language
    flag = "--lora" if settings.lora else f"--train_language {language}"
    try:
        if settings.lora:
            if language != "none":
                raise SystemExit("--lora trains adapters in a frozen language model, but "
                                 f"--train_language is {language}: leave one of them out")
            lora, language = open_adapters(model, settings, lora), "lora"
        set_requires_grad(model, settings.train_projector, settings.train_vision, language)
    except ValueError as error:
        raise SystemExit(f"{flag}: {error}") from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SystemExit("nothing to train: every part is frozen. Use --train_projector, --lora, "
                         "--train_language all or --train_vision.")
    return lora


def open_adapters(model, settings, present: dict | None) -> dict:
    """Add low-rank adapters to the language model, or go on with those that are there."""
    lora = {"targets": settings.lora_targets, "rank": settings.lora_rank,
            "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    # A preset alone, whose parameters are only counted, names no directory.
    lora_from = settings.lora_from if "lora_from" in settings else None
    if lora_from and not (present and settings.resume):
        if present:
            raise ValueError(f"--lora_from {lora_from}: the checkpoint to start from has adapters "
                             "of its own; export it with --to merged first")
        from extras.export.peft import add_peft  # here: peft's format is an extra

        lora = add_peft(model.language, lora_from, settings.lora_dropout)
        for name, value in lora.items():  # the run records with what it trains
            setattr(settings, f"lora_{name}", value)
    elif present is None:
        add_lora(model.language, **lora)
    elif present != lora:
        raise ValueError(f"the checkpoint has LoRA adapters with {present}, the settings say "
                         f"{lora}: give the --lora_* flags of the checkpoint to go on with them")
    return lora


def set_requires_grad(model, projector: bool = True, vision: bool = False,
                      language: str = "none") -> None:
    """Train the parts that are named, and freeze everything else; by default as in stage one.

    language: "none", "all", "last:N" (its last N layers), "first:N", both joined by a plus sign
    ("first:1+last:1"), or "lora" (the adapters that add_lora put in before).
    """
    model.requires_grad_(False)
    model.projector.requires_grad_(projector)
    model.vision.requires_grad_(vision)
    if language == "all":
        model.language.requires_grad_(True)
    elif language == "lora":
        adapters = lora_parameters(model.language)
        if not adapters:
            raise ValueError("language='lora', but the language model has no adapters: "
                             "call add_lora(model.language, ...) first")
        for parameter in adapters:
            parameter.requires_grad_(True)
    elif language != "none":
        layers = model.language.layers
        for part in language.split("+"):
            end, _, number = part.partition(":")
            N = int(number) if number.isdecimal() else 0
            if end not in ("first", "last") or not 1 <= N <= len(layers):
                raise ValueError(f"language is 'none', 'all', 'lora', 'last:N', 'first:N' or "
                                 f"'first:N+last:M' with numbers from 1 to {len(layers)}, "
                                 f"got {language!r}")
            (layers[:N] if end == "first" else layers[-N:]).requires_grad_(True)


def parameter_groups(model, settings) -> list[dict]:
    """One learning rate per part, and weight decay, which pulls towards zero, for matrices alone.
    For a norm's scale, whose neutral value is one, and for a bias, which no input multiplies, that
    is harm without use; both have one dimension."""
    peaks = {"language": None, "projector": settings.projector_learning_rate,
             "vision": settings.vision_learning_rate}
    groups = []
    for part, peak in peaks.items():
        peak = settings.learning_rate if peak is None else peak
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        matrices, vectors = ([p for p in trained if (p.ndim > 1) == matrix]
                             for matrix in (True, False))
        groups += [{"params": members, "weight_decay": decay, "lr": peak, "peak": peak}
                   for members, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
                   if members]
    return groups


def make_optimizer(model, settings) -> torch.optim.AdamW:
    # beta2 0.95 instead of 0.999 forgets old gradients sooner: usual for language models, whose
    # runs are short and whose gradients change a lot (Brown et al. 2020, GPT-3).
    return torch.optim.AdamW(parameter_groups(model, settings), betas=(0.9, 0.95), fused=True)


def set_learning_rate(optimizer, share: float) -> float:
    """Scale every group's peak; return the first group's learning rate, for metrics.jsonl."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return optimizer.param_groups[0]["lr"]
