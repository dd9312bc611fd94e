"""The engines HEMERA drives, one module each: the only importers of those projects."""
