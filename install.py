"""Run by ComfyUI-Manager after the requirements. There is nothing to install or to fetch: the
folders for patches are made when the first patch is saved."""
