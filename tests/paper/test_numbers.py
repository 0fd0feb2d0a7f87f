import pytest

from dualtoken.core.errors import UserError
from dualtoken.paper.numbers import paper_figure, paper_figures, paper_table, paper_tables

# id -> rows, in the paper's order
ROWS = {"table1": 22, "table2": 3, "table3": 6, "table4": 4, "table5a": 24, "table5b": 12, "table6": 11, "table7": 18}
ROWS |= {"table8": 15, "table9": 16, "table10": 3, "table11": 2, "appendixD": 4, "table12": 15}
NUMBERS = 499  # that are printed in these tables
OWN = {"table3", "table7", "table8", "table9", "table11", "appendixD"}  # tables that do not name rows after the method
RANGES = {  # smallest and largest believable number of a unit
    "percent": (0, 100),
    "percent of the total score": (0, 100),
    "share": (0, 1),
    "VQAScore": (0, 1),
    "points": (500, 2800),
    "FID": (0.1, 30),
    "dB": (5, 50),
    "GB": (1, 1000),
    "s": (1, 60),
    "GFLOPs": (1, 1000),
    "millions": (1, 1000),
}
KNOWN = {("table1", "VILA-U (SigLIP-L/16-256)", "psnr")}  # 3.43 dB in the paper
DUAL, BOTH = "DualToken (SigLIP-So/14-384)", "DualToken (semantic + pixel)"

# (table, row, column) -> number as it is printed
PRINTED = {
    ("table1", DUAL, "rfid"): 0.25,  # the abstract: 0.25 rFID
    ("table1", DUAL, "zero_shot"): 82.0,  # and 82.0 % zero-shot
    ("table1", "DualToken (SigLIP-L/16-256)", "image_to_text"): 21.4,
    ("table1", "SigLIP-So/14-384", "text_to_image"): 21.7,
    ("table1", "QLIP (392px)", "ssim"): 0.690,
    ("table1", "VILA-U (SigLIP-L/16-256)", "psnr"): 3.43,
    ("table2", "VQVAE-based", "mme"): 792.0,
    ("table3", "(a)", "psnr"): 12.64,
    ("table3", "initial state, quantized", "zero_shot"): 82.4,
    ("table4", BOTH, "ocrb"): 29.2,
    ("table5a", "DualToken-7B (384px)", "mme"): 1625.0,
    ("table5a", "UniToken (384px)", "mathvista"): 38.5,
    ("table5b", "VILA-U", "negate"): 0.53,
    ("table6", "Dual encoder", "fid"): 17.55,
    ("table7", "CLIP-L/14-224 18/24", "zero_shot"): 65.5,
    ("table8", "DFN-H/14-224 24/32", "rfid"): 2.78,
    ("table9", "SigLIP2-So/16-256 6/27", "rfid"): 0.66,
    ("table10", "DualToken (MCQ)", "zero_shot"): 82.2,
    ("table11", "dual token", "inference_time"): 12.97,
    ("appendixD", "visual head", "parameters"): 258,
    ("table12", "DualToken-7B", "geneval"): 0.75,
}


def value(table, row, column):
    return paper_table(table).row(row).values[column]


def test_every_table_is_there_with_all_its_rows():
    assert [(id, len(table.rows)) for id, table in paper_tables().items()] == list(ROWS.items())
    for id, table in paper_tables().items():
        assert table.id == id and table.title and len({row.name for row in table.rows}) == len(table.rows)


def test_every_row_has_the_columns_of_its_table():
    for table in paper_tables().values():
        keys = [column.key for column in table.columns]
        assert len(set(keys)) == len(keys)
        assert all(list(row.values) == keys for row in table.rows)
        assert all(column.better in ("higher", "lower") for column in table.columns)
        assert table.id in OWN or all(row.ours == row.name.startswith("DualToken") for row in table.rows)


def test_numbers_are_believable_for_their_unit():
    numbers = 0
    for id, table in paper_tables().items():
        for row in table.rows:
            found = {column: row.values[column.key] for column in table.columns if row.values[column.key] is not None}
            assert found, f"{id}, {row.name}: nothing"
            for column, number in found.items():
                low, high = RANGES[column.unit]
                assert low <= number <= high or (id, row.name, column.key) in KNOWN, (id, row.name, column.key, number)
            numbers += len(found)
    assert numbers == NUMBERS


@pytest.mark.parametrize("place", PRINTED, ids="-".join)
def test_numbers_as_printed(place):
    assert value(*place) == PRINTED[place]


def test_a_dash_is_no_number():
    assert value("table1", "RQ-VAE", "psnr") is None  # a dash
    assert value("table1", DUAL.replace("DualToken", "VILA-U"), "ssim") is None
    assert value("table3", "(b)", "zero_shot") is None  # a cross


def test_numbers_agree_with_the_running_text():
    # Ten benchmarks, 5.8 points above VILA-U on average (abstract); the averages are those of the columns.
    assert value("table4", BOTH, "average") - value("table4", "VILA-U", "average") == pytest.approx(5.8)
    for row in paper_table("table4").rows:
        *ten, average = row.values.values()
        assert len(ten) == 10 and sum(ten) / 10 == pytest.approx(average, abs=0.051)
    # 13 % better than VILA-U on GenAI-Bench (abstract): of the same size and resolution.
    ratio = value("table5b", "DualToken-3B (256px)", "overall") / value("table5b", "VILA-U-3B (256px)", "overall")
    assert ratio == pytest.approx(1.13, abs=0.005)
    # The added parameters are 8.93 % of the LLM (appendix D.1), of Qwen2.5-3B's 3.09 billion.
    added = sum(row.values["parameters"] or 0 for row in paper_table("appendixD").rows)
    assert added / 3090 == pytest.approx(value("appendixD", "together", "share") / 100, abs=1e-4)
    # Highest SSIM and lowest rFID of all, best zero-shot of the unified tokenizers (section 4.1).
    table = paper_table("table1")
    for key, best in (("ssim", max), ("rfid", min)):
        assert value("table1", DUAL, key) == best(r.values[key] for r in table.rows if r.values[key] is not None)
    unified = [row for row in table.rows if row.group == "unified" and row.values["zero_shot"] is not None]
    assert max(unified, key=lambda row: row.values["zero_shot"]).ours


def test_tables_agree_where_they_print_the_same_model():
    last = paper_table("table3").row("(d)").values
    assert last.items() <= paper_table("table1").row(DUAL).values.items()
    assert value("table10", "UniTok", "rfid") == value("table1", "UniTok", "rfid")
    seen = {}
    for id in ("table7", "table8", "table9"):  # the same backbone and layer, the same numbers
        for row in paper_table(id).rows:
            assert row.name == "{backbone} {pixel_layer}/{layers}".format(**row.settings)
            assert seen.setdefault(row.name, row.values) == row.values
    assert len(seen) == 18 + 9 + 11  # 6 rows of Table 8 and 5 of Table 9 stand in the tables before


@pytest.mark.parametrize("id", ["table7", "table8"])
def test_the_first_quarter_of_layers_is_best_for_every_backbone(id):
    rows = paper_table(id).rows  # appendix B, in both numbers; each further quarter is worse
    for backbone in {row.settings["backbone"] for row in rows}:
        quarters = [row for row in rows if row.settings["backbone"] == backbone]
        assert [round(4 * row.settings["pixel_layer"] / row.settings["layers"]) for row in quarters] == [1, 2, 3]
        first, second, third = (row.values for row in quarters)
        assert first["rfid"] < second["rfid"] < third["rfid"]
        assert first["zero_shot"] > second["zero_shot"] > third["zero_shot"]


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UserError, match=r"no table 'table5'; did you mean .*table5b"):
        paper_table("table5")
    with pytest.raises(UserError, match="'umap'; there are fig3, fig5"):
        paper_figure("umap")
    with pytest.raises(UserError, match=r"table6 .* no row 'DualToken 3B'; did you mean DualToken-3B"):
        paper_table("table6").row("DualToken 3B")


def test_figures_have_a_claim_each():
    assert list(paper_figures()) == ["fig3", "fig5", "fig6", "fig7", "fig8"]
    assert all(figure.title and figure.claim.endswith(".") for figure in paper_figures().values())
    assert paper_figure("fig3").settings["shallow"] == [1, 7]
