"""Every on-disk format -> Sample.

    a file -> open_data -> data[i] -> Sample(messages, images, where, tags)   -> batching.py

Three formats, told apart by what is in the file, not by its name:

    JSON Lines   {"conversations": [{"role": "user", "content": "<image>\\nWho?"}, ...],
                  "image": "cat.jpg"}                       one a line, as minimind-v has them
    JSON array   [{"conversations": [{"from": "human", "value": "<image>\\nWho?"}, ...],
                   "image": "cat.jpg"}, ...]                as LLaVA has them
    Parquet      columns `conversations` (JSON text) and `image_bytes` (one picture or a list)

Either spelling of a turn may stand in any of the three. Nothing but an index is held in memory:
a row is read when it is asked for, so a broken one raises BadSample, and hurts no other.
"""

import bisect
import hashlib
import io
import json
from array import array
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from dataset.chat import IMAGE, Message

ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's words; all others are taken as they are


@dataclass(frozen=True)
class Sample:
    messages: tuple  # of Message
    images: tuple  # path, bytes or PIL.Image, in the order of the <image> markers
    where: str  # "file:line", for whoever has to repair it
    tags: dict = field(default_factory=dict)  # e.g. {"kind": "count", "language": "en"}


class BadSample(Exception):
    """A row or a picture that cannot be used: where it stands, and what is wrong with it."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it can be pickled by a loader's worker
        self.where, self.reason = where, reason

    def __str__(self):
        return f"{self.where}: {self.reason}"
