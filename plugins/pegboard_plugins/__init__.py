"""The built-in parts of Pegboard, as plugins without privilege; every sub-package with hookimpls is one plugin."""
