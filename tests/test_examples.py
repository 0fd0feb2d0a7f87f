"""The example scripts, run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualtoken.cli import main
from dualtoken.data.tar_shards import index_tar
from dualtoken.mllm.assistant import Assistant

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_scenes_as_shards_are_written_once_and_read_back(tmp_path, capsys):
    call = ["data", "scenes", str(tmp_path / "s"), "--images", "5", "--size", "16", "--shard_size", "2"]
    assert main(call) == 0
    shards = sorted((tmp_path / "s").glob("*.tar"))
    assert [len(index_tar(shard).samples) for shard in shards] == [2, 2, 1]
    before = {shard: shard.read_bytes() for shard in shards}
    shards[1].unlink()
    shards[0].write_bytes(b"kept")
    assert main(call) == 0
    assert shards[1].read_bytes() == before[shards[1]] and shards[0].read_bytes() == b"kept"
    assert main(["data", "inspect", str(shards[2])]) == 0
    assert "00000004" in capsys.readouterr().out
    assert main([*call[:4], "0"]) == 2


@pytest.mark.slow
def test_the_whole_miniature_from_shards_on_two_processes(tmp_path):
    """Encoder, tokenizer, codes and four stages, a few steps each; the script goes on where it was stopped."""
    settings = {"PROCESSES": "2", "SHORT": "1", "OUT": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for _ in range(2):
        done = subprocess.run(
            [str(EXAMPLES / "whole_miniature.sh")], env=os.environ | settings | {"PATH": path},
            capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert "stage 4-2 is done" in done.stdout
    model = tmp_path / "mllm/stage-4-2/model"
    assert len(list((tmp_path / "codes").glob("*.tar"))) == 4
    assert Assistant.open(str(model)).draw(["a red star"])[0][0].size == (48, 48)
    assert len(list((tmp_path / "drawings").glob("*.png"))) == 1
