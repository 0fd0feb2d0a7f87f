"""The loss of large classifiers, a chunk of logits at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualtoken.core import linear_loss
from dualtoken.core.linear_loss import classification_loss
from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig
from tests import tiny
from tests.mllm.test_model import batch, sample

ROWS, WIDTH, CLASSES = 50, 8, 32


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        found = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *found])
        return result


def parts(bias=True):
    torch.manual_seed(0)
    classifier = nn.Linear(WIDTH, CLASSES, bias=bias)
    return classifier, torch.randn(ROWS, WIDTH, requires_grad=True), torch.randint(CLASSES, (ROWS,))


@pytest.mark.parametrize("chunk", [1, 7 * CLASSES, 10**6])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(chunk, bias):
    classifier, x, target = parts(bias)
    wanted = F.cross_entropy(classifier(x), target, reduction="sum")
    expected = torch.autograd.grad(wanted, [x, *classifier.parameters()])
    found = classification_loss(classifier, x, target, CLASSES, small=0, chunk=chunk)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(found, [x, *classifier.parameters()]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_logits_are_never_whole_but_where_they_are_few():
    classifier, x, target = parts()
    for small, limit in ((0, 4 * CLASSES), (ROWS * CLASSES, ROWS * CLASSES)):
        with Largest() as largest:
            classification_loss(classifier, x, target, CLASSES, small, chunk=4 * CLASSES).backward()
        assert largest.elements == max(limit, ROWS * WIDTH)


def test_the_loss_is_float32_under_autocast_and_zero_for_no_rows():
    classifier, x, target = parts()
    with torch.autocast("cpu", torch.bfloat16):
        found = classification_loss(classifier, x, target, CLASSES, small=0, chunk=5 * CLASSES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(classifier(x), target, reduction="sum"), rtol=1e-2, atol=0)
    assert classification_loss(classifier, x[:0], target[:0], CLASSES) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_a_head_and_the_model_have_the_same_losses_and_gradients_in_chunks(shared, monkeypatch):
    torch.manual_seed(0)
    head = VisualHead(12, VisualHeadConfig(CLASSES, 3, 16, 1, 2, 8, shared_classifier=shared))
    hidden, codes = torch.randn(9, 12), torch.randint(CLASSES, (9, 3))
    model, processor = tiny.mllm()
    given = batch(processor, [sample(0), sample(1)])

    def all_losses():
        found = [head.loss(hidden, codes).sum(), model(**given).loss]
        return found, torch.autograd.grad(sum(found), [*head.parameters(), *trained])

    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = all_losses()
    calls, real = [], linear_loss.checkpoint
    monkeypatch.setattr(linear_loss, "checkpoint", lambda *given, **how: calls.append(1) or real(*given, **how))
    assert all_losses()[0] == wanted[0] and not calls  # so few are kept
    monkeypatch.setattr(linear_loss.classification_loss, "__defaults__", (0, 2 * CLASSES))
    found = all_losses()
    assert len(calls) > 3 * -(-len(hidden) // 2)
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
