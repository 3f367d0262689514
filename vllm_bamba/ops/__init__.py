"""The operators of a Mamba-2 mixer, one folder each; README.md has the glossary and the equations."""
