"""Answers on disk as they come, so that a scoring that was killed goes on where it stopped.

    answers of a batch -> ResultsCache.add -> one line each     killed here, the same command again:
    file and key -> ResultsCache -> answers, errors             these questions are not asked again

The first line is the key: the model's files, the questions, the settings. If any of it differs, the
old answers do not count: the file is renamed to *.old, and a message says why.

Two processes must not write into one cache: locked(directory) holds a lock for the time of a run,
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


class ResultsCache:
    """answers: {index of a question: answer}; errors: {index: why it could not be asked}.

    key: {name: value}, JSON.
    """

    def __init__(self, file, key: dict):
        self.file, self.answers, self.errors = Path(file), {}, {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        key = json.loads(json.dumps(key))  # as it will be read: a tuple is a list
        lines = self.file.read_bytes().split(b"\n") if self.file.is_file() else []
        differences = []
        if len(lines) > 1:
            old_key = parse_object(lines[0]).get("key")
            differences = (changes(old_key, key) if isinstance(old_key, dict)
                           else ["its first line cannot be read"])
        if len(lines) < 2 or differences:
            if differences:
                old = self.file.with_name(self.file.name + ".old")
                self.file.replace(old)
                print(f"{self.file} holds answers to something else: {'; '.join(differences)}. It "
                      f"is {old.name} now, and every question is asked anew.", file=sys.stderr)
            lines = [json.dumps({"key": key}, ensure_ascii=False).encode(), b""]
            self.file.write_bytes(b"\n".join(lines))
        self.header = lines[0]
        self._read(lines[1:])

    def _read(self, lines: list[bytes]) -> None:
        """lines: all that ends with a line break, and what follows the last break."""
        *whole, torn = lines
        broken = 0
        for line in map(parse_object, whole):
            index, answer, error = (line.get(name) for name in ("index", "answer", "error"))
            if isinstance(index, int) and isinstance(answer, str):
                self.answers[index] = answer
            elif isinstance(index, int) and isinstance(error, str):
                self.errors[index] = error
            else:
                broken += 1
        if torn:  # killed while it wrote: the next line must not join the half line
            size = self.file.stat().st_size - len(torn)
            with open(self.file, "r+b") as file:
                file.truncate(size)
        if broken or torn:
            print(f"{self.file}: {broken + bool(torn)} broken lines; their questions are asked "
                  "again", file=sys.stderr)

    def add(self, answers: dict[int, str], errors: dict[int, str]) -> None:
        """ValueError when the file is no longer the one that this run began or went on with."""
        lines = [{"index": i, "answer": answer} for i, answer in answers.items()]
        lines += [{"index": i, "error": reason} for i, reason in errors.items()]
        with open(self.file, "a+b") as file:  # one write, closed at once: a kill tears one line
            file.seek(0)
            if file.readline() != self.header + b"\n":
                raise ValueError(
                    f"{self.file} was replaced while this scoring ran: its first line no longer "
                    "says who is asked what here, so no answer was added. Give the same command "
                    "again when nobody else writes there, or give another --report DIR.")
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.answers.update(answers)
        self.errors.update(errors)

    def has(self, i: int) -> bool:
        return i in self.answers or i in self.errors


def parse_object(line: bytes) -> dict:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def changes(old: dict, new: dict) -> list[str]:
    """What differs, by name: ["batch_size was 64, now it is 32", ...]"""
    def short(value) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:28] + "..." + text[-28:]

    return [f"{name} was {short(old.get(name))}, now it is {short(new.get(name))}"
            for name in {**old, **new} if old.get(name) != new.get(name)]
