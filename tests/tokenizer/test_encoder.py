import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.encoder import ImageTextEncoder, load_text_tokenizer, tokenize, train_text_tokenizer
from dualtoken.tokenizer.initial import load_backbone
from tests import tiny


def test_embeddings_are_unit_vectors_and_come_back_from_disk(tmp_path):
    model, ids = tiny.encoder(), torch.randint(3, 100, (5, 16))
    with torch.no_grad():
        image, text = model.embed_image(tiny.images(3)), model.embed_text(ids)
        assert torch.allclose(image.norm(dim=-1), torch.ones(3)) and torch.allclose(text.norm(dim=-1), torch.ones(5))
        model.save_pretrained(tmp_path)
        again = ImageTextEncoder.from_pretrained(tmp_path)
        assert torch.equal(again(tiny.images(3), ids), model(tiny.images(3), ids))


def test_text_tokenizer_pads_cuts_and_is_lower_case(tmp_path):
    made = train_text_tokenizer(["a red star on a white background", "a blue ring"] * 3, tiny.TEXT)
    made.save_pretrained(tmp_path)
    found = load_text_tokenizer(tmp_path)
    ids = tokenize(found, ["a red star", "A RED star", "a blue ring " * 30, "ünseen ✓"])
    assert ids.shape == (4, 16) and torch.equal(ids[0], ids[1])
    assert int(ids.max()) < tiny.TEXT.vocab_size and (ids[0] == 0).any() and (ids[2] != 0).all()
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        load_text_tokenizer(tmp_path / "other")


def test_backbone_starts_from_an_encoder(tmp_path):
    model = tiny.encoder()
    model.save_pretrained(tmp_path)
    shape, state = load_backbone(str(tmp_path), BackboneConfig("", pixel_layer=2))
    assert shape.pixel_layer == 2 and shape.overrides == tiny.OVERRIDES
    backbone = Backbone(shape).eval()
    backbone.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(backbone(tiny.images()), model.backbone(tiny.images()))
    assert load_backbone("mini", BackboneConfig(""))[0].semantic_layer == 5


def test_an_encoder_of_another_shape_than_the_recipe_names_what_would_fit(tmp_path):
    tiny.encoder().save_pretrained(tmp_path)
    same, state = load_backbone(str(tmp_path), tiny.BACKBONE)
    assert same.name == tiny.BACKBONE.name and state is not None
    words = r"vit.pos_embed is \[1, 4, 32\] in the file, \[1, 256, 1024\] in the model \(--backbone.name vit_large.*\)$"
    with pytest.raises(UserError, match=words):
        load_backbone(str(tmp_path), BackboneConfig("vit_large_patch16_siglip_256"))
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 32}
    SiglipVisionModel(SiglipVisionConfig(image_size=256, patch_size=16, **sizes)).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"; --config siglip2-b-256 would fit"):
        load_backbone(str(tmp_path / "base"), BackboneConfig("vit_large_patch16_siglip_256"))


def test_other_models_are_refused(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'dualtoken-tokenizer' model"):
        load_backbone(str(tmp_path), tiny.BACKBONE)
