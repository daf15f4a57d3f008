"""Answers on disk as they come, so that a scoring that was killed goes on where it stood.

    answers of a batch -> Journal.add -> a line each        killed here, the same command again:
    a file, and what is asked of whom -> Journal -> known -> these are not asked again

The first line says who is asked what: the model's files, the questions, the settings. If any of it
is not as it was, the old answers count no more: the file is renamed to *.old and it is said why.

Two processes must not write into one journal: locked(directory) holds a lock for the time of a run,
and each batch is written only below the first line that this run began with.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory):
    """For the time of the block no other process gets this lock. ValueError when another has it.

    The operating system holds the lock for the open file DIRECTORY/lock: it ends with the process,
    however that ends. The file stays, because a deleted one could be locked twice.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "ab") as file:
        try:
            lock(file)
        except (BlockingIOError, PermissionError):  # what POSIX and Windows say when it is taken
            raise ValueError(
                f"{directory} is in use: another process is scoring there now. Wait until it has "
                "ended, or give --report DIR, another directory for each of the two.") from None
        except OSError as error:  # some network disks know no locks
            print(f"{directory} cannot be locked ({error}): see to it yourself that nobody else "
                  "scores there at the same time", file=sys.stderr)
        yield


def lock(file) -> None:
    """Lock an open file or raise OSError at once; closing it unlocks it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Journal:
    """about: {name: value}, JSON. known: {number of a question: its answer}; skipped: {number:
    why it could not be asked}."""

    def __init__(self, file, about: dict):
        self.file, self.known, self.skipped = Path(file), {}, {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps(about))  # as it will be read: a tuple is a list
        lines, changed = self.file.read_bytes().split(b"\n") if self.file.is_file() else [], []
        if len(lines) > 1:
            earlier = parsed(lines[0]).get("about")
            changed = (changes(earlier, about) if isinstance(earlier, dict)
                       else ["its first line cannot be read"])
        if len(lines) < 2 or changed:
            if changed:
                old = self.file.with_name(self.file.name + ".old")
                self.file.replace(old)
                print(f"{self.file} holds answers to something else: {'; '.join(changed)}. It is "
                      f"{old.name} now, and every question is asked anew.", file=sys.stderr)
            lines = [json.dumps({"about": about}, ensure_ascii=False).encode(), b""]
            self.file.write_bytes(b"\n".join(lines))
        self.header = lines[0]
        self._read(lines[1:])

    def _read(self, lines: list[bytes]) -> None:
        """lines: all that ends with a line break, and what the last break is followed by."""
        *whole, torn = lines
        broken = 0
        for line in map(parsed, whole):
            if isinstance(line.get("number"), int) and isinstance(line.get("answer"), str):
                self.known[line["number"]] = line["answer"]
            elif isinstance(line.get("number"), int) and isinstance(line.get("skipped"), str):
                self.skipped[line["number"]] = line["skipped"]
            else:
                broken += 1
        if torn:  # killed while it wrote: what comes next must not join the half line
            size = self.file.stat().st_size - len(torn)
            with open(self.file, "r+b") as file:
                file.truncate(size)
        if broken or torn:
            print(f"{self.file}: {broken + bool(torn)} broken lines; their questions are asked "
                  "again", file=sys.stderr)

    def add(self, answers: dict[int, str], skipped: dict[int, str]) -> None:
        """ValueError when the file is no longer the one that this run began or went on with."""
        lines = [{"number": i, "answer": answer} for i, answer in answers.items()]
        lines += [{"number": i, "skipped": reason} for i, reason in skipped.items()]
        with open(self.file, "a+b") as file:  # one write, closed at once: a kill tears one line
            file.seek(0)
            if file.readline() != self.header + b"\n":
                raise ValueError(
                    f"{self.file} was replaced while this scoring ran: its first line no longer "
                    "says who is asked what here, so no answer was added. Give the same command "
                    "again when nobody else writes there, or give another --report DIR.")
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.known.update(answers)
        self.skipped.update(skipped)

    def has(self, i: int) -> bool:
        return i in self.known or i in self.skipped


def parsed(line: bytes) -> dict:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def changes(earlier: dict, now: dict) -> list[str]:
    """What differs, by name: ["batch_size was 64, now it is 32", ...]"""
    def short(value) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:28] + "..." + text[-28:]

    return [f"{name} was {short(earlier.get(name))}, now it is {short(now.get(name))}"
            for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
