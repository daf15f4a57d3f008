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
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from training.run_metadata import parse_objects


@contextmanager
def locked(directory):
    """For the time of the block no other process gets this lock, which ends with the process,
    however that ends. ValueError when another has it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(directory / "lock", timeout=0))
        except Timeout:
            raise ValueError(
                f"{directory} is in use: another process is scoring there now. Wait until it has "
                "ended, or give --report DIR, another directory for each of the two.") from None
        except (OSError, NotImplementedError) as error:  # some network disks know no locks
            print(f"{directory} cannot be locked ({error}): see to it yourself that nobody else "
                  "scores there at the same time", file=sys.stderr)
        yield


class ResultsCache:
    """answers: {index of a question: answer}; errors: {index: why it could not be asked}.

    key: {name: value}, JSON.
    """

    def __init__(self, file, key: dict):
        self.file, self.answers, self.errors = Path(file), {}, {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        key = json.loads(json.dumps(key))  # as it will be read: a tuple is a list
        self.header = json.dumps({"key": key}, ensure_ascii=False).encode() + b"\n"
        lines = self.file.read_bytes().splitlines(keepends=True) if self.file.is_file() else []
        old_keys = [entry.get("key") for entry in parse_objects(lines[:1])]
        if lines and old_keys != [key]:
            differences = (changes(old_keys[0], key) if old_keys and isinstance(old_keys[0], dict)
                           else ["its first line cannot be read"])
            old = self.file.with_name(self.file.name + ".old")
            self.file.replace(old)
            print(f"{self.file} holds answers to something else: {'; '.join(differences)}. It is "
                  f"{old.name} now, and every question is asked anew.", file=sys.stderr)
            lines = []
        kept = [line for line in lines[1:] if self._read(line)]
        broken = len(lines[1:]) - len(kept)
        if broken:
            print(f"{self.file}: {broken} broken lines; their questions are asked again",
                  file=sys.stderr)
        if lines != [self.header, *kept]:  # new, or with lines to leave out
            self.file.write_bytes(self.header + b"".join(kept))

    def _read(self, line: bytes) -> bool:
        """Whether it is a whole line: the last one may be torn, killed while it was written."""
        for entry in parse_objects([line] if line.endswith(b"\n") else []):
            for name, known in (("answer", self.answers), ("error", self.errors)):
                if isinstance(entry.get("index"), int) and isinstance(entry.get(name), str):
                    known[entry["index"]] = entry[name]
                    return True
        return False

    def add(self, answers: dict[int, str], errors: dict[int, str]) -> None:
        """ValueError when the file is no longer the one that this run began or went on with."""
        lines = [{"index": i, "answer": answer} for i, answer in answers.items()]
        lines += [{"index": i, "error": reason} for i, reason in errors.items()]
        with open(self.file, "a+b") as file:  # one write, closed at once: a kill tears one line
            file.seek(0)
            if file.readline() != self.header:
                raise ValueError(
                    f"{self.file} was replaced while this scoring ran: its first line no longer "
                    "says who is asked what here, so no answer was added. Give the same command "
                    "again when nobody else writes there, or give another --report DIR.")
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.answers.update(answers)
        self.errors.update(errors)

    def has(self, i: int) -> bool:
        return i in self.answers or i in self.errors


def changes(old: dict, new: dict) -> list[str]:
    """What differs, by name: ["batch_size was 64, now it is 32", ...]"""
    def short(value) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:28] + "..." + text[-28:]

    return [f"{name} was {short(old.get(name))}, now it is {short(new.get(name))}"
            for name in {**old, **new} if old.get(name) != new.get(name)]
