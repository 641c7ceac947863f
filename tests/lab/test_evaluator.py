# SPDX-License-Identifier: GPL-2.0-or-later
"""The evaluator and, where it is installed, Qubes' own parser: the same verdicts from both."""

import importlib.util
from pathlib import Path

import pytest

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.evaluator import ADMIN_UUID, Domain, Request, System
from qubes_fwd_qrexec.lab.policytext import PolicyTextError, load_policy, parse_policy
from qubes_fwd_qrexec.lab.verdicts import Judge, OwnJudge, QubesJudge, as_json, best_judge, play

VECTORS = Path(__file__).parents[1] / "vectors" / "policy-verdicts.json"
HAS_QREXEC = importlib.util.find_spec("qrexec") is not None
SYSTEM = System(
    {
        domain.name: domain
        for domain in (
            Domain(name="dom0", klass="AdminVM", uuid=ADMIN_UUID),
            Domain(
                name="sys-net", klass="AppVM", uuid="1", default_disposable="dvm", tags=frozenset({"edge"})
            ),
            Domain(name="work", klass="AppVM", uuid="4"),
            Domain(name="vault", klass="AppVM", uuid="5", is_running=False),
            Domain(name="hidden", klass="AppVM", uuid="6", is_internal=True),
            Domain(
                name="dvm", klass="AppVM", uuid="7", template_for_dispvms=True, tags=frozenset({"viewer"})
            ),
        )
    }
)


@pytest.fixture(
    params=[
        pytest.param(OwnJudge, id="lab"),
        pytest.param(
            QubesJudge,
            id="qrexec",
            marks=pytest.mark.skipif(not HAS_QREXEC, reason="the qrexec package is not installed"),
        ),
    ]
)
def judge(request: pytest.FixtureRequest) -> Judge:
    made: Judge = request.param()
    return made


def verdict(judge: Judge, directory: Path, policy: str, target: str, source: str = "sys-net") -> object:
    (directory / "30-forward.policy").write_text(policy, encoding="utf-8")
    request = Request(service="s", argument="+1", source=source, target=target)
    return as_json(judge.load(directory).judge(SYSTEM, request))


def test_every_recorded_verdict_is_reproduced(judge: Judge) -> None:
    comparison = play(VECTORS, judge)
    assert comparison.differences == ()
    assert comparison.agreed == 1205


@pytest.mark.parametrize(
    ("rule", "target", "found"),
    [
        ("s * sys-net @dispvm:dvm allow", "@dispvm:dvm", "@dispvm:dvm"),
        ("s * sys-net @dispvm:dvm allow", "@dispvm", "@dispvm:dvm"),
        ("s * sys-net @dispvm allow", "@dispvm", "@dispvm:dvm"),
        ("s * sys-net @dispvm:@tag:viewer allow", "@dispvm:dvm", "@dispvm:dvm"),
        ("s * sys-net @dispvm:@tag:viewer allow", "@dispvm", "@dispvm:dvm"),
        ("s * sys-net @dispvm:@tag:other allow", "@dispvm:dvm", None),
        ("s * sys-net @anyvm allow", "@dispvm:work", None),
        ("s * sys-net @anyvm allow", "@anyvm", None),
        ("s * sys-net * allow", "dom0", "dom0"),
        ("s * sys-net @anyvm allow", "dom0", None),
        ("s * sys-net uuid:4 allow", "work", "work"),
        ("s * uuid:1 work allow", "uuid:4", "uuid:4"),
        ("s * sys-net work allow target=uuid:5", "work", "uuid:5"),
        ("s * sys-net work allow target=@adminvm", "work", "dom0"),
        ("s * sys-net work allow target=@dispvm", "work", "@dispvm:dvm"),
        ("s * sys-net work allow target=nosuch", "work", None),
        ("s * sys-net dom0 allow autostart=no", "@adminvm", "dom0"),
        ("s * sys-net @dispvm allow autostart=no", "@dispvm", None),
        ("s * @tag:edge @type:AppVM allow", "vault", "vault"),
        ("s * sys-net vault allow autostart=no", "vault", None),
        ("* * * * allow", "sys-net", None),
    ],
)
def test_tokens_lead_to_the_target(
    judge: Judge, tmp_path: Path, rule: str, target: str, found: str | None
) -> None:
    answer = verdict(judge, tmp_path, f"{rule}\n", target)
    assert isinstance(answer, dict)
    assert answer.get("target") == found


@pytest.mark.parametrize(
    ("rules", "targets", "default"),
    [
        ("s * sys-net @anyvm ask", ["@dispvm:dvm", "dvm", "vault", "work"], None),
        ("s * sys-net @anyvm ask autostart=no default_target=vault", ["dvm", "work"], None),
        ("s * sys-net * ask default_target=dom0", ["@dispvm:dvm", "dom0", "dvm", "vault", "work"], "dom0"),
        ("s * sys-net @tag:viewer deny\ns * sys-net @type:AppVM ask", ["vault", "work"], None),
        (
            "s * sys-net @dispvm:@tag:viewer ask\ns * sys-net work ask default_target=@dispvm",
            ["@dispvm:dvm", "work"],
            "@dispvm:dvm",
        ),
        ("s * sys-net work ask target=@adminvm", ["dom0"], None),
        ("s * sys-net @adminvm ask\ns * sys-net work ask", ["dom0", "work"], None),
    ],
)
def test_asking_offers_what_some_rule_would_allow(
    judge: Judge, tmp_path: Path, rules: str, targets: list[str], default: str | None
) -> None:
    assert verdict(judge, tmp_path, rules, "work") == {
        "outcome": "ask",
        "targets": targets,
        "default_target": default,
    }


def test_asking_with_nothing_to_choose_denies(judge: Judge, tmp_path: Path) -> None:
    answer = verdict(judge, tmp_path, "s * sys-net vault ask autostart=no", "vault")
    assert answer == {"outcome": "deny", "notify": True}


def test_files_count_in_the_order_of_their_names(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "20-first.policy").write_text("s * * * deny notify=no\n", encoding="utf-8")
    (tmp_path / ".19-hidden.policy").write_text("junk\n", encoding="utf-8")
    (tmp_path / "10-other.txt").write_text("junk\n", encoding="utf-8")
    answer = verdict(judge, tmp_path, "s * * * allow\n", "work")
    assert answer == {"outcome": "deny", "notify": False}


@pytest.mark.parametrize(
    "text",
    [
        "junk\n",
        "s * a b allow x\n",
        "s * a @default allow\n",
        "* +1 a b allow\n",
        "s+ * a b allow\n",
        "s * @default b allow\n",
        "s * a @tag:@x allow\n",
        "!include\n",
        "s * a b deny user=x\n",
    ],
)
def test_one_bad_line_in_any_file_denies_all(judge: Judge, tmp_path: Path, text: str) -> None:
    (tmp_path / "99-bad.policy").write_text(text, encoding="utf-8")
    with pytest.raises(PolicyTextError):
        verdict(judge, tmp_path, "s * * * allow\n", "work")


def test_forbidden_file_name_and_bad_encoding_deny_all(judge: Judge, tmp_path: Path) -> None:
    for name, data in (("30-Upper.policy", b""), ("31-bytes.policy", b"# \xff\n")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(PolicyTextError, match=name):
            load_policy(tmp_path)
        path.unlink()


@pytest.mark.parametrize("line", ["!include x", "!include-dir x", "!include-service a b c", "!compat-4.0"])
def test_directives_are_an_error_and_never_an_allow(line: str) -> None:
    with pytest.raises(PolicyTextError, match=r"f:2: .*lab"):
        parse_policy(f"# head\n{line}\ns * * * allow\n", "f")


def test_only_newlines_part_lines() -> None:
    assert len(parse_policy("# a\x0cs * * * allow\n# b\u2028s * * * allow\ns * * * deny")) == 1


def test_best_judge_is_the_real_one_where_it_is_installed() -> None:
    assert best_judge().name == ("qrexec" if HAS_QREXEC else "lab")


def test_play_shows_differences_and_refuses_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(
        '{"system_info": {"domains": {}}, "cases": [{"policy": "", "request": {"service": "s",'
        ' "argument": "+", "source": "a", "target": "b"}, "result": {"outcome": "allow"}}]}',
        encoding="utf-8",
    )
    (difference,) = play(path, OwnJudge()).differences
    assert difference.found == {"outcome": "deny", "notify": True}
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(StoreError, match="no file of verdicts"):
        play(path, OwnJudge())
    with pytest.raises(StoreError, match="No such file"):
        play(tmp_path / "none", OwnJudge())
