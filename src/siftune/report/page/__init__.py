"""A report: one page, which needs no network, of runs, kits, sweeps and audits.

    subjects    what the names that a user gives stand for, read with suspicion: a folder may be a stranger's
    sections/   a module for each part of the page: from what was read to words, figures and tables
    figure      what a figure is, and its file; svg, axes and the charts (lines, heat, points) draw it
    page        puts all of it into the template, which escapes whatever comes from outside

Figures are SVG of our own: they take the page's colours, light and dark, print as lines, weigh a few kilobytes, and
need no script. plotly.js alone has more than the 3 MB that a page may take, Vega and Bokeh draw by script, uPlot on a
canvas that prints as pixels and has no heat maps, and matplotlib's SVG knows neither of themes nor of narrow screens.
"""
