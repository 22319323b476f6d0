"""Gates on frozen blocks. Sources: closed forms of the price and of its descent, the network without its hooks, and
timm opening what is left."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import build
from remap.errors import BackboneError, RunError
from remap.remapping.architecture.skip import gates_of, save_remaining
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Make = Callable[..., nn.Module]


def attached_to(model: nn.Module, method: str = "skip", **options: object) -> Attached:
    return attach_method(model, anatomy_of(model), method, options)


def set_gates(attached: Attached, *values: float) -> None:
    gates = [p for name, p in attached.model.named_parameters() if name.endswith(".gate")]
    with torch.no_grad():
        for gate, value in zip(gates, values, strict=True):
            gate.fill_(value)


def price(gates: list[float], work: list[float]) -> float:
    """(sum c g)^2 / sum c g^2 with c the shares of ``work``, in Python floats."""
    shares = [one / sum(work) for one in work]
    whole = sum(c * g for c, g in zip(shares, gates, strict=True))
    return whole**2 / sum(c * g * g for c, g in zip(shares, gates, strict=True))


@pytest.mark.parametrize("name", ["plain", "eva", "beit", "swin"])
def test_the_price_is_shared_out_by_multiply_adds(make: Make, name: str) -> None:
    """Weights of the blocks' layers times the positions they work on; by names of timm's layers, not the anatomy's."""
    model = make(name)
    attached = attached_to(model, cost=0.3)
    blocks = [module for _, module in model.named_modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    work = []
    for block in blocks:
        weights = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
        positions = block.input_resolution[0] * block.input_resolution[1] if name == "swin" else 16
        work.append(weights * positions)
    assert attached.penalty().item() == pytest.approx(0.3)
    values = [0.1 * (index + 1) for index in range(len(blocks))]
    set_gates(attached, *values)
    expected = 0.3 * price(values, work)
    assert attached.penalty().item() == pytest.approx(expected, rel=1e-5)
    set_gates(attached, *(7.0 * value for value in values))
    assert attached.penalty().item() == pytest.approx(expected, rel=1e-5), "a common factor is no saving"
    set_gates(attached, *[0.0] * len(values))
    assert attached.penalty().item() == 0.0


def test_one_gate_a_branch_knows_attention_from_mlp(make: Make) -> None:
    """Width 32, hidden 64: 4 D^2 weights of attention, 2 D F of the MLP, so equal shares; with F = 32 two to one."""
    for ratio, share in ((2.0, 1 / 8), (1.0, 1 / 6)):
        attached = attached_to(make("plain", mlp_ratio=ratio), gates="branch", cost=1.0)
        assert len(attached.trainable) == 8
        set_gates(attached, 1.0, *[0.0] * 7)
        assert attached.penalty().item() == pytest.approx(share)
        assert gates_of(attached).openness() == [1.0, 0.0, 0.0, 0.0]


def test_a_block_without_effect_closes_by_its_price_and_stays_at_zero(make: Make, images: Tensor) -> None:
    """Gradient descent on one gate that the loss does not see, the three others at 1; the slope of the price by a
    central difference of the formula in Python floats."""
    model = make("plain")
    with torch.no_grad():
        for linear in (model.blocks[2].attn.proj, model.blocks[2].mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    attached = attached_to(model, cost=2.0)
    set_gates(attached, 1.0, 1.0, 0.8, 1.0)
    gate = model.blocks[2].remap_skip.gate
    stepper = torch.optim.SGD([gate], lr=0.5)
    expected, work, step_size = 0.8, [1.0] * 4, 1e-5
    for step in range(20):
        stepper.zero_grad()
        loss = nn.functional.cross_entropy(model(images), torch.arange(6) % 5)
        (loss + attached.penalty()).backward()
        stepper.step()
        attached.after_step(step, 20)
        above, below = (2.0 * price([1.0, 1.0, expected + sign * step_size, 1.0], work) for sign in (1, -1))
        expected = max(0.0, expected - 0.5 * (above - below) / (2 * step_size))
        assert gate.item() == pytest.approx(expected, abs=1e-4)
    assert gate.item() == 0.0


@pytest.mark.parametrize("name", ["plain", "registers", "siglip", "eva", "dinov3", "beit"])
@torch.no_grad()
def test_what_remains_is_a_smaller_model_of_timm_with_the_same_logits(
    make: Make, images: Tensor, name: str, tmp_path: Path
) -> None:
    model = make(name, **({"num_classes": 5}))
    attached = attached_to(model)
    set_gates(attached, 0.7, 0.0, 1.3, 0.0)
    expected = model(images)
    classes = ("a", "b", "c", "d", "e")
    assert save_remaining(attached, tmp_path / "out", classes=classes) == [0, 2]
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert len(again.blocks) == 2 and not [key for key in again.state_dict() if "remap" in key]
    assert torch.allclose(again(images), expected, rtol=1e-5, atol=1e-5)
    assert tuple(again.pretrained_cfg["label_names"]) == classes


@torch.no_grad()
def test_with_lora_both_are_folded_and_a_small_gate_goes_by_the_threshold(
    make: Make, images: Tensor, tmp_path: Path
) -> None:
    model = make("plain")
    attached = attached_to(model, "skip+lora", lora={"rank": 2})
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    set_gates(attached, 0.5, 0.04, 0.9, 1.0)
    model.blocks[1].remap_skip.gate.zero_()
    expected = model(images)
    model.blocks[1].remap_skip.gate.fill_(0.04)
    assert save_remaining(attached, tmp_path / "out", threshold=0.05) == [0, 2, 3]
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.allclose(again(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_embedded_pair_is_written_as_a_model_of_timm(images: Tensor, tmp_path: Path) -> None:
    """timm does not know its name, so every argument of the shape is written, also where no block goes."""
    mini = build("mini_student", "pretrained", 5)
    attached = attach_method(mini.model, mini.anatomy, "skip", {})
    set_gates(attached, 0.5, 1.0, 0.8, 0.9)
    expected = mini.model.eval()(images)
    assert save_remaining(attached, tmp_path / "out") == [0, 1, 2, 3]
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.allclose(again(images), expected, rtol=1e-5, atol=1e-5)
    assert again.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"


@torch.no_grad()
def test_hierarchies_keep_their_blocks(make: Make, images: Tensor, tmp_path: Path) -> None:
    """Their gates fold, but their blocks are in stages that timm's constructor counts by itself."""
    model = make("swin", depths=(1, 1), num_heads=(1, 2), embed_dim=16)
    attached = attached_to(model)
    set_gates(attached, 0.5, 0.0)
    with pytest.raises(BackboneError, match="family 'swin'"):
        save_remaining(attached, tmp_path / "out")
    set_gates(attached, 0.5, 0.2)
    expected = model(images)
    assert save_remaining(attached, tmp_path / "out") == [0, 1]
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.allclose(again(images), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_taken_out_is_said(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no gates"):
        save_remaining(attached_to(make("plain"), "lora"), tmp_path / "out")
    closed = attached_to(make("plain"))
    set_gates(closed, 0.0, 0.01, 0.02, 0.0)
    with pytest.raises(BackboneError, match="every block"):
        save_remaining(closed, tmp_path / "out")
    with pytest.raises(BackboneError, match="adaptformer cannot be folded"):
        save_remaining(attached_to(make("plain"), "skip+adaptformer"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="there already"):
        save_remaining(attached_to(make("plain")), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_squeeze_and_excitation_is_gated_but_not_folded() -> None:
    """Its scale depends on what it scales, so a gate in the norm before it would be another function."""
    plain, excited = (timm.create_model(name, num_classes=5) for name in ("resnet18", "seresnet18"))
    assert attached_to(plain).mergeable and not attached_to(excited).mergeable
