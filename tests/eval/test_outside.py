"""Metrics against outside implementations: scikit-image, scipy, scikit-learn, and loops written out."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio
from sklearn.cluster import KMeans
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional as F

from dualtoken.analysis.clusters import StreamedClusters
from dualtoken.core.images import to_bytes, to_float
from dualtoken.data.scenes import Scenes
from dualtoken.eval.reconstruction import evaluate_reconstruction
from dualtoken.eval.zero_shot import accuracy, retrieval
from dualtoken.tokenizer.tokenizer import reconstruct
from tests import tiny


def unit(count, width, seed):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def closed_form(first, second):
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of two samples [M, C] taken for Gaussian."""
    means = first.mean(0) - second.mean(0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return float(means @ means + np.trace(one + two - 2 * np.real(sqrtm(one @ two))))


def test_frechet_distance_equals_the_closed_form_of_gaussians():
    pixels = torch.stack([Scenes(16, "test")[i].image for i in range(150)])
    model, teacher = tiny.tokenizer(), tiny.tokenizer(seed=1).backbone.eval()
    result = evaluate_reconstruction(model, pixels.split(40), teacher)
    found = to_bytes(reconstruct(model, to_float(pixels)))
    with torch.no_grad():
        features = [teacher(to_float(images)).double().numpy() for images in (pixels, found)]
    assert result.teacher_frechet == pytest.approx(closed_form(*features), rel=1e-3)
    assert closed_form(features[0], features[0] + 1) == pytest.approx(features[0].shape[1], rel=1e-3)


def ssim_with_borders(first, second):
    """Mean SSIM of one channel over all pixels; scikit-image's formula leaves out the five at each border."""
    blur = partial(gaussian_filter, sigma=1.5, truncate=3.5, mode="mirror")
    x, y = first / 255.0, second / 255.0
    a, b = blur(x), blur(y)
    upper = (2 * a * b + 0.01**2) * (2 * (blur(x * y) - a * b) + 0.03**2)
    lower = (a**2 + b**2 + 0.01**2) * (blur(x * x) - a**2 + blur(y * y) - b**2 + 0.03**2)
    return (upper / lower).mean()


def test_psnr_and_ssim_of_weak_and_strong_noise():
    pixels = torch.stack([Scenes(32, "test")[i].image for i in range(5)])
    for strength in (2.0, 30.0):
        noise = strength * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        noisy = (pixels + noise).clamp(0, 255)
        model = tiny.tokenizer()
        model.encode = lambda images: tiny.tokenizer().encode(images[..., :16, :16])  # the codes do not matter here
        model.decode = lambda codes, noisy=noisy: to_float(noisy)
        result = evaluate_reconstruction(model, [pixels])
        pairs = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy())
                 for a, b in zip(pixels, to_bytes(to_float(noisy)), strict=True)]  # fmt: skip
        psnr = np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs])
        channels = [(a[..., c].astype(float), b[..., c].astype(float)) for a, b in pairs for c in range(3)]
        ssim = np.mean([ssim_with_borders(a, b) for a, b in channels])
        assert result.psnr == pytest.approx(psnr, abs=1e-3) and result.ssim == pytest.approx(ssim, abs=2e-3)


def test_zero_shot_accuracy_equals_scikit_learn():
    images, classes = unit(200, 12, 0), unit(7, 12, 1)
    labels = torch.arange(200) % 7
    scores = (images @ classes.t()).double().numpy()
    wanted = top_k_accuracy_score(labels.numpy(), scores, k=1, labels=range(7))
    assert accuracy(images, classes, labels) == pytest.approx(wanted) and 0.02 < wanted < 0.5
    right = [max(range(7), key=lambda c, i=i: float(images[i] @ classes[c])) == int(labels[i]) for i in range(200)]
    assert accuracy(images, classes, labels) == pytest.approx(np.mean(right))


def test_retrieval_equals_a_direct_computation():
    images = unit(40, 6, 2)
    texts = F.normalize(images.repeat_interleave(5, 0) + 0.5 * unit(200, 6, 3), dim=-1)
    captions = [[f"{i} {j}" for j in range(5)] for i in range(40)]
    text_to_image = image_to_text = 0
    for i in range(40):
        nearest = min(range(200), key=lambda t, i=i: float((images[i] - texts[t]).norm()))
        image_to_text += nearest // 5 == i
        for t in range(5 * i, 5 * i + 5):
            text_to_image += min(range(40), key=lambda k, t=t: float((texts[t] - images[k]).norm())) == i
    wanted = (text_to_image / 200, image_to_text / 40)
    assert retrieval(images, texts, captions) == pytest.approx(wanted) and 0.2 < wanted[0] < 0.99


def test_inertia_of_clusters_equals_scikit_learn():
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(4))
    found = StreamedClusters(6)
    found.learn(features)
    found.finish()
    assigned = found.assign(features)
    parts = [features[assigned == one] for one in range(6)]
    inertia = sum(float((part - part.mean(0)).square().sum()) for part in parts)
    best = KMeans(6, n_init=20, random_state=9).fit(features.numpy()).inertia_
    assert best * 0.999 <= inertia <= best * 1.03
