"""The grid of pictures before and after."""

import torch

from fmn.jobs import compare


def test_a_long_prompt_takes_two_lines_of_a_label(monkeypatch):
    labels = []
    monkeypatch.setattr(
        compare, "labelled_grid", lambda rows, *_: labels.extend(r[0] for r in rows)
    )
    picture = torch.zeros(8, 8, 3)
    for prompt in ("a teapot in the style of ink drawing", "a very long prompt " * 9):
        compare.grid([compare.Pair(prompt, True, picture, picture)])
    assert labels[0] == "forget: a teapot in the style of\nink drawing"
    first, second = labels[1].splitlines()
    assert max(len(first), len(second)) <= 34 and second.endswith(" ...")
