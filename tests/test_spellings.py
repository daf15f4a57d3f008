"""Claims: what records say in other usual spellings is understood, and nothing of it is ignored:
speakers, a system text beside the turns, answers that are not to be learned, languages, null."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.chat import ChatTemplate
from dataset.readers.captions import PROMPTS
from dataset.readers.formats import BadSample, open_data
from dataset.tokenizer import Tokenizer
from training.data import matching


def read(folder, record):
    (folder / "data").write_text(json.dumps(record))
    return open_data(folder / "data")[0]


def turns(*pairs, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **more}


@pytest.mark.parametrize("user", ["human", "user", "User", "USER"])
@pytest.mark.parametrize("assistant", ["gpt", "chatgpt", "bing", "bard", "model", "bot",
                                       "Assistant", "GPT"])
def test_speakers(tmp_path, user, assistant):
    messages = read(tmp_path, turns(("developer", "s"), (user, "u"), (assistant, "a"))).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "s"), ("user", "u"), ("assistant", "a")]


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_other_speakers_are_refused_by_name(tmp_path, role):
    with pytest.raises(BadSample, match=f"data:1: unknown role '{role}'"):
        read(tmp_path, turns(("user", "u"), (role, "r"), ("assistant", "a")))


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_turns(tmp_path, key):
    for record in (turns(("human", "u"), ("gpt", "a")), {"prompt": "u", "completion": "a"},
                   {"texts": [{"user": "u", "assistant": "a"}]}):
        messages = read(tmp_path, {**record, key: "Answer in French."}).messages
        assert [(m.role, m.content) for m in messages] == [
            ("system", "Answer in French."), ("user", "u"), ("assistant", "a")]
        assert len(read(tmp_path, {**record, key: None}).messages) == 2
    twice = turns(("system", "s"), ("human", "u"), ("gpt", "a"))
    assert len(read(tmp_path, {**twice, key: "s"}).messages) == 3, "the same text once more"
    for role in ("system", "System", "developer"):
        twice = turns((role, "s"), ("human", "u"), ("gpt", "a"))
        assert len(read(tmp_path, {**twice, key: "s"}).messages) == 3
        with pytest.raises(BadSample, match="two system texts"):
            read(tmp_path, {**twice, key: "t"})
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]},
                          {"role": "assistant", "content": "a"}], key: "s"}
    assert [m.content for m in read(tmp_path, parts).messages] == ["s", "u", "a"]
    for value in (5, ["s"], {"text": "s"}, [["s"]], {"a": {}, "b": 1}):  # and no crash of the run
        try:
            assert read(tmp_path, {**parts, key: value}).messages[0].role == "user"
        except BadSample as error:
            assert error.where.endswith("data:1")
    with pytest.raises(BadSample, match="two system texts"):
        read(tmp_path, {**parts, "system": "s", "system_prompt": ["t"]})


@pytest.mark.parametrize("key, value, hint", [
    ("system_message", "Be brief.", "read from 'system'"), ("systemPrompt", "s", "read from 'syst"),
    ("sys_prompt", "s", "read from 'system'"), ("weight", 0.5, "a turn may have the weight 0"),
    ("loss_weight", 2, "FILE:WEIGHT"), ("sample_weight", 0, "FILE:WEIGHT")])
def test_other_words_for_them_are_refused_by_name(tmp_path, key, value, hint):
    record = turns(("human", "u"), ("gpt", "a"))
    with pytest.raises(BadSample, match=f"data:1: '{key}' .*is not read.*{hint}"):
        read(tmp_path, {**record, key: value})
    record["conversations"][0][key] = value
    if key != "weight":
        with pytest.raises(BadSample, match=f"data:1: '{key}' in a turn .*is not read"):
            read(tmp_path, record)
    for nothing in (None, "", 1 if "weight" in key else " "):
        assert read(tmp_path, {**turns(("human", "u"), ("gpt", "a")), key: nothing})


@pytest.mark.parametrize("key", ["weight", "train"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_answer_that_is_not_to_be_learned(tiny_tokenizer_dir, tmp_path, key, family):
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4, family=family)
    record = {"messages": [{"role": "user", "content": "2+2?"},
                           {"role": "assistant", "content": "5", key: 0},
                           {"role": "user", "content": "Wrong."},
                           {"role": "assistant", "content": "4", key: 1}]}
    messages = read(tmp_path, record).messages
    for prefix in template.training_prefixes(messages):
        ids, mask = template.encode_conversation(prefix)
        learned = template.tokenizer.decode([i for i, on in zip(ids, mask) if on])
        assert learned == "4<|im_end|>" and "5" in template.tokenizer.decode(ids)
    for record["messages"][1][key] in (False, 0.0):
        assert not read(tmp_path, record).messages[1].supervised
    record["messages"][1][key] = 0.5
    with pytest.raises(BadSample, match="the weight of a turn is '0.5'; expected 1, or 0"):
        read(tmp_path, record)


def test_null_beside_a_value_is_not_there(tmp_path):
    both = [{"role": None, "content": None, "from": "human", "value": "u"},
            {"role": "assistant", "content": "a", "from": None, "value": None}]
    pq.write_table(pa.table({"conversations": [both]}), tmp_path / "mixed")
    for sample in (read(tmp_path, {"conversations": both}), open_data(tmp_path / "mixed")[0]):
        assert [(m.role, m.content) for m in sample.messages] == [("user", "u"), ("assistant", "a")]


@pytest.mark.parametrize("more", [
    {"info": {"source": "mine"}}, {"categories": ["colour"]}, {"licenses": [1]}, {"images": []},
    {"annotations": [{"bbox": [1, 2, 3, 4]}]}, {"info": 1, "categories": [], "annotations": []}],
    ids=str)
def test_json_lines_whose_first_keys_are_those_of_coco(tmp_path, more):
    record = {**more, **turns(("human", "u"), ("gpt", "a"))}
    (tmp_path / "data").write_text(f"{json.dumps(record)}\n" * 3)
    assert len(open_data(tmp_path / "data")) == 3
    (tmp_path / "data").write_text(json.dumps(record)[:-9] + f"\n{json.dumps(record)}\n" * 2)
    data = open_data(tmp_path / "data")
    assert len(data) == 3 and data[1].messages[1].content == "a"
    with pytest.raises(BadSample, match="data:1: not JSON"):
        data[0]


@pytest.mark.parametrize("caption, language", [
    ("赤い四角がある", "ja"), ("ネコ", "ja"), ("빨간 사각형", "ko"), ("红色的方块", "zh"),
    ("A red square.", "en"), ("Un carré rouge.", "en")])
def test_a_caption_is_asked_for_in_its_language(tmp_path, caption, language):
    record = {"image_bytes": [], "caption": caption}
    pq.write_table(pa.table({"image_bytes": [b"x"], "caption": [caption]}), tmp_path / "data")
    assert record and open_data(tmp_path / "data")[0].messages[0].content.removeprefix(
        "<image>\n") in PROMPTS[language]


def test_each_caption_meets_each_prompt(tmp_path):
    pq.write_table(pa.table({"image_bytes": [b"x"], "caption": [["a", "b", "c", "d"]]}),
                   tmp_path / "data")
    data = open_data(tmp_path / "data")
    pairs = {tuple(m.content for m in data.sample(0, caption_index=n).messages) for n in range(16)}
    assert len(pairs) == 16


def test_a_file_that_is_there_is_no_pattern(tmp_path):
    for name in ("set[1].jsonl", "set1.jsonl"):
        (tmp_path / name).write_text("{}")
    name = f"{tmp_path}/set[1].jsonl"
    assert matching(name) == [name] and matching(name + ":2") == [name + ":2"]
    (tmp_path / "set[1].jsonl").unlink()
    assert matching(name) == [f"{tmp_path}/set1.jsonl"]


def linked(folder):
    """Links that the user has made, as hub caches and cluster disks have them; and a secret."""
    for place in ("disk2/train", "images/sub", "hub/x/snapshots/abc", "hub/x/blobs", "hub/y"):
        (folder / place).mkdir(parents=True)
    for place in ("disk2/train/a.png", "disk2/secret.png", "hub/x/blobs/0a1b", "hub/y/s.png"):
        (folder / place).write_bytes(b"x")
    (folder / "images/coco").symlink_to(folder / "disk2/train")
    (folder / "images/b.png").symlink_to(folder / "disk2/train/a.png")
    (folder / "hub/x/snapshots/abc/a.png").symlink_to("../../blobs/0a1b")
    (folder / "hub/x/snapshots/abc/out.png").symlink_to(folder / "hub/y/s.png")


def shown(folder, name, images_dir, **more):
    (folder / "data").write_text(json.dumps({"image": name, "caption": "A cat."}))
    return open_data(folder / "data", images_dir, **more)[0].images


def test_links_are_followed_where_the_user_says_so(tmp_path):
    linked(tmp_path)
    images = tmp_path / "images"
    for name in ("coco/a.png", "b.png"):
        with pytest.raises(BadSample, match="leads out of the image folder .*--follow_links"):
            shown(tmp_path, name, images)
        assert shown(tmp_path, name, images, follow_links=True) == (images / name,)
    for name in ("../disk2/secret.png", "coco/../secret.png", "sub/../../disk2/secret.png",
                 str(tmp_path / "disk2/secret.png"), "sub\\..\\..\\disk2\\secret.png"):
        for follow_links in (False, True):
            with pytest.raises(BadSample, match="leads out of the image folder"):
                shown(tmp_path, name, images, follow_links=follow_links)


def test_a_folder_called_snapshots_opens_nothing_beside_it(tmp_path):
    """Only links that lie in a snapshot lead to its blobs: no name in the data does."""
    (tmp_path / "snapshots/may").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for place in ("secret.png", "snapshots/secret.png", "blobs/secret.png"):
        (tmp_path / place).write_bytes(b"x")
    for name in ("../secret.png", "../../secret.png", "../../blobs/secret.png",
                 str(tmp_path / "secret.png"), str(tmp_path / "blobs/secret.png")):
        with pytest.raises(BadSample, match="leads out of the image folder"):
            shown(tmp_path, name, tmp_path / "snapshots/may")
    (tmp_path / "snapshots/may/link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadSample, match="leads out of the image folder"):
        shown(tmp_path, "link.png", tmp_path / "snapshots/may")


def test_a_snapshot_of_the_hubs_cache_holds_links_to_its_blobs(tmp_path):
    linked(tmp_path)
    snapshot = tmp_path / "hub/x/snapshots/abc"
    assert shown(tmp_path, "a.png", snapshot) == (snapshot / "a.png",)
    for name in ("out.png", "../../../y/s.png"):
        with pytest.raises(BadSample, match="leads out of the image folder"):
            shown(tmp_path, name, snapshot)


@pytest.mark.parametrize("record, asked", [
    ({"question": "Who?", "answer": "A cat."}, "Who?"),
    ({"query": "Who?", "response": "A cat."}, "Who?"),
    ({"instruction": "Say who.", "output": "A cat."}, "Say who."),
    ({"instruction": "Say who.", "input": "There it sits.", "output": "A cat."},
     "Say who.\nThere it sits."),
    ({"instruction": "Say who.", "input": "", "output": "A cat."}, "Say who."),
    ({"input": "Who?", "output": "A cat."}, "Who?")], ids=str)
def test_one_question_and_its_answer(tmp_path, record, asked):
    (tmp_path / "a.png").write_bytes(b"x")
    sample = read(tmp_path, {**record, "image": "a.png", "id": 1, "source": "s"})
    assert [(m.role, m.content) for m in sample.messages] == [
        ("user", "<image>\n" + asked), ("assistant", "A cat.")]
    pq.write_table(pa.table({key: [value] for key, value in record.items()}), tmp_path / "p")
    assert open_data(tmp_path / "p")[0].messages[0].content == asked
    for key in record:
        with pytest.raises(BadSample, match="data:1"):
            read(tmp_path, {**record, key: ["A", "B"]})
        if len(record) == 2:
            with pytest.raises(BadSample, match="data:1"):
                read(tmp_path, {**record, key: None})
