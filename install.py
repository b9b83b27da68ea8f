"""Run by ComfyUI-Manager after it has installed requirements.txt. Nothing else has to be done: the
folders for patches are made when the first patch is saved."""
