"""Views, layouts, splits and the table: pure Python, no triton and no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsgap_kernels.triton import config
from bsgap_kernels.triton.gram import scaling_exponents
from bsgap_kernels.triton.memory import device_table
from bsgap_kernels.triton.plan import gram_plan
from bsgap_kernels.triton.table import COLUMNS, MatrixView, Orientation, describe, orient


def addresses(view: MatrixView) -> torch.Tensor:
    """Elements (count, m, n) that the view names, read by its numbers alone."""
    size = (view.count, view.row_outer, view.row_inner, view.n)
    stride = (view.stride_batch, view.stride_row_outer, view.stride_row_inner, view.stride_column)
    return view.tensor.as_strided(size, stride).reshape(view.count, view.m, view.n)


def test_the_package_and_its_table_need_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import bsgap_kernels.triton.table, bsgap_kernels.triton.config, bsgap_kernels.triton.gram\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_columns() -> None:
    assert len(COLUMNS) == len(set(COLUMNS)) == 20
    assert COLUMNS[3] == "offset"
    assert COLUMNS[16:] == ("roundings", "m", "n", "first_vector")


@given(st.data())
def test_describe_names_every_element_once(data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(2, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=dimensions, max_size=dimensions))
    order = data.draw(st.permutations(range(dimensions)))
    steps = data.draw(st.lists(st.integers(1, 2), min_size=dimensions, max_size=dimensions))
    whole = [size * step for size, step in zip(shape, steps, strict=True)]
    total = int(torch.tensor(whole).prod())
    A = torch.arange(total, dtype=torch.float64).view([whole[i] for i in order])
    A = A.permute([order.index(i) for i in range(dimensions)])[tuple(slice(None, None, s) for s in steps)]
    batch = data.draw(st.booleans())
    view = describe(A, batch=batch, features_side=data.draw(st.booleans()))
    if view is None:
        assert dimensions > 2
        return
    found = addresses(view)
    expected = A.reshape(-1, *A.shape[-2:]) if batch else A.reshape(1, -1, A.shape[-1])
    assert found.shape == expected.shape
    if batch:
        assert torch.equal(found, expected)
    else:
        # Observations may come in another order, the first excepted; features may not.
        assert torch.equal(found[0, 0], expected[0, 0])
        assert torch.equal(found[0, found[0, :, 0].argsort()], expected[0, expected[0, :, 0].argsort()])


def test_describe_says_what_it_cannot_merge() -> None:
    x = torch.zeros(4, 6, 8, 5)
    assert describe(x[:, :5, :7], batch=False) is None
    assert describe(x[::2, ::2], batch=True) is None
    assert describe(x.permute(0, 2, 3, 1), batch=False) is not None
    slices = torch.zeros(4, 6, 500)[:, :3]
    assert describe(slices, batch=False) is None
    view = describe(slices, batch=False, features_side=True)
    assert view is not None
    with pytest.raises(ValueError, match="contiguous"):
        orient(view, features_side=False)


def test_orientation() -> None:
    tall, wide = describe(torch.zeros(9, 4), batch=True), describe(torch.zeros(4, 9), batch=True)
    assert tall is not None
    assert wide is not None
    assert orient(tall, False) == Orientation(4, 1, 9, 0, 4, 1)
    assert orient(wide, False) == Orientation(4, 1, 9, 0, 1, 9)
    assert orient(wide, True) == Orientation(9, 1, 4, 0, 9, 1)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_layouts_promise_only_what_holds(itemsize: int) -> None:
    vector = 16 // itemsize
    side = Orientation(8 * vector, 1, 1000, 0, 8 * vector, 1)
    assert config.layout_of(side, 4096, 0, itemsize, 64) == config.SIDE_ALIGNED
    assert config.layout_of(side, 4096 + itemsize, 0, itemsize, 64) == config.ANY
    assert config.layout_of(side, 4096, 1, itemsize, 64) == config.ANY
    for inner, layout in ((32, config.SIDE_ALIGNED), (31, config.ANY)):
        levels = Orientation(8 * vector, 5, inner, 8 * vector * inner * 2, 8 * vector, 1)
        assert config.layout_of(levels, 4096, 0, itemsize, 64) == layout
    depth = Orientation(9, 7, 16 * vector, 9 * 16 * vector, 1, 16 * vector)
    assert config.layout_of(depth, 4096, 0, itemsize, 16) == config.DEPTH_ALIGNED
    assert config.layout_of(depth, 4096 + itemsize, 0, itemsize, 16) == config.DEPTH_CONTIGUOUS
    assert config.layout_of(depth, 4096, 0, itemsize, 16 * vector * 4) == config.ANY


@given(
    st.integers(1, 5000),
    st.integers(1, 10**8),
    st.integers(1, 1000),
    st.integers(1, 300),
    st.sampled_from([2, 4, 8]),
)
def test_splits_are_within_what_two_levels_add(
    side: int, depth: int, tiles: int, processors: int, itemsize: int
) -> None:
    view = Orientation(side, 1, depth, 0, side, 1)
    wanted = config.split_bytes(side * depth * itemsize, processors)
    assert 1 << 15 <= wanted <= 1 << 20
    assert config.split_count(view, itemsize, 64, wanted, tiles, processors) >= 1
    A = torch.empty(1).expand(depth, side)
    shape = describe(A, batch=True)
    assert shape is not None
    plan = gram_plan(
        [shape], precision="float64", features_side=False, sums=False, processors=processors, architecture=9
    )
    row = plan.rows[0]
    assert 1 <= row["splits"] <= config.MAX_SPLITS
    # Every range has at least one block, and the bound of roundings is that of the longest.
    oriented = orient(shape, False)  # the Gram of the shorter side sums along the longer one
    assert oriented.depth == max(depth, side)
    assert row["splits"] <= config.block_count(oriented, config.ANY, 16) or row["splits"] == 1
    assert row["roundings"] >= min(16, oriented.depth) + 3
    assert row["roundings"] <= oriented.depth / 8 + 162  # what the docstring of gram says


def test_a_long_matrix_fills_two_waves() -> None:
    A = torch.empty(1).expand(65536, 64)
    view = describe(A, batch=True)
    assert view is not None
    plan = gram_plan(
        [view], precision="float64", features_side=False, sums=False, processors=132, architecture=9
    )
    assert 132 <= plan.launches[0].items <= config.MAX_SPLITS


def test_rows_are_sorted_and_results_keep_the_caller_order() -> None:
    tensors = [torch.zeros(40, 5), torch.zeros(3, 40, 9), torch.zeros(40, 5, dtype=torch.bfloat16)]
    tensors += [torch.zeros(300, 200), torch.zeros(2, 9, 40)]
    views = [describe(A, batch=True) for A in tensors]
    known = [view for view in views if view is not None]
    plan = gram_plan(
        known, precision="float32", features_side=False, sums=False, processors=4, architecture=9
    )
    assert [row["side"] for row in plan.rows] == [200, 9, 9, 5, 5]
    assert plan.order == [3, 1, 4, 0, 2]
    assert [row["first_result"] for row in plan.rows] == [5, 1, 6, 0, 4]
    assert [row["first_matrix"] for row in plan.rows] == [0, 1, 4, 6, 7]
    assert [row["first_gram"] for row in plan.rows] == [0, 40000, 40243, 40405, 40430]
    assert plan.gram_elements == 40455
    groups = [(launch.group, launch.dtype, launch.rescue) for launch in plan.launches]
    assert groups == [
        (0, torch.float32, False),
        (0, torch.float32, True),
        (1, torch.float32, False),
        (2, torch.bfloat16, False),
    ]
    assert [row["layout"] // config.CODES for row in plan.rows] == [0, 1, 1, 1, 2]
    values = plan.values
    assert device_table(values, torch.device("cpu")).tolist() == values


def test_scaling_exponents_leave_ordinary_matrices_alone() -> None:
    A = torch.ones(4, 3, 2, dtype=torch.float64) * torch.tensor(
        [1.0, 1e60, 2.0**-600, 0.0], dtype=torch.float64
    ).view(4, 1, 1)
    view = describe(A, batch=True)
    assert view is not None
    exponent = scaling_exponents([view])
    assert exponent.tolist() == [0, -200, 599, 0]
