import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.app import bulk
from dualtoken.app.bulk import BulkConfig, Encoder
from dualtoken.cli import main
from dualtoken.core.codes import DualCodes
from dualtoken.core.images import fit_image, image_bytes, to_float
from dualtoken.data.code_shards import CodeSample, CodeShard
from dualtoken.tokenizer.fingerprint import fingerprint
from tests import tiny

MODEL = ["--workers", "0", "--batch_size", "4"]


def png(number, size=20):
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def write_shard(path, numbers, size=20, broken=()):
    """A shard of pictures with texts; those in `broken` end in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            picture = png(number, size)
            picture = picture[: len(picture) // 2] if number in broken else picture
            for name, content in ((f"{number:06d}.png", picture), (f"{number:06d}.txt", b"picture %d" % number)):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards: one with a broken picture, one cut off inside its sixth picture, one whole."""
    write_shard(tmp_path / "in/000.tar", range(0, 10), broken=(3,))
    write_shard(tmp_path / "in/001.tar", range(10, 20))
    content = (tmp_path / "in/001.tar").read_bytes()
    (tmp_path / "in/001.tar").write_bytes(content[: content.index(b"000015.png") + 700])
    write_shard(tmp_path / "in/002.tar", range(20, 27))
    return tmp_path / "in"


def encode(path, output, *options, model=None):
    return main(["encode", str(path), "--out", str(output), "--model", model or str(tiny.tokenizer_directory()),
                 *MODEL, *options])  # fmt: skip


def files(folder):
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def numbers(folder):
    """The pictures of all shards of codes, as read."""
    found = [s for place in sorted(folder.glob("*.tar")) for s in CodeShard(place)]
    assert all(isinstance(s, CodeSample) and s.text == f"picture {int(s.key)}" for s in found)
    return [int(s.key) for s in found]


READABLE = [*(i for i in range(10) if i != 3), *range(10, 15), *range(20, 27)]


def test_what_can_be_read_is_encoded_and_the_rest_counted_and_listed(shards, tmp_path, capsys):
    assert encode(shards, tmp_path / "out") == 0
    assert numbers(tmp_path / "out") == READABLE
    summaries = {n: json.loads((tmp_path / f"out/{n}.json").read_text()) for n in ("000", "001", "002")}
    assert [s["encoded"] for s in summaries.values()] == [9, 5, 7]
    assert [len(s["skipped"]) for s in summaries.values()] == [1, 0, 0]
    assert summaries["000"]["skipped"][0]["name"] == "000003" and "damaged" in summaries["000"]["skipped"][0]["reason"]
    assert [bool(s["damage"]) for s in summaries.values()] == [False, True, False]
    text = capsys.readouterr().out
    assert "21 pictures of 3 shards" in text and "skipped 1 pictures" in text and "000.tar:000003: " in text
    assert "1 shards are damaged" in text and "001.tar: cut off or damaged: ends inside 000015.png" in text
    tokenizer = tiny.tokenizer()
    assert summaries["000"]["tokenizer"] == fingerprint(tokenizer)
    (sample,) = (s for s in CodeShard(tmp_path / "out/000.tar") if s.key == "000004")
    pixels = image_bytes(fit_image(Image.open(io.BytesIO(png(4))), tiny.SIZE))
    wanted = tokenizer.encode(to_float(pixels[None]))
    assert torch.equal(sample.codes.pixel, wanted.pixel) and torch.equal(sample.codes.semantic, wanted.semantic)


def test_workers_change_nothing_and_finished_shards_are_passed_over(shards, tmp_path, monkeypatch, capsys):
    assert encode(shards / "{000..002}.tar", tmp_path / "one") == 0
    assert encode(str(shards / "*.tar"), tmp_path / "two", "--workers", "2") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    capsys.readouterr()
    (tmp_path / "two/001.json").unlink()  # as where a run was killed between the two files
    before = {n: os.stat(tmp_path / f"two/{n}.tar").st_ino for n in ("000", "001", "002")}
    assert encode(shards, tmp_path / "two") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert [os.stat(tmp_path / f"two/{n}.tar").st_ino == i for n, i in before.items()] == [True, False, True]
    assert "3 shards, 2 of them before" in capsys.readouterr().out
    monkeypatch.setattr(bulk, "index_tar", None)  # nothing is read where all is done
    assert encode(shards, tmp_path / "two") == 0


def test_half_precision_gives_codes_and_is_kept_apart(shards, tmp_path, capsys):
    assert encode(shards / "002.tar", tmp_path / "full") == 0
    assert encode(shards / "002.tar", tmp_path / "half", "--precision", "bf16") == 0
    assert numbers(tmp_path / "half") == list(range(20, 27))
    first, second = (DualCodes.cat([s.codes for s in CodeShard(tmp_path / n / "002.tar")]) for n in ("full", "half"))
    same = (first.pixel[..., 0] == second.pixel[..., 0]).float().mean()
    assert same > 0.5  # rounding moves a code here and there
    assert encode(shards / "002.tar", tmp_path / "full", "--precision", "bf16") == 2
    assert "another precision (no there, bf16 here)" in capsys.readouterr().err


def test_another_tokenizer_another_source_and_other_mistakes_are_one_line(shards, tmp_path, capsys):
    def fails(words, *arguments, **options):
        assert encode(*arguments, **options) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]

    place = shards / "002.tar"
    assert encode(place, tmp_path / "out") == 0
    before = files(tmp_path / "out")
    fails("was made with another tokenizer", place, tmp_path / "out", model=str(tiny.tokenizer_directory(seed=1)))
    write_shard(place, range(20, 40))
    fails("was made with another source_bytes", place, tmp_path / "out")
    assert files(tmp_path / "out") == before
    fails("would replace the shard", place, shards)
    fails("is the folder of the shards", shards, shards)
    fails("no shard", shards / "{002..009}.tar", tmp_path / "new")
    fails("--engine ray: is for shards", shards.parent / "nowhere.png", tmp_path / "new", "--engine", "ray")
    assert main(["encode", str(shards)]) == 2 and "--output: give the folder" in capsys.readouterr().err
    (tmp_path / "out/002.json").write_text("{}")
    fails("is no summary", place, tmp_path / "out")
    (shards / "x.png").write_bytes(png(1))
    fails("holds pictures and shards", shards, tmp_path / "new")
    write_shard(tmp_path / "bad.tar", range(2), broken=(0, 1))
    fails("no picture could be used of 1 shards", tmp_path / "bad.tar", tmp_path / "bad")
    fails("--batch_size 0: give at least 1", place, tmp_path / "new", "--batch_size", "0")
    fails("--workers -1: give at least 0", place, tmp_path / "new", "--workers", "-1")
    assert not (tmp_path / "new").exists()


def test_shards_below_a_folder_keep_their_places_and_output_inside_is_no_input(tmp_path):
    for i, name in enumerate(("a/0.tar", "b/0.tar")):
        write_shard(tmp_path / "in" / name, range(4 * i, 4 * i + 4))
    for _ in range(2):
        assert encode(tmp_path / "in", tmp_path / "in/codes") == 0
        assert sorted(files(tmp_path / "in/codes")) == ["a/0.json", "a/0.tar", "b/0.json", "b/0.tar"]


def test_a_shard_that_cannot_be_read_ends_the_run_and_skips_nothing(shards, tmp_path, monkeypatch, capsys):
    def shorter(path):
        index = real(path)
        Path(path).write_bytes(Path(path).read_bytes()[:2000])  # after its headers were read
        return index

    real = bulk.index_tar
    monkeypatch.setattr(bulk, "index_tar", shorter)
    assert encode(shards / "002.tar", tmp_path / "out") == 2 and "expected" in capsys.readouterr().err
    assert files(tmp_path / "out") == {}


def test_the_fingerprint_is_of_what_makes_codes():
    tokenizer = tiny.tokenizer()
    before = fingerprint(tokenizer)
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).add_(1)
    assert fingerprint(tokenizer) == before == fingerprint(tiny.tokenizer()) != fingerprint(tiny.tokenizer(seed=1))
    with torch.no_grad():
        tokenizer.semantic.quantizer.codebook.weight[3, 2] += 1e-3
    assert fingerprint(tokenizer) != before


KILLS = """
import os, pathlib, random, signal, sys, time
from dualtoken.cli import main
from dualtoken.app import bulk, files

output, killed = pathlib.Path(sys.argv[1]), 0
while killed < 4:
    child = os.fork()  # before torch has started a thread
    if child == 0:
        os._exit(main(sys.argv[2:]))
    while not (drafts := list(output.glob(f".*.{child}.draft"))) and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.001)
    if not drafts:
        break  # it ended
    time.sleep(random.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print("killed", killed)
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"in/{i}.tar", range(12 * i, 12 * i + 12), size=700)  # some 0.2 s a shard
    assert encode(tmp_path / "in", tmp_path / "whole") == 0
    command = ["encode", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *MODEL,
               "--model", str(tiny.tokenizer_directory())]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "out"), *command], capture_output=True, text=True
    )
    assert done.returncode == 0 and "killed 0" not in done.stdout, done.stderr
    assert "killed" in done.stdout and encode(tmp_path / "in", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")  # no draft is left either
    assert numbers(tmp_path / "out") == list(range(36))


def test_two_processes_of_accelerate_give_the_files_of_one(shards, tmp_path):
    assert encode(shards, tmp_path / "one") == 0
    # Its launcher of many processes goes by the name of GPUs; without one the processes meet on the CPU.
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no",
               "main_process_port": 0}  # fmt: skip
    options = ["--multi_gpu", *(f"--{name}={value}" for name, value in options.items())]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    (tmp_path / "run.py").write_text("import sys\nfrom dualtoken.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), "encode", str(shards), "--out", str(tmp_path / "two"),
         "--model", str(tiny.tokenizer_directory()), *MODEL], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: 16 pictures of 2 shards" in done.stdout
    assert "process 1 of 2: 5 pictures of 1 shards" in done.stdout
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_decode_writes_pictures_and_texts_of_shards(shards, tmp_path, capsys):
    assert encode(shards, tmp_path / "codes") == 0
    model = str(tiny.tokenizer_directory())
    assert main(["decode", str(tmp_path / "codes/002.tar"), "--output", str(tmp_path / "p"), "--model", model]) == 0
    found = files(tmp_path / "p")
    assert len(found) == 14 and found["000023.txt"] == b"picture 23\n"
    tokenizer = tiny.tokenizer()
    (sample,) = (s for s in CodeShard(tmp_path / "codes/002.tar") if s.key == "000023")
    shown = image_bytes(Image.open(tmp_path / "p/000023.png"))
    assert (to_float(shown) - tokenizer.decode(sample.codes)[0]).abs().max() < 0.02
    assert main(["decode", str(tmp_path / "codes"), "--output", str(tmp_path / "q"), "--model", model]) == 0
    assert len(files(tmp_path / "q")) == 42 and (tmp_path / "q/000/000000.png").is_file()
    (tmp_path / "codes/001.tar").write_bytes(b"")
    capsys.readouterr()
    assert main(["decode", str(tmp_path / "codes"), "--output", str(tmp_path / "s"), "--model", model]) == 0
    assert len(files(tmp_path / "s")) == 42 - 10 and "skipped: " in capsys.readouterr().out
    assert main(["decode", str(tmp_path / "codes/002.tar"), "--output", str(tmp_path / "r")]) == 2
    assert "give the tokenizer that made them with --model" in capsys.readouterr().err


def test_inspect_shows_counts_and_writes_a_grid(shards, tmp_path, capsys):
    assert encode(shards, tmp_path / "codes") == 0
    capsys.readouterr()
    model = ["--model", str(tiny.tokenizer_directory())]
    grids = {}
    for name in ("in", "codes"):
        place = tmp_path / f"look-{name}"
        assert main(["data", "inspect", str(tmp_path / name), "--out", str(place), "-n", "6", *model]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        table = {row[0]: row for row in rows if row and row[0].endswith(".tar")}
        kind = "codes" if name == "codes" else "pictures"
        counts = [row[row.index(kind) + 1 :] if kind in row else row[3:] for row in table.values()]
        assert [c[0] for c in counts] == (["9", "5", "7"] if name == "codes" else ["10", "5", "7"])
        assert [c[2] for c in counts] == (["1", "0", "0"] if name == "codes" else ["-"] * 3)
        text = "\n".join(" ".join(row) for row in rows)
        assert ("damaged: 001.tar" in text) == (name == "in") and "000000: picture 0" in text
        grids[name] = np.array(Image.open(place / "grid.png").convert("RGB"))
    assert grids["in"].shape == grids["codes"].shape and grids["codes"].std() > 20
    assert (grids["in"] != grids["codes"]).any()
    assert main(["data", "inspect", str(tmp_path / "in"), "-n", "2"]) == 0  # a table alone needs no model
    assert main(["data", "inspect", str(shards.parent / "nothing")]) == 2
    assert main(["data", "inspect", str(tmp_path / "codes"), "--out", str(tmp_path / "x")]) == 2
    assert "give the tokenizer that made them" in capsys.readouterr().err


def test_codes_of_the_bundled_model_have_its_shape():
    found = Encoder(BulkConfig(), "cpu").format
    assert found.pixel == found.semantic == (36, 4) and found.size == 2 * 2 * 36 * 4


def test_ray_gives_the_same_files_and_a_killed_actor_is_made_good(tmp_path):
    ray = pytest.importorskip("ray")
    for i in range(6):
        write_shard(tmp_path / f"in/{i}.tar", range(12 * i, 12 * i + 12), size=700)
    assert encode(tmp_path / "in", tmp_path / "one") == 0
    victims = []

    def kill_the_first_seen():
        while not victims:
            for draft in tmp_path.glob("two/.*.tar.*.draft"):
                victims.append(int(re.search(r"\.(\d+)\.draft$", draft.name)[1]))
                os.kill(victims[0], signal.SIGKILL)
                return
            time.sleep(0.001)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        threading.Thread(target=kill_the_first_seen, daemon=True).start()
        assert encode(tmp_path / "in", tmp_path / "two", "--engine", "ray", "--processes", "2") == 0
    finally:
        ray.shutdown()
    assert victims and victims[0] != os.getpid()
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_without_ray_the_error_names_the_extra(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert encode(shards, tmp_path / "out", "--engine", "ray") == 2
    assert "pip install 'dualtoken[ray]'" in capsys.readouterr().err
