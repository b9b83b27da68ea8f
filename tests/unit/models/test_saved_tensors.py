"""Gradients of networks that write in place, against those of the same without."""

import pytest
import torch

from fmn.models.saved_tensors import copied_before_writing

X = torch.linspace(0, 1, 6)


def gradient(function):
    x = X.clone().requires_grad_()
    with copied_before_writing():
        return torch.autograd.grad(function(x).sum(), x)[0]


def test_what_was_saved_of_a_freed_tensor_is_not_taken_for_another():
    """Addresses and ids come again here, with which torch's own gives a wrong gradient."""

    def function(x):
        outputs = []
        for i in range(20):
            y = x + i
            outputs.append(y.sin())
            y.zero_()
            del y
        return torch.stack(outputs)

    torch.testing.assert_close(gradient(function), sum((X + i).cos() for i in range(20)))


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.zero_(),
        lambda y: y[2:].fill_(7),
        lambda y: y.view(2, 3).mul_(3),
        lambda y: torch.zeros(6, out=y.detach()),
        lambda y: torch._foreach_add_([y.detach()], 1),
        lambda y: (y.zero_(), y.add_(4)),
    ],
    ids=["whole", "part", "view", "out", "several", "twice"],
)
def test_writing_after_saving_changes_no_gradient(write):
    def function(x):
        y = x * 1
        outputs = y.sin(), y[1:4].exp(), y.view(3, 2).square()  # each saves a part of its own
        with torch.no_grad():
            write(y)
        return torch.cat([output.flatten() for output in outputs])

    expected = X.cos() + 2 * X
    expected[1:4] += X[1:4].exp()
    torch.testing.assert_close(gradient(function), expected)


def test_writing_that_counts_has_its_gradient():
    def function(x):
        y = x * 2
        first = y.sin()
        y += x.exp()
        return first + y.square()

    expected = 2 * (2 * X).cos() + 2 * (2 * X + X.exp()) * (2 + X.exp())
    torch.testing.assert_close(gradient(function), expected)


def test_what_nobody_writes_to_is_not_copied():
    x = X.clone().requires_grad_()
    with copied_before_writing():
        y = x * 1
        assert y.sin().grad_fn._saved_self.data_ptr() == y.data_ptr()
