"""Operations, memory and time against what can be counted by hand."""

import pytest
import torch
from torch import nn

from dualtoken.analysis.cost import AliveTensors, TeacherForced, measure, mllm_costs, ratio, tokenizer_costs
from dualtoken.core.errors import UserError
from dualtoken.mllm.projector import two_layers
from tests import tiny


def test_a_linear_layer_is_counted_as_by_hand():
    layer, x = nn.Linear(20, 30), torch.zeros(7, 20)
    cost = measure(lambda: layer(x), [layer], repeats=2)
    assert cost.parameters == 20 * 30 + 30 and cost.flops == 2 * 7 * 20 * 30 and cost.seconds > 0
    assert cost.memory == 4 * (630 + 7 * 30)  # weights and the result
    q = torch.zeros(1, 2, 5, 8)
    attention = measure(lambda: nn.functional.scaled_dot_product_attention(q, q, q), [layer], 1)
    assert attention.flops == 2 * 2 * (2 * 5 * 5 * 8)  # two products, two heads


def test_memory_is_what_is_alive_at_once():
    def call(keep):
        held = []
        for _ in range(3):
            x = torch.zeros(1000)  # 4000 bytes
            y = x.view(10, 100) + 1  # a view shares, a sum does not
            held += [x, y] if keep else []

    peaks, weight = [], torch.zeros(5)
    for keep in (True, False):
        alive = AliveTensors([weight])
        with alive:
            call(keep)
        peaks.append(alive.peak)
    assert peaks[0] == 20 + 6 * 4000
    assert 20 + 2 * 4000 <= peaks[1] <= 20 + 4 * 4000  # those of the step before go when their names are taken


def test_tokenizer_on_values_and_on_the_meta_device_counts_alike():
    real, model = tiny.tokenizer(), tiny.tokenizer().to("meta")
    ours, shapes = tokenizer_costs(real, 2, 1), tokenizer_costs(model, 2, 1)
    encode = ours.pop("encode")
    assert {k: (c.parameters, c.flops) for k, c in ours.items()} == {
        k: (c.parameters, c.flops) for k, c in shapes.items()
    }
    search = 2 * (2 * 4 * 2 * 16 * 8) * 2  # two vocabularies: two images of four positions, two depths, 16 codes of 8
    assert encode.flops - ours["encode up to the code vectors"].flops == search
    assert all(c.seconds is None for c in shapes.values()) and all(c.seconds > 0 for c in ours.values())
    assert encode.flops > ours["backbone to the semantic layer"].flops
    twice = tokenizer_costs(model, 4, 1)
    assert twice["decode from pixel features"].flops == 2 * shapes["decode from pixel features"].flops


def test_a_second_vocabulary_costs_a_head_and_half_a_projector_layer():
    model, _ = tiny.mllm()
    costs = mllm_costs(model, text=6, training=True, repeats=1)
    forward = costs["forward of a prompt and a picture"]
    head = model.semantic_head
    one = two_layers(model.feature_width, 32, 32)
    more = sum(p.numel() for p in (*head.parameters(), *model.projector.parameters()))
    less = sum(p.numel() for p in one.parameters()) + 2 * model.feature_width  # and its norm
    assert forward["dual"].parameters - forward["single"].parameters == more - less
    states, codes = torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.int64)
    only = measure(lambda: head(states, codes), [head], 1).flops
    assert forward["dual"].flops - forward["single"].flops == only + 2 * 4 * model.feature_width * 32
    step = costs["training step, gradients included"]
    assert step["dual"].memory > step["single"].memory > forward["single"].memory
    assert step["dual"].memory > 2 * 4 * step["dual"].parameters  # weights and as many gradients
    assert ratio(forward, "flops") > 1 and ratio(costs["drawing one picture"], "seconds") > 0
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in model.vision_tokenizer.parameters())


def test_a_model_that_draws_pixel_codes_alone_is_refused():
    with pytest.raises(UserError, match="draws pixel codes alone"):
        mllm_costs(tiny.mllm(output="pixel")[0], text=6)


def test_paper_sizes_need_no_values():
    model, _ = tiny.mllm()
    on_meta = mllm_costs(model.to("meta"), text=6, training=True)
    assert set(on_meta) == {"forward of a prompt and a picture", "training step, gradients included"}
    real = TeacherForced(tiny.mllm()[0], "dual", 6)
    assert on_meta["forward of a prompt and a picture"]["dual"].flops == measure(real.forward, real.modules, 1).flops


@pytest.mark.parametrize("token", ["single", "dual"])
def test_a_training_pass_gives_every_weight_a_gradient(token):
    model, _ = tiny.mllm()
    passes = TeacherForced(model, token, 6)
    states = passes.states()
    loss = sum(getattr(model, f"{n}_head").loss(states, passes.codes[n]).sum() for n in passes.names)
    loss.backward()
    unused = [n for m in passes.modules for n, p in m.named_parameters() if p.grad is None]
    assert [n for n in unused if "lm_head" not in n] == []
