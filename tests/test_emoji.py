"""The emoji world: the same scene for the same number, true texts, and test scenes kept apart."""

import hashlib
import itertools
import random
import re
from pathlib import Path

import pytest

from dataset.emoji import texts, world
from dataset.emoji.world import CHAT_START, TEST_START, EmojiData, scene

EMOJI = Path(world.__file__).parent


def test_scene_number_n_is_always_the_same_scene():
    # Random() draws the same numbers on every platform and Python version; a change here would
    # make published scores incomparable.
    facts = repr([scene(number) for number in (0, 1, CHAT_START, TEST_START, TEST_START + 3)])
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == "2d07e85d83651a30"
    first, again = EmojiData("chat")[5], EmojiData("chat")[5]
    assert first.messages == again.messages
    assert first.images[0]().tobytes() == again.images[0]().tobytes()


def test_things_stay_inside_their_quarter():
    for number in range(300):
        for placed in scene(number).things:
            right, bottom = placed.left + placed.size, placed.top + placed.size
            assert 0 <= placed.left and right <= 96 and 0 <= placed.top and bottom <= 96
            if placed.place != "middle":
                assert (placed.left >= 48) == ("right" in placed.place)
                assert (right <= 48) == ("left" in placed.place)
                assert (placed.top >= 48) == ("bottom" in placed.place)


def test_some_pairs_stand_together_in_test_scenes_only():
    def pairs(numbers):
        return {pair for n in numbers for pair in itertools.combinations(
            sorted({p.thing for p in scene(n).things}), 2)}

    training = pairs([*range(3000), *range(CHAT_START, CHAT_START + 3000)])
    test = pairs(range(TEST_START, TEST_START + 2000))
    kept = {pair for pair in test if world.kept_for_test(*pair)}
    assert not any(world.kept_for_test(*pair) for pair in training)
    assert len(kept) > 200 and not kept & training
    everything = list(itertools.combinations(range(len(texts.THINGS)), 2))
    share = sum(world.kept_for_test(*pair) for pair in everything) / len(everything)
    assert 0.04 < share < 0.06


def test_training_data_never_draws_a_test_scene():
    numbers = {kind: [int(re.search(r"scene (\d+)", EmojiData(kind)[i].where)[1])
                      for i in (0, 1, len(EmojiData(kind)) - 1)]
               for kind in ("captions", "chat", "test")}
    assert max(numbers["captions"]) < CHAT_START <= min(numbers["chat"])
    assert max(numbers["chat"]) < TEST_START <= min(numbers["test"])


def test_the_test_holds_every_kind_in_both_languages_equally():
    data = EmojiData("test")
    tags = [tuple(sorted(data[i].tags.items())) for i in range(len(data))]
    counts = {tag: tags.count(tag) for tag in set(tags)}
    assert len(counts) == 2 * len(texts.KINDS) and len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_name_exactly_the_things_in_reading_order(language):
    for number in range(200):
        what = scene(number)
        answer = texts.caption(what, random.Random(0), language)[0][1]
        names = [texts.THINGS[p.thing].one(language) for p in what.things]
        pieces = re.split("、|和" if language == "zh" else ", | and ", answer[:-1])
        assert [p[0].lower() + p[1:] for p in pieces] == names


def test_stage_one_reads_a_caption_then_short_questions_none_of_them_twice():
    data, asked = EmojiData("captions"), 0
    for number in range(200):
        what, messages = scene(number), data[number].messages
        language = data[number].tags["language"]
        assert messages[1].content == texts.caption(what, random.Random(0), language)[0][1]
        questions = [m.content for m in messages if m.role == "user"]
        assert len(set(questions)) == len(questions)
        asked += len(questions)
        places = {texts.where_is(placed, language) for placed in texts.unique(what)}
        assert places & {m.content for m in messages} or not places
    assert asked > 200 * 5


def test_answers_follow_from_the_scene():
    checked = 0
    for number in range(400):
        what = scene(number)
        at = {p.place: texts.THINGS[p.thing].english for p in what.things}
        for kind in texts.KINDS:
            for question, answer in (texts.ask(what, kind, "en", random.Random(number)) or [])[:1]:
                checked += 1
                if match := re.fullmatch(r"Is there an? (.+)\?", question):
                    assert answer == ("Yes." if match[1] in at.values() else "No.")
                elif match := re.fullmatch(r"Where is the (.+)\?", question):
                    place = answer[:-1].lower().split(" the ")[1]
                    assert at[place] == match[1] and list(at.values()).count(match[1]) == 1
                elif match := re.fullmatch(r"What is (to the left of|to the right of|above|below) "
                                           r"the (.+)\?", question):
                    place = next(p for p, name in at.items() if name == match[2])
                    swap = {"to the left of": ("right", "left"), "to the right of":
                            ("left", "right"), "above": ("bottom", "top"),
                            "below": ("top", "bottom")}[match[1]]
                    assert at[place.replace(*swap)] in answer
                elif match := re.fullmatch(r"How many (.+) are there\?", question):
                    plurals = {t.plural: t.english for t in texts.THINGS}
                    n = (len(at) if match[1] == "things" else
                         list(at.values()).count(plurals[match[1]]))
                    assert answer == texts.NUMBERS_EN[n] + "."
    assert checked > 2000


def test_names_are_unique_and_the_folder_is_small():
    assert len({t.english for t in texts.THINGS}) == len({t.chinese for t in texts.THINGS}) == 120
    assert sum(f.stat().st_size for f in EMOJI.rglob("*") if f.suffix != ".pyc") < 15e6
