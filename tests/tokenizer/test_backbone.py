import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig, map_transformers_keys

SIGLIP = "vit_base_patch16_siglip_256"
TINY = {"embed_dim": 32, "depth": 5, "num_heads": 4, "patch_size": 8, "img_size": 32, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_taps_equal_transformers_hidden_states(images):
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="gelu_pytorch_tanh",
    )
    reference = SiglipVisionModel(config).eval()
    backbone = Backbone(BackboneConfig(SIGLIP, {**TINY, "act_layer": "gelu_tanh"})).eval()
    backbone.vit.load_state_dict(map_transformers_keys(reference.state_dict(), 5), strict=True)
    with torch.no_grad():
        expected = reference(images, output_hidden_states=True)
        for layer, features in enumerate(backbone.taps(images, tuple(range(6)))):
            torch.testing.assert_close(features, expected.hidden_states[layer], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(backbone(images), expected.pooler_output, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "overrides", "stem"),
    [
        (SIGLIP, TINY, ()),
        (SIGLIP, TINY, (8, 16, 32)),
        ("vit_base_patch16_clip_224", TINY, ()),
        ("eva02_large_patch14_clip_224", {**TINY, "mlp_ratio": 2.0}, ()),
    ],
)
def test_leaving_and_entering_again_equals_the_plain_pass(name, overrides, stem, images):
    torch.manual_seed(1)
    backbone = Backbone(BackboneConfig(name, overrides, stem)).eval()
    with torch.no_grad():
        plain = backbone(images)
        assert torch.equal(plain, backbone.vit(images))
        assert backbone.pixel_layer == 1 and backbone.semantic_layer == 4
        for layer in range(6):
            (features,) = backbone.taps(images, (layer,))
            assert torch.equal(backbone.pool(features, layer), plain)
    assert features.shape == (2, backbone.prefix + 16, 32)


def test_colors_are_changed_once_in_every_pass(images):
    torch.manual_seed(1)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    backbone = Backbone(BackboneConfig(SIGLIP, TINY, projection=24, mean=mean, std=std)).eval()
    wanted = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        (features,) = backbone.taps(images, (5,))
        assert torch.equal(backbone.pool(features, 5), backbone(images)) and backbone(images).shape == (2, 24)
        torch.testing.assert_close(backbone(images), backbone.vit(wanted), atol=1e-5, rtol=1e-4)


def test_stem_builds_without_data_on_the_meta_device():
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(SIGLIP, TINY, (8, 16, 32)))
    assert backbone.grid == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BackboneConfig("vit_base_patch16_siglop"), "not a timm model"),
        (BackboneConfig("resnet18"), "not a vision transformer"),
        (BackboneConfig(SIGLIP, TINY, semantic_layer=9), "semantic_layer=9"),
        (BackboneConfig(SIGLIP, TINY, (8, 16)), "last width of stem, 16"),
        (BackboneConfig(SIGLIP, TINY, mean=(0.5, 0.5, 0.5)), "give both or none"),
    ],
)
def test_mistakes_are_named(config, words):
    with pytest.raises(UserError, match=words):
        Backbone(config)


def test_wrong_image_side_is_named(images):
    backbone = Backbone(BackboneConfig(SIGLIP, TINY))
    with pytest.raises(UserError, match="16 x 16 given to a backbone of 32 x 32"):
        backbone.taps(images[..., :16, :16], (1,))


def test_unknown_siglip_key_is_named():
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    state = SiglipVisionModel(config).state_dict() | {"surprise": torch.zeros(1)}
    with pytest.raises(UserError, match="surprise"):
        map_transformers_keys(state, 1)
