"""Errors that a user can act on. Every message is one sentence: what is wrong, what was
expected, what to do."""


class ForgetError(Exception):
    """Input or a model that cannot be worked with; the message says what to change."""


class NonFiniteLoss(ForgetError):
    """Training blew up. The parameters hold the last state whose loss was finite.

    Attributes:
        losses: the finite losses so far, one a step.
        patch: the patch made from the last good state; None if no step was finished.
    """

    def __init__(self, message, losses):
        super().__init__(message)
        self.losses = losses
        self.patch = None
