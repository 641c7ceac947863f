# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules in XML: one rule in the form of Qubes' firewall.xml, and a document of many rules.

    <forwards version="2"><tunnel qube="sys-vpn">yes</tunnel>
      <qube name="work"><rule name="web"><properties>
      <property name="action">forward</property>...</properties></rule></qube></forwards>

It also reads the firewall.xml of a system with the forwarding patches of 2021: it takes the forwarding rules
and counts all others. DTDs and entity declarations are refused before they can have any effect.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat
from xml.sax.saxutils import escape  # it only escapes

from .errors import RuleError, TextError
from .exchange import OLDER, VERSION, Document, Read, add_mark, joined, within
from .options import Option
from .rules import ForwardRule, NamedRule
from .values import QubeName, RuleName, parse_qube_name, parse_rule_name, yes_no

# forwards, qube, rule, properties, property: nothing deeper has a meaning.
_DEPTH_MAX = 5


def print_rule(rule: ForwardRule, name: str | None = None, indent: str = "") -> str:
    """Print one ``<rule>``; in a document, ``name`` is its attribute."""
    head = "<rule>" if name is None else f'<rule name="{name}">'
    properties = "".join(
        f'{indent}    <property name="{option}">{escape(text)}</property>\n'
        for option, text in rule.options().items()
    )
    return f"{indent}{head}\n{indent}  <properties>\n{properties}{indent}  </properties>\n{indent}</rule>\n"


def print_document(rules: Iterable[NamedRule], tunnels: Mapping[QubeName, bool]) -> str:
    """Print the marks of tunnels, and then all rules, grouped by target."""
    by_target: dict[QubeName, list[NamedRule]] = {}
    for named in rules:
        by_target.setdefault(named.target, []).append(named)
    parts = [f'<?xml version="1.0" encoding="utf-8"?>\n<forwards version="{VERSION}">\n']
    parts += [
        f'  <tunnel qube="{qube}">{yes_no(is_marked)}</tunnel>\n' for qube, is_marked in tunnels.items()
    ]
    for target, its_rules in by_target.items():
        parts.append(f'  <qube name="{target}">\n')
        parts += [print_rule(named.rule, named.name, "    ") for named in its_rules]
        parts.append("  </qube>\n")
    parts.append("</forwards>\n")
    return "".join(parts)


def parse_rule(text: str) -> ForwardRule:
    """Parse one ``<rule>``. Raises `RuleError` that names the line and the property."""
    root = _parse_tree(text)
    if root.tag != "rule":
        raise RuleError(root.place, "one rule is a <rule> element")
    return _rule(root, _properties(root)).rule


def parse_document(text: str) -> Document:
    """Parse ``<forwards>``, a single ``<rule>`` or a firewall.xml. Raises `RuleError`."""
    root = _parse_tree(text)
    if root.tag == "rule":
        return Document([_rule(root, _properties(root))], {}, False)
    if root.tag == "firewall":
        rules = [(rule, _properties(rule)) for part in root.only("rules") for rule in part.only("rule")]
        taken = [_rule(rule, found) for rule, found in rules if _is_forward(found)]
        return Document(joined(taken), {}, False, len(rules) - len(taken))
    version = root.attributes.get("version")
    if root.tag != "forwards" or version not in (str(OLDER), str(VERSION)):
        raise RuleError(
            root.place,
            f'expected <forwards version="{VERSION}">, <rule>, or the <firewall> of a firewall.xml',
        )
    is_export = version == str(VERSION)
    rules_of, tunnels = [], dict[QubeName, bool]()
    for node in root.only("qube", *(["tunnel"] if is_export else [])):
        if node.tag == "tunnel":
            node.only()
            add_mark(tunnels, node.attributes.get("qube", ""), node.text, node.place)
            continue
        target = _name_of(node, parse_qube_name)
        for rule in node.only("rule"):
            _name_of(rule, parse_rule_name)
            rules_of.append(_rule(rule, _properties(rule), QubeName(target)))
    return Document(rules_of, tunnels, is_export)


@dataclass(slots=True)
class _Node:
    """An element and the line on which it begins."""

    tag: str
    attributes: dict[str, str]
    line: int
    children: list["_Node"] = field(default_factory=list)
    text: str = ""

    @property
    def place(self) -> str:
        name = self.attributes.get("name")
        return f"{self.tag}{'' if name is None else f' {name!a}'} at line {self.line}"

    def only(self, *tags: str) -> list["_Node"]:
        """Its children, which must all have one of these tags; without tags it may only contain text."""
        known = " or ".join(f"<{tag}>" for tag in tags)
        for child in self.children:
            if child.tag not in tags:
                what = f"{known} elements and nothing else" if tags else "text and nothing else"
                raise RuleError(child.place, f"<{self.tag}> holds {what}")
        if tags and self.text.strip():
            raise RuleError(self.place, f"text between the {known} elements")
        return self.children


def _parse_tree(text: str) -> _Node:
    parser = expat.ParserCreate("utf-8")
    top = _Node("document", {}, 1)
    stack = [top]

    def start(tag: str, attributes: dict[str, str]) -> None:
        node = _Node(tag, attributes, parser.CurrentLineNumber)
        if len(stack) > _DEPTH_MAX:
            raise RuleError(node.place, "elements stand too deep in each other for rules")
        stack[-1].children.append(node)
        stack.append(node)

    def end(tag: str) -> None:
        stack.pop()

    def data(piece: str) -> None:
        stack[-1].text += piece

    def refuse(*_: object) -> NoReturn:
        raise RuleError(f"line {parser.CurrentLineNumber}", "a document type or entity; take it out")

    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text.encode("utf-8", "surrogatepass"), True)
    except expat.ExpatError as error:
        raise RuleError(f"line {error.lineno}", f"not XML: {expat.ErrorString(error.code)}") from None
    return top.children[0]


def _properties(rule: _Node) -> list[Option]:
    parts = rule.only("properties")
    if len(parts) != 1:
        raise RuleError(rule.place, "a rule has one <properties> element")
    found = []
    for node in parts[0].only("property"):
        if "name" not in node.attributes:
            raise RuleError(f"{rule.place}, {node.place}", "a property has a name")
        if node.children:
            raise RuleError(f"{rule.place}, {node.place}", "a property holds text and nothing else")
        found.append(Option(node.attributes["name"], node.text, node.place))
    return found


def _is_forward(options: Iterable[Option]) -> bool:
    return any(option.name == "action" and option.value == "forward" for option in options)


def _rule(node: _Node, options: list[Option], target: QubeName | None = None) -> Read:
    name = None if "name" not in node.attributes else RuleName(_name_of(node, parse_rule_name))
    try:
        return Read(target, name, ForwardRule.from_options(options), node.place)
    except RuleError as error:
        raise within(node.place, error) from None


def _name_of(node: _Node, parse: Callable[[str], str]) -> str:
    if "name" not in node.attributes:
        raise RuleError(node.place, f"a <{node.tag}> has a name here")
    try:
        return parse(node.attributes["name"])
    except TextError as error:
        raise RuleError(node.place, str(error)) from None
