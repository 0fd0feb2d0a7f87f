import pytest
import torch

from dualtoken.core.checkpoint import latest_state, load_state, save_state
from dualtoken.core.errors import UserError


def test_a_nested_state_comes_back_as_it_was(tmp_path):
    shared = torch.randn(3)
    state = {"a": {0: shared, "b": [shared, None, 2, 1.5, "x", True]}, "n": torch.tensor(7), "h": torch.ones(2).half()}
    found = load_state(save_state(tmp_path, 1, state))
    assert set(found["a"]) == {0, "b"}
    assert torch.equal(found["a"][0], shared) and torch.equal(found["a"]["b"][0], shared)
    assert found["a"]["b"][1:] == [None, 2, 1.5, "x", True]
    assert found["n"] == 7 and found["h"].dtype == torch.float16


def test_the_newest_are_kept_and_drafts_of_killed_runs_go(tmp_path):
    (tmp_path / ".step-00000001.99").mkdir()
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("harm", ["cut tensors", "cut json", "no json"])
def test_a_damaged_state_is_passed_over(tmp_path, harm, capsys):
    for step in (1, 2):
        save_state(tmp_path, step, {"x": torch.full((100,), float(step))})
    newest = tmp_path / "step-00000002"
    target = newest / ("state.safetensors" if "tensors" in harm else "state.json")
    target.write_bytes(target.read_bytes()[:60])
    if harm == "no json":
        target.unlink()
    place, state = latest_state(tmp_path)
    assert place.name == "step-00000001" and state["x"][0] == 1
    assert "step-00000002" in capsys.readouterr().out
    with pytest.raises(UserError, match="step-00000002"):
        load_state(newest)


def test_nothing_there_is_none(tmp_path):
    assert latest_state(tmp_path / "nowhere") is None
