"""What networks are said to cost, against the same networks with memory, and against papers."""

import re

import pytest
import torch

from src.evaluation.cost import cost
from src.models.dropout import Dropout, give_keys
from src.runs import build_net
from src.training.summary import flops_per_image

UNET = {"_target_": "src.models.unet.UNet", "channels": 1, "image_size": 8, "base_channels": 16, "num_heads": 2}
UNET |= {"channel_mults": [1, 2], "num_res_blocks": 1, "attention_resolutions": [4, 8], "dropout": 0.1}
DIT = {"_target_": "src.models.dit.DiT", "channels": 1, "image_size": 8, "hidden_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("node", [UNET, {**UNET, "num_classes": 3, "gradient_checkpointing": True}, DIT])
def test_a_cost_is_that_of_a_real_step(monkeypatch, node):
    """Parameters, operations, and the bytes that autograd keeps of torch's operations on this machine, all exact."""
    monkeypatch.setattr("src.models.kernel.library", lambda: None)
    found = cost(node, (1, 8, 8), batch_size=3)
    net = build_net({"model": node})
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.flops_per_image == flops_per_image(net, (1, 8, 8), torch.device("cpu"))
    give_keys([m for m in net.modules() if isinstance(m, Dropout)], torch.zeros(3, dtype=torch.int32))
    kept = {}

    def keep(v):
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage()
        return v

    labels = () if node.get("num_classes") is None else (torch.zeros(3, dtype=torch.int64),)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        out = net.train()(torch.zeros(3, 1, 8, 8), torch.zeros(3), *labels)
    weights = {v.untyped_storage().data_ptr() for v in (*net.parameters(), *net.buffers())}
    assert found.activation_bytes == sum(s.nbytes() for at, s in kept.items() if at not in weights)
    assert out.requires_grad


def test_the_largest_dit_costs_what_its_paper_says():
    """Peebles & Xie 2023, Table 4: 118.6 Gflops, a multiply-add counted as one; no memory is needed to say so."""
    xl = {"hidden_dim": 1152, "depth": 28, "num_heads": 16, "num_classes": 1000, "learned_variance": True}
    found = cost({**DIT, **xl, "channels": 4, "image_size": 32}, (4, 32, 32), batch_size=256)
    assert found.flops_per_image / 2e9 == pytest.approx(118.6, abs=0.1)
    assert found.activation_bytes > 100 * 2**30


def test_preview_says_what_the_network_costs(command, tmp_path):
    """Ho et al.'s network on 8x8 digits of one channel, where no level is 16 high and none but the middle attends."""
    outcome = command("preview", "model=unet_ho", f"out={tmp_path}/out", "num_images=1")
    assert outcome.code == 0, outcome.err
    assert "Network: UNet, 34,423,297 parameters, " in outcome.out
    assert "a training step of 128 images keeps " in outcome.out
    said = re.search(r"At the ([\d.,e+]+) images/s .* has just made, 1,000 steps of 128 images take (\d+)", outcome.out)
    assert float(said[1].replace(",", "")) > 0
    outcome = command("preview", "model=unet_ho", "model.num_heads=3", f"out={tmp_path}/refused")
    assert (outcome.code, outcome.out) == (2, "")
    assert "num_heads=3 does not divide" in outcome.err
