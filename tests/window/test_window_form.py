# SPDX-License-Identifier: GPL-2.0-or-later
"""The fields of Add and Edit on a screen: what a user types is what the draft has, and back."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
from controls import find, texts, walk
from hypothesis import HealthCheck, given, settings
from rule_strategies import named_rules
from screen import settle, until
from worlds import NOW, qube, rule, world

from qubes_fwd_qrexec.admin.states import Cause, Finding, Forward
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.window.dialogs.form import Form
from qubes_fwd_qrexec.window.gtk import Atk, Gtk
from qubes_fwd_qrexec.window.kept import TEXT_MAX
from qubes_fwd_qrexec.window.model.draft import Draft, Ends, Where
from qubes_fwd_qrexec.window.model.judgement import Judgement
from qubes_fwd_qrexec.window.widgets import scrolled

PROBE = "<b>&amp; __x"


class Shown:
    """A form in a window, and how often it told of a change."""

    def __init__(self) -> None:
        self.told = 0
        self.form = Form(self._tell)
        for _ in self.form.making():
            assert self.told == 0
        self.window = Gtk.Window(default_width=740, default_height=780)
        self.window.add(scrolled(self.form.widget))
        self.window.show_all()
        self.told = 0

    def _tell(self) -> None:
        self.told += 1

    @property
    def draft(self) -> Draft:
        return self.form.draft

    def entry(self, name: str) -> Gtk.Entry:
        return find(self.window, Gtk.Entry, name)

    def radio(self, name: str) -> Gtk.RadioButton:
        return find(self.window, Gtk.RadioButton, name)

    def check(self, name: str) -> Gtk.CheckButton:
        return find(self.window, Gtk.CheckButton, name)

    def choice(self, name: str) -> Gtk.ComboBoxText:
        return find(self.window, Gtk.ComboBoxText, name)


@pytest.fixture
def shown() -> Iterator[Shown]:
    shown = Shown()
    yield shown
    shown.window.destroy()
    settle()


def test_a_new_form_lets_in_nobody_and_ends_in_an_hour(shown: Shown) -> None:
    assert shown.draft == Draft()
    assert shown.radio("1 hour").get_active()
    assert not shown.radio("Anybody who can reach it").get_active()


def test_what_is_typed_is_in_the_draft(shown: Shown) -> None:
    shown.entry("Qube").set_text("work")
    shown.entry("Server port").set_text("80-90")
    shown.choice("Protocol").set_active_id("both")
    shown.entry("Exposed port").set_text("8080-8090")
    shown.entry("Networks and qubes that may connect").set_text("10.0.0.0/8")
    shown.radio("8 hours").set_active(True)
    shown.entry("Comment").set_text(PROBE)
    assert shown.draft == Draft(
        target="work",
        ports="80-90",
        proto="both",
        exposed_ports="8080-8090",
        sources="10.0.0.0/8",
        ends=Ends.HOURS_8,
        comment=PROBE,
    )
    assert shown.told == 7


def test_further_options_are_in_the_draft(shown: Shown) -> None:
    shown.entry("Name of the rule").set_text("web")
    shown.choice("Mode").set_active_id("qrexec")
    shown.choice("Transport over qrexec").set_active_id("mux")
    shown.choice("PROXY header").set_active_id("v2")
    shown.entry("Limits").set_text("rate:5")
    shown.entry("Listen only on this address").set_text("10.0.0.1")
    shown.choice("Open connections on expiry").set_active_id("drain")
    shown.check("Let connections start the qube").set_active(True)
    shown.check("Stay open when a netvm changes").set_active(True)
    assert shown.draft == Draft(
        name="web",
        mode="qrexec",
        transport="mux",
        proxy="v2",
        limits="rate:5",
        listen="10.0.0.1",
        on_expire="drain",
        autostart=True,
        follow_netvm=True,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(named=named_rules)
def test_a_stored_rule_is_shown_as_it_is(shown: Shown, named: NamedRule) -> None:
    shown.form.show(Draft.of(named))
    shown.entry("Comment").emit("changed")
    assert shown.draft == Draft.of(named)


def test_to_type_a_qube_or_a_time_chooses_that_it_counts(shown: Shown) -> None:
    shown.entry("The other qube").set_text("sys-vpn")
    shown.check("Only for qubes behind it").set_active(True)
    shown.entry("Until").set_text("18:00")
    assert shown.draft == Draft(
        where=Where.OTHER, via="sys-vpn", is_inside=True, ends=Ends.UNTIL, until="18:00"
    )


def test_anybody_is_chosen_by_itself_and_said_in_words_and_colour(shown: Shown) -> None:
    warning = "Anybody who can reach this port may connect."
    assert warning not in texts(shown.window)
    shown.radio("Anybody who can reach it").set_active(True)
    assert shown.draft == Draft(is_anybody=True)
    assert warning in texts(shown.window)
    label = next(w for w in walk(shown.window) if isinstance(w, Gtk.Label) and w.get_text() == warning)
    assert label.get_style_context().has_class("anybody")
    shown.entry("Networks and qubes that may connect").set_text("fd00::/8")
    assert shown.draft == Draft(sources="fd00::/8")
    assert warning not in texts(shown.window)


def test_presets_are_put_in_and_taken_out_and_follow_what_is_typed(shown: Shown) -> None:
    sources, lan = shown.entry("Networks and qubes that may connect"), shown.check("192.168.0.0/16")
    lan.set_active(True)
    shown.check("fd00::/8").set_active(True)
    assert sources.get_text() == "192.168.0.0/16, fd00::/8"
    sources.set_text("fd00::/8 10.0.0.0/8")
    assert [shown.check(name).get_active() for name in ("192.168.0.0/16", "10.0.0.0/8", "fd00::/8")] == [
        False,
        True,
        True,
    ]
    shown.check("fd00::/8").set_active(False)
    assert shown.draft.sources == "10.0.0.0/8"


def test_qubes_are_let_in_where_a_forward_is_for_qubes(shown: Shown) -> None:
    inventory = world(qube("tagged", "sys-firewall", tags=frozenset({"team"})))
    shown.form.fit(inventory, NOW)
    let_in = find(shown.window, Gtk.Button, "Let in")
    assert not let_in.get_mapped()
    shown.radio("Its netvm, only for other qubes").set_active(True)
    settle()
    assert let_in.get_mapped()
    for name in (" personal ", "@tag:team", ""):
        shown.entry("A qube or tag to let in").set_text(name)
        let_in.clicked()
    assert shown.draft == Draft(where=Where.NETVM, sources="personal, @tag:team")
    names = offered(shown, "A qube or tag to let in")
    assert names[-2:] == ["work", "@tag:team"]
    assert "dom0" not in names


def offered(shown: Shown, name: str) -> list[str]:
    """The names to choose from, once all are there."""
    settle()
    model = shown.entry(name).get_completion().get_model()
    return [row[0] for row in model]


def test_a_name_is_chosen_from_a_list(shown: Shown) -> None:
    shown.form.fit(world(), NOW)
    button = find(shown.window, Gtk.MenuButton, "Choose: Qube")
    for _ in range(2):
        button.set_active(True)
        view = find(button.get_popover(), Gtk.TreeView, "Qube")
        until(view.get_mapped)
        settle()
        view.row_activated(Gtk.TreePath(6), view.get_column(0))
        assert (shown.draft.target, button.get_active()) == ("work", False)
        assert shown.window.get_focus() is shown.entry("Qube")
        shown.entry("Qube").set_text("")


def test_the_qubes_that_there_are_can_be_chosen(shown: Shown) -> None:
    shown.form.fit(world(), NOW)
    qubes = ["hidden", "personal", "sys-firewall", "sys-net", "sys-vpn", "vault", "work"]
    assert offered(shown, "Qube") == qubes
    assert offered(shown, "The other qube") == ["sys-firewall", "sys-net", "sys-vpn"]
    shown.form.fit(world(without=("vault",)), NOW)
    assert "vault" not in offered(shown, "Qube")


def test_each_place_says_which_qube_it_is(shown: Shown) -> None:
    shown.form.fit(world(qube("has_lines", "net_vm"), qube("net_vm", provides_network=True)), NOW)
    shown.entry("Qube").set_text("work")
    assert shown.radio("The outermost qube of its network: sys-net")
    assert shown.radio("Its netvm, only for other qubes: sys-firewall")
    shown.entry("Qube").set_text("has_lines")
    assert shown.radio("The outermost qube of its network: net_vm")
    shown.entry("Qube").set_text("no such qube")
    assert shown.radio("The outermost qube of its network")


def test_an_edit_shows_the_qube_and_no_name_to_be_changed(shown: Shown) -> None:
    shown.form.show(Draft.of(rule()))
    settle()
    assert not shown.entry("Qube").get_mapped()
    assert (
        not shown.entry("Name of the rule").get_visible() or not shown.entry("Name of the rule").get_mapped()
    )
    assert "work" in texts(shown.window)
    shown.form.show(replace(Draft.of(rule()), base=None))
    settle()
    assert shown.entry("Qube").get_mapped()


def test_what_is_wrong_is_said_in_words_at_its_field(shown: Shown) -> None:
    port = shown.entry("Server port")
    wrong = Judgement(Draft(), "", "", faults={"dstports": PROBE})
    shown.form.mark(wrong)
    assert PROBE in texts(shown.window)
    assert port.get_accessible().get_description() == PROBE
    assert port.get_style_context().has_class("invalid_entry")
    shown.form.mark(wrong, {"dstports": "first"})
    assert port.get_accessible().get_description() == "first"
    shown.form.mark(Judgement(Draft(), "", ""))
    assert PROBE not in texts(shown.window)
    assert port.get_accessible().get_description() == ""
    assert not port.get_style_context().has_class("invalid_entry")


def test_what_is_wrong_may_quote_a_whole_file_that_was_pasted_and_only_its_beginning_is_laid_out(
    shown: Shown,
) -> None:
    port = shown.entry("Server port")
    shown.form.mark(Judgement(Draft(), "", "", faults={"dstports": "x" * 5000}))
    (words,) = [text for text in texts(shown.window) if text.startswith("xxx")]
    assert words == port.get_accessible().get_description() == f"{'x' * (TEXT_MAX - 3)}..."


def test_radio_buttons_say_what_is_wrong_and_keep_their_names(shown: Shown) -> None:
    shown.form.mark(Judgement(Draft(), "", "", faults={"forwardtype": "no"}))
    place = shown.radio("Another qube:")
    assert place.get_accessible().get_description() == "no"


def test_further_options_are_open_where_they_matter(shown: Shown) -> None:
    expander = next(widget for widget in walk(shown.window) if isinstance(widget, Gtk.Expander))
    shown.form.show(Draft(target="work"))
    assert not expander.get_expanded()
    shown.form.mark(Judgement(Draft(), "", "", faults={"limits": "no"}))
    assert expander.get_expanded()
    expander.set_expanded(False)
    shown.form.show(Draft.of(rule("mode=qrexec")))
    assert not expander.get_expanded()
    shown.form.show(Draft(autostart=True))
    assert expander.get_expanded()
    expander.set_expanded(False)
    shown.form.focus("limits")
    assert expander.get_expanded()


def test_whether_a_tunnel_may_be_bypassed_is_asked_where_there_is_one(shown: Shown) -> None:
    bypass = shown.check("Bypass the tunnel, I accept the risk")
    settle()
    assert not bypass.get_mapped()
    shown.form.mark(Judgement(Draft(), "", "", forward=Forward(rule(), (Finding(Cause.TUNNEL),))))
    settle()
    assert bypass.get_mapped()
    bypass.set_active(True)
    assert shown.draft == Draft(bypass_tunnel=True)
    shown.form.mark(Judgement(Draft(), "", ""))
    settle()
    assert bypass.get_mapped()
    shown.form.show(Draft())
    settle()
    assert not bypass.get_mapped()


def test_a_time_that_is_typed_is_said_in_full(shown: Shown) -> None:
    shown.form.fit(world(), NOW)
    shown.entry("Until").set_text("2h")
    assert any(text.endswith("(in 2 h)") for text in texts(shown.window))
    shown.entry("Until").set_text("soon")
    assert not any("(in " in text for text in texts(shown.window))
    shown.entry("Until").set_text("2h")
    shown.radio("1 hour").set_active(True)
    assert not any("(in " in text for text in texts(shown.window))


def test_a_reader_of_the_screen_comes_to_the_fields_in_their_order(shown: Shown) -> None:
    names: list[str] = []

    def read(accessible: Atk.Object) -> None:
        names.append(accessible.get_name() or "")
        for number in range(accessible.get_n_accessible_children()):
            read(accessible.ref_accessible_child(number))

    read(shown.form.widget.get_accessible())
    fields = [
        "Qube",
        "Server port",
        "Reachable at",
        "Exposed port",
        "Who may connect",
        "How long",
        "Comment",
    ]
    assert [name for name in names if name in fields] == sorted(
        (name for name in names if name in fields), key=fields.index
    )
    assert names.index("Qube:") < names.index("Qube") < names.index("Comment:")


def test_no_label_takes_the_name_of_a_radio_button(shown: Shown) -> None:
    labels = [widget for widget in walk(shown.window) if isinstance(widget, Gtk.Label)]
    led = [label.get_mnemonic_widget() for label in labels]
    assert any(isinstance(widget, Gtk.Entry) for widget in led)
    # That of a button leads to the button itself.
    assert [
        label.get_text()
        for label, widget in zip(labels, led, strict=True)
        if isinstance(widget, Gtk.RadioButton) and label.get_ancestor(Gtk.RadioButton) is None
    ] == []


def test_a_form_that_is_gone_is_let_go() -> None:
    """Also where its lists and its calendar were opened."""
    shown = Shown()
    shown.form.fit(world(), NOW)
    for button in [widget for widget in walk(shown.window) if isinstance(widget, Gtk.MenuButton)]:
        if button.get_mapped():
            button.set_active(True)
            until(button.get_popover().get_mapped)
            button.set_active(False)
    form = weakref.ref(shown.form)
    shown.window.destroy()
    del shown, button
    until(lambda: gc.collect() + 1 and form() is None)
