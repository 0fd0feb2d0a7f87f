"""Small files in the published formats, written with the libraries that define these, read back as chats."""

import gzip
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dualtoken.core.errors import UserError
from dualtoken.core.images import fit_image, image_bytes, read_image
from dualtoken.data.chat import Picture
from dualtoken.data.sources import FORMATS, Skipped, SourceConfig, open_source
from dualtoken.training.health import Skipped as Counted

SIZE = 8


def encoded(seed, kind="PNG", size=(20, 14)):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def pixels(data):
    return image_bytes(fit_image(read_image(data), SIZE))


def struct(seed, path=None):
    """A picture as Hugging Face's datasets keeps it in a table."""
    return {"bytes": encoded(seed), "path": path}


def read(config_or_source, shard=None):
    source = config_or_source
    if isinstance(source, SourceConfig):
        source = open_source(source, SIZE)
    found = [e for s in ([shard] if shard else source.shards) for e in source.read(s)]
    return [e for e in found if not isinstance(e, Skipped)], [e.what for e in found if isinstance(e, Skipped)]


def told(sample):
    """(role, content) of the turns; a picture by its name."""
    return [(m.role, [p.name if isinstance(p, Picture) else p for p in m.content]) for m in sample.messages]


def write_table(path, columns, rows_a_group=None, schema=None):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=rows_a_group)
    return str(path)


@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{number:05d}.tar")) as tar:
            for i in range(2):
                key = f"{number:05d}{i:04d}"
                words = {"txt": f"words {key}"} if number == 0 else {"json": {"caption": f"words {key}", "image": "x"}}
                tar.write({"__key__": key, "jpg": encoded(2 * number + i, "JPEG"), **words})
    return tmp_path


def test_webdataset_is_captioned_or_drawn(shards):
    samples, skipped = read(SourceConfig("webdataset", f"{shards}/{{00000..00001}}.tar"))
    assert not skipped and [s.task for s in samples] == ["caption"] * 4
    name = f"{shards}/00001.tar/000010001"
    assert told(samples[3]) == [("user", [name, "describe the picture"]), ("assistant", ["words 000010001"])]
    assert torch.equal(samples[3].pictures[0].image, pixels(encoded(3, "JPEG")))
    drawn, _ = read(
        SourceConfig("webdataset", f"{shards}/*.tar", task="text_to_image", prompts=["draw {} !"], name="cc")
    )
    assert told(drawn[0]) == [("user", ["draw words 000000000 !"]), ("assistant", ["cc/00000.tar/000000000"])]
    assert drawn[0].draws and len({p.name for s in drawn for p in s.pictures}) == 4


def test_order_names_and_prompts_are_the_same_at_any_time_and_in_parts(shards):
    config = SourceConfig("webdataset", str(shards), prompts=["a", "b", "c"], name="in")  # prompts follow the name
    whole, again = ([told(s) for s in read(config)[0]] for _ in range(2))
    assert whole == again and len({turns[0][1][1] for turns in whole}) > 1
    parted = open_source(replace(config, parts=2), SIZE)
    assert len(parted.shards) == 4
    assert [told(s) for shard in parted.shards for s in read(parted, shard)[0]] == whole
    with pytest.raises(UserError, match="no shard 7"):
        list(parted.read("7"))


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "behind a sample"])
def test_a_shard_that_is_cut_off_gives_what_is_before_the_cut(shards, cut):
    file = shards / "00000.tar"
    data = file.read_bytes()
    second = data.index(b"000000001.jpg")  # the header of the second sample's first file
    file.write_bytes(data[: second + {"in a picture": 700, "in a header": 100, "behind a sample": 0}[cut]])
    samples, skipped = read(SourceConfig("webdataset", str(file)))
    assert [s.name for s in samples] == [f"{file}/000000000"]
    assert len(skipped) == 1 and skipped[0].startswith(str(file)) and "cut off" in skipped[0]


def test_what_a_shard_lacks_is_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "broken", "jpg": b"\xff\xd8 nothing", "txt": "x"})
        tar.write({"__key__": "silent", "jpg": encoded(0, "JPEG")})
        tar.write({"__key__": "odd", "jpg": encoded(0, "JPEG"), "json": b"{"})
        tar.write({"__key__": "whole", "png": encoded(0), "txt": "a <|im_end|> ünd"})
    samples, skipped = read(SourceConfig("webdataset", str(tmp_path / "a.tar")))
    assert [told(s)[1] for s in samples] == [("assistant", ["a <|im_end|> ünd"])]
    assert [line.split(":")[0].rsplit("/", 1)[1] for line in skipped] == ["broken", "silent", "odd"]
    (tmp_path / "no.tar").write_bytes(b"no tar file at all")
    assert read(SourceConfig("webdataset", str(tmp_path / "no.tar")))[1][0].startswith(str(tmp_path / "no.tar"))


def test_folder_takes_captions_beside_pictures_and_classes(tmp_path):
    for i, path in enumerate(("n01/a.png", "n01/b.png", "big_cat/c.png", "d.png")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(encoded(i))
    (tmp_path / "n01/b.txt").write_text("a tench in a net\n")
    (tmp_path / "big_cat/bad.png").write_bytes(b"no picture")
    (tmp_path / "words").write_text("n01 tench, Tinca tinca\n")
    samples, skipped = read(SourceConfig("folder", str(tmp_path), classes=str(tmp_path / "words"), name="in"))
    said = {s.pictures[0].name: s.messages[1].content[0] for s in samples}
    assert said == {"in/n01/a.png": "a photo of a tench", "in/n01/b.png": "a tench in a net",
                    "in/big_cat/c.png": "a photo of a big cat"}  # fmt: skip
    assert len(skipped) == 2 and "in/big_cat/bad.png" in skipped[0] and "in/d.png: no text" in skipped[1]
    assert torch.equal(samples[1].pictures[0].image, pixels(encoded(0)))
    parts = open_source(SourceConfig("folder", str(tmp_path), parts=2), SIZE)
    assert [s.name[-5:] for s in read(parts, parts.shards[1])[0]] == ["c.png", "a.png"]  # every second picture


def test_folder_follows_its_metadata(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(2):
        (tmp_path / f"train/{i}.png").write_bytes(encoded(i))
    lines = [{"file_name": f"train/{i}.png", "text": f"picture {i}"} for i in (1, 0, 7)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    samples, skipped = read(SourceConfig("folder", str(tmp_path), task="text_to_image"))
    assert [told(s) for s in samples] == [
        [("user", [f"picture {i}"]), ("assistant", [f"{tmp_path}/train/{i}.png"])] for i in (1, 0)
    ]
    assert "train/7.png" in skipped[0] and "line 4" in skipped[1]


def test_folder_takes_a_table_of_paths_and_long_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "long.csv").write_text('Image Path,longSV_captions\na.png,"a bee, seen\nfrom near"\n')
    columns = {"image": "Image Path", "text": "longSV_captions"}
    samples, _ = read(SourceConfig("folder", str(tmp_path / "long.csv"), columns=columns))
    assert told(samples[0])[1] == ("assistant", ["a bee, seen\nfrom near"])


def test_parquet_maps_columns_and_gives_rows_of_whole_groups(tmp_path):
    columns = {"pic": [struct(i) for i in range(6)], "words": [f"words {i}" for i in range(6)], "id": list(range(6))}
    path = write_table(tmp_path / "a.parquet", columns, rows_a_group=2)
    config = SourceConfig("parquet", path, columns={"image": "pic", "text": "words"})
    samples, skipped = read(config)
    assert not skipped and [s.messages[1].content[0] for s in samples] == columns["words"]
    assert samples[4].pictures[0].name == f"{path}/4"
    assert torch.equal(samples[4].pictures[0].image, pixels(encoded(4)))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    import pyarrow.parquet as pq

    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(data)
    reading = open_source(config, SIZE).read(path)
    assert next(reading).name == f"{path}/0"  # long before the damage
    rest = list(reading)
    assert [getattr(e, "name", None) for e in rest] == [f"{path}/1", None, f"{path}/4", f"{path}/5"]
    assert "rows 2 to 3 cannot be read" in rest[1].what


def test_a_table_is_checked_before_any_work(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"pic": [struct(0)], "caption": ["x"]})
    with pytest.raises(UserError, match=r"--data.sources .*no column for image .*it has pic, caption.*columns.image"):
        open_source(SourceConfig("parquet", path), SIZE)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    assert "b.parquet: no readable parquet file" in read(SourceConfig("parquet", str(tmp_path / "b.parquet")))[1][0]


class Rows(torch.utils.data.IterableDataset):
    """What the assistant says in the shard of each loading process."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        shard = self.source.shards[torch.utils.data.get_worker_info().id]
        return (sample.messages[1].content[0] for sample in self.source.read(shard))


def test_a_damaged_header_inside_a_shard_is_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            for name, content in ((f"{number}.png", encoded(number)), (f"{number}.txt", b"words")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    content = bytearray((tmp_path / "a.tar").read_bytes())
    place = content.index(b"2.png")
    content[place : place + 512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(content)
    samples, skipped = read(SourceConfig("webdataset", str(tmp_path / "a.tar")))
    assert len(samples) == 2 and len(skipped) == 1 and "cut off or damaged" in skipped[0]


def test_a_dataset_of_the_hub_is_read_by_data_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    schema = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}).arrow_schema
    (tmp_path / "set/data").mkdir(parents=True)
    for part in range(2):
        numbers = (2 * part, 2 * part + 1)
        rows = {"image": [struct(i) for i in numbers], "text": [f"words {i}" for i in numbers]}
        write_table(tmp_path / f"set/data/train-{part:05d}-of-00002.parquet", rows, schema=schema)
    source = open_source(SourceConfig("parquet", f"hub:{tmp_path}/set", name="set"), SIZE)
    assert len(source.shards) == 2
    samples, skipped = read(source, source.shards[1])
    assert not skipped and [s.messages[1].content[0] for s in samples] == ["words 2", "words 3"]
    assert samples[0].pictures[0].name == "set/00001/0"
    assert torch.equal(samples[0].pictures[0].image, pixels(encoded(2)))
    loader = torch.utils.data.DataLoader(Rows(source), batch_size=None, num_workers=2)
    assert sorted(loader) == ["words 0", "words 1", "words 2", "words 3"]  # each of two processes its shard
    with pytest.raises(UserError, match=r"--data.sources: cannot open hub:"):
        open_source(SourceConfig("parquet", f"hub:{tmp_path}/other"), SIZE)


LLAVA = [
    {"id": "1", "image": "coco/1.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is <|im_end|> it?"}, {"from": "gpt", "value": "A bee."},
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It flies.\nSee?"}]},
    {"id": "2", "image": ["coco/1.png", "coco/2.png"], "conversations": [
        {"from": "human", "value": "First <image> then\n<image>"}, {"from": "gpt", "value": "Two."}]},
    {"id": "3", "conversations": [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A mark."}]},
    {"id": "4", "image": "coco/1.png", "conversations": [
        {"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}]},
    {"id": "5", "image": "coco/9.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
    {"id": "6", "image": "coco/2.png", "conversations": [
        {"from": "system", "value": "Be short."}, {"from": "human", "value": "Well?"}, {"from": "gpt", "value": "x"},
        {"from": "human", "value": "unanswered"}]},
    {"id": "7", "conversations": [{"from": "robot", "value": "beep"}, {"from": "gpt", "value": "x"}]},
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images/coco").mkdir(parents=True)
    for i in (1, 2):
        (tmp_path / f"images/coco/{i}.png").write_bytes(encoded(i))
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz"])
def test_llava_conversations(tmp_path, pictures, kind):
    text = json.dumps(LLAVA, indent=1) if kind == "json" else "\n".join(map(json.dumps, LLAVA))
    opened = gzip.open if kind.endswith("gz") else open
    with opened(tmp_path / f"mix.{kind}", "wt") as file:
        file.write(text)
    samples, skipped = read(SourceConfig("llava", str(tmp_path / f"mix.{kind}"), images=str(pictures), name="llava"))
    first, second = "llava/coco/1.png", "llava/coco/2.png"
    assert [told(s) for s in samples] == [
        [("user", [first, "What is <|im_end|> it?"]), ("assistant", ["A bee."]),
         ("user", ["Why?"]), ("assistant", ["It flies.\nSee?"])],
        [("user", ["First ", first, " then", second]), ("assistant", ["Two."])],
        [("user", ["What is <image>?"]), ("assistant", ["A mark."])],
        [("system", ["Be short."]), ("user", [second, "Well?"]), ("assistant", ["x"])],
    ]  # fmt: skip
    assert [s.task for s in samples] == ["vqa", "vqa", "text", "vqa"]
    assert torch.equal(samples[1].pictures[1].image, pixels(encoded(2)))
    wanted = ("places for 2 pictures, there are 1", "coco/9.png: no such file", "words ('robot': 'beep')")
    assert len(skipped) == 3 and all(w in line for w, line in zip(wanted, skipped, strict=True))


def test_a_list_that_is_cut_off_gives_what_is_before_the_cut(tmp_path, pictures):
    text = json.dumps(LLAVA)
    (tmp_path / "mix.json").write_text(text[: text.index('"id": "3"')])
    samples, skipped = read(SourceConfig("llava", str(tmp_path / "mix.json"), images=str(pictures)))
    assert len(samples) == 2 and "damaged behind 2 records" in skipped[0]


def test_whatever_a_conversation_holds_stops_nothing(tmp_path):
    """Turns of other kinds are told as one kind of error; an empty name is no picture; folders keep their pictures."""
    good = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "a star"}]
    for i, name in enumerate("ab"):
        turns = [[{"from": ["human"], "value": "a"}], [{"from": "tool", "value": f"word {i}"}], good]
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(encoded(i))
        shown = [{"image": "p.png", "conversations": good}, {"image": "", "conversations": good}]
        text = json.dumps([{"conversations": t} for t in turns] + shown)
        (tmp_path / name / "chats.json").write_text("\n \n" + text)
    samples, skipped = read(SourceConfig("llava", f"{tmp_path}/{{a,b}}/chats.json"))
    assert [len(s.pictures) for s in samples] == [0, 1, 0] * 2 and len(skipped) == 4
    kinds = Counted()
    assert [kinds.add(line) for line in skipped] == [1, 2, 3, 4] and len(kinds.kinds) == 1
    shown = [s.pictures[0] for s in samples if s.pictures]
    assert all(torch.equal(picture.image, pixels(encoded(i))) for i, picture in enumerate(shown))


def test_conversations_of_roles_and_parts(tmp_path, pictures):
    doc = {"image": ["coco/1.png"], "messages": [
        {"role": "user", "content": "<|image|>Read it."}, {"role": "assistant", "content": "ABC"}]}  # fmt: skip
    parts = {"images": ["coco/2.png"], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "D"}]}]}  # fmt: skip
    (tmp_path / "doc.jsonl").write_text(json.dumps(doc) + "\n" + json.dumps(parts))
    samples, skipped = read(SourceConfig("llava", str(tmp_path / "doc.jsonl"), images=str(pictures), name="doc"))
    assert not skipped and [told(s) for s in samples] == [
        [("user", ["doc/coco/1.png", "Read it."]), ("assistant", ["ABC"])],
        [("user", ["And", "doc/coco/2.png"]), ("assistant", ["D"])],
    ]


def test_cauldron_rounds(tmp_path):
    texts = [
        {"user": "Count them.\n", "assistant": "2", "source": "x"},
        {"user": "Sure?", "assistant": "Yes", "source": "x"},
    ]
    columns = {"images": [[struct(0), struct(1)], [struct(2)]], "texts": [texts, [{**texts[0], "assistant": None}]]}
    path = write_table(tmp_path / "c.parquet", columns)
    samples, skipped = read(SourceConfig("cauldron", path))
    assert told(samples[0]) == [
        ("user", [f"{path}/0/0", f"{path}/0/1", "Count them.\n"]), ("assistant", ["2"]),
        ("user", ["Sure?"]), ("assistant", ["Yes"])]  # fmt: skip
    assert torch.equal(samples[0].pictures[1].image, pixels(encoded(1)))
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}/1:")


@pytest.mark.parametrize("names", [("original_image", "edit_prompt", "edited_image"),
                                   ("src_img", "edited_prompt_list", "edited_img")])  # fmt: skip
def test_edits_keep_the_picture_they_were_made_of(tmp_path, names):
    words = ["make it blue"] * 2 if names[1] == "edit_prompt" else [["make it blue"], ["make it blue", "blue please"]]
    columns = dict(zip(names, ([struct(0), struct(1)], words, [struct(2), {"bytes": b"x", "path": None}]), strict=True))
    path = write_table(tmp_path / "e.parquet", columns)
    samples, skipped = read(SourceConfig("edit", path))
    assert told(samples[0]) == [("user", ["make it blue", f"{path}/0/before"]), ("assistant", [f"{path}/0/after"])]
    before, after = samples[0].pictures
    assert after.edited is before and samples[0].task == "edit"
    assert torch.equal(before.image, pixels(encoded(0))) and torch.equal(after.image, pixels(encoded(2)))
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}/1/after")


def test_documents_tell_words_and_pictures_in_turn(tmp_path):
    columns = {"images": [[None, struct(0), None, {"bytes": b"x", "path": None}, None, struct(1), None, struct(2)]],
               "texts": [["one", None, "two", None, "three", None, "four", None]]}  # fmt: skip
    path = write_table(tmp_path / "o.parquet", columns)
    samples, skipped = read(SourceConfig("obelics", path, pictures=2))
    parts = ["one", f"{path}/0/1", "two\n\nthree", f"{path}/0/5", "four"]
    assert told(samples[0]) == [("assistant", parts)] and samples[0].draws
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}/0/3:")
    prompted, _ = read(SourceConfig("obelics", path, pictures=1, prompts=["tell a story"]))
    assert told(prompted[0])[0] == ("user", ["tell a story"]) and len(prompted[0].pictures) == 1


def test_addresses_are_looked_up_in_what_img2dataset_loaded(tmp_path):
    urls = ["https://a.org/1.jpg", "https://a.org/2.jpg"]
    columns = {"images": [[urls[0], None], [urls[1], None]], "texts": [[None, "bee"], [None, "fly"]]}
    path = write_table(tmp_path / "o.parquet", columns)
    (tmp_path / "loaded/00000").mkdir(parents=True)
    (tmp_path / "loaded/00000/000000000.jpg").write_bytes(encoded(5, "JPEG"))
    status = {"url": urls, "key": ["000000000", "000000001"], "status": ["success", "failed_to_download"]}
    write_table(tmp_path / "loaded/00000.parquet", status)
    samples, skipped = read(SourceConfig("obelics", path, images=str(tmp_path / "loaded"), name="obelics"))
    assert told(samples[0]) == [("assistant", ["obelics/00000/000000000.jpg", "bee"])]
    assert torch.equal(samples[0].pictures[0].image, pixels(encoded(5, "JPEG")))
    assert urls[1] in skipped[0] and "none of its pictures" in skipped[1]


def test_plain_text_is_told_and_cut(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [{"text": "a plain text"}, chat, {"text": " "}, [1]])))
    samples, skipped = read(SourceConfig("text", str(tmp_path / "a.jsonl")))
    assert [told(s) for s in samples] == [
        [("assistant", ["a plain text"])], [("user", ["Hello"]), ("assistant", ["Hi"])]]  # fmt: skip
    assert {s.task for s in samples} == {"text"} and len(skipped) == 2
    (tmp_path / "b.txt").write_text("first line\nsecond line\n\n \n" + "word " * 30 + "\n")
    samples, _ = read(SourceConfig("text", str(tmp_path / "b.txt"), characters=40))
    said = [s.messages[0].content[0] for s in samples]
    assert said[0] == "first line\nsecond line" and all(len(text) <= 40 for text in said)
    assert " ".join(said[1:]).split() == ["word"] * 30 and len({s.name for s in samples}) == len(samples)


def test_mistakes_name_the_option(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metadata.jsonl").write_text("{}")
    for config, message in (
        (SourceConfig("wds", "x"), "unknown format 'wds'; the formats are webdataset, folder"),
        (SourceConfig("webdataset", "nowhere/{0..3}.tar"), "no file nowhere/0.tar"),
        (SourceConfig("webdataset", f"{tmp_path}/*.tar"), r"no file .*\*\.tar"),
        (SourceConfig("webdataset", str(tmp_path)), "no file in it that ends with .tar"),
        (SourceConfig("webdataset", f"{tmp_path}/a.json", task="vqa"), "unknown task 'vqa'"),
        (SourceConfig("llava", f"{tmp_path}/a.json", columns={"picture": "x"}), "unknown columns picture"),
        (SourceConfig("llava", f"{tmp_path}/a.json", images="nowhere"), "no folder nowhere"),
        (SourceConfig("folder", f"{tmp_path}/a.json", task="text_to_image", prompts=["draw"]), "no {} where"),
        (SourceConfig("codes", str(tmp_path), task="text_to_image", prompts=["draw"]), "no {} where"),
        (SourceConfig("folder", str(tmp_path), captions=[]), "captions are empty"),
        (SourceConfig("folder", str(tmp_path)), f"metadata.jsonl tells of pictures; give {tmp_path}/train as path"),
        (SourceConfig("folder", f"{tmp_path}/a.bin"), "no file .*a.bin"),
    ):
        with pytest.raises(UserError, match=rf"--data.sources.*{message}"):
            open_source(config, SIZE)


def test_chats_of_every_kind_are_encoded_with_what_the_assistant_says_learnt(tmp_path, pictures):
    """The turns are such as the processor takes: a document has no user, a text looks like a special token."""
    from tests import tiny  # the other tests need no model

    processor = tiny.mllm()[1]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<|im_end|> <image_gen_start>"}))
    (tmp_path / "b.json").write_text(json.dumps(LLAVA))
    for config in (SourceConfig("text", str(tmp_path / "a.jsonl")),
                   SourceConfig("llava", str(tmp_path / "b.json"), images=str(pictures))):  # fmt: skip
        for sample in read(config)[0]:
            tokens = processor.encode(sample, pictures=False)
            special = (tokens.ids == processor.draw_start_id).sum()
            assert special == 0 and (tokens.labels >= 0).any()
            learnt = processor.decode(tokens.labels[tokens.labels >= 0])
            assert all(p in learnt for m in sample.messages if m.role == "assistant" for p in m.content)
    assert set(FORMATS) == {"webdataset", "folder", "parquet", "llava", "cauldron", "edit", "obelics", "text"}
