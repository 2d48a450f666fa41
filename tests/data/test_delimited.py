"""The reader of tables in text files: what it recognises, and what it refuses with the line and the column."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from zoo.data.checks import DataError
from zoo.data.delimited import read_table

ROWS = [["id", "alcohol", "hue"], ["a", "1.5", "-2"], ["b", "3", "4e-2"]]


def written(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def whole(path: Path) -> np.ndarray:
    """All cells of a file as numbers."""
    table = read_table(path)
    return table.numbers(range(table.width))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_layouts_of_one_table(separator: str, end: str, tmp_path: Path) -> None:
    """Every separator, line end, mark of an encoding, padding, quoting and kind of last line."""
    lines = [separator.join(row) for row in ROWS]
    quoted = [separator.join(f'"{cell}"' for cell in row) for row in ROWS]
    padded = [f"{separator} ".join(row) for row in ROWS]
    texts = [end.join(kind) + last for kind in (lines, quoted, padded) for last in ("", end, end * 3, end + "  " + end)]
    texts += [end.join([*lines, separator * 2, separator * 2]), f"sep={separator}{end}" + end.join(lines)]
    texts += [end * 2 + end.join(lines)]
    contents = [text.encode(code) for text in texts for code in ("utf-8", "utf-8-sig", "utf-16", "utf-32")]
    for content in contents:
        table = read_table(written(tmp_path, content))
        assert (table.separator, table.header) == (separator, ROWS[0]), content
        np.testing.assert_array_equal(table.numbers([2, 1]), [[-2, 1.5], [0.04, 3]])
        assert table.cells([0])[1] == [["a", "b"]]


@pytest.mark.parametrize(
    "text",
    [
        "a;b\n1,5;-2,25\n,5;3\n",
        "a;b\n1,500;-2,250\n0,500;3,000\n",
        "a\tb\n1,5\t-2,25\n0,500\t3\n",
        'a,b\n"1,5","-2,25"\n"0,5",3\n',
        "a|b\n1.5|-2.25\n.5|3.\n",
        "1,5;-2,25\n0,5;3,0\n",
        "a;b;c\n1,500;-2,25;1065\n0,500;3,000;7\n",
        "1,5;-2,25\n,5;3,0\n0,5;3,0\n"[:-8],
    ],
)
def test_decimal_commas(text: str, tmp_path: Path) -> None:
    """Also without a header, where a comma would make even rows, too."""
    np.testing.assert_array_equal(read_table(written(tmp_path, text)).numbers([0, 1]), [[1.5, -2.25], [0.5, 3]])


def test_quoted_cells_hold_separators_and_lines(tmp_path: Path) -> None:
    path = written(tmp_path, 'note,"a, b",c\n"one\ntwo, ""three""",1,2\nplain,3,x\n')
    table = read_table(path)
    assert table.header == ["note", "a, b", "c"]
    assert table.cells([0])[1] == [['one\ntwo, "three"', "plain"]]
    assert table.cells([0])[0] == [2, 4], "a row is told by the line where it begins"
    with pytest.raises(DataError, match=r"line 4: c is 'x', not a number"):
        table.numbers([2])


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("1,2\n3,4\n", False),
        ("1,\n3,4\n", False),
        ("2020-01-01,2\n2020-01-02,4\n", False),
        ("a,2\n3,4\n", True),
        ("date,101,102\n2020-01-01,1,2\n", True),
        (",,\n1,2,3\n", True),
    ],
)
def test_a_first_line_of_values_is_a_row(text: str, header: bool, tmp_path: Path) -> None:
    table = read_table(written(tmp_path, text))
    assert (table.header is not None) == header
    lines = len(text.splitlines())
    assert len(list(table.rows())) == lines - header
    assert len(list(read_table(table.path, header=False).rows())) == lines


REFUSED = {
    "nothing": (b"", "is empty"),
    "blank lines": (b"\n \n\n", "is empty"),
    "a short row": (b"a,b,c\n1,2,3\n1,2\n", r"line 3: c is missing, 2 cells where the header has 3"),
    "a long row": (b"a,b\n1,2\n\n1,2,3\n", r"line 4: 3 cells where the header has 2"),
    "a short row without header": (b"1,2\n3\n", r"line 2: column 2 is missing, 1 cells where the first line has 2"),
    "two of a name": (b"a,b, a\n1,2,3\n", "columns 1 and 3 are both named 'a'"),
    "a quotation mark": (b'a,b\n1,"2\n3,4\n', r"line 2: a quotation mark opens here and is never closed"),
    "text behind a quotation": (b'a,b\n"1"x,2\n', r"line 2: a quotation mark closes inside a cell"),
    "other bytes": ("a,b\nö,1\nü,2\n".encode("cp1252"), r"line 2: byte 0xf6 is not UTF-8: save the file as UTF-8"),
    "half a character": ("a,b\n1,2".encode("utf-16") + b"\0", "its end is not UTF-16"),
    "zero bytes": (b"\x01\0\0\0", "is not text: it has zero bytes"),
    "a spreadsheet": (b"PK\x03\x04rest", "is a spreadsheet or a zip archive, not text"),
    "compressed": (b"\x1f\x8b\x08rest", "is compressed, not text"),
    "infinity": (b"a,b\n1,2\n1,-inf\n", r"line 3: b is '-inf', not a number that is finite"),
    "a word": (b"a,b\n1,x\n", r"line 2: b is 'x', not a number"),
    "a gap": (b"a,b\n1,\n2,2\n", r"line 2: b is empty, not a number"),
    "not a number": (b"a,b\n1,NaN\n", r"line 2: b is 'NaN', not a number"),
    "beyond float64": (b"a,b\n1,1e400\n", r"line 2: b is '1e400', too large"),
    "Python's own forms": (b"a,b\n1,1_000\n", r"line 2: b is '1_000', not a number"),
    "other digits": ("a,b\n1,٣\n".encode(), r"line 2: b is '٣', not a number"),
    "thousands": (b'a,b\n1,"1,234"\n', r"'1,234' \(line 2, b\) may be a decimal comma or thousands"),
    "thousands here and there": (
        b"a;b\n1;1,065\n2;1065\n",
        r"'1,065' \(line 2, b\) may be a decimal comma or thousands, beside '1065' \(line 3, b\)",
    ),
    "a name that steers": (b"a,b\x1b[2J\n1,2\n", r"cannot be printed; rename it"),
    "more thousands": (b'a,b\n1,"1,234,567"\n', r"line 2: b is '1,234,567', not a number"),
    "both marks": (b"a;b\n1.5;2\n2;2,5\n", r"a point, '1.5' \(line 2, a\), and with a comma, '2,5' \(line 3, b\)"),
    "an empty name": (b"a,\n1,x\n", r"line 2: column 2 is 'x'"),
    "a gap in one column": (b"a\n1\n\n2\n", r"line 3: a is empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, tmp_path: Path) -> None:
    content, told = REFUSED[kind]
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=told) as refusal:
        whole(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_what_is_no_file_and_wrong_options(tmp_path: Path) -> None:
    path = written(tmp_path, "Größe,b\n1,2\n".encode("cp1252"))
    assert read_table(path, encoding="cp1252").header == ["Größe", "b"]
    assert read_table(written(tmp_path, "ö,b\n1,2\n".encode("utf-8-sig")), encoding="utf-8").header == ["ö", "b"]
    with pytest.raises(DataError, match="it is a folder"):
        read_table(tmp_path)
    with pytest.raises(DataError, match="it is no file"):
        read_table(tmp_path / "none.csv")
    for encoding in ("klingon", "base64", "../x", "zlib"):
        with pytest.raises(DataError, match="encoding"):
            read_table(path, encoding=encoding)
    with pytest.raises(DataError, match="separator 'x' is not one of"):
        read_table(path, separator="x")


# ---- columns by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "places", "told"),
    [
        ("alcohol,malic_acid,hue", [0, 1, 2], []),
        ("hue,malic_acid,alcohol", [2, 1, 0], []),
        ("Hue, MALIC ACID ,alcohol", [2, 1, 0], ["'MALIC ACID' as 'malic_acid', 'Hue' as 'hue'"]),
        ("id,hue,alcohol,malic-acid,class", [2, 3, 1], ["'malic-acid' as", "left out: id, class"]),
        ("hue,alcohol,malic_acid,Hue", [1, 2, 0], ["left out: Hue"]),
        ("hue,alcohol,malic_acid,", [1, 2, 0], ["left out: column 4"]),
    ],
)
def test_columns_are_found_by_name(header: str, places: list[int], told: list[str], tmp_path: Path) -> None:
    table = read_table(written(tmp_path, header + "\n" + ",".join("1" * (header.count(",") + 1))))
    found = table.match(["alcohol", "malic_acid", "hue"])
    assert found.places == places
    assert len(found.notes) == len(told)
    assert all(part in note for part, note in zip(told, found.notes, strict=True))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (
            "a,b,c",
            "3 columns, the model takes 3, and no name agrees; the model takes: alcohol, hue, Ash; the file has: a",
        ),
        ("alcohol,b,Ash", "no column 'hue'; the model takes: alcohol, hue, Ash; the file has: alcohol, b, Ash"),
        ("Alcohol,ALCOHOL,hue,Ash", "'Alcohol' and 'ALCOHOL' could both be 'alcohol'"),
        ("alcohol (%),hue,Ash", "no column 'alcohol'"),
    ],
)
def test_columns_that_are_not_there(header: str, told: str, tmp_path: Path) -> None:
    table = read_table(written(tmp_path, header + "\n" + ",".join("1" * (header.count(",") + 1))))
    with pytest.raises(DataError) as refusal:
        table.match(["alcohol", "hue", "Ash"])
    assert told in str(refusal.value)


def test_names_that_differ_in_case_alone_are_two(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "x,X\n1,2\n"))
    assert table.match(["X", "x"]).places == [1, 0]
    with pytest.raises(DataError, match="no column 'x '"):
        read_table(written(tmp_path, "X\n1\n")).match(["X", "x "])


# ---- anybody's files ---------------------------------------------------------------------------------------


def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    pieces = [b"a", b"1", b"2.5", b"1,5", b",", b";", b"\t", b"|", b'"', b"\n", b"\r\n", b"\r", b" ", b"\0", b"\xff"]
    pieces += [b"\xef\xbb\xbf", b"nan", b"inf", b"-", b"1e999", "ö".encode(), b"2020-01-01", b"=cmd()", b"sep=;\n"]
    refused = 0
    for _ in range(400):
        path = written(tmp_path, b"".join(draw.choices(pieces, k=draw.randrange(1, 40))))
        try:
            values = whole(path)
        except DataError as error:
            refused += 1
            told = str(error)
            assert "\n" not in told
        else:
            assert values.ndim == 2
            assert np.isfinite(values).all()
    assert 200 < refused < 400


@pytest.mark.parametrize("seed", range(5))
def test_tables_come_back_in_every_layout(seed: int, tmp_path: Path) -> None:
    """Random numbers, written by the csv module in a random layout."""
    import csv
    import io

    draw = random.Random(seed)
    for _ in range(20):
        separator, comma = draw.choice(";\t|,"), draw.random() < 0.5
        width = draw.randrange(2, 6)
        values = [[draw.choice([draw.gauss(0, 1e3), float(draw.randrange(9))]) for _ in range(width)] for _ in range(9)]
        cells = [[repr(v).replace(".", ",") if comma else repr(v) for v in row] for row in values]
        stream = io.StringIO()
        quoting = draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
        writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"]))
        writer.writerows([[f"x{i}" for i in range(width)], *cells])
        table = read_table(written(tmp_path, stream.getvalue()))
        np.testing.assert_array_equal(table.numbers(range(width)), values)
