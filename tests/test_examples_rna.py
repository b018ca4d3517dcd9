"""examples/rna.py: what the generator promises, and what the reader says of a file."""

import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import rna  # noqa: E402 (found only with the line above)

SAMPLE = ROOT.parent / "shared" / "data" / "ribonanza_sample.csv"


@pytest.fixture(scope="module")
def profiles():
    return rna.synthetic()


def test_about_1300_profiles_of_lengths_30_to_120(profiles):
    lengths = {len(profile.sequence) for profile in profiles}
    assert len(profiles) == 1300
    assert min(lengths) == 30
    assert max(lengths) == 120
    assert len(lengths) > 80
    for profile in profiles:
        assert len(profile.structure) == len(profile.sequence)
        assert profile.reactivity.shape == (len(profile.sequence),)
        assert profile.reactivity.dtype == np.float32


def test_a_seed_makes_the_same_profiles_and_another_seed_others():
    first, again, other = (
        [dataclasses.astuple(profile) for profile in rna.synthetic(5, seed=seed)]
        for seed in (7, 7, 8)
    )
    np.testing.assert_equal(first, again)
    assert [p[0] for p in first] != [p[0] for p in other]


def pairs(structure):
    opened = []
    for i, bracket in enumerate(structure):
        if bracket == "(":
            opened.append(i)
        elif bracket == ")":
            yield opened.pop(), i
    assert not opened


def test_brackets_match_and_join_bases_that_pair(profiles):
    counts = dict.fromkeys(("CG", "GC", "AU", "UA", "GU", "UG"), 0)
    for profile in profiles:
        assert set(profile.structure) <= set(".()")
        for i, j in pairs(profile.structure):
            counts[profile.sequence[i] + profile.sequence[j]] += 1
    shares = np.array(list(counts.values())) / sum(counts.values())
    # 20,000 pairs: three standard errors are 0.01
    np.testing.assert_allclose(shares, [0.26, 0.26, 0.19, 0.19, 0.05, 0.05], atol=0.01)


def test_the_grammar_closes_no_pair_on_fewer_than_two_symbols(profiles):
    # F -> (F) | LS: what a pair holds is another pair, or at least two symbols.
    for profile in profiles:
        assert "()" not in profile.structure
        assert "(.)" not in profile.structure


def test_half_of_the_positions_are_paired_as_in_the_grammar(profiles):
    structures = "".join(profile.structure for profile in profiles)
    # 0.50 in 1,300 others by an independent sampler, cut to the same lengths
    assert structures.count(".") / len(structures) == pytest.approx(0.5, abs=0.03)


def test_unpaired_bases_have_their_shares(profiles):
    unpaired = [
        base
        for profile in profiles
        for base, bracket in zip(profile.sequence, profile.structure, strict=True)
        if bracket == "."
    ]
    shares = [unpaired.count(base) / len(unpaired) for base in "ACGU"]
    # 40,000 bases: three standard errors are 0.007
    np.testing.assert_allclose(shares, [0.37, 0.16, 0.21, 0.26], atol=0.01)


def test_what_is_missing(profiles):
    shares = []
    for profile in profiles:
        missing = np.isnan(profile.reactivity)
        assert missing[-10:].all()
        read = np.array([base in "AC" for base in profile.sequence])
        if profile.experiment == 0:
            read[:] = True
        assert missing[~read].all()
        shares.append(missing[:-10][read[:-10]].mean())
    assert np.nanmean(shares) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("experiment", "base", "paired", "unpaired"),
    [
        (0, "A", 0.11, 0.52),
        (0, "C", 0.10, 0.77),
        (0, "G", 0.11, 0.59),
        (0, "U", 0.20, 0.97),
        (1, "A", 0.27, 0.83),
        (1, "C", 0.18, 1.18),
    ],
)
def test_reactivities_are_gamma_of_shape_2_around_their_means(
    profiles, experiment, base, paired, unpaired
):
    for is_unpaired, mean in ((False, paired), (True, unpaired)):
        values = np.array(
            [
                reactivity
                for profile in profiles
                if profile.experiment == experiment
                for letter, bracket, reactivity in zip(
                    profile.sequence, profile.structure, profile.reactivity, strict=True
                )
                if letter == base and (bracket == ".") == is_unpaired
            ]
        )
        values = values[~np.isnan(values)]
        # 1,500 values or more: three standard errors of the mean are below 6% of it
        assert values.mean() == pytest.approx(mean, rel=0.06)
        assert values.var() == pytest.approx(mean**2 / 2 + 0.05**2, rel=0.25)


def test_features_are_one_hot():
    profile = rna.Profile("GAC", 0, np.zeros(3, np.float32))
    expected = [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_array_equal(profile.features(), expected)
    with_structure = dataclasses.replace(profile, structure="(.)").features()
    assert with_structure.dtype == np.float32
    np.testing.assert_array_equal(with_structure[:, :4], expected)
    np.testing.assert_array_equal(
        with_structure[:, 4:], [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    )


def test_every_fifth_sequence_is_held_back_with_all_its_profiles():
    profiles = [
        rna.Profile(letters, experiment, np.zeros(2, np.float32))
        for letters in ("AA", "AC", "AG", "AU", "CA", "CC", "CG", "CU", "GA", "GC", "G")
        for experiment in (0, 1)
    ]
    train, test = rna.hold_back(profiles)
    assert [p.sequence for p in test] == ["CA", "CA", "GC", "GC"]
    assert len(train) + len(test) == len(profiles)
    assert not {p.sequence for p in train} & {p.sequence for p in test}
    with pytest.raises(rna.MalformedFileError, match="fewer than 5 sequences"):
        rna.hold_back(profiles[:8])


# ------------------------------------------------------------------- files


HEADER = [
    "sequence_id",
    "sequence",
    "experiment_type",
    "SN_filter",
    *(f"reactivity_{n:04d}" for n in range(1, 5)),
    *(f"reactivity_error_{n:04d}" for n in range(1, 5)),
]
ROW = ["x", "GAC", "DMS_MaP", "1", "", "0.5", "-2e-1", "", "", "0.1", "0.25", ""]


@pytest.fixture
def write(tmp_path):
    def write_table(*rows, header=HEADER):
        path = tmp_path / "table.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write_table


def changed(column, text):
    return [
        text if name == column else field
        for name, field in zip(HEADER, ROW, strict=True)
    ]


def test_a_row_is_read_and_empty_fields_were_not_measured(write):
    path = write(ROW, changed("experiment_type", "2A3_MaP"))
    first, second = rna.read_ribonanza(path)
    assert (first.sequence, first.experiment, first.structure) == ("GAC", 1, "")
    assert second.experiment == 0
    assert first.error is None
    assert first.reactivity.dtype == np.float32
    np.testing.assert_allclose(first.reactivity, [np.nan, 0.5, -0.2])


def test_errors_are_read_where_they_are_asked_for(write):
    (profile,) = rna.read_ribonanza(write(ROW), with_errors=True)
    np.testing.assert_allclose(profile.error, [np.nan, 0.1, 0.25])


def test_columns_may_stand_in_any_order_and_errors_may_lack(write):
    columns = [7, 6, 5, 4, 2, 1]
    path = write([ROW[i] for i in columns], header=[HEADER[i] for i in columns])
    (profile,) = rna.read_ribonanza(path)
    np.testing.assert_allclose(profile.reactivity, [np.nan, 0.5, -0.2])
    with pytest.raises(rna.MalformedFileError, match="column reactivity_error_0001"):
        rna.read_ribonanza(path, with_errors=True)


def test_noisy_rows_and_blank_lines_are_left_out(write):
    assert len(rna.read_ribonanza(write(changed("SN_filter", "0"), [], ROW))) == 1


def test_a_byte_order_mark_is_no_part_of_the_header(write):
    path = write(ROW[1:], header=HEADER[1:])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(rna.read_ribonanza(path)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed("sequence", "GAX"), "column sequence: 'GAX' is not made of ACGU"),
        (changed("sequence", ""), "column sequence: '' is not made of ACGU"),
        (
            changed("experiment_type", "SHAPE"),
            "column experiment_type: 'SHAPE' is none of 2A3_MaP, DMS_MaP",
        ),
        (
            changed("reactivity_0002", "abc"),
            "column reactivity_0002: 'abc' is not a number",
        ),
        (
            changed("reactivity_0003", "inf"),
            "column reactivity_0003: 'inf' is not a number",
        ),
        (
            changed("reactivity_0004", "0.5"),
            "column reactivity_0004: '0.5' lies past the end of the sequence, which "
            "has 3 bases",
        ),
        (
            changed("reactivity_error_0003", "?"),
            "column reactivity_error_0003: '?' is not a number",
        ),
        (
            changed("reactivity_error_0002", ""),
            "column reactivity_error_0002: '' is not the positive error of a measured "
            "position",
        ),
        (
            changed("reactivity_error_0003", "0"),
            "column reactivity_error_0003: '0' is not the positive error of a measured "
            "position",
        ),
        (
            ROW[:5],
            "column reactivity_0002: the row has 5 fields where the header has 12",
        ),
        (
            [*ROW, "", ""],
            "column reactivity_error_0004: the row has 14 fields where the header has "
            "12",
        ),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_column(write, row, message):
    path = write(ROW, row, ROW)
    with pytest.raises(rna.MalformedFileError) as caught:
        rna.read_ribonanza(path, with_errors=True)
    assert str(caught.value) == f"{path}, row 3, {message}"


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [
        ("sequence", "sequence"),
        ("experiment_type", "experiment_type"),
        ("reactivity_0002", "reactivity_0002"),
        ("reactivity_error_0001", "reactivity_error_0001"),
    ],
)
def test_a_missing_column_is_named(write, lacking, missing):
    path = write(ROW, header=["?" if name == lacking else name for name in HEADER])
    with pytest.raises(rna.MalformedFileError) as caught:
        rna.read_ribonanza(path, with_errors=True)
    assert str(caught.value) == (
        f"{path}, row 1, column {missing}: missing from the header"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "row 1, column sequence: missing from the header"),
        (b"\xff\xfe\x00\x01", "not a text file"),
        ((",".join(HEADER) + "\n").encode(), "holds no profiles"),
        (b"a\0b\n", "row 1, "),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(rna.MalformedFileError, match=message) as caught:
        rna.read_ribonanza(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.skipif(not SAMPLE.exists(), reason="the real sample is not at hand")
def test_the_real_sample():
    profiles = rna.read_ribonanza(SAMPLE, with_errors=True)
    assert len(profiles) == 2400
    assert sum(profile.experiment for profile in profiles) == 1192
    lengths = {len(profile.sequence) for profile in profiles}
    assert lengths == {115, 155}
    measured = {int((~np.isnan(profile.reactivity)).sum()) for profile in profiles}
    assert max(measured) == 109
    train, test = rna.hold_back(profiles)
    assert not {p.sequence for p in train} & {p.sequence for p in test}
