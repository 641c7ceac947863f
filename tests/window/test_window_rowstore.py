# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of the list: equal to what is wanted, by as few changes as there are."""

import screen  # noqa: F401  # before GTK
from hypothesis import given
from hypothesis import strategies as st
from listed import group, row

from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.cells import Cells
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.rows import Group, Item
from qubes_fwd_qrexec.window.rowstore import RowStore

Shape = list[tuple[str, list[tuple[str, str]]]]
"""Groups, and the names and comments of their rules."""
COLOURS = dict.fromkeys(("open", "note", "bad", "faint"), "red")


def groups(shape: Shape) -> list[Group]:
    return [
        group(target, *(row(name, target, mark=name, comment=comment) for name, comment in rows))
        for target, rows in shape
    ]


def cell(row: Gtk.TreeModelRow, field: str) -> object:
    return row[Cells._fields.index(field)]


def shown(rows: RowStore) -> Shape:
    return [
        (
            str(cell(head, "state")),
            [(str(cell(row, "state"))[2:], str(cell(row, "comment"))) for row in head.iterchildren()],
        )
        for head in rows.tree
    ]


def do(rows: RowStore, shape: Shape) -> list[Item]:
    """What was new or another."""
    return [*filter(None, rows.changes(groups(shape), COLOURS))]


SHAPES = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.lists(
            st.tuples(st.sampled_from("pqrs"), st.sampled_from(["", "said"])),
            unique_by=lambda row: row[0],
            max_size=4,
        ),
    ),
    unique_by=lambda group: group[0],
    max_size=4,
)


@given(st.lists(st.tuples(SHAPES, st.integers(0, 12)), max_size=3), SHAPES)
def test_whatever_was_given_up_before_the_tree_becomes_what_is_wanted(
    before: list[tuple[Shape, int]], last: Shape
) -> None:
    rows = RowStore()
    for shape, steps in before:
        for _ in zip(rows.changes(groups(shape), COLOURS), range(steps), strict=False):
            pass
    do(rows, last)
    assert shown(rows) == last
    assert do(rows, last) == []


@given(SHAPES)
def test_each_row_is_found_where_it_is(shape: Shape) -> None:
    rows = RowStore()
    do(rows, shape)
    for target, some in shape:
        path = rows.find(QubeName(target))
        assert path is not None
        assert rows.at(path).state == target
        for name, _ in some:
            path = rows.find((QubeName(target), name))
            assert path is not None
            assert rows.at(path).item == (target, name)
    assert rows.find(QubeName("nobody")) is None


def test_a_row_that_changes_is_the_only_one_that_is_touched() -> None:
    rows = RowStore()
    do(rows, [("work", [("web", ""), ("tls", "")]), ("personal", [("web", "")])])
    changed = do(rows, [("work", [("web", ""), ("tls", "said")]), ("personal", [("web", "")])])
    assert changed == [("work", "tls")]


def test_each_step_changes_one_row() -> None:
    rows = RowStore()
    changes: list[object] = []
    for signal in ("row-inserted", "row-deleted"):
        rows.tree.connect(signal, lambda *_: changes.append(None))
    for shape in ([("work", [("web", ""), ("tls", "")]), ("personal", [])], []):
        for _ in rows.changes(groups(shape), COLOURS):
            assert len(changes) == 1
            changes.clear()
    assert shown(rows) == []


def test_other_colours_are_those_of_all_rows() -> None:
    rows = RowStore()
    shape: Shape = [("work", [("web", "")])]
    do(rows, shape)
    assert [*filter(None, rows.changes(groups(shape), COLOURS | {"open": "blue", "faint": "gray"}))] != []
    (head,) = rows.tree
    (child,) = head.iterchildren()
    assert (cell(head, "who_foreground"), cell(child, "state_foreground")) == ("gray", "blue")


def test_what_is_plain_has_no_colour_until_another_is() -> None:
    rows = RowStore()
    item = (QubeName("work"), "web")

    def colour() -> object:
        return cell(rows.tree["0:0"], "state_foreground")

    rows.make_plain(item)
    do(rows, [("work", [("web", "")])])
    assert colour() is None
    do(rows, [("work", [("web", "said")])])
    assert colour() is None
    rows.make_plain(None)
    assert colour() == "red"
    rows.make_plain(item)
    assert colour() is None
