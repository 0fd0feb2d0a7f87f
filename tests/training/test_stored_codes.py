"""Codes of the training pictures, made once and kept."""

import pytest
import torch

from dualtoken.cli import main
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_float
from dualtoken.data.scene_chat import SceneChatConfig, SceneChats, story
from dualtoken.training import stored_codes
from dualtoken.training.stored_codes import picture_bytes, store_codes
from tests import tiny
from tests.training.mllm_runs import error, recipe, write


@pytest.fixture
def pool(monkeypatch):
    """A tokenizer, a pool of pictures in files of five, and how many pictures were encoded."""
    monkeypatch.setattr(stored_codes, "PER_FILE", 5)
    encoded, real = [], stored_codes.encode_pictures
    monkeypatch.setattr(
        stored_codes, "encode_pictures", lambda t, pictures: encoded.append(len(pictures)) or real(t, pictures)
    )
    return tiny.tokenizer(), SceneChats(SceneChatConfig(scenes=12, stories=2)).pictures(), encoded


def test_codes_are_made_once_and_are_those_of_the_pictures(tmp_path, pool):
    tokenizer, pictures, encoded = pool
    stored = store_codes(tokenizer, pictures, tmp_path)
    assert encoded == [5] * (len(pictures) // 5) + [len(pictures) % 5] and len(pictures) % 5
    assert list(stored.place) == [pictures[i].name for i in range(len(pictures))]
    with torch.no_grad():
        one = tokenizer.encode(to_float(picture_bytes(pictures[7], tiny.SIZE)[None]))
    assert torch.equal(stored.codes.pixel[7:8], one.pixel) and torch.equal(stored.codes.semantic[7:8], one.semantic)
    encoded.clear()
    again = store_codes(tokenizer, pictures, tmp_path)
    assert sum(encoded) <= stored_codes.PROBE  # a few, to see that the codes are of this tokenizer
    assert torch.equal(again.codes.pixel, stored.codes.pixel) and again.place == stored.place


def test_an_edited_picture_keeps_the_codes_of_what_the_edit_leaves_alone():
    tokenizer = tiny.tokenizer()
    chats = SceneChats(SceneChatConfig(scenes=12, stories=12))
    chains = [[chats.picture(number, link) for link in range(3)] for number in range(12) if len(story(number)) == 2]
    kept = 0
    for chain in chains:
        codes = stored_codes.encode_pictures(tokenizer, chain)
        images = torch.stack([picture_bytes(picture, tiny.SIZE) for picture in chain])
        with torch.no_grad():
            alone = tokenizer.encode(to_float(images))
        side = int(codes.pixel.shape[1] ** 0.5)
        patch = tiny.SIZE // side
        for link in (1, 2):
            for place in range(side * side):
                row, column = (place // side) * patch, (place % side) * patch
                before, after = images[link - 1 : link + 1, :, row : row + patch, column : column + patch]
                source = (alone, link) if (before != after).any() else (codes, link - 1)
                for name in ("pixel", "semantic"):
                    own = getattr(codes, name)[link, place]
                    assert torch.equal(own, getattr(source[0], name)[source[1], place])
                kept += bool((before == after).all())
    assert chains and 0 < kept < len(chains) * 2 * codes.pixel.shape[1]


def test_codes_are_complete_after_a_stop_in_the_middle_of_a_file(tmp_path, pool, monkeypatch):
    tokenizer, pictures, encoded = pool
    whole = store_codes(tokenizer, pictures, tmp_path / "whole")
    save = DualCodes.save

    def cut(self, path, names=None):
        if path.name.startswith("000000005"):
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(self, path, names)

    monkeypatch.setattr(DualCodes, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        store_codes(tokenizer, pictures, tmp_path / "cut")
    assert [p.name for p in sorted((tmp_path / "cut").glob("*.safetensors"))] == ["000000000.safetensors"]
    monkeypatch.setattr(DualCodes, "save", save)
    encoded.clear()
    stored = store_codes(tokenizer, pictures, tmp_path / "cut")
    assert sum(encoded) <= len(pictures) - 5 + stored_codes.PROBE  # the first file was not made again
    assert torch.equal(stored.codes.pixel, whole.codes.pixel) and stored.place == whole.place
    assert not list((tmp_path / "cut").glob("*.draft"))


@pytest.mark.parametrize(
    ("scenes", "words"),
    [
        ({"scenes": 12, "stories": 2, "seed": 1}, "train-0-0 to train-0-4, this pool needs 5, train-1-0"),
        ({"scenes": 3, "stories": 2}, "this pool needs 5, train-0-0 to train-0-1-edit-1"),
        ({"scenes": 4, "stories": 1}, "is of another pool than these|this pool needs"),
        ({"scenes": 40, "stories": 2}, "this pool needs 5, train-0-10 to train-0-14"),
    ],
)
def test_codes_of_another_pool_are_a_mistake_before_anything_is_written(scenes, words, tmp_path, pool):
    tokenizer, pictures, _ = pool
    store_codes(tokenizer, pictures, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=words) as caught:
        store_codes(tokenizer, SceneChats(SceneChatConfig(**scenes)).pictures(), tmp_path)
    assert f"--data.codes {tmp_path}" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_codes_of_another_tokenizer_are_a_mistake(tmp_path, pool):
    _, pictures, _ = pool
    store_codes(tiny.tokenizer(seed=0), pictures, tmp_path)
    with pytest.raises(UserError, match="codes are of another vision tokenizer"):
        store_codes(tiny.tokenizer(seed=1), pictures, tmp_path)


def test_the_command_refuses_codes_of_another_pool(tmp_path, start, capsys):
    stage = recipe("1", steps=1)
    assert main(write(tmp_path / "one", start, "--data.codes", str(tmp_path / "codes"), recipe=stage)) == 0
    other = tiny.mllm_recipe()["data"] | {"scenes": {"scenes": 12, "stories": 4, "seed": 3}}
    assert main(write(tmp_path / "two", start, "--data.codes", str(tmp_path / "codes"), recipe=stage, data=other)) == 2
    assert f"--data.codes {tmp_path / 'codes'}" in error(capsys)


# Mistakes
