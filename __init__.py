"""Forget-Me-Not as a ComfyUI custom node pack."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here, so that tools can import the package without ComfyUI.
    from .nodes import ForgetMeNot

    return ForgetMeNot()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
