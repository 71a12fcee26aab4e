"""Plain layers for model authors: norm, rotary positions, packed attention, feed-forward, head.

A library, not a plugin: it has no hooks. Import the module that is needed; importing this package
is light.
"""
