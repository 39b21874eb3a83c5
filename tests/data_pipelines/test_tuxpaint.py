import pytest

from data_pipelines import sources
from data_pipelines.sources import tuxpaint

TEXT = "A crow. \nde.utf8=Eine Krähe.\nfr.utf8=Un corbeau = noir.\nit.utf8=\nnot a translation\n"


def test_captions_in_the_languages_asked_for() -> None:
    assert tuxpaint._captions(TEXT, ("en",)) == ("A crow.",)
    assert tuxpaint._captions(TEXT, ("fr", "it", "xx", "de", "en")) == ("Un corbeau = noir.", "Eine Krähe.", "A crow.")
    assert tuxpaint._captions("", ("en",)) == tuxpaint._captions(TEXT, ("it",)) == ()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("animals/a.png", True), ("animals/a.txt", True), ("animals/a.ogg", False), ("animals/a_mirror.png", False),
     ("animals/a_mirror_flip.png", False), ("symbols/b.png", False)],
)  # fmt: skip
def test_what_is_left_out(name: str, wanted: bool) -> None:
    assert tuxpaint._wanted(tuxpaint.STAMPS + name) is wanted
    assert not tuxpaint._wanted("usr/share/doc/" + name)


@pytest.mark.slow
def test_the_stamps_are_all_there() -> None:
    found = sources.resolve("tuxpaint", languages=("en", "de"))
    records = list(found.module.iter_records(found.config))
    assert len(records) == 537
    assert sum(record.extra["drawing"] == 1 for record in records) == 108
    assert all(record.captions and record.labels for record in records)
    frog = records[0]
    assert (frog.captions, frog.labels) == (("A frog.", "Ein Frosch."), ("animals", "amphibians"))
