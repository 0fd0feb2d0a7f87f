from dataclasses import asdict

import pytest
import torch

from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import DrawConfig, HeadSampling, guide, keep_likely, sample, uniforms

ALL = {"top_k": 0, "top_p": 1.0}
SHARES = torch.tensor([0.15, 0.5, 0.05, 0.3])


def logits(rows=1):
    return SHARES.log().repeat(rows, 1)


def frequencies(sampling, count=20000):
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return torch.bincount(sample(logits(count), sampling, uniform), minlength=4) / count


def close(found, expected, count=20000):
    """Within four standard deviations of a share of `count` draws, exactly 0 where nothing may be drawn."""
    return bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all())


def test_codes_are_drawn_as_often_as_the_softmax_says():
    assert close(frequencies(HeadSampling(1.0, **ALL)), SHARES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = (SHARES.log() / temperature).softmax(0)
    assert close(frequencies(HeadSampling(temperature, **ALL)), expected)
    assert not close(expected, SHARES)


def test_top_k_draws_among_the_likeliest_alone():
    assert close(frequencies(HeadSampling(1.0, 2, 1.0)), torch.tensor([0.0, 5 / 8, 0.0, 3 / 8]))


def test_top_p_keeps_the_code_that_crosses_the_threshold():
    assert close(frequencies(HeadSampling(1.0, 0, 0.6)), torch.tensor([0.0, 5 / 8, 0.0, 3 / 8]))
    assert close(frequencies(HeadSampling(1.0, 0, 0.81)), torch.tensor([0.15, 0.5, 0, 0.3]) / 0.95)
    assert frequencies(HeadSampling(1.0, 0, 0.01)).tolist() == [0, 1, 0, 0]


def test_top_p_counts_what_top_k_left():
    probabilities, codes = keep_likely(logits(), HeadSampling(1.0, 2, 0.6))  # of 5/8 and 3/8 the first crosses 0.6
    assert codes.tolist() == [[1, 3]] and probabilities.tolist() == [[1.0, 0.0]]


def test_temperature_zero_and_top_k_one_take_the_likeliest():
    many = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(2))
    for sampling in (HeadSampling(0.0, 3, 0.5), HeadSampling(5.0, 1, 1.0)):
        assert torch.equal(sample(many, sampling, uniform), many.argmax(-1))
    assert not torch.equal(sample(many, HeadSampling(5.0, **ALL), uniform), many.argmax(-1))


def test_a_number_that_rounding_left_above_the_sum_draws_the_last_kept_code():
    assert sample(logits(), HeadSampling(1.0, 0, 0.6), torch.ones(1)).tolist() == [3]  # not code 2, which is cut


def test_more_codes_than_there_are_cut_nothing():
    one, two = (keep_likely(logits(), HeadSampling(1.0, k, 1.0)) for k in (0, 900))
    assert torch.equal(one[0], two[0]) and one[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_values_out_of_range_are_mistakes(values, words):
    with pytest.raises(UserError, match=words):
        HeadSampling(**values)


def test_guidance_goes_on_from_the_unconditional_towards_the_prompt():
    with_prompt, without = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    both = torch.cat([with_prompt, without])
    assert guide(both, 3.0).tolist() == [[3.0, -2.0]]
    assert torch.equal(guide(both, 1.0), with_prompt) and torch.equal(guide(both, 0.0), without)


def test_random_numbers_belong_to_a_seed_and_are_all_different():
    cpu = torch.device("cpu")
    rows = uniforms([3, 4, 3], 5, 2, cpu)
    assert rows.shape == (3, 5, 2, 2) and torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1:2], uniforms([4], 5, 2, cpu))
    assert len(rows[:2].flatten().unique()) == 2 * 5 * 2 * 2
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    uniforms([9], 5, 2, cpu)
    assert torch.equal(torch.rand(()), expected)  # the global random state is left as it is


def test_settings_survive_as_a_dict():
    config = DrawConfig(2.0, HeadSampling(0.5, 7, 0.9), HeadSampling(0.0), False)
    assert DrawConfig.from_dict(asdict(config)) == config
