import io
import json
import tarfile

import pytest
import torch
import webdataset
from PIL import Image

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.data.chat import ChatSample
from dualtoken.data.code_shards import CodeFormat, CodeSample, CodeShard, CodeShards, CodeShardWriter, open_code_shards
from dualtoken.data.tar_shards import Skipped, find_shards, index_tar

FORMAT = CodeFormat(pixel=(256, 4), semantic=(257, 4), codebooks=(16384, 16384), tokenizer="0123456789abcdef")


def codes(count=3, format=FORMAT):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 16384, (count, *shape), generator=generator) for shape in (format.pixel, format.semantic)]
    return DualCodes(*rows)


def write(path, made=None, beside=({"txt": b"a cat\n"}, {"json": b'{"caption": "a dog", "id": 3}'}, {"cls": b"7"})):
    made = codes() if made is None else made
    with CodeShardWriter(path, FORMAT) as shard:
        for i, (packed, files) in enumerate(zip(FORMAT.pack(made), beside, strict=True)):
            shard.add(f"sub/{i:06d}", packed, files)
    return made


def test_what_is_written_is_read_with_its_text(tmp_path):
    made = write(tmp_path / "new/a.tar")
    shard = CodeShard(tmp_path / "new/a.tar")
    found = list(shard)
    assert shard.format == FORMAT and len(shard) == len(found) == 3
    assert [(s.key, s.text) for s in found] == [("sub/000000", "a cat"), ("sub/000001", "a dog"), ("sub/000002", "")]
    assert found[1].details == {"caption": "a dog", "id": 3}
    for i, sample in enumerate(found):
        assert torch.equal(sample.codes.pixel, made.pixel[i : i + 1])
        assert torch.equal(sample.codes.semantic, made.semantic[i : i + 1])


def test_a_picture_is_4_kib_at_256_positions_and_depth_4(tmp_path):
    format = CodeFormat((256, 4), (256, 4), (65536, 65536), "0")
    largest = DualCodes(*(torch.full((1, 256, 4), 65535) for _ in range(2)))
    (packed,) = format.pack(largest)
    assert format.size == len(packed) == 4096
    assert int(format.unpack(packed).semantic.max()) == 65535
    with pytest.raises(UserError, match="65536 rows"):
        CodeFormat((256, 4), (256, 4), (65536, 65537), "0")


def test_equal_content_gives_equal_bytes_and_webdataset_reads_it(tmp_path):
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [s["__key__"] for s in read] == [f"sub/{i:06d}" for i in range(3)]
    assert [s["codes"] for s in read] == FORMAT.pack(codes()) and read[0]["txt"] == b"a cat\n"


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path / "a.tar")
    before = (tmp_path / "a.tar").read_bytes()

    def fail():
        with CodeShardWriter(tmp_path / "a.tar", FORMAT) as shard:
            shard.add("x", FORMAT.pack(codes())[0], {})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (tmp_path / "a.tar").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    (tmp_path / ".a.tar.elsewhere.1.draft").write_text("left by a killed process")
    with whole_or_not_at_all(tmp_path / "a.tar") as draft:
        draft.write_text("new")
    assert (tmp_path / "a.tar").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_damaged_codes_are_skipped_with_their_reason(tmp_path):
    wrong = codes()
    wrong.pixel[1, 0, 0] = 16384
    write(tmp_path / "a.tar", wrong)
    assert [type(s) for s in CodeShard(tmp_path / "a.tar")] == [CodeSample, Skipped, CodeSample]
    with CodeShardWriter(tmp_path / "b.tar", FORMAT) as shard:
        shard.add("x", b"1234", {})
    (skipped,) = CodeShard(tmp_path / "b.tar")
    assert skipped.what.endswith("b.tar:x: 4 bytes of codes, 4104 expected")


def test_a_cut_is_noticed_wherever_it_is(tmp_path):
    write(tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    third = next(m for m in members if m.name == "sub/000002.cls")
    for cut in (third.offset, third.offset + 100, third.offset_data + 1, members[-1].offset_data + 100):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        *found, last = CodeShard(tmp_path / "b.tar")
        assert [s.key for s in found if isinstance(s, CodeSample)] == ["sub/000000", "sub/000001"]
        assert isinstance(last, Skipped) and "cut off" in last.what
    (tmp_path / "c.tar").write_bytes(whole[: third.offset] + b"noise" * 400)
    assert "damaged" in index_tar(tmp_path / "c.tar").damage and index_tar(tmp_path / "a.tar").damage == ""
    (tmp_path / "d.tar").write_bytes(b"")
    assert index_tar(tmp_path / "d.tar").damage and index_tar(tmp_path / "d.tar").samples == []


def test_chats_and_pictures_of_shards(tmp_path):
    made = write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    source = CodeShards(str(tmp_path / "{a,b}.tar"), "text_to_image", ["draw {}"], FORMAT.tokenizer)
    assert source.shards == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    first, second, skipped = source.read(source.shards[0])
    assert isinstance(first, ChatSample) and first.draws and first.messages[0].content == ("draw a cat",)
    assert torch.equal(second.pictures[0].codes.pixel, made.pixel[1:2]) and skipped.what.endswith("000002: no text")
    first, *_ = CodeShards(str(tmp_path / "*.tar")).read(source.shards[0])
    assert not first.draws and first.messages[1].content == ("a cat",) and first.pictures[0].codes is not None
    pictures = list(open_code_shards(str(tmp_path)))
    assert [text for _, text in pictures] == ["a cat", "a dog", ""] * 2
    assert len({picture.name for picture, _ in pictures}) == 6
    assert torch.equal(pictures[5][0].codes.semantic, made.semantic[2:3])


def test_mistakes_name_what_is_wrong(tmp_path):
    write(tmp_path / "one/a.tar")
    write(tmp_path / "two/a.tar")
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        header = tarfile.TarInfo("x.png")
        header.size = len(image.getvalue())
        tar.addfile(header, io.BytesIO(image.getvalue()))
    with pytest.raises(UserError, match="no shard of codes"):
        CodeShard(tmp_path / "pictures.tar")
    with pytest.raises(UserError, match="--vision_tokenizer is tokenizer feedfeedfeedfeed"):
        list(CodeShards(str(tmp_path / "one/a.tar"), tokenizer="feedfeedfeedfeed").read(str(tmp_path / "one/a.tar")))
    with pytest.raises(UserError, match=r"--data.sources .*no shard .*b.tar"):
        CodeShards(str(tmp_path / "one/{a,b}.tar"))
    with pytest.raises(UserError, match="no shard fits"):
        CodeShards(str(tmp_path / "one/x*.tar"))
    with pytest.raises(UserError, match="have one name"):
        CodeShards(str(tmp_path / "{one,two}/a.tar"))
    with pytest.raises(UserError, match="the tasks are caption, text_to_image"):
        CodeShards(str(tmp_path / "one"), "vqa")
    assert list(find_shards(str(tmp_path), "X")) == ["one/a.tar", "pictures.tar", "two/a.tar"]
    header = json.dumps({"format": "dualtoken-code-shard-9"}).encode()
    with tarfile.open(tmp_path / "later.tar", "w") as tar:
        info = tarfile.TarInfo("__codes__")
        info.size = len(header)
        tar.addfile(info, io.BytesIO(header))
    with pytest.raises(UserError, match="another version"):
        CodeShard(tmp_path / "later.tar")
