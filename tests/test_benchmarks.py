"""The benchmarks at tiny size: every case runs, and what is written says what was measured."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import quantizer, report
from benchmarks.__main__ import NAMES, PAGE, ROOT, cases
from benchmarks.measure import Case, Options, Work, measure
from benchmarks.plain_quantizer import PlainResidualQuantizer
from dualtoken.tokenizer.quantizer import QuantizerConfig, ResidualQuantizer

TINY = Options("tiny", repeats=1, seconds=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_every_case_runs_and_every_group_has_one_of_ours(name):
    if name == "quantizer":
        pytest.importorskip("vector_quantize_pytorch")
    made = cases(name, TINY)
    for case in made:
        found = measure(case, TINY)
        assert found.median > 0 and found.extra_mib >= 0
    for group in {case.group for case in made}:
        assert [case.role for case in made if case.group == group].count("ours") == 1


def test_the_full_benchmarks_are_what_the_targets_name():
    full = [case for name in NAMES for case in cases(name, Options())]
    rows = {case.rows for case in cases("quantizer", Options()) if case.series == "D 8, ours"}
    assert rows == {1024 * 4**k for k in range(6)}  # 1k to 1M
    gpu = cases("drawing", Options(device="cuda"))
    assert {"ours, graph", "ours, compiled", "one vocabulary alone (pixel)"} <= {case.name for case in gpu}
    assert {1, 32} <= {case.rows for case in gpu}
    assert max(case.rows for case in cases("quantizer", Options(largest=4096))) == 4096
    assert len({(case.group, case.name) for case in full}) == len(full)


def sleeping():
    return Work(lambda: (time.sleep(0.02), torch.ones(2**23)))  # 32 MiB


def test_time_and_repeats_are_those_of_the_work():
    found = measure(Case("", "", "ours", sleeping), Options(repeats=3, seconds=1))
    assert len(found.seconds) == 3 and 0.02 <= found.median < 0.5
    slow = measure(Case("", "", "ours", sleeping, rounds=1), Options(repeats=3, seconds=0.001))
    assert len(slow.seconds) == 1


def test_memory_is_that_of_the_work():
    """In a process of its own, as the benchmarks run it: one that has freed memory takes that first."""
    lines = """
        from benchmarks.measure import Case, Options, measure
        from tests.test_benchmarks import sleeping
        print(measure(Case("", "", "ours", sleeping), Options(repeats=3, seconds=1)).extra_mib)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert 30 < float(done.stdout) < 80


def test_the_plain_quantiser_is_the_same_quantiser():
    torch.manual_seed(0)
    ours = ResidualQuantizer(QuantizerConfig(codebook_size=32, code_dim=8, depth=3, restart_below=0.0)).train()
    plain = PlainResidualQuantizer(32, 8, 3)
    for name, mine in (("weight", "weight"), ("counts", "cluster_size"), ("sums", "embed_sum")):
        getattr(plain, name).copy_(getattr(ours.codebook, mine))
    x = torch.randn(1, 40, 8)
    assert torch.equal(plain.encode(x[0]), ours.encode(x)[0])
    found, (value, commitment) = ours(x), plain(x[0])
    torch.testing.assert_close(value, found.quantized[0])
    torch.testing.assert_close(commitment, found.commitment)
    # One update a depth there, one for all depths here: the same counts, decayed more often.
    assert plain.counts.argmax() == ours.codebook.cluster_size.argmax()
    assert not torch.equal(plain.weight, ours.codebook.weight)


def test_codes_that_differ_are_counted_and_ties_told_apart():
    torch.manual_seed(0)
    rvq = ResidualQuantizer(QuantizerConfig(codebook_size=32, code_dim=8, depth=2)).eval()
    x = torch.randn(1, 50, 8)
    told = {"codes": 100, "unlike all distances at once": 0, "of these ties": 0}
    assert quantizer.agreement(rvq, x) == told
    rvq.encode = lambda x, real=rvq.encode: (real(x) + 1) % 32  # all wrong, and none a tie
    assert quantizer.agreement(rvq, x) == told | {"unlike all distances at once": 100}


def test_a_reference_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a checkout of songweii/DualToken"):
        quantizer.load(tmp_path)


def test_the_command_writes_table_and_json(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "startup", "--size", "tiny", "--repeats", "2", "--output", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    told = json.loads((tmp_path / "startup-cpu.json").read_text())
    assert [case["role"] for case in told["cases"]] == ["ours", "limit"]
    assert len(told["cases"][0]["seconds"]) == 2 and told["torch"] == torch.__version__ and told["commit"]
    text = (tmp_path / "startup-cpu.md").read_text()
    assert "| dualtoken --help |" in text and "*limit: Python doing nothing*" in text
    unknown = subprocess.run([*command[:3], "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert unknown.returncode == 2 and "no benchmark 'nothing'" in unknown.stderr


def result(name, role, seconds, extra, rows=0, series=""):
    middle = sorted(seconds)[len(seconds) // 2]
    return {"group": "g", "name": name, "role": role, "seconds": seconds, "median": middle, "extra_mib": extra,
            "units": 10, "unit": "rows", "rows": rows, "series": series, "facts": {}}  # fmt: skip


def test_ratios_are_to_ours_with_the_range_of_the_repeats():
    found = report.table([
        result("ours", "ours", [1.0, 2.0, 4.0], 10), result("other", "reference", [10.0, 20.0, 40.0], 200),
        {"group": "g", "name": "third", "role": "reference", "error": "failed: no room"},
    ])  # fmt: skip
    assert "| other | 20 (10 to 40) | 10 (2.5 to 40) | 200 | 20 | 0.5 rows/s |" in found
    assert "| ours | 2 (1 to 4) |  | 10 |  | 5 rows/s |" in found
    assert "| third | failed: no room |" in found


def test_growth_is_plotted_and_the_page_has_a_place_for_every_table(tmp_path):
    lines = [result("ours", "ours", [float(n)], n, n, "ours") for n in (1, 2)]
    assert report.plot(lines, tmp_path / "a.svg", "a") and (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert not report.plot(lines[:1], tmp_path / "b.svg", "b")
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    for name in NAMES:
        for device in ("cpu", "gpu") if name in ("quantizer", "losses", "tokenizer", "drawing") else ("cpu",):
            report.insert(page, f"{name}-{device}", f"new {name} on {device}")
            assert page.read_text().count(f"new {name} on {device}") == 1
    with pytest.raises(ValueError, match="no marks"):
        report.insert(page, "other", "")


def test_no_benchmark_reads_what_is_not_in_the_project():
    for file in Path(ROOT, "benchmarks").glob("*.py"):
        assert "/" + "work" not in file.read_text()
