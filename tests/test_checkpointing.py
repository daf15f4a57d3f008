"""Claims: recomputed blocks change no gradient, and keep less for the backward pass."""

import pytest
import torch
from families import tiny_vlm
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import train_sft
from model.lora import add_lora
from tests.tiny import curve, make_world
from training.optim import set_requires_grad
from training.precision import autocast, cast_weights

CPU = torch.device("cpu")


def batch(rows=3, answers=9):
    """ids, labels (rows, 21 tokens), pixels: an image of 9 tokens each, the rest text."""
    torch.manual_seed(1)
    ids = torch.randint(0, 60, (rows, 21))
    ids[:, 2:11] = 60
    labels = torch.full_like(ids, -100)
    labels[:, -answers:] = torch.randint(0, 60, (rows, answers))
    return ids, labels, torch.randn(rows, 3, 48, 48)


def trained(how: str, **facts):
    """A tiny model that learns as `how` says."""
    vlm = tiny_vlm(**facts).train()
    if how == "lora":
        add_lora(vlm.language, ["q_proj", "v_proj", "down_proj"], rank=2, alpha=4, dropout=0.3)
        for name, p in vlm.named_parameters():  # B begins at zero, and A would learn nothing yet
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.1)
    # Frozen inputs: below the adapters nothing is trained, not even the projector.
    set_requires_grad(vlm, projector=how != "lora", vision=how == "all",
                  language={"projector": "none"}.get(how, how))
    return vlm


def learn(vlm, dtype="fp32", seed=5):
    """-> loss, {name: gradient}, bytes that autograd kept for the backward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast_weights(vlm, dtype, set())
    parameters = {p.untyped_storage().data_ptr() for p in vlm.parameters()}
    inputs = batch()
    torch.manual_seed(seed)
    held = []  # so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or keep(t), lambda t: t):
        with autocast(dtype, CPU):
            loss, _ = vlm(*inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in vlm.named_parameters() if p.requires_grad}
    return loss.item(), gradients, sum(kept[place] for place in kept.keys() - parameters)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("how", ["projector", "lora", "all", "last:1"])
def test_checkpointing_changes_no_gradient(how, dtype):
    """The adapters' dropout draws the same noise in the second computation, or this would fail."""
    plain, checkpointed = trained(how), trained(how)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.set_checkpointing(True)
    loss, gradients, _ = learn(plain, dtype)
    again, recomputed, _ = learn(checkpointed, dtype)
    assert loss == again
    assert gradients.keys() == recomputed.keys() and gradients
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.norm() > 0, f"{name} learns nothing"
        assert torch.equal(gradient, recomputed[name]), name


def test_dropout_is_drawn_anew_in_each_step():
    vlm = trained("lora")
    vlm.set_checkpointing(True)
    assert learn(vlm, seed=5)[0] != learn(vlm, seed=6)[0]


class Kept(TorchDispatchMode):
    """Counts what blocks keep. torch.utils.checkpoint hides what it keeps from other hooks, so the
    tensors are counted that are alive after the forward pass; the model's own left out."""

    def __init__(self, model):
        super().__init__()
        self.made = []
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def alive(self) -> int:
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


def kept_bytes(how, checkpointing, layers):
    vlm = trained(how)
    vlm.set_checkpointing(checkpointing)
    vlm.language.layers = vlm.language.layers[:layers]
    vlm.vision.layers = vlm.vision.layers[:layers]
    with Kept(vlm) as count:
        loss, _ = vlm(*batch())
    return count.alive(), loss  # the loss holds the graph alive until here


@pytest.mark.parametrize("how, at_most", [("projector", 0.2), ("lora", 0.2), ("all", 0.25)])
def test_a_block_keeps_its_input_alone(how, at_most):
    """What one more block costs, with checkpointing and without."""
    plain = kept_bytes(how, False, 3)[0] - kept_bytes(how, False, 2)[0]
    recomputed = kept_bytes(how, True, 3)[0] - kept_bytes(how, True, 2)[0]
    inputs = 3 * 21 * 36 * 4 + (3 * 9 * 36 * 4 if how == "all" else 0)  # (B,T,D), (N,P,Dv)
    print(f"{how}: a block keeps {plain:,} bytes, {recomputed:,} with checkpointing")
    assert recomputed == inputs
    assert recomputed < at_most * plain


def test_saved_tensors_fall():
    """Autograd itself is asked: its hooks see what every operation outside of blocks keeps."""
    plain, checkpointed = trained("all"), trained("all")
    checkpointed.set_checkpointing(True)
    _, _, before = learn(plain)
    _, _, after = learn(checkpointed)
    print(f"kept for the backward pass: {before:,} bytes, {after:,} with checkpointing")
    assert after < before / 3


@pytest.mark.parametrize("flags", [["--lora", "--lora_dropout", "0.3"],
                                   ["--train_language", "all", "--train_vision"]])
def test_a_run_with_checkpointing_is_the_same_run(tmp_path, flags):
    world = make_world(tmp_path / "world")
    for name, more in (("plain", []), ("less", ["--gradient_checkpointing"])):
        train_sft.main([*world, *flags, "--model", "none", "--steps", "3", *more,
                        "--out", str(tmp_path / name)])
    assert curve(tmp_path / "plain") == curve(tmp_path / "less")
