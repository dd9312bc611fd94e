import numpy as np
import pyarrow as pa
import pytest

from hemera.dataset.ordering import sorted_parts


def tables_of(rng: np.random.Generator) -> list[pa.Table]:
    """Units as they occur: disjoint ones, two that interleave, an empty one."""
    names = [f"a_{n:03d}" for n in range(17)], [f"a_1_{n:03d}" for n in range(5)], []
    mixed = [f"b_{n:03d}" for n in range(40)]
    units = [*names, mixed[::2], mixed[1::2]]
    return [
        pa.table(
            {
                "tile": pa.array([unit[n] for n in rng.permutation(len(unit))], pa.string()),
                "unit": pa.array([number] * len(unit), pa.int64()),
            }
        )
        for number, unit in enumerate(units)
    ]


@pytest.mark.parametrize("rows", [1, 7, 62, 1000])
def test_parts_are_consecutive_and_complete(rows: int, rng: np.random.Generator) -> None:
    units = tables_of(rng)
    parts = list(
        sorted_parts([unit.column("tile") for unit in units], units.__getitem__, rows=rows)
    )
    assert [part.num_rows for part in parts[:-1]] == [min(rows, 62)] * (len(parts) - 1)
    assert len(parts) == -(-62 // rows)
    everything = pa.concat_tables(units).sort_by("tile")
    assert pa.concat_tables(parts).to_pylist() == everything.to_pylist()


def test_no_rows_are_one_empty_part(rng: np.random.Generator) -> None:
    units = [unit.slice(0, 0) for unit in tables_of(rng)]
    (part,) = sorted_parts([unit.column("tile") for unit in units], units.__getitem__)
    assert part.num_rows == 0 and part.column_names == ["tile", "unit"]
