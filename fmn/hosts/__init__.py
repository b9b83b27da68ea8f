"""Where models live: one module a host. Each offers ``fmn.model.Model``."""
