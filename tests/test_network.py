"""A network wherever it lives: what it is run with follows the model's device, and what is trained is what is kept."""

import pytest
import torch

from remap.backbones.build import build
from remap.errors import BackboneError
from remap.network import Network, Runner, frozen, tuned
from remap.remapping.signals import Needs


def _network(method: str = "vpt_deep", **options: object) -> Network:
    return tuned(build("mini_student", "none", 3), method, options)


def test_a_runner_follows_its_model_to_another_device() -> None:
    """The meta device stands in for a GPU: mixing devices fails on it just as it does there."""
    network = _network()
    network.model.to("meta")
    images = torch.zeros(2, 3, 40, 40, dtype=torch.uint8, device="meta")
    signals = Runner(network, Needs(pooled=True, attention=frozenset({3})))(images)
    assert signals.logits_BC.shape == (2, 3) and signals.logits_BC.device.type == "meta"
    assert signals.pooled_BD.shape == (2, 128)
    assert signals.attention[3].q_BHSh.shape == (2, 2, 65, 64)


def test_what_is_trained_is_the_method_and_the_head() -> None:
    """Counts by hand: 4 blocks x 10 prompts x width 128; head 128 x 3 weights and 3 biases."""
    network = _network()
    assert network.num_trainable == 4 * 10 * 128 + 128 * 3 + 3
    trained = {name for name, p in network.model.named_parameters() if p.requires_grad}
    assert trained == set(network.trained)


def test_a_run_keeps_no_second_copy_of_a_fully_tuned_backbone() -> None:
    network = _network("full")
    with pytest.raises(BackboneError, match="were dropped"):
        network.attached.detach()


def test_a_frozen_network_stays_in_eval_whoever_calls_train() -> None:
    network = frozen(_network("linear"))
    assert network.model.train() is network.model
    assert not any(module.training for module in network.model.modules())
    assert not any(p.requires_grad for p in network.model.parameters())
