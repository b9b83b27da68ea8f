"""What follows a training from outside."""


class Supervisor:
    """A step callback that also says where training begins and which step it ends with.

    Methods pass it on as any other callback; only ``fitting`` reads the rest.

    Args:
        on_step: called with each ``train.Step``; may raise to cancel.
        resume: ``resume.State`` of an earlier run to go on with.
        keep_best: the patch is that of the step with the lowest mean of the last
            ``fitting.SMOOTHED`` losses; False: of the last step.
    """

    def __init__(self, on_step=lambda step: None, resume=None, keep_best=False):
        self.on_step, self.resume, self.keep_best = on_step, resume, keep_best

    def __call__(self, step):
        self.on_step(step)
