"""One codebook for both purposes (row (a) of Table 3): the semantic branch is the pixel branch."""

from dataclasses import replace

import pytest
import torch

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.training.tokenizer import build_tokenizer, set_trained
from tests import tiny

JOINED = replace(tiny.BRANCH, joined=True)


def joined(layer=2):
    torch.manual_seed(0)
    backbone = replace(tiny.BACKBONE, pixel_layer=layer, semantic_layer=layer)
    return build_tokenizer((backbone, None), tiny.BRANCH, JOINED, tiny.DECODER)


def test_codes_and_features_of_both_are_one_and_weights_are_stored_once(tmp_path):
    model, images = joined().eval(), tiny.images(2)
    codes = model.encode(images)
    assert torch.equal(codes.pixel, codes.semantic) and codes.pixel.data_ptr() != codes.semantic.data_ptr()
    out = model(images)
    assert torch.equal(out.pixel.features, out.semantic.features)
    assert not [name for name in model.state_dict() if name.startswith("semantic.")]
    model.save_pretrained(tmp_path)
    again = DualTokenVisionTokenizer.from_pretrained(tmp_path)
    assert again.semantic is again.pixel and torch.equal(again.encode(images).semantic, codes.semantic)


def test_both_objectives_reach_the_branch_and_commitment_counts_once():
    model, images = joined(), tiny.images(2)
    set_trained(model, ("backbone", "pixel", "semantic", "decoder"))
    out = model(images)
    assert float(out.semantic.commitment.detach()) == 0 < float(out.pixel.commitment.detach())
    assert int(model.pixel.quantizer.codebook.updates) == 1
    for loss in (out.images.square().mean(), out.pooled.square().mean()):
        (gradient,) = torch.autograd.grad(loss, model.pixel.pre.projection.weight, retain_graph=True)
        assert float(gradient.abs().sum()) > 0


def test_one_codebook_needs_one_layer():
    with pytest.raises(UserError, match="give both the same number"):
        build_tokenizer((tiny.BACKBONE, None), tiny.BRANCH, JOINED, tiny.DECODER)
