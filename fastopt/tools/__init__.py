"""For people who choose an optimizer: `compare`, the demonstration, and what they are made of.

Built on the public names alone; nothing else in fastopt imports from here but the command line and the package itself.
"""
