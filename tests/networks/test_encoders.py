"""Encoders of timm, with a small vision transformer whose weights are random."""

import pytest
import timm
import torch
from torch import nn

from hemera.errors import TrainingError
from hemera.networks import encoders, storage
from hemera.networks.generation import GenerationNet
from hemera.networks.segmentation import SegmentationNet
from tests.small_weights import SMALL_VIT, small_vit

NAME = SMALL_VIT["architecture"]


def encoder_of(frozen=False, config=SMALL_VIT, width=8):
    described = encoders.describe_timm(NAME, config, frozen=frozen)
    return encoders.TimmEncoder(**described, base_width=width)


def test_the_description_is_that_of_the_config_and_else_of_timm():
    described = encoders.describe_timm(NAME, SMALL_VIT, frozen=True)
    assert described == {
        "name": NAME, "arguments": SMALL_VIT["model_args"], "frozen": True,
        "mean": [0.7, 0.57, 0.7], "std": [0.21, 0.23, 0.18],
    }  # fmt: skip
    plain = encoders.describe_timm(NAME)
    assert (plain["mean"], plain["arguments"]) == ([0.5, 0.5, 0.5], {})
    assert encoders.describe_timm("convnext_atto")["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("vit_tiny_patch16", None, ["'vit_tiny_patch16'", "did you mean"]),
        ("resnet34", SMALL_VIT, [NAME, "set encoder: timm:"]),
        (NAME, {"model_args": {"depth": "x"}}, [NAME, "cannot be built", "model_args"]),
        (NAME, {"model_args": {"dpeth": 3}}, ["dpeth", "model_args"]),
    ],
)
def test_a_wrong_name_or_argument_is_an_error_with_a_remedy(name, config, words):
    with pytest.raises(TrainingError) as error:
        encoders.describe_timm(name, config)
    assert all(word in str(error.value) for word in words)


def test_the_maps_are_those_of_four_depths_at_the_nearest_multiple_of_the_patch():
    """64 x 96 px are 70 x 98 of patches of 14 px: 5 x 7 of them."""
    torch.manual_seed(1)
    encoder = encoder_of().eval()
    assert encoder.patch == 14
    assert encoder.indices == [1, 2, 4, 5], "of six blocks"
    image = torch.rand(2, 3, 64, 96)
    scaled = nn.functional.interpolate(image, (70, 98), mode="bilinear", antialias=True)
    tokens = []
    for number, block in enumerate(encoder.backbone.blocks):
        block.register_forward_hook(lambda _, __, out, number=number: tokens.append((number, out)))
    found = encoder(image)
    assert [tuple(each.shape[1:]) for each in found] == [
        (64, 32, 48), (8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3),
    ]  # fmt: skip
    # The tokens after the class token and two registers, normalised as those of the last block.
    outputs = dict(tokens)
    tokens.clear()
    encoder.backbone.forward_features(scaled)
    assert torch.allclose(outputs[5], dict(tokens)[5], atol=1e-5)
    patches = encoder.backbone.norm(outputs[2])[:, 3:].transpose(1, 2).reshape(2, 24, 5, 7)
    expected = nn.functional.interpolate(encoder.reduce[1](patches), (8, 12), mode="bilinear")
    assert torch.allclose(found[2], expected, atol=1e-5)


def test_a_convolutional_network_keeps_its_own_sizes():
    described = encoders.describe_timm("convnext_atto")
    encoder = encoders.TimmEncoder(**described, base_width=8).eval()
    assert (encoder.patch, encoder.indices) == (32, [0, 1, 2, 3])
    with torch.no_grad():
        found = encoder(torch.rand(1, 3, 64, 96))
    assert [tuple(each.shape[2:]) for each in found] == [(64 >> k, 96 >> k) for k in range(1, 6)]


def test_published_weights_of_another_size_and_with_a_classifier_fit():
    """Position embeddings of 8 x 8 patches, for a network of 4 x 4."""
    torch.manual_seed(2)
    arguments = SMALL_VIT["model_args"] | {"img_size": 112, "num_classes": 5}
    published = timm.create_model(NAME, **arguments)
    encoder = encoder_of()
    weights = encoders.published_weights(encoder.backbone, published.state_dict())
    assert not any(name.startswith("head") for name in weights)
    encoder.backbone.load_state_dict(weights)
    image = torch.rand(1, 3, 112, 112)
    same = small_vit(img_size=112)
    same.load_state_dict({k: v for k, v in published.state_dict().items() if "head" not in k})
    assert torch.equal(weights["blocks.3.attn.qkv.weight"], published.blocks[3].attn.qkv.weight)
    found, expected = (net.eval()(image) for net in (encoder.backbone, same))
    # The embeddings are interpolated to 4 x 4 and back.
    assert torch.cosine_similarity(found, expected).item() > 0.95


def test_a_frozen_network_gets_no_gradient_and_stays_in_evaluation_mode():
    for frozen in (True, False):
        torch.manual_seed(3)
        described = encoders.describe_timm(NAME, SMALL_VIT, frozen=frozen)
        net = SegmentationNet(GenerationNet("unet_128", 4), False, 8, encoder=described).train()
        assert net.encoder.backbone.training is not frozen
        net(torch.rand(1, 3, 128, 128)).sum().backward()
        learnt = net.encoder.backbone.blocks[0].attn.qkv.weight.grad
        assert (learnt is None) == frozen
        assert net.encoder.reduce[0][0].weight.grad is not None
        assert net.mean.flatten().tolist() == pytest.approx([0.7, 0.57, 0.7])


@pytest.mark.parametrize(
    ("name", "config", "millions"),
    [
        ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}, 1135),
        (
            "vit_giant_patch14_224",
            {
                "img_size": 224, "depth": 24, "num_heads": 24, "init_values": 1e-5,
                "embed_dim": 1536, "mlp_ratio": 5.33334, "no_embed_class": True, "reg_tokens": 8,
                "mlp_layer": "SwiGLUPacked", "act_layer": "silu",
            },
            681,
        ),
    ],
    ids=["H-optimus-0", "UNI2-h"],
)  # fmt: skip
def test_foundation_models_can_be_built(name, config, millions):
    """H-optimus-0 has 1.1 and UNI2-h .68 billion parameters."""
    with torch.device("meta"):
        encoder = encoders.TimmEncoder(
            **encoders.describe_timm(name, {"model_args": config}), base_width=8
        )
    count = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=1)
    assert encoder.patch == 14


def test_embeddings_that_timm_cannot_interpolate_are_an_error_with_a_remedy():
    """Those of 13 places, which form no square."""
    net, state = small_vit(), small_vit().state_dict()
    state["pos_embed"] = state["pos_embed"][:, :13]
    with pytest.raises(TrainingError, match=r"^its\.file: of another network \(.+\); name"):
        storage.load_published(net, state, "its.file")
