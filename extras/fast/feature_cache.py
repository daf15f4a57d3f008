"""--cache_features DIR: run a frozen vision tower once for each picture, not once an epoch.

    Batch: pixels (N,3,H,W) of pictures that are new, features (F,P,Dv) of those that were found
        -> the tower sees the new ones, they are kept -> Batch: features (N+F,P,Dv) alone

Reading is the data workers' part (dataset/batching.py, extras/fast/feature_files.py): a picture
whose features are there is not even decoded. Writing is the loop's, since only it has the model.

The files hold the numbers of the run's --dtype: in fp32 what the tower says, to the last bit; in
bf16 and fp16 what the projector's first product would have rounded it to anyway. (A projector with
a norm in front, norm_mlp, reads float32 without this; there the rounding can be seen in the loss.)
"""

import hashlib
from dataclasses import replace

import torch

from dataset.batching import Batch
from extras.fast.feature_files import FeatureFiles
from training.precision import NUMBERS


def open_features(model, processor, settings, ranks) -> FeatureFiles | None:
    """The files of --cache_features; None without it. Raises SystemExit where they would lie."""
    wanted = settings.cache_features
    if not wanted:
        return None
    if settings.train_vision:
        raise SystemExit(f"--cache_features {wanted}: with --train_vision the tower learns, and "
                         "what it saw in the last epoch is not what it sees now; leave one out")
    if settings.parallel == "fsdp" and ranks.world_size > 1:
        raise SystemExit(f"--cache_features {wanted}: under --parallel fsdp the ranks run the "
                         "tower together, and one that found its pictures on disk would leave the "
                         "others waiting; use --parallel ddp, or leave the cache out")
    seen_by = looker(model.vision, processor, settings.dtype)
    return FeatureFiles(wanted, seen_by, settings.cache_gb * 1e9, ranks.world_size)


def looker(vision, processor, dtype: str) -> str:
    """All that decides what is seen in a picture, as text: the sha256 of the weights, the facts
    of the tower, the steps of the image processor, the kind of number."""
    digest = hashlib.sha256()
    for name, tensor in vision.state_dict().items():
        numbers = tensor.detach().cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + numbers.numpy().tobytes())
    return f"{digest.hexdigest()} {vision.config} {processor} {dtype}"


def look(model, batch: Batch, files: FeatureFiles, dtype: str) -> Batch:
    """The batch with the features of all its pictures; those that are new are written to disk."""
    if batch.pixels is None:
        files.found += 0 if batch.features is None else len(batch.features)
        return batch
    # Rounded before they are used, so that it makes no difference whether they were found.
    features = model.vision_features(batch.pixels).to(NUMBERS[dtype])  # (N,P,Dv)
    for key, each in zip(batch.keys, features, strict=True):
        if key:
            files.write(key, each)
    files.computed += len(features)
    if batch.features is not None:
        files.found += len(batch.features)
        features = torch.cat([features, batch.features])
    return replace(batch, pixels=None, features=features, keys=())


def told(files: FeatureFiles, ranks) -> str:
    """What the cache was worth, over all ranks and since the start of this process."""
    found, computed, written = map(int, ranks.sum(files.found, files.computed, files.written))
    full = "" if written == computed else (f"; {computed - written:,} were not kept, --cache_gb is "
                                           "used up or the disk is full")
    return (f"features  of {found + computed:,} pictures {found:,} were found in "
            f"{files.directory}, {computed:,} computed{full}")
