"""Damaged files of every kind and packing are read or refused in one line, quickly, and never end in another error."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import random
import time

import pytest

from hsa_ultralong.data import iter_texts

TEXT = "hello wörld, a line\n\x1e\nmore text\n" * 5
CONTENTS = {
    "a.txt": TEXT.encode(),
    "bom.txt": TEXT.encode("utf-16"),
    "wide.txt": TEXT.encode("utf-32-le"),
    "a.jsonl": b'{"text": "one \xc3\xa9"}\n{"text": "two"}\n' * 4,
    "a.json": json.dumps([{"text": "one"}, {"text": "two", "x": [1, {"y": 2}]}]).encode(),
    "a.csv": b'id,text\n1,"a, ""b"" c"\n2,d\n',
    "a.tsv": b"id\ttext\n1\ta\n2\tb\n",
    "nameless": b'{"text": "one"}\n{"text": "two"}\n',
}


def optional_contents():
    if importlib.util.find_spec("bs4"):
        yield (
            "a.html",
            b"<!doctype html><title>t</title><p>one <b>two</b><pre> x\n y</pre><table><tr><td>a<td>b</table>",
        )
    if importlib.util.find_spec("pypdf"):
        import pypdf

        writer, stream = pypdf.PdfWriter(), io.BytesIO()
        writer.add_blank_page(100, 100)
        writer.write(stream)
        yield "a.pdf", stream.getvalue()
    if importlib.util.find_spec("docx"):
        import docx

        document, stream = docx.Document(), io.BytesIO()
        document.add_paragraph("Hello café")
        document.save(stream)
        yield "a.docx", stream.getvalue()
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": ["a word " * 50, "b"]}), stream)
        yield "a.parquet", stream.getvalue()


def mutated(rng, content):
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        size = rng.randrange(1, 40)
        kind = rng.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place:place] = rng.randbytes(size)
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            del data[place:]
        else:
            data[place:place] = data[rng.randrange(len(data) + 1) :][: 5 * size]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_mutants_of_every_kind_are_read_or_refused(tmp_path, seed):
    rng = random.Random(seed)
    contents = {**CONTENTS, **dict(optional_contents())}
    for name, content in list(contents.items()):
        contents[f"{name}.gz"] = gzip.compress(content, mtime=0)
    contents |= {"a.txt.xz": lzma.compress(CONTENTS["a.txt"]), "a.txt.bz2": bz2.compress(CONTENTS["a.txt"])}
    for _ in range(15):
        for name, content in contents.items():
            path = tmp_path / name
            path.write_bytes(mutated(rng, content))
            started = time.monotonic()
            try:
                texts = list(iter_texts([path], encoding=rng.choice(["auto", "auto", "auto", "cp1252", "utf-16-le"])))
            except ValueError as error:
                assert name in str(error), str(error)
            else:
                assert texts and all(text.strip() and text.encode() for text in texts)
            # against hangs only
            assert time.monotonic() - started < 60
