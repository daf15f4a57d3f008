"""--data and --eval_data -> samples -> batches of this rank.

    --data emoji, or files to mix -> open_training_data -> data[i] -> Sample, and facts for run.json
    --eval_data, or what --eval_samples sets apart -> open_held_out
    samples -> batch_maker's function -> Batches
"""

import glob
import math
import os
from pathlib import Path

from torch.utils.data import Subset

from dataset.batching import Batches
from dataset.readers.lengths import count_tokens
from dataset.readers.mixture import Mixture, open_mixture, split_source
from model.pretrained.files import sha256

# What the embedded world shows to each stage.
EMOJI_KINDS = {"pretrain": "captions", "sft": "chat"}
EMOJI_HELD_OUT = 256  # scenes, when --eval_samples does not say how many


def open_data(settings, stage: str, distributed):
    """-> samples to train on, what run.json says about them, held-out samples or None.

    stage: "pretrain" or "sft". The first rank of each machine opens the files before the others,
    which then find its index of them (dataset/readers/index_cache.py).
    """
    leader = os.environ.get("LOCAL_RANK", "0") == "0"
    if not leader:
        distributed.barrier()
    samples, facts = open_training_data(settings, stage, distributed.main)
    held_out = open_held_out(settings, stage, samples)
    if leader:
        distributed.barrier()
    (facts,) = distributed.gather([facts] if distributed.main else [])
    return samples, facts, held_out


def open_training_data(settings, stage: str, hashed: bool = True):
    """-> samples of --data, and what run.json says about them; hashed: with their sha256."""
    if settings.data == "emoji":
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        kind = EMOJI_KINDS[stage]
        data, facts = EmojiData(kind), {"file": "emoji", "kind": kind}
    else:
        apart = 0 if settings.eval_data else settings.eval_samples or 0
        data = open_files("data", settings, apart)
        files = mixture_hash(data) if hashed else [{}]
        if len(files) > 1:
            facts = {"files": files}
        else:  # a weight of 1 goes without saying
            facts = {name: value for name, value in files[0].items()
                     if (name, value) != ("weight", 1.0)}
    if settings.overfit:  # Subset has no epochs: a mixture stands still, each caption stays
        data = Subset(data, range(min(settings.overfit, len(data))))
    return data, {**facts, "samples": len(data)}


def open_held_out(settings, stage: str, data):
    """-> the held-out samples, or None when nothing is measured. data: what is trained on."""
    if not settings.eval_steps or settings.overfit:
        return None
    if settings.eval_data:
        samples = open_files("eval_data", settings)
        return Subset(samples, range(min(settings.eval_samples or len(samples), len(samples))))
    if settings.data == "emoji":
        from dataset.emoji.world import EmojiData  # here: other data has no use for it

        # Not the test scenes: choosing by them while training would favour what suits them.
        following = range(len(data), len(data) + (settings.eval_samples or EMOJI_HELD_OUT))
        return Subset(EmojiData(EMOJI_KINDS[stage], following.stop), following)
    return data.set_apart()


def data_hash(file) -> dict:
    """What run.json records of a data file: name, bytes, sha256. Reads the whole file once."""
    return {"file": str(file), "bytes": Path(file).stat().st_size, "sha256": sha256(file)}


def mixture_hash(mixture: Mixture) -> list[dict]:
    """data_hash of each file, its weight and the number of all its samples."""
    return [{**data_hash(source.file), "weight": source.weight, "samples": len(source.data)}
            for source in mixture.sources]


def open_files(flag: str, settings, apart: int = 0):
    """The files that --data or --eval_data names, mixed; the last `apart` samples set apart."""
    named = getattr(settings, flag)
    files = named if isinstance(named, list) else [named]
    try:
        return open_mixture([name for file in files for name in matching(file)],
                            settings.image_folder, settings.seed, apart, settings.follow_links)
    except FileNotFoundError as error:
        raise SystemExit(f"--{flag} {' '.join(files)}: {error}; if it has moved, say where it is "
                         f"now with --{flag}") from error
    except ValueError as error:
        raise SystemExit(f"--{flag} {' '.join(files)}: {error}") from error


def matching(source: str) -> list[str]:
    """"part-*.parquet:2" -> each such file with ":2", in the order of their names. What is a file
    is no pattern; what fits no file stays as it is, and opening it says so."""
    file, _ = split_source(source)
    if Path(file).is_file():
        return [source]
    weight = source.removeprefix(file)
    return [name + weight for name in sorted(glob.glob(file))] or [source]


def batch_maker(bundle, settings, distributed):
    """-> a function: samples -> the Batches of this rank."""
    config = bundle.model.language.config
    limit = min(config.max_position_embeddings, config.context_limit or math.inf)
    if settings.max_length > limit:
        raise SystemExit(f"--max_length {settings.max_length}: the language model was trained for "
                         f"{limit} positions (config.json); give --max_length {limit} or less")
    cache = None
    if settings.feature_cache:
        from extras.fast.feature_cache import open_feature_cache, use_cache  # here: an extra

        cache = open_feature_cache(bundle.model, bundle.processor, settings, distributed)

    def make_batches(samples, **order) -> Batches:
        loader = Batches(samples, bundle.template, bundle.processor, settings.batch_size,
                         settings.max_length, settings.seed, distributed.rank,
                         distributed.world_size, settings.num_workers, lengths=count_tokens(
                             samples, bundle.template, settings.num_workers, distributed), **order)
        return use_cache(loader, cache, bundle.model, settings.dtype) if cache else loader

    return make_batches
