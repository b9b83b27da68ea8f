"""The pack's CSS in the page: it styles the pack's elements and nothing else."""

import re

from .frontend import open_prompt
from .workflows import node

# Every rule with a class of ours: [selector, the properties it sets].
RULES = """() => {
  const all = rules => [...rules].flatMap(
    rule => rule.selectorText ? [rule] : all(rule.cssRules ?? []));
  return [...document.styleSheets, ...document.adoptedStyleSheets]
    .flatMap(sheet => all(sheet.cssRules))
    .filter(rule => /\\bfmn-|FMN_/.test(rule.cssText))
    .map(rule => [rule.selectorText, [...rule.style]]);
}"""
ROOTS = r"\.fmn-(shelf|train|node-text)(?![\w-])[^+~]*"


def test_no_rule_matches_outside_our_elements(shelf):
    open_prompt(shelf, {"1": node("FMN_TrainForgetPatch"), "2": node("FMN_InspectForgetPatch")})
    rules = shelf.evaluate(RULES)
    selectors = [part.strip() for selector, _ in rules for part in selector.split(",")]
    for root in ("shelf", "train", "node-text"):
        assert any(selector.startswith(f".fmn-{root}") for selector in selectors), root
    outside = [selector for selector in selectors if not re.fullmatch(ROOTS, selector)]
    assert set(outside) == {":root"}  # colours of sockets, under names of ours
    names = [name for selector, names in rules if selector == ":root" for name in names]
    assert names and all(re.match("--color-datatype-(FMN|FORGET)_", name) for name in names)
    assert shelf.evaluate("document.adoptedStyleSheets.length") == 0
