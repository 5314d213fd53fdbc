"""Plots of reports: a figure is described once, and drawn as SVG in a page and as a PNG file."""
