"""A node for each method, made from its settings."""

from dataclasses import Field, fields
from typing import Any

from comfy_api.latest import io

from ..fmn.methods import METHODS, method
from .common import advanced
from .types import CATEGORY, Method

WIDGETS = "as set here"  # the choice of "preset" that uses the widgets
# A widget called "seed" would change itself after every run.
WIDGET_NAMES = {"seed": "training_seed"}
TITLES = {"lr": "learning rate"}
FINEST = 1e-7  # step of numbers without one


def _widget_name(setting: Field[Any]) -> str:
    """A renamed setting keeps its widget's name, which workflows in API form hold."""
    return setting.metadata["formerly"] or WIDGET_NAMES.get(setting.name, setting.name)


def _input(setting: Field[Any]) -> io.Input:
    """The widget of a setting, optional so that workflows from before it existed keep working."""
    name, meta, default = _widget_name(setting), setting.metadata, setting.default
    options = {"default": default, "tooltip": meta["help"], "optional": True}
    if meta["formerly"] or setting.name in TITLES:
        options["display_name"] = TITLES.get(setting.name, setting.name)
    limits = {"min": meta["low"], "max": meta["high"]}
    if meta["choices"]:
        widget = io.Combo.Input(name, options=list(meta["choices"]), **options)
    elif isinstance(default, bool):
        widget = io.Boolean.Input(name, **options)
    elif isinstance(default, str):
        widget = io.String.Input(name, **options)
    elif isinstance(default, int):
        widget = io.Int.Input(name, step=meta["step"] or 1, **limits, **options)
    else:
        step = meta["step"] or FINEST
        widget = io.Float.Input(name, step=step, round=False, **limits, **options)
    return advanced(widget)[0] if meta["advanced"] else widget


class MethodNode(io.ComfyNode):
    """Base of the method nodes; ``method`` is the name of a method in ``fmn.methods``."""

    method = ""

    @classmethod
    def define_schema(cls) -> io.Schema:
        module = method(METHODS[cls.method][0])
        inputs = [_input(setting) for setting in fields(module.Settings)]
        if len(module.PRESETS) > 1:
            preset = io.Combo.Input(
                "preset",
                options=[WIDGETS, *module.PRESETS],
                default=WIDGETS,
                optional=True,
                tooltip="A name: that preset's values; everything below is ignored. "
                f"'{WIDGETS}': the values below.",
            )
            inputs.insert(0, preset)
        return io.Schema(
            node_id=f"FMN_{cls.__name__}",
            display_name=f"Method: {module.TITLE}",
            category=f"{CATEGORY}/methods",
            description=module.ABOUT,
            inputs=inputs,
            outputs=[
                Method.Output("METHOD", "method", "The settings, for method on the training nodes.")
            ],
        )

    @classmethod
    def execute(cls, preset: str = WIDGETS, **widgets: Any) -> io.NodeOutput:
        module = method(METHODS[cls.method][0])
        if preset != WIDGETS:
            return io.NodeOutput(module.PRESETS[preset])
        names = {_widget_name(setting): setting.name for setting in fields(module.Settings)}
        return io.NodeOutput(module.Settings(**{names[key]: widgets[key] for key in widgets}))


def _node(name: str) -> type[MethodNode]:
    title = "".join(word.capitalize() for word in name.split("_"))
    return type(f"Method{title}", (MethodNode,), {"method": name})


NODES = [_node(name) for name in METHODS]
