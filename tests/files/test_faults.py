import errno

import pytest

from hemera.errors import SlideError, TableError
from hemera.files.faults import brief, translated


def test_a_library_error_becomes_ours_with_its_message_on_one_line() -> None:
    with pytest.raises(SlideError) as caught, translated(SlideError, "a.tif: {error}; convert it"):
        raise KeyError("no\n  tag")
    assert str(caught.value) == "a.tif: 'no\\n tag'; convert it"
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_without_a_message_is_named_by_its_class() -> None:
    assert brief(EOFError()) == "EOFError"


def test_a_long_message_ends_with_a_word() -> None:
    assert brief(ValueError("nine wide " * 40)) == " ".join(["nine wide"] * 29) + " nine ..."
    assert brief(ValueError("w" * 301)) == "w" * 296 + " ..."


def test_our_own_error_passes_unchanged() -> None:
    own = TableError("t.parquet: no rows")
    with pytest.raises(TableError) as caught, translated(SlideError, "{error}"):
        raise own
    assert caught.value is own


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOSPC, "full"), OSError(errno.ESTALE, "stale")]
)
def test_a_transient_error_is_no_fault_of_the_file(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, translated(SlideError, "{error}"):
        raise error
    assert caught.value is error


def test_a_short_read_is_a_fault_of_the_file() -> None:
    with pytest.raises(SlideError), translated(SlideError, "{error}"):
        raise OSError("unexpected end of data")
