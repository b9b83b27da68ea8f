"""Where models live: one module a host. Each offers ``fmn.models.interface.Model``."""
