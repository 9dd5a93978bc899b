"""Random programs on an optimizer, each compared with a twin after every step.

``program.py`` says what a program is and runs it, ``twin.py`` computes the numbers it must give, ``strategies.py``
generates programs for hypothesis. ``python -m fuzz`` (with this folder's parent on PYTHONPATH) runs many.
"""
