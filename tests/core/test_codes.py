import pytest
import torch

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError


def codes(count=3):
    return DualCodes(torch.randint(0, 65536, (count, 4, 2)), torch.randint(0, 100, (count, 5, 2)))


def test_codes_come_back_from_two_bytes_each(tmp_path):
    wanted = codes(50)
    wanted.pixel[0, 0, 0] = 65535
    wanted.save(tmp_path / "c.safetensors", [f"{i}.png" for i in range(50)])
    found, names = DualCodes.load(tmp_path / "c.safetensors")
    assert torch.equal(found.pixel, wanted.pixel) and torch.equal(found.semantic, wanted.semantic)
    assert found.pixel.dtype == torch.int64 and names[49] == "49.png"
    assert (tmp_path / "c.safetensors").stat().st_size < 2 * 50 * 18 + 2000


def test_indexing_keeps_the_batch_and_cat_joins():
    all_codes = codes()
    assert len(all_codes[-1]) == 1 and torch.equal(all_codes[-1].pixel, all_codes.pixel[2:])
    joined = DualCodes.cat([all_codes[0], all_codes[1:]])
    assert torch.equal(joined.semantic, all_codes.semantic)


def test_mistakes_are_named(tmp_path):
    big = codes()
    big.semantic[0, 0, 0] = 65536
    with pytest.raises(UserError, match="semantic codes reach 65536"):
        big.save(tmp_path / "c")
    (tmp_path / "t.txt").write_text("no codes")
    for name in ("t.txt", "missing"):
        with pytest.raises(UserError, match=name):
            DualCodes.load(tmp_path / name)
