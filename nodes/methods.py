"""A node for each method, made from its settings."""

from dataclasses import fields

from comfy_api.latest import io

from ..fmn.methods import METHODS, method
from .types import CATEGORY, Method

WIDGETS = "as set here"
# A widget called "seed" would change itself after every run.
WIDGET_NAMES = {"seed": "training_seed"}
TITLES = {"lr": "learning rate"}
FINEST = 1e-7


def _widget(described):
    """A field's widget: workflows for API use hold its name, so a renamed field keeps it."""
    return described.metadata["formerly"] or WIDGET_NAMES.get(described.name, described.name)


def _input(described):
    told, default = described.metadata, described.default
    name = _widget(described)
    # Optional, so that workflows from before a setting came keep working.
    given = {"default": default, "tooltip": told["help"], "optional": True}
    if told["formerly"] or described.name in TITLES:
        given["display_name"] = TITLES.get(described.name, described.name)
    if told["choices"]:
        return io.Combo.Input(name, options=list(told["choices"]), **given)
    if isinstance(default, bool):
        return io.Boolean.Input(name, **given)
    if isinstance(default, str):
        return io.String.Input(name, **given)
    limits = {"min": told["low"], "max": told["high"]}
    if isinstance(default, int):
        return io.Int.Input(name, step=told["step"] or 1, **limits, **given)
    step = told["step"] or FINEST
    return io.Float.Input(name, step=step, round=False, **limits, **given)


def _preset_input(presets):
    return io.Combo.Input(
        "preset",
        options=[WIDGETS, *presets],
        default=WIDGETS,
        optional=True,
        tooltip=f"'{WIDGETS}' uses the values below. A name uses that preset's values, and nothing "
        "below counts then.",
    )


class MethodNode(io.ComfyNode):
    """Base of the method nodes; ``method`` names the module of ``fmn.methods``."""

    method = ""

    @classmethod
    def define_schema(cls):
        module = method(METHODS[cls.method][0])
        presets = list(module.PRESETS)
        inputs = [_input(each) for each in fields(module.Settings)]
        if len(presets) > 1:
            inputs.insert(0, _preset_input(presets))
        return io.Schema(
            node_id=f"FMN_{cls.__name__}",
            display_name=f"Method: {module.TITLE}",
            category=f"{CATEGORY}/methods",
            description=module.ABOUT,
            inputs=inputs,
            outputs=[
                Method.Output(
                    "METHOD",
                    display_name="method",
                    tooltip="The settings, for method on the training nodes.",
                )
            ],
        )

    @classmethod
    def execute(cls, preset=WIDGETS, **widgets):
        module = method(METHODS[cls.method][0])
        if preset != WIDGETS:
            return io.NodeOutput(module.PRESETS[preset])
        names = {_widget(described): described.name for described in fields(module.Settings)}
        values = {names[widget]: value for widget, value in widgets.items()}
        return io.NodeOutput(module.Settings(**values))


def _node(name):
    title = "".join(word.capitalize() for word in name.split("_"))
    return type(f"Method{title}", (MethodNode,), {"method": name})


NODES = [_node(name) for name in METHODS]
