import pytest
import torch
from safetensors.torch import load_file

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.convert import decoder_name
from dualtoken.tokenizer.decoder import Decoder, DecoderConfig
from tests.tokenizer.reference import FIXTURE, stored_state

TINY = DecoderConfig(channels=8, multipliers=(1, 2, 2), blocks=1, z_channels=16)


def test_equals_the_reference():
    io = load_file(FIXTURE / "infer.safetensors")
    features, expected = io["post_quant_conv_in"], io["recon"]
    stored = {k: v for k, v in stored_state().items() if k.startswith(("decoder.", "post_quant_conv."))}
    decoder = Decoder(64, 8, DecoderConfig(channels=32, multipliers=(1, 1, 2, 2), blocks=3, z_channels=32)).eval()
    decoder.load_state_dict({decoder_name(k, 4): v for k, v in stored.items()}, strict=True)
    with torch.no_grad():
        images = decoder(features.flatten(2).transpose(1, 2))
    assert images.shape == (2, 3, 64, 64) and decoder.image_size == 64
    assert (images - expected).abs().max() < 5e-5  # 8.8e-6 was seen


def test_grid_is_resampled_to_the_latent_size():
    torch.manual_seed(0)
    config = DecoderConfig(**{**vars(TINY), "latent_size": 8})
    decoder = Decoder(16, 9, config)
    assert decoder(torch.randn(1, 81, 16)).shape == (1, 3, 32, 32) and decoder.image_size == 32


def test_every_parameter_learns():
    torch.manual_seed(0)
    decoder = Decoder(16, 4, TINY)
    decoder(torch.randn(2, 16, 16)).square().mean().backward()
    dead = [n for n, p in decoder.named_parameters() if p.grad is None]
    assert not dead and decoder.last_layer.grad.abs().sum() > 0


def test_mistakes_are_named():
    with pytest.raises(UserError, match="given 15 positions, its grid is 4 x 4"):
        Decoder(16, 4, TINY)(torch.randn(1, 15, 16))
    with pytest.raises(UserError, match="decoder width 40 must be a multiple of 32"):
        Decoder(16, 4, DecoderConfig(channels=40, multipliers=(1, 1), z_channels=16))
