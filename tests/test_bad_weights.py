"""Claim: a directory with weights that is damaged, wrong or wicked is refused in one message that
names the file, and the tensor, and what was expected; nothing in it is run, nothing outside read.

Each table reads: name of the case, what is done to a sound directory, what the message says.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from bad import Order, watched
from safetensors.torch import load_file, save_file
from tiny import make_pair

from dataset.tokenizer import Tokenizer
from model.pretrained.hub import resolve
from model.pretrained.load import load_language, load_vision
from model.pretrained.pickle_loader import load_plain

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    make_pair(directory)
    return directory


@pytest.fixture
def language(sound, tmp_path):
    shutil.copytree(sound / "language", tmp_path / "language")
    return tmp_path / "language"


@pytest.fixture
def vision(sound, tmp_path):
    shutil.copytree(sound / "vision", tmp_path / "vision")
    return tmp_path / "vision"


# ---------------------------------------------------------------- ways to spoil a directory


def tensors(change):
    """change({name: tensor}), written back."""
    def spoil(directory):
        held = load_file(directory / "model.safetensors")
        change(held)
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    return spoil


def put(name, tensor):
    return tensors(lambda held: held.__setitem__(name, tensor))


def bytes_of(change, name="model.safetensors"):
    """change(the file's bytes) -> the bytes to write."""
    def spoil(directory):
        (directory / name).write_bytes(change((directory / name).read_bytes()))
    return spoil


def header(change):
    """change(the header of model.safetensors), its length written anew."""
    def changed(content):
        size, = struct.unpack("<Q", content[:8])
        found = json.loads(content[8:8 + size])
        change(found)
        text = json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size:]
    return bytes_of(changed)


def length(number):
    return bytes_of(lambda content: struct.pack("<Q", number) + content[8:])


def config(**changes):
    """config.json with other values; None: without the key."""
    def spoil(directory):
        file = directory / "config.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return spoil


def text(name, content):
    return lambda directory: (directory / name).write_text(content)


def without(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def index(content, single="model.safetensors"):
    """An index in place of the file, which lies one directory higher now: where both lie, the file
    is read and no index."""
    def spoil(directory):
        shutil.move(directory / "model.safetensors", directory.parent / "x.safetensors")
        written = content if isinstance(content, str) else json.dumps(content)
        (directory / f"{single}.index.json").write_text(written)
    return spoil


def shard(name):
    return index({"weight_map": {NORM: name}})


def binary(make, name="pytorch_model.bin"):
    """The weights as an older file, written by make(path, tensors)."""
    def spoil(directory):
        held = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        make(directory / name, held)
    return spoil


def saved(content, **options):
    return binary(lambda path, held: torch.save(
        content(path, held) if callable(content) else content, path, **options))


def plain_pickle(content):
    return binary(lambda path, held: path.write_bytes(pickle.dumps(content(path))))


def rewritten(change):
    """A sound .bin whose pickle is changed inside of its zip archive."""
    def make(path, held):
        torch.save(held, path)
        with zipfile.ZipFile(path) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return binary(make)


def ran(path):
    return str(path.parent / "ran")


# ---------------------------------------------------------------- what a decoder may hold

LANGUAGE = [
    # tensors
    ("one is missing", tensors(lambda t: t.pop(UP)), f"missing: {UP}"),
    ("all are missing", tensors(lambda t: (t.clear(), t.update(x=torch.ones(1)))), "missing: .*mo"),
    ("one more", put("extra.weight", torch.ones(2)), "unknown: extra.weight"),
    ("one layer more", put("model.layers.2.mlp.up_proj.weight", torch.ones(48, 32)), "unknown: mo"),
    ("another name", tensors(lambda t: t.__setitem__("x", t.pop(UP))), f"missing: {UP}\n.*unknown"),
    ("turned", put(UP, torch.ones(32, 48)), rf"{UP} is \[32, 48\] in .* asks for \[48, 32\]"),
    ("one row more", put(UP, torch.ones(49, 32)), rf"misshapen: {UP} is \[49, 32\]"),
    ("flat", put(UP, torch.ones(48 * 32)), rf"misshapen: {UP} is \[1536\]"),
    ("empty", put(UP, torch.ones(0, 32)), rf"misshapen: {UP} is \[0, 32\]"),
    ("a single number", put(NORM, torch.tensor(1.0)), rf"misshapen: {NORM} is \[\] in the file"),
    ("NaN", put(NORM, torch.tensor([1.0] * 31 + [float("nan")])), f"not finite: {NORM} in model.s"),
    ("infinity", put(UP, torch.full((48, 32), float("inf"))), f"not finite: {UP} in model.safeten"),
    ("both infinities", put(UP, torch.tensor([1e39, -1e39]).repeat(48, 16)), f"not finite: {UP} i"),
    ("NaN in bf16", put(NORM, torch.full((32,), float("nan")).bfloat16()), f"not finite: {NORM}"),
    ("whole numbers", put(UP, torch.ones(48, 32, dtype=torch.int32)), f"but int32: {UP} in model."),
    ("truth values", put(NORM, torch.ones(32, dtype=torch.bool)), f"but bool: {NORM} in model.saf"),
    ("complex numbers", put(NORM, torch.ones(32, dtype=torch.complex64)), f"complex64: {NORM}"),
    # model.safetensors as a file
    ("no weights", without("model.safetensors"), "language lacks model.safetensors"),
    ("0 bytes", bytes_of(lambda b: b""), "model.safetensors cannot be read as safetensors"),
    ("7 bytes", bytes_of(lambda b: b[:7]), "model.safetensors cannot be read as safetensors"),
    ("the header alone", bytes_of(lambda b: b[:3000]), "cannot be read as safetensors: .*ncomplet"),
    ("1 byte short", bytes_of(lambda b: b[:-1]), "cannot be read as safetensors: .*ncomplete"),
    ("1 byte more", bytes_of(lambda b: b + b"x"), "model.safetensors cannot be read as safetensor"),
    ("half", bytes_of(lambda b: b[:len(b) // 2]), "It may be cut short: compare its size"),
    ("zeros", bytes_of(lambda b: bytes(len(b))), "model.safetensors cannot be read as safetensors"),
    ("a git-lfs pointer", bytes_of(lambda b: b"version https://git-lfs.github.com/spec/v1\n"),
     "cannot be read as safetensors"),
    ("a header of 0", length(0), "cannot be read as safetensors"),
    ("a header of 8 less", length(1000), "cannot be read as safetensors"),
    ("a header longer than the file", length(10**7), "cannot be read as safetensors"),
    ("a header of 8 EB", length(2**63), "cannot be read as safetensors: .*oo large"),
    ("a header of no JSON", bytes_of(lambda b: b[:8] + b"x" + b[9:]), "cannot be read as safetens"),
    ("a place behind the end", header(lambda h: h[NORM].update(data_offsets=[0, 10**9])),
     "cannot be read as safetensors"),
    ("a place before the start", header(lambda h: h[NORM].update(data_offsets=[-8, 120])),
     "cannot be read as safetensors"),
    ("places that overlap", header(lambda h: h[NORM].update(data_offsets=[0, 128])),
     "cannot be read as safetensors"),
    ("a shape that lies", header(lambda h: h[NORM].update(shape=[33])), "cannot be read as safete"),
    ("a shape past all numbers", header(lambda h: h[NORM].update(shape=[2**40, 2**40])),
     "cannot be read as safetensors"),
    ("a shape below zero", header(lambda h: h[NORM].update(shape=[-32])), "cannot be read as safe"),
    ("no such dtype", header(lambda h: h[NORM].update(dtype="F33")), "cannot be read as safetenso"),
    ("floats named whole", header(lambda h: h[NORM].update(dtype="I32")), f"but int32: {NORM}"),
    # shards
    ("an index of no JSON", index("{"), "index.json is not JSON"),
    ("an index of a list", index("[]"), r"index.json holds '\[\]'; expected an object"),
    ("an index without a map", index({}), "index.json has no 'weight_map'"),
    ("a map of a list", index({"weight_map": [1]}), "index.json has no 'weight_map'"),
    ("a map to numbers", index({"weight_map": {"a": 1}}), "index.json has no 'weight_map'"),
    ("an empty map", index({"weight_map": {}}), "index.json has no 'weight_map'"),
    ("a shard that is not there", shard("gone.safetensors"), "language lacks gone.safetensors"),
    ("a shard one higher", shard("../x.safetensors"), "'../x.safetensors'; expected a file beside"),
    ("a shard by its path", shard("/etc/passwd"), "'/etc/passwd'; expected a file beside the inde"),
    ("a shard deeper", shard("sub/x.safetensors"), "expected a file beside the index"),
    ("a shard on Windows", shard("..\\x.safetensors"), "expected a file beside the index"),
    ("a shard named ..", shard(".."), "expected a file beside the index|lacks .."),
    ("a shard without a name", shard(""), "lacks |expected a file beside the index"),
    ("a shard that is the config", shard("config.json"), "config.json .*refused|config.json canno"),
    # config.json
    ("no config", without("config.json"), "config.json is missing: it says what the weights"),
    ("no JSON", text("config.json", "{"), "config.json is not JSON"),
    ("an empty file", text("config.json", ""), "config.json is not JSON"),
    ("a list", text("config.json", "[]"), r"config.json holds '\[\]'; expected an object"),
    ("100,000 lists deep", text("config.json", "[" * 100_000), "config.json is not JSON"),
    ("no UTF-8", lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json is not"),
    ("no model_type", config(model_type=None), "config.json says model_type None; the decoder her"),
    ("another model", config(model_type="gpt2"), "config.json says model_type 'gpt2'"),
    ("a list for a type", config(model_type=["qwen2"]), r"says model_type \['qwen2'\]"),
    ("no width", config(hidden_size=None), "config.json of model_type 'qwen2' lacks hidden_size"),
    ("no width, no words", config(hidden_size=None, vocab_size=None), "lacks vocab_size, hidden_s"),
    ("a width in words", config(hidden_size="32"), "has hidden_size = '32'; expected a whole numb"),
    ("a width of 0", config(hidden_size=0), "has hidden_size = '0'; expected a whole number, 1 to"),
    ("a width below 0", config(hidden_size=-32), "has hidden_size = '-32'; expected a whole numbe"),
    ("a width of 32.5", config(hidden_size=32.5), "has hidden_size = '32.5'; expected a whole"),
    ("a width of 10**15", config(hidden_size=10**15), "has hidden_size = .*expected a whole numbe"),
    ("true layers", config(num_hidden_layers=True), "has num_hidden_layers = 'True'; expected a w"),
    ("a billion layers", config(num_hidden_layers=10**9), "num_hidden_layers = .*, 1 to 1000"),
    ("a layer more", config(num_hidden_layers=3), "missing: model.layers.2"),
    ("no heads", config(num_attention_heads=0), "has num_attention_heads = '0'; expected a whole"),
    ("3 heads, 2 for keys", config(num_attention_heads=3), "must be a multiple of num_key_value_h"),
    ("an odd head", config(head_dim=7), "head_dim 7 must be even"),
    ("theta below 0", config(rope_theta=-1), "has rope_theta = '-1'; expected a number above 0"),
    ("theta in words", config(rope_theta="1e4"), "has rope_theta = '1e4'; expected a number above"),
    ("eps of NaN", config(rms_norm_eps=float("nan")), "has rms_norm_eps = 'nan'; expected a numbe"),
    ("tied in words", config(tie_word_embeddings="no"), "tie_word_embeddings = 'no'; expected tru"),
    ("rope is a list", config(rope_scaling=[1]), r"rope_parameters of config.json is '\[1\]'"),
    ("stretched rope", config(rope_scaling={"type": "yarn"}), "rope_type = 'yarn'; only 'default'"),
    ("another activation", config(hidden_act="relu"), "hidden_act = 'relu'; only 'silu'"),
    ("bitsandbytes", config(quantization_config={"quant_method": "bitsandbytes"}),
     r"config.json has quantization_config \(bitsandbytes\): weights in few bits are not read here;"
     " take the release in bf16"),
    ("fp8", config(quantization_config={"quant_method": "fp8"}), r"quantization_config \(fp8\): w"),
    ("an unnamed method", config(quantization_config={"bits": 4}), "_config .of an unnamed method"),
    ("a text for a method", config(quantization_config="awq"), r"quantization_config \(awq\): "),
    ("compressed", config(compression_config={"quant_method": "sparse"}), r"n_config \(sparse\)"),
    # the same where config.json is silent: the tensors tell
    *((f"{end} unsaid", put(f"{UP}{end}" if end.startswith("_") else UP.replace("weight", end),
                            torch.ones(2, dtype=torch.uint8)), "up_proj.*: weights in few bits are")
      for end in ("qweight", "qzeros", "_scale", "_scale_inv", "weight_packed", "SCB",
                  "weight.absmax", "weight.quant_map")),
    ("an adapter as well", text("adapter_config.json", "{}"), "adapter of peft .*--lora_from"),
    ("an adapter alone", lambda d: (text("adapter_config.json", "{}")(d),
                                    without("config.json")(d)), "adapter of peft .*--lora_from"),
    # another head in a file whose config.json ties it
    ("a head with a row more", put("lm_head.weight", torch.ones(263, 32)), "misshapen: lm_head.w"),
    ("a head of NaN", put("lm_head.weight", torch.full((262, 32), float("nan"))), "finite: lm_he"),
    # pickles: pytorch_model.bin
    ("a pickle that runs", saved(lambda p, t: {NORM: Order(os.mkdir, ran(p))}), "global.*mkdir"),
    ("a shell in a pickle", saved(lambda p, t: Order(os.system, f"mkdir {ran(p)}")), "refused"),
    ("eval in a pickle", saved(lambda p, t: Order(eval, f"__import__('os').mkdir({ran(p)!r})")),
     "holds more than tensors"),
    ("getattr in a pickle", saved(lambda p, t: Order(getattr, 1, "real")), "refused"),
    ("torch.load in a pickle", saved(lambda p, t: Order(torch.load, "x")), "refused"),
    ("an old pickle that runs", saved(lambda p, t: {NORM: Order(os.mkdir, ran(p))},
                                      _use_new_zipfile_serialization=False), "refused"),
    ("a pickle of Python", plain_pickle(lambda p: Order(os.mkdir, ran(p))), "refused|cannot be re"),
    ("a changed pickle", rewritten(lambda p: p.replace(b"_rebuild_tensor_v", b"_rebuild_tensor_x")),
     "refused|cannot be read"),
    ("a cut pickle", rewritten(lambda p: p[:len(p) // 2]), "cannot be read as a file of torch.sav"),
    ("an empty pickle", rewritten(lambda p: b""), "cannot be read as a file of torch.save"),
    ("a whole model", saved(lambda p, t: torch.nn.Linear(2, 2)), "refused"),
    ("a list", saved([torch.ones(1)]), "holds a list; a dictionary"),
    ("a number", saved(7), "holds a int; a dictionary"),
    ("the state of a run", saved({"model": {}, "epoch": 1}), "'model', 'epoch', which are no tens"),
    ("numbers for names", saved({1: torch.ones(1)}), "holds 1, which are no tensors"),
    ("sparse", saved(lambda p, t: {**t, NORM: torch.ones(32).to_sparse()}), f"'{NORM}'"),
    ("without numbers", saved(lambda p, t: {**t, NORM: torch.ones(32, device="meta")}), f"'{NORM}"),
    ("a .bin of 0 bytes", binary(lambda p, t: p.write_bytes(b"")), "pytorch_model.bin cannot be r"),
    ("a .bin of words", binary(lambda p, t: p.write_bytes(b"hello")), "refused|cannot be read"),
    ("a zip of something", binary(lambda p, t: zipfile.ZipFile(p, "w").writestr("a", "b")), "cann"),
    ("a .bin of NaN", saved(lambda p, t: {**t, NORM: torch.full((32,), float("nan"))}), "not fini"),
    ("a .bin without one", saved(lambda p, t: {k: v for k, v in t.items() if k != UP}), "missing:"),
]


def refused(load, directory, spoil, words):
    spoil(directory)
    before = sorted(os.listdir(directory))
    with watched() as seen:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load(directory)
    caught.match(f"(?si){words}")
    assert str(directory) in str(caught.value) and len(str(caught.value)) < 3000
    assert "weights_only" not in str(caught.value), "no advice to open it all the same"
    left = {*os.listdir(directory)} - {"converted_model"}  # of a .bin that is one, but not this
    assert not seen.started and sorted(left) == before, "nothing was run"
    assert not [path for path in seen.opened_outside(directory) if "passwd" in path
                or path.endswith("x.safetensors")]


@pytest.mark.parametrize("name, spoil, words", LANGUAGE, ids=[case[0] for case in LANGUAGE])
def test_a_bad_language_model_is_refused_by_file(language, name, spoil, words):
    refused(load_language, language, spoil, words)


# ---------------------------------------------------------------- what differs for others

PATCH = "vision_model.embeddings.patch_embedding.weight"
VISION = [
    ("one is missing", tensors(lambda t: t.pop(PATCH)), f"missing: {PATCH}"),
    ("NaN", tensors(lambda t: t[PATCH].fill_(float("nan"))), f"not finite: {PATCH}"),
    ("half", bytes_of(lambda b: b[:len(b) // 2]), "cannot be read as safetensors"),
    ("no JSON", text("config.json", "{"), "config.json is not JSON"),
    ("another tower", config(model_type="beit"), "config.json says model_type 'beit'"),
    ("patches larger than pictures", config(patch_size=32), "patch_size 32 is larger than image_s"),
    ("no patches", config(patch_size=0), "has patch_size = '0'; expected a whole number"),
    ("another grid", config(image_size=32), "position_embedding.weight is"),
    ("heads that do not fit", config(num_attention_heads=5), "must be a multiple of num_attention"),
    ("a whole model of nothing", config(model_type="siglip", vision_config=7), "vision_config of "),
    ("an eps of 0", config(layer_norm_eps=0), "has layer_norm_eps = '0'; expected a number above "),
    ("another activation", config(hidden_act="relu"), "hidden_act is 'relu'"),
    ("grey pictures", config(num_channels=1), "num_channels = 1; only 3 is supported"),
    ("gptq", config(quantization_config={"quant_method": "gptq"}), r"quantization_config \(gptq\)"),
]
MINIMIND = "model.layers.0.self_attn.q_proj.weight"
PTH = [  # llm.pth instead of everything
    ("flat", {MINIMIND: torch.ones(64)}, rf"{MINIMIND} has the shape \[64\]; expected a matrix"),
    ("empty", {MINIMIND: torch.ones(0, 64)}, "expected a matrix"),
    ("a billion layers", {"model.layers.999999999.x": torch.ones(1)}, "num_hidden_layers"),
    ("experts", {"model.layers.0.mlp.experts.0.x": torch.ones(1)}, "a mixture of experts"),
    ("narrow", {MINIMIND: torch.ones(4, 64), MINIMIND.replace("q_p", "k_p"): torch.ones(1, 64)},
     "heads cannot share that out"),
    ("nothing", None, "no MiniMind language model, it lacks model.embed_tokens.weight"),
]


@pytest.mark.parametrize("name, spoil, words", VISION, ids=[case[0] for case in VISION])
def test_a_bad_vision_tower_is_refused_by_file(vision, name, spoil, words):
    refused(load_vision, vision, spoil, words)


@pytest.mark.parametrize("name, change, words", PTH, ids=[case[0] for case in PTH])
def test_a_bad_minimind_is_refused_by_file(tmp_path, name, change, words):
    from families import save_minimind
    held = save_minimind(tmp_path / "llm.pth", "2")
    torch.save({} if change is None else {**held, **change}, tmp_path / "llm.pth")
    refused(load_language, tmp_path, lambda directory: None, words)


def test_a_quantized_qwen_7b_is_refused_before_it_is_converted(tmp_path):
    from families import save_qwen
    save_qwen(tmp_path, quantization_config={"bits": 4, "quant_method": "gptq"})
    refused(load_language, tmp_path, lambda directory: None, r"quantization_config \(gptq\): weigh")
    assert not (tmp_path / "converted_model").exists()


def vocabulary(change):
    """tokenizer.json with its model changed."""
    def spoil(directory):
        file = directory / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return spoil


def tiktoken(content, beside="{}"):
    def spoil(directory):
        (directory / "tokenizer.json").unlink()
        (directory / "qwen.tiktoken").write_text(content)
        (directory / "config.json").write_text(beside)
    return spoil


TOKENIZERS = [
    ("no JSON", text("tokenizer.json", "{"), "tokenizer.json cannot be read"),
    ("an empty file", text("tokenizer.json", ""), "tokenizer.json cannot be read"),
    ("a list", text("tokenizer.json", "[]"), "tokenizer.json cannot be read"),
    ("an empty object", text("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    ("zeros", lambda d: (d / "tokenizer.json").write_bytes(bytes(99)), "tokenizer.json cannot be "),
    ("half", bytes_of(lambda b: b[:len(b) // 2], "tokenizer.json"), "tokenizer.json cannot be rea"),
    ("another kind", vocabulary(lambda c: c["model"].update(type="Word")), "tokenizer.json cannot"),
    ("no vocabulary", vocabulary(lambda c: c["model"].pop("vocab")), "tokenizer.json cannot be re"),
    ("an empty vocabulary", vocabulary(lambda c: (c["model"].update(vocab={}), c.update(
        added_tokens=[]))), "holds no token"),
    ("an id in words", vocabulary(lambda c: c["model"]["vocab"].update(a="x")), "cannot be read"),
    ("an id below 0", vocabulary(lambda c: c["model"]["vocab"].update(a=-1)), "cannot be read"),
    ("a merge of nobody", vocabulary(lambda c: c["model"].update(merges=[["xx", "yy"]])), "cannot"),
    ("no file", without("tokenizer.json"), "holds no tokenizer.json"),
    ("tiktoken of words", tiktoken("a b c"), "qwen.tiktoken:1: expected 'base64 rank'"),
    ("tiktoken beside no JSON", tiktoken("YQ== 0\n", "{"), "config.json is not JSON"),
]


@pytest.mark.parametrize("name, spoil, words", TOKENIZERS, ids=[case[0] for case in TOKENIZERS])
def test_a_bad_tokenizer_is_refused_by_file(language, name, spoil, words):
    refused(lambda path: Tokenizer.from_directory(resolve(path)), language, spoil, words)


def test_a_training_state_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "training_state.pt"
    torch.save({"optimizer": Order(os.mkdir, str(tmp_path / "ran"))}, path)
    with watched() as seen, pytest.raises(ValueError, match="training_state.pt holds more than"):
        load_plain(path)
    assert not seen.started and os.listdir(tmp_path) == ["training_state.pt"]
    state = {"step": 3, "groups": [{"lr": 0.1}], "moments": {0: torch.ones(2)}, "name": "x"}
    torch.save(state, path)
    assert str(load_plain(path)) == str(state)
