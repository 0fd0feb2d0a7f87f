import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.core.errors import UserError
from dualtoken.data.images import DataConfig, ImageFolder, Shards, StepBatches, open_source, read_in_order, step_batches


def picture(value):
    return Image.new("RGB", (20, 14), (value, 10, 200))


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("cat/a.png", "cat/b.jpg", "dog/c.png", "d.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(40 * i).save(tmp_path / name)
    (tmp_path / "dog/c.txt").write_text("a dog on a sofa\n")
    (tmp_path / "dog/broken.png").write_bytes(b"\x89PNG nothing")
    return tmp_path


def test_folder_gives_labels_and_captions(folder):
    source = ImageFolder(folder, 16)
    found = {s.name.split("/")[-1]: s for s in (source[i] for i in (0, 1, 2, 4))}
    assert source.classes == ("cat", "dog")
    assert found["c.png"].caption == "a dog on a sofa" and found["a.png"].caption == "a cat"
    assert [found[n].label for n in ("a.png", "b.jpg", "c.png", "d.png")] == [0, 0, 1, -1]
    assert found["a.png"].image.shape == (3, 16, 16) and found["a.png"].image.dtype == torch.uint8


def test_reading_in_order_skips_and_names(folder, capsys):
    skipped = []
    batches = list(read_in_order(ImageFolder(folder, 16), 10, 3, skipped))
    assert [len(b.images) for b in batches] == [3, 1] and "broken.png" in skipped[0]
    assert "skipped 1 pictures" in capsys.readouterr().out
    labelled = list(read_in_order(ImageFolder(folder, 16), 10, 10, [], labelled=True))
    assert labelled[0].labels.tolist() == [0, 0, 1]
    for name in ("cat/a.png", "cat/b.jpg", "dog/c.png", "d.png"):
        (folder / name).write_text("no picture")
    with pytest.raises(UserError, match="no picture could be used"):
        list(read_in_order(ImageFolder(folder, 16), 10, 3, []))


def test_fewer_pictures_than_there_are_come_from_all_over_the_source(tmp_path):
    for name in "abcdef":
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a/0.png").write_text("no picture")
    source = ImageFolder(tmp_path, 16)
    for images, wanted in ((6, [1, 2, 3, 4, 5, 0]), (12, None)):  # what fills up for the broken one comes last
        labels = torch.cat([b.labels for b in read_in_order(source, images, 4, [])]).tolist()
        assert len(labels) == images and set(labels) == set(range(6))
        assert wanted is None or labels == wanted


def write_shard(path, names, cut=None):
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            image = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(noise).save(image, "PNG")
            for suffix, data in (("png", image.getvalue()), ("txt", f"text {name}".encode()), ("cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if cut:
        path.write_bytes(path.read_bytes()[:cut])


def test_shards_give_pictures_captions_labels(tmp_path):
    write_shard(tmp_path / "s-000.tar", ["a", "b"])
    write_shard(tmp_path / "s-001.tar", ["c"])
    for pattern in ("s-{000..001}.tar", "s-*.tar", ""):  # the last: their folder
        source = open_source(DataConfig(str(tmp_path / pattern)), 16)
        assert len(source) == 3 and source.classes == ("0", "1")
        assert [source[i].caption for i in range(3)] == ["text a", "text b", "text c"]
        assert [source[i].label for i in range(3)] == [0, 1, 0]
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    whole = Shards(str(tmp_path / "s-000.tar"), 40)[0].image
    assert torch.equal(whole, torch.from_numpy(noise).permute(2, 0, 1))


def test_a_shard_that_is_cut_off_gives_what_is_whole(tmp_path):
    write_shard(tmp_path / "b.tar", ["a", "b", "c"], cut=10_000)  # inside the second picture
    source = Shards(str(tmp_path / "b.tar"), 16)
    (damage,) = source.damaged
    assert damage.startswith(f"{tmp_path / 'b.tar'}: cut off or damaged: ") and len(source) == 1
    assert source[0].caption == "text a"


def test_missing_and_empty_sources_name_the_option(tmp_path):
    with pytest.raises(UserError, match=r"--data.source .*no shard"):
        open_source(DataConfig(str(tmp_path / "x-{0..1}.tar")), 16)
    with pytest.raises(UserError, match=r"--data .*no picture in it"):
        open_source(DataConfig(str(tmp_path)), 16, option="--data")


def test_photographs_are_there():
    source = open_source(DataConfig("photographs"), 16)
    assert len(source) == 14 and len({source[i].image.float().mean().item() for i in range(14)}) == 14


def test_batches_are_a_function_of_the_step(folder):
    (folder / "dog/broken.png").unlink()
    for source in (ImageFolder(folder, 16), open_source(DataConfig("scenes"), 16)):
        batches = StepBatches(source, 2, seed=3)
        wanted = [batches[i].names for i in range(6)]
        for workers in (0, 2):
            again = [b.names for b in step_batches(StepBatches(source, 2, seed=3), 2, 6, workers)]
            assert again == wanted[2:]
        halves = [StepBatches(source, 1, 3, rank, 2)[1].names for rank in (0, 1)]
        assert halves[0] + halves[1] == wanted[1]


def test_an_epoch_meets_every_picture_once_and_the_next_is_in_another_order(folder):
    (folder / "dog/broken.png").unlink()
    batches = StepBatches(ImageFolder(folder, 16), 4, seed=0)
    epochs = [batches[i].names for i in range(6)]
    assert len({tuple(sorted(names)) for names in epochs}) == 1 and len({tuple(names) for names in epochs}) > 1


def test_unreadable_pictures_are_replaced_and_counted(folder):
    batches = StepBatches(ImageFolder(folder, 16), 5, seed=0)
    batch = batches[0]
    assert len(batch.images) == 5 and any("broken.png" in line for line in batch.skipped)
    for file in folder.rglob("*.*g"):
        file.write_text("no picture")
    with pytest.raises(UserError, match="100 pictures in a row"):
        StepBatches(ImageFolder(folder, 16), 2, seed=0)[0]


UNFINISHED = """
from torch.utils.data import DataLoader
from dualtoken.data.images import outlive_sigterm
loader = iter(DataLoader(range(100), num_workers=1, worker_init_fn=outlive_sigterm))
next(loader)
type(loader).__del__ = loader._shutdown_workers = lambda *_: None  # as where a reader is never closed
"""


def test_python_ends_where_a_loading_process_was_never_closed():
    done = subprocess.run([sys.executable, "-c", UNFINISHED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
