"""Probes against published outputs and against what a segmentation probe must be able to do."""

import pytest
import torch

from kinema.models.flowfeat.probe import AttentionProbe, CrossAttentionProbe


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("downscale", [1, 2])
@torch.no_grad()
def test_logits_equal_the_published_probe(with_norm, downscale, golden, manifest, fill, assert_state_matches):
    expected = manifest("flowfeat_probe_q5_norm" if with_norm else "flowfeat_probe_q5")
    probe = CrossAttentionProbe(**expected["constructor"], downscale=downscale).eval()
    assert_state_matches(probe, expected)
    fill.fill_(probe, 0, expected)
    logits = probe(fill.normal(0, "x", 2, 128, 12, 16))
    golden("flowfeat_probe__s0").check(f"norm{int(with_norm)}_down{downscale}", logits, atol=0.0, rtol=1e-5)


def test_probe_learns_to_segment_separable_features():
    torch.manual_seed(0)
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, 4:12, 4:12] = 1
    directions = torch.randn(2, 16)
    y_dec = directions[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(1, 16, 16, 16)
    y_enc = torch.randn(1, 8, 4, 4)
    probe = AttentionProbe(8, 16, num_classes=2, with_norm=True)
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(probe(y_enc, y_dec), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (probe(y_enc, y_dec).argmax(dim=1) == labels).float().mean() > 0.98


def test_both_maps_count():
    torch.manual_seed(0)
    probe = AttentionProbe(8, 16, num_classes=3)
    y_enc, y_dec = torch.randn(2, 8, 3, 5), torch.randn(2, 16, 12, 20)
    logits = probe(y_enc, y_dec)
    assert logits.shape == (2, 3, 12, 20)
    assert not torch.allclose(logits, probe(-y_enc, y_dec))
    assert not torch.allclose(logits, probe(y_enc, -y_dec))


def test_map_smaller_than_the_downscale():
    with pytest.raises(ValueError, match="3x8.*downscale=4"):
        CrossAttentionProbe(16, 2, downscale=4)(torch.randn(1, 16, 3, 8))


def test_width_that_heads_cannot_share():
    with pytest.raises(ValueError, match="width=20.*num_heads=8"):
        CrossAttentionProbe(20, 2)
