"""The measuring parts of the studies: one module per study with a function ``measure``.

A measuring part takes everything it needs from its cell's factors, so that words, columns and
figures can change without anything being measured again. Modules whose name starts with an
underscore are shared by several of them.
"""
