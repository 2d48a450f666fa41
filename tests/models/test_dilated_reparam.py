"""The Dilated Reparam Block against its definition, and what is merged against what it was merged from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.layers.dilated_reparam import BRANCHES, DilatedReparamBlock, fuse_conv_bn

SIZES = sorted(BRANCHES)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module with numbers that keep activations of order one and every normalisation non-trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(1 + 0.2 * noise.abs() if name.endswith("var") else 0.3 * noise)
    return module


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_fused_conv_and_norm(bias: bool, affine: bool) -> None:
    conv = randomised(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias).double())
    bn = randomised(nn.BatchNorm2d(6, affine=affine).double(), seed=3).eval()
    x = normal(2, 4, 5, 6)
    weight, shift = fuse_conv_bn(conv.weight, conv.bias, bn)
    torch.testing.assert_close(F.conv2d(x, weight, shift, 1, 1, 1, 2), bn(conv(x)), rtol=0, atol=1e-12)


def test_fusing_is_exact_in_half_precision() -> None:
    bn = randomised(nn.BatchNorm2d(2)).half().eval()
    weight, bias = fuse_conv_bn(normal(2, 1, 3, 3, dtype=torch.float16), None, bn)
    assert weight.dtype == bias.dtype == torch.float64


def test_fusing_needs_running_statistics() -> None:
    with pytest.raises(ValueError, match="track_running_stats=True"):
        fuse_conv_bn(normal(2, 1, 3, 3), None, nn.BatchNorm2d(2, track_running_stats=False))


# ---- the Dilated Reparam Block -----------------------------------------------------------------------------


def textbook_block(block: DilatedReparamBlock, x: Tensor) -> Tensor:
    """The definition: every convolution, its normalisation, the sum."""
    total = block["origin_bn"](
        F.conv2d(x, block["lk_origin"].weight, padding=block.kernel_size // 2, groups=x.shape[1])
    )
    for k, r in BRANCHES[block.kernel_size]:
        conv = block[f"dil_conv_k{k}_{r}"]
        y = F.conv2d(x, conv.weight, padding=r * (k // 2), dilation=r, groups=x.shape[1])
        total = total + block[f"dil_bn_k{k}_{r}"](y)
    return total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(2, 3), (19, 18)])
def test_merged_block_equals_its_branches(size: int, shape: tuple[int, int]) -> None:
    block = randomised(DilatedReparamBlock(4, size).double()).eval()
    x = normal(2, 4, *shape)
    expected = textbook_block(block, x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
    block.reparameterize()
    assert sorted(block.state_dict()) == ["lk_origin.bias", "lk_origin.weight"]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)
    weight = block["lk_origin"].weight
    block.reparameterize()
    assert block["lk_origin"].weight is weight
    built = DilatedReparamBlock(4, size, deploy=True).double()
    built.load_state_dict(block.state_dict())
    torch.testing.assert_close(built(x), expected, rtol=0, atol=1e-11)


def test_merging_keeps_type_training_flag_and_freezing() -> None:
    block = randomised(DilatedReparamBlock(4, 7).bfloat16()).train()
    block["lk_origin"].weight.requires_grad_(False)
    block.reparameterize()
    conv = block["lk_origin"]
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad
    assert block.training


def test_unknown_kernel_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"kernel_size 19 has no set of dilated branches; choose one of \[5, 7, 9"):
        DilatedReparamBlock(4, 19)


def test_block_scripts_and_traces_in_both_forms() -> None:
    block = randomised(DilatedReparamBlock(2, 9).double()).eval()
    x = normal(1, 2, 12, 5)
    expected = block(x)
    for _ in range(2):
        for program in (torch.jit.script(block), torch.fx.symbolic_trace(block)):
            torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-11)
        block.reparameterize()
