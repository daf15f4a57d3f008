"""A record of one question and its answer, whatever its two keys are called.

    {"question": ..., "answer": ...}, {"instruction": ..., "input": ..., "output": ...}, ...
        -> read_answered -> two turns
"""

from dataset.readers.bad_sample import shown

ASKED = ("question", "query", "instruction", "input")  # what is there, in this order
ANSWER = ("answer", "response", "output")


def read_answered(record: dict, index: int, caption_index: int) -> list:
    asked = [record[key] for key in ASKED if record.get(key) not in (None, "")]
    if not asked or not all(isinstance(text, str) for text in asked):
        raise ValueError(f"what is asked ({', '.join(ASKED)}) is {shown(asked)}; expected a text")
    answer = next((record[key] for key in ANSWER if record.get(key) is not None), None)
    return [{"role": "user", "content": "\n".join(asked)}, {"role": "assistant", "content": answer}]
