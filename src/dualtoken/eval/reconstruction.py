"""How well pictures come back from their codes (paper Table 1, right half).

PSNR and SSIM by torchmetrics on values in [0, 1]; LPIPS and FID where weights are given by path; always the Frechet
distance in the teacher's pooled features. The last is not an FID and must not be compared with one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_bytes, to_float
from dualtoken.core.pretrained import load_torch_file
from dualtoken.tokenizer.backbone import Backbone
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

ALONE = {"sync_on_compute": False}  # of metrics: in training the main process evaluates while the others wait for it

INCEPTION = "torch-fidelity's pt_inception-2015-12-05-6726825d.pth (https://github.com/toshas/torch-fidelity/releases)"


@dataclass
class ReconstructionResult:
    """Means over all pictures. Usage: share of the rows of a vocabulary's codebook, or codebooks, met at least once."""

    images: int
    psnr: float  # dB, mean of the pictures' values
    ssim: float
    teacher_frechet: float  # Frechet distance of the teacher's pooled features; nan without a teacher
    pixel_usage: float
    semantic_usage: float
    lpips: float | None = None
    fid: float | None = None


class _TeacherFeatures(nn.Module):
    """The feature extractor that torchmetrics' Frechet distance asks for: uint8 images -> [B, C]."""

    def __init__(self, teacher: Backbone):
        super().__init__()
        self.teacher, self.num_features = teacher, teacher.pooled_width

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(to_float(images))


def teacher_distance(teacher: Backbone) -> FrechetInceptionDistance:
    """The Frechet distance in a teacher's pooled features; it keeps what it has seen of the true pictures."""
    return FrechetInceptionDistance(_TeacherFeatures(teacher.eval()), reset_real_features=False, **ALONE)


def inception_distance(weights: str) -> FrechetInceptionDistance:
    """FID with torch-fidelity's Inception weights. Raises UserError without the package or for another file."""
    what = INCEPTION
    load_torch_file(weights, "--inception_weights", what)  # torch-fidelity itself would unpickle any file
    try:
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=weights, **ALONE)
    except ModuleNotFoundError:
        raise UserError("--inception_weights needs the package torch-fidelity: pip install 'dualtoken[fid]'") from None
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"--inception_weights {weights}: not {what} ({line})") from None


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: DualTokenVisionTokenizer,
    batches: Iterable[Tensor],
    teacher: Backbone | FrechetInceptionDistance | None = None,
    lpips: nn.Module | None = None,
    inception: str | None = None,
    seen: Callable[[DualCodes], None] = lambda codes: None,
) -> ReconstructionResult:
    """Put uint8 batches [B, 3, S, S] through the codes and compare.

    Args:
        teacher: of one that has judged others on the same pictures, its `teacher_distance`: it knows the true ones.
        lpips: a `training.perceptual.LPIPS`.
        inception: path of torch-fidelity's Inception weights, for FID.
        seen: called with the codes of every batch.
    """
    device = tokenizer.device
    psnr = PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3), **ALONE).to(device)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0, **ALONE).to(device)
    distances: dict[str, FrechetInceptionDistance] = {}
    if teacher is not None:
        distances["teacher_frechet"] = teacher if isinstance(teacher, Metric) else teacher_distance(teacher)
    if inception is not None:
        distances["fid"] = inception_distance(inception)
    unknown = [distance.to(device) for distance in distances.values() if distance.real_features_num_samples == 0]
    used, offsets, sizes = {"pixel": set(), "semantic": set()}, {}, {}
    for name in used:
        book = getattr(tokenizer, name).quantizer
        books = 1 if book.shared else book.config.depth
        offsets[name] = book.config.codebook_size * (torch.arange(book.config.depth, device=device) % books)
        sizes[name] = book.config.codebook_size * books
    perceptual, count = 0.0, 0
    for pixels in batches:
        codes = tokenizer.encode(to_float(pixels.to(device)))
        seen(codes)
        for name in used:
            used[name].update((getattr(codes, name) + offsets[name]).unique().tolist())
        found, wanted = to_bytes(tokenizer.decode(codes)), pixels.to(device)
        psnr.update(found / 255.0, wanted / 255.0)
        ssim.update(found / 255.0, wanted / 255.0)
        for distance in unknown:
            distance.update(wanted, real=True)
        for distance in distances.values():
            distance.update(found, real=False)
        if lpips is not None:
            perceptual += float(lpips(to_float(found), to_float(wanted))) * len(found)
        count += len(found)
    values = {name: float(d.compute()) if count > 1 else float("nan") for name, d in distances.items()}
    for distance in distances.values():
        distance.reset()
    return ReconstructionResult(
        images=count,
        psnr=float(psnr.compute()),
        ssim=float(ssim.compute()),
        teacher_frechet=values.get("teacher_frechet", float("nan")),
        pixel_usage=len(used["pixel"]) / sizes["pixel"],
        semantic_usage=len(used["semantic"]) / sizes["semantic"],
        lpips=perceptual / max(1, count) if lpips is not None else None,
        fid=values.get("fid"),
    )
