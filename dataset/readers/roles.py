"""Who speaks in a turn, in the spellings of other data sets; and the system text beside the turns.

    {"from": "human", "value": "Who?"} -> role_and_content -> "user", "Who?"
    {"system": "Be brief.", "messages": [...]} -> read_system -> a first turn
"""

from dataset.chat import ROLES as CHAT_ROLES
from dataset.readers.bad_sample import shown
from dataset.readers.record_images import is_nothing

SYSTEM = ("system", "system_prompt")  # keys beside the turns
# LLaVA's names, and those of other chats; any other is taken as it is.
ROLES = {**{role: role for role in CHAT_ROLES}, "human": "user", "developer": "system",
         **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant")}


def read_system(record: dict, turns: list) -> list:
    """The system turn whose text stands beside the turns, if there is one."""
    beside = [record[key] for key in SYSTEM if not is_nothing(record.get(key))]
    within = [content for role, content in map(role_and_content, turns) if role == "system"]
    first, *others = [*beside, *within] or [None]
    if beside and any(text != first for text in others):
        raise ValueError(f"two system texts, one of them {shown(first)}; leave one")
    return [{"role": "system", "content": first}] if beside and not within else []


def role_and_content(turn: dict) -> tuple:
    """null is not there: Parquet has both spellings as columns, and a row holds one of them."""
    role, content = (next((turn[key] for key in keys if turn.get(key) is not None), None)
                     for keys in (("role", "from"), ("content", "value")))
    return (ROLES.get(role.lower(), role) if isinstance(role, str) else role), content
