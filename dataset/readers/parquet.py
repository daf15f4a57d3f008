"""Parquet -> samples: a file of any size, read in slices.

    footer (sizes and offsets only) -> data[i] -> the slice of the row group that holds row i

A Parquet file stores its rows in groups, and in a group column after column, compressed. Nothing
smaller than a piece of a group can be read, so the latest slices are kept, of all files together:
rows are asked for pool by pool (sampler.py), and so each slice is read once. A group of a few
megabytes is one slice; one of gigabytes is passed through slice by slice, always forwards, and
going back in it means to start it again. `python -m dataset.readers.parquet BIG SMALL` writes such
a file anew in groups that can be read one by one.
"""

import bisect
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dataset.readers.bad_sample import BadSample
from dataset.readers.record_images import IMAGE_KEYS, ImageFolder
from dataset.readers.unread import MEDIA_KINDS, holds_media, kinds_of
from dataset.sample import RECORD_LAYOUTS, TAGS, TEXT_KEYS, Sample, to_sample

LETTERS = tuple("ABCDEFGHIJabcdefghij")  # columns of a multiple choice's options
SLICE = 1 << 24  # bytes of a row group decoded at a time; pyarrow needs several times as much
POOL = 1 << 26  # bytes of rows that are shuffled together; a worker keeps at most twice as much
# What pyarrow raises for a damaged file; a size that was misread asks for all memory.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
STREAM = 1 << 20  # bytes read at a time; without it a whole column of the group is read at once


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows of a row group that are decoded together."""

    group: int
    start: int  # row of the file
    end: int
    row_bytes: float  # on average

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def bytes(self) -> float:
        return len(self) * self.row_bytes


class ParquetData:
    # Of all files in this process: {slice: its rows}, the latest last; their bytes; and the row
    # group that is being read: (process, group of which file, its next slice, an iterator).
    buffer, buffered, reader = OrderedDict(), 0, None

    def __init__(self, file: Path, images_dir: ImageFolder, columns: tuple[str, ...] | None = None):
        """columns: read those of these names, for `record`; None: what samples are made of."""
        try:
            with pq.ParquetFile(file) as parquet:
                self.metadata, schema = parquet.metadata, parquet.schema_arrow
        except UNREADABLE as error:
            raise ValueError(f"{file}: not readable as Parquet: {error}; is the download complete?"
                             ) from error
        self.file, self.images_dir = file, images_dir
        # Only these are read: ratings, embeddings and whatever else stands there costs nothing.
        # What seems to hold images or options is read too, so that its rows can be refused.
        read, names = columns or (*TEXT_KEYS, *IMAGE_KEYS, *TAGS), schema.names
        self.columns = [name for name in read if name in names]
        self.columns += [field.name for field in schema if field.name not in read
                         and may_hold_unread(field, self.metadata)]
        if columns is None and not any(set(keys) <= set(names) for keys, _ in RECORD_LAYOUTS):
            *most, last = [" and ".join(map(repr, keys)) for keys, _ in RECORD_LAYOUTS]
            raise ValueError(f"{file} has the columns {', '.join(names)}; expected "
                             f"{', '.join(most)} or {last}")
        self.slices = []
        for group in range(self.metadata.num_row_groups):
            metadata = self.metadata.row_group(group)
            size, start, count = column_bytes(metadata, self.columns), len(self), metadata.num_rows
            rows = max(1, count * SLICE // max(size, SLICE))
            self.slices += [Slice(group, start + i, start + min(i + rows, count), size / count)
                            for i in range(0, count, rows)]
        self.ends = [piece.end for piece in self.slices]
        if len(self) != self.metadata.num_rows:
            raise ValueError(f"{file}: the footer speaks of {self.metadata.num_rows} rows, its row "
                             f"groups hold {len(self)}; the file is damaged")

    def __len__(self) -> int:
        return self.slices[-1].end if self.slices else 0

    @property
    def largest_group(self) -> int:
        """Bytes of it, decoded."""
        return max((column_bytes(self.metadata.row_group(group), self.columns)
                    for group in range(self.metadata.num_row_groups)), default=0)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i)

    def sample(self, i: int, caption_index: int = 0) -> Sample:
        i = range(len(self))[i]  # IndexError past the end, which is what ends a for loop
        return to_sample(self.record(i), self.images_dir, f"{self.file}:{i + 1}", i, caption_index)

    def record(self, i: int) -> dict:
        """Row i as it stands, {column: value}; BadSample when it cannot be read."""
        try:
            return self._row(i)
        except UNREADABLE as error:
            ParquetData.reader = None
            raise BadSample(f"{self.file}:{i + 1}", f"cannot read the row: {error}") from error

    def _row(self, i: int) -> dict:
        number = bisect.bisect_right(self.ends, i)
        piece, buffer = self.slices[number], ParquetData.buffer
        if piece not in buffer:
            self._read_to(number)
        buffer.move_to_end(piece)
        return buffer[piece].slice(i - piece.start, 1).to_pylist()[0]

    def _read_to(self, number: int) -> None:
        """Read this slice into the buffer, and those of its row group on the way to it."""
        group, cls = self.slices[number].group, ParquetData
        if (cls.reader is None or cls.reader[:3] != (os.getpid(), self, group)
                or cls.reader[3] > number):
            first = next(n for n, piece in enumerate(self.slices) if piece.group == group)
            # Opened anew: a loader's workers must not share a position in the file.
            parquet = pq.ParquetFile(self.file, metadata=self.metadata, buffer_size=STREAM,
                                     pre_buffer=False)
            cls.reader = os.getpid(), self, group, first, parquet.iter_batches(
                batch_size=len(self.slices[first]), row_groups=[group], columns=self.columns,
                use_threads=False)  # threads do not survive a fork
        *which, following, batches = cls.reader
        for piece in self.slices[following:number + 1]:
            rows = next(batches, None)
            if rows is None or rows.num_rows != len(piece):
                raise ValueError(f"row group {group} ends before row {piece.end}")
            cls.buffer[piece] = rows
            cls.buffered += piece.bytes
            while cls.buffered > 2 * POOL and len(cls.buffer) > 1:
                cls.buffered -= cls.buffer.popitem(last=False)[0].bytes
        cls.reader = (*which, number + 1, batches)


def may_hold_unread(field: pa.Field, metadata: pq.FileMetaData) -> bool:
    """Whether a column that no layout reads may hold what refuse_unread refuses: by its name, its
    type, or the least and the largest of its values, as in the footer. Reads no row."""
    if kinds_of(field.name) & {*MEDIA_KINDS, "options"} or field.name in LETTERS:
        return True
    kind = field.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):  # as the datasets library stores an image
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if not (binary or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return False
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return any(may_be_media(group.column(c), binary) for group in groups
               for c in range(group.num_columns)
               if group.column(c).path_in_schema.split(".")[0] == field.name)


def may_be_media(chunk: pq.ColumnChunkMetaData, binary: bool) -> bool:
    statistics = chunk.statistics
    if statistics is not None and statistics.null_count == chunk.num_values:
        return False
    ends = ((statistics.min, statistics.max)
            if statistics is not None and statistics.has_min_max else ())
    # Writers leave long values out, or cut them at 64 bytes. Long texts are no names of files.
    if not ends or any(60 < len(end) < 65 and " " not in str(end) for end in ends):
        return binary or chunk.total_uncompressed_size < 1000 * chunk.num_values
    return any(holds_media(end, None) for end in ends)


def column_bytes(metadata: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Uncompressed bytes of these columns in a row group. images.list.element.bytes is of images.
    """
    chunks = [metadata.column(c) for c in range(metadata.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks
               if chunk.path_in_schema.split(".")[0] in columns)


def rewrite(source: Path, target: Path, group_bytes: int = 1 << 23) -> None:
    """The same rows in groups of about 8 MB, which shuffled training can read one by one."""
    part = target.with_name(target.name + ".part")  # the real name only for the whole file
    with pq.ParquetFile(source, buffer_size=STREAM, pre_buffer=False) as parquet:
        metadata = parquet.metadata
        size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
        rows = max(1, metadata.num_rows * group_bytes // max(size, 1))
        with pq.ParquetWriter(part, parquet.schema_arrow) as writer:
            for batch in parquet.iter_batches(batch_size=rows, use_threads=False):
                writer.write_batch(batch, row_group_size=rows)
    part.replace(target)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file() or Path(sys.argv[2]).exists():
        raise SystemExit("usage: python -m dataset.readers.parquet BIG SMALL (SMALL must not "
                         "exist yet)")
    rewrite(Path(sys.argv[1]), Path(sys.argv[2]))
