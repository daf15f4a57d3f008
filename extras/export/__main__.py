"""Export a trained model in a form that other programs read.

    python -m extras.export --to transformers   LlavaForConditionalGeneration: transformers, vLLM
    python -m extras.export --to merged         a checkpoint of ours, LoRA merged, in one piece
    python -m extras.export --to merged --quantize int8  the same, its language model in 8 bits
    python -m extras.export --to peft           the language model's adapters, for peft
    python -m extras.export --to gguf --dtype q8_0     for llama.cpp (requirements-extra.txt)
    python -m extras.export --push USER/NAME           what would go to the hub; with --yes, it goes

Flow: checkpoint directory -> load -> merge LoRA -> one of the forms -> OUT -> the hub.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from dataset.chat import ChatTemplate
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from extras.convert.public_files import RECORD
from extras.export.chat_template import PublicTemplate
from extras.export.hub import CURVE, files_to_push, listing, metrics_of, model_card, push
from extras.export.peft import peft_adapter
from extras.export.transformers import account_for, llava, same_names
from extras.fast.quantize import quantize
from model.lora import merge_lora
from model.pretrained.checkpoint import (
    find_model,
    newest_checkpoint,
    read_config,
    read_run,
    refuse_quantized,
    save_checkpoint,
    tensor_names,
)
from model.pretrained.files import write_json
from model.pretrained.load import find_base, load_checkpoint
from model.pretrained.meta_device import meta_device
from model.pretrained.save import save_model
from model.projector import Projector
from training.writable import check_directory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m extras.export", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run (default: the newest in out/sft, else "
        "in out/pretrain)")
    add("--to", choices=FORMS, default="transformers", help="the form (%(default)s)")
    add("--out", default="out/export", metavar="DIR", help="new directory (%(default)s)")
    add("--dtype", choices=("bf16", "fp32", "f16", "q8_0"), help="of the weights: bf16 (default) "
        "or fp32, which keeps every digit; with --to gguf f16 (default), bf16, q8_0 or fp32")
    add("--quantize", choices=("int8", "int4"), help="with --to merged: the language model's "
        "matrices in so many bits; eval.py opens it as any checkpoint")
    add("--language_model",
        help="where the public language model lies, if not where it was in training")
    add("--vision_tower",
        help="where the public vision tower lies, if not where it was in training")
    add("--push", metavar="USER/NAME", help="write a model card into --out and list all that would "
        "be uploaded; an --out that is there already is taken as it is")
    add("--yes", action="store_true", help="with --push: do upload it")
    flags = parser.parse_args(arguments)
    fitting = ("f16", "bf16", "q8_0", "fp32") if flags.to == "gguf" else ("bf16", "fp32")
    flags.dtype = flags.dtype or fitting[0]
    if flags.dtype not in fitting:
        parser.error(f"--dtype {flags.dtype}: --to {flags.to} takes {', '.join(fitting)}")
    if flags.quantize and flags.to != "merged":
        parser.error(f"--quantize {flags.quantize} needs --to merged; --to gguf has --dtype q8_0")
    if flags.push and flags.to == "gguf":
        parser.error("--push takes safetensors alone, and no --to gguf")
    if flags.yes and not flags.push:
        parser.error("--yes needs --push USER/NAME")
    return flags


def load(flags, checkpoint: Path):
    """-> the model in float32 with its adapters in place, template, image processor."""
    config = read_config(checkpoint)
    model = load_checkpoint(checkpoint, torch.float32, flags.language_model, flags.vision_tower)
    with meta_device():  # whatever the form: what none of our classes has, nothing could read back
        known = Projector(model.config.projector).state_dict()
    account_for(model, known, "this model cannot be exported", "Known are both towers as their "
                f"config.json describes them, and --projector {config['projector']}: "
                + ", ".join(known))
    template = ChatTemplate(Tokenizer.from_directory(checkpoint), config["image_tokens"],
                            config["system"], config.get("image_token"), config["template"])
    return model, template, ImageProcessor.from_directory(checkpoint)


def to_transformers(flags, checkpoint: Path, out: Path) -> None:
    model, template, processor = load(flags, checkpoint)
    merge_lora(model.language)  # in float32, so that the sum is rounded once
    public = PublicTemplate(template)
    config, tensors = llava(model, processor.size, template.image_token_id)
    dtype = DTYPES[flags.dtype]
    save_model(out, config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    public.save(out, model.language.config.max_position_embeddings)
    processor.save(out)
    class_token = int(model.vision.config.class_token)
    write_json(out / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": public.image_token,
        "patch_size": model.vision.config.patch_size, "num_additional_image_tokens": class_token,
        "vision_feature_select_strategy": config["vision_feature_select_strategy"]})


def to_merged(flags, checkpoint: Path, out: Path) -> None:
    """OUT/step_...: every weight in our own file, so that no public one is needed beside it."""
    model, template, processor = load(flags, checkpoint)
    merge_lora(model.language)
    config, run = read_config(checkpoint), read_run(checkpoint)
    config["lora"] = None
    if flags.quantize:  # from float32, so that the sum is rounded once here too
        quantize(model.language, flags.quantize)
        config["quantize"] = flags.quantize
    for reference in config["bases"].values():  # still named, as where it comes from
        reference.pop("copied", None)
    tensors = {name: p.to(DTYPES[flags.dtype]) if p.is_floating_point() else p
               for name, p in model.named_parameters()}
    same_names(model.state_dict(), tensors,
               "this model cannot be expressed as a checkpoint of ours",
               "A checkpoint holds parameters, and no buffers: make it an nn.Parameter")
    save_checkpoint(out, run["step"], tensors, config, run, (template.tokenizer, processor))


def to_peft(flags, checkpoint: Path, out: Path) -> None:
    config = read_config(checkpoint)
    changed = [name for name in tensor_names(checkpoint)
               if name.startswith("language.") and not name.endswith((".lora_a", ".lora_b"))]
    if not config["lora"] or changed:
        reason = (f"it trained {changed[0]} itself" if changed else "it has no LoRA adapters")
        raise ValueError(f"{checkpoint} is no adapter on the public language model: {reason}. "
                         "Use --to merged or --to transformers")
    model, _, _ = load(flags, checkpoint)
    reference = config["bases"]["language"]
    adapter, tensors = peft_adapter(model.language, config["lora"], reference["name"])
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              out / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(out / "adapter_config.json", adapter)
    left = sorted({name.split(".")[0] for name in tensor_names(checkpoint)} - {"language"})
    base = find_base(checkpoint, "language", reference, flags.language_model)
    if (base / RECORD).is_file():
        print(f"its base for peft: {base}, what {reference['name']} was converted to")
    print(f"not in an adapter of peft: what was trained of {' and '.join(left)}; --to merged "
          "takes all")


def to_gguf(flags, checkpoint: Path, out: Path) -> None:
    try:
        from extras.export.gguf import write_language, write_mmproj  # here: an extra
    except ImportError as error:
        raise ValueError("--to gguf needs the gguf package: pip install gguf") from error
    model, template, processor = load(flags, checkpoint)
    merge_lora(model.language)
    tokenizer = PublicTemplate(template).gguf_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    write_language(model, tokenizer, len(tokenizer["tokens"]), flags.dtype, out / "language.gguf")
    try:
        write_mmproj(model, processor, out / "mmproj.gguf")
    except ValueError as error:  # the language model is of use without the vision tower
        print(f"no mmproj.gguf, so llama.cpp will see no images: {error}")


FORMS = {"transformers": to_transformers, "merged": to_merged, "peft": to_peft, "gguf": to_gguf}


def to_hub(flags, checkpoint: Path, directory: Path) -> None:
    card = model_card(checkpoint, flags.to, flags.push)
    metrics = metrics_of(checkpoint)
    if metrics:
        from evaluation.report import loss_curve  # here: the other forms need no plotting library

        loss_curve({read_run(checkpoint)["stage"]: metrics}, directory / CURVE)
    (directory / "README.md").write_text(card, encoding="utf-8")
    files = files_to_push(directory)
    print(listing(files, directory))
    if flags.yes:
        print(f"uploaded: {push(directory, flags.push)}")
    else:
        print(f"nothing was sent to {flags.push}; look at {directory / 'README.md'}, then give "
              "--yes as well")


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    out = Path(flags.out)
    try:
        check_directory("--out", flags.out)
        checkpoint = find_model(flags.model)
        refuse_quantized(checkpoint, "export")
        there = out.exists() and any(out.iterdir())
        if there and not flags.push:
            raise ValueError(f"--out {out} is not empty: give a new directory")
        if not there:
            FORMS[flags.to](flags, checkpoint, out)
        if flags.push:
            to_hub(flags, checkpoint, newest_checkpoint(out) or out)
            return
    except (OSError, ValueError, KeyError) as error:  # each says what is wrong and what to do
        raise SystemExit(f"extras/export: {error}") from error
    print(listing(sorted(path for path in out.rglob("*") if path.is_file()), out))


if __name__ == "__main__":
    main()
