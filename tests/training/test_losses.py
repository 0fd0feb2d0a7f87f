import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchmetrics.functional.image.lpips import _LPIPS

from dualtoken.core.errors import UserError
from dualtoken.training.discriminator import Discriminator, DiscriminatorConfig, adaptive_weight, hinge_loss
from dualtoken.training.losses import LossConfig, discriminator_loss, distance, generator_losses
from dualtoken.training.perceptual import LPIPS, TeacherPerceptual, build_perceptual
from tests import tiny


def losses(config, model=None, perceptual=None, judge=None):
    model = (model or tiny.tokenizer()).train()
    images = tiny.images()
    with torch.no_grad():
        (features,) = model.backbone.taps(images, (model.backbone.semantic_layer,))
        pooled = model.pool(features)
    out = model(images)
    return generator_losses(out, images, features, pooled, config, perceptual, judge, model.decoder.last_layer), out


def test_distance_of_equation_4():
    x = torch.randn(2, 5, 8)
    assert torch.allclose(distance(x, x), torch.tensor(-1.0), atol=1e-6)
    assert torch.allclose(distance(2 * x, x), x.square().mean() - 1, atol=1e-5)


def test_total_is_the_weighted_sum_of_the_named_parts():
    config = LossConfig(mse=2, perceptual=0.5, adversarial=0, features=3, pooled=0.7, commitment=1.1)
    model = tiny.tokenizer()
    found, out = losses(config, model, TeacherPerceptual(model.backbone))
    p = found.parts
    assert set(p) == {"mse", "teacher_perceptual", "features", "pooled", "pixel_commitment", "semantic_commitment"}
    wanted = 2 * p["mse"] + 0.5 * p["teacher_perceptual"] + 3 * p["features"] + 0.7 * p["pooled"]
    wanted = wanted + 1.1 * (p["pixel_commitment"] + p["semantic_commitment"])
    assert torch.allclose(found.total, wanted)
    assert torch.allclose(p["mse"], F.mse_loss(out.images, tiny.images()))


def test_every_parameter_of_the_tokenizer_learns():
    model = tiny.tokenizer()
    found, _ = losses(LossConfig(), model, TeacherPerceptual(tiny.tokenizer(seed=1).backbone))
    found.total.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_adaptive_weight_is_the_ratio_of_gradient_norms_within_its_limits():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    assert torch.allclose(adaptive_weight((3 * weight).sum(), weight.sum(), weight), torch.tensor(3.0), atol=1e-4)
    assert adaptive_weight((99 * weight).sum(), weight.sum(), weight) == 10
    assert torch.allclose(adaptive_weight(weight.sum(), (99 * weight).sum(), weight), torch.tensor(0.3))


def test_hinge_loss_and_a_discriminator_that_learns_to_tell():
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-2.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    torch.manual_seed(0)
    judge = Discriminator(DiscriminatorConfig(channels=8, layers=2))
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    real, fake = tiny.images(8), tiny.images(8, seed=1) * 0.3
    first = float(discriminator_loss(judge, real, fake).detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss = discriminator_loss(judge, real, fake)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first


def test_adversarial_part_moves_the_tokenizer_but_not_the_judge():
    model = tiny.tokenizer()
    judge = Discriminator(DiscriminatorConfig(channels=8, layers=2)).requires_grad_(False)
    found, _ = losses(LossConfig(adversarial=0.75), model, None, judge)
    found.total.backward()
    assert "adversarial" in found.parts and all(p.grad is None for p in judge.parameters())


def test_teacher_perceptual_is_zero_for_equal_images_and_pulls_them_together():
    part = TeacherPerceptual(tiny.tokenizer().backbone.requires_grad_(False))
    target = tiny.images()
    images = tiny.images(seed=1).requires_grad_()
    first = part(images, target)
    first.backward()
    assert part(target, target) == 0 and part.name == "teacher_perceptual"
    assert part(images - images.grad, target) < first
    assert isinstance(build_perceptual(part.backbone, "vgg", None), TeacherPerceptual)


def test_lpips_with_weights_in_torchvision_format(tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alex.pth")
    ours = LPIPS("alex", tmp_path / "alex.pth")
    theirs = _LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    stored = torch.load(tmp_path / "alex.pth", weights_only=True)
    for name, value in theirs.net.named_parameters():
        value.data.copy_(stored[f"features.{name.split('.', 1)[1]}"])
    a, b = tiny.images(2, 64), tiny.images(2, 64, seed=1)
    assert torch.allclose(ours(a, b), theirs(a, b).mean()) and ours(a, b) > 0 and ours(a, a) == 0


def test_wrong_lpips_weights_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file; it is published as torchvision's"):
        LPIPS("vgg", tmp_path / "vgg.pth")
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alex.pth")
    with pytest.raises(UserError, match=r"not torchvision's vgg16-397923af\.pth"):
        LPIPS("vgg", tmp_path / "alex.pth")
    with pytest.raises(UserError, match="must be 'vgg' or 'alex'"):
        LPIPS("squeeze", tmp_path / "alex.pth")
